//! The arguments of commands whose work goes on in a folder after an interruption.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::files::check_folder;

/// The remedy for an output directory that is not empty.
pub(crate) const NOT_EMPTY: &str = "pass --resume to continue there, or choose another --out";

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
    /// Refuses the directory that a run would refuse.
    pub(crate) fn check(&self) -> Result<()> {
        self.out.as_deref().map_or(Ok(()), |out| check_folder(out, self.resume, NOT_EMPTY))
    }

    /// Returns the directory to write; none if the plan alone is wanted.
    pub(crate) fn out(&self) -> Option<&Path> {
        self.out.as_deref().filter(|_| !self.dry_run)
    }
}
