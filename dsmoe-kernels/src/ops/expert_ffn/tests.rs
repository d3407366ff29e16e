use super::*;
use crate::Activation;
use crate::crew::with_crew;
use crate::isa::Isa;
use crate::matmul::Precision;
use crate::testing::{
    assert_close, assert_close_f64, f64s, finite_differences, normals, sized, with_threads,
};

/// A routing and its dense form.
struct Routing {
    mask: Vec<bool>,
    coef: Vec<f32>,
    offsets: Vec<usize>,
    tokens: Vec<u32>,
    coefficients: Vec<f32>,
    token_offsets: Vec<usize>,
    slots: Vec<u32>,
}

impl Routing {
    fn new(tokens: usize, n: usize, active: impl Fn(usize, usize) -> bool, seed: u64) -> Routing {
        let mask: Vec<bool> = (0..tokens * n).map(|pair| active(pair / n, pair % n)).collect();
        let coef: Vec<f32> = normals(tokens * n, seed).iter().map(|z| 0.5 + z * z).collect();
        Routing::of(mask, coef, tokens, n)
    }

    fn of(mask: Vec<bool>, coef: Vec<f32>, num_tokens: usize, n: usize) -> Routing {
        let (mut offsets, mut tokens, mut coefficients) = (vec![0], Vec::new(), Vec::new());
        let mut slot_of = vec![0; num_tokens * n];
        for i in 0..n {
            for t in (0..num_tokens).filter(|t| mask[t * n + i]) {
                slot_of[t * n + i] = tokens.len() as u32;
                tokens.push(t as u32);
                coefficients.push(coef[t * n + i]);
            }
            offsets.push(tokens.len());
        }
        let (mut token_offsets, mut slots) = (vec![0], Vec::new());
        for t in 0..num_tokens {
            slots.extend((0..n).filter(|i| mask[t * n + i]).map(|i| slot_of[t * n + i]));
            token_offsets.push(slots.len());
        }
        Routing { mask, coef, offsets, tokens, coefficients, token_offsets, slots }
    }

    fn routes(&self) -> Routes<'_> {
        Routes {
            offsets: &self.offsets,
            tokens: &self.tokens,
            coefficients: &self.coefficients,
            token_offsets: &self.token_offsets,
            slots: &self.slots,
        }
    }
}

/// Inputs of one problem.
struct Problem {
    dims: Dims,
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    /// Of gate, up and down.
    biases: Option<[Vec<f32>; 3]>,
    dy: Vec<f32>,
    routing: Routing,
}

/// The results of the op. The weights' gradients start at 1.
#[derive(Clone, Debug, PartialEq)]
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    dcoef: Vec<f32>,
    dgate: Vec<f32>,
    dup: Vec<f32>,
    ddown: Vec<f32>,
    dbiases: Option<[Vec<f32>; 3]>,
}

impl Problem {
    fn new(dims: Dims, active: impl Fn(usize, usize) -> bool) -> Problem {
        let scaled = |n: usize, seed: u64, scale: f32| -> Vec<f32> {
            normals(n, seed).iter().map(|x| x * scale).collect()
        };
        let (activations, weights) = (dims.tokens * dims.hidden, dims.intermediate * dims.hidden);
        let narrow = 1.0 / (dims.hidden as f32).sqrt();
        Problem {
            dims,
            x: scaled(activations, 1, 1.0),
            gate: scaled(weights, 2, narrow),
            up: scaled(weights, 3, narrow),
            down: scaled(weights, 4, 1.0 / (dims.intermediate as f32).sqrt()),
            biases: None,
            dy: scaled(activations, 5, 1.0),
            routing: Routing::new(dims.tokens, dims.num_routed(), active, 6),
        }
    }

    /// Returns the problem with biases and another activation.
    fn varied(mut self) -> Problem {
        let Dims { hidden, intermediate, .. } = self.dims;
        self.dims.activation = Activation::GeluTanh;
        self.biases =
            Some([(intermediate, 7), (intermediate, 8), (hidden, 9)].map(|(n, seed)| normals(n, seed)));
        self
    }

    fn weights(&self) -> Weights<'_> {
        let biases = self.biases.as_ref().map(|[gate, up, down]| Biases { gate, up, down });
        Weights { gate: &self.gate, up: &self.up, down: &self.down, biases }
    }

    fn packed(&self, dims: Dims) -> PackedWeights {
        PackedWeights::new(Precision::F32, &self.weights(), dims)
    }

    fn results(&self) -> Results {
        let weights = vec![1.0; self.gate.len()];
        Results {
            y: vec![f32::NAN; self.x.len()],
            dx: vec![f32::NAN; self.x.len()],
            dcoef: vec![f32::NAN; self.dims.tokens * self.dims.num_routed()],
            dgate: weights.clone(),
            dup: weights.clone(),
            ddown: weights,
            dbiases: self.biases.as_ref().map(|biases| biases.each_ref().map(|b| vec![1.0; b.len()])),
        }
    }

    fn forward(&self, isa: Isa, scratch: &mut Scratch) -> Vec<f32> {
        self.infer(isa, Pairs::Routed(&self.routing.routes()), self.dims, scratch)
    }

    fn infer(&self, isa: Isa, pairs: Pairs<'_>, dims: Dims, scratch: &mut Scratch) -> Vec<f32> {
        let (mut y, weights) = (vec![f32::NAN; self.x.len()], &self.packed(dims));
        ForwardPacked { y: &mut y, x: &self.x, weights, pairs, dims, scratch }.run_on(isa);
        y
    }

    fn train(&self, isa: Isa, scratch: &mut Scratch) -> Results {
        self.train_pairs(isa, Pairs::Routed(&self.routing.routes()), self.dims, scratch)
    }

    fn train_pairs(&self, isa: Isa, pairs: Pairs<'_>, dims: Dims, scratch: &mut Scratch) -> Results {
        let (mut r, mut saved, weights) = (self.results(), Saved::default(), &self.weights());
        let (x, dy) = (&self.x, &self.dy);
        ForwardTrain { y: &mut r.y, saved: &mut saved, x, weights, pairs, dims, scratch }.run_on(isa);
        let biases = r.dbiases.as_mut().map(|[gate, up, down]| BiasGrads { gate, up, down });
        let grads = WeightGrads { gate: &mut r.dgate, up: &mut r.dup, down: &mut r.ddown, biases };
        let routed = matches!(pairs, Pairs::Routed(_));
        let (dx, dcoefficients, saved) = (&mut r.dx, routed.then_some(&mut r.dcoef[..]), &saved);
        Backward { dx, dcoefficients, grads, dy, saved, x, weights, pairs, dims, scratch }.run_on(isa);
        r
    }

    /// Returns the gradients of the coefficients of the routing's pairs, from values that say which are set.
    fn dots(&self, isa: Isa, scratch: &mut Scratch) -> Vec<f32> {
        let mut dcoefficients = vec![LEFT; self.dims.tokens * self.dims.num_routed()];
        let (x, dy, dims, weights, pairs) =
            (&self.x, &self.dy, self.dims, &self.weights(), &self.routing.routes());
        PairDots { dcoefficients: &mut dcoefficients, dy, x, weights, pairs, dims, scratch }.run_on(isa);
        dcoefficients
    }

    fn dense(&self, scratch: &mut Scratch) -> (Vec<f32>, Results) {
        let (isa, dims) = (Isa::current(), self.dims);
        let dims = Dims::dense(dims.tokens, dims.hidden, dims.intermediate, dims.activation);
        let y = self.infer(isa, Pairs::Dense, dims, scratch);
        (y, self.train_pairs(isa, Pairs::Dense, dims, scratch))
    }

    fn expected(&self) -> (Vec<f64>, reference::Grads) {
        let [x, gate, up, down, dy, coef] =
            [&self.x, &self.gate, &self.up, &self.down, &self.dy, &self.routing.coef].map(|x| f64s(x));
        let (gate, up, down, mask, coef) = (&gate, &up, &down, &self.routing.mask, &coef);
        let biases = self.wide_biases();
        let biases = biases.as_ref().map(|biases| biases.each_ref().map(|b| &b[..]));
        let layer = reference::Layer { x: &x, gate, up, down, biases, mask, coef, dims: self.dims };
        (reference::forward(layer), reference::backward(&dy, layer))
    }

    fn wide_biases(&self) -> Option<[Vec<f64>; 3]> {
        self.biases.as_ref().map(|biases| biases.each_ref().map(|b| f64s(b)))
    }

    fn check_train(&self, name: &str, got: &Results) {
        let (y, want) = self.expected();
        let plus_one = |x: &[f64]| x.iter().map(|x| x + 1.0).collect::<Vec<_>>();
        assert_close(&format!("{name} y"), &got.y, &y, TOLERANCE);
        assert_close(&format!("{name} dx"), &got.dx, &want.dx, TOLERANCE);
        assert_close(&format!("{name} dcoef"), &got.dcoef, &want.dcoef, TOLERANCE);
        assert_close(&format!("{name} dgate"), &got.dgate, &plus_one(&want.dgate), TOLERANCE);
        assert_close(&format!("{name} dup"), &got.dup, &plus_one(&want.dup), TOLERANCE);
        assert_close(&format!("{name} ddown"), &got.ddown, &plus_one(&want.ddown), TOLERANCE);
        for (got, want) in got.dbiases.iter().flatten().zip(&want.dbiases) {
            assert_close(&format!("{name} dbias"), got, &plus_one(want), TOLERANCE);
        }
    }
}

/// Error as a share of the largest value, at inner dimensions up to a few hundred.
const TOLERANCE: f64 = 3e-6;
/// A value that no op gives.
const LEFT: f32 = -1234.5;

fn dims(tokens: usize, hidden: usize, width: usize, num_experts: usize) -> Dims {
    let dense = Dims::dense(tokens, hidden, width * num_experts, Activation::Silu);
    Dims { num_experts, ..dense }
}

/// Activates about three in eight pairs, in a pattern that fits no block.
fn scattered(t: usize, i: usize) -> bool {
    (t * 5 + i * 3 + t * i) % 8 < 3
}

#[test]
fn the_reference_gradient_is_the_derivative_with_the_mask_frozen() {
    for all_pairs in [true, false] {
        for core in 0..=3 {
            let dims = sized(dims(3, 4, 2, 3), dims(2, 2, 1, 3));
            let new = || Problem::new(Dims { all_pairs, core, ..dims }, scattered);
            check_reference_gradient(new());
            check_reference_gradient(new().varied());
        }
    }
}

fn check_reference_gradient(problem: Problem) {
    let dims = problem.dims;
    let all_pairs = dims.all_pairs;
    let [x, gate, up, down, dy, coef] =
        [&problem.x, &problem.gate, &problem.up, &problem.down, &problem.dy, &problem.routing.coef]
            .map(|x| f64s(x));
    let mask = &problem.routing.mask;
    let wide = problem.wide_biases();
    let biases = wide.as_ref().map(|biases| biases.each_ref().map(|b| &b[..]));
    let (gate, up, down, coef) = (&gate, &up, &down, &coef);
    let layer = reference::Layer { x: &x, gate, up, down, biases, mask, coef, dims };
    let loss = |layer: reference::Layer<'_>| -> f64 {
        reference::forward(layer).iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let got = reference::backward(&dy, layer);
    let check = |name: &str, got: &[f64], at: &[f64], f: &dyn Fn(&[f64]) -> f64| {
        assert_close_f64(name, got, &finite_differences(at, 1e-5, f), 1e-8);
    };
    check("dx", &got.dx, &x, &|x| loss(reference::Layer { x, ..layer }));
    check("dgate", &got.dgate, gate, &|gate| loss(reference::Layer { gate, ..layer }));
    check("dup", &got.dup, up, &|up| loss(reference::Layer { up, ..layer }));
    check("ddown", &got.ddown, down, &|down| loss(reference::Layer { down, ..layer }));
    for i in 0..wide.as_ref().map_or(0, |biases| biases.len()) {
        let all = biases.expect("biases");
        let at = |b: &[f64]| {
            let mut all = all;
            all[i] = b;
            loss(reference::Layer { biases: Some(all), ..layer })
        };
        check("dbias", &got.dbiases[i], all[i], &at);
    }
    // The straight-through rule reads an inactive pair's derivative as if the pair were active.
    let open = vec![true; mask.len()];
    let mut want =
        finite_differences(coef, 1e-5, |coef| loss(reference::Layer { mask: &open, coef, ..layer }));
    if !all_pairs {
        want.iter_mut().zip(mask).filter(|(_, active)| !**active).for_each(|(want, _)| *want = 0.0);
    }
    assert_close_f64("dcoef", &got.dcoef, &want, 1e-8);
}

#[test]
fn the_hand_example_comes_out() {
    // d = D = 2, n = 2, gate = I, up = [[1,2],[0,1]] transposed to rows, down = I, x = [1,-1].
    let dims = dims(1, 2, 1, 2);
    let (identity, up) = ([1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 2.0, 1.0]);
    let (x, gate, up, down) = (&[1.0, -1.0], &identity, &up, &identity);
    let dense =
        reference::Layer { x, gate, up, down, biases: None, mask: &[true, true], coef: &[1.0, 1.0], dims };
    assert_close_f64("dense", &reference::forward(dense), &[0.731_058_578_63, -0.268_941_421_37], 1e-10);
    let coef = &[0.731_058_578_63, 0.268_941_421_37];
    let gated = reference::Layer { mask: &[true, false], coef, ..dense };
    assert_close_f64("gated", &reference::forward(gated), &[0.534_446_645_39, 0.0], 1e-10);
}

type Active = fn(usize, usize) -> bool;

fn problems() -> Vec<Problem> {
    if cfg!(miri) {
        // Miri takes a second or two for every pair.
        let with_a_core = Dims { core: 1, ..dims(2, 5, 2, 3) };
        return vec![
            Problem::new(dims(0, 5, 3, 2), scattered),
            Problem::new(dims(1, 1, 1, 1), |_, _| true),
            Problem::new(with_a_core, scattered).varied(),
        ];
    }
    let shapes = [
        dims(1, 1, 1, 1),
        dims(9, 33, 17, 1),
        dims(19, 50, 11, 7),
        dims(40, 70, 130, 3),
        dims(0, 5, 3, 2),
        dims(33, 600, 40, 4),
        dims(3, 1500, 130, 2),
        dims(110, 90, 70, 2),
    ];
    let small = (1..=9).map(|tokens| dims(tokens, 37, 75, 4));
    let patterns: [Active; 6] = [
        scattered,
        |_, _| true,
        |_, _| false,
        // One expert has no token, and token 1 has no expert.
        |t, i| i != 1 && t != 1 && scattered(t, i),
        // Every token at the last expert.
        |_, i| i == 0,
        |t, _| t % 3 == 2,
    ];
    let shapes = shapes.into_iter().chain(small);
    let plain = shapes.clone().flat_map(|d| patterns.map(|active| Problem::new(d, active)));
    let varied = shapes.map(|d| Problem::new(d, patterns[3]).varied());
    // An emulator runs every n-th of them.
    let step = std::env::var("DSMOE_TEST_STEP").map_or(1, |step| step.parse().expect("a number of problems"));
    plain.chain(varied).chain(problems_with_a_core()).step_by(step).collect()
}

/// The core has one expert, some, or all of them.
fn problems_with_a_core() -> impl Iterator<Item = Problem> {
    let cores = [
        (dims(1, 45, 16, 9), 4),
        (dims(4, 37, 75, 4), 1),
        (dims(19, 50, 11, 7), 3),
        (dims(40, 70, 33, 5), 5),
        (dims(0, 5, 3, 2), 1),
        (dims(90, 90, 16, 12), 5),
        (dims(2, 33, 17, 6), 2),
        (dims(3, 70, 3, 9), 4),
        (dims(1, 40, 32, 5), 5),
        (dims(4, 100, 1, 130), 30),
        // Sums over more tokens than one step of the gradients takes.
        (dims(600, 20, 16, 3), 1),
    ];
    let cores = cores.into_iter().map(|(dims, core)| Dims { core, ..dims });
    let patterns: [Active; 3] = [scattered, |_, _| true, |t, i| i != 1 && t % 5 != 1 && scattered(t, i)];
    cores.flat_map(move |d| {
        patterns
            .into_iter()
            .flat_map(move |active| [Problem::new(d, active), Problem::new(d, active).varied()])
    })
}

#[test]
fn kernels_agree_with_the_reference_on_every_tier() {
    for isa in Isa::available() {
        // One scratch for all shapes: leftovers of another problem must not show.
        let mut scratch = Scratch::new(Precision::F32);
        for mut problem in problems() {
            for all_pairs in [true, false] {
                problem.dims.all_pairs = all_pairs;
                let name = format!("{} {:?} {:?}", isa.name(), problem.dims, problem.routing.offsets);
                let (want, _) = problem.expected();
                assert_close(
                    &format!("{name} forward"),
                    &problem.forward(isa, &mut scratch),
                    &want,
                    TOLERANCE,
                );
                problem.check_train(&name, &problem.train(isa, &mut scratch));
            }
        }
    }
}

#[test]
fn dots_of_listed_pairs_are_those_of_the_reference_and_other_values_stay() {
    const FACTOR: f32 = 4.0;
    for isa in Isa::available() {
        for (precision, tolerance) in [(Precision::F32, TOLERANCE), (Precision::Bf16, BF16_TOLERANCE)] {
            let mut scratch = Scratch::new(precision);
            for mut problem in problems() {
                let name = format!("{} {precision:?} {:?}", isa.name(), problem.dims);
                let (_, want) = problem.expected();
                problem.routing.coefficients.fill(FACTOR);
                let dots = problem.dots(isa, &mut scratch);
                // Pairs that are not listed take part with what is wanted of them, so that the error is a share of the largest value
                // of all.
                let pairs = dots.iter().zip(&problem.routing.mask).zip(&want.dcoef);
                let of_pair = |((&dot, &listed), &want): ((&f32, &bool), &f64)| {
                    assert!(listed || dot == LEFT, "{name}: {dot} at a pair that is not listed");
                    if listed { dot / FACTOR } else { want as f32 }
                };
                let got: Vec<f32> = pairs.map(of_pair).collect();
                assert_close(&name, &got, &want.dcoef, tolerance);
            }
        }
    }
}

#[test]
fn the_dense_entry_is_one_expert_always_on() {
    for &(tokens, hidden, width) in sized::<&[_]>(
        &[(1, 40, 70), (3, 33, 200), (6, 40, 150), (50, 130, 300), (0, 3, 3)],
        &[(1, 3, 5), (2, 3, 7), (0, 3, 3)],
    ) {
        let mut problem = Problem::new(dims(tokens, hidden, width, 1), |_, _| true);
        problem.routing = Routing::of(vec![true; tokens], vec![1.0; tokens], tokens, 1);
        let mut scratch = Scratch::default();
        let (y, dense) = problem.dense(&mut scratch);
        let routed = problem.forward(Isa::current(), &mut scratch);
        // Experts add their neurons strip by strip, the dense FFN all of them in one sum: the differences are up to 1e-6 of y
        // and 1.7e-6 of dx, whose values reach 3. Gradients of weights are sums over tokens in the same order.
        let near = |name: &str, dense: &[f32], routed: &[f32]| {
            assert_close(&format!("{name} of {:?}", problem.dims), dense, &f64s(routed), 1e-6);
        };
        near("forward", &y, &routed);
        let routed = problem.train(Isa::current(), &mut scratch);
        near("y", &dense.y, &routed.y);
        near("dx", &dense.dx, &routed.dx);
        assert_eq!(dense.dgate, routed.dgate, "dgate of {:?}", problem.dims);
        assert_eq!(dense.dup, routed.dup, "dup of {:?}", problem.dims);
        assert_eq!(dense.ddown, routed.ddown, "ddown of {:?}", problem.dims);
    }
}

#[test]
fn a_core_is_experts_that_every_token_runs() {
    for &all_pairs in sized::<&[_]>(&[true, false], &[false]) {
        let (tokens, hidden, width, n, core) = sized((23, 40, 24, 6, 2), (2, 3, 1, 3, 1));
        let dims = Dims { all_pairs, ..dims(tokens, hidden, width, n) };
        let with_core = Problem::new(Dims { core, ..dims }, scattered).varied();
        let pair = |p: usize| (p % n >= core).then(|| p / n * (n - core) + p % n - core);
        let mask = (0..tokens * n).map(|p| pair(p).is_none_or(|p| with_core.routing.mask[p])).collect();
        let coef = (0..tokens * n).map(|p| pair(p).map_or(1.0, |p| with_core.routing.coef[p])).collect();
        let mut without = Problem::new(dims, scattered).varied();
        without.routing = Routing::of(mask, coef, tokens, n);
        let scratch = &mut Scratch::default();
        let (got, want) = (with_core.train(Isa::current(), scratch), without.train(Isa::current(), scratch));
        let (packed, of_experts) =
            (with_core.forward(Isa::current(), scratch), without.forward(Isa::current(), scratch));
        assert_close("packed y", &packed, &f64s(&of_experts), 1e-6);
        let dcoef: Vec<f32> = (0..tokens * n).filter(|&p| pair(p).is_some()).map(|p| want.dcoef[p]).collect();
        for (name, got, want) in [
            ("y", &got.y, &want.y),
            ("dx", &got.dx, &want.dx),
            ("dcoef", &got.dcoef, &dcoef),
            ("dgate", &got.dgate, &want.dgate),
            ("dup", &got.dup, &want.dup),
            ("ddown", &got.ddown, &want.ddown),
        ] {
            assert_close(name, got, &f64s(want), 1e-6);
        }
    }
}

#[test]
fn all_experts_with_coefficient_one_are_the_dense_ffn() {
    let (hidden, intermediate) = sized((48, 96), (5, 4));
    for &n in sized::<&[_]>(&[1, 2, 4, 8], &[1, 2]) {
        for &tokens in sized::<&[_]>(&[2, 21, 90], &[2]) {
            let mut problem = Problem::new(dims(tokens, hidden, intermediate / n, n), |_, _| true);
            problem.routing = Routing::of(vec![true; tokens * n], vec![1.0; tokens * n], tokens, n);
            let mut scratch = Scratch::default();
            let (dense, _) = problem.dense(&mut scratch);
            assert_close(
                &format!("{n} experts"),
                &problem.forward(Isa::current(), &mut scratch),
                &f64s(&dense),
                1e-5,
            );
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    // The problem for Miri has two panels of columns, and one panel of neurons in the core and in an expert.
    let (hidden, width, n, of_core) = sized((160, 96, 5, 2), (33, 2, 2, 1));
    for &tokens in sized::<&[_]>(&[1, 2, 20, 150], &[1]) {
        for &all_pairs in sized::<&[_]>(&[true, false], &[false]) {
            let core = if all_pairs { 0 } else { of_core };
            let problem = Problem::new(Dims { all_pairs, core, ..dims(tokens, hidden, width, n) }, scattered);
            let problem = if all_pairs { problem } else { problem.varied() };
            let run = |threads| {
                with_threads(threads, || {
                    let mut scratch = Scratch::default();
                    (
                        problem.forward(Isa::current(), &mut scratch),
                        problem.train(Isa::current(), &mut scratch),
                        problem.dots(Isa::current(), &mut scratch),
                    )
                })
            };
            let one = run(1);
            for &threads in sized::<&[_]>(&[2, 3], &[2]) {
                assert!(run(threads) == one, "{tokens} tokens on {threads} threads");
                let forward = || problem.forward(Isa::current(), &mut Scratch::default());
                let crew = with_threads(threads, || with_crew(forward));
                assert!(crew == one.0, "{tokens} tokens in a crew of {threads}");
            }
        }
    }
}

/// An answer must not depend on the texts that are computed beside it.
#[test]
fn the_tokens_beside_a_token_do_not_change_a_bit() {
    const ALL: usize = sized(90, 5);
    // Deeper than one part of the products.
    const HIDDEN: usize = sized(700, 5);
    for isa in Isa::available() {
        for &(precision, width, n, core) in sized::<&[_]>(
            &[
                (Precision::F32, 96, 5, 2),
                (Precision::Bf16, 96, 5, 0),
                (Precision::F32, 300, 3, 1),
                (Precision::F32, 16, 60, 20),
                (Precision::Bf16, 16, 60, 20),
            ],
            &[(Precision::F32, 3, 3, 1), (Precision::Bf16, 3, 3, 1)],
        ) {
            // Inputs and routes of fewer tokens are the first of these.
            let of = |tokens| {
                let problem = Problem::new(Dims { core, ..dims(tokens, HIDDEN, width, n) }, scattered);
                let weights = &PackedWeights::new(precision, &problem.weights(), problem.dims);
                let (mut y, routes) = (vec![f32::NAN; problem.x.len()], problem.routing.routes());
                let (x, pairs, dims) = (&problem.x, Pairs::Routed(&routes), problem.dims);
                let scratch = &mut Scratch::new(precision);
                ForwardPacked { y: &mut y, x, weights, pairs, dims, scratch }.run_on(isa);
                y
            };
            let all = of(ALL);
            for tokens in [1, 2, 4, 5, 8, 9, 20, 32, 33, 64].into_iter().filter(|tokens| *tokens < ALL) {
                let same = of(tokens) == all[..tokens * HIDDEN];
                assert!(same, "{isa:?}, {precision:?}: {tokens} of {ALL} tokens, width {width}");
            }
        }
    }
}

/// Error of a result of order 1 with bf16 operands, at inner dimensions up to a few hundred: eight bits are kept.
const BF16_TOLERANCE: f64 = 0.02;

#[test]
fn bf16_is_f32_up_to_rounding_on_every_tier() {
    for isa in Isa::available() {
        let mut scratch = Scratch::new(Precision::Bf16);
        for problem in problems() {
            let name = format!("{} {:?}", isa.name(), problem.dims);
            let (want, grads) = problem.expected();
            let (weights, routes) = (problem.weights(), problem.routing.routes());
            let packed = PackedWeights::new(Precision::Bf16, &weights, problem.dims);
            let (mut y, x) = (vec![f32::NAN; problem.x.len()], &problem.x);
            let (weights, pairs, dims, scratch) =
                (&packed, Pairs::Routed(&routes), problem.dims, &mut scratch);
            ForwardPacked { y: &mut y, x, weights, pairs, dims, scratch: &mut *scratch }.run_on(isa);
            assert_close(&format!("{name} packed"), &y, &want, BF16_TOLERANCE);
            let got = problem.train(isa, scratch);
            assert_close(&format!("{name} y"), &got.y, &want, BF16_TOLERANCE);
            assert_close(&format!("{name} dx"), &got.dx, &grads.dx, BF16_TOLERANCE);
            assert_close(&format!("{name} dcoef"), &got.dcoef, &grads.dcoef, BF16_TOLERANCE);
            let minus_one = |x: &[f32]| x.iter().map(|x| x - 1.0).collect::<Vec<_>>();
            assert_close(&format!("{name} dgate"), &minus_one(&got.dgate), &grads.dgate, BF16_TOLERANCE);
            assert_close(&format!("{name} dup"), &minus_one(&got.dup), &grads.dup, BF16_TOLERANCE);
            assert_close(&format!("{name} ddown"), &minus_one(&got.ddown), &grads.ddown, BF16_TOLERANCE);
        }
    }
}

#[test]
fn the_order_of_the_experts_does_not_matter() {
    let (tokens, hidden, width, n) = sized((30, 40, 24, 4), (2, 5, 2, 4));
    let problem = Problem::new(dims(tokens, hidden, width, n), scattered);
    let order = [2, 0, 3, 1];
    let experts = |w: &[f32]| -> Vec<f32> {
        order.iter().flat_map(|i| w[i * width * hidden..(i + 1) * width * hidden].to_vec()).collect()
    };
    let pairs = |t: usize| order.iter().map(move |i| t * n + i);
    let mask = (0..tokens).flat_map(pairs).map(|pair| problem.routing.mask[pair]).collect();
    let coef = (0..tokens).flat_map(pairs).map(|pair| problem.routing.coef[pair]).collect();
    let permuted = Problem {
        dims: problem.dims,
        x: problem.x.clone(),
        gate: experts(&problem.gate),
        up: experts(&problem.up),
        down: experts(&problem.down),
        biases: None,
        dy: problem.dy.clone(),
        routing: Routing::of(mask, coef, tokens, n),
    };
    let mut scratch = Scratch::default();
    let (plain, moved) =
        (problem.train(Isa::current(), &mut scratch), permuted.train(Isa::current(), &mut scratch));
    assert_close("y", &moved.y, &f64s(&plain.y), 1e-6);
    assert_close("dx", &moved.dx, &f64s(&plain.dx), 1e-6);
    assert_close("dgate", &moved.dgate, &f64s(&experts(&plain.dgate)), 1e-6);
    assert_close("ddown", &moved.ddown, &f64s(&experts(&plain.ddown)), 1e-6);
}

/// Training changes the routing in every step. If buffers were sized by the open experts, their memory would grow during a run.
#[test]
fn no_routing_takes_more_memory_than_is_reserved() {
    // Widths that are and are not padded; the last has several blocks of tokens.
    let shapes = [
        dims(60, 40, 16, 5),
        dims(60, 40, 20, 5),
        Dims { core: 2, ..dims(60, 40, 20, 5) },
        dims(600, 20, 16, 3),
    ];
    let small = [dims(2, 3, 2, 3)];
    let shapes: &[Dims] = sized(&shapes, &small);
    for (shape, all_pairs) in shapes.iter().flat_map(|&shape| [(shape, true), (shape, false)]) {
        for precision in [Precision::F32, Precision::Bf16] {
            let dims = Dims { all_pairs, ..shape };
            let patterns: [Active; 3] = [|_, i| i == 0, scattered, |_, _| true];
            let problems = patterns.map(|active| Problem::new(dims, active));
            let mut scratch = Scratch::new(precision);
            scratch.reserve(dims);
            scratch.reserve_forward(&problems[0].packed(dims), dims.tokens);
            let room = |scratch: &Scratch| {
                let Scratch { g, da, db, scaled, dpairs, stored, words, .. } = scratch;
                [g, da, db, scaled, dpairs, &stored.neurons, &words.c].map(|buf| buf.room())
            };
            let reserved = room(&scratch);
            for problem in &problems {
                problem.train(Isa::current(), &mut scratch);
                problem.forward(Isa::current(), &mut scratch);
                assert_eq!(room(&scratch), reserved, "{precision:?} {dims:?} {:?}", problem.routing.offsets);
            }
        }
    }
}

#[test]
#[should_panic(expected = "expert_ffn::ForwardPacked: offsets")]
fn routes_of_another_shape_are_refused() {
    let problem = Problem::new(dims(3, 4, 2, 2), scattered);
    let other = Routing::new(3, 3, scattered, 1);
    let (dims, packed, scratch) = (problem.dims, problem.packed(problem.dims), &mut Scratch::default());
    let (x, pairs) = (&problem.x, Pairs::Routed(&other.routes()));
    ForwardPacked { y: &mut [0.0; 12], x, weights: &packed, pairs, dims, scratch }.run();
}
