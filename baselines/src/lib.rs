#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod linalg;
mod llm_pruner;
mod method;
pub mod sparse;
mod topk_moe;

pub use error::{Error, Result};
pub use llm_pruner::{LlmPrunerBlock, LlmPrunerChannel};
pub use method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress, method, methods};
pub use topk_moe::TopkMoeFfn;
