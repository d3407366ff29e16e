//! The forward pass, the loss and the backward pass of a micro-batch, op by op.

use std::ops::Range;

use dsmoe_kernels::cuda::Matrix;
use dsmoe_kernels::cuda::ops::elementwise::{self, Cast};
use dsmoe_kernels::cuda::ops::optim::AddSum;
use dsmoe_kernels::cuda::ops::rope::Positions;
use dsmoe_kernels::cuda::ops::router::{CountLogits, Normed, Over, Sparsity};
use dsmoe_kernels::cuda::ops::{attention, cross_entropy, embedding, linear, rms_norm};
use dsmoe_router::SparsityOver;
use dsmoe_router::counts::PER_UNIT;
use half::bf16;

use super::CudaTrainer;
use super::acts::{Activations, LayerActs, NormActs, Stream, logit_rows};
use super::ffn::{Backward, Input, Weights};
use crate::error::Result;
use crate::model::gpu::block::{After, Block, Branch, Join};
use crate::model::gpu::heads;
use crate::model::gpu::turns::rotate;
use crate::model::tensors::{Ranges, logits_of};
use crate::model::train::StepArgs;

impl CudaTrainer {
    pub(super) fn forward(&mut self, seq: usize, args: &StepArgs) -> Result<()> {
        let (config, ranges, block) = (&self.config, &self.ranges, Block::of(&self.config));
        let param = |range: &Range<usize>| self.params.part(range.clone());
        let weight = |range: &Range<usize>| self.weights.part(range.clone());
        let Activations { ids, angles, ones, streams, layers, h, y, ffn: scratch, .. } = &mut self.acts;
        let Stream { x, rstd } = &mut streams[0];
        let (table, scale) = (&param(&ranges.embed), config.architecture.embed_scale);
        embedding::Forward { out: x, table, ids, scale }.run()?;
        block.read(norm_before(ranges, 0).map(param).as_deref(), h, rstd, x)?;
        for (i, (layer, acts)) in ranges.layers.iter().zip(layers).enumerate() {
            let (before, after) = streams.split_at_mut(i + 1);
            let (x, next) = (&before[i].x, &mut after[0]);
            let heads = heads(config, i);
            let LayerActs { qkv, a, lse, x_mid, rstd_mid, heads: of_heads, after, ffn: saved } = acts;
            let [after_attention, after_ffn] =
                after.as_mut().map_or([None, None], |acts| acts.each_mut().map(Some));
            linear::Forward { y: &mut **qkv, x: h, w: &weight(&layer.qkv()) }.run()?;
            if let Some(bias) = &layer.qkv_bias {
                linear::AddBias { y: &mut **qkv, bias: &param(bias) }.run()?;
            }
            if let (Some(norms), Some(acts)) = (&layer.qk_norm, of_heads) {
                let all = block.head_norms(heads, norms.each_ref().map(|norm| norm.len()));
                for ((norm, NormActs { x, rstd }), heads) in norms.iter().zip(acts).zip(all) {
                    block.norm_heads(qkv, Some(x), rstd, &param(norm), heads)?;
                }
            }
            if let Some(rope) = config.architecture.layers[i].rope {
                rotate(config, i, qkv, &angles[rope], Positions::Sequences { len: seq, start: 0 }, false)?;
            }
            attention::Forward { out: &mut *a, lse, qkv, heads, seq }.run()?;
            let norm = layer.after_attention.as_ref().map(param);
            block.give(y, after_of(norm.as_deref(), after_attention), |y| {
                linear::Forward { y: &mut *y, x: a, w: &weight(&layer.o) }.run()?;
                let Some(bias) = &layer.o_bias else { return Ok(()) };
                Ok(linear::AddBias { y, bias: &param(bias) }.run()?)
            })?;
            let norm = layer.before_ffn.as_ref().map(param);
            let next_norm = norm.as_deref();
            let rstd = &mut **rstd_mid;
            block.join(Join {
                out: x_mid,
                h,
                rstd,
                residual: x,
                branch: Branch::Rows(y),
                next: next_norm,
            })?;
            let ffn = Weights {
                kind: &self.ffns[i],
                master: param(&layer.ffn),
                rounded: weight(&layer.ffn),
                thresholds: self.thresholds.part(i..i + 1),
            };
            let normed = normed(block, next_norm, ones, [x_mid, rstd]);
            let input = Input { h, normed, training: args.gate_training(i, config.num_layers) };
            let norm = layer.after_ffn.as_ref().map(param);
            let after = after_of(norm.as_deref(), after_ffn);
            let norm = norm_before(ranges, i + 1).map(param);
            // The norm that follows adds up the parts of tokens.
            let in_parts = after.is_none() && norm.is_some() && ffn.leaves_parts(saved);
            match in_parts {
                true => ffn.forward(None, saved, input, scratch)?,
                false => block.give(y, after, |y| ffn.forward(Some(y), saved, input, scratch))?,
            }
            if let (Some(bins), Some(z)) = (&mut self.bins, ffn.logits(scratch, h.rows())) {
                CountLogits { bins: &mut bins.part_mut(i..i + 1), z: &z, per_unit: PER_UNIT }.run()?;
            }
            self.report.add(i, saved)?;
            self.balance_loss += saved.balance_loss();
            let Stream { x: out, rstd } = next;
            let left = in_parts.then(|| saved.parts(scratch, &self.ffns[i]));
            let branch = match &left {
                Some((parts, slots, routed)) => Branch::Parts { parts, slots, routed },
                None => Branch::Rows(y),
            };
            block.join(Join { out, h, rstd, residual: x_mid, branch, next: norm.as_deref() })?;
        }
        Ok(())
    }

    /// Sets the token losses and the gradient of the last norm's output, in chunks of logits.
    pub(super) fn loss(&mut self, scale: f32) -> Result<()> {
        let Activations { targets, h, y: dh, losses, logits, dlogits, sums, .. } = &mut self.acts;
        let (tokens, w) = (targets.len(), &self.weights.part(self.ranges.head.clone()));
        let (rows, settings) = (logit_rows(&self.config, tokens), logits_of(&self.config));
        for first in (0..tokens).step_by(rows.max(1)) {
            let chunk = first..(first + rows).min(tokens);
            let (z, dz) = (&mut logits.part_mut(0..chunk.len()), &mut dlogits.part_mut(0..chunk.len()));
            let states = &h.part(chunk.clone());
            linear::Forward { y: &mut *z, x: states, w }.run()?;
            let (losses, targets) = (&mut losses.part_mut(chunk.clone()), &targets.part(chunk.clone()));
            cross_entropy::Finish { logits: &mut *z, settings }.run()?;
            cross_entropy::Chunk { losses, dproducts: dz, logits: z, targets, scale, settings }.run()?;
            linear::BackwardInput { dx: &mut dh.part_mut(chunk), dy: dz, w, add: false }.run()?;
            let dw = &mut self.grads.part_mut(self.ranges.head.clone());
            linear::BackwardWeight { dw, dy: dz, x: states }.run()?;
        }
        let out = &mut self.report.sums.part_mut(0..1);
        Ok(AddSum { out, x: losses, squares: false, partials: sums }.run()?)
    }

    /// Queues the backward pass. With `set`, it sets the gradients that the first micro-batch of a step sets.
    pub(super) fn backward(&mut self, seq: usize, args: &StepArgs, set: bool) -> Result<()> {
        let (config, ranges, block) = (&self.config, &self.ranges, Block::of(&self.config));
        let grads = &mut self.grads;
        let param = |range: &Range<usize>| self.params.part(range.clone());
        let weight = |range: &Range<usize>| self.weights.part(range.clone());
        let Activations {
            occurrences,
            streams,
            layers,
            angles,
            ones,
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
        let over = match args.sparsity_over {
            SparsityOver::Active => Over::Active,
            SparsityOver::All => Over::All,
            SparsityOver::Held => Over::Held,
        };
        let sparsity = Sparsity { weight: &self.sparsity_weight, factor: 1.0, over };
        let mut gradients = Gradients { block, params: &self.params, grads, partials };
        let Stream { x, rstd } = &streams[ranges.layers.len()];
        gradients.backward(&ranges.norm, dx, dh, [x, rstd], false)?;
        for (i, (layer, acts)) in ranges.layers.iter().zip(layers).enumerate().rev() {
            let heads = heads(config, i);
            let LayerActs { qkv, a, lse, x_mid, rstd_mid, heads: of_heads, after, ffn: saved } = acts;
            let [after_attention, after_ffn] =
                after.as_ref().map_or([None, None], |acts| acts.each_ref().map(Some));
            let (tokens, Stream { x, rstd }) = (h.rows(), &streams[i]);
            let mut dqkv = dqkv.shaped_mut(tokens, heads.joined_width());
            let mut da = da.shaped_mut(tokens, heads.width());
            // x_mid + scale norm(ffn(h))
            let norm = layer.before_ffn.as_ref().map(param);
            block.restore(norm.as_deref(), h, x_mid, rstd_mid)?;
            gradients.branch(layer.after_ffn.as_ref().zip(after_ffn), dy, dx, dh)?;
            let ffn = Weights {
                kind: &self.ffns[i],
                master: param(&layer.ffn),
                rounded: weight(&layer.ffn),
                thresholds: self.thresholds.part(i..i + 1),
            };
            let normed = normed(block, norm.as_deref(), ones, [x_mid, rstd_mid]);
            let input = Input { h, normed, training: args.gate_training(i, config.num_layers) };
            let Gradients { grads, partials, .. } = &mut gradients;
            let of_ffn = &mut grads.part_mut(layer.ffn.clone());
            ffn.backward(
                Backward { dh, grads: of_ffn, dy, acts: saved, input, sparsity, partials, set },
                scratch,
            )?;
            gradients.input(layer.before_ffn.as_ref(), dx, dh, [x_mid, rstd_mid])?;
            // x_mid = x + scale norm(a W_o^T + b)
            gradients.branch(layer.after_attention.as_ref().zip(after_attention), dy, dx, dh)?;
            gradients.linear(&layer.o, layer.o_bias.as_ref(), dy, a)?;
            linear::BackwardInput { dx: &mut *da, dy, w: &weight(&layer.o), add: false }.run()?;
            attention::Backward { dqkv: &mut dqkv, dout: &da, out: a, qkv, lse, heads, seq, deltas }.run()?;
            if let Some(rope) = config.architecture.layers[i].rope {
                let positions = Positions::Sequences { len: seq, start: 0 };
                rotate(config, i, &mut dqkv, &angles[rope], positions, true)?;
            }
            if let (Some(ranges), Some(acts)) = (&layer.qk_norm, of_heads) {
                let all = block.head_norms(heads, ranges.each_ref().map(|norm| norm.len()));
                for ((range, acts), heads) in ranges.iter().zip(acts).zip(all) {
                    gradients.heads(range, &mut dqkv, acts, heads)?;
                }
            }
            let norm = layer.before_attention.as_ref().map(param);
            block.restore(norm.as_deref(), h, x, rstd)?;
            let of_qkv = layer.qkv();
            gradients.linear(&of_qkv, layer.qkv_bias.as_ref(), &dqkv, h)?;
            linear::BackwardInput { dx: &mut **dh, dy: &dqkv, w: &weight(&of_qkv), add: false }.run()?;
            gradients.input(layer.before_attention.as_ref(), dx, dh, [x, rstd])?;
        }
        let dtable = &mut gradients.grads.part_mut(ranges.embed.clone());
        let scale = config.architecture.embed_scale;
        Ok(embedding::Backward { dtable, dout: dx, order: occurrences, scale }.run()?)
    }
}

/// Returns the range of the norm that is taken of the residual stream before layer `i`, or before the head; none where the
/// layer reads the stream itself.
fn norm_before(ranges: &Ranges, i: usize) -> Option<&Range<usize>> {
    match ranges.layers.get(i) {
        Some(layer) => layer.before_attention.as_ref(),
        None => Some(&ranges.norm),
    }
}

/// Returns the norm that follows a block, if there is one.
fn after_of<'a>(weight: Option<&'a Matrix<f32>>, acts: Option<&'a mut NormActs<f32>>) -> Option<After<'a>> {
    let (weight, NormActs { x, rstd }) = weight.zip(acts)?;
    Some(After { weight, x, rstd })
}

/// Returns what a router reads of the residual stream `x`. `ones` is the weight where there is no norm; `rstd` is 1 then.
fn normed<'a>(
    block: Block,
    weight: Option<&'a Matrix<f32>>,
    ones: &'a Matrix<f32>,
    [x, rstd]: [&'a Matrix<f32>; 2],
) -> Normed<'a> {
    let (weight, offset) = weight.map_or((ones, 0.0), |weight| (weight, block.offset));
    Normed { x, rstd, weight, offset }
}

/// The gradients of norms, weights and biases, with scratch memory for their sums.
struct Gradients<'a> {
    block: Block,
    params: &'a Matrix<f32>,
    grads: &'a mut Matrix<f32>,
    partials: &'a mut Matrix<f32>,
}

impl Gradients<'_> {
    /// Sets `dx` to the gradient of the input `x` of a norm, or adds it.
    fn backward(
        &mut self,
        norm: &Range<usize>,
        dx: &mut Matrix<f32>,
        dy: &Matrix<f32>,
        [x, rstd]: [&Matrix<f32>; 2],
        add: bool,
    ) -> Result<()> {
        let Gradients { block, params, grads, partials } = self;
        let (dweight, weight) = (&mut grads.part_mut(norm.clone()), &params.part(norm.clone()));
        let offset = block.offset;
        Ok(rms_norm::Backward { dx, dweight, dy, x, weight, offset, rstd, partials, add }.run()?)
    }

    /// Sets `dy`, rounded, to the gradient of what a block gives, from the gradient `dx` of the residual stream that it
    /// joined. `work` is used where a norm follows the block.
    fn branch(
        &mut self,
        after: Option<(&Range<usize>, &NormActs<f32>)>,
        dy: &mut Matrix<bf16>,
        dx: &Matrix<f32>,
        work: &mut Matrix<f32>,
    ) -> Result<()> {
        let scale = self.block.residual_scale;
        let of_branch = match after {
            Some((norm, NormActs { x, rstd })) => {
                self.backward(norm, work, dx, [x, rstd], false)?;
                &*work
            }
            None => dx,
        };
        match scale == 1.0 {
            true => Cast { out: dy, x: of_branch }.run()?,
            false => elementwise::Scale { out: dy, x: of_branch, scale }.run()?,
        }
        Ok(())
    }

    /// Adds to the gradient `dx` of the residual stream `x` that of what a block read of it, `dh`.
    fn input(
        &mut self,
        norm: Option<&Range<usize>>,
        dx: &mut Matrix<f32>,
        dh: &Matrix<f32>,
        stream: [&Matrix<f32>; 2],
    ) -> Result<()> {
        match norm {
            Some(norm) => self.backward(norm, dx, dh, stream, true),
            None => Ok(elementwise::Add { y: dx, x: dh }.run()?),
        }
    }

    /// Adds to the gradients of a linear layer's weight and bias.
    fn linear(
        &mut self,
        weight: &Range<usize>,
        bias: Option<&Range<usize>>,
        dy: &Matrix<bf16>,
        x: &Matrix<bf16>,
    ) -> Result<()> {
        let Gradients { grads, partials, .. } = self;
        linear::BackwardWeight { dw: &mut grads.part_mut(weight.clone()), dy, x }.run()?;
        if let Some(bias) = bias {
            linear::BackwardBias { db: &mut grads.part_mut(bias.clone()), dy, partials }.run()?;
        }
        Ok(())
    }

    /// Turns the gradients of normed queries or keys into those before their norm.
    fn heads(
        &mut self,
        norm: &Range<usize>,
        dx: &mut Matrix<bf16>,
        NormActs { x, rstd }: &NormActs<bf16>,
        heads: rms_norm::Heads,
    ) -> Result<()> {
        let Gradients { params, grads, partials, .. } = self;
        let (dweight, weight) = (&mut grads.part_mut(norm.clone()), &params.part(norm.clone()));
        Ok(rms_norm::BackwardHeads { dx, dweight, x, rstd, weight, heads, partials }.run()?)
    }
}
