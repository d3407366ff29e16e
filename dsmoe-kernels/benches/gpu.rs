//! Measures the products of an FFN's active pairs on the first GPU, beside those of all pairs by cuBLASLt. It prints a line of
//! JSON for each. With `slots` it measures every variant of the kernels for pairs in slots, beside the same dense products and
//! the lists' kernels, and checks that all variants give the same bits; then whole passes of the FFN by each of the three.
//!
//! `cargo bench -p dsmoe-kernels --features cuda --bench gpu [-- slots]`, with `DSMOE_CUDA_LIB_DIR` as for `dsmoe`.
#![expect(clippy::print_stdout, reason = "a program that prints what it measured")]

use std::time::Instant;

use dsmoe_kernels::Activation;
use dsmoe_kernels::cuda::ops::choice::{Choice, Device, ExpertKernels, Passes, Variants, choose};
use dsmoe_kernels::cuda::ops::ffn::{Activate, Backward, Dims};
use dsmoe_kernels::cuda::ops::matmul::{Form, Product};
use dsmoe_kernels::cuda::ops::products::{self, Variant};
use dsmoe_kernels::cuda::ops::router::{Lists, Routed, Sort};
use dsmoe_kernels::cuda::ops::slots::{self, Shape, Slots};
use dsmoe_kernels::cuda::ops::{experts, linear, slot_ffn};
use dsmoe_kernels::cuda::{Float, Gpu, GpuBuf, Matrix, Result};
use dsmoe_kernels::rng::Rng;
use half::bf16;

/// The FFN of LLaMA 3.2 1B.
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 8192;
const EXPERTS: usize = 8;
const CALLS: u32 = 20;
const ROUNDS: usize = 5;

/// Returns the seconds of one call: the median over rounds.
fn seconds(gpu: &Gpu, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        gpu.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        gpu.synchronize()?;
        times.push(start.elapsed().as_secs_f64() / f64::from(CALLS));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

fn halves(gpu: &Gpu, rows: usize, cols: usize, seed: u64) -> Result<GpuBuf<bf16>> {
    let mut rng = Rng::new(seed, 0);
    gpu.upload_rows(&(0..rows * cols).map(|_| bf16::from_f32(rng.uniform() - 0.5)).collect::<Vec<_>>(), cols)
}

/// Queues `y = x w^T`.
fn forward<T: Float>(y: &mut Matrix<T>, x: &Matrix<bf16>, w: &Matrix<bf16>) -> Result<()> {
    Product { out: y, a: x, b: w, form: Form::Nt, add: false }.run()
}

/// Queues `y = x w`, or `y += x w`.
fn times(y: &mut Matrix<f32>, x: &Matrix<bf16>, w: &Matrix<bf16>, add: bool) -> Result<()> {
    linear::BackwardInput { dx: y, dy: x, w, add }.run()
}

fn main() -> Result<()> {
    let gpu = &Gpu::open(0)?;
    let in_slots = std::env::args().any(|arg| arg == "slots");
    for tokens in [1024, 8192] {
        for active in [3.0 / 8.0, 1.0] {
            run(gpu, tokens, active)?;
            if in_slots {
                run_slots(gpu, tokens, active)?;
                run_passes(gpu, tokens, active)?;
            }
        }
    }
    Ok(())
}

/// Makes a routing of the share; returns it with the number of active pairs.
fn routing(gpu: &Gpu, tokens: usize, share: f32) -> Result<(Routed, usize)> {
    let mut rng = Rng::new(1, 0);
    let mask: Vec<u8> = (0..tokens * EXPERTS).map(|_| u8::from(rng.uniform() < share)).collect();
    let coefficients: Vec<f32> = mask.iter().map(|&on| 0.5 * f32::from(on)).collect();
    let mut routed = Routed::with_room(gpu, tokens, EXPERTS)?;
    routed.set(EXPERTS, &mask, &coefficients)?;
    Ok((routed, mask.iter().filter(|&&on| on != 0).count()))
}

/// Measures all variants of the products of pairs in slots. Dense times are those that `run` prints for as many tokens.
fn run_slots(gpu: &Gpu, tokens: usize, share: f32) -> Result<()> {
    let width = INTERMEDIATE / EXPERTS;
    let shape = Shape { tokens, hidden: HIDDEN, width, num_experts: EXPERTS, core: 0 };
    let (routed, pairs) = routing(gpu, tokens, share)?;
    let mut slots = Slots::with_room(gpu, shape)?;
    let part = pairs as f64 / (tokens * EXPERTS) as f64;
    let flops = 2.0 * (pairs * width * HIDDEN) as f64;
    let show = |op: &str, name: &str, products: f64, time: f64, equal: bool| {
        println!(
            "{{\"work\":\"slots\",\"op\":\"{op}\",\"variant\":\"{name}\",\"tokens\":{tokens},\"hidden\":{HIDDEN},\
             \"intermediate\":{INTERMEDIATE},\"experts\":{EXPERTS},\"active\":{part:.4},\"gpu\":\"{}\",\
             \"us\":{:.1},\"tflops\":{:.0},\"same_bits\":{equal}}}",
            gpu.name(),
            1e6 * time,
            products * flops / time / 1e12,
        );
    };
    let sort = seconds(gpu, || slots::Sort { slots: &mut slots, routed: &routed }.run())?;
    show("sort", "all", 0.0, sort, true);
    let slots = &slots;
    let (rows, wide) = (shape.slots(), shape.wide());
    let [x, dy] = &[halves(gpu, tokens, HIDDEN, 2)?, halves(gpu, tokens, HIDDEN, 3)?];
    let weights = halves(gpu, 2 * INTERMEDIATE, HIDDEN, 4)?;
    let (gate, up) = (&weights.part(0..INTERMEDIATE), &weights.part(INTERMEDIATE..2 * INTERMEDIATE));
    let down = &halves(gpu, INTERMEDIATE, HIDDEN, 6)?;
    let empty = || gpu.zero_rows::<bf16>(rows, wide);
    let [mut a, mut b, mut c, mut g] = [empty()?, empty()?, empty()?, empty()?];
    let [parts, dparts] = &mut [gpu.zero_rows::<bf16>(rows, HIDDEN)?, gpu.zero_rows::<bf16>(rows, HIDDEN)?];
    let grad = || gpu.zero_rows::<f32>(INTERMEDIATE, HIDDEN);
    let [dgate, dup, ddown] = &mut [grad()?, grad()?, grad()?];
    let y = &mut *gpu.zero_rows::<f32>(tokens, HIDDEN)?;
    let activation = Activation::Silu;
    let mut first: Option<[Vec<u16>; 4]> = None;
    let mut grads: Option<Vec<u32>> = None;
    for (name, variant) in &Variant::ALL {
        if !products::fits(gpu, variant) {
            continue;
        }
        let with_up = variant.takes(products::Form::Up);
        let up_time = if with_up {
            let kept = seconds(gpu, || {
                let projections = Some([&mut *a, &mut *b]);
                products::Up { c: &mut c, projections, x, gate, up, slots, activation, variant }.run()
            })?;
            let alone = seconds(gpu, || {
                products::Up { c: &mut c, projections: None, x, gate, up, slots, activation, variant }.run()
            })?;
            Some((alone, kept))
        } else {
            None
        };
        let project = seconds(gpu, || products::Project { g: &mut g, dy, down, slots, variant }.run())?;
        let down_time = seconds(gpu, || products::Down { parts, c: &c, down, slots, variant }.run())?;
        let (da, db) = (&a, &b);
        let input = seconds(gpu, || {
            products::BackwardInput { parts: dparts, da, db, gate, up, slots, variant }.run()
        })?;
        let mut gradients = |set: bool| {
            seconds(gpu, || {
                let grads = [&mut **dgate, &mut **dup, &mut **ddown];
                products::BackwardWeights { grads, values: [da, db, &c], x, dy, set, slots, variant }.run()
            })
        };
        let (added, set) = (gradients(false)?, gradients(true)?);
        let bits = |values: &Matrix<bf16>| -> Result<Vec<u16>> {
            Ok(values.download()?.iter().map(|value| value.to_bits()).collect())
        };
        let results = [bits(&c)?, bits(&g)?, bits(parts)?, bits(dparts)?];
        let mut of_grads: Vec<u32> = Vec::new();
        for grad in [&*dgate, &*dup, &*ddown] {
            of_grads.extend(grad.download()?.iter().map(|value| value.to_bits()));
        }
        let equal = *first.get_or_insert_with(|| results.clone()) == results
            && *grads.get_or_insert_with(|| of_grads.clone()) == of_grads;
        if let Some((alone, kept)) = up_time {
            show("gate, up and activation", name, 2.0, alone, equal);
            show("gate, up and activation, kept", name, 2.0, kept, equal);
        }
        show("down without sums", name, 1.0, down_time, equal);
        show("gradient of the activation", name, 1.0, project, equal);
        show("gradient of the input without sums", name, 2.0, input, equal);
        show("gradients of the weights", name, 3.0, added, equal);
        show("gradients of the weights, set", name, 3.0, set, equal);
    }
    let sum = seconds(gpu, || products::Sum { y: &mut *y, parts, slots, routed: &routed }.run())?;
    show("sums of parts", "all", 0.0, sum, true);
    Ok(())
}

/// The operands of an FFN's passes that do not depend on its kernels.
struct Layer {
    x: GpuBuf<bf16>,
    dy: GpuBuf<bf16>,
    /// Gate and up.
    both: GpuBuf<bf16>,
    down: GpuBuf<bf16>,
    y: GpuBuf<f32>,
    grads: [GpuBuf<f32>; 3],
    dcoefficients: GpuBuf<f32>,
    routed: Routed,
    tokens: usize,
}

/// The seconds of a forward pass that keeps nothing, of one that keeps what the backward pass needs, of the backward pass, and of
/// one that sets the gradients of the weights, where there is such a pass.
struct Seconds([Option<f64>; 4]);

const PASSES: [&str; 4] = ["forward", "forward, kept", "backward", "backward, set"];

/// Measures whole passes of an FFN with the sorting of its pairs: over slots, over lists, and dense. The variants over slots are
/// those that the choice names.
fn run_passes(gpu: &Gpu, tokens: usize, share: f32) -> Result<()> {
    let width = INTERMEDIATE / EXPERTS;
    let shape = Shape { tokens, hidden: HIDDEN, width, num_experts: EXPERTS, core: 0 };
    let training = Passes::Training { all_pairs: false };
    let choice = choose(ExpertKernels::Slots, &Device::of(gpu), &shape, training, f64::from(share));
    let Choice::Slots(variants) = choice else { return Ok(()) };
    let (routed, pairs) = routing(gpu, tokens, share)?;
    let grad = || gpu.zero_rows::<f32>(INTERMEDIATE, HIDDEN);
    let mut layer = Layer {
        x: halves(gpu, tokens, HIDDEN, 2)?,
        dy: halves(gpu, tokens, HIDDEN, 3)?,
        both: halves(gpu, 2 * INTERMEDIATE, HIDDEN, 4)?,
        down: halves(gpu, INTERMEDIATE, HIDDEN, 6)?,
        y: gpu.zero_rows(tokens, HIDDEN)?,
        grads: [grad()?, grad()?, grad()?],
        dcoefficients: gpu.zero_rows(tokens, EXPERTS)?,
        routed,
        tokens,
    };
    let part = pairs as f64 / (tokens * EXPERTS) as f64;
    let Seconds(dense) = layer.dense(gpu)?;
    let all = [
        ("dense", Seconds(dense)),
        ("lists", layer.lists(gpu)?),
        ("slots", layer.slots(gpu, &shape, &variants)?),
    ];
    for (kernels, Seconds(times)) in all {
        for ((op, time), dense) in PASSES.iter().zip(times).zip(dense.iter().flatten()) {
            let Some(time) = time else { continue };
            println!(
                "{{\"work\":\"passes\",\"op\":\"{op}\",\"kernels\":\"{kernels}\",\"tokens\":{tokens},\"hidden\":{HIDDEN},\
                 \"intermediate\":{INTERMEDIATE},\"experts\":{EXPERTS},\"active\":{part:.4},\"gpu\":\"{}\",\
                 \"us\":{:.1},\"ratio_to_dense\":{:.3},\"ratio_to_share\":{:.3}}}",
                gpu.name(),
                1e6 * time,
                time / dense,
                time / dense / part,
            );
        }
    }
    Ok(())
}

impl Layer {
    /// Measures passes of all pairs. A dense model's gradients are always added to.
    fn dense(&mut self, gpu: &Gpu) -> Result<Seconds> {
        let Layer { x, dy, both, down, y, grads, tokens, .. } = self;
        let (gate, up) = (&both.part(0..INTERMEDIATE), &both.part(INTERMEDIATE..2 * INTERMEDIATE));
        let empty = || gpu.zero_rows::<bf16>(*tokens, INTERMEDIATE);
        let [a, b, c, da, db, g] = &mut [empty()?, empty()?, empty()?, empty()?, empty()?, empty()?];
        let [dgate, dup, ddown] = grads;
        let activation = Activation::Silu;
        let forward_time = seconds(gpu, || {
            forward(a, x, gate)?;
            forward(b, x, up)?;
            Activate { c: &mut *c, a, b, coefficients: None, activation }.run()?;
            times(y, c, down, false)
        })?;
        let backward = seconds(gpu, || {
            forward(g, dy, down)?;
            Backward {
                da: &mut *da,
                db: &mut *db,
                c: &mut *c,
                dcoefficients: None,
                g,
                a,
                b,
                coefficients: None,
                all_pairs: false,
                activation,
            }
            .run()?;
            linear::BackwardWeight { dw: &mut *dgate, dy: da, x }.run()?;
            linear::BackwardWeight { dw: &mut *dup, dy: db, x }.run()?;
            linear::BackwardWeight { dw: &mut *ddown, dy: c, x: dy }.run()?;
            times(y, da, gate, false)?;
            times(y, db, up, true)
        })?;
        // Both forward passes keep a and b, and both backward passes are compared with the same.
        Ok(Seconds([forward_time, forward_time, backward, backward].map(Some)))
    }

    /// Measures passes over lists.
    fn lists(&mut self, gpu: &Gpu) -> Result<Seconds> {
        let Layer { x, dy, both, down, y, grads, dcoefficients, routed, tokens } = self;
        let (gate, up) = (&both.part(0..INTERMEDIATE), &both.part(INTERMEDIATE..2 * INTERMEDIATE));
        let empty = || gpu.zero_rows::<bf16>(*tokens, INTERMEDIATE);
        let [a, b, c, da, db, g] = &mut [empty()?, empty()?, empty()?, empty()?, empty()?, empty()?];
        let [dgate, dup, ddown] = grads;
        let mut lists = Lists::with_room(gpu, *tokens, EXPERTS)?;
        let parts = &mut *gpu.zeros::<bf16>(*tokens * EXPERTS * HIDDEN)?;
        let (coefficients, activation) = (&routed.coefficients(), Activation::Silu);
        let mut forward_time = |kept: bool| {
            seconds(gpu, || {
                Sort { lists: &mut lists, routed }.run()?;
                let (c, lists) = (&mut *c, &lists);
                let projections = kept.then_some([&mut **a, &mut **b]);
                experts::Up { c, projections, x, gate, up, coefficients, lists, activation }.run()?;
                experts::Down { y: &mut *y, parts: &mut *parts, c, weight: down, lists }.run()
            })
        };
        let (alone, kept) = (forward_time(false)?, forward_time(true)?);
        let lists = &lists;
        let backward = seconds(gpu, || {
            experts::Project { out: &mut *g, x: dy, weight: down, lists }.run()?;
            Backward {
                da: &mut *da,
                db: &mut *db,
                c: &mut *c,
                dcoefficients: Some(&mut *dcoefficients),
                g,
                a,
                b,
                coefficients: Some(coefficients),
                all_pairs: false,
                activation,
            }
            .run()?;
            let (dgate, dup, ddown) = (&mut *dgate, &mut *dup, &mut *ddown);
            let (da, db, c) = (&**da, &**db, &**c);
            experts::BackwardWeights { dgate, dup, ddown, da, db, c, x, dy, lists }.run()?;
            experts::BackwardInput { dx: &mut *y, parts: &mut *parts, da, db, gate, up, lists }.run()
        })?;
        Ok(Seconds([Some(alone), Some(kept), Some(backward), None]))
    }

    /// Measures passes over slots.
    fn slots(&mut self, gpu: &Gpu, shape: &Shape, variants: &Variants) -> Result<Seconds> {
        let Layer { x, dy, both, down, y, grads, dcoefficients, routed, .. } = self;
        let (gate, up) = (&both.part(0..INTERMEDIATE), &both.part(INTERMEDIATE..2 * INTERMEDIATE));
        let passes = Passes::Training { all_pairs: false };
        let workspace = &mut *gpu.zeros::<bf16>(passes.workspace(shape))?;
        let [a, b] = &mut [gpu.zeros::<bf16>(passes.kept(shape))?, gpu.zeros::<bf16>(passes.kept(shape))?];
        let mut slots = Slots::with_room(gpu, *shape)?;
        let activation = Activation::Silu;
        let mut forward_time = |kept: bool| {
            seconds(gpu, || {
                slots::Sort { slots: &mut slots, routed }.run()?;
                let slots = &slots;
                let layer = slot_ffn::Layer {
                    x,
                    gate,
                    up,
                    down,
                    activation,
                    slots,
                    routed,
                    variants,
                    all_pairs: false,
                };
                let kept = kept.then_some([&mut **a, &mut **b]);
                slot_ffn::Forward { y: Some(&mut *y), kept, workspace: &mut *workspace, layer }.run()
            })
        };
        let (alone, kept) = (forward_time(false)?, forward_time(true)?);
        let slots = &slots;
        let layer =
            slot_ffn::Layer { x, gate, up, down, activation, slots, routed, variants, all_pairs: false };
        let mut backward = |set: bool| {
            seconds(gpu, || {
                slot_ffn::Backward {
                    dx: &mut *y,
                    grads: grads.each_mut().map(|grad| &mut **grad),
                    dcoefficients: &mut *dcoefficients,
                    workspace: &mut *workspace,
                    dy,
                    kept: [&**a, &**b],
                    set,
                    layer,
                }
                .run()
            })
        };
        let (added, set) = (backward(false)?, backward(true)?);
        Ok(Seconds([alone, kept, added, set].map(Some)))
    }
}

fn run(gpu: &Gpu, tokens: usize, share: f32) -> Result<()> {
    let dims = Dims { tokens, hidden: HIDDEN, intermediate: INTERMEDIATE, num_experts: EXPERTS };
    let (routed, pairs) = routing(gpu, tokens, share)?;
    let mut lists = Lists::with_room(gpu, tokens, EXPERTS)?;
    let [row, wide] = [HIDDEN, INTERMEDIATE].map(|cols| move |seed| halves(gpu, tokens, cols, seed));
    let weight = |seed| halves(gpu, INTERMEDIATE, HIDDEN, seed);
    let [x, dy] = &[row(2)?, row(3)?];
    let [gate, up, down] = &[weight(4)?, weight(5)?, weight(6)?];
    let [a, b, c] = &mut [wide(7)?, wide(8)?, wide(9)?];
    let y = &mut *gpu.zero_rows::<f32>(tokens, HIDDEN)?;
    let parts = &mut *gpu.zeros::<bf16>(dims.parts())?;
    let grad = || gpu.zero_rows::<f32>(INTERMEDIATE, HIDDEN);
    let [dgate, dup, ddown] = &mut [grad()?, grad()?, grad()?];

    // One product of all pairs.
    let flops = 2.0 * (tokens * INTERMEDIATE * HIDDEN) as f64;
    let part = pairs as f64 / (tokens * EXPERTS) as f64;
    let show = |op: &str, products: f64, dense: f64, sparse: f64| {
        println!(
            "{{\"work\":\"experts\",\"op\":\"{op}\",\"tokens\":{tokens},\"hidden\":{HIDDEN},\
             \"intermediate\":{INTERMEDIATE},\"experts\":{EXPERTS},\"active\":{part:.4},\"gpu\":\"{}\",\
             \"dense_us\":{:.1},\"us\":{:.1},\"ratio_to_dense\":{:.3},\"dense_tflops\":{:.0},\"tflops\":{:.0}}}",
            gpu.name(),
            1e6 * dense,
            1e6 * sparse,
            sparse / dense,
            products * flops / dense / 1e12,
            products * part * flops / sparse / 1e12,
        );
    };
    let sort = seconds(gpu, || Sort { lists: &mut lists, routed: &routed }.run())?;
    let lists = &lists;
    let dense = seconds(gpu, || {
        forward(a, x, gate)?;
        forward(b, x, up)?;
        Activate { c: &mut *c, a, b, coefficients: None, activation: Activation::Silu }.run()
    })?;
    let coefficients = &routed.coefficients();
    let sparse = seconds(gpu, || {
        experts::Up {
            c: &mut *c,
            projections: None,
            x,
            gate,
            up,
            coefficients,
            lists,
            activation: Activation::Silu,
        }
        .run()
    })?;
    show("gate, up and activation", 2.0, dense, sparse + sort);

    let down_dense = seconds(gpu, || times(y, c, down, false))?;
    let down_sparse =
        seconds(gpu, || experts::Down { y: &mut *y, parts: &mut *parts, c, weight: down, lists }.run())?;
    show("down", 1.0, down_dense, down_sparse);
    show("whole FFN forward", 3.0, dense + down_dense, sparse + sort + down_sparse);

    let dense = seconds(gpu, || forward(a, dy, down))?;
    let sparse = seconds(gpu, || experts::Project { out: &mut *a, x: dy, weight: down, lists }.run())?;
    show("gradient of the activation", 1.0, dense, sparse);

    let (da, db, c): (&GpuBuf<bf16>, &GpuBuf<bf16>, &GpuBuf<bf16>) = (a, b, c);
    let dense = seconds(gpu, || {
        times(y, da, gate, false)?;
        times(y, db, up, true)
    })?;
    let sparse = seconds(gpu, || {
        experts::BackwardInput { dx: &mut *y, parts: &mut *parts, da, db, gate, up, lists }.run()
    })?;
    show("gradient of the input", 2.0, dense, sparse);

    let dense = seconds(gpu, || {
        linear::BackwardWeight { dw: &mut *dgate, dy: da, x }.run()?;
        linear::BackwardWeight { dw: &mut *dup, dy: db, x }.run()?;
        linear::BackwardWeight { dw: &mut *ddown, dy: c, x: dy }.run()
    })?;
    let sparse = seconds(gpu, || {
        let (dgate, dup, ddown) = (&mut *dgate, &mut *dup, &mut *ddown);
        experts::BackwardWeights { dgate, dup, ddown, da, db, c, x, dy, lists }.run()
    })?;
    show("gradients of the weights", 3.0, dense, sparse);
    Ok(())
}
