//! What is on the screen, and what a key does to it. It knows no terminal, no network and no clock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tui_input::Input;
use tui_input::backend::crossterm::EventHandler;

use super::session::{Order, Party, Said};
use super::transfers::{Move, Moved, Step};
use crate::client::Message;
use crate::text::{local_time, printable};

/// Lines of one conversation that can be scrolled back to; the history file has more.
const LINES_MAX: usize = 5000;
/// Lines that were typed and can be called back.
const RECALLED_MAX: usize = 500;
/// Transfers that are over stay on the screen until so many are.
const TRANSFERS_SHOWN: usize = 3;

/// A message or a command is no longer than this. The server takes some more.
const TYPED_BYTES_MAX: usize = 8000;

/// What `/help` says.
pub(super) const HELP: &[(&str, &str)] = &[
    ("Enter", "send what is typed, or do what it says"),
    ("Tab, Shift-Tab", "the next conversation, the one before"),
    ("Up, Down", "what was typed before"),
    ("PageUp, PageDown", "scroll"),
    ("Ctrl-C", "end"),
    ("/to NAME", "open a conversation with a user"),
    ("/send PATH", "send a file to this conversation"),
    ("/files", "list the files of this conversation"),
    ("/get NAME", "get one of them, into this directory"),
    ("/groups", "list one's groups"),
    ("/create NAME [SECRET]", "make a group"),
    ("/join NAME [SECRET]", "join a group"),
    ("/leave", "leave this group"),
    ("/members", "list the members of this group"),
    ("/add USER, /remove USER", "who is in this group, if it is yours"),
    ("/logout", "log in as somebody else"),
    ("/quit", "end"),
    ("//TEXT", "a message that begins with a slash"),
];

/// The whole of it.
pub(super) struct App {
    pub(super) screen: Screen,
    pub(super) me: String,
    pub(super) server: String,
    pub(super) link: Link,
    pub(super) conversations: Vec<Conversation>,
    selected: Option<Party>,
    pub(super) input: Input,
    pub(super) transfers: Vec<Transfer>,
    pub(super) is_help: bool,
    /// Lines up from the newest.
    pub(super) scrolled: usize,
    groups: BTreeMap<String, Vec<String>>,
    recalled: Vec<String>,
    recalled_at: Option<usize>,
    /// Messages that are not sent yet.
    numbers: u64,
    files_wanted: Option<Party>,
    /// A group that is made or joined, to be shown once it is.
    group_wanted: Option<String>,
    /// What there is to say while there is no conversation.
    pub(super) notes: Vec<Line>,
    /// Whether it was asked to end while a file was on its way.
    is_quit_asked: bool,
    orders: Vec<Order>,
    is_over: bool,
}

/// Which of the two there are.
pub(super) enum Screen {
    Login(Form),
    Chat,
}

/// Who somebody is.
#[derive(Default)]
pub(super) struct Form {
    pub(super) user: Input,
    pub(super) password: Input,
    pub(super) is_at_password: bool,
    /// What the server said of it.
    pub(super) why: Option<String>,
    pub(super) is_waiting: bool,
}

/// How the connection is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Link {
    Connecting,
    Online,
    Offline { why: String, seconds: u64 },
}

/// What was said with one user, or in one group.
pub(super) struct Conversation {
    pub(super) party: Party,
    pub(super) lines: Vec<Line>,
    pub(super) unread: usize,
    /// What was typed and not sent when another was selected.
    draft: Input,
}

/// One message, or something to say of the conversation.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) time: String,
    pub(super) from: String,
    pub(super) text: String,
    pub(super) state: State,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    Received,
    Sent,
    /// Not sent yet.
    Waiting(u64),
    /// Refused, for this reason.
    Refused(String),
    /// Nobody has said it.
    Note,
}

/// A file on its way.
pub(super) struct Transfer {
    number: u64,
    pub(super) label: String,
    pub(super) done: u64,
    pub(super) bytes: Option<u64>,
}

impl App {
    pub(super) fn new(user: Option<String>) -> Self {
        let user = Input::new(user.unwrap_or_default());
        Self {
            screen: Screen::Login(Form { user, is_waiting: true, ..Form::default() }),
            me: String::new(),
            server: String::new(),
            link: Link::Connecting,
            conversations: Vec::new(),
            selected: None,
            input: Input::default(),
            transfers: Vec::new(),
            is_help: false,
            scrolled: 0,
            groups: BTreeMap::new(),
            recalled: Vec::new(),
            recalled_at: None,
            numbers: 0,
            files_wanted: None,
            group_wanted: None,
            notes: Vec::new(),
            is_quit_asked: false,
            orders: Vec::new(),
            is_over: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    pub(super) fn quit(&mut self) {
        self.is_over = true;
    }

    /// What the session is to do, since this was last asked.
    pub(super) fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// The conversation on the screen.
    pub(super) fn current(&self) -> Option<&Conversation> {
        let selected = self.selected.as_ref()?;
        self.conversations.iter().find(|conversation| conversation.party == *selected)
    }

    pub(super) fn is_selected(&self, conversation: &Conversation) -> bool {
        self.selected.as_ref() == Some(&conversation.party)
    }

    /// Takes what the terminal says.
    pub(super) fn terminal(&mut self, event: &Event) {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => self.key(*key, event),
            // A message is one line.
            Event::Paste(text) => {
                self.is_help = false;
                let input = match &mut self.screen {
                    Screen::Chat => &mut self.input,
                    Screen::Login(form) if form.is_at_password => &mut form.password,
                    Screen::Login(form) => &mut form.user,
                };
                if !insert(input, text) {
                    self.note(&format!("a message is at most {TYPED_BYTES_MAX} bytes; what is beyond was not pasted"));
                }
            }
            _ => {}
        }
    }

    fn key(&mut self, key: KeyEvent, event: &Event) {
        if key.modifiers.contains(KeyModifiers::CONTROL) && matches!(key.code, KeyCode::Char('c' | 'q')) {
            return self.ask_to_quit();
        }
        match &mut self.screen {
            Screen::Login(form) => {
                if let Some(order) = form.key(key, event) {
                    self.orders.push(order);
                }
            }
            Screen::Chat => self.chat_key(key, event),
        }
    }

    /// A file that is on its way is not given up by a slip of the hand.
    fn ask_to_quit(&mut self) {
        if self.transfers.is_empty() || self.is_quit_asked {
            return self.quit();
        }
        self.is_quit_asked = true;
        self.note("a file is on its way; the same again ends the program and gives the file up");
    }

    fn chat_key(&mut self, key: KeyEvent, event: &Event) {
        // What closes the help does nothing else, unless it is typed.
        if std::mem::take(&mut self.is_help) && matches!(key.code, KeyCode::Enter | KeyCode::Esc | KeyCode::Tab) {
            return;
        }
        match key.code {
            KeyCode::Enter => self.enter(),
            KeyCode::Tab => self.step(1),
            KeyCode::BackTab => self.step(-1),
            KeyCode::PageUp => self.scrolled = self.scrolled.saturating_add(10),
            KeyCode::PageDown => self.scrolled = self.scrolled.saturating_sub(10),
            KeyCode::Up => self.recall(-1),
            KeyCode::Down => self.recall(1),
            KeyCode::Esc => self.input.reset(),
            KeyCode::Char(_) if self.input.value().len() >= TYPED_BYTES_MAX && key.modifiers.is_empty() => {}
            _ => {
                self.input.handle_event(event);
            }
        }
    }

    /// Selects the conversation so many further on.
    fn step(&mut self, by: isize) {
        let count = self.conversations.len();
        if count == 0 {
            return;
        }
        let at = self.conversations.iter().position(|conversation| self.is_selected(conversation)).unwrap_or(0);
        let at = (at + count).saturating_add_signed(by) % count;
        let party = self.conversations[at].party.clone();
        self.select(&party);
    }

    /// Shows a conversation, which is begun if there is none. What was typed for the one before stays with that.
    fn select(&mut self, party: &Party) {
        if self.selected.as_ref() != Some(party) {
            let typed = std::mem::take(&mut self.input);
            if let Some(before) = self.selected.clone() {
                self.conversation(&before).draft = typed;
            }
            let input = std::mem::take(&mut self.conversation(party).draft);
            self.input = input;
            self.selected = Some(party.clone());
        }
        self.recalled_at = None;
        self.scrolled = 0;
        self.conversation(party).unread = 0;
    }

    /// The conversation with a party; groups stand before users, each by name.
    fn conversation(&mut self, party: &Party) -> &mut Conversation {
        let order = |party: &Party| (!party.is_group, party.name.clone());
        let wanted = order(party);
        let at = self.conversations.partition_point(|conversation| order(&conversation.party) < wanted);
        if self.conversations.get(at).is_none_or(|conversation| conversation.party != *party) {
            let (party, lines) = (party.clone(), Vec::new());
            self.conversations.insert(at, Conversation { party, lines, unread: 0, draft: Input::default() });
        }
        &mut self.conversations[at]
    }

    fn recall(&mut self, by: isize) {
        let count = self.recalled.len();
        let at = self.recalled_at.unwrap_or(count).saturating_add_signed(by).min(count);
        if self.recalled_at.is_none() && by < 0 && !self.input.value().is_empty() && count > 0 {
            // What is half typed can be called back too.
            self.recalled.push(self.input.value().to_owned());
        }
        self.recalled_at = (at < count).then_some(at);
        self.input = Input::new(self.recalled.get(at).cloned().unwrap_or_default());
    }

    /// Does what is typed.
    fn enter(&mut self) {
        let typed = self.input.value().to_owned();
        if typed.trim().is_empty() {
            return;
        }
        if self.recalled.last() != Some(&typed) {
            self.recalled.push(typed.clone());
        }
        if self.recalled.len() > RECALLED_MAX {
            self.recalled.remove(0);
        }
        self.recalled_at = None;
        self.scrolled = 0;
        match typed.strip_prefix('/') {
            Some(message) if message.starts_with('/') => self.send(message),
            Some(command) => {
                self.input.reset();
                self.command(command);
            }
            None => self.send(&typed),
        }
    }

    fn send(&mut self, text: &str) {
        let Some(to) = self.selected.clone() else {
            return self.note("to whom? Open a conversation with /to NAME; what you typed can be called back with Up");
        };
        self.input.reset();
        self.numbers += 1;
        let number = self.numbers;
        self.show_waiting(&to, number, text);
        self.orders.push(Order::Send { number, to, text: text.to_owned() });
    }

    fn show_waiting(&mut self, to: &Party, number: u64, text: &str) {
        let line = Line {
            time: String::new(),
            from: self.me.clone(),
            text: printable(text).into_owned(),
            state: State::Waiting(number),
        };
        self.conversation(to).push(line);
    }

    /// A message that was typed before has another number now; it may still be on the screen.
    fn waits_again(&mut self, to: &Party, number: u64, text: &str) {
        let shown = printable(text);
        let is_it = |line: &&mut Line| {
            matches!(line.state, State::Waiting(earlier) if earlier <= u64::MAX / 2) && line.text == shown
        };
        match self.conversation(to).lines.iter_mut().find(is_it) {
            Some(line) => line.state = State::Waiting(number),
            None => self.show_waiting(to, number, text),
        }
    }

    fn command(&mut self, command: &str) {
        let words: Vec<&str> = command.split_whitespace().collect();
        let group = self.selected.clone().filter(|party| party.is_group).map(|party| party.name);
        let text = |words: &[&str]| words.first().map(|word| (*word).to_owned());
        match (words.as_slice(), group) {
            (["help" | "h" | "?"], _) => self.is_help = true,
            (["quit" | "q" | "exit"], _) => self.ask_to_quit(),
            (["logout"], _) => self.orders.push(Order::Logout),
            (["to", name], _) => {
                let is_group = self.groups.contains_key(*name);
                self.select(&Party { is_group, name: (*name).to_owned() });
            }
            (["send", ..], _) => {
                // A path may have blanks in it.
                let path = command.trim_start().strip_prefix("send").unwrap_or_default().trim();
                match self.selected.clone() {
                    _ if path.is_empty() => self.note("which file? /send PATH"),
                    Some(to) => self.orders.push(Order::Move(Move::Send { to, path: home(path) })),
                    None => self.note("to whom? open a conversation with /to NAME"),
                }
            }
            (["files"], _) => {
                self.files_wanted.clone_from(&self.selected);
                self.orders.push(Order::Files);
            }
            (["get", name], _) => match self.selected.clone() {
                Some(Party { name: party, .. }) => {
                    let directory = PathBuf::from(".");
                    self.orders.push(Order::Move(Move::Get { party, name: (*name).to_owned(), directory }));
                }
                None => self.note("from whom? open a conversation with /to NAME"),
            },
            (["groups"], _) => self.list_groups(),
            (["create", group, secret @ ..], _) if secret.len() <= 1 => {
                self.group_wanted = Some((*group).to_owned());
                self.orders.push(Order::CreateGroup { group: (*group).to_owned(), secret: text(secret) });
            }
            (["join", group, secret @ ..], _) if secret.len() <= 1 => {
                self.group_wanted = Some((*group).to_owned());
                self.orders.push(Order::JoinGroup { group: (*group).to_owned(), secret: text(secret) });
            }
            (["leave"], Some(group)) => self.orders.push(Order::LeaveGroup { group }),
            (["members"], Some(group)) => {
                let members = self.groups.get(&group).cloned().unwrap_or_default();
                self.note(&format!("members: {}", members.join(", ")));
            }
            (["add", user], Some(group)) => {
                self.orders.push(Order::AddMember { group, user: (*user).to_owned() });
            }
            (["remove", user], Some(group)) => {
                self.orders.push(Order::RemoveMember { group, user: (*user).to_owned() });
            }
            (["leave" | "members"] | ["add" | "remove", _], None) => {
                self.note("this is no group; select one with Tab, or see /groups");
            }
            _ => {
                let word = words.first().map(|word| format!("/{word}"));
                let usage =
                    |(what, _): &&(&str, &str)| what.split([' ', ',']).any(|part| Some(part) == word.as_deref());
                match HELP.iter().find(usage) {
                    Some((what, does)) => self.note(&format!("{what}: {does}")),
                    None => self.note(&format!("/{command}: no such command; see /help")),
                }
            }
        }
    }

    fn list_groups(&mut self) {
        if self.groups.is_empty() {
            return self.note("you are in no group; see /create and /join");
        }
        let groups = self.groups.iter().map(|(name, members)| format!("{name}: {}", members.join(", ")));
        for line in groups.collect::<Vec<_>>() {
            self.note(&line);
        }
    }

    /// Says something in the conversation on the screen.
    fn note(&mut self, text: &str) {
        let line =
            Line { time: String::new(), from: String::new(), text: printable(text).into_owned(), state: State::Note };
        match self.selected.clone() {
            Some(party) => self.conversation(&party).push(line),
            None => self.notes.push(line),
        }
    }

    /// Says something where it belongs.
    fn note_in(&mut self, party: &Party, text: &str) {
        let line =
            Line { time: String::new(), from: String::new(), text: printable(text).into_owned(), state: State::Note };
        let is_seen = self.selected.as_ref() == Some(party);
        let conversation = self.conversation(party);
        conversation.push(line);
        conversation.unread += usize::from(!is_seen);
    }

    /// Takes what the session says.
    pub(super) fn said(&mut self, said: Said) {
        match said {
            Said::Online => self.link = Link::Online,
            Said::Offline { why, pause } => self.link = Link::Offline { why, seconds: pause.as_secs() },
            Said::LoginNeeded { user, server, why } => {
                self.server = server;
                // Whoever logs in now may be somebody else.
                let user = user.unwrap_or_default();
                let is_at_password = !user.is_empty();
                let form = Form { user: Input::new(user), is_at_password, why, ..Form::default() };
                self.screen = Screen::Login(form);
            }
            Said::LoggedIn { user, server, history } => self.logged_in(user, server, history),
            Said::Waiting { number, to, text } => self.waits_again(&to, number, &text),
            Said::Received(messages) => {
                for message in messages {
                    self.receive(&message, true);
                }
            }
            Said::Sent { number, result } => self.sent(number, result),
            Said::Groups(groups) => self.take_groups(groups),
            Said::Files(files) => self.list_files(&files),
            Said::FileCame { party, name } => {
                let party = Party { is_group: self.is_group(&party), name: party };
                self.note_in(&party, &format!("there is a new file: {name} (/get {name})"));
            }
            Said::Note(text) => self.note(&text),
            Said::Moved(moved) => self.moved(moved),
        }
    }

    fn logged_in(&mut self, user: String, server: String, history: Vec<Message>) {
        if self.me != user || self.server != server {
            self.conversations.clear();
            self.groups.clear();
            self.selected = None;
            self.input.reset();
        }
        let is_new = self.conversations.is_empty();
        (self.me, self.server, self.link, self.screen) = (user, server, Link::Connecting, Screen::Chat);
        for message in history.into_iter().filter(|_| is_new) {
            self.receive(&message, false);
        }
        if self.selected.is_none()
            && let Some(party) = self.conversations.first().map(|conversation| conversation.party.clone())
        {
            self.select(&party);
        }
    }

    /// Where a message belongs: to whoever else is in it.
    fn party_of(&self, message: &Message) -> Party {
        let Message { from, to, .. } = message;
        let is_sent = message.id == 0;
        match to {
            to if *to == self.me => Party { is_group: false, name: from.clone() },
            // What one has sent was to a user or a group; what one was sent and is not to oneself was to a group.
            to => Party { is_group: !is_sent || self.is_group(to), name: to.clone() },
        }
    }

    fn is_group(&self, name: &str) -> bool {
        let is_group = |conversation: &Conversation| conversation.party.is_group && conversation.party.name == name;
        self.groups.contains_key(name) || self.conversations.iter().any(is_group)
    }

    fn receive(&mut self, message: &Message, is_new: bool) {
        let party = self.party_of(message);
        let line = Line {
            time: local_time(&message.time, "%H:%M"),
            from: printable(&message.from).into_owned(),
            text: printable(&message.text).into_owned(),
            state: if message.id == 0 { State::Sent } else { State::Received },
        };
        let is_read = !is_new || self.selected.as_ref() == Some(&party);
        let conversation = self.conversation(&party);
        conversation.push(line);
        conversation.unread += usize::from(!is_read);
        if self.selected.is_none() && is_new {
            self.select(&party);
        }
    }

    fn sent(&mut self, number: u64, result: Result<(), String>) {
        let time = local_time(&crate::text::now(), "%H:%M");
        let mut lines = self.conversations.iter_mut().flat_map(|conversation| &mut conversation.lines);
        if let Some(line) = lines.find(|line| line.state == State::Waiting(number)) {
            line.state = match result {
                Ok(()) => State::Sent,
                Err(reason) => State::Refused(printable(&reason).into_owned()),
            };
            line.time = time;
        }
    }

    fn take_groups(&mut self, groups: BTreeMap<String, Vec<String>>) {
        let before = std::mem::replace(&mut self.groups, groups);
        for name in before.into_keys().filter(|name| !self.groups.contains_key(name)).collect::<Vec<_>>() {
            self.note_in(&Party { is_group: true, name }, "you are not in this group any more");
        }
        for name in self.groups.keys().cloned().collect::<Vec<_>>() {
            // What was sent to it before it was known to be a group stands there too.
            let as_user = Party { is_group: false, name: name.clone() };
            let as_group = Party { is_group: true, name };
            if let Some(at) = self.conversations.iter().position(|conversation| conversation.party == as_user) {
                let moved = self.conversations.remove(at);
                let group = self.conversation(&as_group);
                group.lines.splice(0..0, moved.lines);
                group.unread += moved.unread;
                if self.selected.as_ref() == Some(&as_user) {
                    self.selected = Some(as_group.clone());
                }
            }
            self.conversation(&as_group);
        }
        if let Some(name) = self.group_wanted.take_if(|name| self.groups.contains_key(name)) {
            self.select(&Party { is_group: true, name });
        }
        if self.selected.is_none()
            && let Some(party) = self.conversations.first().map(|conversation| conversation.party.clone())
        {
            self.select(&party);
        }
    }

    fn list_files(&mut self, files: &BTreeMap<String, Vec<String>>) {
        let wanted = self.files_wanted.take();
        let mut is_any = false;
        for (party, names) in files {
            if wanted.as_ref().is_none_or(|wanted| wanted.name == *party) {
                is_any = true;
                self.note(&format!("files of {party}: {}", names.join(", ")));
            }
        }
        if !is_any {
            let all: Vec<&str> = files.keys().map(String::as_str).collect();
            let elsewhere =
                if all.is_empty() { String::new() } else { format!("; there are some of {}", all.join(", ")) };
            self.note(&format!("there are no files of this conversation{elsewhere}"));
        }
    }

    fn moved(&mut self, Moved { number, step }: Moved) {
        match step {
            Step::Begun { label, bytes } => self.transfers.push(Transfer { number, label, done: 0, bytes }),
            Step::Bytes(done) => {
                if let Some(transfer) = self.transfers.iter_mut().find(|transfer| transfer.number == number) {
                    transfer.done = done;
                }
            }
            Step::Over(text) => {
                self.transfers.retain(|transfer| transfer.number != number);
                self.note(&text);
            }
        }
    }

    /// Those that are shown.
    pub(super) fn transfers_shown(&self) -> &[Transfer] {
        &self.transfers[..self.transfers.len().min(TRANSFERS_SHOWN)]
    }
}

impl Conversation {
    fn push(&mut self, line: Line) {
        self.lines.push(line);
        if self.lines.len() > LINES_MAX {
            self.lines.remove(0);
        }
    }
}

impl Form {
    /// What a key does; an order when both are there.
    fn key(&mut self, key: KeyEvent, event: &Event) -> Option<Order> {
        let is_new = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('r');
        match key.code {
            KeyCode::Tab | KeyCode::BackTab | KeyCode::Up | KeyCode::Down => self.is_at_password = !self.is_at_password,
            KeyCode::Enter if !self.is_at_password => self.is_at_password = true,
            _ if is_new || key.code == KeyCode::Enter => {
                let (user, password) = (self.user.value().to_owned(), self.password.value().to_owned());
                if user.is_empty() || password.is_empty() {
                    self.why = Some("a name and a password, please".to_owned());
                    return None;
                }
                self.is_waiting = true;
                self.why = None;
                return Some(Order::Login { user, password, is_new });
            }
            _ => {
                let input = if self.is_at_password { &mut self.password } else { &mut self.user };
                input.handle_event(event);
            }
        }
        None
    }
}

/// Puts a text where the cursor is, as one line. Says false when it is too long, and puts in as much as there is room for.
fn insert(input: &mut Input, text: &str) -> bool {
    let value = input.value();
    let at = value.char_indices().nth(input.cursor()).map_or(value.len(), |(at, _)| at);
    let (before, after) = value.split_at(at);
    let room = TYPED_BYTES_MAX.saturating_sub(value.len());
    let end = text.char_indices().map(|(at, letter)| at + letter.len_utf8()).take_while(|end| *end <= room).last();
    let taken = &text[..end.unwrap_or(0)];
    let line: String = taken.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    let cursor = input.cursor() + line.chars().count();
    let is_all = taken.len() == text.len();
    *input = Input::new(format!("{before}{line}{after}")).with_cursor(cursor);
    is_all
}

/// A path as a shell would take it.
fn home(path: &str) -> PathBuf {
    let quoted = |quote: char| path.strip_prefix(quote).and_then(|path| path.strip_suffix(quote));
    let unescaped = path.replace("\\ ", " ");
    let path = quoted('\'').or_else(|| quoted('"')).unwrap_or(&unescaped);
    match path.strip_prefix("~/").zip(etcetera::home_dir().ok()) {
        Some((rest, home)) => home.join(rest),
        None => Path::new(path).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> App {
        let mut app = App::new(None);
        let history = vec![message(1, "henderson", "messi", "dulu"), message(2, "henderson", "group1", "semua")];
        app.said(Said::LoggedIn { user: "messi".into(), server: "host:1".into(), history });
        app.said(Said::Groups([("group1".to_owned(), vec!["messi".to_owned(), "henderson".to_owned()])].into()));
        app
    }

    fn message(id: u64, from: &str, to: &str, text: &str) -> Message {
        let time = "2026-01-01T00:00:00.000Z".to_owned();
        Message { id, from: from.into(), to: to.into(), text: text.into(), time }
    }

    fn press(app: &mut App, code: KeyCode) {
        app.terminal(&Event::Key(code.into()));
    }

    fn type_line(app: &mut App, text: &str) {
        text.chars().for_each(|letter| press(app, KeyCode::Char(letter)));
        press(app, KeyCode::Enter);
    }

    fn user(name: &str) -> Party {
        Party { is_group: false, name: name.into() }
    }

    fn group(name: &str) -> Party {
        Party { is_group: true, name: name.into() }
    }

    #[test]
    fn messages_stand_in_the_conversation_that_they_belong_to_and_are_counted_until_they_are_seen() {
        let mut app = app();
        let parties = |app: &App| app.conversations.iter().map(|one| one.party.clone()).collect::<Vec<_>>();
        assert_eq!(parties(&app), [group("group1"), user("henderson")]);
        assert_eq!(app.current().unwrap().party, group("group1"));
        let unread = |app: &App| app.conversations.iter().map(|one| one.unread).collect::<Vec<_>>();
        assert_eq!(unread(&app), [0, 0], "what was there before is not new");
        app.said(Said::Received(vec![
            message(3, "henderson", "messi", "halo"),
            message(4, "lineker", "group1", "hai"),
            message(5, "henderson", "messi", "lagi"),
            message(6, "lineker", "messi", "baru"),
        ]));
        assert_eq!(parties(&app), [group("group1"), user("henderson"), user("lineker")]);
        assert_eq!(unread(&app), [0, 2, 1]);
        press(&mut app, KeyCode::Tab);
        assert_eq!((app.current().unwrap().party.clone(), unread(&app)), (user("henderson"), vec![0, 0, 1]));
        press(&mut app, KeyCode::BackTab);
        press(&mut app, KeyCode::BackTab);
        assert_eq!((app.current().unwrap().party.clone(), unread(&app)), (user("lineker"), vec![0, 0, 0]));
    }

    #[test]
    fn what_is_typed_waits_and_is_sent_or_refused() {
        let mut app = app();
        type_line(&mut app, "halo semua");
        type_line(&mut app, "//etc");
        let orders = app.take_orders();
        let send = |number, text: &str| Order::Send { number, to: group("group1"), text: text.into() };
        assert_eq!(orders, [send(1, "halo semua"), send(2, "/etc")]);
        let states = |app: &App| {
            let lines = app.current().unwrap().lines.iter().skip(1);
            lines.map(|line| format!("{:?}", line.state)).collect::<Vec<_>>()
        };
        assert_eq!(states(&app), ["Waiting(1)", "Waiting(2)"]);
        app.said(Said::Sent { number: 1, result: Ok(()) });
        app.said(Said::Sent { number: 2, result: Err("kotak masuk tujuan penuh".into()) });
        assert_eq!(states(&app), ["Sent", "Refused(\"kotak masuk tujuan penuh\")"]);
    }

    #[test]
    fn what_is_half_typed_stays_with_its_conversation_and_what_was_typed_can_be_called_back() {
        let mut app = app();
        type_line(&mut app, "satu");
        type_line(&mut app, "dua");
        "tig".chars().for_each(|letter| press(&mut app, KeyCode::Char(letter)));
        press(&mut app, KeyCode::Tab);
        assert_eq!(app.input.value(), "");
        press(&mut app, KeyCode::Tab);
        assert_eq!(app.input.value(), "tig");
        press(&mut app, KeyCode::Up);
        assert_eq!(app.input.value(), "dua");
        press(&mut app, KeyCode::Up);
        press(&mut app, KeyCode::Up);
        assert_eq!(app.input.value(), "satu");
        press(&mut app, KeyCode::Down);
        press(&mut app, KeyCode::Down);
        assert_eq!(app.input.value(), "tig", "and so can what was half typed");
    }

    #[test]
    fn commands_are_orders_and_what_is_none_says_so() {
        let mut app = app();
        for (typed, order) in [
            ("/create baru", Order::CreateGroup { group: "baru".into(), secret: None }),
            ("/join lain sandi", Order::JoinGroup { group: "lain".into(), secret: Some("sandi".into()) }),
            ("/add lineker", Order::AddMember { group: "group1".into(), user: "lineker".into() }),
            ("/remove lineker", Order::RemoveMember { group: "group1".into(), user: "lineker".into() }),
            ("/leave", Order::LeaveGroup { group: "group1".into() }),
            ("/files", Order::Files),
            ("/send foto saya.jpg", Order::Move(Move::Send { to: group("group1"), path: "foto saya.jpg".into() })),
            (
                "/get foto.jpg",
                Order::Move(Move::Get { party: "group1".into(), name: "foto.jpg".into(), directory: ".".into() }),
            ),
            ("/logout", Order::Logout),
        ] {
            type_line(&mut app, typed);
            assert_eq!(app.take_orders(), [order], "{typed}");
        }
        let last = |app: &App| app.current().unwrap().lines.last().unwrap().text.clone();
        type_line(&mut app, "/members");
        assert_eq!(last(&app), "members: messi, henderson");
        type_line(&mut app, "/groups");
        assert_eq!(last(&app), "group1: messi, henderson");
        for (wrong, said) in [
            ("/create", "/create NAME [SECRET]: make a group"),
            ("/apa", "/apa: no such command; see /help"),
            ("/get", "/get NAME: get one of them, into this directory"),
            ("/remove a b", "/add USER, /remove USER: who is in this group, if it is yours"),
        ] {
            type_line(&mut app, wrong);
            assert_eq!(last(&app), said);
        }
        type_line(&mut app, "/to pele");
        assert_eq!(app.current().unwrap().party, user("pele"));
        type_line(&mut app, "/leave");
        assert!(last(&app).contains("no group"));
        assert!(app.take_orders().is_empty());
        type_line(&mut app, "/help");
        assert!(app.is_help);
        // What is typed then is typed, and Enter only closes it.
        press(&mut app, KeyCode::Char('/'));
        assert!(!app.is_help && app.input.value() == "/");
        app.is_help = true;
        press(&mut app, KeyCode::Enter);
        assert!(!app.is_help && app.input.value() == "/");
        press(&mut app, KeyCode::Esc);
        type_line(&mut app, "/quit");
        assert!(app.is_over());
    }

    #[test]
    fn a_login_form_takes_both_and_shows_what_the_server_said() {
        let mut app = App::new(Some("messi".into()));
        app.said(Said::LoginNeeded { user: Some("messi".into()), server: "host:1".into(), why: None });
        type_line(&mut app, "surabaya");
        let login = Order::Login { user: "messi".into(), password: "surabaya".into(), is_new: false };
        assert_eq!(app.take_orders(), [login]);
        app.said(Said::LoginNeeded {
            user: Some("messi".into()),
            server: "host:1".into(),
            why: Some("username atau password salah".into()),
        });
        let Screen::Login(form) = &app.screen else { panic!("no form") };
        assert_eq!(form.why.as_deref(), Some("username atau password salah"));
        assert!(form.password.value().is_empty() && !form.is_waiting);
    }

    #[test]
    fn a_paste_is_one_line_and_control_characters_of_others_do_nothing() {
        let mut app = app();
        app.terminal(&Event::Paste("satu\ndua\t\u{1b}[2J".into()));
        assert_eq!(app.input.value(), "satu dua  [2J");
        press(&mut app, KeyCode::Home);
        app.terminal(&Event::Paste("é漢 ".into()));
        press(&mut app, KeyCode::Char('x'));
        assert_eq!(app.input.value(), "é漢 xsatu dua  [2J");
        press(&mut app, KeyCode::Esc);
        app.terminal(&Event::Paste("漢".repeat(100_000)));
        assert_eq!(app.input.value().len(), 7998);
        for _ in 0..10 {
            press(&mut app, KeyCode::Char('x'));
        }
        assert_eq!(app.input.value().len(), TYPED_BYTES_MAX);
        press(&mut app, KeyCode::Esc);
        app.said(Said::Received(vec![message(9, "lineker", "group1", "\u{1b}[2Jhai")]));
        assert_eq!(app.current().unwrap().lines.last().unwrap().text, "\u{fffd}[2Jhai");
    }

    #[test]
    fn what_waits_is_shown_once_though_its_login_has_ended_meanwhile() {
        let mut app = app();
        type_line(&mut app, "satu");
        type_line(&mut app, "satu");
        app.said(Said::LoginNeeded { user: Some("messi".into()), server: "host:1".into(), why: None });
        app.said(Said::LoggedIn { user: "messi".into(), server: "host:1".into(), history: Vec::new() });
        for number in [u64::MAX - 1, u64::MAX - 2, u64::MAX - 3] {
            app.said(Said::Waiting { number, to: group("group1"), text: "satu".into() });
        }
        let waiting = |app: &App| {
            let lines = app.current().unwrap().lines.iter();
            lines.filter(|line| matches!(line.state, State::Waiting(_))).count()
        };
        assert_eq!(waiting(&app), 3, "two that were there, and one that was not");
        for number in [u64::MAX - 1, u64::MAX - 2, u64::MAX - 3] {
            app.said(Said::Sent { number, result: Ok(()) });
        }
        assert_eq!(waiting(&app), 0);
    }

    #[test]
    fn a_file_on_its_way_is_not_given_up_at_once() {
        let mut app = app();
        let begun = Step::Begun { label: "foto.jpg to henderson".into(), bytes: Some(9) };
        app.said(Said::Moved(Moved { number: 1, step: begun }));
        type_line(&mut app, "/quit");
        assert!(!app.is_over());
        app.terminal(&Event::Key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        assert!(app.is_over());
    }

    #[test]
    fn without_a_conversation_nothing_is_sent_and_a_group_that_is_joined_is_shown() {
        let mut app = App::new(None);
        app.said(Said::LoggedIn { user: "pele".into(), server: "host:1".into(), history: Vec::new() });
        app.said(Said::Groups(BTreeMap::new()));
        type_line(&mut app, "halo?");
        assert!(app.take_orders().is_empty() && app.current().is_none());
        assert!(app.notes.last().unwrap().text.contains("/to NAME"));
        assert_eq!(app.input.value(), "halo?", "what was typed is still there");
        press(&mut app, KeyCode::Esc);
        type_line(&mut app, "/join tim");
        app.take_orders();
        app.said(Said::Groups([("lain".to_owned(), vec![]), ("tim".to_owned(), vec![])].into()));
        assert_eq!(app.current().unwrap().party, group("tim"));
        app.said(Said::Groups([("lain".to_owned(), vec![])].into()));
        assert!(app.current().unwrap().lines.last().unwrap().text.contains("not in this group"));
        app.said(Said::FileCame { party: "messi".into(), name: "foto.jpg".into() });
        press(&mut app, KeyCode::Tab);
        assert!(app.current().unwrap().lines.last().unwrap().text.contains("/get foto.jpg"));
    }

    #[test]
    fn what_was_sent_to_a_group_before_it_was_known_to_be_one_is_found_there() {
        let mut app = App::new(None);
        let history = vec![message(0, "messi", "tim", "halo tim"), message(0, "messi", "pele", "halo pele")];
        app.said(Said::LoggedIn { user: "messi".into(), server: "host:1".into(), history });
        app.said(Said::Groups([("tim".to_owned(), vec!["messi".to_owned()])].into()));
        let texts = |party: Party| {
            let found = app.conversations.iter().find(|one| one.party == party);
            found.map(|one| one.lines.iter().map(|line| line.text.clone()).collect::<Vec<_>>())
        };
        assert_eq!(texts(group("tim")), Some(vec!["halo tim".to_owned()]));
        assert_eq!(texts(user("tim")), None);
        assert_eq!(texts(user("pele")), Some(vec!["halo pele".to_owned()]));
    }
}
