//! Activations of a micro-batch, and the sums of a step.

use dsmoe_kernels::cuda::ops::choice::ExpertKernels;
use dsmoe_kernels::cuda::ops::{embedding, linear, optim, rms_norm, router};
use dsmoe_kernels::cuda::{Element, Gpu, GpuBuf};
use half::bf16;

use super::ffn::{Acts, Scratch};
use crate::config::Config;
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::model::gpu::{heads, most_experts, turns, widest_heads};

/// Bytes of logits at a time in the loss.
const LOGIT_BYTES: usize = 512 << 20;

/// Activations and scratch memory of a micro-batch. Matrices have a row per token.
#[derive(Debug)]
pub(super) struct Activations {
    pub(super) ids: GpuBuf<u32>,
    pub(super) targets: GpuBuf<u32>,
    pub(super) occurrences: embedding::Occurrences,
    /// Angles of a sequence, of each rotation.
    pub(super) angles: Vec<GpuBuf<f32>>,
    /// The weight of a norm that changes nothing, where routers read the residual stream itself.
    pub(super) ones: GpuBuf<f32>,
    /// The input of every layer, and last the output of the last one.
    pub(super) streams: Vec<Stream>,
    pub(super) layers: Vec<LayerActs>,
    pub(super) h: GpuBuf<bf16>,
    /// A block's output; in the backward pass the gradient of a block's input.
    pub(super) y: GpuBuf<f32>,
    pub(super) dx: GpuBuf<f32>,
    /// The gradient of a block's output, rounded.
    pub(super) dy: GpuBuf<bf16>,
    /// Layers with fewer heads use less of these two.
    pub(super) dqkv: GpuBuf<bf16>,
    pub(super) da: GpuBuf<bf16>,
    pub(super) deltas: GpuBuf<f32>,
    pub(super) ffn: Scratch,
    pub(super) partials: GpuBuf<f32>,
    pub(super) sums: GpuBuf<f64>,
    pub(super) losses: GpuBuf<f32>,
    /// `[logit_rows, vocab]`, as `dlogits`.
    pub(super) logits: GpuBuf<f32>,
    pub(super) dlogits: GpuBuf<bf16>,
}

/// The residual stream between two layers, with its norm. Where the next block reads the stream itself, `rstd` is 1.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) x: GpuBuf<f32>,
    pub(super) rstd: GpuBuf<f32>,
}

#[derive(Debug)]
pub(super) struct LayerActs {
    pub(super) qkv: GpuBuf<bf16>,
    pub(super) a: GpuBuf<bf16>,
    pub(super) lse: GpuBuf<f32>,
    /// As a [`Stream`], between attention and FFN.
    pub(super) x_mid: GpuBuf<f32>,
    pub(super) rstd_mid: GpuBuf<f32>,
    /// Queries, and keys, before their norm.
    pub(super) heads: Option<[NormActs<bf16>; 2]>,
    /// The outputs of attention and of the FFN before the norm that follows each of them.
    pub(super) after: Option<[NormActs<f32>; 2]>,
    pub(super) ffn: Acts,
}

/// The input of a norm, and 1 / the root mean square of each row of it.
#[derive(Debug)]
pub(super) struct NormActs<T: Element> {
    pub(super) x: GpuBuf<T>,
    pub(super) rstd: GpuBuf<f32>,
}

impl<T: Element> NormActs<T> {
    fn new(gpu: &Gpu, tokens: usize, [width, heads]: [usize; 2]) -> Result<NormActs<T>> {
        Ok(NormActs { x: gpu.zero_rows(tokens, width)?, rstd: gpu.zero_rows(tokens, heads)? })
    }

    fn pair(gpu: &Gpu, tokens: usize, [one, other]: [[usize; 2]; 2]) -> Result<[NormActs<T>; 2]> {
        Ok([NormActs::new(gpu, tokens, one)?, NormActs::new(gpu, tokens, other)?])
    }
}

/// Sums over the micro-batches of a step.
#[derive(Debug)]
pub(super) struct Report {
    /// `[loss, squares of all gradients, squares of routers' gradients]`
    pub(super) sums: GpuBuf<f64>,
    /// Per layer the sum of active gates and the sum of all gates, `[layers, 2]`.
    pub(super) gates: GpuBuf<f64>,
    /// Per layer the load of routed experts and the histogram of their number, up to `2 n + 1` values, n the most experts of a
    /// layer.
    pub(super) counts: GpuBuf<u64>,
    /// The factor of the gradients in an update: one value.
    pub(super) scale: GpuBuf<f32>,
}

impl Activations {
    pub(super) fn new(
        gpu: &Gpu,
        config: &Config,
        ffns: &[DeviceFfn],
        tokens: usize,
        seq: usize,
    ) -> Result<Activations> {
        let (hidden, widest, rows) = (config.hidden, widest_heads(config), logit_rows(config, tokens));
        let (before, after) = (config.architecture.norms_before(), config.architecture.norms_after());
        let rstd = || gpu.upload(&vec![if before { 0.0 } else { 1.0 }; tokens]);
        let layers = ffns.iter().enumerate().map(|(i, ffn)| {
            let heads = heads(config, i);
            let of_heads = head_norm_widths(config, i);
            Ok(LayerActs {
                qkv: gpu.zero_rows(tokens, heads.joined_width())?,
                a: gpu.zero_rows(tokens, heads.width())?,
                lse: gpu.zero_rows(tokens, heads.heads)?,
                x_mid: gpu.zero_rows(tokens, hidden)?,
                rstd_mid: rstd()?,
                heads: of_heads.map(|widths| NormActs::pair(gpu, tokens, widths)).transpose()?,
                after: after.then(|| NormActs::pair(gpu, tokens, [[hidden, 1]; 2])).transpose()?,
                ffn: Acts::new(gpu, config, ffn, tokens)?,
            })
        });
        let streams =
            (0..=ffns.len()).map(|_| Ok(Stream { x: gpu.zero_rows(tokens, hidden)?, rstd: rstd()? }));
        let deltas = (0..config.num_layers).map(|i| tokens * heads(config, i).heads).max();
        Ok(Activations {
            ids: gpu.zeros(tokens)?,
            targets: gpu.zeros(tokens)?,
            occurrences: embedding::Occurrences::with_room(gpu, tokens)?,
            angles: turns::of_sequences(gpu, config, seq)?,
            ones: gpu.upload(&vec![1.0; if before { 0 } else { hidden }])?,
            streams: streams.collect::<Result<_>>()?,
            layers: layers.collect::<Result<_>>()?,
            h: gpu.zero_rows(tokens, hidden)?,
            y: gpu.zero_rows(tokens, hidden)?,
            dx: gpu.zero_rows(tokens, hidden)?,
            dy: gpu.zero_rows(tokens, hidden)?,
            dqkv: gpu.zero_rows(tokens, widest.joined_width())?,
            da: gpu.zero_rows(tokens, widest.width())?,
            deltas: gpu.zeros(deltas.unwrap_or(0))?,
            ffn: Scratch::new(gpu, config, ffns, tokens)?,
            partials: gpu.zeros(partials_len(config, tokens))?,
            sums: gpu.zeros(optim::PARTIALS)?,
            losses: gpu.zeros(tokens)?,
            logits: gpu.zero_rows(rows, config.vocab_size)?,
            dlogits: gpu.zero_rows(rows, config.vocab_size)?,
        })
    }

    /// Returns the number of tokens of a micro-batch.
    pub(super) fn tokens(&self) -> usize {
        self.ids.len()
    }
}

impl Report {
    pub(super) fn new(gpu: &Gpu, ffns: &[DeviceFfn]) -> Result<Report> {
        let n = most_experts(ffns);
        Ok(Report {
            sums: gpu.zeros(3)?,
            gates: gpu.zero_rows(ffns.len(), 2)?,
            counts: gpu.zero_rows(ffns.len(), n.map_or(0, |n| 2 * n + 1))?,
            scale: gpu.zeros(1)?,
        })
    }

    pub(super) fn clear(&mut self) -> Result<()> {
        self.sums.fill_zero()?;
        self.gates.fill_zero()?;
        Ok(self.counts.fill_zero()?)
    }

    /// Counts the routing of layer `i`.
    pub(super) fn add(&mut self, i: usize, acts: &Acts) -> Result<()> {
        let Some(routed) = acts.routed() else { return Ok(()) };
        let (mut counts, sums) = (self.counts.part_mut(i..i + 1), &mut self.gates.part_mut(i..i + 1));
        let counts = &mut counts.shaped_mut(2 * routed.num_experts() + 1, 1);
        Ok(router::Stats { counts, sums, of_tokens: None, routed }.run()?)
    }
}

/// Returns the widths of inputs, and of reciprocal deviations, of the norms of queries and of keys.
fn head_norm_widths(config: &Config, i: usize) -> Option<[[usize; 2]; 2]> {
    let (widths, norms) = (config.attention_widths(i), config.qk_norm_widths(i)?);
    Some([0, 1].map(|k| [widths[k], widths[k] / norms[k]]))
}

/// Returns the number of values of the sums that the gradients of norms and biases are added up in.
fn partials_len(config: &Config, tokens: usize) -> usize {
    let Config { architecture, hidden, intermediate, .. } = config;
    let biases = [
        architecture.qkv_bias.then(|| widest_heads(config).joined_width()),
        architecture.o_bias.then_some(*hidden),
        architecture.mlp_bias.then_some(*hidden.max(intermediate)),
        architecture.output_bias.then_some(*hidden),
    ];
    let of_biases = biases.into_iter().flatten().map(|width| linear::partials_len(tokens, width));
    let of_heads = (0..config.num_layers).filter_map(|i| head_norm_widths(config, i)).flatten();
    let of_heads = of_heads.map(|[width, heads]| rms_norm::partials_len(tokens * heads, width / heads));
    of_biases.chain(of_heads).fold(rms_norm::partials_len(tokens, *hidden), usize::max)
}

/// Returns the bytes of the activations of all layers, and those of the memory that layers share.
pub(super) fn bytes(
    config: &Config,
    ffns: &[DeviceFfn],
    tokens: usize,
    kernels: ExpertKernels,
) -> [usize; 2] {
    let per_layer = ffns.iter().enumerate().map(|(i, ffn)| {
        let heads = heads(config, i);
        let of_heads = head_norm_widths(config, i).into_iter().flatten();
        let of_heads: usize = of_heads.map(|[width, heads]| 2 * width + 4 * heads).sum();
        let after = if config.architecture.norms_after() { 8 * (config.hidden + 1) } else { 0 };
        let attention = 2 * heads.joined_width() + 2 * heads.width() + 4 * heads.heads;
        tokens * (8 * config.hidden + attention + 8 + of_heads + after) + Acts::bytes(ffn, tokens, kernels)
    });
    let joined = widest_heads(config).joined_width();
    let widest = ffns.iter().map(|ffn| Scratch::bytes(ffn, tokens, kernels)).max().unwrap_or(0);
    let shared = tokens * (4 * 3 * config.hidden + 2 * 2 * config.hidden + 2 * 2 * joined)
        + widest
        + logit_rows(config, tokens) * config.vocab_size * 6;
    [per_layer.sum(), shared]
}

/// Returns the number of rows of logits at a time.
pub(super) fn logit_rows(config: &Config, tokens: usize) -> usize {
    (LOGIT_BYTES / (6 * config.vocab_size)).clamp(1, tokens.max(1))
}
