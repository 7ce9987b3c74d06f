//! A mailbox: a queue of positions. The texts stay in the journal, where they were written.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use crate::change::{Lsn, Place};
use crate::record::{BODY_BYTES_MAX, HEADER_BYTES};

/// A message in a mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its record stood when it was sent.
    sent: Lsn,
    /// Where it stands.
    lsn: Lsn,
    /// Its size in the lower bits, and above them the least power of two of mailboxes that share it.
    size: u32,
    /// The lower half of its id.
    id: u32,
}

// A pending message takes this, and at most a quarter more for the room that a queue grows into.
const _: () = assert!(size_of::<Entry>() == 24);

/// Shares are counted in this part of a byte: a short message may wait in many mailboxes.
const PARTS: u64 = 1 << 16;
const SIZE_BITS: u32 = 27;
const POWER_MAX: u32 = u32::BITS - 1;
const SIZE_MASK: u32 = (1 << SIZE_BITS) - 1;
const _: () = assert!(BODY_BYTES_MAX + HEADER_BYTES <= SIZE_MASK as usize);

impl Entry {
    /// An entry for the record at `place`, which so many mailboxes share.
    #[must_use]
    pub fn new(id: u64, place: Place, holders: usize) -> Self {
        let power = (usize::BITS - holders.saturating_sub(1).leading_zeros()).min(POWER_MAX);
        let size = place.bytes.min(SIZE_MASK) | power << SIZE_BITS;
        Self { sent: place.lsn, lsn: place.lsn, size, id: low_half(id) }
    }

    /// Where its record stood when it was sent: the order of a mailbox.
    #[must_use]
    pub fn sent(&self) -> Lsn {
        self.sent
    }

    /// Where its record stands.
    #[must_use]
    pub fn place(&self) -> Place {
        Place { lsn: self.lsn, bytes: self.size & SIZE_MASK }
    }

    /// What this mailbox has of the record's size when it shares the record with others, in parts of a byte; together they
    /// have no more than the record.
    fn share(&self) -> u64 {
        let parts = u64::from(self.size & SIZE_MASK) * PARTS;
        parts >> (self.size >> SIZE_BITS)
    }

    /// Its id in the mailbox that has given `last_id` last: it grows by message, and is never given twice.
    #[must_use]
    pub fn id(&self, last_id: u64) -> u64 {
        // What waits in a mailbox was sent within the last four billion messages to it.
        last_id.saturating_sub(u64::from(low_half(last_id).wrapping_sub(self.id)))
    }

    /// What is written of it.
    pub(crate) fn parts(&self) -> (Lsn, Lsn, u32, u32) {
        (self.sent, self.lsn, self.size, self.id)
    }

    /// The entry of which this was written.
    pub(crate) fn from_parts((sent, lsn, size, id): (Lsn, Lsn, u32, u32)) -> Option<Self> {
        (size & SIZE_MASK > 0).then_some(Self { sent, lsn, size, id })
    }
}

fn low_half(number: u64) -> u32 {
    u32::try_from(number & u64::from(u32::MAX)).unwrap_or(0)
}

/// Messages that wait for their reader, oldest first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mailbox {
    /// In the order in which they were sent.
    entries: VecDeque<Entry>,
    bytes: u64,
    last_id: u64,
    changed: Lsn,
}

impl Mailbox {
    /// What waits, oldest first.
    #[must_use]
    pub fn entries(&self) -> &VecDeque<Entry> {
        &self.entries
    }

    /// The size of the records that wait.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The id of the last message that ever came.
    #[must_use]
    pub fn last_id(&self) -> u64 {
        self.last_id
    }

    /// When in the order of changes a message last came or went.
    #[must_use]
    pub fn changed(&self) -> Lsn {
        self.changed
    }

    /// Where the first entry stands that was sent at `lsn` or later.
    #[must_use]
    pub fn position(&self, lsn: Lsn) -> usize {
        self.entries.partition_point(|entry| entry.sent < lsn)
    }

    /// The entry that was sent at `lsn`.
    #[must_use]
    pub fn entry(&self, lsn: Lsn) -> Option<&Entry> {
        self.entries.get(self.position(lsn)).filter(|entry| entry.sent == lsn)
    }

    /// Begins with what a mailbox that is empty now has seen before.
    pub(crate) fn restore(last_id: u64, changed: Lsn) -> Self {
        Self { last_id, changed, ..Self::default() }
    }

    /// Puts an entry behind the others.
    pub(crate) fn restore_entry(&mut self, entry: Entry) {
        self.push_entry(entry);
    }

    /// Takes a new message.
    pub(crate) fn push(&mut self, place: Place, holders: usize) -> Entry {
        self.changed = place.lsn;
        self.last_id += 1;
        let entry = Entry::new(self.last_id, place, holders);
        self.push_entry(entry);
        entry
    }

    fn push_entry(&mut self, entry: Entry) {
        if self.entries.len() == self.entries.capacity() {
            // A queue that doubles would have half of its memory for nothing.
            self.entries.reserve_exact((self.entries.len() / 4).max(4));
        }
        self.bytes += u64::from(entry.place().bytes);
        self.entries.push_back(entry);
    }

    /// Takes away the messages from the first to the last, by when they were sent, and shows each.
    pub(crate) fn remove(&mut self, lsn: Lsn, first: Lsn, last: Lsn, mut removed: impl FnMut(&Entry)) {
        self.changed = lsn;
        let Range { start, end } = self.position(first)..self.position(last.next());
        if start >= end {
            return;
        }
        for entry in self.entries.drain(start..end) {
            self.bytes -= u64::from(entry.place().bytes);
            removed(&entry);
        }
        if self.entries.len() < self.entries.capacity() / 4 {
            self.entries.shrink_to(self.entries.len() * 2);
        }
    }

    /// Puts another place in the entry that was sent at `sent`; gives back the entry as it was, and as it is.
    pub(crate) fn relocate(&mut self, sent: Lsn, place: Place, holders: usize) -> Option<(Entry, Entry)> {
        let at = self.position(sent);
        let entry = self.entries.get_mut(at).filter(|entry| entry.sent == sent)?;
        let now = Entry { sent, id: entry.id, ..Entry::new(0, place, holders) };
        let before = std::mem::replace(entry, now);
        self.bytes = self.bytes - u64::from(before.place().bytes) + u64::from(now.place().bytes);
        Some((before, now))
    }
}

/// How much of each segment is still needed for messages that wait.
#[derive(Debug)]
pub struct Usage {
    segment_bytes: u64,
    /// The segment of the first of `segments`.
    first: u64,
    segments: VecDeque<SegmentUse>,
    /// In parts of a byte, as in [`SegmentUse`].
    live: u64,
    entries: u64,
    /// Those that lost their last entry.
    emptied: BTreeSet<u64>,
}

/// What is needed of one segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentUse {
    /// Mailbox entries whose record begins or ends in it.
    pub entries: u64,
    /// Their shares of their records in parts of a byte, counted where the record begins.
    live: u64,
}

impl SegmentUse {
    /// The size of the messages that begin in it, as far as they wait: one that waits in half of its mailboxes counts half.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.live / PARTS
    }
}

impl PartialEq for Usage {
    /// The same is needed of the same segments.
    fn eq(&self, other: &Self) -> bool {
        let used = |usage: &Self| -> Vec<(u64, SegmentUse)> {
            let slots = (usage.first..).zip(usage.segments.iter().copied());
            slots.filter(|(_, slot)| *slot != SegmentUse::default()).collect()
        };
        self.segment_bytes == other.segment_bytes && self.live == other.live && used(self) == used(other)
    }
}

impl Eq for Usage {}

impl Usage {
    pub(crate) fn new(segment_bytes: u64) -> Self {
        Self { segment_bytes, first: 0, segments: VecDeque::new(), live: 0, entries: 0, emptied: BTreeSet::new() }
    }

    /// What is needed of a segment.
    #[must_use]
    pub fn of(&self, segment: u64) -> SegmentUse {
        let index = segment.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.segments.get(index)).copied().unwrap_or_default()
    }

    /// The size of all messages that wait.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.live / PARTS
    }

    /// How many entries there are in all mailboxes.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Segments that lost their last entry since this was last asked.
    pub(crate) fn take_emptied(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.emptied)
    }

    pub(crate) fn add(&mut self, entry: &Entry) {
        self.live += entry.share();
        self.entries += 1;
        let (begin, end) = self.span(entry);
        self.slot(begin).live += entry.share();
        for segment in begin..=end {
            self.slot(segment).entries += 1;
        }
    }

    pub(crate) fn remove(&mut self, entry: &Entry) {
        self.live -= entry.share();
        self.entries -= 1;
        let (begin, end) = self.span(entry);
        self.slot(begin).live -= entry.share();
        for segment in begin..=end {
            let slot = self.slot(segment);
            slot.entries -= 1;
            if slot.entries == 0 {
                self.emptied.insert(segment);
            }
        }
        while self.segments.front() == Some(&SegmentUse::default()) {
            self.segments.pop_front();
            self.first += 1;
        }
    }

    fn span(&self, entry: &Entry) -> (u64, u64) {
        (entry.lsn.0 / self.segment_bytes, (entry.place().end().0 - 1) / self.segment_bytes)
    }

    fn slot(&mut self, segment: u64) -> &mut SegmentUse {
        if self.segments.is_empty() {
            self.first = segment;
        }
        while segment < self.first {
            self.segments.push_front(SegmentUse::default());
            self.first -= 1;
        }
        let index = usize::try_from(segment - self.first).unwrap_or(usize::MAX);
        if index >= self.segments.len() {
            self.segments.resize(index + 1, SegmentUse::default());
        }
        &mut self.segments[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(lsn: u64, bytes: u32) -> Place {
        Place { lsn: Lsn(lsn), bytes }
    }

    #[test]
    fn a_pending_message_takes_at_most_32_bytes_however_many_there_are() {
        let mut mailbox = Mailbox::default();
        for number in 0..1_000_000 {
            mailbox.push(place(number * 100, 100), 1);
            let len = mailbox.entries.len();
            assert!(len < 16 || mailbox.entries.capacity() * size_of::<Entry>() <= 32 * len, "{len}");
        }
        mailbox.remove(Lsn(1), Lsn(0), Lsn(999_989 * 100), |_| {});
        assert_eq!(mailbox.entries.len(), 10);
        assert!(mailbox.entries.capacity() < 1000, "what was read gives its memory back");
        assert_eq!((mailbox.bytes(), mailbox.last_id()), (1000, 1_000_000));
        let ids: Vec<u64> = mailbox.entries().iter().map(|entry| entry.id(mailbox.last_id())).collect();
        assert_eq!(ids, (999_991..=1_000_000).collect::<Vec<u64>>());
    }

    #[test]
    fn an_id_is_whole_again_beyond_32_bits() {
        for id in [1, u64::from(u32::MAX), u64::from(u32::MAX) + 1, 1 << 40] {
            let entry = Entry::new(id, place(9, 100), 1);
            for later in [0, 1, 1000, u64::from(u32::MAX)] {
                assert_eq!(entry.id(id + later), id);
            }
        }
    }

    #[test]
    fn shares_of_a_record_are_never_more_than_the_record() {
        for holders in [1, 2, 3, 7, 8, 9, 100] {
            let all = Entry::new(1, place(9, 1000), holders).share() * holders as u64;
            assert!((500 * PARTS..=1000 * PARTS).contains(&all), "{holders}");
        }
        // However short it is and however many there are.
        assert!(Entry::new(1, place(9, 40), 60_000).share() > 0);
        assert_eq!(Entry::new(1, place(9, 1000), 0).share(), 1000 * PARTS);
        assert_eq!(Entry::new(1, place(9, 1000), usize::MAX).place(), place(9, 1000));
    }

    #[test]
    fn a_message_that_is_written_again_keeps_its_order_and_its_id() {
        let mut mailbox = Mailbox::default();
        for number in 0..3 {
            mailbox.push(place(number * 100, 100), 4);
        }
        let (before, now) = mailbox.relocate(Lsn(100), place(900, 120), 1).unwrap();
        assert_eq!((before.place(), now.place()), (place(100, 100), place(900, 120)));
        assert_eq!((before.share(), now.share()), (25 * PARTS, 120 * PARTS));
        let order: Vec<(u64, u64)> = mailbox.entries().iter().map(|entry| (entry.sent().0, entry.id(3))).collect();
        assert_eq!(order, [(0, 1), (100, 2), (200, 3)]);
        assert_eq!(mailbox.bytes(), 320);
        assert_eq!(mailbox.relocate(Lsn(900), place(1, 1), 1), None);
    }

    #[test]
    fn usage_counts_a_record_in_every_segment_that_it_touches() {
        let mut usage = Usage::new(1000);
        let [whole, straddling] = [Entry::new(1, place(5100, 100), 1), Entry::new(2, place(5950, 100), 2)];
        usage.add(&straddling);
        usage.add(&whole);
        assert_eq!(usage.of(5), SegmentUse { entries: 2, live: 150 * PARTS });
        assert_eq!(usage.of(6), SegmentUse { entries: 1, live: 0 });
        assert_eq!(usage.live(), 150);
        usage.remove(&straddling);
        assert_eq!(usage.of(6), SegmentUse::default());
        let earlier = Entry::new(3, place(2000, 10), 1);
        usage.add(&earlier);
        usage.remove(&whole);
        assert_eq!((usage.of(2).entries, usage.of(5).entries), (1, 0));
        usage.remove(&earlier);
        assert_eq!(usage.live(), 0);
    }
}
