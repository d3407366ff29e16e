//! AdamW over the parameter arena, with the decay and the learning rate each tensor asks for, and clipping by the
//! global gradient norm.

use std::ops::Range;

use dsmoe_core::params::{Entry, Layout, TensorSpec};
use dsmoe_kernels::adamw;
use dsmoe_kernels::buf::Buf;

use crate::config::TrainConfig;

/// Keeps clipping of a zero gradient finite.
const CLIP_EPS: f64 = 1e-6;

/// Euclidean norms of a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradNorms {
    /// The norm over all tensors.
    pub all: f64,
    /// The norm over the routers.
    pub router: f64,
}

/// Computes the norms of `grads`, laid out as `layout`, summed in f64 in the order of the layout.
pub fn grad_norms(layout: &Layout, grads: &[f32]) -> GradNorms {
    let (mut all, mut router) = (0.0, 0.0);
    for (spec, range) in runs(layout) {
        let squares = adamw::sum_of_squares(&grads[range]);
        all += squares;
        if spec.router {
            router += squares;
        }
    }
    GradNorms { all: all.sqrt(), router: router.sqrt() }
}

/// Joins neighbours in the layout that are updated alike: the first of them, and their range. The padding between them
/// is zero in every arena.
fn runs(layout: &Layout) -> impl Iterator<Item = (&TensorSpec, Range<usize>)> {
    let alike = |a: &Entry, b: &Entry| (a.spec.decay, a.spec.router) == (b.spec.decay, b.spec.router);
    layout
        .entries()
        .chunk_by(alike)
        .map(|run| (&run[0].spec, run[0].range.start..run[run.len() - 1].range.end))
}

/// Returns the factor that scales a gradient of norm `norm` to a norm of at most `clip`; 1 when `clip` is 0.
pub fn clip_scale(norm: f64, clip: f64) -> f32 {
    if clip > 0.0 && norm > clip { (clip / (norm + CLIP_EPS)) as f32 } else { 1.0 }
}

/// Finds the tensor with a NaN or infinity in `values` that lies nearest to the loss. A backward pass spreads such
/// values to all tensors before it, so the layout is searched from its end.
pub fn last_non_finite<'l>(layout: &'l Layout, values: &[f32]) -> Option<&'l Entry> {
    layout.entries().iter().rev().find(|entry| values[entry.range.clone()].iter().any(|x| !x.is_finite()))
}

/// The settings of one update of the parameters.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The settings of the run.
    pub config: &'a TrainConfig,
    /// The learning rate of the step.
    pub lr: f64,
    /// The factor that multiplies the gradients first, of [`clip_scale`].
    pub scale: f32,
    /// The step, counted from 1.
    pub step: u64,
}

impl Update<'_> {
    /// Returns the constants for tensors that decay or not, and that belong to a router or not. Norms and routers do
    /// not decay. Routers use [`TrainConfig::router_lr_scale`] times the learning rate.
    pub fn hyper(&self, decay: bool, router: bool) -> adamw::Hyper {
        let Update { config, lr, step, .. } = *self;
        adamw::Hyper {
            lr: if router { lr * config.router_lr_scale } else { lr },
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: if decay { config.weight_decay } else { 0.0 },
            step,
        }
    }
}

/// The optimiser's state: first and second moments, laid out as the parameters.
#[derive(Debug)]
pub struct AdamW {
    /// First moments.
    pub m: Buf,
    /// Second moments.
    pub v: Buf,
}

impl AdamW {
    /// Moments of zero.
    pub fn new(layout: &Layout) -> AdamW {
        AdamW { m: Buf::zeros(layout.len()), v: Buf::zeros(layout.len()) }
    }

    /// Takes one step.
    ///
    /// # Panics
    /// A slice is not as long as the layout.
    pub fn step(&mut self, params: &mut [f32], grads: &[f32], layout: &Layout, update: &Update<'_>) {
        let lens = [params.len(), grads.len(), self.m.len(), self.v.len()];
        assert_eq!(lens, [layout.len(); 4], "adamw: parameters, gradients and moments for the layout");
        for (spec, range) in runs(layout) {
            let hyper = update.hyper(spec.decay, spec.router);
            let (m, v) = (&mut self.m[range.clone()], &mut self.v[range.clone()]);
            let (param, grad, grad_scale) = (&mut params[range.clone()], &grads[range], update.scale);
            adamw::Step { param, m, v, grad, grad_scale, hyper: &hyper }.run();
        }
    }
}
