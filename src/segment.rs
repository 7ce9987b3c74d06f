//! Segments: the files that the journal's stream of bytes is cut into.
//!
//! Segment number `n` holds the stream's positions from `n` to `n + 1` times [`Layout::segment_bytes`], behind one block of
//! [`BLOCK_BYTES`] that says so; the first is number 1. A record may begin in one segment and end in the next.
//!
//! A segment has all its bytes on the disk before it gets its name, so that the journal only overwrites: then a sync has
//! no sizes and extents to write, and a full disk is known before anything is promised. It is made of zeros, or of a
//! segment that is no longer needed. Where syncs are seldom it is only set aside. Nothing in a segment is changed once the journal has gone past it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use crate::aligned::{AlignedBuffer, BLOCK_BYTES};
use crate::change::Lsn;
use crate::data;
use crate::field::{Fields, Put};

const MAGIC: &[u8; 8] = b"kurirjnl";
/// Of the layout of segments, records, changes and checkpoints together.
pub const VERSION: u32 = 3;
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 8 + 4;
/// Zeros are written in pieces of this size: a write of the journal waits for one of them.
const FILL_BYTES: usize = 128 * 1024;

/// How a journal's stream lies in its segments. It never changes in the life of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Goes into the sum of every record.
    pub salt: u32,
    /// How much of the stream one segment holds: a multiple of [`BLOCK_BYTES`].
    pub segment_bytes: u64,
}

impl Layout {
    /// The number of the segment that holds this position.
    #[must_use]
    pub fn segment(self, lsn: Lsn) -> u64 {
        lsn.0 / self.segment_bytes
    }

    /// The first position of a segment.
    #[must_use]
    pub fn start(self, segment: u64) -> Lsn {
        Lsn(segment.saturating_mul(self.segment_bytes))
    }

    /// The first position of the stream.
    #[must_use]
    pub fn first(self) -> Lsn {
        self.start(1)
    }

    /// Where in its file a position stands.
    #[must_use]
    pub fn offset(self, lsn: Lsn) -> u64 {
        BLOCK_BYTES as u64 + lsn.0 % self.segment_bytes
    }

    /// The path of a segment.
    #[must_use]
    pub fn path(directory: &Path, segment: u64) -> PathBuf {
        directory.join(format!("{segment:010}.log"))
    }

    /// The block that a segment opens with: `kurirjnl`, [`VERSION`] (4 bytes), the salt (4), the segment's number (8), the
    /// segment size (8), and the CRC-32C of these (4); the rest is zero.
    #[must_use]
    pub fn header(self, segment: u64) -> Vec<u8> {
        let mut header = Vec::with_capacity(BLOCK_BYTES);
        header.extend_from_slice(MAGIC);
        VERSION.put(&mut header);
        self.salt.put(&mut header);
        segment.put(&mut header);
        self.segment_bytes.put(&mut header);
        let sum = crc32c::crc32c(&header);
        sum.put(&mut header);
        header.resize(BLOCK_BYTES, 0);
        header
    }

    /// Reads what [`Self::header`] makes: the layout, and the segment's number.
    #[must_use]
    pub fn read_header(bytes: &[u8]) -> Option<(Self, u64)> {
        let fields = bytes.get(..HEADER_BYTES)?;
        let (sum, mut rest) = (crc32c::crc32c(&fields[..HEADER_BYTES - 4]), Fields(fields));
        let is_ours = rest.bytes(MAGIC.len())? == MAGIC && rest.take::<u32>()? == VERSION;
        let (salt, segment, segment_bytes) = (rest.take()?, rest.take()?, rest.take::<u64>()?);
        let is_whole =
            rest.take::<u32>()? == sum && bytes.get(HEADER_BYTES..BLOCK_BYTES)?.iter().all(|byte| *byte == 0);
        let is_sane = segment_bytes > 0 && segment_bytes.is_multiple_of(BLOCK_BYTES as u64);
        (is_ours && is_whole && is_sane).then_some((Self { salt, segment_bytes }, segment))
    }
}

/// How segments are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Past the page cache, and durable when the write returns (`O_DIRECT`, `O_DSYNC`).
    Direct,
    /// Through the page cache, and durable after a sync.
    Buffered,
    /// The same, with syncs that are seldom.
    Seldom,
}

impl Access {
    /// Finds out whether the file system of `directory` takes direct writes of one block.
    ///
    /// # Errors
    /// What the disk said, but not that it does not.
    pub fn probe(directory: &Path) -> io::Result<Self> {
        let path = directory.join("probe.tmp");
        let block = AlignedBuffer::new(BLOCK_BYTES);
        let written = create(&path, Self::Direct).and_then(|file| match file.write_all_at(block.bytes(), 0) {
            // What was wrong with the block itself would have been said first.
            Err(error) if is_full(&error) => Ok(()),
            written => written,
        });
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match written {
            Ok(()) => Ok(Self::Direct),
            Err(error) if is_direct_refused(&error) => Ok(Self::Buffered),
            Err(error) => Err(error),
        }
    }
}

/// True when a file system says that it takes no direct writes.
pub(crate) fn is_direct_refused(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported)
}

/// True when there is no room, for whichever reason.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

fn flags(flags: OFlags) -> i32 {
    flags.bits().cast_signed()
}

/// Makes a file, or empties the one that is there.
pub(crate) fn create(path: &Path, access: Access) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    if access == Access::Direct {
        options.custom_flags(flags(OFlags::DIRECT));
    }
    options.open(path)
}

/// A segment that the journal writes to.
#[derive(Debug)]
pub struct Segment {
    /// Its number.
    pub number: u64,
    /// All its bytes are on the disk.
    pub file: File,
}

impl Segment {
    /// Opens a segment that is there.
    ///
    /// # Errors
    /// What the disk said.
    pub fn open(directory: &Path, number: u64, access: Access) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true);
        if access == Access::Direct {
            options.custom_flags(flags(OFlags::DIRECT | OFlags::DSYNC));
        }
        Ok(Self { number, file: options.open(Layout::path(directory, number))? })
    }
}

/// The segments of a journal as files: makes those that come next, and takes back those that are not needed.
#[derive(Debug)]
pub struct SegmentStore {
    directory: PathBuf,
    layout: Layout,
    access: Access,
    /// The last one that was made.
    last: u64,
    /// How many there are, those in the pool included.
    count: u64,
    /// Not needed any more, and kept to be made into the next.
    pool: BTreeSet<u64>,
}

impl SegmentStore {
    /// The segments in `directory`, of which there are `count` up to `last`.
    #[must_use]
    pub fn new(directory: PathBuf, layout: Layout, access: Access, last: u64, count: u64) -> Self {
        Self { directory, layout, access, last, count, pool: BTreeSet::new() }
    }

    /// Where they are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many of them are kept to be used again.
    #[must_use]
    pub fn spare(&self) -> u64 {
        self.pool.len() as u64
    }

    /// The last one that was made.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Makes the next segment; none when the disk is full, or would have less than `kept_free` bytes left for what else
    /// must be written.
    ///
    /// # Errors
    /// What the disk said.
    pub fn prepare(&mut self, kept_free: u64) -> io::Result<Option<Segment>> {
        match self.make(kept_free) {
            Err(error) if is_full(&error) => Ok(None),
            made => made.map(Some),
        }
    }

    fn make(&mut self, kept_free: u64) -> io::Result<Segment> {
        let number = self.last + 1;
        let fresh = self.directory.join(format!("{number:010}.tmp"));
        if self.recycle(&fresh)? {
            self.count -= 1;
            self.rewrite(&fresh, number)?;
        } else {
            let disk = rustix::fs::statvfs(&self.directory)?;
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            if free < self.layout.segment_bytes.saturating_add(kept_free) {
                return Err(ErrorKind::StorageFull.into());
            }
            self.fill(&fresh, number).inspect_err(|_| drop(remove(&fresh)))?;
        }
        fs::rename(&fresh, Layout::path(&self.directory, number))?;
        data::sync(&self.directory)?;
        self.last = number;
        self.count += 1;
        Segment::open(&self.directory, number, self.access)
    }

    /// Takes back segments that are not needed. They are kept for the next as long as there are at most `segments_max`
    /// in all, and so are those that were taken back before.
    ///
    /// # Errors
    /// What the disk said.
    pub fn release(&mut self, freed: &[u64], segments_max: u64) -> io::Result<()> {
        self.pool.extend(freed);
        while self.count > segments_max {
            let Some(segment) = self.pool.pop_first() else { break };
            self.remove(segment)?;
        }
        Ok(())
    }

    fn remove(&mut self, segment: u64) -> io::Result<()> {
        remove(&Layout::path(&self.directory, segment))?;
        self.count -= 1;
        Ok(())
    }

    /// Renames one of the pool to `fresh`, if there is one that nothing else has a link to.
    fn recycle(&mut self, fresh: &Path) -> io::Result<bool> {
        while let Some(segment) = self.pool.pop_first() {
            let path = Layout::path(&self.directory, segment);
            // What a backup links to is the backup's too.
            if fs::metadata(&path)?.nlink() == 1 {
                fs::rename(&path, fresh)?;
                // Under its old name it is never seen with its new header.
                return data::sync(&self.directory).map(|()| true);
            }
            self.remove(segment)?;
        }
        Ok(false)
    }

    /// Gives a segment that was another a new header. What stands behind its first block may stay: it does not count.
    fn rewrite(&self, path: &Path, number: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(&self.layout.header(number), 0)?;
        file.write_all_at(&[0; BLOCK_BYTES], BLOCK_BYTES as u64)?;
        file.sync_all()
    }

    fn fill(&self, path: &Path, number: u64) -> io::Result<()> {
        let file = create(path, self.access)?;
        let header = self.layout.header(number);
        if self.access == Access::Seldom && set_aside(&file, BLOCK_BYTES as u64 + self.layout.segment_bytes)? {
            file.write_all_at(&header, 0)?;
            return file.sync_all();
        }
        let mut zeros = AlignedBuffer::new(FILL_BYTES);
        zeros.bytes_mut()[..BLOCK_BYTES].copy_from_slice(&header);
        file.write_all_at(&zeros.bytes()[..BLOCK_BYTES], 0)?;
        zeros.bytes_mut()[..BLOCK_BYTES].fill(0);
        write_zeros(&file, &zeros, BLOCK_BYTES as u64, BLOCK_BYTES as u64 + self.layout.segment_bytes)?;
        file.sync_all()
    }
}

/// Has the file system set so many bytes aside, which read as zeros; false where it does not do that. A sync has then to write
/// down which of them are in use, which is nothing where syncs are seldom, and saves the page cache all the zeros.
fn set_aside(file: &File, bytes: u64) -> io::Result<bool> {
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes)) {
        Ok(()) => Ok(true),
        Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => Err(error.into()),
        Err(_) => Ok(false),
    }
}

fn write_zeros(file: &File, zeros: &AlignedBuffer, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let bytes = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeros.bytes().len());
        file.write_all_at(&zeros.bytes()[..bytes], at)?;
        at += bytes as u64;
    }
    Ok(())
}

/// Makes sure that nothing else has a link to a segment that will be written to: a copy takes its place, if so.
///
/// # Errors
/// What the disk said.
pub fn own(directory: &Path, segment: u64) -> io::Result<()> {
    let path = Layout::path(directory, segment);
    if fs::metadata(&path)?.nlink() == 1 {
        return Ok(());
    }
    let fresh = directory.join(format!("{segment:010}.tmp"));
    let mut copy = create(&fresh, Access::Buffered)?;
    io::copy(&mut File::open(&path)?, &mut copy)?;
    copy.sync_all()?;
    fs::rename(&fresh, &path)?;
    data::sync(directory)
}

/// Makes everything in a segment from a position on zero, durably, and the file as long as it should be.
///
/// # Errors
/// What the disk said.
pub fn clear_from(directory: &Path, layout: Layout, lsn: Lsn) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(Layout::path(directory, layout.segment(lsn)))?;
    write_zeros(&file, &AlignedBuffer::new(FILL_BYTES), layout.offset(lsn), BLOCK_BYTES as u64 + layout.segment_bytes)?;
    file.sync_all()
}

/// Removes a file that may be gone.
///
/// # Errors
/// What the disk said.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The numbers of the segments in `directory`, by their names.
///
/// # Errors
/// What the disk said.
pub fn list(directory: &Path) -> io::Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        numbers
            .extend(name.to_str().and_then(|name| name.strip_suffix(".log")).and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(numbers)
}

/// Reads the header of a segment; none if it is not one.
///
/// # Errors
/// What the disk said.
pub fn header_of(directory: &Path, segment: u64) -> io::Result<Option<Layout>> {
    let mut header = Vec::new();
    File::open(Layout::path(directory, segment))?.take(BLOCK_BYTES as u64).read_to_end(&mut header)?;
    Ok(Layout::read_header(&header).filter(|(_, number)| *number == segment).map(|(layout, _)| layout))
}

/// How many bytes a segment has that has not all of them.
#[must_use]
pub fn cut_short(directory: &Path, layout: Layout, segment: u64) -> Option<u64> {
    let whole = BLOCK_BYTES as u64 + layout.segment_bytes;
    let bytes = fs::metadata(Layout::path(directory, segment)).map_or(0, |metadata| metadata.len());
    (bytes != whole).then_some(bytes)
}

/// The version of a segment that is whole, and that this program does not know.
#[must_use]
pub fn other_version(directory: &Path, segment: u64) -> Option<u32> {
    let mut header = Vec::new();
    let read = File::open(Layout::path(directory, segment))
        .and_then(|file| file.take(HEADER_BYTES as u64).read_to_end(&mut header));
    let version = header.get(8..12).and_then(|bytes| bytes.first_chunk::<4>()).map(|bytes| u32::from_le_bytes(*bytes));
    let sum = header.get(HEADER_BYTES - 4..).and_then(|bytes| bytes.first_chunk::<4>());
    let is_whole = sum.is_some_and(|sum| crc32c::crc32c(&header[..HEADER_BYTES - 4]) == u32::from_le_bytes(*sum));
    version.filter(|version| read.is_ok() && is_whole && header.starts_with(MAGIC) && *version != VERSION)
}

/// The stream's bytes, from segment to segment, up to the first that is not there.
#[derive(Debug)]
pub struct Stream {
    directory: PathBuf,
    layout: Layout,
    at: Lsn,
    end: Lsn,
    open: Option<Segment>,
}

impl Stream {
    /// The bytes from `at` to `end`, or to where they end before.
    #[must_use]
    pub fn new(directory: &Path, layout: Layout, at: Lsn, end: Lsn) -> Self {
        Self { directory: directory.to_owned(), layout, at, end, open: None }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let number = self.layout.segment(self.at);
        if self.open.as_ref().is_none_or(|segment| segment.number != number) {
            match File::open(Layout::path(&self.directory, number)) {
                Ok(file) => self.open = Some(Segment { number, file }),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
                Err(error) => return Err(error),
            }
        }
        let Some(segment) = &self.open else { return Ok(0) };
        let end = self.layout.start(number + 1).min(self.end);
        let bytes = usize::try_from(end.0.saturating_sub(self.at.0)).unwrap_or(usize::MAX).min(into.len());
        let count = segment.file.read_at(&mut into[..bytes], self.layout.offset(self.at))?;
        self.at.0 += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 64 * 1024 };

    fn store(directory: &Path) -> SegmentStore {
        let access = Access::probe(directory).unwrap();
        SegmentStore::new(directory.to_owned(), LAYOUT, access, 0, 0)
    }

    #[test]
    fn a_flipped_bit_in_a_header_is_seen() {
        let header = LAYOUT.header(3);
        assert_eq!(Layout::read_header(&header), Some((LAYOUT, 3)));
        for at in 0..header.len() {
            let mut flipped = header.clone();
            flipped[at] ^= 1 << (at % 8);
            assert_eq!(Layout::read_header(&flipped), None, "byte {at}");
            assert_eq!(Layout::read_header(&header[..at]), None);
        }
    }

    #[test]
    fn segments_are_made_whole_and_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        for number in 1..=3 {
            assert_eq!(store.prepare(0).unwrap().unwrap().number, number);
            let bytes = fs::read(Layout::path(directory.path(), number)).unwrap();
            assert_eq!(bytes.len() as u64, BLOCK_BYTES as u64 + LAYOUT.segment_bytes);
            assert_eq!(Layout::read_header(&bytes), Some((LAYOUT, number)));
            assert!(bytes[BLOCK_BYTES..].iter().all(|byte| *byte == 0));
        }
        assert_eq!(list(directory.path()).unwrap(), BTreeSet::from([1, 2, 3]));
        assert_eq!(store.count(), 3);
    }

    #[test]
    fn what_is_not_needed_is_used_again_or_removed() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = store(directory.path());
        for _ in 0..4 {
            store.prepare(0).unwrap().unwrap();
        }
        let inode = |number| fs::metadata(Layout::path(directory.path(), number)).unwrap().ino();
        let (second, third) = (inode(2), inode(3));
        store.release(&[1, 2, 3], 3).unwrap();
        assert_eq!(list(directory.path()).unwrap(), BTreeSet::from([2, 3, 4]));
        assert_eq!(store.prepare(0).unwrap().unwrap().number, 5);
        assert_eq!(inode(5), second);
        assert_eq!(header_of(directory.path(), 5).unwrap(), Some(LAYOUT));
        // What a backup has a link to is left as it is.
        fs::hard_link(Layout::path(directory.path(), 3), directory.path().join("backup")).unwrap();
        assert_eq!(store.prepare(0).unwrap().unwrap().number, 6);
        assert_ne!(inode(6), third);
        assert_eq!(fs::metadata(directory.path().join("backup")).unwrap().nlink(), 1);
        assert_eq!(list(directory.path()).unwrap(), BTreeSet::from([4, 5, 6]));
        assert_eq!(store.count(), 3);
    }
}
