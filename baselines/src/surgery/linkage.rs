//! Agglomerative clustering: every item starts alone, and the two nearest clusters merge until as many are left as wanted.

use serde::{Deserialize, Serialize};

/// Distance of two clusters A and B, from the distances d of their members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Linkage {
    /// The mean of d over all pairs.
    Average,
    /// The least d.
    Single,
    /// The largest d.
    Complete,
    /// |A| |B| / (|A| + |B|) times the distance of the means.
    Ward,
}

/// Returns the distance of two clusters by the distances `[n, n]` of items.
fn linkage(distances: &[f64], linkage: Linkage, a: &[usize], b: &[usize]) -> f64 {
    let n = distances.len().isqrt();
    let of = |a: &[usize], b: &[usize]| -> Vec<f64> {
        a.iter().flat_map(|&a| b.iter().map(move |&b| distances[a * n + b])).collect()
    };
    let squares = |a, b| of(a, b).iter().map(|d| d * d).sum::<f64>();
    let [size_a, size_b] = [a, b].map(|members| members.len() as f64);
    match linkage {
        Linkage::Average => of(a, b).iter().sum::<f64>() / (size_a * size_b),
        Linkage::Single => of(a, b).into_iter().fold(f64::INFINITY, f64::min),
        Linkage::Complete => of(a, b).into_iter().fold(0.0, f64::max),
        Linkage::Ward => {
            // The squared distance of two means, from those of the members.
            let within = squares(a, a) / (size_a * size_a) + squares(b, b) / (size_b * size_b);
            let squared = squares(a, b) / (size_a * size_b) - within / 2.0;
            size_a * size_b / (size_a + size_b) * squared.max(0.0).sqrt()
        }
    }
}

/// Merges the items of distances `[n, n]` until `clusters` are left. Returns the cluster of every item, numbered by first members, and the distances at which
/// clusters merged. Among equal distances the pair of the lowest first members merges.
pub(super) fn agglomerate(distances: &[f64], by: Linkage, clusters: usize) -> (Vec<usize>, Vec<f64>) {
    let n = distances.len().isqrt();
    let mut members: Vec<Vec<usize>> = (0..n).map(|item| vec![item]).collect();
    let mut heights = Vec::new();
    while members.len() > clusters.max(1) {
        let pairs = (0..members.len()).flat_map(|a| (a + 1..members.len()).map(move |b| (a, b)));
        let distance = |(a, b): (usize, usize)| (linkage(distances, by, &members[a], &members[b]), a, b);
        // The first of the least: clusters are in the order of their first members.
        let nearest =
            pairs.map(distance).reduce(|least, other| if other.0 < least.0 { other } else { least });
        let Some((height, a, b)) = nearest else { break };
        let merged = members.remove(b);
        members[a].extend(merged);
        members[a].sort_unstable();
        heights.push(height);
    }
    let mut labels = vec![0; n];
    for (cluster, members) in members.iter().enumerate() {
        members.iter().for_each(|&item| labels[item] = cluster);
    }
    (labels, heights)
}
