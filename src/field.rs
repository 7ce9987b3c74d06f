//! Fields of records: how a number, a text or an id is written and read, in the journal and in a checkpoint alike.
//!
//! Integers are little endian. A text is its length and its UTF-8; the length is one byte, or the byte 255 and four more
//! where it is 255 or above. An optional field is one byte (0 or 1) before it, a list is its count in four bytes before
//! its items. There is one way to write a value, and no other is read.

use std::str;

use crate::change::{FileId, GroupId, Lsn, SessionId, Target, UserId};

/// Stands for a text's length that takes four more bytes.
const LONG: u8 = 255;

/// A field that knows how to append itself.
pub(crate) trait Put {
    fn put(&self, out: &mut Vec<u8>);

    fn put_all(items: &[Self], out: &mut Vec<u8>)
    where
        Self: Sized,
    {
        for item in items {
            item.put(out);
        }
    }
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

impl Put for u8 {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }

    fn put_all(items: &[Self], out: &mut Vec<u8>) {
        out.extend_from_slice(items);
    }
}

impl Put for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Put for Lsn {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
}

impl Put for UserId {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
}

impl Put for GroupId {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
}

impl Put for FileId {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
}

impl Put for &str {
    // A message has three of them.
    #[inline(always)]
    fn put(&self, out: &mut Vec<u8>) {
        match u8::try_from(self.len()) {
            Ok(length) if length < LONG => out.push(length),
            _ => {
                out.push(LONG);
                count(self.len()).put(out);
            }
        }
        out.extend_from_slice(self.as_bytes());
    }
}

impl<T: Put> Put for &[T] {
    fn put(&self, out: &mut Vec<u8>) {
        count(self.len()).put(out);
        T::put_all(self, out);
    }
}

/// Every text and list is bounded far below 4 GiB before it gets here.
fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// How many bytes a text takes.
pub(crate) const fn text_bytes(text: &str) -> usize {
    let length = text.len();
    length + if length < LONG as usize { 1 } else { 5 }
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

/// What is left of an encoded record.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take<T: Take<'a>>(&mut self) -> Option<T> {
        T::take(self)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// The bytes of a text.
    #[inline]
    pub(crate) fn text(&mut self) -> Option<&'a [u8]> {
        let length = match self.take::<u8>()? {
            LONG => self.take::<u32>().filter(|length| *length >= u32::from(LONG))?,
            length => u32::from(length),
        };
        self.bytes(usize::try_from(length).ok()?)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }
}

/// A field that knows how to read itself.
pub(crate) trait Take<'a>: Sized {
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

impl<'a> Take<'a> for &'a [u8] {
    fn take(fields: &mut Fields<'a>) -> Option<Self> {
        let count = fields.take::<u32>()?;
        fields.bytes(usize::try_from(count).ok()?)
    }
}

impl Take<'_> for u8 {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        let [byte] = fields.array()?;
        Some(byte)
    }
}

impl Take<'_> for bool {
    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        match fields.array()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }
}

impl<'a> Take<'a> for &'a str {
    fn take(fields: &mut Fields<'a>) -> Option<Self> {
        str::from_utf8(fields.text()?).ok()
    }
}

impl<'a, T: Take<'a>> Take<'a> for Vec<T> {
    fn take(fields: &mut Fields<'a>) -> Option<Self> {
        // No memory is taken on the word of a count; what is not there ends it.
        (0..fields.take::<u32>()?).map(|_| fields.take()).collect()
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
