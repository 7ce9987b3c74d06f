//! The engine: every connection, the state, and the turn in which bytes become requests, changes and replies.
//!
//! It is driven from outside ([`crate::net`] in the server, tests and simulations elsewhere) and sees the world through
//! [`Host`]: it knows no socket, clock, thread or disk. What would block is handed out as a [`Job`]; what comes of it is
//! handed back as a [`Completion`].
//!
//! A turn: completions are taken, each runnable connection is served within its budget, the changes of the turn leave as
//! one batch, and every reply that is free to go is written. A reply that tells of a change waits in its write buffer
//! until the change's batch is durable.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};

use slab::Slab;
use tracing::{debug, error, warn};

use crate::buffer::Line;
use crate::change::{Change, FileId, UserId};
use crate::claims::Claims;
use crate::command::{self, Context, Outcome, PasswordWork, Task};
use crate::connection::{CloseReason, Connection, ConnectionId, Delivery, Peer, Phase};
use crate::files::{FileDone, FileJob, TransferId};
use crate::journal::{Batch, Log, Lsn};
use crate::limits::Limits;
use crate::password::{PasswordDone, PasswordJob};
use crate::refusal::Refusal;
use crate::reply::{self, InboxWriter, Item};
use crate::request;
use crate::state::{Entry, State};
use crate::throttle::Throttle;
use crate::transfer::{self, BLOCK_BYTES, ContentError, ContentReader, Download, Envelope, Upload};
use crate::verb::{Spec, Verb};

/// Read buffers that are kept for the next connection that has something to say.
const SPARE_BUFFERS_MAX: usize = 64;
/// Sessions ended in one turn because they were not used for long.
const SESSIONS_EXPIRED_PER_TURN_MAX: usize = 64;
/// Output waiting for a peer at which a download goes on.
const DOWNLOAD_BACKLOG_MAX: usize = BLOCK_BYTES / 3 * 4;

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

    /// Closes a connection; its id is not used again.
    fn close(&mut self, connection: ConnectionId);

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
}

/// What came of a [`Job`].
pub enum Completion {
    /// The batch, and all before it, is durable.
    Durable(Batch),
    /// The disk has room for the journal up to here.
    Room(Lsn),
    /// Password work is done.
    Password(PasswordDone),
    /// A file job is done.
    File(FileDone),
}

/// What may be done without asking an administrator.
#[derive(Clone, Copy, Debug)]
pub struct Registration {
    /// Strangers may make accounts.
    pub is_open: bool,
    /// So many a minute from one address; 0 for no limit.
    pub per_minute_max: u32,
}

/// The server, but for its sockets, threads and disk.
pub struct Engine {
    connections: Slab<Connection>,
    generation: u32,
    core: Core,
    completions: VecDeque<Completion>,
    run_queue: VecDeque<ConnectionId>,
    unflushed: Vec<ConnectionId>,
    /// Connections with replies that wait for a batch, in the order of the batches.
    gated: VecDeque<(u64, ConnectionId)>,
    closed: Vec<(ConnectionId, CloseReason)>,
    spare_buffers: Vec<Vec<u8>>,
    is_stopping: bool,
}

/// What all connections share.
struct Core {
    limits: Limits,
    state: State,
    log: Log,
    claims: Claims,
    registrations: Throttle,
    is_registration_open: bool,
    now: u64,
    inbox: InboxWriter,
    password_jobs: usize,
    transfers_next: u64,
    files_next: u64,
    /// Who waits for what becomes of a transfer.
    transfers: HashMap<TransferId, ConnectionId>,
    uploads: usize,
    /// Uploads that are complete. They are stored even if the peer goes.
    storing: HashMap<TransferId, Storing>,
    /// INBOX replies that got out, until that is written down.
    delivered: VecDeque<Delivery>,
    /// Files that go once the batch is durable in which their last listing ended.
    removals: VecDeque<(u64, FileId)>,
}

/// An upload whose bytes are on their way to their place.
struct Storing {
    spec: &'static Spec,
    envelope: Envelope,
    bytes: u64,
    file: FileId,
}

/// Where serving a connection stopped.
#[derive(PartialEq, Eq)]
enum Stop {
    /// It goes on when something comes: bytes, room to write, a completion.
    Waiting,
    /// It goes on in the next turn.
    Budget,
}

impl Engine {
    /// An engine that goes on from a recovered state and log.
    #[must_use]
    pub fn new(limits: Limits, registration: Registration, state: State, log: Log) -> Self {
        let files_next = state.next_file().0;
        Self {
            connections: Slab::new(),
            generation: 0,
            core: Core {
                limits,
                state,
                log,
                claims: Claims::default(),
                registrations: Throttle::new(registration.per_minute_max),
                is_registration_open: registration.is_open,
                now: 0,
                inbox: InboxWriter::default(),
                password_jobs: 0,
                transfers_next: 0,
                files_next,
                transfers: HashMap::new(),
                uploads: 0,
                storing: HashMap::new(),
                delivered: VecDeque::new(),
                removals: VecDeque::new(),
            },
            completions: VecDeque::new(),
            run_queue: VecDeque::new(),
            unflushed: Vec::new(),
            gated: VecDeque::new(),
            closed: Vec::new(),
            spare_buffers: Vec::new(),
            is_stopping: false,
        }
    }

    /// The state, to look at.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.core.state
    }

    /// The state, to go on with elsewhere.
    #[must_use]
    pub fn into_state(self) -> State {
        self.core.state
    }

    /// The bounds it keeps.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.core.limits
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Takes a new connection. One too many is told so and closed in the next turn; the administrator is never too many.
    pub fn open(&mut self, peer: Peer) -> ConnectionId {
        let is_full = self.connections.len() >= self.core.limits.connections_max && peer != Peer::Admin;
        self.generation = self.generation.wrapping_add(1);
        let entry = self.connections.vacant_entry();
        let slot = u32::try_from(entry.key()).unwrap_or(u32::MAX);
        let id = ConnectionId { slot, generation: self.generation };
        let connection = entry.insert(Connection::new(id, peer));
        debug!(%peer, slot, "connection opened");
        if is_full {
            reply::error(connection.write.out(), &Refusal::ServerFull, None);
            connection.write.seal(None);
            connection.closing = Some(CloseReason::ServerFull);
            mark_unflushed(connection, &mut self.unflushed);
        } else {
            enqueue(connection, &mut self.run_queue);
        }
        id
    }

    /// Takes the word of the world that a connection may be read from or written to.
    pub fn ready(&mut self, id: ConnectionId, is_readable: bool, is_writable: bool) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        if is_readable {
            connection.is_readable = true;
            enqueue(connection, &mut self.run_queue);
        }
        if is_writable {
            connection.is_writable = true;
            mark_unflushed(connection, &mut self.unflushed);
        }
    }

    /// Takes what came of a job; it counts in the next turn.
    pub fn complete(&mut self, completion: Completion) {
        self.completions.push_back(completion);
    }

    /// True when a turn would find something to do without waiting.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.run_queue.is_empty()
            || !self.completions.is_empty()
            || !self.unflushed.is_empty()
            || self.core.log.has_open_changes()
    }

    /// Takes nothing new any more: what was received is served, answered, and then every connection is closed.
    pub fn stop(&mut self) {
        self.is_stopping = true;
        for (_, connection) in &mut self.connections {
            connection.is_readable = true;
            enqueue(connection, &mut self.run_queue);
        }
    }

    /// True when a stop is complete: nobody is connected, and every change is durable.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.is_stopping
            && self.connections.is_empty()
            && self.core.log.unsettled().is_none()
            && self.core.storing.is_empty()
            && self.core.delivered.is_empty()
    }

    /// One turn. `now` is in milliseconds since 1970, UTC.
    pub fn turn(&mut self, now: u64, host: &mut impl Host) {
        self.core.now = now;
        while let Some(completion) = self.completions.pop_front() {
            self.take(completion, host);
        }
        // What is put on the queue from now on has its turn in the next one.
        for _ in 0..self.run_queue.len() {
            if let Some(id) = self.run_queue.pop_front() {
                self.serve(id, host);
            }
        }
        self.core.write_down_deliveries();
        self.core.expire_sessions();
        self.core.collect_removals();
        if let Some(batch) = self.core.log.take_batch() {
            host.submit(Job::Journal(batch));
        }
        for id in std::mem::take(&mut self.unflushed) {
            self.flush(id, host);
        }
        self.core.write_down_deliveries();
        self.reap(host);
    }

    fn take(&mut self, completion: Completion, host: &mut impl Host) {
        match completion {
            Completion::Durable(batch) => {
                let number = batch.number;
                self.core.log.settle(batch);
                self.release(number, host);
            }
            Completion::Room(room) => self.core.log.set_room(room),
            Completion::Password(done) => self.password_done(&done, host),
            Completion::File(done) => self.file_done(done, host),
        }
    }

    /// A batch is durable: what waited for it may go.
    fn release(&mut self, batch: u64, host: &mut impl Host) {
        while let Some((_, id)) = self.gated.pop_front_if(|(waits_for, _)| *waits_for <= batch) {
            if let Some(connection) = find(&mut self.connections, id) {
                connection.write.release(batch);
                mark_unflushed(connection, &mut self.unflushed);
            }
        }
        while let Some((_, file)) = self.core.removals.pop_front_if(|(waits_for, _)| *waits_for <= batch) {
            host.submit(Job::File(FileJob::Remove(file)));
        }
    }

    fn password_done(&mut self, done: &PasswordDone, host: &mut impl Host) {
        self.core.password_jobs -= 1;
        let Some(connection) = find(&mut self.connections, done.connection) else { return };
        let Phase::Password(pending) = std::mem::take(&mut connection.phase) else { return };
        let spec = pending.spec;
        let peer = connection.peer;
        let batch = self.core.answer(connection, spec, host, |context| command::resume(context, pending, done));
        if spec.verb == Verb::Auth && !done.passed {
            warn!(address = %peer, "login failed");
        }
        self.replied(done.connection, batch);
    }

    fn file_done(&mut self, done: FileDone, host: &mut impl Host) {
        match done {
            FileDone::Appended(transfer, spare) => self.upload_appended(transfer, spare),
            FileDone::Stored(transfer) => self.upload_stored(transfer, host),
            FileDone::DiskFull(transfer) => self.upload_without_room(transfer, host),
            FileDone::Block(transfer, block) => self.download_block(transfer, &block),
            FileDone::Unreadable(transfer, failure) => {
                error!(%failure, "a stored file could not be read");
                self.download_unreadable(transfer, host);
            }
        }
    }

    fn upload_appended(&mut self, transfer: TransferId, spare: Vec<u8>) {
        let Some(id) = self.core.transfers.get(&transfer).copied() else { return };
        let Some(connection) = find(&mut self.connections, id) else { return };
        let Phase::Upload(upload) = &mut connection.phase else { return };
        upload.is_writing = false;
        if upload.block.capacity() == 0 {
            upload.block = spare;
        }
        enqueue(connection, &mut self.run_queue);
    }

    fn upload_stored(&mut self, transfer: TransferId, host: &mut impl Host) {
        let waiting = self.core.transfers.remove(&transfer);
        let Some(Storing { spec, envelope, bytes, file }) = self.core.storing.remove(&transfer) else { return };
        self.core.uploads -= 1;
        if let Some(connection) = waiting.and_then(|id| find(&mut self.connections, id)) {
            connection.phase = Phase::Requests;
            let id = connection.id;
            let batch =
                self.core.answer(connection, spec, host, |context| command::store(context, file, bytes, &envelope));
            self.replied(id, batch);
        } else {
            // The peer is gone, but its request was complete; only the answer has nowhere to go.
            let mut random = || host.random();
            let refused =
                command::store(&mut self.core.context(Peer::Admin, &mut random), file, bytes, &envelope).err();
            debug!(?refused, "a file was stored after its sender left");
        }
        if self.core.state.file(file).is_none() {
            host.submit(Job::File(FileJob::Remove(file)));
        }
    }

    fn upload_without_room(&mut self, transfer: TransferId, host: &mut impl Host) {
        let Some(id) = self.core.transfers.get(&transfer).copied() else { return };
        let storing = self.core.storing.remove(&transfer);
        self.core.forget(transfer, true, host);
        let Some(connection) = find(&mut self.connections, id) else { return };
        let (spec, next) = match (std::mem::take(&mut connection.phase), storing) {
            (Phase::Upload(upload), _) if upload.is_complete => (upload.spec, Phase::Requests),
            (Phase::Upload(upload), _) => (upload.spec, Phase::Discard(self.core.upload_discard_bytes())),
            (_, Some(storing)) => (storing.spec, Phase::Requests),
            (phase, None) => {
                connection.phase = phase;
                return;
            }
        };
        connection.phase = next;
        self.core.refuse(connection, Refusal::StorageFull, Some(spec));
        self.replied(id, None);
    }

    fn download_block(&mut self, transfer: TransferId, block: &[u8]) {
        let Some(id) = self.core.transfers.get(&transfer).copied() else { return };
        let Some(connection) = find(&mut self.connections, id) else { return };
        let Phase::Download(download) = &mut connection.phase else { return };
        let out = connection.write.out();
        if !download.is_begun {
            download.is_begun = true;
            reply::download_start(out, &download.name, download.spec);
        }
        transfer::encode(block, out);
        download.sent += block.len() as u64;
        download.is_reading = false;
        let batch = self.core.log.unsettled_at(download.lsn);
        connection.write.seal(batch);
        self.replied(id, batch);
    }

    fn download_unreadable(&mut self, transfer: TransferId, host: &mut impl Host) {
        let Some(id) = self.core.transfers.get(&transfer).copied() else { return };
        self.core.forget(transfer, false, host);
        let Some(connection) = find(&mut self.connections, id) else { return };
        let Phase::Download(download) = std::mem::take(&mut connection.phase) else { return };
        if !download.is_begun {
            self.core.refuse(connection, Refusal::NoSuchFile, Some(download.spec));
            self.replied(id, None);
        } else {
            // The reply has begun; only its absence can still say that it is not whole.
            self.closed.push((id, CloseReason::FileUnreadable));
        }
    }

    /// Sees to it that a new reply is written in time, and that what comes behind it in the read buffer is served.
    fn replied(&mut self, id: ConnectionId, batch: Option<u64>) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        if let Some(batch) = batch {
            self.gated.push_back((batch, id));
        }
        mark_unflushed(connection, &mut self.unflushed);
        enqueue(connection, &mut self.run_queue);
    }

    fn serve(&mut self, id: ConnectionId, host: &mut impl Host) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        connection.is_queued = false;
        if connection.closing.is_some() {
            return;
        }
        let mut gate = None;
        let stop =
            serve_within_budget(connection, &mut self.core, &mut self.spare_buffers, &mut gate, host, self.is_stopping);
        if let Some(spare) = connection.read.release()
            && self.spare_buffers.len() < SPARE_BUFFERS_MAX
        {
            self.spare_buffers.push(spare);
        }
        match stop {
            Ok(Stop::Waiting) => {}
            Ok(Stop::Budget) => enqueue(connection, &mut self.run_queue),
            Err(reason) if reason == CloseReason::Lost => self.closed.push((id, reason)),
            Err(reason) => connection.closing = Some(reason),
        }
        if let Some(batch) = gate {
            self.gated.push_back((batch, id));
        }
        mark_unflushed(connection, &mut self.unflushed);
    }

    /// Writes what may go. A connection that has nothing left to say goes too.
    fn flush(&mut self, id: ConnectionId, host: &mut impl Host) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        connection.is_unflushed = false;
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
        while let Some((_, delivery)) = connection.deliveries.pop_front_if(|(end, _)| *end <= connection.write.taken())
        {
            self.core.delivered.push_back(delivery);
        }
        if connection.write.is_empty() {
            connection.write.shrink();
            if let Some(reason) = connection.closing {
                self.closed.push((id, reason));
            }
        }
        if connection.write.backlog() < had_backlog && connection.closing.is_none() {
            // There may be requests that waited for room, or the next block of a download.
            enqueue(connection, &mut self.run_queue);
        }
    }

    /// Drops what is closed.
    fn reap(&mut self, host: &mut impl Host) {
        for (id, reason) in std::mem::take(&mut self.closed) {
            if find(&mut self.connections, id).is_none() {
                continue;
            }
            let connection = self.connections.remove(id.slot as usize);
            debug!(peer = %connection.peer, slot = id.slot, %reason, "connection closed");
            for (_, delivery) in &connection.deliveries {
                self.core.claims.remove(delivery);
            }
            let unfinished = match &connection.phase {
                Phase::Upload(upload) => Some(upload.transfer),
                Phase::Download(download) => Some(download.transfer),
                _ => None,
            };
            if let Some(transfer) = unfinished {
                self.core.forget(transfer, matches!(connection.phase, Phase::Upload(_)), host);
            }
            host.close(id);
        }
    }
}

impl Core {
    fn context<'e>(&'e mut self, peer: Peer, random: &'e mut dyn FnMut() -> [u8; 16]) -> Context<'e> {
        Context {
            state: &mut self.state,
            log: &mut self.log,
            claims: &self.claims,
            limits: &self.limits,
            registrations: &mut self.registrations,
            is_registration_open: self.is_registration_open,
            now: self.now,
            random,
            peer,
        }
    }

    /// Runs a handler for a connection and writes the answer, or begins what must come before it. Returns the batch that
    /// the answer waits for.
    fn answer(
        &mut self,
        connection: &mut Connection,
        spec: &'static Spec,
        host: &mut impl Host,
        handler: impl for<'e> FnOnce(&'e mut Context<'_>) -> Result<Outcome<'e>, Refusal>,
    ) -> Option<u64> {
        let mut random = || host.random();
        let mut context = self.context(connection.peer, &mut random);
        let task = match handler(&mut context) {
            Ok(Outcome::Begin(task)) => Some(task),
            Ok(Outcome::Reply(reply)) => {
                reply::ok(connection.write.out(), &reply, spec);
                None
            }
            Err(refusal) => {
                reply::error(connection.write.out(), &refusal, Some(spec));
                None
            }
        };
        match task {
            Some(Task::Password(work)) => self.begin_password(connection, work, host),
            Some(Task::Inbox(user)) => return self.deliver(connection, spec, user),
            Some(Task::Upload(envelope)) => self.begin_upload(connection, spec, envelope),
            Some(Task::Download(file)) => self.begin_download(connection, spec, file),
            None => {
                let shows_nothing = matches!(spec.verb, Verb::Ping | Verb::Help);
                let batch = if shows_nothing { None } else { self.log.unsettled() };
                connection.write.seal(batch);
                return batch;
            }
        }
        None
    }

    fn refuse(&mut self, connection: &mut Connection, refusal: Refusal, spec: Option<&Spec>) {
        reply::error(connection.write.out(), &refusal, spec);
        connection.write.seal(None);
    }

    fn begin_password(&mut self, connection: &mut Connection, work: PasswordWork, host: &mut impl Host) {
        let PasswordWork { check, hash, pending } = work;
        if self.password_jobs >= self.limits.password_queue_max {
            self.refuse(connection, Refusal::ServerBusy, Some(pending.spec));
            return;
        }
        self.password_jobs += 1;
        connection.phase = Phase::Password(pending);
        host.submit(Job::Password(PasswordJob { connection: connection.id, check, hash }));
    }

    /// Writes an INBOX reply. Its messages count as delivered once its last byte is taken by the kernel.
    fn deliver(&mut self, connection: &mut Connection, spec: &'static Spec, user: UserId) -> Option<u64> {
        let mailbox = self.state.user(user).map(|user| &user.mailbox);
        let unclaimed = mailbox.into_iter().flat_map(|mailbox| self.claims.unclaimed(user, mailbox));
        let entries: Vec<&Entry> = unclaimed.take(self.limits.inbox_messages_max).collect();
        let bytes_max = usize::try_from(self.limits.inbox_bytes_max).unwrap_or(usize::MAX);
        let items = entries.iter().map(|entry| item(entry));
        let count = self.inbox.write(connection.write.out(), items, bytes_max, spec.dialect);
        let batch = match &entries[..count] {
            [] => None,
            [first, ..] => {
                let last = entries.get(count - 1).unwrap_or(first);
                let delivery = Delivery { user, first: first.id, last: last.id };
                let batch = self.log.unsettled_at(last.lsn);
                self.claims.add(delivery);
                connection.deliveries.push_back((connection.write.end(), delivery));
                batch
            }
        };
        connection.write.seal(batch);
        batch
    }

    fn begin_upload(&mut self, connection: &mut Connection, spec: &'static Spec, envelope: Envelope) {
        if self.uploads >= self.limits.uploads_max {
            self.refuse(connection, Refusal::ServerBusy, Some(spec));
            return;
        }
        self.uploads += 1;
        let transfer = self.next_transfer(connection.id);
        connection.phase = Phase::Upload(Box::new(Upload {
            transfer,
            spec,
            envelope,
            content: ContentReader::default(),
            block: Vec::new(),
            bytes: 0,
            is_writing: false,
            is_complete: false,
            is_short: false,
        }));
    }

    fn begin_download(&mut self, connection: &mut Connection, spec: &'static Spec, file: FileId) {
        let transfer = self.next_transfer(connection.id);
        let Some(stored) = self.state.file(file) else { return };
        let download = Download {
            transfer,
            spec,
            file,
            name: stored.name.clone(),
            bytes: stored.bytes,
            sent: 0,
            is_begun: false,
            is_reading: false,
            lsn: stored.lsn,
        };
        connection.phase = Phase::Download(Box::new(download));
    }

    fn next_transfer(&mut self, id: ConnectionId) -> TransferId {
        self.transfers_next += 1;
        let transfer = TransferId(self.transfers_next);
        self.transfers.insert(transfer, id);
        transfer
    }

    /// Ends a transfer that is not complete.
    fn forget(&mut self, transfer: TransferId, is_upload: bool, host: &mut impl Host) {
        self.transfers.remove(&transfer);
        self.uploads -= usize::from(is_upload);
        host.submit(Job::File(FileJob::Forget(transfer)));
    }

    /// So much of the line is thrown away after an upload was refused: what the peer may have on its way in good faith.
    fn upload_discard_bytes(&self) -> u64 {
        let encoded = self.limits.file_bytes_max.div_ceil(3).saturating_mul(4);
        encoded.saturating_add(self.limits.discard_bytes_max)
    }

    /// Messages whose INBOX reply got out leave the mailbox. On a full disk they stay claimed until that can be written down.
    fn write_down_deliveries(&mut self) {
        while let Some(delivery) = self.delivered.front() {
            let &Delivery { user, first, last } = delivery;
            let change = Change::Delivered { user, first, last };
            let Ok(lsn) = self.log.append_reserved(&change) else { return };
            self.state.apply(&change, lsn);
            self.claims.remove(delivery);
            self.delivered.pop_front();
        }
    }

    fn expire_sessions(&mut self) {
        for _ in 0..SESSIONS_EXPIRED_PER_TURN_MAX {
            let Some(session) = self.state.session_expired(self.now) else { return };
            let change = Change::SessionClosed { session };
            let Ok(lsn) = self.log.append_reserved(&change) else { return };
            self.state.apply(&change, lsn);
        }
    }

    /// The bytes of a file that nobody lists any more go once that is durable.
    fn collect_removals(&mut self) {
        let batch = self.log.open_batch();
        self.removals.extend(self.state.take_freed_files().into_iter().map(|file| (batch, file)));
    }
}

/// Serves what a connection has sent, and reads more, until nothing is there, something must be waited for, or its share
/// of the turn is used up. `gate` is left at the last batch that a reply waits for.
fn serve_within_budget(
    connection: &mut Connection,
    core: &mut Core,
    spare_buffers: &mut Vec<Vec<u8>>,
    gate: &mut Option<u64>,
    host: &mut impl Host,
    is_stopping: bool,
) -> Result<Stop, CloseReason> {
    let mut requests_left = core.limits.requests_per_turn_max;
    let mut bytes_left = core.limits.read_bytes_per_turn_max;
    let backlog_max = usize::try_from(core.limits.output_bytes_high).unwrap_or(usize::MAX);
    loop {
        while requests_left > 0 {
            if connection.write.backlog() > backlog_max {
                return Ok(Stop::Waiting);
            }
            match step(connection, core, gate, host)? {
                Step::Done => requests_left -= 1,
                Step::Waiting => return Ok(Stop::Waiting),
                Step::Starved => break,
            }
        }
        if requests_left == 0 || bytes_left == 0 {
            return Ok(Stop::Budget);
        }
        if connection.is_ended {
            return Err(CloseReason::Ended);
        }
        if !connection.is_readable {
            return if is_stopping { Err(CloseReason::ServerStops) } else { Ok(Stop::Waiting) };
        }
        bytes_left = bytes_left.saturating_sub(fill(connection, spare_buffers, host)?);
    }
}

/// Reads once. Says how many bytes came.
fn fill(
    connection: &mut Connection,
    spare_buffers: &mut Vec<Vec<u8>>,
    host: &mut impl Host,
) -> Result<u64, CloseReason> {
    if !connection.read.has_memory() {
        connection.read.adopt(spare_buffers.pop().unwrap_or_default());
    }
    match host.read(connection.id, connection.read.room()) {
        Ok(0) => {
            connection.is_ended = true;
            Ok(0)
        }
        Ok(count) => {
            connection.read.fill(count);
            Ok(count as u64)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            connection.is_readable = false;
            Ok(0)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
        Err(_) => Err(CloseReason::Lost),
    }
}

/// What one step of a connection came to.
enum Step {
    /// Something was done, and there may be more.
    Done,
    /// A completion or room to write must come first.
    Waiting,
    /// More bytes must come first.
    Starved,
}

fn step(
    connection: &mut Connection,
    core: &mut Core,
    gate: &mut Option<u64>,
    host: &mut impl Host,
) -> Result<Step, CloseReason> {
    match connection.phase {
        Phase::Requests => Ok(next_request(connection, core, gate, host)),
        Phase::Upload(_) => Ok(upload_step(connection, core, host)),
        Phase::Download(_) => Ok(download_step(connection, core, host)),
        Phase::Discard(left) => discard_step(connection, left),
        Phase::Password(_) | Phase::Storing => Ok(Step::Waiting),
    }
}

fn next_request(connection: &mut Connection, core: &mut Core, gate: &mut Option<u64>, host: &mut impl Host) -> Step {
    let line_bytes_max = usize::try_from(core.limits.line_bytes_max).unwrap_or(usize::MAX - 1);
    let line = match connection.read.line(line_bytes_max) {
        Line::Partial if connection.is_ended && !connection.read.pending().is_empty() => {
            connection.read.last_line(line_bytes_max)
        }
        line => line,
    };
    match line {
        Line::Partial => Step::Starved,
        Line::Whole { content, length } => {
            // The line is borrowed from the buffer while it is handled, so the buffer is set aside.
            let read = std::mem::take(&mut connection.read);
            let taken = handle_line(connection, core, gate, host, read.slice(content), length);
            connection.read = read;
            connection.read.consume(taken);
            Step::Done
        }
        Line::TooLong => {
            let read = std::mem::take(&mut connection.read);
            let taken = handle_long_line(connection, core, gate, host, read.pending());
            connection.read = read;
            connection.read.consume(taken);
            Step::Done
        }
    }
}

/// Handles a whole line. Says how many of the line's `length` bytes were used: all, or for a file those before its content.
fn handle_line(
    connection: &mut Connection,
    core: &mut Core,
    gate: &mut Option<u64>,
    host: &mut impl Host,
    line: &[u8],
    length: usize,
) -> usize {
    if request::is_blank(line) {
        return length;
    }
    match request::parse(line, connection.peer.audience()) {
        Ok(request) => {
            let batch = core.answer(connection, request.spec, host, |context| command::handle(context, &request));
            *gate = batch.or(*gate);
            match (request.content_at, &mut connection.phase) {
                (Some(content_at), Phase::Upload(upload)) => {
                    upload.is_short = true;
                    content_at
                }
                _ => length,
            }
        }
        Err(fault) => {
            core.refuse(connection, fault.refusal, fault.spec);
            length
        }
    }
}

/// Handles the beginning of a line that is longer than a request may be: only the content of a file may. Says how many
/// bytes were used.
fn handle_long_line(
    connection: &mut Connection,
    core: &mut Core,
    gate: &mut Option<u64>,
    host: &mut impl Host,
    start: &[u8],
) -> usize {
    let parsed = request::parse(start, connection.peer.audience());
    if let Ok(request) = &parsed
        && let Some(content_at) = request.content_at
    {
        let batch = core.answer(connection, request.spec, host, |context| command::handle(context, request));
        *gate = batch.or(*gate);
        if !matches!(connection.phase, Phase::Upload(_)) {
            // A peer that may send files has this one on its way in good faith; others have less patience coming.
            let is_known = command::is_authorised(&core.state, request.parameter(0), core.now);
            let discard = if is_known { core.upload_discard_bytes() } else { core.limits.discard_bytes_max };
            connection.phase = Phase::Discard(discard);
        }
        return content_at;
    }
    let spec = match &parsed {
        Ok(request) => Some(request.spec),
        Err(fault) => fault.spec,
    };
    core.refuse(connection, Refusal::LineTooLong, spec);
    connection.phase = Phase::Discard(core.limits.discard_bytes_max);
    0
}

/// Throws away the rest of a line.
fn discard_step(connection: &mut Connection, left: u64) -> Result<Step, CloseReason> {
    let pending = connection.read.pending();
    if pending.is_empty() {
        return Ok(Step::Starved);
    }
    if let Some(end) = memchr::memchr(b'\n', pending) {
        connection.read.consume(end + 1);
        connection.phase = Phase::Requests;
        return Ok(Step::Done);
    }
    let count = pending.len();
    connection.read.consume(count);
    let left = left.checked_sub(count as u64).ok_or(CloseReason::LineWithoutEnd)?;
    connection.phase = Phase::Discard(left);
    Ok(Step::Starved)
}

/// Takes more of a file's content, and sends on what is a block.
fn upload_step(connection: &mut Connection, core: &mut Core, host: &mut impl Host) -> Step {
    let Phase::Upload(upload) = &mut connection.phase else { return Step::Starved };
    if upload.is_complete {
        return upload_end(connection, core, host);
    }
    if upload.block.len() >= BLOCK_BYTES {
        if upload.is_writing {
            return Step::Waiting;
        }
        send_block(upload, host);
    }
    let pending = connection.read.pending();
    let room = (BLOCK_BYTES - upload.block.len()) / 3 * 4 + 4;
    let input = &pending[..pending.len().min(room)];
    let before = upload.block.len();
    let read = if pending.is_empty() && connection.is_ended {
        // A line as short as any other may end with the stream like any other. A long one whose end never came is an
        // upload that broke off.
        let ended = if upload.is_short { upload.content.finish() } else { Err(ContentError::Missing) };
        ended.map(|()| 0)
    } else {
        upload.content.read(input, &mut upload.block)
    };
    upload.bytes += (upload.block.len() - before) as u64;
    let refusal = match read {
        Ok(_) if upload.bytes > upload.envelope.bytes_max => upload.envelope.over,
        Ok(taken) => {
            upload.is_complete = upload.content.is_ended();
            let is_starved = taken == 0 && !upload.is_complete;
            connection.read.consume(taken);
            return if is_starved { Step::Starved } else { Step::Done };
        }
        Err(ContentError::Base64) => Refusal::InvalidBase64,
        Err(ContentError::Excess) => Refusal::Excess(upload.spec),
        Err(ContentError::Missing) => Refusal::Incomplete(upload.spec),
    };
    upload_refused(connection, core, host, refusal)
}

fn send_block(upload: &mut Upload, host: &mut impl Host) {
    upload.is_writing = true;
    let block = std::mem::take(&mut upload.block);
    host.submit(Job::File(FileJob::Append(upload.transfer, block)));
}

/// The content is whole: the last block and the order to store it go out, one behind the other.
fn upload_end(connection: &mut Connection, core: &mut Core, host: &mut impl Host) -> Step {
    let Phase::Upload(upload) = std::mem::replace(&mut connection.phase, Phase::Storing) else { return Step::Starved };
    let Upload { transfer, spec, envelope, block, bytes, .. } = *upload;
    let file = FileId(core.files_next);
    core.files_next += 1;
    host.submit(Job::File(FileJob::Append(transfer, block)));
    host.submit(Job::File(FileJob::Store(transfer, file)));
    core.storing.insert(transfer, Storing { spec, envelope, bytes, file });
    Step::Waiting
}

/// Ends an upload with nothing stored. The rest of its line is thrown away.
fn upload_refused(connection: &mut Connection, core: &mut Core, host: &mut impl Host, refusal: Refusal) -> Step {
    let discard = Phase::Discard(core.upload_discard_bytes());
    let Phase::Upload(upload) = std::mem::replace(&mut connection.phase, discard) else { return Step::Starved };
    core.forget(upload.transfer, true, host);
    core.refuse(connection, refusal, Some(upload.spec));
    Step::Done
}

/// Asks for the next block of a download once the last one is on its way to the peer.
fn download_step(connection: &mut Connection, core: &mut Core, host: &mut impl Host) -> Step {
    let Phase::Download(download) = &mut connection.phase else { return Step::Starved };
    if download.is_reading {
        return Step::Waiting;
    }
    if download.is_begun && download.sent == download.bytes {
        let (transfer, batch) = (download.transfer, core.log.unsettled_at(download.lsn));
        reply::download_end(connection.write.out());
        connection.write.seal(batch);
        connection.phase = Phase::Requests;
        core.forget(transfer, false, host);
        return Step::Done;
    }
    if connection.write.backlog() >= DOWNLOAD_BACKLOG_MAX {
        return Step::Waiting;
    }
    download.is_reading = true;
    let (transfer, file, offset, bytes) = (download.transfer, download.file, download.sent, download.next_bytes());
    host.submit(Job::File(FileJob::Read { transfer, file, offset, bytes, spare: Vec::new() }));
    Step::Waiting
}

fn item(entry: &Entry) -> Item<'_> {
    let message = &*entry.message;
    Item {
        id: entry.id,
        at: message.at,
        from: message.from(),
        to: message.to(),
        is_to_group: message.is_to_group,
        text: message.text(),
    }
}

fn find(connections: &mut Slab<Connection>, id: ConnectionId) -> Option<&mut Connection> {
    connections.get_mut(id.slot as usize).filter(|connection| connection.id == id)
}

fn enqueue(connection: &mut Connection, run_queue: &mut VecDeque<ConnectionId>) {
    if !connection.is_queued {
        connection.is_queued = true;
        run_queue.push_back(connection.id);
    }
}

fn mark_unflushed(connection: &mut Connection, unflushed: &mut Vec<ConnectionId>) {
    if !connection.is_unflushed {
        connection.is_unflushed = true;
        unflushed.push(connection.id);
    }
}
