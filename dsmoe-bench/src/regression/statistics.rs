//! Medians, their intervals, and the detection of changes.

use serde::{Deserialize, Serialize};

/// The least probability that an interval contains the median.
pub(crate) const CONFIDENCE: f64 = 0.99;

/// A median with its interval by order statistics.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MedianEstimate {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl MedianEstimate {
    /// Estimates the median without an assumption about the distribution. With fewer than 8 samples the interval is
    /// their range and contains the median less often than [`CONFIDENCE`].
    ///
    /// # Panics
    /// There are no samples.
    pub(crate) fn of(samples: &[f64]) -> MedianEstimate {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let outside = rank(n);
        let median = f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]);
        MedianEstimate { median, low: sorted[outside], high: sorted[n - 1 - outside] }
    }
}

/// Returns the number of `n` sorted samples outside the interval on each side: the median is below the (k + 1)-th
/// smallest sample with the probability of at most k heads in n fair coin tosses.
fn rank(n: usize) -> usize {
    let mut term = 0.5f64.powi(n as i32);
    let (mut sum, mut k) = (term, 0);
    while k < n.div_ceil(2) {
        term *= (n - k) as f64 / (k + 1) as f64;
        if 2.0 * (sum + term) > 1.0 - CONFIDENCE {
            break;
        }
        sum += term;
        k += 1;
    }
    k.min(n.saturating_sub(1) / 2)
}

/// The verdict about a benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    Worse,
    Better,
    Same,
}

/// Compares two medians where less is better. They differ only if the intervals are disjoint and the change exceeds
/// `limit`. Returns the relative change as well.
pub(crate) fn judge(before: MedianEstimate, after: MedianEstimate, limit: f64) -> (f64, Verdict) {
    let change = after.median / before.median - 1.0;
    let verdict = if after.low > before.high && change > limit {
        Verdict::Worse
    } else if after.high < before.low && 1.0 / (1.0 + change) - 1.0 > limit {
        Verdict::Better
    } else {
        Verdict::Same
    };
    (change, verdict)
}

/// Judges the ratios after / before of rounds in which both took turns. They differ from 1 only if the interval does
/// not contain 1 and the median is further from it than `limit`.
pub(crate) fn judge_pairs(ratios: &[f64], limit: f64) -> (MedianEstimate, Verdict) {
    let ratio = MedianEstimate::of(ratios);
    (ratio, judge(MedianEstimate::of(&[1.0]), ratio, limit).1)
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::rng::Rng;

    use super::*;

    const LIMIT: f64 = 0.03;
    /// Samples of a record that does not say otherwise.
    const REPEATS: usize = 31;

    /// Samples of a ratio: 2 % of even noise, and one in ten up to half as much again, as a busy machine gives them.
    fn run(rng: &mut Rng, level: f64, n: usize) -> Vec<f64> {
        let mut uniform = || f64::from(rng.uniform());
        (0..n)
            .map(|_| {
                let hit = if uniform() < 0.1 { 0.5 * uniform() } else { 0.0 };
                level * (1.0 + 0.04 * (uniform() - 0.5) + hit)
            })
            .collect()
    }

    #[test]
    fn the_interval_holds_the_median_as_often_as_it_says() {
        // Tables of the sign test at 1 %: this many on each side are outside.
        for (n, outside) in [(8, 0), (10, 0), (11, 0), (12, 1), (15, 2), (21, 4), (50, 15)] {
            assert_eq!(rank(n), outside, "{n}");
        }
        assert_eq!([1, 2, 7].map(rank), [0, 0, 0]);
        let mut rng = Rng::new(5, 0);
        let missed = (0..4000)
            .filter(|_| {
                let samples: Vec<f64> = (0..21).map(|_| f64::from(rng.uniform()).powi(3)).collect();
                let estimate = MedianEstimate::of(&samples);
                estimate.low > 0.125 || estimate.high < 0.125
            })
            .count();
        // 0.7 % is what ranks 5 and 17 of 21 miss: 28 of 4000.
        assert!((10..=50).contains(&missed), "{missed}");
    }

    #[test]
    fn equal_runs_raise_no_alarm_and_ten_percent_is_found() {
        let mut rng = Rng::new(7, 0);
        let (mut alarms, mut found, pairs) = (0, 0, 5000);
        for _ in 0..pairs {
            let [a, b] = [1.0, 1.0].map(|level| MedianEstimate::of(&run(&mut rng, level, REPEATS)));
            alarms += usize::from(judge(a, b, LIMIT).1 != Verdict::Same);
            let slow = MedianEstimate::of(&run(&mut rng, 1.1, REPEATS));
            found += usize::from(judge(a, slow, LIMIT).1 == Verdict::Worse);
        }
        assert_eq!(alarms, 0);
        assert!(found * 100 >= pairs * 99, "{found} of {pairs}");
    }

    #[test]
    fn pairs_forgive_a_machine_that_changes_between_rounds() {
        let mut rng = Rng::new(9, 0);
        let (mut alarms, mut found, tries) = (0, 0, 2000);
        for _ in 0..tries {
            let mut rounds = |slower: f64| -> Vec<f64> {
                (0..10)
                    .map(|_| {
                        // Each round has its own speed of the machine; each side its own 1 % beside it.
                        let speed = 1.0 + f64::from(rng.uniform());
                        let mut side =
                            |level: f64| speed * level * (1.0 + 0.02 * (f64::from(rng.uniform()) - 0.5));
                        side(slower) / side(1.0)
                    })
                    .collect()
            };
            alarms += usize::from(judge_pairs(&rounds(1.0), LIMIT).1 != Verdict::Same);
            found += usize::from(judge_pairs(&rounds(1.1), LIMIT).1 == Verdict::Worse);
        }
        assert_eq!((alarms, found), (0, tries));
    }

    #[test]
    fn a_change_needs_both_distance_and_size() {
        let at =
            |median: f64, width: f64| MedianEstimate { median, low: median - width, high: median + width };
        assert_eq!(judge(at(1.0, 0.001), at(1.02, 0.001), LIMIT).1, Verdict::Same, "small");
        assert_eq!(judge(at(1.0, 0.05), at(1.09, 0.05), LIMIT).1, Verdict::Same, "overlapping");
        assert_eq!(judge(at(1.0, 0.01), at(1.1, 0.01), LIMIT).1, Verdict::Worse);
        assert_eq!(judge(at(1.1, 0.01), at(1.0, 0.01), LIMIT).1, Verdict::Better);
    }
}
