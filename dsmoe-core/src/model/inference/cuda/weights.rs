//! A model's weights on a device.

use dsmoe_kernels::cuda::{Gpu, GpuBuf, View};
use half::bf16;

use crate::accounting::Accounting;
use crate::config::Config;
use crate::device::Device;
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::model::gpu::ffn::Projections;
use crate::model::gpu::gating::Tensors;
use crate::model::gpu::turns::Turns;
use crate::model::gpu::{gating_of, most_experts, move_thresholds};
use crate::model::tensors::{set_active, set_threshold, set_thresholds};

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
    pub(super) turns: Turns,
    /// The thresholds of each layer's logits, and the logits at which a gate is a half: `[layers, 2]`.
    pub(super) thresholds: GpuBuf<f32>,
}

/// One decoder layer. A norm or a bias that the family does not have is none.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) before_attention: Option<GpuBuf<f32>>,
    pub(super) qkv: GpuBuf<bf16>,
    pub(super) o: GpuBuf<bf16>,
    pub(super) qkv_bias: Option<GpuBuf<f32>>,
    pub(super) o_bias: Option<GpuBuf<f32>>,
    /// Norms of queries and of keys.
    pub(super) qk_norm: Option<[GpuBuf<f32>; 2]>,
    pub(super) after_attention: Option<GpuBuf<f32>>,
    pub(super) before_ffn: Option<GpuBuf<f32>>,
    pub(super) ffn: LayerFfn,
    pub(super) after_ffn: Option<GpuBuf<f32>>,
}

/// The FFN of a layer.
#[derive(Debug)]
pub(super) struct LayerFfn {
    pub(super) kind: DeviceFfn,
    /// The gate projection, and from [`up_start`] on the up projection: descriptors of the kernels for slots reach from one to
    /// the other.
    pub(super) gate_up: GpuBuf<bf16>,
    /// Transposed.
    pub(super) down: GpuBuf<bf16>,
    /// Of gate, up and down.
    pub(super) biases: Option<[GpuBuf<f32>; 3]>,
    pub(super) output_bias: Option<GpuBuf<f32>>,
    pub(super) router: Option<Router>,
    /// Parameters of a gate that the host computes.
    pub(super) gate_params: Vec<f32>,
}

/// The router of a layer; see [`Tensors`].
#[derive(Debug)]
pub(super) struct Router {
    pub(super) first: GpuBuf<f32>,
    pub(super) second: Option<GpuBuf<f32>>,
    pub(super) bias: Option<GpuBuf<f32>>,
    pub(super) correction: Option<GpuBuf<bf16>>,
}

impl Router {
    pub(super) fn tensors(&self) -> Tensors<'_> {
        let Router { first, second, bias, correction } = self;
        let (second, bias) = (second.as_deref(), bias.as_deref());
        Tensors { first, second, bias, correction: correction.as_deref() }
    }

    fn bytes(&self) -> usize {
        let Router { first, second, bias, correction } = self;
        let singles = [Some(first), second.as_ref(), bias.as_ref()].into_iter().flatten();
        4 * singles.map(|buf| buf.len()).sum::<usize>() + 2 * correction.as_ref().map_or(0, |buf| buf.len())
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let Layer { before_attention, qkv, o, qkv_bias, o_bias, qk_norm, .. } = self;
        let Layer { after_attention, before_ffn, ffn, after_ffn, .. } = self;
        let LayerFfn { down, biases, output_bias, router, gate_params, .. } = ffn;
        let halves: usize =
            [qkv.len(), o.len(), down.len()].iter().chain(&ffn.matrices().map(|part| part.len())).sum();
        let norms = [before_attention, after_attention, before_ffn, after_ffn].into_iter().flatten();
        let others = [qkv_bias, o_bias, output_bias].into_iter().flatten();
        let several = qk_norm.iter().flatten().chain(biases.iter().flatten());
        let singles: usize = norms.chain(others).chain(several).map(|buf| buf.len()).sum();
        2 * halves + 4 * (singles + gate_params.len()) + router.as_ref().map_or(0, Router::bytes)
    }
}

/// Returns where the up projection starts behind a gate projection of `len` values: at a multiple of 128 bytes, as a buffer of
/// its own would.
pub(super) fn up_start(len: usize) -> usize {
    len.next_multiple_of(64)
}

impl LayerFfn {
    /// Returns the gate and the up projection.
    pub(super) fn matrices(&self) -> [View<'_, bf16>; 2] {
        let (len, start) = (self.down.len(), up_start(self.down.len()));
        [self.gate_up.part(0..len), self.gate_up.part(start..start + len)]
    }

    /// Returns the projections with those of [`LayerFfn::matrices`].
    pub(super) fn projections<'a>(&'a self, [gate, up]: &'a [View<'_, bf16>; 2]) -> Projections<'a> {
        let LayerFfn { kind, down, biases, output_bias, .. } = self;
        let biases = biases.as_ref().map(|biases| biases.each_ref().map(|bias| &**bias));
        Projections {
            gate,
            up,
            down,
            biases,
            output_bias: output_bias.as_deref(),
            activation: kind.gated().activation,
        }
    }
}

impl CudaInference {
    pub(crate) fn device(&self) -> Device {
        Device::Cuda(self.gpu.ordinal())
    }

    /// Returns the number of experts of every layer; none without routers.
    pub(crate) fn layer_experts(&self) -> Option<Vec<usize>> {
        self.layers.iter().map(|layer| layer.ffn.kind.num_experts()).collect()
    }

    /// Returns the largest number of experts of a layer; none without routers.
    pub(super) fn num_experts(&self) -> Option<usize> {
        most_experts(self.layers.iter().map(|layer| &layer.ffn.kind))
    }

    /// Returns the width of the widest FFN.
    pub(super) fn widest(&self) -> usize {
        self.layers.iter().map(|layer| layer.ffn.kind.gated().intermediate).max().unwrap_or(0)
    }

    /// Returns the rank of the routers; 0 for full ones.
    pub(super) fn rank(&self) -> usize {
        self.layers.iter().filter_map(|layer| gating_of(&layer.ffn.kind)?.rank).max().unwrap_or(0)
    }

    /// Tells whether the host computes gates between the ops of a pass.
    pub(super) fn is_hosted(&self) -> bool {
        self.layers.iter().any(|layer| layer.ffn.kind.is_hosted())
    }

    pub(crate) fn bytes(&self) -> usize {
        let tables = self.head.len() + self.embedding.as_ref().map_or(0, |table| table.len());
        self.layers.iter().map(Layer::bytes).sum::<usize>() + 2 * tables + 4 * self.norm.len()
    }

    pub(crate) fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        let layers = &mut self.layers;
        set_threshold(&mut self.config, threshold, || {
            layers.iter_mut().all(|layer| layer.ffn.kind.set_threshold(threshold))
        })?;
        self.move_thresholds()
    }

    pub(crate) fn set_active(&mut self, active: f64) -> Result<()> {
        let layers = &mut self.layers;
        set_active(&mut self.config, active, |i, logit| layers[i].ffn.kind.set_threshold_logit(logit))?;
        self.move_thresholds()
    }

    pub(crate) fn set_thresholds(&mut self, logits: &[f32]) -> Result<()> {
        assert_eq!(logits.len(), self.layers.len(), "inference: thresholds and layers");
        set_thresholds(logits, |i, logit| self.layers[i].ffn.kind.set_threshold_logit(logit))?;
        self.move_thresholds()
    }

    fn move_thresholds(&mut self) -> Result<()> {
        move_thresholds(&mut self.thresholds, self.layers.iter().map(|layer| &layer.ffn.kind))
    }
}
