//! One peer: its buffers, and what it is waiting for.

use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::buffer::{ReadBuffer, WriteBuffer};
use crate::change::{Lsn, UserId};
use crate::command::Pending;
use crate::deadline::{Awaited, Stage, Wait};
use crate::download::{Download, SmallDownload};
use crate::inbox::Inbox;
use crate::limits::Limits;
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

    /// What counts as one address: a whole /64 of IPv6, since one host has all of it. The administrator has none.
    #[must_use]
    pub fn network(self) -> Option<IpAddr> {
        match self {
            Self::Admin => None,
            Self::Address(address) => Some(match address.to_canonical() {
                IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
                v4 @ IpAddr::V4(_) => v4,
            }),
        }
    }

    /// The same where something is counted for each address: behind a loopback address may be a proxy, and so everybody.
    #[must_use]
    pub fn network_counted(self, limits: &Limits) -> Option<IpAddr> {
        match self {
            Self::Address(address) if address.to_canonical().is_loopback() && !limits.limit_loopback => None,
            _ => self.network(),
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

/// Who answers for what a connection takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// Whoever has this account: its token was the last to be shown.
    User(UserId),
    /// A stranger from this address.
    Network(IpAddr),
    /// The administrator.
    Admin,
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
    /// No request for a long time.
    Idle,
    /// No request at all.
    NoRequest,
    /// Requests, but no login.
    NoLogin,
    /// A line, or a file, came too slowly or not to its end.
    SlowLine,
    /// The peer read too slowly, or not at all.
    SlowReader,
    /// The peer did not read, and what waited for it was too much.
    OutputTooLarge,
    /// All connections together held too much memory, and this one had kept the server waiting longest.
    MemoryFull,
    /// A stored file could not be read to its end.
    FileUnreadable,
    /// It was a backup that kept a full disk from getting room.
    DiskFull,
    /// The server stops.
    ServerStops,
}

impl CloseReason {
    /// The peer passed a bound.
    #[must_use]
    pub fn is_bound(self) -> bool {
        match self {
            Self::Ended | Self::Lost | Self::FileUnreadable | Self::DiskFull | Self::ServerStops => false,
            Self::LineWithoutEnd
            | Self::ServerFull
            | Self::Idle
            | Self::NoRequest
            | Self::NoLogin
            | Self::SlowLine
            | Self::SlowReader
            | Self::OutputTooLarge
            | Self::MemoryFull => true,
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ended => "ended by the peer",
            Self::Lost => "connection lost",
            Self::LineWithoutEnd => "line without end",
            Self::ServerFull => "server full",
            Self::Idle => "idle",
            Self::NoRequest => "no request in time",
            Self::NoLogin => "no login in time",
            Self::SlowLine => "request too slow",
            Self::SlowReader => "peer does not read",
            Self::OutputTooLarge => "peer does not read, output too large",
            Self::MemoryFull => "connections hold too much memory",
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

    /// The memory that it holds beside the buffers.
    fn held_bytes(&self) -> usize {
        match self {
            Self::Upload(upload) => upload.held_bytes(),
            Self::Inbox(inbox) => inbox.held_bytes(),
            Self::Download(download) => download.held_bytes(),
            Self::SmallDownload(small) => small.held_bytes(),
            Self::Requests | Self::Password(_) | Self::Storing | Self::Discard(_) => 0,
        }
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
    /// What it has to do takes long, so it lets others go first.
    pub(crate) is_long: bool,
    /// Whose token was shown last.
    pub(crate) user: Option<UserId>,
    /// It is on the list of those that wait for room in the journal.
    pub(crate) is_stalled: bool,
    /// It is on the list of those that may have something to write.
    pub(crate) is_unflushed: bool,
    /// The batch that it is on the list for of those with replies that wait for one, or was last.
    pub(crate) gated_by: Option<u64>,
    /// All that came is handled, and only its peer can make it go on.
    pub(crate) is_starved: bool,
    /// What it waits for from its peer.
    pub(crate) wait: Wait,
    /// How far its peer has come with what it sends: the bytes of files, and a whole step for each request.
    pub(crate) progress: u64,
    /// What it held when that was last counted.
    pub(crate) counted_bytes: usize,
    /// How far its output has been counted against turns.
    counted_output: u64,
    /// Bytes read since the server began to stop.
    pub(crate) read_in_stop: u64,
    /// Nothing more is served; it goes once all is written.
    pub(crate) closing: Option<CloseReason>,
    /// All is written, and the peer was told that nothing more comes; it is closed once the peer has ended too.
    pub(crate) is_lingering: bool,
    /// It was turned away, and counts for nothing.
    pub(crate) is_turned_away: bool,
    /// A backup is being made as long as it lasts.
    pub(crate) is_holding: bool,
    /// INBOX replies on their way, each with where it ends in the stream of replies.
    pub(crate) deliveries: VecDeque<(u64, Delivery)>,
}

impl Connection {
    pub(crate) fn new(id: ConnectionId, peer: Peer) -> Self {
        let stage = if peer == Peer::Admin { Stage::Known } else { Stage::Silent };
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
            is_long: false,
            user: None,
            is_stalled: false,
            is_unflushed: false,
            gated_by: None,
            is_starved: false,
            wait: Wait::new(stage),
            progress: 0,
            counted_bytes: 0,
            counted_output: 0,
            read_in_stop: 0,
            closing: None,
            is_lingering: false,
            is_turned_away: false,
            is_holding: false,
            deliveries: VecDeque::new(),
        }
    }

    /// Who answers for what it takes.
    pub(crate) fn owner(&self) -> Owner {
        match (self.user, self.peer.network()) {
            (Some(user), _) => Owner::User(user),
            (None, Some(network)) => Owner::Network(network),
            (None, None) => Owner::Admin,
        }
    }

    /// Notes what it waits for now from its peer.
    pub(crate) fn note_wait(&mut self, now: u64) {
        let is_admin = self.peer == Peer::Admin;
        let is_unread = !self.is_writable && !self.write.ready().is_empty();
        let awaited = match self.phase {
            _ if self.is_lingering => Awaited::End,
            // An administrator's work may take its time.
            _ if is_admin => Awaited::Nothing,
            _ if is_unread => Awaited::Reading,
            _ if !self.is_starved || self.closing.is_some() => Awaited::Nothing,
            // More of a line does not make its time begin anew, whether it had its turn yet or not.
            Phase::Requests if !self.read.pending().is_empty() => Awaited::Line,
            _ if self.is_queued => Awaited::Nothing,
            Phase::Requests => Awaited::Request,
            _ => Awaited::Line,
        };
        let progress = if awaited == Awaited::Reading { self.write.taken() } else { self.progress };
        self.wait.note(awaited, progress, now);
    }

    /// The memory that it holds beside its own place.
    pub(crate) fn held_bytes(&self) -> usize {
        let deliveries = self.deliveries.capacity() * size_of::<(u64, Delivery)>();
        self.read.held_bytes() + self.write.held_bytes() + deliveries + self.phase.held_bytes()
    }

    /// Output that was made since this was last asked.
    pub(crate) fn take_output_made(&mut self) -> u64 {
        let made = self.write.end() - self.counted_output;
        self.counted_output = self.write.end();
        made
    }

    /// Gives back the memory that one long run of replies took for its notes.
    pub(crate) fn shrink(&mut self) {
        const DELIVERIES_KEPT: usize = 8;
        if self.deliveries.is_empty() && self.deliveries.capacity() > DELIVERIES_KEPT {
            self.deliveries = VecDeque::new();
        }
        self.write.shrink();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_64_of_ipv6_is_one_address() {
        let network = |text: &str| Peer::Address(text.parse().unwrap()).network();
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:0:0:1"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.2"), network("192.0.2.2"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }
}
