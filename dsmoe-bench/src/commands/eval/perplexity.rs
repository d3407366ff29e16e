//! `dsmoe eval --data`: measures perplexity and active share on text.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::config::MoeConfig;
use dsmoe_datasets::tasks::Profile;
use dsmoe_datasets::{Bos, Corpus, Tokenizer};
use dsmoe_kernels::comm::Communicator;
use dsmoe_train::eval::{Agreement, Domain, EvalOptions, EvalReport, agreement_on};
use dsmoe_train::tasks::{Ran, Responder, RollingReport, rolling};
use serde::Serialize;

use crate::cli::eval::{Eval, Perplexity};
use crate::cli::gates::GateArgs;
use crate::evaluation::{domain_table, measure_on, used_weights};
use crate::files::lossy;
use crate::format;
use crate::models::{load_inference, show_config_notices, tokenizer};
use crate::processes::check_alike;
use crate::progress::{Progress, Unit};
use crate::texts::{Text, load_on, open, options, show_notices, total_bytes};
use crate::ui::Ui;

/// The default window length.
const SEQ: usize = 1024;
/// The default window length of [`Perplexity::Window`].
const WINDOW_SEQ: usize = 2048;
/// The separator of documents in [`Perplexity::Window`].
const JOINT: &str = "\n\n";

#[derive(Debug, Serialize)]
struct PerplexityReport<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a PathBuf,
    #[serde(serialize_with = "lossy", skip_serializing_if = "<[_]>::is_empty")]
    data: &'a [PathBuf],
    #[serde(serialize_with = "lossy", skip_serializing_if = "Option::is_none")]
    mixture: Option<&'a PathBuf>,
    doc_separator: Option<&'a str>,
    bos: Bos,
    dtype: &'static str,
    threshold: Option<f32>,
    /// The share of experts whose stored thresholds hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<f64>,
    /// The router that stands in for the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    router: Option<String>,
    /// Bytes of the weights in memory.
    weight_bytes: u64,
    #[serde(flatten)]
    stream: Option<Stream>,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<Window>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rolling: Option<Rolling>,
}

/// Documents one after the other, every token scored.
#[derive(Debug, Serialize)]
struct Stream {
    seq: usize,
    stride: usize,
    #[serde(flatten)]
    result: EvalReport,
    /// The distance from another model, by source.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    agreement: Vec<Compared>,
}

/// The distance from another model on a source.
#[derive(Debug, Serialize)]
struct Compared {
    name: String,
    #[serde(flatten)]
    found: Agreement,
}

/// Documents joined by blank lines and encoded as one text, in whole windows.
#[derive(Debug, Serialize)]
struct Window {
    seq: usize,
    windows: usize,
    #[serde(flatten)]
    result: EvalReport,
}

/// Each document by itself, by word and byte.
#[derive(Debug, Serialize)]
struct Rolling {
    #[serde(flatten)]
    result: RollingReport,
    /// Tokens that were computed.
    tokens: u64,
    active_ratio: Option<f64>,
    params_total: u64,
    params_activated: f64,
}

pub(super) fn run(args: &Eval, comm: &dyn Communicator, ui: &mut Ui) -> Result<()> {
    let texts = open(&args.data, &options(&args.data))?;
    if args.perplexity[..] != [Perplexity::Stream] {
        let streamed = [args.stride.is_some(), args.limit_tokens.is_some(), args.against.is_some()];
        if streamed.contains(&true) || args.data.cache.is_some() {
            bail!(
                "--stride, --limit-tokens, --against and --cache are for --perplexity stream; leave them out"
            );
        }
        if texts.len() > 1 {
            bail!("--perplexity window and rolling measure one text; give one source in --data");
        }
    }
    let corpus = &texts[0].corpus;
    let mut model = load_inference(&args.model, args.precision(), args.device, args.gates)?;
    if let Some(bound) = args.router {
        model.set_router_bound(bound)?;
    }
    let config = model.config();
    show_config_notices(config, ui);
    let bos = args.bos.unwrap_or_default();
    let tokenizer = tokenizer(&args.model, config, ui)?;
    let bytes = total_bytes(&texts).to_string();
    check_alike(comm, args, &args.model, &[("the bytes of the text", bytes)])?;
    let mut report = PerplexityReport {
        model: &args.model,
        data: &args.data.data,
        mixture: args.data.mixture.as_ref(),
        doc_separator: args.data.doc_separator.as_deref(),
        bos,
        dtype: args.precision().name(),
        threshold: config.moe.as_ref().and_then(MoeConfig::threshold),
        budget: config.moe.as_ref().and_then(MoeConfig::budget),
        router: args.router.map(|bound| bound.to_string()),
        weight_bytes: model.bytes() as u64,
        stream: None,
        window: None,
        rolling: None,
    };
    let of = Subject { args, comm, model: &model, tokenizer, bos };
    for how in &args.perplexity {
        match how {
            Perplexity::Stream => report.stream = Some(stream(&of, &texts, ui)?),
            Perplexity::Window => report.window = Some(window(&of, corpus, ui)?),
            Perplexity::Rolling => report.rolling = Some(by_word(&of, corpus, ui)?),
        }
    }
    if !args.perplexity.contains(&Perplexity::Stream) {
        show_notices(corpus, ui);
    }
    ui.result(&report, show)
}

/// A model that is measured.
struct Subject<'a> {
    args: &'a Eval,
    comm: &'a dyn Communicator,
    model: &'a Inference,
    tokenizer: Tokenizer,
    bos: Bos,
}

fn stream(of: &Subject<'_>, texts: &[Text], ui: &Ui) -> Result<Stream> {
    let &Subject { args, comm, model, ref tokenizer, bos } = of;
    let sources = load_on(comm, texts, (tokenizer, bos), args.data.cache.as_deref(), ui)?;
    let limit = args.limit_tokens.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let mut ids = Vec::new();
    for source in &sources {
        let mut of_source = Vec::new();
        source.tokens.read(0..source.tokens.len().min(limit), &mut of_source)?;
        ids.push(of_source);
    }
    let domains = sources.iter().zip(&ids);
    let domains = domains.map(|(source, ids)| Domain { name: &source.name, weight: source.weight, ids });
    let domains: Vec<Domain<'_>> = domains.collect();
    let seq = args.seq.unwrap_or(SEQ.min(model.config().max_position));
    // The last token of a window is predicted, not read.
    let most = model.config().max_position;
    if seq > most.saturating_add(1) {
        bail!("--seq is {seq}; use at most the model's max_position_embeddings {most}");
    }
    let stride = args.stride.unwrap_or(seq);
    let result = measure_on(comm, model, &domains, EvalOptions { stride, ..EvalOptions::new(seq) }, ui)?;
    let agreement = match &args.against {
        Some(other) => compare(of, other, &domains, ui)?,
        None => Vec::new(),
    };
    Ok(Stream { seq, stride, result, agreement })
}

/// Compares the distributions of a model with those of the one in `other`, in windows that do not overlap.
fn compare(of: &Subject<'_>, other: &Path, domains: &[Domain<'_>], ui: &Ui) -> Result<Vec<Compared>> {
    let &Subject { args, comm, model, .. } = of;
    let reference = load_inference(other, args.precision(), args.device, GateArgs::default())?;
    let seq = args.seq.unwrap_or(SEQ.min(model.config().max_position)).min(reference.config().max_position);
    let domains = domains.iter().filter(|domain| domain.ids.len() > 1);
    let compared = domains.map(|domain| {
        let found = Progress::during(ui, "comparing", Unit::Windows, |show| {
            let mut show = |done: usize, all: usize| show(done as u64, all as u64);
            agreement_on(comm, [model, &reference], domain.ids, seq, &mut show)
        })?;
        Ok(Compared { name: domain.name.to_owned(), found })
    });
    compared.collect()
}

fn window(of: &Subject<'_>, corpus: &Corpus, ui: &Ui) -> Result<Window> {
    let &Subject { args, comm, model, ref tokenizer, bos } = of;
    let texts = corpus.texts().map(|document| document.map(|document| document.text));
    let text = texts.collect::<Result<Vec<_>, _>>()?.join(JOINT);
    let ids = tokenizer.encode(&text, bos)?;
    let seq = args.seq.unwrap_or(WINDOW_SEQ.min(model.config().max_position));
    let windows = ids.len().checked_div(seq).unwrap_or(0);
    if windows == 0 && seq > 1 {
        bail!("{} tokens are fewer than one window of {seq}; give more text, or a smaller --seq", ids.len());
    }
    // Windows of one length weigh the same, so the mean over all tokens is the mean over windows.
    let text = Domain { name: "", weight: 1.0, ids: &ids[..windows * seq] };
    let result = measure_on(comm, model, &[text], EvalOptions::new(seq), ui)?;
    Ok(Window { seq, windows, result })
}

fn by_word(of: &Subject<'_>, corpus: &Corpus, ui: &Ui) -> Result<Rolling> {
    let &Subject { comm, model, ref tokenizer, bos, .. } = of;
    let responder = Responder::new(model, tokenizer, bos, Profile::default()).on(comm);
    let texts = corpus.documents().map(|document| Ok(document?.text));
    let total = corpus.total_bytes();
    let result = Progress::during(ui, "evaluating", Unit::Bytes, |show| {
        rolling(&responder, texts, &mut |done| show(done as u64, total))
    });
    let Some((result, Ran { tokens, routing })) = result? else { bail!("interrupted") };
    let routing = routing.map(|routing| routing.summary());
    let active = routing.as_ref().map_or(0.0, |routing| routing.active_experts);
    let accounting = model.accounting();
    let (params_total, params_activated) = (accounting.total, accounting.activated(active));
    let active_ratio = routing.map(|routing| routing.active_ratio);
    Ok(Rolling { result, tokens, active_ratio, params_total, params_activated })
}

fn show(report: &PerplexityReport<'_>) -> String {
    let mut blocks = Vec::new();
    if let Some(Stream { seq, stride, result, agreement }) = &report.stream {
        for Compared { name, found } in agreement {
            let Agreement { tokens, kl, top1, nll } = found;
            let (tokens, top1) = (format::count(*tokens as u64), format::percent(*top1));
            let losses = nll.map(|[own, other]| {
                format!(
                    "; its perplexity is {:.4}, and this model is {:+.4} nats from it",
                    other.exp(),
                    own - other
                )
            });
            let losses = losses.unwrap_or_default();
            let of = if agreement.len() > 1 { format!("{name}: ") } else { String::new() };
            blocks.push(format!(
                "{of}KL {kl:.6} nats from the other model, same first token {top1} of {tokens} tokens{losses}\n"
            ));
        }
        let shape = format!("windows of {seq} every {stride}");
        blocks.push(show_windows(result, report.weight_bytes, ("perplexity", &shape)));
    }
    if let Some(Window { seq, windows, result }) = &report.window {
        let shape = format!("{windows} whole windows of {seq} of the text joined by blank lines");
        blocks.push(show_windows(result, report.weight_bytes, ("window perplexity", &shape)));
    }
    if let Some(Rolling { result, tokens, active_ratio, params_total, params_activated }) = &report.rolling {
        let counts = [result.words as u64, result.bytes as u64, result.documents as u64, *tokens];
        let [words, bytes, documents, tokens] = counts.map(format::count);
        let mut fields = vec![
            ("word perplexity", format!("{:.4}", result.word_perplexity)),
            ("byte perplexity", format!("{:.6}", result.byte_perplexity)),
            ("bits per byte", format!("{:.6}", result.bits_per_byte)),
            ("text", format!("{words} words, {bytes} bytes in {documents} documents; {tokens} tokens")),
            ("parameters", format::activated(*params_activated, *params_total)),
            ("weights", format::in_memory(report.weight_bytes)),
        ];
        if let Some(ratio) = active_ratio {
            fields.push(("active share", format!("{} of experts", format::percent(*ratio))));
        }
        blocks.push(format::fields(fields));
    }
    blocks.join("\n")
}

fn show_windows(result: &EvalReport, weight_bytes: u64, (name, shape): (&'static str, &str)) -> String {
    let [predicted, tokens] = [result.predicted, result.tokens].map(|count| format::count(count as u64));
    let mut fields = vec![
        (name, format!("{:.4}", result.ppl)),
        ("nll", format!("{:.6} nats per token", result.nll)),
        ("tokens", format!("{predicted} predicted of {tokens}, {shape}")),
    ];
    if let (Some(ratio), Some(layers), Some(zero)) =
        (result.active_ratio, &result.active_ratio_per_layer, result.zero_active_share)
    {
        let layers: Vec<String> = layers.iter().map(|share| format!("{:.1}", 100.0 * share)).collect();
        fields.push(("active share", format!("{} of experts", format::percent(ratio))));
        fields.push(("by layer", format!("{} %", layers.join(" "))));
        fields.push(("no expert active", format!("{} of tokens and layers", format::percent(zero))));
    }
    if let Some(used) = &result.used_weights {
        fields.push(("used weights", used_weights(used)));
    }
    let time = format::duration(result.seconds);
    fields.push(("parameters", format::activated(result.params_activated, result.params_total)));
    fields.push(("weights", format::in_memory(weight_bytes)));
    fields.push(("FLOPs per token", format::flops(result.flops_per_token)));
    fields.push(("speed", format!("{:.0} tokens/s, {time}", result.tokens_per_s)));
    let means = format::fields(fields);
    if result.domains.is_empty() {
        return means;
    }
    format!("{}\nmeans by share:\n{means}", domain_table(&result.domains))
}
