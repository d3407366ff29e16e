//! One folder per op.

pub mod linear;
pub mod matmul;
