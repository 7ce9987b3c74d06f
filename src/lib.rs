//! kurir ("courier"): a message and file server for a line protocol with JSON replies.
//!
//! One thread owns everything: it polls sockets, cuts what comes into lines, parses each line without copying it, checks
//! it against plain owned state, and drains the replies. What would block it is done by helper threads that own nothing
//! of the state. Bytes flow one way and come back once:
//!
//! ```text
//! net ─ bytes ─▶ buffer ─ line ─▶ request ─▶ command ─▶ change ─▶ state, journal
//! net ◀─ bytes ─ buffer ◀───────── reply ◀──────┘           (a reply waits for its change to be durable)
//! ```
//!
//! | to find | look in |
//! |---|---|
//! | what a request may look like | [`verb`] (the table), [`request`] (the parser) |
//! | what it does | [`command`], [`inbox`] and [`claims`] (an INBOX on its way) |
//! | what it answers | [`reply`], [`refusal`] |
//! | what there is | [`state`], [`mailbox`], and [`change`], the only way in which they change (`field`: how one is written) |
//! | where it is kept | [`store`] (all of it), [`data`] (the directory), [`log`] and [`tail`] (the journal in memory), [`journal`], [`segment`], [`record`] and [`aligned`] (on the disk), [`texts`], [`files`], and [`disk`] (the seam to the file system under all of them) |
//! | how it comes back | [`survey`] (what there is, damaged or not), [`recovery`], [`takeover`] (from the format before), [`checkpoint`] and [`snapshot`] (what is in one) |
//! | how the disk is kept small | [`upkeep`] (when), [`usage`] (what is still needed), [`compaction`], [`space`] |
//! | how it runs | [`engine`] (the turn), `run_queue` (who is next), `serve` (a connection's share of it), `ahead` (several requests at once), `service` (what all share), [`connection`], [`buffer`] |
//! | how files come and go | [`content`] (base64), [`upload`], [`download`], [`transfer`] (what both share), [`files`] (on the disk) |
//! | who is kept waiting or out | `admission` (connections), `deadline` (slow peers), `eviction` (who takes too much memory), [`failures`] (wrong passwords), [`password_queue`], [`throttle`] (new accounts and groups) |
//! | what it runs on | [`net`] (sockets, signals), [`clock`], [`threads`], [`password`], [`local`] (no sockets at all) |
//! | its bounds | [`limits`] |
//! | how it is used | [`cli`], [`admin`], [`check`], [`backup`] |
//! | its client | [`client`] (for programs), [`chat`] (in a terminal), [`text`] (of others, on a terminal), and the commands of [`cli`] |
//! | how fast it is | [`bench`] |
//!
//! Invariants:
//! - State changes only in [`state::State::apply`], which is deterministic; start-up is the last checkpoint and the same
//!   `apply` over the journal behind it. To be told once more that a message has gone or stands elsewhere changes nothing.
//! - A reply that says OK is written after the journal batch that it depends on is durable, and so is a reply that shows
//!   what is not durable yet.
//! - Everything between [`net`] and the helper threads runs without a socket, a clock, a file or randomness.
//! - A peer that keeps the server waiting is closed, and what all connections hold together is bounded: those pay for it that
//!   hold most.
//! - What a peer can make the server hold or do at once is bounded, by a field of [`limits::Limits`].

pub mod admin;
pub(crate) mod admission;
pub(crate) mod ahead;
pub mod aligned;
pub mod backup;
pub mod bench;
pub mod buffer;
pub mod change;
pub mod chat;
pub mod check;
pub mod checkpoint;
pub mod claims;
pub mod cli;
pub mod client;
pub mod clock;
pub mod command;
pub mod compaction;
pub mod connection;
pub mod content;
pub mod data;
pub(crate) mod deadline;
pub mod disk;
pub mod download;
pub mod engine;
pub(crate) mod eviction;
pub mod failures;
pub(crate) mod field;
pub mod files;
pub mod inbox;
pub mod journal;
pub mod limits;
pub mod local;
pub mod log;
pub mod mailbox;
pub mod net;
pub mod password;
pub mod password_queue;
pub mod record;
pub mod recovery;
pub mod refusal;
pub mod reply;
pub mod request;
pub(crate) mod run_queue;
pub mod segment;
pub(crate) mod serve;
pub(crate) mod service;
pub mod snapshot;
pub mod space;
pub mod state;
pub mod store;
pub mod survey;
pub mod tail;
pub mod takeover;
pub mod text;
pub mod texts;
pub mod threads;
pub mod throttle;
pub mod transfer;
pub mod upkeep;
pub mod upload;
pub mod usage;
pub mod verb;
