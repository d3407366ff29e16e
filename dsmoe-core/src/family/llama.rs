//! LLaMA 1 to 3, and everything that is stored as one: TinyLlama, SmolLM 1 and 2, Yi, InternLM in LLaMA's form.

use super::spec::{Family, biases};

pub(super) static LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    switches: |architecture, fields, _| biases(architecture, fields),
    ..Family::PLAIN
};
