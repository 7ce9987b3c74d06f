//! Records: how anything is framed on the disk, in the journal and in a checkpoint.
//!
//! | bytes | |
//! |---|---|
//! | 4 | length of the body, at least 1 |
//! | 4 | CRC-32C of the body and the zeros, begun with the salt, the position and the length |
//! | … | body: a kind (1 byte) and what belongs to it |
//! | 0 to 7 | zeros, so that a record takes a multiple of eight bytes |
//!
//! The position is where the record stands in the stream that it is part of. Being in the sum, it keeps a record that an
//! earlier use of the same place has left there from being taken for one of this stream; the salt, which nobody outside
//! knows, keeps a text that looks like a record from being taken for one. A sum over whole words takes half as long.
//!
//! Two kinds say nothing of the state. Kind 0 is a mark, which opens each batch of a journal: its own position (8 bytes),
//! and the position up to which the journal was on the disk when the batch was begun (8 bytes). Kind 255 is a void, which
//! repairs of format 3 left where damage was.

use std::io::{self, ErrorKind, Read};

use crate::change::{Lsn, Place};
use crate::field::{Fields, Put};

/// What stands before a body.
pub const HEADER_BYTES: usize = 8;
/// Above every record that is ever written: a line, its names, and room to spare.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A record takes a multiple of this.
const ALIGN_BYTES: usize = 8;
/// A header, a kind, and zeros.
pub const RECORD_BYTES_MIN: usize = record_bytes(1);
const KIND_MARK: u8 = 0;
const KIND_VOID: u8 = 255;
const MARK_BODY_BYTES: u32 = 17;
/// The size of a mark.
pub const MARK_BYTES: usize = record_bytes(17);
const READ_BYTES: usize = 1024 * 1024;

/// What a record with a body of so many bytes takes.
#[must_use]
pub const fn record_bytes(body_bytes: usize) -> usize {
    (HEADER_BYTES + body_bytes).next_multiple_of(ALIGN_BYTES)
}

/// Appends the record that stands at `lsn` and whose body `write` makes.
pub fn append(out: &mut Vec<u8>, salt: u32, lsn: Lsn, write: impl FnOnce(&mut Vec<u8>)) -> Place {
    let start = out.len();
    let place = append_unsealed(out, lsn, write);
    seal(&mut out[start..], salt, lsn);
    place
}

/// The same without its sum, which [`seal`] puts in.
pub fn append_unsealed(out: &mut Vec<u8>, lsn: Lsn, write: impl FnOnce(&mut Vec<u8>)) -> Place {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    write(out);
    let body_bytes = out.len() - start - HEADER_BYTES;
    out.extend_from_slice(&[0; ALIGN_BYTES]);
    out.truncate(start + record_bytes(body_bytes));
    // A body is bounded by the longest request line, far below 4 GiB.
    let [length, bytes] = [body_bytes, out.len() - start].map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    Place { lsn, bytes }
}

/// Puts the sums into the records that fill `bytes`, of which the first stands at `lsn`. The sums of many at once take a
/// fraction of the time: none waits for the one before, and none for bytes that are still being written.
pub fn seal(bytes: &mut [u8], salt: u32, lsn: Lsn) {
    let mut at = 0;
    while let Some(whole) = claimed_bytes(&bytes[at..]) {
        let Some(record) = bytes.get_mut(at..at + whole) else { break };
        let (header, summed) = record.split_at_mut(HEADER_BYTES);
        if let Some(([a, b, c, d], sum)) = header.split_first_chunk_mut::<4>() {
            let length = u32::from_le_bytes([*a, *b, *c, *d]);
            sum.copy_from_slice(&checksum(salt, Lsn(lsn.0 + at as u64), length, summed).to_le_bytes());
        }
        at += whole;
    }
    debug_assert_eq!(at, bytes.len(), "there is nothing but records");
}

/// Appends the mark that stands at `lsn`, and says that all before `synced` is on the disk.
pub fn append_mark(out: &mut Vec<u8>, salt: u32, lsn: Lsn, synced: Lsn) {
    let start = out.len();
    append_mark_unsealed(out, lsn, synced);
    seal(&mut out[start..], salt, lsn);
}

/// The same without its sum.
pub fn append_mark_unsealed(out: &mut Vec<u8>, lsn: Lsn, synced: Lsn) {
    append_unsealed(out, lsn, |body| {
        body.push(KIND_MARK);
        lsn.put(body);
        synced.put(body);
    });
}

/// The sum of a body with the zeros behind it.
fn checksum(salt: u32, lsn: Lsn, length: u32, summed: &[u8]) -> u32 {
    crc32c::crc32c_append(salt ^ fold(lsn, length), summed)
}

/// A position and a length in 32 bits: others for each of the positions near by, and for those of the uses of a place.
fn fold(lsn: Lsn, length: u32) -> u32 {
    // 2^64 divided by the golden ratio spreads numbers that differ by little, or by a power of two.
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let spread = (lsn.0 ^ u64::from(length) << 32).wrapping_mul(GOLDEN);
    u32::try_from(spread >> 32).unwrap_or(0)
}

/// The body of the record that stands at the front of `bytes` and at `lsn` in its stream, if a whole one does.
#[must_use]
pub fn body_at(bytes: &[u8], salt: u32, lsn: Lsn) -> Option<&[u8]> {
    let (length, sum) = split_header(bytes)?;
    let body_bytes = body_bytes(length)?;
    let summed = bytes.get(HEADER_BYTES..record_bytes(body_bytes))?;
    (checksum(salt, lsn, length, summed) == sum).then(|| &summed[..body_bytes])
}

/// The body of the record at the front of `bytes` by what its header says, whatever its sum: for what this process has
/// written itself, and for what is known to be damaged.
#[must_use]
pub fn claimed_body(bytes: &[u8]) -> Option<&[u8]> {
    let (length, _) = split_header(bytes)?;
    bytes.get(HEADER_BYTES..HEADER_BYTES + body_bytes(length)?)
}

/// How long the record at the front of `bytes` says that it is, if it may be that long.
#[must_use]
pub fn claimed_bytes(bytes: &[u8]) -> Option<usize> {
    let (length, _) = split_header(bytes)?;
    body_bytes(length).map(record_bytes)
}

/// Where the first whole record stands in `bytes`, of which the first stands at `lsn` in its stream, where a record could
/// begin. It is looked for among the first `searched` bytes, and may end behind them.
#[must_use]
pub fn find_next(bytes: &[u8], salt: u32, lsn: Lsn, searched: usize) -> Option<usize> {
    let is_whole = |at: &usize| body_at(&bytes[*at..], salt, Lsn(lsn.0 + *at as u64)).is_some();
    (0..searched.min(bytes.len())).step_by(ALIGN_BYTES).find(is_whole)
}

fn body_bytes(length: u32) -> Option<usize> {
    usize::try_from(length).ok().filter(|bytes| (1..=BODY_BYTES_MAX).contains(bytes))
}

fn split_header(bytes: &[u8]) -> Option<(u32, u32)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, _) = rest.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*length), u32::from_le_bytes(*sum)))
}

/// True for the body of a void, which says nothing.
#[must_use]
pub fn is_padding(body: &[u8]) -> bool {
    body.first() == Some(&KIND_VOID)
}

/// What the body of a record at `lsn` says, if it is a mark: all before this was on the disk.
#[must_use]
pub fn mark_of(body: &[u8], lsn: Lsn) -> Option<Lsn> {
    mark(body).filter(|(position, _)| *position == lsn).map(|(_, synced)| synced)
}

/// A mark's own position, and the one up to which its journal was on the disk.
fn mark(body: &[u8]) -> Option<(Lsn, Lsn)> {
    let mut fields = Fields(body);
    let mark = (fields.take::<u8>()?, fields.take()?, fields.take()?);
    // Nothing behind it can have been on the disk before it.
    (mark.0 == KIND_MARK && fields.0.is_empty() && mark.2 <= mark.1).then_some((mark.1, mark.2))
}

/// Where the first mark in `bytes`, which stand at `start` in their stream, says that the stream was on the disk past `lsn`.
#[must_use]
pub fn find_mark_synced_past(bytes: &[u8], salt: u32, start: Lsn, lsn: Lsn) -> Option<Lsn> {
    let length = MARK_BODY_BYTES.to_le_bytes();
    memchr::memmem::find_iter(bytes, &length).find_map(|at| {
        let (body, position) = (bytes.get(at + HEADER_BYTES..)?, Lsn(start.0 + at as u64));
        let body = body.get(..usize::try_from(MARK_BODY_BYTES).ok()?)?;
        let is_past = mark(body).is_some_and(|(own, synced)| own == position && synced > lsn);
        // The sum comes last: what an earlier use has left is full of marks.
        (is_past && body_at(&bytes[at..], salt, position).is_some()).then_some(position)
    })
}

/// Reads records one after the other, up to the first that is not whole.
pub struct Records<R> {
    source: R,
    salt: u32,
    /// Where the next record stands.
    at: Lsn,
    buffer: Vec<u8>,
    consumed: usize,
    filled: usize,
}

impl<R: Read> Records<R> {
    /// The records of `source`, whose first byte stands at `at`.
    pub fn new(source: R, salt: u32, at: Lsn) -> Self {
        Self { source, salt, at, buffer: vec![0; READ_BYTES], consumed: 0, filled: 0 }
    }

    /// Where the next record stands, or should.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// The next record: where it stands, and its body.
    ///
    /// # Errors
    /// What the source said.
    pub fn read(&mut self) -> io::Result<Option<(Place, &[u8])>> {
        if !self.fill(HEADER_BYTES)? {
            return Ok(None);
        }
        let Some(bytes) = claimed_bytes(&self.buffer[self.consumed..self.filled]) else { return Ok(None) };
        if !self.fill(bytes)? {
            return Ok(None);
        }
        let (start, lsn) = (self.consumed, self.at);
        let Some(body) = body_at(&self.buffer[start..self.filled], self.salt, lsn) else { return Ok(None) };
        self.consumed += bytes;
        self.at = Lsn(lsn.0 + bytes as u64);
        let place = Place { lsn, bytes: u32::try_from(bytes).unwrap_or(u32::MAX) };
        Ok(Some((place, body)))
    }

    /// Reads until so many bytes are there; false if the source ends before.
    fn fill(&mut self, bytes: usize) -> io::Result<bool> {
        while self.filled - self.consumed < bytes {
            if self.buffer.len() - self.consumed < bytes {
                self.buffer.copy_within(self.consumed..self.filled, 0);
                self.filled -= self.consumed;
                self.consumed = 0;
                if self.buffer.len() < bytes {
                    self.buffer.resize(bytes, 0);
                }
            }
            match self.source.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Ok(false),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SALT: u32 = 7;

    #[test]
    fn a_record_counts_only_at_its_own_place() {
        let mut bytes = Vec::new();
        append(&mut bytes, SALT, Lsn(4096), |body| body.extend_from_slice(b"\x0bsomething"));
        assert!(body_at(&bytes, SALT, Lsn(4096)).is_some());
        for elsewhere in [0, 4095, 4097, 4096 + (1 << 24), 4096 + (1 << 40)] {
            assert!(body_at(&bytes, SALT, Lsn(elsewhere)).is_none(), "{elsewhere}");
        }
        assert!(body_at(&bytes, SALT + 1, Lsn(4096)).is_none());
    }

    #[test]
    fn the_sums_of_near_positions_and_of_the_uses_of_a_place_begin_otherwise() {
        for (first, step) in [(4096, 8), (4096, 4096), (8192, 16 << 20), (40, 1 << 30)] {
            let mut folded: Vec<u32> = (0..1 << 20).map(|use_| fold(Lsn(first + use_ * step), 100)).collect();
            folded.sort_unstable();
            folded.dedup();
            assert!(folded.len() >= (1 << 20) - 256, "{step}: {}", folded.len());
            // None of them is that of the first.
            assert!((1..1 << 20).all(|use_| fold(Lsn(first + use_ * step), 100) != fold(Lsn(first), 100)), "{step}");
        }
        assert!((1..1000).all(|length| fold(Lsn(4096), length) != fold(Lsn(4096), 1000)));
    }

    #[test]
    fn a_record_takes_whole_words_and_its_zeros_are_in_the_sum() {
        for length in 1..40 {
            let mut bytes = Vec::new();
            let place = append(&mut bytes, SALT, Lsn(8), |body| body.extend_from_slice(&[7; 40][..length]));
            assert_eq!((place.bytes as usize, bytes.len() % ALIGN_BYTES), (bytes.len(), 0));
            assert_eq!(claimed_bytes(&bytes), Some(bytes.len()));
            assert_eq!(body_at(&bytes, SALT, Lsn(8)), Some(&[7; 40][..length]));
            assert_eq!(claimed_body(&bytes), Some(&[7; 40][..length]));
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                assert_eq!(body_at(&damaged, SALT, Lsn(8)), None, "{length} {at}");
            }
            bytes.pop();
            assert_eq!(body_at(&bytes, SALT, Lsn(8)), None, "cut off");
        }
    }

    proptest! {
        #[test]
        fn records_are_read_as_they_were_written(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..20),
            start in 0..u64::from(u32::MAX),
            flipped: Option<(proptest::sample::Index, proptest::sample::Index)>,
        ) {
            let mut bytes = Vec::new();
            let mut places = Vec::new();
            for body in &bodies {
                let lsn = Lsn(start + bytes.len() as u64);
                places.push(append(&mut bytes, SALT, lsn, |out| out.extend_from_slice(body)));
            }
            let mut whole = bodies.len();
            if let Some((byte, bit)) = flipped.filter(|_| !bytes.is_empty()) {
                let at = byte.index(bytes.len());
                bytes[at] ^= 1 << bit.index(8);
                whole = places.iter().position(|place| start + (at as u64) < place.end().0).unwrap();
            }
            let mut records = Records::new(&*bytes, SALT, Lsn(start));
            for (place, body) in places.iter().zip(&bodies).take(whole) {
                prop_assert_eq!(records.read().unwrap(), Some((*place, &**body)));
            }
            prop_assert_eq!(records.read().unwrap(), None);
        }
    }
}
