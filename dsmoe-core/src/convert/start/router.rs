//! Routers that predict what experts give.
//!
//! ```text
//! s[t, e]  = |D_e h_e|                                  the norm of what expert e adds; or its logarithm or square
//! w, b     = ridge regression of s on x, over the fitted sequences
//! z        = spread (w x + b - q) / deviation           q: the share of the start exceeds it on the other sequences
//! bar(B)   = spread (q_B - q) / deviation               for every budget B, 0 for that of the start
//! ```

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, linear};
use rayon::prelude::*;

use super::experts::Experts;
use super::plan::{Plan, Start, not_finite};
use super::settings::RouterTarget;
use super::sinks::Sinks;
use crate::calibrate::{FfnTap, LayerStream, LayerWeights};
use crate::compensate::{LeastSquares, Rows};
use crate::error::Result;

/// Ridge of the regression, as a share of the mean variance of the inputs at
/// [`RIDGE_TOKENS`](super::RIDGE_TOKENS) tokens.
const RIDGE: f64 = 0.1;
/// Standard deviation of the logits.
const SPREAD: f64 = 2.0;
/// Tokens that place the thresholds, at most.
const MOST_TOKENS: usize = 16_384;

/// The router of a layer.
#[derive(Clone, Debug)]
pub(super) struct Router {
    /// `[routed, hidden]`.
    pub(super) weight: Vec<f32>,
    /// `[routed]`.
    pub(super) bias: Vec<f32>,
    /// The threshold of logits for each budget.
    pub(super) thresholds: Vec<f32>,
}

impl Router {
    /// Fits the router of a layer with these experts.
    pub(super) fn fit(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, sinks, experts): (&Plan, &Sinks, &Experts),
        options: &Start,
    ) -> Result<Router> {
        let [.., down] = &weights.linears;
        let (hidden, routed, seq) = (down.outputs, plan.routed(weights.layer), stream.seq());
        let scores = Scores::new(experts, &down.weight, down.inputs, options.settings.target);
        let mut sums = LeastSquares::new(hidden, routed).in_precision(stream.precision()).on(stream.comm());
        stream.see_ffn_of(weights, &|sequence| plan.is_fitted(sequence), &mut |tap| {
            let residuals = scores.of(tap.neurons);
            sums.add(Rows { inputs: tap.x, residuals: &residuals, factors: &sinks.factors(tap.neurons) });
        })?;
        sums.complete()?;
        let solved = sums.solve(plan.ridge(RIDGE, seq), true).ok_or_else(|| not_finite(weights.layer))?;
        let mut weight = vec![0.0; routed * hidden];
        for (at, value) in weight.iter_mut().enumerate() {
            *value = solved.weight[at % hidden * routed + at / hidden];
        }
        let bias = solved.bias.unwrap_or_else(|| vec![0.0; routed]);
        let mut router = Router { weight, bias, thresholds: Vec::new() };
        let held = router.held_out(stream, weights, (plan, sinks))?;
        router.place(held, (plan, weights.layer)).then_some(router).ok_or_else(|| not_finite(weights.layer))
    }

    /// Returns the logits of an even choice of the tokens that place thresholds, for each budget.
    fn held_out(
        &self,
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, sinks): (&Plan, &Sinks),
    ) -> Result<Vec<Vec<f32>>> {
        let (seq, routed) = (stream.seq(), plan.routed(weights.layer));
        let sequences = (0..plan.sequences).filter(|&sequence| plan.is_held(sequence)).count();
        let every = (sequences * seq).div_ceil(MOST_TOKENS);
        let (mut logits, mut all) = (Buf::default(), vec![Vec::new(); plan.budgets.len()]);
        stream.see_ffn_of(
            weights,
            &|sequence| plan.is_held(sequence),
            &mut |FfnTap { sequence, x, neurons, .. }| {
                self.logits(&mut logits, x);
                let left_out = sinks.of(neurons);
                let rows = logits.chunks_exact(routed).enumerate();
                let chosen =
                    rows.filter(|(t, _)| !left_out[*t] && (sequence * seq + t).is_multiple_of(every));
                chosen.for_each(|(_, row)| all[plan.budget_of(sequence)].extend_from_slice(row));
            },
        )?;
        Ok(all)
    }

    /// Scales the logits, moves them so that the share of the start is above 0, and sets the thresholds of all budgets;
    /// returns whether all is finite. A budget without logits of its own has those of the start.
    fn place(&mut self, mut all: Vec<Vec<f32>>, (plan, layer): (&Plan, usize)) -> bool {
        all.iter_mut().for_each(|logits| logits.sort_unstable_by(f32::total_cmp));
        let logits = &all[plan.chosen];
        let count = logits.len().max(1) as f64;
        let mean = logits.iter().map(|&z| f64::from(z)).sum::<f64>() / count;
        let variance = logits.iter().map(|&z| (f64::from(z) - mean).powi(2)).sum::<f64>() / count;
        // Constant predictions have no spread to scale.
        let scale = if variance > 0.0 { SPREAD / variance.sqrt() } else { 1.0 };
        let of_budget =
            |own: &Vec<f32>, share| quantile(if own.is_empty() { logits } else { own }, share, scale);
        let bars: Vec<f64> =
            all.iter().zip(plan.routed_shares(layer)).map(|(own, share)| of_budget(own, share)).collect();
        let Some(&centre) = bars.get(plan.chosen) else { return false };
        self.thresholds = bars.iter().map(|bar| (scale * (bar - centre)) as f32).collect();
        self.weight.iter_mut().for_each(|w| *w = (scale * f64::from(*w)) as f32);
        self.bias.iter_mut().for_each(|b| *b = (scale * (f64::from(*b) - centre)) as f32);
        let values = self.weight.iter().chain(&self.bias).chain(&self.thresholds);
        values.into_iter().all(|value| value.is_finite())
    }

    fn logits(&self, logits: &mut Buf, x: &[f32]) {
        let outputs = self.bias.len();
        let inputs = self.weight.len() / outputs;
        let rows = x.len() / inputs;
        logits.resize(rows * outputs);
        let dims = linear::Dims { rows, inputs, outputs, precision: Precision::F32 };
        linear::Forward { y: logits, x, w: &self.weight, bias: Some(&self.bias), dims }.run();
    }

    /// Returns the neurons of the experts whose logits are above `bar`, others being 0, and the number of routed experts
    /// that run over all tokens.
    pub(super) fn open(
        &self,
        experts: &Experts,
        (x, neurons): (&[f32], &[f32]),
        bar: f32,
    ) -> (Vec<f32>, usize) {
        let mut logits = Buf::default();
        self.logits(&mut logits, x);
        let mut open = neurons.to_vec();
        let rows =
            open.par_chunks_exact_mut(experts.order.len()).zip(logits.par_chunks_exact(self.bias.len()));
        let running = rows.map(|(row, logits)| {
            for (neurons, _) in experts.routed().zip(logits).filter(|(_, z)| **z <= bar || z.is_nan()) {
                neurons.iter().for_each(|&j| row[j as usize] = 0.0);
            }
            logits.iter().filter(|z| **z > bar).count()
        });
        let running = running.sum();
        (open, running)
    }
}

/// Returns the middle between the last value left out and the first one above a bar that the share `above` of the sorted
/// values exceeds. At the ends it leaves room for values that were not seen.
fn quantile(sorted: &[f32], above: f64, scale: f64) -> f64 {
    let open = ((above * sorted.len() as f64).round() as usize).min(sorted.len());
    let value = |at: usize| f64::from(sorted[at]);
    match sorted.len() - open {
        _ if sorted.is_empty() => 0.0,
        0 => value(0) - 4.0 * SPREAD / scale,
        at if open == 0 => value(at - 1) + 4.0 * SPREAD / scale,
        at => 0.5 * (value(at - 1) + value(at)),
    }
}

/// Computes the norms of the experts' outputs from the values of their neurons.
struct Scores<'a> {
    experts: &'a Experts,
    /// `D_e^T D_e` of every routed expert, `[width, width]`.
    products: Vec<Vec<f32>>,
    target: RouterTarget,
}

impl<'a> Scores<'a> {
    fn new(experts: &'a Experts, down: &[f32], columns: usize, target: RouterTarget) -> Scores<'a> {
        let of_expert = |neurons: &[u32]| {
            let mut product = vec![0.0f64; neurons.len() * neurons.len()];
            for row in down.chunks_exact(columns) {
                for (a, of_a) in neurons.iter().zip(product.chunks_exact_mut(neurons.len())) {
                    let x = f64::from(row[*a as usize]);
                    of_a.iter_mut().zip(neurons).for_each(|(sum, b)| *sum += x * f64::from(row[*b as usize]));
                }
            }
            product.into_iter().map(|value| value as f32).collect()
        };
        let all: Vec<&[u32]> = experts.routed().collect();
        Scores { experts, products: all.into_par_iter().map(of_expert).collect(), target }
    }

    /// Returns the scores `[tokens, routed]`.
    fn of(&self, neurons: &[f32]) -> Vec<f32> {
        let routed = self.products.len();
        let width = self.experts.order.len();
        let mut scores = vec![0.0; neurons.len() / width * routed];
        let rows = scores.par_chunks_exact_mut(routed).zip(neurons.par_chunks_exact(width));
        rows.for_each(|(scores, row)| {
            let mut values = vec![0.0; self.experts.width];
            for ((score, neurons), product) in
                scores.iter_mut().zip(self.experts.routed()).zip(&self.products)
            {
                values.iter_mut().zip(neurons).for_each(|(value, &j)| *value = row[j as usize]);
                let through = product.chunks_exact(values.len()).zip(&values);
                let square: f32 = through
                    .map(|(row, a)| a * row.iter().zip(&values).map(|(p, b)| p * b).sum::<f32>())
                    .sum();
                *score = self.score(square.max(f32::MIN_POSITIVE));
            }
        });
        scores
    }

    fn score(&self, square: f32) -> f32 {
        match self.target {
            RouterTarget::LogNorm => 0.5 * square.ln(),
            RouterTarget::Norm => square.sqrt(),
            RouterTarget::Square => square,
        }
    }
}
