//! The forward over packed weights of an FFN in experts: the core and the experts that a router has opened.
//!
//! The work is one list of panels: 16 neurons of an expert with the tokens that run it. Rows of x are not copied expert by
//! expert. They are stored once in the words that products read, and a product reads the rows that it needs where they lie.
//! The first step computes `c = coefficient * act(a) * b` for every panel of the list. The second computes y by strips: 32
//! columns of a block of tokens, to which every expert adds the rows of its tokens while the strip is in the cache.

use std::marker::PhantomData;
use std::ops::Range;

use super::dims::Dims;
use super::kernel::gated;
use super::packed::{NEURONS, PackedExperts, PackedWeights};
use super::plan::{Pairs, Plan};
use crate::buf::{Buf, SharedRows, with_spare};
use crate::matmul::picked::{AddToStrips, Products, Step, most_rows, row_words, with_rows, with_step};
use crate::matmul::{PANEL, Precision, for_tasks, tasks_for, tiles};
use crate::simd::{Product, ProductKernel, SQUARE};
use crate::swiglu::Activation;
use crate::swiglu::activation::{Unit, with_unit};

/// Most tokens of a block: the rows of x that all experts read.
const BLOCK: usize = 512;
/// Most tokens of a strip, which stays in the first-level cache.
const STRIP: usize = 256;
/// Groups of neurons that are added to a strip at a time: their down weights stay in the first-level cache.
const GROUPS: usize = 16;

/// The memory of a forward.
#[derive(Debug, Default)]
pub(super) struct Words {
    x: Buf,
    c: Buf,
}

/// Sets y to the sum of the core and of the open experts; see [`ForwardPacked`](super::ForwardPacked).
pub(super) fn forward(y: &mut [f32], x: &[f32], weights: &PackedWeights, plan: &Plan<'_>, words: &mut Words) {
    let Plan { dims: Dims { tokens, hidden, .. }, isa, precision, .. } = *plan;
    let Words { x: words_of_x, c } = words;
    let x = Rows::new(words_of_x, x, plan);
    for start in (0..tokens).step_by(BLOCK) {
        let block = start..tokens.min(start + BLOCK);
        let (open, pairs) = list(weights, plan, block.clone());
        let panels: Vec<Panel<'_>> = open.iter().flat_map(Open::panels).collect();
        let neurons = row_words(isa, precision, NEURONS);
        c.resize(pairs * neurons);
        let shared = SharedRows::new(c, neurons);
        let tasks = tasks_for(2 * pairs * NEURONS * hidden);
        let cut = cut(&panels, tasks);
        for_tasks(cut.len(), |task| {
            let panels = &panels[cut[task].clone()];
            let rows = panels.iter().map(|panel| panel.open.rows()).max().unwrap_or(0);
            with_spare(rows * PANEL, |sums| {
                let op = GateUp { x, panels, c: shared, precision, activation: plan.dims.activation };
                isa.run_product((op, sums.as_chunks_mut().0));
            });
        });
        let shared = SharedRows::new(y, hidden);
        let strips = block.len().div_ceil(STRIP);
        let columns = hidden.div_ceil(PANEL);
        let ranges = tasks_for(pairs * NEURONS * hidden).div_ceil(strips).min(columns);
        for_tasks(strips * ranges, |task| {
            let (strip, range) = (task % strips, task / strips);
            let part = |i: usize| block.start + i * block.len() / strips;
            let tokens = part(strip)..part(strip + 1);
            let panels = range * columns / ranges..(range + 1) * columns / ranges;
            // Few tokens take strips of many panels at once, so that the weights of an expert are read in their order.
            let at_once = (STRIP / tokens.len()).clamp(1, panels.len());
            with_spare(at_once * tokens.len() * PANEL, |strips| {
                let op = Combine { y: shared, hidden, tokens, panels, at_once, open: &open, c, precision };
                isa.run_product((op, strips.as_chunks_mut().0));
            });
        });
    }
}

/// Rows of x in words.
#[derive(Clone, Copy)]
struct Rows<'a> {
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

/// An expert with the tokens of a block that run it.
struct Open<'a> {
    experts: &'a PackedExperts,
    expert: usize,
    /// Ascending; none if every token of the block runs it, with coefficient 1.
    routed: Option<(&'a [u32], &'a [f32])>,
    block: Range<usize>,
    /// Pairs of a panel and a token that come before in the list.
    first: usize,
    panels: usize,
}

impl<'a> Open<'a> {
    fn rows(&self) -> usize {
        self.routed.map_or(self.block.len(), |(tokens, _)| tokens.len())
    }

    #[inline(always)]
    fn token(&self, row: usize) -> usize {
        self.routed.map_or(self.block.start + row, |(tokens, _)| tokens[row] as usize)
    }

    #[inline(always)]
    fn coefficient(&self, row: usize) -> f32 {
        self.routed.map_or(1.0, |(_, coefficients)| coefficients[row])
    }

    /// Returns the rows of some tokens of the block.
    fn rows_of(&self, tokens: &Range<usize>) -> Range<usize> {
        match self.routed {
            None => tokens.start - self.block.start..tokens.end - self.block.start,
            Some((list, _)) => {
                let before = |end: usize| list.partition_point(|&token| (token as usize) < end);
                before(tokens.start)..before(tokens.end)
            }
        }
    }

    fn panels(&'a self) -> impl Iterator<Item = Panel<'a>> {
        (0..self.panels).map(move |panel| Panel { open: self, panel })
    }
}

/// A panel of an open expert.
#[derive(Clone, Copy)]
struct Panel<'a> {
    open: &'a Open<'a>,
    panel: usize,
}

impl<'a> Panel<'a> {
    /// Returns the gate and up weights.
    fn words(self) -> &'a [f32] {
        let (words, len) = self.open.experts.gate_up_words(self.open.expert);
        &words[self.panel * len..][..len]
    }

    /// Returns the biases of the columns.
    fn biases(self) -> Option<&'a [f32]> {
        let biases = self.open.experts.gate_up_biases(self.open.expert)?;
        Some(&biases[self.panel * PANEL..][..PANEL])
    }

    /// Returns the place of the panel's first pair.
    fn first(self) -> usize {
        self.open.first + self.panel * self.open.rows()
    }
}

/// Lists the core and the experts with tokens in the block, and counts their pairs of a panel and a token.
fn list<'a>(weights: &'a PackedWeights, plan: &Plan<'a>, block: Range<usize>) -> (Vec<Open<'a>>, usize) {
    let (mut open, mut first) = (Vec::with_capacity(plan.dims.num_experts), 0);
    for ((part, _), experts) in plan.parts().zip(weights.parts()) {
        let panels = part.dims.expert_width().div_ceil(NEURONS);
        for expert in 0..part.dims.num_experts {
            let mut one = Open { experts, expert, routed: None, block: block.clone(), first, panels };
            if let Pairs::Routed(routes) = part.pairs {
                let pairs = part.pairs_of(expert);
                one.routed = Some((&routes.tokens[pairs.clone()], &routes.coefficients[pairs.clone()]));
                let rows = one.rows_of(&block);
                let pairs = pairs.start + rows.start..pairs.start + rows.end;
                one.routed = Some((&routes.tokens[pairs.clone()], &routes.coefficients[pairs]));
            }
            if one.rows() > 0 {
                first += one.rows() * panels;
                open.push(one);
            }
        }
    }
    (open, first)
}

/// Cuts the panels into about `tasks` runs with about as many pairs each.
fn cut(panels: &[Panel<'_>], tasks: usize) -> Vec<Range<usize>> {
    let total: usize = panels.iter().map(|panel| panel.open.rows()).sum();
    let (mut cut, mut start, mut pairs) = (Vec::with_capacity(tasks), 0, 0);
    for (i, panel) in panels.iter().enumerate() {
        pairs += panel.open.rows();
        if pairs * tasks >= total * (cut.len() + 1) {
            cut.push(start..i + 1);
            start = i + 1;
        }
    }
    cut
}

/// Sets the activations of some panels.
struct GateUp<'a> {
    x: Rows<'a>,
    panels: &'a [Panel<'a>],
    c: SharedRows<'a>,
    precision: Precision,
    activation: Activation,
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
            let sums = &mut sums[..panel.open.rows()];
            sums.as_flattened_mut().fill(0.0);
            self.multiply::<S, M>(s, panel, sums, next);
            with_unit!(self.activation, unit => self.activate::<S, M, _>(s, unit, panel, sums));
        }
    }

    /// Adds the products of the panel's rows to `sums`.
    #[inline(always)]
    fn multiply<S: Product, M: Step>(&self, s: S, panel: Panel<'_>, sums: &mut [[f32; PANEL]], next: &[f32]) {
        let words = panel.words();
        let steps = words.len() / PANEL;
        // Parts of about one depth, which stay in the first-level cache for all rows; a lone tile needs no parts.
        let most = if sums.len() <= most_rows::<S>() { steps } else { S::DEPTH };
        let part = steps.div_ceil(steps.div_ceil(most));
        for start in (0..steps).step_by(part) {
            let end = steps.min(start + part);
            let of_row = start * M::WORDS..end * M::WORDS;
            let b = &words[start * PANEL..end * PANEL];
            let mut next = if end < steps { &words[end * PANEL..] } else { next };
            for tile in tiles(sums.len(), most_rows::<S>()) {
                let first = tile.start;
                with_rows!(tile.len(), S, R => {
                    let a: [&[f32]; R] = std::array::from_fn(|r| self.x.row(panel.open.token(first + r), &of_row));
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
        let words = NEURONS / M::DEPTH * M::WORDS;
        let words_of_lanes = S::LANES / M::DEPTH * M::WORDS;
        let biases = panel.biases();
        for (row, sums) in sums.iter().enumerate() {
            let coefficient = s.splat(panel.open.coefficient(row));
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

/// Sets some columns of y for some tokens.
struct Combine<'a> {
    y: SharedRows<'a>,
    hidden: usize,
    tokens: Range<usize>,
    panels: Range<usize>,
    /// Panels whose strips are in memory at once.
    at_once: usize,
    open: &'a [Open<'a>],
    c: &'a [f32],
    precision: Precision,
}

/// The op and memory for the strips.
impl ProductKernel for (Combine<'_>, &mut [[f32; PANEL]]) {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let (op, strips) = self;
        for first in op.panels.clone().step_by(op.at_once) {
            let panels = first..op.panels.end.min(first + op.at_once);
            let strips = &mut strips[..panels.len() * op.tokens.len()];
            strips.as_flattened_mut().fill(0.0);
            with_step!(op.precision, S, M => op.add::<S, M>(s, strips, &panels));
            op.store(strips, &panels);
        }
    }
}

impl Combine<'_> {
    /// Adds every expert to the strips of some panels.
    #[inline(always)]
    fn add<S: Product, M: Step>(&self, s: S, strips: &mut [[f32; PANEL]], panels: &Range<usize>) {
        let group_words = NEURONS / M::DEPTH * M::WORDS;
        let group_len = NEURONS / M::DEPTH * PANEL;
        for open in self.open {
            let (b, b_stride) = open.experts.down_words(open.expert);
            let b = &b[panels.start * b_stride..];
            let rows = open.rows_of(&self.tokens);
            for group in (0..open.panels).step_by(GROUPS) {
                let b_part = group * group_len..open.panels.min(group + GROUPS) * group_len;
                let a = &self.c[(open.first + group * open.rows()) * group_words..];
                let mut start = rows.start;
                while start < rows.end {
                    let count = most_rows::<S>().min(rows.end - start);
                    let end = rows.end - (rows.end - start) % count;
                    with_rows!(count, S, R => s.isolated(AddToStrips::<M, _, R> {
                        strips: &mut *strips,
                        strip_len: self.tokens.len(),
                        a,
                        group_words,
                        group_rows: open.rows(),
                        rows: start..end,
                        to: |row: usize| open.token(row) - self.tokens.start,
                        b,
                        b_part: b_part.clone(),
                        b_stride,
                        step: PhantomData,
                    }));
                    start = end;
                }
            }
        }
    }

    /// Copies the strips of some panels to y.
    fn store(&self, strips: &[[f32; PANEL]], panels: &Range<usize>) {
        for (panel, strip) in panels.clone().zip(strips.chunks_exact(self.tokens.len())) {
            let first = panel * PANEL;
            let width = PANEL.min(self.hidden - first);
            for (token, row) in self.tokens.clone().zip(strip) {
                // SAFETY: tasks differ in tokens or in panels.
                unsafe { self.y.row(token, first, width) }.copy_from_slice(&row[..width]);
            }
        }
    }
}
