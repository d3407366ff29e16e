//! The work space of the expert FFN.

use super::dims::Dims;
use super::open::Words;
use super::packed::tile_depth;
use crate::buf::Buf;
use crate::matmul::Precision;

/// Work space and precision of training. The space grows on demand and is kept; any scratch serves any shape.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) precision: Precision,
    pub(super) stored: Buf,
    pub(super) words: Words,
    pub(super) g: Buf,
    pub(super) da: Buf,
    pub(super) db: Buf,
    pub(super) scaled: Buf,
    pub(super) dpairs: Buf,
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
        for buf in [&mut self.g, &mut self.da, &mut self.db, &mut self.scaled] {
            buf.resize(values);
        }
        let pairs = dims.tokens * dims.num_experts;
        self.stored.resize(2 * pairs * tile_depth(dims.expert_width()));
        self.dpairs.resize(pairs);
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
