//! Replies: one compact JSON object each, ended by `\r\n\r\n`, in either dialect. Written into a buffer that the caller
//! owns; nothing here knows of users, sockets or disks.
//!
//! `serde_json` escapes every text that needs it, so no control character, and with it no terminator, stands inside a reply. The keys
//! are put down here, since their order is part of the protocol and two of them hold blanks.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::time::{Duration, UNIX_EPOCH};

use crate::backup::Point;
use crate::change::{FileId, Message};
use crate::refusal::Refusal;
use crate::verb::{Audience, Dialect, Spec, Verb, shown};

/// Ends every reply.
pub const END: &[u8] = b"\r\n\r\n";

/// What a window client takes for a refused login; it takes every other text for a login that worked.
const CLASSIC_LOGIN_REFUSED: &str = "Password Salah";

/// What is said on OK, but for messages and contents of files.
#[derive(Debug)]
pub enum Reply<'s> {
    /// It is done.
    Done,
    /// A login.
    Token(String),
    /// Names in order.
    Names(Vec<&'s str>),
    /// Groups with their members.
    Groups(BTreeMap<&'s str, Vec<&'s str>>),
    /// A file list.
    Files(&'s BTreeMap<Box<str>, BTreeMap<Box<str>, Vec<FileId>>>),
    /// Every request that there is.
    Help(Audience),
    /// What a backup holds.
    Held(&'s Point),
}

/// A message in an INBOX reply.
#[derive(Clone, Copy, Debug)]
pub struct Item<'s> {
    /// Its number in the mailbox.
    pub id: u64,
    /// What was said, by whom, to whom and when.
    pub message: Message<'s>,
}

/// Writes an OK reply to the request of `spec`.
pub fn ok(out: &mut Vec<u8>, reply: &Reply<'_>, spec: &Spec) {
    let classic = spec.dialect == Dialect::Classic;
    out.extend_from_slice(br#"{"status":"OK""#);
    match reply {
        Reply::Done if classic => key_and_text(out, "message", done(spec.verb)),
        Reply::Done => {}
        Reply::Token(token) => {
            key_and_text(out, "data", token);
            if classic {
                key_and_text(out, "tokenid", token);
            }
        }
        Reply::Names(names) => {
            key(out, "data");
            list(out, names.iter().copied());
        }
        Reply::Groups(groups) => {
            key(out, "data");
            lists(out, groups.iter().map(|(name, members)| (*name, members.iter().copied())));
        }
        Reply::Files(files) => {
            for name in ["data", "messages"].iter().take(if classic { 2 } else { 1 }) {
                key(out, name);
                lists(out, files.iter().map(|(party, names)| (&**party, names.keys().map(|name| &**name))));
            }
        }
        Reply::Help(audience) => {
            key(out, "data");
            let usages: Vec<String> = shown(*audience).map(|spec| spec.usage().to_string()).collect();
            list(out, usages.iter().map(String::as_str));
        }
        Reply::Held(point) => {
            key(out, "data");
            put(&serde_json::to_writer(&mut *out, &point.to_json()));
        }
    }
    out.push(b'}');
    out.extend_from_slice(END);
}

/// Writes an ERROR reply; `spec` is the request's row where its verb was recognised.
pub fn error(out: &mut Vec<u8>, refusal: &Refusal, spec: Option<&Spec>) {
    let text_of_refusal = refusal.to_string();
    out.extend_from_slice(br#"{"status":"ERROR""#);
    key_and_text(out, "data", &text_of_refusal);
    if let Some(spec) = spec.filter(|spec| spec.dialect == Dialect::Classic) {
        let message = if spec.verb == Verb::Auth { CLASSIC_LOGIN_REFUSED } else { &text_of_refusal };
        key_and_text(out, "message", message);
    }
    out.push(b'}');
    out.extend_from_slice(END);
}

/// Writes what stands before the content in the reply to a download.
pub fn download_start(out: &mut Vec<u8>, name: &str, spec: &Spec) {
    out.extend_from_slice(br#"{"status":"OK""#);
    key_and_text(out, "nama file", name);
    if spec.dialect == Dialect::Classic {
        key_and_text(out, "filename", name);
        key_and_text(out, "messages", "file diterima");
    }
    key(out, "data");
    out.push(b'"');
}

/// Writes what stands behind it.
pub fn download_end(out: &mut Vec<u8>) {
    out.extend_from_slice(b"\"}");
    out.extend_from_slice(END);
}

/// Makes INBOX replies; keeps its memory from one to the next.
#[derive(Debug, Default)]
pub struct InboxWriter {
    /// The messages as objects, in order of arrival.
    written: Vec<u8>,
    classic: Vec<u8>,
    pieces: Vec<Piece>,
    /// Which list of the reply a key's messages go into, by the order of the key's first message.
    lists: BTreeMap<Box<[u8]>, usize>,
    lists_classic: BTreeMap<Box<[u8]>, usize>,
    times: TimeWriter,
}

/// How the object of a message begins, and of those behind it that go the same way.
struct Opening<'s> {
    from: &'s [u8],
    to: &'s [u8],
    /// Where it stands; empty before it was written.
    written: Range<usize>,
    list: Option<usize>,
}

impl<'s> Opening<'s> {
    fn of(message: &Message<'s>) -> Self {
        Self { from: message.from, to: message.to, written: 0..0, list: None }
    }

    fn is_of(&self, message: &Message<'_>) -> bool {
        self.from == message.from && self.to == message.to
    }
}

/// Where an object stands, and which list it goes into.
#[derive(Debug)]
struct Piece {
    written: Range<usize>,
    list: usize,
    classic: Range<usize>,
    list_classic: usize,
}

impl InboxWriter {
    /// Writes the reply with as many of `items` as fit into `bytes_max`, at least one. Says how many.
    pub fn write<'s>(
        &mut self,
        out: &mut Vec<u8>,
        items: impl Iterator<Item = Item<'s>>,
        bytes_max: usize,
        dialect: Dialect,
    ) -> usize {
        let is_classic = dialect == Dialect::Classic;
        self.clear();
        let mut last: Option<Opening<'_>> = None;
        for item in items {
            let before = (self.written.len(), self.classic.len());
            separate_pieces(&mut self.written);
            separate_pieces(&mut self.classic);
            let begin = (self.written.len(), self.classic.len());
            let opening = last.take().filter(|last| last.is_of(&item.message));
            let opening = opening.unwrap_or_else(|| Opening::of(&item.message));
            let opening = last.insert(opening);
            self.write_item(&item, opening);
            if is_classic {
                self.write_classic_item(&item);
            }
            if !self.pieces.is_empty() && self.bytes() > bytes_max {
                self.written.truncate(before.0);
                self.classic.truncate(before.1);
                break;
            }
            let list = *opening.list.get_or_insert_with(|| list_of(&mut self.lists, item.message.from));
            let Message { from, to, is_to_group, .. } = item.message;
            let key_classic = if is_to_group { to } else { from };
            let list_classic = if is_classic { list_of(&mut self.lists_classic, key_classic) } else { 0 };
            let (written, classic) = (begin.0..self.written.len(), begin.1..self.classic.len());
            self.pieces.push(Piece { written, list, classic, list_classic });
        }
        out.reserve(self.bytes());
        out.extend_from_slice(br#"{"status":"OK""#);
        key(out, "data");
        let pieces = self.pieces.iter().map(|piece| (piece.list, piece.written.clone()));
        grouped(out, &self.lists, &self.written, pieces);
        if is_classic {
            key(out, "messages");
            let pieces = self.pieces.iter().map(|piece| (piece.list_classic, piece.classic.clone()));
            grouped(out, &self.lists_classic, &self.classic, pieces);
        }
        out.push(b'}');
        out.extend_from_slice(END);
        self.pieces.len()
    }

    /// What the reply will take, to within its frame and its keys' quotes.
    fn bytes(&self) -> usize {
        const FRAME_BYTES: usize = 64;
        const KEY_BYTES: usize = 40;
        let keys = (self.lists.len() + self.lists_classic.len() + 2) * KEY_BYTES;
        self.written.len() + self.classic.len() + 2 * self.pieces.len() + keys + FRAME_BYTES
    }

    fn write_item(&mut self, item: &Item<'_>, opening: &mut Opening<'_>) {
        let (out, message) = (&mut self.written, &item.message);
        if opening.written.is_empty() {
            let start = out.len();
            out.extend_from_slice(br#"{"nama pengirim":"#);
            text_bytes(out, message.from);
            out.extend_from_slice(br#","nama penerima":"#);
            text_bytes(out, message.to);
            out.extend_from_slice(br#","pesan":"#);
            opening.written = start..out.len();
        } else {
            out.extend_from_within(opening.written.clone());
        }
        text_bytes(out, message.text);
        out.extend_from_slice(br#","waktu":""#);
        self.times.write(out, message.at);
        out.extend_from_slice(br#"","id":"#);
        out.extend_from_slice(itoa::Buffer::new().format(item.id).as_bytes());
        out.push(b'}');
    }

    fn write_classic_item(&mut self, item: &Item<'_>) {
        let out = &mut self.classic;
        out.extend_from_slice(br#"{"msg_from":"#);
        text_bytes(out, item.message.from);
        out.extend_from_slice(br#","msg_to":"#);
        text_bytes(out, item.message.to);
        out.extend_from_slice(br#","msg":"#);
        text_bytes(out, item.message.text);
        out.push(b'}');
    }

    fn clear(&mut self) {
        // A reply is bounded, but the memory for the largest is not kept for the usual one.
        const BYTES_KEPT: usize = 256 * 1024;
        for scratch in [&mut self.written, &mut self.classic] {
            scratch.clear();
            scratch.shrink_to(BYTES_KEPT);
        }
        self.pieces.clear();
        self.lists.clear();
        self.lists_classic.clear();
    }
}

fn list_of(lists: &mut BTreeMap<Box<[u8]>, usize>, name: &[u8]) -> usize {
    if let Some(list) = lists.get(name) {
        return *list;
    }
    let list = lists.len();
    lists.insert(name.into(), list);
    list
}

/// Puts a comma behind the objects that are there.
fn separate_pieces(written: &mut Vec<u8>) {
    if !written.is_empty() {
        written.push(b',');
    }
}

/// Writes a dictionary from each key to its pieces of `written`, keys in the order of their numbers, pieces in their own.
fn grouped(
    out: &mut Vec<u8>,
    keys: &BTreeMap<Box<[u8]>, usize>,
    written: &[u8],
    pieces: impl Iterator<Item = (usize, Range<usize>)>,
) {
    let mut names: Vec<(&usize, &[u8])> = keys.iter().map(|(name, list)| (list, &**name)).collect();
    names.sort_unstable();
    out.push(b'{');
    if let [(_, name)] = names.as_slice() {
        // Nearly all that is read at once is from one sender, and stands there as it should be.
        text_bytes(out, name);
        out.extend_from_slice(b":[");
        out.extend_from_slice(written);
        out.extend_from_slice(b"]}");
        return;
    }
    let mut pieces: Vec<(usize, Range<usize>)> = pieces.collect();
    pieces.sort_by_key(|(list, _)| *list);
    let mut pieces = pieces.into_iter().peekable();
    for (list, name) in names {
        separate(out, b'{');
        text_bytes(out, name);
        out.extend_from_slice(b":[");
        while let Some((_, piece)) = pieces.next_if(|(of, _)| of == list) {
            separate(out, b'[');
            out.extend_from_slice(&written[piece]);
        }
        out.push(b']');
    }
    out.push(b'}');
}

/// What a classic client shows when a request without data has worked.
fn done(verb: Verb) -> &'static str {
    match verb {
        Verb::SendFile | Verb::SendGroupFile => "file terkirim",
        _ => "pesan terkirim",
    }
}

fn lists<'a, L>(out: &mut Vec<u8>, entries: impl Iterator<Item = (&'a str, L)>)
where
    L: Iterator<Item = &'a str>,
{
    out.push(b'{');
    for (name, values) in entries {
        separate(out, b'{');
        text(out, name);
        out.push(b':');
        list(out, values);
    }
    out.push(b'}');
}

fn list<'a>(out: &mut Vec<u8>, values: impl Iterator<Item = &'a str>) {
    out.push(b'[');
    for value in values {
        separate(out, b'[');
        text(out, value);
    }
    out.push(b']');
}

/// Puts a comma, unless the list has just been opened.
fn separate(out: &mut Vec<u8>, opening: u8) {
    if out.last() != Some(&opening) {
        out.push(b',');
    }
}

/// The keys are our own and need no escaping.
fn key(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn key_and_text(out: &mut Vec<u8>, name: &str, value: &str) {
    key(out, name);
    text(out, value);
}

fn text(out: &mut Vec<u8>, value: &str) {
    text_bytes(out, value.as_bytes());
}

/// The same for what is known to be UTF-8.
fn text_bytes(out: &mut Vec<u8>, value: &[u8]) {
    if needs_escape(value) {
        return put(&serde_json::to_writer(out, &String::from_utf8_lossy(value)));
    }
    out.push(b'"');
    out.extend_from_slice(value);
    out.push(b'"');
}

/// Every byte is looked at without a branch, so that many are at once.
fn needs_escape(bytes: &[u8]) -> bool {
    bytes.iter().fold(false, |found, byte| found | (*byte < b' ') | (*byte == b'"') | (*byte == b'\\'))
}

/// Writes times. Messages that are read together mostly come from the same seconds.
#[derive(Debug, Default)]
struct TimeWriter {
    second: u64,
    /// That second as far as its point, once there was one.
    written: Vec<u8>,
}

impl TimeWriter {
    /// A time in milliseconds, as RFC 3339 in UTC.
    fn write(&mut self, out: &mut Vec<u8>, at: u64) {
        const DIGITS_BEHIND_POINT: usize = "000Z".len();
        let (second, millis) = (at / 1000, at % 1000);
        if self.written.is_empty() || self.second != second {
            self.second = second;
            self.written.clear();
            let at = UNIX_EPOCH.checked_add(Duration::from_secs(second)).unwrap_or(UNIX_EPOCH);
            put(&write!(self.written, "{}", humantime::format_rfc3339_millis(at)));
            self.written.truncate(self.written.len().saturating_sub(DIGITS_BEHIND_POINT));
        }
        out.extend_from_slice(&self.written);
        let digit = |power: u64| u8::try_from(millis / power % 10).unwrap_or(0) + b'0';
        out.extend_from_slice(&[digit(100), digit(10), digit(1), b'Z']);
    }
}

/// Memory takes every write, so there is no error to pass on.
fn put<E>(result: &Result<(), E>) {
    debug_assert!(result.is_ok());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verb::recognise;
    use proptest::prelude::*;
    use serde_json::Value;

    fn spec(verb: &str) -> &'static Spec {
        recognise(verb.as_bytes(), Audience::Client).unwrap().0
    }

    fn json(out: &[u8]) -> Value {
        serde_json::from_slice(out.strip_suffix(END).expect("a reply ends in its terminator")).unwrap()
    }

    proptest! {
        #[test]
        fn a_text_is_what_serde_json_makes_of_it(value in "\\PC*|[ -~]*|.*") {
            let mut out = Vec::new();
            text(&mut out, &value);
            prop_assert_eq!(String::from_utf8(out).unwrap(), serde_json::to_string(&value).unwrap());
        }

        #[test]
        fn a_time_is_what_humantime_makes_of_it(times in prop::collection::vec(0_u64..4_000_000_000_000, 1..5), next in 0_u64..2000) {
            let mut writer = TimeWriter::default();
            for at in times.into_iter().flat_map(|at| [at, at + next]) {
                let mut out = Vec::new();
                writer.write(&mut out, at);
                let expected = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(at)).to_string();
                prop_assert_eq!(String::from_utf8(out).unwrap(), expected);
            }
        }
    }

    #[test]
    fn every_byte_that_must_be_escaped_is_found() {
        for byte in 0..=u8::MAX {
            for (length, at) in [(4, 2), (16, 0), (16, 15), (17, 16), (17, 0), (40, 20), (40, 39), (32, 16)] {
                let mut text = vec![b'a'; length];
                text[at] = byte;
                let is_escaped = byte < b' ' || byte == b'"' || byte == b'\\';
                assert_eq!(needs_escape(&text), is_escaped, "{byte} at {at} of {length}");
            }
        }
    }

    #[test]
    fn an_unknown_request_gets_exactly_the_protocols_answer() {
        let mut out = Vec::new();
        error(&mut out, &Refusal::UnknownRequest, None);
        assert_eq!(out, b"{\"status\":\"ERROR\",\"data\":\"request tidak dikenali\"}\r\n\r\n");
    }

    #[test]
    fn a_classic_login_is_refused_in_the_one_way_that_its_client_knows() {
        let mut out = Vec::new();
        error(&mut out, &Refusal::ServerBusy, Some(spec("auth")));
        let reply = json(&out);
        assert_eq!(reply["data"], "server sibuk, coba lagi");
        assert_eq!(reply["message"], "Password Salah");
    }

    #[test]
    fn an_inbox_reply_stops_before_it_is_too_large_but_gives_at_least_one_message() {
        let long = "x".repeat(1000);
        let message = Message { at: 0, from: b"messi", to: b"lineker", is_to_group: false, text: long.as_bytes() };
        let item = |id| Item { id, message };
        let mut writer = InboxWriter::default();
        for dialect in [Dialect::Written, Dialect::Classic] {
            for bytes_max in [10, 3_000, 6_000, 20_000] {
                let mut out = Vec::new();
                let count = writer.write(&mut out, (1..=30).map(item), bytes_max, dialect);
                assert!(count >= 1);
                assert!(out.len() <= bytes_max || count == 1, "{} bytes of {bytes_max}", out.len());
                assert_eq!(json(&out)["data"]["messi"].as_array().unwrap().len(), count);
            }
        }
    }

    proptest! {
        #[test]
        fn an_inbox_reply_holds_each_message_once_in_order(
            messages in proptest::collection::vec((0usize..3, 0usize..3, any::<bool>(), "(?s).{0,20}"), 0..20),
            classic: bool,
        ) {
            let names = ["messi", "henderson", "lineker"];
            let items = messages.iter().enumerate().map(|(index, (from, to, is_to_group, text))| Item {
                id: index as u64,
                message: Message {
                    at: index as u64,
                    from: names[*from].as_bytes(),
                    to: names[*to].as_bytes(),
                    is_to_group: *is_to_group,
                    text: text.as_bytes(),
                },
            });
            let mut out = Vec::new();
            let dialect = if classic { Dialect::Classic } else { Dialect::Written };
            let count = InboxWriter::default().write(&mut out, items.clone(), usize::MAX, dialect);
            prop_assert_eq!(count, messages.len());
            prop_assert!(!out[..out.len() - 4].contains(&b'\n'));
            let reply = json(&out);
            for name in names {
                let from = items.clone().filter(|item| item.message.from == name.as_bytes());
                let expected: Vec<(u64, &str)> =
                    from.map(|item| (item.id, std::str::from_utf8(item.message.text).unwrap())).collect();
                let listed = reply["data"].get(name).map_or(&[][..], |list| list.as_array().unwrap());
                let found: Vec<(u64, &str)> =
                    listed.iter().map(|item| (item["id"].as_u64().unwrap(), item["pesan"].as_str().unwrap())).collect();
                prop_assert_eq!(found, expected);
            }
            prop_assert_eq!(reply.get("messages").is_some(), classic);
        }
    }
}
