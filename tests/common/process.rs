//! The real program, started on a free port with its own data directory, and ended with its test.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kurir::client::Client;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

/// Nothing here takes this long; a test that hangs should say so.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server.
pub(crate) struct Server {
    child: Child,
    _stdout: BufReader<ChildStdout>,
    pub(crate) addresses: Vec<SocketAddr>,
}

/// The program with these arguments, and nothing of it in the environment.
pub(crate) fn kurir(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kurir"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("KURIR_")) {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn output(arguments: &[&str]) -> Output {
    let child = kurir(arguments).spawn().unwrap();
    killed_after_patience(child.id(), || child.wait_with_output().unwrap())
}

/// Waits for a process, which is killed when that takes too long.
fn killed_after_patience<T>(process: u32, wait: impl FnOnce() -> T) -> T {
    let (waited, waiting) = mpsc::channel::<()>();
    let watcher = thread::spawn(move || {
        if waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            signal(process, Signal::KILL);
        }
    });
    let ended = wait();
    drop(waited);
    watcher.join().unwrap();
    ended
}

fn signal(process: u32, signal: Signal) {
    let process = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(process, signal).unwrap();
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

impl Server {
    /// A demonstration server on a data directory.
    pub(crate) fn demo(data: &Path, more: &[&str]) -> Self {
        let data = data.to_str().unwrap();
        Self::start(kurir(&[&["serve", "--demo", "--listen", "127.0.0.1:0", "--data", data][..], more].concat()), 1)
    }

    /// Starts the program and waits until it listens on so many addresses.
    pub(crate) fn start(mut command: Command, listeners: usize) -> Self {
        Self::listening(command.stderr(Stdio::inherit()).spawn().unwrap(), listeners)
    }

    /// A demonstration server whose log goes into a file.
    pub(crate) fn demo_with_log(data: &Path, log: &Path, more: &[&str]) -> Self {
        let data = data.to_str().unwrap();
        let arguments = [&["serve", "--demo", "--listen", "127.0.0.1:0", "--data", data][..], more].concat();
        Self::listening(kurir(&arguments).stderr(File::create(log).unwrap()).spawn().unwrap(), 1)
    }

    /// The same with a log into a pipe that nobody reads.
    pub(crate) fn start_with_pipe(command: &mut Command) -> Self {
        Self::listening(command.stderr(Stdio::piped()).spawn().unwrap(), 1)
    }

    fn listening(mut child: Child, listeners: usize) -> Self {
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut addresses = Vec::new();
        while addresses.len() < listeners {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "the server ended before it listened");
            let address = line.trim_end().strip_prefix("listening on ").expect("only addresses are printed");
            addresses.push(address.parse().unwrap());
        }
        Self { child, _stdout: stdout, addresses }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        connect(self.addresses[0])
    }

    pub(crate) fn client(&self) -> Client<TcpStream> {
        Client::new(self.connect())
    }

    /// A client and its token.
    pub(crate) fn login(&self, name: &str) -> (Client<TcpStream>, String) {
        let mut client = self.client();
        let login = client.request(&format!("AUTH {name} surabaya")).unwrap();
        (client, login["data"].as_str().unwrap().to_owned())
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// The memory that it has now.
    pub(crate) fn memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process())).unwrap();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        memory.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self::signal(self.child.id(), signal);
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        killed_after_patience(self.child.id(), || self.child.wait().unwrap())
    }

    /// Waits for its end and gives back what it wrote to a pipe.
    pub(crate) fn wait_with_log(&mut self) -> (ExitStatus, String) {
        let mut log = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        killed_after_patience(self.child.id(), || stderr.read_to_string(&mut log).unwrap());
        (self.wait(), log)
    }

    /// Stops it as an administrator does.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::TERM);
        assert!(self.wait().success());
    }

    /// Ends it as a power cut does.
    pub(crate) fn kill(mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) && self.child.kill().is_ok() {
            self.wait();
        }
    }
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    connect_with(address, |_| Ok(()))
}

/// The same with a receive buffer of this size.
pub(crate) fn connect_with_buffer(address: SocketAddr, bytes: usize) -> TcpStream {
    connect_with(address, |socket| socket.set_recv_buffer_size(bytes))
}

/// The same from another address of this machine.
pub(crate) fn connect_from(source: &str, address: SocketAddr) -> TcpStream {
    connect_with(address, |socket| socket.bind(&SocketAddr::new(source.parse().unwrap(), 0).into()))
}

fn connect_with(address: SocketAddr, prepare: impl FnOnce(&Socket) -> io::Result<()>) -> TcpStream {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).unwrap();
    prepare(&socket).unwrap();
    socket.connect(&address.into()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

/// Ends the sending side and reads to the end.
pub(crate) fn finish(mut stream: TcpStream) -> String {
    stream.shutdown(Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    String::from_utf8(rest).unwrap()
}

/// This machine has IPv6. A container may not.
pub(crate) fn has_ipv6() -> bool {
    std::net::TcpListener::bind("[::1]:0").is_ok()
}

/// Raises the file descriptor limit of this process as far as it goes, and says how far that is.
pub(crate) fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    limit.maximum.unwrap_or(u64::MAX)
}
