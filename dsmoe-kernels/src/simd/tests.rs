use super::{Kernel, Simd, exp, max_of, sigmoid, tanh};
use crate::isa::Isa;
use crate::testing::sized;

/// Applies one function to every value of `x`, in place.
struct Apply<'a> {
    x: &'a mut [f32],
    function: Function,
}

#[derive(Clone, Copy, Debug)]
enum Function {
    Exp,
    Sigmoid,
    Silu,
    Tanh,
}

impl Kernel for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(S::LANES) {
            let v = s.load_tail(x);
            let y = match self.function {
                Function::Exp => exp(s, v),
                Function::Sigmoid => sigmoid(s, v),
                Function::Silu => s.mul(v, sigmoid(s, v)),
                Function::Tanh => tanh(s, v),
            };
            s.store_tail(x, y);
        }
    }
}

impl Function {
    fn of(self, isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        isa.run(Apply { x: &mut y, function: self });
        y
    }

    fn exact(self, x: f64) -> f64 {
        match self {
            Function::Exp => x.exp(),
            Function::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Function::Silu => x / (1.0 + (-x).exp()),
            Function::Tanh => x.tanh(),
        }
    }
}

/// Distance of `got` from `want` in units of the last place of `want` as an f32.
fn ulps(got: f32, want: f64) -> f64 {
    let near = (want as f32).abs().max(f32::MIN_POSITIVE);
    let unit = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
    (f64::from(got) - want).abs() / unit
}

/// Every 4099th float of magnitude up to `limit`, both signs; under Miri one in four million.
fn sweep(limit: f32) -> Vec<f32> {
    let magnitudes = (0..=limit.to_bits()).step_by(sized(4099, 4_000_037)).map(f32::from_bits);
    magnitudes.flat_map(|x| [x, -x]).collect()
}

#[test]
fn elementary_functions_are_within_their_ulps_on_every_tier() {
    for (function, limit, bound) in [
        (Function::Exp, 87.3, 2.0),
        (Function::Sigmoid, 87.0, 3.5),
        (Function::Silu, 87.0, 4.0),
        (Function::Tanh, 90.0, 4.0),
    ] {
        let xs = sweep(limit);
        for isa in Isa::available() {
            let worst = xs
                .iter()
                .zip(function.of(isa, &xs))
                .map(|(&x, y)| (ulps(y, function.exact(f64::from(x))), x))
                .fold((0.0, 0.0), |worst, here| if here.0 > worst.0 { here } else { worst });
            assert!(worst.0 <= bound, "{function:?} {}: {} ULP at {}", isa.name(), worst.0, worst.1);
        }
    }
}

#[test]
fn elementary_functions_keep_nan_and_saturate() {
    for isa in Isa::available() {
        for function in [Function::Exp, Function::Sigmoid, Function::Silu, Function::Tanh] {
            assert!(function.of(isa, &[f32::NAN])[0].is_nan(), "{function:?} {}", isa.name());
        }
        let far = [f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY];
        let e = Function::Exp.of(isa, &far);
        assert!(e[0] == e[1] && e[0] > 0.0 && e[0] < 2e-38, "{e:?}");
        assert!(e[2] == e[3] && e[3] > 2e38 && e[3].is_finite(), "{e:?}");
        let p = Function::Sigmoid.of(isa, &far);
        assert!(p[0] < 1e-38 && p[3] == 1.0, "{p:?}");
        assert_eq!(Function::Tanh.of(isa, &far), [-1.0, -1.0, 1.0, 1.0]);
    }
}

struct MaxOf<'a>(&'a [f32]);

impl Kernel for MaxOf<'_> {
    type Output = f32;
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> f32 {
        max_of(s, self.0)
    }
}

#[test]
fn the_largest_value_is_found_wherever_it_is() {
    for isa in Isa::available() {
        assert_eq!(isa.run(MaxOf(&[])), f32::NEG_INFINITY);
        for len in [1, 7, 16, 40, 67] {
            for at in 0..len {
                let mut x = vec![-3.0; len];
                x[at] = -1.5;
                assert_eq!(isa.run(MaxOf(&x)), -1.5, "{} {at} of {len}", isa.name());
            }
        }
    }
}
