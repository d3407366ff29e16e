//! Gradients and losses of given windows.

use std::sync::Arc;

use dsmoe_core::model::{Batch, Workspace};
use dsmoe_core::params::Layout;
use dsmoe_core::{Device, Inference, Model};
use dsmoe_datasets::Mixture;
use dsmoe_datasets::mixture::Sample;
use dsmoe_kernels::comm::Alone;
use dsmoe_router::SparsityOver;

use super::stream::Window;
use crate::config::{Budget, TrainConfig};
use crate::engine::{self, Engine, EngineOptions, StepResult};
use crate::error::{Error, Result};
use crate::optim::AdamW;
use crate::ranks::Zero;
use crate::step::{Gates, step_args};

/// Windows that are scored together.
const SCORED_TOGETHER: usize = 8;

/// Reads a window: one more token than a sequence has.
pub(super) fn read(texts: &[Mixture], at: Window, out: &mut Vec<u32>) -> Result<()> {
    Ok(texts[at.task].window(Sample { part: 0, window: at.window }, out)?)
}

/// Forward and backward passes of one shape. The optimiser of the engine is empty: updates are made elsewhere.
#[derive(Debug)]
pub(super) struct Passes {
    pub(super) engine: Box<dyn Engine>,
    config: TrainConfig,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    window: Vec<u32>,
}

impl Passes {
    /// Allocates the memory for the batches of `config`.
    pub(super) fn new(model: &Model, config: &TrainConfig) -> Result<Passes> {
        let options = EngineOptions {
            tokens: config.batch * config.seq,
            seq: config.seq,
            lanes: 1,
            accumulate: config.accumulate,
            zero: Zero::Moments,
            precision: config.dtype,
            device: Device::Cpu,
            recompute: false,
        };
        let nothing = AdamW::new(&Layout::default());
        let engine = engine::new(model, nothing, options, Arc::new(Alone))?;
        let (config, inputs, targets, window) = (config.clone(), Vec::new(), Vec::new(), Vec::new());
        Ok(Passes { engine, config, inputs, targets, window })
    }

    /// Computes the gradient of the mean loss of `windows`, which the engine then holds, as in step `step`, counted from 0.
    pub(super) fn gradient(
        &mut self,
        model: &Model,
        texts: &[Mixture],
        windows: &[Window],
        (step, sparsity): (u64, f32),
    ) -> Result<StepResult> {
        let micro_batches = self.config.micro_batches();
        self.engine.begin(step + 1, micro_batches)?;
        let over = match self.config.budget() {
            Budget::Weight(_) => SparsityOver::Active,
            Budget::Target(_) | Budget::Range(..) => SparsityOver::All,
        };
        let gates = Gates { sparsity, over, thresholds: None };
        for (micro, windows) in windows.chunks(self.config.batch).enumerate() {
            self.inputs.clear();
            self.targets.clear();
            for &at in windows {
                self.window.clear();
                read(texts, at, &mut self.window)?;
                self.inputs.extend_from_slice(&self.window[..self.config.seq]);
                self.targets.extend_from_slice(&self.window[1..]);
            }
            let args = step_args(&self.config, &gates, step * micro_batches + micro as u64);
            let batch = Batch { inputs: &self.inputs, targets: &self.targets, seq: self.config.seq };
            if !self.engine.micro_batch(model, batch, &args)? {
                break;
            }
        }
        self.engine.end_lane()?;
        let result = self.engine.finish(model, step + 1, false)?;
        match result.non_finite {
            None => Ok(result),
            Some(place) => {
                let intact = "the tasks before are intact".to_owned();
                Err(Error::NonFinite { step: step + 1, place, intact })
            }
        }
    }
}

/// Returns the mean of the squared gradients of single windows: the empirical Fisher information. Returns `None` if `goes_on` returns
/// false before all are added.
pub(super) fn fisher(
    model: &Model,
    texts: &[Mixture],
    windows: &[Window],
    config: &TrainConfig,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Option<Vec<f32>>> {
    let config = TrainConfig { batch: 1, accumulate: 1, lanes: Some(1), ..config.clone() };
    let mut passes = Passes::new(model, &config)?;
    let mut sum = vec![0.0; model.layout().len()];
    for window in windows {
        if !goes_on() {
            return Ok(None);
        }
        passes.gradient(model, texts, std::slice::from_ref(window), (0, 0.0))?;
        sum.iter_mut().zip(&*passes.engine.grads()?).for_each(|(sum, g)| *sum += g * g);
    }
    let count = windows.len().max(1) as f32;
    sum.iter_mut().for_each(|sum| *sum /= count);
    Ok(Some(sum))
}

/// Returns the mean loss of every window, or `None` if `goes_on` returns false before all are known.
pub(super) fn losses(
    model: &Model,
    texts: &[Mixture],
    windows: &[Window],
    config: &TrainConfig,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Option<Vec<f32>>> {
    let packed = Inference::new(model, config.dtype);
    let mut workspace = Workspace::default();
    let (mut found, mut window) = (Vec::with_capacity(windows.len()), Vec::new());
    for windows in windows.chunks(SCORED_TOGETHER) {
        if !goes_on() {
            return Ok(None);
        }
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for &at in windows {
            window.clear();
            read(texts, at, &mut window)?;
            inputs.extend_from_slice(&window[..config.seq]);
            targets.extend_from_slice(&window[1..]);
        }
        let mut losses = vec![0.0; inputs.len()];
        let batch = Batch { inputs: &inputs, targets: &targets, seq: config.seq };
        packed.score(&mut losses, batch, None, &mut workspace)?;
        let mean = |losses: &[f32]| losses.iter().map(|&x| f64::from(x)).sum::<f64>() / losses.len() as f64;
        found.extend(losses.chunks(config.seq).map(|losses| mean(losses) as f32));
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use dsmoe_core::init::LlamaSizes;
    use dsmoe_core::params::Stored;
    use dsmoe_datasets::{TokenSource, TokenStream};
    use serde_json::Value;

    use super::super::sharpness::{Slopes, ascend, step_scale};
    use super::*;
    use crate::optim::grad_norms;

    /// The values that the script gives a tensor of that name, as stored.
    fn formula(name: &str, count: usize) -> Vec<f32> {
        let seed =
            name.bytes().enumerate().map(|(i, byte)| (i + 1) * usize::from(byte)).sum::<usize>() % 9973;
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 10_007) as f64 / 10_007.0 - 0.5;
        let scaled = |v: f64| if name.contains("norm") { 1.0 + 0.1 * v } else { 0.4 * v };
        (0..count).map(|i| scaled(value(i)) as f32).collect()
    }

    /// Where the value that is stored at `at` lies in memory.
    fn place(entry: &dsmoe_core::params::Entry, at: usize) -> usize {
        let within = match (entry.spec.stored, &entry.spec.stored_shape()[..]) {
            (Stored::Transposed, &[rows, cols]) => at % cols * rows + at / cols,
            _ => at,
        };
        entry.range.start + within
    }

    #[test]
    fn gradients_and_scores_are_those_of_pytorch() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sharpness.json");
        let wanted: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let sizes = LlamaSizes {
            vocab: 32,
            hidden: 16,
            intermediate: 24,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            positions: 32,
            bos_eos: [1, 2],
        };
        let mut model = Model::new(sizes.config().unwrap());
        for entry in model.layout().entries().to_vec() {
            for (at, value) in formula(&entry.spec.name, entry.range.len()).into_iter().enumerate() {
                model.params_mut()[place(&entry, at)] = value;
            }
        }
        let ids = (0..25u64).map(|i| ((5 * i * i + 3 * i + 7) % 31) as u32).collect();
        let stream = TokenStream { ids, doc_starts: vec![0] };
        let source = TokenSource { name: "text".to_owned(), weight: 1.0, tokens: (&stream).into() };
        let (batch, seq, steps) = (3, 8, Some(1));
        let config = TrainConfig { batch, seq, steps, valid_fraction: 0.0, ..TrainConfig::default() };
        let config = config.resolve().unwrap();
        let texts = [Mixture::new(&[source], config.split_options(), None).unwrap()];
        let windows: Vec<Window> = (0..3).map(|window| Window { task: 0, window }).collect();

        let mut passes = Passes::new(&model, &config).unwrap();
        let first = passes.gradient(&model, &texts, &windows, (0, 0.0)).unwrap();
        let here = passes.engine.grads().unwrap().to_vec();
        let fisher = fisher(&model, &texts, &windows, &config, &mut || true).unwrap().unwrap();
        let scale = step_scale(0.05, first.norms.all);
        let saved = model.params().to_vec();
        ascend(model.params_mut(), &here, scale);
        let second = passes.gradient(&model, &texts, &windows, (0, 0.0)).unwrap();
        let uphill = passes.engine.grads().unwrap().to_vec();
        let slopes = Slopes { here: &here, uphill: &uphill, scale, fisher: &fisher };
        let scores = slopes.scores(&saved);

        let number = |value: &Value| value.as_f64().unwrap();
        for (got, key) in
            [(first.lm_loss, "loss"), (second.lm_loss, "uphill_loss"), (first.norms.all, "norm")]
        {
            let want = number(&wanted[key]);
            assert!((got / want - 1.0).abs() < 1e-5, "{key}: {got} and {want}");
        }
        assert!(second.lm_loss > first.lm_loss);
        assert_eq!(grad_norms(model.layout(), &here), first.norms);
        let tensors = wanted["tensors"].as_object().unwrap();
        assert_eq!(tensors.len(), model.layout().entries().len());
        for entry in model.layout().entries() {
            let wanted = &tensors[&entry.spec.name];
            let places: Vec<usize> = wanted["places"]
                .as_array()
                .unwrap()
                .iter()
                .map(|at| place(entry, at.as_u64().unwrap() as usize))
                .collect();
            for (key, got, tolerance) in [
                ("here", &here, 1e-5),
                ("uphill", &uphill, 1e-5),
                ("fisher", &fisher, 1e-5),
                // A curvature is a small difference over a small step.
                ("score", &scores, 2e-4),
            ] {
                let want: Vec<f64> = wanted[key].as_array().unwrap().iter().map(number).collect();
                let largest = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                for (&at, want) in places.iter().zip(want) {
                    let found = f64::from(got[at]);
                    let name = &entry.spec.name;
                    assert!(
                        (found - want).abs() < tolerance * largest + 1e-9,
                        "{name} {key}: {found}, {want}"
                    );
                }
            }
        }
        let losses = losses(&model, &texts, &windows, &config, &mut || true).unwrap().unwrap();
        let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / 3.0;
        assert!((mean - second.lm_loss).abs() < 1e-5, "{mean} and {}", second.lm_loss);
    }
}
