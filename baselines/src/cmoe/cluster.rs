//! Shared neurons and balanced clusters, from the tokens for which neurons are active.

use dsmoe_core::partition::assign;

/// The active neurons of tokens.
pub(super) struct Markers {
    width: usize,
    active: usize,
    /// `active` neurons of every token, one token after the other.
    neurons: Vec<u32>,
}

/// A layer's experts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Experts {
    /// Neurons of the routed experts, one expert after the other, then the shared ones.
    pub(super) order: Vec<u32>,
    /// The neuron that represents each routed expert.
    pub(super) representatives: Vec<u32>,
}

impl Markers {
    /// Makes the markers of no token, of which `active` of `width` neurons will be marked.
    pub(super) fn new(width: usize, active: usize) -> Markers {
        Markers { width, active: active.min(width), neurons: Vec::new() }
    }

    /// Marks the neurons of the largest magnitudes of a token; among equals the first.
    pub(super) fn push(&mut self, values: &[f32]) {
        let mut order: Vec<u32> = (0..values.len() as u32).collect();
        let magnitude = |j: u32| values[j as usize].abs();
        let larger = |&a: &u32, &b: &u32| magnitude(b).total_cmp(&magnitude(a)).then(a.cmp(&b));
        if self.active < order.len() {
            order.select_nth_unstable_by(self.active, larger);
        }
        self.neurons.extend_from_slice(&order[..self.active]);
    }

    fn tokens(&self) -> impl Iterator<Item = &[u32]> {
        self.neurons.chunks_exact(self.active.max(1))
    }

    /// Returns the number of tokens for which each neuron is active.
    fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.width];
        self.neurons.iter().for_each(|&j| counts[j as usize] += 1);
        counts
    }
}

/// Forms `shared` and `routed` experts of equal size.
///
/// # Panics
/// They do not divide the neurons.
pub(super) fn experts(markers: &Markers, routed: usize, shared: usize) -> Experts {
    let size = markers.width / (routed + shared);
    assert_eq!(size * (routed + shared), markers.width, "cmoe: experts of {} neurons", markers.width);
    let counts = markers.counts();
    let mut frequent: Vec<u32> = (0..markers.width as u32).collect();
    frequent.sort_by_key(|&j| (std::cmp::Reverse(counts[j as usize]), j));
    let others = frequent.split_off(size * shared);
    let seeds = &others[..routed];
    let mut rest = others.clone();
    rest.sort_unstable();

    let together = together(markers, seeds);
    let distance = |j: u32, seed: usize| {
        let apart = counts[j as usize] + counts[seeds[seed] as usize];
        (apart - 2 * together[j as usize * routed + seed]) as f64
    };
    let costs: Vec<f64> =
        rest.iter().flat_map(|&j| (0..routed).map(move |c| (j, c))).map(|(j, c)| distance(j, c)).collect();
    let labels = assign(&costs, &vec![size; routed]);
    let mut expert = vec![usize::MAX; markers.width];
    rest.iter().zip(&labels).for_each(|(&j, &label)| expert[j as usize] = label);

    let distances = to_means(markers, &expert, routed, size);
    let mut order = Vec::with_capacity(markers.width);
    let mut representatives = Vec::with_capacity(routed);
    for label in 0..routed {
        let members: Vec<u32> = rest.iter().copied().filter(|&j| expert[j as usize] == label).collect();
        let nearest = members
            .iter()
            .copied()
            .min_by(|&a, &b| distances[a as usize].total_cmp(&distances[b as usize]).then(a.cmp(&b)));
        representatives.push(nearest.expect("an expert has neurons"));
        order.extend(members);
    }
    frequent.sort_unstable();
    order.extend(frequent);
    Experts { order, representatives }
}

/// Returns for each neuron and seed, `[width, seeds]`, the number of tokens for which both are active.
fn together(markers: &Markers, seeds: &[u32]) -> Vec<u64> {
    let mut seed_of = vec![usize::MAX; markers.width];
    seeds.iter().enumerate().for_each(|(seed, &j)| seed_of[j as usize] = seed);
    let mut counts = vec![0; markers.width * seeds.len()];
    for active in markers.tokens() {
        for seed in active.iter().map(|&j| seed_of[j as usize]).filter(|&seed| seed != usize::MAX) {
            active.iter().for_each(|&j| counts[j as usize * seeds.len() + seed] += 1);
        }
    }
    counts
}

/// Returns for each neuron of an expert the l1 distance of its markers to the mean of its expert's, less what all
/// neurons of the expert have in common.
fn to_means(markers: &Markers, expert: &[usize], routed: usize, size: usize) -> Vec<f64> {
    let mut distances = vec![0.0; markers.width];
    let mut active_of = vec![0u32; routed];
    for active in markers.tokens() {
        active_of.fill(0);
        let of_expert = active.iter().map(|&j| expert[j as usize]).filter(|&e| e != usize::MAX);
        of_expert.for_each(|e| active_of[e] += 1);
        for &j in active {
            if let Some(&count) = active_of.get(expert[j as usize]) {
                distances[j as usize] += 1.0 - 2.0 * f64::from(count) / size as f64;
            }
        }
    }
    distances
}
