//! The definition of the gated unit, in f64.

use super::Activation;

/// Returns the activation of `x`.
pub fn value(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x * sigmoid(x),
        Activation::GeluTanh => 0.5 * x * (1.0 + inner(x).tanh()),
    }
}

/// Returns the derivative of the activation at `x`: of `x s(x)` with s' = s (1 - s) it is `s + x s (1 - s)`, and of
/// `x (1 + t) / 2` with t = tanh(u) it is `(1 + t) / 2 + x (1 - t^2) u' / 2`.
pub fn slope(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => {
            let s = sigmoid(x);
            s + x * s * (1.0 - s)
        }
        Activation::GeluTanh => {
            let t = inner(x).tanh();
            let du = FACTOR * (1.0 + 3.0 * CUBIC * x * x);
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du
        }
    }
}

/// `sqrt(2 / pi)`
const FACTOR: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const CUBIC: f64 = 0.044_715;

fn inner(x: f64) -> f64 {
    FACTOR * (x + CUBIC * x.powi(3))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Returns `c = act(a) * b`.
pub fn forward(a: &[f64], b: &[f64], activation: Activation) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| value(activation, *a) * b).collect()
}

/// Returns `(da, db)`: from `c = act(a) b`, `da = dc b act'(a)` and `db = dc act(a)`.
pub fn backward(dc: &[f64], a: &[f64], b: &[f64], activation: Activation) -> (Vec<f64>, Vec<f64>) {
    (0..dc.len()).map(|j| (dc[j] * b[j] * slope(activation, a[j]), dc[j] * value(activation, a[j]))).unzip()
}
