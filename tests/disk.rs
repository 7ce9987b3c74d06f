//! The disk of the real program: how much of it is used, what happens when it is full or fails, and copies of it.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::process::{Server, kurir, output, text};
use kurir::client::{Client, ClientError};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

const SEGMENT_BYTES: u64 = 256 * 1024;
const BLOCK_BYTES: u64 = 4096;
/// Segments and checkpoints as small as they can be, so that all that happens to them happens soon.
const SMALL: [&str; 6] =
    ["--segment-bytes", "256KiB", "--checkpoint-bytes", "512KiB", "--mailbox-messages-max", "1000000"];
const TEXT_BYTES: usize = 200;
/// What a message takes in the journal besides its text: the names here have five to nine bytes.
const MESSAGE_BYTES: u64 = TEXT_BYTES as u64 + 26 + 18;
/// Nothing here takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client that is logged in.
struct User {
    client: Client<TcpStream>,
    token: String,
}

impl User {
    fn new(server: &Server, name: &str) -> Self {
        let (client, token) = server.login(name);
        Self { client, token }
    }

    /// Sends so many messages; every one must be taken.
    fn send(&mut self, verb: &str, to: &str, count: usize) {
        assert_eq!(self.send_until_refused(verb, to, count), None);
    }

    /// The same, but says why one was refused, if it was.
    fn send_until_refused(&mut self, verb: &str, to: &str, count: usize) -> Option<String> {
        const AT_ONCE: usize = 500;
        let line = format!("{verb} {} {to} {}\n", self.token, "x".repeat(TEXT_BYTES));
        let mut refused = None;
        for start in (0..count).step_by(AT_ONCE) {
            let some = AT_ONCE.min(count - start);
            self.client.stream().write_all(line.repeat(some).as_bytes()).unwrap();
            for _ in 0..some {
                match self.client.reply() {
                    Ok(_) => {}
                    Err(ClientError::Refused(text)) => refused = Some(text),
                    Err(error) => panic!("{error}"),
                }
            }
            if refused.is_some() {
                break;
            }
        }
        refused
    }

    /// Reads everything. Says how many messages there were.
    fn read(&mut self) -> usize {
        let mut count = 0;
        loop {
            let inbox = self.client.request(&format!("INBOX {}", self.token)).unwrap();
            let lists = inbox["data"].as_object().unwrap().values();
            let some: usize = lists.map(|list| list.as_array().unwrap().len()).sum();
            if some == 0 {
                return count;
            }
            count += some;
        }
    }
}

/// Copies a directory with all that is in it, but for sockets.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
        let into = to.join(entry.file_name().unwrap());
        if kind.is_dir() {
            copy(&entry, &into);
        } else if kind.is_file() {
            fs::copy(&entry, &into).unwrap();
        }
    }
}

/// What the segments take on the disk.
fn journal_bytes(data: &Path) -> u64 {
    let sizes =
        fs::read_dir(data.join("journal")).unwrap().filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
    sizes.sum()
}

/// Waits until the journal is as small as it is to be when so many messages wait.
fn assert_bounded(data: &Path, waiting: usize, what: &str) {
    let most = 2 * waiting as u64 * MESSAGE_BYTES + 4 * (SEGMENT_BYTES + BLOCK_BYTES);
    // A segment's first block holds none of the messages.
    let most = most + most / SEGMENT_BYTES * BLOCK_BYTES;
    let started = Instant::now();
    while journal_bytes(data) > most {
        assert!(
            started.elapsed() < PATIENCE,
            "{what}: {} bytes, of which at most {most} should be",
            journal_bytes(data)
        );
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_disk_holds_at_most_twice_what_waits_whatever_is_sent_and_read() {
    const MANY: usize = 8000;
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let server = Server::demo(data, &SMALL);
    let mut messi = User::new(&server, "messi");
    let mut henderson = User::new(&server, "henderson");

    for _ in 0..3 {
        messi.send("SEND MESSAGE", "henderson", MANY);
        assert_bounded(data, MANY, "all wait");
        assert_eq!(henderson.read(), MANY);
        assert_bounded(data, 0, "all is read");
    }

    // One in forty goes to somebody who does not read: it keeps a segment alive that is dead but for it.
    let mut unread = 0;
    for _ in 0..200 {
        messi.send("SEND MESSAGE", "lineker", 1);
        unread += 1;
        messi.send("SEND MESSAGE", "henderson", 39);
        henderson.read();
    }
    assert_bounded(data, unread, "one in forty is never read");

    // A mailbox that nobody ever reads grows while others are read.
    for _ in 0..5 {
        messi.send("SEND MESSAGE", "lineker", 500);
        unread += 500;
        messi.send("SEND MESSAGE", "henderson", 4000);
        henderson.read();
        assert_bounded(data, unread, "one mailbox is never read");
    }

    // What only one of a group has not read.
    messi.send("SEND GROUP MESSAGE", "group1", MANY);
    unread += MANY;
    assert_eq!(henderson.read(), MANY);
    assert_bounded(data, unread, "one of a group does not read");

    // All of it is still there, after all the moving about, in this life and in the next.
    server.kill();
    assert_eq!(text(&output(&["check", data.to_str().unwrap()]).stderr), "");
    let server = Server::demo(data, &SMALL);
    assert_eq!(User::new(&server, "lineker").read(), unread);
    assert_bounded(data, 0, "all is read in the end");
}

#[test]
fn many_senders_at_once_find_the_disk_bounded_too() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::demo(root.path(), &SMALL);
    let senders: Vec<_> = ["messi", "henderson", "lineker"]
        .into_iter()
        .map(|name| {
            let mut user = User::new(&server, name);
            thread::spawn(move || {
                for _ in 0..20 {
                    user.send("SEND GROUP MESSAGE", "group1", 400);
                    user.read();
                }
                user
            })
        })
        .collect();
    let mut users: Vec<User> = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
    for user in &mut users {
        user.read();
    }
    assert_bounded(root.path(), 0, "all have read all");
}

/// Starts the program where a small disk is mounted that is all its own; none where that is not allowed.
fn on_a_small_disk(mount: &Path, mebibytes: u32, arguments: &[&str]) -> Option<Command> {
    let probe = Command::new("unshare").args(["-rm", "true"]).status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("not tested: this machine does not let a test mount a disk");
        return None;
    }
    let program = kurir(arguments);
    let mount = mount.to_str().unwrap();
    let script = format!("mount -t tmpfs -o size={mebibytes}m none {mount} && exec \"$0\" \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]).arg(program.get_program()).args(program.get_args());
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
    Some(command)
}

#[test]
fn on_a_full_disk_sends_are_refused_and_reads_go_on_and_make_room() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let arguments =
        [&["serve", "--demo", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()][..], &SMALL].concat();
    let Some(command) = on_a_small_disk(root.path(), 4, &arguments) else { return };
    let server = Server::start(command, 1);
    let mut messi = User::new(&server, "messi");
    let mut henderson = User::new(&server, "henderson");
    for _ in 0..3 {
        let mut sent = 0;
        let refused = loop {
            // One at a time is slow, and many may be refused in part.
            if let Some(refused) = messi.send_until_refused("SEND MESSAGE", "henderson", 500) {
                break refused;
            }
            sent += 500;
            assert!(sent * TEXT_BYTES < 8 * 1024 * 1024, "a disk that never gets full");
        };
        assert_eq!(refused, "penyimpanan server penuh");
        assert!(sent >= 1000, "{sent}");
        // Whoever comes now can log in and read, and is not given anything twice.
        let mut again = User::new(&server, "henderson");
        assert!(again.read() >= sent);
        assert_eq!(henderson.read(), 0);
        let started = Instant::now();
        while messi.send_until_refused("SEND MESSAGE", "lineker", 1).is_some() {
            assert!(started.elapsed() < PATIENCE, "there is room, and it is not used");
            thread::sleep(Duration::from_millis(50));
        }
    }
    let mut lineker = User::new(&server, "lineker");
    assert_eq!(lineker.read(), 3);
}

#[test]
fn a_write_that_fails_ends_the_server_and_nothing_of_it_is_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().to_str().unwrap();
    let arguments = [&["serve", "--demo", "--listen", "127.0.0.1:0", "--data", data][..], &SMALL].concat();
    let mut server = Server::start_with_pipe(&mut kurir(&arguments));
    let mut messi = User::new(&server, "messi");
    messi.send("SEND MESSAGE", "henderson", 10);
    // No write of this process goes beyond the first block of any file from now on.
    let pid = Pid::from_raw(i32::try_from(server.process()).unwrap()).unwrap();
    let limit = Rlimit { current: Some(BLOCK_BYTES), maximum: Some(BLOCK_BYTES) };
    prlimit(Some(pid), Resource::Fsize, limit).unwrap();
    let failed = messi.client.request(&format!("SEND MESSAGE {} henderson lost", messi.token));
    assert!(matches!(failed, Err(ClientError::Io(_))), "{failed:?}");
    let (status, log) = server.wait_with_log();
    assert_eq!(status.code(), Some(1), "{log}");
    let last = log.lines().last().unwrap();
    assert!(last.starts_with("kurir: the journal could not be written: "), "{log}");

    let server = Server::demo(root.path(), &SMALL);
    assert_eq!(User::new(&server, "henderson").read(), 10);
}

#[test]
fn a_backup_is_what_was_there_whatever_happens_meanwhile_and_after() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let server = Server::demo(&data, &SMALL);
    let mut lineker = User::new(&server, "lineker");
    lineker.client.request(&format!("SEND FILE {} messi a.txt QUJD", lineker.token)).unwrap();
    let large = "QUJD".repeat(10_000);
    lineker.client.request(&format!("SEND FILE {} messi b.bin {large}", lineker.token)).unwrap();
    let mut messi = User::new(&server, "messi");
    messi.send("SEND MESSAGE", "lineker", 3000);
    let busy: Vec<_> = ["henderson", "messi"]
        .into_iter()
        .map(|name| {
            let mut user = User::new(&server, name);
            thread::spawn(move || {
                for _ in 0..40 {
                    user.send("SEND MESSAGE", "henderson", 500);
                    if name == "henderson" {
                        user.read();
                    }
                }
            })
        })
        .collect();
    let copies: Vec<_> = (0..4).map(|number| root.path().join(format!("copy{number}"))).collect();
    let places: Vec<(&str, &str)> =
        copies.iter().map(|copy| (data.to_str().unwrap(), copy.to_str().unwrap())).collect();
    for (from, to) in &places {
        let made = output(&["backup", from, "--to", to]);
        assert_eq!((made.status.code(), text(&made.stderr)), (Some(0), ""));
        assert!(text(&made.stdout).contains(" files linked, "), "{}", text(&made.stdout));
        thread::sleep(Duration::from_millis(100));
    }
    // It does not write over anything.
    assert_eq!(output(&["backup", places[0].0, "--to", places[0].1]).status.code(), Some(2));
    for busy in busy {
        busy.join().unwrap();
    }
    // The original goes on, and uses its segments again.
    let mut henderson = User::new(&server, "henderson");
    for _ in 0..5 {
        messi.send("SEND MESSAGE", "henderson", 4000);
        henderson.read();
    }
    for name in ["a.txt", "b.bin"] {
        lineker.client.request(&format!("DELETE FILE {} messi {name}", lineker.token)).unwrap();
        messi.client.request(&format!("DELETE FILE {} lineker {name}", messi.token)).unwrap();
    }
    server.stop();
    for (_, to) in &places {
        let checked = output(&["check", to]);
        assert_eq!((checked.status.code(), text(&checked.stderr)), (Some(0), ""), "{}", text(&checked.stdout));
        let server = Server::demo(Path::new(to), &SMALL);
        let mut lineker = User::new(&server, "lineker");
        let file = lineker.client.request(&format!("DOWNLOAD FILE {} messi a.txt", lineker.token)).unwrap();
        assert_eq!(file["data"], "QUJD");
        let file = lineker.client.request(&format!("DOWNLOAD FILE {} messi b.bin", lineker.token)).unwrap();
        assert_eq!(file["data"], *large);
        assert_eq!(lineker.read(), 3000);
        // A copy that goes on changes nothing of the others.
        User::new(&server, "messi").send("SEND MESSAGE", "lineker", 4000);
        lineker.read();
        server.stop();
    }
    // So it is with one that is made while no server runs.
    let (from, to) = (data.to_str().unwrap(), root.path().join("offline"));
    assert_eq!(output(&["backup", from, "--to", to.to_str().unwrap()]).status.code(), Some(0));
    for directory in [from, to.to_str().unwrap()] {
        assert_eq!(output(&["check", directory]).status.code(), Some(0));
    }
}

#[test]
fn a_backup_has_what_was_acknowledged_though_the_disk_has_it_not_yet() {
    let root = tempfile::tempdir().unwrap();
    let (data, copy) = (root.path().join("data"), root.path().join("copy"));
    let server = Server::demo(&data, &[&SMALL[..], &["--sync", "interval"]].concat());
    let mut messi = User::new(&server, "messi");
    for _ in 0..3 {
        messi.send("SEND MESSAGE", "lineker", 100);
    }
    let made = output(&["backup", data.to_str().unwrap(), "--to", copy.to_str().unwrap()]);
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    server.stop();
    let checked = output(&["check", copy.to_str().unwrap()]);
    assert!(text(&checked.stdout).contains("\n300 messages waiting"), "{}", text(&checked.stdout));
}

#[test]
fn messages_that_are_only_on_the_disk_are_given_once_to_whoever_asks_first() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::demo(root.path(), &SMALL);
    let mut messi = User::new(&server, "messi");
    messi.send("SEND MESSAGE", "henderson", 3000);
    server.stop();
    // In its next life nothing of the journal is in memory.
    let server = Server::demo(root.path(), &[&SMALL[..], &["--inbox-messages-max", "50"]].concat());
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let mut henderson = User::new(&server, "henderson");
            thread::spawn(move || {
                let mut ids = Vec::new();
                // Several of them ask at the same time, and for some there is nothing at the moment.
                for _ in 0..30 {
                    let inbox = henderson.client.request(&format!("INBOX {}", henderson.token)).unwrap();
                    let list = inbox["data"].get("messi").and_then(Value::as_array).cloned().unwrap_or_default();
                    ids.extend(list.iter().map(|message| message["id"].as_u64().unwrap()));
                }
                ids
            })
        })
        .collect();
    let mut ids: Vec<u64> = readers.into_iter().flat_map(|reader| reader.join().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, (1..=3000).collect::<Vec<u64>>());
}

/// The only file in a directory.
fn only_file(directory: &Path) -> std::path::PathBuf {
    let files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().unwrap()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// What check says, and its exit code.
fn check(data: &Path, repair: bool) -> (Option<i32>, String) {
    let data = data.to_str().unwrap();
    let checked = if repair { output(&["check", data, "--repair"]) } else { output(&["check", data]) };
    (checked.status.code(), text(&checked.stdout).to_owned())
}

#[test]
fn a_damaged_checkpoint_is_found_and_repaired_from_what_is_left() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let server = Server::demo(&data, &SMALL);
    let mut messi = User::new(&server, "messi");
    messi.send("SEND MESSAGE", "henderson", 5000);
    server.stop();
    let path = only_file(&data.join("checkpoint"));
    let whole = fs::read(&path).unwrap();
    let wait = "5000 messages waiting";
    assert!(check(&data, false).1.contains(wait));
    // The header, the counters, an account, the entries of a mailbox, the end.
    for at in [3, 60, 110, whole.len() / 2, whole.len() - 60, whole.len() - 3] {
        let tried = root.path().join(format!("damaged at {at}"));
        copy(&data, &tried);
        flip(&only_file(&tried.join("checkpoint")), at);
        let started = output(&["serve", "--demo", "--listen", "127.0.0.1:0", "--data", tried.to_str().unwrap()]);
        assert_eq!(started.status.code(), Some(2), "byte {at}");
        assert!(text(&started.stderr).contains("kurir check DIR --repair"), "{}", text(&started.stderr));
        assert_eq!(check(&tried, false).0, Some(1), "byte {at}");
        // The journal is there from its beginning, so nothing is lost.
        let (code, said) = check(&tried, true);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(wait), "byte {at}: {said}");
        assert_eq!(check(&tried, false).0, Some(0));
        let server = Server::demo(&tried, &SMALL);
        assert_eq!(User::new(&server, "henderson").read(), 5000, "byte {at}");
    }
    // Without the beginning of the journal, what is whole of the checkpoint is kept.
    let server = Server::demo(&data, &SMALL);
    let mut henderson = User::new(&server, "henderson");
    let mut messi = User::new(&server, "messi");
    assert_eq!(henderson.read(), 5000);
    messi.send("SEND MESSAGE", "henderson", 9000);
    let started = Instant::now();
    while data.join("journal/0000000001.log").exists() {
        assert!(started.elapsed() < PATIENCE, "what is read is never freed");
        thread::sleep(Duration::from_millis(20));
    }
    server.stop();
    let path = fs::read_dir(data.join("checkpoint")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    flip(&path, 60);
    assert_eq!(check(&data, false).0, Some(1));
    let (code, said) = check(&data, true);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("dropped: ") && said.contains("put aside: "), "{said}");
    assert_eq!(check(&data, false).0, Some(0));
    let server = Server::demo(&data, &SMALL);
    assert_eq!(User::new(&server, "henderson").read(), 9000);
}

#[test]
fn a_damaged_text_is_told_to_whoever_asks_and_repaired_alone() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let server = Server::demo(data, &SMALL);
    User::new(&server, "messi").send("SEND MESSAGE", "henderson", 5000);
    server.stop();
    let segment = data.join("journal/0000000001.log");
    flip(&segment, 100_000);
    let server = Server::demo(data, &SMALL);
    let mut henderson = User::new(&server, "henderson");
    let mut read = 0;
    let refused = loop {
        match henderson.client.request(&format!("INBOX {}", henderson.token)) {
            Ok(inbox) => read += inbox["data"]["messi"].as_array().unwrap().len(),
            Err(error) => break error.to_string(),
        }
    };
    assert_eq!(refused, "kotak masuk tidak terbaca");
    assert!(read > 100, "what stands before it is given");
    server.stop();
    let (code, said) = check(data, false);
    assert_eq!(code, Some(1));
    assert!(said.contains("in the mailbox of henderson"), "{said}");
    let (code, said) = check(data, true);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.matches("dropped: ").count(), 1, "{said}");
    assert_eq!(check(data, false).0, Some(0));
    let server = Server::demo(data, &SMALL);
    assert_eq!(read + User::new(&server, "henderson").read(), 4999);
}

/// The base64 of a small file that is like no other.
fn small_file(number: usize, round: usize) -> String {
    let piece = format!("{number:04}{round:04}");
    piece.repeat(800)
}

/// What lineker gets of so many small files; none for one that is refused.
fn download_small_files(server: &Server, count: usize) -> Vec<Option<String>> {
    let mut lineker = User::new(server, "lineker");
    let download = |number| {
        let reply = lineker.client.request(&format!("DOWNLOAD FILE {} messi f{number}", lineker.token));
        reply.ok().map(|file| file["data"].as_str().unwrap().to_owned())
    };
    (0..count).map(download).collect()
}

fn send_small_files(server: &Server, count: usize, round: usize) {
    let mut messi = User::new(server, "messi");
    for number in 0..count {
        let content = small_file(number, round);
        messi.client.request(&format!("SEND FILE {} lineker f{number} {content}", messi.token)).unwrap();
    }
}

#[test]
fn small_files_that_are_replaced_take_no_more_room_and_old_ones_are_moved() {
    const OLD: usize = 20;
    const ROUNDS: usize = 40;
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let server = Server::demo(data, &SMALL);
    send_small_files(&server, 2 * OLD, 0);
    // Those that stand between them are sent again and again.
    for round in 1..=ROUNDS {
        send_small_files(&server, OLD, round);
    }
    // A file here takes as much as some twenty messages.
    assert_bounded(data, 2 * OLD * 20, "after many replacements");
    assert_eq!(bytes_below(&data.join("files")), 0, "none has a file of its own");
    let expected = |number: usize| Some(small_file(number, if number < OLD { ROUNDS } else { 0 }));
    let expected: Vec<_> = (0..2 * OLD).map(expected).collect();
    assert!(download_small_files(&server, 2 * OLD) == expected);
    server.kill();
    let server = Server::demo(data, &SMALL);
    assert!(download_small_files(&server, 2 * OLD) == expected);
    server.stop();
    assert_eq!(check(data, false).0, Some(0));
}

#[test]
fn a_damaged_small_file_is_told_to_whoever_asks_and_repaired_alone() {
    const FILES: usize = 200;
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let server = Server::demo(data, &SMALL);
    send_small_files(&server, FILES, 0);
    server.stop();
    // Its segment is covered by a checkpoint by now, so that what is damaged is found when it is asked for.
    flip(&data.join("journal/0000000001.log"), 100_000);
    let server = Server::demo(data, &SMALL);
    let lost: Vec<usize> = (0..)
        .zip(download_small_files(&server, FILES))
        .filter_map(|(number, file)| file.is_none().then_some(number))
        .collect();
    assert_eq!(lost.len(), 1, "{lost:?}");
    server.stop();
    let (code, said) = check(data, false);
    assert_eq!(code, Some(1));
    assert!(said.contains(&format!("the file f{}", lost[0])), "{said}");
    let (code, said) = check(data, true);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.matches("dropped: ").count(), 1, "{said}");
    assert_eq!(check(data, false).0, Some(0));
    let server = Server::demo(data, &SMALL);
    let mut lineker = User::new(&server, "lineker");
    let files = lineker.client.request(&format!("MY FILE {}", lineker.token)).unwrap();
    assert_eq!(files["data"]["messi"].as_array().unwrap().len(), FILES - 1);
}

/// What `/proc` says of a process, in KiB.
fn status_kib(server: &Server, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.process())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn bytes_below(directory: &Path) -> u64 {
    let sizes = fs::read_dir(directory).unwrap().map(|entry| {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() { bytes_below(&entry.path()) } else { entry.metadata().unwrap().len() }
    });
    sizes.sum()
}

#[test]
#[ignore = "it measures: cargo test --release --test disk -- --ignored --nocapture"]
fn figures_of_a_million_messages_that_wait() {
    const USERS: usize = 50;
    const EACH: usize = 20_000;
    let root = tempfile::tempdir().unwrap();
    let server = Server::demo(root.path(), &[]);
    let mut admin = server.client();
    let names: Vec<String> = (0..USERS).map(|number| format!("user{number}")).collect();
    for name in &names {
        admin.request(&format!("REGISTER {name} surabaya")).unwrap();
    }
    let mut users: Vec<User> = names.iter().map(|name| User::new(&server, name)).collect();
    let before = status_kib(&server, "VmRSS:");
    let text = "x".repeat(100);
    for start in (0..EACH).step_by(500) {
        for (number, user) in users.iter_mut().enumerate() {
            let line = format!("SEND MESSAGE {} {} {text}\n", user.token, names[(number + start / 500) % USERS]);
            user.client.stream().write_all(line.repeat(500).as_bytes()).unwrap();
        }
        for user in &mut users {
            (0..500).for_each(|_| drop(user.client.reply().unwrap()));
        }
    }
    let (rss, peak) = (status_kib(&server, "VmRSS:"), status_kib(&server, "VmHWM:"));
    println!("memory: {before} KiB before, {rss} KiB with 1,000,000 messages waiting, {peak} KiB at most");
    println!("disk: {} bytes, {} of them journal", bytes_below(root.path()), journal_bytes(root.path()));
    server.kill();
    let started = Instant::now();
    let server = Server::demo(root.path(), &[]);
    println!("start after a kill: {:?}", started.elapsed());
    let (rss, peak) = (status_kib(&server, "VmRSS:"), status_kib(&server, "VmHWM:"));
    println!("memory after that start: {rss} KiB, {peak} KiB at most");
    assert_eq!(users.len() * EACH, 1_000_000);
}

#[test]
fn damage_to_what_was_acknowledged_a_second_before_a_kill_is_no_torn_end() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::demo(root.path(), &SMALL);
    User::new(&server, "messi").send("SEND MESSAGE", "henderson", 500);
    // What is known to be on the disk is written down meanwhile.
    thread::sleep(Duration::from_millis(1200));
    server.kill();
    assert_eq!(check(root.path(), false).0, Some(0));
    let segment = root.path().join("journal/0000000001.log");
    let bytes = fs::read(&segment).unwrap();
    let texts: Vec<usize> = memchr::memmem::find_iter(&bytes, "x".repeat(TEXT_BYTES).as_bytes()).collect();
    assert_eq!(texts.len(), 500);
    for message in [100, 499] {
        flip(&segment, texts[message]);
        assert_eq!(check(root.path(), false).0, Some(1), "message {message}");
        let started = output(&["serve", "--listen", "127.0.0.1:0", "--data", root.path().to_str().unwrap()]);
        assert_eq!(started.status.code(), Some(2), "message {message}");
        assert!(text(&started.stderr).contains("is damaged at byte"), "{}", text(&started.stderr));
        flip(&segment, texts[message]);
    }
    let server = Server::demo(root.path(), &SMALL);
    assert_eq!(User::new(&server, "henderson").read(), 500);
}

#[test]
fn a_backup_has_the_segments_that_were_made_before_the_loop_ran() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let mut waiting = 0;
    for (life, messages) in [700, 700, 350, 900].into_iter().enumerate() {
        // The accounts are made before the loop runs, and with them segments; so is what `user add` does without a server.
        let server = Server::demo(&data, &SMALL);
        User::new(&server, "messi").send("SEND MESSAGE", "henderson", messages);
        waiting += messages;
        let copy = root.path().join(format!("while it runs {life}"));
        let made = output(&["backup", data.to_str().unwrap(), "--to", copy.to_str().unwrap()]);
        assert_eq!((made.status.code(), text(&made.stderr)), (Some(0), ""));
        assert!(check(&copy, false).1.contains(&format!("{waiting} messages waiting")));
        server.stop();
        let mut command =
            kurir(&["user", "add", &format!("baru{life}"), "--password-stdin", "--data", data.to_str().unwrap()]);
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"surabaya\n").unwrap();
        assert!(child.wait().unwrap().success());
    }
    let server = Server::demo(&data, &SMALL);
    let copy = root.path().join("copy");
    assert_eq!(output(&["backup", data.to_str().unwrap(), "--to", copy.to_str().unwrap()]).status.code(), Some(0));
    assert_eq!(check(&copy, false).0, Some(0));
    // They are used again too.
    assert_eq!(User::new(&server, "henderson").read(), waiting);
    assert_bounded(&data, 0, "all is read");
}

#[test]
fn a_backup_that_is_not_whole_is_none() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let server = Server::demo(&data, &SMALL);
    let mut messi = User::new(&server, "messi");
    let large = "QUJD".repeat(10_000);
    messi.client.request(&format!("SEND FILE {} henderson b.bin {large}", messi.token)).unwrap();
    messi.send("SEND MESSAGE", "henderson", 3000);
    let copy = root.path().join("copy");
    let backup = || output(&["backup", data.to_str().unwrap(), "--to", copy.to_str().unwrap()]);
    let is_refused = |what: &str| {
        let made = backup();
        assert_eq!(made.status.code(), Some(2), "{what}");
        assert!(!copy.exists() && !copy.with_added_extension("unfinished").exists(), "{what}");
        text(&made.stderr).to_owned()
    };
    let away = root.path().join("away");
    let stored = data.join("files/00/0000000000000000");
    fs::rename(&stored, &away).unwrap();
    let said = is_refused("a listed file is missing");
    assert!(said.contains("is missing, or not as long as it was"), "{said}");
    fs::rename(&away, &stored).unwrap();
    let started = Instant::now();
    while fs::read_dir(data.join("checkpoint")).unwrap().all(|entry| entry.unwrap().path().extension().is_some()) {
        assert!(started.elapsed() < PATIENCE, "there is never a checkpoint");
        thread::sleep(Duration::from_millis(20));
    }
    let checkpoint = only_file(&data.join("checkpoint"));
    flip(&checkpoint, 60);
    let said = is_refused("a checkpoint cannot be read");
    assert!(said.contains("the copy is not whole"), "{said}");
    flip(&checkpoint, 60);
    assert_eq!(backup().status.code(), Some(0));
}

#[test]
fn a_removed_lock_file_lets_no_second_server_in_and_a_moved_directory_ends_the_first() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let arguments = ["serve", "--demo", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()];
    let mut server = Server::start_with_pipe(&mut kurir(&arguments));
    fs::remove_file(data.join("lock")).unwrap();
    for second in [&arguments[..], &["check", data.to_str().unwrap()]] {
        let refused = output(second);
        assert_eq!(refused.status.code(), Some(2));
        assert!(text(&refused.stderr).contains("is in use"), "{}", text(&refused.stderr));
    }
    // Another one may stand there soon, with a server of its own.
    fs::rename(&data, root.path().join("elsewhere")).unwrap();
    fs::create_dir(&data).unwrap();
    let (status, log) = server.wait_with_log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("was moved, removed or replaced while the server ran"), "{log}");
}

#[test]
fn a_checkpoint_that_is_hardly_there_costs_no_more_than_one_that_is_missing() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let server = Server::demo(&data, &SMALL);
    let mut messi = User::new(&server, "messi");
    let mut henderson = User::new(&server, "henderson");
    // Old segments go meanwhile, but not the first, in which something waits.
    messi.send("SEND MESSAGE", "lineker", 100);
    for _ in 0..4 {
        messi.send("SEND MESSAGE", "henderson", 1500);
        henderson.read();
    }
    messi.send("SEND MESSAGE", "henderson", 700);
    server.stop();
    let waiting = |said: &str| {
        let line = said.lines().find(|line| line.contains("messages waiting")).unwrap().to_owned();
        line.split(' ').next().unwrap().parse::<usize>().unwrap()
    };
    let checkpoint = only_file(&data.join("checkpoint"));
    for kept in [0, 100, 3000] {
        let tried = root.path().join(format!("cut at {kept}"));
        copy(&data, &tried);
        let path = tried.join("checkpoint").join(checkpoint.file_name().unwrap());
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..kept.min(bytes.len() / 2)]).unwrap();
        assert_eq!(check(&tried, false).0, Some(1));
        let (code, said) = check(&tried, true);
        assert_eq!(code, Some(0), "{said}");
        let without = root.path().join(format!("without {kept}"));
        copy(&data, &without);
        fs::remove_file(without.join("checkpoint").join(checkpoint.file_name().unwrap())).unwrap();
        let (code, missing) = check(&without, true);
        assert_eq!(code, Some(0), "{missing}");
        assert!(waiting(&said) >= waiting(&missing), "{said}\n{missing}");
    }
}

#[test]
fn a_repair_that_fails_leaves_the_damage_to_be_seen() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let server = Server::demo(&data, &SMALL);
    let mut messi = User::new(&server, "messi");
    let large = "QUJD".repeat(10_000);
    messi.client.request(&format!("SEND FILE {} henderson b.bin {large}", messi.token)).unwrap();
    messi.send("SEND MESSAGE", "henderson", 700);
    server.stop();
    let first = data.join("journal/0000000001.log");
    let bytes = fs::read(&first).unwrap();
    fs::write(&first, &bytes[..79_000]).unwrap();
    // What is put aside has nowhere to go.
    fs::write(data.join("lost-files"), "").unwrap();
    fs::create_dir_all(data.join("files/99")).unwrap();
    fs::write(data.join("files/99/0000000000000099"), "nobody lists it").unwrap();
    assert_eq!(check(&data, false).0, Some(1));
    assert_eq!(check(&data, true).0, Some(2));
    assert_eq!(check(&data, false).0, Some(1), "the damage is there as before");
    let started = output(&["serve", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()]);
    assert_eq!(started.status.code(), Some(2));
    fs::remove_file(data.join("lost-files")).unwrap();
    assert_eq!(check(&data, true).0, Some(0));
    assert_eq!(check(&data, false).0, Some(0));
    assert!(data.join("lost-files/0000000000000099").exists());
}
