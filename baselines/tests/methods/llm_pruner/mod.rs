//! LLM-Pruner from a directory to a directory.

mod bad_input;
mod block;
mod channel;
mod common;
