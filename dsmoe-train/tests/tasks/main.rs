//! A model's answers to benchmarks: against lm-evaluation-harness, and against themselves in other circumstances.

mod bodies;
mod golden;
mod malformed;
mod responder;
