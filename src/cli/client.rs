//! The commands of the client: a request each, for a shell.
//!
//! What the server refuses is said on standard error in its own words. What is received goes into the history before it is
//! printed.

use std::collections::HashSet;
use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::progress::Progress;
use super::{EXIT_FAILED, EXIT_USAGE, PasswordSource, fail, password_from_input};
use crate::chat;
use crate::client::history::History;
use crate::client::profile::{Login, Profiles, state_directory};
use crate::client::transfer::{Interruptible, open};
use crate::client::{Client, ClientError, Message, Target};
use crate::text::{as_file_name, local_time, printable};

const SERVER_DEFAULT: &str = "127.0.0.1:8889";
/// There is no server, or not for long enough.
const EXIT_NO_CONNECTION: u8 = 3;
/// As shells say it of a program that was interrupted.
const EXIT_INTERRUPTED: u8 = 130;
/// How often `inbox --follow` asks.
const POLL: Duration = Duration::from_secs(1);
/// The longest pause before it connects again.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What a user does on a server.
#[derive(Debug, Subcommand)]
pub(super) enum ClientCommand {
    /// Chat in the terminal: a full screen with conversations, groups and files
    Chat {
        #[command(flatten)]
        server: ServerArgument,
        #[command(flatten)]
        profile: ProfileArgument,
        /// Log in as this user [default: whoever has logged in last]
        #[arg(long, env = "KURIR_USER", value_name = "NAME")]
        user: Option<String>,
    },
    /// Log in; the commands below are this user's from then on
    Login(LoginArguments),
    /// Make an account, where the server lets strangers do so, and log in
    Register(LoginArguments),
    /// End the login
    Logout {
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Change the password, which ends all other logins
    Passwd {
        /// Read the old and the new one as two lines of standard input
        #[arg(long)]
        password_stdin: bool,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Send a message
    #[command(override_usage = "kurir send USER TEXT...\n       kurir send --group GROUP TEXT...")]
    Send {
        /// Send it to a group, to all members but oneself
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
        /// The user, and what to say; `-` sends each line of standard input
        #[arg(required = true, value_name = "USER TEXT")]
        words: Vec<String>,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Print the messages that wait; the server gives each once, and a copy goes into the history
    Inbox {
        /// As JSON, an object a line
        #[arg(long)]
        json: bool,
        /// Go on with what comes, until interrupted
        #[arg(long)]
        follow: bool,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Print what was received and sent before, as far as it is kept here
    History {
        /// As JSON, an object a line
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Send files; a blank in a name is sent as `_`
    #[command(override_usage = "kurir send-file USER PATH...\n       kurir send-file --group GROUP PATH...")]
    SendFile {
        /// Send them to a group
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
        /// The user, and the files
        #[arg(required = true, value_name = "USER PATH")]
        words: Vec<String>,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// List the files that there are to get, received and sent, by the other party
    Files {
        /// As one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Get a file, by the names that `files` lists
    Get {
        /// Who sent it, or whom it was sent to
        party: String,
        /// The file
        name: String,
        /// Where to put it; `-` is standard output [default: its name, here]
        #[arg(short, long, value_name = "PATH")]
        output: Option<PathBuf>,
        /// Replace what is there
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Take a file off one's own list
    DeleteFile {
        /// Who sent it, or whom it was sent to
        party: String,
        /// The file
        name: String,
        #[command(flatten)]
        profile: ProfileArgument,
    },
}

/// What a user does with groups.
#[derive(Debug, Subcommand)]
pub(super) enum MemberCommand {
    /// Make a group, which belongs to whoever makes it
    Create {
        /// 1 to 32 letters, digits, dots, underscores and hyphens
        group: String,
        #[command(flatten)]
        secret: SecretSource,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Join a group
    Join {
        /// The group
        group: String,
        #[command(flatten)]
        secret: SecretSource,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Leave a group; the last to leave ends it
    Leave {
        /// The group
        group: String,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Add a member to one's own group
    Add {
        /// The group
        group: String,
        /// The user
        user: String,
        #[command(flatten)]
        profile: ProfileArgument,
    },
    /// Take a member out of one's own group
    Remove {
        /// The group
        group: String,
        /// The user
        user: String,
        #[command(flatten)]
        profile: ProfileArgument,
    },
}

#[derive(Args, Debug)]
pub(super) struct ServerArgument {
    /// Where the server is [default: 127.0.0.1:8889, or where the last login was]
    #[arg(long, env = "KURIR_SERVER", value_name = "HOST:PORT")]
    server: Option<String>,
}

#[derive(Args, Debug)]
pub(super) struct ProfileArgument {
    /// Which of several logins
    #[arg(long, env = "KURIR_PROFILE", value_name = "NAME", default_value = "default")]
    profile: String,
}

/// Who logs in, and where.
#[derive(Args, Debug)]
pub(super) struct LoginArguments {
    /// The user: 1 to 32 letters, digits, dots, underscores and hyphens
    user: String,
    #[command(flatten)]
    password: PasswordSource,
    #[command(flatten)]
    server: ServerArgument,
    #[command(flatten)]
    profile: ProfileArgument,
}

#[derive(Args, Debug)]
pub(super) struct SecretSource {
    /// The group has a secret, which is asked for
    #[arg(long)]
    secret: bool,
    /// The same, from the first line of standard input
    #[arg(long, conflicts_with = "secret")]
    secret_stdin: bool,
}

/// Why a command did not do what it should.
enum Failure {
    Client(ClientError),
    /// The arguments or the surroundings are wrong.
    Usage(String),
    /// Standard output is gone.
    Output(io::Error),
    Interrupted,
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

type Done = Result<(), Failure>;

/// A login that is there, and a connection to its server.
struct Session {
    client: Client<std::net::TcpStream>,
    login: Login,
    state: PathBuf,
}

/// Runs a command of the client.
pub(super) fn run(command: ClientCommand) -> ExitCode {
    let done = match command {
        ClientCommand::Chat { server, profile, user } => return chat(server, profile, user),
        ClientCommand::Login(login) => log_in(login, false),
        ClientCommand::Register(login) => log_in(login, true),
        ClientCommand::Logout { profile } => log_out(&profile),
        ClientCommand::Passwd { password_stdin, profile } => change_password(password_stdin, &profile),
        ClientCommand::Send { group, words, profile } => send(group.as_deref(), &words, &profile),
        ClientCommand::Inbox { json, follow, profile } => inbox(json, follow, &profile),
        ClientCommand::History { json, profile } => print_history(json, &profile),
        ClientCommand::SendFile { group, words, profile } => send_files(group.as_deref(), &words, &profile),
        ClientCommand::Files { json, profile } => files(json, &profile),
        ClientCommand::Get { party, name, output, force, profile } => get(&party, &name, output, force, &profile),
        ClientCommand::DeleteFile { party, name, profile } => {
            session(&profile).and_then(|mut session| Ok(session.client.delete_file(&party, &name)?))
        }
    };
    exit_code(done)
}

/// Runs one that is about groups.
pub(super) fn run_member(command: &MemberCommand) -> ExitCode {
    exit_code(match command {
        MemberCommand::Create { group, secret, profile } => {
            with_secret(secret, profile, |client, secret| client.create_group(group, secret))
        }
        MemberCommand::Join { group, secret, profile } => {
            with_secret(secret, profile, |client, secret| client.join_group(group, secret))
        }
        MemberCommand::Leave { group, profile } => with_client(profile, |client| client.leave_group(group)),
        MemberCommand::Add { group, user, profile } => with_client(profile, |client| client.add_member(group, user)),
        MemberCommand::Remove { group, user, profile } => {
            with_client(profile, |client| client.remove_member(group, user))
        }
    })
}

/// Lists the groups of the user.
pub(super) fn list_groups(profile: &ProfileArgument) -> ExitCode {
    exit_code(session(profile).and_then(|mut session| {
        let groups = session.client.groups()?;
        let mut out = io::stdout().lock();
        let mut print = |(name, members): (String, Vec<String>)| writeln!(out, "{name}: {}", members.join(", "));
        groups.into_iter().try_for_each(&mut print).map_err(Failure::Output)
    }))
}

fn exit_code(done: Done) -> ExitCode {
    let (code, text) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Err(Failure::Output(error)) => (EXIT_USAGE, format!("the output cannot be written: {error}")),
        Err(Failure::Usage(text)) => (EXIT_USAGE, text),
        Err(Failure::Interrupted) => return ExitCode::from(EXIT_INTERRUPTED),
        Err(Failure::Client(error)) => match error {
            ClientError::Refused(text) if text == "token tidak valid" => {
                (EXIT_FAILED, format!("{text}: the login has ended; see `kurir login`"))
            }
            ClientError::Refused(text) => (EXIT_FAILED, printable(&text).into_owned()),
            ClientError::Invalid(_) | ClientError::File(_) => (EXIT_USAGE, error.to_string()),
            ClientError::Io(_) | ClientError::NotAReply => (EXIT_NO_CONNECTION, error.to_string()),
        },
    };
    fail(code, &text)
}

fn usage(error: impl Display) -> Failure {
    Failure::Usage(error.to_string())
}

fn state() -> Result<PathBuf, Failure> {
    state_directory().map_err(usage)
}

fn connect(server: &str) -> Result<Client<std::net::TcpStream>, Failure> {
    Client::connect(server).map_err(|error| match error {
        ClientError::Io(error) if error.kind() == io::ErrorKind::InvalidInput => {
            usage(format!("{server} is no server: it takes a host and a port, as in 127.0.0.1:8889"))
        }
        ClientError::Io(error) => {
            let error = io::Error::new(error.kind(), format!("no connection to {server}: {error}"));
            Failure::Client(ClientError::Io(error))
        }
        error => error.into(),
    })
}

/// The login of a profile, and a connection.
fn session(profile: &ProfileArgument) -> Result<Session, Failure> {
    let state = state()?;
    let login = Profiles::new(&state).load(&profile.profile).map_err(usage)?;
    let login = login.ok_or_else(|| usage("nobody is logged in; see `kurir login`"))?;
    let mut client = connect(&login.server)?;
    client.set_token(&login.token);
    Ok(Session { client, login, state })
}

fn with_client(
    profile: &ProfileArgument,
    work: impl FnOnce(&mut Client<std::net::TcpStream>) -> Result<(), ClientError>,
) -> Done {
    Ok(work(&mut session(profile)?.client)?)
}

fn with_secret(
    source: &SecretSource,
    profile: &ProfileArgument,
    work: impl FnOnce(&mut Client<std::net::TcpStream>, Option<&str>) -> Result<(), ClientError>,
) -> Done {
    let secret = match source {
        SecretSource { secret: true, .. } => Some(ask("Secret of the group: ").map_err(usage)?),
        SecretSource { secret_stdin: true, .. } => Some(password_from_input().map_err(usage)?),
        _ => None,
    };
    with_client(profile, |client| work(client, secret.as_deref()))
}

fn ask(prompt: &str) -> io::Result<String> {
    if !io::stdin().is_terminal() {
        return Err(io::Error::other("there is no terminal to ask on; see --help for how to give it otherwise"));
    }
    rpassword::prompt_password(prompt)
}

fn log_in(LoginArguments { user, password, server, profile }: LoginArguments, is_new: bool) -> Done {
    let state = state()?;
    let profiles = Profiles::new(&state);
    let before = profiles.load(&profile.profile).map_err(usage)?;
    let server = server.server.or(before.map(|login| login.server)).unwrap_or_else(|| SERVER_DEFAULT.to_owned());
    let mut client = connect(&server)?;
    let password = match password {
        PasswordSource { password_stdin: true } => password_from_input(),
        PasswordSource { .. } if is_new => super::password_from_person(&user),
        PasswordSource { .. } => ask(&format!("Password for {user}: ")),
    };
    let password = password.map_err(usage)?;
    if is_new {
        client.register(&user, &password)?;
    }
    client.login(&user, &password)?;
    let login = Login { server, user, token: client.token().to_owned() };
    profiles.save(&profile.profile, &login).map_err(|error| usage(format!("the login cannot be kept: {error}")))
}

fn log_out(profile: &ProfileArgument) -> Done {
    let mut session = session(profile)?;
    match session.client.logout() {
        // It had ended already.
        Ok(()) | Err(ClientError::Refused(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Profiles::new(&session.state).forget(&profile.profile).map_err(usage)
}

fn change_password(password_stdin: bool, profile: &ProfileArgument) -> Done {
    let mut session = session(profile)?;
    let user = &session.login.user;
    let both = if password_stdin {
        password_from_input().and_then(|old| Ok((old, password_from_input()?)))
    } else {
        ask(&format!("Old password for {user}: "))
            .and_then(|old| Ok((old, super::password_from_person(&format!("{user} (new)"))?)))
    };
    let (old, new) = both.map_err(usage)?;
    Ok(session.client.change_password(&old, &new)?)
}

/// The first word is a user, unless there is a group.
fn target<'w>(group: Option<&'w str>, words: &'w [String]) -> Result<(Target<'w>, &'w [String]), Failure> {
    let (target, rest) = match (group, words) {
        (Some(group), rest) => (Target::Group(group), rest),
        (None, [user, rest @ ..]) => (Target::User(user), rest),
        (None, []) => return Err(usage("to whom?")),
    };
    if rest.is_empty() { Err(usage("there is nothing to send (see --help)")) } else { Ok((target, rest)) }
}

fn send(group: Option<&str>, words: &[String], profile: &ProfileArgument) -> Done {
    let (to, text) = target(group, words)?;
    let Session { mut client, login, state } = session(profile)?;
    let mut history = history(&state, &login)?;
    let mut send = |text: &str| -> Done {
        client.send_message(to, text)?;
        let (Target::User(name) | Target::Group(name)) = to;
        // It is sent, whatever becomes of the copy.
        if let Err(error) = history.sent(&login.user, name, text) {
            note(&format!("the history cannot be written: {error}"));
        }
        Ok(())
    };
    if text != ["-"] {
        return send(&text.join(" "));
    }
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| usage(format!("standard input: {error}")))?;
        if !line.trim().is_empty() {
            send(line.trim_end_matches('\r'))?;
        }
    }
    Ok(())
}

fn history(state: &Path, login: &Login) -> Result<History, Failure> {
    let opened = History::open(state, &login.server, &login.user);
    opened.map(|(history, _)| history).map_err(|error| usage(format!("the history cannot be opened: {error}")))
}

fn print_history(as_json: bool, profile: &ProfileArgument) -> Done {
    let state = state()?;
    let login = Profiles::new(&state).load(&profile.profile).map_err(usage)?;
    let login = login.ok_or_else(|| usage("nobody is logged in; see `kurir login`"))?;
    let (_, messages) = History::open(&state, &login.server, &login.user).map_err(usage)?;
    let mut out = io::stdout().lock();
    messages.iter().try_for_each(|message| print(&mut out, message, as_json)).map_err(Failure::Output)
}

fn inbox(as_json: bool, follow: bool, profile: &ProfileArgument) -> Done {
    let Session { mut client, login, state } = session(profile)?;
    let mut history = history(&state, &login)?;
    let mut pause = POLL;
    let mut is_lost = false;
    loop {
        match receive(&mut client, &mut history, as_json) {
            Ok(()) if !follow => return Ok(()),
            Ok(()) => {
                pause = POLL;
                if std::mem::take(&mut is_lost) {
                    note("connected again");
                }
            }
            Err(Failure::Client(ClientError::Io(error))) if follow => {
                if !std::mem::replace(&mut is_lost, true) {
                    note(&format!("{}; trying again", ClientError::Io(error)));
                }
                thread::sleep(pause);
                pause = (pause * 2).min(PAUSE_MAX);
                if let Ok(again) = connect(&login.server) {
                    client = again;
                    client.set_token(&login.token);
                }
                continue;
            }
            // It will not be busy for ever.
            Err(Failure::Client(ClientError::Refused(text))) if follow && text.starts_with("server") => {}
            Err(failure) => return Err(failure),
        }
        thread::sleep(POLL);
    }
}

/// Prints what waits: the server gives a part of it at a time.
fn receive(client: &mut Client<std::net::TcpStream>, history: &mut History, as_json: bool) -> Done {
    loop {
        let messages = client.inbox()?;
        if messages.is_empty() {
            return Ok(());
        }
        let kept = history.receive(messages);
        let messages = kept.map_err(|error| usage(format!("the history cannot be written: {error}")))?;
        let mut out = io::stdout().lock();
        for message in &messages {
            print(&mut out, message, as_json).map_err(Failure::Output)?;
        }
        out.flush().map_err(Failure::Output)?;
    }
}

fn print(out: &mut impl Write, message: &Message, as_json: bool) -> io::Result<()> {
    let Message { id, from, to, text, time } = message;
    if as_json {
        return writeln!(out, "{}", json!({ "id": id, "from": from, "to": to, "text": text, "time": time }));
    }
    writeln!(out, "{} {from} > {to}: {}", local_time(time, "%Y-%m-%d %H:%M"), printable(text))
}

fn send_files(group: Option<&str>, words: &[String], profile: &ProfileArgument) -> Done {
    let (to, paths) = target(group, words)?;
    // Two of one name would replace each other.
    let mut names = HashSet::new();
    for path in paths {
        let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !names.insert(as_file_name(&name)) {
            return Err(usage(format!(
                "{path} would replace another of these files, since both are sent under one name"
            )));
        }
    }
    let mut session = session(profile)?;
    for path in paths {
        let path = Path::new(path);
        let failed = |error: io::Error| usage(format!("{}: {error}", path.display()));
        let (mut file, bytes) = open(path).map_err(failed)?;
        let name = path.file_name().unwrap_or_default();
        let sent_as = name.to_str().map(as_file_name).ok_or_else(|| usage("the name of a file must be UTF-8"))?;
        if name != &*sent_as {
            note(&format!("{} is sent as {sent_as}", path.display()));
        }
        let progress = Progress::new(&sent_as, Some(bytes));
        let sent = session.client.send_file(to, &sent_as, &mut file, &mut |bytes| progress.set(bytes));
        progress.end();
        match sent {
            Err(ClientError::File(error)) => return Err(failed(error)),
            sent => sent?,
        }
    }
    Ok(())
}

fn files(as_json: bool, profile: &ProfileArgument) -> Done {
    let files = session(profile)?.client.files()?;
    let mut out = io::stdout().lock();
    if as_json {
        return writeln!(out, "{}", json!(files)).map_err(Failure::Output);
    }
    for (party, names) in files {
        for name in names {
            writeln!(out, "{party} {}", printable(&name)).map_err(Failure::Output)?;
        }
    }
    Ok(())
}

fn get(party: &str, name: &str, output: Option<PathBuf>, force: bool, profile: &ProfileArgument) -> Done {
    let mut session = session(profile)?;
    let progress = Progress::new(name, None);
    let is_interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The first lets the half of a file be removed, the second waits for nothing.
        let code = i32::from(EXIT_INTERRUPTED);
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&is_interrupted)).map_err(usage)?;
        signal_hook::flag::register(signal, Arc::clone(&is_interrupted)).map_err(usage)?;
    }
    let mut get = |into: &mut dyn Write| -> Done {
        let mut into = Interruptible::new(into, &is_interrupted);
        let got = session.client.download(party, name, &mut into, &mut |bytes| progress.set(bytes));
        progress.end();
        match got {
            Err(_) if is_interrupted.load(Ordering::SeqCst) => Err(Failure::Interrupted),
            // Whoever reads the output may have enough of it.
            Err(ClientError::File(error)) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
            got => Ok(got.map(drop)?),
        }
    };
    match output {
        Some(path) if path == Path::new("-") => get(&mut io::stdout().lock()),
        output => {
            let path = output.unwrap_or_else(|| PathBuf::from(name));
            let is_directory = path.is_dir();
            let path = if is_directory { path.join(name) } else { path };
            save_as(&path, force, get)
        }
    }
}

/// Writes a file beside its place, and puts it there when it is whole.
fn save_as(path: &Path, force: bool, write: impl FnOnce(&mut dyn Write) -> Done) -> Done {
    let failed = |error: &dyn Display| usage(format!("{}: {error}", path.display()));
    if !force && path.symlink_metadata().is_ok() {
        return Err(failed(&"it is there already (see --force)"));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".kurir-")
        .suffix(".part")
        .tempfile_in(directory)
        .map_err(|error| failed(&io::Error::from(error.kind())))?;
    write(&mut file)?;
    let placed = if force { file.persist(path) } else { file.persist_noclobber(path) };
    placed.map(drop).map_err(|error| failed(&error.error))
}

fn chat(server: ServerArgument, profile: ProfileArgument, user: Option<String>) -> ExitCode {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return fail(EXIT_USAGE, &"chat needs a terminal; in scripts use `kurir send` and `kurir inbox`");
    }
    let state = match state_directory() {
        Ok(state) => state,
        Err(error) => return fail(EXIT_USAGE, &error),
    };
    let options = chat::Options {
        state,
        profile: profile.profile,
        server: server.server,
        server_default: SERVER_DEFAULT.to_owned(),
        user,
    };
    match chat::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EXIT_USAGE, &error),
    }
}

/// Says something beside the output.
fn note(text: &str) {
    let (Ok(()) | Err(_)) = writeln!(io::stderr(), "kurir: {text}");
}
