//! How the cost of a message grows with users, connections and messages that wait: whole turns of the engine without a socket
//! or a disk, in nanoseconds a request; the median of several rounds. Prints a table.
//!
//! With `--prepare DIRECTORY USERS MESSAGES` it makes a data directory instead, with so many users and messages that wait, for
//! benches/growth.sh, which measures the whole server.

#![allow(missing_docs, clippy::unwrap_used)]

use std::env;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Instant;

mod at_once;

use kurir::change::{Change, Lsn, Place, SessionId, Target, UserId};
use kurir::connection::{ConnectionId, Peer};
use kurir::engine::{Engine, Registration};
use kurir::limits::Limits;
use kurir::local::Local;
use kurir::log::{Log, Need, Sync};
use kurir::segment::Layout;
use kurir::state::State;
use kurir::store::Store;
use kurir::upkeep::Holdings;
use sha2::{Digest, Sha256};

use at_once::AtOnce;

const NOW: u64 = 1_767_225_600_000;
const REQUESTS_PER_ROUND: usize = 100_000;
const ROUNDS: usize = 9;
/// Of every message that waits.
const RECORD_BYTES: u32 = 160;

/// What a message is sent among.
#[derive(Clone, Copy)]
struct Scale {
    users: u32,
    connections: usize,
    pending: u64,
}

const USUAL: Scale = Scale { users: 1_000, connections: 50, pending: 0 };

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((self.0 >> 33) % u64::from(end)).unwrap()
    }
}

fn token(user: u32) -> String {
    format!("{user:032x}")
}

/// What is kept of a user's token.
fn session(user: u32) -> SessionId {
    SessionId(*Sha256::digest(u128::from(user).to_be_bytes()).first_chunk().unwrap())
}

/// A state of this size, each of the first users logged in, and where its journal would end.
fn state(scale: Scale, layout: Layout) -> (State, Lsn) {
    let mut state = State::new(layout.segment_bytes);
    let mut end = layout.first();
    for user in 0..scale.users {
        let name = format!("user{user}");
        state.apply(&Change::UserAdded { user: UserId(user), name: &name, password_hash: "" }, Place::default());
        let opened = Change::SessionOpened { session: session(user), user: UserId(user), at: NOW, elapsed_ms: 0 };
        state.apply(&opened, Place::default());
    }
    let mut random = Random(1);
    for _ in 0..scale.pending {
        let place = Place { lsn: end, bytes: RECORD_BYTES };
        let (from, to) = (UserId(0), Target::User(UserId(random.below(scale.users))));
        state.apply(&Change::MessageSent { from, to, at: NOW, from_name: "", to_name: "", text: "" }, place);
        end = place.end();
    }
    (state, end)
}

/// Nanoseconds a message, from each connection in turn to users at random.
fn cost(scale: Scale) -> f64 {
    let layout = Layout { salt: 0, segment_bytes: 16 * 1024 * 1024 };
    let limits = Limits {
        connections_max: usize::MAX,
        connections_bytes_max: u64::MAX,
        mailbox_messages_max: usize::MAX,
        mailbox_bytes_max: u64::MAX,
        messages_max: usize::MAX,
        ..Limits::default()
    };
    let (state, end) = state(scale, layout);
    let engine = Engine::new(limits, Registration::Closed, state, Log::new(layout, end), Holdings::default());
    let mut local = Local::new(engine, AtOnce, NOW);
    let connections: Vec<ConnectionId> =
        (0..scale.connections).map(|_| local.open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)))).collect();
    let pipeline = (REQUESTS_PER_ROUND / scale.connections).clamp(1, 16);
    let text = "x".repeat(100);
    let mut random = Random(2);
    let mut rounds: Vec<f64> = Vec::new();
    for _ in 0..=ROUNDS {
        let (mut seconds, mut requests) = (0.0, 0);
        while requests < REQUESTS_PER_ROUND {
            for (number, id) in connections.iter().enumerate() {
                let token = token(u32::try_from(number).unwrap() % scale.users);
                for _ in 0..pipeline {
                    let to = random.below(scale.users);
                    local.send(*id, format!("SEND MESSAGE {token} user{to} {text}\n").as_bytes());
                }
            }
            let started = Instant::now();
            local.settle().unwrap();
            seconds += started.elapsed().as_secs_f64();
            requests += pipeline * connections.len();
            for id in &connections {
                assert!(local.received(*id).starts_with(br#"{"status":"OK"}"#));
            }
        }
        rounds.push(seconds * 1e9 / requests as f64);
    }
    // The first warms up.
    let rounds = &mut rounds[1..];
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

/// Makes a data directory of this size.
fn prepare(root: &Path, users: u32, messages: u64) {
    const CHANGES_PER_COMMIT: u64 = 10_000;
    let mut store = Store::open(root, 16 * 1024 * 1024, Sync::Interval).unwrap();
    let text = "x".repeat(100);
    let mut random = Random(1);
    let commit = |store: &mut Store, change: &Change<'_>, number: u64| {
        store.log.append(change, Need::More).unwrap();
        if number.is_multiple_of(CHANGES_PER_COMMIT) {
            store.commit().unwrap();
        }
    };
    for user in 0..users {
        let name = format!("user{user}");
        let added = Change::UserAdded { user: UserId(user), name: &name, password_hash: "" };
        commit(&mut store, &added, u64::from(user));
    }
    for number in 0..messages {
        let user = random.below(users);
        let (to, to_name) = (Target::User(UserId(user)), format!("user{user}"));
        let from = UserId(0);
        let sent = Change::MessageSent { from, to, at: NOW, from_name: "user0", to_name: &to_name, text: &text };
        commit(&mut store, &sent, number);
    }
    store.commit().unwrap();
    store.disk.journal.close().unwrap();
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [how, root, users, messages] = arguments.as_slice()
        && how == "--prepare"
    {
        return prepare(Path::new(root), users.parse().unwrap(), messages.parse().unwrap());
    }
    let scales = [
        ("users", [10, 1_000, 100_000].map(|users| (u64::from(users), Scale { users, ..USUAL }))),
        ("connections", [1, 100, 10_000].map(|number| (number as u64, Scale { connections: number, ..USUAL }))),
        ("messages that wait", [0, 1_000_000, 10_000_000].map(|pending| (pending, Scale { pending, ..USUAL }))),
    ];
    for (what, steps) in scales {
        let costs = steps.map(|(size, scale)| (size, cost(scale)));
        for (size, nanoseconds) in costs {
            let times = nanoseconds / costs[0].1;
            println!("{what:<20} {size:>10} {nanoseconds:>8.0} ns a message, {times:.2} times the first");
        }
    }
}
