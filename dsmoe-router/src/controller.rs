//! Drives the activated share to a target by the weight of the mean-gate loss.
//!
//! The plant is a slow integrator of unknown speed: the weight sets how fast gate logits move (about the learning
//! rate per step under Adam, whatever the gradient's size once it dominates), and the language-model loss pushes
//! back, so a weight that holds the share is not 0 and not known. The controller is a velocity loop:
//!
//! ```text
//! f        <- f + (measured - f) / 5                              light filter
//! e         = f - target
//! wanted    = -clamp(e / settle, -fastest, fastest)               share per step: a ramp with a soft landing
//! weight   <- clamp(weight + gain (change of f - wanted), -50, 50)
//! gain     <- 0.6 gain when e has crossed from one side of the target to the other by over 1.5 points
//! ```
//! with `fastest` = the largest distance so far / `ramp_steps` and `settle` = `ramp_steps` / 4. In the dead time
//! before the first gates cross the threshold the weight grows steadily; as soon as the share moves faster than
//! wanted it falls. The weight is two-sided: a negative one opens gates. A start beside the target does not bind the
//! pace of a run that is thrown far from it later.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const WEIGHT_LIMIT: f64 = 50.0;
const FILTER: f64 = 0.2;
const GAIN_PER_RAMP_STEP: f64 = 0.3;
const GAIN_RANGE: (f64, f64) = (4.0, 32.0);
const GAIN_CUT: f64 = 0.6;
/// An excursion beyond this on each side of the target is an overshoot.
const OVERSHOOT: f64 = 0.015;
const SETTLES_PER_RAMP: f64 = 4.0;
const SHORTEST_SETTLE: f64 = 15.0;
/// Distance that a start close to the target counts as, so that it is not held back.
const SHORTEST_DISTANCE: f64 = 0.05;

/// Controller of the activated share. Its serialised form resumes bit for bit.
///
/// The weight multiplies the mean gate over all pairs ([`crate::SparsityOver::All`]). The approach takes about
/// `ramp_steps` after the first gates cross the threshold; a third of the run is a good choice. It settles on
/// plants whose logits move by up to about 0.02 per step; far faster ones need a lower router learning rate.
///
/// ```
/// use dsmoe_router::BudgetController;
///
/// let mut controller = BudgetController::new(0.5, 100)?;
/// // More experts are active than wanted: the weight of the sparsity loss grows.
/// let weight = controller.update(0.9);
/// assert!(weight > 0.0 && controller.update(0.9) > weight);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetController {
    target: f64,
    ramp_steps: f64,
    gain: f64,
    weight: f64,
    /// Absent before the first measurement.
    state: Option<State>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    filtered: f64,
    fastest: f64,
    /// Side of the target of the last excursion: -1, 1, or 0 before one.
    side: f64,
}

impl BudgetController {
    /// Drives the share of active pairs to `target`, in about `ramp_steps` steps.
    ///
    /// # Errors
    /// `target` is not in 0..=1, `ramp_steps` is 0.
    pub fn new(target: f32, ramp_steps: u64) -> Result<BudgetController> {
        if !(0.0..=1.0).contains(&target) {
            return Err(Error::range("active target", target, "a share from 0 to 1"));
        }
        if ramp_steps == 0 {
            return Err(Error::range("ramp_steps", 0, "a third of the steps of the run, 1 at least"));
        }
        let ramp_steps = ramp_steps as f64;
        let gain = (GAIN_PER_RAMP_STEP * ramp_steps).clamp(GAIN_RANGE.0, GAIN_RANGE.1);
        Ok(BudgetController { target: f64::from(target), ramp_steps, gain, weight: 0.0, state: None })
    }

    /// Checks a controller that was read: its values are such as updates leave.
    ///
    /// # Errors
    /// The first value that is not.
    pub fn check(&self) -> Result<()> {
        let state = self.state.clone().unwrap_or(State { filtered: 0.0, fastest: 0.0, side: 0.0 });
        let share = 0.0..=1.0;
        for (field, value, allowed) in [
            ("target", self.target, share.clone()),
            ("ramp_steps", self.ramp_steps, 1.0..=u64::MAX as f64),
            ("gain", self.gain, GAIN_RANGE.0..=GAIN_RANGE.1),
            ("weight", self.weight, -WEIGHT_LIMIT..=WEIGHT_LIMIT),
            ("filtered", state.filtered, share),
            ("fastest", state.fastest, 0.0..=1.0),
            ("side", state.side, -1.0..=1.0),
        ] {
            if !allowed.contains(&value) {
                let allowed = format!("{:?} to {:?}", allowed.start(), allowed.end());
                return Err(Error::range(field, value, allowed));
            }
        }
        Ok(())
    }

    /// Returns the weight for the next step.
    pub fn weight(&self) -> f32 {
        self.weight as f32
    }

    /// Returns the target share.
    pub fn target(&self) -> f32 {
        self.target as f32
    }

    /// Takes the share measured in a step, mean over tokens and layers, and gives the weight for the next one, in
    /// -50..=50. A measurement that is not finite changes nothing.
    pub fn update(&mut self, measured_share: f32) -> f32 {
        let measured = f64::from(measured_share);
        if !measured.is_finite() {
            return self.weight();
        }
        let fastest = (measured - self.target).abs().max(SHORTEST_DISTANCE) / self.ramp_steps;
        let state = self.state.get_or_insert(State { filtered: measured, fastest, side: 0.0 });
        let change = FILTER * (measured - state.filtered);
        state.filtered += change;
        let error = state.filtered - self.target;
        state.fastest = state.fastest.max(error.abs() / self.ramp_steps);
        if error.abs() > OVERSHOOT {
            if state.side * error < 0.0 {
                self.gain = (GAIN_CUT * self.gain).max(GAIN_RANGE.0);
            }
            state.side = error.signum();
        }
        let settle = (self.ramp_steps / SETTLES_PER_RAMP).max(SHORTEST_SETTLE);
        let wanted = -(error / settle).clamp(-state.fastest, state.fastest);
        self.weight = (self.weight + self.gain * (change - wanted)).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT);
        self.weight()
    }
}
