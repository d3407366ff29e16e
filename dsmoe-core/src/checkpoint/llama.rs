//! Tensors that a LLaMA or DSMoE checkpoint must hold.

use std::collections::HashSet;

use super::names::{EMBEDDING, HEAD, ffn_name, is_ignored, norm_name, partition_name};
use super::stream::same_bytes;
use super::{Checkpoint, Dtype};
use crate::config::{Config, PartitionKind};
use crate::error::{Error, Result};
use crate::ffn;
use crate::partition::Partition;

/// Returns names and shapes of all tensors of `config`, as stored, in the order of the forward pass. A tied model has
/// no `lm_head.weight`.
pub fn tensor_names(config: &Config) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
    let &Config { vocab_size, hidden, head_dim, .. } = config;
    let layer = move |i: usize| {
        let shape = config.layer(i);
        let (q, kv) = (shape.num_heads * head_dim, shape.num_kv_heads * head_dim);
        let mut tensors = vec![
            (format!("model.layers.{i}.input_layernorm.weight"), vec![hidden]),
            (format!("model.layers.{i}.self_attn.q_proj.weight"), vec![q, hidden]),
            (format!("model.layers.{i}.self_attn.k_proj.weight"), vec![kv, hidden]),
            (format!("model.layers.{i}.self_attn.v_proj.weight"), vec![kv, hidden]),
            (format!("model.layers.{i}.self_attn.o_proj.weight"), vec![hidden, q]),
            (norm_name(i), vec![hidden]),
        ];
        let ffn = ffn::of_layer(config, i);
        tensors.extend(ffn.tensors().iter().map(|spec| (ffn_name(i, &spec.name), spec.stored_shape())));
        if config.moe.as_ref().is_some_and(|moe| moe.partition == PartitionKind::Permuted) {
            tensors.push((partition_name(i), vec![shape.intermediate]));
        }
        tensors
    };
    let head = (!config.tie_word_embeddings).then(|| (HEAD.to_owned(), vec![vocab_size, hidden]));
    std::iter::once((EMBEDDING.to_owned(), vec![vocab_size, hidden]))
        .chain((0..config.num_layers).flat_map(layer))
        .chain(std::iter::once(("model.norm.weight".to_owned(), vec![hidden])))
        .chain(head)
}

/// A checkpoint that was found to hold the model of a configuration.
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
    let num_experts = moe.router.num_experts;
    let read = |layer| match moe.partition {
        PartitionKind::Contiguous => Partition::contiguous(config.layer(layer).intermediate, num_experts),
        PartitionKind::Permuted => {
            let name = partition_name(layer);
            let order = checkpoint.read_i32(&name)?;
            let unsigned = order.iter().map(|&i| u32::try_from(i).unwrap_or(u32::MAX)).collect();
            Partition::from_order(unsigned, num_experts).map_err(|cause| {
                let help = "convert the model again";
                Error::tensor(checkpoint.path(), &name, format!("is no partition ({cause})"), help)
            })
        }
    };
    (0..config.num_layers).map(read).collect()
}
