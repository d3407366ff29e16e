//! The tensors of a decoder, where they lie in the arena, and the checks and tables that all passes share.

use std::f64::consts::PI;
use std::ops::Range;

use dsmoe_kernels::{attention, rope};

use crate::checkpoint::ffn_name;
use crate::config::{Config, LayerShape, RopeScaling};
use crate::error::{Error, Result};
use crate::ffn::{self, Ffn};
use crate::params::{Layout, TensorSpec};

/// Arena ranges of one decoder layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerRanges {
    pub(crate) input_norm: Range<usize>,
    pub(crate) q: Range<usize>,
    pub(crate) k: Range<usize>,
    pub(crate) v: Range<usize>,
    pub(crate) o: Range<usize>,
    pub(crate) post_norm: Range<usize>,
    pub(crate) ffn: Range<usize>,
}

impl LayerRanges {
    /// Returns the range of q, k and v, which are one matrix.
    pub(crate) fn qkv(&self) -> Range<usize> {
        self.q.start..self.v.end
    }
}

/// Arena ranges of everything.
#[derive(Clone, Debug)]
pub(crate) struct Ranges {
    pub(crate) embed: Range<usize>,
    pub(crate) layers: Vec<LayerRanges>,
    pub(crate) norm: Range<usize>,
    /// Equal to `embed` when tied.
    pub(crate) head: Range<usize>,
}

/// Makes the FFNs that `config` asks for, one per layer.
pub(crate) fn ffns_of(config: &Config) -> Vec<Box<dyn Ffn>> {
    (0..config.num_layers).map(|i| ffn::of_layer(config, i)).collect()
}

/// Lays out all tensors and returns their ranges.
pub(crate) fn lay_out(config: &Config, ffns: &[Box<dyn Ffn>]) -> (Layout, Ranges) {
    let mut layout = Layout::default();
    let hidden = config.hidden;
    let embed = layout.push(TensorSpec::matrix("model.embed_tokens.weight", config.vocab_size, hidden), None);
    let layers = ffns
        .iter()
        .enumerate()
        .map(|(i, ffn)| {
            let LayerShape { num_heads, num_kv_heads, .. } = config.layer(i);
            let [q_width, kv_width] = [num_heads, num_kv_heads].map(|heads| heads * config.head_dim);
            let name = |suffix: &str| format!("model.layers.{i}.{suffix}.weight");
            let matrix = |suffix: &str, rows, cols| TensorSpec::matrix(name(suffix), rows, cols);
            let projections = [("q", q_width), ("k", kv_width), ("v", kv_width)]
                .map(|(which, rows)| matrix(&format!("self_attn.{which}_proj"), rows, hidden));
            let [q, k, v] = layout.push_joined(projections, Some(i));
            let o = layout.push(matrix("self_attn.o_proj", hidden, q_width), Some(i));
            let mut norm = |suffix: &str| layout.push(TensorSpec::norm(name(suffix), hidden), Some(i));
            let input_norm = norm("input_layernorm");
            let post_norm = norm("post_attention_layernorm");
            let start = layout.len();
            for mut spec in ffn.tensors() {
                spec.name = ffn_name(i, &spec.name);
                layout.push(spec, Some(i));
            }
            LayerRanges { input_norm, q, k, v, o, post_norm, ffn: start..layout.len() }
        })
        .collect();
    let norm = layout.push(TensorSpec::norm("model.norm.weight", hidden), None);
    let head = if config.tie_word_embeddings {
        embed.clone()
    } else {
        layout.push(TensorSpec::matrix("lm_head.weight", config.vocab_size, hidden), None)
    };
    (layout, Ranges { embed, layers, norm, head })
}

pub(crate) fn rope_table(config: &Config) -> rope::Table {
    let head_dim = config.head_dim;
    let plain = (0..head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / head_dim as f64));
    let frequencies = plain.map(|f| scaled(f, config.rope_scaling)).collect();
    rope::Table::new(frequencies, 1.0, config.max_position)
}

/// Returns a scaled frequency. Llama 3.1's rule, with wavelength l = 2 pi / f and
/// s = (original_max_position / l - low) / (high - low): f is kept for l < original_max_position / high, f / factor for
/// l > original_max_position / low, and (1 - s) f / factor + s f between.
fn scaled(f: f64, scaling: RopeScaling) -> f64 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } = scaling
    else {
        return f;
    };
    let (wavelength, original) = (2.0 * PI / f, original_max_position as f64);
    if wavelength < original / high_freq_factor {
        f
    } else if wavelength > original / low_freq_factor {
        f / factor
    } else {
        let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
        (1.0 - kept) * f / factor + kept * f
    }
}

/// Moves the threshold in `config`, and in the FFNs by `move_gates`, which says whether all have gates.
pub(crate) fn set_threshold(
    config: &mut Config,
    threshold: f32,
    move_gates: impl FnOnce() -> bool,
) -> Result<()> {
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::argument(format!("threshold {threshold} is outside 0..=1"), "use 0.5"));
    }
    match &mut config.moe {
        Some(moe) if move_gates() => moe.router.threshold = threshold,
        _ => {
            return Err(Error::argument(
                "this model has no gates to set a threshold for",
                "convert it first",
            ));
        }
    }
    Ok(())
}

/// Returns the sizes of the attention of layer `i` over `batch` sequences.
pub(crate) fn attention_dims(
    config: &Config,
    i: usize,
    batch: usize,
    [queries, keys]: [usize; 2],
) -> attention::Dims {
    let LayerShape { num_heads: heads, num_kv_heads: kv_heads, .. } = config.layer(i);
    let scores = attention::Scores::plain(config.head_dim);
    attention::Dims { batch, queries, keys, heads, kv_heads, head_dim: config.head_dim, scores }
}

/// Sequences of one length, one after the other, with the tokens to predict.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Tokens of all sequences.
    pub inputs: &'a [u32],
    /// The token to predict after each input; [`IGNORE`](dsmoe_kernels::cross_entropy::IGNORE) for none.
    pub targets: &'a [u32],
    /// Tokens of a sequence.
    pub seq: usize,
}

impl Batch<'_> {
    /// Checks that the sequences can be fed to a model of `config`.
    ///
    /// # Panics
    /// The slices' lengths differ, or are no multiple of `seq`.
    pub(crate) fn check(&self, config: &Config) -> Result<()> {
        let Batch { inputs, targets, seq } = self;
        assert!(
            targets.len() == inputs.len() && inputs.len().is_multiple_of(*seq),
            "batch: {} inputs, {} targets, seq {seq}",
            inputs.len(),
            targets.len()
        );
        check_input(config, inputs, 0, *seq)
    }
}

/// Checks that `ids` can be fed at positions `start..`.
pub(crate) fn check_input(config: &Config, ids: &[u32], start: usize, seq: usize) -> Result<()> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(Error::argument(
            format!("token id {id} is not below vocab_size {}", config.vocab_size),
            "use the model's own tokenizer",
        ));
    }
    if start + seq > config.max_position {
        return Err(Error::argument(
            format!(
                "{} positions are more than max_position_embeddings {}",
                start + seq,
                config.max_position
            ),
            "use shorter sequences",
        ));
    }
    Ok(())
}

/// Runs `op` on a thread of the pool: a product started there wakes no thread that only waits for it, and queues
/// its tasks without allocating.
pub(crate) fn in_pool<R: Send>(op: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| op())
}
