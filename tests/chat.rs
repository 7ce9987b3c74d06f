//! The chat client in a real terminal: tmux holds the other end, types keys and reads the screen.
//!
//! Where there is no tmux, nothing is tested and that is said; with `KURIR_TMUX=needed` that is a failure.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::process::{Server, kurir};
use kurir::client::Target;
use tempfile::TempDir;

/// Nothing on a screen takes this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server, and terminals beside it.
struct Scene {
    server: Option<Server>,
    address: String,
    root: TempDir,
    terminals: u32,
}

/// A terminal of 80 by 24, in which a shell runs one program and then waits.
struct Terminal {
    socket: PathBuf,
}

impl Scene {
    /// None where there is no tmux.
    fn new() -> Option<Self> {
        let is_there = Command::new("tmux").arg("-V").output().is_ok_and(|output| output.status.success());
        if !is_there {
            assert!(env::var_os("KURIR_TMUX").is_none(), "there is no tmux");
            println!("not tried: there is no tmux");
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        let server = Server::demo(&root.path().join("data"), &["--log", "warn"]);
        let address = server.addresses[0].to_string();
        Some(Self { server: Some(server), address, root, terminals: 0 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A terminal in which a user chats, in a directory of that name.
    fn chat(&mut self, user: &str) -> Terminal {
        let chat = format!("{} chat --user {user}", env!("CARGO_BIN_EXE_kurir"));
        let terminal = self.terminal(user, &chat);
        terminal.sees("password");
        terminal.types(&["surabaya", "Enter"]);
        terminal.sees("connected");
        terminal
    }

    fn terminal(&mut self, user: &str, program: &str) -> Terminal {
        self.terminals += 1;
        let work = self.path(user);
        fs::create_dir_all(&work).unwrap();
        let terminal = Terminal { socket: self.path(&format!("tmux-{}", self.terminals)) };
        let state = work.join("state");
        let script = format!("{program}; echo ended with $?; exec sleep 300");
        let mut command = terminal.tmux();
        command.args(["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24"]).arg("-c").arg(&work).arg(script);
        command.env("XDG_STATE_HOME", state).env("KURIR_SERVER", &self.address);
        command.env("TZ", "UTC").env("LC_ALL", "C.UTF-8").env("SHELL", "/bin/sh");
        let made = command.output().unwrap();
        assert!(made.status.success(), "{made:?}");
        terminal
    }

    fn stop(&mut self) {
        self.server.take().unwrap().stop();
    }

    /// Starts the server again, where it was.
    fn serve(&mut self) {
        let data = self.path("data");
        let again = ["serve", "--demo", "--listen", &self.address, "--data", data.to_str().unwrap(), "--log", "warn"];
        self.server = Some(Server::start(kurir(&again), 1));
    }
}

impl Terminal {
    fn tmux(&self) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-u").arg("-S").arg(&self.socket);
        command
    }

    /// Presses keys, by tmux's names for them; what is none is typed as it is.
    fn types(&self, keys: &[&str]) {
        assert!(self.tmux().arg("send-keys").args(keys).status().unwrap().success());
    }

    /// Types a line and presses Enter.
    fn says(&self, line: &str) {
        assert!(self.tmux().args(["send-keys", "-l", line]).status().unwrap().success());
        self.types(&["Enter"]);
    }

    fn screen(&self) -> String {
        String::from_utf8(self.tmux().args(["capture-pane", "-p"]).output().unwrap().stdout).unwrap()
    }

    fn asked(&self, format: &str) -> String {
        let output = self.tmux().args(["display-message", "-p", format]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn sees(&self, text: &str) {
        self.waits(text, |screen| screen.contains(text));
    }

    /// Waits until the screen is as it should be.
    fn waits(&self, what: &str, is_so: impl Fn(&str) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let screen = self.screen();
            if is_so(&screen) {
                return;
            }
            assert!(Instant::now() < end, "it does not come to this: {what}\n{screen}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The program is over, and the terminal is as it was before: no second screen, a cursor, lines and echo.
    fn is_restored(&self, text: &str) {
        self.sees(text);
        assert_eq!(
            self.asked("#{alternate_on} #{cursor_flag} #{bracket_paste_flag}").split(' ').take(2).collect::<Vec<_>>(),
            ["0", "1"]
        );
        let name = self.asked("#{pane_tty}");
        let modes = Command::new("stty").args(["-a", "-F", &name]).output().unwrap();
        let modes = String::from_utf8(modes.stdout).unwrap();
        for mode in ["icanon", "echo", "isig", "opost"] {
            assert!(modes.split([' ', ';', '\n']).any(|word| word == mode), "{mode} is off: {modes}");
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let (Ok(_) | Err(_)) = self.tmux().arg("kill-server").output();
    }
}

/// The row of the list in which a conversation stands.
fn is_unread(screen: &str, name: &str, count: usize) -> bool {
    let rows = screen.lines().filter_map(|row| row.strip_prefix('│')?.split('│').next());
    let mut rows = rows.map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.any(|row| row == [name, &count.to_string()])
}

#[test]
fn two_people_chat_in_a_group_send_files_and_outlive_a_restart() {
    let Some(mut scene) = Scene::new() else { return };
    let (messi, henderson) = (scene.chat("messi"), scene.chat("henderson"));
    messi.sees("#group1");

    // From one to the other, and back.
    messi.says("/to henderson");
    messi.says("halo, apa kabar?");
    messi.waits("sent", |screen| screen.contains("messi: halo, apa kabar?") && !screen.contains("not sent"));
    henderson.waits("unread", |screen| is_unread(screen, "messi", 1));
    henderson.types(&["Tab"]);
    henderson.sees("messi: halo, apa kabar?");
    henderson.says("baik");
    messi.sees("henderson: baik");

    // A group.
    messi.says("/create tim sandi-tim");
    messi.sees(" to tim ");
    henderson.says("/join tim salah");
    henderson.sees("sandi group salah");
    henderson.says("/join tim sandi-tim");
    henderson.sees(" to tim ");
    messi.says("halo tim");
    henderson.sees("messi: halo tim");
    henderson.says("/members");
    henderson.sees("members: messi, henderson");

    // A file each way.
    let large: Vec<u8> = (0..5_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    fs::write(scene.path("messi/foto kita.jpg"), &large).unwrap();
    fs::write(scene.path("henderson/catatan.txt"), "isi").unwrap();
    messi.says("/to henderson");
    messi.says("/send foto kita.jpg");
    messi.sees("is sent, as foto_kita.jpg");
    henderson.waits("unread", |screen| is_unread(screen, "messi", 1));
    henderson.says("/to messi");
    henderson.sees("there is a new file: foto_kita.jpg");
    henderson.says("/files");
    henderson.sees("files of messi: foto_kita.jpg");
    henderson.says("/get foto_kita.jpg");
    henderson.sees("is here");
    assert!(fs::read(scene.path("henderson/foto_kita.jpg")).unwrap() == large);
    henderson.says("/send catatan.txt");
    henderson.sees("catatan.txt to messi is sent");
    messi.sees("there is a new file: catatan.txt");
    assert!(!messi.screen().contains("new file: foto"), "who has sent it is not told of it");
    messi.says("/get catatan.txt");
    messi.sees("is here");
    assert_eq!(fs::read_to_string(scene.path("messi/catatan.txt")).unwrap(), "isi");

    // What is typed while the server is away is sent when it is back, once.
    scene.stop();
    messi.sees("not connected");
    messi.says("masih di sana?");
    messi.sees("(not sent yet)");
    scene.serve();
    henderson.sees("messi: masih di sana?");
    messi.waits("sent", |screen| !screen.contains("not sent yet") && screen.contains("connected"));
    assert_eq!(henderson.screen().matches("masih di sana?").count(), 1);

    // It ends as it should, and all is there the next time.
    messi.types(&["C-c"]);
    messi.is_restored("ended with 0");
    let again = scene.terminal("messi", &format!("{} chat", env!("CARGO_BIN_EXE_kurir")));
    again.sees("connected");
    again.says("/to henderson");
    again.sees("henderson: baik");
    again.sees("messi: masih di sana?");
}

#[test]
fn what_was_not_sent_by_the_end_is_sent_the_next_time() {
    let Some(mut scene) = Scene::new() else { return };
    let messi = scene.chat("messi");
    messi.says("/to henderson");
    messi.says("satu");
    messi.waits("sent", |screen| screen.contains("messi: satu") && !screen.contains("not sent"));
    scene.stop();
    messi.sees("not connected");
    messi.says("dua");
    messi.says("tiga");
    messi.sees("tiga (not sent yet)");
    messi.says("/quit");
    messi.is_restored("ended with 0");
    scene.serve();
    let again = scene.terminal("messi", &format!("{} chat", env!("CARGO_BIN_EXE_kurir")));
    again.sees("connected");
    again.says("/to henderson");
    again.waits("sent", |screen| screen.contains("tiga") && !screen.contains("not sent"));
    let (mut henderson, token) = scene.server.as_ref().unwrap().login("henderson");
    henderson.set_token(&token);
    let texts: Vec<String> = henderson.inbox().unwrap().into_iter().map(|message| message.text).collect();
    assert_eq!(texts, ["satu", "dua", "tiga"]);
}

#[test]
fn what_one_has_typed_is_not_sent_by_another() {
    let Some(mut scene) = Scene::new() else { return };
    let terminal = scene.chat("messi");
    terminal.says("/to lineker");
    scene.stop();
    terminal.sees("not connected");
    terminal.says("dari messi");
    terminal.sees("(not sent yet)");
    terminal.says("/logout");
    terminal.sees("log in at");
    scene.serve();
    let log_in = |user: &str| {
        terminal.types(&[user, "Enter", "surabaya", "Enter"]);
        terminal.sees(&format!("{user} @ "));
        terminal.sees("  connected");
        terminal.says("/to lineker");
    };
    log_in("henderson");
    terminal.says("dari henderson");
    terminal.waits("sent", |screen| screen.contains("dari henderson") && !screen.contains("not sent"));
    terminal.says("/logout");
    terminal.sees("log in at");
    log_in("messi");
    terminal.waits("sent", |screen| screen.contains("dari messi") && !screen.contains("not sent"));
    let (mut lineker, token) = scene.server.as_ref().unwrap().login("lineker");
    lineker.set_token(&token);
    let messages = lineker.inbox().unwrap();
    let said: Vec<(&str, &str)> = messages.iter().map(|one| (one.from.as_str(), one.text.as_str())).collect();
    assert_eq!(said, [("henderson", "dari henderson"), ("messi", "dari messi")]);
}

#[test]
fn a_transfer_that_takes_long_has_a_bar_on_a_terminal() {
    let Some(mut scene) = Scene::new() else { return };
    let kurir = env!("CARGO_BIN_EXE_kurir");
    fs::create_dir_all(scene.path("messi")).unwrap();
    fs::write(scene.path("messi/password"), "surabaya").unwrap();
    // Large enough to take more than a second anywhere; what is not sent when the test ends is not sent.
    fs::File::create(scene.path("messi/besar")).unwrap().set_len(900_000_000).unwrap();
    let program = format!("{kurir} login messi --password-stdin < password && {kurir} send-file henderson besar");
    let terminal = scene.terminal("messi", &program);
    terminal.sees(" of 858.31 MiB");
}

#[test]
fn the_terminal_is_given_back_on_signals() {
    let Some(mut scene) = Scene::new() else { return };
    for signal in ["TERM", "HUP", "INT"] {
        let terminal = scene.chat("messi");
        // The shell waits for the program, whose number it does not tell.
        let shell = terminal.asked("#{pane_pid}");
        let children = Command::new("pgrep").args(["-P", &shell]).output().unwrap();
        let child = String::from_utf8(children.stdout).unwrap();
        assert!(Command::new("kill").args([&format!("-{signal}"), child.trim()]).status().unwrap().success());
        terminal.is_restored("ended with 0");
        fs::remove_dir_all(scene.path("messi")).unwrap();
    }
}

#[test]
fn the_terminal_is_given_back_on_a_panic() {
    let Some(mut scene) = Scene::new() else { return };
    let this = env::current_exe().unwrap();
    let program = format!("RUST_BACKTRACE=0 {} --ignored --exact panics_in_a_chat", this.display());
    let terminal = scene.terminal("messi", &program);
    terminal.sees("log in at");
    assert_eq!(terminal.asked("#{alternate_on}"), "1");
    terminal.is_restored("ended with 101");
    assert!(terminal.screen().contains("this is a panic"));
}

#[test]
#[ignore = "for the test above, in a terminal"]
fn panics_in_a_chat() {
    let state = PathBuf::from(env::var_os("XDG_STATE_HOME").unwrap());
    thread::spawn(move || {
        let server_default = env::var("KURIR_SERVER").unwrap();
        let options =
            kurir::chat::Options { state, profile: "default".into(), server: None, server_default, user: None };
        kurir::chat::run(options)
    });
    thread::sleep(Duration::from_secs(3));
    panic!("this is a panic");
}

#[test]
#[ignore = "draws the picture of the README: cargo test --test chat -- --ignored draws"]
fn draws_the_picture() {
    let mut scene = Scene::new().unwrap();
    let messi = scene.chat("messi");
    let server = scene.server.as_ref().unwrap();
    let (mut henderson, token) = server.login("henderson");
    henderson.set_token(&token);
    let (mut lineker, token) = server.login("lineker");
    lineker.set_token(&token);
    let (group, user) = (Target::Group("group1"), Target::User("messi"));
    for (from, to, text) in [
        (&mut henderson, group, "selamat pagi semua, jadi latihan nanti sore?"),
        (&mut lineker, group, "jadi, jam empat di lapangan belakang kampus. Siapa yang bawa bola?"),
    ] {
        from.send_message(to, text).unwrap();
    }
    messi.sees("bawa bola?");
    messi.says("saya bawa dua, dan ini foto lapangannya");
    henderson.send_message(user, "boleh pinjam sepatu?").unwrap();
    henderson.send_message(user, "nomor 42").unwrap();
    messi.waits("unread", |screen| is_unread(screen, "henderson", 2) && screen.contains("foto lapangannya"));
    // Large enough to be seen on its way.
    fs::File::create(scene.path("messi/lapangan.mp4")).unwrap().set_len(400_000_000).unwrap();
    messi.says("/send lapangan.mp4");
    messi.waits("half of it", |screen| screen.contains("lapangan.mp4 to group1 2"));
    let screen = messi.tmux().args(["capture-pane", "-e", "-p"]).output().unwrap().stdout;
    let screen = String::from_utf8(screen).unwrap().replace(&scene.address, "kurir.example:8889");
    let picture = anstyle_svg::Term::new().min_width_px(680).render_svg(&screen);
    fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/chat/screen.svg"), picture).unwrap();
}

#[test]
fn a_login_that_is_wrong_is_said_and_one_that_is_new_is_made() {
    let Some(mut scene) = Scene::new() else { return };
    let program = format!("{} chat", env!("CARGO_BIN_EXE_kurir"));
    let terminal = scene.terminal("pele", &program);
    terminal.sees("log in at");
    terminal.types(&["pele", "Enter", "salahsalah", "Enter"]);
    terminal.sees("username atau password salah");
    terminal.types(&["santos12", "C-r"]);
    terminal.sees("connected");
    terminal.says("/help");
    terminal.sees("/create NAME [SECRET]");
    terminal.types(&["Enter"]);
    terminal.says("/logout");
    terminal.sees("log in at");
    let state: &Path = &scene.path("pele/state/kurir/logins/default.json");
    assert!(!state.exists());
}

#[test]
fn a_long_paste_is_taken_at_once_and_what_is_typed_behind_it_too() {
    let Some(mut scene) = Scene::new() else { return };
    let messi = scene.chat("messi");
    messi.says("/to henderson");
    // A terminal that does not say that it is a paste, and more than is read at once.
    let long = "panjang ".repeat(700);
    messi.says(&long);
    messi.waits("sent", |screen| screen.contains("panjang panjang") && !screen.contains("not sent"));
    messi.says("pendek");
    messi.sees("messi: pendek");
    // A second that does, and that is longer than a message may be.
    fs::write(scene.path("paste"), "x".repeat(100_000)).unwrap();
    let paste = scene.path("paste");
    assert!(messi.tmux().arg("load-buffer").arg(paste).status().unwrap().success());
    assert!(messi.tmux().args(["paste-buffer", "-p"]).status().unwrap().success());
    messi.sees("a message is at most 8000 bytes");
    messi.types(&["C-u", "/quit", "Enter"]);
    messi.is_restored("ended with 0");
    let (mut henderson, token) = scene.server.as_ref().unwrap().login("henderson");
    henderson.set_token(&token);
    let texts: Vec<String> = henderson.inbox().unwrap().into_iter().map(|message| message.text).collect();
    assert_eq!(texts, [long.as_str(), "pendek"]);
}

#[test]
fn messages_come_by_themselves_after_a_restart_too_and_can_be_scrolled_to() {
    let Some(mut scene) = Scene::new() else { return };
    let henderson = scene.chat("henderson");
    scene.stop();
    thread::sleep(Duration::from_millis(500));
    scene.serve();
    let (mut messi, token) = scene.server.as_ref().unwrap().login("messi");
    messi.set_token(&token);
    for number in 0..30 {
        let to = Target::User("henderson");
        messi.send_message(to, &format!("pesan nomor {number} {}", "panjang ".repeat(10))).unwrap();
    }
    henderson.waits("unread", |screen| is_unread(screen, "messi", 30));
    henderson.types(&["Tab"]);
    henderson.sees("pesan nomor 29");
    // What is above the window can be scrolled to.
    for _ in 0..8 {
        henderson.types(&["PageUp"]);
    }
    henderson.sees("pesan nomor 0 ");
    henderson.types(&["PageDown", "PageDown", "PageDown", "PageDown", "PageDown", "PageDown", "PageDown", "PageDown"]);
    henderson.sees("pesan nomor 29");
}
