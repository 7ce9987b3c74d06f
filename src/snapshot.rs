//! What a checkpoint holds: the whole state but for the texts of messages, in items that build it up again.

use std::borrow::Cow;

use crate::change::{FileId, GroupId, Kept, Lsn, Place, SessionId, Target, UserId};
use crate::field::{Fields, Put, Take};
use crate::mailbox::Entry;

/// Mailbox entries in one item at most.
pub const ENTRIES_MAX: usize = 4096;

/// A piece of the state. An item comes behind those that it names: counters, users, and then the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Item<'a> {
    /// How many users there ever were, and the next numbers of groups and files.
    Counters {
        users: u32,
        groups: u32,
        files: u64,
    },
    User {
        user: UserId,
        name: &'a str,
        password_hash: &'a str,
        last_id: u64,
        changed: Lsn,
    },
    Session {
        session: SessionId,
        user: UserId,
        used: u64,
    },
    /// The members in the order in which they came.
    Group {
        group: GroupId,
        name: &'a str,
        owner: UserId,
        secret_hash: Option<&'a str>,
        members: Vec<UserId>,
    },
    File {
        file: FileId,
        from: UserId,
        to: Target,
        name: &'a str,
        bytes: u64,
        lsn: Lsn,
        /// The next of its name from the same sender to the same target replaces it.
        is_current: bool,
        holders: Vec<UserId>,
        kept: Kept,
    },
    /// The files that a user lists under a party and a name.
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
    /// before it.
    End {
        items: u64,
        until: Option<Lsn>,
    },
}

impl<'a> Item<'a> {
    /// Appends the encoded item to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Counters { users, groups, files } => put(out, 1, &[users, groups, files]),
            Self::User { user, name, password_hash, last_id, changed } => {
                put(out, 2, &[user, name, password_hash, last_id, changed]);
            }
            Self::Session { session, user, used } => put(out, 3, &[session, user, used]),
            Self::Group { group, name, owner, secret_hash, members } => {
                put(out, 4, &[group, name, owner, secret_hash, &members.as_slice()]);
            }
            Self::File { file, from, to, name, bytes, lsn, is_current, holders, kept } => {
                let kind = match kept {
                    Kept::Apart { sum: None } => 5,
                    Kept::Apart { sum: Some(_) } => 9,
                    Kept::Journal(_) => 10,
                };
                put(out, kind, &[file, from, to, name, bytes, lsn, is_current, &holders.as_slice()]);
                match kept {
                    Kept::Apart { sum: None } => {}
                    Kept::Apart { sum: Some(sum) } => sum.put(out),
                    Kept::Journal(Place { lsn, bytes }) => {
                        lsn.put(out);
                        bytes.put(out);
                    }
                }
            }
            Self::Listing { user, party, name, files } => put(out, 6, &[user, party, name, &files.as_slice()]),
            Self::Entries { user, entries } => put(out, 7, &[user, &&**entries]),
            Self::End { items, until: None } => put(out, 8, &[items]),
            Self::End { items, until: Some(until) } => put(out, 11, &[items, until]),
        }
    }

    /// Reads an encoded item. Nothing may be missing and nothing left over.
    #[must_use]
    pub fn decode(encoded: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(encoded);
        let kind = fields.take::<u8>()?;
        let item = match kind {
            1 => Self::Counters { users: fields.take()?, groups: fields.take()?, files: fields.take()? },
            2 => Self::User {
                user: fields.take()?,
                name: fields.take()?,
                password_hash: fields.take()?,
                last_id: fields.take()?,
                changed: fields.take()?,
            },
            3 => Self::Session { session: fields.take()?, user: fields.take()?, used: fields.take()? },
            4 => Self::Group {
                group: fields.take()?,
                name: fields.take()?,
                owner: fields.take()?,
                secret_hash: fields.take()?,
                members: fields.take()?,
            },
            5 | 9 | 10 => Self::File {
                file: fields.take()?,
                from: fields.take()?,
                to: fields.take()?,
                name: fields.take()?,
                bytes: fields.take()?,
                lsn: fields.take()?,
                is_current: fields.take()?,
                holders: fields.take()?,
                kept: match kind {
                    5 => Kept::Apart { sum: None },
                    9 => Kept::Apart { sum: Some(fields.take()?) },
                    _ => Kept::Journal(Place { lsn: fields.take()?, bytes: fields.take()? }),
                },
            },
            6 => Self::Listing {
                user: fields.take()?,
                party: fields.take()?,
                name: fields.take()?,
                files: fields.take()?,
            },
            7 => Self::Entries { user: fields.take()?, entries: Cow::Owned(fields.take()?) },
            8 => Self::End { items: fields.take()?, until: None },
            11 => Self::End { items: fields.take()?, until: Some(fields.take()?) },
            _ => return None,
        };
        fields.0.is_empty().then_some(item)
    }
}

fn put(out: &mut Vec<u8>, kind: u8, fields: &[&dyn Put]) {
    out.push(kind);
    for field in fields {
        field.put(out);
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
            let place = Place { lsn: Lsn(b), bytes: (a >> 5) | 1 };
            let entries = ids.iter().map(|id| Entry::new(u64::from(*id), place, *id as usize));
            let items = [
                Item::Counters { users: a, groups: a, files: b },
                Item::User { user, name, password_hash: name, last_id: b, changed: Lsn(b) },
                Item::Session { session: SessionId([7; 16]), user, used: b },
                Item::Group {
                    group: GroupId(a), name, owner: user, secret_hash: secret.then_some(name), members: users.clone(),
                },
                Item::File {
                    file: FileId(b), from: user, to, name, bytes: b, lsn: Lsn(b), is_current: secret, holders: users,
                    kept: if secret { Kept::Journal(place) } else { Kept::Apart { sum: (a % 2 == 0).then_some(a) } },
                },
                Item::Listing { user, party: name, name, files: ids.iter().map(|id| FileId(u64::from(*id))).collect() },
                Item::Entries { user, entries: entries.collect() },
                Item::End { items: b, until: secret.then_some(Lsn(b)) },
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
                prop_assert_eq!(encoded, bytes);
            }
        }
    }
}
