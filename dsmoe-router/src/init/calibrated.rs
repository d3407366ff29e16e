//! Routers fitted to calibration text: a router opens the experts whose outputs are large.
//!
//! ```text
//! per layer, tokens t of the calibration text, expert i
//!   s[t, i] = ln |V_i c_i(x_t)|                  the output that the expert adds to the residual stream
//!   w_i, m_i = ridge regression of s[:, i] on x
//!   z[t, i] = spread (w_i (x_t - mean x) + m_i - q) / deviation
//! ```
//! q is the value that the wanted share of all pairs exceeds, so that the router opens this share of pairs at the
//! start.

use dsmoe_kernels::Precision;
use dsmoe_kernels::matmul::{Mat, Matmul};

use crate::linalg::inverse_factor;

/// Raises the diagonal of the inputs' covariance, as a share of its mean.
const RIDGE: f64 = 0.01;
/// Standard deviation of the logits at the start.
const SPREAD: f64 = 2.0;

/// The router of a layer.
///
/// ```
/// use dsmoe_router::RouterValues;
/// use dsmoe_router::init::calibrated;
///
/// let x: Vec<f32> = (0..64 * 4).map(|i| (i as f32 * 0.7).sin()).collect();
/// let scores: Vec<f64> = (0..64 * 2).map(|i| (i as f64 * 1.3).cos()).collect();
/// let RouterValues { weight, bias } = calibrated(&x, &scores, 2, 0.5).unwrap();
/// assert_eq!((weight.len(), bias.len()), (2 * 4, 2));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RouterValues {
    /// `[num_experts, hidden]`.
    pub weight: Vec<f32>,
    /// `[num_experts]`.
    pub bias: Vec<f32>,
}

/// Fits a router to the inputs `x` `[tokens, hidden]` and `scores` `[tokens, num_experts]` of experts, such that it
/// opens the share `active` of all pairs. Returns none if a value is not finite.
pub fn calibrated(x: &[f32], scores: &[f64], num_experts: usize, active: f64) -> Option<RouterValues> {
    let tokens = scores.len() / num_experts;
    let hidden = x.len() / tokens;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / tokens as f64;
    let middle: Vec<f64> =
        (0..hidden).map(|c| mean(&mut x.iter().skip(c).step_by(hidden).map(|&x| x.into()))).collect();
    let means: Vec<f64> =
        (0..num_experts).map(|i| mean(&mut scores.iter().skip(i).step_by(num_experts).copied())).collect();
    let centred = |(at, &x): (usize, &f32)| (f64::from(x) - middle[at % hidden]) as f32;
    let x: Vec<f32> = x.iter().enumerate().map(centred).collect();
    let targets: Vec<f32> =
        scores.iter().enumerate().map(|(at, s)| (s - means[at % num_experts]) as f32).collect();

    // (X^T X / tokens + ridge) W^T = X^T S / tokens
    let x = Mat::new(&x, tokens, hidden);
    let mut covariance = vec![0.0; hidden * hidden];
    multiply(&mut covariance, x.t(), x);
    let mut products = vec![0.0; hidden * num_experts];
    multiply(&mut products, x.t(), Mat::new(&targets, tokens, num_experts));
    let trace: f64 = covariance.iter().step_by(hidden + 1).map(|&v| f64::from(v)).sum();
    let ridge = (RIDGE * trace / hidden as f64).max(f64::from(f32::MIN_POSITIVE)) as f32;
    covariance.iter_mut().step_by(hidden + 1).for_each(|v| *v += ridge);
    let factor = inverse_factor(covariance, hidden).ok()?;
    let factor = Mat::new(&factor, hidden, hidden);
    let (mut half, mut solved) = (vec![0.0; hidden * num_experts], vec![0.0; hidden * num_experts]);
    multiply(&mut half, factor.t(), Mat::new(&products, hidden, num_experts));
    multiply(&mut solved, factor, Mat::new(&half, hidden, num_experts));

    let mut predicted = vec![0.0; tokens * num_experts];
    multiply(&mut predicted, x, Mat::new(&solved, hidden, num_experts));
    let predicted: Vec<f64> =
        predicted.iter().enumerate().map(|(at, &z)| f64::from(z) + means[at % num_experts]).collect();
    let centre = predicted.iter().sum::<f64>() / predicted.len() as f64;
    let variance = predicted.iter().map(|z| (z - centre).powi(2)).sum::<f64>() / predicted.len() as f64;
    let mut sorted = predicted;
    sorted.sort_by(f64::total_cmp);
    let open = ((active * sorted.len() as f64).round() as usize).min(sorted.len());
    // The middle between the last closed pair and the first open one.
    let quantile = match sorted.len() - open {
        0 => sorted[0] - 1.0,
        at if open == 0 => sorted[at - 1] + 1.0,
        at => 0.5 * (sorted[at - 1] + sorted[at]),
    };
    // Constant predictions have no spread to scale.
    let scale = if variance > 0.0 { SPREAD / variance.sqrt() } else { 1.0 };
    let weight: Vec<f32> = (0..num_experts * hidden)
        .map(|at| (scale * f64::from(solved[at % hidden * num_experts + at / hidden])) as f32)
        .collect();
    let bias: Vec<f32> = (0..num_experts)
        .map(|i| {
            let shift: f64 = (0..hidden).map(|c| f64::from(weight[i * hidden + c]) * middle[c]).sum();
            (scale * (means[i] - quantile) - shift) as f32
        })
        .collect();
    weight.iter().chain(&bias).all(|v| v.is_finite()).then_some(RouterValues { weight, bias })
}

/// Sets `c` to the product of `a` and `b`.
fn multiply(c: &mut [f32], a: Mat<'_>, b: Mat<'_>) {
    Matmul { c, a, b, accumulate: false, precision: Precision::F32 }.run();
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    /// Scores that are linear in the inputs are fitted, and the share opens exactly.
    #[test]
    fn a_linear_truth_is_fitted_and_the_share_opened() {
        let (tokens, hidden, experts) = (600, 12, 4);
        let mut x = normals(tokens * hidden, 1);
        x.iter_mut().step_by(hidden).for_each(|x| *x += 3.0);
        let truth = normals(experts * hidden, 2);
        let score = |t: usize, i: usize| -> f64 {
            let dot = (0..hidden).map(|c| f64::from(x[t * hidden + c]) * f64::from(truth[i * hidden + c]));
            dot.sum::<f64>() + i as f64
        };
        let scores: Vec<f64> = (0..tokens * experts).map(|at| score(at / experts, at % experts)).collect();
        for active in [0.0, 0.25, 0.375, 1.0] {
            let router = calibrated(&x, &scores, experts, active).unwrap();
            let logit = |t: usize, i: usize| -> f64 {
                let row = &router.weight[i * hidden..][..hidden];
                let dot = row.iter().zip(&x[t * hidden..]).map(|(w, x)| f64::from(*w) * f64::from(*x));
                dot.sum::<f64>() + f64::from(router.bias[i])
            };
            let pairs: Vec<(f64, f64)> =
                (0..tokens * experts).map(|at| (logit(at / experts, at % experts), scores[at])).collect();
            let open = pairs.iter().filter(|(z, _)| *z > 0.0).count();
            let want = (active * pairs.len() as f64).round() as usize;
            assert!(open.abs_diff(want) <= 1, "{open} {want}");
            // The open pairs are the largest, up to the bias of the ridge.
            let mut sorted: Vec<f64> = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let right = pairs.iter().filter(|(z, s)| *z > 0.0 && *s >= sorted[want.max(1) - 1]).count();
            assert!(right as f64 >= 0.97 * open as f64, "{right} of {open}");
        }
        assert!(calibrated(&vec![f32::NAN; 600 * 12], &scores, experts, 0.5).is_none());
    }
}
