//! DSMoE models: LLaMA checkpoints, FFN partition into experts, the model with its KV cache, generation, accounting.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
mod error;
pub mod partition;

pub use error::{Error, Result};
