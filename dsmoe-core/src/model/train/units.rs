//! The parameters and gradients of a training pass, unit by unit.

use std::ops::Range;

use crate::error::Result;
use crate::model::weights::{Params, Weights};

/// The gradients of a unit, by their places in the arena.
///
/// ```
/// use dsmoe_core::model::{Batch, Grads, Params, StepArgs, Teaching, TrainWorkspace, Units, Weights, Whole};
/// use dsmoe_core::{Model, Result};
///
/// /// Whole arenas that note which unit is complete.
/// struct Noted<'a>(Whole<'a>, Vec<usize>);
///
/// impl Weights for Noted<'_> {
///     fn params(&mut self, unit: usize) -> Result<Params<'_>> {
///         self.0.params(unit)
///     }
/// }
///
/// impl Units for Noted<'_> {
///     fn grads(&mut self, _unit: usize) -> Grads<'_> {
///         Grads::new(0, self.0.grads) // the arena from its first value on
///     }
///
///     fn both(&mut self, unit: usize) -> Result<(Params<'_>, Grads<'_>)> {
///         self.0.both(unit)
///     }
///
///     fn done(&mut self, unit: usize) -> Result<()> {
///         self.1.push(unit);
///         Ok(())
///     }
/// }
/// # let model = Model::new(dsmoe_core::init::preset("tiny")?);
/// # let mut grads = vec![0.0; model.params().len()];
/// # let mut workspace = TrainWorkspace::new(&model, 2, dsmoe_kernels::Precision::F32);
/// # let batch = Batch { inputs: &[1, 5], targets: &[5, 9], seq: 2 };
///
/// let mut units = Noted(Whole { params: model.params(), grads: &mut grads }, Vec::new());
/// model.step_on(&mut units, (batch, Teaching::None), &StepArgs::default(), &mut workspace)?;
/// // The backward pass ends with the embedding.
/// assert_eq!(units.1.last(), Some(&0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Grads<'a> {
    first: usize,
    values: &'a mut [f32],
}

impl<'a> Grads<'a> {
    /// Views `values`, the part of the arena that starts at `first`.
    pub fn new(first: usize, values: &'a mut [f32]) -> Grads<'a> {
        Grads { first, values }
    }

    pub(super) fn of(&mut self, range: &Range<usize>) -> &mut [f32] {
        &mut self.values[range.start - self.first..range.end - self.first]
    }
}

/// The parameters and gradients of a training pass.
///
/// ```
/// use dsmoe_core::Result;
/// use dsmoe_core::model::{Grads, Params, Units, Weights};
///
/// /// Arenas that count how often a unit is lent.
/// struct Counted {
///     params: Vec<f32>,
///     grads: Vec<f32>,
///     lent: usize,
/// }
///
/// impl Weights for Counted {
///     fn params(&mut self, _unit: usize) -> Result<Params<'_>> {
///         self.lent += 1;
///         Ok(Params::new(0, &self.params))
///     }
/// }
///
/// impl Units for Counted {
///     fn grads(&mut self, _unit: usize) -> Grads<'_> {
///         Grads::new(0, &mut self.grads)
///     }
///
///     fn both(&mut self, _unit: usize) -> Result<(Params<'_>, Grads<'_>)> {
///         self.lent += 1;
///         Ok((Params::new(0, &self.params), Grads::new(0, &mut self.grads)))
///     }
/// }
///
/// let mut units = Counted { params: vec![0.0; 8], grads: vec![0.0; 8], lent: 0 };
/// units.both(0)?;
/// assert_eq!(units.lent, 1);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
pub trait Units: Weights {
    /// Lends the gradients of unit `unit`, as far as they are.
    fn grads(&mut self, unit: usize) -> Grads<'_>;

    /// Lends both.
    ///
    /// # Errors
    /// Those of [`Weights::params`].
    fn both(&mut self, unit: usize) -> Result<(Params<'_>, Grads<'_>)>;

    /// Is told whether all losses of the micro-batch are finite, between its forward and its backward pass. Returns whether
    /// there is to be a backward pass.
    ///
    /// # Errors
    /// Processes that go on together are asked, and communication fails.
    fn go_on(&mut self, finite: bool) -> Result<bool> {
        Ok(finite)
    }

    /// Is told that the pass has added all that it adds to the gradients of unit `unit`.
    ///
    /// # Errors
    /// Gradients are summed over processes, and communication fails.
    fn done(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
}

/// Whole arenas.
///
/// ```
/// use dsmoe_core::model::{Batch, StepArgs, Teaching, TrainWorkspace, Whole};
/// # let model = dsmoe_core::Model::new(dsmoe_core::init::preset("tiny")?);
/// # let batch = Batch { inputs: &[1, 5], targets: &[5, 9], seq: 2 };
/// # let mut workspace = TrainWorkspace::new(&model, 2, dsmoe_kernels::Precision::F32);
///
/// // Parameters that are no part of the model, such as an average of earlier ones.
/// let average = vec![0.01; model.params().len()];
/// let mut grads = vec![0.0; average.len()];
/// let mut units = Whole { params: &average, grads: &mut grads };
/// let step = model.step_on(&mut units, (batch, Teaching::None), &StepArgs::default(), &mut workspace)?;
/// assert!(step.went_back && grads.iter().any(|&d| d != 0.0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Whole<'a> {
    /// All parameters.
    pub params: &'a [f32],
    /// All gradients.
    pub grads: &'a mut [f32],
}

impl Weights for Whole<'_> {
    fn params(&mut self, _unit: usize) -> Result<Params<'_>> {
        Ok(Params::new(0, self.params))
    }
}

impl Units for Whole<'_> {
    fn grads(&mut self, _unit: usize) -> Grads<'_> {
        Grads::new(0, self.grads)
    }

    fn both(&mut self, _unit: usize) -> Result<(Params<'_>, Grads<'_>)> {
        Ok((Params::new(0, self.params), Grads::new(0, self.grads)))
    }
}
