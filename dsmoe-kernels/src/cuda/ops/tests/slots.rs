//! Slots and tiles: a model of what the kernels compute, its properties, and the kernels against it.

use proptest::prelude::*;

use super::emulated::{Emulator, Program, Step};
use super::router::{gates, want};
use super::{check_close, gpu_or_skip, to_f32, values};
use crate::cuda::ops::router::{self, Gates, Routed};
use crate::cuda::ops::slots::{self, Counted, Pairs, Places, ROWS, Router, Shape, Slots, Stats};

/// The pairs of a mask in slots, and their tiles.
#[derive(Debug, PartialEq)]
pub(super) struct Sorted {
    pub(super) starts: Vec<u32>,
    pub(super) sizes: Vec<u32>,
    /// The first slot of every tile, and its rows | shared << 9 | group << 10.
    pub(super) tiles: Vec<[u32; 2]>,
    /// Tiles of up to 256 rows.
    pub(super) wide_tiles: Vec<[u32; 2]>,
    /// Tokens of slots.
    pub(super) tokens: Vec<Option<u32>>,
    /// Slots of tokens.
    pub(super) of_tokens: Vec<Vec<u32>>,
}

/// Does what `arrange` and `place` do.
pub(super) fn sorted(shape: &Shape, mask: &[u8]) -> Sorted {
    let (pieces, n, rows) = (shape.pieces(), shape.num_experts, ROWS as u32);
    let active = |t: usize, g: usize| g < pieces || mask[t * n + g - pieces] != 0;
    let groups: Vec<Vec<u32>> = (0..shape.groups())
        .map(|g| (0..shape.tokens as u32).filter(|&t| active(t as usize, g)).collect())
        .collect();
    let sizes: Vec<u32> = groups.iter().map(|group| group.len() as u32).collect();
    let mut starts = vec![0];
    for size in &sizes {
        starts.push(starts[starts.len() - 1] + size.next_multiple_of(rows));
    }
    let list = |wide: bool| {
        let rows_of = |size: u32| match size.div_ceil(256) {
            tiles if wide && tiles > 0 => size.div_ceil(tiles).next_multiple_of(16),
            _ => rows,
        };
        let mut tiles = Vec::new();
        for (g, &size) in sizes.iter().enumerate() {
            let rows = rows_of(size);
            for tile in 0..size.div_ceil(rows) / 2 * 2 {
                tiles.push([starts[g] + rows * tile, rows.min(size - rows * tile) | 512 | (g as u32) << 10]);
            }
        }
        for full in [true, false] {
            for (g, &size) in sizes.iter().enumerate() {
                let rows = rows_of(size);
                let Some(before) = (size.div_ceil(rows) % 2 == 1).then(|| (size.div_ceil(rows) - 1) * rows)
                else {
                    continue;
                };
                if (size - before > if wide { 128 } else { 64 }) == full {
                    tiles.push([starts[g] + before, (size - before) | (g as u32) << 10]);
                }
            }
        }
        if tiles.len() % 2 == 1 {
            tiles.push([0, 0]);
        }
        tiles
    };
    let (tiles, wide_tiles) = (list(false), list(true));
    let mut tokens = vec![None; starts[starts.len() - 1] as usize];
    let mut of_tokens = vec![Vec::new(); shape.tokens];
    for (group, &start) in groups.iter().zip(&starts) {
        for (slot, &t) in (start..).zip(group) {
            tokens[slot as usize] = Some(t);
            of_tokens[t as usize].push(slot);
        }
    }
    Sorted { starts, sizes, tiles, wide_tiles, tokens, of_tokens }
}

/// Checks what the products rely on, by nothing but the mask.
fn check(shape: &Shape, mask: &[u8], sorted: &Sorted) {
    let (pieces, n) = (shape.pieces(), shape.num_experts);
    let mut seen = vec![0; shape.tokens * shape.groups()];
    for (slot, token) in sorted.tokens.iter().enumerate() {
        let Some(token) = token else { continue };
        let group =
            (0..shape.groups()).rfind(|&g| sorted.starts[g] as usize <= slot && sorted.sizes[g] > 0).unwrap();
        assert!(
            (slot as u32) < sorted.starts[group] + sorted.sizes[group],
            "slot {slot} behind group {group}"
        );
        let t = *token as usize;
        assert!(group < pieces || mask[t * n + group - pieces] != 0, "token {t} is not in group {group}");
        assert!(sorted.of_tokens[t].contains(&(slot as u32)), "slot {slot} of token {t}");
        seen[t * shape.groups() + group] += 1;
        // Tokens keep their order, which makes sums the same in every run.
        let before = slot.checked_sub(1).filter(|_| slot as u32 > sorted.starts[group]);
        assert!(
            before.is_none_or(|before| sorted.tokens[before] < Some(*token)),
            "the order of group {group}"
        );
    }
    for t in 0..shape.tokens {
        for group in 0..shape.groups() {
            let active = group < pieces || mask[t * n + group - pieces] != 0;
            assert_eq!(seen[t * shape.groups() + group], u32::from(active), "token {t}, group {group}");
        }
        assert!(sorted.of_tokens[t].is_sorted(), "parts of token {t} are added in the order of the groups");
    }
    assert!(sorted.starts.iter().all(|start| start % ROWS as u32 == 0), "{:?}", sorted.starts);
    assert!(sorted.starts[shape.groups()] as usize <= shape.slots(), "slots have no room");
    check_tiles(shape, sorted, &sorted.tiles, 128);
    check_tiles(shape, sorted, &sorted.wide_tiles, 256);
}

/// Checks tiles of at most so many rows.
fn check_tiles(shape: &Shape, sorted: &Sorted, tiles: &[[u32; 2]], most: u32) {
    assert!(tiles.len() <= shape.tiles(), "tiles have no room");
    // Every slot with a pair is in one tile.
    let mut covered = vec![0; sorted.tokens.len()];
    for &[slot, what] in tiles {
        let (rows, group) = (what & 511, (what >> 10) as usize);
        assert!(rows <= most && (rows == 0 || slot >= sorted.starts[group]), "tile at {slot}");
        assert!(slot % 16 == 0, "tile at {slot}");
        (slot..slot + rows).for_each(|slot| covered[slot as usize] += 1);
    }
    let pairs = sorted.tokens.iter().map(|token| i32::from(token.is_some()));
    assert!(pairs.eq(covered), "tiles do not cover the pairs");
    let mut last = u32::MAX;
    let mut alone = false;
    for pair in tiles.chunks(2) {
        let [[one, of_one], [other, of_other]] = [pair[0], pair[1]];
        assert_eq!(of_one & 512, of_other & 512, "one of a pair shares");
        if of_one & 512 != 0 {
            let next = other == one + (of_one & 511);
            assert!(!alone && of_one >> 10 == of_other >> 10 && next, "a shared pair at {one}");
        } else {
            // Those with few rows are last, so that no full tile waits for the end of one.
            alone = true;
            for what in [of_one, of_other] {
                let size = if what & 511 > most / 2 { 2 } else { u32::from(what & 511 > 0) };
                assert!(size <= last, "a full tile behind one of few rows");
                last = size;
            }
        }
    }
}

fn shapes() -> impl Strategy<Value = (Shape, Vec<u8>)> {
    (1..700usize, 1..9usize, 0..40usize, 1..20usize, 0..=100u32).prop_flat_map(
        |(tokens, n, core, width, share)| {
            let shape = Shape { tokens, hidden: 8, width: 8 * width, num_experts: n, core: 8 * core };
            let active = (0..100u32).prop_map(move |draw| u8::from(draw < share));
            (Just(shape), proptest::collection::vec(active, tokens * n))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn cuda_slots_hold_every_pair_once((shape, mask) in shapes()) {
        check(&shape, &mask, &sorted(&shape, &mask));
    }
}

fn places(emulator: &mut Emulator, shape: &Shape) -> ([super::emulated::Buffer; 12], Places) {
    let poison = |len: usize| vec![u32::MAX; len];
    let blocks = shape.tokens.div_ceil(slots::TOKENS);
    let lens = [
        shape.slots(),
        shape.slots(),
        shape.tokens * shape.groups(),
        shape.groups() + 1,
        shape.groups(),
        2 * shape.tiles(),
        1,
        2 * shape.tiles(),
        1,
        shape.num_experts * blocks,
        2 * shape.groups(),
        4 * blocks,
    ];
    let buffers = lens.map(|len| emulator.upload(&poison(len)));
    let [
        tokens,
        coefficients,
        of_tokens,
        starts,
        sizes,
        tiles,
        pairs,
        wide_tiles,
        wide_pairs,
        counts,
        order,
        partials,
    ] = buffers.map(|buffer| buffer.1);
    let all = Places {
        tokens,
        coefficients,
        of_tokens,
        starts,
        sizes,
        tiles,
        pairs,
        wide_tiles,
        wide_pairs,
        counts,
        order,
        partials,
    };
    (buffers, all)
}

#[test]
fn cuda_routing_in_three_launches_runs_on_the_processor() {
    let test = "cuda_routing_in_three_launches_runs_on_the_processor";
    let entries = "assign_few assign_many tally arrange place";
    for (at, offset) in [(0, 0.0f32), (1, 1.0)] {
        let defines = router::defines(offset != 0.0);
        let Some(program) = Program::new(test, &router::SOURCE, entries, &defines) else { return };
        let cases = if offset == 0.0 {
            vec![(1, 8, 8, 1, 0), (65, 24, 16, 8, 24), (530, 40, 72, 5, 200), (300, 8, 64, 40, 0)]
        } else {
            vec![(67, 24, 8, 3, 8)]
        };
        for (tokens, hidden, width, num_experts, core) in cases {
            let shape = Shape { tokens, hidden, width, num_experts, core };
            route(&program, &shape, offset, at + tokens as u64);
        }
    }
}

/// Runs the routing of a batch, from a router and from the mask alone.
fn route(program: &Program, shape: &Shape, offset: f32, seed: u64) {
    let Shape { tokens, hidden, num_experts: n, .. } = *shape;
    let x = to_f32(&values(tokens * hidden, 1));
    let rstd: Vec<f32> = to_f32(&values(tokens, 2)).iter().map(|x| x.abs() + 0.5).collect();
    let (norm, w, bias) = (to_f32(&values(hidden, 3)), to_f32(&values(n * hidden, 4)), to_f32(&values(n, 5)));
    let thresholds = [0.3f32, 0.1];
    let set = Gates { rescale: n == 5, force_argmax: n == 8, ..gates(n) };
    let mut emulator = Emulator::new();
    let (buffers, to) = places(&mut emulator, shape);
    let [of_x, of_rstd, of_norm, of_w, of_bias, of_bars] =
        [&x, &rstd, &norm, &w, &bias, &thresholds.to_vec()].map(|values| emulator.upload(values));
    let z = emulator.upload(&vec![f32::NAN; tokens * n]);
    let [of_gates, of_coefficients] = [(); 2].map(|()| emulator.upload(&vec![f32::NAN; tokens * n]));
    let (of_mask, of_active) =
        (emulator.upload(&vec![9u8; tokens * n]), emulator.upload(&vec![9u32; tokens]));
    let (counts, sums) = (emulator.upload(&vec![3u64; 2 * n + 1]), emulator.upload(&[0.5f64, 0.25]));
    let of_tokens = emulator.upload(&vec![5u32; tokens]);
    let pairs =
        Pairs { gates: of_gates.1, coefficients: of_coefficients.1, mask: of_mask.1, active: of_active.1 };
    let router =
        Router { x: of_x.1, rstd: of_rstd.1, norm: of_norm.1, weight: of_w.1, bias: of_bias.1, offset };
    let counted = Counted { counts: counts.1, sums: sums.1, of_tokens: of_tokens.1 };
    let arrange = slots::arrange(shape, &to, &counted);
    let calls = [
        slots::assign(shape, &to, &pairs, (z.1, &router), (of_bars.1, &set), &counted),
        arrange,
        slots::place(shape, &to, &pairs),
    ];
    emulator.run(program, seed, &calls.each_ref().map(Step::Call));

    let got_z: Vec<f32> = emulator.download(z);
    let want_z: Vec<f64> = (0..tokens * n)
        .map(|at| {
            let h = |i: usize| {
                let x = f64::from(x[at / n * hidden + i]) * f64::from(rstd[at / n]);
                x * (f64::from(norm[i]) + f64::from(offset))
            };
            (0..hidden).map(|i| h(i) * f64::from(w[at % n * hidden + i])).sum::<f64>()
                + f64::from(bias[at % n])
        })
        .collect();
    check_close("logits", &got_z, &want_z, |_| 1e-6 * hidden as f64);
    let want = want(&got_z, thresholds, set);
    assert_eq!(emulator.download::<u8>(of_mask), want.mask, "{shape:?}");
    assert_eq!(emulator.download::<u32>(of_active), want.active);
    check_close("gates", &emulator.download(of_gates), &want.gates, |_| 1e-6);
    let coefficients: Vec<f32> = emulator.download(of_coefficients);
    check_close("coefficients", &coefficients, &want.coefficients, |i| 1e-6 * (1.0 + want.coefficients[i]));
    let mut want_counts = vec![3u64; 2 * n + 1];
    for (at, &on) in want.mask.iter().enumerate() {
        want_counts[at % n] += u64::from(on);
    }
    want.active.iter().for_each(|&k| want_counts[n + k as usize] += 1);
    assert_eq!(emulator.download::<u64>(counts), want_counts, "{shape:?}");
    let all: f64 = want.gates.iter().sum();
    let of_active: f64 = want.gates.iter().zip(&want.mask).map(|(q, &on)| q * f64::from(on)).sum();
    let got: Vec<f64> = emulator.download(sums);
    let close = 1e-6 * (1.0 + all);
    assert!((got[0] - 0.5 - of_active).abs() < close && (got[1] - 0.25 - all).abs() < close, "{got:?}");
    let more: Vec<u32> = want.active.iter().map(|k| 5 + k).collect();
    assert_eq!(emulator.download::<u32>(of_tokens), more);
    check_lists(&emulator, shape, &buffers, &want.mask, &coefficients);

    // From the mask, over what was there before.
    for buffer in &buffers[..9] {
        emulator.poison(*buffer);
    }
    let none = Counted::default();
    let calls = [
        slots::tally(shape, &to, of_mask.1),
        slots::arrange(shape, &to, &none),
        slots::place(shape, &to, &pairs),
    ];
    emulator.run(program, seed + 1, &calls.each_ref().map(Step::Call));
    check_lists(&emulator, shape, &buffers, &want.mask, &coefficients);
    assert_eq!(emulator.download::<u64>(counts), want_counts);
}

/// Checks what the kernels made against the model.
fn check_lists(
    emulator: &Emulator,
    shape: &Shape,
    buffers: &[super::emulated::Buffer; 12],
    mask: &[u8],
    coefficients: &[f32],
) {
    let want = sorted(shape, mask);
    check(shape, mask, &want);
    let [tokens, of_slots, of_tokens, starts, sizes, tiles, pairs, wide_tiles, wide_pairs, ..] = *buffers;
    assert_eq!(emulator.download::<u32>(starts), want.starts, "{shape:?}");
    assert_eq!(emulator.download::<u32>(sizes), want.sizes);
    for (tiles, pairs, want) in [(tiles, pairs, &want.tiles), (wide_tiles, wide_pairs, &want.wide_tiles)] {
        assert_eq!(emulator.download::<u32>(pairs), [want.len() as u32 / 2]);
        assert_eq!(emulator.download::<u32>(tiles)[..2 * want.len()], want.concat());
    }
    let (pieces, n) = (shape.pieces(), shape.num_experts);
    let (got_tokens, got_factors): (Vec<u32>, Vec<f32>) =
        (emulator.download(tokens), emulator.download(of_slots));
    for (slot, token) in want.tokens.iter().enumerate().filter_map(|(slot, token)| Some((slot, (*token)?))) {
        assert_eq!(got_tokens[slot], token, "slot {slot}");
        let group =
            (0..shape.groups()).rfind(|&g| want.starts[g] as usize <= slot && want.sizes[g] > 0).unwrap();
        let factor = if group < pieces { 1.0 } else { coefficients[token as usize * n + group - pieces] };
        assert_eq!(got_factors[slot].to_bits(), factor.to_bits(), "slot {slot}");
    }
    let got: Vec<u32> = emulator.download(of_tokens);
    for (row, want) in got.chunks(shape.groups()).zip(&want.of_tokens) {
        assert_eq!(row[..want.len()], want[..], "{shape:?}");
    }
}

#[test]
fn cuda_routing_into_slots_is_the_model() {
    let Some(gpu) = gpu_or_skip("cuda_routing_into_slots_is_the_model") else { return };
    for (tokens, n, core) in [(1, 1, 0), (65, 8, 24), (600, 5, 200), (3000, 64, 0)] {
        let shape = Shape { tokens, hidden: 16, width: 72, num_experts: n, core };
        let z = to_f32(&values(tokens * n, 8));
        let set = gates(n);
        let bars = [0.1f32, 0.0];
        let want = want(&z, bars, set);
        let mut routed = Routed::with_room(&gpu, tokens, n).unwrap();
        let mut slots = Slots::with_room(&gpu, shape).unwrap();
        let (mut on_z, thresholds) = (gpu.upload(&z).unwrap(), &gpu.upload(&bars).unwrap());
        let (mut counts, mut sums) = (gpu.zeros::<u64>(2 * n + 1).unwrap(), gpu.zeros::<f64>(2).unwrap());
        let stats = Some(Stats { counts: &mut counts, sums: &mut sums, of_tokens: None });
        let (z, gates) = (&mut *on_z, &set);
        slots::Route { slots: &mut slots, routed: &mut routed, z, router: None, thresholds, gates, stats }
            .run()
            .unwrap();
        let sorted = sorted(&shape, &want.mask);
        for hosted in [false, true] {
            if hosted {
                slots = Slots::with_room(&gpu, shape).unwrap();
                slots::Sort { slots: &mut slots, routed: &routed }.run().unwrap();
            }
            assert_eq!(slots.starts.download().unwrap(), sorted.starts, "{shape:?}");
            assert_eq!(slots.sizes.download().unwrap(), sorted.sizes);
            for (got, want) in [(&slots.tiles, &sorted.tiles), (&slots.wide_tiles, &sorted.wide_tiles)] {
                assert_eq!(got.download().unwrap()[..2 * want.len()], want.concat());
            }
            let got = slots.tokens.download().unwrap();
            assert!(sorted.tokens.iter().zip(&got).all(|(want, got)| want.is_none_or(|want| want == *got)));
            let of_tokens = slots.of_tokens.download().unwrap();
            for (row, want) in of_tokens.chunks(shape.groups()).zip(&sorted.of_tokens) {
                assert_eq!(row[..want.len()], want[..], "{shape:?}");
            }
        }
        let load = &counts.download().unwrap()[..n];
        let pieces = shape.pieces();
        assert!(load.iter().zip(&sorted.sizes[pieces..]).all(|(load, size)| *load == u64::from(*size)));
    }
}
