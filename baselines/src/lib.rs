#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod topk_moe;

pub use topk_moe::TopkMoeFfn;
