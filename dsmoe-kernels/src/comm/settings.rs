//! The settings of engines.

use std::time::Duration;

use super::error::CommError;
use super::what::What;

/// Settings of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long a call of a step may take. Calls outside of steps, where processes load models and write files, may take
    /// [`Settings::OUTSIDE`] times as long.
    pub deadline: Duration,
    /// Reports an error after which the engine may still use memory of the failed call, so that it ends all processes
    /// instead of returning.
    pub last_words: fn(&CommError),
}

impl Settings {
    /// The deadline that suits most runs.
    pub const DEADLINE: Duration = Duration::from_secs(600);

    /// The factor of the deadline of calls outside of steps.
    pub const OUTSIDE: u32 = 3;

    /// Returns how long a call that moves `of` may take.
    pub fn deadline_of(&self, of: What) -> Duration {
        self.deadline.saturating_mul(if of.step.is_some() { 1 } else { Settings::OUTSIDE })
    }
}
