//! One folder per op.

pub mod expert_ffn;
pub mod linear;
pub mod matmul;
