//! What each request does: it is checked against the state, and what it changes is appended to the log and applied.
//!
//! Handlers see the state and the parameters, never a buffer, a socket or a disk. A request that takes password work is
//! begun by [`handle`] and ended by [`resume`]; an upload is begun by [`handle`] and ended by [`store`], but for a small
//! file, which [`handle`] stores.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sha2::{Digest, Sha256};

use crate::change::{self, Change, FileId, GroupId, SessionId, Target, UserId};
use crate::claims::Claims;
use crate::clock::Clock;
use crate::connection::Peer;
use crate::content;
use crate::failures::{Failures, Origin};
use crate::limits::{FILE_LISTED_BYTES_MAX, Limits, MEMBER_LISTED_BYTES_MAX};
use crate::log::{DiskFull, Log, Need};
use crate::mailbox::{Entry, Mailbox};
use crate::password::PasswordDone;
use crate::password_queue::PasswordQueue;
use crate::refusal::Refusal;
use crate::reply::Reply;
use crate::request::{Request, TOKEN_DIGITS};
use crate::state::{Group, SESSION_TOUCH_MS, State, User};
use crate::throttle::Throttle;
use crate::transfer::{Envelope, Incoming};
use crate::verb::{Spec, Verb};

const NAME_BYTES_MAX: usize = 32;
const FILE_NAME_BYTES_MAX: usize = 255;
const PASSWORD_BYTES_MIN: usize = 8;
const PASSWORD_BYTES_MAX: usize = 128;
/// So many messages wait in any mailbox, however many wait in all.
const MAILBOX_MESSAGES_LEAST: usize = 100;
/// What takes more than this, in bytes that are looked at or written, takes long: a millisecond or so.
const LONG_BYTES: usize = 64 * 1024;

/// What a handler works on.
pub struct Context<'e> {
    /// The state.
    pub state: &'e mut State,
    /// Where changes are appended.
    pub log: &'e mut Log,
    /// INBOX replies on their way.
    pub claims: &'e Claims,
    /// The bounds.
    pub limits: &'e Limits,
    /// How often an address may register.
    pub registrations: &'e mut Throttle<IpAddr>,
    /// How often a user may make a group.
    pub foundings_by_user: &'e mut Throttle<UserId>,
    /// How often an address may.
    pub foundings_by_network: &'e mut Throttle<IpAddr>,
    /// Wrong passwords.
    pub failures: &'e mut Failures,
    /// Password work that waits.
    pub passwords: &'e PasswordQueue,
    /// Where work is added that no answer shows: bytes that are looked at, or written, for receivers.
    pub work_bytes: &'e mut u64,
    /// Whose token, that is good, the peer has shown or got.
    pub authorised: Option<UserId>,
    /// What takes long may be done now.
    pub may_take_long: bool,
    /// There is no memory for long answers.
    pub is_memory_short: bool,
    /// Strangers may register.
    pub is_registration_open: bool,
    /// The time.
    pub now: Clock,
    /// How long servers have run on this state, in milliseconds.
    pub elapsed_ms: u64,
    /// The token that this connection used last in this turn.
    pub token: &'e mut LastToken,
    /// Whom the request names as the receiver of a message, if that has been looked up already.
    pub receiver: Option<UserId>,
    /// Uploads that are not stored yet.
    pub incoming: &'e Incoming,
    /// The number that the next file gets.
    pub files_next: &'e mut u64,
    /// Memory to decode a small file into.
    pub scratch: &'e mut Vec<u8>,
    /// 128 fresh random bits for a token, each time it is called.
    pub random: &'e mut dyn FnMut() -> [u8; 16],
    /// Who asks.
    pub peer: Peer,
}

/// A token, its hash, and whose it is. Requests that come together mostly have the same one, and hashing takes longer than
/// all else that is done for one. It is forgotten with the connection's turn, so that no token is kept in memory.
#[derive(Default)]
pub struct LastToken(Option<ShownToken>);

struct ShownToken {
    digits: [u8; TOKEN_DIGITS],
    session: SessionId,
    /// Whose it is, unless logins may have changed since that was looked up.
    user: Option<UserId>,
}

impl LastToken {
    /// The token, if it has the form of one.
    fn look_at(&mut self, token: &str) -> Option<&mut ShownToken> {
        let digits = token.as_bytes().try_into().ok()?;
        if self.0.as_ref().is_none_or(|last| last.digits != digits) {
            self.0 = session_id(token).map(|session| ShownToken { digits, session, user: None });
        }
        self.0.as_mut()
    }

    /// Logins may have changed.
    fn forget_user(&mut self) {
        if let Some(last) = &mut self.0 {
            last.user = None;
        }
    }
}

/// What comes of a request that is not refused.
pub enum Outcome<'s> {
    /// An answer.
    Reply(Reply<'s>),
    /// Something that must be done before there is an answer.
    Begin(Task),
    /// Nothing yet: it takes long, so it must wait for its turn and then come again.
    Later,
}

/// What a handler has the engine do.
pub enum Task {
    /// Password work.
    Password(PasswordWork),
    /// The messages of a mailbox.
    Inbox(UserId),
    /// A file to take in.
    Upload(Envelope),
    /// A file to give out, and to whom.
    Download(UserId, FileId),
    /// A backup to be made: nothing goes from the disk until the connection ends.
    Hold,
}

/// Password work that a request takes.
pub struct PasswordWork {
    /// A password and the hash that it must fit; without one, the answer is no.
    pub check: Option<(String, Option<String>)>,
    /// A password to hash.
    pub hash: Option<String>,
    /// What to go on with.
    pub pending: Pending,
}

/// A request that waits for password work.
#[derive(Debug)]
pub struct Pending {
    /// How it was asked for.
    pub spec: &'static Spec,
    step: Step,
    tried: Option<Tried>,
}

/// A try to know a password: whose it is, if that is a name that can be.
#[derive(Debug)]
struct Tried(Option<Box<str>>);

/// What is left to do once the password work is done.
#[derive(Debug)]
enum Step {
    Login {
        user: Option<UserId>,
        checked: String,
    },
    AddUser {
        name: Box<str>,
    },
    /// The administrator sets it.
    SetPassword {
        user: UserId,
    },
    /// Its owner changes it, in this login, from the one with this hash.
    ChangePassword {
        user: UserId,
        session: SessionId,
        checked: String,
    },
    CreateGroup {
        user: UserId,
        name: Box<str>,
    },
    JoinGroup {
        user: UserId,
        group: GroupId,
    },
}

type Handled<'s> = Result<Outcome<'s>, Refusal>;

impl From<DiskFull> for Refusal {
    fn from(DiskFull: DiskFull) -> Self {
        Self::StorageFull
    }
}

/// Does what the request asks for, or begins it. `content` is that of a small file, up to and with the line end.
///
/// # Errors
/// The [`Refusal`] to answer with; nothing has changed then.
pub fn handle<'e>(context: &'e mut Context<'_>, request: &Request<'_>, content: Option<&[u8]>) -> Handled<'e> {
    let parameter = |index| request.parameter(index);
    match request.verb() {
        Verb::Ping => Ok(Outcome::Reply(Reply::Done)),
        Verb::Help => Ok(Outcome::Reply(Reply::Help(context.peer.audience()))),
        Verb::Auth => login(context, request),
        Verb::Register => register(context, request),
        Verb::UserAdd => add_user(context, request),
        Verb::UserPassword => set_password(context, request),
        Verb::UserRemove => remove_user(context, parameter(0)),
        Verb::UserList => Ok(list_users(context)),
        Verb::GroupList => Ok(list_groups(context)),
        Verb::Backup => Ok(Outcome::Begin(Task::Hold)),
        _ => {
            let (session, user) = authorise(context, parameter(0))?;
            match content {
                Some(content) => send_small_file(context, request, user, content),
                None => handle_as(context, request, session, user),
            }
        }
    }
}

/// The requests whose first parameter is a token, which was `user`'s.
// Only `handle` calls it, once for nearly every request, and by itself the compiler does not put it there.
#[inline(always)]
fn handle_as<'e>(context: &'e mut Context<'_>, request: &Request<'_>, session: SessionId, user: UserId) -> Handled<'e> {
    let parameter = |index| request.parameter(index);
    match request.verb() {
        Verb::SendMessage => {
            let to = match context.receiver {
                Some(receiver) => Target::User(receiver),
                None => user_target(context, parameter(1))?,
            };
            send(context, user, to, parameter(1), parameter(2))
        }
        Verb::SendGroupMessage => {
            let to = Target::Group(group_of(context, user, parameter(1))?);
            if context.puts_off(receivers_count(context.state, to) * size_of::<Entry>()) {
                return Ok(Outcome::Later);
            }
            send(context, user, to, parameter(1), parameter(2))
        }
        Verb::SendFile | Verb::SendGroupFile => {
            let envelope = address(context, request, user)?;
            check_size(context.state, context.limits, context.incoming, &envelope, 0, 0)?;
            check_lists(context, &envelope)?;
            if !context.log.can_grow() {
                return Err(Refusal::StorageFull);
            }
            Ok(Outcome::Begin(Task::Upload(envelope)))
        }
        Verb::Inbox if context.log.can_deliver() => {
            let waiting = context.state.mailbox(user).map_or(0, Mailbox::bytes).min(context.limits.inbox_bytes_max);
            // As JSON a message takes more than in its record.
            let is_put_off = context.puts_off(usize::try_from(waiting.saturating_mul(3)).unwrap_or(usize::MAX));
            Ok(if is_put_off { Outcome::Later } else { Outcome::Begin(Task::Inbox(user)) })
        }
        Verb::Inbox => Err(Refusal::StorageFull),
        Verb::MyFile => my_files(context, user),
        Verb::DownloadFile => {
            let listed = context.state.file_listed(user, parameter(1), parameter(2));
            listed.map(|file| Outcome::Begin(Task::Download(user, file))).ok_or(Refusal::NoSuchFile)
        }
        Verb::DeleteFile => delete_file(context, user, parameter(1), parameter(2)),
        Verb::Logout => context.shrink(&Change::SessionClosed { session }),
        Verb::ChangePassword => change_password(context, request, session, user),
        Verb::CreateGroup => create_group(context, request, user),
        Verb::JoinGroup => join_group(context, request, user),
        Verb::LeaveGroup => {
            let group = group_of(context, user, parameter(1))?;
            context.shrink(&Change::MemberLeft { group, user })
        }
        Verb::AddMember => add_member(context, user, parameter(1), parameter(2)),
        Verb::RemoveMember => remove_member(context, user, parameter(1), parameter(2)),
        Verb::MyGroup => my_groups(context, user),
        Verb::Auth
        | Verb::Register
        | Verb::Ping
        | Verb::Help
        | Verb::UserAdd
        | Verb::UserList
        | Verb::UserPassword
        | Verb::UserRemove
        | Verb::GroupList
        | Verb::Backup => Err(Refusal::UnknownRequest),
    }
}

/// Goes on with a request whose password work is done. Who asked may be gone by now, so all is checked again.
///
/// # Errors
/// The [`Refusal`] to answer with; nothing has changed then.
pub fn resume<'e>(context: &'e mut Context<'_>, pending: Pending, done: &PasswordDone) -> Handled<'e> {
    let hash = done.hash.as_deref();
    if let Some(tried) = &pending.tried {
        count_try(context, pending.spec, tried, done.passed)?;
    }
    match pending.step {
        Step::Login { user, checked } => {
            let user = user.filter(|_| done.passed).ok_or(Refusal::WrongPassword)?;
            let account = context.state.user(user).ok_or(Refusal::WrongPassword)?;
            if *account.password_hash != *checked {
                return Err(Refusal::WrongPassword);
            }
            open_session(context, user)
        }
        Step::AddUser { name } => {
            check_name_is_free(context, &name)?;
            check_users(context)?;
            let user = context.state.next_user();
            context.grow(&Change::UserAdded { user, name: &name, password_hash: hash.unwrap_or_default() })
        }
        Step::SetPassword { user } => {
            context.state.user(user).ok_or(Refusal::NoSuchUser)?;
            let password_hash = hash.unwrap_or_default();
            context.grow(&Change::PasswordChanged { user, password_hash, keep: None })
        }
        Step::ChangePassword { user, session, checked } => {
            let account = known(context.state, user)?;
            if !account.sessions.contains(&session) {
                return Err(Refusal::InvalidToken);
            }
            let is_still_it = *account.password_hash == *checked;
            let password_hash = hash.filter(|_| is_still_it).ok_or(Refusal::WrongPassword)?;
            context.grow(&Change::PasswordChanged { user, password_hash, keep: Some(session) })
        }
        Step::CreateGroup { user, name } => {
            check_groups(context, user)?;
            check_name_is_free(context, &name)?;
            let group = context.state.next_group();
            context.grow(&Change::GroupCreated { group, name: &name, owner: user, secret_hash: hash })
        }
        Step::JoinGroup { user, group } => {
            known(context.state, user)?;
            if !done.passed {
                return Err(Refusal::WrongSecret);
            }
            join(context, group, user)
        }
    }
}

/// Stores an upload whose bytes are durable under the name of `file`. Who sent it or who was to get it may be gone by now,
/// so all is checked again.
///
/// # Errors
/// The [`Refusal`] to answer with; the bytes belong to nobody then.
pub fn store<'e>(context: &'e mut Context<'_>, file: FileId, bytes: u64, sum: u32, sent: &Envelope) -> Handled<'e> {
    let &Envelope { from, to, ref name } = sent;
    known(context.state, from)?;
    match to {
        Target::User(user) => known(context.state, user).map(drop).map_err(|_| Refusal::NoSuchUser)?,
        Target::Group(group) if context.state.is_member(group, from) => {}
        Target::Group(_) => return Err(Refusal::NotMember),
    }
    check_size(context.state, context.limits, context.incoming, sent, bytes, bytes)?;
    check_lists(context, sent)?;
    let at = context.now.utc_ms;
    context.grow(&Change::FileStored { file, from, to, at, bytes, name, sum: Some(sum) })
}

impl Context<'_> {
    /// Makes a change and answers that it is done.
    fn grow(&mut self, change: &Change<'_>) -> Handled<'static> {
        self.make(change, Need::More)?;
        Ok(Outcome::Reply(Reply::Done))
    }

    /// The same for a change that makes the server smaller, which is possible on a full disk.
    fn shrink(&mut self, change: &Change<'_>) -> Handled<'static> {
        self.make(change, Need::Less)?;
        Ok(Outcome::Reply(Reply::Done))
    }

    /// Password work has a place in its queue.
    fn check_passwords(&self) -> Result<(), Refusal> {
        if self.passwords.admits(self.peer, self.limits) { Ok(()) } else { Err(Refusal::ServerBusy) }
    }

    /// Begins password work, if there is a place for it.
    fn begin(&self, work: PasswordWork) -> Handled<'static> {
        self.check_passwords()?;
        Ok(Outcome::Begin(Task::Password(work)))
    }

    /// Whether work that takes about so many bytes must wait for its turn, since others wait for what takes less.
    fn puts_off(&self, bytes: usize) -> bool {
        bytes > LONG_BYTES && !self.may_take_long
    }

    /// The same for an answer that is so long.
    fn puts_off_answer(&self, bytes: usize) -> Result<bool, Refusal> {
        let is_refused = bytes > LONG_BYTES && self.is_memory_short;
        if is_refused { Err(Refusal::ServerBusy) } else { Ok(self.puts_off(bytes)) }
    }

    fn make(&mut self, change: &Change<'_>, need: Need) -> Result<(), DiskFull> {
        self.token.forget_user();
        let place = self.log.append(change, need)?;
        self.state.apply(change, place);
        Ok(())
    }
}

/// The login that a token stands for. Its use is written down, but not each time.
fn authorise(context: &mut Context<'_>, token: &str) -> Result<(SessionId, UserId), Refusal> {
    let shown = context.token.look_at(token).ok_or(Refusal::InvalidToken)?;
    let id = shown.session;
    if let Some(user) = shown.user {
        context.authorised = Some(user);
        return Ok((id, user));
    }
    let now = context.now.utc_ms;
    let session = context.state.session(id, now).ok_or(Refusal::InvalidToken)?;
    context.authorised = Some(session.user);
    shown.user = Some(session.user);
    if now > session.used.saturating_add(SESSION_TOUCH_MS) {
        let used = Change::SessionUsed { session: id, at: now, elapsed_ms: context.elapsed_ms };
        // On a full disk the token works all the same, until the last use that was written down is too long ago.
        if context.make(&used, Need::Login) == Err(DiskFull) {
            tracing::debug!("the use of a token could not be written down");
        }
    }
    Ok((id, session.user))
}

/// True when the token is good at `now`.
#[must_use]
pub fn is_authorised(state: &State, token: &str, now: u64) -> bool {
    session_id(token).is_some_and(|session| state.session(session, now).is_some())
}

/// What is kept of a token: a hash, so that neither the disk nor a memory image gives away a login, and a look-up tells
/// nothing by its time.
fn session_id(token: &str) -> Option<SessionId> {
    let digits: &[u8; TOKEN_DIGITS] = token.as_bytes().try_into().ok()?;
    let mut bits = [0; TOKEN_DIGITS / 2];
    let mut seen = 0;
    for (byte, pair) in bits.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = [HEX_VALUES[pair[0] as usize], HEX_VALUES[pair[1] as usize]];
        *byte = high << 4 | low & 0x0f;
        seen |= high | low;
    }
    if seen >= NOT_HEX {
        return None;
    }
    Sha256::digest(bits).first_chunk::<16>().copied().map(SessionId)
}

const NOT_HEX: u8 = 0x10;
/// What each byte is worth as a hexadecimal digit. A token's digits are random, so a branch for each would be guessed wrong
/// half of the time.
const HEX_VALUES: [u8; 256] = {
    let mut values = [NOT_HEX; 256];
    let mut value = 0;
    while value < 16 {
        values[b"0123456789abcdef"[value as usize] as usize] = value;
        values[b"0123456789ABCDEF"[value as usize] as usize] = value;
        value += 1;
    }
    values
};

fn login<'e>(context: &Context<'_>, request: &Request<'_>) -> Handled<'e> {
    let (name, password) = (request.parameter(0), request.parameter(1));
    let tried = Some(may_try(context, name)?);
    let user = context.state.user_named(name);
    let hash = user.and_then(|user| context.state.user(user)).map(|account| account.password_hash.to_string());
    context.begin(PasswordWork {
        check: Some((password.to_owned(), hash.clone())),
        hash: None,
        pending: Pending { spec: request.spec, step: Step::Login { user, checked: hash.unwrap_or_default() }, tried },
    })
}

/// Where a try to guess a password comes from. The administrator need not guess.
fn origin(context: &Context<'_>) -> Option<Origin> {
    let is_shared_count = context.peer.network_counted(context.limits).is_some();
    context.peer.network().map(|network| Origin { network, is_shared_count })
}

/// A try that may be made now.
fn may_try(context: &Context<'_>, name: &str) -> Result<Tried, Refusal> {
    let account = is_name(name).then_some(name);
    if let Some(origin) = origin(context) {
        context.failures.check(origin, account, context.now.steady_ms).map_err(Refusal::Throttled)?;
    }
    Ok(Tried(account.map(Into::into)))
}

/// Counts what came of a try. One that others have made too early meanwhile is not answered: many at once must not get
/// more answers than one after the other.
fn count_try(context: &mut Context<'_>, spec: &'static Spec, tried: &Tried, passed: bool) -> Result<(), Refusal> {
    let account = tried.0.as_deref();
    let Some(origin) = origin(context) else { return Ok(()) };
    let now = context.now.steady_ms;
    context.failures.check(origin, account, now).map_err(Refusal::Throttled)?;
    if let Some(account) = account.filter(|_| passed) {
        context.failures.forgive(origin, account);
        return Ok(());
    }
    context.failures.add(origin, account, context.limits, now);
    // Whoever watches the log for these relies on the words; the name may be a password in the wrong place.
    match spec.verb {
        Verb::Auth => tracing::warn!(address = %context.peer, "login failed"),
        _ => tracing::warn!(address = %context.peer, request = %spec.usage(), "wrong password"),
    }
    Ok(())
}

fn open_session<'e>(context: &mut Context<'_>, user: UserId) -> Handled<'e> {
    let held = context.state.user(user).map_or(0, |account| account.sessions.len());
    let oldest = context.state.session_oldest(user).filter(|_| held >= context.limits.tokens_per_user_max);
    let bits = u128::from_be_bytes((context.random)());
    let token = format!("{bits:032x}");
    let session = session_id(&token).ok_or(Refusal::InvalidToken)?;
    if let Some(session) = oldest {
        context.make(&Change::SessionClosed { session }, Need::Less)?;
    }
    let (at, elapsed_ms) = (context.now.utc_ms, context.elapsed_ms);
    context.make(&Change::SessionOpened { session, user, at, elapsed_ms }, Need::Login)?;
    context.authorised = Some(user);
    Ok(Outcome::Reply(Reply::Token(token)))
}

fn register<'e>(context: &mut Context<'_>, request: &Request<'_>) -> Handled<'e> {
    if !context.is_registration_open {
        return Err(Refusal::RegistrationClosed);
    }
    check_name(request.parameter(0))?;
    new_password(request.parameter(1))?;
    context.check_passwords()?;
    // From here on it counts: the answer may tell that there is such a name.
    if let Some(network) = context.peer.network() {
        context.registrations.act(network, context.now.steady_ms).map_err(Refusal::Throttled)?;
    }
    add_user(context, request)
}

fn add_user<'e>(context: &Context<'_>, request: &Request<'_>) -> Handled<'e> {
    let name = request.parameter(0);
    check_name_is_free(context, name)?;
    check_users(context)?;
    let password = new_password(request.parameter(1))?;
    context.begin(PasswordWork {
        check: None,
        hash: Some(password),
        pending: Pending { spec: request.spec, step: Step::AddUser { name: name.into() }, tried: None },
    })
}

fn set_password<'e>(context: &Context<'_>, request: &Request<'_>) -> Handled<'e> {
    let user = context.state.user_named(request.parameter(0)).ok_or(Refusal::NoSuchUser)?;
    let password = new_password(request.parameter(1))?;
    context.begin(PasswordWork {
        check: None,
        hash: Some(password),
        pending: Pending { spec: request.spec, step: Step::SetPassword { user }, tried: None },
    })
}

fn change_password<'e>(context: &Context<'_>, request: &Request<'_>, session: SessionId, user: UserId) -> Handled<'e> {
    let account = known(context.state, user)?;
    let checked = account.password_hash.to_string();
    let password = new_password(request.parameter(2))?;
    let tried = Some(may_try(context, &account.name)?);
    context.begin(PasswordWork {
        check: Some((request.parameter(1).to_owned(), Some(checked.clone()))),
        hash: Some(password),
        pending: Pending { spec: request.spec, step: Step::ChangePassword { user, session, checked }, tried },
    })
}

fn remove_user<'e>(context: &mut Context<'_>, name: &str) -> Handled<'e> {
    let user = context.state.user_named(name).ok_or(Refusal::NoSuchUser)?;
    context.shrink(&Change::UserRemoved { user })
}

fn list_users<'e>(context: &'e Context<'_>) -> Outcome<'e> {
    let mut names: Vec<&str> = context.state.users().map(|user| &*user.name).collect();
    names.sort_unstable();
    Outcome::Reply(Reply::Names(names))
}

fn list_groups<'e>(context: &'e Context<'_>) -> Outcome<'e> {
    Outcome::Reply(Reply::Groups(context.state.groups().map(|group| members_of(context.state, group)).collect()))
}

fn my_files<'e>(context: &'e Context<'_>, user: UserId) -> Handled<'e> {
    let account = known(context.state, user)?;
    let is_put_off = context.puts_off_answer(account.listed_files * FILE_LISTED_BYTES_MAX)?;
    Ok(if is_put_off { Outcome::Later } else { Outcome::Reply(Reply::Files(&account.files)) })
}

fn my_groups<'e>(context: &'e Context<'_>, user: UserId) -> Handled<'e> {
    let groups = known(context.state, user)?.groups.iter().filter_map(|group| context.state.group(*group));
    let members: usize = groups.clone().map(|group| group.members.len()).sum();
    if context.puts_off_answer(members * MEMBER_LISTED_BYTES_MAX)? {
        return Ok(Outcome::Later);
    }
    Ok(Outcome::Reply(Reply::Groups(groups.map(|group| members_of(context.state, group)).collect::<BTreeMap<_, _>>())))
}

/// A group's name and its members' names, its owner first and the others by how long they have been in it.
fn members_of<'s>(state: &'s State, group: &'s Group) -> (&'s str, Vec<&'s str>) {
    let others = group.members.iter().filter(|member| **member != group.owner);
    let members = std::iter::once(&group.owner).chain(others);
    (&group.name, members.filter_map(|member| state.user(*member)).map(|user| &*user.name).collect())
}

fn send<'e>(context: &mut Context<'_>, from: UserId, to: Target, to_name: &str, text: &str) -> Handled<'e> {
    let (messages_max, bytes_max) = (context.limits.mailbox_messages_max, context.limits.mailbox_bytes_max);
    let from_name = &*known(context.state, from)?.name;
    let bytes = change::message_bytes(from_name, to_name, text) as u64;
    // What all mailboxes hold leaves less for each, but a few are always taken: whoever fills some, or many, does not keep
    // others from writing to those who read.
    let free = context.limits.messages_max.saturating_sub(context.state.usage().messages());
    let messages_max = messages_max.min(free.max(MAILBOX_MESSAGES_LEAST));
    let is_full = |mailbox: &Mailbox| mailbox.entries().len() >= messages_max || mailbox.bytes() + bytes > bytes_max;
    for receiver in context.state.receivers(from, to) {
        *context.work_bytes += size_of::<Entry>() as u64;
        if context.state.mailbox(receiver).is_some_and(is_full) {
            return Err(Refusal::MailboxFull);
        }
    }
    let at = context.now.utc_ms;
    let sent = Change::MessageSent { from, to, at, from_name, to_name, text };
    let place = context.log.append(&sent, Need::More)?;
    // The names are for whoever reads the record; the state has them, and needs none here.
    context.state.apply(&Change::MessageSent { from, to, at, from_name: "", to_name: "", text }, place);
    Ok(Outcome::Reply(Reply::Done))
}

/// Stores a file that came whole with its line.
fn send_small_file<'e>(
    context: &'e mut Context<'_>,
    request: &Request<'_>,
    user: UserId,
    content: &[u8],
) -> Handled<'e> {
    let envelope = address(context, request, user)?;
    if context.puts_off(receivers_count(context.state, envelope.to) * LIST_PLACE_BYTES) {
        return Ok(Outcome::Later);
    }
    let mut decoded = std::mem::take(context.scratch);
    decoded.clear();
    let stored = content::decode(content, &mut decoded).map_err(|error| error.refusal(request.spec)).and_then(|()| {
        check_size(context.state, context.limits, context.incoming, &envelope, decoded.len() as u64, 0)?;
        check_lists(context, &envelope)?;
        let file = FileId(*context.files_next);
        let Envelope { from, to, name } = &envelope;
        let at = context.now.utc_ms;
        context.make(&Change::FileSent { file, from: *from, to: *to, at, name, content: &decoded }, Need::More)?;
        *context.files_next += 1;
        Ok(Outcome::Reply(Reply::Done))
    });
    *context.scratch = decoded;
    stored
}

/// To whom a file goes, and under what name.
fn address(context: &Context<'_>, request: &Request<'_>, from: UserId) -> Result<Envelope, Refusal> {
    let (to, name) = (request.parameter(1), request.parameter(2));
    let to = match request.verb() {
        Verb::SendGroupFile => Target::Group(group_of(context, from, to)?),
        _ => user_target(context, to)?,
    };
    let has_refused = name.chars().any(|letter| letter.is_control() || matches!(letter, '/' | '\\' | ' '));
    if name.is_empty() || name.len() > FILE_NAME_BYTES_MAX || has_refused || name == "." || name == ".." {
        return Err(Refusal::InvalidFileName);
    }
    Ok(Envelope { from, to, name: name.into() })
}

/// Makes sure that a file may have so many bytes, of which `counted` are counted among what is incoming. What it replaces
/// does not count.
///
/// # Errors
/// The bound that it would pass.
pub fn check_size(
    state: &State,
    limits: &Limits,
    incoming: &Incoming,
    sent: &Envelope,
    bytes: u64,
    counted: u64,
) -> Result<(), Refusal> {
    let &Envelope { from, to, ref name } = sent;
    let replaced = state.file_replaced(from, to, name);
    let is_one_more = replaced.is_none();
    let replaced = replaced.map_or(0, |file| file.bytes);
    let sender = known(state, from)?;
    let by_user = sender.sent_bytes.saturating_sub(replaced) + incoming.of(from) - counted;
    let by_all = state.files_bytes().saturating_sub(replaced) + incoming.bytes() - counted;
    if bytes > limits.file_bytes_max {
        Err(Refusal::FileTooLarge(limits.file_bytes_max))
    } else if by_user.saturating_add(bytes) > limits.user_bytes_max
        || (is_one_more && sender.sent_files >= limits.user_files_max)
    {
        Err(Refusal::QuotaFull)
    } else if by_all.saturating_add(bytes) > limits.files_bytes_max {
        Err(Refusal::StorageFull)
    } else {
        Ok(())
    }
}

/// A place in a file list takes so much, beside the name.
const LIST_PLACE_BYTES: usize = 64;

/// Makes sure that those who get a file can list one more. That is work for each of them, whatever comes of it.
fn check_lists(context: &mut Context<'_>, sent: &Envelope) -> Result<(), Refusal> {
    let &Envelope { from, to, ref name } = sent;
    let is_one_more = context.state.file_replaced(from, to, name).is_none();
    let files_max = context.limits.listed_files_max;
    let mut receivers = 0;
    let mut all = context.state.receivers(from, to).inspect(|_| receivers += 1);
    let has_full_list = |user| context.state.user(user).is_some_and(|user| user.listed_files >= files_max);
    let is_any_full = all.any(|user| is_one_more && has_full_list(user));
    *context.work_bytes += (receivers * (LIST_PLACE_BYTES + name.len())) as u64;
    if is_any_full { Err(Refusal::MailboxFull) } else { Ok(()) }
}

fn delete_file<'e>(context: &mut Context<'_>, user: UserId, party: &str, name: &str) -> Handled<'e> {
    context.state.file_listed(user, party, name).ok_or(Refusal::NoSuchFile)?;
    context.shrink(&Change::FileDropped { user, party, name })
}

fn create_group<'e>(context: &mut Context<'_>, request: &Request<'_>, user: UserId) -> Handled<'e> {
    let (name, secret) = (request.parameter(1), request.parameter(2));
    check_name_is_free(context, name)?;
    check_groups(context, user)?;
    if secret.len() > PASSWORD_BYTES_MAX {
        return Err(Refusal::InvalidPassword);
    }
    if !secret.is_empty() {
        context.check_passwords()?;
    }
    let now = context.now.steady_ms;
    // What the address refuses does not count for the user.
    context.foundings_by_user.check(&user, now).map_err(Refusal::Throttled)?;
    if let Some(network) = context.peer.network() {
        context.foundings_by_network.act(network, now).map_err(Refusal::Throttled)?;
    }
    context.foundings_by_user.act(user, now).map_err(Refusal::Throttled)?;
    if secret.is_empty() {
        let group = context.state.next_group();
        return context.grow(&Change::GroupCreated { group, name, owner: user, secret_hash: None });
    }
    context.begin(PasswordWork {
        check: None,
        hash: Some(secret.to_owned()),
        pending: Pending { spec: request.spec, step: Step::CreateGroup { user, name: name.into() }, tried: None },
    })
}

fn join_group<'e>(context: &mut Context<'_>, request: &Request<'_>, user: UserId) -> Handled<'e> {
    let group = group_named(context, request.parameter(1))?;
    if context.state.is_member(group, user) {
        return Err(Refusal::AlreadyMember);
    }
    check_membership(context, group, user)?;
    let secret = request.parameter(2);
    match context.state.group(group).and_then(|group| group.secret_hash.as_deref()) {
        None => join(context, group, user),
        Some(_) if secret.is_empty() => Err(Refusal::WrongSecret),
        Some(secret_hash) => context.begin(PasswordWork {
            check: Some((secret.to_owned(), Some(secret_hash.to_owned()))),
            hash: None,
            pending: Pending {
                spec: request.spec,
                step: Step::JoinGroup { user, group },
                tried: Some(may_try(context, request.parameter(1))?),
            },
        }),
    }
}

fn join<'e>(context: &mut Context<'_>, group: GroupId, user: UserId) -> Handled<'e> {
    if context.state.is_member(group, user) {
        return Err(Refusal::AlreadyMember);
    }
    check_membership(context, group, user)?;
    context.grow(&Change::MemberJoined { group, user })
}

fn add_member<'e>(context: &mut Context<'_>, owner: UserId, group: &str, name: &str) -> Handled<'e> {
    let group = group_owned(context, owner, group)?;
    let user = context.state.user_named(name).ok_or(Refusal::NoSuchUser)?;
    join(context, group, user)
}

fn remove_member<'e>(context: &mut Context<'_>, owner: UserId, group: &str, name: &str) -> Handled<'e> {
    let group = group_owned(context, owner, group)?;
    let user = context.state.user_named(name).ok_or(Refusal::NoSuchUser)?;
    if !context.state.is_member(group, user) {
        return Err(Refusal::NotMember);
    }
    context.shrink(&Change::MemberLeft { group, user })
}

/// A user whose token was good a moment ago.
fn known(state: &State, user: UserId) -> Result<&User, Refusal> {
    state.user(user).ok_or(Refusal::InvalidToken)
}

/// How many get what is sent there, about.
fn receivers_count(state: &State, to: Target) -> usize {
    match to {
        Target::User(_) => 1,
        Target::Group(group) => state.group(group).map_or(0, |group| group.members.len()),
    }
}

fn user_target(context: &Context<'_>, name: &str) -> Result<Target, Refusal> {
    context.state.user_named(name).map(Target::User).ok_or(Refusal::NoSuchUser)
}

fn group_named(context: &Context<'_>, name: &str) -> Result<GroupId, Refusal> {
    context.state.group_named(name).ok_or(Refusal::NoSuchGroup)
}

fn group_of(context: &Context<'_>, user: UserId, name: &str) -> Result<GroupId, Refusal> {
    let group = group_named(context, name)?;
    if context.state.is_member(group, user) { Ok(group) } else { Err(Refusal::NotMember) }
}

fn group_owned(context: &Context<'_>, user: UserId, name: &str) -> Result<GroupId, Refusal> {
    let group = group_named(context, name)?;
    match context.state.group(group) {
        Some(owned) if owned.owner == user => Ok(group),
        _ => Err(Refusal::NotOwner),
    }
}

/// True when it can be the name of a user or a group.
fn is_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_allowed)
}

/// One more account is not one too many.
fn check_users(context: &Context<'_>) -> Result<(), Refusal> {
    if context.state.users_count() >= context.limits.users_max { Err(Refusal::ServerFull) } else { Ok(()) }
}

/// One more group of this user is not one too many.
fn check_groups(context: &Context<'_>, user: UserId) -> Result<(), Refusal> {
    if known(context.state, user)?.groups.len() >= context.limits.groups_per_user_max {
        Err(Refusal::TooManyGroups)
    } else if context.state.groups().len() >= context.limits.groups_max {
        Err(Refusal::ServerFull)
    } else {
        Ok(())
    }
}

/// One more member of this group, and one more group of this user, is not one too many.
fn check_membership(context: &Context<'_>, group: GroupId, user: UserId) -> Result<(), Refusal> {
    let members = context.state.group(group).ok_or(Refusal::NoSuchGroup)?.members.len();
    if members >= context.limits.members_per_group_max {
        Err(Refusal::GroupFull)
    } else if known(context.state, user)?.groups.len() >= context.limits.groups_per_user_max {
        Err(Refusal::TooManyGroups)
    } else {
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if is_name(name) { Ok(()) } else { Err(Refusal::InvalidName) }
}

fn check_name_is_free(context: &Context<'_>, name: &str) -> Result<(), Refusal> {
    check_name(name)?;
    if context.state.is_taken(name) { Err(Refusal::NameTaken) } else { Ok(()) }
}

fn new_password(password: &str) -> Result<String, Refusal> {
    if (PASSWORD_BYTES_MIN..=PASSWORD_BYTES_MAX).contains(&password.len()) {
        Ok(password.to_owned())
    } else {
        Err(Refusal::InvalidPassword)
    }
}
