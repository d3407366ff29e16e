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
    /// Of all tensors.
    pub all: f64,
    /// Of the routers.
    pub router: f64,
}

/// Norms of `grads`, laid out as `layout`, summed in f64 in the order of the layout.
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

/// Neighbours in the layout that are treated alike, as one: the first of them, and where they lie. What pads them is
/// zero in every arena.
fn runs(layout: &Layout) -> impl Iterator<Item = (&TensorSpec, Range<usize>)> {
    let alike = |a: &Entry, b: &Entry| (a.spec.decay, a.spec.router) == (b.spec.decay, b.spec.router);
    layout
        .entries()
        .chunk_by(alike)
        .map(|run| (&run[0].spec, run[0].range.start..run[run.len() - 1].range.end))
}

/// What a gradient of that norm is multiplied by so that its norm is at most `clip`; 1 when `clip` is 0.
pub fn clip_scale(norm: f64, clip: f64) -> f32 {
    if clip > 0.0 && norm > clip { (clip / (norm + CLIP_EPS)) as f32 } else { 1.0 }
}

/// The tensor with a NaN or infinity in `values` that lies nearest to the loss: a backward pass carries what is
/// not finite from there to all before it, so the layout is searched from its end.
pub fn last_non_finite<'l>(layout: &'l Layout, values: &[f32]) -> Option<&'l Entry> {
    layout.entries().iter().rev().find(|entry| values[entry.range.clone()].iter().any(|x| !x.is_finite()))
}

/// What `step` (from 1) uses for tensors that decay or not, and are a router's or not.
pub fn hyper(config: &TrainConfig, lr: f64, step: u64, decay: bool, router: bool) -> adamw::Hyper {
    adamw::Hyper {
        lr: if router { lr * config.router_lr_scale } else { lr },
        beta1: config.beta1,
        beta2: config.beta2,
        eps: config.eps,
        weight_decay: if decay { config.weight_decay } else { 0.0 },
        step,
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

    /// One step: `step` counts from 1, `grad_scale` multiplies `grads` first. Norms and routers do not decay;
    /// routers use `lr` times [`TrainConfig::router_lr_scale`].
    ///
    /// # Panics
    /// A slice is not as long as the layout.
    #[expect(clippy::too_many_arguments, reason = "two arenas, their table and four numbers of the step")]
    pub fn step(
        &mut self,
        params: &mut [f32],
        grads: &[f32],
        layout: &Layout,
        config: &TrainConfig,
        lr: f64,
        grad_scale: f32,
        step: u64,
    ) {
        assert!(
            [params.len(), grads.len(), self.m.len(), self.v.len()] == [layout.len(); 4],
            "adamw: params {}, grads {}, moments {}, layout {}",
            params.len(),
            grads.len(),
            self.m.len(),
            layout.len()
        );
        for (spec, range) in runs(layout) {
            let hyper = hyper(config, lr, step, spec.decay, spec.router);
            adamw::Step {
                param: &mut params[range.clone()],
                m: &mut self.m[range.clone()],
                v: &mut self.v[range.clone()],
                grad: &grads[range],
                grad_scale,
                hyper: &hyper,
            }
            .run();
        }
    }
}
