//! One training step: forward with saved activations, both losses, and the whole backward pass.

use std::ops::Range;

use dsmoe_kernels::{Precision, add, attention, cross_entropy, embedding, linear, rms_norm};
use dsmoe_router::SparsityGrad;

use super::workspace::{LayerActs, NormActs, TrainWorkspace};
use super::{StepArgs, StepOutput, Teacher, TopRows};
use crate::error::Result;
use crate::ffn::{FfnBackward, FfnForward, Record};
use crate::model::arena::Model;
use crate::model::block::Block;
use crate::model::ropes::Turn;
use crate::model::tensors::{Batch, LayerRanges, attention_dims, in_pool, logits_of};

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
        batch.check(&self.config)?;
        Ok(self.step_of(grads, batch, args, (None, workspace)))
    }

    /// Does as [`Model::train_step`] with, in place of the token losses,
    ///
    /// ```text
    /// (1 - weight) token loss + weight KL(teacher || model)
    /// ```
    ///
    /// # Errors
    /// Those of [`Model::train_step`], and sequences longer than the teacher's positions.
    ///
    /// # Panics
    /// Those of [`Model::train_step`]; the teacher is of another vocabulary.
    pub fn distill_step(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        teacher: &mut Teacher,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        batch.check(teacher.model.config())?;
        batch.check(&self.config)?;
        let Teacher { model, weight, workspace: of_teacher } = teacher;
        let model = model.on_host()?;
        model.last_hidden(batch.inputs, batch.seq, of_teacher);
        let distributions = cross_entropy::Distributions::Model {
            hidden_states: &of_teacher.h,
            head: &model.head,
            logits: logits_of(&model.config),
        };
        let lesson = Lesson { distributions, weight: *weight };
        Ok(self.step_of(grads, batch, args, (Some(lesson), workspace)))
    }

    /// Does as [`Model::distill_step`] with the most likely tokens of a teacher, in place of the teacher: all other tokens
    /// are one outcome of the divergence.
    ///
    /// # Errors
    /// Those of [`Model::train_step`].
    ///
    /// # Panics
    /// Those of [`Model::train_step`]; the rows are of another number of tokens or another vocabulary, or the weight is
    /// outside 0 to 1.
    pub fn distill_step_from(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        (rows, weight): (&TopRows, f32),
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        batch.check(&self.config)?;
        let distributions = cross_entropy::Distributions::Top { ids: &rows.ids, log_p: &rows.log_p };
        Ok(self.step_of(grads, batch, args, (Some(Lesson { distributions, weight }), workspace)))
    }

    fn step_of(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        (lesson, workspace): (Option<Lesson<'_>>, &mut TrainWorkspace),
    ) -> StepOutput {
        assert!(
            grads.len() == self.params.len() && batch.inputs.len() == workspace.tokens(),
            "train_step: {} gradients, {} inputs, workspace for {}",
            grads.len(),
            batch.inputs.len(),
            workspace.tokens()
        );
        in_pool(|| self.pooled_step(grads, batch, args, (lesson, workspace)))
    }

    fn pooled_step(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        (lesson, workspace): (Option<Lesson<'_>>, &mut TrainWorkspace),
    ) -> StepOutput {
        let Batch { inputs, targets, seq } = batch;
        let mut output = self.forward_train(inputs, seq, args, workspace);
        let dims = cross_entropy::Dims {
            tokens: inputs.len(),
            hidden: self.config.hidden,
            vocab: self.config.vocab_size,
        };
        let TrainWorkspace { h, y: dh, losses, divergences, head, .. } = workspace;
        divergences.resize(if lesson.is_some() { inputs.len() } else { 0 });
        let teacher = lesson.map(|Lesson { distributions, weight }| cross_entropy::Teacher {
            divergences,
            distributions,
            weight,
        });
        cross_entropy::ForwardBackward {
            losses,
            dhidden: dh,
            dhead: &mut grads[self.ranges.head.clone()],
            hidden_states: h,
            head: self.param(&self.ranges.head),
            targets,
            teacher,
            scale: args.loss_scale,
            logits: logits_of(&self.config),
            dims,
            scratch: head,
        }
        .run();
        [output.loss_sum, output.divergence_sum] =
            [&*losses, &workspace.divergences].map(|values| values.iter().map(|&nats| f64::from(nats)).sum());
        output.predicted = targets.iter().filter(|&&t| t != cross_entropy::IGNORE).count();
        if output.loss_sum.is_finite() && output.divergence_sum.is_finite() {
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
        let (config, block) = (&self.config, Block::of(&self.config));
        let (hidden, scale) = (config.hidden, config.architecture.embed_scale);
        let (tokens, precision) = (inputs.len(), workspace.precision);
        let mut output = StepOutput::default();
        let TrainWorkspace { layers, x: x_last, rstd: rstd_last, h, y, scratch, stats, .. } = workspace;
        if let Some(stats) = stats {
            stats.clear();
        }
        // What the next block reads: each block's output joins the residual stream in the norm of the next.
        let first =
            layers.first_mut().map_or((&mut *x_last, &mut *rstd_last), |acts| (&mut acts.x, &mut acts.rstd));
        embedding::Forward {
            out: first.0,
            table: self.param(&self.ranges.embed),
            ids: inputs,
            hidden,
            scale,
        }
        .run();
        let norm = self.norm_before(0);
        self.read(block, norm, h, first.1, first.0);
        for (i, ranges) in self.ranges.layers.iter().enumerate() {
            let (done, after) = layers.split_at_mut(i + 1);
            let LayerActs { x, qkv, a, lse, x_mid, rstd_mid, heads, after: norms, ffn: saved, .. } =
                &mut done[i];
            let attention = attention_dims(config, i, tokens / seq, [seq, seq]);
            let dims = LinearDims::of(attention, hidden, precision);
            let bias = ranges.qkv_bias.as_ref().map(|range| self.param(range));
            linear::Forward { y: qkv, x: h, w: self.param(&ranges.qkv()), bias, dims: dims.qkv }.run();
            self.norm_heads(block, i, qkv, heads.as_mut());
            self.ropes.forward(i, qkv, turn(attention));
            attention::ForwardJoined { out: a, lse, qkv, dims: attention }.run();
            let bias = ranges.o_bias.as_ref().map(|range| self.param(range));
            linear::Forward { y, x: a, w: self.param(&ranges.o), bias, dims: dims.o }.run();
            let [after_attention, after_ffn] =
                norms.as_mut().map_or([None, None], |acts| acts.each_mut().map(Some));
            let join = Join { x: &mut *x_mid, rstd: rstd_mid, residual: x, branch: y, h };
            self.join(
                block,
                ranges.after_attention.as_ref().zip(after_attention),
                ranges.before_ffn.as_ref(),
                join,
            );
            let report = self.ffns[i].forward_train(FfnForward {
                y,
                saved: saved.as_mut(),
                x: h,
                params: self.param(&ranges.ffn),
                training: args.gate_training(i, config.num_layers),
                record: stats.as_mut().map(|stats| Record { stats, layer: i }),
                scratch,
            });
            let (x, rstd) = match after.first_mut() {
                Some(acts) => (&mut acts.x, &mut acts.rstd),
                None => (&mut *x_last, &mut *rstd_last),
            };
            let join = Join { x, rstd, residual: x_mid, branch: y, h };
            self.join(block, ranges.after_ffn.as_ref().zip(after_ffn), self.norm_before(i + 1), join);
            output.sparsity_loss += report.sparsity_loss / config.num_layers as f64;
            output.mean_gate += report.mean_gate / config.num_layers as f64;
            output.balance_loss += report.balance_loss;
            output.separability += report.separability / config.num_layers as f64;
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
        let (config, block) = (&self.config, Block::of(&self.config));
        let (tokens, hidden) = (inputs.len(), config.hidden);
        let precision = workspace.precision;
        let gates = config.num_layers * tokens * self.num_experts().unwrap_or(1);
        let sparsity = SparsityGrad { weight: args.sparsity_weight / gates as f32, over: args.sparsity_over };
        let TrainWorkspace { layers, x, rstd, h, y: dh, dx, dbranch, dqkv, da, scratch, .. } = workspace;

        let (norm, offset) = (&self.ranges.norm, config.architecture.norm_offset);
        let (dweight, weight) = (part(grads, norm), self.param(norm));
        rms_norm::Backward { dx, dweight, dy: dh, x, weight, offset, rstd, add: false }.run();
        for (i, (ranges, acts)) in self.ranges.layers.iter().zip(layers).enumerate().rev() {
            let LayerRanges { o, ffn, .. } = ranges;
            let LayerActs { x, rstd, qkv, a, lse, x_mid, rstd_mid, heads, after, ffn: saved } = acts;
            let attention = attention_dims(config, i, tokens / seq, [seq, seq]);
            let dims = LinearDims::of(attention, hidden, precision);
            let (dqkv, da) = (&mut dqkv[..qkv.len()], &mut da[..a.len()]);
            let [after_attention, after_ffn] =
                after.as_ref().map_or([None, None], |acts| acts.each_ref().map(Some));
            // x_mid + scale norm(ffn(h))
            let norm = ranges.after_ffn.as_ref().zip(after_ffn);
            let dy = self.branch_gradient(grads, norm, dbranch, h, dx);
            self.restore(ranges.before_ffn.as_ref(), h, x_mid, rstd_mid);
            self.ffns[i].backward(FfnBackward {
                dx: dh,
                grads: part(grads, ffn),
                dy,
                saved: saved.as_mut(),
                x: h,
                params: self.param(ffn),
                sparsity,
                training: args.gate_training(i, config.num_layers),
                scratch,
            });
            self.input_gradient(grads, ranges.before_ffn.as_ref(), [&mut *dx, &mut *dh], x_mid, rstd_mid);
            // x_mid = x + scale norm(a W_o^T + b)
            let norm = ranges.after_attention.as_ref().zip(after_attention);
            let dy = self.branch_gradient(grads, norm, dbranch, h, dx);
            linear::BackwardWeight { dw: part(grads, o), dy, x: a, dims: dims.o }.run();
            if let Some(bias) = &ranges.o_bias {
                linear::BackwardBias { db: part(grads, bias), dy, dims: dims.o }.run();
            }
            linear::BackwardInput { dx: da, dy, w: self.param(o), dims: dims.o, add: false }.run();
            attention::Backward { dqkv, dout: da, out: a, qkv, lse, dims: attention }.run();
            self.ropes.backward(i, dqkv, turn(attention));
            self.norm_heads_backward(grads, block, i, dqkv, heads.as_ref());
            self.restore(ranges.before_attention.as_ref(), h, x, rstd);
            linear::BackwardWeight { dw: part(grads, &ranges.qkv()), dy: dqkv, x: h, dims: dims.qkv }.run();
            if let Some(bias) = &ranges.qkv_bias {
                linear::BackwardBias { db: part(grads, bias), dy: dqkv, dims: dims.qkv }.run();
            }
            linear::BackwardInput {
                dx: dh,
                dy: dqkv,
                w: self.param(&ranges.qkv()),
                dims: dims.qkv,
                add: false,
            }
            .run();
            self.input_gradient(grads, ranges.before_attention.as_ref(), [&mut *dx, &mut *dh], x, rstd);
        }
        let (dtable, scale) = (part(grads, &self.ranges.embed), config.architecture.embed_scale);
        embedding::Backward { dtable, dout: dx, ids: inputs, hidden, scale }.run();
    }

    /// Returns the norm that is taken of the residual stream before layer `i`, or before the head; none where the layer
    /// reads the stream itself.
    fn norm_before(&self, i: usize) -> Option<&Range<usize>> {
        match self.ranges.layers.get(i) {
            Some(ranges) => ranges.before_attention.as_ref(),
            None => Some(&self.ranges.norm),
        }
    }

    /// Sets `h` to what a block reads of the residual stream `x`.
    fn read(&self, block: Block, norm: Option<&Range<usize>>, h: &mut [f32], rstd: &mut [f32], x: &[f32]) {
        match norm {
            Some(range) => block.norm(self.param(range), h, rstd, x),
            None => h.copy_from_slice(x),
        }
    }

    /// Sets `h` to what a block read of the residual stream `x` in the forward pass.
    fn restore(&self, norm: Option<&Range<usize>>, h: &mut [f32], x: &[f32], rstd: &[f32]) {
        match norm {
            Some(range) => {
                let (weight, offset) = (self.param(range), self.config.architecture.norm_offset);
                rms_norm::Restore { y: h, x, weight, offset, rstd }.run();
            }
            None => h.copy_from_slice(x),
        }
    }

    /// Adds what a block gives to the residual stream, after the norm behind the block, and sets `h` to what the next
    /// block reads.
    fn join(
        &self,
        block: Block,
        after: Option<(&Range<usize>, &mut NormActs)>,
        next: Option<&Range<usize>>,
        join: Join<'_>,
    ) {
        let Join { x, rstd, residual, branch, h } = join;
        let scale = self.config.architecture.residual_scale;
        if let Some(next) = next.filter(|_| after.is_none() && scale == 1.0) {
            block.norm_sum(self.param(next), [h, rstd, x], [residual, branch]);
            return;
        }
        let branch = match after {
            Some((range, acts)) => {
                acts.x.copy_from_slice(branch);
                block.norm(self.param(range), h, &mut acts.rstd, &acts.x);
                &*h
            }
            None => branch,
        };
        x.copy_from_slice(residual);
        add::Add { y: x, x: branch, scale }.run();
        self.read(block, next, h, rstd, x);
    }

    /// Returns the gradient of what a block gives, from the gradient `dx` of the residual stream that it joined; `h` and
    /// `dbranch` are used for it. Adds the gradient of the norm behind the block.
    fn branch_gradient<'a>(
        &self,
        grads: &mut [f32],
        after: Option<(&Range<usize>, &NormActs)>,
        dbranch: &'a mut [f32],
        h: &mut [f32],
        dx: &'a [f32],
    ) -> &'a [f32] {
        let scale = self.config.architecture.residual_scale;
        let Some((range, NormActs { x, rstd })) = after else {
            if scale == 1.0 {
                return dx;
            }
            add::Scale { y: dbranch, x: dx, scale }.run();
            return dbranch;
        };
        let dy = if scale == 1.0 {
            dx
        } else {
            add::Scale { y: h, x: dx, scale }.run();
            &*h
        };
        let (dweight, weight) = (part(grads, range), self.param(range));
        let offset = self.config.architecture.norm_offset;
        rms_norm::Backward { dx: dbranch, dweight, dy, x, weight, offset, rstd, add: false }.run();
        dbranch
    }

    /// Adds to the gradient `dx` of the residual stream `x` that of what a block read of it, `dh`.
    fn input_gradient(
        &self,
        grads: &mut [f32],
        norm: Option<&Range<usize>>,
        [dx, dh]: [&mut [f32]; 2],
        x: &[f32],
        rstd: &[f32],
    ) {
        let Some(range) = norm else {
            add::Add { y: dx, x: dh, scale: 1.0 }.run();
            return;
        };
        let (dweight, weight) = (part(grads, range), self.param(range));
        let offset = self.config.architecture.norm_offset;
        rms_norm::Backward { dx, dweight, dy: dh, x, weight, offset, rstd, add: true }.run();
    }

    /// Norms the queries and keys in `qkv`, where the family does.
    fn norm_heads(&self, block: Block, i: usize, qkv: &mut [f32], acts: Option<&mut [NormActs; 2]>) {
        let (Some(ranges), Some(acts)) = (&self.ranges.layers[i].qk_norm, acts) else { return };
        let ([q, kv], mut first) = (self.config.attention_widths(i), 0);
        for ((range, acts), width) in ranges.iter().zip(acts).zip([q, kv]) {
            let weight = self.param(range);
            let (saved, rstd) = (Some(&mut acts.x[..]), &mut acts.rstd[..]);
            let heads = block.heads(weight, width, q + 2 * kv);
            rms_norm::ForwardHeads { x: &mut qkv[first..], saved, rstd, weight, heads }.run();
            first += width;
        }
    }

    /// Turns the gradients of normed queries and keys in `dqkv` into those before their norms.
    fn norm_heads_backward(
        &self,
        grads: &mut [f32],
        block: Block,
        i: usize,
        dqkv: &mut [f32],
        acts: Option<&[NormActs; 2]>,
    ) {
        let (Some(ranges), Some(acts)) = (&self.ranges.layers[i].qk_norm, acts) else { return };
        let ([q, kv], mut first) = (self.config.attention_widths(i), 0);
        for ((range, NormActs { x, rstd }), width) in ranges.iter().zip(acts).zip([q, kv]) {
            let (weight, dweight) = (self.param(range), part(grads, range));
            let heads = block.heads(weight, width, q + 2 * kv);
            rms_norm::BackwardHeads { dx: &mut dqkv[first..], dweight, x, rstd, weight, heads }.run();
            first += width;
        }
    }
}

/// A teacher's distributions of a batch.
struct Lesson<'a> {
    distributions: cross_entropy::Distributions<'a>,
    weight: f32,
}

/// A block's output on its way into the residual stream.
struct Join<'a> {
    /// The stream after it; set.
    x: &'a mut [f32],
    /// The reciprocal deviations of the norm that the next block reads; set if there is one.
    rstd: &'a mut [f32],
    /// The stream before it.
    residual: &'a [f32],
    /// The block's output.
    branch: &'a [f32],
    /// The input of the next block; set.
    h: &'a mut [f32],
}

/// Returns the rows of queries and keys, the first columns of qkv.
fn turn(attention: attention::Dims) -> Turn {
    let (seq, heads) = (attention.queries, attention.heads + attention.kv_heads);
    Turn { stride: attention.joined_width(), heads, seq, start: 0, positions: seq }
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
