//! Models: their layers, gradients, inference and variants against oracles and golden numbers.

mod calibrate;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/golden.rs"]
mod golden;
mod golden_layer;
mod golden_model;
mod inference;
mod model_oracle;
mod ragged;
mod variants;
