//! The control of an oracle: copies of the model with noise on their weights, as good in the mean as the routes that they are
//! compared with.
//!
//! ```text
//! w' = w (1 + s e)        w a projection of attention or an FFN; e ~ N(0, 1), other in every copy and the same for every s
//! s                       such that the mean loss of a few copies is the given one
//! ```
//! A minimum over many losses is lower than their mean whatever they stand for. What a route's oracle has beyond that of its
//! copies is due to what is computed.

use std::ops::Range;

use dsmoe_core::ffn::Route;
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;

use super::tally::mean;
use crate::error::Result;

/// Copies whose mean loss decides the noise.
const CALIBRATED_ON: u32 = 16;
/// Halvings of the range of s at the most.
const STEPS: usize = 12;
/// The mean loss may be off by this share.
const TOLERANCE: f64 = 2e-3;
const FIRST: f64 = 0.1;
const LARGEST: f64 = 12.8;
/// Passes that find the noise of a level at the most: without noise, up to the largest, and the halvings.
pub(crate) const MOST_PASSES: u64 = 1 + (8 + STEPS as u64) * CALIBRATED_ON as u64;

/// Makes noisy copies of a model.
pub(crate) struct Copies {
    /// Holds the weights of the present copy.
    model: Model,
    /// The weights without noise.
    weights: Vec<f32>,
    precision: Precision,
    seed: u64,
    /// The route that copies take.
    routes: Vec<Route>,
}

/// Measures the losses of a model.
pub(crate) type Measure<'a> = dyn FnMut(&Inference) -> Result<Vec<f32>> + 'a;

impl Copies {
    pub(crate) fn new(source: Model, precision: Precision, seed: u64, routes: Vec<Route>) -> Copies {
        Copies { weights: source.params().to_vec(), model: source, precision, seed, routes }
    }

    /// Returns the losses of the copy of that number.
    pub(crate) fn losses(&mut self, s: f64, copy: u32, measure: &mut Measure<'_>) -> Result<Vec<f32>> {
        let mut rng = Rng::new(self.seed, u64::from_be_bytes(*b"copyrout") ^ u64::from(copy));
        let mut noise = Vec::new();
        let entries = self.model.layout().entries().iter();
        let noised = entries.filter(|of| of.layer.is_some() && !of.spec.router && of.spec.shape.len() > 1);
        let ranges: Vec<Range<usize>> = noised.map(|entry| entry.range.clone()).collect();
        for range in ranges {
            noise.resize(range.len(), 0.0);
            rng.fill_normal(&mut noise, 1.0);
            let values = self.weights[range.clone()].iter().zip(&noise);
            let to = self.model.params_mut()[range].iter_mut();
            to.zip(values).for_each(|(to, (w, e))| *to = w * (1.0 + s as f32 * e));
        }
        let mut model = Inference::new(&self.model, self.precision);
        model.set_routes(&self.routes)?;
        measure(&model)
    }

    /// Finds the noise at which the first copies have the mean loss `target`; none where that is out of reach.
    pub(crate) fn matched(
        &mut self,
        target: f64,
        copies: u32,
        measure: &mut Measure<'_>,
    ) -> Result<Option<f64>> {
        let copies = copies.min(CALIBRATED_ON);
        if mean(&self.losses(0.0, 0, measure)?) >= target {
            return Ok(None);
        }
        let mut of = |s: f64| -> Result<f64> {
            let losses = (0..copies).map(|copy| Ok(mean(&self.losses(s, copy, measure)?)));
            let sum = losses.sum::<Result<f64>>()?;
            Ok(sum / f64::from(copies))
        };
        let (mut low, mut high) = (0.0, FIRST);
        while of(high)? < target {
            if high >= LARGEST {
                return Ok(None);
            }
            (low, high) = (high, 2.0 * high);
        }
        for _ in 0..STEPS {
            let middle = (low + high) / 2.0;
            let found = of(middle)?;
            if (found - target).abs() <= TOLERANCE * target {
                return Ok(Some(middle));
            }
            if found < target { low = middle } else { high = middle }
        }
        Ok(Some((low + high) / 2.0))
    }
}
