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

/// Returns the mean of the squared gradients of single windows: the empirical Fisher information.
pub(super) fn fisher(
    model: &Model,
    texts: &[Mixture],
    windows: &[Window],
    config: &TrainConfig,
) -> Result<Vec<f32>> {
    let config = TrainConfig { batch: 1, accumulate: 1, lanes: Some(1), ..config.clone() };
    let mut passes = Passes::new(model, &config)?;
    let mut sum = vec![0.0; model.layout().len()];
    for window in windows {
        passes.gradient(model, texts, std::slice::from_ref(window), (0, 0.0))?;
        sum.iter_mut().zip(&*passes.engine.grads()?).for_each(|(sum, g)| *sum += g * g);
    }
    let count = windows.len().max(1) as f32;
    sum.iter_mut().for_each(|sum| *sum /= count);
    Ok(sum)
}

/// Returns the mean loss of every window.
pub(super) fn losses(
    model: &Model,
    texts: &[Mixture],
    windows: &[Window],
    config: &TrainConfig,
) -> Result<Vec<f32>> {
    let packed = Inference::new(model, config.dtype);
    let mut workspace = Workspace::default();
    let (mut found, mut window) = (Vec::with_capacity(windows.len()), Vec::new());
    for windows in windows.chunks(SCORED_TOGETHER) {
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
    Ok(found)
}
