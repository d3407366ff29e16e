//! Settings of a DSMoE router, as stored in a model's `config.json`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Settings of one model's routers; the same for every layer.
///
/// ```
/// use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};
///
/// let config = RouterConfig {
///     threshold: 0.7,
///     gate_value: GateValue::Binary,
///     rescale: Rescale::Eq8,
///     zero_active: ZeroActive::ForceArgmax,
///     ..RouterConfig::new(8)
/// };
/// config.validate()?;
/// assert!((config.threshold_logit() - 0.8473).abs() < 1e-4);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// Experts per layer (n).
    pub num_experts: usize,
    /// A gate is active when strictly above this (tau of eq. 7), in 0..=1: 0 opens all, 1 shuts all.
    pub threshold: f32,
    /// Factor of an active expert's output.
    pub gate_value: GateValue,
    /// Rescaling of the sum of experts by their number.
    pub rescale: Rescale,
    /// Treatment of a token without an active expert.
    pub zero_active: ZeroActive,
    /// True if inactive gates receive the gradient of the language-model loss (eq. 10).
    pub ste: bool,
}

/// Value of an active gate.
///
/// ```
/// use dsmoe_router::{GateValue, RouterConfig, route};
/// use ndarray::array;
///
/// let sigmoid = RouterConfig::new(2);
/// let binary = RouterConfig { gate_value: "binary".parse::<GateValue>()?, ..sigmoid.clone() };
/// let logits = array![[1.0, -1.0]];
/// // The open expert counts by its gate, 1 / (1 + e^-1), or in full.
/// assert!((route(&sigmoid, logits.view()).routing.coefficients[0] - 0.731).abs() < 1e-3);
/// assert_eq!(route(&binary, logits.view()).routing.coefficients, [1.0]);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateValue {
    /// The sigmoid q itself (eq. 7).
    #[default]
    Sigmoid,
    /// 1: experts are switched, not weighted.
    Binary,
}

/// Rescaling of the sum of expert outputs.
///
/// ```
/// use dsmoe_router::{GateValue, Rescale, RouterConfig, route};
/// use ndarray::array;
///
/// let config = RouterConfig {
///     gate_value: GateValue::Binary,
///     rescale: Rescale::Eq8,
///     ..RouterConfig::new(4)
/// };
/// // One of four experts is active: its output counts four times.
/// assert_eq!(route(&config, array![[1.0, -1.0, -1.0, -1.0]].view()).routing.coefficients, [4.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rescale {
    /// None.
    #[default]
    None,
    /// The factor n / max(k, 1) for a token with k active experts (eq. 8); a constant to the gradient.
    Eq8,
}

/// Treatment of a token without an active expert.
///
/// ```
/// use dsmoe_router::{RouterConfig, ZeroActive, route};
/// use ndarray::array;
///
/// let skip = RouterConfig::new(3);
/// let force = RouterConfig { zero_active: ZeroActive::ForceArgmax, ..skip.clone() };
/// let logits = array![[-3.0, -1.0, -2.0]];
/// assert_eq!(route(&skip, logits.view()).routing.num_routed(), 0);
/// assert_eq!(route(&force, logits.view()).mask, array![[false, true, false]]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroActive {
    /// The FFN gives 0 and the residual passes.
    #[default]
    Skip,
    /// The expert with the largest gate is active; its value is q (1 for binary gates).
    ForceArgmax,
}

impl RouterConfig {
    /// Makes the paper's router: threshold 0.5, sigmoid gates, no rescale, STE.
    pub fn new(num_experts: usize) -> RouterConfig {
        let (gate_value, rescale, zero_active) = (GateValue::Sigmoid, Rescale::None, ZeroActive::Skip);
        RouterConfig { num_experts, threshold: 0.5, gate_value, rescale, zero_active, ste: true }
    }

    /// Checks the ranges of all fields.
    ///
    /// # Errors
    /// `num_experts` is 0 or over 65536, `threshold` is not in 0..=1.
    pub fn validate(&self) -> Result<()> {
        if !(1..=1 << 16).contains(&self.num_experts) {
            return Err(Error::range("num_experts", self.num_experts, "1 to 65536"));
        }
        if !(0.0..=1.0).contains(&self.threshold) {
            return Err(Error::range("threshold", self.threshold, "a number from 0 to 1"));
        }
        Ok(())
    }

    /// Returns what a logit has to exceed; none where every gate is open, whatever its logit.
    pub fn bar(&self) -> Option<f32> {
        // Threshold 0 means all, also where a sigmoid is 0.
        (self.threshold != 0.0).then(|| self.threshold_logit() as f32)
    }

    /// Returns ln(threshold / (1 - threshold)); a gate is active when its logit is strictly above. It is -inf for
    /// threshold 0, +inf for 1.
    pub fn threshold_logit(&self) -> f64 {
        let threshold = f64::from(self.threshold);
        (threshold / (1.0 - threshold)).ln()
    }
}

/// `FromStr` and `Display` of an enum whose words are those of its serde form.
macro_rules! words {
    ($type:ident, $field:literal, $allowed:literal, $($word:literal => $variant:ident),+) => {
        impl FromStr for $type {
            type Err = Error;

            fn from_str(s: &str) -> Result<$type> {
                match s {
                    $($word => Ok($type::$variant),)+
                    _ => Err(Error::UnknownName { field: $field, found: s.into(), allowed: $allowed }),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($type::$variant => $word,)+ })
            }
        }
    };
}

words!(GateValue, "gate_value", "sigmoid or binary", "sigmoid" => Sigmoid, "binary" => Binary);
words!(Rescale, "rescale", "none or eq8", "none" => None, "eq8" => Eq8);
words!(ZeroActive, "zero_active", "skip or force_argmax", "skip" => Skip, "force_argmax" => ForceArgmax);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_serde() {
        fn check<T>(values: &[T])
        where
            T: Copy + fmt::Debug + fmt::Display + FromStr<Err = Error> + PartialEq + Serialize,
        {
            for &value in values {
                let word = value.to_string();
                assert_eq!(serde_json::to_string(&value).unwrap(), format!("\"{word}\""));
                assert_eq!(word.parse::<T>().unwrap(), value);
            }
        }
        check(&[GateValue::Sigmoid, GateValue::Binary]);
        check(&[Rescale::None, Rescale::Eq8]);
        check(&[ZeroActive::Skip, ZeroActive::ForceArgmax]);
        let error = "eq9".parse::<Rescale>().unwrap_err().to_string();
        assert_eq!(error, "unknown rescale `eq9`; use none or eq8");
    }

    #[test]
    fn json_round_trips_and_unknown_fields_are_errors() {
        let config = RouterConfig { rescale: Rescale::Eq8, threshold: 0.3, ..RouterConfig::new(8) };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<RouterConfig>(&json).unwrap(), config);
        let error = serde_json::from_str::<RouterConfig>(&json.replace("ste", "stee")).unwrap_err();
        assert!(error.to_string().contains("stee"), "{error}");
    }

    #[test]
    fn ranges_are_checked() {
        assert!(RouterConfig::new(8).validate().is_ok());
        let error = RouterConfig::new(0).validate().unwrap_err().to_string();
        assert_eq!(error, "num_experts is 0; use 1 to 65536");
        for threshold in [-0.1, 1.5, f32::NAN, f32::INFINITY] {
            let error = RouterConfig { threshold, ..RouterConfig::new(8) }.validate().unwrap_err();
            assert!(error.to_string().ends_with("use a number from 0 to 1"), "{error}");
        }
    }

    #[test]
    fn threshold_logit_covers_the_closed_interval() {
        let at = |threshold| RouterConfig { threshold, ..RouterConfig::new(8) }.threshold_logit();
        assert_eq!(at(0.5), 0.0);
        assert_eq!(at(0.0), f64::NEG_INFINITY);
        assert_eq!(at(1.0), f64::INFINITY);
        assert!((at(0.75) - 3.0f64.ln()).abs() < 1e-12);
        let bar = |threshold| RouterConfig { threshold, ..RouterConfig::new(8) }.bar();
        assert_eq!((bar(0.0), bar(0.5), bar(1.0)), (None, Some(0.0), Some(f32::INFINITY)));
    }
}
