//! An INBOX reply: which messages go into it, where their texts come from, and when they count as delivered.
//!
//! Most are still in memory, and the reply is written at once. If some are not, they are read by another thread, and the
//! connection waits. The messages are claimed meanwhile, so that nobody else gets them too.

use std::io;

use crate::change::{Message, Place, UserId};
use crate::connection::{Connection, ConnectionId, Delivery, Phase};
use crate::engine::{Host, Job};
use crate::files;
use crate::mailbox::{Entry, Mailbox};
use crate::record;
use crate::refusal::Refusal;
use crate::reply::Item;
use crate::service::Service;
use crate::texts;
use crate::verb::Spec;

/// Texts to be read from the disk.
#[derive(Debug)]
pub struct TextsJob {
    /// Who waits for them.
    pub connection: ConnectionId,
    /// Where their records stand.
    pub places: Vec<Place>,
}

/// What was read.
#[derive(Debug)]
pub struct TextsDone {
    /// Who waits for it.
    pub connection: ConnectionId,
    /// The records, one behind the other, whatever stands there now.
    pub records: io::Result<Vec<u8>>,
}

/// A reply that waits for texts.
#[derive(Debug)]
pub(crate) struct Inbox {
    spec: &'static Spec,
    entries: Vec<Entry>,
    /// The size of their records together.
    record_bytes: usize,
    /// All of them.
    pub(crate) claim: Delivery,
    /// The records that were in memory when this began.
    held: Vec<u8>,
    /// For each entry, whether it is among those.
    is_held: Vec<bool>,
}

impl Inbox {
    /// The memory of its records, those that are read included.
    pub(crate) fn held_bytes(&self) -> usize {
        self.record_bytes + self.entries.capacity() * size_of::<Entry>()
    }
}

impl Service {
    /// Writes an INBOX reply, or has its texts read first. Its messages count as delivered once its last byte is taken by
    /// the kernel.
    pub(crate) fn deliver(
        &mut self,
        connection: &mut Connection,
        spec: &'static Spec,
        user: UserId,
        host: &mut impl Host,
    ) {
        // Each new one looks at those that are on their way.
        let on_their_way = self.claims.count(user);
        self.work_bytes += (on_their_way * size_of::<Delivery>()) as u64;
        if on_their_way >= self.limits.inboxes_per_user_max {
            return self.refuse(connection, Refusal::ServerBusy, Some(spec));
        }
        let Some(mailbox) = self.state.mailbox(user) else {
            return self.refuse(connection, Refusal::InvalidToken, Some(spec));
        };
        let unclaimed = self.claims.unclaimed(user, mailbox);
        let mut entries: Vec<Entry> = Vec::with_capacity(unclaimed.len().min(self.limits.inbox_messages_max));
        let mut bytes = 0;
        for entry in mailbox.entries().range(unclaimed).take(self.limits.inbox_messages_max) {
            bytes += u64::from(entry.place().bytes);
            // The first goes in whatever its size.
            if bytes > self.limits.inbox_bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(*entry);
        }
        let last_id = mailbox.last_id();
        let records = self.log.records(entries.iter().map(Entry::place));
        if records.iter().all(Option::is_some) {
            let messages = records.iter().map_while(|record| in_memory((*record)?));
            let bytes_max = usize::try_from(self.limits.inbox_bytes_max).unwrap_or(usize::MAX);
            let items = items(&entries, last_id, messages);
            let count = self.inbox.write(connection.write.out(), items, bytes_max, spec.dialect);
            self.delivering(connection, user, entries.get(..count).unwrap_or_default());
            return;
        }
        let is_held: Vec<bool> = records.iter().map(Option::is_some).collect();
        let held = records.into_iter().flatten().flatten().copied().collect();
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return };
        let claim = Delivery { user, first: first.sent(), last: last.sent() };
        self.work_bytes += (entries.len() * size_of::<Entry>()) as u64;
        let record_bytes = entries.iter().map(|entry| entry.place().bytes as usize).sum();
        if !self.admit_reading(connection.id, user, record_bytes) {
            return self.refuse(connection, Refusal::ServerBusy, Some(spec));
        }
        self.claims.add(claim);
        let missing = entries.iter().zip(&is_held).filter(|(_, is_held)| !**is_held);
        let places = missing.map(|(entry, _)| entry.place()).collect();
        connection.phase = Phase::Inbox(Box::new(Inbox { spec, record_bytes, entries, claim, held, is_held }));
        host.submit(Job::Texts(TextsJob { connection: connection.id, places }));
        // Others in this turn must see that it is taken.
        self.count_held(connection);
    }

    /// Goes on with a reply whose texts have been read.
    pub(crate) fn texts_read(
        &mut self,
        connection: &mut Connection,
        inbox: Inbox,
        read: io::Result<Vec<u8>>,
        host: &mut impl Host,
    ) {
        let Inbox { spec, entries, claim, held, is_held, .. } = inbox;
        self.claims.remove(&claim);
        let is_busy = read.as_ref().is_err_and(files::is_busy);
        let failure = read.as_ref().err().map(ToString::to_string);
        let read = read.unwrap_or_default();
        let salt = self.log.layout().salt;
        let (mut from_memory, mut from_disk) = (&*held, &*read);
        let messages = entries.iter().zip(is_held).map_while(|(entry, is_held)| {
            let source = if is_held { &mut from_memory } else { &mut from_disk };
            let (record, rest) = source.split_at_checked(entry.place().bytes as usize)?;
            *source = rest;
            if is_held { in_memory(record) } else { texts::message(record, salt, entry.place()) }
        });
        let bytes_max = usize::try_from(self.limits.inbox_bytes_max).unwrap_or(usize::MAX);
        let mut messages = messages.peekable();
        if messages.peek().is_some() {
            let last_id = self.state.mailbox(claim.user).map_or(0, Mailbox::last_id);
            let items = items(&entries, last_id, messages);
            let count = self.inbox.write(connection.write.out(), items, bytes_max, spec.dialect);
            return self.delivering(connection, claim.user, entries.get(..count).unwrap_or_default());
        }
        drop(messages);
        // What is not where it was may have been written again elsewhere meanwhile, or have gone with its reader.
        let Some(first) = entries.first() else { return };
        let mailbox = self.state.mailbox(claim.user);
        let is_elsewhere = |entry: &Entry| mailbox.and_then(|mailbox| mailbox.entry(entry.sent())) != Some(entry);
        match mailbox {
            None => self.refuse(connection, Refusal::InvalidToken, Some(spec)),
            Some(_) if entries.iter().any(is_elsewhere) => self.deliver(connection, spec, claim.user, host),
            Some(_) if is_busy => self.refuse(connection, Refusal::ServerBusy, Some(spec)),
            Some(_) => {
                let (layout, lsn) = (self.log.layout(), first.place().lsn);
                let (segment, byte) = (layout.segment(lsn), layout.offset(lsn));
                let failure = failure.as_deref().unwrap_or("what is there is not what was written");
                tracing::error!(
                    segment,
                    byte,
                    failure,
                    "a message cannot be read; stop the server and use `kurir check DIR --repair`"
                );
                self.refuse(connection, Refusal::MailboxUnreadable, Some(spec));
            }
        }
    }

    /// The reply that was just written holds these messages of a mailbox.
    fn delivering(&mut self, connection: &mut Connection, user: UserId, entries: &[Entry]) {
        if let [first, .., last] | [first @ last] = entries {
            let delivery = Delivery { user, first: first.sent(), last: last.sent() };
            self.claims.add(delivery);
            connection.deliveries.push_back((connection.write.end(), delivery));
        }
        // An empty reply tells something too: that what was there has been delivered.
        let changed = self.state.mailbox(user).map(Mailbox::changed);
        connection.write.seal(changed.and_then(|lsn| self.log.unsettled_at(lsn)));
    }
}

/// The message in a record that this process has made.
fn in_memory(record: &[u8]) -> Option<Message<'_>> {
    Message::decode(record::claimed_body(record)?)
}

fn items<'m>(
    entries: &[Entry],
    last_id: u64,
    messages: impl Iterator<Item = Message<'m>>,
) -> impl Iterator<Item = Item<'m>> {
    entries.iter().zip(messages).map(move |(entry, message)| Item { id: entry.id(last_id), message })
}
