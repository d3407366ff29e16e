//! Products of bf16 matrices, summed in f32, by cuBLASLt, or by a kernel of this crate where cuBLASLt has no algorithm.

use half::bf16;

use super::{Arg, Grid, Matrix, Result, Source};
use crate::cuda::Float;
use crate::cuda::blas::Gemm;

pub(super) static SOURCE: Source = Source { name: "matmul", text: include_str!("matmul.cu") };

/// The operands of a product that are stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// None: `[m, k] x [k, n]`.
    Nn,
    /// The second: `[m, k] x [n, k]`.
    Nt,
    /// The first: `[k, m] x [k, n]`.
    Tn,
}

/// Sets `out [m, n]`, rounded to its type, to the product of `a` and `b`, or adds the product.
///
/// Activations give the sizes of a product. The other matrix is a parameter or its gradient: it may be a vector, of as many
/// values.
#[derive(Debug)]
pub struct Product<'a, T: Float> {
    /// The result: a parameter's gradient in [`Form::Tn`], else an activation.
    pub out: &'a mut Matrix<T>,
    /// An activation.
    pub a: &'a Matrix<bf16>,
    /// An activation in [`Form::Tn`], else a parameter.
    pub b: &'a Matrix<bf16>,
    /// The operands that are transposed.
    pub form: Form,
    /// Adds to the result instead of setting it.
    pub add: bool,
}

impl<T: Float> Product<'_, T> {
    /// Queues the op, or returns the error of the device or of cuBLASLt.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let gemm = self.gemm();
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(());
        }
        if gemm.k == 0 {
            return if gemm.add { Ok(()) } else { self.out.fill_zero() };
        }
        let pointers = [self.out.ptr(), self.a.ptr(), self.b.ptr()];
        // SAFETY: the lengths were checked by `gemm`, and the matrices are on this device.
        let done = self.a.gpu().blas(|blas, stream| unsafe { blas.gemm(stream, gemm, T::F32, pointers) })?;
        if done { Ok(()) } else { self.plain() }
    }

    /// Queues the kernel of this crate, which takes any shape and alignment and is slow.
    pub(crate) fn plain(self) -> Result<()> {
        let gemm = self.gemm();
        let Product { out, a, b, .. } = self;
        let Gemm { m, n, k, .. } = gemm;
        let entry = if T::F32 { "gemm_f32" } else { "gemm_bf16" };
        // Steps of an operand along its two dimensions of the product.
        let (a_row, a_k) = if gemm.a_transposed { (1, m) } else { (k, 1) };
        let (b_k, b_col) = if gemm.b_transposed { (1, k) } else { (n, 1) };
        let steps = [a_row, a_k, b_k, b_col, n].map(|step| Arg::I64(step as i64));
        let (pointers, sizes) = ([out.arg(), a.arg(), b.arg()], [m, n, k].map(Arg::Size));
        let args = [&pointers[..], &sizes, &steps, &[gemm.add.into()]].concat();
        let grid = Grid::plane(n.div_ceil(16), m.div_ceil(16), 256);
        // SAFETY: the arguments are those of the kernels in matmul.cu; the lengths were checked by `gemm`.
        unsafe { SOURCE.launch(a.gpu(), entry, &[], grid, &args) }
    }

    fn gemm(&self) -> Gemm {
        let Product { out, a, b, form, add } = self;
        let (m, n, k) = match form {
            Form::Nn | Form::Nt => (a.rows(), out.cols(), a.cols()),
            Form::Tn => (a.cols(), b.cols(), a.rows()),
        };
        let lens = [out.len(), a.len(), b.len()];
        assert_eq!(lens, [m * n, m * k, k * n], "gemm {form:?}: out, a, b for {m} x {n} x {k}");
        Gemm { m, n, k, a_transposed: *form == Form::Tn, b_transposed: *form == Form::Nt, add: *add }
    }
}
