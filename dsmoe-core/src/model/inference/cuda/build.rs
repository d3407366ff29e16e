//! Moves a model to a device.

use std::ops::Range;

use dsmoe_kernels::Precision;
use dsmoe_kernels::cuda::{Gpu, GpuBuf};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::super::pack::{Parts, Source};
use super::weights::{CudaInference, Layer};
use crate::error::{Error, Result};
use crate::ffn::DeviceFfn;
use crate::model::gpu::{check_memory, device_ffns, norm, rope_rows, router_ranges};
use crate::model::tensors::LayerRanges;
use crate::model::train::MemoryUse;
use crate::params::padded;

impl CudaInference {
    /// Moves a model to device `ordinal`.
    pub(crate) fn build(parts: Parts<'_>, precision: Precision, ordinal: usize) -> Result<CudaInference> {
        if precision != Precision::Bf16 {
            return Err(Error::argument("a GPU computes in bf16", "set {dtype} to bf16"));
        }
        let Parts { config, accounting, ffns, ranges, source } = parts;
        let kinds = device_ffns(&config, ffns)?;
        let gpu = Gpu::open(ordinal)?;
        let plan = [MemoryUse { what: "weights", bytes: 2 * accounting.total as usize }];
        check_memory(&gpu, &plan, "use a smaller model")?;
        let head = matrix(&gpu, source, &ranges.head)?;
        let embedding = match config.tie_word_embeddings {
            true => None,
            false => Some(matrix(&gpu, source, &ranges.embed)?),
        };
        let each = ranges.layers.iter().zip(kinds);
        let layers =
            each.map(|(ranges, kind)| Layer::build(&gpu, source, ranges, kind)).collect::<Result<_>>()?;
        let norm = gpu.upload(source.part(&ranges.norm)?)?;
        let rope = gpu.upload_rows(&rope_rows(&config, config.max_position), config.head_dim)?;
        Ok(CudaInference { config, accounting, gpu, embedding, layers, norm, head, rope })
    }
}

impl Layer {
    fn build(gpu: &Gpu, source: &mut dyn Source, ranges: &LayerRanges, kind: DeviceFfn) -> Result<Layer> {
        let (hidden, width) = (kind.hidden(), kind.intermediate());
        let input_norm = gpu.upload(source.part(norm(&ranges.before_attention))?)?;
        let post_norm = gpu.upload(source.part(norm(&ranges.before_ffn))?)?;
        let (qkv, o) = (matrix(gpu, source, &ranges.qkv())?, matrix(gpu, source, &ranges.o)?);
        let block = source.part(&ranges.ffn)?;
        let len = hidden * width;
        let projection = |which: usize| rounded(gpu, &block[which * padded(len)..][..len]);
        let (gate, up, down) = (projection(0)?, projection(1)?, projection(2)?);
        let (mut router, mut bias, mut gate_params) = (None, None, Vec::new());
        match &kind {
            DeviceFfn::Dense { .. } => {}
            DeviceFfn::Hosted { .. } => {
                gate_params.extend_from_slice(&block[kind.gate_params(block.len())]);
            }
            DeviceFfn::Gated { router: config, router_bias, .. } => {
                let [weight, of_bias] = router_ranges(hidden, width, config.num_experts);
                bias = router_bias.then(|| gpu.upload(&block[of_bias])).transpose()?;
                router = Some(gpu.upload(&block[weight])?);
            }
        }
        Ok(Layer { input_norm, qkv, o, post_norm, kind, gate, up, down, router, bias, gate_params })
    }
}

/// Uploads a matrix of the source, rounded piece by piece.
fn matrix(gpu: &Gpu, source: &mut dyn Source, range: &Range<usize>) -> Result<GpuBuf<bf16>> {
    let mut buf = gpu.zeros(range.len())?;
    let mut first = 0;
    let mut failed = Ok(());
    let mut piece = Vec::new();
    source.rows(range, &mut |values| {
        piece.resize(values.len(), bf16::ZERO);
        piece.convert_from_f32_slice(values);
        if failed.is_ok() {
            failed = buf.part_mut(first..first + values.len()).upload_from(&piece);
        }
        first += values.len();
    })?;
    failed?;
    Ok(buf)
}

/// Uploads rounded values.
fn rounded(gpu: &Gpu, values: &[f32]) -> Result<GpuBuf<bf16>> {
    let mut halves = vec![bf16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    Ok(gpu.upload(&halves)?)
}
