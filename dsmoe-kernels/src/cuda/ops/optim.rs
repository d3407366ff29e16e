//! The optimiser and the sums it needs; see [`crate::ops::adamw`].

use half::bf16;

use super::{Arg, Matrix, Result, Source, blocks, int};
use crate::adamw::Hyper;

static SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

#[cfg(test)]
pub(crate) const KERNELS: super::KernelSpec = super::KernelSpec {
    source: &SOURCE,
    entries: &["adamw", "sum_squares", "sum", "add_partials"],
    defines: &[&[]],
    max_registers: 40,
};

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
        assert!(
            [param.len(), rounded.len(), m.len(), v.len()] == [len; 4] && scale.len() == 1,
            "cuda adamw: {} parameters, {len} gradients",
            param.len()
        );
        let (lr, root) = hyper.corrections();
        let kernel = grad.gpu().kernel(&SOURCE, "adamw", &[])?;
        let args = [
            param.arg(),
            rounded.arg(),
            m.arg(),
            v.arg(),
            grad.arg(),
            scale.arg(),
            Arg::I64(len as i64),
            ((1.0 - hyper.lr * hyper.weight_decay) as f32).into(),
            (lr as f32).into(),
            (hyper.beta1 as f32).into(),
            ((1.0 - hyper.beta1) as f32).into(),
            (hyper.beta2 as f32).into(),
            ((1.0 - hyper.beta2) as f32).into(),
            (root as f32).into(),
            (hyper.eps as f32).into(),
        ];
        let count = blocks("adamw", len.div_ceil(BLOCK as usize))?;
        // SAFETY: a thread per value of buffers whose lengths were checked above.
        unsafe { kernel.launch([count, 1, 1], BLOCK, 0, &args) }
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
        let first = x.gpu().kernel(&SOURCE, entry, &[])?;
        let args = [partials.arg(), x.arg(), Arg::I64(x.len() as i64)];
        // SAFETY: a block per partial sum, for which there is room.
        unsafe { first.launch([blocks(entry, parts)?, 1, 1], BLOCK, 0, &args) }?;
        let second = x.gpu().kernel(&SOURCE, "add_partials", &[])?;
        let args = [out.arg(), partials.arg(), int(entry, parts)?.into()];
        // SAFETY: one thread reads the partial sums that were set above.
        unsafe { second.launch([1, 1, 1], 1, 0, &args) }
    }
}
