//! Routers that stand in for a model's own, to bound what a router can be worth at the same number of experts per token.

use std::fmt;
use std::str::FromStr;

use ndarray::Array2;

use crate::error::{Error, shown};

/// A choice of experts that no router makes. A token opens as many experts as its router would.
///
/// ```
/// use dsmoe_core::ffn::RouterBound;
///
/// let bound: RouterBound = "oracle".parse()?;
/// assert_eq!(bound, RouterBound::Oracle);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterBound {
    /// Those whose outputs are largest, computed from all experts: an upper bound.
    Oracle,
    /// Those of the largest pseudo-random numbers: a lower bound.
    Random,
}

impl FromStr for RouterBound {
    type Err = Error;

    /// Parses `oracle` or `random`.
    fn from_str(s: &str) -> Result<RouterBound, Error> {
        match s {
            "oracle" => Ok(RouterBound::Oracle),
            "random" => Ok(RouterBound::Random),
            _ => Err(Error::argument(format!("unknown router `{}`", shown(s)), "use oracle or random")),
        }
    }
}

impl fmt::Display for RouterBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RouterBound::Oracle => "oracle",
            RouterBound::Random => "random",
        })
    }
}

/// Returns numbers from 0 to 1 for the pairs of tokens and experts that depend on the tokens' inputs `x` alone, so that
/// they are the same however a text is fed.
pub(super) fn draws(x: &[f32], hidden: usize, experts: usize) -> Array2<f64> {
    let seed = |row: &[f32]| row.iter().fold(0, |hash: u64, x| mix(hash ^ u64::from(x.to_bits())));
    let seeds: Vec<u64> = x.chunks_exact(hidden).map(seed).collect();
    Array2::from_shape_fn((seeds.len(), experts), |(t, i)| {
        (mix(seeds[t] ^ mix(i as u64 + 1)) >> 11) as f64 / (1u64 << 53) as f64
    })
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    #[test]
    fn draws_are_even_and_belong_to_the_input() {
        let x = normals(400 * 6, 3);
        let all = draws(&x, 6, 10);
        let part = draws(&x[6 * 100..6 * 130], 6, 10);
        assert!(part.outer_iter().zip(all.outer_iter().skip(100)).all(|(part, of_all)| part == of_all));
        let mean = all.mean().unwrap();
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        // Each expert is among the three largest of about three tenths of the tokens.
        let chosen = |row: &[f64], i: usize| row.iter().filter(|&&other| other > row[i]).count() < 3;
        for i in 0..10 {
            let times = all.outer_iter().filter(|row| chosen(row.to_slice().unwrap(), i)).count();
            assert!((80..160).contains(&times), "{i}: {times}");
        }
    }

    #[test]
    fn names_are_read() {
        for bound in [RouterBound::Oracle, RouterBound::Random] {
            assert_eq!(bound.to_string().parse::<RouterBound>().ok(), Some(bound));
        }
        assert!("best".parse::<RouterBound>().unwrap_err().to_string().contains("use oracle or random"));
    }
}
