//! Wrong passwords: who made how many, and how long they must wait.
//!
//! They are counted for each account and address, so that a stranger does not lock the owner out from elsewhere, and for
//! each address, so that nobody tries one password on many accounts. With time they are forgotten, one after the other. Past a number that people need, each further one makes
//! the next try wait, a second at first and then twice as long each time. A try that is made too early is refused before
//! anything is looked up, so it tells nothing. It knows no requests and no clock.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::limits::Limits;

const DELAY_MS_FIRST: u64 = 1000;

/// From where a try comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// What counts as one address.
    pub network: IpAddr,
    /// All that come from there are counted together too.
    pub is_shared_count: bool,
}

/// All that are counted.
#[derive(Debug, Default)]
pub struct Failures {
    counts: HashMap<Key, Count>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Account(IpAddr, Box<str>),
    Address(IpAddr),
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    failures: u32,
    /// From when on they are forgotten.
    since: u64,
    last: u64,
    /// The next try is not taken before.
    blocked_until: u64,
}

impl Failures {
    /// Whether what comes from `origin` may try a password of `account`; none for one that cannot exist.
    ///
    /// # Errors
    /// The seconds to wait.
    pub fn check(&self, origin: Origin, account: Option<&str>, now: u64) -> Result<(), u64> {
        let blocked_until = |key: &Key| self.counts.get(key).map_or(0, |count| count.blocked_until);
        let until = keys(origin, account).map(|(key, _)| blocked_until(&key)).max().unwrap_or(0);
        if until > now { Err((until - now).div_ceil(1000)) } else { Ok(()) }
    }

    /// Counts a wrong password.
    pub fn add(&mut self, origin: Origin, account: Option<&str>, limits: &Limits, now: u64) {
        for (key, is_account) in keys(origin, account) {
            self.make_room(limits, now);
            let forget_ms = forget_ms(&key, limits);
            let count = self.counts.entry(key).or_default();
            count.forget(forget_ms, now);
            count.failures = count.failures.saturating_add(1);
            count.last = now;
            let free = if is_account { limits.login_failures_max } else { limits.login_failures_per_address_max };
            if let Some(excess) = count.failures.checked_sub(free) {
                let delay = DELAY_MS_FIRST.checked_shl(excess.min(32)).unwrap_or(u64::MAX);
                count.blocked_until = now.saturating_add(delay.min(limits.login_delay_ms_max));
                count.since = count.blocked_until;
            }
        }
    }

    /// The right password ends what was counted for the account from there, and nothing else: whoever has one account must
    /// not go on trying others.
    pub fn forgive(&mut self, origin: Origin, account: &str) {
        self.counts.remove(&Key::Account(origin.network, account.into()));
    }

    /// Forgets what no longer counts, and if that is not enough, an eighth: those that were quiet longest.
    fn make_room(&mut self, limits: &Limits, now: u64) {
        if self.counts.len() < limits.counted_max {
            return;
        }
        self.counts.retain(|key, count| {
            count.forget(forget_ms(key, limits), now);
            count.failures > 0
        });
        if self.counts.len() < limits.counted_max {
            return;
        }
        let mut quiet_since: Vec<u64> = self.counts.values().map(|count| count.last).collect();
        let eighth = quiet_since.len() / 8;
        let (_, oldest_kept, _) = quiet_since.select_nth_unstable(eighth);
        let oldest_kept = *oldest_kept;
        let mut left = eighth + 1;
        self.counts.retain(|_, count| {
            let goes = left > 0 && count.last <= oldest_kept;
            left -= usize::from(goes);
            !goes
        });
    }
}

impl Count {
    /// Forgets one failure for each time that has passed. While somebody must wait nothing is forgotten, so whoever goes on
    /// trying gets no more tries than the longest wait lets him.
    fn forget(&mut self, forget_ms: u64, now: u64) {
        let forgotten = now.saturating_sub(self.since) / forget_ms;
        self.failures = self.failures.saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX));
        self.since = if self.failures == 0 { now } else { self.since.saturating_add(forgotten * forget_ms) };
    }
}

/// In what time one failure is forgotten. From one address come those of many people.
fn forget_ms(key: &Key, limits: &Limits) -> u64 {
    match key {
        Key::Account(..) => limits.login_delay_ms_max,
        Key::Address(_) => (limits.login_delay_ms_max / 10).max(1),
    }
}

/// What a try counts for, and whether that is an account.
fn keys(origin: Origin, account: Option<&str>) -> impl Iterator<Item = (Key, bool)> {
    let of_account = account.map(|account| (Key::Account(origin.network, account.into()), true));
    let of_address = origin.is_shared_count.then_some((Key::Address(origin.network), false));
    of_account.into_iter().chain(of_address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { login_failures_max: 3, login_failures_per_address_max: 5, ..Limits::default() }
    }

    fn from(text: &str) -> Origin {
        Origin { network: text.parse().unwrap(), is_shared_count: true }
    }

    #[test]
    fn each_failure_past_the_free_ones_makes_the_wait_twice_as_long_up_to_a_bound() {
        let (limits, mut failures, here) = (limits(), Failures::default(), from("192.0.2.1"));
        let mut now = 10;
        for _ in 0..2 {
            failures.add(here, Some("messi"), &limits, now);
            assert_eq!(failures.check(here, Some("messi"), now), Ok(()));
        }
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900] {
            failures.add(here, Some("messi"), &limits, now);
            assert_eq!(failures.check(here, Some("messi"), now), Err(seconds));
            now += seconds * 1000;
            assert_eq!(failures.check(here, Some("messi"), now - 1), Err(1));
            assert_eq!(failures.check(here, Some("messi"), now), Ok(()));
        }
    }

    #[test]
    fn the_owner_can_log_in_from_elsewhere() {
        let (limits, mut failures) = (limits(), Failures::default());
        for _ in 0..100 {
            failures.add(from("192.0.2.1"), Some("messi"), &limits, 0);
        }
        assert!(failures.check(from("192.0.2.1"), Some("messi"), 0).is_err());
        assert_eq!(failures.check(from("192.0.2.2"), Some("messi"), 0), Ok(()));
    }

    #[test]
    fn one_password_on_many_accounts_counts_for_the_address() {
        let (limits, mut failures, here) = (limits(), Failures::default(), from("192.0.2.1"));
        for account in ["a", "b", "c", "d"] {
            failures.add(here, Some(account), &limits, 0);
        }
        assert_eq!(failures.check(here, Some("messi"), 0), Ok(()));
        failures.add(here, None, &limits, 0);
        assert_eq!(failures.check(here, Some("messi"), 0), Err(1));
        // A password that is right ends nothing but what was counted for its account.
        failures.forgive(here, "messi");
        assert_eq!(failures.check(here, Some("messi"), 0), Err(1));
    }

    #[test]
    fn the_right_password_ends_the_count_and_so_does_time() {
        let (limits, mut failures, here) = (limits(), Failures::default(), from("192.0.2.1"));
        let fail = |failures: &mut Failures, now| failures.add(here, Some("messi"), &limits, now);
        fail(&mut failures, 0);
        fail(&mut failures, 0);
        failures.forgive(here, "messi");
        fail(&mut failures, 0);
        fail(&mut failures, 0);
        assert_eq!(failures.check(here, Some("messi"), 0), Ok(()));
        let each = Limits::default().login_delay_ms_max;
        fail(&mut failures, each);
        assert_eq!(failures.check(here, Some("messi"), each), Ok(()), "one of two was forgotten");
        fail(&mut failures, 2 * each - 1);
        assert!(failures.check(here, Some("messi"), 2 * each - 1).is_err(), "the second was not");
        fail(&mut failures, 9 * each);
        assert_eq!(failures.check(here, Some("messi"), 9 * each), Ok(()));
    }

    #[test]
    fn an_office_from_which_a_failure_comes_now_and_then_is_never_shut_out() {
        let (limits, mut failures, here) = (limits(), Failures::default(), from("192.0.2.1"));
        for number in 0..1000 {
            let now = number * limits.login_delay_ms_max / 8;
            failures.add(here, Some(&number.to_string()), &limits, now);
            assert_eq!(failures.check(here, Some("messi"), now), Ok(()), "{number}");
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest_stays() {
        let (mut failures, mut limits) = (Failures::default(), limits());
        limits.counted_max = 80;
        for number in 0..1000 {
            let account = number.to_string();
            failures.add(Origin { is_shared_count: false, ..from("192.0.2.1") }, Some(&account), &limits, 5);
            assert!(failures.counts.len() <= 80);
        }
        for _ in 0..3 {
            failures.add(from("192.0.2.2"), Some("messi"), &limits, 6);
        }
        assert!(failures.counts.len() > 60);
        assert_eq!(failures.check(from("192.0.2.2"), Some("messi"), 6), Err(1));
    }
}
