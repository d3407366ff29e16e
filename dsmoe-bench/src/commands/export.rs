//! `dsmoe export`: a DSMoE model as a plain LLaMA, or in another precision.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use dsmoe_core::export::{ExportAs, export};
use serde::Serialize;

use crate::cli::Export;
use crate::progress::{Progress, Unit};
use crate::report;
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    out: PathBuf,
    form: &'static str,
    dtype: Option<String>,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &Export, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let mut progress = Progress::new(ui, "exporting", Unit::Bytes, 0);
    let done = export(&args.model, &args.out, args.form, args.dtype, args.force, &mut |at| {
        progress.set(at.done_bytes, at.total_bytes, "");
    });
    progress.finish();
    let done = done?;
    let report = Report {
        model: args.model.clone(),
        out: args.out.clone(),
        form: match args.form {
            ExportAs::Dense => "dense",
            ExportAs::Native => "native",
        },
        dtype: args.dtype.map(|dtype| dtype.to_string()),
        bytes: done.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, |report| {
        format!(
            "{}: {} model, {} in {}",
            report.out.display(),
            report.form,
            report::bytes(report.bytes),
            report::duration(report.seconds)
        )
    })
}
