//! The end of the journal in memory: what has just been written is what is read most, and what is not on the disk yet
//! can be read nowhere else.

use std::collections::VecDeque;

use crate::change::{Lsn, Place};

/// Batches are gathered in pieces of at most this size, unless one of them is larger.
const PIECE_BYTES_MAX: usize = 64 * 1024;
/// A piece is used again when it is no larger than this.
const SPARE_BYTES_MAX: usize = 1024 * 1024;
/// It is let go in no fewer pieces than this.
const PIECES_MIN: usize = 16;

/// The last bytes of the journal, up to the open batch.
#[derive(Debug)]
pub struct Tail {
    /// In order and without a gap; no batch stands in two of them.
    pieces: VecDeque<Piece>,
    bytes: usize,
    bytes_max: usize,
    piece_bytes: usize,
    spare: Vec<u8>,
}

#[derive(Debug)]
struct Piece {
    start: Lsn,
    bytes: Vec<u8>,
}

impl Piece {
    fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    /// The record at a place that is not before it.
    fn record(&self, place: Place) -> Option<&[u8]> {
        let start = usize::try_from(place.lsn.0 - self.start.0).ok()?;
        self.bytes.get(start..start + place.bytes as usize)
    }
}

impl Tail {
    /// An empty one, which keeps about so many bytes and all that is not on the disk yet.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        let piece_bytes = (bytes_max / PIECES_MIN).min(PIECE_BYTES_MAX);
        Self { pieces: VecDeque::new(), bytes: 0, bytes_max, piece_bytes, spare: Vec::new() }
    }

    /// Appends a batch, and lets go of what is too much of what stands before `settled`.
    pub fn push(&mut self, start: Lsn, batch: &[u8], settled: Lsn) {
        match self.pieces.back_mut().filter(|piece| piece.bytes.len() + batch.len() <= self.piece_bytes) {
            Some(piece) => piece.bytes.extend_from_slice(batch),
            None => {
                let mut bytes = std::mem::take(&mut self.spare);
                bytes.reserve(self.piece_bytes.max(batch.len()).next_power_of_two());
                bytes.extend_from_slice(batch);
                self.pieces.push_back(Piece { start, bytes });
            }
        }
        self.bytes += batch.len();
        while let Some(piece) = self.pieces.front() {
            if self.bytes - piece.bytes.len() < self.bytes_max || piece.end() > settled {
                break;
            }
            self.bytes -= piece.bytes.len();
            let Some(Piece { mut bytes, .. }) = self.pieces.pop_front() else { break };
            if bytes.capacity() <= SPARE_BYTES_MAX {
                bytes.clear();
                self.spare = bytes;
            }
        }
    }

    /// The record at a place, if it is still there.
    #[must_use]
    pub fn record(&self, place: Place) -> Option<&[u8]> {
        self.piece(place.lsn)?.record(place)
    }

    /// Gives the record at a place, if it is still there: the sooner when the one before stood near it.
    pub fn lookup<'t>(&'t self) -> impl FnMut(Place) -> Option<&'t [u8]> {
        let mut last: Option<&Piece> = None;
        move |place| {
            if last.is_none_or(|piece| place.lsn < piece.start || place.lsn >= piece.end()) {
                last = self.piece(place.lsn);
            }
            last?.record(place)
        }
    }

    /// The piece that holds a position, if one does.
    fn piece(&self, lsn: Lsn) -> Option<&Piece> {
        let behind = self.pieces.partition_point(|piece| piece.start <= lsn);
        self.pieces.get(behind.checked_sub(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_settled_stays_and_the_oldest_goes_first() {
        let mut tail = Tail::new(200 * 1024);
        let place = |number: u64| Place { lsn: Lsn(100 + number * 1000), bytes: 1000 };
        for number in 0..1000 {
            tail.push(place(number).lsn, &[number.to_le_bytes()[0]; 1000], Lsn(100));
        }
        for number in 0..1000 {
            assert_eq!(tail.record(place(number)).unwrap(), [number.to_le_bytes()[0]; 1000]);
        }
        let settled = place(1000).lsn;
        tail.push(settled, &[7; 1000], settled);
        assert_eq!(tail.record(place(0)), None);
        assert!(tail.record(place(900)).is_some());
        assert!(tail.bytes < 300 * 1024);
        assert_eq!(tail.record(place(1001)), None);
        let places = [900, 901, 999, 0, 1001, 950, 1000].map(place);
        let found: Vec<Option<&[u8]>> = places.into_iter().map(tail.lookup()).collect();
        assert_eq!(found, places.map(|place| tail.record(place)));
        assert_eq!(tail.record(Place { lsn: Lsn(0), bytes: 10 }), None);
    }

    #[test]
    fn a_large_batch_is_one_piece() {
        let mut tail = Tail::new(10);
        tail.push(Lsn(5), &[1; 300_000], Lsn(0));
        assert_eq!(tail.record(Place { lsn: Lsn(6), bytes: 200_000 }).unwrap().len(), 200_000);
    }
}
