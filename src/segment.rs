//! Segments: the files that the journal's stream of bytes is cut into.
//!
//! Segment number `n` holds the stream's positions from `n` to `n + 1` times [`Layout::segment_bytes`], behind one block of
//! [`BLOCK_BYTES`] that says so; the first is number 1. A record may begin in one segment and end in the next.
//!
//! A segment has all its bytes on the disk before it gets its name, so that the journal only overwrites: then a sync has
//! no sizes and extents to write, and a full disk is known before anything is promised. It is made of zeros, or of a
//! segment that is no longer needed. Where syncs are seldom it is only set aside. Nothing in a segment is changed once the journal has gone past it.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read};

use crate::aligned::{AlignedBuffer, BLOCK_BYTES};
use crate::change::Lsn;
use crate::disk::{Directory, DiskFile, FileRef, Mode, is_direct_refused, is_full, write_all_at};
use crate::field::{Fields, Put};

const MAGIC: &[u8; 8] = b"kurirjnl";
/// Of the layout of segments, records, changes and checkpoints together, as it is written.
pub const VERSION: u32 = 4;
/// The oldest that is read.
pub const VERSION_MIN: u32 = 3;
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 8 + 4;
/// Segments have numbers below this: no journal comes that far.
const NUMBER_END: u64 = 1 << 32;
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

    /// What the file of a segment is called.
    #[must_use]
    pub fn name(segment: u64) -> String {
        format!("{segment:010}.log")
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

    /// Reads what [`Self::header`] makes, also of an older version.
    #[must_use]
    pub fn read_header(bytes: &[u8]) -> Option<Header> {
        let fields = bytes.get(..HEADER_BYTES)?;
        let (sum, mut rest) = (crc32c::crc32c(&fields[..HEADER_BYTES - 4]), Fields(fields));
        let is_ours = rest.bytes(MAGIC.len())? == MAGIC;
        let version = rest.take::<u32>()?;
        let (salt, segment, segment_bytes) = (rest.take()?, rest.take()?, rest.take::<u64>()?);
        let is_whole =
            rest.take::<u32>()? == sum && bytes.get(HEADER_BYTES..BLOCK_BYTES)?.iter().all(|byte| *byte == 0);
        let layout = Self { salt, segment_bytes };
        (is_ours && is_whole && layout.is_sane()).then_some(Header { layout, segment, version })
    }

    /// True for a layout that a journal can have.
    pub(crate) fn is_sane(self) -> bool {
        self.segment_bytes > 0 && self.segment_bytes.is_multiple_of(BLOCK_BYTES as u64)
    }
}

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// How the journal lies in its segments.
    pub layout: Layout,
    /// Its number.
    pub segment: u64,
    /// Of its format.
    pub version: u32,
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
    pub fn probe(directory: &Directory) -> io::Result<Self> {
        const NAME: &str = "probe.tmp";
        let block = AlignedBuffer::new(BLOCK_BYTES);
        let written = directory.open(NAME, Mode::CreateDirect).and_then(|file| match file.write_at(block.bytes(), 0) {
            // A file system that refuses direct writes says so before it looks for room.
            Err(error) if is_full(&error) => Ok(()),
            written => written.map(drop),
        });
        directory.remove(NAME)?;
        match written {
            Ok(()) => Ok(Self::Direct),
            Err(error) if is_direct_refused(&error) => Ok(Self::Buffered),
            Err(error) => Err(error),
        }
    }

    /// How a file is made that is filled before it is used.
    pub(crate) fn to_create(self) -> Mode {
        if self == Self::Direct { Mode::CreateDirect } else { Mode::Create }
    }
}

/// A segment that the journal writes to.
#[derive(Debug)]
pub struct Segment {
    /// Its number.
    pub number: u64,
    /// All its bytes are on the disk.
    pub file: FileRef,
}

impl Segment {
    /// Opens a segment that is there.
    ///
    /// # Errors
    /// What the disk said.
    pub fn open(directory: &Directory, number: u64, access: Access) -> io::Result<Self> {
        let mode = if access == Access::Direct { Mode::WriteDurable } else { Mode::Write };
        Ok(Self { number, file: directory.open(&Layout::name(number), mode)? })
    }
}

/// The segments of a journal as files: makes those that come next, and takes back those that are not needed.
#[derive(Debug)]
pub struct SegmentStore {
    directory: Directory,
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
    pub fn new(directory: Directory, layout: Layout, access: Access, last: u64, count: u64) -> Self {
        Self { directory, layout, access, last, count, pool: BTreeSet::new() }
    }

    /// Where they are.
    #[must_use]
    pub fn directory(&self) -> &Directory {
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
        let fresh = format!("{number:010}.tmp");
        if self.recycle(&fresh)? {
            self.count -= 1;
            self.rewrite(&fresh, number)?;
        } else {
            let free = self.directory.free_bytes()?;
            if free < self.layout.segment_bytes.saturating_add(kept_free) {
                return Err(ErrorKind::StorageFull.into());
            }
            self.fill(&fresh, number).inspect_err(|_| drop(self.directory.remove(&fresh)))?;
        }
        self.directory.rename(&fresh, &Layout::name(number))?;
        self.directory.sync()?;
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
        self.directory.remove(&Layout::name(segment))?;
        self.count -= 1;
        Ok(())
    }

    /// Renames one of the pool to `fresh`, if there is one that nothing else has a link to.
    fn recycle(&mut self, fresh: &str) -> io::Result<bool> {
        while let Some(segment) = self.pool.pop_first() {
            let name = Layout::name(segment);
            // What a backup links to is the backup's too.
            if self.directory.status(&name)?.links == 1 {
                self.directory.rename(&name, fresh)?;
                // Under its old name it is never seen with its new header.
                return self.directory.sync().map(|()| true);
            }
            self.remove(segment)?;
        }
        Ok(false)
    }

    /// Gives a segment that was another a new header. What stands behind its first block may stay: it does not count.
    fn rewrite(&self, name: &str, number: u64) -> io::Result<()> {
        let file = self.directory.open(name, Mode::Write)?;
        write_all_at(&*file, &self.layout.header(number), 0)?;
        write_all_at(&*file, &[0; BLOCK_BYTES], BLOCK_BYTES as u64)?;
        file.sync_all()
    }

    fn fill(&self, name: &str, number: u64) -> io::Result<()> {
        let file = self.directory.open(name, self.access.to_create())?;
        let header = self.layout.header(number);
        // A sync has then to write down which bytes are in use, which is nothing where syncs are seldom, and saves the page
        // cache all the zeros.
        if self.access == Access::Seldom && file.allocate(BLOCK_BYTES as u64 + self.layout.segment_bytes)? {
            write_all_at(&*file, &header, 0)?;
            return file.sync_all();
        }
        let mut zeros = AlignedBuffer::new(FILL_BYTES);
        zeros.bytes_mut()[..BLOCK_BYTES].copy_from_slice(&header);
        write_all_at(&*file, &zeros.bytes()[..BLOCK_BYTES], 0)?;
        zeros.bytes_mut()[..BLOCK_BYTES].fill(0);
        write_zeros(&*file, &zeros, BLOCK_BYTES as u64, BLOCK_BYTES as u64 + self.layout.segment_bytes)?;
        file.sync_all()
    }
}

fn write_zeros(file: &dyn DiskFile, zeros: &AlignedBuffer, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let bytes = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeros.bytes().len());
        write_all_at(file, &zeros.bytes()[..bytes], at)?;
        at += bytes as u64;
    }
    Ok(())
}

/// Makes sure that nothing else has a link to a segment that will be written to: a copy takes its place, if so.
///
/// # Errors
/// What the disk said.
pub fn own(directory: &Directory, segment: u64) -> io::Result<()> {
    let name = Layout::name(segment);
    if directory.status(&name)?.links == 1 {
        return Ok(());
    }
    let bytes = directory.read(&name)?;
    directory.replace(&name, &bytes)
}

/// Makes everything in a segment from a position on zero, durably, and the file as long as it should be.
///
/// # Errors
/// What the disk said.
pub fn clear_from(directory: &Directory, layout: Layout, lsn: Lsn) -> io::Result<()> {
    let file = directory.open(&Layout::name(layout.segment(lsn)), Mode::Write)?;
    let end = BLOCK_BYTES as u64 + layout.segment_bytes;
    write_zeros(&*file, &AlignedBuffer::new(FILL_BYTES), layout.offset(lsn), end)?;
    file.sync_all()
}

/// The number of a segment by its name; none for what is called otherwise.
fn number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".log")?.parse().ok()?;
    (Layout::name(number) == name && number < NUMBER_END).then_some(number)
}

/// The numbers of the segments in `directory`, by their names.
///
/// # Errors
/// What the disk said.
pub fn list(directory: &Directory) -> io::Result<BTreeSet<u64>> {
    let files = directory.list()?.into_iter().filter(|entry| !entry.is_directory);
    Ok(files.filter_map(|entry| number(&entry.name)).collect())
}

/// Reads the header of a segment, of whichever version; none if it is not one.
///
/// # Errors
/// What the disk said.
pub fn header_of(directory: &Directory, segment: u64) -> io::Result<Option<Header>> {
    let header = directory.read_start(&Layout::name(segment), BLOCK_BYTES)?;
    Ok(Layout::read_header(&header).filter(|header| header.segment == segment))
}

/// How many bytes a segment has that has not all of them.
///
/// # Errors
/// What the disk said.
pub fn cut_short(directory: &Directory, layout: Layout, segment: u64) -> io::Result<Option<u64>> {
    let whole = BLOCK_BYTES as u64 + layout.segment_bytes;
    let bytes = directory.status(&Layout::name(segment))?.bytes;
    Ok((bytes != whole).then_some(bytes))
}

/// The stream's bytes, from segment to segment, up to the first that is not there.
#[derive(Debug)]
pub struct Stream {
    directory: Directory,
    layout: Layout,
    at: Lsn,
    end: Lsn,
    open: Option<Segment>,
}

impl Stream {
    /// The bytes from `at` to `end`, or to where they end before.
    #[must_use]
    pub fn new(directory: &Directory, layout: Layout, at: Lsn, end: Lsn) -> Self {
        Self { directory: directory.clone(), layout, at, end, open: None }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let number = self.layout.segment(self.at);
        if self.open.as_ref().is_none_or(|segment| segment.number != number) {
            match self.directory.open(&Layout::name(number), Mode::Read) {
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

    fn store(directory: &Directory) -> SegmentStore {
        let access = Access::probe(directory).unwrap();
        SegmentStore::new(directory.clone(), LAYOUT, access, 0, 0)
    }

    #[test]
    fn a_flipped_bit_in_a_header_is_seen() {
        let header = LAYOUT.header(3);
        assert_eq!(Layout::read_header(&header), Some(Header { layout: LAYOUT, segment: 3, version: VERSION }));
        for at in 0..header.len() {
            let mut flipped = header.clone();
            flipped[at] ^= 1 << (at % 8);
            assert_eq!(Layout::read_header(&flipped), None, "byte {at}");
            assert_eq!(Layout::read_header(&header[..at]), None);
        }
    }

    #[test]
    fn segments_are_made_whole_and_in_order() {
        let root = tempfile::tempdir().unwrap();
        let directory = &Directory::on_system(root.path());
        let mut store = store(directory);
        for number in 1..=3 {
            assert_eq!(store.prepare(0).unwrap().unwrap().number, number);
            let bytes = directory.read(&Layout::name(number)).unwrap();
            assert_eq!(bytes.len() as u64, BLOCK_BYTES as u64 + LAYOUT.segment_bytes);
            let header = Header { layout: LAYOUT, segment: number, version: VERSION };
            assert_eq!(Layout::read_header(&bytes), Some(header));
            assert!(bytes[BLOCK_BYTES..].iter().all(|byte| *byte == 0));
        }
        assert_eq!(list(directory).unwrap(), BTreeSet::from([1, 2, 3]));
        assert_eq!(store.count(), 3);
    }

    #[test]
    fn what_is_not_needed_is_used_again_or_removed() {
        let root = tempfile::tempdir().unwrap();
        let directory = &Directory::on_system(root.path());
        let mut store = store(directory);
        for _ in 0..4 {
            store.prepare(0).unwrap().unwrap();
        }
        let identity = |number| directory.status(&Layout::name(number)).unwrap().identity;
        let (second, third) = (identity(2), identity(3));
        store.release(&[1, 2, 3], 3).unwrap();
        assert_eq!(list(directory).unwrap(), BTreeSet::from([2, 3, 4]));
        assert_eq!(store.prepare(0).unwrap().unwrap().number, 5);
        assert_eq!(identity(5), second);
        assert_eq!(header_of(directory, 5).unwrap().unwrap().layout, LAYOUT);
        // What a backup has a link to is left as it is.
        directory.link_into(&Layout::name(3), directory, "backup").unwrap();
        assert_eq!(store.prepare(0).unwrap().unwrap().number, 6);
        assert_ne!(identity(6), third);
        assert_eq!(directory.status("backup").unwrap().links, 1);
        assert_eq!(list(directory).unwrap(), BTreeSet::from([4, 5, 6]));
        assert_eq!(store.count(), 3);
    }
}
