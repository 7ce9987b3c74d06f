//! The engine with a few connections that send anything at all, in any pieces, and end or break off at any time. It must
//! not panic, and every reply is one JSON object and its terminator.
//!
//! Each operation is a byte: what is done, and on which connection; a send takes its length from the next byte.

#![no_main]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};

use kurir::change::FileId;
use kurir::connection::{ConnectionId, Peer};
use kurir::engine::{Completion, Engine, Job, Registration};
use kurir::files::{FileDone, FileJob, TransferId};
use kurir::limits::Limits;
use kurir::local::{Local, Workers};
use kurir::log::Log;
use kurir::password::PasswordDone;
use kurir::segment::Layout;
use kurir::state::State;
use kurir::upkeep::Holdings;
use libfuzzer_sys::fuzz_target;

const CONNECTIONS: usize = 4;
const END: &[u8] = b"\r\n\r\n";

#[derive(Default)]
struct Memory {
    uploads: HashMap<TransferId, Vec<u8>>,
    files: HashMap<FileId, Vec<u8>>,
}

impl Workers for Memory {
    type Error = Infallible;

    fn run(&mut self, job: Job, mut report: impl FnMut(Completion)) -> Result<(), Infallible> {
        match job {
            Job::Journal(batch) => {
                let synced = batch.end();
                report(Completion::Settled { batch, synced });
            }
            Job::Password(job) => {
                let passed = job.check.is_none_or(|(password, hash)| hash == Some(password));
                report(Completion::Password(PasswordDone { connection: job.connection, passed, hash: job.hash }));
            }
            Job::File(FileJob::Append(transfer, mut block)) => {
                self.uploads.entry(transfer).or_default().append(&mut block);
                report(Completion::File(FileDone::Appended(transfer, block)));
            }
            Job::File(FileJob::Store(transfer, file)) => {
                let content = self.uploads.remove(&transfer).expect("what is stored was begun");
                let sum = crc32c::crc32c(&content);
                assert!(self.files.insert(file, content).is_none(), "a file id was given twice");
                report(Completion::File(FileDone::Stored(transfer, sum)));
            }
            Job::File(FileJob::Read { transfer, file, offset, bytes }) => {
                let start = usize::try_from(offset).expect("small");
                let done = match self.files.get(&file).and_then(|content| content.get(start..start + bytes)) {
                    Some(block) => FileDone::Block(transfer, block.to_vec()),
                    None => FileDone::Unreadable(transfer, std::io::ErrorKind::NotFound.into()),
                };
                report(Completion::File(done));
            }
            // All is in memory, and there is no end of room.
            Job::Texts(_) | Job::Space(_) | Job::Compact(_) => unreachable!(),
            Job::File(FileJob::Forget(transfer)) => drop(self.uploads.remove(&transfer)),
            Job::File(FileJob::Remove(file)) => drop(self.files.remove(&file).expect("what is removed was stored")),
        }
        Ok(())
    }
}

fn check(output: &[u8]) {
    let mut rest = output;
    while !rest.is_empty() {
        let end = rest.windows(END.len()).position(|window| window == END).expect("a reply has its terminator");
        assert!(rest[..end].starts_with(br#"{"status":"#) && rest[..end].ends_with(b"}"));
        assert!(std::str::from_utf8(&rest[..end]).is_ok());
        // What JSON calls a control character is escaped, so a terminator cannot stand inside.
        assert!(rest[..end].iter().all(|byte| *byte >= 0x20));
        rest = &rest[end + END.len()..];
    }
}

fuzz_target!(|data: &[u8]| {
    let limits = Limits {
        line_bytes_max: 120,
        discard_bytes_max: 400,
        file_bytes_max: 300,
        small_file_bytes_max: 20,
        user_bytes_max: 700,
        mailbox_messages_max: 5,
        inbox_messages_max: 3,
        requests_per_turn_max: 3,
        read_bytes_per_turn_max: 64,
        bytes_per_turn_max: 100,
        output_bytes_high: 200,
        uploads_max: 2,
        ..Limits::default()
    };
    let registration = Registration { is_open: true, per_minute_max: 0 };
    let layout = Layout { salt: 0, segment_bytes: 16 * 1024 * 1024 };
    let log = Log::new(layout, layout.first());
    let state = State::new(layout.segment_bytes);
    let engine = Engine::new(limits, registration, state, log, Holdings::default());
    let mut local = Local::new(engine, Memory::default(), 1_767_225_600_000);
    let setup = local.open(Peer::Admin);
    for line in
        ["USER ADD messi surabaya", "USER ADD henderson surabaya", "AUTH messi surabaya", "AUTH henderson surabaya"]
    {
        let Ok(reply) = local.request(setup, line);
        assert!(reply.starts_with(br#"{"status":"OK""#));
    }
    // Tokens of an engine in memory are counted from 1, so that inputs can know them.
    let open = |local: &mut Local<Memory>| local.open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    let mut connections: Vec<ConnectionId> = (0..CONNECTIONS).map(|_| open(&mut local)).collect();
    let mut rest = data;
    while let Some((&operation, after)) = rest.split_first() {
        rest = after;
        let place = usize::from(operation) % CONNECTIONS;
        let id = connections[place];
        match operation / 4 % 16 {
            0 => local.end(id),
            1 => {
                local.break_off(id);
                connections[place] = open(&mut local);
            }
            2 => {
                let Ok(()) = local.turn();
            }
            3 => {
                let Ok(()) = local.settle();
            }
            _ => {
                let Some((&length, after)) = rest.split_first() else { break };
                let (bytes, after) = after.split_at(usize::from(length).min(after.len()));
                rest = after;
                local.send(id, bytes);
            }
        }
        if local.is_closed(id) {
            check(&local.received(id));
            connections[place] = open(&mut local);
        }
    }
    for id in connections {
        local.end(id);
        let Ok(()) = local.settle();
        check(&local.received(id));
    }
});
