//! The way back from a checkpoint: items, logins and parts of mailboxes behind their users, and then what makes one state of
//! them all.
//!
//! Every invariant is true of what is made, whatever is missing: what names somebody who is not there is left out.

use std::collections::BTreeMap;

use crate::change::{FileId, Lsn};
use crate::mailbox::Mailbox;
use crate::record::RECORD_BYTES_MIN;
use crate::snapshot::{Counters, Item};
use crate::state::{Group, Owner, Session, State, StoredFile, User};

/// What a repair leaves out of the numbers that come next, where it cannot be known how many had been given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Numbers of users.
    pub users: u32,
    /// Numbers of groups.
    pub groups: u32,
    /// Numbers of files.
    pub files: u64,
}

impl Skipped {
    /// Where nothing says how many were given. A place for a user takes memory, so it is not more.
    pub(crate) const WITHOUT_COUNTERS: Self = Self { users: 64 * 1024, groups: 64 * 1024, files: 1 << 32 };

    /// As many as may have been given in so many bytes of the journal that cannot be read.
    pub(crate) fn within(bytes: u64) -> Self {
        // The record of an account takes this at least: its name, and a PHC string.
        const ACCOUNT_BYTES_MIN: u64 = 64;
        // A place for a user takes memory.
        const SOME_MAX: u64 = 1 << 20;
        let records = bytes.div_ceil(RECORD_BYTES_MIN as u64);
        let some = |count: u64| u32::try_from(count.min(SOME_MAX)).unwrap_or(0);
        let (users, groups) = (some(bytes.div_ceil(ACCOUNT_BYTES_MIN)), some(records));
        Self { users, groups, files: records }
    }

    /// Both together.
    pub(crate) fn and(self, more: Self) -> Self {
        Self {
            users: self.users.saturating_add(more.users).min(1 << 20),
            groups: self.groups.saturating_add(more.groups),
            files: self.files.saturating_add(more.files),
        }
    }
}

impl State {
    /// Takes one item. [`Self::finish_restore`] comes behind the last, before anything else is asked or applied.
    pub fn restore(&mut self, item: &Item<'_>) {
        match item {
            Item::Counters(counters) => self.restore_counters(counters),
            Item::User { user, name, password_hash, last_id, through } => {
                self.put_user(*user, User::new(name, password_hash), Mailbox::restore(*last_id, *through));
            }
            Item::Session { session, user, used, elapsed_ms } => {
                self.open_session(*session, Session { user: *user, used: *used, elapsed_ms: *elapsed_ms });
            }
            Item::Group { group, name, owner, secret_hash, members } => {
                self.groups_next = self.groups_next.max(group.0.saturating_add(1));
                let (name, secret_hash) = (Box::<str>::from(*name), secret_hash.map(Into::into));
                let (members, joined) = members.iter().map(|member| (member.user, member.joined)).unzip();
                self.groups.insert(*group, Group { name, owner: *owner, members, joined, secret_hash });
            }
            Item::File { file, .. } => {
                self.files_next = self.files_next.max(file.0.saturating_add(1));
                self.restore_file(item);
            }
            Item::Listing { user, party, files, .. } => {
                // All that it says that the file does not.
                for file in files {
                    if let Some(stored) = self.files.get_mut(file) {
                        let name = if *user == stored.from { &mut stored.to_name } else { &mut stored.from_name };
                        *name = (*party).into();
                    }
                }
            }
            Item::Entries { user, entries } => {
                let Some(Some(mailbox)) = self.mailboxes.get_mut(user.0 as usize) else { return };
                for entry in entries.iter() {
                    mailbox.restore_entry(*entry);
                    self.usage.add(entry);
                }
            }
            Item::End { counters, .. } => counters.iter().for_each(|counters| self.restore_counters(counters)),
        }
    }

    fn restore_counters(&mut self, counters: &Counters) {
        self.set_users(counters.users as usize);
        self.groups_next = self.groups_next.max(counters.groups);
        self.files_next = self.files_next.max(counters.files);
        self.pass_time(counters.elapsed_ms);
    }

    fn restore_file(&mut self, item: &Item<'_>) {
        let &Item::File { file, from, to, from_name, to_name, name, bytes, at, lsn, is_current, ref holders, kept } =
            item
        else {
            return;
        };
        if is_current {
            self.files_by_origin.insert((from, to, name.into()), file);
        }
        let (from_name, to_name, name, holders) = (from_name.into(), to_name.into(), name.into(), holders.clone());
        self.files.insert(file, StoredFile { from, to, from_name, to_name, name, at, bytes, lsn, kept, holders });
    }

    /// Ids are given one after the other again.
    pub fn skip_no_more_ids(&mut self) {
        self.ids_skipped = 0;
    }

    /// Makes one state of what was restored. Gives back the files that nobody is left to list: their names, and who sent them.
    pub fn finish_restore(&mut self) -> Vec<(Box<str>, Box<str>)> {
        let mut unlisted = Vec::new();
        for (id, mut group) in std::mem::take(&mut self.groups) {
            let both = group.members.iter().copied().zip(group.joined.iter().copied());
            (group.members, group.joined) = both.filter(|(member, _)| self.user(*member).is_some()).unzip();
            let Some(longest) = group.members.first().copied().filter(|_| !self.is_taken(&group.name)) else {
                continue;
            };
            if !group.members.contains(&group.owner) {
                group.owner = longest;
            }
            for member in &group.members {
                if let Some(account) = self.users.get_mut(member.0 as usize).and_then(Option::as_deref_mut) {
                    account.groups.insert(id);
                }
            }
            self.names.insert((&*group.name).into(), Owner::Group(id));
            self.groups.insert(id, group);
        }
        // The newest of one name stands last in a list.
        let by_age: BTreeMap<(Lsn, FileId), StoredFile> =
            std::mem::take(&mut self.files).into_iter().map(|(id, stored)| ((stored.lsn, id), stored)).collect();
        for ((_, id), mut stored) in by_age {
            self.name_parties(&mut stored);
            let is_known = |holder: &_| self.user(*holder).is_some() && !stored.party(*holder).is_empty();
            let holders = stored.holders.iter().copied().filter(is_known).collect();
            stored.holders = holders;
            if stored.holders.is_empty() {
                unlisted.push((stored.name, stored.from_name));
            } else {
                self.put_file(id, stored);
            }
        }
        let files = &self.files;
        self.files_by_origin.retain(|_, file| files.contains_key(file));
        unlisted
    }

    /// Format 3 has the names in lists, of which one may be missing. Nobody and nothing ever gets another name.
    fn name_parties(&self, stored: &mut StoredFile) {
        if stored.from_name.is_empty()
            && let Some(sender) = self.user(stored.from)
        {
            stored.from_name = sender.name.clone();
        }
        if stored.to_name.is_empty()
            && let Some(target) = self.target_name(stored.to)
        {
            stored.to_name = target.into();
        }
    }

    /// What format 3 did not say is said now: members count as having joined at `lsn`, and files as sent at `now`, in
    /// milliseconds since 1970, UTC.
    pub fn take_over(&mut self, lsn: Lsn, now: u64) {
        self.groups.values_mut().for_each(|group| group.joined.fill(lsn));
        self.files.values_mut().filter(|stored| stored.at == 0).for_each(|stored| stored.at = now);
    }

    /// Gives no file a number up to `highest` any more.
    pub fn skip_files_to(&mut self, highest: Option<FileId>) {
        let next = highest.map_or(0, |highest| highest.0.saturating_add(1));
        self.files_next = self.files_next.max(next);
    }

    /// Leaves numbers out, so that none comes again that was given and lost.
    pub fn skip_numbers(&mut self, skipped: Skipped) {
        let Skipped { users, groups, files } = skipped;
        self.set_users(self.users.len().saturating_add(users as usize));
        self.groups_next = self.groups_next.saturating_add(groups);
        self.files_next = self.files_next.saturating_add(files);
    }

    /// Leaves ids out in every mailbox, and in those that are made from now on, as many as may have been given in so many
    /// bytes of the journal: what is read behind damage may go to others than it went to, so that its ids would be those that
    /// other messages had.
    pub fn skip_ids(&mut self, bytes: u64) {
        // Ids in one mailbox must not be four billion apart.
        let messages = bytes.div_ceil(RECORD_BYTES_MIN as u64).min(1 << 28);
        self.ids_skipped = self.ids_skipped.max(messages);
        self.mailboxes.iter_mut().flatten().for_each(|mailbox| mailbox.skip_ids(messages));
    }
}
