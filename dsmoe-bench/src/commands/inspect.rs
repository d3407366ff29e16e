//! `dsmoe inspect`: shows the architecture and the costs of a model, from its headers.

use std::path::PathBuf;

use anyhow::{Result, bail};
use dsmoe_core::Masks;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, TensorView, check_llama_tensors, is_router, open_model};
use dsmoe_core::config::{Config, LayerShape, MoeConfig, lists_of_maps};
use dsmoe_kernels::Precision;
use dsmoe_train::eval::UsedShares;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::model::Inspect;
use crate::evaluation::used_weights;
use crate::files::lossy;
use crate::format::{self, Table};
use crate::models::file_bytes;
use crate::ui::Ui;

/// The default context length.
const CONTEXT: usize = 1024;

#[derive(Debug, Serialize)]
struct InspectReport {
    #[serde(serialize_with = "lossy")]
    model: PathBuf,
    model_type: &'static str,
    /// Model type of the dense model of that architecture.
    family: &'static str,
    /// Describes how the family differs from LLaMA.
    switches: Vec<String>,
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
    /// Base and scaling of the rotation of layers with a window, where it is another.
    window_rope: Option<(f64, &'static str)>,
    max_position: usize,
    tie_word_embeddings: bool,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    experts: Option<Experts>,
    /// An FFN that is neither dense nor DSMoE's.
    ffn: Option<OtherFfn>,
    masks: Option<Masked>,
    /// Shares of the weights that a token used on calibration text, in a model with thresholds of inputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    used_weights: Option<UsedShares>,
    dtype: String,
    shards: usize,
    tensors: usize,
    /// Bytes of the weight files, headers included.
    bytes: u64,
    weight_bytes: InMemory,
    params_total: u64,
    params_non_ffn: u64,
    params_embedding: u64,
    params_router: u64,
    mean_active: Option<f64>,
    params_activated: f64,
    context: usize,
    flops_per_token: f64,
    /// Lists keys of config.json that have no effect or that may be mistakes.
    notices: Vec<String>,
    layers: Vec<Layer>,
}

/// Least bytes of the weights in memory, by precision. Padding comes on top, which `eval` counts.
#[derive(Debug, Serialize)]
struct InMemory {
    f32: u64,
    bf16: u64,
}

#[derive(Debug, Serialize)]
struct Experts {
    num_experts: usize,
    /// Experts of each layer; empty where all have as many.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    experts_per_layer: Vec<usize>,
    expert_width: usize,
    /// None where thresholds are stored by layer and budget.
    threshold: Option<f32>,
    /// The expert of every gate of each layer, behind the core; empty where each expert has a gate of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    expert_map: Vec<Vec<u32>>,
    /// Leading experts of each layer that always run; empty without a core.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    core: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    router_rank: Option<usize>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    correction: bool,
    /// Shares of the experts that thresholds are stored for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    budgets: Vec<f64>,
    /// The budget whose thresholds hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<f64>,
    gate_value: String,
    rescale: String,
    zero_active: String,
    ste: bool,
    partition: String,
    router_bias: bool,
}

#[derive(Debug, Serialize)]
struct OtherFfn {
    #[serde(rename = "type")]
    kind: &'static str,
    num_experts: usize,
    /// Active experts of each token, if their number is fixed.
    active_experts: Option<f64>,
    settings: Map<String, Value>,
}

/// The weights of masked linear layers.
#[derive(Debug, Serialize)]
struct Masked {
    linears: usize,
    weights: u64,
    kept: u64,
}

/// Sizes, parameters and stored bytes of one layer.
#[derive(Debug, PartialEq, Serialize)]
struct Layer {
    layer: usize,
    num_heads: usize,
    num_kv_heads: usize,
    intermediate: usize,
    attention: u64,
    ffn: u64,
    router: u64,
    norms: u64,
    /// Weights of linear layers that the masks remove.
    pruned: u64,
    bytes: u64,
    dtype: String,
}

pub(crate) fn run(args: &Inspect, ui: &mut Ui) -> Result<()> {
    let config = Config::load(&args.model)?;
    let checkpoint = open_model(&args.model, &config)?;
    check_llama_tensors(&config, &checkpoint)?;
    let masks = Masks::load(&args.model)?;
    let accounting = Accounting::of(&config);
    let accounting = masks.as_ref().map_or(accounting, |masks| accounting.with_masks(masks));
    let active = active_experts(args, &config, accounting.num_experts)?;
    let context = args.context.unwrap_or(CONTEXT.min(config.max_position));
    let in_memory = |precision: Precision| precision.bytes() as u64 * accounting.total;
    let layers = layers(&config, &checkpoint, masks.as_ref());
    let (rope, window_rope) = (&config.architecture.ropes[0], config.architecture.ropes.get(1));
    let report = InspectReport {
        model: args.model.clone(),
        model_type: config.model_type(),
        family: config.family().model_type,
        switches: config.architecture.differences(),
        vocab_size: config.vocab_size,
        hidden: config.hidden,
        intermediate: config.intermediate,
        num_layers: config.num_layers,
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: rope.theta,
        rope_scaling: rope.scaling.name(),
        window_rope: window_rope.map(|rope| (rope.theta, rope.scaling.name())),
        max_position: config.max_position,
        tie_word_embeddings: config.tie_word_embeddings,
        bos_token_id: config.bos_token_id,
        eos_token_ids: config.eos_token_ids.clone(),
        experts: experts(&config),
        ffn: config.ffn.as_ref().map(|spec| OtherFfn {
            kind: spec.kind(),
            num_experts: config.num_experts().unwrap_or(0),
            active_experts: spec.active_experts(),
            settings: spec.settings(),
        }),
        masks: masks.as_ref().map(|masks| Masked {
            linears: masks.iter().len(),
            weights: masks.kept() + masks.pruned(),
            kept: masks.kept(),
        }),
        used_weights: config.thresholds.as_ref().map(|layers| {
            let used: Vec<_> = layers.iter().map(|layer| layer.used).collect();
            UsedShares::of(&config, &used)
        }),
        dtype: dtypes(
            checkpoint
                .names()
                .filter(|name| !is_router(name))
                .filter_map(|name| checkpoint.tensor(name))
                .filter(|t| t.dtype.is_float())
                .map(TensorView::stored_as),
        ),
        shards: checkpoint.files().count(),
        tensors: checkpoint.names().count(),
        bytes: file_bytes(&checkpoint)?,
        weight_bytes: InMemory { f32: in_memory(Precision::F32), bf16: in_memory(Precision::Bf16) },
        params_total: accounting.total,
        params_non_ffn: accounting.non_ffn,
        params_embedding: accounting.embedding,
        params_router: accounting.router,
        mean_active: active,
        params_activated: accounting.activated(active.unwrap_or(0.0)),
        context,
        flops_per_token: accounting.flops_per_token(active.unwrap_or(0.0), context as f64),
        notices: config.notices().to_vec(),
        layers,
    };
    ui.result(&report, show)
}

/// Returns the number of active experts to count with, of the `mean` number of experts of a layer; none for a dense model.
fn active_experts(args: &Inspect, config: &Config, mean: f64) -> Result<Option<f64>> {
    match (config.num_experts(), config.fixed_active(), args.mean_active) {
        (None, _, None) => Ok(None),
        (None, _, Some(_)) => bail!("--mean-active: {} has no experts; leave it out", args.model.display()),
        (Some(_), Some(fixed), None) => Ok(Some(fixed)),
        (Some(experts), Some(fixed), Some(_)) => {
            bail!("--mean-active: every token runs {fixed} of {experts} experts; leave it out")
        }
        (Some(_), None, None) => {
            // The thresholds in use are those of a budget, or may open all.
            let budget = config.moe.as_ref().and_then(MoeConfig::budget);
            Ok(Some(budget.unwrap_or(1.0) * mean))
        }
        (Some(_), None, Some(k)) if (0.0..=mean).contains(&k) => Ok(Some(k)),
        (Some(_), None, Some(k)) => bail!("--mean-active {k} is out of range; use 0 to {mean}"),
    }
}

fn experts(config: &Config) -> Option<Experts> {
    let moe = config.moe.as_ref()?;
    Some(Experts {
        num_experts: moe.router.num_experts,
        experts_per_layer: moe.parts.experts.clone(),
        expert_width: (0..config.num_layers)
            .map(|layer| config.layer(layer).intermediate / moe.experts(layer))
            .max()
            .unwrap_or(0),
        threshold: moe.threshold(),
        expert_map: moe.parts.maps.as_deref().map(lists_of_maps).unwrap_or_default(),
        core: moe.parts.core.clone(),
        router_rank: moe.parts.router_rank,
        correction: moe.parts.correction,
        budgets: moe.parts.budgets.iter().map(|budget| budget.active).collect(),
        budget: moe.budget(),
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

impl Experts {
    /// Describes when a gate is open.
    fn thresholds(&self) -> String {
        let list = || self.budgets.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
        match (self.threshold, self.budget) {
            (None, Some(budget)) => format!("thresholds for budgets {} (in use: {budget})", list()),
            (threshold, _) => format!("threshold {}", threshold.unwrap_or_default()),
        }
    }

    /// Describes what the layers have beside routed experts; none without such parts.
    fn beside(&self) -> Option<String> {
        let mut parts = Vec::new();
        if let (Some(least), Some(most)) = (self.core.iter().min(), self.core.iter().max()) {
            let core = if least == most { least.to_string() } else { format!("{least}-{most}") };
            parts.push(format!("a core of {core} experts that always run"));
        }
        if let (Some(least), Some(most)) =
            (self.expert_map.iter().map(Vec::len).min(), self.expert_map.iter().map(Vec::len).max())
        {
            let gates = if least == most { least.to_string() } else { format!("{least}-{most}") };
            parts.push(format!("{gates} gates that share experts"));
        }
        parts.extend(self.router_rank.map(|rank| format!("routers of rank {rank}")));
        parts.extend(self.correction.then(|| "a correction of the output".to_owned()));
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn layers(config: &Config, checkpoint: &Checkpoint, masks: Option<&Masks>) -> Vec<Layer> {
    let layer = |(layer, shape): (usize, LayerShape)| Layer {
        layer,
        num_heads: shape.num_heads,
        num_kv_heads: shape.num_kv_heads,
        intermediate: shape.intermediate,
        attention: 0,
        ffn: 0,
        router: 0,
        norms: 0,
        pruned: 0,
        bytes: 0,
        dtype: String::new(),
    };
    let mut layers: Vec<Layer> = config.layers().enumerate().map(layer).collect();
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
            _ if rest.starts_with("self_attn.") && rest.ends_with("_proj.bias") => of.attention += values,
            _ if rest.starts_with("self_attn.") && tensor.dtype.is_float() && tensor.shape.len() == 2 => {
                of.attention += values;
            }
            "mlp.partition" => {}
            _ if is_router(name) => of.router += values,
            _ if rest.starts_with("mlp.") => of.ffn += values,
            _ if rest.ends_with("norm.weight") => of.norms += values,
            _ => {}
        }
        of.bytes += tensor.stored_len();
        of.pruned += masks.and_then(|masks| masks.get(name)).map_or(0, |mask| mask.pruned());
        if tensor.dtype.is_float() && !is_router(name) {
            names[layer].push(tensor.stored_as());
        }
    }
    for (layer, names) in layers.iter_mut().zip(names) {
        layer.dtype = dtypes(names.into_iter());
    }
    layers
}

/// Names the precision of the weights, such as `BF16`, or all of them.
fn dtypes(names: impl Iterator<Item = String>) -> String {
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    names.dedup();
    names.join("+")
}

/// Returns the model type, and that of the dense model where it is another and not LLaMA's.
fn kind(report: &InspectReport) -> String {
    match report.family {
        "llama" => report.model_type.to_owned(),
        family if family == report.model_type => family.to_owned(),
        family => format!("{} of {family}", report.model_type),
    }
}

fn show(report: &InspectReport) -> String {
    let tied = if report.tie_word_embeddings { "tied embedding" } else { "separate output head" };
    let mut fields = vec![
        ("model", format!("{} ({})", report.model.display(), kind(report))),
        (
            "shape",
            format!(
                "{} layers, hidden {}, intermediate {}, vocabulary {}, {tied}",
                report.num_layers,
                report.hidden,
                span(&report.layers, |layer| layer.intermediate),
                format::count(report.vocab_size as u64)
            ),
        ),
        (
            "attention",
            format!(
                "{} heads of {}, {} for keys and values; RoPE theta {}, scaling {}{}; {} positions",
                span(&report.layers, |layer| layer.num_heads),
                report.head_dim,
                span(&report.layers, |layer| layer.num_kv_heads),
                report.rope_theta,
                report.rope_scaling,
                report.window_rope.map_or(String::new(), |(theta, scaling)| {
                    format!(" (with a window: {theta}, {scaling})")
                }),
                format::count(report.max_position as u64)
            ),
        ),
    ];
    if !report.switches.is_empty() {
        fields.push(("family", report.switches.join(", ")));
    }
    fields.extend(report.notices.iter().map(|notice| ("note", notice.clone())));
    if let Some(experts) = &report.experts {
        let bias = if experts.router_bias { "with" } else { "without" };
        fields.push((
            "experts",
            format!(
                "{}{} of width {} per layer, {} partition, {}, {} gates, rescale {}, {} at zero active, \
                 router {bias} bias{}",
                experts
                    .experts_per_layer
                    .iter()
                    .min()
                    .map_or(String::new(), |fewest| format!("{fewest} to ")),
                experts.num_experts,
                experts.expert_width,
                experts.partition,
                experts.thresholds(),
                experts.gate_value,
                experts.rescale,
                experts.zero_active,
                if experts.ste { "" } else { ", no STE" }
            ),
        ));
        if let Some(beside) = experts.beside() {
            fields.push(("beside", beside));
        }
    }
    if let Some(ffn) = &report.ffn {
        let active = match ffn.active_experts {
            Some(active) => format!("{active} of {} experts for every token", ffn.num_experts),
            None => format!("{} experts", ffn.num_experts),
        };
        let settings = ffn.settings.iter().map(|(key, value)| format!(", {key} {value}"));
        fields.push(("ffn", format!("{}: {active}{}", ffn.kind, settings.collect::<String>())));
    }
    if let Some(masks) = &report.masks {
        let (kept, weights) = (format::count(masks.kept), format::count(masks.weights));
        let density = format::percent(masks.kept as f64 / masks.weights.max(1) as f64);
        fields.push((
            "masks",
            format!("{kept} of {weights} weights of {} linears kept ({density})", masks.linears),
        ));
    }
    if let Some(used) = &report.used_weights {
        fields.push(("used weights", used_weights(used)));
    }
    fields.push((
        "files",
        format!(
            "{} in {} ({} tensors, {})",
            format::bytes(report.bytes),
            if report.shards == 1 { "1 file".to_owned() } else { format!("{} shards", report.shards) },
            report.tensors,
            report.dtype
        ),
    ));
    let InMemory { f32, bf16 } = report.weight_bytes;
    let [f32, bf16] = [f32, bf16].map(format::bytes);
    fields.push(("memory", format!("{f32} of weights in f32, {bf16} in bf16, and padding")));
    fields.push((
        "parameters",
        format!(
            "{} in all; {} outside the FFNs, {} of them in embeddings",
            format::count(report.params_total),
            format::count(report.params_non_ffn),
            format::count(report.params_embedding)
        ),
    ));
    let at = match report.mean_active {
        Some(k) => format!(" with {k} experts active"),
        None => String::new(),
    };
    fields.push((
        "activated",
        format!("{} per token{at}", format::count(report.params_activated.round() as u64)),
    ));
    fields.push((
        "arithmetic",
        format!(
            "{} FLOPs per token{at}, after {} tokens",
            format::flops(report.flops_per_token),
            report.context
        ),
    ));

    format!("{}\n{}", format::fields(fields), table(report))
}

/// Lists the layers: their sizes where these differ, and the weights that masks remove.
fn table(report: &InspectReport) -> String {
    type Column = (&'static str, fn(&Layer) -> String);
    let sizes: [Column; 3] = [
        ("heads", |layer| layer.num_heads.to_string()),
        ("kv heads", |layer| layer.num_kv_heads.to_string()),
        ("neurons", |layer| layer.intermediate.to_string()),
    ];
    let mut columns: Vec<Column> = vec![("layer", |layer| layer.layer.to_string())];
    if sizes.iter().any(|(_, size)| report.layers.iter().any(|layer| size(layer) != size(&report.layers[0])))
    {
        columns.extend(sizes);
    }
    columns.push(("attention", |layer| format::count(layer.attention)));
    columns.push(("ffn", |layer| format::count(layer.ffn)));
    columns.push(("router", |layer| format::count(layer.router)));
    columns.push(("norms", |layer| format::count(layer.norms)));
    if report.masks.is_some() {
        columns.push(("pruned", |layer| format::count(layer.pruned)));
    }
    columns.push(("bytes", |layer| format::bytes(layer.bytes)));
    columns.push(("dtype", |layer| layer.dtype.clone()));
    let mut table = Table::new(columns.iter().map(|(title, _)| *title));
    for layer in &report.layers {
        table.row(columns.iter().map(|(_, value)| value(layer)));
    }
    table.show()
}

/// Formats a size of all layers: one number, or the smallest and the largest.
fn span(layers: &[Layer], size: impl Fn(&Layer) -> usize) -> String {
    let sizes = || layers.iter().map(&size);
    match (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0)) {
        (least, most) if least == most => most.to_string(),
        (least, most) => format!("{least} to {most}"),
    }
}
