//! LLaMA-MoE's ways of forming experts of a dense FFN's neurons. The index set of an expert serves gate, up and down.

use dsmoe_core::partition::Partition;
use serde::{Deserialize, Serialize};

use super::importance::LayerImportance;
use crate::error::Result;

/// A way of forming experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Construction {
    /// Independent-Random: every neuron in one random expert, different in every layer.
    Random,
    /// Independent-Clustering: balanced k-means on the rows of `up_proj`, scaled to length 1.
    Clustering,
    /// Sharing-Inner: expert c has the neurons that matter most for the c-th group of texts. A neuron may be in several
    /// experts or in none.
    SharingInner,
    /// Sharing-Inter: neurons that matter most for most groups are in residual experts, which always run. Each other
    /// neuron is in one of the other experts.
    SharingInter,
}

impl Construction {
    /// Returns true if it takes gradients over calibration text.
    pub fn needs_calibration(self) -> bool {
        matches!(self, Construction::SharingInner | Construction::SharingInter)
    }
}

/// Forms experts by Independent-Random; returns the neurons of one expert after the other.
pub(crate) fn random(intermediate: usize, num_experts: usize, seed: u64, layer: usize) -> Result<Vec<u32>> {
    let partition = Partition::random(intermediate, num_experts, seed, layer)?;
    Ok((0..num_experts).flat_map(|expert| partition.expert(expert)).collect())
}

/// Forms experts by Sharing-Inner.
pub(crate) fn sharing_inner(importance: &LayerImportance, width: usize) -> Vec<u32> {
    let mut experts: Vec<Vec<u32>> = importance.iter().map(|values| top(values, width, |_| true)).collect();
    experts.iter_mut().for_each(|expert| expert.sort_unstable());
    experts.concat()
}

/// Forms experts by Sharing-Inter, the `num_residual` residual ones last.
pub(crate) fn sharing_inter(importance: &LayerImportance, width: usize, num_residual: usize) -> Vec<u32> {
    let intermediate = importance.first().map_or(0, Vec::len);
    let mut residual = vec![false; intermediate];
    let mut left = num_residual * width;
    while left > 0 {
        let mut count = vec![0usize; intermediate];
        for values in importance {
            top(values, width, |j| !residual[j]).iter().for_each(|&j| count[j as usize] += 1);
        }
        let most = count.iter().copied().max().unwrap_or(0);
        let total: Vec<f64> = (0..intermediate).map(|j| importance.iter().map(|of| of[j]).sum()).collect();
        let moved = top(&total, left, |j| count[j] == most && !residual[j]);
        moved.iter().for_each(|&j| residual[j as usize] = true);
        left -= moved.len();
    }

    let mut pairs: Vec<(usize, u32)> = (0..importance.len())
        .flat_map(|expert| (0..intermediate as u32).map(move |j| (expert, j)))
        .filter(|&(_, j)| !residual[j as usize])
        .collect();
    pairs.sort_by(|a, b| {
        let value = |&(expert, j): &(usize, u32)| importance[expert][j as usize];
        value(b).total_cmp(&value(a)).then(a.cmp(b))
    });
    let mut taken = residual.clone();
    let mut experts = vec![Vec::with_capacity(width); importance.len()];
    for (expert, j) in pairs {
        if experts[expert].len() < width && !taken[j as usize] {
            experts[expert].push(j);
            taken[j as usize] = true;
        }
    }
    experts.iter_mut().for_each(|expert| expert.sort_unstable());
    experts.push((0..intermediate as u32).filter(|&j| residual[j as usize]).collect());
    experts.concat()
}

/// Selects up to `count` neurons of the largest values among those of `among`, the lower first among equals.
fn top(values: &[f64], count: usize, among: impl Fn(usize) -> bool) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).filter(|&j| among(j as usize)).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    fn is_permutation(order: &[u32]) -> bool {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        sorted.iter().zip(0..).all(|(&a, b)| a == b)
    }

    #[test]
    fn independent_experts_are_a_permutation_and_a_function_of_the_seed() {
        let random = |seed, layer| random(24, 4, seed, layer).unwrap();
        assert!(is_permutation(&random(1, 0)));
        assert_eq!(random(1, 0), random(1, 0));
        assert_ne!(random(1, 0), random(1, 1));
        assert_ne!(random(1, 0), random(2, 0));
        // Rows of four directions and any length: a cluster each.
        let mut rows = normals(24 * 8, 3);
        for (j, row) in rows.chunks_exact_mut(8).enumerate() {
            row.iter_mut().for_each(|x| *x *= 0.01);
            row[j % 4] += 1.0;
            row.iter_mut().for_each(|x| *x *= 1.0 + j as f32);
        }
        let (order, centers) = dsmoe_core::partition::clusters::neurons(rows.clone(), 8, 4, 5);
        assert!(is_permutation(&order));
        for (expert, center) in order.chunks_exact(6).zip(centers.chunks_exact(8)) {
            assert!(expert.iter().all(|j| j % 4 == expert[0] % 4), "{order:?}");
            assert!(center[(expert[0] % 4) as usize] > 0.99, "{center:?}");
        }
        assert_eq!((order, centers), dsmoe_core::partition::clusters::neurons(rows, 8, 4, 5));
    }

    #[test]
    fn sharing_by_hand() {
        // Six neurons, two groups, experts of two neurons.
        let importance = vec![vec![5.0, 4.0, 3.0, 2.0, 1.0, 0.5], vec![0.1, 4.5, 2.5, 2.0, 6.0, 0.2]];
        assert_eq!(sharing_inner(&importance, 2), [0, 1, 1, 4]);
        // Neuron 1 is in both lists [0, 1] and [4, 1]. Without it the lists are [0, 2] and [4, 2]: neuron 2 follows.
        // The rest by falling value: (1, 4) 6, (0, 0) 5, (0, 3) 2, and (1, 5) is what is left.
        assert_eq!(sharing_inter(&importance, 2, 1), [0, 3, 4, 5, 1, 2]);
        let many: LayerImportance =
            (0..3).map(|group| normals(40, group).iter().map(|x| f64::from(x.abs())).collect()).collect();
        assert!(is_permutation(&sharing_inter(&many, 10, 1)));
        assert!(is_permutation(&sharing_inter(&many, 8, 2)));
    }

    #[test]
    fn neurons_without_importance_are_split_too() {
        assert!(is_permutation(&sharing_inter(&vec![vec![0.0; 12]; 3], 3, 1)));
    }
}
