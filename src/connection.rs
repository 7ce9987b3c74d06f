//! One peer: its buffers, and what it is waiting for.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;

use crate::buffer::{ReadBuffer, WriteBuffer};
use crate::change::{Lsn, UserId};
use crate::command::Pending;
use crate::download::{Download, SmallDownload};
use crate::inbox::Inbox;
use crate::upload::Upload;
use crate::verb::Audience;

/// A connection's place in the slab, and which of all that ever had the place it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId {
    /// The place.
    pub slot: u32,
    /// Grows with every connection.
    pub generation: u32,
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Somebody at this address.
    Address(IpAddr),
    /// Whoever may open the admin socket.
    Admin,
}

impl Peer {
    /// Which verbs it may use.
    #[must_use]
    pub fn audience(self) -> Audience {
        match self {
            Self::Address(_) => Audience::Client,
            Self::Admin => Audience::Admin,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Admin => f.write_str("admin"),
        }
    }
}

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer ended its side and got all its answers.
    Ended,
    /// Reading or writing failed.
    Lost,
    /// A line went on and on.
    LineWithoutEnd,
    /// There are too many connections.
    ServerFull,
    /// A stored file could not be read to its end.
    FileUnreadable,
    /// It was a backup that kept a full disk from getting room.
    DiskFull,
    /// The server stops.
    ServerStops,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ended => "ended by the peer",
            Self::Lost => "connection lost",
            Self::LineWithoutEnd => "line without end",
            Self::ServerFull => "server full",
            Self::FileUnreadable => "stored file unreadable",
            Self::DiskFull => "disk full",
            Self::ServerStops => "server stops",
        })
    }
}

/// What a connection does with the bytes that come.
#[derive(Debug, Default)]
pub enum Phase {
    /// They are requests.
    #[default]
    Requests,
    /// They wait: a password is being worked on.
    Password(Pending),
    /// They wait: the texts of an INBOX reply are being read.
    #[expect(private_interfaces, reason = "nobody outside looks into a phase")]
    Inbox(Box<Inbox>),
    /// They are the content of a file.
    Upload(Box<Upload>),
    /// They wait: an upload that is complete is being stored.
    Storing,
    /// They wait: a file is on its way out.
    Download(Box<Download>),
    /// They wait: a small file is being read.
    SmallDownload(Box<SmallDownload>),
    /// They are the rest of a line that was refused; so many more of them are thrown away.
    Discard(u64),
}

impl Phase {
    /// It moves many bytes for one request.
    pub(crate) fn is_transfer(&self) -> bool {
        matches!(self, Self::Upload(_) | Self::Storing | Self::Download(_) | Self::Discard(_))
    }
}

/// A peer's connection.
#[derive(Debug)]
pub struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) peer: Peer,
    pub(crate) read: ReadBuffer,
    pub(crate) write: WriteBuffer,
    pub(crate) phase: Phase,
    /// The socket may have bytes, or the end of the stream. Cleared when it says that it has not.
    pub(crate) is_readable: bool,
    /// The socket may take bytes. Cleared when it says that it does not.
    pub(crate) is_writable: bool,
    /// The peer will send nothing more.
    pub(crate) is_ended: bool,
    /// It is on the run queue.
    pub(crate) is_queued: bool,
    /// It is on the list of those that may have something to write.
    pub(crate) is_unflushed: bool,
    /// Bytes read since the server began to stop.
    pub(crate) read_in_stop: u64,
    /// Nothing more is served; it goes once all is written.
    pub(crate) closing: Option<CloseReason>,
    /// All is written, and the peer was told that nothing more comes; it is closed once the peer has ended too.
    pub(crate) is_lingering: bool,
    /// A backup is being made as long as it lasts.
    pub(crate) is_holding: bool,
    /// INBOX replies on their way, each with where it ends in the stream of replies.
    pub(crate) deliveries: VecDeque<(u64, Delivery)>,
}

impl Connection {
    pub(crate) fn new(id: ConnectionId, peer: Peer) -> Self {
        Self {
            id,
            peer,
            read: ReadBuffer::default(),
            write: WriteBuffer::default(),
            phase: Phase::Requests,
            is_readable: true,
            is_writable: true,
            is_ended: false,
            is_queued: false,
            is_unflushed: false,
            read_in_stop: 0,
            closing: None,
            is_lingering: false,
            is_holding: false,
            deliveries: VecDeque::new(),
        }
    }
}

/// The messages of one INBOX reply: a run in one mailbox, by when they were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Whose mailbox.
    pub user: UserId,
    /// The first.
    pub first: Lsn,
    /// The last.
    pub last: Lsn,
}
