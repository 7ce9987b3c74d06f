//! The command line: arguments, what is printed, and exit codes.
//!
//! Here is what has to do with a server's own data; in `client` what a user does on a server, with `progress` for what takes
//! long.

mod client;
mod progress;

use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use rustix::fs::Mode;
use rustix::process::umask;
use serde_json::Value;
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};

use crate::admin::{self, AdminError};
use crate::backup::{self, BackupError};
use crate::bench::{self, BenchError};
use crate::check;
use crate::engine::Registration;
use crate::limits::Limits;
use crate::log::Sync;
use crate::net::{self, Server, ServerOptions};

const DATA_DEFAULT: &str = "./kurir-data";
const DATA_DEMO: &str = "./kurir-demo";
const LISTEN_DEFAULT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8889);
/// How long the end of the program waits for what it has left to say.
const PATIENCE: Duration = Duration::from_secs(1);

/// It was done, and failed.
const EXIT_FAILED: u8 = 1;
/// It was not begun: the arguments or the surroundings are wrong.
const EXIT_USAGE: u8 = 2;

/// A message and file server for one host: a line in, JSON out, and what it says OK to is on the disk.
#[derive(Debug, Parser)]
#[command(name = "kurir", version, arg_required_else_help = true, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<Serve>),
    /// Add, list and remove accounts, and set their passwords, whether the server runs or not
    #[command(subcommand)]
    User(UserCommand),
    /// Check a data directory that no server holds: is all of it whole, and what is in it (exit code 1 if it is not)
    Check {
        /// The data directory
        #[arg(env = "KURIR_DATA", value_name = "DIR", default_value = DATA_DEFAULT)]
        data: PathBuf,
        /// Keep all that is good of a damaged journal, checkpoint or stored file, and put what is damaged aside
        #[arg(long)]
        repair: bool,
    },
    /// Copy a data directory as it is at one moment, whether the server runs or not
    Backup {
        /// The data directory
        #[arg(env = "KURIR_DATA", value_name = "DIR", default_value = DATA_DEFAULT)]
        data: PathBuf,
        /// Where the copy goes; it must not be there yet. On the same file system, what never changes is linked
        #[arg(long, value_name = "COPY")]
        to: PathBuf,
    },
    #[command(flatten)]
    Client(client::ClientCommand),
    /// Make, join and leave groups, and say who is in them
    #[command(subcommand)]
    Group(GroupCommand),
    /// Measure how many requests a second a server answers, and how fast
    Bench(Box<bench::Options>),
    /// Print a script that completes these commands in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages
    Man {
        /// Into this directory, which must be there
        directory: PathBuf,
    },
}

/// Run the server
///
/// To try it, with the accounts messi, henderson and lineker (password surabaya) and the group group1:
///
///   kurir serve --demo
///
/// To run it, with accounts that you add by `kurir user add`:
///
///   kurir serve --data /var/lib/kurir --listen 0.0.0.0:8889 --listen '[::]:8889'
///
/// It stops on SIGTERM and SIGINT: what it has received is answered first. A second signal stops it at once.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
struct Serve {
    /// Where to listen; may be given several times [default: 127.0.0.1:8889]
    #[arg(long, env = "KURIR_LISTEN", value_name = "ADDR:PORT", value_delimiter = ',', value_parser = address)]
    listen: Vec<SocketAddr>,

    /// Where everything is kept; made if it is missing [default: ./kurir-data, or ./kurir-demo with --demo]
    #[arg(long, env = "KURIR_DATA", value_name = "DIR")]
    data: Option<PathBuf>,

    /// Make the demonstration accounts, open registration, and listen on this machine only
    #[arg(long, env = "KURIR_DEMO", value_parser = clap::builder::BoolishValueParser::new())]
    demo: bool,

    /// Whether strangers may make accounts with REGISTER [default: closed, or open with --demo]
    #[arg(long, env = "KURIR_REGISTRATION", value_name = "STATE")]
    registration: Option<Registration>,

    /// What to log
    #[arg(long, env = "KURIR_LOG", value_name = "LEVEL", default_value = "info")]
    log: Level,

    /// How to log it, on standard error
    #[arg(long, env = "KURIR_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,

    /// When OK is said: once it is on the disk, or once the kernel has it, which syncs it about once a second
    #[arg(long, env = "KURIR_SYNC", value_name = "WHEN", default_value = "always")]
    sync: SyncWhen,

    #[command(flatten)]
    limits: Limits,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SyncWhen {
    Always,
    Interval,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Args, Debug)]
struct Data {
    /// The server's data directory
    #[arg(long, env = "KURIR_DATA", value_name = "DIR", default_value = DATA_DEFAULT)]
    data: PathBuf,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Add an account; its password is asked for
    Add {
        /// 1 to 32 letters, digits, dots, underscores and hyphens
        name: String,
        #[command(flatten)]
        password: PasswordSource,
        #[command(flatten)]
        data: Data,
    },
    /// List all accounts
    List {
        #[command(flatten)]
        data: Data,
    },
    /// Give an account a new password, which is asked for, and end all its logins
    Password {
        /// The account
        name: String,
        #[command(flatten)]
        password: PasswordSource,
        #[command(flatten)]
        data: Data,
    },
    /// Remove an account with its mailbox, its file list and its logins
    Remove {
        /// The account
        name: String,
        #[command(flatten)]
        data: Data,
    },
}

#[derive(Debug, Subcommand)]
enum GroupCommand {
    #[command(flatten)]
    Member(client::MemberCommand),
    /// List one's groups with their members, the owner first
    List {
        /// List all groups of this server, as its administrator, whether it runs or not
        #[arg(long, env = "KURIR_DATA", value_name = "DIR")]
        data: Option<PathBuf>,
        #[command(flatten)]
        profile: client::ProfileArgument,
    },
}

#[derive(Args, Debug)]
struct PasswordSource {
    /// Read the password from the first line of standard input
    #[arg(long)]
    password_stdin: bool,
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    // Whatever this program makes is for its owner alone.
    umask(Mode::RWXG | Mode::RWXO);
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let (Ok(()) | Err(_)) = error.print();
            return ExitCode::from(EXIT_USAGE);
        }
        Err(error) if error.use_stderr() => return fail(EXIT_USAGE, &in_one_line(&error)),
        Err(help) => return print_help(&help),
    };
    match arguments.command {
        Command::Serve(arguments) => serve(*arguments),
        Command::User(command) => user(&command),
        Command::Check { data, repair } => check(&data, repair),
        Command::Backup { data, to } => backup(&data, &to),
        Command::Client(command) => client::run(command),
        Command::Group(GroupCommand::Member(command)) => client::run_member(&command),
        Command::Group(GroupCommand::List { data: Some(data), .. }) => {
            administer(&Data { data }, "GROUP LIST", false, print_groups)
        }
        Command::Group(GroupCommand::List { data: None, profile }) => client::list_groups(&profile),
        Command::Bench(options) => match bench::run(*options) {
            Ok(report) if report.is_json() => printed(writeln!(io::stdout(), "{}", report.json())),
            Ok(report) => printed(writeln!(io::stdout(), "{report}")),
            Err(error @ BenchError::Options(_)) => fail(EXIT_USAGE, &error),
            Err(error) => fail(EXIT_FAILED, &error),
        },
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "kurir", &mut script);
            printed(io::stdout().write_all(&script))
        }
        Command::Man { directory } => match clap_mangen::generate_to(Arguments::command(), &directory) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(EXIT_USAGE, &format!("{}: {error}", directory.display())),
        },
    }
}

/// Whoever reads the output may have enough of it.
fn printed(done: io::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(EXIT_FAILED, &error),
    }
}

/// What is wrong, without the usage that stands below it.
fn in_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = first.split_whitespace().collect();
    let words = words.join(" ");
    format!("{} (see kurir --help)", words.strip_prefix("error: ").unwrap_or(&words))
}

fn print_help(help: &clap::Error) -> ExitCode {
    printed(help.print())
}

fn serve(arguments: Serve) -> ExitCode {
    let log = start_log(arguments.log, arguments.log_format);
    let code = serve_logged(arguments);
    // The last lines are written when this is dropped.
    with_patience(move || drop(log));
    code
}

fn serve_logged(arguments: Serve) -> ExitCode {
    let options = match server_options(arguments) {
        Ok(options) => options,
        Err(text) => return fail(EXIT_USAGE, &text),
    };
    let result = Server::start(options).and_then(|server| {
        let addresses = server.addresses().map_err(|error| net::ServerError::Setup("ask where it listens", error))?;
        let lines: String = addresses.iter().map(|address| format!("listening on {address}\n")).collect();
        // Whoever started it may not care to read this.
        if let Err(error) = io::stdout().write_all(lines.as_bytes()) {
            tracing::debug!(%error, "standard output is closed");
        }
        server.run()
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_before_start() => fail(EXIT_USAGE, &error),
        Err(error) => fail(EXIT_FAILED, &error),
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "it takes an address and a port, as in 127.0.0.1:8889 or [::1]:8889".to_owned())
}

/// What the arguments mean together.
fn server_options(arguments: Serve) -> Result<ServerOptions, String> {
    let Serve { mut listen, data, demo, registration, limits, sync, .. } = arguments;
    limits.check()?;
    if listen.is_empty() {
        listen.push(LISTEN_DEFAULT);
    }
    if demo && let Some(address) = listen.iter().find(|address| !net::is_loopback(address.ip())) {
        return Err(format!("--demo has a password that everybody knows, so it does not listen on {address}"));
    }
    let registration = registration.unwrap_or(if demo { Registration::Open } else { Registration::Closed });
    let data = data.unwrap_or_else(|| PathBuf::from(if demo { DATA_DEMO } else { DATA_DEFAULT }));
    let sync = match sync {
        SyncWhen::Always => Sync::Always,
        SyncWhen::Interval => Sync::Interval,
    };
    Ok(ServerOptions { listen, data, registration, limits, is_demo: demo, sync })
}

/// Lines are written by a thread of their own, so that standard error can be full, slow or gone without a request waiting
/// for it. They are written as long as what this returns is kept.
fn start_log(level: Level, format: LogFormat) -> WorkerGuard {
    let (writer, guard) = NonBlockingBuilder::default().thread_name("log").finish(io::stderr());
    let level = match level {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false)
        .with_writer(writer);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    guard
}

fn check(data: &Path, repair: bool) -> ExitCode {
    match check::check(data, repair) {
        Ok(report) => match write!(io::stdout(), "{report}") {
            Ok(()) if report.is_good() => ExitCode::SUCCESS,
            Ok(()) => fail(EXIT_FAILED, &"the data directory is damaged"),
            Err(error) => fail(EXIT_FAILED, &error),
        },
        Err(error) => fail(EXIT_USAGE, &error),
    }
}

fn backup(data: &Path, to: &Path) -> ExitCode {
    match backup::backup(data, to) {
        Ok(copied) => printed(writeln!(io::stdout(), "{}: {copied}", to.display())),
        Err(error @ (BackupError::Io(..) | BackupError::Server(_))) => fail(EXIT_FAILED, &error),
        Err(error) => fail(EXIT_USAGE, &error),
    }
}

fn user(command: &UserCommand) -> ExitCode {
    match command {
        UserCommand::Add { name, password, data } => with_password(name, password, |password| {
            administer(data, &format!("USER ADD {name} {password}"), true, |_| Ok(()))
        }),
        UserCommand::Password { name, password, data } => with_password(name, password, |password| {
            administer(data, &format!("USER PASSWORD {name} {password}"), false, |_| Ok(()))
        }),
        UserCommand::Remove { name, data } => match check_word("a user name", name) {
            Ok(()) => administer(data, &format!("USER REMOVE {name}"), false, |_| Ok(())),
            Err(text) => fail(EXIT_USAGE, &text),
        },
        UserCommand::List { data } => administer(data, "USER LIST", false, print_names),
    }
}

fn with_password(name: &str, source: &PasswordSource, then: impl FnOnce(&str) -> ExitCode) -> ExitCode {
    let password = check_word("a user name", name).and_then(|()| {
        let password = if source.password_stdin { password_from_input() } else { password_from_person(name) };
        let password = password.map_err(|error| format!("no password: {error}"))?;
        check_word("a password", &password).map(|()| password)
    });
    match password {
        Ok(password) => then(&password),
        Err(text) => fail(EXIT_USAGE, &text),
    }
}

/// A parameter of a request ends at a blank.
fn check_word(what: &str, word: &str) -> Result<(), String> {
    if word.is_empty() {
        return Err(format!("{what} may not be empty"));
    }
    if word.chars().any(|letter| letter == ' ' || letter.is_control()) {
        return Err(format!("{what} has no blanks and no control characters"));
    }
    Ok(())
}

fn password_from_input() -> io::Result<String> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn password_from_person(name: &str) -> io::Result<String> {
    if !io::stdin().is_terminal() {
        return Err(io::Error::other("there is no terminal to ask on; use --password-stdin"));
    }
    let password = rpassword::prompt_password(format!("Password for {name}: "))?;
    if rpassword::prompt_password("Repeat the password: ")? == password {
        Ok(password)
    } else {
        Err(io::Error::other("the two are not the same"))
    }
}

fn administer(data: &Data, line: &str, may_create: bool, print: impl FnOnce(&Value) -> io::Result<()>) -> ExitCode {
    match admin::request(Path::new(&data.data), line, may_create) {
        Ok(reply) => printed(print(&reply["data"])),
        Err(error @ (AdminError::Refused(_) | AdminError::Work(_))) => fail(EXIT_FAILED, &error),
        Err(error) => fail(EXIT_USAGE, &error),
    }
}

fn print_names(names: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    names.as_array().into_iter().flatten().filter_map(Value::as_str).try_for_each(|name| writeln!(out, "{name}"))
}

fn print_groups(groups: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    groups.as_object().into_iter().flatten().try_for_each(|(name, members)| {
        let members: Vec<&str> = members.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        writeln!(out, "{name}: {}", members.join(", "))
    })
}

/// Does something that may hang for ever, since nobody reads what is written, and waits for it a moment.
fn with_patience(work: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel::<()>();
    let started = thread::Builder::new().spawn(move || {
        work();
        drop(done);
    });
    if started.is_ok() {
        // Ends with the other side, which is never sent anything.
        let (Ok(()) | Err(_)) = is_done.recv_timeout(PATIENCE);
    }
}

/// Says on standard error, in one line, what went wrong.
fn fail(code: u8, error: &impl Display) -> ExitCode {
    let line = format!("kurir: {error}\n");
    // Where even this cannot be said, the exit code has to do.
    with_patience(move || drop(io::stderr().write_all(line.as_bytes())));
    ExitCode::from(code)
}
