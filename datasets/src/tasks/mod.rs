//! The benchmarks, scored as lm-evaluation-harness scores them: files to requests, responses to metrics.
//!
//! This module knows no model. [`Loaded::load`] reads a [`Task`]'s files and writes the prompts. A program with a model
//! answers the [`Request`]s of each document. [`Loaded::score`] makes metrics, standard errors and samples of the
//! answers.
//!
//! ```no_run
//! use std::path::Path;
//! use dsmoe_datasets::tasks::{Loaded, Options, Task, TaskFiles};
//!
//! let task = Task::named("piqa")?;
//! let loaded = Loaded::load(task, &TaskFiles::folder(Path::new("benchmarks")), &Options::default())?;
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
mod profile;
pub mod random;
mod read;
mod registry;
mod report;
mod request;
mod rolling;
mod row;
mod score;
mod task;
mod text;

pub use load::{Document, Loaded, Options, Origin, TaskFiles};
pub use profile::Profile;
pub use registry::TASKS;
pub use report::sha256;
pub use request::{MAX_NEW_TOKENS, Request, Response, cut};
pub use rolling::count_words;
pub use score::{Score, Scored};
pub use task::{Split, Task};
pub use text::strip_end;
