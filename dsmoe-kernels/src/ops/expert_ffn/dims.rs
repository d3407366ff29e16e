//! The sizes and operands of the expert FFN, and the checks of lengths against them.

use std::ops::Range;

use crate::buf::Buf;
use crate::swiglu::Activation;

/// The sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of x and y.
    pub tokens: usize,
    /// Columns of x and y.
    pub hidden: usize,
    /// Neurons of all experts together.
    pub intermediate: usize,
    /// Experts; divides `intermediate`.
    pub num_experts: usize,
    /// The leading experts that run for every token, with coefficient 1. They are no part of the routing.
    pub core: usize,
    /// Training computes the coefficient gradients of inactive pairs too, which the straight-through rule needs (eq. 16).
    /// Without it a, b and B are computed for active pairs only; [`PairDots`](super::PairDots) then has those of chosen pairs. Inference
    /// ignores it.
    pub all_pairs: bool,
    /// The activation of a neuron's gate.
    pub activation: Activation,
}

impl Dims {
    /// Returns the sizes of a dense FFN, which has one expert.
    pub fn dense(tokens: usize, hidden: usize, intermediate: usize, activation: Activation) -> Dims {
        Dims { tokens, hidden, intermediate, num_experts: 1, core: 0, all_pairs: true, activation }
    }

    /// Returns the neurons of one expert.
    pub fn expert_width(self) -> usize {
        self.intermediate / self.num_experts
    }

    /// Returns the experts that the routing is about: those outside the core.
    pub fn num_routed(self) -> usize {
        self.num_experts - self.core
    }

    /// Returns the neurons of the core.
    pub(super) fn core_neurons(self) -> usize {
        self.core * self.expert_width()
    }

    /// Returns the sizes of the core, which is a dense FFN.
    pub(super) fn of_core(self) -> Dims {
        Dims::dense(self.tokens, self.hidden, self.core_neurons(), self.activation)
    }

    /// Returns the sizes of the experts outside the core.
    pub(super) fn of_routed(self) -> Dims {
        let intermediate = self.intermediate - self.core_neurons();
        Dims { intermediate, num_experts: self.num_routed(), core: 0, ..self }
    }
}

/// The tokens of each expert outside the core in CSR form, with the token-major inverse. R is the number of active pairs: pair r of the
/// expert-major arrays is token `tokens[r]` at the expert i with `offsets[i] <= r < offsets[i+1]`.
#[derive(Clone, Copy, Debug)]
pub struct Routes<'a> {
    /// `[num_routed + 1]`: where each expert's pairs start.
    pub offsets: &'a [usize],
    /// `[R]`, ascending inside an expert.
    pub tokens: &'a [u32],
    /// `[R]`
    pub coefficients: &'a [f32],
    /// `[tokens + 1]`: where each token's pairs start in `slots`.
    pub token_offsets: &'a [usize],
    /// `[R]`: token-major, the pair's index in the expert-major arrays; ascending inside a token.
    pub slots: &'a [u32],
}

/// The three matrices, each `[intermediate, hidden]`, and the biases of an FFN that has them.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `w_gate`
    pub gate: &'a [f32],
    /// `w_up`
    pub up: &'a [f32],
    /// `w_down`, transposed: row j is the output of neuron j.
    pub down: &'a [f32],
    /// The biases.
    pub biases: Option<Biases<'a>>,
}

impl<'a> Weights<'a> {
    /// Returns the weights of some neurons. The bias of the down projection belongs to no neuron and stays.
    pub(super) fn of(&self, neurons: Range<usize>, hidden: usize) -> Weights<'a> {
        let rows = |w: &'a [f32]| &w[neurons.start * hidden..neurons.end * hidden];
        let biases = self.biases.map(|Biases { gate, up, down }| Biases {
            gate: &gate[neurons.clone()],
            up: &up[neurons.clone()],
            down,
        });
        Weights { gate: rows(self.gate), up: rows(self.up), down: rows(self.down), biases }
    }
}

/// The biases of the three projections.
#[derive(Clone, Copy, Debug)]
pub struct Biases<'a> {
    /// `[intermediate]`, added before the activation.
    pub gate: &'a [f32],
    /// `[intermediate]`
    pub up: &'a [f32],
    /// `[hidden]`, added once to every row of y.
    pub down: &'a [f32],
}

/// Gradients of [`Weights`], added to.
#[derive(Debug)]
pub struct WeightGrads<'a> {
    /// `[intermediate, hidden]`
    pub gate: &'a mut [f32],
    /// `[intermediate, hidden]`
    pub up: &'a mut [f32],
    /// `[intermediate, hidden]`
    pub down: &'a mut [f32],
    /// Those of the biases, where the weights have biases.
    pub biases: Option<BiasGrads<'a>>,
}

impl WeightGrads<'_> {
    /// Returns the gradients of the weights that [`Weights::of`] returns.
    pub(super) fn of(&mut self, neurons: Range<usize>, hidden: usize) -> WeightGrads<'_> {
        let rows = neurons.start * hidden..neurons.end * hidden;
        let biases = self.biases.as_mut().map(|BiasGrads { gate, up, down }| BiasGrads {
            gate: &mut gate[neurons.clone()],
            up: &mut up[neurons.clone()],
            down,
        });
        WeightGrads {
            gate: &mut self.gate[rows.clone()],
            up: &mut self.up[rows.clone()],
            down: &mut self.down[rows],
            biases,
        }
    }
}

/// Gradients of [`Biases`], added to.
#[derive(Debug)]
pub struct BiasGrads<'a> {
    /// `[intermediate]`
    pub gate: &'a mut [f32],
    /// `[intermediate]`
    pub up: &'a mut [f32],
    /// `[hidden]`
    pub down: &'a mut [f32],
}

/// The values of the forward that the backward needs; set by [`ForwardTrain`](super::ForwardTrain).
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// `x Wg^T`: `[tokens, intermediate]`, or of the active pairs alone `[R, expert_width]`.
    pub a: Buf,
    /// `x Wu^T`, as `a`.
    pub b: Buf,
}

impl Saved {
    /// Allocates the memory that the largest routing of `dims` needs.
    pub fn with_room(dims: Dims) -> Saved {
        let len = dims.tokens * dims.intermediate;
        Saved { a: Buf::zeros(len), b: Buf::zeros(len) }
    }
}

pub(super) fn check(op: &str, y: &[f32], x: &[f32], weights: &Weights<'_>, dims: Dims) {
    let Dims { tokens, hidden, intermediate, num_experts, core, .. } = dims;
    assert!(
        num_experts > 0 && intermediate.is_multiple_of(num_experts) && core <= num_experts,
        "expert_ffn::{op}: num_experts does not divide intermediate, or the core has more, in {dims:?}"
    );
    let w = [weights.gate.len(), weights.up.len(), weights.down.len()];
    assert!(
        x.len() == tokens * hidden && y.len() == x.len() && w == [intermediate * hidden; 3],
        "expert_ffn::{op}: input {}, output {}, weights {w:?} values for {dims:?}",
        x.len(),
        y.len()
    );
    let biases = weights.biases.map(|biases| [biases.gate.len(), biases.up.len(), biases.down.len()]);
    check_biases(op, biases, dims);
}

fn check_biases(op: &str, biases: Option<[usize; 3]>, dims: Dims) {
    let want = [dims.intermediate, dims.intermediate, dims.hidden];
    assert!(
        biases.is_none_or(|biases| biases == want),
        "expert_ffn::{op}: biases {biases:?} values for {dims:?}"
    );
}

pub(super) fn check_grads(op: &str, grads: &WeightGrads<'_>, weights: &Weights<'_>, dims: Dims) {
    let biases = grads.biases.as_ref().map(|biases| [biases.gate.len(), biases.up.len(), biases.down.len()]);
    assert!(
        biases.is_some() == weights.biases.is_some(),
        "expert_ffn::{op}: gradients of biases {biases:?} for weights with biases {:?}",
        weights.biases.is_some()
    );
    check_biases(op, biases, dims);
    let w = [grads.gate.len(), grads.up.len(), grads.down.len()];
    assert!(
        w == [dims.intermediate * dims.hidden; 3],
        "expert_ffn::{op}: weight gradients {w:?} values for {dims:?}"
    );
}

pub(super) fn is_empty(dims: Dims) -> bool {
    dims.tokens == 0 || dims.hidden == 0 || dims.intermediate == 0
}
