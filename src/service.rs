//! What all connections share, and what a request does with it besides changing the state: password work, a backup. (What it
//! does with an INBOX reply, and with a file in or out, stands in [`crate::inbox`], [`crate::upload`] and
//! [`crate::download`].) It knows no buffers but the one that a reply is written to.

use std::collections::{HashMap, VecDeque};

use crate::backup::Point;
use crate::change::{Change, FileId, Lsn};
use crate::claims::Claims;
use crate::command::{Context, LastToken, Outcome, PasswordWork, Task};
use crate::connection::{Connection, ConnectionId, Delivery, Peer, Phase};
use crate::engine::{Host, Job, Registration};
use crate::files::TransferId;
use crate::limits::Limits;
use crate::log::{Log, Need};
use crate::password::PasswordJob;
use crate::refusal::Refusal;
use crate::reply::{self, InboxWriter, Reply};
use crate::state::State;
use crate::throttle::Throttle;
use crate::transfer::{BLOCK_BYTES, Envelope, Incoming};
use crate::upkeep::{Holdings, Upkeep};
use crate::verb::{Spec, Verb};

/// Sessions ended in one turn because they were not used for long.
const SESSIONS_EXPIRED_PER_TURN_MAX: usize = 64;

/// What all connections share.
pub(crate) struct Service {
    pub(crate) limits: Limits,
    pub(crate) state: State,
    pub(crate) log: Log,
    pub(crate) claims: Claims,
    pub(crate) registrations: Throttle,
    pub(crate) is_registration_open: bool,
    pub(crate) now: u64,
    pub(crate) inbox: InboxWriter,
    pub(crate) password_jobs: usize,
    pub(crate) transfers_next: u64,
    pub(crate) files_next: u64,
    /// Who waits for what becomes of a transfer.
    pub(crate) transfers: HashMap<TransferId, ConnectionId>,
    pub(crate) uploads: usize,
    /// The bytes of uploads that are not stored yet.
    pub(crate) incoming: Incoming,
    /// Bytes of files that were put into write buffers, until they are counted against the turn.
    pub(crate) given_bytes: u64,
    /// What is handled at once of a file.
    pub(crate) block_bytes: usize,
    /// Memory for the block of a file that is handled now.
    pub(crate) scratch: Vec<u8>,
    /// Uploads that are complete. They are stored even if the peer goes.
    pub(crate) storing: HashMap<TransferId, Storing>,
    /// Of the connection that is being served.
    pub(crate) token: LastToken,
    /// INBOX replies that got out, until that is written down.
    pub(crate) delivered: VecDeque<Delivery>,
    /// The disk.
    pub(crate) upkeep: Upkeep,
    /// Files that go once the change is on the disk that ended their last listing.
    pub(crate) removals: VecDeque<(Lsn, FileId)>,
}

/// An upload whose bytes are on their way to their place.
pub(crate) struct Storing {
    pub(crate) spec: &'static Spec,
    pub(crate) envelope: Envelope,
    pub(crate) bytes: u64,
    pub(crate) file: FileId,
}

impl Service {
    pub(crate) fn new(limits: Limits, registration: Registration, state: State, log: Log, holdings: Holdings) -> Self {
        let files_next = state.next_file().0;
        Self {
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
            incoming: Incoming::default(),
            given_bytes: 0,
            block_bytes: BLOCK_BYTES,
            scratch: Vec::new(),
            storing: HashMap::new(),
            token: LastToken::default(),
            delivered: VecDeque::new(),
            upkeep: Upkeep::new(holdings),
            removals: VecDeque::new(),
        }
    }

    pub(crate) fn context<'e>(&'e mut self, peer: Peer, random: &'e mut dyn FnMut() -> [u8; 16]) -> Context<'e> {
        Context {
            state: &mut self.state,
            log: &mut self.log,
            claims: &self.claims,
            limits: &self.limits,
            registrations: &mut self.registrations,
            is_registration_open: self.is_registration_open,
            now: self.now,
            token: &mut self.token,
            incoming: &self.incoming,
            files_next: &mut self.files_next,
            scratch: &mut self.scratch,
            random,
            peer,
        }
    }

    /// Runs a handler for a connection and writes the answer, or begins what must come before it.
    pub(crate) fn answer(
        &mut self,
        connection: &mut Connection,
        spec: &'static Spec,
        host: &mut impl Host,
        handler: impl for<'e> FnOnce(&'e mut Context<'_>) -> Result<Outcome<'e>, Refusal>,
    ) {
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
            Some(Task::Inbox(user)) => self.deliver(connection, spec, user, host),
            Some(Task::Upload(envelope)) => self.begin_upload(connection, spec, envelope),
            Some(Task::Download(file)) => self.begin_download(connection, spec, file, host),
            Some(Task::Hold) => self.hold(connection, spec),
            None => {
                let shows_nothing = matches!(spec.verb, Verb::Ping | Verb::Help);
                connection.write.seal(if shows_nothing { None } else { self.log.unsettled() });
            }
        }
    }

    pub(crate) fn refuse(&mut self, connection: &mut Connection, refusal: Refusal, spec: Option<&Spec>) {
        reply::error(connection.write.out(), &refusal, spec);
        connection.write.seal(None);
    }

    pub(crate) fn begin_password(&mut self, connection: &mut Connection, work: PasswordWork, host: &mut impl Host) {
        let PasswordWork { check, hash, pending } = work;
        if self.password_jobs >= self.limits.password_queue_max {
            self.refuse(connection, Refusal::ServerBusy, Some(pending.spec));
            return;
        }
        self.password_jobs += 1;
        connection.phase = Phase::Password(pending);
        host.submit(Job::Password(PasswordJob { connection: connection.id, check, hash }));
    }

    /// Keeps everything on the disk that is there now, as long as the connection lasts, and says what that is.
    fn hold(&mut self, connection: &mut Connection, spec: &'static Spec) {
        let (segments, checkpoint) = self.upkeep.hold();
        if connection.is_holding {
            self.upkeep.release();
        }
        connection.is_holding = true;
        let point = Point { end: self.log.synced(), checkpoint: checkpoint.map(|known| known.number), segments };
        reply::ok(connection.write.out(), &Reply::Held(&point), spec);
        connection.write.seal(None);
    }

    pub(crate) fn next_transfer(&mut self, id: ConnectionId) -> TransferId {
        self.transfers_next += 1;
        let transfer = TransferId(self.transfers_next);
        self.transfers.insert(transfer, id);
        transfer
    }

    pub(crate) fn next_file(&mut self) -> FileId {
        self.files_next += 1;
        FileId(self.files_next - 1)
    }

    /// Messages whose INBOX reply got out leave the mailbox. On a full disk they stay claimed until that can be written down.
    pub(crate) fn write_down_deliveries(&mut self) {
        while let Some(delivery) = self.delivered.front() {
            let &Delivery { user, first, last } = delivery;
            let change = Change::Delivered { user, first, last };
            let Ok(place) = self.log.append(&change, Need::Less) else { return };
            self.state.apply(&change, place);
            self.claims.remove(delivery);
            self.delivered.pop_front();
        }
    }

    pub(crate) fn expire_sessions(&mut self) {
        for _ in 0..SESSIONS_EXPIRED_PER_TURN_MAX {
            let Some(session) = self.state.session_expired(self.now) else { return };
            let change = Change::SessionClosed { session };
            let Ok(place) = self.log.append(&change, Need::Less) else { return };
            self.state.apply(&change, place);
        }
    }

    /// What this turn does for the disk.
    pub(crate) fn keep_up(&mut self, host: &mut impl Host) {
        let Self { upkeep, state, log, limits, now, .. } = self;
        upkeep.turn(state, log, limits.checkpoint_bytes, *now, host);
    }

    /// The bytes of a file that nobody lists any more go once that is durable.
    pub(crate) fn collect_removals(&mut self) {
        let end = self.log.end();
        self.removals.extend(self.state.take_freed_files().into_iter().map(|file| (end, file)));
    }
}
