//! Describes which blocks of an FFN are experts with gates, and which of them all tokens run.

use std::ops::Range;
use std::sync::Arc;

use dsmoe_router::expert_map::ExpertMap;

use super::Gated;

/// The experts of an FFN that have gates, among equal blocks of its neurons.
///
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, DsmoeForm, ExpertParts, Ffn, Gated};
/// use dsmoe_router::RouterConfig;
///
/// // The first of four experts runs always.
/// let form = DsmoeForm { core: 1, ..DsmoeForm::new(RouterConfig::new(4), true) };
/// let parts: ExpertParts = DsmoeFfn::of(Gated::silu(16, 32), form).expert_parts().unwrap();
/// assert_eq!((parts.routed.clone(), parts.width(), parts.always()), (1..4, 8, 1));
/// assert_eq!(parts.gates, ["router.weight", "router.bias"]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertParts {
    /// The projections of all blocks, which come first in the parameters.
    pub gated: Gated,
    /// Blocks of equally many neurons.
    pub blocks: usize,
    /// The blocks that have a gate, in the order of the gates where each has one. All tokens run the others.
    pub routed: Range<usize>,
    /// The expert of every gate, of those that have gates; none where each has a gate of its own.
    pub map: Option<Arc<ExpertMap>>,
    /// Names of the tensors that have a row, or a value, for every gate, as far as they are there.
    pub gates: &'static [&'static str],
}

impl ExpertParts {
    /// Returns the neurons of a block.
    pub fn width(&self) -> usize {
        self.gated.intermediate / self.blocks
    }

    /// Returns the number of blocks that all tokens run.
    pub fn always(&self) -> usize {
        self.blocks - self.routed.len()
    }
}
