//! Who goes when all connections together hold too much memory.
//!
//! Those that have not logged in go before all others. Of either kind, those go whose owner holds most, until no owner that
//! gives holds more than any other: so whoever takes much cannot take it from those who take little. Of one owner's, those
//! go first that have kept the server waiting longest.

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::connection::{ConnectionId, Owner};

/// A connection that waits for its peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holding {
    pub(crate) id: ConnectionId,
    pub(crate) owner: Owner,
    pub(crate) is_known: bool,
    /// Since when it waits.
    pub(crate) since: u64,
    /// What it holds.
    pub(crate) bytes: u64,
}

/// Chooses connections that hold `excess` bytes together, or all.
pub(crate) fn choose(holdings: Vec<Holding>, mut excess: u64) -> Vec<ConnectionId> {
    let (known, strangers): (Vec<_>, Vec<_>) = holdings.into_iter().partition(|holding| holding.is_known);
    let mut chosen = Vec::new();
    for class in [strangers, known] {
        let mut by_owner: HashMap<Owner, Vec<Holding>> = HashMap::new();
        for holding in class {
            by_owner.entry(holding.owner).or_default().push(holding);
        }
        let sum = |held: &Vec<Holding>| held.iter().map(|holding| holding.bytes).sum::<u64>();
        let level = level(by_owner.values().map(sum).collect(), excess);
        let mut owners: Vec<Vec<Holding>> = by_owner.into_values().collect();
        owners.sort_by_cached_key(|held| Reverse(sum(held)));
        for mut held in owners {
            held.sort_unstable_by_key(|holding| (holding.since, holding.id));
            let mut left = sum(&held);
            for holding in held.iter().filter(|holding| holding.bytes > 0) {
                if left <= level || excess == 0 {
                    break;
                }
                left -= holding.bytes;
                excess = excess.saturating_sub(holding.bytes);
                chosen.push(holding.id);
            }
        }
    }
    chosen
}

/// To what level all that are above it must come down to give `excess` together.
fn level(mut amounts: Vec<u64>, excess: u64) -> u64 {
    amounts.sort_unstable_by(|a, b| b.cmp(a));
    let mut above = 0;
    for (count, amount) in (1..).zip(&amounts) {
        above += amount;
        let next = amounts.get(count).copied().unwrap_or(0);
        if above - next * count as u64 >= excess {
            return (above - excess) / count as u64;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::UserId;

    fn holding(slot: u32, user: u32, since: u64, bytes: u64) -> Holding {
        let owner = Owner::User(UserId(user));
        Holding { id: ConnectionId { slot, generation: 1 }, owner, is_known: true, since, bytes }
    }

    fn slots(holdings: Vec<Holding>, excess: u64) -> Vec<u32> {
        let mut slots: Vec<u32> = choose(holdings, excess).into_iter().map(|id| id.slot).collect();
        slots.sort_unstable();
        slots
    }

    #[test]
    fn who_holds_most_gives_and_of_his_the_oldest() {
        let young = (0..10).map(|slot| holding(slot, 1, 100 + u64::from(slot), 10));
        let holdings: Vec<_> = young.chain([holding(10, 2, 1, 30), holding(11, 3, 0, 5)]).collect();
        assert_eq!(slots(holdings.clone(), 25), [0, 1, 2]);
        // Down to the same level for two.
        assert_eq!(slots(holdings.clone(), 90), [0, 1, 2, 3, 4, 5, 6, 7, 10]);
        assert_eq!(slots(holdings.clone(), 1000).len(), 12);
        assert_eq!(slots(holdings, 0), [0; 0]);
    }

    #[test]
    fn strangers_go_before_all_others() {
        let stranger = Holding { is_known: false, ..holding(0, 9, 500, 10) };
        let holdings = vec![holding(1, 1, 0, 1000), stranger, holding(2, 2, 0, 1000)];
        assert_eq!(slots(holdings.clone(), 10), [0]);
        assert_eq!(slots(holdings, 600).len(), 2);
    }

    #[test]
    fn the_level_is_where_what_is_above_it_is_the_excess() {
        assert_eq!(level(vec![10, 30, 20], 0), 30);
        assert_eq!(level(vec![10, 30, 20], 10), 20);
        assert_eq!(level(vec![10, 30, 20], 20), 15);
        assert_eq!(level(vec![10, 30, 20], 60), 0);
        assert_eq!(level(vec![10, 30, 20], 61), 0);
        assert_eq!(level(vec![], 5), 0);
    }
}
