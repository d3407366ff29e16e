//! The benchmarks, scored as lm-evaluation-harness scores them: files to requests, responses to metrics.
//!
//! This module knows no model. [`Loaded::load`] reads a [`Task`]'s files and writes the prompts. A program with a model
//! answers the [`Request`]s of each document. [`Loaded::score`] makes metrics, standard errors and samples of the
//! answers. A task is a TOML file ([`definitions`] has those of this crate), and [`add_task`] adds others.
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

mod cleaning;
mod column;
mod content;
mod csv;
mod definition;
mod files;
mod filter;
mod form;
mod item;
mod load;
mod metrics;
mod profile;
pub mod random;
mod read;
mod registry;
mod report;
mod request;
mod row;
mod rules;
mod score;
mod split;
mod stored;
mod task;
mod template;
mod text;

pub use cleaning::count_words;
pub use load::{Document, Loaded, Options, Origin, TaskFiles};
pub use profile::Profile;
pub use registry::{add_task, add_task_file, definitions, tasks};
pub use report::sha256;
pub use request::{MAX_NEW_TOKENS, Request, Response, cut};
pub use score::{Group, Score, Scored};
pub use split::Split;
pub use task::Task;
pub use text::strip_end;
