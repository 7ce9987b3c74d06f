//! A data directory, opened: the state that its journal tells, and the workers that go on writing to it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tracing::{info, warn};

use crate::compaction::Compactor;
use crate::data::{DataDirectory, DataError};
use crate::disk::Directory;
use crate::engine::{Completion, Job};
use crate::files::{FileError, FileStore};
use crate::inbox::{TextsDone, TextsJob};
use crate::journal::Journal;
use crate::local::Workers;
use crate::log::{Batch, Log, Sync};
use crate::password::{HashError, Hasher};
use crate::recovery::{self, Recovered, Start};
use crate::segment::{Access, SegmentStore, VERSION};
use crate::space::{Space, SpaceJob};
use crate::state::State;
use crate::takeover;
use crate::texts::Texts;
use crate::upkeep::Holdings;

/// An opened data directory. Nobody else can open it until this is dropped.
#[derive(Debug)]
pub struct Store {
    /// The directory and its lock.
    pub directory: DataDirectory,
    /// What its journal tells.
    pub state: State,
    /// The loop's side of the journal.
    pub log: Log,
    /// What is on the disk.
    pub holdings: Holdings,
    /// What goes on writing to it.
    pub disk: Disk,
}

/// What writes to a data directory and reads from it.
#[derive(Debug)]
pub struct Disk {
    /// The journal, at its end.
    pub journal: Journal,
    /// Room for it.
    pub space: Space,
    /// Makes checkpoints.
    pub compactor: Compactor,
    /// Reads texts.
    pub texts: Texts,
    /// The stored files.
    pub files: FileStore,
}

/// Why a data directory could not be opened.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum StoreError {
    Data(DataError),
    Io(PathBuf, io::Error),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(error) => error.fmt(f),
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for StoreError {}

impl Store {
    /// Opens the data directory at `root` on this machine's disk, which is made if it is missing, and recovers what it holds. A
    /// new journal gets segments of `segment_bytes`.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn open(root: &Path, segment_bytes: u64, sync: Sync) -> Result<Self, StoreError> {
        let directory = DataDirectory::open(root).map_err(StoreError::Data)?;
        let salt = getrandom::u32().map_err(|error| StoreError::Io(root.to_owned(), io::Error::other(error)))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        Self::open_in(directory, Opening { segment_bytes, sync, salt, now })
    }

    /// The same in a directory that is held already.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn open_in(directory: DataDirectory, opening: Opening) -> Result<Self, StoreError> {
        let started = Instant::now();
        let Opening { segment_bytes, sync, salt, now } = opening;
        let (journal, checkpoints) = (directory.journal(), directory.checkpoints());
        let failed = |directory: &Directory| {
            let path = directory.path().to_owned();
            |error| StoreError::Io(path, error)
        };
        let access = match sync {
            Sync::Always => Access::probe(&journal).map_err(failed(&journal))?,
            Sync::Interval => Access::Seldom,
        };
        let files = FileStore::new(directory.files());
        let start = Start { access, segment_bytes, salt, now };
        let recovered = recovery::recover(&directory, start).map_err(StoreError::Data)?;
        if recovered.state.next_user().0 == 0 && files.has_any().map_err(failed(&directory.files()))? {
            return Err(StoreError::Data(DataError::JournalLost(journal.path().to_owned())));
        }
        let is_listed = |file| recovered.state.file(file).is_some();
        let strays = files.remove_strays(is_listed).map_err(failed(&directory.files()))?;
        let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tell(&directory, &recovered, access, strays, ms);
        let Recovered { layout, state, end, marked, checkpoint, segments, .. } = recovered;
        let (last, count) = (layout.segment(end), segments.len() as u64);
        let store = SegmentStore::new(journal.clone(), layout, access, last, count);
        let space = Space::new(store, checkpoints.clone(), takeover::copy_of(&directory), layout);
        let holdings = Holdings { checkpoint, has_copy: space.done().has_copy };
        let log = Log::open(layout, end, marked, segments);
        let disk = Disk {
            journal: Journal::open(&journal, layout, access, end).map_err(failed(&journal))?,
            space,
            compactor: Compactor::new(journal.clone(), checkpoints),
            texts: Texts::new(journal, layout),
            files,
        };
        Ok(Self { directory, state, log, holdings, disk })
    }
}

/// What a data directory is opened with.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// The size of the segments of a new journal.
    pub segment_bytes: u64,
    /// When changes are durable.
    pub sync: Sync,
    /// The salt of a new journal.
    pub salt: u32,
    /// Milliseconds since 1970, UTC.
    pub now: u64,
}

/// Says in the log what was found.
fn tell(directory: &DataDirectory, recovered: &Recovered, access: Access, strays: usize, ms: u64) {
    let &Recovered { changes, checkpoint, .. } = recovered;
    let root = directory.root().path().display();
    if recovered.is_new {
        info!("data directory {root} made");
    } else {
        let from = checkpoint.map_or(0, |checkpoint| checkpoint.number);
        info!(checkpoint = from, changes, strays, ms, ?access, "data directory {root} recovered");
    }
    if recovered.is_taken_over {
        let copy = takeover::copy_of(directory);
        info!(
            "data directory {root} was of format 3, and is of format {VERSION} now; {} has it as it was",
            copy.path().display()
        );
    }
    if recovered.is_torn {
        let journal = directory.journal();
        warn!("a write that was not finished was cut off at the end of the journal {}", journal.path().display());
    }
}

/// Without a loop.
impl Store {
    /// Makes durable what was appended to the log, and makes room for more.
    ///
    /// # Errors
    /// [`WorkError::Journal`]
    pub fn commit(&mut self) -> Result<(), WorkError> {
        let Disk { journal, space, .. } = &mut self.disk;
        if let Some(batch) = self.log.take_batch()
            && let Completion::Settled { batch, synced } = write(journal, vec![batch], Sync::Always)?
        {
            self.log.settle(batch, synced);
        }
        while self.log.must_wait() {
            let job = SpaceJob { segments_max: u64::MAX, is_more_wanted: true, ..SpaceJob::default() };
            let (done, made) = space.run(&job).map_err(|(path, error)| WorkError::Journal(path, error))?;
            if let Some(segment) = made {
                journal.add(segment);
            }
            self.log.set_room(done.room, done.is_full);
        }
        Ok(())
    }
}

/// The workers of a data directory, all on the caller's thread.
pub struct StoreWorkers {
    /// For what concerns the disk.
    pub disk: Disk,
    /// For password jobs.
    pub hasher: Hasher,
}

/// What ends a server at once: after it nothing can be promised.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum WorkError {
    Journal(PathBuf, io::Error),
    Checkpoint(DataError),
    Files(FileError),
    Password(HashError),
    /// A helper thread ended that should not have; its name.
    Thread(&'static str),
    /// The data directory is not where it was, or another has its name.
    DirectoryGone(PathBuf),
}

impl fmt::Display for WorkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journal(path, error) => write!(f, "the journal could not be written: {}: {error}", path.display()),
            Self::Checkpoint(error) => write!(f, "a checkpoint could not be made: {error}"),
            Self::Files(error) => write!(f, "a file could not be stored: {error}"),
            Self::Password(error) => error.fmt(f),
            Self::Thread(name) => write!(f, "the {name} thread ended in the middle of its work"),
            Self::DirectoryGone(path) => {
                write!(f, "the data directory {} was moved, removed or replaced while the server ran", path.display())
            }
        }
    }
}

impl std::error::Error for WorkError {}

impl Workers for StoreWorkers {
    type Error = WorkError;

    fn run(&mut self, job: Job, mut report: impl FnMut(Completion)) -> Result<(), WorkError> {
        let Disk { journal, space, compactor, texts, files } = &mut self.disk;
        match job {
            Job::Journal(batch) => report(write(journal, vec![batch], Sync::Always)?),
            Job::Password(job) => report(Completion::Password(self.hasher.run(&job).map_err(WorkError::Password)?)),
            Job::File(job) => {
                if let Some(done) = files.run(job).map_err(WorkError::Files)? {
                    report(Completion::File(done));
                }
            }
            Job::Texts(job) => report(read(texts, &job)),
            Job::Space(job) => {
                let (done, made) = space.run(&job).map_err(|(path, error)| WorkError::Journal(path, error))?;
                if let Some(segment) = made {
                    journal.add(segment);
                }
                report(Completion::Space(done));
            }
            Job::Compact(job) => {
                if let Some(compacted) = compactor.run(job).map_err(WorkError::Checkpoint)? {
                    report(Completion::Compacted(compacted));
                }
            }
        }
        Ok(())
    }
}

/// Writes batches together, and makes them as durable as `sync` asks.
///
/// # Errors
/// [`WorkError::Journal`]
pub fn write(journal: &mut Journal, mut batches: Vec<Batch>, sync: Sync) -> Result<Completion, WorkError> {
    let written = journal.write(&mut batches, sync);
    written.map_err(|error| WorkError::Journal(journal.directory().path().to_owned(), error))?;
    let batch = batches.pop().unwrap_or_default();
    Ok(Completion::Settled { batch, synced: journal.synced() })
}

/// Reads texts. That they cannot be read is for the one who asked.
#[must_use]
pub fn read(texts: &mut Texts, job: &TextsJob) -> Completion {
    Completion::Texts(TextsDone { connection: job.connection, records: texts.read(&job.places) })
}
