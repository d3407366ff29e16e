//! Vector bodies.

use crate::simd::{Kernel, Simd, dot};

/// A block of rows; see [`super::forward`].
pub(super) struct Forward<'a> {
    pub(super) y: &'a mut [f32],
    pub(super) rstd: &'a mut [f32],
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let hidden = self.weight.len();
        let rows = self.y.chunks_exact_mut(hidden).zip(self.x.chunks_exact(hidden));
        for ((y, x), rstd) in rows.zip(self.rstd) {
            *rstd = 1.0 / (dot(s, x, x) / hidden as f32 + self.eps).sqrt();
            let r = s.splat(*rstd);
            let head = hidden - hidden % S::LANES;
            for j in (0..head).step_by(S::LANES) {
                s.store(&mut y[j..], s.mul(s.mul(s.load(&x[j..]), r), s.load(&self.weight[j..])));
            }
            if head < hidden {
                let (x, w) = (s.load_tail(&x[head..]), s.load_tail(&self.weight[head..]));
                s.store_tail(&mut y[head..], s.mul(s.mul(x, r), w));
            }
        }
    }
}

/// A block of rows; adds its sums to `dweight`.
pub(super) struct Backward<'a> {
    pub(super) dx: &'a mut [f32],
    pub(super) dweight: &'a mut [f32],
    pub(super) dy: &'a [f32],
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) rstd: &'a [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let hidden = self.weight.len();
        let head = hidden - hidden % S::LANES;
        let rows = self.dx.chunks_exact_mut(hidden).zip(self.dy.chunks_exact(hidden));
        for ((dx, dy), (x, &rstd)) in rows.zip(self.x.chunks_exact(hidden).zip(self.rstd)) {
            // dx holds g = dy w until <g, x> is known.
            let mut sum = s.splat(0.0);
            let r = s.splat(rstd);
            for j in (0..head).step_by(S::LANES) {
                let (x, dy) = (s.load(&x[j..]), s.load(&dy[j..]));
                let g = s.mul(dy, s.load(&self.weight[j..]));
                sum = s.fma(g, x, sum);
                s.store(&mut dx[j..], g);
                let dweight = &mut self.dweight[j..];
                s.store(dweight, s.fma(s.mul(dy, r), x, s.load(dweight)));
            }
            if head < hidden {
                let (x, dy) = (s.load_tail(&x[head..]), s.load_tail(&dy[head..]));
                let g = s.mul(dy, s.load_tail(&self.weight[head..]));
                sum = s.fma(g, x, sum);
                s.store_tail(&mut dx[head..], g);
                let dweight = &mut self.dweight[head..];
                s.store_tail(dweight, s.fma(s.mul(dy, r), x, s.load_tail(dweight)));
            }
            let slope = s.splat(-rstd * rstd * s.reduce_add(sum) / hidden as f32);
            for j in (0..head).step_by(S::LANES) {
                let g = s.load(&dx[j..]);
                s.store(&mut dx[j..], s.mul(r, s.fma(slope, s.load(&x[j..]), g)));
            }
            if head < hidden {
                let g = s.load_tail(&dx[head..]);
                s.store_tail(&mut dx[head..], s.mul(r, s.fma(slope, s.load_tail(&x[head..]), g)));
            }
        }
    }
}
