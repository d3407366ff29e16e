//! Ways to form experts of an FFN's neurons.

mod assignment;
pub(crate) mod construction;
pub(crate) mod graph;
pub(crate) mod importance;
pub(crate) mod kmeans;
pub(crate) mod texts;
