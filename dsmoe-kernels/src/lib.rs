//! CPU kernels of LLaMA and of DSMoE's gated expert FFN.
//!
//! Every op is a struct of named arguments with a method `run`, in a folder of [`ops`]: `mod.rs` states the contract
//! (formula, shapes, which outputs are set and which are added to), `reference.rs` defines it in f64 loops, and one body
//! generic over the vector width serves the scalar, AVX2 and AVX-512 tiers, chosen at run time by [`Isa`]. Forward and
//! backward are explicit pairs; there is no tape. Activation gradients are **set**, parameter gradients are **added to**.
//!
//! Results do not depend on the number of threads: work is cut by shape alone and every sum has one fixed order.
//! They may differ in the last bits between tiers.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod buf;
pub mod comm;
pub mod crew;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod isa;
pub mod mmap;
pub mod ops;
pub mod peak;
pub mod rng;
mod simd;
pub mod testing;

pub use isa::Isa;
pub use matmul::Precision;
pub use ops::*;
pub use swiglu::Activation;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
