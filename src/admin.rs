//! Administration: one request, through the admin socket of a running server, or on the data directory itself.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::change::{Change, UserId};
use crate::client::{Client, ClientError};
use crate::connection::Peer;
use crate::data;
use crate::engine::{Engine, Registration};
use crate::limits::Limits;
use crate::local::Local;
use crate::log::{Need, Sync};
use crate::password::{HashError, Hasher};
use crate::refusal::Refusal;
use crate::state::State;
use crate::store::{Store, StoreError, StoreWorkers, WorkError};

/// The accounts of a demonstration.
pub const DEMO_USERS: [&str; 3] = ["messi", "henderson", "lineker"];
/// Their password.
pub const DEMO_PASSWORD: &str = "surabaya";
/// A group of all of them.
pub const DEMO_GROUP: &str = "group1";

/// Why an administrator's request was not done.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum AdminError {
    /// The server, or the data, said no; in English.
    Refused(String),
    NoData(PathBuf),
    NotForDemo,
    Store(StoreError),
    Work(WorkError),
    Hash(HashError),
    Socket(PathBuf, io::Error),
    Client(ClientError),
}

impl fmt::Display for AdminError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(text) => f.write_str(text),
            Self::NoData(root) => write!(f, "there is no data directory at {}", root.display()),
            Self::NotForDemo => f.write_str(
                "the data directory has accounts of its own, and theirs have a password that everybody knows",
            ),
            Self::Store(error) => error.fmt(f),
            Self::Work(error) => error.fmt(f),
            Self::Hash(error) => error.fmt(f),
            Self::Socket(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Client(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for AdminError {}

impl From<ClientError> for AdminError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(text) => Self::Refused(Refusal::in_english(&text).to_owned()),
            error => Self::Client(error),
        }
    }
}

/// Makes an administrator's request and gives back the reply. `may_create` says that a missing data directory is made.
///
/// # Errors
/// [`AdminError`]
pub fn request(root: &Path, line: &str, may_create: bool) -> Result<Value, AdminError> {
    let path = data::admin_socket(root);
    match UnixStream::connect(&path) {
        Ok(stream) => Ok(Client::new(stream).request(line)?),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            if !may_create && !data::exists(root) {
                return Err(AdminError::NoData(root.to_owned()));
            }
            let store = Store::open(root, Limits::default().segment_bytes, Sync::Always).map_err(AdminError::Store)?;
            request_offline(store, line)
        }
        Err(error) => Err(AdminError::Socket(path, error)),
    }
}

/// Makes the demonstration accounts and their group, those of them that are missing, all at once.
///
/// # Errors
/// [`AdminError`]
pub fn make_demo(store: &mut Store, hasher: &mut Hasher) -> Result<(), AdminError> {
    let Store { state, log, .. } = store;
    let missing: Vec<&str> = DEMO_USERS.into_iter().filter(|name| state.user_named(name).is_none()).collect();
    if missing.len() == DEMO_USERS.len() && state.users().next().is_some() {
        return Err(AdminError::NotForDemo);
    }
    let mut make = |state: &mut State, change: &Change<'_>| -> Result<(), AdminError> {
        let place = log.append(change, Need::More).map_err(|_| AdminError::Refused("the disk is full".to_owned()))?;
        state.apply(change, place);
        Ok(())
    };
    for name in missing {
        let password_hash = hasher.hash(DEMO_PASSWORD).map_err(AdminError::Hash)?;
        make(state, &Change::UserAdded { user: state.next_user(), name, password_hash: &password_hash })?;
    }
    let members: Vec<UserId> = DEMO_USERS.iter().filter_map(|name| state.user_named(name)).collect();
    if let Some(owner) = members.first().copied().filter(|_| !state.is_taken(DEMO_GROUP)) {
        let group = state.next_group();
        make(state, &Change::GroupCreated { group, name: DEMO_GROUP, owner, secret_hash: None })?;
    }
    if let Some(group) = state.group_named(DEMO_GROUP) {
        for user in members.into_iter().filter(|user| !state.is_member(group, *user)).collect::<Vec<_>>() {
            make(state, &Change::MemberJoined { group, user })?;
        }
    }
    store.commit().map_err(AdminError::Work)
}

/// True when one of the demonstration accounts is there and still has the password that everybody knows.
///
/// # Errors
/// What is kept of it is no hash.
pub fn has_demo_password(state: &State, hasher: &mut Hasher) -> Result<bool, HashError> {
    let accounts = DEMO_USERS.into_iter().filter_map(|name| state.user(state.user_named(name)?));
    for account in accounts {
        if hasher.fits(DEMO_PASSWORD, Some(&account.password_hash))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The same on a data directory that no server holds, with the engine in memory.
fn request_offline(store: Store, line: &str) -> Result<Value, AdminError> {
    // The directory is held, so that no server starts meanwhile.
    let Store { directory: _held, state, log, holdings, disk } = store;
    let engine = Engine::new(Limits::default(), Registration::Closed, state, log, holdings);
    let hasher = Hasher::new().map_err(AdminError::Hash)?;
    // What an administrator does bears no time.
    let mut local = Local::new(engine, StoreWorkers { disk, hasher }, 0);
    let id = local.open(Peer::Admin);
    let reply = local.request(id, line).map_err(AdminError::Work)?;
    let journal = local.workers.disk.journal;
    let directory = journal.directory().path().to_owned();
    journal.close().map_err(|error| AdminError::Work(WorkError::Journal(directory, error)))?;
    Ok(Client::new(io::Cursor::new(reply)).reply()?)
}
