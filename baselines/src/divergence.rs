//! The divergence of a changed model's next-token distribution from the model's own, on a little text.

use dsmoe_core::model::{Cache, Inference, Model, Workspace};
use dsmoe_kernels::Precision;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Bytes of the model's distributions that are kept.
const MOST_BYTES: usize = 1 << 29;

/// A model and its distributions.
pub(crate) struct Divergence<'a> {
    model: Model,
    precision: Precision,
    text: &'a [Vec<u32>],
    /// Logarithms of the model's probabilities `[tokens, vocab]`, by sequence.
    whole: Vec<Vec<f32>>,
}

impl<'a> Divergence<'a> {
    /// Runs `model` on as much of `text` as memory is spent for.
    ///
    /// # Errors
    /// The text is not of this model.
    ///
    /// # Panics
    /// There is no text.
    pub(crate) fn new(model: Model, precision: Precision, text: &'a [Vec<u32>]) -> Result<Divergence<'a>> {
        let of_one = 4 * text[0].len() * model.config().vocab_size;
        let text = &text[..text.len().min((MOST_BYTES / of_one.max(1)).max(1))];
        let whole = Inference::new(&model, precision);
        let whole = text.iter().map(|ids| log_probabilities(&whole, ids)).collect::<Result<_>>()?;
        Ok(Divergence { model, precision, text, whole })
    }

    /// Returns the model.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the mean divergence with other values of some tensors, in the layout of the arena. The model keeps its own.
    ///
    /// # Errors
    /// The changed model's output is not finite.
    ///
    /// # Panics
    /// The model has no such tensor, or one of another size.
    pub(crate) fn with(&mut self, changes: Vec<(String, Vec<f32>)>) -> Result<f64> {
        let mut saved = Vec::with_capacity(changes.len());
        for (name, values) in changes {
            let entry =
                self.model.layout().get(&name).unwrap_or_else(|| panic!("divergence: no tensor {name}"));
            let range = entry.range.clone();
            let own = &mut self.model.params_mut()[range.clone()];
            saved.push((range, own.to_vec()));
            own.copy_from_slice(&values);
        }
        let changed = Inference::new(&self.model, self.precision);
        for (range, values) in saved.into_iter().rev() {
            self.model.params_mut()[range].copy_from_slice(&values);
        }
        let (mut sum, mut tokens) = (0.0, 0);
        for (ids, whole) in self.text.iter().zip(&self.whole) {
            let other = log_probabilities(&changed, ids)?;
            let vocab = other.len() / ids.len();
            let rows = whole.par_chunks_exact(vocab).zip(other.par_chunks_exact(vocab));
            let of_rows: Vec<f64> = rows.map(|(p, q)| divergence(p, q)).collect();
            sum += of_rows.iter().sum::<f64>();
            tokens += ids.len();
        }
        let mean = sum / tokens as f64;
        match mean.is_finite() {
            true => Ok(mean),
            false => {
                let help = "check the model with eval";
                Err(Error::numeric("the output of the changed model", "is not finite", help))
            }
        }
    }
}

/// Returns KL(p | q) of distributions given by logarithms.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    p.iter().zip(q).map(|(&p, &q)| f64::from(p.exp()) * f64::from(p - q)).sum()
}

/// Returns the logarithms of the probabilities of every next token, `[tokens, vocab]`.
fn log_probabilities(model: &Inference, ids: &[u32]) -> Result<Vec<f32>> {
    let mut cache = Cache::new(model, ids.len());
    let mut workspace = Workspace::default();
    let mut logits = model.logits(ids, ids.len(), &mut cache, None, &mut workspace)?.to_vec();
    logits.par_chunks_exact_mut(model.config().vocab_size).for_each(|row| {
        let largest = row.iter().fold(f32::NEG_INFINITY, |most, &z| most.max(z));
        let sum: f64 = row.iter().map(|&z| f64::from(z - largest).exp()).sum();
        let shift = largest + sum.ln() as f32;
        row.iter_mut().for_each(|z| *z -= shift);
    });
    Ok(logits)
}
