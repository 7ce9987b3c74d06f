//! Workers in memory, for tests that drive the engine without a disk: a journal, stored files, and passwords that cost
//! nothing, each of which can be made to fail or to wait.

#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod process;

use std::collections::HashMap;
use std::convert::Infallible;

use kurir::change::FileId;
use kurir::change::Lsn;
use kurir::engine::{Completion, Engine, Job, Registration};
use kurir::files::{FileDone, FileJob, TransferId};
use kurir::journal::{Batch, Log, RESERVE_BYTES, WAIT_BYTES};
use kurir::limits::Limits;
use kurir::local::Workers;
use kurir::password::{PasswordDone, PasswordJob};
use kurir::state::State;

/// Stands at the start of the journal in memory.
pub(crate) const JOURNAL_START: Lsn = Lsn(20);
const SALT: u32 = 7;
const PLENTY: u64 = 1 << 40;
const TIGHT_BYTES: u64 = 600;

/// Does every job at once, in memory.
#[derive(Default)]
pub(crate) struct MemoryWorkers {
    /// Batches that are durable.
    pub(crate) durable: Vec<u8>,
    pub(crate) files: HashMap<FileId, Vec<u8>>,
    /// None for one that has failed, as in the real store.
    uploads: HashMap<TransferId, Option<Vec<u8>>>,
    /// What each one reads stays as it was when it began, whatever becomes of the file.
    downloads: HashMap<TransferId, Vec<u8>>,
    /// Nothing more fits on the disk.
    pub(crate) is_disk_full: bool,
    /// Room is made in small steps, so that requests must wait for it.
    pub(crate) is_room_tight: bool,
    /// Password jobs wait here while this is set.
    pub(crate) held_passwords: Option<Vec<PasswordJob>>,
}

/// A fresh engine with room for everything.
pub(crate) fn engine(limits: Limits, registration: Registration) -> Engine {
    Engine::new(limits, registration, State::default(), Log::new(SALT, JOURNAL_START))
}

/// What a password is kept as.
pub(crate) fn hash(password: &str) -> String {
    format!("plain {password}")
}

pub(crate) fn check(job: &PasswordJob) -> PasswordDone {
    let passed = job.check.as_ref().is_none_or(|(password, known)| known.as_ref() == Some(&hash(password)));
    let hash = job.hash.as_ref().filter(|_| passed).map(|password| hash(password));
    PasswordDone { connection: job.connection, passed, hash }
}

impl MemoryWorkers {
    /// What room the disk has for the journal.
    pub(crate) fn room(&self) -> Completion {
        let end = JOURNAL_START.0 + self.durable.len() as u64;
        let (ahead, is_full) = match (self.is_disk_full, self.is_room_tight) {
            (true, _) => (RESERVE_BYTES, true),
            (false, true) => (WAIT_BYTES + TIGHT_BYTES, false),
            (false, false) => (PLENTY, false),
        };
        Completion::Room { room: Lsn(end + ahead), is_full, synced: Lsn(end) }
    }

    fn write(&mut self, batch: Batch) -> Completion {
        self.durable.extend_from_slice(&batch.bytes);
        let synced = batch.end();
        Completion::Settled { batch, synced }
    }

    pub(crate) fn file(&mut self, job: FileJob) -> Option<FileDone> {
        match job {
            FileJob::Append(transfer, _) | FileJob::Store(transfer, _)
                if self.is_disk_full || self.uploads.get(&transfer).is_some_and(Option::is_none) =>
            {
                self.uploads.insert(transfer, None);
                Some(FileDone::DiskFull(transfer))
            }
            FileJob::Append(transfer, mut block) => {
                let upload = self.uploads.entry(transfer).or_insert_with(|| Some(Vec::new()));
                upload.as_mut().expect("not failed").append(&mut block);
                Some(FileDone::Appended(transfer, block))
            }
            FileJob::Store(transfer, file) => {
                let content = self.uploads.remove(&transfer).flatten();
                self.files.insert(file, content.expect("an upload that is stored was begun"));
                Some(FileDone::Stored(transfer))
            }
            FileJob::Forget(transfer) => {
                self.uploads.remove(&transfer);
                self.downloads.remove(&transfer);
                None
            }
            FileJob::Read { transfer, file, offset, bytes } => {
                if let Some(content) = self.files.get(&file)
                    && !self.downloads.contains_key(&transfer)
                {
                    self.downloads.insert(transfer, content.clone());
                }
                let content = self.downloads.get(&transfer);
                let start = usize::try_from(offset).unwrap();
                Some(match content.and_then(|content| content.get(start..start + bytes)) {
                    Some(block) => FileDone::Block(transfer, block.to_vec()),
                    None => FileDone::Unreadable(transfer, std::io::ErrorKind::NotFound.into()),
                })
            }
            FileJob::Remove(file) => {
                self.files.remove(&file).expect("a file that is removed was stored");
                None
            }
        }
    }

    /// Forgets what was under way, as a process does that ends.
    pub(crate) fn forget_transfers(&mut self) {
        self.uploads.clear();
        self.downloads.clear();
    }

    /// Transfers that hold something.
    pub(crate) fn transfers(&self) -> usize {
        self.uploads.len() + self.downloads.len()
    }
}

impl Workers for MemoryWorkers {
    type Error = Infallible;

    fn run(&mut self, job: Job, mut report: impl FnMut(Completion)) -> Result<(), Infallible> {
        match job {
            Job::Journal(batch) => {
                report(self.write(batch));
                report(self.room());
            }
            Job::Password(job) => match &mut self.held_passwords {
                Some(held) => held.push(job),
                None => report(Completion::Password(check(&job))),
            },
            Job::File(job) => {
                if let Some(done) = self.file(job) {
                    report(Completion::File(done));
                }
            }
        }
        Ok(())
    }
}
