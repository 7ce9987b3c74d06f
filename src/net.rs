//! The world of the server: sockets, signals, the clock, and the loop that turns the engine.
//!
//! mio tells when a socket may be read or written; the engine is told, and takes a turn. Nothing here knows what a
//! request is.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::event::Event;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook_mio::v1_0::Signals;
use socket2::{Domain, Protocol, SockRef, TcpKeepalive, Type};
use tracing::{debug, info, warn};

use crate::admin::{self, AdminError};
use crate::clock::Clock;
use crate::connection::{ConnectionId, Peer};
use crate::engine::{Engine, Host, Job, Registration};
use crate::files::TransferId;
use crate::limits::Limits;
use crate::log::Sync;
use crate::password::{HashError, Hasher};
use crate::store::{Store, StoreError, StoreWorkers, WorkError};
use crate::threads::Threads;

const WAKER: Token = Token(usize::MAX);
const SIGNALS: Token = Token(usize::MAX - 1);
const LISTENER_LAST: usize = usize::MAX - 2;
/// The exit code when a second signal comes before the first is done with.
const EXIT_STOPPED_AT_ONCE: u8 = 1;
const EVENTS_PER_TURN_MAX: usize = 1024;
/// Connections that wait to be accepted, as far as the system lets them.
const LISTEN_BACKLOG: i32 = 4096;
/// File descriptors that are for neither connections nor transfers: listeners, the journal, checkpoints, and room to spare.
/// Administrators, and connections that are turned away, come on top.
const FILES_RESERVED: usize = 64;
/// What the system holds for a peer beyond what is on its way, before it says that it takes no more.
const UNSENT_BYTES: u32 = 256 * 1024;
/// How long an accept that failed for want of file descriptors is put off.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// The longest the loop sleeps, so that what depends on the clock alone happens.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// How often it is made sure that the data directory is still the one that was locked.
const LOOK_EVERY: Duration = Duration::from_millis(100);

// A token holds a connection's place and its generation.
const _: () = assert!(usize::BITS == 64);

/// What a server is started with.
#[derive(Debug)]
pub struct ServerOptions {
    /// Where it listens.
    pub listen: Vec<SocketAddr>,
    /// Where it keeps its data.
    pub data: PathBuf,
    /// What strangers may do.
    pub registration: Registration,
    /// Its bounds.
    pub limits: Limits,
    /// It has the demonstration accounts.
    pub is_demo: bool,
    /// When it says OK.
    pub sync: Sync,
}

/// Why a server did not start, or stopped.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum ServerError {
    /// Before it took connections.
    Listen(SocketAddr, io::Error),
    AdminSocket(PathBuf, io::Error),
    Store(StoreError),
    Demo(AdminError),
    Hash(HashError),
    Setup(&'static str, io::Error),
    /// The segments of the data directory are too small for lines longer than this.
    Lines(u64),
    /// While it ran.
    Poll(io::Error),
    Work(WorkError),
}

impl ServerError {
    /// The server never took a connection: something about its arguments or its surroundings is wrong.
    #[must_use]
    pub fn is_before_start(&self) -> bool {
        !matches!(self, Self::Poll(_) | Self::Work(_))
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen(address, error) if error.kind() == ErrorKind::AddrInUse => {
                write!(f, "cannot listen on {address}: the port is taken")
            }
            Self::Listen(address, error) => write!(f, "cannot listen on {address}: {error}"),
            Self::AdminSocket(path, error) => write!(f, "cannot make the admin socket {}: {error}", path.display()),
            Self::Store(error) => error.fmt(f),
            Self::Demo(error) => write!(f, "cannot make the demonstration accounts: {error}"),
            Self::Hash(error) => error.fmt(f),
            Self::Lines(bytes) => write!(
                f,
                "the journal of this data directory has segments for lines of at most {bytes} bytes; see --line-bytes-max"
            ),
            Self::Setup(what, error) => write!(f, "cannot {what}: {error}"),
            Self::Poll(error) => write!(f, "waiting for events failed: {error}"),
            Self::Work(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ServerError {}

/// A server that listens.
pub struct Server {
    poll: Poll,
    signals: Signals,
    engine: Engine,
    listeners: Vec<Listener>,
    first_listener: usize,
    started: Instant,
    net: Net,
    admin_socket: PathBuf,
    /// With this, a signal ends the process at once.
    is_stopping: Arc<AtomicBool>,
    /// When it was last made sure that the data directory is still the one that was locked.
    looked_at: Instant,
}

/// What the engine sees of the world.
struct Net {
    registry: Registry,
    sockets: Vec<Option<Watched>>,
    threads: Threads,
}

struct Listener {
    socket: ListenerSocket,
    /// There may be connections to accept. Cleared when it says that there are none.
    is_ready: bool,
    retry_at: Option<Instant>,
}

enum ListenerSocket {
    Tcp(TcpListener),
    Admin(UnixListener),
}

/// A socket, and what its events have said of it.
struct Watched {
    socket: Socket,
    /// A read took less than it could have, and no event has come since: the next would find nothing.
    is_drained: bool,
    /// The peer ends, so a read that takes little may still have the end of the stream behind it.
    is_ending: bool,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Server {
    /// Opens the data directory, listens, and starts the helper threads. Connections wait until [`Self::run`].
    ///
    /// # Errors
    /// [`ServerError`], before anything was promised to anybody.
    pub fn start(options: ServerOptions) -> Result<Self, ServerError> {
        let ServerOptions { listen, data, registration, mut limits, is_demo, sync } = options;
        fit_to_file_limit(&mut limits)?;
        // A taken port leaves no data directory behind.
        let sockets = bind(&listen)?;
        let exposed: Vec<&SocketAddr> = listen.iter().filter(|address| !is_loopback(address.ip())).collect();
        if !exposed.is_empty() {
            warn!(?exposed, "traffic is not encrypted, and passwords are in it: put a TLS proxy or a tunnel in front");
        }
        let mut store = Store::open(&data, limits.segment_bytes, sync).map_err(ServerError::Store)?;
        if store.log.line_bytes_max() < limits.line_bytes_max {
            return Err(ServerError::Lines(store.log.line_bytes_max()));
        }
        let mut hasher = Hasher::new().map_err(ServerError::Hash)?;
        if !exposed.is_empty() && admin::has_demo_password(&store.state, &mut hasher).map_err(ServerError::Hash)? {
            warn!("there are demonstration accounts, whose password everybody knows: see `kurir user password`");
        }
        if is_demo {
            admin::make_demo(&mut store, &mut hasher).map_err(ServerError::Demo)?;
        }
        let poll = Poll::new().map_err(|error| ServerError::Setup("poll", error))?;
        let admin_socket = store.directory.admin_socket();
        let sockets = sockets.into_iter().chain([bind_admin(&admin_socket)?]);
        let listeners = watch(sockets, poll.registry())?;

        let setup = |error| ServerError::Setup("watch for events", error);
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).map_err(setup)?);
        let is_stopping = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // Even a disk or a terminal that hangs does not hold this up.
            let code = i32::from(EXIT_STOPPED_AT_ONCE);
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&is_stopping)).map_err(setup)?;
        }
        let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(setup)?;
        // A file that may not grow is an error of the write, not the end of the process.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(setup)?;
        poll.registry().register(&mut signals, SIGNALS, Interest::READABLE).map_err(setup)?;
        let registry = poll.registry().try_clone().map_err(setup)?;

        let Store { directory, state, log, holdings, disk } = store;
        let engine = Engine::new(limits, registration, state, log, holdings);
        let threads = Threads::start(directory, StoreWorkers { disk, hasher }, sync, waker)
            .map_err(|error| ServerError::Setup("start a thread", error))?;
        let Limits { connections_max, uploads_max, downloads_max, .. } = *engine.limits();
        info!(?sync, connections_max, uploads_max, downloads_max, ?registration, "serving");
        let net = Net { registry, sockets: Vec::new(), threads };
        Ok(Self {
            poll,
            signals,
            engine,
            listeners,
            first_listener: 0,
            started: Instant::now(),
            net,
            admin_socket,
            is_stopping,
            looked_at: Instant::now(),
        })
    }

    /// Where it listens, with the real ports.
    ///
    /// # Errors
    /// What the system said.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let tcp = self.listeners.iter().filter_map(|listener| match &listener.socket {
            ListenerSocket::Tcp(socket) => Some(socket.local_addr()),
            ListenerSocket::Admin(_) => None,
        });
        tcp.collect()
    }

    /// Serves until a signal says stop, and until what was received by then is answered.
    ///
    /// # Errors
    /// [`ServerError::Work`] when the disk failed: nothing more was acknowledged then.
    pub fn run(mut self) -> Result<(), ServerError> {
        let served = self.serve();
        // The helper threads may still write. A signal need not wait for them, should the disk hang.
        self.is_stopping.store(true, Ordering::SeqCst);
        let directory = self.net.threads.directory();
        let (is_ours, root) = (directory.place().is_still_there(), directory.root().path().to_owned());
        // Whatever failed, that is why.
        let served = served.map_err(|error| match error {
            ServerError::Work(_) if !is_ours => ServerError::Work(WorkError::DirectoryGone(root)),
            error => error,
        });
        let finished = self.net.threads.finish().map_err(ServerError::Work);
        if is_ours && let Err(error) = fs::remove_file(&self.admin_socket) {
            warn!(%error, "the admin socket could not be removed");
        }
        served?;
        info!("stopped");
        finished
    }

    fn serve(&mut self) -> Result<(), ServerError> {
        let mut events = Events::with_capacity(EVENTS_PER_TURN_MAX);
        let mut stop_by: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let timeout = self.timeout(now, stop_by);
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result.map_err(ServerError::Poll)?,
            }
            for event in &events {
                match event.token() {
                    WAKER => {}
                    SIGNALS => self.begin_stop(&mut stop_by),
                    Token(token) => match self.listeners.get_mut(LISTENER_LAST - token) {
                        Some(listener) => listener.is_ready = true,
                        None => {
                            self.net.ready(connection_id(token), event);
                            self.engine.ready(connection_id(token), is_readable(event), is_writable(event));
                        }
                    },
                }
            }
            self.look_at_directory(Instant::now())?;
            while let Some(report) = self.net.threads.report() {
                self.engine.complete(report.map_err(ServerError::Work)?);
            }
            self.accept(Instant::now());
            self.engine.turn(self.clock(), &mut self.net);
            if self.engine.is_stopped() {
                return Ok(());
            }
            if stop_by.is_some_and(|deadline| Instant::now() >= deadline) {
                warn!(connections = self.engine.connections(), "some peers did not take their replies in time");
                self.engine.submit_batch(&mut self.net);
                self.net.let_go();
                return Ok(());
            }
        }
    }

    /// Makes sure now and then that the data directory is still the one that was locked. If another stands in its place, that
    /// may be another server's.
    fn look_at_directory(&mut self, now: Instant) -> Result<(), ServerError> {
        if now.saturating_duration_since(self.looked_at) < LOOK_EVERY {
            return Ok(());
        }
        self.looked_at = now;
        let directory = self.net.threads.directory();
        if directory.place().is_still_there() {
            return Ok(());
        }
        Err(ServerError::Work(WorkError::DirectoryGone(directory.root().path().to_owned())))
    }

    fn clock(&self) -> Clock {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let utc = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Clock { utc_ms: ms(utc), steady_ms: ms(self.started.elapsed()) }
    }

    fn timeout(&self, now: Instant, stop_by: Option<Instant>) -> Duration {
        if self.engine.has_work() {
            return Duration::ZERO;
        }
        let until = |listener: &Listener| match listener.retry_at {
            _ if !listener.is_ready => None,
            Some(at) => Some(at.saturating_duration_since(now)),
            None => Some(Duration::ZERO),
        };
        let retry = self.listeners.iter().filter_map(until).min();
        let stop = stop_by.map(|deadline| deadline.saturating_duration_since(now));
        let engine =
            self.engine.next_deadline().map(|at| Duration::from_millis(at.saturating_sub(self.clock().steady_ms)));
        [retry, stop, engine].into_iter().flatten().min().unwrap_or(SLEEP_MAX).min(SLEEP_MAX)
    }

    /// The first signal begins the stop. From then on the next one ends the process where it stands.
    fn begin_stop(&mut self, stop_by: &mut Option<Instant>) {
        for signal in self.signals.pending() {
            let limit_ms = self.engine.limits().stop_ms_max;
            info!(signal, connections = self.engine.connections(), "stopping");
            *stop_by = Instant::now().checked_add(Duration::from_millis(limit_ms));
            self.is_stopping.store(true, Ordering::SeqCst);
            self.listeners.clear();
            self.net.forget_events();
            self.engine.stop();
        }
    }

    /// Accepts what waits, a bounded number a turn: of peers, wherever they come in, and of administrators as many again.
    fn accept(&mut self, now: Instant) {
        let accepts_max = self.engine.limits().accepts_per_turn_max;
        let turned_away_max = self.engine.limits().turned_away_max.max(1);
        let mut peers_left = accepts_max;
        // Each turn begins with another listener, so that none takes the places of the others.
        let count = self.listeners.len().max(1);
        self.first_listener = (self.first_listener + 1) % count;
        for index in 0..self.listeners.len() {
            let listener = &mut self.listeners[(self.first_listener + index) % count];
            if listener.retry_at.is_some_and(|at| now < at) {
                continue;
            }
            listener.retry_at = None;
            let mut turned_away = 0;
            let mut administrators_left = accepts_max;
            let left = match listener.socket {
                ListenerSocket::Tcp(_) => &mut peers_left,
                ListenerSocket::Admin(_) => &mut administrators_left,
            };
            while *left > 0 && listener.is_ready && turned_away < turned_away_max {
                *left -= 1;
                match listener.accept() {
                    Ok((socket, peer)) => {
                        turned_away += usize::from(!self.engine.admits(peer));
                        let id = self.engine.open(peer);
                        self.net.insert(id, socket);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => listener.is_ready = false,
                    // The peer left before it was accepted.
                    Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                    Err(error) => {
                        warn!(%error, "a connection could not be accepted; trying again");
                        listener.retry_at = Some(now + ACCEPT_RETRY);
                        break;
                    }
                }
            }
        }
    }
}

impl Listener {
    fn accept(&self) -> io::Result<(Socket, Peer)> {
        match &self.socket {
            ListenerSocket::Tcp(socket) => {
                let (stream, address) = socket.accept()?;
                // Replies are written whole, so there is nothing to gain from holding a small one back.
                if let Err(error) = stream.set_nodelay(true) {
                    debug!(%error, "a connection is as slow as its system makes it");
                }
                // A peer that reads slowly is seen to read in small steps, and its kernel's buffer holds little.
                if let Err(error) = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES) {
                    debug!(%error, "a connection that reads slowly may be taken for one that does not read");
                }
                // A peer that vanished without a word would keep what it had begun for ever.
                if let Err(error) = SockRef::from(&stream).set_tcp_keepalive(&keepalive()) {
                    debug!(%error, "a connection whose peer vanishes is not found out");
                }
                Ok((Socket::Tcp(stream), Peer::Address(address.ip())))
            }
            ListenerSocket::Admin(socket) => Ok((Socket::Unix(socket.accept()?.0), Peer::Admin)),
        }
    }
}

impl Net {
    fn insert(&mut self, id: ConnectionId, mut socket: Socket) {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let token = Token((id.generation as usize) << 32 | id.slot as usize);
        let registered = match &mut socket {
            Socket::Tcp(stream) => self.registry.register(stream, token, interest),
            Socket::Unix(stream) => self.registry.register(stream, token, interest),
        };
        if let Err(error) = registered {
            // Without a socket the connection reads as lost.
            warn!(%error, "a connection could not be watched");
            return;
        }
        let slot = id.slot as usize;
        if self.sockets.len() <= slot {
            self.sockets.resize_with(slot + 1, || None);
        }
        self.sockets[slot] = Some(Watched { socket, is_drained: false, is_ending: false });
    }

    /// Takes what an event says of a socket.
    fn ready(&mut self, id: ConnectionId, event: &Event) {
        if let Some(watched) = self.sockets.get_mut(id.slot as usize).and_then(Option::as_mut) {
            watched.is_drained = false;
            watched.is_ending |= event.is_read_closed() || event.is_error();
        }
    }

    /// Looks at every socket again, whatever events have said.
    fn forget_events(&mut self) {
        for watched in self.sockets.iter_mut().flatten() {
            watched.is_drained = false;
        }
    }

    /// Lets every peer have what its kernel and ours hold for it: a socket that is closed with something unread in it takes
    /// that back.
    fn let_go(&mut self) {
        const READS_MAX: usize = 64;
        let mut unread = vec![0; 64 * 1024];
        for Watched { socket, .. } in self.sockets.iter_mut().flatten() {
            let (Ok(()) | Err(_)) = socket.shutdown();
            for _ in 0..READS_MAX {
                if !matches!(socket.read(&mut unread), Ok(count) if count > 0) {
                    break;
                }
            }
        }
    }

    fn watched(&mut self, id: ConnectionId) -> io::Result<&mut Watched> {
        let watched = self.sockets.get_mut(id.slot as usize).and_then(Option::as_mut);
        watched.ok_or_else(|| ErrorKind::NotConnected.into())
    }
}

impl Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }

    /// Says that nothing more will be written.
    fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Host for Net {
    fn read(&mut self, id: ConnectionId, into: &mut [u8]) -> io::Result<usize> {
        let watched = self.watched(id)?;
        if watched.is_drained {
            return Err(ErrorKind::WouldBlock.into());
        }
        let count = watched.socket.read(into)?;
        watched.is_drained = count > 0 && count < into.len() && !watched.is_ending;
        Ok(count)
    }

    fn write(&mut self, id: ConnectionId, from: &[u8]) -> io::Result<usize> {
        match &mut self.watched(id)?.socket {
            Socket::Tcp(stream) => stream.write(from),
            Socket::Unix(stream) => stream.write(from),
        }
    }

    fn end(&mut self, id: ConnectionId) {
        let ended = self.watched(id).and_then(|watched| watched.socket.shutdown());
        if let Err(error) = ended {
            debug!(%error, "a connection could not be ended");
        }
    }

    fn close(&mut self, id: ConnectionId) {
        // Dropping a socket closes it and ends its registration.
        if let Some(socket) = self.sockets.get_mut(id.slot as usize) {
            *socket = None;
        }
    }

    fn random(&mut self) -> [u8; 16] {
        let mut bits = [0; 16];
        if let Err(error) = getrandom::fill(&mut bits) {
            // A guessable token is worse than no server.
            tracing::error!(%error, "the system has no randomness");
            std::process::abort();
        }
        bits
    }

    fn submit(&mut self, job: Job) {
        self.threads.submit(job);
    }

    fn read_stored(&mut self, transfer: TransferId, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.threads.opened(transfer)?.read_cached_at(into, offset)
    }
}

/// A peer that says nothing is asked whether it is still there, and given up when it is not within about two minutes.
fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15)).with_retries(4)
}

fn connection_id(token: usize) -> ConnectionId {
    let part = |bits: usize| u32::try_from(bits & 0xffff_ffff).unwrap_or_default();
    ConnectionId { slot: part(token), generation: part(token >> 32) }
}

fn is_readable(event: &Event) -> bool {
    event.is_readable() || event.is_read_closed() || event.is_error()
}

fn is_writable(event: &Event) -> bool {
    event.is_writable() || event.is_write_closed() || event.is_error()
}

fn bind(listen: &[SocketAddr]) -> Result<Vec<ListenerSocket>, ServerError> {
    let bind = |address: &SocketAddr| {
        listen_on(*address).map(ListenerSocket::Tcp).map_err(|error| ServerError::Listen(*address, error))
    };
    listen.iter().map(bind).collect()
}

/// An IPv6 address is for IPv6 alone, so that `0.0.0.0` and `[::]` can be given together, on every system alike.
fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A server that was just stopped leaves connections behind that hold the port for a while.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// The data directory is locked, so an admin socket that is there is left over.
fn bind_admin(path: &Path) -> Result<ListenerSocket, ServerError> {
    let failed = |error| ServerError::AdminSocket(path.to_owned(), error);
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let socket = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(ListenerSocket::Admin(socket))
}

fn watch(sockets: impl Iterator<Item = ListenerSocket>, registry: &Registry) -> Result<Vec<Listener>, ServerError> {
    let mut listeners = Vec::new();
    for (index, mut socket) in sockets.enumerate() {
        let token = Token(LISTENER_LAST - index);
        let registered = match &mut socket {
            ListenerSocket::Tcp(socket) => registry.register(socket, token, Interest::READABLE),
            ListenerSocket::Admin(socket) => registry.register(socket, token, Interest::READABLE),
        };
        registered.map_err(|error| ServerError::Setup("watch a listener", error))?;
        listeners.push(Listener { socket, is_ready: true, retry_at: None });
    }
    Ok(listeners)
}

/// Raises the file descriptor limit as far as it goes, and lowers what the limit does not allow: each connection takes a
/// descriptor, and each transfer another. Some are left for the server's own work, which cannot go on without.
fn fit_to_file_limit(limits: &mut Limits) -> Result<(), ServerError> {
    let Rlimit { maximum, current } = getrlimit(Resource::Nofile);
    if current != maximum {
        let raised = Rlimit { current: maximum, maximum };
        setrlimit(Resource::Nofile, raised)
            .map_err(|error| ServerError::Setup("raise the file limit", error.into()))?;
    }
    let files = usize::try_from(maximum.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
    let wanted = limits.turned_away_max.saturating_mul(2).saturating_add(limits.admin_connections_max);
    let reserved = FILES_RESERVED.saturating_add(wanted).min(files / 2);
    // Where there are few, they are for the server's own work first.
    limits.turned_away_max = limits.turned_away_max.min(reserved / 8);
    let free = files - reserved;
    limits.uploads_max = limits.uploads_max.min(free / 4);
    limits.downloads_max = limits.downloads_max.min(free / 4);
    let most = free - limits.uploads_max - limits.downloads_max;
    if limits.connections_max != usize::MAX && limits.connections_max > most {
        warn!(most, "the file descriptor limit does not allow so many connections as --connections-max says");
    }
    limits.connections_max = limits.connections_max.min(most);
    limits.connections_per_address_max = limits.connections_per_address_max.min(limits.connections_max.div_ceil(2));
    Ok(())
}

/// True when nothing but this machine can reach the address.
#[must_use]
pub fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}
