//! Who is served next: connections that have something to do, in three lines.
//!
//! What takes little is served first, so that it waits for nothing that takes long. Who has used up a small share of a turn,
//! or asks for what takes long, waits in a line in which every user has the same part, however many connections he has. So do
//! those that move a file, in the third. Of the second and the third, something is served in every turn.

use std::collections::{HashMap, VecDeque};

use crate::connection::{Connection, ConnectionId, Owner};

/// The three lines.
#[derive(Debug, Default)]
pub(crate) struct RunQueue {
    pub(crate) requests: VecDeque<ConnectionId>,
    pub(crate) long: FairQueue,
    pub(crate) transfers: FairQueue,
}

impl RunQueue {
    /// Puts a connection where it belongs, if it waits nowhere yet.
    pub(crate) fn push(&mut self, connection: &mut Connection) {
        if connection.is_queued {
            return;
        }
        connection.is_queued = true;
        if connection.phase.is_transfer() {
            self.transfers.push(connection.owner(), connection.id);
        } else if connection.is_long {
            self.long.push(connection.owner(), connection.id);
        } else {
            self.requests.push_back(connection.id);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.long.is_empty() && self.transfers.is_empty()
    }
}

/// A line in which owners take turns, each with its connections in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct FairQueue {
    waiting: HashMap<Owner, VecDeque<ConnectionId>>,
    /// Those who have a connection waiting, each once.
    owners: VecDeque<Owner>,
    len: usize,
}

impl FairQueue {
    fn push(&mut self, owner: Owner, id: ConnectionId) {
        let of_owner = self.waiting.entry(owner).or_default();
        if of_owner.is_empty() {
            self.owners.push_back(owner);
        }
        of_owner.push_back(id);
        self.len += 1;
    }

    /// The next connection; its owner stands at the end then.
    pub(crate) fn pop(&mut self) -> Option<ConnectionId> {
        let owner = self.owners.pop_front()?;
        let of_owner = self.waiting.get_mut(&owner)?;
        let id = of_owner.pop_front();
        if of_owner.is_empty() {
            self.waiting.remove(&owner);
        } else {
            self.owners.push_back(owner);
        }
        self.len -= 1;
        id
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::UserId;

    #[test]
    fn each_owner_has_the_same_part_however_many_wait_for_him() {
        let mut line = FairQueue::default();
        let id = |slot| ConnectionId { slot, generation: 1 };
        for slot in 0..4 {
            line.push(Owner::User(UserId(1)), id(slot));
        }
        line.push(Owner::User(UserId(2)), id(10));
        line.push(Owner::Network([192, 0, 2, 1].into()), id(20));
        let mut order = Vec::new();
        for _ in 0..3 {
            order.extend(line.pop().map(|id| id.slot));
        }
        line.push(Owner::User(UserId(2)), id(11));
        order.extend(std::iter::from_fn(|| line.pop()).map(|id| id.slot));
        assert_eq!(order, [0, 10, 20, 1, 11, 2, 3]);
        assert!(line.is_empty() && line.waiting.is_empty() && line.owners.is_empty());
    }
}
