//! Entropy of gates, a loss under which they decide (stage 2 of SEER-MoE, arXiv 2404.05089; that of sigmoid gates is ours).
//!
//! ```text
//! softmax   R = mean over tokens of H,  H = -sum_e p_e ln p_e over all experts       dR/dz_j = -p_j (ln p_j + H) / T
//! sigmoid   R = mean over tokens and gates of -q ln q - (1 - q) ln(1 - q)            dR/dz = -q (1 - q) z / (T n)
//! ```
//! Descent makes the largest probability of a token grow, and takes sigmoid gates to 0 or 1. Sums are in f64.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// Returns the softmax of the rows of `logits` `[T, n]`.
pub fn softmax(logits: ArrayView2<'_, f32>) -> Array2<f64> {
    let mut p = logits.mapv(f64::from);
    for mut p in p.outer_iter_mut() {
        let most = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        p.mapv_inplace(|z| (z - most).exp());
        let sum: f64 = p.sum();
        p.mapv_inplace(|p| p / sum);
    }
    p
}

/// Computes p ln p, whose limit at 0 is 0.
fn times_log(p: f64) -> f64 {
    if p > 0.0 { p * p.ln() } else { 0.0 }
}

fn entropy<'a>(p: impl IntoIterator<Item = &'a f64>) -> f64 {
    -p.into_iter().copied().map(times_log).sum::<f64>()
}

/// Computes the mean entropy of the rows of probabilities `[T, n]`.
pub fn of_softmax(p: ArrayView2<'_, f64>) -> f64 {
    p.outer_iter().map(entropy).sum::<f64>() / p.nrows().max(1) as f64
}

/// Adds to `dlogits` `[T, n]` the gradient of `weight` times [`of_softmax`].
///
/// # Panics
/// The shapes differ.
pub fn add_of_softmax(p: ArrayView2<'_, f64>, weight: f64, mut dlogits: ArrayViewMut2<'_, f32>) {
    assert_eq!(p.dim(), dlogits.dim(), "confidence: probabilities and gradients");
    if weight == 0.0 {
        return;
    }
    let scale = weight / p.nrows().max(1) as f64;
    for (p, mut dz) in p.outer_iter().zip(dlogits.outer_iter_mut()) {
        let h = entropy(p);
        dz.iter_mut().zip(p).for_each(|(dz, &p)| *dz -= (scale * (times_log(p) + p * h)) as f32);
    }
}

/// Returns the sigmoid of z and of -z.
fn sigmoids(z: f32) -> [f64; 2] {
    let z = f64::from(z);
    [1.0 / (1.0 + (-z).exp()), 1.0 / (1.0 + z.exp())]
}

/// Computes the mean binary entropy of the sigmoids of `logits` `[T, n]`.
pub fn of_sigmoid(logits: ArrayView2<'_, f32>) -> f64 {
    let sum: f64 = logits.iter().map(|&z| -sigmoids(z).map(times_log).iter().sum::<f64>()).sum();
    sum / logits.len().max(1) as f64
}

/// Adds to `dlogits` the gradient of `weight` times [`of_sigmoid`].
///
/// # Panics
/// The shapes differ.
pub fn add_of_sigmoid(logits: ArrayView2<'_, f32>, weight: f64, mut dlogits: ArrayViewMut2<'_, f32>) {
    assert_eq!(logits.dim(), dlogits.dim(), "confidence: logits and gradients");
    if weight == 0.0 {
        return;
    }
    let scale = weight / logits.len().max(1) as f64;
    for (dz, &z) in dlogits.iter_mut().zip(logits) {
        let [q, rest] = sigmoids(z);
        // Of an infinite logit the factor q (1 - q) is 0.
        let slope = q * rest;
        *dz -= if slope > 0.0 { (scale * slope * f64::from(z)) as f32 } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, f64s, finite_differences, normals};
    use ndarray::array;

    use super::*;

    #[test]
    fn entropies_by_hand() {
        let logits = array![[1.0f32, 0.0]];
        let p = softmax(logits.view());
        assert!((of_softmax(p.view()) - 0.582_203).abs() < 1e-6);
        let mut dz = Array2::zeros((1, 2));
        add_of_softmax(p.view(), 1.0, dz.view_mut());
        // Under descent the larger logit grows.
        assert_close("softmax", dz.as_slice().unwrap(), &[-0.196_612, 0.196_612], 1e-6);
        let at_90 = array![[(9.0f32).ln()]];
        assert!((of_sigmoid(at_90.view()) - 0.325_083).abs() < 1e-6);
        assert!((of_sigmoid(array![[0.0f32]].view()) - 2.0f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn gradients_are_differences_of_the_formulas() {
        const SHAPE: (usize, usize) = (4, 6);
        let z: Vec<f32> = normals(24, 1).iter().map(|z| 2.0 * z).collect();
        let logits = Array2::from_shape_vec(SHAPE, z.clone()).unwrap();
        let of_softmax_of = |z: &[f64]| {
            let rows = z.chunks_exact(SHAPE.1).map(|z| {
                let sum: f64 = z.iter().map(|z| z.exp()).sum();
                -z.iter().map(|z| z.exp() / sum * (z.exp() / sum).ln()).sum::<f64>()
            });
            rows.sum::<f64>() / SHAPE.0 as f64
        };
        let of_sigmoid_of = |z: &[f64]| {
            let gates = z.iter().map(|z| {
                let q = 1.0 / (1.0 + (-z).exp());
                -q * q.ln() - (1.0 - q) * (1.0 - q).ln()
            });
            gates.sum::<f64>() / z.len() as f64
        };
        let p = softmax(logits.view());
        assert!((of_softmax(p.view()) - of_softmax_of(&f64s(&z))).abs() < 1e-12);
        assert!((of_sigmoid(logits.view()) - of_sigmoid_of(&f64s(&z))).abs() < 1e-12);
        // Gradients are added to what is there.
        let started =
            |differences: Vec<f64>| -> Vec<f64> { differences.iter().map(|d| 1.0 + 0.7 * d).collect() };
        let mut dz = Array2::from_elem(SHAPE, 1.0);
        add_of_softmax(p.view(), 0.7, dz.view_mut());
        let want = started(finite_differences(&f64s(&z), 1e-5, of_softmax_of));
        assert_close("softmax", dz.as_slice().unwrap(), &want, 1e-6);
        let mut dz = Array2::from_elem(SHAPE, 1.0);
        add_of_sigmoid(logits.view(), 0.7, dz.view_mut());
        let want = started(finite_differences(&f64s(&z), 1e-5, of_sigmoid_of));
        assert_close("sigmoid", dz.as_slice().unwrap(), &want, 1e-6);
    }

    #[test]
    fn gates_that_have_decided_cost_and_move_nothing() {
        let logits = array![[f32::INFINITY, f32::NEG_INFINITY, 200.0, -200.0]];
        assert!(of_sigmoid(logits.view()).abs() < 1e-12);
        let p = array![[1.0, 0.0, 0.0, 0.0]];
        assert_eq!(of_softmax(p.view()), 0.0);
        let mut dz = Array2::zeros((1, 4));
        add_of_sigmoid(logits.view(), 1.0, dz.view_mut());
        add_of_softmax(p.view(), 1.0, dz.view_mut());
        assert!(dz.iter().all(|dz: &f32| dz.abs() < 1e-12), "{dz}");
        assert_eq!(of_softmax(Array2::zeros((0, 3)).view()), 0.0);
    }
}
