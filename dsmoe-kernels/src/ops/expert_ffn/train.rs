//! Forward and backward over row-major weights, which are packed for the call.

use rayon::prelude::*;

use super::kernel::{Activation, FillTiles, GateBackward, Gated, GatedDot, Plain, Tiles, left_tiles};
use super::packed::{row_columns, tile_depth};
use super::plan::{Cut, Pairs, Plan};
use super::{Dims, Saved, Scratch, WeightGrads, Weights};
use crate::blocks::{BLOCK, each_when};
use crate::isa::Isa;
use crate::matmul::{
    Block, Mat, Operands, PANEL, PackRight, Precision, RIGHT_LEN, ROUND, Rows, Source, for_tasks, right_len,
    right_panels, tasks_for, with_right,
};

/// Where the backward finds a pair's activations.
#[derive(Clone, Copy)]
struct Layout<'a>(Plan<'a>);

impl Layout<'_> {
    /// Every pair in rows of `intermediate` values, or the active ones in rows of `expert_width`.
    fn len(self) -> usize {
        let Plan { dims, .. } = self.0;
        if dims.all_pairs {
            dims.tokens * dims.intermediate
        } else {
            self.0.num_pairs() * dims.expert_width()
        }
    }

    /// Where the neurons of an active pair start.
    #[inline(always)]
    fn row(self, pair: usize) -> usize {
        let Plan { dims, .. } = self.0;
        let width = dims.expert_width();
        if dims.all_pairs {
            self.0.token(pair) * dims.intermediate + self.0.expert(pair) * width
        } else {
            pair * width
        }
    }
}

/// Sets y and `saved`; see [`super::forward_train`].
pub(super) fn forward(
    y: &mut [f32],
    saved: &mut Saved,
    x: &[f32],
    weights: &Weights<'_>,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let plan = Plan { pairs, dims };
    let layout = Layout(plan);
    let (isa, precision) = (scratch.isa, scratch.precision);
    saved.a.resize(layout.len());
    saved.b.resize(layout.len());
    project(&mut saved.a, x, weights.gate, &plan, isa, precision);
    project(&mut saved.b, x, weights.up, &plan, isa, precision);
    let activation = Gated {
        a: &saved.a,
        b: &saved.b,
        row: |pair| layout.row(pair),
        coefficient: |pair| plan.coefficient(pair),
        width: dims.expert_width(),
    };
    combine(y, [&activation], [weights.down], &plan, scratch);
}

/// Sets dx and, where asked for, dcoefficients; adds to `grads`. See [`super::backward`].
#[expect(clippy::too_many_arguments, reason = "the arguments of the public op")]
pub(super) fn backward(
    dx: &mut [f32],
    dcoefficients: Option<&mut [f32]>,
    grads: WeightGrads<'_>,
    dy: &[f32],
    saved: &Saved,
    x: &[f32],
    weights: &Weights<'_>,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let plan = Plan { pairs, dims };
    let layout = Layout(plan);
    let (isa, precision, width) = (scratch.isa, scratch.precision, dims.expert_width());
    assert!(
        saved.a.len() == layout.len() && saved.b.len() == saved.a.len(),
        "expert_ffn::backward: saved a {}, b {} values for {dims:?} and {} active pairs",
        saved.a.len(),
        saved.b.len(),
        plan.num_pairs()
    );
    scratch.g.resize(layout.len());
    project(&mut scratch.g, dy, weights.down, &plan, isa, precision);
    for buf in [&mut scratch.da, &mut scratch.db, &mut scratch.scaled] {
        buf.resize(plan.num_pairs() * width);
    }
    scratch.dpairs.resize(plan.num_pairs());
    let Scratch { g, da, db, scaled, dpairs, .. } = scratch;
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
            let (a, b, g) = (&saved.a[row.clone()], &saved.b[row.clone()], &g[row]);
            *dpair = isa.run(GateBackward { da, db, scaled, a, b, g, coefficient: plan.coefficient(pair) });
        }
    });
    if let Some(dcoefficients) = dcoefficients {
        coefficient_gradients(dcoefficients, dpairs, saved, g, &plan, isa);
    }
    weight_gradients(grads, [da, db, scaled], x, dy, &plan, isa, precision);
    let (da, db) = (std::mem::take(&mut scratch.da), std::mem::take(&mut scratch.db));
    let terms = [&Plain { values: &da, width }, &Plain { values: &db, width }];
    combine(dx, terms, [weights.gate, weights.up], &plan, scratch);
    (scratch.da, scratch.db) = (da, db);
}

/// Sets `out` to `x W^T` of every pair, or of the active ones.
fn project(out: &mut [f32], x: &[f32], w: &[f32], plan: &Plan<'_>, isa: Isa, precision: Precision) {
    let Dims { tokens, hidden, intermediate, all_pairs, num_experts } = plan.dims;
    let width = plan.dims.expert_width();
    let x = Mat::new(x, tokens, hidden);
    if all_pairs {
        let b = Source::rows(Mat::new(w, intermediate, hidden));
        let a = Source::rows(x);
        Operands { a, b, m: tokens, n: intermediate, k: hidden, precision }.multiply(isa, out, false, true);
        return;
    }
    for expert in 0..num_experts {
        let pairs = plan.pairs_of(expert);
        let w = &w[expert * width * hidden..(expert + 1) * width * hidden];
        let (m, out) = (pairs.len(), &mut out[pairs.start * width..pairs.end * width]);
        let a = Source::picked_rows(x, plan.tokens(pairs));
        let b = Source::rows(Mat::new(w, width, hidden));
        Operands { a, b, m, n: width, k: hidden, precision }.multiply(isa, out, false, true);
    }
}

/// `dcoefficients[t, i]`: of active pairs `dpairs`, of the others `sum over j of silu(a) * b * g` or 0.
fn coefficient_gradients(
    dcoefficients: &mut [f32],
    dpairs: &[f32],
    saved: &Saved,
    g: &[f32],
    plan: &Plan<'_>,
    isa: Isa,
) {
    let Dims { intermediate, num_experts, all_pairs, .. } = plan.dims;
    let width = plan.dims.expert_width();
    let rows = (BLOCK / intermediate).max(1);
    let chunks = dcoefficients.par_chunks_mut(rows * num_experts).enumerate();
    each_when(chunks.len() > 1, chunks, |(i, chunk)| {
        for (t, row) in (i * rows..).zip(chunk.chunks_exact_mut(num_experts)) {
            let mut slots = plan.slots(t).peekable();
            for (expert, value) in row.iter_mut().enumerate() {
                *value = match slots.next_if(|&slot| plan.pairs_of(expert).contains(&slot)) {
                    Some(slot) => dpairs[slot],
                    None if all_pairs => {
                        let row = t * intermediate + expert * width..t * intermediate + (expert + 1) * width;
                        isa.run(GatedDot { a: &saved.a[row.clone()], b: &saved.b[row.clone()], g: &g[row] })
                    }
                    None => 0.0,
                };
            }
        }
    });
}

/// Adds `da^T x`, `db^T x` and `scaled^T dy` of every expert's pairs to its rows of the gradients.
fn weight_gradients(
    grads: WeightGrads<'_>,
    lefts: [&[f32]; 3],
    x: &[f32],
    dy: &[f32],
    plan: &Plan<'_>,
    isa: Isa,
    precision: Precision,
) {
    let Dims { tokens, hidden, num_experts, .. } = plan.dims;
    let width = plan.dims.expert_width();
    let multiply = |expert: usize, dw: &mut [f32], left: &[f32], right: &[f32], parallel: bool| {
        let pairs = plan.pairs_of(expert);
        let left = Mat::new(&left[pairs.start * width..pairs.end * width], pairs.len(), width);
        let a = Source::rows(left.t());
        let k = pairs.len();
        let b = Source::columns_of_picked_rows(Mat::new(right, tokens, hidden), plan.tokens(pairs));
        Operands { a, b, m: width, n: hidden, k, precision }.multiply(isa, dw, true, parallel);
    };
    let WeightGrads { gate, up, down } = grads;
    let [da, db, scaled] = lefts;
    let largest = (0..num_experts).map(|i| plan.pairs_of(i).len()).max().unwrap_or(0);
    // Experts of about one size keep the threads busy by themselves.
    let apart = largest * 2 * rayon::current_num_threads() <= 3 * plan.num_pairs();
    let experts = |dw: &mut [f32], left: &[f32], right: &[f32]| {
        dw.par_chunks_exact_mut(width * hidden).with_max_len(1).enumerate().for_each(|(expert, dw)| {
            multiply(expert, dw, left, right, false);
        });
    };
    if apart {
        rayon::join(
            || experts(gate, da, x),
            || rayon::join(|| experts(up, db, x), || experts(down, scaled, dy)),
        );
        return;
    }
    for (dw, left, right) in [(gate, da, x), (up, db, x), (down, scaled, dy)] {
        for (expert, dw) in dw.chunks_exact_mut(width * hidden).enumerate() {
            multiply(expert, dw, left, right, true);
        }
    }
}

/// Sets `y_t = sum over the pairs of token t, experts ascending, of (sum over terms of h W_i)`.
fn combine<A: Activation, const N: usize>(
    y: &mut [f32],
    terms: [&A; N],
    weights: [&[f32]; N],
    plan: &Plan<'_>,
    scratch: &mut Scratch,
) {
    let Dims { hidden, num_experts, .. } = plan.dims;
    let width = plan.dims.expert_width();
    let term_depth = tile_depth(width);
    let depth = N * term_depth;
    let Scratch { isa, precision, tiles, cut, .. } = scratch;
    let (isa, precision) = (*isa, *precision);
    let work = plan.num_pairs() * N * width * hidden;
    tiles.resize(plan.num_pairs() * depth);
    cut.set(plan, 1, hidden, tasks_for(work));
    // SAFETY: the tasks below write different blocks.
    let out = unsafe { Tiles::new(tiles, depth, precision) };
    for_tasks(cut.len(), |number| {
        let pairs = cut.task(number, plan).pairs;
        for (i, activation) in terms.into_iter().enumerate() {
            isa.run_product(FillTiles { tiles: out, pairs: pairs.clone(), k: i * term_depth, activation });
        }
    });

    y.fill(0.0);
    // SAFETY: y is borrowed mutably; the tasks below differ in panels, and an expert has no token twice.
    let all = unsafe { Rows::new(y, hidden, None, true) };
    let (tiles, cut) = (&tiles[..], &*cut);
    let (panels, len) = (hidden.div_ceil(PANEL), right_len(isa, precision, depth));
    let at_once = (RIGHT_LEN / (num_experts * len)).clamp(1, panels);
    with_right(at_once * num_experts * len, |right| {
        for first in (0..panels).step_by(at_once) {
            let count = at_once.min(panels - first);
            let tasks = tasks_for(work * count / panels).min(count);
            let right = &mut right[..count * num_experts * len];
            let packing = right.par_chunks_exact_mut(len).enumerate();
            each_when(tasks > 1, packing, |(i, out)| {
                let (expert, panel) = (i / count, first + i % count);
                if width != term_depth {
                    out.fill(0.0);
                }
                for (out, w) in out.chunks_exact_mut(len / N).zip(weights) {
                    let parts = [row_columns(w, hidden, panel)];
                    let ks = expert * width..(expert + 1) * width;
                    PackRight { out, parts, ks, precision }.run(isa);
                }
            });
            let right = &right[..];
            let sink = all.starting_at_panel(first);
            for_tasks(tasks, |task| {
                let range = task * count / tasks..(task + 1) * count / tasks;
                add_blocks(&sink, tiles, depth, cut, plan, (isa, precision), range, |expert| {
                    right_panels(isa, precision, &right[expert * count * len..(expert + 1) * count * len])
                });
            });
        }
    });
}

/// Adds to the panels `range` of y what the tiles of every expert's pairs give with its weights.
#[expect(clippy::too_many_arguments, reason = "both operands and their cut")]
pub(super) fn add_blocks<'w>(
    all: &Rows<'_>,
    tiles: &[f32],
    depth: usize,
    cut: &Cut,
    plan: &Plan<'_>,
    (isa, precision): (Isa, Precision),
    range: std::ops::Range<usize>,
    weights: impl Fn(usize) -> crate::matmul::Panels<'w>,
) {
    for (expert, pairs) in cut.blocks(plan) {
        let left = left_tiles(isa, precision, tiles, depth, pairs.clone());
        let sink = all.picked(plan.tokens(pairs.clone()));
        // Without a list, rows count as tokens.
        let rows = if let Pairs::Dense = plan.pairs { pairs } else { 0..pairs.len() };
        for start in (0..depth).step_by(ROUND) {
            Block {
                left,
                rows: rows.clone(),
                ks: start..depth.min(start + ROUND),
                panels: weights(expert),
                panel_ks: 0..depth,
                range: range.clone(),
                sink: &sink,
            }
            .run(isa);
        }
    }
}
