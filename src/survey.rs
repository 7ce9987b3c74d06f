//! What a data directory holds: the newest checkpoint, and the journal behind it up to its end, damaged or not.
//!
//! A start and `kurir check` read with this, so that what one calls whole the other does not refuse. Nothing is changed.
//!
//! Records are read up to the first that is not whole. If a later mark says that this place had been synced, it is damage,
//! and what is good behind it is read on; if none does, it is the torn end of a write that nobody was told of.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tracing::info;

use crate::change::{Change, Lsn, Place, Target};
use crate::checkpoint::{self, Checkpoint, Reading};
use crate::data::DataError;
use crate::disk::Directory;
use crate::record::{self, BODY_BYTES_MAX, HEADER_BYTES, RECORD_BYTES_MIN, Records};
use crate::segment::{self, Layout, Stream, VERSION, VERSION_MIN};
use crate::snapshot::Item;
use crate::state::{Skipped, State};

/// A start that takes longer says how far it is, this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// The clock is looked at once in so many records.
const RECORDS_PER_LOOK: u64 = 16 * 1024;
const SCAN_BYTES: usize = 1024 * 1024;
/// Searched at once for a record that is whole; as much again must be behind it, so that any record is.
const SEARCH_BYTES: usize = BODY_BYTES_MAX + HEADER_BYTES;
/// And at first so much.
const SEARCH_BYTES_MIN: usize = 64 * 1024;

/// What a data directory holds, and what is wrong with it.
#[derive(Debug)]
pub struct Survey {
    /// How the journal lies on the disk.
    pub layout: Layout,
    /// The format of what it is read from.
    pub version: u32,
    /// What it tells.
    pub state: State,
    /// Where the good records end.
    pub end: Lsn,
    /// Marks say that all before this had been synced.
    pub synced: Lsn,
    /// From where it was read.
    pub checkpoint: Option<Checkpoint>,
    /// All checkpoints, by their names.
    pub checkpoints: BTreeSet<u64>,
    /// All segments, by their names.
    pub segments: BTreeSet<u64>,
    /// Segments of which more is wrong than records.
    pub broken: BTreeMap<u64, Broken>,
    /// How many changes were read behind the checkpoint.
    pub changes: u64,
    /// A write at the end had not been finished.
    pub is_torn: bool,
    /// A damaged checkpoint was not needed: the journal goes back to its beginning, and is whole.
    pub is_whole_journal: bool,
    /// Everything that had been synced and cannot be read, the worst first. Numbers that may have been given with it are left
    /// out of what comes next in the state.
    pub damage: Vec<Damage>,
    /// What could be read and is lost all the same, since it belonged to something that is damaged.
    pub orphans: Orphans,
}

/// Things that belonged to what is lost, as a person may want to know them.
#[derive(Debug, Default)]
pub struct Orphans {
    /// The first of them.
    pub named: Vec<String>,
    /// How many more there are.
    pub more: u64,
}

impl Orphans {
    fn add(&mut self, what: impl FnOnce() -> String) {
        const NAMED_MAX: usize = 10_000;
        if self.named.len() < NAMED_MAX {
            self.named.push(what());
        } else {
            self.more += 1;
        }
    }
}

/// What is wrong with a segment as a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Its header.
    Header,
    /// It has so many bytes.
    Size(u64),
    /// It is not there.
    Missing,
    /// There is no checkpoint, and the journal does not go back to its beginning.
    NoCheckpoint,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "the header of a segment",
            Self::Size(_) => "a segment that has not its size",
            Self::Missing => "a segment that is missing",
            Self::NoCheckpoint => "the checkpoint, which is missing: put it back, or a backup, before anything else",
        })
    }
}

/// Something that had been synced and cannot be read.
#[derive(Clone, Debug)]
pub struct Damage {
    /// In which file.
    pub path: PathBuf,
    /// From where.
    pub byte: u64,
    /// How much.
    pub bytes: u64,
    /// What it may have been.
    pub what: String,
    /// The file as a whole is meant.
    pub broken: Option<Broken>,
}

impl Damage {
    /// Why a server does not start from it.
    #[must_use]
    pub fn into_error(self) -> DataError {
        match self.broken {
            Some(Broken::Missing) => DataError::Missing(self.path),
            Some(Broken::NoCheckpoint) => DataError::NoCheckpoint(self.path),
            Some(Broken::Header) => DataError::Foreign(self.path),
            Some(Broken::Size(bytes)) => DataError::Damaged(self.path, bytes),
            None => DataError::Damaged(self.path, self.byte),
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, byte, bytes, what, broken } = self;
        match broken {
            Some(_) => write!(f, "{}: {what}", path.display()),
            None => write!(f, "{} byte {byte}, {bytes} bytes: {what}", path.display()),
        }
    }
}

impl Survey {
    /// Reads a data directory; none where there is nothing at all.
    ///
    /// # Errors
    /// [`DataError`], but not for damage.
    pub fn of(journal: &Directory, checkpoints: &Directory) -> Result<Option<Self>, DataError> {
        let listed = |directory: &Directory, list: fn(&Directory) -> io::Result<BTreeSet<u64>>| match list(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
            numbers => numbers.map_err(|error| DataError::Io(directory.path().to_owned(), error)),
        };
        let (segments, of_checkpoints) = (listed(journal, segment::list)?, listed(checkpoints, checkpoint::list)?);
        let Some(headers) = Headers::read(journal, &segments)? else {
            let Some(newest) = of_checkpoints.last() else {
                let first = segments.first().map(|first| journal.join(&Layout::name(*first)));
                return first.map_or(Ok(None), |path| Err(DataError::Hopeless(path)));
            };
            // Its header may tell the layout; without it, nothing does.
            let layout = match checkpoint::read(checkpoints, *newest, None, &mut |_| {}) {
                Err(DataError::Foreign(_)) => return Err(DataError::Hopeless(journal.path().to_owned())),
                read => read?.layout,
            };
            let broken = segments.iter().map(|segment| (*segment, Broken::Header)).collect();
            let headers = Headers { layout, version: VERSION, broken };
            return Self::read(journal, checkpoints, segments, of_checkpoints, headers).map(Some);
        };
        Self::read(journal, checkpoints, segments, of_checkpoints, headers).map(Some)
    }

    fn read(
        journal: &Directory,
        checkpoints: &Directory,
        segments: BTreeSet<u64>,
        of_checkpoints: BTreeSet<u64>,
        headers: Headers,
    ) -> Result<Self, DataError> {
        let Headers { layout, version, mut broken } = headers;
        let mut state = State::new(layout.segment_bytes);
        let mut orphans = Orphans::default();
        let reading = match of_checkpoints.last() {
            Some(newest) => Some(read_checkpoint(checkpoints, *newest, layout, &mut state, &mut orphans)?),
            None => None,
        };
        if let Some(reading) = reading.as_ref().filter(|reading| reading.layout != layout) {
            return Err(DataError::Foreign(checkpoints.join(&checkpoint::name(reading.checkpoint.number))));
        }
        let source = Source { journal, layout, segments: &segments };
        let plan = Plan::new(&source, reading.as_ref());
        broken.extend(source.missing(&plan).into_iter().map(|number| (number, Broken::Missing)));
        let is_damaged = reading.as_ref().is_some_and(|reading| !reading.damage.is_empty());
        let whole = if is_damaged { source.read_whole(&plan, &broken)? } else { None };
        let alone = if is_damaged && whole.is_none() { Some(source.read_alone(&plan)?) } else { None };
        let is_whole_journal = whole.is_some();
        let (state, read) = match whole {
            Some(whole) => {
                orphans = Orphans::default();
                whole
            }
            None => {
                let mut skipped = Skipped::default();
                if reading.as_ref().is_some_and(|reading| reading.are_counters_lost) {
                    skipped = Skipped::WITHOUT_COUNTERS;
                }
                if is_damaged {
                    state.skip_ids(source.bytes_behind(plan.from));
                }
                // A segment that was cut short may have lost the marks that would show how much is missing.
                let mut in_reach = broken.range(layout.segment(plan.from)..);
                let is_cut_short = in_reach.any(|(_, broken)| *broken != Broken::Header);
                let mut read = source.read_onto(&mut state, &plan, skipped, (is_damaged, is_cut_short))?;
                read.orphans.named.splice(..0, orphans.named);
                read.orphans.more += orphans.more;
                let (state, mut read) = match alone {
                    Some((alone, read)) if has_more(&alone, &state) => (alone, read),
                    _ => (state, read),
                };
                orphans = std::mem::take(&mut read.orphans);
                (state, read)
            }
        };
        // What waits in older segments, or is kept in them.
        let needed = state.usage().needed_segments().filter(|segment| !segments.contains(segment));
        broken.extend(needed.map(|segment| (segment, Broken::Missing)));
        let is_torn = begins_record(journal, layout, read.end)
            .map_err(|error| DataError::Io(journal.path().to_owned(), error))?;
        // Without a checkpoint that tells, the newest segment does: what is older is left as it was by a take-over.
        let version = reading.as_ref().and_then(|reading| reading.version).unwrap_or(version);
        let mut survey = Self {
            layout,
            version,
            state,
            end: read.end,
            synced: read.synced,
            checkpoint: reading.as_ref().map(|reading| reading.checkpoint),
            checkpoints: of_checkpoints,
            segments,
            broken,
            changes: read.changes,
            is_torn,
            is_whole_journal,
            damage: Vec::new(),
            orphans,
        };
        survey.describe(journal, checkpoints, reading.as_ref(), &read.damage)?;
        Ok(survey)
    }

    /// Says of everything that is damaged what it may have been.
    fn describe(
        &mut self,
        journal: &Directory,
        checkpoints: &Directory,
        reading: Option<&Reading>,
        in_journal: &[Range<Lsn>],
    ) -> Result<(), DataError> {
        if self.is_checkpoint_missing() {
            let (path, broken) = (checkpoints.path().to_owned(), Broken::NoCheckpoint);
            self.damage.push(Damage { path, byte: 0, bytes: 0, what: broken.to_string(), broken: Some(broken) });
        }
        for (segment, broken) in &self.broken {
            let (path, broken) = (journal.join(&Layout::name(*segment)), *broken);
            self.damage.push(Damage { path, byte: 0, bytes: 0, what: broken.to_string(), broken: Some(broken) });
        }
        if let Some(reading) = reading {
            let path = checkpoints.join(&checkpoint::name(reading.checkpoint.number));
            self.damage.extend(reading.damage.iter().map(|(range, what)| Damage {
                path: path.clone(),
                byte: range.start,
                bytes: range.end - range.start,
                what: what.clone(),
                broken: None,
            }));
        }
        for range in in_journal {
            let described = describe(journal, self.layout, range);
            self.damage.extend(described.map_err(|error| DataError::Io(journal.path().to_owned(), error))?);
        }
        Ok(())
    }

    /// There is no checkpoint, and the journal does not go back to its beginning.
    #[must_use]
    pub fn is_checkpoint_missing(&self) -> bool {
        self.checkpoint.is_none() && !self.segments.contains(&1)
    }
}

/// What the headers of the segments say.
struct Headers {
    layout: Layout,
    version: u32,
    broken: BTreeMap<u64, Broken>,
}

impl Headers {
    /// None when none of them can be read.
    fn read(journal: &Directory, segments: &BTreeSet<u64>) -> Result<Option<Self>, DataError> {
        let mut headers: Option<Self> = None;
        let mut broken = BTreeMap::new();
        for number in segments {
            let path = || journal.join(&Layout::name(*number));
            let failed = |error| DataError::Io(path(), error);
            let Some(found) = segment::header_of(journal, *number).map_err(failed)? else {
                broken.insert(*number, Broken::Header);
                continue;
            };
            if !(VERSION_MIN..=VERSION).contains(&found.version) {
                return Err(DataError::OtherVersion(path(), found.version));
            }
            let known =
                headers.get_or_insert(Self { layout: found.layout, version: found.version, broken: BTreeMap::new() });
            known.version = known.version.max(found.version);
            if known.layout != found.layout {
                return Err(DataError::Foreign(path()));
            }
            // It had all its bytes before it had its name.
            if let Some(bytes) = segment::cut_short(journal, found.layout, *number).map_err(failed)? {
                broken.insert(*number, Broken::Size(bytes));
            }
        }
        // What is not one and stands apart from the others was put there by somebody else.
        let last_good = segments.iter().rev().find(|number| !broken.contains_key(number)).copied().unwrap_or(0);
        if let Some((far, _)) = broken.range(last_good + 2..).next().filter(|_| headers.is_some()) {
            return Err(DataError::Foreign(journal.join(&Layout::name(*far))));
        }
        Ok(headers.map(|headers| Self { broken, ..headers }))
    }
}

/// What is to be read of a journal.
struct Plan {
    from: Lsn,
    /// It had been synced up to here at least.
    known_end: Lsn,
}

impl Plan {
    fn new(source: &Source<'_>, reading: Option<&Reading>) -> Self {
        let &Source { layout, segments, .. } = source;
        let Some(reading) = reading else {
            return Self { from: layout.first(), known_end: Lsn(0) };
        };
        let span = reading.checkpoint.span;
        if span.lsn > Lsn(0) {
            return Self { from: span.lsn, known_end: span.until.unwrap_or(span.lsn) };
        }
        // Its position is lost. Of the segments that stand in a row with the last, all are read: mailboxes know which messages
        // they have had, and other changes may be made once more.
        let last = segments.last().copied().unwrap_or(0);
        let run = segments.iter().rev().zip(0..).take_while(|(number, back)| *number + back == last);
        let first = run.last().map_or(1, |(number, _)| *number);
        Self { from: layout.start(first), known_end: Lsn(0) }
    }
}

/// A journal on the disk.
struct Source<'s> {
    journal: &'s Directory,
    layout: Layout,
    segments: &'s BTreeSet<u64>,
}

impl Source<'_> {
    /// Segments that are to be read and are not there: from where reading begins on they have no gaps between them.
    fn missing(&self, plan: &Plan) -> Vec<u64> {
        let &Self { layout, segments, .. } = self;
        let first = layout.segment(plan.from);
        // A checkpoint may end where a segment ends behind which there was no room for another.
        let is_end = layout.start(first) == plan.from && segments.range(first..).next().is_none();
        let last = if is_end { 0 } else { segments.last().copied().unwrap_or(first).max(first) };
        let needed = layout.segment(Lsn(plan.known_end.0.saturating_sub(1)));
        let last = if plan.known_end > plan.from { last.max(needed) } else { last };
        (first..=last).filter(|number| !segments.contains(number)).collect()
    }

    /// How much there may be from a position on.
    fn bytes_behind(&self, lsn: Lsn) -> u64 {
        self.layout.start(self.segments.last().map_or(0, |last| last + 1)).0.saturating_sub(lsn.0)
    }

    /// The state that the journal tells from its beginning on, without a checkpoint; none if not all of it can be read.
    fn read_whole(
        &self,
        plan: &Plan,
        broken: &BTreeMap<u64, Broken>,
    ) -> Result<Option<(State, JournalReading)>, DataError> {
        let last = self.segments.last().copied().unwrap_or(0);
        let is_there = last > 0 && (1..=last).all(|number| self.segments.contains(&number));
        if !is_there || broken.values().any(|broken| *broken != Broken::Header) {
            return Ok(None);
        }
        let mut state = State::new(self.layout.segment_bytes);
        let plan = Plan { from: self.layout.first(), known_end: plan.known_end.max(plan.from) };
        let read = self.read_onto(&mut state, &plan, Skipped::default(), (false, false))?;
        Ok(read.damage.is_empty().then_some((state, read)))
    }

    /// The state that is left of the journal, damaged or not, without a checkpoint.
    fn read_alone(&self, plan: &Plan) -> Result<(State, JournalReading), DataError> {
        let mut state = State::new(self.layout.segment_bytes);
        let alone = Plan { from: self.layout.first(), known_end: plan.known_end };
        let read = self.read_onto(&mut state, &alone, Skipped::WITHOUT_COUNTERS, (false, false))?;
        Ok((state, read))
    }

    /// Makes the changes of the journal, and leaves numbers out where it cannot be known how many had been given.
    fn read_onto(
        &self,
        state: &mut State,
        plan: &Plan,
        mut skipped: Skipped,
        (mut is_damaged, is_cut_short): (bool, bool),
    ) -> Result<JournalReading, DataError> {
        let &Self { journal, layout, segments } = self;
        let mut progress = Progress::new(plan.from, Lsn(plan.from.0 + self.bytes_behind(plan.from)));
        let mut orphans = Orphans::default();
        let mut read = read_journal(journal, layout, segments, plan, &mut |read| match read {
            Read::Change(change, place) => {
                if is_damaged && is_orphan(state, change) {
                    orphans.add(|| say(change, false));
                }
                state.apply(change, place);
                progress.look(place.lsn);
            }
            Read::Damage(damage) => {
                let bytes = damage.end.0 - damage.start.0;
                if !is_damaged {
                    // Once is enough for all that stands behind it.
                    state.skip_ids(self.bytes_behind(damage.start).max(bytes));
                }
                is_damaged = true;
                skipped = skipped.and(Skipped::within(bytes));
            }
        })?;
        if is_cut_short {
            if !is_damaged {
                state.skip_ids(layout.segment_bytes);
            }
            skipped = skipped.and(Skipped::within(layout.segment_bytes));
        }
        state.skip_numbers(skipped);
        state.skip_no_more_ids();
        state.take_freed_files();
        read.orphans = orphans;
        Ok(read)
    }
}

/// True when one state has all that another has, as far as counts tell, and more.
fn has_more(one: &State, other: &State) -> bool {
    let counts = |state: &State| {
        let messages = state.usage().messages();
        [state.users().count(), state.groups().count(), state.files().count(), messages]
    };
    let (one, other) = (counts(one), counts(other));
    one != other && one.iter().zip(other).all(|(one, other)| *one >= other)
}

/// True for a change that comes to nothing, since what it belongs to is lost.
fn is_orphan(state: &State, change: &Change<'_>) -> bool {
    let is_there = |target: Target| state.target_name(target).is_some();
    match *change {
        Change::MessageSent { to, .. } => !is_there(to),
        Change::FileStored { from, to, .. } | Change::FileSent { from, to, .. } => {
            !is_there(to) || !is_there(Target::User(from))
        }
        Change::MemberJoined { group, user } => !is_there(Target::Group(group)) || !is_there(Target::User(user)),
        Change::GroupCreated { owner, .. } => !is_there(Target::User(owner)),
        Change::PasswordChanged { user, .. } => !is_there(Target::User(user)),
        _ => false,
    }
}

fn read_checkpoint(
    checkpoints: &Directory,
    number: u64,
    layout: Layout,
    state: &mut State,
    orphans: &mut Orphans,
) -> Result<Reading, DataError> {
    let (started, mut last) = (Instant::now(), Instant::now());
    let reading = checkpoint::read(checkpoints, number, Some(layout), &mut |item| {
        if let Item::Entries { user, entries } = item
            && state.mailbox(*user).is_none()
        {
            orphans.add(|| format!("{} messages that waited for an account that is lost", entries.len()));
        }
        state.restore(item);
        if last.elapsed() >= PROGRESS_EVERY {
            last = Instant::now();
            let seconds = started.elapsed().as_secs();
            info!(seconds, records = state.usage().records(), "reading the checkpoint");
        }
    });
    for (name, from) in state.finish_restore() {
        orphans.add(|| format!("the file {name} from {from}, since nobody is left who lists it"));
    }
    reading
}

/// What was read of a journal.
#[derive(Debug)]
pub struct JournalReading {
    /// How many changes can be read.
    pub changes: u64,
    /// Where the good records end.
    pub end: Lsn,
    /// Marks say that all before this had been synced.
    pub synced: Lsn,
    /// What had been synced and cannot be read.
    pub damage: Vec<Range<Lsn>>,
    orphans: Orphans,
}

/// Shows what can be read of a journal, damaged or not.
fn read_journal(
    journal: &Directory,
    layout: Layout,
    segments: &BTreeSet<u64>,
    plan: &Plan,
    show: &mut dyn FnMut(Read<'_>),
) -> Result<JournalReading, DataError> {
    let failed = |error| DataError::Io(journal.path().to_owned(), error);
    let mut reading = JournalReading {
        changes: 0,
        end: plan.from,
        synced: plan.known_end,
        damage: Vec::new(),
        orphans: Orphans::default(),
    };
    let mut at = plan.from;
    loop {
        let replayed = replay(journal, layout, at, &mut |change, place| show(Read::Change(change, place)))?;
        reading.changes += replayed.changes;
        reading.synced = reading.synced.max(replayed.synced);
        let end = replayed.end;
        let is_end = end >= plan.known_end && end >= reading.synced;
        if is_end && synced_past(journal, layout, segments, end).map_err(failed)?.is_none() {
            reading.end = end;
            return Ok(reading);
        }
        at = match next_record(journal, layout, segments, end).map_err(failed)? {
            Some(next) => next,
            None => plan.known_end.max(layout.start(segments.last().map_or(0, |last| last + 1))).max(end),
        };
        reading.damage.push(end..at);
        show(Read::Damage(end..at));
    }
}

/// What is read of a journal, in order.
enum Read<'r> {
    Change(&'r Change<'r>, Place),
    Damage(Range<Lsn>),
}

/// The same for a journal from `from` on that had been synced up to `known_end` at least.
///
/// # Errors
/// [`DataError`], but not for damage.
pub fn survey_journal(
    journal: &Directory,
    layout: Layout,
    segments: &BTreeSet<u64>,
    known: Range<Lsn>,
    mut show: impl FnMut(&Change<'_>, Place),
) -> Result<JournalReading, DataError> {
    let plan = Plan { from: known.start, known_end: known.end };
    read_journal(journal, layout, segments, &plan, &mut |read| {
        if let Read::Change(change, place) = read {
            show(change, place);
        }
    })
}

/// Records that were read one after the other.
struct Replayed {
    /// Where the first stands that is not whole.
    end: Lsn,
    changes: u64,
    /// What marks among them say.
    synced: Lsn,
}

/// Shows every change from `from` up to the first record that is not whole.
fn replay(
    journal: &Directory,
    layout: Layout,
    from: Lsn,
    show: &mut dyn FnMut(&Change<'_>, Place),
) -> Result<Replayed, DataError> {
    let mut records = Records::new(Stream::new(journal, layout, from, Lsn(u64::MAX)), layout.salt, from);
    let (mut changes, mut synced) = (0, Lsn(0));
    loop {
        let at = records.at();
        let path = || journal.join(&Layout::name(layout.segment(at)));
        let Some((place, body)) = records.read().map_err(|error| DataError::Io(path(), error))? else {
            return Ok(Replayed { end: at, changes, synced });
        };
        if let Some(known) = record::mark_of(body, place.lsn) {
            synced = synced.max(known);
        } else if !record::is_padding(body) {
            // A record whose sum is right and that cannot be read was written by a program that this one does not know.
            let change = Change::decode(body).ok_or_else(|| DataError::Foreign(path()))?;
            show(&change, place);
            changes += 1;
        }
    }
}

/// Where something behind `lsn` says that the journal had been synced past it.
fn synced_past(journal: &Directory, layout: Layout, segments: &BTreeSet<u64>, lsn: Lsn) -> io::Result<Option<Lsn>> {
    let mut window = vec![0; SCAN_BYTES];
    for segment in segments.range(layout.segment(lsn)..) {
        let (mut at, mut filled) = (layout.start(*segment).max(lsn), 0);
        let mut stream = Stream::new(journal, layout, at, Lsn(u64::MAX));
        // A mark at a segment's end may go on in the next, so a little of that is read too.
        let end = Lsn(layout.start(segment + 1).0 + record::MARK_BYTES as u64);
        while at < end {
            let count = stream.read(&mut window[filled..])?;
            filled += count;
            if filled == window.len() || count == 0 {
                if let Some(mark) = record::find_mark_synced_past(&window[..filled], layout.salt, at, lsn) {
                    return Ok(Some(mark));
                }
                // A mark may stand across two windows.
                let kept = filled.min(record::MARK_BYTES);
                window.copy_within(filled - kept..filled, 0);
                at.0 += (filled - kept) as u64;
                filled = kept;
            }
            if count == 0 {
                break;
            }
        }
    }
    Ok(None)
}

/// The first whole record behind the bad one at `bad`. It is looked for near by first: most damage is small.
fn next_record(journal: &Directory, layout: Layout, segments: &BTreeSet<u64>, bad: Lsn) -> io::Result<Option<Lsn>> {
    let end = layout.start(segments.last().map_or(0, |last| last + 1));
    let (mut at, mut searched_max) = (Lsn(bad.0 + RECORD_BYTES_MIN as u64), SEARCH_BYTES_MIN);
    let mut window = Vec::new();
    while at < end {
        window.clear();
        Stream::new(journal, layout, at, Lsn(at.0 + 2 * searched_max as u64)).read_to_end(&mut window)?;
        let searched = window.len().min(searched_max);
        let found = record::find_next(&window, layout.salt, at, searched);
        let is_last = searched_max == SEARCH_BYTES || window.len() < 2 * searched_max;
        if let Some(start) = found {
            return Ok(Some(Lsn(at.0 + start as u64)));
        }
        if !is_last {
            // One that is longer than what stands behind it in the window was not seen.
            searched_max = (4 * searched_max).min(SEARCH_BYTES);
            continue;
        }
        // A file that is short or missing is gone over.
        at = if searched > 0 { Lsn(at.0 + searched as u64) } else { layout.start(layout.segment(at) + 1) };
        searched_max = SEARCH_BYTES;
    }
    Ok(None)
}

/// True when a record had been begun at `end`: behind a write that was finished there is not even the beginning of one.
fn begins_record(journal: &Directory, layout: Layout, end: Lsn) -> io::Result<bool> {
    let mut header = Vec::new();
    Stream::new(journal, layout, end, Lsn(end.0 + HEADER_BYTES as u64)).read_to_end(&mut header)?;
    Ok(header.iter().any(|byte| *byte != 0))
}

/// The damage as a person may want to know it, record by record as far as they can be told apart.
fn describe(journal: &Directory, layout: Layout, damage: &Range<Lsn>) -> io::Result<Vec<Damage>> {
    let mut bytes = Vec::new();
    Stream::new(journal, layout, damage.start, damage.end).take(2 * SEARCH_BYTES as u64).read_to_end(&mut bytes)?;
    let mut described = Vec::new();
    let (mut at, mut rest) = (damage.start, &*bytes);
    while at < damage.end {
        let left = damage.end.0 - at.0;
        let one = record::claimed_bytes(rest).filter(|bytes| *bytes as u64 <= left && *bytes <= rest.len());
        // What is left over must be long enough for a record, or it is none.
        let one = one.filter(|bytes| *bytes as u64 == left || *bytes as u64 + RECORD_BYTES_MIN as u64 <= left);
        let (bytes, what) = match one.and_then(|bytes| Some((bytes, record::claimed_body(rest)?))) {
            Some((bytes, body)) => {
                (bytes as u64, Change::decode(body).map_or("a record".to_owned(), |change| say(&change, true)))
            }
            None => (left, "records that cannot be told apart".to_owned()),
        };
        let path = journal.join(&Layout::name(layout.segment(at)));
        described.push(Damage { path, byte: layout.offset(at), bytes, what, broken: None });
        at.0 += bytes;
        rest = rest.get(usize::try_from(bytes).unwrap_or(usize::MAX)..).unwrap_or_default();
    }
    Ok(described)
}

/// What a record says, or seems to say. No text of a message is shown, and no hash.
fn say(change: &Change<'_>, is_damaged: bool) -> String {
    let what = match change {
        Change::UserAdded { name, .. } => format!("the account {name}"),
        Change::PasswordChanged { .. } => "a new password".to_owned(),
        Change::UserRemoved { .. } => "the end of an account".to_owned(),
        Change::SessionOpened { .. } | Change::SessionUsed { .. } | Change::SessionClosed { .. } => {
            "a login".to_owned()
        }
        Change::GroupCreated { name, .. } => format!("the group {name}"),
        Change::MemberJoined { .. } | Change::MemberLeft { .. } => "a member of a group".to_owned(),
        Change::MessageSent { from_name, to_name, to, .. } => {
            let group = if matches!(to, Target::Group(_)) { "group " } else { "" };
            format!("a message from {from_name} to {group}{to_name}")
        }
        Change::MessageMoved { from_name, to_name, .. } => {
            format!("a message from {from_name} to {to_name}, written again")
        }
        Change::Delivered { .. } => "that messages were delivered".to_owned(),
        Change::FileStored { name, .. } | Change::FileSent { name, .. } => format!("the file {name}"),
        Change::FileMoved { .. } => "a file, written again".to_owned(),
        Change::FileLost { .. } => "the end of a file that was lost".to_owned(),
        Change::FileDropped { name, .. } => format!("the end of the file {name}"),
        Change::TimePassed { .. } => "how long servers have run".to_owned(),
    };
    if is_damaged { format!("perhaps {what}") } else { what }
}

/// Tells how far a long start is.
struct Progress {
    from: Lsn,
    end: Lsn,
    records: u64,
    last: Instant,
}

impl Progress {
    fn new(from: Lsn, end: Lsn) -> Self {
        Self { from, end, records: 0, last: Instant::now() }
    }

    fn look(&mut self, lsn: Lsn) {
        self.records += 1;
        if self.records.is_multiple_of(RECORDS_PER_LOOK) && self.last.elapsed() >= PROGRESS_EVERY {
            self.last = Instant::now();
            let (done, all) = (lsn.0 - self.from.0, (self.end.0 - self.from.0).max(1));
            info!(changes = self.records, percent = done * 100 / all, "reading the journal");
        }
    }
}
