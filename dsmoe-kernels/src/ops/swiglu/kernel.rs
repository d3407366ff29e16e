//! Vector bodies.

use super::activation::Unit;
use crate::simd::{Kernel, Simd};

/// See [`super::Forward`].
pub(super) struct Forward<'a, A> {
    pub(super) c: &'a mut [f32],
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) unit: A,
}

impl<A: Unit> Kernel for Forward<'_, A> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Forward { c, a, b, unit } = self;
        let head = c.len() - c.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            s.store(&mut c[j..], forward(s, unit, s.load(&a[j..]), s.load(&b[j..])));
        }
        if head < c.len() {
            s.store_tail(&mut c[head..], forward(s, unit, s.load_tail(&a[head..]), s.load_tail(&b[head..])));
        }
    }
}

#[inline(always)]
fn forward<S: Simd, A: Unit>(s: S, unit: A, a: S::V, b: S::V) -> S::V {
    s.mul(s.mul(a, unit.gate(s, a)), b)
}

/// See [`super::Backward`].
pub(super) struct Backward<'a, A> {
    pub(super) da: &'a mut [f32],
    pub(super) db: &'a mut [f32],
    pub(super) dc: &'a [f32],
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) unit: A,
}

impl<A: Unit> Kernel for Backward<'_, A> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Backward { da, db, dc, a, b, unit } = self;
        let head = dc.len() - dc.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            let (x, y) = backward(s, unit, s.load(&dc[j..]), [s.load(&a[j..]), s.load(&b[j..])]);
            s.store(&mut da[j..], x);
            s.store(&mut db[j..], y);
        }
        if head < dc.len() {
            let (dc, a, b) = (s.load_tail(&dc[head..]), s.load_tail(&a[head..]), s.load_tail(&b[head..]));
            let (x, y) = backward(s, unit, dc, [a, b]);
            s.store_tail(&mut da[head..], x);
            s.store_tail(&mut db[head..], y);
        }
    }
}

/// Returns `(da, db)`.
#[inline(always)]
fn backward<S: Simd, A: Unit>(s: S, unit: A, dc: S::V, [a, b]: [S::V; 2]) -> (S::V, S::V) {
    let gate = unit.gate(s, a);
    let slope = unit.slope(s, a, gate);
    (s.mul(s.mul(dc, b), slope), s.mul(dc, s.mul(a, gate)))
}
