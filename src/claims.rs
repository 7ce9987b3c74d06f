//! Which messages are on their way out in an INBOX reply, so that a second INBOX does not give them too.
//!
//! A claim ends in one of two ways: the reply got out, and the messages leave the mailbox; or it did not, and they are
//! there to be given again.

use std::collections::HashMap;
use std::ops::Range;

use crate::change::UserId;
use crate::connection::Delivery;
use crate::mailbox::Mailbox;

/// All claims. Those of one mailbox do not overlap and are kept in the order of their messages.
#[derive(Debug, Default)]
pub struct Claims {
    by_user: HashMap<UserId, Vec<Delivery>>,
}

impl Claims {
    /// Where in a mailbox the first run of messages stands that nobody has claimed.
    pub fn unclaimed(&self, user: UserId, mailbox: &Mailbox) -> Range<usize> {
        let (mut start, mut end) = (0, mailbox.entries().len());
        for claim in self.by_user.get(&user).into_iter().flatten() {
            let claimed = mailbox.position(claim.first);
            if claimed > start {
                end = claimed;
                break;
            }
            start = mailbox.position(claim.last.next());
        }
        start.min(end)..end
    }

    /// How many of one mailbox there are.
    #[must_use]
    pub fn count(&self, user: UserId) -> usize {
        self.by_user.get(&user).map_or(0, Vec::len)
    }

    /// Claims a run of messages.
    pub fn add(&mut self, delivery: Delivery) {
        let claims = self.by_user.entry(delivery.user).or_default();
        let at = claims.partition_point(|claim| claim.first < delivery.first);
        claims.insert(at, delivery);
    }

    /// Ends a claim, in either way.
    pub fn remove(&mut self, delivery: &Delivery) {
        if let Some(claims) = self.by_user.get_mut(&delivery.user) {
            claims.retain(|claim| claim != delivery);
            if claims.is_empty() {
                self.by_user.remove(&delivery.user);
            }
        }
    }
}
