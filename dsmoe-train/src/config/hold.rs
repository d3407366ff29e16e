//! The ways in which a run holds a share of active experts, and the temperature of its routers.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use dsmoe_core::config::Config;
use dsmoe_router::ShareLoss;
use serde::{Deserialize, Serialize};

use super::{Budget, TrainConfig};
use crate::error::{Error, Result};

/// Weight of the squared distance from the share when nothing else is said.
const WEIGHT: f64 = 1.0;
/// Temperatures of routers.
const TEMPERATURES: RangeInclusive<f64> = 1e-3..=1e3;

/// The way a share of active experts is held.
///
/// ```
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::config::Hold;
///
/// let mut config = TrainConfig { active_target: Some(0.25), ..TrainConfig::default() };
/// config.hold = Some("threshold".parse::<Hold>()?);
/// assert_eq!(config.hold, Some(Hold::Threshold));
/// assert_eq!(Hold::Squared.to_string(), "squared");
/// assert!("thresholds".parse::<Hold>().is_err());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// The thresholds of the gates follow the quantile of the logits.
    Threshold,
    /// The weight of the sparsity loss is adjusted.
    Loss,
    /// The loss has the squared distance of the mean gate from the share ([`ShareLoss`]), of routers with a temperature.
    Squared,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hold::Threshold => "threshold",
            Hold::Loss => "loss",
            Hold::Squared => "squared",
        })
    }
}

impl FromStr for Hold {
    type Err = Error;

    fn from_str(text: &str) -> Result<Hold> {
        let all = [Hold::Threshold, Hold::Loss, Hold::Squared];
        let found = all.into_iter().find(|hold| hold.to_string() == text);
        found.ok_or_else(|| Error::field("hold", format!("{text:?}"), "threshold, loss or squared"))
    }
}

impl TrainConfig {
    /// Checks how a share is held and the temperatures, and fills in the weight of a squared distance.
    pub(super) fn resolve_hold(&mut self) -> Result<()> {
        match (self.hold, self.hold_weight) {
            (Some(Hold::Squared), None) => self.hold_weight = Some(WEIGHT),
            (Some(Hold::Squared), Some(_)) | (_, None) => {}
            (_, Some(weight)) => {
                return Err(Error::field("hold_weight", weight, "it with {hold} squared only"));
            }
        }
        if let Some([first, last]) = self.router_temperature
            && ![first, last].iter().all(|temperature| TEMPERATURES.contains(temperature))
        {
            let allowed = "two temperatures from 0.001 to 1000, such as [1, 0.1]";
            return Err(Error::field("router_temperature", format!("{first} to {last}"), allowed));
        }
        match (self.hold, self.budget()) {
            (Some(_), Budget::Weight(_)) => {
                Err(Error::field("hold", "set without a share", "it with an {active_target}"))
            }
            (Some(hold @ (Hold::Loss | Hold::Squared)), Budget::Range(..)) => {
                Err(Error::field("hold", format!("{hold} for a range of shares"), "threshold"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what only routers with a temperature have, in a resolved run of `model`.
    pub(super) fn check_routers(&self, model: &Config) -> Result<()> {
        if model.ffn.as_ref().is_some_and(|spec| spec.router_temperature().is_some()) {
            return Ok(());
        }
        if self.hold == Some(Hold::Squared) {
            let allowed =
                "loss or threshold for a model without routers that have a temperature, such as duo's";
            return Err(Error::field("hold", Hold::Squared, allowed));
        }
        self.router_temperature.map_or(Ok(()), |[first, last]| {
            let allowed = "none for a model without routers that have a temperature, such as duo's";
            Err(Error::field("router_temperature", format!("{first} to {last}"), allowed))
        })
    }

    /// Returns the loss on the distance from the share of a resolved run, where that is what holds it.
    pub(crate) fn share_loss(&self) -> Option<ShareLoss> {
        let (weight, target) = (self.hold_weight?, self.active_target?);
        (self.hold == Some(Hold::Squared)).then_some(ShareLoss { weight, target })
    }

    /// Returns the number that divides the routers' logits in step `step`, which counts from 0: it changes by the same amount from
    /// step to step. It is none where the run leaves it to the model.
    pub(crate) fn temperature_at(&self, step: u64) -> Option<f64> {
        let [first, last] = self.router_temperature?;
        let steps = self.steps.unwrap_or(0).saturating_sub(1).max(1);
        Some(first + (last - first) * (step as f64 / steps as f64).min(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperatures_are_annealed_by_the_step() {
        let of = |steps: u64| TrainConfig {
            steps: Some(steps),
            router_temperature: Some([1.0, 0.1]),
            ..TrainConfig::default()
        };
        let at = |steps: u64, step: u64| of(steps).temperature_at(step).unwrap();
        for (step, want) in [(0, 1.0), (1, 0.9), (5, 0.5), (9, 0.1)] {
            assert!((at(10, step) - want).abs() < 1e-12, "{step}: {}", at(10, step));
        }
        // A run of a single step has the first one; steps that are appended to a run keep the last one.
        assert_eq!((at(1, 0), at(10, 400)), (1.0, at(10, 9)));
        assert_eq!(TrainConfig::default().temperature_at(3), None);
    }
}
