//! Inference on a GPU: matrices in bf16, norms and routers in f32.

use std::ops::Range;
use std::sync::Mutex;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::cuda::ops::{
    attention, cross_entropy, elementwise, embedding, expert_ffn, ffn, linear, rms_norm, rope, router,
};
use dsmoe_kernels::cuda::{Element, Gpu, GpuBuf, Graph, View, ViewMut};
use dsmoe_kernels::{Precision, attention as shapes};
use dsmoe_router::RoutingStats;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::super::infer::Workspace;
use super::super::pack::{Parts, Source, fill};
use super::super::ragged::{Likelihood, Place};
use super::super::{Cache, set_threshold};
use super::{MemoryUse, Products, attention_dims, check_memory, device_ffns, gates, rope_rows};
use crate::accounting::Accounting;
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ffn::DeviceFfn;
use crate::params::padded;

/// Tokens up to which a product is a matrix read once for all of them.
const FEW: usize = linear::FEW;
/// Rows of logits at a time.
const LOGIT_ROWS: usize = 1024;

/// A model's weights on a device.
#[derive(Debug)]
pub(in super::super) struct CudaInference {
    pub(in super::super) config: Config,
    pub(in super::super) accounting: Accounting,
    gpu: Gpu,
    ordinal: usize,
    /// `[vocab, hidden]`; none where it is the head.
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

/// A buffer that grows on demand.
#[derive(Debug)]
struct Room<T: Element>(Option<GpuBuf<T>>);

impl<T: Element> Default for Room<T> {
    fn default() -> Room<T> {
        Room(None)
    }
}

impl<T: Element> Room<T> {
    fn get(&mut self, gpu: &Gpu, len: usize) -> Result<ViewMut<'_, T>> {
        if self.0.as_ref().is_none_or(|buf| buf.len() < len) {
            // What there was is given back first.
            self.0 = None;
            self.0 = Some(gpu.zeros(len)?);
        }
        let buf = self.0.as_mut().expect("made above");
        Ok(buf.slice_mut(0..len))
    }

    fn whole(&mut self, gpu: &Gpu, len: usize) -> Result<&mut GpuBuf<T>> {
        if self.0.as_ref().is_none_or(|buf| buf.len() != len) {
            self.0 = None;
            self.0 = Some(gpu.zeros(len)?);
        }
        Ok(self.0.as_mut().expect("made above"))
    }
}

/// Activations of a forward pass.
#[derive(Debug, Default)]
pub(in super::super) struct CudaWorkspace {
    ids: Room<u32>,
    positions: Room<u32>,
    targets: Room<u32>,
    x: Room<f32>,
    x_mid: Room<f32>,
    rstd: Room<f32>,
    h: Room<bf16>,
    qkv: Room<bf16>,
    a: Room<bf16>,
    lse: Room<f32>,
    y: Room<f32>,
    work: Room<f32>,
    logits: Room<f32>,
    found: Room<f32>,
    greedy: Room<u32>,
    states: Room<bf16>,
    counts: Room<u64>,
    sums: Room<f64>,
    ffn: FfnRoom,
}

/// What an FFN works in.
#[derive(Debug, Default)]
struct FfnRoom {
    a: Room<bf16>,
    b: Room<bf16>,
    c: Room<bf16>,
    logits: Room<f32>,
    routed: Option<router::Routed>,
    lists: Option<router::Lists>,
    grouped: Option<expert_ffn::GroupedScratch>,
    few: Room<f32>,
}

/// Keys and values of a decoding sequence, with what its single steps work in.
#[derive(Debug)]
pub(in super::super) struct CudaCache {
    /// Per layer keys and values, `[room, kv_heads * head_dim]` each.
    layers: Vec<(GpuBuf<bf16>, GpuBuf<bf16>)>,
    room: usize,
    /// Positions held, on the device: `[1]`.
    length: GpuBuf<u32>,
    workspace: CudaWorkspace,
    /// A step of one token, recorded.
    graph: Option<Graph>,
    /// Single steps so far: the first one makes buffers and chooses kernels, the second is recorded.
    warm: bool,
}

impl CudaCache {
    fn new(model: &CudaInference, room: usize) -> Result<CudaCache> {
        let (gpu, config) = (&model.gpu, &model.config);
        let layers = config.layers().map(|shape| {
            let len = room * shape.num_kv_heads * config.head_dim;
            Ok((gpu.zeros(len)?, gpu.zeros(len)?))
        });
        Ok(CudaCache {
            layers: layers.collect::<Result<_>>()?,
            room,
            length: gpu.zeros(1)?,
            workspace: CudaWorkspace::default(),
            graph: None,
            warm: false,
        })
    }

    /// Room for `room` positions, keeping those held.
    fn grow(&mut self, model: &CudaInference, room: usize) -> Result<()> {
        // What was recorded names the old buffers.
        self.graph = None;
        for ((keys, values), shape) in self.layers.iter_mut().zip(model.config.layers()) {
            let len = room * shape.num_kv_heads * model.config.head_dim;
            for buf in [keys, values] {
                let mut larger = model.gpu.zeros(len)?;
                larger.slice_mut(0..buf.len()).copy_from(buf.view())?;
                *buf = larger;
            }
        }
        self.room = room;
        Ok(())
    }
}

/// The cache of a sequence that goes on to `positions`.
fn cache_for<'c>(model: &CudaInference, cache: &'c mut Cache, positions: usize) -> Result<&'c mut CudaCache> {
    let most = model.config.max_position;
    match &mut cache.cuda {
        Some(held) if positions > held.room => held.grow(model, positions.max(2 * held.room).min(most))?,
        Some(_) => {}
        empty => *empty = Some(Box::new(CudaCache::new(model, positions.max(cache.room).min(most))?)),
    }
    let held = cache.cuda.as_mut().expect("made above");
    Ok(held)
}
