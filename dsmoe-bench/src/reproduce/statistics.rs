//! Intervals and tests: Student's t over seeds, or the bootstrap over windows if there is one seed.

use serde::{Deserialize, Serialize};

/// Confidence of an interval.
const CONFIDENCE: f64 = 0.95;

/// A mean over seeds with its interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) mean: f64,
    pub(crate) deviation: Option<f64>,
    /// The 95 % interval.
    pub(crate) interval: Option<[f64; 2]>,
    /// The source of the interval: `seeds`, or with one seed `windows` or `items`.
    pub(crate) over: Option<String>,
    pub(crate) values: Vec<f64>,
}

impl Measured {
    /// Returns the mean of the values of several seeds with its interval, which one value does not have.
    pub(crate) fn of_seeds(values: Vec<f64>) -> Measured {
        let (mean, deviation, n) = (mean(&values), deviation(&values), values.len() as f64);
        let half =
            deviation.map(|deviation| t_quantile(0.5 + CONFIDENCE / 2.0, n - 1.0) * deviation / n.sqrt());
        let interval = half.map(|half| [mean - half, mean + half]);
        let over = interval.map(|_| "seeds".to_owned());
        Measured { mean, deviation, interval, over, values }
    }
}

pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Returns the standard deviation of a sample of at least two values.
fn deviation(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let mean = mean(values);
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// Returns the two-sided p of the paired t test that differences are 0 on average. It needs two different values.
pub(crate) fn paired_t(differences: &[f64]) -> Option<f64> {
    let spread = deviation(differences)?;
    if spread == 0.0 {
        return None;
    }
    let n = differences.len() as f64;
    let t = mean(differences) / (spread / n.sqrt());
    Some(2.0 * (1.0 - t_distribution(t.abs(), n - 1.0)))
}

/// The sources: the weight, and (sum, count) of every window.
pub(crate) type Strata<'a> = Vec<(f64, Vec<(f64, f64)>)>;

/// Returns the weighted mean over strata of sum / count.
fn ratio(strata: &Strata<'_>, mut pick: impl FnMut(usize) -> usize) -> f64 {
    strata
        .iter()
        .map(|(weight, windows)| {
            let (mut sum, mut count) = (0.0, 0.0);
            for at in 0..windows.len() {
                let at = if windows.len() > 1 { pick(windows.len()) } else { at };
                sum += windows[at].0;
                count += windows[at].1;
            }
            weight * sum / count
        })
        .sum()
}

/// Returns the sorted bootstrap distribution of [`ratio`]. Windows are drawn within their stratum.
pub(crate) fn bootstrap(strata: &Strata<'_>, resamples: usize) -> Vec<f64> {
    let mut random = SplitMix(0);
    let mut values: Vec<f64> = (0..resamples).map(|_| ratio(strata, |n| random.below(n))).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Returns the ends of the middle 95 % of a sorted distribution.
pub(crate) fn middle(sorted: &[f64]) -> [f64; 2] {
    let at = |share: f64| sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)];
    [at((1.0 - CONFIDENCE) / 2.0), at((1.0 + CONFIDENCE) / 2.0)]
}

/// Returns the two-sided p that a bootstrap distribution of differences is on one side of 0 by chance, at least
/// 1 / resamples.
pub(crate) fn sign_p(sorted: &[f64]) -> f64 {
    let n = sorted.len() as f64;
    let (below, above) = (
        sorted.iter().filter(|x| **x <= 0.0).count() as f64,
        sorted.iter().filter(|x| **x >= 0.0).count() as f64,
    );
    (2.0 * below.min(above) / n).clamp(1.0 / n, 1.0)
}

/// A generator of random numbers that is simple to implement in another program.
pub(crate) struct SplitMix(pub(crate) u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Draws a number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// Returns P(T <= t) of Student's t with `freedom` degrees, t >= 0.
fn t_distribution(t: f64, freedom: f64) -> f64 {
    1.0 - 0.5 * beta_ratio(freedom / (freedom + t * t), freedom / 2.0, 0.5)
}

/// Returns the t with P(T <= t) = p, for p >= 0.5.
fn t_quantile(p: f64, freedom: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while t_distribution(high, freedom) < p {
        high *= 2.0;
    }
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        if t_distribution(middle, freedom) < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// Computes the regularised incomplete beta function by its continued fraction.
fn beta_ratio(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - beta_ratio(1.0 - x, b, a);
    }
    let front = (a * x.ln() + b * (1.0 - x).ln() - ln_gamma(a) - ln_gamma(b) + ln_gamma(a + b)).exp() / a;
    // Lentz's method.
    let tiny = 1e-300;
    let guard = |value: f64| if value.abs() < tiny { tiny } else { value };
    let (mut c, mut d) = (1.0, 1.0 / guard(1.0 - (a + b) * x / (a + 1.0)));
    let mut fraction = d;
    for m in 1..500 {
        let m = f64::from(m);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / guard(1.0 + even * d);
        c = guard(1.0 + even / c);
        fraction *= d * c;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / guard(1.0 + odd * d);
        c = guard(1.0 + odd / c);
        let step = d * c;
        fraction *= step;
        if (step - 1.0).abs() < 1e-15 {
            break;
        }
    }
    front * fraction
}

/// Computes the logarithm of the gamma function by Lanczos' approximation.
fn ln_gamma(x: f64) -> f64 {
    const G: f64 = 7.0;
    const C: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        return (std::f64::consts::PI / (std::f64::consts::PI * x).sin()).ln() - ln_gamma(1.0 - x);
    }
    let x = x - 1.0;
    let base = x + G + 0.5;
    let sum: f64 = C[0] + (1..9).map(|i| C[i] / (x + i as f64)).sum::<f64>();
    0.5 * (2.0 * std::f64::consts::PI).ln() + (x + 0.5) * base.ln() - base + sum.ln()
}

/// Compares a list over layers with a W. Returns its correlation with a wave that is high at both ends and in the middle,
/// and the share of orders of the layers that correlate as much. It needs three layers and two different values.
pub(crate) fn w_shape(values: &[f64]) -> Option<(f64, f64)> {
    let n = values.len();
    if n < 3 {
        return None;
    }
    let wave: Vec<f64> =
        (0..n).map(|i| (4.0 * std::f64::consts::PI * i as f64 / (n - 1) as f64).cos()).collect();
    let found = correlation(values, &wave)?;
    let (mut as_much, mut all) = (0u64, 0u64);
    let mut count = |order: &[f64]| {
        all += 1;
        as_much += u64::from(correlation(order, &wave).is_some_and(|r| r >= found - 1e-12));
    };
    if n <= 8 {
        permutations(&mut values.to_vec(), 0, &mut count);
    } else {
        let mut random = SplitMix(0);
        let mut order = values.to_vec();
        for _ in 0..10_000 {
            for i in (1..n).rev() {
                order.swap(i, random.below(i + 1));
            }
            count(&order);
        }
        // The actual order is one of them.
        count(values);
    }
    Some((found, as_much as f64 / all as f64))
}

fn permutations(values: &mut Vec<f64>, at: usize, visit: &mut impl FnMut(&[f64])) {
    if at == values.len() {
        return visit(values);
    }
    for i in at..values.len() {
        values.swap(at, i);
        permutations(values, at + 1, visit);
        values.swap(at, i);
    }
}

/// Returns Pearson's correlation, if both sides vary.
pub(crate) fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let (ma, mb) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        ab += (x - ma) * (y - mb);
        aa += (x - ma).powi(2);
        bb += (y - mb).powi(2);
    }
    (aa > 0.0 && bb > 0.0).then(|| ab / (aa * bb).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (freedom, t) in
            [(1.0, 12.7062), (2.0, 4.30265), (4.0, 2.77645), (9.0, 2.26216), (1000.0, 1.96234)]
        {
            let found = t_quantile(0.975, freedom);
            assert!((found - t).abs() < 1e-4, "{freedom}: {found}");
        }
    }

    /// The values 1, 2, 3 have mean 2, deviation 1, half-width 4.30265 / sqrt 3; t = 2 sqrt 3 against 0, p = 0.0742.
    #[test]
    fn an_interval_and_a_test_by_hand() {
        let found = Measured::of_seeds(vec![1.0, 2.0, 3.0]);
        let [low, high] = found.interval.unwrap();
        assert!((found.mean - 2.0).abs() < 1e-12 && (high - low - 2.0 * 2.484_14).abs() < 1e-4);
        assert!((paired_t(&[1.0, 2.0, 3.0]).unwrap() - 0.074_180).abs() < 1e-5);
        assert_eq!(paired_t(&[1.0]), None);
        assert_eq!(Measured::of_seeds(vec![4.0]).interval, None);
    }

    #[test]
    fn the_bootstrap_finds_the_spread_of_a_mean() {
        // 400 windows of 0 or 1: the mean's standard error is 0.025.
        let windows: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i % 2), 1.0)).collect();
        let strata = vec![(1.0, windows)];
        let [low, high] = middle(&bootstrap(&strata, 2000));
        assert!((low - 0.451).abs() < 0.01 && (high - 0.549).abs() < 0.01, "{low} {high}");
        assert_eq!(sign_p(&[1.0, 2.0]), 0.5);
        assert_eq!(sign_p(&[-1.0, 1.0]), 1.0);
    }

    #[test]
    fn a_w_is_distinguished_from_other_shapes() {
        let (r, p) = w_shape(&[0.9, 0.3, 0.8, 0.2, 0.9]).unwrap();
        assert!(r > 0.9 && p < 0.15, "{r} {p}");
        let (r, p) = w_shape(&[0.1, 0.9, 0.2, 0.8, 0.1]).unwrap();
        assert!(r < -0.9 && p > 0.85, "{r} {p}");
        assert_eq!(w_shape(&[1.0, 1.0, 1.0]), None);
        assert_eq!(w_shape(&[1.0, 2.0]), None);
    }
}
