//! `dsmoe import`: writes the model of a GGUF file as a Hugging Face directory.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::gguf;
use serde::Serialize;

use crate::cli::model::Import;
use crate::files::lossy;
use crate::format;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct ImportReport {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    /// Types in the file.
    from: Vec<String>,
    dtype: String,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &Import, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let Some(file) = gguf::file_of(&args.model)? else {
        bail!(
            "{}: is no GGUF file; name one, or use dsmoe export for a model directory",
            args.model.display()
        );
    };
    let mut from: Vec<String> = {
        let checkpoint = Checkpoint::open(&file)?;
        checkpoint.names().filter_map(|name| checkpoint.tensor(name)).map(|view| view.stored_as()).collect()
    };
    from.sort_unstable();
    from.dedup();
    let mut progress = Progress::new(ui, "importing", Unit::Bytes, 0);
    let mut show = |at: dsmoe_core::checkpoint::Progress| progress.set(at.done_bytes, at.total_bytes, "");
    let options =
        ExportOptions { dtype: Some(args.dtype), force: args.force, ..ExportOptions::new(ExportAs::Native) };
    let done = export(&file, &args.out, &options, &mut show);
    progress.finish();
    let report = ImportReport {
        model: args.model.clone(),
        out: args.out.clone(),
        from,
        dtype: args.dtype.to_string(),
        bytes: done?.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, |report| {
        format!(
            "{}: {} as {}, {} in {}",
            report.out.display(),
            report.from.join("+"),
            report.dtype,
            format::bytes(report.bytes),
            format::duration(report.seconds)
        )
    })
}
