//! The helper threads: each owns what it works on, takes owned jobs from a channel, and hands owned results back through
//! another and a wake-up. None of them sees the state.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};

use mio::Waker;

use crate::engine::{Completion, Job};
use crate::files::{FileJob, FileStore};
use crate::journal::{Batch, Journal, Sync};
use crate::password::{Hasher, PasswordJob};
use crate::store::{self, StoreWorkers, WorkError};

/// Batches written together at most.
const BATCHES_MAX: usize = 64;

/// What the loop hears from a helper thread.
pub type Report = Result<Completion, WorkError>;

/// The loop's side of the helper threads.
pub struct Threads {
    journal: Sender<Batch>,
    files: Sender<FileJob>,
    passwords: Sender<PasswordJob>,
    reports: Receiver<Report>,
    is_finishing: Arc<AtomicBool>,
    handles: Vec<JoinHandle<()>>,
}

/// A helper thread's way back.
#[derive(Clone)]
struct Reporter {
    reports: Sender<Report>,
    waker: Arc<Waker>,
    /// What is queued is for nobody any more; only the journal is still written.
    is_finishing: Arc<AtomicBool>,
}

impl Reporter {
    /// Says what came of a job; false when nobody listens any more.
    fn say(&self, report: Report) -> bool {
        let is_fine = report.is_ok();
        self.reports.send(report).is_ok() && self.waker.wake().is_ok() && is_fine
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
    pub fn start(store: StoreWorkers, sync: Sync, waker: Arc<Waker>) -> std::io::Result<Self> {
        let StoreWorkers { journal, files, hasher } = store;
        let (reports_in, reports) = mpsc::channel();
        let is_finishing = Arc::new(AtomicBool::new(false));
        let reporter = Reporter { reports: reports_in, waker, is_finishing: Arc::clone(&is_finishing) };
        let (journal_jobs, batches) = mpsc::channel();
        let (file_jobs, files_to_do) = mpsc::channel();
        let (password_jobs, passwords_to_do) = mpsc::channel();
        let spawn = |name: &'static str, work: Box<dyn FnOnce() + Send>| {
            let watch = Watch { name, reporter: reporter.clone() };
            thread::Builder::new().name(name.to_owned()).spawn(move || {
                let _watch = watch;
                work();
            })
        };
        let (for_journal, for_files, for_passwords) = (reporter.clone(), reporter.clone(), reporter.clone());
        let handles = vec![
            spawn("journal", Box::new(move || run_journal(journal, sync, &batches, &for_journal)))?,
            spawn("files", Box::new(move || run_files(files, &files_to_do, &for_files)))?,
            spawn("password", Box::new(move || run_passwords(hasher, &passwords_to_do, &for_passwords)))?,
        ];
        Ok(Self { journal: journal_jobs, files: file_jobs, passwords: password_jobs, reports, is_finishing, handles })
    }

    /// Hands a job to its thread. A thread that is gone has said why, so its jobs may be dropped.
    pub fn submit(&self, job: Job) {
        let is_taken = match job {
            Job::Journal(batch) => self.journal.send(batch).is_ok(),
            Job::File(job) => self.files.send(job).is_ok(),
            Job::Password(job) => self.passwords.send(job).is_ok(),
        };
        if !is_taken {
            tracing::debug!("a job came for a thread that has ended, and has said why");
        }
    }

    /// The next report, if there is one.
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    /// Lets the journal thread write what it has and the others end what they are at, and waits for them.
    ///
    /// # Errors
    /// The first that one of them failed with.
    pub fn finish(self) -> Result<(), WorkError> {
        self.is_finishing.store(true, Ordering::SeqCst);
        drop((self.journal, self.files, self.passwords));
        for handle in self.handles {
            // One that panicked has reported it.
            drop(handle.join());
        }
        self.reports.iter().try_for_each(|report| report.map(drop))
    }
}

/// Writes what has come since the last sync, all at once.
fn run_journal(mut journal: Journal, sync: Sync, batches: &Receiver<Batch>, reporter: &Reporter) {
    loop {
        let report = match next_batch(&journal, batches) {
            Ok(first) => {
                let mut together = vec![first];
                together.extend(batches.try_iter().take(BATCHES_MAX - 1));
                store::write(&mut journal, together, sync).map(Vec::from)
            }
            Err(RecvTimeoutError::Timeout) => {
                let worked = journal.sync().and_then(|()| journal.make_room());
                worked.map(|()| vec![store::room(&journal)]).map_err(|error| WorkError::journal(&journal, error))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let path = journal.path().display().to_string();
                if let Err(error) = journal.close() {
                    reporter.say(Err(WorkError::Journal(path, error)));
                }
                return;
            }
        };
        let is_heard = match report {
            Ok(completions) => completions.into_iter().all(|completion| reporter.say(Ok(completion))),
            Err(error) => reporter.say(Err(error)),
        };
        if !is_heard {
            return;
        }
    }
}

/// Waits for a batch, for ever if nothing else is to be done before long.
fn next_batch(journal: &Journal, batches: &Receiver<Batch>) -> Result<Batch, RecvTimeoutError> {
    match journal.idle_work() {
        None => batches.recv().map_err(|_| RecvTimeoutError::Disconnected),
        Some(within) => batches.recv_timeout(within),
    }
}

fn run_files(mut files: FileStore, jobs: &Receiver<FileJob>, reporter: &Reporter) {
    for job in jobs.iter().take_while(|_| !reporter.is_finishing.load(Ordering::SeqCst)) {
        let is_heard = match files.run(job) {
            Ok(None) => true,
            Ok(Some(done)) => reporter.say(Ok(Completion::File(done))),
            Err(error) => reporter.say(Err(WorkError::Files(error))),
        };
        if !is_heard {
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
