//! A model's weights on a device.

use dsmoe_kernels::cuda::{Gpu, GpuBuf};
use half::bf16;

use crate::accounting::Accounting;
use crate::config::Config;
use crate::device::Device;
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::model::tensors::set_threshold;

/// A model's weights on a device: matrices in bf16, norms and routers in f32.
#[derive(Debug)]
pub(crate) struct CudaInference {
    pub(crate) config: Config,
    pub(crate) accounting: Accounting,
    pub(super) gpu: Gpu,
    /// `[vocab, hidden]`; none where the head is used instead.
    pub(super) embedding: Option<GpuBuf<bf16>>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: GpuBuf<f32>,
    pub(super) head: GpuBuf<bf16>,
    /// Angles of all positions, `[positions, head_dim]`.
    pub(super) rope: GpuBuf<f32>,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_norm: GpuBuf<f32>,
    pub(super) qkv: GpuBuf<bf16>,
    pub(super) o: GpuBuf<bf16>,
    pub(super) post_norm: GpuBuf<f32>,
    pub(super) kind: DeviceFfn,
    pub(super) gate: GpuBuf<bf16>,
    pub(super) up: GpuBuf<bf16>,
    /// Transposed.
    pub(super) down: GpuBuf<bf16>,
    pub(super) router: Option<GpuBuf<f32>>,
    pub(super) bias: Option<GpuBuf<f32>>,
    /// Parameters of a gate that the host computes.
    pub(super) gate_params: Vec<f32>,
}

impl CudaInference {
    pub(crate) fn device(&self) -> Device {
        Device::Cuda(self.gpu.ordinal())
    }

    pub(crate) fn num_experts(&self) -> Option<usize> {
        self.layers.first().and_then(|layer| layer.kind.num_experts())
    }

    /// Returns the width of the widest FFN.
    pub(super) fn widest(&self) -> usize {
        self.layers.iter().map(|layer| layer.kind.intermediate()).max().unwrap_or(0)
    }

    /// Returns the threshold of the routers on the device.
    pub(super) fn threshold(&self) -> Option<f32> {
        match &self.layers.first()?.kind {
            DeviceFfn::Gated { router, .. } => Some(router.threshold),
            DeviceFfn::Dense { .. } | DeviceFfn::Hosted { .. } => None,
        }
    }

    /// Tells whether the host computes gates between the ops of a pass.
    pub(super) fn is_hosted(&self) -> bool {
        self.layers.iter().any(|layer| layer.kind.is_hosted())
    }

    pub(crate) fn bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            let halves: usize =
                [&layer.qkv, &layer.o, &layer.gate, &layer.up, &layer.down].map(|buf| buf.len()).iter().sum();
            let router: usize = [&layer.router, &layer.bias].into_iter().flatten().map(|buf| buf.len()).sum();
            let gate = router + layer.gate_params.len();
            2 * halves + 4 * (layer.input_norm.len() + layer.post_norm.len() + gate)
        };
        let tables = self.head.len() + self.embedding.as_ref().map_or(0, |table| table.len());
        self.layers.iter().map(layer).sum::<usize>() + 2 * tables + 4 * self.norm.len()
    }

    pub(crate) fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        let layers = &mut self.layers;
        set_threshold(&mut self.config, threshold, || {
            layers.iter_mut().all(|layer| layer.kind.set_threshold(threshold))
        })
    }
}
