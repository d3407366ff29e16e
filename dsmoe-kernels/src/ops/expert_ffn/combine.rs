//! The combine, which adds the outputs of the experts to the rows of their tokens, experts in ascending order.
//!
//! ```text
//! y_t = sum over the active pairs (t, i), i ascending, of h[t,i] W_i
//! ```
//! In the forward h is `coefficient * act(a) * b` and W the down weights. In the backward there are two terms: da with the
//! gate weights and db with the up weights. h is stored in the order in which the product reads it: a dense FFN's in tiles,
//! that of experts in words, see [`strips`](super::strips).

use std::ops::Range;

use rayon::prelude::*;

use super::dims::Dims;
use super::kernel::{FillTiles, FillWords, Neurons, Tiles, left_tiles};
use super::packed::{NEURONS, PackedExperts, row_columns, tile_depth};
use super::plan::{Pairs, Plan};
use super::scratch::{Stored, recycled};
use super::strips::{Run, Sum, list};
use crate::blocks::each_when;
use crate::buf::{Buf, SharedRows};
use crate::matmul::picked::{Strided, row_words};
use crate::matmul::{
    Block, Grid, PANEL, PackRight, Panels, RIGHT_LEN, ROUND, Rows, for_tasks, right_len, right_panels,
    storage, tasks_for, with_right,
};

/// Sets y of a dense FFN from tiles of `depth` values, cut by `grid`, and packed down weights. A task computes some columns
/// of y.
pub(super) fn packed(y: &mut [f32], weights: &PackedExperts, plan: &Plan<'_>, grid: Grid, tiles: &[f32]) {
    let Dims { tokens, hidden, intermediate, .. } = plan.dims;
    let depth = tile_depth(intermediate);
    y.fill(0.0);
    // SAFETY: the tasks below differ in panels.
    let y = unsafe { Rows::new(y, hidden, true) };
    let panels = hidden.div_ceil(PANEL);
    let tasks = tasks_for(tokens * intermediate * hidden).min(panels);
    for_tasks(tasks, |task| {
        let range = task * panels / tasks..(task + 1) * panels / tasks;
        Dense { y, depth, tiles, grid, plan }.add(range, weights.down(0));
    });
}

/// Sets `y_t = sum over the pairs of token t, experts ascending, of (sum over terms of h W_i)`, or adds that to it. The
/// weights are row-major and packed for the call.
pub(super) fn row_major<A: Neurons, const N: usize>(
    y: &mut [f32],
    terms: [&A; N],
    weights: [&[f32]; N],
    plan: &Plan<'_>,
    stored: &mut Stored,
) {
    match plan.pairs {
        Pairs::Dense => dense(y, terms, weights, plan, &mut stored.neurons),
        Pairs::Routed(_) => routed(y, terms, weights, plan, stored),
    }
}

fn dense<A: Neurons, const N: usize>(
    y: &mut [f32],
    terms: [&A; N],
    weights: [&[f32]; N],
    plan: &Plan<'_>,
    tiles: &mut Buf,
) {
    let Plan { dims: Dims { tokens, hidden, intermediate, .. }, isa, precision, .. } = *plan;
    let term_depth = tile_depth(intermediate);
    let depth = N * term_depth;
    let work = tokens * N * intermediate * hidden;
    tiles.resize(tokens * depth);
    let grid = Grid::new(tokens, 1, hidden, tasks_for(work));
    // SAFETY: the tasks below write different blocks.
    let out = unsafe { Tiles::new(tiles, depth, precision) };
    for_tasks(grid.len(), |number| {
        let (rows, _) = grid.get(number);
        for (i, neurons) in terms.into_iter().enumerate() {
            isa.run_product(FillTiles { tiles: out, pairs: rows.clone(), k: i * term_depth, neurons });
        }
    });
    if !plan.accumulate {
        y.fill(0.0);
    }
    // SAFETY: the tasks below differ in panels.
    let all = unsafe { Rows::new(y, hidden, true) };
    let tiles = &tiles[..];
    with_packed(weights, plan, |first, count, right, _| {
        let tasks = tasks_for(work * count / hidden.div_ceil(PANEL)).min(count);
        let y = all.starting_at_panel(first);
        for_tasks(tasks, |task| {
            let range = task * count / tasks..(task + 1) * count / tasks;
            Dense { y, depth, tiles, grid, plan }.add(range, right_panels(isa, precision, right));
        });
    });
}

fn routed<A: Neurons, const N: usize>(
    y: &mut [f32],
    terms: [&A; N],
    weights: [&[f32]; N],
    plan: &Plan<'_>,
    memory: &mut Stored,
) {
    let Plan { dims: Dims { tokens, hidden, .. }, isa, precision, .. } = *plan;
    let Stored { neurons: words, runs: list_of_runs, rows: rows_of_strips } = memory;
    let mut runs = recycled(std::mem::take(list_of_runs));
    let rows = list(&mut runs, plan, N, &(0..tokens));
    let group = row_words(isa, storage(isa, precision), NEURONS);
    words.resize(rows * group);
    let out = SharedRows::new(words, group);
    let tasks = tasks_for(rows * NEURONS * hidden).min(runs.len());
    for_tasks(tasks, |task| {
        let runs = &runs[task * runs.len() / tasks..(task + 1) * runs.len() / tasks];
        isa.run_product(FillWords { out, runs, terms, precision });
    });
    let all = SharedRows::new(y, hidden);
    let neurons = &words[..];
    with_packed(weights, plan, |first, count, right, len| {
        let weights = |run: &Run<'_>| {
            let words = &right[run.expert * count * len..(run.expert + 1) * count * len];
            Strided { words, panel: len, group: right_len(isa, precision, NEURONS) }
        };
        let (y, left) = (all.starting_at(first * PANEL), hidden - first * PANEL);
        let (columns, stored) = (left.min(count * PANEL), storage(isa, precision));
        Sum { y, columns, block: 0..tokens, runs: &runs, neurons, weights, stored }.run(plan, rows_of_strips);
    });
    *list_of_runs = recycled(runs);
}

/// Packs the weights of all terms for a number of panels at a time and calls `sum` with the first panel, their number, the
/// panels of every expert, and the values of one.
fn with_packed<const N: usize>(
    weights: [&[f32]; N],
    plan: &Plan<'_>,
    mut sum: impl FnMut(usize, usize, &[f32], usize),
) {
    let Plan { dims: Dims { hidden, num_experts, .. }, isa, precision, .. } = *plan;
    let width = plan.dims.expert_width();
    let term_depth = tile_depth(width);
    let (panels, len) = (hidden.div_ceil(PANEL), right_len(isa, precision, N * term_depth));
    let at_once = (RIGHT_LEN / (num_experts * len)).clamp(1, panels);
    with_right(at_once * num_experts * len, |right| {
        for first in (0..panels).step_by(at_once) {
            let count = at_once.min(panels - first);
            let right = &mut right[..count * num_experts * len];
            let parallel = tasks_for(plan.num_pairs() * N * width * count * PANEL) > 1;
            let packing = right.par_chunks_exact_mut(len).enumerate();
            each_when(parallel, packing, |(i, out)| {
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
            sum(first, count, right, len);
        }
    });
}

/// One task of a dense FFN's combine.
struct Dense<'a> {
    y: Rows<'a>,
    depth: usize,
    tiles: &'a [f32],
    grid: Grid,
    plan: &'a Plan<'a>,
}

impl Dense<'_> {
    /// Adds to the panels `range` of y the products of the tiles with the weights.
    fn add(&self, range: Range<usize>, panels: Panels<'_>) {
        let Dense { y, depth, tiles, grid, plan } = *self;
        for rows in grid.row_blocks() {
            for start in (0..depth).step_by(ROUND) {
                Block {
                    left: left_tiles(plan, tiles, depth, rows.clone()),
                    rows: rows.clone(),
                    ks: start..depth.min(start + ROUND),
                    panels,
                    panel_ks: 0..depth,
                    range: range.clone(),
                    sink: &y,
                }
                .run(plan.isa);
            }
        }
    }
}
