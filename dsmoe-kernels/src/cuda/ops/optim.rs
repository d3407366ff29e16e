//! The optimiser and the sums it needs; see [`crate::ops::adamw`].

use half::bf16;

use super::{Arg, Grid, Matrix, Result, Source};
use crate::adamw::Hyper;

pub(super) static SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

/// Values of [`AddSum::partials`], which are added in order.
pub const PARTIALS: usize = 512;
/// Threads of a block.
const BLOCK: u32 = 256;

/// Updates `param`, its moments and its rounded copy from `scale` times `grad`.
#[derive(Debug)]
pub struct AdamW<'a> {
    /// The parameters.
    pub param: &'a mut Matrix<f32>,
    /// The parameters, rounded.
    pub rounded: &'a mut Matrix<bf16>,
    /// First moments.
    pub m: &'a mut Matrix<f32>,
    /// Second moments.
    pub v: &'a mut Matrix<f32>,
    /// Gradients.
    pub grad: &'a Matrix<f32>,
    /// The factor of the gradients: one value.
    pub scale: &'a Matrix<f32>,
    /// Learning rate and the like.
    pub hyper: &'a Hyper,
}

impl AdamW<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let AdamW { param, rounded, m, v, grad, scale, hyper } = self;
        let len = grad.len();
        let lens = [param.len(), rounded.len(), m.len(), v.len(), scale.len()];
        assert_eq!(lens, [len, len, len, len, 1], "cuda adamw: param, rounded, m, v, scale");
        let pointers = [param.arg(), rounded.arg(), m.arg(), v.arg(), grad.arg(), scale.arg()];
        let args = [&pointers[..], &[Arg::I64(len as i64)], &hyper.factors().map(Arg::F32)].concat();
        let grid = Grid::row(len.div_ceil(BLOCK as usize), BLOCK);
        // SAFETY: a thread per value of buffers whose lengths were checked above.
        unsafe { SOURCE.launch(grad.gpu(), "adamw", &[], grid, &args) }
    }
}

/// Adds to `out` the sum of `x`, or of its squares.
#[derive(Debug)]
pub struct AddSum<'a> {
    /// One value.
    pub out: &'a mut Matrix<f64>,
    /// The values.
    pub x: &'a Matrix<f32>,
    /// Adds the squares.
    pub squares: bool,
    /// Scratch memory of [`PARTIALS`] values.
    pub partials: &'a mut Matrix<f64>,
}

impl AddSum<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let AddSum { out, x, squares, partials } = self;
        let entry = if squares { "sum_squares" } else { "sum" };
        assert!(out.len() == 1 && partials.len() >= PARTIALS, "cuda {entry}: {} partials", partials.len());
        let parts = x.len().div_ceil(BLOCK as usize).min(PARTIALS);
        let args = [partials.arg(), x.arg(), Arg::I64(x.len() as i64)];
        // SAFETY: a block per partial sum, for which there is room.
        unsafe { SOURCE.launch(x.gpu(), entry, &[], Grid::row(parts, BLOCK), &args) }?;
        let args = [out.arg(), partials.arg(), parts.into()];
        // SAFETY: one thread reads the partial sums that were set above.
        unsafe { SOURCE.launch(x.gpu(), "add_partials", &[], Grid::row(1, 1), &args) }
    }
}
