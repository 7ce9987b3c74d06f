//! Messages that a user has received and sent, kept in a file, since the server gives each once.
//!
//! A line of JSON for each. What is received is on the disk before it is shown, so that nothing that was taken from the
//! server is only on a screen. A message that the server gives again, because it did not know that the first time has
//! arrived, is known by its number and time and not kept twice.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Message;
use super::profile::make_private;
use crate::text::now;

/// So much of a file's end is read, whatever its size: some ten thousand messages.
const LOADED_BYTES: u64 = 1024 * 1024;

/// The file of one user on one server.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    known: HashSet<(u64, String)>,
}

impl History {
    /// Opens that of a user in a state directory, and gives back what was received and sent last, oldest first. A message
    /// that was sent has the id 0.
    ///
    /// # Errors
    /// What the disk said.
    pub fn open(state: &Path, server: &str, user: &str) -> io::Result<(Self, Vec<Message>)> {
        let directory = state.join("history");
        make_private(&directory)?;
        // A host name has no slash, but what is given may be anything.
        let path = directory.join(format!("{user}@{server}.jsonl").replace('/', "_"));
        let messages = load(&path)?;
        let known = messages.iter().map(|message| (message.id, message.time.clone())).collect();
        Ok((Self { path, known }, messages))
    }

    /// Keeps what was received, and gives back what of it is new.
    ///
    /// # Errors
    /// What the disk said.
    pub fn receive(&mut self, messages: Vec<Message>) -> io::Result<Vec<Message>> {
        let mut is_new = |message: &Message| self.known.insert((message.id, message.time.clone()));
        let new: Vec<Message> = messages.into_iter().filter(|message| is_new(message)).collect();
        self.append(&new)?;
        Ok(new)
    }

    /// Keeps what was sent now.
    ///
    /// # Errors
    /// What the disk said.
    pub fn sent(&mut self, from: &str, to: &str, text: &str) -> io::Result<()> {
        let message = Message { id: 0, from: from.into(), to: to.into(), text: text.into(), time: now() };
        self.append(&[message])
    }

    fn append(&self, messages: &[Message]) -> io::Result<()> {
        if messages.is_empty() {
            return Ok(());
        }
        let mut lines = String::new();
        for Message { id, from, to, text, time } in messages {
            let line = json!({ "id": id, "from": from, "to": to, "text": text, "time": time });
            lines.push_str(&line.to_string());
            lines.push('\n');
        }
        // In one write, so that two clients of one user do not cut each other's lines.
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
        file.write_all(lines.as_bytes())?;
        file.sync_data()
    }
}

fn load(path: &Path) -> io::Result<Vec<Message>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let start = file.metadata()?.len().saturating_sub(LOADED_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    // The first line may be half of one, and so may the last be after a crash.
    let lines = bytes.split(|byte| *byte == b'\n').skip(usize::from(start > 0));
    Ok(lines.filter_map(|line| message(&serde_json::from_slice(line).ok()?)).collect())
}

fn message(line: &Value) -> Option<Message> {
    let text = |key: &str| line[key].as_str().map(ToOwned::to_owned);
    Some(Message {
        id: line["id"].as_u64()?,
        from: text("from")?,
        to: text("to")?,
        text: text("text")?,
        time: text("time")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: u64, text: &str) -> Message {
        let time = format!("2026-01-01T00:00:00.{id:03}Z");
        Message { id, from: "messi".into(), to: "henderson".into(), text: text.into(), time }
    }

    #[test]
    fn what_is_kept_comes_back_and_what_comes_again_is_not_kept_twice() {
        let state = tempfile::tempdir().unwrap();
        let (mut history, loaded) = History::open(state.path(), "host:1", "henderson").unwrap();
        assert!(loaded.is_empty());
        let one = vec![message(1, "satu\t\"\\"), message(2, "dua")];
        assert_eq!(history.receive(one.clone()).unwrap(), one);
        let again = vec![message(2, "dua"), message(3, "tiga")];
        assert_eq!(history.receive(again.clone()).unwrap(), again[1..]);
        let (mut history, loaded) = History::open(state.path(), "host:1", "henderson").unwrap();
        assert_eq!(loaded, [&one[..], &again[1..]].concat());
        assert!(history.receive(again).unwrap().is_empty());
        // A server that has begun anew gives numbers again, at other times.
        let other = Message { time: "2027-01-01T00:00:00.000Z".into(), ..message(1, "baru") };
        assert_eq!(history.receive(vec![other.clone()]).unwrap(), [other]);
        assert!(History::open(state.path(), "host:1", "messi").unwrap().1.is_empty());
    }

    #[test]
    fn a_line_that_broke_off_costs_itself_and_no_other() {
        let state = tempfile::tempdir().unwrap();
        let (mut history, _) = History::open(state.path(), "host:1", "henderson").unwrap();
        history.receive(vec![message(1, "satu")]).unwrap();
        let mut file = OpenOptions::new().append(true).open(&history.path).unwrap();
        file.write_all(b"{\"id\":2,\"fro\n").unwrap();
        history.receive(vec![message(3, "tiga")]).unwrap();
        let (_, loaded) = History::open(state.path(), "host:1", "henderson").unwrap();
        assert_eq!(loaded, [message(1, "satu"), message(3, "tiga")]);
    }

    #[test]
    fn of_a_long_file_the_end_is_loaded() {
        let state = tempfile::tempdir().unwrap();
        let (mut history, _) = History::open(state.path(), "host:1", "henderson").unwrap();
        let long = "x".repeat(60_000);
        for id in 1..=40 {
            history.receive(vec![message(id, &long)]).unwrap();
        }
        let (_, loaded) = History::open(state.path(), "host:1", "henderson").unwrap();
        assert!((10..20).contains(&loaded.len()), "{}", loaded.len());
        assert_eq!(loaded.last().unwrap().id, 40);
    }
}
