//! Methods that change the experts of mixtures, on the tiny mixtures that transformers wrote: what they choose, and the logits of
//! transformers' model with the same experts.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::LayerStream;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::MixtureSpec;
use dsmoe_core::convert::{ConvertOptions, UpcycleOptions, convert, upcycle};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule, operate};
use dsmoe_core::{Config, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::assert_close;
use serde_json::{Value, json};

use crate::common::{Run, VOCAB, loaded, made, tiny, tokens};

const MIXTURES: [&str; 4] = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"];
/// The largest difference of a logit from that of transformers without the experts that go.
const TOLERANCE: f64 = 1e-4;
/// The same with copies of merged experts, of the largest logit.
const OF_MERGED: f64 = 1e-5;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dsmoe-core/tests/data/moe").join(name)
}

fn logits(dir: &Path, ids: &[u32]) -> Vec<f32> {
    crate::common::logits(&loaded(dir), ids)
}

fn stored(name: &str, file: &str) -> Value {
    serde_json::from_slice(&fs::read(case(name).join(file)).unwrap()).unwrap()
}

fn list<T: serde::de::DeserializeOwned>(json: &Value) -> Vec<T> {
    serde_json::from_value(json.clone()).unwrap()
}

fn mixture(dir: &Path) -> MixtureSpec {
    Config::load(dir).unwrap().mixture().unwrap().clone()
}

/// The budget of `experts` experts in every layer of a case, with all gates or with theirs alone.
fn budget(name: &str, experts: usize, keeps_gates: bool) -> Budget {
    let config = Config::load(&case(name)).unwrap();
    let spec = config.mixture().unwrap();
    let fewer: usize = spec.experts.iter().map(|held| held - experts).sum();
    let gates = if keeps_gates { 0 } else { fewer * config.hidden };
    Budget::Params(
        (Accounting::of(&config).total as usize - fewer * 3 * config.hidden * spec.width - gates) as f64,
    )
}

fn of_golden(name: &str, dir: &Path, key: &str) {
    let want: Vec<f64> = list(&stored(name, "surgery.json")[key]);
    let ids: Vec<Vec<u32>> = list(&stored(name, "golden.json")["ids"]);
    let found: Vec<f32> = ids.iter().flat_map(|ids| logits(dir, ids)).collect();
    let scale = want.iter().fold(1.0f64, |most, z| most.max(z.abs()));
    let tolerance = if key == "logits" { OF_MERGED } else { TOLERANCE / scale };
    assert_close(&format!("{name} {key}"), &found, &want, tolerance);
}

fn run<'a>(method: &'a str, set: &'a [&'a str], budget: Budget, text: &'a [Vec<u32>]) -> Run<'a> {
    Run { budget, ..Run::new(method, set, 1.0, text) }
}

fn calibration(name: &str) -> Vec<Vec<u32>> {
    list(&stored(name, "surgery.json")["calibration"])
}

#[test]
fn hc_smoe_finds_the_groups_of_scipy_and_has_the_logits_of_transformers() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let (golden, text, out) = (stored(name, "surgery.json"), calibration(name), work.path().join(name));
        let made = run("hc-smoe", &[], budget(name, 3, true), &text).run(&case(name), &out).unwrap();
        let spec = mixture(&out);
        for (layer, want) in golden["layers"].as_array().unwrap().iter().enumerate() {
            assert_eq!(
                spec.map(layer).unwrap().of_gates(),
                list::<u32>(&want["map"]),
                "{name} layer {layer}"
            );
        }
        of_golden(name, &out, "logits");
        assert_eq!(made.plan.total, Accounting::of(&Config::load(&out).unwrap()).total as f64);
        // All experts kept is the same function, and other settings merge otherwise.
        let n = spec.map(0).unwrap().num_gates();
        let all = work.path().join(format!("{name}-all"));
        run("hc-smoe", &[], budget(name, n, true), &text).run(&case(name), &all).unwrap();
        let ids: Vec<Vec<u32>> = list(&stored(name, "golden.json")["ids"]);
        assert_eq!(logits(&all, &ids[0]), logits(&case(name), &ids[0]), "{name}");
        for (i, set) in [
            &["vectors=weights", "alignment=weights"][..],
            &["vectors=routed-outputs", "distance=cosine", "linkage=complete"],
            &["vectors=router-logits", "linkage=ward", "merge=average"],
            &["vectors=random", "merge=dominant", "allocation=global", "linkage=single"],
        ]
        .into_iter()
        .enumerate()
        {
            let out = work.path().join(format!("{name}-{i}"));
            let made = run("hc-smoe", set, budget(name, 3, true), &text).run(&case(name), &out).unwrap();
            assert_eq!(mixture(&out).experts.iter().sum::<usize>(), 6, "{name} {set:?}");
            assert!(made.plan.total <= budget(name, 3, true).params(0));
            assert!(logits(&out, &ids[0]).iter().all(|z| z.is_finite()));
        }
    }
}

#[test]
fn seer_moe_drops_what_runs_least_and_has_the_logits_of_transformers() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let (text, n) = (calibration(name), mixture(&case(name)).experts[0]);
        let wanted = budget(name, n - 1, false);
        for (i, set) in [&[][..], &["rounds=each"]].into_iter().enumerate() {
            let out = work.path().join(format!("{name}-{i}"));
            run("seer-moe", set, wanted, &text).run(&case(name), &out).unwrap();
            of_golden(name, &out, "logits_of_kept");
            assert_eq!(Config::load(&out).unwrap().model_type(), name);
        }
        for set in [
            &["score=soft", "allocation=global"][..],
            &["score=reap"],
            &["score=random"],
            &["score=mean-norm"],
        ] {
            let out = work.path().join(format!("{name}-{}", set[0]));
            run("seer-moe", set, wanted, &text).run(&case(name), &out).unwrap();
            assert_eq!(mixture(&out).experts.iter().sum::<usize>(), 2 * (n - 1), "{name} {set:?}");
        }
    }
    // Two rounds of one layer's experts each: as many are left as at once.
    let (text, out) = (calibration("qwen3_moe"), work.path().join("rounds"));
    for set in [&["rounds=each"][..], &["rounds=each", "allocation=global", "score=ean"]] {
        let job = Run { force: true, ..run("seer-moe", set, budget("qwen3_moe", 3, false), &text) };
        job.run(&case("qwen3_moe"), &out).unwrap();
        let experts = mixture(&out).experts;
        assert!(experts.iter().sum::<usize>() == 6 && experts.iter().all(|&r| r >= 2), "{experts:?}");
    }
}

#[test]
fn seer_moe_drops_experts_of_dsmoe_as_if_they_gave_nothing() {
    let work = tempfile::tempdir().unwrap();
    let [moe, zeroed, out] = ["moe", "zeroed", "out"].map(|name| work.path().join(name));
    let text = tokens(4, 24);
    let dense = made(&tiny(&json!({ "vocab_size": VOCAB })), work.path(), Dtype::F32);
    convert(&dense, &moe, &ConvertOptions::new(4), &mut |_| {}).unwrap();
    let config = Config::load(&moe).unwrap();
    let (hidden, width) = (config.hidden, config.intermediate / 4);
    let moe_config = config.moe.clone().unwrap();
    let gate = hidden + usize::from(moe_config.router_bias);
    let total = Accounting::of(&config).total as usize;
    let fewer = Budget::Params((total - config.num_layers * (3 * hidden * width + gate)) as f64);
    // The experts that are dropped give nothing in another copy.
    let mut model = Model::load(&moe).unwrap();
    let mut stream = LayerStream::open_experts(&moe, &text).unwrap();
    for layer in 0..config.num_layers {
        let (weights, experts) = (stream.layer(layer).unwrap(), stream.experts(layer).unwrap());
        stream.attend(&weights).unwrap();
        let stats = stream.expert_stats(&weights, &experts, false);
        let hard = |e: usize| stats.experts[e].hard;
        let least = (0..4).rev().min_by(|&a, &b| hard(a).total_cmp(&hard(b))).unwrap();
        let down = 2 * 4 * width * hidden;
        let (_, params) = model.ffn_mut(layer);
        params[down + least * width * hidden..][..width * hidden].fill(0.0);
        stream.join_experts(&weights, &experts);
    }
    fs::create_dir(&zeroed).unwrap();
    model.save(&zeroed, Dtype::F32).unwrap();
    let result = run("seer-moe", &[], fewer, &text).run(&moe, &out).unwrap();
    let after = Config::load(&out).unwrap();
    assert_eq!((result.plan.total, after.num_experts()), (fewer.params(0), Some(3)));
    let [a, b] = [&zeroed, &out].map(|dir| logits(dir, &text[0]));
    let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(worst < 1e-5, "{worst}");
    // Once is each round where one goes.
    let again = work.path().join("again");
    run("seer-moe", &["rounds=each"], fewer, &text).run(&moe, &again).unwrap();
    assert_eq!(logits(&again, &text[0]), b);
    run("hc-smoe", &[], fewer, &text).fails(&moe, &zeroed, &["no variants of each other"]);
}

/// The budget of `gone` experts less in each layer of a DSMoE or a top-k model, with their gates.
fn without(config: &Config, gone: usize) -> Budget {
    let setting = |key: &str| config.ffn.as_ref().and_then(|spec| spec.settings().get(key).cloned());
    let gate = match setting("gate").as_ref().and_then(Value::as_str) {
        None => {
            let moe = config.moe.as_ref().unwrap();
            moe.parts.router_rank.unwrap_or(config.hidden) + usize::from(moe.router_bias)
        }
        // The first matrix stays.
        Some("mlp") => {
            let rows = setting("gate_hidden").or_else(|| setting("num_experts"));
            rows.and_then(|rows| rows.as_u64()).unwrap() as usize
        }
        Some("linear") => config.hidden + usize::from(setting("bias").is_some()),
        Some(_) => 2 * config.hidden,
    };
    let expert = 3 * config.hidden * config.intermediate / config.num_experts().unwrap();
    let gone = gone * config.num_layers * (expert + gate);
    Budget::Params((Accounting::of(config).total as usize - gone) as f64)
}

/// A dense model of two layers of 96 neurons.
/// Methods with their settings: gates of two matrices with noise, of one, of neurons beside an expert that all tokens run, and with
/// a bias.
const TOP_K: [(&str, &[&str]); 4] = [
    ("llama-moe", &[]),
    ("random-k", &[]),
    ("cmoe", &["experts=8"]),
    ("factorllm", &["epochs=1", "experts=8"]),
];

fn dense(dir: &Path) -> PathBuf {
    dsmoe_baselines::register();
    let sizes = json!({ "vocab_size": VOCAB, "intermediate_size": 96, "num_hidden_layers": 2 });
    made(&tiny(&sizes), dir, Dtype::F32)
}

#[test]
fn top_k_models_lose_experts_that_are_never_chosen_without_a_trace() {
    let work = tempfile::tempdir().unwrap();
    let source = dense(work.path());
    let text = tokens(16, 24);
    let few = [text[0][..2].to_vec()];
    for (method, set) in TOP_K {
        let [moe, out, fewer] = ["", "-out", "-fewer"].map(|end| work.path().join(format!("{method}{end}")));
        Run::new(method, set, 0.7, &text).run(&source, &moe).unwrap();
        let config = Config::load(&moe).unwrap();
        let (experts, k) = (config.num_experts().unwrap(), config.ffn.as_ref().unwrap().top_k().unwrap());
        assert!(2 * k <= experts - 3, "{method}: {k} of {experts}");
        // Two tokens leave at least two experts of each layer without one.
        let budget = without(&config, 2);
        let result = run("seer-moe", &[], budget, &few).run(&moe, &out).unwrap();
        let after = Config::load(&out).unwrap();
        assert_eq!(after.num_experts(), Some(experts - 2), "{method}");
        assert_eq!(after.ffn.as_ref().unwrap().top_k(), Some(k), "{method}");
        assert_eq!(result.plan.total, budget.params(0), "{method}");
        assert_eq!(result.plan.total, Accounting::of(&after).total as f64, "{method}");
        assert_eq!(logits(&out, &few[0]), logits(&moe, &few[0]), "{method}");
        let of = |config: &Config, key: &str| config.ffn.as_ref().unwrap().settings().get(key).cloned();
        for key in ["num_residual", "score_scale", "gate", "noise"] {
            assert_eq!(of(&after, key), of(&config, key), "{method} {key}");
        }
        // A gate of two matrices keeps the first, once and again.
        let rows = (method == "llama-moe").then(|| json!(experts));
        assert_eq!(of(&after, "gate_hidden"), rows, "{method}");
        for (other, set) in [("seer-moe", &["rounds=each", "score=ean"][..]), ("uncurl", &["router=mean"])] {
            let budget = without(&after, 2);
            let job = Run { force: true, ..run(other, set, budget, &text) };
            let result = job.run(&out, &fewer).unwrap();
            assert_eq!(result.plan.total, budget.params(0), "{method} {other}");
            let least = Config::load(&fewer).unwrap();
            assert_eq!(least.num_experts(), Some(experts - 4), "{method} {other}");
            assert_eq!(of(&least, "gate_hidden"), rows, "{method} {other}");
            assert!(logits(&fewer, &text[0]).iter().all(|z| z.is_finite()), "{method} {other}");
            // It loads for training and is saved as it is.
            let saved = work.path().join("saved");
            fs::create_dir_all(&saved).unwrap();
            Model::load(&fewer).unwrap().save(&saved, Dtype::F32).unwrap();
            assert_eq!(logits(&saved, &text[0]), logits(&fewer, &text[0]), "{method} {other}");
        }
        let none = work.path().join("none");
        run("hc-smoe", &[], Budget::Share(0.9), &text).fails(&moe, &none, &["no variants of each other"]);
        let layers = vec![LayerSurgery::keep(0..k - 1); 2];
        if k > 1 {
            let none = work.path().join("none");
            let error = operate(&moe, &none, (&layers, None), false, &mut |_| {}).unwrap_err().to_string();
            assert!(error.contains("experts of a token are more than") && !none.exists(), "{error}");
        }
        let theirs = work.path().join(format!("{method}-theirs"));
        let exported = dsmoe_baselines::llama_moe::export(&out, &theirs, None, false, &mut |_| {});
        match method {
            "random-k" => {
                // Each projection of both layers becomes one of each expert.
                let whole = crate::common::tensors(&out).len();
                assert_eq!(exported.unwrap().tensors, whole + 2 * 3 * (experts - 3));
            }
            "llama-moe" => assert!(exported.unwrap_err().to_string().contains("ffn.gate_hidden is 8")),
            _ => assert!(exported.is_err(), "{method}"),
        }
    }
}

#[test]
fn experts_in_any_order_are_the_same_top_k_model() {
    let work = tempfile::tempdir().unwrap();
    let (source, text) = (dense(work.path()), tokens(16, 24));
    for (method, set) in [("llama-moe", &[][..]), ("cmoe", &["experts=8"])] {
        let [moe, same, turned] =
            ["", "-same", "-turned"].map(|end| work.path().join(format!("{method}{end}")));
        Run::new(method, set, 0.8, &text).run(&source, &moe).unwrap();
        let config = Config::load(&moe).unwrap();
        let settings = config.ffn.as_ref().unwrap().settings();
        let [gates, residual] = ["num_experts", "num_residual"].map(|key| settings[key].as_u64().unwrap());
        assert!(gates + residual == 8 && (residual > 0) == (method == "cmoe"), "{gates} and {residual}");
        let gates = gates as usize;
        let layers = vec![LayerSurgery::keep(0..gates); 2];
        operate(&moe, &same, (&layers, None), false, &mut |_| {}).unwrap();
        assert!(crate::common::tensors(&same) == crate::common::tensors(&moe), "{method}");
        assert_eq!(Config::load(&same).unwrap().ffn, config.ffn, "{method}");
        assert_eq!(logits(&same, &text[0]), logits(&moe, &text[0]), "{method}");
        let part = |old| Part { old, weight: 1.0, neurons: Some((0..12).rev().collect()) };
        let experts: Vec<NewExpert> =
            (0..gates).rev().map(|old| NewExpert { parts: vec![part(old)] }).collect();
        let layer = LayerSurgery { experts, router: RouterRule::Rows };
        operate(&moe, &turned, (&[layer.clone(), layer], None), false, &mut |_| {}).unwrap();
        let [a, b] = [&moe, &turned].map(|dir| logits(dir, &text[0]));
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        assert!(worst < 1e-5, "{method}: {worst}");
        // Gates that all keep their own experts share none.
        let mapped = work.path().join(format!("{method}-mapped"));
        let layer = LayerSurgery { router: RouterRule::Map, ..LayerSurgery::keep(0..gates) };
        operate(&moe, &mapped, (&[layer.clone(), layer], None), false, &mut |_| {}).unwrap();
        assert_eq!(Config::load(&mapped).unwrap().ffn, config.ffn, "{method}");
        assert!(crate::common::tensors(&mapped) == crate::common::tensors(&moe), "{method}");
    }
}

/// The experts of both layers that a token of `text` runs on average, the core among them.
fn opened(dir: &Path, text: &[Vec<u32>]) -> f64 {
    let config = Config::load(dir).unwrap();
    let mut stream = LayerStream::open_experts(dir, text).unwrap();
    let mut open = 0.0;
    for layer in 0..2 {
        let (weights, experts) = (stream.layer(layer).unwrap(), stream.experts(layer).unwrap());
        stream.attend(&weights).unwrap();
        let stats = stream.expert_stats(&weights, &experts, false);
        let hard: f64 = stats.experts.iter().map(|sums| sums.hard).sum();
        open += config.moe.as_ref().unwrap().core(layer) as f64 + hard / stats.tokens as f64;
        stream.join_experts(&weights, &experts);
    }
    open
}

#[test]
fn layers_of_top_k_models_keep_different_numbers_of_experts() {
    let work = tempfile::tempdir().unwrap();
    let source = dense(work.path());
    let text = tokens(16, 24);
    let few = [text[0][..2].to_vec()];
    for (method, set) in TOP_K {
        let [moe, out, saved, even] =
            ["", "-out", "-saved", "-even"].map(|end| work.path().join(format!("{method}{end}")));
        Run::new(method, set, 0.7, &text).run(&source, &moe).unwrap();
        let config = Config::load(&moe).unwrap();
        let (before, experts) = (Accounting::of(&config), config.num_experts().unwrap());
        let one = (before.total as f64 - without(&config, 1).params(0)) / 2.0;
        // Two tokens leave at least two experts of each layer without one.
        let budget = Budget::Params(before.total as f64 - 3.0 * one);
        let result = run("seer-moe", &["allocation=global"], budget, &few).run(&moe, &out).unwrap();
        let after = Config::load(&out).unwrap();
        let left = [0, 1].map(|layer| after.layer_experts(layer).unwrap());
        assert!(left[0] + left[1] == 2 * experts - 3 && left[0] != left[1], "{method}: {left:?}");
        assert_eq!(after.num_experts(), left.into_iter().max(), "{method}");
        let counts = Accounting::of(&after);
        assert_eq!(
            (result.plan.total, counts.total as f64),
            (budget.params(0), budget.params(0)),
            "{method}"
        );
        // A token runs as many experts as before, beside fewer gates.
        let rest = |counts: &Accounting| counts.activated(0.0) - counts.router as f64;
        assert!((rest(&counts) - rest(&before)).abs() < 1e-6, "{method}");
        assert_eq!(logits(&out, &few[0]), logits(&moe, &few[0]), "{method}");
        let stats = loaded(&out).new_stats().unwrap();
        assert_eq!(stats.summary().load_per_layer.iter().map(Vec::len).collect::<Vec<_>>(), left, "{method}");
        // It trains: as the model of all experts does where gates have no noise.
        let [whole, model] = [&moe, &out].map(|dir| Model::load(dir).unwrap());
        let batch = Batch { inputs: &few[0][..1], targets: &few[0][1..], seq: 1 };
        let args = StepArgs { loss_scale: 1.0, balance_scale: 0.0, ..StepArgs::default() };
        let [all, some] = [&whole, &model].map(|model| {
            let mut grads = Buf::zeros(model.params().len());
            let mut workspace = TrainWorkspace::new(model, 1, Precision::F32);
            let step = model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
            assert!(step.loss_sum.is_finite() && grads.iter().all(|g| g.is_finite()), "{method}");
            grads
        });
        assert!(some.iter().any(|&g| g != 0.0), "{method}");
        for entry in model.layout().entries().iter().filter(|_| !["llama-moe", "random-k"].contains(&method))
        {
            let old = whole.layout().get(&entry.spec.name).unwrap();
            if old.spec.shape == entry.spec.shape {
                let want: Vec<f64> = all[old.range.clone()].iter().map(|&g| f64::from(g)).collect();
                assert_close(
                    &format!("{method} {}", entry.spec.name),
                    &some[entry.range.clone()],
                    &want,
                    1e-5,
                );
            }
        }
        fs::create_dir(&saved).unwrap();
        model.save(&saved, Dtype::F32).unwrap();
        assert!(crate::common::tensors(&saved) == crate::common::tensors(&out), "{method}");
        assert_eq!(Config::load(&saved).unwrap().ffn, after.ffn, "{method}");
        // Fewer experts of a token are of all layers.
        let mut lower = after.clone();
        lower.lower_top_k(1).unwrap();
        let lower = lower.ffn.unwrap();
        assert_eq!((lower.top_k(), lower.num_experts(0), lower.num_experts(1)), (Some(1), left[0], left[1]));
        // Formats of other programs have as many experts in every layer.
        let none = work.path().join("none");
        let refused = export(&out, &none, &ExportOptions::new(ExportAs::Transformers), &mut |_| {});
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("ffn.experts_per_layer") && !none.exists(), "{refused}");
        assert!(dsmoe_baselines::llama_moe::export(&out, &none, None, false, &mut |_| {}).is_err());
        export(&out, &none, &ExportOptions::new(ExportAs::Native), &mut |_| {}).unwrap();
        fs::remove_dir_all(&none).unwrap();
        // As many again in every layer are settings without the key.
        let residual = experts - gates_of(&config);
        let fewest = *left.iter().min().unwrap() - residual;
        let layers = vec![LayerSurgery::keep(0..fewest); 2];
        operate(&out, &even, (&layers, None), false, &mut |_| {}).unwrap();
        let even = Config::load(&even).unwrap().ffn.unwrap();
        assert!(even.settings().get("experts_per_layer").is_none(), "{method}");
        let mut wrong: Value = serde_json::from_str(&after.to_json()).unwrap();
        let k = after.ffn.as_ref().unwrap().top_k().unwrap();
        for (key, value, part) in [
            ("top_k", json!(fewest + 1), format!("ffn.top_k is {} and a layer has {fewest}", fewest + 1)),
            ("experts_per_layer", json!([k]), "ffn.experts_per_layer has 1 entries".to_owned()),
        ] {
            wrong["ffn"][key] = value;
            let error =
                Config::from_json(Path::new("config.json"), &wrong.to_string()).unwrap_err().to_string();
            assert!(error.contains(&part), "{method}: {error}");
            wrong["ffn"]["top_k"] = json!(k);
        }
    }
}

/// The experts of every layer that have a gate.
fn gates_of(config: &Config) -> usize {
    config.ffn.as_ref().unwrap().settings()["num_experts"].as_u64().unwrap() as usize
}

#[test]
fn seer_moe_leaves_the_core_and_measures_the_budgets() {
    let work = tempfile::tempdir().unwrap();
    let (source, text) = (dense(work.path()), tokens(24, 40));
    let [moe, out, merged] = ["moe", "out", "merged"].map(|name| work.path().join(name));
    Run::new("dsmoe", &["routers=fitted", "experts=8"], 0.8, &text).run(&source, &moe).unwrap();
    let config = Config::load(&moe).unwrap();
    let before = config.moe.as_ref().unwrap();
    assert!(before.parts.budgets.len() > 1 && before.parts.core.iter().any(|&core| core > 0), "{before:?}");
    let budget = without(&config, 1);
    let result = run("seer-moe", &[], budget, &text).run(&moe, &out).unwrap();
    let after = Config::load(&out).unwrap();
    assert_eq!(result.plan.total, budget.params(0));
    assert_eq!(result.plan.total, Accounting::of(&after).total as f64);
    let moe_after = after.moe.as_ref().unwrap();
    assert_eq!((moe_after.router.num_experts, &moe_after.parts.core), (7, &before.parts.core));
    // The budget in use opens on the same text the share that it says.
    let share = moe_after.active_target.unwrap();
    let open = opened(&out, &text) / 14.0;
    assert!((open - share).abs() < 0.05, "{open} opened of {share}");
    for new in &moe_after.parts.budgets {
        assert!(before.parts.budgets.iter().any(|old| old.thresholds == new.thresholds), "{new:?}");
    }
    // One expert of the whole model less.
    let uneven = work.path().join("uneven");
    let total = Accounting::of(&config).total as f64;
    let fewer = Budget::Params(total - (total - budget.params(0)) / 2.0);
    let result = run("seer-moe", &["allocation=global"], fewer, &text).run(&moe, &uneven).unwrap();
    let after = Config::load(&uneven).unwrap();
    assert_eq!(result.plan.total, fewer.params(0));
    assert_eq!(result.plan.total, Accounting::of(&after).total as f64);
    let mut left = [0, 1].map(|layer| after.layer_experts(layer).unwrap());
    left.sort_unstable();
    assert_eq!(left, [7, 8]);
    let after = after.moe.as_ref().unwrap();
    assert_eq!((after.router.num_experts, &after.parts.core), (8, &before.parts.core));
    let (open, share) = (opened(&uneven, &text) / 15.0, after.active_target.unwrap());
    assert!((open - share).abs() < 0.05, "{open} opened of {share}");
    // Gates are merged where that is asked for.
    let result = run("uncurl", &["router=mean"], budget, &text).run(&moe, &merged).unwrap();
    assert_eq!(result.plan.total, budget.params(0));
    assert!(logits(&merged, &text[0]).iter().all(|z| z.is_finite()));
    // Where all gates stay, budgets have the thresholds that they had.
    let mapped = work.path().join("mapped");
    let experts = 3.0 * (config.hidden * config.intermediate / 8 * 2) as f64;
    let all_gates = Budget::Params(total - experts);
    let result = run("uncurl", &[], all_gates, &text).run(&moe, &mapped).unwrap();
    assert_eq!(result.plan.total, all_gates.params(0));
    let after = Config::load(&mapped).unwrap().moe.unwrap();
    let gates = [0, 1].map(|layer| after.map(layer).unwrap().num_gates());
    assert_eq!(gates, [0, 1].map(|layer| 8 - before.core(layer)));
    assert_eq!(after.parts.budgets.len(), before.parts.budgets.len());
    for (new, old) in after.parts.budgets.iter().zip(&before.parts.budgets) {
        assert_eq!(new.thresholds, old.thresholds);
    }
    assert!(logits(&mapped, &text[0]).iter().all(|z| z.is_finite()));
    // The other kind of FFN has no gates of experts.
    let duo = work.path().join("duo");
    Run::new("duo", &[], 0.8, &text).run(&source, &duo).unwrap();
    let none = work.path().join("none");
    for method in ["seer-moe", "hc-smoe", "uncurl"] {
        run(method, &[], Budget::Share(0.9), &text).fails(&duo, &none, &["cannot be changed one by one"]);
    }
    let layers = vec![LayerSurgery::keep([0]); 2];
    let error = operate(&duo, &none, (&layers, None), false, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("experts of type duo, which cannot be changed one by one"), "{error}");
}

#[test]
fn a_merge_with_alignment_does_not_depend_on_the_order_of_neurons() {
    let work = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen3_moe"] {
        let (text, spec, permuted) = (calibration(name), mixture(&case(name)), work.path().join(name));
        let (n, width) = (spec.experts[0], spec.width);
        let expert = |old: usize| {
            let neurons = (0..width).map(|j| ((2 * j + old) % width) as u32).collect::<Vec<_>>();
            let mut order: Vec<u32> = neurons;
            if width % 2 == 0 {
                order = (0..width).map(|j| ((3 * j + old) % width) as u32).collect();
            }
            NewExpert { parts: vec![Part { old, weight: 1.0, neurons: Some(order) }] }
        };
        let layer = LayerSurgery { experts: (0..n).map(expert).collect(), router: RouterRule::Rows };
        operate(&case(name), &permuted, (&[layer.clone(), layer], None), false, &mut |_| {}).unwrap();
        let ids: Vec<Vec<u32>> = list(&stored(name, "golden.json")["ids"]);
        let of = |set: &[&str], label: &str| {
            let [a, b] = [case(name), permuted.clone()].map(|from| {
                let out = work.path().join("out");
                let job = Run { force: true, ..run("uncurl", set, budget(name, 3, true), &text) };
                job.run(&from, &out).unwrap();
                logits(&out, &ids[0])
            });
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            (worst, format!("{name} {label}: {worst}"))
        };
        let (worst, text) = of(&[], "aligned");
        assert!(worst < 1e-4, "{text}");
        let (worst, text) = of(&["alignment=none"], "as they are");
        assert!(worst > 1e-2, "{text}");
        for set in [&["affinity=cosine", "router=mean"][..], &["affinity=coactivation"]] {
            let (worst, text) = of(set, set[0]);
            assert!(worst < 1e-4, "{text}");
        }
    }
}

/// Copies of one FFN whose neurons lie in another order each: a merge of some gives one of them back.
#[test]
fn experts_that_differ_in_the_order_of_neurons_merge_into_one_of_them() {
    let work = tempfile::tempdir().unwrap();
    let (source, text) = (dense(work.path()), tokens(4, 24));
    let [moe, permuted, out] = ["moe", "permuted", "out"].map(|name| work.path().join(name));
    let family = "mixtral".to_owned();
    let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 1, force: false };
    upcycle(&source, &moe, &options, &mut |_| {}).unwrap();
    let (config, spec) = (Config::load(&moe).unwrap(), mixture(&moe));
    // 5 and the width have no common divisor.
    let order =
        |old: usize| (0..spec.width).map(|j| ((5 * j + 7 * old) % spec.width) as u32).collect::<Vec<u32>>();
    let expert = |old| NewExpert { parts: vec![Part { old, weight: 1.0, neurons: Some(order(old)) }] };
    let layer = LayerSurgery { experts: (0..4).map(expert).collect(), router: RouterRule::Rows };
    operate(&moe, &permuted, (&[layer.clone(), layer], None), false, &mut |_| {}).unwrap();
    let gone = 2 * 2 * (3 * config.hidden * spec.width + config.hidden);
    let half = Budget::Params((Accounting::of(&config).total as usize - gone) as f64);
    // The largest distance of a merged expert from the one of the source that is nearest to it.
    let farthest = |set: &[&str]| {
        let job = Run { force: true, ..run("uncurl", set, half, &text) };
        let made = job.run(&permuted, &out).unwrap();
        let [before, after] = [&permuted, &out].map(|dir| LayerStream::open_experts(dir, &[]).unwrap());
        let mut most = 0.0f32;
        for layer in 0..2 {
            let (before, after) = (before.experts(layer).unwrap(), after.experts(layer).unwrap());
            assert_eq!((before.num_experts(), after.num_experts()), (4, 2));
            for new in 0..2 {
                let new = after.rows(new).concat();
                let distance = |old: usize| {
                    let off = before.rows(old).concat();
                    off.iter().zip(&new).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max)
                };
                most = most.max((0..4).map(distance).fold(f32::INFINITY, f32::min));
            }
        }
        (most, made)
    };
    let (most, made) = farthest(&["router=mean"]);
    assert!(most < 1e-7, "{most}");
    let moved = made.measured.iter().find(|(name, _)| name == "experts whose neurons moved");
    assert_eq!(moved.unwrap().1, 4.0, "two of four experts of each layer join another");
    let (most, _) = farthest(&["router=mean", "alignment=none"]);
    assert!(most > 1e-2, "{most}");
}

#[test]
fn merged_mixtures_are_cut_again() {
    let work = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen3_moe"] {
        let (text, merged) = (calibration(name), work.path().join(name));
        run("hc-smoe", &[], budget(name, 3, true), &text).run(&case(name), &merged).unwrap();
        let (config, before) = (Config::load(&merged).unwrap(), mixture(&merged));
        let gates = |spec: &MixtureSpec| [0, 1].map(|layer| spec.gates(layer));
        // An expert of each layer.
        let total = Accounting::of(&config).total as f64;
        let fewer = total - (2 * 3 * config.hidden * before.width) as f64;
        let ids: Vec<Vec<u32>> = list(&stored(name, "golden.json")["ids"]);
        for (i, (method, set)) in [
            ("hc-smoe", &[][..]),
            ("hc-smoe", &["vectors=router-logits", "allocation=global"]),
            ("uncurl", &[]),
            ("seer-moe", &[]),
            ("seer-moe", &["score=soft", "rounds=each"]),
        ]
        .into_iter()
        .enumerate()
        {
            let out = work.path().join(format!("{name}-{i}"));
            let made = run(method, set, Budget::Params(fewer), &text).run(&merged, &out).unwrap();
            let (after, counts) = (mixture(&out), Accounting::of(&Config::load(&out).unwrap()));
            assert_eq!(after.experts.iter().sum::<usize>(), 4, "{name} {method} {set:?}");
            assert_eq!(made.plan.total, counts.total as f64, "{name} {method} {set:?}");
            let lost = [0, 1].map(|layer| gates(&before)[layer] - gates(&after)[layer]);
            let of_gates = (lost.iter().sum::<usize>() * config.hidden) as f64;
            assert_eq!(made.plan.total, fewer - of_gates, "{name} {method} {set:?}");
            // A merge keeps all gates, and an expert that is dropped takes its own along.
            assert_eq!(lost == [0, 0], method != "seer-moe", "{name} {method} {set:?}: {lost:?}");
            assert!(logits(&out, &ids[0]).iter().all(|z| z.is_finite()), "{name} {method} {set:?}");
        }
        let none = work.path().join("none");
        let part = "router: cannot be mean for gates that share experts already";
        run("uncurl", &["router=mean"], Budget::Params(fewer), &text).fails(&merged, &none, &[part]);
    }
}

#[test]
fn what_has_no_experts_to_change_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let (text, out) = (calibration("mixtral"), work.path().join("out"));
    for method in ["hc-smoe", "uncurl", "seer-moe"] {
        run(method, &[], Budget::Share(0.01), &text).fails(
            &case("mixtral"),
            &out,
            &["fewest experts", "held or more"],
        );
        run(method, &[], Budget::Share(0.9), &[]).fails(&case("mixtral"), &out, &["calibration", "too few"]);
    }
}
