//! Names of tensors in GGUF and in Hugging Face's files, and what differs in the tensors themselves.

use super::arch::Arch;

/// Names outside the layers.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Names in a layer, without its prefix: GGUF's and Hugging Face's.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Names of norms in models with a norm after attention and FFN; they come before [`LAYER`].
const POST_NORMS: [(&str, &str); 3] = [
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Names of fused projections; they come before [`LAYER`].
const FUSED: [(&str, &str); 2] = [("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")];

impl Arch {
    fn layer_names(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        let post = if self.post_norms { &POST_NORMS[..] } else { &[] };
        let fused = if self.fused { &FUSED[..] } else { &[] };
        post.iter().chain(fused).chain(&LAYER)
    }

    /// Returns Hugging Face's name of a tensor; a name that is not known is returned as it is.
    pub(crate) fn hf_name(&self, name: &str) -> String {
        let known = || {
            let (stem, kind) = name.rsplit_once('.')?;
            if let Some((_, hf)) = OUTSIDE.iter().find(|(gguf, _)| *gguf == stem) {
                return Some(format!("{hf}.{kind}"));
            }
            let (layer, stem) = stem.strip_prefix("blk.")?.split_once('.')?;
            let (_, hf) = self.layer_names().find(|(gguf, _)| *gguf == stem)?;
            Some(format!("model.layers.{layer}.{hf}.{kind}"))
        };
        known().unwrap_or_else(|| name.to_owned())
    }

    /// Returns the name of the joined projection that a projection is a part of in files of this architecture.
    pub(crate) fn joined(&self, name: &str) -> String {
        let join = |parts: &[&str], whole: &str| {
            let part = parts.iter().find(|part| name.ends_with(*part))?;
            Some(format!("{}{whole}", name.strip_suffix(part)?))
        };
        let attention = ["q_proj.weight", "k_proj.weight", "v_proj.weight"];
        let joined = || {
            join(&attention, "qkv_proj.weight")
                .or_else(|| join(&["gate_proj.weight", "up_proj.weight"], "gate_up_proj.weight"))
        };
        self.fused.then(joined).flatten().unwrap_or_else(|| name.to_owned())
    }

    /// Returns GGUF's name of a tensor.
    pub(crate) fn gguf_name(&self, name: &str) -> Option<String> {
        let (stem, kind) = name.rsplit_once('.')?;
        if let Some((gguf, _)) = OUTSIDE.iter().find(|(_, hf)| *hf == stem) {
            return Some(format!("{gguf}.{kind}"));
        }
        let (layer, stem) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        let (gguf, _) = self.layer_names().find(|(_, hf)| *hf == stem)?;
        Some(format!("blk.{layer}.{gguf}.{kind}"))
    }
}

/// The head of whose rows a projection's rows are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heads {
    /// Queries.
    Query,
    /// Keys.
    Key,
}

/// Returns whose heads the rows of the tensor of this Hugging Face name belong to, if RoPE turns them.
pub(crate) fn rotated(name: &str) -> Option<Heads> {
    let is = |projection: &str| name.rsplit_once('.').is_some_and(|(stem, _)| stem.ends_with(projection));
    match (is(".self_attn.q_proj"), is(".self_attn.k_proj")) {
        (true, _) => Some(Heads::Query),
        (_, true) => Some(Heads::Key),
        _ => None,
    }
}

/// Returns for every row of Hugging Face's order its row in a file whose RoPE turns neighbours: in each head of
/// `head_dim` rows, the halves lie interleaved.
pub(crate) fn interleaved(head_dim: usize, rows: usize) -> impl Iterator<Item = usize> {
    let half = head_dim / 2;
    (0..rows).map(move |row| {
        let (head, at) = (row / head_dim, row % head_dim);
        head * head_dim + 2 * (at % half) + at / half
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        let plain = Arch::of("llama").unwrap();
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.12.attn_q.bias", "model.layers.12.self_attn.q_proj.bias"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ] {
            assert_eq!(plain.hf_name(gguf), hf);
            assert_eq!(plain.gguf_name(hf).as_deref(), Some(gguf));
        }
        let gemma = Arch::of("gemma3").unwrap();
        let (ffn, after) =
            ("model.layers.0.pre_feedforward_layernorm", "model.layers.0.post_attention_layernorm");
        assert_eq!(gemma.hf_name("blk.0.ffn_norm.weight"), format!("{ffn}.weight"));
        assert_eq!(gemma.hf_name("blk.0.post_attention_norm.weight"), format!("{after}.weight"));
        let phi = Arch::of("phi3").unwrap();
        assert_eq!(phi.hf_name("blk.0.ffn_up.weight"), "model.layers.0.mlp.gate_up_proj.weight");
        assert_eq!(phi.hf_name("blk.x"), "blk.x");
        assert_eq!(plain.gguf_name("model.layers.0.mlp.router.weight"), None);
    }

    #[test]
    fn halves_of_a_head_lie_interleaved() {
        let rows: Vec<usize> = interleaved(6, 12).collect();
        assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
