//! How many messages a second are read: fills mailboxes, or lists of Redis, with texts of 100 bytes, and then times how they
//! are emptied, 100 at once, several requests ahead on each connection. Prints messages a second.
//!
//!     inbox kurir|redis HOST:PORT
//!
//! The server must give 100 messages at once (`--inbox-messages-max 100`), and let strangers make accounts (`--demo`).

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::env;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use kurir::client::Client;
use memchr::memmem;

const READERS: usize = 10;
/// Of each reader at once: few enough for all to be in the server's memory, as what has just come is.
const MESSAGES: usize = 8_000;
const CYCLES: usize = 40;
const AT_ONCE: usize = 100;
/// Requests ahead on each connection.
const AHEAD: usize = 4;
const FILLED_AT_ONCE: usize = 500;
const PASSWORD: &str = "surabaya-bench";

struct Reader {
    stream: TcpStream,
    fill: Vec<u8>,
    read: Vec<u8>,
    /// What ends the answer to one of `fill`, and to one of `read`.
    ends: [&'static [u8]; 2],
    buffer: Vec<u8>,
}

impl Reader {
    fn kurir(server: &str, number: usize, text: &str) -> Self {
        let mut client = Client::connect(server).unwrap();
        let name = format!("inbox-{number}");
        client.register(&name, PASSWORD).unwrap();
        client.login(&name, PASSWORD).unwrap();
        let token = client.token();
        let fill = format!("SEND MESSAGE {token} {name} {text}\n");
        Self::new(server, fill, format!("INBOX {token}\n"), [b"\r\n\r\n", b"\r\n\r\n"])
    }

    fn redis(server: &str, number: usize, text: &str) -> Self {
        let list = format!("list{number:06}");
        let fill = format!("*3\r\n$5\r\nRPUSH\r\n${}\r\n{list}\r\n${}\r\n{text}\r\n", list.len(), text.len());
        let range = format!("*4\r\n$6\r\nLRANGE\r\n${}\r\n{list}\r\n$1\r\n0\r\n$2\r\n{}\r\n", list.len(), AT_ONCE - 1);
        let trim = format!("*4\r\n$5\r\nLTRIM\r\n${}\r\n{list}\r\n$3\r\n{AT_ONCE}\r\n$2\r\n-1\r\n", list.len());
        Self::new(server, fill, range + &trim, [b"\r\n", b"+OK\r\n"])
    }

    fn new(server: &str, fill: String, read: String, ends: [&'static [u8]; 2]) -> Self {
        let stream = TcpStream::connect(server).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, fill: fill.into_bytes(), read: read.into_bytes(), ends, buffer: vec![0; 1 << 20] }
    }

    /// Waits for so many answers, and says how many bytes they had.
    fn wait(&mut self, mut answers: usize, end: &[u8]) -> usize {
        let (mut bytes, mut kept) = (0, 0);
        while answers > 0 {
            let count = self.stream.read(&mut self.buffer[kept..]).unwrap();
            assert!(count > 0, "the server has ended the connection");
            bytes += count;
            let filled = kept + count;
            let mut last = 0;
            for at in memmem::find_iter(&self.buffer[..filled], end) {
                answers -= 1;
                last = at + end.len();
            }
            // An end may come in two parts.
            let begin = last.max(filled.saturating_sub(end.len() - 1));
            self.buffer.copy_within(begin..filled, 0);
            kept = filled - begin;
        }
        bytes
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [protocol, server] = arguments.as_slice() else { panic!("inbox kurir|redis HOST:PORT") };
    let text = "x".repeat(100);
    let reader = if protocol == "redis" { Reader::redis } else { Reader::kurir };
    let mut readers: Vec<Reader> = (0..READERS).map(|number| reader(server, number, &text)).collect();
    let (mut seconds, mut bytes) = (0.0, 0);
    for _ in 0..CYCLES {
        for reader in &mut readers {
            let lines = reader.fill.repeat(FILLED_AT_ONCE);
            for _ in 0..MESSAGES / FILLED_AT_ONCE {
                reader.stream.write_all(&lines).unwrap();
                reader.wait(FILLED_AT_ONCE, reader.ends[0]);
            }
        }
        let started = Instant::now();
        for _ in 0..MESSAGES / AT_ONCE / AHEAD {
            for reader in &mut readers {
                let requests = reader.read.repeat(AHEAD);
                reader.stream.write_all(&requests).unwrap();
            }
            for reader in &mut readers {
                bytes += reader.wait(AHEAD, reader.ends[1]);
            }
        }
        seconds += started.elapsed().as_secs_f64();
    }
    let messages = CYCLES * READERS * MESSAGES;
    assert!(bytes > messages * text.len(), "not every message came: {bytes} bytes");
    println!("{:.0}", messages as f64 / seconds);
}
