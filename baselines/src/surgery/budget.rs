//! Numbers of experts that a budget in held parameters has room for.
//!
//! `held = rest + sum over layers of (s_l r_l + g g_l)`, r_l experts of s_l parameters and g_l gates of a layer. What all tokens run
//! is of the rest: a core, residual experts, and what gates have in common. Where gates share experts and go with them, g_l is that of
//! the r_l experts that have most: which stay is not known before.

use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;

use super::{Shape, shape, shares};
use crate::error::{Error, Result};
use crate::method::Budget;

/// The parameters that the parts of a model with experts hold.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Held {
    /// Everything but experts that are chosen from and their gates.
    rest: f64,
    /// An expert of each layer.
    sizes: Vec<f64>,
    /// A gate.
    gate: f64,
    /// Experts of layers.
    experts: Vec<usize>,
    /// Experts of layers that all tokens run.
    always: Vec<usize>,
    /// The gates of each expert of layers, descending.
    gates: Vec<Vec<usize>>,
    /// True if all gates stay.
    keeps_gates: bool,
    total: u64,
}

impl Held {
    /// Returns what `config` holds, of which all gates stay or not.
    pub(super) fn of(config: &Config, keeps_gates: bool) -> Result<Held> {
        let Shape { experts, mut gates, always, sizes, gate, .. } = shape(config)?;
        for gates in &mut gates {
            gates.sort_unstable();
            gates.reverse();
        }
        let total = Accounting::of(config).total;
        let (sizes, gate): (Vec<f64>, _) = (sizes.into_iter().map(|size| size as f64).collect(), gate as f64);
        let mut held = Held { rest: 0.0, sizes, gate, experts, always, gates, keeps_gates, total };
        held.rest = total as f64 - held.params(&held.experts);
        Ok(held)
    }

    /// Returns the parameters that are held with as many experts of each layer, at most.
    pub(super) fn params(&self, experts: &[usize]) -> f64 {
        let of_layer = |((&experts, gates), &size): ((&usize, &Vec<usize>), &f64)| {
            let left = if self.keeps_gates { gates.len() } else { experts };
            let gates: usize = gates.iter().take(left).sum();
            experts as f64 * size + gates as f64 * self.gate
        };
        self.rest + experts.iter().zip(&self.gates).zip(&self.sizes).map(of_layer).sum::<f64>()
    }

    /// Returns the largest numbers of experts, at least `fewest` in every layer, that the budget has room for: all layers have
    /// as many, those that all tokens run included, but for a layer that has fewer and keeps its own.
    ///
    /// # Errors
    /// There is no room for `fewest`.
    pub(super) fn per_layer(&self, budget: Budget, fewest: usize) -> Result<Vec<usize>> {
        let layers = || self.experts.iter().zip(&self.always);
        let least = layers().map(|(&held, &always)| always + held.min(fewest)).max().unwrap_or(0);
        let most = layers().map(|(held, always)| held + always).max().unwrap_or(0);
        let of = |r: usize| layers().map(|(&held, &always)| held.min(r.saturating_sub(always))).collect();
        self.largest(budget, least..=most, of)
    }

    /// Divides the largest number of experts of all layers together that the budget has room for among layers: `fewest` of each, or
    /// all that it has, and otherwise those of the largest `values` of all layers ([`shares`]).
    ///
    /// # Errors
    /// There is no room for `fewest`.
    pub(super) fn of_all(&self, budget: Budget, values: &[Vec<f64>], fewest: usize) -> Result<Vec<usize>> {
        let least = self.experts.iter().map(|&held| held.min(fewest)).sum();
        let most = self.experts.iter().sum();
        self.largest(budget, least..=most, |experts| shares(values, experts, fewest))
    }

    /// Returns what `of` makes of the largest number in `range` for which there is room; it needs more for a larger one.
    fn largest(
        &self,
        budget: Budget,
        range: std::ops::RangeInclusive<usize>,
        of: impl Fn(usize) -> Vec<usize>,
    ) -> Result<Vec<usize>> {
        let params = budget.params(self.total);
        let least = self.params(&of(*range.start()));
        if least > params {
            let percent = 100.0 * least / self.total as f64;
            let problem =
                format!("is less than the model holds with the fewest experts of a layer, {least:.0}");
            let help = format!("give {percent:.1}% of the {} held or more", self.total);
            return Err(Error::budget(budget, problem, help));
        }
        let (mut fits, mut most) = range.into_inner();
        while fits < most {
            let middle = fits + (most - fits).div_ceil(2);
            match self.params(&of(middle)) <= params {
                true => fits = middle,
                false => most = middle - 1,
            }
        }
        Ok(of(fits))
    }
}
