//! A model whose layers are lent one after the other, for a forward pass where no process holds all of them.

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dsmoe_kernels::Precision;

use super::pack::{Layer, Source};
use crate::error::{Error, Result};
use crate::ffn::Ffn;
use crate::model::tensors::Ranges;
use crate::model::weights::Weights;

/// The layers of such a model: one is packed when its turn comes.
pub(crate) struct Lent {
    weights: Mutex<Box<dyn Weights>>,
    /// The first error of a pass, which cannot return it.
    failed: Mutex<Option<Error>>,
    pub(crate) ffns: Vec<Box<dyn Ffn>>,
    ranges: Ranges,
    precision: Precision,
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers that are lent", self.ffns.len())
    }
}

/// Weights of which one unit at a time is there.
pub(crate) struct OfUnits<'a> {
    pub(crate) weights: &'a mut dyn Weights,
    pub(crate) ranges: &'a Ranges,
}

impl OfUnits<'_> {
    /// Returns the unit that `range` lies in.
    fn unit(&self, range: &Range<usize>) -> usize {
        let Ranges { embed, layers, norm, .. } = self.ranges;
        if range.start < embed.end {
            return 0;
        }
        // A layer begins with its queries.
        let of_layer = layers.partition_point(|layer| layer.q.start <= range.start);
        if range.start >= norm.start { layers.len() + 1 } else { of_layer }
    }
}

impl Source for OfUnits<'_> {
    fn rows(&mut self, matrix: &Range<usize>, sink: &mut dyn FnMut(&[f32])) -> Result<()> {
        sink(self.part(matrix)?);
        Ok(())
    }

    fn part(&mut self, range: &Range<usize>) -> Result<&[f32]> {
        let unit = self.unit(range);
        Ok(self.weights.params(unit)?.of(range))
    }
}

impl Lent {
    pub(crate) fn new(
        weights: Box<dyn Weights>,
        ffns: Vec<Box<dyn Ffn>>,
        ranges: Ranges,
        precision: Precision,
    ) -> Lent {
        Lent { weights: Mutex::new(weights), failed: Mutex::new(None), ffns, ranges, precision }
    }

    fn weights(&self) -> MutexGuard<'_, Box<dyn Weights>> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Packs layer `i`; none after an error, which [`Lent::outcome`] returns.
    pub(crate) fn layer(&self, config: &crate::config::Config, i: usize) -> Option<Layer> {
        let mut weights = self.weights();
        let source = &mut OfUnits { weights: &mut **weights, ranges: &self.ranges };
        let of_layer = (&self.ranges.layers[i], &*self.ffns[i]);
        let built = Layer::build(source, config, i, of_layer, self.precision);
        let failed = |error| *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        built.map_err(failed).ok()
    }

    /// Returns the error of the last pass.
    pub(crate) fn outcome(&self) -> Result<()> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// Is lent all layers and uses none, where others run a pass.
    pub(crate) fn pass_on(&self) -> Result<()> {
        let mut weights = self.weights();
        (0..self.ffns.len()).try_for_each(|i| weights.params(i + 1).map(drop))
    }
}
