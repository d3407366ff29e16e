//! One task of a matrix product: rows of A, packed here or before, with a range of panels of B.

use std::cell::RefCell;
use std::ops::Range;

use super::mat::Precision;
use super::pack::{
    DEPTH, PANEL, Part, SLACK, Source, copied_pair_tiles, copied_tiles, pack, pack_pairs, packs_pairs, pairs,
    round,
};
use super::tile::{Depth, Next, product};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::simd::{Product, ProductKernel, SQUARE};

/// Values of B that a lone row asks for ahead.
const AHEAD: usize = 1024;

/// Panels of B, one after the other, each a tile of [`PANEL`] lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Panels<'a> {
    F32(&'a [f32]),
    Pairs(&'a [u32]),
}

/// The rows of A.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// Rows that the task packs, rounded to bf16 when the flag is set.
    Source(Source<'a>, bool),
    /// Consecutive f32 tiles, cut by [`tiles`], with `depth` values of k each.
    Tiles { data: &'a [f32], depth: usize },
    /// Tiles in pairs, where pairs are multiplied; `depth` is even.
    PairTiles { data: &'a [u32], depth: usize },
}

/// A tile of C: rows of the task and a panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    /// First row, in the numbering of [`Block::rows`].
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) panel: usize,
}

/// Receives the product in tiles `[at.rows, PANEL]`.
pub(crate) trait Sink: Sync {
    /// Is called when a tile begins: it prefetches the memory that `finish` needs.
    fn start<S: Product>(&self, s: S, at: At);
    /// Receives the finished tile.
    fn finish<S: Product>(&self, s: S, tile: &[f32], at: At);
}

/// Returns the number of tiles of `rows` rows, `most` rows at most in each.
fn tile_count(rows: usize, most: usize) -> usize {
    rows.div_ceil(most)
}

/// Cuts `rows` rows into tiles of nearly equal size, larger ones first.
pub(crate) fn tiles(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = tile_count(rows, most).max(1);
    let (size, larger) = (rows / count, rows % count);
    (0..tile_count(rows, most)).map(move |i| {
        let start = i * size + i.min(larger);
        start..start + size + usize::from(i < larger)
    })
}

/// One task; see the docs of the module.
pub(crate) struct Block<'a, K> {
    pub(crate) left: Left<'a>,
    /// Rows of A to multiply; for packed tiles only the length is used.
    pub(crate) rows: Range<usize>,
    /// The part of the inner dimension; its start is even.
    pub(crate) ks: Range<usize>,
    /// All panels, of which `range` is used.
    pub(crate) panels: Panels<'a>,
    /// The inner dimension of the panels, which contains `ks`.
    pub(crate) panel_ks: Range<usize>,
    pub(crate) range: Range<usize>,
    pub(crate) sink: &'a K,
}

/// Memory of one thread's tasks.
#[derive(Default)]
struct Work {
    a: Buf,
    a_pairs: Buf,
    sums: Buf,
    widened: Buf,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

impl<K: Sink> Block<'_, K> {
    /// Computes the block on this thread.
    pub(crate) fn run(self, isa: Isa) {
        WORK.with_borrow_mut(|work| isa.run_product(Task { block: self, work }));
    }
}

struct Task<'a, 'w, K> {
    block: Block<'a, K>,
    work: &'w mut Work,
}

impl<K: Sink> ProductKernel for Task<'_, '_, K> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Task { block, work } = self;
        let Work { a, a_pairs, sums, widened } = work;
        let (rows, k) = (block.rows.len(), block.ks.len());
        let in_pairs = matches!(block.panels, Panels::Pairs(_));
        // Pairs need an even depth: A gets a row of zeros.
        let depth = if in_pairs { k.next_multiple_of(2) } else { k };
        let dots = in_pairs && S::DOTS;
        let mut layout = (depth, 0);
        let (values, paired): (&[f32], &[u32]) = match block.left {
            Left::Tiles { data, depth } => {
                assert!(!dots, "tiles in f32 where pairs are multiplied");
                layout = (depth, block.ks.start);
                (data, &[])
            }
            Left::PairTiles { data, depth } => {
                layout = (depth, block.ks.start);
                (&[], data)
            }
            Left::Source(source, _) if dots => {
                a_pairs.resize(rows * depth / 2 + SLACK);
                let out = bytemuck::cast_slice_mut(a_pairs);
                pack_pair_tiles(s, out, a, Part { source, lanes: block.rows.clone(), ks: block.ks.clone() });
                (&[], out)
            }
            Left::Source(source, rounded) => {
                a.resize(rows * depth + SLACK);
                let part = Part { source, lanes: block.rows.clone(), ks: block.ks.clone() };
                pack_tiles(s, a, part, depth, rounded);
                (a, &[])
            }
        };
        let most = tiles(rows, S::ROWS).map(|t| t.len()).max().unwrap_or(0);
        sums.resize(2 * rows * PANEL);
        // Widening a panel once for all tiles pays from the second tile on.
        let widen_first = in_pairs && !S::DOTS && rows > S::ROWS;
        widened.resize(if widen_first { S::DEPTH * PANEL } else { 0 });
        let mut panel_depth = block.panel_ks.len();
        if in_pairs {
            panel_depth = panel_depth.next_multiple_of(2);
        }
        let panel_layout = (panel_depth, block.ks.start - block.panel_ks.start);
        let mut passes =
            Passes { s, block: &block, values, paired, sums, widened, rows, depth, layout, panel_layout };
        let mut panel = block.range.start;
        if const { S::ROWS_OF_WIDE > 0 } {
            while rows > 1 && most <= S::ROWS_OF_WIDE && panel + 2 <= block.range.end {
                passes.panels::<2>(panel);
                panel += 2;
            }
        }
        while panel < block.range.end {
            passes.panels::<1>(panel);
            panel += 1;
        }
    }
}

/// Sets `out` to the tiles of `part`, followed by zeros up to `depth`.
#[inline(always)]
fn pack_tiles<S: Product>(s: S, out: &mut [f32], part: Part<'_>, depth: usize, rounded: bool) {
    let (rows, k) = (part.lanes.clone(), part.ks.len());
    if part.source.lanes_are_dense() {
        copied_tiles(s, out, part, depth, || tiles(rows.len(), S::ROWS));
        for tile in tiles(rows.len(), S::ROWS) {
            let out = &mut out[tile.start * depth..tile.end * depth];
            if rounded {
                round(s, &mut out[..k * tile.len()]);
            }
            out[k * tile.len()..].fill(0.0);
        }
        return;
    }
    for tile in tiles(rows.len(), S::ROWS) {
        let (width, out) = (tile.len(), &mut out[tile.start * depth..]);
        let lanes = rows.start + tile.start..rows.start + tile.end;
        for start in (0..k).step_by(DEPTH) {
            let end = k.min(start + DEPTH);
            let out = &mut out[start * width..];
            let ks = part.ks.start + start..part.ks.start + end;
            pack(s, out, (width, width), Part { source: part.source, lanes: lanes.clone(), ks });
            if rounded {
                round(s, &mut out[..(end - start) * width]);
            }
        }
        out[k * width..depth * width].fill(0.0);
    }
}

/// Packs the rows of A for several blocks, into f32 values that [`PackLeft::tiles`] reads.
pub(crate) struct PackLeft<'a> {
    /// [`PackLeft::len`] values.
    pub(crate) out: &'a mut [f32],
    pub(crate) source: Source<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) ks: Range<usize>,
    pub(crate) precision: Precision,
}

impl PackLeft<'_> {
    pub(crate) fn len(isa: Isa, precision: Precision, rows: usize, depth: usize) -> usize {
        if precision == Precision::Bf16 && isa.dots() {
            rows * depth.next_multiple_of(2) / 2 + SLACK
        } else {
            rows * depth + SLACK
        }
    }

    /// Packs on this thread.
    pub(crate) fn run(self, isa: Isa) {
        WORK.with_borrow_mut(|work| isa.run_product((self, work)));
    }

    /// Returns the tiles that `run` has packed.
    pub(crate) fn tiles(isa: Isa, precision: Precision, out: &[f32], depth: usize) -> Left<'_> {
        if precision == Precision::Bf16 && isa.dots() {
            Left::PairTiles { data: bytemuck::cast_slice(out), depth: depth.next_multiple_of(2) }
        } else {
            Left::Tiles { data: out, depth }
        }
    }
}

impl ProductKernel for (PackLeft<'_>, &mut Work) {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let (PackLeft { out, source, rows, ks, precision }, Work { a, .. }) = self;
        let depth = ks.len();
        if precision == Precision::Bf16 && S::DOTS {
            pack_pair_tiles(s, bytemuck::cast_slice_mut(out), a, Part { source, lanes: rows, ks });
        } else {
            let part = Part { source, lanes: rows, ks };
            pack_tiles(s, out, part, depth, precision == Precision::Bf16);
        }
    }
}

/// Sets `out` to the tiles of `part` in pairs; `values` is memory to work in.
#[inline(always)]
fn pack_pair_tiles<S: Product>(s: S, out: &mut [u32], values: &mut Buf, part: Part<'_>) {
    let (rows, depth) = (part.lanes.clone(), part.ks.len().next_multiple_of(2));
    if part.source.lanes_are_dense() {
        copied_pair_tiles(s, out, part, || tiles(rows.len(), S::ROWS));
        return;
    }
    if !packs_pairs(&part.source) {
        values.resize(rows.len() * depth + SLACK);
        pack_tiles(s, values, part, depth, false);
        pair_tiles(s, out, values, rows.len(), depth);
        return;
    }
    for tile in tiles(rows.len(), S::ROWS) {
        let (width, out) = (tile.len(), &mut out[tile.start * depth / 2..]);
        let lanes = rows.start + tile.start..rows.start + tile.end;
        pack_pairs(s, out, (width, width), Part { lanes, ..part.clone() });
    }
}

#[inline(always)]
fn pair_tiles<S: Product>(s: S, out: &mut [u32], values: &[f32], rows: usize, depth: usize) {
    for tile in tiles(rows, S::ROWS) {
        let start = tile.start * depth;
        pairs(s, &mut out[start / 2..], &values[start..], tile.len(), depth);
    }
}

/// The state that the passes over one block share.
struct Passes<'a, 'w, S, K> {
    s: S,
    block: &'a Block<'a, K>,
    values: &'w [f32],
    paired: &'w [u32],
    sums: &'w mut [f32],
    widened: &'w mut [f32],
    rows: usize,
    depth: usize,
    /// The depth of a tile in `values`, and the place of the block's first k in it.
    layout: (usize, usize),
    /// The same for the panels.
    panel_layout: (usize, usize),
}

impl<S: Product, K: Sink> Passes<'_, '_, S, K> {
    /// Multiplies all rows with P panels from `first` on.
    #[inline(always)]
    fn panels<const P: usize>(&mut self, first: usize) {
        let Passes { s, block, rows, depth, layout, panel_layout, .. } = *self;
        let panel_at = |p: usize, k: usize| ((first + p) * panel_layout.0 + panel_layout.1 + k) * PANEL;
        let mut halves = self.sums.chunks_exact_mut(rows * PANEL);
        let mut sums: [&mut [f32]; P] = std::array::from_fn(|_| halves.next().expect("two halves"));
        // Passes of about one depth: a short one costs as much besides its products as a long one.
        let most = if self.paired.is_empty() { S::DEPTH } else { 2 * S::DEPTH };
        let step = depth.div_ceil(depth.div_ceil(most)).next_multiple_of(2);
        for start in (0..depth).step_by(step) {
            let end = depth.min(start + step);
            let wide = !self.widened.is_empty();
            if let (Panels::Pairs(b), true) = (block.panels, wide) {
                let b = &b[panel_at(0, start) / 2..panel_at(0, end) / 2];
                widen(s, self.widened, b);
            }
            // The part of B that the next pass reads: the first tiles prefetch it.
            let from = |p, k| -> &[f32] {
                match block.panels {
                    Panels::F32(b) => &b[panel_at(p, k)..],
                    Panels::Pairs(b) => bytemuck::cast_slice(&b[panel_at(p, k) / 2..]),
                }
            };
            let (this, next) = (from(0, start), from(P - 1, end));
            for (i, tile) in tiles(rows, S::ROWS).enumerate() {
                let at = |p| At { row: block.rows.start + tile.start, rows: tile.len(), panel: first + p };
                let mut halves = sums.iter_mut();
                let mut part: [&mut [f32]; P] = std::array::from_fn(|_| {
                    &mut halves.next().expect("P halves")[tile.start * PANEL..tile.end * PANEL]
                });
                if start == 0 {
                    (0..P).for_each(|p| block.sink.start(s, at(p)));
                }
                let a_at = |k| tile.start * layout.0 + (layout.1 + k) * tile.len();
                let values = || &self.values[a_at(start)..a_at(end)];
                let pass: Depth<'_, P> = match block.panels {
                    Panels::F32(b) => {
                        let b = std::array::from_fn(|p| &b[panel_at(p, start)..panel_at(p, end)]);
                        Depth::F32(values(), b)
                    }
                    Panels::Pairs(_) if wide => {
                        Depth::F32(values(), std::array::from_fn(|_| &self.widened[..]))
                    }
                    Panels::Pairs(b) => {
                        let b = std::array::from_fn(|p| &b[panel_at(p, start) / 2..panel_at(p, end) / 2]);
                        if S::DOTS {
                            Depth::Pairs(&self.paired[a_at(start) / 2..a_at(end) / 2], b)
                        } else {
                            Depth::Widened(values(), b)
                        }
                    }
                };
                // Of B a line for each k and tile; the only tile asks for twice as many, the others for their share of
                // the tile after them.
                let turns = if matches!(pass, Depth::F32(..)) { end - start } else { (end - start) / 2 };
                let line = |i: usize| next.get(i * turns * SQUARE..).unwrap_or(&[]);
                // A lone row takes as long as reading B. It asks for what is read soon, in the order of memory.
                let near = |i: usize| this.get(AHEAD + i * SQUARE..).unwrap_or(&[]);
                let next = if rows == 1 {
                    Next { line: near(0), part: near(1), step: 2 * SQUARE, line_step: 2 * SQUARE }
                } else if rows == tile.len() {
                    Next { line: line(0), part: line(1), step: SQUARE, line_step: SQUARE }
                } else {
                    let len = tile.len();
                    let at = a_at(start) + len * layout.0;
                    let part: &[f32] = if S::DOTS && !self.paired.is_empty() {
                        bytemuck::cast_slice(self.paired.get(at / 2..).unwrap_or(&[]))
                    } else {
                        self.values.get(at..).unwrap_or(&[])
                    };
                    Next { line: line(i), part, step: len, line_step: SQUARE }
                };
                let mut parts = part.iter_mut();
                let sums: [&mut [f32]; P] = std::array::from_fn(|_| &mut **parts.next().expect("P parts"));
                product(s, tile.len(), pass, sums, start > 0, next);
                if end == depth {
                    for (p, part) in part.iter().enumerate() {
                        block.sink.finish(s, part, at(p));
                    }
                }
            }
        }
    }
}

/// Sets `out` to the values of `pairs`, k-major.
#[inline(always)]
fn widen<S: Product>(s: S, out: &mut [f32], pairs: &[u32]) {
    for (out, pairs) in out.chunks_exact_mut(2 * PANEL).zip(pairs.chunks_exact(PANEL)) {
        let (evens, odds) = out.split_at_mut(PANEL);
        for i in (0..PANEL).step_by(S::LANES) {
            let (even, odd) = s.widen(&pairs[i..]);
            s.store(&mut evens[i..], even);
            s.store(&mut odds[i..], odd);
        }
    }
}
