//! Whole passes, in the model of a device and on a GPU, against the definition of the op.

use half::bf16;

use super::{DEFAULT, MOSTLY_TURNED, TURNED};
use crate::Activation;
use crate::cuda::Gpu;
use crate::cuda::kernel::Arg;
use crate::cuda::ops::choice::{Passes, Variants};
use crate::cuda::ops::products::{self, Variant};
use crate::cuda::ops::router::{self, Routed};
use crate::cuda::ops::slot_ffn::{
    Backward, BackwardTo, Forward, ForwardTo, Inputs, Layer, Layout, Planner, Step,
};
use crate::cuda::ops::slots::{self, Pairs, Places, Shape, Slots, Sort};
use crate::cuda::ops::tests::emulated::{Buffer, Emulator, Program, Step as Run, encode};
use crate::cuda::ops::tests::slots::sorted;
use crate::cuda::ops::tests::{gpu_or_skip, to_f32, to_f64, values};
use crate::cuda::ops::{Source, ffn, rms_norm};
use crate::expert_ffn::Dims;
use crate::expert_ffn::reference;
use crate::testing::skipped;

/// The inputs of a layer, and the expected results.
struct Case {
    shape: Shape,
    all_pairs: bool,
    x: Vec<bf16>,
    dy: Vec<bf16>,
    /// Gate, up and down.
    weights: [Vec<bf16>; 3],
    mask: Vec<u8>,
    coefficients: Vec<f32>,
    before: Vec<f32>,
    y: Vec<f64>,
    grads: reference::Grads,
}

impl Case {
    /// Makes a case of experts with so many rows, behind a core as wide as one of them.
    fn new(sizes: [usize; 3], rows: &[usize], all_pairs: bool) -> Case {
        let [tokens, hidden, width] = sizes;
        let n = rows.len();
        let shape = Shape { tokens, hidden, width, num_experts: n, core: width };
        let mask: Vec<u8> =
            (0..tokens * n).map(|at| u8::from((at / n * 7 + at % n * 3) % tokens < rows[at % n])).collect();
        let [x, dy] = [1, 2].map(|seed| values(tokens * hidden, seed));
        let weights = [3, 4, 5].map(|seed| values(shape.intermediate() * hidden, seed));
        let factors = to_f32(&values(tokens * n, 9));
        let coefficients: Vec<f32> =
            factors.iter().zip(&mask).map(|(x, &on)| (x.abs() + 0.1) * f32::from(on)).collect();
        let dims = Dims {
            tokens,
            hidden,
            intermediate: shape.intermediate(),
            num_experts: n + 1,
            core: 1,
            all_pairs,
            activation: Activation::Silu,
        };
        let [of_x, of_dy] = [&x, &dy].map(|values| to_f64(values));
        let [gate, up, down] = weights.each_ref().map(|values| to_f64(values));
        let on: Vec<bool> = mask.iter().map(|&on| on != 0).collect();
        let coef: Vec<f64> = coefficients.iter().map(|&x| f64::from(x)).collect();
        let layer = reference::Layer {
            x: &of_x,
            gate: &gate,
            up: &up,
            down: &down,
            biases: None,
            mask: &on,
            coef: &coef,
            dims,
        };
        let (y, grads) = (reference::forward(layer), reference::backward(&of_dy, layer));
        let before = to_f32(&values(weights[0].len(), 10));
        Case { shape, all_pairs, x, dy, weights, mask, coefficients, before, y, grads }
    }

    fn passes(&self) -> Passes {
        Passes::Training { all_pairs: self.all_pairs }
    }

    fn active(&self) -> Vec<u32> {
        let rows = self.mask.chunks(self.shape.num_experts);
        rows.map(|row| row.iter().map(|&on| u32::from(on)).sum()).collect()
    }

    /// Returns `rows weight^T` for all neurons, rounded: a dense product.
    fn dense(&self, rows: &[bf16], weight: &[bf16]) -> Vec<bf16> {
        let hidden = self.shape.hidden;
        let (rows, weight) = (to_f64(rows), to_f64(weight));
        let products = rows.chunks(hidden).flat_map(|row| {
            weight.chunks(hidden).map(move |neuron| neuron.iter().zip(row).map(|(w, x)| w * x).sum::<f64>())
        });
        products.map(bf16::from_f64).collect()
    }

    /// Checks results of both passes; `set` are gradients that were set instead of added to.
    fn check(&self, results: &Results, set: bool, what: &str) {
        let Results { y, dx, dcoefficients, grads } = results;
        let Shape { hidden, num_experts: n, .. } = self.shape;
        check_rows(&format!("{what}: y"), y, &self.y, hidden);
        check_rows(&format!("{what}: dx"), dx, &self.grads.dx, hidden);
        check_rows(
            &format!("{what}: dcoefficients"),
            dcoefficients,
            &self.grads.dcoef,
            self.shape.tokens * n,
        );
        let inactive = (0..self.mask.len()).filter(|&pair| self.mask[pair] == 0);
        assert!(
            inactive.clone().all(|pair| self.all_pairs || dcoefficients[pair] == 0.0),
            "{what}: inactive pairs"
        );
        let wanted = [&self.grads.dgate, &self.grads.dup, &self.grads.ddown];
        for ((name, got), want) in ["dgate", "dup", "ddown"].iter().zip(grads).zip(wanted) {
            let added: Vec<f32> = match set {
                true => got.clone(),
                false => got.iter().zip(&self.before).map(|(after, before)| after - before).collect(),
            };
            check_rows(&format!("{what}: {name}"), &added, want, hidden * self.shape.width);
        }
    }
}

/// Checks rows of results whose operands were rounded to bf16 on the way: the distance of each row is within a hundredth of the
/// mean length of rows, and a row of zeros is one.
fn check_rows(what: &str, got: &[f32], want: &[f64], cols: usize) {
    assert_eq!(got.len(), want.len(), "{what}");
    let length = |row: &mut dyn Iterator<Item = f64>| row.map(|x| x * x).sum::<f64>().sqrt();
    let rows = want.len() / cols;
    let mean = length(&mut want.iter().copied()) / (rows as f64).sqrt();
    for (row, (got, want)) in got.chunks(cols).zip(want.chunks(cols)).enumerate() {
        let off = length(&mut got.iter().zip(want).map(|(got, want)| f64::from(*got) - want));
        assert!(off <= 0.01 * mean, "{what}: row {row} is off by {off} of {mean}");
        if want.iter().all(|x| *x == 0.0) {
            assert!(got.iter().all(|x| *x == 0.0), "{what}: row {row} is not zero");
        }
    }
}

/// The results of both passes.
#[derive(Clone, Debug, PartialEq)]
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    dcoefficients: Vec<f32>,
    grads: [Vec<f32>; 3],
}

/// The sources of the passes, compiled for the model of a device.
struct Programs {
    router: Program,
    ffn: Program,
    products: Program,
    turned: Program,
}

impl Programs {
    fn new(test: &str) -> Option<Programs> {
        let of_products = |variant: &Variant, entries: &str| {
            Program::new(test, variant.source(), entries, &variant.defines(Activation::Silu))
        };
        let of_ffn = "activate_slots backward_slots backward_inactive clear_inactive sum_slots";
        Some(Programs {
            router: Program::new(test, &router::SOURCE, "tally arrange place", &router::defines(false))?,
            ffn: Program::new(test, &ffn::SOURCE, of_ffn, &[ffn::define(Activation::Silu)])?,
            products: of_products(&Variant::DEFAULT, "up project down input weights")?,
            turned: of_products(&TURNED, "up project down input")?,
        })
    }

    fn of(&self, source: &'static Source) -> &Program {
        [
            (&raw const router::SOURCE, &self.router),
            (&raw const ffn::SOURCE, &self.ffn),
            (std::ptr::from_ref(Variant::DEFAULT.source()), &self.products),
            (std::ptr::from_ref(TURNED.source()), &self.turned),
        ]
        .into_iter()
        .find_map(|(of, program)| std::ptr::eq(of, source).then_some(program))
        .unwrap()
    }

    fn run(&self, emulator: &mut Emulator, seed: u64, steps: &[Step]) {
        for step in steps {
            let (source, run) = match step {
                Step::Call(call) => (call.source, Run::Call(call)),
                Step::Product(launch) => (launch.source, Run::Launch(launch)),
            };
            emulator.run(self.of(source), seed, &[run]);
        }
    }
}

/// Runs both passes in the model of a device.
fn emulate(programs: &Programs, case: &Case, variants: &Variants, set: bool, seed: u64) -> Results {
    let Case { shape, all_pairs, x, dy, weights, mask, coefficients, before, .. } = case;
    let Shape { tokens, hidden, num_experts: n, .. } = *shape;
    let (passes, groups) = (case.passes(), shape.groups());
    let mut emulator = Emulator::new();
    let [x_at, dy_at] = [x, dy].map(|values| emulator.upload(values).1);
    let both = emulator.upload(&[&weights[0][..], &weights[1]].concat()).1;
    let down = emulator.upload(&weights[2]).1;
    let pairs = Pairs {
        gates: 0,
        coefficients: emulator.upload(coefficients).1,
        mask: emulator.upload(mask).1,
        active: emulator.upload(&case.active()).1,
    };
    let mut list = |len: usize| emulator.upload(&vec![u32::MAX; len]).1;
    let places = Places {
        tokens: list(shape.slots()),
        coefficients: list(shape.slots()),
        of_tokens: list(tokens * groups),
        starts: list(groups + 1),
        sizes: list(groups),
        tiles: list(2 * shape.tiles()),
        pairs: list(1),
        wide_tiles: list(2 * shape.tiles()),
        wide_pairs: list(1),
        counts: list(n * tokens.div_ceil(slots::TOKENS)),
        order: list(2 * groups),
        partials: 0,
    };
    let nothing = |len: usize| vec![f32::NAN; len];
    let [y, dx] = [(); 2].map(|()| emulator.upload(&nothing(tokens * hidden)));
    let dcoefficients = emulator.upload(&nothing(tokens * n));
    let grads = [(); 3].map(|()| match set {
        true => emulator.upload(&nothing(before.len())),
        false => emulator.upload(before),
    });
    let workspace = emulator.upload(&vec![bf16::NAN; passes.workspace(shape)]);
    let kept: [Buffer; 2] = match all_pairs {
        true => [0, 1].map(|which| emulator.upload(&case.dense(x, &weights[which]))),
        false => [(); 2].map(|()| emulator.upload(&vec![bf16::NAN; passes.kept(shape)])),
    };
    let up = both + 2 * weights[0].len() as u64;
    let inputs = Inputs { x: x_at, gate: both, up, down, mask: pairs.mask, active: pairs.active };
    let planner = Planner {
        shape,
        slots: &places,
        inputs,
        variants,
        activation: Activation::Silu,
        all_pairs: *all_pairs,
        multiprocessors: 3,
    };
    let none = slots::Counted::default();
    let sort = [
        slots::tally(shape, &places, pairs.mask),
        slots::arrange(shape, &places, &none),
        slots::place(shape, &places, &pairs),
    ];
    programs.run(&mut emulator, seed, &sort.map(Step::Call));
    let kept_at = kept.map(|buffer| buffer.1);
    let to = ForwardTo { y: Some(y.1), kept: Some(kept_at), workspace: workspace.1 };
    programs.run(&mut emulator, seed, &planner.forward(&to, &encode).unwrap());
    // Another layer's passes work in the same memory in between.
    emulator.poison(workspace);
    if *all_pairs {
        let at = 2 * Layout::of(passes, shape).g.start;
        emulator.write(workspace, at, &case.dense(dy, &weights[2]));
    }
    let to = BackwardTo {
        dx: dx.1,
        grads: grads.map(|grad| grad.1),
        dcoefficients: dcoefficients.1,
        workspace: workspace.1,
        dy: dy_at,
        kept: kept_at,
        set,
    };
    programs.run(&mut emulator, seed, &planner.backward(&to, &encode).unwrap());
    Results {
        y: emulator.download(y),
        dx: emulator.download(dx),
        dcoefficients: emulator.download(dcoefficients),
        grads: grads.map(|grad| emulator.download(grad)),
    }
}

#[test]
fn cuda_sums_in_the_next_norm_run_on_the_processor() {
    let test = "cuda_sums_in_the_next_norm_run_on_the_processor";
    let Some(sums) = Program::new(test, &ffn::SOURCE, "sum_slots", &[ffn::define(Activation::Silu)]) else {
        return;
    };
    for (hidden, offset, scale) in [(72, 0.0f32, 1.0f32), (264, 1.0, 0.25)] {
        let variant = rms_norm::Variant { offset: offset != 0.0, scaled: scale != 1.0 };
        let entries = "forward_sum forward_parts";
        let Some(norms) = Program::new(test, &rms_norm::SOURCE, entries, &rms_norm::defines(hidden, variant))
        else {
            return;
        };
        let case = Case::new([70, hidden, 8], &[0, 65, 17], false);
        let Shape { tokens, num_experts: n, .. } = case.shape;
        let sorted = sorted(&case.shape, &case.mask);
        let mut of_tokens = vec![u32::MAX; tokens * case.shape.groups()];
        for (row, slots) in of_tokens.chunks_mut(case.shape.groups()).zip(&sorted.of_tokens) {
            row[..slots.len()].copy_from_slice(slots);
        }
        let mut emulator = Emulator::new();
        let parts = emulator.upload(&values(case.shape.slots() * hidden, 11)).1;
        let x = emulator.upload(&to_f32(&values(tokens * hidden, 12))).1;
        let weight = emulator.upload(&to_f32(&values(hidden, 13))).1;
        let (of_tokens, active) = (emulator.upload(&of_tokens).1, emulator.upload(&case.active()).1);
        let mut rows = |cols: usize| [(); 2].map(|()| emulator.upload(&vec![f32::NAN; tokens * cols]));
        let ([y, _], rstd, out) = (rows(hidden), rows(1), rows(hidden));
        let h = [(); 2].map(|()| emulator.upload(&vec![bf16::NAN; tokens * hidden]));
        let eps = 1e-5;
        let sum = ffn::sum_slots(&case.shape, y.1, parts, of_tokens, active);
        emulator.run(&sums, 1, &[Run::Call(&sum)]);
        let pointers = [h[0].1, rstd[0].1, out[0].1, x, y.1, weight].map(Arg::Ptr);
        let args = [&pointers[..], &[Arg::F32(eps)]].concat();
        let apart = rms_norm::call("forward_sum", [tokens, hidden], &args, [offset, scale]);
        let at = rms_norm::PartsAt {
            h: h[1].1,
            rstd: rstd[1].1,
            out: out[1].1,
            x,
            parts,
            of_tokens,
            active,
            weight,
        };
        let at_once = rms_norm::forward_parts(&case.shape, &at, [offset, scale, eps]);
        emulator.run(&norms, 2, &[Run::Call(&apart), Run::Call(&at_once)]);
        for (name, [one, other]) in [("rstd", rstd), ("out", out)] {
            let [one, other] = [one, other].map(|buffer| bits(&emulator.download(buffer)));
            assert_eq!(one, other, "{name}, {hidden} columns of {n} experts");
        }
        let [one, other] = h.map(|buffer| to_f32(&emulator.download::<bf16>(buffer)));
        assert!(one.iter().all(|x| x.is_finite()) && bits(&one) == bits(&other), "h, {hidden} columns");
    }
}

#[test]
fn cuda_passes_over_slots_run_on_the_processor() {
    let Some(programs) = Programs::new("cuda_passes_over_slots_run_on_the_processor") else { return };
    let sizes = [140, 72, 72];
    let rows = [0, 131, 65];
    let case = Case::new(sizes, &rows, false);
    let added = emulate(&programs, &case, &DEFAULT, false, 1);
    case.check(&added, false, "tiles of rows");
    // The same bits in another variant and in another order of threads; gradients are set this time.
    let set = emulate(&programs, &case, &MOSTLY_TURNED, true, 2);
    case.check(&set, true, "turned tiles");
    let of_inputs =
        |results: &Results| [&results.y, &results.dx, &results.dcoefficients].map(|values| bits(values));
    assert_eq!(of_inputs(&added), of_inputs(&set), "turned tiles: other bits");
    // A gradient is added to what was there as one sum.
    for (added, set) in added.grads.iter().zip(&set.grads) {
        let sums: Vec<f32> = set.iter().zip(&case.before).map(|(set, before)| set + before).collect();
        assert_eq!(bits(added), bits(&sums), "gradients that are added");
    }
    let case = Case::new(sizes, &rows, true);
    case.check(&emulate(&programs, &case, &MOSTLY_TURNED, false, 3), false, "all pairs");
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Runs both passes on a GPU.
fn on_device(gpu: &Gpu, case: &Case, variants: &Variants, set: bool) -> Results {
    let Case { shape, all_pairs, x, dy, weights, mask, coefficients, before, .. } = case;
    let Shape { tokens, hidden, num_experts: n, .. } = *shape;
    let passes = case.passes();
    let [x, dy] = &[x, dy].map(|values| gpu.upload_rows(values, hidden).unwrap());
    let both = gpu.upload(&[&weights[0][..], &weights[1]].concat()).unwrap();
    let len = weights[0].len();
    let (gate, up, down) = (&both.part(0..len), &both.part(len..2 * len), &gpu.upload(&weights[2]).unwrap());
    let mut routed = Routed::with_room(gpu, tokens, n).unwrap();
    routed.set(n, mask, coefficients).unwrap();
    // Room for more than the batch.
    let room = Shape { tokens: tokens + 200, ..*shape };
    let mut slots = Slots::with_room(gpu, room).unwrap();
    slots.resize(*shape);
    Sort { slots: &mut slots, routed: &routed }.run().unwrap();
    let (slots, routed) = (&slots, &routed);
    let layer = Layer {
        x,
        gate,
        up,
        down,
        activation: Activation::Silu,
        slots,
        routed,
        variants,
        all_pairs: *all_pairs,
    };
    let mut workspace = gpu.upload(&vec![bf16::NAN; passes.workspace(&room)]).unwrap();
    let mut kept = [(); 2].map(|()| gpu.upload(&vec![bf16::NAN; passes.kept(shape)]).unwrap());
    let nothing = |len: usize| gpu.upload(&vec![f32::NAN; len]).unwrap();
    let mut grads = [(); 3].map(|()| if set { nothing(len) } else { gpu.upload(before).unwrap() });
    let [mut y, mut dx] =
        [(); 2].map(|()| gpu.upload_rows(&vec![f32::NAN; tokens * hidden], hidden).unwrap());
    let mut dcoefficients = nothing(tokens * n);
    let to_keep = Some(kept.each_mut().map(|buffer| &mut **buffer));
    Forward { y: Some(&mut y), kept: to_keep, workspace: &mut workspace, layer }.run().unwrap();
    if !all_pairs {
        let mut alone = gpu.upload_rows(&vec![f32::NAN; tokens * hidden], hidden).unwrap();
        Forward { y: Some(&mut alone), kept: None, workspace: &mut workspace, layer }.run().unwrap();
        assert_eq!(bits(&alone.download().unwrap()), bits(&y.download().unwrap()), "y in inference");
    }
    workspace.upload_from(&vec![bf16::NAN; passes.workspace(&room)]).unwrap();
    Backward {
        dx: &mut dx,
        grads: grads.each_mut().map(|grad| &mut **grad),
        dcoefficients: &mut dcoefficients,
        workspace: &mut workspace,
        dy,
        kept: kept.each_ref().map(|buffer| &**buffer),
        set,
        layer,
    }
    .run()
    .unwrap();
    Results {
        y: y.download().unwrap(),
        dx: dx.download().unwrap(),
        dcoefficients: dcoefficients.download().unwrap(),
        grads: grads.map(|grad| grad.download().unwrap()),
    }
}

#[test]
fn cuda_passes_over_slots_are_the_reference() {
    let test = "cuda_passes_over_slots_are_the_reference";
    let Some(gpu) = gpu_or_skip(test) else { return };
    if !products::fits(&gpu, &Variant::DEFAULT) {
        skipped(test, "the GPU is no Hopper");
        return;
    }
    for (sizes, rows) in [([140, 72, 72], &[0, 131, 65][..]), ([600, 520, 136], &[600, 17, 300, 0, 129])] {
        for (all_pairs, set) in [(false, false), (true, true)] {
            let case = Case::new(sizes, rows, all_pairs);
            let first = on_device(&gpu, &case, &DEFAULT, set);
            case.check(&first, set, &format!("{sizes:?}, all pairs {all_pairs}"));
            for variants in [&DEFAULT, &MOSTLY_TURNED] {
                let again = on_device(&gpu, &case, variants, set);
                let all = |results: &Results| {
                    let Results { y, dx, dcoefficients, grads: [gate, up, down] } = results;
                    [y, dx, dcoefficients, gate, up, down].map(|values| bits(values))
                };
                assert_eq!(all(&first), all(&again), "{sizes:?}, all pairs {all_pairs}: other bits");
            }
        }
    }
}
