//! The client in a shell: each command on the real program, with a server of its own and a state directory of its own.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::process::{Server, kurir, text};
use kurir::client::{Client, ClientError, Target};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// A server, and the place where its users keep their logins.
struct Scene {
    server: Server,
    root: TempDir,
}

impl Scene {
    fn new(flags: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let server = Server::demo(&root.path().join("data"), flags);
        Self { server, root }
    }

    /// The program, in an empty directory of its own.
    fn command(&self, arguments: &[&str]) -> Command {
        let work = self.path("work");
        fs::create_dir_all(&work).unwrap();
        let mut command = kurir(arguments);
        command.env("XDG_STATE_HOME", self.path("state")).env("KURIR_SERVER", self.server.addresses[0].to_string());
        command.env("TZ", "UTC").current_dir(work);
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn run_with(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// What it prints, of one that does what it should and says nothing else.
    fn does(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{arguments:?}");
        text(&output.stdout).to_owned()
    }

    /// What one says that does not, by its exit code.
    fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(code), ""), "{arguments:?}");
        let said = text(&output.stderr).trim_end().strip_prefix("kurir: ").unwrap().to_owned();
        assert!(!said.contains('\n'), "one line: {said}");
        said
    }

    /// Each user has a profile of the same name.
    fn log_in(&self, users: &[&str]) {
        for user in users {
            let output = self.run_with(&["login", user, "--password-stdin", "--profile", user], "surabaya\n");
            assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}

fn content(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

#[test]
fn messages_go_from_one_to_the_other_and_come_once() {
    let scene = Scene::new(&[]);
    scene.log_in(&["messi", "henderson"]);
    scene.does(&["send", "--profile", "messi", "henderson", "halo,", "apa kabar?"]);
    scene.does(&["send", "--profile", "messi", "--group", "group1", "halo semua"]);
    let output = scene.run_with(&["send", "--profile", "messi", "henderson", "-"], "satu\n\n  dua \r\ntiga");
    assert!(output.status.success());
    let printed = scene.does(&["inbox", "--profile", "henderson"]);
    let lines: Vec<&str> = printed.lines().map(|line| &line[17..]).collect();
    let expected = [
        "messi > henderson: halo, apa kabar?",
        "messi > group1: halo semua",
        "messi > henderson: satu",
        "messi > henderson:   dua ",
        "messi > henderson: tiga",
    ];
    assert_eq!(lines, expected);
    assert_eq!(scene.does(&["inbox", "--profile", "henderson"]), "");

    scene.does(&["send", "--profile", "messi", "henderson", "untuk \"program\"\u{7}"]);
    let printed = scene.does(&["inbox", "--json", "--profile", "henderson"]);
    let message: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&message["from"], &message["text"]), (&"messi".into(), &"untuk \"program\"\u{7}".into()));
    // Both have it in their history.
    let last = scene.does(&["history", "--profile", "messi"]).lines().last().unwrap()[17..].to_owned();
    assert_eq!(last, "messi > henderson: untuk \"program\"\u{fffd}");
    for (user, count) in [("messi", 6), ("henderson", 6)] {
        let name = format!("{user}@{}.jsonl", scene.server.addresses[0]);
        let history = scene.path("state/kurir/history").join(name);
        assert_eq!(fs::read_to_string(&history).unwrap().lines().count(), count, "{user}");
        assert_eq!(fs::metadata(history).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn what_others_write_cannot_drive_the_terminal() {
    let scene = Scene::new(&[]);
    scene.log_in(&["messi", "henderson"]);
    scene.does(&["send", "--profile", "messi", "henderson", "\u{1b}]0;judul\u{7}\u{1b}[2Jhalo\u{9b}1m"]);
    let printed = scene.does(&["inbox", "--profile", "henderson"]);
    assert!(printed.trim_end().chars().all(|letter| !letter.is_control()) && printed.contains("halo"), "{printed:?}");
}

#[test]
fn inbox_follows_and_outlives_a_restart_of_the_server() {
    let mut scene = Scene::new(&[]);
    scene.log_in(&["messi", "henderson"]);
    let address = scene.server.addresses[0].to_string();
    let mut follow =
        scene.command(&["inbox", "--follow", "--profile", "henderson"]).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    scene.does(&["send", "--profile", "messi", "henderson", "satu"]);
    assert!(lines.next().unwrap().unwrap().ends_with("satu"));
    let data = scene.path("data");
    let Scene { server, root } = scene;
    server.stop();
    let again = ["serve", "--demo", "--listen", &address, "--data", data.to_str().unwrap()];
    scene = Scene { server: Server::start(kurir(&again), 1), root };
    scene.does(&["send", "--profile", "messi", "henderson", "dua"]);
    assert!(lines.next().unwrap().unwrap().ends_with("dua"));
    // (A shell may have its children ignore SIGINT.)
    signal(&follow, Signal::TERM);
    assert!(!follow.wait().unwrap().success());
}

#[test]
fn each_failure_has_its_exit_code_and_one_line() {
    let scene = Scene::new(&[]);
    assert_eq!(scene.fails(&["inbox"], 2), "nobody is logged in; see `kurir login`");
    let output = scene.run_with(&["login", "messi", "--password-stdin"], "salahsalah\n");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), "kurir: username atau password salah\n"));
    let output = scene.run_with(&["login", "messi", "--password-stdin"], "surabaya\n");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(scene.fails(&["send", "siapa", "halo"], 1), "user tujuan tidak ditemukan");
    assert_eq!(scene.fails(&["send", "--group", "group9", "halo"], 1), "group tujuan tidak ditemukan");
    assert_eq!(scene.fails(&["get", "messi", "apa.txt"], 1), "file tidak ditemukan");
    assert!(scene.fails(&["send", "messi"], 2).contains("nothing to send"));
    assert!(scene.fails(&["send", "messi", "dua\nbaris"], 2).contains("one line"));
    assert!(scene.fails(&["send", "dua kata", "halo"], 2).contains("no blanks"));
    assert!(scene.fails(&["send-file", "messi", "tidak-ada"], 2).contains("tidak-ada: No such file"));
    assert!(scene.fails(&["send-file", "messi", "."], 2).contains("directory"));
    assert!(scene.fails(&["inbox", "--profile", "../lain"], 2).contains("letters"));
    assert!(scene.fails(&["chat"], 2).contains("terminal"));
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let output = scene.run_with(&["login", "messi", "--password-stdin", "--server", &address], "surabaya\n");
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).starts_with(&format!("kurir: no connection to {address}: ")));
    assert!(scene.fails(&["login", "messi", "--server", "tanpa-port"], 2).contains("host and a port"));
    scene.does(&["logout"]);
    assert_eq!(scene.fails(&["files"], 2), "nobody is logged in; see `kurir login`");
}

#[test]
fn a_login_is_kept_for_its_owner_alone_and_ends_with_the_password() {
    let scene = Scene::new(&[]);
    scene.log_in(&["messi", "henderson"]);
    let logins = scene.path("state/kurir/logins");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&logins), mode(&logins.join("messi.json"))), (0o700, 0o600));
    assert!(!fs::read_to_string(logins.join("messi.json")).unwrap().contains("surabaya"));
    let output = scene.run_with(&["passwd", "--password-stdin", "--profile", "messi"], "salah123\nmalang-raya\n");
    assert_eq!(output.status.code(), Some(1));
    let (mut other, _) = scene.server.login("messi");
    let output = scene.run_with(&["passwd", "--password-stdin", "--profile", "messi"], "surabaya\nmalang-raya\n");
    assert_eq!(output.status.code(), Some(0));
    other.login("messi", "surabaya").unwrap_err();
    scene.does(&["files", "--profile", "messi"]);
    // Another login changes it again, which ends this one.
    other.login("messi", "malang-raya").unwrap();
    other.change_password("malang-raya", "surabaya").unwrap();
    assert!(scene.fails(&["files", "--profile", "messi"], 1).contains("see `kurir login`"));
    let output = scene.run_with(&["register", "pele", "--password-stdin", "--profile", "baru"], "santos12\n");
    assert_eq!(output.status.code(), Some(0));
    scene.does(&["send", "messi", "halo", "--profile", "baru"]);
}

#[test]
fn files_go_both_ways_whole_and_replace_nothing_unasked() {
    let scene = Scene::new(&[]);
    scene.log_in(&["messi", "henderson"]);
    let large = content(3_000_001);
    fs::create_dir_all(scene.path("work")).unwrap();
    fs::write(scene.path("work/foto kita.jpg"), &large).unwrap();
    fs::write(scene.path("work/kosong"), "").unwrap();
    let sent = scene.run(&["send-file", "--profile", "messi", "henderson", "foto kita.jpg", "kosong"]);
    let said = (sent.status.code(), text(&sent.stdout), text(&sent.stderr));
    assert_eq!(said, (Some(0), "", "kurir: foto kita.jpg is sent as foto_kita.jpg\n"));
    scene.does(&["send-file", "--profile", "messi", "--group", "group1", "kosong"]);
    fs::write(scene.path("work/foto_kita.jpg"), "").unwrap();
    let twice = ["send-file", "--profile", "messi", "henderson", "foto kita.jpg", "foto_kita.jpg"];
    assert!(scene.fails(&twice, 2).contains("would replace another"));
    fs::remove_file(scene.path("work/foto_kita.jpg")).unwrap();
    assert!(scene.fails(&["send-file", "--profile", "messi", "henderson", "/dev/zero"], 2).contains("ordinary"));
    assert_eq!(scene.does(&["files", "--profile", "henderson"]), "messi foto_kita.jpg\nmessi kosong\n");
    let files: Value = serde_json::from_str(&scene.does(&["files", "--json", "--profile", "messi"])).unwrap();
    assert_eq!(files, serde_json::json!({ "group1": ["kosong"], "henderson": ["foto_kita.jpg", "kosong"] }));

    let get = |more: &[&str]| -> Vec<String> {
        let all = [&["get", "--profile", "henderson", "messi", "foto_kita.jpg"], more].concat();
        all.into_iter().map(ToOwned::to_owned).collect()
    };
    let arguments =
        |all: &[String]| scene.command(&all.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
    assert_eq!(arguments(&get(&[])).status.code(), Some(0));
    assert!(fs::read(scene.path("work/foto_kita.jpg")).unwrap() == large);
    fs::write(scene.path("work/foto_kita.jpg"), "mine").unwrap();
    let refused = arguments(&get(&[]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("there already"));
    assert_eq!(fs::read(scene.path("work/foto_kita.jpg")).unwrap(), b"mine");
    assert_eq!(arguments(&get(&["--force"])).status.code(), Some(0));
    assert!(fs::read(scene.path("work/foto_kita.jpg")).unwrap() == large);
    assert!(arguments(&get(&["-o", "-"])).stdout == large);
    fs::create_dir(scene.path("work/map")).unwrap();
    assert_eq!(arguments(&get(&["-o", "map"])).status.code(), Some(0));
    assert!(fs::read(scene.path("work/map/foto_kita.jpg")).unwrap() == large);
    scene.does(&["get", "--profile", "henderson", "messi", "kosong", "-o", "lain"]);
    assert_eq!(fs::read(scene.path("work/lain")).unwrap(), b"");
    scene.does(&["delete-file", "--profile", "henderson", "messi", "kosong"]);
    assert_eq!(scene.does(&["files", "--profile", "henderson"]), "messi foto_kita.jpg\n");
    let parts = fs::read_dir(scene.path("work")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(parts.into_iter().all(|name| !name.to_string_lossy().starts_with('.')), "nothing half is left");
}

#[test]
fn a_refusal_that_comes_early_ends_the_sending() {
    let scene = Scene::new(&["--file-bytes-max", "1MiB"]);
    scene.log_in(&["messi"]);
    fs::create_dir_all(scene.path("work")).unwrap();
    fs::write(scene.path("work/besar"), vec![7; 200_000_000]).unwrap();
    let refused = scene.fails(&["send-file", "--profile", "messi", "messi", "besar"], 1);
    assert_eq!(refused, "file terlalu besar: maksimum 1048576 byte");

    // The connection can still be used.
    let (mut client, token) = scene.server.login("messi");
    client.set_token(&token);
    let mut sent = 0;
    let mut large = std::io::repeat(7).take(200_000_000);
    let refused = client.send_file(Target::User("messi"), "besar", &mut large, &mut |bytes| sent = bytes);
    assert!(matches!(refused, Err(ClientError::Refused(_))), "{refused:?}");
    assert!(sent < 100_000_000, "{sent} bytes were sent for nothing");
    client.send_message(Target::User("messi"), "halo").unwrap();
}

#[test]
fn a_download_that_breaks_off_leaves_nothing_behind() {
    let scene = Scene::new(&[]);
    scene.log_in(&["messi"]);
    fs::create_dir_all(scene.path("work")).unwrap();
    fs::write(scene.path("work/besar"), content(20_000_000)).unwrap();
    scene.does(&["send-file", "--profile", "messi", "messi", "besar"]);
    // A server that sends a part and then hangs up, or nothing more.
    let half = format!("{{\"status\":\"OK\",\"nama file\":\"x\",\"data\":\"{}", "QUJD".repeat(100_000));
    for (end, code) in [("", 3), ("\"}\r\n", 3), ("!!!!\"}\r\n\r\n", 3)] {
        let (address, server) = pretend(&[half.clone() + end]);
        let login = format!(r#"{{"server":"{address}","user":"messi","token":"{}"}}"#, "0".repeat(32));
        fs::write(scene.path("state/kurir/logins/lain.json"), login).unwrap();
        scene.fails(&["get", "--profile", "lain", "messi", "x"], code);
        server.join().unwrap();
        assert!(!scene.path("work/x").exists());
    }
    // Nor does an interrupt.
    let mut child = scene.command(&["get", "--profile", "messi", "messi", "besar", "-o", "pipa"]).spawn().unwrap();
    signal(&child, Signal::INT);
    child.wait().unwrap();
    let left: Vec<_> = fs::read_dir(scene.path("work")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "besar" || name == "pipa"), "{left:?}");
}

/// A server that answers the first line of a connection with this, and hangs up.
fn pretend(replies: &[String]) -> (SocketAddr, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, replies) = (listener.local_addr().unwrap(), replies.to_vec());
    let server = thread::spawn(move || {
        for reply in replies {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            reader.read_line(&mut String::new()).unwrap();
            reader.into_inner().write_all(reply.as_bytes()).unwrap();
        }
    });
    (address, server)
}

#[test]
fn a_file_of_any_size_moves_in_little_memory() {
    const BYTES: u64 = 100_000_000;
    const KIB_MAX: u64 = 40_000;
    let scene = Scene::new(&[]);
    scene.log_in(&["messi"]);
    fs::create_dir_all(scene.path("work")).unwrap();
    fs::File::create(scene.path("work/besar")).unwrap().set_len(BYTES).unwrap();
    let up: &[&str] = &["send-file", "--profile", "messi", "messi", "besar"];
    let down: &[&str] = &["get", "--profile", "messi", "messi", "besar", "-o", "lagi"];
    for arguments in [up, down] {
        let mut child = scene.command(arguments).stdout(Stdio::null()).spawn().unwrap();
        let mut peak = 0;
        let end = Instant::now() + Duration::from_secs(120);
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "{arguments:?} takes for ever");
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let high = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            peak = high.map_or(peak, |high| high.trim().trim_end_matches(" kB").parse().unwrap());
            thread::sleep(Duration::from_millis(5));
        }
        assert!(child.wait().unwrap().success());
        assert!((1..KIB_MAX).contains(&peak), "{peak} KiB for {arguments:?}");
    }
    assert_eq!(fs::metadata(scene.path("work/lagi")).unwrap().len(), BYTES);
}

#[test]
fn groups_are_made_joined_and_left() {
    let scene = Scene::new(&[]);
    scene.log_in(&["messi", "henderson", "lineker"]);
    let secret = scene.run_with(&["group", "create", "tim", "--secret-stdin", "--profile", "messi"], "sandi-tim\n");
    assert_eq!(secret.status.code(), Some(0));
    assert_eq!(scene.fails(&["group", "join", "tim", "--profile", "henderson"], 1), "sandi group salah");
    let joined = scene.run_with(&["group", "join", "tim", "--secret-stdin", "--profile", "henderson"], "sandi-tim\n");
    assert_eq!(joined.status.code(), Some(0));
    scene.does(&["group", "add", "tim", "lineker", "--profile", "messi"]);
    let listed = scene.does(&["group", "list", "--profile", "lineker"]);
    assert_eq!(listed, "group1: messi, henderson, lineker\ntim: messi, henderson, lineker\n");
    scene.does(&["group", "remove", "tim", "lineker", "--profile", "messi"]);
    scene.does(&["group", "leave", "tim", "--profile", "messi"]);
    assert_eq!(scene.does(&["group", "list", "--profile", "henderson"]).lines().nth(1), Some("tim: henderson"));
    let all = scene.does(&["group", "list", "--data", scene.path("data").to_str().unwrap()]);
    assert_eq!(all, "group1: messi, henderson, lineker\ntim: henderson\n");
}

#[test]
fn bench_measures_each_mix_with_users_of_its_own() {
    let scene = Scene::new(&[]);
    let small = ["--seconds", "0.3", "--warm-up", "0", "--users", "2", "--connections", "4", "--pipeline", "4"];
    for mix in ["send", "send=3,inbox=1", "group:3", "file"] {
        let printed = scene.does(&[&["bench", "--json", "--mix", mix][..], &small].concat());
        let report: Value = serde_json::from_str(&printed).unwrap();
        assert!(report["requests"].as_u64().unwrap() > 10 && report["refused"] == 0, "{mix}: {report}");
        assert!(report["latency_us"]["p99"].as_f64().unwrap() > 0.0, "{mix}: {report}");
    }
    let printed = scene.does(&[&["bench", "--threads", "2", "--rate", "200"][..], &small].concat());
    assert!(printed.contains("requests a second") && printed.contains("p99.9"), "{printed}");
    assert!(scene.fails(&["bench", "--connections", "0"], 2).contains("at least 1"));
    assert!(scene.fails(&["bench", "--mix", "apa"], 2).contains("send=9,inbox=1"));
    let closed = Scene::new(&["--registration", "closed"]);
    assert!(closed.fails(&["bench"], 1).contains("pendaftaran ditutup"));
    // What it is told is refused is not counted as done.
    let full = Scene::new(&["--mailbox-messages-max", "10"]);
    let printed = full.does(&[&["bench", "--json"][..], &small].concat());
    let report: Value = serde_json::from_str(&printed).unwrap();
    assert!(report["refused"].as_u64().unwrap() > 10, "{report}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let scene = Scene::new(&[]);
    for shell in ["bash", "zsh", "fish"] {
        let script = scene.does(&["completions", shell]);
        assert!(["send-file", "inbox", "serve", "backup"].iter().all(|command| script.contains(command)), "{shell}");
    }
    let pages = scene.path("work");
    scene.does(&["man", pages.to_str().unwrap()]);
    for page in ["kurir.1", "kurir-chat.1", "kurir-send-file.1", "kurir-group-join.1", "kurir-serve.1"] {
        assert!(fs::read_to_string(pages.join(page)).unwrap().contains(".TH"), "{page}");
    }
    assert!(scene.fails(&["man", "tidak/ada"], 2).contains("No such file"));
}

#[test]
fn what_is_no_reply_is_not_taken_for_one() {
    let ask = |reply: &str| {
        let (address, server) = pretend(&[reply.to_owned()]);
        let mut client = Client::connect(address).unwrap();
        assert!(matches!(client.inbox(), Err(ClientError::Invalid(_))), "nobody is logged in");
        client.set_token(&"0".repeat(32));
        let asked = client.inbox();
        server.join().unwrap();
        asked
    };
    assert!(matches!(ask("HTTP/1.1 400 Bad Request\r\n\r\n"), Err(ClientError::NotAReply)));
    assert!(matches!(ask("{\"status\":\"OK\"}\r\n\r\n"), Err(ClientError::NotAReply)));
    assert!(matches!(ask("{\"status\":\"OK\",\"data\":{}"), Err(ClientError::Io(_))));
    let empty = ask("{\"status\":\"OK\",\"data\":{}}\r\n\r\n").unwrap();
    assert!(empty.is_empty());
}
