//! Models on a GPU: [`CudaTrainer`] trains, `CudaInference` scores and decodes. Both are made of a model that lies in
//! memory or in a directory, and give back what the processor's own code would, rounded to bf16 in products.

mod ffn;
mod hosted;
mod infer;
mod train;

use dsmoe_kernels::attention;
use dsmoe_kernels::cuda::ops::few::FEW;
use dsmoe_kernels::cuda::ops::{few, matmul, router};
use dsmoe_kernels::cuda::{Gpu, View, ViewMut};
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};
use half::bf16;

pub(super) use infer::{CudaCache, CudaInference, CudaWorkspace};
pub use train::{CudaStep, CudaTrainer, MemoryUse};

use crate::config::{Config, LayerShape};
use crate::error::{Error, Result};
use crate::ffn::{DeviceFfn, Ffn};
use crate::model::tensors::rope_table;
use crate::remedy::Remedy;

/// Matrix products of `tokens` rows.
struct Products<'a> {
    gpu: &'a Gpu,
    tokens: usize,
}

impl Products<'_> {
    /// Sets `y` `[tokens, outputs]` to `x w^T`. For a few tokens `w` is read once for all of them, by no matrix product.
    fn forward(
        &self,
        y: ViewMut<'_, bf16>,
        x: View<'_, bf16>,
        w: View<'_, bf16>,
        inputs: usize,
        outputs: usize,
    ) -> Result<()> {
        if self.are_few() {
            return Ok(few::linear_bf16(self.gpu, y, x, w, self.tokens)?);
        }
        Ok(matmul::gemm_bf16(self.gpu, y, x, w, self.linear(inputs, outputs))?)
    }

    /// [`Products::forward`] in f32.
    fn forward_f32(
        &self,
        y: ViewMut<'_, f32>,
        x: View<'_, bf16>,
        w: View<'_, bf16>,
        inputs: usize,
        outputs: usize,
    ) -> Result<()> {
        if self.are_few() {
            return Ok(few::linear_f32(self.gpu, y, x, w, self.tokens)?);
        }
        Ok(matmul::gemm_f32(self.gpu, y, x, w, self.linear(inputs, outputs))?)
    }

    /// Sets `dx` `[tokens, inputs]` to the product `dy w`.
    fn backward_input(
        &self,
        dx: ViewMut<'_, f32>,
        dy: View<'_, bf16>,
        w: View<'_, bf16>,
        inputs: usize,
        outputs: usize,
    ) -> Result<()> {
        self.times(dx, dy, w, outputs, inputs, false)
    }

    /// [`Products::backward_input`] in bf16.
    fn backward_input_bf16(
        &self,
        dx: ViewMut<'_, bf16>,
        dy: View<'_, bf16>,
        w: View<'_, bf16>,
        inputs: usize,
        outputs: usize,
    ) -> Result<()> {
        Ok(matmul::gemm_bf16(self.gpu, dx, dy, w, matmul::Gemm::nn(self.tokens, inputs, outputs))?)
    }

    /// Sets, or adds to, `y` `[tokens, cols]` the product of `x` `[tokens, inner]` and `w` `[inner, cols]`.
    fn times(
        &self,
        y: ViewMut<'_, f32>,
        x: View<'_, bf16>,
        w: View<'_, bf16>,
        inner: usize,
        cols: usize,
        add: bool,
    ) -> Result<()> {
        let gemm = matmul::Gemm { beta_one: add, ..matmul::Gemm::nn(self.tokens, cols, inner) };
        Ok(matmul::gemm_f32(self.gpu, y, x, w, gemm)?)
    }

    /// Adds `dy^T x` to `dw` `[outputs, inputs]`.
    fn backward_weight(
        &self,
        dw: ViewMut<'_, f32>,
        dy: View<'_, bf16>,
        x: View<'_, bf16>,
        inputs: usize,
        outputs: usize,
    ) -> Result<()> {
        let gemm = matmul::Gemm { beta_one: true, ..matmul::Gemm::tn(outputs, inputs, self.tokens) };
        Ok(matmul::gemm_f32(self.gpu, dw, dy, x, gemm)?)
    }

    fn are_few(&self) -> bool {
        (1..=FEW).contains(&self.tokens)
    }

    fn linear(&self, inputs: usize, outputs: usize) -> matmul::Gemm {
        matmul::Gemm::nt(self.tokens, outputs, inputs)
    }
}

/// What the FFNs are on a device.
fn device_ffns(ffns: &[Box<dyn Ffn>]) -> Result<Vec<DeviceFfn>> {
    let form = |(layer, form): (usize, Option<DeviceFfn>)| {
        form.ok_or_else(|| {
            Error::argument(
                format!("layer {layer}: this kind of FFN does not run on a GPU"),
                "set {device} to cpu",
            )
        })
    };
    ffns.iter().map(|ffn| ffn.on_device()).enumerate().map(form).collect()
}

/// Refuses a plan that the device's free memory does not hold.
fn check_memory(gpu: &Gpu, plan: &[MemoryUse], help: Remedy) -> Result<()> {
    let (free, _) = gpu.memory()?;
    let wanted: usize = plan.iter().map(|part| part.bytes).sum();
    if wanted <= free {
        return Ok(());
    }
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let largest = plan.iter().max_by_key(|part| part.bytes).map_or("", |part| part.what);
    Err(Error::argument(
        format!(
            "{}: {:.1} GiB are needed, most of it {largest}, and {:.1} GiB are free",
            gpu.name(),
            gib(wanted),
            gib(free)
        ),
        help,
    ))
}

/// A router's settings as the kernels take them.
fn gates(config: &RouterConfig) -> router::Gates {
    router::Gates {
        num_experts: config.num_experts,
        threshold_logit: config.threshold_logit(),
        binary: config.gate_value == GateValue::Binary,
        rescale: config.rescale == Rescale::Eq8,
        force_argmax: config.zero_active == ZeroActive::ForceArgmax,
        ste: config.ste,
    }
}

/// The shape of the attention of layer `i`.
fn attention_dims(config: &Config, i: usize, batch: usize, queries: usize, keys: usize) -> attention::Dims {
    let LayerShape { num_heads: heads, num_kv_heads: kv_heads, .. } = config.layer(i);
    attention::Dims { batch, queries, keys, heads, kv_heads, head_dim: config.head_dim }
}

/// Cosines and sines of the first `positions` positions, `[positions, head_dim]`.
fn rope_rows(config: &Config, positions: usize) -> Vec<f32> {
    let table = rope_table(config);
    (0..positions)
        .flat_map(|p| {
            let (cos, sin) = table.angles(p);
            [cos, sin].concat()
        })
        .collect()
}
