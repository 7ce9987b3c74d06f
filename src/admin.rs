//! Administration: one request, through the admin socket of a running server, or on the data directory itself.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::client::{Client, ClientError};
use crate::connection::Peer;
use crate::data;
use crate::engine::{Engine, Registration};
use crate::limits::Limits;
use crate::local::Local;
use crate::password::{HashError, Hasher};
use crate::refusal::Refusal;
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
            let store = Store::open(root).map_err(AdminError::Store)?;
            Offline::new(store)?.request(line)
        }
        Err(error) => Err(AdminError::Socket(path, error)),
    }
}

/// Makes the demonstration accounts and their group, those of them that are missing.
///
/// # Errors
/// [`AdminError`]
pub fn make_demo(store: Store) -> Result<Store, AdminError> {
    let mut offline = Offline::new(store)?;
    let state = offline.local.engine.state();
    let is_its_own = DEMO_USERS.into_iter().all(|name| state.user_named(name).is_none()) && state.users().count() > 0;
    if is_its_own {
        return Err(AdminError::NotForDemo);
    }
    let missing: Vec<&str> = DEMO_USERS.into_iter().filter(|name| state.user_named(name).is_none()).collect();
    let has_group = state.is_taken(DEMO_GROUP);
    for name in missing {
        offline.request(&format!("USER ADD {name} {DEMO_PASSWORD}"))?;
    }
    if has_group {
        return Ok(offline.into_store());
    }
    let [owner, members @ ..] = DEMO_USERS;
    let login = match offline.request(&format!("AUTH {owner} {DEMO_PASSWORD}")) {
        // Whoever gave the account another password has made the demonstration his own.
        Err(AdminError::Refused(_)) => return Ok(offline.into_store()),
        login => login?,
    };
    let token = login["data"].as_str().unwrap_or_default();
    offline.request(&format!("CREATE GROUP {token} {DEMO_GROUP}"))?;
    for member in members {
        offline.request(&format!("ADD MEMBER {token} {DEMO_GROUP} {member}"))?;
    }
    offline.request(&format!("LOGOUT {token}"))?;
    Ok(offline.into_store())
}

/// A data directory that no server holds, with the engine in memory.
struct Offline {
    local: Local<StoreWorkers>,
    /// Held, so that no server starts meanwhile.
    directory: data::DataDirectory,
}

impl Offline {
    fn new(store: Store) -> Result<Self, AdminError> {
        let Store { directory, state, journal, files } = store;
        let registration = Registration { is_open: false, per_minute_max: 0 };
        let engine = Engine::new(Limits::default(), registration, state, journal.log());
        let hasher = Hasher::new().map_err(AdminError::Hash)?;
        let local = Local::new(engine, StoreWorkers { journal, files, hasher }, now());
        Ok(Self { local, directory })
    }

    fn into_store(self) -> Store {
        let StoreWorkers { journal, files, .. } = self.local.workers;
        Store { directory: self.directory, state: self.local.engine.into_state(), journal, files }
    }

    fn request(&mut self, line: &str) -> Result<Value, AdminError> {
        let id = self.local.open(Peer::Admin);
        let reply = self.local.request(id, line).map_err(AdminError::Work)?;
        Ok(Client::new(io::Cursor::new(reply)).reply()?)
    }
}

/// The clock, in milliseconds since 1970, UTC.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
