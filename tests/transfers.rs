//! Files in and out, in any pieces, cut anywhere, up to their limits, and through a crash.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::MemoryWorkers;
use common::process::Server;
use kurir::change::FileId;
use kurir::connection::{ConnectionId, Peer};
use kurir::engine::Registration;
use kurir::files::{FileDone, FileJob, TransferId};
use kurir::limits::Limits;
use kurir::local::Local;
use kurir::log::Sync;
use kurir::store::Store;
use proptest::prelude::*;

const OK: &str = "{\"status\":\"OK\"}\r\n\r\n";

/// A server in memory with messi and henderson, and a token of each.
struct Memory {
    local: Local<MemoryWorkers>,
    tokens: [String; 2],
}

impl Memory {
    fn new(limits: Limits) -> Self {
        let engine = common::engine(limits, Registration::Closed);
        let mut local = Local::new(engine, MemoryWorkers::default(), 1_767_225_600_000);
        let done = local.workers.set_disk();
        local.engine.complete(done);
        let admin = local.open(Peer::Admin);
        let tokens = ["messi", "henderson"].map(|name| {
            local.request(admin, &format!("USER ADD {name} surabaya")).unwrap();
            let reply = local.request(admin, &format!("AUTH {name} surabaya")).unwrap();
            let reply: serde_json::Value = serde_json::from_slice(&reply).unwrap();
            reply["data"].as_str().unwrap().to_owned()
        });
        Self { local, tokens }
    }

    fn open(&mut self) -> ConnectionId {
        self.local.open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)))
    }

    fn line(&self, name: &str, content: &[u8]) -> Vec<u8> {
        format!("SEND FILE {} henderson {name} {}\r\n", self.tokens[0], STANDARD.encode(content)).into_bytes()
    }

    /// Sends pieces, each of which arrives before the next; what comes back.
    fn send<'p>(&mut self, id: ConnectionId, pieces: impl IntoIterator<Item = &'p [u8]>) -> String {
        for piece in pieces {
            self.local.send(id, piece);
            self.local.settle().unwrap();
        }
        String::from_utf8(self.local.received(id)).unwrap()
    }

    fn request(&mut self, line: &str) -> serde_json::Value {
        let id = self.open();
        let reply = self.local.request(id, line).unwrap();
        self.local.end(id);
        self.local.settle().unwrap();
        serde_json::from_slice(&reply).unwrap()
    }

    /// What henderson gets under a name, if there is anything.
    fn downloaded(&mut self, name: &str) -> Option<Vec<u8>> {
        let line = format!("DOWNLOAD FILE {} messi {name}", self.tokens[1]);
        let reply = self.request(&line);
        (reply["status"] == "OK").then(|| STANDARD.decode(reply["data"].as_str().unwrap()).unwrap())
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * at / 7 + at).to_le_bytes()[0]).collect()
}

#[test]
fn a_line_that_is_split_at_any_byte_gives_the_same_file() {
    // Kept in the journal, and in a file of its own.
    for small_file_bytes_max in [16 * 1024, 0] {
        let mut memory = Memory::new(Limits { small_file_bytes_max, ..Limits::default() });
        for bytes in [0, 1, 2, 3, 100] {
            let content = content(bytes);
            let line = memory.line("a.bin", &content);
            let id = memory.open();
            for at in 0..=line.len() {
                let (first, second) = line.split_at(at);
                assert_eq!(memory.send(id, [first, second]), OK, "{bytes} bytes, split at {at}");
                assert_eq!(memory.downloaded("a.bin").unwrap(), content, "{bytes} bytes, split at {at}");
            }
        }
        let apart = memory.local.workers.files.len();
        assert_eq!(apart, usize::from(small_file_bytes_max == 0), "what was replaced is gone");
    }
}

#[test]
fn a_small_file_is_one_to_the_byte() {
    let limits = Limits { small_file_bytes_max: 1000, ..Limits::default() };
    for (bytes, apart) in [(999, 0), (1000, 0), (1001, 1), (1002, 1)] {
        let mut memory = Memory::new(limits.clone());
        let (line, id) = (memory.line("a.bin", &content(bytes)), memory.open());
        assert_eq!(memory.send(id, [&*line]), OK);
        assert_eq!(memory.local.workers.files.len(), apart, "{bytes} bytes");
        assert_eq!(memory.downloaded("a.bin").unwrap(), content(bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_large_file_comes_whole_in_any_chunks(
        bytes in 20_000usize..200_000,
        chunks in proptest::collection::vec(prop_oneof![1usize..50, 1_000usize..40_000], 1..20),
        block in prop_oneof![3usize..3_000, Just(49_152usize)],
    ) {
        let mut memory = Memory::new(Limits::default());
        memory.local.engine.set_block_bytes(block);
        let content = content(bytes);
        let (line, id) = (memory.line("a.bin", &content), memory.open());
        let mut rest = &line[..];
        // Many tiny pieces of a large file would take long and show nothing more.
        let least = bytes / 200;
        for chunk in chunks.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*chunk).max(least).min(rest.len()));
            memory.local.send(id, piece);
            memory.local.turn().unwrap();
            rest = after;
        }
        prop_assert_eq!(memory.send(id, []), "");
        memory.local.settle().unwrap();
        prop_assert_eq!(String::from_utf8(memory.local.received(id)).unwrap(), OK);
        prop_assert!(memory.downloaded("a.bin").unwrap() == content);
    }

    #[test]
    fn an_upload_that_breaks_off_anywhere_leaves_nothing(at in prop_oneof![0usize..400, 0usize..260_000], by_end: bool) {
        let limits = Limits { user_bytes_max: 200_000, ..Limits::default() };
        let mut memory = Memory::new(limits);
        let line = memory.line("a.bin", &content(190_000));
        // Without its line end it is never whole.
        let start = &line[..at.min(line.len() - 2)];
        let id = memory.open();
        let said = memory.send(id, [start]);
        prop_assert_eq!(said, "");
        if by_end {
            memory.local.end(id);
        } else {
            memory.local.break_off(id);
        }
        memory.local.settle().unwrap();
        prop_assert_eq!(memory.downloaded("a.bin"), None);
        prop_assert_eq!(memory.local.workers.transfers(), 0);
        prop_assert!(memory.local.workers.files.is_empty());
        // Nor does it count any more.
        let (whole, id) = (memory.line("b.bin", &content(200_000)), memory.open());
        prop_assert_eq!(memory.send(id, [&*whole]), OK);
    }

    #[test]
    fn bad_base64_anywhere_stores_nothing_and_the_connection_goes_on(at in 0usize..40_000, bytes in 1usize..30_000) {
        let mut memory = Memory::new(Limits::default());
        let mut line = memory.line("a.bin", &content(bytes));
        let encoded = line.len() - 2 - STANDARD.encode(content(bytes)).len();
        let place = encoded + at % (line.len() - 2 - encoded);
        line[place] = b'*';
        line.extend_from_slice(b"PING\n");
        let id = memory.open();
        let expected = format!("{{\"status\":\"ERROR\",\"data\":\"base64 tidak valid\"}}\r\n\r\n{OK}");
        prop_assert_eq!(memory.send(id, [&*line]), expected);
        prop_assert_eq!(memory.downloaded("a.bin"), None);
        prop_assert_eq!(memory.local.workers.transfers(), 0);
        prop_assert!(memory.local.workers.files.is_empty());
    }
}

#[test]
fn limits_hold_to_the_byte_for_a_file_of_any_kind() {
    let refused = |text: &str| format!("{{\"status\":\"ERROR\",\"data\":\"{text}\"}}\r\n\r\n");
    // In the journal, in one block, in many.
    for (small_file_bytes_max, max) in [(16 * 1024, 1_000), (0, 1_000), (0, 200_000)] {
        let most = u64::try_from(max).unwrap();
        let base = Limits { small_file_bytes_max, ..Limits::default() };
        let too_large = format!("file terlalu besar: maksimum {max} byte");
        for (limits, text) in [
            (Limits { file_bytes_max: most, ..base.clone() }, &*too_large),
            (Limits { user_bytes_max: most, ..base.clone() }, "kuota penyimpanan penuh"),
            (Limits { files_bytes_max: most, ..base.clone() }, "penyimpanan server penuh"),
        ] {
            let mut memory = Memory::new(limits);
            let id = memory.open();
            let over = memory.line("a.bin", &content(max + 1));
            assert_eq!(memory.send(id, [&*over]), refused(text));
            assert_eq!(memory.downloaded("a.bin"), None);
            let fits = memory.line("a.bin", &content(max));
            assert_eq!(memory.send(id, [&*fits]), OK, "{text}");
            assert_eq!(memory.send(id, [&*fits]), OK, "what it replaces does not count");
            assert_eq!(memory.downloaded("a.bin").unwrap(), content(max));
        }
    }
}

#[test]
fn uploads_at_once_keep_the_quota_together_and_are_told_at_once() {
    let mut memory = Memory::new(Limits { user_bytes_max: 200_000, ..Limits::default() });
    let [first, second] = ["a.bin", "b.bin"].map(|name| memory.line(name, &content(150_000)));
    let ids = [memory.open(), memory.open()];
    let half = first.len() * 2 / 3;
    assert_eq!(memory.send(ids[0], [&first[..half]]), "");
    // The second passes the quota with what the first has taken in, long before its line ends.
    let said = memory.send(ids[1], [&second[..second.len() - 10_000]]);
    assert!(said.contains("kuota penyimpanan penuh"), "{said:?}");
    assert_eq!(memory.send(ids[0], [&first[half..]]), OK);
    assert_eq!(memory.send(ids[1], [&second[second.len() - 10_000..], b"PING\n"]), OK, "the rest was thrown away");
    assert_eq!(memory.downloaded("a.bin").unwrap(), content(150_000));
    assert_eq!(memory.downloaded("b.bin"), None);
}

#[test]
fn a_turn_serves_requests_first_and_transfers_in_turn_within_its_budget() {
    const UPLOADS: usize = 8;
    const SHARE: usize = 64 * 1024;
    let limits =
        Limits { read_bytes_per_turn_max: SHARE as u64, bytes_per_turn_max: 2 * SHARE as u64, ..Limits::default() };
    let mut memory = Memory::new(limits);
    memory.local.engine.set_block_bytes(30_000);
    let uploads: Vec<(ConnectionId, Vec<u8>)> = (0..UPLOADS)
        .map(|number| {
            let (mut line, id) = (memory.line(&number.to_string(), &content(600_000)), memory.open());
            let rest = line.split_off(40_000);
            assert_eq!(memory.send(id, [&*line]), "");
            (id, rest)
        })
        .collect();
    for (id, rest) in &uploads {
        memory.local.send(*id, rest);
    }
    let begun: usize = memory.local.workers.uploaded().iter().sum();
    let pinger = memory.open();
    for turn in 1..=UPLOADS / 2 {
        memory.local.send(pinger, b"PING\n");
        memory.local.turn().unwrap();
        assert_eq!(memory.local.received(pinger), OK.as_bytes(), "a request waits for no transfer");
        let moved = memory.local.workers.uploaded().iter().sum::<usize>() - begun;
        assert!(moved <= turn * 2 * SHARE, "{moved} bytes in {turn} turns");
    }
    // Each has had its share by now, and none a second one before the last had its first.
    let uploaded = memory.local.workers.uploaded();
    let (least, most) = (uploaded.iter().min().unwrap(), uploaded.iter().max().unwrap());
    assert!(uploaded.len() == UPLOADS && *least > begun / UPLOADS && most - least <= SHARE, "{uploaded:?}");
    memory.local.settle().unwrap();
    for (id, _) in uploads {
        assert_eq!(memory.send(id, []), OK);
    }
}

#[test]
fn a_download_goes_on_as_it_was_though_its_file_is_replaced() {
    for (bytes, small_file_bytes_max) in [(400_000, 0), (9_000, 0), (9_000, 16 * 1024)] {
        let mut memory = Memory::new(Limits { small_file_bytes_max, ..Limits::default() });
        let (before, sender) = (memory.line("a.bin", &content(bytes)), memory.open());
        assert_eq!(memory.send(sender, [&*before]), OK);
        let reader = memory.open();
        memory.local.set_output_room(reader, 1_000);
        let line = format!("DOWNLOAD FILE {} messi a.bin\n", memory.tokens[1]);
        let mut reply = memory.send(reader, [line.as_bytes()]);
        assert_eq!(reply.len(), 1_000);
        let after = memory.line("a.bin", b"lain");
        assert_eq!(memory.send(sender, [&*after]), OK);
        assert_eq!(memory.downloaded("a.bin").unwrap(), b"lain");
        memory.local.set_output_room(reader, usize::MAX);
        reply += &memory.send(reader, []);
        memory.local.settle().unwrap();
        reply += &memory.send(reader, []);
        let reply: serde_json::Value = serde_json::from_str(&reply).unwrap();
        assert!(STANDARD.decode(reply["data"].as_str().unwrap()).unwrap() == content(bytes));
    }
}

#[test]
fn a_refusal_comes_with_the_head_of_the_line() {
    let mut memory = Memory::new(Limits::default());
    let id = memory.open();
    let line = format!("SEND FILE {} nobody a.bin {}", memory.tokens[0], "QUJD".repeat(6_000));
    let said = memory.send(id, [line.as_bytes()]);
    assert!(said.contains("user tujuan tidak ditemukan"), "{said:?}");
    assert_eq!(memory.send(id, [&b"QUJD\nPING\n"[..]]), OK);
}

#[test]
fn a_file_that_was_stored_and_never_listed_is_gone_after_a_crash() {
    let root = tempfile::tempdir().unwrap();
    // With the accounts of a demonstration: where there are none, stored files are not given up for a journal that is lost.
    Server::demo(root.path(), &["--log", "warn"]).stop();
    let open = || Store::open(root.path(), Limits::default().segment_bytes, Sync::Always).unwrap();
    let mut store = open();
    for (job, is_stored) in [
        (FileJob::Append(TransferId(1), b"whole".to_vec()), false),
        (FileJob::Store(TransferId(1), FileId(7)), true),
        (FileJob::Append(TransferId(2), b"half".to_vec()), false),
    ] {
        let done = store.disk.files.run(job).unwrap();
        assert_eq!(matches!(done, Some(FileDone::Stored(..))), is_stored);
    }
    assert_eq!(files_below(&root.path().join("files")), 2);
    // The power goes before the journal tells of it.
    drop(store);
    assert_eq!(open().state.files().count(), 0);
    assert_eq!(files_below(&root.path().join("files")), 0);
}

#[test]
fn a_kill_at_any_time_leaves_each_file_whole_or_not_at_all() {
    const KILLS: u64 = 8;
    let root = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<(String, usize)> = Vec::new();
    for kill in 0..=KILLS {
        let server = Server::demo(root.path(), &["--log", "warn"]);
        let (mut messi, token) = server.login("messi");
        let files = messi.request(&format!("MY FILE {token}")).unwrap();
        let names: Vec<String> = serde_json::from_value(files["data"]["messi"].clone()).unwrap_or_default();
        for (name, _) in &acknowledged {
            assert!(names.contains(name), "{name} was acknowledged and is gone");
        }
        for name in &names {
            let reply = messi.request(&format!("DOWNLOAD FILE {token} messi {name}")).unwrap();
            let bytes: usize = name.rsplit_once('-').unwrap().1.parse().unwrap();
            assert!(STANDARD.decode(reply["data"].as_str().unwrap()).unwrap() == content(bytes), "{name} is not whole");
        }
        // Small ones stand in the journal, and nothing is on the disk that nobody lists.
        let apart = names.iter().filter(|name| !name.ends_with("-5000")).count();
        assert_eq!(files_below(&root.path().join("files")), apart);
        if kill == KILLS {
            assert!(acknowledged.len() > 10, "{acknowledged:?}");
            return server.stop();
        }
        let uploader = thread::spawn(move || {
            let mut done = Vec::new();
            for number in 0.. {
                let bytes = [5_000, 40_000, 700_000][number % 3];
                let name = format!("{kill}-{number}-{bytes}");
                let line = format!("SEND FILE {token} messi {name} {}", STANDARD.encode(content(bytes)));
                if messi.request(&line).is_err() {
                    break;
                }
                done.push((name, bytes));
            }
            done
        });
        thread::sleep(Duration::from_millis(30 + kill * 17));
        server.kill();
        acknowledged.extend(uploader.join().unwrap());
    }
}

fn files_below(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

#[test]
fn a_hundred_transfers_at_once_take_a_bounded_memory_each() {
    const TRANSFERS: u64 = 100;
    let root = tempfile::tempdir().unwrap();
    let server = Server::demo(root.path(), &["--log", "warn", "--transfers-per-user-max", "200"]);
    let (mut messi, token) = server.login("messi");
    messi.request(&format!("SEND FILE {token} messi besar.bin {}", STANDARD.encode(content(16_000_000)))).unwrap();
    let before = server.memory_kib();
    let uploads: Vec<TcpStream> = (0..TRANSFERS)
        .map(|number| {
            let mut stream = server.connect();
            let line = format!("SEND FILE {token} messi {number} {}", "QUJD".repeat(500_000));
            stream.write_all(line.as_bytes()).unwrap();
            stream
        })
        .collect();
    // A peer that reads the beginning and no more.
    let downloads: Vec<TcpStream> = (0..TRANSFERS)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(format!("DOWNLOAD FILE {token} messi besar.bin\n").as_bytes()).unwrap();
            stream.read_exact(&mut [0; 100]).unwrap();
            stream
        })
        .collect();
    for _ in 0..20 {
        messi.request("PING").unwrap();
    }
    let growth = server.memory_kib().saturating_sub(before);
    assert!(growth < TRANSFERS * (256 + 256), "{growth} KiB for {TRANSFERS} uploads and as many downloads");
    drop((uploads, downloads));
    messi.request("PING").unwrap();
}
