//! The arguments of `dsmoe verify`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe verify RUN\n  dsmoe verify MOE RUN/checkpoints/step-00000100 cache"
)]
pub(crate) struct Verify {
    /// Models, runs, checkpoints, caches of tokens and of teachers, and folders with any of them
    #[arg(required = true, value_name = "DIR")]
    pub(crate) paths: Vec<PathBuf>,
}
