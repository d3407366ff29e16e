//! Vector bodies.

use super::{Backward, Forward, ForwardSum, Restore};
use crate::add::Sum;
use crate::simd::{Kernel, Simd, dot};

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let hidden = self.weight.len();
        let rows = self.y.chunks_exact_mut(hidden).zip(self.x.chunks_exact(hidden));
        for ((y, x), rstd) in rows.zip(self.rstd) {
            *rstd = 1.0 / (dot(s, x, x) / hidden as f32 + self.eps).sqrt();
            scale(s, y, x, self.weight, *rstd);
        }
    }
}

impl Kernel for ForwardSum<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let ForwardSum { y, rstd, x, a, b, weight, eps } = self;
        let hidden = weight.len();
        let rows = y.chunks_exact_mut(hidden).zip(rstd).zip(x.chunks_exact_mut(hidden));
        for (((y, rstd), x), (a, b)) in rows.zip(a.chunks_exact(hidden).zip(b.chunks_exact(hidden))) {
            Sum { out: x, a, b }.body(s);
            Forward { y, rstd: std::slice::from_mut(rstd), x, weight, eps }.body(s);
        }
    }
}

impl Kernel for Restore<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let hidden = self.weight.len();
        let rows = self.y.chunks_exact_mut(hidden).zip(self.x.chunks_exact(hidden));
        for ((y, x), &rstd) in rows.zip(self.rstd) {
            scale(s, y, x, self.weight, rstd);
        }
    }
}

/// Sets `y = x rstd w` of one row.
#[inline(always)]
fn scale<S: Simd>(s: S, y: &mut [f32], x: &[f32], weight: &[f32], rstd: f32) {
    let r = s.splat(rstd);
    let head = y.len() - y.len() % S::LANES;
    for j in (0..head).step_by(S::LANES) {
        s.store(&mut y[j..], s.mul(s.mul(s.load(&x[j..]), r), s.load(&weight[j..])));
    }
    if head < y.len() {
        let (x, w) = (s.load_tail(&x[head..]), s.load_tail(&weight[head..]));
        s.store_tail(&mut y[head..], s.mul(s.mul(x, r), w));
    }
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Backward { dx, dweight, dy, x, weight, rstd, add } = self;
        let hidden = weight.len();
        let head = hidden - hidden % S::LANES;
        let rows = dx.chunks_exact_mut(hidden).zip(dy.chunks_exact(hidden));
        for ((dx, dy), (x, &rstd)) in rows.zip(x.chunks_exact(hidden).zip(rstd)) {
            let mut sum = s.splat(0.0);
            let r = s.splat(rstd);
            for j in (0..head).step_by(S::LANES) {
                let (x, dy) = (s.load(&x[j..]), s.load(&dy[j..]));
                sum = s.fma(s.mul(dy, s.load(&weight[j..])), x, sum);
                let dweight = &mut dweight[j..];
                s.store(dweight, s.fma(s.mul(dy, r), x, s.load(dweight)));
            }
            if head < hidden {
                let (x, dy) = (s.load_tail(&x[head..]), s.load_tail(&dy[head..]));
                sum = s.fma(s.mul(dy, s.load_tail(&weight[head..])), x, sum);
                let dweight = &mut dweight[head..];
                s.store_tail(dweight, s.fma(s.mul(dy, r), x, s.load_tail(dweight)));
            }
            let slope = s.splat(-rstd * rstd * s.reduce_add(sum) / hidden as f32);
            for j in (0..head).step_by(S::LANES) {
                let g = s.mul(s.load(&dy[j..]), s.load(&weight[j..]));
                let g = s.mul(r, s.fma(slope, s.load(&x[j..]), g));
                let dx = &mut dx[j..];
                s.store(dx, if add { s.add(s.load(dx), g) } else { g });
            }
            if head < hidden {
                let g = s.mul(s.load_tail(&dy[head..]), s.load_tail(&weight[head..]));
                let g = s.mul(r, s.fma(slope, s.load_tail(&x[head..]), g));
                let dx = &mut dx[head..];
                s.store_tail(dx, if add { s.add(s.load_tail(dx), g) } else { g });
            }
        }
    }
}
