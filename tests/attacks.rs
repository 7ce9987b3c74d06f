//! What bad peers can do to the real program, and to the others on it: nothing.
//!
//! Each test is one attack. It ends with the server up, an honest client that never noticed, and the memory that the server
//! holds about where it was. `cargo test --release --test attacks -- --nocapture --test-threads=1` prints the figures.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::process::{Server, connect_from, connect_with_buffer, finish, output, raise_file_limit, text};
use kurir::client::Client;
use serde_json::Value;
use tempfile::TempDir;

const FULL: &str = "{\"status\":\"ERROR\",\"data\":\"server penuh\"}\r\n\r\n";

/// Two such tests at once would need more open files than there may be.
static TEN_THOUSAND: Mutex<()> = Mutex::new(());

/// A server that is attacked, and a client that is not to notice.
struct Scene {
    server: Server,
    log: PathBuf,
    honest: Client<TcpStream>,
    token: String,
    sent: usize,
    before: u64,
    peak: u64,
    _root: TempDir,
}

impl Scene {
    fn new(flags: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let log = root.path().join("log");
        let server = Server::demo_with_log(&root.path().join("data"), &log, flags);
        let (honest, token) = server.login("messi");
        let mut scene = Self { server, log, honest, token, sent: 0, before: 0, peak: 0, _root: root };
        // What everybody needs is there from now on.
        for _ in 0..100 {
            scene.is_honest_served();
        }
        scene.before = scene.server.memory_kib();
        scene
    }

    /// The honest client sends a message to itself and gets it back.
    fn is_honest_served(&mut self) {
        self.sent += 1;
        let (token, text) = (&self.token, format!("pesan {}", self.sent));
        self.honest.request(&format!("SEND MESSAGE {token} messi {text}")).unwrap();
        let inbox = self.honest.request(&format!("INBOX {token}")).unwrap();
        assert_eq!(inbox["data"]["messi"][0]["pesan"], text);
        self.peak = self.peak.max(self.server.memory_kib());
    }

    /// Waits until the log has so many lines with these words.
    fn await_log(&mut self, words: &str, count: usize) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            self.is_honest_served();
            let seen = fs::read_to_string(&self.log).unwrap().matches(words).count();
            if seen >= count {
                return;
            }
            assert!(Instant::now() < end, "{seen} of {count} times in the log: {words}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the attack: all is served, and the memory is no more than so many KiB above what it was.
    fn end(mut self, attack: &str, kib_most: u64) {
        for _ in 0..100 {
            self.is_honest_served();
        }
        let after = self.server.memory_kib();
        println!("| {attack} | {} | {} | {after} |", self.before, self.peak);
        assert!(after < self.before + kib_most, "{attack}: {} KiB before, {after} after", self.before);
        self.server.stop();
    }
}

/// As many connections as are wanted, where this process and its child may have so many open files.
fn many(server: &Server, count: usize) -> Option<Vec<TcpStream>> {
    let limit = raise_file_limit();
    // The others' open files are in the same process.
    if limit < count as u64 + 4000 {
        println!("not tried: the file descriptor limit here is {limit}");
        return None;
    }
    Some((0..count).map(|_| server.connect()).collect())
}

/// True when the peer has closed the connection, whatever came before that.
fn is_closed(mut stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut some = [0; 64 * 1024];
    loop {
        match stream.read(&mut some) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(_) => return true,
        }
    }
}

#[test]
fn ten_thousand_idle_connections_cost_at_most_a_kibibyte_each() {
    const COUNT: usize = 10_000;
    let _one = TEN_THOUSAND.lock();
    raise_file_limit();
    let mut scene = Scene::new(&["--log", "warn"]);
    let Some(mut idle) = many(&scene.server, COUNT) else { return };
    scene.is_honest_served();
    let fresh = scene.server.memory_kib() - scene.before;
    // Buffers are given back once they are empty, so one that has been used costs no more.
    let mut pong = [0; 19];
    for stream in &mut idle {
        stream.write_all(b"PING\n").unwrap();
        stream.read_exact(&mut pong).unwrap();
    }
    scene.is_honest_served();
    let used = scene.server.memory_kib() - scene.before;
    println!("10,000 idle connections: {fresh} KiB at first, {used} KiB after a request each");
    assert!(used.max(fresh) * 1024 / COUNT as u64 <= 1024, "{fresh} and {used} KiB for {COUNT} connections");
    drop(idle);
    scene.end("10,000 idle connections", 10_000);
}

#[test]
fn ten_thousand_connections_that_each_send_a_message_a_second_are_served() {
    const COUNT: usize = 10_000;
    let _one = TEN_THOUSAND.lock();
    raise_file_limit();
    let mut scene = Scene::new(&["--log", "warn", "--mailbox-messages-max", "1000000"]);
    let Some(mut peers) = many(&scene.server, COUNT) else { return };
    let line = format!("SEND MESSAGE {} henderson halo\n", scene.token);
    for _ in 0..3 {
        let begin = Instant::now();
        let mut ok = [0; 19];
        for peer in &mut peers {
            peer.write_all(line.as_bytes()).unwrap();
        }
        for peer in &mut peers {
            peer.read_exact(&mut ok).unwrap();
            assert!(ok.starts_with(br#"{"status":"OK"}"#));
        }
        println!("{COUNT} messages over as many connections: {} ms", begin.elapsed().as_millis());
        scene.is_honest_served();
    }
    drop(peers);
    scene.end("10,000 connections with a message a second each", 16_000);
}

#[test]
fn peers_that_do_not_read_are_not_served_and_are_closed() {
    const COUNT: usize = 50;
    let mut scene = Scene::new(&["--output-ms-max", "1000"]);
    let content = STANDARD.encode(vec![7; 16 * 1024 * 1024]);
    scene.honest.request(&format!("SEND FILE {} messi besar.bin {content}", scene.token)).unwrap();
    let mut peers: Vec<TcpStream> = (0..COUNT).map(|_| scene.server.connect()).collect();
    for (number, peer) in peers.iter_mut().enumerate() {
        if number % 2 == 0 {
            peer.write_all(format!("DOWNLOAD FILE {} messi besar.bin\n", scene.token).as_bytes()).unwrap();
        } else {
            // More and more requests, until the kernel takes no more of them.
            peer.set_nonblocking(true).unwrap();
            let requests = "HELP\n".repeat(10_000);
            let login = format!("INBOX {}\n", scene.token);
            peer.write_all(login.as_bytes()).unwrap();
            while peer.write(requests.as_bytes()).is_ok_and(|count| count > 0) {}
        }
    }
    scene.is_honest_served();
    scene.await_log("peer does not read", COUNT);
    drop(peers);
    // What they held is some 45 MB, of which the allocator keeps what it likes.
    scene.end("50 peers that ask and do not read", 40_000);
}

#[test]
fn long_answers_that_nobody_reads_hold_up_nobody() {
    const FILES: usize = 4000;
    const COUNT: usize = 500;
    let mut scene = Scene::new(&["--connections-bytes-max", "64MiB"]);
    let mut sender = scene.server.client();
    let name = "n".repeat(245);
    for chunk in 0..FILES / 100 {
        for number in 0..100 {
            let number = chunk * 100 + number;
            sender.send(format!("SEND FILE {} messi {number:04}{name} QUJD", scene.token).as_bytes()).unwrap();
        }
        for _ in 0..100 {
            sender.reply().unwrap();
        }
    }
    let address = scene.server.addresses[0];
    let mut peers: Vec<TcpStream> = (0..COUNT).map(|_| connect_with_buffer(address, 4096)).collect();
    for peer in &mut peers {
        peer.write_all(format!("MY FILE {}\n", scene.token).repeat(3).as_bytes()).unwrap();
    }
    // How long the honest client waits at most is shown, and not asserted: a machine may be busy with something else.
    let mut longest = Duration::ZERO;
    for _ in 0..200 {
        let begin = Instant::now();
        scene.is_honest_served();
        longest = longest.max(begin.elapsed());
    }
    println!("{COUNT} answers of a megabyte each: two short requests took {} ms at most", longest.as_millis());
    scene.await_log("connections hold too much memory", 100);
    drop((sender, peers));
    scene.end("500 peers that ask for a megabyte each and do not read", 100_000);
}

#[test]
fn strangers_that_never_stop_asking_do_not_take_the_memory_of_others() {
    const COUNT: usize = 600;
    let mut scene = Scene::new(&["--connections-bytes-max", "32MiB"]);
    // Somebody who is known and slow holds little, and keeps it.
    let (mut slow, token) = scene.server.login("henderson");
    let half = "x".repeat(20_000);
    slow.stream().write_all(format!("SEND MESSAGE {token} messi {half}").as_bytes()).unwrap();
    let line = format!("{}\n", "X".repeat(63_500));
    let mut peers: Vec<TcpStream> = (0..COUNT).map(|_| scene.server.connect()).collect();
    for peer in &mut peers {
        peer.write_all(line.as_bytes()).unwrap();
        peer.set_nonblocking(true).unwrap();
    }
    let requests = "PING\n".repeat(4000);
    let mut some = vec![0; 256 * 1024];
    for _ in 0..20 {
        for peer in &mut peers {
            let (Ok(_) | Err(_)) = peer.write(requests.as_bytes());
            let (Ok(_) | Err(_)) = peer.read(&mut some);
        }
        scene.is_honest_served();
    }
    scene.await_log("connections hold too much memory", 1);
    slow.stream().write_all(b"\n").unwrap();
    slow.reply().unwrap();
    scene.honest.request(&format!("INBOX {}", scene.token)).unwrap();
    drop((slow, peers));
    scene.end("600 strangers with a long line and requests without end", 60_000);
}

#[test]
fn a_peer_that_reads_slowly_but_goes_on_gets_all() {
    let mut scene = Scene::new(&["--output-ms-max", "2000"]);
    let content = STANDARD.encode(vec![7; 4_000_000]);
    scene.honest.request(&format!("SEND FILE {} messi besar.bin {content}", scene.token)).unwrap();
    let mut slow = connect_with_buffer(scene.server.addresses[0], 32 * 1024);
    slow.write_all(format!("DOWNLOAD FILE {} messi besar.bin\n", scene.token).as_bytes()).unwrap();
    let mut received = Vec::new();
    let mut some = vec![0; 64 * 1024];
    // Whatever the kernels would hold between the two, the server sees that it goes on.
    while !received.ends_with(b"\r\n\r\n") {
        let count = slow.read(&mut some).unwrap();
        assert!(count > 0, "closed after {} bytes", received.len());
        received.extend_from_slice(&some[..count]);
        thread::sleep(Duration::from_secs_f64(0.2 * count as f64 / some.len() as f64));
    }
    let reply: Value = serde_json::from_slice(&received).unwrap();
    assert_eq!(reply["data"], *content);
    scene.is_honest_served();
}

#[test]
fn a_line_without_end_is_thrown_away_and_its_connection_closed() {
    const COUNT: usize = 8;
    let mut scene = Scene::new(&[]);
    let mut peers: Vec<TcpStream> = (0..COUNT).map(|_| scene.server.connect()).collect();
    let some = vec![b'x'; 1024 * 1024];
    for _ in 0..20 {
        for peer in &mut peers {
            // In the end nobody is there any more.
            drop(peer.write_all(&some));
        }
        scene.is_honest_served();
    }
    scene.await_log("line without end", COUNT);
    scene.end("8 lines of 20 MiB without an end", 8_000);
}

#[test]
fn peers_that_send_a_byte_now_and_then_are_closed() {
    const COUNT: usize = 500;
    let flags = ["--line-ms-max", "1000", "--first-request-ms-max", "2000", "--auth-ms-max", "3000"];
    let mut scene = Scene::new(&flags);
    let mut peers: Vec<TcpStream> = (0..COUNT).map(|_| scene.server.connect()).collect();
    let upload = format!("SEND FILE {} messi lambat.bin {}", scene.token, "QUJD".repeat(30_000));
    for (number, peer) in peers.iter_mut().enumerate() {
        match number % 4 {
            0 => peer.write_all(b"SEND MESS").unwrap(),
            1 if number < 100 => peer.write_all(upload.as_bytes()).unwrap(),
            2 => peer.write_all(b"PING\n").unwrap(),
            _ => {}
        }
    }
    let end = Instant::now() + Duration::from_secs(30);
    while peers.iter().any(|peer| !is_closed(peer)) {
        assert!(Instant::now() < end, "some were let be");
        for (number, mut peer) in peers.iter().enumerate() {
            // One more byte of what has begun, or one more request without a login: nothing of this buys time.
            let more = ["Q", "Q", "PING\n", ""][number % 4].as_bytes();
            drop(peer.write(more));
        }
        scene.is_honest_served();
        thread::sleep(Duration::from_millis(100));
    }
    scene.await_log("request too slow", 150);
    scene.await_log("no login in time", 125);
    scene.await_log("no request in time", 125);
    // The uploads' places are free again.
    let content = STANDARD.encode(vec![7; 100_000]);
    scene.honest.request(&format!("SEND FILE {} messi utuh.bin {content}", scene.token)).unwrap();
    scene.end("500 peers that send a byte now and then", 24_000);
}

#[test]
fn what_connections_hold_together_is_bounded() {
    const COUNT: usize = 2000;
    raise_file_limit();
    let flags = ["--connections-bytes-max", "48MiB", "--output-bytes-max", "32MiB", "--output-bytes-high", "1MiB"];
    let mut scene = Scene::new(&flags);
    // A line that is almost as long as it may be, and does not end: 120 MB in all, and all of it three times.
    let line = "x".repeat(60_000);
    for round in 1..=3 {
        let Some(mut peers) = many(&scene.server, COUNT) else { return };
        for (number, peer) in peers.iter_mut().enumerate() {
            drop(peer.write_all(line.as_bytes()));
            if number % 50 == 0 {
                scene.is_honest_served();
            }
        }
        scene.await_log("connections hold too much memory", 500 * round);
        drop(peers);
    }
    let most = scene.before + 64 * 1024;
    assert!(scene.peak < most, "{} KiB", scene.peak);
    // What is given back stays with the allocator in part, to be used again.
    scene.end("2,000 lines of 60 KB that never end", 64_000);
}

#[test]
fn long_answers_that_nobody_reads_are_bounded_together() {
    const COUNT: usize = 100;
    raise_file_limit();
    let flags = ["--connections-bytes-max", "48MiB", "--groups-per-minute-max", "0"];
    let mut scene = Scene::new(&flags);
    let token = scene.token.clone();
    // A list of 1.3 MB.
    for number in 0..5000 {
        let name = format!("{number}{}", "n".repeat(250));
        scene.honest.send(format!("SEND FILE {token} messi {name} QUJD").as_bytes()).unwrap();
        if number % 100 == 99 {
            (0..100).for_each(|_| drop(scene.honest.reply().unwrap()));
        }
    }
    scene.before = scene.server.memory_kib();
    let Some(mut peers) = many(&scene.server, COUNT) else { return };
    for (number, peer) in peers.iter_mut().enumerate() {
        peer.write_all(format!("MY FILE {token}\n").repeat(8).as_bytes()).unwrap();
        if number % 10 == 0 {
            scene.is_honest_served();
        }
    }
    scene.await_log("connections hold too much memory", 30);
    let most = scene.before + 80 * 1024;
    assert!(scene.peak < most, "{} KiB", scene.peak);
    drop(peers);
    scene.end("100 peers that ask for 10 MB each and do not read", 64_000);
}

#[test]
fn a_storm_of_connections_is_turned_away_and_the_administrator_gets_in() {
    const STORM: usize = 5000;
    let mut scene = Scene::new(&["--connections-max", "100", "--accepts-per-turn-max", "2", "--log", "warn"]);
    let data = scene.log.with_file_name("data");
    let held: Vec<TcpStream> = (0..99).map(|_| scene.server.connect()).collect();
    let mut refused = 0;
    for number in 0..STORM {
        let stream = scene.server.connect();
        if number % 100 == 0 {
            refused += usize::from(finish(stream) == FULL);
            scene.is_honest_served();
        }
    }
    assert_eq!(refused, STORM / 100);
    let users = output(&["user", "list", "--data", data.to_str().unwrap()]);
    assert!(text(&users.stdout).contains("messi"), "the administrator gets in");
    drop(held);
    scene.is_honest_served();
    let mut next = scene.server.client();
    next.request("PING").unwrap();
    scene.end("5,000 connections more than there may be", 8_000);
}

#[test]
fn one_address_does_not_take_all_connections() {
    let flags = ["--limit-loopback", "--connections-per-address-max", "20", "--log", "warn"];
    let scene = Scene::new(&flags);
    let address = scene.server.addresses[0];
    let held: Vec<TcpStream> = (0..20).map(|_| connect_from("127.0.0.2", address)).collect();
    for _ in 0..100 {
        assert_eq!(finish(connect_from("127.0.0.2", address)), FULL);
    }
    assert_eq!(finish(connect_from("127.0.0.3", address)), "");
    drop(held);
    scene.end("120 connections from one address that may have 20", 8_000);
}

#[test]
fn passwords_cannot_be_guessed_and_the_owner_is_not_locked_out() {
    let mut scene = Scene::new(&["--limit-loopback"]);
    let address = scene.server.addresses[0];
    let mut answers = (0, 0);
    for number in 0..200 {
        let guess = format!("AUTH henderson salah{number:03}");
        let refused = Client::new(connect_from("127.0.0.2", address)).request(&guess).unwrap_err().to_string();
        match refused.as_str() {
            "username atau password salah" => answers.0 += 1,
            text if text.starts_with("terlalu banyak percobaan") => answers.1 += 1,
            text => panic!("{text}"),
        }
        scene.is_honest_served();
    }
    // Five at once, and then after one, two, four seconds; the test does not take half a minute.
    assert!((5..=10).contains(&answers.0), "{answers:?}");
    // Neither elsewhere nor for another account does the owner notice.
    Client::new(connect_from("127.0.0.3", address)).request("AUTH henderson surabaya").unwrap();
    Client::new(connect_from("127.0.0.2", address)).request("AUTH lineker surabaya").unwrap();
    // Whoever tries other accounts from there is told to wait as well.
    let refused = (0..200).find(|number| {
        let guess = format!("AUTH siapa{number} salah001");
        let refused = Client::new(connect_from("127.0.0.2", address)).request(&guess).unwrap_err().to_string();
        refused.starts_with("terlalu banyak percobaan")
    });
    assert!(refused.is_some_and(|number| number < 60), "{refused:?}");
    scene.await_log("login failed", 50);
    let log = fs::read_to_string(&scene.log).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("login failed")).collect();
    assert!((50..=60).contains(&lines.len()), "each failure is a line: {}", lines.len());
    assert!(lines.iter().all(|line| line.ends_with(" WARN login failed address=127.0.0.2")), "{lines:?}");
    scene.end("400 wrong passwords", 8_000);
}

#[test]
fn logins_at_once_from_one_address_leave_room_for_others() {
    let scene = Scene::new(&["--limit-loopback", "--connections-per-address-max", "1000"]);
    let address = scene.server.addresses[0];
    let mut crowd: Vec<TcpStream> = (0..200).map(|_| connect_from("127.0.0.2", address)).collect();
    for (number, stream) in crowd.iter_mut().enumerate() {
        stream.write_all(format!("AUTH siapa{number} salah001\n").as_bytes()).unwrap();
    }
    Client::new(connect_from("127.0.0.3", address)).request("AUTH henderson surabaya").unwrap();
    let answers: Vec<String> = crowd.into_iter().map(finish).collect();
    let count = |what: &str| answers.iter().filter(|answer| answer.contains(what)).count();
    let (wrong, busy) = (count("password salah"), count("server sibuk, coba lagi"));
    assert!(wrong >= 16 && busy >= 50, "{wrong} were looked at, {busy} were too many");
    scene.end("200 logins at once", 8_000);
}

#[test]
fn accounts_and_groups_are_made_at_a_bounded_rate() {
    let mut scene = Scene::new(&["--registrations-per-minute-max", "5", "--groups-per-minute-max", "5"]);
    let mut made = 0;
    let mut stranger = scene.server.client();
    for number in 0..200 {
        made += usize::from(stranger.request(&format!("REGISTER siapa{number} rahasia123")).is_ok());
    }
    assert!((5..=8).contains(&made), "{made} accounts");
    let mut made = 0;
    for number in 0..200 {
        made += usize::from(scene.honest.request(&format!("CREATE GROUP {} g{number}", scene.token)).is_ok());
    }
    assert!((5..=8).contains(&made), "{made} groups");
    scene.end("200 accounts and 200 groups at once", 8_000);
}

#[test]
fn tokens_cannot_be_guessed() {
    const COUNT: usize = 100_000;
    let mut scene = Scene::new(&["--log", "warn"]);
    let mut stream = scene.server.connect();
    let mut reader = stream.try_clone().unwrap();
    let replies = thread::spawn(move || {
        let mut replies = String::new();
        reader.read_to_string(&mut replies).unwrap();
        replies
    });
    for number in 0..COUNT {
        // Not at random, but as far apart as if.
        let bits = (number as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        stream.write_all(format!("INBOX {bits:032x}\n").as_bytes()).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(replies.join().unwrap().matches("token tidak valid").count(), COUNT);
    scene.is_honest_served();
    scene.end("100,000 tokens at random", 8_000);
}

#[test]
fn neither_a_log_nor_the_disk_gives_away_a_login() {
    let root = tempfile::tempdir().unwrap();
    let (data, log) = (root.path().join("data"), root.path().join("log"));
    let server = Server::demo_with_log(&data, &log, &["--log", "trace"]);
    let (mut messi, token) = server.login("messi");
    messi.request(&format!("SEND MESSAGE {token} henderson rahasia-sekali")).unwrap();
    messi.request(&format!("CREATE GROUP {token} tim sandi-group")).unwrap();
    messi.request(&format!("CHANGE PASSWORD {token} surabaya malang-raya")).unwrap();
    // Mistakes that people make: the words in the wrong order, too many, too few, and in a line that is too long.
    for mistake in [
        "AUTH malang-raya messi".to_owned(),
        "AUTH messi malang-raya lagi".to_owned(),
        format!("SEND MESSAGE {token}"),
        format!("SEND MESSAGE {token} nobody rahasia-sekali"),
        format!("INBOX {token} {token}"),
        format!("SEND MESSAGE {token} henderson {}", "rahasia-sekali".repeat(10_000)),
        format!("SEND FILE {token} henderson rahasia-sekali %"),
        format!("LOGOUT malang-raya{token}"),
    ] {
        let refused = messi.request(&mistake).unwrap_err().to_string();
        for secret in ["malang-raya", "rahasia-sekali", &token] {
            assert!(!refused.contains(secret), "{refused}");
        }
    }
    messi.request(&format!("DOWNLOAD FILE {token} henderson rahasia-sekali")).unwrap_err();
    server.stop();
    let log = fs::read(&log).unwrap();
    assert!(log.len() > 500, "it says something");
    let journal: Vec<u8> = fs::read_dir(data.join("journal"))
        .unwrap()
        .flat_map(|segment| fs::read(segment.unwrap().path()).unwrap())
        .collect();
    let bits = u128::from_str_radix(&token, 16).unwrap();
    let binary = [bits.to_be_bytes(), bits.to_le_bytes()];
    let has = |place: &[u8], what: &[u8]| memchr::memmem::find(place, what).is_some();
    for secret in [&b"malang-raya"[..], b"surabaya", b"sandi-group", token.as_bytes(), &binary[0], &binary[1]] {
        assert!(!has(&journal, secret) && !has(&log, secret), "{}", String::from_utf8_lossy(secret));
    }
    // Texts are in the journal, where they wait, and nowhere else.
    assert!(has(&journal, b"rahasia-sekali") && !has(&log, b"rahasia-sekali"));
}

#[test]
fn names_do_not_lead_out_of_the_data_directory() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::demo(&root.path().join("data"), &[]);
    let (mut messi, token) = server.login("messi");
    let large = "QUJD".repeat(30_000);
    for name in ["../keluar", "..", ".", "/etc/keluar", "a/../../keluar", "a\\b", "\u{1}keluar", "", &"k".repeat(256)] {
        for content in ["QUJD", &large] {
            let refused = messi.request(&format!("SEND FILE {token} henderson {name} {content}")).unwrap_err();
            let expected = if name.is_empty() { "parameter tidak lengkap" } else { "nama file tidak valid" };
            let is_longest = name.len() > 255;
            assert!(refused.to_string().starts_with(expected) || name.is_empty() || is_longest, "{name}: {refused}");
        }
        if !matches!(name, "." | "..") {
            assert!(messi.request(&format!("REGISTER {name} rahasia123")).is_err(), "{name}");
            assert!(messi.request(&format!("CREATE GROUP {token} {name}")).is_err(), "{name}");
        }
    }
    // What looks like a part of a path and is none is a name like any other, and no name of a file on the disk. So are
    // names of users.
    messi.request("REGISTER .. rahasia123").unwrap();
    messi.request(&format!("SEND FILE {token} .. keluar {large}")).unwrap();
    for name in ["..keluar", "~", "CON", "%2e%2e%2fkeluar", "-rf"] {
        messi.request(&format!("SEND FILE {token} henderson {name} {large}")).unwrap();
        let file = messi.request(&format!("DOWNLOAD FILE {token} henderson {name}")).unwrap();
        assert_eq!(file["data"], *large);
    }
    let listed: Value = messi.request(&format!("MY FILE {token}")).unwrap();
    assert_eq!(listed["data"]["henderson"].as_array().unwrap().len(), 5);
    server.stop();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing is beside the data directory");
    let mut waiting = vec![root.path().to_owned()];
    while let Some(path) = waiting.pop() {
        assert!(!path.file_name().unwrap().to_string_lossy().contains("keluar"), "{}", path.display());
        if path.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}
