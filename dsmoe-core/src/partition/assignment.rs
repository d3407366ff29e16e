//! The exact assignment of items to clusters of fixed sizes at the least total cost: a transportation problem.
//!
//! Every item starts in its cheapest cluster. While clusters are overfull, one item at a time is pushed along the
//! cheapest chain of moves to a cluster with room (successive shortest paths on the graph of clusters, with
//! potentials, so that Dijkstra's algorithm serves). Among equal costs the lower index wins.

/// Assigns items to clusters, exactly `capacities[c]` of them to cluster c; returns the cluster of every item.
/// `costs` is `[items, clusters]`.
///
/// # Panics
/// The capacities do not add up to the items, or a cost is not finite.
pub fn assign(costs: &[f64], capacities: &[usize]) -> Vec<usize> {
    let n = capacities.len();
    assert!(
        costs.len() == n * capacities.iter().sum::<usize>() && costs.iter().all(|cost| cost.is_finite()),
        "assign: {} costs for clusters of {capacities:?}",
        costs.len()
    );
    let mut clusters = Clusters { costs, members: vec![Vec::new(); n], moves: vec![Move::NONE; n * n] };
    for (item, costs) in costs.chunks_exact(n.max(1)).enumerate() {
        let nearest = (0..n).min_by(|&a, &b| costs[a].total_cmp(&costs[b])).expect("a cluster");
        clusters.members[nearest].push(item);
    }
    (0..n).for_each(|cluster| clusters.refresh(cluster));

    let mut potentials = vec![0.0; n];
    while clusters.members.iter().zip(capacities).any(|(members, &room)| members.len() > room) {
        let paths = clusters.shortest_paths(capacities, &mut potentials);
        let with_room = (0..n).filter(|&c| clusters.members[c].len() < capacities[c]);
        let mut to = with_room.min_by(|&a, &b| potentials[a].total_cmp(&potentials[b])).expect("room");
        while let Some(from) = paths[to] {
            let item = clusters.moves[from * n + to].item;
            clusters.members[from].retain(|&member| member != item);
            clusters.members[to].push(item);
            clusters.refresh(to);
            to = from;
        }
        clusters.refresh(to);
    }

    let mut labels = vec![0; costs.len() / n.max(1)];
    for (cluster, members) in clusters.members.iter().enumerate() {
        members.iter().for_each(|&item| labels[item] = cluster);
    }
    labels
}

/// The cheapest move of an item from one cluster to another.
#[derive(Clone, Copy)]
struct Move {
    cost: f64,
    item: usize,
}

impl Move {
    const NONE: Move = Move { cost: f64::INFINITY, item: usize::MAX };
}

struct Clusters<'a> {
    costs: &'a [f64],
    members: Vec<Vec<usize>>,
    /// `[from, to]`.
    moves: Vec<Move>,
}

impl Clusters<'_> {
    /// Updates the cheapest moves out of `from`.
    fn refresh(&mut self, from: usize) {
        let n = self.members.len();
        let moves = &mut self.moves[from * n..][..n];
        moves.fill(Move::NONE);
        for &item in &self.members[from] {
            let costs = &self.costs[item * n..][..n];
            for (to, (best, cost)) in moves.iter_mut().zip(costs).enumerate() {
                let cost = cost - costs[from];
                if to != from && (cost < best.cost || (cost == best.cost && item < best.item)) {
                    *best = Move { cost, item };
                }
            }
        }
    }

    /// Returns the cluster before each one on the cheapest chain of moves from an overfull cluster; `potentials`
    /// become the costs of the chains.
    fn shortest_paths(&self, capacities: &[usize], potentials: &mut [f64]) -> Vec<Option<usize>> {
        let n = capacities.len();
        let (mut before, mut done) = (vec![None; n], vec![false; n]);
        // Distances are reduced by the potentials, which makes all moves cost at least 0 but for rounding.
        let mut distances: Vec<f64> = (0..n)
            .map(|c| match self.members[c].len() > capacities[c] {
                true => (-potentials[c]).max(0.0),
                false => f64::INFINITY,
            })
            .collect();
        while let Some(from) =
            (0..n).filter(|&c| !done[c]).min_by(|&a, &b| distances[a].total_cmp(&distances[b]))
        {
            done[from] = true;
            for to in (0..n).filter(|&to| !done[to]) {
                let reduced = self.moves[from * n + to].cost + potentials[from] - potentials[to];
                let distance = distances[from] + reduced.max(0.0);
                if distance < distances[to] {
                    (distances[to], before[to]) = (distance, Some(from));
                }
            }
        }
        potentials.iter_mut().zip(&distances).for_each(|(potential, distance)| *potential += distance);
        before
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::rng::Rng;

    use super::*;

    /// The least cost over all assignments.
    fn brute_force(costs: &[f64], left: &mut [usize], item: usize) -> f64 {
        let n = left.len();
        if item * n == costs.len() {
            return 0.0;
        }
        let mut best = f64::INFINITY;
        for cluster in 0..n {
            if left[cluster] > 0 {
                left[cluster] -= 1;
                best = best.min(costs[item * n + cluster] + brute_force(costs, left, item + 1));
                left[cluster] += 1;
            }
        }
        best
    }

    #[test]
    fn costs_as_little_as_the_best_of_all_assignments() {
        let mut rng = Rng::new(1, 0);
        for capacities in [&[3, 3][..], &[2, 2, 2], &[1, 4, 2], &[7], &[1; 6], &[2, 0, 3], &[3, 3, 2]] {
            for round in 0..40 {
                let n = capacities.len();
                let len = n * capacities.iter().sum::<usize>();
                // Every other round has many equal costs; some clusters are far from everything.
                let cost = |rng: &mut Rng, i: usize| {
                    let shift = (i % n) as f64;
                    if round % 2 == 0 { f64::from(rng.uniform()) + shift } else { rng.below(4) as f64 }
                };
                let costs: Vec<f64> = (0..len).map(|i| cost(&mut rng, i)).collect();
                let labels = assign(&costs, capacities);
                for (cluster, &capacity) in capacities.iter().enumerate() {
                    assert_eq!(labels.iter().filter(|&&label| label == cluster).count(), capacity);
                }
                let total: f64 = labels.iter().enumerate().map(|(item, c)| costs[item * n + c]).sum();
                let best = brute_force(&costs, &mut capacities.to_vec(), 0);
                assert!((total - best).abs() < 1e-12 * len as f64, "{total} and not {best}: {capacities:?}");
            }
        }
    }

    #[test]
    fn no_exchange_improves_a_large_assignment() {
        let (n, width) = (8, 64);
        let mut rng = Rng::new(2, 0);
        let costs: Vec<f64> =
            (0..n * n * width).map(|i| f64::from(rng.uniform()) * (1 + i % n) as f64).collect();
        let labels = assign(&costs, &[width; 8]);
        let cost = |item: usize, cluster: usize| costs[item * n + cluster];
        for (i, &a) in labels.iter().enumerate() {
            for (j, &b) in labels.iter().enumerate() {
                let gain = cost(i, a) + cost(j, b) - cost(i, b) - cost(j, a);
                assert!(gain < 1e-12, "items {i} and {j}");
            }
        }
    }
}
