//! Settings of thresholds of activations.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::settings::settings;

settings! {
    /// Settings of thresholds of activations.
    pub(crate) struct Settings {
        /// Choice of thresholds: teal (by the error of each layer), uniform, cats (of gates alone) or search (by the loss).
        pub choose: Choose = Choose::Teal,
        /// Shares that search tries: linear (0.9, 0.8, ..., 0.1) or exp (8 of even ratios from 0.9 to 0.01).
        pub candidates: Candidates = Candidates::Linear,
        /// Loss after a site over the loss before it that search stays below, above 1, for one search with budget 100%; 1 skips
        /// nothing, infinite keeps the least share of every site; by default that which reaches the budget.
        pub tolerance: Option<Tolerance> = None,
        /// Share of a layer's weights that teal takes away in a step, times the number of linears; above 0, at most 1.
        pub step: f64 = 0.05,
    }
}

/// The loss after a site over the loss before it that a search stays below: 1 or more, a number or `infinite`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tolerance(pub(crate) f64);

const INFINITE: &str = "infinite";

impl Tolerance {
    /// Reports whether no loss may change, so that nothing is skipped.
    pub(crate) fn skips_nothing(self) -> bool {
        self.0 <= 1.0
    }
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.is_finite() {
            true => write!(f, "{:.6}", self.0),
            false => f.write_str(INFINITE),
        }
    }
}

impl Serialize for Tolerance {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // JSON has no infinite number.
        match self.0.is_finite() {
            true => serializer.serialize_f64(self.0),
            false => serializer.serialize_str(INFINITE),
        }
    }
}

impl<'de> Deserialize<'de> for Tolerance {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tolerance, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let number = match value.as_str() {
            Some(INFINITE) => Some(f64::INFINITY),
            _ => value.as_f64().filter(|number| *number >= 1.0),
        };
        let wrong = || serde::de::Error::custom(format!("{value} is no number from 1 and not {INFINITE}"));
        number.map(Tolerance).ok_or_else(wrong)
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
