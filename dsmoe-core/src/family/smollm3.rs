//! SmolLM3: every fourth layer is not rotated.

use super::spec::{Defaults, Family, Sizes, biases, set_windows, sliding_layers, window};
use crate::config::arch::Architecture;
use crate::config::fields::Fields;
use crate::config::rope_keys::RopeRules;
use crate::error::Result;

pub(super) static SMOLLM3: Family = Family {
    model_type: "smollm3",
    class: "SmolLM3ForCausalLM",
    defaults: Defaults {
        max_position: 32_768,
        tied: true,
        kv_heads_are_heads: false,
        bos: Some(128_000),
        eos: Some(128_001),
        ..Defaults::LLAMA
    },
    rope: RopeRules { theta: 2e6, ..RopeRules::LLAMA },
    switches,
    ..Family::PLAIN
};

fn switches(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    biases(architecture, fields)?;
    let rotated = rotated_layers(fields, sizes.num_layers)?;
    for (layer, &rotated) in architecture.layers.iter_mut().zip(&rotated) {
        layer.rope = layer.rope.filter(|_| rotated);
    }
    let used = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = if used { window(fields, None)? } else { None };
    let sliding = sliding_layers(fields, sizes.num_layers, |i| !rotated[i])?;
    set_windows(architecture, window, &sliding);
    Ok(())
}

/// Returns which layers are rotated: `no_rope_layers` has 1 for those that are.
fn rotated_layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "no_rope_layers";
    let every = fields.dimension_or("no_rope_layer_interval", 4)?;
    let Some(value) = fields.get(KEY) else {
        return Ok((1..=num_layers).map(|i| !i.is_multiple_of(every)).collect());
    };
    let flag = |value: &serde_json::Value| match value.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        _ => value.as_bool(),
    };
    let list: Option<Vec<bool>> = value.as_array().and_then(|list| list.iter().map(flag).collect());
    match list {
        Some(list) if list.len() >= num_layers => Ok(list[..num_layers].to_vec()),
        _ => Err(fields.wrong(KEY, "is no list of 0 and 1", "give one number for each layer")),
    }
}
