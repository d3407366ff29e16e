//! Cutting the neurons of an FFN into experts of equal size (eq. 6), and putting them back.
//!
//! Neuron j is row j of gate and up and column j of down; permuting all three alike leaves the FFN unchanged, so a
//! partition is a list of indices and its inverse is exact.

mod assignment;
pub mod clusters;

pub use assignment::assign;

use std::path::Path;

use dsmoe_kernels::rng::Rng;
use ndarray::{Array2, ArrayView2, Axis};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::json::{parse, read_json};

/// The most experts an error message suggests.
const MOST_SUGGESTED: usize = 64;

/// Assignment of the neurons of one layer to experts: stored row j is original neuron `order[j]`, and expert i is the
/// rows `i * width..(i + 1) * width`.
///
/// ```
/// use dsmoe_core::partition::Partition;
///
/// let partition = Partition::from_experts(4, &[vec![0, 3], vec![1, 2]])?;
/// assert_eq!(partition.order(), Some(&[0, 3, 1, 2][..]));
/// assert_eq!(partition.expert(1), [1, 2]);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    num_experts: usize,
    intermediate: usize,
    /// None for the identity.
    order: Option<Vec<u32>>,
}

/// A user's partition file: one list of experts per layer, each a list of neurons.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Layers {
    layers: Vec<Vec<Vec<u32>>>,
}

impl Partition {
    /// Makes expert i of the i-th block of neurons.
    ///
    /// # Errors
    /// `intermediate` is not divisible by `num_experts`.
    pub fn contiguous(intermediate: usize, num_experts: usize) -> Result<Partition> {
        check_divisible(intermediate, num_experts, None)?;
        Ok(Partition { num_experts, intermediate, order: None })
    }

    /// Puts every neuron in a random expert, ascending inside it; a function of the arguments alone.
    ///
    /// # Errors
    /// `intermediate` is not divisible by `num_experts`.
    pub fn random(intermediate: usize, num_experts: usize, seed: u64, layer: usize) -> Result<Partition> {
        check_divisible(intermediate, num_experts, None)?;
        let mut rng = Rng::new(seed, u64::from_be_bytes(*b"neurons\0") ^ layer as u64);
        let mut order: Vec<u32> = (0..intermediate as u32).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        order.chunks_mut(intermediate / num_experts).for_each(<[u32]>::sort_unstable);
        Partition::from_order(order, num_experts)
    }

    /// Makes a partition of lists of neurons, one per expert.
    ///
    /// # Errors
    /// The lists are not of one size, or do not hold each of `0..intermediate` once.
    pub fn from_experts(intermediate: usize, experts: &[Vec<u32>]) -> Result<Partition> {
        check_divisible(intermediate, experts.len(), None)?;
        let width = intermediate / experts.len();
        if let Some((i, expert)) = experts.iter().enumerate().find(|(_, expert)| expert.len() != width) {
            let problem = format!("expert {i} has {} neurons of {intermediate}, not {width}", expert.len());
            return Err(Error::Partition(problem));
        }
        Partition::from_order(experts.concat(), experts.len())
    }

    /// Makes a partition of the neurons of all experts, one expert after the other.
    ///
    /// # Errors
    /// `order` is not a permutation of `0..len`, or not divisible by `num_experts`.
    pub fn from_order(order: Vec<u32>, num_experts: usize) -> Result<Partition> {
        let intermediate = order.len();
        check_divisible(intermediate, num_experts, None)?;
        let mut seen = vec![false; intermediate];
        for &neuron in &order {
            match seen.get_mut(neuron as usize) {
                Some(seen) if !*seen => *seen = true,
                Some(_) => return Err(Error::Partition(format!("neuron {neuron} is there twice"))),
                None => {
                    let problem = format!("neuron {neuron} is not below intermediate_size {intermediate}");
                    return Err(Error::Partition(problem));
                }
            }
        }
        let identity = order.iter().zip(0..).all(|(&neuron, i)| neuron == i);
        Ok(Partition { num_experts, intermediate, order: (!identity).then_some(order) })
    }

    /// Reads the partitions of `num_layers` layers from JSON: `{"layers": [[[neuron, ...] per expert] per layer]}`,
    /// with a list for every layer or one for all; or that one list of experts by itself.
    ///
    /// # Errors
    /// The file cannot be read or is not of that form, or a layer's lists are no partition into `num_experts`.
    pub fn read_file(
        path: &Path,
        num_layers: usize,
        intermediate: usize,
        num_experts: usize,
    ) -> Result<Vec<Partition>> {
        let text = read_json(path)?;
        let (form, help) = ("a partition", "write {\"layers\": [[[neuron, ...] per expert] per layer]}");
        let layers = match text.trim_start().starts_with('[') {
            true => vec![parse(path, &text, form, help)?],
            false => parse::<Layers>(path, &text, form, help)?.layers,
        };
        if layers.len() != 1 && layers.len() != num_layers {
            let help = "give one list for every layer, or one for all";
            let problem = format!("has {} lists and the model {num_layers} layers", layers.len());
            return Err(Error::field(path, "layers", problem, help));
        }
        let read = |(i, experts): (usize, &Vec<Vec<u32>>)| {
            let field = format!("layers[{i}]");
            if experts.len() != num_experts {
                let problem = format!("has {} experts, not {num_experts}", experts.len());
                return Err(Error::field(
                    path,
                    field,
                    problem,
                    format!("set {{experts}} to {}", experts.len()),
                ));
            }
            Partition::from_experts(intermediate, experts).map_err(|cause| {
                let problem = format!("is no partition ({cause})");
                Error::field(path, field, problem, "list every neuron once")
            })
        };
        let partitions = layers.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?;
        Ok(partitions.iter().cycle().take(num_layers).cloned().collect())
    }

    /// Returns the number of experts.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Returns the number of neurons of an expert.
    pub fn expert_width(&self) -> usize {
        self.intermediate / self.num_experts
    }

    /// Returns the original neuron of every stored row; none when they are in the original order.
    pub fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// Returns the stored row of every original neuron; none when they are in the original order.
    pub fn inverse(&self) -> Option<Vec<u32>> {
        let order = self.order.as_ref()?;
        let mut inverse = vec![0; order.len()];
        for (&neuron, row) in order.iter().zip(0..) {
            inverse[neuron as usize] = row;
        }
        Some(inverse)
    }

    /// Returns the neurons of expert `i`, in stored order.
    ///
    /// # Panics
    /// There are not that many experts.
    pub fn expert(&self, i: usize) -> Vec<u32> {
        assert!(i < self.num_experts, "partition: expert {i} of {}", self.num_experts);
        let width = self.expert_width();
        let rows = i * width..(i + 1) * width;
        match &self.order {
            Some(order) => order[rows].to_vec(),
            None => rows.map(|row| row as u32).collect(),
        }
    }

    /// Reorders `[intermediate, hidden]` (gate, up, or transposed down) from original to stored order.
    ///
    /// # Panics
    /// There are not `intermediate` rows.
    pub fn partition_rows(&self, original: ArrayView2<'_, f32>) -> Array2<f32> {
        self.select(original, self.order.as_deref())
    }

    /// Reorders `[intermediate, hidden]` from stored to original order: the inverse of [`Partition::partition_rows`].
    ///
    /// # Panics
    /// There are not `intermediate` rows.
    pub fn unpartition_rows(&self, stored: ArrayView2<'_, f32>) -> Array2<f32> {
        self.select(stored, self.inverse().as_deref())
    }

    fn select(&self, rows: ArrayView2<'_, f32>, order: Option<&[u32]>) -> Array2<f32> {
        assert_eq!(rows.nrows(), self.intermediate, "partition: rows and intermediate");
        match order {
            Some(order) => rows.select(Axis(0), &order.iter().map(|&row| row as usize).collect::<Vec<_>>()),
            None => rows.to_owned(),
        }
    }
}

/// Checks that `intermediate` neurons make `num_experts` equal experts; `path` is the configuration, for the message.
///
/// # Errors
/// They do not.
pub fn check_divisible(intermediate: usize, num_experts: usize, path: Option<&Path>) -> Result<()> {
    if num_experts > 0 && intermediate > 0 && intermediate.is_multiple_of(num_experts) {
        return Ok(());
    }
    let divisors = (1..=MOST_SUGGESTED).filter(|&n| intermediate.is_multiple_of(n));
    let divisors = divisors.map(|n| n.to_string()).collect::<Vec<_>>().join(", ");
    Err(Error::Indivisible { path: path.map(Path::to_path_buf), intermediate, num_experts, divisors })
}
