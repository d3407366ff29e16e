//! Vector bodies of the gated unit: activations into the tiles that products read, and the backward of a row.

use std::ops::Range;

use super::packed::NEURONS;
use super::plan::Plan;
use super::strips::Run;
use crate::buf::SharedRows;
use crate::matmul::picked::{Step, with_step};
use crate::matmul::{At, Left, PANEL, Precision, Sink, tiles};
use crate::simd::{Kernel, Product, ProductKernel, Simd};
use crate::swiglu::Activation;
use crate::swiglu::activation::{Unit, with_unit};

/// Returns `act(a) * b * g`. It is a function because closures may not be inlined into the code of the tier.
#[inline(always)]
pub(super) fn gated<S: Simd, A: Unit>(s: S, unit: A, [a, b, g]: [S::V; 3]) -> S::V {
    s.mul(s.mul(s.mul(a, unit.gate(s, a)), b), g)
}

/// Activations `[pairs, depth]` stored as the tiles that [`left_tiles`] reads, block after block.
/// Tasks write different blocks or different neurons.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    values: SharedRows<'a>,
    depth: usize,
    precision: Precision,
}

impl<'a> Tiles<'a> {
    /// # Safety
    /// While the value is used, no two tasks write the same neurons of a block.
    pub(super) unsafe fn new(out: &'a mut [f32], depth: usize, precision: Precision) -> Tiles<'a> {
        Tiles { values: SharedRows::new(out, depth), depth, precision }
    }

    /// Stores neurons `k..k + NEURONS` of rows `tile` of the block that starts at pair `first`; `rows` holds
    /// NEURONS values for each of 16 rows.
    #[inline(always)]
    fn put<S: Product>(
        &self,
        s: S,
        first: usize,
        tile: Range<usize>,
        k: usize,
        rows: &[f32; NEURONS * NEURONS],
    ) {
        let width = tile.len();
        let in_pairs = S::DOTS && self.precision == Precision::Bf16;
        let (per_value, len) = if in_pairs { (2, NEURONS / 2 * width) } else { (1, NEURONS * width) };
        assert!(k + NEURONS <= self.depth);
        let start = ((first + tile.start) * self.depth + k * width) / per_value;
        // SAFETY: by the contract of `new` no other task uses these neurons of this block.
        let out = unsafe { self.values.values(start, len) };
        let mut columns = [0.0; NEURONS * NEURONS];
        let rows = std::array::from_fn(|r| &rows[r * NEURONS..(r + 1) * NEURONS]);
        s.transpose(&mut columns, NEURONS, rows, width);
        // Whole vectors as long as there is room: what is past a column is written again by the next.
        if in_pairs {
            let out: &mut [u32] = bytemuck::cast_slice_mut(out);
            for (k, columns) in columns.chunks_exact(2 * NEURONS).enumerate() {
                let (even, odd) = columns.split_at(NEURONS);
                for first in (0..width).step_by(S::LANES) {
                    let (even, odd) = (s.load(&even[first..]), s.load(&odd[first..]));
                    let out = &mut out[k * width + first..];
                    if out.len() >= S::LANES {
                        s.store_pairs(out, even, odd);
                    } else {
                        let mut last = [0; NEURONS];
                        s.store_pairs(&mut last, even, odd);
                        out[..width - first].copy_from_slice(&last[..width - first]);
                    }
                }
            }
            return;
        }
        for (k, column) in columns.chunks_exact(NEURONS).enumerate() {
            for first in (0..width).step_by(S::LANES) {
                let mut values = s.load(&column[first..]);
                if self.precision == Precision::Bf16 {
                    values = s.round_bf16(values);
                }
                let out = &mut out[k * width + first..];
                if out.len() >= S::LANES {
                    s.store(out, values);
                } else {
                    s.store_tail(&mut out[..width - first], values);
                }
            }
        }
    }
}

/// Returns the tiles of a block of pairs.
pub(super) fn left_tiles<'a>(
    plan: &Plan<'_>,
    tiles: &'a [f32],
    depth: usize,
    pairs: Range<usize>,
) -> Left<'a> {
    let values = pairs.start * depth..pairs.end * depth;
    if plan.isa.dots() && plan.precision == Precision::Bf16 {
        Left::PairTiles { data: bytemuck::cast_slice(&tiles[values.start / 2..values.end / 2]), depth }
    } else {
        Left::Tiles { data: &tiles[values], depth }
    }
}

/// Receives a product of gate and up panels of a dense FFN and stores `c = act(a) * b` in tiles.
pub(super) struct Gate<'a> {
    pub(super) tiles: Tiles<'a>,
    /// First token of the block.
    pub(super) first: usize,
    pub(super) activation: Activation,
    /// The biases of the columns of the product, whole panels.
    pub(super) biases: Option<&'a [f32]>,
}

/// Sets `rows` to the activations of a tile of products.
#[inline(always)]
fn activate<S: Product, A: Unit>(s: S, unit: A, rows: &mut [f32], tile: &[f32]) {
    for (sums, row) in tile.chunks_exact(PANEL).zip(rows.chunks_exact_mut(NEURONS)) {
        let (a, b) = sums.split_at(NEURONS);
        for i in (0..NEURONS).step_by(S::LANES) {
            s.store(&mut row[i..], gated(s, unit, [s.load(&a[i..]), s.load(&b[i..]), s.splat(1.0)]));
        }
    }
}

impl Sink for Gate<'_> {
    #[inline(always)]
    fn start<S: Product>(&self, _s: S, _at: At) {}

    #[inline(always)]
    fn finish<S: Product>(&self, s: S, tile: &[f32], at: At) {
        let mut rows = [0.0; NEURONS * NEURONS];
        let mut biased = [0.0; NEURONS * PANEL];
        let tile = match self.biases {
            None => tile,
            Some(biases) => {
                let biased = &mut biased[..tile.len()];
                add_to_rows(s, biased, tile, &biases[at.panel * PANEL..][..PANEL]);
                biased
            }
        };
        with_unit!(self.activation, unit => activate(s, unit, &mut rows, tile));
        let row = at.row - self.first;
        self.tiles.put(s, self.first, row..row + at.rows, at.panel * NEURONS, &rows);
    }
}

/// Sets `out` to rows of `x` plus `bias`; the rows are as long as `bias`, whole vectors.
#[inline(always)]
fn add_to_rows<S: Product>(s: S, out: &mut [f32], x: &[f32], bias: &[f32]) {
    for (out, x) in out.chunks_exact_mut(bias.len()).zip(x.chunks_exact(bias.len())) {
        for i in (0..bias.len()).step_by(S::LANES) {
            s.store(&mut out[i..], s.add(s.load(&x[i..]), s.load(&bias[i..])));
        }
    }
}

/// The values of a pair's neurons that [`FillTiles`] stores.
pub(super) trait Neurons: Sync {
    /// Returns the neurons of a pair.
    fn width(&self) -> usize;
    /// Loads up to LANES neurons from `k` on.
    fn load<S: Simd>(&self, s: S, pair: usize, k: usize) -> S::V;
}

/// `coefficient * act(a) * b`; `row` gives the place of a pair's neurons in a and b.
pub(super) struct Gated<'a, R, C, A> {
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) row: R,
    pub(super) coefficient: C,
    pub(super) width: usize,
    pub(super) unit: A,
}

impl<R: Fn(usize) -> usize + Sync, C: Fn(usize) -> f32 + Sync, A: Unit> Neurons for Gated<'_, R, C, A> {
    fn width(&self) -> usize {
        self.width
    }
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, pair: usize, k: usize) -> S::V {
        let start = (self.row)(pair);
        let neurons = start + k..start + self.width;
        let (a, b) = (s.load_tail(&self.a[neurons.clone()]), s.load_tail(&self.b[neurons]));
        gated(s, self.unit, [a, b, s.splat((self.coefficient)(pair))])
    }
}

/// Rows of `width` values, one per pair.
pub(super) struct Plain<'a> {
    pub(super) values: &'a [f32],
    pub(super) width: usize,
}

impl Neurons for Plain<'_> {
    fn width(&self) -> usize {
        self.width
    }
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, pair: usize, k: usize) -> S::V {
        s.load_tail(&self.values[pair * self.width + k..(pair + 1) * self.width])
    }
}

/// Stores a block of pairs into tiles, from neuron `k` of the tiles on.
pub(super) struct FillTiles<'a, A> {
    pub(super) tiles: Tiles<'a>,
    pub(super) pairs: Range<usize>,
    pub(super) k: usize,
    pub(super) neurons: &'a A,
}

impl<A: Neurons> ProductKernel for FillTiles<'_, A> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let FillTiles { tiles: out, pairs, k, neurons } = self;
        let width = neurons.width();
        for tile in tiles(pairs.len(), S::ROWS) {
            for first in (0..width).step_by(NEURONS) {
                let mut rows = [0.0; NEURONS * NEURONS];
                for (row, pair) in
                    rows.chunks_exact_mut(NEURONS).zip(pairs.start + tile.start..pairs.start + tile.end)
                {
                    for i in (0..NEURONS).step_by(S::LANES) {
                        if first + i < width {
                            s.store(&mut row[i..], neurons.load(s, pair, first + i));
                        }
                    }
                }
                out.put(s, pairs.start, tile.clone(), k + first, &rows);
            }
        }
    }
}

/// Stores the neurons of runs in words, one row for each term, group of neurons and token.
pub(super) struct FillWords<'a, A, const N: usize> {
    pub(super) out: SharedRows<'a>,
    pub(super) runs: &'a [Run<'a>],
    pub(super) terms: [&'a A; N],
    pub(super) precision: Precision,
}

impl<A: Neurons, const N: usize> ProductKernel for FillWords<'_, A, N> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        // Where pairs are not multiplied, operands are rounded f32.
        let stored = if S::DOTS { self.precision } else { Precision::F32 };
        with_step!(stored, S, M => self.fill::<S, M>(s));
    }
}

impl<A: Neurons, const N: usize> FillWords<'_, A, N> {
    #[inline(always)]
    fn fill<S: Product, M: Step>(&self, s: S) {
        let words = M::GROUP_WORDS;
        let words_of_lanes = S::LANES / M::DEPTH * M::WORDS;
        for run in self.runs {
            let groups = run.groups / N;
            for group in 0..run.groups {
                let (neurons, first) = (self.terms[group / groups], group % groups * NEURONS);
                for row in 0..run.len() {
                    // SAFETY: tasks have different runs.
                    let out = unsafe { self.out.row(run.first + group * run.len() + row, 0, words) };
                    for (out, i) in out.chunks_exact_mut(words_of_lanes).zip((0..NEURONS).step_by(S::LANES)) {
                        let mut values = s.splat(0.0);
                        if first + i < neurons.width() {
                            values = neurons.load(s, run.pair + row, first + i);
                        }
                        if self.precision == Precision::Bf16 {
                            values = s.round_bf16(values);
                        }
                        M::store(s, out, values);
                    }
                }
            }
        }
    }
}

/// Sets every value of `dots` to the sum of `act(a[j]) * b[j] * g[j]` over its `width` values.
pub(super) struct GatedDots<'a, A> {
    pub(super) dots: &'a mut [f32],
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) g: &'a [f32],
    pub(super) width: usize,
    pub(super) unit: A,
}

impl<A: Unit> Kernel for GatedDots<'_, A> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let GatedDots { dots, a, b, g, width, unit } = self;
        let rows = a.chunks_exact(width).zip(b.chunks_exact(width)).zip(g.chunks_exact(width));
        for (dot, ((a, b), g)) in dots.iter_mut().zip(rows) {
            let mut sum = s.splat(0.0);
            let head = width - width % S::LANES;
            for j in (0..head).step_by(S::LANES) {
                sum = s.add(sum, gated(s, unit, [s.load(&a[j..]), s.load(&b[j..]), s.load(&g[j..])]));
            }
            if head < width {
                let tail = [s.load_tail(&a[head..]), s.load_tail(&b[head..]), s.load_tail(&g[head..])];
                sum = s.add(sum, gated(s, unit, tail));
            }
            *dot = s.reduce_add(sum);
        }
    }
}

/// Computes one row of the backward of the gated unit: from a, b, g = `<dy, w_down>` and the pair's coefficient, sets da, db
/// and scaled = coefficient * act(a) * b. Returns the coefficient's gradient, the value of [`GatedDots`].
pub(super) struct GateBackward<'a, A> {
    pub(super) da: &'a mut [f32],
    pub(super) db: &'a mut [f32],
    pub(super) scaled: &'a mut [f32],
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) g: &'a [f32],
    pub(super) coefficient: f32,
    pub(super) unit: A,
}

impl<A: Unit> Kernel for GateBackward<'_, A> {
    type Output = f32;
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> f32 {
        let GateBackward { da, db, scaled, a, b, g, coefficient, unit } = self;
        let n = a.len();
        assert!([da.len(), db.len(), scaled.len(), b.len(), g.len()] == [n; 5]);
        let coefficient = s.splat(coefficient);
        let mut sum = s.splat(0.0);
        for j in (0..n).step_by(S::LANES) {
            let (a, b, g) = (s.load_tail(&a[j..]), s.load_tail(&b[j..]), s.load_tail(&g[j..]));
            let gate = unit.gate(s, a);
            let activated = s.mul(a, gate);
            let c = s.mul(activated, b);
            let dc = s.mul(coefficient, g);
            let slope = unit.slope(s, a, gate);
            s.store_tail(&mut da[j..], s.mul(s.mul(dc, b), slope));
            s.store_tail(&mut db[j..], s.mul(dc, activated));
            s.store_tail(&mut scaled[j..], s.mul(coefficient, c));
            sum = s.fma(c, g, sum);
        }
        s.reduce_add(sum)
    }
}
