//! What all connections share, and what a request does with it besides changing the state: password work, a backup. (What it
//! does with an INBOX reply, and with a file in or out, stands in [`crate::inbox`], [`crate::upload`] and
//! [`crate::download`].) It knows no buffers but the one that a reply is written to.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use crate::ahead;
use crate::backup::Point;
use crate::change::{Change, FileId, Lsn, UserId};
use crate::claims::Claims;
use crate::clock::Clock;
use crate::command::{Context, LastToken, Outcome, PasswordWork, Task};
use crate::connection::{Connection, ConnectionId, Delivery, Peer, Phase};
use crate::deadline::Stage;
use crate::engine::{Host, Job, Registration};
use crate::failures::Failures;
use crate::files::TransferId;
use crate::limits::Limits;
use crate::log::{Log, Need};
use crate::password::PasswordJob;
use crate::password_queue::PasswordQueue;
use crate::refusal::Refusal;
use crate::reply::{self, InboxWriter, Reply};
use crate::state::State;
use crate::throttle::Throttle;
use crate::transfer::{BLOCK_BYTES, Direction, Envelope, Incoming, Transfers};
use crate::upkeep::{Holdings, Upkeep};
use crate::verb::{Spec, Verb};

/// Sessions ended in one turn because they were not used for long.
const SESSIONS_EXPIRED_PER_TURN_MAX: usize = 64;
/// How often it is written down how long servers have run.
const ELAPSED_EVERY_MS: u64 = 10 * 60 * 1000;

/// What all connections share.
pub(crate) struct Service {
    pub(crate) limits: Limits,
    pub(crate) state: State,
    pub(crate) log: Log,
    pub(crate) claims: Claims,
    pub(crate) registrations: Throttle<IpAddr>,
    pub(crate) is_registration_open: bool,
    /// Groups that are made.
    pub(crate) foundings_by_user: Throttle<UserId>,
    pub(crate) foundings_by_network: Throttle<IpAddr>,
    /// Wrong passwords.
    pub(crate) failures: Failures,
    pub(crate) now: Clock,
    /// How long servers have run on this state, in milliseconds.
    elapsed_ms: u64,
    /// How long they had when the steady clock stood at the second.
    elapsed_since: Option<(u64, u64)>,
    /// When by the steady clock it is to be written down next how long servers have run.
    pub(crate) elapsed_due: u64,
    pub(crate) inbox: InboxWriter,
    /// Password work that is not done.
    pub(crate) passwords: PasswordQueue,
    pub(crate) files_next: u64,
    pub(crate) transfers: Transfers,
    /// Who has texts read from the disk, whether he is still there or not.
    readings: HashMap<ConnectionId, (UserId, usize)>,
    /// How many of each user, and what they hold.
    readings_by_user: HashMap<UserId, (usize, usize)>,
    readings_bytes: usize,
    /// The bytes of uploads that are not stored yet.
    pub(crate) incoming: Incoming,
    /// What handlers have done beside writing an answer, in bytes, until it is counted against the turn.
    pub(crate) work_bytes: u64,
    /// The memory that all connections hold.
    pub(crate) held_bytes: usize,
    /// What is handled at once of a file.
    pub(crate) block_bytes: usize,
    /// With so many users requests are looked at ahead.
    pub(crate) ahead_users_min: usize,
    /// Memory for the block of a file that is handled now.
    pub(crate) scratch: Vec<u8>,
    /// Uploads that are complete. They are stored even if the peer goes.
    pub(crate) storing: HashMap<TransferId, Storing>,
    /// Of the connection that is being served.
    pub(crate) token: LastToken,
    /// Whom the next request names as the receiver of a message, if that has been looked up.
    pub(crate) receiver: Option<UserId>,
    /// It has waited for its turn to be given what takes long.
    pub(crate) is_long_turn: bool,
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
        let (files_next, elapsed_ms) = (state.next_file().0, state.elapsed_ms());
        Self {
            state,
            log,
            claims: Claims::default(),
            registrations: Throttle::new(limits.registrations_per_minute_max, limits.counted_max),
            is_registration_open: registration == Registration::Open,
            foundings_by_user: Throttle::new(limits.groups_per_minute_max, limits.counted_max),
            foundings_by_network: Throttle::new(limits.groups_per_minute_per_address_max, limits.counted_max),
            failures: Failures::default(),
            now: Clock::default(),
            elapsed_ms,
            elapsed_since: None,
            elapsed_due: u64::MAX,
            inbox: InboxWriter::default(),
            passwords: PasswordQueue::default(),
            files_next,
            transfers: Transfers::default(),
            readings: HashMap::new(),
            readings_by_user: HashMap::new(),
            readings_bytes: 0,
            incoming: Incoming::default(),
            work_bytes: 0,
            held_bytes: 0,
            block_bytes: BLOCK_BYTES,
            ahead_users_min: ahead::USERS_MIN,
            scratch: Vec::new(),
            storing: HashMap::new(),
            token: LastToken::default(),
            receiver: None,
            is_long_turn: false,
            delivered: VecDeque::new(),
            upkeep: Upkeep::new(holdings),
            removals: VecDeque::new(),
            limits,
        }
    }

    #[inline]
    pub(crate) fn context<'e>(&'e mut self, peer: Peer, random: &'e mut dyn FnMut() -> [u8; 16]) -> Context<'e> {
        let memory_short = self.memory_short();
        Context {
            state: &mut self.state,
            log: &mut self.log,
            claims: &self.claims,
            limits: &self.limits,
            registrations: &mut self.registrations,
            foundings_by_user: &mut self.foundings_by_user,
            foundings_by_network: &mut self.foundings_by_network,
            failures: &mut self.failures,
            passwords: &self.passwords,
            work_bytes: &mut self.work_bytes,
            authorised: None,
            may_take_long: self.is_long_turn || peer == Peer::Admin,
            is_memory_short: self.held_bytes as u64 >= memory_short,
            is_registration_open: self.is_registration_open,
            now: self.now,
            elapsed_ms: self.elapsed_ms,
            token: &mut self.token,
            receiver: self.receiver.take(),
            incoming: &self.incoming,
            files_next: &mut self.files_next,
            scratch: &mut self.scratch,
            random,
            peer,
        }
    }

    /// Runs a handler for a connection and writes the answer, or begins what must come before it. Says false when nothing
    /// was done, and the request must come again in a long turn.
    pub(crate) fn answer(
        &mut self,
        connection: &mut Connection,
        spec: &'static Spec,
        host: &mut impl Host,
        handler: impl for<'e> FnOnce(&'e mut Context<'_>) -> Result<Outcome<'e>, Refusal>,
    ) -> bool {
        let mut random = || host.random();
        let mut context = self.context(connection.peer, &mut random);
        let task = match handler(&mut context) {
            Ok(Outcome::Begin(task)) => Some(task),
            Ok(Outcome::Later) => {
                connection.wait.reach(Stage::Known);
                connection.user = context.authorised;
                return false;
            }
            Ok(Outcome::Reply(reply)) => {
                reply::ok(connection.write.out(), &reply, spec);
                None
            }
            Err(refusal) => {
                reply::error(connection.write.out(), &refusal, Some(spec));
                None
            }
        };
        if context.authorised.is_some() {
            connection.wait.reach(Stage::Known);
            connection.user = context.authorised;
        }
        match task {
            Some(Task::Inbox(_) | Task::Upload(_) | Task::Download(..)) if self.is_memory_short() => {
                self.refuse(connection, Refusal::ServerBusy, Some(spec));
            }
            Some(Task::Password(work)) => self.begin_password(connection, work, host),
            Some(Task::Inbox(user)) => self.deliver(connection, spec, user, host),
            Some(Task::Upload(envelope)) => self.begin_upload(connection, spec, envelope),
            Some(Task::Download(user, file)) => self.begin_download(connection, spec, user, file, host),
            Some(Task::Hold) => self.hold(connection, spec),
            None => {
                let shows_nothing = matches!(spec.verb, Verb::Ping | Verb::Help);
                connection.write.seal(if shows_nothing { None } else { self.log.unsettled() });
            }
        }
        true
    }

    pub(crate) fn refuse(&mut self, connection: &mut Connection, refusal: Refusal, spec: Option<&Spec>) {
        reply::error(connection.write.out(), &refusal, spec);
        connection.write.seal(None);
    }

    fn begin_password(&mut self, connection: &mut Connection, work: PasswordWork, host: &mut impl Host) {
        let PasswordWork { check, hash, pending } = work;
        self.passwords.enter(connection.id, connection.peer);
        connection.phase = Phase::Password(pending);
        host.submit(Job::Password(PasswordJob { connection: connection.id, check, hash }));
    }

    /// One more reading of texts from the disk for a user, if that is not one too many. What is read cannot be taken back to
    /// make room, so all of it is a quarter of what connections may hold at most, and one user leaves others as much as he has.
    pub(crate) fn admit_reading(&mut self, connection: ConnectionId, user: UserId, bytes: usize) -> bool {
        let (count, held) = self.readings_by_user.get(&user).copied().unwrap_or_default();
        let limits = &self.limits;
        if self.readings.len() >= limits.read_queue_max || count >= limits.read_queue_per_user_max {
            return false;
        }
        let bytes_max = usize::try_from(limits.connections_bytes_max / 4).unwrap_or(usize::MAX);
        let is_first = self.readings.is_empty();
        if !is_first && held + bytes > bytes_max.saturating_sub(self.readings_bytes) {
            return false;
        }
        self.readings.insert(connection, (user, bytes));
        self.readings_by_user.insert(user, (count + 1, held + bytes));
        self.readings_bytes += bytes;
        true
    }

    /// One less.
    pub(crate) fn end_reading(&mut self, connection: ConnectionId) {
        let Some((user, bytes)) = self.readings.remove(&connection) else { return };
        self.readings_bytes -= bytes;
        if let Some((count, held)) = self.readings_by_user.get_mut(&user) {
            *count -= 1;
            *held -= bytes;
            if *count == 0 {
                self.readings_by_user.remove(&user);
            }
        }
    }

    /// Panics when a count is not what these connections make it.
    pub(crate) fn assert_counts<'c>(&self, connections: impl Iterator<Item = &'c Connection> + Clone) {
        let moved = connections.clone().filter_map(|connection| match &connection.phase {
            Phase::Upload(upload) => Some((upload.transfer, Direction::Upload, upload.envelope.from)),
            Phase::Download(download) => Some((download.transfer, Direction::Download, download.user)),
            _ => None,
        });
        let storing = self.storing.iter();
        let storing = storing.map(|(transfer, storing)| (*transfer, Direction::Upload, storing.envelope.from));
        self.transfers.assert_counts(moved.chain(storing));
        let is_checked = |connection: &&Connection| matches!(connection.phase, Phase::Password(_));
        self.passwords.assert_counts(connections.filter(is_checked).map(|connection| connection.id));
    }

    /// Counts the memory that the connection holds now.
    pub(crate) fn count_held(&mut self, connection: &mut Connection) {
        connection.shrink();
        let held = connection.held_bytes();
        self.held_bytes = self.held_bytes - connection.counted_bytes + held;
        connection.counted_bytes = held;
    }

    /// True when what connections hold leaves no room for one more long answer or transfer.
    fn is_memory_short(&self) -> bool {
        self.held_bytes as u64 >= self.memory_short()
    }

    /// What connections may hold before more is refused. Past their budget some are closed at the end of each turn, so this
    /// is reached only by what cannot be taken back.
    fn memory_short(&self) -> u64 {
        let most = self.limits.connections_bytes_max;
        most.saturating_add(most / 4)
    }

    /// Keeps everything on the disk that is there now, as long as the connection lasts, and says what that is.
    fn hold(&mut self, connection: &mut Connection, spec: &'static Spec) {
        let (segments, checkpoint) = self.upkeep.hold(&self.log);
        if connection.is_holding {
            self.upkeep.release();
        }
        connection.is_holding = true;
        let point = Point { end: self.log.settled(), checkpoint: checkpoint.map(|known| known.number), segments };
        reply::ok(connection.write.out(), &Reply::Held(&point), spec);
        connection.write.seal(None);
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
            let Some(session) = self.state.session_expired(self.now.utc_ms) else { return };
            let change = Change::SessionClosed { session };
            let Ok(place) = self.log.append(&change, Need::Less) else { return };
            self.state.apply(&change, place);
        }
    }

    /// Takes the time of a turn.
    pub(crate) fn set_now(&mut self, now: Clock) {
        self.now = now;
        if self.elapsed_since.is_none() {
            self.elapsed_since = Some((self.state.elapsed_ms(), now.steady_ms));
            self.elapsed_due = now.steady_ms.saturating_add(ELAPSED_EVERY_MS);
        }
        let (before, since) = self.elapsed_since.unwrap_or_default();
        self.elapsed_ms = before.saturating_add(now.steady_ms.saturating_sub(since));
    }

    /// Writes down how long servers have run, if it has grown. On a full disk that is for the next time.
    pub(crate) fn write_down_elapsed(&mut self) {
        let elapsed_ms = self.elapsed_ms;
        self.elapsed_due = self.now.steady_ms.saturating_add(ELAPSED_EVERY_MS);
        let change = Change::TimePassed { elapsed_ms };
        if elapsed_ms > self.state.elapsed_ms()
            && !self.log.must_wait()
            && let Ok(place) = self.log.append(&change, Need::More)
        {
            self.state.apply(&change, place);
        }
    }

    /// What this turn does for the disk.
    pub(crate) fn keep_up(&mut self, host: &mut impl Host) {
        let Self { upkeep, state, log, limits, now, .. } = self;
        upkeep.turn(state, log, limits.checkpoint_bytes, now.steady_ms, host);
    }

    /// The bytes of a file that nobody lists any more go once that is durable.
    pub(crate) fn collect_removals(&mut self) {
        let end = self.log.end();
        self.removals.extend(self.state.take_freed_files().into_iter().map(|file| (end, file)));
    }
}
