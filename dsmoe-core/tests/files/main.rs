//! Files: configurations, checkpoints, conversions and exports, sound and malformed.

mod accounting;
mod bodies;
mod bytes;
mod checkpoint;
mod config;
mod convert;
mod export;
mod gguf;
mod malformed;
mod start;
mod support;
