//! The sum of the experts' outputs, computed by strips: 32 columns of a block of tokens, to which every expert adds the rows of
//! its tokens while the strip is in the cache. Rows of y are written once.

use std::marker::PhantomData;
use std::ops::Range;

use super::packed::NEURONS;
use super::plan::{Pairs, Plan};
use crate::buf::{SharedRows, with_spare};
use crate::matmul::picked::{AddToStrips, Places, Step, Strided, most_rows, row_words, with_rows, with_step};
use crate::matmul::{PANEL, Precision, for_tasks, tasks_for};
use crate::simd::{Product, ProductKernel};

/// Most tokens of a strip: it stays in a near cache, and an expert has enough of the tokens.
const STRIP: usize = 512;
/// Most rows of a tile. Larger ones leave more rows over, since an expert has few.
pub(super) const ROWS: usize = 8;
/// Groups of neurons that are added to a strip at a time: their weights stay in the first-level cache.
const GROUPS: usize = 16;
/// Tokens up to which groups are added one by one, in the order of memory: reading the weights takes longer than adding.
const ONE_BY_ONE: usize = 32;

/// An expert with the tokens of a block that run it.
#[derive(Debug)]
pub(super) struct Run<'a> {
    /// Its part of the plan; see [`Plan::parts`].
    pub(super) part: usize,
    pub(super) expert: usize,
    /// Groups of [`NEURONS`] neurons.
    pub(super) groups: usize,
    /// Rows of neurons that come before in the list: one for each group and token.
    pub(super) first: usize,
    /// The pair of the first token.
    pub(super) pair: usize,
    /// Ascending; none if every token of the block runs it, with coefficient 1.
    routed: Option<(&'a [u32], &'a [f32])>,
    block: Range<usize>,
}

impl Run<'_> {
    /// Counts the tokens.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.routed.map_or(self.block.len(), |(tokens, _)| tokens.len())
    }

    #[inline(always)]
    pub(super) fn token(&self, row: usize) -> usize {
        self.routed.map_or(self.block.start + row, |(tokens, _)| tokens[row] as usize)
    }

    #[inline(always)]
    pub(super) fn coefficient(&self, row: usize) -> f32 {
        self.routed.map_or(1.0, |(_, coefficients)| coefficients[row])
    }

    /// Returns the places of the rows in a strip of some tokens of the block.
    pub(super) fn places(&self, tokens: &Range<usize>) -> Places<'_> {
        match self.routed {
            None => Places { list: None, first: tokens.start - self.block.start },
            Some((list, _)) => Places { list: Some(list), first: tokens.start },
        }
    }

    /// Returns the rows of some tokens of the block.
    fn rows_of(&self, tokens: &Range<usize>) -> Range<usize> {
        match self.routed {
            None => tokens.start - self.block.start..tokens.end - self.block.start,
            Some((list, _)) => rows_of(list, tokens),
        }
    }
}

fn rows_of(list: &[u32], tokens: &Range<usize>) -> Range<usize> {
    let before = |end: usize| list.partition_point(|&token| (token as usize) < end);
    before(tokens.start)..before(tokens.end)
}

/// Sets `runs` to the experts with tokens in a block, and returns their rows of neurons, `terms` for each group and token.
pub(super) fn list<'a>(
    runs: &mut Vec<Run<'a>>,
    plan: &Plan<'a>,
    terms: usize,
    block: &Range<usize>,
) -> usize {
    runs.clear();
    // Room for all experts: a token that opens more of them than any before it allocates nothing.
    runs.reserve(plan.dims.num_experts);
    let mut first = 0;
    for (number, (part, _)) in plan.parts().enumerate() {
        let groups = terms * part.dims.expert_width().div_ceil(NEURONS);
        for expert in 0..part.dims.num_experts {
            let mut pairs = part.pairs_of(expert);
            let routed = match part.pairs {
                Pairs::Dense => None,
                Pairs::Routed(routes) => {
                    let rows = rows_of(&routes.tokens[pairs.clone()], block);
                    pairs = pairs.start + rows.start..pairs.start + rows.end;
                    Some((&routes.tokens[pairs.clone()], &routes.coefficients[pairs.clone()]))
                }
            };
            let run =
                Run { part: number, expert, groups, first, pair: pairs.start, routed, block: block.clone() };
            if run.len() > 0 {
                first += run.len() * groups;
                runs.push(run);
            }
        }
    }
    first
}

/// The operands of a sum over the tokens of a block.
pub(super) struct Sum<'a, W> {
    /// Rows of `columns` values, set or added to.
    pub(super) y: SharedRows<'a>,
    pub(super) columns: usize,
    pub(super) block: Range<usize>,
    pub(super) runs: &'a [Run<'a>],
    /// Neurons in words: row `first + group * len + row` of a run.
    pub(super) neurons: &'a [f32],
    /// Returns the weights of a run for all panels of columns.
    pub(super) weights: W,
    /// The precision of the words.
    pub(super) stored: Precision,
}

impl<'a, W: Fn(&Run<'_>) -> Strided<'a> + Sync> Sum<'a, W> {
    /// Sets the rows of the block, or adds to them. `rows` is memory.
    pub(super) fn run(&self, plan: &Plan<'_>, rows: &mut Vec<Range<usize>>) {
        let Plan { isa, accumulate, .. } = *plan;
        let (strips, panels) = (self.block.len().div_ceil(STRIP), self.columns.div_ceil(PANEL));
        let work = self.neurons.len() / row_words(isa, self.stored, NEURONS) * NEURONS * self.columns;
        let mut ranges = tasks_for(work).div_ceil(strips).min(panels);
        if self.block.len() <= ONE_BY_ONE {
            // As long pieces of an expert as there can be for all threads.
            ranges = ranges.min(rayon::current_num_threads());
        }
        let start = |strip: usize| self.block.start + strip * self.block.len() / strips;
        let tokens_of = |strip: usize| start(strip)..start(strip + 1);
        let of_strip = |strip: usize| self.runs.iter().map(move |run| run.rows_of(&tokens_of(strip)));
        rows.clear();
        rows.reserve(strips * plan.dims.num_experts);
        rows.extend((0..strips).flat_map(of_strip));
        let rows = &rows[..];
        for_tasks(strips * ranges, |task| {
            let (strip, range) = (task % strips, task / strips);
            let (tokens, rows) = (tokens_of(strip), &rows[strip * self.runs.len()..][..self.runs.len()]);
            let panels = range * panels / ranges..(range + 1) * panels / ranges;
            // Few tokens take strips of many panels at once, so that the weights of an expert are read in their order.
            let at_once = (STRIP / tokens.len()).clamp(1, panels.len());
            with_spare(at_once * tokens.len() * PANEL, |strips| {
                let strips = strips.as_chunks_mut().0;
                isa.run_product(Task { sum: self, tokens, rows, panels, at_once, strips, accumulate });
            });
        });
    }
}

/// Some columns of y for some tokens.
struct Task<'a, 's, W> {
    sum: &'a Sum<'s, W>,
    tokens: Range<usize>,
    /// Their rows in every run.
    rows: &'a [Range<usize>],
    panels: Range<usize>,
    /// Panels whose strips are in memory at once.
    at_once: usize,
    strips: &'a mut [[f32; PANEL]],
    accumulate: bool,
}

impl<'s, W: Fn(&Run<'_>) -> Strided<'s> + Sync> ProductKernel for Task<'_, 's, W> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Task { sum, tokens, rows, panels, at_once, strips, accumulate } = self;
        for first in panels.clone().step_by(at_once) {
            let panels = first..panels.end.min(first + at_once);
            let strips = &mut strips[..panels.len() * tokens.len()];
            strips.as_flattened_mut().fill(0.0);
            with_step!(sum.stored, S, M => sum.add::<S, M>(s, strips, (&tokens, rows), &panels));
            sum.store(strips, &tokens, &panels, accumulate);
        }
    }
}

impl<'s, W: Fn(&Run<'_>) -> Strided<'s> + Sync> Sum<'s, W> {
    /// Adds every expert to the strips of some panels.
    #[inline(always)]
    fn add<S: Product, M: Step>(
        &self,
        s: S,
        strips: &mut [[f32; PANEL]],
        (tokens, rows): (&Range<usize>, &[Range<usize>]),
        panels: &Range<usize>,
    ) {
        let at_once = if tokens.len() <= ONE_BY_ONE { 1 } else { GROUPS };
        for (i, (run, rows)) in self.runs.iter().zip(rows).enumerate() {
            let next = self.runs.get(i + 1).map_or(&[][..], |next| {
                let words = (self.weights)(next).from(panels.start, 0);
                &words[..words.len().min(panels.len() * next.groups * M::GROUP_STEPS * PANEL)]
            });
            let b = (self.weights)(run).starting_at(panels.start);
            for group in (0..run.groups).step_by(at_once) {
                let next = if group + at_once < run.groups { b.from(0, group + at_once) } else { next };
                let a = &self.neurons[(run.first + group * run.len()) * M::GROUP_WORDS..];
                let mut start = rows.start;
                while start < rows.end {
                    let count = most_rows::<S>().min(ROWS).min(rows.end - start);
                    let end = rows.end - (rows.end - start) % count;
                    with_rows!(count, S, R => s.isolated(AddToStrips::<M, R> {
                        strips: &mut *strips,
                        strip_len: tokens.len(),
                        a,
                        group_rows: run.len(),
                        rows: start..end,
                        to: run.places(tokens),
                        b,
                        groups: group..run.groups.min(group + at_once),
                        next: if start == rows.start { next } else { &[] },
                        step: PhantomData,
                    }));
                    start = end;
                }
            }
        }
    }

    /// Copies the strips of some panels to y, or adds them.
    fn store(&self, strips: &[[f32; PANEL]], tokens: &Range<usize>, panels: &Range<usize>, accumulate: bool) {
        for (panel, strip) in panels.clone().zip(strips.chunks_exact(tokens.len())) {
            let first = panel * PANEL;
            let width = PANEL.min(self.columns - first);
            for (token, row) in tokens.clone().zip(strip) {
                // SAFETY: tasks differ in tokens or in panels.
                let y = unsafe { self.y.row(token, first, width) };
                if accumulate {
                    y.iter_mut().zip(row).for_each(|(y, row)| *y += row);
                } else {
                    y.copy_from_slice(&row[..width]);
                }
            }
        }
    }
}
