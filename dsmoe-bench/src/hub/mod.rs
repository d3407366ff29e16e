//! Models of the Hugging Face Hub: downloaded with `--hub`, in a build with the feature `hub`.

#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod listing;
#[cfg(feature = "hub")]
mod settings;
#[cfg(feature = "hub")]
mod watch;

use std::fs::symlink_metadata;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use dsmoe_core::files::HubName;

use crate::cli::Cli;
use crate::ui::Ui;

/// Replaces names on the Hub by directories of its cache, with `--hub`.
pub(crate) fn find_models(cli: &mut Cli, processes: usize, ui: &Ui) -> Result<()> {
    let models = cli.command.models();
    if cli.hub {
        if models.is_empty() {
            bail!("--hub: this command reads no model that can be downloaded");
        }
        if processes > 1 {
            bail!(
                "--hub: a single process downloads; run `dsmoe inspect MODEL --hub` first and name the directory"
            );
        }
        models.into_iter().try_for_each(|path| replace(path, ui))?;
    } else if cfg!(feature = "hub")
        && let Some(path) = models.iter().find(|path| name_of(path).is_some())
    {
        // The error that follows names the command of the Hub's tools.
        ui.note(format_args!("note: {} is not here; --hub downloads it", path.display()));
    }
    Ok(())
}

/// Returns the name on the Hub that `path` is, if nothing is there.
fn name_of(path: &Path) -> Option<HubName> {
    if symlink_metadata(path).is_ok() { None } else { HubName::of(path.to_str()?) }
}

fn replace(path: &mut PathBuf, ui: &Ui) -> Result<()> {
    if let Some(name) = name_of(path) {
        *path = downloaded(&name, ui)?;
    }
    Ok(())
}

#[cfg(feature = "hub")]
fn downloaded(name: &HubName, ui: &Ui) -> Result<PathBuf> {
    download::model(name, &settings::Settings::from_env()?, ui)
}

#[cfg(not(feature = "hub"))]
fn downloaded(name: &HubName, _: &Ui) -> Result<PathBuf> {
    bail!(
        "--hub: this program was built without the feature hub; build it with `cargo install --path dsmoe-bench --features \
         hub`, or download the model first: `hf download {}` prints the directory",
        name.id
    );
}
