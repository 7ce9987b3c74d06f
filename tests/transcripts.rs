//! Conversations with the engine, in files that a person can read: `tests/transcripts/*.txt`.
//!
//! | line | means |
//! |---|---|
//! | `# …` | a remark |
//! | `messi> REQUEST` | the connection `messi` sends this line; it is opened when it is first named |
//! | `messi>> BYTES` | it sends these bytes and no line end |
//! | `messi> (end)` | it ends its side |
//! | `messi< REPLY` | the next that it receives is exactly this, and the reply's end |
//! | `messi< (nothing)` | it has received nothing more |
//! | `messi< (closed)` | the server has closed the connection, and nothing more came |
//! | `messi takes N bytes` | the kernel takes no more than this for the connection |
//! | `messi! (gone)` | the connection breaks |
//! | `messi! (closed)` | the server has closed the connection, in the middle of what it had sent |
//! | `limits FLAGS`, `registration open\|closed` | how the server is set up; only before the first connection |
//! | `clock +N ms\|s\|d`, `disk full\|free`, `passwords hold\|release` | what happens around it |
//!
//! `$name` in a reply stands for a token: the first time for any, and from then on for the same one. The connection
//! `admin`, like any whose name begins so, is on the admin socket; `messi@192.0.2.1` comes from there and not from 127.0.0.1. `\r`, `\n`, `\\`, `\xHH` and `\*N{…}` (N times) are bytes. It is always
//! 2026-01-01T00:00:00.000Z unless the clock is moved. messi, henderson, lineker and their group1 exist.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use common::MemoryWorkers;
use kurir::connection::{ConnectionId, Peer};
use kurir::engine::{Completion, Registration};
use kurir::limits::Limits;
use kurir::local::Local;

const START: u64 = 1_767_225_600_000;
const END: &[u8] = b"\r\n\r\n";

macro_rules! transcripts {
    ($($name:ident)*) => {
        $(#[test] fn $name() { run(stringify!($name)); })*

        #[test]
        fn every_transcript_is_run() {
            let listed = [$(stringify!($name)),*];
            let files = fs::read_dir(directory()).unwrap().map(|file| file.unwrap().path());
            let mut missing: Vec<PathBuf> =
                files.filter(|file| !listed.contains(&file.file_stem().unwrap().to_str().unwrap())).collect();
            missing.sort();
            assert!(missing.is_empty(), "not in the list above: {missing:?}");
        }
    };
}

transcripts! {
    addresses
    admin
    auth
    auth_failures
    auth_order
    auth_queue_full
    auth_queue_share
    change_password
    classic_auth
    classic_errors
    classic_files
    classic_messages
    create_group
    delete_file
    disk_full
    download_file
    downloads_at_once
    end_of_stream
    deadlines
    deadlines_of_files
    deadlines_of_strangers
    deadlines_of_the_deaf
    file_limits
    framing
    group_limits
    group_members
    help_and_ping
    inbox
    inbox_again
    inbox_limits
    inboxes_per_user
    join_group
    leave_group
    line_too_long
    listed_files
    logout
    mailbox_full
    memory_full
    memory_shares
    memory_short
    my_file
    my_group
    output_limits
    password_guesses
    register
    register_closed
    register_throttled
    send_file
    send_group_file
    send_group_message
    send_message
    server_full
    token
    tokens_per_user
    transfers_per_user
    unknown_request
    uploads_at_once
    user_files
    user_removed
}

#[derive(Parser)]
struct LimitFlags {
    #[command(flatten)]
    limits: Limits,
}

struct Conversation {
    local: Local<MemoryWorkers>,
    connections: BTreeMap<String, ConnectionId>,
    received: HashMap<String, Vec<u8>>,
    tokens: HashMap<String, String>,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts")
}

fn run(name: &str) {
    let path = directory().join(name).with_extension("txt");
    let text = fs::read_to_string(&path).unwrap();
    let mut limits = Limits::default();
    let mut registration = Registration::Open;
    let mut conversation = None;
    for (index, line) in text.lines().enumerate() {
        let place = format!("{name}.txt:{}", index + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(flags) = line.strip_prefix("limits ") {
            assert!(conversation.is_none(), "{place}: too late");
            limits = LimitFlags::parse_from([""].into_iter().chain(flags.split(' '))).limits;
            continue;
        }
        if let Some(state) = line.strip_prefix("registration ") {
            assert!(conversation.is_none(), "{place}: too late");
            registration = Registration::from_str(state, false).unwrap();
            continue;
        }
        let conversation = conversation.get_or_insert_with(|| Conversation::new(limits.clone(), registration));
        conversation.line(line, &place);
    }
    conversation.expect("a transcript says something").end(name);
}

impl Conversation {
    fn new(limits: Limits, registration: Registration) -> Self {
        let engine = common::engine(limits, registration);
        let mut local = Local::new(engine, MemoryWorkers::default(), START);
        let admin = local.open(Peer::Admin);
        let mut ask = |line: &str| String::from_utf8(local.request(admin, line).unwrap()).unwrap();
        for name in ["messi", "henderson", "lineker"] {
            ask(&format!("USER ADD {name} surabaya"));
        }
        let login = ask("AUTH messi surabaya");
        let token = login.split('"').nth(7).unwrap().to_owned();
        ask(&format!("CREATE GROUP {token} group1"));
        ask(&format!("ADD MEMBER {token} group1 henderson"));
        ask(&format!("ADD MEMBER {token} group1 lineker"));
        assert!(ask(&format!("LOGOUT {token}")).contains("OK"));
        local.end(admin);
        local.settle().unwrap();
        assert!(local.is_closed(admin));
        Self { local, connections: BTreeMap::new(), received: HashMap::new(), tokens: HashMap::new() }
    }

    fn line(&mut self, line: &str, place: &str) {
        if let Some(by) = line.strip_prefix("clock +") {
            self.local.pass(milliseconds(by).unwrap_or_else(|| panic!("{place}: {by} is no time")));
            self.local.turn().unwrap();
        } else if let Some(disk) = line.strip_prefix("disk ") {
            self.local.workers.is_disk_full = disk == "full";
            let room = self.local.workers.set_disk();
            self.local.engine.complete(room);
        } else if line == "passwords hold" {
            self.local.workers.held_passwords = Some(Vec::new());
        } else if line == "passwords release" {
            for job in self.local.workers.held_passwords.take().unwrap() {
                self.local.engine.complete(Completion::Password(common::check(&job)));
            }
        } else if let Some((name, expected)) = line.split_once("< ").filter(|(name, _)| !name.contains('>')) {
            self.expect(name, expected, place);
        } else if let Some(name) = line.strip_suffix("! (gone)") {
            let id = self.forget(name);
            self.local.break_off(id);
        } else if let Some(name) = line.strip_suffix("! (closed)") {
            let id = self.forget(name);
            assert!(self.local.is_closed(id), "{place}: it is still open");
        } else if let Some((name, bytes)) = line.strip_suffix(" bytes").and_then(|line| line.split_once(" takes ")) {
            let id = self.connection(name);
            self.local.set_output_room(id, bytes.parse().unwrap());
        } else if let Some((name, bytes)) = line.split_once(">> ") {
            self.send(name, &self.bytes(bytes, place));
        } else if let Some((name, request)) = line.split_once("> ") {
            if request == "(end)" {
                let id = self.connection(name);
                self.local.end(id);
            } else {
                self.send(name, &[&self.bytes(request, place)[..], b"\r\n"].concat());
            }
        } else {
            panic!("{place}: what does this line mean? {line}");
        }
        self.local.settle().unwrap();
    }

    /// What it received does not count.
    fn forget(&mut self, name: &str) -> ConnectionId {
        self.received.remove(name);
        self.connections.remove(name).unwrap()
    }

    fn send(&mut self, name: &str, bytes: &[u8]) {
        let id = self.connection(name);
        self.local.send(id, bytes);
    }

    fn connection(&mut self, name: &str) -> ConnectionId {
        let peer = match name.split_once('@') {
            Some((_, address)) => Peer::Address(address.parse().unwrap()),
            None if name.starts_with("admin") => Peer::Admin,
            None => Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        };
        let local = &mut self.local;
        *self.connections.entry(name.to_owned()).or_insert_with(|| local.open(peer))
    }

    fn expect(&mut self, name: &str, expected: &str, place: &str) {
        let id = self.connection(name);
        self.local.settle().unwrap();
        let received = self.received.entry(name.to_owned()).or_default();
        received.extend(self.local.received(id));
        if expected == "(nothing)" || expected == "(closed)" {
            assert_eq!(String::from_utf8_lossy(received), "", "{place}: something came");
            assert_eq!(self.local.is_closed(id), expected == "(closed)", "{place}: closed?");
            return;
        }
        let end = received.windows(END.len()).position(|window| window == END);
        let end = end.unwrap_or_else(|| panic!("{place}: no reply, but {:?}", String::from_utf8_lossy(received)));
        let reply: Vec<u8> = received.drain(..end + END.len()).take(end).collect();
        let reply = String::from_utf8(reply).expect("a reply is UTF-8");
        serde_json::from_str::<serde_json::Value>(&reply).expect("a reply is JSON");
        self.bind_tokens(expected, &reply);
        let expected = String::from_utf8(self.bytes(expected, place)).unwrap();
        assert_eq!(reply, expected, "{place}");
    }

    /// A `$name` that stands for nothing yet takes the token that stands in its place.
    fn bind_tokens(&mut self, expected: &str, reply: &str) {
        for (at, _) in expected.match_indices('$') {
            let name: String = expected[at + 1..].chars().take_while(char::is_ascii_alphanumeric).collect();
            if let Entry::Vacant(unknown) = self.tokens.entry(name) {
                let token = reply.get(at..at + 32).unwrap_or_default();
                assert!(token.bytes().all(|digit| digit.is_ascii_hexdigit()), "no token: {reply}");
                unknown.insert(token.to_owned());
                return;
            }
        }
    }

    fn bytes(&self, text: &str, place: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = text;
        while let Some(letter) = rest.chars().next() {
            let mut used = letter.len_utf8();
            if letter == '$' {
                let name: String = rest[1..].chars().take_while(char::is_ascii_alphanumeric).collect();
                let token = self.tokens.get(&name).unwrap_or_else(|| panic!("{place}: no token ${name}"));
                bytes.extend_from_slice(token.as_bytes());
                used = 1 + name.len();
            } else if rest.starts_with("\\r") || rest.starts_with("\\n") || rest.starts_with("\\\\") {
                bytes.push(match rest.as_bytes()[1] {
                    b'r' => b'\r',
                    b'n' => b'\n',
                    other => other,
                });
                used = 2;
            } else if rest.starts_with("\\x") {
                bytes.push(u8::from_str_radix(&rest[2..4], 16).unwrap());
                used = 4;
            } else if let Some(repeated) = rest.strip_prefix("\\*") {
                let (count, after) = repeated.split_once('{').unwrap();
                let (piece, _) = after.split_once('}').unwrap();
                bytes.extend(piece.repeat(count.parse().unwrap()).bytes());
                used = 2 + count.len() + 1 + piece.len() + 1;
            } else {
                bytes.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
            }
            rest = &rest[used..];
        }
        bytes
    }

    fn end(mut self, name: &str) {
        for (connection, id) in &self.connections {
            let mut left = self.received.remove(connection).unwrap_or_default();
            left.extend(self.local.received(*id));
            assert_eq!(String::from_utf8_lossy(&left), "", "{name}: {connection} has received more");
        }
        for id in self.connections.into_values() {
            self.local.end(id);
        }
        self.local.settle().unwrap();
        assert_eq!(self.local.workers.transfers(), 0, "{name}: a transfer was left open");
        if self.local.workers.held_passwords.is_none() {
            assert_eq!(self.local.engine.connections(), 0, "{name}: a connection was left open");
        }
    }
}

fn milliseconds(text: &str) -> Option<u64> {
    let (number, unit) = text.split_once(' ')?;
    let unit = match unit {
        "ms" => 1,
        "s" => 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return None,
    };
    number.parse::<u64>().ok().map(|number| number * unit)
}
