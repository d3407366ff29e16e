//! Parts that training and inference on a GPU share. Both compute what the CPU does, with the operands of products rounded
//! to bf16.

pub(crate) mod hosted;

use std::ops::Range;

use dsmoe_kernels::attention::Scores;
use dsmoe_kernels::cuda::Gpu;
use dsmoe_kernels::cuda::ops::attention::Heads;
use dsmoe_kernels::cuda::ops::{ffn, router};
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};

use super::ropes::Ropes;
use crate::config::{Config, LayerShape};
use crate::error::{Error, Result};
use crate::ffn::{DeviceFfn, Ffn};
use crate::model::train::MemoryUse;
use crate::params::padded;

/// Returns the forms of the FFNs of a model of `config` on a device.
///
/// # Errors
/// The model has a switch that no GPU kernel has, or an FFN that only the host runs.
pub(crate) fn device_ffns(config: &Config, ffns: &[Box<dyn Ffn>]) -> Result<Vec<DeviceFfn>> {
    let missing = missing(config);
    if !missing.is_empty() {
        let problem =
            format!("a GPU does not run {} with {}", config.family().model_type, missing.join(", "));
        return Err(Error::argument(problem, "set {device} to cpu"));
    }
    let form = |(layer, ffn): (usize, &Box<dyn Ffn>)| {
        ffn.on_device().ok_or_else(|| {
            let problem = match ffn.host_only() {
                parts if parts.is_empty() => {
                    format!("layer {layer}: this kind of FFN does not run on a GPU")
                }
                parts => format!("layer {layer}: a GPU does not run {}", parts.join(", ")),
            };
            Error::argument(problem, "set {device} to cpu")
        })
    };
    ffns.iter().enumerate().map(form).collect()
}

/// Returns the switches of `config` that no GPU kernel has, in words.
fn missing(config: &Config) -> Vec<String> {
    let architecture = &config.architecture;
    let mut missing = architecture.differences();
    if architecture.attn_scale != Scores::plain(config.head_dim).scale {
        missing.push(format!("attention scores times {}", architecture.attn_scale));
    }
    if architecture.ropes.len() > 1 {
        missing.push("two rotations".to_owned());
    }
    for rope in &architecture.ropes {
        if rope.width != config.head_dim {
            missing.push(format!("{} of {} values of a head rotated", rope.width, config.head_dim));
        }
        if rope.scaling.varies() {
            missing.push(format!("{} scaling of the rotation", rope.scaling.name()));
        }
    }
    missing
}

/// Returns the range of a norm that a model of LLaMA's switches has.
pub(crate) fn norm(range: &Option<Range<usize>>) -> &Range<usize> {
    range.as_ref().expect("a model that was checked to have LLaMA's switches")
}

/// Refuses a plan that the device's free memory does not hold.
pub(crate) fn check_memory(gpu: &Gpu, plan: &[MemoryUse], help: &'static str) -> Result<()> {
    let (free, _) = gpu.memory()?;
    let wanted: usize = plan.iter().map(|part| part.bytes).sum();
    if wanted <= free {
        return Ok(());
    }
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let largest = plan.iter().max_by_key(|part| part.bytes).map_or("", |part| part.what);
    let (name, wanted, free) = (gpu.name(), gib(wanted), gib(free));
    let problem =
        format!("{name}: {wanted:.1} GiB are needed, most of it {largest}, and {free:.1} GiB are free");
    Err(Error::argument(problem, help))
}

/// Converts a router's settings to those of the kernels.
pub(crate) fn gates(config: &RouterConfig) -> router::Gates {
    router::Gates {
        num_experts: config.num_experts,
        threshold_logit: config.threshold_logit(),
        binary: config.gate_value == GateValue::Binary,
        rescale: config.rescale == Rescale::Eq8,
        force_argmax: config.zero_active == ZeroActive::ForceArgmax,
        ste: config.ste,
    }
}

/// Returns the heads of layer `i`.
pub(crate) fn heads(config: &Config, i: usize) -> Heads {
    let LayerShape { num_heads: heads, num_kv_heads: kv_heads, .. } = config.layer(i);
    Heads { heads, kv_heads, head_dim: config.head_dim, scores: Scores::plain(config.head_dim) }
}

/// Returns the heads of the widest layer, which is unpruned.
pub(crate) fn widest_heads(config: &Config) -> Heads {
    let Config { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    Heads { heads, kv_heads, head_dim, scores: Scores::plain(head_dim) }
}

/// Returns cosines and sines of the first `positions` positions, `[positions, head_dim]`.
pub(crate) fn rope_rows(config: &Config, positions: usize) -> Vec<f32> {
    let ropes = Ropes::new(config);
    let Some(table) = ropes.table(0, positions) else { return Vec::new() };
    (0..positions)
        .flat_map(|p| {
            let (cos, sin) = table.angles(p);
            [cos, sin].concat()
        })
        .collect()
}

/// Returns the sizes of an FFN for a pass over `tokens` tokens.
pub(crate) fn ffn_dims(ffn: &DeviceFfn, tokens: usize) -> ffn::Dims {
    let num_experts = ffn.num_experts().unwrap_or(1);
    ffn::Dims { tokens, hidden: ffn.hidden(), intermediate: ffn.intermediate(), num_experts }
}

/// Returns the sizes of an FFN with experts whose products run over lists of active pairs.
pub(crate) fn by_lists(gpu: &Gpu, ffn: &DeviceFfn, tokens: usize) -> Option<ffn::Dims> {
    ffn.num_experts().map(|_| ffn_dims(ffn, tokens)).filter(|dims| dims.fit_lists(gpu))
}

/// Returns the places of the router's weight and bias in an FFN's parameters.
pub(crate) fn router_ranges(hidden: usize, intermediate: usize, n: usize) -> [Range<usize>; 2] {
    let start = 3 * padded(hidden * intermediate);
    let bias = start + padded(n * hidden);
    [start..start + n * hidden, bias..bias + n]
}
