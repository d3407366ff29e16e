//! The forward over packed weights of an FFN in experts: the core and the experts that a router has opened.
//!
//! The work is one list of panels: 16 neurons of an expert with the tokens that run it. Rows of x are not copied expert by
//! expert. They are stored once in the words that products read, and a product reads the rows that it needs where they lie.
//! It computes `c = coefficient * act(a) * b` for every panel of the list. What the experts make of c is added by strips. A
//! token's sums have one order for any number of tokens, so that a text decodes alike alone and beside others.

use std::marker::PhantomData;
use std::ops::Range;

use super::dims::Dims;
use super::kernel::gated;
use super::packed::{NEURONS, PackedExperts, PackedWeights};
use super::plan::Plan;
use super::scratch::{Stored, recycled};
use super::strips::{Run, Sum, list};
use crate::buf::{Buf, SharedRows, with_spare};
use crate::isa::Isa;
use crate::matmul::picked::{Products, Step, most_rows, row_words, with_rows, with_step};
use crate::matmul::{PANEL, Precision, for_tasks, tasks_for, tiles};
use crate::simd::{Product, ProductKernel, SQUARE};
use crate::swiglu::Activation;
use crate::swiglu::activation::{Unit, with_unit};

/// Most tokens of a block: the rows of x that all experts read.
const BLOCK: usize = 512;

/// The memory of a forward.
#[derive(Debug, Default)]
pub(super) struct Words {
    pub(super) x: Buf,
    pub(super) c: Buf,
    pub(super) panels: Vec<Panel<'static>>,
    pub(super) cut: Vec<Range<usize>>,
}

impl Words {
    /// Makes room for a forward of `tokens` tokens that open all experts.
    pub(super) fn reserve(&mut self, weights: &PackedWeights, tokens: usize, isa: Isa) {
        let dims = weights.dims();
        let groups_of_core = dims.core_neurons().div_ceil(NEURONS);
        let groups = groups_of_core + dims.num_routed() * dims.expert_width().div_ceil(NEURONS);
        self.c.resize(tokens.min(BLOCK) * groups * row_words(isa, weights.precision(), NEURONS));
    }
}

/// Sets y to the sum of the core and of the open experts; see [`ForwardPacked`](super::ForwardPacked).
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    plan: &Plan<'_>,
    words: &mut Words,
    stored: &mut Stored,
) {
    let Plan { dims: Dims { tokens, hidden, .. }, isa, precision, .. } = *plan;
    let Words { x: words_of_x, c, panels: list_of_panels, cut } = words;
    let mut runs = recycled(std::mem::take(&mut stored.runs));
    let x = Rows::new(words_of_x, x, plan);
    let group = row_words(isa, precision, NEURONS);
    for start in (0..tokens).step_by(BLOCK) {
        let block = start..tokens.min(start + BLOCK);
        let rows = list(&mut runs, plan, 1, &block);
        let panels = Panel::list(list_of_panels, &runs, weights, plan);
        c.resize(rows * group);
        let shared = SharedRows::new(c, group);
        set_cut(cut, &panels, tasks_for(2 * rows * NEURONS * hidden));
        for_tasks(cut.len(), |task| {
            let panels = &panels[cut[task].clone()];
            let rows = panels.iter().map(|panel| panel.run.len()).max().unwrap_or(0);
            with_spare(rows * PANEL, |sums| {
                let op = GateUp { x, panels, c: shared, precision, activation: plan.dims.activation };
                isa.run_product((op, sums.as_chunks_mut().0));
            });
        });
        let y = SharedRows::new(y, hidden);
        let down = |run: &Run<'_>| weights.parts()[run.part].down_words(run.expert);
        Sum { y, columns: hidden, block, runs: &runs, neurons: c, weights: down, stored: precision }
            .run(plan, &mut stored.rows);
        *list_of_panels = recycled(panels);
    }
    stored.runs = recycled(runs);
}

/// Rows of x in words.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    words: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Stores the rows of x, rounded. Rows are an odd number of cache lines apart, so that they do not share places of the
    /// cache.
    fn new(words: &'a mut Buf, x: &[f32], plan: &Plan<'_>) -> Rows<'a> {
        let Plan { dims: Dims { tokens, hidden, .. }, isa, precision, .. } = *plan;
        let len = row_words(isa, precision, hidden);
        let stride = (len.div_ceil(SQUARE) | 1) * SQUARE;
        words.resize(tokens * stride);
        let tasks = tasks_for(tokens * hidden).min(tokens);
        let rows = SharedRows::new(words, stride);
        for_tasks(tasks, |task| {
            let tokens = task * tokens / tasks..(task + 1) * tokens / tasks;
            isa.run_product(SetRows { rows, len, x, hidden, tokens, precision });
        });
        Rows { words, stride }
    }

    #[inline(always)]
    fn row(self, token: usize, words: &Range<usize>) -> &'a [f32] {
        &self.words[token * self.stride..][words.clone()]
    }
}

struct SetRows<'a> {
    rows: SharedRows<'a>,
    len: usize,
    x: &'a [f32],
    hidden: usize,
    tokens: Range<usize>,
    precision: Precision,
}

impl ProductKernel for SetRows<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        with_step!(self.precision, S, M => self.set::<S, M>(s));
    }
}

impl SetRows<'_> {
    #[inline(always)]
    fn set<S: Product, M: Step>(self, s: S) {
        let SetRows { rows, len, x, hidden, tokens, .. } = self;
        let words = S::LANES * M::WORDS / M::DEPTH;
        for token in tokens {
            // SAFETY: tasks have different tokens.
            let row = unsafe { rows.row(token, 0, len) };
            let x = &x[token * hidden..][..hidden];
            for (out, x) in row.chunks_mut(words).zip(x.chunks(S::LANES)) {
                M::store(s, out, s.load_tail(x));
            }
        }
    }
}

/// A panel of an open expert.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel<'a> {
    pub(super) run: &'a Run<'a>,
    experts: &'a PackedExperts,
    panel: usize,
}

impl<'a> Panel<'a> {
    /// Lists the panels of some runs, in the memory of another list.
    fn list(
        memory: &mut Vec<Panel<'static>>,
        runs: &'a [Run<'a>],
        weights: &'a PackedWeights,
        plan: &Plan<'_>,
    ) -> Vec<Panel<'a>> {
        let mut panels = recycled(std::mem::take(memory));
        panels.reserve(plan.dims.num_experts * plan.dims.expert_width().div_ceil(NEURONS));
        panels.extend(runs.iter().flat_map(|run| {
            let experts = &weights.parts()[run.part];
            (0..run.groups).map(move |panel| Panel { run, experts, panel })
        }));
        panels
    }

    /// Returns the gate and up weights.
    fn words(self) -> &'a [f32] {
        let (words, len) = self.experts.gate_up_words(self.run.expert);
        &words[self.panel * len..][..len]
    }

    /// Returns the biases of the columns.
    fn biases(self) -> Option<&'a [f32]> {
        let biases = self.experts.gate_up_biases(self.run.expert)?;
        Some(&biases[self.panel * PANEL..][..PANEL])
    }

    /// Returns the panel's first row of neurons.
    fn first(self) -> usize {
        self.run.first + self.panel * self.run.len()
    }
}

/// Sets `cut` to about `tasks` ranges of the panels with about as many pairs each.
fn set_cut(cut: &mut Vec<Range<usize>>, panels: &[Panel<'_>], tasks: usize) {
    let total: usize = panels.iter().map(|panel| panel.run.len()).sum();
    cut.clear();
    cut.reserve(tasks);
    let (mut start, mut pairs) = (0, 0);
    for (i, panel) in panels.iter().enumerate() {
        pairs += panel.run.len();
        if pairs * tasks >= total * (cut.len() + 1) {
            cut.push(start..i + 1);
            start = i + 1;
        }
    }
}

/// Sets the activations of some panels.
#[derive(Clone, Copy)]
pub(super) struct GateUp<'a> {
    pub(super) x: Rows<'a>,
    pub(super) panels: &'a [Panel<'a>],
    pub(super) c: SharedRows<'a>,
    pub(super) precision: Precision,
    pub(super) activation: Activation,
}

/// The op and memory for the products of a panel.
impl ProductKernel for (GateUp<'_>, &mut [[f32; PANEL]]) {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let (op, sums) = self;
        with_step!(op.precision, S, M => op.set::<S, M>(s, sums));
    }
}

impl GateUp<'_> {
    #[inline(always)]
    fn set<S: Product, M: Step>(&self, s: S, sums: &mut [[f32; PANEL]]) {
        for (i, &panel) in self.panels.iter().enumerate() {
            let next = self.panels.get(i + 1).map_or(&[][..], |next| next.words());
            self.set_panel::<S, M>(s, panel, sums, next);
        }
    }

    /// Sets the activations of one panel; `next` is read afterwards.
    #[inline(always)]
    fn set_panel<S: Product, M: Step>(
        &self,
        s: S,
        panel: Panel<'_>,
        sums: &mut [[f32; PANEL]],
        next: &[f32],
    ) {
        let sums = &mut sums[..panel.run.len()];
        sums.as_flattened_mut().fill(0.0);
        self.multiply::<S, M>(s, panel, sums, next);
        with_unit!(self.activation, unit => self.activate::<S, M, _>(s, unit, panel, sums));
    }

    /// Adds the products of the panel's rows to `sums`.
    #[inline(always)]
    fn multiply<S: Product, M: Step>(&self, s: S, panel: Panel<'_>, sums: &mut [[f32; PANEL]], next: &[f32]) {
        let words = panel.words();
        let steps = words.len() / PANEL;
        // Parts of about one depth, which stay in the first-level cache for all rows. They may be deeper than those of packed
        // rows: every part adds to the sums.
        let part = steps.div_ceil(steps.div_ceil(S::DEPTH + S::DEPTH / 8));
        for start in (0..steps).step_by(part) {
            let end = steps.min(start + part);
            let of_row = start * M::WORDS..end * M::WORDS;
            let b = &words[start * PANEL..end * PANEL];
            let mut next = if end < steps { &words[end * PANEL..] } else { next };
            for tile in tiles(sums.len(), most_rows::<S>()) {
                let first = tile.start;
                with_rows!(tile.len(), S, R => {
                    let a: [&[f32]; R] = std::array::from_fn(|r| self.x.row(panel.run.token(first + r), &of_row));
                    let sums = &mut sums[tile];
                    s.isolated(Products::<M, R> { a, b, sums, next, step: PhantomData });
                });
                // The first tile has asked for what comes next.
                next = &[];
            }
        }
    }

    /// Sets the panel's activations.
    #[inline(always)]
    fn activate<S: Product, M: Step, A: Unit>(&self, s: S, unit: A, panel: Panel<'_>, sums: &[[f32; PANEL]]) {
        let words = M::GROUP_WORDS;
        let words_of_lanes = S::LANES / M::DEPTH * M::WORDS;
        let biases = panel.biases();
        for (row, sums) in sums.iter().enumerate() {
            let coefficient = s.splat(panel.run.coefficient(row));
            // SAFETY: tasks have different panels.
            let out = unsafe { self.c.row(panel.first() + row, 0, words) };
            for (out, i) in out.chunks_exact_mut(words_of_lanes).zip((0..NEURONS).step_by(S::LANES)) {
                let (mut a, mut b) = (s.load(&sums[i..]), s.load(&sums[NEURONS + i..]));
                if let Some(biases) = biases {
                    (a, b) = (s.add(a, s.load(&biases[i..])), s.add(b, s.load(&biases[NEURONS + i..])));
                }
                M::store(s, out, gated(s, unit, [a, b, coefficient]));
            }
        }
    }
}
