//! How far a file is, on a terminal, for one that takes more than a second.

use std::cell::Cell;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// The bar of one file.
pub(super) struct Progress {
    bar: ProgressBar,
    began: Instant,
    is_shown: Cell<bool>,
}

impl Progress {
    /// One for a file of so many bytes, where that is known.
    pub(super) fn new(name: &str, bytes: Option<u64>) -> Self {
        let bar = ProgressBar::with_draw_target(bytes, ProgressDrawTarget::hidden());
        let template = match bytes {
            Some(_) => "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta}",
            None => "{msg} {spinner} {bytes}, {bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        Self { bar, began: Instant::now(), is_shown: Cell::new(false) }
    }

    /// So many bytes are done.
    pub(super) fn set(&self, bytes: u64) {
        self.bar.set_position(bytes);
        if !self.is_shown.get() && self.began.elapsed() >= SHOWN_AFTER {
            self.is_shown.set(true);
            // Where standard error is no terminal, nothing is drawn.
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    /// All are, or no more will be.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}
