//! How often somebody may do what costs the server much: a steady rate, with a minute's worth at once.

use std::collections::HashMap;
use std::hash::Hash;

const MINUTE_MS: u64 = 60_000;
/// From this many on, or as many as there may be, those that have been quiet for a minute are forgotten.
const KEPT: usize = 4096;
/// How often they are looked for.
const FORGET_MS: u64 = 1000;

/// Counts for each `K`, be it an address or a user. One whose acts are paid off may be forgotten at any time.
#[derive(Debug)]
pub struct Throttle<K> {
    /// Between two acts at the steady rate; none for no limit.
    interval_ms: Option<u64>,
    /// So many can be counted at once. Where more than that come in a minute, the newest must wait.
    kept_max: usize,
    /// For each, the time at which all that it did is paid off.
    paid_off: HashMap<K, u64>,
    /// When those that are quiet are looked for next.
    forget_at: u64,
}

impl<K: Eq + Hash> Throttle<K> {
    /// At most `per_minute` acts a minute by each; 0 for no limit. At most `kept_max` are counted at once.
    #[must_use]
    pub fn new(per_minute: u32, kept_max: usize) -> Self {
        let interval_ms = (per_minute > 0).then(|| (MINUTE_MS / u64::from(per_minute)).max(1));
        Self { interval_ms, kept_max, paid_off: HashMap::new(), forget_at: 0 }
    }

    /// Whether an act at `now` would not be one too many.
    ///
    /// # Errors
    /// The seconds to wait.
    pub fn check(&mut self, who: &K, now: u64) -> Result<(), u64> {
        self.forget_quiet(now);
        self.paid_off_after(who, now).map(drop)
    }

    /// Counts an act at `now`.
    ///
    /// # Errors
    /// The seconds to wait, if it is one too many; it is not counted then.
    pub fn act(&mut self, who: K, now: u64) -> Result<(), u64> {
        self.forget_quiet(now);
        if let Some(after) = self.paid_off_after(&who, now)? {
            self.paid_off.insert(who, after);
        }
        Ok(())
    }

    fn forget_quiet(&mut self, now: u64) {
        if self.paid_off.len() >= KEPT.min(self.kept_max) && now >= self.forget_at {
            self.paid_off.retain(|_, paid_off| *paid_off > now);
            self.forget_at = now + FORGET_MS;
        }
    }

    /// When one more act will be paid off; none where nothing is counted.
    fn paid_off_after(&self, who: &K, now: u64) -> Result<Option<u64>, u64> {
        let Some(interval_ms) = self.interval_ms else { return Ok(None) };
        let before = match self.paid_off.get(who) {
            Some(paid_off) => *paid_off,
            None if self.paid_off.len() >= self.kept_max => return Err(MINUTE_MS / 1000),
            None => now,
        };
        let after = before.max(now) + interval_ms;
        let owed = after - now;
        if owed > MINUTE_MS { Err((owed - MINUTE_MS).div_ceil(1000)) } else { Ok(Some(after)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_may_come_at_once_and_then_at_the_steady_rate() {
        let mut throttle = Throttle::new(6, 5000);
        let me = "me";
        for _ in 0..6 {
            assert_eq!(throttle.act(me, 5), Ok(()));
        }
        assert_eq!(throttle.act(me, 5), Err(10));
        assert_eq!(throttle.act(me, 9_000), Err(2));
        assert_eq!(throttle.act(me, 10_005), Ok(()));
        assert!(throttle.act(me, 10_005).is_err());
    }

    #[test]
    fn others_are_not_held_up() {
        let mut throttle = Throttle::new(1, 5000);
        assert!(throttle.act(1, 0).is_ok());
        assert!(throttle.act(2, 0).is_ok());
        assert!(throttle.act(2, 0).is_err());
    }

    #[test]
    fn so_many_are_counted_and_no_more() {
        let mut throttle = Throttle::new(1, 5000);
        for who in 0..5000 {
            assert!(throttle.act(who, 0).is_ok());
        }
        assert_eq!(throttle.act(5000, 0), Err(60));
        assert_eq!(throttle.paid_off.len(), 5000);
        assert!(throttle.act(5000, 2 * MINUTE_MS).is_ok());
    }

    #[test]
    fn where_few_are_counted_a_newcomer_waits_for_one_of_them_and_no_longer() {
        let mut throttle = Throttle::new(60, 2);
        for who in 0..2 {
            assert!(throttle.act(who, 0).is_ok());
        }
        assert!(throttle.check(&2, 500).is_err());
        assert_eq!(throttle.check(&2, 2000), Ok(()));
        assert_eq!(throttle.act(2, 2000), Ok(()));
    }

    #[test]
    fn zero_is_no_limit_and_quiet_addresses_are_forgotten() {
        let mut free = Throttle::new(0, 5000);
        assert!((0..1000).all(|_| free.act("me", 0).is_ok()));
        let mut throttle = Throttle::new(60, 5000);
        for who in 0..KEPT {
            throttle.act(who, 0).unwrap();
        }
        throttle.act(0, MINUTE_MS).unwrap();
        assert_eq!(throttle.paid_off.len(), 1);
    }
}
