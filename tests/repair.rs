//! A repair loses nothing that could be kept, wherever power goes in the middle of it, and may be begun again.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

#[path = "common/sim_disk.rs"]
mod sim_disk;

use std::path::Path;
use std::sync::Arc;

use kurir::change::{Change, FileId, Target, UserId};
use kurir::check::{CheckError, Report, check_on};
use kurir::data::{DataDirectory, DataError};
use kurir::disk::{Directory, Disk, DiskRef};
use kurir::files::{FileJob, FileStore, TransferId};
use kurir::log::{Need, Sync};
use kurir::recovery;
use kurir::store::{Opening, Store, StoreError, WorkError};
use kurir::survey::Survey;
use sim_disk::SimDisk;

const DATA: &str = "/srv/data";
const NOW: u64 = 1_800_000_000_000;
const MESSAGES: usize = 40;

fn disk_ref(disk: &Arc<SimDisk>) -> DiskRef {
    DiskRef::clone(&(Arc::clone(disk) as DiskRef))
}

fn open(disk: &Arc<SimDisk>) -> Result<Store, StoreError> {
    open_with(disk, 4096)
}

/// A new journal gets segments of so many bytes.
fn open_with(disk: &Arc<SimDisk>, segment_bytes: u64) -> Result<Store, StoreError> {
    let directory = DataDirectory::open_on(disk_ref(disk), Path::new(DATA)).map_err(StoreError::Data)?;
    Store::open_in(directory, Opening { segment_bytes, sync: Sync::Always, salt: 7, now: NOW })
}

fn check(disk: &Arc<SimDisk>, repair: bool) -> Result<Report, CheckError> {
    check_on(disk_ref(disk), Path::new(DATA), repair, NOW)
}

fn make(store: &mut Store, change: &Change<'_>) {
    try_make(store, change).unwrap();
}

/// An error when the disk has failed.
fn try_make(store: &mut Store, change: &Change<'_>) -> Result<(), WorkError> {
    while store.log.must_wait() {
        store.commit()?;
    }
    let place = store.log.append(change, Need::More).unwrap();
    store.state.apply(change, place);
    Ok(())
}

/// A disk with a data directory: two accounts, messages in several segments, a stored file, a checkpoint of all that, and a few
/// messages behind it. Each message is a batch.
fn rich_disk() -> Arc<SimDisk> {
    let disk = SimDisk::new(1);
    disk.make_root(Path::new("/srv")).unwrap();
    let mut store = open(&disk).unwrap();
    for (user, name) in [(UserId(0), "messi"), (UserId(1), "henderson")] {
        make(&mut store, &Change::UserAdded { user, name, password_hash: "$" });
    }
    let (file, from, to) = (FileId(0), UserId(0), Target::User(UserId(1)));
    for job in [FileJob::Append(TransferId(1), b"bytes".to_vec()), FileJob::Store(TransferId(1), file)] {
        store.disk.files.run(job).unwrap();
    }
    let sum = Some(crc32c::crc32c(b"bytes"));
    make(&mut store, &Change::FileStored { file, from, to, at: NOW, bytes: 5, name: "hilang.txt", sum });
    let send = |store: &mut Store, count: usize| {
        for number in 0..count {
            let text = format!("{number} {}", "x".repeat(300));
            make(
                store,
                &Change::MessageSent { from, to, at: NOW, from_name: "messi", to_name: "henderson", text: &text },
            );
            store.commit().unwrap();
        }
    };
    send(&mut store, MESSAGES);
    store.disk.journal.close().unwrap();
    let directory = store.directory;
    let mut survey = Survey::of(&directory.journal(), &directory.checkpoints()).unwrap().unwrap();
    recovery::begin_anew(&directory.checkpoints(), &mut survey).unwrap();
    drop(directory);
    let mut store = open(&disk).unwrap();
    send(&mut store, 3);
    store.disk.journal.close().unwrap();
    drop(store.directory);
    disk.end_process();
    disk
}

fn waiting(disk: &Arc<SimDisk>) -> usize {
    let store = open(disk).unwrap();
    store.state.assert_invariants();
    store.state.mailbox(UserId(1)).unwrap().entries().len()
}

#[test]
fn power_may_go_at_any_step_of_a_repair() {
    let disk = rich_disk();
    // The file's record in the checkpoint is lost, the header of an old segment, and the beginning of the journal, in which the
    // file stands too.
    let checkpoint = Path::new("/srv/data/checkpoint/0000000001");
    disk.corrupt(checkpoint, |bytes| {
        let at = memchr::memmem::find(bytes, b"hilang.txt").unwrap();
        bytes[at] ^= 1;
    })
    .unwrap();
    disk.corrupt(Path::new("/srv/data/journal/0000000002.log"), |bytes| bytes[9] ^= 1).unwrap();
    disk.corrupt(Path::new("/srv/data/journal/0000000001.log"), |bytes| bytes[4096..4180].fill(0)).unwrap();
    let last = open(&disk).map(drop);
    assert!(matches!(last, Err(StoreError::Data(DataError::Foreign(_)))), "{last:?}");
    disk.end_process();
    let whole = disk.snapshot();
    let before = whole.operations();
    assert!(check(&whole, true).unwrap().is_good());
    let operations = whole.operations() - before;
    assert!(operations > 20, "{operations}");
    for step in 1..=operations {
        for seed in 0..6 {
            let disk = disk.snapshot();
            disk.set_ordered(seed % 2 == 0);
            disk.cut_after(step);
            assert!(check(&disk, true).is_err() && disk.is_cut(), "step {step}");
            disk.restart();
            let again = check(&disk, true).unwrap_or_else(|error| panic!("step {step}: {error}"));
            assert!(again.is_good(), "step {step}: {again}");
            disk.cut();
            disk.restart();
            assert_eq!(waiting(&disk), MESSAGES + 3, "step {step}");
            let files = disk.files_below(Path::new(DATA));
            let is_kept = |start: &str, name: &str| {
                let is_it =
                    |path: &std::path::PathBuf| path.starts_with(start) && path.to_str().unwrap().contains(name);
                files.iter().any(is_it)
            };
            // What nothing lists is kept for whoever may know what it is, and so is what was damaged.
            assert!(is_kept("/srv/data/lost-files", "0000000000000000"), "step {step}: {files:?}");
            assert!(is_kept("/srv/data/checkpoint", "0000000001.damaged-1"), "step {step}: {files:?}");
            assert!(is_kept("/srv/data/journal", "0000000002.log.damaged-1"), "step {step}: {files:?}");
        }
    }
}

#[test]
fn a_name_that_was_lost_with_its_account_can_be_taken_and_inherits_nothing() {
    let disk = rich_disk();
    disk.corrupt(Path::new("/srv/data/journal/0000000001.log"), |bytes| bytes[4096..4180].fill(0)).unwrap();
    disk.corrupt(Path::new("/srv/data/checkpoint/0000000001"), |bytes| {
        let at = memchr::memmem::find(bytes, b"henderson").unwrap();
        bytes[at] ^= 1;
        // The counters, which stand first and last.
        bytes[60] ^= 1;
        let end = bytes.len() - 60;
        bytes[end] ^= 1;
    })
    .unwrap();
    assert!(check(&disk, true).unwrap().is_good());
    let mut store = open(&disk).unwrap();
    store.state.assert_invariants();
    assert_eq!(store.state.user_named("henderson"), None);
    let user = store.state.next_user();
    assert!(user.0 > 2, "{user:?} was somebody else's number");
    make(&mut store, &Change::UserAdded { user, name: "henderson", password_hash: "$" });
    assert!(store.state.mailbox(user).unwrap().entries().is_empty());
    assert_eq!(store.state.file_listed(user, "messi", "hilang.txt"), None);
    assert!(store.state.next_file().0 > 0);
    // What the sender lists is there.
    let file = store.state.file_listed(UserId(0), "henderson", "hilang.txt").unwrap();
    assert_eq!(store.disk.files.bytes(file).unwrap(), 5);
}

#[test]
fn what_stands_behind_damage_gets_ids_that_nothing_had() {
    let disk = rich_disk();
    let store = open(&disk).unwrap();
    let mailbox = store.state.mailbox(UserId(1)).unwrap();
    let given = mailbox.last_id();
    let damaged = mailbox.entries()[MESSAGES].place().lsn;
    let layout = store.log.layout();
    drop(store);
    disk.end_process();
    let path = Path::new(DATA).join("journal").join(kurir::segment::Layout::name(layout.segment(damaged)));
    let at = usize::try_from(layout.offset(damaged)).unwrap() + 40;
    disk.corrupt(&path, |bytes| bytes[at] ^= 1).unwrap();
    assert!(check(&disk, true).unwrap().is_good());
    let store = open(&disk).unwrap();
    let mailbox = store.state.mailbox(UserId(1)).unwrap();
    assert_eq!(mailbox.entries().len(), MESSAGES + 2);
    let ids: Vec<u64> = mailbox.entries().range(MESSAGES..).map(|entry| entry.id(mailbox.last_id())).collect();
    assert!(ids.iter().all(|id| *id > given), "{ids:?} and {given}");
}

#[test]
fn a_repair_gives_no_id_again_that_the_lost_end_of_a_journal_may_have_given() {
    let disk = rich_disk();
    let store = open(&disk).unwrap();
    let last_id = |store: &Store| store.state.mailbox(UserId(1)).unwrap().last_id();
    let (given, layout) = (last_id(&store), store.log.layout());
    let last = store.state.mailbox(UserId(1)).unwrap().entries().back().unwrap().place().lsn;
    drop(store);
    disk.end_process();
    let path = Path::new(DATA).join("journal").join(kurir::segment::Layout::name(layout.segment(last)));
    let from = usize::try_from(layout.offset(last)).unwrap();
    // Zeros look like a journal that ends there. What asks for the repair is the file.
    disk.corrupt(&path, |bytes| bytes[from..].fill(0)).unwrap();
    let file = disk.files_below(&Path::new(DATA).join("files")).into_iter().next().unwrap();
    disk.corrupt(&file, |bytes| bytes[0] ^= 1).unwrap();
    assert!(check(&disk, true).unwrap().is_good());
    let store = open(&disk).unwrap();
    assert_eq!(store.state.mailbox(UserId(1)).unwrap().entries().len(), MESSAGES + 2);
    assert!(last_id(&store) >= given, "{} and {given}", last_id(&store));
}

#[test]
fn what_a_start_has_wiped_stays_wiped_when_power_goes() {
    let disk = SimDisk::new(1);
    disk.make_root(Path::new("/srv")).unwrap();
    // Several blocks, so that what was torn goes on behind the one that the end is in.
    let mut store = open_with(&disk, 64 * 1024).unwrap();
    make(&mut store, &Change::UserAdded { user: UserId(0), name: "messi", password_hash: "$" });
    store.commit().unwrap();
    let end = store.log.end();
    let first = &Change::UserAdded { user: UserId(1), name: &"x".repeat(40), password_hash: &"y".repeat(5000) };
    make(&mut store, first);
    make(&mut store, &Change::UserAdded { user: UserId(2), name: "z", password_hash: &"z".repeat(5000) });
    store.commit().unwrap();
    let layout = store.log.layout();
    let path = store.directory.journal().join(&kurir::segment::Layout::name(layout.segment(end)));
    drop(store);
    disk.end_process();
    // The write was torn: its second record is whole, its first is not.
    disk.corrupt(&path, |bytes| {
        let at = memchr::memmem::find(bytes, &[b'y'; 100]).unwrap();
        bytes[at + 50] ^= 1;
    })
    .unwrap();
    let mut failed = 0;
    for seed in 0..60 {
        let disk = disk.snapshot();
        // A start before may have wiped it in the page cache alone, and failed to sync that.
        disk.set_failures(Some(4));
        failed += u64::from(open(&disk).is_err());
        disk.set_failures(None);
        disk.end_process();
        let store = open(&disk).unwrap();
        assert_eq!(store.state.users().count(), 1);
        let end = usize::try_from(layout.offset(store.log.end())).unwrap();
        drop(store);
        disk.cut();
        disk.restart();
        for _ in 0..seed % 10 {
            disk.cut();
            disk.restart();
        }
        let bytes = disk.read_file(&path).unwrap();
        assert!(memchr::memmem::find(&bytes, &[b'z'; 100]).is_none(), "what was torn is there again");
        assert!(bytes[end..].iter().all(|byte| *byte == 0));
    }
    assert!(failed > 20, "{failed}");
}

#[test]
fn what_is_acknowledged_in_the_place_of_a_linked_segment_stays() {
    let disk = SimDisk::new(1);
    disk.make_root(Path::new("/srv")).unwrap();
    let mut store = open(&disk).unwrap();
    make(&mut store, &Change::UserAdded { user: UserId(0), name: "messi", password_hash: "$" });
    store.commit().unwrap();
    let name = kurir::segment::Layout::name(store.log.layout().segment(store.log.end()));
    store.directory.journal().link_into(&name, store.directory.root(), "linked").unwrap();
    store.directory.root().sync().unwrap();
    drop(store);
    disk.end_process();
    // A start before may have been killed at any step.
    for step in 0..40 {
        let disk = disk.snapshot();
        if step > 0 {
            disk.cut_after(step);
            drop(open(&disk));
            disk.was_no_cut();
        }
        for _ in 0..12 {
            let disk = disk.snapshot();
            let mut store = open(&disk).unwrap();
            make(&mut store, &Change::UserAdded { user: UserId(1), name: "henderson", password_hash: "$" });
            store.commit().unwrap();
            drop(store);
            disk.cut();
            disk.restart();
            assert_eq!(open(&disk).unwrap().state.users().count(), 2, "step {step}");
        }
        for _ in 0..12 {
            let disk = disk.snapshot();
            disk.set_ordered(false);
            drop(open(&disk).unwrap());
            disk.cut();
            disk.restart();
            // What is written is acknowledged before anything else syncs the name of the copy.
            assert_eq!(disk.status(&Path::new(DATA).join("journal").join(&name)).unwrap().links, 1, "step {step}");
        }
    }
}

#[test]
fn a_checkpoint_whose_name_a_killed_process_did_not_sync_is_there_or_the_one_before() {
    let disk = rich_disk();
    for step in 1..60 {
        let disk = disk.snapshot();
        let directory = DataDirectory::open_on(disk_ref(&disk), Path::new(DATA)).unwrap();
        let mut survey = Survey::of(&directory.journal(), &directory.checkpoints()).unwrap().unwrap();
        disk.cut_after(step);
        let killed = recovery::begin_anew(&directory.checkpoints(), &mut survey);
        drop(directory);
        if !disk.is_cut() {
            assert!(killed.is_ok() && step > 5, "step {step}");
            return;
        }
        disk.was_no_cut();
        for _ in 0..12 {
            let disk = disk.snapshot();
            drop(open(&disk).unwrap());
            disk.cut();
            disk.restart();
            assert_eq!(waiting(&disk), MESSAGES + 3, "step {step}");
        }
    }
    panic!("it never ends");
}

#[test]
fn a_process_that_is_killed_at_any_step_takes_nothing_from_the_next() {
    let accounts_and_a_file = |store: &mut Store, number: u32| {
        let user = store.state.next_user();
        try_make(store, &Change::UserAdded { user, name: &format!("user{number}"), password_hash: "$" })
            .map_err(drop)?;
        store.commit().map_err(drop)?;
        let (file, transfer) = (store.state.next_file(), TransferId(1));
        for job in [FileJob::Append(transfer, b"bytes".to_vec()), FileJob::Store(transfer, file)] {
            store.disk.files.run(job).map_err(drop)?;
        }
        let (from, to, sum) = (user, Target::User(user), Some(crc32c::crc32c(b"bytes")));
        try_make(store, &Change::FileStored { file, from, to, at: NOW, bytes: 5, name: "a", sum }).map_err(drop)?;
        store.commit().map_err(drop)
    };
    for step in 1..200 {
        let disk = SimDisk::new(step);
        disk.make_root(Path::new("/srv")).unwrap();
        disk.cut_after(step);
        let killed = open(&disk).map_err(drop).and_then(|mut store| accounts_and_a_file(&mut store, 0));
        if !disk.is_cut() {
            assert!(killed.is_ok() && step > 20, "step {step}");
            return;
        }
        // It was the process alone: what the machine has in memory stays, and is synced, or not.
        disk.was_no_cut();
        for round in 0..12 {
            let disk = disk.snapshot();
            // Where a sync of one directory says nothing of another, more can be lost.
            disk.set_ordered(round % 2 == 0);
            let mut store = open(&disk).unwrap();
            accounts_and_a_file(&mut store, 1).unwrap();
            let (users, files) = (store.state.users().count(), store.state.files().count());
            drop(store);
            disk.cut();
            disk.restart();
            let store = open(&disk).unwrap_or_else(|error| panic!("step {step}: {error}"));
            assert_eq!((store.state.users().count(), store.state.files().count()), (users, files), "step {step}");
            for (file, _) in store.state.files() {
                assert!(store.disk.files.bytes(file).is_ok_and(|bytes| bytes == 5), "step {step}: {file:?}");
            }
        }
    }
    panic!("it never ends");
}

#[test]
fn the_segments_that_a_start_goes_on_with_stay_when_power_goes() {
    // The server acknowledges what it writes to them before it makes another, which would sync their names.
    let segments = |disk: &Arc<SimDisk>| disk.files_below(&Path::new(DATA).join("journal"));
    for step in 1..200 {
        let disk = SimDisk::new(step);
        disk.make_root(Path::new("/srv")).unwrap();
        disk.cut_after(step);
        drop(open(&disk));
        if !disk.is_cut() {
            assert!(step > 20, "step {step}");
            return;
        }
        disk.was_no_cut();
        for round in 0..12 {
            let disk = disk.snapshot();
            disk.set_ordered(round % 2 == 0);
            drop(open(&disk).unwrap());
            let before = segments(&disk);
            disk.cut();
            disk.restart();
            assert_eq!(segments(&disk), before, "step {step}");
        }
    }
    panic!("it never ends");
}

#[test]
fn a_file_that_is_stored_after_a_sync_failed_stays_when_power_goes() {
    let mut failed = 0;
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        disk.set_ordered(false);
        disk.make_root(Path::new("/srv")).unwrap();
        let mut store = open(&disk).unwrap();
        disk.set_failures(Some(3));
        let stored = (1..100).find(|transfer| {
            let (file, transfer) = (FileId(0), TransferId(*transfer));
            let jobs = [FileJob::Append(transfer, b"bytes".to_vec()), FileJob::Store(transfer, file)];
            let is_stored = jobs.into_iter().all(|job| store.disk.files.run(job).is_ok());
            failed += u32::from(!is_stored);
            is_stored
        });
        assert!(stored.is_some(), "seed {seed}");
        disk.set_failures(None);
        disk.cut();
        disk.restart();
        assert!(
            FileStore::new(Directory::new(disk_ref(&disk), Path::new(DATA).join("files")))
                .bytes(FileId(0))
                .is_ok_and(|bytes| bytes == 5),
            "seed {seed}"
        );
    }
    assert!(failed > 20, "{failed}");
}
