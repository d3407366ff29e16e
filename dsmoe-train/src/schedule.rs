//! The learning rate over the run: linear warm-up, then a cosine down to a share of the peak, or constant.
//!
//! ```text
//! step s counts from 0 and uses
//! s < warmup          lr (s + 1) / warmup
//! cosine              floor + (lr - floor) (1 + cos(pi p)) / 2,   p = (s + 1 - warmup) / (steps - warmup)
//! constant            lr
//! ```
//! The last step of a cosine uses exactly the floor.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after the warm-up.
///
/// ```
/// use dsmoe_train::schedule::{Decay, Schedule};
///
/// let cosine = Schedule { lr: 1.0, min_lr_ratio: 0.1, warmup_steps: 0, steps: 10, decay: Decay::Cosine };
/// let constant = Schedule { decay: Decay::Constant, ..cosine };
/// // Half-way down a cosine, and at its end.
/// assert!((cosine.lr_at(4) - 0.55).abs() < 1e-12 && (cosine.lr_at(9) - 0.1).abs() < 1e-12);
/// assert_eq!([0, 4, 9].map(|step| constant.lr_at(step)), [1.0; 3]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Half a cosine from the peak to the floor.
    #[default]
    Cosine,
    /// The peak to the end.
    Constant,
}

/// The learning rate of every step.
///
/// ```
/// use dsmoe_train::schedule::{Decay, Schedule};
///
/// let schedule = Schedule { lr: 1e-3, min_lr_ratio: 0.1, warmup_steps: 10, steps: 100, decay: Decay::Cosine };
/// assert!(schedule.lr_at(1) < schedule.lr_at(10));
/// assert!((schedule.lr_at(100) - 1e-4).abs() < 1e-9);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub lr: f64,
    /// The cosine ends at this share of the peak.
    pub min_lr_ratio: f64,
    /// Steps of linear rise.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// The decay after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Returns the learning rate of `step`, counted from 0. Steps past the end keep the last value.
    pub fn lr_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * ((step + 1) as f64 / self.warmup_steps as f64);
        }
        if self.decay == Decay::Constant {
            return self.lr;
        }
        let floor = self.lr * self.min_lr_ratio;
        let span = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step + 1 - self.warmup_steps) as f64 / span).min(1.0);
        floor + (self.lr - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_by_hand() {
        let schedule =
            Schedule { lr: 1e-3, min_lr_ratio: 0.1, warmup_steps: 10, steps: 110, decay: Decay::Cosine };
        let close = |step, want: f64| {
            let got = schedule.lr_at(step);
            assert!((got - want).abs() < 1e-12, "step {step}: {got} is not {want}");
        };
        close(0, 1e-4);
        close(4, 5e-4);
        close(9, 1e-3);
        close(34, 1e-4 + 9e-4 * 0.5 * (1.0 + 0.5f64.sqrt()));
        close(59, 1e-4 + 9e-4 * 0.5);
        close(109, 1e-4);
        close(500, 1e-4);
        let constant = Schedule { decay: Decay::Constant, ..schedule };
        assert_eq!((constant.lr_at(4), constant.lr_at(109)), (5e-4, 1e-3));
    }

    #[test]
    fn no_warm_up_and_runs_shorter_than_it() {
        let schedule =
            Schedule { lr: 1.0, min_lr_ratio: 0.0, warmup_steps: 0, steps: 2, decay: Decay::Cosine };
        assert_eq!((schedule.lr_at(0), schedule.lr_at(1)), (0.5, 0.0));
        let short = Schedule { warmup_steps: 5, ..schedule };
        assert_eq!(short.lr_at(1), 0.4);
        assert!(short.lr_at(7).is_finite());
    }
}
