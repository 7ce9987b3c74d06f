//! `kurir user` and `kurir group`, while the server runs and while it does not.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Output, Stdio};

use common::process::{Server, kurir, output, text};
use kurir::client::ClientError;

fn with_input(arguments: &[&str], input: &str) -> Output {
    let mut child = kurir(arguments).stdin(Stdio::piped()).spawn().unwrap();
    // A command whose other arguments are wrong does not wait for its input.
    match child.stdin.take().unwrap().write_all(input.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => panic!("{error}"),
        _ => {}
    }
    child.wait_with_output().unwrap()
}

/// Exit code and what was said on standard error.
fn said(output: &Output) -> (i32, &str) {
    (output.status.code().unwrap(), text(&output.stderr).trim_end())
}

/// Every command, in an order in which each sees what those before it did.
fn administer(data: &Path) {
    let data = data.to_str().unwrap();
    let add = |name: &str, password: &str| {
        with_input(&["user", "add", name, "--password-stdin", "--data", data], &format!("{password}\n"))
    };
    assert_eq!(said(&add("pele", "santos12")), (0, ""));
    assert_eq!(said(&add("pele", "santos12")), (1, "kurir: this name is taken"));
    assert_eq!(said(&add("zico", "short")), (1, "kurir: a password is 8 to 128 bytes without a blank"));
    assert_eq!(said(&add("zico", "two words")), (2, "kurir: a password has no blanks and no control characters"));
    assert_eq!(said(&add("zi co", "santos12")), (2, "kurir: a user name has no blanks and no control characters"));
    assert_eq!(said(&add("zico", "")), (2, "kurir: a password may not be empty"));
    let refused = add("zi/co", "santos12");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).starts_with("kurir: a name is"));

    let listed = output(&["user", "list", "--data", data]);
    assert_eq!(text(&listed.stdout), "henderson\nlineker\nmessi\npele\n");
    let groups = output(&["group", "list", "--data", data]);
    assert_eq!(text(&groups.stdout), "group1: messi, henderson, lineker\n");

    let change = ["user", "password", "pele", "--password-stdin", "--data", data];
    assert_eq!(said(&with_input(&change, "cosmos77")), (0, ""));
    let change = ["user", "password", "zico", "--password-stdin", "--data", data];
    assert_eq!(said(&with_input(&change, "cosmos77")), (1, "kurir: there is no such user"));
    assert_eq!(said(&output(&["user", "remove", "henderson", "--data", data])), (0, ""));
    assert_eq!(said(&output(&["user", "remove", "henderson", "--data", data])), (1, "kurir: there is no such user"));
}

#[test]
fn accounts_are_kept_while_the_server_runs() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    administer(data.path());
    server.client().request("AUTH pele cosmos77").unwrap();
    server.client().request("AUTH henderson surabaya").unwrap_err();
}

#[test]
fn accounts_are_kept_while_no_server_runs() {
    let data = tempfile::tempdir().unwrap();
    Server::demo(data.path(), &[]).stop();
    administer(data.path());
    // The demonstration's own accounts come back with the demonstration.
    let server = Server::demo(data.path(), &[]);
    server.client().request("AUTH pele cosmos77").unwrap();
    server.client().request("AUTH henderson surabaya").unwrap();
    // As after a power cut: nothing listens on the socket that is left.
    server.kill();
    assert!(data.path().join("admin.sock").exists());
    assert_eq!(
        text(&output(&["user", "list", "--data", data.path().to_str().unwrap()]).stdout),
        "henderson\nlineker\nmessi\npele\n"
    );
}

#[test]
fn the_first_account_may_come_before_the_first_start() {
    let data = tempfile::tempdir().unwrap();
    let root = data.path().join("data");
    let path = root.to_str().unwrap();
    for command in [&["user", "list"][..], &["group", "list"], &["user", "remove", "pele"]] {
        let refused = output(&[command, &["--data", path]].concat());
        assert_eq!(said(&refused), (2, format!("kurir: there is no data directory at {path}").as_str()));
    }
    assert!(!root.exists());
    let added = with_input(&["user", "add", "pele", "--password-stdin", "--data", path], "santos12\n");
    assert_eq!(said(&added), (0, ""));
    let server = Server::start(kurir(&["serve", "--listen", "127.0.0.1:0", "--data", path]), 1);
    server.client().request("AUTH pele santos12").unwrap();
    let refused = server.client().request("REGISTER zico santos12").unwrap_err();
    assert_eq!(refused.to_string(), "pendaftaran ditutup");
}

#[test]
fn a_password_is_not_asked_for_where_nobody_can_answer() {
    let data = tempfile::tempdir().unwrap();
    let refused = output(&["user", "add", "pele", "--data", data.path().to_str().unwrap()]);
    let expected = "kurir: no password: there is no terminal to ask on; use --password-stdin";
    assert_eq!(said(&refused), (2, expected));
}

#[test]
fn help_is_there_for_every_command() {
    for command in [
        &["--help"][..],
        &["serve", "--help"],
        &["user", "--help"],
        &["user", "add", "--help"],
        &["group", "list", "--help"],
    ] {
        let help = output(command);
        assert!(help.status.success() && !help.stdout.is_empty(), "{command:?}");
    }
    let help = output(&["serve", "--help"]);
    for flag in
        ["--listen", "--data", "--registration", "--registrations-per-minute-max", "--log", "--mailbox-messages-max"]
    {
        assert!(text(&help.stdout).contains(flag), "{flag}");
    }
}

#[test]
fn a_check_says_what_there_is_and_what_is_wrong_and_a_repair_keeps_the_rest() {
    let data = tempfile::tempdir().unwrap();
    let root = data.path().join("data");
    let path = root.to_str().unwrap();
    let missing = format!("kurir: there is no data directory at {path}");
    assert_eq!(said(&output(&["check", path])), (2, missing.as_str()));

    let server = Server::demo(&root, &[]);
    let (mut messi, token) = server.login("messi");
    for text in ["satu", "dua", "tiga"] {
        messi.request(&format!("SEND MESSAGE {token} henderson {text}")).unwrap();
    }
    messi.request(&format!("SEND FILE {token} henderson kecil.txt QUJD")).unwrap();
    for name in ["besar.bin", "hilang.bin", "utuh.bin"] {
        messi.request(&format!("SEND FILE {token} henderson {name} {}", "QUJD".repeat(10_000))).unwrap();
    }
    let in_use = output(&["check", path]);
    assert_eq!(in_use.status.code(), Some(2));
    assert!(text(&in_use.stderr).contains("is in use"));
    server.stop();

    let good = output(&["check", path]);
    assert_eq!(said(&good), (0, ""));
    let report = text(&good.stdout);
    for part in ["3 users with 1 logins, 1 groups", "3 messages waiting, 144 bytes", "4 files, 90003 bytes"] {
        assert!(report.contains(part), "{report}");
    }

    let journal = root.join("journal/0000000001.log");
    let mut bytes = fs::read(&journal).unwrap();
    let damaged = bytes.windows(3).position(|window| window == b"dua").unwrap();
    bytes[damaged] ^= 1;
    fs::write(&journal, &bytes).unwrap();
    let found = output(&["check", path]);
    assert_eq!(said(&found), (1, "kurir: the data directory is damaged"));
    assert!(text(&found.stdout).contains("0000000001.log byte "), "{}", text(&found.stdout));
    assert!(text(&found.stdout).contains("perhaps a message from messi to henderson"));
    assert_eq!(fs::read(&journal).unwrap(), bytes, "a check changes nothing");

    let repaired = output(&["check", path, "--repair"]);
    assert_eq!(said(&repaired), (0, ""));
    assert!(text(&repaired.stdout).contains("dropped: "), "{}", text(&repaired.stdout));
    assert_eq!(fs::read(root.join("journal/0000000001.log.damaged-1")).unwrap(), bytes);
    assert_eq!(said(&output(&["check", path])), (0, ""));
    let server = Server::demo(&root, &[]);
    let (mut henderson, token) = server.login("henderson");
    let inbox = henderson.request(&format!("INBOX {token}")).unwrap();
    let messages = inbox["data"]["messi"].as_array().unwrap();
    let texts: Vec<&str> = messages.iter().map(|message| message["pesan"].as_str().unwrap()).collect();
    assert_eq!(texts, ["satu", "tiga"]);
    server.stop();

    // A byte of a stored file that is another one is found too, and files that are not whole are listed no more.
    let mut stored = fs::read(root.join("files/01/0000000000000001")).unwrap();
    stored[17] ^= 1;
    fs::write(root.join("files/01/0000000000000001"), &stored).unwrap();
    fs::remove_file(root.join("files/02/0000000000000002")).unwrap();
    let found = output(&["check", path]);
    assert_eq!(found.status.code(), Some(1));
    assert!(text(&found.stdout).contains("which is missing"), "{}", text(&found.stdout));
    assert!(text(&found.stdout).contains("which are not those that were stored"), "{}", text(&found.stdout));
    let server = Server::demo(&root, &[]);
    let (mut henderson, token) = server.login("henderson");
    let refused = henderson.request(&format!("DOWNLOAD FILE {token} messi hilang.bin")).unwrap_err();
    assert_eq!(refused.to_string(), "file tidak ditemukan");
    // What was begun and is not what was stored never gets its end.
    let mut cut = server.client();
    assert!(matches!(cut.request(&format!("DOWNLOAD FILE {token} messi besar.bin")), Err(ClientError::Io(_))));
    server.stop();

    assert_eq!(said(&output(&["check", path, "--repair"])), (0, ""));
    assert_eq!(said(&output(&["check", path])), (0, ""));
    assert_eq!(fs::read(root.join("lost-files/0000000000000001")).unwrap(), stored);
    let server = Server::demo(&root, &[]);
    let (mut henderson, token) = server.login("henderson");
    let files = henderson.request(&format!("MY FILE {token}")).unwrap();
    assert_eq!(files["data"]["messi"], serde_json::json!(["kecil.txt", "utuh.bin"]));
    for name in ["kecil.txt", "utuh.bin"] {
        henderson.request(&format!("DOWNLOAD FILE {token} messi {name}")).unwrap();
    }
}
