//! Names of the tensors of a checkpoint.

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Full name of a layer's FFN tensor.
pub(crate) fn ffn_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.mlp.{name}")
}

/// Name of the norm before a layer's FFN.
pub(crate) fn norm_name(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}

/// Name of a layer's router, `[num_experts, hidden]`.
pub(crate) fn router_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.router.weight")
}

/// Whether a tensor is a part of a layer's FFN other than a projection: of its router, or its partition.
pub fn is_router(name: &str) -> bool {
    name.contains(".mlp.") && !name.ends_with("_proj.weight")
}

/// Name of a layer's router bias, `[num_experts]`.
pub(crate) fn router_bias_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.router.bias")
}

/// Name of a layer's original neuron indices, `[intermediate]`.
pub(crate) fn partition_name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.partition")
}

/// Whether a tensor is one that old conversions left and nobody reads.
pub(crate) fn is_ignored(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}
