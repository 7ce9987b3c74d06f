//! From the disk to the state: the newest checkpoint, and then the journal behind it, up to its end.
//!
//! Records are read up to the first that is not whole. If a later mark says that this place had been synced, it is damage,
//! and opening fails; if none does, it is the torn end of a write that nobody was told of, and is wiped out, so that
//! nothing of it can ever be taken for what is written there next.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::info;

use crate::change::{Change, Lsn, Place};
use crate::checkpoint::{self, Checkpoint};
use crate::data::{self, DataDirectory, DataError};
use crate::record::{self, HEADER_BYTES, Records};
use crate::segment::{self, Access, Layout, SegmentStore, Stream};
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
    /// A write that nobody was told of had been cut off by a crash.
    pub is_torn: bool,
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
        Some(newest) => Some(checkpoint::read(&checkpoints, *newest, |item| state.restore(item))?.1),
        None => None,
    };
    let from = checkpoint.map_or(layout.first(), |checkpoint| checkpoint.lsn);
    found.check_is_there(layout, from, &journal)?;
    let mut progress = Progress::new(from, found.end(layout));
    let (end, changes) = replay(&journal, layout, from, Lsn(u64::MAX), |change, place| {
        state.apply(change, place);
        progress.look(place.lsn);
    })?;
    if synced_past(&journal, layout, &found.segments, end).map_err(failed)? {
        return Err(DataError::Damaged(Layout::path(&journal, layout.segment(end)), layout.offset(end)));
    }

    // What comes behind the end was made ready for later, or was written and never synced.
    let last = layout.segment(end);
    let mut segments = found.segments;
    for segment in segments.split_off(&(last + 1)) {
        segment::remove(&Layout::path(&journal, segment)).map_err(failed)?;
    }
    data::sync(&journal).map_err(failed)?;
    let is_torn = begins_record(&journal, layout, end).map_err(failed)?;
    if segments.contains(&last) {
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
    Ok(Recovered { layout, state, end, checkpoint, segments, changes, is_torn })
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
    })
}

fn prepare(journal: &Path, layout: Layout, access: Access, segment: u64) -> Result<(), DataError> {
    let failed = |error| DataError::Io(Layout::path(journal, segment), error);
    let made = SegmentStore::new(journal.to_owned(), layout, access, segment - 1, 0).prepare().map_err(failed)?;
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
        }
        Ok(Self { layout, segments, checkpoints: checkpoints_found })
    }

    /// Makes sure that the segment is there in which reading begins.
    fn check_is_there(&self, layout: Layout, from: Lsn, journal: &Path) -> Result<(), DataError> {
        let segment = layout.segment(from);
        // A checkpoint may end where a segment ends behind which there was no room for another.
        let is_end = layout.start(segment) == from && self.segments.contains(&(segment - 1));
        if self.segments.contains(&segment) || is_end {
            return Ok(());
        }
        Err(DataError::Missing(Layout::path(journal, segment)))
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
