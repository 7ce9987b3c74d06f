//! The helper threads: each owns what it works on, takes owned jobs from a channel, and hands owned results back through
//! another and a wake-up. None of them sees the state.
//!
//! They hold the data directory: it is free for another process when the last of them has ended, whatever ends the server.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mio::Waker;

use crate::compaction::{CompactionJob, Compactor};
use crate::data::{DataDirectory, Place};
use crate::disk::FileRef;
use crate::engine::{Completion, Job};
use crate::files::{FileDone, FileJob, FileStore, TransferId};
use crate::inbox::TextsJob;
use crate::journal::{Journal, Unsynced};
use crate::log::{Batch, Sync};
use crate::password::{Hasher, PasswordJob};
use crate::segment::Segment;
use crate::space::{Space, SpaceJob};
use crate::store::{self, Disk, StoreWorkers, WorkError};
use crate::texts::Texts;

/// Batches written together at most.
const BATCHES_MAX: usize = 64;

/// What the loop hears from a helper thread.
pub type Report = Result<Completion, WorkError>;

/// What comes from a helper thread.
enum Message {
    Report(Report),
    /// A stored file is open for a download, so the loop can read what is in memory of it.
    Opened(TransferId, FileRef),
}

/// The loop's side of the helper threads.
pub struct Threads {
    /// None once no more jobs come.
    queues: Option<Queues>,
    messages: Receiver<Message>,
    opened: HashMap<TransferId, FileRef>,
    is_finishing: Arc<AtomicBool>,
    handles: Vec<JoinHandle<()>>,
    /// The last field: it is let go of when all threads have ended.
    directory: DataDirectory,
}

/// Where jobs go.
struct Queues {
    journal: Sender<JournalJob>,
    files: Sender<FileJob>,
    passwords: Sender<PasswordJob>,
    texts: Sender<TextsJob>,
    space: Sender<SpaceJob>,
    compaction: Sender<CompactionJob>,
}

/// What the journal thread is given.
enum JournalJob {
    Write(Batch),
    /// The segment that comes behind those that it has. It stands in front of the first batch that needs it.
    Add(Segment),
}

/// A helper thread's way back.
#[derive(Clone)]
struct Reporter {
    messages: Sender<Message>,
    waker: Arc<Waker>,
    /// What is queued is for nobody any more; only the journal is still written.
    is_finishing: Arc<AtomicBool>,
    /// Where the data directory is, for those who work by names.
    place: Place,
}

impl Reporter {
    /// True while what is queued is to be done, where it is to be done: by its name another directory may be meant by now.
    fn goes_on(&self) -> bool {
        if self.is_finishing.load(Ordering::SeqCst) {
            return false;
        }
        let is_there = self.place.is_still_there();
        if !is_there {
            self.say(Err(WorkError::DirectoryGone(self.place.path().to_owned())));
        }
        is_there
    }

    /// Says what came of a job; false when nobody listens any more.
    fn say(&self, report: Report) -> bool {
        let is_fine = report.is_ok();
        self.messages.send(Message::Report(report)).is_ok() && self.waker.wake().is_ok() && is_fine
    }

    /// The same for what need not wake the loop.
    fn tell(&self, message: Message) -> bool {
        self.messages.send(message).is_ok()
    }
}

/// Says so when its thread panics: who waits for that thread would wait for ever.
struct Watch {
    name: &'static str,
    reporter: Reporter,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if thread::panicking() {
            self.reporter.say(Err(WorkError::Thread(self.name)));
        }
    }
}

impl Threads {
    /// Starts the threads. Each report wakes the loop through `waker`.
    ///
    /// # Errors
    /// The system has no room for a thread.
    pub fn start(directory: DataDirectory, store: StoreWorkers, sync: Sync, waker: Arc<Waker>) -> io::Result<Self> {
        let StoreWorkers { disk, hasher } = store;
        let Disk { journal, space, compactor, texts, files } = disk;
        let (messages_in, messages) = mpsc::channel();
        let is_finishing = Arc::new(AtomicBool::new(false));
        let place = directory.place().clone();
        let reporter = Reporter { messages: messages_in, waker, is_finishing: Arc::clone(&is_finishing), place };
        let (journal_jobs, batches) = mpsc::channel();
        // What is handed over is taken when what was handed over before is on the disk.
        let (syncs, to_sync) = mpsc::sync_channel(0);
        let (text_jobs, texts_to_read) = mpsc::channel();
        let (space_jobs, space_to_make) = mpsc::channel();
        let (compaction_jobs, to_compact) = mpsc::channel();
        let (file_jobs, files_to_do) = mpsc::channel();
        let (password_jobs, passwords_to_do) = mpsc::channel();
        let queues = Queues {
            journal: journal_jobs,
            files: file_jobs,
            passwords: password_jobs,
            texts: text_jobs,
            space: space_jobs,
            compaction: compaction_jobs,
        };
        let journal_directory = journal.directory().path().to_owned();
        let [for_journal, for_sync, for_files, for_passwords, for_texts, for_space, for_compaction] =
            std::array::from_fn(|_| reporter.clone());
        let queues = Some(queues);
        // From here on those that were started are ended again if one cannot be.
        let mut threads =
            Self { queues, messages, opened: HashMap::new(), is_finishing, handles: Vec::new(), directory };
        let handles = &mut threads.handles;
        let mut spawn = |name: &'static str, work: Box<dyn FnOnce() + Send>| -> io::Result<()> {
            let watch = Watch { name, reporter: reporter.clone() };
            handles.push(thread::Builder::new().name(name.to_owned()).spawn(move || {
                let _watch = watch;
                work();
            })?);
            Ok(())
        };
        spawn("journal", Box::new(move || run_journal(journal, sync, &batches, &syncs, &for_journal)))?;
        spawn("sync", Box::new(move || run_sync(&journal_directory, &to_sync, &for_sync)))?;
        spawn("files", Box::new(move || run_files(files, &files_to_do, &for_files)))?;
        spawn("password", Box::new(move || run_passwords(hasher, &passwords_to_do, &for_passwords)))?;
        spawn("texts", Box::new(move || run_texts(texts, &texts_to_read, &for_texts)))?;
        spawn("compaction", Box::new(move || run_compaction(compactor, &to_compact, &for_compaction)))?;
        // Made last: while it is there the journal thread goes on, and nothing may fail any more but this.
        if let Some(segments) = threads.queues.as_ref().map(|queues| queues.journal.clone()) {
            spawn("space", Box::new(move || run_space(space, &space_to_make, &segments, &for_space)))?;
        }
        Ok(threads)
    }

    /// Hands a job to its thread. A thread that is gone has said why, so its jobs may be dropped.
    pub fn submit(&self, job: Job) {
        let is_taken = self.queues.as_ref().map(|queues| match job {
            Job::Journal(batch) => queues.journal.send(JournalJob::Write(batch)).is_ok(),
            Job::File(job) => queues.files.send(job).is_ok(),
            Job::Password(job) => queues.passwords.send(job).is_ok(),
            Job::Texts(job) => queues.texts.send(job).is_ok(),
            Job::Space(job) => queues.space.send(job).is_ok(),
            Job::Compact(job) => queues.compaction.send(job).is_ok(),
        });
        if is_taken != Some(true) {
            tracing::debug!("a job came for a thread that has ended, and has said why");
        }
    }

    /// The next report, if there is one.
    #[must_use]
    pub fn report(&mut self) -> Option<Report> {
        loop {
            match self.messages.try_recv().ok()? {
                Message::Report(report) => {
                    if let Ok(Completion::File(FileDone::Forgotten(transfer))) = &report {
                        self.opened.remove(transfer);
                    }
                    return Some(report);
                }
                Message::Opened(transfer, file) => drop(self.opened.insert(transfer, file)),
            }
        }
    }

    /// The file that is open for a download.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] when none is yet.
    pub fn opened(&self, transfer: TransferId) -> io::Result<&FileRef> {
        self.opened.get(&transfer).ok_or_else(|| ErrorKind::WouldBlock.into())
    }

    /// The data directory that they work on.
    #[must_use]
    pub fn directory(&self) -> &DataDirectory {
        &self.directory
    }

    /// Lets the journal thread write what it has and the others end what they are at, and waits for them.
    ///
    /// # Errors
    /// The first that one of them failed with.
    pub fn finish(mut self) -> Result<(), WorkError> {
        self.end();
        self.messages.try_iter().try_for_each(|message| match message {
            Message::Report(report) => report.map(drop),
            Message::Opened(..) => Ok(()),
        })
    }

    fn end(&mut self) {
        self.is_finishing.store(true, Ordering::SeqCst);
        self.queues = None;
        for handle in self.handles.drain(..) {
            // One that panicked has reported it.
            drop(handle.join());
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.end();
    }
}

/// Writes what has come since the last write, all at once.
fn run_journal(
    mut journal: Journal,
    sync: Sync,
    jobs: &Receiver<JournalJob>,
    syncs: &SyncSender<Option<Unsynced>>,
    reporter: &Reporter,
) {
    let directory = journal.directory().path().to_owned();
    let failed = |error| WorkError::Journal(directory.clone(), error);
    loop {
        match next_job(&journal, jobs) {
            Ok(first) => {
                let mut batches = Vec::new();
                for job in std::iter::once(first).chain(jobs.try_iter().take(BATCHES_MAX - 1)) {
                    match job {
                        JournalJob::Write(batch) => batches.push(batch),
                        JournalJob::Add(segment) => journal.add(segment),
                    }
                }
                if !batches.is_empty() && !reporter.say(store::write(&mut journal, batches, sync)) {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                // It is taken when all is synced that was handed over, or never if that failed.
                if syncs.send(None).is_ok()
                    && let Err(error) = journal.close()
                {
                    reporter.say(Err(failed(error)));
                }
                return;
            }
        }
        // Why one is not taken has been said.
        if journal.sync_due() == Some(Duration::ZERO) && syncs.send(Some(journal.take_unsynced())).is_err() {
            return;
        }
    }
}

/// Syncs what the journal thread has written, so that it can go on writing.
fn run_sync(directory: &Path, jobs: &Receiver<Option<Unsynced>>, reporter: &Reporter) {
    for unsynced in jobs.iter().flatten() {
        let synced = unsynced.sync().map(Completion::Synced);
        if !reporter.say(synced.map_err(|error| WorkError::Journal(directory.to_owned(), error))) {
            return;
        }
    }
}

/// Waits for a job, for ever if nothing is to be synced before long.
fn next_job(journal: &Journal, jobs: &Receiver<JournalJob>) -> Result<JournalJob, RecvTimeoutError> {
    match journal.sync_due() {
        None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
        Some(within) => jobs.recv_timeout(within),
    }
}

fn run_space(mut space: Space, jobs: &Receiver<SpaceJob>, journal: &Sender<JournalJob>, reporter: &Reporter) {
    for job in jobs.iter().take_while(|_| reporter.goes_on()) {
        let report = space.run(&job).map_err(|(path, error)| WorkError::Journal(path, error));
        let report = report.map(|(done, made)| {
            // The journal has it before the loop may use it; one that has ended has said why.
            let is_taken = made.is_none_or(|segment| journal.send(JournalJob::Add(segment)).is_ok());
            tracing::trace!(is_taken, "space");
            Completion::Space(done)
        });
        if !reporter.say(report) {
            return;
        }
    }
}

fn run_compaction(mut compactor: Compactor, jobs: &Receiver<CompactionJob>, reporter: &Reporter) {
    for job in jobs.iter().take_while(|_| reporter.goes_on()) {
        let done = compactor.run(job).map_err(WorkError::Checkpoint).transpose();
        if !done.is_none_or(|done| reporter.say(done.map(Completion::Compacted))) {
            return;
        }
    }
}

fn run_texts(mut texts: Texts, jobs: &Receiver<TextsJob>, reporter: &Reporter) {
    for job in jobs.iter().take_while(|_| !reporter.is_finishing.load(Ordering::SeqCst)) {
        if !reporter.say(Ok(store::read(&mut texts, &job))) {
            return;
        }
    }
}

fn run_files(mut files: FileStore, jobs: &Receiver<FileJob>, reporter: &Reporter) {
    for job in jobs.iter().take_while(|_| reporter.goes_on()) {
        let done = files.run(job);
        // A file is open before the loop hears of its first block.
        let opened = files.take_opened().map(|(transfer, file)| Message::Opened(transfer, file));
        let is_told = opened.is_none_or(|message| reporter.tell(message));
        let is_heard = match done {
            Ok(None) => true,
            Ok(Some(done)) => reporter.say(Ok(Completion::File(done))),
            Err(error) => reporter.say(Err(WorkError::Files(error))),
        };
        if !is_told || !is_heard {
            return;
        }
    }
}

fn run_passwords(mut hasher: Hasher, jobs: &Receiver<PasswordJob>, reporter: &Reporter) {
    for job in jobs.iter().take_while(|_| !reporter.is_finishing.load(Ordering::SeqCst)) {
        let report = hasher.run(&job).map(Completion::Password).map_err(WorkError::Password);
        if !reporter.say(report) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Lsn;
    use crate::disk::{self, Directory, Disk, DiskFile, DiskRef, Entry, Lock, LockOf, Locked, Mode, Status};
    use crate::record::{self, Records};
    use crate::segment::{Access, Layout, SegmentStore, Stream};
    use crate::store::{Opening, Store};
    use mio::{Poll, Token};
    use std::sync::atomic::AtomicUsize;

    const LAYOUT: Layout = Layout { salt: 7, segment_bytes: 16 * 1024 };

    /// Runs a journal thread with [`Sync::Interval`] that is given one batch and then ended, with what `sync` does of syncs.
    /// Says how many records the journal holds then: the batch's, and the mark if it was closed.
    fn records_left(sync: impl FnOnce(Receiver<Option<Unsynced>>) + Send) -> usize {
        let root = tempfile::tempdir().unwrap();
        let directory = &Directory::on_system(root.path());
        let mut store = SegmentStore::new(directory.clone(), LAYOUT, Access::Seldom, 0, 0);
        store.prepare(0).unwrap().unwrap();
        let journal = Journal::open(directory, LAYOUT, Access::Seldom, LAYOUT.first()).unwrap();
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        let (messages_in, messages) = mpsc::channel();
        let elsewhere = tempfile::tempdir().unwrap();
        let place = DataDirectory::open(elsewhere.path()).unwrap().place().clone();
        let reporter = Reporter { messages: messages_in, waker, is_finishing: Arc::default(), place };
        let (jobs_in, jobs) = mpsc::channel();
        let (syncs, to_sync) = mpsc::sync_channel(0);
        let mut bytes = Vec::new();
        record::append_unsealed(&mut bytes, LAYOUT.first(), |body| body.extend_from_slice(&[1; 100]));
        jobs_in.send(JournalJob::Write(Batch::new(1, LAYOUT.first(), LAYOUT.salt, bytes))).unwrap();
        drop(jobs_in);
        thread::scope(|scope| {
            scope.spawn(|| sync(to_sync));
            run_journal(journal, Sync::Interval, &jobs, &syncs, &reporter);
            drop(syncs);
        });
        let settled =
            messages.try_iter().filter(|message| matches!(message, Message::Report(Ok(Completion::Settled { .. }))));
        assert_eq!(settled.count(), 1, "it was written all the same");
        let mut records =
            Records::new(Stream::new(directory, LAYOUT, LAYOUT.first(), Lsn(u64::MAX)), 7, LAYOUT.first());
        std::iter::from_fn(|| records.read().unwrap().map(drop)).count()
    }

    #[test]
    fn the_journal_is_closed_when_all_that_was_handed_over_is_synced() {
        assert_eq!(records_left(|syncs| syncs.iter().for_each(drop)), 2);
    }

    #[test]
    fn a_journal_is_not_closed_whose_sync_failed() {
        assert_eq!(records_left(drop), 1);
        // While it is at one sync, it takes no other.
        assert_eq!(
            records_left(|syncs| {
                thread::sleep(Duration::from_millis(50));
                drop(syncs);
            }),
            1
        );
    }

    /// The disk of this machine, slow where checkpoints are written, that knows who works on it when the data directory is let
    /// go of.
    #[derive(Debug)]
    struct Watched {
        disk: DiskRef,
        under_way: Arc<AtomicUsize>,
        /// Writes that were under way then, and the locks that are held.
        late: Arc<AtomicUsize>,
        held: Arc<AtomicUsize>,
    }

    #[derive(Debug)]
    struct WatchedFile {
        file: FileRef,
        under_way: Arc<AtomicUsize>,
    }

    #[derive(Debug)]
    struct WatchedLock {
        _lock: Box<dyn Lock>,
        under_way: Arc<AtomicUsize>,
        late: Arc<AtomicUsize>,
        held: Arc<AtomicUsize>,
    }

    impl Lock for WatchedLock {}

    impl Drop for WatchedLock {
        fn drop(&mut self) {
            self.late.fetch_add(self.under_way.load(Ordering::SeqCst), Ordering::SeqCst);
            self.held.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Disk for Watched {
        fn open(&self, path: &Path, mode: Mode) -> io::Result<FileRef> {
            let file = self.disk.open(path, mode)?;
            let is_slow = path.parent().is_some_and(|parent| parent.ends_with("checkpoint"));
            let under_way = Arc::clone(&self.under_way);
            Ok(if is_slow { Arc::new(WatchedFile { file, under_way }) } else { file })
        }

        fn lock(&self, path: &Path, of: LockOf) -> io::Result<Locked> {
            let locked = self.disk.lock(path, of)?;
            let Locked::Held(lock) = locked else { return Ok(locked) };
            self.held.fetch_add(1, Ordering::SeqCst);
            let [under_way, late, held] = [&self.under_way, &self.late, &self.held].map(Arc::clone);
            Ok(Locked::Held(Box::new(WatchedLock { _lock: lock, under_way, late, held })))
        }

        fn make_directory(&self, path: &Path) -> io::Result<()> {
            self.disk.make_directory(path)
        }

        fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
            self.disk.list(path)
        }

        fn status(&self, path: &Path) -> io::Result<Status> {
            self.disk.status(path)
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.disk.rename(from, to)
        }

        fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.disk.link(from, to)
        }

        fn remove_file(&self, path: &Path) -> io::Result<()> {
            self.disk.remove_file(path)
        }

        fn remove_directory(&self, path: &Path) -> io::Result<()> {
            self.disk.remove_directory(path)
        }

        fn sync_directory(&self, path: &Path) -> io::Result<()> {
            self.disk.sync_directory(path)
        }

        fn free_bytes(&self, path: &Path) -> io::Result<u64> {
            self.disk.free_bytes(path)
        }
    }

    impl DiskFile for WatchedFile {
        fn write_at(&self, from: &[u8], offset: u64) -> io::Result<usize> {
            self.under_way.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(200));
            let written = self.file.write_at(from, offset);
            self.under_way.fetch_sub(1, Ordering::SeqCst);
            written
        }

        fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
            self.file.read_at(into, offset)
        }

        fn read_cached_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
            self.file.read_cached_at(into, offset)
        }

        fn allocate(&self, bytes: u64) -> io::Result<bool> {
            self.file.allocate(bytes)
        }

        fn set_len(&self, bytes: u64) -> io::Result<()> {
            self.file.set_len(bytes)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.file.sync_data()
        }

        fn sync_all(&self) -> io::Result<()> {
            self.file.sync_all()
        }

        fn bytes(&self) -> io::Result<u64> {
            self.file.bytes()
        }

        fn will_read_in_order(&self) {}
    }

    #[test]
    fn the_data_directory_is_let_go_of_when_the_last_thread_has_ended_whatever_ends_them() {
        for is_clean in [true, false] {
            let root = tempfile::tempdir().unwrap();
            let [under_way, late, held] = std::array::from_fn(|_| Arc::<AtomicUsize>::default());
            let [watched_under_way, watched_late, watched_held] = [&under_way, &late, &held].map(Arc::clone);
            let disk =
                Watched { disk: disk::system(), under_way: watched_under_way, late: watched_late, held: watched_held };
            let directory = DataDirectory::open_on(Arc::new(disk), root.path()).unwrap();
            let opening = Opening { segment_bytes: 1 << 20, sync: Sync::Always, salt: 7, now: 1 };
            let Store { directory, disk, .. } = Store::open_in(directory, opening).unwrap();
            let poll = Poll::new().unwrap();
            let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
            let workers = StoreWorkers { disk, hasher: Hasher::new().unwrap() };
            let threads = Threads::start(directory, workers, Sync::Always, waker).unwrap();
            threads.submit(Job::Compact(CompactionJob::Begin(1)));
            threads.submit(Job::Compact(CompactionJob::Write(vec![1; 1 << 20])));
            while under_way.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            assert!(held.load(Ordering::SeqCst) > 0);
            if is_clean {
                threads.finish().unwrap();
            } else {
                // As when a write has failed.
                drop(threads);
            }
            assert_eq!(held.load(Ordering::SeqCst), 0);
            assert_eq!(late.load(Ordering::SeqCst), 0, "somebody still wrote");
        }
    }
}
