//! Mixtures whose experts are kept, merged or dropped, against transformers with the same experts, and files that are wrong.

use std::fs;
use std::path::Path;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::{ExpertSums, LayerStream};
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert, upcycle};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::model::{Batch, Inference, Model, StepArgs, TrainWorkspace, Workspace};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule, Surgery, operate, operate_on};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::alone;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, refused};
use serde_json::{Value, json};

use crate::moe::{
    LENGTH, MIXTURE_TOLERANCE, MIXTURES, batch, case, changed, dense, golden, logits, options, tensors,
};
use crate::worst;

pub(crate) fn surgery_case(name: &str) -> Value {
    serde_json::from_slice(&fs::read(case(name).join("surgery.json")).unwrap()).unwrap()
}

fn floats(json: &Value) -> Vec<f32> {
    serde_json::from_value(json.clone()).unwrap()
}

fn numbers(json: &Value) -> Vec<usize> {
    serde_json::from_value(json.clone()).unwrap()
}

/// The groups of a case, merged by its weights.
pub(crate) fn merged(golden: &Value) -> Vec<LayerSurgery> {
    let layer = |json: &Value| {
        let (map, weights): (Vec<usize>, Vec<f64>) =
            (numbers(&json["map"]), serde_json::from_value(json["weights"].clone()).unwrap());
        let experts = (0..=*map.iter().max().unwrap()).map(|group| {
            let members = (0..map.len()).filter(|&e| map[e] == group);
            let sum: f64 = members.clone().map(|e| weights[e]).sum();
            NewExpert::merged(members.map(|e| (e, weights[e] / sum)))
        });
        LayerSurgery { experts: experts.collect(), router: RouterRule::Map }
    };
    golden["layers"].as_array().unwrap().iter().map(layer).collect()
}

pub(crate) fn logits_of(dir: &Path, name: &str) -> Vec<f32> {
    logits(&Inference::load(dir, Precision::F32).unwrap(), &golden(name).rows, LENGTH)
}

pub(crate) fn run(from: &Path, out: &Path, layers: &[LayerSurgery]) -> dsmoe_core::surgery::SurgeryReport {
    operate(from, out, (layers, None), false, &mut |_| {}).unwrap()
}

#[test]
fn merged_experts_have_the_logits_of_transformers_with_copies_tied() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let (golden, out) = (surgery_case(name), work.path().join(name));
        let layers = merged(&golden);
        let report = run(&case(name), &out, &layers);
        let found = logits_of(&out, name);
        assert_close(name, &found, &f64s(&floats(&golden["logits"])), 1e-5);
        let config = Config::load(&out).unwrap();
        assert_eq!((config.model_type(), config.num_experts()), ("dsmoe", Some(3)));
        assert_eq!(config.family().model_type, name);
        assert_eq!(report.total, Accounting::of(&config).total);
        assert!(report.total < report.total_before);
        // Trained and saved it is the same model.
        let saved = work.path().join(format!("{name}-saved"));
        fs::create_dir(&saved).unwrap();
        Model::load(&out).unwrap().save(&saved, Dtype::BF16).unwrap();
        assert!(worst(&logits_of(&saved, name), found.iter().copied()) < 1e-6, "{name}");
        assert_eq!(Config::load(&saved).unwrap().mixture(), config.mixture(), "{name}");
    }
}

#[test]
fn what_tokens_say_of_experts_is_what_numpy_computes() {
    for name in MIXTURES {
        let golden = surgery_case(name);
        let sequences: Vec<Vec<u32>> = serde_json::from_value(golden["calibration"].clone()).unwrap();
        let mut stream = LayerStream::open_experts(&case(name), &sequences).unwrap();
        for (i, want) in golden["layers"].as_array().unwrap().iter().enumerate() {
            let (weights, experts) = (stream.layer(i).unwrap(), stream.experts(i).unwrap());
            stream.attend(&weights).unwrap();
            let stats = stream.expert_stats(&weights, &experts, true);
            let n = experts.num_experts();
            let tokens = stats.tokens as f64;
            let list = |key: &str| -> Vec<f64> { serde_json::from_value(want[key].clone()).unwrap() };
            let hard: Vec<f64> = stats.experts.iter().map(|sums| sums.hard).collect();
            assert_eq!(hard, list("hard"), "{name} layer {i}");
            let ean = |sums: &ExpertSums| sums.squares.iter().map(|square| square.sqrt()).sum();
            let of =
                |value: &dyn Fn(&ExpertSums) -> f64| stats.experts.iter().map(value).collect::<Vec<f64>>();
            for (key, got) in [
                ("soft", of(&|sums| sums.soft)),
                ("gate_sum", of(&|sums| sums.coefficients)),
                ("norm_sum", of(&|sums| sums.norms)),
                ("weighted_norm", of(&|sums| sums.weighted_norms)),
                ("ean", of(&ean)),
            ] {
                assert_close_f64(&format!("{name} layer {i} {key}"), &got, &list(key), 1e-6);
            }
            let means: Vec<Vec<f64>> = serde_json::from_value(want["mean_all"].clone()).unwrap();
            let correlations: Vec<Vec<f64>> = serde_json::from_value(want["correlation"].clone()).unwrap();
            for e in 0..n {
                let got: Vec<f64> = stats.experts[e].outputs.iter().map(|sum| sum / tokens).collect();
                assert_close_f64(&format!("{name} layer {i} mean {e}"), &got, &means[e], 1e-6);
                let got: Vec<f64> = (0..n).map(|other| stats.correlation(e, other)).collect();
                assert_close_f64(&format!("{name} layer {i} correlation {e}"), &got, &correlations[e], 1e-6);
            }
            stream.join_experts(&weights, &experts);
        }
    }
}

#[test]
fn a_stream_of_experts_needs_experts() {
    let work = tempfile::tempdir().unwrap();
    let from = work.path().join("dense");
    dense(&from, &json!({}));
    refused(
        LayerStream::open_experts(&from, &[vec![1, 2]]),
        &["of a model without experts", "use a model with"],
    );
    refused(LayerStream::open(&case("mixtral"), &[vec![1, 2]]), &["is of a model with experts"]);
}

#[test]
fn fewer_experts_stay_in_the_format_of_the_family() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let (golden, out) = (surgery_case(name), work.path().join(name));
        let layers: Vec<LayerSurgery> = golden["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| LayerSurgery::keep(numbers(&layer["kept"])))
            .collect();
        run(&case(name), &out, &layers);
        let differs = worst(&logits_of(&out, name), floats(&golden["logits_of_kept"]).into_iter());
        assert!(differs < MIXTURE_TOLERANCE, "{name}: {differs}");
        let config = Config::load(&out).unwrap();
        assert_eq!(config.model_type(), name);
        let json: Value = serde_json::from_str(&config.to_json()).unwrap();
        assert!(json.get("ffn").is_none(), "{name}");
        // A kept expert has its bytes.
        let (before, after) = (tensors(&case(name)), tensors(&out));
        let kept = numbers(&golden["layers"][0]["kept"]);
        let mut compared = 0;
        for (tensor, stored) in &after {
            let Some((start, rest)) = tensor.split_once("layers.0.") else { continue };
            let Some((middle, number)) = rest.split_once("experts.") else { continue };
            let (new, end) = number.split_once('.').unwrap();
            let old = kept[new.parse::<usize>().unwrap()];
            assert!(before[&format!("{start}layers.0.{middle}experts.{old}.{end}")] == *stored, "{tensor}");
            compared += 1;
        }
        assert_eq!(compared, 3 * kept.len(), "{name}");
    }
}

#[test]
fn surgery_that_keeps_all_keeps_every_bit() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let n = Config::load(&case(name)).unwrap().num_experts().unwrap();
        let before = logits_of(&case(name), name);
        for router in [RouterRule::Map, RouterRule::Rows, RouterRule::Mean] {
            let out = work.path().join(format!("{name}-{router:?}"));
            run(&case(name), &out, &vec![LayerSurgery { router, ..LayerSurgery::keep(0..n) }; 2]);
            let of_map = router == RouterRule::Map;
            assert_eq!(Config::load(&out).unwrap().model_type(), if of_map { "dsmoe" } else { name });
            assert!(logits_of(&out, name) == before, "{name} {router:?}");
            let found: Vec<_> = tensors(&out).into_values().collect();
            let mut wanted = tensors(&case(name)).into_values().collect::<Vec<_>>();
            // A map is of the format of this program, which has its own names and so another order.
            let mut found = found;
            found.sort_by(|a, b| a.1.cmp(&b.1));
            wanted.sort_by(|a, b| a.1.cmp(&b.1));
            assert!(found == wanted, "{name} {router:?}");
        }
        // Experts and neurons in another order are the same function.
        let width = Config::load(&case(name)).unwrap().mixture().unwrap().width as u32;
        let part = |old| Part { old, weight: 1.0, neurons: Some((0..width).rev().collect()) };
        let experts = (0..n).rev().map(|old| NewExpert { parts: vec![part(old)] }).collect();
        let out = work.path().join(format!("{name}-reversed"));
        run(&case(name), &out, &vec![LayerSurgery { experts, router: RouterRule::Rows }; 2]);
        let differs = worst(&logits_of(&out, name), before.iter().copied());
        assert!(differs < 1e-5 && tensors(&out) != tensors(&case(name)), "{name}: {differs}");
    }
}

#[test]
fn equal_experts_may_be_dropped_and_merged_at_will() {
    let work = tempfile::tempdir().unwrap();
    let [from, moe] = ["dense", "moe"].map(|name| work.path().join(name));
    dense(&from, &json!({}));
    upcycle(&from, &moe, &options("mixtral", 5, 2), &mut |_| {}).unwrap();
    let before = logits_of(&moe, "mixtral");
    let all = |router| {
        let merged = NewExpert::merged((0..5).map(|e| (e, 0.2)));
        LayerSurgery { experts: vec![merged], router }
    };
    for (i, layers) in [
        vec![LayerSurgery::keep([1, 2, 4]), LayerSurgery::keep([0, 3])],
        vec![all(RouterRule::Map), all(RouterRule::Map)],
        vec![
            LayerSurgery {
                experts: [0, 1].map(|e| NewExpert::merged([(e, 0.5), (e + 2, 0.5)])).to_vec(),
                ..all(RouterRule::Mean)
            },
            LayerSurgery::keep(0..5),
        ],
    ]
    .iter()
    .enumerate()
    {
        let out = work.path().join(format!("out-{i}"));
        let report = run(&moe, &out, layers);
        // Within a millionth of the largest logit, about ten of its last bits.
        assert_close(&format!("{i}"), &logits_of(&out, "mixtral"), &f64s(&before), 1e-6);
        // d 12, width 9, two layers: what is held and what runs, by hand.
        let config = Config::load(&out).unwrap();
        let experts: usize = layers.iter().map(|layer| layer.experts.len()).sum();
        let gates = if layers[0].router == RouterRule::Map { 10 } else { experts };
        let (expert, non_ffn) = (3 * 12 * 9, Accounting::of(&config).non_ffn);
        assert_eq!(report.total, non_ffn + (experts * expert + gates * 12) as u64, "{i}");
        let running: usize = layers.iter().map(|layer| layer.experts.len().min(2)).sum();
        assert!((report.activated - (non_ffn as f64 + (running * expert + gates * 12) as f64)).abs() < 1e-6);
        // It trains and counts what runs.
        let mut model = Model::load(&out).unwrap();
        let [inputs, targets] = batch(&golden("mixtral").rows);
        let mut grads = Buf::zeros(model.params().len());
        let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
        let batch = Batch { inputs: &inputs, targets: &targets, seq: LENGTH - 1 };
        let step = model.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace).unwrap();
        assert!(step.loss_sum.is_finite() && grads.iter().any(|&g| g != 0.0));
        let mut stats = model.new_stats().unwrap();
        let inference = Inference::load(&out, Precision::F32).unwrap();
        let mut losses = vec![0.0; inputs.len()];
        inference.score(&mut losses, batch, Some(&mut stats), &mut Workspace::default()).unwrap();
        let summary = stats.summary();
        let of_layers: Vec<usize> = layers.iter().map(|layer| layer.experts.len()).collect();
        assert!(summary.load_per_layer.iter().map(Vec::len).eq(of_layers.iter().copied()));
        assert!(summary.active_experts > 0.0 && summary.active_experts <= running as f64 / 2.0);
        // A step along the gradient, saved, is read again.
        model.params_mut().iter_mut().zip(grads.iter()).for_each(|(p, g)| *p -= 1e-3 * g);
        let saved = work.path().join(format!("saved-{i}"));
        fs::create_dir(&saved).unwrap();
        model.save(&saved, Dtype::F32).unwrap();
        assert_eq!(Model::load(&saved).unwrap().params(), model.params());
        // Copies for other programs are refused or exact.
        let native = export(
            &out,
            &work.path().join(format!("native-{i}")),
            &ExportOptions::new(ExportAs::Native),
            &mut |_| {},
        );
        native.unwrap();
        let hf = work.path().join(format!("hf-{i}"));
        let error = export(&out, &hf, &ExportOptions::new(ExportAs::Transformers), &mut |_| {});
        refused(error, &["ffn.type is \"mixture\""]);
    }
}

#[test]
fn dsmoe_loses_experts_and_keeps_its_function() {
    let work = tempfile::tempdir().unwrap();
    let [from, moe, reversed, fewer] =
        ["dense", "dsmoe", "reversed", "fewer"].map(|name| work.path().join(name));
    dense(&from, &json!({}));
    // Nine neurons, in three experts of any order.
    let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(3) };
    convert(&from, &moe, &options, &mut |_| {}).unwrap();
    let before = logits_of(&moe, "mixtral");
    let part = |old| Part { old, weight: 1.0, neurons: Some(vec![2, 0, 1]) };
    let experts = (0..3).rev().map(|old| NewExpert { parts: vec![part(old)] }).collect();
    run(&moe, &reversed, &vec![LayerSurgery { experts, router: RouterRule::Rows }; 2]);
    let differs = worst(&logits_of(&reversed, "mixtral"), before.iter().copied());
    assert!(differs < 1e-5 && tensors(&reversed) != tensors(&moe), "{differs}");
    let report = run(&moe, &fewer, &vec![LayerSurgery::keep([2, 0]); 2]);
    let config = Config::load(&fewer).unwrap();
    assert_eq!((config.num_experts(), config.intermediate, config.model_type()), (Some(2), 6, "dsmoe"));
    assert_eq!(report.total, Accounting::of(&config).total);
    assert!(logits_of(&fewer, "mixtral").iter().all(|z| z.is_finite()));
    // Rows of gate and up, and columns of down, have their bytes.
    let (old, new) = (tensors(&moe), tensors(&fewer));
    for (which, cut) in [("gate", true), ("up", true), ("down", false)] {
        let name = format!("model.layers.1.mlp.{which}_proj.weight");
        let (old, new) = (&old[&name].1, &new[&name].1);
        let expert = |bytes: &[u8], e: usize, n: usize| -> Vec<u8> {
            match cut {
                true => bytes[e * bytes.len() / n..(e + 1) * bytes.len() / n].to_vec(),
                false => {
                    let row = bytes.len() / 12;
                    bytes
                        .chunks_exact(row)
                        .flat_map(|row_of| row_of[e * row / n..(e + 1) * row / n].to_vec())
                        .collect()
                }
            }
        };
        assert!(expert(new, 0, 2) == expert(old, 2, 3) && expert(new, 1, 2) == expert(old, 0, 3), "{name}");
    }
    let out = work.path().join("no");
    let fixed = operate(&moe, &out, (&vec![LayerSurgery::keep([0, 1]); 2], Some(1)), false, &mut |_| {});
    refused(fixed, &["a fixed number of experts for each token"]);
    assert!(!out.exists());
}

/// Two layers of six experts of 4 neurons with random weights, keys of config.json and of its object `dsmoe` added.
pub(crate) fn gated(dir: &Path, moe: &Value, keys: &Value) {
    let mut json = json!({
        "model_type": "dsmoe", "vocab_size": 64, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "rope_theta": 5000.0,
        "dsmoe": {
            "format_version": 2, "num_experts": 6, "threshold": 0.5, "partition": "contiguous", "router_bias": true,
            "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true,
        },
    });
    json["dsmoe"].as_object_mut().unwrap().extend(moe.as_object().unwrap().clone());
    json.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let mut model = Model::new(Config::from_json(Path::new("config.json"), &json.to_string()).unwrap());
    for (i, entry) in model.layout().clone().entries().iter().enumerate() {
        let (mut rng, is_norm) = (Rng::new(7, i as u64), entry.spec.name.contains("norm"));
        for p in &mut model.params_mut()[entry.range.clone()] {
            *p = if is_norm { 1.0 } else { 0.4 * rng.normal() };
        }
    }
    fs::create_dir_all(dir).unwrap();
    model.save(dir, Dtype::F32).unwrap();
}

pub(crate) const RANK: usize = 3;

/// Forms of DSMoE: what stands beside experts, their biases, and layers of another width.
pub(crate) fn forms() -> [(&'static str, Value, Value); 4] {
    let budget = |active: f64, thresholds: [f64; 2]| json!({ "active": active, "thresholds": thresholds });
    let budgets = [budget(0.5, [0.6, 0.4]), budget(0.75, [0.0, -0.1]), budget(1.0, [-30.0, -30.0])];
    let parts = json!({
        "core": [1, 2], "router_rank": RANK, "correction": true, "budgets": budgets, "active_target": 0.5,
    });
    let shape = |neurons: usize| {
        let mut shape = json!({ "num_attention_heads": 2, "num_key_value_heads": 1 });
        shape["intermediate_size"] = json!(neurons);
        shape
    };
    [
        ("plain", json!({ "format_version": 1 }), json!({})),
        ("core-and-budgets", parts, json!({ "output_bias": true })),
        ("biases", json!({ "core": 1, "gate_value": "binary" }), json!({ "mlp_bias": true })),
        ("widths", json!({ "format_version": 1 }), json!({ "layer_shapes": [shape(12), shape(24)] })),
    ]
}

/// Gates of a layer.
pub(crate) fn gates(config: &Config, layer: usize) -> usize {
    config.layer_experts(layer).unwrap() - config.moe.as_ref().unwrap().core(layer)
}

/// Returns an order of an expert's neurons in a layer.
fn turned(config: &Config, layer: usize) -> Vec<u32> {
    let width = (config.layer(layer).intermediate / 6) as u32;
    (0..width).map(|j| (j + 1) % width).collect()
}

#[test]
fn gated_experts_that_all_stay_are_the_same_model_in_any_order() {
    let work = tempfile::tempdir().unwrap();
    for (name, moe, keys) in forms() {
        let dir = work.path().join(name);
        gated(&dir, &moe, &keys);
        let (config, before) = (Config::load(&dir).unwrap(), logits_of(&dir, "mixtral"));
        for router in [RouterRule::Rows, RouterRule::Mean] {
            let out = work.path().join(format!("{name}-{router:?}"));
            let layer = |i| LayerSurgery { router, ..LayerSurgery::keep(0..gates(&config, i)) };
            let report = run(&dir, &out, &[layer(0), layer(1)]);
            assert!(logits_of(&out, "mixtral") == before, "{name} {router:?}");
            assert!(tensors(&out) == tensors(&dir), "{name} {router:?}");
            assert_eq!(Config::load(&out).unwrap().moe, config.moe, "{name} {router:?}");
            assert_eq!(report.total, report.total_before);
        }
        // Experts and their neurons in another order, and their gates with them.
        let layer = |i| {
            let part = |old| Part { old, weight: 1.0, neurons: Some(turned(&config, i)) };
            let experts = (0..gates(&config, i)).rev().map(|old| NewExpert { parts: vec![part(old)] });
            LayerSurgery { experts: experts.collect(), router: RouterRule::Rows }
        };
        let out = work.path().join(format!("{name}-turned"));
        run(&dir, &out, &[layer(0), layer(1)]);
        let differs = worst(&logits_of(&out, "mixtral"), before.iter().copied());
        assert!(differs < 1e-5 && tensors(&out) != tensors(&dir), "{name}: {differs}");
    }
}

/// Shuts gates of every layer, whatever the thresholds.
pub(crate) fn shut(dir: &Path, shut: &[usize]) {
    let mut model = Model::load(dir).unwrap();
    for layer in 0..2 {
        let bias = format!("model.layers.{layer}.mlp.router.bias");
        let range = model.layout().get(&bias).unwrap().range.clone();
        shut.iter().for_each(|&gate| model.params_mut()[range.clone()][gate] = -1e4);
    }
    model.save(dir, Dtype::F32).unwrap();
}

#[test]
fn gated_experts_that_never_open_are_dropped_without_a_trace() {
    let work = tempfile::tempdir().unwrap();
    for (name, moe, keys) in forms() {
        let [dir, out] = [name.to_owned(), format!("{name}-fewer")].map(|name| work.path().join(name));
        gated(&dir, &moe, &keys);
        shut(&dir, &[1, 3]);
        let config = Config::load(&dir).unwrap();
        let layer = |i| LayerSurgery::keep((0..gates(&config, i)).filter(|gate| ![1, 3].contains(gate)));
        let report = run(&dir, &out, &[layer(0), layer(1)]);
        let fewer = Config::load(&out).unwrap();
        assert_eq!(fewer.num_experts(), Some(4), "{name}");
        // What is held, by hand: two experts and their gates less in each layer.
        let moe = config.moe.as_ref().unwrap();
        let gate = 1 + if moe.parts.router_rank.is_some() { RANK } else { 12 };
        let neuron = 3 * 12 + if config.architecture.mlp_bias { 2 } else { 0 };
        let gone = |i| 2 * (config.layer(i).intermediate / 6 * neuron + gate) as u64;
        assert_eq!(report.total, report.total_before - gone(0) - gone(1), "{name}");
        assert_eq!(report.total, Accounting::of(&fewer).total, "{name}");
        // Every budget opens the same experts, and counts them among those that are left.
        let after = fewer.moe.as_ref().unwrap();
        assert_eq!((&after.parts.core, after.parts.correction), (&moe.parts.core, moe.parts.correction));
        assert_eq!(after.active_target.is_some(), !moe.parts.budgets.is_empty());
        let [mut whole, mut left] = [&dir, &out].map(|dir| Inference::load(dir, Precision::F32).unwrap());
        let rows = golden("mixtral").rows;
        assert!(logits(&left, &rows, LENGTH) == logits(&whole, &rows, LENGTH), "{name}");
        for (budget, new) in moe.parts.budgets.iter().zip(&after.parts.budgets) {
            assert_eq!(budget.thresholds, new.thresholds);
            let want = (1.5 + (budget.active * 6.0 - 1.5) / 4.5 * 2.5) / 4.0;
            assert!((new.active - want).abs() < 1e-12, "{new:?}");
            whole.set_active(budget.active).unwrap();
            left.set_active(new.active).unwrap();
            assert!(logits(&left, &rows, LENGTH) == logits(&whole, &rows, LENGTH), "{name} {new:?}");
        }
        // It trains, and what is saved is read again.
        let mut model = Model::load(&out).unwrap();
        let [inputs, targets] = batch(&rows);
        let mut grads = Buf::zeros(model.params().len());
        let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
        let batch = Batch { inputs: &inputs, targets: &targets, seq: LENGTH - 1 };
        let step = model.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace).unwrap();
        assert!(step.loss_sum.is_finite() && grads.iter().any(|&g| g != 0.0), "{name}");
        model.params_mut().iter_mut().zip(grads.iter()).for_each(|(p, g)| *p -= 1e-3 * g);
        let saved = work.path().join(format!("{name}-saved"));
        fs::create_dir(&saved).unwrap();
        model.save(&saved, Dtype::F32).unwrap();
        assert_eq!(Model::load(&saved).unwrap().params(), model.params(), "{name}");
    }
}

#[test]
fn layers_that_are_seen_with_fewer_experts_are_those_of_the_written_model() {
    let work = tempfile::tempdir().unwrap();
    let text: Vec<Vec<u32>> = golden("mixtral").rows;
    for (name, moe, keys) in forms() {
        let [dir, out] = [name.to_owned(), format!("{name}-fewer")].map(|name| work.path().join(name));
        gated(&dir, &moe, &keys);
        let config = Config::load(&dir).unwrap();
        let kept = [0, 1].map(|i| (1..gates(&config, i)).collect::<Vec<_>>());
        let layers = kept.each_ref().map(|kept| LayerSurgery::keep(kept.iter().copied()));
        run(&dir, &out, &layers);
        let mut whole = LayerStream::open_experts(&dir, &text).unwrap();
        let mut fewer = LayerStream::open_experts(&out, &text).unwrap();
        for (i, kept) in kept.iter().enumerate() {
            let stats = [&mut whole, &mut fewer].map(|stream| {
                let (weights, mut experts) = (stream.layer(i).unwrap(), stream.experts(i).unwrap());
                if experts.num_experts() > kept.len() {
                    experts = experts.keep(kept);
                }
                stream.attend(&weights).unwrap();
                let stats = stream.expert_stats(&weights, &experts, true);
                stream.join_experts(&weights, &experts);
                stats
            });
            assert!(stats[0] == stats[1], "{name} layer {i}");
            let [stats, _] = stats;
            assert_eq!(stats.experts.len(), kept.len());
            // The first budget is in use, and the last one opens every gate.
            for sums in stats.experts.iter().filter(|sums| !sums.above.is_empty()) {
                assert_eq!((sums.above[0], sums.above[2]), (sums.hard, stats.tokens as f64), "{name}");
            }
        }
    }
}

#[test]
fn merged_gates_have_the_mean_of_rows_and_biases() {
    let work = tempfile::tempdir().unwrap();
    for (name, moe, keys) in forms() {
        let [dir, out] = [name.to_owned(), format!("{name}-merged")].map(|name| work.path().join(name));
        gated(&dir, &moe, &keys);
        let config = Config::load(&dir).unwrap();
        let layer = |i| {
            let merged = NewExpert::merged([(0, 0.25), (1, 0.75)]);
            let others = (2..gates(&config, i)).map(NewExpert::kept);
            LayerSurgery { experts: [merged].into_iter().chain(others).collect(), router: RouterRule::Mean }
        };
        run(&dir, &out, &[layer(0), layer(1)]);
        let (old, new) = (tensors(&dir), tensors(&out));
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let rows = |name: &str, len: usize, of: usize| {
            let [old, new] = [&old, &new].map(|tensors| floats(&tensors[name].1));
            let mean = |(a, b): (&f32, &f32)| (0.25 * f64::from(*a) + 0.75 * f64::from(*b)) as f32;
            let at = |row: usize| &old[(of + row) * len..][..len];
            let want: Vec<f32> = at(0).iter().zip(at(1)).map(mean).collect();
            assert!(new[..of * len] == old[..of * len], "{name}: what stays before them");
            assert!(new[of * len..][..len] == want, "{name}");
            assert!(new[(of + 1) * len..] == old[(of + 2) * len..], "{name}: what stays behind them");
        };
        for i in 0..2 {
            let (width, core) = (config.layer(i).intermediate / 6, config.moe.as_ref().unwrap().core(i));
            let of = |tensor: &str| format!("model.layers.{i}.mlp.{tensor}");
            rows(&of("router.bias"), 1, 0);
            match config.moe.as_ref().unwrap().parts.router_rank {
                Some(rank) => rows(&of("router.b.weight"), rank, 0),
                None => rows(&of("router.weight"), 12, 0),
            }
            rows(&of("up_proj.weight"), width * 12, core);
            if config.architecture.mlp_bias {
                rows(&of("gate_proj.bias"), width, core);
            }
            for same in ["router.a.weight", "correction.weight", "output_bias", "down_proj.bias"] {
                assert!(old.get(&of(same)) == new.get(&of(same)), "{name}: {same}");
            }
        }
        assert!(logits_of(&out, "mixtral").iter().all(|z| z.is_finite()), "{name}");
    }
}

#[test]
fn budgets_have_the_shares_that_were_measured() {
    let work = tempfile::tempdir().unwrap();
    let [dir, out] = ["core", "fewer"].map(|name| work.path().join(name));
    let [_, (_, moe, keys), ..] = forms();
    gated(&dir, &moe, &keys);
    let layers = [LayerSurgery::keep([0, 2, 4]), LayerSurgery::keep([1, 3])];
    let with = |shares: &[f64]| {
        let surgery = Surgery { shares: Some(shares), ..Surgery::of(&layers) };
        operate_on(alone(), [&dir, &out], surgery, false, &mut |_| {})
    };
    refused(with(&[0.5, 1.0]), &["shares of 2 budgets, and there are 3"]);
    assert!(!out.exists());
    with(&[0.625, 0.875, 1.0]).unwrap();
    let moe = Config::load(&out).unwrap().moe.unwrap();
    let shares: Vec<f64> = moe.parts.budgets.iter().map(|budget| budget.active).collect();
    assert_eq!((shares, moe.active_target), (vec![0.625, 0.875, 1.0], Some(0.625)));
    // Layers with cores of different sizes and as many gates have different numbers of experts.
    let uneven = [LayerSurgery::keep([0, 1, 2]), LayerSurgery::keep([0, 1, 2])];
    let other = work.path().join("other");
    operate(&dir, &other, (&uneven, None), false, &mut |_| {}).unwrap();
    assert_eq!(Config::load(&other).unwrap().moe.unwrap().parts.experts, [4, 5]);
}

#[test]
fn what_surgery_cannot_do_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let [from, out] = ["dense", "out"].map(|name| work.path().join(name));
    dense(&from, &json!({}));
    let keep = |kept: &[usize]| vec![LayerSurgery::keep(kept.iter().copied()); 2];
    let refused_by = |from: &Path, layers: &[LayerSurgery], k: Option<usize>, parts: &[&str]| {
        refused(operate(from, &out, (layers, k), false, &mut |_| {}), parts);
        assert!(!out.exists());
    };
    refused_by(&from, &keep(&[0]), None, &["model_type is \"llama\", which has no experts", "as mixtral"]);
    refused_by(&case("mixtral"), &keep(&[0]), None, &["2 experts of a token are more than the 1 gates"]);
    refused_by(&case("mixtral"), &keep(&[0, 1]), Some(3), &["3 experts of a token", "the 2 gates"]);
    refused_by(&case("mixtral"), &keep(&[0, 1, 2, 3, 4]), None, &["layer 0", "expert 4, and there are 4"]);
    refused_by(&case("mixtral"), &keep(&[0, 1])[..1], None, &["surgery of 1 layers, and there are 2"]);
    let mixed = [merged(&surgery_case("mixtral")).remove(0), LayerSurgery::keep([0, 1])];
    refused_by(&case("mixtral"), &mixed, None, &["all gates of some layers only"]);
}

#[test]
fn wrong_descriptions_of_experts_are_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let [dir, source] = ["m", "merged"].map(|name| work.path().join(name));
    run(&case("mixtral"), &source, &merged(&surgery_case("mixtral")));
    let text = fs::read_to_string(source.join("config.json")).unwrap();
    let ffn = serde_json::from_str::<Value>(&text).unwrap()["ffn"].clone();
    fs::create_dir(&dir).unwrap();
    fs::copy(source.join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    for (key, value, parts) in [
        ("num_experts", json!(4), vec!["ffn.expert_map is wrong in layer 0", "expert 3"]),
        ("num_experts", json!(0), vec!["ffn.num_experts is 0"]),
        ("expert_width", json!(8), vec!["experts.0.gate_proj.weight has shape [9, 12]"]),
        ("expert_width", json!(1 << 24), vec!["ffn.expert_width is 16777216", "3 experts"]),
        ("top_k", json!(5), vec!["ffn.top_k is 5 and a layer has 4 gates", "1 to 4"]),
        ("top_k", json!(0), vec!["ffn.top_k is 0"]),
        ("balance_weight", json!(-1), vec!["ffn.balance_weight is -1"]),
        ("shared_width", json!(3), vec!["ffn.shared_width is present", "no shared expert"]),
        (
            "experts_per_layer",
            json!([3]),
            vec!["ffn.experts_per_layer has 1 entries", "num_hidden_layers is 2"],
        ),
        (
            "experts_per_layer",
            json!([3, 4]),
            vec!["ffn.experts_per_layer is 4 for layer 1", "1 to num_experts, 3"],
        ),
        ("experts_per_layer", json!([2, 2]), vec!["ffn.num_experts is 3 and no entry"]),
        ("experts_per_layer", json!([3, 2]), vec!["expert_map is wrong in layer 1"]),
        ("expert_map", json!([[0, 1, 2, 0]]), vec!["ffn.expert_map has 1 lists"]),
        (
            "expert_map",
            json!([[0, 1, 2, 0], [0, 1, 3, 0]]),
            vec!["ffn.expert_map is wrong in layer 1", "below 3"],
        ),
        (
            "expert_map",
            json!([[0, 1, 1, 0], [0, 1, 2, 0]]),
            vec!["ffn.expert_map is wrong in layer 0", "expert 2"],
        ),
        ("expert_map", json!([[0, 1, 2], [0, 1, 2]]), vec!["gate.weight has shape [4, 12]"]),
        ("extra", json!(1), vec!["ffn is not of type mixture", "extra"]),
        ("type", json!("topk"), vec!["base_model_type is \"mixtral\", whose FFNs are experts already"]),
    ] {
        let mut json: Value = serde_json::from_str(&text).unwrap();
        json["ffn"][key] = value;
        fs::write(dir.join("config.json"), json.to_string()).unwrap();
        let of_file = (!parts[0].contains("has shape")).then_some("config.json");
        let all: Vec<&str> = parts.into_iter().chain(of_file).collect();
        refused(Inference::load(&dir, Precision::F32), &all);
    }
    assert!(ffn["expert_map"].is_array());
    // The format of the family has none of this.
    changed("mixtral", &dir, &[("ffn", ffn)]);
    refused(Inference::load(&dir, Precision::F32), &["ffn is present but model_type is not dsmoe"]);
}
