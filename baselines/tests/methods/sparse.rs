//! SparseGPT, Wanda and magnitude pruning of whole models: budgets, files, and PyTorch's masks.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::LayerStream;
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::init::preset;
use dsmoe_core::{Config, Masks, Model};
use dsmoe_kernels::testing::{shared, with_threads};
use serde_json::{Value, json};

use super::common::{Run, configured, made, mean_loss, tensors, tensors_of, tiny, values};

const METHODS: [&str; 3] = ["sparsegpt", "wanda", "magnitude"];

/// A random model in `dir`, with widths that are no multiple of 128.
fn small(dir: &Path, dtype: Dtype) -> PathBuf {
    let sizes = json!({
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 75,
        "intermediate_size": 152, "num_hidden_layers": 2, "tie_word_embeddings": false, "initializer_range": 0.1
    });
    made(&tiny(&sizes), dir, dtype)
}

fn sequences() -> Vec<Vec<u32>> {
    (0..5).map(|s| (0..31).map(|t| ((s * 31 + t) * (s + 7 * t + 2) % 75) as u32).collect()).collect()
}

/// Which weights are kept, by weight, row after row.
fn masks(dir: &Path) -> BTreeMap<String, Vec<bool>> {
    let weights = Checkpoint::open(dir).unwrap();
    tensors_of(&Checkpoint::open_file(&dir.join("masks.safetensors")).unwrap())
        .into_iter()
        .map(|(name, (dtype, shape, bytes))| {
            let of = weights.tensor(&name).unwrap().shape.clone();
            assert_eq!((dtype, shape), (Dtype::U8, vec![of[0], of[1].div_ceil(8)]));
            let bit =
                |at: usize| bytes[at / of[1] * of[1].div_ceil(8) + at % of[1] / 8] >> (at % of[1] % 8) & 1;
            (name, (0..of[0] * of[1]).map(|at| bit(at) == 1).collect())
        })
        .collect()
}

#[test]
fn the_papers_budgets_are_reached() {
    let [small, large] = ["llama-3.2-1b", "llama-2-7b"].map(|name| preset(name).unwrap());
    for name in METHODS {
        let plan = |config: &Config, budget: &str, set: &[&str]| {
            configured(name, set)?.plan(config, budget.parse()?)
        };
        for (config, budget, params, density, total) in [
            (&small, "735M", 735e6, 0.4853, 1_235_814_400.0),
            (&large, "3.93B", 3.93e9, 0.5663, 6_738_415_616.0),
        ] {
            let plan = plan(config, budget, &[]).unwrap();
            assert_eq!(plan.total, total);
            assert!((plan.activated - params).abs() < 1e-3 * params, "{name}: {plan:?}");
            let reached: f64 = plan.reached_by.split(' ').nth(1).unwrap().parse().unwrap();
            // A row of 4096 weights is cut in steps of 0.00024.
            let step = if name == "wanda" { 1.3e-4 } else { 1e-6 };
            assert!((reached - density).abs() < step, "{name}: {plan:?}");
        }
        for pattern in ["pattern=2:4", "pattern=4:8"] {
            for (config, budget, activated) in
                [(&small, "749.3M", 749_275_136.0), (&large, "3.5B", 3_500_412_928.0)]
            {
                let plan = plan(config, budget, &[pattern]).unwrap();
                assert_eq!((plan.activated, &plan.reached_by[..14]), (activated, "density 0.5000"));
            }
            let error = plan(&small, "735M", &[pattern]).unwrap_err().to_string();
            assert!(
                error.contains("the least reachable is 749.3M") && error.contains("nearest to true"),
                "{error}"
            );
            assert!(plan(&small, "735M", &[pattern, "nearest=true"]).is_ok());
        }
        if name == "sparsegpt" {
            let whole = plan(&small, "735M", &["block=18446744073709551615"]).unwrap();
            assert!((whole.activated - 735e6).abs() < 1e4, "{whole:?}");
        }
        assert_eq!(plan(&small, "1", &[]).unwrap().activated, 1_235_814_400.0);
        assert_eq!(plan(&small, "262735872", &[]).unwrap().activated, 262_735_872.0);
        for budget in ["100M", "2B"] {
            let error = plan(&small, budget, &[]).unwrap_err().to_string();
            assert!(
                error.contains("the least reachable is 262.7M (21.3%), the most 1.2358B (100.0%)"),
                "{error}"
            );
        }
    }
}

#[test]
fn the_result_is_a_plain_model_with_zeros_where_its_masks_say() {
    let calibration = sequences();
    for dtype in [Dtype::BF16, Dtype::F32] {
        let work = tempfile::tempdir().unwrap();
        let model = small(work.path(), dtype);
        let dense = tensors(&model);
        for name in METHODS {
            for set in [&[][..], &["pattern=2:4", "nearest=true"], &["pattern=4:8", "nearest=true"]] {
                let out = work.path().join(format!("{name}-{}", set.concat()));
                let run = Run::new(name, set, 0.6, &calibration);
                let mut last = None;
                let made = run.watched(&model, &out, &mut |progress| last = Some(progress)).unwrap();
                assert!(last.is_some_and(|last| last.done == last.total), "{last:?}");
                let config = Config::load(&out).unwrap();
                assert_eq!(made.plan, configured(name, set).unwrap().plan(&config, run.budget).unwrap());
                assert!(made.measured.iter().all(|(_, value)| value.is_finite()));

                let json = |dir: &Path| -> Value {
                    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
                };
                assert_eq!(json(&out), json(&model));
                let masks = masks(&out);
                assert_eq!(masks.len(), 14);
                let mut removed = 0;
                for (tensor, (dtype, shape, bytes)) in tensors(&out) {
                    assert_eq!((dtype, &shape), (dense[&tensor].0, &dense[&tensor].1));
                    let Some(mask) = masks.get(&tensor) else {
                        assert!(bytes == dense[&tensor].2, "{tensor} changed");
                        continue;
                    };
                    let weights = values(&out, &tensor);
                    assert!(weights.iter().zip(mask).all(|(&w, &kept)| kept || w.to_bits() == 0));
                    removed += mask.iter().filter(|kept| !**kept).count();
                    let of = if set.is_empty() { continue } else { set[0][10..].parse::<usize>().unwrap() };
                    let kept = |group: &[bool]| group.iter().filter(|kept| **kept).count();
                    assert!(mask.chunks(of).all(|group| kept(group) == of / 2), "{tensor}");
                }
                assert_eq!(made.plan.activated, made.plan.total - removed as f64);
                let counts = Accounting::of(&config).with_masks(&Masks::load(&out).unwrap().unwrap());
                assert_eq!(counts.activated(0.0), made.plan.activated);
                // The weights fit their masks, and the trainer keeps them so.
                assert!(Model::load(&out).unwrap().masks().is_some());
                assert!(mean_loss(&out, &calibration).is_finite());
            }
        }
    }
}

#[test]
fn all_weights_kept_is_the_dense_model_and_none_still_runs() {
    let (work, calibration) = (tempfile::tempdir().unwrap(), sequences());
    let model = small(work.path(), Dtype::BF16);
    for name in METHODS {
        let run = |budget, out: &str| {
            let out = work.path().join(format!("{name}-{out}"));
            Run { budget, ..Run::new(name, &[], 1.0, &calibration) }.run(&model, &out).unwrap();
            out
        };
        let all = run(Budget::Share(1.0), "all");
        assert!(tensors(&all) == tensors(&model), "{name} changed a weight at density 1");
        let rest = 2 * 75 * 48 + 5 * 48;
        let none = run(Budget::Params(f64::from(rest)), "none");
        assert!(masks(&none).values().flatten().all(|kept| !kept));
        assert!(mean_loss(&none, &calibration).is_finite(), "{name}");
        assert_eq!(Config::load(&model).unwrap(), Config::load(&none).unwrap());
    }
}

#[test]
fn equal_runs_give_equal_bits_on_any_threads() {
    let (work, calibration) = (tempfile::tempdir().unwrap(), sequences());
    let model = small(work.path(), Dtype::F32);
    for (name, set) in
        [("sparsegpt", &[][..]), ("sparsegpt", &["true_sequential=true", "block=16"]), ("wanda", &[])]
    {
        let files = |threads: usize| {
            let out = work.path().join(format!("{name}-{}-{threads}", set.len()));
            let run = Run::new(name, set, 0.55, &calibration);
            with_threads(threads, || run.run(&model, &out)).unwrap();
            ["model.safetensors", "masks.safetensors"].map(|file| fs::read(out.join(file)).unwrap())
        };
        assert!(files(1) == files(3), "{name} {set:?}");
    }
}

#[test]
fn the_order_of_the_passes_matters_only_within_a_layer() {
    let work = tempfile::tempdir().unwrap();
    let model = small(work.path(), Dtype::F32);
    let masks = |set: &[&str]| {
        let out = work.path().join(set.concat());
        Run::new("sparsegpt", set, 0.6, &sequences()).run(&model, &out).unwrap();
        masks(&out)
    };
    let (once, anew) = (masks(&["true_sequential=false"]), masks(&["true_sequential=true"]));
    let same = |name: &str| once[name] == anew[name];
    assert!(same("model.layers.0.self_attn.q_proj.weight"));
    assert!(!same("model.layers.0.mlp.down_proj.weight"));
}

#[test]
fn what_cannot_be_done_is_said_in_a_line_and_leaves_nothing() {
    let work = tempfile::tempdir().unwrap();
    let model = small(work.path(), Dtype::F32);
    let out = work.path().join("out");
    let experts = work.path().join("experts");
    convert(&model, &experts, &ConvertOptions::new(4), &mut |_| {}).unwrap();
    let damaged = work.path().join("damaged");
    fs::create_dir(&damaged).unwrap();
    fs::copy(model.join("config.json"), damaged.join("config.json")).unwrap();
    let uneven = [vec![1, 2, 3], vec![1]];
    let foreign = [vec![99, 1]];
    let good = sequences();
    type Case<'a> = (&'a str, &'a Path, &'a [&'a str], &'a [Vec<u32>], &'a str);
    let cases: [Case<'_>; 14] = [
        ("magnitude", &model, &["nearest=maybe"], &good, "nearest: cannot be \"maybe\"; True accepts"),
        ("sparsegpt", &model, &[], &[], "calibration: there is no text"),
        ("wanda", &model, &[], &[], "calibration: there is no text"),
        ("wanda", &model, &[], &uneven, "calibration sequence 1 has 1 tokens"),
        ("sparsegpt", &model, &[], &foreign, "token id 99"),
        ("sparsegpt", &model, &["damp=0"], &good, "damp: cannot be 0"),
        ("sparsegpt", &model, &["damp=NaN"], &good, "damp: cannot be \"NaN\""),
        ("sparsegpt", &model, &["block=0"], &good, "block: cannot be 0"),
        ("sparsegpt", &model, &["block=6", "pattern=2:4", "nearest=true"], &good, "block: cannot be 6"),
        ("sparsegpt", &model, &["true_sequential=maybe"], &good, "cannot be \"maybe\"; True runs"),
        ("magnitude", &model, &["pattern=3:7"], &good, "unstructured, or 2:4 or 4:8"),
        ("magnitude", &model, &["among=layer"], &good, "of a row or of a matrix"),
        ("magnitude", &experts, &[], &good, "use a dense model"),
        ("magnitude", &damaged, &[], &good, "model.safetensors"),
    ];
    for (name, model, set, calibration, part) in cases {
        Run::new(name, set, 0.6, calibration).fails(model, &out, &[part]);
    }
    let run = Run::new("magnitude", &[], 0.6, &[]);
    run.run(&model, &out).unwrap();
    run.fails(&model, &out, &["not empty"]);
    run.fails(&model, &model, &[]);
    run.fails(&out, &work.path().join("again"), &["masks.safetensors: the model is pruned already"]);
    let left: Vec<_> = fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");

    let odd = tiny(&json!({"hidden_size": 50, "head_dim": 8}));
    let magnitude = configured("magnitude", &["pattern=4:8"]).unwrap();
    let error = magnitude.plan(&odd, Budget::Share(0.6)).unwrap_err().to_string();
    assert!(error.contains("50 columns") && error.contains("pattern unstructured"), "{error}");
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |byte: &u8| DIGITS.iter().position(|digit| digit == byte).map(|at| at as u32);
    let mut bytes = Vec::new();
    for group in text.as_bytes().chunks(4) {
        let digits: Vec<u32> = group.iter().filter_map(digit).collect();
        let bits = digits.iter().fold(0, |bits, digit| bits << 6 | digit) << (6 * (4 - digits.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..digits.len()]);
    }
    bytes
}

#[test]
fn masks_and_errors_of_a_real_layer_are_pytorchs() {
    let test = "masks_and_errors_of_a_real_layer_are_pytorchs";
    let Some(shared) = shared(test, "models/babyllama-1m") else { return };
    let golden: Value = serde_json::from_str(include_str!("../golden/sparse.json")).unwrap();
    let sequences: Vec<Vec<u32>> = serde_json::from_value(golden["sequences"].clone()).unwrap();
    let model = shared.join("models/babyllama-1m");
    let config = Config::load(&model).unwrap();
    let mut stream = LayerStream::open(&model, &sequences).unwrap();
    let dense = stream.layer(0).unwrap();
    let mut inputs: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    stream
        .forward(&dense, &mut |tap| {
            for linear in dense.linears.iter().filter(|linear| linear.input == tap.input) {
                inputs.entry(linear.name.clone()).or_default().extend_from_slice(tap.x);
            }
        })
        .unwrap();
    let work = tempfile::tempdir().unwrap();
    let mut losses = BTreeMap::new();
    for (case, name, set) in [
        ("sparsegpt", "sparsegpt", &[][..]),
        ("sparsegpt 2:4", "sparsegpt", &["pattern=2:4"]),
        ("wanda", "wanda", &[]),
        ("magnitude", "magnitude", &[]),
    ] {
        let out = work.path().join(case.replace(' ', "-"));
        // Half of the linears.
        let pruned: usize = dense.linears.iter().map(|linear| linear.outputs * linear.inputs).sum();
        let total = Accounting::of(&config).total;
        let budget = Budget::Params(total as f64 - (pruned * config.num_layers / 2) as f64);
        Run { budget, ..Run::new(name, set, 0.5, &sequences) }.run(&model, &out).unwrap();
        losses.insert(case, mean_loss(&out, &sequences));
        let masks = masks(&out);
        let Some(linears) = golden["cases"][case].as_object() else { continue };
        assert_eq!(linears.len(), 7);
        for linear in &dense.linears {
            let golden = &linears[&linear.name];
            let bits = base64(golden["kept"].as_str().unwrap());
            let stride = linear.inputs.div_ceil(8);
            assert_eq!(bits.len(), linear.outputs * stride);
            let bit = |row: usize, col: usize| bits[row * stride + col / 8] >> (col % 8) & 1 == 1;
            let mask = &masks[&linear.name];
            let agree =
                (0..mask.len()).filter(|at| mask[*at] == bit(at / linear.inputs, at % linear.inputs)).count();
            let share = agree as f64 / mask.len() as f64;
            assert!(share >= 0.999, "{case} {}: {share} of the mask agrees", linear.name);

            let (pruned, want) = (values(&out, &linear.name), golden["error"].as_f64().unwrap());
            let error = relative_error(&linear.weight, &pruned, &inputs[&linear.name], linear.inputs);
            assert!((error / want - 1.0).abs() < 0.01, "{case} {}: error {error}, {want}", linear.name);
        }
    }
    let dense = mean_loss(&model, &sequences);
    assert!(dense < losses["sparsegpt"], "{dense} {losses:?}");
    for worse in ["sparsegpt 2:4", "wanda", "magnitude"] {
        assert!(losses["sparsegpt"] < losses[worse], "{losses:?}");
    }
}

/// `||x (w - pruned)^T||^2 / ||x w^T||^2`.
fn relative_error(w: &[f32], pruned: &[f32], x: &[f32], cols: usize) -> f64 {
    let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
    let outputs = |w: &[f32]| -> f64 {
        w.chunks(cols).flat_map(|w| x.chunks(cols).map(move |x| dot(w, x).powi(2))).sum()
    };
    let lost: Vec<f32> = w.iter().zip(pruned).map(|(w, pruned)| w - pruned).collect();
    outputs(&lost) / outputs(w)
}
