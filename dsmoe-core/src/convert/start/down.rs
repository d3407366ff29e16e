//! The down projection on the neurons that are left.

use dsmoe_kernels::buf::Buf;

use super::experts::Experts;
use super::plan::{Plan, Start, not_finite};
use super::router::Router;
use super::sinks::Sinks;
use crate::calibrate::{Down, LayerStream, LayerWeights};
use crate::compensate::{LeastSquares, Rows};
use crate::error::{Error, Result};

/// The down projection of a layer.
#[derive(Debug)]
pub(super) struct Fitted {
    /// `[hidden, intermediate]`, neurons in their original order.
    pub(super) weight: Buf,
    /// `[hidden]`, where the FFN has a bias of its output.
    pub(super) bias: Option<Vec<f32>>,
    /// The same, ready for products.
    packed: Down,
}

impl Fitted {
    /// Fits the projection of a layer to the outputs of all its neurons.
    pub(super) fn fit(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, sinks, experts, router): (&Plan, &Sinks, &Experts, &Router),
        options: &Start,
    ) -> Result<Fitted> {
        let [.., down] = &weights.linears;
        let (mut weight, mut bias) = (down.weight.clone(), down.bias.as_ref().map(|bias| bias.to_vec()));
        if let Some(ridge) = options.settings.least_squares {
            let sums = Fitted::sums(stream, weights, (plan, sinks, experts, router), options)?;
            let solved = sums
                .solve(plan.ridge(ridge, stream.seq()), options.settings.intercept)
                .ok_or_else(|| not_finite(weights.layer))?;
            solved.add_to(&mut weight, down.inputs);
            let dtype = stream.checkpoint().need(&down.name)?.dtype;
            dtype.round(&mut weight);
            if !weight.iter().all(|w| w.is_finite()) {
                let problem = "has a weight that its type cannot hold after the least squares";
                return Err(Error::tensor(
                    stream.checkpoint().path(),
                    &down.name,
                    problem,
                    "store the model as bf16",
                ));
            }
            if let Some(mut added) = solved.bias {
                dtype.round(&mut added);
                let sum = bias.get_or_insert_with(|| vec![0.0; down.outputs]);
                sum.iter_mut().zip(added).for_each(|(sum, b)| *sum += b);
            }
        }
        let packed = Down::new(stream.precision(), &weight, down.inputs, bias.as_deref());
        Ok(Fitted { weight, bias, packed })
    }

    /// Sums over the fitted sequences, each at its budget, what the neurons left have to make up for.
    fn sums(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, sinks, experts, router): (&Plan, &Sinks, &Experts, &Router),
        options: &Start,
    ) -> Result<LeastSquares> {
        let [.., down] = &weights.linears;
        let precision = stream.precision();
        let mut sums = LeastSquares::new(down.inputs, down.outputs).in_precision(precision).on(stream.comm());
        let mut lost = vec![0.0; stream.seq() * down.outputs];
        let whole = Down::new(precision, &down.weight, down.inputs, None);
        stream.see_ffn_of(weights, &|sequence| plan.is_fitted(sequence), &mut |tap| {
            let bar = router.thresholds[plan.budget_of(tap.sequence)];
            let (mut open, _) = router.open(experts, (tap.x, tap.neurons), bar);
            let closed: Vec<f32> = tap.neurons.iter().zip(&open).map(|(all, open)| all - open).collect();
            whole.forward(&mut lost, &closed);
            let mut factors = sinks.factors(tap.neurons);
            if options.settings.relative {
                relate(&mut factors, tap.residual, down.outputs);
            }
            for row in open.chunks_exact_mut(down.inputs) {
                experts.massive.iter().for_each(|&neuron| row[neuron as usize] = 0.0);
            }
            sums.add(Rows { inputs: &open, residuals: &lost, factors: &factors });
        })?;
        sums.complete()?;
        Ok(sums)
    }

    /// Sets `y` `[tokens, hidden]` to the output of these neurons `[tokens, intermediate]`.
    pub(super) fn forward(&self, y: &mut [f32], neurons: &[f32]) {
        self.packed.forward(y, neurons);
    }
}

/// Divides the factors of tokens by the norms of their residual stream.
fn relate(factors: &mut [f32], residual: &[f32], hidden: usize) {
    for (factor, row) in factors.iter_mut().zip(residual.chunks_exact(hidden)) {
        let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        if square > 0.0 {
            *factor /= square.sqrt() as f32;
        }
    }
}
