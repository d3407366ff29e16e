//! The forward pass, the loss and the backward pass of a micro-batch, op by op.

use std::ops::Range;

use dsmoe_kernels::cuda::ops::attention;
use dsmoe_kernels::cuda::ops::elementwise::Cast;
use dsmoe_kernels::cuda::ops::optim::AddSum;
use dsmoe_kernels::cuda::ops::rope::{Positions, Rotate};
use dsmoe_kernels::cuda::ops::router::{Normed, Sparsity};
use dsmoe_kernels::cuda::ops::{cross_entropy, embedding, linear, rms_norm};
use dsmoe_router::SparsityOver;

use super::CudaTrainer;
use super::acts::{Activations, Stream, logit_rows};
use super::ffn::{Backward, Input, Weights};
use crate::error::Result;
use crate::model::gpu::{heads, norm as norm_of};
use crate::model::tensors::LayerRanges;
use crate::model::train::StepArgs;

impl CudaTrainer {
    pub(super) fn forward(&mut self, seq: usize, args: &StepArgs) -> Result<()> {
        let (config, ranges, eps) = (&self.config, &self.ranges, self.config.rms_norm_eps as f32);
        let param = |range: &Range<usize>| self.params.part(range.clone());
        let weight = |range: &Range<usize>| self.weights.part(range.clone());
        let Activations { ids, rope: angles, streams, layers, h, y, ffn: scratch, .. } = &mut self.acts;
        let Stream { x, rstd } = &mut streams[0];
        embedding::Forward { out: x, table: &param(&ranges.embed), ids }.run()?;
        let norm = ranges.layers.first().map_or(&ranges.norm, |layer| norm_of(&layer.before_attention));
        rms_norm::Forward { h, rstd, x, weight: &param(norm), offset: 0.0, eps }.run()?;
        for (i, (layer, acts)) in ranges.layers.iter().zip(layers).enumerate() {
            let (before, after) = streams.split_at_mut(i + 1);
            let (x, next) = (&before[i].x, &mut after[0]);
            let heads = heads(config, i);
            linear::Forward { y: &mut acts.qkv, x: h, w: &weight(&layer.qkv()) }.run()?;
            let (turned, positions) =
                (heads.heads + heads.kv_heads, Positions::Sequences { len: seq, start: 0 });
            Rotate {
                x: &mut acts.qkv,
                angles,
                heads: turned,
                head_dim: heads.head_dim,
                positions,
                back: false,
            }
            .run()?;
            let (out, lse) = (&mut acts.a, &mut acts.lse);
            attention::Forward { out, lse, qkv: &acts.qkv, heads, seq }.run()?;
            linear::Forward { y, x: &acts.a, w: &weight(&layer.o) }.run()?;
            let (norm, rstd, out) = (&param(norm_of(&layer.before_ffn)), &mut acts.rstd_mid, &mut acts.x_mid);
            rms_norm::ForwardSum { h, rstd, out, x, y, weight: norm, offset: 0.0, eps }.run()?;
            let ffn = Weights { kind: &self.ffns[i], master: param(&layer.ffn), rounded: weight(&layer.ffn) };
            let normed = Normed { x: &acts.x_mid, rstd: &acts.rstd_mid, weight: norm, offset: 0.0 };
            ffn.forward(
                y,
                &mut acts.ffn,
                Input { h, normed, training: args.gate_training(i, config.num_layers) },
                scratch,
            )?;
            self.report.add(i, &acts.ffn)?;
            self.balance_loss += acts.ffn.balance_loss();
            let norm = ranges.layers.get(i + 1).map_or(&ranges.norm, |next| norm_of(&next.before_attention));
            let (Stream { x: out, rstd }, x) = (next, &acts.x_mid);
            rms_norm::ForwardSum { h, rstd, out, x, y, weight: &param(norm), offset: 0.0, eps }.run()?;
        }
        Ok(())
    }

    /// Sets the token losses and the gradient of the last norm's output, in chunks of logits.
    pub(super) fn loss(&mut self, scale: f32) -> Result<()> {
        let Activations { targets, h, y: dh, losses, logits, dlogits, sums, .. } = &mut self.acts;
        let (tokens, w) = (targets.len(), &self.weights.part(self.ranges.head.clone()));
        let rows = logit_rows(&self.config, tokens);
        for first in (0..tokens).step_by(rows.max(1)) {
            let chunk = first..(first + rows).min(tokens);
            let (z, dz) = (&mut logits.part_mut(0..chunk.len()), &mut dlogits.part_mut(0..chunk.len()));
            let states = &h.part(chunk.clone());
            linear::Forward { y: &mut *z, x: states, w }.run()?;
            let (losses, targets) = (&mut losses.part_mut(chunk.clone()), &targets.part(chunk.clone()));
            cross_entropy::Chunk { losses, dlogits: dz, logits: z, targets, scale }.run()?;
            linear::BackwardInput { dx: &mut dh.part_mut(chunk), dy: dz, w, add: false }.run()?;
            let dw = &mut self.grads.part_mut(self.ranges.head.clone());
            linear::BackwardWeight { dw, dy: dz, x: states }.run()?;
        }
        let out = &mut self.report.sums.part_mut(0..1);
        Ok(AddSum { out, x: losses, squares: false, partials: sums }.run()?)
    }

    pub(super) fn backward(&mut self, seq: usize, args: &StepArgs) -> Result<()> {
        let (config, ranges, grads) = (&self.config, &self.ranges, &mut self.grads);
        let param = |range: &Range<usize>| self.params.part(range.clone());
        let weight = |range: &Range<usize>| self.weights.part(range.clone());
        let Activations {
            occurrences,
            streams,
            layers,
            rope: angles,
            h,
            y: dh,
            dx,
            dy,
            dqkv,
            da,
            deltas,
            ffn: scratch,
            partials,
            ..
        } = &mut self.acts;
        let sparsity =
            Sparsity { weight: &self.sparsity_weight, all: args.sparsity_over == SparsityOver::All };
        let Stream { x, rstd } = &streams[ranges.layers.len()];
        rms_norm::Backward {
            dx,
            dweight: &mut grads.part_mut(ranges.norm.clone()),
            dy: dh,
            x,
            weight: &param(&ranges.norm),
            offset: 0.0,
            rstd,
            partials,
            add: false,
        }
        .run()?;
        for (i, (layer, acts)) in ranges.layers.iter().zip(layers).enumerate().rev() {
            let LayerRanges { before_attention, o, before_ffn, .. } = layer;
            let (input_norm, post_norm) = (norm_of(before_attention), norm_of(before_ffn));
            let heads = heads(config, i);
            let (tokens, Stream { x, rstd }) = (h.rows(), &streams[i]);
            let mut dqkv = dqkv.shaped_mut(tokens, heads.joined_width());
            let mut da = da.shaped_mut(tokens, heads.width());
            // x_mid + ffn(h)
            let (norm, x_mid, rstd_mid) = (&param(post_norm), &acts.x_mid, &acts.rstd_mid);
            rms_norm::Restore { h, x: x_mid, weight: norm, offset: 0.0, rstd: rstd_mid }.run()?;
            Cast { out: dy, x: dx }.run()?;
            let ffn = Weights { kind: &self.ffns[i], master: param(&layer.ffn), rounded: weight(&layer.ffn) };
            let normed = Normed { x: x_mid, rstd: rstd_mid, weight: norm, offset: 0.0 };
            let (input, acts_ffn) =
                (Input { h, normed, training: args.gate_training(i, config.num_layers) }, &acts.ffn);
            let of_ffn = &mut grads.part_mut(layer.ffn.clone());
            ffn.backward(Backward { dh, grads: of_ffn, dy, acts: acts_ffn, input, sparsity }, scratch)?;
            rms_norm::Backward {
                dx,
                dweight: &mut grads.part_mut(post_norm.clone()),
                dy: dh,
                x: x_mid,
                weight: norm,
                offset: 0.0,
                rstd: rstd_mid,
                partials,
                add: true,
            }
            .run()?;
            // x_mid = x + a W_o^T
            Cast { out: dy, x: dx }.run()?;
            linear::BackwardWeight { dw: &mut grads.part_mut(o.clone()), dy, x: &acts.a }.run()?;
            linear::BackwardInput { dx: &mut da, dy, w: &weight(o), add: false }.run()?;
            let (dout, out, qkv, lse) = (&da, &acts.a, &acts.qkv, &acts.lse);
            attention::Backward { dqkv: &mut dqkv, dout, out, qkv, lse, heads, seq, deltas }.run()?;
            let (turned, positions) =
                (heads.heads + heads.kv_heads, Positions::Sequences { len: seq, start: 0 });
            Rotate { x: &mut dqkv, angles, heads: turned, head_dim: heads.head_dim, positions, back: true }
                .run()?;
            let (norm, of_qkv) = (&param(input_norm), layer.qkv());
            rms_norm::Restore { h, x, weight: norm, offset: 0.0, rstd }.run()?;
            linear::BackwardWeight { dw: &mut grads.part_mut(of_qkv.clone()), dy: &dqkv, x: h }.run()?;
            linear::BackwardInput { dx: dh, dy: &dqkv, w: &weight(&of_qkv), add: false }.run()?;
            let dweight = &mut grads.part_mut(input_norm.clone());
            rms_norm::Backward {
                dx,
                dweight,
                dy: dh,
                x,
                weight: norm,
                offset: 0.0,
                rstd,
                partials,
                add: true,
            }
            .run()?;
        }
        let dtable = &mut grads.part_mut(ranges.embed.clone());
        Ok(embedding::Backward { dtable, dout: dx, order: occurrences }.run()?)
    }
}
