//! Top-k and DSMoE models whose gates share experts, against models in which every gate has a copy of its expert, and the methods that
//! make and cut them.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, RouterRule, operate};
use dsmoe_core::{Config, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::assert_close;
use serde_json::{Value, json};

use crate::common::{Run, VOCAB, loaded, logits, made, tensors, tiny, tokens};

/// A dense model of two layers of 96 neurons.
fn dense(dir: &Path) -> PathBuf {
    dsmoe_baselines::register();
    let sizes = json!({ "vocab_size": VOCAB, "intermediate_size": 96, "num_hidden_layers": 2 });
    made(&tiny(&sizes), dir, Dtype::F32)
}

fn setting(config: &Config, key: &str) -> Value {
    config.ffn.as_ref().unwrap().settings().get(key).cloned().unwrap_or_default()
}

fn map_of(config: &Config) -> Vec<Vec<usize>> {
    serde_json::from_value(setting(config, "expert_map")).unwrap()
}

/// The block of neurons of a merged model that a block of the model with copies is: experts, and residual ones behind them.
fn block(map: &[usize], block: usize) -> usize {
    let experts = map.iter().max().unwrap() + 1;
    map.get(block).copied().unwrap_or_else(|| experts + block - map.len())
}

fn of_neurons(name: &str) -> Option<usize> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.")?;
    ["gate_proj.weight", "up_proj.weight", "down_proj.weight"].contains(&rest).then(|| layer.parse().unwrap())
}

/// Writes to `out` the model in `merged` with a copy of its expert for every gate, whose configuration is that of `whole`.
fn tied(whole: &Path, merged: &Path, out: &Path) {
    let source = Model::load(merged).unwrap();
    let mut model = Model::load(whole).unwrap();
    let (map, blocks) = (map_of(source.config()), model.config().num_experts().unwrap());
    for entry in model.layout().clone().entries() {
        let name = &entry.spec.name;
        let from = &source.params()[source.layout().get(name).unwrap().range.clone()];
        let to = &mut model.params_mut()[entry.range.clone()];
        match of_neurons(name) {
            None => to.copy_from_slice(from),
            Some(layer) => {
                let len = to.len() / blocks;
                for (i, to) in to.chunks_exact_mut(len).enumerate() {
                    to.copy_from_slice(&from[block(&map[layer], i) * len..][..len]);
                }
            }
        }
    }
    fs::create_dir(out).unwrap();
    model.save(out, Dtype::F32).unwrap();
}

/// Merges the first two of `gates` experts in the first layer, and the first, second and last in the second.
fn merges(gates: usize) -> [LayerSurgery; 2] {
    [vec![0, 1], vec![0, 1, gates - 1]].map(|group| {
        let weight = 1.0 / group.len() as f64;
        let merged = NewExpert::merged(group.iter().map(|&old| (old, weight)));
        let others = (0..gates).filter(|gate| !group.contains(gate)).map(NewExpert::kept);
        LayerSurgery { experts: [merged].into_iter().chain(others).collect(), router: RouterRule::Map }
    })
}

/// The gradients of one step.
fn grads_of(model: &Model, ids: &[u32], args: &StepArgs) -> Buf {
    let mut grads = Buf::zeros(model.params().len());
    let mut workspace = TrainWorkspace::new(model, ids.len() - 1, Precision::F32);
    let batch = Batch { inputs: &ids[..ids.len() - 1], targets: &ids[1..], seq: ids.len() - 1 };
    let step = model.train_step(&mut grads, batch, args, &mut workspace).unwrap();
    assert!(step.loss_sum.is_finite() && step.went_back);
    grads
}

fn worst(a: &Path, b: &Path, ids: &[u32]) -> f32 {
    let [a, b] = [a, b].map(|dir| logits(&loaded(dir), ids));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Gates of two matrices with noise, of one, of neurons beside an expert that all tokens run, and with a bias.
const KINDS: [(&str, &[&str]); 4] = [
    ("llama-moe", &[]),
    ("random-k", &[]),
    ("cmoe", &["experts=8"]),
    ("factorllm", &["epochs=1", "experts=8"]),
];

#[test]
fn shared_experts_of_top_k_models_give_what_copies_of_them_would() {
    let work = tempfile::tempdir().unwrap();
    let (source, text) = (dense(work.path()), tokens(16, 24));
    for (method, set) in KINDS {
        let [moe, out, copies, saved, fewer, want, none] =
            ["", "-merged", "-copies", "-saved", "-fewer", "-want", "-none"]
                .map(|end| work.path().join(format!("{method}{end}")));
        Run::new(method, set, 0.7, &text).run(&source, &moe).unwrap();
        let config = Config::load(&moe).unwrap();
        let gates = setting(&config, "num_experts").as_u64().unwrap() as usize;
        let residual = setting(&config, "num_residual").as_u64().unwrap() as usize;
        let report = operate(&moe, &out, (&merges(gates), None), false, &mut |_| {}).unwrap();
        let after = Config::load(&out).unwrap();
        assert_eq!(
            [0, 1].map(|layer| after.layer_experts(layer)),
            [Some(gates - 1 + residual), Some(gates - 2 + residual)],
            "{method}"
        );
        assert_eq!(map_of(&after).iter().map(Vec::len).collect::<Vec<_>>(), [gates; 2], "{method}");
        // All gates stay; three experts of both layers went.
        let expert = 3 * config.hidden * 96 / (gates + residual);
        assert_eq!(report.total_before - report.total, 3 * expert as u64, "{method}");
        assert_eq!(report.total, Accounting::of(&after).total, "{method}");
        tied(&moe, &out, &copies);
        let differs = worst(&out, &copies, &text[0]);
        assert!(differs < 2e-5, "{method}: {differs}");
        // Gates of the same noise decide alike in training, and gradients are sums of those of the copies.
        let args = StepArgs { loss_scale: 0.1, seed: 4, ..StepArgs::default() };
        let [whole, left] = [&copies, &out].map(|dir| Model::load(dir).unwrap());
        let [all, some] = [&whole, &left].map(|model| grads_of(model, &text[0], &args));
        let map = map_of(&after);
        for entry in left.layout().entries() {
            let old = &all[whole.layout().get(&entry.spec.name).unwrap().range.clone()];
            let found = &some[entry.range.clone()];
            let mut want: Vec<f64> = old.iter().map(|&g| f64::from(g)).collect();
            if let Some(layer) = of_neurons(&entry.spec.name) {
                let (len, copies) = (old.len() / (gates + residual), std::mem::take(&mut want));
                want = vec![0.0; found.len()];
                for (i, copy) in copies.chunks_exact(len).enumerate() {
                    let sums = &mut want[block(&map[layer], i) * len..][..len];
                    sums.iter_mut().zip(copy).for_each(|(sum, g)| *sum += g);
                }
            }
            assert_close(&format!("{method} {}", entry.spec.name), found, &want, 2e-5);
        }
        // It is saved as it is, and exported as far as a format has it.
        fs::create_dir(&saved).unwrap();
        left.save(&saved, Dtype::F32).unwrap();
        assert!(tensors(&saved) == tensors(&out), "{method}");
        assert_eq!(Config::load(&saved).unwrap().ffn, after.ffn, "{method}");
        let refused = export(&out, &none, &ExportOptions::new(ExportAs::Transformers), &mut |_| {});
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("ffn.expert_map says that gates share experts"), "{refused}");
        assert!(dsmoe_baselines::llama_moe::export(&out, &none, None, false, &mut |_| {}).is_err());
        assert!(!none.exists());
        export(&out, &none, &ExportOptions::new(ExportAs::Native), &mut |_| {}).unwrap();
        assert!(tensors(&none) == tensors(&out), "{method}");
        let mut lower = after.clone();
        lower.lower_top_k(1).unwrap();
        assert_eq!((lower.fixed_active(), map_of(&lower)), (Some((1 + residual) as f64), map_of(&after)));
        // An expert goes with all of its gates.
        let kept = [0, 1].map(|layer| {
            let experts = after.layer_experts(layer).unwrap() - residual;
            (0..experts - 1).rev().collect::<Vec<usize>>()
        });
        let of_gates = [0, 1].map(|layer| -> Vec<usize> {
            let map = &map[layer];
            let gates_of = |&expert: &usize| (0..gates).filter(move |&gate| map[gate] == expert);
            kept[layer].iter().flat_map(gates_of).collect()
        });
        let [layers, reference] = [kept, of_gates].map(|kept| kept.map(LayerSurgery::keep));
        operate(&out, &fewer, (&layers, None), false, &mut |_| {}).unwrap();
        operate(&copies, &want, (&reference, None), false, &mut |_| {}).unwrap();
        let differs = worst(&fewer, &want, &text[1]);
        assert!(differs < 2e-5, "{method}: {differs}");
    }
}

#[test]
fn wrong_maps_of_top_k_gates_are_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let (source, text) = (dense(work.path()), tokens(16, 24));
    let [moe, out] = ["moe", "out"].map(|name| work.path().join(name));
    Run::new("random-k", &[], 0.7, &text).run(&source, &moe).unwrap();
    let gates = setting(&Config::load(&moe).unwrap(), "num_experts").as_u64().unwrap() as usize;
    operate(&moe, &out, (&merges(gates), None), false, &mut |_| {}).unwrap();
    let config = Config::load(&out).unwrap();
    let map = map_of(&config);
    let with = |layer: usize, of_gates: Vec<usize>| {
        let mut map = map.clone();
        map[layer] = of_gates;
        json!(map)
    };
    for (key, value, part) in [
        ("expert_map", json!([map[0]]), "ffn.expert_map has 1 lists".to_owned()),
        ("expert_map", with(0, vec![gates; gates]), "ffn.expert_map is wrong in layer 0".to_owned()),
        ("expert_map", with(1, vec![0; gates]), "ffn.expert_map is wrong in layer 1".to_owned()),
        ("top_k", json!(gates + 1), "top_k".to_owned()),
        ("top_k", json!(0), "top_k".to_owned()),
    ] {
        let mut json: Value = serde_json::from_str(&config.to_json()).unwrap();
        json["ffn"][key] = value;
        let error = Config::from_json(Path::new("config.json"), &json.to_string()).unwrap_err().to_string();
        assert!(error.contains(&part) && !error.contains('\n'), "{key}: {error}");
    }
    // As many gates as a token opens may be more than a layer has experts.
    let mut json: Value = serde_json::from_str(&config.to_json()).unwrap();
    json["ffn"]["top_k"] = json!(gates);
    let all = Config::from_json(Path::new("config.json"), &json.to_string()).unwrap();
    assert_eq!(all.fixed_active(), Some(gates as f64 - 1.5));
}

#[test]
fn methods_merge_and_cut_models_whose_gates_share_experts() {
    let work = tempfile::tempdir().unwrap();
    let (source, text) = (dense(work.path()), tokens(24, 40));
    for (method, set) in [("llama-moe", &[][..]), ("cmoe", &["experts=8"]), ("dsmoe", &[])] {
        let [moe, merged, again, none] =
            ["", "-merged", "-again", "-none"].map(|end| work.path().join(format!("{method}{end}")));
        if method == "dsmoe" {
            convert(&source, &moe, &ConvertOptions::new(8), &mut |_| {}).unwrap();
        } else {
            Run::new(method, set, 0.7, &text).run(&source, &moe).unwrap();
        }
        let expert = |config: &Config| (3 * config.hidden * 12) as f64;
        let total = |dir: &Path| Accounting::of(&Config::load(dir).unwrap()).total as f64;
        let experts = |dir: &Path| {
            let config = Config::load(dir).unwrap();
            (0..2).map(|layer| config.layer_experts(layer).unwrap()).sum::<usize>()
        };
        let config = Config::load(&moe).unwrap();
        let run = |method: &str, set: &[&str], from: &Path, out: &Path| {
            let budget = Budget::Params(total(from) - 2.0 * expert(&config));
            let made = Run { budget, ..Run::new(method, set, 1.0, &text) }.run(from, out).unwrap();
            assert_eq!(made.plan.total, total(out), "{method} {set:?}");
            assert!(made.plan.total <= budget.params(0), "{method} {set:?}");
            assert_eq!(experts(out), experts(from) - 2, "{method} {set:?}");
            assert!(logits(&loaded(out), &text[0]).iter().all(|z| z.is_finite()), "{method} {set:?}");
        };
        run("uncurl", &[], &moe, &merged);
        assert_eq!(total(&moe) - total(&merged), 2.0 * expert(&config), "{method}");
        run("uncurl", &["affinity=coactivation"], &merged, &again);
        assert_eq!(total(&merged) - total(&again), 2.0 * expert(&config), "{method}");
        for (i, set) in [&[][..], &["score=soft", "rounds=each"], &["score=reap", "allocation=global"]]
            .into_iter()
            .enumerate()
        {
            run("seer-moe", set, &merged, &work.path().join(format!("{method}-{i}")));
        }
        let budget = Budget::Params(total(&merged) - 2.0 * expert(&config));
        let refused = Run { budget, ..Run::new("uncurl", &["router=mean"], 1.0, &text) };
        refused.fails(&merged, &none, &["router: cannot be mean for gates that share experts already"]);
        let refused = Run { budget, ..Run::new("hc-smoe", &[], 1.0, &text) };
        refused.fails(&merged, &none, &["parts of one FFN and no variants of each other"]);
    }
}
