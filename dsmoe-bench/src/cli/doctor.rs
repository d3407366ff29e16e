//! The arguments of `dsmoe doctor`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe doctor\n  dsmoe doctor RUNS --json")]
pub(crate) struct Doctor {
    /// Folders to look through for what killed commands left beside their outputs
    #[arg(value_name = "DIR", default_value = ".")]
    pub(crate) folders: Vec<PathBuf>,
    /// Data folder to check [default: $DSMOE_SHARED, or ../shared]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
}
