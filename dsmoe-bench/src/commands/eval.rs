//! `dsmoe eval`: perplexity and active share on text.

use std::path::PathBuf;

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_datasets::Bos;
use dsmoe_train::eval::{EvalOptions, EvalReport, evaluate};
use serde::Serialize;

use super::{bos_or_default, load_inference, open_corpus, tokenize, tokenizer};
use crate::cli::Eval;
use crate::progress::{Progress, Unit};
use crate::report;
use crate::ui::Ui;

/// Window length when none is given.
const SEQ: usize = 1024;

#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a PathBuf,
    data: &'a [PathBuf],
    doc_separator: Option<&'a str>,
    seq: usize,
    stride: usize,
    bos: Bos,
    dtype: &'static str,
    threshold: Option<f32>,
    #[serde(flatten)]
    result: EvalReport,
}

pub(crate) fn run(args: &Eval, ui: &mut Ui) -> Result<()> {
    let text_column = args.data.text_column.clone().unwrap_or_else(|| "text".to_owned());
    let corpus = open_corpus(&args.data.data, args.data.doc_separator.clone(), text_column)?;
    let model = load_inference(&args.model, args.dtype, args.threshold)?;
    let config = model.config();
    let bos = bos_or_default(args.bos, config);
    let mut stream = tokenize(&corpus, &tokenizer(&args.model, config)?, bos, ui)?;
    if let Some(limit) = args.limit_tokens {
        stream.ids.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    }
    let seq = args.seq.unwrap_or(SEQ.min(config.max_position));
    let stride = args.stride.unwrap_or(seq);
    let result = measure(&model, &stream.ids, EvalOptions { stride, ..EvalOptions::new(seq) }, ui)?;
    let report = Report {
        model: &args.model,
        data: &args.data.data,
        doc_separator: args.data.doc_separator.as_deref(),
        seq,
        stride,
        bos,
        dtype: args.dtype.name(),
        threshold: config.moe.as_ref().map(|moe| moe.router.threshold),
        result,
    };
    ui.result(&report, show)
}

/// Evaluates with progress.
pub(crate) fn measure(model: &Inference, ids: &[u32], options: EvalOptions, ui: &Ui) -> Result<EvalReport> {
    let mut progress = Progress::new(ui, "evaluating", Unit::Windows, 0);
    let result =
        evaluate(model, ids, options, &mut |done, total| progress.set(done as u64, total as u64, ""));
    progress.finish();
    let report = result?;
    if !report.nll.is_finite() {
        bail!(
            "the mean likelihood is not finite: the model overflows on this text; take an earlier checkpoint of it"
        );
    }
    Ok(report)
}

fn show(report: &Report<'_>) -> String {
    let result = &report.result;
    let mut fields = vec![
        ("perplexity", format!("{:.4}", result.ppl)),
        ("nll", format!("{:.6} nats per token", result.nll)),
        (
            "tokens",
            format!(
                "{} predicted of {}, windows of {} every {}",
                report::count(result.predicted as u64),
                report::count(result.tokens as u64),
                report.seq,
                report.stride
            ),
        ),
    ];
    if let (Some(ratio), Some(layers), Some(zero)) =
        (result.active_ratio, &result.active_ratio_per_layer, result.zero_active_share)
    {
        let layers: Vec<String> = layers.iter().map(|share| format!("{:.1}", 100.0 * share)).collect();
        fields.push(("active share", format!("{} of experts", report::percent(ratio))));
        fields.push(("by layer", format!("{} %", layers.join(" "))));
        fields.push(("no expert active", format!("{} of tokens and layers", report::percent(zero))));
    }
    fields.push((
        "parameters",
        format!(
            "{} activated of {}",
            report::amount(result.params_activated),
            report::amount(result.params_total as f64)
        ),
    ));
    fields.push(("FLOPs per token", report::amount(result.flops_per_token)));
    fields.push((
        "speed",
        format!("{:.0} tokens/s, {}", result.tokens_per_s, report::duration(result.seconds)),
    ));
    report::fields(fields)
}
