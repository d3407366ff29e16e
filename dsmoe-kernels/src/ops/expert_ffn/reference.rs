//! The definition of the gated expert FFN, in f64 loops over every (token, expert) pair.
//!
//! Routing is dense here: expert i is active for token t if `mask[t, i]`, with the coefficient `coef[t, i]`. Coefficients
//! of inactive pairs are not read.

use super::Dims;

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
    /// `[tokens, num_experts]`: `<dy_t, o_i(x_t)>`, of inactive pairs only when [`Dims::all_pairs`] (else 0).
    pub dcoef: Vec<f64>,
}

fn sigmoid(a: f64) -> f64 {
    1.0 / (1.0 + (-a).exp())
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
    /// `[tokens, num_experts]`
    pub mask: &'a [bool],
    /// `[tokens, num_experts]`
    pub coef: &'a [f64],
    /// The sizes.
    pub dims: Dims,
}

/// Returns `y_t = sum over active i of coef[t, i] * o_i(x_t)`. Neuron j of expert i adds
/// `coef * silu(x . gate_j) * (x . up_j) * down_j`.
pub fn forward(layer: Layer<'_>) -> Vec<f64> {
    let Layer { x, gate, up, down, mask, coef, dims } = layer;
    let (d, n, width) = (dims.hidden, dims.num_experts, dims.expert_width());
    let mut y = vec![0.0; dims.tokens * d];
    for t in 0..dims.tokens {
        let x = &x[t * d..][..d];
        for i in (0..n).filter(|i| mask[t * n + i]) {
            for j in i * width..(i + 1) * width {
                let a = dot(x, &gate[j * d..][..d]);
                let b = dot(x, &up[j * d..][..d]);
                let c = a * sigmoid(a) * b;
                axpy(&mut y[t * d..][..d], coef[t * n + i] * c, &down[j * d..][..d]);
            }
        }
    }
    y
}

/// Returns the gradients of `<dy, forward(..)>` with the mask frozen (eqs. 13-16 before the router).
pub fn backward(dy: &[f64], layer: Layer<'_>) -> Grads {
    let Layer { x, gate, up, down, mask, coef, dims } = layer;
    let (d, n, width) = (dims.hidden, dims.num_experts, dims.expert_width());
    let mut grads = Grads {
        dx: vec![0.0; x.len()],
        dgate: vec![0.0; gate.len()],
        dup: vec![0.0; up.len()],
        ddown: vec![0.0; down.len()],
        dcoef: vec![0.0; dims.tokens * n],
    };
    for t in 0..dims.tokens {
        let (x, dy) = (&x[t * d..][..d], &dy[t * d..][..d]);
        for i in 0..n {
            let active = mask[t * n + i];
            if !active && !dims.all_pairs {
                continue;
            }
            for j in i * width..(i + 1) * width {
                let row = j * d..(j + 1) * d;
                let a = dot(x, &gate[row.clone()]);
                let b = dot(x, &up[row.clone()]);
                let c = a * sigmoid(a) * b;
                // y_t += coef * c * down_j
                let dscaled = dot(dy, &down[row.clone()]);
                grads.dcoef[t * n + i] += c * dscaled;
                if active {
                    let coef = coef[t * n + i];
                    axpy(&mut grads.ddown[row.clone()], coef * c, dy);
                    let dc = coef * dscaled;
                    // c = silu(a) * b, silu'(a) = s (1 + a (1 - s)) with s = sigmoid(a)
                    let s = sigmoid(a);
                    let da = dc * b * s * (1.0 + a * (1.0 - s));
                    let db = dc * a * s;
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
