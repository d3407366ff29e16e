//! Quantiles of magnitudes.

use dsmoe_core::calibrate::Tap;
use rayon::prelude::*;

/// Values of one site that quantiles are taken of; of more text every so many tokens are left out.
const MOST_VALUES: usize = 1 << 22;
/// Steps of a stored table.
const STEPS: usize = 1024;

/// Returns the p-quantile of ascending values, interpolated between neighbours; 0 of none.
pub(super) fn quantile(sorted: &[f32], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = p.clamp(0.0, 1.0) * last as f64;
    let low = place.floor() as usize;
    let (a, b) = (f64::from(sorted[low]), f64::from(sorted[(low + 1).min(last)]));
    a + (place - low as f64) * (b - a)
}

/// Magnitudes of one site.
#[derive(Debug, Default)]
pub(super) struct Magnitudes {
    values: Vec<f32>,
    /// Takes every so many tokens.
    every: usize,
    seen: usize,
}

impl Magnitudes {
    /// Makes room for `tokens` tokens of `width` values.
    pub(super) fn new(tokens: usize, width: usize) -> Magnitudes {
        let every = (tokens * width).div_ceil(MOST_VALUES).max(1);
        Magnitudes { values: Vec::with_capacity(tokens.div_ceil(every) * width), every, seen: 0 }
    }

    /// Adds tokens `x` `[tokens, width]`.
    pub(super) fn add(&mut self, x: &[f32], width: usize) {
        for token in x.chunks_exact(width.max(1)) {
            if self.seen.is_multiple_of(self.every) {
                self.values.extend(token.iter().map(|x| x.abs()));
            }
            self.seen += 1;
        }
    }

    /// Returns the table of their quantiles.
    pub(super) fn table(mut self) -> Table {
        self.values.par_sort_unstable_by(f32::total_cmp);
        Table((0..=STEPS).map(|i| quantile(&self.values, i as f64 / STEPS as f64) as f32).collect())
    }
}

/// Quantiles in even steps.
#[derive(Clone, Debug)]
pub(super) struct Table(Vec<f32>);

impl Table {
    /// Returns its numbers as bits.
    pub(super) fn bits(&self) -> Vec<u32> {
        self.0.iter().map(|value| value.to_bits()).collect()
    }

    /// Returns the table of these [`Table::bits`].
    pub(super) fn of_bits(bits: Vec<u32>) -> Table {
        Table(bits.into_iter().map(f32::from_bits).collect())
    }

    /// Returns the magnitude that the share `skipped` of all values does not exceed; 0 for none.
    pub(super) fn threshold(&self, skipped: f64) -> f32 {
        if skipped <= 0.0 { 0.0 } else { quantile(&self.0, skipped) as f32 }
    }
}

/// Adds to `sums`, one for each of `shares`, the quantile of the magnitudes within each token that leaves the share.
pub(super) fn add_token_quantiles(sums: &mut [f64], tap: &Tap<'_>, width: usize, shares: &[f64]) {
    let of_token = |token: &[f32]| {
        let mut sorted: Vec<f32> = token.iter().map(|x| x.abs()).collect();
        sorted.sort_unstable_by(f32::total_cmp);
        shares.iter().map(|share| quantile(&sorted, 1.0 - share)).collect::<Vec<f64>>()
    };
    let of_tokens: Vec<Vec<f64>> = tap.x.par_chunks_exact(width.max(1)).map(of_token).collect();
    for quantiles in of_tokens {
        sums.iter_mut().zip(quantiles).for_each(|(sum, quantile)| *sum += quantile);
    }
}
