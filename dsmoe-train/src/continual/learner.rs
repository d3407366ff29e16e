//! The steps of one task.

use dsmoe_core::{Inference, Model};
use dsmoe_datasets::Mixture;
use dsmoe_router::BudgetController;

use super::dual::DualAveraging;
use super::inside::{Checkpoints, Inside};
use super::passes::{Passes, fisher, losses};
use super::prune::{Schedule, masks_of, masks_of_nonzero};
use super::settings::{Method, Over, Prune, When};
use super::sharpness::{Slopes, ascend, step_scale};
use super::stream::{Stream, Window};
use crate::config::TrainConfig;
use crate::error::Result;
use crate::eval::{EvalOptions, evaluate_while};
use crate::optim::{AdamW, GradNorms, Update, clip_scale, grad_norms};
use crate::run::held;

/// Windows whose gradients make up the Fisher information of scores.
const FISHER_WINDOWS: usize = 8;

/// The inputs that a task does not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given<'a> {
    /// The number of the task.
    pub(super) task: usize,
    /// The settings of its steps, resolved.
    pub(super) config: &'a TrainConfig,
    pub(super) method: &'a Method,
    /// The texts of all tasks.
    pub(super) texts: &'a [Mixture],
    /// The windows kept of earlier tasks.
    pub(super) replay: &'a [Window],
    /// The weights after the last task, and how firmly they are held.
    pub(super) anchor: Option<&'a Anchor>,
}

/// Weights that the next tasks are pulled to.
#[derive(Debug)]
pub(super) struct Anchor {
    pub(super) params: Vec<f32>,
    pub(super) fisher: Vec<f32>,
}

/// The results of a task's steps.
#[derive(Clone, Debug, Default)]
pub(super) struct Learnt {
    /// Loss of the last step.
    pub(super) loss: f64,
    /// The increase of the held-out loss by pruning at the end.
    pub(super) jump: Option<f64>,
    /// The mean held-out losses of all tasks.
    pub(super) losses: Vec<f64>,
    /// Mean share of active experts in all steps.
    pub(super) active: Option<f64>,
    /// Tokens of all passes forward and backward.
    pub(super) tokens: u64,
    /// Tokens of all passes forward alone.
    pub(super) scored_tokens: u64,
    /// The windows that this task keeps for replay, the most important first.
    pub(super) keep: Vec<Window>,
}

/// Learns one task.
pub(super) struct Learner<'a> {
    given: Given<'a>,
    model: &'a mut Model,
    passes: Passes,
    optimizer: AdamW,
    dual: Option<DualAveraging>,
    controller: Option<BudgetController>,
    sparsity: f32,
    /// The gradient at the weights, where a second one is taken uphill.
    here: Vec<f32>,
    /// The gradient that the step takes.
    grads: Vec<f32>,
    /// The weights, while the second gradient is taken.
    saved: Vec<f32>,
    passed: u64,
}

/// The gradients of one step.
struct Taken {
    loss: f64,
    norms: GradNorms,
    active: Option<f64>,
    /// The step uphill over the gradient.
    scale: f32,
}

impl<'a> Learner<'a> {
    pub(super) fn new(model: &'a mut Model, given: Given<'a>) -> Result<Learner<'a>> {
        let mut config = given.config.clone();
        let of_gates = held(model, &mut config, dsmoe_core::Device::Cpu)?;
        let Method { prune, c, mu, .. } = given.method;
        let dual = match (prune, c, mu) {
            (Prune::DualAveraging, Some(c), Some(mu)) => {
                Some(DualAveraging::new(model.params(), config.lr, *c, *mu))
            }
            _ => None,
        };
        Ok(Learner {
            passes: Passes::new(model, given.config)?,
            optimizer: AdamW::new(model.layout()),
            dual,
            controller: of_gates.controller,
            sparsity: of_gates.weight,
            here: Vec::new(),
            grads: Vec::new(),
            saved: Vec::new(),
            passed: 0,
            given,
            model,
        })
    }

    /// Goes on with the state of a checkpoint.
    pub(super) fn resume(&mut self, inside: &Inside, optimizer: AdamW) {
        match &mut self.dual {
            Some(dual) => dual.set_sums(&optimizer.m),
            None => self.optimizer = optimizer,
        }
        self.controller.clone_from(&inside.controller);
        self.sparsity = inside.sparsity;
        self.passed = inside.passed;
    }

    /// Takes the steps after those of `inside`, prunes, and measures all texts. `show` receives the number of finished steps and the
    /// last one's loss, and says whether to go on; where it does not, the state is kept as a checkpoint and nothing is returned.
    pub(super) fn learn(
        mut self,
        mut inside: Inside,
        checkpoints: &Checkpoints,
        show: &mut dyn FnMut(u64, Option<f64>) -> bool,
    ) -> Result<Option<Learnt>> {
        let Given { task, config, method, texts, replay, .. } = self.given;
        let steps = config.steps.unwrap_or(0);
        let schedule = self.schedule(steps, inside.start_density);
        let drawn = std::mem::take(&mut inside.drawn);
        let mut stream = Stream::new(task, &texts[task], config, method, (replay, drawn))?;
        for step in inside.step..steps {
            let goes_on = &mut || show(step, (step > 0).then_some(inside.loss));
            let Some(windows) = self.windows(&mut stream, step, goes_on)? else {
                return self.stop(inside, &stream, checkpoints);
            };
            let taken = self.gradients(step, &windows)?;
            if let Some(density) = schedule.as_ref().and_then(|schedule| schedule.after(step + 1)) {
                self.prune(density, &taken, &windows)?;
            }
            self.update(step, &taken);
            if let (Some(controller), Some(share)) = (&mut self.controller, taken.active) {
                self.sparsity = controller.update(share as f32);
            }
            inside.step = step + 1;
            inside.loss = taken.loss;
            if let Some(share) = taken.active {
                inside.active = (inside.active.0 + share, inside.active.1 + 1);
            }
            if !show(step + 1, Some(taken.loss)) {
                return self.stop(inside, &stream, checkpoints);
            }
            if checkpoints.is_due(step + 1) {
                self.save(Inside { drawn: stream.drawn().clone(), ..inside.clone() }, checkpoints)?;
            }
        }
        let loss = inside.loss;
        let mut learnt = Learnt { loss, ..Learnt::default() };
        let goes_on = &mut || show(steps, Some(loss));
        if method.ranks() && method.when == Some(When::End) && steps > 0 {
            let own = std::slice::from_ref(&texts[task]);
            let before = match inside.before {
                Some(bits) => f64::from_bits(bits),
                None => {
                    let Some(before) = self.held_out(own, goes_on)? else {
                        return self.stop(inside, &stream, checkpoints);
                    };
                    let Some(windows) = self.windows(&mut stream, steps, goes_on)? else {
                        return self.stop(inside, &stream, checkpoints);
                    };
                    let taken = self.gradients(steps, &windows)?;
                    self.prune(method.density.unwrap_or(1.0), &taken, &windows)?;
                    inside.before = Some(before[0].to_bits());
                    before[0]
                }
            };
            let Some(after) = self.held_out(own, goes_on)? else {
                return self.stop(inside, &stream, checkpoints);
            };
            learnt.jump = Some(after[0] - before);
        }
        if self.dual.is_some() {
            self.model.set_masks(masks_of_nonzero(self.model))?;
        }
        let Some(losses) = self.held_out(texts, goes_on)? else {
            return self.stop(inside, &stream, checkpoints);
        };
        learnt.losses = losses;
        let (sum, count) = inside.active;
        learnt.active = (count > 0).then(|| sum / count as f64);
        learnt.scored_tokens = 2 * stream.scored() * config.seq as u64;
        learnt.tokens = self.passed;
        learnt.keep = stream.keep(method.replay);
        Ok(Some(learnt))
    }

    /// Keeps the state as a checkpoint, from which the task goes on.
    fn stop(&mut self, inside: Inside, stream: &Stream, checkpoints: &Checkpoints) -> Result<Option<Learnt>> {
        self.save(Inside { drawn: stream.drawn().clone(), ..inside }, checkpoints)?;
        Ok(None)
    }

    /// Returns the mean held-out losses of `texts`; see [`held_out_losses`].
    fn held_out(&self, texts: &[Mixture], goes_on: &mut dyn FnMut() -> bool) -> Result<Option<Vec<f64>>> {
        held_out_losses(self.model, texts, self.given.config, goes_on)
    }

    /// Writes a checkpoint. The sums of dual averaging stand where the first moments are, which it has not.
    fn save(&mut self, inside: Inside, checkpoints: &Checkpoints) -> Result<()> {
        if let Some(dual) = &self.dual {
            self.optimizer.m.copy_from_slice(dual.sums());
        }
        let (controller, sparsity, passed) = (self.controller.clone(), self.sparsity, self.passed);
        let inside = Inside { controller, sparsity, passed, ..inside };
        checkpoints.save(&inside, self.model, &self.optimizer)
    }

    /// Returns when to prune during the task, if then. `start` is the density before its first step.
    fn schedule(&self, steps: u64, start: f64) -> Option<Schedule> {
        let Method { density: end, every, when, .. } = *self.given.method;
        let during = self.given.method.ranks() && when == Some(When::During) && steps > 0;
        during.then(|| Schedule::new(steps, every.unwrap_or(1), start, end.unwrap_or(1.0)))
    }

    /// Computes the gradient of the step: at the weights, or uphill of them.
    fn gradients(&mut self, step: u64, windows: &[Window]) -> Result<Taken> {
        let Given { texts, config, method, .. } = self.given;
        let at = (step, self.sparsity);
        let first = self.passes.gradient(self.model, texts, windows, at)?;
        self.passed += config.tokens_per_step();
        let active = self.passes.engine.stats().map(|stats| stats.summary().active_ratio);
        let mut taken = Taken { loss: first.lm_loss, norms: first.norms, active, scale: 0.0 };
        if method.rho > 0.0 {
            copy(&mut self.here, &self.passes.engine.grads()?);
            taken.scale = step_scale(method.rho, first.norms.all);
            copy(&mut self.saved, self.model.params());
            ascend(self.model.params_mut(), &self.here, taken.scale);
            let second = self.passes.gradient(self.model, texts, windows, at);
            self.model.params_mut().copy_from_slice(&self.saved);
            taken.norms = second?.norms;
            self.passed += config.tokens_per_step();
        }
        copy(&mut self.grads, &self.passes.engine.grads()?);
        if let Some(anchor) = self.given.anchor {
            let weight = method.ewc as f32;
            let of_pull = anchor.fisher.iter().zip(&anchor.params).zip(self.model.params());
            for (g, ((fisher, old), w)) in self.grads.iter_mut().zip(of_pull) {
                *g += weight * fisher * (w - old);
            }
            if let Some(masks) = self.model.masks() {
                masks.apply(&mut self.grads, self.model.layout());
            }
            taken.norms = grad_norms(self.model.layout(), &self.grads);
        }
        Ok(taken)
    }

    /// Prunes weights so that a share `density` is left.
    fn prune(&mut self, density: f64, taken: &Taken, windows: &[Window]) -> Result<()> {
        let Given { texts, config, method, .. } = self.given;
        let scores = match method.prune {
            Prune::Scores => {
                let windows = &windows[..windows.len().min(FISHER_WINDOWS)];
                let fisher = fisher(self.model, texts, windows, config, &mut || true)?;
                let fisher = fisher.expect("nothing stops it");
                self.passed += (windows.len() * config.seq) as u64;
                let (here, uphill, scale) = (&self.here, &self.grads, taken.scale);
                Slopes { here, uphill, scale, fisher: &fisher }.scores(self.model.params())
            }
            _ => self.model.params().iter().map(|w| w.abs()).collect(),
        };
        let masks = masks_of(self.model, &scores, density, method.over.unwrap_or(Over::Matrix));
        masks.apply(&mut self.grads, self.model.layout());
        self.model.set_masks(masks)?;
        Ok(())
    }

    /// Updates the parameters by the step's gradient.
    fn update(&mut self, step: u64, taken: &Taken) {
        let config = self.given.config;
        let scale = clip_scale(taken.norms.all, config.clip);
        let layout = self.model.layout().clone();
        match &mut self.dual {
            Some(dual) => dual.step(self.model.params_mut(), &self.grads, &layout, (step + 1, scale)),
            None => {
                let lr = config.schedule().lr_at(step);
                let update = Update { config, lr, scale, step: step + 1 };
                self.optimizer.step(Some(self.model.params_mut()), &self.grads, &layout, &update);
            }
        }
        self.model.apply_masks();
    }

    /// Returns the windows of step `step`, or `None` if `goes_on` returns false while candidates are scored.
    fn windows(
        &mut self,
        stream: &mut Stream,
        step: u64,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Vec<Window>>> {
        stream.windows(step, self.given.replay, &mut |asked| self.uphill_costs(asked, goes_on))
    }

    /// Returns the rise in loss of each window of `asked` after a step along the gradient of the first ones, or `None` if `goes_on`
    /// returns false before all are known.
    fn uphill_costs(
        &mut self,
        asked: &[Window],
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Vec<f32>>> {
        let Given { texts, config, method, .. } = self.given;
        let batch = config.batch * config.accumulate;
        let first: Vec<Window> = asked.iter().copied().cycle().take(batch).collect();
        let result = self.passes.gradient(self.model, texts, &first, (0, self.sparsity))?;
        copy(&mut self.here, &self.passes.engine.grads()?);
        let Some(here) = losses(self.model, texts, asked, config, goes_on)? else { return Ok(None) };
        copy(&mut self.saved, self.model.params());
        ascend(self.model.params_mut(), &self.here, step_scale(method.rho, result.norms.all));
        let uphill = losses(self.model, texts, asked, config, goes_on);
        self.model.params_mut().copy_from_slice(&self.saved);
        let Some(uphill) = uphill? else { return Ok(None) };
        self.passed += config.tokens_per_step();
        Ok(Some(uphill.iter().zip(&here).map(|(uphill, here)| uphill - here).collect()))
    }
}

fn copy(to: &mut Vec<f32>, from: &[f32]) {
    to.clear();
    to.extend_from_slice(from);
}

/// Returns the mean losses of what is held out of `texts`, or `None` if `goes_on`, which is asked before every few windows, returns
/// false.
pub(super) fn held_out_losses(
    model: &Model,
    texts: &[Mixture],
    config: &TrainConfig,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Option<Vec<f64>>> {
    if !goes_on() {
        return Ok(None);
    }
    let packed = Inference::new(model, config.dtype);
    // A window of `seq` predicted tokens, as in training.
    let options = EvalOptions::new((config.seq + 1).max(2));
    let mut losses = Vec::with_capacity(texts.len());
    for text in texts {
        let report = evaluate_while(&packed, text.parts()[0].split.valid_tokens(), options, goes_on)?;
        let Some(report) = report else { return Ok(None) };
        losses.push(report.nll);
    }
    Ok(Some(losses))
}
