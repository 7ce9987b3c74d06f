//! Files in and out, as a stream: of a file of any size, a block is in memory at a time.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use base64::read::DecoderReader;

use super::{Client, ClientError, END, Result, Target, check_word};

/// Decoded bytes handled at once; a multiple of three, so that every block but the last encodes without padding.
const BLOCK_BYTES: usize = 48 * 1024;
/// What stands in a reply before the content of a file.
const DATA: &[u8] = br#""data":""#;
/// A reply that is no longer than this may be looked at as a whole.
const SHORT_REPLY_BYTES: usize = 64 * 1024;

impl Client<TcpStream> {
    /// Sends a file under a name. `progress` is told, after each block, how many bytes were sent.
    ///
    /// # Errors
    /// [`ClientError::File`] when `content` cannot be read; nothing is stored then, and the connection is over. Else as any
    /// request. A refusal that comes early ends the sending.
    pub fn send_file(
        &mut self,
        to: Target<'_>,
        name: &str,
        content: &mut impl Read,
        progress: &mut impl FnMut(u64),
    ) -> Result<()> {
        let (verb, party) = match to {
            Target::User(party) => ("SEND FILE", party),
            Target::Group(party) => ("SEND GROUP FILE", party),
        };
        self.check_login()?;
        check_word(party)?;
        check_file_name(name)?;
        let head = format!("{verb} {} {party} {name} ", self.token);
        self.stream.write_all(head.as_bytes())?;
        let (mut block, mut encoded, mut sent) = (vec![0; BLOCK_BYTES], String::new(), 0);
        loop {
            let count = read_block(content, &mut block).map_err(|error| {
                // Half a file must not look like a whole one.
                let (Ok(()) | Err(_)) = self.stream.shutdown(Shutdown::Both);
                ClientError::File(error)
            })?;
            encoded.clear();
            STANDARD.encode_string(&block[..count], &mut encoded);
            if let Err(error) = self.stream.write_all(encoded.as_bytes()) {
                return self.failed_write(error);
            }
            sent += count as u64;
            progress(sent);
            if count < BLOCK_BYTES || self.is_answered()? {
                break;
            }
        }
        match self.stream.write_all(b"\r\n") {
            Ok(()) => self.reply().map(drop),
            Err(error) => self.failed_write(error),
        }
    }

    /// Receives a file, by the names that [`Client::files`] gives. `progress` is told, after each block, how many bytes came.
    /// Gives back the size.
    ///
    /// # Errors
    /// [`ClientError::File`] when `into` cannot be written; the connection is over then. Else as any request. What was written
    /// by then is not the whole file.
    pub fn download(
        &mut self,
        party: &str,
        name: &str,
        into: &mut impl Write,
        progress: &mut impl FnMut(u64),
    ) -> Result<u64> {
        self.check_login()?;
        check_word(party)?;
        check_file_name(name)?;
        let line = format!("DOWNLOAD FILE {} {party} {name}", self.token);
        self.send(line.as_bytes())?;
        while !self.has_content()? {
            self.fill()?;
        }
        let mut content = DecoderReader::new(Quoted { client: self, at: 0, is_ended: false }, &STANDARD);
        let (mut block, mut received) = (vec![0; BLOCK_BYTES], 0);
        loop {
            let count = read_block(&mut content, &mut block).map_err(not_a_reply)?;
            if let Err(error) = into.write_all(&block[..count]) {
                let (Ok(()) | Err(_)) = self.stream.shutdown(Shutdown::Both);
                return Err(ClientError::File(error));
            }
            received += count as u64;
            progress(received);
            if count < BLOCK_BYTES {
                break;
            }
        }
        // Without its end it is not whole.
        while memchr::memmem::find(&self.received, END).is_none() {
            if self.received.len() > SHORT_REPLY_BYTES {
                return Err(ClientError::NotAReply);
            }
            self.fill()?;
        }
        let end = memchr::memmem::find(&self.received, END).unwrap_or_default();
        self.received.drain(..end + END.len());
        Ok(received)
    }

    /// Cuts off what stands before the content, as soon as it is there.
    ///
    /// # Errors
    /// The reply says ERROR, or is none.
    fn has_content(&mut self) -> Result<bool> {
        let is_ok = self.received.starts_with(br#"{"status":"OK","#);
        if is_ok && let Some(at) = memchr::memmem::find(&self.received, DATA) {
            self.received.drain(..at + DATA.len());
            return Ok(true);
        }
        if memchr::memmem::find(&self.received, END).is_some() {
            self.reply()?;
            return Err(ClientError::NotAReply);
        }
        if self.received.len() > SHORT_REPLY_BYTES { Err(ClientError::NotAReply) } else { Ok(false) }
    }

    /// True when a reply has begun to come, though the request is not whole.
    fn is_answered(&self) -> io::Result<bool> {
        self.stream.set_nonblocking(true)?;
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false)?;
        Ok(peeked.is_ok_and(|count| count > 0))
    }

    /// A server that takes nothing more may have said why.
    fn failed_write(&mut self, error: io::Error) -> Result<()> {
        match self.reply() {
            Err(refused @ ClientError::Refused(_)) => Err(refused),
            _ => Err(error.into()),
        }
    }
}

/// Opens a file to send it, and says how large it is. A device or a pipe might have no end.
///
/// # Errors
/// What the disk said, or that it is not an ordinary file.
pub fn open(path: &Path) -> io::Result<(File, u64)> {
    // Before it is opened: a pipe would wait for somebody to write to it.
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        return Err(io::Error::other("it is a directory"));
    }
    if !meta.is_file() {
        return Err(io::Error::other("it is not an ordinary file"));
    }
    Ok((File::open(path)?, meta.len()))
}

/// Writes as what is under it, until it is told to end.
#[derive(Debug)]
pub struct Interruptible<'w, W> {
    into: W,
    is_ending: &'w AtomicBool,
}

impl<'w, W: Write> Interruptible<'w, W> {
    /// One that fails as soon as `is_ending` is set.
    pub fn new(into: W, is_ending: &'w AtomicBool) -> Self {
        Self { into, is_ending }
    }
}

impl<W: Write> Write for Interruptible<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_ending.load(Ordering::SeqCst) {
            return Err(io::Error::other("interrupted"));
        }
        self.into.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.into.flush()
    }
}

/// The text of a reply up to the quote that ends it.
struct Quoted<'c> {
    client: &'c mut Client<TcpStream>,
    /// How much of what was received is given out.
    at: usize,
    is_ended: bool,
}

impl Read for Quoted<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.is_ended || into.is_empty() {
            return Ok(0);
        }
        if self.at == self.client.received.len() {
            self.client.received.clear();
            self.at = 0;
            self.client.fill()?;
        }
        let left = &self.client.received[self.at..];
        let some = &left[..left.len().min(into.len())];
        let quote = memchr::memchr(b'"', some);
        let count = quote.unwrap_or(some.len());
        into[..count].copy_from_slice(&some[..count]);
        self.at += count;
        if quote.is_some() {
            self.is_ended = true;
            self.client.received.drain(..=self.at);
        }
        Ok(count)
    }
}

fn check_file_name(name: &str) -> Result<()> {
    let reason = "the name of a file has no blanks and no control characters";
    check_word(name).map_err(|_| ClientError::Invalid(reason))
}

/// The decoder says of what is not base64 that it is invalid data.
fn not_a_reply(error: io::Error) -> ClientError {
    if error.kind() == ErrorKind::InvalidData { ClientError::NotAReply } else { error.into() }
}

/// Reads until the block is full or all is read.
fn read_block(from: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match from.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
