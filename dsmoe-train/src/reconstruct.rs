//! Local reconstruction: layer by layer, the FFN of a DSMoE model (neurons, routers and what stands beside them) is
//! trained to give what the dense FFN gives.
//!
//! ```text
//! two streams of hidden states of the same text: dense (r_d) and sparse (r_s), with the dense model's attention
//! per layer, after attention:
//!   x       what the FFN reads of r_s
//!   target  = dense(x) + drift ((r_d + dense(x_d)) - (r_s + dense(x)))       drift corrects what earlier layers lost
//!   loss    = mean over tokens of |ffn(x) - target|^2 / |r_s|^2              a norm divides the stream's size away
//!   AdamW on the layer's FFN; binary gates keep their share by their threshold
//! then both streams join their FFN's output and go on
//! ```
//! The errors that are reported are those of sequences that no step reads, relative to the size of the dense output. They
//! compare states of one layer; a smaller local error need not be a smaller perplexity.
//!
//! A run that is interrupted resumes at the first layer that is not done: `OUT/reconstruct` holds the finished ones.

mod work;

use std::path::PathBuf;
use std::time::Instant;

use dsmoe_core::Model;
use dsmoe_core::calibrate::{LayerStream, LayerWeights, check_router_text};
use dsmoe_core::config::Budget;
use dsmoe_core::ffn::{
    Ffn, FfnBackward, FfnForward, FfnInference, FfnScratch, GateTraining, PackedFfn, Record,
};
use dsmoe_core::params::Layout;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::{Precision, expert_ffn, linear};
use dsmoe_router::{
    GateValue, Knot, LogitCounts, RoutingStats, SparsityGrad, SparsityOver, ThresholdController,
};
use serde::{Deserialize, Serialize};

use self::work::Work;
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::optim::{AdamW, Update, clip_scale, grad_norms};

/// Every so many sequences one is held out, to measure the error.
const HELD_OUT: usize = 8;
/// Fewest sequences, so that there are some of either kind.
const FEWEST_SEQUENCES: usize = 2;
/// Difference of attention weights, relative to their norm, up to which they count as the dense model's, rounded.
const SAME_WEIGHTS: f64 = 0.01;

/// Settings of a reconstruction.
///
/// ```
/// use dsmoe_train::Error;
/// use dsmoe_train::reconstruct::{ReconstructOptions, ReconstructPaths, reconstruct};
///
/// let [model, teacher, out] = ["converted", "dense", "fitted"].map(Into::into);
/// let paths = ReconstructPaths { model, teacher, out, resume: false };
/// // A layer corrects at most all that the layers before it lost: a larger drift is refused at once.
/// let options = ReconstructOptions { drift: 1.5, ..ReconstructOptions::default() };
/// let refused = reconstruct(&paths, &[], &options, &mut |_, _| true);
/// assert!(matches!(refused, Err(Error::Field { field: "drift", .. })));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReconstructOptions {
    /// Steps of each layer.
    pub steps: u64,
    /// Tokens of a step.
    pub tokens: usize,
    /// Peak learning rate; it falls to a tenth along a cosine.
    pub lr: f64,
    /// Learning rate of the routers over that of the rest.
    pub router_lr_scale: f64,
    /// Part of the distance between dense and sparse stream that a layer is to close, 0 to 1.
    pub drift: f64,
    /// Seed of the order of the tokens.
    pub seed: u64,
    /// The precision to which operands of matrix products are rounded.
    #[serde(serialize_with = "name_of")]
    pub precision: Precision,
}

impl Default for ReconstructOptions {
    fn default() -> ReconstructOptions {
        ReconstructOptions {
            steps: 300,
            tokens: 1024,
            lr: 5e-4,
            router_lr_scale: 3.0,
            drift: 0.0,
            seed: 0,
            precision: Precision::F32,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn name_of<S: serde::Serializer>(precision: &Precision, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(precision.name())
}

impl ReconstructOptions {
    fn check(&self) -> Result<()> {
        for (field, value, range, allowed) in [
            ("lr", self.lr, 0.0..=1.0, "0 to 1"),
            ("router_lr_scale", self.router_lr_scale, 0.0..=1e6, "0 to 1000000"),
            ("drift", self.drift, 0.0..=1.0, "0 to 1"),
            ("steps", self.steps as f64, 0.0..=1e9, "at most 1000000000"),
            ("batch", self.tokens as f64, 1.0..=65_536.0, "1 to 65536 tokens"),
        ] {
            if !range.contains(&value) {
                return Err(Error::field(field, value, allowed));
            }
        }
        Ok(())
    }
}

/// The directories of a reconstruction.
///
/// ```
/// use dsmoe_train::reconstruct::{ReconstructOptions, ReconstructPaths, reconstruct};
/// # use dsmoe_core::{convert::{ConvertOptions, convert}, init::{LlamaSizes, init}};
/// # let work = tempfile::tempdir()?;
/// # let [model, teacher, out] = ["converted", "dense", "fitted"].map(|name| work.path().join(name));
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 64];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # init(&sizes.config()?, &teacher, &Default::default(), &mut |_| {})?;
/// # convert(&teacher, &model, &ConvertOptions::new(4), &mut |_| {})?;
/// # let sequences: Vec<Vec<u32>> = (0..8).map(|i| (0..32).map(|t| (3 + 5 * i + 7 * t) % 32).collect()).collect();
///
/// let options = ReconstructOptions { steps: 1, tokens: 32, ..ReconstructOptions::default() };
/// let mut paths = ReconstructPaths { model, teacher, out, resume: false };
/// // Stopped behind the first layer, and resumed at the second.
/// assert_eq!(reconstruct(&paths, &sequences, &options, &mut |report, _| report.layer > 0)?.len(), 1);
/// paths.resume = true;
/// assert_eq!(reconstruct(&paths, &sequences, &options, &mut |_, _| true)?.len(), 2);
/// assert!(paths.out.join("config.json").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ReconstructPaths {
    /// The DSMoE model.
    pub model: PathBuf,
    /// The dense model that it was made from.
    pub teacher: PathBuf,
    /// The directory to write.
    pub out: PathBuf,
    /// Resume at the first layer that is not done.
    pub resume: bool,
}

/// The outcome of one layer.
///
/// ```no_run
/// use dsmoe_train::reconstruct::{LayerReport, ReconstructOptions, ReconstructPaths, reconstruct};
///
/// fn fit(sequences: &[Vec<u32>]) -> dsmoe_train::Result<()> {
///     let [model, teacher, out] = ["converted", "dense", "fitted"].map(Into::into);
///     let paths = ReconstructPaths { model, teacher, out, resume: false };
///     let options = ReconstructOptions { steps: 200, ..ReconstructOptions::default() };
///     reconstruct(&paths, sequences, &options, &mut |LayerReport { layer, before, after, .. }, _| {
///         println!("layer {layer}: error {before:.4}, then {after:.4}");
///         true
///     })?;
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerReport {
    /// The layer.
    pub layer: usize,
    /// The weighted squared error on held-out sequences before training, over that of an output of 0.
    pub before: f64,
    /// The same after it.
    pub after: f64,
    /// Share of the layer's experts that the held-out sequences open, before and after.
    pub active: [Option<f64>; 2],
    /// Duration of the training.
    pub seconds: f64,
}

/// Reconstructs the FFNs of `paths.model` on `sequences` of one length. `progress` hears of every finished layer, and says
/// whether to go on; without its consent the reconstruction stops and can be resumed. Returns the reports of the layers
/// that are done, all of them once the model is written.
///
/// # Errors
/// Directories that do not fit together or cannot be used, text that is too short, or an error that is not finite.
pub fn reconstruct(
    paths: &ReconstructPaths,
    sequences: &[Vec<u32>],
    options: &ReconstructOptions,
    progress: &mut dyn FnMut(&LayerReport, usize) -> bool,
) -> Result<Vec<LayerReport>> {
    options.check()?;
    check_router_text(sequences)?;
    if sequences.len() < FEWEST_SEQUENCES {
        let allowed = format!("at least {FEWEST_SEQUENCES}");
        return Err(Error::field("samples", format!("{} sequences", sequences.len()), allowed));
    }
    let mut model = Model::load(&paths.model)?;
    let mut streams = Streams::open(paths, &model, sequences)?;
    let work = Work::prepare(paths, &model, sequences, options)?;
    if let Some(reports) = work.reports()? {
        work.clear()?;
        return Ok(reports);
    }
    let mut thresholds = Thresholds::of(&model)?;
    let layers = model.config().num_layers;
    let mut reports = Vec::with_capacity(layers);
    for layer in 0..layers {
        let weights = streams.dense.layer(layer)?;
        same_attention(&model, &weights, paths)?;
        let done = work.read(&mut model, &mut thresholds, layer)?;
        let is_new = done.is_none();
        let report = match done {
            Some(report) => {
                streams.attend(&weights)?;
                report
            }
            None => {
                let lesson = streams.lesson(&weights, options.drift)?;
                let report = train(&mut model, &mut thresholds, layer, &lesson, options)?;
                work.write(&model, &thresholds, &report)?;
                report
            }
        };
        let (ffn, params) = model.ffn_mut(layer);
        if let Some(bar) = thresholds.default_bar(layer) {
            ffn.set_threshold_logit(bar);
        }
        streams.join(&weights, &*ffn.pack(params, options.precision))?;
        reports.push(report);
        if is_new && !progress(&reports[layer], layers) && layer + 1 < layers {
            return Ok(reports);
        }
    }
    thresholds.store(&mut model)?;
    work.finish(&model, paths, &reports)?;
    Ok(reports)
}

/// The hidden states of the text in both models.
struct Streams {
    dense: LayerStream,
    sparse: LayerStream,
    hidden: usize,
    sequences: usize,
    /// True if an FFN's output joins the stream as it is.
    joins_plainly: bool,
}

/// Text that one layer learns from: rows `[tokens, hidden]` with weights, of training and held-out sequences.
struct Lesson {
    x: Buf,
    target: Buf,
    weight: Vec<f32>,
    hidden: usize,
    /// First held-out row.
    train_rows: usize,
}

impl Streams {
    fn open(paths: &ReconstructPaths, model: &Model, sequences: &[Vec<u32>]) -> Result<Streams> {
        let dense = LayerStream::open(&paths.teacher, sequences)?;
        let sparse = LayerStream::open(&paths.teacher, sequences)?;
        let (of, to) = (dense.config(), model.config());
        let sizes = |config: &dsmoe_core::config::Config| {
            [config.num_layers, config.hidden, config.intermediate, config.vocab_size, config.num_heads]
        };
        if to.moe.is_none() || model.masks().is_some() || sizes(of) != sizes(to) {
            let found = format!("{} for {}", paths.teacher.display(), paths.model.display());
            return Err(Error::field(
                "teacher",
                found,
                "a DSMoE model and the dense model that it was made from",
            ));
        }
        let (hidden, joins_plainly) =
            (of.hidden, !of.architecture.norms_after() && of.architecture.residual_scale == 1.0);
        Ok(Streams { dense, sparse, hidden, sequences: sequences.len(), joins_plainly })
    }

    fn attend(&mut self, weights: &LayerWeights) -> Result<()> {
        self.dense.attend(weights)?;
        Ok(self.sparse.attend(weights)?)
    }

    /// Runs attention and returns what the layer's FFN reads and is to give. Held-out sequences come last.
    fn lesson(&mut self, weights: &LayerWeights, drift: f64) -> Result<Lesson> {
        self.attend(weights)?;
        let (seq, hidden) = (self.sparse.seq(), self.hidden);
        let len = seq * hidden;
        let held_out = self.sequences.div_ceil(HELD_OUT);
        let train = self.sequences - held_out;
        // The place of each sequence: every eighth goes behind the others.
        let mut places = vec![0; self.sequences];
        let (mut first, mut last) = (0, train);
        for (sequence, place) in places.iter_mut().enumerate() {
            let next = if sequence % HELD_OUT == 0 { &mut last } else { &mut first };
            *place = *next;
            *next += 1;
        }
        let mut lesson = Lesson {
            x: Buf::zeros(self.sequences * len),
            target: Buf::zeros(self.sequences * len),
            weight: vec![0.0; self.sequences * seq],
            hidden,
            train_rows: train * seq,
        };
        let drift = if self.joins_plainly { drift as f32 } else { 0.0 };
        if drift > 0.0 {
            // target = drift (r_d + dense(x_d)) for now.
            let target = &mut lesson.target;
            self.dense.see_ffn(weights, &mut |tap| {
                let to = &mut target[places[tap.sequence] * len..][..len];
                down(to, weights, tap.neurons);
                to.iter_mut().zip(tap.residual).for_each(|(y, r)| *y = drift * (*y + r));
            })?;
        }
        let mut y = vec![0.0; len];
        self.sparse.see_ffn(weights, &mut |tap| {
            let place = places[tap.sequence];
            lesson.x[place * len..][..len].copy_from_slice(tap.x);
            down(&mut y, weights, tap.neurons);
            let to = &mut lesson.target[place * len..][..len];
            for ((to, y), r) in to.iter_mut().zip(&y).zip(tap.residual) {
                *to += y - drift * (y + r);
            }
            for (weight, row) in
                lesson.weight[place * seq..][..seq].iter_mut().zip(tap.residual.chunks_exact(hidden))
            {
                let square: f64 = row.iter().map(|&r| f64::from(r).powi(2)).sum();
                *weight = (hidden as f64 / square.max(f64::from(f32::MIN_POSITIVE))) as f32;
            }
        })?;
        Ok(lesson)
    }

    /// Adds the FFNs' outputs to the streams: the dense one, and `ffn`.
    fn join(&mut self, weights: &LayerWeights, ffn: &dyn PackedFfn) -> Result<()> {
        self.dense.join_ffn(weights, &mut |y, tap| down(y, weights, tap.neurons))?;
        let mut scratch = FfnScratch::default();
        self.sparse.join_ffn(weights, &mut |y, tap| {
            ffn.forward(FfnInference { y, x: tap.x, record: None, scratch: &mut scratch });
        })?;
        Ok(())
    }
}

/// Sets `y` to what the dense FFN gives for the values of its neurons.
fn down(y: &mut [f32], weights: &LayerWeights, neurons: &[f32]) {
    let of = &weights.linears[6];
    let rows = neurons.len() / of.inputs;
    let dims = linear::Dims { rows, inputs: of.inputs, outputs: of.outputs, precision: Precision::F32 };
    linear::Forward { y, x: neurons, w: &of.weight, bias: of.bias.as_deref(), dims }.run();
}

/// Checks that the attention of the model's layer is that of the dense model, which the streams run.
fn same_attention(model: &Model, weights: &LayerWeights, paths: &ReconstructPaths) -> Result<()> {
    for linear in &weights.linears[..4] {
        let entry = model.layout().entries().iter().find(|entry| entry.spec.name == linear.name);
        let Some(entry) = entry else { continue };
        let own = &model.params()[entry.range.clone()];
        let square = |pairs: &mut dyn Iterator<Item = f32>| pairs.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let off = square(&mut own.iter().zip(linear.weight.iter()).map(|(a, b)| a - b));
        if own.len() != linear.weight.len()
            || off.sqrt() > SAME_WEIGHTS * square(&mut linear.weight.iter().copied()).sqrt()
        {
            let found = format!("{}, whose {} is another", paths.model.display(), linear.name);
            return Err(Error::field(
                "model",
                found,
                "a model with the attention of the dense one: one that was not trained",
            ));
        }
    }
    Ok(())
}

/// The thresholds of the budgets, layer by layer.
struct Thresholds {
    /// The share of each stored budget, or the one that the model was made for; empty where no threshold is moved.
    budgets: Vec<f64>,
    /// The budget that the training runs at.
    default: usize,
    /// `[budgets][layers]`.
    bars: Vec<Vec<f64>>,
}

impl Thresholds {
    fn of(model: &Model) -> Result<Thresholds> {
        let config = model.config();
        let none = Thresholds { budgets: Vec::new(), default: 0, bars: Vec::new() };
        let Some(moe) = config.moe.as_ref().filter(|moe| moe.router.gate_value == GateValue::Binary) else {
            return Ok(none);
        };
        let stored = &moe.parts.budgets;
        if stored.is_empty() {
            let Some(active) = moe.active_target else { return Ok(none) };
            let bars = vec![vec![moe.router.threshold_logit().clamp(-30.0, 30.0); config.num_layers]];
            return Ok(Thresholds { budgets: vec![active], default: 0, bars });
        }
        let wanted = moe.budget().unwrap_or(stored[0].active);
        let distance = |at: &usize| (stored[*at].active - wanted).abs();
        let default = (0..stored.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
        Ok(Thresholds {
            budgets: stored.iter().map(|budget| budget.active).collect(),
            default,
            bars: stored
                .iter()
                .map(|budget| budget.thresholds.iter().map(|&bar| bar.into()).collect())
                .collect(),
        })
    }

    fn default_bar(&self, layer: usize) -> Option<f32> {
        self.bars.get(self.default).map(|bars| bars[layer] as f32)
    }

    /// Stores the thresholds in the model, unless they were not moved.
    fn store(&self, model: &mut Model) -> Result<()> {
        let Some(active) = self.budgets.get(self.default) else { return Ok(()) };
        let made_for = model.config().moe.as_ref().and_then(|moe| moe.active_target).unwrap_or(*active);
        let budget = |(&active, bars): (&f64, &Vec<f64>)| Budget {
            active,
            thresholds: bars.iter().map(|&bar| bar as f32).collect(),
        };
        let budgets = self.budgets.iter().zip(&self.bars).map(budget).collect();
        Ok(model.set_budgets(budgets, made_for)?)
    }
}

/// Trains the FFN of a layer, and moves its thresholds so that each budget keeps its share of the layer.
fn train(
    model: &mut Model,
    thresholds: &mut Thresholds,
    layer: usize,
    lesson: &Lesson,
    options: &ReconstructOptions,
) -> Result<LayerReport> {
    let began = Instant::now();
    let (ffn, params) = model.ffn_mut(layer);
    if let Some(bar) = thresholds.default_bar(layer) {
        ffn.set_threshold_logit(bar);
    }
    let before = lesson.measure(&*ffn, params, options);
    let mut held: Vec<ThresholdController> = Vec::new();
    if !thresholds.bars.is_empty() {
        let counts = lesson.logits(&*ffn, params, options);
        let curves = counts.curves();
        for bars in &thresholds.bars {
            let knot = Knot { active: curves.share(&[bars[layer]]), bars: vec![bars[layer]] };
            held.push(ThresholdController::new(vec![knot], 1)?);
        }
    }
    let mut learner = Learner::new(&*ffn, lesson, options);
    let default = thresholds.default;
    for step in 0..options.steps {
        let is_finite = learner.step(&*ffn, params, step, held.get_mut(default));
        if !is_finite {
            let place = format!("the error of layer {layer}");
            let intact = "the layers before it are kept".to_owned();
            return Err(Error::NonFinite { step: step + 1, place, intact });
        }
        if let Some(held) = held.get(default) {
            ffn.set_threshold_logit(held.bars(&[held.knots()[0].active])[0]);
        }
    }
    if !held.is_empty() {
        let counts = lesson.logits(&*ffn, params, options);
        for (bars, mut controller) in thresholds.bars.iter_mut().zip(held) {
            controller.fit(0, &counts);
            bars[layer] = controller.knots()[0].bars[0];
        }
    }
    if let Some(bar) = thresholds.default_bar(layer) {
        ffn.set_threshold_logit(bar);
    }
    let after = lesson.measure(&*ffn, params, options);
    let seconds = began.elapsed().as_secs_f64();
    Ok(LayerReport { layer, before: before.0, after: after.0, active: [before.1, after.1], seconds })
}

impl Lesson {
    /// Returns the relative error on the held-out rows and the share of experts that they open.
    fn measure(&self, ffn: &dyn Ffn, params: &[f32], options: &ReconstructOptions) -> (f64, Option<f64>) {
        let packed = ffn.pack(params, options.precision);
        let mut stats = ffn.num_experts().map(|n| RoutingStats::new(1, n));
        let (mut off, mut all) = (0.0, 0.0);
        self.run(&*packed, self.train_rows..self.weight.len(), stats.as_mut(), options, |rows, y| {
            let target = &self.target[rows.start * self.hidden..rows.end * self.hidden];
            let pairs = y.chunks_exact(self.hidden).zip(target.chunks_exact(self.hidden));
            for ((y, target), &weight) in pairs.zip(&self.weight[rows]) {
                let square = |values: &mut dyn Iterator<Item = f32>| {
                    f64::from(weight) * values.map(|x| f64::from(x).powi(2)).sum::<f64>()
                };
                off += square(&mut y.iter().zip(target).map(|(a, b)| a - b));
                all += square(&mut target.iter().copied());
            }
        });
        (off / all.max(f64::MIN_POSITIVE), stats.map(|stats| stats.active_ratio()))
    }

    /// Counts the router's logits on the rows to train on.
    fn logits(&self, ffn: &dyn Ffn, params: &[f32], options: &ReconstructOptions) -> LogitCounts {
        let packed = ffn.pack(params, options.precision);
        let mut stats = ffn.num_experts().map(|n| RoutingStats::new(1, n).with_logits());
        self.run(&*packed, 0..self.train_rows, stats.as_mut(), options, |_, _| {});
        stats.as_ref().and_then(RoutingStats::logits).cloned().unwrap_or_else(|| LogitCounts::new(1))
    }

    /// Runs an FFN on a range of rows, and shows `see` its outputs.
    fn run(
        &self,
        ffn: &dyn PackedFfn,
        rows: std::ops::Range<usize>,
        mut stats: Option<&mut RoutingStats>,
        options: &ReconstructOptions,
        mut see: impl FnMut(std::ops::Range<usize>, &[f32]),
    ) {
        let mut scratch = FfnScratch::default();
        let mut y = vec![0.0; options.tokens * self.hidden];
        for first in rows.clone().step_by(options.tokens) {
            let part = first..(first + options.tokens).min(rows.end);
            let x = &self.x[part.start * self.hidden..part.end * self.hidden];
            let y = &mut y[..x.len()];
            let record = stats.as_deref_mut().map(|stats| Record { stats, layer: 0 });
            ffn.forward(FfnInference { y, x, record, scratch: &mut scratch });
            see(part, y);
        }
    }
}

/// The memory of training one layer.
struct Learner<'a> {
    lesson: &'a Lesson,
    config: TrainConfig,
    layout: Layout,
    optimizer: AdamW,
    grads: Buf,
    saved: Box<dyn std::any::Any + Send>,
    scratch: FfnScratch,
    stats: Option<RoutingStats>,
    /// Mean weight of a row.
    scale: f32,
    x: Buf,
    y: Buf,
    dx: Buf,
}

impl<'a> Learner<'a> {
    fn new(ffn: &dyn Ffn, lesson: &'a Lesson, options: &ReconstructOptions) -> Learner<'a> {
        let layout = Layout::of(ffn.tensors());
        let config = TrainConfig {
            steps: Some(options.steps),
            lr: options.lr,
            router_lr_scale: options.router_lr_scale,
            warmup_steps: Some(options.steps / 20),
            weight_decay: 0.0,
            seed: options.seed,
            ..TrainConfig::default()
        };
        let experts = expert_ffn::Scratch::new(options.precision);
        let mut scratch = FfnScratch { experts, ..FfnScratch::default() };
        ffn.reserve(&mut scratch, options.tokens);
        let [x, y, dx] = [(); 3].map(|()| Buf::zeros(options.tokens * lesson.hidden));
        let trained = &lesson.weight[..lesson.train_rows];
        let mean = trained.iter().map(|&w| f64::from(w)).sum::<f64>() / trained.len().max(1) as f64;
        Learner {
            lesson,
            config,
            optimizer: AdamW::new(&layout),
            grads: Buf::zeros(layout.len()),
            layout,
            saved: ffn.new_saved(options.tokens),
            scratch,
            stats: ffn.num_experts().map(|n| RoutingStats::new(1, n).with_logits()),
            scale: (2.0 / (mean * options.tokens as f64).max(f64::MIN_POSITIVE)) as f32,
            x,
            y,
            dx,
        }
    }

    /// Takes a step on random rows; returns false, with the parameters unchanged, if its gradient is not finite.
    fn step(
        &mut self,
        ffn: &dyn Ffn,
        params: &mut [f32],
        step: u64,
        held: Option<&mut ThresholdController>,
    ) -> bool {
        let hidden = self.lesson.hidden;
        let tokens = self.x.len() / hidden;
        let mut rng = Rng::new(self.config.seed, step);
        let rows: Vec<usize> =
            (0..tokens).map(|_| rng.below(self.lesson.train_rows as u64) as usize).collect();
        for (x, &row) in self.x.chunks_exact_mut(hidden).zip(&rows) {
            x.copy_from_slice(&self.lesson.x[row * hidden..][..hidden]);
        }
        if let Some(stats) = &mut self.stats {
            stats.clear();
        }
        let training = GateTraining::default();
        ffn.forward_train(FfnForward {
            y: &mut self.y,
            saved: self.saved.as_mut(),
            x: &self.x,
            params,
            training,
            record: self.stats.as_mut().map(|stats| Record { stats, layer: 0 }),
            scratch: &mut self.scratch,
        });
        // dy = 2 weight (y - target) / (mean weight, tokens)
        for (y, &row) in self.y.chunks_exact_mut(hidden).zip(&rows) {
            let factor = self.scale * self.lesson.weight[row];
            let target = &self.lesson.target[row * hidden..][..hidden];
            y.iter_mut().zip(target).for_each(|(y, t)| *y = factor * (*y - t));
        }
        self.grads.clear();
        ffn.backward(FfnBackward {
            dx: &mut self.dx,
            grads: &mut self.grads,
            dy: &self.y,
            saved: self.saved.as_mut(),
            x: &self.x,
            params,
            sparsity: SparsityGrad { weight: 0.0, over: SparsityOver::Active },
            training,
            scratch: &mut self.scratch,
        });
        let norm = grad_norms(&self.layout, &self.grads).all;
        if !norm.is_finite() {
            return false;
        }
        let (lr, scale) = (self.config.schedule().lr_at(step), clip_scale(norm, self.config.clip));
        let update = Update { config: &self.config, lr, scale, step: step + 1 };
        self.optimizer.step(Some(params), &self.grads, &self.layout, &update);
        if let (Some(held), Some(counts)) = (held, self.stats.as_ref().and_then(RoutingStats::logits)) {
            held.update(held.knots()[0].active, counts);
        }
        true
    }
}
