//! Rotary position embedding: what a model rotates by, as a function of the number of positions.

use std::f64::consts::PI;

/// One rotation: the frequencies of the pairs of values of a head.
///
/// ```
/// use dsmoe_core::config::{Rope, RopeScaling};
///
/// let plain = Rope::plain(10_000.0, 4);
/// let stretched = Rope { scaling: RopeScaling::Linear { factor: 4.0 }, ..plain.clone() };
/// assert_eq!(plain.frequencies(16)[0], 4.0 * stretched.frequencies(16)[0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of a head that are rotated, from the first on; even.
    pub width: usize,
    /// Change of the frequencies.
    pub scaling: RopeScaling,
}

/// Scaling of the rotary frequencies.
///
/// ```
/// use dsmoe_core::config::{Rope, RopeScaling};
///
/// let dynamic = RopeScaling::Dynamic { factor: 2.0, max_position: 512 };
/// assert!(dynamic.varies() && !RopeScaling::Linear { factor: 2.0 }.varies());
/// let rope = Rope { scaling: dynamic, ..Rope::plain(10_000.0, 8) };
/// // The base grows only past the positions that the model was made for.
/// assert_eq!(rope.frequencies(512), Rope::plain(10_000.0, 8).frequencies(512));
/// assert_ne!(rope.frequencies(1024), rope.frequencies(512));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A larger base for more positions than the model was made for.
    Dynamic {
        /// Growth of the base.
        factor: f64,
        /// Positions that the model was made for.
        max_position: usize,
    },
    /// Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the frequencies of long wavelengths.
        factor: f64,
        /// Wavelengths over `original_max_position` / this are long.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_position` / this are short.
        high_freq_factor: f64,
        /// Positions before scaling.
        original_max_position: usize,
    },
    /// YaRN: pairs that turn often are kept, others divided by `factor`, a ramp between; cosines and sines are multiplied.
    Yarn {
        /// Divisor of the frequencies of pairs that turn seldom.
        factor: f64,
        /// Positions before scaling.
        original_max_position: usize,
        /// Pairs that turn more often than this within `original_max_position` are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided.
        beta_slow: f64,
        /// True if the ends of the ramp are whole numbers of pairs.
        truncate: bool,
        /// Factor of cosines and sines.
        attention_factor: f64,
    },
    /// LongRoPE: a divisor for every pair, from one list for few positions and from another for many.
    LongRope {
        /// Divisors for up to `original_max_position` positions.
        short: Vec<f64>,
        /// Divisors for more.
        long: Vec<f64>,
        /// Positions before scaling.
        original_max_position: usize,
        /// Factor of cosines and sines.
        attention_factor: f64,
        /// True if a text that grows past `original_max_position` is run again from its start.
        restart: bool,
    },
}

impl RopeScaling {
    /// Returns the name in config.json.
    pub fn name(&self) -> &'static str {
        match self {
            RopeScaling::None => "none",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Dynamic { .. } => "dynamic",
            RopeScaling::Llama3 { .. } => "llama3",
            RopeScaling::Yarn { .. } => "yarn",
            RopeScaling::LongRope { .. } => "longrope",
        }
    }

    /// Returns whether the frequencies depend on the number of positions of a pass.
    pub fn varies(&self) -> bool {
        matches!(self, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }
}

impl Rope {
    /// Returns the plain rotation of whole heads.
    pub fn plain(theta: f64, head_dim: usize) -> Rope {
        Rope { theta, width: head_dim, scaling: RopeScaling::None }
    }

    /// Returns the frequencies `[width / 2]`, in radians per position, in a pass over `positions` positions:
    /// `theta^(-2i / width)`, scaled.
    ///
    /// ```text
    /// linear    f / factor
    /// dynamic   theta grows to theta (factor n / m - (factor - 1))^(width / (width - 2)) for n positions above m
    /// llama3    l = 2 pi / f, s = (original / l - low) / (high - low): f for l < original / high, f / factor for
    ///           l > original / low, else (1 - s) f / factor + s f
    /// yarn      g_i f / factor + (1 - g_i) f,  g_i = clamp((i - lo) / (hi - lo), 0, 1)
    /// longrope  f / short_i, or f / long_i for more than original positions
    /// ```
    pub fn frequencies(&self, positions: usize) -> Vec<f64> {
        let width = self.width as f64;
        let powers = |theta: f64| (0..self.width / 2).map(move |i| theta.powf(-2.0 * i as f64 / width));
        let plain = powers(self.theta);
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, max_position } if positions > *max_position => {
                let longer = positions as f64 / *max_position as f64;
                let growth = (factor * longer - (factor - 1.0)).powf(width / (width - 2.0));
                powers(self.theta * growth).collect()
            }
            RopeScaling::Dynamic { .. } => plain.collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let original = *original_max_position as f64;
                plain.map(|f| llama3(f, *factor, [*low_freq_factor, *high_freq_factor], original)).collect()
            }
            RopeScaling::Yarn { factor, .. } => {
                let [low, high] = self.yarn_ramp();
                let share = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain.enumerate().map(|(i, f)| f / factor * share(i) + f * (1.0 - share(i))).collect()
            }
            RopeScaling::LongRope { short, long, original_max_position, .. } => {
                let divisors = if positions > *original_max_position { long } else { short };
                plain.zip(divisors).map(|(f, divisor)| f / divisor).collect()
            }
        }
    }

    /// Returns the factor of cosines and sines.
    pub fn factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// Returns the first and the last pair of YaRN's ramp: those that turn `beta_fast` and `beta_slow` times within the
    /// original positions.
    fn yarn_ramp(&self) -> [f64; 2] {
        let RopeScaling::Yarn { original_max_position, beta_fast, beta_slow, truncate, .. } = self.scaling
        else {
            return [0.0, 1.0];
        };
        let width = self.width as f64;
        let turning = |turns: f64| {
            width * (original_max_position as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (turning(beta_fast), turning(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width - 1.0));
        if low == high {
            high += 0.001;
        }
        [low, high]
    }
}

fn llama3(f: f64, factor: f64, [low, high]: [f64; 2], original: f64) -> f64 {
    let wavelength = 2.0 * PI / f;
    if wavelength < original / high {
        f
    } else if wavelength > original / low {
        f / factor
    } else {
        let kept = (original / wavelength - low) / (high - low);
        (1.0 - kept) * f / factor + kept * f
    }
}

/// Returns YaRN's factor of cosines and sines for frequencies divided by `factor`, as a function of a weight.
pub(super) fn yarn_factor(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// Returns LongRoPE's factor of cosines and sines for `factor` times the original positions.
pub(crate) fn longrope_factor(factor: f64, original_max_position: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_max_position as f64).ln()).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, width: usize, scaling: RopeScaling) -> Rope {
        Rope { theta, width, scaling }
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let plain = Rope::plain(5e5, 128).frequencies(1);
        let scaled = rope(5e5, 128, llama3).frequencies(1);
        let mut between = 0;
        for (f, g) in plain.iter().zip(&scaled) {
            match 2.0 * PI / f {
                short if short < 2048.0 => assert_eq!(f, g),
                long if long > 8192.0 => assert_eq!(f / 8.0, *g),
                _ => {
                    between += 1;
                    assert!(f / 8.0 < *g && g < f);
                }
            }
        }
        assert!(between > 0);
    }

    #[test]
    fn dynamic_scaling_grows_the_base_only_past_the_models_positions() {
        let dynamic = rope(1e4, 16, RopeScaling::Dynamic { factor: 4.0, max_position: 32 });
        let plain = Rope::plain(1e4, 16).frequencies(32);
        assert_eq!(dynamic.frequencies(32), plain);
        let longer = dynamic.frequencies(64);
        assert_eq!(longer[0], 1.0);
        // 4 * 2 - 3 = 5, and 16 / 14 of that power.
        let grown = Rope::plain(1e4 * 5f64.powf(16.0 / 14.0), 16).frequencies(1);
        assert_eq!(longer, grown);
        assert!(longer[1..].iter().zip(&plain[1..]).all(|(long, short)| long < short));
    }

    #[test]
    fn longrope_divides_by_the_list_for_the_number_of_positions() {
        let scaling = RopeScaling::LongRope {
            short: vec![1.0, 2.0],
            long: vec![4.0, 8.0],
            original_max_position: 10,
            attention_factor: longrope_factor(4.0, 10),
            restart: false,
        };
        let rope = rope(100.0, 4, scaling);
        let divided = |by: [f64; 2]| vec![1.0 / by[0], 0.1 / by[1]];
        assert_eq!(rope.frequencies(10), divided([1.0, 2.0]));
        assert_eq!(rope.frequencies(11), divided([4.0, 8.0]));
        assert!((rope.factor() - (1.0 + 4f64.ln() / 10f64.ln()).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let yarn = |truncate, original_max_position| {
            rope(
                1e4,
                128,
                RopeScaling::Yarn {
                    factor: 4.0,
                    original_max_position,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    truncate,
                    attention_factor: yarn_factor(4.0, 1.0),
                },
            )
        };
        let plain = Rope::plain(1e4, 128).frequencies(1);
        let scaled = yarn(true, 4096).frequencies(1);
        // 128 ln(4096 / (2 pi t)) / (2 ln 1e4) is 20.94 at t = 32 and 45.03 at t = 1.
        for (i, (f, g)) in plain.iter().zip(&scaled).enumerate() {
            match i {
                0..=20 => assert_eq!(f, g),
                46.. => assert!((g * 4.0 / f - 1.0).abs() < 1e-15),
                _ => assert!(f / 4.0 < *g && g < f, "pair {i}"),
            }
        }
        assert_ne!(yarn(false, 4096).frequencies(1), scaled);
        assert!((yarn(true, 4096).factor() - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-15);
        // Both ends of the ramp are at the first pair.
        assert!(yarn(true, 2).frequencies(1).iter().all(|f| f.is_finite()));
    }
}
