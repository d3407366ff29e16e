#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod accounting;
pub mod allocation;
pub mod calibrate;
pub mod checkpoint;
pub mod compensate;
pub mod config;
pub mod convert;
mod defaults;
pub mod device;
pub mod divergence;
mod error;
pub mod export;
pub mod family;
pub mod ffn;
pub mod files;
pub mod generate;
pub mod gguf;
pub mod gram;
pub mod init;
mod json;
pub mod kept;
pub mod masks;
pub mod model;
pub mod params;
pub mod partition;
mod remedy;
mod rounds;
pub mod shard;
pub mod surgery;

pub use config::Config;
pub use device::Device;
pub use error::{Error, Result};
pub use masks::Masks;
pub use model::{Inference, Model};
pub use remedy::Remedy;
