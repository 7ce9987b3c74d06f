//! What the content of a file looks like on the wire: base64 in the standard alphabet, padded, strict, in pieces of any
//! size. No sockets, no disk, and no word of what the file is.
//!
//! The [`base64`] crate's vector engine does the work, which finds out at the start what the processor has.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::Simd;
use base64::engine::general_purpose::PAD;
use memchr::memchr3;

use crate::refusal::Refusal;
use crate::verb::Spec;

/// The alphabet, padding required, and no bits left over.
static CODEC: LazyLock<Simd> = LazyLock::new(|| Simd::standard(PAD));

/// How many bytes the base64 of so many bytes takes.
#[must_use]
pub const fn encoded_bytes(decoded: usize) -> usize {
    decoded.div_ceil(3).saturating_mul(4)
}

/// Appends the base64 of a block.
pub fn encode(block: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + encoded_bytes(block.len()), 0);
    // The room is exact, which is all that can be wrong here.
    let written = CODEC.encode_slice(block, &mut out[start..]).unwrap_or(0);
    debug_assert_eq!(out.len(), start + written);
}

/// What is wrong with the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentError {
    /// It is not base64.
    Base64,
    /// Another word follows it.
    Excess,
    /// Its end never came.
    Missing,
}

impl ContentError {
    /// What to answer to a request of this form.
    #[must_use]
    pub fn refusal(self, spec: &'static Spec) -> Refusal {
        match self {
            Self::Base64 => Refusal::InvalidBase64,
            Self::Excess => Refusal::Excess(spec),
            Self::Missing => Refusal::Incomplete(spec),
        }
    }
}

/// Decodes a whole content, up to and with its line end.
///
/// # Errors
/// [`ContentError`]
pub fn decode(line: &[u8], out: &mut Vec<u8>) -> Result<(), ContentError> {
    let mut reader = ContentReader::default();
    reader.read(line, out)?;
    if reader.is_ended() { Ok(()) } else { Err(ContentError::Missing) }
}

/// How many bytes a content decodes to, if it is one.
#[must_use]
pub fn decoded_bytes(line: &[u8]) -> usize {
    let word = line.trim_ascii();
    let padding = word.iter().rev().take(2).take_while(|byte| **byte == b'=').count();
    (word.len() / 4 * 3).saturating_sub(padding)
}

/// Reads the rest of a line as one base64 word, in whatever pieces it comes: blanks around it do not count, nor does
/// a carriage return right before the line end.
#[derive(Debug, Default)]
pub struct ContentReader {
    place: Place,
    decoder: Decoder,
    blanks: usize,
}

/// More blanks than anybody puts around a content: they decode to nothing, so no limit of a file would end them.
const BLANKS_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Before,
    Within,
    Behind,
    /// Behind a carriage return: the line end must follow.
    Return,
    Ended,
}

impl ContentReader {
    /// Decodes `input` into `out` up to the end of the line. Says how many bytes it took: all, or those up to and with the
    /// line end; [`Self::is_ended`] tells which.
    ///
    /// # Errors
    /// [`ContentError`]; the reader must not be used again then.
    pub fn read(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, ContentError> {
        let mut taken = 0;
        while let Some(&byte) = input.get(taken) {
            self.place = match (self.place, byte) {
                (Place::Ended, _) => break,
                (_, b'\n') => {
                    self.decoder.finish()?;
                    Place::Ended
                }
                (Place::Return, _) => return Err(ContentError::Base64),
                (_, b'\r') => Place::Return,
                (Place::Before, b' ') => Place::Before,
                (Place::Within | Place::Behind, b' ') => Place::Behind,
                (Place::Behind, _) => return Err(ContentError::Excess),
                (Place::Before | Place::Within, _) => {
                    let rest = &input[taken..];
                    let word = &rest[..memchr3(b' ', b'\r', b'\n', rest).unwrap_or(rest.len())];
                    self.decoder.decode(word, out)?;
                    taken += word.len();
                    self.place = Place::Within;
                    continue;
                }
            };
            taken += 1;
            self.blanks += 1;
            if self.blanks > BLANKS_MAX {
                return Err(ContentError::Base64);
            }
        }
        Ok(taken)
    }

    /// The whole content has been read.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.place == Place::Ended
    }
}

/// base64 in pieces of any size: the standard alphabet, padding required, nothing behind it.
#[derive(Debug, Default)]
struct Decoder {
    carry: [u8; 4],
    carried: usize,
    is_padded: bool,
}

impl Decoder {
    fn decode(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(), ContentError> {
        let mut input = input;
        if self.carried > 0 {
            let (head, rest) = input.split_at(input.len().min(4 - self.carried));
            self.carry[self.carried..self.carried + head.len()].copy_from_slice(head);
            self.carried += head.len();
            input = rest;
            if self.carried < 4 {
                return Ok(());
            }
            self.carried = 0;
            let carry = self.carry;
            self.decode_whole(&carry, out)?;
        }
        let (whole, tail) = input.split_at(input.len() / 4 * 4);
        self.decode_whole(whole, out)?;
        self.carry[..tail.len()].copy_from_slice(tail);
        self.carried = tail.len();
        if self.is_padded && self.carried > 0 { Err(ContentError::Base64) } else { Ok(()) }
    }

    /// Decodes whole groups of four.
    fn decode_whole(&mut self, groups: &[u8], out: &mut Vec<u8>) -> Result<(), ContentError> {
        if groups.is_empty() {
            return Ok(());
        }
        if self.is_padded {
            return Err(ContentError::Base64);
        }
        self.is_padded = groups.ends_with(b"=");
        let start = out.len();
        out.resize(start + groups.len() / 4 * 3, 0);
        match CODEC.decode_slice(groups, &mut out[start..]) {
            Ok(count) => {
                out.truncate(start + count);
                Ok(())
            }
            Err(_) => {
                out.truncate(start);
                Err(ContentError::Base64)
            }
        }
    }

    fn finish(&self) -> Result<(), ContentError> {
        if self.carried == 0 { Ok(()) } else { Err(ContentError::Base64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads a line in pieces of the given sizes; what it decoded to, and how many bytes it took.
    fn read(line: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, usize), ContentError> {
        let mut reader = ContentReader::default();
        let mut out = Vec::new();
        let mut taken = 0;
        for cut in cuts.iter().cycle() {
            if taken == line.len() || reader.is_ended() {
                break;
            }
            let end = (taken + cut).min(line.len());
            taken += reader.read(&line[taken..end], &mut out)?;
        }
        if reader.is_ended() { Ok((out, taken)) } else { Err(ContentError::Missing) }
    }

    fn whole(line: &str) -> Result<Vec<u8>, ContentError> {
        read(line.as_bytes(), &[line.len().max(1)]).map(|(out, _)| out)
    }

    #[test]
    fn blanks_and_the_line_end_are_not_content() {
        for line in ["QUJD\n", " QUJD\r\n", "  QUJD  \r\n"] {
            assert_eq!(whole(line), Ok(b"ABC".to_vec()), "{line:?}");
        }
        for line in [" \n", "\r\n", "\n", "   \n"] {
            assert_eq!(whole(line), Ok(Vec::new()), "{line:?}");
        }
        let many = |blanks: usize| format!("{}QUJD\n", " ".repeat(blanks));
        assert_eq!(whole(&many(1000)), Ok(b"ABC".to_vec()));
        assert_eq!(whole(&many(1100)), Err(ContentError::Base64), "blanks without end are refused");
        for line in ["QUJD", "QUJD ", "QUJD\r", "", "   "] {
            assert_eq!(whole(line), Err(ContentError::Missing), "{line:?}");
        }
    }

    #[test]
    fn what_is_not_strict_base64_is_refused() {
        for line in [
            "QUJ\n",
            "QUJDR\n",
            "QQ\n",
            "QQ=\n",
            "QR==\n",
            "QQ==QQ==\n",
            "QU-_\n",
            "=\n",
            "QUJD\rQUJD\n",
            "Q\u{e9}==\n",
        ] {
            assert_eq!(whole(line), Err(ContentError::Base64), "{line:?}");
        }
        assert_eq!(whole("QUJD QUJD\n"), Err(ContentError::Excess));
    }

    /// A valid encoding in which up to two bytes may have been changed.
    fn almost_base64() -> impl Strategy<Value = Vec<u8>> {
        let edit = (any::<proptest::sample::Index>(), prop_oneof![any::<u8>(), Just(b'='), Just(b'/'), Just(b'B')]);
        let bytes = proptest::collection::vec(any::<u8>(), 0..400);
        (bytes, proptest::collection::vec(edit, 0..3)).prop_map(|(bytes, edits)| {
            let mut encoded = Vec::new();
            encode(&bytes, &mut encoded);
            for (at, byte) in edits.into_iter().filter(|_| !bytes.is_empty()) {
                let at = at.index(encoded.len());
                encoded[at] = byte;
            }
            encoded
        })
    }

    proptest! {
        /// Three routines that have nothing in common but the standard (RFC 4648) give and refuse the same.
        #[test]
        fn the_codec_is_as_strict_as_others(encoded in almost_base64()) {
            let ours = CODEC.decode(&encoded).ok();
            prop_assert_eq!(&ours, &base64::engine::general_purpose::STANDARD.decode(&encoded).ok());
            prop_assert_eq!(&ours, &base64_simd::STANDARD.decode_to_vec(&encoded).ok());
            if let Some(bytes) = ours {
                prop_assert_eq!(base64_simd::STANDARD.encode_to_string(&bytes).into_bytes(), encoded);
            }
        }

        #[test]
        fn any_chunking_decodes_alike(
            bytes in proptest::collection::vec(any::<u8>(), 0..1000),
            cuts in proptest::collection::vec(prop_oneof![1usize..20, 64usize..400], 1..30),
        ) {
            let mut line = b" ".to_vec();
            encode(&bytes, &mut line);
            line.extend_from_slice(b" \r\nrest");
            let (out, taken) = read(&line, &cuts).unwrap();
            prop_assert_eq!(out, bytes);
            prop_assert_eq!(taken, line.len() - 4);
        }

        #[test]
        fn chunking_does_not_change_what_is_refused(line in "[A-D=+/ \r-]{0,24}\n", cuts in proptest::collection::vec(1usize..5, 1..9)) {
            prop_assert_eq!(read(line.as_bytes(), &cuts), read(line.as_bytes(), &[line.len()]));
        }
    }
}
