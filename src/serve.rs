//! Serving one connection within its share of a turn: read, cut into lines, handle, and have the content of files moved,
//! until nothing is there, something must be waited for, or the share is used up.

use std::io::ErrorKind;

use crate::ahead::{self, Ahead};
use crate::buffer::{Line, ReadBuffer, Spares};
use crate::command;
use crate::connection::{CloseReason, Connection, Phase};
use crate::content;
use crate::deadline::{PROGRESS_BYTES, Stage};
use crate::download;
use crate::engine::Host;
use crate::limits::Limits;
use crate::refusal::Refusal;
use crate::request::{self, Fault, Request};
use crate::service::Service;
use crate::upload;

/// What a peer may still send while the server stops: about as much as may be on its way when the stop begins.
const STOP_READ_BYTES_MAX: u64 = 1024 * 1024;
/// What stands before the content in the line of a file is no longer than this, whatever its names.
const HEAD_BYTES_MAX: usize = 1024;

/// Where serving a connection stopped.
#[derive(PartialEq, Eq)]
pub(crate) enum Stop {
    /// It goes on when something comes: bytes, room to write, a completion.
    Waiting,
    /// It goes on in a turn in which what takes long is done.
    Budget,
    /// It goes on when the journal has room.
    NoRoom,
}

/// What a connection gets of a turn.
pub(crate) struct Budget {
    /// So many bytes, read and made.
    share: u64,
    /// What is used of them; one long answer may take more.
    pub(crate) used: u64,
    /// So many more requests.
    requests: usize,
    /// With more than this that its peer has not taken, it must wait.
    backlog_max: usize,
}

impl Budget {
    /// A fresh one of so many bytes.
    pub(crate) fn new(share: u64, limits: &Limits) -> Self {
        let backlog_max = usize::try_from(limits.output_bytes_high).unwrap_or(usize::MAX);
        Self { share, used: 0, requests: limits.requests_per_turn_max, backlog_max }
    }

    /// Counts what a step has made. True when that was the last.
    fn count(&mut self, connection: &mut Connection, service: &mut Service) -> bool {
        let made = connection.take_output_made() + std::mem::take(&mut service.work_bytes);
        self.used += made;
        made > 0 && self.is_used()
    }

    fn is_used(&self) -> bool {
        self.used >= self.share
    }

    /// What must come before anything more is done for the connection.
    fn hindrance(&self, connection: &Connection, service: &Service) -> Option<Stop> {
        if service.log.must_wait() {
            Some(Stop::NoRoom)
        } else if connection.write.backlog() > self.backlog_max {
            Some(Stop::Waiting)
        } else {
            None
        }
    }
}

/// Serves what a connection has sent, and reads more, until nothing is there, something must be waited for, or its share
/// of the turn is used up. `read` is the connection's buffer, set aside, since lines are borrowed from it while they are handled.
pub(crate) fn serve_within_budget(
    read: &mut ReadBuffer,
    connection: &mut Connection,
    service: &mut Service,
    spare_buffers: &mut Spares,
    host: &mut impl Host,
    is_stopping: bool,
    budget: &mut Budget,
) -> Result<Stop, CloseReason> {
    connection.is_starved = false;
    loop {
        while budget.requests > 0 {
            if let Some(stop) = budget.hindrance(connection, service) {
                return Ok(stop);
            }
            let step = step(read, connection, service, host, budget);
            let is_last = budget.count(connection, service);
            let step = step?;
            if is_last {
                return Ok(Stop::Budget);
            }
            match step {
                Step::Done => budget.requests -= 1,
                Step::Waiting => return Ok(Stop::Waiting),
                Step::Starved => break,
                Step::Long => return Ok(Stop::Budget),
            }
        }
        if budget.requests == 0 || budget.is_used() {
            return Ok(Stop::Budget);
        }
        if connection.is_ended {
            return Err(CloseReason::Ended);
        }
        if !connection.is_readable {
            connection.is_starved = true;
            return if is_stopping { Err(CloseReason::ServerStops) } else { Ok(Stop::Waiting) };
        }
        if is_stopping && connection.read_in_stop > STOP_READ_BYTES_MAX {
            return Err(CloseReason::ServerStops);
        }
        let count = fill(read, connection, spare_buffers, host)?;
        budget.used += count;
        connection.read_in_stop += if is_stopping { count } else { 0 };
    }
}

/// Throws away what a connection still sends though it is not served any more.
pub(crate) fn discard_input(
    read: &mut ReadBuffer,
    connection: &mut Connection,
    spare_buffers: &mut Spares,
    host: &mut impl Host,
    budget: &mut Budget,
) -> Result<Stop, CloseReason> {
    loop {
        let pending = read.pending().len();
        read.consume(pending);
        if connection.is_ended || !connection.is_readable {
            return Ok(Stop::Waiting);
        }
        if budget.is_used() {
            return Ok(Stop::Budget);
        }
        budget.used += fill(read, connection, spare_buffers, host)?;
    }
}

/// Reads once. Says how many bytes came.
fn fill(
    read: &mut ReadBuffer,
    connection: &mut Connection,
    spare_buffers: &mut Spares,
    host: &mut impl Host,
) -> Result<u64, CloseReason> {
    if !read.has_memory() {
        read.adopt(spare_buffers.take().unwrap_or_default());
    }
    if matches!(connection.phase, Phase::Upload(_)) {
        read.fit(upload::READ_BYTES);
    }
    match host.read(connection.id, read.room()) {
        Ok(0) => {
            connection.is_ended = true;
            Ok(0)
        }
        Ok(count) => {
            read.fill(count);
            Ok(count as u64)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            connection.is_readable = false;
            Ok(0)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
        Err(_) => Err(CloseReason::Lost),
    }
}

/// What one step of a connection came to.
pub(crate) enum Step {
    /// Something was done, and there may be more.
    Done,
    /// A completion or room to write must come first.
    Waiting,
    /// More bytes must come first.
    Starved,
    /// It takes long, so a long turn must come first.
    Long,
}

fn step(
    read: &mut ReadBuffer,
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
    budget: &mut Budget,
) -> Result<Step, CloseReason> {
    match connection.phase {
        Phase::Requests => Ok(next_requests(read, connection, service, host, budget)),
        Phase::Upload(_) => Ok(upload::step(read, connection, service, host)),
        Phase::Download(_) => download::step(connection, service, host),
        Phase::Discard(left) => discard_step(read, connection, left),
        Phase::Password(_) | Phase::Inbox(_) | Phase::SmallDownload(_) | Phase::Storing => Ok(Step::Waiting),
    }
}

/// Handles several requests that are there, or one.
fn next_requests(
    read: &mut ReadBuffer,
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
    budget: &mut Budget,
) -> Step {
    let line_bytes_max = usize::try_from(service.limits.line_bytes_max).unwrap_or(usize::MAX - 1);
    // Whoever has never shown a token learns nothing of accounts, not even by the time that it takes.
    let may_look = connection.user.is_some() && service.state.users_count() >= service.ahead_users_min;
    if !may_look || budget.requests < 2 || !ahead::is_two(read, line_bytes_max) {
        return next_request(read, line_bytes_max, connection, service, host);
    }
    let mut ahead = ahead::none();
    ahead::look(&mut ahead, read, line_bytes_max, budget.requests, connection.peer.audience(), &service.state);
    let (mut taken, mut step, mut is_known) = (0, Step::Done, true);
    for (number, Ahead { whole, parsed, receiver }) in ahead.iter().flatten().enumerate() {
        if number > 0 {
            if budget.count(connection, service) {
                step = Step::Long;
                break;
            }
            if !matches!(connection.phase, Phase::Requests) || budget.hindrance(connection, service).is_some() {
                break;
            }
            budget.requests -= 1;
        }
        let Some(parsed) = parsed else {
            taken += whole.len();
            continue;
        };
        service.receiver = receiver.filter(|_| is_known);
        is_known &= parsed.as_ref().is_ok_and(|request| ahead::keeps_accounts(request.verb()));
        match handle_parsed(connection, service, host, parsed, whole) {
            Some(count) => taken += count,
            None => {
                step = Step::Long;
                break;
            }
        }
    }
    read.consume(taken);
    step
}

fn next_request(
    read: &mut ReadBuffer,
    line_bytes_max: usize,
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
) -> Step {
    let line = match read.line(line_bytes_max) {
        Line::Partial if connection.is_ended && !read.pending().is_empty() => read.last_line(line_bytes_max),
        line => line,
    };
    match line {
        Line::Partial if is_file_under_way(read.pending(), connection, service) => {
            match begin_file(connection, service, host, read.pending()) {
                Some(taken) => read.consume(taken),
                None => return Step::Starved,
            }
        }
        Line::Partial => return Step::Starved,
        Line::Whole { content, length } => {
            let whole = read.pending().get(..length).unwrap_or_default();
            match handle_line(connection, service, host, read.slice(content), whole) {
                Some(taken) => read.consume(taken),
                None => return Step::Long,
            }
        }
        Line::TooLong => {
            // More lines may stand behind it in the buffer.
            let start = read.pending().split(|byte| *byte == b'\n').next().unwrap_or_default();
            let taken = handle_long_line(connection, service, host, start);
            read.consume(taken);
        }
    }
    Step::Done
}

/// True when what is there of a line says that it carries a file, and is already longer than a small file's can be.
fn is_file_under_way(pending: &[u8], connection: &Connection, service: &Service) -> bool {
    pending.len() > HEAD_BYTES_MAX + content::encoded_bytes(service.limits.small_file_bytes())
        && request::carries_file(pending, connection.peer.audience())
}

/// Handles a whole line: `line` without its line end, `whole` with it. Says how many bytes were used: all, for a file that is
/// not small those before its content, and none if it must come again in a long turn.
fn handle_line(
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
    line: &[u8],
    whole: &[u8],
) -> Option<usize> {
    if request::is_blank(line) {
        return Some(whole.len());
    }
    handle_parsed(connection, service, host, &request::parse(line, connection.peer.audience()), whole)
}

/// The same for a line that has been parsed and is not blank.
fn handle_parsed(
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
    parsed: &Result<Request<'_>, Fault>,
    whole: &[u8],
) -> Option<usize> {
    connection.wait.reach(Stage::Stranger);
    connection.progress += PROGRESS_BYTES;
    match parsed {
        Ok(request) => {
            let content = request.content_at.and_then(|at| whole.get(at..));
            // Without its line end it may be an upload that broke off, and is told so like any other.
            let is_small = |content: &&[u8]| {
                content.ends_with(b"\n") && content::decoded_bytes(content) <= service.limits.small_file_bytes()
            };
            let small = content.filter(is_small);
            if !service.answer(connection, request.spec, host, |context| command::handle(context, request, small)) {
                return None;
            }
            Some(match (request.content_at, &connection.phase) {
                (Some(content_at), Phase::Upload(_)) => content_at,
                _ => whole.len(),
            })
        }
        Err(fault) => {
            service.refuse(connection, fault.refusal, fault.spec);
            Some(whole.len())
        }
    }
}

/// Handles the beginning of a line that carries a file which is not small. Says how many bytes were used; none if the head
/// of the line is not there yet, or not right.
fn begin_file(connection: &mut Connection, service: &mut Service, host: &mut impl Host, start: &[u8]) -> Option<usize> {
    let request = request::parse(start, connection.peer.audience()).ok()?;
    let content_at = request.content_at?;
    connection.wait.reach(Stage::Stranger);
    service.answer(connection, request.spec, host, |context| command::handle(context, &request, None));
    if !matches!(connection.phase, Phase::Upload(_)) {
        // A peer that may send files has this one on its way in good faith; others have less patience coming.
        let is_known = command::is_authorised(&service.state, request.parameter(0), service.now.utc_ms);
        let discard = if is_known { service.upload_discard_bytes() } else { service.limits.discard_bytes_max };
        connection.phase = Phase::Discard(discard);
    }
    Some(content_at)
}

/// Handles the beginning of a line that is longer than a request may be: only the content of a file may. Says how many
/// bytes were used.
fn handle_long_line(connection: &mut Connection, service: &mut Service, host: &mut impl Host, start: &[u8]) -> usize {
    if let Some(taken) = begin_file(connection, service, host, start) {
        return taken;
    }
    let spec = match request::parse(start, connection.peer.audience()) {
        Ok(request) => Some(request.spec),
        Err(fault) => fault.spec,
    };
    service.refuse(connection, Refusal::LineTooLong, spec);
    connection.phase = Phase::Discard(service.limits.discard_bytes_max);
    0
}

/// Throws away the rest of a line.
fn discard_step(read: &mut ReadBuffer, connection: &mut Connection, left: u64) -> Result<Step, CloseReason> {
    let pending = read.pending();
    if pending.is_empty() {
        return Ok(Step::Starved);
    }
    let end = memchr::memchr(b'\n', pending);
    let count = end.unwrap_or(pending.len());
    let left = left.checked_sub(count as u64).ok_or(CloseReason::LineWithoutEnd)?;
    connection.progress += count as u64;
    read.consume(count + usize::from(end.is_some()));
    match end {
        Some(_) => {
            connection.phase = Phase::Requests;
            Ok(Step::Done)
        }
        None => {
            connection.phase = Phase::Discard(left);
            Ok(Step::Starved)
        }
    }
}
