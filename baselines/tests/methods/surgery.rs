//! Methods that change the experts of mixtures, on the tiny mixtures that transformers wrote: what they choose, and the logits of
//! transformers' model with the same experts.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::LayerStream;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::MixtureSpec;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule, operate};
use dsmoe_core::{Config, Model};
use dsmoe_kernels::testing::assert_close;
use serde_json::{Value, json};

use crate::common::{Run, VOCAB, loaded, made, tiny, tokens};

const MIXTURES: [&str; 4] = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"];
const TOLERANCE: f64 = 2e-4;

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
    assert_close(&format!("{name} {key}"), &found, &want, TOLERANCE / scale);
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
    for (set, part) in
        [("allocation=global", "allocation: cannot be global"), ("rounds=each", "rounds: cannot be each")]
    {
        run("seer-moe", &[set], fewer, &text).fails(&moe, &zeroed, &[part]);
    }
    run("hc-smoe", &[], fewer, &text).fails(&moe, &zeroed, &["no variants of each other"]);
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

#[test]
fn what_has_no_experts_to_change_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let (text, out) = (calibration("mixtral"), work.path().join("out"));
    let merged = work.path().join("merged");
    run("hc-smoe", &[], budget("mixtral", 3, true), &text).run(&case("mixtral"), &merged).unwrap();
    for method in ["hc-smoe", "uncurl", "seer-moe"] {
        run(method, &[], Budget::Share(0.9), &text).fails(&merged, &out, &["gates share experts already"]);
        run(method, &[], Budget::Share(0.01), &text).fails(
            &case("mixtral"),
            &out,
            &["fewest experts", "held or more"],
        );
        run(method, &[], Budget::Share(0.9), &[]).fails(&case("mixtral"), &out, &["calibration", "too few"]);
    }
}
