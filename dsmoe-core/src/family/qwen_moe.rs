//! Qwen2-MoE (Qwen1.5-MoE and Qwen2 57B): Qwen2 with experts and a shared expert. Qwen3-MoE: Qwen3 with experts.

use super::mixture::Mixture;
use super::spec::{Defaults, Family, attention_bias, set_windows, sliding_layers, window};
use crate::config::arch::QkNorm;

const DEFAULTS: Defaults =
    Defaults { max_position: 32_768, kv_heads_are_heads: false, bos: None, eos: None, ..Defaults::LLAMA };

/// The window of a file that uses one and does not mention its width.
const WINDOW: usize = 4096;

const MIXTURE: Mixture = Mixture {
    count: &["num_experts", "num_local_experts"],
    width: "moe_intermediate_size",
    renormalise: Some("norm_topk_prob"),
    shared: false,
    balance_weight: 0.001,
    renames: &[],
};

pub(super) static QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    class: "Qwen2MoeForCausalLM",
    defaults: DEFAULTS,
    mixture: Some(Mixture { shared: true, ..MIXTURE }),
    switches: |architecture, fields, sizes| {
        architecture.qkv_bias = fields.flag("qkv_bias")?.unwrap_or(true);
        let first_without = fields.count_or("max_window_layers", 28)?;
        let used = fields.flag("use_sliding_window")?.unwrap_or(false);
        let width = if used { window(fields, Some(WINDOW))? } else { None };
        let sliding = sliding_layers(fields, sizes.num_layers, |i| i.is_multiple_of(2) && i < first_without)?;
        set_windows(architecture, width, &sliding);
        Ok(())
    },
    ..Family::PLAIN
};

pub(super) static QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    class: "Qwen3MoeForCausalLM",
    defaults: DEFAULTS,
    mixture: Some(MIXTURE),
    switches: |architecture, fields, sizes| {
        architecture.qk_norm = QkNorm::Head;
        attention_bias(architecture, fields)?;
        let used = fields.flag("use_sliding_window")?.unwrap_or(false);
        let width = if used { window(fields, Some(WINDOW))? } else { None };
        set_windows(architecture, width, &vec![true; sizes.num_layers]);
        Ok(())
    },
    ..Family::PLAIN
};
