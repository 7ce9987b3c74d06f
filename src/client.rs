//! A blocking client: one request, one reply.

use std::fmt;
use std::io::{self, Read, Write};

use serde_json::Value;

/// Ends every reply.
const END: &[u8] = b"\r\n\r\n";

/// A connection to a server, over whatever carries bytes.
///
/// ```no_run
/// use std::net::TcpStream;
///
/// let mut client = kurir::client::Client::new(TcpStream::connect("127.0.0.1:8889")?);
/// let token = client.request("AUTH messi surabaya")?["data"].as_str().unwrap_or_default().to_owned();
/// client.request(&format!("SEND MESSAGE {token} henderson halo"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    received: Vec<u8>,
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
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::NotAReply => f.write_str("the server's answer is not a reply of the protocol"),
            Self::Refused(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for ClientError {}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl<S: Read + Write> Client<S> {
    /// A client on a connection that is there.
    pub fn new(stream: S) -> Self {
        Self { stream, received: Vec::new() }
    }

    /// Makes a request, given without its line end, and gives back the reply if it says OK.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn request(&mut self, line: &str) -> Result<Value, ClientError> {
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
    pub fn reply(&mut self) -> Result<Value, ClientError> {
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
    pub fn receive(&mut self) -> Result<Value, ClientError> {
        let mut searched = 0;
        loop {
            if let Some(end) = memchr::memmem::find(&self.received[searched..], END) {
                let rest = self.received.split_off(searched + end + END.len());
                let reply = std::mem::replace(&mut self.received, rest);
                return serde_json::from_slice(&reply).map_err(|_| ClientError::NotAReply);
            }
            searched = self.received.len().saturating_sub(END.len() - 1);
            let mut chunk = [0; 16 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The connection.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }
}
