//! How long a start takes with a million pending messages of 100 bytes: from the journal alone, and from a checkpoint.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kurir::change::{Change, Target, UserId};
use kurir::compaction::{Compacted, Compaction};
use kurir::log::{Need, Sync};
use kurir::store::Store;

const MESSAGES: u32 = 1_000_000;
const USERS: u32 = 1_000;
const BATCH: u32 = 1_000;
const BLOCK_BYTES: usize = 128 * 1024;
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

fn fill(root: &Path) {
    let mut store = Store::open(root, SEGMENT_BYTES, Sync::Interval).unwrap();
    let text = "x".repeat(100);
    for number in 0..USERS {
        let name = format!("user{number}");
        let change = Change::UserAdded { user: UserId(number), name: &name, password_hash: "" };
        store.log.append(&change, Need::More).unwrap();
    }
    for number in 0..MESSAGES {
        let (from, to) = (number % USERS, number * 7 % USERS);
        let (from_name, to_name) = (&*format!("user{from}"), &*format!("user{to}"));
        let (from, to, at) = (UserId(from), Target::User(UserId(to)), u64::from(number));
        store.log.append(&Change::MessageSent { from, to, at, from_name, to_name, text: &text }, Need::More).unwrap();
        if number % BATCH == BATCH - 1 {
            store.commit().unwrap();
        }
    }
    store.disk.journal.close().unwrap();
}

fn checkpoint(root: &Path) {
    let mut store = Store::open(root, SEGMENT_BYTES, Sync::Interval).unwrap();
    let (state, log) = (&mut store.state, &store.log);
    let mut compaction = Compaction::new(state, log, None, BLOCK_BYTES);
    let mut done = None;
    while compaction.has_work(log.end()) {
        let mut jobs = Vec::new();
        compaction.step(state, log.end(), log.end(), |job| jobs.push(job));
        for job in jobs {
            done = store.disk.compactor.run(job).unwrap();
            if let Some(Compacted::Written(block)) = done.take_if(|done| matches!(done, Compacted::Written(_))) {
                compaction.written(block);
            }
        }
    }
    assert!(matches!(done, Some(Compacted::Done(..))));
}

fn recovery(c: &mut Criterion) {
    let root = tempfile::tempdir().unwrap();
    fill(root.path());
    let mut group = c.benchmark_group("recovery");
    group.throughput(Throughput::Elements(u64::from(MESSAGES)));
    group.sample_size(10);
    let start = || {
        let store = Store::open(root.path(), SEGMENT_BYTES, Sync::Interval).unwrap();
        assert_eq!(
            store.state.mailboxes().map(|(_, mailbox)| mailbox.entries().len()).sum::<usize>(),
            MESSAGES as usize
        );
        store
    };
    // The directory is locked as long as a store is open, so it is closed within the time.
    group.bench_function("journal_1m_messages", |b| b.iter(start));
    checkpoint(root.path());
    group.bench_function("checkpoint_1m_messages", |b| b.iter(start));
    group.finish();
}

criterion_group!(benches, recovery);
criterion_main!(benches);
