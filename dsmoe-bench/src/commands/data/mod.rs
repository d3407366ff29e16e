//! `dsmoe data`: prepares text for training.

mod prepare;
mod tokenizer;
mod verify;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use dsmoe_datasets::manifest::{PUBLIC, PublicDataset};
use serde::Serialize;

use crate::cli::data::{Data, DataCommand, List};
use crate::ui::Ui;

pub(crate) fn run(args: &Data, ui: &mut Ui) -> Result<ExitCode> {
    match &args.command {
        DataCommand::List(args) => list(args, ui)?,
        DataCommand::Prepare(args) => prepare::run(args, ui)?,
        DataCommand::Verify(args) => return verify::run(args, ui),
        DataCommand::Stats(args) => prepare::stats(args, ui)?,
        DataCommand::Tokenizer(args) => tokenizer::run(args, ui)?,
        DataCommand::World(args) => world::run(args, ui)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Serialize)]
struct Listing {
    datasets: Vec<Listed>,
}

#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    dataset: PublicDataset,
    command: String,
}

fn list(args: &List, ui: &mut Ui) -> Result<()> {
    let listed = |dataset: PublicDataset| Listed { dataset, command: dataset.command(&args.folder) };
    let listing = Listing { datasets: PUBLIC.map(listed).into() };
    ui.result(&listing, |listing| {
        let mut out = String::new();
        for Listed { dataset, command } in &listing.datasets {
            out += &format!("{} ({}; {})\n  {command}\n", dataset.name, dataset.domain, dataset.note);
        }
        let columns = PUBLIC.map(|dataset| format!("{} {}", dataset.name, dataset.text_column)).join(", ");
        out + &format!(
            "\nThe columns of the text: {columns}.\nThen: dsmoe data verify --write {0}/NAME records the SHA-256 of what was fetched, and dsmoe data verify {0}/NAME checks it later.\n",
            args.folder
        )
    })
}
