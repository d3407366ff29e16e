//! The parts that an interrupted survey of experts leaves: the statistics of every layer that is done.

use dsmoe_core::calibrate::{ExpertStats, ExpertSums};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::partial::Partial;

/// The statistics of a layer, numbers as bits.
#[derive(Serialize, Deserialize)]
struct KeptStats {
    tokens: usize,
    /// Each expert has its scalar sums, squares, outputs, routed outputs, and counts of tokens above the thresholds of budgets.
    experts: Vec<[Vec<u64>; 5]>,
    gram: Vec<u64>,
    both: Vec<u64>,
    logits: Vec<u64>,
}

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn numbers(bits: &[u64]) -> Vec<f64> {
    bits.iter().map(|&bits| f64::from_bits(bits)).collect()
}

impl KeptStats {
    fn of(stats: &ExpertStats) -> KeptStats {
        let expert = |sums: &ExpertSums| {
            let ExpertSums { hard, soft, coefficients, norms, weighted_norms, .. } = *sums;
            let own = [hard, soft, coefficients, norms, weighted_norms];
            [
                bits(&own),
                bits(&sums.squares),
                bits(&sums.outputs),
                bits(&sums.routed_outputs),
                bits(&sums.above),
            ]
        };
        KeptStats {
            tokens: stats.tokens,
            experts: stats.experts.iter().map(expert).collect(),
            gram: bits(&stats.gram),
            both: bits(&stats.both),
            logits: bits(&stats.logits),
        }
    }

    /// Returns the statistics; none if they are those of another version.
    fn stats(&self) -> Option<ExpertStats> {
        let expert = |[own, squares, outputs, routed_outputs, above]: &[Vec<u64>; 5]| {
            let own: [f64; 5] = numbers(own).try_into().ok()?;
            let [hard, soft, coefficients, norms, weighted_norms] = own;
            Some(ExpertSums {
                hard,
                soft,
                coefficients,
                norms,
                weighted_norms,
                squares: numbers(squares),
                outputs: numbers(outputs),
                routed_outputs: numbers(routed_outputs),
                above: numbers(above),
            })
        };
        Some(ExpertStats {
            tokens: self.tokens,
            experts: self.experts.iter().map(expert).collect::<Option<_>>()?,
            gram: numbers(&self.gram),
            both: numbers(&self.both),
            logits: numbers(&self.logits),
        })
    }
}

/// The parts of one survey of a job, which may have several.
pub(super) struct Parts<'a> {
    partial: &'a Partial,
    /// The surveys of the job before this one.
    before: usize,
}

impl<'a> Parts<'a> {
    pub(super) fn of(partial: &'a Partial, before: usize) -> Parts<'a> {
        Parts { partial, before }
    }

    fn name(&self, layer: usize) -> String {
        format!("survey-{}-layer-{layer}", self.before)
    }

    /// Returns the statistics of the first layers, as many as are done of `layers`.
    pub(super) fn finished(&self, layers: usize) -> Result<Vec<ExpertStats>> {
        let parts = self.partial.first::<KeptStats>(layers, |layer| self.name(layer))?;
        Ok(parts.iter().map_while(|part| part.value.stats()).collect())
    }

    /// Keeps the statistics of a layer.
    pub(super) fn keep(&self, layer: usize, stats: &ExpertStats) -> Result<()> {
        self.partial.keep(&self.name(layer), &KeptStats::of(stats), &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_come_back_bit_for_bit() {
        let sums = |seed: f64| ExpertSums {
            hard: seed,
            soft: 0.1 * seed,
            coefficients: seed / 3.0,
            norms: f64::MIN_POSITIVE * seed,
            weighted_norms: -seed,
            squares: vec![seed; 2],
            outputs: vec![1e300 * seed, 0.3],
            routed_outputs: Vec::new(),
            above: vec![3.0, seed],
        };
        let stats = ExpertStats {
            tokens: 7,
            experts: vec![sums(1.0), sums(0.7)],
            gram: vec![0.1, 0.2, 0.3, 0.4],
            both: vec![1.0; 4],
            logits: vec![-0.5, 1e-310],
        };
        let work = tempfile::tempdir().unwrap();
        let partial = Partial::open(&work.path().join("out"), "work".to_owned(), true).unwrap();
        let parts = Parts::of(&partial, 2);
        parts.keep(0, &stats).unwrap();
        parts.keep(2, &stats).unwrap();
        // Layers behind a gap are not finished.
        assert_eq!(parts.finished(3).unwrap(), [stats]);
        assert!(Parts::of(&partial, 1).finished(3).unwrap().is_empty());
    }
}
