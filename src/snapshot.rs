//! What a checkpoint holds: the whole state but for the texts of messages, in items that build it up again.
//!
//! Groups and files may stand before the users that they name: what belongs together is put together when all are there.
//! Logins and parts of mailboxes stand behind their users. Kinds 1 to 6 and 8 to 11 are of format 3: they are read, and not
//! written any more.

use std::borrow::Cow;

use crate::change::{FileId, GroupId, Kept, Lsn, Place, SessionId, Target, UserId};
use crate::field::{Fields, Put, Take};
use crate::mailbox::Entry;

/// Mailbox entries in one item at most.
pub const ENTRIES_MAX: usize = 4096;

/// The numbers that never come again, and where in the journal they were so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// The checkpoint holds all that the journal says before this. Zero in one of format 3, which does not say.
    pub lsn: Lsn,
    /// The next number of a user.
    pub users: u32,
    /// The next number of a group.
    pub groups: u32,
    /// The next number of a file.
    pub files: u64,
    /// How long servers have run on this state.
    pub elapsed_ms: u64,
}

/// A member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub user: UserId,
    /// Where in the journal it says that it joined last.
    pub joined: Lsn,
}

/// A piece of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Item<'a> {
    /// The first item.
    Counters(Counters),
    User {
        user: UserId,
        name: &'a str,
        password_hash: &'a str,
        last_id: u64,
        /// Its mailbox, and `last_id`, hold all that the journal says before this.
        through: Lsn,
    },
    Session {
        session: SessionId,
        user: UserId,
        used: u64,
        elapsed_ms: u64,
    },
    /// The members in the order in which they came.
    Group {
        group: GroupId,
        name: &'a str,
        owner: UserId,
        secret_hash: Option<&'a str>,
        members: Vec<Member>,
    },
    /// A file, and with it the place that it has in the list of each holder: under the target's name in the sender's, and under
    /// the sender's name in the others'. In format 3 the names stand in [`Item::Listing`].
    File {
        file: FileId,
        from: UserId,
        to: Target,
        from_name: &'a str,
        to_name: &'a str,
        name: &'a str,
        bytes: u64,
        at: u64,
        lsn: Lsn,
        /// The next of its name from the same sender to the same target replaces it.
        is_current: bool,
        holders: Vec<UserId>,
        kept: Kept,
    },
    /// The files that a user lists under a party and a name: format 3.
    Listing {
        user: UserId,
        party: &'a str,
        name: &'a str,
        files: Vec<FileId>,
    },
    /// More of a user's mailbox.
    Entries {
        user: UserId,
        entries: Cow<'a, [Entry]>,
    },
    /// So many items came before, and none follows. What has gone from mailboxes had gone by `until`, and what had moved stands
    /// before it. The counters stand here once more, since they cannot be told from anything else; in format 3 they do not.
    End {
        items: u64,
        until: Option<Lsn>,
        counters: Option<Counters>,
    },
}

impl<'a> Item<'a> {
    /// Appends the encoded item to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Counters(counters) => put(out, 12, &[counters]),
            Self::User { user, name, password_hash, last_id, through } => {
                put(out, 17, &[user, name, password_hash, last_id, through]);
            }
            Self::Session { session, user, used, elapsed_ms } => put(out, 13, &[session, user, used, elapsed_ms]),
            Self::Group { group, name, owner, secret_hash, members } => {
                put(out, 14, &[group, name, owner, secret_hash, &members.as_slice()]);
            }
            Self::File { file, from, to, from_name, to_name, name, bytes, at, lsn, is_current, holders, kept } => {
                let holders = &holders.as_slice();
                put(out, 15, &[file, from, to, from_name, to_name, name, bytes, at, lsn, is_current, holders, kept]);
            }
            Self::Listing { user, party, name, files } => put(out, 6, &[user, party, name, &files.as_slice()]),
            Self::Entries { user, entries } => put(out, 7, &[user, &&**entries]),
            Self::End { items, until, counters } => put(out, 16, &[items, until, counters]),
        }
    }

    /// Reads an encoded item. Nothing may be missing and nothing left over.
    #[must_use]
    pub fn decode(encoded: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(encoded);
        let kind = fields.take::<u8>()?;
        let item = match kind {
            17 => Self::User {
                user: fields.take()?,
                name: fields.take()?,
                password_hash: fields.take()?,
                last_id: fields.take()?,
                through: fields.take()?,
            },
            6 => Self::Listing {
                user: fields.take()?,
                party: fields.take()?,
                name: fields.take()?,
                files: fields.take()?,
            },
            7 => Self::Entries { user: fields.take()?, entries: Cow::Owned(fields.take()?) },
            12 => Self::Counters(fields.take()?),
            13 => Self::Session {
                session: fields.take()?,
                user: fields.take()?,
                used: fields.take()?,
                elapsed_ms: fields.take()?,
            },
            14 => Self::Group {
                group: fields.take()?,
                name: fields.take()?,
                owner: fields.take()?,
                secret_hash: fields.take()?,
                members: fields.take()?,
            },
            15 => Self::File {
                file: fields.take()?,
                from: fields.take()?,
                to: fields.take()?,
                from_name: fields.take()?,
                to_name: fields.take()?,
                name: fields.take()?,
                bytes: fields.take()?,
                at: fields.take()?,
                lsn: fields.take()?,
                is_current: fields.take()?,
                holders: fields.take()?,
                kept: fields.take()?,
            },
            16 => Self::End { items: fields.take()?, until: fields.take()?, counters: fields.take()? },
            _ => Self::decode_format_3(kind, &mut fields)?,
        };
        fields.0.is_empty().then_some(item)
    }

    /// What format 3 wrote otherwise: what it did not say is zero, or empty.
    fn decode_format_3(kind: u8, fields: &mut Fields<'a>) -> Option<Self> {
        Some(match kind {
            1 => Self::Counters(Counters {
                users: fields.take()?,
                groups: fields.take()?,
                files: fields.take()?,
                ..Counters::default()
            }),
            2 => Self::User {
                user: fields.take()?,
                name: fields.take()?,
                password_hash: fields.take()?,
                last_id: fields.take()?,
                // It said where something last came or went.
                through: fields.take::<Lsn>()?.next(),
            },
            3 => {
                let (session, user, used) = (fields.take()?, fields.take()?, fields.take()?);
                Self::Session { session, user, used, elapsed_ms: 0 }
            }
            4 => {
                let (group, name, owner) = (fields.take()?, fields.take()?, fields.take()?);
                let (secret_hash, users) = (fields.take()?, fields.take::<Vec<UserId>>()?);
                let members = users.into_iter().map(|user| Member { user, joined: Lsn(0) }).collect();
                Self::Group { group, name, owner, secret_hash, members }
            }
            5 | 9 | 10 => Self::File {
                file: fields.take()?,
                from: fields.take()?,
                to: fields.take()?,
                from_name: "",
                to_name: "",
                name: fields.take()?,
                bytes: fields.take()?,
                at: 0,
                lsn: fields.take()?,
                is_current: fields.take()?,
                holders: fields.take()?,
                kept: match kind {
                    5 => Kept::Apart { sum: None },
                    9 => Kept::Apart { sum: Some(fields.take()?) },
                    _ => Kept::Journal(fields.take()?),
                },
            },
            8 => Self::End { items: fields.take()?, until: None, counters: None },
            11 => Self::End { items: fields.take()?, until: Some(fields.take()?), counters: None },
            _ => return None,
        })
    }
}

fn put(out: &mut Vec<u8>, kind: u8, fields: &[&dyn Put]) {
    out.push(kind);
    for field in fields {
        field.put(out);
    }
}

impl Put for Counters {
    fn put(&self, out: &mut Vec<u8>) {
        let Self { lsn, users, groups, files, elapsed_ms } = self;
        for field in [lsn as &dyn Put, users, groups, files, elapsed_ms] {
            field.put(out);
        }
    }
}

impl Take<'_> for Counters {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self {
            lsn: fields.take()?,
            users: fields.take()?,
            groups: fields.take()?,
            files: fields.take()?,
            elapsed_ms: fields.take()?,
        })
    }
}

impl Put for Member {
    fn put(&self, out: &mut Vec<u8>) {
        self.user.put(out);
        self.joined.put(out);
    }
}

impl Take<'_> for Member {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self { user: fields.take()?, joined: fields.take()? })
    }
}

impl Put for Place {
    fn put(&self, out: &mut Vec<u8>) {
        self.lsn.put(out);
        self.bytes.put(out);
    }
}

impl Take<'_> for Place {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self { lsn: fields.take()?, bytes: fields.take()? })
    }
}

impl Put for Kept {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Apart { sum } => {
                out.push(0);
                sum.put(out);
            }
            Self::Journal(place) => {
                out.push(1);
                place.put(out);
            }
        }
    }
}

impl Take<'_> for Kept {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        match fields.take::<u8>()? {
            0 => Some(Self::Apart { sum: fields.take()? }),
            1 => fields.take().map(Self::Journal),
            _ => None,
        }
    }
}

/// What an entry takes.
const ENTRY_BYTES: usize = 24;

fn encode_entry(entry: &Entry) -> [u8; ENTRY_BYTES] {
    let (sent, lsn, size, id) = entry.parts();
    let mut encoded = [0; ENTRY_BYTES];
    encoded[..8].copy_from_slice(&sent.0.to_le_bytes());
    encoded[8..16].copy_from_slice(&lsn.0.to_le_bytes());
    encoded[16..20].copy_from_slice(&size.to_le_bytes());
    encoded[20..].copy_from_slice(&id.to_le_bytes());
    encoded
}

impl Put for Entry {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&encode_entry(self));
    }

    /// Most of a checkpoint is this.
    fn put_all(entries: &[Self], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + entries.len() * ENTRY_BYTES, 0);
        for (place, entry) in out[start..].as_chunks_mut().0.iter_mut().zip(entries) {
            *place = encode_entry(entry);
        }
    }
}

impl Take<'_> for Entry {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Self::from_parts((fields.take()?, fields.take()?, fields.take()?, fields.take()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Place;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_item_is_read_as_it_was_written(a: u32, b: u64, text in "(?s).{0,20}|.{250,260}", ids: Vec<u32>, secret: bool) {
            let (user, to, name) = (UserId(a), Target::Group(GroupId(a)), text.as_str());
            let users: Vec<UserId> = ids.iter().copied().map(UserId).collect();
            let members = users.iter().map(|user| Member { user: *user, joined: Lsn(b) }).collect();
            let place = Place { lsn: Lsn(b), bytes: (a >> 5) | 1 };
            let entries = ids.iter().map(|id| Entry::new(u64::from(*id), place, *id as usize));
            let counters = Counters { lsn: Lsn(b), users: a, groups: a, files: b, elapsed_ms: b };
            let items = [
                Item::Counters(counters),
                Item::User { user, name, password_hash: name, last_id: b, through: Lsn(b) },
                Item::Session { session: SessionId([7; 16]), user, used: b, elapsed_ms: b / 3 },
                Item::Group { group: GroupId(a), name, owner: user, secret_hash: secret.then_some(name), members },
                Item::File {
                    file: FileId(b), from: user, to, from_name: name, to_name: "b", name, bytes: b, at: b, lsn: Lsn(b),
                    is_current: secret, holders: users,
                    kept: if secret { Kept::Journal(place) } else { Kept::Apart { sum: (a % 2 == 0).then_some(a) } },
                },
                Item::Listing { user, party: name, name, files: ids.iter().map(|id| FileId(u64::from(*id))).collect() },
                Item::Entries { user, entries: entries.collect() },
                Item::End { items: b, until: secret.then_some(Lsn(b)), counters: Some(counters) },
            ];
            for item in items {
                let mut encoded = Vec::new();
                item.encode(&mut encoded);
                prop_assert_eq!(Item::decode(&encoded), Some(item));
                for cut in 0..encoded.len() {
                    prop_assert_eq!(Item::decode(&encoded[..cut]), None);
                }
                encoded.push(0);
                prop_assert_eq!(Item::decode(&encoded), None);
            }
        }

        #[test]
        fn any_bytes_decode_to_an_item_or_to_nothing(bytes: Vec<u8>) {
            if let Some(item) = Item::decode(&bytes) {
                let mut encoded = Vec::new();
                item.encode(&mut encoded);
                prop_assert!(encoded == bytes || matches!(bytes[0], 1..=5 | 8..=11));
            }
        }
    }
}
