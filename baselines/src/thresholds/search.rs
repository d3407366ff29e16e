//! The search of R-LLM: thresholds site by site, as sparse as the loss allows.

use dsmoe_core::calibrate::{Input, LayerStream, StateScorer, Tap};
use dsmoe_core::kept::{LINEARS, LayerThresholds};
use dsmoe_kernels::cross_entropy::IGNORE;
use serde::{Deserialize, Serialize};

use super::measure::INPUTS;
use super::quantile::add_token_quantiles;
use super::settings::Candidates;
use crate::error::{Error, Result};
use crate::method::Job;
use crate::partial::Partial;

/// The largest share that a search tries.
const LARGEST: f64 = 0.9;
const SMALLEST: f64 = 0.01;
const RATIOS: usize = 8;

/// Returns the shares that a search tries, descending.
pub(super) fn candidates(kind: Candidates) -> Vec<f64> {
    let rounded = |share: f64, digits: f64| (share * digits).round() / digits;
    let mut shares: Vec<f64> = match kind {
        Candidates::Linear => (1..=9).rev().map(|tenth| f64::from(tenth) / 10.0).collect(),
        Candidates::Exp => {
            let step = (SMALLEST / LARGEST).ln() / (RATIOS - 1) as f64;
            (0..RATIOS).map(|i| rounded(LARGEST * (step * i as f64).exp(), 100.0)).collect()
        }
    };
    shares.dedup();
    shares
}

/// Number of the sites of a layer.
pub(super) const SITES: usize = Input::ALL.len();

/// A search on its way, as an interrupted one leaves it: numbers as bits.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Begun {
    /// Sites that are done.
    sites: usize,
    /// The loss with the thresholds of these.
    base: u64,
    /// How often each candidate was chosen, by the number of the site in its layer.
    chosen: [Vec<usize>; SITES],
    /// The thresholds of the linears of every layer.
    inputs: Vec<[u32; LINEARS]>,
}

impl Begun {
    /// Returns what a search of that name has left, if it is of as many layers and candidates.
    fn read(partial: &Partial, name: &str, layers: usize, candidates: usize) -> Result<Option<Begun>> {
        let begun = partial.read::<Begun>(name)?.map(|part| part.value);
        Ok(begun.filter(|begun| {
            begun.sites <= layers * SITES
                && begun.inputs.len() == layers
                && begun.chosen.iter().all(|chosen| chosen.len() == candidates)
        }))
    }

    fn thresholds(&self) -> Vec<LayerThresholds> {
        let of = |inputs: &[u32; LINEARS]| LayerThresholds {
            inputs: inputs.map(f32::from_bits),
            ..LayerThresholds::NONE
        };
        self.inputs.iter().map(of).collect()
    }
}

/// Returns the thresholds with which the loss of no site exceeds `tolerance` times the loss before it. The number of the search in
/// its job names what it leaves when it is interrupted. `show` receives the number of sites that are done and of all.
///
/// The stream holds the states in front of a layer with all thresholds found so far, so that a trial runs that layer and those
/// behind it. `scorer` has packed the model once for all searches.
pub(super) fn search(
    scorer: &mut StateScorer,
    job: &Job<'_>,
    candidates: &[f64],
    (tolerance, number): (f64, usize),
    show: &mut dyn FnMut(usize, usize),
) -> Result<Vec<LayerThresholds>> {
    let mut stream = LayerStream::open(job.model, job.calibration)?;
    let layers = stream.config().num_layers;
    let mut loss = Loss::new(scorer, job.calibration);
    let name = format!("search-{number}");
    let (done, mut found, mut base, mut chosen) =
        match Begun::read(job.partial, &name, layers, candidates.len())? {
            Some(begun) => (begun.sites, begun.thresholds(), f64::from_bits(begun.base), begun.chosen),
            None => {
                let found = vec![LayerThresholds::NONE; layers];
                loss.set(&found);
                let base = loss.of(&stream, 0)?;
                (0, found, base, [(); SITES].map(|()| vec![0usize; candidates.len()]))
            }
        };
    loss.set(&found);
    for i in 0..layers {
        if done == layers * SITES {
            break;
        }
        let mut weights = stream.layer(i)?;
        for (site, input) in Input::ALL.into_iter().enumerate().skip(done.saturating_sub(i * SITES)) {
            show(i * SITES + site, layers * SITES);
            weights.thresholds = Some(found[i]);
            let width = weights.linears[linear_of(input)].inputs;
            let (mut sums, mut tokens) = (vec![0.0; candidates.len()], 0);
            stream.forward(&weights, &mut |tap: Tap<'_>| {
                if tap.input == input {
                    tokens += tap.x.len() / width;
                    add_token_quantiles(&mut sums, &tap, width, candidates);
                }
            })?;
            let mut loss_of = |at: usize| {
                let mut trial = found[i];
                set(&mut trial, input, (sums[at] / tokens as f64) as f32);
                loss.scorer.set_thresholds(i, trial);
                Ok((loss.of(&stream, i)?, trial))
            };
            if let Some((at, (value, thresholds))) = accept(&chosen[site], base, tolerance, &mut loss_of)? {
                chosen[site][at] += 1;
                (base, found[i]) = (value, thresholds);
            }
            loss.scorer.set_thresholds(i, found[i]);
            let begun = Begun {
                sites: i * SITES + site + 1,
                base: base.to_bits(),
                chosen: chosen.clone(),
                inputs: found.iter().map(|layer| layer.inputs.map(f32::to_bits)).collect(),
            };
            job.partial.keep(&name, &begun, &[])?;
        }
        weights.thresholds = Some(found[i]);
        stream.advance(&weights)?;
    }
    show(layers * SITES, layers * SITES);
    Ok(found)
}

/// A candidate's number, with the loss and the thresholds that it gives.
type Accepted = (usize, (f64, LayerThresholds));

/// Starts at the candidate that was chosen most often, and goes to smaller shares while the loss stays below the tolerance;
/// if the start does not, goes to larger ones until one does.
fn accept(
    chosen: &[usize],
    base: f64,
    tolerance: f64,
    loss_of: &mut dyn FnMut(usize) -> Result<(f64, LayerThresholds)>,
) -> Result<Option<Accepted>> {
    let most = chosen.iter().copied().max().unwrap_or(0);
    let start = chosen.iter().position(|&times| times == most).unwrap_or(0);
    let mut last = None;
    for at in start..chosen.len() {
        let trial = loss_of(at)?;
        if trial.0 / base >= tolerance {
            break;
        }
        last = Some((at, trial));
    }
    let mut at = start;
    while last.is_none() && at > 0 {
        at -= 1;
        let trial = loss_of(at)?;
        if trial.0 / base < tolerance {
            last = Some((at, trial));
        }
    }
    Ok(last)
}

fn linear_of(input: Input) -> usize {
    INPUTS.iter().position(|&other| other == input).expect("every input is read")
}

/// Sets the threshold of the linears that read `input`.
fn set(thresholds: &mut LayerThresholds, input: Input, threshold: f32) {
    for linear in (0..LINEARS).filter(|&linear| INPUTS[linear] == input) {
        thresholds.inputs[linear] = threshold;
    }
}

/// The loss of a model on calibration text.
struct Loss<'a> {
    scorer: &'a mut StateScorer,
    /// The next token of every token of the text; none of the last one of a sequence.
    targets: Vec<u32>,
    losses: Vec<f32>,
}

impl<'a> Loss<'a> {
    fn new(scorer: &'a mut StateScorer, text: &[Vec<u32>]) -> Loss<'a> {
        let next = |ids: &Vec<u32>| ids[1..].iter().copied().chain([IGNORE]).collect::<Vec<u32>>();
        let targets: Vec<u32> = text.iter().flat_map(next).collect();
        let losses = vec![0.0; targets.len()];
        Loss { scorer, targets, losses }
    }

    /// Sets the thresholds of all layers.
    fn set(&mut self, thresholds: &[LayerThresholds]) {
        for (i, &of_layer) in thresholds.iter().enumerate() {
            self.scorer.set_thresholds(i, of_layer);
        }
    }

    /// Returns the mean loss of a token, from states in front of layer `first`.
    fn of(&mut self, stream: &LayerStream, first: usize) -> Result<f64> {
        self.scorer.score(&mut self.losses, stream, first, &self.targets);
        let tokens = self.targets.iter().filter(|&&target| target != IGNORE).count();
        let mean = self.losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / tokens as f64;
        match mean.is_finite() {
            true => Ok(mean),
            false => Err(Error::numeric("the loss", "is not finite", "check the model with eval")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_those_of_the_paper() {
        assert_eq!(candidates(Candidates::Linear), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]);
        assert_eq!(candidates(Candidates::Exp), [0.9, 0.47, 0.25, 0.13, 0.07, 0.04, 0.02, 0.01]);
    }

    #[test]
    fn a_site_starts_at_the_usual_candidate_and_falls_back_to_larger_shares() {
        // Losses over the base by candidate: the first three pass at 1.1.
        let losses = [1.0, 1.05, 1.09, 1.2, 1.3];
        let run = |chosen: &[usize], tolerance: f64| {
            let mut asked = Vec::new();
            let mut loss_of = |at: usize| {
                asked.push(at);
                Ok((losses[at], LayerThresholds::NONE))
            };
            let found = accept(chosen, 1.0, tolerance, &mut loss_of).unwrap();
            (found.map(|(at, _)| at), asked)
        };
        assert_eq!(run(&[0; 5], 1.1), (Some(2), vec![0, 1, 2, 3]));
        assert_eq!(run(&[0, 1, 0, 0, 0], 1.1), (Some(2), vec![1, 2, 3]));
        assert_eq!(run(&[0, 0, 0, 0, 2], 1.1), (Some(2), vec![4, 3, 2]));
        // Nothing passes at 1; everything does without a bound.
        assert_eq!(run(&[0, 1, 0, 0, 0], 1.0), (None, vec![1, 0]));
        assert_eq!(run(&[0; 5], f64::INFINITY), (Some(4), vec![0, 1, 2, 3, 4]));
    }
}
