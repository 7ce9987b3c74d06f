//! Checkpoints: the state at one position of the journal, in one file, so that a start need not read what came before.
//!
//! A file opens with 44 bytes: `kurirchk`, the version (4 bytes), the journal's salt (4) and segment size (8), the
//! checkpoint's number (8), the position up to which it holds the journal (8), and the CRC-32C of these (4). Records
//! follow, framed as in the journal; their positions count from the start of the file, and their bodies are encoded
//! [`Item`]s, of which the last is [`Item::End`]. Behind them the first 44 bytes stand once more: without them a repair
//! could do nothing with the rest.
//!
//! Mailboxes are written while they go on changing: what had been sent before the position and still waited when its turn
//! came, where it stood then. So a checkpoint is of use only with the journal up to where that ended; see [`Span`].

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::aligned::{AlignedBuffer, BLOCK_BYTES};
use crate::change::Lsn;
use crate::data::{self, DataError};
use crate::field::{Fields, Put};
use crate::record::{self, BODY_BYTES_MAX, RECORD_BYTES_MIN, Records};
use crate::segment::{self, Access, Layout, VERSION, remove};
use crate::snapshot::Item;

const MAGIC: &[u8; 8] = b"kurirchk";
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 8 + 8 + 4;
/// Written in pieces of this size, each of which has gone to the disk before the next, where the file system has it so: a
/// write of the journal waits for one of them, and not for a sync of them all in the end.
const WRITE_BYTES: usize = 256 * 1024;

/// A checkpoint on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its number, which grows from one to the next.
    pub number: u64,
    /// What it holds of the journal.
    pub span: Span,
    /// Its size.
    pub bytes: u64,
}

/// What a checkpoint holds of its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// All that the journal says before this.
    pub lsn: Lsn,
    /// Messages that had been delivered, or written again elsewhere, before this may be so already: it is of use only with the
    /// journal up to there. None where that is not known.
    pub until: Option<Lsn>,
}

/// The path of a checkpoint.
#[must_use]
pub fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:010}"))
}

/// The numbers of the checkpoints in `directory`, by their names.
///
/// # Errors
/// What the disk said.
pub fn list(directory: &Path) -> io::Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(numbers)
}

/// Writes a checkpoint of these items. It is there whole, and durable, or not at all.
///
/// # Errors
/// What the disk said.
pub fn write<'a>(
    directory: &Path,
    layout: Layout,
    number: u64,
    span: Span,
    items: impl IntoIterator<Item = Item<'a>>,
) -> io::Result<Checkpoint> {
    let mut draft = Draft::begin(directory, number)?;
    let mut block = Vec::new();
    let mut framing = Framing::begin(layout, number, span.lsn, &mut block);
    for item in items {
        framing.put(&item, &mut block);
        if block.len() >= WRITE_BYTES {
            draft.write(&block)?;
            block.clear();
        }
    }
    let bytes = framing.end(span.until, &mut block).ok_or_else(too_long)?;
    draft.write(&block)?;
    draft.finish()?;
    Ok(Checkpoint { number, span, bytes })
}

/// A list of the state is longer than a record may be.
#[must_use]
pub fn too_long() -> io::Error {
    io::Error::other("a list in the state is too long for a checkpoint")
}

/// Frames the items of a checkpoint, as they stand one behind the other in its file.
#[derive(Debug)]
pub struct Framing {
    salt: u32,
    header: Vec<u8>,
    /// Where the next item stands in the file.
    at: Lsn,
    items: u64,
    is_too_long: bool,
}

impl Framing {
    /// Begins with the header, which is appended to `out`.
    #[must_use]
    pub fn begin(layout: Layout, number: u64, lsn: Lsn, out: &mut Vec<u8>) -> Self {
        let mut header = MAGIC.to_vec();
        VERSION.put(&mut header);
        layout.salt.put(&mut header);
        layout.segment_bytes.put(&mut header);
        number.put(&mut header);
        lsn.put(&mut header);
        let sum = crc32c::crc32c(&header);
        sum.put(&mut header);
        out.extend_from_slice(&header);
        Self { salt: layout.salt, header, at: Lsn(HEADER_BYTES as u64), items: 0, is_too_long: false }
    }

    /// Appends an item to `out`.
    pub fn put(&mut self, item: &Item<'_>, out: &mut Vec<u8>) {
        let place = record::append(out, self.salt, self.at, |body| item.encode(body));
        // It could not be read again.
        self.is_too_long |= place.bytes as usize > BODY_BYTES_MAX;
        self.at = place.end();
        self.items += 1;
    }

    /// Appends what stands behind the last item, and says how many bytes there are in all; none if an item is so long that it
    /// could not be read again.
    #[must_use]
    pub fn end(&mut self, until: Option<Lsn>, out: &mut Vec<u8>) -> Option<u64> {
        self.put(&Item::End { items: self.items, until }, out);
        out.extend_from_slice(&self.header);
        (!self.is_too_long).then_some(self.at.0 + HEADER_BYTES as u64)
    }
}

/// A checkpoint that is being written. It has its name when it is whole, and if that never comes it is removed.
///
/// It is written past the page cache where the file system allows that: nobody reads it before the next start.
#[derive(Debug)]
pub struct Draft {
    file: File,
    access: Access,
    /// What comes next, and is not a whole piece yet.
    piece: AlignedBuffer,
    filled: usize,
    written: u64,
    directory: PathBuf,
    number: u64,
}

impl Draft {
    /// Begins one.
    ///
    /// # Errors
    /// What the disk said.
    pub fn begin(directory: &Path, number: u64) -> io::Result<Self> {
        let path = Self::path(directory, number);
        let (file, access) = match segment::create(&path, Access::Direct) {
            Err(error) if segment::is_direct_refused(&error) => {
                (segment::create(&path, Access::Buffered)?, Access::Buffered)
            }
            created => (created?, Access::Direct),
        };
        let piece = AlignedBuffer::new(WRITE_BYTES);
        Ok(Self { file, access, piece, filled: 0, written: 0, directory: directory.to_owned(), number })
    }

    fn path(directory: &Path, number: u64) -> PathBuf {
        path(directory, number).with_extension("tmp")
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Goes on with these bytes.
    ///
    /// # Errors
    /// What the disk said.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(WRITE_BYTES - self.filled));
            self.piece.bytes_mut()[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == WRITE_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Puts the piece on the disk, with zeros behind it up to a whole block.
    fn flush(&mut self) -> io::Result<()> {
        let end = self.filled.next_multiple_of(BLOCK_BYTES);
        self.piece.bytes_mut()[self.filled..end].fill(0);
        let piece = &self.piece.bytes()[..end];
        match self.file.write_all_at(piece, self.written) {
            // Some file systems say so only now.
            Err(error) if self.access == Access::Direct && segment::is_direct_refused(&error) => {
                self.access = Access::Buffered;
                let path = Self::path(&self.directory, self.number);
                self.file = OpenOptions::new().write(true).open(path)?;
                self.file.write_all_at(piece, self.written)?;
            }
            written => written?,
        }
        if self.access != Access::Direct {
            self.file.sync_data()?;
        }
        self.written += std::mem::take(&mut self.filled) as u64;
        Ok(())
    }

    /// Makes it durable, and then gives it its name.
    ///
    /// # Errors
    /// What the disk said.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.file.set_len(self.written)?;
        self.file.sync_all()?;
        fs::rename(Self::path(&self.directory, self.number), path(&self.directory, self.number))?;
        data::sync(&self.directory)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = remove(&Self::path(&self.directory, self.number)) {
            warn!(%error, "what there is of a checkpoint could not be removed; the next start does it");
        }
    }
}

/// The layout of the journal that checkpoint `number` belongs to, and the position up to which it holds it.
///
/// # Errors
/// [`DataError`]
pub fn header(directory: &Path, number: u64) -> Result<(Layout, Lsn), DataError> {
    let path = path(directory, number);
    let failed = |error| DataError::Io(path.clone(), error);
    let mut file = File::open(&path).map_err(failed)?;
    let mut read_at = |from: SeekFrom| {
        let mut header = Vec::new();
        file.seek(from)?;
        Read::by_ref(&mut file).take(HEADER_BYTES as u64).read_to_end(&mut header)?;
        Ok(read_header(&header).filter(|(_, found, _)| *found == number))
    };
    let first = read_at(SeekFrom::Start(0)).map_err(failed)?;
    if let Some((layout, _, lsn)) = first {
        return Ok((layout, lsn));
    }
    let second = read_at(SeekFrom::End(-(HEADER_BYTES as i64))).ok().flatten();
    Err(if second.is_some() { DataError::Damaged(path, 0) } else { DataError::Foreign(path) })
}

/// Reads checkpoint `number` and shows its items.
///
/// # Errors
/// [`DataError`]
pub fn read(directory: &Path, number: u64, mut show: impl FnMut(&Item<'_>)) -> Result<(Layout, Checkpoint), DataError> {
    let path = path(directory, number);
    let failed = |error| DataError::Io(path.clone(), error);
    let (layout, lsn) = header(directory, number)?;
    let mut file = File::open(&path).map_err(failed)?;
    file.seek(SeekFrom::Start(HEADER_BYTES as u64)).map_err(failed)?;
    let mut records = Records::new(file, layout.salt, Lsn(HEADER_BYTES as u64));
    let mut count = 0;
    while let Some((place, body)) = records.read().map_err(failed)? {
        match Item::decode(body) {
            // Whatever might follow is not part of it.
            Some(Item::End { items, until }) if items == count => {
                let bytes = place.end().0 + HEADER_BYTES as u64;
                let span = Span { lsn, until };
                return check_trailer(&path, bytes).map(|()| (layout, Checkpoint { number, span, bytes }));
            }
            Some(item) => show(&item),
            None => return Err(DataError::Foreign(path)),
        }
        count += 1;
    }
    Err(DataError::Damaged(path, records.at().0))
}

/// Makes sure that the file ends with its beginning.
fn check_trailer(path: &Path, bytes: u64) -> Result<(), DataError> {
    let failed = |error| DataError::Io(path.to_owned(), error);
    let mut file = File::open(path).map_err(failed)?;
    let (mut first, mut last) = (Vec::new(), Vec::new());
    Read::by_ref(&mut file).take(HEADER_BYTES as u64).read_to_end(&mut first).map_err(failed)?;
    file.seek(SeekFrom::Start(bytes - HEADER_BYTES as u64)).map_err(failed)?;
    file.read_to_end(&mut last).map_err(failed)?;
    if first == last { Ok(()) } else { Err(DataError::Damaged(path.to_owned(), bytes - HEADER_BYTES as u64)) }
}

/// What can be read of a damaged checkpoint.
#[derive(Debug)]
pub struct Salvage {
    /// The journal's layout.
    pub layout: Layout,
    /// What it holds of the journal.
    pub span: Span,
    /// The bytes that cannot be read, and what they may have been.
    pub damage: Vec<(Range<u64>, String)>,
}

/// Shows every item of checkpoint `number` that is whole.
///
/// # Errors
/// [`DataError`], but not for damage behind the header.
pub fn salvage(directory: &Path, number: u64, mut show: impl FnMut(&Item<'_>)) -> Result<Salvage, DataError> {
    let path = path(directory, number);
    let bytes = fs::read(&path).map_err(|error| DataError::Io(path.clone(), error))?;
    let (first, records) = bytes.split_at(HEADER_BYTES.min(bytes.len()));
    let last = records.len().saturating_sub(HEADER_BYTES);
    let [first, last] = [first, &records[last..]].map(|header| read_header(header).filter(|found| found.1 == number));
    let (layout, _, lsn) = first.or(last).ok_or(DataError::Foreign(path))?;
    let header_range = 0..HEADER_BYTES as u64;
    let mut damage: Vec<(Range<u64>, String)> =
        first.is_none().then(|| (header_range, "the beginning of a checkpoint".to_owned())).into_iter().collect();
    let bytes = &bytes[..bytes.len() - if last.is_some() { HEADER_BYTES } else { 0 }];
    let (mut at, mut is_ended, mut span) = (HEADER_BYTES, false, Span { lsn, until: None });
    while at < bytes.len() {
        let Some(body) = record::body_at(&bytes[at..], layout.salt, Lsn(at as u64)) else {
            let least = at + RECORD_BYTES_MIN;
            let behind = bytes.get(least..).unwrap_or_default();
            let next = record::find_next(behind, layout.salt, Lsn(least as u64), behind.len());
            let next = next.map_or(bytes.len(), |next| least + next);
            let body = record::claimed_body(&bytes[at..next]).unwrap_or_default();
            damage.push((at as u64..next as u64, Item::decode(body).map_or(UNKNOWN.to_owned(), |item| say(&item))));
            at = next;
            continue;
        };
        let end = at + record::record_bytes(body.len());
        match Item::decode(body) {
            Some(Item::End { until, .. }) => (is_ended, span.until) = (true, until),
            Some(item) => show(&item),
            None => damage.push((at as u64..end as u64, UNKNOWN.to_owned())),
        }
        at = end;
    }
    if !is_ended && damage.is_empty() {
        // Cut off between two records.
        damage.push((at as u64..at as u64, "the end of a checkpoint".to_owned()));
    } else if last.is_none() && damage.is_empty() {
        damage.push((at as u64..at as u64, "what stands behind the end of a checkpoint".to_owned()));
    }
    Ok(Salvage { layout, span, damage })
}

const UNKNOWN: &str = "part of a checkpoint";

/// What a damaged item seems to be.
fn say(item: &Item<'_>) -> String {
    match item {
        Item::Counters { .. } | Item::End { .. } => UNKNOWN.to_owned(),
        Item::User { name, .. } => format!("perhaps the account {name}"),
        Item::Session { .. } => "perhaps a login".to_owned(),
        Item::Group { name, .. } => format!("perhaps the group {name}"),
        Item::File { name, .. } => format!("perhaps the file {name}"),
        Item::Listing { name, .. } => format!("perhaps that somebody lists the file {name}"),
        Item::Entries { user, entries } => format!("perhaps {} waiting messages of user {}", entries.len(), user.0),
    }
}

fn read_header(header: &[u8]) -> Option<(Layout, u64, Lsn)> {
    let sum = crc32c::crc32c(header.get(..HEADER_BYTES - 4)?);
    let mut fields = Fields(header);
    let is_ours = fields.bytes(MAGIC.len())? == MAGIC && fields.take::<u32>()? == VERSION;
    let (salt, segment_bytes, number, lsn) = (fields.take()?, fields.take()?, fields.take()?, fields.take()?);
    let is_whole = fields.take::<u32>()? == sum;
    (is_ours && is_whole && segment_bytes > 0).then_some((Layout { salt, segment_bytes }, number, lsn))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::UserId;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 64 * 1024 };
    const USERS: u32 = 5;
    const SPAN: Span = Span { lsn: Lsn(99), until: Some(Lsn(120)) };

    fn written(directory: &Path) -> Checkpoint {
        let names: Vec<String> = (0..USERS).map(|user| format!("user{user}")).collect();
        let items = names.iter().zip(0..).map(|(name, user)| Item::User {
            user: UserId(user),
            name,
            password_hash: "",
            last_id: 0,
            changed: Lsn(0),
        });
        write(directory, LAYOUT, 3, SPAN, items).unwrap()
    }

    fn users(directory: &Path) -> Result<Vec<u32>, DataError> {
        let mut found = Vec::new();
        read(directory, 3, |item| {
            if let Item::User { user, .. } = item {
                found.push(user.0);
            }
        })?;
        Ok(found)
    }

    #[test]
    fn a_draft_of_any_size_has_its_bytes_however_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let sizes = [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1];
        for (number, size) in (1..).zip(sizes.into_iter().chain([3 * WRITE_BYTES - 4097])) {
            for (access, part) in [(None, size), (None, 10_001), (Some(Access::Buffered), 10_001)] {
                let bytes: Vec<u8> = (1..=251).cycle().take(size).collect();
                let mut draft = Draft::begin(directory.path(), number).unwrap();
                if let Some(access) = access {
                    let path = Draft::path(directory.path(), number);
                    (draft.file, draft.access) = (segment::create(&path, access).unwrap(), access);
                }
                for part in bytes.chunks(part) {
                    draft.write(part).unwrap();
                }
                draft.finish().unwrap();
                let found = fs::read(path(directory.path(), number)).unwrap();
                assert!(found == bytes, "{size} bytes in parts of {part}, {access:?}: {}", found.len());
            }
        }
    }

    #[test]
    fn what_was_written_is_read_and_any_flipped_bit_or_cut_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = written(directory.path());
        assert_eq!(list(directory.path()).unwrap(), BTreeSet::from([3]));
        assert_eq!(users(directory.path()).unwrap(), [0, 1, 2, 3, 4]);
        assert_eq!(read(directory.path(), 3, |_| {}).unwrap(), (LAYOUT, checkpoint));
        let path = path(directory.path(), 3);
        let whole = fs::read(&path).unwrap();
        assert_eq!(whole.len() as u64, checkpoint.bytes);
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(&path, &flipped).unwrap();
            assert!(users(directory.path()).is_err(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(users(directory.path()).is_err(), "cut at {at}");
            if at >= HEADER_BYTES {
                assert!(!salvage(directory.path(), 3, |_| {}).unwrap().damage.is_empty());
            }
        }
    }

    #[test]
    fn what_is_whole_of_a_damaged_one_is_found() {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path());
        let path = path(directory.path(), 3);
        let mut bytes = fs::read(&path).unwrap();
        let third = memchr::memmem::find(&bytes, b"user2").unwrap();
        bytes[third] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let mut found = Vec::new();
        let salvage = salvage(directory.path(), 3, |item| {
            if let Item::User { user, .. } = item {
                found.push(user.0);
            }
        });
        assert_eq!(found, [0, 1, 3, 4]);
        let salvage = salvage.unwrap();
        assert_eq!((salvage.layout, salvage.span, salvage.damage.len()), (LAYOUT, SPAN, 1));
    }
}
