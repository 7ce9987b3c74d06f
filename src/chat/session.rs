//! The connection of a chat: it is made, lost and made again; what is typed meanwhile waits and is kept on the disk; and what
//! comes is put into the history before it is shown.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::transfers::{self, Move, Moved, Mover};
use super::{Event, Options};
use crate::client::history::History;
use crate::client::profile::{Login, Profiles};
use crate::client::{Client, ClientError, Message, Target, lists};

/// How often it asks for new messages while something goes on,
const POLL: Duration = Duration::from_secs(1);
/// and when nothing has for a while.
const POLL_QUIET: Duration = Duration::from_secs(3);
const QUIET_AFTER: Duration = Duration::from_secs(60);
/// The first pause before it connects again; each is twice as long as the one before, up to the last.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Without a login there is nothing to do but to wait for one.
const IDLE: Duration = Duration::from_secs(3600);
/// How often it looks whether there are new files; where there are many, seldom.
const FILES_EVERY: Duration = Duration::from_secs(10);
const FILES_EVERY_MANY: Duration = Duration::from_secs(300);
const FILES_MANY: usize = 500;
/// Of many messages that wait, so many replies are taken before something else has its turn.
const REPLIES_AT_ONCE: usize = 16;

/// What is kept beside the history.
const UNSENT: &str = "unsent";
const GROUPS: &str = "groups";

/// A user or a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Party {
    pub(super) is_group: bool,
    pub(super) name: String,
}

impl Party {
    pub(super) fn target(&self) -> Target<'_> {
        if self.is_group { Target::Group(&self.name) } else { Target::User(&self.name) }
    }
}

/// What the screen wants done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Order {
    Login { user: String, password: String, is_new: bool },
    Logout,
    Send { number: u64, to: Party, text: String },
    CreateGroup { group: String, secret: Option<String> },
    JoinGroup { group: String, secret: Option<String> },
    LeaveGroup { group: String },
    AddMember { group: String, user: String },
    RemoveMember { group: String, user: String },
    Files,
    Move(Move),
}

/// What the screen is told.
#[derive(Debug)]
pub(super) enum Said {
    Online,
    Offline {
        why: String,
        pause: Duration,
    },
    /// Nobody is logged in, for a reason if there was somebody.
    LoginNeeded {
        user: Option<String>,
        server: String,
        why: Option<String>,
    },
    LoggedIn {
        user: String,
        server: String,
        history: Vec<Message>,
    },
    /// It was typed before, and waits to be sent.
    Waiting {
        number: u64,
        to: Party,
        text: String,
    },
    Received(Vec<Message>),
    /// The server has it, or has refused it.
    Sent {
        number: u64,
        result: Result<(), String>,
    },
    Groups(BTreeMap<String, Vec<String>>),
    Files(BTreeMap<String, Vec<String>>),
    /// Somebody has sent one.
    FileCame {
        party: String,
        name: String,
    },
    /// It is done, or not.
    Note(String),
    Moved(Moved),
}

/// The thread's own.
pub(super) struct Session {
    options: Options,
    tell: Sender<Event>,
    client: Option<Client<TcpStream>>,
    login: Option<Login>,
    history: Option<History>,
    outbox: VecDeque<Waiting>,
    /// Messages from earlier runs have numbers from the top down, others those that the screen has given them.
    earlier_number: u64,
    moves: u64,
    /// The files that there were, each with the other party, and when to look again.
    files: Option<BTreeSet<(String, String)>>,
    files_at: Instant,
    /// The files that were sent from here and are not listed yet, of which nobody needs to be told.
    files_sent: BTreeSet<(String, String)>,
    /// The program ends, and files on their way are given up.
    is_ending: Arc<AtomicBool>,
    /// Dropped with the last of these threads.
    done: Sender<()>,
    pause: Duration,
    connect_at: Instant,
    poll_at: Instant,
    active_at: Instant,
}

/// A message that is not sent yet.
struct Waiting {
    number: u64,
    to: Party,
    text: String,
}

impl Session {
    pub(super) fn new(options: Options, tell: Sender<Event>, is_ending: Arc<AtomicBool>, done: Sender<()>) -> Self {
        let now = Instant::now();
        Self {
            options,
            tell,
            client: None,
            login: None,
            history: None,
            outbox: VecDeque::new(),
            earlier_number: u64::MAX,
            moves: 0,
            files: None,
            files_at: now,
            files_sent: BTreeSet::new(),
            is_ending,
            done,
            pause: PAUSE_FIRST,
            connect_at: now,
            poll_at: now,
            active_at: now,
        }
    }

    /// Runs until the screen is gone.
    pub(super) fn run(mut self, orders: &Receiver<Order>) {
        self.begin();
        loop {
            let wait = match (&self.login, &self.client) {
                (None, _) => IDLE,
                (_, None) => self.connect_at.saturating_duration_since(Instant::now()),
                _ => self.poll_at.saturating_duration_since(Instant::now()),
            };
            match orders.recv_timeout(wait) {
                Ok(order) => self.order(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.login.is_some() && self.client.is_none() && Instant::now() >= self.connect_at {
                self.connect();
            }
            self.send_waiting();
            if self.client.is_some() && Instant::now() >= self.poll_at {
                self.poll();
                self.look_for_files();
            }
        }
    }

    fn say(&self, said: Said) {
        // A screen that is gone needs to know nothing.
        let (Ok(()) | Err(_)) = self.tell.send(Event::Session(said));
    }

    fn note(&self, text: impl Into<String>) {
        self.say(Said::Note(text.into()));
    }

    fn profiles(&self) -> Profiles {
        Profiles::new(&self.options.state)
    }

    /// Where to log in.
    fn server(&self) -> String {
        let of_profile = || self.profiles().load(&self.options.profile).ok().flatten().map(|login| login.server);
        self.options.server.clone().or_else(of_profile).unwrap_or_else(|| self.options.server_default.clone())
    }

    /// Goes on with the login of the profile, where that is who and where the user means.
    fn begin(&mut self) {
        let kept = match self.profiles().load(&self.options.profile) {
            Ok(kept) => kept,
            Err(error) => return self.need_login(self.options.user.clone(), Some(error.to_string())),
        };
        let Options { server, user, .. } = &self.options;
        let is_meant = |login: &Login| {
            server.as_ref().is_none_or(|server| *server == login.server)
                && user.as_ref().is_none_or(|user| *user == login.user)
        };
        match kept.filter(is_meant) {
            Some(login) => self.logged_in(login),
            None => self.need_login(self.options.user.clone(), None),
        }
    }

    fn need_login(&mut self, user: Option<String>, why: Option<String>) {
        // What is not sent yet waits on the disk for whoever has typed it: the next may be somebody else.
        if self.login.is_some() {
            self.save_outbox();
            self.outbox.clear();
        }
        self.login = None;
        self.client = None;
        self.say(Said::LoginNeeded { user, server: self.server(), why });
    }

    fn logged_in(&mut self, login: Login) {
        let Login { server, user, .. } = login.clone();
        match History::open(&self.options.state, &server, &user) {
            Ok((history, messages)) => {
                self.history = Some(history);
                self.say(Said::LoggedIn { user, server, history: messages });
            }
            // Without it, what comes would be lost with the screen.
            Err(error) => {
                return self.need_login(Some(user), Some(format!("the history cannot be opened: {error}")));
            }
        }
        self.login = Some(login);
        self.files = None;
        self.files_sent.clear();
        // Until the server says, these are the groups that there were.
        if let Some(groups) = self.kept(GROUPS).and_then(|path| fs::read(path).ok())
            && let Ok(groups) = serde_json::from_slice(&groups)
            && let Ok(groups) = lists(&groups)
        {
            self.say(Said::Groups(groups));
        }
        self.load_outbox();
        self.connect_at = Instant::now();
        self.pause = PAUSE_FIRST;
    }

    fn connect(&mut self) {
        let Some(login) = &self.login else { return };
        match Client::connect(&*login.server) {
            Ok(mut client) => {
                client.set_token(&login.token);
                self.client = Some(client);
                self.poll_at = Instant::now();
                // Whether it goes well shows with the first reply.
                self.groups();
            }
            Err(error) => self.lost(&error),
        }
    }

    /// The connection is no more. It is made again after a pause.
    fn lost(&mut self, error: &ClientError) {
        self.client = None;
        self.connect_at = Instant::now() + self.pause;
        self.say(Said::Offline { why: error.to_string(), pause: self.pause });
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// Makes a request, if there is a connection. What the server refuses comes back, but for the end of the login.
    fn ask<T>(
        &mut self,
        ask: impl FnOnce(&mut Client<TcpStream>) -> Result<T, ClientError>,
    ) -> Option<Result<T, String>> {
        let client = self.client.as_mut()?;
        match ask(client) {
            Ok(answer) => {
                self.pause = PAUSE_FIRST;
                Some(Ok(answer))
            }
            Err(ClientError::Refused(text)) if text == "token tidak valid" => {
                let user = self.login.as_ref().map(|login| login.user.clone());
                self.need_login(user, Some("the login has ended".to_owned()));
                None
            }
            Err(ClientError::Refused(text)) => Some(Err(text)),
            Err(ClientError::Invalid(reason)) => Some(Err(reason.to_owned())),
            Err(error) => {
                self.lost(&error);
                None
            }
        }
    }

    fn order(&mut self, order: Order) {
        self.active_at = Instant::now();
        self.poll_at = self.poll_at.min(self.active_at + POLL);
        match order {
            Order::Login { user, password, is_new } => self.log_in(&user, &password, is_new),
            Order::Logout => self.log_out(),
            Order::Send { number, to, text } => {
                self.outbox.push_back(Waiting { number, to, text });
                if self.client.is_none() {
                    self.save_outbox();
                }
            }
            Order::CreateGroup { group, secret } => {
                let done = format!("{group} is there, and yours");
                self.group(done, |client| client.create_group(&group, secret.as_deref()));
            }
            Order::JoinGroup { group, secret } => {
                let done = format!("you are in {group}");
                self.group(done, |client| client.join_group(&group, secret.as_deref()));
            }
            Order::LeaveGroup { group } => {
                let done = format!("you have left {group}");
                self.group(done, |client| client.leave_group(&group));
            }
            Order::AddMember { group, user } => {
                let done = format!("{user} is in {group}");
                self.group(done, |client| client.add_member(&group, &user));
            }
            Order::RemoveMember { group, user } => {
                let done = format!("{user} is not in {group} any more");
                self.group(done, |client| client.remove_member(&group, &user));
            }
            Order::Files => match self.ask(Client::files) {
                Some(Ok(files)) => self.say(Said::Files(files)),
                Some(Err(text)) => self.note(text),
                None => self.note("there is no connection now"),
            },
            Order::Move(order) => {
                self.moves += 1;
                match self.login.clone() {
                    Some(login) => {
                        // Whoever sends one is not told of it as if it had come, however long it takes.
                        self.files_sent.extend(order.listed_as());
                        let mover = Mover { number: self.moves, login, is_ending: Arc::clone(&self.is_ending) };
                        transfers::begin(mover, order, &self.tell, self.done.clone());
                    }
                    None => self.note("nobody is logged in"),
                }
            }
        }
    }

    /// A request about groups, and what groups there are then.
    fn group(&mut self, done: String, ask: impl FnOnce(&mut Client<TcpStream>) -> Result<(), ClientError>) {
        match self.ask(ask) {
            Some(Ok(())) => {
                self.note(done);
                self.groups();
            }
            Some(Err(text)) => self.note(text),
            None => self.note("there is no connection now; try again when there is"),
        }
    }

    fn groups(&mut self) {
        match self.ask(Client::groups) {
            Some(Ok(groups)) => {
                if let Some(path) = self.kept(GROUPS)
                    && let Err(error) = fs::write(path, json!(groups).to_string())
                {
                    self.note(format!("the groups cannot be kept: {error}"));
                }
                self.say(Said::Online);
                self.say(Said::Groups(groups));
            }
            Some(Err(text)) => self.note(text),
            None => {}
        }
    }

    fn log_in(&mut self, user: &str, password: &str, is_new: bool) {
        let server = self.server();
        let logged_in = Client::connect(&*server).and_then(|mut client| {
            if is_new {
                client.register(user, password)?;
            }
            client.login(user, password)?;
            Ok(client.token().to_owned())
        });
        match logged_in {
            Ok(token) => {
                let login = Login { server, user: user.to_owned(), token };
                if let Err(error) = self.profiles().save(&self.options.profile, &login) {
                    self.note(format!("the login cannot be kept: {error}"));
                }
                self.logged_in(login);
            }
            Err(error) => self.need_login(Some(user.to_owned()), Some(error.to_string())),
        }
    }

    fn log_out(&mut self) {
        // Without a connection the token is forgotten here, and ends there when it has not been used for long.
        let _ended = self.ask(Client::logout);
        if let Err(error) = self.profiles().forget(&self.options.profile) {
            self.note(format!("the login cannot be forgotten: {error}"));
        }
        self.need_login(None, None);
    }

    /// Sends what was typed, in order. What the connection breaks off on is sent again: better twice than never.
    fn send_waiting(&mut self) {
        let had_any = !self.outbox.is_empty();
        while self.client.is_some()
            && let Some((to, text)) = self.outbox.front().map(|waiting| (waiting.to.clone(), waiting.text.clone()))
        {
            // It stays in front until there is an answer, whatever becomes of the connection or the login.
            let Some(result) = self.ask(|client| client.send_message(to.target(), &text)) else { break };
            if result.is_ok() {
                self.keep_sent(&to.name, &text);
            }
            if let Some(Waiting { number, .. }) = self.outbox.pop_front() {
                self.say(Said::Sent { number, result });
            }
        }
        if had_any && self.login.is_some() {
            self.save_outbox();
        }
    }

    fn keep_sent(&mut self, to: &str, text: &str) {
        let (Some(login), Some(history)) = (&self.login, &mut self.history) else { return };
        if let Err(error) = history.sent(&login.user, to, text) {
            self.note(format!("the history cannot be written: {error}"));
        }
    }

    fn poll(&mut self) {
        for _ in 0..REPLIES_AT_ONCE {
            match self.ask(Client::inbox) {
                Some(Ok(messages)) if messages.is_empty() => break,
                Some(Ok(messages)) => self.receive(messages),
                Some(Err(text)) => {
                    self.note(text);
                    break;
                }
                None => return,
            }
        }
        let now = Instant::now();
        let is_quiet = now.saturating_duration_since(self.active_at) > QUIET_AFTER;
        self.poll_at = now + if is_quiet { POLL_QUIET } else { POLL };
    }

    fn receive(&mut self, messages: Vec<Message>) {
        self.active_at = Instant::now();
        let Some(history) = &mut self.history else { return };
        match history.receive(messages.clone()) {
            Ok(new) => self.say(Said::Received(new)),
            Err(error) => {
                // They are shown all the same: the server does not give them again.
                self.say(Said::Received(messages));
                self.note(format!("the history cannot be written: {error}"));
            }
        }
    }

    /// Tells of files that were not there before.
    fn look_for_files(&mut self) {
        let now = Instant::now();
        if now < self.files_at {
            return;
        }
        let Some(Ok(files)) = self.ask(Client::files) else { return };
        let pairs =
            files.into_iter().flat_map(|(party, names)| names.into_iter().map(move |name| (party.clone(), name)));
        let files: BTreeSet<(String, String)> = pairs.collect();
        self.files_at = now + if files.len() > FILES_MANY { FILES_EVERY_MANY } else { FILES_EVERY };
        if let Some(before) = &self.files {
            for (party, name) in files.difference(before).filter(|file| !self.files_sent.contains(file)) {
                self.say(Said::FileCame { party: party.clone(), name: name.clone() });
            }
        }
        self.files_sent.retain(|file| !files.contains(file));
        self.files = Some(files);
    }

    /// Where something of this login is kept.
    fn kept(&self, what: &str) -> Option<PathBuf> {
        let Login { server, user, .. } = self.login.as_ref()?;
        Some(self.options.state.join("history").join(format!("{user}@{server}.{what}").replace('/', "_")))
    }

    /// What is not sent yet is there the next time.
    fn save_outbox(&self) {
        let Some(path) = self.kept(UNSENT) else { return };
        let saved = if self.outbox.is_empty() {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        } else {
            let line = |Waiting { to, text, .. }: &Waiting| {
                json!({ "to": to.name, "is_group": to.is_group, "text": text }).to_string() + "\n"
            };
            fs::write(path, self.outbox.iter().map(line).collect::<String>())
        };
        if let Err(error) = saved {
            self.note(format!("what is not sent yet cannot be kept: {error}"));
        }
    }

    fn load_outbox(&mut self) {
        let text = self.kept(UNSENT).and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let (Some(name), Some(text)) = (line["to"].as_str(), line["text"].as_str()) else { continue };
            let to = Party { is_group: line["is_group"] == true, name: name.to_owned() };
            self.earlier_number -= 1;
            let number = self.earlier_number;
            self.say(Said::Waiting { number, to: to.clone(), text: text.to_owned() });
            self.outbox.push_back(Waiting { number, to, text: text.to_owned() });
        }
    }
}
