#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod assignment;
pub mod controls;
mod error;
mod graph;
mod kmeans;
mod linalg;
pub mod llama_moe;
mod llm_pruner;
mod method;
mod moefication;
pub mod sparse;

pub use error::{Error, Result};
pub use llama_moe::TopkMoeFfn;
pub use llm_pruner::{LlmPrunerBlock, LlmPrunerChannel};
pub use method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress, method, methods};

/// Makes the directories that the methods here write readable in this process: their FFNs are of kinds that dsmoe-core
/// does not know.
pub fn register() {
    llama_moe::register();
}
