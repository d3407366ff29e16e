//! Names of the tensors of a checkpoint.

use crate::config::arch::Norms;

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Beginnings of the names of a model's parts for images.
const FOR_IMAGES: [&str; 4] =
    ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];
/// Beginnings of the names of its text model, with those that the text model has alone: of files of transformers before
/// 4.52 and of most published ones, of a model without its head, and of transformers since.
const OF_TEXT: [(&str, &str); 4] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.language_model.", "model."),
];

/// Returns the name that a tensor of a model that reads images, too, has in its text model; none for the other parts.
pub(super) fn name_in_text_model(name: &str) -> Option<String> {
    if FOR_IMAGES.iter().any(|part| name.starts_with(part)) {
        return None;
    }
    let renamed = OF_TEXT.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old)?)));
    Some(renamed.unwrap_or_else(|| name.to_owned()))
}

/// Parts of the names of tensors: as a family stores them, and as they are called here. Empty where they are the same.
pub(crate) type Renames = &'static [(&'static str, &'static str)];

/// Returns how a tensor is called here that a family stores as `name`.
pub(super) fn own_name(renames: Renames, name: &str) -> String {
    renames.iter().fold(name.to_owned(), |name, (stored, own)| name.replacen(stored, own, 1))
}

/// Returns how a family stores the tensor `name`.
pub(super) fn stored_name(renames: Renames, name: &str) -> String {
    renames.iter().fold(name.to_owned(), |name, (stored, own)| name.replacen(own, stored, 1))
}

/// Returns the full name of a layer's FFN tensor.
pub(crate) fn ffn_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.mlp.{name}")
}

/// A norm of a layer over the residual stream, or over what joins it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerNorm {
    BeforeAttention,
    AfterAttention,
    BeforeFfn,
    AfterFfn,
}

impl LayerNorm {
    /// All four, in the order of the forward pass.
    pub(crate) const ALL: [LayerNorm; 4] =
        [LayerNorm::BeforeAttention, LayerNorm::AfterAttention, LayerNorm::BeforeFfn, LayerNorm::AfterFfn];

    /// Returns its name in a layer whose norms are at those places; none where there is no such norm. One name means
    /// different norms in different families.
    pub(crate) fn name(self, norms: Norms, layer: usize) -> Option<String> {
        let name = match (norms, self) {
            (Norms::Pre | Norms::Both, LayerNorm::BeforeAttention) => "input",
            (Norms::Pre, LayerNorm::BeforeFfn) => "post_attention",
            (Norms::Post | Norms::Both, LayerNorm::AfterAttention) => "post_attention",
            (Norms::Both, LayerNorm::BeforeFfn) => "pre_feedforward",
            (Norms::Post | Norms::Both, LayerNorm::AfterFfn) => "post_feedforward",
            (Norms::Pre, LayerNorm::AfterAttention | LayerNorm::AfterFfn)
            | (Norms::Post, LayerNorm::BeforeAttention | LayerNorm::BeforeFfn) => return None,
        };
        Some(format!("model.layers.{layer}.{name}_layernorm.weight"))
    }
}

/// Returns the name of a tensor of a layer's attention.
pub(crate) fn attention_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.self_attn.{name}")
}

/// Returns the name of a layer's router, `[num_experts, hidden]`.
pub(crate) fn router_name(layer: usize) -> String {
    ffn_name(layer, "router.weight")
}

/// Returns whether a tensor belongs to a layer's FFN and is of no projection and no bias: one of a router, of a
/// correction, or a partition.
pub fn is_router(name: &str) -> bool {
    let of_all = ["_proj.weight", "_proj.bias", ".output_bias"];
    name.contains(".mlp.") && !of_all.iter().any(|end| name.ends_with(end))
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
