//! The text, the settings and the sizes of a start.

use dsmoe_router::RouterConfig;

use super::settings::{BUDGETS, RIDGE_TOKENS, StartSettings};
use crate::error::{Error, Result};

/// A start from calibration text.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// Token ids of sequences of one length.
    pub sequences: Vec<Vec<u32>>,
    /// The share of experts that run, the core included.
    pub active: f64,
    /// The settings of the gates, with the number of experts.
    pub router: RouterConfig,
    /// The parts that are fitted, and their settings.
    pub settings: StartSettings,
    /// Seed of the experts' clusters.
    pub seed: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

/// Sizes and shares that are the same for all layers.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) num_experts: usize,
    /// Experts of the core.
    pub(super) core: usize,
    /// The shares that thresholds are stored for, ascending, that of the start among them.
    pub(super) budgets: Vec<f64>,
    /// The place of the start's share in `budgets`.
    pub(super) chosen: usize,
    /// Sequences that routers and projections are fitted to; the others place the thresholds.
    pub(super) fitted: usize,
    pub(super) sequences: usize,
}

impl Plan {
    pub(super) fn of(start: &Start) -> Result<Plan> {
        let (num_experts, active) = (start.router.num_experts, start.active);
        if !(active > 0.0 && active <= 1.0) {
            return Err(Error::argument(
                format!("an active share of {active}"),
                "use a share above 0 and up to 1",
            ));
        }
        let core = (start.settings.core * active * num_experts as f64 + 1e-9) as usize;
        let core = core.min(num_experts - 1);
        let of_core = core as f64 / num_experts as f64;
        let above_core = || BUDGETS.into_iter().filter(|&budget| budget > of_core).collect();
        let mut budgets: Vec<f64> = start.settings.budgets.clone().unwrap_or_else(above_core);
        budgets.push(active);
        if let Some(wrong) = budgets.iter().find(|&&budget| !(budget > of_core && budget <= 1.0)) {
            let problem =
                format!("a budget of {wrong} is not above the share of the core, {of_core:.4}, and up to 1");
            return Err(Error::argument(problem, "leave it out, or make the core smaller"));
        }
        budgets.sort_by(f64::total_cmp);
        budgets.dedup();
        let chosen = budgets.iter().position(|&budget| budget == active).unwrap_or(0);
        let sequences = start.sequences.len();
        let fitted = if sequences > 1 { sequences - sequences.div_ceil(8) } else { sequences };
        Ok(Plan { num_experts, core, budgets, chosen, fitted, sequences })
    }

    /// Returns the place of the budget at which the projections are fitted to a sequence.
    pub(super) fn budget_of(&self, sequence: usize, elastic: bool) -> usize {
        let others = self.budgets.len() - 1;
        if !elastic || others == 0 || sequence.is_multiple_of(2) {
            return self.chosen;
        }
        let other = sequence / 2 % others;
        if other < self.chosen { other } else { other + 1 }
    }

    /// Returns whether a sequence is fitted to.
    pub(super) fn is_fitted(&self, sequence: usize) -> bool {
        sequence < self.fitted
    }

    /// Returns whether a sequence places thresholds.
    pub(super) fn is_held(&self, sequence: usize) -> bool {
        sequence >= self.fitted || self.fitted == self.sequences
    }

    /// Returns a ridge that is `share` of the diagonal at [`RIDGE_TOKENS`] tokens, for the fitted sequences of `seq` tokens.
    pub(super) fn ridge(&self, share: f64, seq: usize) -> f64 {
        share * RIDGE_TOKENS as f64 / (self.fitted * (seq - 1)).max(1) as f64
    }

    pub(super) fn routed(&self) -> usize {
        self.num_experts - self.core
    }

    /// Returns the share of routed experts that a budget leaves to run.
    pub(super) fn routed_share(&self, budget: f64) -> f64 {
        let open = budget * self.num_experts as f64 - self.core as f64;
        (open / self.routed() as f64).clamp(0.0, 1.0)
    }
}

/// Makes the error for a fit without a finite solution.
pub(super) fn not_finite(layer: usize) -> Error {
    Error::Calibration {
        problem: format!("layer {layer} cannot be fitted: the FFN's values are not finite"),
        help: "use an undamaged model".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_router::GateValue;

    use super::*;

    #[test]
    fn sequences_take_turns_over_the_budgets() {
        let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(8) };
        let settings =
            StartSettings { core: 0.25, budgets: Some(vec![0.25, 0.5, 1.0]), ..StartSettings::default() };
        let sequences = vec![vec![0; 4]; 16];
        let start = Start { sequences, active: 0.5, router, settings, seed: 0, force: false };
        let plan = Plan::of(&start).unwrap();
        assert_eq!((plan.core, plan.chosen, plan.budgets.clone()), (1, 1, vec![0.25, 0.5, 1.0]));
        assert_eq!((plan.fitted, plan.is_held(13), plan.is_held(14)), (14, false, true));
        let turns = |elastic| (0..8).map(|sequence| plan.budget_of(sequence, elastic)).collect::<Vec<_>>();
        assert_eq!(turns(true), [1, 0, 1, 2, 1, 0, 1, 2]);
        assert_eq!(turns(false), [1; 8]);
        assert_eq!([0.125, 0.25, 1.0].map(|budget| plan.routed_share(budget)), [0.0, 1.0 / 7.0, 1.0]);
        // By default there are no budgets that the core alone exceeds.
        let settings = StartSettings { core: 0.5, budgets: None, ..StartSettings::default() };
        let plan = Plan::of(&Start { settings, ..start }).unwrap();
        assert_eq!(plan.budgets, [0.375, 0.5, 0.75, 1.0]);
    }
}
