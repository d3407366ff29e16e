//! Shares of inputs to skip, by layer and linear, from one pass over the dense model.

use std::collections::BTreeMap;

use dsmoe_core::calibrate::{Down, Input, LayerStream, LayerWeights, Tap};
use dsmoe_core::kept::{LINEARS, LayerThresholds};
use dsmoe_kernels::{Precision, swiglu};
use serde::{Deserialize, Serialize};

use super::measure::{INPUTS, weights};
use super::quantile::{Magnitudes, Table};
use super::settings::{Choose, Settings};
use crate::error::{Error, Result};
use crate::method::{Job, Progress};
use crate::partial::{Pace, Partial};
use crate::states::States;

/// Largest share of inputs that a linear skips.
const MOST_SKIPPED: f64 = 0.98;
/// Of the calibration text this part, the last, measures errors of layers.
const HELD_BACK: usize = 4;
/// The number of this pass; those that measure shares follow.
const PASS: usize = 0;
/// The part with the shares of a layer that is not finished.
const TRIED: &str = "tried";

/// The shares of inputs that a layer skips.
pub(super) struct LayerShares {
    /// Quantiles of the magnitudes that each linear reads.
    inputs: [Table; LINEARS],
    /// Quantiles of the magnitudes of gates.
    gates: Option<Table>,
    /// Share of inputs that each linear skips, and of neurons; of these one is 0.
    skipped: [f64; LINEARS],
    neurons: f64,
    /// Weights of each linear.
    weights: [f64; LINEARS],
}

/// The shares of a finished layer, as an interrupted job leaves them: numbers as bits.
#[derive(Serialize, Deserialize)]
struct KeptShares {
    /// Quantiles of each linear, and of gates.
    inputs: [Vec<u32>; LINEARS],
    gates: Option<Vec<u32>>,
    skipped: [u64; LINEARS],
    neurons: u64,
}

/// The name of the part of a finished layer.
fn part_of(layer: usize) -> String {
    format!("shares-{layer}")
}

impl LayerShares {
    /// Returns the shares of the first layers, which an interrupted job has finished; `weights` has those of all.
    fn finished(partial: &Partial, weights: &[[f64; LINEARS]]) -> Result<Vec<LayerShares>> {
        let parts = partial.first::<KeptShares>(weights.len(), part_of)?;
        let shares = |KeptShares { inputs, gates, skipped, neurons }, &weights| LayerShares {
            inputs: inputs.map(Table::of_bits),
            gates: gates.map(Table::of_bits),
            skipped: skipped.map(f64::from_bits),
            neurons: f64::from_bits(neurons),
            weights,
        };
        Ok(parts.into_iter().zip(weights).map(|(part, weights)| shares(part.value, weights)).collect())
    }

    fn keep(&self, partial: &Partial, layer: usize) -> Result<()> {
        let kept = KeptShares {
            inputs: self.inputs.each_ref().map(Table::bits),
            gates: self.gates.as_ref().map(Table::bits),
            skipped: self.skipped.map(f64::to_bits),
            neurons: self.neurons.to_bits(),
        };
        partial.keep(&part_of(layer), &kept, &[])
    }

    /// Returns the largest factor that leaves the ratios of the shares.
    pub(super) fn most(&self) -> f64 {
        let largest = self.skipped.iter().copied().fold(self.neurons, f64::max);
        if largest > 0.0 { 1.0 / largest } else { f64::MAX }
    }

    /// Returns the thresholds that skip `factor` times the shares.
    pub(super) fn thresholds(&self, factor: f64) -> LayerThresholds {
        let share = |share: f64| (share * factor).min(MOST_SKIPPED);
        LayerThresholds {
            inputs: std::array::from_fn(|i| self.inputs[i].threshold(share(self.skipped[i]))),
            gate: self.gates.as_ref().map_or(0.0, |gates| gates.threshold(share(self.neurons))),
            ..LayerThresholds::NONE
        }
    }

    /// Returns the weights that it skips.
    fn skipped_weights(&self) -> f64 {
        let by_inputs: f64 =
            self.skipped.iter().zip(&self.weights).map(|(share, weights)| share * weights).sum();
        by_inputs + self.neurons * (self.weights[5] + self.weights[6])
    }
}

/// Returns the factor of the shares that skips the share `skipped` of all weights, if inputs stayed as they are.
pub(super) fn factor(layers: &[LayerShares], skipped: f64) -> f64 {
    let (of_layers, all) = layers.iter().fold((0.0, 0.0), |(sum, all), layer| {
        (sum + layer.skipped_weights(), all + layer.weights.iter().sum::<f64>())
    });
    skipped * all / of_layers
}

/// Passes the calibration text through the dense model, and returns every layer's shares; `skipped` is that of all weights. Layers
/// that an interrupted job has finished are not surveyed again.
pub(super) fn survey(
    job: &Job<'_>,
    settings: &Settings,
    skipped: f64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<LayerShares>> {
    let mut stream = LayerStream::open(job.model, job.calibration)?;
    let (layers, all) = (stream.config().num_layers, weights(stream.config()));
    let mut found = LayerShares::finished(job.partial, &all)?;
    let mut states = States::of(job.partial, PASS);
    let passed = states.restore(&mut stream, found.len())?;
    let mut greedy = Greedy { step: settings.step, skipped, partial: job.partial, pace: Pace::new() };
    // A layer of teal is many trials, each of which may take seconds.
    let (stage, of_layer) = match settings.choose {
        Choose::Teal => ("trials", greedy.trials()),
        Choose::Cats | Choose::Uniform | Choose::Search => ("layers", 1),
    };
    let total = of_layer.saturating_mul(layers as u64);
    for (i, of_linears) in all.into_iter().enumerate().skip(passed) {
        let before = of_layer.saturating_mul(i as u64);
        let mut show =
            |done: u64| progress(Progress { stage, done: before.saturating_add(done.min(of_layer)), total });
        show(0);
        let mut weights = stream.layer(i)?;
        if i == found.len() {
            let (inputs, gates) = tables(&mut stream, &weights, settings.choose == Choose::Cats)?;
            let (mut shares, mut neurons) = ([0.0; LINEARS], 0.0);
            match settings.choose {
                Choose::Cats => neurons = 1.0,
                Choose::Teal => shares = greedy.shares(&mut stream, &mut weights, &inputs, &mut show)?,
                Choose::Uniform | Choose::Search => shares = [1.0; LINEARS],
            }
            let shares = LayerShares { inputs, gates, skipped: shares, neurons, weights: of_linears };
            shares.keep(job.partial, i)?;
            found.push(shares);
            weights.thresholds = None;
        }
        if i + 1 < layers {
            stream.advance(&weights)?;
            states.keep(i, &stream)?;
        }
    }
    progress(Progress { stage, done: total, total });
    Ok(found)
}

/// Returns the quantiles of what the linears of a layer read, and of its gates.
fn tables(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    with_gates: bool,
) -> Result<([Table; LINEARS], Option<Table>)> {
    let tokens = stream.states().len() / stream.config().hidden;
    let [.., heads, gate, _, down] = &weights.linears;
    let (hidden, neurons) = (gate.inputs, down.inputs);
    let widths = [
        (Input::Attention, hidden),
        (Input::Heads, heads.inputs),
        (Input::Ffn, hidden),
        (Input::Neurons, neurons),
    ];
    let mut found: Vec<Magnitudes> =
        widths.iter().map(|&(_, width)| Magnitudes::new(tokens, width)).collect();
    let mut gates = with_gates.then(|| Magnitudes::new(tokens, neurons));
    let linear = Down::new(Precision::F32, &gate.weight, hidden, gate.bias.as_deref());
    let activation = stream.config().architecture.activation;
    let (mut values, mut ones, mut finite) = (Vec::new(), Vec::new(), true);
    stream.forward(weights, &mut |tap: Tap<'_>| {
        let site = Input::ALL.iter().position(|&input| input == tap.input).expect("one of four");
        finite &= tap.x.iter().all(|x| x.is_finite());
        found[site].add(tap.x, widths[site].1);
        if let (Input::Ffn, Some(gates)) = (tap.input, &mut gates) {
            values.resize(tap.x.len() / hidden * neurons, 0.0f32);
            ones.resize(values.len(), 1.0f32);
            linear.forward(&mut values, tap.x);
            let a = values.clone();
            swiglu::Forward { c: &mut values, a: &a, b: &ones, activation }.run();
            gates.add(&values, neurons);
        }
    })?;
    if !finite {
        let help = "check the model with eval";
        return Err(Error::numeric(
            format!("layer {}", weights.layer),
            "has inputs that are not finite",
            help,
        ));
    }
    let by_site: BTreeMap<usize, Table> = found.into_iter().map(Magnitudes::table).enumerate().collect();
    let of = |input: Input| Input::ALL.iter().position(|&other| other == input).expect("one of four");
    Ok((INPUTS.map(|input| by_site[&of(input)].clone()), gates.map(Magnitudes::table)))
}

/// The shares of a layer that is not finished, as an interrupted job leaves them: numbers as bits.
#[derive(Serialize, Deserialize)]
struct Tried {
    layer: usize,
    shares: [u64; LINEARS],
}

/// The choice of shares inside a layer. Every step skips inputs of one linear, that whose loss moves the layer's output least.
struct Greedy<'a> {
    /// The share of the layer's weights that a step skips, times the number of linears.
    step: f64,
    /// The share of the layer's weights that all steps skip.
    skipped: f64,
    partial: &'a Partial,
    pace: Pace,
}

impl Greedy<'_> {
    /// Returns the number of trials of a layer: every linear in every step.
    fn trials(&self) -> u64 {
        let steps = (self.skipped * LINEARS as f64 / self.step).ceil() as u64;
        steps.saturating_mul(LINEARS as u64).max(1)
    }

    /// Returns the share of inputs that each linear of a layer skips. `show` receives the number of trials that are done.
    fn shares(
        &mut self,
        stream: &mut LayerStream,
        weights: &mut LayerWeights,
        tables: &[Table; LINEARS],
        show: &mut dyn FnMut(u64),
    ) -> Result<[f64; LINEARS]> {
        let sequences = stream.states().len() / (stream.config().hidden * stream.seq()).max(1);
        let first = sequences - sequences.div_ceil(HELD_BACK);
        let is_seen = move |sequence: usize| sequence >= first;
        let mut dense = Vec::new();
        stream.outputs_of(weights, &is_seen, &mut |_, y| dense.extend_from_slice(y));
        let sizes = weights.linears.each_ref().map(|linear| (linear.outputs * linear.inputs) as f64);
        let all: f64 = sizes.iter().sum();
        let steps = sizes.map(|size| self.step * all / (LINEARS as f64 * size));
        let mut shares = self.tried(weights.layer)?;
        let skips = |shares: &[f64; LINEARS]| {
            shares.iter().zip(sizes).map(|(share, size)| share * size).sum::<f64>() / all
        };
        let mut trials = (skips(&shares) * LINEARS as f64 / self.step).round() as u64 * LINEARS as u64;
        while skips(&shares) < self.skipped {
            let mut best: Option<(f64, [f64; LINEARS])> = None;
            for linear in 0..LINEARS {
                show(trials);
                trials += 1;
                let mut trial = shares;
                trial[linear] += steps[linear];
                if trial[linear] > MOST_SKIPPED {
                    continue;
                }
                let inputs = std::array::from_fn(|i| tables[i].threshold(trial[i]));
                weights.thresholds = Some(LayerThresholds { inputs, ..LayerThresholds::NONE });
                let (mut error, mut at) = (0.0, 0);
                stream.outputs_of(weights, &is_seen, &mut |_, y| {
                    let of_sequence =
                        y.iter().zip(&dense[at..]).map(|(y, dense)| f64::from(y - dense).powi(2));
                    error += of_sequence.sum::<f64>();
                    at += y.len();
                });
                if best.as_ref().is_none_or(|(least, _)| error < *least) {
                    best = Some((error, trial));
                }
            }
            match best {
                Some((_, trial)) => shares = trial,
                None => break,
            }
            if self.pace.is_due() {
                let tried = Tried { layer: weights.layer, shares: shares.map(f64::to_bits) };
                self.partial.keep(TRIED, &tried, &[])?;
            }
        }
        Ok(shares)
    }

    /// Returns the shares that an interrupted job has chosen of this layer; at the start none is skipped.
    fn tried(&self, layer: usize) -> Result<[f64; LINEARS]> {
        let tried = self.partial.read::<Tried>(TRIED)?.map(|part| part.value);
        let of_layer = tried.filter(|tried| tried.layer == layer);
        Ok(of_layer.map_or([0.0; LINEARS], |tried| tried.shares.map(f64::from_bits)))
    }
}
