//! Generalised regularised dual averaging (gRDA; Chao and others, 2020): steps whose weights are 0 until their sum of gradients
//! outgrows a threshold that rises with the steps.
//!
//! ```text
//! acc_0 = w_0
//! acc_t = acc_{t-1} - lr g_t
//! l_t   = c lr^(mu + 1/2) t^mu
//! w_t   = sign(acc_t) max(0, |acc_t| - l_t)
//! ```
//! Parameters that are no weights of a layer's linear take plain steps: their threshold is 0.

use dsmoe_core::params::Layout;
use rayon::prelude::*;

use super::prune::is_prunable;

/// Values that one piece of parallel work handles.
const PIECE: usize = 1 << 14;

/// The sums of a task.
#[derive(Debug)]
pub(crate) struct DualAveraging {
    sums: Vec<f32>,
    lr: f64,
    c: f64,
    mu: f64,
}

impl DualAveraging {
    /// Starts at `params`, with a constant learning rate.
    pub(crate) fn new(params: &[f32], lr: f64, c: f64, mu: f64) -> DualAveraging {
        DualAveraging { sums: params.to_vec(), lr, c, mu }
    }

    /// Returns the sums, one by parameter.
    pub(crate) fn sums(&self) -> &[f32] {
        &self.sums
    }

    /// Goes on with `sums`.
    pub(crate) fn set_sums(&mut self, sums: &[f32]) {
        self.sums.copy_from_slice(sums);
    }

    /// Returns the threshold of step `step`, counted from 1.
    pub(crate) fn threshold(&self, step: u64) -> f64 {
        self.c * self.lr.powf(self.mu + 0.5) * (step as f64).powf(self.mu)
    }

    /// Takes step `step`, counted from 1, with `scale` times the gradients.
    pub(crate) fn step(
        &mut self,
        params: &mut [f32],
        grads: &[f32],
        layout: &Layout,
        (step, scale): (u64, f32),
    ) {
        let (lr, threshold) = (self.lr as f32 * scale, self.threshold(step) as f32);
        for entry in layout.entries() {
            let threshold = if is_prunable(entry) { threshold } else { 0.0 };
            let range = entry.range.clone();
            let (sums, params) = (&mut self.sums[range.clone()], &mut params[range.clone()]);
            let pieces = params.par_chunks_mut(PIECE).zip(sums.par_chunks_mut(PIECE));
            pieces.zip(grads[range].par_chunks(PIECE)).for_each(|((params, sums), grads)| {
                for ((w, sum), g) in params.iter_mut().zip(sums).zip(grads) {
                    *sum -= lr * g;
                    *w = sum.signum() * (sum.abs() - threshold).max(0.0);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_core::params::TensorSpec;

    use super::*;

    fn layout() -> Layout {
        Layout::of(vec![
            TensorSpec::matrix("model.layers.0.mlp.up_proj.weight", 1, 2),
            TensorSpec::norm("model.norm.weight", 2),
        ])
    }

    #[test]
    fn without_a_threshold_the_steps_are_those_of_gradient_descent() {
        let layout = layout();
        let mut params = vec![0.0f32; layout.len()];
        params[..2].copy_from_slice(&[1.0, -2.0]);
        let mut plain = params.clone();
        let mut grads = vec![0.0f32; layout.len()];
        grads[..2].copy_from_slice(&[0.5, -0.25]);
        let mut dual = DualAveraging::new(&params, 0.1, 0.0, 0.51);
        for step in 1..=20 {
            dual.step(&mut params, &grads, &layout, (step, 1.0));
            plain.iter_mut().zip(&grads).for_each(|(w, g)| *w -= 0.1 * g);
            assert_eq!(params, plain, "step {step}");
        }
    }

    #[test]
    fn a_weight_without_gradient_ends_at_the_step_where_the_threshold_reaches_it() {
        let layout = layout();
        let norm = layout.entries()[1].range.start;
        let mut params = vec![0.0f32; layout.len()];
        (params[0], params[1], params[norm]) = (0.01, -0.02, 0.01);
        let grads = vec![0.0f32; layout.len()];
        let mut dual = DualAveraging::new(&params, 0.5, 0.005, 0.6);
        let mut ended = None;
        for step in 1..=400u64 {
            dual.step(&mut params, &grads, &layout, (step, 1.0));
            let want = 0.005 * 0.5f64.powf(1.1) * (step as f64).powf(0.6);
            assert!((dual.threshold(step) - want).abs() < 1e-15);
            let is_gone = want >= 0.01;
            assert_eq!(params[0] == 0.0, is_gone, "step {step}");
            ended = ended.or(is_gone.then_some(step));
            assert_eq!(params[norm], 0.01);
            assert!(params[1] <= 0.0);
        }
        assert!(ended.is_some_and(|step| step > 1 && step < 400), "{ended:?}");
    }
}
