//! How often an address may do what costs the server much: a steady rate, with a minute's worth at once.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

const MINUTE_MS: u64 = 60_000;
/// Above this many addresses, those that have been quiet for a minute are forgotten.
const ADDRESSES_KEPT: usize = 4096;

/// Counts per address. An address that may act at once has no entry that matters.
#[derive(Debug)]
pub struct Throttle {
    /// Between two acts at the steady rate; none for no limit.
    interval_ms: Option<u64>,
    /// For each address, the time at which all that it did is paid off.
    paid_off: HashMap<IpAddr, u64>,
    forget_above: usize,
}

impl Throttle {
    /// At most `per_minute` acts a minute from one address; 0 for no limit.
    #[must_use]
    pub fn new(per_minute: u32) -> Self {
        let interval_ms = (per_minute > 0).then(|| (MINUTE_MS / u64::from(per_minute)).max(1));
        Self { interval_ms, paid_off: HashMap::new(), forget_above: ADDRESSES_KEPT }
    }

    /// Counts an act at `now`.
    ///
    /// # Errors
    /// The seconds to wait, if it is one too many; it is not counted then.
    pub fn act(&mut self, address: IpAddr, now: u64) -> Result<(), u64> {
        let Some(interval_ms) = self.interval_ms else { return Ok(()) };
        if self.paid_off.len() > self.forget_above {
            self.paid_off.retain(|_, paid_off| *paid_off > now);
            // When all of them are busy, look again only after as many more have come.
            self.forget_above = (self.paid_off.len() * 2).max(ADDRESSES_KEPT);
        }
        let paid_off = self.paid_off.entry(network(address)).or_insert(now);
        let after = (*paid_off).max(now) + interval_ms;
        let owed = after - now;
        if owed > MINUTE_MS {
            return Err((owed - MINUTE_MS).div_ceil(1000));
        }
        *paid_off = after;
        Ok(())
    }
}

/// What counts as one address: a whole /64 for IPv6, since one host has all of it.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_minutes_worth_may_come_at_once_and_then_at_the_steady_rate() {
        let mut throttle = Throttle::new(6);
        let me = address("192.0.2.1");
        for _ in 0..6 {
            assert_eq!(throttle.act(me, 5), Ok(()));
        }
        assert_eq!(throttle.act(me, 5), Err(10));
        assert_eq!(throttle.act(me, 9_000), Err(2));
        assert_eq!(throttle.act(me, 10_005), Ok(()));
        assert!(throttle.act(me, 10_005).is_err());
    }

    #[test]
    fn others_are_not_held_up_but_for_their_own_network() {
        let mut throttle = Throttle::new(1);
        assert!(throttle.act(address("192.0.2.1"), 0).is_ok());
        assert!(throttle.act(address("192.0.2.2"), 0).is_ok());
        assert!(throttle.act(address("::ffff:192.0.2.2"), 0).is_err());
        assert!(throttle.act(address("2001:db8::1"), 0).is_ok());
        assert!(throttle.act(address("2001:db8::ffff"), 0).is_err());
        assert!(throttle.act(address("2001:db8:0:1::1"), 0).is_ok());
    }

    #[test]
    fn zero_is_no_limit_and_quiet_addresses_are_forgotten() {
        let mut free = Throttle::new(0);
        assert!((0..1000).all(|_| free.act(address("192.0.2.1"), 0).is_ok()));
        let mut throttle = Throttle::new(60);
        for host in 0..=u32::try_from(ADDRESSES_KEPT).unwrap() {
            throttle.act(IpAddr::V4(host.into()), 0).unwrap();
        }
        throttle.act(address("192.0.2.1"), MINUTE_MS).unwrap();
        assert_eq!(throttle.paid_off.len(), 1);
    }
}
