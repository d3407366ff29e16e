//! OLMoE: experts, and norms of whole queries and keys.

use super::mixture::Mixture;
use super::spec::{Defaults, Family, attention_bias};
use crate::config::arch::QkNorm;

const CLIP: &str = "clip_qkv";

pub(super) static OLMOE: Family = Family {
    model_type: "olmoe",
    class: "OlmoeForCausalLM",
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        max_position: 4096,
        bos: None,
        eos: Some(50_279),
        ..Defaults::LLAMA
    },
    mixture: Some(Mixture {
        count: &["num_experts", "num_local_experts"],
        width: "intermediate_size",
        renormalise: Some("norm_topk_prob"),
        shared: false,
        balance_weight: 0.01,
        renames: &[],
    }),
    switches: |architecture, fields, _| {
        if let Some(clip) = fields.get(CLIP) {
            let help = "use a model whose queries and keys are not clipped";
            return Err(fields.is_not(CLIP, clip, help));
        }
        architecture.qk_norm = QkNorm::Whole;
        attention_bias(architecture, fields)
    },
    ..Family::PLAIN
};
