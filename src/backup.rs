//! `kurir backup`: a copy of a data directory as it is at one moment, whether a server runs on it or not.
//!
//! A server that runs keeps everything that is there until the connection ends that asked for it ([`Point`]), so the copy
//! is made by the process that asks, from the files themselves. What never changes any more is linked where the copy is on
//! the same file system: full segments, checkpoints, stored files. A segment that something else links to is never used
//! again for other bytes. The rest of the journal, up to the point, is copied.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::aligned::BLOCK_BYTES;
use crate::change::Lsn;
use crate::checkpoint;
use crate::client::{Client, ClientError};
use crate::data::{self, DataDirectory, DataError};
use crate::limits::Limits;
use crate::log::Sync;
use crate::segment::{self, Layout, Stream};
use crate::store::{Store, StoreError};

/// What a backup copies of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// The journal up to here, which is on the disk.
    pub end: Lsn,
    /// The checkpoint, if there is one.
    pub checkpoint: Option<u64>,
    /// The segments in use.
    pub segments: Vec<u64>,
}

impl Point {
    /// As the server tells it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({ "end": self.end.0, "checkpoint": self.checkpoint, "segments": self.segments })
    }

    /// As [`Self::to_json`] gave it.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        let segments = value["segments"].as_array()?.iter().map(Value::as_u64).collect::<Option<_>>()?;
        let checkpoint = &value["checkpoint"];
        let checkpoint = if checkpoint.is_null() { None } else { Some(checkpoint.as_u64()?) };
        Some(Self { end: Lsn(value["end"].as_u64()?), checkpoint, segments })
    }
}

/// What was copied.
#[derive(Debug, Default)]
pub struct Copied {
    /// Files that the copy has in common with the original.
    pub linked: u64,
    /// Files of its own.
    pub copied: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl fmt::Display for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} files linked, {} copied ({} bytes)", self.linked, self.copied, self.bytes)
    }
}

/// Why there is no backup.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum BackupError {
    NoData(PathBuf),
    /// There is something where it should go.
    Exists(PathBuf),
    /// There is no directory to put it into.
    NoParent(PathBuf),
    /// It would be a part of what it copies.
    Inside(PathBuf),
    /// There is what an earlier one left.
    Unfinished(PathBuf),
    Store(StoreError),
    Data(DataError),
    Server(ClientError),
    Io(PathBuf, io::Error),
}

impl fmt::Display for BackupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoData(root) => write!(f, "there is no data directory at {}", root.display()),
            Self::Exists(to) => write!(f, "{} is there already", to.display()),
            Self::NoParent(parent) => write!(f, "there is no directory {} to put it into", parent.display()),
            Self::Inside(root) => write!(f, "a copy may not go into the data directory {} itself", root.display()),
            Self::Unfinished(path) => {
                write!(f, "{} is left of a backup that was not finished; remove it first", path.display())
            }
            Self::Store(error) => error.fmt(f),
            Self::Data(error) => error.fmt(f),
            Self::Server(error) => write!(f, "the server did not see the backup through: {error}; make it again"),
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for BackupError {}

/// Copies the data directory at `root` to `to`, which must not be there.
///
/// # Errors
/// [`BackupError`]; there is nothing at `to` then.
pub fn backup(root: &Path, to: &Path) -> Result<Copied, BackupError> {
    if fs::symlink_metadata(to).is_ok() {
        return Err(BackupError::Exists(to.to_owned()));
    }
    // A disk that is not mounted, or a slip of the pen, must not put it elsewhere.
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = parent.canonicalize().map_err(|_| BackupError::NoParent(parent.to_owned()))?;
    if root.canonicalize().is_ok_and(|root| parent.starts_with(root)) {
        return Err(BackupError::Inside(root.to_owned()));
    }
    let path = data::admin_socket(root);
    match UnixStream::connect(&path) {
        Ok(stream) => {
            let mut server = Client::new(stream);
            let reply = server.request("BACKUP").map_err(BackupError::Server)?;
            let point = Point::from_json(&reply["data"]).ok_or(BackupError::Server(ClientError::NotAReply))?;
            let copy = Copy::make(root, to, &point)?;
            // As long as it answers, it has kept everything.
            match server.request("PING") {
                Ok(_) => copy.finish(to),
                Err(error) => {
                    copy.remove();
                    Err(BackupError::Server(error))
                }
            }
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            if !data::exists(root) {
                return Err(BackupError::NoData(root.to_owned()));
            }
            let segment_bytes = Limits::default().segment_bytes;
            let store = Store::open(root, segment_bytes, Sync::Always).map_err(BackupError::Store)?;
            let checkpoint = store.holdings.checkpoint.map(|checkpoint| checkpoint.number);
            let segments = store.holdings.segments.iter().copied().collect();
            Copy::make(root, to, &Point { end: store.log.end(), checkpoint, segments })?.finish(to)
        }
        Err(error) => Err(BackupError::Io(path, error)),
    }
}

/// A copy that is being made, beside where it goes.
struct Copy {
    place: PathBuf,
    done: Copied,
}

impl Copy {
    fn make(root: &Path, to: &Path, point: &Point) -> Result<Self, BackupError> {
        let place = to.with_added_extension("unfinished");
        if fs::symlink_metadata(&place).is_ok() {
            return Err(BackupError::Unfinished(place));
        }
        let mut copy = Self { place, done: Copied::default() };
        match copy.fill(root, point) {
            Ok(()) => Ok(copy),
            Err(error) => {
                copy.remove();
                Err(error)
            }
        }
    }

    /// Leaves nothing behind.
    fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.place) {
            tracing::warn!(%error, "{} could not be removed", self.place.display());
        }
    }

    fn fill(&mut self, root: &Path, point: &Point) -> Result<(), BackupError> {
        // Its directories, and the file that its lock is on.
        let target = DataDirectory::open(&self.place).map_err(BackupError::Data)?;
        let (journal, checkpoints) = (data::journal(root), data::checkpoints(root));
        if let Some(number) = point.checkpoint {
            self.link(&checkpoint::path(&checkpoints, number), &checkpoint::path(&target.checkpoints(), number))?;
        }
        for segment in &point.segments {
            let (from, into) = (Layout::path(&journal, *segment), Layout::path(&target.journal(), *segment));
            let layout =
                segment::header_of(&journal, *segment).map_err(|error| BackupError::Io(from.clone(), error))?;
            let layout = layout.ok_or_else(|| BackupError::Data(DataError::Foreign(from.clone())))?;
            if layout.start(segment + 1) <= point.end {
                self.link(&from, &into)?;
            } else if layout.start(*segment) <= point.end {
                let copied = copy_up_to(&journal, layout, *segment, point.end, &into);
                self.count(copied.map_err(|error| BackupError::Io(into, error))?);
            }
        }
        for directory in list(&data::files(root))? {
            let name = directory.file_name().unwrap_or_default();
            if name == "incoming" || !directory.is_dir() {
                continue;
            }
            let into = target.files().join(name);
            DirBuilder::new().mode(0o700).create(&into).map_err(|error| BackupError::Io(into.clone(), error))?;
            for file in list(&directory)? {
                match self.link(&file, &into.join(file.file_name().unwrap_or_default())) {
                    // What was stored and refused after all goes at any time; nobody lists it.
                    Err(BackupError::Io(_, error)) if error.kind() == ErrorKind::NotFound => {}
                    linked => linked?,
                }
            }
            data::sync(&into).map_err(|error| BackupError::Io(into.clone(), error))?;
        }
        for directory in [target.journal(), target.checkpoints(), target.files(), self.place.clone()] {
            data::sync(&directory).map_err(|error| BackupError::Io(directory.clone(), error))?;
        }
        Ok(())
    }

    /// Links a file that never changes, or copies it where that cannot be.
    fn link(&mut self, from: &Path, into: &Path) -> Result<(), BackupError> {
        match fs::hard_link(from, into) {
            Ok(()) => self.done.linked += 1,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound) => {
                return Err(BackupError::Io(from.to_owned(), error));
            }
            Err(_) => {
                let copied = File::open(from).and_then(|file| write(file, into));
                self.count(copied.map_err(|error| BackupError::Io(into.to_owned(), error))?);
            }
        }
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.done.copied += 1;
        self.done.bytes += bytes;
    }

    /// Gives the copy its name.
    fn finish(self, to: &Path) -> Result<Copied, BackupError> {
        let failed = |error| BackupError::Io(to.to_owned(), error);
        fs::rename(&self.place, to).map_err(failed)?;
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        data::sync(parent).map_err(failed)?;
        Ok(self.done)
    }
}

/// Copies a segment up to a position, with zeros behind it.
fn copy_up_to(journal: &Path, layout: Layout, segment: u64, end: Lsn, into: &Path) -> io::Result<u64> {
    let header = layout.header(segment);
    let start = layout.start(segment);
    let zeros = layout.start(segment + 1).0 - end.0;
    let rest = Stream::new(journal, layout, start, end).chain(io::repeat(0).take(zeros));
    let bytes = write(header.as_slice().chain(rest), into)?;
    // A file that ends before its time is seen here and not by the next start.
    if bytes == BLOCK_BYTES as u64 + layout.segment_bytes { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

fn write(mut from: impl Read, into: &Path) -> io::Result<u64> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(into)?;
    let bytes = io::copy(&mut from, &mut file)?;
    file.flush()?;
    file.sync_all()?;
    Ok(bytes)
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, BackupError> {
    let entries = fs::read_dir(directory).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    entries.map_err(|error| BackupError::Io(directory.to_owned(), error))
}
