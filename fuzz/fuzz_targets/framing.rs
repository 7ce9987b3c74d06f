//! Whatever the chunks in which bytes come, the same lines come out, and nothing is lost or added.
//!
//! The first byte says how many of the next are sizes of chunks; the rest is what is sent.

#![no_main]

use kurir::buffer::{Line, ReadBuffer};
use libfuzzer_sys::fuzz_target;

const LINE_BYTES_MAX: usize = 40;

/// The lines in `input`, sent in chunks, until one is too long; and what is left.
fn lines(input: &[u8], chunks: impl Iterator<Item = usize>) -> (Vec<Vec<u8>>, bool, Vec<u8>) {
    let mut buffer = ReadBuffer::default();
    let mut found = Vec::new();
    let mut rest = input;
    for size in chunks {
        let (chunk, after) = rest.split_at(size.clamp(1, rest.len().max(1)).min(rest.len()));
        rest = after;
        let mut chunk = chunk;
        while !chunk.is_empty() {
            let room = buffer.room();
            let count = room.len().min(chunk.len());
            room[..count].copy_from_slice(&chunk[..count]);
            buffer.fill(count);
            chunk = &chunk[count..];
        }
        loop {
            match buffer.line(LINE_BYTES_MAX) {
                Line::Whole { content, length } => {
                    assert!(content.len() < length && content.len() <= LINE_BYTES_MAX);
                    found.push(buffer.slice(content).to_vec());
                    buffer.consume(length);
                }
                Line::Partial => break,
                Line::TooLong => return (found, true, Vec::new()),
            }
        }
        if rest.is_empty() {
            break;
        }
    }
    (found, false, buffer.pending().to_vec())
}

fuzz_target!(|data: &[u8]| {
    let Some((&count, data)) = data.split_first() else { return };
    let (sizes, input) = data.split_at(usize::from(count).min(data.len()));
    let whole = lines(input, std::iter::once(input.len()));
    let sizes: Vec<usize> = sizes.iter().map(|size| usize::from(*size)).chain([1]).collect();
    let split = lines(input, sizes.into_iter().cycle());
    assert_eq!(whole, split);
});
