//! The tensors of a decoder, where they lie in the arena, and the checks and tables that all passes share.

use std::ops::Range;

use dsmoe_kernels::attention::{self, Scores};
use dsmoe_kernels::cross_entropy;

use crate::checkpoint::{EMBEDDING, LayerNorm, attention_name, ffn_name};
use crate::config::{Architecture, Config, LayerShape};
use crate::error::{Error, Result};
use crate::ffn::{self, Ffn};
use crate::params::{Layout, TensorSpec};

/// Arena ranges of one decoder layer. A norm or a bias that the family does not have is none.
#[derive(Clone, Debug)]
pub(crate) struct LayerRanges {
    pub(crate) before_attention: Option<Range<usize>>,
    pub(crate) q: Range<usize>,
    pub(crate) k: Range<usize>,
    pub(crate) v: Range<usize>,
    pub(crate) o: Range<usize>,
    /// Biases of q, k and v, one vector.
    pub(crate) qkv_bias: Option<Range<usize>>,
    pub(crate) o_bias: Option<Range<usize>>,
    /// Norms of queries and of keys.
    pub(crate) qk_norm: Option<[Range<usize>; 2]>,
    pub(crate) after_attention: Option<Range<usize>>,
    pub(crate) before_ffn: Option<Range<usize>>,
    pub(crate) ffn: Range<usize>,
    pub(crate) after_ffn: Option<Range<usize>>,
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
    let embed = layout.push(TensorSpec::matrix(EMBEDDING, config.vocab_size, hidden), None);
    let layers =
        ffns.iter().enumerate().map(|(i, ffn)| lay_out_layer(&mut layout, config, i, &**ffn)).collect();
    let norm = layout.push(TensorSpec::norm("model.norm.weight", hidden), None);
    let head = if config.tie_word_embeddings {
        embed.clone()
    } else {
        layout.push(TensorSpec::matrix("lm_head.weight", config.vocab_size, hidden), None)
    };
    (layout, Ranges { embed, layers, norm, head })
}

fn lay_out_layer(layout: &mut Layout, config: &Config, i: usize, ffn: &dyn Ffn) -> LayerRanges {
    let (hidden, architecture) = (config.hidden, &config.architecture);
    let [q_width, kv_width] = config.attention_widths(i);
    let name = |suffix: String| attention_name(i, &suffix);
    let widths = [("q", q_width), ("k", kv_width), ("v", kv_width)];
    let [q, k, v] = layout.push_joined(
        widths.map(|(which, rows)| TensorSpec::matrix(name(format!("{which}_proj.weight")), rows, hidden)),
        Some(i),
    );
    let o = layout.push(TensorSpec::matrix(name("o_proj.weight".to_owned()), hidden, q_width), Some(i));
    let [before_attention, after_attention, before_ffn, after_ffn] = LayerNorm::ALL.map(|norm| {
        let name = norm.name(architecture.norms, i)?;
        Some(layout.push(TensorSpec::norm(name, hidden), Some(i)))
    });
    let qkv_bias = architecture.qkv_bias.then(|| {
        let specs = widths.map(|(which, rows)| TensorSpec::bias(name(format!("{which}_proj.bias")), rows));
        let [q, _, v] = layout.push_joined(specs, Some(i));
        q.start..v.end
    });
    let o_bias = architecture
        .o_bias
        .then(|| layout.push(TensorSpec::bias(name("o_proj.bias".to_owned()), hidden), Some(i)));
    let qk_norm = config.qk_norm_widths(i).map(|widths| {
        [("q", widths[0]), ("k", widths[1])].map(|(which, width)| {
            layout.push(TensorSpec::norm(name(format!("{which}_norm.weight")), width), Some(i))
        })
    });
    let start = layout.len();
    for mut spec in ffn.tensors() {
        spec.name = ffn_name(i, &spec.name);
        layout.push(spec, Some(i));
    }
    let ffn = start..layout.len();
    LayerRanges {
        before_attention,
        q,
        k,
        v,
        o,
        qkv_bias,
        o_bias,
        qk_norm,
        after_attention,
        before_ffn,
        ffn,
        after_ffn,
    }
}

/// Makes the error for a model without gates.
pub(crate) fn no_gates() -> Error {
    Error::argument("this model has no gates to set a threshold for", "convert it first")
}

/// Chooses the budget of the share `active` in `config`, and sets the threshold of every layer by `set`, which says
/// whether the layer has gates.
pub(crate) fn set_active(
    config: &mut Config,
    active: f64,
    set: impl FnMut(usize, f32) -> bool,
) -> Result<()> {
    let moe = config.moe.as_mut().ok_or_else(no_gates)?;
    set_thresholds(&moe.thresholds_for(active)?, set)?;
    moe.active_target = Some(active);
    Ok(())
}

/// Sets the threshold of every layer by `set`, which says whether the layer has gates.
pub(crate) fn set_thresholds(logits: &[f32], mut set: impl FnMut(usize, f32) -> bool) -> Result<()> {
    let all = logits.iter().enumerate().all(|(layer, &logit)| set(layer, logit));
    if all { Ok(()) } else { Err(no_gates()) }
}

/// Moves the threshold in `config`, in place of its budgets, and in the FFNs by `move_gates`, which says whether all have gates.
pub(crate) fn set_threshold(
    config: &mut Config,
    threshold: f32,
    move_gates: impl FnOnce() -> bool,
) -> Result<()> {
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::argument(format!("threshold {threshold} is outside 0..=1"), "use 0.5"));
    }
    match &mut config.moe {
        Some(moe) if move_gates() => {
            moe.router.threshold = threshold;
            moe.parts.budgets.clear();
        }
        _ => return Err(no_gates()),
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
    let Architecture { attn_scale: scale, attn_cap: cap, layers, .. } = &config.architecture;
    let scores = Scores { scale: *scale, window: layers[i].window, cap: *cap };
    attention::Dims { batch, queries, keys, heads, kv_heads, head_dim: config.head_dim, scores }
}

/// Returns how products of hidden states and head become logits.
pub(crate) fn logits_of(config: &Config) -> cross_entropy::Logits {
    let Architecture { logit_scale: scale, final_cap: cap, .. } = config.architecture;
    cross_entropy::Logits { scale, cap }
}

/// Sequences of one length, one after the other, with the tokens to predict.
///
/// ```
/// use dsmoe_core::model::{Batch, Workspace};
/// use dsmoe_kernels::cross_entropy::IGNORE;
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // Two sequences; the last token of each has no target.
/// let (inputs, targets) = ([1, 5, 9, 1, 7, 3], [5, 9, IGNORE, 7, 3, IGNORE]);
/// let batch = Batch { inputs: &inputs, targets: &targets, seq: 3 };
/// let mut losses = [0.0; 6];
/// model.score(&mut losses, batch, None, &mut Workspace::default())?;
/// assert!(losses[1] > 0.0 && losses[2] == 0.0);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
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
