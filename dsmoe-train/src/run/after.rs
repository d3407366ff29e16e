//! The work behind a step: the thresholds of all budgets are fitted after the last one, and the held-out text is evaluated. A stop
//! leaves it to the next invocation, as the state says.

use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_core::Inference;
use dsmoe_kernels::comm::What;

use super::directory::STOP_FILE;
use super::options::RunOptions;
use super::{Observer, Trainer};
use crate::budgets;
use crate::checkpoint::Left;
use crate::error::Result;
use crate::eval::{Domain, EvalOptions, evaluate_domains_while};
use crate::ranks::all_go_on;

const AFTER: What = What::of("the work behind a step");

/// Returns whether this process is asked to stop.
pub(super) fn is_asked(options: &RunOptions, stop: &AtomicBool) -> bool {
    let stop_file = || options.comm.rank() == 0 && options.out.join(STOP_FILE).exists();
    stop.load(Ordering::Relaxed) || stop_file()
}

impl Trainer {
    /// Returns whether no process is asked to stop.
    fn goes_on(&self, stop: &AtomicBool) -> Result<bool> {
        all_go_on(&*self.options.comm, AFTER, !is_asked(&self.options, stop))
    }

    /// Does what is left of the last step. Returns false, with the rest still left, if a process is asked to stop.
    pub(super) fn finish_step(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<bool> {
        if self.state.left == Some(Left::Thresholds) {
            observer.note("the thresholds are fitted to the training text that comes next");
            if !self.fit_thresholds(observer, stop)? {
                return Ok(false);
            }
            self.state.left = Some(Left::Evaluation);
        }
        if self.state.left == Some(Left::Evaluation) {
            if !self.evaluate_held_out(observer, stop)? {
                return Ok(false);
            }
            self.state.left = None;
        }
        Ok(true)
    }

    /// Writes the thresholds of the controller into the model's configuration, and opens its gates as the default budget
    /// says.
    pub(super) fn store_thresholds(&mut self) -> Result<()> {
        match &self.state.thresholds {
            Some(controller) => budgets::store(&mut self.model, controller, self.state.config.active_target),
            None => Ok(()),
        }
    }

    /// Fits the thresholds of all budgets to the text that the next steps would read: in the first epoch the model has not seen
    /// it, and routers open more of text that they have seen. Returns false, with nothing changed, if a process is asked to stop
    /// meanwhile.
    pub(super) fn fit_thresholds(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<bool> {
        let Some(mut controller) = self.state.thresholds.clone() else { return Ok(true) };
        if !self.goes_on(stop)? {
            return Ok(false);
        }
        let ids = self.text_nearby(budgets::fit_tokens(self.state.config.active_target))?;
        self.stepper.engine.fetch(&mut self.model)?;
        self.stepper.engine.release();
        let dtype = self.state.config.dtype;
        let mut model = match self.stepper.engine.lend() {
            Some(weights) => Inference::lend(&self.model, weights, dtype)?,
            None => Inference::new_on(&self.model, dtype, self.options.device)?,
        };
        let text = (&ids[..], self.state.config.seq);
        let (target, options) = (self.state.config.active_target, &self.options);
        let is_fitted = budgets::fit(&mut controller, &mut model, text, target, &mut |done, all| {
            observer.fitting(done, all);
            all_go_on(&*options.comm, AFTER, !is_asked(options, stop))
        })?;
        if is_fitted {
            self.state.thresholds = Some(controller);
            self.store_thresholds()?;
        }
        Ok(is_fitted)
    }

    /// Returns whole sequences of the training text, up to `tokens` of them but at least one, that the next steps would read.
    fn text_nearby(&mut self, tokens: usize) -> Result<Vec<u32>> {
        let seq = self.state.config.seq;
        let done = self.state.step * self.state.config.micro_batches();
        let count = (tokens / (self.state.config.batch * seq)).max(1) as u64;
        let (mut ids, mut window) = (Vec::new(), Vec::new());
        for batch in done..done + count {
            for sample in self.order.batch_at(batch) {
                if ids.len() + seq > tokens.max(seq) {
                    return Ok(ids);
                }
                window.clear();
                self.mixture.window(sample, &mut window)?;
                ids.extend_from_slice(&window[..seq]);
            }
        }
        Ok(ids)
    }

    /// Evaluates the held-out text, if there is any. Returns false, with nothing recorded, if a process is asked to stop meanwhile.
    fn evaluate_held_out(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<bool> {
        self.stepper.engine.fetch(&mut self.model)?;
        self.store_thresholds()?;
        let parts = self.mixture.parts().iter();
        let domains: Vec<Domain<'_>> = parts
            .map(|part| Domain { name: &part.name, weight: part.share, ids: part.split.valid_tokens() })
            .collect();
        if domains.iter().all(|domain| domain.ids.len() < 2) {
            return Ok(true);
        }
        if !self.goes_on(stop)? {
            return Ok(false);
        }
        // A window of `seq` predicted tokens, as in training.
        let seq = (self.state.config.seq + 1).max(2);
        self.stepper.engine.release();
        let (dtype, options) = (self.state.config.dtype, &self.options);
        let model = match self.stepper.engine.lend() {
            Some(weights) => Inference::lend(&self.model, weights, dtype)?,
            None => Inference::new_on(&self.model, dtype, options.device)?,
        };
        let goes_on = &mut |done: usize, all: usize| {
            observer.evaluating(done, all);
            !is_asked(options, stop)
        };
        let on = (&*options.comm, true);
        let report = evaluate_domains_while(on, &model, &domains, EvalOptions::new(seq), goes_on)?;
        let Some(report) = report else { return Ok(false) };
        let step = self.state.step;
        if let Some(records) = &mut self.records {
            records.evaluation(step, &report)?;
        }
        observer.evaluated(step, &report);
        Ok(true)
    }
}
