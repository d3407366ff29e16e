//! Phi-3, Phi-3.5 and Phi-4: LLaMA's maths with q, k, v and gate, up stored as one matrix each.

use super::spec::{Defaults, Family, set_windows, window};
use crate::config::rope_keys::RopeRules;

pub(super) static PHI3: Family = Family {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    defaults: Defaults { rms_norm_eps: 1e-5, max_position: 4096, eos: Some(32_000), ..Defaults::LLAMA },
    rope: RopeRules {
        partial: true,
        longrope_names: &["su", "yarn"],
        original_at_top: Some(4096),
        longrope_restarts: true,
        ..RopeRules::LLAMA
    },
    fused: true,
    mixture: None,
    switches: |architecture, fields, sizes| {
        set_windows(architecture, window(fields, None)?, &vec![true; sizes.num_layers]);
        Ok(())
    },
};
