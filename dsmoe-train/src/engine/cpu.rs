//! Optimiser steps on the processors of one or several processes.

use std::borrow::Cow;
use std::sync::Arc;

use dsmoe_core::Model;
use dsmoe_core::model::{Batch, StepArgs, StepOutput, Teaching, TrainWorkspace, Units, Weights, Whole};
use dsmoe_core::params::{Entry, Layout};
use dsmoe_core::shard::{Shards, Staging};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, Tree, What};
use dsmoe_router::{LogitCounts, Pull, RoutingStats};

use super::parts::{Gathered, Lent, Parts};
use super::report::{All, Exchange, Own, Record};
use super::{Engine, EngineOptions, StepResult};
use crate::error::Result;
use crate::optim::{AdamW, Squares, Update};
use crate::ranks::Zero;
use crate::teacher::{Lessons, LessonsOf, learn};

/// The memory of training. Each process computes its lanes; then each owns a part of the summed gradient and of the moments,
/// updates its part of the parameters, and gets the others (ZeRO stage 1). In stages 2 and 3 gradients, and parameters, are
/// whole only while a pass works on them.
#[derive(Debug)]
pub(super) struct CpuEngine {
    optimizer: AdamW,
    stats: Option<RoutingStats>,
    layout: Layout,
    zero: Zero,
    /// The gradients of the lane at work, whole; empty where they lie in parts.
    grads: Buf,
    parts: Parts,
    workspace: Box<TrainWorkspace>,
    lessons: Option<Box<Lessons>>,
    /// The lanes of this process that are done. A single one is in `grads` and needs no tree.
    tree: Tree,
    lanes: usize,
    lanes_done: usize,
    /// Micro-batches of a lane, and those that are done of the lane at work.
    accumulate: usize,
    lane_done: usize,
    step: u64,
    /// The micro-batches of this process so far.
    records: Vec<Record>,
    /// That of the last micro-batch.
    pull: Pull,
    non_finite: Option<String>,
    /// The micro-batches of the step, in all processes.
    micro_batches: u64,
    comm: Arc<dyn Communicator>,
    shards: Shards,
    squares: Squares,
    staging: Staging,
    exchange: Exchange,
    /// Routing counts, as they are sent.
    counts: Vec<u64>,
}

impl CpuEngine {
    pub(super) fn new(
        model: &Model,
        optimizer: AdamW,
        options: EngineOptions,
        (comm, neighbours): (Arc<dyn Communicator>, usize),
    ) -> CpuEngine {
        let layout = model.layout().clone();
        let shards = Shards::new(&layout, comm.size()).in_two_stages(neighbours);
        let make = if options.recompute { TrainWorkspace::recomputing } else { TrainWorkspace::new };
        let workspace = make(model, options.tokens, options.precision);
        CpuEngine {
            optimizer,
            stats: model.new_stats(),
            zero: if model.is_outline() { Zero::Parameters } else { options.zero.on(comm.size()) },
            grads: Buf::default(),
            parts: Parts::default(),
            workspace: Box::new(workspace),
            lessons: None,
            tree: Tree::new(),
            lanes: options.lanes,
            lanes_done: 0,
            accumulate: options.accumulate,
            lane_done: 0,
            step: 0,
            records: Vec::new(),
            pull: Pull::default(),
            non_finite: None,
            micro_batches: 1,
            squares: Squares::new(&layout, &shards, comm.rank()),
            shards,
            staging: Staging::default(),
            exchange: Exchange::default(),
            counts: Vec::new(),
            comm,
            layout,
        }
    }

    /// Replaces this process's part of the gradients by the sum over processes.
    fn reduce(&mut self, step: u64) -> Result<()> {
        let of = (&*self.comm, What::at(step, "gradients"));
        for (number, unit) in self.shards.units().iter().enumerate() {
            let grads = &mut self.grads[unit.clone()];
            self.shards.reduce(of, number, grads, None, &mut self.staging)?;
        }
        Ok(())
    }

    /// Returns the gradients that lanes are added up in: all, or those that this process owns.
    fn of_lane(&mut self) -> &mut Buf {
        if self.zero > Zero::Moments { &mut self.parts.own } else { &mut self.grads }
    }

    /// Runs a micro-batch.
    fn pass(&mut self, model: &Model, batch: Batch<'_>, args: &StepArgs) -> Result<StepOutput> {
        let teaching = match self.lessons.as_deref_mut() {
            None => Teaching::None,
            Some(Lessons { teacher, of: LessonsOf::All }) => Teaching::Of(teacher),
            Some(Lessons { teacher, of: LessonsOf::Top { top, cache, rows } }) => {
                learn(teacher, cache.as_deref_mut(), (batch.inputs, batch.seq), *top, rows)?;
                Teaching::Rows(rows, teacher.weight())
            }
        };
        let (mut whole, mut lent);
        let units: &mut dyn Units = if self.zero > Zero::Moments {
            let (own_params, parts, shards) = (&self.optimizer.params[..], &mut self.parts, &self.shards);
            let (comm, step, last) = (&*self.comm, self.step, self.lane_done + 1 == self.accumulate);
            lent = Lent { model, own_params, parts, shards, comm, step, last };
            &mut lent
        } else {
            whole = Whole { params: model.params(), grads: &mut self.grads };
            &mut whole
        };
        Ok(model.step_on(units, (batch, teaching), args, &mut self.workspace)?)
    }
}

impl Engine for CpuEngine {
    fn begin(&mut self, step: u64, micro_batches: u64) -> Result<()> {
        if self.zero > Zero::Moments {
            self.parts.begin(self.optimizer.m.len());
        } else {
            self.grads.resize(self.layout.len());
            self.grads.clear();
        }
        (self.step, self.lane_done) = (step, 0);
        if let Some(stats) = &mut self.stats {
            stats.clear();
        }
        if self.lanes_done > 0 {
            // Those of a step that was given up.
            self.tree = Tree::new();
        }
        self.records.clear();
        (self.micro_batches, self.lanes_done, self.non_finite) = (micro_batches, 0, None);
        Ok(())
    }

    fn micro_batch(&mut self, model: &Model, batch: Batch<'_>, args: &StepArgs) -> Result<bool> {
        let output = self.pass(model, batch, args)?;
        self.lane_done += 1;
        self.records.push(record_of(&output, batch.targets.len()));
        if let (Some(sum), Some(part)) = (&mut self.stats, self.workspace.stats()) {
            sum.merge(part);
        }
        self.pull = output.pull;
        self.non_finite = output.non_finite;
        Ok(output.went_back)
    }

    fn end_lane(&mut self) -> Result<()> {
        if self.lanes > 1 {
            let mut grads = std::mem::take(self.of_lane());
            self.tree.push(&mut grads);
            *self.of_lane() = grads;
            self.lanes_done += 1;
            if self.lanes_done < self.lanes && self.zero == Zero::Moments {
                self.grads.clear();
            }
        }
        self.lane_done = 0;
        Ok(())
    }

    fn end(&mut self, model: &Model, step: u64, stop: bool) -> Result<StepResult> {
        if self.lanes_done > 0 {
            let mut grads = std::mem::take(self.of_lane());
            self.tree.finish(&mut grads);
            *self.of_lane() = grads;
            self.lanes_done = 0;
        }
        if self.zero == Zero::Moments {
            if let Some(masks) = model.masks() {
                masks.apply(&mut self.grads, &self.layout);
            }
            self.optimizer.drop_frozen(&mut self.grads, &self.layout);
            self.reduce(step)?;
            self.squares.compute(&self.grads);
        } else {
            self.squares.compute(&self.parts.own);
        }
        let own_micro_batches = self.micro_batches as usize / self.comm.size();
        self.records.resize(own_micro_batches, Record::default());
        self.counts.clear();
        self.counts.extend(self.stats.iter().flat_map(RoutingStats::counts));
        let own = Own {
            stop,
            non_finite: self.non_finite.as_deref(),
            records: &self.records,
            in_turn: if self.zero > Zero::Moments { self.accumulate } else { own_micro_batches },
            counts: &self.counts,
            squares: self.squares.sums(),
        };
        let pieces = self.squares.counts();
        let all = self.exchange.share(&*self.comm, What::at(step, "results"), &own, pieces)?;
        if let Some(stats) = &mut self.stats {
            stats.clear();
            stats.add_all(&all.counts);
        }
        let norms = self.squares.norms(&all.squares);
        Ok(StepResult { norms, ..fold(all, self.micro_batches) })
    }

    fn gradient_not_finite(&mut self, model: &Model, step: u64) -> Result<String> {
        let is_wrong = |entry: &Entry| {
            let mut places = self.optimizer.places(entry.range.clone());
            let own = |(owned, place)| match self.zero {
                Zero::Moments => &self.grads[owned],
                Zero::Gradients | Zero::Parameters => &self.parts.own[place],
            };
            places.any(|at| own(at).iter().any(|x| !x.is_finite()))
        };
        let entries = model.layout().entries();
        let mine = entries.iter().rposition(is_wrong).map_or(0, |at| at as u64 + 1);
        let mut all = vec![0; 8 * self.comm.size()];
        let lens = vec![8; self.comm.size()];
        let of = What::at(step, "what is not finite");
        self.comm.all_gather(of, &mine.to_le_bytes(), &mut all, &lens)?;
        let last = all.as_chunks().0.iter().map(|at| u64::from_le_bytes(*at)).max().unwrap_or(0);
        let entry = last.checked_sub(1).and_then(|at| entries.get(at as usize));
        Ok(entry.map_or("a tensor", |entry| &entry.spec.name).to_owned())
    }

    fn update(&mut self, model: &mut Model, update: &Update<'_>) -> Result<()> {
        let grads = if self.zero > Zero::Moments { &self.parts.own } else { &self.grads };
        if model.is_outline() {
            // A masked weight stays 0: its gradient is 0.
            self.optimizer.step(None, grads, &self.layout, update);
            return Ok(());
        }
        self.optimizer.step(Some(model.params_mut()), grads, &self.layout, update);
        let of = (&*self.comm, What::at(update.step, "parameters"));
        for (number, unit) in self.shards.units().iter().enumerate() {
            let params = &mut model.params_mut()[unit.clone()];
            self.shards.gather(of, number, params, None, &mut self.staging)?;
        }
        model.apply_masks();
        Ok(())
    }

    fn grads(&self) -> Result<Cow<'_, [f32]>> {
        if self.zero == Zero::Moments {
            return Ok(Cow::Borrowed(&self.grads));
        }
        let mut grads = vec![0.0; self.layout.len()];
        for (owned, place) in self.optimizer.places(0..self.layout.len()) {
            grads[owned].copy_from_slice(&self.parts.own[place]);
        }
        Ok(Cow::Owned(grads))
    }

    fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    fn stats(&self) -> Option<&RoutingStats> {
        self.stats.as_ref()
    }

    fn count_logits(&mut self) -> Result<()> {
        self.workspace.count_logits();
        Ok(())
    }

    fn logits(&self) -> Option<&LogitCounts> {
        self.workspace.stats().and_then(RoutingStats::logits)
    }

    fn pull(&self) -> Pull {
        self.pull
    }

    fn set_teacher(&mut self, lessons: Lessons) -> Result<()> {
        self.lessons = Some(Box::new(lessons));
        Ok(())
    }

    fn notes(&mut self) -> Vec<String> {
        self.lessons.as_mut().map_or_else(Vec::new, |lessons| lessons.notes())
    }

    fn lend(&self) -> Option<Box<dyn Weights>> {
        let (own, shards, comm) = (self.optimizer.params.clone(), self.shards.clone(), self.comm.clone());
        (self.zero == Zero::Parameters)
            .then(|| -> Box<dyn Weights> { Box::new(Gathered::new(own, shards, comm)) })
    }

    fn release(&mut self) {
        self.grads = Buf::zeros(0);
        self.parts = Parts::default();
        self.tree = Tree::new();
    }
}

fn record_of(output: &StepOutput, predicted: usize) -> Record {
    Record {
        loss: output.loss_sum,
        divergence: output.divergence_sum,
        sparsity_loss: output.sparsity_loss,
        mean_gate: output.mean_gate,
        share_loss: output.share_loss,
        balance_loss: output.balance_loss,
        separability: output.separability,
        gate_entropy: output.gate_entropy,
        predicted: predicted as u64,
    }
}

/// Returns the losses of a step of so many micro-batches, which are added up in their order.
fn fold(all: &All, micro_batches: u64) -> StepResult {
    let mut result =
        StepResult { stop: all.stop, non_finite: all.non_finite.clone(), ..StepResult::default() };
    let (parts, mut predicted) = (micro_batches as f64, 0);
    for record in &all.records {
        predicted += record.predicted;
        result.lm_loss += record.loss;
        result.divergence += record.divergence;
        result.sparsity_loss += record.sparsity_loss / parts;
        result.mean_gate += record.mean_gate / parts;
        result.share_loss += record.share_loss / parts;
        result.balance_loss += record.balance_loss;
        result.separability += record.separability / parts;
        result.gate_entropy += record.gate_entropy / parts;
    }
    result.lm_loss /= predicted as f64;
    result.divergence /= predicted as f64;
    result
}
