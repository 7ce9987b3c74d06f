//! How long a start takes with a million pending messages of 100 bytes in the journal.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kurir::change::{Change, Target, UserId};
use kurir::journal::{Journal, Need};
use kurir::state::State;

const MESSAGES: u32 = 1_000_000;
const USERS: u32 = 1_000;
const BATCH: u32 = 1_000;

fn write_journal(directory: &Path) {
    let (mut journal, _) = Journal::open(directory, |_, _| {}).unwrap();
    journal.make_room().unwrap();
    let mut log = journal.log();
    for number in 0..USERS {
        let name = format!("user{number}");
        log.append(&Change::UserAdded { user: UserId(number), name: &name, password_hash: "" }, Need::More).unwrap();
    }
    let text = "x".repeat(100);
    for number in 0..MESSAGES {
        let (from, to) = (UserId(number % USERS), Target::User(UserId(number * 7 % USERS)));
        log.append(&Change::MessageSent { from, to, at: u64::from(number), text: &text }, Need::More).unwrap();
        if number % BATCH == BATCH - 1 {
            let batch = log.take_batch().unwrap();
            journal.write(std::slice::from_ref(&batch)).unwrap();
            let end = batch.end();
            log.settle(batch, end);
            journal.make_room().unwrap();
            log.set_room(journal.room(), journal.is_full());
        }
    }
    journal.sync().unwrap();
}

fn recovery(c: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    write_journal(directory.path());
    let mut group = c.benchmark_group("recovery");
    group.throughput(Throughput::Elements(u64::from(MESSAGES)));
    group.sample_size(10);
    group.bench_function("journal_1m_messages", |b| {
        b.iter_with_large_drop(|| {
            let mut state = State::default();
            Journal::open(directory.path(), |change, lsn| state.apply(change, lsn)).unwrap();
            assert_eq!(state.users().map(|user| user.mailbox.entries().len()).sum::<usize>(), MESSAGES as usize);
            state
        });
    });
    group.finish();
}

criterion_group!(benches, recovery);
criterion_main!(benches);
