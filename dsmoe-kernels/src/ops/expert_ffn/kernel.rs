//! Vector bodies: the SwiGLU unit forward and backward, and products with a few rows.

use crate::simd::{Kernel, Simd, dot, sigmoid};

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
            let unit = |a, b| s.mul(coefficient, s.mul(s.mul(a, sigmoid(s, a)), b));
            let mut head = a.chunks_exact_mut(S::LANES);
            let mut bs = b.chunks_exact(S::LANES);
            for (a, b) in (&mut head).zip(&mut bs) {
                s.store(a, unit(s.load(a), s.load(b)));
            }
            let tail = head.into_remainder();
            if !tail.is_empty() {
                s.store_tail(tail, unit(s.load_tail(tail), s.load_tail(bs.remainder())));
            }
        }
    }
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
        let unit = |a, b, g, sum| s.fma(s.mul(s.mul(a, sigmoid(s, a)), b), g, sum);
        let mut sum = s.splat(0.0);
        let head = a.len() - a.len() % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            sum = unit(s.load(&a[j..]), s.load(&b[j..]), s.load(&g[j..]), sum);
        }
        if head < a.len() {
            sum = unit(s.load_tail(&a[head..]), s.load_tail(&b[head..]), s.load_tail(&g[head..]), sum);
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
        let (one, coefficient) = (s.splat(1.0), s.splat(coefficient));
        let unit = |a, b, g| {
            let gate = sigmoid(s, a);
            let silu = s.mul(a, gate);
            let dc = s.mul(coefficient, g);
            // silu'(a) = s (1 + a (1 - s)) with s = sigmoid(a)
            let slope = s.mul(gate, s.fma(a, s.sub(one, gate), one));
            (s.mul(s.mul(dc, b), slope), s.mul(dc, silu), s.mul(coefficient, s.mul(silu, b)))
        };
        let head = n - n % S::LANES;
        for j in (0..head).step_by(S::LANES) {
            let (x, y, z) = unit(s.load(&a[j..]), s.load(&b[j..]), s.load(&g[j..]));
            s.store(&mut da[j..], x);
            s.store(&mut db[j..], y);
            s.store(&mut scaled[j..], z);
        }
        if head < n {
            let (x, y, z) = unit(s.load_tail(&a[head..]), s.load_tail(&b[head..]), s.load_tail(&g[head..]));
            s.store_tail(&mut da[head..], x);
            s.store_tail(&mut db[head..], y);
            s.store_tail(&mut scaled[head..], z);
        }
    }
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
        let neurons = self.w.len() / self.inputs;
        for (j, w) in self.w.chunks_exact(self.inputs).enumerate() {
            for (r, x) in self.x.chunks_exact(self.inputs).enumerate() {
                self.out[r * neurons + j] = dot(s, w, x);
            }
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
        let row = |j: usize| &w[j * stride..][..columns];
        let grouped = neurons - neurons % 4;
        for j in (0..grouped).step_by(4) {
            let rows = [row(j), row(j + 1), row(j + 2), row(j + 3)];
            for (out, h) in out.chunks_exact_mut(columns).zip(h.chunks_exact(neurons)) {
                add_rows(s, out, &h[j..j + 4], rows);
            }
        }
        for j in grouped..neurons {
            for (out, h) in out.chunks_exact_mut(columns).zip(h.chunks_exact(neurons)) {
                add_rows(s, out, &h[j..=j], [row(j)]);
            }
        }
    }
}

/// `out += sum over k of h[k] * rows[k]`.
#[inline(always)]
fn add_rows<S: Simd, const N: usize>(s: S, out: &mut [f32], h: &[f32], rows: [&[f32]; N]) {
    let h: [S::V; N] = std::array::from_fn(|k| s.splat(h[k]));
    let n = out.len();
    let head = n - n % S::LANES;
    for c in (0..head).step_by(S::LANES) {
        let mut sum = s.load(&out[c..]);
        for k in 0..N {
            sum = s.fma(h[k], s.load(&rows[k][c..]), sum);
        }
        s.store(&mut out[c..], sum);
    }
    if head < n {
        let mut sum = s.load_tail(&out[head..]);
        for k in 0..N {
            sum = s.fma(h[k], s.load_tail(&rows[k][head..n]), sum);
        }
        s.store_tail(&mut out[head..], sum);
    }
}
