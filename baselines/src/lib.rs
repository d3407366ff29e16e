//! Methods that DSMoE is compared with, as implementations of dsmoe-core's Ffn.
#![forbid(unsafe_code)]
