//! The memory of training: what one step keeps and works in.

use std::any::Any;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, cross_entropy, expert_ffn};
use dsmoe_router::RoutingStats;

use crate::config::{Config, LayerShape};
use crate::ffn::{Ffn, FfnScratch};
use crate::model::arena::Model;
use crate::model::memory::MemoryUse;
use crate::model::tensors::ffns_of;

/// Values that one layer's backward needs from its forward, beside its input. Normed inputs are recomputed from the residual
/// stream.
#[derive(Debug)]
pub(crate) struct LayerActs {
    pub(crate) rstd: Buf,
    /// Queries, keys and values, rotated.
    pub(crate) qkv: Buf,
    pub(crate) a: Buf,
    pub(crate) lse: Buf,
    /// Residual stream between attention and FFN.
    pub(crate) x_mid: Buf,
    pub(crate) rstd_mid: Buf,
    /// Queries, and keys, before their norm.
    pub(crate) heads: Option<[NormActs; 2]>,
    /// The outputs of attention and of the FFN before the norm that follows each of them.
    pub(crate) after: Option<[NormActs; 2]>,
    pub(crate) ffn: Box<dyn Any + Send>,
}

/// Values that the backward of a norm needs: its input and 1 / the root mean square of each row of it.
#[derive(Debug)]
pub(crate) struct NormActs {
    pub(crate) x: Buf,
    pub(crate) rstd: Buf,
}

/// Activations and scratch of training in one precision, sized for a number of tokens and reused every step.
///
/// ```
/// use dsmoe_core::model::TrainWorkspace;
/// # let model = dsmoe_core::Model::new(dsmoe_core::init::preset("tiny")?);
/// use dsmoe_kernels::Precision;
///
/// // What would 512 tokens take, with the activations of all layers and without?
/// let bytes = |recompute| -> usize {
///     TrainWorkspace::memory(model.config(), 512, 1.0, recompute).iter().map(|part| part.bytes).sum()
/// };
/// assert!(bytes(true) < bytes(false));
/// let workspace = TrainWorkspace::new(&model, 4, Precision::F32); // room for 4 tokens
/// # drop(workspace);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct TrainWorkspace {
    pub(crate) precision: Precision,
    tokens: usize,
    /// The residual stream before every layer and after the last.
    pub(crate) streams: Vec<Buf>,
    /// The values that layers keep: one of each layer, or of each kind of layer.
    pub(crate) kept: Vec<LayerActs>,
    /// The one that a layer has.
    pub(crate) of_layer: Vec<usize>,
    /// The first layer whose attention gave a value that is not finite, of those that do not keep it.
    pub(crate) attention_not_finite: Option<usize>,
    pub(crate) rstd: Buf,
    /// Normed input of the block at work.
    pub(crate) h: Buf,
    pub(crate) losses: Buf,
    /// Divergences from a teacher; empty without one.
    pub(crate) divergences: Buf,
    /// Output of a block before it joins the residual stream; on the way back the gradient of a block's input.
    pub(crate) y: Buf,
    /// Gradient of the residual stream.
    pub(crate) dx: Buf,
    /// Gradient of what a block adds to it, where it is another.
    pub(crate) dbranch: Buf,
    pub(crate) dqkv: Buf,
    pub(crate) da: Buf,
    pub(crate) head: cross_entropy::Scratch,
    pub(crate) scratch: FfnScratch,
    pub(crate) stats: Option<RoutingStats>,
}

/// Values per token.
#[derive(Clone, Copy)]
struct Widths {
    hidden: usize,
    qkv: usize,
    /// Attention's output.
    attention: usize,
    heads: usize,
}

impl Widths {
    fn of(config: &Config, heads: usize, kv_heads: usize) -> Widths {
        let (attention, kv) = (heads * config.head_dim, kv_heads * config.head_dim);
        Widths { hidden: config.hidden, qkv: attention + 2 * kv, attention, heads }
    }

    /// Returns the widths of [`LayerActs`] in order, without norms of heads, norms after a block, and the FFN.
    fn layer(self) -> [usize; 6] {
        [1, self.qkv, self.attention, self.heads, self.hidden, 1]
    }

    /// Returns the widths of the buffers of [`TrainWorkspace`] in order.
    fn shared(self, config: &Config) -> [usize; 8] {
        let dbranch = if scales_branches(config) { self.hidden } else { 0 };
        [1, self.hidden, 1, self.hidden, self.hidden, dbranch, self.qkv, self.attention]
    }
}

/// Returns whether what a block gives has another gradient than the residual stream.
fn scales_branches(config: &Config) -> bool {
    config.architecture.norms_after() || config.architecture.residual_scale != 1.0
}

/// Returns the widths of inputs and of root mean squares of the norms of queries and of keys.
fn head_norm_widths(config: &Config, i: usize) -> Option<[[usize; 2]; 2]> {
    let (widths, norms) = (config.attention_widths(i), config.qk_norm_widths(i)?);
    Some([0, 1].map(|k| [widths[k], widths[k] / norms[k]]))
}

/// Returns the widths of inputs and of root mean squares of the norms after attention and after the FFN.
fn after_norm_widths(config: &Config) -> Option<[[usize; 2]; 2]> {
    config.architecture.norms_after().then_some([[config.hidden, 1]; 2])
}

/// Returns for every layer the first one of its kind: what one of them keeps has room for any other.
fn kinds(config: &Config, ffns: &[Box<dyn Ffn>]) -> Vec<usize> {
    let kind = |i: usize| {
        let LayerShape { num_heads, num_kv_heads, .. } = config.layer(i);
        let saved = ffns[i].new_saved(0);
        ((*saved).type_id(), [num_heads, num_kv_heads], ffns[i].tensors())
    };
    let mut firsts = Vec::new();
    let mut first_of = |i| {
        let own = kind(i);
        if let Some((first, _)) = firsts.iter().find(|(_, other)| *other == own) {
            return *first;
        }
        firsts.push((i, own));
        i
    };
    (0..ffns.len()).map(&mut first_of).collect()
}

impl TrainWorkspace {
    /// Makes a workspace for micro-batches of `tokens` tokens of `model`; operands of matrix products are rounded to
    /// `precision` (routers stay f32).
    pub fn new(model: &Model, tokens: usize, precision: Precision) -> TrainWorkspace {
        let each = (0..model.ffns.len()).collect();
        TrainWorkspace::keeping(model, tokens, precision, each)
    }

    /// Does as [`TrainWorkspace::new`], but keeps the input of every layer alone: the backward pass runs the forward pass of a
    /// layer again. Results are the same to the bit.
    pub fn recomputing(model: &Model, tokens: usize, precision: Precision) -> TrainWorkspace {
        TrainWorkspace::keeping(model, tokens, precision, kinds(&model.config, &model.ffns))
    }

    /// Makes a workspace in which layers of the same number in `firsts` share what they keep.
    fn keeping(model: &Model, tokens: usize, precision: Precision, firsts: Vec<usize>) -> TrainWorkspace {
        let config = &model.config;
        let room = |width: usize| Buf::zeros(tokens * width);
        let norms = |[x, rstd]: [usize; 2]| NormActs { x: room(x), rstd: room(rstd) };
        let layer = |i: usize| {
            let shape = config.layer(i);
            let widths = Widths::of(config, shape.num_heads, shape.num_kv_heads);
            let [rstd, qkv, a, lse, x_mid, rstd_mid] = widths.layer().map(room);
            let heads = head_norm_widths(config, i).map(|widths| widths.map(norms));
            let after = after_norm_widths(config).map(|widths| widths.map(norms));
            let ffn = model.ffns[i].new_saved(tokens);
            LayerActs { rstd, qkv, a, lse, x_mid, rstd_mid, heads, after, ffn }
        };
        let mut distinct = firsts.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let place = |first: &usize| distinct.iter().position(|other| other == first).unwrap_or(0);
        let of_layer = firsts.iter().map(place).collect();
        let kept = distinct.iter().map(|&i| layer(i)).collect();
        let streams = (0..=firsts.len()).map(|_| room(config.hidden)).collect();
        // Room for the widest layer.
        let widest = Widths::of(config, config.num_heads, config.num_kv_heads);
        let [rstd, h, losses, y, dx, dbranch, dqkv, da] = widest.shared(config).map(room);
        let mut head = cross_entropy::Scratch::new(precision);
        head.reserve(cross_entropy::Dims { tokens, hidden: config.hidden, vocab: config.vocab_size });
        let experts = expert_ffn::Scratch::new(precision);
        let mut scratch = FfnScratch { experts, ..FfnScratch::default() };
        for ffn in &model.ffns {
            ffn.reserve(&mut scratch, tokens);
        }
        let stats = model.new_stats();
        TrainWorkspace {
            precision,
            tokens,
            streams,
            kept,
            of_layer,
            attention_not_finite: None,
            rstd,
            h,
            losses,
            divergences: Buf::default(),
            y,
            dx,
            dbranch,
            dqkv,
            da,
            head,
            scratch,
            stats,
        }
    }

    /// Returns the memory of a workspace for `tokens` tokens of a model of `config`, when `active` is the share of its
    /// experts that a token runs; of [`TrainWorkspace::recomputing`] if `recompute` is set.
    pub fn memory(config: &Config, tokens: usize, active: f64, recompute: bool) -> Vec<MemoryUse> {
        let layer = |i: usize| {
            let shape = config.layer(i);
            let widths = Widths::of(config, shape.num_heads, shape.num_kv_heads);
            let norms = head_norm_widths(config, i).into_iter().chain(after_norm_widths(config));
            let norms: usize = norms.flatten().flatten().sum();
            // An FFN keeps what gate and up give.
            widths.layer().iter().sum::<usize>() + norms + 2 * shape.intermediate
        };
        let firsts =
            if recompute { kinds(config, &ffns_of(config)) } else { (0..config.num_layers).collect() };
        let distinct = firsts.iter().enumerate().filter(|(i, first)| i == *first);
        let kept: usize = distinct.map(|(i, _)| layer(i)).sum();
        let streams = config.hidden * (config.num_layers + 1);
        let shared = Widths::of(config, config.num_heads, config.num_kv_heads).shared(config);
        let head = cross_entropy::Dims { tokens, hidden: config.hidden, vocab: config.vocab_size };
        // An FFN at work holds one activation of every pair, and five of the active ones.
        let ffn = config.intermediate as f64 * (1.0 + 5.0 * active);
        let f32s = |what, values: usize| MemoryUse { what, bytes: values.saturating_mul(4) };
        vec![
            f32s("  kept activations", tokens.saturating_mul(kept)),
            f32s("  residual stream", tokens.saturating_mul(streams + shared.iter().sum::<usize>())),
            f32s("  FFN at work", (tokens as f64 * ffn) as usize),
            f32s("  logits", head.chunk().min(tokens) * config.vocab_size),
        ]
    }

    /// Returns whether the backward pass runs the forward pass of layer `i` again.
    pub(crate) fn recomputes(&self, i: usize) -> bool {
        let own = self.of_layer[i];
        self.of_layer[i + 1..].contains(&own)
    }

    /// Counts the logits of the routers in all further steps, for [`RoutingStats::logits`] of
    /// [`TrainWorkspace::stats`].
    pub fn count_logits(&mut self) {
        self.stats = self.stats.take().map(RoutingStats::with_logits);
    }

    /// Returns the routing of the last step; none without routers.
    pub fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }

    /// Returns the number of tokens of a micro-batch.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns the first place of the forward pass with a value that is not finite.
    pub(crate) fn first_non_finite(&self) -> String {
        let layers = self.of_layer.len();
        for i in 0..layers {
            if is_not_finite(&self.streams[i]) {
                return match i {
                    0 => "embedding".to_owned(),
                    _ => format!("layer {} ffn", i - 1),
                };
            }
            let of_attention = match self.recomputes(i) {
                true => self.attention_not_finite == Some(i),
                false => is_not_finite(&self.kept[self.of_layer[i]].x_mid),
            };
            if of_attention {
                return format!("layer {i} attention");
            }
        }
        match is_not_finite(&self.streams[layers]) {
            true => format!("layer {} ffn", layers - 1),
            false => "head".to_owned(),
        }
    }
}

/// Returns whether a value is a NaN or an infinity.
pub(crate) fn is_not_finite(values: &[f32]) -> bool {
    values.iter().any(|x| !x.is_finite())
}
