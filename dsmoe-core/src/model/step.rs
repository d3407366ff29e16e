//! One training step: forward with saved activations, both losses, and the whole backward pass.

use std::any::Any;
use std::ops::Range;

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{add, attention, cross_entropy, embedding, linear, rms_norm, rope};
use dsmoe_router::{RoutingStats, SparsityGrad, SparsityOver};

use super::{LayerRanges, Model, check_input};
use crate::error::Result;
use crate::ffn::{FfnScratch, Record};

/// Weights of the losses of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepArgs {
    /// What each token's loss is multiplied by: one over the predicted tokens of the whole optimiser step.
    pub loss_scale: f32,
    /// Weight of the sparsity loss (a mean over layers, tokens and experts) in this micro-batch: the weight of the
    /// optimiser step divided by its micro-batches.
    pub sparsity_weight: f32,
    /// Which gates the sparsity loss acts on.
    pub sparsity_over: SparsityOver,
    /// What the operands of the layers' matrix products are rounded to. Parameters, gradients, norms, attention,
    /// routers and the residual stream are f32.
    pub precision: Precision,
}

/// What a micro-batch showed.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Sum of the token losses, nats.
    pub loss_sum: f64,
    /// Tokens predicted.
    pub predicted: usize,
    /// Mean of active gates over layers, tokens and experts (eq. 17-19).
    pub sparsity_loss: f64,
    /// Mean of all gates over layers, tokens and experts.
    pub mean_gate: f64,
    /// Routing; none without routers.
    pub stats: Option<RoutingStats>,
    /// The first place with a NaN or infinity in the forward pass, e.g. `layer 3 ffn`, when the loss has one.
    pub non_finite: Option<String>,
}

/// What one layer's backward needs from its forward.
#[derive(Debug)]
struct LayerActs {
    /// Input of the layer.
    x: Buf,
    rstd: Buf,
    /// Normed input of attention.
    h: Buf,
    q: Buf,
    k: Buf,
    v: Buf,
    a: Buf,
    lse: Buf,
    /// Residual stream between attention and FFN.
    x_mid: Buf,
    rstd_mid: Buf,
    /// Normed input of the FFN.
    h_mid: Buf,
    ffn: Box<dyn Any + Send>,
}

/// Activations and scratch of training; reused every step, sized by the first.
#[derive(Debug, Default)]
pub struct TrainWorkspace {
    layers: Vec<LayerActs>,
    x: Buf,
    rstd: Buf,
    h: Buf,
    losses: Buf,
    /// Output of a block, before it joins the residual stream; in the backward its gradient's way back.
    y: Buf,
    dx: Buf,
    dh: Buf,
    dq: Buf,
    dk: Buf,
    dv: Buf,
    da: Buf,
    scratch: FfnScratch,
}

impl TrainWorkspace {
    fn prepare(&mut self, model: &Model, tokens: usize) {
        let config = &model.config;
        let (hidden, heads) = (config.hidden, config.num_heads);
        let (q_width, kv_width) = (heads * config.head_dim, config.num_kv_heads * config.head_dim);
        if self.layers.len() != config.num_layers {
            self.layers = model
                .ffns
                .iter()
                .map(|ffn| LayerActs {
                    x: Buf::default(),
                    rstd: Buf::default(),
                    h: Buf::default(),
                    q: Buf::default(),
                    k: Buf::default(),
                    v: Buf::default(),
                    a: Buf::default(),
                    lse: Buf::default(),
                    x_mid: Buf::default(),
                    rstd_mid: Buf::default(),
                    h_mid: Buf::default(),
                    ffn: ffn.new_saved(),
                })
                .collect();
        }
        for layer in &mut self.layers {
            for buf in [&mut layer.x, &mut layer.h, &mut layer.x_mid, &mut layer.h_mid] {
                buf.resize(tokens * hidden);
            }
            for buf in [&mut layer.q, &mut layer.a] {
                buf.resize(tokens * q_width);
            }
            for buf in [&mut layer.k, &mut layer.v] {
                buf.resize(tokens * kv_width);
            }
            for buf in [&mut layer.rstd, &mut layer.rstd_mid] {
                buf.resize(tokens);
            }
            layer.lse.resize(tokens * heads);
        }
        for buf in [&mut self.x, &mut self.h, &mut self.y, &mut self.dx, &mut self.dh] {
            buf.resize(tokens * hidden);
        }
        for buf in [&mut self.dq, &mut self.da] {
            buf.resize(tokens * q_width);
        }
        for buf in [&mut self.dk, &mut self.dv] {
            buf.resize(tokens * kv_width);
        }
        self.rstd.resize(tokens);
        self.losses.resize(tokens);
    }
}

impl Model {
    /// Forward and backward over `inputs.len() / seq` sequences of `seq` tokens. Adds to `grads` (laid out as
    /// [`Model::params`]) the gradient of
    ///
    /// ```text
    /// loss_scale * sum of token losses + sparsity_weight * mean over layers, tokens, experts of the gates
    /// ```
    ///
    /// # Errors
    /// A token id outside the vocabulary, or more positions than the model has.
    ///
    /// # Panics
    /// The slices' lengths do not fit.
    pub fn train_step(
        &self,
        grads: &mut [f32],
        inputs: &[u32],
        targets: &[u32],
        seq: usize,
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        assert!(
            grads.len() == self.params.len()
                && targets.len() == inputs.len()
                && inputs.len().is_multiple_of(seq),
            "train_step: {} gradients, {} inputs, {} targets, seq {seq}",
            grads.len(),
            inputs.len(),
            targets.len()
        );
        check_input(&self.config, inputs, 0, seq)?;
        workspace.prepare(self, inputs.len());
        workspace.scratch.experts.set_precision(args.precision);
        let mut output = self.forward_train(inputs, seq, args.precision, workspace);
        let dims = cross_entropy::Dims {
            tokens: inputs.len(),
            hidden: self.config.hidden,
            vocab: self.config.vocab_size,
        };
        let TrainWorkspace { h, dh, losses, .. } = workspace;
        cross_entropy::forward_backward(
            losses,
            dh,
            &mut grads[self.ranges.head.clone()],
            h,
            self.param(&self.ranges.head),
            targets,
            args.loss_scale,
            dims,
        );
        output.loss_sum = losses.iter().map(|&loss| f64::from(loss)).sum();
        output.predicted = targets.iter().filter(|&&t| t != cross_entropy::IGNORE).count();
        if !output.loss_sum.is_finite() {
            output.non_finite = Some(workspace.first_non_finite());
            return Ok(output);
        }
        self.backward(grads, inputs, seq, args, workspace);
        Ok(output)
    }

    fn forward_train(
        &self,
        inputs: &[u32],
        seq: usize,
        precision: Precision,
        workspace: &mut TrainWorkspace,
    ) -> StepOutput {
        let config = &self.config;
        let (tokens, hidden, eps) = (inputs.len(), config.hidden, config.rms_norm_eps as f32);
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let dims = |inputs, outputs| linear::Dims { rows: tokens, inputs, outputs, precision };
        let mut output = StepOutput { stats: self.new_stats(), ..StepOutput::default() };
        let TrainWorkspace { layers, x, rstd, h, y, scratch, .. } = workspace;
        embedding::forward(x, self.param(&self.ranges.embed), inputs, hidden);
        for (i, (ranges, acts)) in self.ranges.layers.iter().zip(layers).enumerate() {
            let LayerActs { x: x_in, rstd, h, q, k, v, a, lse, x_mid, rstd_mid, h_mid, ffn: saved } = acts;
            x_in.copy_from_slice(x);
            rms_norm::forward(h, rstd, x_in, self.param(&ranges.input_norm), eps, hidden);
            linear::forward(q, h, self.param(&ranges.q), dims(hidden, q_width));
            linear::forward(k, h, self.param(&ranges.k), dims(hidden, kv_width));
            linear::forward(v, h, self.param(&ranges.v), dims(hidden, kv_width));
            rope::forward(q, self.rope_args(seq, config.num_heads));
            rope::forward(k, self.rope_args(seq, config.num_kv_heads));
            attention::forward(a, lse, q, k, v, self.attention_dims(tokens, seq));
            linear::forward(y, a, self.param(&ranges.o), dims(q_width, hidden));
            add::sum(x_mid, x_in, y);
            rms_norm::forward(h_mid, rstd_mid, x_mid, self.param(&ranges.post_norm), eps, hidden);
            let report = self.ffns[i].forward_train(
                y,
                saved.as_mut(),
                h_mid,
                self.param(&ranges.ffn),
                output.stats.as_mut().map(|stats| Record { stats, layer: i }),
                scratch,
            );
            add::sum(x, x_mid, y);
            output.sparsity_loss += report.sparsity_loss / config.num_layers as f64;
            output.mean_gate += report.mean_gate / config.num_layers as f64;
        }
        rms_norm::forward(h, rstd, x, self.param(&self.ranges.norm), eps, hidden);
        output
    }

    fn backward(
        &self,
        grads: &mut [f32],
        inputs: &[u32],
        seq: usize,
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) {
        let config = &self.config;
        let (tokens, hidden) = (inputs.len(), config.hidden);
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let dims =
            |inputs, outputs| linear::Dims { rows: tokens, inputs, outputs, precision: args.precision };
        let gates = config.num_layers * tokens * self.num_experts().unwrap_or(1);
        let sparsity = SparsityGrad { weight: args.sparsity_weight / gates as f32, over: args.sparsity_over };
        let TrainWorkspace { layers, x, rstd, y: dy, dx, dh, dq, dk, dv, da, scratch, .. } = workspace;

        rms_norm::backward(
            dx,
            part(grads, &self.ranges.norm),
            dh,
            x,
            self.param(&self.ranges.norm),
            rstd,
            hidden,
        );
        for (i, (ranges, acts)) in self.ranges.layers.iter().zip(layers).enumerate().rev() {
            let LayerRanges { input_norm, q: wq, k: wk, v: wv, o: wo, post_norm, ffn } = ranges;
            let LayerActs { x, rstd, h, q, k, v, a, lse, x_mid, rstd_mid, h_mid, ffn: saved } = acts;
            // x += ffn(h_mid)
            self.ffns[i].backward(
                dh,
                part(grads, ffn),
                dx,
                saved.as_mut(),
                h_mid,
                self.param(ffn),
                sparsity,
                scratch,
            );
            rms_norm::backward(
                dy,
                part(grads, post_norm),
                dh,
                x_mid,
                self.param(post_norm),
                rstd_mid,
                hidden,
            );
            add::add(dx, dy);
            // x_mid = x + a W_o^T
            linear::backward_weight(part(grads, wo), dx, a, dims(q_width, hidden));
            linear::backward_input(da, dx, self.param(wo), dims(q_width, hidden));
            attention::backward(dq, dk, dv, da, a, q, k, v, lse, self.attention_dims(tokens, seq));
            rope::backward(dq, self.rope_args(seq, config.num_heads));
            rope::backward(dk, self.rope_args(seq, config.num_kv_heads));
            linear::backward_weight(part(grads, wq), dq, h, dims(hidden, q_width));
            linear::backward_weight(part(grads, wk), dk, h, dims(hidden, kv_width));
            linear::backward_weight(part(grads, wv), dv, h, dims(hidden, kv_width));
            linear::backward_input(dh, dq, self.param(wq), dims(hidden, q_width));
            linear::backward_input_add(dh, dk, self.param(wk), dims(hidden, kv_width));
            linear::backward_input_add(dh, dv, self.param(wv), dims(hidden, kv_width));
            rms_norm::backward(dy, part(grads, input_norm), dh, x, self.param(input_norm), rstd, hidden);
            add::add(dx, dy);
        }
        embedding::backward(part(grads, &self.ranges.embed), dx, inputs, hidden);
    }

    fn rope_args(&self, seq: usize, heads: usize) -> rope::Args<'_> {
        rope::Args { table: &self.rope, seq, start: 0, heads }
    }

    fn attention_dims(&self, tokens: usize, seq: usize) -> attention::Dims {
        attention::Dims {
            batch: tokens / seq,
            queries: seq,
            keys: seq,
            heads: self.config.num_heads,
            kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
        }
    }
}

/// One tensor, or one FFN, of the gradients.
fn part<'a>(grads: &'a mut [f32], range: &Range<usize>) -> &'a mut [f32] {
    &mut grads[range.clone()]
}

impl TrainWorkspace {
    /// Where the forward pass first left the finite numbers.
    fn first_non_finite(&self) -> String {
        let bad = |buf: &Buf| buf.iter().any(|x| !x.is_finite());
        for (i, layer) in self.layers.iter().enumerate() {
            if bad(&layer.x) {
                return match i {
                    0 => "embedding".to_owned(),
                    _ => format!("layer {} ffn", i - 1),
                };
            }
            if bad(&layer.x_mid) {
                return format!("layer {i} attention");
            }
        }
        match bad(&self.x) {
            true => format!("layer {} ffn", self.layers.len() - 1),
            false => "head".to_owned(),
        }
    }
}
