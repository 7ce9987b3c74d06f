//! The state as it was at one position of the journal, written down a little at a time while it goes on changing.
//!
//! Users, then groups, then files are written in the order of their numbers. Which users there are, and groups with their
//! members, is as it was when the image was begun: what is about to change before its turn has come is written at once,
//! ahead of its turn. The rest is as it is when its turn comes, and making the changes of the journal since then once more
//! leads to the same: passwords and logins are set again, files are only ever taken off lists (newer ones the journal has),
//! and each mailbox says up to where it holds the journal.

use std::collections::BTreeSet;
use std::ops::Bound;

use crate::change::{FileId, GroupId, Lsn, UserId};
use crate::field::{Fields, Put};
use crate::mailbox::{Entry, Mailbox};
use crate::snapshot::{Counters, ENTRIES_MAX, Item, Member};
use crate::state::{Group, Session, State, StoredFile, User};

/// How much of an image is shown at once at most.
#[derive(Clone, Copy, Debug)]
pub struct Portion {
    /// Users, parts of mailboxes, groups, files, and numbers that nothing has any more.
    pub items: usize,
    /// Messages in one part of a mailbox.
    pub entries: usize,
}

impl Portion {
    /// All of it.
    const WHOLE: Self = Self { items: usize::MAX, entries: ENTRIES_MAX };
}

/// An item of an image, and whether there is room for more.
pub type ImageItem<'s> = &'s mut dyn FnMut(&Item<'_>) -> bool;

/// How far an image is written.
#[derive(Debug, Default)]
pub(super) struct Image(Option<Box<Writing>>);

impl PartialEq for Image {
    /// A state is the same whether it is being written down or not.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Image {}

#[derive(Debug)]
struct Writing {
    lsn: Lsn,
    users_end: UserId,
    groups_end: GroupId,
    next: Next,
    /// What has been written ahead of its turn, as long as that has not come.
    ahead_users: BTreeSet<UserId>,
    ahead_groups: BTreeSet<GroupId>,
    /// The items that were, encoded, each behind its length.
    ahead: Vec<u8>,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Next {
    User(UserId),
    /// More of a mailbox that holds all before `through`: what was sent to it from a position on.
    Entries {
        user: UserId,
        from: Lsn,
        through: Lsn,
    },
    Group(GroupId),
    File(FileId),
    Nothing,
}

impl Writing {
    fn keep(&mut self, item: &Item<'_>) {
        let start = self.ahead.len();
        0u32.put(&mut self.ahead);
        item.encode(&mut self.ahead);
        let bytes = u32::try_from(self.ahead.len() - start - size_of::<u32>()).unwrap_or(u32::MAX);
        self.ahead[start..start + size_of::<u32>()].copy_from_slice(&bytes.to_le_bytes());
    }
}

/// Making an image.
impl State {
    /// Begins an image of the state as it is now, which is all that the journal says before `lsn`. One that was begun before
    /// is given up.
    pub fn begin_image(&mut self, lsn: Lsn) -> Counters {
        self.image.0 = Some(Box::new(Writing {
            lsn,
            users_end: self.next_user(),
            groups_end: self.next_group(),
            next: Next::User(UserId(0)),
            ahead_users: BTreeSet::new(),
            ahead_groups: BTreeSet::new(),
            ahead: Vec::new(),
        }));
        self.counters(lsn)
    }

    /// The numbers that come next, when the journal ends at `lsn`.
    #[must_use]
    pub fn counters(&self, lsn: Lsn) -> Counters {
        let (users, groups, files) = (self.next_user().0, self.groups_next, self.files_next);
        Counters { lsn, users, groups, files, elapsed_ms: self.elapsed_ms }
    }

    /// No image is made any more.
    pub fn end_image(&mut self) {
        self.image.0 = None;
    }

    /// How much memory waits to be written ahead of its turn.
    #[must_use]
    pub fn image_bytes_ahead(&self) -> usize {
        self.image.0.as_ref().map_or(0, |writing| writing.ahead.len())
    }

    /// Shows what comes next of the image, until there is no room for more, and at most a portion. `end` is where the journal
    /// ends now. True when all was shown.
    pub fn write_image(&mut self, end: Lsn, portion: Portion, show: ImageItem<'_>) -> bool {
        let Some(mut writing) = self.image.0.take() else { return true };
        let is_done = self.write_ahead(&mut writing, show) && self.write_in_turn(&mut writing, end, portion, show);
        self.image.0 = Some(writing);
        is_done
    }

    /// What was kept ahead of its turn goes all at once: a turn keeps only so much.
    fn write_ahead(&self, writing: &mut Writing, show: ImageItem<'_>) -> bool {
        let mut has_room = true;
        let mut rest = Fields(&writing.ahead);
        while let Some(encoded) = rest.take::<&[u8]>() {
            if let Some(item) = Item::decode(encoded) {
                has_room = show(&item);
            }
        }
        writing.ahead.clear();
        writing.ahead.shrink_to(64 * 1024);
        has_room
    }

    fn write_in_turn(&self, writing: &mut Writing, end: Lsn, portion: Portion, show: ImageItem<'_>) -> bool {
        for _ in 0..portion.items {
            let has_room = match writing.next {
                Next::User(user) => self.write_user(writing, user, end, show),
                Next::Entries { user, from, through } => {
                    let entries_max = portion.entries.clamp(1, ENTRIES_MAX);
                    self.write_entries(writing, (user, from, through), entries_max, show)
                }
                Next::Group(group) => self.write_group(writing, group, show),
                Next::File(file) => self.write_file(writing, file, show),
                Next::Nothing => return true,
            };
            if !has_room {
                break;
            }
        }
        matches!(writing.next, Next::Nothing)
    }

    fn write_user(&self, writing: &mut Writing, user: UserId, end: Lsn, show: ImageItem<'_>) -> bool {
        if user >= writing.users_end {
            writing.next = Next::Group(GroupId(0));
            return true;
        }
        let after = UserId(user.0 + 1);
        writing.next = Next::User(after);
        writing.ahead_users.remove(&user);
        let (Some(account), Some(mailbox)) = (self.user(user), self.mailbox(user)) else { return true };
        let mut has_room = show(&user_item(user, account, mailbox, end));
        for session in &account.sessions {
            if let Some(Session { used, elapsed_ms, .. }) = self.sessions.get(session).copied() {
                has_room = show(&Item::Session { session: *session, user, used, elapsed_ms });
            }
        }
        if !mailbox.entries().is_empty() {
            writing.next = Next::Entries { user, from: Lsn(0), through: end };
        }
        has_room
    }

    fn write_entries(
        &self,
        writing: &mut Writing,
        (user, from, through): (UserId, Lsn, Lsn),
        entries_max: usize,
        show: ImageItem<'_>,
    ) -> bool {
        let entries = self.mailbox(user).map(Mailbox::entries);
        // What comes from `through` on the journal says.
        let rest = entries.map(|entries| {
            let position = |lsn: Lsn| entries.partition_point(|entry| entry.sent() < lsn);
            let (start, end) = (position(from), position(through));
            entries.range(start.min(end)..end.min(start + entries_max)).copied().collect::<Vec<Entry>>()
        });
        let rest = rest.unwrap_or_default();
        let Some(last) = rest.last() else {
            writing.next = Next::User(UserId(user.0 + 1));
            return true;
        };
        writing.next = Next::Entries { user, from: last.sent().next(), through };
        show(&Item::Entries { user, entries: rest.into() })
    }

    fn write_group(&self, writing: &mut Writing, group: GroupId, show: ImageItem<'_>) -> bool {
        let found = self.groups.range(group..writing.groups_end.max(group)).next();
        let Some((id, known)) = found else {
            writing.next = Next::File(FileId(0));
            return true;
        };
        writing.next = Next::Group(GroupId(id.0 + 1));
        writing.ahead_groups.remove(id) || show(&group_item(*id, known))
    }

    fn write_file(&self, writing: &mut Writing, file: FileId, show: ImageItem<'_>) -> bool {
        let Some((id, stored)) = self.files.range((Bound::Included(file), Bound::Unbounded)).next() else {
            writing.next = Next::Nothing;
            return true;
        };
        writing.next = Next::File(FileId(id.0 + 1));
        // What is newer the journal says.
        stored.lsn >= writing.lsn || show(&self.file_item(*id, stored))
    }

    fn file_item<'s>(&self, file: FileId, stored: &'s StoredFile) -> Item<'s> {
        let StoredFile { from, to, from_name, to_name, name, at, bytes, lsn, kept, holders } = stored;
        let is_current = self.files_by_origin.get(&(*from, *to, name.clone())) == Some(&file);
        let (from, to, bytes, at, lsn, kept) = (*from, *to, *bytes, *at, *lsn, *kept);
        let holders = holders.clone();
        Item::File { file, from, to, from_name, to_name, name, bytes, at, lsn, is_current, holders, kept }
    }

    /// A user is about to go.
    pub(super) fn keep_user(&mut self, user: UserId) {
        let Some(mut writing) = self.image.0.take() else { return };
        let is_to_come = match writing.next {
            Next::User(next) => user >= next,
            Next::Entries { user: now, .. } => user > now,
            Next::Group(_) | Next::File(_) | Next::Nothing => false,
        };
        if is_to_come
            && user < writing.users_end
            && let (Some(account), Some(mailbox)) = (self.user(user), self.mailbox(user))
            && writing.ahead_users.insert(user)
        {
            // What it has goes with it when the journal comes to that.
            let lsn = writing.lsn;
            writing.keep(&user_item(user, account, mailbox, lsn));
        }
        self.image.0 = Some(writing);
    }

    /// A group is about to change.
    pub(super) fn keep_group(&mut self, group: GroupId) {
        let Some(mut writing) = self.image.0.take() else { return };
        let is_to_come = match writing.next {
            Next::User(_) | Next::Entries { .. } => true,
            Next::Group(next) => group >= next,
            Next::File(_) | Next::Nothing => false,
        };
        if is_to_come
            && group < writing.groups_end
            && let Some(known) = self.group(group)
            && writing.ahead_groups.insert(group)
        {
            writing.keep(&group_item(group, known));
        }
        self.image.0 = Some(writing);
    }

    /// Shows everything at once but the counters, as it is when the journal ends at `lsn`.
    pub fn write_whole_image(&mut self, lsn: Lsn, show: &mut dyn FnMut(&Item<'_>)) {
        self.begin_image(lsn);
        let mut all = |item: &Item<'_>| {
            show(item);
            true
        };
        while !self.write_image(lsn, Portion::WHOLE, &mut all) {}
        self.end_image();
    }
}

fn user_item<'s>(user: UserId, account: &'s User, mailbox: &Mailbox, through: Lsn) -> Item<'s> {
    let User { name, password_hash, .. } = account;
    Item::User { user, name, password_hash, last_id: mailbox.last_id(), through }
}

fn group_item(group: GroupId, known: &Group) -> Item<'_> {
    let Group { name, owner, members, joined, secret_hash } = known;
    let members = members.iter().zip(joined).map(|(user, joined)| Member { user: *user, joined: *joined }).collect();
    Item::Group { group, name, owner: *owner, secret_hash: secret_hash.as_deref(), members }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Change, Holders, Kept, Place, SessionId, Target};
    use proptest::prelude::*;

    const SEGMENT_BYTES: u64 = 4096;
    const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

    /// What is done, with numbers that say to whom and to what.
    type Step = (u8, u8, u8, u8);

    /// A state, and the journal that led to it.
    struct World {
        state: State,
        end: Lsn,
        /// What came since the image was begun.
        since: Option<Vec<(Lsn, Vec<u8>)>>,
        image: Vec<Vec<u8>>,
        is_whole: bool,
    }

    impl World {
        fn new() -> Self {
            let state = State::new(SEGMENT_BYTES);
            Self { state, end: Lsn(SEGMENT_BYTES), since: None, image: Vec::new(), is_whole: false }
        }

        fn make(&mut self, change: &Change<'_>) {
            let place = Place { lsn: self.end, bytes: 64 };
            self.state.apply(change, place);
            self.state.assert_invariants();
            if let Some(since) = &mut self.since {
                let mut encoded = Vec::new();
                change.encode(&mut encoded);
                since.push((place.lsn, encoded));
            }
            self.end = place.end();
        }

        /// A change that a handler could make now, more or less.
        fn step(&mut self, (kind, who, what, size): Step) {
            let users: Vec<UserId> = self.state.mailboxes().map(|(user, _)| user).collect();
            let groups: Vec<GroupId> = self.state.groups.keys().copied().collect();
            let name = NAMES[usize::from(what) % NAMES.len()];
            let add = Change::UserAdded { user: self.state.next_user(), name, password_hash: "$" };
            let pick = |list: &[UserId], number: u8| list[usize::from(number) % list.len()];
            if users.is_empty() {
                return self.make(&add);
            }
            let (user, other) = (pick(&users, who), pick(&users, what));
            let group = groups.get(usize::from(what) % groups.len().max(1)).copied();
            let to = group.filter(|_| size.is_multiple_of(2)).map_or(Target::User(other), Target::Group);
            let sessions = self.state.user(user).map(|account| account.sessions.clone()).unwrap_or_default();
            let at = u64::from(size);
            match kind % 20 {
                0 | 1 => self.make(&add),
                2 => self.make(&Change::UserRemoved { user }),
                3 => {
                    let keep = sessions.first().copied().filter(|_| size.is_multiple_of(2));
                    self.make(&Change::PasswordChanged { user, password_hash: NAMES[usize::from(size) % 6], keep });
                }
                4 => {
                    let session = SessionId(u128::from(self.end.0).to_le_bytes());
                    self.make(&Change::SessionOpened { session, user, at, elapsed_ms: at });
                }
                5 => {
                    for session in sessions.iter().take(1).copied() {
                        self.make(&Change::SessionUsed { session, at, elapsed_ms: at });
                    }
                }
                6 => {
                    for session in sessions.iter().rev().take(1).copied() {
                        self.make(&Change::SessionClosed { session });
                    }
                }
                7 | 8 => {
                    let group = self.state.next_group();
                    self.make(&Change::GroupCreated { group, name, owner: user, secret_hash: None });
                }
                9 | 10 => group.into_iter().for_each(|group| self.make(&Change::MemberJoined { group, user })),
                11 => group.into_iter().for_each(|group| self.make(&Change::MemberLeft { group, user })),
                12 | 13 => {
                    self.make(&Change::MessageSent { from: user, to, at, from_name: "x", to_name: "y", text: "z" });
                }
                14 => self.deliver_or_move(user, size),
                15 | 16 => self.store(user, to, name, size),
                17 => {
                    let party = if size.is_multiple_of(2) { name } else { NAMES[usize::from(size) % 6] };
                    self.make(&Change::FileDropped { user, party, name });
                }
                18 => self.move_or_lose(size),
                _ => self.make(&Change::TimePassed { elapsed_ms: at }),
            }
        }

        fn deliver_or_move(&mut self, user: UserId, size: u8) {
            let Some(mailbox) = self.state.mailbox(user) else { return };
            let (Some(first), Some(last)) = (mailbox.entries().front(), mailbox.entries().get(usize::from(size % 4)))
            else {
                return;
            };
            let (first, last) = (first.sent(), last.sent());
            if size.is_multiple_of(3) {
                let holders = user.0.to_le_bytes();
                let (to, holders) = (Target::User(user), Holders::new(&holders));
                let (from_name, to_name, text) = ("x", "y", "z");
                self.make(&Change::MessageMoved {
                    sent: first,
                    from: None,
                    to,
                    at: 1,
                    from_name,
                    to_name,
                    text,
                    holders,
                });
            } else {
                self.make(&Change::Delivered { user, first, last });
            }
        }

        fn store(&mut self, from: UserId, to: Target, name: &str, size: u8) {
            let (file, at) = (self.state.next_file(), 1);
            if size.is_multiple_of(3) {
                self.make(&Change::FileStored { file, from, to, at, bytes: u64::from(size), name, sum: Some(1) });
            } else {
                self.make(&Change::FileSent { file, from, to, at, name, content: b"abc" });
            }
        }

        fn move_or_lose(&mut self, size: u8) {
            let files: Vec<(FileId, Kept)> = self.state.files().map(|(file, stored)| (file, stored.kept)).collect();
            let Some((file, kept)) = files.get(usize::from(size) % files.len().max(1)).copied() else { return };
            match kept {
                Kept::Journal(_) if !size.is_multiple_of(4) => self.make(&Change::FileMoved { file, content: b"abc" }),
                _ => self.make(&Change::FileLost { file }),
            }
        }

        /// So much of the image is written as fits into a small block.
        fn write(&mut self, items: usize) {
            let (image, mut left) = (&mut self.image, items);
            self.is_whole |= self.state.write_image(self.end, Portion { items, entries: 2 }, &mut |item| {
                let mut encoded = Vec::new();
                item.encode(&mut encoded);
                image.push(encoded);
                left = left.saturating_sub(1);
                left > 0
            });
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn an_image_and_what_came_since_make_the_same_whatever_changes_while_it_is_written(
            before: Vec<Step>,
            during in proptest::collection::vec((any::<Step>(), 0usize..4), 0..60),
            after in proptest::collection::vec(any::<Step>(), 0..10),
        ) {
            let mut world = World::new();
            before.into_iter().for_each(|step| world.step(step));
            let counters = world.state.begin_image(world.end);
            world.image.push(Vec::new());
            Item::Counters(counters).encode(&mut world.image[0]);
            world.since = Some(Vec::new());
            for (step, items) in during {
                world.step(step);
                if items > 0 && !world.is_whole {
                    world.write(items);
                }
            }
            while !world.is_whole {
                world.write(3);
            }
            world.state.end_image();
            after.into_iter().for_each(|step| world.step(step));

            let mut restored = State::new(SEGMENT_BYTES);
            for encoded in &world.image {
                restored.restore(&Item::decode(encoded).unwrap());
            }
            restored.finish_restore();
            restored.assert_invariants();
            for (lsn, encoded) in world.since.unwrap() {
                restored.apply(&Change::decode(&encoded).unwrap(), Place { lsn, bytes: 64 });
            }
            restored.assert_invariants();
            // What was freed on the way is no part of it.
            restored.take_freed_files();
            world.state.take_freed_files();
            prop_assert!(restored == world.state, "{restored:#?}\n\nis not\n\n{:#?}", world.state);
        }
    }
}
