//! The error of this crate.

/// A request that a method cannot serve. Every message is one line: what is wrong, then what helps.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model directory cannot be read or written.
    #[error(transparent)]
    Core(#[from] dsmoe_core::Error),
    /// A router's configuration is wrong.
    #[error(transparent)]
    Router(#[from] dsmoe_router::Error),
    /// The method cannot reach the budget.
    #[error("budget {asked}: {problem}; {help}")]
    Budget {
        /// The budget as given.
        asked: String,
        /// The reason.
        problem: String,
        /// The range within reach, or the setting to change.
        help: String,
    },
    /// There is no method of that name.
    #[error("{name}: is not a method; use {}", known.join(", "))]
    Method {
        /// The name as given.
        name: String,
        /// The names of all methods.
        known: Vec<&'static str>,
    },
    /// Two methods have one name.
    #[error("the method {name:?} is registered twice; give one of the two another name")]
    MethodTwice {
        /// The name.
        name: String,
    },
    /// A setting that the method does not have, or a value that the setting cannot take.
    #[error("{name}: {problem}; {help}")]
    Setting {
        /// The setting.
        name: String,
        /// The problem.
        problem: String,
        /// The values that it takes, or the settings that there are.
        help: String,
    },
    /// The method does not work on this model.
    #[error("model: {problem}; {help}")]
    Model {
        /// The problem.
        problem: String,
        /// The model to use in its place.
        help: String,
    },
    /// A computation has no result.
    #[error("{place}: {problem}; {help}")]
    Numeric {
        /// The tensor or layer.
        place: String,
        /// The problem.
        problem: String,
        /// The change that helps.
        help: String,
    },
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn budget(asked: impl ToString, problem: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Budget { asked: asked.to_string(), problem: problem.into(), help: help.into() }
    }

    /// The error of a budget that a method cannot reach, with the least and the most parameters that it does reach.
    pub(crate) fn out_of_reach(
        asked: impl ToString,
        problem: impl Into<String>,
        [least, most]: [f64; 2],
        dense: u64,
    ) -> Error {
        let shown = |params: f64| {
            let amount = match params {
                big if big >= 1e9 => format!("{:.4}B", big / 1e9),
                big if big >= 1e6 => format!("{:.1}M", big / 1e6),
                small => format!("{small:.0}"),
            };
            format!("{amount} ({:.1}%)", 100.0 * params / dense as f64)
        };
        let help = format!(
            "the least reachable is {}, the most {} of the dense model's parameters",
            shown(least),
            shown(most)
        );
        Error::budget(asked, problem, help)
    }

    pub(crate) fn numeric(place: impl Into<String>, problem: &str, help: &str) -> Error {
        Error::Numeric { place: place.into(), problem: problem.to_owned(), help: help.to_owned() }
    }

    pub(crate) fn model(problem: impl Into<String>, help: &str) -> Error {
        Error::Model { problem: problem.into(), help: help.to_owned() }
    }

    pub(crate) fn setting(name: &str, problem: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Setting { name: name.to_owned(), problem: problem.into(), help: help.into() }
    }
}
