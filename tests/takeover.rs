//! A data directory of format 3, made by the last program of that format (`tests/format-3/make.py`), is taken over whole, also
//! when power goes at any step of it, and can be gone back to.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

#[path = "common/sim_disk.rs"]
mod sim_disk;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kurir::connection::{ConnectionId, Peer};
use kurir::data::{DataDirectory, DataError};
use kurir::disk::{Disk, DiskRef};
use kurir::engine::{Engine, Registration};
use kurir::limits::Limits;
use kurir::local::Local;
use kurir::log::Sync;
use kurir::password::Hasher;
use kurir::segment::VERSION;
use kurir::state::State;
use kurir::store::{Opening, Store, StoreError, StoreWorkers};
use kurir::takeover::KEPT_MS;
use kurir::{check, segment};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sim_disk::SimDisk;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
const DATA: &str = "/srv/data";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/format-3")
}

/// What the last program of format 3 said of it.
fn expected() -> Value {
    serde_json::from_slice(&fs::read(fixture().join("expected.json")).unwrap()).unwrap()
}

/// The paths of all files below a directory, and what is in them.
fn files(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => directories.push(path),
                false => found.push((path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap())),
            }
        }
    }
    found.retain(|(path, _)| path != Path::new("lock"));
    found.sort();
    found
}

fn copy_fixture() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, bytes) in files(&fixture().join("data")) {
        let into = root.path().join(path);
        fs::create_dir_all(into.parent().unwrap()).unwrap();
        fs::write(into, bytes).unwrap();
    }
    root
}

/// A server in memory on a data directory on the disk.
struct Server {
    _directory: DataDirectory,
    local: Local<StoreWorkers>,
    id: ConnectionId,
}

impl Server {
    fn start(root: &Path, now: u64) -> Self {
        let directory = DataDirectory::open(root).unwrap();
        let opening = Opening { segment_bytes: 1 << 20, sync: Sync::Always, salt: 1, now };
        let Store { directory, state, log, holdings, disk } = Store::open_in(directory, opening).unwrap();
        state.assert_invariants();
        let engine = Engine::new(Limits::default(), Registration::Closed, state, log, holdings);
        let mut local = Local::new(engine, StoreWorkers { disk, hasher: Hasher::new().unwrap() }, now);
        let id = local.open(Peer::Admin);
        Self { _directory: directory, local, id }
    }

    fn request(&mut self, line: &str) -> Value {
        serde_json::from_slice(&self.local.request(self.id, line).unwrap()).unwrap()
    }

    fn data(&mut self, line: &str) -> Value {
        let reply = self.request(line);
        assert_eq!(reply["status"], "OK", "{line}: {reply}");
        reply["data"].clone()
    }
}

#[test]
fn a_directory_of_format_3_is_taken_over_whole_and_kept_as_it_was() {
    let (root, expected) = (copy_fixture(), expected());
    let now = expected["tokens_good_until_ms"].as_u64().unwrap() - DAY_MS;
    // Twice: as it is taken over, and as it is read from what that left.
    for pass in 0..2 {
        let mut server = Server::start(root.path(), now);
        for known in expected["tokens"].as_array().unwrap() {
            server.data(&format!("MY GROUP {}", known["token"].as_str().unwrap()));
        }
        for ended in expected["ended_tokens"].as_array().unwrap() {
            let refused = server.request(&format!("MY GROUP {}", ended["token"].as_str().unwrap()));
            assert_eq!(refused["data"], "token tidak valid", "{ended}");
        }
        for (name, password) in expected["removed"].as_object().unwrap() {
            let refused = server.request(&format!("AUTH {name} {}", password.as_str().unwrap()));
            assert_eq!(refused["data"], "username atau password salah", "{name}");
        }
        for (name, known) in expected["users"].as_object().unwrap() {
            let token = server.data(&format!("AUTH {name} {}", known["password"].as_str().unwrap()));
            let token = token.as_str().unwrap();
            assert_eq!(server.data(&format!("MY FILE {token}")), known["files"], "{name}");
            assert_eq!(server.data(&format!("MY GROUP {token}")), known["groups"], "{name}");
            for (party, names) in known["contents"].as_object().unwrap() {
                for (file, content) in names.as_object().unwrap() {
                    let data = server.data(&format!("DOWNLOAD FILE {token} {party} {file}"));
                    let bytes = STANDARD.decode(data.as_str().unwrap()).unwrap();
                    let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                    assert_eq!(
                        (sum.as_str(), bytes.len() as u64),
                        (content["sha256"].as_str().unwrap(), content["size"].as_u64().unwrap())
                    );
                }
            }
            // The mailboxes are emptied in the last pass.
            if pass == 1 {
                assert_eq!(server.data(&format!("INBOX {token}")), known["inbox"], "{name}");
            }
        }
    }
    assert_eq!(files(&root.path().join("format-3")), files(&fixture().join("data")), "whoever goes back has all of it");
    let report = check::check(root.path(), false).unwrap();
    assert!(report.is_good(), "{report}");
}

#[test]
fn the_copy_of_the_older_format_goes_after_seven_days_of_running() {
    let root = copy_fixture();
    let copy = root.path().join("format-3");
    let mut server = Server::start(root.path(), 1_800_000_000_000);
    let mut days = 0;
    while copy.exists() {
        days += 1;
        assert!(days <= 8, "it never goes");
        for _ in 0..24 * 6 {
            server.local.pass(DAY_MS / 24 / 6);
            server.local.turn().unwrap();
            server.local.settle().unwrap();
        }
        if days == 3 {
            // Only what a server has seen pass counts, over as many lives as it takes.
            drop(server);
            server = Server::start(root.path(), 1_800_000_000_000);
        }
    }
    // A start takes what was not written down yet with it.
    assert!((7..=8).contains(&days), "{days}");
    assert_eq!(KEPT_MS, 7 * DAY_MS);
}

fn opening() -> Opening {
    Opening { segment_bytes: 1 << 20, sync: Sync::Always, salt: 1, now: 1_800_000_000_000 }
}

fn open(disk: &Arc<SimDisk>) -> Result<Store, StoreError> {
    let disk = DiskRef::clone(&(Arc::clone(disk) as DiskRef));
    let directory = DataDirectory::open_on(disk, Path::new(DATA)).map_err(StoreError::Data)?;
    Store::open_in(directory, opening())
}

#[test]
fn power_may_go_at_any_step_of_taking_over() {
    let disk = SimDisk::new(1);
    disk.make_root(Path::new("/srv")).unwrap();
    disk.import(&fixture().join("data"), Path::new(DATA)).unwrap();
    let whole = disk.snapshot();
    let before = whole.operations();
    let state: State = open(&whole).unwrap().state;
    state.assert_invariants();
    let operations = whole.operations() - before;
    assert!(operations > 50, "{operations}");
    let mut taken_over = 0;
    for step in 1..=operations {
        for is_ordered in [false, true] {
            let disk = disk.snapshot();
            disk.set_ordered(is_ordered);
            disk.cut_after(step);
            assert!(open(&disk).is_err() && disk.is_cut(), "step {step}");
            disk.restart();
            taken_over += u64::from(
                disk.list(Path::new("/srv/data/checkpoint")).unwrap().iter().any(|entry| entry.name == "0000000006"),
            );
            // And once more, while it is done again.
            disk.cut_after(1 + step * 7 % operations);
            let again = open(&disk);
            drop(again);
            if disk.is_cut() {
                disk.restart();
            } else {
                disk.end_process();
                disk.cut_after(u64::MAX / 2);
            }
            let store = open(&disk).unwrap_or_else(|error| panic!("step {step}: {error}"));
            assert!(store.state == state, "step {step}");
            let copy = disk.files_below(Path::new("/srv/data/format-3"));
            assert_eq!(copy.len(), files(&fixture().join("data")).len(), "step {step}");
            for path in copy {
                let original = fixture().join("data").join(path.strip_prefix("/srv/data/format-3").unwrap());
                assert!(disk.read_file(&path).unwrap() == fs::read(original).unwrap(), "step {step}: {path:?}");
            }
        }
    }
    assert!(taken_over > 0, "no cut came behind the step that counts");
}

#[test]
fn what_is_taken_over_is_format_4_and_says_what_format_3_did_not() {
    let root = copy_fixture();
    let store = Store::open(root.path(), 1 << 20, Sync::Always).unwrap();
    let journal = store.directory.journal();
    let last = *store.log.segments().last().unwrap();
    assert_eq!(segment::header_of(&journal, last).unwrap().unwrap().version, VERSION);
    assert_eq!(segment::header_of(&journal, 1).unwrap().unwrap().version, 3, "what is older stays as it is");
    assert!(store.state.files().count() > 20);
    assert!(store.state.files().all(|(_, stored)| stored.at > 0 && !stored.from_name.is_empty()));
    assert!(
        store.state.groups().all(|group| group.joined().iter().all(|joined| *joined == store.log.layout().start(last)))
    );
}

#[test]
fn a_damaged_directory_of_format_3_is_repaired_by_taking_it_over() {
    for at in [0, 50, 100, 3000] {
        let root = copy_fixture();
        let checkpoint = root.path().join("checkpoint/0000000005");
        let mut bytes = fs::read(&checkpoint).unwrap();
        bytes[at] ^= 1;
        fs::write(&checkpoint, &bytes).unwrap();
        let refused = Store::open(root.path(), 1 << 20, Sync::Always).map(drop);
        assert!(matches!(refused, Err(StoreError::Data(DataError::Damaged(..)))), "byte {at}: {refused:?}");
        assert!(check::check(root.path(), true).unwrap().is_good());
        let report = check::check(root.path(), false).unwrap();
        assert!(report.is_good(), "{report}");
        Store::open(root.path(), 1 << 20, Sync::Always).unwrap().state.assert_invariants();
        assert!(root.path().join("checkpoint/0000000005.damaged-1").exists());
    }
}
