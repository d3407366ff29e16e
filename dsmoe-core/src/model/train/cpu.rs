//! One training step: forward with saved activations, both losses, and the whole backward pass.

use std::ops::Range;

use dsmoe_kernels::{Precision, attention, cross_entropy, embedding, linear, rms_norm, rope};
use dsmoe_router::SparsityGrad;

use super::workspace::{LayerActs, TrainWorkspace};
use super::{StepArgs, StepOutput};
use crate::error::Result;
use crate::ffn::{FfnBackward, FfnForward, Record};
use crate::model::arena::Model;
use crate::model::tensors::{Batch, LayerRanges, attention_dims, in_pool};

impl Model {
    /// Runs forward and backward over `batch`. Adds to `grads` (laid out as
    /// [`Model::params`]) the gradient of
    ///
    /// ```text
    /// loss_scale * sum of token losses + sparsity_weight * mean over layers, tokens, experts of the gates
    ///     + sum over layers of the balance loss
    /// ```
    ///
    /// The workspace keeps the routing of the step. Nothing is allocated when this runs on a thread of the pool.
    ///
    /// # Errors
    /// A token id outside the vocabulary, or more positions than the model has.
    ///
    /// # Panics
    /// The slices' lengths do not fit, or the workspace is of another model or number of tokens.
    pub fn train_step(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        assert!(
            grads.len() == self.params.len() && batch.inputs.len() == workspace.tokens(),
            "train_step: {} gradients, {} inputs, workspace for {}",
            grads.len(),
            batch.inputs.len(),
            workspace.tokens()
        );
        batch.check(&self.config)?;
        Ok(in_pool(|| self.pooled_step(grads, batch, args, workspace)))
    }

    fn pooled_step(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) -> StepOutput {
        let Batch { inputs, targets, seq } = batch;
        let mut output = self.forward_train(inputs, seq, args, workspace);
        let dims = cross_entropy::Dims {
            tokens: inputs.len(),
            hidden: self.config.hidden,
            vocab: self.config.vocab_size,
        };
        let TrainWorkspace { h, y: dh, losses, head, .. } = workspace;
        cross_entropy::ForwardBackward {
            losses,
            dhidden: dh,
            dhead: &mut grads[self.ranges.head.clone()],
            hidden_states: h,
            head: self.param(&self.ranges.head),
            targets,
            scale: args.loss_scale,
            logits: cross_entropy::Logits::default(),
            dims,
            scratch: head,
        }
        .run();
        output.loss_sum = losses.iter().map(|&loss| f64::from(loss)).sum();
        output.predicted = targets.iter().filter(|&&t| t != cross_entropy::IGNORE).count();
        if output.loss_sum.is_finite() {
            self.backward(grads, inputs, seq, args, workspace);
        } else {
            output.non_finite = Some(workspace.first_non_finite());
        }
        output
    }

    fn forward_train(
        &self,
        inputs: &[u32],
        seq: usize,
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) -> StepOutput {
        let config = &self.config;
        let (hidden, eps) = (config.hidden, config.rms_norm_eps as f32);
        let (tokens, precision) = (inputs.len(), workspace.precision);
        let mut output = StepOutput::default();
        let TrainWorkspace { layers, x: x_last, rstd: rstd_last, h, y, scratch, stats, .. } = workspace;
        if let Some(stats) = stats {
            stats.clear();
        }
        // What the next norm reads; each block's output joins the residual stream in the norm after it.
        let first =
            layers.first_mut().map_or((&mut *x_last, &mut *rstd_last), |acts| (&mut acts.x, &mut acts.rstd));
        embedding::Forward {
            out: first.0,
            table: self.param(&self.ranges.embed),
            ids: inputs,
            hidden,
            scale: 1.0,
        }
        .run();
        let norm = self.ranges.layers.first().map_or(&self.ranges.norm, |ranges| &ranges.input_norm);
        rms_norm::Forward { y: h, rstd: first.1, x: first.0, weight: self.param(norm), offset: 0.0, eps }
            .run();
        for (i, ranges) in self.ranges.layers.iter().enumerate() {
            let (done, after) = layers.split_at_mut(i + 1);
            let LayerActs { x, qkv, a, lse, x_mid, rstd_mid, ffn: saved, .. } = &mut done[i];
            let attention = attention_dims(&self.config, i, tokens / seq, [seq, seq]);
            let dims = LinearDims::of(attention, hidden, precision);
            linear::Forward { y: qkv, x: h, w: self.param(&ranges.qkv()), bias: None, dims: dims.qkv }.run();
            rope::Forward { x: qkv, stride: attention.joined_width(), args: self.rope_args(attention) }.run();
            attention::ForwardJoined { out: a, lse, qkv, dims: attention }.run();
            linear::Forward { y, x: a, w: self.param(&ranges.o), bias: None, dims: dims.o }.run();
            rms_norm::ForwardSum {
                y: h,
                rstd: rstd_mid,
                x: x_mid,
                a: x,
                b: y,
                weight: self.param(&ranges.post_norm),
                offset: 0.0,
                eps,
            }
            .run();
            let report = self.ffns[i].forward_train(FfnForward {
                y,
                saved: saved.as_mut(),
                x: h,
                params: self.param(&ranges.ffn),
                training: args.gate_training(i),
                record: stats.as_mut().map(|stats| Record { stats, layer: i }),
                scratch,
            });
            let (x, rstd, norm) = match (after.first_mut(), self.ranges.layers.get(i + 1)) {
                (Some(acts), Some(ranges)) => (&mut acts.x, &mut acts.rstd, &ranges.input_norm),
                _ => (&mut *x_last, &mut *rstd_last, &self.ranges.norm),
            };
            rms_norm::ForwardSum {
                y: h,
                rstd,
                x,
                a: x_mid,
                b: y,
                weight: self.param(norm),
                offset: 0.0,
                eps,
            }
            .run();
            output.sparsity_loss += report.sparsity_loss / config.num_layers as f64;
            output.mean_gate += report.mean_gate / config.num_layers as f64;
            output.balance_loss += report.balance_loss;
        }
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
        let precision = workspace.precision;
        let gates = config.num_layers * tokens * self.num_experts().unwrap_or(1);
        let sparsity = SparsityGrad { weight: args.sparsity_weight / gates as f32, over: args.sparsity_over };
        let TrainWorkspace { layers, x, rstd, h, y: dh, dx, dqkv, da, scratch, .. } = workspace;

        let norm = &self.ranges.norm;
        rms_norm::Backward {
            dx,
            dweight: part(grads, norm),
            dy: dh,
            x,
            weight: self.param(norm),
            offset: 0.0,
            rstd,
            add: false,
        }
        .run();
        for (i, (ranges, acts)) in self.ranges.layers.iter().zip(layers).enumerate().rev() {
            let LayerRanges { input_norm, o, post_norm, ffn, .. } = ranges;
            let LayerActs { x, rstd, qkv, a, lse, x_mid, rstd_mid, ffn: saved } = acts;
            let attention = attention_dims(&self.config, i, tokens / seq, [seq, seq]);
            let dims = LinearDims::of(attention, hidden, precision);
            let (dqkv, da) = (&mut dqkv[..qkv.len()], &mut da[..a.len()]);
            // x_mid + ffn(h)
            rms_norm::Restore { y: h, x: x_mid, weight: self.param(post_norm), offset: 0.0, rstd: rstd_mid }
                .run();
            self.ffns[i].backward(FfnBackward {
                dx: dh,
                grads: part(grads, ffn),
                dy: dx,
                saved: saved.as_mut(),
                x: h,
                params: self.param(ffn),
                sparsity,
                training: args.gate_training(i),
                scratch,
            });
            rms_norm::Backward {
                dx,
                dweight: part(grads, post_norm),
                dy: dh,
                x: x_mid,
                weight: self.param(post_norm),
                offset: 0.0,
                rstd: rstd_mid,
                add: true,
            }
            .run();
            // x_mid = x + a W_o^T
            linear::BackwardWeight { dw: part(grads, o), dy: dx, x: a, dims: dims.o }.run();
            linear::BackwardInput { dx: da, dy: dx, w: self.param(o), dims: dims.o, add: false }.run();
            attention::Backward { dqkv, dout: da, out: a, qkv, lse, dims: attention }.run();
            rope::Backward { dx: dqkv, stride: attention.joined_width(), args: self.rope_args(attention) }
                .run();
            rms_norm::Restore { y: h, x, weight: self.param(input_norm), offset: 0.0, rstd }.run();
            linear::BackwardWeight { dw: part(grads, &ranges.qkv()), dy: dqkv, x: h, dims: dims.qkv }.run();
            linear::BackwardInput {
                dx: dh,
                dy: dqkv,
                w: self.param(&ranges.qkv()),
                dims: dims.qkv,
                add: false,
            }
            .run();
            rms_norm::Backward {
                dx,
                dweight: part(grads, input_norm),
                dy: dh,
                x,
                weight: self.param(input_norm),
                offset: 0.0,
                rstd,
                add: true,
            }
            .run();
        }
        embedding::Backward {
            dtable: part(grads, &self.ranges.embed),
            dout: dx,
            ids: inputs,
            hidden,
            scale: 1.0,
        }
        .run();
    }

    /// Returns the arguments that rotate queries and keys, the first columns of qkv.
    fn rope_args(&self, attention: attention::Dims) -> rope::Args<'_> {
        let heads = attention.heads + attention.kv_heads;
        let head_dim = attention.head_dim;
        rope::Args { table: &self.rope, seq: attention.queries, start: 0, heads, head_dim }
    }
}

/// Sizes of attention's linear layers.
struct LinearDims {
    qkv: linear::Dims,
    o: linear::Dims,
}

impl LinearDims {
    fn of(attention: attention::Dims, hidden: usize, precision: Precision) -> LinearDims {
        let rows = attention.batch * attention.queries;
        let dims = |inputs, outputs| linear::Dims { rows, inputs, outputs, precision };
        let width = attention.heads * attention.head_dim;
        LinearDims { qkv: dims(hidden, attention.joined_width()), o: dims(width, hidden) }
    }
}

/// Returns one tensor, or one FFN, of the gradients.
fn part<'a>(grads: &'a mut [f32], range: &Range<usize>) -> &'a mut [f32] {
    &mut grads[range.clone()]
}
