//! Many tokens: each expert's tokens are gathered and go through matrix products together.

use rayon::prelude::*;

use super::kernel::{FewDots, FewSums, GateBackward, GateInPlace, GatedDot};
use super::plan::{Layout, Pairs, Plan, for_parts};
use super::{Dims, Saved, Scratch, WeightGrads, Weights};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::{Mat, Precision, matmul, matmul_serial};

/// Up to this many tokens of an expert the weights are read in place; more are worth the matrix product's packing.
const FEW_ROWS: usize = 32;

/// Sets y; see [`super::forward`].
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &Weights<'_>,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let plan = Plan::new(pairs, dims);
    let (isa, hidden) = (scratch.isa, dims.hidden);
    let xs = gather(&mut scratch.xs, x, &plan);
    scratch.scaled.resize(Layout::Packed.len(&plan));
    scratch.db.resize(Layout::Packed.len(&plan));
    for_parts(
        0..plan.tasks(),
        &|task| plan.packed_start(task),
        [&mut scratch.scaled, &mut scratch.db],
        &|number, [a, b]| {
            let task = plan.task(number);
            let xs = &xs[task.pairs.start * hidden..task.pairs.end * hidden];
            let neurons = task.neurons.len();
            project(isa, a, xs, task.weights(weights.gate, hidden), hidden);
            project(isa, b, xs, task.weights(weights.up, hidden), hidden);
            isa.run(GateInPlace { a, b, neurons, coefficient: |r| plan.coefficient(task.pairs.start + r) });
        },
    );
    combine(y, [(&scratch.scaled, weights.down)], &plan, isa, &mut scratch.columns, &mut scratch.partial);
}

/// Sets y and `saved`; see [`super::forward_train`].
pub(super) fn forward_train(
    y: &mut [f32],
    saved: &mut Saved,
    x: &[f32],
    weights: &Weights<'_>,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let plan = Plan::new(pairs, dims);
    let (isa, layout) = (scratch.isa, Layout::of(&plan));
    saved.a.resize(layout.len(&plan));
    saved.b.resize(layout.len(&plan));
    project_saved(&mut saved.a, x, weights.gate, &plan, isa, &mut scratch.xs);
    project_saved(&mut saved.b, x, weights.up, &plan, isa, &mut scratch.xs);
    scratch.scaled.resize(Layout::Packed.len(&plan));
    scratch.db.resize(Layout::Packed.len(&plan));
    for_parts(
        0..plan.tasks(),
        &|task| plan.packed_start(task),
        [&mut scratch.scaled, &mut scratch.db],
        &|number, [c, b]| {
            let task = plan.task(number);
            let neurons = task.neurons.len();
            let rows = c.chunks_exact_mut(neurons).zip(b.chunks_exact_mut(neurons));
            for ((c, b), pair) in rows.zip(task.pairs.clone()) {
                let row = layout.row(&plan, number, &task, pair);
                c.copy_from_slice(&saved.a[row.clone()]);
                b.copy_from_slice(&saved.b[row]);
            }
            isa.run(GateInPlace {
                a: c,
                b,
                neurons,
                coefficient: |r| plan.coefficient(task.pairs.start + r),
            });
        },
    );
    combine(y, [(&scratch.scaled, weights.down)], &plan, isa, &mut scratch.columns, &mut scratch.partial);
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
    let plan = Plan::new(pairs, dims);
    let (isa, layout, hidden) = (scratch.isa, Layout::of(&plan), dims.hidden);
    assert!(
        saved.a.len() == layout.len(&plan) && saved.b.len() == saved.a.len(),
        "expert_ffn::backward: saved a {}, b {} values for {dims:?} and {} active pairs",
        saved.a.len(),
        saved.b.len(),
        plan.num_pairs()
    );
    scratch.g.resize(layout.len(&plan));
    project_saved(&mut scratch.g, dy, weights.down, &plan, isa, &mut scratch.dys);
    let g = &scratch.g;
    if let Some(dcoefficients) = dcoefficients {
        coefficient_gradients(dcoefficients, saved, g, &plan, isa);
    }
    for buf in [&mut scratch.scaled, &mut scratch.da, &mut scratch.db] {
        buf.resize(Layout::Packed.len(&plan));
    }
    for_parts(
        0..plan.tasks(),
        &|task| plan.packed_start(task),
        [&mut scratch.da, &mut scratch.db, &mut scratch.scaled],
        &|number, [da, db, scaled]| {
            let task = plan.task(number);
            let n = task.neurons.len();
            let rows = da.chunks_exact_mut(n).zip(db.chunks_exact_mut(n)).zip(scaled.chunks_exact_mut(n));
            for (((da, db), scaled), pair) in rows.zip(task.pairs.clone()) {
                let row = layout.row(&plan, number, &task, pair);
                let (a, b, g) = (&saved.a[row.clone()], &saved.b[row.clone()], &g[row]);
                isa.run(GateBackward { da, db, scaled, a, b, g, coefficient: plan.coefficient(pair) });
            }
        },
    );
    let (da, db, scaled) = (&scratch.da, &scratch.db, &scratch.scaled);
    let xs = gather(&mut scratch.xs, x, &plan);
    let dys = gather(&mut scratch.dys, dy, &plan);
    for_parts(
        0..plan.tasks(),
        &|task| plan.weights_start(task),
        [grads.gate, grads.up, grads.down],
        &|number, [gate, up, down]| {
            let task = plan.task(number);
            let packed = plan.packed_start(number)..plan.packed_start(number + 1);
            for (dw, left, right) in [(gate, da, xs), (up, db, xs), (down, scaled, dys)] {
                let left = Mat::new(&left[packed.clone()], task.pairs.len(), task.neurons.len());
                let right = &right[task.pairs.start * hidden..task.pairs.end * hidden];
                matmul_serial(
                    isa,
                    dw,
                    left.t(),
                    Mat::new(right, task.pairs.len(), hidden),
                    true,
                    Precision::F32,
                );
            }
        },
    );
    let terms = [(&da[..], weights.gate), (&db[..], weights.up)];
    combine(dx, terms, &plan, isa, &mut scratch.columns, &mut scratch.partial);
}

/// The rows of x that the pairs need, in expert-major order: `[num_pairs, hidden]`.
pub(super) fn gather<'a>(buf: &'a mut Buf, x: &'a [f32], plan: &Plan<'_>) -> &'a [f32] {
    if let Pairs::Dense = plan.pairs {
        return x;
    }
    let hidden = plan.dims.hidden;
    buf.resize(plan.num_pairs() * hidden);
    let copy =
        |(pair, row): (usize, &mut [f32])| row.copy_from_slice(&x[plan.token(pair) * hidden..][..hidden]);
    if plan.num_pairs() <= FEW_ROWS {
        buf.chunks_exact_mut(hidden).enumerate().for_each(copy);
    } else {
        buf.par_chunks_exact_mut(hidden).enumerate().with_min_len(16).for_each(copy);
    }
    buf
}

/// `x W^T` in the layout that the backward reads: of every pair, or of the active ones.
fn project_saved(out: &mut [f32], x: &[f32], w: &[f32], plan: &Plan<'_>, isa: Isa, rows: &mut Buf) {
    let Dims { tokens, hidden, intermediate, all_pairs, .. } = plan.dims;
    if all_pairs {
        matmul(
            out,
            Mat::new(x, tokens, hidden),
            Mat::new(w, intermediate, hidden).t(),
            false,
            Precision::F32,
        );
        return;
    }
    let xs = gather(rows, x, plan);
    for_parts(0..plan.tasks(), &|task| plan.packed_start(task), [out], &|number, [out]| {
        let task = plan.task(number);
        let xs = &xs[task.pairs.start * hidden..task.pairs.end * hidden];
        project(isa, out, xs, task.weights(w, hidden), hidden);
    });
}

/// `out = x w^T` on this thread: x `[rows, hidden]`, w `[neurons, hidden]`.
fn project(isa: Isa, out: &mut [f32], x: &[f32], w: &[f32], hidden: usize) {
    let (rows, neurons) = (x.len() / hidden, w.len() / hidden);
    if rows == 0 {
        return;
    }
    if rows <= FEW_ROWS {
        isa.run(FewDots { out, x, w, inputs: hidden });
    } else {
        matmul_serial(
            isa,
            out,
            Mat::new(x, rows, hidden),
            Mat::new(w, neurons, hidden).t(),
            false,
            Precision::F32,
        );
    }
}

/// `dcoefficients[t, i] = sum over j of silu(a) * b * g`, of every pair or of the active ones (the others 0).
fn coefficient_gradients(dcoefficients: &mut [f32], saved: &Saved, g: &[f32], plan: &Plan<'_>, isa: Isa) {
    let Dims { intermediate, num_experts, all_pairs, .. } = plan.dims;
    let width = plan.dims.expert_width();
    let dot = |row: std::ops::Range<usize>| {
        isa.run(GatedDot { a: &saved.a[row.clone()], b: &saved.b[row.clone()], g: &g[row] })
    };
    dcoefficients.par_chunks_exact_mut(num_experts).enumerate().with_min_len(4).for_each(|(t, row)| {
        if all_pairs {
            for (i, value) in row.iter_mut().enumerate() {
                let start = t * intermediate + i * width;
                *value = dot(start..start + width);
            }
        } else {
            row.fill(0.0);
            for pair in plan.slots(t) {
                let expert = plan.expert(pair);
                row[expert] = plan
                    .tasks_of(expert)
                    .map(|number| dot(Layout::Packed.row(plan, number, &plan.task(number), pair)))
                    .sum();
            }
        }
    });
}

/// Columns of y in one task of [`combine`].
fn column_block(hidden: usize) -> usize {
    hidden.div_ceil(8).next_multiple_of(16).clamp(64, 512).min(hidden)
}

/// Sets `y_t = sum over the pairs of token t, experts ascending, of (sum over terms of h W_i)`, h being packed.
fn combine<const N: usize>(
    y: &mut [f32],
    terms: [(&[f32], &[f32]); N],
    plan: &Plan<'_>,
    isa: Isa,
    columns: &mut Buf,
    partial: &mut Buf,
) {
    let Dims { tokens, hidden, num_experts, .. } = plan.dims;
    let block = column_block(hidden);
    let blocks = hidden.div_ceil(block);
    let largest = plan.largest_expert();
    columns.resize(blocks * tokens * block);
    partial.resize(blocks * largest.max(1) * block);
    let parts = partial.par_chunks_exact_mut(largest.max(1) * block);
    columns.par_chunks_exact_mut(tokens * block).zip(parts).enumerate().for_each(|(k, (y, part))| {
        let first = k * block;
        let width = block.min(hidden - first);
        let y = &mut y[..tokens * width];
        if let Pairs::Dense = plan.pairs {
            expert_product(isa, y, terms, 0, plan, first..first + width);
            return;
        }
        y.fill(0.0);
        for expert in 0..num_experts {
            let pairs = plan.offset(expert)..plan.offset(expert + 1);
            if pairs.is_empty() {
                continue;
            }
            let part = &mut part[..pairs.len() * width];
            expert_product(isa, part, terms, expert, plan, first..first + width);
            for (row, pair) in part.chunks_exact(width).zip(pairs) {
                let y = &mut y[plan.token(pair) * width..][..width];
                y.iter_mut().zip(row).for_each(|(y, value)| *y += value);
            }
        }
    });
    let columns = &columns[..];
    y.par_chunks_exact_mut(hidden).enumerate().with_min_len(16).for_each(|(t, y)| {
        for (k, y) in y.chunks_mut(block).enumerate() {
            let width = y.len();
            y.copy_from_slice(&columns[k * tokens * block + t * width..][..width]);
        }
    });
}

/// Sets `out` to columns `columns` of `sum over terms of h W_i`, one row per pair of `expert`, on this thread.
fn expert_product<const N: usize>(
    isa: Isa,
    out: &mut [f32],
    terms: [(&[f32], &[f32]); N],
    expert: usize,
    plan: &Plan<'_>,
    columns: std::ops::Range<usize>,
) {
    let hidden = plan.dims.hidden;
    let mut accumulate = false;
    for (h, w) in terms {
        for number in plan.tasks_of(expert) {
            let task = plan.task(number);
            let (rows, neurons) = (task.pairs.len(), task.neurons.len());
            let h = &h[plan.packed_start(number)..plan.packed_start(number + 1)];
            let w = &task.weights(w, hidden)[columns.start..];
            if rows <= FEW_ROWS {
                if !accumulate {
                    out.fill(0.0);
                }
                isa.run(FewSums { out, h, w, columns: columns.len(), stride: hidden, neurons });
            } else {
                let w = Mat::with_stride(w, neurons, columns.len(), hidden);
                matmul_serial(isa, out, Mat::new(h, rows, neurons), w, accumulate, Precision::F32);
            }
            accumulate = true;
        }
    }
}
