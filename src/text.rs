//! Texts of others on a terminal, and names for a request.

use std::borrow::Cow;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// What can be shown: a control character could move the cursor, or worse, and is shown as one that cannot.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_harmful) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(
        text.chars().map(|letter| if is_harmful(letter) { char::REPLACEMENT_CHARACTER } else { letter }).collect(),
    )
}

/// Control characters, and those that turn the direction of what stands around them.
fn is_harmful(letter: char) -> bool {
    letter.is_control() || matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The name under which a file can be sent: a blank would end it.
#[must_use]
pub fn as_file_name(name: &str) -> String {
    name.replace(' ', "_")
}

/// A time of the protocol as this machine's clock has it. What is no time is shown as it is.
#[must_use]
pub fn local_time(time: &str, format: &str) -> String {
    match time.parse::<Timestamp>() {
        Ok(at) => at.to_zoned_datetime(TimeZone::system()).strftime(format).to_string(),
        Err(_) => printable(time).into_owned(),
    }
}

/// The time now, as the protocol writes it.
#[must_use]
pub fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_drive_a_terminal_is_shown_and_does_not() {
        assert_eq!(printable("halo \u{1b}[2J\u{7}\n\u{202e}x é 🙂"), "halo \u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}x é 🙂");
        assert!(matches!(printable("halo"), Cow::Borrowed("halo")));
    }

    #[test]
    fn a_time_is_one_of_the_protocol_or_stays_as_it_is() {
        assert_eq!(local_time("kemarin\u{7}", "%H"), "kemarin\u{fffd}");
        assert_eq!(local_time("2026-01-01T12:00:00.000Z", "%Y"), "2026");
        let now = now();
        assert!(now.len() == 24 && now.ends_with('Z') && now.parse::<Timestamp>().is_ok(), "{now}");
    }

    #[test]
    fn a_blank_in_a_file_name_is_an_underscore() {
        assert_eq!(as_file_name("foto kita di pantai.jpg"), "foto_kita_di_pantai.jpg");
    }
}
