//! Parameters that a pass is lent unit by unit: the embedding, each layer, and the final norm with the head, as
//! [`Shards::units`](crate::shard::Shards::units) number them.

use std::ops::Range;

use crate::error::Result;

/// The parameters of a unit, by their places in the arena.
///
/// [`Units`](crate::model::Units) has an example.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    first: usize,
    values: &'a [f32],
}

impl<'a> Params<'a> {
    /// Views `values`, the part of the arena that starts at `first`.
    pub fn new(first: usize, values: &'a [f32]) -> Params<'a> {
        Params { first, values }
    }

    pub(crate) fn of(self, range: &Range<usize>) -> &'a [f32] {
        &self.values[range.start - self.first..range.end - self.first]
    }
}

/// The parameters of a pass. The pass works on one unit at a time: what it was lent of another is no longer used.
///
/// [`Units`](crate::model::Units) has an example.
pub trait Weights: Send {
    /// Lends the parameters of unit `unit`.
    ///
    /// # Errors
    /// They lie in several processes, and communication fails.
    fn params(&mut self, unit: usize) -> Result<Params<'_>>;
}
