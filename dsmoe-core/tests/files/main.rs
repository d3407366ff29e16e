//! Files: configurations, checkpoints, conversions and exports, sound and malformed.

mod accounting;
mod bodies;
mod bytes;
mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod convert;
mod gguf;
mod malformed;
mod support;
