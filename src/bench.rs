//! `kurir bench`: a load generator. It makes its own users on a server that lets it, keeps so many connections busy with so
//! many requests each, and says how many a second were answered and how long each took.
//!
//! A connection sends its requests together and waits for all their answers before it sends the next. With a rate, it sends
//! them when they are due, and an answer that is late counts from then, so that a server that stalls does not hide it.
//!
//! It can speak to other servers as well, so that they are measured by the same means: one that gives back each line, and
//! Redis.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use memchr::memmem::Finder;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde_json::{Value, json};

use crate::client::{Client, ClientError, Target};

const PASSWORD: &str = "surabaya-bench";
/// What is read at once, for whichever connection.
const READ_BYTES: usize = 256 * 1024;
/// The longest time that is told apart from longer ones, and how finely times are told apart.
const LONGEST: Duration = Duration::from_secs(60);
const SIGNIFICANT_DIGITS: u8 = 3;
/// How long before something is due nobody sleeps any more.
const AWAKE: Duration = Duration::from_millis(2);
/// Answers of which no more than this come at the end are waited for.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// What is measured.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Where the server is
    #[arg(long, env = "KURIR_SERVER", value_name = "HOST:PORT", default_value = "127.0.0.1:8889")]
    server: String,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 50)]
    connections: usize,
    /// Requests that a connection sends before it waits for their answers
    #[arg(long, value_name = "N", default_value_t = 16)]
    pipeline: usize,
    /// What is asked: `send`, `inbox`, `group:MEMBERS`, `file`, or several of them with their parts, as `send=9,inbox=1`
    #[arg(long, value_name = "MIX", default_value = "send", value_parser = mix)]
    mix: Mix,
    /// Size of a message, or of a file
    #[arg(long, value_name = "BYTES", value_parser = crate::limits::bytes, default_value = "100")]
    bytes: u64,
    /// Users that are made, and that all connections share
    #[arg(long, value_name = "N", default_value_t = 10)]
    users: usize,
    /// Messages go to `user0`, `user1` and so on, of whom there are so many on the server, and not to the users that are made
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    receivers: usize,
    /// How long it is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,
    /// How long it runs before that
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    warm_up: f64,
    /// Threads, among which the connections are shared out
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Requests a second in all; 0 for as many as are answered. What is due within two milliseconds is waited for awake, so
    /// the server should have other cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    rate: u64,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
    /// What the server speaks
    #[arg(long, value_name = "NAME", default_value = "kurir", hide = true)]
    protocol: Protocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Protocol {
    Kurir,
    Redis,
    Echo,
}

/// Kinds of requests, each with its part.
#[derive(Clone, Debug)]
struct Mix(Vec<(Kind, u64)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Send,
    Inbox,
    Group(usize),
    File,
}

/// Why nothing was measured.
#[derive(Debug)]
pub enum BenchError {
    /// The options do not go together.
    Options(String),
    /// The server does not let it, or is not there.
    Setup(ClientError),
    /// A connection failed while it was measured.
    Io(io::Error),
}

impl fmt::Display for BenchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Options(text) => f.write_str(text),
            Self::Setup(ClientError::Refused(text)) => {
                write!(f, "{text} (the server must let strangers make accounts: --demo, or --registration open)")
            }
            Self::Setup(error) => error.fmt(f),
            Self::Io(error) => write!(f, "a connection failed: {error}"),
        }
    }
}

impl std::error::Error for BenchError {}

impl From<ClientError> for BenchError {
    fn from(error: ClientError) -> Self {
        Self::Setup(error)
    }
}

impl From<io::Error> for BenchError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    options: Options,
    requests: u64,
    refused: u64,
    elapsed: Duration,
    /// In nanoseconds.
    latency: Histogram<u64>,
}

const PERCENTILES: [(&str, f64); 7] =
    [("p50", 50.0), ("p75", 75.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99), ("max", 100.0)];

impl Report {
    /// True when it is to be printed as JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.options.json
    }

    fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    fn micros(&self, percentile: f64) -> f64 {
        self.latency.value_at_percentile(percentile) as f64 / 1000.0
    }

    /// The figures for a program.
    #[must_use]
    pub fn json(&self) -> Value {
        let latency: serde_json::Map<String, Value> =
            PERCENTILES.iter().map(|(name, at)| ((*name).to_owned(), json!(self.micros(*at)))).collect();
        let Options { connections, pipeline, bytes, .. } = &self.options;
        json!({
            "connections": connections,
            "rate": self.options.rate,
            "pipeline": pipeline,
            "bytes": bytes,
            "seconds": self.elapsed.as_secs_f64(),
            "requests": self.requests,
            "refused": self.refused,
            "requests_per_second": self.rate(),
            "latency_us": latency,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { connections, pipeline, bytes, .. } = &self.options;
        writeln!(f, "{connections} connections x {pipeline} requests of {bytes} bytes")?;
        writeln!(f, "{:.0} requests a second ({} in {:.1} s)", self.rate(), self.requests, self.elapsed.as_secs_f64())?;
        if self.refused > 0 {
            writeln!(f, "of these, {} were refused", self.refused)?;
        }
        let times: Vec<String> =
            PERCENTILES.iter().map(|(name, at)| format!("{name} {:.0}", self.micros(*at))).collect();
        write!(f, "latency in microseconds: {}", times.join(", "))
    }
}

/// Measures.
///
/// # Errors
/// [`BenchError`]
pub fn run(options: Options) -> Result<Report, BenchError> {
    let Options { connections, pipeline, users, threads, .. } = options;
    if [connections, pipeline, users, threads].contains(&0) || threads > connections {
        return Err(BenchError::Options(
            "--connections, --pipeline, --users and --threads are at least 1, and no more threads than connections"
                .into(),
        ));
    }
    let server = options.server.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
    let server = server.ok_or_else(|| BenchError::Options(format!("{} is no server", options.server)))?;
    let batches = batches(&options)?;
    let begin = Instant::now() + Duration::from_secs_f64(options.warm_up);
    let end = begin + Duration::from_secs_f64(options.seconds);
    let parts: Vec<Vec<Batches>> =
        (0..threads).map(|part| batches.iter().skip(part).step_by(threads).cloned().collect()).collect();
    let counts = thread::scope(|scope| {
        let measure = |batches| scope.spawn(|| Generator::new(server, batches, &options, begin, end)?.run());
        let running: Vec<_> = parts.into_iter().map(measure).collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("a thread failed"))?)
            .collect::<io::Result<Vec<_>>>()
    })?;
    let mut report = Report { requests: 0, refused: 0, elapsed: end - begin, latency: histogram()?, options };
    for Counts { requests, refused, latency } in counts {
        report.requests += requests;
        report.refused += refused;
        report.latency.add(latency).map_err(io::Error::other)?;
    }
    Ok(report)
}

fn histogram() -> io::Result<Histogram<u64>> {
    let longest = u64::try_from(LONGEST.as_nanos()).unwrap_or(u64::MAX);
    Histogram::new_with_max(longest, SIGNIFICANT_DIGITS).map_err(io::Error::other)
}

/// What a connection sends together, one after the other, again and again.
type Batches = Vec<Vec<u8>>;

/// What each connection sends.
fn batches(options: &Options) -> Result<Vec<Batches>, BenchError> {
    let text = "x".repeat(usize::try_from(options.bytes).unwrap_or(usize::MAX));
    match options.protocol {
        Protocol::Echo => {
            let line = format!("{text}\n");
            Ok(vec![vec![line.repeat(options.pipeline).into_bytes()]; options.connections])
        }
        Protocol::Redis => {
            let batch = |connection: usize| {
                let list = format!("list{:06}", connection % options.users);
                format!("*3\r\n$5\r\nRPUSH\r\n${}\r\n{list}\r\n${}\r\n{text}\r\n", list.len(), text.len())
            };
            Ok((0..options.connections).map(|one| vec![batch(one).repeat(options.pipeline).into_bytes()]).collect())
        }
        Protocol::Kurir => {
            let users = Users::make(options)?;
            // Together they reach every receiver.
            let turns = options.receivers.div_ceil(options.connections * options.pipeline).max(1);
            let batches = |connection| (0..turns).map(|turn| users.batch(options, connection, turn, &text)).collect();
            Ok((0..options.connections).map(batches).collect())
        }
    }
}

/// Accounts that were made for this.
struct Users {
    names: Vec<String>,
    tokens: Vec<String>,
    group: String,
}

impl Users {
    fn make(options: &Options) -> Result<Self, BenchError> {
        let mut client = Client::connect(&*options.server)?;
        let run = format!("{:08x}", getrandom::u32().map_err(|_| BenchError::Options("no randomness".into()))?);
        let members = options.mix.0.iter().map(|(kind, _)| if let Kind::Group(members) = kind { *members } else { 0 });
        let members = members.max().unwrap_or(0);
        let names: Vec<String> = (0..options.users.max(members)).map(|user| format!("bench-{run}-{user}")).collect();
        for name in &names {
            client.register(name, PASSWORD)?;
        }
        let mut tokens = Vec::new();
        for name in names.iter().take(options.users) {
            client.login(name, PASSWORD)?;
            tokens.push(client.token().to_owned());
        }
        let group = format!("bench-{run}");
        if members > 0 {
            client.set_token(&tokens[0]);
            client.create_group(&group, None)?;
            for name in names.iter().take(members).skip(1) {
                client.add_member(&group, name)?;
            }
            client.send_message(Target::Group(&group), "begin")?;
        }
        Ok(Self { names, tokens, group })
    }

    /// One connection's requests: of each kind its part, spread out.
    fn batch(&self, options: &Options, connection: usize, turn: usize, text: &str) -> Vec<u8> {
        // Prime, so that receivers come in no order, and all of them.
        const STEP: usize = 7919;
        let user = connection % self.tokens.len();
        let total: u64 = options.mix.0.iter().map(|(_, part)| part).sum();
        let mut owed = vec![0; options.mix.0.len()];
        let mut lines = String::new();
        for number in 0..options.pipeline {
            for ((_, part), owed) in options.mix.0.iter().zip(&mut owed) {
                *owed += *part;
            }
            let next = (0..owed.len()).max_by_key(|at| owed[*at]).unwrap_or(0);
            owed[next] = owed[next].saturating_sub(total);
            let token = &self.tokens[user];
            let request = (turn * options.connections + connection) * options.pipeline + number;
            let to = match options.receivers {
                0 => self.names[(user + 1) % self.tokens.len()].clone(),
                receivers => format!("user{}", request * STEP % receivers),
            };
            lines += &match options.mix.0[next].0 {
                Kind::Send => format!("SEND MESSAGE {token} {to} {text}\n"),
                Kind::Inbox => format!("INBOX {token}\n"),
                Kind::Group(_) => format!("SEND GROUP MESSAGE {} {} {text}\n", self.tokens[0], self.group),
                Kind::File => {
                    let content = STANDARD.encode(text);
                    format!("SEND FILE {token} {to} file-{connection}-{number} {content}\n")
                }
            };
        }
        lines.into_bytes()
    }
}

/// What one thread has counted.
struct Counts {
    requests: u64,
    refused: u64,
    latency: Histogram<u64>,
}

/// One thread's connections.
struct Generator {
    poll: Poll,
    connections: Vec<Connection>,
    pipeline: u64,
    end_of_answer: Finder<'static>,
    refusal: Finder<'static>,
    /// Between two batches of one connection, where there is a rate.
    interval: Option<Duration>,
    begin: Instant,
    end: Instant,
    counts: Counts,
}

struct Connection {
    stream: TcpStream,
    batches: Batches,
    /// Which of them is sent now.
    batch: usize,
    written: usize,
    /// Answers that are still to come.
    awaited: u64,
    /// When the batch was sent, or should have been.
    sent: Instant,
    /// When the next is due, where there is a rate.
    due: Option<Instant>,
    /// The end of what came last, in which an answer's end may have begun.
    carry: Vec<u8>,
}

impl Generator {
    fn new(
        server: SocketAddr,
        batches: Vec<Batches>,
        options: &Options,
        begin: Instant,
        end: Instant,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let now = Instant::now();
        let per_batch = options.pipeline as f64 * options.connections as f64;
        let interval = (options.rate > 0).then(|| Duration::from_secs_f64(per_batch / options.rate as f64));
        let count = batches.len();
        let mut connections = Vec::with_capacity(count);
        for (number, batches) in batches.into_iter().enumerate() {
            let stream = std::net::TcpStream::connect(server)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(number), Interest::READABLE | Interest::WRITABLE)?;
            // They do not all begin at once.
            let offset = interval.map(|interval| interval.mul_f64(number as f64 / count as f64));
            let due = offset.map(|offset| now + offset);
            // As if the last had just been answered.
            let batch = batches.len() - 1;
            let written = batches[batch].len();
            let carry = Vec::new();
            connections.push(Connection { stream, batches, batch, written, awaited: 0, sent: now, due, carry });
        }
        let (end_of_answer, refusal): (&[u8], &[u8]) = match options.protocol {
            Protocol::Kurir => (b"\r\n\r\n", b"{\"status\":\"ERROR\""),
            Protocol::Redis => (b"\r\n", b"-ERR"),
            Protocol::Echo => (b"\n", b"\0"),
        };
        Ok(Self {
            poll,
            connections,
            pipeline: options.pipeline as u64,
            end_of_answer: Finder::new(end_of_answer),
            refusal: Finder::new(refusal),
            interval,
            begin,
            end,
            counts: Counts { requests: 0, refused: 0, latency: histogram()? },
        })
    }

    fn run(mut self) -> io::Result<Counts> {
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; READ_BYTES];
        for at in 0..self.connections.len() {
            self.go_on(at, Instant::now())?;
        }
        loop {
            let now = Instant::now();
            let is_over = now >= self.end;
            if is_over && (self.connections.iter().all(|one| one.awaited == 0) || now >= self.end + LAST_ANSWERS) {
                return Ok(self.counts);
            }
            let dues = self.connections.iter().filter(|one| one.awaited == 0).filter_map(|one| one.due);
            let due = dues
                .min()
                .filter(|_| !is_over)
                .map(|due| due.saturating_duration_since(now))
                .unwrap_or(Duration::from_millis(100));
            // The system wakes to the millisecond at best, so what is due before long is waited for awake.
            let wait = due.min(Duration::from_millis(100)).checked_sub(AWAKE).unwrap_or_default();
            self.poll.poll(&mut events, Some(wait))?;
            for event in &events {
                let Token(at) = event.token();
                if event.is_writable() {
                    self.connections[at].write()?;
                }
                if event.is_readable() || event.is_read_closed() {
                    self.read(at, &mut buffer)?;
                }
            }
            if self.interval.is_some() {
                let now = Instant::now();
                for at in 0..self.connections.len() {
                    if self.connections[at].awaited == 0 {
                        self.go_on(at, now)?;
                    }
                }
            }
        }
    }

    /// Sends the next batch, if it is due and there is time left.
    fn go_on(&mut self, at: usize, now: Instant) -> io::Result<()> {
        let connection = &mut self.connections[at];
        if now >= self.end || connection.due.is_some_and(|due| due > now) {
            return Ok(());
        }
        connection.sent = connection.due.unwrap_or(now);
        connection.due = connection.due.zip(self.interval).map(|(due, interval)| due + interval);
        connection.awaited = self.pipeline;
        connection.batch = (connection.batch + 1) % connection.batches.len();
        connection.written = 0;
        connection.write()
    }

    fn read(&mut self, at: usize, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            let connection = &mut self.connections[at];
            let carried = connection.carry.len();
            buffer[..carried].copy_from_slice(&connection.carry);
            let count = match connection.stream.read(&mut buffer[carried..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let now = Instant::now();
            let bytes = &buffer[..carried + count];
            let mut answers = 0;
            let mut last_end = 0;
            for start in self.end_of_answer.find_iter(bytes) {
                answers += 1;
                last_end = start + self.end_of_answer.needle().len();
            }
            // What may be the beginning of an end, or of a refusal, is looked at again with what follows.
            let kept = bytes[last_end..].len().min(self.end_of_answer.needle().len() - 1);
            connection.carry.clear();
            connection.carry.extend_from_slice(&bytes[bytes.len() - kept..]);
            let is_counted = now >= self.begin && now < self.end;
            if is_counted {
                self.counts.requests += answers;
                self.counts.refused += self.refusal.find_iter(bytes).count() as u64;
                let nanos = u64::try_from(now.duration_since(connection.sent).as_nanos()).unwrap_or(u64::MAX);
                self.counts.latency.saturating_record_n(nanos, answers);
            }
            connection.awaited = connection.awaited.saturating_sub(answers);
            if connection.awaited == 0 && answers > 0 {
                self.go_on(at, now)?;
            }
            if carried + count < buffer.len() {
                return Ok(());
            }
        }
    }
}

impl Connection {
    fn write(&mut self) -> io::Result<()> {
        let batch = &self.batches[self.batch];
        while self.written < batch.len() {
            match self.stream.write(&batch[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is a number of seconds".to_owned())?;
    if (0.0..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("it is from 0 to a day".to_owned()) }
}

fn mix(text: &str) -> Result<Mix, String> {
    let one = |part: &str| -> Option<(Kind, u64)> {
        let (kind, weight) = part.split_once('=').unwrap_or((part, "1"));
        let kind = match kind.split_once(':') {
            None if kind == "send" => Kind::Send,
            None if kind == "inbox" => Kind::Inbox,
            None if kind == "file" => Kind::File,
            Some(("group", members)) => Kind::Group(members.parse().ok().filter(|members| *members > 0)?),
            _ => return None,
        };
        Some((kind, weight.parse().ok().filter(|weight| *weight > 0)?))
    };
    let parts: Option<Vec<_>> = text.split(',').map(one).collect();
    parts.map(Mix).ok_or_else(|| "it is made of send, inbox, file and group:MEMBERS, as in send=9,inbox=1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_kinds_with_their_parts() {
        assert_eq!(mix("send").unwrap().0, [(Kind::Send, 1)]);
        assert_eq!(mix("send=9,group:100=1").unwrap().0, [(Kind::Send, 9), (Kind::Group(100), 1)]);
        for wrong in ["", "send=0", "sent", "group", "group:0", "send,", "send=x"] {
            assert!(mix(wrong).is_err(), "{wrong}");
        }
    }
}
