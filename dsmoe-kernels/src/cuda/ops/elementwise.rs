//! Ops on single values, and rows that are copied.

use half::bf16;

use super::{Arg, Gpu, Grid, Matrix, Result, Source};
use crate::cuda::Float;

pub(super) static SOURCE: Source = Source { name: "elementwise", text: include_str!("elementwise.cu") };

/// Threads of a block.
const BLOCK: u32 = 256;

fn each(gpu: &Gpu, entry: &'static str, len: usize, per_thread: usize, [a, b]: [Arg; 2]) -> Result<()> {
    let grid = Grid::row(len.div_ceil(per_thread * BLOCK as usize), BLOCK);
    // SAFETY: the kernels of elementwise.cu take two pointers and the number of values, which the callers checked.
    unsafe { SOURCE.launch(gpu, entry, &[], grid, &[a, b, Arg::I64(len as i64)]) }
}

/// Returns the blocks for a thread per value.
fn one_each(len: usize) -> Grid {
    Grid::row(len.div_ceil(BLOCK as usize), BLOCK)
}

/// Sets `out` to `x` rounded.
#[derive(Debug)]
pub struct Cast<'a> {
    /// The rounded values.
    pub out: &'a mut Matrix<bf16>,
    /// The same number of values.
    pub x: &'a Matrix<f32>,
}

impl Cast<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run(self) -> Result<()> {
        let Cast { out, x } = self;
        assert_eq!(out.len(), x.len(), "cuda cast");
        each(x.gpu(), "cast", x.len(), 4, [out.arg(), x.arg()])
    }
}

/// Sets `out` to `scale x`, rounded to its type.
#[derive(Debug)]
pub struct Scale<'a, T: Float> {
    /// The products.
    pub out: &'a mut Matrix<T>,
    /// The same number of values.
    pub x: &'a Matrix<f32>,
    /// The factor.
    pub scale: f32,
}

impl<T: Float> Scale<'_, T> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run(self) -> Result<()> {
        let Scale { out, x, scale } = self;
        assert_eq!(out.len(), x.len(), "cuda scale");
        let entry = if T::F32 { "scale_f32" } else { "scale_bf16" };
        let args = [out.arg(), x.arg(), Arg::I64(x.len() as i64), Arg::F32(scale)];
        // SAFETY: a thread per value; the lengths were checked above.
        unsafe { SOURCE.launch(x.gpu(), entry, &[], one_each(x.len()), &args) }
    }
}

/// Sets `out` to `x + scale y`, and `h` to that, rounded.
#[derive(Debug)]
pub struct Join<'a> {
    /// The rounded sums.
    pub h: &'a mut Matrix<bf16>,
    /// The sums: as many values as `h` has.
    pub out: &'a mut Matrix<f32>,
    /// The same number of values.
    pub x: &'a Matrix<f32>,
    /// The same number of values.
    pub y: &'a Matrix<f32>,
    /// The factor of `y`.
    pub scale: f32,
}

impl Join<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run(self) -> Result<()> {
        let Join { h, out, x, y, scale } = self;
        let len = x.len();
        assert_eq!([h.len(), out.len(), y.len()], [len; 3], "cuda join");
        let args = [h.arg(), out.arg(), x.arg(), y.arg(), Arg::I64(len as i64), Arg::F32(scale)];
        // SAFETY: a thread per value; the lengths were checked above.
        unsafe { SOURCE.launch(x.gpu(), "join", &[], one_each(len), &args) }
    }
}

/// Adds `x` to `y`.
#[derive(Debug)]
pub struct Add<'a> {
    /// The sum.
    pub y: &'a mut Matrix<f32>,
    /// The same number of values.
    pub x: &'a Matrix<f32>,
}

impl Add<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run(self) -> Result<()> {
        let Add { y, x } = self;
        assert_eq!(y.len(), x.len(), "cuda add");
        each(x.gpu(), "add", x.len(), 1, [y.arg(), x.arg()])
    }
}

/// Sets the values of `x` to 0 where `mask` is 0.
#[derive(Debug)]
pub struct Keep<'a> {
    /// The values.
    pub x: &'a mut Matrix<f32>,
    /// 1 for values that stay.
    pub mask: &'a Matrix<u8>,
}

impl Keep<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn run(self) -> Result<()> {
        let Keep { x, mask } = self;
        assert_eq!(x.len(), mask.len(), "cuda keep");
        each(mask.gpu(), "keep", mask.len(), 1, [x.arg(), mask.arg()])
    }
}

/// Sets row i of `out` to row `picked[i]` of `x`. The caller promises that these rows exist.
#[derive(Debug)]
pub struct Rows<'a> {
    /// `[picked, width]`
    pub out: &'a mut Matrix<bf16>,
    /// `[rows, width]`
    pub x: &'a Matrix<bf16>,
    /// Numbers of rows of `x`.
    pub picked: &'a Matrix<u32>,
}

impl Rows<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Rows { out, x, picked } = self;
        assert!(out.rows() == picked.len() && out.cols() == x.cols(), "cuda rows");
        let args = [out.arg(), x.arg(), picked.arg(), x.cols().into()];
        // SAFETY: the sizes were checked above; the numbers of rows are the caller's promise.
        unsafe { SOURCE.launch(x.gpu(), "rows", &[], Grid::row(picked.len(), BLOCK), &args) }
    }
}
