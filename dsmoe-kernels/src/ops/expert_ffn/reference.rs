//! The definition of the gated expert FFN, in f64 loops over every (token, expert) pair.
//!
//! Routing is dense here: expert i outside the core is active for token t if `mask[t, i - core]`, with
//! the coefficient `coef[t, i - core]`. Coefficients of inactive pairs are not read.

use super::Dims;
use crate::swiglu::reference::{slope, value};

/// Gradients of a scalar loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads {
    /// `[tokens, hidden]`
    pub dx: Vec<f64>,
    /// `[intermediate, hidden]`
    pub dgate: Vec<f64>,
    /// `[intermediate, hidden]`
    pub dup: Vec<f64>,
    /// `[intermediate, hidden]`
    pub ddown: Vec<f64>,
    /// Of the biases of gate, up and down; empty without biases.
    pub dbiases: [Vec<f64>; 3],
    /// `[tokens, num_routed]`: `<dy_t, o_i(x_t)>`, of inactive pairs only when [`Dims::all_pairs`] (else 0).
    pub dcoef: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn axpy(y: &mut [f64], a: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// The operands of the definition.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// `[tokens, hidden]`
    pub x: &'a [f64],
    /// `[intermediate, hidden]`
    pub gate: &'a [f64],
    /// `[intermediate, hidden]`
    pub up: &'a [f64],
    /// `[intermediate, hidden]`
    pub down: &'a [f64],
    /// Of gate and up `[intermediate]` and down `[hidden]`.
    pub biases: Option<[&'a [f64]; 3]>,
    /// `[tokens, num_routed]`
    pub mask: &'a [bool],
    /// `[tokens, num_routed]`
    pub coef: &'a [f64],
    /// The sizes.
    pub dims: Dims,
}

impl Layer<'_> {
    /// Returns the products of neuron j with a row of x, biases included.
    fn products(self, x: &[f64], j: usize) -> (f64, f64) {
        let row = j * self.dims.hidden..(j + 1) * self.dims.hidden;
        let [gate, up] = self.biases.map_or([0.0; 2], |[gate, up, _]| [gate[j], up[j]]);
        (dot(x, &self.gate[row.clone()]) + gate, dot(x, &self.up[row]) + up)
    }

    /// Returns the place of a pair in `mask` and `coef`; none of an expert of the core.
    fn pair(self, t: usize, i: usize) -> Option<usize> {
        let Dims { core, .. } = self.dims;
        (i >= core).then(|| t * self.dims.num_routed() + i - core)
    }

    /// Returns the coefficient of an active pair.
    fn coefficient(self, t: usize, i: usize) -> Option<f64> {
        self.pair(t, i).map_or(Some(1.0), |pair| self.mask[pair].then(|| self.coef[pair]))
    }
}

/// Returns `y_t = sum over active i of coef[t, i] * o_i(x_t) + bias_down`. Neuron j of expert i adds
/// `coef * act(x . gate_j + bias_gate_j) * (x . up_j + bias_up_j) * down_j`.
pub fn forward(layer: Layer<'_>) -> Vec<f64> {
    let Layer { x, down, biases, dims, .. } = layer;
    let (d, n, width) = (dims.hidden, dims.num_experts, dims.expert_width());
    let mut y = vec![0.0; dims.tokens * d];
    for t in 0..dims.tokens {
        let x = &x[t * d..][..d];
        if let Some([_, _, bias]) = biases {
            axpy(&mut y[t * d..][..d], 1.0, bias);
        }
        for (i, coef) in (0..n).filter_map(|i| Some((i, layer.coefficient(t, i)?))) {
            for j in i * width..(i + 1) * width {
                let (a, b) = layer.products(x, j);
                let c = value(dims.activation, a) * b;
                axpy(&mut y[t * d..][..d], coef * c, &down[j * d..][..d]);
            }
        }
    }
    y
}

/// Returns the gradients of `<dy, forward(..)>` with the mask frozen (eqs. 13-16 before the router).
pub fn backward(dy: &[f64], layer: Layer<'_>) -> Grads {
    let Layer { x, gate, up, down, biases, dims, .. } = layer;
    let (d, n, width) = (dims.hidden, dims.num_experts, dims.expert_width());
    let mut grads = Grads {
        dx: vec![0.0; x.len()],
        dgate: vec![0.0; gate.len()],
        dup: vec![0.0; up.len()],
        ddown: vec![0.0; down.len()],
        dbiases: biases.map_or([(); 3].map(|()| Vec::new()), |biases| biases.map(|b| vec![0.0; b.len()])),
        dcoef: vec![0.0; dims.tokens * dims.num_routed()],
    };
    for t in 0..dims.tokens {
        let (x, dy) = (&x[t * d..][..d], &dy[t * d..][..d]);
        if biases.is_some() {
            axpy(&mut grads.dbiases[2], 1.0, dy);
        }
        for i in 0..n {
            let (pair, active) = (layer.pair(t, i), layer.coefficient(t, i));
            if active.is_none() && !dims.all_pairs {
                continue;
            }
            for j in i * width..(i + 1) * width {
                let row = j * d..(j + 1) * d;
                let (a, b) = layer.products(x, j);
                let c = value(dims.activation, a) * b;
                // y_t += coef * c * down_j
                let dscaled = dot(dy, &down[row.clone()]);
                if let Some(pair) = pair {
                    grads.dcoef[pair] += c * dscaled;
                }
                if let Some(coef) = active {
                    axpy(&mut grads.ddown[row.clone()], coef * c, dy);
                    let dc = coef * dscaled;
                    // c = act(a) * b
                    let da = dc * b * slope(dims.activation, a);
                    let db = dc * value(dims.activation, a);
                    if biases.is_some() {
                        grads.dbiases[0][j] += da;
                        grads.dbiases[1][j] += db;
                    }
                    axpy(&mut grads.dgate[row.clone()], da, x);
                    axpy(&mut grads.dup[row.clone()], db, x);
                    axpy(&mut grads.dx[t * d..][..d], da, &gate[row.clone()]);
                    axpy(&mut grads.dx[t * d..][..d], db, &up[row]);
                }
            }
        }
    }
    grads
}
