//! `kurir check`: what a data directory holds, and whether all of it is whole. It reads and changes nothing, unless it
//! is asked to repair.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::change::{Change, FileId, Kept, Lsn, Place, UserId};
use crate::checkpoint::{self, Checkpoint, Salvage};
use crate::data::{self, DataDirectory, DataError};
use crate::files::{self, FileStore};
use crate::limits::Limits;
use crate::log::{Need, Sync};
use crate::mailbox::Entry;
use crate::recovery;
use crate::salvage::{self, Damage, Survey};
use crate::segment::{self, Layout};
use crate::snapshot::Item;
use crate::state::{State, StoredFile};
use crate::store::{Store, StoreError, WorkError};
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
    Store(StoreError),
    Work(WorkError),
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoData(root) => write!(f, "there is no data directory at {}", root.display()),
            Self::Data(error) => error.fmt(f),
            Self::Store(error) => error.fmt(f),
            Self::Work(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for CheckError {}

impl From<DataError> for CheckError {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

/// The journal's files as they were found.
struct Found {
    layout: Layout,
    segments: BTreeSet<u64>,
    /// Segments of which more is wrong than a record, and what.
    broken: BTreeMap<u64, &'static str>,
    checkpoint: Option<Checkpoint>,
    /// What is damaged of the checkpoint.
    salvage: Option<Salvage>,
    survey: Survey,
    state: State,
    /// It was read from its beginning.
    is_whole_journal: bool,
}

/// Checks the data directory at `root`, which no server may hold meanwhile. `repair` has what is damaged replaced by what is
/// good of it.
///
/// # Errors
/// [`CheckError`] when it could not be checked; what is wrong with the data is in the [`Report`].
pub fn check(root: &Path, repair: bool) -> Result<Report, CheckError> {
    if !data::exists(root) {
        return Err(CheckError::NoData(root.to_owned()));
    }
    let directory = DataDirectory::look_at(root)?;
    let (journal, checkpoints) = (directory.journal(), directory.checkpoints());
    let found = look(&journal, &checkpoints)?;
    let damage = describe(&found, &journal, &checkpoints)?;
    let lost = lost_records(&found, &journal);
    let files = file_problems(&directory, &found.state);
    let is_torn = recovery::begins_record(&journal, found.layout, found.survey.end)
        .map_err(|error| DataError::Io(journal.clone(), error))?;
    let mut kept = None;
    let mut found = found;
    if repair && !(damage.is_empty() && lost.is_empty() && files.is_empty()) {
        let mut put = put_right(&found, &lost, &journal, &checkpoints)?;
        // What listed them may be among what is dropped, and the next start removes what nothing lists.
        let (store, aside) = (FileStore::new(directory.files()), directory.lost_files());
        let damaged: BTreeSet<FileId> = files.iter().map(|problem| problem.file).collect();
        let is_good = |file| found.state.file(file).is_some() && !damaged.contains(&file);
        let moved = store.put_aside(&aside, is_good);
        if moved.map_err(|error| DataError::Io(aside.clone(), error))? > 0 {
            put.push(aside);
        }
        // The rest is done as a server does it.
        drop(directory);
        let changes = lost.iter().map(Lost::change);
        let of_files = files.iter().map(|problem| Change::FileLost { file: problem.file });
        make_changes(root, &changes.chain(of_files).collect::<Vec<_>>())?;
        found = look(&journal, &checkpoints)?;
        kept = Some(put);
    }
    let Found { segments, checkpoint, survey, state, .. } = found;
    let changes = survey.changes;
    Ok(Report { root: root.to_owned(), segments, checkpoint, changes, is_torn, state, damage, lost, files, kept })
}

fn look(journal: &Path, checkpoints: &Path) -> Result<Found, DataError> {
    let segments = segment::list(journal).map_err(|error| DataError::Io(journal.to_owned(), error))?;
    let other_version = |segment: &u64| Some((*segment, segment::other_version(journal, *segment)?));
    if let Some((segment, version)) = segments.iter().find_map(other_version) {
        return Err(DataError::OtherVersion(Layout::path(journal, segment), version));
    }
    let newest = match checkpoint::list(checkpoints) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        listed => listed.map_err(|error| DataError::Io(checkpoints.to_owned(), error))?.pop_last(),
    };
    let of_checkpoint = match newest {
        None => None,
        Some(number) => Some(match checkpoint::header(checkpoints, number) {
            // It stands in the file once more.
            Err(DataError::Damaged(..)) => {
                checkpoint::salvage(checkpoints, number, |_| {}).map(|salvage| (salvage.layout, salvage.span.lsn))?
            }
            header => header?,
        }),
    };
    let mut layout = of_checkpoint.map(|(layout, _)| layout);
    let mut broken = BTreeMap::new();
    for number in &segments {
        let path = Layout::path(journal, *number);
        match segment::header_of(journal, *number).map_err(|error| DataError::Io(path.clone(), error))? {
            Some(found) if *layout.get_or_insert(found) == found => {}
            Some(_) => return Err(DataError::Foreign(path)),
            None => drop(broken.insert(*number, "the header of a segment")),
        }
    }
    let layout = layout.ok_or_else(|| DataError::Foreign(Layout::path(journal, 1)))?;
    let from = of_checkpoint.map_or(layout.first(), |(_, lsn)| lsn);
    for number in &segments {
        if segment::cut_short(journal, layout, *number).is_some() {
            broken.insert(*number, "a segment that has not its size");
        }
    }
    // Behind a checkpoint at the very end of a segment there need not be another.
    let first = layout.segment(from);
    let is_end = layout.start(first) == from && segments.range(first..).next().is_none();
    let last = segments.last().copied().unwrap_or(first).max(first);
    let missing = (first..=last).filter(|number| !is_end && !segments.contains(number));
    broken.extend(missing.map(|number| (number, "a segment that is missing")));
    let mut state = State::new(layout.segment_bytes);
    let (mut checkpoint, mut salvaged, mut from, mut until) = (None, None, from, None);
    if let Some(number) = newest {
        match checkpoint::read(checkpoints, number, |item| state.restore(item)) {
            Ok((_, read)) => (checkpoint, until) = (Some(read), read.span.until),
            Err(DataError::Damaged(..)) => {
                state = State::new(layout.segment_bytes);
                let salvage = checkpoint::salvage(checkpoints, number, |item| state.restore(item))?;
                until = salvage.span.until;
                // With the whole of the journal nothing of it is needed.
                if broken.is_empty() && (1..=last).all(|number| segments.contains(&number)) {
                    state = State::new(layout.segment_bytes);
                    (from, until) = (layout.first(), Some(until.unwrap_or(salvage.span.lsn)));
                }
                checkpoint = Some(Checkpoint { number, span: salvage.span, bytes: 0 });
                salvaged = Some(salvage);
            }
            Err(error) => return Err(error),
        }
    }
    let until = until.unwrap_or(from);
    let missing = last + 1..layout.segment(Lsn(until.0.saturating_sub(1))) + 1;
    broken.extend(missing.map(|number| (number, "a segment that is missing")));
    let survey = salvage::survey(journal, layout, &segments, from..until, |change, place| state.apply(change, place))?;
    state.take_freed_files();
    let is_whole_journal = from == layout.first();
    Ok(Found { is_whole_journal, layout, segments, broken, checkpoint, salvage: salvaged, survey, state })
}

/// Everything that is damaged in the journal and its checkpoint.
fn describe(found: &Found, journal: &Path, checkpoints: &Path) -> Result<Vec<Damage>, DataError> {
    let mut damage = Vec::new();
    if let (Some(salvage), Some(checkpoint)) = (&found.salvage, &found.checkpoint) {
        let path = checkpoint::path(checkpoints, checkpoint.number);
        damage.extend(salvage.damage.iter().map(|(range, what)| Damage {
            path: path.clone(),
            byte: range.start,
            bytes: range.end - range.start,
            what: what.clone(),
        }));
    }
    for (segment, what) in &found.broken {
        let path = Layout::path(journal, *segment);
        damage.push(Damage { path, byte: 0, bytes: 0, what: (*what).to_owned() });
    }
    for range in &found.survey.damage {
        let described = salvage::describe(journal, found.layout, range);
        damage.extend(described.map_err(|error| DataError::Io(journal.to_owned(), error))?);
    }
    Ok(damage)
}

/// Reads every message that waits, and every small file.
fn lost_records(found: &Found, journal: &Path) -> Vec<Lost> {
    let state = &found.state;
    let mut needed: Vec<(Place, Needed)> = Vec::new();
    for (user, mailbox) in state.mailboxes() {
        let message = |entry: &Entry| {
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
    let mut reader = Texts::new(journal.to_owned(), found.layout);
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
                let path = Layout::path(journal, found.layout.segment(place.lsn));
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
        let found = match files::sum(&path) {
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

/// Replaces damaged files by what is good of them.
fn put_right(found: &Found, lost: &[Lost], journal: &Path, checkpoints: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut kept = salvage::repair(journal, found.layout, &found.survey.damage, found.broken.keys().copied())?;
    // Those that only such records are lost of stay as they are for now, and go when nothing else is in them.
    let with_lost: BTreeSet<&PathBuf> = lost.iter().map(|record| &record.path).collect();
    for path in with_lost.into_iter().filter(|path| path.exists()) {
        if !kept.iter().any(|kept| kept.file_stem() == path.file_name()) {
            kept.push(salvage::keep(path).map_err(|error| DataError::Io(path.clone(), error))?);
        }
    }
    if let (Some(_), Some(Checkpoint { number, span, .. })) = (&found.salvage, found.checkpoint) {
        let path = checkpoint::path(checkpoints, number);
        if found.is_whole_journal {
            kept.push(salvage::keep(&path).map_err(|error| DataError::Io(path.clone(), error))?);
            segment::remove(&path)
                .and_then(|()| data::sync(checkpoints))
                .map_err(|error| DataError::Io(path, error))?;
            return Ok(kept);
        }
        let mut items = Vec::new();
        checkpoint::salvage(checkpoints, number, |item| items.push(encoded(item)))?;
        kept.push(salvage::keep(&path).map_err(|error| DataError::Io(path.clone(), error))?);
        let written = checkpoint::write(
            checkpoints,
            found.layout,
            number,
            span,
            items.iter().filter_map(|item| Item::decode(item)),
        );
        written.map_err(|error| DataError::Io(path, error))?;
    }
    Ok(kept)
}

fn encoded(item: &Item<'_>) -> Vec<u8> {
    let mut encoded = Vec::new();
    item.encode(&mut encoded);
    encoded
}

/// Makes changes as a server does.
fn make_changes(root: &Path, changes: &[Change<'_>]) -> Result<(), CheckError> {
    if changes.is_empty() {
        return Ok(());
    }
    let mut store = Store::open(root, Limits::default().segment_bytes, Sync::Always).map_err(CheckError::Store)?;
    for change in changes {
        if store.log.must_wait() {
            store.commit().map_err(CheckError::Work)?;
        }
        if store.log.append(change, Need::Less).is_err() {
            let full = ErrorKind::StorageFull.into();
            return Err(CheckError::Work(WorkError::Journal(store.directory.journal(), full)));
        }
    }
    store.commit().map_err(CheckError::Work)?;
    let closed = store.disk.journal.close();
    closed.map_err(|error| CheckError::Work(WorkError::Journal(store.directory.journal(), error)))
}

impl Report {
    /// True when nothing is wrong that was not repaired.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.kept.is_some() || (self.damage.is_empty() && self.lost.is_empty() && self.files.is_empty())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { root, segments, checkpoint, changes, is_torn, state, damage, lost, files, kept } = self;
        let checkpoint = checkpoint.map_or("no checkpoint".to_owned(), |known| format!("checkpoint {}", known.number));
        writeln!(f, "{}: {checkpoint}, {changes} changes behind it, {} segments", root.display(), segments.len())?;
        let word = if kept.is_some() { "dropped" } else { "damaged" };
        for damage in damage {
            writeln!(f, "{word}: {damage}")?;
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
