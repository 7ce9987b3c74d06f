//! One kind of request after the other, through whole turns of the engine without a socket or a disk, for a tool that counts
//! instructions in [`measured`]; see `benches/instructions.sh`. Says how many requests that were.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod at_once;

use std::env;
use std::net::{IpAddr, Ipv4Addr};

use kurir::connection::{ConnectionId, Peer};
use kurir::engine::{Engine, Registration};
use kurir::limits::Limits;
use kurir::local::Local;
use kurir::log::Log;
use kurir::segment::Layout;
use kurir::state::State;
use kurir::upkeep::Holdings;

use at_once::AtOnce;

const USERS: usize = 50;
const PIPELINE: usize = 16;
const ROUNDS: usize = 4;
/// Messages in one INBOX reply, and files in one list.
const WAITING: usize = 100;
const NOW: u64 = 1_767_225_600_000;

/// Users, each logged in on a connection of its own, and all in one group.
struct Scene {
    local: Local<AtOnce>,
    users: Vec<(ConnectionId, String)>,
}

impl Scene {
    fn new() -> Self {
        let layout = Layout { salt: 0, segment_bytes: 16 * 1024 * 1024 };
        let limits = Limits {
            mailbox_messages_max: usize::MAX,
            mailbox_bytes_max: u64::MAX,
            messages_max: usize::MAX,
            inbox_messages_max: WAITING,
            registrations_per_minute_max: 0,
            password_queue_max: 1000,
            ..Limits::default()
        };
        let (state, log) = (State::new(layout.segment_bytes), Log::new(layout, layout.first()));
        let engine = Engine::new(limits, Registration::Open, state, log, Holdings::default());
        let mut local = Local::new(engine, AtOnce, NOW);
        let mut users = Vec::new();
        for number in 0..USERS {
            let id = local.open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
            local.request(id, &format!("REGISTER user{number} surabaya")).unwrap();
            let reply = local.request(id, &format!("AUTH user{number} surabaya")).unwrap();
            let reply = String::from_utf8(reply).unwrap();
            users.push((id, reply.split('"').nth(7).unwrap().to_owned()));
        }
        let mut scene = Self { local, users };
        let (owner, token) = scene.users[0].clone();
        scene.local.request(owner, &format!("CREATE GROUP {token} tim")).unwrap();
        for number in 1..USERS {
            let added = scene.local.request(owner, &format!("ADD MEMBER {token} tim user{number}")).unwrap();
            assert!(added.starts_with(br#"{"status":"OK"}"#));
        }
        scene
    }

    /// Has every user make a request so many times, without counting that.
    fn prepare(&mut self, times: usize, request: impl Fn(usize, &str, usize) -> String) {
        for (number, (id, token)) in self.users.iter().enumerate() {
            for time in 0..times {
                self.local.send(*id, request(number, token, time).as_bytes());
            }
        }
        self.settle();
    }

    fn settle(&mut self) {
        self.local.settle().unwrap();
        for (id, _) in &self.users {
            let reply = self.local.received(*id);
            assert!(reply.starts_with(br#"{"status":"OK""#), "{}", String::from_utf8_lossy(&reply));
        }
    }
}

/// What is counted: the turns in which everything that was sent is answered.
#[inline(never)]
fn measured(local: &mut Local<AtOnce>) {
    local.settle().unwrap();
}

fn main() {
    let request = env::args().nth(1).unwrap_or_default();
    let text = "x".repeat(100);
    let content = "QUJD".repeat(341);
    let next = |number: usize| (number + 1) % USERS;
    let mut scene = Scene::new();
    // A password takes a job of its own, so that there is no pipeline.
    let times = match request.as_str() {
        "AUTH" | "INBOX" => 1,
        _ => PIPELINE,
    };
    for round in 0..ROUNDS {
        match request.as_str() {
            "INBOX" => {
                scene
                    .prepare(WAITING, |number, token, _| format!("SEND MESSAGE {token} user{} {text}\n", next(number)));
            }
            "MY FILE" | "DOWNLOAD FILE" if round == 0 => scene.prepare(WAITING / 2, |number, token, time| {
                format!("SEND FILE {token} user{} berkas{time} {content}\n", next(number))
            }),
            _ => {}
        }
        for (number, (id, token)) in scene.users.iter().enumerate() {
            for time in 0..times {
                let file = round * PIPELINE + time;
                let line = match request.as_str() {
                    "AUTH" => format!("AUTH user{number} surabaya\n"),
                    "SEND MESSAGE" => format!("SEND MESSAGE {token} user{} {text}\n", next(number)),
                    "SEND GROUP MESSAGE" => format!("SEND GROUP MESSAGE {token} tim {text}\n"),
                    "SEND FILE" => format!("SEND FILE {token} user{} berkas{file} {content}\n", next(number)),
                    "SEND GROUP FILE" => format!("SEND GROUP FILE {token} tim berkas{file} {content}\n"),
                    "MY FILE" => format!("MY FILE {token}\n"),
                    "INBOX" => format!("INBOX {token}\n"),
                    "DOWNLOAD FILE" => format!("DOWNLOAD FILE {token} user{} berkas{time}\n", next(number)),
                    other => panic!("{other} is not one of the eight"),
                };
                scene.local.send(*id, line.as_bytes());
            }
        }
        measured(&mut scene.local);
        scene.settle();
    }
    println!("{}", ROUNDS * USERS * times);
}
