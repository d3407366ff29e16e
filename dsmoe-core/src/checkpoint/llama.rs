//! Tensors that a checkpoint must hold, dense or DSMoE.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::names::{
    EMBEDDING, HEAD, LayerNorm, attention_name, ffn_name, is_ignored, partition_name, stored_name,
};
use super::stream::same_bytes;
use super::writer::{Join, TensorInfo, Writer};
use super::{Checkpoint, Dtype};
use crate::config::{Config, PartitionKind};
use crate::error::{Error, Result};
use crate::ffn;
use crate::partition::Partition;

/// Returns names and shapes of all tensors of `config`, as stored, in the order of the forward pass. A tied model has
/// no `lm_head.weight`.
pub fn tensor_names(config: &Config) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
    let &Config { vocab_size, hidden, .. } = config;
    let head = (!config.tie_word_embeddings).then(|| (HEAD.to_owned(), vec![vocab_size, hidden]));
    std::iter::once((EMBEDDING.to_owned(), vec![vocab_size, hidden]))
        .chain((0..config.num_layers).flat_map(|i| layer_names(config, i)))
        .chain(std::iter::once(("model.norm.weight".to_owned(), vec![hidden])))
        .chain(head)
}

/// Returns names and shapes of the tensors of layer `i`.
fn layer_names(config: &Config, i: usize) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden;
    let mut tensors = Vec::new();
    let norm = |norm: LayerNorm| {
        let name = norm.name(config.architecture.norms, i);
        name.map(|name| (name, vec![hidden]))
    };
    tensors.extend(norm(LayerNorm::BeforeAttention));
    let specs = attention_tensors(config, i);
    tensors.extend(specs.into_iter().map(|(name, shape)| (attention_name(i, &name), shape)));
    tensors.extend(norm(LayerNorm::AfterAttention));
    tensors.extend(norm(LayerNorm::BeforeFfn));
    let ffn = ffn::of_layer(config, i);
    tensors.extend(ffn.tensors().iter().map(|spec| (ffn_name(i, &spec.name), spec.stored_shape())));
    if config.moe.as_ref().is_some_and(|moe| moe.partition == PartitionKind::Permuted) {
        tensors.push((partition_name(i), vec![config.layer(i).intermediate]));
    }
    tensors.extend(norm(LayerNorm::AfterFfn));
    tensors
}

/// Returns names and shapes of the attention tensors of layer `i`.
fn attention_tensors(config: &Config, i: usize) -> Vec<(String, Vec<usize>)> {
    let (hidden, architecture) = (config.hidden, &config.architecture);
    let [q, kv] = config.attention_widths(i);
    let mut tensors = Vec::new();
    for (which, rows) in [("q", q), ("k", kv), ("v", kv)] {
        tensors.push((format!("{which}_proj.weight"), vec![rows, hidden]));
        if architecture.qkv_bias {
            tensors.push((format!("{which}_proj.bias"), vec![rows]));
        }
    }
    if let Some(widths) = config.qk_norm_widths(i) {
        tensors.extend(
            ["q", "k"].iter().zip(widths).map(|(which, width)| (format!("{which}_norm.weight"), vec![width])),
        );
    }
    tensors.push(("o_proj.weight".to_owned(), vec![hidden, q]));
    if architecture.o_bias {
        tensors.push(("o_proj.bias".to_owned(), vec![hidden]));
    }
    tensors
}

/// Returns the names of the norms of layer `i` over the residual stream: before attention, after it, before the FFN and
/// after it; none where the family has no such norm.
pub fn norm_names(config: &Config, i: usize) -> [Option<String>; 4] {
    LayerNorm::ALL.map(|norm| norm.name(config.architecture.norms, i))
}

/// Opens the weights of the model of `config` in `dir`. Projections that the family stores as one matrix are seen one by
/// one, tensors that it stores under other names are seen under those here, and of a model that reads images, too, only the
/// text model is seen.
///
/// # Errors
/// Those of [`Checkpoint::open`]; a joined matrix has other rows than its projections.
pub fn open_model(dir: &Path, config: &Config) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint::open(dir)?;
    if config.is_part() {
        checkpoint.keep_text_model()?;
    }
    let is_of_family = config.model_type() == config.family().model_type;
    if is_of_family && !config.family().renames().is_empty() {
        checkpoint.rename(config.family().renames())?;
    }
    if config.family().fused {
        for i in 0..config.num_layers {
            for fused in fused_tensors(config, i) {
                checkpoint.split_rows(&fused.name, &fused.parts)?;
            }
        }
    }
    Ok(checkpoint)
}

/// Projections that a family stores as one matrix, one above the other.
struct Fused {
    name: String,
    /// Names of the projections, and their rows.
    parts: Vec<(String, usize)>,
}

/// Returns the joined matrices of layer `i` of a family that has them.
fn fused_tensors(config: &Config, i: usize) -> [Fused; 2] {
    let ([q, kv], intermediate) = (config.attention_widths(i), config.layer(i).intermediate);
    let attention = |which: &str, rows| (attention_name(i, &format!("{which}_proj.weight")), rows);
    let ffn = |which: &str| (ffn_name(i, &format!("{which}_proj.weight")), intermediate);
    [
        Fused {
            name: attention_name(i, "qkv_proj.weight"),
            parts: vec![attention("q", q), attention("k", kv), attention("v", kv)],
        },
        Fused { name: ffn_name(i, "gate_up_proj.weight"), parts: vec![ffn("gate"), ffn("up")] },
    ]
}

/// Returns `infos` in an order in which projections that the model of `config` stores as one matrix are adjacent.
pub fn in_stored_order(config: &Config, infos: Vec<TensorInfo>) -> Vec<TensorInfo> {
    if !stores_fused(config) {
        return infos;
    }
    let mut firsts = HashMap::new();
    for fused in (0..config.num_layers).flat_map(|i| fused_tensors(config, i)) {
        let place = |name: &str| infos.iter().position(|info| info.name == name);
        let first = fused.parts.iter().filter_map(|(name, _)| place(name)).min();
        let parts = fused.parts.into_iter().enumerate();
        firsts.extend(parts.map(|(i, (name, _))| (name, (first.unwrap_or(0), i))));
    }
    let key = |(i, info): &(usize, TensorInfo)| firsts.get(&info.name).copied().unwrap_or((*i, 0));
    let mut numbered: Vec<(usize, TensorInfo)> = infos.into_iter().enumerate().collect();
    numbered.sort_by_key(key);
    numbered.into_iter().map(|(_, info)| info).collect()
}

/// Makes a writer of the weights of the model of `config`, in the order of [`in_stored_order`], into the existing
/// directory `dir`: what its family stores as one matrix is joined, tensors have the names that it stores them by, and
/// shards have at most `max_shard_bytes`.
///
/// # Errors
/// Projections that are stored as one matrix have different types; the file system refuses.
///
/// # Panics
/// Those of [`Writer::create_sharded`].
pub fn model_writer(
    config: &Config,
    dir: &Path,
    infos: Vec<TensorInfo>,
    max_shard_bytes: u64,
) -> Result<Writer> {
    let mut joins = Vec::new();
    if stores_fused(config) {
        for fused in (0..config.num_layers).flat_map(|i| fused_tensors(config, i)) {
            let first = infos.iter().position(|info| info.name == fused.parts[0].0);
            let Some(first) = first else { continue };
            let tensors = first..first + fused.parts.len();
            let parts = &infos[tensors.clone()];
            if let Some(other) = parts.iter().find(|part| part.dtype != parts[0].dtype) {
                let problem =
                    format!("has dtype {} and {} has {}", other.dtype, parts[0].name, parts[0].dtype);
                let help = "store both as one type: this family has them in one matrix";
                return Err(Error::tensor(dir, &other.name, problem, help));
            }
            joins.push(Join { name: fused.name, tensors });
        }
    }
    if config.model_type() == config.family().model_type {
        let stored = infos.iter().map(|info| stored_name(config.family().renames(), &info.name));
        let renamed = stored.enumerate().filter(|(i, name)| *name != infos[*i].name);
        joins.extend(renamed.map(|(i, name)| Join { name, tensors: i..i + 1 }));
    }
    Writer::create_joined(dir, infos, joins, max_shard_bytes)
}

/// Returns whether a directory of `config` has projections joined: transformers reads it as its family.
fn stores_fused(config: &Config) -> bool {
    config.family().fused && config.model_type() == config.family().model_type
}

/// A checkpoint that was found to hold the model of a configuration.
///
/// ```
/// use dsmoe_core::checkpoint::{LlamaTensors, check_llama_tensors, open_model};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # let config = dsmoe_core::init::preset("tiny")?;
/// # dsmoe_core::init::init(&config, dense, &Default::default(), &mut |_| {})?;
///
/// let checkpoint = open_model(dense, &config)?;
/// let tensors: LlamaTensors = check_llama_tensors(&config, &checkpoint)?;
/// let name = tensors.stored_name("model.norm.weight");
/// checkpoint.check_shape(name, &[config.hidden])?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LlamaTensors {
    embedding_is_head: bool,
}

impl LlamaTensors {
    /// Returns the name under which the tensor `name` of [`tensor_names`] is stored: a tied model may have stored its
    /// embedding as `lm_head.weight`.
    pub fn stored_name<'a>(&self, name: &'a str) -> &'a str {
        if self.embedding_is_head && name == EMBEDDING { HEAD } else { name }
    }
}

/// Checks that `checkpoint` holds exactly the tensors of `config`, of the right shapes and types.
///
/// # Errors
/// The first tensor that is missing, surplus, or of another shape or type; a tied model whose head differs from its
/// embedding; a stored partition that is none.
pub fn check_llama_tensors(config: &Config, checkpoint: &Checkpoint) -> Result<LlamaTensors> {
    let (embedding, head) = (checkpoint.tensor(EMBEDDING), checkpoint.tensor(HEAD));
    let tied = config.tie_word_embeddings;
    if let (true, Some(embedding), Some(head)) = (tied, embedding, head)
        && !same_bytes(checkpoint, embedding, head)?
    {
        let problem = format!("differs from {EMBEDDING} and config.json has tie_word_embeddings true");
        let help = "set tie_word_embeddings to false";
        return Err(checkpoint.wrong(HEAD, head, problem, help));
    }
    let tensors = LlamaTensors { embedding_is_head: tied && embedding.is_none() && head.is_some() };

    let mut expected = HashSet::new();
    for (name, shape) in tensor_names(config) {
        let name = tensors.stored_name(&name).to_owned();
        let view = match checkpoint.tensor(&name) {
            Some(view) => view,
            None if name == HEAD => {
                let problem = "is missing and config.json has tie_word_embeddings false";
                let help =
                    "set tie_word_embeddings to true, or use the weights that belong to this config.json";
                return Err(Error::tensor(checkpoint.path(), &name, problem, help));
            }
            None => return Err(checkpoint.need(&name).expect_err("the tensor is absent")),
        };
        if view.shape != shape {
            let problem = format!("has shape {:?} and config.json says {shape:?}", view.shape);
            let help = "use the weights that belong to this config.json";
            return Err(checkpoint.wrong(&name, view, problem, help));
        }
        let is_partition = name.ends_with(".mlp.partition");
        if !(if is_partition { view.dtype == Dtype::I32 } else { view.dtype.is_float() }) {
            let wanted = if is_partition { "I32" } else { "F32, F16, BF16 or F64" };
            let help = format!("store it as {wanted}");
            return Err(checkpoint.wrong(&name, view, format!("has dtype {}", view.dtype), help));
        }
        expected.insert(name);
    }
    let known = |name: &str| expected.contains(name) || is_ignored(name) || (tied && name == HEAD);
    if let Some(name) = checkpoint.names().find(|name| !known(name)) {
        let view = checkpoint.need(name)?;
        let problem = "is not part of the model of config.json";
        let help = "use the config.json that belongs to the weights, or remove the tensor";
        return Err(checkpoint.wrong(name, view, problem, help));
    }
    read_partitions(config, checkpoint)?;
    Ok(tensors)
}

/// Returns the partition of every layer of a DSMoE checkpoint; empty for a dense one.
pub(crate) fn read_partitions(config: &Config, checkpoint: &Checkpoint) -> Result<Vec<Partition>> {
    let Some(moe) = &config.moe else { return Ok(Vec::new()) };
    let read = |layer| match moe.partition {
        PartitionKind::Contiguous => {
            Partition::contiguous(config.layer(layer).intermediate, moe.experts(layer))
        }
        PartitionKind::Permuted => {
            let name = partition_name(layer);
            let order = checkpoint.read_i32(&name)?;
            let unsigned = order.iter().map(|&i| u32::try_from(i).unwrap_or(u32::MAX)).collect();
            Partition::from_order(unsigned, moe.experts(layer)).map_err(|cause| {
                let help = "convert the model again";
                Error::tensor(checkpoint.path(), &name, format!("is no partition ({cause})"), help)
            })
        }
    };
    (0..config.num_layers).map(read).collect()
}
