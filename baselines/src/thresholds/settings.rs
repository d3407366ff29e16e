//! Settings of thresholds of activations.

use serde::{Deserialize, Serialize};

use crate::settings::settings;

settings! {
    /// Settings of thresholds of activations.
    pub(crate) struct Settings {
        /// Choice of thresholds: teal (by the error of each layer), uniform, cats (of gates alone) or search (by the loss).
        pub choose: Choose = Choose::Teal,
        /// Shares that search tries: linear (0.9, 0.8, ..., 0.1) or exp (8 of even ratios from 0.9 to 0.01).
        pub candidates: Candidates = Candidates::Linear,
        /// Loss after a site over the loss before it that search stays below, above 1, for one search with budget 100%; by default
        /// that which reaches the budget.
        pub tolerance: Option<f64> = None,
        /// Share of a layer's weights that teal takes away in a step, times the number of linears; above 0, at most 1.
        pub step: f64 = 0.05,
    }
}

/// The choice of thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Choose {
    /// By the error of each layer's output.
    Teal,
    /// The same share of every site.
    Uniform,
    /// Of gates alone, the same share of every layer.
    Cats,
    /// By the model's loss, site after site.
    Search,
}

/// The shares that a search tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Candidates {
    /// Even steps.
    Linear,
    /// Even ratios.
    Exp,
}
