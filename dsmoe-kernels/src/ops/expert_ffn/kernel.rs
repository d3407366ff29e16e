//! Vector bodies: the SwiGLU unit forward and backward, and products with a few rows.

use crate::simd::{Kernel, Simd, sigmoid};

/// `a[r, j] = coefficient(r) * silu(a[r, j]) * b[r, j]`, rows of `neurons` values.
pub(super) struct GateInPlace<'a, C> {
    pub(super) a: &'a mut [f32],
    pub(super) b: &'a [f32],
    pub(super) neurons: usize,
    pub(super) coefficient: C,
}

impl<C: Fn(usize) -> f32> Kernel for GateInPlace<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (r, (a, b)) in
            self.a.chunks_exact_mut(self.neurons).zip(self.b.chunks_exact(self.neurons)).enumerate()
        {
            let coefficient = s.splat((self.coefficient)(r));
            let mut head = a.chunks_exact_mut(S::LANES);
            let mut bs = b.chunks_exact(S::LANES);
            for (a, b) in (&mut head).zip(&mut bs) {
                s.store(a, gated(s, s.load(a), s.load(b), coefficient));
            }
            let tail = head.into_remainder();
            if !tail.is_empty() {
                s.store_tail(tail, gated(s, s.load_tail(tail), s.load_tail(bs.remainder()), coefficient));
            }
        }
    }
}

/// `silu(a) * b * g`. A function, as closures are not sure to be inlined into the tier's code.
#[inline(always)]
fn gated<S: Simd>(s: S, a: S::V, b: S::V, g: S::V) -> S::V {
    s.mul(s.mul(s.mul(a, sigmoid(s, a)), b), g)
}

/// `sum over j of silu(a[j]) * b[j] * g[j]`.
pub(super) struct GatedDot<'a> {
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) g: &'a [f32],
}

impl Kernel for GatedDot<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let GatedDot { a, b, g } = self;
        assert!(a.len() == b.len() && a.len() == g.len());
        let mut sum = s.splat(0.0);
        let head = a.len() - a.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            sum = s.add(sum, gated(s, s.load(&a[j..]), s.load(&b[j..]), s.load(&g[j..])));
        }
        if head < a.len() {
            let tail = gated(s, s.load_tail(&a[head..]), s.load_tail(&b[head..]), s.load_tail(&g[head..]));
            sum = s.add(sum, tail);
        }
        s.reduce_add(sum)
    }
}

/// One row of the SwiGLU backward: from a, b, g = `<dy, w_down>` and the pair's coefficient, sets da, db and
/// scaled = coefficient * silu(a) * b.
pub(super) struct GateBackward<'a> {
    pub(super) da: &'a mut [f32],
    pub(super) db: &'a mut [f32],
    pub(super) scaled: &'a mut [f32],
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) g: &'a [f32],
    pub(super) coefficient: f32,
}

impl Kernel for GateBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let GateBackward { da, db, scaled, a, b, g, coefficient } = self;
        let n = a.len();
        assert!([da.len(), db.len(), scaled.len(), b.len(), g.len()] == [n; 5]);
        let coefficient = s.splat(coefficient);
        let head = n - n % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            let (x, y, z) = gated_backward(s, s.load(&a[j..]), s.load(&b[j..]), s.load(&g[j..]), coefficient);
            s.store(&mut da[j..], x);
            s.store(&mut db[j..], y);
            s.store(&mut scaled[j..], z);
        }
        if head < n {
            let (x, y, z) = gated_backward(
                s,
                s.load_tail(&a[head..]),
                s.load_tail(&b[head..]),
                s.load_tail(&g[head..]),
                coefficient,
            );
            s.store_tail(&mut da[head..], x);
            s.store_tail(&mut db[head..], y);
            s.store_tail(&mut scaled[head..], z);
        }
    }
}

/// `(da, db, scaled)` of [`GateBackward`].
#[inline(always)]
fn gated_backward<S: Simd>(s: S, a: S::V, b: S::V, g: S::V, coefficient: S::V) -> (S::V, S::V, S::V) {
    let one = s.splat(1.0);
    let gate = sigmoid(s, a);
    let silu = s.mul(a, gate);
    let dc = s.mul(coefficient, g);
    // silu'(a) = s (1 + a (1 - s)) with s = sigmoid(a)
    let slope = s.mul(gate, s.fma(a, s.sub(one, gate), one));
    (s.mul(s.mul(dc, b), slope), s.mul(dc, silu), s.mul(coefficient, s.mul(silu, b)))
}

/// `out[r, j] = <x_r, w_j>` for a few rows x of `inputs` values: w is read once, `[neurons, inputs]`.
pub(super) struct FewDots<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) x: &'a [f32],
    pub(super) w: &'a [f32],
    pub(super) inputs: usize,
}

impl Kernel for FewDots<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let FewDots { out, x, w, inputs } = self;
        let neurons = w.len() / inputs;
        let mut j = 0;
        // Four rows by four neurons need more than the 16 registers of the narrower tiers.
        while S::LANES >= 16 && j + 4 <= neurons {
            neurons_dots::<S, 4>(s, &mut out[j..], x, &w[j * inputs..], inputs, neurons);
            j += 4;
        }
        while j + 2 <= neurons {
            neurons_dots::<S, 2>(s, &mut out[j..], x, &w[j * inputs..], inputs, neurons);
            j += 2;
        }
        if j < neurons {
            neurons_dots::<S, 1>(s, &mut out[j..], x, &w[j * inputs..], inputs, neurons);
        }
    }
}

/// [`dots`] of J neurons with every row of x.
#[inline(always)]
fn neurons_dots<S: Simd, const J: usize>(
    s: S,
    out: &mut [f32],
    x: &[f32],
    w: &[f32],
    inputs: usize,
    stride: usize,
) {
    for (quad, x) in x.chunks(4 * inputs).enumerate() {
        let out = &mut out[quad * 4 * stride..];
        match x.len() / inputs {
            1 => dots::<S, 1, J>(s, out, x, w, inputs, stride),
            2 => dots::<S, 2, J>(s, out, x, w, inputs, stride),
            3 => dots::<S, 3, J>(s, out, x, w, inputs, stride),
            _ => dots::<S, 4, J>(s, out, x, w, inputs, stride),
        }
    }
}

/// `out[r * stride + j] = <x_r, w_j>` for R rows and J neurons, one accumulator each: the sum's order does not
/// depend on how many there are.
#[inline(always)]
fn dots<S: Simd, const R: usize, const J: usize>(
    s: S,
    out: &mut [f32],
    x: &[f32],
    w: &[f32],
    inputs: usize,
    stride: usize,
) {
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r * inputs..][..inputs]);
    let w: [&[f32]; J] = std::array::from_fn(|j| &w[j * inputs..][..inputs]);
    let mut sums = [[s.splat(0.0); J]; R];
    let head = inputs - inputs % S::LANES;
    for k in (0..head).step_by(S::LANES) {
        let mut ws = [s.splat(0.0); J];
        for j in 0..J {
            ws[j] = s.load(&w[j][k..]);
        }
        for r in 0..R {
            let x = s.load(&x[r][k..]);
            for j in 0..J {
                sums[r][j] = s.fma(x, ws[j], sums[r][j]);
            }
        }
    }
    for r in 0..R {
        for j in 0..J {
            if head < inputs {
                sums[r][j] = s.fma(s.load_tail(&x[r][head..]), s.load_tail(&w[j][head..]), sums[r][j]);
            }
            out[r * stride + j] = s.reduce_add(sums[r][j]);
        }
    }
}

/// `out[r, :] += sum over j of h[r, j] * w_j` for a few rows: `out` has rows of `columns` values, row j of w
/// starts at `j * stride`.
pub(super) struct FewSums<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) h: &'a [f32],
    pub(super) w: &'a [f32],
    pub(super) columns: usize,
    pub(super) stride: usize,
    pub(super) neurons: usize,
}

impl Kernel for FewSums<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let FewSums { out, h, w, columns, stride, neurons } = self;
        let grouped = neurons - neurons % 4;
        for j in (0..grouped).step_by(4) {
            neurons_sums::<S, 4>(s, out, &h[j..], &w[j * stride..], columns, stride, neurons);
        }
        for j in grouped..neurons {
            neurons_sums::<S, 1>(s, out, &h[j..], &w[j * stride..], columns, stride, neurons);
        }
    }
}

/// `out[r, :] += sum over k < N of h[r * neurons + k] * w_k`, for every row of `out`.
#[inline(always)]
fn neurons_sums<S: Simd, const N: usize>(
    s: S,
    out: &mut [f32],
    h: &[f32],
    w: &[f32],
    columns: usize,
    stride: usize,
    neurons: usize,
) {
    let w: [&[f32]; N] = std::array::from_fn(|k| &w[k * stride..][..columns]);
    for (pair, out) in out.chunks_mut(2 * columns).enumerate() {
        let h = &h[pair * 2 * neurons..];
        if out.len() == 2 * columns {
            sums::<S, 2, N>(s, out, h, w, columns, neurons);
        } else {
            sums::<S, 1, N>(s, out, h, w, columns, neurons);
        }
    }
}

/// [`neurons_sums`] of R rows.
#[inline(always)]
fn sums<S: Simd, const R: usize, const N: usize>(
    s: S,
    out: &mut [f32],
    h: &[f32],
    w: [&[f32]; N],
    columns: usize,
    neurons: usize,
) {
    let mut factors = [[s.splat(0.0); N]; R];
    for r in 0..R {
        for k in 0..N {
            factors[r][k] = s.splat(h[r * neurons + k]);
        }
    }
    let head = columns - columns % S::LANES;
    for c in (0..head).step_by(S::LANES) {
        let mut ws = [s.splat(0.0); N];
        for k in 0..N {
            ws[k] = s.load(&w[k][c..]);
        }
        for r in 0..R {
            let out = &mut out[r * columns + c..];
            let mut sum = s.load(out);
            for k in 0..N {
                sum = s.fma(factors[r][k], ws[k], sum);
            }
            s.store(out, sum);
        }
    }
    if head < columns {
        for r in 0..R {
            let out = &mut out[r * columns + head..(r + 1) * columns];
            let mut sum = s.load_tail(out);
            for k in 0..N {
                sum = s.fma(factors[r][k], s.load_tail(&w[k][head..]), sum);
            }
            s.store_tail(out, sum);
        }
    }
}
