//! Gemma 1 to 3 (text): gelu_tanh, norms of weight w + 1, embeddings times sqrt(hidden). Gemma 2 and 3 have four norms a
//! layer; Gemma 2 caps scores and logits; Gemma 3 norms queries and keys and rotates layers with a window by another base.

use dsmoe_kernels::Activation;

use super::spec::{
    Defaults, Family, HeadDim, Sizes, attention_bias, cap, set_ropes, set_windows, sliding_layers, window,
};
use crate::config::arch::{Architecture, Norms, QkNorm};
use crate::config::fields::Fields;
use crate::config::rope_keys::{RopeRules, SlidingRope};
use crate::error::Result;

const DEFAULTS: Defaults = Defaults {
    max_position: 8192,
    tied: true,
    head_dim: HeadDim::Fixed(256),
    kv_heads_are_heads: false,
    bos: Some(2),
    eos: Some(1),
    activation_keys: &["hidden_activation"],
    activation: Activation::GeluTanh,
    ..Defaults::LLAMA
};

pub(super) static GEMMA: Family = Family {
    model_type: "gemma",
    class: "GemmaForCausalLM",
    defaults: Defaults {
        activation_keys: &["hidden_activation", "hidden_act"],
        gelu_is_tanh: true,
        ..DEFAULTS
    },
    switches: common,
    ..Family::PLAIN
};

pub(super) static GEMMA2: Family = Family {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    defaults: DEFAULTS,
    switches: gemma2,
    ..Family::PLAIN
};

pub(super) static GEMMA3_TEXT: Family = Family {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    defaults: Defaults { max_position: 131_072, ..DEFAULTS },
    rope: RopeRules {
        theta: 1e6,
        sliding: Some(SlidingRope { theta_key: Some("rope_local_base_freq"), theta: 1e4 }),
        ..RopeRules::LLAMA
    },
    switches: gemma3,
    ..Family::PLAIN
};

/// Sets what all three have.
fn common(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    attention_bias(architecture, fields)?;
    if fields.flag("use_bidirectional_attention")? == Some(true) {
        let problem = "is true: an embedding model, whose tokens see what follows them";
        return Err(fields.wrong("use_bidirectional_attention", problem, "use a model that generates text"));
    }
    architecture.norm_offset = 1.0;
    architecture.embed_scale = (sizes.hidden as f64).sqrt() as f32;
    Ok(())
}

/// Sets what Gemma 2 and 3 have.
fn both_norms(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    common(architecture, fields, sizes)?;
    architecture.norms = Norms::Both;
    let width = fields.factor("query_pre_attn_scalar")?.unwrap_or(256.0);
    architecture.attn_scale = (1.0 / width.sqrt()) as f32;
    Ok(())
}

fn gemma2(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    both_norms(architecture, fields, sizes)?;
    architecture.attn_cap = cap(fields, "attn_logit_softcapping", Some(50.0))?;
    architecture.final_cap = cap(fields, "final_logit_softcapping", Some(30.0))?;
    let sliding = sliding_layers(fields, sizes.num_layers, |i| i.is_multiple_of(2))?;
    set_windows(architecture, window(fields, Some(4096))?, &sliding);
    Ok(())
}

fn gemma3(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    both_norms(architecture, fields, sizes)?;
    architecture.qk_norm = QkNorm::Head;
    if fields.get("attn_logit_softcapping").is_some() {
        let problem = "is set, and transformers runs Gemma 3 without it";
        return Err(fields.wrong("attn_logit_softcapping", problem, "remove it"));
    }
    architecture.final_cap = cap(fields, "final_logit_softcapping", None)?;
    let every = fields.dimension_or("sliding_window_pattern", 6)?;
    let sliding = sliding_layers(fields, sizes.num_layers, |i| !(i + 1).is_multiple_of(every))?;
    set_windows(architecture, window(fields, Some(4096))?, &sliding);
    set_ropes(architecture, &sliding);
    Ok(())
}
