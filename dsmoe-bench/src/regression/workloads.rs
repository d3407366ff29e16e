//! The fixed benchmarks of records, small enough for many repeats and for valgrind.

use anyhow::{Context, Result};
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::init::{InitOptions, init};
use dsmoe_core::{Device, Inference};
use dsmoe_kernels::Precision;
use dsmoe_kernels::expert_ffn::{PackedWeights, Scratch, Weights};
use dsmoe_kernels::rng::Rng;
use dsmoe_router::Routing;

use crate::cli::bench::{Choice, Routes, Suite};
use crate::cli::values::word;
use crate::timing::decode::{active_share, decode};
use crate::timing::ffn::{self, Shape};
use crate::timing::matmul::{self, Layout, Product};
use crate::timing::model::{Sizes, configs, random_model, reach_share};
use crate::timing::ops::{self, OPS, Op};
use crate::timing::routing::routing;
use crate::timing::train::Run;
use crate::timing::values::{random, random_ids};

/// One call of a benchmark. Returns the seconds of the part that counts, if not all of it does.
pub(crate) type Task = Box<dyn FnMut() -> Result<Option<f64>>>;

/// A benchmark of a record.
pub(crate) struct Workload {
    /// `suite/what/how`.
    pub(crate) name: String,
    /// Allocates the buffers, and returns the call.
    pub(crate) build: Box<dyn Fn() -> Result<Task> + Sync>,
}

/// A name, and the function that allocates the buffers and returns the call.
type Named = (&'static str, fn() -> Result<Task>);

impl Suite {
    /// Returns the benchmarks that are timed; none for the suite quality.
    pub(crate) fn workloads(self) -> Vec<Workload> {
        let others: &[Named] = match self {
            Suite::Kernels => &PRODUCTS,
            Suite::Ffn => &FFN,
            Suite::Train => &TRAIN,
            Suite::Decode => &DECODE,
            Suite::Convert => &CONVERT,
            Suite::Quality => &[],
        };
        let ops: &[Op] = if self == Suite::Kernels { &OPS } else { &[] };
        let op = |op: &Op| {
            let build = op.build;
            let name = format!("kernels/{}/{}", op.name, op.part);
            Workload { name, build: Box::new(move || task(build(SHAPE))) }
        };
        let other = |&(name, build): &Named| Workload { name: name.to_owned(), build: Box::new(build) };
        ops.iter().map(op).chain(others.iter().map(other)).collect()
    }
}

impl Choice {
    pub(crate) fn takes(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|part| name.contains(part))
    }

    /// Returns the words of a command line that makes this choice.
    pub(crate) fn words(&self) -> Vec<String> {
        let suites: Vec<String> = self.suite.iter().map(word).collect();
        let only = self.only.iter().flat_map(|only| ["--only".to_owned(), only.clone()]);
        ["--suite".to_owned(), suites.join(",")].into_iter().chain(only).collect()
    }
}

/// Returns the suites asked for, each once, in the order of their definition.
pub(crate) fn suites(choice: &Choice) -> Vec<Suite> {
    use clap::ValueEnum;
    Suite::value_variants().iter().copied().filter(|suite| choice.suite.contains(suite)).collect()
}

const PRODUCTS: [Named; 7] = [
    ("kernels/matmul_f32/forward", || product(Precision::F32, Layout::Forward)),
    ("kernels/matmul_f32/packed", || product(Precision::F32, Layout::Packed)),
    ("kernels/matmul_f32/backward_input", || product(Precision::F32, Layout::BackwardInput)),
    ("kernels/matmul_f32/backward_weight", || product(Precision::F32, Layout::BackwardWeight)),
    ("kernels/matmul_bf16/forward", || product(Precision::Bf16, Layout::Forward)),
    ("kernels/matmul_bf16/packed", || product(Precision::Bf16, Layout::Packed)),
    ("kernels/matmul_bf16/backward_weight", || product(Precision::Bf16, Layout::BackwardWeight)),
];

const FFN: [Named; 10] = [
    ("ffn/dense_f32/forward", || ffn_forward(Precision::F32, None)),
    ("ffn/dsmoe_f32/forward", || ffn_forward(Precision::F32, Some(COARSE))),
    ("ffn/width16_f32/forward", || ffn_forward(Precision::F32, Some(WIDTH_16))),
    ("ffn/dense_bf16/forward", || ffn_forward(Precision::Bf16, None)),
    ("ffn/dsmoe_bf16/forward", || ffn_forward(Precision::Bf16, Some(COARSE))),
    ("ffn/width16_bf16/forward", || ffn_forward(Precision::Bf16, Some(WIDTH_16))),
    ("ffn/width32_bf16/forward", || ffn_forward(Precision::Bf16, Some(WIDTH_32))),
    ("ffn/dense_f32/train", || ffn_train(None)),
    ("ffn/dsmoe_f32/train", || ffn_train(Some(COARSE))),
    ("ffn/width16_f32/train", || ffn_train(Some(WIDTH_16))),
];

const TRAIN: [Named; 3] = [
    ("train/dense_f32/step", || train(false, Precision::F32)),
    ("train/dsmoe_f32/step", || train(true, Precision::F32)),
    ("train/dsmoe_bf16/step", || train(true, Precision::Bf16)),
];

const DECODE: [Named; 3] = [
    ("decode/dense_bf16/tokens", || decoding(false, Precision::Bf16)),
    ("decode/dsmoe_bf16/tokens", || decoding(true, Precision::Bf16)),
    ("decode/dsmoe_f32/tokens", || decoding(true, Precision::F32)),
];

const CONVERT: [Named; 1] = [("convert/8_experts/directory", conversion)];

const TOKENS: usize = 256;
const HIDDEN: usize = 512;
const SEQ: usize = 128;
/// The sizes of ops.
const SHAPE: ops::Shape = ops::Shape { tokens: TOKENS, hidden: HIDDEN, vocab: 1024, seq: SEQ };
const INTERMEDIATE: usize = 1024;
const EXPERTS: usize = 8;
/// The active share, 3 of 8.
const ACTIVE: f64 = 0.375;
const FFN_TOKENS: usize = 64;
/// Cuts of the FFN: wide experts without a core, and narrow ones, half of whose active share is a core.
const COARSE: Shape = Shape { experts: EXPERTS, core: 0 };
const WIDTH_16: Shape = Shape { experts: INTERMEDIATE / 16, core: 12 };
const WIDTH_32: Shape = Shape { experts: INTERMEDIATE / 32, core: 6 };
/// Sizes of the models: hidden, intermediate, layers, heads, kv_heads, vocabulary.
const SIZES: Sizes = [128, 512, 2, 4, 2, 512];
const PROMPT: usize = 8;
const NEW_TOKENS: usize = 32;

fn task(mut call: impl FnMut() + 'static) -> Result<Task> {
    Ok(Box::new(move || {
        call();
        Ok(None)
    }))
}

fn product(precision: Precision, layout: Layout) -> Result<Task> {
    let shape = [TOKENS, HIDDEN, INTERMEDIATE];
    let mut product = Product::new(layout, shape, precision, &matmul::inputs(shape));
    task(move || product.run())
}

fn ffn_weights() -> [Vec<f32>; 3] {
    [1, 2, 3].map(|seed| random(HIDDEN * INTERMEDIATE, 1.0 / (HIDDEN as f32).sqrt(), seed))
}

/// Makes a routing of the experts outside the core at the active share.
fn ffn_routing(shape: Shape) -> Routing {
    let open = (ACTIVE * shape.experts as f64 - shape.core as f64) / shape.routed() as f64;
    routing(Routes::Random, FFN_TOKENS, shape.routed(), open)
}

/// Runs forward on packed weights, dense or in experts.
fn ffn_forward(precision: Precision, shape: Option<Shape>) -> Result<Task> {
    let [gate, up, down] = ffn_weights();
    let weights = Weights { gate: &gate, up: &up, down: &down, biases: None };
    let layer = ffn::Layer { hidden: HIDDEN, intermediate: INTERMEDIATE, precision };
    let packed = PackedWeights::new(precision, &weights, layer.dims(0, shape.unwrap_or(Shape::DENSE)));
    let x = random(FFN_TOKENS * HIDDEN, 1.0, 4);
    let (mut y, mut scratch) = (vec![0.0; x.len()], Scratch::default());
    let routing = shape.map(ffn_routing);
    task(move || ffn::forward(&mut y, &x, &packed, routing.as_ref(), &mut scratch))
}

/// Runs forward and backward in f32.
fn ffn_train(shape: Option<Shape>) -> Result<Task> {
    let [gate, up, down] = ffn_weights();
    let [x, dy] = [4, 5].map(|seed| random(FFN_TOKENS * HIDDEN, 1.0, seed));
    let layer = ffn::Layer { hidden: HIDDEN, intermediate: INTERMEDIATE, precision: Precision::F32 };
    let mut pass = ffn::TrainPass::new(layer, FFN_TOKENS);
    let routing = shape.map(|shape| (ffn_routing(shape), shape.core));
    task(move || {
        let weights = Weights { gate: &gate, up: &up, down: &down, biases: None };
        pass.run(&x, &dy, &weights, routing.as_ref().map(|(routing, core)| (routing, *core)))
    })
}

fn ids(count: usize, stream: u64) -> Vec<u32> {
    random_ids(count, SIZES[5], Rng::new(0x7a, stream))
}

/// Takes a step of 4 x 64 tokens.
fn train(experts: bool, precision: Precision) -> Result<Task> {
    const STEP_SEQ: usize = 64;
    let [dense, dsmoe] = configs(COARSE, SIZES, STEP_SEQ)?;
    let ids = ids(4 * STEP_SEQ + 1, 0);
    let mut run = Run::new(if experts { dsmoe } else { dense }, &ids, STEP_SEQ, precision, Device::Cpu)?;
    if experts {
        run.reach_share(ACTIVE)?;
    }
    Ok(Box::new(move || run.step().map(|()| None)))
}

fn decoding(experts: bool, precision: Precision) -> Result<Task> {
    let [dense, dsmoe] = configs(COARSE, SIZES, PROMPT + NEW_TOKENS + 1)?;
    let prompt = ids(PROMPT, 1);
    let mut model = Inference::new(&random_model(if experts { dsmoe } else { dense }), precision);
    if experts {
        reach_share(ACTIVE, |threshold| {
            model.set_threshold(threshold)?;
            active_share(&model, &prompt, NEW_TOKENS)
        })?;
    }
    Ok(Box::new(move || Ok(Some(decode(&model, &prompt, NEW_TOKENS)?))))
}

fn conversion() -> Result<Task> {
    let dir = tempfile::tempdir().context("cannot make a temporary directory; set TMPDIR")?;
    let [dense, _] = configs(COARSE, SIZES, SEQ)?;
    let from = dir.path().join("dense");
    init(&dense, &from, &InitOptions::default(), &mut |_| {})?;
    Ok(Box::new(move || {
        let options = ConvertOptions { force: true, ..ConvertOptions::new(EXPERTS) };
        convert(&from, &dir.path().join("dsmoe"), &options, &mut |_| {})?;
        Ok(None)
    }))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::ValueEnum;

    use super::*;

    #[test]
    fn names_are_unique_and_begin_with_their_suite() {
        let mut names = BTreeSet::new();
        for suite in Suite::value_variants() {
            for workload in suite.workloads() {
                assert_eq!(workload.name.split('/').next(), Some(&word(suite) as &str));
                assert_eq!(workload.name.split('/').count(), 3, "{}", workload.name);
                assert!(names.insert(workload.name.clone()), "{}", workload.name);
            }
        }
    }
}
