//! Draws what `app` says. It decides nothing.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, LineGauge, List, ListItem, Paragraph};
use tui_input::Input;

use super::app::{self, App, Conversation, Form, HELP, Link, Screen, State, Transfer};

/// Below this, there is no room for anything but a word.
const WIDTH_MIN: u16 = 30;
const HEIGHT_MIN: u16 = 8;
const NAMES_WIDTH: u16 = 20;

/// Draws the screen.
pub(super) fn draw(frame: &mut Frame<'_>, app: &App) {
    let area = frame.area();
    if area.width < WIDTH_MIN || area.height < HEIGHT_MIN {
        return frame.render_widget(Paragraph::new("kurir needs a larger window"), area);
    }
    match &app.screen {
        Screen::Login(form) => draw_login(frame, app, form, area),
        Screen::Chat => draw_chat(frame, app, area),
    }
    if app.is_help {
        draw_help(frame, area);
    }
}

fn draw_chat(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let transfers = app.transfers_shown();
    let transfers_height = u16::try_from(transfers.len()).unwrap_or(0);
    let rows = [
        Constraint::Length(1),
        Constraint::Min(3),
        Constraint::Length(transfers_height),
        Constraint::Length(3),
        Constraint::Length(1),
    ];
    let [top, middle, moving, typing, keys] = Layout::vertical(rows).areas(area);
    frame.render_widget(title(app), top);
    let names_width = NAMES_WIDTH.min(area.width / 3);
    let [names, talk] = Layout::horizontal([Constraint::Length(names_width), Constraint::Min(10)]).areas(middle);
    draw_names(frame, app, names);
    draw_talk(frame, app, talk);
    for (row, transfer) in (0..).zip(transfers) {
        draw_transfer(frame, transfer, Rect { y: moving.y + row, height: 1, ..moving });
    }
    let title = app.current().map_or_else(String::new, |current| format!(" to {} ", current.party.name));
    draw_input(frame, &app.input, &title, typing, false, true);
    let help = " Enter send · Tab next · PgUp scroll · /help · Ctrl-C end";
    frame.render_widget(Paragraph::new(help).style(Style::new().add_modifier(Modifier::DIM)), keys);
}

fn title(app: &App) -> Paragraph<'_> {
    let link = match &app.link {
        Link::Online => Span::from("connected").fg(Color::Green),
        Link::Connecting => Span::from("connecting").fg(Color::Yellow),
        Link::Offline { why, seconds } => {
            Span::from(format!("not connected, again in {seconds} s: {why}")).fg(Color::Red)
        }
    };
    Paragraph::new(Line::from(vec![" kurir ".reversed(), format!(" {} @ {}  ", app.me, app.server).into(), link]))
}

fn draw_names(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let width = usize::from(area.width.saturating_sub(2));
    let item = |conversation: &Conversation| {
        let mark = if conversation.party.is_group { "#" } else { " " };
        let unread = if conversation.unread > 0 { format!(" {}", conversation.unread) } else { String::new() };
        let room = width.saturating_sub(mark.len() + unread.len());
        let name: String = conversation.party.name.chars().take(room).collect();
        let line = Line::from(vec![
            Span::from(format!("{mark}{name:<room$}")),
            Span::from(unread).fg(Color::Yellow).add_modifier(Modifier::BOLD),
        ]);
        if app.is_selected(conversation) { ListItem::new(line.reversed()) } else { ListItem::new(line) }
    };
    // The selected one is always in sight.
    let height = usize::from(area.height.saturating_sub(2)).max(1);
    let at = app.conversations.iter().position(|one| app.is_selected(one)).unwrap_or(0);
    let first = (at + 1).saturating_sub(height);
    let items = app.conversations.iter().skip(first).map(item);
    frame.render_widget(List::new(items).block(Block::bordered().title(" conversations ")), area);
}

fn draw_talk(frame: &mut Frame<'_>, app: &App, area: Rect) {
    let Some(current) = app.current() else {
        let text = "Nobody has written yet. /to NAME opens a conversation, /join NAME a group, /help says the rest.";
        let width = area.width.saturating_sub(2);
        let mut lines: Vec<Line<'_>> = wrap(text, width).into_iter().map(Line::from).collect();
        let newest = app.notes.len().saturating_sub(usize::from(area.height));
        lines.extend(app.notes[newest..].iter().flat_map(|note| message_rows(note, width)));
        return frame.render_widget(Paragraph::new(lines).block(Block::bordered()), area);
    };
    let kind = if current.party.is_group { "group " } else { "" };
    let block = Block::bordered().title(format!(" {kind}{} ", current.party.name));
    let inner = block.inner(area);
    let height = usize::from(inner.height);
    // From the newest up, as far as the window reaches.
    let mut rows: Vec<Line<'_>> = Vec::new();
    for line in current.lines.iter().rev() {
        if rows.len() >= height + app.scrolled {
            break;
        }
        rows.extend(message_rows(line, inner.width).into_iter().rev());
    }
    let scrolled = app.scrolled.min(rows.len().saturating_sub(height));
    let mut shown: Vec<Line<'_>> = rows.into_iter().skip(scrolled).take(height).collect();
    shown.reverse();
    let more = if scrolled > 0 { format!(" {scrolled} more below ") } else { String::new() };
    frame.render_widget(block.title_bottom(more), area);
    frame.render_widget(Paragraph::new(shown), inner);
}

/// The rows of one message: who and when stand before the first.
fn message_rows(line: &app::Line, width: u16) -> Vec<Line<'static>> {
    let dim = Style::new().add_modifier(Modifier::DIM);
    if line.state == State::Note {
        return wrap(&format!("* {}", line.text), width).into_iter().map(|row| Line::styled(row, dim)).collect();
    }
    let (color, after) = match &line.state {
        State::Received => (Color::Cyan, String::new()),
        State::Sent | State::Note => (Color::Green, String::new()),
        State::Waiting(_) => (Color::Yellow, " (not sent yet)".to_owned()),
        State::Refused(reason) => (Color::Red, format!(" (refused: {reason})")),
    };
    let time = if line.time.is_empty() { "--:--" } else { &line.time };
    let before = format!("{time} {}: ", line.from);
    let whole = format!("{before}{}{after}", line.text);
    let mut rows = wrap(&whole, width).into_iter();
    let first = rows.next().unwrap_or_default();
    // A narrow window may break even this.
    let first = match first.strip_prefix(before.trim_end_matches(": ")) {
        Some(text) => Line::from(vec![
            Span::styled(format!("{time} "), dim),
            Span::from(line.from.clone()).fg(color).add_modifier(Modifier::BOLD),
            Span::from(text.to_owned()),
        ]),
        None => Line::from(first),
    };
    std::iter::once(first).chain(rows.map(|row| Line::from(format!("{INDENT}{row}")))).collect()
}

/// What a message is moved in by from its second row on.
const INDENT: &str = "      ";

/// Breaks a text into rows. What a row is moved in by is put before it by whoever shows it.
fn wrap(text: &str, width: u16) -> Vec<String> {
    let width = usize::from(width).max(INDENT.len() + 4);
    let rows = textwrap::wrap(text, textwrap::Options::new(width).subsequent_indent(INDENT));
    rows.into_iter().map(|row| row.strip_prefix(INDENT).unwrap_or(&row).to_owned()).collect()
}

fn draw_transfer(frame: &mut Frame<'_>, transfer: &Transfer, area: Rect) {
    let done = human(transfer.done);
    match transfer.bytes {
        Some(bytes) => {
            let ratio = if bytes == 0 { 1.0 } else { (transfer.done as f64 / bytes as f64).clamp(0.0, 1.0) };
            let label = format!(" {} {done} of {}", transfer.label, human(bytes));
            let gauge = LineGauge::default()
                .ratio(ratio)
                .label(label)
                .filled_symbol("█")
                .unfilled_symbol("░")
                .filled_style(Style::new().fg(Color::Green));
            frame.render_widget(gauge, area);
        }
        None => frame.render_widget(Paragraph::new(format!(" {} {done}", transfer.label)).fg(Color::Green), area),
    }
}

/// A size that is read at a glance.
fn human(bytes: u64) -> String {
    const KIB: u64 = 1024;
    const MIB: u64 = KIB * 1024;
    match bytes {
        0..KIB => format!("{bytes} B"),
        KIB..MIB => format!("{} KiB", bytes / KIB),
        _ => format!("{}.{} MiB", bytes / MIB, bytes % MIB * 10 / MIB),
    }
}

fn draw_input(frame: &mut Frame<'_>, input: &Input, title: &str, area: Rect, is_secret: bool, has_cursor: bool) {
    let width = area.width.saturating_sub(3);
    let scroll = input.visual_scroll(usize::from(width));
    let text = if is_secret { "•".repeat(input.value().chars().count()) } else { input.value().to_owned() };
    let offset = u16::try_from(scroll).unwrap_or(u16::MAX);
    let block = Block::bordered().title(title.to_owned());
    frame.render_widget(Paragraph::new(text).scroll((0, offset)).block(block), area);
    if has_cursor {
        let at = if is_secret { input.cursor() } else { input.visual_cursor() };
        let x = u16::try_from(at.saturating_sub(scroll)).unwrap_or(u16::MAX).min(width);
        frame.set_cursor_position(Position::new(area.x + 1 + x, area.y + 1));
    }
}

fn draw_login(frame: &mut Frame<'_>, app: &App, form: &Form, area: Rect) {
    let width = area.width.min(50);
    let left = area.x + (area.width - width) / 2;
    let top = area.y + area.height.saturating_sub(10) / 3;
    let row = |offset: u16, height: u16| Rect { x: left, y: top + offset, width, height }.intersection(area);
    let head = format!("kurir: log in at {}", app.server);
    frame.render_widget(Paragraph::new(head).bold(), row(0, 1));
    draw_input(frame, &form.user, " user ", row(1, 3), false, !form.is_at_password);
    draw_input(frame, &form.password, " password ", row(4, 3), true, form.is_at_password);
    let (text, color) = match &form.why {
        _ if form.is_waiting => ("a moment ...".to_owned(), Color::Yellow),
        Some(why) => (why.clone(), Color::Red),
        None => (String::new(), Color::Reset),
    };
    let rows: Vec<Line<'_>> = wrap(&text, width).into_iter().map(|row| Line::from(row).fg(color)).collect();
    frame.render_widget(Paragraph::new(rows), row(7, 2));
    let help = "Enter log in · Tab other field · Ctrl-R make the account · Ctrl-C end";
    let rows: Vec<Line<'_>> = wrap(help, width).into_iter().map(|row| Line::from(row).dim()).collect();
    frame.render_widget(Paragraph::new(rows), row(9, 2));
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let height = u16::try_from(HELP.len()).unwrap_or(u16::MAX).saturating_add(2).min(area.height);
    let width = area.width.min(74);
    let place = Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    let line = |(what, does): &(&'static str, &'static str)| {
        Line::from(vec![Span::from(format!(" {what:<24}")).bold(), Span::from(*does)])
    };
    let lines: Vec<Line<'_>> = HELP.iter().map(line).collect();
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" any key closes this ")), place);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::Event;

    use super::super::session::Said;
    use super::*;
    use crate::client::Message;

    fn shown(app: &App, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, app)).unwrap();
        terminal.backend().to_string()
    }

    fn app(text: &str) -> App {
        let mut app = App::new(None);
        let time = "2026-01-01T00:00:00.000Z".to_owned();
        let message = |id, from: &str, to: &str, text: &str| Message {
            id,
            from: from.into(),
            to: to.into(),
            text: text.into(),
            time: time.clone(),
        };
        let history = vec![message(1, "henderson", "messi", text)];
        app.said(Said::LoggedIn { user: "messi".into(), server: "host:1".into(), history });
        app.said(Said::Online);
        app.said(Said::Received(vec![message(2, "lineker", "messi", "satu"), message(3, "lineker", "messi", "dua")]));
        app
    }

    #[test]
    fn all_is_in_its_place_at_80_by_24() {
        let screen = shown(&app("halo, apa kabar?"), 80, 24);
        for text in
            ["kurir", "messi @ host:1", "connected", "lineker", "henderson: halo, apa kabar?", "to henderson", "/help"]
        {
            assert!(screen.contains(text), "{text} is not in\n{screen}");
        }
        let unread = screen.lines().find(|line| line.contains("lineker")).unwrap();
        assert!(unread.contains(" 2"), "{unread}");
    }

    #[test]
    fn a_long_message_is_broken_into_rows_and_nothing_of_it_is_lost() {
        let words: Vec<String> = (0..60).map(|number| format!("kata{number}")).collect();
        let screen = shown(&app(&words.join(" ")), 80, 24);
        assert!(words.iter().all(|word| screen.contains(word)), "{screen}");
        let screen = shown(&app(&"z".repeat(200)), 80, 24);
        assert_eq!(screen.matches('z').count(), 200, "{screen}");
    }

    #[test]
    fn no_size_is_too_small_and_none_too_large() {
        let mut app = app("halo 🙂 漢字");
        for is_help in [false, true] {
            app.is_help = is_help;
            for (width, height) in [(1, 1), (30, 8), (31, 9), (40, 10), (80, 24), (300, 100), (79, 3)] {
                shown(&app, width, height);
            }
        }
        app.said(Said::LoginNeeded { user: None, server: "host:1".into(), why: Some("tidak".repeat(50)) });
        for (width, height) in [(1, 1), (30, 8), (31, 9), (40, 10), (80, 24), (300, 100)] {
            shown(&app, width, height);
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        let mut app = App::new(None);
        app.said(Said::LoginNeeded { user: Some("messi".into()), server: "host:1".into(), why: None });
        app.terminal(&Event::Paste("rahasia".into()));
        let screen = shown(&app, 80, 24);
        assert!(screen.contains("•••••••") && !screen.contains("rahasia"), "{screen}");
    }
}
