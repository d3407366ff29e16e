//! Mistral: LLaMA with a window in all layers. Ministral has it in the layers that `layer_types` names.

use super::spec::{Defaults, Family, Sizes, set_windows, sliding_layers, window};
use crate::config::arch::Architecture;
use crate::config::fields::Fields;
use crate::error::Result;

const DEFAULTS: Defaults = Defaults { max_position: 131_072, kv_heads_are_heads: false, ..Defaults::LLAMA };

/// The window of a file that does not mention one.
const WINDOW: usize = 4096;

pub(super) static MISTRAL: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    defaults: DEFAULTS,
    switches: |architecture, fields, sizes| {
        set_windows(architecture, window(fields, Some(WINDOW))?, &vec![true; sizes.num_layers]);
        Ok(())
    },
    ..Family::PLAIN
};

pub(super) static MINISTRAL: Family = Family {
    model_type: "ministral",
    class: "MinistralForCausalLM",
    defaults: DEFAULTS,
    switches: ministral,
    ..Family::PLAIN
};

fn ministral(architecture: &mut Architecture, fields: &Fields<'_>, sizes: Sizes) -> Result<()> {
    let sliding = sliding_layers(fields, sizes.num_layers, |_| true)?;
    set_windows(architecture, window(fields, Some(WINDOW))?, &sliding);
    Ok(())
}
