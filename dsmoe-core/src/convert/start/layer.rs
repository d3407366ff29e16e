//! One layer of a start.

use super::down::Fitted;
use super::experts::Experts;
use super::plan::{Plan, Start};
use super::router::Router;
use super::sinks::Sinks;
use crate::calibrate::{Down, FfnTap, LayerStream, LayerWeights};
use crate::error::Result;

/// A layer of the start.
pub(super) struct Layer {
    sinks: Sinks,
    pub(super) experts: Experts,
    pub(super) router: Router,
    pub(super) fitted: Fitted,
}

/// The error and the active share of a layer, measured on the sequences that place thresholds.
pub(super) struct Measured {
    /// Squared error of the output over its squared size.
    pub(super) error: f64,
    /// The share of experts that ran.
    pub(super) active: f64,
}

impl Layer {
    /// Fits a layer whose attention the states hold.
    pub(super) fn fit(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        plan: &Plan,
        options: &Start,
    ) -> Result<Layer> {
        stream.attend(weights)?;
        let sinks = Sinks::new(&weights.linears[6]);
        let experts = Experts::choose(stream, weights, (plan, &sinks), options)?;
        let router = Router::fit(stream, weights, (plan, &sinks, &experts), options)?;
        let fitted = Fitted::fit(stream, weights, (plan, &sinks, &experts, &router), options)?;
        Ok(Layer { sinks, experts, router, fitted })
    }

    /// Sets `y` to the output of the FFN at the budget of that place.
    pub(super) fn forward(&self, y: &mut [f32], tap: FfnTap<'_>, budget: usize) -> usize {
        let bar = self.router.thresholds[budget];
        let (open, running) = self.router.open(&self.experts, (tap.x, tap.neurons), bar);
        self.fitted.forward(y, &open);
        running
    }

    /// Completes the layer in the states, every sequence at its budget, and measures it on those that place thresholds.
    pub(super) fn advance(
        &self,
        stream: &mut LayerStream,
        weights: &LayerWeights,
        plan: &Plan,
    ) -> Result<Measured> {
        let hidden = weights.linears[6].outputs;
        let whole = Down::of(stream.precision(), weights);
        let mut dense = vec![0.0; stream.seq() * hidden];
        let found = stream.join_ffn_measured(weights, &mut |y, tap| {
            let open = self.forward(y, tap, plan.budget_of(tap.sequence));
            let (mut error, mut size, mut running, mut tokens) = (0.0, 0.0, 0, 0);
            if plan.is_measured(tap.sequence) {
                whole.forward(&mut dense, tap.neurons);
                running += open;
                tokens += tap.x.len() / hidden;
                let rows = dense.chunks_exact(hidden).zip(y.chunks_exact(hidden));
                let left_out = self.sinks.of(tap.neurons);
                for ((dense, y), _) in rows.zip(left_out).filter(|(_, is_left_out)| !is_left_out) {
                    for (a, b) in dense.iter().zip(y) {
                        error += (f64::from(*a) - f64::from(*b)).powi(2);
                        size += f64::from(*a).powi(2);
                    }
                }
            }
            [error, size, running as f64, tokens as f64]
        })?;
        let [error, size, running, tokens] =
            found.iter().fold([0.0; 4], |sums, of| std::array::from_fn(|i| sums[i] + of[i]));
        let routed = running / f64::max(tokens, 1.0);
        Ok(Measured {
            error: error / f64::max(size, f64::MIN_POSITIVE),
            active: (plan.cores[weights.layer] as f64 + routed) / plan.num_experts as f64,
        })
    }
}
