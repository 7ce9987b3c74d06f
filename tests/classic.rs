//! The clients that existed before: a stand-in for each, which sends what it sends and reads as it reads.
//!
//! Both write a request with a blank before its line end, and read 64 bytes at a time until what they have ends in an empty
//! line. The one for a terminal makes a connection for each request; the one with windows keeps one and asks for new
//! messages again and again.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::process::Server;
use serde_json::{Value, json};

/// Sends a request byte by byte, as a slow link would, and reads the answer as both clients do.
fn ask(stream: &mut TcpStream, request: &str, is_slow: bool) -> Value {
    let line = format!("{request} \r\n");
    if is_slow {
        line.bytes().for_each(|byte| stream.write_all(&[byte]).unwrap());
    } else {
        stream.write_all(line.as_bytes()).unwrap();
    }
    let mut received = Vec::new();
    while !received.ends_with(b"\r\n\r\n") {
        let mut some = [0; 64];
        let count = stream.read(&mut some).unwrap();
        assert!(count > 0, "hung up after {} bytes", received.len());
        received.extend_from_slice(&some[..count]);
    }
    serde_json::from_slice(&received).unwrap()
}

/// The client in a terminal.
struct TerminalClient<'s> {
    server: &'s Server,
    token: String,
}

impl TerminalClient<'_> {
    fn ask(&self, request: &str) -> Value {
        ask(&mut self.server.connect(), request, true)
    }

    /// What it prints for the line that a person types.
    fn command(&mut self, typed: &str) -> String {
        let words: Vec<&str> = typed.split(' ').collect();
        let token = self.token.clone();
        let said = |reply: &Value| match reply["status"].as_str() {
            Some("OK") => reply["message"].as_str().unwrap_or_default().to_owned(),
            _ => format!("Error, {}", reply["message"].as_str().unwrap()),
        };
        match words.as_slice() {
            [verb, ..] if *verb != "auth" && token.is_empty() => "Error, not authorized".to_owned(),
            ["auth", user, password] => {
                let reply = self.ask(&format!("auth {user} {password}"));
                if reply["status"] != "OK" {
                    return format!("Error, {}", reply["message"].as_str().unwrap());
                }
                reply["tokenid"].as_str().unwrap().clone_into(&mut self.token);
                format!("username {user} logged in")
            }
            // A message is put together word by word, each with a blank behind it.
            [verb @ ("send" | "send_group"), to, text @ ..] => {
                let message: String = text.iter().map(|word| format!(" {word}")).collect();
                said(&self.ask(&format!("{verb} {token} {to} {message}")))
            }
            [verb @ ("send_file" | "send_group_file"), to, name, content] => {
                said(&self.ask(&format!("{verb} {token} {to} {name} {}", STANDARD.encode(content))))
            }
            ["inbox"] => self.ask(&format!("inbox {token}"))["messages"].to_string(),
            ["my_file"] => self.ask(&format!("my_file {token}"))["messages"].to_string(),
            ["download_file", party, name] => {
                let reply = self.ask(&format!("download_file {token} {party} {name}"));
                if reply["status"] != "OK" {
                    return format!("Error, {}", reply["message"].as_str().unwrap());
                }
                assert!(reply["messages"].is_string());
                let content = STANDARD.decode(reply["data"].as_str().unwrap()).unwrap();
                format!("{}: {}", reply["filename"].as_str().unwrap(), String::from_utf8(content).unwrap())
            }
            _ => panic!("it has no such command"),
        }
    }
}

#[test]
fn the_terminal_client_works_unchanged() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    let client = || TerminalClient { server: &server, token: String::new() };
    let (mut messi, mut henderson, mut lineker) = (client(), client(), client());
    assert_eq!(messi.command("auth messi salahsalah"), "Error, Password Salah");
    assert_eq!(messi.command("send henderson halo"), "Error, not authorized");
    for (user, name) in [(&mut messi, "messi"), (&mut henderson, "henderson"), (&mut lineker, "lineker")] {
        assert_eq!(user.command(&format!("auth {name} surabaya")), format!("username {name} logged in"));
    }
    assert!(!messi.command("send henderson hello gimana kabarnya").starts_with("Error"));
    assert!(!messi.command("send_group group1 halo semua").starts_with("Error"));
    assert!(messi.command("send nobody halo").starts_with("Error, "));
    let inbox: Value = serde_json::from_str(&henderson.command("inbox")).unwrap();
    let message = |to: &str, text: &str| json!({ "msg_from": "messi", "msg_to": to, "msg": text });
    assert_eq!(
        inbox,
        json!({ "messi": [message("henderson", "hello gimana kabarnya")], "group1": [message("group1", "halo semua")] })
    );
    assert_eq!(henderson.command("inbox"), "{}", "what was given is not given again");
    assert!(!messi.command("send_file henderson catatan.txt isi").starts_with("Error"));
    assert!(!messi.command("send_group_file group1 semua.txt untuk-semua").starts_with("Error"));
    let files: Value = serde_json::from_str(&henderson.command("my_file")).unwrap();
    assert_eq!(files, json!({ "messi": ["catatan.txt", "semua.txt"] }));
    let files: Value = serde_json::from_str(&messi.command("my_file")).unwrap();
    assert_eq!(files, json!({ "henderson": ["catatan.txt"], "group1": ["semua.txt"] }));
    assert_eq!(henderson.command("download_file messi catatan.txt"), "catatan.txt: isi");
    assert_eq!(messi.command("download_file henderson catatan.txt"), "catatan.txt: isi");
    assert_eq!(lineker.command("download_file messi semua.txt"), "semua.txt: untuk-semua");
    assert_eq!(lineker.command("download_file messi catatan.txt"), "Error, file tidak ditemukan");
    server.stop();
}

/// The client with windows: it keeps its connection.
struct WindowClient {
    stream: TcpStream,
    token: String,
}

impl WindowClient {
    /// Any text but two is taken for success.
    fn log_in(server: &Server, user: &str, password: &str) -> Result<Self, String> {
        let mut stream = server.connect();
        let reply = ask(&mut stream, &format!("auth {user} {password}"), false);
        if let Some(failed @ ("User Tidak Ada" | "Password Salah")) = reply["message"].as_str() {
            return Err(failed.to_owned());
        }
        Ok(Self { stream, token: reply["tokenid"].as_str().unwrap().to_owned() })
    }

    fn ask(&mut self, verb: &str, rest: &str) -> Value {
        let request = format!("{verb} {}{rest}", self.token);
        ask(&mut self.stream, &request, false)
    }

    /// What its timer does once a second: the new lines of the chat window.
    fn poll(&mut self) -> Vec<String> {
        let reply = self.ask("inbox", "");
        assert_eq!(reply["status"], "OK");
        let parties = reply["messages"].as_object().unwrap();
        let messages = parties.values().flat_map(|messages| messages.as_array().unwrap());
        let line = |message: &Value| {
            format!("{}: {}", message["msg_from"].as_str().unwrap(), message["msg"].as_str().unwrap())
        };
        messages.map(line).collect()
    }
}

#[test]
fn the_window_client_works_unchanged() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::demo(data.path(), &[]);
    for (user, password) in [("messi", "salahsalah"), ("siapa", "surabaya")] {
        assert_eq!(WindowClient::log_in(&server, user, password).err().as_deref(), Some("Password Salah"));
    }
    let mut messi = WindowClient::log_in(&server, "messi", "surabaya").unwrap();
    let mut henderson = WindowClient::log_in(&server, "henderson", "surabaya").unwrap();
    for number in 0..20 {
        let reply = messi.ask("send", &format!(" henderson  pesan nomor {number}"));
        assert!(reply["status"] == "OK" && reply["message"].is_string(), "{reply}");
        assert_eq!(henderson.poll(), [format!("messi: pesan nomor {number}")]);
        assert_eq!(henderson.poll(), [""; 0]);
    }
    // A file of many reads, each of 64 bytes.
    let content: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    let reply = messi.ask("send_file", &format!(" henderson besar.bin {}", STANDARD.encode(&content)));
    assert_eq!(reply["status"], "OK", "{reply}");
    assert_eq!(henderson.ask("my_file", "")["messages"], json!({ "messi": ["besar.bin"] }));
    let reply = henderson.ask("download_file", " messi besar.bin");
    assert_eq!((reply["filename"].as_str(), reply["status"].as_str()), (Some("besar.bin"), Some("OK")));
    assert!(STANDARD.decode(reply["data"].as_str().unwrap()).unwrap() == content);
    let refused = henderson.ask("send_group", " group9  halo");
    assert_eq!(
        (refused["status"].as_str(), refused["message"].as_str()),
        (Some("ERROR"), Some("group tujuan tidak ditemukan"))
    );
    server.stop();
}
