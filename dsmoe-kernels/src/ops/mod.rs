//! One folder per op.

pub mod adamw;
pub mod add;
pub mod attention;
pub(crate) mod blocks;
pub mod cross_entropy;
pub mod embedding;
pub mod expert_ffn;
pub mod linear;
pub mod matmul;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
