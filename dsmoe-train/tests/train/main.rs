//! Runs and evaluations of tiny models, from files to files.

mod common;
mod determinism;
mod evaluation;
mod masked;
mod mixture;
mod optimizer;
mod run_directory;
mod teacher;
