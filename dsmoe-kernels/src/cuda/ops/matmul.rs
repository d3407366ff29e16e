//! Products of row-major bf16 matrices, summed in f32, by cuBLASLt; by a kernel of our own where that knows no way.

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};
use crate::cuda::Element;

static SOURCE: Source = Source { name: "matmul", text: include_str!("matmul.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["gemm_f32", "gemm_bf16"],
    defines: &[&[]],
    max_registers: 64,
}];

/// `out [m, n] = a [m, k] b [k, n]`, row-major. A transposed operand is stored as `[k, m]` or `[n, k]`; `ld` are the
/// distances of stored rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gemm {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of every sum.
    pub k: usize,
    /// Whether `a` is stored transposed.
    pub a_transposed: bool,
    /// Whether `b` is stored transposed.
    pub b_transposed: bool,
    /// Distance of stored rows of `a`.
    pub lda: usize,
    /// Distance of stored rows of `b`.
    pub ldb: usize,
    /// Distance of rows of the result.
    pub ldc: usize,
    /// Add to the result in place of setting it.
    pub beta_one: bool,
}

impl Gemm {
    /// Both operands as they are, rows next to each other.
    pub fn nn(m: usize, n: usize, k: usize) -> Gemm {
        let (a_transposed, b_transposed) = (false, false);
        Gemm { m, n, k, a_transposed, b_transposed, lda: k, ldb: n, ldc: n, beta_one: false }
    }

    /// `b` transposed: a linear layer.
    pub fn nt(m: usize, n: usize, k: usize) -> Gemm {
        Gemm { b_transposed: true, ldb: k, ..Gemm::nn(m, n, k) }
    }

    /// `a` transposed: a weight's gradient.
    pub fn tn(m: usize, n: usize, k: usize) -> Gemm {
        Gemm { a_transposed: true, lda: m, ..Gemm::nn(m, n, k) }
    }

    /// Values from the first to the last of a matrix of `rows` rows of `cols`, `ld` apart.
    fn span(rows: usize, cols: usize, ld: usize) -> usize {
        if rows == 0 || cols == 0 { 0 } else { (rows - 1) * ld + cols }
    }

    fn check(&self, out: usize, a: usize, b: usize) {
        let stored = |transposed, rows, cols| if transposed { (cols, rows) } else { (rows, cols) };
        let (a_rows, a_cols) = stored(self.a_transposed, self.m, self.k);
        let (b_rows, b_cols) = stored(self.b_transposed, self.k, self.n);
        assert!(
            out >= Gemm::span(self.m, self.n, self.ldc)
                && a >= Gemm::span(a_rows, a_cols, self.lda)
                && b >= Gemm::span(b_rows, b_cols, self.ldb)
                && self.ldc >= self.n
                && self.lda >= a_cols
                && self.ldb >= b_cols,
            "gemm: result {out}, operands {a} and {b} values for {self:?}"
        );
    }
}

/// The product in f32.
///
/// # Errors
/// The device or cuBLASLt fails.
///
/// # Panics
/// A buffer is shorter than its matrix.
pub fn gemm_f32(
    gpu: &Gpu,
    out: ViewMut<'_, f32>,
    a: View<'_, half::bf16>,
    b: View<'_, half::bf16>,
    gemm: Gemm,
) -> Result<()> {
    run(gpu, out, a, b, gemm, true)
}

/// The product rounded to bf16.
///
/// # Errors
/// The device or cuBLASLt fails.
///
/// # Panics
/// A buffer is shorter than its matrix.
pub fn gemm_bf16(
    gpu: &Gpu,
    out: ViewMut<'_, half::bf16>,
    a: View<'_, half::bf16>,
    b: View<'_, half::bf16>,
    gemm: Gemm,
) -> Result<()> {
    run(gpu, out, a, b, gemm, false)
}

fn run<T: Element>(
    gpu: &Gpu,
    mut out: ViewMut<'_, T>,
    a: View<'_, half::bf16>,
    b: View<'_, half::bf16>,
    gemm: Gemm,
    f32_out: bool,
) -> Result<()> {
    gemm.check(out.len(), a.len(), b.len());
    if gemm.m == 0 || gemm.n == 0 {
        return Ok(());
    }
    if gemm.k == 0 {
        return if gemm.beta_one { Ok(()) } else { out.fill_zero() };
    }
    let pointers = [out.ptr(), a.ptr(), b.ptr()];
    // SAFETY: the lengths were checked above, and the views are of this device.
    let done = gpu.blas(|blas| unsafe { blas.gemm(gpu, gemm, f32_out, pointers) })?;
    if done { Ok(()) } else { plain(gpu, out, a, b, gemm, f32_out) }
}

/// Our own kernel: any shape and alignment, no speed.
pub(crate) fn plain<T: Element>(
    gpu: &Gpu,
    out: ViewMut<'_, T>,
    a: View<'_, half::bf16>,
    b: View<'_, half::bf16>,
    gemm: Gemm,
    f32_out: bool,
) -> Result<()> {
    gemm.check(out.len(), a.len(), b.len());
    let kernel = gpu.kernel(&SOURCE, if f32_out { "gemm_f32" } else { "gemm_bf16" }, &[])?;
    let size = |size| int("gemm", size);
    // Steps of an operand along its two dimensions of the product.
    let steps = |transposed: bool, ld: usize| if transposed { (1, ld) } else { (ld, 1) };
    let ((a_row, a_k), (b_k, b_col)) =
        (steps(gemm.a_transposed, gemm.lda), steps(gemm.b_transposed, gemm.ldb));
    let args = [
        Arg::from(&out),
        a.into(),
        b.into(),
        size(gemm.m)?.into(),
        size(gemm.n)?.into(),
        size(gemm.k)?.into(),
        Arg::I64(a_row as i64),
        Arg::I64(a_k as i64),
        Arg::I64(b_k as i64),
        Arg::I64(b_col as i64),
        Arg::I64(gemm.ldc as i64),
        i32::from(gemm.beta_one).into(),
    ];
    let grid = [size(gemm.n.div_ceil(16))? as u32, size(gemm.m.div_ceil(16))? as u32, 1];
    // SAFETY: the arguments are those of the kernels in matmul.cu; the lengths were checked above.
    unsafe { kernel.launch(grid, 256, 0, &args) }
}
