#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod budgets;
mod checkpoint;
pub mod config;
pub mod continual;
pub mod engine;
mod error;
pub mod eval;
mod files;
pub mod metrics;
pub mod optim;
pub mod oracle;
mod ranks;
pub mod reconstruct;
pub mod run;
pub mod schedule;
mod step;
mod step_gates;
pub mod tasks;
mod teacher;
mod teacher_cache;
pub mod tensorboard;

pub use config::TrainConfig;
pub use error::{Error, Result};
pub use eval::{EvalOptions, EvalReport, evaluate};
pub use metrics::StepRecord;
pub use ranks::{Zero, check_alike};
pub use run::{Observer, Outcome, RunOptions, TrainData, Trainer};
pub use teacher::{check_teacher, identity_of};
pub use teacher_cache::{LARGEST_CACHE, RowShape, is_whole};
