//! The fixed benchmarks of records: small enough for many repeats, and for valgrind.

use anyhow::{Context, Result};
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::ffn::routes;
use dsmoe_core::init::{InitOptions, init};
use dsmoe_core::{Device, Inference};
use dsmoe_kernels::expert_ffn::{self, Dims as FfnDims, PackedWeights, Saved, Scratch, WeightGrads, Weights};
use dsmoe_kernels::linear::{self, Dims};
use dsmoe_kernels::matmul::{Mat, Packed};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::{Precision, adamw, add, attention, cross_entropy, rms_norm, rope, swiglu};

use crate::cli::bench::{Architecture, Choice, Routes, Suite};
use crate::timing::decode::{active_share, decode};
use crate::timing::model::{Sizes, random_model, reach_share};
use crate::timing::routing::routing;
use crate::timing::train::Run;
use crate::timing::values::random;

/// One call of what is measured; the seconds of a part of it, where not all counts.
pub(crate) type Task = Box<dyn FnMut() -> Result<Option<f64>>>;

/// A benchmark: its name, and what makes its buffers.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) build: fn() -> Result<Task>,
}

const fn workload(name: &'static str, build: fn() -> Result<Task>) -> Workload {
    Workload { name, build }
}

impl Suite {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Suite::Kernels => "kernels",
            Suite::Ffn => "ffn",
            Suite::Train => "train",
            Suite::Decode => "decode",
            Suite::Convert => "convert",
            Suite::Quality => "quality",
        }
    }

    /// What it times. Quality has numbers of its own.
    pub(crate) const fn workloads(self) -> &'static [Workload] {
        match self {
            Suite::Kernels => &KERNELS,
            Suite::Ffn => &FFN,
            Suite::Train => &TRAIN,
            Suite::Decode => &DECODE,
            Suite::Convert => &CONVERT,
            Suite::Quality => &[],
        }
    }
}

impl Choice {
    pub(crate) fn takes(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|part| name.contains(part))
    }
}

/// The suites asked for, each once, in the order of their definition.
pub(crate) fn suites(choice: &Choice) -> Vec<Suite> {
    use clap::ValueEnum;
    Suite::value_variants().iter().copied().filter(|suite| choice.suite.contains(suite)).collect()
}

const KERNELS: [Workload; 18] = [
    workload("kernels/add/sum", || {
        let ([a, b, _], mut y) = rows();
        task(move || add::Sum { out: &mut y, a: &a, b: &b }.run())
    }),
    workload("kernels/rms_norm/forward", || {
        let (([a, _, _], mut y), w, mut rstd) = (rows(), random(HIDDEN, 1.0, 4), vec![0.0; TOKENS]);
        task(move || rms_norm::Forward { y: &mut y, rstd: &mut rstd, x: &a, weight: &w, eps: 1e-5 }.run())
    }),
    workload("kernels/rms_norm/backward", || {
        let (([a, _, dy], mut dx), w, mut dw) = (rows(), random(HIDDEN, 1.0, 4), vec![0.0; HIDDEN]);
        let rstd = vec![1.0; TOKENS];
        task(move || {
            rms_norm::Backward {
                dx: &mut dx,
                dweight: &mut dw,
                dy: &dy,
                x: &a,
                weight: &w,
                rstd: &rstd,
                add: false,
            }
            .run()
        })
    }),
    workload("kernels/rope/forward", || {
        let (_, mut y) = rows();
        let table = rope::Table::new(HEAD_DIM, 1e4, rope::Scaling::None, SEQ);
        task(move || {
            let args = rope::Args { table: &table, seq: SEQ, start: 0, heads: HIDDEN / HEAD_DIM };
            rope::Forward { x: &mut y, stride: args.width(), args }.run();
        })
    }),
    workload("kernels/swiglu/forward", || {
        let ([a, b, _], mut y) = rows();
        task(move || swiglu::Forward { c: &mut y, a: &a, b: &b }.run())
    }),
    workload("kernels/swiglu/backward", || {
        let ([a, b, dy], mut da) = rows();
        let mut db = da.clone();
        task(move || swiglu::Backward { da: &mut da, db: &mut db, dc: &dy, a: &a, b: &b }.run())
    }),
    workload("kernels/adamw/step", || {
        let ([dy, ..], mut weights) = rows();
        let (mut mean, mut squares) = (weights.clone(), vec![1.0; weights.len()]);
        let hyper =
            adamw::Hyper { lr: 1e-5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 10 };
        task(move || {
            adamw::Step {
                param: &mut weights,
                m: &mut mean,
                v: &mut squares,
                grad: &dy,
                grad_scale: 1.0,
                hyper: &hyper,
            }
            .run()
        })
    }),
    workload("kernels/attention/forward", || {
        let Attention { dims, q, k, v, mut out, mut lse, .. } = Attention::new(SEQ);
        task(move || attention::Forward { out: &mut out, lse: &mut lse, q: &q, k: &k, v: &v, dims }.run())
    }),
    workload("kernels/attention/backward", || {
        let Attention { dims, q: dout, mut out, mut lse, .. } = Attention::new(SEQ);
        let qkv = random(dims.batch * dims.queries * dims.joined_width(), 1.0, 5);
        let mut dqkv = qkv.clone();
        attention::ForwardJoined { out: &mut out, lse: &mut lse, qkv: &qkv, dims }.run();
        task(move || {
            attention::Backward { dqkv: &mut dqkv, dout: &dout, out: &out, qkv: &qkv, lse: &lse, dims }.run()
        })
    }),
    workload("kernels/attention/decode", || {
        let Attention { dims, q, k, v, mut out, .. } = Attention::new(1);
        task(move || attention::Decode { out: &mut out, q: &q, k: &k, v: &v, dims }.run())
    }),
    workload("kernels/cross_entropy/forward_backward", || {
        let dims = cross_entropy::Dims { tokens: TOKENS, hidden: HIDDEN, vocab: VOCAB };
        let [h, head] = [(TOKENS * HIDDEN, 1), (VOCAB * HIDDEN, 2)].map(|(len, seed)| random(len, 0.1, seed));
        let targets: Vec<u32> = (0..TOKENS as u32).map(|t| t * t % VOCAB as u32).collect();
        let (mut losses, mut dh, mut dhead) = (vec![0.0; TOKENS], vec![0.0; h.len()], vec![0.0; head.len()]);
        let mut scratch = cross_entropy::Scratch::default();
        task(move || {
            cross_entropy::ForwardBackward {
                losses: &mut losses,
                dhidden: &mut dh,
                dhead: &mut dhead,
                hidden_states: &h,
                head: &head,
                targets: &targets,
                scale: 1.0,
                dims,
                scratch: &mut scratch,
            }
            .run();
        })
    }),
    workload("kernels/matmul_f32/forward", || product(Precision::F32, Layout::Forward)),
    workload("kernels/matmul_f32/packed", || product(Precision::F32, Layout::Packed)),
    workload("kernels/matmul_f32/backward_input", || product(Precision::F32, Layout::BackwardInput)),
    workload("kernels/matmul_f32/backward_weight", || product(Precision::F32, Layout::BackwardWeight)),
    workload("kernels/matmul_bf16/forward", || product(Precision::Bf16, Layout::Forward)),
    workload("kernels/matmul_bf16/packed", || product(Precision::Bf16, Layout::Packed)),
    workload("kernels/matmul_bf16/backward_weight", || product(Precision::Bf16, Layout::BackwardWeight)),
];

const FFN: [Workload; 6] = [
    workload("ffn/dense_f32/forward", || ffn_forward(Precision::F32, None)),
    workload("ffn/dsmoe_f32/forward", || ffn_forward(Precision::F32, Some(ACTIVE))),
    workload("ffn/dense_bf16/forward", || ffn_forward(Precision::Bf16, None)),
    workload("ffn/dsmoe_bf16/forward", || ffn_forward(Precision::Bf16, Some(ACTIVE))),
    workload("ffn/dense_f32/train", || ffn_train(false)),
    workload("ffn/dsmoe_f32/train", || ffn_train(true)),
];

const TRAIN: [Workload; 3] = [
    workload("train/dense_f32/step", || train(false, Precision::F32)),
    workload("train/dsmoe_f32/step", || train(true, Precision::F32)),
    workload("train/dsmoe_bf16/step", || train(true, Precision::Bf16)),
];

const DECODE: [Workload; 3] = [
    workload("decode/dense_bf16/tokens", || decoding(false, Precision::Bf16)),
    workload("decode/dsmoe_bf16/tokens", || decoding(true, Precision::Bf16)),
    workload("decode/dsmoe_f32/tokens", || decoding(true, Precision::F32)),
];

const CONVERT: [Workload; 1] = [workload("convert/8_experts/directory", conversion)];

const TOKENS: usize = 256;
const HIDDEN: usize = 512;
const VOCAB: usize = 1024;
const SEQ: usize = 128;
const HEAD_DIM: usize = 64;
const KV_SHARE: usize = 4;
const INTERMEDIATE: usize = 1024;
const EXPERTS: usize = 8;
/// 3 of 8.
const ACTIVE: f64 = 0.375;
const FFN_TOKENS: usize = 64;
/// Of the models: hidden, intermediate, layers, heads, kv_heads, vocabulary.
const SIZES: Sizes = [128, 512, 2, 4, 2, 512];
const PROMPT: usize = 8;
const NEW_TOKENS: usize = 32;

fn task(mut call: impl FnMut() + 'static) -> Result<Task> {
    Ok(Box::new(move || {
        call();
        Ok(None)
    }))
}

/// Three inputs and an output of elementwise ops.
fn rows() -> ([Vec<f32>; 3], Vec<f32>) {
    let n = TOKENS * HIDDEN;
    ([1, 2, 3].map(|seed| random(n, 1.0, seed)), vec![0.0; n])
}

/// Buffers of an attention.
struct Attention {
    dims: attention::Dims,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Attention {
    fn new(queries: usize) -> Attention {
        let heads = HIDDEN / HEAD_DIM;
        let (batch, kv_heads) =
            (queries.div_ceil(SEQ) * if queries == 1 { 1 } else { TOKENS / SEQ }, heads / KV_SHARE);
        let dims = attention::Dims { batch, queries, keys: SEQ, heads, kv_heads, head_dim: HEAD_DIM };
        let (rows, columns) = (batch * queries * HIDDEN, batch * SEQ * kv_heads * HEAD_DIM);
        let [q, k, v] = [(rows, 1), (columns, 2), (columns, 3)].map(|(len, seed)| random(len, 1.0, seed));
        Attention { dims, q, k, v, out: vec![0.0; rows], lse: vec![0.0; batch * queries * heads] }
    }
}

#[derive(Clone, Copy)]
enum Layout {
    Forward,
    Packed,
    BackwardInput,
    BackwardWeight,
}

fn product(precision: Precision, layout: Layout) -> Result<Task> {
    let (m, k, n) = (TOKENS, HIDDEN, INTERMEDIATE);
    let dims = Dims { rows: m, inputs: k, outputs: n, precision };
    let [x, w, dy] = [(m * k, 1), (n * k, 2), (m * n, 3)].map(|(len, seed)| random(len, 1.0, seed));
    match layout {
        Layout::Forward => {
            let mut y = vec![0.0; m * n];
            task(move || linear::Forward { y: &mut y, x: &x, w: &w, dims }.run())
        }
        Layout::Packed => {
            let (mut y, packed) = (vec![0.0; m * n], Packed::new(precision, Mat::new(&w, n, k)));
            task(move || linear::ForwardPacked { y: &mut y, x: &x, w: &packed, rows: m }.run())
        }
        Layout::BackwardInput => {
            let mut dx = vec![0.0; m * k];
            task(move || linear::BackwardInput { dx: &mut dx, dy: &dy, w: &w, dims, add: false }.run())
        }
        Layout::BackwardWeight => {
            let mut dw = vec![0.0; n * k];
            task(move || linear::BackwardWeight { dw: &mut dw, dy: &dy, x: &x, dims }.run())
        }
    }
}

fn ffn_weights() -> [Vec<f32>; 3] {
    [1, 2, 3].map(|seed| random(HIDDEN * INTERMEDIATE, 1.0 / (HIDDEN as f32).sqrt(), seed))
}

const FFN_DIMS: FfnDims = FfnDims {
    tokens: FFN_TOKENS,
    hidden: HIDDEN,
    intermediate: INTERMEDIATE,
    num_experts: EXPERTS,
    all_pairs: true,
};

/// On packed weights; with an active share, in experts.
fn ffn_forward(precision: Precision, active: Option<f64>) -> Result<Task> {
    let [gate, up, down] = ffn_weights();
    let weights = Weights { gate: &gate, up: &up, down: &down };
    let experts = if active.is_some() { EXPERTS } else { 1 };
    let packed = PackedWeights::new(precision, &weights, HIDDEN, INTERMEDIATE, experts);
    let x = random(FFN_TOKENS * HIDDEN, 1.0, 4);
    let (mut y, mut scratch) = (vec![0.0; x.len()], Scratch::default());
    match active {
        None => task(move || {
            expert_ffn::ForwardPacked {
                y: &mut y,
                x: &x,
                weights: &packed,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(FFN_TOKENS, packed.hidden(), packed.intermediate()),
                scratch: &mut scratch,
            }
            .run()
        }),
        Some(active) => {
            let routing = routing(Routes::Random, FFN_TOKENS, EXPERTS, active);
            task(move || {
                expert_ffn::ForwardPacked {
                    y: &mut y,
                    x: &x,
                    weights: &packed,
                    pairs: expert_ffn::Pairs::Routed(&routes(&routing)),
                    dims: FFN_DIMS,
                    scratch: &mut scratch,
                }
                .run();
            })
        }
    }
}

/// Forward and backward in f32.
fn ffn_train(experts: bool) -> Result<Task> {
    let [gate, up, down] = ffn_weights();
    let [x, dy] = [4, 5].map(|seed| random(FFN_TOKENS * HIDDEN, 1.0, seed));
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let mut grads = [(); 3].map(|()| vec![0.0; HIDDEN * INTERMEDIATE]);
    let (mut saved, mut scratch) = (Saved::default(), Scratch::new(Precision::F32));
    let routing = routing(Routes::Random, FFN_TOKENS, EXPERTS, ACTIVE);
    let mut dcoefficients = vec![0.0; FFN_TOKENS * EXPERTS];
    task(move || {
        let weights = Weights { gate: &gate, up: &up, down: &down };
        let [dgate, dup, ddown] = &mut grads;
        let grads = WeightGrads { gate: dgate, up: dup, down: ddown };
        let (saved, scratch) = (&mut saved, &mut scratch);
        let (tokens, hidden, width) = (FFN_TOKENS, HIDDEN, INTERMEDIATE);
        if experts {
            let (routes, dims) = (routes(&routing), FFN_DIMS);
            expert_ffn::ForwardTrain {
                y: &mut y,
                saved,
                x: &x,
                weights: &weights,
                pairs: expert_ffn::Pairs::Routed(&routes),
                dims,
                scratch,
            }
            .run();
            let dc = &mut dcoefficients;
            expert_ffn::Backward {
                dx: &mut dx,
                dcoefficients: Some(dc),
                grads,
                dy: &dy,
                saved,
                x: &x,
                weights: &weights,
                pairs: expert_ffn::Pairs::Routed(&routes),
                dims,
                scratch,
            }
            .run();
        } else {
            expert_ffn::ForwardTrain {
                y: &mut y,
                saved,
                x: &x,
                weights: &weights,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(tokens, hidden, width),
                scratch,
            }
            .run();
            expert_ffn::Backward {
                dx: &mut dx,
                dcoefficients: None,
                grads,
                dy: &dy,
                saved,
                x: &x,
                weights: &weights,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(tokens, hidden, width),
                scratch,
            }
            .run();
        }
    })
}

/// Whose defaults none are taken from.
const ARCHITECTURE: Architecture = Architecture {
    hidden: None,
    intermediate: None,
    layers: None,
    heads: None,
    kv_heads: None,
    vocab: None,
    experts: EXPERTS,
    active: ACTIVE,
};

fn ids(count: usize, stream: u64) -> Vec<u32> {
    let mut rng = Rng::new(0x7a, stream);
    (0..count).map(|_| rng.below(SIZES[5] as u64) as u32).collect()
}

/// A step of 4 x 64 tokens.
fn train(experts: bool, precision: Precision) -> Result<Task> {
    const STEP_SEQ: usize = 64;
    let [dense, dsmoe] = ARCHITECTURE.configs(SIZES, STEP_SEQ)?;
    let ids = ids(4 * STEP_SEQ + 1, 0);
    let mut run = Run::new(if experts { dsmoe } else { dense }, &ids, STEP_SEQ, precision, Device::Cpu)?;
    if experts {
        reach_share(ACTIVE, |threshold| {
            run.set_threshold(threshold)?;
            run.active_ratio()
        })?;
    }
    Ok(Box::new(move || run.step().map(|()| None)))
}

fn decoding(experts: bool, precision: Precision) -> Result<Task> {
    let [dense, dsmoe] = ARCHITECTURE.configs(SIZES, PROMPT + NEW_TOKENS + 1)?;
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
    let [dense, _] = ARCHITECTURE.configs(SIZES, SEQ)?;
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
                assert_eq!(workload.name.split('/').next(), Some(suite.name()));
                assert_eq!(workload.name.split('/').count(), 3, "{}", workload.name);
                assert!(names.insert(workload.name), "{}", workload.name);
            }
        }
    }
}
