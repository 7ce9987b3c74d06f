//! What a file in transfer is called, by whom and to whom it is sent, and how much all that are on their way in have taken
//! so far. [`crate::upload`] and [`crate::download`] are the two directions. No sockets and no disk here.

use std::collections::HashMap;

use crate::change::{Target, UserId};
use crate::connection::ConnectionId;
use crate::files::TransferId;
use crate::limits::Limits;

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

/// Which way a file goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Upload,
    Download,
}

/// Files under way. One that is broken off while the files thread is at something for it has its place until that thread has
/// let go of it, so that those that are begun again and again do not leave more to it than there may be at once.
#[derive(Debug, Default)]
pub(crate) struct Transfers {
    last: u64,
    places: HashMap<TransferId, (Direction, UserId)>,
    /// Who waits for what becomes of one.
    waiting: HashMap<TransferId, ConnectionId>,
    uploads: usize,
    by_user: HashMap<UserId, OfUser>,
}

/// Those of one user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OfUser {
    uploads: usize,
    downloads: usize,
}

impl OfUser {
    fn count(&mut self, direction: Direction) -> &mut usize {
        match direction {
            Direction::Upload => &mut self.uploads,
            Direction::Download => &mut self.downloads,
        }
    }
}

impl Transfers {
    /// Begins one, if that is not one too many.
    pub(crate) fn begin(
        &mut self,
        direction: Direction,
        user: UserId,
        connection: ConnectionId,
        limits: &Limits,
    ) -> Option<TransferId> {
        let (under_way, most) = match direction {
            Direction::Upload => (self.uploads, limits.uploads_max),
            Direction::Download => (self.places.len() - self.uploads, limits.downloads_max),
        };
        let mut of_user = self.by_user.get(&user).copied().unwrap_or_default();
        let is_share_used = of_user.uploads + of_user.downloads >= limits.transfers_per_user_max;
        // However many places some users have, one who has none finds one, as long as there are more places than users.
        if is_share_used || *of_user.count(direction) >= most.saturating_sub(under_way) {
            return None;
        }
        *of_user.count(direction) += 1;
        self.by_user.insert(user, of_user);
        self.uploads += usize::from(direction == Direction::Upload);
        self.last += 1;
        let transfer = TransferId(self.last);
        self.places.insert(transfer, (direction, user));
        self.waiting.insert(transfer, connection);
        Some(transfer)
    }

    /// Who waits for it.
    pub(crate) fn waiting(&self, transfer: TransferId) -> Option<ConnectionId> {
        self.waiting.get(&transfer).copied()
    }

    /// Nobody waits for it any more.
    pub(crate) fn abandon(&mut self, transfer: TransferId) {
        self.waiting.remove(&transfer);
    }

    /// It is over, and its place is free. Says who waited for it.
    pub(crate) fn end(&mut self, transfer: TransferId) -> Option<ConnectionId> {
        if let Some((direction, user)) = self.places.remove(&transfer) {
            self.uploads -= usize::from(direction == Direction::Upload);
            if let Some(of_user) = self.by_user.get_mut(&user) {
                *of_user.count(direction) -= 1;
                if *of_user == OfUser::default() {
                    self.by_user.remove(&user);
                }
            }
        }
        self.waiting.remove(&transfer)
    }

    /// Panics when a count is wrong, or when one of these has no place.
    pub(crate) fn assert_counts(&self, under_way: impl Iterator<Item = (TransferId, Direction, UserId)>) {
        for (transfer, direction, user) in under_way {
            assert_eq!(self.places.get(&transfer), Some(&(direction, user)), "a transfer without a place");
        }
        let mut by_user: HashMap<UserId, OfUser> = HashMap::new();
        for (direction, user) in self.places.values() {
            *by_user.entry(*user).or_default().count(*direction) += 1;
        }
        assert_eq!(by_user, self.by_user, "transfers of each user");
        let uploads = self.places.values().filter(|(direction, _)| *direction == Direction::Upload).count();
        assert_eq!(uploads, self.uploads, "uploads");
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
    fn a_transfer_has_its_place_until_it_is_over() {
        let limits = Limits { uploads_max: 2, downloads_max: 1, transfers_per_user_max: 2, ..Limits::default() };
        let (one, other, id) = (UserId(1), UserId(2), ConnectionId::default());
        let mut transfers = Transfers::default();
        let first = transfers.begin(Direction::Upload, one, id, &limits).unwrap();
        let second = transfers.begin(Direction::Download, one, id, &limits).unwrap();
        assert_eq!(transfers.begin(Direction::Upload, one, id, &limits), None, "two of one user");
        assert_eq!(transfers.begin(Direction::Download, other, id, &limits), None, "one download");
        transfers.abandon(second);
        assert_eq!((transfers.waiting(first), transfers.waiting(second)), (Some(id), None));
        assert_eq!(transfers.begin(Direction::Download, other, id, &limits), None, "it is not over yet");
        assert_eq!(transfers.end(second), None);
        assert_eq!(transfers.end(second), None, "once");
        assert!(transfers.begin(Direction::Download, other, id, &limits).is_some());
        assert_eq!(transfers.end(first), Some(id));
        assert!(transfers.begin(Direction::Upload, one, id, &limits).is_some());
        assert_eq!(
            transfers.begin(Direction::Upload, one, id, &limits),
            None,
            "the last place is for somebody who has none"
        );
        transfers.assert_counts(std::iter::empty());
        assert_eq!(transfers.by_user.len(), 2, "who moves nothing costs nothing");
    }

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
