//! Vector bodies.

use super::{Backward, Forward};
use crate::simd::{Kernel, Simd, sigmoid};

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Forward { c, a, b } = self;
        let head = c.len() - c.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            s.store(&mut c[j..], forward(s, s.load(&a[j..]), s.load(&b[j..])));
        }
        if head < c.len() {
            s.store_tail(&mut c[head..], forward(s, s.load_tail(&a[head..]), s.load_tail(&b[head..])));
        }
    }
}

#[inline(always)]
fn forward<S: Simd>(s: S, a: S::V, b: S::V) -> S::V {
    s.mul(s.mul(a, sigmoid(s, a)), b)
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Backward { da, db, dc, a, b } = self;
        let head = dc.len() - dc.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            let (x, y) = backward(s, s.load(&dc[j..]), s.load(&a[j..]), s.load(&b[j..]));
            s.store(&mut da[j..], x);
            s.store(&mut db[j..], y);
        }
        if head < dc.len() {
            let (dc, a, b) = (s.load_tail(&dc[head..]), s.load_tail(&a[head..]), s.load_tail(&b[head..]));
            let (x, y) = backward(s, dc, a, b);
            s.store_tail(&mut da[head..], x);
            s.store_tail(&mut db[head..], y);
        }
    }
}

/// Returns `(da, db)`.
#[inline(always)]
fn backward<S: Simd>(s: S, dc: S::V, a: S::V, b: S::V) -> (S::V, S::V) {
    let one = s.splat(1.0);
    let gate = sigmoid(s, a);
    let slope = s.mul(gate, s.fma(a, s.sub(one, gate), one));
    (s.mul(s.mul(dc, b), slope), s.mul(dc, s.mul(a, gate)))
}
