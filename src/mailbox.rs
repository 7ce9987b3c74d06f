//! A mailbox: a queue of positions. The texts stay in the journal, where they were written.

use std::collections::VecDeque;
use std::ops::Range;

use crate::change::{Lsn, Place};
use crate::record::{BODY_BYTES_MAX, HEADER_BYTES};
use crate::usage::PARTS;

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
    pub(crate) fn share(&self) -> u64 {
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

const _: () = assert!(size_of::<Option<Mailbox>>() == 64);

/// Messages that wait for their reader, oldest first. One takes a line of the processor's cache, and does not stand in two.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Mailbox {
    /// In the order in which they were sent.
    entries: VecDeque<Entry>,
    bytes: u64,
    last_id: u64,
    /// Where the journal says what last came or went; of one that was read from a checkpoint, up to where that holds it.
    changed: Lsn,
}

impl PartialEq for Mailbox {
    /// The same waits, and the same has been given out. How far it is known to hold the journal does not count: a checkpoint
    /// may say more than the last that came.
    fn eq(&self, other: &Self) -> bool {
        (&self.entries, self.bytes, self.last_id) == (&other.entries, other.bytes, other.last_id)
    }
}

impl Eq for Mailbox {}

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

    /// Where the journal says what last came or went, or, of one that was read from a checkpoint, up to where that holds it.
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
    pub(crate) fn restore(last_id: u64, through: Lsn) -> Self {
        Self { last_id, changed: through, ..Self::default() }
    }

    /// Gives out none of the next `count` ids.
    pub(crate) fn skip_ids(&mut self, count: u64) {
        self.last_id = self.last_id.saturating_add(count);
    }

    /// Puts an entry behind the others.
    pub(crate) fn restore_entry(&mut self, entry: Entry) {
        self.push_entry(entry);
    }

    /// True for a message that was in the checkpoint that this was read from, whether it still waits or not.
    #[inline]
    pub(crate) fn holds(&self, lsn: Lsn) -> bool {
        lsn < self.changed
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
        self.changed = self.changed.max(lsn);
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
            mailbox.push(place(number * 100 + 1, 100), 1);
            let len = mailbox.entries.len();
            assert!(len < 16 || mailbox.entries.capacity() * size_of::<Entry>() <= 32 * len, "{len}");
        }
        mailbox.remove(Lsn(1), Lsn(0), Lsn(999_989 * 100 + 1), |_| {});
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
            mailbox.push(place(number * 100 + 1, 100), 4);
        }
        let (before, now) = mailbox.relocate(Lsn(101), place(900, 120), 1).unwrap();
        assert_eq!((before.place(), now.place()), (place(101, 100), place(900, 120)));
        assert_eq!((before.share(), now.share()), (25 * PARTS, 120 * PARTS));
        let order: Vec<(u64, u64)> = mailbox.entries().iter().map(|entry| (entry.sent().0, entry.id(3))).collect();
        assert_eq!(order, [(1, 1), (101, 2), (201, 3)]);
        assert_eq!(mailbox.bytes(), 320);
        assert_eq!(mailbox.relocate(Lsn(900), place(1, 1), 1), None);
    }
}
