//! Reads records from the segments, wherever they stand, in few large reads: texts of messages, and small files.

use std::io;

use crate::change::{Change, Lsn, Message, Place};
use crate::disk::{Directory, Mode, read_exact_at};
use crate::record;
use crate::segment::{Layout, Segment};

/// Records that stand no further apart than this are read together: it takes less time than another read.
const GAP_BYTES_MAX: u64 = 32 * 1024;
const READ_BYTES_MAX: u64 = 1024 * 1024;

/// Reads records.
#[derive(Debug)]
pub struct Texts {
    directory: Directory,
    layout: Layout,
    buffer: Vec<u8>,
}

impl Texts {
    /// A reader of the journal in `directory`.
    #[must_use]
    pub fn new(directory: Directory, layout: Layout) -> Self {
        Self { directory, layout, buffer: Vec::new() }
    }

    /// The records at these places, one behind the other. What stands there is not looked at.
    ///
    /// # Errors
    /// What the disk said.
    pub fn read(&mut self, places: &[Place]) -> io::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(places.iter().map(|place| place.bytes as usize).sum());
        // Not kept from one call to the next: a segment that is removed should be gone.
        let mut open = None;
        let mut rest = places;
        while let Some(first) = rest.first() {
            let mut end = first.end();
            let layout = self.layout;
            let is_near = |end: Lsn, place: &Place| {
                place.lsn >= end
                    // Between two segments that are needed there may be one that is not there any more.
                    && layout.segment(place.lsn) <= layout.segment(Lsn(end.0 - 1)) + 1
                    && place.lsn.0 - end.0 <= GAP_BYTES_MAX
                    && place.end().0 - first.lsn.0 <= READ_BYTES_MAX
            };
            let together = 1 + rest[1..]
                .iter()
                .take_while(|place| {
                    let is_near = is_near(end, place);
                    end = end.max(if is_near { place.end() } else { end });
                    is_near
                })
                .count();
            let (now, later) = rest.split_at(together);
            self.read_run(first.lsn, end, &mut open)?;
            for place in now {
                let start = usize::try_from(place.lsn.0 - first.lsn.0).unwrap_or(usize::MAX);
                out.extend_from_slice(&self.buffer[start..start + place.bytes as usize]);
            }
            rest = later;
        }
        self.buffer.shrink_to(usize::try_from(READ_BYTES_MAX).unwrap_or(usize::MAX));
        Ok(out)
    }

    /// The records at these places, each if it is whole.
    pub fn read_each(&mut self, places: &[Place]) -> Vec<Option<Vec<u8>>> {
        const AT_ONCE: usize = 256;
        let mut records = Vec::with_capacity(places.len());
        for some in places.chunks(AT_ONCE) {
            let together = self.read(some).ok();
            let mut rest = together.as_deref();
            for place in some {
                let record = match &mut rest {
                    Some(bytes) => {
                        let (record, later) = bytes.split_at(place.bytes as usize);
                        *bytes = later;
                        Some(record.to_vec())
                    }
                    // Something among them cannot be read at all; which, is found one by one.
                    None => self.read(&[*place]).ok(),
                };
                records.push(
                    record.filter(|record| body(record, self.layout.salt, *place).and_then(Change::decode).is_some()),
                );
            }
        }
        records
    }

    /// Fills the buffer with the stream from `from` to `end`.
    fn read_run(&mut self, from: Lsn, end: Lsn, open: &mut Option<Segment>) -> io::Result<()> {
        self.buffer.resize(usize::try_from(end.0 - from.0).unwrap_or(usize::MAX), 0);
        let (mut at, mut filled) = (from, 0);
        while at < end {
            let number = self.layout.segment(at);
            let part = self.layout.start(number + 1).min(end).0 - at.0;
            let part = usize::try_from(part).unwrap_or(usize::MAX);
            let segment = match open.take().filter(|segment| segment.number == number) {
                Some(segment) => segment,
                None => Segment { number, file: self.directory.open(&Layout::name(number), Mode::Read)? },
            };
            read_exact_at(&*segment.file, &mut self.buffer[filled..filled + part], self.layout.offset(at))?;
            *open = Some(segment);
            filled += part;
            at.0 += part as u64;
        }
        Ok(())
    }
}

/// The body of the record that stands at the front of `bytes` and at `place` in the journal, if one does.
fn body(bytes: &[u8], salt: u32, place: Place) -> Option<&[u8]> {
    record::body_at(bytes.get(..place.bytes as usize)?, salt, place.lsn)
}

/// The message that stands at the front of `bytes` and at `place` in the journal, if one does.
#[must_use]
pub fn message(bytes: &[u8], salt: u32, place: Place) -> Option<Message<'_>> {
    Message::decode(body(bytes, salt, place)?)
}

/// The content of a small file that does.
#[must_use]
pub fn content(bytes: &[u8], salt: u32, place: Place) -> Option<&[u8]> {
    Change::decode(body(bytes, salt, place)?)?.content()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::BLOCK_BYTES;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn places_anywhere_in_any_order_are_read(starts in proptest::collection::vec((0u64..1_500_000, 1u32..200_000), 1..20)) {
            let directory = tempfile::tempdir().unwrap();
            let layout = Layout { salt: 7, segment_bytes: 256 * 1024 };
            let byte = |lsn: u64| (lsn ^ (lsn >> 8) ^ (lsn >> 16)).to_le_bytes()[0];
            for segment in 1..=7 {
                let start = layout.start(segment).0;
                let mut bytes = vec![0; BLOCK_BYTES];
                bytes.extend((start..start + layout.segment_bytes).map(byte));
                std::fs::write(directory.path().join(Layout::name(segment)), bytes).unwrap();
            }
            let places: Vec<Place> = starts
                .iter()
                .map(|(start, bytes)| Place { lsn: Lsn(layout.first().0 + start), bytes: *bytes })
                .collect();
            let mut texts = Texts::new(Directory::on_system(directory.path()), layout);
            let read = texts.read(&places).unwrap();
            let expected: Vec<u8> = places.iter().flat_map(|place| (place.lsn.0..place.end().0).map(byte)).collect();
            prop_assert!(read == expected);
            let missing = Place { lsn: layout.start(9), bytes: 1 };
            prop_assert!(texts.read(&[missing]).is_err());
        }
    }
}
