//! Estimators of the routers' gradient under the straight-through rule, which compute a part of the inactive pairs.
//!
//! The rule (eq. 16) wants `d = <dy_t, o_i(x_t)>` of every pair of a token t and an expert i. That of an inactive pair costs three of
//! the nine products of a training step over an expert: two for the inner activations, one for `dy_t W_down^T`. An estimator
//! computes d of some inactive pairs and takes `w d` in its place, and 0 for the others. Active pairs have all nine products
//! anyway, and `w = 1`.
//!
//! ```text
//! full        every pair                                                              w = 1
//! every:K     every pair of a layer in one micro-batch of each K, else no pair        w = K
//! sample:P    each pair with probability P                                            w = 1 / P
//! ```
//! A weight is w with probability 1 / w and else 0, so its mean is 1. The gradient is linear in the weights of each single layer:
//! `dy` comes from the layers behind, and `dx` goes to the layers before it. A term that passes inactive gates of several layers
//! has the product of their weights as its factor, whose mean is 1 if the layers draw apart. They do: `every` draws for each layer
//! which of the K micro-batches it is. Were it the same in all layers, the mean of the product for two layers would be K.
//!
//! What is drawn is a function of the run's seed, the micro-batch, the layer, the token and the expert. It does not depend on
//! threads, processes or interruptions.

use std::fmt;
use std::str::FromStr;

use dsmoe_kernels::rng::Rng;
use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Routing};

/// The largest K of [`RouterGradient::Every`].
const MOST: u64 = 1 << 16;
/// The least share of [`RouterGradient::Sample`].
const LEAST: f64 = 1e-6;
/// Values of [`RouterGradient`] in words.
const ALLOWED: &str = "full, every:K for K from 1 to 65536, or sample:P for P above 0 and up to 1";
/// Separates these draws from other uses of the seed.
const DRAWS: u64 = 0x696e_6163_7469_7665;

/// The rule that chooses the inactive pairs whose part of the routers' gradient is computed: a setting of a run, as `full`,
/// `every:K` or `sample:P`.
///
/// ```
/// use dsmoe_router::RouterGradient;
///
/// let rule: RouterGradient = "every:4".parse()?;
/// assert_eq!((rule, rule.computed()), (RouterGradient::Every(4), 0.25));
/// assert_eq!("sample:12.5%".parse::<RouterGradient>()?.to_string(), "sample:0.125");
/// assert!(RouterGradient::default().is_full());
/// let error = "sample:0".parse::<RouterGradient>().unwrap_err().to_string();
/// assert!(error.starts_with("router_gradient is sample:0; use full, every:K"), "{error}");
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RouterGradient {
    /// All of them in every micro-batch: the straight-through rule itself.
    #[default]
    Full,
    /// Those of a layer in one of every so many micro-batches, which each layer draws for itself.
    Every(u64),
    /// Each with this probability.
    Sample(f64),
}

impl RouterGradient {
    /// Checks the number of the rule.
    ///
    /// # Errors
    /// K is not in 1..=65536, or the share is below 1e-6, above 1 or not a number.
    pub fn validate(self) -> Result<()> {
        let valid = match self {
            RouterGradient::Full => true,
            RouterGradient::Every(k) => (1..=MOST).contains(&k),
            RouterGradient::Sample(share) => (LEAST..=1.0).contains(&share),
        };
        if valid { Ok(()) } else { Err(Error::range("router_gradient", self, ALLOWED)) }
    }

    /// Returns whether it computes all inactive pairs in every micro-batch, with weight 1.
    pub fn is_full(self) -> bool {
        self.computed() == 1.0
    }

    /// Returns the share of inactive pairs that are computed, in the mean over micro-batches.
    pub fn computed(self) -> f64 {
        match self {
            RouterGradient::Full => 1.0,
            RouterGradient::Every(k) => 1.0 / k as f64,
            RouterGradient::Sample(share) => share,
        }
    }
}

impl FromStr for RouterGradient {
    type Err = Error;

    /// Reads what [`RouterGradient`]'s `Display` writes; a share may be a percentage.
    fn from_str(text: &str) -> Result<RouterGradient> {
        let share = |text: &str| match text.strip_suffix('%') {
            Some(percent) => percent.parse::<f64>().ok().map(|percent| percent / 100.0),
            None => text.parse().ok(),
        };
        let rule = match text.split_once(':') {
            None => (text == "full").then_some(RouterGradient::Full),
            Some(("every", k)) => k.parse().ok().map(RouterGradient::Every),
            Some(("sample", of)) => share(of).map(RouterGradient::Sample),
            Some(_) => None,
        };
        let valid = rule.filter(|rule| rule.validate().is_ok());
        valid.ok_or_else(|| Error::range("router_gradient", text, ALLOWED))
    }
}

impl fmt::Display for RouterGradient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouterGradient::Full => f.write_str("full"),
            RouterGradient::Every(k) => write!(f, "every:{k}"),
            RouterGradient::Sample(share) => write!(f, "sample:{share}"),
        }
    }
}

impl TryFrom<String> for RouterGradient {
    type Error = Error;

    fn try_from(text: String) -> Result<RouterGradient> {
        text.parse()
    }
}

impl From<RouterGradient> for String {
    fn from(rule: RouterGradient) -> String {
        rule.to_string()
    }
}

/// A rule in one micro-batch of a run.
///
/// ```
/// use dsmoe_router::{InactivePairs, RouterGradient, RouterGradientAt};
///
/// // A layer computes all pairs in one of four micro-batches.
/// let at = |index| RouterGradientAt { rule: RouterGradient::Every(4), seed: 7, index };
/// let whole = |layer| (0..4).filter(|&index| at(index).of_layer(layer) != InactivePairs::None).count();
/// assert_eq!((whole(0), whole(1)), (1, 1));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterGradientAt {
    /// The rule.
    pub rule: RouterGradient,
    /// Seed of the run.
    pub seed: u64,
    /// The micro-batch within the run, counted from 0.
    pub index: u64,
}

impl RouterGradientAt {
    /// All inactive pairs.
    pub const FULL: RouterGradientAt = RouterGradientAt { rule: RouterGradient::Full, seed: 0, index: 0 };

    /// Returns what a layer computes in this micro-batch.
    ///
    /// # Panics
    /// The rule is `every` with K of 0.
    pub fn of_layer(self, layer: usize) -> InactivePairs {
        let RouterGradientAt { rule, seed, index } = self;
        let rng = |position| Rng::new(Rng::new(seed ^ DRAWS, position).next_u64(), layer as u64);
        match rule {
            RouterGradient::Every(k) if rng(index / k).below(k) == index % k => {
                InactivePairs::All { weight: k as f32 }
            }
            RouterGradient::Every(_) => InactivePairs::None,
            RouterGradient::Sample(share) if share < 1.0 => {
                InactivePairs::Sample { share, seed: rng(index).next_u64() }
            }
            RouterGradient::Full | RouterGradient::Sample(_) => InactivePairs::ALL,
        }
    }
}

/// The inactive pairs of a layer in one micro-batch whose part of the router's gradient is computed.
///
/// ```
/// use dsmoe_router::{InactivePairs, RouterGradient, RouterGradientAt};
///
/// let rule = RouterGradient::Sample(0.25);
/// let drawn = RouterGradientAt { rule, seed: 7, index: 0 }.of_layer(3);
/// assert!(matches!(drawn, InactivePairs::Sample { share, .. } if share == 0.25));
/// assert_eq!(RouterGradientAt::FULL.of_layer(3), InactivePairs::ALL);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InactivePairs {
    /// All, each with this weight.
    All {
        /// Factor of each.
        weight: f32,
    },
    /// None: the router learns from active pairs alone.
    None,
    /// Each with probability `share` and weight `1 / share`, see [`InactiveSample`].
    Sample {
        /// The probability, above 0 and below 1.
        share: f64,
        /// Seed of the layer in this micro-batch.
        seed: u64,
    },
}

impl InactivePairs {
    /// All, with weight 1.
    pub const ALL: InactivePairs = InactivePairs::All { weight: 1.0 };
}

/// A sample of the inactive pairs of a layer.
///
/// ```
/// use dsmoe_router::InactiveSample;
/// use ndarray::Array2;
///
/// // The first of 4 experts is active for 100 tokens; a half of the other pairs is drawn.
/// let mask = Array2::from_shape_fn((100, 4), |(_, expert)| expert == 0);
/// let mut sample = InactiveSample::default();
/// sample.draw(mask.view(), 0.5, 7);
/// let drawn: Vec<usize> = sample.routing.counts().collect();
/// assert!(drawn[0] == 0 && drawn[1..].iter().all(|count| (30..70).contains(count)), "{drawn:?}");
/// assert!(sample.routing.coefficients.iter().all(|&weight| weight == 2.0));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InactiveSample {
    /// `[T, n]`: the pairs drawn.
    chosen: Array2<bool>,
    /// The pairs drawn, with their weights as coefficients.
    pub routing: Routing,
}

impl InactiveSample {
    /// Draws among the pairs that are not set in `mask` `[T, n]`, each with probability `share` and weight `1 / share`. The draw
    /// of a pair is a function of the seed, the token and the expert alone.
    ///
    /// # Panics
    /// Those of [`Routing::from_mask`].
    pub fn draw(&mut self, mask: ArrayView2<'_, bool>, share: f64, seed: u64) {
        let InactiveSample { chosen, routing } = self;
        if chosen.dim() != mask.dim() {
            *chosen = Array2::from_elem(mask.dim(), false);
        }
        for (token, (mut chosen, mask)) in chosen.outer_iter_mut().zip(mask.outer_iter()).enumerate() {
            let mut rng = Rng::new(seed, token as u64);
            for (chosen, &active) in chosen.iter_mut().zip(mask) {
                // A number for every expert, so that a draw does not depend on which other experts are active. It has the 53 bits
                // of an f64: with the 24 of `Rng::uniform` small shares would be off.
                let number = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                *chosen = !active && number < share;
            }
        }
        let weight = (1.0 / share) as f32;
        routing.rebuild(chosen.view(), |_, _| weight);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use dsmoe_kernels::testing::assert_same_on_threads;

    use super::*;

    #[test]
    fn rules_are_words_in_files_too() {
        for rule in [RouterGradient::Full, RouterGradient::Every(4), RouterGradient::Sample(0.1)] {
            let word = rule.to_string();
            assert_eq!(word.parse::<RouterGradient>(), Ok(rule));
            assert_eq!(serde_json::to_string(&rule).unwrap(), format!("\"{word}\""));
            assert_eq!(serde_json::from_str::<RouterGradient>(&format!("\"{word}\"")).unwrap(), rule);
        }
        let full = ["full", "every:1", "sample:1", "sample:100%"].map(|word| word.parse::<RouterGradient>());
        assert!(full.iter().all(|rule| rule.as_ref().is_ok_and(|rule| rule.is_full())), "{full:?}");
    }

    #[test]
    fn wrong_rules_are_refused_in_one_line() {
        for word in [
            "",
            "Full",
            "half",
            "every",
            "every:",
            "every:0",
            "every:-1",
            "every:1.5",
            "every:65537",
            "sample",
            "sample:",
            "sample:0",
            "sample:-0.5",
            "sample:1.0001",
            "sample:101%",
            "sample:nan",
            "sample:inf",
            "sample:1e-7",
            "some:4",
        ] {
            let error = word.parse::<RouterGradient>().unwrap_err().to_string();
            assert_eq!(error, format!("router_gradient is {word}; use {ALLOWED}"));
        }
        // Values that no word gives.
        assert!(RouterGradient::Every(0).validate().is_err());
        for share in [0.0, -1.0, 1.5, f64::NAN, f64::INFINITY] {
            assert!(RouterGradient::Sample(share).validate().is_err(), "{share}");
        }
    }

    /// Each layer computes all pairs once in every block of K micro-batches, at places that have nothing to do with each other.
    #[test]
    fn layers_have_turns_of_their_own() {
        const BLOCKS: u64 = 600;
        for k in [1, 2, 4, 5] {
            let at = |seed, index| RouterGradientAt { rule: RouterGradient::Every(k), seed, index };
            let turn = |seed: u64, layer: usize, block: u64| -> u64 {
                let whole = InactivePairs::All { weight: k as f32 };
                let places: Vec<u64> =
                    (0..k).filter(|place| at(seed, block * k + place).of_layer(layer) == whole).collect();
                let rest = (0..k).filter(|place| !places.contains(place));
                assert!(
                    rest.map(|place| at(seed, block * k + place))
                        .all(|at| at.of_layer(layer) == InactivePairs::None)
                );
                assert_eq!(places.len(), 1, "K {k}, layer {layer}, block {block}");
                places[0]
            };
            let blocks = 0..BLOCKS;
            let same = blocks.clone().filter(|&block| turn(3, 0, block) == turn(3, 1, block)).count() as f64;
            let (mean, n) = (1.0 / k as f64, BLOCKS as f64);
            // Two layers take the same turn in one block of K: the deviation is sqrt(n p (1 - p)).
            let deviation = (n * mean * (1.0 - mean)).sqrt();
            assert!((same - n * mean).abs() <= 5.0 * deviation, "K {k}: {same} of {n}");
            let differ = blocks.clone().any(|block| turn(3, 0, block) != turn(4, 0, block));
            assert!(differ || k == 1);
            let all: BTreeSet<u64> = blocks.map(|block| turn(3, 0, block)).collect();
            assert_eq!(all.len() as u64, k);
        }
    }

    #[test]
    fn samples_have_their_share_of_every_expert_and_leave_active_pairs_out() {
        const TOKENS: usize = 4000;
        let mask = Array2::from_shape_fn((TOKENS, 5), |(token, expert)| (token + expert) % 5 < 2);
        for share in [0.5, 0.125, 0.01] {
            let mut sample = InactiveSample::default();
            sample.draw(mask.view(), share, 11);
            let Routing { tokens, offsets, coefficients, .. } = &sample.routing;
            assert!(coefficients.iter().all(|&weight| weight == (1.0 / share) as f32));
            let inactive = TOKENS as f64 * 3.0 / 5.0;
            for expert in 0..5 {
                let drawn = &tokens[offsets[expert]..offsets[expert + 1]];
                assert!(drawn.iter().all(|&token| !mask[[token as usize, expert]]), "{share}");
                // A binomial number of pairs.
                let (mean, deviation) = (inactive * share, (inactive * share * (1.0 - share)).sqrt());
                assert!(
                    (drawn.len() as f64 - mean).abs() < 5.0 * deviation,
                    "{share}: {} of {mean}",
                    drawn.len()
                );
            }
        }
    }

    #[test]
    fn a_draw_is_a_function_of_seed_token_and_expert() {
        let (tokens, experts) = (200, 6);
        let draw = |mask: &dyn Fn(usize, usize) -> bool, tokens: usize, seed: u64| {
            let mask = Array2::from_shape_fn((tokens, experts), |(t, i)| mask(t, i));
            let mut sample = InactiveSample::default();
            sample.draw(mask.view(), 0.4, seed);
            sample.chosen
        };
        let all = draw(&|_, _| false, tokens, 1);
        let some = draw(&|t, i| (t * i).is_multiple_of(3), tokens, 1);
        assert!(
            some.indexed_iter().all(|((t, i), &drawn)| drawn == (all[[t, i]] && !(t * i).is_multiple_of(3)))
        );
        let first = draw(&|_, _| false, 50, 1);
        assert!(first.indexed_iter().all(|(at, &drawn)| drawn == all[at]));
        assert_ne!(draw(&|_, _| false, tokens, 2), all);
        assert_same_on_threads("draw", || draw(&|_, _| false, tokens, 1));
        // Memory of another shape leaves no trace.
        let mut sample = InactiveSample::default();
        for tokens in [tokens, 50, tokens] {
            sample.draw(Array2::from_elem((tokens, experts), false).view(), 0.4, 1);
        }
        assert_eq!(sample.chosen, all);
    }

    /// Micro-batches, layers and seeds have draws of their own.
    #[test]
    fn places_have_their_own_seeds() {
        let seed_at =
            |seed, index, layer| match (RouterGradientAt { rule: RouterGradient::Sample(0.5), seed, index })
                .of_layer(layer)
            {
                InactivePairs::Sample { seed, .. } => seed,
                other => panic!("{other:?}"),
            };
        let places =
            (0..4).flat_map(|seed| (0..4).flat_map(move |index| (0..4).map(move |at| (seed, index, at))));
        let seeds: BTreeSet<u64> = places.map(|(seed, index, layer)| seed_at(seed, index, layer)).collect();
        assert_eq!(seeds.len(), 64);
        let whole = RouterGradientAt { rule: RouterGradient::Sample(1.0), seed: 1, index: 2 };
        assert_eq!(whole.of_layer(0), InactivePairs::ALL);
        let each = RouterGradientAt { rule: RouterGradient::Every(1), seed: 1, index: 2 };
        assert_eq!(each.of_layer(0), InactivePairs::ALL);
    }
}
