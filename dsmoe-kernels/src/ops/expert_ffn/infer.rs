//! Forward over packed weights, for any number of tokens.

use super::combine::{self, Blocks};
use super::kernel::{Gate, Tiles};
use super::packed::{NEURONS, PackedWeights, tile_depth};
use super::plan::Plan;
use crate::matmul::{Block, Left, Mat, Precision, Source, for_tasks, tasks_for};

/// Sets y; see [`super::ForwardPacked`].
///
/// First computes `c = coefficient * silu(a) * b` of every active pair, in the tiles that the second product reads: a
/// task is a block of an expert's tokens and some of its neurons. Then runs the combine.
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    plan: &Plan<'_>,
    blocks: &mut Blocks,
) {
    let (tokens, hidden) = (plan.dims.tokens, plan.dims.hidden);
    let depth = tile_depth(plan.dims.expert_width());
    let work = plan.num_pairs() * plan.dims.expert_width() * hidden;
    let rounded = plan.precision == Precision::Bf16;
    let Blocks { tiles, cut } = &mut *blocks;
    tiles.resize(plan.num_pairs() * depth);
    cut.set(plan, depth / NEURONS, hidden, tasks_for(2 * work));
    // SAFETY: the cut's tasks differ in blocks or in panels, which are neurons.
    let out = unsafe { Tiles::new(tiles, depth, plan.precision) };
    for_tasks(cut.len(), |number| {
        let task = cut.task(number, plan);
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
        .run(plan.isa);
    });
    combine::packed(y, weights, plan, depth, blocks);
}
