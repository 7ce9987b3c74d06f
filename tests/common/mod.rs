//! Workers in memory, for tests that drive the engine without a disk: a journal, stored files, and passwords that cost
//! nothing, each of which can be made to fail or to wait.

#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod process;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::fs;
use std::path::Path;

use kurir::aligned::BLOCK_BYTES;
use kurir::change::{FileId, Lsn, Place};
use kurir::checkpoint::{self, Checkpoint};
use kurir::compaction::{Compacted, CompactionJob, Compactor, Needed};
use kurir::connection::ConnectionId;
use kurir::data;
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
use kurir::texts;
use kurir::upkeep::Holdings;
use tempfile::TempDir;

/// As large as a server's.
const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 16 * 1024 * 1024 };
/// Small, so that a simulation has many of them.
pub(crate) const LAYOUT_SMALL: Layout = Layout { salt: 7, segment_bytes: BLOCK_BYTES as u64 };

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
    /// What is written stays unsynced until [`Self::sync`].
    pub(crate) is_interval: bool,
    /// Password jobs wait here while this is set.
    pub(crate) held_passwords: Option<Vec<PasswordJob>>,
}

/// A journal's files in memory.
pub(crate) struct MemoryDisk {
    layout: Layout,
    /// What every space job is answered.
    pub(crate) fixed: Option<SpaceDone>,
    /// Their contents without the headers.
    pub(crate) segments: BTreeMap<u64, Vec<u8>>,
    pool: BTreeSet<u64>,
    checkpoints: BTreeMap<u64, Vec<u8>>,
    /// All before this is written.
    pub(crate) written: Lsn,
    /// All before this stays when power goes.
    pub(crate) synced: Lsn,
    /// What was there before it was written over, by where it stands, as long as that is not synced.
    before: BTreeMap<u64, Vec<u8>>,
    pub(crate) compactions: usize,
    pub(crate) recycled: usize,
    pub(crate) relocated: usize,
    pub(crate) relocated_files: usize,
    is_strict: bool,
    /// A checkpoint that is being written, and where.
    compactor: Option<(Compactor, TempDir)>,
}

/// What power leaves of what was not synced is decided by sectors of this size.
const SECTOR_BYTES: u64 = 512;

impl Default for MemoryDisk {
    fn default() -> Self {
        Self::new(LAYOUT)
    }
}

impl MemoryDisk {
    /// An empty one.
    pub(crate) fn new(layout: Layout) -> Self {
        Self {
            layout,
            fixed: None,
            segments: BTreeMap::new(),
            pool: BTreeSet::new(),
            checkpoints: BTreeMap::new(),
            written: layout.first(),
            synced: layout.first(),
            before: BTreeMap::new(),
            compactions: 0,
            recycled: 0,
            relocated: 0,
            relocated_files: 0,
            is_strict: false,
            compactor: None,
        }
    }

    fn empty_segment(&self) -> Vec<u8> {
        vec![0; usize::try_from(self.layout.segment_bytes).unwrap()]
    }

    /// Writes at a position. Segments are made where there are none.
    pub(crate) fn write(&mut self, start: Lsn, bytes: &[u8]) {
        let (mut at, empty) = (start, self.empty_segment());
        for byte in bytes {
            let sector = at.0 - at.0 % SECTOR_BYTES;
            let number = self.layout.segment(at);
            assert!(!self.is_strict || self.segments.contains_key(&number), "written where no segment is");
            let segment = self.segments.entry(number).or_insert_with(|| empty.clone());
            let place = usize::try_from(at.0 % self.layout.segment_bytes).unwrap();
            let first = usize::try_from(sector % self.layout.segment_bytes).unwrap();
            self.before
                .entry(sector)
                .or_insert_with(|| segment[first..first + usize::try_from(SECTOR_BYTES).unwrap()].to_vec());
            segment[place] = *byte;
            at.0 += 1;
        }
        self.written = at;
    }

    /// Zeros from a position on, and nothing in the segments behind it.
    pub(crate) fn cut(&mut self, end: Lsn) {
        self.segments.retain(|number, _| self.layout.start(*number) <= end);
        if let Some(last) = self.segments.get_mut(&self.layout.segment(end)) {
            last[usize::try_from(end.0 % self.layout.segment_bytes).unwrap()..].fill(0);
        }
    }

    /// Those segments, and that checkpoint, as they are now.
    pub(crate) fn some(&self, segments: &[u64], checkpoint: Option<u64>) -> Self {
        let mut some = Self::new(self.layout);
        some.segments = segments.iter().map(|number| (*number, self.segments[number].clone())).collect();
        some.checkpoints = checkpoint.into_iter().map(|number| (number, self.checkpoints[&number].clone())).collect();
        some
    }

    /// What was written stays.
    pub(crate) fn sync(&mut self) {
        self.synced = self.written;
        self.before.clear();
    }

    /// Power goes: of what was not synced, those sectors stay that `stays` picks.
    pub(crate) fn lose(&mut self, mut stays: impl FnMut() -> bool) {
        for (sector, before) in std::mem::take(&mut self.before) {
            if stays() {
                continue;
            }
            let Some(segment) = self.segments.get_mut(&(sector / self.layout.segment_bytes)) else { continue };
            let first = usize::try_from(sector % self.layout.segment_bytes).unwrap();
            // What was synced of a sector is in it before and after.
            segment[first..first + before.len()].copy_from_slice(&before);
        }
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

    /// The small file at a place.
    pub(crate) fn content(&self, place: Place) -> Vec<u8> {
        let job = TextsJob { connection: ConnectionId::default(), places: vec![place] };
        let record = self.read(&job).expect("the segment of a file that is listed is there");
        texts::content(&record, self.layout.salt, place).expect("a file that is listed can be read").to_owned()
    }

    /// The text of the message at a place.
    pub(crate) fn text(&self, place: Place) -> String {
        let job = TextsJob { connection: ConnectionId::default(), places: vec![place] };
        let record = self.read(&job).expect("the segment of a message that waits is there");
        let message = texts::message(&record, self.layout.salt, place).expect("a message that waits can be read");
        String::from_utf8(message.text.to_owned()).expect("a text is UTF-8")
    }

    fn space(&mut self, job: &SpaceJob, is_disk_full: bool) -> SpaceDone {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        for outdated in &job.outdated {
            self.checkpoints.remove(outdated).expect("a checkpoint that goes was there");
        }
        for freed in &job.freed {
            // Whoever still needs it finds out.
            self.segments.get_mut(freed).expect("a segment that is freed is there").fill(0xee);
            self.pool.insert(*freed);
        }
        while self.segments.len() as u64 > job.segments_max {
            let Some(segment) = self.pool.pop_first() else { break };
            self.segments.remove(&segment).expect("a segment that goes was there");
        }
        // Once all is set up, nothing is written where no segment was made.
        self.is_strict = true;
        let next = self.segments.last_key_value().map_or(1, |(last, _)| last + 1);
        let is_full = job.is_more_wanted && is_disk_full && self.pool.is_empty();
        if job.is_more_wanted && !is_full {
            let mut bytes = self.empty_segment();
            if let Some(used) = self.pool.pop_first() {
                self.recycled += 1;
                bytes = self.segments.remove(&used).expect("a segment that is used again was there");
                bytes[..100].fill(0);
            }
            self.segments.insert(next, bytes);
        }
        self.done(is_full)
    }

    /// What there is.
    pub(crate) fn done(&self, is_full: bool) -> SpaceDone {
        let last = self.segments.last_key_value().map_or(0, |(last, _)| *last);
        let (segments, spare) = (self.segments.len() as u64, self.pool.len() as u64);
        SpaceDone { room: self.layout.start(last + 1), is_full, segments, spare }
    }

    fn compact(&mut self, job: CompactionJob, is_disk_full: bool) -> Option<Compacted> {
        if let CompactionJob::Begin(_) = job {
            let root = tempfile::tempdir().unwrap();
            let (journal, checkpoints) = (data::journal(root.path()), data::checkpoints(root.path()));
            fs::create_dir_all(&checkpoints).unwrap();
            self.compactor = Some((Compactor::new(journal, checkpoints), root));
        }
        if is_disk_full {
            return self.compactor.take().map(|_| Compacted::NoRoom);
        }
        if let (CompactionJob::Finish { .. }, Some((_, root))) = (&job, &self.compactor) {
            // What is to be written again is read from there.
            self.save(root.path());
        }
        let (compactor, root) = self.compactor.as_mut()?;
        let compacted = compactor.run(job).expect("a directory of the test can be written to");
        if let Some(Compacted::Done(checkpoint, relocations)) = &compacted {
            self.compactions += 1;
            let files = relocations.iter().filter(|moved| matches!(moved.needed, Needed::File(_))).count();
            self.relocated += relocations.len() - files;
            self.relocated_files += files;
            let path = checkpoint::path(&data::checkpoints(root.path()), checkpoint.number);
            self.checkpoints.insert(checkpoint.number, fs::read(path).unwrap());
            self.compactor = None;
        }
        compacted
    }

    /// Puts everything into files.
    pub(crate) fn save(&self, root: &Path) {
        let (journal, checkpoints) = (data::journal(root), data::checkpoints(root));
        fs::create_dir_all(&journal).unwrap();
        fs::create_dir_all(&checkpoints).unwrap();
        for (number, bytes) in &self.segments {
            fs::write(Layout::path(&journal, *number), [&self.layout.header(*number), &bytes[..]].concat()).unwrap();
        }
        for (number, bytes) in &self.checkpoints {
            fs::write(checkpoint::path(&checkpoints, *number), bytes).unwrap();
        }
    }

    /// Takes everything from files.
    pub(crate) fn load(layout: Layout, root: &Path, end: Lsn, checkpoint: Option<Checkpoint>) -> Self {
        let segments = kurir::segment::list(&data::journal(root)).unwrap();
        let content = |number| fs::read(Layout::path(&data::journal(root), number)).unwrap().split_off(BLOCK_BYTES);
        let checkpoints = checkpoint
            .map(|known| (known.number, fs::read(checkpoint::path(&data::checkpoints(root), known.number)).unwrap()));
        Self {
            segments: segments.into_iter().map(|number| (number, content(number))).collect(),
            checkpoints: checkpoints.into_iter().collect(),
            written: end,
            synced: end,
            ..Self::new(layout)
        }
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
        let done = SpaceDone { room, is_full, segments: 1, spare: 0 };
        self.disk.fixed = Some(done);
        Completion::Space(done)
    }

    /// Syncs what was written.
    pub(crate) fn sync(&mut self) -> Completion {
        self.disk.sync();
        Completion::Synced(self.disk.synced)
    }

    fn write(&mut self, mut batch: Batch) -> Completion {
        self.disk.write(batch.start, batch.seal());
        if !self.is_interval {
            self.disk.sync();
        }
        Completion::Settled { batch, synced: self.disk.synced }
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

    /// What a download reads from, once it is open.
    pub(crate) fn opened(&self, transfer: TransferId) -> Option<&Vec<u8>> {
        self.downloads.get(&transfer)
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
            Job::Journal(batch) => report(self.write(batch)),
            Job::Texts(job) => {
                let records = self.disk.read(&job);
                report(Completion::Texts(TextsDone { connection: job.connection, records }));
            }
            Job::Space(job) => report(Completion::Space(self.disk.space(&job, self.is_disk_full))),
            Job::Compact(job) => {
                if let Some(compacted) = self.disk.compact(job, self.is_disk_full) {
                    report(Completion::Compacted(compacted));
                }
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
