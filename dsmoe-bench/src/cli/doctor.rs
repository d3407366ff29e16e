//! The arguments of `dsmoe doctor`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Data folder to check [default: $DSMOE_SHARED, or ../shared]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
}
