//! How much is done in one turn, so that nobody waits long for the others: requests, bytes read, answers made, and the work
//! that no answer shows.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{IpAddr, Ipv4Addr};

use common::MemoryWorkers;
use kurir::connection::{ConnectionId, Peer};
use kurir::engine::Registration;
use kurir::limits::Limits;
use kurir::local::Local;

const OK: &str = "{\"status\":\"OK\"}\r\n\r\n";

struct Memory {
    local: Local<MemoryWorkers>,
}

impl Memory {
    fn new(mut limits: Limits) -> Self {
        limits.registrations_per_minute_max = 0;
        let engine = common::engine(limits, Registration::Open);
        Self { local: Local::new(engine, MemoryWorkers::default(), 1_767_225_600_000) }
    }

    fn open(&mut self) -> ConnectionId {
        let id = self.local.open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        self.local.settle().unwrap();
        id
    }

    fn request(&mut self, id: ConnectionId, line: &str) -> serde_json::Value {
        let reply = self.local.request(id, line).unwrap();
        serde_json::from_slice(&reply).unwrap()
    }

    fn login(&mut self, id: ConnectionId, name: &str) -> String {
        self.request(id, &format!("REGISTER {name} surabaya"));
        self.request(id, &format!("AUTH {name} surabaya"))["data"].as_str().unwrap().to_owned()
    }

    /// One turn, and the replies that came to a connection by its end.
    fn turn(&mut self, id: ConnectionId) -> usize {
        self.local.turn().unwrap();
        String::from_utf8(self.local.received(id)).unwrap().matches("\r\n\r\n").count()
    }
}

#[test]
fn texts_are_read_from_the_disk_for_so_many_at_once() {
    for (read_queue_max, read_queue_per_user_max, is_read) in [(1, 1, true), (0, 1, false), (1, 0, false)] {
        let limits = Limits { read_queue_max, read_queue_per_user_max, ..Limits::default() };
        let engine = common::engine_without_tail(limits, Registration::Open);
        let mut memory = Memory { local: Local::new(engine, MemoryWorkers::default(), 1_767_225_600_000) };
        let id = memory.open();
        let token = memory.login(id, "messi");
        memory.request(id, "REGISTER lain surabaya");
        memory.request(id, &format!("SEND FILE {token} messi kecil QUJD"));
        // Each time it is done, the next may have its turn.
        for _ in 0..3 {
            for to in ["messi", "lain"] {
                memory.request(id, &format!("SEND MESSAGE {token} {to} halo"));
            }
            for line in [format!("INBOX {token}"), format!("DOWNLOAD FILE {token} messi kecil")] {
                let reply = memory.request(id, &line);
                let expected = if is_read { "OK" } else { "ERROR" };
                assert_eq!(reply["status"], expected, "{line}: {reply}");
                assert!(is_read || reply["data"] == "server sibuk, coba lagi", "{reply}");
            }
        }
    }
}

#[test]
fn one_connection_has_so_many_requests_a_turn_and_others_have_theirs() {
    let mut memory = Memory::new(Limits { requests_per_turn_max: 3, ..Limits::default() });
    let (busy, other) = (memory.open(), memory.open());
    memory.local.send(busy, "PING\n".repeat(10).as_bytes());
    for expected in [3, 3, 3, 1] {
        memory.local.send(other, b"PING\n");
        assert_eq!(memory.turn(busy), expected);
        assert_eq!(memory.local.received(other), OK.as_bytes());
    }
}

#[test]
fn bytes_that_are_read_are_shared_out() {
    let limits = Limits { read_bytes_per_turn_max: 20_000, bytes_per_turn_max: 100_000, ..Limits::default() };
    let mut memory = Memory::new(limits);
    let busy: Vec<ConnectionId> = (0..20).map(|_| memory.open()).collect();
    for id in &busy {
        memory.local.send(*id, format!("{}\nPING\n", "X".repeat(15_000)).as_bytes());
    }
    let mut answered = Vec::new();
    while answered.iter().sum::<usize>() < busy.len() {
        memory.local.turn().unwrap();
        let mut has_come = |id: &&ConnectionId| memory.local.received(**id).ends_with(OK.as_bytes());
        answered.push(busy.iter().filter(&mut has_come).count());
        assert!(answered.len() < 100);
    }
    assert!(answered.iter().all(|count| *count <= 8), "{answered:?}");
}

#[test]
fn long_answers_are_shared_out_too() {
    let limits = Limits { read_bytes_per_turn_max: 50_000, bytes_per_turn_max: 200_000, ..Limits::default() };
    let mut memory = Memory::new(limits);
    let sender = memory.open();
    let readers: Vec<(ConnectionId, String)> = (0..20)
        .map(|number| {
            let id = memory.open();
            (id, memory.login(id, &format!("user{number}")))
        })
        .collect();
    let token = memory.login(sender, "messi");
    for number in 0..readers.len() {
        memory.request(sender, &format!("SEND MESSAGE {token} user{number} {}", "x".repeat(60_000)));
    }
    for (id, token) in &readers {
        memory.local.send(*id, format!("INBOX {token}\n").as_bytes());
    }
    let mut turns = 0;
    let mut left = readers.len();
    while left > 0 {
        memory.local.turn().unwrap();
        let came: usize = readers.iter().map(|(id, _)| memory.local.received(*id).len()).sum();
        assert!(came <= 200_000 + 61_000, "{came} bytes in one turn");
        left -= came / 60_000;
        turns += 1;
    }
    assert!(turns >= 5, "{turns} turns");
}

#[test]
fn a_message_to_many_counts_for_many() {
    const MEMBERS: usize = 200;
    // Three such messages are a connection's share.
    let limits = Limits {
        read_bytes_per_turn_max: 24 * 3 * MEMBERS as u64,
        bytes_per_turn_max: 24 * 6 * MEMBERS as u64,
        mailbox_messages_max: 10,
        ..Limits::default()
    };
    let mut memory = Memory::new(limits);
    let id = memory.open();
    let token = memory.login(id, "messi");
    memory.request(id, &format!("CREATE GROUP {token} semua"));
    for number in 0..MEMBERS {
        memory.request(id, &format!("REGISTER user{number} surabaya"));
        memory.request(id, &format!("ADD MEMBER {token} semua user{number}"));
    }
    let other = memory.open();
    memory.local.send(id, format!("SEND GROUP MESSAGE {token} semua halo\n").repeat(9).as_bytes());
    let mut sent = Vec::new();
    while sent.iter().sum::<usize>() < 9 {
        memory.local.send(other, b"PING\n");
        sent.push(memory.turn(id));
        assert_eq!(memory.local.received(other), OK.as_bytes());
        assert!(sent.len() < 20);
    }
    assert!(sent.iter().all(|count| *count <= 3), "{sent:?}");

    // So does one that is refused for the sake of the last of them.
    let last = MEMBERS - 1;
    memory.request(id, &format!("SEND MESSAGE {token} user{last} penuh"));
    memory.local.send(id, format!("SEND GROUP MESSAGE {token} semua halo\n").repeat(9).as_bytes());
    let mut refused = Vec::new();
    while refused.iter().sum::<usize>() < 9 {
        refused.push(memory.turn(id));
        assert!(refused.len() < 20);
    }
    assert!(refused.iter().all(|count| *count <= 3), "{refused:?}");
}

#[test]
fn what_takes_little_does_not_wait_for_long_answers_and_no_user_waits_for_anothers() {
    const LISTED: usize = 2000;
    let mut memory = Memory::new(Limits::default());
    let (sender, honest, other) = (memory.open(), memory.open(), memory.open());
    let token = memory.login(sender, "messi");
    let other_token = memory.login(other, "lineker");
    for number in 0..LISTED {
        for token in [&token, &other_token] {
            memory.request(sender, &format!("SEND FILE {token} messi {number:0100} QUJD"));
        }
    }
    let greedy: Vec<ConnectionId> = (0..50).map(|_| memory.open()).collect();
    for id in &greedy {
        memory.local.send(*id, format!("MY FILE {token}\n").repeat(2).as_bytes());
    }
    memory.local.turn().unwrap();
    memory.local.send(honest, b"PING\n");
    memory.local.send(other, format!("MY FILE {other_token}\n").as_bytes());
    assert_eq!(memory.turn(honest), 1, "a short request is answered in the turn in which it comes");
    assert!(memory.turn(other) + memory.turn(other) == 1, "a long one as soon as it is that user's turn");
    let answered = greedy.iter().filter(|id| !memory.local.received(**id).is_empty()).count();
    assert!((1..20).contains(&answered), "{answered} of the others");
    let mut left = 2 * greedy.len() - answered;
    for _ in 0..200 {
        memory.local.turn().unwrap();
        let count = |reply: Vec<u8>| String::from_utf8(reply).unwrap().matches("\r\n\r\n").count();
        left -= greedy.iter().map(|id| count(memory.local.received(*id))).sum::<usize>();
    }
    assert_eq!(left, 0, "and all are answered");
}

#[test]
fn whoever_fills_many_mailboxes_does_not_keep_others_from_writing_to_those_who_read() {
    let mut memory = Memory::new(Limits { messages_max: 400, ..Limits::default() });
    let id = memory.open();
    let tokens: Vec<String> = ["messi", "henderson", "lineker", "pele"].map(|name| memory.login(id, name)).into();
    let fill = |memory: &mut Memory, to: &str| {
        let line = format!("SEND MESSAGE {} {to} x", tokens[0]);
        let mut count = 0;
        loop {
            let reply = memory.request(id, &line);
            if reply["status"] == "OK" {
                count += 1;
            } else {
                assert_eq!(reply["data"], "kotak masuk tujuan penuh");
                return count;
            }
        }
    };
    // Half of all; half of what is left, which is a hundred; and a hundred in any case.
    assert_eq!(fill(&mut memory, "messi"), 200);
    for name in ["henderson", "lineker", "pele"] {
        assert_eq!(fill(&mut memory, name), 100, "{name}");
    }
    // Whoever reads can be written to.
    assert_eq!(memory.request(id, &format!("INBOX {}", tokens[3]))["status"], "OK");
    assert_eq!(fill(&mut memory, "pele"), 100);
}

#[test]
fn an_account_that_goes_between_two_requests_that_came_together_gets_nothing() {
    let mut memory = Memory::new(Limits::default());
    let stranger = memory.open();
    let token = memory.login(stranger, "messi");
    memory.request(stranger, "REGISTER lineker surabaya");
    let admin = memory.local.open(Peer::Admin);
    memory.request(admin, &format!("INBOX {token}"));
    let message = format!("SEND MESSAGE {token} lineker hi\n");
    let lines = format!("{message}{message}USER REMOVE lineker\n{message}{message}");
    memory.local.send(admin, lines.as_bytes());
    memory.local.settle().unwrap();
    let replies = String::from_utf8(memory.local.received(admin)).unwrap();
    let refused = "{\"status\":\"ERROR\",\"data\":\"user tujuan tidak ditemukan\"}\r\n\r\n";
    assert_eq!(replies, [OK, OK, OK, refused, refused].concat());
}

#[test]
fn a_token_that_ends_in_a_turn_is_no_good_in_the_rest_of_it() {
    for ahead_users_min in [0, usize::MAX] {
        let limits = Limits { registrations_per_minute_max: 0, ..Limits::default() };
        let mut engine = common::engine(limits, Registration::Open);
        engine.set_ahead_users_min(ahead_users_min);
        let mut memory = Memory { local: Local::new(engine, MemoryWorkers::default(), 1_767_225_600_000) };
        let id = memory.open();
        let (token, other) = (memory.login(id, "messi"), memory.login(id, "lineker"));
        let send = |token: &str| format!("SEND MESSAGE {token} messi halo\n");
        let lines = [send(&token), format!("LOGOUT {token}\n"), send(&token), send(&other), send(&token)].concat();
        memory.local.send(id, lines.as_bytes());
        assert_eq!(memory.turn(id), 0, "the journal must be written first");
        memory.local.settle().unwrap();
        let received = String::from_utf8(memory.local.received(id)).unwrap();
        let answers: Vec<bool> = received.split_terminator("\r\n\r\n").map(|reply| reply.contains("OK")).collect();
        assert_eq!(answers, [true, true, false, true, false], "{received}");
    }
}
