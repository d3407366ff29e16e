//! One training step: forward with saved activations, both losses, and the whole backward pass.

use std::ops::Range;

use dsmoe_kernels::{Precision, add, attention, cross_entropy, embedding, linear, rms_norm};
use dsmoe_router::{Pull, RoutingStats, SparsityGrad, SparsityOver};

use super::units::{Grads, Units, Whole};
use super::workspace::{LayerActs, NormActs, TrainWorkspace, is_not_finite};
use super::{StepArgs, StepOutput, Teacher, Teaching, TopRows};
use crate::error::Result;
use crate::ffn::{FfnBackward, FfnForward, FfnReport, FfnScratch, Record};
use crate::model::arena::Model;
use crate::model::block::Block;
use crate::model::ropes::Turn;
use crate::model::tensors::{Batch, LayerRanges, attention_dims, in_pool, logits_of};
use crate::model::weights::Params;

impl Model {
    /// Runs forward and backward over `batch`. Adds to `grads` (laid out as
    /// [`Model::params`]) the gradient of
    ///
    /// ```text
    /// loss_scale * sum of token losses + sparsity_weight * mean over layers, tokens, experts of the gates
    ///     + share.weight * (mean over layers, tokens, experts of all gates - share.target)^2
    ///     + sum over layers of the balance loss
    /// ```
    ///
    /// The workspace keeps the routing of the step. Nothing is allocated when this runs on a thread of the pool.
    ///
    /// # Errors
    /// A token id outside the vocabulary, or more positions than the model has.
    ///
    /// # Panics
    /// The slices' lengths do not fit, the workspace is of another model or number of tokens, or there is a loss on the share of other
    /// gates than all.
    pub fn train_step(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        self.step_of(grads, batch, args, Teaching::None, workspace)
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
        self.step_of(grads, batch, args, Teaching::Of(teacher), workspace)
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
        self.step_of(grads, batch, args, Teaching::Rows(rows, weight), workspace)
    }

    fn step_of(
        &self,
        grads: &mut [f32],
        batch: Batch<'_>,
        args: &StepArgs,
        teaching: Teaching<'_>,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        let [grads_len, params_len] = [grads.len(), self.params.len()];
        assert!(grads_len == params_len, "train_step: {grads_len} gradients of {params_len} parameters");
        let units = &mut Whole { params: &self.params, grads };
        self.step_on(units, (batch, teaching), args, workspace)
    }

    /// Does as [`Model::train_step`], or its like for `teaching`, with the parameters and gradients that `units` lends.
    /// The own ones of this model are not used.
    ///
    /// # Errors
    /// Those of [`Model::distill_step`], and of `units`.
    ///
    /// # Panics
    /// Those of [`Model::distill_step`] and [`Model::distill_step_from`].
    pub fn step_on(
        &self,
        units: &mut dyn Units,
        (batch, teaching): (Batch<'_>, Teaching<'_>),
        args: &StepArgs,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        batch.check(&self.config)?;
        let (inputs, room) = (batch.inputs.len(), workspace.tokens());
        assert!(inputs == room, "train_step: {inputs} inputs, workspace for {room}");
        let over = args.sparsity_over;
        assert!(
            args.share.is_none() || over == SparsityOver::All,
            "train_step: a loss on the share of {over:?}"
        );
        let lesson = match teaching {
            Teaching::None => None,
            Teaching::Of(Teacher { model, weight, workspace }) => {
                batch.check(model.config())?;
                let model = model.on_host()?;
                model.last_hidden(batch.inputs, batch.seq, workspace);
                let (hidden_states, head) = (&workspace.h[..], &model.head);
                let logits = logits_of(&model.config);
                let distributions = cross_entropy::Distributions::Model { hidden_states, head, logits };
                Some(Lesson { distributions, weight: *weight })
            }
            Teaching::Rows(TopRows { ids, log_p }, weight) => {
                Some(Lesson { distributions: cross_entropy::Distributions::Top { ids, log_p }, weight })
            }
        };
        let (block, precision) = (Block::of(&self.config), workspace.precision);
        let pass = Pass { model: self, block, batch, args, precision };
        in_pool(|| pass.step(units, lesson, workspace))
    }
}

/// One micro-batch on its way through the units of a model.
#[derive(Clone, Copy)]
struct Pass<'a> {
    model: &'a Model,
    block: Block,
    batch: Batch<'a>,
    args: &'a StepArgs,
    precision: Precision,
}

/// The memory that a layer's forward pass sets.
struct LayerWork<'a> {
    /// The residual stream before the layer.
    x: &'a [f32],
    /// The residual stream after it; set if there is one.
    next: Option<&'a mut [f32]>,
    acts: &'a mut LayerActs,
    h: &'a mut [f32],
    y: &'a mut [f32],
    scratch: &'a mut FfnScratch,
    stats: Option<&'a mut RoutingStats>,
}

impl Pass<'_> {
    fn step(
        self,
        units: &mut dyn Units,
        lesson: Option<Lesson<'_>>,
        workspace: &mut TrainWorkspace,
    ) -> Result<StepOutput> {
        let Pass { model: Model { config, ranges, .. }, batch, args, .. } = self;
        let mut output = self.forward(units, workspace)?;
        output.share_loss = args.share.map_or(0.0, |share| share.square(output.mean_gate));
        let TrainWorkspace { h, y: dh, losses, divergences, head, .. } = workspace;
        divergences.resize(if lesson.is_some() { batch.inputs.len() } else { 0 });
        let teacher = lesson.map(|Lesson { distributions, weight }| cross_entropy::Teacher {
            divergences,
            distributions,
            weight,
        });
        let (params, mut grads) = units.both(self.head_unit())?;
        cross_entropy::ForwardBackward {
            losses,
            dhidden: dh,
            dhead: grads.of(&ranges.head),
            hidden_states: h,
            head: params.of(&ranges.head),
            targets: batch.targets,
            teacher,
            scale: args.loss_scale,
            logits: logits_of(config),
            dims: cross_entropy::Dims {
                tokens: batch.inputs.len(),
                hidden: config.hidden,
                vocab: config.vocab_size,
            },
            scratch: head,
        }
        .run();
        [output.loss_sum, output.divergence_sum] =
            [&*losses, &workspace.divergences].map(|values| values.iter().map(|&nats| f64::from(nats)).sum());
        output.predicted = batch.targets.iter().filter(|&&t| t != cross_entropy::IGNORE).count();
        let finite = output.loss_sum.is_finite() && output.divergence_sum.is_finite();
        if !finite {
            output.non_finite = Some(workspace.first_non_finite());
        }
        output.went_back = units.go_on(finite)?;
        if output.went_back {
            workspace.scratch.pull = Pull::default();
            let args = &self.args_of_backward(output.mean_gate);
            Pass { args, ..self }.backward(units, workspace)?;
            let Pull { force, slope } = workspace.scratch.pull;
            output.pull = Pull { force, slope: slope / self.gates() as f64 };
        }
        Ok(output)
    }

    /// Returns the weights of the losses for the backward pass: by the mean gate, the derivative of the loss on the share is a weight of
    /// the sparsity loss over all gates.
    fn args_of_backward(self, mean_gate: f64) -> StepArgs {
        let Some(share) = self.args.share else { return *self.args };
        let sparsity_weight = self.args.sparsity_weight + share.slope(mean_gate) as f32;
        StepArgs { sparsity_weight, ..*self.args }
    }

    /// Returns the unit of the final norm, the last one.
    fn last_unit(self) -> usize {
        self.model.config.num_layers + 1
    }

    /// Returns the unit of the head.
    fn head_unit(self) -> usize {
        if self.model.config.tie_word_embeddings { 0 } else { self.last_unit() }
    }

    fn forward(self, units: &mut dyn Units, workspace: &mut TrainWorkspace) -> Result<StepOutput> {
        let Pass { model: Model { config, ranges, .. }, block, batch, .. } = self;
        let mut output = StepOutput::default();
        let TrainWorkspace { streams, kept, of_layer, rstd, h, y, scratch, stats, .. } = workspace;
        if let Some(stats) = stats {
            stats.clear();
        }
        embedding::Forward {
            out: &mut streams[0],
            table: units.params(0)?.of(&ranges.embed),
            ids: batch.inputs,
            hidden: config.hidden,
            scale: config.architecture.embed_scale,
        }
        .run();
        let mut not_finite = None;
        for i in 0..config.num_layers {
            let (before, after) = streams.split_at_mut(i + 1);
            let (acts, stats) = (&mut kept[of_layer[i]], stats.as_mut());
            let work = LayerWork { x: &before[i], next: Some(&mut after[0]), acts, h, y, scratch, stats };
            let report = self.layer(i, units.params(i + 1)?, work);
            // Values that are not kept are looked at here.
            if not_finite.is_none() && of_layer[i + 1..].contains(&of_layer[i]) {
                not_finite = is_not_finite(&kept[of_layer[i]].x_mid).then_some(i);
            }
            output.sparsity_loss += report.sparsity_loss / config.num_layers as f64;
            output.mean_gate += report.mean_gate / config.num_layers as f64;
            output.balance_loss += report.balance_loss;
            output.separability += report.separability / config.num_layers as f64;
            output.gate_entropy += report.gate_entropy / config.num_layers as f64;
        }
        let params = units.params(self.last_unit())?;
        block.norm(params.of(&ranges.norm), h, rstd, &streams[config.num_layers]);
        workspace.attention_not_finite = not_finite;
        Ok(output)
    }

    /// Runs the forward pass of layer `i`.
    fn layer(self, i: usize, params: Params<'_>, work: LayerWork<'_>) -> FfnReport {
        let Pass { model: Model { config, ranges, ffns, ropes, .. }, args, .. } = self;
        let ranges = &ranges.layers[i];
        let LayerWork { x, next, acts, h, y, scratch, stats } = work;
        let LayerActs { rstd, qkv, a, lse, x_mid, rstd_mid, heads, after, ffn: saved } = acts;
        let (attention, dims) = self.dims(i);
        let of = |range: &Option<Range<usize>>| range.as_ref().map(|range| params.of(range));
        self.read(of(&ranges.before_attention), h, rstd, x);
        let (w, bias) = (params.of(&ranges.qkv()), of(&ranges.qkv_bias));
        linear::Forward { y: qkv, x: h, w, bias, dims: dims.qkv }.run();
        self.norm_heads(i, params, qkv, heads.as_mut());
        ropes.forward(i, qkv, turn(attention));
        attention::ForwardJoined { out: a, lse, qkv, dims: attention }.run();
        let (w, bias) = (params.of(&ranges.o), of(&ranges.o_bias));
        linear::Forward { y, x: a, w, bias, dims: dims.o }.run();
        let [after_attention, after_ffn] =
            after.as_mut().map_or([None, None], |acts| acts.each_mut().map(Some));
        let norm = of(&ranges.after_attention).zip(after_attention);
        let join = Join { x: &mut *x_mid, residual: x, branch: y, h };
        self.join_and_read(norm, of(&ranges.before_ffn), rstd_mid, join);
        let report = ffns[i].forward_train(FfnForward {
            y,
            saved: saved.as_mut(),
            x: h,
            params: params.of(&ranges.ffn),
            training: args.gate_training(i, config.num_layers),
            record: stats.map(|stats| Record { stats, layer: i }),
            scratch,
        });
        let norm = of(&ranges.after_ffn).zip(after_ffn);
        let branch = self.normed(norm, y, h);
        if let Some(next) = next {
            next.copy_from_slice(x_mid);
            add::Add { y: next, x: branch, scale: config.architecture.residual_scale }.run();
        }
        report
    }

    fn dims(self, i: usize) -> (attention::Dims, LinearDims) {
        let Batch { inputs, seq, .. } = self.batch;
        let attention = attention_dims(&self.model.config, i, inputs.len() / seq, [seq, seq]);
        (attention, LinearDims::of(attention, self.model.config.hidden, self.precision))
    }

    fn backward(self, units: &mut dyn Units, workspace: &mut TrainWorkspace) -> Result<()> {
        let Pass { model: Model { config, ranges, .. }, batch, .. } = self;
        let (params, mut grads) = units.both(self.last_unit())?;
        let TrainWorkspace { streams, rstd, y: dh, dx, .. } = workspace;
        let (dweight, weight) = (grads.of(&ranges.norm), params.of(&ranges.norm));
        let (x, offset) = (&streams[config.num_layers], config.architecture.norm_offset);
        rms_norm::Backward { dx, dweight, dy: dh, x, weight, offset, rstd, add: false }.run();
        units.done(self.last_unit())?;
        for i in (0..config.num_layers).rev() {
            let (params, mut grads) = units.both(i + 1)?;
            if workspace.recomputes(i) {
                let TrainWorkspace { streams, kept, of_layer, h, y, scratch, .. } = workspace;
                let (x, acts) = (&streams[i], &mut kept[of_layer[i]]);
                self.layer(i, params, LayerWork { x, next: None, acts, h, y, scratch, stats: None });
            }
            self.layer_backward(i, params, &mut grads, workspace);
            units.done(i + 1)?;
        }
        let (mut grads, scale) = (units.grads(0), config.architecture.embed_scale);
        let (dtable, dout) = (grads.of(&ranges.embed), &workspace.dx);
        embedding::Backward { dtable, dout, ids: batch.inputs, hidden: config.hidden, scale }.run();
        units.done(0)
    }

    /// Counts the gates whose mean the sparsity loss is.
    fn gates(self) -> usize {
        let Pass { model, batch, .. } = self;
        model.config.num_layers * batch.inputs.len() * model.num_experts().unwrap_or(1)
    }

    fn layer_backward(
        self,
        i: usize,
        params: Params<'_>,
        grads: &mut Grads<'_>,
        workspace: &mut TrainWorkspace,
    ) {
        let Pass { model: Model { config, ranges, ffns, ropes, .. }, args, .. } = self;
        let ranges @ LayerRanges { o, ffn, .. } = &ranges.layers[i];
        let weight = args.sparsity_weight / self.gates() as f32;
        let sparsity = SparsityGrad { weight, over: args.sparsity_over };
        let TrainWorkspace { streams, kept, of_layer, h, y: dh, dx, dbranch, dqkv, da, scratch, .. } =
            workspace;
        let LayerActs { rstd, qkv, a, lse, x_mid, rstd_mid, heads, after, ffn: saved } =
            &mut kept[of_layer[i]];
        let x = &streams[i];
        let (attention, dims) = self.dims(i);
        let (dqkv, da) = (&mut dqkv[..qkv.len()], &mut da[..a.len()]);
        let [after_attention, after_ffn] =
            after.as_ref().map_or([None, None], |acts| acts.each_ref().map(Some));
        let of = |range: &Option<Range<usize>>| range.as_ref().map(|range| params.of(range));
        // x_mid + scale norm(ffn(h))
        let norm = ranges.after_ffn.as_ref().zip(after_ffn);
        let dy = self.branch_gradient((params, &mut *grads), norm, dbranch, h, dx);
        self.restore(of(&ranges.before_ffn), h, x_mid, rstd_mid);
        ffns[i].backward(FfnBackward {
            dx: dh,
            grads: grads.of(ffn),
            dy,
            saved: saved.as_mut(),
            x: h,
            params: params.of(ffn),
            sparsity,
            training: args.gate_training(i, config.num_layers),
            scratch,
        });
        let of_norm = (params, &mut *grads);
        self.input_gradient(of_norm, ranges.before_ffn.as_ref(), [&mut *dx, &mut *dh], [x_mid, rstd_mid]);
        // x_mid = x + scale norm(a W_o^T + b)
        let norm = ranges.after_attention.as_ref().zip(after_attention);
        let dy = self.branch_gradient((params, &mut *grads), norm, dbranch, h, dx);
        linear::BackwardWeight { dw: grads.of(o), dy, x: a, dims: dims.o }.run();
        if let Some(bias) = &ranges.o_bias {
            linear::BackwardBias { db: grads.of(bias), dy, dims: dims.o }.run();
        }
        linear::BackwardInput { dx: da, dy, w: params.of(o), dims: dims.o, add: false }.run();
        attention::Backward { dqkv, dout: da, out: a, qkv, lse, dims: attention }.run();
        ropes.backward(i, dqkv, turn(attention));
        self.norm_heads_backward((params, &mut *grads), i, dqkv, heads.as_ref());
        self.restore(of(&ranges.before_attention), h, x, rstd);
        let of_qkv = ranges.qkv();
        linear::BackwardWeight { dw: grads.of(&of_qkv), dy: dqkv, x: h, dims: dims.qkv }.run();
        if let Some(bias) = &ranges.qkv_bias {
            linear::BackwardBias { db: grads.of(bias), dy: dqkv, dims: dims.qkv }.run();
        }
        let w = params.of(&of_qkv);
        linear::BackwardInput { dx: dh, dy: dqkv, w, dims: dims.qkv, add: false }.run();
        let of_norm = (params, &mut *grads);
        self.input_gradient(of_norm, ranges.before_attention.as_ref(), [&mut *dx, &mut *dh], [x, rstd]);
    }

    /// Sets `h` to what a block reads of the residual stream `x`: its norm, or `x` itself where there is none.
    fn read(self, norm: Option<&[f32]>, h: &mut [f32], rstd: &mut [f32], x: &[f32]) {
        match norm {
            Some(weight) => self.block.norm(weight, h, rstd, x),
            None => h.copy_from_slice(x),
        }
    }

    /// Sets `h` to what a block read of the residual stream `x` in the forward pass.
    fn restore(self, norm: Option<&[f32]>, h: &mut [f32], x: &[f32], rstd: &[f32]) {
        match norm {
            Some(weight) => {
                let offset = self.model.config.architecture.norm_offset;
                rms_norm::Restore { y: h, x, weight, offset, rstd }.run();
            }
            None => h.copy_from_slice(x),
        }
    }

    /// Returns what a block adds to the residual stream: its output `branch`, or the norm of it, for which `h` is used, where
    /// there is one behind the block.
    fn normed<'a>(
        self,
        after: Option<(&[f32], &mut NormActs)>,
        branch: &'a [f32],
        h: &'a mut [f32],
    ) -> &'a [f32] {
        let Some((weight, acts)) = after else { return branch };
        acts.x.copy_from_slice(branch);
        self.block.norm(weight, h, &mut acts.rstd, &acts.x);
        h
    }

    /// Adds what a block gives to the residual stream, after the norm behind the block, and sets `h` to what the next
    /// block reads, after its norm `next`, whose reciprocal deviations are `rstd`.
    fn join_and_read(
        self,
        after: Option<(&[f32], &mut NormActs)>,
        next: Option<&[f32]>,
        rstd: &mut [f32],
        join: Join<'_>,
    ) {
        let Join { x, residual, branch, h } = join;
        let scale = self.model.config.architecture.residual_scale;
        if let Some(next) = next.filter(|_| after.is_none() && scale == 1.0) {
            self.block.norm_sum(next, [h, rstd, x], [residual, branch]);
            return;
        }
        x.copy_from_slice(residual);
        add::Add { y: x, x: self.normed(after, branch, h), scale }.run();
        self.read(next, h, rstd, x);
    }

    /// Returns the gradient of what a block gives, from the gradient `dx` of the residual stream that it joined; `h` and
    /// `dbranch` are used for it. Adds the gradient of the norm behind the block.
    fn branch_gradient<'a>(
        self,
        (params, grads): (Params<'_>, &mut Grads<'_>),
        after: Option<(&Range<usize>, &NormActs)>,
        dbranch: &'a mut [f32],
        h: &mut [f32],
        dx: &'a [f32],
    ) -> &'a [f32] {
        let architecture = &self.model.config.architecture;
        let scale = architecture.residual_scale;
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
        let (dweight, weight, offset) = (grads.of(range), params.of(range), architecture.norm_offset);
        rms_norm::Backward { dx: dbranch, dweight, dy, x, weight, offset, rstd, add: false }.run();
        dbranch
    }

    /// Adds to the gradient `dx` of the residual stream `x` that of what a block read of it, `dh`.
    fn input_gradient(
        self,
        (params, grads): (Params<'_>, &mut Grads<'_>),
        norm: Option<&Range<usize>>,
        [dx, dh]: [&mut [f32]; 2],
        [x, rstd]: [&[f32]; 2],
    ) {
        let Some(range) = norm else {
            add::Add { y: dx, x: dh, scale: 1.0 }.run();
            return;
        };
        let (dweight, weight) = (grads.of(range), params.of(range));
        let offset = self.model.config.architecture.norm_offset;
        rms_norm::Backward { dx, dweight, dy: dh, x, weight, offset, rstd, add: true }.run();
    }

    /// Norms the queries and keys in `qkv`, where the family does.
    fn norm_heads(self, i: usize, params: Params<'_>, qkv: &mut [f32], acts: Option<&mut [NormActs; 2]>) {
        let Model { config, ranges, .. } = self.model;
        let (Some(ranges), Some(acts)) = (&ranges.layers[i].qk_norm, acts) else { return };
        let ([q, kv], mut first) = (config.attention_widths(i), 0);
        for ((range, acts), width) in ranges.iter().zip(acts).zip([q, kv]) {
            let weight = params.of(range);
            let (saved, rstd) = (Some(&mut acts.x[..]), &mut acts.rstd[..]);
            let heads = self.block.heads(weight, width, q + 2 * kv);
            rms_norm::ForwardHeads { x: &mut qkv[first..], saved, rstd, weight, heads }.run();
            first += width;
        }
    }

    /// Turns the gradients of normed queries and keys in `dqkv` into those before their norms.
    fn norm_heads_backward(
        self,
        (params, grads): (Params<'_>, &mut Grads<'_>),
        i: usize,
        dqkv: &mut [f32],
        acts: Option<&[NormActs; 2]>,
    ) {
        let Model { config, ranges, .. } = self.model;
        let (Some(ranges), Some(acts)) = (&ranges.layers[i].qk_norm, acts) else { return };
        let ([q, kv], mut first) = (config.attention_widths(i), 0);
        for ((range, NormActs { x, rstd }), width) in ranges.iter().zip(acts).zip([q, kv]) {
            let (weight, dweight) = (params.of(range), grads.of(range));
            let heads = self.block.heads(weight, width, q + 2 * kv);
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
