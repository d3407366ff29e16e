//! Sharpness: the step uphill, the curvature that two gradients tell of, and what a weight's removal costs.
//!
//! ```text
//! eps  = rho g / |g|                      g = grad L(w), over all parameters
//! g'   = grad L(w + eps)
//! h_i  = max(0, (g'_i - g_i) / eps_i)     where |eps_i| > 1e-3 max |eps|; elsewhere the empirical Fisher information
//! s_i  = -g'_i w_i + h_i w_i^2 / 2        the change of the sharpness-aware loss when w_i becomes 0, to second order
//! ```

use rayon::prelude::*;

/// Steps that are smaller than this share of the largest one tell nothing of the curvature.
const SMALLEST_STEP: f32 = 1e-3;
/// Values that one piece of parallel work handles.
const PIECE: usize = 1 << 14;

/// Returns the factor of the gradient of norm `norm` in the step uphill of length `rho`; 0 without a gradient.
pub(crate) fn step_scale(rho: f64, norm: f64) -> f32 {
    if norm > 0.0 { (rho / norm) as f32 } else { 0.0 }
}

/// Moves parameters uphill: adds `scale` times the gradient.
pub(crate) fn ascend(params: &mut [f32], grads: &[f32], scale: f32) {
    let pieces = params.par_chunks_mut(PIECE).zip(grads.par_chunks(PIECE));
    pieces.for_each(|(params, grads)| params.iter_mut().zip(grads).for_each(|(w, g)| *w += scale * g));
}

/// The gradients of every weight at two points.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slopes<'a> {
    /// The gradient at the weights.
    pub(crate) here: &'a [f32],
    /// The gradient uphill of them.
    pub(crate) uphill: &'a [f32],
    /// The step uphill over the gradient.
    pub(crate) scale: f32,
    /// The mean of squared gradients of single sequences.
    pub(crate) fisher: &'a [f32],
}

impl Slopes<'_> {
    /// Returns the scores of all weights `params`: the least goes first.
    pub(crate) fn scores(&self, params: &[f32]) -> Vec<f32> {
        let Slopes { here, uphill, scale, fisher } = *self;
        let largest = here.par_iter().map(|g| g.abs()).reduce(|| 0.0, f32::max);
        let least = SMALLEST_STEP * largest;
        let score = |i: usize| {
            let (g, up, w) = (here[i], uphill[i], params[i]);
            let curvature =
                if g.abs() > least && scale > 0.0 { ((up - g) / (scale * g)).max(0.0) } else { fisher[i] };
            -up * w + 0.5 * curvature * w * w
        };
        (0..params.len()).into_par_iter().map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// L = sum a_i w_i^2 / 2, by hand.
    #[test]
    fn a_quadratic_loss_has_the_scores_that_were_worked_by_hand() {
        let (a, w) = ([4.0f32, 1.0, 0.25], [0.5f32, 1.0, 1.0]);
        let grad = |w: &[f32]| -> Vec<f32> { a.iter().zip(w).map(|(a, w)| a * w).collect() };
        let here = grad(&w);
        let norm = here.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        assert!((norm - 2.25).abs() < 1e-12);
        let scale = step_scale(0.1, norm);
        let mut above = w;
        ascend(&mut above, &here, scale);
        for (i, want) in [0.588_888_9, 1.044_444_4, 1.011_111_1].into_iter().enumerate() {
            assert!((above[i] - want).abs() < 1e-6, "{above:?}");
        }
        let uphill = grad(&above);
        let fisher = [9.0; 3];
        let scores = Slopes { here: &here, uphill: &uphill, scale, fisher: &fisher }.scores(&w);
        for (i, want) in [-0.677_777_8, -0.544_444_4, -0.127_777_8].into_iter().enumerate() {
            assert!((scores[i] - want).abs() < 1e-5, "{scores:?}");
        }
        // The loss after a removal is a tie of the first two, and the worst loss in the ball is not.
        let loss = |w: &[f32]| -> f32 { a.iter().zip(w).map(|(a, w)| a * w * w / 2.0).sum() };
        let worst = |gone: usize| {
            let mut left = w;
            left[gone] = 0.0;
            let grads = grad(&left);
            let norm = grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let plain = loss(&left);
            ascend(&mut left, &grads, step_scale(0.1, norm));
            (plain, loss(&left))
        };
        for (gone, plain, in_ball) in [(0, 0.625, 0.7329), (1, 0.625, 0.8463), (2, 1.0, 1.2406)] {
            let found = worst(gone);
            assert!((found.0 - plain).abs() < 1e-6 && (found.1 - in_ball).abs() < 1e-4, "{gone}: {found:?}");
        }
        assert_eq!(worst(0).0, worst(1).0);
    }

    #[test]
    fn where_the_step_is_small_the_fisher_information_is_the_curvature() {
        let (here, uphill, w) = ([1.0f32, 1e-4, 0.0], [1.5f32, 0.2, 0.0], [2.0f32, 3.0, 4.0]);
        let fisher = [7.0, 0.5, 0.25];
        let scores = Slopes { here: &here, uphill: &uphill, scale: 0.5, fisher: &fisher }.scores(&w);
        // Curvature 1, 0.5 and 0.25.
        let want = [-3.0 + 0.5 * 4.0, -0.6 + 0.25 * 9.0, 0.125 * 16.0];
        for (got, want) in scores.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{scores:?}");
        }
        assert_eq!(step_scale(0.05, 0.0), 0.0);
    }
}
