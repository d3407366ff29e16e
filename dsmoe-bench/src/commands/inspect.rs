//! `dsmoe inspect`: what a model is and costs, from its headers.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, check_llama_tensors};
use dsmoe_core::config::{Config, RopeScaling};
use serde::Serialize;

use crate::cli::Inspect;
use crate::report::{self, Table};
use crate::ui::Ui;

/// Context length when none is given.
const CONTEXT: usize = 1024;

#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    model_type: &'static str,
    vocab_size: usize,
    hidden: usize,
    intermediate: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: &'static str,
    max_position: usize,
    tie_word_embeddings: bool,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    experts: Option<Experts>,
    dtype: String,
    shards: usize,
    tensors: usize,
    /// Of the weight files, headers included.
    bytes: u64,
    params_total: u64,
    params_non_ffn: u64,
    params_embedding: u64,
    params_router: u64,
    mean_active: Option<f64>,
    params_activated: f64,
    context: usize,
    flops_per_token: f64,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Experts {
    num_experts: usize,
    expert_width: usize,
    threshold: f32,
    gate_value: String,
    rescale: String,
    zero_active: String,
    ste: bool,
    partition: String,
    router_bias: bool,
}

/// Parameters and stored bytes of one layer.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Layer {
    layer: usize,
    attention: u64,
    ffn: u64,
    router: u64,
    norms: u64,
    bytes: u64,
    dtype: String,
}

pub(crate) fn run(args: &Inspect, ui: &mut Ui) -> Result<()> {
    let config = Config::load(&args.model)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    check_llama_tensors(&config, &checkpoint)?;
    let accounting = Accounting::of(&config);
    let active = active_experts(args, &config)?;
    let context = args.context.unwrap_or(CONTEXT.min(config.max_position));
    let mut bytes = 0;
    for file in checkpoint.files() {
        bytes += std::fs::metadata(file).with_context(|| format!("{}", file.display()))?.len();
    }
    let layers = layers(&config, &checkpoint);
    let report = Report {
        model: args.model.clone(),
        model_type: config.model_type(),
        vocab_size: config.vocab_size,
        hidden: config.hidden,
        intermediate: config.intermediate,
        num_layers: config.num_layers,
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta,
        rope_scaling: match config.rope_scaling {
            RopeScaling::None => "none",
            RopeScaling::Llama3 { .. } => "llama3",
        },
        max_position: config.max_position,
        tie_word_embeddings: config.tie_word_embeddings,
        bos_token_id: config.bos_token_id,
        eos_token_ids: config.eos_token_ids.clone(),
        experts: experts(&config),
        dtype: dtypes(
            checkpoint
                .names()
                .filter(|name| !name.contains(".router."))
                .filter_map(|name| checkpoint.tensor(name))
                .filter(|t| t.dtype.is_float())
                .map(|t| t.dtype.to_string()),
        ),
        shards: checkpoint.files().count(),
        tensors: checkpoint.names().count(),
        bytes,
        params_total: accounting.total,
        params_non_ffn: accounting.non_ffn,
        params_embedding: accounting.embedding,
        params_router: accounting.router,
        mean_active: active,
        params_activated: accounting.activated(active.unwrap_or(0.0)),
        context,
        flops_per_token: accounting.flops_per_token(active.unwrap_or(0.0), context as f64),
        layers,
    };
    ui.result(&report, show)
}

/// The active experts to count with; none for a dense model.
fn active_experts(args: &Inspect, config: &Config) -> Result<Option<f64>> {
    match (&config.moe, args.mean_active) {
        (None, None) => Ok(None),
        (None, Some(_)) => bail!("--mean-active: {} has no experts; leave it out", args.model.display()),
        (Some(moe), None) => Ok(Some(moe.router.num_experts as f64)),
        (Some(moe), Some(k)) if (0.0..=moe.router.num_experts as f64).contains(&k) => Ok(Some(k)),
        (Some(moe), Some(k)) => {
            bail!("--mean-active {k} is out of range; use 0 to {}", moe.router.num_experts)
        }
    }
}

fn experts(config: &Config) -> Option<Experts> {
    let moe = config.moe.as_ref()?;
    Some(Experts {
        num_experts: moe.router.num_experts,
        expert_width: config.intermediate / moe.router.num_experts,
        threshold: moe.router.threshold,
        gate_value: moe.router.gate_value.to_string(),
        rescale: moe.router.rescale.to_string(),
        zero_active: moe.router.zero_active.to_string(),
        ste: moe.router.ste,
        partition: match moe.partition {
            dsmoe_core::config::PartitionKind::Contiguous => "contiguous",
            dsmoe_core::config::PartitionKind::Permuted => "permuted",
        }
        .to_owned(),
        router_bias: moe.router_bias,
    })
}

fn layers(config: &Config, checkpoint: &Checkpoint) -> Vec<Layer> {
    let mut layers: Vec<Layer> =
        (0..config.num_layers).map(|layer| Layer { layer, ..Layer::default() }).collect();
    let mut names = vec![Vec::new(); config.num_layers];
    for name in checkpoint.names() {
        let Some((number, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
        else {
            continue;
        };
        let Some((layer, tensor)) =
            number.parse::<usize>().ok().filter(|&n| n < config.num_layers).zip(checkpoint.tensor(name))
        else {
            continue;
        };
        let values = tensor.numel() as u64;
        let of = &mut layers[layer];
        match rest {
            _ if rest.starts_with("self_attn.") && tensor.dtype.is_float() && tensor.shape.len() == 2 => {
                of.attention += values;
            }
            _ if rest.starts_with("mlp.router.") => of.router += values,
            "mlp.partition" => {}
            _ if rest.starts_with("mlp.") => of.ffn += values,
            _ if rest.ends_with("layernorm.weight") => of.norms += values,
            _ => {}
        }
        of.bytes += tensor.len;
        if tensor.dtype.is_float() && !rest.starts_with("mlp.router.") {
            names[layer].push(tensor.dtype.to_string());
        }
    }
    for (layer, names) in layers.iter_mut().zip(names) {
        layer.dtype = dtypes(names.into_iter());
    }
    layers
}

/// `BF16`, or all of a mixture.
fn dtypes(names: impl Iterator<Item = String>) -> String {
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    names.dedup();
    names.join("+")
}

fn show(report: &Report) -> String {
    let tied = if report.tie_word_embeddings { "tied embedding" } else { "separate output head" };
    let mut fields = vec![
        ("model", format!("{} ({})", report.model.display(), report.model_type)),
        (
            "shape",
            format!(
                "{} layers, hidden {}, intermediate {}, vocabulary {}, {tied}",
                report.num_layers,
                report.hidden,
                report.intermediate,
                report::count(report.vocab_size as u64)
            ),
        ),
        (
            "attention",
            format!(
                "{} heads of {}, {} for keys and values; RoPE theta {}, scaling {}; {} positions",
                report.num_heads,
                report.head_dim,
                report.num_kv_heads,
                report.rope_theta,
                report.rope_scaling,
                report::count(report.max_position as u64)
            ),
        ),
    ];
    if let Some(experts) = &report.experts {
        let bias = if experts.router_bias { "with" } else { "without" };
        fields.push((
            "experts",
            format!(
                "{} of width {} per layer, {} partition, threshold {}, {} gates, rescale {}, {} at zero active, \
                 router {bias} bias{}",
                experts.num_experts,
                experts.expert_width,
                experts.partition,
                experts.threshold,
                experts.gate_value,
                experts.rescale,
                experts.zero_active,
                if experts.ste { "" } else { ", no STE" }
            ),
        ));
    }
    fields.push((
        "files",
        format!(
            "{} in {} ({} tensors, {})",
            report::bytes(report.bytes),
            if report.shards == 1 { "1 file".to_owned() } else { format!("{} shards", report.shards) },
            report.tensors,
            report.dtype
        ),
    ));
    fields.push((
        "parameters",
        format!(
            "{} in all; {} outside the FFNs, {} of them in embeddings",
            report::count(report.params_total),
            report::count(report.params_non_ffn),
            report::count(report.params_embedding)
        ),
    ));
    let at = match report.mean_active {
        Some(k) => format!(" with {k} experts active"),
        None => String::new(),
    };
    fields.push((
        "activated",
        format!("{} per token{at}", report::count(report.params_activated.round() as u64)),
    ));
    fields.push((
        "arithmetic",
        format!(
            "{} FLOPs per token{at}, after {} tokens",
            report::amount(report.flops_per_token),
            report.context
        ),
    ));

    let mut table = Table::new(["layer", "attention", "ffn", "router", "norms", "bytes", "dtype"]);
    for layer in &report.layers {
        table.row([
            layer.layer.to_string(),
            report::count(layer.attention),
            report::count(layer.ffn),
            report::count(layer.router),
            report::count(layer.norms),
            report::bytes(layer.bytes),
            layer.dtype.clone(),
        ]);
    }
    format!("{}\n{}", report::fields(fields), table.show())
}
