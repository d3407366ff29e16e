//! Dense matrix product of strided f32 views: `C = A B` or `C += A B`.
//!
//! ```text
//! forward   C[i,j] (+)= sum_k A[i,k] B[k,j]      A [m,k], B [k,n], C [m,n]
//! backward  dA = dC B^T,  dB = A^T dC            two more products: see [`Mat::t`]
//! ```
//! Accumulates in f32. The product is cut into blocks of C by shape alone, each computed on one thread, so the
//! result does not depend on the number of threads. The blocks run on the `gemm` crate, which picks its own
//! instruction set.

pub mod reference;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

/// A borrowed matrix with arbitrary strides.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major `[rows, cols]`.
    ///
    /// # Panics
    /// `data` does not hold `rows * cols` values.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Mat<'a> {
        assert_eq!(data.len(), rows * cols, "matmul: {} values for a [{rows}, {cols}] matrix", data.len());
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows of length `cols` that start every `row_stride` values.
    ///
    /// # Panics
    /// The last row ends past `data`.
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Mat<'a> {
        assert!(
            rows == 0 || (row_stride >= cols && (rows - 1) * row_stride + cols <= data.len()),
            "matmul: {} values for [{rows}, {cols}] rows every {row_stride}",
            data.len()
        );
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Mat<'a> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// Smallest product, in multiply-adds, worth a task of its own.
const TASK_WORK: usize = 1 << 18;
/// Tasks a large product is cut into.
const TASKS: usize = 16;

/// `C = A B` (sets), or `C += A B` when `accumulate`. `c` is row-major `[a.rows, b.cols]`.
///
/// # Panics
/// Shapes do not fit.
pub fn matmul(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, accumulate: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let tasks = (m * n * k / TASK_WORK).clamp(1, TASKS);
    if tasks == 1 {
        matmul_serial(c, a, b, accumulate);
        return;
    }
    check(c, a, b);
    if m >= n / 2 {
        let rows = m.div_ceil(tasks).next_multiple_of(16);
        c.par_chunks_mut(rows * n).enumerate().for_each(|(i, c)| {
            let count = c.len() / n;
            let a = Mat { data: &a.data[i * rows * a.row_stride..], rows: count, ..a };
            // SAFETY: this chunk of C is `count` rows of n, borrowed mutably here.
            unsafe { block(&Target { c: c.as_mut_ptr(), n }, count, 0..n, a, b, accumulate) };
        });
    } else {
        let cols = n.div_ceil(tasks).next_multiple_of(16);
        let target = Target { c: c.as_mut_ptr(), n };
        (0..n.div_ceil(cols)).into_par_iter().for_each(|i| {
            let columns = i * cols..n.min((i + 1) * cols);
            // SAFETY: C is m rows of n, borrowed mutably by this call; every task has columns of its own.
            unsafe { block(&target, m, columns, a, b, accumulate) };
        });
    }
}

/// [`matmul`] on the calling thread alone: for products inside parallel tasks.
///
/// # Panics
/// Shapes do not fit.
pub fn matmul_serial(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, accumulate: bool) {
    check(c, a, b);
    let (m, n) = (a.rows, b.cols);
    if m == 0 || n == 0 {
        return;
    }
    if a.cols == 0 {
        if !accumulate {
            c.fill(0.0);
        }
        return;
    }
    // SAFETY: C is m rows of n, borrowed mutably here.
    unsafe { block(&Target { c: c.as_mut_ptr(), n }, m, 0..n, a, b, accumulate) };
}

fn check(c: &[f32], a: Mat<'_>, b: Mat<'_>) {
    assert!(
        a.cols == b.rows && c.len() == a.rows * b.cols,
        "matmul: [{}, {}] x [{}, {}] into {} values",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        c.len()
    );
}

/// Where a block of C goes: the first value of C and its row length.
struct Target {
    c: *mut f32,
    n: usize,
}

// SAFETY: only `matmul` shares a Target between threads, and there every thread writes columns of its own.
unsafe impl Sync for Target {}

/// Columns `cols` of the first `rows` rows of `C (+)= A B`, on this thread.
///
/// # Safety
/// `target` points to `rows` rows of `target.n` f32 of which no other thread touches columns `cols` meanwhile.
unsafe fn block(
    target: &Target,
    rows: usize,
    cols: std::ops::Range<usize>,
    a: Mat<'_>,
    b: Mat<'_>,
    accumulate: bool,
) {
    let last = |x: &Mat<'_>| (x.rows - 1) * x.row_stride + (x.cols - 1) * x.col_stride;
    assert!(
        rows == a.rows
            && cols.end <= b.cols.min(target.n)
            && last(&a) < a.data.len()
            && last(&b) < b.data.len()
    );
    // SAFETY: columns `cols` of `b`, starting here, stay inside `b.data` by the assertion on its last value.
    let first_b = unsafe { b.data.as_ptr().add(cols.start * b.col_stride) };
    // SAFETY: C has rows of `target.n` values, and `cols.start < cols.end <= target.n`.
    let first_c = unsafe { target.c.add(cols.start) };
    // SAFETY: the pointers and strides address only values inside A, B (asserted above) and this block of C,
    // which nobody else touches meanwhile; A and B cannot overlap C, which is borrowed mutably by `matmul`.
    unsafe {
        gemm::gemm(
            rows,
            cols.len(),
            a.cols,
            first_c,
            1,
            target.n as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            first_b,
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
