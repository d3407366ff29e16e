//! Forward and backward over row-major weights, which are packed for the call.

use rayon::prelude::*;

use super::combine;
use super::dims::{BiasGrads, Dims, Saved, WeightGrads, Weights, check, check_grads, is_empty};
use super::kernel::{GateBackward, Gated, GatedDots, Plain};
use super::outer;
use super::plan::{Pairs, Plan, check_pairs};
use super::scratch::{Scratch, Stored};
use crate::blocks::{BLOCK, each_when};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::linear::{self, add_bias};
use crate::matmul::{Mat, Operands, Precision, Source};
use crate::swiglu::activation::with_unit;

/// The layout of the pairs' activations that the backward reads: every pair in rows of `intermediate` values, or the active
/// ones in rows of `expert_width`. See [`Plan::saved_len`].
#[derive(Clone, Copy)]
struct Layout<'a>(&'a Plan<'a>);

impl Layout<'_> {
    /// Returns the start of the neurons of an active pair.
    #[inline(always)]
    fn row(self, pair: usize) -> usize {
        let Plan { dims, .. } = *self.0;
        let width = dims.expert_width();
        if dims.all_pairs {
            self.0.token(pair) * dims.intermediate + self.0.expert(pair) * width
        } else {
            pair * width
        }
    }
}

/// Sets y like [`ForwardPacked`](super::ForwardPacked), over row-major weights, and keeps the values that [`Backward`] needs.
#[derive(Debug)]
pub struct ForwardTrain<'a> {
    /// `[tokens, hidden]`, set.
    pub y: &'a mut [f32],
    /// Set; the backward reads it.
    pub saved: &'a mut Saved,
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a Weights<'a>,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space and precision.
    pub scratch: &'a mut Scratch,
}

/// Sets dx and dcoefficients, adds to the weights' gradients. x, weights, pairs and dims are those of the forward.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[tokens, hidden]`, set.
    pub dx: &'a mut [f32],
    /// `[tokens, num_routed]`, set to `<dy_t, o_i(x_t)>`, of inactive pairs only when [`Dims::all_pairs`] (else 0).
    /// None of a dense FFN, which has no coefficients.
    pub dcoefficients: Option<&'a mut [f32]>,
    /// Added to.
    pub grads: WeightGrads<'a>,
    /// `[tokens, hidden]`
    pub dy: &'a [f32],
    /// Set by [`ForwardTrain`].
    pub saved: &'a Saved,
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a Weights<'a>,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space and precision.
    pub scratch: &'a mut Scratch,
}

run_on_current_tier!(ForwardTrain, Backward);

impl ForwardTrain<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(self, isa: Isa) {
        let ForwardTrain { y, saved, x, weights, pairs, dims, scratch } = self;
        check("ForwardTrain", y, x, weights, dims);
        check_pairs("ForwardTrain", pairs, dims);
        if is_empty(dims) {
            y.fill(0.0);
        } else {
            let plan = Plan { pairs, dims, isa, precision: scratch.precision, accumulate: false };
            let len = saved_len(&plan);
            saved.a.resize(len);
            saved.b.resize(len);
            let mut start = 0;
            for (plan, neurons) in plan.parts() {
                let values = start..start + plan.saved_len();
                start = values.end;
                let saved = [&mut saved.a[values.clone()], &mut saved.b[values]];
                forward(y, saved, x, &weights.of(neurons, dims.hidden), &plan, &mut scratch.stored);
            }
        }
        let down = weights.biases.map(|biases| biases.down);
        add_bias("expert_ffn::ForwardTrain", isa, y, down, dims.hidden);
    }
}

impl Backward<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`.
    pub fn run_on(mut self, isa: Isa) {
        let (dims, pairs) = (self.dims, self.pairs);
        check("Backward", self.dx, self.x, self.weights, dims);
        check("Backward", self.dx, self.dy, self.weights, dims);
        check_pairs("Backward", pairs, dims);
        check_grads("Backward", &self.grads, self.weights, dims);
        if let Some(dcoefficients) = &self.dcoefficients {
            assert!(
                dcoefficients.len() == dims.tokens * dims.num_routed(),
                "expert_ffn::Backward: {} coefficient gradients for {dims:?}",
                dcoefficients.len()
            );
        }
        if let Some(biases) = &mut self.grads.biases {
            add_rows(isa, biases.down, self.dy, dims.hidden);
        }
        if is_empty(dims) {
            self.dx.fill(0.0);
            if let Some(dcoefficients) = &mut self.dcoefficients {
                dcoefficients.fill(0.0);
            }
            return;
        }
        let plan = Plan { pairs, dims, isa, precision: self.scratch.precision, accumulate: false };
        let Backward { dx, mut dcoefficients, mut grads, dy, saved, x, weights, scratch, .. } = self;
        let len = saved_len(&plan);
        assert!(
            saved.a.len() == len && saved.b.len() == len,
            "expert_ffn::Backward: saved a {}, b {} values for {dims:?}, which has {len}",
            saved.a.len(),
            saved.b.len(),
        );
        let mut start = 0;
        for (plan, neurons) in plan.parts() {
            let values = start..start + plan.saved_len();
            start = values.end;
            let routed = matches!(plan.pairs, Pairs::Routed(_));
            let part = BackwardPart {
                dcoefficients: dcoefficients.as_deref_mut().filter(|_| routed),
                grads: grads.of(neurons.clone(), dims.hidden),
                dy,
                saved: [&saved.a[values.clone()], &saved.b[values]],
                x,
                weights: weights.of(neurons, dims.hidden),
            };
            backward(dx, part, scratch, &plan);
        }
    }
}

/// Counts the values of a and of b that the forward keeps.
fn saved_len(plan: &Plan<'_>) -> usize {
    plan.parts().map(|(plan, _)| plan.saved_len()).sum()
}

/// Sets y, or adds to it, and sets `saved`, a and b; see [`ForwardTrain`].
fn forward(
    y: &mut [f32],
    saved: [&mut [f32]; 2],
    x: &[f32],
    weights: &Weights<'_>,
    plan: &Plan<'_>,
    stored: &mut Stored,
) {
    let layout = Layout(plan);
    let [a, b] = saved;
    project(a, x, weights.gate, plan);
    project(b, x, weights.up, plan);
    if let Some(biases) = weights.biases {
        add_biases(a, biases.gate, plan);
        add_biases(b, biases.up, plan);
    }
    with_unit!(plan.dims.activation, unit => {
        let neurons = Gated {
            a,
            b,
            row: |pair| layout.row(pair),
            coefficient: |pair| plan.coefficient(pair),
            width: plan.dims.expert_width(),
            unit,
        };
        combine::row_major(y, [&neurons], [weights.down], plan, stored);
    });
}

/// Adds the bias of the neurons to the products of every pair, or of the active ones.
pub(super) fn add_biases(out: &mut [f32], bias: &[f32], plan: &Plan<'_>) {
    let width = plan.dims.expert_width();
    if plan.dims.all_pairs {
        add_bias("expert_ffn::ForwardTrain", plan.isa, out, Some(bias), plan.dims.intermediate);
        return;
    }
    for (expert, bias) in bias.chunks_exact(width).enumerate() {
        let pairs = plan.pairs_of(expert);
        let out = &mut out[pairs.start * width..pairs.end * width];
        add_bias("expert_ffn::ForwardTrain", plan.isa, out, Some(bias), width);
    }
}

/// Adds the sum of the rows of `dy`, `outputs` values each, to `db`.
fn add_rows(isa: Isa, db: &mut [f32], dy: &[f32], outputs: usize) {
    let rows = dy.len() / outputs.max(1);
    let dims = linear::Dims { rows, inputs: 0, outputs, precision: Precision::F32 };
    linear::BackwardBias { db, dy, dims }.run_on(isa);
}

/// The operands of [`Backward`] over the experts of a plan.
struct BackwardPart<'a> {
    dcoefficients: Option<&'a mut [f32]>,
    grads: WeightGrads<'a>,
    dy: &'a [f32],
    /// a and b.
    saved: [&'a [f32]; 2],
    x: &'a [f32],
    weights: Weights<'a>,
}

/// Sets dx, or adds to it, and sets dcoefficients, where asked for; adds to the weights' gradients. See [`Backward`].
fn backward(dx: &mut [f32], part: BackwardPart<'_>, scratch: &mut Scratch, plan: &Plan<'_>) {
    let BackwardPart { dcoefficients, grads, dy, saved: [a, b], x, weights } = part;
    let layout = Layout(plan);
    let width = plan.dims.expert_width();
    let Scratch { g, da, db, scaled, dpairs, stored, outer, .. } = scratch;
    g.resize(plan.saved_len());
    project(g, dy, weights.down, plan);
    for buf in [&mut *da, db, scaled] {
        buf.resize(plan.num_pairs() * width);
    }
    dpairs.resize(plan.num_pairs());
    let rows = (BLOCK / width).max(1);
    let chunks = da
        .par_chunks_mut(rows * width)
        .zip(db.par_chunks_mut(rows * width))
        .zip(scaled.par_chunks_mut(rows * width))
        .zip(dpairs.par_chunks_mut(rows));
    each_when(plan.num_pairs() > rows, chunks.enumerate(), |(i, (((da, db), scaled), dpairs))| {
        let rows_of =
            da.chunks_exact_mut(width).zip(db.chunks_exact_mut(width)).zip(scaled.chunks_exact_mut(width));
        for ((((da, db), scaled), dpair), pair) in rows_of.zip(dpairs).zip(i * rows..) {
            let row = layout.row(pair)..layout.row(pair) + width;
            let (a, b, g) = (&a[row.clone()], &b[row.clone()], &g[row]);
            let coefficient = plan.coefficient(pair);
            *dpair = with_unit!(plan.dims.activation, unit => {
                plan.isa.run(GateBackward { da, db, scaled, a, b, g, coefficient, unit })
            });
        }
    });
    if let Some(dcoefficients) = dcoefficients {
        coefficient_gradients(dcoefficients, dpairs, [a, b, g], plan);
    }
    // g is no longer read, and the memory of the sum over experts not yet written.
    let neurons = [g, &mut stored.neurons];
    weight_gradients(grads, [da, db, scaled], [x, dy], plan, (outer, neurons));
    let terms = [&Plain { values: da, width }, &Plain { values: db, width }];
    combine::row_major(dx, terms, [weights.gate, weights.up], plan, stored);
}

/// Sets `out` to `x W^T` of every pair, or of the active ones.
pub(super) fn project(out: &mut [f32], x: &[f32], w: &[f32], plan: &Plan<'_>) {
    let Plan { isa, precision, .. } = *plan;
    let Dims { tokens, hidden, intermediate, all_pairs, num_experts, .. } = plan.dims;
    let width = plan.dims.expert_width();
    let x = Mat::new(x, tokens, hidden);
    if all_pairs {
        let b = Source::rows(Mat::new(w, intermediate, hidden));
        let a = Source::rows(x);
        Operands { a, b, m: tokens, n: intermediate, k: hidden, precision }.multiply(isa, out, false, true);
        return;
    }
    let multiply = |(expert, out): (usize, &mut [f32]), parallel: bool| {
        let pairs = plan.pairs_of(expert);
        let w = &w[expert * width * hidden..(expert + 1) * width * hidden];
        let m = pairs.len();
        let a = Source::picked_rows(x, plan.tokens(pairs));
        let b = Source::rows(Mat::new(w, width, hidden));
        Operands { a, b, m, n: width, k: hidden, precision }.multiply(isa, out, false, parallel);
    };
    let (mut parts, mut rest) = (Vec::with_capacity(num_experts), out);
    for expert in 0..num_experts {
        let (part, after) = rest.split_at_mut(plan.pairs_of(expert).len() * width);
        parts.push((expert, part));
        rest = after;
    }
    if alike(plan) {
        parts.into_par_iter().with_max_len(1).for_each(|part| multiply(part, false));
    } else {
        parts.into_iter().for_each(|part| multiply(part, true));
    }
}

/// Tells whether the experts are of about one size, so that they keep the threads busy by themselves.
fn alike(plan: &Plan<'_>) -> bool {
    let largest = (0..plan.dims.num_experts).map(|i| plan.pairs_of(i).len()).max().unwrap_or(0);
    largest * 2 * rayon::current_num_threads() <= 3 * plan.num_pairs()
}

/// Sets `dcoefficients[t, i]` to `sum over j of act(a) * b * g`: of all pairs, or to `dpairs` of active pairs and 0 of the
/// others.
fn coefficient_gradients(dcoefficients: &mut [f32], dpairs: &[f32], [a, b, g]: [&[f32]; 3], plan: &Plan<'_>) {
    let Dims { intermediate, num_experts, all_pairs, activation, .. } = plan.dims;
    let width = plan.dims.expert_width();
    let rows = (BLOCK / intermediate).max(1);
    let chunks = dcoefficients.par_chunks_mut(rows * num_experts).enumerate();
    each_when(chunks.len() > 1, chunks, |(i, chunk)| {
        if all_pairs {
            let start = i * rows * intermediate;
            let values = start..start + chunk.len() * width;
            let (a, b, g) = (&a[values.clone()], &b[values.clone()], &g[values]);
            with_unit!(activation, unit => plan.isa.run(GatedDots { dots: chunk, a, b, g, width, unit }));
            return;
        }
        chunk.fill(0.0);
        for (t, row) in (i * rows..).zip(chunk.chunks_exact_mut(num_experts)) {
            for slot in plan.slots(t) {
                row[plan.expert(slot)] = dpairs[slot];
            }
        }
    });
}

/// Adds `da^T x`, `db^T x` and `scaled^T dy` of every expert's pairs to its rows of the gradients.
fn weight_gradients(
    grads: WeightGrads<'_>,
    lefts: [&[f32]; 3],
    [x, dy]: [&[f32]; 2],
    plan: &Plan<'_>,
    (memory, of_neurons): (&mut outer::Words, [&mut Buf; 2]),
) {
    let Plan { dims: Dims { tokens, hidden, .. }, isa, precision, .. } = *plan;
    let width = plan.dims.expert_width();
    let WeightGrads { gate, up, down, biases } = grads;
    let [da, db, scaled] = lefts;
    if let Some(BiasGrads { gate, up, .. }) = biases {
        for (dbias, left) in [(gate, da), (up, db)] {
            for (expert, dbias) in dbias.chunks_exact_mut(width).enumerate() {
                let pairs = plan.pairs_of(expert);
                add_rows(isa, dbias, &left[pairs.start * width..pairs.end * width], width);
            }
        }
    }
    if let Pairs::Routed(_) = plan.pairs {
        outer::Gradients { grads: [gate, up, down], neurons: lefts, x, dy }.add(plan, memory, of_neurons);
        return;
    }
    for (dw, left, right) in [(gate, da, x), (up, db, x), (down, scaled, dy)] {
        let a = Source::rows(Mat::new(left, tokens, width).t());
        let b = Source::rows(Mat::new(right, tokens, hidden).t());
        Operands { a, b, m: width, n: hidden, k: tokens, precision }.multiply(isa, dw, true, true);
    }
}
