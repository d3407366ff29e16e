//! The LLaMA decoder over any [`Ffn`]: [`Model`], an arena of f32 parameters, to train, load and save; [`Inference`],
//! packed weights in a precision, to score and to decode.
//!
//! ```text
//! x = embed(ids)
//! per layer:  x += attention(rms_norm(x)) W_o^T;   x += ffn(rms_norm(x))
//! logits = rms_norm(x) W_head^T
//! ```

mod cache;
#[cfg(feature = "cuda")]
pub mod cuda;
mod infer;
mod inference;
mod pack;
mod ragged;
mod step;
mod train_workspace;

use std::ops::Range;
use std::path::Path;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rope;
use dsmoe_router::RoutingStats;

pub use cache::Cache;
use infer::CpuInference;
pub use infer::Workspace;
pub(crate) use infer::in_pool;
pub use inference::Inference;
pub use ragged::{After, Likelihood, Segment};
pub use step::{StepArgs, StepOutput};
pub use train_workspace::TrainWorkspace;

use crate::accounting::Accounting;
use crate::checkpoint::{Checkpoint, Dtype, TensorInfo, WeightReader, Writer, ffn_name, partition_name};
use crate::config::{Config, LayerShape, PartitionKind, RopeScaling};
use crate::error::{Error, Result};
use crate::ffn::{self, Ffn};
use crate::masks::Masks;
use crate::params::{Layout, Stored, TensorSpec};

/// Arena ranges of one decoder layer.
#[derive(Clone, Debug)]
struct LayerRanges {
    input_norm: Range<usize>,
    q: Range<usize>,
    k: Range<usize>,
    v: Range<usize>,
    o: Range<usize>,
    post_norm: Range<usize>,
    ffn: Range<usize>,
}

impl LayerRanges {
    /// q, k and v, which are one matrix.
    fn qkv(&self) -> Range<usize> {
        self.q.start..self.v.end
    }
}

/// Arena ranges of everything.
#[derive(Clone, Debug)]
struct Ranges {
    embed: Range<usize>,
    layers: Vec<LayerRanges>,
    norm: Range<usize>,
    /// Equal to `embed` when tied.
    head: Range<usize>,
}

/// A LLaMA decoder with its parameters in f32, for training.
#[derive(Debug)]
pub struct Model {
    config: Config,
    ffns: Vec<Box<dyn Ffn>>,
    layout: Layout,
    ranges: Ranges,
    params: Buf,
    rope: rope::Table,
    /// Per layer, the original neuron of each row of a permuted partition; carried from load to save.
    partitions: Option<Vec<Vec<i32>>>,
    masks: Option<Masks>,
}

impl Model {
    /// A model of `config` with the given FFNs, one per layer, and all parameters zero: the way in for FFNs of
    /// other crates.
    ///
    /// # Panics
    /// The number of FFNs is not the number of layers.
    pub fn with_ffns(config: Config, ffns: Vec<Box<dyn Ffn>>) -> Model {
        assert_eq!(ffns.len(), config.num_layers, "model: FFNs and layers");
        let (layout, ranges) = lay_out(&config, &ffns);
        let (params, rope) = (Buf::zeros(layout.len()), rope_table(&config));
        Model { config, ffns, layout, ranges, params, rope, partitions: None, masks: None }
    }

    /// A model of `config` with all parameters zero: dense, DSMoE, or with FFNs of another kind, as the configuration
    /// says.
    pub fn new(config: Config) -> Model {
        let ffns = ffns_of(&config);
        Model::with_ffns(config, ffns)
    }

    /// Loads a model directory: a dense LLaMA, DSMoE, or FFNs of a kind that is registered ([`ffn::register`]).
    ///
    /// # Errors
    /// Anything wrong with the directory; the message names the file, the field or tensor, and the mend.
    pub fn load(dir: &Path) -> Result<Model> {
        let config = Config::load(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let masks = Masks::read(dir, &config)?;
        let mut reader = WeightReader::new(&config, &checkpoint, masks.as_ref())?;
        let mut model = Model::new(config);
        for entry in model.layout.entries() {
            reader.read(&entry.spec, &mut model.params[entry.range.clone()])?;
        }
        model.masks = masks;
        if model.config.moe.as_ref().is_some_and(|moe| moe.partition == PartitionKind::Permuted) {
            let partitions = (0..model.config.num_layers).map(|i| checkpoint.read_i32(&partition_name(i)));
            model.partitions = Some(partitions.collect::<Result<_>>()?);
        }
        Ok(model)
    }

    /// Writes config.json, masks and the weights, in Hugging Face layout, to the existing directory `dir`; every file is
    /// synced. Routers and partitions stay f32 and i32 whatever `dtype` is.
    ///
    /// # Errors
    /// The file system refuses; the message names the file.
    pub fn save(&self, dir: &Path, dtype: Dtype) -> Result<()> {
        let mut infos = Vec::new();
        for entry in self.layout.entries() {
            let dtype = if entry.spec.router { Dtype::F32 } else { dtype };
            infos.push(TensorInfo { name: entry.spec.name.clone(), dtype, shape: entry.spec.stored_shape() });
        }
        for (i, order) in self.partitions.iter().flatten().enumerate() {
            infos.push(TensorInfo { name: partition_name(i), dtype: Dtype::I32, shape: vec![order.len()] });
        }
        let mut writer = Writer::create(dir, infos)?;
        for entry in self.layout.entries() {
            let values = &self.params[entry.range.clone()];
            match entry.spec.stored {
                Stored::AsIs => writer.write_f32(&entry.spec.name, values)?,
                Stored::Transposed => {
                    let (rows, cols) = (entry.spec.shape[0], entry.spec.shape[1]);
                    let mut transposed = vec![0.0; values.len()];
                    crate::checkpoint::transpose(&mut transposed, values, rows, cols);
                    writer.write_f32(&entry.spec.name, &transposed)?;
                }
            }
        }
        for (i, order) in self.partitions.iter().flatten().enumerate() {
            writer.write(&partition_name(i), bytemuck::cast_slice(order))?;
        }
        writer.finish()?;
        self.masks.iter().try_for_each(|masks| masks.save(dir))?;
        let mut config = self.config.clone();
        config.set_dtype(dtype);
        config.save(dir)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Parameter counts; of masked linears, what is kept counts as activated.
    pub fn accounting(&self) -> Accounting {
        let counts = Accounting::of(&self.config);
        self.masks.as_ref().map_or(counts, |masks| counts.with_masks(masks))
    }

    /// Which weights of pruned linears are kept; none where nothing is pruned.
    pub fn masks(&self) -> Option<&Masks> {
        self.masks.as_ref()
    }

    /// Prunes: sets what `masks` does not keep to 0, and has it stay so in training.
    ///
    /// # Errors
    /// A mask is of no linear of this model, or of another shape.
    pub fn set_masks(&mut self, masks: Masks) -> Result<()> {
        masks.check(&self.config)?;
        masks.apply(&mut self.params, &self.layout);
        self.masks = Some(masks);
        Ok(())
    }

    /// Sets the parameters that the masks do not keep to 0.
    pub fn apply_masks(&mut self) {
        if let Some(masks) = &self.masks {
            masks.apply(&mut self.params, &self.layout);
        }
    }

    /// Names, shapes and places of all parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The parameter arena.
    pub fn params(&self) -> &[f32] {
        &self.params
    }

    /// The parameter arena, to change.
    pub fn params_mut(&mut self) -> &mut [f32] {
        &mut self.params
    }

    /// Experts per layer, when there are routers.
    pub fn num_experts(&self) -> Option<usize> {
        self.ffns.first().and_then(|ffn| ffn.num_experts())
    }

    /// Moves the gates' threshold of every layer (the paper's table 4), here and in what [`Model::save`] writes.
    ///
    /// # Errors
    /// The threshold is outside 0..=1, or the model has no gates.
    pub fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        set_threshold(&mut self.config, threshold, || {
            self.ffns.iter_mut().all(|ffn| ffn.set_threshold(threshold))
        })
    }

    /// Empty routing statistics for this model; none without routers.
    pub fn new_stats(&self) -> Option<RoutingStats> {
        self.num_experts().map(|n| RoutingStats::new(self.config.num_layers, n))
    }

    fn param(&self, range: &Range<usize>) -> &[f32] {
        &self.params[range.clone()]
    }
}

/// The FFNs that `config` asks for, one per layer.
fn ffns_of(config: &Config) -> Vec<Box<dyn Ffn>> {
    (0..config.num_layers).map(|i| ffn::of_layer(config, i)).collect()
}

/// The table of all tensors, and where they lie.
fn lay_out(config: &Config, ffns: &[Box<dyn Ffn>]) -> (Layout, Ranges) {
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
    let scaling = match config.rope_scaling {
        RopeScaling::None => rope::Scaling::None,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            rope::Scaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position: original_max_position as f64,
            }
        }
    };
    rope::Table::new(config.head_dim, config.rope_theta, scaling, config.max_position)
}

/// Moves the threshold in `config`, and in the FFNs by `move_gates`, which says whether all have gates.
fn set_threshold(config: &mut Config, threshold: f32, move_gates: impl FnOnce() -> bool) -> Result<()> {
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::Argument(format!("threshold {threshold} is outside 0..=1; use 0.5")));
    }
    match &mut config.moe {
        Some(moe) if move_gates() => moe.router.threshold = threshold,
        _ => {
            return Err(Error::Argument(
                "this model has no gates to set a threshold for; convert it first".to_owned(),
            ));
        }
    }
    Ok(())
}

/// Checks that `ids` can be fed at positions `start..`.
pub(crate) fn check_input(config: &Config, ids: &[u32], start: usize, seq: usize) -> Result<()> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(Error::Argument(format!(
            "token id {id} is not below vocab_size {}; use the model's own tokenizer",
            config.vocab_size
        )));
    }
    if start + seq > config.max_position {
        return Err(Error::Argument(format!(
            "{} positions are more than max_position_embeddings {}; use shorter sequences",
            start + seq,
            config.max_position
        )));
    }
    Ok(())
}
