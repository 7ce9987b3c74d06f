//! A file on its way in: the content of a `SEND FILE` line is decoded as it comes, and handed on a block at a time.
//!
//! A small file comes whole with its line and goes into the journal at once, without any of this (see
//! [`crate::command::handle`]). Every other one, known by its line being too long for a small file, is written to the disk
//! while it comes, and listed once all of it is durable there. An upload holds one block that it fills, and a few that
//! are being written; while all are full, its peer is not read.

use crate::buffer::ReadBuffer;
use crate::command;
use crate::connection::{Connection, Phase};
use crate::content::{ContentError, ContentReader};
use crate::engine::{Host, Job};
use crate::files::{FileJob, TransferId};
use crate::refusal::Refusal;
use crate::serve::Step;
use crate::service::{Service, Storing};
use crate::transfer::{BLOCK_BYTES, Direction, Envelope};
use crate::verb::Spec;

/// What its connection reads at once.
pub(crate) const READ_BYTES: usize = 64 * 1024;
/// Blocks on their way to the disk at once. With one, the disk would wait for the loop to fill the next as often as the loop
/// waits for the disk.
const BLOCKS_OUT_MAX: usize = 3;
const _: () = assert!(READ_BYTES + (BLOCKS_OUT_MAX + 1) * BLOCK_BYTES <= 256 * 1024);

/// A file on its way in.
#[derive(Debug)]
pub struct Upload {
    /// Its name among the file jobs.
    pub(crate) transfer: TransferId,
    /// How it was asked for.
    pub(crate) spec: &'static Spec,
    /// Who, to whom, and what it is called.
    pub(crate) envelope: Envelope,
    content: ContentReader,
    /// Decoded bytes that are not yet on their way to the disk.
    block: Vec<u8>,
    /// Decoded bytes in all; they are counted among what is incoming.
    pub(crate) bytes: u64,
    /// Blocks that are on their way to the disk.
    blocks_out: usize,
    /// The end of the line has been seen.
    pub(crate) is_complete: bool,
}

impl Upload {
    /// A block is on the disk; its memory is used again.
    pub(crate) fn appended(&mut self, spare: Vec<u8>) {
        self.blocks_out -= 1;
        if self.block.capacity() == 0 {
            self.block = spare;
        }
    }

    /// The memory of its blocks.
    pub(crate) fn held_bytes(&self) -> usize {
        self.block.capacity() + self.blocks_out * BLOCK_BYTES
    }

    fn send_block(&mut self, host: &mut impl Host) {
        self.blocks_out += 1;
        let block = std::mem::take(&mut self.block);
        host.submit(Job::File(FileJob::Append(self.transfer, block)));
    }
}

impl Service {
    /// From here on, what the connection sends is the content.
    pub(crate) fn begin_upload(&mut self, connection: &mut Connection, spec: &'static Spec, envelope: Envelope) {
        let Some(transfer) = self.transfers.begin(Direction::Upload, envelope.from, connection.id, &self.limits) else {
            return self.refuse(connection, Refusal::ServerBusy, Some(spec));
        };
        connection.phase = Phase::Upload(Box::new(Upload {
            transfer,
            spec,
            envelope,
            content: ContentReader::default(),
            block: Vec::new(),
            bytes: 0,
            blocks_out: 0,
            is_complete: false,
        }));
    }

    /// Ends an upload of which nothing is kept.
    pub(crate) fn forget_upload(
        &mut self,
        transfer: TransferId,
        envelope: &Envelope,
        bytes: u64,
        host: &mut impl Host,
    ) {
        self.transfers.abandon(transfer);
        self.incoming.remove(envelope.from, bytes);
        host.submit(Job::File(FileJob::Forget(transfer)));
    }

    /// So much of the line is thrown away after an upload was refused: what the peer may have on its way in good faith.
    pub(crate) fn upload_discard_bytes(&self) -> u64 {
        let encoded = self.limits.file_bytes_max.div_ceil(3).saturating_mul(4);
        encoded.saturating_add(self.limits.discard_bytes_max)
    }
}

/// Takes more of a file's content, and sends on what is a block.
pub(crate) fn step(
    buffer: &mut ReadBuffer,
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
) -> Step {
    let block_bytes = service.block_bytes;
    let Phase::Upload(upload) = &mut connection.phase else { return Step::Starved };
    if upload.is_complete {
        return store(connection, service, host);
    }
    if upload.block.len() >= block_bytes {
        if upload.blocks_out >= BLOCKS_OUT_MAX {
            return Step::Waiting;
        }
        upload.send_block(host);
    }
    // A block is never moved to make it larger: that would take the memory of three.
    upload.block.reserve_exact(block_bytes - upload.block.len());
    let pending = buffer.pending();
    let room = (block_bytes - upload.block.len()) / 3 * 4;
    let before = upload.block.len();
    let read = if pending.is_empty() && connection.is_ended {
        // The line end is what tells a file that is whole from an upload that broke off.
        Err(ContentError::Missing)
    } else {
        upload.content.read(&pending[..pending.len().min(room.max(1))], &mut upload.block)
    };
    let decoded = (upload.block.len() - before) as u64;
    upload.bytes += decoded;
    connection.progress += decoded;
    service.incoming.add(upload.envelope.from, decoded);
    let Upload { envelope, bytes, spec, .. } = &**upload;
    let refusal = match read {
        Ok(taken) => {
            let (state, limits, incoming) = (&service.state, &service.limits, &service.incoming);
            match command::check_size(state, limits, incoming, envelope, *bytes, *bytes) {
                Ok(()) => {
                    upload.is_complete = upload.content.is_ended();
                    let is_starved = taken == 0 && !upload.is_complete;
                    buffer.consume(taken);
                    return if is_starved { Step::Starved } else { Step::Done };
                }
                Err(refusal) => refusal,
            }
        }
        Err(error) => error.refusal(spec),
    };
    refuse(connection, service, host, refusal)
}

/// The content is whole: the last block and the order to store it go out, one behind the other.
fn store(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Step {
    let Phase::Upload(upload) = std::mem::replace(&mut connection.phase, Phase::Storing) else { return Step::Starved };
    let Upload { transfer, spec, envelope, block, bytes, .. } = *upload;
    let file = service.next_file();
    host.submit(Job::File(FileJob::Append(transfer, block)));
    host.submit(Job::File(FileJob::Store(transfer, file)));
    service.storing.insert(transfer, Storing { spec, envelope, bytes, file });
    Step::Waiting
}

/// Ends an upload with nothing stored. The rest of its line is thrown away.
fn refuse(connection: &mut Connection, service: &mut Service, host: &mut impl Host, refusal: Refusal) -> Step {
    let discard = Phase::Discard(service.upload_discard_bytes());
    let Phase::Upload(upload) = std::mem::replace(&mut connection.phase, discard) else { return Step::Starved };
    service.forget_upload(upload.transfer, &upload.envelope, upload.bytes, host);
    service.refuse(connection, refusal, Some(upload.spec));
    Step::Done
}
