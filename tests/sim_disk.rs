//! The disk that loses power does what its rules say: the simulation is worth no more than that.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

#[path = "common/sim_disk.rs"]
mod sim_disk;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kurir::disk::{Disk, LockOf, Locked, Mode};
use sim_disk::SimDisk;

const PAGE: usize = 4096;
const SECTOR: usize = 512;
const PAGE_BYTES: u64 = PAGE as u64;
const EIO: i32 = 5;
const SEEDS: u64 = 200;

fn at(path: &str) -> &Path {
    Path::new(path)
}

/// A disk with the directories `/d` and `/e`.
fn disk(seed: u64) -> Arc<SimDisk> {
    let disk = SimDisk::new(seed);
    disk.make_root(at("/d")).unwrap();
    disk.make_root(at("/e")).unwrap();
    disk
}

/// Makes a file durable with these bytes.
fn store(disk: &SimDisk, path: &str, bytes: &[u8]) {
    let file = disk.open(at(path), Mode::Create).unwrap();
    assert_eq!(file.write_at(bytes, 0).unwrap(), bytes.len());
    file.sync_data().unwrap();
    disk.sync_directory(at(path).parent().unwrap()).unwrap();
}

fn power_cycle(disk: &SimDisk) {
    disk.cut();
    disk.restart();
}

fn has(disk: &SimDisk, path: &str) -> bool {
    disk.status(at(path)).is_ok()
}

/// Calls `use_aligned` with bytes at an address that direct writes take.
fn with_aligned(length: usize, byte: u8, use_aligned: impl FnOnce(&[u8])) {
    let buffer = vec![byte; length + SECTOR];
    let skip = buffer.as_ptr().align_offset(SECTOR);
    use_aligned(&buffer[skip..skip + length]);
}

/// All that a disk holds, to compare.
fn image(disk: &SimDisk) -> Vec<(PathBuf, Vec<u8>)> {
    let read = |path: PathBuf| (path.clone(), disk.read_file(&path).unwrap());
    disk.files_below(at("/")).into_iter().map(read).collect()
}

/// How often something is so, out of all seeds.
fn count(is_so: impl Fn(u64) -> bool) -> u64 {
    (0..SEEDS).map(|seed| u64::from(is_so(seed))).sum()
}

#[test]
fn what_is_synced_stays_and_what_is_not_may_vanish_or_tear() {
    let (mut old, mut new, mut torn) = (0, 0, 0);
    for seed in 0..SEEDS {
        let disk = disk(seed);
        store(&disk, "/d/a", &[1; 3 * PAGE]);
        store(&disk, "/d/b", &[1; 3 * PAGE]);
        disk.open(at("/d/a"), Mode::Write).unwrap().write_at(&[2; 3 * PAGE], 0).unwrap();
        assert_eq!(disk.read_file(at("/d/a")).unwrap(), [2; 3 * PAGE]);
        power_cycle(&disk);
        assert_eq!(disk.read_file(at("/d/b")).unwrap(), [1; 3 * PAGE]);
        let bytes = disk.read_file(at("/d/a")).unwrap();
        assert!(bytes.chunks(SECTOR).all(|sector| sector == [1; SECTOR] || sector == [2; SECTOR]));
        old += u64::from(bytes == [1; 3 * PAGE]);
        new += u64::from(bytes == [2; 3 * PAGE]);
        torn += u64::from(bytes[..PAGE].contains(&1) && bytes[..PAGE].contains(&2));
        let before = image(&disk);
        power_cycle(&disk);
        assert_eq!(image(&disk), before);
    }
    assert!(old > 0 && new > 0 && torn > 0 && old + new < SEEDS);
}

#[test]
fn a_size_that_is_not_synced_may_be_any_of_those_since_the_sync() {
    let mut seen = BTreeSet::new();
    for seed in 0..SEEDS {
        let disk = disk(seed);
        store(&disk, "/d/a", &[1; 5000]);
        let file = disk.open(at("/d/a"), Mode::Write).unwrap();
        file.set_len(100).unwrap();
        file.set_len(9000).unwrap();
        let bytes = disk.read_file(at("/d/a")).unwrap();
        assert!(bytes[..100] == [1; 100] && bytes[100..].iter().all(|byte| *byte == 0));
        power_cycle(&disk);
        seen.insert(disk.status(at("/d/a")).unwrap().bytes);
    }
    assert_eq!(seen, BTreeSet::from([100, 5000, 9000]));
}

#[test]
fn a_rename_is_lost_or_whole_and_durable_after_a_sync_of_either_directory() {
    let renamed = |seed, synced: Option<&str>| {
        let disk = disk(seed);
        store(&disk, "/d/a", b"new");
        store(&disk, "/e/b", b"old");
        disk.rename(at("/d/a"), at("/e/b")).unwrap();
        if let Some(synced) = synced {
            disk.sync_directory(at(synced)).unwrap();
        }
        power_cycle(&disk);
        let is_renamed = disk.read_file(at("/e/b")).unwrap() == b"new";
        assert_eq!(has(&disk, "/d/a"), !is_renamed);
        is_renamed
    };
    assert!((1..SEEDS).contains(&count(|seed| renamed(seed, None))));
    assert_eq!(count(|seed| renamed(seed, Some("/d"))), SEEDS);
    assert_eq!(count(|seed| renamed(seed, Some("/e"))), SEEDS);
}

#[test]
fn a_file_without_a_durable_name_may_be_lost_though_it_is_synced() {
    let stays = |seed, is_ordered| {
        let disk = disk(seed);
        disk.set_ordered(is_ordered);
        let file = disk.open(at("/d/a"), Mode::CreateNew).unwrap();
        file.write_at(b"text", 0).unwrap();
        file.sync_all().unwrap();
        power_cycle(&disk);
        has(&disk, "/d/a")
    };
    assert!((1..SEEDS).contains(&count(|seed| stays(seed, false))));
    assert_eq!(count(|seed| stays(seed, true)), SEEDS);
}

#[test]
fn a_sync_after_one_that_failed_does_not_bring_the_data_back() {
    for seed in 0..SEEDS {
        let disk = disk(seed);
        store(&disk, "/d/a", &[1; PAGE]);
        let file = disk.open(at("/d/a"), Mode::Write).unwrap();
        file.write_at(&[2; 100], 0).unwrap();
        disk.fail_next_sync();
        assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(EIO));
        file.sync_data().unwrap();
        assert_eq!(disk.read_file(at("/d/a")).unwrap()[..100], [2; 100]);
        let dirtied = disk.snapshot();
        power_cycle(&disk);
        assert_eq!(disk.read_file(at("/d/a")).unwrap(), [1; PAGE]);
        let file = dirtied.open(at("/d/a"), Mode::Write).unwrap();
        file.write_at(&[3], 4000).unwrap();
        file.sync_data().unwrap();
        power_cycle(&dirtied);
        assert_eq!(dirtied.read_file(at("/d/a")).unwrap()[..100], [2; 100]);
    }
}

#[test]
fn a_failed_sync_does_not_bring_back_what_was_cut_off() {
    for seed in 0..SEEDS {
        let disk = disk(seed);
        store(&disk, "/d/a", &[1; PAGE]);
        let file = disk.open(at("/d/a"), Mode::Create).unwrap();
        file.write_at(&[2; PAGE], 0).unwrap();
        disk.fail_next_sync();
        file.sync_data().unwrap_err();
        file.sync_data().unwrap();
        power_cycle(&disk);
        assert_eq!(disk.read_file(at("/d/a")).unwrap(), [0; PAGE]);
    }
}

#[test]
fn durable_writes_need_no_sync_and_direct_ones_do() {
    let stays = |seed, mode| {
        let disk = disk(seed);
        store(&disk, "/d/a", &[]);
        let file = disk.open(at("/d/a"), mode).unwrap();
        with_aligned(2 * PAGE, 7, |bytes| {
            assert_eq!(file.write_at(bytes, 512).unwrap(), bytes.len());
            assert_eq!(file.write_at(bytes, 100).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(file.write_at(&bytes[1..513], 0).unwrap_err().kind(), ErrorKind::InvalidInput);
        });
        power_cycle(&disk);
        let bytes = disk.read_file(at("/d/a")).unwrap();
        bytes.len() == 2 * PAGE + 512 && bytes[512..] == [7; 2 * PAGE]
    };
    assert_eq!(count(|seed| stays(seed, Mode::WriteDurable)), SEEDS);
    assert!((1..SEEDS).contains(&count(|seed| stays(seed, Mode::CreateDirect))));
    let disk = disk(1);
    disk.set_direct(false);
    assert_eq!(disk.open(at("/d/a"), Mode::CreateDirect).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn names_in_order_survive_as_a_prefix_and_others_as_any_subset() {
    let survived = |seed, is_ordered| {
        let disk = disk(seed);
        disk.set_ordered(is_ordered);
        for name in 0..6 {
            disk.open(&at("/d").join(name.to_string()), Mode::Create).unwrap();
        }
        power_cycle(&disk);
        (0..6).map(|name| has(&disk, &format!("/d/{name}"))).collect::<Vec<_>>()
    };
    let is_prefix = |names: Vec<bool>| names.is_sorted_by(|a, b| a >= b);
    assert_eq!(count(|seed| is_prefix(survived(seed, true))), SEEDS);
    assert!(count(|seed| is_prefix(survived(seed, false))) < SEEDS / 2);
    let lengths: BTreeSet<_> = (0..SEEDS).map(|seed| survived(seed, true)).collect();
    assert_eq!(lengths.len(), 7);
}

#[test]
fn an_older_change_of_a_name_never_undoes_one_that_is_durable() {
    for seed in 0..SEEDS {
        let disk = disk(seed);
        disk.open(at("/d/a"), Mode::Create).unwrap();
        disk.rename(at("/d/a"), at("/e/a")).unwrap();
        disk.sync_directory(at("/e")).unwrap();
        power_cycle(&disk);
        assert!(has(&disk, "/e/a") && !has(&disk, "/d/a"));
        assert_eq!(disk.status(at("/e/a")).unwrap().links, 1);
    }
}

/// One operation of each kind.
fn one_of_each(disk: &SimDisk) -> io::Result<()> {
    let file = disk.open(at("/d/new"), Mode::Create)?;
    file.write_at(&[2; 2000], 0)?;
    file.allocate(9000)?;
    file.set_len(1500)?;
    file.sync_all()?;
    disk.sync_directory(at("/d"))?;
    disk.rename(at("/d/new"), at("/d/a"))?;
    disk.link(at("/d/a"), at("/e/second"))?;
    disk.make_directory(at("/e/f"))?;
    disk.remove_directory(at("/e/f"))?;
    disk.remove_file(at("/d/a"))?;
    let file = disk.open(at("/e/log"), Mode::WriteDurable)?;
    let mut written = Ok(0);
    with_aligned(2 * PAGE, 5, |bytes| written = file.write_at(bytes, 0));
    written.map(drop)
}

#[test]
fn power_goes_in_the_middle_of_each_operation() {
    let whole = disk(0);
    store(&whole, "/e/log", &[4; 2 * PAGE]);
    let before = whole.operations();
    one_of_each(&whole).unwrap();
    let count = whole.operations() - before;
    assert_eq!(count, 12);
    let (mut torn, mut renamed) = (0, 0);
    for (seed, operation) in (0..SEEDS).flat_map(|seed| (1..=count).map(move |operation| (seed, operation))) {
        let disk = disk(seed);
        store(&disk, "/d/a", &[1; 100]);
        store(&disk, "/e/log", &[4; 2 * PAGE]);
        let old = disk.open(at("/d/a"), Mode::Read).unwrap();
        disk.cut_after(operation);
        assert_eq!(one_of_each(&disk).unwrap_err().to_string(), "power is gone");
        assert!(disk.is_cut() && disk.list(at("/d")).is_err() && old.bytes().is_err());
        disk.restart();
        assert!(!disk.is_cut() && old.bytes().is_err());
        let log = disk.read_file(at("/e/log")).unwrap();
        torn += u64::from(log.contains(&4) && log.contains(&5));
        assert!(operation == count || log == [4; 2 * PAGE]);
        assert!(log.chunks(SECTOR).all(|sector| sector == [4; SECTOR] || sector == [5; SECTOR]));
        if operation == 7 {
            let bytes = disk.read_file(at("/d/a")).unwrap();
            assert!(bytes == [1; 100] || bytes == [2; 1500]);
            renamed += u64::from(bytes == [2; 1500]);
        }
    }
    assert!(torn > 0 && (1..SEEDS).contains(&renamed));
}

#[test]
fn the_same_seed_and_calls_give_the_same_disk() {
    let run = |seed| {
        let disk = disk(seed);
        disk.set_short_writes(true);
        disk.set_failures(Some(5));
        for number in 0..60 {
            let name = at("/d").join((number % 7).to_string());
            if let Ok(file) = disk.open(&name, if number % 3 == 0 { Mode::Create } else { Mode::Write }) {
                file.write_at(&[number; 6000], u64::from(number) * 100).ok();
                file.sync_data().ok();
            }
            disk.rename(&name, &at("/e").join((number % 5).to_string())).ok();
            if number % 20 == 19 {
                power_cycle(&disk);
            }
        }
        (disk.operations(), disk.list(at("/e")).unwrap(), image(&disk))
    };
    assert_eq!(count(|seed| run(seed) == run(seed)), SEEDS);
    assert!(count(|seed| run(seed) == run(seed + 1)) < SEEDS / 10);
}

#[test]
fn room_is_used_up_and_given_back() {
    let can_allocate = |disk: &Arc<SimDisk>| {
        let probed = disk.snapshot();
        probed.make_root(at("/d")).unwrap();
        probed.open(at("/d/probe"), Mode::Create).unwrap().allocate(1).unwrap()
    };
    let disk = (0..).map(SimDisk::new).find(can_allocate).unwrap();
    disk.make_root(at("/d")).unwrap();
    disk.set_room(Some(4 * PAGE_BYTES));
    let file = disk.open(at("/d/a"), Mode::Create).unwrap();
    assert!(file.allocate(2 * PAGE_BYTES).unwrap());
    assert_eq!(disk.free_bytes(at("/d")).unwrap(), 2 * PAGE_BYTES);
    assert_eq!(file.write_at(&[1; 5 * PAGE], 0).unwrap(), 4 * PAGE);
    assert_eq!(file.write_at(&[1], 4 * PAGE_BYTES).unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(file.write_at(&[2; 10], 10).unwrap(), 10);
    assert_eq!(file.allocate(9 * PAGE_BYTES).unwrap_err().kind(), ErrorKind::StorageFull);
    disk.remove_file(at("/d/a")).unwrap();
    assert_eq!(disk.free_bytes(at("/d")).unwrap(), 4 * PAGE_BYTES);
    assert_eq!(file.bytes().unwrap(), 4 * PAGE_BYTES);
}

#[test]
fn locks_and_handles_go_with_the_process_and_nothing_else_does() {
    let disk = disk(3);
    let file = disk.open(at("/d/a"), Mode::Create).unwrap();
    file.write_at(b"cached", 0).unwrap();
    let Locked::Held(old) = disk.lock(at("/d"), LockOf::Directory).unwrap() else { panic!("it is free") };
    assert!(matches!(disk.lock(at("/d"), LockOf::Directory).unwrap(), Locked::Taken(None)));
    disk.end_process();
    assert!(file.write_at(b"more", 0).is_err());
    assert_eq!(disk.read_file(at("/d/a")).unwrap(), b"cached");
    let Locked::Held(new) = disk.lock(at("/d"), LockOf::Directory).unwrap() else { panic!("it is free") };
    drop(old);
    assert!(matches!(disk.lock(at("/d"), LockOf::Directory).unwrap(), Locked::Taken(None)));
    drop(new);
    assert!(matches!(disk.lock(at("/d"), LockOf::Directory).unwrap(), Locked::Held(_)));
    assert!(matches!(disk.lock(at("/e/lock"), LockOf::FileMade).unwrap(), Locked::Held(_)));
}

#[test]
fn what_is_imported_corrupted_and_exported_is_what_is_there() {
    let machine = std::env::temp_dir().join(format!("sim-disk-{}", std::process::id()));
    let disk = disk(4);
    disk.make_directory(at("/d/sub")).unwrap();
    store(&disk, "/d/sub/a", &[9; 5000]);
    disk.export(at("/d"), &machine).unwrap();
    disk.import(&machine, at("/copy")).unwrap();
    fs::remove_dir_all(&machine).unwrap();
    disk.corrupt(at("/copy/sub/a"), |bytes| bytes[4999] = 8).unwrap();
    power_cycle(&disk);
    let bytes = disk.read_file(at("/copy/sub/a")).unwrap();
    assert!(bytes[..4999] == [9; 4999] && bytes[4999..] == [8]);
    assert_eq!(disk.files_below(at("/copy")), [at("/copy/sub/a")]);
}
