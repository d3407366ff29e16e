//! Spectral clustering of a few items by their affinities.
//!
//! ```text
//! degree      g_a = sum_b S_ab
//! Laplacian   N = I - G^-1/2 S G^-1/2
//! rows        of the eigenvectors of the least eigenvalues of N, each over its norm
//! clusters    of the rows, by k-means: the best of several starts
//! ```

use dsmoe_kernels::rng::Rng;

/// Starts of k-means.
const STARTS: u64 = 10;
/// Rounds of k-means of one start.
const ROUNDS: usize = 300;
/// Sweeps of rotations, of which a symmetric matrix needs about ten.
const SWEEPS: usize = 64;

/// Returns the cluster of every item of a symmetric `affinity` `[n, n]` with a positive diagonal, numbered by first members.
pub(super) fn cluster(affinity: &[f64], clusters: usize, seed: u64) -> Vec<usize> {
    let n = affinity.len().isqrt();
    if clusters >= n {
        return (0..n).collect();
    }
    let degree: Vec<f64> = affinity.chunks_exact(n).map(|row| row.iter().sum::<f64>().sqrt()).collect();
    let laplacian: Vec<f64> = (0..n * n)
        .map(|i| f64::from(u8::from(i / n == i % n)) - affinity[i] / (degree[i / n] * degree[i % n]))
        .collect();
    let (values, vectors) = eigen(laplacian, n);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]).then(a.cmp(&b)));
    let rows: Vec<Vec<f64>> = (0..n)
        .map(|item| {
            let row: Vec<f64> = order[..clusters].iter().map(|&column| vectors[item * n + column]).collect();
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.iter().map(|x| if norm > 0.0 { x / norm } else { 0.0 }).collect()
        })
        .collect();
    numbered(&best_of_starts(&rows, clusters, seed))
}

/// Numbers clusters by their first members.
pub(super) fn numbered(labels: &[usize]) -> Vec<usize> {
    let mut firsts: Vec<usize> = Vec::new();
    labels
        .iter()
        .map(|label| match firsts.iter().position(|first| first == label) {
            Some(number) => number,
            None => {
                firsts.push(*label);
                firsts.len() - 1
            }
        })
        .collect()
}

/// Returns the eigenvalues of a symmetric matrix `[n, n]`, and its eigenvectors as columns, by Jacobi's rotations.
pub(super) fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut v: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
    for _ in 0..SWEEPS {
        let off: f64 = (0..n * n).filter(|i| i / n != i % n).map(|i| a[i] * a[i]).sum();
        let all: f64 = a.iter().map(|x| x * x).sum();
        if off <= 1e-30 * all {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a, &mut v, n, [p, q]);
            }
        }
    }
    ((0..n).map(|i| a[i * n + i]).collect(), v)
}

/// Rotates rows and columns p and q so that `a[p, q]` becomes 0.
fn rotate(a: &mut [f64], v: &mut [f64], n: usize, [p, q]: [usize; 2]) {
    let entry = a[p * n + q];
    if entry == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * entry);
    let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let c = 1.0 / t.hypot(1.0);
    let s = t * c;
    for i in 0..n {
        let (x, y) = (a[i * n + p], a[i * n + q]);
        (a[i * n + p], a[i * n + q]) = (c * x - s * y, s * x + c * y);
        let (x, y) = (v[i * n + p], v[i * n + q]);
        (v[i * n + p], v[i * n + q]) = (c * x - s * y, s * x + c * y);
    }
    for i in 0..n {
        let (x, y) = (a[p * n + i], a[q * n + i]);
        (a[p * n + i], a[q * n + i]) = (c * x - s * y, s * x + c * y);
    }
}

/// Clusters points by k-means, from the start of the least sum of squares.
fn best_of_starts(points: &[Vec<f64>], clusters: usize, seed: u64) -> Vec<usize> {
    let starts = (0..STARTS).map(|start| k_means(points, clusters, &mut Rng::new(seed, start)));
    let best = starts.reduce(|best, other| if other.1 < best.1 { other } else { best });
    best.map_or_else(Vec::new, |(labels, _)| labels)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

fn nearest(point: &[f64], centers: &[Vec<f64>]) -> (usize, f64) {
    let of = |(i, center): (usize, &Vec<f64>)| (i, distance(point, center));
    let least = |a: (usize, f64), b: (usize, f64)| if b.1 < a.1 { b } else { a };
    centers.iter().enumerate().map(of).reduce(least).unwrap_or((0, f64::INFINITY))
}

/// Returns labels, none without a member where there are as many different points, and the sum of squares.
fn k_means(points: &[Vec<f64>], clusters: usize, rng: &mut Rng) -> (Vec<usize>, f64) {
    let mut centers = first_centers(points, clusters, rng);
    let mut labels = vec![usize::MAX; points.len()];
    for _ in 0..ROUNDS {
        let mut new: Vec<usize> = points.iter().map(|point| nearest(point, &centers).0).collect();
        fill_empty(points, &centers, &mut new);
        if new == labels {
            break;
        }
        labels = new;
        for (cluster, center) in centers.iter_mut().enumerate() {
            let members: Vec<&Vec<f64>> =
                points.iter().zip(&labels).filter(|(_, label)| **label == cluster).map(|(p, _)| p).collect();
            for (axis, x) in center.iter_mut().enumerate() {
                *x = members.iter().map(|p| p[axis]).sum::<f64>() / members.len().max(1) as f64;
            }
        }
    }
    let squares = points.iter().zip(&labels).map(|(point, &label)| distance(point, &centers[label])).sum();
    (labels, squares)
}

/// Chooses centers among the points, each with a probability that grows with its squared distance from those before
/// (k-means++).
fn first_centers(points: &[Vec<f64>], clusters: usize, rng: &mut Rng) -> Vec<Vec<f64>> {
    let mut centers = vec![points[rng.below(points.len() as u64) as usize].clone()];
    while centers.len() < clusters {
        let weights: Vec<f64> = points.iter().map(|point| nearest(point, &centers).1).collect();
        let mut left = f64::from(rng.uniform()) * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        let far = || (0..points.len()).max_by(|&a, &b| weights[a].total_cmp(&weights[b])).unwrap_or(0);
        centers.push(points[chosen.unwrap_or_else(far)].clone());
    }
    centers
}

/// Gives every cluster without a member the point that is farthest from its center, of a cluster of several.
fn fill_empty(points: &[Vec<f64>], centers: &[Vec<f64>], labels: &mut [usize]) {
    for cluster in 0..centers.len() {
        if labels.contains(&cluster) {
            continue;
        }
        let is_movable = |&i: &usize| labels.iter().filter(|&&label| label == labels[i]).count() > 1;
        let far = |i: usize| distance(&points[i], &centers[labels[i]]);
        let farthest =
            (0..points.len()).filter(is_movable).max_by(|&a, &b| far(a).total_cmp(&far(b)).then(b.cmp(&a)));
        if let Some(point) = farthest {
            labels[point] = cluster;
        }
    }
}
