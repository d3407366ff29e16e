//! The down projection on the neurons that are left.

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, linear};

use super::experts::Experts;
use super::router::Router;
use super::{Plan, Start, not_finite};
use crate::calibrate::{LayerStream, LayerWeights};
use crate::compensate::{LeastSquares, Rows};
use crate::error::{Error, Result};

/// The down projection of a layer.
#[derive(Clone, Debug)]
pub(super) struct Fitted {
    /// `[hidden, intermediate]`, neurons in their original order.
    pub(super) weight: Buf,
    /// Neurons of the FFN.
    inputs: usize,
    /// `[hidden]`, where the FFN has a bias of its output.
    pub(super) bias: Option<Vec<f32>>,
    /// Squared error of the output over its squared size, on the fitted text.
    pub(super) error: f64,
    /// The share of experts that ran.
    pub(super) active: f64,
}

/// Sums over the fitted text.
#[derive(Default)]
struct Measured {
    error: f64,
    size: f64,
    running: usize,
    tokens: usize,
}

impl Fitted {
    /// Fits the projection of a layer to the outputs of all its neurons.
    pub(super) fn fit(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, experts, router): (&Plan, &Experts, &Router),
        options: &Start,
    ) -> Result<Fitted> {
        let [.., down] = &weights.linears;
        let mut fitted = Fitted {
            weight: down.weight.clone(),
            inputs: down.inputs,
            bias: down.bias.as_ref().map(|bias| bias.to_vec()),
            error: 0.0,
            active: 0.0,
        };
        let seq = stream.seq();
        if let Some(ridge) = options.settings.least_squares {
            let mut sums = LeastSquares::new(down.inputs, down.outputs);
            let mut lost = vec![0.0; seq * down.outputs];
            let relative = options.settings.relative;
            stream.see_ffn(weights, &mut |tap| {
                if plan.is_fitted(tap.sequence) {
                    let budget = plan.budget_of(tap.sequence, options.settings.elastic);
                    let bar = router.thresholds[budget];
                    let (open, _) = router.open(experts, (tap.x, tap.neurons), bar);
                    let closed: Vec<f32> =
                        tap.neurons.iter().zip(&open).map(|(all, open)| all - open).collect();
                    multiply(&mut lost, &closed, &down.weight, down.inputs, None);
                    let factors = factors(tap.residual, down.outputs, relative);
                    sums.add(Rows { inputs: &open, residuals: &lost, factors: &factors });
                }
            });
            let solved = sums
                .solve(plan.ridge(ridge, seq), options.settings.intercept)
                .ok_or_else(|| not_finite(weights.layer))?;
            solved.add_to(&mut fitted.weight, down.inputs);
            let dtype = stream.checkpoint().need(&down.name)?.dtype;
            dtype.round(&mut fitted.weight);
            if !fitted.weight.iter().all(|w| w.is_finite()) {
                let problem = "has a weight that its type cannot hold after the least squares";
                return Err(Error::tensor(
                    stream.checkpoint().path(),
                    &down.name,
                    problem,
                    "store the model as bf16",
                ));
            }
            if let Some(mut bias) = solved.bias {
                dtype.round(&mut bias);
                fitted.add_bias(&bias);
            }
        }
        fitted.measure(stream, weights, (plan, experts, router));
        Ok(fitted)
    }

    fn add_bias(&mut self, bias: &[f32]) {
        match &mut self.bias {
            Some(before) => before.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b),
            None => self.bias = Some(bias.to_vec()),
        }
    }

    /// Sets `y` `[tokens, hidden]` to the output of these neurons `[tokens, intermediate]`.
    pub(super) fn forward(&self, y: &mut [f32], neurons: &[f32]) {
        multiply(y, neurons, &self.weight, self.inputs, self.bias.as_deref());
    }

    /// Measures the error and the share of experts on the sequences that place thresholds.
    fn measure(
        &mut self,
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, experts, router): (&Plan, &Experts, &Router),
    ) {
        let [.., down] = &weights.linears;
        let len = stream.seq() * down.outputs;
        let (mut dense, mut sparse, mut sums) = (vec![0.0; len], vec![0.0; len], Measured::default());
        stream.see_ffn(weights, &mut |tap| {
            if plan.is_held(tap.sequence) {
                let (open, running) = router.open(experts, (tap.x, tap.neurons), router.bar);
                self.forward(&mut sparse, &open);
                multiply(&mut dense, tap.neurons, &down.weight, down.inputs, down.bias.as_deref());
                sums.running += running;
                sums.tokens += tap.x.len() / down.outputs;
                for (a, b) in dense.iter().zip(&sparse).skip(down.outputs) {
                    sums.error += (f64::from(*a) - f64::from(*b)).powi(2);
                    sums.size += f64::from(*a).powi(2);
                }
            }
        });
        self.error = sums.error / sums.size.max(f64::MIN_POSITIVE);
        let routed = sums.running as f64 / sums.tokens.max(1) as f64;
        self.active = (plan.core as f64 + routed) / plan.num_experts as f64;
    }
}

/// Sets `y` to the product of rows with a weight `[outputs, inputs]`.
fn multiply(y: &mut [f32], x: &[f32], w: &[f32], inputs: usize, bias: Option<&[f32]>) {
    let dims =
        linear::Dims { rows: x.len() / inputs, inputs, outputs: w.len() / inputs, precision: Precision::F32 };
    linear::Forward { y, x, w, bias, dims }.run();
}

/// Returns the factors of the tokens of a sequence: 0 for the first, 1 or one over the norm of the residual stream for the
/// others.
fn factors(residual: &[f32], hidden: usize, relative: bool) -> Vec<f32> {
    let factor = |(t, row): (usize, &[f32])| {
        let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        match (t, relative) {
            (0, _) => 0.0,
            (_, true) if square > 0.0 => (1.0 / square.sqrt()) as f32,
            _ => 1.0,
        }
    };
    residual.chunks_exact(hidden).enumerate().map(factor).collect()
}
