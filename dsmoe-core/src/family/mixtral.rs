//! Mixtral: Mistral with experts, whose tensors have names of their own.

use super::mixture::Mixture;
use super::spec::{Defaults, Family, set_windows, window};
use crate::config::rope_keys::RopeRules;

pub(super) static MIXTRAL: Family = Family {
    model_type: "mixtral",
    class: "MixtralForCausalLM",
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        max_position: 131_072,
        kv_heads_are_heads: false,
        ..Defaults::LLAMA
    },
    rope: RopeRules { theta: 1e6, ..RopeRules::LLAMA },
    mixture: Some(Mixture {
        count: &["num_local_experts", "num_experts"],
        width: "intermediate_size",
        renormalise: None,
        shared: false,
        balance_weight: 0.001,
        renames: &[
            (".block_sparse_moe.", ".mlp."),
            (".w1.", ".gate_proj."),
            (".w2.", ".down_proj."),
            (".w3.", ".up_proj."),
        ],
    }),
    switches: |architecture, fields, sizes| {
        set_windows(architecture, window(fields, None)?, &vec![true; sizes.num_layers]);
        Ok(())
    },
    ..Family::PLAIN
};
