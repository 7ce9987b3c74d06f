//! What a file in transfer is called, by whom and to whom it is sent, and how much all that are on their way in have taken
//! so far. [`crate::upload`] and [`crate::download`] are the two directions. No sockets and no disk here.

use std::collections::HashMap;

use crate::change::{Target, UserId};
use crate::files::TransferId;
use crate::upload::BLOCKS_OUT_MAX;

/// Decoded bytes that are handled at once: of an upload, what is written to the disk together, and of a download, what one
/// peer's write buffer holds. A multiple of three, so that every block of a download but the last encodes without padding.
pub const BLOCK_BYTES: usize = 48 * 1024;

/// What an upload is, but for its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Who sends it.
    pub from: UserId,
    /// To whom.
    pub to: Target,
    /// Its name.
    pub name: Box<str>,
}

/// Blocks of uploads that are on their way to the disk, whatever has become of their uploads.
#[derive(Debug, Default)]
pub(crate) struct BlocksOut {
    by_transfer: HashMap<TransferId, usize>,
    blocks: usize,
}

impl BlocksOut {
    /// One more.
    pub(crate) fn add(&mut self, transfer: TransferId) {
        *self.by_transfer.entry(transfer).or_default() += 1;
        self.blocks += 1;
    }

    /// One less, if it was one of these.
    pub(crate) fn remove(&mut self, transfer: TransferId) {
        if let Some(count) = self.by_transfer.get_mut(&transfer) {
            *count -= 1;
            self.blocks -= 1;
            if *count == 0 {
                self.by_transfer.remove(&transfer);
            }
        }
    }

    /// There are as many as so many uploads have at most.
    pub(crate) fn is_full(&self, uploads: usize) -> bool {
        self.blocks >= uploads.saturating_mul(BLOCKS_OUT_MAX + 1)
    }
}

/// The decoded bytes of uploads that are not stored yet. They count like stored ones, so that many uploads at once keep the
/// same bounds as one after the other.
#[derive(Debug, Default)]
pub struct Incoming {
    by_user: HashMap<UserId, u64>,
    bytes: u64,
}

impl Incoming {
    /// Of all users.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Of one user.
    #[must_use]
    pub fn of(&self, user: UserId) -> u64 {
        self.by_user.get(&user).copied().unwrap_or(0)
    }

    /// Counts more of an upload.
    pub fn add(&mut self, user: UserId, bytes: u64) {
        if bytes > 0 {
            *self.by_user.entry(user).or_default() += bytes;
            self.bytes += bytes;
        }
    }

    /// Counts an upload no more: it is stored, or nothing became of it.
    pub fn remove(&mut self, user: UserId, bytes: u64) {
        self.bytes -= bytes;
        if let Some(of_user) = self.by_user.get_mut(&user) {
            *of_user -= bytes;
            if *of_user == 0 {
                self.by_user.remove(&user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_counted_by_user_and_in_all() {
        let (one, other) = (UserId(1), UserId(2));
        let mut incoming = Incoming::default();
        incoming.add(one, 5);
        incoming.add(one, 7);
        incoming.add(other, 1);
        incoming.add(other, 0);
        assert_eq!((incoming.of(one), incoming.of(other), incoming.bytes()), (12, 1, 13));
        incoming.remove(one, 12);
        incoming.remove(other, 0);
        assert_eq!((incoming.of(one), incoming.of(other), incoming.bytes()), (0, 1, 1));
        incoming.remove(other, 1);
        assert!(incoming.by_user.is_empty(), "who uploads nothing costs nothing");
    }
}
