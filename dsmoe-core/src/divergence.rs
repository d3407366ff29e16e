//! This module changes one layer of a dense model at a time and measures how far the distributions of the next token move:
//! their divergence, on a little text.
//!
//! ```text
//! per layer:  the text and all copies pass the layer; for every change of it a copy of the text passes the changed one
//! at the end: KL(p | q) of every copy,  p = softmax(head of the text),  q = softmax(head of the copy), mean over tokens
//! ```
//! So every weight is read once, and no model is in memory.

use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, alone};
use dsmoe_kernels::cross_entropy::{LogSoftmaxRow, Logits};
use dsmoe_kernels::matmul::{Mat, MatmulPacked, Packed};
use rayon::prelude::*;

use crate::calibrate::{Down, FfnTap, LayerStream, LayerWeights};
use crate::error::{Error, Result};
use crate::model::tensors::{in_pool, logits_of};

/// Tokens of a sequence, at most: a few long ones are too few texts.
const SEQ: usize = 256;
/// Tokens whose logits exist at a time.
const BLOCK: usize = 512;

/// A changed FFN: sets its first argument `[seq, hidden]` to the output.
///
/// ```
/// use dsmoe_core::calibrate::{Down, LayerStream};
/// use dsmoe_core::divergence::{Alone, Change};
/// use dsmoe_kernels::Precision;
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, dense, &Default::default(), &mut |_| {})?;
/// # let text = vec![vec![1, 5, 9, 2]];
///
/// let stream = LayerStream::open(dense, &text)?;
/// let mut alone = Alone::open(dense, &text, 4, Precision::F32)?;
/// for i in 0..stream.config().num_layers {
///     let weights = stream.layer(i)?;
///     let down = Down::of(Precision::F32, &weights);
///     let same: Box<Change<'_>> = Box::new(|y, tap| down.forward(y, tap.neurons));
///     // Half of the output.
///     let less: Box<Change<'_>> = Box::new(|y, tap| {
///         down.forward(y, tap.neurons);
///         y.iter_mut().for_each(|y| *y *= 0.5);
///     });
///     alone.layer(&weights, &mut [same, less])?;
/// }
/// let costs = alone.divergences()?;
/// assert!(costs.chunks(2).all(|pair| pair[0] < pair[1]), "{costs:?}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type Change<'a> = dyn FnMut(&mut [f32], FfnTap<'_>) + Send + 'a;

/// The states of the text and of its copies, each with one layer changed.
///
/// ```
/// use dsmoe_core::calibrate::LayerStream;
/// use dsmoe_core::divergence::{Alone, Change};
/// use dsmoe_kernels::Precision;
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, dense, &Default::default(), &mut |_| {})?;
///
/// let text = vec![vec![1, 5, 9, 2]];
/// let stream = LayerStream::open(dense, &text)?;
/// let mut alone = Alone::open(dense, &text, 4, Precision::F32)?;
/// for i in 0..stream.config().num_layers {
///     // The FFN gives nothing.
///     let nothing: Box<Change<'_>> = Box::new(|y, _| y.fill(0.0));
///     alone.layer(&stream.layer(i)?, &mut [nothing])?;
/// }
/// let costs = alone.divergences()?;
/// assert!(costs.iter().all(|cost| *cost > 0.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Alone {
    stream: LayerStream,
    /// Sequences of the text.
    sequences: usize,
    copies: usize,
}

impl Alone {
    /// Opens the dense model in `dir` for about `tokens` tokens of `text`, which are sequences of one length.
    ///
    /// # Errors
    /// Those of [`LayerStream::open`].
    pub fn open(dir: &Path, text: &[Vec<u32>], tokens: usize, precision: Precision) -> Result<Alone> {
        Alone::open_on(alone(), dir, text, tokens, precision)
    }

    /// Does as [`Alone::open`] on the processes of `comm`, which divide the text and its copies.
    ///
    /// # Errors
    /// Those of [`LayerStream::open`].
    pub fn open_on(
        comm: &Arc<dyn Communicator>,
        dir: &Path,
        text: &[Vec<u32>],
        tokens: usize,
        precision: Precision,
    ) -> Result<Alone> {
        let seq = text.first().map_or(0, Vec::len).min(SEQ);
        let sequences = (tokens / seq.max(1)).clamp(1, text.len().max(1));
        // Sequences from all parts of the text.
        let step = (text.len() / sequences).max(1);
        let chosen = text.iter().step_by(step).take(sequences);
        let text: Vec<Vec<u32>> = chosen.map(|ids| ids[..seq].to_vec()).collect();
        let stream = LayerStream::open_on(comm, dir, &text)?.in_precision(precision);
        Ok(Alone { stream, sequences: text.len(), copies: 0 })
    }

    /// Passes a layer, and adds a copy of the text for each of `changes` of its FFN.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn layer(&mut self, weights: &LayerWeights, changes: &mut [Box<Change<'_>>]) -> Result<()> {
        let Alone { stream, sequences, copies } = self;
        stream.attend(weights)?;
        let unchanged = *sequences * (*copies + 1);
        stream.repeat(*sequences, changes.len());
        *copies += changes.len();
        let dense = Down::of(stream.precision(), weights);
        stream.join_ffn(weights, &mut |y, tap| match tap.sequence.checked_sub(unchanged) {
            None => dense.forward(y, tap.neurons),
            Some(sequence) => changes[sequence / *sequences](y, tap),
        })
    }

    /// Returns the divergence of every copy, in their order.
    ///
    /// # Errors
    /// The output head cannot be read, or an output is not finite.
    pub fn divergences(mut self) -> Result<Vec<f64>> {
        self.stream.norm_last()?;
        let (hidden, tokens) = (self.stream.config().hidden, self.sequences * self.stream.seq());
        let states = self.stream.states();
        let mut whole = vec![Sum::default(); tokens];
        let (mut z, mut p) = (Buf::default(), Buf::default());
        self.pieces(&mut |head| {
            head.logits(&mut z, &states[..tokens * hidden]);
            let rows = whole.par_iter_mut().zip(z.par_chunks_exact_mut(head.outputs()));
            rows.for_each(|(sum, z)| sum.add(z, &[]));
        })?;
        let mut sums = vec![Sum::default(); states.len() / hidden.max(1)];
        self.pieces(&mut |head| {
            let width = head.outputs();
            head.logits(&mut p, &states[..tokens * hidden]);
            p.par_chunks_exact_mut(width).zip(&whole).for_each(|(p, whole)| {
                p.iter_mut().for_each(|z| *z = (f64::from(*z) - whole.ln).exp() as f32);
            });
            for (block, (sums, h)) in sums.chunks_mut(BLOCK).zip(states.chunks(BLOCK * hidden)).enumerate() {
                head.logits(&mut z, h);
                sums.par_iter_mut().zip(z.par_chunks_exact_mut(width)).enumerate().for_each(
                    |(row, (sum, z))| {
                        let token = (block * BLOCK + row) % tokens;
                        sum.add(z, &p[token * width..][..width]);
                    },
                );
            }
        })?;
        // KL = sum p ln p - sum p ln q, and ln q = z - ln of the sum of its exponentials.
        let surprise = |sums: &[Sum]| sums.iter().map(|sum| sum.ln - sum.under).sum::<f64>() / tokens as f64;
        let (text, copies) = sums.split_at(tokens);
        let entropy = surprise(text);
        let all: Vec<f64> = copies.chunks_exact(tokens).map(|copy| surprise(copy) - entropy).collect();
        match all.iter().all(|divergence| divergence.is_finite()) {
            true => Ok(all),
            false => Err(Error::Calibration {
                problem: "the model's output is not finite with one layer changed".to_owned(),
                help: "use an undamaged model".to_owned(),
            }),
        }
    }

    /// Gives the output head in pieces of its rows.
    fn pieces(&self, see: &mut (dyn FnMut(&Head) + Send)) -> Result<()> {
        let config = self.stream.config();
        let (precision, transform) = (self.stream.precision(), logits_of(config));
        self.stream.head(&mut |rows| {
            let packed = Packed::new(precision, Mat::new(rows, rows.len() / config.hidden, config.hidden));
            in_pool(|| see(&Head { packed, transform }));
        })
    }
}

/// Some rows of the output head.
struct Head {
    packed: Packed,
    transform: Logits,
}

impl Head {
    fn outputs(&self) -> usize {
        self.packed.outputs()
    }

    /// Sets `z` to the logits of normed states `h`.
    fn logits(&self, z: &mut Buf, h: &[f32]) {
        let (outputs, inputs) = (self.packed.outputs(), self.packed.inputs());
        let rows = h.len() / inputs;
        z.resize(rows * outputs);
        MatmulPacked { c: z, a: Mat::new(h, rows, inputs), w: &self.packed }.run();
        self.transform.apply(z);
    }
}

/// Sums over the logits z of a token, as far as they were seen.
#[derive(Clone, Copy, Debug)]
struct Sum {
    /// ln sum e^z
    ln: f64,
    /// sum p z
    under: f64,
}

impl Default for Sum {
    fn default() -> Sum {
        Sum { ln: f64::NEG_INFINITY, under: 0.0 }
    }
}

impl Sum {
    /// Adds logits, which it overwrites, under the probabilities `p`; there may be none of these.
    fn add(&mut self, z: &mut [f32], p: &[f32]) {
        self.under += dot(z, p);
        let first = f64::from(z[0]);
        LogSoftmaxRow { logits: z }.run();
        let ln = first - f64::from(z[0]);
        let (most, least) = (self.ln.max(ln), self.ln.min(ln));
        self.ln = most + (least - most).exp().ln_1p();
    }
}

/// Returns the sum of products, in lanes that the compiler can put into registers.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f32; 16];
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let (left, right) = (a.chunks_exact(lanes.len()), b.chunks_exact(lanes.len()));
    let rest = left.remainder().iter().zip(right.remainder()).map(|(a, b)| a * b).sum::<f32>();
    for (a, b) in left.zip(right) {
        lanes.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
    f64::from(rest) + lanes.into_iter().map(f64::from).sum::<f64>()
}
