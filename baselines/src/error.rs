//! The error of this crate.

/// What can be wrong with a request to a method. Every message is one line that ends with the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model directory, or what is to be written.
    #[error(transparent)]
    Core(#[from] dsmoe_core::Error),
    /// A router's configuration.
    #[error(transparent)]
    Router(#[from] dsmoe_router::Error),
    /// No budget that the method can reach is near the one asked for.
    #[error("budget {asked}: {problem}; {mend}")]
    Budget {
        /// What was asked for, as given.
        asked: String,
        /// Why it is out of reach.
        problem: String,
        /// The reachable range, or the knob to turn.
        mend: String,
    },
    /// A knob that the method does not have, or a value it cannot take.
    #[error("{name}: {problem}; {mend}")]
    Knob {
        /// The knob.
        name: String,
        /// What is wrong.
        problem: String,
        /// What it can take.
        mend: String,
    },
    /// Calibration text that does not suffice.
    #[error("calibration: {problem}; {mend}")]
    Calibration {
        /// What is wrong.
        problem: String,
        /// What would do.
        mend: String,
    },
    /// A computation that has no result.
    #[error("{place}: {problem}; {mend}")]
    Numeric {
        /// Tensor or layer.
        place: String,
        /// What happened.
        problem: String,
        /// What would do.
        mend: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
