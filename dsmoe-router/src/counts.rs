//! Router logits counted by value: the share of pairs that any thresholds would open.

use ndarray::ArrayView2;

/// Logits beyond this, on either side, are counted in the last bin.
const LARGEST: f64 = 32.0;
/// Bins of logits in an interval of length 1.
pub const PER_UNIT: f64 = 128.0;
/// Bins of the logits of a layer, half of them of negative ones.
pub const BINS: usize = (2.0 * LARGEST * PER_UNIT) as usize;
/// Halvings that bring the range of a shift below the width of a bin by far.
const HALVINGS: usize = 48;

/// Counts of logits in equal bins, layer by layer, and of the pairs that are open at any threshold.
///
/// ```
/// use dsmoe_router::LogitCounts;
/// use dsmoe_router::counts::Curves;
/// use ndarray::array;
///
/// let mut counts = LogitCounts::new(1);
/// counts.add(0, 0, array![[-1.0, 1.0], [2.0, 3.0]].view());
/// let curves: Curves = counts.curves();
/// assert_eq!(curves.share(&[0.0]), 0.75);
/// // Raised by about 2, the threshold opens a quarter of the pairs.
/// assert!((2.0..3.1).contains(&curves.shift(&[0.0], 0.25)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogitCounts {
    layers: Vec<LayerCounts>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct LayerCounts {
    /// Pairs of the core.
    always: u64,
    bins: Vec<u64>,
}

impl LogitCounts {
    /// Makes counts without logits.
    pub fn new(num_layers: usize) -> LogitCounts {
        LogitCounts { layers: vec![LayerCounts { always: 0, bins: vec![0; BINS] }; num_layers] }
    }

    /// Adds the logits `[T, routed experts]` of a layer, each of whose tokens also runs `core` experts always.
    ///
    /// # Panics
    /// No such layer.
    pub fn add(&mut self, layer: usize, core: usize, logits: ArrayView2<'_, f32>) {
        let LayerCounts { always, bins } = &mut self.layers[layer];
        *always += (core * logits.nrows()) as u64;
        for &z in logits {
            // A conversion to an integer takes what is outside, and NaN, to a bin.
            let bin = ((f64::from(z) + LARGEST) * PER_UNIT) as usize;
            bins[bin.min(BINS - 1)] += 1;
        }
    }

    /// Adds what was counted elsewhere, as on a GPU: the logits of a layer by bin, those outside of all in the first and last
    /// one, and the pairs of its core.
    ///
    /// # Panics
    /// No such layer; the bins are not [`BINS`].
    pub fn add_counts(&mut self, layer: usize, always: u64, bins: &[u64]) {
        let counts = &mut self.layers[layer];
        assert_eq!(bins.len(), BINS, "logit counts: bins");
        counts.always += always;
        counts.bins.iter_mut().zip(bins).for_each(|(sum, count)| *sum += count);
    }

    /// Returns the pairs of the core of a layer, and the logits of the others by bin: what [`LogitCounts::add_counts`] takes.
    ///
    /// # Panics
    /// No such layer.
    pub fn of_layer(&self, layer: usize) -> (u64, &[u64]) {
        let LayerCounts { always, bins } = &self.layers[layer];
        (*always, bins)
    }

    /// Returns the number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Adds the counts of `other`.
    ///
    /// # Panics
    /// `other` has another number of layers.
    pub fn merge(&mut self, other: &LogitCounts) {
        assert_eq!(self.layers.len(), other.layers.len(), "logit counts: layers");
        for (to, from) in self.layers.iter_mut().zip(&other.layers) {
            to.always += from.always;
            to.bins.iter_mut().zip(&from.bins).for_each(|(a, b)| *a += b);
        }
    }

    /// Sets all counts to 0.
    pub fn clear(&mut self) {
        for layer in &mut self.layers {
            layer.always = 0;
            layer.bins.fill(0);
        }
    }

    /// Returns whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|layer| layer.always == 0 && layer.bins.iter().all(|&count| count == 0))
    }

    /// Sums the counts up, so that shares can be asked for.
    pub fn curves(&self) -> Curves {
        let layers = self.layers.iter().map(|LayerCounts { always, bins }| {
            // above[i]: logits in bin i and later ones.
            let mut above = vec![0.0; BINS + 1];
            for i in (0..BINS).rev() {
                above[i] = above[i + 1] + bins[i] as f64;
            }
            Curve { always: *always as f64, pairs: *always as f64 + above[0], above }
        });
        Curves { layers: layers.collect() }
    }
}

/// The open share of pairs as a function of the thresholds.
///
/// ```
/// use dsmoe_router::LogitCounts;
/// use dsmoe_router::counts::Curves;
/// use ndarray::array;
///
/// let mut counts = LogitCounts::new(2);
/// counts.add(0, 0, array![[-1.0, 1.0]].view());
/// counts.add(1, 0, array![[3.0, 5.0]].view());
/// let curves: Curves = counts.curves();
/// // One threshold for each layer; the share is that of the pairs of both.
/// assert_eq!(curves.share(&[0.0, 0.0]), 0.75);
/// assert_eq!(curves.share(&[0.0, 4.0]), 0.5);
/// assert!(curves.shift(&[0.0, 4.0], 0.75) < 0.0);
/// ```
#[derive(Clone, Debug)]
pub struct Curves {
    layers: Vec<Curve>,
}

#[derive(Clone, Debug)]
struct Curve {
    always: f64,
    pairs: f64,
    above: Vec<f64>,
}

impl Curve {
    /// Returns the pairs that the threshold `bar` opens, core included; linear within a bin.
    fn open(&self, bar: f64) -> f64 {
        let at = ((bar + LARGEST) * PER_UNIT).clamp(0.0, BINS as f64);
        let (bin, part) = (at as usize, at.fract());
        let (here, next) = (self.above[bin], self.above[(bin + 1).min(BINS)]);
        self.always + here + part * (next - here)
    }
}

impl Curves {
    /// Returns the open share of all pairs under one threshold (a logit) per layer; 0 without pairs.
    ///
    /// # Panics
    /// There are not as many thresholds as layers.
    pub fn share(&self, bars: &[f64]) -> f64 {
        assert_eq!(bars.len(), self.layers.len(), "logit counts: thresholds and layers");
        let open: f64 = self.layers.iter().zip(bars).map(|(layer, &bar)| layer.open(bar)).sum();
        open / self.layers.iter().map(|layer| layer.pairs).sum::<f64>().max(1.0)
    }

    /// Returns what has to be added to all of `bars` for the share to be `share`, as near as it can be.
    ///
    /// # Panics
    /// Those of [`Curves::share`].
    pub fn shift(&self, bars: &[f64], share: f64) -> f64 {
        let shifted = |shift: f64| self.share(&bars.iter().map(|bar| bar + shift).collect::<Vec<_>>());
        let (mut low, mut high) = (-2.0 * LARGEST, 2.0 * LARGEST);
        for _ in 0..HALVINGS {
            let middle = 0.5 * (low + high);
            if shifted(middle) > share { low = middle } else { high = middle }
        }
        0.5 * (low + high)
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;
    use ndarray::Array2;

    use super::*;

    fn logits(tokens: usize, experts: usize, seed: u64, spread: f32, centre: f32) -> Array2<f32> {
        let values = normals(tokens * experts, seed).iter().map(|z| spread * z + centre).collect();
        Array2::from_shape_vec((tokens, experts), values).unwrap()
    }

    #[test]
    fn shares_and_shifts_are_those_of_the_logits() {
        let layers = [logits(4000, 6, 1, 2.0, 0.5), logits(4000, 6, 2, 0.5, -1.0)];
        let mut counts = LogitCounts::new(2);
        assert!(counts.is_empty());
        counts.add(0, 2, layers[0].view());
        counts.add(1, 0, layers[1].view());
        let curves = counts.curves();
        let exact = |bars: [f64; 2]| {
            let open = |i: usize| layers[i].iter().filter(|&&z| f64::from(z) > bars[i]).count();
            (8000 + open(0) + open(1)) as f64 / (8000 + 2 * 24_000) as f64
        };
        for bars in [[0.0, 0.0], [1.5, -1.25], [-3.0, 4.0], [-40.0, -40.0]] {
            let share = curves.share(&bars);
            assert!((share - exact(bars)).abs() < 1e-3, "{bars:?}: {share} for {}", exact(bars));
            for wanted in [0.2, 0.375, 0.9] {
                let shift = curves.shift(&bars, wanted);
                let reached = exact(bars.map(|bar| bar + shift));
                assert!((reached - wanted).abs() < 1e-3, "{bars:?}: {reached} for {wanted}");
            }
        }
        // Less than the core cannot be had, and more than all neither.
        assert!((curves.share(&[60.0, 60.0]) - 8000.0 / 56_000.0).abs() < 1e-9);
        assert!(curves.shift(&[0.0, 0.0], 0.01) > 3.0 && curves.shift(&[0.0, 0.0], 1.0) < -3.0);
    }

    #[test]
    fn parts_make_the_whole_and_odd_values_are_counted() {
        let (a, b) = (logits(100, 3, 1, 1.0, 0.0), logits(50, 3, 2, 1.0, 0.0));
        let of = |parts: &[&Array2<f32>]| {
            let mut counts = LogitCounts::new(1);
            parts.iter().for_each(|part| counts.add(0, 1, part.view()));
            counts
        };
        let mut sum = of(&[&a]);
        sum.merge(&of(&[&b]));
        assert_eq!(sum, of(&[&a, &b]));
        sum.clear();
        assert_eq!(sum, of(&[]));
        let mut bins = vec![0; BINS];
        for z in a.iter() {
            bins[((f64::from(*z) + LARGEST) * PER_UNIT) as usize] += 1;
        }
        sum.add_counts(0, 100, &bins);
        assert_eq!(sum, of(&[&a]));
        sum.clear();
        let odd = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 1e30];
        sum.add(0, 0, Array2::from_shape_vec((2, 2), odd.to_vec()).unwrap().view());
        assert_eq!(sum.curves().share(&[0.0]), 0.5);
    }
}
