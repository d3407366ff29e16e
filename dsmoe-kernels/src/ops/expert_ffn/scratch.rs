//! The work space of the expert FFN.

use std::ops::Range;

use super::dims::Dims;
use super::open::Words;
use super::outer;
use super::packed::{PackedWeights, tile_depth};
use super::strips::Run;
use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::Precision;

/// The memory of a sum over experts. Its lists are made anew in every call.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// The neurons that the sum reads; before it those that gradients of weights read.
    pub(super) neurons: Buf,
    pub(super) runs: Vec<Run<'static>>,
    /// Rows of every run in every strip.
    pub(super) rows: Vec<Range<usize>>,
}

/// Returns an empty vector of another type in the memory of `used`, if their items have one layout: collecting from a
/// vector keeps its memory then.
pub(super) fn recycled<A, B>(mut used: Vec<A>) -> Vec<B> {
    used.clear();
    used.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}

/// Work space and precision of training. The space grows on demand and is kept; any scratch serves any shape.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) precision: Precision,
    pub(super) stored: Stored,
    pub(super) words: Words,
    pub(super) g: Buf,
    pub(super) da: Buf,
    pub(super) db: Buf,
    pub(super) scaled: Buf,
    pub(super) dpairs: Buf,
    pub(super) outer: outer::Words,
}

impl Scratch {
    /// Returns an empty scratch; in training, products round their operands to `precision`. (Inference has the
    /// precision of its packed weights.)
    pub fn new(precision: Precision) -> Scratch {
        Scratch { precision, ..Scratch::default() }
    }

    /// Reserves the memory for training on `dims` with any routing.
    pub fn reserve(&mut self, dims: Dims) {
        let values = dims.tokens * dims.intermediate;
        for buf in [&mut self.da, &mut self.db, &mut self.scaled] {
            buf.resize(values);
        }
        let pairs = dims.tokens * dims.num_experts;
        let padded = pairs * tile_depth(dims.expert_width());
        self.g.resize(padded);
        self.stored.neurons.resize(2 * padded);
        self.dpairs.resize(pairs);
    }

    /// Reserves the memory for a forward of `tokens` tokens over `weights` with any routing.
    pub fn reserve_forward(&mut self, weights: &PackedWeights, tokens: usize) {
        self.words.reserve(weights, tokens, Isa::current());
    }

    /// Returns the precision to which training rounds.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Changes the precision to which training rounds.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }
}
