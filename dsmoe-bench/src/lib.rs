//! The dsmoe command: inspect, convert, export, train, evaluate, generate, and reproduce DSMoE's comparisons.
#![forbid(unsafe_code)]
