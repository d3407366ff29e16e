#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod confidence;
pub mod config;
pub mod controller;
pub mod counts;
mod error;
pub mod estimator;
pub mod expert_map;
mod fade;
pub mod gate;
pub mod init;
pub mod linalg;
pub mod mixture;
pub mod reference;
pub mod routing;
pub mod separability;
pub mod sparsity;
pub mod stats;
pub mod ste;
pub mod thresholds;
pub mod topk;

pub use config::{GateValue, Rescale, RouterConfig, ZeroActive};
pub use controller::BudgetController;
pub use counts::LogitCounts;
pub use error::{Error, Result};
pub use estimator::{InactivePairs, InactiveSample, RouterGradient, RouterGradientAt};
pub use fade::Fade;
pub use gate::{Routed, route};
pub use init::{RouterInit, RouterValues, router_weights};
pub use routing::Routing;
pub use sparsity::{Pull, ShareLoss, SparsityGrad, SparsityOver};
pub use stats::{RoutingStats, RoutingSummary, TokenRoutes};
pub use thresholds::{Knot, ThresholdController};
