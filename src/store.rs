//! A data directory, opened: the state that its journal tells, and the workers that go on writing to it.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Instant;

use tracing::{info, warn};

use crate::data::{DataDirectory, DataError};
use crate::engine::{Completion, Job};
use crate::files::{FileError, FileStore};
use crate::journal::{Batch, Journal, OpenError, Sync};
use crate::local::Workers;
use crate::password::{HashError, Hasher};
use crate::state::State;

/// An opened data directory. Nobody else can open it until this is dropped.
#[derive(Debug)]
pub struct Store {
    /// The directory and its lock.
    pub directory: DataDirectory,
    /// What the journal tells.
    pub state: State,
    /// The journal, at its end.
    pub journal: Journal,
    /// The stored files.
    pub files: FileStore,
}

/// Why a data directory could not be opened.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum StoreError {
    Data(DataError),
    Journal(OpenError),
    JournalLost(String),
    Io(String, io::Error),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(error) => error.fmt(f),
            Self::Journal(error) => error.fmt(f),
            Self::JournalLost(path) => {
                write!(f, "there are stored files, and the journal {path} that should list them is empty")
            }
            Self::Io(path, error) => write!(f, "{path}: {error}"),
        }
    }
}

impl std::error::Error for StoreError {}

impl Store {
    /// Opens the data directory at `root`, which is made if it is missing, and recovers what it holds.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let started = Instant::now();
        let directory = DataDirectory::open(root).map_err(StoreError::Data)?;
        let mut state = State::default();
        let (mut journal, recovered) =
            Journal::open(&directory.journal(), |change, lsn| state.apply(change, lsn)).map_err(StoreError::Journal)?;
        state.take_freed_files();
        let failed = |path: &Path| {
            let path = path.display().to_string();
            |error| StoreError::Io(path, error)
        };
        journal.make_room().map_err(failed(journal.path()))?;
        let files = FileStore::new(directory.files());
        if recovered.changes == 0 && files.has_any().map_err(failed(&directory.files()))? {
            return Err(StoreError::JournalLost(journal.path().display().to_string()));
        }
        let strays = files.remove_strays(|file| state.file(file).is_some()).map_err(failed(&directory.files()))?;
        let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        info!(changes = recovered.changes, strays, ms, "data directory {} recovered", root.display());
        if recovered.torn_bytes > 0 {
            let path = journal.path().display();
            warn!(bytes = recovered.torn_bytes, "the unacknowledged end of a write was cut off {path}");
        }
        Ok(Self { directory, state, journal, files })
    }
}

/// The workers of a data directory, all on the caller's thread.
pub struct StoreWorkers {
    /// For batches.
    pub journal: Journal,
    /// For file jobs.
    pub files: FileStore,
    /// For password jobs.
    pub hasher: Hasher,
}

/// What ends a server at once: after it nothing can be promised.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum WorkError {
    Journal(String, io::Error),
    Files(FileError),
    Password(HashError),
    /// A helper thread ended that should not have; its name.
    Thread(&'static str),
}

impl WorkError {
    /// What the disk said of the journal.
    #[must_use]
    pub fn journal(journal: &Journal, error: io::Error) -> Self {
        Self::Journal(journal.path().display().to_string(), error)
    }
}

impl fmt::Display for WorkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journal(path, error) => write!(f, "the journal could not be written: {path}: {error}"),
            Self::Files(error) => write!(f, "a file could not be stored: {error}"),
            Self::Password(error) => error.fmt(f),
            Self::Thread(name) => write!(f, "the {name} thread ended in the middle of its work"),
        }
    }
}

impl std::error::Error for WorkError {}

impl Workers for StoreWorkers {
    type Error = WorkError;

    fn run(&mut self, job: Job, mut report: impl FnMut(Completion)) -> Result<(), WorkError> {
        match job {
            Job::Journal(batch) => {
                for completion in write(&mut self.journal, vec![batch], Sync::Always)? {
                    report(completion);
                }
            }
            Job::Password(job) => report(Completion::Password(self.hasher.run(&job).map_err(WorkError::Password)?)),
            Job::File(job) => {
                if let Some(done) = self.files.run(job).map_err(WorkError::Files)? {
                    report(Completion::File(done));
                }
            }
        }
        Ok(())
    }
}

/// Writes batches together, makes them as durable as `sync` asks, and makes room for the next.
///
/// # Errors
/// [`WorkError::Journal`]
pub fn write(journal: &mut Journal, mut batches: Vec<Batch>, sync: Sync) -> Result<[Completion; 2], WorkError> {
    let written = journal.write(&batches).and_then(|()| match sync {
        Sync::Always => journal.sync(),
        Sync::Interval if journal.is_sync_due() => journal.sync(),
        Sync::Interval => Ok(()),
    });
    written.and_then(|()| journal.make_room()).map_err(|error| WorkError::journal(journal, error))?;
    let last = batches.pop().unwrap_or_default();
    Ok([Completion::Settled { batch: last, synced: journal.synced() }, room(journal)])
}

/// What the loop is to know of the journal's room.
#[must_use]
pub fn room(journal: &Journal) -> Completion {
    Completion::Room { room: journal.room(), is_full: journal.is_full(), synced: journal.synced() }
}
