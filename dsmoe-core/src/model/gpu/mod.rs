//! Parts that training and inference on a GPU share. Both compute what the CPU does, with the operands of products rounded
//! to bf16.

pub(crate) mod block;
pub(crate) mod ffn;
pub(crate) mod gating;
pub(crate) mod hosted;
pub(crate) mod turns;

use dsmoe_kernels::attention::{self, Scores};
use dsmoe_kernels::cuda::ops::attention::{Heads, MAX_HEAD_DIM};
use dsmoe_kernels::cuda::ops::choice::{Choice, Device, ExpertKernels, Passes, Variants, choose};
use dsmoe_kernels::cuda::ops::slots::Shape;
use dsmoe_kernels::cuda::ops::{self, router};
use dsmoe_kernels::cuda::{Gpu, GpuBuf};
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::ffn::{DeviceFfn, Ffn, FfnKind, Gated, Gating};
use crate::model::memory::MemoryUse;
use crate::model::tensors::attention_dims;

/// Neurons that an expert has at least where products run over lists of active pairs. Tiles of narrower experts are mostly
/// empty: products of all pairs take less time, and sums of tokens less memory.
const LEAST_WIDTH: usize = 64;

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
    let form = |(layer, ffn): (usize, &dyn Ffn)| {
        ffn.on_device().ok_or_else(|| {
            let spec = match ffn.kind() {
                Some(FfnKind::Spec(spec)) => Some(spec),
                Some(FfnKind::Dense | FfnKind::Dsmoe(_)) | None => config.ffn.clone(),
            };
            let kind = spec.map(|spec| format!(", which is of type {}", spec.kind())).unwrap_or_default();
            let problem = format!("a GPU does not run the FFN of layer {layer}{kind}");
            Error::argument(problem, "set {device} to cpu")
        })
    };
    ffns.iter().map(|ffn| &**ffn).enumerate().map(form).collect()
}

/// Returns the largest number of experts of a layer, which the memory that layers share is made for; none without routers.
pub(crate) fn most_experts<'a>(ffns: impl IntoIterator<Item = &'a DeviceFfn>) -> Option<usize> {
    ffns.into_iter().filter_map(DeviceFfn::num_experts).max()
}

/// Returns the switches of `config` that no GPU kernel has, in words.
fn missing(config: &Config) -> Vec<String> {
    let mut missing = Vec::new();
    if config.head_dim > MAX_HEAD_DIM {
        missing.push(format!("heads of {} values, more than {MAX_HEAD_DIM}", config.head_dim));
    }
    if config.thresholds.is_some() {
        missing.push("thresholds of inputs".to_owned());
    }
    if config.mixture().is_some_and(|spec| spec.shared.is_some()) {
        missing.push("a shared expert".to_owned());
    }
    if config.moe.as_ref().is_some_and(|moe| moe.parts.maps.is_some()) {
        missing.push("sigmoid gates that share experts".to_owned());
    }
    let scale = config.architecture.residual_scale;
    if scale != 1.0 && config.architecture.norms_after() {
        missing.push(format!("residual branches times {scale} behind norms"));
    }
    missing
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

/// Converts the settings of gates to those of the kernels.
pub(crate) fn gates(config: &RouterConfig) -> router::Gates {
    router::Gates {
        num_experts: config.num_experts,
        binary: config.gate_value == GateValue::Binary,
        rescale: config.rescale == Rescale::Eq8,
        force_argmax: config.zero_active == ZeroActive::ForceArgmax,
        ste: config.ste,
    }
}

/// Returns the heads of layer `i`.
pub(crate) fn heads(config: &Config, i: usize) -> Heads {
    let attention::Dims { heads, kv_heads, head_dim, scores, .. } = attention_dims(config, i, 0, [0, 0]);
    Heads { heads, kv_heads, head_dim, scores }
}

/// Returns the heads of the widest layer, which is unpruned.
pub(crate) fn widest_heads(config: &Config) -> Heads {
    let Config { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    Heads { heads, kv_heads, head_dim, scores: Scores::plain(head_dim) }
}

/// Returns the sizes of an FFN for a pass over `tokens` tokens.
pub(crate) fn ffn_dims(ffn: &DeviceFfn, tokens: usize) -> ops::ffn::Dims {
    let Gated { hidden, intermediate, .. } = *ffn.gated();
    ops::ffn::Dims { tokens, hidden, intermediate, num_experts: ffn.num_experts().unwrap_or(1) }
}

/// Returns the sizes of the routed experts of an FFN whose products run over lists of active pairs. Those kernels add no
/// biases.
pub(crate) fn by_lists(gpu: &Gpu, ffn: &DeviceFfn, tokens: usize) -> Option<ops::ffn::Dims> {
    let ([_, intermediate], hidden) = (ffn.cut(), ffn.gated().hidden);
    let dims =
        ffn.routed().map(|num_experts| ops::ffn::Dims { tokens, hidden, intermediate, num_experts })?;
    (is_wide(ffn) && !ffn.gated().bias && dims.fit_lists(gpu)).then_some(dims)
}

/// The share of active experts among those that have a gate, of a model that was made for none.
const UNKNOWN_SHARE: f64 = 0.5;

/// The kernels of the products of an FFN's experts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Experts {
    /// Products of all pairs.
    Dense,
    /// Products over lists of the active pairs of these sizes; those of the core are dense.
    Lists(ops::ffn::Dims),
    /// Products of the active pairs in slots, the core among them.
    Slots(Shape, Box<Variants>),
}

/// Chooses the kernels of an FFN. They depend on the device, the sizes and the configuration alone.
pub(crate) fn experts(gpu: &Gpu, config: &Config, ffn: &DeviceFfn, tokens: usize, passes: Passes) -> Experts {
    let lists = || by_lists(gpu, ffn, tokens).map_or(Experts::Dense, Experts::Lists);
    let Some(shape) = slots_shape(ffn, tokens) else { return lists() };
    match choose(gpu.expert_kernels(), &Device::of(gpu), &shape, passes, share(config, ffn)) {
        Choice::Dense => Experts::Dense,
        Choice::Lists => lists(),
        Choice::Slots(variants) => Experts::Slots(shape, Box::new(variants)),
    }
}

/// Returns the sizes of an FFN of which passes over up to `tokens` tokens may choose slots.
pub(crate) fn slots_at_most(gpu: &Gpu, ffn: &DeviceFfn, tokens: usize) -> Option<Shape> {
    let forced = match gpu.expert_kernels() {
        ExpertKernels::Lists => return None,
        ExpertKernels::Slots | ExpertKernels::Auto => ExpertKernels::Slots,
    };
    let shape = slots_shape(ffn, tokens)?;
    let choice = choose(forced, &Device::of(gpu), &shape, Passes::Inference, UNKNOWN_SHARE);
    matches!(choice, Choice::Slots(_)).then_some(shape)
}

/// Returns the sizes of an FFN whose pairs lie in slots as far as the experts are concerned. Those kernels add no biases to
/// projections.
pub(crate) fn slots_shape(ffn: &DeviceFfn, tokens: usize) -> Option<Shape> {
    let (Gated { hidden, bias, .. }, [core, rest]) = (*ffn.gated(), ffn.cut());
    let num_experts = ffn.routed().filter(|&n| n > 0 && rest.is_multiple_of(n))?;
    let shape = Shape { tokens, hidden, width: rest / num_experts, num_experts, core };
    (is_wide(ffn) && !bias && shape.fits()).then_some(shape)
}

/// Returns the configured share of active experts among those that have a gate.
fn share(config: &Config, ffn: &DeviceFfn) -> f64 {
    let target = config.moe.as_ref().and_then(|moe| moe.active_target);
    let (Some(target), Some(routed)) = (target, ffn.routed()) else { return UNKNOWN_SHARE };
    share_of_routed(target, ffn.core(), routed)
}

/// Converts a share of all experts to one of those that have a gate.
fn share_of_routed(target: f64, core: usize, routed: usize) -> f64 {
    let active = target * (core + routed) as f64 - core as f64;
    (active / routed.max(1) as f64).clamp(0.0, 1.0)
}

/// Returns the passes that training runs.
pub(crate) fn training_passes(ffn: &DeviceFfn) -> Passes {
    let all_pairs = matches!(ffn, DeviceFfn::Routed { form, .. } if form.router.ste);
    Passes::Training { all_pairs }
}

/// Tells whether products run over lists of active pairs as far as the experts are concerned.
pub(crate) fn is_wide(ffn: &DeviceFfn) -> bool {
    ffn.num_experts().is_some_and(|n| ffn.gated().intermediate >= LEAST_WIDTH * n)
}

/// Returns the largest rank of routers of low rank; 0 without them.
pub(crate) fn rank(ffns: &[DeviceFfn]) -> usize {
    ffns.iter().filter_map(|ffn| gating_of(ffn)?.rank).max().unwrap_or(0)
}

/// Returns the sizes of a router that the device computes.
pub(crate) fn gating_of(ffn: &DeviceFfn) -> Option<Gating> {
    let DeviceFfn::Routed { gated, form, .. } = ffn else { return None };
    Some(form.gating(gated.hidden))
}

/// Returns the thresholds of all layers: what a logit has to exceed, and where a gate is a half.
fn threshold_values<'a>(ffns: impl Iterator<Item = &'a DeviceFfn>) -> Vec<f32> {
    let of = |ffn: &DeviceFfn| match ffn {
        DeviceFfn::Routed { form, bar, centre, .. } => {
            let binary = form.router.gate_value == GateValue::Binary;
            [bar.unwrap_or(f32::NEG_INFINITY), if binary { *centre } else { 0.0 }]
        }
        DeviceFfn::Dense(_) | DeviceFfn::Hosted { .. } => [0.0; 2],
    };
    ffns.flat_map(of).collect()
}

/// Moves the thresholds of all layers to the device, `[layers, 2]`.
pub(crate) fn thresholds<'a>(gpu: &Gpu, ffns: impl Iterator<Item = &'a DeviceFfn>) -> Result<GpuBuf<f32>> {
    Ok(gpu.upload_rows(&threshold_values(ffns), 2)?)
}

/// Replaces the thresholds on the device.
pub(crate) fn move_thresholds<'a>(
    thresholds: &mut GpuBuf<f32>,
    ffns: impl Iterator<Item = &'a DeviceFfn>,
) -> Result<()> {
    Ok(thresholds.upload_from(&threshold_values(ffns))?)
}

#[cfg(test)]
mod tests {
    use super::share_of_routed;

    #[test]
    fn the_share_of_experts_with_a_gate_leaves_the_core_out() {
        assert_eq!(share_of_routed(0.375, 0, 8), 0.375);
        assert_eq!(share_of_routed(0.5, 2, 6), 2.0 / 6.0);
        assert_eq!(share_of_routed(0.25, 4, 4), 0.0);
        assert_eq!(share_of_routed(1.0, 1, 7), 1.0);
    }
}
