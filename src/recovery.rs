//! From the disk to the state: what [`Survey`] has read, if nothing of it is damaged, and the journal made ready to be
//! written to.
//!
//! The torn end of a write is wiped out, so that nothing of it can ever be taken for what is written there next. What is
//! not known to have been synced is written once more: it may be in the page cache alone, and a sync that failed before this
//! start has left it there as if it were on the disk.

use std::collections::BTreeSet;
use std::io::{self, Read};

use crate::aligned::{AlignedBuffer, BLOCK_BYTES};
use crate::change::Lsn;
use crate::checkpoint::{self, Checkpoint};
use crate::data::{DataDirectory, DataError};
use crate::disk::{Directory, Mode, read_exact_at, write_all_at};
use crate::files::FileStore;
use crate::segment::{self, Access, Layout, SegmentStore, Stream, VERSION};
use crate::snapshot::Item;
use crate::state::State;
use crate::survey::Survey;
use crate::takeover;

const SCAN_BYTES: usize = 1024 * 1024;

/// What a start brings with it.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// How the journal is written.
    pub access: Access,
    /// The size of the segments of a new journal.
    pub segment_bytes: u64,
    /// The salt of a new journal: random, and known to nobody.
    pub salt: u32,
    /// Milliseconds since 1970, UTC.
    pub now: u64,
}

/// What a data directory held, and where its journal goes on.
#[derive(Debug)]
pub struct Recovered {
    /// How the journal lies on the disk.
    pub layout: Layout,
    /// What it tells.
    pub state: State,
    /// Where it goes on, in a segment that is there and zero from here on.
    pub end: Lsn,
    /// A mark says that all before this is on the disk.
    pub marked: Lsn,
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
    /// It was of an older format.
    pub is_taken_over: bool,
}

/// Recovers the state of a data directory, and makes its journal ready to be written to. One that is empty gets a new
/// journal, and one of an older format is taken over.
///
/// # Errors
/// [`DataError`]; nothing that had been synced is changed on the disk then.
pub fn recover(root: &DataDirectory, start: Start) -> Result<Recovered, DataError> {
    let (journal, checkpoints) = (root.journal(), root.checkpoints());
    for directory in [&journal, &checkpoints] {
        remove_unfinished(directory).map_err(|error| DataError::Io(directory.path().to_owned(), error))?;
    }
    let Some(mut survey) = Survey::of(&journal, &checkpoints)? else {
        let files = FileStore::new(root.files());
        return match files.has_any() {
            Ok(false) => begin(&journal, start),
            Ok(true) => Err(DataError::JournalLost(journal.path().to_owned())),
            Err(error) => Err(DataError::Io(root.files().path().to_owned(), error)),
        };
    };
    if !survey.damage.is_empty() {
        return Err(survey.damage.swap_remove(0).into_error());
    }
    let failed = |error| DataError::Io(journal.path().to_owned(), error);
    write_once_more(&journal, &survey).map_err(failed)?;
    checkpoints.sync().map_err(|error| DataError::Io(checkpoints.path().to_owned(), error))?;
    journal.sync().map_err(failed)?;
    let is_taken_over = survey.version < VERSION;
    if is_taken_over {
        takeover::take_over(root, &mut survey, start.now)?;
    }
    make_ready(&journal, &checkpoints, survey, start.access).map(|recovered| Recovered { is_taken_over, ..recovered })
}

/// Goes on where a survey ended.
fn make_ready(
    journal: &Directory,
    checkpoints: &Directory,
    survey: Survey,
    access: Access,
) -> Result<Recovered, DataError> {
    let Survey { layout, mut state, end, synced, checkpoint, mut segments, changes, is_torn, .. } = survey;
    let failed = |error| DataError::Io(journal.path().to_owned(), error);
    let last = layout.segment(end);
    // What comes behind the end was made ready for later, or was written and never synced. From the last on, and one after
    // the other, so that there is never a gap.
    for segment in segments.split_off(&(last + 1)).into_iter().rev() {
        journal.remove(&Layout::name(segment)).and_then(|()| journal.sync()).map_err(failed)?;
    }
    if segments.contains(&last) {
        segment::own(journal, last).map_err(failed)?;
        // Where the end is not known to have been synced, zeros behind it may be in the page cache alone.
        wipe(journal, layout, end, synced < end).map_err(failed)?;
    } else {
        prepare(journal, layout, access, last)?;
        segments.insert(last);
    }
    let newest = checkpoint.map(|checkpoint| checkpoint.number);
    for older in survey.checkpoints.into_iter().filter(|number| Some(*number) != newest) {
        let removed = checkpoints.remove(&checkpoint::name(older));
        removed.map_err(|error| DataError::Io(checkpoints.join(&checkpoint::name(older)), error))?;
    }
    state.take_freed_files();
    let (marked, is_new, is_taken_over) = (synced, false, false);
    Ok(Recovered { layout, state, end, marked, checkpoint, segments, changes, is_torn, is_new, is_taken_over })
}

/// Begins a journal where there is none.
fn begin(journal: &Directory, start: Start) -> Result<Recovered, DataError> {
    let layout = Layout { salt: start.salt, segment_bytes: start.segment_bytes };
    prepare(journal, layout, start.access, 1)?;
    Ok(Recovered {
        layout,
        state: State::new(start.segment_bytes),
        end: layout.first(),
        marked: layout.first(),
        checkpoint: None,
        segments: BTreeSet::from([1]),
        changes: 0,
        is_torn: false,
        is_new: true,
        is_taken_over: false,
    })
}

fn prepare(journal: &Directory, layout: Layout, access: Access, segment: u64) -> Result<(), DataError> {
    let failed = |error| DataError::Io(journal.join(&Layout::name(segment)), error);
    let made = SegmentStore::new(journal.clone(), layout, access, segment - 1, 0).prepare(0).map_err(failed)?;
    made.map(drop).ok_or_else(|| failed(io::ErrorKind::StorageFull.into()))
}

/// Removes what was never finished.
fn remove_unfinished(directory: &Directory) -> io::Result<()> {
    for entry in directory.list()? {
        if !entry.is_directory && entry.name.ends_with(".tmp") {
            directory.remove(&entry.name)?;
        }
    }
    Ok(())
}

/// Writes what no mark says was synced over itself, and syncs that.
fn write_once_more(journal: &Directory, survey: &Survey) -> io::Result<()> {
    let Survey { layout, synced, end, .. } = *survey;
    let mut buffer = AlignedBuffer::new(SCAN_BYTES);
    for segment in layout.segment(synced)..=layout.segment(end) {
        let (from, to) = (synced.max(layout.start(segment)), end.min(layout.start(segment + 1)));
        if from >= to || !survey.segments.contains(&segment) {
            continue;
        }
        let name = Layout::name(segment);
        let (source, target) = (journal.open(&name, Mode::Read)?, journal.open(&name, Mode::Write)?);
        let block = BLOCK_BYTES as u64;
        let start = layout.offset(from) / block * block;
        let end = (layout.offset(from) + (to.0 - from.0)).next_multiple_of(block);
        for at in (start..end).step_by(SCAN_BYTES) {
            let bytes = usize::try_from(end - at).unwrap_or(SCAN_BYTES).min(SCAN_BYTES);
            let piece = &mut buffer.bytes_mut()[..bytes];
            read_exact_at(&*source, piece, at)?;
            write_all_at(&*target, piece, at)?;
        }
        target.sync_data()?;
    }
    Ok(())
}

/// Puts a checkpoint of the state behind everything that the journal holds, so that nothing is read of it any more but what
/// is still needed. Its name is what counts: before it has that, all is as it was.
///
/// # Errors
/// [`DataError`]
pub fn begin_anew(checkpoints: &Directory, survey: &mut Survey) -> Result<(), DataError> {
    let layout = survey.layout;
    let last = survey.segments.last().copied().unwrap_or(0).max(layout.segment(survey.end));
    // It would count, and no server would start before there is room for the segment behind it.
    let needed = 2 * layout.segment_bytes + survey.checkpoint.map_or(0, |checkpoint| checkpoint.bytes);
    if checkpoints.free_bytes().map_err(|error| DataError::Io(checkpoints.path().to_owned(), error))? < needed {
        return Err(DataError::Io(checkpoints.path().to_owned(), io::ErrorKind::StorageFull.into()));
    }
    let lsn = layout.start(last + 1);
    let number = survey.checkpoints.last().map_or(1, |newest| newest + 1);
    let counters = survey.state.counters(lsn);
    let state = &mut survey.state;
    let items = |show: &mut dyn FnMut(&Item<'_>)| state.write_whole_image(lsn, show);
    let written = checkpoint::write(checkpoints, layout, number, (counters, lsn), items);
    let checkpoint = written.map_err(|error| DataError::Io(checkpoints.join(&checkpoint::name(number)), error))?;
    survey.checkpoints.insert(number);
    (survey.checkpoint, survey.end, survey.synced, survey.version) = (Some(checkpoint), lsn, lsn, VERSION);
    Ok(())
}

/// Makes the rest of the segment behind `end` zero, if it is not, or if that is in doubt.
fn wipe(journal: &Directory, layout: Layout, end: Lsn, is_in_doubt: bool) -> io::Result<()> {
    let segment_end = layout.start(layout.segment(end) + 1);
    let mut stream = Stream::new(journal, layout, end, segment_end);
    let mut window = vec![0; SCAN_BYTES];
    let (mut at, mut is_clean) = (end, !is_in_doubt);
    while is_clean {
        let count = stream.read(&mut window)?;
        is_clean &= window[..count].iter().all(|byte| *byte == 0);
        at.0 += count as u64;
        if count == 0 {
            break;
        }
    }
    if !is_clean || at != segment_end {
        segment::clear_from(journal, layout, end)?;
    }
    Ok(())
}

/// A small journal to damage.
#[cfg(test)]
pub(crate) mod sample {
    use super::*;
    use crate::change::{Change, Place, UserId};
    use crate::journal::Journal;
    use crate::log::{Log, Need, Sync};
    use std::fs;

    /// Two blocks, so that a few batches need several.
    pub(crate) const SEGMENT_BYTES: u64 = 8192;
    pub(crate) const START: Start =
        Start { access: Access::Buffered, segment_bytes: SEGMENT_BYTES, salt: 7, now: 1_767_225_600_000 };

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
            let Recovered { layout, end, .. } = recover(&directory, START).unwrap();
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
            let recovered = recover(&self.directory, START)?;
            let users = recovered.state.mailboxes().map(|(user, _)| user.0).collect();
            Ok((users, recovered))
        }

        /// Where a position stands: the segment's path, and the byte in it.
        pub(crate) fn file(&self, lsn: Lsn) -> (std::path::PathBuf, usize) {
            let path = self.directory.journal().join(&Layout::name(self.layout.segment(lsn)));
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
    use super::sample::{SEGMENT_BYTES, START, Sample};
    use super::*;
    use crate::change::{Change, UserId};
    use crate::check::check;
    use crate::journal::Journal;
    use crate::log::{Log, Need, Sync};
    use crate::record::{self, HEADER_BYTES};
    use crate::snapshot::Counters;
    use std::fs;

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
                    // It is the only one.
                    DataError::Hopeless(_) => at < BLOCK_BYTES,
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
            let counters = Counters { lsn: starts[1], users: 2, ..Counters::default() };
            let items = |show: &mut dyn FnMut(&Item<'_>)| {
                for (user, name) in [(0, "messi"), (1, "henderson")] {
                    show(&Item::User { user: UserId(user), name, password_hash: "", last_id: 0, through: Lsn(0) });
                }
            };
            checkpoint::write(&directory.checkpoints(), layout, 1, (counters, until), items).unwrap();
            let recovered = recover(&directory, START);
            if missing > 0 {
                let is_found = matches!(recovered, Err(DataError::Damaged(..) | DataError::Missing(_)));
                assert!(is_found, "{missing}: {recovered:?}");
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
            let Recovered { state, end, .. } = recover(&directory, START).unwrap();
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
    fn a_segment_that_something_else_links_to_is_not_written_to() {
        let sample = Sample::new(3, 20, true);
        let journal = sample.directory.journal();
        let last = Layout::name(sample.layout.segment(sample.places[5].end()));
        journal.link_into(&last, &journal, "linked").unwrap();
        let before = journal.read("linked").unwrap();
        let (_, recovered) = sample.users().unwrap();
        assert_eq!(journal.status("linked").unwrap().links, 1);
        let mut again = Journal::open(&journal, sample.layout, Access::Buffered, recovered.end).unwrap();
        again
            .write(
                &mut [crate::log::Batch::new(
                    1,
                    recovered.end,
                    7,
                    vec![1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0],
                )],
                Sync::Always,
            )
            .unwrap();
        assert_eq!(journal.read("linked").unwrap(), before);
    }

    #[test]
    fn a_lost_segment_is_found() {
        let sample = Sample::new(8, 1500, true);
        let path = |segment| sample.directory.journal().join(&Layout::name(segment));
        fs::rename(path(2), sample.root.path().join("away")).unwrap();
        assert!(matches!(sample.users(), Err(DataError::Missing(found)) if found == path(2)));
        fs::rename(sample.root.path().join("away"), path(2)).unwrap();
        fs::rename(path(1), sample.root.path().join("away")).unwrap();
        // It may have been removed when a checkpoint covered it.
        assert!(matches!(sample.users(), Err(DataError::NoCheckpoint(_))));
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
        let Recovered { layout, end, .. } = recover(&directory, START).unwrap();
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
        let first = directory.journal().join(&Layout::name(1));
        write(&mut log, &mut journal, 0);
        write(&mut log, &mut journal, 1);
        let used = fs::read(&first).unwrap();
        journal.add(store.prepare(0).unwrap().unwrap());
        write(&mut log, &mut journal, 2);
        // The next write did not come; what the segment held in its earlier use is there instead.
        let second = directory.journal().join(&Layout::name(2));
        let mut bytes = fs::read(&second).unwrap();
        bytes[2 * BLOCK_BYTES..].copy_from_slice(&used[2 * BLOCK_BYTES..]);
        fs::write(&second, &bytes).unwrap();
        let recovered = recover(&directory, START).unwrap();
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
        let path = sample.directory.journal().join(&Layout::name(1));
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
        let second = journal.join(&Layout::name(2));
        fs::write(journal.join("0000000002.tmp"), "half made").unwrap();
        assert!(sample.users().is_ok());
        assert!(!journal.join("0000000002.tmp").exists(), "what was never finished goes");
        let other = Layout { salt: sample.layout.salt ^ 1, ..sample.layout };
        for foreign in [b"something else".to_vec(), Vec::new(), other.header(2)] {
            fs::write(&second, &foreign).unwrap();
            assert!(matches!(sample.users(), Err(DataError::Foreign(path)) if path == second));
        }
    }

    /// The users that are left after a repair, which starts and is whole.
    fn repaired(sample: Sample) -> (Vec<u32>, String) {
        let Sample { root, directory, .. } = sample;
        drop(directory);
        let report = check(root.path(), true).unwrap();
        assert!(report.is_good());
        let again = check(root.path(), false).unwrap();
        assert!(again.is_good(), "{again}");
        let directory = DataDirectory::open(root.path()).unwrap();
        let recovered = recover(&directory, START).unwrap();
        recovered.state.assert_invariants();
        let users = recovered.state.mailboxes().map(|(user, _)| user.0).collect();
        (users, report.to_string())
    }

    #[test]
    fn a_repair_keeps_every_change_but_the_damaged_one_and_gives_no_number_twice() {
        // Of the last batch nobody can say whether it had been synced.
        for damaged in 0..10 {
            let sample = Sample::new(6, 1500, true);
            let place = sample.places[damaged];
            sample.flip(Lsn(place.lsn.0 + 40));
            let (path, _) = sample.file(place.lsn);
            let before = fs::read(&path).unwrap();
            assert!(matches!(sample.users(), Err(DataError::Damaged(..))));
            let kept = path.with_added_extension("damaged-1");
            let Sample { root, directory, .. } = sample;
            drop(directory);
            let report = check(root.path(), true).unwrap().to_string();
            assert!(report.contains(&format!("perhaps the account user{damaged}")), "{report}");
            assert_eq!(fs::read(&kept).unwrap(), before);
            assert!(check(root.path(), false).unwrap().is_good());
            let directory = DataDirectory::open(root.path()).unwrap();
            let state = recover(&directory, START).unwrap().state;
            let users: Vec<u32> = state.mailboxes().map(|(user, _)| user.0).collect();
            assert_eq!(users, (0..12).filter(|user| *user as usize != damaged).collect::<Vec<u32>>());
            assert!(state.next_user().0 > 12, "one that was lost may have had any number");
        }
    }

    #[test]
    fn a_lost_segment_and_a_damaged_header_can_be_gone_over() {
        let sample = Sample::new(8, 1500, true);
        let journal = sample.directory.journal();
        fs::remove_file(journal.join(&Layout::name(2))).unwrap();
        let third = journal.join(&Layout::name(3));
        let mut bytes = fs::read(&third).unwrap();
        bytes[9] ^= 1;
        fs::write(&third, &bytes).unwrap();
        let (users, _) = repaired(sample);
        assert!(users.len() >= 6 && users.contains(&0) && users.contains(&15), "{users:?}");
    }

    #[test]
    fn records_that_cannot_be_told_apart_are_described_together() {
        let sample = Sample::new(4, 20, true);
        for place in &sample.places[1..3] {
            // The length, so that it is not known where the next one stands.
            sample.flip(Lsn(place.lsn.0 + 1));
        }
        let (users, report) = repaired(sample);
        assert_eq!(users, [0, 3, 4, 5, 6, 7]);
        assert!(report.contains("records that cannot be told apart"), "{report}");
    }

    #[test]
    fn what_no_mark_says_was_synced_is_written_once_more() {
        // The torn end is what a failed sync may have left: it was written once more, or is cut off, but is not in between.
        let sample = Sample::new(3, 20, true);
        let (_, recovered) = sample.users().unwrap();
        assert_eq!(recovered.marked, sample.starts[2], "the last batch says so of those before it");
        assert!(recovered.marked < recovered.end);
    }
}
