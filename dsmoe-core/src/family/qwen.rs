//! Qwen2 and Qwen2.5: biases of q, k and v. Qwen3: norms of q and k by head.

use super::spec::{Defaults, Family, HeadDim, Sizes, attention_bias, set_windows, sliding_layers, window};
use crate::config::arch::{Architecture, QkNorm};
use crate::config::fields::Fields;
use crate::error::Result;

const DEFAULTS: Defaults =
    Defaults { max_position: 32_768, kv_heads_are_heads: false, bos: None, eos: None, ..Defaults::LLAMA };

pub(super) static QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    defaults: DEFAULTS,
    switches: |architecture, fields, sizes| {
        architecture.qkv_bias = true;
        windows(architecture, fields, sizes)
    },
    ..Family::PLAIN
};

pub(super) static QWEN3: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    defaults: Defaults { head_dim: HeadDim::Fixed(128), ..DEFAULTS },
    switches: |architecture, fields, sizes| {
        architecture.qk_norm = QkNorm::Head;
        attention_bias(architecture, fields)?;
        windows(architecture, fields, sizes)
    },
    ..Family::PLAIN
};

/// Sets the windows: off unless `use_sliding_window`, then in the layers from `max_window_layers` on.
fn windows(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    let first = fields.count_or("max_window_layers", 28)?;
    let used = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = if used { window(fields, Some(4096))? } else { None };
    let sliding = sliding_layers(fields, sizes.num_layers, |i| i >= first)?;
    set_windows(architecture, window, &sliding);
    Ok(())
}
