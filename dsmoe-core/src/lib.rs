//! DSMoE models: LLaMA checkpoints, FFN partition into experts, the model with its KV cache, generation, accounting.
#![forbid(unsafe_code)]
