//! What is still needed of the journal's segments: records of messages that wait, and of files that are kept in it.

use std::collections::{BTreeSet, VecDeque};

use crate::change::Place;
use crate::mailbox::Entry;

/// Shares are counted in this part of a byte: a short message may wait in many mailboxes.
pub(crate) const PARTS: u64 = 1 << 16;

/// How much of each segment is still needed.
#[derive(Debug)]
pub struct Usage {
    segment_bytes: u64,
    /// The segment of the first of `segments`.
    first: u64,
    segments: VecDeque<SegmentUse>,
    /// In parts of a byte, as in [`SegmentUse`].
    live: u64,
    records: u64,
    /// Of which messages, each as often as it waits.
    messages: usize,
    /// Those that lost the last record that is needed.
    emptied: BTreeSet<u64>,
}

/// What is needed of one segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentUse {
    /// Records that begin or end in it, each as often as it is needed: by every mailbox that a message waits in.
    pub records: u64,
    /// Their size in parts of a byte, counted where they begin.
    live: u64,
}

impl SegmentUse {
    /// The size of the records that begin in it, as far as they are needed: a message that waits in half of its mailboxes
    /// counts half.
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
        Self {
            segment_bytes,
            first: 0,
            segments: VecDeque::new(),
            live: 0,
            records: 0,
            messages: 0,
            emptied: BTreeSet::new(),
        }
    }

    /// What is needed of a segment.
    #[must_use]
    pub fn of(&self, segment: u64) -> SegmentUse {
        let index = segment.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.segments.get(index)).copied().unwrap_or_default()
    }

    /// The size of all that is needed.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.live / PARTS
    }

    /// How many messages and files are needed, a message as often as it waits.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records
    }

    /// How many messages wait in all mailboxes.
    #[must_use]
    pub fn messages(&self) -> usize {
        self.messages
    }

    /// The segments of which something is needed.
    pub fn needed_segments(&self) -> impl Iterator<Item = u64> {
        (self.first..).zip(&self.segments).filter(|(_, slot)| slot.records > 0).map(|(segment, _)| segment)
    }

    /// Segments that nothing is needed of any more since this was last asked.
    pub(crate) fn take_emptied(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.emptied)
    }

    pub(crate) fn add(&mut self, entry: &Entry) {
        self.messages += 1;
        self.count(entry.place(), entry.share());
    }

    pub(crate) fn remove(&mut self, entry: &Entry) {
        self.messages -= 1;
        self.discount(entry.place(), entry.share());
    }

    /// The same for a record that is needed as a whole.
    pub(crate) fn add_file(&mut self, place: Place) {
        self.count(place, u64::from(place.bytes) * PARTS);
    }

    pub(crate) fn remove_file(&mut self, place: Place) {
        self.discount(place, u64::from(place.bytes) * PARTS);
    }

    fn count(&mut self, place: Place, share: u64) {
        self.live += share;
        self.records += 1;
        let (begin, end) = self.span(place);
        let slot = self.slot(begin);
        slot.live += share;
        slot.records += 1;
        for segment in begin + 1..=end {
            self.slot(segment).records += 1;
        }
    }

    fn discount(&mut self, place: Place, share: u64) {
        self.live -= share;
        self.records -= 1;
        let (begin, end) = self.span(place);
        let slot = self.slot(begin);
        slot.live -= share;
        slot.records -= 1;
        let mut is_any_empty = slot.records == 0;
        for segment in begin + 1..=end {
            let slot = self.slot(segment);
            slot.records -= 1;
            is_any_empty |= slot.records == 0;
        }
        if is_any_empty {
            for segment in begin..=end {
                if self.of(segment).records == 0 {
                    self.emptied.insert(segment);
                }
            }
            while self.segments.front() == Some(&SegmentUse::default()) {
                self.segments.pop_front();
                self.first += 1;
            }
        }
    }

    fn span(&self, place: Place) -> (u64, u64) {
        let (begin, offset) = (place.lsn.0 / self.segment_bytes, place.lsn.0 % self.segment_bytes);
        // Nearly every record ends in the segment that it begins in, and a division takes as long as all the rest.
        let is_within = offset + u64::from(place.bytes) <= self.segment_bytes;
        (begin, if is_within { begin } else { (place.end().0 - 1) / self.segment_bytes })
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
    use crate::change::Lsn;

    fn place(lsn: u64, bytes: u32) -> Place {
        Place { lsn: Lsn(lsn), bytes }
    }

    #[test]
    fn usage_counts_a_record_in_every_segment_that_it_touches() {
        let mut usage = Usage::new(1000);
        let [whole, straddling] = [Entry::new(1, place(5100, 100), 1), Entry::new(2, place(5950, 100), 2)];
        usage.add(&straddling);
        usage.add(&whole);
        assert_eq!(usage.of(5), SegmentUse { records: 2, live: 150 * PARTS });
        assert_eq!(usage.of(6), SegmentUse { records: 1, live: 0 });
        assert_eq!(usage.live(), 150);
        usage.remove(&straddling);
        assert_eq!(usage.of(6), SegmentUse::default());
        let earlier = Entry::new(3, place(2000, 10), 1);
        usage.add(&earlier);
        usage.remove(&whole);
        assert_eq!((usage.of(2).records, usage.of(5).records), (1, 0));
        usage.remove(&earlier);
        assert_eq!(usage.live(), 0);
    }
}
