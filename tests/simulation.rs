//! A world in one thread, made from one number: clients that talk to the engine in pieces of any size, a network that
//! takes as little as it likes, workers that take as long as they like, and a machine that loses power.
//!
//! Everything but the clients, the network and the disk is what the server runs: the engine, the journal writer, segments,
//! checkpoints, stored files, recovery and backups. Each helper thread's work is a step, and the seed picks which comes next.
//! The disk ([`sim_disk`]) forgets, tears and reorders what was not synced, in the middle of any operation, also of a start; and
//! it fails and is full.
//!
//! At the end a model compares what the clients were told with what became of their messages:
//!
//! - a message whose sender was told OK is in the mailbox of each receiver, or was delivered there, exactly once;
//! - a message whose sender was told ERROR, or that was never sent, is nowhere;
//! - messages of one connection to one receiver are delivered in the order in which they were sent;
//! - ids in a mailbox grow, and a message that is given again has the id that it had;
//! - a file is listed whole and as it was sent, or not at all;
//! - what is recovered is what the server had in memory, however often it was compacted;
//! - a backup that is made while all goes on is what the server had when it was begun, and a power cut takes nothing of it;
//! - a server starts, whatever came before.
//!
//! Where the server syncs only now and then, what was acknowledged since may be lost when power goes, and nothing else.
//!
//! A seed that fails is printed; `KURIR_SEED=N cargo test --test simulation` runs it alone, and with `KURIR_SEEDS=N` so many
//! are run.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;
#[path = "common/sim_disk.rs"]
mod sim_disk;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kurir::backup::{Copy, Point};
use kurir::change::{Change, FileId, Kept, Lsn, Place};
use kurir::clock::Clock;
use kurir::compaction::{Compacted, Needed};
use kurir::connection::{ConnectionId, Peer};
use kurir::data::DataDirectory;
use kurir::disk::{DiskRef, FileRef};
use kurir::engine::{Completion, Engine, Host, Job, Registration};
use kurir::files::{FileDone, FileJob, TransferId};
use kurir::journal::Unsynced;
use kurir::limits::Limits;
use kurir::log::{Log, Need, Sync};
use kurir::segment::Layout;
use kurir::state::State;
use kurir::store::{self, Disk, Opening, Store, StoreError};
use kurir::texts::{self, Texts};
use kurir::upkeep::Holdings;
use serde_json::Value;
use sim_disk::{Random, SimDisk};

/// Small, so that there are many segments.
const SEGMENT_BYTES: u64 = 4096;
const DATA: &str = "/srv/data";
const COPIES: &str = "/srv/copies";
const SEEDS: u64 = 280;
const STEPS: usize = 1500;
const USERS: [&str; 4] = ["messi", "henderson", "lineker", "pele"];
const GROUP: &str = "group1";
const END: &[u8] = b"\r\n\r\n";

#[test]
fn clients_and_the_model_agree_whatever_the_network_does() {
    let seeds = match std::env::var("KURIR_SEED") {
        Ok(seed) => seed.parse::<u64>().unwrap()..=seed.parse::<u64>().unwrap(),
        Err(_) => 1..=std::env::var("KURIR_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap()),
    };
    let mut seen = Seen::default();
    for seed in seeds {
        let result = std::panic::catch_unwind(|| World::new(seed).run());
        match result {
            Ok(of_this_one) => seen.add(&of_this_one),
            Err(_) => panic!("seed {seed} failed; KURIR_SEED={seed} cargo test --test simulation runs it alone"),
        }
    }
    if std::env::var("KURIR_SEED").is_err() {
        // A simulation in which nothing happens would agree with everything.
        assert!(seen.acknowledged > 2_000, "{seen:?}");
        assert!(seen.delivered > 2_000, "{seen:?}");
        assert!(seen.given_again > 50, "{seen:?}");
        assert!(seen.crashes > 100, "{seen:?}");
        assert!(seen.broken > 500, "{seen:?}");
        assert!(seen.files > 200, "{seen:?}");
        assert!(seen.downloads > 200, "{seen:?}");
        assert!(seen.dropped > 50, "{seen:?}");
        assert!(seen.refused > 100, "{seen:?}");
        assert!(seen.cut_short > 50, "{seen:?}");
        assert!(seen.late > 200, "{seen:?}");
        assert!(seen.failures > 100, "{seen:?}");
        assert!(seen.cuts > 100, "{seen:?}");
        assert!(seen.cuts_in_starts > 50, "{seen:?}");
        assert!(seen.kept_backups > 50, "{seen:?}");
        assert!(seen.compactions > 200, "{seen:?}");
        assert!(seen.relocated > 200, "{seen:?}");
        assert!(seen.relocated_files > 50, "{seen:?}");
        assert!(seen.small_files > 100, "{seen:?}");
        assert!(seen.cached_reads > 200, "{seen:?}");
        assert!(seen.recycled > 100, "{seen:?}");
        assert!(seen.backups > 100, "{seen:?}");
        assert!(seen.compared > 100, "{seen:?}");
    }
}

/// What happened, so that the test knows that it tested.
#[derive(Debug, Default)]
struct Seen {
    acknowledged: usize,
    delivered: usize,
    given_again: usize,
    crashes: usize,
    broken: usize,
    files: usize,
    downloads: usize,
    /// Files that somebody took off a list.
    dropped: usize,
    refused: usize,
    /// Connections that the server closed, since their peers were late or held too much.
    late: usize,
    /// INBOX replies of which only a part got out.
    cut_short: usize,
    /// Servers that ended since their disk failed.
    failures: usize,
    /// Power cuts in the middle of something, and of those in the middle of a start.
    cuts: usize,
    cuts_in_starts: usize,
    compactions: usize,
    /// Messages that compaction had written again.
    relocated: usize,
    /// The same of small files.
    relocated_files: usize,
    /// Files that are kept in the journal at the end.
    small_files: usize,
    /// Times that the loop read from a stored file itself.
    cached_reads: usize,
    /// Files that have one of their own.
    stored: usize,
    /// Segments that were used again.
    recycled: usize,
    backups: usize,
    /// Finished ones that were still whole after a power cut.
    kept_backups: usize,
    /// Times that what was recovered was compared with what was in memory.
    compared: usize,
}

impl Seen {
    fn count(&mut self, compacted: &Compacted) {
        if let Compacted::Done(_, relocations) = compacted {
            self.compactions += 1;
            let files = relocations.iter().filter(|moved| matches!(moved.needed, Needed::File(_))).count();
            self.relocated += relocations.len() - files;
            self.relocated_files += files;
        }
    }

    fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.delivered += other.delivered;
        self.given_again += other.given_again;
        self.crashes += other.crashes;
        self.broken += other.broken;
        self.files += other.files;
        self.downloads += other.downloads;
        self.dropped += other.dropped;
        self.refused += other.refused;
        self.cut_short += other.cut_short;
        self.late += other.late;
        self.failures += other.failures;
        self.cuts += other.cuts;
        self.cuts_in_starts += other.cuts_in_starts;
        self.kept_backups += other.kept_backups;
        self.compactions += other.compactions;
        self.relocated += other.relocated;
        self.relocated_files += other.relocated_files;
        self.small_files += other.small_files;
        self.cached_reads += other.cached_reads;
        self.recycled += other.recycled;
        self.stored += other.stored;
        self.backups += other.backups;
        self.compared += other.compared;
    }
}

/// What a client waits for an answer to.
#[derive(Clone, Debug)]
enum Asked {
    Login(usize),
    Message { to: Vec<usize>, text: String },
    Inbox(usize),
    File { from: usize, to: Vec<usize>, name: String },
    Download { user: usize, party: usize, name: String },
    Drop,
    Backup,
    Other,
}

/// A client's end of a connection, and what the kernel holds for it.
struct Line {
    id: ConnectionId,
    to_server: VecDeque<u8>,
    /// What the engine may read now; the rest is still on its way.
    arrived: usize,
    is_ended: bool,
    from_server: Vec<u8>,
    /// How much more the kernel takes before it says no.
    room: usize,
    asked: VecDeque<Asked>,
    is_closed: bool,
}

impl Line {
    fn new(id: ConnectionId, room: usize) -> Self {
        Self {
            id,
            to_server: VecDeque::new(),
            arrived: 0,
            is_ended: false,
            from_server: Vec::new(),
            room,
            asked: VecDeque::new(),
            is_closed: false,
        }
    }
}

struct World {
    random: Random,
    engine: Option<Engine>,
    net: Net,
    machine: Machine,
    /// Jobs that the engine has handed out and no worker has done.
    pending: VecDeque<Job>,
    now: Clock,
    /// Peers that keep the server waiting are closed.
    has_deadlines: bool,
    tokens: [Option<String>; USERS.len()],
    sent: usize,
    model: Model,
    seen: Seen,
    backup: Option<Backup>,
    /// Backups that were finished and must outlast everything.
    kept: Vec<(String, State)>,
    copies: usize,
    /// Nothing fails any more.
    is_calm: bool,
}

/// A backup that is being made.
struct Backup {
    connection: ConnectionId,
    point: Option<(Point, State)>,
}

/// What the server runs on.
struct Machine {
    disk: Arc<SimDisk>,
    sync: Sync,
    /// None between two servers.
    workers: Option<Workers>,
}

/// The helper threads, each of which takes a step when the seed says so.
struct Workers {
    /// Held as long as they are.
    _directory: DataDirectory,
    disk: Disk,
    layout: Layout,
    /// Handed over to be synced, with [`Sync::Interval`].
    unsynced: VecDeque<Unsynced>,
    /// All before this stays when power goes.
    synced: Lsn,
}

impl Machine {
    fn disk(&self) -> DiskRef {
        DiskRef::clone(&(Arc::clone(&self.disk) as DiskRef))
    }

    fn workers(&mut self) -> &mut Workers {
        self.workers.as_mut().unwrap()
    }

    /// A server starts.
    fn start(&mut self) -> Result<(State, Log, Holdings), StoreError> {
        self.start_in(&self.disk(), DATA).map(|(workers, state, log, holdings)| {
            self.workers = Some(workers);
            (state, log, holdings)
        })
    }

    fn start_in(&self, disk: &DiskRef, root: &str) -> Result<(Workers, State, Log, Holdings), StoreError> {
        let directory = DataDirectory::open_on(DiskRef::clone(disk), Path::new(root)).map_err(StoreError::Data)?;
        let opening = Opening { segment_bytes: SEGMENT_BYTES, sync: self.sync, salt: 7, now: 1_767_225_600_000 };
        let Store { directory, state, log, holdings, disk } = Store::open_in(directory, opening)?;
        let (layout, synced) = (log.layout(), log.end());
        let workers = Workers { _directory: directory, disk, layout, unsynced: VecDeque::new(), synced };
        Ok((workers, state, log, holdings))
    }

    /// The record at a place.
    fn record(&self, root: &str, layout: Layout, place: Place) -> Vec<u8> {
        let journal = kurir::disk::Directory::new(self.disk(), Path::new(root).join("journal"));
        Texts::new(journal, layout).read(&[place]).expect("the segment of what is needed is there")
    }

    /// The text of the message at a place.
    fn text(&self, root: &str, layout: Layout, place: Place) -> String {
        let record = self.record(root, layout, place);
        let message = texts::message(&record, layout.salt, place).expect("a message that waits can be read");
        String::from_utf8(message.text.to_owned()).expect("a text is UTF-8")
    }

    /// The small file at a place.
    fn content(&self, root: &str, layout: Layout, place: Place) -> Vec<u8> {
        let record = self.record(root, layout, place);
        texts::content(&record, layout.salt, place).expect("a file that is listed can be read").to_owned()
    }
}

/// The engine's view of the clients.
struct Net {
    lines: BTreeMap<ConnectionId, Line>,
    submitted: VecDeque<Job>,
    random: u64,
    /// Stored files that are open for a download.
    opened: HashMap<TransferId, FileRef>,
    cached_reads: usize,
    has_deadlines: bool,
}

/// What must be true of all messages.
#[derive(Default)]
struct Model {
    /// Told OK: text to receivers.
    acknowledged: BTreeMap<String, Vec<usize>>,
    /// Told ERROR.
    refused: BTreeSet<String>,
    /// Handed over whole: receiver and text to the id it had.
    delivered: HashMap<(usize, String), u64>,
    /// Handed over whole, but a crash came before that was written down: these come again.
    undone: HashMap<(usize, String), u64>,
    /// By connection and receiver, in the order in which they were sent.
    order: BTreeMap<(ConnectionId, usize), Vec<String>>,
    /// Listed: sender, receiver and name.
    files: BTreeSet<(usize, usize, String)>,
    /// What was ever sent as the content of a file: by whom, to whom and under what name.
    contents: BTreeSet<(usize, usize, String, Vec<u8>)>,
    /// Every text that was ever sent as a message.
    texts: BTreeSet<String>,
    /// What was acknowledged when this much was written: messages, and files.
    soft: Vec<(Lsn, String)>,
    soft_files: Vec<(Lsn, (usize, usize, String))>,
}

impl Host for Net {
    fn read(&mut self, id: ConnectionId, into: &mut [u8]) -> io::Result<usize> {
        let line = self.lines.get_mut(&id).ok_or(ErrorKind::ConnectionReset)?;
        if line.arrived == 0 {
            let is_end = line.is_ended && line.to_server.is_empty();
            return if is_end { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        let count = line.arrived.min(into.len());
        let count = io::Read::read(&mut line.to_server, &mut into[..count])?;
        line.arrived -= count;
        Ok(count)
    }

    fn write(&mut self, id: ConnectionId, from: &[u8]) -> io::Result<usize> {
        let line = self.lines.get_mut(&id).ok_or(ErrorKind::BrokenPipe)?;
        if line.room == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        let count = line.room.min(from.len());
        line.from_server.extend_from_slice(&from[..count]);
        line.room -= count;
        Ok(count)
    }

    fn end(&mut self, id: ConnectionId) {
        assert!(self.has_deadlines, "{id:?} was ended by the server");
    }

    fn close(&mut self, id: ConnectionId) {
        if let Some(line) = self.lines.get_mut(&id) {
            line.is_closed = true;
        }
    }

    fn random(&mut self) -> [u8; 16] {
        self.random += 1;
        u128::from(self.random).to_be_bytes()
    }

    fn submit(&mut self, job: Job) {
        self.submitted.push_back(job);
    }

    fn read_stored(&mut self, transfer: TransferId, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let count = self.opened.get(&transfer).ok_or(ErrorKind::WouldBlock)?.read_cached_at(into, offset)?;
        self.cached_reads += 1;
        Ok(count)
    }
}

fn limits(random: &mut Random, has_deadlines: bool) -> Limits {
    let some = |ms: u64| if has_deadlines { ms } else { 0 };
    let connections_bytes = [20_000, 100_000, 300_000][random.below(3)];
    let bytes_most = [5_000, 50_000][random.below(2)];
    Limits {
        requests_per_turn_max: 1 + random.below(8),
        read_bytes_per_turn_max: 1 + random.below(bytes_most) as u64,
        bytes_per_turn_max: 1 + random.below(2 * bytes_most) as u64,
        small_file_bytes_max: [0, 50, 150][random.below(3)],
        output_bytes_high: 1 + random.below(3000) as u64,
        inbox_messages_max: 1 + random.below(12),
        mailbox_messages_max: 8 + random.below(40),
        line_bytes_max: 300,
        idle_ms_max: some(30_000),
        first_request_ms_max: some(5_000),
        auth_ms_max: some(10_000),
        line_ms_max: some(5_000),
        output_ms_max: some(5_000),
        linger_ms_max: 100,
        connections_bytes_max: if has_deadlines { connections_bytes } else { u64::MAX },
        password_queue_max: 3,
        uploads_max: 2,
        segment_bytes: SEGMENT_BYTES,
        checkpoint_bytes: 1000 + random.below(30_000) as u64,
        ..Limits::default()
    }
}

fn start(random: &mut Random, has_deadlines: bool, state: State, log: Log, holdings: Holdings) -> Engine {
    let registration = Registration::Closed;
    let mut engine = Engine::new(limits(random, has_deadlines), registration, state, log, holdings);
    // So that a file is many blocks, or one.
    engine.set_block_bytes([30, 300, 5_000, 50_000][random.below(4)]);
    // One after the other, or several at once.
    engine.set_ahead_users_min([0, usize::MAX][random.below(2)]);
    engine
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let disk = SimDisk::new(random.next());
        disk.set_ordered(random.one_in(2));
        disk.set_direct(random.one_in(2));
        disk.set_short_writes(random.one_in(4));
        disk.make_root(Path::new(COPIES)).unwrap();
        let sync = if random.one_in(4) { Sync::Interval } else { Sync::Always };
        let mut machine = Machine { disk, sync, workers: None };
        let (mut state, mut log, _) = machine.start().unwrap();
        make_accounts(&mut state, &mut log);
        // As `--demo` does: before the loop, and without it.
        let Workers { _directory: directory, disk, .. } = machine.workers.take().unwrap();
        let mut store = Store { directory, state, log, holdings: Holdings::default(), disk };
        store.commit().unwrap();
        let Store { directory, state, mut log, holdings, disk } = store;
        let (layout, synced) = (log.layout(), log.end());
        machine.workers = Some(Workers { _directory: directory, disk, layout, unsynced: VecDeque::new(), synced });
        log.set_tail_bytes(random.below(5000));
        let has_deadlines = random.one_in(3);
        let engine = start(&mut random, has_deadlines, state, log, holdings);
        Self {
            random,
            engine: Some(engine),
            net: Net {
                lines: BTreeMap::new(),
                submitted: VecDeque::new(),
                random: 0,
                opened: HashMap::new(),
                cached_reads: 0,
                has_deadlines,
            },
            machine,
            pending: VecDeque::new(),
            now: Clock { utc_ms: 1_767_225_600_000, steady_ms: 0 },
            has_deadlines,
            tokens: [const { None }; USERS.len()],
            sent: 0,
            model: Model::default(),
            seen: Seen::default(),
            backup: None,
            kept: Vec::new(),
            copies: 0,
            is_calm: false,
        }
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().unwrap()
    }

    fn run(mut self) -> Seen {
        for _ in 0..STEPS {
            match self.random.below(100) {
                0..=1 => self.connect(),
                2..=29 => self.ask(),
                30..=54 => self.deliver_bytes(),
                55..=69 => self.open_window(),
                70..=84 => self.work(),
                85..=96 => self.turn(),
                98 if self.random.one_in(4) => self.crash(true),
                97 if self.random.one_in(8) => self.have_trouble(),
                98 if self.random.one_in(3) => self.backup(),
                98 if self.random.one_in(2) => self.sync(),
                98 if self.random.one_in(2) => self.now.utc_ms += self.random.next() % 10_000_000,
                98 => self.now.steady_ms += self.random.next() % 10_000,
                _ => self.break_off(),
            }
            self.read_replies();
        }
        self.calm_down();
        self.settle_down();
        if self.backup.is_some() {
            self.backup();
        }
        self.settle_down();
        self.crash(true);
        self.drain_mailboxes();
        self.judge();
        self.seen
    }

    /// The disk is as a disk should be.
    fn calm_down(&mut self) {
        self.is_calm = true;
        self.machine.disk.set_failures(None);
        self.machine.disk.set_room(None);
        self.machine.disk.cut_after(u64::MAX / 2);
    }

    /// The disk is not as it should be, or is again.
    fn have_trouble(&mut self) {
        let disk = Arc::clone(&self.machine.disk);
        match self.random.below(10) {
            0 => disk.set_room(Some(self.random.next() % 30_000)),
            1 => disk.set_room(None),
            2 => disk.set_failures(Some(1 + self.random.next() % 40)),
            3 => disk.set_failures(None),
            4 => disk.fail_next_sync(),
            _ => disk.cut_after(self.random.next() % 40),
        }
    }

    fn connect(&mut self) {
        if self.net.lines.values().filter(|line| !line.is_closed).count() >= 6 {
            return;
        }
        let id = self.engine().open(Peer::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        let room = self.random.below(200);
        self.net.lines.insert(id, Line::new(id, room));
    }

    fn any_line(&mut self) -> Option<ConnectionId> {
        let open: Vec<ConnectionId> =
            self.net.lines.values().filter(|line| !line.is_closed).map(|line| line.id).collect();
        if open.is_empty() { None } else { Some(open[self.random.below(open.len())]) }
    }

    /// A client writes a request; nothing has arrived yet.
    fn ask(&mut self) {
        let Some(id) = self.any_line() else { return self.connect() };
        let user = self.random.below(USERS.len());
        let (request, asked) = match &self.tokens[user] {
            None => (format!("AUTH {} surabaya", USERS[user]), Asked::Login(user)),
            Some(token) => {
                let token = token.clone();
                self.request_of(user, &token)
            }
        };
        let end = ["\n", "\r\n", "\r\n\r\n"][self.random.below(3)];
        let line = self.net.lines.get_mut(&id).unwrap();
        if line.is_ended {
            return;
        }
        line.to_server.extend(request.bytes().chain(end.bytes()));
        line.asked.push_back(asked);
    }

    fn request_of(&mut self, user: usize, token: &str) -> (String, Asked) {
        let other = self.random.below(USERS.len());
        self.sent += 1;
        match self.random.below(22) {
            0..=7 => {
                let filler = "x".repeat(self.random.below(60));
                let text = format!("m{} {filler}x", self.sent);
                self.model.texts.insert(text.clone());
                let verb = ["SEND MESSAGE", "send message", "send"][self.random.below(3)];
                let request = format!("{verb} {token} {} {text}", USERS[other]);
                (request, Asked::Message { to: vec![other], text })
            }
            8..=9 => {
                let text = format!("g{}", self.sent);
                self.model.texts.insert(text.clone());
                let to = (0..3).filter(|member| *member != user).collect();
                let to = if user < 3 { to } else { Vec::new() };
                (format!("SEND GROUP MESSAGE {token} {GROUP} {text}"), Asked::Message { to, text })
            }
            10..=14 => (format!("INBOX {token}"), Asked::Inbox(user)),
            15..=16 => {
                // Below, at and far above the longest line and a block.
                let bytes = [0, 10, 100, 1_000, 20_000][self.random.below(5)];
                let content: Vec<u8> = (0..bytes).map(|_| self.random.next().to_le_bytes()[0]).collect();
                let name = format!("f{}", self.random.below(4));
                let request = format!("SEND FILE {token} {} {name} {}", USERS[other], STANDARD.encode(&content));
                self.model.contents.insert((user, other, name.clone(), content));
                (request, Asked::File { from: user, to: vec![other], name })
            }
            20 => {
                // Stored once for all, and gone with the last who drops it.
                let bytes = [0, 40, 2_000][self.random.below(3)];
                let content: Vec<u8> = (0..bytes).map(|_| self.random.next().to_le_bytes()[0]).collect();
                let name = ["f0", "dropped0", "dropped1"][self.random.below(3)].to_owned();
                let request = format!("SEND GROUP FILE {token} {GROUP} {name} {}", STANDARD.encode(&content));
                let to: Vec<usize> = (0..3).filter(|member| *member != user).collect();
                for receiver in &to {
                    self.model.contents.insert((user, *receiver, name.clone(), content.clone()));
                }
                // Whether it is there in the end depends on who drops it when.
                let to = if name == "f0" && user < 3 { to } else { Vec::new() };
                (request, Asked::File { from: user, to, name })
            }
            21 => {
                let name = format!("dropped{}", self.random.below(2));
                let party = if self.random.one_in(3) { GROUP } else { USERS[other] };
                (format!("DELETE FILE {token} {party} {name}"), Asked::Drop)
            }
            17 => {
                let name = format!("f{}", self.random.below(4));
                let request = format!("DOWNLOAD FILE {token} {} {name}", USERS[other]);
                (request, Asked::Download { user, party: other, name })
            }
            18 => (format!("SEND MESSAGE {token} nobody r{}", self.sent), Asked::Other),
            _ => (
                ["PING", "HALO", "SEND MESSAGE", "MY FILE x", "\u{fffd}"][self.random.below(5)].to_owned(),
                Asked::Other,
            ),
        }
    }

    /// Some of what the clients wrote arrives.
    fn deliver_bytes(&mut self) {
        let Some(id) = self.any_line() else { return };
        let most = [1, 7, 100, 5_000, 200_000][self.random.below(5)];
        let count = self.random.below(most) + 1;
        let ends = self.random.one_in(300);
        let line = self.net.lines.get_mut(&id).unwrap();
        line.arrived = (line.arrived + count).min(line.to_server.len());
        line.is_ended |= ends;
        self.engine().ready(id, true, false);
    }

    /// A client reads, so that the kernel takes more.
    fn open_window(&mut self) {
        let Some(id) = self.any_line() else { return };
        let most = [3, 50, 2_000, 300_000][self.random.below(4)];
        let more = self.random.below(most);
        self.net.lines.get_mut(&id).unwrap().room += more;
        self.engine().ready(id, false, true);
    }

    /// A worker does the oldest job of some kind.
    fn work(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let at = self.random.below(self.pending.len());
        let kind = std::mem::discriminant(&self.pending[at]);
        let oldest = self.pending.iter().position(|job| std::mem::discriminant(job) == kind).unwrap();
        let job = self.pending.remove(oldest).unwrap();
        self.do_job(job);
    }

    fn do_job(&mut self, job: Job) {
        let done = self.try_job(job);
        if done.is_err() || self.machine.disk.is_cut() {
            // Nothing can be promised after it: the server ends.
            self.seen.failures += usize::from(!self.machine.disk.is_cut());
            assert!(!self.is_calm, "a disk that does not fail: {done:?}");
            self.crash(false);
        }
    }

    fn try_job(&mut self, job: Job) -> Result<(), String> {
        let Self { machine, engine, seen, .. } = self;
        let (sync, Workers { disk, .. }) = (machine.sync, machine.workers.as_mut().unwrap());
        let engine = engine.as_mut().unwrap();
        let transfer = match &job {
            Job::File(FileJob::Forget(transfer)) => Some(*transfer),
            _ => None,
        };
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        match job {
            Job::Journal(batch) => {
                let mut batches = vec![batch];
                // What has come meanwhile is written with it.
                while self.random.one_in(2)
                    && let Some(next) = self.pending.iter().position(|job| matches!(job, Job::Journal(_)))
                    && let Some(Job::Journal(batch)) = self.pending.remove(next)
                {
                    batches.push(batch);
                }
                let settled = store::write(&mut disk.journal, batches, sync).map_err(|error| failed(&error))?;
                engine.complete(settled);
                if sync == Sync::Always {
                    machine.workers().synced = machine.workers.as_ref().unwrap().disk.journal.synced();
                }
            }
            Job::Password(job) => engine.complete(Completion::Password(common::check(&job))),
            Job::File(job) => {
                let done = disk.files.run(job);
                if let Some((transfer, file)) = disk.files.take_opened() {
                    self.net.opened.insert(transfer, file);
                }
                if let Some(done) = done.map_err(|error| failed(&error))? {
                    if let FileDone::Stored(..) = &done {
                        seen.stored += 1;
                    }
                    engine.complete(Completion::File(done));
                }
            }
            Job::Texts(job) => engine.complete(store::read(&mut disk.texts, &job)),
            Job::Space(job) => {
                let spare = disk.space.done().spare;
                let (done, made) = disk.space.run(&job).map_err(|(_, error)| failed(&error))?;
                seen.recycled += usize::from(spare > 0 && made.is_some());
                if let Some(segment) = made {
                    disk.journal.add(segment);
                }
                engine.complete(Completion::Space(done));
            }
            Job::Compact(job) => {
                if let Some(compacted) = disk.compactor.run(job).map_err(|error| failed(&error))? {
                    seen.count(&compacted);
                    engine.complete(Completion::Compacted(compacted));
                }
            }
        }
        if let Some(transfer) = transfer {
            self.net.opened.remove(&transfer);
        }
        Ok(())
    }

    fn turn(&mut self) {
        let engine = self.engine.as_mut().unwrap();
        engine.turn(self.now, &mut self.net);
        engine.assert_invariants();
        self.now.utc_ms += 7;
        self.now.steady_ms += 7;
        self.pending.append(&mut self.net.submitted);
    }

    /// With [`Sync::Interval`] the sync thread takes what was written, or syncs it.
    fn sync(&mut self) {
        if self.machine.sync == Sync::Always {
            return;
        }
        let workers = self.machine.workers();
        let Some(unsynced) = workers.unsynced.pop_front() else {
            if workers.synced == workers.disk.journal.end() {
                return;
            }
            let unsynced = workers.disk.journal.take_unsynced();
            return workers.unsynced.push_back(unsynced);
        };
        match unsynced.sync() {
            Ok(synced) => {
                workers.synced = workers.synced.max(synced);
                self.engine().complete(Completion::Synced(synced));
            }
            Err(error) => {
                assert!(!self.is_calm, "a disk that does not fail: {error}");
                self.crash(false);
            }
        }
    }

    /// A backup is begun, or the one that was begun before is ended.
    fn backup(&mut self) {
        match self.backup.take() {
            None => {
                let connection = self.engine().open(Peer::Admin);
                let mut line = Line::new(connection, 10_000);
                line.to_server.extend(b"BACKUP\n");
                line.arrived = line.to_server.len();
                line.asked.push_back(Asked::Backup);
                self.net.lines.insert(connection, line);
                self.backup = Some(Backup { connection, point: None });
                self.turn();
            }
            Some(Backup { connection, point }) => {
                // A backup whose connection broke off is none.
                let is_held = self.net.lines.get(&connection).is_some_and(|line| !line.is_ended);
                if let Some((point, expected)) = point.filter(|_| is_held) {
                    self.make_backup(&point, expected);
                }
                if self.machine.disk.is_cut() {
                    return self.crash(false);
                }
                self.lose(connection);
                self.engine().ready(connection, true, true);
            }
        }
    }

    /// What `kurir backup` does once the server has said what a backup is of.
    fn make_backup(&mut self, point: &Point, expected: State) {
        self.copies += 1;
        let to = format!("{COPIES}/{}", self.copies);
        let made = Copy::make(&self.machine.disk(), Path::new(DATA), Path::new(&to), point).and_then(Copy::finish);
        match made {
            Ok(_) => {
                self.assert_is_copy(&to, &expected);
                self.seen.backups += 1;
                self.kept.push((to, expected));
            }
            Err(error) => assert!(!self.is_calm, "there is no backup: {error}"),
        }
    }

    fn assert_is_copy(&self, copy: &str, expected: &State) {
        let disk = self.machine.disk.snapshot();
        let machine = Machine { disk, sync: self.machine.sync, workers: None };
        let (workers, state, ..) = machine.start_in(&machine.disk(), copy).expect("a server starts from a backup");
        assert!(state == *expected, "a backup is not what there was");
        for (_, mailbox) in state.mailboxes() {
            mailbox.entries().iter().for_each(|entry| drop(machine.text(copy, workers.layout, entry.place())));
        }
        for (file, stored) in state.files() {
            match stored.kept {
                Kept::Journal(place) => drop(machine.content(copy, workers.layout, place)),
                Kept::Apart { sum } => {
                    assert_eq!(workers.disk.files.sum(file).unwrap(), (stored.bytes, sum.unwrap()));
                }
            }
        }
    }

    /// The server has said what a backup is of: what that is is seen from a copy that is made at once.
    fn backup_begun(&mut self, reply: &Value) {
        if reply["status"] != "OK" {
            return;
        }
        let point = Point::from_json(&reply["data"]).unwrap();
        let disk = self.machine.disk.snapshot();
        let machine = Machine { disk, sync: self.machine.sync, workers: None };
        let now = "/srv/now";
        let made = Copy::make(&machine.disk(), Path::new(DATA), Path::new(now), &point).and_then(Copy::finish);
        made.expect("all that a backup is of is there");
        let (_, expected, ..) = machine.start_in(&machine.disk(), now).unwrap();
        self.backup = self.backup.take().map(|backup| Backup { point: Some((point, expected)), ..backup });
    }

    /// A client goes without a word; replies that it has not read are lost to it.
    fn break_off(&mut self) {
        let Some(id) = self.any_line() else { return };
        if !self.random.one_in(3) {
            return;
        }
        self.seen.broken += 1;
        self.lose(id);
        self.engine().ready(id, true, true);
    }

    /// The connection is gone: what was asked on it and not answered may or may not have happened.
    fn lose(&mut self, id: ConnectionId) {
        if let Some(line) = self.net.lines.remove(&id) {
            let is_cut_short = !line.from_server.is_empty() && matches!(line.asked.front(), Some(Asked::Inbox(_)));
            self.seen.cut_short += usize::from(is_cut_short);
        }
    }

    /// The server ends without a word, by a power cut or on its own, and starts again. `is_quiet` says that it was not in the
    /// middle of a job.
    fn crash(&mut self, is_quiet: bool) {
        // Whatever has reached the clients has reached them.
        self.read_replies();
        self.seen.crashes += 1;
        self.backup = None;
        let ids: Vec<ConnectionId> = self.net.lines.keys().copied().collect();
        for id in ids {
            self.lose(id);
        }
        let engine = self.engine.take().unwrap();
        let is_quiet = is_quiet && !engine.has_work() && self.pending.is_empty() && self.net.submitted.is_empty();
        self.pending.clear();
        self.net.submitted.clear();
        self.net.opened.clear();
        let disk = Arc::clone(&self.machine.disk);
        let in_the_middle = disk.is_cut();
        self.seen.cuts += usize::from(in_the_middle);
        // The process alone may be killed in the middle of something too.
        let is_cut = self.random.one_in(2);
        let synced = self.machine.workers().synced;
        if is_cut {
            disk.cut();
        }
        // What they still have open goes with them.
        self.machine.workers = None;
        self.go_on_after(is_cut, synced);
        let (state, mut log, holdings) = self.restart(synced);
        if is_quiet && (self.machine.sync == Sync::Always || !is_cut) && !in_the_middle {
            // They are too long to be shown.
            assert!(state == *engine.state(), "what is recovered is not what there was");
            self.seen.compared += 1;
        }
        self.take_stock(&state);
        log.set_tail_bytes(self.random.below(5000));
        self.engine = Some(start(&mut self.random, self.has_deadlines, state, log, holdings));
    }

    /// The machine comes back, if it was gone.
    fn go_on_after(&mut self, is_cut: bool, synced: Lsn) {
        if !is_cut {
            return self.machine.disk.was_no_cut();
        }
        self.power_was_cut(synced);
        for (copy, expected) in std::mem::take(&mut self.kept) {
            self.assert_is_copy(&copy, &expected);
            self.seen.kept_backups += 1;
        }
    }

    /// Where syncs are seldom, what was not on the disk may be gone.
    fn power_was_cut(&mut self, synced: Lsn) {
        self.machine.disk.restart();
        if self.machine.sync == Sync::Interval {
            self.forget_since(synced);
            self.tokens = [const { None }; USERS.len()];
        }
    }

    /// Starts a server, though power may go and the disk may fail meanwhile. The one before knew that all before `synced` was
    /// on the disk.
    fn restart(&mut self, synced: Lsn) -> (State, Log, Holdings) {
        let disk = Arc::clone(&self.machine.disk);
        for tries in 0.. {
            let is_calm = self.is_calm || tries > 3;
            match self.random.below(4) {
                _ if is_calm => {
                    disk.set_failures(None);
                    disk.set_room(None);
                    disk.cut_after(u64::MAX / 2);
                }
                0 => disk.cut_after(self.random.next() % 25),
                1 if self.random.one_in(2) => disk.set_failures(Some(1 + self.random.next() % 40)),
                _ => {}
            }
            let started = self.machine.start();
            if disk.is_cut() {
                self.seen.cuts_in_starts += 1;
                self.machine.workers = None;
                if self.random.one_in(2) {
                    self.power_was_cut(synced);
                } else {
                    disk.was_no_cut();
                }
                continue;
            }
            match started {
                Ok(started) => {
                    if !self.is_calm {
                        disk.cut_after(u64::MAX / 2);
                    }
                    return started;
                }
                Err(error) => {
                    assert!(!is_calm, "a server does not start: {error}");
                    let is_damage = matches!(&error, StoreError::Data(error) if !is_of_disk(error));
                    assert!(!is_damage, "a server does not start: {error}");
                    disk.end_process();
                }
            }
        }
        unreachable!("it has started, or the test has failed")
    }

    /// What the clients may find now.
    fn take_stock(&mut self, state: &State) {
        // That a message was delivered may not have been written down; then it comes again.
        let layout = self.machine.workers().layout;
        for (index, name) in USERS.iter().enumerate() {
            let user = state.user_named(name).unwrap();
            for entry in state.mailbox(user).unwrap().entries() {
                let key = (index, self.machine.text(DATA, layout, entry.place()));
                if let Some(id) = self.model.delivered.remove(&key) {
                    self.model.undone.insert(key, id);
                }
            }
        }
    }

    /// What was acknowledged after this was written may be gone.
    fn forget_since(&mut self, synced: Lsn) {
        for (_, text) in self.model.soft.extract_if(.., |(written, _)| *written > synced) {
            self.model.acknowledged.remove(&text);
            for texts in self.model.order.values_mut() {
                texts.retain(|known| *known != text);
            }
        }
        for (_, file) in self.model.soft_files.extract_if(.., |(written, _)| *written > synced) {
            self.model.files.remove(&file);
        }
    }

    /// Whole replies are taken from every line.
    fn read_replies(&mut self) {
        let mut lines = std::mem::take(&mut self.net.lines);
        for line in lines.values_mut() {
            while let Some(end) = memchr::memmem::find(&line.from_server, END) {
                let reply: Vec<u8> = line.from_server.drain(..end + END.len()).collect();
                let reply: Value = serde_json::from_slice(&reply).expect("a reply is JSON");
                let asked = line.asked.pop_front().expect("every reply answers a request");
                if line.is_closed && matches!(asked, Asked::Backup) {
                    // The disk is full, and what a backup is of is not kept for it any more.
                    continue;
                }
                self.answered(line.id, asked, &reply);
            }
            // The connection of a backup may be closed when the disk is full; nobody else's.
            let is_backup = self.backup.as_ref().is_some_and(|backup| backup.connection == line.id);
            let is_done = line.is_ended && line.from_server.is_empty() && line.asked.is_empty();
            if line.is_closed && !is_backup && self.has_deadlines && !is_done {
                self.seen.late += 1;
            } else if line.is_closed && !is_backup {
                assert!(line.is_ended, "a connection was closed that its client had not ended");
                assert!(line.from_server.is_empty(), "a connection was closed in the middle of a reply");
                assert!(line.asked.is_empty(), "a connection was closed before {:?} was answered", line.asked);
            }
        }
        lines.retain(|_, line| !line.is_closed);
        self.net.lines = lines;
    }

    fn answered(&mut self, id: ConnectionId, asked: Asked, reply: &Value) {
        let is_ok = reply["status"] == "OK";
        self.seen.refused += usize::from(!is_ok);
        match asked {
            Asked::Login(user) if is_ok => self.tokens[user] = Some(reply["data"].as_str().unwrap().to_owned()),
            Asked::Message { to, text } if is_ok => {
                self.seen.acknowledged += 1;
                for receiver in &to {
                    self.model.order.entry((id, *receiver)).or_default().push(text.clone());
                }
                self.model.soft.push((self.machine.workers().disk.journal.end(), text.clone()));
                self.model.acknowledged.insert(text, to);
            }
            Asked::Message { text, .. } => {
                self.model.refused.insert(text);
            }
            Asked::Inbox(user) if is_ok => self.received(user, reply),
            Asked::File { from, to, name } if is_ok => {
                self.seen.files += 1;
                for to in to {
                    self.model.soft_files.push((self.machine.workers().disk.journal.end(), (from, to, name.clone())));
                    self.model.files.insert((from, to, name.clone()));
                }
            }
            Asked::Drop if is_ok => self.seen.dropped += 1,
            Asked::Download { user, party, name } if is_ok => {
                self.seen.downloads += 1;
                let data = STANDARD.decode(reply["data"].as_str().unwrap()).unwrap();
                let was_sent = |from, to| self.model.contents.contains(&(from, to, name.clone(), data.clone()));
                assert!(was_sent(user, party) || was_sent(party, user), "a file came back that nobody sent so");
            }
            Asked::Backup => self.backup_begun(reply),
            Asked::Login(_)
            | Asked::Inbox(_)
            | Asked::File { .. }
            | Asked::Download { .. }
            | Asked::Drop
            | Asked::Other => {}
        }
    }

    /// An INBOX reply came out whole: what is in it was not delivered before, unless a crash undid that.
    fn received(&mut self, user: usize, reply: &Value) {
        let mut ids = Vec::new();
        for (sender, messages) in reply["data"].as_object().unwrap() {
            for message in messages.as_array().unwrap() {
                assert_eq!(message["nama pengirim"], **sender);
                let text = message["pesan"].as_str().unwrap().to_owned();
                let id = message["id"].as_u64().unwrap();
                ids.push(id);
                let key = (user, text);
                if let Some(before) = self.model.undone.remove(&key) {
                    self.seen.given_again += 1;
                    assert_eq!(before, id, "{} is given again with another id", key.1);
                }
                assert!(!self.model.delivered.contains_key(&key), "{} was delivered twice", key.1);
                assert!(self.model.texts.contains(&key.1), "{} was never sent", key.1);
                assert!(!self.model.refused.contains(&key.1), "{} was refused and delivered", key.1);
                self.seen.delivered += 1;
                self.model.delivered.insert(key, id);
            }
        }
        let distinct: BTreeSet<u64> = ids.iter().copied().collect();
        assert_eq!(distinct.len(), ids.len(), "an id stands twice in one reply");
    }

    /// Everything that is under way comes to its end.
    fn settle_down(&mut self) {
        self.machine.disk.set_room(None);
        for line in self.net.lines.values_mut() {
            line.room = usize::MAX;
            line.arrived = line.to_server.len();
        }
        let ids: Vec<ConnectionId> = self.net.lines.keys().copied().collect();
        for id in ids {
            self.engine().ready(id, true, true);
        }
        let mut rounds = 0;
        // So long that what is tried again is tried again, and that whoever lingers goes.
        let end = self.now.steady_ms + 10_000;
        let is_synced =
            |world: &mut Self| world.machine.sync == Sync::Always || world.machine.workers().unsynced.is_empty();
        let next = |world: &mut Self| world.engine().next_deadline().filter(|at| *at < end);
        while self.engine().has_work() || !self.pending.is_empty() || next(self).is_some() {
            rounds += 1;
            assert!(rounds < 10_000, "it never comes to rest: {:?}", self.engine());
            if !self.engine().has_work() && self.pending.is_empty() {
                self.now.steady_ms = self.now.steady_ms.max(next(self).unwrap_or(0));
            }
            self.turn();
            while !self.pending.is_empty() {
                self.work();
            }
            self.sync();
            while !is_synced(self) {
                self.sync();
            }
        }
        self.read_replies();
        for line in self.net.lines.values() {
            assert!(line.asked.is_empty(), "not answered: {:?}", line.asked);
            assert!(!line.is_ended, "a connection that its client had ended was not closed");
        }
    }

    fn drain_mailboxes(&mut self) {
        for (user, name) in USERS.into_iter().enumerate() {
            loop {
                let before = self.seen.delivered;
                self.ask_and_settle(&format!("AUTH {name} surabaya"), Asked::Login(user));
                let token = self.tokens[user].clone().unwrap();
                self.ask_and_settle(&format!("INBOX {token}"), Asked::Inbox(user));
                if self.seen.delivered == before {
                    break;
                }
            }
        }
    }

    fn ask_and_settle(&mut self, request: &str, asked: Asked) {
        let ids: Vec<ConnectionId> = self.net.lines.keys().copied().collect();
        for id in ids {
            self.lose(id);
            self.engine().ready(id, true, true);
        }
        self.connect();
        let id = self.any_line().unwrap();
        let line = self.net.lines.get_mut(&id).unwrap();
        line.to_server.extend(request.bytes().chain([b'\n']));
        line.asked.push_back(asked);
        self.settle_down();
    }

    fn judge(&mut self) {
        for (text, receivers) in &self.model.acknowledged {
            for receiver in receivers {
                let is_delivered = self.model.delivered.contains_key(&(*receiver, text.clone()));
                assert!(is_delivered, "{text} was acknowledged and never came to {}", USERS[*receiver]);
            }
        }
        for ((_, to), texts) in &self.model.order {
            let ids: Vec<u64> = texts.iter().map(|text| self.model.delivered[&(*to, text.clone())]).collect();
            assert!(ids.is_sorted_by(|a, b| a < b), "messages of one connection came out of order: {texts:?} {ids:?}");
        }
        let state = self.engine.as_ref().unwrap().state();
        let files = self.machine.disk.files_below(Path::new(DATA).join("files").as_path());
        let id_of = |path: &Path| u64::from_str_radix(path.file_name().unwrap().to_str().unwrap(), 16).unwrap();
        let kept: BTreeMap<FileId, &Path> = files.iter().map(|path| (FileId(id_of(path)), path.as_path())).collect();
        assert!(kept.keys().all(|file| state.file(*file).is_some()), "bytes are kept that nobody lists");
        let layout = self.machine.workers.as_ref().unwrap().layout;
        for (from, to, name) in &self.model.files {
            let user = state.user_named(USERS[*to]).unwrap();
            let file = state.file_listed(user, USERS[*from], name).expect("an acknowledged file is listed");
            let stored = state.file(file).unwrap();
            let content = match stored.kept {
                Kept::Apart { sum } => {
                    let content = self.machine.disk.read_file(kept[&file]).unwrap();
                    assert_eq!(sum, Some(crc32c::crc32c(&content)));
                    content
                }
                Kept::Journal(place) => {
                    self.seen.small_files += 1;
                    self.machine.content(DATA, layout, place)
                }
            };
            // The newest of that name may have gone the other way.
            let was_sent = |from, to| self.model.contents.contains(&(from, to, name.clone(), content.clone()));
            assert!(was_sent(*from, *to) || was_sent(*to, *from), "an acknowledged file is not what was sent");
        }
        self.seen.cached_reads += self.net.cached_reads;
    }
}

/// The disk said so, and not what is on it.
fn is_of_disk(error: &kurir::data::DataError) -> bool {
    matches!(error, kurir::data::DataError::Io(..))
}

fn make_accounts(state: &mut State, log: &mut Log) {
    let hash = common::hash("surabaya");
    let mut make = |state: &mut State, change: &Change<'_>| {
        let place = log.append(change, Need::More).unwrap();
        state.apply(change, place);
    };
    for name in USERS {
        make(state, &Change::UserAdded { user: state.next_user(), name, password_hash: &hash });
    }
    let (owner, group) = (state.user_named(USERS[0]).unwrap(), state.next_group());
    make(state, &Change::GroupCreated { group, name: GROUP, owner, secret_hash: None });
    for name in &USERS[1..3] {
        make(state, &Change::MemberJoined { group, user: state.user_named(name).unwrap() });
    }
}
