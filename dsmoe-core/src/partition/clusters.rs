//! Experts of similar neurons: k-means with clusters of equal size.
//!
//! Centers start by k-means++; then points are assigned exactly (`assign`) and centers become means, in turn, which
//! lowers the inertia until nothing changes. Small problems are run from several starts, and the least inertia is kept.

use dsmoe_kernels::matmul::{Mat, Matmul, Precision};
use dsmoe_kernels::rng::Rng;
use rayon::prelude::*;

use super::assignment::assign;

/// The largest number of rounds.
const MOST_ROUNDS: usize = 100;
/// The largest number of starts.
const MOST_STARTS: usize = 10;
/// The largest number of products in the distances of all starts' first rounds; one start always runs. Few points
/// often end in a poor local minimum and are cheap to run again; starts of thousands of rows end in nearly equal
/// inertia.
const STARTS_WORK: usize = 1 << 26;

/// A clustering of points.
///
/// ```
/// use dsmoe_core::partition::clusters::{Clustering, balanced};
///
/// let points = [0.0, 10.0, 0.1, 10.1];
/// let Clustering { labels, .. } = balanced(&points, 1, 2, 0);
/// assert!(labels[0] == labels[2] && labels[1] == labels[3] && labels[0] != labels[1]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Clustering {
    /// The cluster of each point.
    pub labels: Vec<usize>,
    /// `[clusters, dim]`: the means of their points.
    pub centers: Vec<f32>,
    /// Sum of the squared distances of the points to the centers of their clusters.
    pub inertia: f64,
}

/// Clusters the rows of `points` `[items, dim]` in clusters whose sizes differ by at most one. The result depends on
/// the arguments alone.
///
/// # Panics
/// There are fewer points than clusters, no clusters, or points that are not finite.
pub fn balanced(points: &[f32], dim: usize, num_clusters: usize, seed: u64) -> Clustering {
    let items = points.len() / dim;
    assert!(
        (1..=items).contains(&num_clusters),
        "kmeans: {num_clusters} clusters of {items} points of {dim} values"
    );
    let norms: Vec<f64> = points.chunks_exact(dim).map(square).collect();
    let starts = (STARTS_WORK / (points.len() * num_clusters).max(1)).clamp(1, MOST_STARTS);
    let runs: Vec<Clustering> = (0..starts as u64)
        .into_par_iter()
        .map(|start| {
            let centers = first_centers(points, &norms, dim, num_clusters, seed, start);
            descend(points, &norms, dim, centers)
        })
        .collect();
    // The first among equals.
    runs.into_iter().min_by(|a, b| a.inertia.total_cmp(&b.inertia)).expect("a start")
}

/// Alternates assignments and means, from `centers`.
fn descend(points: &[f32], norms: &[f64], dim: usize, mut centers: Vec<f32>) -> Clustering {
    let (items, n) = (norms.len(), centers.len() / dim);
    let sizes: Vec<usize> = (0..n).map(|c| (items + c) / n).collect();
    let mut best: Option<Clustering> = None;
    for _ in 0..MOST_ROUNDS {
        let labels = assign(&distances(points, norms, &centers, dim), &sizes);
        if best.as_ref().is_some_and(|best| best.labels == labels) {
            break;
        }
        centers = means(points, dim, &labels, &sizes);
        let inertia = points.chunks_exact(dim).zip(&labels);
        let inertia = inertia.map(|(point, &c)| between(point, &centers[c * dim..][..dim])).sum();
        // Distances come from f32 products: rounding can make two clusterings alternate.
        if best.as_ref().is_some_and(|best| best.inertia <= inertia) {
            break;
        }
        best = Some(Clustering { labels, centers: centers.clone(), inertia });
    }
    best.expect("a first round")
}

/// Draws centers by k-means++: each is a point, with probability proportional to its squared distance to the nearest
/// center before it. Each `start` draws others.
fn first_centers(
    points: &[f32],
    norms: &[f64],
    dim: usize,
    num_clusters: usize,
    seed: u64,
    start: u64,
) -> Vec<f32> {
    let items = norms.len();
    let mut rng = Rng::new(seed, u64::from_be_bytes(*b"kmeans++") ^ start);
    let mut chosen = vec![rng.below(items as u64) as usize];
    let mut nearest = vec![f64::INFINITY; items];
    while chosen.len() < num_clusters {
        let last = chosen[chosen.len() - 1];
        let to_last = distances(points, norms, &points[last * dim..][..dim], dim);
        nearest.iter_mut().zip(to_last).for_each(|(nearest, distance)| *nearest = nearest.min(distance));
        // A point that is a center keeps no chance, whatever rounding leaves of its distance.
        chosen.iter().for_each(|&point| nearest[point] = 0.0);
        let total: f64 = nearest.iter().sum();
        let mut left = total * (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let drawn = nearest.iter().position(|&distance| {
            left -= distance;
            left < 0.0
        });
        // If all points coincide with centers, any other point serves.
        let drawn = drawn.or_else(|| (0..items).find(|point| !chosen.contains(point)));
        chosen.push(drawn.expect("fewer centers than points"));
    }
    chosen.iter().flat_map(|&point| &points[point * dim..][..dim]).copied().collect()
}

/// Computes squared distances `[items, clusters]`: |x|^2 - 2 x c + |c|^2.
fn distances(points: &[f32], norms: &[f64], centers: &[f32], dim: usize) -> Vec<f64> {
    let (items, n) = (norms.len(), centers.len() / dim);
    let mut products = vec![0.0; items * n];
    let (left, right) = (Mat::new(points, items, dim), Mat::new(centers, n, dim).t());
    Matmul { c: &mut products, a: left, b: right, accumulate: false, precision: Precision::F32 }.run();
    let squares: Vec<f64> = centers.chunks_exact(dim).map(square).collect();
    let rows = products.chunks_exact(n).zip(norms);
    rows.flat_map(|(row, norm)| {
        row.iter().zip(&squares).map(move |(&xc, cc)| (norm - 2.0 * f64::from(xc) + cc).max(0.0))
    })
    .collect()
}

/// Computes the means `[clusters, dim]` of the points of each cluster; `sizes` are the sizes of the clusters.
pub fn means(points: &[f32], dim: usize, labels: &[usize], sizes: &[usize]) -> Vec<f32> {
    let mut sums = vec![0.0f64; sizes.len() * dim];
    for (point, &c) in points.chunks_exact(dim).zip(labels) {
        let sum = &mut sums[c * dim..][..dim];
        sum.iter_mut().zip(point).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let sums = sums.chunks_exact(dim).zip(sizes);
    sums.flat_map(|(sum, &size)| sum.iter().map(move |sum| (sum / size as f64) as f32)).collect()
}

fn square(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum()
}

fn between(x: &[f32], center: &[f32]) -> f64 {
    x.iter().zip(center).map(|(&x, &c)| (f64::from(x) - f64::from(c)).powi(2)).sum()
}

/// Divides each row of a matrix by its length; rows of zeros stay.
pub fn normalized(mut rows: Vec<f32>, dim: usize) -> Vec<f32> {
    for row in rows.chunks_exact_mut(dim) {
        let norm = square(row).sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
    }
    rows
}

/// Clusters the neurons with the given `rows` `[intermediate, hidden]`, each scaled to length 1. Returns the neurons,
/// one expert after the other, and the centers of the clusters `[num_experts, hidden]`.
pub fn neurons(rows: Vec<f32>, hidden: usize, num_experts: usize, seed: u64) -> (Vec<u32>, Vec<f32>) {
    let clusters = balanced(&normalized(rows, hidden), hidden, num_experts, seed);
    let mut order: Vec<u32> = (0..clusters.labels.len() as u32).collect();
    order.sort_by_key(|&neuron| clusters.labels[neuron as usize]);
    (order, clusters.centers)
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    const DIM: usize = 3;

    /// The least inertia over all clusterings of those sizes.
    fn brute_force(points: &[f32], left: &mut Vec<usize>, labels: &mut Vec<usize>) -> f64 {
        let sizes: Vec<usize> =
            (0..left.len()).map(|c| left[c] + labels.iter().filter(|&&label| label == c).count()).collect();
        if labels.len() * DIM == points.len() {
            let centers = means(points, DIM, labels, &sizes);
            let pairs = points.chunks_exact(DIM).zip(&*labels);
            return pairs.map(|(point, &c)| between(point, &centers[c * DIM..][..DIM])).sum();
        }
        let mut best = f64::INFINITY;
        for c in 0..left.len() {
            if left[c] > 0 {
                left[c] -= 1;
                labels.push(c);
                best = best.min(brute_force(points, left, labels));
                labels.pop();
                left[c] += 1;
            }
        }
        best
    }

    #[test]
    fn separated_points_are_clustered_as_well_as_can_be() {
        for seed in 0..10 {
            let mut points = normals(9 * DIM, seed);
            points.iter_mut().enumerate().for_each(|(i, x)| *x += 20.0 * (i / DIM % 3) as f32);
            let found = balanced(&points, DIM, 3, seed);
            let best = brute_force(&points, &mut vec![3, 3, 3], &mut Vec::new());
            assert!((found.inertia - best).abs() < 1e-4 * best, "seed {seed}: {} {best}", found.inertia);
            assert_eq!(found, balanced(&points, DIM, 3, seed));
        }
    }

    #[test]
    fn any_points_are_clustered_evenly_and_nearly_as_well_as_can_be() {
        let (mut found, mut best) = (0.0, 0.0);
        for seed in 0..20 {
            let points = normals(8 * DIM, 100 + seed);
            let clustering = balanced(&points, DIM, 3, seed);
            let mut sizes = [0; 3];
            clustering.labels.iter().for_each(|&label| sizes[label] += 1);
            assert_eq!(sizes, [2, 3, 3]);
            let least = brute_force(&points, &mut vec![2, 3, 3], &mut Vec::new());
            assert!(clustering.inertia > least - 1e-6, "seed {seed}");
            found += clustering.inertia;
            best += least;
        }
        // k-means stops where no step of its own helps; points without structure have many such places.
        assert!(found < 1.25 * best, "inertia {found}, the least is {best}");
    }

    #[test]
    fn equal_points_are_spread() {
        let clustering = balanced(&[1.0; 6 * DIM], DIM, 3, 0);
        let mut labels = clustering.labels;
        labels.sort_unstable();
        assert_eq!(labels, [0, 0, 1, 1, 2, 2]);
        assert_eq!(clustering.inertia, 0.0);
    }

    #[test]
    fn rows_are_normalized_and_zeros_stay() {
        assert_eq!(normalized(vec![3.0, 4.0, 0.0, 0.0], 2), [0.6, 0.8, 0.0, 0.0]);
    }
}
