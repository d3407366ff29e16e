//! Forward for a few tokens: bound by reading weights, so every active expert's rows are read once, in order.

use rayon::prelude::*;

use super::grouped::gather;
use super::kernel::{FewDots, FewSums, GateInPlace};
use super::plan::{Pairs, Plan};
use super::{Dims, Scratch, Weights};

/// Up to this many tokens the weights are streamed.
pub(super) const FEW_TOKENS: usize = 8;

/// Weights read by one task.
const TASK_WEIGHTS: usize = 1 << 18;
/// Products of this many neurons times inputs are not worth a second thread.
const SERIAL_WORK: usize = 1 << 16;
/// Columns of y that one task sums.
const COLUMNS: usize = 256;

/// Sets y; see [`super::forward`]. Every task, a block of neurons of one expert, sums its share of y for the
/// expert's tokens; then the shares are added in ascending order of the neurons.
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &Weights<'_>,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let Dims { tokens, hidden, .. } = dims;
    let plan = Plan::with_block(pairs, dims, (TASK_WEIGHTS / (3 * hidden)).max(16));
    let isa = scratch.isa;
    let xs = gather(&mut scratch.xs, x, &plan);
    let neurons = plan.task(0).neurons.len();
    // A task's share of y, its a and its b.
    let share = (tokens * (hidden + 2 * neurons)).next_multiple_of(16);
    scratch.partial.resize(plan.tasks() * share);
    let compute = |(number, chunk): (usize, &mut [f32])| {
        let task = plan.task(number);
        let (rows, neurons) = (task.pairs.len(), task.neurons.len());
        if rows == 0 {
            return;
        }
        let (out, rest) = chunk.split_at_mut(rows * hidden);
        let (a, rest) = rest.split_at_mut(rows * neurons);
        let b = &mut rest[..rows * neurons];
        let x = &xs[task.pairs.start * hidden..task.pairs.end * hidden];
        isa.run(FewDots { out: a, x, w: task.weights(weights.gate, hidden), inputs: hidden });
        isa.run(FewDots { out: b, x, w: task.weights(weights.up, hidden), inputs: hidden });
        isa.run(GateInPlace { a, b, neurons, coefficient: |r| plan.coefficient(task.pairs.start + r) });
        out.fill(0.0);
        let w = task.weights(weights.down, hidden);
        isa.run(FewSums { out, h: a, w, columns: hidden, stride: hidden, neurons });
    };
    let serial = plan.num_pairs() * dims.expert_width() * hidden < SERIAL_WORK;
    if serial {
        scratch.partial.chunks_exact_mut(share).enumerate().for_each(compute);
    } else {
        scratch.partial.par_chunks_exact_mut(share).enumerate().for_each(compute);
    }

    let shares = &scratch.partial;
    let sum = |t: usize, (block, y): (usize, &mut [f32])| {
        y.fill(0.0);
        for pair in plan.slots(t) {
            let expert = plan.expert(pair);
            let row = (pair - plan.offset(expert)) * hidden + block * COLUMNS;
            for task in plan.tasks_of(expert) {
                let share = &shares[task * share + row..][..y.len()];
                y.iter_mut().zip(share).for_each(|(y, share)| *y += share);
            }
        }
    };
    for (t, y) in y.chunks_exact_mut(hidden).enumerate() {
        if serial {
            y.chunks_mut(COLUMNS).enumerate().for_each(|block| sum(t, block));
        } else {
            y.par_chunks_mut(COLUMNS).enumerate().for_each(|block| sum(t, block));
        }
    }
}
