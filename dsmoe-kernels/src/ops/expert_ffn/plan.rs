//! The active pairs, and the parts of a run over them.

use std::ops::Range;

use super::dims::{Dims, Routes};
use crate::isa::Isa;
use crate::matmul::Precision;

/// The active pairs of tokens and experts, grouped by expert.
#[derive(Clone, Copy, Debug)]
pub enum Pairs<'a> {
    /// The pairs that a router chose.
    Routed(&'a Routes<'a>),
    /// Every token at the only expert, coefficient 1.
    Dense,
}

/// One run over experts of one kind, the core or those outside: its pairs, sizes, tier and precision.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    pub(super) pairs: Pairs<'a>,
    /// Without a core.
    pub(super) dims: Dims,
    pub(super) isa: Isa,
    pub(super) precision: Precision,
    /// Adds to y or dx.
    pub(super) accumulate: bool,
}

impl<'a> Plan<'a> {
    /// Cuts a run into one over the core, which is dense, and one over the experts outside that adds to its result. Returns
    /// each with its neurons; a run without neurons is left out.
    pub(super) fn parts(self) -> impl Iterator<Item = (Plan<'a>, Range<usize>)> {
        let dims = self.dims;
        let (end_of_core, end) = (dims.core_neurons(), dims.intermediate);
        let core = Plan { pairs: Pairs::Dense, dims: dims.of_core(), ..self };
        let routed = Plan { dims: dims.of_routed(), accumulate: self.accumulate || dims.core > 0, ..self };
        let parts = [(core, 0..end_of_core), (routed, end_of_core..end)];
        parts.into_iter().filter(|(_, neurons)| !neurons.is_empty())
    }

    /// Counts the values of an array with one for each neuron of a pair: of all pairs, or of the active ones.
    pub(super) fn saved_len(&self) -> usize {
        if self.dims.all_pairs {
            self.dims.tokens * self.dims.intermediate
        } else {
            self.num_pairs() * self.dims.expert_width()
        }
    }

    /// Returns the expert-major index of the first pair of `expert`.
    pub(super) fn offset(&self, expert: usize) -> usize {
        match self.pairs {
            Pairs::Routed(routes) => routes.offsets[expert],
            Pairs::Dense => expert * self.dims.tokens,
        }
    }

    /// Returns the pairs of `expert`.
    pub(super) fn pairs_of(&self, expert: usize) -> Range<usize> {
        self.offset(expert)..self.offset(expert + 1)
    }

    pub(super) fn num_pairs(&self) -> usize {
        self.offset(self.dims.num_experts)
    }

    /// Returns the tokens of pairs `pairs`; none if token t is pair t.
    pub(super) fn tokens(&self, pairs: Range<usize>) -> Option<&'a [u32]> {
        match self.pairs {
            Pairs::Routed(routes) => Some(&routes.tokens[pairs]),
            Pairs::Dense => None,
        }
    }

    pub(super) fn token(&self, pair: usize) -> usize {
        match self.pairs {
            Pairs::Routed(routes) => routes.tokens[pair] as usize,
            Pairs::Dense => pair,
        }
    }

    pub(super) fn coefficient(&self, pair: usize) -> f32 {
        match self.pairs {
            Pairs::Routed(routes) => routes.coefficients[pair],
            Pairs::Dense => 1.0,
        }
    }

    /// Returns the expert of a pair.
    pub(super) fn expert(&self, pair: usize) -> usize {
        match self.pairs {
            Pairs::Routed(routes) => routes.offsets.partition_point(|&offset| offset <= pair) - 1,
            Pairs::Dense => 0,
        }
    }

    /// Lists the expert-major indices of the pairs of `token`, experts ascending.
    pub(super) fn slots(&self, token: usize) -> impl Iterator<Item = usize> + use<'a> {
        let (slots, dense) = match self.pairs {
            Pairs::Routed(r) => (&r.slots[r.token_offsets[token]..r.token_offsets[token + 1]], None),
            Pairs::Dense => (&[][..], Some(token)),
        };
        slots.iter().map(|&slot| slot as usize).chain(dense)
    }
}

pub(super) fn check_pairs(op: &str, pairs: Pairs<'_>, dims: Dims) {
    let Pairs::Routed(routes) = pairs else {
        assert_eq!([dims.num_experts, dims.core], [1, 0], "expert_ffn::{op}: a dense FFN has one expert");
        return;
    };
    let r = routes.tokens.len();
    assert!(
        routes.offsets.len() == dims.num_routed() + 1
            && routes.offsets.first() == Some(&0)
            && routes.offsets.last() == Some(&r)
            && routes.offsets.is_sorted()
            && routes.coefficients.len() == r
            && routes.token_offsets.len() == dims.tokens + 1
            && routes.token_offsets.last() == Some(&r)
            && routes.slots.len() == r,
        "expert_ffn::{op}: offsets {:?}, {r} tokens, {} coefficients, {} token_offsets, {} slots for {dims:?}",
        routes.offsets,
        routes.coefficients.len(),
        routes.token_offsets.len(),
        routes.slots.len()
    );
}
