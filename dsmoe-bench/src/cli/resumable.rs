//! The arguments of commands whose work goes on in a folder after an interruption.

use std::path::{Path, PathBuf};

use clap::Args;

/// Where the work of a command is written, and whether it is done, continued or only planned.
#[derive(Debug, Args)]
pub(crate) struct Resumable {
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    /// Continue in --out, without what is done there
    #[arg(long, requires = "out")]
    pub(crate) resume: bool,
    /// Print the plan and compute nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

impl Resumable {
    /// Returns the directory to write; none if the plan alone is wanted.
    pub(crate) fn out(&self) -> Option<&Path> {
        self.out.as_deref().filter(|_| !self.dry_run)
    }
}
