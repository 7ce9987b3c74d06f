//! Compaction: a new checkpoint from the state, and what is still needed of segments that hold little else, to be written
//! again at the journal's end.
//!
//! The loop writes the state down so much a turn, while it goes on changing ([`crate::state`]). What has come meanwhile the
//! journal behind the checkpoint says; what of that is in the checkpoint too it says once more, which changes nothing. A
//! thread of its own puts it all on the disk. It counts once the journal is on the disk as far as it reaches. A crash at any
//! point leaves the last checkpoint and all that is needed with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::change::{FileId, Kept, Lsn, Place, UserId};
use crate::checkpoint::{self, Checkpoint, Draft, Framing, Span};
use crate::data::DataError;
use crate::disk::{Directory, is_full};
use crate::log::Log;
use crate::mailbox::Entry;
use crate::segment::Layout;
use crate::snapshot::Item;
use crate::state::{Portion, State};
use crate::texts::Texts;

/// Segments that there may be beside twice what is needed: one that is written, those made ready behind it, and one over.
const SEGMENTS_OVER: u64 = 4;
/// So much is written again after one compaction at most, so that it takes little memory.
const RELOCATED_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// So much of the state is written down in one turn, more or less,
pub(crate) const BLOCK_BYTES: usize = 128 * 1024;
/// and at most so many pieces of it.
pub const ITEMS_PER_TURN_MAX: usize = 2048;
/// So many blocks may be on their way to the disk; a slower one is waited for.
const BLOCKS_OUT_MAX: usize = 2;

/// How many segments there may be when so many bytes of messages and small files are needed.
#[must_use]
pub fn segments_max(live: u64, segment_bytes: u64) -> u64 {
    live.saturating_mul(2) / segment_bytes + SEGMENTS_OVER
}

/// What the loop wants done of a compaction.
#[derive(Debug)]
pub enum CompactionJob {
    /// Begin a checkpoint of this number.
    Begin(u64),
    /// Go on with these bytes of it.
    Write(Vec<u8>),
    /// It is whole, or would be but for an item that is too long, and the journal is on the disk as far as it reaches.
    Finish {
        /// What it is then.
        checkpoint: Option<Checkpoint>,
        /// What should be written again.
        pick: Pick,
    },
}

/// What came of it.
#[derive(Debug)]
pub enum Compacted {
    /// A block is written; its memory may be used again.
    Written(Vec<u8>),
    /// The new checkpoint is there, and these records are to be written again.
    Done(Checkpoint, Vec<Relocation>),
    /// The disk has no room for it, and it was given up.
    NoRoom,
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

/// About what a record takes when it is written again.
fn bytes_again(place: Place, needed: &Needed) -> u64 {
    u64::from(place.bytes) + needed.holders() as u64 * HOLDER_BYTES
}

const HOLDER_BYTES: u64 = 4;

/// What is needed of the segments that are needed least, as far as there are too many.
#[derive(Debug)]
pub struct Pick {
    layout: Layout,
    segments: BTreeSet<u64>,
    /// In the order in which it stands there.
    needed: BTreeMap<Place, Needed>,
    /// Room for more of it.
    left: u64,
}

impl Pick {
    /// Picks from these segments, of which the checkpoint covers those before `upto`.
    fn new(state: &State, layout: Layout, upto: Lsn, segments: &BTreeSet<u64>) -> Self {
        let (usage, segment_bytes) = (state.usage(), layout.segment_bytes);
        let covered = segments.iter().copied().filter(|segment| *segment < layout.segment(upto));
        let (dead, mut used): (Vec<u64>, Vec<u64>) = covered.partition(|segment| usage.of(*segment).records == 0);
        used.sort_unstable_by_key(|segment| usage.of(*segment).live());
        // One fewer than there may be, so that this is not to be done again at once.
        let most = segments_max(usage.live(), segment_bytes) - 1;
        let excess = ((segments.len() - dead.len()) as u64).saturating_sub(most);
        let mut left = RELOCATED_BYTES_MAX;
        let chosen = used
            .into_iter()
            .take(usize::try_from(excess).unwrap_or(usize::MAX))
            .take_while(|segment| usage.of(*segment).live() * 2 <= segment_bytes)
            // More could not be written again after this one.
            .take_while(|segment| {
                let is_room = left > 0;
                left = left.saturating_sub(usage.of(*segment).live());
                is_room
            });
        let segments = chosen.collect();
        // Of a message to many, each place in a mailbox counts again.
        let left = 2 * RELOCATED_BYTES_MAX.max(segment_bytes);
        Self { layout, segments, needed: BTreeMap::new(), left }
    }

    /// True for what stands in a segment that was picked. One that only ends in it keeps it too.
    fn is_picked(&self, place: Place) -> bool {
        if self.left == 0 {
            return false;
        }
        let last = self.layout.segment(Lsn(place.end().0 - 1));
        self.segments.contains(&self.layout.segment(place.lsn)) || self.segments.contains(&last)
    }

    fn look_at_entries(&mut self, user: UserId, entries: &[Entry]) {
        if !self.segments.is_empty() {
            entries.iter().for_each(|entry| self.look_at_entry(user, entry));
        }
    }

    fn look_at_entry(&mut self, user: UserId, entry: &Entry) {
        let place = entry.place();
        if !self.is_picked(place) {
            return;
        }
        let mut bytes = HOLDER_BYTES;
        let needed = self.needed.entry(place).or_insert_with(|| {
            bytes += u64::from(place.bytes);
            Needed::Message { sent: entry.sent(), holders: Vec::new() }
        });
        if let Needed::Message { holders, .. } = needed {
            holders.push(user);
        }
        self.left = self.left.saturating_sub(bytes);
    }

    fn take(&mut self) -> Self {
        let Self { segments, needed, layout, left } = self;
        Self { segments: std::mem::take(segments), needed: std::mem::take(needed), layout: *layout, left: *left }
    }

    fn look_at(&mut self, item: &Item<'_>) {
        match item {
            Item::Entries { user, entries } => self.look_at_entries(*user, entries),
            Item::File { file, kept: Kept::Journal(place), .. } if self.is_picked(*place) => {
                self.needed.insert(*place, Needed::File(*file));
                self.left = self.left.saturating_sub(u64::from(place.bytes));
            }
            _ => {}
        }
    }

    /// Reads the oldest of these records, as many as may be held in memory.
    fn read(self, journal: Directory) -> Vec<Relocation> {
        let Self { layout, segments, mut needed, .. } = self;
        let segment_of = |lsn: Lsn| layout.segment(lsn);
        // Of messages that wait in a little more than half of their mailboxes, all must be written again.
        let mut written: BTreeMap<u64, u64> = BTreeMap::new();
        for (place, needed) in &needed {
            *written.entry(segment_of(place.lsn)).or_default() += bytes_again(*place, needed);
        }
        let is_worth_it = |segment: u64| {
            segments.contains(&segment)
                && written.get(&segment).is_none_or(|bytes| bytes * 4 <= layout.segment_bytes * 3)
        };
        needed.retain(|place, _| is_worth_it(segment_of(place.lsn)) || is_worth_it(segment_of(Lsn(place.end().0 - 1))));
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
        let records = Texts::new(journal, layout).read_each(&places);
        // One that is not there any more has been read meanwhile, and its segment freed. One that is damaged stays where it
        // is, and whoever asks for it is told.
        let found = some.into_iter().zip(records).filter_map(|(known, record)| Some((known, record?)));
        found.map(|((place, needed), record)| Relocation { place, needed, record }).collect()
    }
}

/// The loop's side of a compaction.
#[derive(Debug)]
pub struct Compaction {
    number: u64,
    framing: Framing,
    span: Span,
    stage: Stage,
    pick: Pick,
    block_bytes: usize,
    blocks_out: usize,
    /// Written down by the last step.
    items: usize,
    spare: Vec<u8>,
    is_begun: bool,
}

#[derive(Debug)]
enum Stage {
    /// More of the state is to be written down.
    Writing,
    /// All is written down; it waits for the journal.
    Written { bytes: Option<u64> },
    /// It is on its way to the disk.
    Finishing,
}

impl Compaction {
    /// A new checkpoint behind `last` of a state as it is now, when its journal ends as `log` does, about so many bytes of it
    /// in a turn.
    #[must_use]
    pub fn new(state: &mut State, log: &Log, last: Option<Checkpoint>, block_bytes: usize) -> Self {
        let (layout, lsn) = (log.layout(), log.end());
        let number = last.map_or(1, |last| last.number + 1);
        let mut block = Vec::new();
        let framing = Framing::begin(layout, number, state.begin_image(lsn), &mut block);
        let pick = Pick::new(state, layout, lsn, log.segments());
        let span = Span { lsn, until: None };
        Self {
            number,
            framing,
            span,
            stage: Stage::Writing,
            pick,
            block_bytes,
            blocks_out: 0,
            items: 0,
            spare: block,
            is_begun: false,
        }
    }

    /// True when a step would do something.
    #[must_use]
    pub fn has_work(&self, synced: Lsn) -> bool {
        match self.stage {
            Stage::Writing => self.blocks_out < BLOCKS_OUT_MAX,
            Stage::Written { .. } => self.span.until.is_none_or(|until| until <= synced),
            Stage::Finishing => false,
        }
    }

    /// How many pieces of the state the last step has written down.
    #[must_use]
    pub fn last_step(&self) -> usize {
        self.items
    }

    /// Does this turn's share. The journal ends at `end`, and is on the disk up to `synced`.
    pub fn step(&mut self, state: &mut State, end: Lsn, synced: Lsn, mut submit: impl FnMut(CompactionJob)) {
        self.items = 0;
        if !self.has_work(synced) {
            return;
        }
        match std::mem::replace(&mut self.stage, Stage::Finishing) {
            Stage::Writing => {
                if !std::mem::replace(&mut self.is_begun, true) {
                    submit(CompactionJob::Begin(self.number));
                }
                let mut block = std::mem::take(&mut self.spare);
                self.stage = if self.write(state, end, &mut block) {
                    state.end_image();
                    self.span.until = Some(end);
                    Stage::Written { bytes: self.framing.end(end, &mut block) }
                } else {
                    Stage::Writing
                };
                self.blocks_out += 1;
                submit(CompactionJob::Write(block));
            }
            Stage::Written { bytes } => {
                let Self { number, span, .. } = *self;
                let checkpoint = bytes.map(|bytes| Checkpoint { number, span, bytes });
                submit(CompactionJob::Finish { checkpoint, pick: self.pick.take() });
            }
            Stage::Finishing => {}
        }
    }

    /// Writes down what comes next, until that is about a block. True when that was all.
    fn write(&mut self, state: &mut State, end: Lsn, block: &mut Vec<u8>) -> bool {
        let Self { framing, pick, block_bytes, items, .. } = self;
        let portion = Portion { items: ITEMS_PER_TURN_MAX, entries: *block_bytes / size_of::<Entry>() + 1 };
        state.write_image(end, portion, &mut |item| {
            pick.look_at(item);
            framing.put(item, block);
            *items += 1;
            block.len() < *block_bytes
        })
    }

    /// Takes back the memory of a block that has been written.
    pub fn written(&mut self, mut block: Vec<u8>) {
        self.blocks_out -= 1;
        if block.capacity() <= 4 * self.block_bytes {
            block.clear();
            self.spare = block;
        }
    }
}

/// Puts checkpoints on the disk.
#[derive(Debug)]
pub struct Compactor {
    journal: Directory,
    checkpoints: Directory,
    /// The one that is being written; none when there was no room for it.
    draft: Option<Draft>,
}

impl Compactor {
    /// For the segments in `journal`, and checkpoints in `checkpoints`.
    #[must_use]
    pub fn new(journal: Directory, checkpoints: Directory) -> Self {
        Self { journal, checkpoints, draft: None }
    }

    /// Does a job. What comes for a checkpoint that was given up comes to nothing.
    ///
    /// # Errors
    /// [`DataError`]; the last checkpoint stays what counts.
    pub fn run(&mut self, job: CompactionJob) -> Result<Option<Compacted>, DataError> {
        let (number, done) = match job {
            CompactionJob::Begin(number) => {
                let begun = Draft::begin(&self.checkpoints, number);
                (
                    number,
                    begun.map(|draft| {
                        self.draft = Some(draft);
                        None
                    }),
                )
            }
            CompactionJob::Write(block) => {
                let Some(draft) = &mut self.draft else { return Ok(None) };
                (draft.number(), draft.write(&block).map(|()| Some(Compacted::Written(block))))
            }
            CompactionJob::Finish { checkpoint, pick } => {
                let Some(draft) = self.draft.take() else { return Ok(None) };
                let number = draft.number();
                let finished = checkpoint.ok_or_else(checkpoint::too_long).and_then(|checkpoint| {
                    draft.finish()?;
                    Ok(Some(Compacted::Done(checkpoint, pick.read(self.journal.clone()))))
                });
                (number, finished)
            }
        };
        done.or_else(|error: io::Error| {
            self.draft = None;
            if is_full(&error) {
                Ok(Some(Compacted::NoRoom))
            } else {
                Err(DataError::Io(self.checkpoints.join(&checkpoint::name(number)), error))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Change, GroupId, SessionId, Target};
    use crate::log::Need;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 16 * 1024 * 1024 };

    fn make(state: &mut State, log: &mut Log, change: &Change<'_>) {
        let place = log.append(change, Need::More).unwrap();
        state.apply(change, place);
        if log.end().0 - log.settled().0 > 1 << 20 {
            let batch = log.take_batch().unwrap();
            let end = batch.end();
            log.settle(batch, end);
        }
    }

    #[test]
    fn a_turn_writes_a_bounded_part_of_a_million_accounts_and_little_of_it_is_in_memory() {
        const ACCOUNTS: u32 = 1_000_000;
        let (mut state, mut log) = (State::new(LAYOUT.segment_bytes), Log::new(LAYOUT, LAYOUT.first()));
        for number in 0..ACCOUNTS {
            let (user, name) = (UserId(number), format!("user{number}"));
            make(&mut state, &mut log, &Change::UserAdded { user, name: &name, password_hash: &"x".repeat(97) });
            let session = SessionId(u128::from(number).to_le_bytes());
            make(&mut state, &mut log, &Change::SessionOpened { session, user, at: 1, elapsed_ms: 1 });
        }
        for number in 0..1000 {
            let (group, name) = (GroupId(number), format!("group{number}"));
            make(
                &mut state,
                &mut log,
                &Change::GroupCreated { group, name: &name, owner: UserId(number), secret_hash: None },
            );
        }
        let mut compaction = Compaction::new(&mut state, &log, None, BLOCK_BYTES);
        let (mut steps, mut items, mut most, mut held) = (0u32, 0, 0, 0);
        let mut out = Vec::new();
        while matches!(compaction.stage, Stage::Writing) {
            // The disk takes a block now and then.
            if steps % 3 == 2
                && let Some(block) = out.pop()
            {
                compaction.written(block);
            }
            // Meanwhile all goes on: groups change before their turn has come, and users go.
            if steps < 500 {
                let (group, user) = (GroupId(steps), UserId(ACCOUNTS - 1 - steps));
                make(&mut state, &mut log, &Change::MemberJoined { group, user });
                make(&mut state, &mut log, &Change::UserRemoved { user });
                let (from, to) = (UserId(1), Target::User(UserId(steps)));
                let message = Change::MessageSent { from, to, at: 1, from_name: "a", to_name: "b", text: "c" };
                make(&mut state, &mut log, &message);
            }
            let end = log.end();
            compaction.step(&mut state, end, end, |job| {
                if let CompactionJob::Write(block) = job {
                    out.push(block);
                }
            });
            steps += 1;
            items += compaction.last_step();
            most = most.max(compaction.last_step());
            held = held.max(out.iter().map(Vec::capacity).sum::<usize>() + state.image_bytes_ahead());
            assert!(out.len() <= BLOCKS_OUT_MAX);
        }
        assert!(items > 2_000_000 - 1000, "{items}");
        assert!(most <= ITEMS_PER_TURN_MAX, "{most} items in one turn");
        assert!(held < 2 * 1024 * 1024, "{held} bytes");
    }
}
