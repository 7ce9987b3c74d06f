//! The journal thread's side of the journal: batches in, overwritten segments out, synced, or left for another to sync.
//!
//! It writes whole blocks. The last block of what was written so far is kept in memory and written again with what
//! follows it; behind the end there is zero for as long as the head of a record, so that a reader finds none there. The
//! bytes that were in the block before stay the same, so a write of it that power cuts in two loses nothing of them.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crate::aligned::{AlignedBuffer, BLOCK_BYTES};
use crate::change::Lsn;
use crate::disk::{Directory, FileRef, Mode, read_exact_at, write_all_at};
use crate::log::{Batch, Sync};
use crate::record;
use crate::segment::{Access, Layout, Segment};

/// Written at once at most.
const WRITE_BYTES: usize = 1024 * 1024;
/// How long written batches wait until they are handed over to be synced, with [`Sync::Interval`].
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// With so many full segments they wait no longer: each has a file descriptor.
const UNSYNCED_MAX: usize = 16;

/// The end of the journal on the disk.
#[derive(Debug)]
pub struct Journal {
    directory: Directory,
    layout: Layout,
    access: Access,
    open: Segment,
    /// Those that come next.
    next: VecDeque<Segment>,
    /// Begins with what has been written of the block that the next byte goes into.
    buffer: AlignedBuffer,
    filled: usize,
    /// Where in the stream `buffer` stands.
    start: Lsn,
    /// Up to here it has synced it itself.
    synced: Lsn,
    /// Full segments that are neither synced nor handed over.
    unsynced: Vec<FileRef>,
    /// When the oldest batch was written that is neither.
    unsynced_since: Option<Instant>,
}

/// What the journal has written and is not on the disk yet.
#[derive(Debug)]
pub struct Unsynced {
    files: Vec<FileRef>,
    end: Lsn,
}

impl Unsynced {
    /// Makes it durable. Says where it ends.
    ///
    /// # Errors
    /// As for [`Journal::write`].
    pub fn sync(self) -> io::Result<Lsn> {
        for file in self.files {
            file.sync_data()?;
        }
        Ok(self.end)
    }
}

impl Journal {
    /// Goes on writing at `end`, which is in a segment that is there, and behind which there are zeros.
    ///
    /// # Errors
    /// What the disk said.
    pub fn open(directory: &Directory, layout: Layout, access: Access, end: Lsn) -> io::Result<Self> {
        let number = layout.segment(end);
        let mut buffer = AlignedBuffer::new(WRITE_BYTES + 2 * BLOCK_BYTES);
        let filled = usize::try_from(end.0 % BLOCK_BYTES as u64).unwrap_or(0);
        let start = Lsn(end.0 - filled as u64);
        let file = directory.open(&Layout::name(number), Mode::Read)?;
        read_exact_at(&*file, &mut buffer.bytes_mut()[..filled], layout.offset(start))?;
        Ok(Self {
            directory: directory.clone(),
            layout,
            access,
            open: Segment::open(directory, number, access)?,
            next: VecDeque::new(),
            buffer,
            filled,
            start,
            synced: end,
            unsynced: Vec::new(),
            unsynced_since: None,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Where the next batch will stand.
    #[must_use]
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.filled as u64)
    }

    /// What stands before this is on the disk. What is handed over to be synced does not count.
    #[must_use]
    pub fn synced(&self) -> Lsn {
        self.synced
    }

    /// Takes the segment that comes behind those that it has.
    pub fn add(&mut self, segment: Segment) {
        self.next.push_back(segment);
    }

    /// Writes batches, in order, and makes them as durable as `sync` asks.
    ///
    /// # Errors
    /// What the disk said. What it holds then is not known: nothing of these batches may be told to anybody, and the
    /// journal must not be written to again. A sync that failed is never tried again.
    pub fn write(&mut self, batches: &mut [Batch], sync: Sync) -> io::Result<()> {
        for batch in batches {
            debug_assert_eq!(batch.start, self.end());
            self.append(batch.seal())?;
        }
        self.flush()?;
        if sync == Sync::Always {
            return self.sync();
        }
        self.unsynced_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As for [`Self::write`].
    fn sync(&mut self) -> io::Result<()> {
        if self.access != Access::Direct && self.synced < self.end() {
            for file in self.unsynced.drain(..) {
                file.sync_data()?;
            }
            self.open.file.sync_data()?;
        }
        self.unsynced_since = None;
        self.synced = self.end();
        Ok(())
    }

    /// What was written and is perhaps not on the disk yet, for another thread to sync, so that writes need not wait for it.
    pub fn take_unsynced(&mut self) -> Unsynced {
        let mut files = std::mem::take(&mut self.unsynced);
        files.push(FileRef::clone(&self.open.file));
        self.unsynced_since = None;
        Unsynced { files, end: self.end() }
    }

    /// In how long what was written should be synced; never, if all is synced or on its way.
    #[must_use]
    pub fn sync_due(&self) -> Option<Duration> {
        if self.unsynced.len() >= UNSYNCED_MAX {
            return Some(Duration::ZERO);
        }
        self.unsynced_since.map(|since| SYNC_INTERVAL.saturating_sub(since.elapsed()))
    }

    /// Ends the journal cleanly, once all that was handed over is synced: a last mark says that all before it was synced, so that damage to it can be told from a
    /// torn end.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn close(mut self) -> io::Result<()> {
        self.sync()?;
        let mut mark = Vec::new();
        record::append_mark(&mut mark, self.layout.salt, self.end(), self.synced);
        let room = self.layout.start(self.open.number + 1 + self.next.len() as u64);
        // On a full disk it goes without: the mark is for the case of damage alone.
        if self.end().0 + mark.len() as u64 > room.0 {
            return Ok(());
        }
        self.append(&mark)?;
        self.flush()?;
        self.sync()
    }

    /// Puts bytes behind the end, and writes what fills the buffer or the segment.
    fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = self.layout.start(self.open.number + 1).0 - self.end().0;
            if room == 0 {
                self.go_on()?;
                continue;
            }
            let count = bytes.len().min(WRITE_BYTES - self.filled).min(usize::try_from(room).unwrap_or(usize::MAX));
            let (now, later) = bytes.split_at(count);
            self.buffer.bytes_mut()[self.filled..self.filled + count].copy_from_slice(now);
            self.filled += count;
            bytes = later;
            if self.filled == WRITE_BYTES || count as u64 == room {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes what is in the buffer, and keeps what is in the last block of it.
    fn flush(&mut self) -> io::Result<()> {
        if self.filled == 0 {
            return Ok(());
        }
        let room = self.layout.start(self.layout.segment(self.start) + 1).0 - self.start.0;
        let whole = self.filled - self.filled % BLOCK_BYTES;
        // There is room for the head of a record that is none.
        let end = (self.filled + record::HEADER_BYTES).next_multiple_of(BLOCK_BYTES);
        let end = end.min(usize::try_from(room).unwrap_or(usize::MAX));
        self.buffer.bytes_mut()[self.filled..end].fill(0);
        write_all_at(&*self.open.file, &self.buffer.bytes()[..end], self.layout.offset(self.start))?;
        self.buffer.bytes_mut().copy_within(whole..self.filled, 0);
        self.filled -= whole;
        self.start.0 += whole as u64;
        Ok(())
    }

    /// Goes on in the next segment.
    fn go_on(&mut self) -> io::Result<()> {
        let missing = || io::Error::other("the next segment of the journal is not there");
        let next = self.next.pop_front().ok_or_else(missing)?;
        let full = std::mem::replace(&mut self.open, next);
        if self.access != Access::Direct {
            self.unsynced.push(full.file);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Records;
    use crate::segment::{SegmentStore, Stream};
    use proptest::prelude::*;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 16 * 1024 };

    /// An empty one, and the segments that it is written to.
    fn new_journal(path: &Directory, access: Access) -> (SegmentStore, Journal) {
        let mut store = SegmentStore::new(path.clone(), LAYOUT, access, 0, 0);
        store.prepare(0).unwrap().unwrap();
        (store, Journal::open(path, LAYOUT, access, LAYOUT.first()).unwrap())
    }

    /// A record that takes so many bytes, without its sum.
    fn record_of(bytes: usize) -> Vec<u8> {
        let mut out = Vec::new();
        record::append_unsealed(&mut out, Lsn(0), |body| body.resize(body.len() + bytes - record::HEADER_BYTES, 1));
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn batches_of_any_size_come_back_from_any_segments(
            sizes in proptest::collection::vec((1usize..3, 1usize..6000), 1..30),
            is_direct: bool,
            restart in 0usize..30,
        ) {
            let root = tempfile::tempdir().unwrap();
            let path = &Directory::on_system(root.path());
            let access = if is_direct { Access::probe(path).unwrap() } else { Access::Buffered };
            let (mut store, mut journal) = new_journal(path, access);
            let (mut written, mut number) = (Vec::new(), 0);
            for (index, (batches, size)) in sizes.into_iter().enumerate() {
                if index == restart {
                    let end = journal.end();
                    journal = Journal::open(path, LAYOUT, access, end).unwrap();
                    for segment in LAYOUT.segment(end) + 1..=store.count() {
                        journal.add(Segment::open(path, segment, access).unwrap());
                    }
                }
                let mut end = journal.end();
                let mut batches: Vec<Batch> = (0..batches).map(|_| {
                    let mut bytes = Vec::new();
                    written.push(record::append_unsealed(&mut bytes, end, |body| body.resize(body.len() + size, 1)));
                    number += 1;
                    let batch = Batch::new(number, end, 7, bytes);
                    end = batch.end();
                    batch
                }).collect();
                while LAYOUT.segment(end) > store.count() {
                    journal.add(store.prepare(0).unwrap().unwrap());
                }
                journal.write(&mut batches, Sync::Always).unwrap();
                prop_assert_eq!(journal.synced(), end);
            }
            let mut records = Records::new(Stream::new(path, LAYOUT, LAYOUT.first(), Lsn(u64::MAX)), 7, LAYOUT.first());
            for place in written {
                prop_assert_eq!(records.read().unwrap().map(|(found, _)| found), Some(place));
            }
            prop_assert!(records.read().unwrap().is_none());
        }
    }

    #[test]
    fn what_is_handed_over_to_be_synced_is_all_that_was_written() {
        let root = tempfile::tempdir().unwrap();
        let path = &Directory::on_system(root.path());
        let (mut store, mut journal) = new_journal(path, Access::Seldom);
        journal.add(store.prepare(0).unwrap().unwrap());
        assert_eq!(journal.sync_due(), None);
        let write = |journal: &mut Journal, number| {
            let batch = Batch::new(number, journal.end(), 7, record_of(10_000));
            journal.write(&mut [batch], Sync::Interval).unwrap();
        };
        // Into the second segment.
        write(&mut journal, 1);
        write(&mut journal, 2);
        assert!(journal.sync_due().is_some());
        assert_eq!(journal.synced(), LAYOUT.first());
        let unsynced = journal.take_unsynced();
        assert_eq!((unsynced.files.len(), unsynced.end), (2, journal.end()));
        assert_eq!(journal.sync_due(), None, "it is on its way");
        let end = journal.end();
        write(&mut journal, 3);
        assert!(journal.sync_due().is_some());
        assert_eq!(unsynced.sync().unwrap(), end);
        assert_eq!(journal.take_unsynced().files.len(), 1);
    }

    #[test]
    fn many_full_segments_are_handed_over_before_their_time() {
        let root = tempfile::tempdir().unwrap();
        let path = &Directory::on_system(root.path());
        let (mut store, mut journal) = new_journal(path, Access::Seldom);
        for number in 0..=UNSYNCED_MAX as u64 {
            assert_ne!(journal.sync_due(), Some(Duration::ZERO));
            journal.add(store.prepare(0).unwrap().unwrap());
            journal.write(&mut [Batch::new(number, journal.end(), 7, record_of(16 * 1024))], Sync::Interval).unwrap();
        }
        assert_eq!(journal.sync_due(), Some(Duration::ZERO));
        assert_eq!(journal.take_unsynced().files.len(), UNSYNCED_MAX + 1);
        assert_eq!(journal.sync_due(), None);
    }

    #[test]
    fn a_reader_finds_zeros_behind_the_end_wherever_it_is() {
        let root = tempfile::tempdir().unwrap();
        let path = &Directory::on_system(root.path());
        let mut store = SegmentStore::new(path.clone(), LAYOUT, Access::Buffered, 0, 0);
        store.prepare(0).unwrap().unwrap();
        // What a use of the segment before this one has left.
        let file = path.open(&Layout::name(1), Mode::Write).unwrap();
        write_all_at(&*file, &[0xee; 16 * 1024], BLOCK_BYTES as u64).unwrap();
        let mut journal = Journal::open(path, LAYOUT, Access::Buffered, LAYOUT.first()).unwrap();
        for (number, bytes) in [104, 3992, 4088, 16, 4088, 4000].into_iter().enumerate() {
            let batch = Batch::new(number as u64, journal.end(), 7, record_of(bytes));
            journal.write(&mut [batch], Sync::Always).unwrap();
            let mut behind = [1; 8];
            let reader = path.open(&Layout::name(1), Mode::Read).unwrap();
            if LAYOUT.segment(journal.end()) == 1 {
                read_exact_at(&*reader, &mut behind, LAYOUT.offset(journal.end())).unwrap();
                assert_eq!(behind, [0; 8]);
            }
        }
    }
}
