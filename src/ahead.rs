//! Looking ahead: when a connection has sent several requests at once, they are parsed and their receivers looked up side
//! by side, before the first is handled.
//!
//! With many users neither a receiver's name nor his mailbox is in the processor's caches. One message that is handled after
//! the other waits for both; looked up in a row, they are waited for together. With few it would cost more than it gains.

use std::hint;

use crate::buffer::ReadBuffer;
use crate::change::UserId;
use crate::mailbox::Mailbox;
use crate::request::{self, Fault, Request};
use crate::state::State;
use crate::verb::{Audience, Verb};

/// From so many users on, what messages need of them is more than a core's own caches hold.
pub(crate) const USERS_MIN: usize = 4096;
/// A line that is longer is not looked at ahead, nor is what follows it: what is not handled then is parsed again.
const LINE_BYTES_MAX: usize = 1024;
/// Requests that are looked at together at most.
const REQUESTS_MAX: usize = 16;

/// A line that is there whole, until it is handled.
pub(crate) struct Ahead<'r> {
    /// The line with its end.
    pub(crate) whole: &'r [u8],
    /// What it asks for; nothing if it is blank.
    pub(crate) parsed: Option<Result<Request<'r>, Fault>>,
    /// The user whom the request names as the receiver of a message, as long as no account comes or goes.
    pub(crate) receiver: Option<UserId>,
}

/// The requests that come next, in order.
pub(crate) type Requests<'r> = [Option<Ahead<'r>>; REQUESTS_MAX];

/// None yet.
pub(crate) const fn none<'r>() -> Requests<'r> {
    [const { None }; REQUESTS_MAX]
}

/// True when two short requests are there whole; one alone gains nothing.
pub(crate) fn is_two(read: &ReadBuffer, line_bytes_max: usize) -> bool {
    read.lines(line_bytes_max.min(LINE_BYTES_MAX)).nth(1).is_some()
}

/// Puts the requests that come next into `ahead`, as far as they are whole, `count` at most.
pub(crate) fn look<'r>(
    ahead: &mut Requests<'r>,
    read: &'r ReadBuffer,
    line_bytes_max: usize,
    count: usize,
    audience: Audience,
    state: &State,
) {
    for (place, (line, whole)) in ahead.iter_mut().zip(read.lines(line_bytes_max.min(LINE_BYTES_MAX)).take(count)) {
        let parsed = (!request::is_blank(line)).then(|| request::parse(line, audience));
        *place = Some(Ahead { whole, parsed, receiver: None });
    }
    for next in ahead.iter_mut().flatten() {
        if let Some(Ok(request)) = &next.parsed
            && request.verb() == Verb::SendMessage
        {
            next.receiver = state.user_named(request.parameter(1));
        }
    }
    let mailboxes = ahead.iter().flatten().filter_map(|next| state.mailbox(next.receiver?));
    hint::black_box(mailboxes.map(Mailbox::bytes).fold(0, u64::wrapping_add));
}

/// True for requests that neither make an account nor remove one.
pub(crate) fn keeps_accounts(verb: Verb) -> bool {
    matches!(verb, Verb::SendMessage | Verb::SendGroupMessage | Verb::Inbox | Verb::Ping)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Change, Lsn, Place};

    const LINES: &[u8] = b"SEND MESSAGE t messi hi\r\n\nINBOX t\nSEND MESSAGE t nobody x\nsend t messi y\nSEND MESS";

    fn filled(bytes: &[u8]) -> ReadBuffer {
        let mut read = ReadBuffer::default();
        read.room()[..bytes.len()].copy_from_slice(bytes);
        read.fill(bytes.len());
        read
    }

    #[test]
    fn whole_lines_are_parsed_in_order_and_receivers_that_there_are_looked_up() {
        let (mut state, user) = (State::new(1 << 20), UserId(3));
        let place = Place { lsn: Lsn(8), bytes: 16 };
        state.apply(&Change::UserAdded { user, name: "messi", password_hash: "" }, place);
        let read = filled(LINES);
        let mut ahead = none();
        look(&mut ahead, &read, 100, 100, Audience::Client, &state);
        let whole: Vec<u8> = ahead.iter().flatten().flat_map(|next| next.whole.iter().copied()).collect();
        assert_eq!(whole, &LINES[..LINES.len() - "SEND MESS".len()]);
        let receivers: Vec<Option<UserId>> = ahead.iter().flatten().map(|next| next.receiver).collect();
        assert_eq!(receivers, [Some(user), None, None, None, Some(user)]);
        let verbs: Vec<Option<Verb>> =
            ahead.iter().flatten().map(|next| Some(next.parsed.as_ref()?.as_ref().ok()?.verb())).collect();
        let message = Some(Verb::SendMessage);
        assert_eq!(verbs, [message, None, Some(Verb::Inbox), message, message]);
    }

    #[test]
    fn there_are_bounds_to_it() {
        let state = State::new(1 << 20);
        let count = |bytes: &[u8], count| {
            let (read, mut ahead) = (filled(bytes), none());
            look(&mut ahead, &read, 100, count, Audience::Client, &state);
            ahead.iter().flatten().count()
        };
        assert_eq!((count(LINES, 1), count(LINES, 2), count(b"", 16)), (1, 2, 0));
        assert_eq!(count(&b"PING\n".repeat(40), 100), REQUESTS_MAX);
        assert!(is_two(&filled(b"PING\nPING\n"), 100));
        assert!(!is_two(&filled(b"PING\nPING"), 100) && !is_two(&filled(b"PING\nPING\n"), 3));
    }
}
