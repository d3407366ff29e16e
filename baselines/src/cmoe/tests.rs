//! Experts against the definition in dense loops, with the best of all assignments.

use dsmoe_kernels::testing::normals;

use super::cluster::{Experts, Markers, experts};

const WIDTH: usize = 10;
const TOKENS: usize = 40;
const ACTIVE: usize = 3;

fn values() -> Vec<f32> {
    let noise = normals(TOKENS * WIDTH, 7);
    // Neurons 2 and 9 are large for all tokens, 0, 3 and 6 for every third one.
    let value = |(at, x): (usize, &f32)| {
        let (t, j) = (at / WIDTH, at % WIDTH);
        let often = if j == 2 || j == 9 { 1.5 } else { 0.0 };
        x.abs() + often + if t % 3 == 0 && j % 3 == 0 && j < 9 { 1.2 } else { 0.0 }
    };
    noise.iter().enumerate().map(value).collect()
}

/// All ways to put the neurons `left` in `clusters` of `size`, in the order of clusters.
fn ways(left: &[usize], clusters: usize, size: usize) -> Vec<Vec<Vec<usize>>> {
    if clusters == 1 {
        return vec![vec![left.to_vec()]];
    }
    let mut all = Vec::new();
    for bits in 0u32..1 << left.len() {
        if bits.count_ones() as usize == size {
            let (chosen, others): (Vec<_>, Vec<_>) =
                left.iter().enumerate().partition(|(at, _)| bits & (1u32 << *at) != 0);
            let plain = |of: Vec<(usize, &usize)>| of.into_iter().map(|(_, &j)| j).collect::<Vec<_>>();
            for mut way in ways(&plain(others), clusters - 1, size) {
                way.insert(0, plain(chosen.clone()));
                all.push(way);
            }
        }
    }
    all
}

#[test]
fn experts_are_those_of_the_definition() {
    let values = values();
    let mut markers = Markers::new(WIDTH, ACTIVE);
    values.chunks_exact(WIDTH).for_each(|values| markers.push(values));

    let marker = |t: usize, j: usize| -> f64 {
        let row = &values[t * WIDTH..][..WIDTH];
        let larger = (0..WIDTH).filter(|&i| row[i].abs() > row[j].abs()).count();
        f64::from(u8::from(larger < ACTIVE))
    };
    let rate = |j: usize| (0..TOKENS).map(|t| marker(t, j)).sum::<f64>();
    let mut frequent: Vec<usize> = (0..WIDTH).collect();
    frequent.sort_by(|&a, &b| rate(b).total_cmp(&rate(a)).then(a.cmp(&b)));
    for (routed, shared) in [(2, 3), (4, 1), (3, 2)] {
        let size = WIDTH / (routed + shared);
        let mut always = frequent[..size * shared].to_vec();
        always.sort_unstable();
        let seeds = &frequent[size * shared..][..routed];
        let mut rest = frequent[size * shared..].to_vec();
        rest.sort_unstable();
        let apart = |j: usize, of: &dyn Fn(usize) -> f64| -> f64 {
            (0..TOKENS).map(|t| (marker(t, j) - of(t)).abs()).sum()
        };
        let cost = |way: &[Vec<usize>]| -> f64 {
            let of_cluster = |(c, members): (usize, &Vec<usize>)| -> f64 {
                members.iter().map(|&j| apart(j, &|t| marker(t, seeds[c]))).sum()
            };
            way.iter().enumerate().map(of_cluster).sum()
        };
        let least = ways(&rest, routed, size).iter().map(|way| cost(way)).fold(f64::INFINITY, f64::min);
        let Experts { order, representatives } = experts(&markers, routed, shared);
        let order: Vec<usize> = order.iter().map(|&j| j as usize).collect();
        assert_eq!(order[size * routed..], always, "{routed} and {shared}");
        let found: Vec<Vec<usize>> = order[..size * routed].chunks(size).map(<[usize]>::to_vec).collect();
        assert!((cost(&found) - least).abs() < 1e-9, "{routed} and {shared}: {} {least}", cost(&found));
        for (members, &representative) in found.iter().zip(&representatives) {
            let mean = |t: usize| members.iter().map(|&j| marker(t, j)).sum::<f64>() / size as f64;
            let best = members.iter().map(|&j| apart(j, &mean)).fold(f64::INFINITY, f64::min);
            assert!((apart(representative as usize, &mean) - best).abs() < 1e-9);
        }
    }
}

#[test]
fn ties_go_to_the_first_and_all_neurons_may_be_active() {
    let mut markers = Markers::new(4, 9);
    markers.push(&[1.0, -1.0, 0.0, 2.0]);
    let found = experts(&markers, 1, 1);
    assert_eq!(found, Experts { order: vec![2, 3, 0, 1], representatives: vec![2] });
}
