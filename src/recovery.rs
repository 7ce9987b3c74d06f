//! From the disk to the state: the newest checkpoint, and then the journal behind it, up to its end.
//!
//! Records are read up to the first that is not whole. If a later mark says that this place had been synced, it is damage,
//! and opening fails; if none does, it is the torn end of a write that nobody was told of, and is wiped out, so that
//! nothing of it can ever be taken for what is written there next.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::info;

use crate::change::{Change, Lsn, Place};
use crate::checkpoint::{self, Checkpoint};
use crate::data::{self, DataDirectory, DataError};
use crate::record::{self, HEADER_BYTES, Records};
use crate::segment::{self, Access, Layout, SegmentStore, Stream};
use crate::snapshot::Item;
use crate::state::State;

/// A start that takes longer says how far it is, this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// The clock is looked at once in so many records.
const RECORDS_PER_LOOK: u64 = 16 * 1024;
const SCAN_BYTES: usize = 1024 * 1024;

/// What a data directory held, and where its journal goes on.
#[derive(Debug)]
pub struct Recovered {
    /// How the journal lies on the disk.
    pub layout: Layout,
    /// What it tells.
    pub state: State,
    /// Where it goes on, in a segment that is there and zero from here on.
    pub end: Lsn,
    /// From where it was read.
    pub checkpoint: Option<Checkpoint>,
    /// The segments that there are, the last being the one that `end` is in.
    pub segments: BTreeSet<u64>,
    /// How many changes were read behind the checkpoint.
    pub changes: u64,
    /// A write at the end had not been finished.
    pub is_torn: bool,
    /// There was nothing.
    pub is_new: bool,
}

/// Recovers the state of a data directory, and makes its journal ready to be written to. One that is empty gets a new
/// journal with segments of `segment_bytes`.
///
/// # Errors
/// [`DataError`]; nothing that had been synced is changed on the disk then.
pub fn recover(root: &DataDirectory, access: Access, segment_bytes: u64) -> Result<Recovered, DataError> {
    let (journal, checkpoints) = (root.journal(), root.checkpoints());
    for directory in [&journal, &checkpoints] {
        remove_unfinished(directory).map_err(|error| DataError::Io(directory.clone(), error))?;
    }
    let failed = |error| DataError::Io(journal.clone(), error);
    let found = Found::look(&journal, &checkpoints)?;
    let Some(layout) = found.layout else { return begin(&journal, access, segment_bytes) };

    let mut state = State::new(layout.segment_bytes);
    let checkpoint = match found.checkpoints.last() {
        Some(newest) => {
            let (started, mut last) = (Instant::now(), Instant::now());
            let restore = |item: &Item<'_>| {
                state.restore(item);
                if last.elapsed() >= PROGRESS_EVERY {
                    last = Instant::now();
                    let seconds = started.elapsed().as_secs();
                    info!(seconds, records = state.usage().records(), "reading the checkpoint");
                }
            };
            Some(checkpoint::read(&checkpoints, *newest, restore)?.1)
        }
        None => None,
    };
    let from = checkpoint.map_or(layout.first(), |checkpoint| checkpoint.span.lsn);
    found.check_is_there(layout, from, &journal)?;
    let mut progress = Progress::new(from, found.end(layout));
    let (end, changes) = replay(&journal, layout, from, Lsn(u64::MAX), |change, place| {
        state.apply(change, place);
        progress.look(place.lsn);
    })?;
    let is_short = checkpoint.and_then(|checkpoint| checkpoint.span.until).is_some_and(|until| end < until);
    if is_short || synced_past(&journal, layout, &found.segments, end).map_err(failed)? {
        return Err(DataError::Damaged(Layout::path(&journal, layout.segment(end)), layout.offset(end)));
    }

    let last = layout.segment(end);
    // What was read may be in the page cache alone, and is told to others and built upon from now on.
    for segment in found.segments.range(layout.segment(from)..=last) {
        let path = Layout::path(&journal, *segment);
        File::open(&path).and_then(|file| file.sync_data()).map_err(|error| DataError::Io(path, error))?;
    }
    data::sync(&checkpoints).map_err(|error| DataError::Io(checkpoints.clone(), error))?;

    // What comes behind the end was made ready for later, or was written and never synced.
    let mut segments = found.segments;
    // From the last on, so that there is never a gap.
    for segment in segments.split_off(&(last + 1)).into_iter().rev() {
        segment::remove(&Layout::path(&journal, segment)).map_err(failed)?;
    }
    data::sync(&journal).map_err(failed)?;
    let is_torn = begins_record(&journal, layout, end).map_err(failed)?;
    if segments.contains(&last) {
        segment::own(&journal, last).map_err(failed)?;
        wipe(&journal, layout, end).map_err(failed)?;
    } else {
        prepare(&journal, layout, access, last)?;
        segments.insert(last);
    }
    for older in found.checkpoints.iter().rev().skip(1) {
        let path = checkpoint::path(&checkpoints, *older);
        segment::remove(&path).map_err(|error| DataError::Io(path.clone(), error))?;
    }
    state.take_freed_files();
    Ok(Recovered { layout, state, end, checkpoint, segments, changes, is_torn, is_new: false })
}

/// Begins a journal where there is none.
fn begin(journal: &Path, access: Access, segment_bytes: u64) -> Result<Recovered, DataError> {
    let salt = getrandom::u32().map_err(|error| DataError::Io(journal.to_owned(), io::Error::other(error)))?;
    let layout = Layout { salt, segment_bytes };
    prepare(journal, layout, access, 1)?;
    Ok(Recovered {
        layout,
        state: State::new(segment_bytes),
        end: layout.first(),
        checkpoint: None,
        segments: BTreeSet::from([1]),
        changes: 0,
        is_torn: false,
        is_new: true,
    })
}

fn prepare(journal: &Path, layout: Layout, access: Access, segment: u64) -> Result<(), DataError> {
    let failed = |error| DataError::Io(Layout::path(journal, segment), error);
    let made = SegmentStore::new(journal.to_owned(), layout, access, segment - 1, 0).prepare(0).map_err(failed)?;
    made.map(drop).ok_or_else(|| failed(io::ErrorKind::StorageFull.into()))
}

/// The files of a journal, by their names and headers.
struct Found {
    /// None where there is no journal at all.
    layout: Option<Layout>,
    /// The segments, whatever is in them.
    segments: BTreeSet<u64>,
    checkpoints: BTreeSet<u64>,
}

impl Found {
    fn look(journal: &Path, checkpoints: &Path) -> Result<Self, DataError> {
        let list = |directory: &Path, list: fn(&Path) -> io::Result<BTreeSet<u64>>| {
            list(directory).map_err(|error| DataError::Io(directory.to_owned(), error))
        };
        let segments = list(journal, segment::list)?;
        let checkpoints_found = list(checkpoints, checkpoint::list)?;
        // All files of a data directory are of one version.
        if let Some((segment, version)) =
            segments.first().and_then(|first| Some((first, segment::other_version(journal, *first)?)))
        {
            return Err(DataError::OtherVersion(Layout::path(journal, *segment), version));
        }
        let mut layout = match checkpoints_found.last() {
            Some(newest) => Some(checkpoint::header(checkpoints, *newest)?.0),
            None => None,
        };
        for segment in &segments {
            let path = Layout::path(journal, *segment);
            let found = segment::header_of(journal, *segment).map_err(|error| DataError::Io(path.clone(), error))?;
            let found = found.ok_or_else(|| DataError::Foreign(path.clone()))?;
            if *layout.get_or_insert(found) != found {
                return Err(DataError::Foreign(path));
            }
            // It had all its bytes before it had its name.
            if let Some(bytes) = segment::cut_short(journal, found, *segment) {
                return Err(DataError::Damaged(path, bytes));
            }
        }
        Ok(Self { layout, segments, checkpoints: checkpoints_found })
    }

    /// Makes sure that the segments are there that are to be read: segments have no gaps between them from there on.
    fn check_is_there(&self, layout: Layout, from: Lsn, journal: &Path) -> Result<(), DataError> {
        let segment = layout.segment(from);
        // A checkpoint may end where a segment ends behind which there was no room for another.
        let is_end = layout.start(segment) == from && self.segments.range(segment..).next().is_none();
        let last = self.segments.last().copied().unwrap_or(segment);
        let missing = (segment..=last.max(segment)).find(|number| !self.segments.contains(number));
        match missing.filter(|_| !is_end) {
            None => Ok(()),
            Some(missing) => Err(DataError::Missing(Layout::path(journal, missing))),
        }
    }

    fn end(&self, layout: Layout) -> Lsn {
        layout.start(self.segments.last().map_or(0, |last| last + 1))
    }
}

/// Removes what was never finished.
fn remove_unfinished(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Shows every change from `from` up to `upto` or to the first record that is not whole. Says where that is, and how many
/// changes there were.
///
/// # Errors
/// [`DataError`]
pub fn replay(
    journal: &Path,
    layout: Layout,
    from: Lsn,
    upto: Lsn,
    mut show: impl FnMut(&Change<'_>, Place),
) -> Result<(Lsn, u64), DataError> {
    let mut records = Records::new(Stream::new(journal, layout, from, upto), layout.salt, from);
    let mut changes = 0;
    loop {
        let at = records.at();
        let path = || Layout::path(journal, layout.segment(at));
        let Some((place, body)) = records.read().map_err(|error| DataError::Io(path(), error))? else {
            return Ok((at, changes));
        };
        if !record::says_nothing(body, place.lsn) {
            // A record whose sum is right and that cannot be read was written by a program that this one does not know.
            let change = Change::decode(body).ok_or_else(|| DataError::Foreign(path()))?;
            show(&change, place);
            changes += 1;
        }
    }
}

/// True when something behind `lsn` says that the journal had been synced past it.
///
/// # Errors
/// What the disk said.
pub fn synced_past(journal: &Path, layout: Layout, segments: &BTreeSet<u64>, lsn: Lsn) -> io::Result<bool> {
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
                if record::find_mark_synced_past(&window[..filled], layout.salt, at, lsn).is_some() {
                    return Ok(true);
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
    Ok(false)
}

/// True when a record had been begun at `end`: behind a write that was finished there is not even the beginning of one.
///
/// # Errors
/// What the disk said.
pub fn begins_record(journal: &Path, layout: Layout, end: Lsn) -> io::Result<bool> {
    let mut header = Vec::new();
    Stream::new(journal, layout, end, Lsn(end.0 + HEADER_BYTES as u64)).read_to_end(&mut header)?;
    Ok(header.iter().any(|byte| *byte != 0))
}

/// Makes the rest of the segment behind `end` zero, if it is not.
fn wipe(journal: &Path, layout: Layout, end: Lsn) -> io::Result<()> {
    let segment_end = layout.start(layout.segment(end) + 1);
    let mut stream = Stream::new(journal, layout, end, segment_end);
    let mut window = vec![0; SCAN_BYTES];
    let (mut at, mut is_clean) = (end, true);
    loop {
        let count = stream.read(&mut window)?;
        is_clean &= window[..count].iter().all(|byte| *byte == 0);
        at.0 += count as u64;
        if count == 0 || !is_clean {
            break;
        }
    }
    if !is_clean || at != segment_end {
        segment::clear_from(journal, layout, end)?;
    }
    Ok(())
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

/// A small journal to damage.
#[cfg(test)]
pub(crate) mod sample {
    use super::*;
    use crate::change::UserId;
    use crate::journal::Journal;
    use crate::log::{Log, Need, Sync};

    /// Two blocks, so that a few batches need several.
    pub(crate) const SEGMENT_BYTES: u64 = 8192;

    /// A data directory whose journal adds one user after the other.
    pub(crate) struct Sample {
        pub(crate) root: tempfile::TempDir,
        pub(crate) directory: DataDirectory,
        pub(crate) layout: Layout,
        /// Where each change stands.
        pub(crate) places: Vec<Place>,
        /// Where each batch starts.
        pub(crate) starts: Vec<Lsn>,
    }

    impl Sample {
        /// So many batches of two changes each, with names of about so many bytes. `is_synced` says that each batch knows
        /// that those before it were synced.
        pub(crate) fn new(batches: u32, name_bytes: usize, is_synced: bool) -> Self {
            let root = tempfile::tempdir().unwrap();
            let directory = DataDirectory::open(root.path()).unwrap();
            let Recovered { layout, end, .. } = recover(&directory, Access::Buffered, SEGMENT_BYTES).unwrap();
            let mut store = SegmentStore::new(directory.journal(), layout, Access::Buffered, 1, 1);
            let mut journal = Journal::open(&directory.journal(), layout, Access::Buffered, end).unwrap();
            let mut log = Log::new(layout, end);
            let (mut places, mut starts) = (Vec::new(), Vec::new());
            for user in 0..batches * 2 {
                let name = format!("user{user}{}", "x".repeat(name_bytes));
                let change = Change::UserAdded { user: UserId(user), name: &name, password_hash: "" };
                places.push(log.append(&change, Need::More).unwrap());
                if user % 2 == 0 {
                    continue;
                }
                let mut batch = log.take_batch().unwrap();
                while layout.segment(batch.end()) > store.count() {
                    journal.add(store.prepare(0).unwrap().unwrap());
                }
                starts.push(batch.start);
                journal.write(std::slice::from_mut(&mut batch), Sync::Always).unwrap();
                log.settle(batch, if is_synced { journal.synced() } else { end });
            }
            Self { root, directory, layout, places, starts }
        }

        /// The users that a start finds.
        pub(crate) fn users(&self) -> Result<(Vec<u32>, Recovered), DataError> {
            let recovered = recover(&self.directory, Access::Buffered, SEGMENT_BYTES)?;
            let users = recovered.state.mailboxes().map(|(user, _)| user.0).collect();
            Ok((users, recovered))
        }

        /// Where a position stands: the segment's path, and the byte in it.
        pub(crate) fn file(&self, lsn: Lsn) -> (std::path::PathBuf, usize) {
            let path = Layout::path(&self.directory.journal(), self.layout.segment(lsn));
            (path, usize::try_from(self.layout.offset(lsn)).unwrap())
        }

        /// Changes one bit at a position.
        pub(crate) fn flip(&self, lsn: Lsn) {
            let (path, at) = self.file(lsn);
            let mut bytes = fs::read(&path).unwrap();
            bytes[at] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sample::{SEGMENT_BYTES, Sample};
    use super::*;
    use crate::aligned::BLOCK_BYTES;
    use crate::change::UserId;
    use crate::check::check;
    use crate::checkpoint::Span;
    use crate::journal::Journal;
    use crate::log::{Log, Need, Sync};

    #[test]
    fn what_was_written_is_read_again() {
        let sample = Sample::new(3, 3000, true);
        let (users, recovered) = sample.users().unwrap();
        assert_eq!(users, [0, 1, 2, 3, 4, 5]);
        assert_eq!(recovered.end, sample.places[5].end());
        assert!(recovered.segments.len() > 2);
        assert!(!recovered.is_torn);
        assert_eq!(recovered.changes, 6);
    }

    #[test]
    fn a_journal_that_ends_at_any_byte_of_its_last_batches_keeps_what_stands_before() {
        let sample = Sample::new(3, 20, true);
        let (path, start) = sample.file(sample.starts[1]);
        let whole = fs::read(&path).unwrap();
        let (_, end) = sample.file(sample.places[5].end());
        for cut in start..end {
            let mut left = whole[..cut].to_vec();
            fs::write(&path, &left).unwrap();
            assert!(matches!(sample.users(), Err(DataError::Damaged(..))), "a segment is never short");
            left.resize(whole.len(), 0);
            fs::write(&path, &left).unwrap();
            let (users, recovered) = sample.users().unwrap();
            let before = sample.places.iter().filter(|place| sample.file(place.end()).1 <= cut).count();
            assert!(before >= 2 && users.len() >= before, "cut at {cut}: {users:?}");
            assert_eq!(users, [0, 1, 2, 3, 4, 5][..users.len()], "cut at {cut}");
            assert!(users.len() < 6 || left == whole, "what was cut off ended in zeros");
            // What was cut off is gone for good.
            let again = sample.users().unwrap();
            assert_eq!((again.0, again.1.end, again.1.is_torn), (users, recovered.end, false));
            assert!(fs::read(&path).unwrap()[sample.file(recovered.end).1..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_flipped_bit_in_what_had_been_synced_is_found_and_left_as_it_is() {
        let sample = Sample::new(3, 20, true);
        let (path, end) = sample.file(sample.starts[2]);
        let whole = fs::read(&path).unwrap();
        for at in 0..end {
            // Most of the header is zero, and one bit in each byte is enough there.
            for bit in if (64..BLOCK_BYTES).contains(&at) { 0..1 } else { 0..8 } {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                fs::write(&path, &flipped).unwrap();
                let error = sample.users().unwrap_err();
                let is_named = match &error {
                    DataError::Foreign(_) => at < BLOCK_BYTES,
                    DataError::Damaged(_, byte) => usize::try_from(*byte).unwrap() <= at && at >= BLOCK_BYTES,
                    _ => false,
                };
                assert!(is_named, "byte {at} bit {bit}: {error}");
                assert_eq!(fs::read(&path).unwrap(), flipped);
            }
        }
    }

    #[test]
    fn a_checkpoint_that_reaches_further_than_its_journal_is_damage_that_can_be_gone_over() {
        for missing in [0, 40, 5000, 3 * SEGMENT_BYTES] {
            let Sample { root, directory, layout, places, starts } = Sample::new(3, 20, false);
            let until = Lsn(places[5].end().0 + missing);
            let span = Span { lsn: starts[1], until: Some(until) };
            let counters = Item::Counters { users: 2, groups: 0, files: 0 };
            let user =
                |user, name| Item::User { user: UserId(user), name, password_hash: "", last_id: 0, changed: Lsn(0) };
            let items = [counters, user(0, "messi"), user(1, "henderson")];
            checkpoint::write(&directory.checkpoints(), layout, 1, span, items).unwrap();
            let recovered = recover(&directory, Access::Buffered, SEGMENT_BYTES);
            if missing > 0 {
                assert!(matches!(recovered, Err(DataError::Damaged(..))), "{missing}: {recovered:?}");
                drop(directory);
                assert!(!check(root.path(), false).unwrap().is_good());
                assert!(check(root.path(), true).unwrap().is_good());
            } else {
                recovered.unwrap();
                drop(directory);
            }
            let report = check(root.path(), false).unwrap();
            assert!(report.is_good(), "{report}");
            let directory = DataDirectory::open(root.path()).unwrap();
            let Recovered { state, end, .. } = recover(&directory, Access::Buffered, SEGMENT_BYTES).unwrap();
            assert!(end >= until);
            assert_eq!(state.users().count(), 6);
        }
    }

    #[test]
    fn damage_is_found_when_what_tells_of_it_stands_in_a_later_segment() {
        let sample = Sample::new(8, 1500, true);
        assert!(sample.layout.segment(sample.starts[7]) > sample.layout.segment(sample.places[0].lsn) + 1);
        sample.flip(Lsn(sample.places[0].lsn.0 + 9));
        assert!(matches!(sample.users(), Err(DataError::Damaged(..))));
    }

    #[test]
    fn a_lost_segment_is_found() {
        let sample = Sample::new(8, 1500, true);
        let path = |segment| Layout::path(&sample.directory.journal(), segment);
        fs::rename(path(2), sample.root.path().join("away")).unwrap();
        assert!(matches!(sample.users(), Err(DataError::Missing(found)) if found == path(2)));
        fs::rename(sample.root.path().join("away"), path(2)).unwrap();
        fs::rename(path(1), sample.root.path().join("away")).unwrap();
        assert!(matches!(sample.users(), Err(DataError::Missing(found)) if found == path(1)));
    }

    #[test]
    fn a_bad_record_that_was_never_synced_is_a_torn_end_though_good_ones_follow() {
        let sample = Sample::new(3, 3000, false);
        sample.flip(Lsn(sample.places[0].lsn.0 + 9));
        let (users, recovered) = sample.users().unwrap();
        assert_eq!(users, [0u32; 0]);
        assert!(recovered.is_torn);
        assert_eq!(recovered.segments, BTreeSet::from([1]), "what was written behind it is not kept");
        let (path, start) = sample.file(recovered.end);
        assert!(fs::read(path).unwrap()[start..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_an_earlier_use_has_left_is_never_taken_for_new() {
        // Records that fill blocks exactly, so that those of the earlier use stand where the next ones would.
        let root = tempfile::tempdir().unwrap();
        let directory = DataDirectory::open(root.path()).unwrap();
        let Recovered { layout, end, .. } = recover(&directory, Access::Buffered, SEGMENT_BYTES).unwrap();
        let mut store = SegmentStore::new(directory.journal(), layout, Access::Buffered, 1, 1);
        let mut journal = Journal::open(&directory.journal(), layout, Access::Buffered, end).unwrap();
        let mut log = Log::new(layout, end);
        let write = |log: &mut Log, journal: &mut Journal, user: u32| {
            let bare = record::MARK_BYTES + HEADER_BYTES + 1 + 4 + 5 + 1;
            let name = format!("{user:04}{}", "x".repeat(BLOCK_BYTES - bare - 4));
            let change = Change::UserAdded { user: UserId(user), name: &name, password_hash: "" };
            log.append(&change, Need::More).unwrap();
            let mut batch = log.take_batch().unwrap();
            assert_eq!(batch.seal().len(), BLOCK_BYTES);
            journal.write(std::slice::from_mut(&mut batch), Sync::Always).unwrap();
            log.settle(batch, journal.synced());
        };
        let first = Layout::path(&directory.journal(), 1);
        write(&mut log, &mut journal, 0);
        write(&mut log, &mut journal, 1);
        let used = fs::read(&first).unwrap();
        journal.add(store.prepare(0).unwrap().unwrap());
        write(&mut log, &mut journal, 2);
        // The next write did not come; what the segment held in its earlier use is there instead.
        let second = Layout::path(&directory.journal(), 2);
        let mut bytes = fs::read(&second).unwrap();
        bytes[2 * BLOCK_BYTES..].copy_from_slice(&used[2 * BLOCK_BYTES..]);
        fs::write(&second, &bytes).unwrap();
        let recovered = recover(&directory, Access::Buffered, SEGMENT_BYTES).unwrap();
        assert_eq!(recovered.state.users().count(), 3);
        assert_eq!(recovered.end, log.end());
    }

    #[test]
    fn after_a_clean_stop_damage_to_the_last_record_is_found_too() {
        let sample = Sample::new(3, 20, true);
        let end = sample.places[5].end();
        Journal::open(&sample.directory.journal(), sample.layout, Access::Buffered, end).unwrap().close().unwrap();
        assert_eq!(sample.users().unwrap().0, [0, 1, 2, 3, 4, 5]);
        sample.flip(Lsn(sample.places[5].lsn.0 + 9));
        assert!(matches!(sample.users(), Err(DataError::Damaged(..))));
    }

    #[test]
    fn another_version_is_told_and_left_as_it_is() {
        let sample = Sample::new(1, 20, true);
        let path = Layout::path(&sample.directory.journal(), 1);
        let mut bytes = fs::read(&path).unwrap();
        bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[..32]);
        bytes[32..36].copy_from_slice(&sum.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        let is_told = |error: DataError| matches!(error, DataError::OtherVersion(told, 2) if told == path);
        assert!(is_told(sample.users().map(drop).unwrap_err()));
        let Sample { root, directory, .. } = sample;
        drop(directory);
        let refused = check(root.path(), true).map(drop).unwrap_err();
        assert!(refused.to_string().contains("is of version 2 of the format"), "{refused}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn files_of_another_kind_and_unfinished_ones() {
        let sample = Sample::new(1, 20, true);
        let journal = sample.directory.journal();
        fs::write(journal.join("0000000002.tmp"), "half made").unwrap();
        assert!(sample.users().is_ok());
        assert!(!journal.join("0000000002.tmp").exists(), "what was never finished goes");
        let other = Layout { salt: sample.layout.salt ^ 1, ..sample.layout };
        for foreign in [b"something else".to_vec(), Vec::new(), other.header(2)] {
            fs::write(Layout::path(&journal, 2), &foreign).unwrap();
            assert!(matches!(sample.users(), Err(DataError::Foreign(path)) if path == Layout::path(&journal, 2)));
        }
    }
}
