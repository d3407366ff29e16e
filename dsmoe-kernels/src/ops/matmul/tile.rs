//! The innermost products: a few rows of A with one or two panels of B, sums in registers.
//!
//! A pass sums from zero and adds its sums at its end, so rounding errors grow with the depth of a pass and the
//! number of passes, not with the whole inner dimension.

use super::pack::PANEL;
use crate::simd::{Product, ProductKernel};

/// The operands of one pass.
#[derive(Clone, Copy)]
pub(super) enum Depth<'a, const P: usize> {
    /// A tile and panels in f32.
    F32(&'a [f32], [&'a [f32]; P]),
    /// A tile in f32, and panels in pairs that the pass widens.
    Widened(&'a [f32], [&'a [u32]; P]),
    /// Both in pairs.
    Pairs(&'a [u32], [&'a [u32]; P]),
}

/// Memory that a pass prefetches, a little with every k.
#[derive(Clone, Copy)]
pub(super) struct Next<'a> {
    /// `line_step` values, a cache line at least, with every k.
    pub(super) line: &'a [f32],
    pub(super) line_step: usize,
    /// `step` values with every k.
    pub(super) part: &'a [f32],
    pub(super) step: usize,
}

impl Next<'_> {
    #[inline(always)]
    fn ask<S: Product>(self, s: S, k: usize) {
        s.prefetch(self.line, k * self.line_step);
        s.prefetch(self.part, k * self.step);
    }
}

/// Sets `sums[p]`, `[rows, PANEL]`, to the product of the tile with panel p, or adds to it if `resume`. Prefetches the
/// memory of `next`.
#[inline(always)]
pub(super) fn product<S: Product, const P: usize>(
    s: S,
    rows: usize,
    depth: Depth<'_, P>,
    sums: [&mut [f32]; P],
    resume: bool,
    next: Next<'_>,
) {
    match rows {
        1 => tile::<S, 1, P>(s, depth, sums, resume, next),
        2 => tile::<S, 2, P>(s, depth, sums, resume, next),
        3 if const { 3 <= S::ROWS } => tile::<S, 3, P>(s, depth, sums, resume, next),
        4 if const { 4 <= S::ROWS } => tile::<S, 4, P>(s, depth, sums, resume, next),
        5 if const { 5 <= S::ROWS } => tile::<S, 5, P>(s, depth, sums, resume, next),
        6 if const { 6 <= S::ROWS } => tile::<S, 6, P>(s, depth, sums, resume, next),
        7 if const { 7 <= S::ROWS && P == 1 } => tile::<S, 7, P>(s, depth, sums, resume, next),
        8 if const { 8 <= S::ROWS && P == 1 } => tile::<S, 8, P>(s, depth, sums, resume, next),
        9 if const { 9 <= S::ROWS && P == 1 } => tile::<S, 9, P>(s, depth, sums, resume, next),
        10 if const { 10 <= S::ROWS && P == 1 } => tile::<S, 10, P>(s, depth, sums, resume, next),
        11 if const { 11 <= S::ROWS && P == 1 } => tile::<S, 11, P>(s, depth, sums, resume, next),
        12 if const { 12 <= S::ROWS && P == 1 } => tile::<S, 12, P>(s, depth, sums, resume, next),
        13 if const { 13 <= S::ROWS && P == 1 } => tile::<S, 13, P>(s, depth, sums, resume, next),
        _ => unreachable!("{rows} rows in a tile with {P} panels"),
    }
}

/// Two registers of every panel, for each row.
type Sums<V, const R: usize, const P: usize> = [[[V; 2]; P]; R];

#[inline(always)]
fn tile<S: Product, const R: usize, const P: usize>(
    s: S,
    depth: Depth<'_, P>,
    sums: [&mut [f32]; P],
    resume: bool,
    next: Next<'_>,
) {
    match depth {
        Depth::F32(a, b) => s.isolated(Tile::<_, R, P> { pass: F32s { a, b, next }, sums, resume }),
        Depth::Widened(a, b) if const { !S::DOTS } => {
            s.isolated(Tile::<_, R, P> { pass: Widened { a, b, next }, sums, resume })
        }
        Depth::Pairs(a, b) if const { S::DOTS } => {
            s.isolated(Tile::<_, R, P> { pass: Dots { a, b, next }, sums, resume })
        }
        _ => unreachable!("pairs are widened exactly where there is no product of them"),
    }
}

/// The sums of R rows with P panels.
struct Tile<'a, T, const R: usize, const P: usize> {
    pass: T,
    sums: [&'a mut [f32]; P],
    resume: bool,
}

/// The inner loop of a tile.
trait Pass<const R: usize, const P: usize> {
    /// Adds the products of the pass to `acc`. `ask` also prefetches the memory of the next pass.
    fn add<S: Product>(&self, s: S, acc: &mut Sums<S::V, R, P>, at: [usize; 2], ask: bool);
}

impl<T: Pass<R, P>, const R: usize, const P: usize> ProductKernel for Tile<'_, T, R, P> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Tile { pass, sums, resume } = self;
        // Neighbours: a cache line of the panel is read by one pass, not by two.
        for first in (0..PANEL).step_by(2 * S::LANES) {
            let at = [first, first + S::LANES];
            let mut acc: Sums<S::V, R, P> = [[[s.splat(0.0); 2]; P]; R];
            pass.add(s, &mut acc, at, first == 0);
            for r in 0..R {
                for p in 0..P {
                    for v in 0..2 {
                        let sum = &mut sums[p][r * PANEL + at[v]..];
                        let old = if resume { s.load(sum) } else { s.splat(0.0) };
                        s.store(sum, s.add(old, acc[r][p][v]));
                    }
                }
            }
        }
    }
}

struct F32s<'a, const P: usize> {
    a: &'a [f32],
    b: [&'a [f32]; P],
    next: Next<'a>,
}

impl<const R: usize, const P: usize> Pass<R, P> for F32s<'_, P> {
    #[inline(always)]
    fn add<S: Product>(&self, s: S, acc: &mut Sums<S::V, R, P>, at: [usize; 2], ask: bool) {
        let F32s { a, b, next } = *self;
        let a = a.as_chunks::<R>().0;
        let b = b.map(|b| &b.as_chunks::<PANEL>().0[..a.len()]);
        for (k, a) in a.iter().enumerate() {
            if ask {
                next.ask(s, k);
            }
            let mut columns = [[s.splat(0.0); 2]; P];
            for p in 0..P {
                for v in 0..2 {
                    columns[p][v] = s.load(&b[p][k][at[v]..]);
                }
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = s.splat_of(a, r);
                for p in 0..P {
                    for v in 0..2 {
                        acc[p][v] = s.fma(x, columns[p][v], acc[p][v]);
                    }
                }
            }
        }
    }
}

struct Widened<'a, const P: usize> {
    a: &'a [f32],
    b: [&'a [u32]; P],
    next: Next<'a>,
}

impl<const R: usize, const P: usize> Pass<R, P> for Widened<'_, P> {
    #[inline(always)]
    fn add<S: Product>(&self, s: S, acc: &mut Sums<S::V, R, P>, at: [usize; 2], ask: bool) {
        let Widened { a, b, next } = *self;
        let a = a.as_chunks::<R>().0.as_chunks::<2>().0;
        let b = b.map(|b| &b.as_chunks::<PANEL>().0[..a.len()]);
        for (k, [even, odd]) in a.iter().enumerate() {
            if ask {
                next.ask(s, k);
            }
            let mut columns = [[(s.splat(0.0), s.splat(0.0)); 2]; P];
            for p in 0..P {
                for v in 0..2 {
                    columns[p][v] = s.widen(&b[p][k][at[v]..]);
                }
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let (x, y) = (s.splat_of(even, r), s.splat_of(odd, r));
                for p in 0..P {
                    for v in 0..2 {
                        acc[p][v] = s.fma(x, columns[p][v].0, acc[p][v]);
                        acc[p][v] = s.fma(y, columns[p][v].1, acc[p][v]);
                    }
                }
            }
        }
    }
}

struct Dots<'a, const P: usize> {
    a: &'a [u32],
    b: [&'a [u32]; P],
    next: Next<'a>,
}

impl<const R: usize, const P: usize> Pass<R, P> for Dots<'_, P> {
    #[inline(always)]
    fn add<S: Product>(&self, s: S, acc: &mut Sums<S::V, R, P>, at: [usize; 2], ask: bool) {
        let Dots { a, b, next } = *self;
        let a = a.as_chunks::<R>().0;
        let b = b.map(|b| &b.as_chunks::<PANEL>().0[..a.len()]);
        for (k, a) in a.iter().enumerate() {
            if ask {
                next.ask(s, k);
            }
            for r in 0..R {
                for p in 0..P {
                    for v in 0..2 {
                        acc[r][p][v] = s.dot(acc[r][p][v], a[r], &b[p][k][at[v]..]);
                    }
                }
            }
        }
    }
}
