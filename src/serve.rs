//! Serving one connection within its share of a turn: read, cut into lines, handle, and do the same with the content of
//! files, until nothing is there, something must be waited for, or the share is used up.

use std::io::ErrorKind;

use crate::buffer::Line;
use crate::change::FileId;
use crate::command;
use crate::connection::{CloseReason, Connection, Phase};
use crate::content::ContentError;
use crate::engine::{Host, Job};
use crate::files::FileJob;
use crate::refusal::Refusal;
use crate::reply;
use crate::request;
use crate::service::{Service, Storing};
use crate::transfer::{BLOCK_BYTES, Upload};

/// What a peer may still send while the server stops: about as much as may be on its way when the stop begins.
const STOP_READ_BYTES_MAX: u64 = 1024 * 1024;
/// Output waiting for a peer at which a download goes on.
const DOWNLOAD_BACKLOG_MAX: usize = BLOCK_BYTES / 3 * 4;

/// Where serving a connection stopped.
#[derive(PartialEq, Eq)]
pub(crate) enum Stop {
    /// It goes on when something comes: bytes, room to write, a completion.
    Waiting,
    /// It goes on in the next turn.
    Budget,
    /// It goes on when the journal has room.
    NoRoom,
}

/// Serves what a connection has sent, and reads more, until nothing is there, something must be waited for, or its share
/// of the turn is used up.
pub(crate) fn serve_within_budget(
    connection: &mut Connection,
    service: &mut Service,
    spare_buffers: &mut Vec<Vec<u8>>,
    host: &mut impl Host,
    is_stopping: bool,
) -> Result<Stop, CloseReason> {
    let mut requests_left = service.limits.requests_per_turn_max;
    let mut bytes_left = service.limits.read_bytes_per_turn_max;
    let backlog_max = usize::try_from(service.limits.output_bytes_high).unwrap_or(usize::MAX);
    loop {
        while requests_left > 0 {
            if service.log.must_wait() {
                return Ok(Stop::NoRoom);
            }
            if connection.write.backlog() > backlog_max {
                return Ok(Stop::Waiting);
            }
            match step(connection, service, host)? {
                Step::Done => requests_left -= 1,
                Step::Waiting => return Ok(Stop::Waiting),
                Step::Starved => break,
            }
        }
        if requests_left == 0 || bytes_left == 0 {
            return Ok(Stop::Budget);
        }
        if connection.is_ended {
            return Err(CloseReason::Ended);
        }
        if !connection.is_readable {
            return if is_stopping { Err(CloseReason::ServerStops) } else { Ok(Stop::Waiting) };
        }
        if is_stopping && connection.read_in_stop > STOP_READ_BYTES_MAX {
            return Err(CloseReason::ServerStops);
        }
        let count = fill(connection, spare_buffers, host)?;
        bytes_left = bytes_left.saturating_sub(count);
        connection.read_in_stop += if is_stopping { count } else { 0 };
    }
}

/// Throws away what a connection still sends though it is not served any more.
pub(crate) fn discard_input(
    connection: &mut Connection,
    spare_buffers: &mut Vec<Vec<u8>>,
    host: &mut impl Host,
) -> Result<Stop, CloseReason> {
    const READS_PER_TURN_MAX: usize = 16;
    for _ in 0..READS_PER_TURN_MAX {
        let pending = connection.read.pending().len();
        connection.read.consume(pending);
        if connection.is_ended || !connection.is_readable {
            return Ok(Stop::Waiting);
        }
        fill(connection, spare_buffers, host)?;
    }
    Ok(Stop::Budget)
}

/// Reads once. Says how many bytes came.
fn fill(
    connection: &mut Connection,
    spare_buffers: &mut Vec<Vec<u8>>,
    host: &mut impl Host,
) -> Result<u64, CloseReason> {
    if !connection.read.has_memory() {
        connection.read.adopt(spare_buffers.pop().unwrap_or_default());
    }
    match host.read(connection.id, connection.read.room()) {
        Ok(0) => {
            connection.is_ended = true;
            Ok(0)
        }
        Ok(count) => {
            connection.read.fill(count);
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
enum Step {
    /// Something was done, and there may be more.
    Done,
    /// A completion or room to write must come first.
    Waiting,
    /// More bytes must come first.
    Starved,
}

fn step(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Result<Step, CloseReason> {
    match connection.phase {
        Phase::Requests => Ok(next_request(connection, service, host)),
        Phase::Upload(_) => Ok(upload_step(connection, service, host)),
        Phase::Download(_) => Ok(download_step(connection, service, host)),
        Phase::Discard(left) => discard_step(connection, left),
        Phase::Password(_) | Phase::Inbox(_) | Phase::Storing => Ok(Step::Waiting),
    }
}

fn next_request(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Step {
    let line_bytes_max = usize::try_from(service.limits.line_bytes_max).unwrap_or(usize::MAX - 1);
    let line = match connection.read.line(line_bytes_max) {
        Line::Partial if connection.is_ended && !connection.read.pending().is_empty() => {
            connection.read.last_line(line_bytes_max)
        }
        line => line,
    };
    match line {
        Line::Partial => Step::Starved,
        Line::Whole { content, length } => {
            // The line is borrowed from the buffer while it is handled, so the buffer is set aside.
            let read = std::mem::take(&mut connection.read);
            let taken = handle_line(connection, service, host, read.slice(content), length);
            connection.read = read;
            connection.read.consume(taken);
            Step::Done
        }
        Line::TooLong => {
            let read = std::mem::take(&mut connection.read);
            // More lines may stand behind it in the buffer.
            let start = read.pending().split(|byte| *byte == b'\n').next().unwrap_or_default();
            let taken = handle_long_line(connection, service, host, start);
            connection.read = read;
            connection.read.consume(taken);
            Step::Done
        }
    }
}

/// Handles a whole line. Says how many of the line's `length` bytes were used: all, or for a file those before its content.
fn handle_line(
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
    line: &[u8],
    length: usize,
) -> usize {
    if request::is_blank(line) {
        return length;
    }
    match request::parse(line, connection.peer.audience()) {
        Ok(request) => {
            service.answer(connection, request.spec, host, |context| command::handle(context, &request));
            match (request.content_at, &mut connection.phase) {
                (Some(content_at), Phase::Upload(upload)) => {
                    upload.is_short = true;
                    content_at
                }
                _ => length,
            }
        }
        Err(fault) => {
            service.refuse(connection, fault.refusal, fault.spec);
            length
        }
    }
}

/// Handles the beginning of a line that is longer than a request may be: only the content of a file may. Says how many
/// bytes were used.
fn handle_long_line(connection: &mut Connection, service: &mut Service, host: &mut impl Host, start: &[u8]) -> usize {
    let parsed = request::parse(start, connection.peer.audience());
    if let Ok(request) = &parsed
        && let Some(content_at) = request.content_at
    {
        service.answer(connection, request.spec, host, |context| command::handle(context, request));
        if !matches!(connection.phase, Phase::Upload(_)) {
            // A peer that may send files has this one on its way in good faith; others have less patience coming.
            let is_known = command::is_authorised(&service.state, request.parameter(0), service.now);
            let discard = if is_known { service.upload_discard_bytes() } else { service.limits.discard_bytes_max };
            connection.phase = Phase::Discard(discard);
        }
        return content_at;
    }
    let spec = match &parsed {
        Ok(request) => Some(request.spec),
        Err(fault) => fault.spec,
    };
    service.refuse(connection, Refusal::LineTooLong, spec);
    connection.phase = Phase::Discard(service.limits.discard_bytes_max);
    0
}

/// Throws away the rest of a line.
fn discard_step(connection: &mut Connection, left: u64) -> Result<Step, CloseReason> {
    let pending = connection.read.pending();
    if pending.is_empty() {
        return Ok(Step::Starved);
    }
    let end = memchr::memchr(b'\n', pending);
    let count = end.unwrap_or(pending.len());
    let left = left.checked_sub(count as u64).ok_or(CloseReason::LineWithoutEnd)?;
    connection.read.consume(count + usize::from(end.is_some()));
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

/// Takes more of a file's content, and sends on what is a block.
fn upload_step(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Step {
    let Phase::Upload(upload) = &mut connection.phase else { return Step::Starved };
    if upload.is_complete {
        return upload_end(connection, service, host);
    }
    if upload.block.len() >= BLOCK_BYTES {
        if upload.is_writing {
            return Step::Waiting;
        }
        send_block(upload, host);
    }
    let pending = connection.read.pending();
    let room = (BLOCK_BYTES - upload.block.len()) / 3 * 4 + 4;
    let input = &pending[..pending.len().min(room)];
    let before = upload.block.len();
    let read = if pending.is_empty() && connection.is_ended {
        // A line as short as any other may end with the stream like any other. A long one whose end never came is an
        // upload that broke off.
        let ended = if upload.is_short { upload.content.finish() } else { Err(ContentError::Missing) };
        ended.map(|()| 0)
    } else {
        upload.content.read(input, &mut upload.block)
    };
    upload.bytes += (upload.block.len() - before) as u64;
    let refusal = match read {
        Ok(_) if upload.bytes > upload.envelope.bytes_max => upload.envelope.over,
        Ok(taken) => {
            upload.is_complete = upload.content.is_ended();
            let is_starved = taken == 0 && !upload.is_complete;
            connection.read.consume(taken);
            return if is_starved { Step::Starved } else { Step::Done };
        }
        Err(ContentError::Base64) => Refusal::InvalidBase64,
        Err(ContentError::Excess) => Refusal::Excess(upload.spec),
        Err(ContentError::Missing) => Refusal::Incomplete(upload.spec),
    };
    upload_refused(connection, service, host, refusal)
}

fn send_block(upload: &mut Upload, host: &mut impl Host) {
    upload.is_writing = true;
    let block = std::mem::take(&mut upload.block);
    host.submit(Job::File(FileJob::Append(upload.transfer, block)));
}

/// The content is whole: the last block and the order to store it go out, one behind the other.
fn upload_end(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Step {
    let Phase::Upload(upload) = std::mem::replace(&mut connection.phase, Phase::Storing) else { return Step::Starved };
    let Upload { transfer, spec, envelope, block, bytes, .. } = *upload;
    let file = FileId(service.files_next);
    service.files_next += 1;
    host.submit(Job::File(FileJob::Append(transfer, block)));
    host.submit(Job::File(FileJob::Store(transfer, file)));
    service.storing.insert(transfer, Storing { spec, envelope, bytes, file });
    Step::Waiting
}

/// Ends an upload with nothing stored. The rest of its line is thrown away.
fn upload_refused(connection: &mut Connection, service: &mut Service, host: &mut impl Host, refusal: Refusal) -> Step {
    let discard = Phase::Discard(service.upload_discard_bytes());
    let Phase::Upload(upload) = std::mem::replace(&mut connection.phase, discard) else { return Step::Starved };
    service.forget(upload.transfer, true, host);
    service.refuse(connection, refusal, Some(upload.spec));
    Step::Done
}

/// Asks for the next block of a download once the last one is on its way to the peer.
fn download_step(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Step {
    let Phase::Download(download) = &mut connection.phase else { return Step::Starved };
    if download.is_reading {
        return Step::Waiting;
    }
    if download.is_begun && download.sent == download.bytes {
        let (transfer, lsn) = (download.transfer, download.lsn);
        reply::download_end(connection.write.out());
        connection.write.seal(service.log.unsettled_at(lsn));
        connection.phase = Phase::Requests;
        service.forget(transfer, false, host);
        return Step::Done;
    }
    // The first block is asked for at once, so that the file is open whatever becomes of its name.
    if download.is_begun && connection.write.backlog() >= DOWNLOAD_BACKLOG_MAX {
        return Step::Waiting;
    }
    download.is_reading = true;
    let (transfer, file, offset, bytes) = (download.transfer, download.file, download.sent, download.next_bytes());
    host.submit(Job::File(FileJob::Read { transfer, file, offset, bytes }));
    Step::Waiting
}
