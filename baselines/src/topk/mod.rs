//! FFNs of n experts of which a gate gives every token exactly k: the form of LLaMA-MoE and MoEfication.

mod convert;
mod ffn;
pub(crate) mod fit;
mod gate;
mod kind;
mod layers;
mod router;
mod spec;

pub use convert::EXPERTS_FILE;
pub(crate) use convert::{LayerExperts, check_experts, nearest, open_dense, write};
pub use ffn::TopkMoeFfn;
#[cfg(test)]
pub(crate) use ffn::infer;
pub(crate) use gate::{Gate, GateActs, GateWeights};
pub(crate) use kind::{READER, spec_of};
pub use spec::{GateNetwork, GateSpec, TopkSpec};
