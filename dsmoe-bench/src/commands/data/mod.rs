//! `dsmoe data`: prepares text for training.

mod prepare;
mod tokenizer;
mod verify;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use dsmoe_datasets::manifest::PUBLIC;
use serde_json::json;

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

fn list(args: &List, ui: &mut Ui) -> Result<()> {
    let (mut datasets, mut out) = (Vec::new(), String::new());
    for dataset in PUBLIC {
        let command = dataset.command(&args.folder);
        out += &format!("{} ({}; {})\n  {command}\n", dataset.name, dataset.domain, dataset.note);
        let mut listed = serde_json::to_value(dataset)?;
        listed["command"] = command.into();
        datasets.push(listed);
    }
    let columns = PUBLIC.map(|dataset| format!("{} {}", dataset.name, dataset.text_column)).join(", ");
    ui.result(&json!({ "datasets": datasets }), |_| {
        out + &format!(
            "\nThe columns of the text: {columns}.\nThen: dsmoe data verify --write {0}/NAME records the SHA-256 of what was fetched, and dsmoe data verify {0}/NAME checks it later.\n",
            args.folder
        )
    })
}
