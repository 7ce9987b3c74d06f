//! A journal with anything done to it is read without a panic, and what is read of it is what was written, in order, with
//! nothing made up. What is cut off its end, and nothing else, costs nothing before the cut.
//!
//! The first bytes say how many changes there are and how they are batched; then come places and what is done to them.

#![no_main]

use std::path::PathBuf;

use kurir::change::{Change, Lsn, UserId};
use kurir::journal::{Journal, Log, Need};
use libfuzzer_sys::fuzz_target;

const SALT: u32 = 7;

fn header() -> Vec<u8> {
    let mut header = b"kurirjnl".to_vec();
    header.extend_from_slice(&1u32.to_le_bytes());
    header.extend_from_slice(&SALT.to_le_bytes());
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    header
}

/// So many changes, so many in a batch, every batch synced before the next.
fn journal(changes: u32, in_batch: u32) -> Vec<u8> {
    let mut bytes = header();
    let mut log = Log::new(SALT, Lsn(bytes.len() as u64));
    for number in 0..changes {
        let name = format!("user{number}");
        let change = Change::UserAdded { user: UserId(number), name: &name, password_hash: "" };
        log.append(&change, Need::More).expect("there is room");
        if number % in_batch == in_batch - 1 || number == changes - 1 {
            let batch = log.take_batch().expect("it holds a change");
            bytes.extend_from_slice(&batch.bytes);
            let end = batch.end();
            log.settle(batch, end);
        }
    }
    bytes
}

fn numbers(bytes: &[u8]) -> Option<(Vec<u32>, bool)> {
    let mut found = Vec::new();
    let survey = Journal::survey_bytes(bytes, PathBuf::new(), |change, _| match change {
        Change::UserAdded { user, name, .. } => {
            assert_eq!(*name, format!("user{}", user.0));
            found.push(user.0);
        }
        other => panic!("nobody wrote {other:?}"),
    });
    survey.ok().map(|survey| (found, survey.damage.is_empty()))
}

fuzz_target!(|data: &[u8]| {
    let [changes, in_batch, cut, edits @ ..] = data else { return };
    let changes = u32::from(*changes % 40);
    let mut bytes = journal(changes, u32::from(in_batch % 7) + 1);
    let kept = bytes.len() - (usize::from(*cut) * 8).min(bytes.len() - 20);
    bytes.truncate(kept);
    let (whole, is_whole) = numbers(&bytes).expect("the header is whole");
    assert!(is_whole, "a cut is not damage");
    assert!(whole.iter().copied().eq(0..whole.len() as u32), "what stands before the cut is all there");
    for edit in edits.chunks_exact(3) {
        let place = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
        bytes[place] ^= edit[2];
    }
    if let Some((found, _)) = numbers(&bytes) {
        assert!(found.is_sorted_by(|a, b| a < b), "out of order, or twice");
        assert!(found.iter().all(|number| whole.contains(number)), "made up");
    }
});
