//! Routers of the device, of full or of low rank, and the linear term that makes up for closed experts; see
//! [`crate::ffn::Gating`] for the formulas.
//!
//! The values that decide gates are f32, as on the CPU. Products of the linear term round their operands to bf16, as those of
//! experts do.

use dsmoe_kernels::cuda::Matrix;
use dsmoe_kernels::cuda::ops::elementwise::Cast;
use dsmoe_kernels::cuda::ops::linear;
use dsmoe_kernels::cuda::ops::router::{self, Gates, Normed, Routed};
use dsmoe_kernels::cuda::ops::slots::{self, FromRouter, Slots};
use half::bf16;

use crate::error::Result;

/// The tensors of a router. Those that it does not have are none.
#[derive(Clone, Copy)]
pub(crate) struct Tensors<'a> {
    /// Y, or A of a low rank.
    pub(crate) first: &'a Matrix<f32>,
    /// B of a low rank.
    pub(crate) second: Option<&'a Matrix<f32>>,
    pub(crate) bias: Option<&'a Matrix<f32>>,
    /// C, transposed and rounded.
    pub(crate) correction: Option<&'a Matrix<bf16>>,
}

/// The values between the products of a router of low rank (l).
pub(crate) struct Low<'a> {
    /// `[T, r]`; no value at full rank.
    pub(crate) values: &'a mut Matrix<f32>,
    /// `values` rounded, for the linear term; no value without it.
    pub(crate) rounded: &'a mut Matrix<bf16>,
    /// As many ones as there are tokens, and as r.
    pub(crate) ones: &'a Matrix<f32>,
}

/// The forward pass of a router.
pub(crate) struct Forward<'a> {
    /// Set.
    pub(crate) routed: &'a mut Routed,
    /// The logits `[T, n]`; set.
    pub(crate) z: &'a mut Matrix<f32>,
    /// Set at a low rank.
    pub(crate) low: Low<'a>,
    pub(crate) normed: Normed<'a>,
    pub(crate) tensors: Tensors<'a>,
    /// The threshold of the logits, and the logit at which a gate is one half.
    pub(crate) thresholds: &'a Matrix<f32>,
    pub(crate) gates: Gates,
    /// Set to the active pairs, if products run over slots.
    pub(crate) slots: Option<&'a mut Slots>,
}

impl Forward<'_> {
    pub(crate) fn run(self) -> Result<()> {
        let Forward { routed, z, low, normed, tensors, thresholds, gates, slots } = self;
        let Tensors { first, second, bias, correction } = tensors;
        match second {
            // The routing into slots computes them.
            None if slots.is_some() => {}
            None => router::Logits { z: &mut *z, normed, router: first, bias }.run()?,
            Some(second) => {
                let Low { values, rounded, ones } = low;
                router::Logits { z: &mut *values, normed, router: first, bias: None }.run()?;
                let [rstd, weight] = ones_of(ones, values);
                let normed = plain(values, &rstd, &weight);
                router::Logits { z: &mut *z, normed, router: second, bias }.run()?;
                if correction.is_some() {
                    Cast { out: rounded, x: values }.run()?;
                }
            }
        }
        let gates = &gates;
        match slots {
            None => router::Route { routed, z, thresholds, gates }.run()?,
            Some(slots) => {
                let router = second.is_none().then_some(FromRouter { normed, weight: first, bias });
                slots::Route { slots, routed, z, router, thresholds, gates, stats: None }.run()?;
            }
        }
        Ok(())
    }
}

/// Adds the linear term of `low`, rounded, to the output, where there is one.
pub(crate) fn correct(
    y: &mut Matrix<f32>,
    low: &Matrix<bf16>,
    correction: Option<&Matrix<bf16>>,
) -> Result<()> {
    let Some(w) = correction else { return Ok(()) };
    Ok(linear::BackwardInput { dx: y, dy: low, w, add: true }.run()?)
}

/// Returns the vectors of ones that leave `values` as they are.
pub(crate) fn ones_of<'a>(
    ones: &'a Matrix<f32>,
    values: &Matrix<f32>,
) -> [dsmoe_kernels::cuda::View<'a, f32>; 2] {
    [values.rows(), values.cols()].map(|len| ones.part(0..len))
}

/// Returns `values` as the input of a router.
pub(crate) fn plain<'a>(
    values: &'a Matrix<f32>,
    rstd: &'a Matrix<f32>,
    weight: &'a Matrix<f32>,
) -> Normed<'a> {
    Normed { x: values, rstd, weight, offset: 0.0 }
}
