//! The definition of RMSNorm, in f64.

/// Returns `(y, rstd)`: `rstd[t] = 1 / sqrt(mean(x[t]^2) + eps)`, `y = x rstd w`. An offset of the weight is part of `weight`
/// here. The norm over heads is this one over rows of one head each.
pub fn forward(x: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let hidden = weight.len();
    let rstd: Vec<f64> = x
        .chunks(hidden)
        .map(|x| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / hidden as f64 + eps).sqrt())
        .collect();
    let y = x.iter().enumerate().map(|(i, x)| x * rstd[i / hidden] * weight[i % hidden]).collect();
    (y, rstd)
}

/// Returns `(dx, dw)`. From `y_j = x_j r w_j` with `r = (mean x^2 + eps)^(-1/2)`, so `dr/dx_j = -r^3 x_j / hidden`:
/// `dx_j = dy_j w_j r - r^3 x_j / hidden sum_i dy_i w_i x_i`, and `dw_j = sum_t dy_j x_j r`.
pub fn backward(dy: &[f64], x: &[f64], weight: &[f64], rstd: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let hidden = weight.len();
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; hidden]);
    for (t, &r) in rstd.iter().enumerate() {
        let row = t * hidden..(t + 1) * hidden;
        let (x, dy) = (&x[row.clone()], &dy[row.clone()]);
        let dr: f64 = (0..hidden).map(|i| dy[i] * weight[i] * x[i]).sum();
        for (j, dx) in dx[row].iter_mut().enumerate() {
            *dx = dy[j] * weight[j] * r - r.powi(3) * x[j] / hidden as f64 * dr;
            dw[j] += dy[j] * x[j] * r;
        }
    }
    (dx, dw)
}
