//! Ways to form experts of an FFN's neurons.

pub(crate) mod construction;
pub(crate) mod graph;
pub(crate) mod importance;
pub(crate) mod texts;
