//! What the source may not do, and where: the rules of the design that a compiler does not know.
//!
//! Comments and unit tests do not count. A file that may do something must do it, so that the lists stay true.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use clap::{Args, Command};
use kurir::limits::Limits;

/// Words that only these files may use.
const BANS: &[(&str, &[&str], &[&str])] = &[
    (
        "a clock",
        &["Instant::now", "SystemTime::now", "Timestamp::now"],
        &[
            "bench",
            "chat/session",
            "chat/transfers",
            "check",
            "cli/progress",
            "journal",
            "net",
            "store",
            "survey",
            "text",
        ],
    ),
    (
        "a thread",
        &["thread::", "mpsc"],
        &["bench", "chat", "chat/session", "chat/transfers", "cli", "cli/client", "threads"],
    ),
    ("a lock", &["Mutex", "RwLock", "RefCell", "Condvar", "thread_local"], &[]),
    ("something that is made once for all", &["OnceLock", "LazyLock"], &["content"]),
    (
        "an atomic, or anything shared",
        &["Atomic", "Arc<", "Arc::", "Rc<"],
        &["chat", "chat/session", "chat/transfers", "cli/client", "client/transfer", "disk", "net", "threads"],
    ),
    (
        "a socket",
        &["mio::", "socket2", "TcpStream", "TcpListener", "UnixStream", "UnixListener"],
        &[
            "admin",
            "backup",
            "bench",
            "chat/session",
            "chat/transfers",
            "cli/client",
            "client",
            "client/transfer",
            "net",
            "threads",
        ],
    ),
    (
        "the disk",
        &["std::fs", "rustix::fs", "File::open", "File::create", "OpenOptions"],
        &["backup", "chat/session", "cli", "client/history", "client/profile", "client/transfer", "disk", "net"],
    ),
    ("randomness", &["getrandom"], &["bench", "net", "password", "store"]),
    ("the process", &["std::process", "std::env", "env::var"], &["cli", "cli/client", "disk", "main", "net"]),
    ("the terminal", &["println!", "eprintln!", "io::stdout", "io::stderr", "io::stdin"], &["cli", "cli/client"]),
    // A table whose keys are chosen by somebody else is seeded at random, as the standard one is.
    ("a hash of its own", &["BuildHasher", "impl Hasher for"], &["state"]),
    ("what is left to do", &["TODO", "FIXME", "XXX", "HACK"], &[]),
];

/// Modules that a module must not know.
const LAYERS: &[(&str, &[&str])] = &[
    ("buffer", &["change", "command", "connection", "engine", "files", "net", "reply", "request", "state"]),
    ("request", &["buffer", "change", "command", "connection", "engine", "state"]),
    ("verb", &["buffer", "change", "command", "connection", "engine", "state"]),
    ("reply", &["buffer", "command", "connection", "engine", "files", "log", "state"]),
    ("state", &["buffer", "command", "connection", "engine", "files", "journal", "log", "reply", "request", "segment"]),
    ("command", &["buffer", "engine", "files", "journal", "net", "segment", "serve", "service", "texts", "threads"]),
    ("change", &["buffer", "command", "connection", "engine", "request", "reply", "state"]),
    ("journal", &["command", "connection", "engine", "reply", "request", "state"]),
    ("segment", &["command", "connection", "engine", "reply", "request", "state"]),
    ("record", &["command", "connection", "engine", "reply", "request", "state"]),
    ("content", &["buffer", "command", "connection", "engine", "files", "net", "state"]),
    ("deadline", &["buffer", "command", "engine", "net", "request", "state"]),
    ("failures", &["buffer", "command", "connection", "engine", "net", "request", "state"]),
    ("throttle", &["buffer", "command", "connection", "engine", "net", "request", "state"]),
    ("run_queue", &["buffer", "command", "engine", "net", "request", "service", "state"]),
    ("eviction", &["buffer", "command", "engine", "net", "request", "service", "state"]),
    ("password_queue", &["buffer", "command", "engine", "net", "request", "service", "state"]),
    ("transfer", &["buffer", "command", "engine", "net", "request", "service", "state"]),
    ("admission", &["buffer", "command", "engine", "net", "request", "state"]),
    ("engine", &["admin", "cli", "data", "journal", "net", "recovery", "segment", "store", "threads"]),
    ("serve", &["admin", "cli", "data", "journal", "net", "recovery", "segment", "state", "store", "threads"]),
    ("net", &["buffer", "change", "command", "request", "reply", "state", "verb"]),
    ("client", &["buffer", "change", "command", "connection", "engine", "limits", "net", "reply", "request", "state"]),
    ("client/transfer", &["buffer", "content", "engine", "limits", "net", "state", "transfer", "upload"]),
    ("chat/app", &["chat/view", "engine", "limits", "net", "state"]),
    ("chat/view", &["engine", "limits", "net", "state"]),
    ("chat/session", &["chat/app", "chat/view", "engine", "limits", "net", "state"]),
];

/// What may stand at the top.
const TOP: &[&str] = &["Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "benches", "fuzz", "src", "tests"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every module with what it says, without comments and unit tests.
fn modules() -> BTreeMap<String, String> {
    let (mut modules, src) = (BTreeMap::new(), root().join("src"));
    for directory in ["", "chat", "cli", "client", "state"] {
        for entry in fs::read_dir(src.join(directory)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&src).unwrap().with_extension("").to_str().unwrap().to_owned();
            if path.is_dir() {
                assert!(["chat", "cli", "client", "state"].contains(&&*name), "modules lie flat, but for some: {name}");
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap();
            let lines = code.lines().map(|line| line.split("//").next().unwrap());
            modules.insert(name, lines.collect::<Vec<_>>().join("\n"));
        }
    }
    assert!(modules.len() > 40 && modules["engine"].contains("fn turn"), "the source is where it was");
    modules
}

#[test]
fn what_only_some_may_do_others_do_not() {
    let modules = modules();
    for (what, words, allowed) in BANS {
        let users: BTreeSet<&str> = modules
            .iter()
            .filter(|(_, code)| words.iter().any(|word| code.contains(word)))
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(users, allowed.iter().copied().collect(), "who uses {what}, and who may");
    }
}

#[test]
fn no_layer_knows_what_it_must_not() {
    let modules = modules();
    for (name, banned) in LAYERS {
        for other in *banned {
            assert!(modules.contains_key(*other), "there is no module {other}");
            let other = other.rsplit('/').next().unwrap();
            let is_known = ["crate", "super"].map(|root| [format!("{root}::{other}::"), format!("{root}::{other};")]);
            let is_known = is_known.concat();
            let is_known = is_known.iter().any(|path| modules[*name].contains(path));
            assert!(!is_known, "{name} knows {other}");
        }
    }
}

#[test]
fn the_map_shows_every_module() {
    let head = |module: &str| -> String {
        let map = fs::read_to_string(root().join("src").join(module).with_extension("rs")).unwrap();
        map.lines().filter(|line| line.starts_with("//!")).collect()
    };
    for name in modules().keys().filter(|name| !matches!(name.as_str(), "lib" | "main")) {
        // A part of a module stands in the head of that.
        let (module, name) = name.rsplit_once('/').unwrap_or(("lib", name));
        assert!(head(module).contains(&format!("`{name}`")), "{module}.rs does not say where {name} belongs");
    }
}

#[test]
fn nothing_else_stands_at_the_top() {
    let listed = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // What git does not keep does not count.
    let found: BTreeSet<String> = listed.filter(|name| !name.starts_with('.') && name != "target").collect();
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), TOP);
}

#[test]
fn the_readme_lists_every_limit_with_its_default() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let command = Limits::augment_args(Command::new("limits"));
    let mut seen = 0;
    for flag in command.get_arguments() {
        let name = flag.get_long().expect("a limit has a long name");
        let row = readme.lines().find(|line| line.starts_with('|') && line.contains(&format!("`--{name}`")));
        let row = row.unwrap_or_else(|| panic!("README.md does not list --{name}"));
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        // Those that belong together may share a row, each with its default in its place.
        let at =
            cells[1].split(", ").position(|cell| cell == format!("`--{name}`")).expect("a flag stands in its cell");
        let default = flag.get_default_values().first().map_or("", |default| default.to_str().unwrap());
        assert_eq!(cells[2].split(", ").nth(at), Some(default), "the default of --{name}");
        seen += 1;
    }
    assert!(seen > 40, "{seen} limits");
}
