//! Runs and evaluations of tiny models, from files to files.

mod common;
mod determinism;
mod evaluation;
mod mixture;
mod optimizer;
mod run_directory;
