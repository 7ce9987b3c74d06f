//! Checkpoints: the state at one position of the journal, in one file, so that a start need not read what came before.
//!
//! A file opens with 44 bytes: `kurirchk`, the version (4 bytes), the journal's salt (4) and segment size (8), the
//! checkpoint's number (8), the position up to which it holds the journal (8), and the CRC-32C of these (4). Records
//! follow, framed as in the journal; their positions count from the start of the file, and their bodies are encoded
//! [`Item`]s, of which the first is [`Item::Counters`] and the last [`Item::End`]. Behind them the first 44 bytes stand once
//! more. What nothing else can tell stands twice: the position and the counters in the first and in the last item too.
//!
//! A checkpoint is written while the state goes on changing: see [`crate::state`], and [`Span`] for what that needs of the
//! journal.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::ops::Range;

use tracing::warn;

use crate::aligned::{AlignedBuffer, BLOCK_BYTES};
use crate::change::Lsn;
use crate::data::DataError;
use crate::disk::{Directory, FileRef, Mode, Reader, is_direct_refused, read_full_at, write_all_at};
use crate::field::{Fields, Put};
use crate::record::{self, BODY_BYTES_MAX, RECORD_BYTES_MIN, Records};
use crate::segment::{Layout, VERSION, VERSION_MIN};
use crate::snapshot::{Counters, Item};

const MAGIC: &[u8; 8] = b"kurirchk";
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 8 + 8 + 4;
/// Written in pieces of this size, each of which has gone to the disk before the next, where the file system has it so: a
/// write of the journal waits for one of them, and not for a sync of them all in the end.
const WRITE_BYTES: usize = 256 * 1024;
/// Searched at once for an item that is whole; as much again must be behind it, so that any item is.
const SEARCH_BYTES: u64 = (BODY_BYTES_MAX + record::HEADER_BYTES) as u64;

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// All that the journal says before this.
    pub lsn: Lsn,
    /// Messages that had been delivered, or written again elsewhere, before this may be so already: it is of use only with the
    /// journal up to there. None where that is not known.
    pub until: Option<Lsn>,
}

/// What the file of a checkpoint is called.
#[must_use]
pub fn name(number: u64) -> String {
    format!("{number:010}")
}

/// The numbers of the checkpoints in `directory`, by their names.
///
/// # Errors
/// What the disk said.
pub fn list(directory: &Directory) -> io::Result<BTreeSet<u64>> {
    // No server makes more of them than this.
    const NUMBER_END: u64 = 1 << 32;
    let number = |written: &str| written.parse().ok().filter(|number| name(*number) == written && *number < NUMBER_END);
    let files = directory.list()?.into_iter().filter(|entry| !entry.is_directory);
    Ok(files.filter_map(|entry| number(&entry.name)).collect())
}

/// Writes a checkpoint of these items between the counters and the end. It is there whole, and durable, or not at all.
///
/// # Errors
/// What the disk said.
pub fn write(
    directory: &Directory,
    layout: Layout,
    number: u64,
    (counters, until): (Counters, Lsn),
    items: impl FnOnce(&mut dyn FnMut(&Item<'_>)),
) -> io::Result<Checkpoint> {
    let mut draft = Draft::begin(directory, number)?;
    let mut block = Vec::new();
    let mut framing = Framing::begin(layout, number, counters, &mut block);
    let mut written = Ok(());
    items(&mut |item| {
        framing.put(item, &mut block);
        if block.len() >= WRITE_BYTES {
            if written.is_ok() {
                written = draft.write(&block);
            }
            block.clear();
        }
    });
    written?;
    let bytes = framing.end(until, &mut block).ok_or_else(too_long)?;
    draft.write(&block)?;
    draft.finish()?;
    Ok(Checkpoint { number, span: Span { lsn: counters.lsn, until: Some(until) }, bytes })
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
    counters: Counters,
    /// Where the next item stands in the file.
    at: Lsn,
    items: u64,
    is_too_long: bool,
}

impl Framing {
    /// Begins with the header and the counters, which are appended to `out`.
    #[must_use]
    pub fn begin(layout: Layout, number: u64, counters: Counters, out: &mut Vec<u8>) -> Self {
        let mut header = MAGIC.to_vec();
        VERSION.put(&mut header);
        layout.salt.put(&mut header);
        layout.segment_bytes.put(&mut header);
        number.put(&mut header);
        counters.lsn.put(&mut header);
        let sum = crc32c::crc32c(&header);
        sum.put(&mut header);
        out.extend_from_slice(&header);
        let at = Lsn(HEADER_BYTES as u64);
        let mut framing = Self { salt: layout.salt, header, counters, at, items: 0, is_too_long: false };
        framing.put(&Item::Counters(counters), out);
        framing
    }

    /// Where in the journal the checkpoint stands.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.counters.lsn
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
    pub fn end(&mut self, until: Lsn, out: &mut Vec<u8>) -> Option<u64> {
        self.put(&Item::End { items: self.items, until: Some(until), counters: Some(self.counters) }, out);
        out.extend_from_slice(&self.header);
        (!self.is_too_long).then_some(self.at.0 + HEADER_BYTES as u64)
    }
}

/// A checkpoint that is being written. It has its name when it is whole, and if that never comes it is removed.
///
/// It is written past the page cache where the file system allows that: nobody reads it before the next start.
#[derive(Debug)]
pub struct Draft {
    file: FileRef,
    is_direct: bool,
    /// What comes next, and is not a whole piece yet.
    piece: AlignedBuffer,
    filled: usize,
    written: u64,
    directory: Directory,
    number: u64,
}

impl Draft {
    /// Begins one.
    ///
    /// # Errors
    /// What the disk said.
    pub fn begin(directory: &Directory, number: u64) -> io::Result<Self> {
        let name = Self::name(number);
        let (file, is_direct) = match directory.open(&name, Mode::CreateDirect) {
            Err(error) if is_direct_refused(&error) => (directory.open(&name, Mode::Create)?, false),
            created => (created?, true),
        };
        let piece = AlignedBuffer::new(WRITE_BYTES);
        Ok(Self { file, is_direct, piece, filled: 0, written: 0, directory: directory.clone(), number })
    }

    fn name(number: u64) -> String {
        format!("{}.tmp", name(number))
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
        match write_all_at(&*self.file, piece, self.written) {
            // Some file systems say so only now.
            Err(error) if self.is_direct && is_direct_refused(&error) => {
                self.is_direct = false;
                self.file = self.directory.open(&Self::name(self.number), Mode::Write)?;
                write_all_at(&*self.file, piece, self.written)?;
            }
            written => written?,
        }
        if !self.is_direct {
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
        self.directory.rename(&Self::name(self.number), &name(self.number))?;
        self.directory.sync()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = self.directory.remove(&Self::name(self.number)) {
            warn!(%error, "what there is of a checkpoint could not be removed; the next start does it");
        }
    }
}

/// What a checkpoint begins and ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    version: u32,
    layout: Layout,
    number: u64,
    lsn: Lsn,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let sum = crc32c::crc32c(bytes.get(..HEADER_BYTES - 4)?);
        let mut fields = Fields(bytes);
        let is_ours = fields.bytes(MAGIC.len())? == MAGIC;
        let (version, salt, segment_bytes) = (fields.take()?, fields.take()?, fields.take()?);
        let (number, lsn) = (fields.take()?, fields.take()?);
        let is_whole = fields.take::<u32>()? == sum;
        let layout = Layout { salt, segment_bytes };
        (is_ours && is_whole && layout.is_sane()).then_some(Self { version, layout, number, lsn })
    }
}

/// What was read of a checkpoint.
#[derive(Debug)]
pub struct Reading {
    /// Of its format, if a header tells.
    pub version: Option<u32>,
    /// The journal's layout.
    pub layout: Layout,
    /// The checkpoint. Where its position is lost, that is zero.
    pub checkpoint: Checkpoint,
    /// Nothing says what the numbers were that come next.
    pub are_counters_lost: bool,
    /// The bytes that cannot be read, and what they may have been.
    pub damage: Vec<(Range<u64>, String)>,
}

/// Reads checkpoint `number`, damaged or not, and shows the items that are whole. The journal's layout is that of `journal`
/// where nothing else of the file tells it.
///
/// # Errors
/// [`DataError`], but not for damage.
pub fn read(
    directory: &Directory,
    number: u64,
    journal: Option<Layout>,
    show: &mut dyn FnMut(&Item<'_>),
) -> Result<Reading, DataError> {
    let failed = |error| DataError::Io(directory.join(&name(number)), error);
    let file = directory.open(&name(number), Mode::Read).map_err(failed)?;
    let bytes = file.bytes().map_err(failed)?;
    let header_at = |at: Option<u64>| -> Result<(Vec<u8>, Option<Header>), DataError> {
        let mut header = vec![0; HEADER_BYTES];
        let count = at.map_or(Ok(0), |at| read_full_at(&*file, &mut header, at)).map_err(failed)?;
        header.truncate(count);
        let read = Header::read(&header).filter(|header| header.number == number);
        Ok((header, read))
    };
    let (first, last) = (header_at(Some(0))?, header_at(bytes.checked_sub(HEADER_BYTES as u64))?);
    let known = first.1.or(last.1);
    if let Some(other) = known.filter(|known| !(VERSION_MIN..=VERSION).contains(&known.version)) {
        return Err(DataError::OtherVersion(directory.join(&name(number)), other.version));
    }
    let layout = known.map(|known| known.layout).or(journal);
    let layout = layout.ok_or_else(|| DataError::Foreign(directory.join(&name(number))))?;
    let mut damage = Vec::new();
    if first.1.is_none() {
        damage.push((0..HEADER_BYTES as u64, "the beginning of a checkpoint".to_owned()));
    }
    let mut body = Body { layout, counters: None, is_ended: false, items: 0, until: None, damage };
    let items_end = bytes.saturating_sub(if last.1.is_some() { HEADER_BYTES as u64 } else { 0 });
    let end = body.read(&file, items_end, show).map_err(failed)?;
    let is_whole = last.1.is_some() && (first.1.is_none() || first.0 == last.0) && end + HEADER_BYTES as u64 == bytes;
    if !body.is_ended && body.damage.is_empty() {
        // Cut off between two records.
        body.damage.push((end..end, "the end of a checkpoint".to_owned()));
    } else if !is_whole && body.damage.is_empty() {
        body.damage.push((end..end, "what stands behind the end of a checkpoint".to_owned()));
    }
    let version = known.map(|known| known.version);
    let in_items = body.counters.map(|counters| counters.lsn).filter(|lsn| *lsn > Lsn(0));
    let lsn = known.map(|known| known.lsn).or(in_items).unwrap_or_default();
    let checkpoint = Checkpoint { number, span: Span { lsn, until: body.until }, bytes };
    let are_counters_lost = body.counters.is_none();
    Ok(Reading { version, layout, checkpoint, are_counters_lost, damage: body.damage })
}

/// The items of a checkpoint, as far as they were read.
struct Body {
    layout: Layout,
    counters: Option<Counters>,
    is_ended: bool,
    items: u64,
    until: Option<Lsn>,
    damage: Vec<(Range<u64>, String)>,
}

impl Body {
    /// Reads all items up to the end of a file's items at `end`, and goes over what cannot be read. Says where they ended.
    fn read(&mut self, file: &FileRef, end: u64, show: &mut dyn FnMut(&Item<'_>)) -> io::Result<u64> {
        let start = HEADER_BYTES as u64;
        let source = Reader::new(FileRef::clone(file), start).take(end.saturating_sub(start));
        let mut records = Records::new(source, self.layout.salt, Lsn(start));
        while let Some((place, body)) = records.read()? {
            self.take(place.lsn.0..place.end().0, body, show);
            if self.is_ended {
                // Whatever might follow is not part of it.
                return Ok(place.end().0);
            }
        }
        let at = records.at().0;
        if at < end { self.search(file, at, end, show) } else { Ok(at) }
    }

    /// The same from a record on that cannot be read: the rest is searched for more, a window at a time.
    fn search(&mut self, file: &FileRef, from: u64, end: u64, show: &mut dyn FnMut(&Item<'_>)) -> io::Result<u64> {
        let (mut window, mut at) = (Vec::new(), from);
        // Where something begins that cannot be read, and what it may be.
        let mut bad: Option<(u64, String)> = None;
        while at < end && !self.is_ended {
            window.clear();
            Reader::new(FileRef::clone(file), at).take((end - at).min(2 * SEARCH_BYTES)).read_to_end(&mut window)?;
            if window.is_empty() {
                break;
            }
            // What begins in the first half is whole in the window, if it is whole at all.
            let half = window.len().min(usize::try_from(SEARCH_BYTES).unwrap_or(usize::MAX));
            let mut position = 0;
            while position < half && !self.is_ended {
                let (rest, lsn) = (&window[position..], at + position as u64);
                if let Some(body) = record::body_at(rest, self.layout.salt, Lsn(lsn)) {
                    self.damage.extend(bad.take().map(|(start, what)| (start..lsn, what)));
                    let next = position + record::record_bytes(body.len());
                    self.take(lsn..at + next as u64, body, show);
                    position = next;
                    continue;
                }
                bad.get_or_insert_with(|| {
                    let item = record::claimed_body(rest).and_then(Item::decode);
                    (lsn, item.map_or(UNKNOWN.to_owned(), |item| say(&item)))
                });
                let least = RECORD_BYTES_MIN.min(rest.len());
                let searched = half.saturating_sub(position + least);
                let next = record::find_next(&rest[least..], self.layout.salt, Lsn(lsn + least as u64), searched);
                position = next.map_or(half.max(position + least), |next| position + least + next);
            }
            at += position as u64;
        }
        let at = at.min(end);
        self.damage.extend(bad.map(|(start, what)| (start..at, what)));
        Ok(at)
    }

    fn take(&mut self, place: Range<u64>, body: &[u8], show: &mut dyn FnMut(&Item<'_>)) {
        let Some(item) = Item::decode(body) else {
            self.damage.push((place, UNKNOWN.to_owned()));
            return;
        };
        match item {
            Item::Counters(counters) => self.counters = Some(counters),
            Item::End { items, until, counters } => {
                (self.is_ended, self.until) = (true, until);
                self.counters = self.counters.or(counters);
                if items != self.items && self.damage.is_empty() {
                    self.damage.push((place, UNKNOWN.to_owned()));
                }
            }
            _ => {}
        }
        self.items += 1;
        show(&item);
    }
}

const UNKNOWN: &str = "part of a checkpoint";

/// What a damaged item seems to be.
fn say(item: &Item<'_>) -> String {
    match item {
        Item::Counters(_) | Item::End { .. } => UNKNOWN.to_owned(),
        Item::User { name, .. } => format!("perhaps the account {name}"),
        Item::Session { .. } => "perhaps a login".to_owned(),
        Item::Group { name, .. } => format!("perhaps the group {name}"),
        Item::File { name, .. } => format!("perhaps the file {name}"),
        Item::Listing { name, .. } => format!("perhaps that somebody lists the file {name}"),
        Item::Entries { user, entries } => format!("perhaps {} waiting messages of user {}", entries.len(), user.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::UserId;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 64 * 1024 };
    const USERS: u32 = 5;
    const COUNTERS: Counters = Counters { lsn: Lsn(99), users: USERS, groups: 0, files: 0, elapsed_ms: 5 };

    fn user(user: u32) -> (UserId, String) {
        (UserId(user), format!("user{user}"))
    }

    fn written(directory: &Directory) -> Checkpoint {
        let all = |show: &mut dyn FnMut(&Item<'_>)| {
            for (user, name) in (0..USERS).map(user) {
                show(&Item::User { user, name: &name, password_hash: "", last_id: 0, through: Lsn(0) });
            }
        };
        write(directory, LAYOUT, 3, (COUNTERS, Lsn(120)), all).unwrap()
    }

    fn users(directory: &Directory, journal: Option<Layout>) -> Result<(Vec<u32>, Reading), DataError> {
        let mut found = Vec::new();
        let reading = read(directory, 3, journal, &mut |item| {
            if let Item::User { user, .. } = item {
                found.push(user.0);
            }
        })?;
        Ok((found, reading))
    }

    fn put(directory: &Directory, bytes: &[u8]) {
        std::fs::write(directory.join(&name(3)), bytes).unwrap();
    }

    #[test]
    fn a_draft_of_any_size_has_its_bytes_however_it_is_written() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::on_system(root.path());
        let sizes = [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1];
        for (number, size) in (1..).zip(sizes.into_iter().chain([3 * WRITE_BYTES - 4097])) {
            for (is_buffered, part) in [(false, size), (false, 10_001), (true, 10_001)] {
                let bytes: Vec<u8> = (1..=251).cycle().take(size).collect();
                let mut draft = Draft::begin(&directory, number).unwrap();
                if is_buffered {
                    draft.file = directory.open(&Draft::name(number), Mode::Create).unwrap();
                    draft.is_direct = false;
                }
                for part in bytes.chunks(part) {
                    draft.write(part).unwrap();
                }
                draft.finish().unwrap();
                let found = directory.read(&name(number)).unwrap();
                assert!(found == bytes, "{size} bytes in parts of {part}, {is_buffered}: {}", found.len());
            }
        }
    }

    #[test]
    fn what_was_written_is_read_and_any_flipped_bit_or_cut_is_found() {
        let root = tempfile::tempdir().unwrap();
        let directory = &Directory::on_system(root.path());
        let checkpoint = written(directory);
        assert_eq!(list(directory).unwrap(), BTreeSet::from([3]));
        let (found, reading) = users(directory, None).unwrap();
        assert_eq!(found, [0, 1, 2, 3, 4]);
        assert!(reading.damage.is_empty() && !reading.are_counters_lost);
        assert_eq!((reading.layout, reading.checkpoint), (LAYOUT, checkpoint));
        let whole = directory.read(&name(3)).unwrap();
        assert_eq!(whole.len() as u64, checkpoint.bytes);
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            put(directory, &flipped);
            let (_, reading) = users(directory, None).unwrap();
            assert!(!reading.damage.is_empty(), "byte {at}");
            let Span { lsn, until } = reading.checkpoint.span;
            assert_eq!(lsn, checkpoint.span.lsn, "byte {at}");
            assert!(until.is_none() || until == checkpoint.span.until, "byte {at}");
            assert!(!reading.are_counters_lost);
            put(directory, &whole[..at]);
            let is_found = users(directory, None).is_ok_and(|(_, reading)| !reading.damage.is_empty());
            assert!(is_found || at < HEADER_BYTES, "cut at {at}");
            // Something behind it is damage too.
            put(directory, &[&whole[..], &vec![7; at + 1]].concat());
            assert!(!users(directory, None).unwrap().1.damage.is_empty(), "longer by {at}");
        }
    }

    #[test]
    fn what_is_whole_of_a_damaged_one_is_found_also_without_both_headers() {
        let root = tempfile::tempdir().unwrap();
        let directory = &Directory::on_system(root.path());
        let checkpoint = written(directory);
        let mut bytes = directory.read(&name(3)).unwrap();
        let third = memchr::memmem::find(&bytes, b"user2").unwrap();
        bytes[third] ^= 1;
        put(directory, &bytes);
        let (found, reading) = users(directory, None).unwrap();
        assert_eq!(found, [0, 1, 3, 4]);
        assert_eq!((reading.layout, reading.checkpoint, reading.damage.len()), (LAYOUT, checkpoint, 1));
        let last = bytes.len() - 9;
        bytes[9] ^= 1;
        bytes[last] ^= 1;
        put(directory, &bytes);
        assert!(matches!(users(directory, None), Err(DataError::Foreign(_))), "nothing tells the salt");
        let (found, reading) = users(directory, Some(LAYOUT)).unwrap();
        assert_eq!(found, [0, 1, 3, 4]);
        assert_eq!(reading.checkpoint.span, checkpoint.span);
    }
}
