//! A journal with anything done to it is read without a panic, and what is read of it is what was written, in order, with
//! nothing made up. What is cut off its end, and nothing else, costs nothing before the cut. A server starts from it, or
//! says why not; from a repaired one it always starts.
//!
//! The first bytes say how many changes there are and how they are batched; then come places and what is done to them.

#![no_main]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use kurir::change::{Change, Lsn, UserId};
use kurir::check;
use kurir::data::DataDirectory;
use kurir::disk::Directory;
use kurir::log::{Log, Need};
use kurir::recovery::{self, Start};
use kurir::segment::{Access, Layout};
use kurir::survey;
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 4096;
/// Small, so that records stand across segments.
const LAYOUT: Layout = Layout { salt: 7, segment_bytes: BLOCK as u64 };

/// So many changes, so many in a batch, every batch synced before the next.
fn stream(changes: u32, in_batch: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut log = Log::new(LAYOUT, LAYOUT.first());
    for number in 0..changes {
        let name = format!("user{number}{}", "x".repeat(number as usize * 7 % 300));
        let change = Change::UserAdded { user: UserId(number), name: &name, password_hash: "" };
        log.append(&change, Need::More).expect("there is room");
        if number % in_batch == in_batch - 1 || number == changes - 1 {
            let mut batch = log.take_batch().expect("it holds a change");
            bytes.extend_from_slice(batch.seal());
            let end = batch.end();
            log.settle(batch, end);
        }
    }
    bytes
}

/// Puts a stream into segments.
fn save(root: &Path, stream: &[u8]) -> BTreeSet<u64> {
    let journal = root.join("journal");
    fs::create_dir_all(&journal).expect("there is a disk");
    for (number, bytes) in (1..).zip(stream.chunks(BLOCK)) {
        let mut segment = LAYOUT.header(number);
        segment.extend_from_slice(bytes);
        segment.resize(2 * BLOCK, 0);
        fs::write(journal.join(Layout::name(number)), segment).expect("there is room");
    }
    (1..=stream.len().div_ceil(BLOCK) as u64).collect()
}

/// What can be read, and whether all of it is whole.
fn numbers(root: &Path, segments: &BTreeSet<u64>) -> (Vec<u32>, Vec<std::ops::Range<Lsn>>) {
    let mut found = Vec::new();
    let known = LAYOUT.first()..LAYOUT.first();
    let journal = Directory::on_system(&root.join("journal"));
    let survey = survey::survey_journal(&journal, LAYOUT, segments, known, |change, _| match change {
        Change::UserAdded { user, name, .. } => {
            assert!(name.starts_with(&format!("user{}", user.0)));
            found.push(user.0);
        }
        other => panic!("nobody wrote {other:?}"),
    });
    (found, survey.expect("it can be read").damage)
}

fuzz_target!(|data: &[u8]| {
    let [changes, in_batch, cut, edits @ ..] = data else { return };
    let changes = u32::from(*changes % 40) + 1;
    let mut bytes = stream(changes, u32::from(in_batch % 7) + 1);
    let kept = bytes.len().saturating_sub(usize::from(*cut) * 8).max(1);
    bytes.truncate(kept);
    let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("there is a disk");
    let segments = save(root.path(), &bytes);
    let (whole, damage) = numbers(root.path(), &segments);
    assert!(damage.is_empty(), "a cut is not damage");
    assert!(whole.iter().copied().eq(0..whole.len() as u32), "what stands before the cut is all there");
    for edit in edits.chunks_exact(3) {
        let place = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
        bytes[place] ^= edit[2];
    }
    save(root.path(), &bytes);
    let (found, damage) = numbers(root.path(), &segments);
    assert!(found.is_sorted_by(|a, b| a < b), "out of order, or twice");
    assert!(found.iter().all(|number| whole.contains(number)), "made up");

    let start = || {
        let directory = DataDirectory::open(root.path()).expect("nobody else has it");
        let start = Start { access: Access::Buffered, segment_bytes: LAYOUT.segment_bytes, salt: 7, now: 0 };
        recovery::recover(&directory, start)
    };
    if !damage.is_empty() {
        assert!(start().is_err(), "damage is never gone over");
        let report = check::check(root.path(), true).expect("it can be repaired");
        assert!(report.is_good());
    }
    let recovered = start().expect("what is whole is enough to start from");
    recovered.state.assert_invariants();
    assert_eq!(recovered.state.users().count(), found.len());
    assert!(found.iter().all(|number| *number < recovered.state.next_user().0), "a number comes again");
});
