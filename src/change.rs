//! What can change in the state, and its encoding in a journal record.
//!
//! A [`Change`] borrows its texts, from the request that asks for it or from the record that holds it. Encoded, it is
//! one byte for its kind and then its fields in the order of their declaration, as `field` writes them. A new
//! kind gets a new number; a number never changes its meaning. Kinds 4, 5, 12, 14, 15 and 16 are of format 3: they are read,
//! with nothing in the fields that format 4 has added, and not written any more.

use std::fmt;
use std::hash::{Hash, Hasher};

use crate::field::{self, Fields, Put};
use crate::record;

/// A position in the order of changes ("log sequence number").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The least position behind this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a record stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Its position.
    pub lsn: Lsn,
    /// Its size, with its header.
    pub bytes: u32,
}

impl Place {
    /// Where the next one stands.
    #[must_use]
    pub fn end(self) -> Lsn {
        Lsn(self.lsn.0 + u64::from(self.bytes))
    }
}

/// A user; numbers are never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(pub u32);

/// A group; numbers are never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// A stored file, and its name on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// Where the bytes of a stored file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// In a file of their own, with this CRC-32C. Those that were stored before sums were kept have none.
    Apart {
        /// The sum.
        sum: Option<u32>,
    },
    /// In this record of the journal.
    Journal(Place),
}

/// What is kept of a token: the first half of its SHA-256.
// Aligned, it is moved in whole words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(align(8))]
pub struct SessionId(pub [u8; 16]);

impl Hash for SessionId {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        // Its length is always the same, so it is left out.
        hasher.write(&self.0);
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(…)")
    }
}

/// To whom a message or a file goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// One user.
    User(UserId),
    /// Every member of a group but the sender.
    Group(GroupId),
}

/// One step of the state. Times are milliseconds since 1970 in UTC; `elapsed_ms` counts what servers have seen pass, whatever
/// the clock said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Change<'a> {
    UserAdded {
        user: UserId,
        name: &'a str,
        /// A PHC string.
        password_hash: &'a str,
    },
    /// Ends every session of the user but the one to keep.
    PasswordChanged {
        user: UserId,
        password_hash: &'a str,
        keep: Option<SessionId>,
    },
    UserRemoved {
        user: UserId,
    },
    SessionOpened {
        session: SessionId,
        user: UserId,
        at: u64,
        elapsed_ms: u64,
    },
    SessionUsed {
        session: SessionId,
        at: u64,
        elapsed_ms: u64,
    },
    SessionClosed {
        session: SessionId,
    },
    GroupCreated {
        group: GroupId,
        name: &'a str,
        owner: UserId,
        /// A PHC string.
        secret_hash: Option<&'a str>,
    },
    MemberJoined {
        group: GroupId,
        user: UserId,
    },
    /// The next longest member becomes the owner if it was the owner; the group ends with its last member.
    MemberLeft {
        group: GroupId,
        user: UserId,
    },
    /// The names are those of the time, so that the record alone is enough to show the message.
    MessageSent {
        from: UserId,
        to: Target,
        at: u64,
        from_name: &'a str,
        to_name: &'a str,
        text: &'a str,
    },
    /// The messages of the user's mailbox from the first to the last, by when they were sent, were handed over.
    Delivered {
        user: UserId,
        first: Lsn,
        last: Lsn,
    },
    /// Replaces the file of this name from this sender to this target. Its bytes are in a file of their own.
    FileStored {
        file: FileId,
        from: UserId,
        to: Target,
        at: u64,
        bytes: u64,
        name: &'a str,
        /// The CRC-32C of its bytes. Those that were stored before sums were kept have none.
        sum: Option<u32>,
    },
    /// The user's list no longer has this name under this party.
    FileDropped {
        user: UserId,
        party: &'a str,
        name: &'a str,
    },
    /// A message that waits in these mailboxes is written here again, so that the segment that it stood in can go.
    MessageMoved {
        /// Where it stood when it was sent.
        sent: Lsn,
        /// Format 3 did not say.
        from: Option<UserId>,
        to: Target,
        at: u64,
        from_name: &'a str,
        to_name: &'a str,
        text: &'a str,
        holders: Holders<'a>,
    },
    /// The same as [`Change::FileStored`] for a file whose bytes are kept here.
    FileSent {
        file: FileId,
        from: UserId,
        to: Target,
        at: u64,
        name: &'a str,
        content: &'a [u8],
    },
    /// A file whose bytes are kept in the journal is written here again, so that the segment that it stood in can go.
    FileMoved {
        file: FileId,
        content: &'a [u8],
    },
    /// The bytes of a file are not there any more, so nobody lists it.
    FileLost {
        file: FileId,
    },
    /// So long has a server run on this state, in all. It is written down now and then, and grows with what was missed.
    TimePassed {
        elapsed_ms: u64,
    },
}

/// Whose mailboxes one message waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holders<'a>(&'a [u8]);

impl<'a> Holders<'a> {
    const ITEM_BYTES: usize = 4;

    /// Holders from what [`Self::pack`] made.
    #[must_use]
    pub fn new(packed: &'a [u8]) -> Self {
        Self(packed)
    }

    /// Appends one more to `packed`.
    pub fn pack(packed: &mut Vec<u8>, user: UserId) {
        user.put(packed);
    }

    /// How many they are.
    #[must_use]
    pub fn count(self) -> usize {
        self.0.len() / Self::ITEM_BYTES
    }

    /// Each user.
    pub fn iter(self) -> impl Iterator<Item = UserId> + use<'a> {
        self.0.chunks_exact(Self::ITEM_BYTES).filter_map(|bytes| Fields(bytes).take())
    }
}

/// A message as its record shows it. Its texts are UTF-8, which was made sure of before they were written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Milliseconds since 1970, UTC.
    pub at: u64,
    /// The sender's name at the time.
    pub from: &'a [u8],
    /// The name of the user or group that it was sent to, at the time.
    pub to: &'a [u8],
    /// It was sent to a group.
    pub is_to_group: bool,
    /// What was said.
    pub text: &'a [u8],
}

impl<'a> Message<'a> {
    /// Reads the message that an encoded change sends or moves, if it is such a one.
    #[must_use]
    pub fn decode(encoded: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = encoded.split_first()?;
        let mut fields = Fields(rest);
        // What stands before the target.
        let head_bytes = match kind {
            10 => 4,
            14 => 8,
            21 if rest.get(8) == Some(&0) => 8 + 1,
            21 => 8 + 1 + 4,
            _ => return None,
        };
        fields.bytes(head_bytes)?;
        let is_to_group = matches!(fields.take()?, Target::Group(_));
        let at = fields.take()?;
        Some(Self { at, from: fields.text()?, to: fields.text()?, is_to_group, text: fields.text()? })
    }
}

/// The size of the record of a message that is sent.
#[must_use]
pub fn message_bytes(from_name: &str, to_name: &str, text: &str) -> usize {
    const FIXED_BYTES: usize = 1 + 4 + 5 + 8;
    let texts = field::text_bytes(from_name) + field::text_bytes(to_name) + field::text_bytes(text);
    record::record_bytes(FIXED_BYTES + texts)
}

impl<'a> Change<'a> {
    /// The bytes of a file that are kept in it.
    #[must_use]
    pub fn content(&self) -> Option<&'a [u8]> {
        match *self {
            Self::FileSent { content, .. } | Self::FileMoved { content, .. } => Some(content),
            _ => None,
        }
    }

    /// Appends the encoded change to `out`.
    #[inline]
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::UserAdded { user, name, password_hash } => {
                out.push(1);
                user.0.put(out);
                name.put(out);
                password_hash.put(out);
            }
            Self::PasswordChanged { user, password_hash, keep } => {
                out.push(2);
                user.0.put(out);
                password_hash.put(out);
                keep.put(out);
            }
            Self::UserRemoved { user } => {
                out.push(3);
                user.0.put(out);
            }
            Self::SessionOpened { session, user, at, elapsed_ms } => {
                out.push(19);
                session.put(out);
                user.0.put(out);
                at.put(out);
                elapsed_ms.put(out);
            }
            Self::SessionUsed { session, at, elapsed_ms } => {
                out.push(20);
                session.put(out);
                at.put(out);
                elapsed_ms.put(out);
            }
            Self::SessionClosed { session } => {
                out.push(6);
                session.put(out);
            }
            Self::GroupCreated { group, name, owner, secret_hash } => {
                out.push(7);
                group.0.put(out);
                name.put(out);
                owner.0.put(out);
                secret_hash.put(out);
            }
            Self::MemberJoined { group, user } => {
                out.push(8);
                group.0.put(out);
                user.0.put(out);
            }
            Self::MemberLeft { group, user } => {
                out.push(9);
                group.0.put(out);
                user.0.put(out);
            }
            Self::MessageSent { from, to, at, from_name, to_name, text } => {
                let mut head = [0; 1 + 4 + 5 + 8];
                let (is_group, to) = match to {
                    Target::User(user) => (0, user.0),
                    Target::Group(group) => (1, group.0),
                };
                head[0] = 10;
                head[1..5].copy_from_slice(&from.0.to_le_bytes());
                head[5] = is_group;
                head[6..10].copy_from_slice(&to.to_le_bytes());
                head[10..].copy_from_slice(&at.to_le_bytes());
                // One field at a time takes longer than all else that is done to write it down, and no change is so frequent.
                out.extend_from_slice(&head);
                from_name.put(out);
                to_name.put(out);
                text.put(out);
            }
            Self::Delivered { user, first, last } => {
                out.push(11);
                user.0.put(out);
                first.put(out);
                last.put(out);
            }
            Self::FileStored { file, from, to, at, bytes, name, sum } => {
                out.push(22);
                file.0.put(out);
                from.0.put(out);
                to.put(out);
                at.put(out);
                bytes.put(out);
                name.put(out);
                sum.put(out);
            }
            Self::FileDropped { user, party, name } => {
                out.push(13);
                user.0.put(out);
                party.put(out);
                name.put(out);
            }
            Self::MessageMoved { sent, from, to, at, from_name, to_name, text, holders } => {
                out.push(21);
                sent.put(out);
                from.put(out);
                to.put(out);
                at.put(out);
                from_name.put(out);
                to_name.put(out);
                text.put(out);
                u32::try_from(holders.count()).unwrap_or(u32::MAX).put(out);
                out.extend_from_slice(holders.0);
            }
            Self::FileSent { file, from, to, at, name, content } => {
                out.push(23);
                file.put(out);
                from.put(out);
                to.put(out);
                at.put(out);
                name.put(out);
                content.put(out);
            }
            Self::FileMoved { file, content } => {
                out.push(17);
                file.put(out);
                content.put(out);
            }
            Self::FileLost { file } => {
                out.push(18);
                file.put(out);
            }
            Self::TimePassed { elapsed_ms } => {
                out.push(24);
                elapsed_ms.put(out);
            }
        }
    }

    /// Reads an encoded change. Nothing may be missing and nothing left over.
    #[must_use]
    pub fn decode(encoded: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = encoded.split_first()?;
        let mut fields = Fields(rest);
        let change = match kind {
            1 => Self::UserAdded { user: fields.take()?, name: fields.take()?, password_hash: fields.take()? },
            2 => Self::PasswordChanged { user: fields.take()?, password_hash: fields.take()?, keep: fields.take()? },
            3 => Self::UserRemoved { user: fields.take()? },
            4 | 19 => Self::SessionOpened {
                session: fields.take()?,
                user: fields.take()?,
                at: fields.take()?,
                elapsed_ms: if kind == 19 { fields.take()? } else { 0 },
            },
            5 | 20 => Self::SessionUsed {
                session: fields.take()?,
                at: fields.take()?,
                elapsed_ms: if kind == 20 { fields.take()? } else { 0 },
            },
            6 => Self::SessionClosed { session: fields.take()? },
            7 => Self::GroupCreated {
                group: fields.take()?,
                name: fields.take()?,
                owner: fields.take()?,
                secret_hash: fields.take()?,
            },
            8 => Self::MemberJoined { group: fields.take()?, user: fields.take()? },
            9 => Self::MemberLeft { group: fields.take()?, user: fields.take()? },
            10 => Self::MessageSent {
                from: fields.take()?,
                to: fields.take()?,
                at: fields.take()?,
                from_name: fields.take()?,
                to_name: fields.take()?,
                text: fields.take()?,
            },
            11 => Self::Delivered { user: fields.take()?, first: fields.take()?, last: fields.take()? },
            12 | 15 | 22 => Self::FileStored {
                file: fields.take()?,
                from: fields.take()?,
                to: fields.take()?,
                at: if kind == 22 { fields.take()? } else { 0 },
                bytes: fields.take()?,
                name: fields.take()?,
                sum: match kind {
                    12 => None,
                    15 => Some(fields.take()?),
                    _ => fields.take()?,
                },
            },
            13 => Self::FileDropped { user: fields.take()?, party: fields.take()?, name: fields.take()? },
            14 | 21 => Self::MessageMoved {
                sent: fields.take()?,
                from: if kind == 21 { fields.take()? } else { None },
                to: fields.take()?,
                at: fields.take()?,
                from_name: fields.take()?,
                to_name: fields.take()?,
                text: fields.take()?,
                holders: {
                    let count = usize::try_from(fields.take::<u32>()?).ok()?;
                    Holders(fields.bytes(count.checked_mul(Holders::ITEM_BYTES)?)?)
                },
            },
            16 | 23 => Self::FileSent {
                file: fields.take()?,
                from: fields.take()?,
                to: fields.take()?,
                at: if kind == 23 { fields.take()? } else { 0 },
                name: fields.take()?,
                content: fields.take()?,
            },
            17 => Self::FileMoved { file: fields.take()?, content: fields.take()? },
            18 => Self::FileLost { file: fields.take()? },
            24 => Self::TimePassed { elapsed_ms: fields.take()? },
            _ => return None,
        };
        fields.0.is_empty().then_some(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Read, and written otherwise.
    const KINDS_OF_FORMAT_3: [u8; 6] = [4, 5, 12, 14, 15, 16];

    /// One of each kind, made from a few numbers and a text.
    fn one_of_each<'a>(a: u32, b: u64, text: &'a str, session: Option<SessionId>) -> Vec<Change<'a>> {
        let user = UserId(a);
        let id = session.unwrap_or(SessionId([7; 16]));
        let group = GroupId(a ^ 5);
        vec![
            Change::UserAdded { user, name: text, password_hash: "$" },
            Change::PasswordChanged { user, password_hash: text, keep: session },
            Change::UserRemoved { user },
            Change::SessionOpened { session: id, user, at: b, elapsed_ms: b / 3 },
            Change::SessionUsed { session: id, at: b, elapsed_ms: b / 3 },
            Change::SessionClosed { session: id },
            Change::GroupCreated { group, name: text, owner: user, secret_hash: session.map(|_| text) },
            Change::MemberJoined { group, user },
            Change::MemberLeft { group, user },
            Change::MessageSent { from: user, to: Target::Group(group), at: b, from_name: "a", to_name: "", text },
            Change::MessageSent { from: user, to: Target::User(user), at: b, from_name: text, to_name: text, text },
            Change::MessageMoved {
                sent: Lsn(b),
                from: session.map(|_| user),
                to: Target::User(user),
                at: b,
                from_name: text,
                to_name: "b",
                text,
                holders: Holders(&[7; 36]),
            },
            Change::Delivered { user, first: Lsn(b), last: Lsn(b / 2) },
            Change::FileStored {
                file: FileId(b),
                from: user,
                to: Target::User(user),
                at: b / 7,
                bytes: b,
                name: text,
                sum: session.map(|_| a),
            },
            Change::FileSent {
                file: FileId(b),
                from: user,
                to: Target::Group(group),
                at: b / 7,
                name: text,
                content: text.as_bytes(),
            },
            Change::FileMoved { file: FileId(b), content: text.as_bytes() },
            Change::FileLost { file: FileId(b) },
            Change::TimePassed { elapsed_ms: b },
            Change::FileDropped { user, party: text, name: text },
        ]
    }

    fn message_of<'a>(change: &Change<'a>) -> Option<Message<'a>> {
        match *change {
            Change::MessageSent { to, at, from_name, to_name, text, .. }
            | Change::MessageMoved { to, at, from_name, to_name, text, .. } => {
                let [from, to_name, text] = [from_name, to_name, text].map(str::as_bytes);
                Some(Message { at, from, to: to_name, is_to_group: matches!(to, Target::Group(_)), text })
            }
            _ => None,
        }
    }

    proptest! {
        #[test]
        fn a_change_is_read_as_it_was_written(a: u32, b: u64, text in "(?s).{0,40}|.{80,120}", session: Option<[u8; 16]>) {
            for change in one_of_each(a, b, &text, session.map(SessionId)) {
                let mut encoded = Vec::new();
                change.encode(&mut encoded);
                if let Change::MessageSent { from_name, to_name, text, .. } = change {
                    prop_assert_eq!(record::record_bytes(encoded.len()), message_bytes(from_name, to_name, text));
                }
                prop_assert_eq!(Change::decode(&encoded), Some(change));
                prop_assert_eq!(Message::decode(&encoded), message_of(&change));
                for cut in 0..encoded.len() {
                    prop_assert_eq!(Change::decode(&encoded[..cut]), None);
                }
                encoded.push(0);
                prop_assert_eq!(Change::decode(&encoded), None);
            }
        }

        #[test]
        fn any_bytes_decode_to_a_change_or_to_nothing(bytes: Vec<u8>) {
            if let Some(change) = Change::decode(&bytes) {
                let mut encoded = Vec::new();
                change.encode(&mut encoded);
                prop_assert_eq!(Change::decode(&encoded), Some(change));
                prop_assert!(encoded == bytes || KINDS_OF_FORMAT_3.contains(&bytes[0]));
            }
        }
    }
}
