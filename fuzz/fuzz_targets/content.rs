//! base64 in chunks decodes as it does in one piece, and what is decoded encodes to what was sent.

#![no_main]

use kurir::content::{ContentError, ContentReader, encode};
use libfuzzer_sys::fuzz_target;

fn read(input: &[u8], chunk: usize) -> Result<(Vec<u8>, usize), ContentError> {
    let mut reader = ContentReader::default();
    let mut out = Vec::new();
    let mut taken = 0;
    for piece in input.chunks(chunk) {
        taken += reader.read(piece, &mut out)?;
        if reader.is_ended() {
            break;
        }
    }
    if reader.is_ended() { Ok((out, taken)) } else { Err(ContentError::Missing) }
}

fuzz_target!(|data: &[u8]| {
    let Some((&chunk, input)) = data.split_first() else { return };
    let whole = read(input, input.len().max(1));
    assert_eq!(whole, read(input, usize::from(chunk).max(1)));
    if let Ok((out, taken)) = whole {
        let mut encoded = Vec::new();
        encode(&out, &mut encoded);
        let line = input[..taken].strip_suffix(b"\n").unwrap_or(&input[..taken]);
        let word = line.strip_suffix(b"\r").unwrap_or(line);
        assert_eq!(encoded, word.trim_ascii());
    }
});
