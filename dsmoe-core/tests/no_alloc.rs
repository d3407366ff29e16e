//! Decoding, scoring and training allocate nothing once they are under way.

use std::path::Path;

use dsmoe_core::config::Config;
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::init::preset;
use dsmoe_core::model::{Batch, Inference, Model, StepArgs, TrainWorkspace, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{CountingAllocator, with_threads};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Large enough for its products to be cut into tasks for several threads.
fn model(threshold: Option<f64>) -> Model {
    let mut json: serde_json::Value = serde_json::from_str(&preset("small").unwrap().to_json()).unwrap();
    json["num_hidden_layers"] = 2.into();
    json["vocab_size"] = 1000.into();
    if let Some(threshold) = threshold {
        json["model_type"] = "dsmoe".into();
        json["architectures"] = serde_json::json!(["DsmoeForCausalLM"]);
        json["dsmoe"] = serde_json::json!({
            "format_version": 1, "num_experts": 8, "threshold": threshold, "partition": "contiguous", "router_bias": true,
            "gate_value": "sigmoid", "rescale": "eq8", "zero_active": "force_argmax", "ste": true,
        });
    }
    let mut model = Model::new(Config::from_json(Path::new("config.json"), &json.to_string()).unwrap());
    let mut rng = Rng::new(1, 0);
    model.params_mut().iter_mut().for_each(|p| *p = 0.05 * rng.normal());
    model
}

/// Allocations so far: of the calling thread, where it does all of the work, else of all threads.
fn count(serial: bool) -> usize {
    if serial { ALLOCATOR.count_of_thread() } else { ALLOCATOR.count() }
}

/// Allocations up to each token; on one thread, or called from outside of the pool of all.
fn allocations(model: &Inference, serial: bool, tokens: usize, temperature: f32) -> Vec<usize> {
    let options = GenerateOptions {
        max_tokens: tokens,
        temperature,
        top_p: 0.9,
        stop: vec![u32::MAX],
        ..GenerateOptions::default()
    };
    let mut counts = Vec::with_capacity(tokens);
    let on_token = |_| {
        counts.push(count(serial));
        true
    };
    let prompt: Vec<u32> = (1..20).collect();
    let run = || generate(model, &prompt, &options, on_token).unwrap();
    if serial {
        with_threads(1, run);
    } else {
        run();
    }
    assert_eq!(counts.len(), tokens);
    counts
}

/// One test, as the allocator counts for the whole process.
///
/// The cost of a token is exact on one thread. With several, a worker that comes late to its first task of a kind
/// makes its scratch then, and with gates so does a token with more active experts than any before it; what every
/// token costs, or every so many, would be in every window of tokens.
#[test]
fn nothing_is_allocated_after_the_first_tokens_and_steps() {
    decoding();
    scoring();
    training();
}

fn decoding() {
    const WINDOW: usize = 128;
    let cases = [
        (None, Precision::F32),
        (None, Precision::Bf16),
        (Some(0.0), Precision::Bf16),
        (Some(0.5), Precision::Bf16),
    ];
    for (threshold, precision) in cases {
        let model = Inference::new(&model(threshold), precision);
        for temperature in [0.0, 1.0] {
            let case = format!("threshold {threshold:?}, {precision}, temperature {temperature}");
            for serial in [true, false] {
                let counts = allocations(&model, serial, 4 * WINDOW, temperature);
                assert!(counts[0] > 0, "{case}: nothing was counted");
                if serial && threshold != Some(0.5) {
                    assert_eq!(counts[1], counts[4 * WINDOW - 1], "{case}");
                }
                let least = counts.windows(WINDOW).map(|window| window[WINDOW - 1] - window[0]).min();
                assert_eq!(least, Some(0), "{case}, one thread {serial}");
            }
        }
    }
}

/// The first text makes what the others use, of which some open more experts.
fn scoring() {
    const TEXTS: usize = 16;
    let (seq, tokens) = (32, 128);
    let mut rng = Rng::new(2, 0);
    let mut text = || -> Vec<u32> { (0..tokens).map(|_| (rng.next_u64() % 1000) as u32).collect() };
    let texts: Vec<Vec<u32>> = (0..TEXTS).map(|_| text()).collect();
    for precision in [Precision::F32, Precision::Bf16] {
        let model = Inference::new(&model(Some(0.5)), precision);
        let (mut workspace, mut losses) = (Workspace::default(), vec![0.0; tokens]);
        let mut counts = Vec::with_capacity(TEXTS);
        with_threads(1, || {
            for text in &texts {
                let batch = Batch { inputs: text, targets: text, seq };
                model.score(&mut losses, batch, None, &mut workspace).unwrap();
                counts.push(count(true));
            }
        });
        assert!(counts[0] > 0, "{precision}: nothing was counted");
        assert_eq!(counts[TEXTS - 1], counts[0], "{precision}: {counts:?}");
    }
}

/// Steps on the same tokens: the first ones make what the others use.
fn training() {
    const STEPS: usize = 8;
    let (seq, tokens) = (32, 128);
    let inputs: Vec<u32> = (0..tokens as u32).map(|i| 7 * i % 1000).collect();
    let args = StepArgs { loss_scale: 1.0 / tokens as f32, sparsity_weight: 0.5, ..StepArgs::default() };
    for (threshold, recompute) in [(None, false), (Some(0.5), false), (Some(0.5), true)] {
        for precision in [Precision::F32, Precision::Bf16] {
            let model = model(threshold);
            let make = if recompute { TrainWorkspace::recomputing } else { TrainWorkspace::new };
            let mut workspace = make(&model, tokens, precision);
            let mut grads = vec![0.0; model.params().len()];
            let mut counts = Vec::with_capacity(STEPS + 1);
            let mut steps = |serial| {
                counts.clear();
                for _ in 0..=STEPS {
                    let batch = Batch { inputs: &inputs, targets: &inputs, seq };
                    model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
                    counts.push(count(serial));
                }
                counts.windows(2).map(|two| two[1] - two[0]).collect::<Vec<_>>()
            };
            let case = format!("threshold {threshold:?}, {precision}, recompute {recompute}");
            let serial = with_threads(1, || steps(true));
            assert_eq!(serial, [0; STEPS], "{case}, one thread");
            // A worker that comes late to its first task of a kind makes its scratch then.
            let least = rayon::scope(|_| steps(false)).into_iter().min();
            assert_eq!(least, Some(0), "{case}");
        }
    }
}
