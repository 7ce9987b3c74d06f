//! Files through the real program, over loopback, beside what the disk and the loopback do without it.
//!
//! `cargo bench --bench transfer` measures and prints a table; `-- --test` does everything once with little. Each figure is
//! the median of some rounds; in each round all is done one after the other, so that a slow moment of the machine is a
//! slow moment for all.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/common/process.rs"]
mod process;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use process::Server;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
const GIB: usize = 1024 * MIB;
/// Written and read at once; its base64 is a MiB.
const PIECE_BYTES: usize = 768 * KIB;
/// Requests for small files that are under way at once.
const AHEAD: usize = 64;
const END: &[u8] = b"\r\n\r\n";

/// How many files of which size, and how often.
struct Plan {
    sizes: Vec<(usize, usize)>,
    large: usize,
    rounds: usize,
    quiet: Duration,
}

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let plan = if is_test {
        Plan { sizes: vec![(KIB, 100), (MIB, 4)], large: 16 * MIB, rounds: 1, quiet: Duration::from_millis(100) }
    } else {
        Plan { sizes: vec![(KIB, 20_000), (MIB, 200)], large: GIB, rounds: 5, quiet: Duration::from_secs(2) }
    };
    let data = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    small(&plan, data.path());
    let server = Server::demo(
        &data.path().join("data"),
        &["--log", "warn", "--user-files-max", "100000", "--output-bytes-max", "128MiB"],
    );
    for (bytes, count) in &plan.sizes {
        let rounds: Vec<[f64; 4]> = (0..plan.rounds).map(|_| many(&server, data.path(), *bytes, *count)).collect();
        print_rates(&format!("{count} files of {} KiB", bytes / KIB), &rounds);
    }
    drop(server);
    let server = Server::demo(&data.path().join("large"), &["--log", "warn"]);
    large(&server, data.path(), &plan);
}

/// What it brings that a small file is kept in the journal, by size; the two ways in turn.
fn small(plan: &Plan, directory: &Path) {
    let flags = [["--small-file-bytes-max", "64KiB"], ["--small-file-bytes-max", "0"]];
    let more = ["--log", "warn", "--line-bytes-max", "256KiB", "--segment-bytes", "16MiB"];
    let servers = flags.map(|flag| Server::demo(&directory.join(flag[1]), &[&flag[..], &more[..]].concat()));
    for bytes in [KIB, 4 * KIB, 16 * KIB, 64 * KIB] {
        let count = plan.sizes[0].1 / 10;
        let rounds: Vec<[f64; 2]> = (0..plan.rounds)
            .map(|_| servers.each_ref().map(|server| send_many(server, bytes, count) * MIB as f64 / bytes as f64))
            .collect();
        let [journal, apart] = [0, 1].map(|column| median(rounds.iter().map(|round| round[column])));
        println!("{} KiB: {journal:.0} files/s kept in the journal, {apart:.0} in files of their own", bytes / KIB);
    }
}

fn print_rates(what: &str, rounds: &[[f64; 4]]) {
    let [up, down, disk, loopback] = std::array::from_fn(|column| median(rounds.iter().map(|round| round[column])));
    println!(
        "{what}: up {up:.0} MiB/s, down {down:.0} MiB/s, dd conv=fsync {disk:.0} MiB/s, loopback {loopback:.0} MiB/s"
    );
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn content(bytes: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(bytes).collect()
}

fn mib_per_second(bytes: usize, since: Instant) -> f64 {
    bytes as f64 / MIB as f64 / since.elapsed().as_secs_f64()
}

/// Many files of one size, up, down, by `dd`, and their base64 over a bare connection.
fn many(server: &Server, directory: &Path, bytes: usize, count: usize) -> [f64; 4] {
    let up = send_many(server, bytes, count);
    let encoded = STANDARD.encode(content(bytes));
    let (mut client, token) = server.login("messi");
    let stream = client.stream();
    let started = Instant::now();
    for numbers in (0..count).collect::<Vec<_>>().chunks(ahead(bytes)) {
        let lines: String = numbers.iter().map(|number| format!("DOWNLOAD FILE {token} messi f{number}\n")).collect();
        stream.write_all(lines.as_bytes()).unwrap();
        for _ in numbers {
            let reply = read_reply(stream);
            let data = reply.strip_suffix(b"\"}").unwrap();
            assert!(data.ends_with(encoded.as_bytes()), "what came down is not what went up");
        }
    }
    let down = mib_per_second(bytes * count, started);
    let by_dd = dd(directory, bytes, 20.min(count));
    [up, down, by_dd, bare_loopback(bytes * count)]
}

fn ahead(bytes: usize) -> usize {
    if bytes < MIB { AHEAD } else { 1 }
}

/// Files of one size, up, on one connection.
fn send_many(server: &Server, bytes: usize, count: usize) -> f64 {
    let encoded = STANDARD.encode(content(bytes));
    let (mut client, token) = server.login("messi");
    let stream = client.stream();
    let started = Instant::now();
    for numbers in (0..count).collect::<Vec<_>>().chunks(ahead(bytes)) {
        let lines: String =
            numbers.iter().map(|number| format!("SEND FILE {token} messi f{number} {encoded}\n")).collect();
        // The answers to what is sent are far smaller than what a socket takes.
        stream.write_all(lines.as_bytes()).unwrap();
        for _ in numbers {
            assert_eq!(read_reply(stream), b"{\"status\":\"OK\"}");
        }
    }
    mib_per_second(bytes * count, started)
}

/// One byte at a time would be slow, and more than a reply must not be read: so a little is read, and the rest looked at.
fn read_reply(stream: &mut TcpStream) -> Vec<u8> {
    thread_local! {
        static LEFT: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    LEFT.with_borrow_mut(|left| {
        let mut searched = 0;
        loop {
            if let Some(end) = memchr::memmem::find(&left[searched..], END) {
                let rest = left.split_off(searched + end + END.len());
                let mut reply = std::mem::replace(left, rest);
                reply.truncate(reply.len() - END.len());
                return reply;
            }
            searched = left.len().saturating_sub(END.len() - 1);
            let filled = left.len();
            left.resize(filled + 256 * KIB, 0);
            let count = stream.read(&mut left[filled..]).unwrap();
            assert!(count > 0, "the connection ended");
            left.truncate(filled + count);
        }
    })
}

/// What `dd` says that it takes to write files of this size and to sync each.
fn dd(directory: &Path, bytes: usize, count: usize) -> f64 {
    let path = directory.join("dd");
    let mut seconds = 0.0;
    for _ in 0..count {
        let block = bytes.min(MIB);
        let out = Command::new("dd")
            .env("LC_ALL", "C")
            .args(["if=/dev/zero", "conv=fsync", &format!("bs={block}"), &format!("count={}", bytes / block)])
            .arg(format!("of={}", path.display()))
            .output()
            .unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        let (before, _) = said.rsplit_once(" s, ").expect("dd says how long it took");
        seconds += before.rsplit_once(", ").unwrap().1.trim().parse::<f64>().unwrap();
        fs::remove_file(&path).unwrap();
    }
    (bytes * count) as f64 / MIB as f64 / seconds
}

/// The base64 of so many bytes over a connection that nobody looks at, as a rate of what it stands for.
fn bare_loopback(bytes: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    let encoded = bytes.div_ceil(3) * 4;
    let started = Instant::now();
    let reader = thread::spawn(move || {
        let mut room = vec![0; 64 * KIB];
        while receiver.read(&mut room).unwrap() > 0 {}
    });
    let piece = vec![b'A'; MIB];
    let mut left = encoded;
    while left > 0 {
        let count = left.min(MIB);
        sender.write_all(&piece[..count]).unwrap();
        left -= count;
    }
    drop(sender);
    reader.join().unwrap();
    mib_per_second(bytes, started)
}

/// A large file, and what it does to memory and to somebody who sends messages meanwhile.
fn large(server: &Server, directory: &Path, plan: &Plan) {
    let piece = content(PIECE_BYTES);
    let (mut rates, mut latencies) = (Vec::new(), Vec::new());
    let quiet = while_sending(server, || thread::sleep(plan.quiet));
    let before = memory_kib(server, "VmRSS:");
    for _ in 0..plan.rounds {
        let (mut up, mut down) = (0.0, 0.0);
        let during_up = while_sending(server, || up = upload(server, &piece, plan.large));
        let during_down = while_sending(server, || down = download(server, &piece, plan.large));
        latencies.push([during_up, during_down]);
        rates.push([up, down, dd(directory, plan.large, 1), bare_loopback(plan.large)]);
    }
    let growth = memory_kib(server, "VmHWM:").saturating_sub(before);
    print_rates(&format!("a file of {} MiB", plan.large / MIB), &rates);
    let p99 = |index: usize| median(latencies.iter().map(|both: &[f64; 2]| both[index]));
    println!(
        "memory of the server before (VmRSS), and what its peak (VmHWM) is above that: {before} KiB, {growth} KiB"
    );
    println!(
        "p99 of another client's SEND MESSAGE: {quiet:.2} ms without, {:.2} ms during the upload, {:.2} ms during the download",
        p99(0),
        p99(1)
    );
}

fn upload(server: &Server, piece: &[u8], bytes: usize) -> f64 {
    let encoded = STANDARD.encode(piece);
    let (mut client, token) = server.login("messi");
    let stream = client.stream();
    let started = Instant::now();
    stream.write_all(format!("SEND FILE {token} messi besar.bin ").as_bytes()).unwrap();
    for _ in 0..bytes / piece.len() {
        stream.write_all(encoded.as_bytes()).unwrap();
    }
    let last = STANDARD.encode(&piece[..bytes % piece.len()]);
    stream.write_all(format!("{last}\n").as_bytes()).unwrap();
    assert_eq!(read_reply(stream), b"{\"status\":\"OK\"}");
    mib_per_second(bytes, started)
}

fn download(server: &Server, piece: &[u8], bytes: usize) -> f64 {
    let encoded = STANDARD.encode(piece);
    let last = STANDARD.encode(&piece[..bytes % piece.len()]);
    let (mut client, token) = server.login("messi");
    let stream = client.stream();
    let started = Instant::now();
    stream.write_all(format!("DOWNLOAD FILE {token} messi besar.bin\n").as_bytes()).unwrap();
    let mut head = vec![0; br#"{"status":"OK","nama file":"besar.bin","data":""#.len()];
    stream.read_exact(&mut head).unwrap();
    let mut room = vec![0; encoded.len()];
    for expected in std::iter::repeat_n(&encoded, bytes / piece.len()).chain([&last]) {
        let room = &mut room[..expected.len()];
        stream.read_exact(room).unwrap();
        assert!(room == expected.as_bytes(), "what came down is not what went up");
    }
    let mut end = [0; 6];
    stream.read_exact(&mut end).unwrap();
    assert_eq!(&end, b"\"}\r\n\r\n");
    mib_per_second(bytes, started)
}

/// Has somebody send one message after the other while `work` is done. Gives back the 99th percentile in milliseconds.
fn while_sending(server: &Server, work: impl FnOnce()) -> f64 {
    let is_over = Arc::new(AtomicBool::new(false));
    let (mut henderson, token) = server.login("henderson");
    let sender = thread::spawn({
        let is_over = Arc::clone(&is_over);
        move || {
            let line = format!("SEND MESSAGE {token} henderson {}", "x".repeat(100));
            let mut taken = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                let started = Instant::now();
                henderson.request(&line).unwrap();
                taken.push(started.elapsed().as_secs_f64() * 1000.0);
                if taken.len() % 10_000 == 0 {
                    henderson.request(&format!("INBOX {token}")).unwrap();
                }
            }
            henderson.request(&format!("INBOX {token}")).unwrap();
            taken.sort_by(f64::total_cmp);
            taken[taken.len() * 99 / 100]
        }
    });
    work();
    is_over.store(true, Ordering::Relaxed);
    sender.join().unwrap()
}

fn memory_kib(server: &Server, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.process())).unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    memory.trim().trim_end_matches(" kB").parse().unwrap()
}
