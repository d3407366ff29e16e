//! Holds the active share by the thresholds of the gates.
//!
//! The share is a known function of the thresholds once the logits of a batch are counted, so nothing has to be
//! learned about the plant: the thresholds follow the quantile of the logits.
//!
//! ```text
//! after a micro-batch at budget b, for the knots next to b (one knot: the target), of weight w
//!   wanted      = the knot's share; of one knot that starts far away, a ramp from the first measured share
//!   shift       = what has to be added to the knot's thresholds for the batch to open `wanted`
//!   thresholds <- thresholds + w shift / 4
//! ```
//! Where several micro-batches run with the same thresholds, as those of a step of several lanes do, there is one update:
//! ```text
//!   shift       = that of the logits of all micro-batches beside the knot
//!   thresholds <- thresholds + (1 - product of (1 - w / 4) over them) shift
//! ```
//! A quarter of a shift filters the text's own variation. It suffices where the gradient leaves the gates as a whole as they
//! are: logits then move against each other, and little together. The weight of the sparsity loss at which it does is the
//! mean of the last micro-batches' [`Pull::multiplier`], for every knot; before there is one,
//! [`crate::SparsityOver::Held`] serves.

use serde::{Deserialize, Serialize};

use crate::Pull;
use crate::counts::{Curves, LogitCounts};
use crate::{Error, Result};

/// Part of a shift that is made at once.
const RATE: f64 = 0.25;
/// Part of a new multiplier in the mean: that of about five micro-batches.
const NEWEST: f64 = 0.2;
/// A start this close to the target is not ramped.
const CLOSE: f64 = 0.1;
/// Thresholds stay within this; logits far beyond it are those of a broken router.
const LARGEST: f64 = 30.0;
/// A share of 1 has no quantile; all but the least certain gates are opened instead.
const MOST: f64 = 0.999;

/// The thresholds of one budget.
///
/// ```
/// use dsmoe_router::{Knot, ThresholdController};
///
/// // The thresholds of two layers at two budgets; a budget between them has thresholds between theirs.
/// let sparse = Knot { active: 0.25, bars: vec![2.0, 1.0] };
/// let half = Knot { active: 0.5, bars: vec![0.0, 0.0] };
/// let controller = ThresholdController::new(vec![sparse, half], 100)?;
/// let bars = controller.bars(&[0.375, 0.375]);
/// assert!(bars[0] > 0.0 && bars[0] < 2.0, "{bars:?}");
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Knot {
    /// The active share.
    pub active: f64,
    /// One threshold per layer, a logit.
    pub bars: Vec<f64>,
}

/// Controller of the thresholds. Its serialised form resumes bit for bit.
///
/// ```
/// use dsmoe_router::{Knot, LogitCounts, ThresholdController};
/// use ndarray::Array2;
///
/// let knot = Knot { active: 0.25, bars: vec![0.0] };
/// let mut controller = ThresholdController::new(vec![knot], 1)?;
/// let mut counts = LogitCounts::new(1);
/// counts.add(0, 0, Array2::from_shape_fn((100, 4), |(t, i)| (t * 4 + i) as f32 / 100.0).view());
/// controller.fit(0, &counts);
/// assert!((counts.curves().share(&controller.knots()[0].bars) - 0.25).abs() < 0.01);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThresholdController {
    /// In ascending order of their shares.
    knots: Vec<Knot>,
    /// Updates over which a single knot's share is approached from afar.
    ramp: u64,
    updates: u64,
    /// The first measured share.
    from: Option<f64>,
    /// The weight of the sparsity loss that leaves the gates as a whole as they are, for each knot that was measured.
    #[serde(default)]
    multipliers: Vec<Option<f64>>,
}

/// Checks that the shares ascend and that there is a threshold for every layer.
fn check_knots(knots: &[Knot]) -> Result<()> {
    let layers = knots.first().map_or(0, |knot| knot.bars.len());
    let fits = |knot: &Knot| {
        (0.0..=1.0).contains(&knot.active)
            && knot.bars.len() == layers
            && !knot.bars.iter().any(|bar| bar.is_nan())
    };
    let ascends = knots.windows(2).all(|pair| pair[0].active < pair[1].active);
    if layers == 0 || !knots.iter().all(fits) || !ascends {
        let found = format!("{:?}", knots.iter().map(|knot| knot.active).collect::<Vec<_>>());
        let allowed = "ascending shares from 0 to 1, each with a threshold for every layer";
        return Err(Error::range("budgets", found, allowed));
    }
    Ok(())
}

impl ThresholdController {
    /// Holds the budgets of `knots`, between which thresholds are interpolated. A single knot's share is approached over
    /// `ramp` updates where the model starts far from it.
    ///
    /// # Errors
    /// There are no knots or no layers, a share is not in 0..=1, shares do not ascend, a threshold is not a number, or the
    /// knots have different numbers of layers.
    pub fn new(knots: Vec<Knot>, ramp: u64) -> Result<ThresholdController> {
        check_knots(&knots)?;
        let multipliers = vec![None; knots.len()];
        let mut controller = ThresholdController { knots, ramp, updates: 0, from: None, multipliers };
        controller.clamp();
        Ok(controller)
    }

    /// Checks a controller that was read: its values are such as updates leave.
    ///
    /// # Errors
    /// Those of [`ThresholdController::new`]; a threshold or another value is out of its range.
    pub fn check(&self) -> Result<()> {
        check_knots(&self.knots)?;
        let bars = self.knots.iter().flat_map(|knot| &knot.bars);
        if let Some(bar) = bars.into_iter().find(|bar| bar.abs() > LARGEST) {
            return Err(Error::range("bars", bar, format!("thresholds from -{LARGEST} to {LARGEST}")));
        }
        if let Some(from) = self.from.filter(|from| !(0.0..=1.0).contains(from)) {
            return Err(Error::range("from", from, "a share from 0 to 1"));
        }
        let known = self.multipliers.iter().flatten();
        if self.multipliers.len() > self.knots.len() || known.into_iter().any(|known| !known.is_finite()) {
            return Err(Error::range("multipliers", format!("{:?}", self.multipliers), "one per budget"));
        }
        Ok(())
    }

    /// Returns the budgets.
    pub fn knots(&self) -> &[Knot] {
        &self.knots
    }

    /// Returns the thresholds of layers at the budgets `active`, one per layer. Outside of the knots it is the nearest
    /// one; of several knots, a budget of 1 opens all gates.
    ///
    /// # Panics
    /// There are not as many budgets as layers.
    pub fn bars(&self, active: &[f64]) -> Vec<f32> {
        assert_eq!(active.len(), self.knots[0].bars.len(), "thresholds: budgets and layers");
        let bar = |(layer, &active): (usize, &f64)| {
            if self.opens_all(active) {
                return f32::NEG_INFINITY;
            }
            self.beside(active).iter().map(|&(at, weight)| weight * self.knots[at].bars[layer]).sum::<f64>()
                as f32
        };
        active.iter().enumerate().map(bar).collect()
    }

    /// Returns whether all gates are open at a budget, whatever its thresholds are.
    pub fn opens_all(&self, active: f64) -> bool {
        active >= 1.0 && self.knots.len() > 1
    }

    /// Returns the knots beside a budget, with their weights.
    fn beside(&self, active: f64) -> [(usize, f64); 2] {
        let last = self.knots.len() - 1;
        let high = self.knots.iter().position(|knot| knot.active >= active).unwrap_or(last);
        let low = high.saturating_sub(1);
        let span = self.knots[high].active - self.knots[low].active;
        if span <= 0.0 {
            return [(low, 1.0), (high, 0.0)];
        }
        let rest = ((active - self.knots[low].active) / span).clamp(0.0, 1.0);
        [(low, 1.0 - rest), (high, rest)]
    }

    /// Moves the thresholds after a micro-batch of these logits that ran at the mean budget `active`.
    pub fn update(&mut self, active: f64, counts: &LogitCounts) {
        if counts.is_empty() {
            return;
        }
        let curves = counts.curves();
        for (at, weight) in self.weights(active) {
            self.move_knot(at, RATE * weight, &curves, 1);
        }
        self.updates += 1;
        self.clamp();
    }

    /// Returns the knots that a micro-batch at the mean budget `active` moves.
    pub fn moved_by(&self, active: f64) -> impl Iterator<Item = usize> + use<> {
        self.weights(active).map(|(at, _)| at)
    }

    /// Moves the thresholds once, after micro-batches at the mean budgets `active` that all ran with the thresholds as they
    /// are. `counts` returns, by the number of a knot, the logits of all those that [`ThresholdController::moved_by`] names it
    /// for.
    pub fn update_together<'a>(
        &mut self,
        active: &[f64],
        mut counts: impl FnMut(usize) -> Option<&'a LogitCounts>,
    ) {
        let mut left = vec![1.0; self.knots.len()];
        for (at, weight) in active.iter().flat_map(|&active| self.weights(active)) {
            left[at] *= 1.0 - RATE * weight;
        }
        for (at, left) in left.into_iter().enumerate().filter(|&(_, left)| left < 1.0) {
            if let Some(counts) = counts(at).filter(|counts| !counts.is_empty()) {
                self.move_knot(at, 1.0 - left, &counts.curves(), active.len() as u64);
            }
        }
        self.updates += active.len() as u64;
        self.clamp();
    }

    /// Returns the knots beside a budget that have a part in it, with their weights.
    fn weights(&self, active: f64) -> impl Iterator<Item = (usize, f64)> + use<> {
        self.beside(active).into_iter().filter(|&(_, weight)| weight > 0.0)
    }

    /// Moves the thresholds of a knot by that part of what their share lacks after `more` updates.
    fn move_knot(&mut self, at: usize, part: f64, curves: &Curves, more: u64) {
        let wanted = self.wanted(self.knots[at].active, curves.share(&self.knots[at].bars), more);
        let bars = &mut self.knots[at].bars;
        let shift = curves.shift(bars, wanted.min(MOST));
        bars.iter_mut().for_each(|bar| *bar += part * shift);
    }

    /// Returns the weight of the sparsity loss that leaves the gates of all layers together as they are, at the mean budget
    /// `active`; none before a micro-batch near it was measured.
    pub fn multiplier(&self, active: f64) -> Option<f64> {
        let known = |(at, weight): (usize, f64)| Some((weight, self.multipliers.get(at).copied()??));
        let known = self.beside(active).into_iter().filter_map(known);
        let (weights, sum) =
            known.fold((0.0, 0.0), |(all, sum), (weight, known)| (all + weight, sum + weight * known));
        (weights > 0.0).then(|| sum / weights)
    }

    /// Takes what a micro-batch that ran at the mean budget `active` did to the gates.
    pub fn pulled(&mut self, active: f64, pull: Pull) {
        let Some(multiplier) = pull.multiplier() else { return };
        self.multipliers.resize(self.knots.len(), None);
        for (at, weight) in self.weights(active) {
            let mean = &mut self.multipliers[at];
            *mean = Some(mean.map_or(multiplier, |mean| mean + NEWEST * weight * (multiplier - mean)));
        }
    }

    /// Returns the share to open after `more` updates.
    fn wanted(&mut self, target: f64, share: f64, more: u64) -> f64 {
        let from = *self.from.get_or_insert(share);
        if self.knots.len() > 1 || (from - target).abs() < CLOSE {
            return target;
        }
        let done = ((self.updates + more) as f64 / self.ramp.max(1) as f64).min(1.0);
        from + done * (target - from)
    }

    /// Moves the thresholds of knot `at` so that the text of these logits opens its share exactly.
    ///
    /// # Panics
    /// There is no such knot.
    pub fn fit(&mut self, at: usize, counts: &LogitCounts) {
        let knot = &mut self.knots[at];
        if !counts.is_empty() {
            let shift = counts.curves().shift(&knot.bars, knot.active.min(MOST));
            knot.bars.iter_mut().for_each(|bar| *bar += shift);
        }
        self.clamp();
    }

    fn clamp(&mut self) {
        let bars = self.knots.iter_mut().flat_map(|knot| &mut knot.bars);
        bars.for_each(|bar| *bar = bar.clamp(-LARGEST, LARGEST));
    }
}
