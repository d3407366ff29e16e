//! The forward pass on a device, op by op.

use dsmoe_kernels::Activation;
use dsmoe_kernels::cuda::Matrix;
use dsmoe_kernels::cuda::ops::attention::{self, Segments};
use dsmoe_kernels::cuda::ops::decode::{self, At};
use dsmoe_kernels::cuda::ops::gemv::{self, FEW};
use dsmoe_kernels::cuda::ops::rope::{Positions, Rotate};
use dsmoe_kernels::cuda::ops::router::{self, Normed, Routed};
use dsmoe_kernels::cuda::ops::{embedding, experts, ffn, linear, rms_norm};
use half::bf16;

use super::acts::{Acts, FfnActs, Wide};
use super::cache::LayerCache;
use super::weights::{CudaInference, Layer};
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::model::gpu::{by_lists, gates, heads, hosted};

/// The tokens that attend to each other in a pass.
pub(super) enum Attend<'a> {
    /// Sequences of so many tokens, each from its start.
    Sequences(usize),
    /// Segments, with the positions of their tokens.
    Ragged(&'a Segments, &'a Matrix<u32>),
    /// The next tokens of a sequence, from this position on.
    Continue(&'a mut [LayerCache], usize),
    /// The next token of a sequence, at the position on the device; with scratch memory.
    Next(&'a mut [LayerCache], &'a Matrix<u32>, &'a mut Matrix<f32>),
}

impl CudaInference {
    /// Queues a pass over `tokens` tokens whose ids are on the device.
    pub(super) fn forward(&self, acts: &mut Acts, tokens: usize, mut attend: Attend<'_>) -> Result<()> {
        let (config, eps, angles) = (&self.config, self.config.rms_norm_eps as f32, &self.rope);
        let Acts { ids, x, x_mid, rstd, h, qkv, a, lse, y, ffn, .. } = acts;
        let [mut x, mut x_mid, mut y] = [x, x_mid, y].map(|buf| buf.part_mut(0..tokens));
        let (mut rstd, mut h) = (rstd.part_mut(0..tokens), h.part_mut(0..tokens));
        let table = self.embedding.as_ref().unwrap_or(&self.head);
        embedding::Forward { out: &mut x, table, ids: &ids.part(0..tokens) }.run()?;
        let weight = self.layers.first().map_or(&self.norm, |layer| &layer.input_norm);
        rms_norm::Forward { h: &mut h, rstd: &mut rstd, x: &x, weight, offset: 0.0, eps }.run()?;
        for (i, layer) in self.layers.iter().enumerate() {
            let heads = heads(config, i);
            let mut qkv = qkv.shaped_mut(tokens, heads.joined_width());
            let mut a = a.shaped_mut(tokens, heads.width());
            linear::Forward { y: &mut qkv, x: &h, w: &layer.qkv }.run()?;
            let positions = match &attend {
                Attend::Sequences(seq) => Positions::Sequences { len: *seq, start: 0 },
                Attend::Ragged(_, at) | Attend::Next(_, at, _) => Positions::At(at),
                Attend::Continue(_, start) => Positions::Sequences { len: tokens, start: *start },
            };
            let turned = heads.heads + heads.kv_heads;
            Rotate { x: &mut qkv, angles, heads: turned, head_dim: heads.head_dim, positions, back: false }
                .run()?;
            match &mut attend {
                Attend::Sequences(seq) => {
                    let mut lse = lse.shaped_mut(tokens, heads.heads);
                    let (out, lse, seq) = (&mut a, &mut lse, *seq);
                    attention::Forward { out, lse, qkv: &qkv, heads, seq }.run()?;
                }
                Attend::Ragged(segments, _) => {
                    attention::Ragged { out: &mut a, qkv: &qkv, segments, heads }.run()?;
                }
                Attend::Continue(layers, start) => {
                    let ((keys, values), start) = (&mut layers[i], *start);
                    debug_assert!(start + tokens <= config.max_position);
                    let at = At::Position(start);
                    decode::Append { keys, values, qkv: &qkv, at, heads }.run()?;
                    decode::Prefill { out: &mut a, qkv: &qkv, keys, values, start, heads }.run()?;
                }
                Attend::Next(layers, length, partials) => {
                    let (keys, values) = &mut layers[i];
                    let at = At::Length(length);
                    decode::Append { keys, values, qkv: &qkv, at, heads }.run()?;
                    decode::Decode { out: &mut a, qkv: &qkv, keys, values, length, heads, partials }.run()?;
                }
            }
            linear::Forward { y: &mut y, x: &a, w: &layer.o }.run()?;
            let (out, weight) = (&mut x_mid, &layer.post_norm);
            rms_norm::ForwardSum { h: &mut h, rstd: &mut rstd, out, x: &x, y: &y, weight, offset: 0.0, eps }
                .run()?;
            self.route(i, layer, ffn, Normed { x: &x_mid, rstd: &rstd, weight, offset: 0.0 })?;
            self.ffn(layer, ffn, &h, &mut y)?;
            let (out, x) = (&mut x, &x_mid);
            let weight = self.layers.get(i + 1).map_or(&self.norm, |next| &next.input_norm);
            rms_norm::ForwardSum { h: &mut h, rstd: &mut rstd, out, x, y: &y, weight, offset: 0.0, eps }
                .run()?;
        }
        Ok(())
    }

    /// Sets `y` to the output of a routed FFN.
    fn ffn(&self, layer: &Layer, acts: &mut FfnActs, h: &Matrix<bf16>, y: &mut Matrix<f32>) -> Result<()> {
        let (tokens, width) = (h.rows(), layer.kind.intermediate());
        let Layer { gate, up, down, .. } = layer;
        let FfnActs { routed, wide, few, .. } = acts;
        let coefficients = routed.as_ref().map(Routed::coefficients);
        let coefficients = coefficients.as_deref();
        let Some(Wide { a, b, c, lists, parts }) = wide.as_mut().filter(|_| tokens > FEW) else {
            let weights = gemv::Weights { gate, up, down };
            return Ok(gemv::Ffn { y, h, weights, coefficients, activation: Activation::Silu, scratch: few }
                .run()?);
        };
        let mut c = c.shaped_mut(tokens, width);
        if let (Some(lists), Some(routed), Some(coefficients), Some(_)) =
            (lists, routed.as_ref(), coefficients, by_lists(&self.gpu, &layer.kind, tokens))
        {
            router::Sort { lists, routed }.run()?;
            experts::Up {
                c: &mut c,
                projections: None,
                x: h,
                gate,
                up,
                coefficients,
                lists,
                activation: Activation::Silu,
            }
            .run()?;
            return Ok(experts::Down { y, parts, c: &c, weight: down, lists }.run()?);
        }
        let (mut a, mut b) = (a.shaped_mut(tokens, width), b.shaped_mut(tokens, width));
        linear::Forward { y: &mut a, x: h, w: gate }.run()?;
        linear::Forward { y: &mut b, x: h, w: up }.run()?;
        ffn::Activate { c: &mut c, a: &a, b: &b, coefficients, activation: Activation::Silu }.run()?;
        Ok(linear::BackwardInput { dx: y, dy: &c, w: down, add: false }.run()?)
    }

    /// Sets the routing of layer `i` and counts it, where there is a gate.
    fn route(&self, i: usize, layer: &Layer, acts: &mut FfnActs, normed: Normed<'_>) -> Result<()> {
        let FfnActs { gate_logits, routed, counts, gate_sums, active, .. } = acts;
        let (Some(n), Some(routed)) = (layer.kind.num_experts(), routed) else { return Ok(()) };
        match (&layer.kind, &layer.router) {
            (DeviceFfn::Hosted { gate, .. }, _) => {
                hosted::route(gate.as_ref(), routed, normed, &layer.gate_params)?;
            }
            (DeviceFfn::Gated { router: config, .. }, Some(router)) => {
                let (mut z, bias) = (gate_logits.shaped_mut(normed.x.rows(), n), layer.bias.as_deref());
                router::Logits { z: &mut z, normed, router, bias }.run()?;
                router::Route { routed, z: &z, gates: &gates(config) }.run()?;
            }
            _ => return Ok(()),
        }
        let (counts, of_tokens) = (&mut counts.part_mut(i..i + 1), Some(&mut **active));
        Ok(router::Stats { counts, sums: gate_sums, of_tokens, routed }.run()?)
    }

    /// Sets `logits` to those of the rows of `states`.
    pub(super) fn head(&self, logits: &mut Matrix<f32>, states: &Matrix<bf16>) -> Result<()> {
        Ok(linear::Forward { y: logits, x: states, w: &self.head }.run()?)
    }
}
