//! LLaMA 1 to 3, and everything that is stored as one: TinyLlama, SmolLM 1 and 2, Yi, InternLM in LLaMA's form.

use super::spec::{Defaults, Family, biases};
use crate::config::rope_keys::RopeRules;

pub(super) static LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    defaults: Defaults::LLAMA,
    rope: RopeRules::LLAMA,
    fused: false,
    switches: |architecture, fields, _| biases(architecture, fields),
};
