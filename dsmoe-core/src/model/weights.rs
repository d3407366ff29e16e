//! Parameters that a pass is lent unit by unit: the embedding, each layer, and the final norm with the head, as
//! [`Shards::units`](crate::shard::Shards::units) number them.

use std::ops::Range;

use crate::error::Result;

/// The parameters of a unit, by their places in the arena.
///
/// ```
/// use dsmoe_core::Result;
/// use dsmoe_core::model::{Params, Weights};
///
/// /// Two units of 16 and 32 values, read one at a time into the same memory.
/// struct Reused(Vec<f32>);
///
/// impl Weights for Reused {
///     fn params(&mut self, unit: usize) -> Result<Params<'_>> {
///         let (first, len) = [(0, 16), (16, 32)][unit];
///         self.0.resize(len, 0.0); // and read them from somewhere
///         Ok(Params::new(first, &self.0))
///     }
/// }
///
/// let mut weights = Reused(Vec::new());
/// weights.params(1)?;
/// assert_eq!(weights.0.len(), 32);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    first: usize,
    values: &'a [f32],
}

impl<'a> Params<'a> {
    /// Views `values`, the part of the arena that starts at `first`.
    pub fn new(first: usize, values: &'a [f32]) -> Params<'a> {
        Params { first, values }
    }

    pub(crate) fn of(self, range: &Range<usize>) -> &'a [f32] {
        &self.values[range.start - self.first..range.end - self.first]
    }
}

/// The parameters of a pass. The pass works on one unit at a time: what it was lent of another is no longer used.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Batch, Params, Weights, Workspace};
/// use dsmoe_core::{Inference, Model, Result};
/// use dsmoe_kernels::Precision;
///
/// /// The arena of a model, lent to one that has none.
/// struct Lender(Model);
///
/// impl Weights for Lender {
///     fn params(&mut self, _unit: usize) -> Result<Params<'_>> {
///         Ok(Params::new(0, self.0.params()))
///     }
/// }
///
/// let outline = Model::outline(preset("tiny")?);
/// let lender = Box::new(Lender(Model::new(preset("tiny")?)));
/// let model = Inference::lend(&outline, lender, Precision::F32)?;
/// let (mut losses, batch) = ([0.0; 2], Batch { inputs: &[1, 5], targets: &[5, 9], seq: 2 });
/// model.score(&mut losses, batch, None, &mut Workspace::default())?;
/// assert!(losses.iter().all(|&loss| loss > 0.0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
pub trait Weights: Send {
    /// Lends the parameters of unit `unit`.
    ///
    /// # Errors
    /// They lie in several processes, and communication fails.
    fn params(&mut self, unit: usize) -> Result<Params<'_>>;
}
