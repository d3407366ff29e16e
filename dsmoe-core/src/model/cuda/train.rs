//! Training on a GPU: the arenas, the activations, and the step of `model/step.rs`, op by op on the device.
//!
//! Products round their operands to bf16 and sum in f32. The residual stream and its gradient, norms, routers, softmax,
//! parameter gradients and the optimiser are f32. Micro-batches are only queued; what a step showed is read back once.

use std::ops::Range;

use dsmoe_kernels::adamw;
use dsmoe_kernels::cuda::ops::{
    attention, cross_entropy, elementwise, embedding, optim, rms_norm, rope, router,
};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Recorded};
use dsmoe_router::{RoutingStats, SparsityOver};
use half::bf16;

use super::ffn::{Acts, Scratch, Weights};
use super::{Products, attention_dims, rope_rows};
use crate::config::Config;
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::masks::Masks;
use crate::model::arena::Model;
use crate::model::tensors::{LayerRanges, Ranges, check_input, ffns_of, lay_out, set_threshold};
use crate::model::train::StepArgs;
use crate::params::Layout;

/// Logits at a time in the loss, bytes.
const LOGIT_BYTES: usize = 512 << 20;

/// A model in training on a GPU: parameters, gradients, moments and activations.
#[derive(Debug)]
pub struct CudaTrainer {
    gpu: Gpu,
    config: Config,
    layout: Layout,
    ranges: Ranges,
    ffns: Vec<DeviceFfn>,
    params: GpuBuf<f32>,
    /// The parameters rounded, for products.
    weights: GpuBuf<bf16>,
    grads: GpuBuf<f32>,
    m: GpuBuf<f32>,
    v: GpuBuf<f32>,
    /// 1 where a parameter is kept, 0 where it is pruned.
    keep: Option<GpuBuf<u8>>,
    acts: Activations,
    report: Report,
    /// What gates of the host add to the loss in this step.
    balance_loss: f64,
    /// What every gate that counts adds to the sparsity loss.
    sparsity_weight: GpuBuf<f32>,
    /// The ops of a micro-batch.
    recorded: Recorded<()>,
    recorded_for: Option<Recording>,
}

/// What the ops of a micro-batch depend on and is no number on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Recording {
    seq: usize,
    loss_scale: f32,
    sparsity_over: SparsityOver,
}

/// What a micro-batch keeps and works in.
#[derive(Debug)]
struct Activations {
    tokens: usize,
    ids: GpuBuf<u32>,
    targets: GpuBuf<u32>,
    occurrences: embedding::Occurrences,
    rope: GpuBuf<f32>,
    layers: Vec<LayerActs>,
    x: GpuBuf<f32>,
    rstd: GpuBuf<f32>,
    h: GpuBuf<bf16>,
    /// A block's output, f32; on the way back the gradient of a block's input.
    y: GpuBuf<f32>,
    dx: GpuBuf<f32>,
    /// The gradient of a block's output, rounded.
    dy: GpuBuf<bf16>,
    dqkv: GpuBuf<bf16>,
    da: GpuBuf<bf16>,
    attention: GpuBuf<f32>,
    ffn: Scratch,
    partials: GpuBuf<f32>,
    sums: GpuBuf<f64>,
    losses: GpuBuf<f32>,
    logits: GpuBuf<f32>,
    dlogits: GpuBuf<bf16>,
}

#[derive(Debug)]
struct LayerActs {
    x: GpuBuf<f32>,
    rstd: GpuBuf<f32>,
    qkv: GpuBuf<bf16>,
    a: GpuBuf<bf16>,
    lse: GpuBuf<f32>,
    x_mid: GpuBuf<f32>,
    rstd_mid: GpuBuf<f32>,
    ffn: Acts,
}

/// What the micro-batches of a step add up on the device, and its copy on the host.
#[derive(Debug)]
struct Report {
    /// `[loss, squares of all gradients, squares of routers' gradients]`.
    sums: GpuBuf<f64>,
    /// Per layer `[sum of active gates, sum of all gates]`.
    gates: GpuBuf<f64>,
    /// Per layer the load `[n]` and the histogram `[n + 1]`.
    counts: GpuBuf<u64>,
    scale: GpuBuf<f32>,
}

/// What the micro-batches of a step showed.
#[derive(Clone, Debug)]
pub struct CudaStep {
    /// Sum of the token losses, nats.
    pub loss: f64,
    /// Sum over layers, tokens and experts of the gates of active experts.
    pub active_gates: f64,
    /// The same of all gates.
    pub all_gates: f64,
    /// Squares of all gradients.
    pub squares: f64,
    /// Squares of the routers' gradients.
    pub router_squares: f64,
    /// What the layers add to the loss so that experts are used evenly, summed; scaled and weighted.
    pub balance_loss: f64,
}

/// One use of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// What for.
    pub what: &'static str,
    /// How much.
    pub bytes: usize,
}

impl CudaTrainer {
    /// What training a model of `config` on micro-batches of `tokens` tokens takes on the device.
    ///
    /// # Errors
    /// The model's FFNs do not run on a GPU.
    pub fn memory(config: &Config, tokens: usize) -> Result<Vec<MemoryUse>> {
        let all = ffns_of(config);
        let ffns = super::device_ffns(&all)?;
        let params = lay_out(config, &all).0.len();
        let per_layer = config.layers().zip(&ffns).map(|(shape, ffn)| {
            let width = shape.num_heads * config.head_dim;
            let joined = width + 2 * shape.num_kv_heads * config.head_dim;
            tokens * (8 * config.hidden + 2 * joined + 2 * width + 4 * shape.num_heads + 8)
                + Acts::bytes(ffn, tokens)
        });
        let joined = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        let widest = ffns.iter().map(|ffn| Scratch::bytes(ffn, tokens)).max().unwrap_or(0);
        let rows = logit_rows(config, tokens);
        let shared = tokens * (4 * 3 * config.hidden + 2 * 2 * config.hidden + 2 * 2 * joined)
            + widest
            + rows * config.vocab_size * 6;
        Ok(vec![
            MemoryUse { what: "  parameters", bytes: 4 * params },
            MemoryUse { what: "  parameters in bf16", bytes: 2 * params },
            MemoryUse { what: "  gradients", bytes: 4 * params },
            MemoryUse { what: "  optimiser moments", bytes: 8 * params },
            MemoryUse { what: "  activations", bytes: per_layer.sum() },
            MemoryUse { what: "  work space", bytes: shared },
        ])
    }

    /// Moves `model` with its optimiser's moments (laid out as its parameters) to device `ordinal`, with room for
    /// micro-batches of `tokens` tokens in sequences of `seq`.
    ///
    /// # Errors
    /// The model's FFNs do not run on a GPU, or its memory does not suffice.
    pub fn new(
        ordinal: usize,
        model: &Model,
        m: &[f32],
        v: &[f32],
        tokens: usize,
        seq: usize,
    ) -> Result<CudaTrainer> {
        let gpu = &Gpu::open(ordinal)?;
        let plan = CudaTrainer::memory(&model.config, tokens)?;
        let help = "use a smaller {batch} and a larger {accumulate}".into();
        super::check_memory(gpu, &plan, help)?;
        let (config, layout) = (model.config.clone(), model.layout.clone());
        let ffns = super::device_ffns(&model.ffns)?;
        let params = gpu.upload(&model.params)?;
        let mut weights = gpu.zeros(layout.len())?;
        elementwise::cast(gpu, weights.view_mut(), params.view())?;
        let keep = model.masks.as_ref().map(|masks| gpu.upload(&kept(masks, &layout))).transpose()?;
        let acts = Activations::new(gpu, model, &ffns, tokens, seq)?;
        let report = Report::new(gpu, &ffns)?;
        Ok(CudaTrainer {
            gpu: gpu.clone(),
            ranges: model.ranges.clone(),
            grads: gpu.zeros(layout.len())?,
            m: gpu.upload(m)?,
            v: gpu.upload(v)?,
            config,
            layout,
            ffns,
            params,
            weights,
            keep,
            acts,
            report,
            balance_loss: 0.0,
            sparsity_weight: gpu.zeros(1)?,
            recorded: Recorded::new(()),
            recorded_for: None,
        })
    }

    /// Moves the gates' threshold of every layer.
    ///
    /// # Errors
    /// The threshold is outside 0..=1, or the model has no gates.
    pub fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        // Thresholds are arguments of what was recorded.
        self.recorded.forget();
        let ffns = &mut self.ffns;
        set_threshold(&mut self.config, threshold, || ffns.iter_mut().all(|ffn| ffn.set_threshold(threshold)))
    }

    /// Starts a step: gradients and sums are zero.
    ///
    /// # Errors
    /// The device fails.
    pub fn begin(&mut self) -> Result<()> {
        self.balance_loss = 0.0;
        self.grads.fill_zero()?;
        self.report.sums.fill_zero()?;
        self.report.gates.fill_zero()?;
        Ok(self.report.counts.fill_zero()?)
    }

    /// Queues the forward and backward pass of a micro-batch, or runs it where gates are the host's; as
    /// [`Model::train_step`], adding to the gradients and to what [`CudaTrainer::finish`] gives.
    ///
    /// # Errors
    /// A token id outside the vocabulary, more positions than the model has, or the device fails.
    ///
    /// # Panics
    /// There are not as many inputs and targets as the activations have room for, or they are no multiple of `seq`.
    pub fn micro_batch(
        &mut self,
        inputs: &[u32],
        targets: &[u32],
        seq: usize,
        args: &StepArgs,
    ) -> Result<()> {
        assert!(
            inputs.len() == self.acts.tokens
                && targets.len() == inputs.len()
                && inputs.len().is_multiple_of(seq),
            "micro_batch: {} inputs, {} targets, seq {seq}, room for {}",
            inputs.len(),
            targets.len(),
            self.acts.tokens
        );
        check_input(&self.config, inputs, 0, seq)?;
        self.acts.ids.upload_from(inputs)?;
        self.acts.targets.upload_from(targets)?;
        self.acts.occurrences.update(inputs)?;
        let n = self.ffns.first().and_then(DeviceFfn::num_experts).unwrap_or(1);
        let gates = self.config.num_layers * inputs.len() * n;
        self.sparsity_weight.upload_from(&[args.sparsity_weight / gates as f32])?;
        let made_for = Recording { seq, loss_scale: args.loss_scale, sparsity_over: args.sparsity_over };
        if self.recorded_for != Some(made_for) {
            self.recorded.forget();
            self.recorded_for = Some(made_for);
        }
        let (gpu, mut recorded) = (self.gpu.clone(), std::mem::take(&mut self.recorded));
        let hosted = self.ffns.iter().any(DeviceFfn::is_hosted);
        let mut pass = |_: &mut ()| {
            self.forward(seq, args)?;
            self.loss(args.loss_scale)?;
            self.backward(seq, args)
        };
        // Ops between which the host computes are no graph.
        let done = if hosted { pass(&mut ()) } else { recorded.run(&gpu, pass) };
        self.recorded = recorded;
        done
    }

    /// Whether the next micro-batch with the same settings is the replay of a CUDA graph: from the second on, unless gates
    /// are the host's.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_recorded()
    }

    /// Waits for the micro-batches of the step; returns what they showed, and adds their routing to `stats`.
    ///
    /// # Errors
    /// The device fails.
    pub fn finish(&mut self, stats: Option<&mut RoutingStats>) -> Result<CudaStep> {
        if let Some(keep) = &self.keep {
            elementwise::keep(&self.gpu, self.grads.view_mut(), keep.view())?;
        }
        self.squares()?;
        let sums = self.report.sums.download()?;
        let gates = self.report.gates.download()?;
        if let Some(stats) = stats {
            let counts = self.report.counts.download()?;
            let n = stats.num_experts();
            for (layer, counts) in counts.chunks_exact(2 * n + 1).enumerate() {
                stats.add_counts(layer, &counts[..n], &counts[n..]);
            }
        }
        let total = |which: usize| gates.chunks_exact(2).map(|pair| pair[which]).sum();
        Ok(CudaStep {
            loss: sums[0],
            active_gates: total(0),
            all_gates: total(1),
            squares: sums[1],
            router_squares: sums[2],
            balance_loss: self.balance_loss,
        })
    }

    /// Updates the parameters from `scale` times the gradients; `hyper` says how, by whether a tensor decays and
    /// whether it is a router's.
    ///
    /// # Errors
    /// The device fails.
    pub fn update(&mut self, scale: f32, hyper: impl Fn(bool, bool) -> adamw::Hyper) -> Result<()> {
        self.report.scale.upload_from(&[scale])?;
        for (decay, is_router, range) in runs(&self.layout) {
            optim::adamw(
                &self.gpu,
                self.params.slice_mut(range.clone()),
                self.weights.slice_mut(range.clone()),
                self.m.slice_mut(range.clone()),
                self.v.slice_mut(range.clone()),
                self.grads.slice(range),
                self.report.scale.view(),
                &hyper(decay, is_router),
            )?;
        }
        let Some(keep) = &self.keep else { return Ok(()) };
        elementwise::keep(&self.gpu, self.params.view_mut(), keep.view())?;
        Ok(elementwise::cast(&self.gpu, self.weights.view_mut(), self.params.view())?)
    }

    /// Copies the parameters to `model`.
    ///
    /// # Errors
    /// The device fails.
    pub fn download(&self, model: &mut Model) -> Result<()> {
        Ok(self.params.download_to(&mut model.params)?)
    }

    /// Copies the moments.
    ///
    /// # Errors
    /// The device fails.
    pub fn download_moments(&self, m: &mut [f32], v: &mut [f32]) -> Result<()> {
        self.m.download_to(m)?;
        Ok(self.v.download_to(v)?)
    }

    /// A copy of the gradients.
    ///
    /// # Errors
    /// The device fails.
    pub fn download_grads(&self) -> Result<Vec<f32>> {
        Ok(self.grads.download()?)
    }

    /// Where the last micro-batch's forward pass first left the finite numbers.
    ///
    /// # Errors
    /// The device fails.
    pub fn first_non_finite(&self) -> Result<String> {
        let bad = |buf: &GpuBuf<f32>| -> Result<bool> { Ok(buf.download()?.iter().any(|x| !x.is_finite())) };
        for (i, layer) in self.acts.layers.iter().enumerate() {
            if bad(&layer.x)? {
                return Ok(if i == 0 { "embedding".to_owned() } else { format!("layer {} ffn", i - 1) });
            }
            if bad(&layer.x_mid)? {
                return Ok(format!("layer {i} attention"));
            }
        }
        Ok(match bad(&self.acts.x)? {
            true => format!("layer {} ffn", self.acts.layers.len() - 1),
            false => "head".to_owned(),
        })
    }

    fn squares(&mut self) -> Result<()> {
        let Report { sums, .. } = &mut self.report;
        for (_, is_router, range) in runs(&self.layout) {
            let grads = self.grads.slice(range);
            optim::add_sum_of_squares(&self.gpu, sums.slice_mut(1..2), grads, self.acts.sums.view_mut())?;
            if is_router {
                optim::add_sum_of_squares(&self.gpu, sums.slice_mut(2..3), grads, self.acts.sums.view_mut())?;
            }
        }
        Ok(())
    }

    fn forward(&mut self, seq: usize, args: &StepArgs) -> Result<()> {
        let (gpu, config) = (&self.gpu, &self.config);
        let (hidden, eps) = (config.hidden, config.rms_norm_eps as f32);
        let Activations {
            tokens,
            ids,
            rope: angles,
            layers,
            x: x_last,
            rstd: rstd_last,
            h,
            y,
            ffn: scratch,
            ..
        } = &mut self.acts;
        let tokens = *tokens;
        let first =
            layers.first_mut().map_or((&mut *x_last, &mut *rstd_last), |acts| (&mut acts.x, &mut acts.rstd));
        embedding::forward(
            gpu,
            first.0.view_mut(),
            self.params.slice(self.ranges.embed.clone()),
            ids.view(),
            hidden,
        )?;
        let norm = self.ranges.layers.first().map_or(&self.ranges.norm, |ranges| &ranges.input_norm);
        let weight = self.params.slice(norm.clone());
        rms_norm::forward(gpu, h.view_mut(), first.1.view_mut(), first.0.view(), weight, eps, hidden)?;
        let products = Products { gpu, tokens };
        for (i, ranges) in self.ranges.layers.iter().enumerate() {
            let (done, after) = layers.split_at_mut(i + 1);
            let acts = &mut done[i];
            let dims = attention_dims(config, i, tokens / seq, seq, seq);
            let width = dims.heads * dims.head_dim;
            products.forward(
                acts.qkv.view_mut(),
                h.view(),
                self.weights.slice(ranges.qkv()),
                hidden,
                dims.joined_width(),
            )?;
            rope::forward(gpu, acts.qkv.view_mut(), angles.view(), rope_dims(dims, tokens))?;
            attention::forward(gpu, acts.a.view_mut(), acts.lse.view_mut(), acts.qkv.view(), dims)?;
            let o = self.weights.slice(ranges.o.clone());
            products.forward_f32(y.view_mut(), acts.a.view(), o, width, hidden)?;
            let weight = self.params.slice(ranges.post_norm.clone());
            rms_norm::forward_sum(
                gpu,
                h.view_mut(),
                acts.rstd_mid.view_mut(),
                acts.x_mid.view_mut(),
                acts.x.view(),
                y.view(),
                weight,
                eps,
                hidden,
            )?;
            let weights = Weights {
                kind: &self.ffns[i],
                master: self.params.slice(ranges.ffn.clone()),
                rounded: self.weights.slice(ranges.ffn.clone()),
            };
            let normed = router::Normed { x: acts.x_mid.view(), rstd: acts.rstd_mid.view(), weight };
            weights.forward_train(
                &products,
                y.view_mut(),
                &mut acts.ffn,
                h.view(),
                normed,
                args.gate_training(i),
                scratch,
            )?;
            self.report.add(gpu, &self.ffns[i], i, &acts.ffn)?;
            self.balance_loss += acts.ffn.balance_loss();
            let (x, rstd, norm) = match (after.first_mut(), self.ranges.layers.get(i + 1)) {
                (Some(acts), Some(ranges)) => (&mut acts.x, &mut acts.rstd, &ranges.input_norm),
                _ => (&mut *x_last, &mut *rstd_last, &self.ranges.norm),
            };
            rms_norm::forward_sum(
                gpu,
                h.view_mut(),
                rstd.view_mut(),
                x.view_mut(),
                done[i].x_mid.view(),
                y.view(),
                self.params.slice(norm.clone()),
                eps,
                hidden,
            )?;
        }
        Ok(())
    }

    /// Token losses and the gradient of the last norm's output, in chunks of logits.
    fn loss(&mut self, scale: f32) -> Result<()> {
        let (gpu, hidden, vocab) = (&self.gpu, self.config.hidden, self.config.vocab_size);
        let Activations { tokens, targets, h, y: dh, losses, logits, dlogits, sums, .. } = &mut self.acts;
        let head = self.weights.slice(self.ranges.head.clone());
        let rows = logit_rows(&self.config, *tokens);
        for first in (0..*tokens).step_by(rows.max(1)) {
            let chunk = first..(first + rows).min(*tokens);
            let products = Products { gpu, tokens: chunk.len() };
            let (z, dz) = (0..chunk.len() * vocab, 0..chunk.len() * vocab);
            let states = h.slice(chunk.start * hidden..chunk.end * hidden);
            products.forward_f32(logits.slice_mut(z.clone()), states, head, hidden, vocab)?;
            cross_entropy::chunk(
                gpu,
                losses.slice_mut(chunk.clone()),
                dlogits.slice_mut(dz.clone()),
                logits.slice(z),
                targets.slice(chunk.clone()),
                scale,
                vocab,
            )?;
            let dz = dlogits.slice(dz);
            let dh = dh.slice_mut(chunk.start * hidden..chunk.end * hidden);
            products.backward_input(dh, dz, head, hidden, vocab)?;
            products.backward_weight(
                self.grads.slice_mut(self.ranges.head.clone()),
                dz,
                states,
                hidden,
                vocab,
            )?;
        }
        Ok(optim::add_sum(gpu, self.report.sums.slice_mut(0..1), losses.view(), sums.view_mut())?)
    }

    fn backward(&mut self, seq: usize, args: &StepArgs) -> Result<()> {
        let (gpu, config) = (&self.gpu, &self.config);
        let hidden = config.hidden;
        let Activations {
            tokens,
            occurrences,
            layers,
            rope: angles,
            x,
            rstd,
            h,
            y: dh,
            dx,
            dy,
            dqkv,
            da,
            attention: work,
            ffn: scratch,
            partials,
            ..
        } = &mut self.acts;
        let tokens = *tokens;
        let sparsity = router::Sparsity {
            weight: self.sparsity_weight.view(),
            all: args.sparsity_over == SparsityOver::All,
        };
        let products = Products { gpu, tokens };
        let norm = &self.ranges.norm;
        rms_norm::backward(
            gpu,
            dx.view_mut(),
            self.grads.slice_mut(norm.clone()),
            dh.view(),
            x.view(),
            self.params.slice(norm.clone()),
            rstd.view(),
            hidden,
            partials.view_mut(),
            false,
        )?;
        for (i, (ranges, acts)) in self.ranges.layers.iter().zip(layers).enumerate().rev() {
            let LayerRanges { input_norm, o, post_norm, .. } = ranges;
            let dims = attention_dims(config, i, tokens / seq, seq, seq);
            let (width, joined) = (dims.heads * dims.head_dim, dims.joined_width());
            let mut dqkv = dqkv.slice_mut(0..tokens * joined);
            let mut da = da.slice_mut(0..tokens * width);
            // x_mid + ffn(h)
            let weight = self.params.slice(post_norm.clone());
            rms_norm::restore(gpu, h.view_mut(), acts.x_mid.view(), weight, acts.rstd_mid.view(), hidden)?;
            elementwise::cast(gpu, dy.view_mut(), dx.view())?;
            let weights = Weights {
                kind: &self.ffns[i],
                master: self.params.slice(ranges.ffn.clone()),
                rounded: self.weights.slice(ranges.ffn.clone()),
            };
            let normed = router::Normed { x: acts.x_mid.view(), rstd: acts.rstd_mid.view(), weight };
            weights.backward(
                &products,
                dh.view_mut(),
                self.grads.slice_mut(ranges.ffn.clone()),
                dy.view(),
                &acts.ffn,
                h.view(),
                normed,
                sparsity,
                args.gate_training(i),
                scratch,
            )?;
            rms_norm::backward(
                gpu,
                dx.view_mut(),
                self.grads.slice_mut(post_norm.clone()),
                dh.view(),
                acts.x_mid.view(),
                weight,
                acts.rstd_mid.view(),
                hidden,
                partials.view_mut(),
                true,
            )?;
            // x_mid = x + a W_o^T
            elementwise::cast(gpu, dy.view_mut(), dx.view())?;
            products.backward_weight(
                self.grads.slice_mut(o.clone()),
                dy.view(),
                acts.a.view(),
                width,
                hidden,
            )?;
            products.backward_input_bf16(
                da.reborrow(),
                dy.view(),
                self.weights.slice(o.clone()),
                width,
                hidden,
            )?;
            attention::backward(
                gpu,
                dqkv.reborrow(),
                da.as_view(),
                acts.a.view(),
                acts.qkv.view(),
                acts.lse.view(),
                dims,
                work.view_mut(),
            )?;
            rope::backward(gpu, dqkv.reborrow(), angles.view(), rope_dims(dims, tokens))?;
            let weight = self.params.slice(input_norm.clone());
            rms_norm::restore(gpu, h.view_mut(), acts.x.view(), weight, acts.rstd.view(), hidden)?;
            let qkv = ranges.qkv();
            products.backward_weight(
                self.grads.slice_mut(qkv.clone()),
                dqkv.as_view(),
                h.view(),
                hidden,
                joined,
            )?;
            products.backward_input(
                dh.view_mut(),
                dqkv.as_view(),
                self.weights.slice(qkv),
                hidden,
                joined,
            )?;
            rms_norm::backward(
                gpu,
                dx.view_mut(),
                self.grads.slice_mut(input_norm.clone()),
                dh.view(),
                acts.x.view(),
                weight,
                acts.rstd.view(),
                hidden,
                partials.view_mut(),
                true,
            )?;
        }
        let table = self.grads.slice_mut(self.ranges.embed.clone());
        Ok(embedding::backward(gpu, table, dx.view(), occurrences, hidden)?)
    }
}

impl Activations {
    fn new(gpu: &Gpu, model: &Model, ffns: &[DeviceFfn], tokens: usize, seq: usize) -> Result<Activations> {
        let config = &model.config;
        let hidden = config.hidden;
        let mut layers = Vec::with_capacity(config.num_layers);
        for (shape, ffn) in config.layers().zip(ffns) {
            let width = shape.num_heads * config.head_dim;
            let joined = width + 2 * shape.num_kv_heads * config.head_dim;
            layers.push(LayerActs {
                x: gpu.zeros(tokens * hidden)?,
                rstd: gpu.zeros(tokens)?,
                qkv: gpu.zeros(tokens * joined)?,
                a: gpu.zeros(tokens * width)?,
                lse: gpu.zeros(tokens * shape.num_heads)?,
                x_mid: gpu.zeros(tokens * hidden)?,
                rstd_mid: gpu.zeros(tokens)?,
                ffn: Acts::new(gpu, ffn, tokens)?,
            });
        }
        let width = config.num_heads * config.head_dim;
        let joined = width + 2 * config.num_kv_heads * config.head_dim;
        let logits = logit_rows(config, tokens) * config.vocab_size;
        let widest = attention_dims(config, 0, tokens / seq, seq, seq);
        let work = (0..config.num_layers)
            .map(|i| attention::backward_scratch(attention_dims(config, i, tokens / seq, seq, seq)))
            .max()
            .unwrap_or_else(|| attention::backward_scratch(widest));
        Ok(Activations {
            tokens,
            ids: gpu.zeros(tokens)?,
            targets: gpu.zeros(tokens)?,
            occurrences: embedding::Occurrences::with_room(gpu, tokens)?,
            rope: gpu.upload(&rope_rows(config, seq))?,
            layers,
            x: gpu.zeros(tokens * hidden)?,
            rstd: gpu.zeros(tokens)?,
            h: gpu.zeros(tokens * hidden)?,
            y: gpu.zeros(tokens * hidden)?,
            dx: gpu.zeros(tokens * hidden)?,
            dy: gpu.zeros(tokens * hidden)?,
            dqkv: gpu.zeros(tokens * joined)?,
            da: gpu.zeros(tokens * width)?,
            attention: gpu.zeros(work)?,
            ffn: Scratch::new(gpu, ffns, tokens)?,
            partials: gpu.zeros(rms_norm::partials_len(tokens, hidden))?,
            sums: gpu.zeros(optim::PARTIALS)?,
            losses: gpu.zeros(tokens)?,
            logits: gpu.zeros(logits)?,
            dlogits: gpu.zeros(logits)?,
        })
    }
}

impl Report {
    fn new(gpu: &Gpu, ffns: &[DeviceFfn]) -> Result<Report> {
        let n = ffns.first().and_then(DeviceFfn::num_experts);
        let per_layer = n.map_or(0, |n| 2 * n + 1);
        Ok(Report {
            sums: gpu.zeros(3)?,
            gates: gpu.zeros(2 * ffns.len())?,
            counts: gpu.zeros(per_layer * ffns.len())?,
            scale: gpu.zeros(1)?,
        })
    }

    /// Counts the routing of layer `i`.
    fn add(&mut self, gpu: &Gpu, ffn: &DeviceFfn, i: usize, acts: &Acts) -> Result<()> {
        let (Some(n), Some(routed)) = (ffn.num_experts(), acts.routed()) else { return Ok(()) };
        let counts = self.counts.slice_mut(i * (2 * n + 1)..(i + 1) * (2 * n + 1));
        Ok(router::stats(gpu, counts, self.gates.slice_mut(2 * i..2 * i + 2), None, routed)?)
    }
}

fn rope_dims(dims: dsmoe_kernels::attention::Dims, tokens: usize) -> rope::Dims {
    rope::Dims {
        tokens,
        seq: dims.queries,
        start: 0,
        heads: dims.heads + dims.kv_heads,
        head_dim: dims.head_dim,
        width: dims.joined_width(),
    }
}

/// Rows of logits at a time.
fn logit_rows(config: &Config, tokens: usize) -> usize {
    (LOGIT_BYTES / (6 * config.vocab_size)).clamp(1, tokens.max(1))
}

/// Neighbours in the layout that are treated alike, as one: whether they decay, whether they are routers, and where.
fn runs(layout: &Layout) -> impl Iterator<Item = (bool, bool, Range<usize>)> + use<> {
    let runs: Vec<_> = layout
        .entries()
        .chunk_by(|a, b| (a.spec.decay, a.spec.router) == (b.spec.decay, b.spec.router))
        .map(|run| (run[0].spec.decay, run[0].spec.router, run[0].range.start..run[run.len() - 1].range.end))
        .collect();
    runs.into_iter()
}

/// Which parameters `masks` keep.
fn kept(masks: &Masks, layout: &Layout) -> Vec<u8> {
    let mut ones = vec![1.0; layout.len()];
    masks.apply(&mut ones, layout);
    ones.into_iter().map(|x| u8::from(x != 0.0)).collect()
}
