//! Password work that waits or is being done: for whom, and how much of it comes from where.
//!
//! It is done one after the other and each takes long, so who asks for much must leave room for those who ask for little. From
//! one address comes no more than its bound, and less the fewer places are left: never as many as are still free. So however
//! many addresses fill the queue, one from which nothing waits finds a place, as long as there are more places than addresses.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::connection::{ConnectionId, Peer};
use crate::limits::Limits;

/// All that is not done.
#[derive(Debug, Default)]
pub struct PasswordQueue {
    jobs: HashMap<ConnectionId, Option<IpAddr>>,
    by_network: HashMap<IpAddr, usize>,
}

impl PasswordQueue {
    /// True when there is a place for one more from there. For the administrator there always is.
    #[must_use]
    pub fn admits(&self, peer: Peer, limits: &Limits) -> bool {
        let Some(network) = peer.network() else { return true };
        let from_there = self.by_network.get(&network).copied().unwrap_or(0);
        let is_within_share =
            peer.network_counted(limits).is_none() || from_there < limits.password_queue_per_address_max;
        is_within_share && from_there < limits.password_queue_max.saturating_sub(self.jobs.len())
    }

    /// One more.
    pub(crate) fn enter(&mut self, connection: ConnectionId, peer: Peer) {
        let network = peer.network();
        self.jobs.insert(connection, network);
        if let Some(network) = network {
            *self.by_network.entry(network).or_default() += 1;
        }
    }

    /// One is done, whether the one who asked for it is still there or not.
    pub(crate) fn leave(&mut self, connection: ConnectionId) {
        if let Some(Some(network)) = self.jobs.remove(&connection)
            && let Some(from_there) = self.by_network.get_mut(&network)
        {
            *from_there -= 1;
            if *from_there == 0 {
                self.by_network.remove(&network);
            }
        }
    }

    /// Panics when one of these is not counted, or the counts are wrong.
    pub(crate) fn assert_counts(&self, mut waiting: impl Iterator<Item = ConnectionId>) {
        assert!(waiting.all(|id| self.jobs.contains_key(&id)), "password work that is not counted");
        let counted = self.jobs.values().flatten().count();
        assert_eq!(counted, self.by_network.values().sum::<usize>(), "password work of each address");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_from_which_nothing_waits_finds_a_place_whatever_the_others_do() {
        let limits = Limits::default();
        let mut queue = PasswordQueue::default();
        let peer = |number: u8| Peer::Address([192, 0, 2, number].into());
        let mut slot = 0;
        let mut fill = |queue: &mut PasswordQueue, peer: Peer| {
            let before = slot;
            while queue.admits(peer, &limits) {
                queue.enter(ConnectionId { slot, generation: 0 }, peer);
                slot += 1;
            }
            slot - before
        };
        assert_eq!(fill(&mut queue, peer(1)), 16);
        assert_eq!(fill(&mut queue, Peer::Address([127, 0, 0, 1].into())), 24, "half of what is left");
        for number in 2..5 {
            assert!(fill(&mut queue, peer(number)) > 0);
        }
        assert!(queue.admits(peer(9), &limits));
        assert!(queue.jobs.len() < limits.password_queue_max);
        for slot in 0..slot {
            queue.leave(ConnectionId { slot, generation: 0 });
        }
        queue.leave(ConnectionId::default());
        assert!(queue.jobs.is_empty() && queue.by_network.is_empty());
    }

    #[test]
    fn the_administrator_never_waits_for_a_place() {
        let limits = Limits { password_queue_max: 1, ..Limits::default() };
        let mut queue = PasswordQueue::default();
        for slot in 0..3 {
            assert!(queue.admits(Peer::Admin, &limits));
            queue.enter(ConnectionId { slot, generation: 0 }, Peer::Admin);
        }
        assert!(!queue.admits(Peer::Address([192, 0, 2, 1].into()), &limits));
    }
}
