//! A client of the server, for programs: it blocks, and makes one request at a time.
//!
//! [`Client::request`] makes any request of the protocol and gives back the reply as JSON; the other methods do so for one
//! request each, with types. Beside it: [`transfer`] (files, which stream in bounded memory), [`profile`] (a login that is
//! kept between runs), [`history`] (messages that were received, which the server gives only once).
//!
//! ```
//! # use kurir::{engine::Registration, limits::Limits, log::Sync, net::{Server, ServerOptions}};
//! # let data = tempfile::tempdir()?;
//! # let server = Server::start(ServerOptions {
//! #     listen: vec!["127.0.0.1:0".parse()?],
//! #     data: data.path().to_owned(),
//! #     registration: Registration::Open,
//! #     limits: Limits::default(),
//! #     is_demo: true,
//! #     sync: Sync::Interval,
//! # })?;
//! # let address = server.addresses()?[0];
//! # std::thread::spawn(move || server.run());
//! use kurir::client::{Client, ClientError, Target};
//!
//! let mut client = Client::connect(address)?;
//! client.login("messi", "surabaya")?;
//! client.send_message(Target::User("henderson"), "halo, apa kabar?")?;
//! client.send_file(Target::Group("group1"), "catatan.txt", &mut &b"isi"[..], &mut |_| {})?;
//!
//! let mut other = Client::connect(address)?;
//! other.login("henderson", "surabaya")?;
//! let messages = other.inbox()?;
//! assert_eq!((messages[0].from.as_str(), messages[0].text.as_str()), ("messi", "halo, apa kabar?"));
//! let mut content = Vec::new();
//! other.download("messi", "catatan.txt", &mut content, &mut |_| {})?;
//! assert_eq!(content, b"isi");
//!
//! match other.send_message(Target::User("nobody"), "?") {
//!     Err(ClientError::Refused(text)) => assert_eq!(text, "user tujuan tidak ditemukan"),
//!     other => panic!("{other:?}"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod history;
pub mod profile;
pub mod transfer;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use serde_json::Value;

/// Ends every reply.
const END: &[u8] = b"\r\n\r\n";
/// Read at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// How long a connection may take to come about, for each address that a name has.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may take for a reply, or to take what it is sent: many logins may stand before one.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a server, over whatever carries bytes.
///
/// Its token, once it has one, goes with every request that needs one.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    received: Vec<u8>,
    token: String,
}

/// To whom something is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'n> {
    /// The user with this name.
    User(&'n str),
    /// The members of the group with this name.
    Group(&'n str),
}

/// A message from a mailbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Grows by message in that mailbox.
    pub id: u64,
    /// Who sent it.
    pub from: String,
    /// The user or the group that it was sent to.
    pub to: String,
    /// What it says.
    pub text: String,
    /// When the server took it: RFC 3339, UTC, milliseconds.
    pub time: String,
}

/// Why there is no reply, or not the one that was hoped for.
#[derive(Debug)]
pub enum ClientError {
    /// The connection failed, or ended before the reply did.
    Io(io::Error),
    /// What came is not a reply.
    NotAReply,
    /// The server said ERROR, with this text.
    Refused(String),
    /// It cannot be said in the protocol, for this reason; nothing was sent.
    Invalid(&'static str),
    /// The file that is sent could not be read, or the one that is received not written.
    File(io::Error),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => f.write_str("the server has hung up"),
            Self::Io(error) if is_timeout(error) => f.write_str("the server does not answer"),
            Self::Io(error) | Self::File(error) => error.fmt(f),
            Self::NotAReply => f.write_str("the server's answer is not a reply of the protocol"),
            Self::Refused(text) => f.write_str(text),
            Self::Invalid(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for ClientError {}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// What most requests come to.
pub type Result<T> = std::result::Result<T, ClientError>;

impl Client<TcpStream> {
    /// Connects, to the first address of these that answers.
    ///
    /// # Errors
    /// [`ClientError::Io`] with what the last of them said.
    pub fn connect(server: impl ToSocketAddrs) -> Result<Self> {
        let mut failure = io::Error::new(io::ErrorKind::AddrNotAvailable, "there is no such host");
        for address in server.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
                    stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
                    return Ok(Self::new(stream));
                }
                Err(error) => failure = error,
            }
        }
        Err(failure.into())
    }
}

/// Any request.
impl<S: Read + Write> Client<S> {
    /// A client on a connection that is there.
    pub fn new(stream: S) -> Self {
        Self { stream, received: Vec::new(), token: String::new() }
    }

    /// Makes a request, given without its line end, and gives back the reply if it says OK.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn request(&mut self, line: &str) -> Result<Value> {
        match self.send(line.as_bytes()) {
            // A server that takes nothing more may have said why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => match self.reply() {
                Err(ClientError::Io(_)) => Err(error.into()),
                said => said,
            },
            sent => {
                sent?;
                self.reply()
            }
        }
    }

    /// Waits for the next reply and gives it back if it says OK.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn reply(&mut self) -> Result<Value> {
        let reply = self.receive()?;
        match reply["status"].as_str() {
            Some("OK") => Ok(reply),
            Some("ERROR") => Err(ClientError::Refused(reply["data"].as_str().unwrap_or_default().to_owned())),
            _ => Err(ClientError::NotAReply),
        }
    }

    /// Sends a line.
    ///
    /// # Errors
    /// The connection failed.
    pub fn send(&mut self, line: &[u8]) -> io::Result<()> {
        self.stream.write_all(&[line, b"\r\n"].concat())
    }

    /// Waits for the next reply, whatever it says.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn receive(&mut self) -> Result<Value> {
        let mut searched = 0;
        loop {
            if let Some(end) = memchr::memmem::find(&self.received[searched..], END) {
                let rest = self.received.split_off(searched + end + END.len());
                let reply = std::mem::replace(&mut self.received, rest);
                return serde_json::from_slice(&reply).map_err(|_| ClientError::NotAReply);
            }
            searched = self.received.len().saturating_sub(END.len() - 1);
            self.fill()?;
        }
    }

    /// The connection.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Waits for more of a reply.
    fn fill(&mut self) -> io::Result<()> {
        let before = self.received.len();
        self.received.resize(before + CHUNK_BYTES, 0);
        let read = loop {
            match self.stream.read(&mut self.received[before..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.received.truncate(before + read.as_ref().map_or(0, |count| *count));
        match read? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// One request each.
impl<S: Read + Write> Client<S> {
    /// Logs in. The token is used for all that follows.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn login(&mut self, user: &str, password: &str) -> Result<()> {
        let reply = self.ask("AUTH", &[user, password])?;
        reply["data"].as_str().ok_or(ClientError::NotAReply)?.clone_into(&mut self.token);
        Ok(())
    }

    /// Makes an account, where the server lets strangers do so.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn register(&mut self, user: &str, password: &str) -> Result<()> {
        self.ask("REGISTER", &[user, password]).map(drop)
    }

    /// The token of the login.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Goes on with a login that was made before.
    pub fn set_token(&mut self, token: &str) {
        token.clone_into(&mut self.token);
    }

    /// Ends the login.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn logout(&mut self) -> Result<()> {
        self.ask_as("LOGOUT", &[]).map(drop)
    }

    /// Changes the password, which ends all other logins of the user.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn change_password(&mut self, old: &str, new: &str) -> Result<()> {
        self.ask_as("CHANGE PASSWORD", &[old, new]).map(drop)
    }

    /// Sends a message. When this comes back, the server has it on its disk.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn send_message(&mut self, to: Target<'_>, text: &str) -> Result<()> {
        let (verb, name) = match to {
            Target::User(name) => ("SEND MESSAGE", name),
            Target::Group(name) => ("SEND GROUP MESSAGE", name),
        };
        self.check_login()?;
        check_word(name)?;
        if text.is_empty() {
            return Err(ClientError::Invalid("a message is not empty"));
        }
        if text.contains('\n') || text.ends_with('\r') {
            return Err(ClientError::Invalid("a message is one line"));
        }
        let line = format!("{verb} {} {name} {text}", self.token);
        self.request(&line).map(drop)
    }

    /// The messages that wait, oldest first, as many as the server gives at once. It gives each once.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn inbox(&mut self) -> Result<Vec<Message>> {
        let reply = self.ask_as("INBOX", &[])?;
        let by_sender = reply["data"].as_object().ok_or(ClientError::NotAReply)?;
        let messages = by_sender.values().flat_map(|messages| messages.as_array().into_iter().flatten());
        let mut messages: Vec<Message> = messages.map(message).collect();
        messages.sort_by_key(|message| message.id);
        Ok(messages)
    }

    /// The files that there are to download, by the other party's name: who sent them, or whom they were sent to.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn files(&mut self) -> Result<BTreeMap<String, Vec<String>>> {
        let reply = self.ask_as("MY FILE", &[])?;
        lists(&reply["data"])
    }

    /// Takes a file off the user's own list.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn delete_file(&mut self, party: &str, name: &str) -> Result<()> {
        self.ask_as("DELETE FILE", &[party, name]).map(drop)
    }

    /// The groups that the user is in, with their members, the owner first.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn groups(&mut self) -> Result<BTreeMap<String, Vec<String>>> {
        let reply = self.ask_as("MY GROUP", &[])?;
        lists(&reply["data"])
    }

    /// Makes a group; with a secret, who joins must know it.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn create_group(&mut self, group: &str, secret: Option<&str>) -> Result<()> {
        self.ask_as("CREATE GROUP", &[&[group], secret.as_slice()].concat()).map(drop)
    }

    /// Joins a group.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn join_group(&mut self, group: &str, secret: Option<&str>) -> Result<()> {
        self.ask_as("JOIN GROUP", &[&[group], secret.as_slice()].concat()).map(drop)
    }

    /// Leaves a group.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn leave_group(&mut self, group: &str) -> Result<()> {
        self.ask_as("LEAVE GROUP", &[group]).map(drop)
    }

    /// Adds a member to a group that the user owns.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn add_member(&mut self, group: &str, user: &str) -> Result<()> {
        self.ask_as("ADD MEMBER", &[group, user]).map(drop)
    }

    /// Takes a member out of a group that the user owns.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn remove_member(&mut self, group: &str, user: &str) -> Result<()> {
        self.ask_as("REMOVE MEMBER", &[group, user]).map(drop)
    }

    fn check_login(&self) -> Result<()> {
        if self.token.is_empty() { Err(ClientError::Invalid("nobody is logged in")) } else { Ok(()) }
    }

    /// A request whose first parameter is the token.
    fn ask_as(&mut self, verb: &str, parameters: &[&str]) -> Result<Value> {
        self.check_login()?;
        let token = self.token.clone();
        self.ask(verb, &[&[token.as_str()], parameters].concat())
    }

    fn ask(&mut self, verb: &str, parameters: &[&str]) -> Result<Value> {
        parameters.iter().try_for_each(|word| check_word(word))?;
        self.request(&format!("{verb} {}", parameters.join(" ")))
    }
}

/// A parameter ends at a blank, and a request at a line end.
fn check_word(word: &str) -> Result<()> {
    if word.is_empty() {
        return Err(ClientError::Invalid("a name, a password or a secret is not empty"));
    }
    if word.chars().any(|letter| letter == ' ' || letter.is_control()) {
        return Err(ClientError::Invalid("a name, a password or a secret has no blanks and no control characters"));
    }
    Ok(())
}

fn message(object: &Value) -> Message {
    let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    Message {
        id: object["id"].as_u64().unwrap_or_default(),
        from: text("nama pengirim"),
        to: text("nama penerima"),
        text: text("pesan"),
        time: text("waktu"),
    }
}

/// Lists of names, each under a name.
pub(crate) fn lists(object: &Value) -> Result<BTreeMap<String, Vec<String>>> {
    let names = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(|name| name.as_str().map(ToOwned::to_owned)).collect()
    };
    let lists = object.as_object().ok_or(ClientError::NotAReply)?;
    Ok(lists.iter().map(|(name, list)| (name.clone(), names(list))).collect())
}
