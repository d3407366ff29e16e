//! OLMo 2 and OLMo 3: norms after attention and FFN instead of before them, and of whole queries and keys.

use super::spec::{Defaults, Family, attention_bias, set_ropes, set_windows, sliding_layers, window};
use crate::config::arch::{Architecture, Norms, QkNorm};
use crate::config::fields::Fields;
use crate::config::rope_keys::{RopeRules, SlidingRope};
use crate::error::Result;

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, bos: None, eos: Some(50_279), ..Defaults::LLAMA };

/// Base of OLMo 3, which layers with a window always have.
const THETA: f64 = 500_000.0;

pub(super) static OLMO2: Family = Family {
    model_type: "olmo2",
    class: "Olmo2ForCausalLM",
    defaults: DEFAULTS,
    rope: RopeRules { type_and_factor: true, ..RopeRules::LLAMA },
    switches: |architecture, fields, _| norms(architecture, fields),
    ..Family::PLAIN
};

pub(super) static OLMO3: Family = Family {
    model_type: "olmo3",
    class: "Olmo3ForCausalLM",
    defaults: DEFAULTS,
    rope: RopeRules {
        theta: THETA,
        sliding: Some(SlidingRope { theta_key: None, theta: THETA }),
        ..RopeRules::LLAMA
    },
    switches: |architecture, fields, sizes| {
        norms(architecture, fields)?;
        let sliding = sliding_layers(fields, sizes.num_layers, |i| !(i + 1).is_multiple_of(4))?;
        set_windows(architecture, window(fields, Some(4096))?, &sliding);
        set_ropes(architecture, &sliding);
        Ok(())
    },
    ..Family::PLAIN
};

fn norms(architecture: &mut Architecture, fields: &Fields<'_>) -> Result<()> {
    (architecture.norms, architecture.qk_norm) = (Norms::Post, QkNorm::Whole);
    attention_bias(architecture, fields)
}
