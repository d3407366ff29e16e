//! The definition of the gated unit, in f64.

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Returns `c = silu(a) * b`.
pub fn forward(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * sigmoid(*a) * b).collect()
}

/// Returns `(da, db)`: from `c = a s(a) b` with s' = s (1 - s), `da = dc b (s + a s (1 - s))` and `db = dc a s`.
pub fn backward(dc: &[f64], a: &[f64], b: &[f64]) -> (Vec<f64>, Vec<f64>) {
    (0..dc.len())
        .map(|j| {
            let s = sigmoid(a[j]);
            (dc[j] * b[j] * (s + a[j] * s * (1.0 - s)), dc[j] * a[j] * s)
        })
        .unzip()
}
