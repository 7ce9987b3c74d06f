//! Files as streams: what a `SEND FILE` line carries is decoded as it comes, what `DOWNLOAD FILE` gives is encoded as it
//! leaves, a block at a time. Small or large, every file goes this one way. No sockets and no disk here.

use crate::change::Lsn;
use crate::change::{FileId, Target, UserId};
use crate::content::ContentReader;
use crate::files::TransferId;
use crate::refusal::Refusal;
use crate::verb::Spec;

/// Decoded bytes in a block. A multiple of three, so that every block but the last encodes without padding.
pub const BLOCK_BYTES: usize = 48 * 1024;

/// A file on its way in.
#[derive(Debug)]
pub struct Upload {
    /// Its name among the file jobs.
    pub transfer: TransferId,
    /// How it was asked for.
    pub spec: &'static Spec,
    /// Who, to whom, and what it is called.
    pub envelope: Envelope,
    /// The content so far.
    pub content: ContentReader,
    /// Decoded bytes that are not yet on their way to the disk.
    pub block: Vec<u8>,
    /// Decoded bytes in all.
    pub bytes: u64,
    /// A block is on its way to the disk.
    pub is_writing: bool,
    /// The end of the line has been seen.
    pub is_complete: bool,
    /// The whole line was there at once, so the end of the stream may end it.
    pub is_short: bool,
}

/// What an upload is, but for its content.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Who sends it.
    pub from: UserId,
    /// To whom.
    pub to: Target,
    /// Its name.
    pub name: Box<str>,
    /// The most bytes it may have.
    pub bytes_max: u64,
    /// The answer if it has more.
    pub over: Refusal,
}

/// A file on its way out.
#[derive(Debug)]
pub struct Download {
    /// Its name among the file jobs.
    pub transfer: TransferId,
    /// How it was asked for.
    pub spec: &'static Spec,
    /// What is sent.
    pub file: FileId,
    /// Its name.
    pub name: Box<str>,
    /// Its size.
    pub bytes: u64,
    /// Decoded bytes that are in the write buffer or beyond.
    pub sent: u64,
    /// The reply has begun.
    pub is_begun: bool,
    /// A block is on its way from the disk.
    pub is_reading: bool,
    /// When in the order of changes the file was stored.
    pub lsn: Lsn,
}

impl Download {
    /// The size of the next block.
    #[must_use]
    pub fn next_bytes(&self) -> usize {
        usize::try_from(self.bytes - self.sent).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES)
    }
}
