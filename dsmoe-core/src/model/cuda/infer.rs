//! Inference on a GPU: matrices in bf16, norms and routers in f32.

use std::ops::Range;

use dsmoe_kernels::cuda::ops::{
    attention, cross_entropy, elementwise, embedding, expert_ffn, ffn, rms_norm, rope, router,
};
use dsmoe_kernels::cuda::{Element, Gpu, GpuBuf, Graph, View, ViewMut};
use dsmoe_router::{RouterConfig, RoutingStats};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::super::Ranges;
use super::super::pack::Source;
use super::super::ragged::{Likelihood, Place};
use super::{Products, attention_dims, rope_rows};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ffn::DeviceFfn;

/// Tokens up to which products are read as matrix times vector.
const FEW: usize = 8;
/// Rows of logits at a time.
const LOGIT_ROWS: usize = 1024;

/// A model's weights on a device.
#[derive(Debug)]
pub(in super::super) struct CudaInference {
    gpu: Gpu,
    /// `[vocab, hidden]`; none when it is the head.
    embedding: Option<GpuBuf<bf16>>,
    layers: Vec<Layer>,
    norm: GpuBuf<f32>,
    head: GpuBuf<bf16>,
    /// Angles of all positions.
    rope: GpuBuf<f32>,
}

#[derive(Debug)]
struct Layer {
    input_norm: GpuBuf<f32>,
    qkv: GpuBuf<bf16>,
    o: GpuBuf<bf16>,
    post_norm: GpuBuf<f32>,
    kind: DeviceFfn,
    gate: GpuBuf<bf16>,
    up: GpuBuf<bf16>,
    /// Transposed.
    down: GpuBuf<bf16>,
    router: Option<GpuBuf<f32>>,
    bias: Option<GpuBuf<f32>>,
}
