//! Moves a model to a device.

use std::ops::Range;

use dsmoe_kernels::Precision;
use dsmoe_kernels::cuda::{Gpu, GpuBuf};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::super::pack::{Parts, Source};
use super::weights::{CudaInference, Layer, LayerFfn, Router, up_start};
use crate::error::{Error, Result};
use crate::ffn::DeviceFfn;
use crate::model::gpu::turns::Turns;
use crate::model::gpu::{check_memory, device_ffns, gating_of, thresholds};
use crate::model::memory::MemoryUse;
use crate::model::tensors::LayerRanges;

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
        let turns = Turns::new(&gpu, &config)?;
        let layers: Vec<Layer> = layers;
        let thresholds = thresholds(&gpu, layers.iter().map(|layer| &layer.ffn.kind))?;
        Ok(CudaInference { config, accounting, gpu, embedding, layers, norm, head, turns, thresholds })
    }
}

impl Layer {
    fn build(gpu: &Gpu, source: &mut dyn Source, ranges: &LayerRanges, kind: DeviceFfn) -> Result<Layer> {
        let qk_norm = match &ranges.qk_norm {
            Some([q, k]) => Some([gpu.upload(source.part(q)?)?, gpu.upload(source.part(k)?)?]),
            None => None,
        };
        Ok(Layer {
            before_attention: optional(gpu, source, &ranges.before_attention)?,
            qkv: matrix(gpu, source, &ranges.qkv())?,
            o: matrix(gpu, source, &ranges.o)?,
            qkv_bias: optional(gpu, source, &ranges.qkv_bias)?,
            o_bias: optional(gpu, source, &ranges.o_bias)?,
            qk_norm,
            after_attention: optional(gpu, source, &ranges.after_attention)?,
            before_ffn: optional(gpu, source, &ranges.before_ffn)?,
            ffn: LayerFfn::build(gpu, source.part(&ranges.ffn)?, kind)?,
            after_ffn: optional(gpu, source, &ranges.after_ffn)?,
        })
    }
}

impl LayerFfn {
    /// Moves an FFN with these parameters.
    fn build(gpu: &Gpu, params: &[f32], kind: DeviceFfn) -> Result<LayerFfn> {
        let gated = kind.gated();
        let [gate, up, down, of_gate, of_up, of_down, of_output] = gated.ranges().map(|range| &params[range]);
        let upload = |values: &[f32]| gpu.upload(values);
        let biases = match gated.bias {
            true => Some([upload(of_gate)?, upload(of_up)?, upload(of_down)?]),
            false => None,
        };
        let output_bias = gated.output_bias.then(|| upload(of_output)).transpose()?;
        let router = gating_of(&kind).map(|gating| Router::build(gpu, gating.ranges(gated.len()), params));
        let gate_params = if kind.is_hosted() { kind.gate_params(params.len()) } else { 0..0 };
        let (router, gate_params) = (router.transpose()?, params[gate_params].to_vec());
        let start = up_start(gate.len());
        let mut gate_up = gpu.zeros(start + up.len())?;
        gate_up.part_mut(0..gate.len()).upload_from(&halves(gate))?;
        gate_up.part_mut(start..start + up.len()).upload_from(&halves(up))?;
        let down = rounded(gpu, down)?;
        Ok(LayerFfn { kind, gate_up, down, biases, output_bias, router, gate_params })
    }
}

impl Router {
    /// Moves the router of an FFN with these parameters.
    fn build(gpu: &Gpu, ranges: [Range<usize>; 4], params: &[f32]) -> Result<Router> {
        let [first, second, bias, correction] = ranges.map(|range| &params[range]);
        let upload = |values: &[f32]| (!values.is_empty()).then(|| gpu.upload(values)).transpose();
        Ok(Router {
            first: gpu.upload(first)?,
            second: upload(second)?,
            bias: upload(bias)?,
            correction: (!correction.is_empty()).then(|| rounded(gpu, correction)).transpose()?,
        })
    }
}

/// Uploads a vector of the source, where there is one.
fn optional(gpu: &Gpu, source: &mut dyn Source, range: &Option<Range<usize>>) -> Result<Option<GpuBuf<f32>>> {
    range.as_ref().map(|range| Ok(gpu.upload(source.part(range)?)?)).transpose()
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
    Ok(gpu.upload(&halves(values))?)
}

fn halves(values: &[f32]) -> Vec<bf16> {
    let mut halves = vec![bf16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    halves
}
