//! Workers in memory, for tests that drive the engine without a disk: a journal, stored files, and passwords that cost
//! nothing, each of which can be made to fail or to wait.

#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod process;

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;

use kurir::change::{FileId, Lsn};
use kurir::compaction::{Compacted, CompactionJob};
use kurir::engine::{Completion, Engine, Job, Registration};
use kurir::files::{FileDone, FileJob, TransferId};
use kurir::inbox::{TextsDone, TextsJob};
use kurir::limits::Limits;
use kurir::local::Workers;
use kurir::log::{Batch, Log};
use kurir::password::{PasswordDone, PasswordJob};
use kurir::segment::Layout;
use kurir::space::{SpaceDone, SpaceJob};
use kurir::state::State;
use kurir::upkeep::Holdings;

/// As large as a server's.
const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 16 * 1024 * 1024 };
/// Does every job at once, in memory.
#[derive(Default)]
pub(crate) struct MemoryWorkers {
    pub(crate) disk: MemoryDisk,
    pub(crate) files: HashMap<FileId, Vec<u8>>,
    /// None for one that has failed, as in the real store.
    uploads: HashMap<TransferId, Option<Vec<u8>>>,
    /// What each one reads stays as it was when it began, whatever becomes of the file.
    downloads: HashMap<TransferId, Vec<u8>>,
    /// Nothing more fits on the disk.
    pub(crate) is_disk_full: bool,
    /// Password jobs wait here while this is set.
    pub(crate) held_passwords: Option<Vec<PasswordJob>>,
}

/// A journal in memory, of which nothing is ever lost.
pub(crate) struct MemoryDisk {
    layout: Layout,
    /// What every space job is answered.
    fixed: Option<SpaceDone>,
    /// Their contents without the headers.
    segments: BTreeMap<u64, Vec<u8>>,
    /// All before this is written.
    written: Lsn,
}

impl Default for MemoryDisk {
    fn default() -> Self {
        Self { layout: LAYOUT, fixed: None, segments: BTreeMap::new(), written: LAYOUT.first() }
    }
}

impl MemoryDisk {
    fn segment(&mut self, number: u64) -> &mut Vec<u8> {
        let bytes = usize::try_from(self.layout.segment_bytes).unwrap();
        self.segments.entry(number).or_insert_with(|| vec![0; bytes])
    }

    fn write(&mut self, start: Lsn, bytes: &[u8]) {
        let (mut at, mut rest) = (start, bytes);
        while !rest.is_empty() {
            let place = usize::try_from(at.0 % self.layout.segment_bytes).unwrap();
            let segment = self.segment(self.layout.segment(at));
            let (now, later) = rest.split_at(rest.len().min(segment.len() - place));
            segment[place..place + now.len()].copy_from_slice(now);
            at.0 += now.len() as u64;
            rest = later;
        }
        self.written = at;
    }

    fn read(&self, job: &TextsJob) -> std::io::Result<Vec<u8>> {
        let mut out = Vec::new();
        for place in &job.places {
            for at in place.lsn.0..place.end().0 {
                let segment = self.segments.get(&self.layout.segment(Lsn(at))).ok_or(std::io::ErrorKind::NotFound)?;
                out.push(segment[usize::try_from(at % self.layout.segment_bytes).unwrap()]);
            }
        }
        Ok(out)
    }

    fn space(&mut self, job: &SpaceJob, is_disk_full: bool) -> SpaceDone {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        let next = self.segments.last_key_value().map_or(1, |(last, _)| last + 1);
        let is_full = job.is_more_wanted && is_disk_full;
        if job.is_more_wanted && !is_full {
            self.segment(next);
        }
        let last = self.segments.last_key_value().map_or(0, |(last, _)| *last);
        let segments = self.segments.len() as u64;
        SpaceDone { room: self.layout.start(last + 1), is_full, segments, spare: 0, has_copy: false }
    }
}

/// A fresh engine with room for everything, which looks at requests ahead.
pub(crate) fn engine(limits: Limits, registration: Registration) -> Engine {
    let log = Log::new(LAYOUT, LAYOUT.first());
    let mut engine = Engine::new(limits, registration, State::new(LAYOUT.segment_bytes), log, Holdings::default());
    engine.set_ahead_users_min(0);
    engine
}

/// The same with no text in memory that is not on its way to the disk.
pub(crate) fn engine_without_tail(limits: Limits, registration: Registration) -> Engine {
    let mut log = Log::new(LAYOUT, LAYOUT.first());
    log.set_tail_bytes(0);
    Engine::new(limits, registration, State::new(LAYOUT.segment_bytes), log, Holdings::default())
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
    /// What a disk says that is full, or that has no end of room.
    pub(crate) fn set_disk(&mut self) -> Completion {
        let reserve = Log::new(LAYOUT, LAYOUT.first()).reserve_bytes();
        let is_full = self.is_disk_full;
        let room = if is_full { Lsn(self.disk.written.0 + reserve) } else { Lsn(u64::MAX) };
        let done = SpaceDone { room, is_full, segments: 1, spare: 0, has_copy: false };
        self.disk.fixed = Some(done);
        Completion::Space(done)
    }

    fn write(&mut self, mut batch: Batch) -> Completion {
        self.disk.write(batch.start, batch.seal());
        Completion::Settled { batch, synced: self.disk.written }
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
                let content = content.expect("an upload that is stored was begun");
                let sum = crc32c::crc32c(&content);
                self.files.insert(file, content);
                Some(FileDone::Stored(transfer, sum))
            }
            FileJob::Forget(transfer) => {
                self.uploads.remove(&transfer);
                self.downloads.remove(&transfer);
                Some(FileDone::Forgotten(transfer))
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

    /// How much of each upload has been written.
    pub(crate) fn uploaded(&self) -> Vec<usize> {
        self.uploads.values().flatten().map(Vec::len).collect()
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
            Job::Journal(batch) => report(self.write(batch)),
            Job::Texts(job) => {
                let records = self.disk.read(&job);
                report(Completion::Texts(TextsDone { connection: job.connection, records }));
            }
            Job::Space(job) => report(Completion::Space(self.disk.space(&job, self.is_disk_full))),
            // There is no room for checkpoints.
            Job::Compact(CompactionJob::Begin(_)) => report(Completion::Compacted(Compacted::NoRoom)),
            Job::Compact(_) => {}
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
