//! Users, sessions, groups, mailboxes and file lists: plain owned state, changed in one place, [`State::apply`].
//!
//! What changes it is here; `image` writes it down for a checkpoint, and `restore` is the way back.
//!
//! It knows nothing of requests, buffers, disks or clocks. `apply` is deterministic and total: the same changes in the
//! same order make the same state, in the running server and at start-up, and a change that names what is not there
//! changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use compact_str::CompactString;

use crate::change::{Change, FileId, GroupId, Holders, Kept, Lsn, Place, SessionId, Target, UserId};
use crate::mailbox::Mailbox;
use crate::usage::Usage;

mod image;
mod restore;

use image::Image;
pub use image::{ImageItem, Portion};
pub use restore::Skipped;

/// A token is good for this long after its last use.
pub const SESSION_MS_MAX: u64 = 30 * 24 * HOUR_MS;
/// A use is written down when the last one written down is older than this, and a token lives that much longer.
pub const SESSION_TOUCH_MS: u64 = HOUR_MS;
const HOUR_MS: u64 = 60 * 60 * 1000;

/// All that the server knows.
#[derive(Debug, PartialEq, Eq)]
pub struct State {
    users: Vec<Option<Box<User>>>,
    /// One for each of them, side by side: a message needs its receiver's, and nothing else of whose it is.
    mailboxes: Vec<Option<Mailbox>>,
    groups: BTreeMap<GroupId, Group>,
    groups_next: u32,
    /// Most names are short enough to stand in the table itself.
    names: HashMap<CompactString, Owner, ahash::RandomState>,
    sessions: HashMap<SessionId, Session, BuildHasherDefault<SessionHasher>>,
    /// The same sessions, the one used longest ago first.
    sessions_by_use: BTreeSet<(u64, SessionId)>,
    files: BTreeMap<FileId, StoredFile>,
    files_by_origin: HashMap<(UserId, Target, Box<str>), FileId>,
    files_next: u64,
    files_bytes: u64,
    files_freed: Vec<FileId>,
    /// How long servers have run on it, as far as it was written down.
    elapsed_ms: u64,
    /// Ids that new mailboxes leave out while a damaged journal is read; see [`Self::skip_ids`].
    ids_skipped: u64,
    usage: Usage,
    /// A checkpoint that is being made of it.
    image: Image,
}

/// A session's id is a SHA-256 already, which nobody can choose, so some of its bits are as good as any hash of it.
#[derive(Debug, Default)]
struct SessionHasher(u64);

impl Hasher for SessionHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, id: &[u8]) {
        if let Some(bits) = id.first_chunk() {
            self.0 = u64::from_le_bytes(*bits);
        }
    }
}

/// Who has a name: users and groups share one namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    User(UserId),
    Group(GroupId),
}

/// An account.
#[derive(Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: Box<str>,
    /// A PHC string.
    pub password_hash: Box<str>,
    /// Its logins.
    pub sessions: Vec<SessionId>,
    /// The groups that it is a member of.
    pub groups: BTreeSet<GroupId>,
    /// Its file list: the other party's name, then the file's; the newest of one name last.
    pub files: BTreeMap<Box<str>, BTreeMap<Box<str>, Vec<FileId>>>,
    /// The size of what it has sent and that somebody still lists.
    pub sent_bytes: u64,
    /// How many files those are.
    pub sent_files: usize,
    /// How many files its list holds.
    pub listed_files: usize,
}

impl User {
    fn new(name: &str, password_hash: &str) -> Self {
        Self {
            name: name.into(),
            password_hash: password_hash.into(),
            sessions: Vec::new(),
            groups: BTreeSet::new(),
            files: BTreeMap::new(),
            sent_bytes: 0,
            sent_files: 0,
            listed_files: 0,
        }
    }
}

/// A login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Whose it is.
    pub user: UserId,
    /// When it was last used, as far as it was written down.
    pub used: u64,
    /// How long servers had run then.
    pub elapsed_ms: u64,
}

/// A group.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: Box<str>,
    /// The member who may add and remove others.
    pub owner: UserId,
    /// Its members, the longest first.
    pub members: Vec<UserId>,
    /// Where in the journal it says that each of them joined.
    joined: Vec<Lsn>,
    /// A PHC string, where one must know a secret to join.
    pub secret_hash: Option<Box<str>>,
}

/// A file that somebody lists.
#[derive(Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// Who sent it.
    pub from: UserId,
    /// To whom.
    pub to: Target,
    /// What the sender was called, under which the receivers list it.
    pub from_name: Box<str>,
    /// What the target was called, under which the sender lists it.
    pub to_name: Box<str>,
    /// Its name, as sent.
    pub name: Box<str>,
    /// When it was sent, in milliseconds since 1970, UTC.
    pub at: u64,
    /// Its size, decoded.
    pub bytes: u64,
    /// When in the order of changes it was stored.
    pub lsn: Lsn,
    /// Where its bytes are.
    pub kept: Kept,
    /// Who lists it.
    holders: Vec<UserId>,
}

impl Group {
    /// Where in the journal it says that each member joined, in the order of members.
    #[must_use]
    pub fn joined(&self) -> &[Lsn] {
        &self.joined
    }
}

impl StoredFile {
    /// The name of the other party, under which a holder lists it.
    fn party(&self, holder: UserId) -> &str {
        if holder == self.from { &self.to_name } else { &self.from_name }
    }
}

/// A file that is sent.
struct SentFile<'a> {
    file: FileId,
    from: UserId,
    to: Target,
    at: u64,
    name: &'a str,
    bytes: u64,
    kept: Kept,
}

/// What the state can be asked.
impl State {
    /// An empty one, whose messages stand in segments of this size.
    #[must_use]
    pub fn new(segment_bytes: u64) -> Self {
        Self {
            users: Vec::new(),
            mailboxes: Vec::new(),
            groups: BTreeMap::new(),
            groups_next: 0,
            names: HashMap::default(),
            sessions: HashMap::default(),
            sessions_by_use: BTreeSet::new(),
            files: BTreeMap::new(),
            files_by_origin: HashMap::new(),
            files_next: 0,
            files_bytes: 0,
            files_freed: Vec::new(),
            elapsed_ms: 0,
            ids_skipped: 0,
            usage: Usage::new(segment_bytes),
            image: Image::default(),
        }
    }

    /// How much of each segment its mailboxes and files need.
    #[must_use]
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Every mailbox with what waits in it.
    pub fn mailboxes(&self) -> impl Iterator<Item = (UserId, &Mailbox)> {
        (0..).map(UserId).zip(&self.mailboxes).filter_map(|(id, mailbox)| Some((id, mailbox.as_ref()?)))
    }

    /// What the user has not read yet.
    #[must_use]
    pub fn mailbox(&self, user: UserId) -> Option<&Mailbox> {
        self.mailboxes.get(user.0 as usize)?.as_ref()
    }

    /// The user with this number.
    #[must_use]
    pub fn user(&self, user: UserId) -> Option<&User> {
        self.users.get(user.0 as usize)?.as_deref()
    }

    /// The user with this name.
    #[must_use]
    pub fn user_named(&self, name: &str) -> Option<UserId> {
        match self.names.get(name) {
            Some(Owner::User(user)) => Some(*user),
            _ => None,
        }
    }

    /// Every user, in the order in which they came.
    pub fn users(&self) -> impl Iterator<Item = &User> {
        self.users.iter().flatten().map(|user| &**user)
    }

    /// The group with this number.
    #[must_use]
    pub fn group(&self, group: GroupId) -> Option<&Group> {
        self.groups.get(&group)
    }

    /// The group with this name.
    #[must_use]
    pub fn group_named(&self, name: &str) -> Option<GroupId> {
        match self.names.get(name) {
            Some(Owner::Group(group)) => Some(*group),
            _ => None,
        }
    }

    /// How many users there are.
    #[must_use]
    pub fn users_count(&self) -> usize {
        self.names.len().saturating_sub(self.groups.len())
    }

    /// Every group, in the order in which they were made.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &Group> {
        self.groups.values()
    }

    /// True when a user or a group has this name.
    #[must_use]
    pub fn is_taken(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// True when the user is in the group.
    #[must_use]
    pub fn is_member(&self, group: GroupId, user: UserId) -> bool {
        self.user(user).is_some_and(|user| user.groups.contains(&group))
    }

    /// The name of a target that exists.
    #[must_use]
    pub fn target_name(&self, target: Target) -> Option<&str> {
        match target {
            Target::User(user) => self.user(user).map(|user| &*user.name),
            Target::Group(group) => self.group(group).map(|group| &*group.name),
        }
    }

    /// Who gets what `from` sends to `to`.
    pub fn receivers(&self, from: UserId, to: Target) -> impl Iterator<Item = UserId> {
        let (one, members) = match to {
            Target::User(user) => (Some(user), &[][..]),
            Target::Group(group) => (None, self.group(group).map_or(&[][..], |group| &group.members)),
        };
        let others = members.iter().copied().filter(move |member| *member != from);
        one.into_iter().chain(others)
    }

    /// The login, if it is still good at `now`.
    #[must_use]
    pub fn session(&self, session: SessionId, now: u64) -> Option<Session> {
        self.sessions.get(&session).copied().filter(|session| !is_expired(session.used, now))
    }

    /// The login that was used longest ago, if it is no longer good at `now`.
    #[must_use]
    pub fn session_expired(&self, now: u64) -> Option<SessionId> {
        self.sessions_by_use.first().filter(|(used, _)| is_expired(*used, now)).map(|(_, session)| *session)
    }

    /// The one of the user's logins that was used longest ago.
    #[must_use]
    pub fn session_oldest(&self, user: UserId) -> Option<SessionId> {
        let used = |session: &&SessionId| self.sessions.get(session).map(|session| session.used);
        self.user(user)?.sessions.iter().min_by_key(used).copied()
    }

    /// A stored file.
    #[must_use]
    pub fn file(&self, file: FileId) -> Option<&StoredFile> {
        self.files.get(&file)
    }

    /// Every stored file, in the order of their numbers.
    pub fn files(&self) -> impl Iterator<Item = (FileId, &StoredFile)> {
        self.files.iter().map(|(file, stored)| (*file, stored))
    }

    /// The newest file that the user's list has under this party and name.
    #[must_use]
    pub fn file_listed(&self, user: UserId, party: &str, name: &str) -> Option<FileId> {
        self.user(user)?.files.get(party)?.get(name)?.last().copied()
    }

    /// The file that one of this origin would replace.
    #[must_use]
    pub fn file_replaced(&self, from: UserId, to: Target, name: &str) -> Option<&StoredFile> {
        self.files.get(self.files_by_origin.get(&(from, to, name.into()))?)
    }

    /// The size of all stored files.
    #[must_use]
    pub fn files_bytes(&self) -> u64 {
        self.files_bytes
    }

    /// The number that the next user gets.
    #[must_use]
    pub fn next_user(&self) -> UserId {
        UserId(u32::try_from(self.users.len()).unwrap_or(u32::MAX))
    }

    /// The number that the next group gets.
    #[must_use]
    pub fn next_group(&self) -> GroupId {
        GroupId(self.groups_next)
    }

    /// The least number that no file ever had.
    #[must_use]
    pub fn next_file(&self) -> FileId {
        FileId(self.files_next)
    }

    /// How long servers have run on it, as far as it was written down.
    #[must_use]
    pub fn elapsed_ms(&self) -> u64 {
        self.elapsed_ms
    }

    /// Segments in which no message waits any more since this was last asked; see [`Usage`].
    pub fn take_emptied_segments(&mut self) -> BTreeSet<u64> {
        self.usage.take_emptied()
    }

    /// Files of their own that nobody lists any more since this was last asked; their bytes may go once the changes are
    /// durable.
    pub fn take_freed_files(&mut self) -> Vec<FileId> {
        std::mem::take(&mut self.files_freed)
    }
}

/// What must always be true.
impl State {
    /// Verifies every count and every list against what it is of. Says the first that is wrong.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.check_files()?;
        self.check_users()?;
        self.check_groups()?;
        ensure(self.sessions.len() == self.sessions_by_use.len(), || "logins by their use".to_owned())?;
        let open: usize = self.users().map(|account| account.sessions.len()).sum();
        ensure(open == self.sessions.len(), || "logins of nobody".to_owned())?;
        ensure(self.names.len() == self.groups.len() + self.users().count(), || "names".to_owned())
    }

    /// The same for tests.
    ///
    /// # Panics
    /// Something is wrong.
    pub fn assert_invariants(&self) {
        let checked = self.check_invariants();
        assert!(checked.is_ok(), "{checked:?}");
    }

    fn check_files(&self) -> Result<(), String> {
        for (id, stored) in &self.files {
            ensure(id.0 < self.files_next, || format!("the number of {id:?} may come again"))?;
            ensure(!stored.holders.is_empty(), || format!("nobody lists {id:?}"))?;
            for holder in &stored.holders {
                let lists = self.user(*holder).and_then(|account| account.files.get(stored.party(*holder)));
                let is_listed = lists.and_then(|names| names.get(&stored.name)).is_some_and(|files| files.contains(id));
                ensure(is_listed, || format!("{holder:?} does not list {id:?}"))?;
            }
        }
        for (origin, id) in &self.files_by_origin {
            let is_of_it =
                |stored: &StoredFile| (stored.from, stored.to, &stored.name) == (origin.0, origin.1, &origin.2);
            ensure(self.files.get(id).is_some_and(is_of_it), || format!("{id:?} is to be replaced"))?;
        }
        let bytes: u64 = self.files.values().map(|stored| stored.bytes).sum();
        ensure(bytes == self.files_bytes, || "bytes of all files".to_owned())
    }

    fn check_users(&self) -> Result<(), String> {
        let mut sent: HashMap<UserId, (u64, usize)> = HashMap::new();
        let mut listed: HashMap<UserId, usize> = HashMap::new();
        for stored in self.files.values() {
            let (bytes, files) = sent.entry(stored.from).or_default();
            (*bytes, *files) = (*bytes + stored.bytes, *files + 1);
            stored.holders.iter().for_each(|holder| *listed.entry(*holder).or_default() += 1);
        }
        ensure(self.users.len() == self.mailboxes.len(), || "a mailbox for each".to_owned())?;
        for (number, account) in (0..).zip(&self.users) {
            let user = UserId(number);
            ensure(account.is_some() == self.mailbox(user).is_some(), || format!("the mailbox of {user:?}"))?;
            let Some(account) = account else { continue };
            ensure(self.user_named(&account.name) == Some(user), || format!("the name of {user:?}"))?;
            let of_user = sent.get(&user).copied().unwrap_or_default();
            ensure((account.sent_bytes, account.sent_files) == of_user, || format!("what {user:?} has sent"))?;
            let in_list: usize = account.files.values().flat_map(BTreeMap::values).map(Vec::len).sum();
            ensure(account.listed_files == in_list, || format!("files in the list of {user:?}"))?;
            ensure(listed.get(&user).copied().unwrap_or(0) == in_list, || format!("what {user:?} lists"))?;
            let is_member = |group| self.group(group).is_some_and(|group| group.members.contains(&user));
            ensure(account.groups.iter().all(|group| is_member(*group)), || format!("groups of {user:?}"))?;
            let is_open = |session| self.sessions.get(session).is_some_and(|known: &Session| known.user == user);
            ensure(account.sessions.iter().all(is_open), || format!("logins of {user:?}"))?;
            let entries = self.mailbox(user).map(Mailbox::entries);
            let is_in_order = entries.is_none_or(|entries| entries.iter().is_sorted_by(|a, b| a.sent() < b.sent()));
            ensure(is_in_order, || format!("the order of the mailbox of {user:?}"))?;
        }
        Ok(())
    }

    fn check_groups(&self) -> Result<(), String> {
        for (id, group) in &self.groups {
            ensure(id.0 < self.groups_next, || format!("the number of {id:?} may come again"))?;
            ensure(group.members.contains(&group.owner), || format!("the owner of {id:?} is no member"))?;
            ensure(group.members.len() == group.joined.len(), || format!("when members of {id:?} joined"))?;
            let are_members = group.members.iter().all(|member| self.is_member(*id, *member));
            ensure(are_members, || format!("members of {id:?}"))?;
            ensure(self.group_named(&group.name) == Some(*id), || format!("the name of {id:?}"))?;
        }
        Ok(())
    }
}

fn ensure(is_so: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(what()) }
}

fn is_expired(used: u64, now: u64) -> bool {
    now > used.saturating_add(SESSION_MS_MAX + SESSION_TOUCH_MS)
}

/// The one way in which the state changes.
impl State {
    /// Makes one change, whose record stands at `place`.
    #[inline]
    pub fn apply(&mut self, change: &Change<'_>, place: Place) {
        match *change {
            // Nearly all are this, and who makes one knows that it is.
            Change::MessageSent { from, to, .. } => self.send(place, from, to),
            _ => self.apply_other(change, place),
        }
    }

    /// Any but a message.
    fn apply_other(&mut self, change: &Change<'_>, place: Place) {
        let lsn = place.lsn;
        match *change {
            Change::UserAdded { user, name, password_hash } => self.add_user(user, name, password_hash),
            Change::PasswordChanged { user, password_hash, keep } => self.change_password(user, password_hash, keep),
            Change::UserRemoved { user } => self.remove_user(user),
            Change::SessionOpened { session, user, at, elapsed_ms } => {
                self.open_session(session, Session { user, used: at, elapsed_ms });
            }
            Change::SessionUsed { session, at, elapsed_ms } => self.use_session(session, at, elapsed_ms),
            Change::SessionClosed { session } => self.close_session(session),
            Change::GroupCreated { group, name, owner, secret_hash } => {
                self.create_group(group, name, owner, secret_hash, lsn);
            }
            Change::MemberJoined { group, user } => self.join(group, user, lsn),
            Change::MemberLeft { group, user } => self.leave(group, user),
            // Made by `apply` itself.
            Change::MessageSent { .. } => {}
            Change::MessageMoved { sent, holders, .. } => self.relocate(place, sent, holders),
            Change::Delivered { user, first, last } => {
                if let Some(Some(mailbox)) = self.mailboxes.get_mut(user.0 as usize) {
                    mailbox.remove(lsn, first, last, |entry| self.usage.remove(entry));
                }
            }
            Change::FileStored { file, from, to, at, bytes, name, sum } => {
                self.store_file(&SentFile { file, from, to, at, name, bytes, kept: Kept::Apart { sum } }, lsn);
            }
            Change::FileSent { file, from, to, at, name, content } => {
                let (bytes, kept) = (content.len() as u64, Kept::Journal(place));
                self.store_file(&SentFile { file, from, to, at, name, bytes, kept }, lsn);
            }
            Change::FileMoved { file, .. } => self.move_file(file, place),
            Change::FileLost { file } => self.lose_file(file),
            Change::FileDropped { user, party, name } => self.drop_file(user, party, name),
            Change::TimePassed { elapsed_ms } => self.pass_time(elapsed_ms),
        }
    }

    fn user_mut(&mut self, user: UserId) -> Option<&mut User> {
        self.users.get_mut(user.0 as usize)?.as_deref_mut()
    }

    fn add_user(&mut self, user: UserId, name: &str, password_hash: &str) {
        if user < self.next_user() {
            return;
        }
        if self.is_taken(name) {
            // Its number has been given all the same. This happens only when a record that freed the name was lost.
            self.set_users(user.0 as usize + 1);
            return;
        }
        self.put_user(user, User::new(name, password_hash), Mailbox::restore(self.ids_skipped, Lsn(0)));
    }

    fn put_user(&mut self, user: UserId, account: User, mailbox: Mailbox) {
        let place = user.0 as usize;
        // There is a gap where a repair has dropped somebody.
        self.set_users(place + 1);
        self.names.insert((&*account.name).into(), Owner::User(user));
        self.users[place] = Some(Box::new(account));
        self.mailboxes[place] = Some(mailbox);
    }

    /// Has places for so many users at least.
    fn set_users(&mut self, count: usize) {
        let count = count.max(self.users.len());
        self.users.resize_with(count, || None);
        self.mailboxes.resize_with(count, || None);
    }

    fn change_password(&mut self, user: UserId, password_hash: &str, keep: Option<SessionId>) {
        let Some(account) = self.user_mut(user) else { return };
        account.password_hash = password_hash.into();
        let ended: Vec<SessionId> = account.sessions.iter().copied().filter(|session| Some(*session) != keep).collect();
        for session in ended {
            self.close_session(session);
        }
    }

    fn remove_user(&mut self, user: UserId) {
        self.keep_user(user);
        let Some(account) = self.user(user) else { return };
        let sessions = account.sessions.clone();
        let groups = account.groups.clone();
        for session in sessions {
            self.close_session(session);
        }
        for group in groups {
            self.leave(group, user);
        }
        let Some(account) = self.users.get_mut(user.0 as usize).and_then(Option::take) else { return };
        self.names.remove(&*account.name);
        let mailbox = self.mailboxes.get_mut(user.0 as usize).and_then(Option::take);
        for entry in mailbox.iter().flat_map(Mailbox::entries) {
            self.usage.remove(entry);
        }
        for file in account.files.into_values().flat_map(BTreeMap::into_values).flatten() {
            self.release_file(file, user);
        }
    }

    fn open_session(&mut self, session: SessionId, opened: Session) {
        self.pass_time(opened.elapsed_ms);
        if self.sessions.contains_key(&session) {
            return;
        }
        let Some(account) = self.user_mut(opened.user) else { return };
        account.sessions.push(session);
        self.sessions.insert(session, opened);
        self.sessions_by_use.insert((opened.used, session));
    }

    fn use_session(&mut self, session: SessionId, at: u64, elapsed_ms: u64) {
        self.pass_time(elapsed_ms);
        let Some(known) = self.sessions.get_mut(&session) else { return };
        self.sessions_by_use.remove(&(known.used, session));
        (known.used, known.elapsed_ms) = (at, elapsed_ms);
        self.sessions_by_use.insert((at, session));
    }

    /// It never runs backward.
    fn pass_time(&mut self, elapsed_ms: u64) {
        self.elapsed_ms = self.elapsed_ms.max(elapsed_ms);
    }

    fn close_session(&mut self, session: SessionId) {
        let Some(closed) = self.sessions.remove(&session) else { return };
        self.sessions_by_use.remove(&(closed.used, session));
        if let Some(account) = self.user_mut(closed.user) {
            account.sessions.retain(|known| *known != session);
        }
    }

    fn create_group(&mut self, group: GroupId, name: &str, owner: UserId, secret_hash: Option<&str>, lsn: Lsn) {
        if group.0 < self.groups_next || group.0 == u32::MAX {
            return;
        }
        // Its number has been given, whatever becomes of it.
        self.groups_next = group.0 + 1;
        if self.is_taken(name) {
            return;
        }
        let Some(account) = self.user_mut(owner) else { return };
        account.groups.insert(group);
        self.names.insert(name.into(), Owner::Group(group));
        let (secret_hash, members, joined) = (secret_hash.map(Into::into), vec![owner], vec![lsn]);
        self.groups.insert(group, Group { name: name.into(), owner, members, joined, secret_hash });
    }

    fn join(&mut self, group: GroupId, user: UserId, lsn: Lsn) {
        if !self.groups.contains_key(&group) {
            return;
        }
        self.keep_group(group);
        let is_new = self.user_mut(user).is_some_and(|account| account.groups.insert(group));
        if let Some(joined) = self.groups.get_mut(&group).filter(|_| is_new) {
            joined.members.push(user);
            joined.joined.push(lsn);
        }
    }

    fn leave(&mut self, group: GroupId, user: UserId) {
        self.keep_group(group);
        let was_member = self.user_mut(user).is_some_and(|account| account.groups.remove(&group));
        let Some(left) = self.groups.get_mut(&group).filter(|_| was_member) else { return };
        if let Some(place) = left.members.iter().position(|member| *member == user) {
            left.members.remove(place);
            left.joined.remove(place);
        }
        match left.members.first() {
            Some(longest) if left.owner == user => left.owner = *longest,
            Some(_) => {}
            None => {
                if let Some(ended) = self.groups.remove(&group) {
                    self.names.remove(&*ended.name);
                }
            }
        }
    }

    fn send(&mut self, place: Place, from: UserId, to: Target) {
        match to {
            Target::User(user) => {
                if let Some(Some(mailbox)) = self.mailboxes.get_mut(user.0 as usize)
                    && !mailbox.holds(place.lsn)
                {
                    self.usage.add(&mailbox.push(place, 1));
                }
            }
            Target::Group(group) => {
                let Some(group) = self.groups.get(&group) else { return };
                // Whoever is a member is a user; the sender may have left.
                let others = group.members.iter().filter(|member| **member != from);
                let holders = others.clone().count();
                for member in others {
                    if let Some(Some(mailbox)) = self.mailboxes.get_mut(member.0 as usize)
                        && !mailbox.holds(place.lsn)
                    {
                        self.usage.add(&mailbox.push(place, holders));
                    }
                }
            }
        }
    }

    fn relocate(&mut self, place: Place, sent: Lsn, holders: Holders<'_>) {
        let count = holders.count();
        for user in holders.iter() {
            let Some(Some(mailbox)) = self.mailboxes.get_mut(user.0 as usize) else { continue };
            if let Some((before, now)) = mailbox.relocate(sent, place, count) {
                self.usage.add(&now);
                self.usage.remove(&before);
            }
        }
    }

    fn store_file(&mut self, sent: &SentFile<'_>, lsn: Lsn) {
        let &SentFile { file, from, to, at, name, bytes, kept } = sent;
        // An upload has its number before others that are written down first, so numbers do not grow in order.
        if (file.0 < self.files_next && self.files.contains_key(&file)) || file.0 == u64::MAX {
            return;
        }
        self.files_next = self.files_next.max(file.0 + 1);
        let (Some(sender), Some(target)) = (self.user(from), self.target_name(to)) else { return };
        let (from_name, to_name) = (sender.name.clone(), target.into());
        let origin = (from, to, name.into());
        if let Some(replaced) = self.files_by_origin.get(&origin).copied() {
            self.lose_file(replaced);
        }
        let mut holders = match to {
            Target::User(user) => vec![user],
            Target::Group(group) => self.groups.get(&group).map(|group| group.members.clone()).unwrap_or_default(),
        };
        if !holders.contains(&from) {
            holders.push(from);
        }
        self.files_by_origin.insert(origin, file);
        let name = name.into();
        self.put_file(file, StoredFile { from, to, from_name, to_name, name, at, bytes, lsn, kept, holders });
    }

    /// Puts a file into the lists of its holders, behind those that they list under the same names, and counts it.
    fn put_file(&mut self, file: FileId, stored: StoredFile) {
        for holder in &stored.holders {
            let party = stored.party(*holder);
            if let Some(account) = self.users.get_mut(holder.0 as usize).and_then(Option::as_deref_mut) {
                let names = account.files.entry(party.into()).or_default();
                names.entry(stored.name.clone()).or_default().push(file);
                account.listed_files += 1;
            }
        }
        if let Some(sender) = self.user_mut(stored.from) {
            sender.sent_bytes = sender.sent_bytes.saturating_add(stored.bytes);
            sender.sent_files += 1;
        }
        if let Kept::Journal(place) = stored.kept {
            self.usage.add_file(place);
        }
        self.files_bytes = self.files_bytes.saturating_add(stored.bytes);
        self.files.insert(file, stored);
    }

    fn move_file(&mut self, file: FileId, place: Place) {
        let Some(StoredFile { kept: Kept::Journal(kept), .. }) = self.files.get_mut(&file) else { return };
        let before = std::mem::replace(kept, place);
        self.usage.add_file(place);
        self.usage.remove_file(before);
    }

    /// Nobody lists the file any more.
    fn lose_file(&mut self, file: FileId) {
        let Some(lost) = self.files.get_mut(&file) else { return };
        let (from, from_name, to_name) = (lost.from, lost.from_name.clone(), lost.to_name.clone());
        let (name, holders) = (lost.name.clone(), std::mem::take(&mut lost.holders));
        for holder in holders {
            let party = if holder == from { &to_name } else { &from_name };
            self.unlist(holder, party, &name, file);
        }
        self.free_file(file);
    }

    fn drop_file(&mut self, user: UserId, party: &str, name: &str) {
        let Some(account) = self.user_mut(user) else { return };
        let Some(names) = account.files.get_mut(party) else { return };
        let dropped = names.remove(name).unwrap_or_default();
        account.listed_files -= dropped.len();
        if names.is_empty() {
            account.files.remove(party);
        }
        for file in dropped {
            self.release_file(file, user);
        }
    }

    /// Takes one file off a list, and leaves others of the same name.
    fn unlist(&mut self, user: UserId, party: &str, name: &str, file: FileId) {
        let Some(account) = self.user_mut(user) else { return };
        let Some(names) = account.files.get_mut(party) else { return };
        let Some(files) = names.get_mut(name) else { return };
        let before = files.len();
        files.retain(|listed| *listed != file);
        account.listed_files -= before - files.len();
        if files.is_empty() {
            names.remove(name);
        }
        if names.is_empty() {
            account.files.remove(party);
        }
    }

    /// The user no longer lists the file; with the last who did, it goes.
    fn release_file(&mut self, file: FileId, user: UserId) {
        let Some(stored) = self.files.get_mut(&file) else { return };
        stored.holders.retain(|holder| *holder != user);
        if stored.holders.is_empty() {
            self.free_file(file);
        }
    }

    /// Nobody lists the file.
    fn free_file(&mut self, file: FileId) {
        let Some(freed) = self.files.remove(&file) else { return };
        match freed.kept {
            Kept::Apart { .. } => self.files_freed.push(file),
            Kept::Journal(place) => self.usage.remove_file(place),
        }
        self.files_bytes = self.files_bytes.saturating_sub(freed.bytes);
        if let Some(sender) = self.user_mut(freed.from) {
            sender.sent_bytes = sender.sent_bytes.saturating_sub(freed.bytes);
            sender.sent_files = sender.sent_files.saturating_sub(1);
        }
        let origin = (freed.from, freed.to, freed.name);
        if self.files_by_origin.get(&origin) == Some(&file) {
            self.files_by_origin.remove(&origin);
        }
    }
}
