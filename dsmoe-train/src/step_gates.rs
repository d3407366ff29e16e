//! The gates of a step of several lanes, whose thresholds stay through the step: what its micro-batches tell the controller,
//! which is the same on any number of processes.

use std::collections::BTreeMap;

use dsmoe_kernels::comm::{Communicator, What};
use dsmoe_router::{LogitCounts, Pull, ThresholdController};

use crate::error::Result;
use crate::ranks::{Zero, lanes_of_rank};

const WORD: usize = 8;

/// The micro-batches of a step and the processes that share them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) lanes: usize,
    pub(crate) accumulate: usize,
    pub(crate) zero: Zero,
}

/// The statistics of this process's micro-batches in a step.
#[derive(Debug, Default)]
pub(crate) struct StepGates {
    /// Logits of the micro-batches that move a knot, by its number.
    counts: BTreeMap<usize, LogitCounts>,
    /// In the order in which this process computes its micro-batches.
    pulls: Vec<Pull>,
}

impl StepGates {
    /// Forgets the last step.
    pub(crate) fn begin(&mut self) {
        self.counts.values_mut().for_each(LogitCounts::clear);
        self.pulls.clear();
    }

    /// Takes a micro-batch that ran at the mean budget `active`.
    pub(crate) fn add(
        &mut self,
        held: &ThresholdController,
        active: f64,
        (counts, pull): (&LogitCounts, Pull),
    ) {
        for knot in held.moved_by(active) {
            let sum = self.counts.entry(knot).or_insert_with(|| LogitCounts::new(counts.num_layers()));
            sum.merge(counts);
        }
        self.pulls.push(pull);
    }

    /// Moves the thresholds after a step whose micro-batches, those of all processes, ran at the mean budgets `active`.
    pub(crate) fn finish(
        &mut self,
        held: &mut ThresholdController,
        active: &[f64],
        shape: Shape,
        (comm, step): (&dyn Communicator, u64),
    ) -> Result<()> {
        let layers = held.knots()[0].bars.len();
        let mut knots: Vec<usize> = active.iter().flat_map(|&active| held.moved_by(active)).collect();
        knots.sort_unstable();
        knots.dedup();
        for knot in knots {
            let counts = self.counts.entry(knot).or_insert_with(|| LogitCounts::new(layers));
            sum(counts, comm, What::at(step, "router logits"))?;
        }
        let pulls = self.all_pulls(shape, (comm, step))?;
        held.update_together(active, |knot| self.counts.get(&knot));
        for (&active, pull) in active.iter().zip(pulls) {
            held.pulled(active, pull);
        }
        Ok(())
    }

    /// Returns the pulls of all micro-batches in their order.
    fn all_pulls(&self, shape: Shape, (comm, step): (&dyn Communicator, u64)) -> Result<Vec<Pull>> {
        let own: Vec<u8> =
            self.pulls.iter().flat_map(|pull| [pull.force, pull.slope]).flat_map(f64::to_le_bytes).collect();
        let (size, mut all) = (comm.size(), vec![0; own.len() * comm.size()]);
        comm.all_gather(What::at(step, "gates"), &own, &mut all, &vec![own.len(); size])?;
        let values: Vec<f64> =
            all.as_chunks::<WORD>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        let mut pulls = vec![Pull::default(); shape.lanes * shape.accumulate];
        let ranks = (0..size).flat_map(|rank| lanes_of_rank(shape.lanes, (rank, size), shape.zero));
        let places =
            ranks.flat_map(|lane| (0..shape.accumulate).map(move |at| lane as usize * shape.accumulate + at));
        for (place, pair) in places.zip(values.chunks_exact(2)) {
            pulls[place] = Pull { force: pair[0], slope: pair[1] };
        }
        Ok(pulls)
    }
}

/// Adds up the counts of all processes. They are whole numbers, so that the order does not matter.
fn sum(counts: &mut LogitCounts, comm: &dyn Communicator, of: What) -> Result<()> {
    let size = comm.size();
    if size == 1 {
        return Ok(());
    }
    let layers = counts.num_layers();
    let mut sum = LogitCounts::new(layers);
    let (mut own, mut all) = (Vec::new(), Vec::new());
    // Layer by layer, which bounds the memory of the exchange.
    for layer in 0..layers {
        let (always, bins) = counts.of_layer(layer);
        own.clear();
        [always].iter().chain(bins).for_each(|count| own.extend(count.to_le_bytes()));
        all.resize(own.len() * size, 0);
        comm.all_gather(of, &own, &mut all, &vec![own.len(); size])?;
        for of_process in all.chunks_exact(own.len()) {
            let words = of_process.as_chunks::<WORD>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
            let words: Vec<u64> = words.collect();
            sum.add_counts(layer, words[0], &words[1..]);
        }
    }
    *counts = sum;
    Ok(())
}
