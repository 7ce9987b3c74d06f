//! `kurir check`: what a data directory holds, and whether all of it is whole. It reads and changes nothing, unless it
//! is asked to repair.
//!
//! A repair makes a state of all that is good, of which every invariant is true, and puts a checkpoint of it behind
//! everything that the journal holds. What was damaged is kept under other names.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::aligned::BLOCK_BYTES;
use crate::change::{Change, FileId, Kept, Lsn, Place, UserId};
use crate::checkpoint::Checkpoint;
use crate::data::{self, DataDirectory, DataError};
use crate::disk::{Directory, DiskRef, Entry, system};
use crate::files::FileStore;
use crate::limits::Limits;
use crate::mailbox::Entry as Message;
use crate::recovery::{self, Start};
use crate::segment::{Access, Layout};
use crate::state::{State, StoredFile};
use crate::survey::{Broken, Damage, Orphans, Survey};
use crate::texts::Texts;

/// Records are read in portions of this many.
const TEXTS_AT_ONCE: usize = 4096;

/// What a check found.
#[derive(Debug)]
pub struct Report {
    root: PathBuf,
    segments: BTreeSet<u64>,
    checkpoint: Option<Checkpoint>,
    changes: u64,
    /// A write that nobody was told of was cut off.
    is_torn: bool,
    state: State,
    damage: Vec<Damage>,
    /// What is lost with it.
    orphans: Orphans,
    /// What does not agree with itself, if anything.
    contradiction: Option<String>,
    lost: Vec<Lost>,
    files: Vec<FileProblem>,
    /// Where a repair has put the damaged files; none if there was none.
    kept: Option<Vec<PathBuf>>,
}

/// A record that is needed and cannot be read.
#[derive(Debug)]
struct Lost {
    what: Needed,
    /// Whose mailbox it is, or what the file is called and who sent it.
    name: String,
    path: PathBuf,
    byte: u64,
}

/// What a record is needed for.
#[derive(Debug)]
enum Needed {
    /// A message that waits.
    Message { user: UserId, id: u64, sent: Lsn },
    /// A small file that is listed.
    File(FileId),
}

impl Lost {
    /// What makes it as if it had never been.
    fn change(&self) -> Change<'_> {
        match self.what {
            Needed::Message { user, sent, .. } => Change::Delivered { user, first: sent, last: sent },
            Needed::File(file) => Change::FileLost { file },
        }
    }
}

/// A listed file whose bytes are not there as they should be.
#[derive(Debug)]
struct FileProblem {
    file: FileId,
    name: Box<str>,
    /// Who sent it; nobody knows of one whose account is gone.
    from: Box<str>,
    path: PathBuf,
    bytes: u64,
    found: FileFound,
}

impl FileProblem {
    /// Where the system does not let it be read, and what it said.
    fn refusal(&self) -> Option<(PathBuf, io::Error)> {
        match &self.found {
            FileFound::Unreadable(error) if error.kind() == ErrorKind::PermissionDenied => {
                Some((self.path.clone(), ErrorKind::PermissionDenied.into()))
            }
            _ => None,
        }
    }
}

#[derive(Debug)]
enum FileFound {
    Missing,
    Size(u64),
    OtherBytes,
    Unreadable(io::Error),
}

/// Why a data directory could not be checked, or repaired.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum CheckError {
    NoData(PathBuf),
    Data(DataError),
    /// This is still wrong after a repair.
    NotRepaired(String),
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoData(root) => write!(f, "there is no data directory at {}", root.display()),
            Self::Data(error) => error.fmt(f),
            Self::NotRepaired(what) => write!(f, "it could not be repaired: {what}; put a backup in its place"),
        }
    }
}

impl std::error::Error for CheckError {}

impl From<DataError> for CheckError {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

/// Checks the data directory at `root`, which no server may hold meanwhile. `repair` has what is damaged replaced by what is
/// good of it.
///
/// # Errors
/// [`CheckError`] when it could not be checked; what is wrong with the data is in the [`Report`].
pub fn check(root: &Path, repair: bool) -> Result<Report, CheckError> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    check_on(system(), root, repair, u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// The same on another disk, at `now` in milliseconds since 1970, UTC.
///
/// # Errors
/// [`CheckError`]
pub fn check_on(disk: DiskRef, root: &Path, repair: bool, now: u64) -> Result<Report, CheckError> {
    let no_data = || CheckError::NoData(root.to_owned());
    if !data::exists_on(&disk, root) {
        return Err(no_data());
    }
    let directory = DataDirectory::look_at_on(disk, root)?;
    if repair {
        for part in [directory.journal(), directory.checkpoints(), directory.files(), directory.incoming()] {
            part.make().map_err(|error| DataError::Io(part.path().to_owned(), error))?;
        }
    }
    let Some(mut survey) = Survey::of(&directory.journal(), &directory.checkpoints())? else {
        let has_files = FileStore::new(directory.files()).has_any().unwrap_or(false);
        let journal = directory.journal().path().to_owned();
        return Err(if has_files { CheckError::Data(DataError::JournalLost(journal)) } else { no_data() });
    };
    let findings = Findings::of(&directory, &survey);
    let is_damaged = !survey.damage.is_empty() || findings.are_any();
    let mut kept = None;
    if repair && is_damaged {
        let (damage, orphans) = (std::mem::take(&mut survey.damage), std::mem::take(&mut survey.orphans));
        kept = Some(put_right(&directory, survey, &damage, &findings, now)?);
        survey = Survey::of(&directory.journal(), &directory.checkpoints())?.ok_or_else(no_data)?;
        let again = Findings::of(&directory, &survey);
        let left = survey.damage.first().map(ToString::to_string);
        if let Some(left) = left.or_else(|| again.first()) {
            return Err(CheckError::NotRepaired(left));
        }
        (survey.damage, survey.orphans) = (damage, orphans);
    }
    let Survey { segments, checkpoint, changes, is_torn, state, damage, orphans, .. } = survey;
    let Findings { contradiction, lost, files } = findings;
    let root = root.to_owned();
    Ok(Report {
        root,
        segments,
        checkpoint,
        changes,
        is_torn,
        state,
        damage,
        orphans,
        contradiction,
        lost,
        files,
        kept,
    })
}

/// What is wrong beside what a survey finds.
struct Findings {
    contradiction: Option<String>,
    lost: Vec<Lost>,
    files: Vec<FileProblem>,
}

impl Findings {
    fn of(directory: &DataDirectory, survey: &Survey) -> Self {
        let store = FileStore::new(directory.files());
        let is_lost = survey.state.next_user().0 == 0 && store.has_any().unwrap_or(false);
        let lost = is_lost.then(|| "there are stored files, and no accounts that could have sent them".to_owned());
        Self {
            contradiction: survey.state.check_invariants().err().or(lost),
            lost: lost_records(survey, &directory.journal()),
            files: file_problems(directory, &survey.state),
        }
    }

    fn are_any(&self) -> bool {
        self.contradiction.is_some() || !self.lost.is_empty() || !self.files.is_empty()
    }

    fn first(&self) -> Option<String> {
        let lost = self.lost.first().map(|lost| format!("{} byte {}", lost.path.display(), lost.byte));
        let file = self.files.first().map(|problem| problem.path.display().to_string());
        self.contradiction.clone().or(lost).or(file)
    }
}

/// Reads every message that waits, and every small file.
fn lost_records(found: &Survey, journal: &Directory) -> Vec<Lost> {
    let state = &found.state;
    let mut needed: Vec<(Place, Needed)> = Vec::new();
    for (user, mailbox) in state.mailboxes() {
        let message = |entry: &Message| {
            let (id, sent) = (entry.id(mailbox.last_id()), entry.sent());
            (entry.place(), Needed::Message { user, id, sent })
        };
        needed.extend(mailbox.entries().iter().map(message));
    }
    needed.extend(state.files().filter_map(|(file, stored)| match stored.kept {
        Kept::Journal(place) => Some((place, Needed::File(file))),
        Kept::Apart { .. } => None,
    }));
    needed.sort_by_key(|(place, _)| *place);
    let mut reader = Texts::new(journal.clone(), found.layout);
    let mut lost = Vec::new();
    let mut needed = needed.into_iter();
    loop {
        let some: Vec<_> = needed.by_ref().take(TEXTS_AT_ONCE).collect();
        if some.is_empty() {
            return lost;
        }
        let places: Vec<Place> = some.iter().map(|(place, _)| *place).collect();
        for ((place, what), record) in some.into_iter().zip(reader.read_each(&places)) {
            if record.is_none() {
                let of = |user| state.user(user).map_or("", |user| &*user.name);
                let name = match what {
                    Needed::Message { user, .. } => Some(of(user).to_owned()),
                    Needed::File(file) => {
                        state.file(file).map(|stored| format!("{} from {}", stored.name, of(stored.from)))
                    }
                };
                let path = journal.join(&Layout::name(found.layout.segment(place.lsn)));
                let byte = found.layout.offset(place.lsn);
                lost.push(Lost { what, name: name.unwrap_or_default(), path, byte });
            }
        }
    }
}

/// Reads every file that has one of its own.
fn file_problems(directory: &DataDirectory, state: &State) -> Vec<FileProblem> {
    let store = FileStore::new(directory.files());
    let problem = |(file, stored): (FileId, &StoredFile)| {
        let Kept::Apart { sum } = stored.kept else { return None };
        let (path, bytes) = (store.place(file), stored.bytes);
        // One of another size need not be read.
        let read = match store.bytes(file) {
            Ok(found) if found != bytes => Ok((found, 0)),
            Ok(_) => store.sum(file),
            Err(error) => Err(error),
        };
        let found = match read {
            Err(error) if error.kind() == ErrorKind::NotFound => FileFound::Missing,
            Err(error) => FileFound::Unreadable(error),
            Ok((found, _)) if found != bytes => FileFound::Size(found),
            Ok((_, found)) if sum.is_some_and(|sum| sum != found) => FileFound::OtherBytes,
            Ok(_) => return None,
        };
        let from = state.user(stored.from).map(|user| user.name.clone()).unwrap_or_default();
        Some(FileProblem { file, name: stored.name.clone(), from, path, bytes, found })
    };
    let mut files: Vec<FileProblem> = state.files().filter_map(problem).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

/// Makes a state of what is good, puts a checkpoint of it behind everything, and makes sure that a server starts from it. Says
/// where what was damaged is kept.
fn put_right(
    directory: &DataDirectory,
    mut survey: Survey,
    damage: &[Damage],
    findings: &Findings,
    now: u64,
) -> Result<Vec<PathBuf>, DataError> {
    let (journal, checkpoints) = (directory.journal(), directory.checkpoints());
    let failed = |directory: &Directory| {
        let path = directory.path().to_owned();
        move |error| DataError::Io(path, error)
    };
    if let Some((path, error)) = findings.files.iter().find_map(FileProblem::refusal) {
        // That it may not be read says nothing of what is in it.
        return Err(DataError::Io(path, error));
    }
    let mut kept = keep_damaged(&survey, damage, findings, &journal, &checkpoints)?;

    let end = survey.end;
    let place = Place { lsn: end, bytes: 0 };
    for lost in &findings.lost {
        survey.state.apply(&lost.change(), place);
    }
    for problem in &findings.files {
        survey.state.apply(&Change::FileLost { file: problem.file }, place);
    }
    // The numbers of what is on the disk have been given, whoever knows of it.
    let store = FileStore::new(directory.files());
    let highest = store.highest().map_err(failed(&directory.files()))?;
    survey.state.skip_files_to(highest);
    // The end of the journal may be lost without a trace, and with it messages that had ids.
    let last = survey.segments.last().map_or(0, |last| last + 1);
    survey.state.skip_ids(survey.layout.start(last).0.saturating_sub(end.0));
    survey.state.skip_no_more_ids();

    // The next start removes stored files that nothing lists, so they are moved away before the checkpoint counts.
    let aside = directory.lost_files();
    let damaged: BTreeSet<FileId> = findings.files.iter().map(|problem| problem.file).collect();
    let is_good = |file| survey.state.file(file).is_some() && !damaged.contains(&file);
    if store.put_aside(&aside, is_good).map_err(failed(&aside))? > 0 {
        kept.push(aside.path().to_owned());
    }

    if survey.version < crate::segment::VERSION {
        crate::takeover::take_over(directory, &mut survey, now)?;
    } else {
        recovery::begin_anew(&checkpoints, &mut survey)?;
    }
    // Not before that counts: a segment that was cut short would look like one whose write was torn.
    mend_segments(&survey, &journal).map_err(failed(&journal))?;
    // The rest is done as a server does it.
    let start = Start { access: Access::Buffered, segment_bytes: Limits::default().segment_bytes, salt: 0, now };
    recovery::recover(directory, start)?;
    Ok(kept)
}

/// Gives every file that is damaged a second name, under which it stays as it is.
fn keep_damaged(
    survey: &Survey,
    damage: &[Damage],
    findings: &Findings,
    journal: &Directory,
    checkpoints: &Directory,
) -> Result<Vec<PathBuf>, DataError> {
    let in_use = damage.iter().map(|damage| &damage.path).chain(findings.lost.iter().map(|lost| &lost.path));
    let mut paths: BTreeSet<PathBuf> = in_use.cloned().collect();
    let is_of = |directory: &Directory| paths.iter().any(|path| path.parent() == Some(directory.path()));
    if (is_of(checkpoints) && !survey.is_whole_journal) || survey.is_checkpoint_missing() {
        // Nobody knows what else was needed of the journal.
        paths.extend(survey.segments.iter().map(|segment| journal.join(&Layout::name(*segment))));
    }
    let mut kept = Vec::new();
    for directory in [journal, checkpoints] {
        let failed = |error| DataError::Io(directory.path().to_owned(), error);
        for Entry { name, .. } in directory.list().map_err(failed)? {
            if paths.contains(&directory.join(&name)) {
                let second = (1..).map(|number| format!("{name}.damaged-{number}")).find(|name| !directory.has(name));
                let second = second.unwrap_or_default();
                directory.link_or_copy_into(&name, directory, &second).map_err(failed)?;
                kept.push(directory.join(&second));
            }
        }
        directory.sync().map_err(failed)?;
    }
    Ok(kept)
}

/// Gives segments their headers and their sizes again, as far as they are there. Which records of them are good has been
/// found out.
fn mend_segments(survey: &Survey, journal: &Directory) -> io::Result<()> {
    for (segment, broken) in &survey.broken {
        if *broken == Broken::Missing {
            continue;
        }
        let name = Layout::name(*segment);
        let whole = BLOCK_BYTES + usize::try_from(survey.layout.segment_bytes).unwrap_or(usize::MAX);
        let mut bytes = journal.read_start(&name, whole)?;
        bytes.resize(whole, 0);
        bytes[..BLOCK_BYTES].copy_from_slice(&survey.layout.header(*segment));
        journal.replace(&name, &bytes)?;
    }
    Ok(())
}

impl Report {
    /// True when nothing is wrong that was not repaired.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let is_whole = self.damage.is_empty() && self.lost.is_empty() && self.files.is_empty();
        self.kept.is_some() || (is_whole && self.contradiction.is_none())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { root, segments, checkpoint, changes, is_torn, state, damage, .. } = self;
        let Self { orphans, contradiction, lost, files, kept, .. } = self;
        let checkpoint = checkpoint.map_or("no checkpoint".to_owned(), |known| format!("checkpoint {}", known.number));
        writeln!(f, "{}: {checkpoint}, {changes} changes behind it, {} segments", root.display(), segments.len())?;
        let word = if kept.is_some() { "dropped" } else { "damaged" };
        for damage in damage {
            writeln!(f, "{word}: {damage}")?;
        }
        for what in &orphans.named {
            writeln!(f, "lost with it: {what}")?;
        }
        if orphans.more > 0 {
            writeln!(f, "lost with it: {} more", orphans.more)?;
        }
        if let Some(contradiction) = contradiction {
            writeln!(f, "{word}: what does not agree with itself: {contradiction}")?;
        }
        for Lost { what, name, path, byte } in lost {
            write!(f, "{word}: {} byte {byte}: ", path.display())?;
            match what {
                Needed::Message { id, .. } => writeln!(f, "message {id} in the mailbox of {name}")?,
                Needed::File(_) => writeln!(f, "the file {name}")?,
            }
        }
        for FileProblem { name, from, path, bytes, found, .. } in files {
            write!(f, "{word}: {}: the file {name} from {from}, {bytes} bytes", path.display())?;
            match found {
                FileFound::Missing => writeln!(f, ", which is missing")?,
                FileFound::Size(found) => writeln!(f, ", which has {found}")?,
                FileFound::OtherBytes => writeln!(f, ", which are not those that were stored")?,
                FileFound::Unreadable(error) => writeln!(f, ": {error}")?,
            }
        }
        if *is_torn {
            writeln!(f, "torn: a write at the end was not finished; the next start cuts it off")?;
        }
        if let Some(kept) = kept {
            writeln!(f, "repaired: all that is good is kept")?;
            for path in kept {
                writeln!(f, "put aside: {}", path.display())?;
            }
        }
        let messages: usize = state.mailboxes().map(|(_, mailbox)| mailbox.entries().len()).sum();
        let message_bytes: u64 = state.mailboxes().map(|(_, mailbox)| mailbox.bytes()).sum();
        let logins: usize = state.users().map(|user| user.sessions.len()).sum();
        writeln!(f, "{} users with {logins} logins, {} groups", state.users().count(), state.groups().count())?;
        writeln!(f, "{messages} messages waiting, {message_bytes} bytes")?;
        writeln!(f, "{} files, {} bytes", state.files().count(), state.files_bytes())?;
        Ok(())
    }
}
