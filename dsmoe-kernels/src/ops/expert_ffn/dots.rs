//! The gradients by the coefficients of chosen pairs, whether they are active or not.
//!
//! Of the nine products of training over a pair these need three: a, b and `dy Wd^T`. [`Backward`](super::Backward) with
//! [`Dims::all_pairs`] has them of every pair, as dense products. Here the rows of the chosen pairs are picked for each expert, and
//! no other row is multiplied. Beside these products the time goes into packing the weights of every expert with a chosen pair once
//! more, which counts where an expert has few of them.

use rayon::prelude::*;

use super::dims::{Dims, Routes, Weights, check, is_empty};
use super::kernel::GatedDots;
use super::plan::{Pairs, Plan, check_pairs};
use super::scratch::Scratch;
use super::train::{add_biases, project};
use crate::blocks::{BLOCK, each_when};
use crate::isa::Isa;
use crate::swiglu::activation::with_unit;

/// Sets the gradients by the coefficients of some pairs, each times a factor.
#[derive(Debug)]
pub struct PairDots<'a> {
    /// `[tokens, num_routed]`, set to `factor * <dy_t, o_i(x_t)>` at the pairs; the other values stay.
    pub dcoefficients: &'a mut [f32],
    /// `[tokens, hidden]`
    pub dy: &'a [f32],
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a Weights<'a>,
    /// The pairs, with their factors as coefficients.
    pub pairs: &'a Routes<'a>,
    /// The sizes. [`Dims::all_pairs`] is not read.
    pub dims: Dims,
    /// Work space and precision.
    pub scratch: &'a mut Scratch,
}

run_on_current_tier!(PairDots);

impl PairDots<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let PairDots { dcoefficients, dy, x, weights, pairs, dims, scratch } = self;
        let pairs = Pairs::Routed(pairs);
        check("PairDots", dy, x, weights, dims);
        check_pairs("PairDots", pairs, dims);
        assert!(
            dcoefficients.len() == dims.tokens * dims.num_routed(),
            "expert_ffn::PairDots: {} coefficient gradients for {dims:?}",
            dcoefficients.len()
        );
        let routed = Dims { all_pairs: false, ..dims.of_routed() };
        let plan = Plan { pairs, dims: routed, isa, precision: scratch.precision, accumulate: false };
        if plan.num_pairs() == 0 {
            return;
        }
        scratch.dpairs.resize(plan.num_pairs());
        if is_empty(routed) {
            scratch.dpairs.fill(0.0);
        } else {
            let weights = weights.of(dims.core_neurons()..dims.intermediate, dims.hidden);
            set_dots(scratch, [x, dy], &weights, &plan);
        }
        for expert in 0..routed.num_experts {
            for pair in plan.pairs_of(expert) {
                let place = plan.token(pair) * routed.num_experts + expert;
                dcoefficients[place] = plan.coefficient(pair) * scratch.dpairs[pair];
            }
        }
    }
}

/// Sets `dpairs` of the work space to `<dy_t, o_i(x_t)>` of every pair.
fn set_dots(scratch: &mut Scratch, [x, dy]: [&[f32]; 2], weights: &Weights<'_>, plan: &Plan<'_>) {
    let Scratch { da: a, db: b, g, dpairs: dots, .. } = scratch;
    for buf in [&mut *a, &mut *b, &mut *g] {
        buf.resize(plan.saved_len());
    }
    project(a, x, weights.gate, plan);
    project(b, x, weights.up, plan);
    project(g, dy, weights.down, plan);
    if let Some(biases) = weights.biases {
        add_biases(a, biases.gate, plan);
        add_biases(b, biases.up, plan);
    }
    let (a, b, g) = (&a[..], &b[..], &g[..]);
    let width = plan.dims.expert_width();
    let rows = (BLOCK / width).max(1);
    let chunks = dots.par_chunks_mut(rows).enumerate();
    each_when(plan.num_pairs() > rows, chunks, |(i, dots)| {
        let start = i * rows * width;
        let values = start..start + dots.len() * width;
        let (a, b, g) = (&a[values.clone()], &b[values.clone()], &g[values]);
        with_unit!(plan.dims.activation, unit => plan.isa.run(GatedDots { dots, a, b, g, width, unit }));
    });
}
