//! What a connection waits for from its peer, and until when: a peer that lets the server wait for longer is closed.
//!
//! A connection only notes what it waits for. It stands in the queue of deadlines once, at a moment at which it may be too
//! late, and is looked at again then; so one that is busy costs nothing here, however often it is served. It knows no
//! buffers and no sockets, and its clock is one that never jumps.

use std::collections::BTreeSet;

use crate::connection::{CloseReason, ConnectionId};
use crate::limits::Limits;

/// What a peer must send of a file, or read of what waits for it, for the time to begin anew.
pub(crate) const PROGRESS_BYTES: u64 = 64 * 1024;
/// A peer that has read much at once has so many times as long for the next step at most: the systems between open their
/// buffers in steps of a megabyte.
const CREDIT_MAX: u64 = 4;
/// How long somebody who is late is let be because the server is at something for it; once.
const RESPITE_MS: u64 = 5000;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// Nothing: it is the server that has something to do.
    Nothing,
    /// The peer's next request.
    Request,
    /// The rest of a line, or of a file.
    Line,
    /// That the peer reads.
    Reading,
    /// That the peer ends its side too.
    End,
}

/// How well a peer is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// It has not made a request yet.
    Silent,
    /// It has made some.
    Stranger,
    /// It has logged in, or shown a token that is good, or is the administrator.
    Known,
}

/// How long a connection has waited, and for what.
#[derive(Debug)]
pub(crate) struct Wait {
    awaited: Awaited,
    since: u64,
    /// How far the peer had come then.
    mark: u64,
    /// How many times as long it has for what it read before.
    credit: u64,
    stage: Stage,
    /// When it was first seen.
    opened: Option<u64>,
    /// Where it stands in the queue.
    due: Option<u64>,
    has_had_respite: bool,
}

impl Wait {
    /// That of a connection whose peer is known so well.
    pub(crate) fn new(stage: Stage) -> Self {
        Self {
            awaited: Awaited::Nothing,
            since: 0,
            mark: 0,
            credit: 1,
            stage,
            opened: None,
            due: None,
            has_had_respite: false,
        }
    }

    /// What is waited for.
    pub(crate) fn awaited(&self) -> Awaited {
        self.awaited
    }

    /// How well the peer is known.
    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    /// Since when.
    pub(crate) fn since(&self) -> u64 {
        self.since
    }

    /// Panics when nobody will look at it in time.
    pub(crate) fn assert_watched(&self, limits: &Limits, is_closing: bool) {
        if self.opened.is_some()
            && let Some((at, reason)) = self.deadline(limits, is_closing)
        {
            let is_watched = self.due.is_some_and(|due| due <= at || self.has_had_respite);
            assert!(is_watched, "nobody closes it for: {reason}");
        }
    }

    /// Where it stands in the queue.
    pub(crate) fn due(&self) -> Option<u64> {
        self.due
    }

    /// The peer is known so well, or better.
    pub(crate) fn reach(&mut self, stage: Stage) {
        self.stage = self.stage.max(stage);
    }

    /// Notes what is waited for, and how far the peer has come with that. The time begins anew with what is awaited, and
    /// with each step that the peer makes.
    pub(crate) fn note(&mut self, awaited: Awaited, progress: u64, now: u64) {
        let is_new = awaited != self.awaited || self.opened.is_none();
        let made = progress.saturating_sub(self.mark);
        if is_new || made >= PROGRESS_BYTES {
            self.opened.get_or_insert(now);
            self.credit = if is_new { 1 } else { (made / PROGRESS_BYTES).min(CREDIT_MAX) };
            self.awaited = awaited;
            self.since = now;
            self.mark = progress;
        }
    }

    /// Until when the peer has time, and what it is closed for then. A stranger who is to be closed may read what he has asked
    /// for, but has no more than as much time again for that, however he goes on.
    fn deadline(&self, limits: &Limits, is_closing: bool) -> Option<(u64, CloseReason)> {
        let after = |since: u64, ms: u64, reason| (ms > 0).then(|| (since.saturating_add(ms), reason));
        let awaited = match self.awaited {
            Awaited::Nothing => None,
            Awaited::Request => after(self.since, limits.idle_ms_max, CloseReason::Idle),
            Awaited::Line => after(self.since, limits.line_ms_max, CloseReason::SlowLine),
            Awaited::Reading => {
                after(self.since, limits.output_ms_max.saturating_mul(self.credit), CloseReason::SlowReader)
            }
            // Without a limit it would last for ever.
            Awaited::End => Some((self.since.saturating_add(limits.linger_ms_max), CloseReason::Ended)),
        };
        let opened = self.opened.unwrap_or(self.since);
        let stage = match self.stage {
            Stage::Silent => after(opened, limits.first_request_ms_max, CloseReason::NoRequest),
            Stage::Stranger => after(opened, limits.auth_ms_max, CloseReason::NoLogin),
            Stage::Known => None,
        };
        let stage = stage.map(|(at, reason)| (if is_closing { at.saturating_add(at - opened) } else { at }, reason));
        awaited.into_iter().chain(stage).min_by_key(|(at, _)| *at)
    }
}

/// Which connections are looked at next.
#[derive(Debug, Default)]
pub(crate) struct Deadlines(BTreeSet<(u64, ConnectionId)>);

impl Deadlines {
    /// Sees to it that the connection is looked at when its time is over, at the latest.
    pub(crate) fn keep(&mut self, id: ConnectionId, wait: &mut Wait, limits: &Limits, is_closing: bool) {
        let Some((at, _)) = wait.deadline(limits, is_closing) else { return };
        if wait.due.is_some_and(|due| due <= at) {
            return;
        }
        self.forget(id, wait);
        wait.due = Some(at);
        self.0.insert((at, id));
    }

    /// The connection is gone.
    pub(crate) fn forget(&mut self, id: ConnectionId, wait: &mut Wait) {
        if let Some(due) = wait.due.take() {
            self.0.remove(&(due, id));
        }
    }

    /// A connection that must be looked at by `now`; [`Self::judge`] must follow.
    pub(crate) fn pop(&mut self, now: u64) -> Option<ConnectionId> {
        let (due, _) = self.0.first()?;
        if *due > now {
            return None;
        }
        self.0.pop_first().map(|(_, id)| id)
    }

    /// What a connection is closed for that [`Self::pop`] gave, if its time is over by `now`. Else it is looked at later.
    pub(crate) fn judge(
        &mut self,
        id: ConnectionId,
        wait: &mut Wait,
        limits: &Limits,
        now: u64,
        is_closing: bool,
        is_server_late: bool,
    ) -> Option<CloseReason> {
        wait.due = None;
        let (mut at, reason) = wait.deadline(limits, is_closing)?;
        if at <= now {
            if !is_server_late || wait.has_had_respite {
                return Some(reason);
            }
            wait.has_had_respite = true;
            at = now + RESPITE_MS;
        }
        wait.due = Some(at);
        self.0.insert((at, id));
        None
    }

    /// Panics when the queue does not hold each connection where it stands, and nothing else.
    pub(crate) fn assert_queue(&self, due: impl Iterator<Item = (u64, ConnectionId)>) {
        assert_eq!(due.collect::<BTreeSet<_>>(), self.0, "the queue of deadlines");
    }

    /// When somebody must be looked at.
    pub(crate) fn next(&self) -> Option<u64> {
        self.0.first().map(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ConnectionId = ConnectionId { slot: 1, generation: 1 };

    fn limits() -> Limits {
        Limits { output_ms_max: 100, idle_ms_max: 1000, auth_ms_max: 5000, ..Limits::default() }
    }

    #[test]
    fn a_peer_that_has_read_much_at_once_has_longer_for_the_next_step() {
        let (limits, mut wait) = (limits(), Wait::new(Stage::Known));
        wait.note(Awaited::Reading, 1_000_000, 0);
        assert_eq!(wait.deadline(&limits, false).unwrap().0, 100);
        wait.note(Awaited::Reading, 1_000_000 + PROGRESS_BYTES - 1, 50);
        assert_eq!(wait.deadline(&limits, false).unwrap().0, 100);
        wait.note(Awaited::Reading, 1_000_000 + PROGRESS_BYTES, 50);
        assert_eq!(wait.deadline(&limits, false).unwrap().0, 150);
        wait.note(Awaited::Reading, 9_000_000, 60);
        assert_eq!(wait.deadline(&limits, false).unwrap().0, 60 + 100 * CREDIT_MAX);
        wait.note(Awaited::Request, 0, 70);
        assert_eq!(wait.deadline(&limits, false).unwrap(), (1070, CloseReason::Idle));
    }

    #[test]
    fn a_connection_stands_in_the_queue_once_and_is_judged_when_it_may_be_late() {
        let (limits, mut wait, mut queue) = (limits(), Wait::new(Stage::Known), Deadlines::default());
        wait.note(Awaited::Request, 0, 0);
        queue.keep(ID, &mut wait, &limits, false);
        wait.note(Awaited::Reading, 0, 10);
        queue.keep(ID, &mut wait, &limits, false);
        assert_eq!((queue.0.len(), queue.next()), (1, Some(110)));
        // It has gone on meanwhile, and nobody had to be told.
        wait.note(Awaited::Request, 0, 20);
        assert_eq!(queue.pop(109), None);
        assert_eq!(queue.pop(110), Some(ID));
        assert_eq!(queue.judge(ID, &mut wait, &limits, 110, false, false), None);
        assert_eq!(queue.next(), Some(1020));
        assert_eq!(queue.pop(1020), Some(ID));
        assert_eq!(queue.judge(ID, &mut wait, &limits, 1020, false, false), Some(CloseReason::Idle));
        queue.keep(ID, &mut wait, &limits, false);
        queue.forget(ID, &mut wait);
        assert_eq!(queue.next(), None);
    }
}
