#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod config;
mod error;
pub mod init;

pub use config::{GateValue, Rescale, RouterConfig, ZeroActive};
pub use error::{Error, Result};
pub use init::{RouterInit, router_weights};
