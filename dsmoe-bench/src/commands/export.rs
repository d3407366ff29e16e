//! `dsmoe export`: writes a DSMoE model as a plain LLaMA, in LLaMA-MoE's layout, in another precision, or a dense model
//! as GGUF.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::llama_moe;
use dsmoe_core::export::{ExportAs, export};
use dsmoe_core::gguf::{GgufType, export_gguf};
use serde::Serialize;

use crate::cli::model::{Export, Form};
use crate::format;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct ExportReport {
    model: PathBuf,
    out: PathBuf,
    form: &'static str,
    dtype: Option<String>,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &Export, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    let dtype = match (args.form, args.dtype) {
        (Form::Gguf, _) | (_, None) => None,
        (_, Some(GgufType::Float(dtype))) => Some(dtype),
        (_, Some(GgufType::Q8_0)) => bail!("--dtype q8_0 is for --as gguf; use bf16, f16 or f32"),
    };
    let mut progress = Progress::new(ui, "exporting", Unit::Bytes, 0);
    let mut show = |at: dsmoe_core::checkpoint::Progress| progress.set(at.done_bytes, at.total_bytes, "");
    let bytes = match args.form {
        Form::Core(form) => export(&args.model, &args.out, form, dtype, args.force, &mut show)
            .map(|done| done.bytes)
            .map_err(anyhow::Error::from),
        Form::LlamaMoe => llama_moe::export(&args.model, &args.out, dtype, args.force, &mut show)
            .map(|done| done.bytes)
            .map_err(anyhow::Error::from),
        Form::Gguf => export_gguf(&args.model, &args.out, args.dtype, args.force, &mut show)
            .map(|done| done.bytes)
            .map_err(anyhow::Error::from),
    };
    progress.finish();
    let bytes = bytes?;
    let report = ExportReport {
        model: args.model.clone(),
        out: args.out.clone(),
        form: match args.form {
            Form::Core(ExportAs::Dense) => "dense",
            Form::Core(ExportAs::Native) => "native",
            Form::LlamaMoe => "LLaMA-MoE",
            Form::Gguf => "GGUF",
        },
        dtype: args.dtype.map(|dtype| dtype.to_string()),
        bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, |report| {
        format!(
            "{}: {} model, {} in {}",
            report.out.display(),
            report.form,
            format::bytes(report.bytes),
            format::duration(report.seconds)
        )
    })
}
