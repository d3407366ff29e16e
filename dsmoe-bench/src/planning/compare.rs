//! Budgets by request beside one budget for all, on requests that were not learnt.
//!
//! All ways keep to one mean share of the experts: what the requests that are asked open at one budget for all. Ways reckon with
//! the budgets' shares, and what is measured holds their price. Budgets dealt out by chance come near that share, and may exceed it.

use anyhow::Result;
use dsmoe_baselines::plan::{Curves, Fit, Policy, at_mean_share, least_at_mean_share, mean_at};
use dsmoe_kernels::rng::Rng;
use serde::{Deserialize, Serialize};

use super::heads::fitted;
use super::requests::{Profiled, mean};
use crate::ui::Ui;

/// Deviations of the heads that the cautious way adds to their mean.
const CAUTION: f64 = 1.0;
/// Shuffles of the budgets that chance stands for.
const SHUFFLES: u64 = 50;
const SHUFFLE_STREAM: u64 = 0x7368_7566;

/// The budgets that one way gave to the requests of a split, and its predictions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Way {
    /// Loss over that at the largest budget, mean over requests, nats.
    pub(crate) loss: f64,
    /// Share of the experts that the requests opened, mean.
    pub(crate) share: f64,
    /// Squared error of the predicted losses over that at the largest budget, mean over requests and budgets; none without
    /// predictions.
    pub(crate) error: Option<f64>,
}

/// The ways on one split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Split {
    /// The text that was not learnt.
    pub(crate) held_out: String,
    pub(crate) requests: usize,
    /// One budget for all, whose share the others keep to; it predicts the means of what was learnt.
    pub(crate) one_budget: Way,
    /// The budgets of the cautious way, dealt out by chance.
    pub(crate) by_chance: Way,
    pub(crate) one_head: Way,
    /// The mean of several heads.
    pub(crate) ensemble: Way,
    /// With one deviation of the heads added.
    pub(crate) cautious: Way,
    /// Knows the losses that are to be predicted, and may mix budgets of a request: a bound of the loss, no method.
    pub(crate) oracle: f64,
}

/// The requests of one split.
pub(crate) struct Sides<'a> {
    pub(crate) held_out: String,
    pub(crate) learnt: Vec<&'a Profiled>,
    pub(crate) asked: Vec<&'a Profiled>,
}

impl<'a> Sides<'a> {
    /// Asks the rows of which `is_held` is true.
    pub(crate) fn new(held_out: &str, rows: &'a [Profiled], is_held: &[bool]) -> Sides<'a> {
        let side = |held: bool| -> Vec<&'a Profiled> {
            rows.iter().zip(is_held).filter(|(_, is)| **is == held).map(|(row, _)| row).collect()
        };
        Sides { held_out: held_out.to_owned(), learnt: side(false), asked: side(true) }
    }

    /// Asks the rows of the source of that number.
    pub(crate) fn of_source(name: &str, rows: &'a [Profiled], number: usize) -> Sides<'a> {
        let is_held: Vec<bool> = rows.iter().map(|row| row.source == number).collect();
        Sides::new(name, rows, &is_held)
    }
}

/// The budgets and the networks of a comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    /// The budgets, ascending, as shares of the experts.
    pub(crate) shares: &'a [f64],
    /// The number of the budget whose share all ways keep to.
    pub(crate) target: usize,
    /// Heads of the ensemble.
    pub(crate) heads: usize,
    pub(crate) fit: Fit,
}

/// Predictions for the requests that are asked: for each a loss at every budget.
type Predictions = Vec<Vec<f64>>;

impl Terms<'_> {
    /// Learns from what is not held out, and chooses budgets for what is.
    pub(crate) fn compare(&self, sides: &Sides<'_>, ui: &Ui) -> Result<Split> {
        let one = fitted(&sides.learnt, 1, self.fit, ui)?;
        let several = fitted(&sides.learnt, self.heads, self.fit, ui)?;
        let predicted = |curves: &Curves, kappa: f64| -> Result<Predictions> {
            let of = |row: &&Profiled| Ok(Policy { kappa }.expected(&curves.predict(&row.features)?));
            sides.asked.iter().map(of).collect()
        };
        Ok(self
            .judge(sides, [predicted(&one, 0.0)?, predicted(&several, 0.0)?, predicted(&several, CAUTION)?]))
    }

    /// Chooses budgets by the predictions of one head, of the ensemble, and of the cautious ensemble.
    fn judge(&self, sides: &Sides<'_>, predictions: [Predictions; 3]) -> Split {
        let Sides { held_out, learnt, asked } = sides;
        let truth: Vec<Vec<f64>> = asked.iter().map(|row| row.extra()).collect();
        let used: Vec<Vec<f64>> = asked.iter().map(|row| row.active.clone()).collect();
        let way = |chosen: &[usize], error| Way {
            loss: mean_at(&truth, chosen),
            share: mean_at(&used, chosen),
            error,
        };
        let error = |predicted: &[Vec<f64>]| {
            let pairs = predicted.iter().flatten().zip(truth.iter().flatten());
            mean(&pairs.map(|(q, t)| (q - t).powi(2)).collect::<Vec<f64>>())
        };
        let learnt: Vec<Vec<f64>> = learnt.iter().map(|row| row.extra()).collect();
        let of_budget = |j: usize| mean(&learnt.iter().map(|extra| extra[j]).collect::<Vec<f64>>());
        let constant: Vec<f64> = (0..self.shares.len()).map(of_budget).collect();
        let one_budget = way(&vec![self.target; asked.len()], Some(error(&vec![constant; asked.len()])));
        let chosen = predictions.each_ref().map(|of| at_mean_share(of, self.shares, &used, one_budget.share));
        let [one_head, ensemble, cautious] =
            [0usize, 1, 2].map(|at| way(&chosen[at], Some(error(&predictions[at]))));
        let dealt: Vec<Way> =
            (0..SHUFFLES).map(|number| way(&shuffled(&chosen[2], self.fit.seed, number), None)).collect();
        let over = |of: fn(&Way) -> f64| mean(&dealt.iter().map(of).collect::<Vec<f64>>());
        Split {
            held_out: held_out.clone(),
            requests: asked.len(),
            one_budget,
            by_chance: Way { loss: over(|way| way.loss), share: over(|way| way.share), error: None },
            one_head,
            ensemble,
            cautious,
            oracle: least_at_mean_share(&truth, &used, one_budget.share),
        }
    }
}

/// Returns the budgets in another order.
fn shuffled(chosen: &[usize], seed: u64, number: u64) -> Vec<usize> {
    let (mut rng, mut dealt) = (Rng::new(seed, SHUFFLE_STREAM + number), chosen.to_vec());
    for i in (1..dealt.len()).rev() {
        dealt.swap(i, rng.below(i as u64 + 1) as usize);
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two requests of a source that is learnt, and two of another that is asked, at budgets of 0.25, 0.5 and 1.
    fn rows() -> Vec<Profiled> {
        let row = |source, active: [f64; 3], losses: [f64; 3]| Profiled {
            source,
            features: vec![1.0],
            active: active.to_vec(),
            losses: losses.to_vec(),
        };
        vec![
            row(0, [0.25, 0.5, 1.0], [2.0, 1.5, 1.0]),
            row(0, [0.25, 0.5, 1.0], [4.0, 3.5, 3.0]),
            row(1, [0.25, 0.5, 0.75], [1.0, 0.9, 0.8]),
            row(1, [0.25, 0.5, 0.75], [3.0, 1.2, 0.2]),
        ]
    }

    const TERMS: Terms<'static> = Terms {
        shares: &[0.25, 0.5, 1.0],
        target: 1,
        heads: 2,
        fit: Fit { epochs: 1, batch: 2, lr: 1e-3, seed: 0 },
    };

    /// The first request loses 0.2 and 0.1 at the smaller budgets, the second 2.8 and 1.
    #[test]
    fn ways_are_judged_on_what_was_not_learnt() {
        let rows = rows();
        let sides = Sides::of_source("b", &rows, 1);
        assert_eq!((sides.learnt.len(), sides.asked.len()), (2, 2));
        // One head knows the losses, the ensemble has them the wrong way round, and the cautious one sees no difference.
        let right = vec![vec![0.2, 0.1, 0.0], vec![2.8, 1.0, 0.0]];
        let wrong = vec![right[1].clone(), right[0].clone()];
        let alike = vec![vec![1.0, 0.5, 0.0]; 2];
        let found = TERMS.judge(&sides, [right, wrong, alike]);
        assert_eq!((found.held_out.as_str(), found.requests), ("b", 2));
        let is = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-9, "{found} for {wanted}");
        // All at the middle budget: 0.1 and 1. The other source's means are 1, 0.5 and 0: off by 0.8 and 0.4, and by 1.8 and 0.5.
        is(found.one_budget.loss, 0.55);
        is(found.one_budget.share, 0.5);
        is(found.one_budget.error.unwrap(), (0.64 + 0.16 + 3.24 + 0.25) / 6.0);
        // 0.25 and 0.75 are 0.5 in the mean, too: the second at the largest budget leaves the first the smallest.
        is(found.one_head.loss, 0.1);
        is(found.one_head.share, 0.5);
        is(found.one_head.error.unwrap(), 0.0);
        is(found.ensemble.loss, 1.4);
        is(found.ensemble.error.unwrap(), (2.6f64.powi(2) + 0.9f64.powi(2)) * 2.0 / 6.0);
        // Requests of one prediction get one budget, however it is dealt out.
        is(found.cautious.loss, 0.55);
        is(found.by_chance.loss, 0.55);
        assert_eq!(found.by_chance.error, None);
        is(found.oracle, 0.1);
    }

    #[test]
    fn chance_deals_the_budgets_of_the_cautious_way() {
        let rows = rows();
        let sides = Sides::of_source("b", &rows, 1);
        let right = vec![vec![0.2, 0.1, 0.0], vec![2.8, 1.0, 0.0]];
        let found = TERMS.judge(&sides, [right.clone(), right.clone(), right]);
        // Half of the deals are the other way round: 0.1 or 1.4 over the largest budget.
        let others = (found.by_chance.loss - 0.1) / 1.3 * SHUFFLES as f64;
        assert!((others - others.round()).abs() < 1e-9 && (5.0..45.0).contains(&others), "{others}");
        assert!((found.by_chance.share - 0.5).abs() < 1e-9);
        assert!(found.cautious.loss < found.by_chance.loss);
        assert_eq!(shuffled(&[0, 1, 2], 3, 4), shuffled(&[0, 1, 2], 3, 4));
        let mut sorted = shuffled(&[2, 0, 1, 1], 3, 4);
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 1, 2]);
    }
}
