//! Who may connect: how many in all, how many from one address, and how many administrators.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::connection::Peer;
use crate::limits::Limits;

/// How many are connected.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Admission {
    peers: usize,
    administrators: usize,
    /// Those that were one too many and are not gone yet.
    turned_away: usize,
    /// Of each network that is counted.
    by_network: HashMap<IpAddr, usize>,
}

impl Admission {
    /// True when one more from there is not too many.
    pub(crate) fn admits(&self, peer: Peer, limits: &Limits) -> bool {
        if peer == Peer::Admin {
            return self.administrators < limits.admin_connections_max;
        }
        let here = peer.network_counted(limits).and_then(|network| self.by_network.get(&network));
        self.peers < limits.connections_max && here.is_none_or(|count| *count < limits.connections_per_address_max)
    }

    /// What there are too many of, for one that is not admitted.
    pub(crate) fn excess(&self, peer: Peer, limits: &Limits) -> &'static str {
        match peer {
            Peer::Admin => "too many connections to the admin socket",
            Peer::Address(_) if self.peers >= limits.connections_max => "server full",
            Peer::Address(_) => "too many connections from one address",
        }
    }

    /// Counts one more.
    pub(crate) fn enter(&mut self, peer: Peer, limits: &Limits) {
        match peer {
            Peer::Admin => self.administrators += 1,
            Peer::Address(_) => self.peers += 1,
        }
        if let Some(network) = peer.network_counted(limits) {
            *self.by_network.entry(network).or_default() += 1;
        }
    }

    /// Counts one less, that has been counted.
    pub(crate) fn leave(&mut self, peer: Peer, limits: &Limits) {
        match peer {
            Peer::Admin => self.administrators -= 1,
            Peer::Address(_) => self.peers -= 1,
        }
        if let Some(network) = peer.network_counted(limits)
            && let Some(count) = self.by_network.get_mut(&network)
        {
            *count -= 1;
            if *count == 0 {
                self.by_network.remove(&network);
            }
        }
    }

    /// Counts one more that was one too many. Says whether there is time to let it read that.
    pub(crate) fn turn_away(&mut self, limits: &Limits) -> bool {
        self.turned_away += 1;
        self.turned_away <= limits.turned_away_max
    }

    /// Counts one less of those.
    pub(crate) fn turned_away_left(&mut self) {
        self.turned_away -= 1;
    }

    /// Panics when these are not the peers that were counted.
    pub(crate) fn assert_counts(&self, peers: impl Iterator<Item = Peer>, turned_away: usize, limits: &Limits) {
        let mut counted = Self { turned_away, ..Self::default() };
        peers.for_each(|peer| counted.enter(peer, limits));
        assert_eq!(counted, *self, "who is connected");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_its_share_and_loopback_is_not_counted_unless_asked() {
        let mut limits = Limits { connections_max: 10, connections_per_address_max: 2, ..Limits::default() };
        let peer = |text: &str| Peer::Address(text.parse().unwrap());
        let mut admission = Admission::default();
        for _ in 0..2 {
            assert!(admission.admits(peer("192.0.2.1"), &limits));
            admission.enter(peer("192.0.2.1"), &limits);
            admission.enter(peer("2001:db8::1"), &limits);
            admission.enter(peer("127.0.0.1"), &limits);
        }
        assert!(!admission.admits(peer("192.0.2.1"), &limits));
        assert!(!admission.admits(peer("::ffff:192.0.2.1"), &limits));
        assert!(!admission.admits(peer("2001:db8::2"), &limits));
        assert!(admission.admits(peer("2001:db8:0:1::1"), &limits));
        assert!(admission.admits(peer("192.0.2.2"), &limits));
        assert!(admission.admits(peer("127.0.0.1"), &limits));
        admission.leave(peer("192.0.2.1"), &limits);
        assert!(admission.admits(peer("192.0.2.1"), &limits));
        for _ in 0..5 {
            admission.enter(peer("127.0.0.1"), &limits);
        }
        assert!(!admission.admits(peer("127.0.0.1"), &limits));
        assert!(!admission.admits(peer("192.0.2.2"), &limits));
        assert!(admission.admits(Peer::Admin, &limits));

        limits.limit_loopback = true;
        let mut admission = Admission::default();
        admission.enter(peer("127.0.0.1"), &limits);
        admission.enter(peer("127.0.0.1"), &limits);
        assert!(!admission.admits(peer("127.0.0.1"), &limits));
        admission.leave(peer("127.0.0.1"), &limits);
        admission.leave(peer("127.0.0.1"), &limits);
        assert!(admission.by_network.is_empty(), "who has left costs nothing");
    }

    #[test]
    fn who_is_turned_away_is_let_read_that_up_to_so_many_at_once() {
        let limits = Limits { turned_away_max: 2, ..Limits::default() };
        let mut admission = Admission::default();
        assert_eq!([0; 3].map(|_| admission.turn_away(&limits)), [true, true, false]);
        admission.turned_away_left();
        assert!(!admission.turn_away(&limits), "two others are still reading");
        for _ in 0..2 {
            admission.turned_away_left();
        }
        assert!(admission.turn_away(&limits));
    }

    #[test]
    fn administrators_have_a_bound_of_their_own() {
        let limits = Limits { admin_connections_max: 1, ..Limits::default() };
        let mut admission = Admission::default();
        admission.enter(Peer::Admin, &limits);
        assert!(!admission.admits(Peer::Admin, &limits));
        admission.leave(Peer::Admin, &limits);
        assert!(admission.admits(Peer::Admin, &limits));
    }
}
