//! The forward of a few tokens over packed weights of an FFN in experts.
//!
//! Its time is that of reading the weights. The list of panels is cut into parts, and a task reads all weights of its panels
//! one after the other: gate and up, then down. It adds what the neurons make of x to a sum of its own, and y is the sum of
//! these, in the order of the list. So threads meet once. A part is a fixed range of all panels of the FFN, open or not, so that
//! the sum of a token does not depend on the experts that others open.

use std::marker::PhantomData;
use std::ops::Range;

use super::dims::Dims;
use super::open::{GateUp, Panel, Rows, Words};
use super::packed::{NEURONS, PackedWeights};
use super::plan::Plan;
use super::scratch::{Stored, recycled};
use super::strips::{ROWS, list};
use crate::buf::{SharedRows, with_spare};
use crate::matmul::picked::{AddToStrips, Step, most_rows, row_words, with_rows, with_step};
use crate::matmul::{PANEL, for_tasks, for_tasks_when, tasks_for};
use crate::simd::{Kernel, Product, ProductKernel, Simd};

/// Most tokens.
pub(super) const FEW: usize = 4;
/// Most parts of a list of panels: enough for the threads, and few enough to be summed.
const PARTS: usize = 64;

/// Sets y to the sum of the core and of the open experts; see [`ForwardPacked`](super::ForwardPacked).
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    plan: &Plan<'_>,
    words: &mut Words,
    stored: &mut Stored,
) {
    let Plan { dims: Dims { tokens, hidden, activation, .. }, isa, precision, .. } = *plan;
    let Words { x: words_of_x, c, parts, panels: list_of_panels, cut } = words;
    let mut runs = recycled(std::mem::take(&mut stored.runs));
    let x = Rows::new(words_of_x, x, plan);
    let rows = list(&mut runs, plan, 1, &(0..tokens));
    let panels = Panel::list(list_of_panels, &runs, weights, plan);
    set_cut(cut, &panels, plan);
    let group = row_words(isa, precision, NEURONS);
    c.resize(rows * group);
    let c = SharedRows::new(c, group);
    let part = hidden.div_ceil(PANEL) * tokens * PANEL;
    // Room for all experts: a token that opens more of them than any before it allocates nothing.
    parts.resize(PARTS.min(plan.dims.num_experts * plan.dims.expert_width().div_ceil(NEURONS)) * part);
    let sums = SharedRows::new(parts, part);
    let all = &panels[..];
    let run = |task: usize| {
        let panels = &all[cut[task].clone()];
        // SAFETY: every task has its own part.
        let sum = unsafe { sums.row(task, 0, part) };
        with_spare(tokens * PANEL, |spare| {
            let gate_up = GateUp { x, panels, c, precision, activation };
            let (sum, spare) = (sum.as_chunks_mut().0, spare.as_chunks_mut().0);
            // Most often this thread has the task after this one too.
            let next = all.get(cut[task].end).map_or(&[][..], |next| next.words());
            isa.run_product(Task { gate_up, tokens: 0..tokens, sum, spare, next });
        });
    };
    for_tasks_when(tasks_for(3 * rows * NEURONS * hidden) > 1, cut.len(), run);
    let parts = &parts[..cut.len() * part];
    let ranges = tasks_for(parts.len()).min(hidden.div_ceil(PANEL));
    let y = SharedRows::new(y, hidden);
    for_tasks(ranges, |range| {
        let panels = hidden.div_ceil(PANEL);
        let panels = range * panels / ranges..(range + 1) * panels / ranges;
        isa.run(Add { y, parts, part, tokens, hidden, panels });
    });
    *list_of_panels = recycled(panels);
    stored.runs = recycled(runs);
}

/// Sets `cut` to the ranges of the listed panels that are in one of at most [`PARTS`] ranges of all panels.
fn set_cut(cut: &mut Vec<Range<usize>>, panels: &[Panel<'_>], plan: &Plan<'_>) {
    let of = |dims: Dims| dims.num_experts * dims.expert_width().div_ceil(NEURONS);
    let (mut firsts, mut all) = ([0; 2], 0);
    for ((part, _), first) in plan.parts().zip(&mut firsts) {
        *first = all;
        all += of(part.dims);
    }
    let len = all.div_ceil(PARTS).max(1);
    let part_of = |panel: &Panel<'_>| (firsts[panel.run.part] + panel.place()) / len;
    cut.clear();
    cut.reserve(PARTS);
    let mut start = 0;
    for end in 1..=panels.len() {
        if end == panels.len() || part_of(&panels[end]) != part_of(&panels[end - 1]) {
            cut.push(start..end);
            start = end;
        }
    }
}

/// Sets `sum`, a strip for every panel of columns, to what some panels of neurons add to y.
struct Task<'a, 's> {
    gate_up: GateUp<'a>,
    tokens: Range<usize>,
    sum: &'s mut [[f32; PANEL]],
    spare: &'s mut [[f32; PANEL]],
    /// What is read after the panels.
    next: &'a [f32],
}

impl ProductKernel for Task<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        with_step!(self.gate_up.precision, S, M => self.set::<S, M>(s));
    }
}

impl Task<'_, '_> {
    #[inline(always)]
    fn set<S: Product, M: Step>(self, s: S) {
        let Task { gate_up, tokens, sum, spare, next: last } = self;
        sum.as_flattened_mut().fill(0.0);
        for (i, &panel) in gate_up.panels.iter().enumerate() {
            let (down, run) = (panel.down(), panel.run);
            gate_up.set_panel::<S, M>(s, panel, spare, down.words);
            // SAFETY: the rows are those of this panel, which this task has set and nobody else uses.
            let a: &[f32] =
                unsafe { gate_up.c.values(panel.first() * M::GROUP_WORDS, run.len() * M::GROUP_WORDS) };
            let next = gate_up.panels.get(i + 1).map_or(last, |next| next.words());
            let mut start = 0;
            while start < run.len() {
                let count = most_rows::<S>().min(ROWS).min(run.len() - start);
                with_rows!(count, S, R => s.isolated(AddToStrips::<M, R> {
                    strips: &mut *sum,
                    strip_len: tokens.len(),
                    a,
                    group_rows: run.len(),
                    rows: start..start + count,
                    to: run.places(&tokens),
                    b: down,
                    groups: 0..1,
                    next: if start == 0 { next } else { &[] },
                    step: PhantomData,
                }));
                start += count;
            }
        }
    }
}

/// Sets columns of y to the sum of all parts.
struct Add<'a> {
    y: SharedRows<'a>,
    parts: &'a [f32],
    part: usize,
    tokens: usize,
    hidden: usize,
    panels: Range<usize>,
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Add { y, parts, part, tokens, hidden, panels } = self;
        for (panel, token) in panels.flat_map(|panel| (0..tokens).map(move |token| (panel, token))) {
            let first = panel * PANEL;
            // SAFETY: tasks have different panels.
            let y = unsafe { y.row(token, first, PANEL.min(hidden - first)) };
            for (i, y) in y.chunks_mut(S::LANES).enumerate() {
                let at = (panel * tokens + token) * PANEL + i * S::LANES;
                let mut sum = s.splat(0.0);
                for part in parts.chunks_exact(part) {
                    sum = s.add(sum, s.load(&part[at..]));
                }
                s.store_tail(y, sum);
            }
        }
    }
}
