//! The definition of linear layers over kept inputs, in f64.

/// Returns x with 0 in place of what the threshold does not keep.
pub fn masked(x: &[f64], threshold: f64) -> Vec<f64> {
    x.iter().map(|&x| if x.abs() <= threshold { 0.0 } else { x }).collect()
}

/// Returns `y = masked(x) W^T`, with W `[outputs, inputs]` and rows of `inputs` values.
pub fn forward(x: &[f64], w: &[f64], inputs: usize, threshold: f64) -> Vec<f64> {
    let masked = masked(x, threshold);
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    masked.chunks_exact(inputs).flat_map(|x| w.chunks_exact(inputs).map(move |w| dot(x, w))).collect()
}

/// Returns `y_j = x . W[j]` where the threshold keeps gate j, and 0 elsewhere.
pub fn rows(x: &[f64], w: &[f64], gates: &[f64], threshold: f64) -> Vec<f64> {
    let all = forward(x, w, x.len(), 0.0);
    all.iter().zip(gates).map(|(&y, gate)| if gate.abs() <= threshold { 0.0 } else { y }).collect()
}
