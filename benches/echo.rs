//! A bare loop that gives back each line, for comparison: what the sockets alone cost. `cargo run --release --example echo`

use std::io::{self, ErrorKind, Read, Write};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

const LISTENER: Token = Token(usize::MAX);

struct Connection {
    stream: TcpStream,
    pending: Vec<u8>,
}

fn main() -> io::Result<()> {
    let mut listener = TcpListener::bind("127.0.0.1:0".parse().map_err(io::Error::other)?)?;
    println!("listening on {}", listener.local_addr()?);
    let mut poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(1024);
    let mut connections: Slab<Connection> = Slab::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    let entry = connections.vacant_entry();
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    poll.registry().register(&mut stream, Token(entry.key()), interest)?;
                    entry.insert(Connection { stream, pending: Vec::new() });
                }
                continue;
            }
            let Token(at) = event.token();
            if connections.get_mut(at).is_some_and(|connection| serve(connection, &mut buffer).is_err()) {
                connections.remove(at);
            }
        }
    }
}

/// Gives back what came, whole lines together.
fn serve(connection: &mut Connection, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        match connection.stream.read(buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                connection.pending.extend_from_slice(&buffer[..count]);
                if count < buffer.len() {
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    let Some(end) = memchr::memrchr(b'\n', &connection.pending) else { return Ok(()) };
    let mut written = 0;
    while written <= end {
        match connection.stream.write(&connection.pending[written..=end]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    connection.pending.drain(..written);
    Ok(())
}
