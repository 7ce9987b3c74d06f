//! The time as the engine is told it: two clocks, since one can be set and the other cannot.

/// What both clocks show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Milliseconds since 1970, UTC. Somebody may set it forward or back: it is for what people see and what is kept across
    /// a restart.
    pub utc_ms: u64,
    /// Milliseconds since some moment; never goes back, and every one of them was there. It is for what is waited for.
    pub steady_ms: u64,
}

impl Clock {
    /// Both show the same, where there is only one.
    #[must_use]
    pub fn at(ms: u64) -> Self {
        Self { utc_ms: ms, steady_ms: ms }
    }
}
