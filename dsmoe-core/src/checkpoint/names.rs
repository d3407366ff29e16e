//! Names of the tensors of a checkpoint.

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Returns the full name of a layer's FFN tensor.
pub(crate) fn ffn_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.mlp.{name}")
}

/// Returns the name of the norm before a layer's FFN.
pub(crate) fn norm_name(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}

/// Returns the name of a layer's router, `[num_experts, hidden]`.
pub(crate) fn router_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.router.weight")
}

/// Returns whether a tensor belongs to a layer's FFN and is no projection: a router's tensor or a partition.
pub fn is_router(name: &str) -> bool {
    name.contains(".mlp.") && !name.ends_with("_proj.weight")
}

/// Returns the name of a layer's router bias, `[num_experts]`.
pub(crate) fn router_bias_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.router.bias")
}

/// Returns the name of a layer's original neuron indices, `[intermediate]`.
pub(crate) fn partition_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.partition")
}

/// Returns whether a tensor is a leftover of old conversions that is never read.
pub(crate) fn is_ignored(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}
