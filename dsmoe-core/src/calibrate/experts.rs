//! Layers with experts, seen by calibration sequences, and what their tokens say of each expert.
//!
//! ```text
//! stream = open_experts(dir, sequences)
//! per layer:  weights = stream.layer(i)
//!             experts = stream.experts(i)
//!             stream.attend(&weights)                    states += attention(states)
//!             stats = stream.expert_stats(..)            sums over all tokens
//!             stream.join_experts(&weights, &experts)    states += ffn(states)
//! ```

use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, alone};
use dsmoe_kernels::expert_ffn::{self, Biases, PackedWeights, Pairs, Weights};
use rayon::prelude::*;

use super::{LayerStream, LayerWeights, Scratch};
use crate::checkpoint::{CONFIG_FILE, WeightReader, ffn_name};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ffn::{Decision, ExpertParts, Ffn, FfnInference, FfnScratch, Gated, PackedFfn, of_layer};
use crate::model::block::Block;
use crate::model::tensors::in_pool;
use crate::params::{Layout, TensorSpec};

/// The experts of one layer that have gates, and its router. Gates may share an expert, whose statistics are those of all of them. A
/// core, or residual experts, are no part of them: all tokens run those, and only [`LayerStream::join_experts`] does.
///
/// ```
/// use dsmoe_core::calibrate::{ExpertStats, ExpertSums, LayerExperts, LayerStream};
/// use dsmoe_core::convert::{UpcycleOptions, upcycle};
/// # let work = tempfile::tempdir()?;
/// # let (dense, mixture) = (work.path().join("dense"), work.path().join("mixture"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
/// # let family = "mixtral".to_owned();
/// # let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// # upcycle(&dense, &mixture, &options, &mut |_| {})?;
///
/// let mut stream = LayerStream::open_experts(&mixture, &[vec![1, 5, 9, 2]])?;
/// let (weights, experts): (_, LayerExperts) = (stream.layer(0)?, stream.experts(0)?);
/// stream.attend(&weights)?;
/// let stats: ExpertStats = stream.expert_stats(&weights, &experts, false);
/// // Two of the four experts for each of four tokens.
/// let runs: f64 = stats.experts.iter().map(|ExpertSums { hard, .. }| hard).sum();
/// assert_eq!((stats.tokens, runs), (4, 8.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LayerExperts {
    ffn: Box<dyn Ffn>,
    parts: ExpertParts,
    params: Buf,
    packed: Box<dyn PackedFfn>,
    precision: Precision,
    /// The thresholds of the layer at every budget that the model stores.
    bars: Vec<f32>,
}

/// Sums over tokens of what each expert does. m is 1 where a token runs an expert, c the coefficient there, z the logits of
/// the gates, and o the output of an expert, not multiplied by anything.
///
/// ```
/// use dsmoe_core::calibrate::{ExpertStats, LayerStream};
/// # use dsmoe_core::convert::{UpcycleOptions, upcycle};
/// # let work = tempfile::tempdir()?;
/// # let [dense, mixture] = ["dense", "mixture"].map(|name| work.path().join(name));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
/// # let family = "mixtral".to_owned();
/// # let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// # upcycle(&dense, &mixture, &options, &mut |_| {})?;
///
/// let mut stream = LayerStream::open_experts(&mixture, &[vec![1, 5, 9, 2]])?;
/// let (weights, experts) = (stream.layer(0)?, stream.experts(0)?);
/// stream.attend(&weights)?;
/// let stats: ExpertStats = stream.expert_stats(&weights, &experts, false);
/// // The least used expert, and how alike two gates are.
/// let usage = stats.usage();
/// let least = (0..4).min_by(|&a, &b| usage[a].total_cmp(&usage[b])).unwrap();
/// println!("expert {least}; gates 0 and 1 correlate by {:.2}", stats.correlation(0, 1));
/// assert!((usage.iter().sum::<f64>() - 1.0).abs() < 1e-9);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertStats {
    /// T.
    pub tokens: usize,
    /// Each expert's sums.
    pub experts: Vec<ExpertSums>,
    /// `[n, n]`: sums of z_a z_b.
    pub gram: Vec<f64>,
    /// `[n, n]`: tokens that run both experts.
    pub both: Vec<f64>,
    /// `[n]`: sums of z.
    pub logits: Vec<f64>,
}

/// The sums of one expert. Those of outputs are empty or 0 where outputs were not asked for.
///
/// ```
/// use dsmoe_core::calibrate::{ExpertSums, LayerStream};
/// # use dsmoe_core::convert::{UpcycleOptions, upcycle};
/// # let work = tempfile::tempdir()?;
/// # let [dense, mixture] = ["dense", "mixture"].map(|name| work.path().join(name));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
/// # let family = "mixtral".to_owned();
/// # let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// # upcycle(&dense, &mixture, &options, &mut |_| {})?;
///
/// let mut stream = LayerStream::open_experts(&mixture, &[vec![1, 5, 9, 2]])?;
/// let (weights, experts) = (stream.layer(0)?, stream.experts(0)?);
/// stream.attend(&weights)?;
/// // With the outputs of all experts.
/// for ExpertSums { hard, norms, outputs, .. } in stream.expert_stats(&weights, &experts, true).experts {
///     println!("{hard} tokens, whose outputs have a mean norm of {:.3}", norms / f64::max(hard, 1.0));
///     assert_eq!(outputs.len(), stream.config().hidden);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertSums {
    /// Tokens that run it: sum of m.
    pub hard: f64,
    /// Sum of its softmax over the logits, or of its sigmoid.
    pub soft: f64,
    /// Sum of m c.
    pub coefficients: f64,
    /// Tokens whose logit is above the threshold of each budget that a DSMoE model stores, ascending with the budgets; empty for
    /// another model. The tokens are those of the budget in use.
    pub above: Vec<f64>,
    /// Sum of m |o|.
    pub norms: f64,
    /// Sum of m c |o|.
    pub weighted_norms: f64,
    /// `[hidden]`: sums of m o^2.
    pub squares: Vec<f64>,
    /// `[hidden]`: sums of o over all tokens.
    pub outputs: Vec<f64>,
    /// `[hidden]`: sums of m o.
    pub routed_outputs: Vec<f64>,
}

/// Receives the states of a sequence, what the FFN reads of them, and memory for a norm.
type SeeInput<'a> = dyn FnMut(&mut [f32], &[f32], [&mut Buf; 2]) + Send + 'a;

impl LayerStream {
    /// Opens the model with experts in `dir` and embeds `sequences`, which are of one length. Its layers are seen by
    /// [`LayerStream::attend`], [`LayerStream::expert_stats`] and [`LayerStream::join_experts`].
    ///
    /// # Errors
    /// `dir` holds a model without experts, or whose experts cannot be told apart; those of [`LayerStream::open`].
    pub fn open_experts(dir: &Path, sequences: &[Vec<u32>]) -> Result<LayerStream> {
        LayerStream::open_experts_on(alone(), dir, sequences)
    }

    /// Does as [`LayerStream::open_experts`] on the processes of `comm`, as [`LayerStream::open_on`] does. They divide attention
    /// among them, and each runs all experts.
    ///
    /// # Errors
    /// Those of [`LayerStream::open_experts`].
    pub fn open_experts_on(
        comm: &Arc<dyn Communicator>,
        dir: &Path,
        sequences: &[Vec<u32>],
    ) -> Result<LayerStream> {
        let config = Config::load(dir)?;
        let wrong = |problem: &str, help: &'static str| {
            Err(Error::field(&dir.join(CONFIG_FILE), "model_type", problem, help))
        };
        if config.is_dense() {
            let help = "use a model with experts, or make one of this one";
            return wrong("is of a model without experts", help);
        }
        for layer in 0..config.num_layers {
            if of_layer(&config, layer).expert_parts().is_none() {
                let problem = "is of a model whose experts cannot be seen one by one";
                return wrong(problem, "use experts that have gates");
            }
        }
        LayerStream::open_model(comm, dir, config, sequences)
    }

    /// Reads the experts of layer `i`.
    ///
    /// # Errors
    /// A file that cannot be read, or a weight that is not finite.
    ///
    /// # Panics
    /// The model has no layer `i`, or no experts.
    pub fn experts(&self, i: usize) -> Result<LayerExperts> {
        let ffn = of_layer(&self.config, i);
        let parts = ffn.expert_parts().expect("calibrate: a layer with experts");
        let layout = Layout::of(ffn.tensors());
        let mut params = Buf::zeros(layout.len());
        let mut reader = WeightReader::resume(self.names, &self.checkpoint);
        for entry in layout.entries() {
            let spec = TensorSpec { name: ffn_name(i, &entry.spec.name), ..entry.spec.clone() };
            reader.read(&spec, &mut params[entry.range.clone()])?;
        }
        let packed = ffn.pack(&params, self.precision);
        let budgets = self.config.moe.iter().flat_map(|moe| &moe.parts.budgets);
        let bars = budgets.map(|budget| budget.thresholds[i]).collect();
        Ok(LayerExperts { ffn, parts, params, packed, precision: self.precision, bars })
    }

    /// Sums what the experts of a layer do to all tokens, between [`LayerStream::attend`] and [`LayerStream::join_experts`]. The
    /// outputs of all experts are computed for `with_outputs` alone.
    ///
    /// # Panics
    /// The weights or the experts are not of this model.
    pub fn expert_stats(
        &mut self,
        weights: &LayerWeights,
        experts: &LayerExperts,
        with_outputs: bool,
    ) -> ExpertStats {
        let mut stats = ExpertStats::new(experts.num_experts());
        let packed = with_outputs.then(|| experts.pack_each());
        self.each_input(weights, &mut |_, x, _| stats.add(experts, packed.as_deref(), x));
        stats
    }

    /// Completes a layer after [`LayerStream::attend`]: adds the output of its experts to the states.
    ///
    /// # Panics
    /// The weights or the experts are not of this model.
    pub fn join_experts(&mut self, weights: &LayerWeights, experts: &LayerExperts) {
        let block = Block::of(&self.config);
        let (mut y, mut memory) = (Buf::zeros(self.seq * self.config.hidden), FfnScratch::default());
        self.each_input(weights, &mut |states, x, [h, rstd]| {
            experts.packed.forward(FfnInference { y: &mut y, x, record: None, scratch: &mut memory });
            block.join(states, &y, weights.norms[3].as_deref(), h, rstd);
        });
    }

    /// Shows what the FFN of a layer reads, sequence by sequence, with the states and memory for a norm.
    fn each_input(&mut self, weights: &LayerWeights, see: &mut SeeInput<'_>) {
        let LayerStream { config, seq, states, scratch, .. } = self;
        let len = (*seq * config.hidden).max(1);
        let block = Block::of(config);
        in_pool(|| {
            for states in states.chunks_exact_mut(len) {
                scratch.set_states(states, *seq);
                let Scratch { x, h, rstd, y, .. } = &mut *scratch;
                let input = block.input(weights.norms[2].as_deref(), h, rstd, x);
                y.resize(input.len());
                y.copy_from_slice(input);
                see(states, y, [h, rstd]);
            }
        });
    }
}

impl LayerExperts {
    /// Returns the number of experts.
    pub fn num_experts(&self) -> usize {
        self.parts.routed.len()
    }

    /// Returns the neurons of an expert.
    pub fn width(&self) -> usize {
        self.parts.width()
    }

    /// Returns the rows of an expert in gate, up and down, `[width, hidden]` each, down transposed.
    ///
    /// # Panics
    /// There is no such expert.
    pub fn rows(&self, expert: usize) -> [&[f32]; 3] {
        let ExpertParts { gated, routed, .. } = &self.parts;
        assert!(expert < routed.len(), "calibrate: expert {expert} of {}", routed.len());
        let len = self.width() * gated.hidden;
        let Weights { gate, up, down, .. } = gated.weights(&self.params);
        [gate, up, down].map(|matrix| &matrix[(routed.start + expert) * len..][..len])
    }

    /// Returns the biases of an expert's neurons in gate and up, where there are biases.
    fn biases(&self, expert: usize) -> Option<[&[f32]; 2]> {
        let Biases { gate, up, .. } = self.parts.gated.weights(&self.params).biases?;
        let start = (self.parts.routed.start + expert) * self.width();
        Some([gate, up].map(|bias| &bias[start..][..self.width()]))
    }

    /// Returns the layer with some of its experts alone, in order, and what all tokens run.
    ///
    /// # Panics
    /// There are fewer gates left than a token opens, or no such expert.
    #[must_use]
    pub fn keep(&self, kept: &[usize]) -> LayerExperts {
        let ffn = self.ffn.keep_experts(kept).expect("calibrate: a layer with experts");
        let parts = ffn.expert_parts().expect("calibrate: a layer with experts");
        let blocks = self.kept_blocks(kept);
        let (num_gates, gates) = match &self.parts.map {
            None => (self.num_experts(), kept.to_vec()),
            Some(map) => (map.num_gates(), map.keep(kept).0),
        };
        let (old, new) = (Layout::of(self.ffn.tensors()), Layout::of(ffn.tensors()));
        let mut params = Buf::zeros(new.len());
        for entry in new.entries() {
            let name = &entry.spec.name;
            let numbered = name.strip_prefix("experts.").and_then(|rest| rest.split_once('.'));
            let place = numbered.and_then(|(number, end)| Some((number.parse::<usize>().ok()?, end)));
            let from = |name: &str| &self.params[old.get(name).expect("a tensor of both").range.clone()];
            let to = &mut params[entry.range.clone()];
            match place {
                Some((number, end)) => to.copy_from_slice(from(&format!("experts.{}.{end}", kept[number]))),
                None if parts.gates.contains(&&**name) => copy_rows(to, from(name), num_gates, &gates),
                None if IN_BLOCKS.contains(&&**name) => {
                    copy_rows(to, from(name), self.parts.blocks, &blocks);
                }
                None => to.copy_from_slice(from(name)),
            }
        }
        let packed = ffn.pack(&params, self.precision);
        let (precision, bars) = (self.precision, self.bars.clone());
        LayerExperts { ffn, parts, params, packed, precision, bars }
    }

    /// Returns the blocks of neurons of some experts and of what all tokens run, in the order of both.
    fn kept_blocks(&self, kept: &[usize]) -> Vec<usize> {
        let ExpertParts { blocks, routed, .. } = &self.parts;
        let experts = kept.iter().map(|&expert| routed.start + expert);
        (0..routed.start).chain(experts).chain(routed.end..*blocks).collect()
    }

    /// Returns what the gates decide for `x` `[tokens, hidden]`.
    pub fn decide(&self, x: &[f32]) -> Decision {
        self.ffn.decide(&self.params, x).expect("calibrate: a layer whose gates decide")
    }

    fn pack_each(&self) -> Vec<PackedWeights> {
        // The bias of the down projection is no expert's.
        let none = vec![0.0; self.parts.gated.hidden];
        let pack = |expert| {
            let [gate, up, down] = self.rows(expert);
            let biases = self.biases(expert).map(|[gate, up]| Biases { gate, up, down: &none });
            let weights = Weights { gate, up, down, biases };
            PackedWeights::new(self.precision, &weights, self.one().dims(0))
        };
        (0..self.num_experts()).map(pack).collect()
    }

    /// Describes an expert alone.
    fn one(&self) -> Gated {
        Gated { intermediate: self.width(), ..self.parts.gated }
    }
}

/// Tensors whose rows in memory, or values, are neurons, expert after expert.
const IN_BLOCKS: [&str; 5] =
    ["gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj.bias", "up_proj.bias"];

/// Sets `to` to some of the `parts` equal parts of `from`, in order.
fn copy_rows(to: &mut [f32], from: &[f32], parts: usize, kept: &[usize]) {
    let len = from.len() / parts;
    for (to, &part) in to.chunks_exact_mut(len).zip(kept) {
        to.copy_from_slice(&from[part * len..][..len]);
    }
}

impl ExpertStats {
    fn new(n: usize) -> ExpertStats {
        ExpertStats {
            tokens: 0,
            experts: vec![ExpertSums::default(); n],
            gram: vec![0.0; n * n],
            both: vec![0.0; n * n],
            logits: vec![0.0; n],
        }
    }

    /// Adds the tokens of `x`; outputs of experts where they are packed.
    fn add(&mut self, layer: &LayerExperts, packed: Option<&[PackedWeights]>, x: &[f32]) {
        let decision = layer.decide(x);
        let Decision { logits, soft, routing } = &decision;
        let (tokens, n) = logits.dim();
        self.tokens += tokens;
        for (a, b) in (0..n).flat_map(|a| (0..n).map(move |b| (a, b))) {
            let products = logits.column(a).into_iter().zip(logits.column(b));
            self.gram[a * n + b] += products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        }
        let mut runs = vec![false; tokens * n];
        for e in 0..n {
            let above = |&bar: &f32| logits.column(e).iter().filter(|&&z| z > bar).count() as f64;
            let sums = &mut self.experts[e].above;
            sums.resize(layer.bars.len(), 0.0);
            sums.iter_mut().zip(&layer.bars).for_each(|(sum, bar)| *sum += above(bar));
            self.logits[e] += logits.column(e).iter().map(|&z| f64::from(z)).sum::<f64>();
            self.experts[e].soft += soft.column(e).sum();
            let tokens = &routing.tokens[routing.offsets[e]..routing.offsets[e + 1]];
            tokens.iter().for_each(|&t| runs[t as usize * n + e] = true);
        }
        for runs in runs.chunks_exact(n) {
            for (a, b) in (0..n).flat_map(|a| (0..n).map(move |b| (a, b))) {
                self.both[a * n + b] += f64::from(u8::from(runs[a] && runs[b]));
            }
        }
        let one = layer.one();
        self.experts.par_iter_mut().enumerate().for_each(|(e, sums)| {
            let slots = routing.offsets[e]..routing.offsets[e + 1];
            let coefficients = routing.coefficients[slots.clone()].iter().map(|&c| f64::from(c));
            sums.hard += slots.len() as f64;
            sums.coefficients += coefficients.clone().sum::<f64>();
            if let Some(packed) = packed {
                let (mut y, scratch) = (Buf::zeros(x.len()), &mut expert_ffn::Scratch::default());
                let (weights, dims) = (&packed[e], one.dims(tokens));
                expert_ffn::ForwardPacked { y: &mut y, x, weights, pairs: Pairs::Dense, dims, scratch }.run();
                sums.add_outputs(&y, one.hidden, routing.tokens[slots].iter().copied().zip(coefficients));
            }
        });
    }

    /// Returns the shares of slots that each expert takes: hard over the sum of hard; all 0 without tokens.
    pub fn usage(&self) -> Vec<f64> {
        let all: f64 = self.experts.iter().map(|sums| sums.hard).sum();
        self.experts.iter().map(|sums| if all > 0.0 { sums.hard / all } else { 0.0 }).collect()
    }

    /// Returns the correlation of the logits of two gates over tokens; 0 where one of them is constant, and 1 with itself.
    pub fn correlation(&self, a: usize, b: usize) -> f64 {
        if a == b {
            return 1.0;
        }
        let covariance = |a: usize, b: usize| {
            let n = self.experts.len();
            self.gram[a * n + b] - self.logits[a] * self.logits[b] / self.tokens.max(1) as f64
        };
        let least = |a: usize| 1e-12 * self.gram[a * (self.experts.len() + 1)];
        let variances = [covariance(a, a), covariance(b, b)];
        if variances[0] <= least(a) || variances[1] <= least(b) {
            return 0.0;
        }
        covariance(a, b) / (variances[0] * variances[1]).sqrt()
    }
}

impl ExpertSums {
    /// Adds the outputs `y` `[tokens, hidden]`, of which `routed` names the tokens that run the expert, with its coefficients.
    fn add_outputs(&mut self, y: &[f32], hidden: usize, routed: impl Iterator<Item = (u32, f64)>) {
        for sums in [&mut self.squares, &mut self.outputs, &mut self.routed_outputs] {
            sums.resize(hidden, 0.0);
        }
        for y in y.chunks_exact(hidden) {
            self.outputs.iter_mut().zip(y).for_each(|(sum, y)| *sum += f64::from(*y));
        }
        for (token, coefficient) in routed {
            let y = &y[token as usize * hidden..][..hidden];
            let mut squared = 0.0;
            for ((y, square), sum) in y.iter().zip(&mut self.squares).zip(&mut self.routed_outputs) {
                let y = f64::from(*y);
                squared += y * y;
                *square += y * y;
                *sum += y;
            }
            self.norms += squared.sqrt();
            self.weighted_norms += coefficient * squared.sqrt();
        }
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close_f64, f64s};

    use super::*;

    const SEQ: usize = 24;

    fn dot(a: &[f64], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
    }

    /// The output of an expert for one token, in f64.
    fn output(experts: &LayerExperts, e: usize, x: &[f64]) -> Vec<f64> {
        let [gate, up, down] = experts.rows(e);
        let mut y = vec![0.0; x.len()];
        let rows = gate.chunks_exact(x.len()).zip(up.chunks_exact(x.len())).zip(down.chunks_exact(x.len()));
        for ((gate, up), down) in rows {
            let (a, b) = (dot(x, gate), dot(x, up));
            let c = a / (1.0 + (-a).exp()) * b;
            y.iter_mut().zip(down).for_each(|(y, w)| *y += c * f64::from(*w));
        }
        y
    }

    /// Compares the statistics of a layer with loops over all tokens and experts.
    fn compare(name: &str, experts: &LayerExperts, stats: &ExpertStats, x: &[f32]) {
        let (hidden, n) = (experts.parts.gated.hidden, experts.num_experts());
        let decision = experts.decide(x);
        let mut want = ExpertStats::new(n);
        for (t, x) in f64s(x).chunks_exact(hidden).enumerate() {
            want.tokens += 1;
            let z: Vec<f64> = decision.logits.row(t).iter().map(|&z| f64::from(z)).collect();
            let runs = |e: usize| {
                let slots = decision.routing.offsets[e]..decision.routing.offsets[e + 1];
                let slot = slots.into_iter().find(|&slot| decision.routing.tokens[slot] as usize == t)?;
                Some(f64::from(decision.routing.coefficients[slot]))
            };
            let all: f64 = z.iter().map(|z| z.exp()).sum();
            for e in 0..n {
                want.logits[e] += z[e];
                for other in 0..n {
                    want.gram[e * n + other] += z[e] * z[other];
                    want.both[e * n + other] += f64::from(u8::from(runs(e).and(runs(other)).is_some()));
                }
                let sums = &mut want.experts[e];
                sums.soft += z[e].exp() / all;
                let y = output(experts, e, x);
                for list in [&mut sums.squares, &mut sums.outputs, &mut sums.routed_outputs] {
                    list.resize(hidden, 0.0);
                }
                sums.outputs.iter_mut().zip(&y).for_each(|(sum, y)| *sum += y);
                let Some(c) = runs(e) else { continue };
                let norm = y.iter().map(|y| y * y).sum::<f64>().sqrt();
                sums.hard += 1.0;
                sums.coefficients += c;
                sums.norms += norm;
                sums.weighted_norms += c * norm;
                sums.squares.iter_mut().zip(&y).for_each(|(sum, y)| *sum += y * y);
                sums.routed_outputs.iter_mut().zip(&y).for_each(|(sum, y)| *sum += y);
            }
        }
        assert_eq!((stats.tokens, &stats.both), (want.tokens, &want.both), "{name}");
        assert_close_f64(&format!("{name} gram"), &stats.gram, &want.gram, 1e-6);
        assert_close_f64(&format!("{name} logits"), &stats.logits, &want.logits, 1e-6);
        for (e, (got, want)) in stats.experts.iter().zip(&want.experts).enumerate() {
            let list = |sums: &ExpertSums| {
                vec![sums.hard, sums.soft, sums.coefficients, sums.norms, sums.weighted_norms]
            };
            for (what, got, want) in [
                ("numbers", &list(got), &list(want)),
                ("squares", &got.squares, &want.squares),
                ("outputs", &got.outputs, &want.outputs),
                ("routed outputs", &got.routed_outputs, &want.routed_outputs),
            ] {
                assert_close_f64(&format!("{name}, expert {e}: {what}"), got, want, 1e-6);
            }
        }
    }

    #[test]
    fn sums_are_those_of_loops_over_tokens_and_experts() {
        for name in ["mixtral", "olmoe"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/moe").join(name);
            let sequences: Vec<Vec<u32>> = (0..3)
                .map(|s| (0..SEQ).map(|t| ((7 * t + 13 * s * t + s) % 60 + 3) as u32).collect())
                .collect();
            let mut stream = LayerStream::open_experts(&dir, &sequences).unwrap();
            for i in 0..stream.config().num_layers {
                let (weights, experts) = (stream.layer(i).unwrap(), stream.experts(i).unwrap());
                stream.attend(&weights).unwrap();
                let stats = stream.expert_stats(&weights, &experts, true);
                let mut x = Vec::new();
                stream.each_input(&weights, &mut |_, of_sequence, _| x.extend_from_slice(of_sequence));
                compare(&format!("{name} layer {i}"), &experts, &stats, &x);
                assert!((stats.usage().iter().sum::<f64>() - 1.0).abs() < 1e-12);
                let without = stream.expert_stats(&weights, &experts, false);
                assert!(without.gram == stats.gram && without.experts[0].outputs.is_empty());
                stream.join_experts(&weights, &experts);
            }
        }
    }
}
