//! The predicted extra loss of a request at each budget of a model, and the budget that is chosen by it.
//!
//! ```text
//! q_B = 0,  q_j = sum_{i=j}^{B-1} softplus(y_i)       the predicted extra loss at budget j against the largest, from a head's outputs y
//! loss = mean over j < B of (q_j - t_j)^2
//! ```

use serde::{Deserialize, Serialize};

use super::network::{Ensemble, Fit};
use crate::error::{Error, Result};

/// Widths of the backbone.
const HIDDEN: [usize; 2] = [60, 40];
/// Halvings of the interval that holds a price.
const HALVINGS: usize = 60;

/// A network that predicts from a request's features what its continuation loses at every budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Curves {
    budgets: usize,
    /// Means and deviations of the features.
    mean: Vec<f64>,
    deviation: Vec<f64>,
    network: Ensemble,
}

/// The predictions for one request: by head and budget, nats.
pub type Predicted = Vec<Vec<f64>>;

impl Curves {
    /// Fits a network of so many heads to rows of features and of extra losses at all budgets, ascending, the last of which is 0.
    /// `show` receives how many passes are done; returns nothing where it does not consent.
    ///
    /// # Errors
    /// No rows, rows of different lengths, fewer than two budgets, or no heads.
    pub fn fit(
        features: &[Vec<f64>],
        extra: &[Vec<f64>],
        heads: usize,
        fit: Fit,
        show: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Curves>> {
        let width = features.first().map_or(0, Vec::len);
        let budgets = extra.first().map_or(0, Vec::len);
        let alike =
            features.iter().all(|row| row.len() == width) && extra.iter().all(|row| row.len() == budgets);
        if width == 0 || budgets < 2 || heads == 0 || !alike || features.len() != extra.len() {
            return Err(Error::Numeric {
                place: "plan".to_owned(),
                problem: format!("{} rows of {width} features and {budgets} budgets", features.len()),
                help: "give rows of one length, two budgets at least, and a head".to_owned(),
            });
        }
        let rows = features.len() as f64;
        let mean: Vec<f64> =
            (0..width).map(|i| features.iter().map(|row| row[i]).sum::<f64>() / rows).collect();
        let square = |i: usize| features.iter().map(|row| (row[i] - mean[i]).powi(2)).sum::<f64>() / rows;
        // A feature that does not vary tells nothing.
        let deviation: Vec<f64> = (0..width).map(|i| square(i).sqrt()).collect();
        let network = Ensemble::new(width, HIDDEN, budgets - 1, heads, fit.seed);
        let mut curves = Curves { budgets, mean, deviation, network };
        let x: Vec<f32> = features.iter().flat_map(|row| curves.scaled(row)).collect();
        let loss = |y: &[f32], batch: &[usize]| {
            let (mut sum, mut grad) = (0.0, Vec::with_capacity(y.len()));
            let scale = 1.0 / (batch.len() * (budgets - 1)) as f64;
            for (y, &row) in y.chunks(budgets - 1).zip(batch) {
                let q = curve(y);
                let differences: Vec<f64> = q.iter().zip(&extra[row]).map(|(q, t)| q - t).collect();
                sum += scale * differences[..budgets - 1].iter().map(|d| d * d).sum::<f64>();
                let mut slope = 0.0;
                for (i, &y) in y.iter().enumerate() {
                    // Output i is in q_0 to q_i.
                    slope += 2.0 * scale * differences[i];
                    grad.push((slope / (1.0 + (-f64::from(y)).exp())) as f32);
                }
            }
            (sum, grad)
        };
        let mut network = curves.network.clone();
        let fitted = network.fit(&x, &loss, fit, show);
        curves.network = network;
        Ok(fitted.map(|_| curves))
    }

    fn scaled(&self, features: &[f64]) -> impl Iterator<Item = f32> {
        let scaled = features.iter().zip(&self.mean).zip(&self.deviation);
        let of = |((x, mean), deviation): ((&f64, &f64), &f64)| {
            // Far outside of what was learnt a feature counts as the farthest.
            if *deviation > 0.0 { ((x - mean) / deviation).clamp(-10.0, 10.0) as f32 } else { 0.0 }
        };
        scaled.map(of).collect::<Vec<f32>>().into_iter()
    }

    /// Returns the number of heads.
    pub fn heads(&self) -> usize {
        self.network.heads()
    }

    /// Checks a network that was read: for so many budgets.
    ///
    /// # Errors
    /// It does not fit together, or holds what is not finite.
    pub fn check(&self, budgets: usize) -> Result<()> {
        let width = self.mean.len();
        let numbers = self.mean.iter().chain(&self.deviation).all(|x| x.is_finite());
        let fits = self.deviation.len() == width && self.budgets == budgets && budgets > 1;
        if numbers && fits && self.network.is_sound(width, budgets - 1) {
            return Ok(());
        }
        Err(Error::Numeric {
            place: "plan".to_owned(),
            problem: format!("the network is not one of {width} features and {budgets} budgets"),
            help: "train it again".to_owned(),
        })
    }

    /// Predicts for one request.
    ///
    /// # Errors
    /// There are not as many features as the network learnt from, or one is not finite.
    pub fn predict(&self, features: &[f64]) -> Result<Predicted> {
        if features.len() != self.mean.len() || features.iter().any(|x| !x.is_finite()) {
            return Err(Error::Numeric {
                place: "plan".to_owned(),
                problem: format!("{} features for a network of {}", features.len(), self.mean.len()),
                help: "use the model and the prompt length that the plan was made with".to_owned(),
            });
        }
        let x: Vec<f32> = self.scaled(features).collect();
        Ok(self.network.forward(&x).iter().map(|y| curve(y)).collect())
    }
}

/// Returns the extra losses that a head's outputs stand for.
fn curve(y: &[f32]) -> Vec<f64> {
    let mut q = vec![0.0; y.len() + 1];
    for (i, &y) in y.iter().enumerate().rev() {
        let y = f64::from(y);
        q[i] = q[i + 1] + y.max(0.0) + (-y.abs()).exp().ln_1p();
    }
    q
}

/// How a request's budget follows from the predictions of the heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Deviations of the heads that are added to their mean: heads that disagree get a larger budget.
    pub kappa: f64,
}

impl Policy {
    /// Returns what the heads predict for every budget.
    pub fn expected(self, predicted: &[Vec<f64>]) -> Vec<f64> {
        let (heads, budgets) = (predicted.len().max(1) as f64, predicted.first().map_or(0, Vec::len));
        let of = |j: usize| {
            let mean = predicted.iter().map(|q| q[j]).sum::<f64>() / heads;
            let square = predicted.iter().map(|q| (q[j] - mean).powi(2)).sum::<f64>() / heads;
            mean + self.kappa * square.sqrt()
        };
        (0..budgets).map(of).collect()
    }

    /// Returns the least budget whose expected extra loss is within `tolerance`; the largest is within any.
    pub fn within(self, predicted: &[Vec<f64>], tolerance: f64) -> usize {
        let expected = self.expected(predicted);
        expected.iter().position(|q| *q <= tolerance).unwrap_or(expected.len().saturating_sub(1))
    }
}

/// Requests that share a mean budget. Rows are of requests and have an entry for each budget.
#[derive(Clone, Copy, Debug)]
struct Shared<'a> {
    /// Losses.
    costs: &'a [Vec<f64>],
    /// The shares that a choice reckons with.
    priced: &'a [Vec<f64>],
    /// The shares that requests use.
    used: &'a [Vec<f64>],
    /// The largest mean of the shares in use.
    target: f64,
}

impl Shared<'_> {
    /// Returns the budget of every request that is least in `cost + price share`; among equals the smaller one.
    fn at(&self, price: f64) -> Vec<usize> {
        let least = |(costs, shares): (&Vec<f64>, &Vec<f64>)| {
            let priced = costs.iter().zip(shares).map(|(cost, share)| cost + price * share).enumerate();
            priced.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(j, _)| j)
        };
        self.costs.iter().zip(self.priced).map(least).collect()
    }

    fn mean_share(&self, chosen: &[usize]) -> f64 {
        mean_at(self.used, chosen)
    }

    fn mean_cost(&self, chosen: &[usize]) -> f64 {
        mean_at(self.costs, chosen)
    }

    fn fits(&self, chosen: &[usize]) -> bool {
        self.mean_share(chosen) <= self.target + 1e-12
    }

    /// Returns the lowest price at which the budgets fit; none if no price is high enough.
    fn price(&self) -> Option<f64> {
        if self.fits(&self.at(0.0)) {
            return Some(0.0);
        }
        let (mut low, mut high) = (0.0, 1.0);
        while !self.fits(&self.at(high)) {
            high *= 2.0;
            if high > 1e12 {
                return None;
            }
        }
        for _ in 0..HALVINGS {
            let middle = 0.5 * (low + high);
            if self.fits(&self.at(middle)) { high = middle } else { low = middle }
        }
        Some(high)
    }

    /// Raises single budgets, the one first that gains most for its share, while they fit.
    fn fill(&self, chosen: &mut [usize]) {
        loop {
            let sum = chosen.iter().zip(self.used).map(|(&j, used)| used[j]).sum::<f64>();
            let room = (self.target + 1e-12) * chosen.len() as f64 - sum;
            let mut best: Option<(f64, usize, usize)> = None;
            let shares = self.priced.iter().zip(self.used);
            let requests = chosen.iter().zip(self.costs).zip(shares).enumerate();
            for (request, ((&now, costs), (priced, used))) in requests {
                for (j, cost) in costs.iter().enumerate() {
                    let (more, gain) = (priced[j] - priced[now], costs[now] - cost);
                    if more > 0.0
                        && used[j] - used[now] <= room
                        && gain > 0.0
                        && best.is_none_or(|(most, ..)| gain / more > most)
                    {
                        best = Some((gain / more, request, j));
                    }
                }
            }
            let Some((_, request, j)) = best else { return };
            chosen[request] = j;
        }
    }
}

/// Returns the mean over requests of the entries of their `rows` at the budgets `chosen`; 0 without requests.
///
/// # Panics
/// A row has no entry at the budget of its request.
pub fn mean_at(rows: &[Vec<f64>], chosen: &[usize]) -> f64 {
    chosen.iter().zip(rows).map(|(&j, row)| row[j]).sum::<f64>() / chosen.len().max(1) as f64
}

/// Returns a budget for every request, so that the mean of the shares that they use is `target` at the most and the sum of the
/// losses `costs` small: each takes the least of `cost + price share` at the lowest price that meets the target, and what is left
/// of the target is given where it gains most. The largest budget for all that meets the target is taken if it is better.
/// `shares` are those of the budgets, ascending, which a choice reckons with; `used` has for every request what it uses at
/// each budget, which is only measured and holds the price. Where even the smallest budgets exceed the target, it is theirs.
///
/// # Panics
/// A row of `costs` or `used` has fewer entries than there are budgets, or there are fewer rows of `used`.
pub fn at_mean_share(costs: &[Vec<f64>], shares: &[f64], used: &[Vec<f64>], target: f64) -> Vec<usize> {
    assert!(used.len() >= costs.len(), "plan: shares of {} requests of {}", used.len(), costs.len());
    let priced = vec![shares.to_vec(); costs.len()];
    let shared = Shared { costs, priced: &priced, used, target };
    let Some(price) = shared.price() else { return vec![0; costs.len()] };
    let mut chosen = shared.at(price);
    shared.fill(&mut chosen);
    let one = (0..shares.len()).rev().map(|j| vec![j; costs.len()]).find(|one| shared.fits(one));
    one.filter(|one| shared.mean_cost(one) < shared.mean_cost(&chosen)).unwrap_or(chosen)
}

/// Returns a mean loss that no choice of budgets is below whose requests use a mean share of `target` at the most: the bound of
/// Lagrange's multiplier. `used` has for every request what it uses at each budget. Where even the smallest budgets exceed the
/// target, it is theirs.
///
/// # Panics
/// There are fewer rows of `used` than of `costs`.
pub fn least_at_mean_share(costs: &[Vec<f64>], used: &[Vec<f64>], target: f64) -> f64 {
    assert!(used.len() >= costs.len(), "plan: shares of {} requests of {}", used.len(), costs.len());
    let shared = Shared { costs, priced: used, used, target };
    let Some(price) = shared.price() else { return shared.mean_cost(&vec![0; costs.len()]) };
    let chosen = shared.at(price);
    shared.mean_cost(&chosen) + price * (shared.mean_share(&chosen) - target)
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::rng::Rng;

    use super::*;

    /// The least mean cost of all ways to give five requests one of three budgets.
    fn optimum(shared: &Shared<'_>) -> f64 {
        let all = (0..3usize.pow(5))
            .map(|code| -> Vec<usize> { (0..5).map(|place| code / 3usize.pow(place) % 3).collect() });
        let fitting = all.filter(|chosen| shared.fits(chosen)).map(|chosen| shared.mean_cost(&chosen));
        fitting.fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn curves_fall_to_zero_at_the_largest_budget() {
        let q = curve(&[0.0, -1.0, 2.0]);
        let softplus = |y: f64| (1.0 + y.exp()).ln();
        assert!((q[2] - softplus(2.0)).abs() < 1e-12);
        assert!((q[0] - softplus(0.0) - softplus(-1.0) - softplus(2.0)).abs() < 1e-12);
        assert_eq!(q[3], 0.0);
        assert!(curve(&[100.0])[0] == 100.0 && curve(&[-100.0])[0] >= 0.0);
    }

    #[test]
    fn heads_learn_curves_and_disagree_where_nothing_was_learnt() {
        let mut rng = Rng::new(3, 0);
        let features: Vec<Vec<f64>> =
            (0..400).map(|_| (0..4).map(|_| f64::from(rng.normal())).collect()).collect();
        let extra: Vec<Vec<f64>> =
            features.iter().map(|x| vec![1.0 + x[0].abs(), 0.5 + 0.5 * x[0].abs(), 0.0]).collect();
        let fit = Fit { epochs: 60, lr: 3e-3, ..Fit::default() };
        let curves = Curves::fit(&features, &extra, 4, fit, &mut |_| true).unwrap().unwrap();
        curves.check(3).unwrap();
        assert!(curves.check(4).is_err());
        let plain = Policy { kappa: 0.0 };
        let error: f64 = features
            .iter()
            .zip(&extra)
            .map(|(x, t)| (plain.expected(&curves.predict(x).unwrap())[0] - t[0]).abs())
            .sum::<f64>()
            / 400.0;
        assert!(error < 0.2, "{error}");
        let spread = |x: &[f64]| {
            let predicted = curves.predict(x).unwrap();
            Policy { kappa: 1.0 }.expected(&predicted)[0] - plain.expected(&predicted)[0]
        };
        assert!(spread(&[8.0, 8.0, -8.0, 8.0]) > 2.0 * spread(&[0.5, 0.0, 0.0, 0.0]));
        assert!(curves.predict(&[0.0; 3]).is_err() && curves.predict(&[f64::NAN; 4]).is_err());
        // Heads that are one have no deviation.
        let one = Curves::fit(&features, &extra, 1, fit, &mut |_| true).unwrap().unwrap();
        let predicted = one.predict(&features[0]).unwrap();
        assert_eq!(Policy { kappa: 5.0 }.expected(&predicted), plain.expected(&predicted));
        let twice = vec![predicted[0].clone(), predicted[0].clone()];
        assert_eq!(Policy { kappa: 5.0 }.expected(&twice), predicted[0]);
        assert!(Curves::fit(&features[..0], &extra[..0], 1, fit, &mut |_| true).is_err());
        assert!(Curves::fit(&features, &extra, 0, fit, &mut |_| true).is_err());
    }

    #[test]
    fn budgets_keep_within_a_tolerance_or_a_share() {
        let predicted = vec![vec![0.3, 0.1, 0.0], vec![0.5, 0.1, 0.0]];
        assert_eq!(Policy { kappa: 0.0 }.within(&predicted, 0.4), 0);
        assert_eq!(Policy { kappa: 1.0 }.within(&predicted, 0.4), 1);
        assert_eq!(Policy { kappa: 1.0 }.within(&predicted, 0.05), 2);
        let shares = [0.25, 0.5, 1.0];
        let costs = vec![vec![0.0, 0.0, 0.0], vec![4.0, 1.0, 0.0], vec![0.2, 0.1, 0.0]];
        let used: Vec<Vec<f64>> = costs.iter().map(|_| shares.to_vec()).collect();
        for (target, want) in [(1.0, [0, 2, 2]), (0.5, [0, 2, 0]), (0.25, [0, 0, 0]), (0.1, [0, 0, 0])] {
            let chosen = at_mean_share(&costs, &shares, &used, target);
            let mean = chosen.iter().map(|&j| shares[j]).sum::<f64>() / 3.0;
            assert!(mean <= f64::max(target, 0.25) + 1e-12);
            assert_eq!(chosen, want, "{target}");
        }
    }

    /// Against all choices of three budgets for five requests.
    #[test]
    fn budgets_of_one_mean_are_near_the_optimum_and_the_bound_is_below_it() {
        let mut rng = Rng::new(11, 0);
        let (shares, target) = ([0.25, 0.5, 1.0], 0.5);
        let mut worst = 0.0f64;
        for case in 0..200 {
            // Alike requests change their budgets at one price; costs need not fall with the share.
            let alike = case % 3 == 0;
            let one: Vec<f64> = (0..3).map(|j| f64::from(rng.normal()).abs() / f64::from(j + 1)).collect();
            let of = |_| match alike {
                true => one.clone(),
                false => (0..3).map(|j| f64::from(rng.normal()).abs() / f64::from(j + 1)).collect(),
            };
            let costs: Vec<Vec<f64>> = (0..5).map(of).collect();
            let used: Vec<Vec<f64>> = costs.iter().map(|_| shares.to_vec()).collect();
            let shared = Shared { costs: &costs, priced: &used, used: &used, target };
            let optimum = optimum(&shared);
            let chosen = at_mean_share(&costs, &shares, &used, target);
            let found = shared.mean_cost(&chosen);
            assert!(shared.fits(&chosen) && found >= optimum - 1e-12, "{case}: {found} against {optimum}");
            assert!(found <= shared.mean_cost(&[1; 5]) + 1e-12, "{case}: one budget for all is better");
            let bound = least_at_mean_share(&costs, &used, target);
            assert!(bound <= optimum + 1e-12, "{case}: bound {bound} above {optimum}");
            worst = worst.max(found - optimum);
        }
        assert!(worst < 0.15, "{worst}");
    }

    /// Two requests of one cost, of which the second uses less for the largest budget than the first does.
    #[test]
    fn a_mean_share_is_that_which_requests_use() {
        let (shares, costs) = ([0.25, 0.5, 1.0], vec![vec![3.0, 1.0, 0.0]; 2]);
        let used = [vec![0.2, 0.4, 0.9], vec![0.3, 0.6, 1.0]];
        assert_eq!(mean_at(&used, &[1, 2]), 0.7);
        // The middle budget for both uses 0.5. Of 0.72, 0.44 is left for two: 0.4 raises the second, and the first takes 0.5.
        assert_eq!(at_mean_share(&costs, &shares, &used, 0.72), [1, 2]);
        assert_eq!(at_mean_share(&costs, &shares, &used, 0.69), [1, 1]);
        // Budgets that open what they say leave no room for either.
        let said = [shares.to_vec(), shares.to_vec()];
        assert_eq!(at_mean_share(&costs, &shares, &said, 0.72), [1, 1]);
        // At a price of 2 the first has 1 + 0.8 at the middle and 1.8 at the largest budget, and the second 2 at the largest:
        // 0.5 + 2 (0.7 - 0.72).
        assert!((least_at_mean_share(&costs, &used, 0.72) - 0.46).abs() < 1e-9);
    }

    #[test]
    fn measured_shares_are_kept_and_the_bound_is_below_all_choices() {
        let mut rng = Rng::new(12, 0);
        let (shares, target) = ([0.25, 0.5, 1.0], 0.5);
        let mut differ = 0;
        for case in 0..200 {
            let of = |_| -> Vec<f64> {
                (0..3).map(|j| f64::from(rng.normal()).abs() / f64::from(j + 1)).collect()
            };
            let costs: Vec<Vec<f64>> = (0..5).map(of).collect();
            let of = |_| -> Vec<f64> {
                shares.iter().map(|share| share * f64::from(0.8 + 0.4 * rng.uniform())).collect()
            };
            let used: Vec<Vec<f64>> = (0..5).map(of).collect();
            let shared = Shared { costs: &costs, priced: &used, used: &used, target };
            let optimum = optimum(&shared);
            let chosen = at_mean_share(&costs, &shares, &used, target);
            let found = shared.mean_cost(&chosen);
            assert!(shared.fits(&chosen) && found >= optimum - 1e-12, "{case}: {found} against {optimum}");
            let bound = least_at_mean_share(&costs, &used, target);
            assert!(bound <= optimum + 1e-12, "{case}: bound {bound} above {optimum}");
            let said: Vec<Vec<f64>> = costs.iter().map(|_| shares.to_vec()).collect();
            differ += usize::from(at_mean_share(&costs, &shares, &said, target) != chosen);
        }
        assert!(differ > 20, "{differ}: what is measured decides");
    }
}
