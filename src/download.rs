//! A file on its way out: a block at a time is read and encoded into the write buffer, and the next once that is written.
//!
//! What the system has in memory is read at once, between two other requests. What it would have to wait for is read by the
//! files thread, while the loop goes on. The first block always is, since that opens the file: from then on it stays what it
//! was, whatever becomes of its name. A small file stands in the journal, and its reply is written whole.

use crate::change::{Change, FileId, Kept, Lsn, Place, UserId};
use crate::connection::{CloseReason, Connection, Phase};
use crate::content;
use crate::engine::{Host, Job};
use crate::files::{self, FileJob, TransferId};
use crate::inbox::TextsJob;
use crate::log::Log;
use crate::record;
use crate::refusal::Refusal;
use crate::reply;
use crate::serve::Step;
use crate::service::Service;
use crate::texts;
use crate::transfer::{BLOCK_BYTES, Direction};
use crate::verb::Spec;

/// A file of its own on its way out.
#[derive(Debug)]
pub struct Download {
    /// Its name among the file jobs.
    pub(crate) transfer: TransferId,
    /// How it was asked for, and by whom.
    pub(crate) spec: &'static Spec,
    pub(crate) user: UserId,
    /// What is sent.
    pub(crate) file: FileId,
    name: Box<str>,
    bytes: u64,
    /// The CRC-32C of all, where it is known, and of what is sent.
    sum: Option<u32>,
    sent_sum: u32,
    /// Decoded bytes that are in the write buffer or beyond.
    sent: u64,
    /// The reply has begun.
    pub(crate) is_begun: bool,
    /// A block is on its way from the disk.
    is_reading: bool,
    /// When in the order of changes the file was stored.
    lsn: Lsn,
}

/// A small file whose record is being read from the disk.
#[derive(Debug)]
pub struct SmallDownload {
    spec: &'static Spec,
    user: UserId,
    file: FileId,
    name: Box<str>,
    place: Place,
    lsn: Lsn,
}

impl Download {
    /// The memory of the block that is read for it.
    pub(crate) fn held_bytes(&self) -> usize {
        if self.is_reading { BLOCK_BYTES } else { 0 }
    }

    /// The size of the next block.
    fn next_bytes(&self, block_bytes: usize) -> usize {
        usize::try_from(self.bytes - self.sent).unwrap_or(block_bytes).min(block_bytes)
    }

    /// Has the next block read from the disk.
    fn have_read(&mut self, block_bytes: usize, host: &mut impl Host) {
        self.is_reading = true;
        let (transfer, file, offset, bytes) = (self.transfer, self.file, self.sent, self.next_bytes(block_bytes));
        host.submit(Job::File(FileJob::Read { transfer, file, offset, bytes }));
    }

    /// Writes a block. Only the last may have a size that is no multiple of three.
    fn write(&mut self, block: &[u8], out: &mut Vec<u8>) {
        if !self.is_begun {
            self.is_begun = true;
            reply::download_start(out, &self.name, self.spec);
        }
        content::encode(block, out);
        self.sent += block.len() as u64;
        self.sent_sum = crc32c::crc32c_append(self.sent_sum, block);
    }
}

impl SmallDownload {
    /// The memory of the record that is read for it.
    pub(crate) fn held_bytes(&self) -> usize {
        self.place.bytes as usize
    }

    /// Writes the whole reply.
    fn write(&self, connection: &mut Connection, content: &[u8], log: &Log) {
        let out = connection.write.out();
        reply::download_start(out, &self.name, self.spec);
        content::encode(content, out);
        reply::download_end(out);
        connection.write.seal(log.unsettled_at(self.lsn));
    }
}

impl Service {
    /// Begins to give out a file, or gives it out.
    pub(crate) fn begin_download(
        &mut self,
        connection: &mut Connection,
        spec: &'static Spec,
        user: UserId,
        file: FileId,
        host: &mut impl Host,
    ) {
        let Some(stored) = self.state.file(file) else {
            return self.refuse(connection, Refusal::NoSuchFile, Some(spec));
        };
        let (name, bytes, lsn) = (stored.name.clone(), stored.bytes, stored.lsn);
        let sum = match stored.kept {
            Kept::Apart { sum } => sum,
            Kept::Journal(place) => {
                let small = SmallDownload { spec, user, file, name, place, lsn };
                return self.begin_small_download(connection, small, host);
            }
        };
        let Some(transfer) = self.transfers.begin(Direction::Download, user, connection.id, &self.limits) else {
            return self.refuse(connection, Refusal::ServerBusy, Some(spec));
        };
        let mut download = Download {
            transfer,
            spec,
            user,
            file,
            name,
            bytes,
            sum,
            sent_sum: 0,
            sent: 0,
            is_begun: false,
            is_reading: false,
            lsn,
        };
        // At once, so that it is open before anything can remove it.
        download.have_read(self.block_bytes, host);
        connection.phase = Phase::Download(Box::new(download));
    }

    /// Ends a download, whole or not.
    pub(crate) fn forget_download(&mut self, download: &Download, host: &mut impl Host) {
        if download.is_reading {
            self.transfers.abandon(download.transfer);
        } else {
            // Nothing is on its way for it, so the next may have its place at once.
            self.transfers.end(download.transfer);
        }
        host.submit(Job::File(FileJob::Forget(download.transfer)));
    }

    fn begin_small_download(&mut self, connection: &mut Connection, small: SmallDownload, host: &mut impl Host) {
        let record = self.log.record(small.place).and_then(record::claimed_body);
        if let Some(content) = record.and_then(|body| Change::decode(body)?.content()) {
            small.write(connection, content, &self.log);
        } else if self.admit_reading(connection.id, small.user, small.held_bytes()) {
            host.submit(Job::Texts(TextsJob { connection: connection.id, places: vec![small.place] }));
            connection.phase = Phase::SmallDownload(Box::new(small));
        } else {
            self.refuse(connection, Refusal::ServerBusy, Some(small.spec));
        }
    }

    /// Goes on with a small file whose record has been read.
    pub(crate) fn small_download_read(
        &mut self,
        connection: &mut Connection,
        small: &SmallDownload,
        read: &std::io::Result<Vec<u8>>,
        host: &mut impl Host,
    ) {
        let record = read.as_deref().unwrap_or_default();
        if let Some(content) = texts::content(record, self.log.layout().salt, small.place) {
            return small.write(connection, content, &self.log);
        }
        let &SmallDownload { spec, user, file, place, .. } = small;
        match self.state.file(file) {
            // It was written again elsewhere meanwhile.
            Some(stored) if stored.kept != Kept::Journal(place) => {
                self.begin_download(connection, spec, user, file, host);
            }
            Some(_) if read.as_ref().is_err_and(files::is_busy) => {
                self.refuse(connection, Refusal::ServerBusy, Some(spec));
            }
            Some(_) => {
                let layout = self.log.layout();
                let (segment, byte) = (layout.segment(place.lsn), layout.offset(place.lsn));
                tracing::error!(
                    segment,
                    byte,
                    "a small file cannot be read; stop the server and use `kurir check DIR --repair`"
                );
                self.refuse(connection, Refusal::NoSuchFile, Some(spec));
            }
            // Whoever listed it has deleted it meanwhile.
            None => self.refuse(connection, Refusal::NoSuchFile, Some(spec)),
        }
    }

    /// Takes a block that the files thread has read.
    pub(crate) fn download_block(&mut self, connection: &mut Connection, block: &[u8]) {
        let Phase::Download(download) = &mut connection.phase else { return };
        download.is_reading = false;
        download.write(block, connection.write.out());
        connection.write.seal(self.log.unsettled_at(download.lsn));
    }
}

/// Writes the next block once the last one is on its way to the peer.
///
/// # Errors
/// What was read is not what was stored, and the reply has begun.
pub(crate) fn step(
    connection: &mut Connection,
    service: &mut Service,
    host: &mut impl Host,
) -> Result<Step, CloseReason> {
    let Phase::Download(download) = &mut connection.phase else { return Ok(Step::Starved) };
    if download.is_reading {
        return Ok(Step::Waiting);
    }
    if download.sent == download.bytes {
        return end(connection, service, host);
    }
    if !connection.write.is_empty() {
        return Ok(Step::Waiting);
    }
    let bytes = download.next_bytes(service.block_bytes);
    service.scratch.resize(service.block_bytes, 0);
    let block = service.scratch.get_mut(..bytes).unwrap_or_default();
    let count = host.read_stored(download.transfer, download.sent, block).unwrap_or(0);
    // What is left of the block may not be in memory.
    let count = if count < bytes { count / 3 * 3 } else { bytes };
    if count == 0 {
        download.have_read(service.block_bytes, host);
        return Ok(Step::Waiting);
    }
    download.write(&block[..count], connection.write.out());
    connection.write.seal(service.log.unsettled_at(download.lsn));
    Ok(Step::Done)
}

/// All is in the write buffer or beyond.
fn end(connection: &mut Connection, service: &mut Service, host: &mut impl Host) -> Result<Step, CloseReason> {
    let Phase::Download(download) = std::mem::take(&mut connection.phase) else { return Ok(Step::Starved) };
    service.forget_download(&download, host);
    if download.sum.is_some_and(|sum| sum != download.sent_sum) {
        // Only the missing end of the reply can still say that it is not what was stored.
        tracing::error!(
            file = download.file.0,
            "a stored file is not what was stored; stop the server and use `kurir check DIR --repair`"
        );
        return Err(CloseReason::FileUnreadable);
    }
    reply::download_end(connection.write.out());
    connection.write.seal(service.log.unsettled_at(download.lsn));
    Ok(Step::Done)
}
