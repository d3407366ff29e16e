//! AdamW with decoupled weight decay, as `torch.optim.AdamW` computes it.
//!
//! ```text
//! g = grad_scale grad
//! p <- p (1 - lr weight_decay)
//! m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
//! p <- p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//! ```
//! An update has no backward pass. The scalars are computed in f64.

mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use super::blocks::{BLOCK, each};
use crate::isa::Isa;

/// The hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Share of a parameter that decays per unit of learning rate.
    pub weight_decay: f64,
    /// This step's number; the first is 1.
    pub step: u64,
}

impl Hyper {
    /// Returns the step's factors, rounded once: `1 - lr weight_decay`, `lr / (1 - beta1^step)`, beta1, `1 - beta1`, beta2,
    /// `1 - beta2`, `1 / sqrt(1 - beta2^step)` and eps.
    pub(crate) fn factors(&self) -> [f32; 8] {
        let Hyper { lr, beta1, beta2, eps, weight_decay, step } = *self;
        let rate = lr / (1.0 - beta1.powf(step as f64));
        let root = (1.0 - beta2.powf(step as f64)).sqrt().recip();
        let factors = [1.0 - lr * weight_decay, rate, beta1, 1.0 - beta1, beta2, 1.0 - beta2, root, eps];
        factors.map(|factor| factor as f32)
    }
}

/// Updates `param` and its moments `m` and `v` in place from `grad_scale * grad`, all equally long.
#[derive(Debug)]
pub struct Step<'a> {
    /// The parameters.
    pub param: &'a mut [f32],
    /// Mean of the gradients.
    pub m: &'a mut [f32],
    /// Mean of the squared gradients.
    pub v: &'a mut [f32],
    /// The gradient.
    pub grad: &'a [f32],
    /// Multiplies `grad`.
    pub grad_scale: f32,
    /// The step's hyper-parameters.
    pub hyper: &'a Hyper,
}

run_on_current_tier!(Step);

impl Step<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// The lengths differ, or `hyper.step` is 0.
    pub fn run_on(self, isa: Isa) {
        let Step { param, m, v, grad, grad_scale, hyper } = self;
        let lens = [param.len(), m.len(), v.len()];
        assert_eq!(lens, [grad.len(); 3], "adamw::Step: param, m and v for {} values", grad.len());
        assert!(hyper.step > 0, "adamw::Step: the first step is 1");
        let moments = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
        let blocks = param.par_chunks_mut(BLOCK).zip(moments).zip(grad.par_chunks(BLOCK));
        let scalars = kernel::Scalars::new(hyper, grad_scale);
        each(blocks, |((param, (m, v)), grad)| isa.run(kernel::Step { param, m, v, grad, scalars }));
    }
}

/// Returns the sum of the squares of `x`, in f64, computed by the calling thread. The length alone determines the order.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    Isa::current().run(kernel::SumOfSquares(x))
}
