//! Compaction: a new checkpoint from the last one and the journal behind it, and what is still needed of segments that
//! hold little else, to be written again at the journal's end.
//!
//! It runs on a thread of its own, and is a replay into a state of its own: nothing is shared with the loop, which goes on
//! meanwhile. A crash at any point of it leaves the last checkpoint and all that is needed with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::change::{FileId, Kept, Lsn, Place, UserId};
use crate::checkpoint::{self, Checkpoint};
use crate::data::DataError;
use crate::recovery;
use crate::segment::{self, Layout};
use crate::state::State;
use crate::texts::Texts;

/// Segments that there may be beside twice what is needed: one that is written, those made ready behind it, and one over.
const SEGMENTS_OVER: u64 = 4;
/// So much is written again after one compaction at most, so that it takes little memory.
const RELOCATED_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// How many segments there may be when so many bytes of messages and small files are needed.
#[must_use]
pub fn segments_max(live: u64, segment_bytes: u64) -> u64 {
    live.saturating_mul(2) / segment_bytes + SEGMENTS_OVER
}

/// What the loop wants compacted.
#[derive(Debug)]
pub struct CompactionJob {
    /// The journal up to here, which is on the disk.
    pub upto: Lsn,
    /// The last checkpoint.
    pub last: Option<Checkpoint>,
    /// The segments that are in use, or made ready.
    pub segments: Vec<u64>,
}

/// What came of it.
#[derive(Debug)]
pub struct Compacted {
    /// The new checkpoint; none when the disk has no room for it.
    pub checkpoint: Option<Checkpoint>,
    /// What should be written again.
    pub relocations: Vec<Relocation>,
}

/// What should be written again, so that the segment that it stands in can go.
#[derive(Debug)]
pub struct Relocation {
    /// Where it stands.
    pub place: Place,
    /// Who needs it.
    pub needed: Needed,
    /// Its record.
    pub record: Vec<u8>,
}

/// Who needs a record.
#[derive(Debug)]
pub enum Needed {
    /// Those in whose mailboxes the message waits.
    Message {
        /// Where it stood when it was sent.
        sent: Lsn,
        /// Whose mailboxes.
        holders: Vec<UserId>,
    },
    /// Whoever lists the file.
    File(FileId),
}

impl Needed {
    /// In how many mailboxes it waits.
    #[must_use]
    pub fn holders(&self) -> usize {
        match self {
            Self::Message { holders, .. } => holders.len(),
            Self::File(_) => 0,
        }
    }
}

/// What is needed of some segments, in the order in which it stands there.
type NeededAt = BTreeMap<Place, Needed>;

/// About what a record takes when it is written again.
fn bytes_again(place: Place, needed: &Needed) -> u64 {
    const HOLDER_BYTES: u64 = 4;
    u64::from(place.bytes) + needed.holders() as u64 * HOLDER_BYTES
}

/// Does it.
#[derive(Debug)]
pub struct Compactor {
    /// Where the segments are.
    pub journal: PathBuf,
    /// Where the checkpoints are.
    pub checkpoints: PathBuf,
    /// How the journal lies in its segments.
    pub layout: Layout,
}

impl Compactor {
    /// Writes the next checkpoint and picks what should be written again.
    ///
    /// # Errors
    /// [`DataError`]; the last checkpoint stays what counts.
    pub fn run(&self, job: &CompactionJob) -> Result<Compacted, DataError> {
        let mut state = State::new(self.layout.segment_bytes);
        if let Some(last) = &job.last {
            checkpoint::read(&self.checkpoints, last.number, |item| state.restore(item))?;
        }
        let from = job.last.map_or(self.layout.first(), |last| last.lsn);
        let (end, _) =
            recovery::replay(&self.journal, self.layout, from, job.upto, |change, place| state.apply(change, place))?;
        if end != job.upto {
            let segment = self.layout.segment(end);
            return Err(DataError::Damaged(Layout::path(&self.journal, segment), self.layout.offset(end)));
        }
        let number = job.last.map_or(1, |last| last.number + 1);
        let written = checkpoint::write(&self.checkpoints, self.layout, number, end, |writer| {
            state.snapshot(|item| writer.put(item))
        });
        match written {
            Ok(checkpoint) => {
                Ok(Compacted { checkpoint: Some(checkpoint), relocations: self.relocations(&state, job) })
            }
            Err(error) if segment::is_full(&error) => Ok(Compacted { checkpoint: None, relocations: Vec::new() }),
            Err(error) => Err(DataError::Io(checkpoint::path(&self.checkpoints, number), error)),
        }
    }

    /// What is needed of the segments that are needed least, as far as there are too many.
    fn relocations(&self, state: &State, job: &CompactionJob) -> Vec<Relocation> {
        let segment_bytes = self.layout.segment_bytes;
        let usage = state.usage();
        let covered = job.segments.iter().copied().filter(|segment| *segment < self.layout.segment(job.upto));
        let (dead, mut used): (Vec<u64>, Vec<u64>) = covered.partition(|segment| usage.of(*segment).records == 0);
        used.sort_unstable_by_key(|segment| usage.of(*segment).live());
        // One fewer than there may be, so that this is not to be done again at once.
        let most = segments_max(usage.live(), segment_bytes) - 1;
        let excess = ((job.segments.len() - dead.len()) as u64).saturating_sub(most);
        let chosen: BTreeSet<u64> = used
            .into_iter()
            .take(usize::try_from(excess).unwrap_or(usize::MAX))
            .take_while(|segment| usage.of(*segment).live() * 2 <= segment_bytes)
            .collect();
        if chosen.is_empty() {
            return Vec::new();
        }
        // One that only ends in a chosen segment keeps it too.
        let is_in_chosen = |place: Place| {
            let last = self.layout.segment(Lsn(place.end().0 - 1));
            chosen.contains(&self.layout.segment(place.lsn)) || chosen.contains(&last)
        };
        let mut needed = NeededAt::new();
        for (user, mailbox) in state.mailboxes() {
            for entry in mailbox.entries().iter().filter(|entry| is_in_chosen(entry.place())) {
                let new = || Needed::Message { sent: entry.sent(), holders: Vec::new() };
                if let Needed::Message { holders, .. } = needed.entry(entry.place()).or_insert_with(new) {
                    holders.push(user);
                }
            }
        }
        for (file, stored) in state.files() {
            if let Kept::Journal(place) = stored.kept
                && is_in_chosen(place)
            {
                needed.insert(place, Needed::File(file));
            }
        }
        // Of messages that wait in a little more than half of their mailboxes, all must be written again.
        let mut written: BTreeMap<u64, u64> = BTreeMap::new();
        for (place, needed) in &needed {
            *written.entry(self.layout.segment(place.lsn)).or_default() += bytes_again(*place, needed);
        }
        let is_worth_it = |segment: u64| {
            chosen.contains(&segment) && written.get(&segment).is_none_or(|bytes| bytes * 4 <= segment_bytes * 3)
        };
        needed.retain(|place, _| {
            is_worth_it(self.layout.segment(place.lsn)) || is_worth_it(self.layout.segment(Lsn(place.end().0 - 1)))
        });
        self.read(needed)
    }

    /// The oldest of these records, as many as may be held in memory.
    fn read(&self, needed: NeededAt) -> Vec<Relocation> {
        let mut left = RELOCATED_BYTES_MAX;
        let some: Vec<_> = needed
            .into_iter()
            .take_while(|(place, needed)| {
                let rest = left.checked_sub(bytes_again(*place, needed));
                left = rest.unwrap_or(0);
                rest.is_some()
            })
            .collect();
        let places: Vec<Place> = some.iter().map(|(place, _)| *place).collect();
        let records = Texts::new(self.journal.clone(), self.layout).read_each(&places);
        // One that is not there any more has been read meanwhile, and its segment freed. One that is damaged stays where it
        // is, and whoever asks for it is told.
        let found = some.into_iter().zip(records).filter_map(|(known, record)| Some((known, record?)));
        found.map(|((place, needed), record)| Relocation { place, needed, record }).collect()
    }
}
