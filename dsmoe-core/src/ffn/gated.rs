//! The gated FFN that all forms have in common: three projections, with their biases where the family has them.

use std::ops::Range;

use dsmoe_kernels::Activation;
use dsmoe_kernels::expert_ffn::{BiasGrads, Biases, Dims, WeightGrads, Weights};

use super::{DOWN_BIAS, OUTPUT_BIAS, projections, split, split_mut};
use crate::params::{TensorSpec, padded};

/// `y = (act(x W_gate^T + b_gate) * (x W_up^T + b_up)) W_down + b_down`, cut into experts or not.
///
/// ```
/// use dsmoe_core::ffn::{Gated, block_len};
///
/// let plain = Gated::silu(16, 32);
/// let biased = Gated { bias: true, ..plain };
/// assert_eq!((plain.tensors().len(), biased.tensors().len()), (3, 6));
/// // The projections lie first in the parameters of an FFN, and its gate after them.
/// assert_eq!(biased.len(), block_len(&biased.tensors()));
/// assert_eq!(plain.ranges()[1], 512..1024);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gated {
    /// Width of its input.
    pub hidden: usize,
    /// Neurons.
    pub intermediate: usize,
    /// act.
    pub activation: Activation,
    /// True if it has biases. That of the down projection belongs to no expert: every token gets it once.
    pub bias: bool,
    /// True if a bias is added to its output, once to every token, beside or without those of the projections.
    pub output_bias: bool,
}

impl Gated {
    /// Describes LLaMA's: silu, without biases.
    pub fn silu(hidden: usize, intermediate: usize) -> Gated {
        Gated { hidden, intermediate, activation: Activation::Silu, bias: false, output_bias: false }
    }

    /// Returns its tensors: the [`projections`], then the biases of gate, up and down, then that of the output.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = projections(self.hidden, self.intermediate);
        if self.bias {
            tensors.push(TensorSpec::bias("gate_proj.bias", self.intermediate));
            tensors.push(TensorSpec::bias("up_proj.bias", self.intermediate));
            tensors.push(TensorSpec::bias(DOWN_BIAS, self.hidden));
        }
        if self.output_bias {
            tensors.push(TensorSpec::bias(OUTPUT_BIAS, self.hidden));
        }
        tensors
    }

    /// Returns the length of its tensors in an arena. What else an FFN has comes after them.
    pub fn len(&self) -> usize {
        self.lens().map(padded).iter().sum()
    }

    /// Returns whether it has no neurons.
    pub fn is_empty(&self) -> bool {
        self.intermediate == 0
    }

    fn lens(&self) -> [usize; 7] {
        let matrix = self.hidden * self.intermediate;
        let [neurons, hidden] = [self.intermediate, self.hidden].map(|len| if self.bias { len } else { 0 });
        let output = if self.output_bias { self.hidden } else { 0 };
        [matrix, matrix, matrix, neurons, neurons, hidden, output]
    }

    /// Returns the ranges of its tensors in an FFN's part of the arena: gate, up, down, their biases, and that of the output;
    /// biases are empty where there are none.
    pub fn ranges(&self) -> [Range<usize>; 7] {
        let mut start = 0;
        self.lens().map(|len| {
            let range = start..start + len;
            start += padded(len);
            range
        })
    }

    /// Returns the views of its tensors at the start of an FFN's part of the arena.
    ///
    /// # Panics
    /// The part is shorter.
    pub fn weights<'a>(&self, params: &'a [f32]) -> Weights<'a> {
        let [gate, up, down, of_gate, of_up, of_down, _] = split(params, self.lens());
        let biases = self.bias.then_some(Biases { gate: of_gate, up: of_up, down: of_down });
        Weights { gate, up, down, biases }
    }

    /// Does as [`Gated::weights`] for gradients.
    ///
    /// # Panics
    /// Those of [`Gated::weights`].
    pub fn grads<'a>(&self, grads: &'a mut [f32]) -> WeightGrads<'a> {
        let [gate, up, down, of_gate, of_up, of_down, _] = split_mut(grads, self.lens());
        let biases = self.bias.then_some(BiasGrads { gate: of_gate, up: of_up, down: of_down });
        WeightGrads { gate, up, down, biases }
    }

    /// Returns the bias of the output `[hidden]`, at the start of an FFN's part of the arena; empty where there is none.
    ///
    /// # Panics
    /// Those of [`Gated::weights`].
    pub fn output_bias<'a>(&self, params: &'a [f32]) -> &'a [f32] {
        let [.., bias] = split(params, self.lens());
        bias
    }

    /// Adds to the gradient of the output's bias, where there is one, that of the output `dy` `[tokens, hidden]`.
    ///
    /// # Panics
    /// Those of [`Gated::weights`].
    pub fn add_output_bias_grad(&self, grads: &mut [f32], dy: &[f32]) {
        if self.output_bias {
            let [.., grads] = split_mut(grads, self.lens());
            for dy in dy.chunks_exact(grads.len()) {
                grads.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
        }
    }

    /// Returns the sizes of a pass over `tokens` tokens, undivided.
    pub fn dims(&self, tokens: usize) -> Dims {
        Dims::dense(tokens, self.hidden, self.intermediate, self.activation)
    }
}

/// Adds the bias of the output to every token of `y`; does nothing if `bias` is empty.
pub fn add_output_bias(y: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        for y in y.chunks_exact_mut(bias.len()) {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}
