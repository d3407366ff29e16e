//! Sizes for all layers together, that cost a model's output least.
//!
//! ```text
//! f_l(n)     what the output loses when layer l alone has n of its N_l units; known at a few n
//! between    ln f_l(n) = a - c n / N_l, the line nearest to what is known, c at least 0
//! minimise   sum over layers of f_l(n_l),  sum of n_l as wanted,  n_l from the least to all of each layer
//! ```
//! Divergences of FFNs that lack neurons lie near such lines. A curve through all known points would have kinks there, at which
//! layers stop. The curves are convex: units are given one by one to the layer that gains most.

/// The cost of each size of a layer.
///
/// ```
/// use dsmoe_core::allocation::{Costs, choose};
///
/// // Losing half of the second layer costs the output nine times as much.
/// let costs = |half: f64| Costs { known: vec![(4, half), (8, half / 10.0)], size: 8, least: 4 };
/// assert_eq!(choose(&[costs(0.1), costs(0.9)], 12), [4, 8]);
/// ```
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
    let mut gains: Vec<(f64, usize)> = Vec::new();
    for (layer, (costs, &size)) in layers.iter().zip(&sizes).enumerate() {
        let line = costs.line();
        gains.extend((size..costs.size).map(|n| (line.at(n) - line.at(n + 1), layer)));
    }
    gains.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut left = total as isize - sizes.iter().sum::<usize>() as isize;
    for (_, layer) in gains.into_iter().take(left.max(0) as usize) {
        sizes[layer] += 1;
        left -= 1;
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

/// `e^(start - fall n / size)`
#[derive(Clone, Copy, Debug)]
struct Line {
    start: f64,
    fall: f64,
    size: f64,
}

impl Line {
    fn at(self, n: usize) -> f64 {
        (self.start - self.fall * n as f64 / self.size).exp()
    }
}

impl Costs {
    /// Returns the line nearest to the logarithms of what is known. One point alone falls as the square of the missing share.
    fn line(&self) -> Line {
        let size = self.size.max(1) as f64;
        let point = |&(n, cost): &(usize, f64)| (n as f64 / size, cost.max(f64::MIN_POSITIVE).ln());
        let known: Vec<(f64, f64)> = self.known.iter().map(point).collect();
        let count = known.len().max(1) as f64;
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| known.iter().map(of).sum::<f64>() / count;
        let [x, y] = [mean(&|of| of.0), mean(&|of| of.1)];
        let spread = mean(&|of| (of.0 - x).powi(2));
        let fall = match known.len() {
            0 => 0.0,
            _ if spread > 0.0 => (-mean(&|of| (of.0 - x) * (of.1 - y)) / spread).max(0.0),
            _ => 2.0 / (1.0 - x).max(1.0 / size),
        };
        Line { start: y + fall * x, fall, size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_the_nearest_lines_of_logarithms() {
        let of = |known: &[(usize, f64)]| Costs { known: known.to_vec(), size: 10, least: 1 }.line();
        let two = of(&[(2, 8.0), (5, 1.0)]);
        let wanted = [(2, 8.0), (5, 1.0), (3, 4.0), (8, 0.125)];
        assert!(wanted.iter().all(|&(n, cost)| (two.at(n) - cost).abs() < 1e-12), "{two:?}");
        // The middle one of three lies off the line by a factor of 8, of which two thirds are left to it.
        let three = of(&[(2, 16.0), (4, 8.0 * 4.0), (6, 1.0)]);
        assert!((three.at(4) - 8.0).abs() < 1e-12 && (three.at(2) - 32.0).abs() < 1e-12, "{three:?}");
        // Rising costs are noise.
        assert_eq!(of(&[(2, 1.0), (4, 4.0)]).fall, 0.0);
        assert!((of(&[(5, 3.0)]).at(5) - 3.0).abs() < 1e-12 && (of(&[(5, 3.0)]).fall - 4.0).abs() < 1e-12);
        assert_eq!(of(&[]).fall, 0.0);
    }

    #[test]
    fn no_other_choice_costs_less() {
        let layer = |known: &[(usize, f64)], size, least| Costs { known: known.to_vec(), size, least };
        let layers = [
            layer(&[(1, 8.0), (2, 3.0), (4, 0.5)], 6, 1),
            layer(&[(1, 2.0), (3, 1.0)], 5, 1),
            layer(&[(2, 6.0), (4, 2.9)], 6, 2),
        ];
        let cost =
            |sizes: &[usize]| -> f64 { layers.iter().zip(sizes).map(|(of, &n)| of.line().at(n)).sum() };
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
        let free = Costs { known: Vec::new(), size: 64, least: 10 };
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
