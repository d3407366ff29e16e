//! The expert that every token runs beside those that it is routed to (Qwen2-MoE).
//!
//! ```text
//! s = sigmoid(x . g),   y += s f(x)          f a gated FFN, g [hidden]
//! ds = <dy, f(x)>,   dg += ds s (1 - s) x,   dx += s f'(x) dy + ds s (1 - s) g
//! ```

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn::{self, PackedWeights, Pairs, Saved};

use crate::ffn::{FfnScratch, Gated};
use crate::params::TensorSpec;

/// Beginning of the names of its projections.
pub(crate) const SHARED_EXPERT: &str = "shared_expert.";

/// The shared expert of a layer; its parameters are the projections of the FFN and g.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared(pub(super) Gated);

/// Values that the backward pass needs.
#[derive(Debug)]
pub(super) struct SharedSaved {
    experts: Saved,
    /// f(x).
    output: Buf,
    /// s of every token.
    gates: Vec<f32>,
}

/// The shared expert for inference.
#[derive(Debug)]
pub(super) struct PackedShared {
    shared: Shared,
    weights: PackedWeights,
    gate: Vec<f32>,
}

/// Arguments of [`Shared::backward`].
pub(super) struct SharedBackward<'a> {
    /// Added to.
    pub(super) dx: &'a mut [f32],
    /// Added to.
    pub(super) grads: &'a mut [f32],
    pub(super) dy: &'a [f32],
    pub(super) saved: &'a mut SharedSaved,
    pub(super) x: &'a [f32],
    pub(super) params: &'a [f32],
    pub(super) scratch: &'a mut FfnScratch,
}

impl Shared {
    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let projections = self.0.tensors().into_iter();
        let mut tensors: Vec<TensorSpec> = projections
            .map(|spec| TensorSpec { name: format!("{SHARED_EXPERT}{}", spec.name), ..spec })
            .collect();
        tensors.push(TensorSpec::router("shared_expert_gate.weight", vec![1, self.0.hidden]));
        tensors
    }

    fn gate<'a>(&self, params: &'a [f32]) -> &'a [f32] {
        &params[self.0.len()..][..self.0.hidden]
    }

    pub(super) fn pack(self, params: &[f32], precision: Precision) -> PackedShared {
        let weights = PackedWeights::new(precision, &self.0.weights(params), self.0.dims(0));
        PackedShared { shared: self, weights, gate: self.gate(params).to_vec() }
    }

    pub(super) fn new_saved(&self, tokens: usize) -> SharedSaved {
        let experts = Saved::with_room(self.0.dims(tokens));
        SharedSaved { experts, output: Buf::default(), gates: Vec::new() }
    }

    /// Adds its output to `y`.
    pub(super) fn forward_train(
        &self,
        y: &mut [f32],
        saved: &mut SharedSaved,
        x: &[f32],
        params: &[f32],
        scratch: &mut FfnScratch,
    ) {
        let SharedSaved { experts, output, gates } = saved;
        output.resize(x.len());
        expert_ffn::ForwardTrain {
            y: output,
            saved: experts,
            x,
            weights: &self.0.weights(params),
            pairs: Pairs::Dense,
            dims: self.0.dims(x.len() / self.0.hidden),
            scratch: &mut scratch.experts,
        }
        .run();
        gates.clear();
        gates.extend(x.chunks_exact(self.0.hidden).map(|x| sigmoid(dot(x, self.gate(params)))));
        add_scaled(y, output, gates);
    }

    /// Adds the gradients of the input and of its parameters.
    pub(super) fn backward(&self, args: SharedBackward<'_>) {
        let SharedBackward { dx, grads, dy, saved, x, params, scratch } = args;
        let SharedSaved { experts, output, gates } = saved;
        let hidden = self.0.hidden;
        let (grads, dgate) = grads.split_at_mut(self.0.len());
        let (dgate, gate) = (&mut dgate[..hidden], self.gate(params));
        let mut dout = Buf::zeros(dy.len());
        for (t, &s) in gates.iter().enumerate() {
            let of_token = t * hidden..(t + 1) * hidden;
            let (dy, x) = (&dy[of_token.clone()], &x[of_token.clone()]);
            let dlogit = dot(dy, &output[of_token.clone()]) * s * (1.0 - s);
            dout[of_token.clone()].iter_mut().zip(dy).for_each(|(out, dy)| *out = s * dy);
            dgate.iter_mut().zip(x).for_each(|(sum, x)| *sum += dlogit * x);
            dx[of_token].iter_mut().zip(gate).for_each(|(sum, g)| *sum += dlogit * g);
        }
        let mut by_expert = Buf::zeros(dx.len());
        expert_ffn::Backward {
            dx: &mut by_expert,
            dcoefficients: None,
            grads: self.0.grads(grads),
            dy: &dout,
            saved: experts,
            x,
            weights: &self.0.weights(params),
            pairs: Pairs::Dense,
            dims: self.0.dims(x.len() / hidden),
            scratch: &mut scratch.experts,
        }
        .run();
        dx.iter_mut().zip(by_expert.iter()).for_each(|(sum, dx)| *sum += dx);
    }
}

impl PackedShared {
    /// Adds its output to `y`.
    pub(super) fn forward(&self, y: &mut [f32], x: &[f32], scratch: &mut FfnScratch) {
        let Shared(gated) = &self.shared;
        let FfnScratch { experts: scratch, shared: output, .. } = scratch;
        output.resize(x.len());
        let (weights, dims) = (&self.weights, gated.dims(x.len() / gated.hidden));
        expert_ffn::ForwardPacked { y: &mut output[..], x, weights, pairs: Pairs::Dense, dims, scratch }
            .run();
        for ((y, out), x) in y
            .chunks_exact_mut(gated.hidden)
            .zip(output.chunks_exact(gated.hidden))
            .zip(x.chunks_exact(gated.hidden))
        {
            add_scaled(y, out, &[sigmoid(dot(x, &self.gate))]);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.weights.bytes() + 4 * self.gate.len()
    }
}

/// Adds to the rows of `y` those of `x` times their factors.
fn add_scaled(y: &mut [f32], x: &[f32], factors: &[f32]) {
    let width = y.len() / factors.len().max(1);
    if width == 0 {
        return;
    }
    for ((y, x), factor) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(factors) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
