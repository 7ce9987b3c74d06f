//! What can change in the state, and its encoding in a journal record.
//!
//! A [`Change`] borrows its texts, from the request that asks for it or from the record that holds it. Encoded, it is
//! one byte for its kind and then its fields in the order of their declaration: integers little endian, a text as its
//! length in four bytes and its UTF-8, an optional field as one byte (0 or 1) before it. A new kind gets a new number;
//! a number never changes its meaning.

use std::fmt;
use std::str;

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

/// A user; numbers are never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(pub u32);

/// A group; numbers are never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// A stored file, and its name on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// What is kept of a token: the first half of its SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; 16]);

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

/// One step of the state. Times are milliseconds since 1970 in UTC.
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
    },
    SessionUsed {
        session: SessionId,
        at: u64,
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
    MessageSent {
        from: UserId,
        to: Target,
        at: u64,
        text: &'a str,
    },
    /// The messages of the user's mailbox from the first to the last, by when they were sent, were handed over.
    Delivered {
        user: UserId,
        first: Lsn,
        last: Lsn,
    },
    /// Replaces the file of this name from this sender to this target.
    FileStored {
        file: FileId,
        from: UserId,
        to: Target,
        bytes: u64,
        name: &'a str,
    },
    /// The user's list no longer has this name under this party.
    FileDropped {
        user: UserId,
        party: &'a str,
        name: &'a str,
    },
}

impl<'a> Change<'a> {
    /// Appends the encoded change to `out`.
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
            Self::SessionOpened { session, user, at } => {
                out.push(4);
                session.put(out);
                user.0.put(out);
                at.put(out);
            }
            Self::SessionUsed { session, at } => {
                out.push(5);
                session.put(out);
                at.put(out);
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
            Self::MessageSent { from, to, at, text } => {
                out.push(10);
                from.0.put(out);
                to.put(out);
                at.put(out);
                text.put(out);
            }
            Self::Delivered { user, first, last } => {
                out.push(11);
                user.0.put(out);
                first.0.put(out);
                last.0.put(out);
            }
            Self::FileStored { file, from, to, bytes, name } => {
                out.push(12);
                file.0.put(out);
                from.0.put(out);
                to.put(out);
                bytes.put(out);
                name.put(out);
            }
            Self::FileDropped { user, party, name } => {
                out.push(13);
                user.0.put(out);
                party.put(out);
                name.put(out);
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
            4 => Self::SessionOpened { session: fields.take()?, user: fields.take()?, at: fields.take()? },
            5 => Self::SessionUsed { session: fields.take()?, at: fields.take()? },
            6 => Self::SessionClosed { session: fields.take()? },
            7 => Self::GroupCreated {
                group: fields.take()?,
                name: fields.take()?,
                owner: fields.take()?,
                secret_hash: fields.take()?,
            },
            8 => Self::MemberJoined { group: fields.take()?, user: fields.take()? },
            9 => Self::MemberLeft { group: fields.take()?, user: fields.take()? },
            10 => {
                Self::MessageSent { from: fields.take()?, to: fields.take()?, at: fields.take()?, text: fields.take()? }
            }
            11 => Self::Delivered { user: fields.take()?, first: fields.take()?, last: fields.take()? },
            12 => Self::FileStored {
                file: fields.take()?,
                from: fields.take()?,
                to: fields.take()?,
                bytes: fields.take()?,
                name: fields.take()?,
            },
            13 => Self::FileDropped { user: fields.take()?, party: fields.take()?, name: fields.take()? },
            _ => return None,
        };
        fields.0.is_empty().then_some(change)
    }
}

/// A field that knows how to append itself.
trait Put {
    fn put(&self, out: &mut Vec<u8>);
}

impl Put for u32 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }
}

impl Put for u64 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }
}

impl Put for &str {
    fn put(&self, out: &mut Vec<u8>) {
        // Every text is bounded far below 4 GiB before it gets here.
        u32::try_from(self.len()).unwrap_or(u32::MAX).put(out);
        out.extend_from_slice(self.as_bytes());
    }
}

impl Put for SessionId {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
}

impl Put for Target {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::User(user) => {
                out.push(0);
                user.0.put(out);
            }
            Self::Group(group) => {
                out.push(1);
                group.0.put(out);
            }
        }
    }
}

impl<T: Put> Put for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            None => out.push(0),
            Some(field) => {
                out.push(1);
                field.put(out);
            }
        }
    }
}

/// What is left of an encoded change.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<T: Take<'a>>(&mut self) -> Option<T> {
        T::take(self)
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }
}

/// A field that knows how to read itself.
trait Take<'a>: Sized {
    fn take(fields: &mut Fields<'a>) -> Option<Self>;
}

impl Take<'_> for u32 {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self::from_le_bytes(fields.array()?))
    }
}

impl Take<'_> for u64 {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self::from_le_bytes(fields.array()?))
    }
}

impl Take<'_> for Lsn {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        fields.take().map(Self)
    }
}

impl Take<'_> for UserId {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        fields.take().map(Self)
    }
}

impl Take<'_> for GroupId {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        fields.take().map(Self)
    }
}

impl Take<'_> for FileId {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        fields.take().map(Self)
    }
}

impl Take<'_> for SessionId {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        fields.array().map(Self)
    }
}

impl<'a> Take<'a> for &'a str {
    fn take(fields: &mut Fields<'a>) -> Option<Self> {
        let length: u32 = fields.take()?;
        str::from_utf8(fields.bytes(usize::try_from(length).ok()?)?).ok()
    }
}

impl Take<'_> for Target {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        match fields.array()? {
            [0] => fields.take().map(Self::User),
            [1] => fields.take().map(Self::Group),
            _ => None,
        }
    }
}

impl<'a, T: Take<'a>> Take<'a> for Option<T> {
    fn take(fields: &mut Fields<'a>) -> Option<Self> {
        match fields.array()? {
            [0] => Some(None),
            [1] => T::take(fields).map(Some),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One of each kind, made from a few numbers and a text.
    fn one_of_each<'a>(a: u32, b: u64, text: &'a str, session: Option<SessionId>) -> Vec<Change<'a>> {
        let user = UserId(a);
        let id = session.unwrap_or(SessionId([7; 16]));
        let group = GroupId(a ^ 5);
        vec![
            Change::UserAdded { user, name: text, password_hash: "$" },
            Change::PasswordChanged { user, password_hash: text, keep: session },
            Change::UserRemoved { user },
            Change::SessionOpened { session: id, user, at: b },
            Change::SessionUsed { session: id, at: b },
            Change::SessionClosed { session: id },
            Change::GroupCreated { group, name: text, owner: user, secret_hash: session.map(|_| text) },
            Change::MemberJoined { group, user },
            Change::MemberLeft { group, user },
            Change::MessageSent { from: user, to: Target::Group(group), at: b, text },
            Change::MessageSent { from: user, to: Target::User(user), at: b, text },
            Change::Delivered { user, first: Lsn(b), last: Lsn(b / 2) },
            Change::FileStored { file: FileId(b), from: user, to: Target::User(user), bytes: b, name: text },
            Change::FileDropped { user, party: text, name: text },
        ]
    }

    proptest! {
        #[test]
        fn a_change_is_read_as_it_was_written(a: u32, b: u64, text in "(?s).{0,40}", session: Option<[u8; 16]>) {
            for change in one_of_each(a, b, &text, session.map(SessionId)) {
                let mut encoded = Vec::new();
                change.encode(&mut encoded);
                prop_assert_eq!(Change::decode(&encoded), Some(change));
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
                prop_assert_eq!(encoded, bytes);
            }
        }
    }
}
