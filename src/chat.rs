//! The chat client: a full screen in a terminal.
//!
//! Three threads: one reads the keyboard, one owns the connection (`session`), and this one owns what is shown (`app`) and
//! draws it (`view`). They tell each other by channels: events come here, orders go to the session. Files move on threads of
//! their own (`transfers`), so that one goes on chatting meanwhile.

mod app;
mod session;
mod transfers;
mod view;

use std::io::{self, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use ratatui::crossterm::event::{self, DisableBracketedPaste, EnableBracketedPaste};
use ratatui::crossterm::execute;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use app::App;
use session::{Said, Session};

/// Events that are taken before the screen is drawn again.
const EVENTS_PER_DRAW_MAX: usize = 256;
/// How long the end waits for what is still to be sent.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a chat is started with.
#[derive(Debug)]
pub struct Options {
    /// Where logins and histories are kept.
    pub state: PathBuf,
    /// Which login.
    pub profile: String,
    /// `HOST:PORT`, where it is not that of the login.
    pub server: Option<String>,
    /// The same where there is no login.
    pub server_default: String,
    /// Who, where it is not that of the login.
    pub user: Option<String>,
}

/// What happens to the screen.
#[derive(Debug)]
enum Event {
    /// The keyboard, or the size of the terminal.
    Terminal(event::Event),
    Session(Said),
    /// The program is told to end.
    Quit,
    /// One of the threads has panicked.
    Broken,
}

/// Chats until the user has enough of it.
///
/// # Errors
/// The terminal cannot be used. It is as it was before in any case.
pub fn run(options: Options) -> io::Result<()> {
    let (tell, events) = mpsc::channel();
    let (orders, orders_to_do) = mpsc::channel();
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGINT])?;
    spawn("signals", &tell, move |tell| {
        if signals.forever().next().is_some() {
            let (Ok(()) | Err(_)) = tell.send(Event::Quit);
        }
    })?;
    let mut app = App::new(options.user.clone());
    let screen = Screen::take()?;
    let (done, is_done) = mpsc::channel::<()>();
    let is_ending = Arc::new(AtomicBool::new(false));
    let session_ends = Arc::clone(&is_ending);
    spawn("session", &tell, move |tell| Session::new(options, tell, session_ends, done).run(&orders_to_do))?;
    spawn(
        "keyboard",
        &tell,
        |tell| {
            while event::read().is_ok_and(|event| tell.send(Event::Terminal(event)).is_ok()) {}
        },
    )?;
    let ended = show(&mut app, &events, &orders, screen);
    drop(orders);
    is_ending.store(true, Ordering::SeqCst);
    // What was typed is on its way, or is kept until the next time; half a file is removed.
    let (Ok(()) | Err(_)) = is_done.recv_timeout(PATIENCE);
    ended
}

/// The loop: draw, wait, change.
fn show(
    app: &mut App,
    events: &Receiver<Event>,
    orders: &Sender<session::Order>,
    mut screen: Screen,
) -> io::Result<()> {
    while !app.is_over() {
        screen.terminal.draw(|frame| view::draw(frame, app))?;
        let Ok(first) = events.recv() else { break };
        for event in std::iter::once(first).chain(events.try_iter().take(EVENTS_PER_DRAW_MAX)) {
            match event {
                Event::Terminal(event) => app.terminal(&event),
                Event::Session(said) => app.said(said),
                Event::Quit => app.quit(),
                Event::Broken => return Err(io::Error::other("a part of the program has failed")),
            }
        }
        for order in app.take_orders() {
            // A session that is gone has said so.
            let (Ok(()) | Err(_)) = orders.send(order);
        }
    }
    Ok(())
}

/// The terminal, which is given back as it was, whatever happens: on return, on a panic of any thread, on a signal.
struct Screen {
    terminal: ratatui::DefaultTerminal,
}

impl Screen {
    fn take() -> io::Result<Self> {
        let terminal = ratatui::try_init()?;
        let mut screen = Self { terminal };
        screen.terminal.clear()?;
        execute!(stdout(), EnableBracketedPaste)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let (Ok(()) | Err(_)) = execute!(stdout(), DisableBracketedPaste);
        ratatui::restore();
    }
}

/// Starts a thread that tells of its own panic.
fn spawn(name: &str, tell: &Sender<Event>, work: impl FnOnce(Sender<Event>) + Send + 'static) -> io::Result<()> {
    struct Watch(Sender<Event>);

    impl Drop for Watch {
        fn drop(&mut self) {
            if thread::panicking() {
                let (Ok(()) | Err(_)) = self.0.send(Event::Broken);
            }
        }
    }

    let (watch, tell) = (Watch(tell.clone()), tell.clone());
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _watch = watch;
        work(tell);
    })?;
    Ok(())
}
