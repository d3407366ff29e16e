//! `dsmoe export`: writes a model for transformers, as a plain dense model, in LLaMA-MoE's layout, in another precision,
//! or as GGUF.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dsmoe_baselines::llama_moe;
use dsmoe_core::export::{DenseForm, ExportAs, ExportOptions, Measured, add_perplexity, export};
use dsmoe_core::gguf::{GgufType, export_gguf};
use dsmoe_core::{Config, Device, Inference};
use dsmoe_datasets::mixture::from_words;
use dsmoe_datasets::{Bos, CorpusOptions};
use dsmoe_kernels::Precision;
use dsmoe_train::eval::{EvalOptions, evaluate_detailed};
use dsmoe_train::metrics::last_evaluation;
use serde::Serialize;

use crate::cli::gates::GateArgs;
use crate::cli::model::{Export, Form};
use crate::evaluation::measure;
use crate::files::lossy;
use crate::format;
use crate::models::{load_inference, show_config_notices, tokenizer};
use crate::progress::{Progress, Unit};
use crate::texts::{find, load};
use crate::ui::Ui;

/// The longest window of text for the mean factors.
const SEQ: usize = 1024;

#[derive(Debug, Serialize)]
struct ExportReport {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    #[serde(serialize_with = "lossy")]
    out: PathBuf,
    form: &'static str,
    dtype: Option<String>,
    /// States how a dense export relates to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    dense: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fold: Option<FoldReport>,
    bytes: u64,
    seconds: f64,
    #[serde(skip)]
    card_kept: bool,
}

/// Perplexities on the text of `--data`.
#[derive(Debug, Serialize)]
struct FoldReport {
    #[serde(serialize_with = "lossy")]
    data: Vec<PathBuf>,
    tokens: usize,
    ppl_before: f64,
    ppl_after: f64,
}

/// The text that gates are folded on, and what the model does with it.
struct Folding {
    ids: Vec<u32>,
    options: EvalOptions,
    ppl: f64,
    means: Vec<Vec<f64>>,
}

pub(crate) fn run(args: &Export, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    if args.folding.fold.is_some() && !matches!(args.form, Form::Core(ExportAs::Dense)) {
        bail!("--fold leaves the gates out, which only --as dense does; leave it out");
    }
    if args.active.is_some() && !matches!(args.form, Form::Core(_)) {
        bail!(
            "--active chooses among the budgets of a DSMoE model, which --as hf and native keep; leave it out"
        );
    }
    show_config_notices(&Config::load(&args.model)?, ui);
    let folding = args.folding.fold.map(|_| Folding::measure(args, ui)).transpose()?;
    let mut report = ExportReport {
        model: args.model.clone(),
        out: args.out.clone(),
        form: match args.form {
            Form::Core(ExportAs::Dense) => "dense",
            Form::Core(ExportAs::Native) => "native",
            Form::Core(ExportAs::Transformers) => "transformers",
            Form::LlamaMoe => "LLaMA-MoE",
            Form::Gguf => "GGUF",
        },
        dtype: args.dtype.map(|dtype| dtype.to_string()),
        dense: None,
        fold: None,
        bytes: 0,
        seconds: 0.0,
        card_kept: false,
    };
    write(args, folding.as_ref(), &mut report, ui)?;
    report.fold = folding.map(|folding| folding.compare(args, ui)).transpose()?;
    report.seconds = started.elapsed().as_secs_f64();
    ui.result(&report, show)
}

/// Writes the export and fills in the report.
fn write(args: &Export, folding: Option<&Folding>, report: &mut ExportReport, ui: &Ui) -> Result<()> {
    let dtype = match (args.form, args.dtype) {
        (Form::Gguf, _) | (_, None) => None,
        (_, Some(GgufType::Float(dtype))) => Some(dtype),
        (_, Some(GgufType::Q8_0)) => bail!("--dtype q8_0 is for --as gguf; use bf16, f16 or f32"),
    };
    let mut progress = Progress::new(ui, "exporting", Unit::Bytes, 0);
    let mut shown = |at: dsmoe_core::checkpoint::Progress| progress.set(at.done_bytes, at.total_bytes, "");
    let done = match args.form {
        Form::Core(form) => {
            let options = ExportOptions {
                dtype,
                force: args.force,
                active: args.active,
                fold: folding.map(|folding| folding.means.clone()),
                measured: measured(args, folding),
                ..ExportOptions::new(form)
            };
            export(&args.model, &args.out, &options, &mut shown)
                .map(|done| (done.bytes, done.dense, !done.card_written))
                .map_err(anyhow::Error::from)
        }
        Form::LlamaMoe => llama_moe::export(&args.model, &args.out, dtype, args.force, &mut shown)
            .map(|done| (done.bytes, None, false))
            .map_err(anyhow::Error::from),
        Form::Gguf => export_gguf(&args.model, &args.out, args.dtype, args.force, &mut shown)
            .map(|done| (done.bytes, None, false))
            .map_err(anyhow::Error::from),
    };
    progress.finish();
    let dense;
    (report.bytes, dense, report.card_kept) = done?;
    report.dense = dense.map(|form| match form {
        DenseForm::Source => "source",
        DenseForm::AllOpen => "all_open",
        DenseForm::Folded => "folded",
    });
    Ok(())
}

/// Returns the perplexities for the model card: of the model on the text to fold on, and the last one of its training.
fn measured(args: &Export, folding: Option<&Folding>) -> Vec<Measured> {
    let mut measured = Vec::new();
    if let Some(folding) = folding {
        let text = format!("of the sparse model, {} tokens", folding.ids.len());
        measured.push(Measured { text, perplexity: folding.ppl });
    }
    if let Some(last) = last_evaluation(&args.model) {
        let active = last.active_ratio.map(|share| format!(", {} of experts active", format::percent(share)));
        let active = active.unwrap_or_default();
        let text = format!("of the trained model on its held-out text at step {}{active}", last.step);
        measured.push(Measured { text, perplexity: last.ppl });
    }
    measured
}

impl Folding {
    /// Runs the model on the text, which gives the mean factors of its experts.
    fn measure(args: &Export, ui: &Ui) -> Result<Folding> {
        let config = Config::load(&args.model)?;
        let defaults = CorpusOptions::default();
        let options = CorpusOptions {
            doc_separator: args.folding.doc_separator.clone(),
            text_column: args.folding.text_column.clone().unwrap_or(defaults.text_column),
            selection: defaults.selection,
        };
        let texts = find(from_words(&args.folding.data, &options)?)?;
        let sources = load(&texts, &tokenizer(&args.model, &config, ui)?, Bos::Auto, None, ui)?;
        let mut ids = Vec::new();
        for source in &sources {
            let mut of_source = Vec::new();
            source.tokens.read(0..source.tokens.len(), &mut of_source)?;
            ids.append(&mut of_source);
        }
        let options = EvalOptions::new(SEQ.min(config.max_position));
        let model = load_inference(&args.model, Precision::F32, Device::Cpu, GateArgs::default())?;
        let mut progress = Progress::new(ui, "measuring gates", Unit::Windows, 0);
        let found = evaluate_detailed(&model, &ids, options, &mut |done, total| {
            progress.set(done as u64, total as u64, "");
        });
        progress.finish();
        let (report, detail) = found?;
        let means = detail.mean_coefficients.context("the model has no gates to fold; leave --fold out")?;
        Ok(Folding { ids, options, ppl: report.ppl, means })
    }

    /// Measures the perplexity of the export on the same text.
    fn compare(self, args: &Export, ui: &Ui) -> Result<FoldReport> {
        let model = Inference::load(&args.out, Precision::F32)?;
        let after = measure(&model, &self.ids, self.options, ui)?;
        let text = format!("of this model, {} tokens", self.ids.len());
        add_perplexity(&args.out, &Measured { text, perplexity: after.ppl })?;
        Ok(FoldReport {
            data: args.folding.data.clone(),
            tokens: self.ids.len(),
            ppl_before: self.ppl,
            ppl_after: after.ppl,
        })
    }
}

fn show(report: &ExportReport) -> String {
    let mut text = format!(
        "{}: {} model, {} in {}",
        report.out.display(),
        report.form,
        format::bytes(report.bytes),
        format::duration(report.seconds)
    );
    text += match report.dense {
        Some("source") => {
            "\nthe model was not trained since its conversion: this is the dense model that it was made from"
        }
        Some("all_open") => "\nevery gate is open and 1: this computes the same",
        _ => "",
    };
    if let Some(FoldReport { tokens, ppl_before, ppl_after, .. }) = &report.fold {
        text += &format!(
            "\nmean gates are folded into the weights; perplexity on {} tokens: {ppl_before:.4} before, {ppl_after:.4} after",
            format::count(*tokens as u64)
        );
    }
    if report.card_kept {
        text += "\nthe README.md that was there is kept; no model card was written";
    }
    text
}
