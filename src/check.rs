//! `kurir check`: what a data directory holds, and whether all of it is whole. It reads and changes nothing, unless it
//! is asked to repair.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::change::FileId;
use crate::data::{self, DataDirectory, DataError};
use crate::files::FileStore;
use crate::journal::{Journal, OpenError, Survey};
use crate::state::State;

/// What a check found.
#[derive(Debug)]
pub struct Report {
    survey: Survey,
    state: State,
    files: Vec<FileProblem>,
    /// Where a repair has put the damaged journal.
    kept: Option<PathBuf>,
}

/// A listed file whose bytes are not there as they should be.
#[derive(Debug)]
struct FileProblem {
    path: PathBuf,
    bytes: u64,
    /// None if the file is missing.
    found: Option<u64>,
}

/// Why a data directory could not be checked.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum CheckError {
    NoData(PathBuf),
    Data(DataError),
    Journal(OpenError),
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoData(root) => write!(f, "there is no data directory at {}", root.display()),
            Self::Data(error) => error.fmt(f),
            Self::Journal(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for CheckError {}

/// Checks the data directory at `root`, which no server may hold meanwhile. `repair` has a damaged journal replaced by one
/// of all that is good in it.
///
/// # Errors
/// [`CheckError`] when it could not be checked; what is wrong with the data is in the [`Report`].
pub fn check(root: &Path, repair: bool) -> Result<Report, CheckError> {
    if !data::exists(root) {
        return Err(CheckError::NoData(root.to_owned()));
    }
    let directory = DataDirectory::open_existing(root).map_err(CheckError::Data)?;
    let mut state = State::default();
    let survey =
        Journal::survey(&directory.journal(), |change, lsn| state.apply(change, lsn)).map_err(CheckError::Journal)?;
    let is_to_repair = repair && !survey.damage.is_empty();
    let kept = if is_to_repair { Some(Journal::repair(&survey).map_err(CheckError::Journal)?) } else { None };
    let store = FileStore::new(directory.files());
    let problem = |(file, bytes): (FileId, u64)| {
        let (path, found) = store.found(file);
        (found != Some(bytes)).then_some(FileProblem { path, bytes, found })
    };
    let mut files: Vec<FileProblem> = state.files().filter_map(problem).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(Report { survey, state, files, kept })
}

impl Report {
    /// True when nothing is wrong that was not repaired.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.files.is_empty() && (self.survey.damage.is_empty() || self.kept.is_some())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { survey, state, files, kept } = self;
        writeln!(f, "{}: {} changes in {} bytes", survey.path.display(), survey.changes, survey.end)?;
        for damage in &survey.damage {
            writeln!(f, "damaged: bytes {} to {}", damage.start, damage.end)?;
        }
        if survey.torn_bytes > 0 {
            let bytes = survey.torn_bytes;
            writeln!(f, "torn: the last {bytes} bytes, of which nobody was told; the next start cuts them off")?;
        }
        if let Some(kept) = kept {
            writeln!(f, "repaired: all that is good is kept; the damaged journal is {}", kept.display())?;
        }
        let messages: usize = state.users().map(|user| user.mailbox.entries().len()).sum();
        let text_bytes: u64 = state.users().map(|user| user.mailbox.bytes()).sum();
        let logins: usize = state.users().map(|user| user.sessions.len()).sum();
        writeln!(f, "{} users with {logins} logins, {} groups", state.users().count(), state.groups().count())?;
        writeln!(f, "{messages} messages waiting, {text_bytes} bytes")?;
        writeln!(f, "{} files, {} bytes", state.files().count(), state.files_bytes())?;
        for FileProblem { path, bytes, found } in files {
            match found {
                None => writeln!(f, "missing: {}, {bytes} bytes", path.display())?,
                Some(found) => writeln!(f, "wrong size: {} has {found} bytes, not {bytes}", path.display())?,
            }
        }
        Ok(())
    }
}
