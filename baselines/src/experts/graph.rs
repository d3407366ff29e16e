//! Cuts of a weighted graph into parts of equal size, with large weight inside parts.
//!
//! Parts grow from a vertex each, always by the vertex with the most weight to them, or are drawn. Then pairs of
//! vertices change places (Kernighan and Lin): every vertex with the best other one while that gains; then the most
//! promising one with its best other one even at a loss, each vertex once, and what came after the best of these
//! places is taken back. Small graphs are cut from several starts, and the heaviest parts are kept. Weights are whole
//! numbers, so sums are exact.

use dsmoe_kernels::rng::Rng;
use rayon::prelude::*;

/// The largest number of starts.
const MOST_STARTS: usize = 20;
/// Weights that all starts together look at in one round, at the most; one start is always run. 512 vertices get 20
/// starts, 1024 get 8, 2048 get two, more get one.
const STARTS_WORK: usize = 1 << 23;
/// Exchanges without a new best place before a round of them ends.
const PATIENCE: usize = 50;

/// Vertices in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Part of each vertex.
    pub(crate) labels: Vec<usize>,
    /// Sum of the weights within parts, each pair of vertices once.
    pub(crate) inside: i64,
}

/// Cuts the graph of `weights` `[vertices, vertices]`, which are symmetric and 0 on the diagonal, into `parts` of equal
/// size. A function of its arguments alone.
///
/// # Panics
/// `parts` do not divide the vertices, or `weights` are not of that shape.
pub(crate) fn cut(weights: &[u32], parts: usize, seed: u64) -> Cut {
    let vertices = weights.len().isqrt();
    let fits = vertices * vertices == weights.len() && parts > 0 && vertices.is_multiple_of(parts);
    assert!(fits, "cut: {} weights, {parts} parts", weights.len());
    let loops = weights.iter().step_by(vertices + 1).any(|&weight| weight > 0);
    debug_assert!(!loops, "cut: an edge from a vertex to itself");
    let starts = (STARTS_WORK / weights.len().max(1)).clamp(1, MOST_STARTS);
    let cuts: Vec<Cut> = (0..starts as u64)
        .into_par_iter()
        .map(|start| {
            let mut rng = Rng::new(seed, u64::from_be_bytes(*b"graphcut") ^ start);
            let labels = match start {
                0 => grow(weights, vertices, parts, None),
                _ if start % 2 == 0 => grow(weights, vertices, parts, Some(&mut rng)),
                _ => draw(vertices, parts, &mut rng),
            };
            let mut state = State::new(weights, parts, labels);
            state.refine();
            Cut { inside: state.own.iter().sum::<i64>() / 2, labels: state.part }
        })
        .collect();
    // The first among equals.
    cuts.into_iter().rev().max_by_key(|cut| cut.inside).expect("a start")
}

/// Parts that grow one after the other, each from the vertex with the most weight to those that are left, or from one
/// that `rng` draws.
fn grow(weights: &[u32], vertices: usize, parts: usize, mut rng: Option<&mut Rng>) -> Vec<usize> {
    let mut labels = vec![usize::MAX; vertices];
    let row = |i: usize| &weights[i * vertices..][..vertices];
    let mut to_left: Vec<i64> = (0..vertices).map(|i| row(i).iter().map(|&w| i64::from(w)).sum()).collect();
    let mut left: Vec<usize> = (0..vertices).collect();
    let mut to_part = vec![0i64; vertices];
    for part in 0..parts {
        to_part.fill(0);
        for size in 0..vertices / parts {
            let most = |of: &[i64]| (0..left.len()).rev().max_by_key(|&at| of[left[at]]).expect("a vertex");
            let at = match (size, &mut rng) {
                (0, Some(rng)) => rng.below(left.len() as u64) as usize,
                (0, None) => most(&to_left),
                _ => most(&to_part),
            };
            let vertex = left.remove(at);
            labels[vertex] = part;
            for &other in &left {
                let weight = i64::from(row(vertex)[other]);
                to_part[other] += weight;
                to_left[other] -= weight;
            }
        }
    }
    labels
}

/// Parts of vertices at random.
fn draw(vertices: usize, parts: usize, rng: &mut Rng) -> Vec<usize> {
    let mut labels: Vec<usize> = (0..vertices).map(|i| i % parts).collect();
    for i in (1..vertices).rev() {
        labels.swap(i, rng.below(i as u64 + 1) as usize);
    }
    labels
}

/// Parts, and how vertices hang on them.
struct State<'a> {
    weights: &'a [u32],
    parts: usize,
    part: Vec<usize>,
    /// `[parts, vertices]`: the weight between a part and a vertex.
    to: Vec<i64>,
    /// The weight between each vertex and its part.
    own: Vec<i64>,
}

impl<'a> State<'a> {
    fn new(weights: &'a [u32], parts: usize, part: Vec<usize>) -> State<'a> {
        let vertices = part.len();
        let mut to = vec![0; parts * vertices];
        for (row, &part) in weights.chunks_exact(vertices.max(1)).zip(&part) {
            add(&mut to[part * vertices..][..vertices], row, 1);
        }
        let own = part.iter().enumerate().map(|(i, &part)| to[part * vertices + i]).collect();
        State { weights, parts, part, to, own }
    }

    fn row(&self, vertex: usize) -> &'a [u32] {
        &self.weights[vertex * self.part.len()..][..self.part.len()]
    }

    fn refine(&mut self) {
        loop {
            while self.sweep() {}
            if !self.round() {
                return;
            }
        }
    }

    /// Exchanges every vertex with its best other one if that gains; whether any did.
    fn sweep(&mut self) -> bool {
        let mut changed = false;
        for vertex in 0..self.part.len() {
            if let Some((1.., other)) = self.best_exchange(vertex, None) {
                self.exchange(vertex, other);
                changed = true;
            }
        }
        changed
    }

    /// Exchanges pairs, each vertex at most once, also at a loss, and goes back to the best place; whether it is better
    /// than the first.
    fn round(&mut self) -> bool {
        let vertices = self.part.len();
        let mut free = vec![true; vertices];
        let (mut gained, mut most, mut kept) = (0, 0, 0);
        let mut exchanged = Vec::new();
        while exchanged.len() < kept + PATIENCE {
            // Among equals the first.
            let promise = |&i: &usize| {
                let best = (0..self.parts).filter(|&part| part != self.part[i]);
                best.map(|part| self.to[part * vertices + i]).max().map(|best| best - self.own[i])
            };
            let Some(vertex) = (0..vertices).rev().filter(|&i| free[i]).max_by_key(promise) else { break };
            let Some((gain, other)) = self.best_exchange(vertex, Some(&free)) else { break };
            self.exchange(vertex, other);
            (free[vertex], free[other]) = (false, false);
            exchanged.push((vertex, other));
            gained += gain;
            if gained > most {
                (most, kept) = (gained, exchanged.len());
            }
        }
        exchanged[kept..].iter().rev().for_each(|&(vertex, other)| self.exchange(vertex, other));
        most > 0
    }

    /// The weight that the parts gain if `vertex` and the best vertex of another part change places, and that vertex:
    /// the first among equals, of those that are free.
    fn best_exchange(&self, vertex: usize, free: Option<&[bool]>) -> Option<(i64, usize)> {
        let vertices = self.part.len();
        let from = self.part[vertex];
        let gains: Vec<i64> =
            (0..self.parts).map(|part| self.to[part * vertices + vertex] - self.own[vertex]).collect();
        let to_from = &self.to[from * vertices..][..vertices];
        let mut best = None;
        let others = self.part.iter().zip(self.row(vertex)).zip(to_from.iter().zip(&self.own));
        for (other, ((&part, &weight), (&to_from, &own))) in others.enumerate() {
            let gain = gains[part] + to_from - own - 2 * i64::from(weight);
            let better = best.is_none_or(|(most, _)| gain > most);
            if part != from && better && free.is_none_or(|free| free[other]) {
                best = Some((gain, other));
            }
        }
        best
    }

    fn exchange(&mut self, a: usize, b: usize) {
        let vertices = self.part.len();
        let (from, to) = (self.part[a], self.part[b]);
        for (part, joins, leaves) in [(from, b, a), (to, a, b)] {
            let (joins, leaves) = (self.row(joins), self.row(leaves));
            let sums = &mut self.to[part * vertices..][..vertices];
            add(sums, joins, 1);
            add(sums, leaves, -1);
        }
        self.part.swap(a, b);
        for (i, (own, &part)) in self.own.iter_mut().zip(&self.part).enumerate() {
            if part == from || part == to {
                *own = self.to[part * vertices + i];
            }
        }
    }
}

fn add(sums: &mut [i64], row: &[u32], times: i64) {
    sums.iter_mut().zip(row).for_each(|(sum, &weight)| *sum += times * i64::from(weight));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights that `of` gives to each pair.
    fn graph(vertices: usize, mut of: impl FnMut(usize, usize) -> u32) -> Vec<u32> {
        let mut weights = vec![0; vertices * vertices];
        for i in 0..vertices {
            for j in 0..i {
                let weight = of(i, j);
                weights[i * vertices + j] = weight;
                weights[j * vertices + i] = weight;
            }
        }
        weights
    }

    fn inside(weights: &[u32], labels: &[usize]) -> i64 {
        let n = labels.len();
        let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
        pairs.filter(|&(i, j)| labels[i] == labels[j]).map(|(i, j)| i64::from(weights[i * n + j])).sum()
    }

    /// The most weight inside, over all cuts into parts of `size`.
    fn brute_force(weights: &[u32], size: usize, parts: usize, labels: &mut Vec<usize>) -> i64 {
        if labels.len() == size * parts {
            return inside(weights, labels);
        }
        // A new part comes after all that were begun.
        let begun = labels.iter().max().map_or(0, |last| last + 1);
        let mut best = 0;
        for part in 0..parts.min(begun + 1) {
            if labels.iter().filter(|&&label| label == part).count() < size {
                labels.push(part);
                best = best.max(brute_force(weights, size, parts, labels));
                labels.pop();
            }
        }
        best
    }

    fn is_even(labels: &[usize], parts: usize) -> bool {
        let count = |part| labels.iter().filter(|&&label| label == part).count();
        (0..parts).all(|part| count(part) * parts == labels.len())
    }

    #[test]
    fn small_graphs_are_cut_as_well_as_can_be() {
        let mut rng = Rng::new(1, 0);
        for (size, parts) in [(4, 2), (5, 2), (3, 3), (2, 4), (2, 5), (1, 6), (6, 1)] {
            for round in 0..30 {
                // Many weights, few, or mostly none.
                let of = |rng: &mut Rng| match round % 3 {
                    0 => rng.below(1000) as u32,
                    1 => rng.below(3) as u32,
                    _ => (rng.below(100) as u32).saturating_sub(80),
                };
                let weights = graph(size * parts, |_, _| of(&mut rng));
                let found = cut(&weights, parts, round);
                assert!(is_even(&found.labels, parts), "{found:?}");
                assert_eq!(found.inside, inside(&weights, &found.labels));
                let best = brute_force(&weights, size, parts, &mut Vec::new());
                assert_eq!(found.inside, best, "{parts} parts of {size}, round {round}");
                assert_eq!(found, cut(&weights, parts, round));
            }
        }
    }

    /// Vertices of every fourth number belong together, beside noise and a few that hang on all.
    #[test]
    fn planted_parts_are_found() {
        for seed in 0..5 {
            for (vertices, parts, hubs) in [(64, 4, 0), (96, 8, 6), (240, 4, 24)] {
                let mut rng = Rng::new(seed, 1);
                let weights = graph(vertices, |i, j| {
                    let base = 10 + rng.below(30) as u32;
                    let hub = if i < hubs || j < hubs { 100 } else { 0 };
                    base + hub + if i % parts == j % parts { 25 } else { 0 }
                });
                let labels = cut(&weights, parts, seed).labels;
                let found = (0..vertices).all(|i| labels[i] == labels[i % parts]);
                assert!(found, "{vertices} {parts} {hubs}: {labels:?}");
            }
        }
    }

    #[test]
    fn one_start_finds_them_too_and_sums_stay_true() {
        let mut rng = Rng::new(3, 0);
        let weights = graph(120, |i, j| rng.below(20) as u32 + if i / 40 == j / 40 { 12 } else { 0 });
        let mut state = State::new(&weights, 3, (0..120).map(|i| i % 3).collect());
        state.refine();
        assert!((0..120).all(|i| state.part[i] == state.part[i / 40 * 40]), "{:?}", state.part);
        let again = State::new(&weights, 3, state.part.clone());
        assert_eq!((&state.to, &state.own), (&again.to, &again.own));
        assert!(!state.sweep() && !state.round());
        assert_eq!(state.part, again.part);
    }

    #[test]
    fn graphs_without_edges_are_cut() {
        assert!(is_even(&cut(&vec![0; 144], 4, 0).labels, 4));
    }
}
