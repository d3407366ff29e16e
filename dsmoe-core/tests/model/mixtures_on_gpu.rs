//! Compares mixtures of experts on a GPU with the same models on the CPU: a Mixtral, one made of a dense model, and what expert
//! surgery makes of a Mixtral: gates that share experts, as HC-SMoE leaves them, and layers of different numbers of experts, as
//! SEER-MoE leaves them.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::Device;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{UpcycleOptions, upcycle};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{Batch, Inference, Model};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, RouterRule, operate};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::has_gpu;
use serde_json::json;

use crate::cuda::{compare_all, compare_inference, compare_step, decide_gates};
use crate::{losses, write_dense};

const VOCAB: usize = 75;

/// Makes mixtures of two sizes. The first lets products run over active pairs alone.
fn models(dir: &Path) -> Vec<(String, PathBuf)> {
    let mut all = Vec::new();
    for (name, heads, kv_heads, hidden, width) in [("wide", 4, 2, 64, 64), ("narrow", 3, 1, 36, 12)] {
        let out = |what: &str| dir.join(format!("{name}-{what}"));
        let (plain, dense, upcycled) = (out("plain"), out("dense"), out("upcycled"));
        write_mixtral(&plain, [heads, kv_heads, hidden, width]);
        let sizes = [
            ("hidden_size", hidden),
            ("intermediate_size", width),
            ("vocab_size", VOCAB),
            ("num_hidden_layers", 2),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", hidden / heads),
            ("max_position_embeddings", 256),
        ];
        write_dense(&dense, &sizes, Dtype::F32, false, 0.03);
        let family = "mixtral".to_owned();
        let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 1, force: false };
        upcycle(&dense, &upcycled, &options, &mut |_| {}).unwrap();
        for dir in [&plain, &upcycled] {
            settle(dir);
        }
        for (what, layers) in [
            ("shared", [shared(&[&[0, 3], &[1], &[2, 4]]), shared(&[&[0], &[1, 2], &[3, 4]])]),
            ("shared-uneven", [shared(&[&[0, 3], &[1], &[2, 4]]), shared(&[&[0], &[1, 2], &[3], &[4]])]),
            ("uneven", [LayerSurgery::keep([0, 1, 3]), LayerSurgery::keep([0, 1, 2, 4])]),
        ] {
            operate(&plain, &out(what), (&layers, None), false, &mut |_| {}).unwrap();
        }
        for what in ["plain", "upcycled", "shared", "shared-uneven", "uneven"] {
            all.push((format!("{name}, {what}"), out(what)));
        }
    }
    all
}

/// Writes a Mixtral of two layers of five experts, of which a token runs two, to the new directory `out`.
fn write_mixtral(out: &Path, [heads, kv_heads, hidden, width]: [usize; 4]) {
    let json = json!({
        "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden / heads, "max_position_embeddings": 256, "num_local_experts": 5,
        "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05, "tie_word_embeddings": false,
    });
    let mut model = Model::new(Config::from_json(Path::new("config.json"), &json.to_string()).unwrap());
    for (i, entry) in model.layout().entries().to_vec().into_iter().enumerate() {
        let values = &mut model.params_mut()[entry.range];
        if entry.spec.name.ends_with("norm.weight") {
            values.fill(1.0);
        } else {
            Rng::new(11, i as u64).fill_normal(values, 0.03);
        }
    }
    fs::create_dir(out).unwrap();
    model.save(out, Dtype::F32).unwrap();
}

/// Makes the choice of experts depend on a token's id by far, and the logits on what layers add to the values that decide it.
fn settle(dir: &Path) {
    decide_gates(dir);
    let mut model = Model::load(dir).unwrap();
    let hidden = model.config().hidden;
    let gates = model.layout().entries().iter().filter(|entry| entry.spec.name.ends_with("mlp.gate.weight"));
    let gates: Vec<_> = gates.map(|entry| entry.range.clone()).collect();
    for gate in gates {
        // Gates differ by far, and what is left of the random weights decides no choice, whatever the precision.
        for (row, weights) in model.params_mut()[gate].chunks_exact_mut(hidden).enumerate() {
            weights.iter_mut().for_each(|w| *w *= 0.05);
            weights[row % 3] = 0.4 * 1.3f32.powi(row as i32);
        }
    }
    let head = model.layout().get("lm_head.weight").unwrap().range.clone();
    for row in model.params_mut()[head].chunks_exact_mut(hidden) {
        row.iter_mut().take(3).for_each(|w| *w *= 0.05);
        row.iter_mut().skip(3).for_each(|w| *w *= 8.0);
    }
    model.save(dir, Dtype::F32).unwrap();
}

/// Merges the experts of each group with equal weights. All gates stay.
fn shared(groups: &[&[usize]]) -> LayerSurgery {
    let merged = |group: &&[usize]| {
        let weight = 1.0 / group.len() as f64;
        NewExpert::merged(group.iter().map(|&old| (old, weight)))
    };
    LayerSurgery { experts: groups.iter().map(merged).collect(), router: RouterRule::Map }
}

fn ids(count: usize, seed: u32) -> Vec<u32> {
    crate::ids(count, seed, VOCAB as u32)
}

/// Otherwise the tests below would compare models that run different experts.
#[test]
fn mixtures_route_alike_in_both_precisions() {
    let dir = tempfile::tempdir().unwrap();
    for (name, path) in models(dir.path()) {
        let [want, got] = [Precision::F32, Precision::Bf16].map(|precision| {
            let model = Inference::load(&path, precision).unwrap();
            let mut stats = model.new_stats().unwrap().traced();
            let batch = Batch { inputs: &ids(120, 4), targets: &ids(120, 5), seq: 40 };
            losses(&model, batch, Some(&mut stats));
            stats
        });
        assert_eq!(got, want, "{name}");
        let loads = want.summary().load_per_layer;
        assert!(loads.iter().flatten().all(|&load| load > 0.0), "{name}: {loads:?}");
        let is_uneven = name.ends_with("uneven");
        assert_eq!(loads[0].len() != loads[1].len(), is_uneven, "{name}: {loads:?}");
    }
}

#[test]
fn a_training_step_is_that_of_the_processor() {
    compare_all("a_training_step_is_that_of_the_processor", models, compare_step);
}

#[test]
fn inference_is_that_of_the_processor() {
    compare_all("inference_is_that_of_the_processor", models, compare_inference);
}

#[test]
fn a_text_is_generated_twice_alike() {
    if !has_gpu("a_text_is_generated_twice_alike") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, path) in models(dir.path()) {
        let model = Inference::load_on(&path, Precision::Bf16, Device::Cuda(0)).unwrap();
        let options = GenerateOptions { max_tokens: 12, ..GenerateOptions::default() };
        let text = || generate(&model, &ids(11, 3), &options, |_| true).unwrap().tokens;
        assert_eq!(text().len(), 12, "{name}");
        assert_eq!(text(), text(), "{name}");
    }
}
