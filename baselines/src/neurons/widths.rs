//! Numbers of neurons for all layers together: those that cost the model's output least.
//!
//! ```text
//! f_l(w)   divergence of the final distribution when layer l alone has w neurons; known at a few w, 0 at all of them
//! minimise sum over layers of f_l(w_l),  sum of w_l as wanted
//! ```
//! Between known widths log f is linear; of each curve its lower convex hull counts, whose pieces are bought by their gain
//! per neuron.

/// A layer's known divergences: widths, ascending, and what they cost.
pub(super) type Curve = Vec<(usize, f64)>;

/// Parts that a curve is cut into.
const PARTS: usize = 64;

/// Chooses the widths of layers, `total` neurons together, of layers with `sizes` neurons. No layer gets fewer than the
/// first width of its curve, unless all together have more than `total`.
pub(super) fn choose(curves: &[Curve], sizes: &[usize], total: usize) -> Vec<usize> {
    let hulls: Vec<Curve> =
        curves.iter().zip(sizes).map(|(curve, &size)| hull(&filled(curve, size))).collect();
    let mut widths: Vec<usize> = hulls.iter().map(|hull| hull[0].0).collect();
    let mut pieces: Vec<(f64, usize, usize)> = Vec::new();
    for (layer, hull) in hulls.iter().enumerate() {
        for pair in hull.windows(2) {
            let neurons = pair[1].0 - pair[0].0;
            pieces.push(((pair[0].1 - pair[1].1) / neurons as f64, layer, neurons));
        }
    }
    // Along a hull the gain falls: pieces of a layer come in order.
    pieces.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut left = total as isize - widths.iter().sum::<usize>() as isize;
    for (_, layer, neurons) in pieces {
        let bought = (neurons as isize).min(left).max(0);
        widths[layer] += bought as usize;
        left -= bought;
    }
    let most = widths.len();
    while left < 0 {
        // The least widths are too many: all give alike.
        let each = ((-left) as usize).div_ceil(most);
        for width in &mut widths {
            let given = each.min(*width - 1).min((-left).max(0) as usize);
            *width -= given;
            left += given as isize;
        }
        if widths.iter().all(|&width| width == 1) {
            break;
        }
    }
    widths
}

/// Returns the curve at many widths up to `size`, never rising.
fn filled(curve: &Curve, size: usize) -> Curve {
    let mut known: Curve = curve.iter().copied().filter(|(width, _)| *width < size).collect();
    known.push((size, 0.0));
    for i in (0..known.len() - 1).rev() {
        known[i].1 = known[i].1.max(known[i + 1].1);
    }
    let mut all = Vec::new();
    for pair in known.windows(2) {
        let [(from, high), (to, low)] = [pair[0], pair[1]];
        let step = (size / PARTS).max(1);
        for width in (from..to).step_by(step) {
            let share = (width - from) as f64 / (to - from) as f64;
            let value = match low > 0.0 {
                true => (high.ln() * (1.0 - share) + low.ln() * share).exp(),
                false => high * (1.0 - share),
            };
            all.push((width, value));
        }
    }
    all.push((size, 0.0));
    all
}

/// Returns the points of the lower convex hull of a curve.
fn hull(curve: &Curve) -> Curve {
    let mut hull: Curve = Vec::new();
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
        let curve = vec![(1, 9.0), (2, 8.5), (3, 2.0), (4, 2.0), (6, 0.0)];
        assert_eq!(hull(&curve), [(1, 9.0), (3, 2.0), (6, 0.0)]);
        assert_eq!(hull(&vec![(5, 0.0)]), [(5, 0.0)]);
    }

    /// Against all choices, of curves that are convex already.
    #[test]
    fn the_best_widths_are_chosen() {
        let curves = [
            vec![(1, 8.0), (2, 3.0), (4, 0.5)],
            vec![(1, 2.0), (3, 1.0)],
            vec![(2, 6.0), (4, 2.9), (5, 0.1)],
        ];
        let sizes = [6, 5, 6];
        let cost = |widths: &[usize]| -> f64 {
            let of = |(curve, (&size, &width)): (&Curve, (&usize, &usize))| {
                filled(curve, size).into_iter().find(|(at, _)| *at == width).map_or(f64::INFINITY, |(_, f)| f)
            };
            curves.iter().zip(sizes.iter().zip(widths)).map(of).sum()
        };
        for total in 4..=17 {
            let found = choose(&curves, &sizes, total);
            assert_eq!(found.iter().sum::<usize>(), total);
            let all = (1..=6).flat_map(|a| (1..=5).flat_map(move |b| (2..=6).map(move |c| [a, b, c])));
            let least = all.filter(|of| of.iter().sum::<usize>() == total).map(|of| cost(&of));
            let least = least.fold(f64::INFINITY, f64::min);
            // Curves are convex but for roundings of the exponential pieces.
            assert!(cost(&found) <= least * 1.25 + 1e-9, "{total}: {found:?} {} {least}", cost(&found));
        }
        assert_eq!(choose(&curves, &sizes, 3), [1, 1, 1]);
        assert_eq!(choose(&curves, &sizes, 17), sizes);
    }

    #[test]
    fn a_layer_that_costs_nothing_gets_its_least() {
        let curves = [vec![(10, 0.0), (20, 0.0)], vec![(10, 5.0), (20, 1.0)]];
        assert_eq!(choose(&curves, &[64, 64], 60), [10, 50]);
    }
}
