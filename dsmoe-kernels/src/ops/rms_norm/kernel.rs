//! Vector bodies.

use super::{Backward, Forward, ForwardSum, Heads, Restore};
use crate::add::Sum;
use crate::simd::{Kernel, Simd, dot};

/// The weight of a norm, or with OFFSET the sum of the weight and the offset.
#[derive(Clone, Copy)]
struct Weight<'a, const OFFSET: bool> {
    values: &'a [f32],
    offset: f32,
}

impl<const OFFSET: bool> Weight<'_, OFFSET> {
    #[inline(always)]
    fn load<S: Simd>(self, s: S, j: usize) -> S::V {
        self.shifted(s, s.load(&self.values[j..]))
    }

    #[inline(always)]
    fn load_tail<S: Simd>(self, s: S, j: usize) -> S::V {
        self.shifted(s, s.load_tail(&self.values[j..]))
    }

    #[inline(always)]
    fn shifted<S: Simd>(self, s: S, w: S::V) -> S::V {
        if OFFSET { s.add(w, s.splat(self.offset)) } else { w }
    }
}

#[inline(always)]
fn rstd_of<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt()
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Forward { y, rstd, x, weight, offset, eps } = self;
        let hidden = weight.len();
        let rows = y.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden));
        for ((y, x), rstd) in rows.zip(rstd) {
            *rstd = rstd_of(s, x, eps);
            scale(s, y, x, (weight, offset), *rstd);
        }
    }
}

impl Kernel for ForwardSum<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let ForwardSum { y, rstd, x, a, b, weight, offset, eps } = self;
        let hidden = weight.len();
        let rows = y.chunks_exact_mut(hidden).zip(rstd).zip(x.chunks_exact_mut(hidden));
        for (((y, rstd), x), (a, b)) in rows.zip(a.chunks_exact(hidden).zip(b.chunks_exact(hidden))) {
            Sum { out: x, a, b }.body(s);
            Forward { y, rstd: std::slice::from_mut(rstd), x, weight, offset, eps }.body(s);
        }
    }
}

impl Kernel for Restore<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Restore { y, x, weight, offset, rstd } = self;
        let hidden = weight.len();
        let rows = y.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden));
        for ((y, x), &rstd) in rows.zip(rstd) {
            scale(s, y, x, (weight, offset), rstd);
        }
    }
}

/// Sets `y = x rstd (w + offset)` of one row.
#[inline(always)]
fn scale<S: Simd>(s: S, y: &mut [f32], x: &[f32], (values, offset): (&[f32], f32), rstd: f32) {
    if offset == 0.0 {
        scale_by(s, y, x, Weight::<false> { values, offset }, rstd);
    } else {
        scale_by(s, y, x, Weight::<true> { values, offset }, rstd);
    }
}

#[inline(always)]
fn scale_by<S: Simd, const OFFSET: bool>(
    s: S,
    y: &mut [f32],
    x: &[f32],
    weight: Weight<'_, OFFSET>,
    rstd: f32,
) {
    let r = s.splat(rstd);
    let head = y.len() - y.len() % S::LANES;
    for j in (0..head).step_by(S::LANES) {
        s.store(&mut y[j..], s.mul(s.mul(s.load(&x[j..]), r), weight.load(s, j)));
    }
    if head < y.len() {
        let (x, w) = (s.load_tail(&x[head..]), weight.load_tail(s, head));
        s.store_tail(&mut y[head..], s.mul(s.mul(x, r), w));
    }
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Backward { dx, dweight, dy, x, weight, offset, rstd, add } = self;
        let hidden = weight.len();
        let rows = dx.chunks_exact_mut(hidden).zip(dy.chunks_exact(hidden));
        for ((dx, dy), (x, &rstd)) in rows.zip(x.chunks_exact(hidden).zip(rstd)) {
            Row { dx, dweight, dy, x, rstd, add }.backward(s, weight, offset);
        }
    }
}

/// The operands of the backward of one row.
struct Row<'a> {
    dx: &'a mut [f32],
    dweight: &'a mut [f32],
    dy: &'a [f32],
    x: &'a [f32],
    rstd: f32,
    add: bool,
}

impl Row<'_> {
    #[inline(always)]
    fn backward<S: Simd>(self, s: S, values: &[f32], offset: f32) {
        if offset == 0.0 {
            self.run(s, Weight::<false> { values, offset });
        } else {
            self.run(s, Weight::<true> { values, offset });
        }
    }

    #[inline(always)]
    fn run<S: Simd, const OFFSET: bool>(self, s: S, weight: Weight<'_, OFFSET>) {
        let Row { dx, dweight, dy, x, rstd, add } = self;
        let hidden = weight.values.len();
        let head = hidden - hidden % S::LANES;
        let mut sum = s.splat(0.0);
        let r = s.splat(rstd);
        for j in (0..head).step_by(S::LANES) {
            let (x, dy) = (s.load(&x[j..]), s.load(&dy[j..]));
            sum = s.fma(s.mul(dy, weight.load(s, j)), x, sum);
            let dweight = &mut dweight[j..];
            s.store(dweight, s.fma(s.mul(dy, r), x, s.load(dweight)));
        }
        if head < hidden {
            let (x, dy) = (s.load_tail(&x[head..]), s.load_tail(&dy[head..]));
            sum = s.fma(s.mul(dy, weight.load_tail(s, head)), x, sum);
            let dweight = &mut dweight[head..];
            s.store_tail(dweight, s.fma(s.mul(dy, r), x, s.load_tail(dweight)));
        }
        let slope = s.splat(-rstd * rstd * s.reduce_add(sum) / hidden as f32);
        for j in (0..head).step_by(S::LANES) {
            let g = s.mul(s.load(&dy[j..]), weight.load(s, j));
            let g = s.mul(r, s.fma(slope, s.load(&x[j..]), g));
            let dx = &mut dx[j..];
            s.store(dx, if add { s.add(s.load(dx), g) } else { g });
        }
        if head < hidden {
            let g = s.mul(s.load_tail(&dy[head..]), weight.load_tail(s, head));
            let g = s.mul(r, s.fma(slope, s.load_tail(&x[head..]), g));
            let dx = &mut dx[head..];
            s.store_tail(dx, if add { s.add(s.load_tail(dx), g) } else { g });
        }
    }
}

/// Norms the heads of some rows in place; see [`ForwardHeads`](super::ForwardHeads).
pub(super) struct NormHeads<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) rstd: &'a mut [f32],
    pub(super) weight: &'a [f32],
    pub(super) heads: Heads,
}

impl Kernel for NormHeads<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let NormHeads { x, rstd, weight, heads: Heads { heads, stride, offset, eps } } = self;
        let width = heads * weight.len();
        for (x, rstd) in x.chunks_mut(stride).zip(rstd.chunks_exact_mut(heads)) {
            for (x, rstd) in x[..width].chunks_exact_mut(weight.len()).zip(rstd) {
                *rstd = rstd_of(s, x, eps);
                if offset == 0.0 {
                    scale_in_place(s, x, Weight::<false> { values: weight, offset }, *rstd);
                } else {
                    scale_in_place(s, x, Weight::<true> { values: weight, offset }, *rstd);
                }
            }
        }
    }
}

#[inline(always)]
fn scale_in_place<S: Simd, const OFFSET: bool>(s: S, x: &mut [f32], weight: Weight<'_, OFFSET>, rstd: f32) {
    let r = s.splat(rstd);
    let head = x.len() - x.len() % S::LANES;
    for j in (0..head).step_by(S::LANES) {
        let x = &mut x[j..];
        s.store(x, s.mul(s.mul(s.load(x), r), weight.load(s, j)));
    }
    if head < x.len() {
        let x = &mut x[head..];
        s.store_tail(x, s.mul(s.mul(s.load_tail(x), r), weight.load_tail(s, head)));
    }
}

/// Turns dy into dx, in place, for the heads of some rows, and adds to `dweight`; see
/// [`BackwardHeads`](super::BackwardHeads).
pub(super) struct NormHeadsBackward<'a> {
    pub(super) dx: &'a mut [f32],
    pub(super) dweight: &'a mut [f32],
    /// The dy of one head: the first values of dx are set before the last ones of dy are read.
    pub(super) dy: &'a mut [f32],
    pub(super) x: &'a [f32],
    pub(super) rstd: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) heads: Heads,
}

impl Kernel for NormHeadsBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let NormHeadsBackward { dx, dweight, dy, x, rstd, weight, heads } = self;
        let Heads { heads, stride, offset, .. } = heads;
        let (head_dim, width) = (weight.len(), heads * weight.len());
        let rows = dx.chunks_mut(stride).zip(x.chunks_exact(width)).zip(rstd.chunks_exact(heads));
        for ((dx, x), rstd) in rows {
            let heads = dx[..width].chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim));
            for ((dx, x), &rstd) in heads.zip(rstd) {
                dy.copy_from_slice(dx);
                Row { dx, dweight, dy, x, rstd, add: false }.backward(s, weight, offset);
            }
        }
    }
}
