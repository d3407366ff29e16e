//! Products of rows that lie apart with panels of B: nothing is packed, a row is read where it lies.
//!
//! A row is a run of words, one for each step of the inner dimension: an f32 value, or a pair of bf16 where pairs are
//! multiplied. Where pairs are widened, a row is in f32 and a step takes two words of it.

use std::marker::PhantomData;
use std::ops::Range;

use super::pack::PANEL;
use crate::isa::Isa;
use crate::matmul::Precision;
use crate::simd::{Product, ProductKernel, SQUARE};

/// Values of a group; see [`AddToStrips`].
pub(crate) const GROUP: usize = 16;

/// The product of one step of the inner dimension.
pub(crate) trait Step: Copy + Send + Sync {
    /// Values of k in a step.
    const DEPTH: usize;
    /// Words of a row in a step.
    const WORDS: usize;
    /// Steps of a group of values, and the words of a row of one.
    const GROUP_STEPS: usize = GROUP / Self::DEPTH;
    const GROUP_WORDS: usize = Self::GROUP_STEPS * Self::WORDS;
    /// Returns `acc` plus the products of `a`, WORDS words, with `b`, a register of words.
    fn add<S: Product>(s: S, acc: S::V, a: &[f32], b: &[f32]) -> S::V;
    /// Stores a register of values as words, rounded.
    fn store<S: Product>(s: S, out: &mut [f32], values: S::V);
}

/// f32 with f32.
#[derive(Clone, Copy)]
pub(crate) struct Values;

/// Rounded f32 with pairs, which are widened.
#[derive(Clone, Copy)]
pub(crate) struct Widened;

/// Pairs with pairs.
#[derive(Clone, Copy)]
pub(crate) struct Pairs;

impl Step for Values {
    const DEPTH: usize = 1;
    const WORDS: usize = 1;
    #[inline(always)]
    fn add<S: Product>(s: S, acc: S::V, a: &[f32], b: &[f32]) -> S::V {
        s.fma(s.splat(a[0]), s.load(b), acc)
    }
    #[inline(always)]
    fn store<S: Product>(s: S, out: &mut [f32], values: S::V) {
        s.store_tail(out, values);
    }
}

impl Step for Widened {
    const DEPTH: usize = 2;
    const WORDS: usize = 2;
    #[inline(always)]
    fn add<S: Product>(s: S, acc: S::V, a: &[f32], b: &[f32]) -> S::V {
        let (even, odd) = s.widen(bytemuck::cast_slice(b));
        let acc = s.fma(s.splat(a[0]), even, acc);
        s.fma(s.splat(a[1]), odd, acc)
    }
    #[inline(always)]
    fn store<S: Product>(s: S, out: &mut [f32], values: S::V) {
        s.store_tail(out, s.round_bf16(values));
    }
}

impl Step for Pairs {
    const DEPTH: usize = 2;
    const WORDS: usize = 1;
    #[inline(always)]
    fn add<S: Product>(s: S, acc: S::V, a: &[f32], b: &[f32]) -> S::V {
        s.dot(acc, a[0].to_bits(), bytemuck::cast_slice(b))
    }
    #[inline(always)]
    fn store<S: Product>(s: S, out: &mut [f32], values: S::V) {
        s.store_bf16(bytemuck::cast_slice_mut(out), values);
    }
}

/// Returns the words of a row of `depth` values.
pub(crate) fn row_words(isa: Isa, precision: Precision, depth: usize) -> usize {
    match precision {
        Precision::F32 => depth,
        Precision::Bf16 if isa.dots() => depth.div_ceil(2),
        Precision::Bf16 => depth.next_multiple_of(2),
    }
}

/// Evaluates `$body` with the type `$step` bound to the step of a precision on the tier `$tier`.
macro_rules! with_step {
    ($precision:expr, $tier:ty, $step:ident => $body:expr) => {
        match $precision {
            $crate::matmul::Precision::F32 => {
                type $step = $crate::matmul::picked::Values;
                $body
            }
            $crate::matmul::Precision::Bf16 if const { <$tier>::DOTS } => {
                type $step = $crate::matmul::picked::Pairs;
                $body
            }
            $crate::matmul::Precision::Bf16 => {
                type $step = $crate::matmul::picked::Widened;
                $body
            }
        }
    };
}
pub(crate) use with_step;

/// Returns the most rows of a tile: their addresses and those of B stay in registers.
pub(crate) const fn most_rows<S: Product>() -> usize {
    if S::ROWS < 10 { S::ROWS } else { 10 }
}

/// Evaluates `$body` with the constant `$R` bound to a number of rows, at most [`most_rows`].
macro_rules! with_rows {
    ($rows:expr, $tier:ty, $R:ident => $body:expr) => {
        with_rows!(@arms $rows, $tier, $R => $body; 1 2 3 4 5 6 7 8 9 10)
    };
    (@arms $rows:expr, $tier:ty, $R:ident => $body:expr; $($count:literal)+) => {
        match $rows {
            $($count if const { $count <= $crate::matmul::picked::most_rows::<$tier>() } => {
                const $R: usize = $count;
                $body
            })+
            rows => unreachable!("{rows} rows in a tile"),
        }
    };
}
pub(crate) use with_rows;

/// Two registers of a panel, for each row.
type Sums<V, const R: usize> = [[V; 2]; R];

/// Adds the products of rows `a` with columns `first..` of steps `b` of a panel to `acc`.
#[inline(always)]
fn accumulate<S: Product, M: Step, const R: usize>(
    s: S,
    acc: &mut Sums<S::V, R>,
    a: [&[f32]; R],
    (b, first): (&[[f32; PANEL]], usize),
) {
    each_step::<S, M, R>(s, acc, a, (b, first), |_| ());
}

/// Does as [`accumulate`], and asks with every step for as many words of `ahead` as the step reads: memory is kept busy only
/// by requests at the pace of the products. Loops over rows that find the weights in a cache are faster without requests.
#[inline(always)]
fn accumulate_and_fetch<S: Product, M: Step, const R: usize>(
    s: S,
    acc: &mut Sums<S::V, R>,
    a: [&[f32]; R],
    (b, first): (&[[f32; PANEL]], usize),
    ahead: &[f32],
) {
    let fetch = |k: usize| (0..PANEL).step_by(SQUARE).for_each(|line| s.prefetch(ahead, k * PANEL + line));
    each_step::<S, M, R>(s, acc, a, (b, first), fetch);
}

/// Adds the products of every step; calls `before` with its number first.
#[inline(always)]
fn each_step<S: Product, M: Step, const R: usize>(
    s: S,
    acc: &mut Sums<S::V, R>,
    a: [&[f32]; R],
    (b, first): (&[[f32; PANEL]], usize),
    before: impl Fn(usize),
) {
    assert!(a.iter().all(|a| a.len() >= b.len() * M::WORDS));
    for (k, b) in b.iter().enumerate() {
        before(k);
        for r in 0..R {
            // SAFETY: k is below the steps of `b`, which the row has words for by the assertion.
            let a = unsafe { a[r].get_unchecked(k * M::WORDS..(k + 1) * M::WORDS) };
            for v in 0..2 {
                acc[r][v] = M::add(s, acc[r][v], a, &b[first + v * S::LANES..]);
            }
        }
    }
}

/// Steps between two looks ahead, and the words of B that a look is ahead: those that arrive in the time of one access.
const LOOK: usize = 8;
const AHEAD: usize = 2048;

/// A tile: `sums[r] += a[r] B` for R rows and a part of a panel. Sums from zero, so that rounding errors grow with the
/// depth of a part.
pub(crate) struct Products<'a, M, const R: usize> {
    /// Words of the part, of every row.
    pub(crate) a: [&'a [f32]; R],
    pub(crate) b: &'a [f32],
    pub(crate) sums: &'a mut [[f32; PANEL]],
    /// The values that are read after `b`. Both are prefetched, unless this is empty.
    pub(crate) next: &'a [f32],
    pub(crate) step: PhantomData<M>,
}

impl<M: Step, const R: usize> ProductKernel for Products<'_, M, R> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Products { a, b, sums, next, .. } = self;
        let b = b.as_chunks::<PANEL>().0;
        for first in (0..PANEL).step_by(2 * S::LANES) {
            let mut acc: Sums<S::V, R> = [[s.splat(0.0); 2]; R];
            if next.is_empty() || first > 0 {
                accumulate::<S, M, R>(s, &mut acc, a, (b, first));
            } else {
                for start in (0..b.len()).step_by(LOOK) {
                    let end = b.len().min(start + LOOK);
                    let at = start * PANEL + AHEAD;
                    let ahead = b.as_flattened().get(at..).filter(|ahead| !ahead.is_empty());
                    let ahead =
                        ahead.unwrap_or_else(|| &next[next.len().min(at.saturating_sub(b.len() * PANEL))..]);
                    let a = std::array::from_fn(|r| &a[r][start * M::WORDS..end * M::WORDS]);
                    accumulate_and_fetch::<S, M, R>(s, &mut acc, a, (&b[start..end], first), ahead);
                }
            }
            for (sums, acc) in sums[..R].iter_mut().zip(acc) {
                add_to(s, &mut sums[first..], acc);
            }
        }
    }
}

#[inline(always)]
fn add_to<S: Product>(s: S, sums: &mut [f32], acc: [S::V; 2]) {
    for (sums, acc) in sums.chunks_exact_mut(S::LANES).zip(acc) {
        s.store(sums, s.add(s.load(sums), acc));
    }
}

/// The places of rows in a strip.
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    /// The place of every row, or none if it is the row.
    pub(crate) list: Option<&'a [u32]>,
    /// Is subtracted from every place.
    pub(crate) first: usize,
}

impl Places<'_> {
    #[inline(always)]
    fn of(self, row: usize) -> usize {
        self.list.map_or(row, |list| list[row] as usize) - self.first
    }
}

/// Panels of weights in words, by groups of [`GROUP`] rows.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) words: &'a [f32],
    /// Words from a panel to the next, and from a group to the next.
    pub(crate) panel: usize,
    pub(crate) group: usize,
}

impl<'a> Strided<'a> {
    /// Returns the words from a group of a panel on.
    #[inline(always)]
    pub(crate) fn from(self, panel: usize, group: usize) -> &'a [f32] {
        &self.words[panel * self.panel + group * self.group..]
    }

    /// Returns the same weights, with another panel as the first.
    #[inline(always)]
    pub(crate) fn starting_at(self, panel: usize) -> Strided<'a> {
        Strided { words: self.from(panel, 0), ..self }
    }

    /// Returns a group of a panel.
    #[inline(always)]
    fn group(self, panel: usize, group: usize, steps: usize) -> &'a [[f32; PANEL]] {
        self.from(panel, group)[..steps * PANEL].as_chunks().0
    }
}

/// Adds the products of short rows with panels to rows of strips.
pub(crate) struct AddToStrips<'a, M, const R: usize> {
    /// A strip of `strip_len` rows for each panel.
    pub(crate) strips: &'a mut [[f32; PANEL]],
    pub(crate) strip_len: usize,
    /// Rows of [`GROUP`] values: group g of row r is row `g * group_rows + r`.
    pub(crate) a: &'a [f32],
    pub(crate) group_rows: usize,
    /// A multiple of R.
    pub(crate) rows: Range<usize>,
    pub(crate) to: Places<'a>,
    /// The weights of the first panel, and of the panels after it, for some groups.
    pub(crate) b: Strided<'a>,
    pub(crate) groups: Range<usize>,
    /// The values that are read next: the first words are prefetched, unless this is empty.
    pub(crate) next: &'a [f32],
    pub(crate) step: PhantomData<M>,
}

impl<M: Step, const R: usize> ProductKernel for AddToStrips<'_, M, R> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let AddToStrips { strips, strip_len, a, group_rows, rows, to, b, groups, next, .. } = self;
        let panels = strips.len() / strip_len;
        let panels_ahead = AHEAD.div_ceil(M::GROUP_STEPS * PANEL);
        for (panel, strip) in strips.chunks_exact_mut(strip_len).enumerate() {
            let ahead = (!next.is_empty()).then(|| match panel + panels_ahead {
                ahead if ahead < panels => b.from(ahead, groups.start),
                ahead => &next[next.len().min((ahead - panels) * M::GROUP_STEPS * PANEL)..],
            });
            for row in rows.clone().step_by(R) {
                for first in (0..PANEL).step_by(2 * S::LANES) {
                    // From the sums so far, so that the number of groups of a call does not change a bit. By a loop: what
                    // `array::from_fn` calls is not compiled with the tier's features, and the sums would lie in memory.
                    let mut acc: Sums<S::V, R> = [[s.splat(0.0); 2]; R];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let sums = strip[to.of(row + r)][first..].chunks_exact(S::LANES);
                        acc.iter_mut().zip(sums).for_each(|(acc, sums)| *acc = s.load(sums));
                    }
                    for (i, group) in groups.clone().enumerate() {
                        let b = b.group(panel, group, M::GROUP_STEPS);
                        let a = &a[(i * group_rows + row) * M::GROUP_WORDS..][..R * M::GROUP_WORDS];
                        let a = std::array::from_fn(|r| &a[r * M::GROUP_WORDS..(r + 1) * M::GROUP_WORDS]);
                        match ahead.filter(|_| row == rows.start && first == 0 && i == 0) {
                            Some(ahead) => accumulate_and_fetch::<S, M, R>(s, &mut acc, a, (b, first), ahead),
                            None => accumulate::<S, M, R>(s, &mut acc, a, (b, first)),
                        }
                    }
                    for (r, acc) in acc.into_iter().enumerate() {
                        let sums = strip[to.of(row + r)][first..].chunks_exact_mut(S::LANES);
                        sums.zip(acc).for_each(|(sums, acc)| s.store(sums, acc));
                    }
                }
            }
        }
    }
}
