//! The real program over real sockets: what its start, its stop, a power cut and bad peers do to it.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::process::{Server, connect, finish, has_ipv6, kurir, output, raise_file_limit, text};
use kurir::client::{Client, ClientError};
use rustix::process::Signal;
use serde_json::Value;

const OK: &str = "{\"status\":\"OK\"}\r\n\r\n";

fn texts_of(inbox: &Value, sender: &str) -> Vec<String> {
    let messages = inbox["data"][sender].as_array().cloned().unwrap_or_default();
    messages.iter().map(|message| message["pesan"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn it_listens_on_every_address_that_it_is_given() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let second = if has_ipv6() { "[::1]:0" } else { "127.0.0.2:0" };
    let arguments = ["serve", "--demo", "--listen", "127.0.0.1:0", "--listen", second, "--data", path];
    let server = Server::start(kurir(&arguments), 2);
    assert_ne!(server.addresses[0].port(), 0);
    for address in &server.addresses {
        let reply = Client::new(connect(*address)).request("AUTH messi surabaya").unwrap();
        assert_eq!(reply["data"].as_str().unwrap().len(), 32);
    }
    server.stop();
}

#[test]
fn the_same_port_can_be_had_for_both_versions_of_ip() {
    if !has_ipv6() {
        println!("not tried: this machine has no IPv6");
        return;
    }
    // The README's own command, but for the port, which another program may take in between.
    for _ in 0..10 {
        let data = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (v4, v6) = (format!("127.0.0.1:{port}"), format!("[::1]:{port}"));
        let path = data.path().to_str().unwrap();
        let probe = TcpListener::bind(&v6).is_ok();
        if probe {
            let server = Server::start(kurir(&["serve", "--listen", &v4, "--listen", &v6, "--data", path]), 2);
            server.client().request("PING").unwrap();
            return;
        }
    }
    panic!("no port was free");
}

#[test]
fn every_flag_can_be_given_in_the_environment() {
    let data = tempfile::tempdir().unwrap();
    let mut command = kurir(&["serve"]);
    command.env("KURIR_DEMO", "true").env("KURIR_LISTEN", "127.0.0.1:0,127.0.0.2:0").env("KURIR_DATA", data.path());
    command.env("KURIR_REGISTRATION", "closed").env("KURIR_MAILBOX_MESSAGES_MAX", "1").env("KURIR_LOG", "warn");
    let server = Server::start(command, 2);
    let refused = server.client().request("REGISTER pele santos12").unwrap_err();
    assert_eq!(refused.to_string(), "pendaftaran ditutup");
    let (mut messi, token) = server.login("messi");
    messi.request(&format!("SEND MESSAGE {token} messi satu")).unwrap();
    let refused = messi.request(&format!("SEND MESSAGE {token} messi dua")).unwrap_err();
    assert_eq!(refused.to_string(), "kotak masuk tujuan penuh");
}

/// One line on standard error that says `what`, and exit code 2.
fn assert_refused(arguments: &[&str], what: &str) {
    let refused = output(&[arguments, &["--log", "off"]].concat());
    assert_eq!(refused.status.code(), Some(2), "{arguments:?}");
    let error = text(&refused.stderr);
    assert!(error.contains(what) && error.lines().count() == 1, "{arguments:?}: {error}");
    assert_eq!(text(&refused.stdout), "");
}

#[test]
fn what_is_wrong_at_the_start_is_said_in_one_line() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().join("data");
    let path = path.to_str().unwrap();
    let server = Server::demo(Path::new(path), &[]);
    let taken = server.addresses[0].to_string();
    let other = data.path().join("other");
    let other = other.to_str().unwrap();

    assert_refused(&["serve", "--data", path, "--listen", "127.0.0.1:0"], "is in use by process");
    assert_refused(&["serve", "--data", other, "--listen", &taken], "the port is taken");
    assert_refused(&["serve", "--demo", "--data", other, "--listen", "0.0.0.0:0"], "--demo");
    assert_refused(&["serve", "--data", "/proc/nowhere", "--listen", "127.0.0.1:0"], "/proc/nowhere");
    let file = data.path().join("file");
    fs::write(&file, "").unwrap();
    assert_refused(&["serve", "--data", file.to_str().unwrap(), "--listen", "127.0.0.1:0"], "is not a directory");
    assert_refused(&["serve", "--nonsense"], "--nonsense");
    assert_refused(&["serve", "--listen", "here"], "127.0.0.1:8889");
    assert_refused(&["serve", "--line-bytes-max", "1kb"], "KiB");
    assert_refused(&["serve", "--requests-per-turn-max", "0"], "at least 1");
    assert_refused(&["serve", "--data", path, "--nothing", "of this"], "--nothing");
    fs::create_dir_all(Path::new(other).join("journal")).unwrap();
    fs::write(Path::new(other).join("journal/0000000001.log"), "this is not a journal of this program").unwrap();
    assert_refused(&["serve", "--data", other, "--listen", "127.0.0.1:0"], "not a journal");
    // A path that was mistyped is not made a data directory; one with what a file system of its own has is.
    let (foreign, own) = (data.path().join("foreign"), data.path().join("own"));
    for (directory, file) in [(&foreign, "letter.txt"), (&own, "lost+found")] {
        fs::create_dir(directory).unwrap();
        fs::write(directory.join(file), "").unwrap();
    }
    let foreign = foreign.to_str().unwrap();
    assert_refused(&["serve", "--data", foreign, "--listen", "127.0.0.1:0"], "there is something in it");
    assert_eq!(fs::read_dir(foreign).unwrap().count(), 1);
    Server::demo(&own, &[]).stop();
}

#[test]
fn listening_beyond_this_machine_is_warned_of_in_one_line() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    for (listen, is_warned) in [("0.0.0.0:0", true), ("127.0.0.1:0", false)] {
        let server = Server::start_with_pipe(&mut kurir(&["serve", "--data", path, "--listen", listen]));
        server.signal(Signal::TERM);
        let mut server = server;
        let (_, log) = server.wait_with_log();
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains(" WARN ")).collect();
        assert_eq!(warnings.len(), usize::from(is_warned), "{log}");
        assert!(warnings.iter().all(|line| line.contains("not encrypted")), "{log}");
    }
}

#[test]
fn a_log_line_is_json_on_request() {
    let data = tempfile::tempdir().unwrap();
    let mut command = kurir(&["serve", "--demo", "--listen", "127.0.0.1:0", "--log-format", "json"]);
    let log = data.path().join("log");
    // The harness would pass the log on, so a shell puts it aside.
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("exec \"$@\" 2>\"$0\"").arg(&log).arg(command.get_program()).args(command.get_args());
    shell.arg("--data").arg(data.path().join("data")).stdout(std::process::Stdio::piped());
    command.env_clear();
    let server = Server::start(shell, 1);
    assert!(server.client().request("AUTH messi salah123").is_err());
    server.stop();
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let login =
        lines.iter().find(|line| line["fields"]["message"] == "login failed").expect("a login that failed is logged");
    assert_eq!(login["fields"]["address"], "127.0.0.1");
    assert!(!log.contains("salah123"), "a password is in the log");
}

#[test]
fn only_the_owner_can_read_the_data() {
    let data = tempfile::tempdir().unwrap();
    let root = data.path().join("data");
    let server = Server::demo(&root, &[]);
    let (mut messi, token) = server.login("messi");
    messi.request(&format!("SEND FILE {token} henderson a.bin {}", "QUJD".repeat(10_000))).unwrap();
    let mut waiting = vec![root];
    let mut seen = 0;
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let mode = metadata.permissions().mode() & 0o777;
        assert_eq!(mode, if metadata.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        seen += 1;
    }
    assert!(seen >= 8, "directories, the lock, the socket, the journal and a file");
}

#[test]
fn the_end_of_the_stream_may_come_with_the_requests() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let mut stream = server.connect();
    stream.write_all(b"PING\nPING\r\n\r\nPING").unwrap();
    assert_eq!(finish(stream), OK.repeat(3));
    assert_eq!(finish(server.connect()), "");
}

#[test]
fn a_login_does_not_hold_up_the_others_and_is_answered_in_order() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let mut slow = server.connect();
    slow.write_all("AUTH messi surabaya\nPING\n".repeat(20).as_bytes()).unwrap();
    let mut quick = server.client();
    for _ in 0..5 {
        quick.request("PING").unwrap();
    }
    slow.set_nonblocking(true).unwrap();
    let mut early = vec![0; 64 * 1024];
    let count = match slow.read(&mut early) {
        Ok(count) => count,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    };
    slow.set_nonblocking(false).unwrap();
    let replies = text(&early[..count]).to_owned() + &finish(slow);
    assert!(text(&early[..count]).matches("\r\n\r\n").count() < 40, "five pings took longer than twenty logins");
    let replies: Vec<&str> = replies.split("\r\n\r\n").collect();
    assert_eq!(replies.len(), 41);
    for pair in replies.chunks_exact(2) {
        assert_eq!(pair[0].len(), r#"{"status":"OK","data":""}"#.len() + 32);
        assert_eq!(pair[1], r#"{"status":"OK"}"#);
    }
}

#[test]
fn everything_is_kept_across_a_stop_and_a_power_cut() {
    let data = tempfile::tempdir().unwrap();
    let large = "QUJD".repeat(30_000);
    for (is_power_cut, sync) in [(false, "always"), (true, "always"), (false, "interval")] {
        let root = data.path().join(format!("{is_power_cut} {sync}"));
        let server = Server::demo(&root, &["--sync", sync]);
        let (mut messi, token) = server.login("messi");
        let (mut henderson, reader) = server.login("henderson");
        messi.request(&format!("SEND MESSAGE {token} henderson satu")).unwrap();
        henderson.request(&format!("INBOX {reader}")).unwrap();
        // The next request of this connection is served after the reply to the last got out, and OK waits for both.
        henderson.request(&format!("CREATE GROUP {reader} tim rahasia")).unwrap();
        messi.request(&format!("SEND GROUP MESSAGE {token} group1 dua")).unwrap();
        messi.request(&format!("JOIN GROUP {token} tim rahasia")).unwrap();
        messi.request(&format!("SEND FILE {token} henderson a.txt QUJD")).unwrap();
        messi.request(&format!("SEND FILE {token} henderson b.bin {large}")).unwrap();
        messi.request("REGISTER pele santos12").unwrap();
        messi.request(&format!("CHANGE PASSWORD {token} surabaya malang-raya")).unwrap();
        if is_power_cut {
            server.kill();
        } else {
            server.stop();
        }

        let server = Server::demo(&root, &[]);
        let mut client = server.client();
        let inbox = client.request(&format!("INBOX {reader}")).unwrap();
        assert_eq!(texts_of(&inbox, "messi"), ["dua"]);
        let file = client.request(&format!("DOWNLOAD FILE {reader} messi a.txt")).unwrap();
        assert_eq!(file["data"], "QUJD");
        let file = client.request(&format!("DOWNLOAD FILE {reader} messi b.bin")).unwrap();
        assert_eq!(file["data"], *large);
        let groups = client.request(&format!("MY GROUP {token}")).unwrap();
        assert_eq!(groups["data"]["tim"], serde_json::json!(["henderson", "messi"]));
        client.request("AUTH pele santos12").unwrap();
        client.request("AUTH messi malang-raya").unwrap();
        client.request("AUTH messi surabaya").unwrap_err();
    }
}

#[test]
fn either_signal_stops_it() {
    let data = tempfile::tempdir().unwrap();
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::demo(data.path(), &[]);
        server.client().request("PING").unwrap();
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0));
    }
}

#[test]
fn a_group_file_is_stored_once_however_many_members_there_are() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let (mut messi, token) = server.login("messi");
    let content = "QUJD".repeat(10_000);
    messi.request(&format!("SEND GROUP FILE {token} group1 a.bin {content}")).unwrap();
    for name in ["henderson", "lineker"] {
        let (mut member, token) = server.login(name);
        assert_eq!(member.request(&format!("DOWNLOAD FILE {token} messi a.bin")).unwrap()["data"], *content);
    }
    assert_eq!(files_below(&data.path().join("files")), 1);
}

#[test]
fn a_stop_answers_what_was_received() {
    let data = tempfile::tempdir().unwrap();
    let mut server = Server::demo(data.path(), &[]);
    let (_messi, token) = server.login("messi");
    let mut stream = server.connect();
    let idle = server.connect();
    let request = format!("SEND MESSAGE {token} henderson halo\n");
    stream.write_all((request.repeat(2000) + "AUTH messi surabaya\nSEND MESSA").as_bytes()).unwrap();
    // Once the first answer is here, the rest has arrived too: it was sent in one piece and is far below what a socket takes.
    let mut first = [0; OK.len()];
    stream.read_exact(&mut first).unwrap();
    server.signal(Signal::TERM);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert_eq!(rest.matches(OK).count(), 1999);
    assert!(rest.ends_with("\"}\r\n\r\n"), "the login was answered too");
    assert!(server.wait().success());
    drop(idle);
    assert!(!data.path().join("admin.sock").exists());

    let server = Server::demo(data.path(), &[]);
    let (mut henderson, token) = server.login("henderson");
    let inbox = henderson.request(&format!("INBOX {token}")).unwrap();
    assert_eq!(texts_of(&inbox, "messi").len(), 2000);
}

/// A peer that reads the start of a large reply and no more.
fn stalled_download(server: &Server) -> Client<TcpStream> {
    let (mut messi, token) = server.login("messi");
    let content = STANDARD.encode(vec![7; 16 * 1024 * 1024]);
    messi.request(&format!("SEND FILE {token} messi besar.bin {content}")).unwrap();
    messi.send(format!("DOWNLOAD FILE {token} messi besar.bin").as_bytes()).unwrap();
    let mut start = [0; 100];
    messi.stream().read_exact(&mut start).unwrap();
    messi
}

#[test]
fn a_stop_does_not_wait_for_ever_for_a_peer_that_does_not_read() {
    let data = tempfile::tempdir().unwrap();
    let mut server = Server::demo(data.path(), &["--stop-ms-max", "200"]);
    let _messi = stalled_download(&server);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}

/// What a reader got of one server's life, reply by reply.
type Replies = Vec<Vec<String>>;

#[test]
fn what_was_acknowledged_under_load_survives_kill_9() {
    const WRITERS: usize = 4;
    const KILLS: usize = 12;
    let data = tempfile::tempdir().unwrap();
    // Small segments, so that they are filled, freed and used again, and checkpoints made, all the time.
    let flags = ["--mailbox-messages-max", "1000000", "--segment-bytes", "256KiB", "--checkpoint-bytes", "256KiB"];
    let names = ["messi", "henderson", "messi", "henderson"];
    let mut acknowledged: Vec<Vec<String>> = vec![Vec::new(); WRITERS];
    let mut sent = 0;
    let mut lives: Vec<Replies> = Vec::new();
    for round in 0..KILLS {
        let server = Server::demo(data.path(), &flags);
        let count = Arc::new(AtomicUsize::new(0));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (client, token) = server.login(names[writer]);
                let count = Arc::clone(&count);
                thread::spawn(move || write_until_cut(client, writer, round, &token, &count))
            })
            .collect();
        // In every third life nobody reads.
        let (lineker, token) = server.login("lineker");
        let reader = (round % 3 != 0).then(|| thread::spawn(move || read_until_cut(lineker, &token)));
        // So much that some is in every stage when the end comes, and each time another.
        while count.load(Ordering::Relaxed) < 2000 + 137 * round {
            thread::sleep(Duration::from_millis(1));
        }
        server.kill();
        for (writer, texts) in writers.into_iter().enumerate() {
            let (texts, count) = texts.join().unwrap();
            acknowledged[writer].extend(texts);
            sent += count;
        }
        lives.extend(reader.map(|reader| reader.join().unwrap()));
    }
    let server = Server::demo(data.path(), &flags);
    let (mut lineker, token) = server.login("lineker");
    let mut last = Vec::new();
    while last.last() != Some(&Vec::new()) {
        last.push(texts_of_all(&lineker.request(&format!("INBOX {token}")).unwrap()));
    }
    lives.push(last);
    // It was compacted all the while: nothing needs its first segments any more.
    while data.path().join("journal/0000000001.log").exists() {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(fs::read_dir(data.path().join("checkpoint")).unwrap().count() > 0);
    server.stop();
    assert_eq!(output(&["check", data.path().to_str().unwrap()]).status.code(), Some(0));

    let received = each_once(&lives);
    assert!(received.len() <= sent);
    for (writer, texts) in acknowledged.iter().enumerate() {
        assert!(texts.len() > 1000, "writer {writer} had {} acknowledged", texts.len());
        let prefix = format!("{writer} ");
        let mut of_writer = received.iter().filter(|text| text.starts_with(&prefix));
        // In order, each once; between them there may be some whose answer did not get out any more.
        for text in texts {
            assert!(of_writer.any(|found| found == text), "{text} was acknowledged and is not there");
        }
    }
}

/// Everything that was received, in order. Only what came in the last reply before an end may come once more: that it got
/// out may not have been written down any more.
fn each_once(lives: &[Replies]) -> Vec<String> {
    let mut received = Vec::new();
    let (mut seen, mut may_come_again) = (HashSet::new(), HashSet::new());
    for replies in lives {
        for text in replies.iter().flatten() {
            if seen.insert(text.clone()) {
                received.push(text.clone());
            } else {
                assert!(may_come_again.remove(text), "{text} came twice");
            }
        }
        may_come_again.extend(replies.last().into_iter().flatten().cloned());
    }
    received
}

/// Reads until the server is gone.
fn read_until_cut(mut client: Client<TcpStream>, token: &str) -> Replies {
    let mut replies = Vec::new();
    while let Ok(inbox) = client.request(&format!("INBOX {token}")) {
        replies.push(texts_of_all(&inbox));
    }
    replies
}

/// The texts of a reply whose senders are those who write, each sender's in order.
fn texts_of_all(inbox: &Value) -> Vec<String> {
    ["messi", "henderson"].into_iter().flat_map(|sender| texts_of(inbox, sender)).collect()
}

/// Sends in small pipelines until the server is gone. Returns what was acknowledged, and how much was sent.
fn write_until_cut(
    mut client: Client<TcpStream>,
    writer: usize,
    round: usize,
    token: &str,
    count: &AtomicUsize,
) -> (Vec<String>, usize) {
    let mut acknowledged = Vec::new();
    for number in (0..).step_by(8) {
        let texts: Vec<String> = (number..number + 8).map(|number| format!("{writer} {round} {number}")).collect();
        let lines: Vec<String> = texts.iter().map(|text| format!("SEND MESSAGE {token} lineker {text}")).collect();
        if client.send(lines.join("\n").as_bytes()).is_err() {
            return (acknowledged, number + 8);
        }
        for text in texts {
            match client.reply() {
                Ok(_) => acknowledged.push(text),
                Err(ClientError::Io(_)) => return (acknowledged, number + 8),
                Err(error) => panic!("{error}"),
            }
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    unreachable!("the server outlived all numbers")
}

#[test]
fn a_large_file_goes_up_and_comes_down_while_others_are_served() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let (mut messi, token) = server.login("messi");
    let (mut henderson, reader) = server.login("henderson");
    let content: Vec<u8> =
        (0..20_000_000u32).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let encoded = STANDARD.encode(&content);
    let (first, second) = encoded.split_at(encoded.len() / 2);
    messi.stream().write_all(format!("SEND FILE {token} henderson besar.bin {first}").as_bytes()).unwrap();
    for _ in 0..50 {
        henderson.request("PING").unwrap();
    }
    assert_eq!(henderson.request(&format!("MY FILE {reader}")).unwrap()["data"], serde_json::json!({}));
    messi.send(second.as_bytes()).unwrap();
    messi.reply().unwrap();

    // A download that nobody reads holds up nobody, and goes on when it is read, though the file is deleted meanwhile.
    let mut slow = server.client();
    slow.send(format!("DOWNLOAD FILE {reader} messi besar.bin").as_bytes()).unwrap();
    let mut start = [0; 1000];
    slow.stream().read_exact(&mut start).unwrap();
    messi.request(&format!("DELETE FILE {token} henderson besar.bin")).unwrap();
    henderson.request(&format!("DELETE FILE {reader} messi besar.bin")).unwrap();
    let mut reply = start.to_vec();
    reply.extend(finish(slow.stream().try_clone().unwrap()).into_bytes());
    let reply: Value = serde_json::from_slice(&reply).unwrap();
    assert!(STANDARD.decode(reply["data"].as_str().unwrap()).unwrap() == content, "what came down is not what went up");
    assert_eq!(files_below(&data.path().join("files")), 0, "the bytes of a file that nobody lists are gone");
}

#[test]
fn an_upload_that_is_cut_off_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let (mut messi, token) = server.login("messi");
    let half = "QUJD".repeat(1_000_000);
    let mut leaver = server.connect();
    leaver.write_all(format!("SEND FILE {token} henderson a.bin {half}").as_bytes()).unwrap();
    drop(leaver);
    let mut cut = server.connect();
    cut.write_all(format!("SEND FILE {token} henderson b.bin {half}").as_bytes()).unwrap();
    messi.request("PING").unwrap();
    server.kill();
    let server = Server::demo(data.path(), &[]);
    let mut messi = server.client();
    assert_eq!(messi.request(&format!("MY FILE {token}")).unwrap()["data"], serde_json::json!({}));
    assert_eq!(files_below(&data.path().join("files")), 0);
}

fn files_below(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

#[test]
fn a_peer_that_does_not_read_is_not_served_further_and_holds_up_nobody() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &["--output-bytes-high", "64KiB"]);
    let mut deaf = server.connect();
    deaf.set_nonblocking(true).unwrap();
    // HELP has the largest answer for its size; this would be hundreds of megabytes of them.
    let requests = "HELP\n".repeat(1000);
    let mut taken = 0;
    let mut refusals = 0;
    while taken < 10_000_000 && refusals < 50 {
        match deaf.write(requests.as_bytes()) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refusals += 1;
                server.client().request("PING").unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refusals > 0, "the server reads on though nobody reads its answers");
    let status = fs::read_to_string(format!("/proc/{}/status", server.process())).unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = memory.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 128 * 1024, "{kib} KiB for a peer that does not read");
}

#[test]
fn a_thousand_idle_connections_are_in_nobodys_way() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    assert!(raise_file_limit() > 1200, "the file descriptor limit is too low for this test");
    let idle: Vec<_> = (0..1000).map(|_| server.connect()).collect();
    server.client().request("AUTH messi surabaya").unwrap();
    for stream in idle.into_iter().step_by(100) {
        let mut client = Client::new(stream);
        client.request("PING").unwrap();
    }
}

/// A server that may have 64 file descriptors.
fn with_few_descriptors(data: &str, more: &[&str]) -> Server {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("ulimit -n 64; exec \"$0\" \"$@\"").arg(env!("CARGO_BIN_EXE_kurir"));
    shell
        .args(["serve", "--demo", "--listen", "127.0.0.1:0", "--data", data])
        .args(more)
        .stdout(std::process::Stdio::piped());
    Server::start(shell, 1)
}

#[test]
fn a_server_that_is_full_says_so_and_takes_the_next_when_there_is_room() {
    let data = tempfile::tempdir().unwrap();
    let root = data.path().to_str().unwrap();
    // The limit of file descriptors is kept as well: of 64, a quarter are for connections, and as many for transfers.
    let server = with_few_descriptors(root, &[]);
    let mut clients: Vec<_> = (0..16).map(|_| server.client()).collect();
    for client in &mut clients {
        client.request("PING").unwrap();
    }
    for _ in 0..40 {
        let mut turned_away = server.client();
        assert_eq!(turned_away.receive().unwrap()["data"], "server penuh");
        assert!(matches!(turned_away.receive(), Err(ClientError::Io(_))));
    }
    // One that has sent something by then is told as well: closed at once, its socket would take that back.
    for _ in 0..40 {
        let mut turned_away = server.client();
        turned_away.stream().write_all("PING\n".repeat(1000).as_bytes()).unwrap();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(turned_away.receive().unwrap()["data"], "server penuh");
    }
    assert!(output(&["user", "list", "--data", root]).status.success(), "the administrator gets in");
    let mut last = clients.pop().unwrap();
    drop(clients);
    last.request("PING").unwrap();
    server.client().request("PING").unwrap();
}

#[test]
fn a_taken_port_leaves_no_data_directory_behind() {
    let data = tempfile::tempdir().unwrap();
    let root = data.path().join("data");
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    assert_refused(&["serve", "--data", root.to_str().unwrap(), "--listen", &address], "the port is taken");
    assert!(!root.exists());
}

/// While a peer holds up a stop, the next signal ends it, with an exit code of its own.
fn assert_ended_by_a_second_signal(server: &mut Server) {
    let _messi = stalled_download(server);
    server.signal(Signal::TERM);
    // The first is taken when nobody can connect any more.
    while TcpStream::connect(server.addresses[0]).is_ok() {}
    server.signal(Signal::INT);
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn a_second_signal_stops_it_at_once() {
    let data = tempfile::tempdir().unwrap();
    let mut server = Server::demo(data.path(), &["--stop-ms-max", "60000"]);
    assert_ended_by_a_second_signal(&mut server);
}

#[test]
fn a_demonstration_does_not_add_its_accounts_to_those_of_others() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let server =
        Server::start(kurir(&["serve", "--registration", "open", "--listen", "127.0.0.1:0", "--data", path]), 1);
    server.client().request("REGISTER pele santos12").unwrap();
    server.stop();
    assert_refused(&["serve", "--demo", "--listen", "127.0.0.1:0", "--data", path], "has accounts of its own");
}

/// The program with its standard error somewhere else, by a shell's redirection.
fn with_stderr(redirection: &str, arguments: &[&str]) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("exec \"$0\" \"$@\" {redirection}")).arg(env!("CARGO_BIN_EXE_kurir")).args(arguments);
    shell.stdout(std::process::Stdio::piped());
    shell
}

#[test]
fn a_log_that_cannot_be_written_is_no_reason_to_stop() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    for redirection in ["2>/dev/full", "2>&-"] {
        let arguments = ["serve", "--demo", "--listen", "127.0.0.1:0", "--data", path, "--log", "debug"];
        let server = Server::start(with_stderr(redirection, &arguments), 1);
        for _ in 0..3 {
            server.client().request("AUTH messi salah123").unwrap_err();
        }
        server.client().request("PING").unwrap();
        server.stop();
    }
}

/// A server whose standard error is a pipe that is full: it takes some 64 KiB, and each connection is two lines.
fn with_unread_log(data: &Path, more: &[&str]) -> Server {
    let path = data.to_str().unwrap();
    let arguments = ["serve", "--demo", "--listen", "127.0.0.1:0", "--data", path, "--log", "debug"];
    let server = Server::start_with_pipe(&mut kurir(&[&arguments[..], more].concat()));
    for _ in 0..1000 {
        server.client().request("PING").unwrap();
    }
    server
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    let data = tempfile::tempdir().unwrap();
    with_unread_log(data.path(), &[]).client().request("PING").unwrap();
}

#[test]
fn whatever_peers_hold_open_the_server_has_descriptors_for_its_own_work() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let server = with_few_descriptors(path, &["--segment-bytes", "256KiB", "--checkpoint-bytes", "256KiB"]);
    let (mut messi, token) = server.login("messi");
    let content = STANDARD.encode(vec![7; 16 * 1024 * 1024]);
    messi.request(&format!("SEND FILE {token} messi besar.bin {content}")).unwrap();
    // As many connections as there may be: downloads that nobody reads, and uploads that do not go on.
    let mut others: Vec<_> = (0..15).map(|_| server.client()).collect();
    let (readers, writers) = others.split_at_mut(8);
    let half = "QUJD".repeat(50_000);
    // One user has never as many of either as places are left.
    let mut tokens = vec![token.clone()];
    for user in ["henderson", "lineker", "pele"] {
        let (Ok(_) | Err(_)) = messi.request(&format!("REGISTER {user} surabaya"));
        let login = messi.request(&format!("AUTH {user} surabaya")).unwrap();
        tokens.push(login["data"].as_str().unwrap().to_owned());
        messi.request(&format!("SEND FILE {} messi besar.bin {content}", tokens.last().unwrap())).unwrap();
    }
    let users = [0, 0, 0, 0, 1, 1, 2, 3];
    for (number, writer) in writers.iter_mut().enumerate() {
        let token = &tokens[users[number]];
        writer.stream().write_all(format!("SEND FILE {token} messi {number} {half}").as_bytes()).unwrap();
    }
    for (number, reader) in readers.iter_mut().enumerate() {
        let token = &tokens[users[number]];
        reader.send(format!("DOWNLOAD FILE {token} messi besar.bin").as_bytes()).unwrap();
        let mut start = [0; 20];
        reader.stream().read_exact(&mut start).unwrap();
        assert!(start.starts_with(br#"{"status":"OK","#));
    }
    let refused = messi.request(&format!("DOWNLOAD FILE {token} messi besar.bin")).unwrap_err();
    assert_eq!(refused.to_string(), "server sibuk, coba lagi");
    // Segments and checkpoints are made all the same, though more knock on the door.
    let text = "x".repeat(10_000);
    for _ in 0..300 {
        messi.request(&format!("SEND MESSAGE {token} messi {text}")).unwrap();
        drop(server.connect());
    }
    assert!(fs::read_dir(data.path().join("journal")).unwrap().count() > 8);
    assert!(output(&["user", "list", "--data", path]).status.success(), "the administrator gets in");
    drop(others);
    // Their places are free once the disk has let go of them.
    let line = format!("SEND FILE {token} messi sedang.bin {}", "QUJD".repeat(10_000));
    while let Err(refused) = messi.request(&line) {
        assert_eq!(refused.to_string(), "server sibuk, coba lagi");
        thread::sleep(Duration::from_millis(10));
    }
    server.stop();
}

#[test]
fn a_shortage_of_file_descriptors_is_said_and_passes() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let server = with_few_descriptors(path, &["--admin-connections-max", "1000"]);
    let (mut messi, token) = server.login("messi");
    let sedang = "QUJD".repeat(10_000);
    messi.request(&format!("SEND FILE {token} messi ada.bin {sedang}")).unwrap();
    // Nobody but the administrator can take all that there are.
    let socket = data.path().join("admin.sock");
    let administrators: Vec<_> = (0..64).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for request in
        [format!("SEND FILE {token} messi baru.bin {sedang}"), format!("DOWNLOAD FILE {token} messi ada.bin")]
    {
        // They are accepted a few at a time, and one for which there was no descriptor is tried again a little later.
        let refused = (0..2000).find_map(|_| {
            thread::sleep(Duration::from_millis(5));
            messi.request(&request).err()
        });
        let refused = refused.expect("64 descriptors were enough for more");
        assert_eq!(refused.to_string(), "server sibuk, coba lagi");
    }
    // This one cannot even be accepted yet.
    let mut waiting = server.client();
    waiting.send(b"PING").unwrap();
    drop(administrators);
    waiting.reply().unwrap();
    messi.request(&format!("SEND FILE {token} messi baru.bin {sedang}")).unwrap();
    messi.request(&format!("DOWNLOAD FILE {token} messi ada.bin")).unwrap();
}

#[test]
fn a_stop_does_not_take_back_what_a_peer_has_not_read_yet() {
    let data = tempfile::tempdir().unwrap();
    let mut server = Server::demo(data.path(), &[]);
    let (mut messi, token) = server.login("messi");
    let text = "x".repeat(3000);
    for _ in 0..20 {
        let lines: Vec<String> = (0..20).map(|_| format!("SEND MESSAGE {token} messi {text}")).collect();
        messi.send(lines.join("\n").as_bytes()).unwrap();
        for _ in 0..20 {
            messi.reply().unwrap();
        }
    }
    messi.send(format!("INBOX {token}").as_bytes()).unwrap();
    let mut start = [0; 100];
    messi.stream().read_exact(&mut start).unwrap();
    server.signal(Signal::TERM);
    while TcpStream::connect(server.addresses[0]).is_ok() {}
    // A socket that is closed would answer this with a reset, and with it take back what is on its way.
    messi.send(b"PING").unwrap();
    let mut rest = start.to_vec();
    messi.stream().read_to_end(&mut rest).unwrap();
    let end = rest.windows(4).position(|window| window == b"\r\n\r\n").expect("the reply is whole");
    let inbox: Value = serde_json::from_slice(&rest[..end]).unwrap();
    assert_eq!(texts_of(&inbox, "messi").len(), 400);
    drop(messi);
    assert!(server.wait().success());
}

#[test]
fn many_large_messages_at_once_are_not_taken_for_a_full_disk() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let (_messi, token) = server.login("messi");
    let request = format!("SEND MESSAGE {token} henderson {}\n", "x".repeat(60_000));
    let senders: Vec<_> = (0..16)
        .map(|_| {
            let (mut stream, request) = (server.connect(), request.clone());
            thread::spawn(move || {
                stream.write_all(request.repeat(40).as_bytes()).unwrap();
                finish(stream)
            })
        })
        .collect();
    for sender in senders {
        assert_eq!(sender.join().unwrap(), OK.repeat(40));
    }
}

#[test]
fn stored_files_are_not_given_up_for_a_journal_that_is_lost() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let server = Server::demo(data.path(), &[]);
    let (mut messi, token) = server.login("messi");
    messi.request(&format!("SEND FILE {token} messi a.bin {}", "QUJD".repeat(10_000))).unwrap();
    server.stop();
    let files = files_below(&data.path().join("files"));
    fs::remove_dir_all(data.path().join("journal")).unwrap();
    assert_refused(&["serve", "--listen", "127.0.0.1:0", "--data", path], "there are stored files");
    assert_eq!(files_below(&data.path().join("files")), files);
}

#[test]
fn deleted_bytes_go_without_another_change_though_syncs_are_rare() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &["--sync", "interval"]);
    let (mut messi, token) = server.login("messi");
    messi.request(&format!("SEND FILE {token} messi a.txt {}", "QUJD".repeat(10_000))).unwrap();
    assert_eq!(files_below(&data.path().join("files")), 1);
    messi.request(&format!("DELETE FILE {token} messi a.txt")).unwrap();
    // About a second; a test that hangs is ended by whoever runs it.
    while files_below(&data.path().join("files")) > 0 {
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_second_signal_ends_it_though_standard_error_hangs() {
    let data = tempfile::tempdir().unwrap();
    let mut server = with_unread_log(data.path(), &["--stop-ms-max", "60000"]);
    assert_ended_by_a_second_signal(&mut server);
}

#[test]
fn a_stop_ends_though_standard_error_hangs() {
    let data = tempfile::tempdir().unwrap();
    let mut server = with_unread_log(data.path(), &[]);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}
