//! `dsmoe data`: text to train on.

mod world;

use anyhow::Result;

use crate::cli::Data;
use crate::ui::Ui;

pub(crate) fn run(args: &Data, ui: &mut Ui) -> Result<()> {
    match args {
        Data::World(args) => world::run(args, ui),
    }
}
