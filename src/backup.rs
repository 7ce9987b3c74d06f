//! `kurir backup`: a copy of a data directory as it is at one moment, whether a server runs on it or not.
//!
//! A server that runs keeps everything that is there until the connection ends that asked for it ([`Point`]), so the copy
//! is made by the process that asks, from the files themselves. What never changes any more is linked where the copy is on
//! the same file system: full segments, checkpoints, stored files. A segment that something else links to is never used
//! again for other bytes. The rest of the journal, up to the point, is copied.
//!
//! A copy counts when it has been read: the checkpoint, the journal up to the point, and that every record and file that is
//! needed is there.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::aligned::BLOCK_BYTES;
use crate::change::{Kept, Lsn};
use crate::checkpoint;
use crate::client::{Client, ClientError};
use crate::data::{self, DataDirectory, DataError};
use crate::disk::{Directory, DiskRef, Entry, Mode, system};
use crate::files::FileStore;
use crate::limits::Limits;
use crate::log::Sync;
use crate::segment::{self, Layout, Stream};
use crate::store::{Store, StoreError};
use crate::survey::Survey;

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
    /// This is not as it should be in the copy.
    NotWhole(String),
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
            Self::Server(error) => write!(
                f,
                "the server did not see the backup through: {error}; make it again, or if the server's disk is full, stop it first"
            ),
            Self::NotWhole(what) => write!(
                f,
                "the copy is not whole, and was removed: {what}; `kurir check` of a stopped server's directory tells more"
            ),
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
    if std::fs::symlink_metadata(to).is_ok() {
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
            let copy = Copy::make(&system(), root, to, &point)?;
            // As long as it answers, it has kept everything.
            match server.request("PING") {
                Ok(_) => copy.finish(),
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
            let segments = store.log.segments().iter().copied().collect();
            Copy::make(&system(), root, to, &Point { end: store.log.end(), checkpoint, segments })?.finish()
        }
        Err(error) => Err(BackupError::Io(path, error)),
    }
}

/// A copy that is being made, beside where it goes.
pub struct Copy {
    /// What it is of.
    from: Directory,
    /// Where it is, until it is whole.
    unfinished: Directory,
    to: Directory,
    done: Copied,
}

impl Copy {
    /// Makes a copy of what a data directory had at `point`, which must stay as it is meanwhile.
    ///
    /// # Errors
    /// [`BackupError`]; there is nothing left of it then.
    pub fn make(disk: &DiskRef, root: &Path, to: &Path, point: &Point) -> Result<Self, BackupError> {
        let directory = |path: PathBuf| Directory::new(DiskRef::clone(disk), path);
        let unfinished = directory(to.with_added_extension("unfinished"));
        if unfinished.disk().status(unfinished.path()).is_ok() {
            return Err(BackupError::Unfinished(unfinished.path().to_owned()));
        }
        let (from, to) = (directory(root.to_owned()), directory(to.to_owned()));
        let mut copy = Self { from, unfinished, to, done: Copied::default() };
        match copy.fill(point).and_then(|()| copy.verify(point)) {
            Ok(()) => Ok(copy),
            Err(error) => {
                copy.remove();
                Err(error)
            }
        }
    }

    /// Leaves nothing behind.
    pub fn remove(&self) {
        if let Err(error) = self.unfinished.remove_all() {
            tracing::warn!(%error, "{} could not be removed", self.unfinished.path().display());
        }
    }

    fn fill(&mut self, point: &Point) -> Result<(), BackupError> {
        // Its directories, and the file that its lock is on.
        let disk = DiskRef::clone(self.unfinished.disk());
        let target = DataDirectory::open_on(disk, self.unfinished.path()).map_err(BackupError::Data)?;
        if let Some(number) = point.checkpoint {
            self.link(&self.from.child("checkpoint"), &target.checkpoints(), &checkpoint::name(number))?;
        }
        for segment in &point.segments {
            self.take_segment(*segment, point.end, &target.journal())?;
        }
        let files = self.from.child("files");
        for Entry { name, is_directory } in list(&files)? {
            if name == "incoming" || !is_directory {
                continue;
            }
            let (from, into) = (files.child(&name), target.files().child(&name));
            into.make().map_err(|error| BackupError::Io(into.path().to_owned(), error))?;
            for file in list(&from)?.into_iter().filter(|entry| !entry.is_directory) {
                match self.link(&from, &into, &file.name) {
                    // What was stored and refused after all goes at any time; nobody lists it.
                    Err(BackupError::Io(_, error)) if error.kind() == ErrorKind::NotFound => {}
                    linked => linked?,
                }
            }
            into.sync().map_err(|error| BackupError::Io(into.path().to_owned(), error))?;
        }
        for directory in [target.journal(), target.checkpoints(), target.files(), self.unfinished.clone()] {
            directory.sync().map_err(|error| BackupError::Io(directory.path().to_owned(), error))?;
        }
        Ok(())
    }

    fn take_segment(&mut self, segment: u64, end: Lsn, into: &Directory) -> Result<(), BackupError> {
        let (journal, name) = (self.from.child("journal"), Layout::name(segment));
        let failed = |error| BackupError::Io(journal.join(&name), error);
        let header = segment::header_of(&journal, segment).map_err(failed)?;
        let header = header.ok_or_else(|| BackupError::Data(DataError::Foreign(journal.join(&name))))?;
        let layout = header.layout;
        if layout.start(segment + 1) <= end {
            self.link(&journal, into, &name)?;
            // With `--sync interval` it may not be on the disk yet.
            return into.open(&name, Mode::Read).and_then(|file| file.sync_all()).map_err(failed);
        }
        if layout.start(segment) <= end {
            let copied = copy_up_to(&journal, layout, segment, end, into);
            self.count(copied.map_err(|error| BackupError::Io(into.join(&name), error))?);
        }
        Ok(())
    }

    /// Links a file that never changes, or copies it where that cannot be.
    fn link(&mut self, from: &Directory, into: &Directory, name: &str) -> Result<(), BackupError> {
        match from.link_or_copy_into(name, into, name) {
            Ok(None) => self.done.linked += 1,
            Ok(Some(bytes)) => self.count(bytes),
            Err(error) => return Err(BackupError::Io(from.join(name), error)),
        }
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.done.copied += 1;
        self.done.bytes += bytes;
    }

    /// Reads the copy as a start would, and looks whether all is there that it needs.
    fn verify(&self, point: &Point) -> Result<(), BackupError> {
        let (journal, checkpoints) = (self.unfinished.child("journal"), self.unfinished.child("checkpoint"));
        let not_whole = |what: String| Err(BackupError::NotWhole(what));
        let survey = Survey::of(&journal, &checkpoints).map_err(BackupError::Data)?;
        let Some(survey) = survey else { return not_whole("there is nothing in it".to_owned()) };
        if let Some(damage) = survey.damage.first() {
            return not_whole(damage.to_string());
        }
        if survey.end < point.end {
            return not_whole(format!("the journal ends at {} and not at {}", survey.end, point.end));
        }
        let usage = survey.state.usage();
        let missing = usage.needed_segments().find(|segment| !survey.segments.contains(segment));
        if let Some(missing) = missing {
            return not_whole(format!("{} is missing", journal.join(&Layout::name(missing)).display()));
        }
        let store = FileStore::new(self.unfinished.child("files"));
        let apart = survey.state.files().filter(|(_, stored)| matches!(stored.kept, Kept::Apart { .. }));
        for (file, stored) in apart {
            if !store.bytes(file).is_ok_and(|bytes| bytes == stored.bytes) {
                return not_whole(format!("{} is missing, or not as long as it was", store.place(file).display()));
            }
        }
        Ok(())
    }

    /// Gives the copy its name.
    ///
    /// # Errors
    /// [`BackupError::Io`]
    pub fn finish(self) -> Result<Copied, BackupError> {
        let failed = |error| BackupError::Io(self.to.path().to_owned(), error);
        self.to.disk().rename(self.unfinished.path(), self.to.path()).map_err(failed)?;
        self.to.parent().map_or(Ok(()), |parent| parent.sync()).map_err(failed)?;
        Ok(self.done)
    }
}

/// Copies a segment up to a position, with zeros behind it.
fn copy_up_to(journal: &Directory, layout: Layout, segment: u64, end: Lsn, into: &Directory) -> io::Result<u64> {
    let header = layout.header(segment);
    let start = layout.start(segment);
    let zeros = layout.start(segment + 1).0 - end.0;
    let rest = Stream::new(journal, layout, start, end).chain(io::repeat(0).take(zeros));
    let bytes = into.write_new(&Layout::name(segment), header.as_slice().chain(rest))?;
    // A file that ends before its time is seen here and not by the next start.
    if bytes == BLOCK_BYTES as u64 + layout.segment_bytes { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

fn list(directory: &Directory) -> Result<Vec<Entry>, BackupError> {
    directory.list().map_err(|error| BackupError::Io(directory.path().to_owned(), error))
}
