//! The engine: every connection, the state, and the turn in which bytes become requests, changes and replies.
//!
//! It is driven from outside ([`crate::net`] in the server, tests and simulations elsewhere) and sees the world through
//! [`Host`]: it knows no socket, clock, thread or disk. What would block is handed out as a [`Job`]; what comes of it is
//! handed back as a [`Completion`].
//!
//! A turn: completions are taken, each runnable connection is served within its budget, the changes of the turn leave as
//! one batch, and every reply that is free to go is written. A reply that tells of a change waits in its write buffer
//! until the change's batch is durable.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::io::{self, ErrorKind};

use clap::ValueEnum;
use slab::Slab;
use tracing::{debug, error, info};

use crate::admission::Admission;
use crate::buffer::{READ_SPARE_BYTES_MAX, Spares, WRITE_SPARE_BYTES_MAX};
use crate::change::Lsn;
use crate::clock::Clock;
use crate::command::{self, LastToken};
use crate::compaction::{Compacted, CompactionJob};
use crate::connection::{CloseReason, Connection, ConnectionId, Peer, Phase};
use crate::deadline::{Awaited, Deadlines, Stage};
use crate::eviction::{self, Holding};
use crate::files::{FileDone, FileJob, TransferId};
use crate::inbox::{TextsDone, TextsJob};
use crate::limits::Limits;
use crate::log::{Batch, Log};
use crate::password::{PasswordDone, PasswordJob};
use crate::refusal::Refusal;
use crate::reply;
use crate::run_queue::RunQueue;
use crate::serve::{Budget, Stop, discard_input, serve_within_budget};
use crate::service::{Service, Storing};
use crate::space::{SpaceDone, SpaceJob};
use crate::state::State;
use crate::upkeep::Holdings;

/// Memory that a write buffer starts with.
const OUTPUT_BYTES_START: usize = 512;
/// How often it is logged how many connections were turned away.
const TURNED_AWAY_LOG_MS: u64 = 1000;
/// So long after the last change it is written down that all is on the disk.
const MARK_MS: u64 = 500;
/// What one connection gets in a turn before it lets others go first.
const SHORT_SHARE_BYTES: u64 = 32 * 1024;
/// Connections looked at in one turn because their time may be over.
const LATE_PER_TURN_MAX: usize = 1024;

/// What the engine needs of the world within a turn.
pub trait Host {
    /// Reads from a connection as a non-blocking socket does.
    ///
    /// # Errors
    /// As for a socket; [`ErrorKind::WouldBlock`] when there is nothing now.
    fn read(&mut self, connection: ConnectionId, into: &mut [u8]) -> io::Result<usize>;

    /// Writes to a connection as a non-blocking socket does.
    ///
    /// # Errors
    /// As for a socket; [`ErrorKind::WouldBlock`] when it takes nothing now.
    fn write(&mut self, connection: ConnectionId, from: &[u8]) -> io::Result<usize>;

    /// Tells the peer that nothing more will be sent.
    fn end(&mut self, connection: ConnectionId);

    /// Closes a connection; its id is not used again.
    fn close(&mut self, connection: ConnectionId);

    /// Reads from the stored file that a [`FileJob::Read`] of this transfer has opened, as far as nothing must be waited for.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] when the disk must be waited for: a job reads it then.
    fn read_stored(&mut self, transfer: TransferId, offset: u64, into: &mut [u8]) -> io::Result<usize>;

    /// 128 fresh random bits.
    fn random(&mut self) -> [u8; 16];

    /// Has a job done. Jobs of one kind are done in order.
    fn submit(&mut self, job: Job);
}

/// Work that would block the loop.
pub enum Job {
    /// Make a batch durable.
    Journal(Batch),
    /// Check or hash a password.
    Password(PasswordJob),
    /// Write or read a stored file.
    File(FileJob),
    /// Read texts of messages.
    Texts(TextsJob),
    /// Make room on the disk.
    Space(SpaceJob),
    /// Make a checkpoint.
    Compact(CompactionJob),
}

/// What came of a [`Job`].
pub enum Completion {
    /// The batch, and all before it, is as durable as it was asked to be: replies may tell of it.
    Settled {
        /// Its memory is used again.
        batch: Batch,
        /// All before this is on the disk.
        synced: Lsn,
    },
    /// All before this is on the disk.
    Synced(Lsn),
    /// Password work is done.
    Password(PasswordDone),
    /// A file job is done.
    File(FileDone),
    /// Texts were read, or not.
    Texts(TextsDone),
    /// The disk has so much room for the journal.
    Space(SpaceDone),
    /// A compaction has gone on, or has ended.
    Compacted(Compacted),
}

/// Whether strangers may make accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Registration {
    /// They may.
    Open,
    /// Only the administrator makes them.
    Closed,
}

/// Connections that were one too many: how many, who was the last, and for what.
#[derive(Clone, Copy)]
struct TurnedAway {
    count: u64,
    peer: Peer,
    reason: &'static str,
}

/// The server, but for its sockets, threads and disk.
pub struct Engine {
    connections: Slab<Connection>,
    admission: Admission,
    generation: u32,
    service: Service,
    /// What others wait for is taken before what makes long answers.
    completions: VecDeque<Completion>,
    completions_long: VecDeque<Completion>,
    run_queue: RunQueue,
    unflushed: Vec<ConnectionId>,
    /// Connections with replies that wait for a batch.
    gated: BTreeMap<u64, Vec<ConnectionId>>,
    /// Connections with requests that wait for room in the journal.
    stalled: Vec<ConnectionId>,
    closed: Vec<(ConnectionId, CloseReason)>,
    /// When peers that keep the server waiting are closed.
    deadlines: Deadlines,
    /// Connections that were one too many, until that is logged, and when that may be.
    turned_away: Option<TurnedAway>,
    turned_away_logged_at: u64,
    /// What answers and other work of completions took, until it is counted against the turn.
    given_bytes: u64,
    /// For what is read, and for replies.
    spare_buffers: Spares,
    spare_outputs: Spares,
    is_stopping: bool,
    /// When it is to be written down that all is on the disk.
    mark_at: Option<u64>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connections, service, stalled, .. } = self;
        let (connections, stalled, upkeep) = (connections.len(), stalled.len(), &service.upkeep);
        write!(f, "Engine {{ connections: {connections}, stalled: {stalled}, upkeep: {upkeep:?} }}")
    }
}

impl Engine {
    /// An engine that goes on from a recovered state and log.
    #[must_use]
    pub fn new(limits: Limits, registration: Registration, state: State, log: Log, holdings: Holdings) -> Self {
        Self {
            connections: Slab::new(),
            admission: Admission::default(),
            generation: 0,
            service: Service::new(limits, registration, state, log, holdings),
            completions: VecDeque::new(),
            completions_long: VecDeque::new(),
            run_queue: RunQueue::default(),
            unflushed: Vec::new(),
            gated: BTreeMap::new(),
            stalled: Vec::new(),
            closed: Vec::new(),
            deadlines: Deadlines::default(),
            turned_away: None,
            turned_away_logged_at: 0,
            given_bytes: 0,
            spare_buffers: Spares::new(READ_SPARE_BYTES_MAX),
            spare_outputs: Spares::new(WRITE_SPARE_BYTES_MAX),
            is_stopping: false,
            mark_at: None,
        }
    }

    /// The state, to look at.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.service.state
    }

    /// The bounds it keeps.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.service.limits
    }

    /// Handles so much of a file at once, rounded down to a multiple of three, and so much of a checkpoint.
    pub fn set_block_bytes(&mut self, bytes: usize) {
        self.service.block_bytes = (bytes / 3 * 3).max(3);
        self.service.upkeep.block_bytes = bytes;
    }

    /// Looks at requests ahead with so many users.
    pub fn set_ahead_users_min(&mut self, users: usize) {
        self.service.ahead_users_min = users;
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The memory that connections hold, beside their places.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.service.held_bytes
    }

    /// False when one more connection from there is one too many.
    #[must_use]
    pub fn admits(&self, peer: Peer) -> bool {
        self.admission.admits(peer, &self.service.limits)
    }

    /// Takes a new connection. One too many is told so and closed in the next turn.
    pub fn open(&mut self, peer: Peer) -> ConnectionId {
        let is_full = !self.admits(peer);
        self.generation = self.generation.wrapping_add(1);
        let entry = self.connections.vacant_entry();
        let slot = u32::try_from(entry.key()).unwrap_or(u32::MAX);
        let id = ConnectionId { slot, generation: self.generation };
        let connection = entry.insert(Connection::new(id, peer));
        debug!(%peer, slot, "connection opened");
        connection.is_turned_away = is_full;
        if is_full {
            let count = self.turned_away.map_or(0, |last| last.count) + 1;
            let reason = self.admission.excess(peer, &self.service.limits);
            self.turned_away = Some(TurnedAway { count, peer, reason });
            // Without time for that it is closed at once, as if its peer had ended.
            connection.is_ended = !self.admission.turn_away(&self.service.limits);
            reply::error(connection.write.out(), &Refusal::ServerFull, None);
            connection.write.seal(None);
            connection.closing = Some(CloseReason::ServerFull);
            mark_unflushed(connection, &mut self.unflushed);
        } else {
            self.admission.enter(peer, &self.service.limits);
            self.run_queue.push(connection);
        }
        id
    }

    /// Takes the word of the world that a connection may be read from or written to.
    pub fn ready(&mut self, id: ConnectionId, is_readable: bool, is_writable: bool) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        if is_readable {
            connection.is_readable = true;
            self.run_queue.push(connection);
        }
        if is_writable {
            connection.is_writable = true;
            mark_unflushed(connection, &mut self.unflushed);
        }
    }

    /// Takes what came of a job; it counts in the next turn.
    pub fn complete(&mut self, completion: Completion) {
        match completion {
            Completion::Texts(_) | Completion::File(_) => self.completions_long.push_back(completion),
            _ => self.completions.push_back(completion),
        }
    }

    /// True when a turn would find something to do without waiting.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.run_queue.is_empty()
            || !self.completions.is_empty()
            || !self.completions_long.is_empty()
            || !self.unflushed.is_empty()
            || self.service.log.has_open_changes()
            || self.service.upkeep.has_work(&self.service.log)
    }

    /// When a turn is due at the latest, by the steady clock.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let Service { upkeep, state, log, limits, .. } = &self.service;
        let upkeep = upkeep.next_deadline(state, log, limits.checkpoint_bytes);
        let turned_away = self.turned_away.map(|_| self.turned_away_logged_at);
        let of_disk = upkeep.into_iter().chain(self.mark_at).chain([self.service.elapsed_due]);
        self.deadlines.next().into_iter().chain(of_disk).chain(turned_away).min()
    }

    /// Takes nothing new any more: what was received is served, answered, and then every connection is closed.
    pub fn stop(&mut self) {
        self.is_stopping = true;
        self.service.write_down_elapsed();
        for (_, connection) in &mut self.connections {
            connection.is_readable = true;
            self.run_queue.push(connection);
        }
    }

    /// True when a stop is complete: nobody is connected, and every change is durable.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.is_stopping
            && self.connections.is_empty()
            && self.service.log.unsettled().is_none()
            && self.service.storing.is_empty()
            && self.service.delivered.is_empty()
    }

    /// One turn.
    pub fn turn(&mut self, now: Clock, host: &mut impl Host) {
        self.service.set_now(now);
        while let Some(completion) = self.completions.pop_front() {
            self.take(completion, host);
        }
        // What is left over has its turn in the next one.
        while self.given_bytes < self.service.limits.bytes_per_turn_max
            && let Some(completion) = self.completions_long.pop_front()
        {
            self.take(completion, host);
        }
        self.serve_queued(host);
        self.service.write_down_deliveries();
        self.service.expire_sessions();
        self.service.collect_removals();
        if now.steady_ms >= self.service.elapsed_due {
            self.service.write_down_elapsed();
        }
        self.service.keep_up(host);
        self.go_on();
        self.mark();
        self.end_holds_on_a_full_disk();
        self.submit_batch(host);
        self.close_late();
        self.log_turned_away();
        for id in std::mem::take(&mut self.unflushed) {
            self.flush(id, host);
        }
        self.service.write_down_deliveries();
        self.make_room();
        self.reap(host);
    }

    /// What is known to be on the disk is written down after a while without changes: a change says so of those before it.
    fn mark(&mut self) {
        let now = self.service.now.steady_ms;
        if !self.service.log.is_mark_due() {
            self.mark_at = None;
        } else if *self.mark_at.get_or_insert(now + MARK_MS) <= now {
            self.service.log.mark();
            self.mark_at = None;
        }
    }

    /// A line for each would be one that every stranger can have written as often as he connects.
    fn log_turned_away(&mut self) {
        let now = self.service.now.steady_ms;
        if now >= self.turned_away_logged_at
            && let Some(TurnedAway { count, peer, reason }) = self.turned_away.take()
        {
            info!(count, last = %peer, reason, "connections turned away");
            self.turned_away_logged_at = now + TURNED_AWAY_LOG_MS;
        }
    }

    /// Closes those whose peers have kept the server waiting for too long.
    fn close_late(&mut self) {
        let now = self.service.now.steady_ms;
        for _ in 0..LATE_PER_TURN_MAX {
            let Some(id) = self.deadlines.pop(now) else { return };
            let Some(connection) = find(&mut self.connections, id) else { continue };
            connection.note_wait(now);
            let is_closing = connection.closing.is_some();
            // It may be the server that is late.
            let is_server_late = connection.is_queued || matches!(connection.phase, Phase::Password(_));
            let limits = &self.service.limits;
            let late = self.deadlines.judge(id, &mut connection.wait, limits, now, is_closing, is_server_late);
            match (late, connection.closing) {
                (None, _) => {}
                (Some(CloseReason::SlowReader), _) => self.closed.push((id, CloseReason::SlowReader)),
                (Some(_), Some(reason)) => self.closed.push((id, reason)),
                (Some(reason), None) => {
                    // It may still get what it has asked for.
                    connection.closing = Some(reason);
                    mark_unflushed(connection, &mut self.unflushed);
                }
            }
        }
    }

    /// When connections hold too much memory together, closes some of those that wait for their peers.
    fn make_room(&mut self) {
        let most = self.service.limits.connections_bytes_max;
        if self.service.held_bytes as u64 <= most {
            return;
        }
        // Some may be as good as gone.
        let closed: HashSet<ConnectionId> = self.closed.iter().map(|(id, _)| *id).collect();
        let bytes_of = |id: &ConnectionId| self.connections.get(id.slot as usize).map_or(0, |gone| gone.counted_bytes);
        let going: usize = closed.iter().map(bytes_of).sum();
        // Those that have used up a share, or ask for what takes long, wait for themselves.
        let is_waiting = |connection: &&Connection| {
            let is_greedy = (connection.is_queued && connection.is_long) || connection.is_stalled;
            (is_greedy || matches!(connection.wait.awaited(), Awaited::Line | Awaited::Reading))
                && connection.peer != Peer::Admin
                && connection.counted_bytes > 0
                && !closed.contains(&connection.id)
        };
        let waiting = self.connections.iter().map(|(_, connection)| connection).filter(is_waiting);
        let holdings = waiting.map(|connection| Holding {
            id: connection.id,
            owner: connection.owner(),
            is_known: connection.wait.stage() == Stage::Known,
            since: connection.wait.since(),
            bytes: connection.counted_bytes as u64,
        });
        // Some more go than must, so that it is not all to be done again in the next turn.
        let excess = (self.service.held_bytes as u64 - most + most / 16).saturating_sub(going as u64);
        let chosen = eviction::choose(holdings.collect(), excess);
        self.closed.extend(chosen.into_iter().map(|id| (id, CloseReason::MemoryFull)));
    }

    /// Serves the lines of the run queue one after the other with what is left of the turn's bytes, but each with no less than
    /// one connection's share. What is left over, and what is put on the queue from now on, has its turn in the next one.
    fn serve_queued(&mut self, host: &mut impl Host) {
        // What completions have brought was given out before.
        let given = std::mem::take(&mut self.given_bytes) + std::mem::take(&mut self.service.work_bytes);
        let share = self.service.limits.read_bytes_per_turn_max;
        let share_short = share.min(SHORT_SHARE_BYTES);
        let mut bytes_left = self.service.limits.bytes_per_turn_max.saturating_sub(given).max(share);
        let RunQueue { requests, long, transfers } = &self.run_queue;
        let [requests, long, transfers] = [requests.len(), long.len(), transfers.len()];
        for _ in 0..requests {
            let Some(id) = self.run_queue.requests.pop_front_if(|_| bytes_left > 0) else { break };
            self.serve(id, share_short, &mut bytes_left, host);
        }
        bytes_left = bytes_left.max(share);
        for _ in 0..long {
            let Some(id) = (bytes_left > 0).then(|| self.run_queue.long.pop()).flatten() else { break };
            self.serve(id, share, &mut bytes_left, host);
        }
        bytes_left = bytes_left.max(share);
        for _ in 0..transfers {
            let Some(id) = (bytes_left > 0).then(|| self.run_queue.transfers.pop()).flatten() else { break };
            self.serve(id, share, &mut bytes_left, host);
        }
    }

    /// Holds every count against what it counts; for tests that drive the engine.
    ///
    /// # Panics
    /// One is wrong.
    pub fn assert_invariants(&self) {
        let connections = || self.connections.iter().map(|(_, connection)| connection);
        let held: usize = connections().map(|connection| connection.counted_bytes).sum();
        assert_eq!(held, self.service.held_bytes, "the memory that connections hold");
        let admitted = connections().filter(|connection| !connection.is_turned_away);
        let turned_away = connections().filter(|connection| connection.is_turned_away).count();
        self.admission.assert_counts(admitted.map(|connection| connection.peer), turned_away, &self.service.limits);
        let due = connections().filter_map(|connection| connection.wait.due().map(|due| (due, connection.id)));
        self.deadlines.assert_queue(due);
        for connection in connections() {
            connection.wait.assert_watched(&self.service.limits, connection.closing.is_some());
        }
        self.service.assert_counts(connections());
        self.service.state.assert_invariants();
    }

    /// Hands over what has changed since the last batch. A turn does so; the last turn may leave something behind.
    pub fn submit_batch(&mut self, host: &mut impl Host) {
        if let Some(batch) = self.service.log.take_batch() {
            host.submit(Job::Journal(batch));
        }
    }

    fn take(&mut self, completion: Completion, host: &mut impl Host) {
        match completion {
            Completion::Settled { batch, synced } => {
                let number = batch.number;
                self.service.log.settle(batch, synced);
                self.release(number, host);
                self.go_on();
            }
            Completion::Synced(synced) => {
                self.service.log.set_synced(synced);
                self.remove_files(host);
            }
            Completion::Space(done) => {
                let Service { upkeep, log, now, .. } = &mut self.service;
                upkeep.space_done(done, log, now.steady_ms);
                self.go_on();
            }
            Completion::Compacted(compacted) => {
                let Service { upkeep, state, log, now, .. } = &mut self.service;
                upkeep.compacted(compacted, state, log, now.steady_ms);
            }
            Completion::Texts(done) => self.texts_read(done, host),
            Completion::Password(done) => self.password_done(&done, host),
            Completion::File(done) => self.file_done(done, host),
        }
    }

    /// A backup that is being made keeps what could make room, and one can be made again.
    fn end_holds_on_a_full_disk(&mut self) {
        if !self.service.upkeep.is_held() || !self.service.log.is_full() {
            return;
        }
        for (_, connection) in &self.connections {
            if connection.is_holding {
                self.closed.push((connection.id, CloseReason::DiskFull));
            }
        }
    }

    /// There may be room in the journal for requests that waited for it.
    fn go_on(&mut self) {
        if self.stalled.is_empty() || self.service.log.must_wait() {
            return;
        }
        for id in std::mem::take(&mut self.stalled) {
            if let Some(connection) = find(&mut self.connections, id) {
                connection.is_stalled = false;
                self.run_queue.push(connection);
            }
        }
    }

    /// A batch is durable: what waited for it may go.
    fn release(&mut self, batch: u64, host: &mut impl Host) {
        while let Some(gated) = self.gated.first_entry().filter(|gated| *gated.key() <= batch) {
            for id in gated.remove() {
                if let Some(connection) = find(&mut self.connections, id) {
                    mark_unflushed(connection, &mut self.unflushed);
                }
            }
        }
        self.remove_files(host);
    }

    /// Files that nobody lists any more go once that is on the disk.
    fn remove_files(&mut self, host: &mut impl Host) {
        let synced = self.service.log.synced();
        if self.service.upkeep.is_held() {
            return;
        }
        while let Some((_, file)) = self.service.removals.pop_front_if(|(end, _)| *end <= synced) {
            host.submit(Job::File(FileJob::Remove(file)));
        }
    }

    fn password_done(&mut self, done: &PasswordDone, host: &mut impl Host) {
        self.service.passwords.leave(done.connection);
        let Some(connection) = find(&mut self.connections, done.connection) else { return };
        let pending = match std::mem::take(&mut connection.phase) {
            // It took too long, and the peer was told that nothing more comes.
            Phase::Password(_) if connection.closing.is_some() => return,
            Phase::Password(pending) => pending,
            phase => {
                connection.phase = phase;
                return;
            }
        };
        let spec = pending.spec;
        self.service.answer(connection, spec, host, |context| command::resume(context, pending, done));
        self.replied(done.connection);
    }

    fn texts_read(&mut self, done: TextsDone, host: &mut impl Host) {
        let TextsDone { connection: id, records } = done;
        self.service.end_reading(id);
        let Some(connection) = find(&mut self.connections, id) else { return };
        match std::mem::take(&mut connection.phase) {
            Phase::Inbox(inbox) => {
                self.service.texts_read(connection, *inbox, records, host);
                self.replied(id);
            }
            Phase::SmallDownload(small) => {
                self.service.small_download_read(connection, &small, &records, host);
                self.replied(id);
            }
            phase => connection.phase = phase,
        }
    }

    fn file_done(&mut self, done: FileDone, host: &mut impl Host) {
        match done {
            FileDone::Appended(transfer, spare) => self.upload_appended(transfer, spare),
            FileDone::Stored(transfer, sum) => self.upload_stored(transfer, sum, host),
            FileDone::DiskFull(transfer) => self.transfer_refused(transfer, Refusal::StorageFull, host),
            FileDone::Busy(transfer) => self.transfer_refused(transfer, Refusal::ServerBusy, host),
            FileDone::Block(transfer, block) => self.download_block(transfer, &block),
            FileDone::Unreadable(transfer, failure) => {
                self.download_unreadable(transfer, &failure, host);
            }
            FileDone::Forgotten(transfer) => drop(self.service.transfers.end(transfer)),
        }
    }

    fn upload_appended(&mut self, transfer: TransferId, spare: Vec<u8>) {
        let Some(id) = self.service.transfers.waiting(transfer) else { return };
        let Some(connection) = find(&mut self.connections, id) else { return };
        let Phase::Upload(upload) = &mut connection.phase else { return };
        upload.appended(spare);
        self.run_queue.push(connection);
    }

    fn upload_stored(&mut self, transfer: TransferId, sum: u32, host: &mut impl Host) {
        let waiting = self.service.transfers.end(transfer);
        let Some(Storing { spec, envelope, bytes, file }) = self.service.storing.remove(&transfer) else { return };
        if let Some(connection) = waiting.and_then(|id| find(&mut self.connections, id)) {
            connection.phase = Phase::Requests;
            let id = connection.id;
            self.service.answer(connection, spec, host, |context| command::store(context, file, bytes, sum, &envelope));
            self.replied(id);
        } else {
            // The peer is gone, but its request was complete; only the answer has nowhere to go.
            let mut random = || host.random();
            let refused =
                command::store(&mut self.service.context(Peer::Admin, &mut random), file, bytes, sum, &envelope).err();
            debug!(?refused, "a file was stored after its sender left");
        }
        self.service.incoming.remove(envelope.from, bytes);
        if self.service.state.file(file).is_none() {
            host.submit(Job::File(FileJob::Remove(file)));
        }
    }

    /// A transfer cannot go on; its reply has not begun. What is still to come of an upload's line is thrown away.
    fn transfer_refused(&mut self, transfer: TransferId, refusal: Refusal, host: &mut impl Host) {
        let waiting = self.service.transfers.waiting(transfer);
        let storing = self.service.storing.remove(&transfer);
        if let Some(Storing { envelope, bytes, .. }) = &storing {
            self.service.forget_upload(transfer, envelope, *bytes, host);
        }
        let Some(connection) = waiting.and_then(|id| find(&mut self.connections, id)) else { return };
        let id = connection.id;
        let discard = Phase::Discard(self.service.upload_discard_bytes());
        let spec = match (std::mem::take(&mut connection.phase), storing) {
            (Phase::Storing, Some(storing)) => storing.spec,
            (Phase::Upload(upload), None) => {
                self.service.forget_upload(transfer, &upload.envelope, upload.bytes, host);
                if !upload.is_complete {
                    connection.phase = discard;
                }
                upload.spec
            }
            (Phase::Download(download), None) => {
                self.service.forget_download(&download, host);
                download.spec
            }
            (phase, _) => {
                connection.phase = phase;
                return;
            }
        };
        self.service.refuse(connection, refusal, Some(spec));
        self.replied(id);
    }

    fn download_block(&mut self, transfer: TransferId, block: &[u8]) {
        let Some(id) = self.service.transfers.waiting(transfer) else { return };
        let Some(connection) = find(&mut self.connections, id) else { return };
        self.service.download_block(connection, block);
        self.replied(id);
    }

    fn download_unreadable(&mut self, transfer: TransferId, failure: &io::Error, host: &mut impl Host) {
        let Some(id) = self.service.transfers.waiting(transfer) else { return };
        let Some(connection) = find(&mut self.connections, id) else { return };
        let Phase::Download(download) = &connection.phase else { return };
        let file = download.file.0;
        error!(%failure, file, "a stored file cannot be read; stop the server and use `kurir check DIR --repair`");
        if !download.is_begun {
            return self.transfer_refused(transfer, Refusal::NoSuchFile, host);
        }
        // The reply has begun; only its missing end can still say that it is not whole.
        let Phase::Download(download) = std::mem::take(&mut connection.phase) else { return };
        connection.closing = Some(CloseReason::FileUnreadable);
        mark_unflushed(connection, &mut self.unflushed);
        self.service.forget_download(&download, host);
    }

    /// Sees to it that a new reply is written in time, and that what comes behind it in the read buffer is served.
    fn replied(&mut self, id: ConnectionId) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        self.given_bytes += connection.take_output_made();
        mark_unflushed(connection, &mut self.unflushed);
        self.run_queue.push(connection);
    }

    fn serve(&mut self, id: ConnectionId, share: u64, bytes_left: &mut u64, host: &mut impl Host) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        connection.is_queued = false;
        self.service.is_long_turn = std::mem::take(&mut connection.is_long);
        let mut budget = Budget::new(share, &self.service.limits);
        let mut read = std::mem::take(&mut connection.read);
        if let Some(reason) = connection.closing {
            let discarded = discard_input(&mut read, connection, &mut self.spare_buffers, host, &mut budget);
            self.spare_buffers.keep(read.release());
            connection.read = read;
            self.service.count_held(connection);
            match discarded {
                Ok(Stop::Budget) => {
                    connection.is_long = true;
                    self.run_queue.push(connection);
                }
                Ok(_) if connection.is_ended => mark_unflushed(connection, &mut self.unflushed),
                Ok(_) => {}
                Err(_) => self.closed.push((id, reason)),
            }
            *bytes_left = bytes_left.saturating_sub(budget.used);
            return;
        }
        if !connection.write.has_memory() {
            // One that grows from nothing would move what is in it several times.
            let fresh = || Vec::with_capacity(OUTPUT_BYTES_START);
            connection.write.adopt(self.spare_outputs.take().unwrap_or_else(fresh));
        }
        let service = &mut self.service;
        let (spares, is_stopping) = (&mut self.spare_buffers, self.is_stopping);
        let stop = serve_within_budget(&mut read, connection, service, spares, host, is_stopping, &mut budget);
        // One long answer may be more than a share, and takes the turns of others with it.
        *bytes_left = bytes_left.saturating_sub(budget.used);
        service.token = LastToken::default();
        self.spare_buffers.keep(read.release());
        connection.read = read;
        match stop {
            Ok(Stop::Waiting) => {}
            Ok(Stop::Budget) => {
                connection.is_long = true;
                self.run_queue.push(connection);
            }
            Ok(Stop::NoRoom) if connection.is_stalled => {}
            Ok(Stop::NoRoom) => {
                connection.is_stalled = true;
                self.stalled.push(id);
            }
            Err(reason) if reason == CloseReason::Lost => self.closed.push((id, reason)),
            Err(reason) => connection.closing = Some(reason),
        }
        mark_unflushed(connection, &mut self.unflushed);
    }

    /// Writes what may go. A connection that has nothing left to say goes too.
    fn flush(&mut self, id: ConnectionId, host: &mut impl Host) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        connection.is_unflushed = false;
        // A batch may have become durable between the reply and now.
        connection.write.release(self.service.log.settled_batch());
        let had_backlog = connection.write.backlog();
        while connection.is_writable && !connection.write.ready().is_empty() {
            match host.write(id, connection.write.ready()) {
                Ok(0) => {
                    self.closed.push((id, CloseReason::Lost));
                    break;
                }
                Ok(count) => connection.write.advance(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => connection.is_writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.closed.push((id, CloseReason::Lost));
                    break;
                }
            }
        }
        self.spare_outputs.keep(connection.write.release_memory());
        while let Some((_, delivery)) = connection.deliveries.pop_front_if(|(end, _)| *end <= connection.write.taken())
        {
            self.service.delivered.push_back(delivery);
        }
        if let Some(batch) = connection.write.waits_for()
            && connection.gated_by != Some(batch)
        {
            connection.gated_by = Some(batch);
            self.gated.entry(batch).or_default().push(id);
        }
        if let Some(reason) = connection.closing.filter(|_| connection.write.is_empty()) {
            if connection.is_ended {
                self.closed.push((id, reason));
            } else if !connection.is_lingering {
                // Closed at once, a socket to which something still comes takes back what its peer has not read yet.
                host.end(id);
                connection.is_lingering = true;
                self.run_queue.push(connection);
            }
        }
        if connection.write.backlog() as u64 > self.service.limits.output_bytes_max && connection.peer != Peer::Admin {
            self.closed.push((id, CloseReason::OutputTooLarge));
        }
        if connection.write.backlog() < had_backlog && connection.closing.is_none() && !connection.is_starved {
            // There may be requests that waited for room, or the next block of a download.
            self.run_queue.push(connection);
        }
        self.service.count_held(connection);
        watch(connection, &mut self.deadlines, &self.service.limits, self.service.now.steady_ms);
    }

    /// Drops what is closed.
    fn reap(&mut self, host: &mut impl Host) {
        for (id, reason) in std::mem::take(&mut self.closed) {
            if find(&mut self.connections, id).is_none() {
                continue;
            }
            let mut connection = self.connections.remove(id.slot as usize);
            if reason == CloseReason::ServerFull {
                debug!(peer = %connection.peer, slot = id.slot, %reason, "connection closed");
            } else if reason.is_bound() {
                info!(peer = %connection.peer, slot = id.slot, %reason, "connection closed");
            } else {
                debug!(peer = %connection.peer, slot = id.slot, %reason, "connection closed");
            }
            self.deadlines.forget(id, &mut connection.wait);
            self.service.held_bytes -= connection.counted_bytes;
            if connection.is_turned_away {
                self.admission.turned_away_left();
            } else {
                self.admission.leave(connection.peer, &self.service.limits);
            }
            for (_, delivery) in &connection.deliveries {
                self.service.claims.remove(delivery);
            }
            if connection.is_holding {
                self.service.upkeep.release();
            }
            if let Phase::Inbox(inbox) = &connection.phase {
                self.service.claims.remove(&inbox.claim);
            }
            match &connection.phase {
                Phase::Upload(upload) => {
                    self.service.forget_upload(upload.transfer, &upload.envelope, upload.bytes, host);
                }
                Phase::Download(download) => self.service.forget_download(download, host),
                _ => {}
            }
            host.close(id);
        }
    }
}

fn find(connections: &mut Slab<Connection>, id: ConnectionId) -> Option<&mut Connection> {
    connections.get_mut(id.slot as usize).filter(|connection| connection.id == id)
}

/// Notes what the connection waits for now, and sees to it that it is looked at when that has lasted too long.
fn watch(connection: &mut Connection, deadlines: &mut Deadlines, limits: &Limits, now: u64) {
    connection.note_wait(now);
    deadlines.keep(connection.id, &mut connection.wait, limits, connection.closing.is_some());
}

fn mark_unflushed(connection: &mut Connection, unflushed: &mut Vec<ConnectionId>) {
    if !connection.is_unflushed {
        connection.is_unflushed = true;
        unflushed.push(connection.id);
    }
}
