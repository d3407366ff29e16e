//! A control: the FFN split at random, k of n experts chosen by a linear gate that starts at zero.

use crate::llama_moe::{Settings, configure};
use crate::settings::Entry;
use crate::topk::GateNetwork;

/// The method `random-k`.
pub(crate) static RANDOM_K: Entry<Settings> = Entry {
    name: "random-k",
    summary: "control: FFN split at random, k of n experts by a linear gate that starts at zero; budgets k/n",
    defaults: || Settings { gate: GateNetwork::Linear, ..Settings::default() },
    fixed: &["construction", "residual", "gate"],
    ..Entry::new(configure)
};
