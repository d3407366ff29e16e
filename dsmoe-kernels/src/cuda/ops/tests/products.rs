//! Products of pairs in slots: the launches that the ops make run in the model of a device, against sums in f64.

use half::bf16;

use super::emulated::{Buffer, Emulator, Program, Step, encode};
use super::slots::{Sorted, sorted};
use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::Activation;
use crate::cuda::Gpu;
use crate::cuda::ops::ffn;
use crate::cuda::ops::products::{self, Operands, Variant};
use crate::cuda::ops::slots::{Places, Shape, Slots};
use crate::swiglu::reference::value;
use crate::testing::skipped;

/// Sizes, the experts' rows, and the blocks that run at once.
struct Case {
    shape: Shape,
    rows: &'static [usize],
    blocks: usize,
}

fn case(sizes: [usize; 4], rows: &'static [usize], blocks: usize) -> Case {
    let [tokens, hidden, width, core] = sizes;
    Case { shape: Shape { tokens, hidden, width, num_experts: rows.len(), core }, rows, blocks }
}

/// Empty and full experts, rows round the sizes of tiles, widths that are no multiples of 64, a core in two pieces, and more
/// tiles than blocks.
fn cases() -> [Case; 4] {
    [
        case([131, 64, 64, 0], &[0, 1, 63, 64, 129], 4),
        case([150, 136, 72, 0], &[150, 0, 65], 2),
        case([70, 264, 200, 280], &[17, 70], 2),
        case([300, 16, 8, 8], &[257, 300, 128, 100], 6),
    ]
}

/// The inputs of a case, and the expected results of each product.
struct Data {
    shape: Shape,
    sorted: Sorted,
    mask: Vec<u8>,
    /// The expert's factors of slots.
    factors: Vec<f32>,
    x: Vec<bf16>,
    dy: Vec<bf16>,
    /// Gate, up and down, `[intermediate, hidden]`.
    weights: [Vec<bf16>; 3],
    /// da, db and c, `[slots, wide]`.
    pairs: [Vec<bf16>; 3],
    before: Vec<f32>,
}

impl Data {
    fn new(case: &Case) -> Data {
        let shape = case.shape;
        let Shape { tokens, hidden, num_experts: n, .. } = shape;
        let mask: Vec<u8> = (0..tokens * n)
            .map(|at| u8::from((at / n * 7 + at % n * 3) % tokens < case.rows[at % n]))
            .collect();
        let sorted = sorted(&shape, &mask);
        let [x, dy] = [1, 2].map(|seed| values(tokens * hidden, seed));
        let weights = [3, 4, 5].map(|seed| values(shape.intermediate() * hidden, seed));
        let mut factors: Vec<f32> = to_f32(&values(shape.slots(), 9)).iter().map(|x| x.abs() + 0.1).collect();
        factors[..sorted.starts[shape.pieces()] as usize].fill(1.0);
        // Slots behind the last pair are zeros up to whole groups of 64, and nothing behind; columns behind a group's neurons
        // are zeros too.
        let pairs = [6, 7, 8].map(|seed| {
            let mut all = values(shape.slots() * shape.wide(), seed);
            for (slot, row) in all.chunks_mut(shape.wide()).enumerate() {
                match part_of(&shape, &sorted, slot) {
                    Part::Pair { group, .. } => row[neurons(&shape, group).1..].fill(bf16::ZERO),
                    Part::Zeros => row.fill(bf16::ZERO),
                    Part::Nothing => row.fill(bf16::NAN),
                }
            }
            all
        });
        let before = to_f32(&values(shape.intermediate() * hidden, 10));
        Data { shape, sorted, mask, factors, x, dy, weights, pairs, before }
    }

    /// Puts the slots and their tiles on the device.
    fn places(&self, emulator: &mut Emulator) -> Places {
        let Sorted { starts, sizes, tiles, wide_tiles, tokens, of_tokens } = &self.sorted;
        let mut list = vec![u32::MAX; self.shape.slots()];
        for (to, token) in list.iter_mut().zip(tokens) {
            *to = token.unwrap_or(u32::MAX);
        }
        let mut of_each = vec![u32::MAX; self.shape.tokens * self.shape.groups()];
        for (row, slots) in of_each.chunks_mut(self.shape.groups()).zip(of_tokens) {
            row[..slots.len()].copy_from_slice(slots);
        }
        Places {
            tokens: emulator.upload(&list).1,
            coefficients: emulator.upload(&self.factors).1,
            of_tokens: emulator.upload(&of_each).1,
            starts: emulator.upload(starts).1,
            sizes: emulator.upload(sizes).1,
            tiles: emulator.upload(&tiles.concat()).1,
            pairs: emulator.upload(&[tiles.len() as u32 / 2]).1,
            wide_tiles: emulator.upload(&wide_tiles.concat()).1,
            wide_pairs: emulator.upload(&[wide_tiles.len() as u32 / 2]).1,
            counts: 0,
            order: 0,
            partials: 0,
        }
    }
}

/// The kind of a slot.
enum Part {
    Pair { group: usize, token: usize },
    Zeros,
    Nothing,
}

fn part_of(shape: &Shape, sorted: &Sorted, slot: usize) -> Part {
    let at = |g: usize| slot.checked_sub(sorted.starts[g] as usize);
    let Some(group) = (0..shape.groups()).rfind(|&g| at(g).is_some() && sorted.sizes[g] > 0) else {
        return Part::Nothing;
    };
    let (row, size) = (at(group).unwrap_or_default(), sorted.sizes[group] as usize);
    match sorted.tokens.get(slot).copied().flatten() {
        Some(token) => Part::Pair { group, token: token as usize },
        None if row < size.next_multiple_of(64) => Part::Zeros,
        None => Part::Nothing,
    }
}

/// The first row of a group's weights, and how many it has.
fn neurons(shape: &Shape, group: usize) -> (usize, usize) {
    let Shape { width, core, .. } = *shape;
    match group.checked_sub(shape.pieces()) {
        Some(expert) => (core + expert * width, width),
        None => (group * shape.wide(), shape.wide().min(core - group * shape.wide())),
    }
}

#[test]
fn cuda_products_run_on_the_processor() {
    let all: Vec<Data> = cases().iter().map(Data::new).collect();
    let mut first: [Option<Bits>; 4] = [const { None }; 4];
    // The others differ from these by numbers alone.
    let names = ["cooperative", "no-cluster", "ping-pong", "narrow", "turned"];
    for (name, variant) in Variant::ALL.into_iter().filter(|(name, _)| names.contains(name)) {
        let up = if variant.takes(products::Form::Up) { "up " } else { "" };
        let weights = if variant.takes(products::Form::Weights) { " weights" } else { "" };
        let defines = variant.defines(Activation::Silu);
        let test = "cuda_products_run_on_the_processor";
        let entries = format!("{up}project down input{weights}");
        let Some(program) = Program::new(test, variant.source(), &entries, &defines) else { return };
        // Other variants take the two cases with the most groups; so do other orders of threads.
        let seeds: &[(usize, u64)] = match variant {
            Variant::DEFAULT => &[(0, 1), (1, 2), (2, 3), (3, 4), (3, 5)],
            _ => &[(0, 6), (3, 7)],
        };
        for &(at, seed) in seeds {
            let what = format!("{name}, case {at}, seed {seed}");
            let bits = check(&program, &variant, &all[at], cases()[at].blocks, seed, &what);
            // Whatever the variant and the order, the bits are the same.
            let same = same(first[at].get_or_insert_with(|| bits.clone()), &bits);
            assert!(same, "{what}: other bits");
        }
    }
}

/// The results of the products of a case; those of `up` only of variants that have it.
struct Results {
    /// c, a and b, `[slots, wide]`.
    ups: Option<[Vec<bf16>; 3]>,
    g: Vec<bf16>,
    /// Of the output and of the gradient of the input, `[slots, hidden]`.
    parts: [Vec<bf16>; 2],
    /// Gradients that were added to, and that were set, of variants that have them.
    grads: Option<[[Vec<f32>; 3]; 2]>,
}

/// The bits of a pair's values: of `up`, of the other products, and of the gradients.
type Bits = [Option<Vec<u32>>; 3];

/// Tells whether what both have is the same.
fn same(one: &Bits, other: &Bits) -> bool {
    one.iter().zip(other).all(|(one, other)| one.is_none() || other.is_none() || one == other)
}

/// Runs the products of a case in the model of a device and checks them; returns their bits.
fn check(program: &Program, variant: &Variant, data: &Data, blocks: usize, seed: u64, what: &str) -> Bits {
    let Data { shape, x, dy, weights, pairs, before, .. } = data;
    let Shape { hidden, .. } = *shape;
    let (wide, slots) = (shape.wide(), shape.slots());
    let mut emulator = Emulator::new();
    let to = data.places(&mut emulator);
    let [of_x, of_dy] = [x, dy].map(|values| emulator.upload(values).1);
    // One buffer, as descriptors reach from one projection to the other.
    let both = emulator.upload(&[&weights[0][..], &weights[1]].concat());
    let (gate, up) = (both.1, both.1 + 2 * weights[0].len() as u64);
    let down = emulator.upload(&weights[2]).1;
    let [da, db, c] = pairs.each_ref().map(|values| emulator.upload(values).1);
    let nothing = vec![bf16::NAN; slots * wide];
    let outs = [(); 4].map(|()| emulator.upload(&nothing));
    let parts = [(); 2].map(|()| emulator.upload(&vec![bf16::NAN; slots * hidden]));
    let grads = [(); 3].map(|()| emulator.upload(before));
    let sets = [(); 3].map(|()| emulator.upload(&vec![f32::NAN; before.len()]));
    let weights_of = |to: [Buffer; 3], set| Operands::Weights {
        grads: to.map(|grad| grad.1),
        values: [da, db, c],
        x: of_x,
        dy: of_dy,
        set,
    };
    let [got_c, got_a, got_b, got_g] = outs;
    let kept = Some([got_a.1, got_b.1]);
    let mut operands = vec![
        Operands::Project { g: got_g.1, dy: of_dy, down },
        Operands::Down { parts: parts[0].1, c, down },
        Operands::Input { parts: parts[1].1, da, db, gate, up },
    ];
    let with_weights = variant.takes(products::Form::Weights);
    if with_weights {
        operands.extend([weights_of(grads, false), weights_of(sets, true)]);
    }
    let with_up = variant.takes(products::Form::Up);
    if with_up {
        operands.push(Operands::Up { c: got_c.1, kept, x: of_x, gate, up });
    }
    let how = (variant, Activation::Silu);
    let launches: Vec<products::Launch> = operands
        .iter()
        .map(|operands| products::launch((shape, &to), how, operands, blocks, encode).unwrap())
        .collect();
    let steps: Vec<Step<'_>> = launches.iter().map(Step::Launch).collect();
    emulator.run(program, seed, &steps);
    let results = Results {
        ups: with_up.then(|| [got_c, got_a, got_b].map(|buffer| emulator.download(buffer))),
        g: emulator.download(got_g),
        parts: parts.map(|buffer| emulator.download(buffer)),
        grads: with_weights.then(|| [grads, sets].map(|three| three.map(|buffer| emulator.download(buffer)))),
    };
    results.check(data, variant, what)
}

impl Results {
    /// Returns the bits of the values of pairs and of the gradients.
    fn bits(&self, data: &Data) -> Bits {
        let Results { ups, g, parts, grads } = self;
        let (wide, hidden) = (data.shape.wide(), data.shape.hidden);
        let of_pairs = |values: &[bf16], cols: usize| -> Vec<u32> {
            let rows = values.chunks(cols).zip(&data.sorted.tokens).filter(|(_, token)| token.is_some());
            rows.flat_map(|(row, _)| row).map(|x| u32::from(x.to_bits())).collect()
        };
        let others = [of_pairs(g, wide), of_pairs(&parts[0], hidden), of_pairs(&parts[1], hidden)];
        [
            ups.as_ref().map(|ups| ups.iter().flat_map(|values| of_pairs(values, wide)).collect()),
            Some(others.concat()),
            grads.as_ref().map(|grads| grads.iter().flatten().flatten().map(|x| x.to_bits()).collect()),
        ]
    }

    /// Checks the results and returns their bits.
    fn check(&self, data: &Data, variant: &Variant, what: &str) -> Bits {
        let Data { shape, sorted, x, dy, weights, pairs, before, factors, .. } = data;
        let Shape { hidden, .. } = *shape;
        let (wide, slots) = (shape.wide(), shape.slots());
        let [x, dy] = [x, dy].map(|values| to_f64(values));
        let [gate, up, down] = weights.each_ref().map(|values| to_f64(values));
        let [da, db, c] = pairs.each_ref().map(|values| to_f64(values));
        let round = |x: f64| bf16::from_f64(x).to_f64();
        let near = |size: f64, terms: usize| size.abs() / 250.0 + 4e-6 * terms as f64;
        // Rows of slots: pairs are as the closure says, the others zeros or nothing.
        let rows =
            |name: &str, got: &[bf16], cols: usize, of: &dyn Fn(usize, usize, usize, usize) -> (f64, f64)| {
                let (mut here, mut wanted, mut most) = (Vec::new(), Vec::new(), Vec::new());
                for (slot, row) in got.chunks(cols).enumerate() {
                    match part_of(shape, sorted, slot) {
                        Part::Pair { group, token } => {
                            for (j, value) in row.iter().enumerate() {
                                let (want, tolerance) = of(slot, group, token, j);
                                here.push(value.to_f32());
                                wanted.push(want);
                                most.push(tolerance);
                            }
                        }
                        // Turned tiles write no more than the last pair's group of 16.
                        Part::Zeros if variant.turned => {}
                        Part::Zeros if cols == wide => {
                            assert!(
                                row.iter().all(|x| x.to_f32() == 0.0),
                                "{what}: {name}: slot {slot} is no zero"
                            );
                        }
                        // Parts of no pair are never read.
                        Part::Zeros => {}
                        Part::Nothing => {
                            assert!(row.iter().all(|x| x.is_nan()), "{what}: {name}: slot {slot} is written");
                        }
                    }
                }
                check_close(&format!("{what}: {name}"), &here, &wanted, |i| most[i]);
            };
        // Columns behind a group's neurons are zeros of c; of the others they are the products of another group.
        let product = |of: &[f64], with: &[f64], token: usize, neuron: usize| -> f64 {
            let row = with.get(neuron * hidden..(neuron + 1) * hidden);
            row.map_or(0.0, |row| row.iter().zip(&of[token * hidden..]).map(|(w, x)| w * x).sum())
        };
        if let Some([got_c, got_a, got_b]) = &self.ups {
            rows("c", got_c, wide, &|slot, group, token, j| {
                let (first, count) = neurons(shape, group);
                if j >= count {
                    return (0.0, 1e-30);
                }
                let [a, b] = [&gate, &up].map(|weight| round(product(&x, weight, token, first + j)));
                let want = f64::from(factors[slot]) * value(Activation::Silu, a) * b;
                // Projections may be rounded to a neighbour.
                (want, want.abs() / 40.0 + 4e-5 * hidden as f64)
            });
            for (name, got, weight) in [("a", got_a, &gate), ("b", got_b, &up)] {
                rows(name, got, wide, &|_, group, token, j| {
                    let want = product(&x, weight, token, neurons(shape, group).0 + j);
                    (want, near(want, hidden))
                });
            }
        }
        rows("g", &self.g, wide, &|_, group, token, j| {
            let want = product(&dy, &down, token, neurons(shape, group).0 + j);
            (want, near(want, hidden))
        });
        let part = |terms: &[(&[f64], &[f64])], slot: usize, group: usize, i: usize| {
            let (first, count) = neurons(shape, group);
            let all = terms.iter().flat_map(|(of, with)| {
                (0..count).map(move |j| of[slot * wide + j] * with[(first + j) * hidden + i])
            });
            let (sum, size) = all.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + f64::abs(term)));
            (sum, near(size, terms.len() * count))
        };
        let [of_down, of_input] = &self.parts;
        rows("down", of_down, hidden, &|slot, group, _, i| part(&[(&c, &down)], slot, group, i));
        rows("input", of_input, hidden, &|slot, group, _, i| {
            part(&[(&da, &gate), (&db, &up)], slot, group, i)
        });
        for (set, grads) in [false, true].into_iter().zip(self.grads.iter().flatten()) {
            for ((name, got), (of, with)) in
                ["gate", "up", "down"].iter().zip(grads).zip([(&da, &x), (&db, &x), (&c, &dy)])
            {
                let mut want = vec![0.0; got.len()];
                for slot in 0..slots {
                    let Part::Pair { group, token } = part_of(shape, sorted, slot) else { continue };
                    let (first, count) = neurons(shape, group);
                    for j in 0..count {
                        for i in 0..hidden {
                            want[(first + j) * hidden + i] += of[slot * wide + j] * with[token * hidden + i];
                        }
                    }
                }
                if !set {
                    want.iter_mut().zip(before).for_each(|(sum, &before)| *sum += f64::from(before));
                }
                let what = format!("{what}: gradient of {name}, set: {set}");
                check_close(&what, got, &want, |_| 4e-6 * (1 + shape.tokens) as f64);
            }
        }
        self.bits(data)
    }
}

/// Runs the products of a case on a GPU.
fn on_device(gpu: &Gpu, variant: &Variant, data: &Data) -> Results {
    let Data { shape, sorted, x, dy, weights, pairs, before, factors, .. } = data;
    let Shape { hidden, .. } = *shape;
    let (wide, count) = (shape.wide(), shape.slots());
    let mut slots = Slots::with_room(gpu, *shape).unwrap();
    let tokens: Vec<u32> = sorted.tokens.iter().map(|token| token.unwrap_or(u32::MAX)).collect();
    let tiles = sorted.tiles.concat();
    slots.tokens.part_mut(0..tokens.len()).upload_from(&tokens).unwrap();
    slots.coefficients.upload_from(factors).unwrap();
    slots.starts.upload_from(&sorted.starts).unwrap();
    slots.sizes.upload_from(&sorted.sizes).unwrap();
    slots.tiles.part_mut(0..tiles.len()).upload_from(&tiles).unwrap();
    slots.pairs.upload_from(&[sorted.tiles.len() as u32 / 2]).unwrap();
    let wide_tiles = sorted.wide_tiles.concat();
    slots.wide_tiles.part_mut(0..wide_tiles.len()).upload_from(&wide_tiles).unwrap();
    slots.wide_pairs.upload_from(&[sorted.wide_tiles.len() as u32 / 2]).unwrap();
    let slots = &slots;
    let [x, dy] = &[x, dy].map(|values| gpu.upload_rows(values, hidden).unwrap());
    let both = gpu.upload(&[&weights[0][..], &weights[1]].concat()).unwrap();
    let len = weights[0].len();
    let (gate, up, down) = (&both.part(0..len), &both.part(len..2 * len), &gpu.upload(&weights[2]).unwrap());
    let [da, db, c] = &pairs.each_ref().map(|values| gpu.upload_rows(values, wide).unwrap());
    let nothing = |cols: usize| gpu.upload_rows(&vec![bf16::NAN; count * cols], cols).unwrap();
    let mut outs = [(); 4].map(|()| nothing(wide));
    let mut parts = [(); 2].map(|()| nothing(hidden));
    let mut added = [(); 3].map(|()| gpu.upload(before).unwrap());
    let mut set_to = [(); 3].map(|()| gpu.upload(&vec![f32::NAN; before.len()]).unwrap());
    let [got_c, got_a, got_b, g] = &mut outs;
    let with_up = variant.takes(products::Form::Up);
    if with_up {
        let projections = Some([&mut **got_a, &mut **got_b]);
        let activation = Activation::Silu;
        products::Up { c: got_c, projections, x, gate, up, slots, activation, variant }.run().unwrap();
    }
    products::Project { g, dy, down, slots, variant }.run().unwrap();
    let [of_down, of_input] = &mut parts;
    products::Down { parts: of_down, c, down, slots, variant }.run().unwrap();
    products::BackwardInput { parts: of_input, da, db, gate, up, slots, variant }.run().unwrap();
    let with_weights = variant.takes(products::Form::Weights);
    for (set, grads) in [(false, &mut added), (true, &mut set_to)].into_iter().filter(|_| with_weights) {
        let grads = grads.each_mut().map(|grad| &mut **grad);
        products::BackwardWeights { grads, values: [da, db, c], x, dy, set, slots, variant }.run().unwrap();
    }
    let [got_c, got_a, got_b, g] = outs.map(|buffer| buffer.download().unwrap());
    Results {
        ups: with_up.then_some([got_c, got_a, got_b]),
        g,
        parts: parts.map(|buffer| buffer.download().unwrap()),
        grads: with_weights.then(|| [added, set_to].map(|three| three.map(|grad| grad.download().unwrap()))),
    }
}

#[test]
fn cuda_products_of_slots_are_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_products_of_slots_are_the_reference") else { return };
    if !products::fits(&gpu, &Variant::DEFAULT) {
        skipped("cuda_products_of_slots_are_the_reference", "the GPU is no Hopper");
        return;
    }
    for (at, case) in cases().iter().enumerate() {
        let data = Data::new(case);
        // The first ends instead of hanging, and says so before others run.
        let careful = Variant { trap: true, ..Variant::DEFAULT };
        let want = on_device(&gpu, &careful, &data).check(&data, &careful, &format!("case {at}"));
        for (name, variant) in Variant::ALL {
            // A race shows in some runs only.
            for run in 0..if variant == Variant::DEFAULT { 50 } else { 5 } {
                let got = on_device(&gpu, &variant, &data);
                let bits = if run == 0 { got.check(&data, &variant, name) } else { got.bits(&data) };
                assert!(same(&want, &bits), "{name}, case {at}, run {run}: other bits");
            }
        }
    }
}

#[test]
fn cuda_values_of_slots_run_on_the_processor() {
    let test = "cuda_values_of_slots_run_on_the_processor";
    let entries = "backward_slots backward_inactive clear_inactive sum_slots";
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let Some(program) = Program::new(test, &ffn::SOURCE, entries, &[ffn::define(activation)]) else {
            return;
        };
        for case in &cases()[1..3] {
            for dense in [false, true] {
                values_of_slots(&program, &Data::new(case), (dense, activation));
            }
        }
    }
}

/// Checks the backward pass of the activation, and the sums of parts.
fn values_of_slots(program: &Program, data: &Data, (dense, activation): (bool, Activation)) {
    let Data { shape, sorted, mask, factors, .. } = data;
    let Shape { tokens, hidden, width, num_experts: n, core } = *shape;
    let (wide, slots, all) = (shape.wide(), shape.slots(), shape.intermediate());
    let cols = if dense { all } else { wide };
    let [a, b, g] = [11, 12, 13].map(|seed| values(if dense { tokens } else { slots } * cols, seed));
    let mut emulator = Emulator::new();
    let to = data.places(&mut emulator);
    let [of_a, of_b, of_g] = [&a, &b, &g].map(|values| emulator.upload(values).1);
    let outs = [(); 3].map(|()| emulator.upload(&vec![bf16::NAN; slots * wide]));
    let of_coefficients = emulator.upload(&vec![f32::NAN; tokens * n]);
    let of_mask = emulator.upload(mask).1;
    let active: Vec<u32> = mask.chunks(n).map(|row| row.iter().map(|&on| u32::from(on)).sum()).collect();
    let active = emulator.upload(&active).1;
    let part = values(slots * hidden, 14);
    let (parts, y) = (emulator.upload(&part).1, emulator.upload(&vec![f32::NAN; tokens * hidden]));
    let values = ffn::Values {
        da: outs[0].1,
        db: outs[1].1,
        c: outs[2].1,
        dcoefficients: of_coefficients.1,
        g: of_g,
        a: of_a,
        b: of_b,
    };
    let calls = [
        ffn::backward_slots((shape, &to), &values, (dense, activation), 3),
        ffn::backward_inactive(shape, &values, of_mask, (dense, activation)),
        ffn::sum_slots(shape, y.1, parts, to.of_tokens, active),
    ];
    emulator.run(program, 1, &calls.each_ref().map(Step::Call));

    let [a, b, g, part] = [&a, &b, &g, &part].map(|values| to_f64(values));
    let slope = |x: f64| (value(activation, x + 1e-6) - value(activation, x - 1e-6)) / 2e-6;
    let place = |slot: usize, group: usize, token: usize, j: usize| {
        if dense { token * all + neurons(shape, group).0 + j } else { slot * wide + j }
    };
    let mut want_dk = vec![0.0; tokens * n];
    let got = outs.map(|buffer| to_f32(&emulator.download::<bf16>(buffer)));
    for slot in 0..slots {
        let rows = got.each_ref().map(|values| &values[slot * wide..(slot + 1) * wide]);
        match part_of(shape, sorted, slot) {
            Part::Nothing => assert!(rows.iter().all(|row| row.iter().all(|x| x.is_nan())), "slot {slot}"),
            Part::Zeros => assert!(rows.iter().all(|row| row.iter().all(|&x| x == 0.0)), "slot {slot}"),
            Part::Pair { group, token } => {
                let (k, (_, count)) = (f64::from(factors[slot]), neurons(shape, group));
                for j in 0..wide {
                    let at = if j < count { place(slot, group, token, j) } else { 0 };
                    let [a, b, g] = [a[at], b[at], g[at]];
                    let wanted =
                        [k * g * b * slope(a), k * g * value(activation, a), k * value(activation, a) * b];
                    for (row, want) in rows.iter().zip(wanted) {
                        let want = if j < count { want } else { 0.0 };
                        assert!(
                            (f64::from(row[j]) - want).abs() <= want.abs() / 200.0 + 1e-5,
                            "slot {slot}, {j}"
                        );
                    }
                    if let Some(expert) = group.checked_sub(shape.pieces()).filter(|_| j < count) {
                        want_dk[token * n + expert] += value(activation, a) * b * g;
                    }
                }
            }
        }
    }
    for pair in (0..tokens * n).filter(|&pair| dense && mask[pair] == 0) {
        let first = pair / n * all + core + pair % n * width;
        want_dk[pair] = (first..first + width).map(|at| value(activation, a[at]) * b[at] * g[at]).sum();
    }
    check_close("dcoefficients", &emulator.download(of_coefficients), &want_dk, |_| 1e-5 * width as f64);
    let mut want_y = vec![0.0; tokens * hidden];
    for (token, slots) in sorted.of_tokens.iter().enumerate() {
        for &slot in slots {
            for i in 0..hidden {
                want_y[token * hidden + i] += part[slot as usize * hidden + i];
            }
        }
    }
    check_close("sums", &emulator.download(y), &want_y, |_| 1e-5);
}
