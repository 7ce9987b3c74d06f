//! The loop's side of the journal: it numbers changes, encodes them into the open [`Batch`], and knows what is durable, and
//! which segments there are.
//!
//! It does not know what a change means. Whoever has a segment made must tell it here, or the journal does not go on into it:
//! so its list of segments is the list.

use std::collections::BTreeSet;

use crate::change::{Change, Lsn, Place};
use crate::record;
use crate::segment::Layout;
use crate::tail::Tail;

/// How much of the journal stays in memory behind what is being written.
const TAIL_BYTES: usize = 16 * 1024 * 1024;
/// With more than this on its way to the disk, requests wait.
const IN_FLIGHT_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Changes that become durable together.
#[derive(Debug, Default)]
pub struct Batch {
    /// Batches are numbered in order.
    pub number: u64,
    /// Where it starts.
    pub start: Lsn,
    salt: u32,
    /// Its records, which have no sums until it is written.
    bytes: Vec<u8>,
}

impl Batch {
    /// Records that are whole, or will be.
    #[must_use]
    pub fn new(number: u64, start: Lsn, salt: u32, bytes: Vec<u8>) -> Self {
        Self { number, start, salt, bytes }
    }

    /// What is written of it: its records, with their sums. They are reckoned here, by the thread that writes, which
    /// takes that from the loop; until then no sum holds what waits in memory.
    pub fn seal(&mut self) -> &[u8] {
        record::seal(&mut self.bytes, self.salt, self.start);
        &self.bytes
    }

    /// Where it ends.
    #[must_use]
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }
}

/// The loop's side of the journal.
#[derive(Debug)]
pub struct Log {
    layout: Layout,
    open: Batch,
    tail: Tail,
    /// Replies that tell of what stands before this may go.
    settled: Lsn,
    settled_batch: u64,
    /// What stands before this is on the disk. With [`Sync::Always`] the same.
    synced: Lsn,
    /// A mark in the journal says that what stands before this was on the disk.
    marked: Lsn,
    /// Where the last batch ended that holds a change.
    changed: Lsn,
    /// The segments in use, as far as they have been made.
    segments: BTreeSet<u64>,
    room: Lsn,
    is_full: bool,
    /// Once it ends behind this, changes come faster than the disk takes them or room is made for them.
    wait_behind: Lsn,
    /// A checkpoint has too much to write of what changes while it is made.
    is_held_back: bool,
    spare: Vec<u8>,
}

/// When a reply may tell of what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Once it is on the disk.
    Always,
    /// Once the kernel has it, which writes it to the disk about once a second: a power cut may take back what was
    /// acknowledged in the last second, and while the disk took that. A crash of the server alone may not.
    Interval,
}

/// What a change needs room for: the last of it is kept for what makes room again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It makes the server larger.
    More,
    /// It lets somebody in who may make it smaller.
    Login,
    /// It makes the server smaller, or writes down what cannot be taken back.
    Less,
}

/// There is no room on the disk for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFull;

impl Log {
    /// The log of a journal that ends at `end`, is durable up to there, and has no end of room.
    #[must_use]
    pub fn new(layout: Layout, end: Lsn) -> Self {
        Self {
            layout,
            open: Batch::new(1, end, layout.salt, Vec::new()),
            tail: Tail::new(TAIL_BYTES),
            settled: end,
            settled_batch: 0,
            synced: end,
            marked: end,
            changed: end,
            segments: BTreeSet::new(),
            room: Lsn(u64::MAX),
            is_full: false,
            wait_behind: Lsn(end.0.saturating_add(IN_FLIGHT_BYTES_MAX)),
            is_held_back: false,
            spare: Vec::new(),
        }
    }

    /// The log of a journal that lies in these segments, ends at `end` in the last of them, and says in its marks that all
    /// before `marked` was on the disk.
    #[must_use]
    pub fn open(layout: Layout, end: Lsn, marked: Lsn, segments: BTreeSet<u64>) -> Self {
        let room = layout.start(segments.last().map_or(0, |last| last + 1));
        let mut log = Self { marked, segments, ..Self::new(layout, end) };
        log.set_room(room, false);
        log
    }

    /// The segments in use.
    #[must_use]
    pub fn segments(&self) -> &BTreeSet<u64> {
        &self.segments
    }

    /// Nothing needs this segment any more. False if it was not in use.
    pub fn free_segment(&mut self, segment: u64) -> bool {
        self.segments.remove(&segment)
    }

    /// How the journal lies on the disk.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Keeps about so much of what is on the disk in memory too.
    pub fn set_tail_bytes(&mut self, bytes: usize) {
        self.tail = Tail::new(bytes);
    }

    /// The last of the room is kept for what lets people read and delete; see [`Need`].
    #[must_use]
    pub fn reserve_bytes(&self) -> u64 {
        self.layout.segment_bytes / 16
    }

    /// With less room than this, requests wait; what they have begun may still be ended. A line is at most as long.
    #[must_use]
    pub fn wait_bytes(&self) -> u64 {
        const OVERHEAD_BYTES: u64 = 4096;
        self.layout.segment_bytes / 4 + self.reserve_bytes() + OVERHEAD_BYTES
    }

    /// The longest line that always finds room, as long as there is any.
    #[must_use]
    pub fn line_bytes_max(&self) -> u64 {
        self.layout.segment_bytes / 4
    }

    /// Appends a change to the open batch and says where it stands.
    ///
    /// # Errors
    /// [`DiskFull`] when it would use room that is kept for what matters more.
    #[inline]
    pub fn append(&mut self, change: &Change<'_>, need: Need) -> Result<Place, DiskFull> {
        let kept = match need {
            Need::More => self.reserve_bytes(),
            Need::Login => self.reserve_bytes() / 2,
            Need::Less => 0,
        };
        let room = self.room.0.saturating_sub(kept);
        let before = self.open.bytes.len();
        if before == 0 {
            self.append_mark();
        }
        let lsn = self.open.end();
        let place = record::append_unsealed(&mut self.open.bytes, lsn, |body| change.encode(body));
        if self.open.end().0 > room {
            self.open.bytes.truncate(before);
            return Err(DiskFull);
        }
        Ok(place)
    }

    fn append_mark(&mut self) {
        record::append_mark_unsealed(&mut self.open.bytes, self.open.start, self.synced);
        self.marked = self.synced;
    }

    /// True when all is on the disk and no mark says so: damage to what came last would be taken for the torn end of a write.
    #[must_use]
    pub fn is_mark_due(&self) -> bool {
        let is_room = || self.open.end().0 + record::MARK_BYTES as u64 <= self.room.0;
        self.open.bytes.is_empty() && self.marked < self.changed && self.changed <= self.synced && is_room()
    }

    /// Writes down that all is on the disk, if that is due.
    pub fn mark(&mut self) {
        if self.is_mark_due() {
            self.append_mark();
        }
    }

    /// True when there is room to write down that what is given out now was given out.
    #[must_use]
    pub fn can_deliver(&self) -> bool {
        self.open.end().0.saturating_add(self.reserve_bytes() / 4) <= self.room.0
    }

    /// True when there is room for a change that makes the server larger, as far as can be known before it is there.
    #[must_use]
    pub fn can_grow(&self) -> bool {
        self.open.end().0.saturating_add(self.reserve_bytes()) < self.room.0
    }

    /// Replies that wait for this batch, or one before it, may go.
    #[must_use]
    pub fn settled_batch(&self) -> u64 {
        self.settled_batch
    }

    /// The batch that must be durable before what the state now shows may be told; none if all of it is.
    #[must_use]
    pub fn unsettled(&self) -> Option<u64> {
        let last = if self.open.bytes.is_empty() { self.open.number - 1 } else { self.open.number };
        (last > self.settled_batch).then_some(last)
    }

    /// The batch that must be durable before the change at `lsn` may be shown; none if it is.
    #[must_use]
    pub fn unsettled_at(&self, lsn: Lsn) -> Option<u64> {
        if lsn < self.settled { None } else { self.unsettled() }
    }

    /// Closes the open batch, if it holds anything, and opens the next.
    pub fn take_batch(&mut self) -> Option<Batch> {
        if self.open.bytes.is_empty() {
            return None;
        }
        self.tail.push(self.open.start, &self.open.bytes, self.settled);
        if self.open.bytes.len() > record::MARK_BYTES {
            self.changed = self.open.end();
        }
        let next = Batch::new(self.open.number + 1, self.open.end(), self.layout.salt, std::mem::take(&mut self.spare));
        Some(std::mem::replace(&mut self.open, next))
    }

    /// What stands before this may be told: all that anybody has been told of.
    #[must_use]
    pub fn settled(&self) -> Lsn {
        self.settled
    }

    /// What stands before this is on the disk.
    #[must_use]
    pub fn synced(&self) -> Lsn {
        self.synced
    }

    /// Where the next record will stand.
    #[must_use]
    pub fn end(&self) -> Lsn {
        self.open.end()
    }

    /// True when the open batch holds changes.
    #[must_use]
    pub fn has_open_changes(&self) -> bool {
        !self.open.bytes.is_empty()
    }

    /// Takes the word of the journal thread that `batch`, and all before it, is as durable as it was asked to be, and that
    /// all before `synced` is on the disk. The batch's memory is used again.
    pub fn settle(&mut self, batch: Batch, synced: Lsn) {
        self.settled = self.settled.max(batch.end());
        self.settled_batch = self.settled_batch.max(batch.number);
        self.set_wait();
        self.set_synced(synced);
        if batch.bytes.capacity() > self.spare.capacity() {
            self.spare = batch.bytes;
            self.spare.clear();
        }
    }

    /// Takes the word of whoever syncs the journal that all before `synced` is on the disk.
    pub fn set_synced(&mut self, synced: Lsn) {
        self.synced = self.synced.max(synced);
    }

    /// Takes the word of the journal thread that the disk has room up to `room`, and whether that is all.
    pub fn set_room(&mut self, room: Lsn, is_full: bool) {
        self.room = room;
        self.is_full = is_full;
        // A log without segments has no end of room.
        if room < Lsn(u64::MAX) {
            let next = self.segments.last().map_or(self.layout.segment(self.open.start), |last| last + 1);
            self.segments.extend(next..self.layout.segment(room));
        }
        self.set_wait();
    }

    /// Has requests wait, or no longer.
    pub fn hold_back(&mut self, is_held_back: bool) {
        if self.is_held_back != is_held_back {
            self.is_held_back = is_held_back;
            self.set_wait();
        }
    }

    fn set_wait(&mut self) {
        if self.is_held_back {
            self.wait_behind = Lsn(0);
            return;
        }
        let too_much = self.settled.0.saturating_add(IN_FLIGHT_BYTES_MAX);
        let too_far = if self.is_full { u64::MAX } else { self.room.0.saturating_sub(self.wait_bytes()) };
        self.wait_behind = Lsn(too_much.min(too_far));
    }

    /// Room that is known to be there ahead of the next record.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        self.room.0.saturating_sub(self.open.end().0)
    }

    /// The record at a place, if it is still in memory.
    #[must_use]
    pub fn record(&self, place: Place) -> Option<&[u8]> {
        let Some(start) = place.lsn.0.checked_sub(self.open.start.0) else { return self.tail.record(place) };
        let start = usize::try_from(start).ok()?;
        self.open.bytes.get(start..start + place.bytes as usize)
    }

    /// The records at these places, each if it is still in memory.
    pub fn records(&self, places: impl ExactSizeIterator<Item = Place>) -> Vec<Option<&[u8]>> {
        let mut in_tail = self.tail.lookup();
        let record = |place: Place| if place.lsn < self.open.start { in_tail(place) } else { self.record(place) };
        places.map(record).collect()
    }

    /// True while changes come faster than the disk takes them or room is made for them: they must wait for it, since a
    /// refusal is for a disk that is full.
    #[must_use]
    pub fn must_wait(&self) -> bool {
        self.open.end() > self.wait_behind
    }

    /// The disk had no more room when it was last asked.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.is_full
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::UserId;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 16 * 1024 * 1024 };

    fn change(user: u32) -> Change<'static> {
        Change::Delivered { user: UserId(user), first: Lsn(1), last: Lsn(u64::from(user)) }
    }

    #[test]
    fn a_change_without_room_is_refused_and_the_reserve_is_for_what_makes_smaller() {
        let mut log = Log::new(LAYOUT, Lsn(20));
        let (reserve, wait) = (log.reserve_bytes(), log.wait_bytes());
        log.set_room(Lsn(20 + reserve), true);
        assert_eq!(log.append(&change(1), Need::More), Err(DiskFull));
        assert!(!log.has_open_changes());
        assert!(log.append(&change(1), Need::Less).is_ok());
        assert!(log.append(&change(1), Need::Login).is_ok());
        assert!(!log.must_wait(), "on a full disk there is nothing to wait for");
        log.set_room(Lsn(reserve + 4096), true);
        assert!(log.append(&change(2), Need::More).is_ok());
        log.set_room(Lsn(wait), false);
        assert!(log.must_wait());
        log.set_room(Lsn(wait * 2), false);
        assert!(!log.must_wait());
    }

    #[test]
    fn what_is_not_durable_names_the_batch_to_wait_for() {
        let mut log = Log::new(LAYOUT, Lsn(20));
        assert_eq!(log.unsettled(), None);
        let place = log.append(&change(1), Need::More).unwrap();
        assert_eq!(log.unsettled_at(place.lsn), Some(1));
        let batch = log.take_batch().unwrap();
        assert_eq!(log.unsettled(), Some(1));
        let end = batch.end();
        log.settle(batch, end);
        assert_eq!(log.unsettled_at(place.lsn), None);
        assert_eq!(log.unsettled(), None);
    }

    #[test]
    fn a_mark_is_due_once_all_is_on_the_disk_and_then_no_more() {
        let mut log = Log::new(LAYOUT, Lsn(24));
        assert!(!log.is_mark_due(), "nothing was written");
        log.append(&change(1), Need::More).unwrap();
        let batch = log.take_batch().unwrap();
        let (start, end) = (batch.start, batch.end());
        log.settle(batch, start);
        assert!(!log.is_mark_due(), "it is not on the disk");
        log.set_synced(end);
        assert!(log.is_mark_due());
        log.mark();
        assert!(!log.is_mark_due());
        let mut mark = log.take_batch().unwrap();
        let start = mark.start;
        assert_eq!(record::mark_of(record::claimed_body(mark.seal()).unwrap(), start), Some(end));
        let end = mark.end();
        log.settle(mark, end);
        assert!(!log.is_mark_due(), "a mark needs no mark");
        log.append(&change(2), Need::More).unwrap();
        let batch = log.take_batch().unwrap();
        let end = batch.end();
        log.settle(batch, end);
        log.set_room(Lsn(end.0 + 8), true);
        assert!(!log.is_mark_due(), "a full disk goes without");
    }

    #[test]
    fn whoever_makes_segments_they_are_in_the_list() {
        let layout = Layout { segment_bytes: 4096, ..LAYOUT };
        let mut log = Log::open(layout, Lsn(4096 * 7 + 16), Lsn(4096 * 7), BTreeSet::from([3, 7]));
        log.set_room(layout.start(10), false);
        assert_eq!(*log.segments(), BTreeSet::from([3, 7, 8, 9]));
        assert!(log.free_segment(7) && !log.free_segment(7));
        log.set_room(layout.start(10), true);
        assert_eq!(*log.segments(), BTreeSet::from([3, 8, 9]));
    }

    #[test]
    fn a_record_can_be_read_from_the_open_batch_and_from_the_one_on_its_way() {
        let mut log = Log::new(LAYOUT, Lsn(20));
        let places = [1, 2, 3].map(|user| {
            let place = log.append(&change(user), Need::More).unwrap();
            if user != 3 {
                log.take_batch().unwrap();
            }
            place
        });
        for (place, user) in places.into_iter().zip(1..) {
            let body = record::claimed_body(log.record(place).unwrap()).unwrap();
            assert_eq!(Change::decode(body), Some(change(user)));
        }
        assert_eq!(log.record(Place { lsn: log.end(), bytes: 10 }), None);
    }

    #[test]
    fn with_much_on_its_way_to_the_disk_requests_wait() {
        let mut log = Log::new(LAYOUT, Lsn(20));
        let text = "x".repeat(1 << 20);
        let sent = |text| Change::UserAdded { user: UserId(1), name: text, password_hash: "" };
        for _ in 0..9 {
            log.append(&sent(&text), Need::More).unwrap();
        }
        assert!(log.must_wait());
        let batch = log.take_batch().unwrap();
        let end = batch.end();
        log.settle(batch, end);
        assert!(!log.must_wait());
    }
}
