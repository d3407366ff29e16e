//! Linears of a layer for inference: as they are, or over the inputs that exceed thresholds.

use std::ops::Range;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::kept::{self, Columns};
use dsmoe_kernels::linear;
use dsmoe_kernels::matmul::Packed;
use serde::{Deserialize, Serialize};

/// Linears of a layer: q, k, v, o, gate, up, down.
pub const LINEARS: usize = 7;

/// Thresholds of a layer and what they leave. Entries of lists are those of q, k, v, o, gate, up and down.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::kept::{LINEARS, LayerThresholds, UsedWeights};
/// use dsmoe_core::model::{Cache, Workspace};
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let model = Model::new(preset("tiny")?);
/// let thresholds = LayerThresholds { inputs: [0.5; LINEARS], ..LayerThresholds::NONE };
/// let inference =
///     Inference::with_thresholds(&model, vec![thresholds; model.config().num_layers], Precision::F32);
/// let (mut cache, mut workspace) = (Cache::new(&inference, 8), Workspace::default());
/// inference.decode(&[1, 5, 9], &mut cache, None, &mut workspace)?;
/// let used: UsedWeights = workspace.take_used();
/// assert!(used.words().iter().any(|&word| word > 0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerThresholds {
    /// An input of a linear is multiplied if its magnitude exceeds this.
    pub inputs: [f32; LINEARS],
    /// A neuron is computed if the magnitude of its gate, after the activation, exceeds this; 0 computes all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gate: f32,
    /// Share of the weights that a token used on calibration text.
    pub used: [f64; LINEARS],
}

fn is_zero(x: &f32) -> bool {
    *x == 0.0
}

impl LayerThresholds {
    /// Skips nothing.
    pub const NONE: LayerThresholds =
        LayerThresholds { inputs: [0.0; LINEARS], gate: 0.0, used: [1.0; LINEARS] };

    /// Returns whether inputs of any of these linears are skipped.
    pub fn skips_in(&self, linears: std::ops::Range<usize>) -> bool {
        self.inputs[linears].iter().any(|&threshold| threshold > 0.0)
    }
}

/// Memory of layers with thresholds, and the weights that tokens have used.
///
/// ```
/// use dsmoe_core::ffn::FfnScratch;
/// use dsmoe_core::kept::KeptScratch;
///
/// let mut scratch = FfnScratch::default();
/// // Frees what layers with thresholds have used for a long prompt; the next pass makes room again.
/// scratch.kept = KeptScratch::default();
/// ```
#[derive(Debug, Default)]
pub struct KeptScratch {
    pub(crate) ops: kept::Scratch,
    pub(crate) gate: Buf,
    pub(crate) up: Buf,
    pub(crate) neurons: Buf,
    pub(crate) used: UsedWeights,
}

/// Sums over tokens of the weights that they used, by layer and linear. Empty without thresholds.
///
/// ```
/// use dsmoe_core::kept::{LINEARS, LayerThresholds, UsedWeights};
/// use dsmoe_core::model::{Cache, Workspace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Model::new(preset("tiny")?);
/// # let thresholds = LayerThresholds { inputs: [0.5; LINEARS], ..LayerThresholds::NONE };
/// # let thresholds = vec![thresholds; model.config().num_layers];
/// # let model = Inference::with_thresholds(&model, thresholds, dsmoe_kernels::Precision::F32);
///
/// let (mut cache, mut workspace) = (Cache::new(&model, 8), Workspace::default());
/// model.decode(&[1, 5, 9], &mut cache, None, &mut workspace)?;
/// let used: UsedWeights = workspace.take_used();
/// assert_eq!(workspace.take_used(), UsedWeights::default());
/// // The sums of two processes that ran the same text.
/// let mut both = UsedWeights::default();
/// both.add_words(&used.words());
/// both.add_words(&used.words());
/// assert!(both.words().iter().zip(used.words()).all(|(both, one)| *both == 2 * one));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UsedWeights {
    tokens: u64,
    layers: Vec<[u64; LINEARS]>,
}

impl UsedWeights {
    /// Counts tokens that are about to pass all layers of a model with thresholds.
    pub(crate) fn begin(&mut self, layers: usize, tokens: usize) {
        self.layers.resize(layers, [0; LINEARS]);
        self.tokens += tokens as u64;
    }

    /// Returns all sums as words, for other processes.
    pub fn words(&self) -> Vec<u64> {
        std::iter::once(self.tokens).chain(self.layers.iter().flatten().copied()).collect()
    }

    /// Adds sums that [`UsedWeights::words`] of a model with as many layers has given.
    pub fn add_words(&mut self, words: &[u64]) {
        let Some((tokens, layers)) = words.split_first() else { return };
        self.tokens += tokens;
        let layers = layers.as_chunks::<LINEARS>().0;
        self.layers.resize(self.layers.len().max(layers.len()), [0; LINEARS]);
        for (sums, others) in self.layers.iter_mut().zip(layers) {
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        }
    }

    /// Returns the sums of tokens and of weights by layer.
    pub(crate) fn sums(&self) -> (u64, &[[u64; LINEARS]]) {
        (self.tokens, &self.layers)
    }

    /// Adds the weights of one linear that some tokens used.
    pub(crate) fn add(&mut self, layer: usize, linear: usize, weights: usize) {
        if let Some(of_layer) = self.layers.get_mut(layer) {
            of_layer[linear] += weights as u64;
        }
    }
}

/// The linears that read one input: q, k and v; o; gate and up; down.
pub(crate) const GROUPS: [Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

/// Linears with one input.
#[derive(Debug)]
pub(crate) enum Linears<const N: usize> {
    /// All inputs are multiplied.
    Whole([Packed; N]),
    /// Inputs that do not exceed the thresholds are skipped.
    Kept {
        /// The weights.
        weights: [Columns; N],
        /// The threshold of each.
        thresholds: [f32; N],
        /// Number of the layer, and of the first linear in it.
        at: (usize, usize),
    },
}

/// Arguments of [`Linears::forward`].
pub(crate) struct LinearsForward<'a, const N: usize> {
    /// `[rows, outputs]` of each, set.
    pub(crate) ys: [&'a mut [f32]; N],
    /// `[rows, inputs]`
    pub(crate) x: &'a [f32],
    /// `[outputs]` of each.
    pub(crate) biases: [Option<&'a [f32]>; N],
    pub(crate) rows: usize,
    pub(crate) ops: &'a mut kept::Scratch,
    pub(crate) used: &'a mut UsedWeights,
}

impl<const N: usize> Linears<N> {
    /// Returns the outputs of one of them.
    pub(crate) fn outputs(&self, i: usize) -> usize {
        match self {
            Linears::Whole(weights) => weights[i].outputs(),
            Linears::Kept { weights, .. } => weights[i].outputs(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Linears::Whole(weights) => weights.iter().map(Packed::bytes).sum(),
            Linears::Kept { weights, .. } => weights.iter().map(Columns::bytes).sum(),
        }
    }

    pub(crate) fn forward(&self, args: LinearsForward<'_, N>) {
        let LinearsForward { ys, x, biases, rows, ops, used } = args;
        match self {
            Linears::Whole(weights) => {
                linear::ForwardPackedEach { ys, x, ws: weights.each_ref(), biases, rows }.run();
            }
            Linears::Kept { weights, thresholds, at: (layer, first) } => {
                let (ws, thresholds) = (weights.each_ref(), *thresholds);
                let kept = kept::Forward { ys, x, ws, thresholds, biases, rows, scratch: ops }.run();
                for (i, kept) in kept.into_iter().enumerate() {
                    used.add(*layer, first + i, kept * weights[i].outputs());
                }
            }
        }
    }
}
