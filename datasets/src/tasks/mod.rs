//! The benchmarks, scored as lm-evaluation-harness scores them: files to requests, responses to metrics.
//!
//! Knows no model. [`Loaded::load`] reads a [`Task`]'s files and writes the prompts; whoever has a model answers the
//! [`Request`]s of each document; [`Loaded::score`] makes metrics, standard errors and samples of the answers.
//!
//! ```no_run
//! use std::path::Path;
//! use dsmoe_datasets::tasks::{Loaded, Options, Source, Task};
//!
//! let task = Task::named("piqa")?;
//! let loaded = Loaded::load(task, &Source::folder(Path::new("benchmarks")), &Options::default())?;
//! for document in loaded.documents() {
//!     println!("{:?}", document.requests);
//! }
//! # Ok::<(), dsmoe_datasets::Error>(())
//! ```

mod answers;
mod choice;
mod cloze;
mod csv;
mod files;
mod filter;
mod load;
mod metrics;
mod parquet;
mod profile;
pub mod random;
mod read;
mod report;
mod rolling;
mod row;
mod score;
mod task;
mod text;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use files::Split;
pub use load::{Document, Loaded, Options, Origin, Source};
pub use profile::Profile;
pub use report::sha256;
pub use rolling::count_words;
pub use score::{Score, Scored};
pub use task::{TASKS, Task};
pub use text::strip_end;

/// Tokens that a generated answer has at the most in the harness.
pub const MAX_NEW_TOKENS: usize = 256;

/// One question to a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// How likely `continuation` is behind `context`, and whether it is the likeliest at every token.
    LogLikelihood {
        /// What stands before; empty for nothing.
        context: Arc<str>,
        /// What is scored.
        continuation: String,
    },
    /// How likely a whole text is, in windows of all the model's positions that do not overlap.
    Rolling {
        /// The text.
        text: String,
    },
    /// What the model continues `context` with, always taking the likeliest token.
    Generate {
        /// What stands before.
        context: Arc<str>,
        /// Texts before which the answer ends; the end token ends it too. See [`cut`].
        until: &'static [&'static str],
        /// Tokens it has at the most.
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
        /// Whether every token is the likeliest.
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

/// A generated text up to the first of `until`; where they overlap, each is looked for in what the one before left.
pub fn cut<'a>(text: &'a str, until: impl IntoIterator<Item = &'a str>) -> &'a str {
    let cut = |text: &'a str, stop: &'a str| match text.find(stop) {
        Some(at) if !stop.is_empty() => &text[..at],
        _ => text,
    };
    until.into_iter().fold(text, cut)
}
