//! Numbers of experts that a budget in held parameters has room for.
//!
//! `held = rest + sum over layers of (3 d w r_l + d g_l)`, r_l experts and g_l gates of a layer.

use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;

use super::{Shape, shape};
use crate::error::{Error, Result};
use crate::method::Budget;

/// The parameters that the parts of a model with experts hold.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Held {
    /// Everything but experts that are chosen from and their gates.
    rest: f64,
    /// An expert.
    expert: f64,
    /// A gate.
    gate: f64,
    /// Experts of layers.
    experts: Vec<usize>,
    /// True if all gates stay.
    keeps_gates: bool,
    total: u64,
}

impl Held {
    /// Returns what `config` holds, of which all gates stay or not.
    pub(super) fn of(config: &Config, keeps_gates: bool) -> Result<Held> {
        let Shape { experts: held, sizes: [expert, gate], .. } = shape(config)?;
        let total = Accounting::of(config).total;
        let (expert, gate) = (expert as f64, gate as f64);
        let experts: usize = held.iter().sum();
        let rest = total as f64 - experts as f64 * (expert + gate);
        Ok(Held { rest, expert, gate, experts: held, keeps_gates, total })
    }

    /// Returns the parameters that are held with `experts` experts in all layers together.
    pub(super) fn params(&self, experts: usize) -> f64 {
        let gates = if self.keeps_gates { self.experts.iter().sum() } else { experts };
        self.rest + experts as f64 * self.expert + gates as f64 * self.gate
    }

    /// Returns the largest number of experts, at least `fewest` of every layer and the same of all, that the budget has room
    /// for; a layer that has fewer keeps its own.
    ///
    /// # Errors
    /// There is no room for `fewest`.
    pub(super) fn per_layer(&self, budget: Budget, fewest: usize) -> Result<usize> {
        let most = self.experts.iter().copied().max().unwrap_or(0);
        let all = |r: usize| self.experts.iter().map(|&held| held.min(r)).sum();
        self.largest(budget, fewest..=most, all)
    }

    /// Returns the largest number of experts of all layers together, at least `fewest` of each, that the budget has room for.
    ///
    /// # Errors
    /// There is no room for `fewest`.
    pub(super) fn of_all(&self, budget: Budget, fewest: usize) -> Result<usize> {
        let least = self.experts.iter().map(|&held| held.min(fewest)).sum();
        self.largest(budget, least..=self.experts.iter().sum(), |experts| experts)
    }

    fn largest(
        &self,
        budget: Budget,
        range: std::ops::RangeInclusive<usize>,
        all: impl Fn(usize) -> usize,
    ) -> Result<usize> {
        let params = budget.params(self.total);
        let least = self.params(all(*range.start()));
        let fits = range.rev().find(|&experts| self.params(all(experts)) <= params);
        fits.ok_or_else(|| {
            let percent = 100.0 * least / self.total as f64;
            let problem =
                format!("is less than the model holds with the fewest experts of a layer, {least:.0}");
            Error::budget(budget, problem, format!("give {percent:.1}% of the {} held or more", self.total))
        })
    }
}
