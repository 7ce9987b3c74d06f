//! The journal: changes in the order in which they happened, on the disk before anybody is told of them.
//!
//! The loop holds a [`Log`]: it numbers changes, encodes them into the open [`Batch`], and knows what is durable. The
//! journal thread holds a [`Journal`]: it writes batches, syncs, and makes room ahead. Neither knows what a change means.
//!
//! # Format
//!
//! A file opens with 20 bytes: `kurirjnl`, the version (4 bytes), a random salt (4 bytes), and the CRC-32C of these 16.
//! Records follow without a gap:
//!
//! | bytes | |
//! |---|---|
//! | 4 | length of the body |
//! | 4 | CRC-32C of the salt, the length and the body |
//! | … | body: a kind (1 byte) and what belongs to it |
//!
//! Kind 0 is a mark, which opens each batch: its own position (8 bytes), and the position up to which the file was
//! synced when the batch was begun (8 bytes). Kind 255 is a void, which a repair leaves where damage was. Every other kind is an encoded [`Change`]. Integers are little endian. A
//! position ([`Lsn`]) counts bytes from the start of the file.
//!
//! # Recovery
//!
//! Records are read up to the first that is not whole. If a later mark says that this place had been synced, it is
//! damage, and opening fails; if none does, it is the torn end of a write that nobody was told of, and is cut off. The
//! salt keeps a text that looks like a record from being taken for one.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};

use crate::change::{Change, Lsn};
use crate::data;

const FILE_NAME: &str = "0000000001.log";
const MAGIC: &[u8; 8] = b"kurirjnl";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 20;
const RECORD_HEADER_BYTES: usize = 8;
const KIND_MARK: u8 = 0;
const KIND_VOID: u8 = 255;
/// A header and a kind.
const RECORD_BYTES_MIN: usize = RECORD_HEADER_BYTES + 1;
const VOID_BYTES_MAX: usize = 1024 * 1024;
const MARK_BYTES: usize = 17;
/// Above every record that is ever written: a line, its names, and room to spare.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Room on the disk is taken this far ahead.
const ROOM_BYTES: u64 = 32 * 1024 * 1024;
/// With less room than this, requests wait; what they have begun may still be ended.
pub const WAIT_BYTES: u64 = 4 * 1024 * 1024;
/// Room is taken in no smaller pieces than this.
const ROOM_BYTES_MIN: u64 = 4096;
/// How long written batches wait for their sync with [`Sync::Interval`], and a full disk for the next try.
const IDLE_WORK: Duration = Duration::from_secs(1);
/// The last of the room is kept for what lets people read and delete; see [`Need`].
pub const RESERVE_BYTES: u64 = 256 * 1024;

/// Changes that become durable together.
#[derive(Debug, Default)]
pub struct Batch {
    /// Batches are numbered in order.
    pub number: u64,
    /// Where it starts.
    pub start: Lsn,
    /// Its records.
    pub bytes: Vec<u8>,
}

impl Batch {
    /// Where it ends.
    #[must_use]
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }
}

/// The loop's side of the journal.
#[derive(Debug)]
pub struct Log {
    salt: u32,
    open: Batch,
    /// Replies that tell of what stands before this may go.
    settled: Lsn,
    settled_batch: u64,
    /// What stands before this is on the disk. With [`Sync::Always`] the same.
    synced: Lsn,
    room: Lsn,
    is_full: bool,
    spare: Vec<u8>,
}

/// When a reply may tell of what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Once it is on the disk.
    Always,
    /// Once the kernel has it, which writes it to the disk about once a second: a power cut may take back what was
    /// acknowledged in the last second, a crash of the server alone may not.
    Interval,
}

/// What a change needs room for: the last of it is kept for what makes room again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It makes the server larger.
    More,
    /// It lets somebody in who may make it smaller.
    Login,
    /// It makes the server smaller, or writes down what cannot be taken back.
    Less,
}

/// There is no room on the disk for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFull;

impl Log {
    /// The log of a journal that ends at `end`, is durable up to there, and has no end of room.
    #[must_use]
    pub fn new(salt: u32, end: Lsn) -> Self {
        let room = Lsn(u64::MAX);
        let open = Batch { number: 1, start: end, bytes: Vec::new() };
        Self { salt, open, settled: end, settled_batch: 0, synced: end, room, is_full: false, spare: Vec::new() }
    }

    /// Appends a change to the open batch and says where it stands.
    ///
    /// # Errors
    /// [`DiskFull`] when it would use room that is kept for what matters more.
    pub fn append(&mut self, change: &Change<'_>, need: Need) -> Result<Lsn, DiskFull> {
        let kept = match need {
            Need::More => RESERVE_BYTES,
            Need::Login => RESERVE_BYTES / 2,
            Need::Less => 0,
        };
        let room = self.room.0.saturating_sub(kept);
        let before = self.open.bytes.len();
        if before == 0 {
            mark_record(&mut self.open.bytes, self.salt, self.open.start, self.synced);
        }
        let lsn = self.open.end();
        record(&mut self.open.bytes, self.salt, |body| change.encode(body));
        if self.open.end().0 > room {
            self.open.bytes.truncate(before);
            return Err(DiskFull);
        }
        Ok(lsn)
    }

    /// True when there is room to write down that what is given out now was given out.
    #[must_use]
    pub fn can_deliver(&self) -> bool {
        self.open.end().0.saturating_add(RESERVE_BYTES / 4) <= self.room.0
    }

    /// Replies that wait for this batch, or one before it, may go.
    #[must_use]
    pub fn settled_batch(&self) -> u64 {
        self.settled_batch
    }

    /// The batch that must be durable before what the state now shows may be told; none if all of it is.
    #[must_use]
    pub fn unsettled(&self) -> Option<u64> {
        let last = if self.open.bytes.is_empty() { self.open.number - 1 } else { self.open.number };
        (last > self.settled_batch).then_some(last)
    }

    /// The batch that must be durable before the change at `lsn` may be shown; none if it is.
    #[must_use]
    pub fn unsettled_at(&self, lsn: Lsn) -> Option<u64> {
        if lsn < self.settled { None } else { self.unsettled() }
    }

    /// Closes the open batch, if it holds anything, and opens the next.
    pub fn take_batch(&mut self) -> Option<Batch> {
        if self.open.bytes.is_empty() {
            return None;
        }
        let next =
            Batch { number: self.open.number + 1, start: self.open.end(), bytes: std::mem::take(&mut self.spare) };
        Some(std::mem::replace(&mut self.open, next))
    }

    /// What stands before this is on the disk.
    #[must_use]
    pub fn synced(&self) -> Lsn {
        self.synced
    }

    /// Where the next record will stand.
    #[must_use]
    pub fn end(&self) -> Lsn {
        self.open.end()
    }

    /// True when the open batch holds changes.
    #[must_use]
    pub fn has_open_changes(&self) -> bool {
        !self.open.bytes.is_empty()
    }

    /// Takes the word of the journal thread that `batch`, and all before it, is as durable as it was asked to be, and that
    /// all before `synced` is on the disk. The batch's memory is used again.
    pub fn settle(&mut self, batch: Batch, synced: Lsn) {
        self.settled = self.settled.max(batch.end());
        self.settled_batch = self.settled_batch.max(batch.number);
        self.set_synced(synced);
        if batch.bytes.capacity() > self.spare.capacity() {
            self.spare = batch.bytes;
            self.spare.clear();
        }
    }

    /// Takes the word of the journal thread that all before `synced` is on the disk.
    pub fn set_synced(&mut self, synced: Lsn) {
        self.synced = self.synced.max(synced);
    }

    /// Takes the word of the journal thread that the disk has room up to `room`, and whether that is all.
    pub fn set_room(&mut self, room: Lsn, is_full: bool) {
        self.room = room;
        self.is_full = is_full;
    }

    /// True while changes come faster than the journal thread makes room for them: they must wait for it, since a
    /// refusal is for a disk that is full.
    #[must_use]
    pub fn must_wait(&self) -> bool {
        !self.is_full && self.room.0 < self.open.end().0.saturating_add(WAIT_BYTES)
    }
}

/// Appends a mark that stands at `at`.
fn mark_record(out: &mut Vec<u8>, salt: u32, at: Lsn, synced: Lsn) {
    record(out, salt, |body| {
        body.push(KIND_MARK);
        body.extend_from_slice(&at.0.to_le_bytes());
        body.extend_from_slice(&synced.0.to_le_bytes());
    });
}

/// Appends a record whose body `write` makes.
fn record(out: &mut Vec<u8>, salt: u32, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
    write(out);
    let (header, body) = out[start..].split_at_mut(RECORD_HEADER_BYTES);
    // A body is bounded by the longest request line, far below 4 GiB.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes();
    header[..4].copy_from_slice(&length);
    header[4..].copy_from_slice(&checksum(salt, length, body).to_le_bytes());
}

fn checksum(salt: u32, length: [u8; 4], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(salt, &length), body)
}

/// Why a journal could not be opened.
#[derive(Debug)]
pub enum OpenError {
    /// The disk said so.
    Io(PathBuf, io::Error),
    /// The file is not one of ours, or of a version that this program does not know.
    Foreign(PathBuf),
    /// A record is bad though what follows it shows that it had been synced.
    Damaged(PathBuf, Lsn),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Foreign(path) => write!(f, "{} is not a journal of version {VERSION}", path.display()),
            Self::Damaged(path, lsn) => {
                write!(
                    f,
                    "{} is damaged at byte {lsn}: what stands there had been synced; `kurir check --repair` keeps what is good",
                    path.display()
                )
            }
        }
    }
}

impl std::error::Error for OpenError {}

/// The journal thread's side: the file.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    salt: u32,
    end: Lsn,
    synced: Lsn,
    /// When the oldest batch was written that is not synced.
    unsynced_since: Option<Instant>,
    room: Lsn,
}

/// What a journal holds, and what is wrong with it.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The file.
    pub path: PathBuf,
    /// How many changes can be read.
    pub changes: u64,
    /// Where the good records end.
    pub end: Lsn,
    /// How many bytes of a torn end follow; the next start cuts them off.
    pub torn_bytes: u64,
    /// What had been synced and cannot be read.
    pub damage: Vec<Range<usize>>,
}

/// What opening found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// There was no journal before.
    pub is_new: bool,
    /// How many changes there are.
    pub changes: u64,
    /// How many bytes of a torn end were cut off.
    pub torn_bytes: u64,
}

impl Journal {
    /// Opens the journal in `directory`, or begins one, and gives every change in it to `replay`.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is changed on the disk then.
    pub fn open(directory: &Path, replay: impl FnMut(&Change<'_>, Lsn)) -> Result<(Self, Recovered), OpenError> {
        let path = directory.join(FILE_NAME);
        let failed = |error| OpenError::Io(path.clone(), error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if is_unbegun(&mut file, length).map_err(failed)? {
            // Nobody was told of anything before the header was synced.
            let salt = getrandom::u32().map_err(|error| failed(io::Error::other(error)))?;
            let end = Lsn(HEADER_BYTES as u64);
            begin(&mut file, salt, directory).map_err(failed)?;
            let journal = Self { file, path, salt, end, synced: end, unsynced_since: None, room: end };
            return Ok((journal, Recovered { is_new: true, ..Recovered::default() }));
        }
        let (salt, end, changes) = scan(&mut file, &path, length, replay)?;
        let torn_bytes = length - end.0;
        if torn_bytes > 0 {
            file.set_len(end.0).and_then(|()| file.sync_all()).map_err(failed)?;
        }
        file.seek(SeekFrom::Start(end.0)).map_err(failed)?;
        Ok((
            Self { file, path, salt, end, synced: end, unsynced_since: None, room: end },
            Recovered { is_new: false, changes, torn_bytes },
        ))
    }

    /// Reads what can be read of the journal in `directory`, damaged or not, and changes nothing.
    ///
    /// # Errors
    /// [`OpenError`], but not for damage.
    pub fn survey(directory: &Path, replay: impl FnMut(&Change<'_>, Lsn)) -> Result<Survey, OpenError> {
        let path = directory.join(FILE_NAME);
        let bytes = fs::read(&path).map_err(|error| OpenError::Io(path.clone(), error))?;
        Self::survey_bytes(&bytes, path, replay)
    }

    /// The same for a journal in memory, which `path` names.
    ///
    /// # Errors
    /// [`OpenError::Foreign`]
    pub fn survey_bytes(
        bytes: &[u8],
        path: PathBuf,
        mut replay: impl FnMut(&Change<'_>, Lsn),
    ) -> Result<Survey, OpenError> {
        let header = bytes.first_chunk::<HEADER_BYTES>();
        let salt = header.and_then(read_header).ok_or_else(|| OpenError::Foreign(path.clone()))?;
        let end = Lsn(bytes.len() as u64);
        let mut survey = Survey { path, changes: 0, end, torn_bytes: 0, damage: Vec::new() };
        let mut at = HEADER_BYTES;
        while at < bytes.len() {
            let lsn = Lsn(at as u64);
            let Some(body) = record_at(bytes, at, salt) else {
                // As at the start of a server: what nobody says had been synced is the torn end of a write.
                if !was_synced_past(&bytes[at..], salt, lsn) {
                    survey.end = lsn;
                    break;
                }
                let next = (at + RECORD_BYTES_MIN..bytes.len()).find(|next| record_at(bytes, *next, salt).is_some());
                let next = next.unwrap_or(bytes.len());
                survey.damage.push(at..next);
                at = next;
                continue;
            };
            if !says_nothing(body, lsn) {
                let change = Change::decode(body).ok_or_else(|| OpenError::Foreign(survey.path.clone()))?;
                replay(&change, lsn);
                survey.changes += 1;
            }
            at += RECORD_HEADER_BYTES + body.len();
        }
        survey.torn_bytes = bytes.len() as u64 - survey.end.0;
        Ok(survey)
    }

    /// Puts a repaired journal in the place of a damaged one: voids stand where the damage was, so that everything else keeps
    /// its position. The damaged one is kept beside it; says where.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn repair(survey: &Survey) -> Result<PathBuf, OpenError> {
        let failed = |error| OpenError::Io(survey.path.clone(), error);
        let mut bytes = fs::read(&survey.path).map_err(failed)?;
        let header = bytes.first_chunk::<HEADER_BYTES>();
        let salt = header.and_then(read_header).ok_or_else(|| OpenError::Foreign(survey.path.clone()))?;
        for damage in &survey.damage {
            let voids = voids(damage.len(), salt);
            if let Some(place) = bytes.get_mut(damage.clone()) {
                place.copy_from_slice(&voids);
            }
        }
        let with_ending = |ending: &str| survey.path.with_added_extension(ending);
        let kept = (1..).map(|number| with_ending(&format!("damaged-{number}"))).find(|path| !path.exists());
        let (kept, fresh) = (kept.unwrap_or_default(), with_ending("repaired"));
        replace(&survey.path, &fresh, &bytes, &kept).map_err(failed)?;
        Ok(kept)
    }

    /// The loop's side of it, with the room that there is.
    #[must_use]
    pub fn log(&self) -> Log {
        let mut log = Log::new(self.salt, self.end);
        log.set_room(self.room, self.is_full());
        log
    }

    /// Writes batches, in order.
    ///
    /// # Errors
    /// What the disk said. What it holds then is not known: nothing of these batches may be told to anybody, and the
    /// journal must not be written to again.
    pub fn write(&mut self, batches: &[Batch]) -> io::Result<()> {
        for batch in batches {
            debug_assert_eq!(batch.start, self.end);
            self.file.write_all(&batch.bytes)?;
            self.end = batch.end();
        }
        self.unsynced_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As for [`Self::write`]; a sync that failed is never tried again.
    pub fn sync(&mut self) -> io::Result<()> {
        if self.synced < self.end {
            self.file.sync_data()?;
            self.synced = self.end;
        }
        self.unsynced_since = None;
        Ok(())
    }

    /// Some batch has waited for its sync as long as [`Sync::Interval`] lets it.
    #[must_use]
    pub fn is_sync_due(&self) -> bool {
        self.unsynced_since.is_some_and(|since| since.elapsed() >= IDLE_WORK)
    }

    /// What stands before this is on the disk.
    #[must_use]
    pub fn synced(&self) -> Lsn {
        self.synced
    }

    /// Takes room on the disk ahead of the end, if little is left: as much as there is, up to a good deal.
    ///
    /// # Errors
    /// What the disk said. A full disk is not an error.
    pub fn make_room(&mut self) -> io::Result<()> {
        let mut bytes = ROOM_BYTES;
        while self.is_short_of_room() && bytes >= ROOM_BYTES_MIN {
            match fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.room.0, bytes) {
                // A file system that cannot say what is free: a full disk then ends the server like any failed write.
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => self.room.0 += bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => bytes /= 2,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// How far the room goes that the last [`Self::make_room`] left.
    #[must_use]
    pub fn room(&self) -> Lsn {
        self.room
    }

    /// True when the disk has no more room to give than there is.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.is_short_of_room()
    }

    fn is_short_of_room(&self) -> bool {
        self.room.0 < self.end.0 + ROOM_BYTES / 2
    }

    /// Ends the journal cleanly: a last mark says that all before it was synced, so that damage to it can be told from a
    /// torn end.
    ///
    /// # Errors
    /// As for [`Self::sync`].
    pub fn close(mut self) -> io::Result<()> {
        self.sync()?;
        let mut end = Vec::new();
        mark_record(&mut end, self.salt, self.end, self.synced);
        match self.file.write_all(&end) {
            // The mark is for the case of damage alone.
            Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => Ok(()),
            written => written.and_then(|()| self.file.sync_data()),
        }
    }

    /// When, at the latest, it should be synced and make room though nothing new is to be written; never, if all is
    /// synced and there is room enough.
    #[must_use]
    pub fn idle_work(&self) -> Option<Duration> {
        (self.is_short_of_room() || self.unsynced_since.is_some()).then_some(IDLE_WORK)
    }

    /// Where it stands on the disk.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A file whose header never got onto the disk: too short, or of the right length with nothing in it.
fn is_unbegun(file: &mut File, length: u64) -> io::Result<bool> {
    let mut header = Vec::new();
    file.take(HEADER_BYTES as u64).read_to_end(&mut header)?;
    file.rewind()?;
    Ok(length < HEADER_BYTES as u64 || length == HEADER_BYTES as u64 && header.iter().all(|byte| *byte == 0))
}

fn begin(file: &mut File, salt: u32, directory: &Path) -> io::Result<()> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&salt.to_le_bytes());
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    file.set_len(0)?;
    file.write_all(&header)?;
    file.sync_all()?;
    data::sync(directory)
}

/// Reads every good record from the start. Returns the salt, where the good records end, and how many changes they hold.
fn scan(
    file: &mut File,
    path: &Path,
    length: u64,
    mut replay: impl FnMut(&Change<'_>, Lsn),
) -> Result<(u32, Lsn, u64), OpenError> {
    let failed = |error| OpenError::Io(path.to_owned(), error);
    let mut reader = BufReader::with_capacity(1024 * 1024, &*file);
    let mut header = [0; HEADER_BYTES];
    reader.read_exact(&mut header).map_err(failed)?;
    let salt = read_header(&header).ok_or_else(|| OpenError::Foreign(path.to_owned()))?;

    let mut at = Lsn(HEADER_BYTES as u64);
    let mut body = Vec::new();
    let mut changes = 0;
    while read_record(&mut reader, salt, length - at.0, &mut body).map_err(failed)? {
        if !says_nothing(&body, at) {
            // A record whose sum is right and that cannot be read was written by a program that this one does not know.
            let change = Change::decode(&body).ok_or_else(|| OpenError::Foreign(path.to_owned()))?;
            replay(&change, at);
            changes += 1;
        }
        at.0 += (RECORD_HEADER_BYTES + body.len()) as u64;
    }
    let mut rest = Vec::new();
    file.seek(SeekFrom::Start(at.0)).and_then(|_| file.read_to_end(&mut rest)).map_err(failed)?;
    if was_synced_past(&rest, salt, at) {
        return Err(OpenError::Damaged(path.to_owned(), at));
    }
    Ok((salt, at, changes))
}

fn read_header(header: &[u8; HEADER_BYTES]) -> Option<u32> {
    let (fields, sum) = header.split_last_chunk::<4>()?;
    let (magic, rest) = fields.split_first_chunk::<8>()?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (salt, _) = rest.split_first_chunk::<4>()?;
    let is_known =
        magic == MAGIC && u32::from_le_bytes(*version) == VERSION && crc32c::crc32c(fields) == u32::from_le_bytes(*sum);
    is_known.then_some(u32::from_le_bytes(*salt))
}

/// Puts `bytes` in the place of the file at `path` by way of `fresh`, and what was there at `kept`.
fn replace(path: &Path, fresh: &Path, bytes: &[u8], kept: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::hard_link(path, kept)?;
    fs::rename(fresh, path)?;
    path.parent().map_or(Ok(()), data::sync)
}

/// Records that say nothing, of exactly so many bytes together.
fn voids(bytes: usize, salt: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        let left = bytes - out.len();
        // What is left over must be long enough for a record too.
        let this = if left <= VOID_BYTES_MAX { left } else { VOID_BYTES_MAX - RECORD_BYTES_MIN };
        record(&mut out, salt, |body| {
            body.push(KIND_VOID);
            body.resize(body.len() + this.saturating_sub(RECORD_BYTES_MIN), 0);
        });
    }
    out
}

/// The body of the record at `at`, if a whole one stands there.
fn record_at(bytes: &[u8], at: usize, salt: u32) -> Option<&[u8]> {
    let (length, sum) = split_record_header(bytes.get(at..)?)?;
    let start = at + RECORD_HEADER_BYTES;
    let body = bytes.get(start..start.checked_add(u32::from_le_bytes(length) as usize)?)?;
    (!body.is_empty() && body.len() <= BODY_BYTES_MAX && checksum(salt, length, body) == sum).then_some(body)
}

/// Reads the next record's body; false where no whole record stands.
fn read_record(reader: &mut impl Read, salt: u32, left: u64, body: &mut Vec<u8>) -> io::Result<bool> {
    let mut header = [0; RECORD_HEADER_BYTES];
    if left < RECORD_HEADER_BYTES as u64 {
        return Ok(false);
    }
    reader.read_exact(&mut header)?;
    let Some((length, sum)) = split_record_header(&header) else { return Ok(false) };
    let body_bytes = u32::from_le_bytes(length) as usize;
    if body_bytes == 0 || body_bytes > BODY_BYTES_MAX || (body_bytes + RECORD_HEADER_BYTES) as u64 > left {
        return Ok(false);
    }
    body.resize(body_bytes, 0);
    match reader.read_exact(body) {
        Ok(()) => Ok(checksum(salt, length, body) == sum),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn split_record_header(bytes: &[u8]) -> Option<([u8; 4], u32)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, _) = rest.split_first_chunk::<4>()?;
    Some((*length, u32::from_le_bytes(*sum)))
}

/// A mark or a void.
fn says_nothing(body: &[u8], at: Lsn) -> bool {
    body.first() == Some(&KIND_VOID) || mark(body).is_some_and(|(position, _)| position == at)
}

/// A mark's own position and the one up to which the file was synced.
fn mark(body: &[u8]) -> Option<(Lsn, Lsn)> {
    let (&kind, rest) = body.split_first()?;
    let (at, rest) = rest.split_first_chunk::<8>()?;
    let (synced, rest) = rest.split_first_chunk::<8>()?;
    let position = |bytes: &[u8; 8]| Lsn(u64::from_le_bytes(*bytes));
    (kind == KIND_MARK && rest.is_empty()).then(|| (position(at), position(synced)))
}

/// True when some mark in `rest`, which stands at `at`, says that the file had been synced past `at`.
fn was_synced_past(rest: &[u8], salt: u32, at: Lsn) -> bool {
    let length = u32::try_from(MARK_BYTES).unwrap_or(0).to_le_bytes();
    memchr::memmem::find_iter(rest, &length).any(|start| {
        let Some((_, sum)) = split_record_header(&rest[start..]) else { return false };
        let Some(body) = rest.get(start + RECORD_HEADER_BYTES..start + RECORD_HEADER_BYTES + MARK_BYTES) else {
            return false;
        };
        checksum(salt, length, body) == sum
            && mark(body).is_some_and(|(position, synced)| position.0 == at.0 + start as u64 && synced > at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::UserId;

    fn change(user: u32) -> Change<'static> {
        Change::Delivered { user: UserId(user), first: Lsn(1), last: Lsn(u64::from(user)) }
    }

    fn numbers(directory: &Path) -> Result<(Vec<u32>, Recovered), OpenError> {
        let mut found = Vec::new();
        let (_, recovered) = Journal::open(directory, |change, _| {
            if let Change::Delivered { user, .. } = change {
                found.push(user.0);
            }
        })?;
        Ok((found, recovered))
    }

    /// A journal of three batches with two changes each, every batch synced before the next was begun.
    fn three_batches(directory: &Path) -> Vec<Lsn> {
        let (mut journal, _) = Journal::open(directory, |_, _| {}).unwrap();
        journal.make_room().unwrap();
        let mut log = journal.log();
        let mut starts = Vec::new();
        for batch in 0..3 {
            log.append(&change(batch * 2), Need::More).unwrap();
            log.append(&change(batch * 2 + 1), Need::More).unwrap();
            let batch = log.take_batch().unwrap();
            starts.push(batch.start);
            journal.write(std::slice::from_ref(&batch)).unwrap();
            journal.sync().unwrap();
            log.settle(batch, journal.synced());
        }
        starts
    }

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        three_batches(directory.path());
        let (found, recovered) = numbers(directory.path()).unwrap();
        assert_eq!(found, [0, 1, 2, 3, 4, 5]);
        assert_eq!(recovered, Recovered { is_new: false, changes: 6, torn_bytes: 0 });
    }

    #[test]
    fn a_journal_cut_at_any_byte_of_its_last_batch_keeps_the_ones_before() {
        let directory = tempfile::tempdir().unwrap();
        let starts = three_batches(directory.path());
        let path = directory.path().join("0000000001.log");
        let whole = fs::read(&path).unwrap();
        for cut in usize::try_from(starts[2].0).unwrap()..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (found, recovered) = numbers(directory.path()).unwrap();
            assert_eq!(found[..4], [0, 1, 2, 3], "cut at {cut}");
            assert!(found.len() < 6);
            assert!(recovered.torn_bytes < whole.len() as u64 - starts[2].0);
            assert_eq!(numbers(directory.path()).unwrap().1.torn_bytes, 0, "a torn end is cut off once");
        }
    }

    #[test]
    fn a_flipped_bit_in_what_had_been_synced_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let starts = three_batches(directory.path());
        let path = directory.path().join("0000000001.log");
        let whole = fs::read(&path).unwrap();
        for at in 0..usize::try_from(starts[1].0).unwrap() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                fs::write(&path, &flipped).unwrap();
                let error = numbers(directory.path()).unwrap_err();
                if at < HEADER_BYTES {
                    assert!(matches!(error, OpenError::Foreign(..)), "byte {at} bit {bit}: {error}");
                } else {
                    assert!(matches!(error, OpenError::Damaged(..)), "byte {at} bit {bit}: {error}");
                }
                assert_eq!(fs::read(&path).unwrap(), flipped, "a damaged journal is left as it is");
            }
        }
    }

    #[test]
    fn a_bad_record_that_was_never_synced_is_a_torn_end_though_good_ones_follow() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(directory.path(), |_, _| {}).unwrap();
        journal.make_room().unwrap();
        let mut log = journal.log();
        let synced = journal.synced();
        for number in 0..3 {
            log.append(&change(number), Need::More).unwrap();
            let batch = log.take_batch().unwrap();
            journal.write(std::slice::from_ref(&batch)).unwrap();
            log.settle(batch, synced);
        }
        assert!(journal.idle_work().is_some());
        let path = directory.path().join("0000000001.log");
        let mut bytes = fs::read(&path).unwrap();
        bytes[HEADER_BYTES + RECORD_HEADER_BYTES + 3] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let (found, recovered) = numbers(directory.path()).unwrap();
        assert_eq!(found, [0u32; 0]);
        assert_eq!(recovered.torn_bytes, (bytes.len() - HEADER_BYTES) as u64);
    }

    #[test]
    fn a_repair_keeps_every_change_but_the_damaged_one() {
        let directory = tempfile::tempdir().unwrap();
        three_batches(directory.path());
        let path = directory.path().join(FILE_NAME);
        let whole = fs::read(&path).unwrap();
        let mut places = Vec::new();
        let survey = Journal::survey(directory.path(), |_, lsn| places.push(usize::try_from(lsn.0).unwrap())).unwrap();
        assert_eq!((survey.changes, survey.damage.len(), survey.torn_bytes), (6, 0, 0));
        // Of the last batch nobody can say whether it had been synced.
        for (index, place) in places.iter().enumerate().take(4) {
            let mut damaged = whole.clone();
            damaged[place + RECORD_HEADER_BYTES] ^= 1;
            fs::write(&path, &damaged).unwrap();
            let survey = Journal::survey(directory.path(), |_, _| {}).unwrap();
            let kept = Journal::repair(&survey).unwrap();
            assert_eq!(survey.damage.len(), 1);
            assert_eq!(survey.damage[0].start, *place);
            assert_eq!(fs::read(kept).unwrap(), damaged);
            let expected: Vec<u32> = (0..6).filter(|number| *number as usize != index).collect();
            assert_eq!(
                numbers(directory.path()).unwrap(),
                (expected, Recovered { is_new: false, changes: 5, torn_bytes: 0 })
            );
        }
    }

    #[test]
    fn voids_fill_any_gap_to_the_byte() {
        let sizes =
            (RECORD_BYTES_MIN..100).chain(VOID_BYTES_MAX - 20..VOID_BYTES_MAX + 20).chain([3 * VOID_BYTES_MAX + 1]);
        for bytes in sizes {
            let filled = voids(bytes, 7);
            assert_eq!(filled.len(), bytes);
            let mut at = 0;
            while let Some(body) = record_at(&filled, at, 7) {
                assert!(says_nothing(body, Lsn(0)));
                at += RECORD_HEADER_BYTES + body.len();
            }
            assert_eq!(at, bytes);
        }
    }

    #[test]
    fn a_file_whose_header_was_never_written_is_begun_anew() {
        let directory = tempfile::tempdir().unwrap();
        for unbegun in [&b""[..], b"kurirjnl", &[0; HEADER_BYTES]] {
            fs::write(directory.path().join("0000000001.log"), unbegun).unwrap();
            assert!(numbers(directory.path()).unwrap().1.is_new);
        }
    }

    #[test]
    fn after_a_clean_stop_damage_to_the_last_record_is_found_too() {
        let directory = tempfile::tempdir().unwrap();
        let starts = three_batches(directory.path());
        let (journal, _) = Journal::open(directory.path(), |_, _| {}).unwrap();
        journal.close().unwrap();
        let path = directory.path().join("0000000001.log");
        let mut bytes = fs::read(&path).unwrap();
        assert_eq!(numbers(directory.path()).unwrap().0, [0, 1, 2, 3, 4, 5]);
        bytes[usize::try_from(starts[2].0).unwrap() + RECORD_HEADER_BYTES + MARK_BYTES + RECORD_HEADER_BYTES] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(numbers(directory.path()), Err(OpenError::Damaged(..))));
    }

    #[test]
    fn a_file_of_another_kind_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0000000001.log");
        fs::write(&path, b"something else, longer than a header").unwrap();
        assert!(matches!(numbers(directory.path()), Err(OpenError::Foreign(_))));
        assert_eq!(fs::read(&path).unwrap(), b"something else, longer than a header");
    }

    #[test]
    fn a_change_without_room_is_refused_and_the_reserve_is_for_what_makes_smaller() {
        let mut log = Log::new(7, Lsn(20));
        log.set_room(Lsn(20 + RESERVE_BYTES), true);
        assert_eq!(log.append(&change(1), Need::More), Err(DiskFull));
        assert!(!log.has_open_changes());
        assert!(log.append(&change(1), Need::Less).is_ok());
        assert!(log.append(&change(1), Need::Login).is_ok());
        assert!(!log.must_wait(), "on a full disk there is nothing to wait for");
        log.set_room(Lsn(RESERVE_BYTES + 4096), true);
        assert!(log.append(&change(2), Need::More).is_ok());
        log.set_room(Lsn(WAIT_BYTES), false);
        assert!(log.must_wait());
    }

    #[test]
    fn what_is_not_durable_names_the_batch_to_wait_for() {
        let mut log = Log::new(7, Lsn(20));
        assert_eq!(log.unsettled(), None);
        let lsn = log.append(&change(1), Need::More).unwrap();
        assert_eq!(log.unsettled_at(lsn), Some(1));
        let batch = log.take_batch().unwrap();
        assert_eq!(log.unsettled(), Some(1));
        let end = batch.end();
        log.settle(batch, end);
        assert_eq!(log.unsettled_at(lsn), None);
        assert_eq!(log.unsettled(), None);
    }
}
