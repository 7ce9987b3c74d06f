//! The engine without sockets or threads: bytes go in and come out in memory, and jobs are done on the caller's thread.
//!
//! Administration of a data directory that no server holds works this way, and so do tests and benches.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};

use crate::clock::Clock;
use crate::connection::{ConnectionId, Peer};
use crate::engine::{Completion, Engine, Host, Job};
use crate::files::TransferId;

/// Does jobs.
pub trait Workers {
    /// What ends the work.
    type Error;

    /// Does one job and reports what came of it.
    ///
    /// # Errors
    /// Nothing can be promised after it.
    fn run(&mut self, job: Job, report: impl FnMut(Completion)) -> Result<(), Self::Error>;
}

/// An engine in memory.
pub struct Local<W> {
    /// The engine.
    pub engine: Engine,
    /// Who does its jobs.
    pub workers: W,
    world: World,
    now: Clock,
}

/// What the engine sees of the world.
#[derive(Default)]
struct World {
    pipes: HashMap<ConnectionId, Pipe>,
    jobs: VecDeque<Job>,
    tokens: u128,
}

/// A connection's two directions.
#[derive(Default)]
struct Pipe {
    input: VecDeque<u8>,
    is_ended: bool,
    output: Vec<u8>,
    /// So many bytes more are taken; none for no limit.
    output_room: Option<usize>,
    is_closed: bool,
    is_finished: bool,
}

impl<W: Workers> Local<W> {
    /// Starts at the time `now`, in milliseconds since 1970, UTC.
    pub fn new(engine: Engine, workers: W, now: u64) -> Self {
        Self { engine, workers, world: World::default(), now: Clock::at(now) }
    }

    /// Connects.
    pub fn open(&mut self, peer: Peer) -> ConnectionId {
        let id = self.engine.open(peer);
        self.world.pipes.insert(id, Pipe::default());
        id
    }

    /// Sends bytes; nothing happens before [`Self::settle`].
    pub fn send(&mut self, id: ConnectionId, bytes: &[u8]) {
        if let Some(pipe) = self.world.pipes.get_mut(&id) {
            pipe.input.extend(bytes);
        }
        self.engine.ready(id, true, false);
    }

    /// Ends the sending side.
    pub fn end(&mut self, id: ConnectionId) {
        if let Some(pipe) = self.world.pipes.get_mut(&id) {
            pipe.is_ended = true;
        }
        self.engine.ready(id, true, false);
    }

    /// Breaks the connection: whatever is tried on it fails.
    pub fn break_off(&mut self, id: ConnectionId) {
        self.world.pipes.remove(&id);
        self.engine.ready(id, true, true);
    }

    /// What came back since this was last asked.
    pub fn received(&mut self, id: ConnectionId) -> Vec<u8> {
        self.world.pipes.get_mut(&id).map(|pipe| std::mem::take(&mut pipe.output)).unwrap_or_default()
    }

    /// True when the engine has closed the connection, or has said that nothing more comes.
    #[must_use]
    pub fn is_closed(&self, id: ConnectionId) -> bool {
        self.world.pipes.get(&id).is_none_or(|pipe| pipe.is_closed || pipe.is_finished)
    }

    /// Takes no more output than this from now on.
    pub fn set_output_room(&mut self, id: ConnectionId, bytes: usize) {
        if let Some(pipe) = self.world.pipes.get_mut(&id) {
            pipe.output_room = Some(bytes);
        }
        self.engine.ready(id, false, true);
    }

    /// Lets time pass.
    pub fn pass(&mut self, ms: u64) {
        self.now.utc_ms += ms;
        self.now.steady_ms += ms;
    }

    /// One turn, and then every job that there is.
    ///
    /// # Errors
    /// What the workers said.
    pub fn turn(&mut self) -> Result<(), W::Error> {
        self.engine.turn(self.now, &mut self.world);
        while let Some(job) = self.world.jobs.pop_front() {
            self.workers.run(job, |completion| self.engine.complete(completion))?;
        }
        Ok(())
    }

    /// Turns until there is nothing left to do.
    ///
    /// # Errors
    /// What the workers said.
    pub fn settle(&mut self) -> Result<(), W::Error> {
        while self.engine.has_work() {
            self.turn()?;
        }
        Ok(())
    }

    /// Sends one request and gives back what came.
    ///
    /// # Errors
    /// What the workers said.
    pub fn request(&mut self, id: ConnectionId, line: &str) -> Result<Vec<u8>, W::Error> {
        self.send(id, line.as_bytes());
        self.send(id, b"\n");
        self.settle()?;
        Ok(self.received(id))
    }
}

impl Host for World {
    fn read(&mut self, id: ConnectionId, into: &mut [u8]) -> io::Result<usize> {
        let pipe = self.pipes.get_mut(&id).ok_or(ErrorKind::NotConnected)?;
        if pipe.input.is_empty() && !pipe.is_ended {
            return Err(ErrorKind::WouldBlock.into());
        }
        io::Read::read(&mut pipe.input, into)
    }

    fn write(&mut self, id: ConnectionId, from: &[u8]) -> io::Result<usize> {
        let pipe = self.pipes.get_mut(&id).ok_or(ErrorKind::NotConnected)?;
        let count = pipe.output_room.unwrap_or(usize::MAX).min(from.len());
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        pipe.output_room = pipe.output_room.map(|room| room - count);
        pipe.output.extend_from_slice(&from[..count]);
        Ok(count)
    }

    fn end(&mut self, id: ConnectionId) {
        if let Some(pipe) = self.pipes.get_mut(&id) {
            pipe.is_finished = true;
        }
    }

    fn close(&mut self, id: ConnectionId) {
        if let Some(pipe) = self.pipes.get_mut(&id) {
            pipe.is_closed = true;
        }
    }

    /// A job reads it.
    fn read_stored(&mut self, _: TransferId, _: u64, _: &mut [u8]) -> io::Result<usize> {
        Err(ErrorKind::WouldBlock.into())
    }

    /// Administration opens no sessions, and the tokens of a test need not be secret, only different.
    fn random(&mut self) -> [u8; 16] {
        self.tokens += 1;
        self.tokens.to_be_bytes()
    }

    fn submit(&mut self, job: Job) {
        self.jobs.push_back(job);
    }
}
