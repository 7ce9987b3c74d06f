//! The engine with a few connections that send anything at all, in any pieces, read as little as they like, are late, and end
//! or break off at any time. It must not panic, every reply is one JSON object and its terminator, and every count that it
//! keeps is what it counts.
//!
//! Each operation is a byte: what is done, and on which connection; some take a length or a number from the next byte.

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
use kurir::password::{PasswordDone, PasswordJob};
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
    /// Password jobs wait here while this is set.
    held: Option<Vec<PasswordJob>>,
}

fn checked(job: PasswordJob) -> Completion {
    let passed = job.check.is_none_or(|(password, hash)| hash == Some(password));
    Completion::Password(PasswordDone { connection: job.connection, passed, hash: job.hash })
}

impl Workers for Memory {
    type Error = Infallible;

    fn run(&mut self, job: Job, mut report: impl FnMut(Completion)) -> Result<(), Infallible> {
        match job {
            Job::Journal(batch) => {
                let synced = batch.end();
                report(Completion::Settled { batch, synced });
            }
            Job::Password(job) => match &mut self.held {
                Some(held) => held.push(job),
                None => report(checked(job)),
            },
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
            Job::File(FileJob::Forget(transfer)) => {
                self.uploads.remove(&transfer);
                report(Completion::File(FileDone::Forgotten(transfer)));
            }
            Job::File(FileJob::Remove(file)) => drop(self.files.remove(&file).expect("what is removed was stored")),
        }
        Ok(())
    }
}

/// What a peer has got of a connection that may have been closed in the middle.
fn check_start(output: &[u8]) {
    let whole = output.windows(END.len()).rposition(|window| window == END).map_or(0, |at| at + END.len());
    check(&output[..whole]);
    let rest = &output[whole..];
    assert!(rest.is_empty() || rest.starts_with(b"{\"status\":") || b"{\"status\":".starts_with(rest));
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
        transfers_per_user_max: 2,
        connections_per_address_max: 2,
        connections_bytes_max: 60_000,
        output_bytes_max: 2_000,
        idle_ms_max: 2_000,
        first_request_ms_max: 500,
        auth_ms_max: 1_000,
        line_ms_max: 300,
        output_ms_max: 300,
        linger_ms_max: 100,
        password_queue_max: 3,
        login_failures_max: 2,
        counted_max: 3,
        tokens_per_user_max: 2,
        users_max: 4,
        groups_max: 3,
        groups_per_user_max: 2,
        members_per_group_max: 3,
        listed_files_max: 4,
        ..Limits::default()
    };
    let registration = Registration::Open;
    let layout = Layout { salt: 0, segment_bytes: 16 * 1024 * 1024 };
    let log = Log::new(layout, layout.first());
    let state = State::new(layout.segment_bytes);
    let mut engine = Engine::new(limits, registration, state, log, Holdings::default());
    engine.set_ahead_users_min(0);
    let mut local = Local::new(engine, Memory::default(), 1_767_225_600_000);
    let setup = local.open(Peer::Admin);
    for line in
        ["USER ADD messi surabaya", "USER ADD henderson surabaya", "AUTH messi surabaya", "AUTH henderson surabaya"]
    {
        let Ok(reply) = local.request(setup, line);
        assert!(reply.starts_with(br#"{"status":"OK""#));
    }
    // Tokens of an engine in memory are counted from 1, so that inputs can know them.
    let open_from = |local: &mut Local<Memory>, address| local.open(Peer::Address(IpAddr::V4(address)));
    let open = |local: &mut Local<Memory>| open_from(local, Ipv4Addr::LOCALHOST);
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
            12 => {
                local.pass(20 * u64::from(rest.first().copied().unwrap_or(1)));
                rest = rest.get(1..).unwrap_or_default();
                let Ok(()) = local.turn();
            }
            13 => {
                local.set_output_room(id, 4 * usize::from(rest.first().copied().unwrap_or(0)));
                rest = rest.get(1..).unwrap_or_default();
            }
            14 => match local.workers.held.take() {
                None => local.workers.held = Some(Vec::new()),
                Some(held) => held.into_iter().for_each(|job| local.engine.complete(checked(job))),
            },
            15 => {
                local.break_off(id);
                connections[place] = open_from(&mut local, Ipv4Addr::new(192, 0, 2, operation % 2));
            }
            _ => {
                let Some((&length, after)) = rest.split_first() else { break };
                let (bytes, after) = after.split_at(usize::from(length).min(after.len()));
                rest = after;
                local.send(id, bytes);
            }
        }
        if local.is_closed(id) {
            check_start(&local.received(id));
            connections[place] = open(&mut local);
        }
        local.engine.assert_invariants();
    }
    for job in local.workers.held.take().into_iter().flatten() {
        local.engine.complete(checked(job));
    }
    for id in connections {
        local.set_output_room(id, usize::MAX);
        local.end(id);
        let Ok(()) = local.settle();
        check_start(&local.received(id));
    }
    // Whoever has not gone by now is late.
    for _ in 0..10 {
        local.pass(10_000);
        let Ok(()) = local.turn();
        let Ok(()) = local.settle();
    }
    local.engine.assert_invariants();
    assert_eq!(local.engine.connections(), 1, "only the administrator's is left");
    let uploads = local.workers.uploads.len();
    assert_eq!(uploads, 0, "an upload was left open");
});
