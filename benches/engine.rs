//! Whole turns of the engine without a socket or a disk: what a request costs from its bytes to its reply.

#![allow(missing_docs, clippy::unwrap_used)]

mod at_once;

use std::net::{IpAddr, Ipv4Addr};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use kurir::change::{Change, Place, SessionId, UserId};
use kurir::connection::{ConnectionId, Peer};
use kurir::engine::{Engine, Registration};
use kurir::limits::Limits;
use kurir::local::Local;
use kurir::log::Log;
use kurir::segment::Layout;
use kurir::state::State;
use kurir::upkeep::Holdings;

use at_once::AtOnce;

const USERS: u32 = 50;
const NOW: u64 = 1_767_225_600_000;

struct Bench {
    local: Local<AtOnce>,
    connections: Vec<(ConnectionId, String)>,
}

/// So many users, each logged in on a connection of its own.
fn users() -> Bench {
    let layout = Layout { salt: 0, segment_bytes: 16 * 1024 * 1024 };
    let mut state = State::new(layout.segment_bytes);
    for number in 0..USERS {
        let name = format!("user{number}");
        let change = Change::UserAdded { user: UserId(number), name: &name, password_hash: "" };
        state.apply(&change, Place::default());
    }
    state.apply(
        &Change::SessionOpened { session: SessionId([0; 16]), user: UserId(0), at: NOW, elapsed_ms: 0 },
        Place::default(),
    );
    let limits = Limits { mailbox_messages_max: usize::MAX, mailbox_bytes_max: u64::MAX, ..Limits::default() };
    let registration = Registration::Closed;
    let engine = Engine::new(limits, registration, state, Log::new(layout, layout.first()), Holdings::default());
    let mut local = Local::new(engine, AtOnce, NOW);
    let connections = (0..USERS).map(|number| {
        let id = local.open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        let reply = String::from_utf8(local.request(id, &format!("AUTH user{number} x")).unwrap()).unwrap();
        (id, reply.split('"').nth(7).unwrap().to_owned())
    });
    let connections = connections.collect();
    Bench { local, connections }
}

/// Sends so many of a request on every connection, each connection's in one piece, and lets the engine answer them all.
fn run(bench: &mut Bench, pipeline: usize, request: impl Fn(&str, usize) -> String) {
    for (number, (id, token)) in bench.connections.iter().enumerate() {
        bench.local.send(*id, request(token, number).repeat(pipeline).as_bytes());
    }
    bench.local.settle().unwrap();
    for (id, _) in &bench.connections {
        assert!(bench.local.received(*id).starts_with(br#"{"status":"OK""#));
    }
}

fn send(c: &mut Criterion) {
    let mut group = c.benchmark_group("engine");
    let text = "x".repeat(100);
    let to_next =
        |token: &str, number: usize| format!("SEND MESSAGE {token} user{} {text}\n", (number + 1) % USERS as usize);
    for pipeline in [1, 16, 128] {
        group.throughput(Throughput::Elements(u64::from(USERS) * pipeline as u64));
        group.bench_function(format!("send_50x{pipeline}"), |b| {
            b.iter_batched_ref(users, |bench| run(bench, pipeline, to_next), BatchSize::LargeInput);
        });
    }
    group.throughput(Throughput::Elements(u64::from(USERS) * 100));
    group.bench_function("inbox_100_messages", |b| {
        let filled = || {
            let mut bench = users();
            run(&mut bench, 100, to_next);
            bench
        };
        b.iter_batched_ref(filled, |bench| run(bench, 1, |token, _| format!("INBOX {token}\n")), BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group!(benches, send);
criterion_main!(benches);
