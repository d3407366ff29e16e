//! One model, one queue, many texts that are decoded side by side.
//!
//! [`http`] turns requests into [`Job`]s and their events into answers; [`engine`] owns the model on a thread of its own. A job's
//! tokens do not depend on the jobs beside it, so they are those that `dsmoe generate` gives for the same prompt and options.

#![forbid(unsafe_code)]

pub mod engine;
pub mod http;
mod stops;

pub use engine::{Engine, Event, Job, Limits, Refusal, start};
