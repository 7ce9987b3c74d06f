//! What the loop does for the disk, a little in each turn: it has segments made ahead, lets go of those that nothing
//! needs, has the journal compacted when that is due, and writes again what compaction picked.
//!
//! A segment is needed as long as no checkpoint covers it, and as long as a mailbox has a message in it, or a list a file.

use std::collections::{BTreeSet, VecDeque};

use tracing::{debug, info, warn};

use crate::change::{Change, FileId, Holders, Kept, Lsn, Place, UserId};
use crate::checkpoint::Checkpoint;
use crate::compaction::{BLOCK_BYTES, Compacted, Compaction, Needed, Relocation, segments_max};
use crate::engine::{Host, Job};
use crate::log::{Log, Need};
use crate::record;
use crate::space::{SpaceDone, SpaceJob};
use crate::state::State;
use crate::takeover;

/// Records written again in one turn, so that nobody waits for it,
const RELOCATIONS_PER_TURN_MAX: usize = 64;
/// and about so many bytes of them.
const RELOCATED_BYTES_PER_TURN_MAX: usize = 256 * 1024;
/// Mailboxes that one record names, since it counts in each of them; a message that waits in more is written again more
/// than once.
const HOLDERS_MAX: usize = 64;
/// A holder is about as much work as so many bytes.
const HOLDER_BYTES: usize = 64;
/// Requests wait while more than this is kept of what changed before its turn in a checkpoint.
const AHEAD_BYTES_MAX: usize = 2 * 1024 * 1024;
/// A checkpoint takes about this for each message that waits.
const CHECKPOINT_BYTES_PER_ENTRY: u64 = 24;
/// What else it takes, at least.
const CHECKPOINT_BYTES: u64 = 1024 * 1024;
/// How long a full disk waits to be asked again, and a compaction that found no room to be tried again.
const RETRY_MS: u64 = 1000;

/// What a data directory held when the server began, beside its journal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Holdings {
    /// The last checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// There is a copy of the data in an older format.
    pub has_copy: bool,
}

/// What the loop knows of the disk.
#[derive(Debug)]
pub(crate) struct Upkeep {
    checkpoint: Option<Checkpoint>,
    has_copy: bool,
    disk: Option<SpaceDone>,
    /// Segments that nothing needs once the journal is on the disk up to a position.
    freed: VecDeque<(Lsn, u64)>,
    outdated: Vec<u64>,
    /// A space job is under way.
    is_asked: bool,
    /// And it was to make a segment.
    is_more_wanted: bool,
    retry_at: u64,
    compaction: Option<Compaction>,
    /// A checkpoint is written down about so much at once.
    pub(crate) block_bytes: usize,
    compact_at: u64,
    /// The disk had no room for the last one.
    is_checkpoint_refused: bool,
    /// A compaction was of no use when the journal ended here and so much waited.
    useless: Option<(Lsn, u64)>,
    relocations: VecDeque<Relocation>,
    /// Backups that are being made: nothing may go meanwhile.
    holds: usize,
    /// What was held at the beginning has been looked at.
    is_begun: bool,
}

impl Upkeep {
    pub(crate) fn new(holdings: Holdings) -> Self {
        let Holdings { checkpoint, has_copy } = holdings;
        Self {
            checkpoint,
            has_copy,
            disk: None,
            freed: VecDeque::new(),
            outdated: Vec::new(),
            is_asked: false,
            is_more_wanted: false,
            retry_at: 0,
            compaction: None,
            block_bytes: BLOCK_BYTES,
            compact_at: 0,
            is_checkpoint_refused: false,
            useless: None,
            relocations: VecDeque::new(),
            holds: 0,
            is_begun: false,
        }
    }

    /// Does this turn's share.
    pub(crate) fn turn(
        &mut self,
        state: &mut State,
        log: &mut Log,
        checkpoint_bytes: u64,
        now: u64,
        host: &mut impl Host,
    ) {
        // A clock that was set back holds nothing up for long.
        self.retry_at = self.retry_at.min(now + RETRY_MS);
        self.compact_at = self.compact_at.min(now + RETRY_MS);
        self.relocate(state, log);
        if !std::mem::replace(&mut self.is_begun, true) {
            self.free_unneeded(state, log);
        }
        for segment in state.take_emptied_segments() {
            self.free_if_unneeded(segment, state, log);
        }
        self.ask_for_space(state, log, now, host);
        self.compact(state, log, checkpoint_bytes, now, host);
        log.hold_back(state.image_bytes_ahead() > AHEAD_BYTES_MAX);
    }

    /// True when a turn would go on with a compaction, write something again, or let go of something.
    pub(crate) fn has_work(&self, log: &Log) -> bool {
        let has_freed = self.freed.front().is_some_and(|(end, _)| *end <= log.synced()) || !self.outdated.is_empty();
        let may_free = has_freed && self.holds == 0 && !self.is_asked;
        let is_compacting = self.compaction.as_ref().is_some_and(|compaction| compaction.has_work(log.synced()));
        may_free || is_compacting || (!self.relocations.is_empty() && !log.must_wait())
    }

    /// When a turn is due at the latest.
    pub(crate) fn next_deadline(&self, state: &State, log: &Log, checkpoint_bytes: u64) -> Option<u64> {
        let space = (log.is_full() && !self.is_asked).then_some(self.retry_at);
        let compaction = self.is_compaction_due(state, log, checkpoint_bytes).then_some(self.compact_at);
        space.into_iter().chain(compaction).min()
    }

    /// Takes what the disk has.
    pub(crate) fn space_done(&mut self, done: SpaceDone, log: &mut Log, now: u64) {
        self.is_asked = false;
        // Nothing new is known of a disk that was not asked for more.
        let is_full = if self.is_more_wanted { done.is_full } else { log.is_full() };
        let was_full = log.is_full();
        log.set_room(done.room, is_full);
        self.has_copy = done.has_copy;
        if self.is_more_wanted && is_full {
            self.retry_at = now + RETRY_MS;
        }
        if is_full && !was_full {
            warn!("the disk is full: what needs room is refused until there is some");
        } else if was_full && !is_full {
            info!("the disk has room again");
        }
        self.disk = Some(done);
    }

    /// Takes what came of a compaction: at last a new checkpoint, and what should be written again.
    pub(crate) fn compacted(&mut self, compacted: Compacted, state: &mut State, log: &mut Log, now: u64) {
        let (checkpoint, relocations) = match compacted {
            Compacted::Written(block) => {
                if let Some(compaction) = &mut self.compaction {
                    compaction.written(block);
                }
                return;
            }
            Compacted::NoRoom => {
                self.compaction = None;
                state.end_image();
                if !std::mem::replace(&mut self.is_checkpoint_refused, true) {
                    warn!("the disk has no room for a checkpoint; it is tried again until it has");
                }
                self.compact_at = now + RETRY_MS;
                return;
            }
            Compacted::Done(checkpoint, relocations) => (checkpoint, relocations),
        };
        self.compaction = None;
        self.is_checkpoint_refused = false;
        debug!(number = checkpoint.number, bytes = checkpoint.bytes, moves = relocations.len(), "checkpoint made");
        self.outdated.extend(self.checkpoint.replace(checkpoint).map(|last| last.number));
        let before = self.freed.len();
        self.free_unneeded(state, log);
        let is_useful = self.freed.len() > before || !relocations.is_empty();
        self.useless = (!is_useful).then_some((checkpoint.span.lsn, state.usage().live()));
        self.relocations.extend(relocations);
    }

    /// Nothing goes until [`Self::release`]. Says what the disk holds: the segments, and the last checkpoint.
    pub(crate) fn hold(&mut self, log: &Log) -> (Vec<u64>, Option<Checkpoint>) {
        self.holds += 1;
        // What is freed already may be needed by what is on the disk until now.
        let freed = self.freed.iter().map(|(_, segment)| *segment);
        let segments: BTreeSet<u64> = log.segments().iter().copied().chain(freed).collect();
        (segments.into_iter().collect(), self.checkpoint)
    }

    /// Ends a hold.
    pub(crate) fn release(&mut self) {
        self.holds -= 1;
    }

    /// Something must stay as it is.
    pub(crate) fn is_held(&self) -> bool {
        self.holds > 0
    }

    fn free_unneeded(&mut self, state: &State, log: &mut Log) {
        for segment in log.segments().iter().copied().collect::<Vec<u64>>() {
            self.free_if_unneeded(segment, state, log);
        }
    }

    fn free_if_unneeded(&mut self, segment: u64, state: &State, log: &mut Log) {
        let covered = self.checkpoint.map_or(0, |checkpoint| log.layout().segment(checkpoint.span.lsn));
        let is_needed = segment >= covered || state.usage().of(segment).records > 0;
        if !is_needed && log.free_segment(segment) {
            self.freed.push_back((log.end(), segment));
        }
    }

    fn ask_for_space(&mut self, state: &State, log: &Log, now: u64, host: &mut impl Host) {
        if self.is_asked {
            return;
        }
        let mut job = SpaceJob::default();
        if self.holds == 0 {
            let synced = log.synced();
            while let Some((_, segment)) = self.freed.pop_front_if(|(end, _)| *end <= synced) {
                job.freed.push(segment);
            }
            job.outdated = std::mem::take(&mut self.outdated);
        }
        let segment_bytes = log.layout().segment_bytes;
        let is_time = !log.is_full() || now >= self.retry_at || !job.freed.is_empty();
        job.is_more_wanted = is_time && log.room_bytes() < segment_bytes + segment_bytes / 2;
        job.segments_max = segments_max(state.usage().live(), segment_bytes);
        // A disk without room for a checkpoint would stay full.
        job.kept_free = CHECKPOINT_BYTES.min(segment_bytes)
            + state.usage().records() * CHECKPOINT_BYTES_PER_ENTRY
            + self.checkpoint.map_or(0, |last| last.bytes);
        // On a full disk it gives way first.
        job.is_copy_outdated = self.has_copy && (state.elapsed_ms() >= takeover::KEPT_MS || log.is_full());
        let has_too_many = self.disk.is_some_and(|disk| disk.spare > 0 && disk.segments > job.segments_max);
        let has_more = job.is_more_wanted || job.is_copy_outdated || has_too_many;
        if has_more || !job.freed.is_empty() || !job.outdated.is_empty() {
            self.is_asked = true;
            self.is_more_wanted = job.is_more_wanted;
            host.submit(Job::Space(job));
        }
    }

    /// Begins a compaction when one is due, and goes on with it.
    fn compact(&mut self, state: &mut State, log: &Log, checkpoint_bytes: u64, now: u64, host: &mut impl Host) {
        if now >= self.compact_at && self.is_compaction_due(state, log, checkpoint_bytes) {
            self.compaction = Some(Compaction::new(state, log, self.checkpoint, self.block_bytes));
        }
        if let Some(compaction) = &mut self.compaction {
            compaction.step(state, log.end(), log.synced(), |job| host.submit(Job::Compact(job)));
        }
    }

    /// True when the journal behind the last checkpoint is too long, or when there are as many segments as there may be, or
    /// no room for more; but not when the last one was of no use and little has changed since.
    fn is_compaction_due(&self, state: &State, log: &Log, checkpoint_bytes: u64) -> bool {
        if self.compaction.is_some() || self.holds > 0 || !self.relocations.is_empty() || self.disk.is_none() {
            return false;
        }
        let (segment_bytes, live) = (log.layout().segment_bytes, state.usage().live());
        let from = self.checkpoint.map_or(log.layout().first(), |last| last.span.lsn);
        let since = log.synced().0.saturating_sub(from.0);
        let is_long = since > checkpoint_bytes.max(self.checkpoint.map_or(0, |last| last.bytes));
        let is_large = log.segments().len() as u64 >= segments_max(live, segment_bytes);
        let is_of_use = self.useless.is_none_or(|(end, waited)| {
            let little = segment_bytes / 8;
            log.synced().0 - end.0 >= little || live + little <= waited
        });
        is_long || ((is_large || log.is_full()) && is_of_use)
    }

    /// Writes some records again.
    fn relocate(&mut self, state: &mut State, log: &mut Log) {
        let mut bytes = 0;
        for _ in 0..RELOCATIONS_PER_TURN_MAX {
            if log.must_wait() || bytes > RELOCATED_BYTES_PER_TURN_MAX {
                return;
            }
            let Some(relocation) = self.relocations.pop_front() else { return };
            if !relocate_one(&relocation, state, log) {
                // What is freed when it can be freed comes first; the next compaction picks again.
                self.relocations.clear();
                return;
            }
            bytes += relocation.record.len() + relocation.needed.holders() * HOLDER_BYTES;
        }
    }
}

/// Writes again what is still needed; false when there is no room for it.
fn relocate_one(relocation: &Relocation, state: &mut State, log: &mut Log) -> bool {
    let Relocation { place, needed, record } = relocation;
    let Some(change) = record::claimed_body(record).and_then(Change::decode) else { return true };
    match needed {
        Needed::Message { sent, holders } => relocate_message(&change, *place, *sent, holders, state, log),
        Needed::File(file) => relocate_file(&change, *place, *file, state, log),
    }
}

/// Writes a message again for the mailboxes in which it still waits.
fn relocate_message(
    change: &Change<'_>,
    place: Place,
    sent: Lsn,
    holders: &[UserId],
    state: &mut State,
    log: &mut Log,
) -> bool {
    let (from, to, at, from_name, to_name, text) = match *change {
        Change::MessageSent { from, to, at, from_name, to_name, text } => {
            (Some(from), to, at, from_name, to_name, text)
        }
        Change::MessageMoved { from, to, at, from_name, to_name, text, .. } => (from, to, at, from_name, to_name, text),
        _ => return true,
    };
    let still: Vec<_> = holders
        .iter()
        .filter(|user| {
            let entry = state.mailbox(**user).and_then(|mailbox| mailbox.entry(sent));
            entry.is_some_and(|entry| entry.place() == place)
        })
        .collect();
    for some in still.chunks(HOLDERS_MAX) {
        let mut packed = Vec::new();
        for user in some {
            Holders::pack(&mut packed, **user);
        }
        let holders = Holders::new(&packed);
        let moved = Change::MessageMoved { sent, from, to, at, from_name, to_name, text, holders };
        if !rewrite(&moved, state, log) {
            return false;
        }
    }
    true
}

/// Writes a file again that is still listed.
fn relocate_file(change: &Change<'_>, place: Place, file: FileId, state: &mut State, log: &mut Log) -> bool {
    let is_there = state.file(file).is_some_and(|stored| stored.kept == Kept::Journal(place));
    match change.content().filter(|_| is_there) {
        Some(content) => rewrite(&Change::FileMoved { file, content }, state, log),
        None => true,
    }
}

/// It makes room where there is none, so it may have some of what is kept.
fn rewrite(change: &Change<'_>, state: &mut State, log: &mut Log) -> bool {
    let Ok(place) = log.append(change, Need::Login) else { return false };
    state.apply(change, place);
    true
}
