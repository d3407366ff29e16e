//! Vector body.

use super::Hyper;
use crate::simd::{Kernel, Simd};

/// The step's scalars, rounded once.
#[derive(Clone, Copy)]
pub(super) struct Scalars {
    grad_scale: f32,
    kept: f32,
    beta1: f32,
    beta2: f32,
    gain1: f32,
    gain2: f32,
    rate: f32,
    correction: f32,
    eps: f32,
}

impl Scalars {
    pub(super) fn new(hyper: &Hyper, grad_scale: f32) -> Scalars {
        let [kept, rate, beta1, gain1, beta2, gain2, correction, eps] = hyper.factors();
        Scalars { grad_scale, kept, beta1, beta2, gain1, gain2, rate: -rate, correction, eps }
    }
}

/// One step of equally long slices.
pub(super) struct Step<'a> {
    pub(super) param: &'a mut [f32],
    pub(super) m: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    pub(super) grad: &'a [f32],
    pub(super) scalars: Scalars,
}

impl Kernel for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        let Step { param, m, v, grad, scalars } = self;
        let head = grad.len() - grad.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            let old = [s.load(&param[j..]), s.load(&m[j..]), s.load(&v[j..])];
            let [p, first, second] = step(s, old, s.load(&grad[j..]), scalars);
            s.store(&mut param[j..], p);
            s.store(&mut m[j..], first);
            s.store(&mut v[j..], second);
        }
        if head < grad.len() {
            let (param, m, v) = (&mut param[head..], &mut m[head..], &mut v[head..]);
            let old = [s.load_tail(param), s.load_tail(m), s.load_tail(v)];
            let [p, first, second] = step(s, old, s.load_tail(&grad[head..]), scalars);
            s.store_tail(param, p);
            s.store_tail(m, first);
            s.store_tail(v, second);
        }
    }
}

/// Returns the new `[p, m, v]`.
#[inline(always)]
fn step<S: Simd>(s: S, [p, m, v]: [S::V; 3], grad: S::V, scalars: Scalars) -> [S::V; 3] {
    let g = s.mul(grad, s.splat(scalars.grad_scale));
    let m = s.fma(m, s.splat(scalars.beta1), s.mul(g, s.splat(scalars.gain1)));
    let v = s.fma(v, s.splat(scalars.beta2), s.mul(s.mul(g, g), s.splat(scalars.gain2)));
    let spread = s.fma(s.sqrt(v), s.splat(scalars.correction), s.splat(scalars.eps));
    let decayed = s.mul(p, s.splat(scalars.kept));
    [s.fma(s.splat(scalars.rate), s.div(m, spread), decayed), m, v]
}

/// See [`super::sum_of_squares`].
pub(super) struct SumOfSquares<'a>(pub(super) &'a [f32]);

impl Kernel for SumOfSquares<'_> {
    type Output = f64;
    /// Uses plain loops: [`Simd`] has no f64, and the compiler vectorises these.
    #[inline(always)]
    fn body<S: Simd>(self, _: S) -> f64 {
        let mut lanes = [0.0f64; 32];
        let (whole, rest) = self.0.as_chunks::<32>();
        for x in whole {
            for (lane, &x) in lanes.iter_mut().zip(x) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}
