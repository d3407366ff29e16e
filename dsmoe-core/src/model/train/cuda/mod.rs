//! Training on a GPU: parameters, gradients, moments and activations lie on the device, and each op of `train/cpu.rs` has its
//! counterpart there.
//!
//! Products round their operands to bf16 and sum in f32. The residual stream and its gradient, norms, routers, softmax,
//! parameter gradients and the optimiser are f32. Micro-batches are only queued; the results of a step are read back once.

mod acts;
mod ffn;
mod passes;

use std::ops::Range;

use dsmoe_kernels::adamw;
use dsmoe_kernels::cuda::ops::choice::ExpertKernels;
use dsmoe_kernels::cuda::ops::elementwise::{Cast, Keep};
use dsmoe_kernels::cuda::ops::optim::{AdamW, AddSum};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Matrix, Recorded};
use dsmoe_router::counts::BINS;
use dsmoe_router::{LogitCounts, RoutingStats, SparsityOver};
use half::bf16;

use self::acts::{Activations, Report};
use super::StepArgs;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ffn::DeviceFfn;
use crate::masks::Masks;
use crate::model::arena::Model;
use crate::model::gpu::{check_memory, device_ffns, most_experts, move_thresholds, thresholds};
use crate::model::memory::MemoryUse;
use crate::model::tensors::{Ranges, check_input, ffns_of, lay_out, set_threshold, set_thresholds};
use crate::params::Layout;

/// A model in training on a GPU: parameters, gradients, moments and activations.
///
/// ```no_run
/// use dsmoe_core::Model;
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::StepArgs;
/// use dsmoe_core::model::cuda::{CudaStep, CudaTrainer};
///
/// let model = Model::new(preset("tiny")?);
/// let moments = vec![0.0; model.params().len()];
/// let mut trainer = CudaTrainer::new(0, &model, &moments, &moments, 4, 4)?;
/// trainer.begin()?;
/// let args = StepArgs { loss_scale: 0.25, ..StepArgs::default() };
/// trainer.micro_batch(&[1, 5, 9, 2], &[5, 9, 2, 7], 4, &args)?;
/// let CudaStep { loss, .. } = trainer.finish(None)?;
/// println!("loss {loss}");
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
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
    /// The terms that gates of the host add to the loss in this step.
    balance_loss: f64,
    /// The amount that every gate that counts adds to the sparsity loss, in a layer where all experts have gates.
    sparsity_weight: GpuBuf<f32>,
    /// The thresholds of each layer's logits, and the logits at which a gate is a half: `[layers, 2]`.
    thresholds: GpuBuf<f32>,
    /// Per layer the counts of the last micro-batch's logits, where they are wanted.
    bins: Option<GpuBuf<u64>>,
    /// No micro-batch of this step has run.
    first: bool,
    /// The ops of a micro-batch that adds to all gradients, and of one that sets some.
    recorded: [Recorded<()>; 2],
    recorded_for: Option<Recording>,
}

/// The settings that the ops of a micro-batch depend on and that are not values on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Recording {
    seq: usize,
    loss_scale: f32,
    sparsity_over: SparsityOver,
}

/// The results of a step's micro-batches.
///
/// ```no_run
/// use dsmoe_core::model::StepArgs;
/// use dsmoe_core::model::cuda::{CudaStep, CudaTrainer};
///
/// fn step(trainer: &mut CudaTrainer, micro_batches: &[[Vec<u32>; 2]], seq: usize) -> dsmoe_core::Result<f64> {
///     trainer.begin()?;
///     for [inputs, targets] in micro_batches {
///         trainer.micro_batch(inputs, targets, seq, &StepArgs::default())?;
///     }
///     // The work of all micro-batches was only queued; this waits for it.
///     let CudaStep { loss, squares, .. } = trainer.finish(None)?;
///     println!("gradient norm {}", squares.sqrt());
///     Ok(loss)
/// }
/// ```
#[derive(Clone, Debug)]
pub struct CudaStep {
    /// Sum of the token losses, nats.
    pub loss: f64,
    /// Sum over layers and tokens of the mean over a layer's gates, where those of inactive experts are 0.
    pub active_gates: f64,
    /// Sum over layers and tokens of the mean over a layer's gates.
    pub all_gates: f64,
    /// Sum of the squares of all gradients.
    pub squares: f64,
    /// Sum of the squares of the routers' gradients.
    pub router_squares: f64,
    /// Sum of the load-balancing losses of the layers, scaled and weighted.
    pub balance_loss: f64,
}

impl CudaTrainer {
    /// Returns the device memory that training a model of `config` on micro-batches of `tokens` tokens takes.
    ///
    /// # Errors
    /// The model's FFNs do not run on a GPU, or [`ExpertKernels::VARIABLE`] names no kernels.
    pub fn memory(config: &Config, tokens: usize) -> Result<Vec<MemoryUse>> {
        let all = ffns_of(config);
        let ffns = device_ffns(config, &all)?;
        let params = lay_out(config, &all).0.len();
        let kernels = ExpertKernels::from_env()?;
        let [activations, shared] = acts::bytes(config, &ffns, tokens, kernels);
        Ok(vec![
            MemoryUse { what: "  parameters", bytes: 4 * params },
            MemoryUse { what: "  parameters in bf16", bytes: 2 * params },
            MemoryUse { what: "  gradients", bytes: 4 * params },
            MemoryUse { what: "  optimiser moments", bytes: 8 * params },
            MemoryUse { what: "  activations", bytes: activations },
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
        let (config, layout) = (model.config.clone(), model.layout.clone());
        let ffns = device_ffns(&config, &model.ffns)?;
        let plan = CudaTrainer::memory(&config, tokens)?;
        let gpu = &Gpu::open(ordinal)?;
        check_memory(gpu, &plan, "use a smaller {batch} and a larger {accumulate}")?;
        let params = gpu.upload(&model.params)?;
        let mut weights = gpu.zeros(layout.len())?;
        Cast { out: &mut weights, x: &params }.run()?;
        let keep = model.masks.as_ref().map(|masks| gpu.upload(&kept(masks, &layout))).transpose()?;
        Ok(CudaTrainer {
            gpu: gpu.clone(),
            ranges: model.ranges.clone(),
            acts: Activations::new(gpu, &config, &ffns, tokens, seq)?,
            report: Report::new(gpu, &ffns)?,
            thresholds: thresholds(gpu, ffns.iter())?,
            bins: None,
            grads: gpu.zeros(layout.len())?,
            m: gpu.upload(m)?,
            v: gpu.upload(v)?,
            config,
            layout,
            ffns,
            params,
            weights,
            keep,
            balance_loss: 0.0,
            sparsity_weight: gpu.zeros(1)?,
            first: false,
            recorded: [(); 2].map(Recorded::new),
            recorded_for: None,
        })
    }

    /// Moves the gates' threshold of every layer.
    ///
    /// # Errors
    /// The threshold is outside 0..=1, or the model has no gates.
    pub fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        let ffns = &mut self.ffns;
        set_threshold(&mut self.config, threshold, || {
            ffns.iter_mut().all(|ffn| ffn.set_threshold(threshold))
        })?;
        move_thresholds(&mut self.thresholds, self.ffns.iter())
    }

    /// Sets what the logits of each layer's gates have to exceed, as [`Model::set_thresholds`].
    ///
    /// # Errors
    /// The model has no gates, or the device fails.
    ///
    /// # Panics
    /// There are not as many thresholds as layers.
    pub fn set_thresholds(&mut self, logits: &[f32]) -> Result<()> {
        assert_eq!(logits.len(), self.ffns.len(), "trainer: thresholds and layers");
        set_thresholds(logits, |layer, logit| self.ffns[layer].set_threshold_logit(logit))?;
        move_thresholds(&mut self.thresholds, self.ffns.iter())
    }

    /// Counts the router logits of all further micro-batches, for [`CudaTrainer::logits`].
    ///
    /// # Errors
    /// The memory does not suffice.
    pub fn count_logits(&mut self) -> Result<()> {
        self.forget();
        self.bins = Some(self.gpu.zero_rows(self.ffns.len(), BINS)?);
        Ok(())
    }

    /// Waits for the last micro-batch, and sets `counts` to its router logits; to none unless they are counted.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The counts are of another number of layers.
    pub fn logits(&self, counts: &mut LogitCounts) -> Result<()> {
        counts.clear();
        let Some(bins) = &self.bins else { return Ok(()) };
        for (i, (bins, ffn)) in bins.download()?.chunks_exact(BINS).zip(&self.ffns).enumerate() {
            counts.add_counts(i, (ffn.core() * self.acts.tokens()) as u64, bins);
        }
        Ok(())
    }

    /// Starts a step: sets gradients and sums to zero.
    ///
    /// # Errors
    /// The device fails.
    pub fn begin(&mut self) -> Result<()> {
        self.balance_loss = 0.0;
        self.first = true;
        // The first micro-batch sets the others.
        let mut start = 0;
        for range in self.set_by_first() {
            self.grads.part_mut(start..range.start).fill_zero()?;
            start = range.end;
        }
        self.grads.part_mut(start..self.layout.len()).fill_zero()?;
        self.report.clear()
    }

    /// Returns the ranges of gradients, in order, that the first micro-batch of a step sets: those of weights whose products run
    /// over slots.
    fn set_by_first(&self) -> Vec<Range<usize>> {
        let layers = self.ranges.layers.iter().zip(&self.ffns).zip(&self.acts.layers);
        let set = layers.filter(|(_, acts)| acts.ffn.sets()).flat_map(|((layer, ffn), _)| {
            let [gate, up, down, ..] = ffn.gated().ranges();
            let start = layer.ffn.start;
            [gate, up, down].map(|range| start + range.start..start + range.end)
        });
        let mut set: Vec<Range<usize>> = set.collect();
        set.sort_by_key(|range| range.start);
        set
    }

    /// Forgets the ops of micro-batches.
    fn forget(&mut self) {
        self.recorded.iter_mut().for_each(Recorded::forget);
    }

    /// Tells whether the next micro-batch sets gradients.
    fn sets(&self) -> bool {
        self.first && self.acts.layers.iter().any(|layer| layer.ffn.sets())
    }

    /// Queues the forward and backward pass of a micro-batch, or runs it if gates are computed by the host. As
    /// [`Model::train_step`], it adds to the gradients and to the results of [`CudaTrainer::finish`].
    ///
    /// # Errors
    /// A token id is outside the vocabulary, there are more positions than the model has, the routers' gradient is to be estimated,
    /// or the device fails.
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
        let room = self.acts.tokens();
        assert!(
            inputs.len() == room && targets.len() == inputs.len() && inputs.len().is_multiple_of(seq),
            "micro_batch: {} inputs, {} targets, seq {seq}, room for {room}",
            inputs.len(),
            targets.len()
        );
        check_input(&self.config, inputs, 0, seq)?;
        let rule = args.router_gradient.rule;
        if !rule.is_full() {
            let problem = format!("router_gradient {rule} on a GPU, which computes all inactive pairs");
            return Err(Error::argument(problem, "use full, or train on the processor"));
        }
        if args.share.is_some() {
            let problem = "a loss on the share of active experts on a GPU, which has none";
            return Err(Error::argument(problem, "leave it out, or train on the processor"));
        }
        self.acts.ids.upload_from(inputs)?;
        self.acts.targets.upload_from(targets)?;
        self.acts.occurrences.update(inputs)?;
        let n = most_experts(&self.ffns).unwrap_or(1);
        let gates = self.config.num_layers * inputs.len() * n;
        self.sparsity_weight.upload_from(&[args.sparsity_weight / gates as f32])?;
        self.bins.iter_mut().try_for_each(|bins| bins.fill_zero())?;
        let made_for = Recording { seq, loss_scale: args.loss_scale, sparsity_over: args.sparsity_over };
        if self.recorded_for != Some(made_for) {
            self.forget();
            self.recorded_for = Some(made_for);
        }
        let set = self.sets();
        self.first = false;
        let which = usize::from(set);
        let (gpu, mut recorded) = (self.gpu.clone(), std::mem::take(&mut self.recorded[which]));
        let hosted = self.ffns.iter().any(DeviceFfn::is_hosted);
        let mut pass = |_: &mut ()| {
            self.forward(seq, args)?;
            self.loss(args.loss_scale)?;
            self.backward(seq, args, set)
        };
        // Ops between which the host computes cannot be recorded.
        let done = if hosted { pass(&mut ()) } else { recorded.run(&gpu, pass) };
        self.recorded[which] = recorded;
        done
    }

    /// Tells whether the next micro-batch with the same settings replays a CUDA graph. This is so from the second on, unless
    /// the host computes gates.
    pub fn is_recorded(&self) -> bool {
        self.recorded[usize::from(self.sets())].is_recorded()
    }

    /// Waits for the micro-batches of the step, returns their results, and adds their routing to `stats`
    /// ([`Model::new_stats`]).
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The statistics are of another model.
    pub fn finish(&mut self, stats: Option<&mut RoutingStats>) -> Result<CudaStep> {
        if std::mem::take(&mut self.first) {
            // Nothing has set them.
            self.grads.fill_zero()?;
        }
        if let Some(mask) = &self.keep {
            Keep { x: &mut self.grads, mask }.run()?;
        }
        self.squares()?;
        let sums = self.report.sums.download()?;
        let gates = self.report.gates.download()?;
        if let Some(stats) = stats {
            let (counts, row) = (self.report.counts.download()?, self.report.counts.cols());
            for (layer, (counts, ffn)) in counts.chunks_exact(row).zip(&self.ffns).enumerate() {
                let n = ffn.routed().unwrap_or(0);
                stats.add_counts_behind_core(layer, ffn.core(), &counts[..n], &counts[n..=2 * n]);
            }
        }
        let routed = self.ffns.iter().map(|ffn| ffn.routed().unwrap_or(1) as f64);
        let total = |which: usize| {
            gates.chunks_exact(2).zip(routed.clone()).map(|(pair, routed)| pair[which] / routed).sum()
        };
        Ok(CudaStep {
            loss: sums[0],
            active_gates: total(0),
            all_gates: total(1),
            squares: sums[1],
            router_squares: sums[2],
            balance_loss: self.balance_loss,
        })
    }

    /// Updates the parameters from `scale` times the gradients. `hyper` gives the settings of a tensor from whether it decays
    /// and whether it belongs to a router.
    ///
    /// # Errors
    /// The device fails.
    pub fn update(&mut self, scale: f32, hyper: impl Fn(bool, bool) -> adamw::Hyper) -> Result<()> {
        let CudaTrainer { layout, params, weights, m, v, grads, report, keep, .. } = self;
        report.scale.upload_from(&[scale])?;
        for (decay, is_router, range) in runs(layout) {
            let [mut param, mut m, mut v] = [&mut *params, m, v].map(|buf| buf.part_mut(range.clone()));
            let mut rounded = weights.part_mut(range.clone());
            AdamW {
                param: &mut param,
                rounded: &mut rounded,
                m: &mut m,
                v: &mut v,
                grad: &grads.part(range),
                scale: &report.scale,
                hyper: &hyper(decay, is_router),
            }
            .run()?;
        }
        let Some(mask) = keep else { return Ok(()) };
        Keep { x: params, mask }.run()?;
        Ok(Cast { out: weights, x: params }.run()?)
    }

    /// Copies the parameters to `model`.
    ///
    /// # Errors
    /// The device fails.
    pub fn download(&self, model: &mut Model) -> Result<()> {
        Ok(self.params.download_to(&mut model.params)?)
    }

    /// Copies the moments to the host.
    ///
    /// # Errors
    /// The device fails.
    pub fn download_moments(&self, m: &mut [f32], v: &mut [f32]) -> Result<()> {
        self.m.download_to(m)?;
        Ok(self.v.download_to(v)?)
    }

    /// Copies the gradients to the host.
    ///
    /// # Errors
    /// The device fails.
    pub fn download_grads(&self) -> Result<Vec<f32>> {
        Ok(self.grads.download()?)
    }

    /// Returns the first place of the last micro-batch's forward pass with a NaN or infinity.
    ///
    /// # Errors
    /// The device fails.
    pub fn first_non_finite(&self) -> Result<String> {
        let bad = |x: &Matrix<f32>| -> Result<bool> { Ok(x.download()?.iter().any(|x| !x.is_finite())) };
        for (i, (stream, layer)) in self.acts.streams.iter().zip(&self.acts.layers).enumerate() {
            if bad(&stream.x)? {
                return Ok(if i == 0 { "embedding".to_owned() } else { format!("layer {} ffn", i - 1) });
            }
            if bad(&layer.x_mid)? {
                return Ok(format!("layer {i} attention"));
            }
        }
        let layers = self.acts.layers.len();
        Ok(match bad(&self.acts.streams[layers].x)? {
            true => format!("layer {} ffn", layers - 1),
            false => "head".to_owned(),
        })
    }

    /// Adds up the squares of the gradients.
    fn squares(&mut self) -> Result<()> {
        let (sums, partials) = (&mut self.report.sums, &mut self.acts.sums);
        for (_, is_router, range) in runs(&self.layout) {
            let x = &self.grads.part(range);
            AddSum { out: &mut sums.part_mut(1..2), x, squares: true, partials: &mut *partials }.run()?;
            if is_router {
                AddSum { out: &mut sums.part_mut(2..3), x, squares: true, partials: &mut *partials }.run()?;
            }
        }
        Ok(())
    }
}

/// Returns runs of neighbours in the layout that are updated alike: whether they decay, whether they are routers, and their
/// range.
fn runs(layout: &Layout) -> impl Iterator<Item = (bool, bool, Range<usize>)> + use<> {
    let runs: Vec<_> = layout
        .entries()
        .chunk_by(|a, b| (a.spec.decay, a.spec.router) == (b.spec.decay, b.spec.router))
        .map(|run| (run[0].spec.decay, run[0].spec.router, run[0].range.start..run[run.len() - 1].range.end))
        .collect();
    runs.into_iter()
}

/// Returns 1 for each parameter that `masks` keep, and 0 for the others.
fn kept(masks: &Masks, layout: &Layout) -> Vec<u8> {
    let mut ones = vec![1.0; layout.len()];
    masks.apply(&mut ones, layout);
    ones.into_iter().map(|x| u8::from(x != 0.0)).collect()
}
