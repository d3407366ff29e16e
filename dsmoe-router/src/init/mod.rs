//! Initial router weights.

mod calibrated;

use std::fmt;
use std::str::FromStr;

use dsmoe_kernels::rng::Rng;
use ndarray::{Array1, Array2, ArrayView2, Axis};

pub use calibrated::{RouterValues, calibrated};

use crate::{Error, Result};

/// Gate of an expert that `open` and `warm` start open; 1 minus this when shut.
const OPEN_GATE: f32 = 0.95;
const RANDOM_STD: f32 = 0.02;
const BIASED_STD: f32 = 0.01;

/// Initial router weights. Parses from and prints as `random`, `open`, `centroid`, `warm(3)`.
///
/// ```
/// use dsmoe_router::{RouterInit, router_weights};
///
/// let init: RouterInit = "warm(3)".parse()?;
/// let (weight, bias) = router_weights(&init, 8, 64, 0, 0, None)?;
/// assert_eq!(weight.dim(), (8, 64));
/// assert_eq!(bias.unwrap().iter().filter(|&&b| b > 0.0).count(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouterInit {
    /// N(0, 0.02^2), no bias: about half of the experts active (the paper).
    Random,
    /// N(0, 0.01^2) and a trainable bias logit(0.95): all experts active, close to the dense function.
    Open,
    /// Row i is the direction of expert i's mean `gate_proj` row, of length 1, no bias: an input with
    /// root-mean-square 1 gives logits of standard deviation about 1.
    Centroid,
    /// N(0, 0.01^2) and a trainable bias: logit(0.95) for this many experts, minus that for the rest. Which ones
    /// moves on from layer to layer, so that no expert index is favoured.
    Warm(usize),
}

impl RouterInit {
    /// Returns whether the router has a bias.
    pub fn has_bias(&self) -> bool {
        matches!(self, RouterInit::Open | RouterInit::Warm(_))
    }
}

impl FromStr for RouterInit {
    type Err = Error;

    fn from_str(s: &str) -> Result<RouterInit> {
        let allowed = "random, open, centroid or warm(K), K experts open";
        let warm = || s.strip_prefix("warm(")?.strip_suffix(')')?.parse().ok().map(RouterInit::Warm);
        match s {
            "random" => Ok(RouterInit::Random),
            "open" => Ok(RouterInit::Open),
            "centroid" => Ok(RouterInit::Centroid),
            _ => warm().ok_or_else(|| Error::UnknownName { field: "router init", found: s.into(), allowed }),
        }
    }
}

impl fmt::Display for RouterInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouterInit::Random => f.write_str("random"),
            RouterInit::Open => f.write_str("open"),
            RouterInit::Centroid => f.write_str("centroid"),
            RouterInit::Warm(k) => write!(f, "warm({k})"),
        }
    }
}

/// Returns the weight `[num_experts, hidden]` and, for [`RouterInit::has_bias`], the bias `[num_experts]` of the
/// router of `layer`: a function of the arguments alone. `centroids` `[num_experts, hidden]` is read by `Centroid`
/// only: row i is the mean of expert i's `gate_proj` rows, times the norm weight where the caller wants it.
///
/// # Errors
/// `Warm(k)` with k not in 1..=num_experts; `Centroid` without centroids, or with one that is zero or not finite.
///
/// # Panics
/// `centroids` is not `[num_experts, hidden]`.
pub fn router_weights(
    init: &RouterInit,
    num_experts: usize,
    hidden: usize,
    seed: u64,
    layer: usize,
    centroids: Option<ArrayView2<'_, f32>>,
) -> Result<(Array2<f32>, Option<Array1<f32>>)> {
    let normal = |std| {
        let mut rng = Rng::new(seed, u64::from_be_bytes(*b"router\0\0") + layer as u64);
        Array2::from_shape_simple_fn((num_experts, hidden), || std * rng.normal())
    };
    let open = (OPEN_GATE / (1.0 - OPEN_GATE)).ln();
    match *init {
        RouterInit::Random => Ok((normal(RANDOM_STD), None)),
        RouterInit::Open => Ok((normal(BIASED_STD), Some(Array1::from_elem(num_experts, open)))),
        RouterInit::Centroid => {
            let centroids = centroids.ok_or(Error::NoCentroids)?;
            assert_eq!(centroids.dim(), (num_experts, hidden), "router_weights: shape of centroids");
            Ok((unit_rows(centroids, layer)?, None))
        }
        RouterInit::Warm(k) => {
            if !(1..=num_experts).contains(&k) {
                let allowed = format!("1 to the number of experts, {num_experts}");
                return Err(Error::range("k of router init warm(k)", k, allowed));
            }
            let first = layer * k;
            let bias = Array1::from_shape_fn(num_experts, |i| {
                let turn = (i + num_experts - first % num_experts) % num_experts;
                if turn < k { open } else { -open }
            });
            Ok((normal(BIASED_STD), Some(bias)))
        }
    }
}

fn unit_rows(centroids: ArrayView2<'_, f32>, layer: usize) -> Result<Array2<f32>> {
    let mut rows = centroids.to_owned();
    for (expert, mut row) in rows.axis_iter_mut(Axis(0)).enumerate() {
        let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        if !(norm.is_finite() && norm > 0.0) {
            return Err(Error::BadCentroid { expert, layer });
        }
        row.mapv_inplace(|x| (f64::from(x) / norm) as f32);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn std(weights: &Array2<f32>) -> f32 {
        let n = weights.len() as f32;
        (weights.iter().map(|x| x * x).sum::<f32>() / n).sqrt()
    }

    #[test]
    fn names_round_trip() {
        for init in [RouterInit::Random, RouterInit::Open, RouterInit::Centroid, RouterInit::Warm(3)] {
            assert_eq!(init.to_string().parse::<RouterInit>().unwrap(), init);
        }
        for bad in ["", "warm", "warm()", "warm(-1)", "warm(3", "warm(99999999999999999999)", "Open"] {
            let error = bad.parse::<RouterInit>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("unknown router init `{bad}`; use random")), "{error}");
        }
    }

    #[test]
    fn random_and_open_have_their_spread_and_bias() {
        let (weight, bias) = router_weights(&RouterInit::Random, 8, 512, 1, 0, None).unwrap();
        assert!((std(&weight) / 0.02 - 1.0).abs() < 0.05);
        assert_eq!(bias, None);
        let (weight, bias) = router_weights(&RouterInit::Open, 8, 512, 1, 0, None).unwrap();
        assert!((std(&weight) / 0.01 - 1.0).abs() < 0.05);
        assert!(bias.unwrap().iter().all(|b| (1.0 / (1.0 + (-b).exp()) - 0.95).abs() < 1e-5));
    }

    #[test]
    fn weights_depend_on_seed_and_layer_alone() {
        let at = |seed, layer| router_weights(&RouterInit::Random, 4, 16, seed, layer, None).unwrap().0;
        assert_eq!(at(1, 2), at(1, 2));
        assert_ne!(at(1, 2), at(1, 3));
        assert_ne!(at(1, 2), at(2, 2));
    }

    #[test]
    fn warm_opens_k_experts_and_rotates() {
        let mut opened = [0; 8];
        for layer in 0..8 {
            let (_, bias) = router_weights(&RouterInit::Warm(3), 8, 4, 1, layer, None).unwrap();
            let open: Vec<usize> = (0..8).filter(|&i| bias.as_ref().unwrap()[i] > 0.0).collect();
            assert_eq!(open.len(), 3);
            open.iter().for_each(|&i| opened[i] += 1);
        }
        assert_eq!(opened, [3; 8]);
        for k in [0, 9] {
            let error = router_weights(&RouterInit::Warm(k), 8, 4, 1, 0, None).unwrap_err();
            assert!(error.to_string().contains("use 1 to the number of experts, 8"), "{error}");
        }
    }

    #[test]
    fn centroid_rows_have_length_one() {
        let rows = Array2::from_shape_fn((2, 3), |(i, j)| (i * 3 + j) as f32 - 1.0);
        let (weight, bias) = router_weights(&RouterInit::Centroid, 2, 3, 1, 0, Some(rows.view())).unwrap();
        assert_eq!(bias, None);
        for (row, source) in weight.outer_iter().zip(rows.outer_iter()) {
            assert!((row.dot(&row) - 1.0).abs() < 1e-6);
            assert!((row.dot(&source) - source.dot(&source).sqrt()).abs() < 1e-5);
        }
        let zero = Array2::zeros((2, 3));
        let make = |c| router_weights(&RouterInit::Centroid, 2, 3, 1, 5, c).unwrap_err().to_string();
        assert!(make(None).contains("use `random` or `open`"));
        assert!(make(Some(zero.view())).contains("expert 0 in layer 5"));
    }
}
