//! The parser: one line in, one [`Request`] out that borrows from it, or a [`Fault`].
//!
//! It allocates nothing, knows nothing of users or files, and is total: every line of bytes gives an answer.

use std::str;

use memchr::memchr;

use crate::refusal::Refusal;
use crate::verb::{Audience, Dialect, Last, Spec, Verb, recognise};

/// A token is so many hexadecimal digits.
pub const TOKEN_DIGITS: usize = 32;
/// The most parameters that a request has, the content of a file not counted.
const PARAMETERS_MAX: usize = 3;

/// A request whose form is right.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its row in the verb table.
    pub spec: &'static Spec,
    parameters: [&'a str; PARAMETERS_MAX],
    /// Where the content begins in the line, for a request that has one; the line goes on from there to its end.
    pub content_at: Option<usize>,
}

impl<'a> Request<'a> {
    /// What is asked for.
    #[must_use]
    pub fn verb(&self) -> Verb {
        self.spec.verb
    }

    /// The parameter at `index`; one that does not exist, or that was left out, is empty.
    #[must_use]
    pub fn parameter(&self, index: usize) -> &'a str {
        self.parameters.get(index).copied().unwrap_or_default()
    }
}

/// A line that is not a request, and the row of the table that it seems to mean.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// What to answer.
    pub refusal: Refusal,
    /// The verb, where it was recognised.
    pub spec: Option<&'static Spec>,
}

/// Reads a line, given without its line end.
///
/// For a verb that carries a file, `line` may be only the first part of the line: all of it up to the content must be
/// there, and what follows is not looked at.
///
/// # Errors
/// The [`Fault`] says which rule of the protocol the line breaks.
pub fn parse(line: &[u8], audience: Audience) -> Result<Request<'_>, Fault> {
    let Some((spec, rest)) = recognise(&line[blanks(line)..], audience) else {
        let refusal = if str::from_utf8(line).is_ok() { Refusal::UnknownRequest } else { Refusal::NotUtf8 };
        return Err(Fault { refusal, spec: None });
    };
    let request = match spec.last {
        Last::Content => with_content(spec, line, rest),
        Last::Text => utf8(rest).and_then(|rest| with_text(spec, rest)),
        Last::Word | Last::OptionalWord => utf8(rest).and_then(|rest| with_words(spec, rest)),
    };
    request.map_err(|refusal| Fault { refusal, spec: Some(spec) })
}

/// True when a line that begins so carries a file.
#[must_use]
pub fn carries_file(start: &[u8], audience: Audience) -> bool {
    recognise(&start[blanks(start)..], audience).is_some_and(|(spec, _)| spec.last == Last::Content)
}

/// True for a line that says nothing and gets no answer.
#[must_use]
pub fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|&byte| byte == b' ')
}

fn utf8(bytes: &[u8]) -> Result<&str, Refusal> {
    str::from_utf8(bytes).map_err(|_| Refusal::NotUtf8)
}

fn with_words<'a>(spec: &'static Spec, rest: &'a str) -> Result<Request<'a>, Refusal> {
    let mut rest = rest;
    let mut parameters = [""; PARAMETERS_MAX];
    let mut count = 0;
    for slot in parameters.iter_mut().take(spec.parameters.len()) {
        (*slot, rest) = word(rest);
        count += usize::from(!slot.is_empty());
    }
    let optional = usize::from(spec.last == Last::OptionalWord);
    if count < spec.parameters.len() - optional {
        return Err(Refusal::Incomplete(spec));
    }
    if !word(rest).0.is_empty() {
        return Err(Refusal::Excess(spec));
    }
    Ok(Request { spec, parameters, content_at: None })
}

fn with_text<'a>(spec: &'static Spec, rest: &'a str) -> Result<Request<'a>, Refusal> {
    let mut rest = rest;
    let mut parameters = [""; PARAMETERS_MAX];
    let Some((text, words)) = parameters.split_last_mut() else { return Err(Refusal::Incomplete(spec)) };
    for slot in words {
        (*slot, rest) = word(rest);
    }
    let given = rest.strip_prefix(' ').unwrap_or_default();
    *text = if spec.dialect == Dialect::Classic { given.trim_matches(' ') } else { given };
    if text.is_empty() {
        return Err(Refusal::Incomplete(spec));
    }
    Ok(Request { spec, parameters, content_at: None })
}

/// Only the words before the content are looked at: the content is decoded as it comes, and judged then.
fn with_content<'a>(spec: &'static Spec, line: &'a [u8], rest: &'a [u8]) -> Result<Request<'a>, Refusal> {
    let mut rest = rest;
    let mut parameters = [""; PARAMETERS_MAX];
    for slot in &mut parameters {
        let found;
        (found, rest) = word_bytes(rest);
        *slot = utf8(found)?;
    }
    if parameters.contains(&"") || rest.first() != Some(&b' ') {
        return Err(if str::from_utf8(line).is_ok() { Refusal::Incomplete(spec) } else { Refusal::NotUtf8 });
    }
    Ok(Request { spec, parameters, content_at: Some(line.len() - rest.len()) })
}

/// The first word of `text`, blanks before it passed over, and what follows it.
fn word(text: &str) -> (&str, &str) {
    let text = &text[blanks(text.as_bytes())..];
    text.split_at(word_bytes_count(text.as_bytes()))
}

fn word_bytes(bytes: &[u8]) -> (&[u8], &[u8]) {
    let bytes = &bytes[blanks(bytes)..];
    bytes.split_at(word_bytes_count(bytes))
}

/// How many blanks stand in front.
fn blanks(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|&&byte| byte == b' ').count()
}

/// How long the word is that stands in front. Most are tokens or short names, and are found without a call that takes
/// longer than they do.
fn word_bytes_count(bytes: &[u8]) -> usize {
    if let Some((token, rest)) = bytes.split_first_chunk::<TOKEN_DIGITS>()
        && rest.first() == Some(&b' ')
        && token.iter().fold(true, |is_word, byte| is_word & (*byte != b' '))
    {
        return TOKEN_DIGITS;
    }
    let near = bytes.first_chunk().and_then(|eight| first_blank(u64::from_le_bytes(*eight)));
    near.or_else(|| memchr(b' ', bytes)).unwrap_or(bytes.len())
}

/// Where the first of eight bytes stands that is a blank.
fn first_blank(eight: u64) -> Option<usize> {
    const ONES: u64 = u64::MAX / 0xff;
    let others = eight ^ (ONES * b' ' as u64);
    // The lowest bit that is set belongs to the first byte that is zero.
    let zeros = others.wrapping_sub(ONES) & !others & (ONES << 7);
    (zeros != 0).then(|| zeros.trailing_zeros() as usize / 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(line: &str) -> (Verb, Vec<&str>) {
        let request = parse(line.as_bytes(), Audience::Client).unwrap();
        (request.verb(), request.parameters.into_iter().filter(|parameter| !parameter.is_empty()).collect())
    }

    fn refused(line: &[u8]) -> String {
        parse(line, Audience::Client).unwrap_err().refusal.to_string()
    }

    #[test]
    fn a_message_is_all_that_follows_the_one_blank_behind_the_target() {
        assert_eq!(
            parsed("SEND MESSAGE 00 henderson  two  blanks "),
            (Verb::SendMessage, vec!["00", "henderson", " two  blanks "])
        );
        assert_eq!(parsed("SEND   MESSAGE  00  henderson hi"), (Verb::SendMessage, vec!["00", "henderson", "hi"]));
    }

    #[test]
    fn the_classic_spelling_drops_the_outer_blanks_of_a_message() {
        assert_eq!(
            parsed("send 00 henderson  hello gimana kabarnya "),
            (Verb::SendMessage, vec!["00", "henderson", "hello gimana kabarnya"])
        );
    }

    #[test]
    fn blanks_around_words_do_not_count() {
        assert_eq!(parsed("  AUTH   messi   surabaya  "), (Verb::Auth, vec!["messi", "surabaya"]));
    }

    #[test]
    fn too_few_and_too_many_parameters_are_told_with_the_usage() {
        assert_eq!(refused(b"AUTH messi"), "parameter tidak lengkap: AUTH user password");
        assert_eq!(refused(b"AUTH messi surabaya x"), "parameter berlebih: AUTH user password");
        assert_eq!(refused(b"PING 1"), "parameter berlebih: PING");
        assert_eq!(refused(b"SEND MESSAGE 00 henderson"), "parameter tidak lengkap: SEND MESSAGE token user text");
        assert_eq!(refused(b"SEND MESSAGE 00 henderson "), "parameter tidak lengkap: SEND MESSAGE token user text");
        assert_eq!(refused(b"SEND FILE 00 lineker a.txt"), "parameter tidak lengkap: SEND FILE token user name base64");
        assert_eq!(refused(b"SEND FILE 00  "), "parameter tidak lengkap: SEND FILE token user name base64");
    }

    #[test]
    fn the_content_of_a_file_begins_behind_its_name() {
        let line = b"SEND FILE 00 lineker a.txt QUJD";
        let request = parse(line, Audience::Client).unwrap();
        assert_eq!(request.parameter(2), "a.txt");
        assert_eq!(&line[request.content_at.unwrap()..], b" QUJD");
    }

    #[test]
    fn a_line_that_is_not_utf8_is_said_to_be_so() {
        assert_eq!(refused(b"\xff"), "request bukan UTF-8");
        assert_eq!(refused(b"SEND MESSAGE 00 henderson \xc3"), "request bukan UTF-8");
        assert_eq!(refused(b"SEND FILE 00 henderson \xff.txt QUJD"), "request bukan UTF-8");
        assert_eq!(refused(b"HALO"), "request tidak dikenali");
    }

    #[test]
    fn a_word_as_long_as_a_token_may_have_a_blank_in_it_or_behind_it() {
        for blank in [0, 1, 7, 8, 9, 30, 31, 32, 33] {
            let text = format!("{} {}", "x".repeat(blank), "y".repeat(40 - blank));
            let expected = text.split(' ').find(|word| !word.is_empty()).unwrap();
            assert_eq!(word(&text).0, expected, "{text:?}");
        }
        assert_eq!(word(&"a".repeat(32)), (&*"a".repeat(32), ""));
        assert_eq!(word(&format!("{} b", "a".repeat(32))), (&*"a".repeat(32), " b"));
        assert_eq!(word(&format!("{} b", "a".repeat(31))), (&*"a".repeat(31), " b"));
        assert_eq!(word(&format!("a {} b", "a".repeat(30))), ("a", &*format!(" {} b", "a".repeat(30))));
    }

    proptest! {
        #[test]
        fn a_word_ends_at_the_first_blank(word in "[^ ]{0,40}", rest in "( .{0,50})?", blanks in 0usize..3) {
            let text = format!("{}{word}{rest}", " ".repeat(blanks));
            if word.is_empty() {
                prop_assert_eq!(super::word(&text).0, text.split(' ').find(|word| !word.is_empty()).unwrap_or_default());
            } else {
                prop_assert_eq!(super::word(&text), (&*word, &*rest));
                prop_assert_eq!(word_bytes(text.as_bytes()), (word.as_bytes(), rest.as_bytes()));
            }
        }

        #[test]
        fn every_line_gets_an_answer_made_of_its_own_parts(line in "(?s)((?i:send message|send file|auth|send|inbox|PING|CREATE GROUP) *)?.{0,60}") {
            if let Ok(request) = parse(line.as_bytes(), Audience::Admin) {
                let range = line.as_bytes().as_ptr_range();
                for parameter in request.parameters.iter().filter(|parameter| !parameter.is_empty()) {
                    prop_assert!(range.contains(&parameter.as_ptr()));
                }
            }
        }
    }
}
