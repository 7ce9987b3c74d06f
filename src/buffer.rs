//! The two buffers of a connection: bytes that came in and are not handled yet, and bytes that are to go out.
//!
//! Both are a run of memory with cursors; neither knows of sockets. An empty buffer holds no memory, so an idle
//! connection costs what its struct costs.

use std::collections::VecDeque;
use std::iter;
use std::ops::Range;

use memchr::memchr;

/// Memory a read buffer starts with.
const READ_BYTES_START: usize = 16 * 1024;
/// Room below which a read buffer makes more before it is filled.
const READ_ROOM_MIN: usize = 4 * 1024;
/// One that was full grows up to this, even if what is left in it leaves room.
const READ_BYTES_BUSY: usize = 64 * 1024;
/// What is written is cut off a write buffer in pieces of at least this size, so that little is moved often.
const WRITE_BYTES_MOVED: usize = 16 * 1024;

/// Memory of more than this is not used again for another connection: that of a read buffer, which would count as the next
/// one's, and that of a write buffer, which long replies need.
pub(crate) const READ_SPARE_BYTES_MAX: usize = 64 * 1024;
pub(crate) const WRITE_SPARE_BYTES_MAX: usize = 256 * 1024;
/// So much is kept for others in all.
const SPARES_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Memory that buffers have let go, for the next that need some.
#[derive(Debug)]
pub(crate) struct Spares {
    spares: Vec<Vec<u8>>,
    bytes: usize,
    /// Of one of them.
    spare_bytes_max: usize,
}

impl Spares {
    /// None yet, and none that takes more than this.
    pub(crate) fn new(spare_bytes_max: usize) -> Self {
        Self { spares: Vec::new(), bytes: 0, spare_bytes_max }
    }

    /// The memory that was let go last, which is the likeliest to be in a cache.
    pub(crate) fn take(&mut self) -> Option<Vec<u8>> {
        let spare = self.spares.pop()?;
        self.bytes -= spare.capacity();
        Some(spare)
    }

    /// Keeps memory, if it is not large and there is not much.
    pub(crate) fn keep(&mut self, spare: Option<Vec<u8>>) {
        if let Some(spare) = spare
            && spare.capacity() <= self.spare_bytes_max
            && self.bytes + spare.capacity() <= SPARES_BYTES_MAX
        {
            self.bytes += spare.capacity();
            self.spares.push(spare);
        }
    }
}

/// Bytes as they came from the peer.
///
/// `consumed <= scanned <= filled <= bytes.len()`: up to `consumed` they are handled, up to `scanned` there is no line
/// end, so that a byte is searched once however slowly its line comes.
#[derive(Debug, Default)]
pub struct ReadBuffer {
    bytes: Vec<u8>,
    consumed: usize,
    scanned: usize,
    filled: usize,
    /// How far it was ever filled since it was taken.
    used: usize,
}

/// What a read buffer holds at its front.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A whole line: where its content stands (the line end is not in it), and how much of the buffer it takes up.
    Whole {
        /// For [`ReadBuffer::slice`].
        content: Range<usize>,
        /// Content and line end, for [`ReadBuffer::consume`].
        length: usize,
    },
    /// No line end yet, and the line may still be short enough.
    Partial,
    /// The line is longer than allowed, wherever it ends.
    TooLong,
}

impl ReadBuffer {
    /// Bytes that are not handled yet.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.consumed..self.filled]
    }

    /// The bytes of a range that [`Self::line`] gave.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).unwrap_or_default()
    }

    /// Room to read into: all that there is, and at least a few KiB.
    pub fn room(&mut self) -> &mut [u8] {
        if self.bytes.len() - self.filled < READ_ROOM_MIN {
            self.make_room();
        }
        &mut self.bytes[self.filled..]
    }

    /// Takes so much memory, no less, and no more as soon as what is pending lets it.
    pub fn fit(&mut self, bytes: usize) {
        if self.bytes.len() == bytes {
            return;
        }
        self.move_to_front();
        self.bytes.resize(bytes.max(self.filled), 0);
        self.bytes.shrink_to_fit();
    }

    /// Counts `count` bytes of what [`Self::room`] gave as filled.
    pub fn fill(&mut self, count: usize) {
        self.filled = (self.filled + count).min(self.bytes.len());
        self.used = self.used.max(self.filled);
        self.invariants();
    }

    /// The whole lines that are there and no longer than `bytes_max`, up to the first that is not: each without its line end,
    /// and with it. [`Self::line`] searches them once more.
    pub fn lines(&self, bytes_max: usize) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (mut start, mut searched) = (self.consumed, self.scanned);
        iter::from_fn(move || {
            let end = searched + memchr(b'\n', self.bytes.get(searched..self.filled)?)?;
            let content = self.without_return(start..end);
            let whole = start..end + 1;
            (start, searched) = (end + 1, end + 1);
            (content.len() <= bytes_max).then(|| (&self.bytes[content], &self.bytes[whole]))
        })
    }

    /// The line at the front, if its content is at most `bytes_max`.
    #[inline]
    pub fn line(&mut self, bytes_max: usize) -> Line {
        let found = memchr(b'\n', &self.bytes[self.scanned..self.filled]);
        self.scanned = found.map_or(self.filled, |at| self.scanned + at);
        self.invariants();
        let length = self.scanned - self.consumed;
        if found.is_some() {
            let content = self.without_return(self.consumed..self.scanned);
            if content.len() > bytes_max {
                return Line::TooLong;
            }
            Line::Whole { content, length: length + 1 }
        } else if length > bytes_max + 1 {
            // One more than the most content may be the carriage return of a line that is just short enough.
            Line::TooLong
        } else {
            Line::Partial
        }
    }

    /// What stands before the end of the stream, as [`Self::line`] would give it had a line end followed.
    #[must_use]
    pub fn last_line(&self, bytes_max: usize) -> Line {
        let content = self.without_return(self.consumed..self.filled);
        if content.len() > bytes_max {
            return Line::TooLong;
        }
        Line::Whole { content, length: self.filled - self.consumed }
    }

    /// Counts `count` bytes as handled.
    pub fn consume(&mut self, count: usize) {
        self.consumed = (self.consumed + count).min(self.filled);
        self.scanned = self.scanned.max(self.consumed);
        if self.consumed == self.filled {
            self.consumed = 0;
            self.scanned = 0;
            self.filled = 0;
        }
        self.invariants();
    }

    /// Gives the memory of an empty buffer away, for another connection to read into. Tokens and passwords do not stay in it.
    pub fn release(&mut self) -> Option<Vec<u8>> {
        if self.filled > 0 || self.bytes.is_empty() {
            return None;
        }
        let used = std::mem::take(&mut self.used).min(self.bytes.len());
        self.bytes[..used].fill(0);
        Some(std::mem::take(&mut self.bytes))
    }

    /// Takes memory to read into, if there is none yet.
    pub fn adopt(&mut self, spare: Vec<u8>) {
        if self.bytes.is_empty() {
            self.bytes = spare;
        }
    }

    /// True when the buffer has memory, empty or not.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The memory that it holds.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    fn without_return(&self, line: Range<usize>) -> Range<usize> {
        if self.bytes[line.clone()].ends_with(b"\r") { line.start..line.end - 1 } else { line }
    }

    /// Moves what is pending to the front; if that does not give room enough, takes twice the memory.
    fn make_room(&mut self) {
        // More came than there was room for, and the next who gets this memory may send as much.
        let is_busy = self.filled == self.bytes.len() && self.filled < READ_BYTES_BUSY;
        self.move_to_front();
        if is_busy || self.bytes.len() - self.filled < READ_ROOM_MIN {
            self.bytes.resize((self.bytes.len() * 2).max(READ_BYTES_START), 0);
        }
    }

    fn move_to_front(&mut self) {
        self.bytes.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.scanned -= self.consumed;
        self.consumed = 0;
    }

    fn invariants(&self) {
        debug_assert!(self.consumed <= self.scanned);
        debug_assert!(self.scanned <= self.filled);
        debug_assert!(self.filled <= self.bytes.len());
    }
}

/// Replies on their way to the peer.
///
/// `written <= released <= filled`: what stands between `released` and `filled` waits for a journal batch to become
/// durable. Gates say which: everything before a gate's end waits for its batch.
#[derive(Debug, Default)]
pub struct WriteBuffer {
    bytes: Vec<u8>,
    written: usize,
    released: usize,
    sealed: usize,
    gates: VecDeque<Gate>,
    /// Where `bytes` starts in all that this connection was ever sent.
    start: u64,
}

#[derive(Debug)]
struct Gate {
    end: u64,
    batch: u64,
}

impl WriteBuffer {
    /// Where a reply is appended; [`Self::seal`] must follow.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Ends what was appended: it may leave at once, or when `batch` is durable. Never before what stands in front of it.
    pub fn seal(&mut self, batch: Option<u64>) {
        self.sealed = self.bytes.len();
        let end = self.end();
        match (self.gates.back_mut(), batch) {
            (None, None) => self.released = self.sealed,
            (Some(last), None) => last.end = end,
            (Some(last), Some(batch)) if last.batch >= batch => last.end = end,
            (_, Some(batch)) => self.gates.push_back(Gate { end, batch }),
        }
        self.invariants();
    }

    /// Lets go what waited for batches up to `batch`.
    pub fn release(&mut self, batch: u64) {
        while let Some(gate) = self.gates.front() {
            if gate.batch > batch {
                break;
            }
            self.released = usize::try_from(gate.end - self.start).unwrap_or(self.sealed);
            self.gates.pop_front();
        }
        if self.gates.is_empty() {
            self.released = self.sealed;
        }
        self.invariants();
    }

    /// The batch that the next bytes wait for, if they wait.
    #[must_use]
    pub fn waits_for(&self) -> Option<u64> {
        self.gates.front().map(|gate| gate.batch)
    }

    /// What may be written now.
    #[must_use]
    pub fn ready(&self) -> &[u8] {
        &self.bytes[self.written..self.released]
    }

    /// Counts `count` bytes as taken by the kernel.
    pub fn advance(&mut self, count: usize) {
        self.written = (self.written + count).min(self.released);
        if self.written == self.bytes.len() {
            self.start += self.written as u64;
            self.written = 0;
            self.released = 0;
            self.sealed = 0;
            if self.bytes.len() <= WRITE_SPARE_BYTES_MAX {
                // A token does not stay in memory that another connection gets.
                self.bytes.fill(0);
            }
            self.bytes.clear();
        } else if self.written > self.bytes.len() / 2 && self.written > WRITE_BYTES_MOVED {
            self.bytes.drain(..self.written);
            self.start += self.written as u64;
            self.released -= self.written;
            self.sealed -= self.written;
            self.written = 0;
        }
        self.invariants();
    }

    /// Gives the memory of an empty buffer away, for another connection's replies.
    pub fn release_memory(&mut self) -> Option<Vec<u8>> {
        (self.bytes.is_empty() && self.bytes.capacity() > 0).then(|| std::mem::take(&mut self.bytes))
    }

    /// Takes memory for replies, if there is none yet.
    pub fn adopt(&mut self, spare: Vec<u8>) {
        if self.bytes.capacity() == 0 {
            self.bytes = spare;
        }
    }

    /// True when the buffer has memory, empty or not.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.bytes.capacity() > 0
    }

    /// The memory that it holds.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.bytes.capacity() + self.gates.capacity() * size_of::<Gate>()
    }

    /// Gives back the memory of its gates, where there were many and are none.
    pub fn shrink(&mut self) {
        const GATES_KEPT: usize = 8;
        if self.gates.is_empty() && self.gates.capacity() > GATES_KEPT {
            self.gates = VecDeque::new();
        }
    }

    /// Bytes that are not written yet, whether they may be or not.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Nothing is left to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backlog() == 0
    }

    /// Where the next reply will start, counted from the connection's first byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How many bytes the kernel has taken, counted from the connection's first byte.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.start + self.written as u64
    }

    fn invariants(&self) {
        debug_assert!(self.written <= self.released);
        debug_assert!(self.released <= self.sealed);
        debug_assert!(self.sealed <= self.bytes.len());
        debug_assert!(self.gates.back().is_none_or(|gate| gate.end == self.start + self.sealed as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fill(buffer: &mut ReadBuffer, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = buffer.room();
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            buffer.fill(count);
            bytes = &bytes[count..];
        }
    }

    fn lines(buffer: &mut ReadBuffer, bytes_max: usize) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while let Line::Whole { content, length } = buffer.line(bytes_max) {
            found.push(buffer.slice(content).to_vec());
            buffer.consume(length);
        }
        found
    }

    #[test]
    fn a_line_may_be_as_long_as_the_limit_with_either_line_end() {
        for end in ["\n", "\r\n"] {
            let mut buffer = ReadBuffer::default();
            fill(&mut buffer, format!("12345678{end}").as_bytes());
            assert_eq!(lines(&mut buffer, 8), [b"12345678"]);
            fill(&mut buffer, format!("123456789{end}").as_bytes());
            assert_eq!(buffer.line(8), Line::TooLong);
        }
    }

    #[test]
    fn a_line_is_too_long_before_its_end_is_seen() {
        let mut buffer = ReadBuffer::default();
        fill(&mut buffer, b"12345678\r");
        assert_eq!(buffer.line(8), Line::Partial);
        fill(&mut buffer, b"9");
        assert_eq!(buffer.line(8), Line::TooLong);
    }

    #[test]
    fn an_emptied_buffer_gives_its_memory_away() {
        let mut buffer = ReadBuffer::default();
        fill(&mut buffer, b"a\nb");
        assert_eq!(lines(&mut buffer, 8).len(), 1);
        assert!(buffer.release().is_none());
        buffer.consume(1);
        assert!(buffer.release().is_some());
        assert!(!buffer.has_memory());
    }

    #[test]
    fn a_buffer_that_has_grown_fits_again_and_loses_nothing() {
        let mut buffer = ReadBuffer::default();
        fill(&mut buffer, &[b'x'; 100_000]);
        buffer.consume(30_000);
        buffer.fit(1_000);
        assert_eq!(buffer.pending(), [b'x'; 70_000]);
        buffer.consume(69_500);
        buffer.fit(1_000);
        assert_eq!((buffer.pending(), buffer.bytes.capacity()), (&[b'x'; 500][..], 1_000));
        fill(&mut buffer, b"y");
        assert_eq!(buffer.pending().last(), Some(&b'y'));
    }

    #[test]
    fn a_reply_waits_for_its_batch_and_for_what_stands_before_it() {
        let mut buffer = WriteBuffer::default();
        buffer.out().extend_from_slice(b"first");
        buffer.seal(Some(3));
        buffer.out().extend_from_slice(b"second");
        buffer.seal(None);
        buffer.out().extend_from_slice(b"third");
        buffer.seal(Some(4));
        assert_eq!(buffer.ready(), b"");
        buffer.release(2);
        assert_eq!(buffer.ready(), b"");
        buffer.release(3);
        assert_eq!(buffer.ready(), b"firstsecond");
        buffer.advance(7);
        buffer.release(9);
        assert_eq!(buffer.ready(), b"condthird");
        buffer.advance(9);
        assert!(buffer.is_empty());
        assert_eq!(buffer.taken(), 16);
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_lines(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..400),
            cuts in proptest::collection::vec(1usize..40, 1..40),
        ) {
            let mut whole = ReadBuffer::default();
            fill(&mut whole, &text);
            let expected = lines(&mut whole, usize::MAX - 1);

            let mut split = ReadBuffer::default();
            let mut found = Vec::new();
            let mut rest = &text[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, after) = rest.split_at((*cut).min(rest.len()));
                fill(&mut split, chunk);
                let ahead: Vec<Vec<u8>> = split.lines(usize::MAX - 1).map(|(line, _)| line.to_vec()).collect();
                let whole_bytes: usize = split.lines(usize::MAX - 1).map(|(_, whole)| whole.len()).sum();
                let pending = split.pending().len();
                let come = lines(&mut split, usize::MAX - 1);
                prop_assert_eq!((&come, pending - split.pending().len()), (&ahead, whole_bytes));
                found.extend(come);
                rest = after;
            }
            prop_assert_eq!(found, expected);
            prop_assert_eq!(split.pending(), whole.pending());
        }

        #[test]
        fn a_line_that_is_too_long_ends_those_that_are_seen_ahead(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..100),
            bytes_max in 0usize..20,
        ) {
            let mut buffer = ReadBuffer::default();
            fill(&mut buffer, &text);
            let ahead: Vec<Vec<u8>> = buffer.lines(bytes_max).map(|(line, _)| line.to_vec()).collect();
            prop_assert_eq!(lines(&mut buffer, bytes_max), ahead);
        }
    }
}
