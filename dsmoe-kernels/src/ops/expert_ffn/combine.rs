//! The combine, which adds the outputs of the experts to the rows of their tokens, experts in ascending order.
//!
//! ```text
//! y_t = sum over the active pairs (t, i), i ascending, of h[t,i] W_i
//! ```
//! In the forward h is `coefficient * act(a) * b` and W the down weights. In the backward there are two terms: da with the
//! gate weights and db with the up weights. h lies in tiles, the order in which the product reads it.

use std::ops::Range;

use rayon::prelude::*;

use super::dims::Dims;
use super::kernel::{FillTiles, Neurons, Tiles, left_tiles};
use super::packed::{PackedExperts, row_columns, tile_depth};
use super::plan::{Cut, Pairs, Plan};
use crate::blocks::each_when;
use crate::buf::Buf;
use crate::matmul::{
    Block, PANEL, PackRight, Panels, RIGHT_LEN, ROUND, Rows, for_tasks, right_len, right_panels, tasks_for,
    with_right,
};

/// The cut of the pairs into blocks of rows, and the activations in the tiles of these blocks.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    pub(super) tiles: Buf,
    pub(super) cut: Cut,
}

/// Sets y from tiles of `depth` values and packed down weights, or adds to it. A task computes some columns of y.
pub(super) fn packed(y: &mut [f32], weights: &PackedExperts, plan: &Plan<'_>, depth: usize, blocks: &Blocks) {
    let Dims { hidden, .. } = plan.dims;
    if !plan.accumulate {
        y.fill(0.0);
    }
    // SAFETY: the tasks below differ in panels, and an expert has no token twice.
    let y = unsafe { Rows::new(y, hidden, true) };
    let panels = hidden.div_ceil(PANEL);
    let tasks = tasks_for(plan.num_pairs() * plan.dims.expert_width() * hidden).min(panels);
    for_tasks(tasks, |task| {
        let range = task * panels / tasks..(task + 1) * panels / tasks;
        Combine { y, depth, blocks, plan }.add(range, |expert| weights.down(expert));
    });
}

/// Sets `y_t = sum over the pairs of token t, experts ascending, of (sum over terms of h W_i)`, or adds that to it. The
/// weights are row-major and packed for the call.
pub(super) fn row_major<A: Neurons, const N: usize>(
    y: &mut [f32],
    terms: [&A; N],
    weights: [&[f32]; N],
    plan: &Plan<'_>,
    blocks: &mut Blocks,
) {
    let Plan { dims: Dims { hidden, num_experts, .. }, isa, precision, .. } = *plan;
    let width = plan.dims.expert_width();
    let term_depth = tile_depth(width);
    let depth = N * term_depth;
    let work = plan.num_pairs() * N * width * hidden;
    let Blocks { tiles, cut } = &mut *blocks;
    tiles.resize(plan.num_pairs() * depth);
    cut.set(plan, 1, hidden, tasks_for(work));
    // SAFETY: the tasks below write different blocks.
    let out = unsafe { Tiles::new(tiles, depth, precision) };
    for_tasks(cut.len(), |number| {
        let pairs = cut.task(number, plan).pairs;
        for (i, neurons) in terms.into_iter().enumerate() {
            isa.run_product(FillTiles { tiles: out, pairs: pairs.clone(), k: i * term_depth, neurons });
        }
    });

    if !plan.accumulate {
        y.fill(0.0);
    }
    // SAFETY: the tasks below differ in panels, and an expert has no token twice.
    let all = unsafe { Rows::new(y, hidden, true) };
    let blocks = &*blocks;
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
            let y = all.starting_at_panel(first);
            for_tasks(tasks, |task| {
                let range = task * count / tasks..(task + 1) * count / tasks;
                Combine { y, depth, blocks, plan }.add(range, |expert| {
                    right_panels(isa, precision, &right[expert * count * len..(expert + 1) * count * len])
                });
            });
        }
    });
}

/// One task of the combine.
struct Combine<'a> {
    y: Rows<'a>,
    depth: usize,
    blocks: &'a Blocks,
    plan: &'a Plan<'a>,
}

impl Combine<'_> {
    /// Adds to the panels `range` of y the products of every expert's tiles with its weights.
    fn add<'w>(&self, range: Range<usize>, weights: impl Fn(usize) -> Panels<'w>) {
        let Combine { y, depth, blocks: Blocks { tiles, cut }, plan } = *self;
        for (expert, pairs) in cut.blocks(plan) {
            let left = left_tiles(plan, tiles, depth, pairs.clone());
            let sink = y.picked(plan.tokens(pairs.clone()));
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
                .run(plan.isa);
            }
        }
    }
}
