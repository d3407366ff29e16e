//! Separability loss: pushes gates away from the threshold (LTE, arXiv 2402.06126).
//!
//! ```text
//! g   = sigmoid(z - threshold) - 1/2                 how far a gate is from where it opens, -1/2 to 1/2
//! L   = 1/(T n) sum over tokens and gates of w^2 / (g^2 + w^2)
//! dz += weight dL/dz,   dL/dg = -2 g w^2 / (g^2 + w^2)^2 / (T n)
//! ```
//! LTE's term is 1 / (G - threshold)^2. It has no largest value; here a gate at the threshold has loss 1, and w, the
//! distance at which the loss is a half, bounds the gradient. Where no threshold holds, there is no loss.

use ndarray::{ArrayView2, ArrayViewMut2};

/// The distance of a gate from the threshold at which its loss is a half.
const WIDTH: f64 = 0.1;

/// Returns the loss of a gate, and its derivative by the logit.
fn pair(z: f32, bar: f32) -> (f64, f64) {
    let q = 1.0 / (1.0 + (f64::from(bar) - f64::from(z)).exp());
    let (g, square) = (q - 0.5, WIDTH * WIDTH);
    let sum = g * g + square;
    (square / sum, -2.0 * g * square / (sum * sum) * q * (1.0 - q))
}

/// Returns the threshold if it decides anything.
fn finite(bar: Option<f32>) -> Option<f32> {
    bar.filter(|bar| bar.is_finite())
}

/// Computes the loss of one layer of router logits `[T, n]` that are compared with `bar`; 0 without gates.
pub fn loss(logits: ArrayView2<'_, f32>, bar: Option<f32>) -> f64 {
    let Some(bar) = finite(bar) else { return 0.0 };
    logits.iter().map(|&z| pair(z, bar).0).sum::<f64>() / logits.len().max(1) as f64
}

/// Adds to `dlogits` the gradient of `weight` times the loss.
///
/// # Panics
/// The shapes differ.
pub fn backward(
    logits: ArrayView2<'_, f32>,
    bar: Option<f32>,
    weight: f32,
    mut dlogits: ArrayViewMut2<'_, f32>,
) {
    assert_eq!(logits.dim(), dlogits.dim(), "separability::backward: logits and gradients");
    let Some(bar) = finite(bar).filter(|_| weight != 0.0) else { return };
    let scale = f64::from(weight) / logits.len().max(1) as f64;
    for (dz, &z) in dlogits.iter_mut().zip(&logits) {
        *dz += (scale * pair(z, bar).1) as f32;
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, f64s, finite_differences, normals};
    use ndarray::Array2;

    use super::*;

    #[test]
    fn the_gradient_is_the_derivative_and_pushes_away_from_the_threshold() {
        let z: Vec<f32> = normals(24, 1).iter().map(|z| 3.0 * z).collect();
        let logits = |z: &[f32]| Array2::from_shape_vec((4, 6), z.to_vec()).unwrap();
        for bar in [0.0, -1.5, 2.0] {
            let exact = |z: &[f64]| {
                let each = z.iter().map(|z| {
                    let g = 1.0 / (1.0 + (f64::from(bar) - z).exp()) - 0.5;
                    0.01 / (g * g + 0.01)
                });
                each.sum::<f64>() / 24.0
            };
            assert!((loss(logits(&z).view(), Some(bar)) - exact(&f64s(&z))).abs() < 1e-12);
            let mut dz = Array2::from_elem((4, 6), 1.0);
            backward(logits(&z).view(), Some(bar), 0.7, dz.view_mut());
            let want = finite_differences(&f64s(&z), 1e-5, |z| 0.7 * exact(z));
            let want: Vec<f64> = want.iter().map(|d| 1.0 + d).collect();
            assert_close("dlogits", dz.as_slice().unwrap(), &want, 1e-6);
            for (dz, z) in dz.iter().zip(&z) {
                assert!((dz - 1.0) * (z - bar) <= 0.0, "{dz} at {z}");
            }
        }
    }

    #[test]
    fn a_gate_at_the_threshold_costs_most_and_none_cost_nothing() {
        let at = |z: f32, bar: Option<f32>| loss(Array2::from_elem((1, 1), z).view(), bar);
        assert_eq!((at(0.5, Some(0.5)), at(0.0, None), at(3.0, Some(f32::NEG_INFINITY))), (1.0, 0.0, 0.0));
        assert!((at(50.0, Some(0.0)) - 1.0 / 26.0).abs() < 1e-9 && at(f32::INFINITY, Some(0.0)) < 0.04);
        assert_eq!(loss(Array2::zeros((0, 3)).view(), Some(0.0)), 0.0);
        let mut dz = Array2::zeros((1, 1));
        backward(Array2::from_elem((1, 1), 0.2).view(), None, 1.0, dz.view_mut());
        assert_eq!(dz[[0, 0]], 0.0);
    }
}
