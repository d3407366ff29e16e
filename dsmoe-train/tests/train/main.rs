//! Runs and evaluations of tiny models, from files to files.

mod common;
mod continual;
mod determinism;
mod evaluation;
mod frozen;
mod held;
mod lanes;
mod masked;
mod mixture;
mod optimizer;
mod processes;
mod reconstruct;
mod router_gradient;
mod run_directory;
mod stops;
mod teacher;
mod top_k;
