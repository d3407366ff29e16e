#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cmoe;
mod controls;
mod depth;
mod divergence;
pub mod dsmoe;
pub mod duo;
mod error;
mod experts;
mod factorllm;
mod gradients;
pub mod grow;
mod linalg;
pub mod llama_moe;
pub mod llm_pruner;
mod method;
pub mod moefication;
mod neurons;
mod partial;
pub mod plan;
mod random_k;
mod registry;
mod regressor;
mod rewrite;
mod settings;
pub mod sparse;
mod states;
mod surgery;
mod thresholds;
pub mod topk;

pub use duo::DuoFfn;
pub use error::{Error, Result};
pub use method::{Asked, Budget, Configured, Counts, Job, Made, Method, Plan, Progress, Source};
pub use partial::Partial;
pub use registry::{add_method, method, methods};
pub use settings::{Entry, SettingInfo, SettingValues, Settings, read_settings};
pub use topk::TopkMoeFfn;

/// Makes model directories with the FFNs of these methods readable in this process, once or again.
///
/// # Panics
/// Another crate registered FFNs of their types before.
pub fn register() {
    for reader in [&topk::READER, &duo::READER] {
        if let Err(cause) = dsmoe_core::ffn::register(reader) {
            panic!("{cause}");
        }
    }
}
