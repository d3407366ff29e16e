//! Questions to a model and its answers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The largest number of tokens of a generated answer in the harness.
pub const MAX_NEW_TOKENS: usize = 256;

/// One question to a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Asks how likely `continuation` is after `context`, and whether it is the likeliest at every token.
    LogLikelihood {
        /// The text before; it may be empty.
        context: Arc<str>,
        /// The text that is scored.
        continuation: String,
    },
    /// Asks how likely a whole text is, in windows of all the model's positions that do not overlap.
    Rolling {
        /// The text.
        text: String,
    },
    /// Asks for a continuation of `context` by the likeliest tokens.
    Generate {
        /// The text before.
        context: Arc<str>,
        /// Texts before which the answer ends. The end token ends it too. See [`cut`].
        until: &'static [&'static str],
        /// The largest number of tokens.
        max_tokens: usize,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// To [`Request::LogLikelihood`].
    LogLikelihood {
        /// Sum of the tokens' log-probabilities, nats.
        sum: f64,
        /// True if every token is the likeliest.
        greedy: bool,
    },
    /// To [`Request::Rolling`].
    Rolling {
        /// Sum of the tokens' log-probabilities, nats.
        sum: f64,
    },
    /// To [`Request::Generate`].
    Generated {
        /// The text, cut.
        text: String,
    },
}

/// Cuts a generated text before the first of `until`. Each is looked for in what the one before it left.
pub fn cut<'a>(text: &'a str, until: impl IntoIterator<Item = &'a str>) -> &'a str {
    let cut = |text: &'a str, stop: &'a str| match text.find(stop) {
        Some(at) if !stop.is_empty() => &text[..at],
        _ => text,
    };
    until.into_iter().fold(text, cut)
}
