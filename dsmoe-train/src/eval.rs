//! Evaluation: negative log-likelihood of a token stream in windows, with the share of experts that are active.

mod agreement;

pub use agreement::{Agreement, agreement, agreement_on};

use std::ops::Range;
use std::time::Instant;

use dsmoe_core::kept::{LINEARS, UsedWeights};
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_core::{Config, Inference};
use dsmoe_datasets::{EvalWindow, eval_windows};
use dsmoe_kernels::comm::{self, Alone, Communicator, What};
use dsmoe_router::RoutingStats;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ranks::{agree, all_go_on};

/// Options for cutting a stream into windows.
///
/// ```
/// use dsmoe_train::{EvalOptions, evaluate};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// let apart = EvalOptions::new(4);
/// let overlapping = EvalOptions { stride: 2, ..apart };
/// // The first token of a window has no context, unless an earlier window reaches it.
/// assert_eq!(evaluate(&model, &ids, apart, &mut |_, _| {})?.predicted, 6);
/// assert_eq!(evaluate(&model, &ids, overlapping, &mut |_, _| {})?.predicted, 7);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalOptions {
    /// Tokens in a window; its first is context only.
    pub seq: usize,
    /// Tokens from one window's start to the next; `seq` for windows that do not overlap.
    pub stride: usize,
    /// The approximate number of tokens per forward pass. Windows of one length run together.
    pub batch_tokens: usize,
}

impl EvalOptions {
    /// Uses windows of `seq` tokens that do not overlap, and about 1024 tokens in a forward pass.
    pub fn new(seq: usize) -> EvalOptions {
        EvalOptions { seq, stride: seq, batch_tokens: 1024 }
    }
}

/// The result of an evaluation. Shares are in 0..=1, and absent for a model without routers. They are means over all
/// tokens that were run.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
/// use dsmoe_train::eval::{
///     Agreement, Domain, DomainReport, EvalDetail, UsedShares, WindowLoss, agreement, evaluate_detailed,
///     evaluate_domains,
/// };
/// use dsmoe_train::{EvalOptions, EvalReport};
///
/// let model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
/// let (ids, options) = ([1, 5, 9, 2, 7, 3, 8, 4], EvalOptions::new(4));
/// let (report, detail): (EvalReport, EvalDetail) = evaluate_detailed(&model, &ids, options, &mut |_, _| {})?;
/// let sum: f64 = detail.windows.iter().map(|WindowLoss { nll_sum, .. }| nll_sum).sum();
/// assert!((sum / report.predicted as f64 - report.nll).abs() < 1e-9);
/// // Every weight of a model without thresholds is used.
/// let used: Option<UsedShares> = report.used_weights;
/// assert_eq!(used, None);
///
/// let text = |name| Domain { name, weight: 1.0, ids: &ids };
/// let both = evaluate_domains(&model, &[text("stories"), text("facts")], options, &mut |_, _| {})?;
/// let DomainReport { ppl, .. } = both.domains[1];
/// assert!((ppl / report.ppl - 1.0).abs() < 1e-6);
///
/// // A model agrees with itself.
/// let Agreement { kl, top1, nll, .. } = agreement(&model, &model, &ids, 4, &mut |_, _| {})?;
/// assert!(kl.abs() < 1e-9 && top1 == 1.0);
/// assert!(nll.is_some_and(|[own, other]| own == other && (own - report.nll).abs() < 1e-5));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EvalReport {
    /// Tokens of the stream.
    pub tokens: usize,
    /// Tokens predicted.
    pub predicted: usize,
    /// Mean negative log-likelihood of a predicted token, nats.
    pub nll: f64,
    /// exp(nll).
    pub ppl: f64,
    /// Active share of all (token, layer, expert) triples.
    pub active_ratio: Option<f64>,
    /// The same by layer.
    pub active_ratio_per_layer: Option<Vec<f64>>,
    /// Share of (token, layer) pairs without an active expert.
    pub zero_active_share: Option<f64>,
    /// Shares of the weights that a token used in a model with thresholds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_weights: Option<UsedShares>,
    /// Parameters of the model.
    pub params_total: u64,
    /// Parameters a token uses, mean.
    pub params_activated: f64,
    /// Floating-point operations of a forward pass per token, mean, at half a window of context.
    pub flops_per_token: f64,
    /// Tokens run per second.
    pub tokens_per_s: f64,
    /// Duration.
    pub seconds: f64,
    /// The same by source, when there are several; the rest is then the mean by their shares.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<DomainReport>,
}

/// Mean shares of the weights of all layers' linears that a token used, by what they read.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::kept::LINEARS;
/// use dsmoe_train::eval::UsedShares;
///
/// let config = preset("tiny")?;
/// // Tokens used half of the inputs of gate and up, in every layer.
/// let mut used = vec![[1.0; LINEARS]; config.num_layers];
/// used.iter_mut().for_each(|layer| layer[4..6].fill(0.5));
/// let shares = UsedShares::of(&config, &used);
/// assert_eq!((shares.attention, shares.ffn), (1.0, 0.5));
/// assert!(shares.all > 0.5 && shares.all < 1.0);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UsedShares {
    /// q, k and v.
    pub attention: f64,
    /// o.
    pub heads: f64,
    /// gate and up.
    pub ffn: f64,
    /// down.
    pub neurons: f64,
    /// All of them.
    pub all: f64,
}

impl UsedShares {
    fn mean(parts: impl Iterator<Item = (f64, Option<UsedShares>)>) -> Option<UsedShares> {
        let mut sum = UsedShares::default();
        for (share, part) in parts {
            let part = part?;
            sum.attention += share * part.attention;
            sum.heads += share * part.heads;
            sum.ffn += share * part.ffn;
            sum.neurons += share * part.neurons;
            sum.all += share * part.all;
        }
        Some(sum)
    }
}

impl UsedShares {
    /// Takes the means over the layers of a model of `config`.
    pub fn of(config: &Config, used: &[[f64; LINEARS]]) -> UsedShares {
        let mean = |linears: Range<usize>| {
            let (mut sum, mut all) = (0.0, 0.0);
            for (layer, used) in used.iter().enumerate() {
                let weights = config.linear_weights(layer);
                for i in linears.clone() {
                    sum += used[i] * weights[i] as f64;
                    all += weights[i] as f64;
                }
            }
            sum / all
        };
        UsedShares {
            attention: mean(0..3),
            heads: mean(3..4),
            ffn: mean(4..6),
            neurons: mean(6..7),
            all: mean(0..LINEARS),
        }
    }
}

/// The result of an evaluation on one of several sources.
///
/// ```
/// use dsmoe_train::EvalOptions;
/// use dsmoe_train::eval::{Domain, DomainReport, evaluate_domains};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
/// # let (stories, facts) = ([1, 5, 9, 2], [1, 7, 3, 8]);
///
/// let domains = [
///     Domain { name: "stories", weight: 3.0, ids: &stories },
///     Domain { name: "facts", weight: 1.0, ids: &facts },
/// ];
/// let report = evaluate_domains(&model, &domains, EvalOptions::new(4), &mut |_, _| {})?;
/// let mean: f64 = report.domains.iter().map(|DomainReport { share, nll, .. }| share * nll).sum();
/// assert!((mean - report.nll).abs() < 1e-9);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DomainReport {
    /// The source.
    pub name: String,
    /// Its share of all weights.
    pub share: f64,
    /// Tokens of its text.
    pub tokens: usize,
    /// Tokens predicted.
    pub predicted: usize,
    /// Mean negative log-likelihood of a predicted token, nats.
    pub nll: f64,
    /// exp(nll).
    pub ppl: f64,
    /// Active share of all (token, layer, expert) triples.
    pub active_ratio: Option<f64>,
}

/// The results of an evaluation by window and by token. Tokens are in the order of the stream.
///
/// ```
/// use dsmoe_train::EvalOptions;
/// use dsmoe_train::eval::{EvalDetail, evaluate_detailed};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// let (report, detail): (_, EvalDetail) =
///     evaluate_detailed(&model, &ids, EvalOptions::new(8), &mut |_, _| {})?;
/// // The token that surprises the model most; the first one is context.
/// let (at, _) = detail.losses.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
/// println!("token {}", ids[at + 1]);
/// assert_eq!(detail.losses.len(), report.predicted);
/// assert!(detail.active.is_empty()); // a dense model has no routers
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct EvalDetail {
    /// The loss of every window.
    pub windows: Vec<WindowLoss>,
    /// The negative log-likelihood of every predicted token, nats.
    pub losses: Vec<f32>,
    /// The active experts of every token that another was predicted from, summed over layers; empty without routers.
    pub active: Vec<u32>,
    /// The mean factor of every expert's output over all tokens, `[layers][experts]`; none without routers, and on a GPU.
    pub mean_coefficients: Option<Vec<Vec<f64>>>,
    /// The entropy of the load of every layer's experts over all tokens, nats; none without routers.
    pub load_entropies: Option<Vec<f64>>,
}

/// The loss of one window.
///
/// ```
/// use dsmoe_train::EvalOptions;
/// use dsmoe_train::eval::{WindowLoss, evaluate_detailed};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// let (report, detail) = evaluate_detailed(&model, &ids, EvalOptions::new(4), &mut |_, _| {})?;
/// // Windows are the units of a confidence interval.
/// let means = detail.windows.iter().map(|WindowLoss { nll_sum, predicted }| nll_sum / *predicted as f64);
/// assert!((means.sum::<f64>() / 2.0 - report.nll).abs() < 1e-9);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WindowLoss {
    /// Sum of the negative log-likelihoods of its predicted tokens, nats.
    pub nll_sum: f64,
    /// Tokens predicted.
    pub predicted: usize,
}

impl EvalDetail {
    fn add(&mut self, losses: &[f32], active: &[u32]) {
        let nll_sum = losses.iter().map(|&loss| f64::from(loss)).sum();
        self.windows.push(WindowLoss { nll_sum, predicted: losses.len() });
        self.losses.extend_from_slice(losses);
        self.active.extend_from_slice(active);
    }
}

/// The text of one source, for an evaluation.
///
/// ```
/// use dsmoe_train::EvalOptions;
/// use dsmoe_train::eval::{Domain, evaluate_domains};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let web = Domain { name: "web", weight: 0.75, ids: &[1, 5, 9, 2] };
/// let code = Domain { name: "code", weight: 0.25, ids: &[1, 7, 3, 8, 4] };
/// // A text without two tokens is left out.
/// let empty = Domain { name: "empty", weight: 1.0, ids: &[1] };
/// let report = evaluate_domains(&model, &[web, code, empty], EvalOptions::new(8), &mut |_, _| {})?;
/// let shares: Vec<f64> = report.domains.iter().map(|domain| domain.share).collect();
/// assert_eq!(shares, [0.75, 0.25]);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Domain<'a> {
    /// The source.
    pub name: &'a str,
    /// Its weight.
    pub weight: f64,
    /// Its text.
    pub ids: &'a [u32],
}

/// Evaluates `model` on each of `domains`, as [`evaluate`] does, and takes the means by their weights. A domain of
/// fewer than two tokens is left out. `progress` receives the number of windows done and of all.
///
/// # Errors
/// Those of [`evaluate`]; no domain with two tokens.
pub fn evaluate_domains(
    model: &Inference,
    domains: &[Domain<'_>],
    options: EvalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<EvalReport> {
    evaluate_domains_on(&Alone, model, domains, options, progress)
}

/// Does as [`evaluate_domains`] on the processes of `comm`, which divide the forward passes. All get the report of a single
/// process, but for times.
///
/// # Errors
/// Those of [`evaluate_domains`]; an error of another process.
pub fn evaluate_domains_on(
    comm: &dyn Communicator,
    model: &Inference,
    domains: &[Domain<'_>],
    options: EvalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<EvalReport> {
    unstopped(progress, |shown| evaluate_domains_while((comm, false), model, domains, options, shown))
}

/// Does as [`evaluate_domains_on`], and stops, with no report, where `goes_on` returns false. It is asked before every batch, with the
/// number of windows done and of all; what it returns after the last one has no effect. With `asks`, one process stops all, which
/// they tell each other before every batch.
pub(crate) fn evaluate_domains_while(
    (comm, asks): (&dyn Communicator, bool),
    model: &Inference,
    domains: &[Domain<'_>],
    options: EvalOptions,
    goes_on: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Option<EvalReport>> {
    let domains: Vec<&Domain<'_>> = domains.iter().filter(|domain| domain.ids.len() > 1).collect();
    let [_, _, ..] = domains[..] else {
        let ids = domains.first().map_or(&[][..], |domain| domain.ids);
        return measure((comm, asks), model, ids, options, goes_on);
    };
    let cut = |domain: &&Domain<'_>| Ok(eval_windows(domain.ids.len(), options.seq, options.stride)?.len());
    let windows = domains.iter().map(cut).collect::<Result<Vec<usize>>>()?;
    let (all, mut before) = (windows.iter().sum(), 0);
    let total: f64 = domains.iter().map(|domain| domain.weight).sum();
    let mut reports = Vec::new();
    for (domain, windows) in domains.iter().zip(windows) {
        let of_all = &mut |done: usize, _: usize| goes_on(before + done, all);
        let report = measure((comm, asks), model, domain.ids, options, of_all)?;
        let Some(report) = report else { return Ok(None) };
        before += windows;
        reports.push((domain.weight / total, report));
    }
    let mean = |value: &dyn Fn(&EvalReport) -> f64| -> f64 {
        reports.iter().map(|(share, report)| share * value(report)).sum()
    };
    let mean_of = |value: &dyn Fn(&EvalReport) -> Option<f64>| -> Option<f64> {
        reports.iter().map(|(share, report)| Some(share * value(report)?)).sum()
    };
    let layers = reports[0].1.active_ratio_per_layer.as_ref().map(Vec::len);
    let layer = |at: usize| mean_of(&|report| report.active_ratio_per_layer.as_ref()?.get(at).copied());
    let nll = mean(&|report| report.nll);
    let part = |(domain, (share, report)): (&&Domain<'_>, &(f64, EvalReport))| DomainReport {
        name: domain.name.to_owned(),
        share: *share,
        tokens: report.tokens,
        predicted: report.predicted,
        nll: report.nll,
        ppl: report.ppl,
        active_ratio: report.active_ratio,
    };
    let seconds: f64 = reports.iter().map(|(_, report)| report.seconds).sum();
    let run: f64 = reports.iter().map(|(_, report)| report.tokens_per_s * report.seconds).sum();
    Ok(Some(EvalReport {
        tokens: reports.iter().map(|(_, report)| report.tokens).sum(),
        predicted: reports.iter().map(|(_, report)| report.predicted).sum(),
        nll,
        ppl: nll.exp(),
        active_ratio: mean_of(&|report| report.active_ratio),
        active_ratio_per_layer: layers.and_then(|layers| (0..layers).map(layer).collect()),
        zero_active_share: mean_of(&|report| report.zero_active_share),
        used_weights: UsedShares::mean(reports.iter().map(|(share, report)| (*share, report.used_weights))),
        params_total: reports[0].1.params_total,
        params_activated: mean(&|report| report.params_activated),
        flops_per_token: mean(&|report| report.flops_per_token),
        tokens_per_s: run / seconds.max(1e-9),
        seconds,
        domains: domains.iter().zip(&reports).map(part).collect(),
    }))
}

/// Does an evaluation that nothing stops. `progress` receives the number of windows done and of all when there are more.
fn unstopped(
    progress: &mut dyn FnMut(usize, usize),
    evaluate: impl FnOnce(&mut dyn FnMut(usize, usize) -> bool) -> Result<Option<EvalReport>>,
) -> Result<EvalReport> {
    let mut shown = 0;
    let report = evaluate(&mut |done, all| {
        if done > shown {
            shown = done;
            progress(done, all);
        }
        true
    })?;
    Ok(report.expect("nothing stops it"))
}

/// Evaluates `model` on `ids`, all documents one after the other (see [`eval_windows`] for the protocol). `progress`
/// receives the number of windows done and of all.
///
/// # Errors
/// Options out of range, fewer than two tokens, a token id outside the vocabulary, or windows longer than the model
/// has positions.
pub fn evaluate(
    model: &Inference,
    ids: &[u32],
    options: EvalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<EvalReport> {
    unstopped(progress, |shown| measure((&Alone, false), model, ids, options, shown))
}

/// Does as [`evaluate`], and stops, with no report, where `goes_on` returns false. It is asked before every batch.
pub(crate) fn evaluate_while(
    model: &Inference,
    ids: &[u32],
    options: EvalOptions,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Option<EvalReport>> {
    measure((&Alone, false), model, ids, options, &mut |_, _| goes_on())
}

/// Evaluates as [`evaluate`] does and returns the results of single windows and tokens too.
///
/// # Errors
/// Those of [`evaluate`].
pub fn evaluate_detailed(
    model: &Inference,
    ids: &[u32],
    options: EvalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(EvalReport, EvalDetail)> {
    let started = Instant::now();
    let batches = Batches::cut(ids, options)?;
    let (mut detail, mut sums) = (EvalDetail::default(), Sums::new(model));
    sums.stats = sums.stats.map(|stats| stats.traced().weighted());
    for windows in batches.iter() {
        sums.add(model, ids, windows, Some(&mut detail))?;
        progress(sums.windows, batches.windows.len());
    }
    if !model.device().is_gpu() {
        detail.mean_coefficients = sums.stats.as_ref().and_then(RoutingStats::mean_coefficients);
    }
    detail.load_entropies = sums.stats.as_ref().map(RoutingStats::load_entropies);
    let nll_sum = sums.nll.iter().sum();
    let used = sums.workspace.take_used();
    Ok((batches.report(model, nll_sum, (sums.stats, &used), started), detail))
}

/// Evaluates `model` on `ids`; see [`evaluate_domains_while`].
fn measure(
    (comm, asks): (&dyn Communicator, bool),
    model: &Inference,
    ids: &[u32],
    options: EvalOptions,
    goes_on: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Option<EvalReport>> {
    let started = Instant::now();
    let batches = Batches::cut(ids, options)?;
    let mut sums = Sums::new(model);
    let all = batches.windows.len();
    let done = |sums: &Sums| (sums.windows * comm.size()).min(all);
    let (mut outcome, mut stopped): (Result<()>, bool) = (Ok(()), false);
    for turn in 0..batches.ranges.len().div_ceil(comm.size()) {
        let own = outcome.is_ok() && goes_on(done(&sums), all);
        // The others would wait for a process that has failed or stops.
        let all_go = if asks { all_go_on(comm, EVALUATION, own)? } else { own };
        if !all_go {
            stopped = true;
            break;
        }
        outcome = match batches.ranges.get(turn * comm.size() + comm.rank()) {
            Some(range) => sums.add(model, ids, &batches.windows[range.clone()], None),
            // The last turn may have no batch for this process, whose part of the weights the others need.
            None if model.is_lent() => model.pass_on().map_err(Error::from),
            None => Ok(()),
        };
    }
    agree(comm, EVALUATION, outcome)?;
    if stopped {
        return Ok(None);
    }
    goes_on(done(&sums), all);
    let used = used_by_all(comm, &sums.workspace.take_used())?;
    let (nll_sum, stats) = sums.join(comm)?;
    Ok(Some(batches.report(model, nll_sum, (stats, &used), started)))
}

/// Returns the weights that the tokens of all processes have used.
fn used_by_all(comm: &dyn Communicator, own: &UsedWeights) -> Result<UsedWeights> {
    let message: Vec<u8> = own.words().into_iter().flat_map(u64::to_le_bytes).collect();
    let mut sum = UsedWeights::default();
    for message in comm::gather(comm, EVALUATION, &message)? {
        let words = message.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        sum.add_words(&words.collect::<Vec<u64>>());
    }
    Ok(sum)
}

const EVALUATION: What = What::of("an evaluation");

/// The windows of a stream, and the ranges of those that run together.
struct Batches<'a> {
    ids: &'a [u32],
    options: EvalOptions,
    windows: Vec<EvalWindow>,
    ranges: Vec<Range<usize>>,
}

impl<'a> Batches<'a> {
    fn cut(ids: &'a [u32], options: EvalOptions) -> Result<Batches<'a>> {
        let windows = eval_windows(ids.len(), options.seq, options.stride)?;
        let mut ranges = Vec::new();
        let mut start = 0;
        while let Some(first) = windows.get(start) {
            let len = inputs_of(first);
            let most = (options.batch_tokens / len).max(1);
            let same = windows[start..].iter().take(most).take_while(|window| inputs_of(window) == len);
            let end = start + same.count();
            ranges.push(start..end);
            start = end;
        }
        Ok(Batches { ids, options, windows, ranges })
    }

    fn iter(&self) -> impl Iterator<Item = &[EvalWindow]> {
        self.ranges.iter().map(|range| &self.windows[range.clone()])
    }

    /// Returns the report of an evaluation of all windows.
    fn report(
        &self,
        model: &Inference,
        nll_sum: f64,
        (stats, used): (Option<RoutingStats>, &UsedWeights),
        started: Instant,
    ) -> EvalReport {
        let predicted = self.windows.iter().map(|window| window.end - window.first_target).sum();
        let run: usize = self.windows.iter().map(inputs_of).sum();
        let routing = stats.map(|stats| stats.summary());
        let used = model.config().used_shares(used);
        let measured = used.as_ref().map(|used| (*model.accounting()).with_used(model.config(), used));
        let accounting = measured.as_ref().unwrap_or_else(|| model.accounting());
        let active = routing.as_ref().map_or(0.0, |routing| routing.active_experts);
        let nll = nll_sum / predicted as f64;
        let seconds = started.elapsed().as_secs_f64();
        EvalReport {
            tokens: self.ids.len(),
            predicted,
            nll,
            ppl: nll.exp(),
            active_ratio: routing.as_ref().map(|routing| routing.active_ratio),
            active_ratio_per_layer: routing.as_ref().map(|routing| routing.active_ratio_per_layer.clone()),
            zero_active_share: routing.as_ref().map(|routing| routing.zero_active_share),
            used_weights: used.as_ref().map(|used| UsedShares::of(model.config(), used)),
            params_total: accounting.total,
            params_activated: accounting.activated(active),
            flops_per_token: accounting.mean_flops_per_token(active, self.options.seq),
            tokens_per_s: run as f64 / seconds.max(1e-9),
            seconds,
            domains: Vec::new(),
        }
    }
}

fn inputs_of(window: &EvalWindow) -> usize {
    window.end - window.start - 1
}

/// The sums over the batches of one process.
struct Sums {
    /// The loss of every batch.
    nll: Vec<f64>,
    stats: Option<RoutingStats>,
    windows: usize,
    /// Tokens that were run.
    run: usize,
    workspace: Workspace,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    losses: Vec<f32>,
}

impl Sums {
    fn new(model: &Inference) -> Sums {
        Sums {
            nll: Vec::new(),
            stats: model.new_stats(),
            windows: 0,
            run: 0,
            workspace: Workspace::default(),
            inputs: Vec::new(),
            targets: Vec::new(),
            losses: Vec::new(),
        }
    }

    /// Runs a batch of windows of one length.
    fn add(
        &mut self,
        model: &Inference,
        ids: &[u32],
        windows: &[EvalWindow],
        detail: Option<&mut EvalDetail>,
    ) -> Result<()> {
        let Sums { inputs, targets, losses, stats, .. } = self;
        let len = windows.first().map_or(0, inputs_of);
        inputs.clear();
        targets.clear();
        for window in windows {
            gather(window, ids, inputs, targets);
        }
        losses.resize(inputs.len(), 0.0f32);
        let tokens = Batch { inputs, targets, seq: len };
        model.score(losses, tokens, stats.as_mut(), &mut self.workspace)?;
        self.nll.push(losses.iter().map(|&loss| f64::from(loss)).sum());
        if let Some(detail) = detail {
            let active = stats.as_ref().map_or(&[][..], |stats| &stats.active_of_tokens()[self.run..]);
            for (at, window) in windows.iter().enumerate() {
                let scored = (at + 1) * len + window.first_target - window.end..(at + 1) * len;
                detail.add(&losses[scored.clone()], active.get(scored).unwrap_or_default());
            }
        }
        self.run += inputs.len();
        self.windows += windows.len();
        Ok(())
    }

    /// Returns the losses of all processes, added in the order of batches, and all their routing.
    fn join(mut self, comm: &dyn Communicator) -> Result<(f64, Option<RoutingStats>)> {
        let counts: Vec<u64> = self.stats.iter().flat_map(RoutingStats::counts).collect();
        let words = counts.iter().copied().chain(self.nll.iter().map(|nll| nll.to_bits()));
        let message: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let all = comm::gather(comm, EVALUATION, &message)?;
        let all: Vec<Vec<u64>> = all
            .iter()
            .map(|message| message.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
            .collect();
        if let Some(stats) = self.stats.as_mut().filter(|_| comm.size() > 1) {
            stats.clear();
            all.iter().for_each(|words| stats.add_all(&words[..counts.len()]));
        }
        let most = all.iter().map(|words| words.len() - counts.len()).max().unwrap_or(0);
        let in_order = (0..most).flat_map(|round| all.iter().map(move |words| (round, words)));
        let losses = in_order.filter_map(|(round, words)| words.get(counts.len() + round));
        Ok((losses.map(|&nll| f64::from_bits(nll)).sum(), self.stats))
    }
}

/// Appends a window's inputs, and its targets. Targets that an earlier window scored are masked.
fn gather(window: &EvalWindow, ids: &[u32], inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
    inputs.extend_from_slice(&ids[window.start..window.end - 1]);
    for (at, &id) in ids.iter().enumerate().take(window.end).skip(window.start + 1) {
        targets.push(if at < window.first_target { dsmoe_kernels::cross_entropy::IGNORE } else { id });
    }
}
