//! The activations of gated units, in the form `a gate(a)`.

use crate::simd::{Simd, clamp, sigmoid};

/// The activation of a gated unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `a sigmoid(a)`
    #[default]
    Silu,
    /// `0.5 a (1 + tanh(u))` with `u = sqrt(2 / pi) (a + 0.044715 a^3)`, the approximation of GELU by tanh.
    GeluTanh,
}

/// The vector form of an activation `a gate(a)`.
pub(crate) trait Unit: Copy + Send + Sync {
    /// Returns the gate.
    fn gate<S: Simd>(self, s: S, a: S::V) -> S::V;
    /// Returns the derivative of the activation, where `gate` is the gate of `a`.
    fn slope<S: Simd>(self, s: S, a: S::V, gate: S::V) -> S::V;
}

/// [`Activation::Silu`]
#[derive(Clone, Copy)]
pub(crate) struct Silu;

/// [`Activation::GeluTanh`]
#[derive(Clone, Copy)]
pub(crate) struct GeluTanh;

/// Evaluates `$body` with `$unit` bound to the vector form of an activation.
macro_rules! with_unit {
    ($activation:expr, $unit:ident => $body:expr) => {
        match $activation {
            $crate::swiglu::Activation::Silu => {
                let $unit = $crate::swiglu::activation::Silu;
                $body
            }
            $crate::swiglu::Activation::GeluTanh => {
                let $unit = $crate::swiglu::activation::GeluTanh;
                $body
            }
        }
    };
}
pub(crate) use with_unit;

impl Unit for Silu {
    #[inline(always)]
    fn gate<S: Simd>(self, s: S, a: S::V) -> S::V {
        sigmoid(s, a)
    }

    /// With g = sigmoid(a): `g (1 + a (1 - g))`.
    #[inline(always)]
    fn slope<S: Simd>(self, s: S, a: S::V, gate: S::V) -> S::V {
        let one = s.splat(1.0);
        s.mul(gate, s.fma(a, s.sub(one, gate), one))
    }
}

/// `2 sqrt(2 / pi)`
const LINEAR: f32 = 1.595_769_2;
/// `2 sqrt(2 / pi) 0.044715`
const CUBIC: f32 = 0.071_354_82;

impl Unit for GeluTanh {
    /// `0.5 (1 + tanh(u))` is `sigmoid(2 u)`, which has no cancellation for negative u.
    #[inline(always)]
    fn gate<S: Simd>(self, s: S, a: S::V) -> S::V {
        let factor = s.fma(s.splat(CUBIC), s.mul(a, a), s.splat(LINEAR));
        sigmoid(s, s.mul(a, factor))
    }

    /// With g = sigmoid(w) and w = 2 u: `g (1 + a w' (1 - g))`.
    #[inline(always)]
    fn slope<S: Simd>(self, s: S, a: S::V, gate: S::V) -> S::V {
        let one = s.splat(1.0);
        // Far outside the gate is 0 or 1; the square of a must not overflow there.
        let a = clamp(s, a, [-20.0, 20.0]);
        let derivative = s.fma(s.splat(3.0 * CUBIC), s.mul(a, a), s.splat(LINEAR));
        s.mul(gate, s.fma(s.mul(a, derivative), s.sub(one, gate), one))
    }
}
