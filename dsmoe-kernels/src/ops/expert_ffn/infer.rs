//! Forward over packed weights, for any number of tokens.

use super::kernel::{Gate, Tiles};
use super::packed::{NEURONS, PackedWeights, tile_depth};
use super::plan::{Pairs, Plan};
use super::train::add_blocks;
use super::{Dims, Scratch};
use crate::matmul::{Block, Left, Mat, PANEL, Precision, Rows, Source, for_tasks, tasks_for};

/// Sets y; see [`super::forward`].
///
/// First every active pair's `c = coefficient * silu(a) * b`, kept as the tiles that the second product reads:
/// a task is a block of an expert's tokens and some of its neurons. Then y, a task being some of its columns:
/// the experts add to their tokens' rows in ascending order.
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    pairs: Pairs<'_>,
    dims: Dims,
    scratch: &mut Scratch,
) {
    let Dims { tokens, hidden, .. } = dims;
    let plan = Plan { pairs, dims };
    let depth = tile_depth(dims.expert_width());
    let work = plan.num_pairs() * dims.expert_width() * hidden;
    let rounded = weights.precision() == Precision::Bf16;
    let Scratch { isa, tiles, cut, .. } = scratch;
    let isa = *isa;
    tiles.resize(plan.num_pairs() * depth);
    cut.set(&plan, depth / NEURONS, hidden, tasks_for(2 * work));
    // SAFETY: the cut's tasks differ in blocks or in panels, which are neurons.
    let out = unsafe { Tiles::new(tiles, depth, weights.precision()) };
    for_tasks(cut.len(), |number| {
        let task = cut.task(number, &plan);
        let start = plan.offset(task.expert);
        let listed = plan.tokens(plan.pairs_of(task.expert));
        let rows = task.pairs.start - start..task.pairs.end - start;
        let coefficient = |row| plan.coefficient(start + row);
        Block {
            left: Left::Source(Source::picked_rows(Mat::new(x, tokens, hidden), listed), rounded),
            ks: 0..hidden,
            panels: weights.gate_up(task.expert),
            panel_ks: 0..hidden,
            range: task.panels,
            sink: &Gate { tiles: out, first: task.pairs.start, first_row: rows.start, coefficient },
            rows,
        }
        .run(isa);
    });

    y.fill(0.0);
    // SAFETY: y is borrowed mutably; the tasks below differ in panels, and an expert has no token twice.
    let all = unsafe { Rows::new(y, hidden, None, true) };
    let panels = hidden.div_ceil(PANEL);
    let tasks = tasks_for(work).min(panels);
    for_tasks(tasks, |task| {
        let range = task * panels / tasks..(task + 1) * panels / tasks;
        add_blocks(&all, tiles, depth, cut, &plan, (isa, weights.precision()), range, |expert| {
            weights.down(expert)
        });
    });
}
