//! Granite 3: LLaMA with four factors.

use super::spec::{Family, biases, multiplier};

pub(super) static GRANITE: Family = Family {
    model_type: "granite",
    class: "GraniteForCausalLM",
    switches: |architecture, fields, _| {
        biases(architecture, fields)?;
        architecture.embed_scale = multiplier(fields, "embedding_multiplier")? as f32;
        // The factor itself, not times 1 / sqrt(head_dim).
        architecture.attn_scale = multiplier(fields, "attention_multiplier")? as f32;
        architecture.residual_scale = multiplier(fields, "residual_multiplier")? as f32;
        architecture.logit_scale = (1.0 / multiplier(fields, "logits_scaling")?) as f32;
        Ok(())
    },
    ..Family::PLAIN
};
