//! Sizes for all layers together, that cost a model's output least.
//!
//! ```text
//! f_l(n)     what the output loses when layer l alone has n of its N_l units; known at a few n, 0 at all of them
//! between    f_l(n) = c (1 - n/N_l)^2, ln c linear in n: the line nearest to those of known n
//! minimise   sum over layers of f_l(n_l),  sum of n_l as wanted,  n_l from the least to the most of each layer
//! ```
//! The error of an FFN's output grows about linearly with what is left out, and the divergence with its square: c changes
//! little. A curve through all known points would have kinks there, at which layers stop. Of each curve its lower convex hull counts, whose pieces are bought by their gain per unit.

/// What the sizes of a layer cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Known sizes, ascending, and what they cost; without any the layer costs nothing.
    pub known: Vec<(usize, f64)>,
    /// The whole layer.
    pub size: usize,
    /// The least that the layer may get.
    pub least: usize,
}

/// Chooses the sizes of layers, `total` together. Layers get less than their least only if all together have less.
pub fn choose(layers: &[Costs], total: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = layers.iter().map(|layer| layer.least.min(layer.size)).collect();
    let mut pieces: Vec<(f64, usize, usize)> = Vec::new();
    for (layer, costs) in layers.iter().enumerate() {
        let curve: Vec<(usize, f64)> = (sizes[layer]..=costs.size).map(|n| (n, costs.at(n))).collect();
        for pair in hull(&curve).windows(2) {
            let units = pair[1].0 - pair[0].0;
            pieces.push(((pair[0].1 - pair[1].1) / units as f64, layer, units));
        }
    }
    // Along a hull the gain falls: pieces of a layer come in order.
    pieces.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut left = total as isize - sizes.iter().sum::<usize>() as isize;
    for (_, layer, units) in pieces {
        let bought = (units as isize).min(left).max(0);
        sizes[layer] += bought as usize;
        left -= bought;
    }
    while left < 0 && sizes.iter().any(|&size| size > 1) {
        // The least sizes are too many: all give alike.
        let each = ((-left) as usize).div_ceil(sizes.len());
        for size in &mut sizes {
            let given = each.min(size.saturating_sub(1)).min((-left).max(0) as usize);
            *size -= given;
            left += given as isize;
        }
    }
    sizes
}

/// Cuts a total in proportion to weights, in whole units; none gets more than its bound. What rounding leaves goes to the
/// largest remainders.
pub fn proportional(weights: &[f64], bounds: &[usize], total: usize) -> Vec<usize> {
    let mut parts: Vec<usize> = vec![0; weights.len()];
    let mut left = total.min(bounds.iter().sum());
    while left > 0 {
        let open: Vec<usize> = (0..parts.len()).filter(|&i| parts[i] < bounds[i]).collect();
        let sum: f64 = open.iter().map(|&i| weights[i]).sum();
        let before = left;
        let wanted = |i: usize| match sum > 0.0 {
            true => before as f64 * weights[i] / sum,
            false => before as f64 / open.len() as f64,
        };
        let mut remainders: Vec<(f64, usize)> = Vec::new();
        for &i in &open {
            let wanted = wanted(i);
            let given = (wanted as usize).min(bounds[i] - parts[i]);
            remainders.push((wanted - given as f64, i));
            parts[i] += given;
            left -= given;
        }
        if left < before && left >= open.len() {
            // Bounds cut some of the parts: the rest is cut again.
            continue;
        }
        remainders.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (_, i) in remainders {
            if left > 0 && parts[i] < bounds[i] {
                parts[i] += 1;
                left -= 1;
            }
        }
    }
    parts
}

impl Costs {
    /// Returns the cost of `n` units.
    pub fn at(&self, n: usize) -> f64 {
        if n >= self.size {
            return 0.0;
        }
        let share = |n: usize| n as f64 / self.size as f64;
        let factor = |(n, cost): (usize, f64)| {
            let ln = (cost.max(f64::MIN_POSITIVE) / (1.0 - share(n)).powi(2)).ln();
            (share(n), ln)
        };
        let known: Vec<(f64, f64)> =
            self.known.iter().filter(|(n, _)| *n < self.size).map(|&of| factor(of)).collect();
        if known.is_empty() {
            return 0.0;
        }
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| known.iter().map(of).sum::<f64>() / known.len() as f64;
        let [x, y] = [mean(&|of| of.0), mean(&|of| of.1)];
        let spread = mean(&|of| (of.0 - x).powi(2));
        let slope = if spread > 0.0 { mean(&|of| (of.0 - x) * (of.1 - y)) / spread } else { 0.0 };
        (1.0 - share(n)).powi(2) * (y + slope * (share(n) - x)).exp()
    }
}

/// Returns the points of the lower convex hull of a curve that ends at its least.
fn hull(curve: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let mut hull: Vec<(usize, f64)> = Vec::new();
    let slope = |a: (usize, f64), b: (usize, f64)| (b.1 - a.1) / (b.0 - a.0) as f64;
    for &point in curve {
        while let [.., before, last] = hull[..]
            && slope(before, last) >= slope(last, point)
        {
            hull.pop();
        }
        hull.push(point);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hulls_are_convex_and_below() {
        let curve = [(1, 9.0), (2, 8.5), (3, 2.0), (4, 2.0), (6, 0.0)];
        assert_eq!(hull(&curve), [(1, 9.0), (3, 2.0), (6, 0.0)]);
        assert_eq!(hull(&[(5, 0.0)]), [(5, 0.0)]);
    }

    #[test]
    fn curves_are_squares_times_what_changes_exponentially() {
        let costs = Costs { known: vec![(2, 6.4), (5, 1.0)], size: 10, least: 1 };
        assert!((costs.at(2) - 6.4).abs() < 1e-12 && (costs.at(5) - 1.0).abs() < 1e-12);
        // 6.4 / 0.8^2 = 10 and 1 / 0.5^2 = 4: each unit more has 0.4^(1/3) times that.
        assert!((costs.at(8) - 0.04 * 1.6).abs() < 1e-12);
        let three = Costs { known: vec![(2, 0.64 * 8.0), (4, 0.36 * 1.0), (6, 0.16 * 8.0)], ..costs.clone() };
        assert!((2..8).all(|n| (three.at(n) / (1.0 - n as f64 / 10.0).powi(2) - 4.0).abs() < 1e-12));
        let one = Costs { known: vec![(5, 1.0)], ..costs.clone() };
        assert!((one.at(0) - 4.0).abs() < 1e-12);
        assert_eq!((costs.at(10), costs.at(11)), (0.0, 0.0));
        assert_eq!(Costs { known: Vec::new(), size: 3, least: 0 }.at(1), 0.0);
    }

    /// Against all choices, of curves that are convex already.
    #[test]
    fn the_best_sizes_are_chosen() {
        let layer = |known: &[(usize, f64)], size, least| Costs { known: known.to_vec(), size, least };
        let layers = [
            layer(&[(1, 8.0), (2, 3.0), (4, 0.5)], 6, 1),
            layer(&[(1, 1.28), (3, 0.32)], 5, 1),
            layer(&[(2, 6.0), (4, 2.9)], 6, 2),
        ];
        for costs in &layers {
            let gains: Vec<f64> = (costs.least..costs.size).map(|n| costs.at(n) - costs.at(n + 1)).collect();
            assert!(gains.is_sorted_by(|a, b| a >= b), "{gains:?}");
        }
        let cost = |sizes: &[usize]| -> f64 { layers.iter().zip(sizes).map(|(of, &n)| of.at(n)).sum() };
        for total in 4..=17 {
            let found = choose(&layers, total);
            assert_eq!(found.iter().sum::<usize>(), total);
            let all = (1..=6).flat_map(|a| (1..=5).flat_map(move |b| (2..=6).map(move |c| [a, b, c])));
            let least = all.filter(|of| of.iter().sum::<usize>() == total).map(|of| cost(&of));
            let least = least.fold(f64::INFINITY, f64::min);
            assert!(cost(&found) <= least + 1e-9, "{total}: {found:?} {} {least}", cost(&found));
        }
        assert_eq!(choose(&layers, 3), [1, 1, 1]);
        assert_eq!(choose(&layers, 17), [6, 5, 6]);
    }

    #[test]
    fn a_layer_that_costs_nothing_gets_its_least() {
        let free = Costs { known: vec![(10, 0.0), (20, 0.0)], size: 64, least: 10 };
        let dear = Costs { known: vec![(10, 5.0), (20, 1.0)], size: 64, least: 10 };
        assert_eq!(choose(&[free, dear], 60), [10, 50]);
    }

    #[test]
    fn parts_are_in_proportion_and_within_bounds() {
        assert_eq!(proportional(&[1.0, 2.0, 1.0], &[9, 9, 9], 8), [2, 4, 2]);
        assert_eq!(proportional(&[1.0, 1.0, 1.0], &[9, 9, 9], 5), [2, 2, 1]);
        assert_eq!(proportional(&[1.0, 8.0, 1.0], &[9, 3, 9], 9), [3, 3, 3]);
        assert_eq!(proportional(&[0.0, 0.0], &[4, 4], 3), [2, 1]);
        assert_eq!(proportional(&[1.0, 1.0], &[1, 2], 9), [1, 2]);
    }
}
