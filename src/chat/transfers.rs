//! Files of a chat, each on a thread and a connection of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::Event;
use super::session::{Party, Said};
use crate::client::profile::Login;
use crate::client::transfer::{Interruptible, open};
use crate::client::{Client, ClientError};
use crate::text::as_file_name;

/// The screen is told at most so often how far a file is.
const TOLD_EVERY: Duration = Duration::from_millis(100);
/// Names tried for a file whose name is taken here.
const NAMES_MAX: u32 = 1000;

/// A file to move.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Move {
    Send { to: Party, path: PathBuf },
    Get { party: String, name: String, directory: PathBuf },
}

/// How far one is.
#[derive(Debug)]
pub(super) struct Moved {
    /// Which.
    pub(super) number: u64,
    pub(super) step: Step,
}

#[derive(Debug)]
pub(super) enum Step {
    /// It has begun; the size is known of what is sent.
    Begun { label: String, bytes: Option<u64> },
    /// So many bytes are done.
    Bytes(u64),
    /// It is over, and this is to say of it.
    Over(String),
}

/// Who moves it.
pub(super) struct Mover {
    pub(super) number: u64,
    pub(super) login: Login,
    /// It is given up.
    pub(super) is_ending: Arc<AtomicBool>,
}

/// Begins one. All that comes of it is told, and `done` is dropped with its end.
pub(super) fn begin(mover: Mover, order: Move, tell: &Sender<Event>, done: Sender<()>) {
    let teller = Teller { number: mover.number, tell: tell.clone(), told_at: None };
    let started = super::spawn("transfer", tell, move |_| {
        let mut teller = teller;
        let text = match run(&order, &mover, &mut teller) {
            Ok(text) => text,
            Err(error) => format!("{}: {error}", order.label()),
        };
        teller.tell(Step::Over(text));
        drop(done);
    });
    if let Err(error) = started {
        let (Ok(()) | Err(_)) = tell.send(Event::Session(Said::Note(format!("the file is not moved: {error}"))));
    }
}

impl Move {
    fn label(&self) -> String {
        match self {
            Self::Send { to, path } => {
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                format!("{name} to {}", to.name)
            }
            Self::Get { party, name, .. } => format!("{name} from {party}"),
        }
    }

    /// The other party and the name under which what is sent will be listed.
    pub(super) fn listed_as(&self) -> Option<(String, String)> {
        match self {
            Self::Send { to, path } => Some((to.name.clone(), as_file_name(path.file_name()?.to_str()?))),
            Self::Get { .. } => None,
        }
    }
}

fn run(order: &Move, mover: &Mover, teller: &mut Teller) -> Result<String, ClientError> {
    match order {
        Move::Send { to, path } => {
            let (mut file, bytes) = open(path).map_err(ClientError::File)?;
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.ok_or(ClientError::Invalid("the name of a file must be UTF-8"))?;
            let sent_as = as_file_name(name);
            teller.tell(Step::Begun { label: order.label(), bytes: Some(bytes) });
            let mut client = connect(&mover.login)?;
            client.send_file(to.target(), &sent_as, &mut file, &mut |bytes| teller.bytes(bytes))?;
            let name_note = if sent_as == name { String::new() } else { format!(", as {sent_as}") };
            Ok(format!("{} is sent{name_note}", order.label()))
        }
        Move::Get { party, name, directory } => {
            teller.tell(Step::Begun { label: order.label(), bytes: None });
            let mut client = connect(&mover.login)?;
            let place = |error| ClientError::File(error);
            let part = tempfile::Builder::new().prefix(".kurir-").suffix(".part").tempfile_in(directory);
            let mut part = part.map_err(place)?;
            let mut into = Interruptible::new(&mut part, &mover.is_ending);
            client.download(party, name, &mut into, &mut |bytes| teller.bytes(bytes))?;
            let path = keep(part, directory, name).map_err(place)?;
            Ok(format!("{} is here: {}", order.label(), path.display()))
        }
    }
}

fn connect(login: &Login) -> Result<Client<std::net::TcpStream>, ClientError> {
    let mut client = Client::connect(&*login.server)?;
    client.set_token(&login.token);
    Ok(client)
}

/// Puts a whole file in its place, or beside what is there.
fn keep(mut part: tempfile::NamedTempFile, directory: &Path, name: &str) -> io::Result<PathBuf> {
    for number in 0..NAMES_MAX {
        let path = match number {
            0 => directory.join(name),
            // Its kind is still to be seen.
            _ => match name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()) {
                Some((stem, kind)) => directory.join(format!("{stem}-{number}.{kind}")),
                None => directory.join(format!("{name}-{number}")),
            },
        };
        match part.persist_noclobber(&path) {
            Ok(_) => return Ok(path),
            Err(taken) if taken.error.kind() == io::ErrorKind::AlreadyExists => part = taken.file,
            Err(failed) => return Err(failed.error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

struct Teller {
    number: u64,
    tell: Sender<Event>,
    told_at: Option<Instant>,
}

impl Teller {
    fn tell(&self, step: Step) {
        let moved = Moved { number: self.number, step };
        let (Ok(()) | Err(_)) = self.tell.send(Event::Session(Said::Moved(moved)));
    }

    fn bytes(&mut self, bytes: u64) {
        let now = Instant::now();
        if self.told_at.is_none_or(|at| now.duration_since(at) >= TOLD_EVERY) {
            self.told_at = Some(now);
            self.tell(Step::Bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_there_already_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        for expected in ["foto.jpg", "foto-1.jpg", "foto-2.jpg"] {
            let mut part = tempfile::NamedTempFile::new_in(directory.path()).unwrap();
            part.write_all(expected.as_bytes()).unwrap();
            let path = keep(part, directory.path(), "foto.jpg").unwrap();
            assert_eq!(path, directory.path().join(expected));
            assert_eq!(fs::read_to_string(path).unwrap(), expected);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }
}
