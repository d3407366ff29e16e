//! The limits of this machine, measured before the rows that are compared with them.

use std::collections::BTreeMap;

use dsmoe_kernels::{Isa, Precision, peak};

use crate::machine::cpu_model;

/// The most and the least memory on which bandwidth is measured.
const MOST_BYTES: f64 = (1u64 << 30) as f64;
const FEWEST_BYTES: f64 = 65_536.0;

/// The work of a call, independent of the implementation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Floating-point operations.
    pub(crate) flops: f64,
    /// Bytes read or written, each once.
    pub(crate) bytes: f64,
}

/// The limits and the names of the machine.
#[derive(Debug)]
pub(crate) struct Ceilings {
    pub(crate) isa: &'static str,
    pub(crate) cpu: Option<String>,
    pub(crate) threads: usize,
    /// Operations per second in f32 and in bf16; 0 where not measured.
    flops: [f64; 2],
    /// Bytes per second by the number of bytes read.
    bandwidths: BTreeMap<u64, f64>,
}

impl Ceilings {
    /// Measures the arithmetic ceilings of `precisions`: the best tier of the machine, on the threads of the run.
    pub(crate) fn measure(precisions: &[Precision]) -> Ceilings {
        let best = |precision| {
            let tiers = Isa::available().into_iter();
            tiers.map(|isa| peak::flops(isa, precision)).fold(0.0, f64::max)
        };
        let flops = [Precision::F32, Precision::Bf16]
            .map(|precision| if precisions.contains(&precision) { best(precision) } else { 0.0 });
        Ceilings {
            isa: Isa::current().name(),
            cpu: cpu_model(),
            threads: rayon::current_num_threads(),
            flops,
            bandwidths: BTreeMap::new(),
        }
    }

    /// Returns the operations per second with operands of `precision`, one of those measured.
    pub(crate) fn flops(&self, precision: Precision) -> f64 {
        self.flops[usize::from(precision == Precision::Bf16)]
    }

    /// Returns the bytes per second of reading about `bytes` repeatedly, as the rounds of a benchmark do: data that fits
    /// into a cache is compared with that cache.
    pub(crate) fn bandwidth(&mut self, bytes: f64) -> f64 {
        // Steps of an eighth of an octave.
        let steps = (8.0 * bytes.clamp(FEWEST_BYTES, MOST_BYTES).log2()).round();
        let bytes = (steps / 8.0).exp2() as u64;
        *self.bandwidths.entry(bytes).or_insert_with(|| peak::read_bandwidth(Isa::current(), bytes as usize))
    }

    /// Returns the least seconds that work of that cost takes; none for no work.
    pub(crate) fn bound(&mut self, cost: Cost, precision: Precision) -> Option<f64> {
        (cost.flops > 0.0 || cost.bytes > 0.0).then(|| {
            let reading = if cost.bytes > 0.0 { cost.bytes / self.bandwidth(cost.bytes) } else { 0.0 };
            reading.max(cost.flops / self.flops(precision))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_arithmetic_and_reading_bounds() {
        let mut machine = Ceilings {
            isa: "scalar",
            cpu: None,
            threads: 1,
            flops: [10.0, 20.0],
            bandwidths: BTreeMap::from([(65_536, 32_768.0)]),
        };
        let cost = |flops, bytes| Cost { flops, bytes };
        assert_eq!(machine.bound(cost(0.0, 0.0), Precision::F32), None);
        assert_eq!(machine.bound(cost(50.0, 0.0), Precision::F32), Some(5.0));
        assert_eq!(machine.bound(cost(50.0, 0.0), Precision::Bf16), Some(2.5));
        assert_eq!(machine.bound(cost(10.0, 65_536.0), Precision::F32), Some(2.0));
    }
}
