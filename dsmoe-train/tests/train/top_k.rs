//! Gates that decide, and fewer experts for a token.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::common::*;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::{UpcycleOptions, upcycle};
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_train::{EvalOptions, RunOptions, TrainConfig, Trainer, evaluate};
use serde_json::Value;

/// A mixture of four experts, of which a token runs two, all of them different.
fn mixture(bed: &Bed) -> std::path::PathBuf {
    let dir = bed.path("mixture");
    let options =
        UpcycleOptions { family: "mixtral".to_owned(), num_experts: 4, top_k: 2, seed: 3, force: false };
    upcycle(&bed.source, &bed.path("copies"), &options, &mut |_| {}).unwrap();
    let mut model = Model::load(&bed.path("copies")).unwrap();
    let mut rng = Rng::new(5, 0);
    for value in model.params_mut() {
        *value += 0.05 * rng.normal();
    }
    std::fs::create_dir(&dir).unwrap();
    model.save(&dir, Dtype::F32).unwrap();
    dir
}

fn of_mixture(more: &[&str]) -> TrainConfig {
    TrainConfig { active_target: None, ..settings(more) }
}

fn run(source: &Path, out: &Path, more: &[&str], stop_after: Option<u64>, resume: bool) -> Heard {
    let options = RunOptions { stop_after, resume, ..RunOptions::new(source, out) };
    train(&text(1), of_mixture(more), options).unwrap().1
}

fn stored_k(dir: &Path) -> Value {
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    serde_json::from_str::<Value>(&config).unwrap()["num_experts_per_tok"].clone()
}

#[test]
fn experts_fade_out_and_the_result_runs_fewer() {
    let bed = Bed::new(false);
    let (source, out) = (mixture(&bed), bed.path("out"));
    let config = of_mixture(&["top_k=1"]);
    let mut trainer =
        Trainer::new(Model::load(&source).unwrap(), &text(1), config, RunOptions::new(&source, &out))
            .unwrap();
    let mut heard = Heard::default();
    trainer.run(&mut heard, &AtomicBool::new(false)).unwrap();
    assert_eq!((stored_k(&source), stored_k(&out)), (2.into(), 1.into()));
    // Half of the experts runs in the first half of the steps, a quarter in the second, without a balance loss.
    let ratios: Vec<f64> = heard.records.iter().map(|record| record.activation_ratio.unwrap()).collect();
    assert_eq!((ratios[0], ratios[9], ratios[10], ratios[19]), (0.5, 0.5, 0.25, 0.25));
    assert!(heard.records.iter().all(|record| record.balance_loss == Some(0.0)));
    // The function of the last step is that of the files.
    let ids = text(2).ids;
    let nll = |model: &Inference| evaluate(model, &ids, EvalOptions::new(17), &mut |_, _| {}).unwrap().nll;
    let trained = nll(&Inference::new(trainer.model(), Precision::F32));
    let loaded = nll(&Inference::load(&out, Precision::F32).unwrap());
    assert!((trained - loaded).abs() < 1e-6, "{trained} {loaded}");
}

#[test]
fn a_run_that_lowers_k_resumes_to_the_bit() {
    let bed = Bed::new(false);
    let source = mixture(&bed);
    let more = ["top_k=1", "gate_entropy=0.05", "top_k_anneal=0.4"];
    let whole = bed.path("whole");
    run(&source, &whole, &more, None, false);
    // In the middle of fading, at its end, and after it.
    for step in [3, 8, 13] {
        let out = bed.path(&format!("at-{step}"));
        run(&source, &out, &more, Some(step), false);
        run(&source, &out, &more, None, true);
        assert_eq!(weights(&out), weights(&whole), "{step}");
    }
    let abrupt = bed.path("abrupt");
    let heard = run(&source, &abrupt, &["top_k=1", "top_k_anneal=0"], None, false);
    assert_eq!(heard.records[0].activation_ratio, Some(0.25));
}

#[test]
fn gates_decide_under_the_entropy() {
    let bed = Bed::new(false);
    let source = mixture(&bed);
    let gates = Bed::new(true);
    for (name, source) in [("mixture", &source), ("gates", &gates.source)] {
        let entropies = |weight: &str| {
            let more = [&format!("gate_entropy={weight}")[..], "lr=1e-2", "steps=40"];
            let heard = run(source, &bed.path(&format!("{name}-{weight}")), &more, None, false);
            let first = &heard.records[0];
            let entropy = first.gate_entropy.unwrap();
            let rest = first.sparsity_weight.unwrap_or(0.0) * first.sparsity_loss.unwrap_or(0.0);
            let weighted = first.loss - first.lm_loss - first.balance_loss.unwrap_or(0.0) - rest;
            assert!((weighted - weight.parse::<f64>().unwrap() * entropy).abs() < 1e-9, "{first:?}");
            heard.records.iter().map(|record| record.gate_entropy.unwrap()).collect::<Vec<_>>()
        };
        let [weak, strong] = [entropies("1e-6"), entropies("1")];
        assert_eq!(weak[0], strong[0]);
        assert!(strong[39] < 0.7 * weak[39], "{name}: {} against {}", strong[39], weak[39]);
    }
    let plain = run(&source, &bed.path("plain"), &[], None, false);
    assert!(plain.records[3].gate_entropy.is_none() && plain.records[3].balance_loss.unwrap() > 0.0);
}

#[test]
fn what_a_model_has_not_is_refused() {
    let [dense, gates] = [Bed::new(false), Bed::new(true)];
    let source = mixture(&dense);
    let refuse = |source: &Path, more: &[&str], parts: &[&str]| {
        refused(&text(1), of_mixture(more), RunOptions::new(source, &dense.path("refused")), parts);
    };
    refuse(&dense.source, &["gate_entropy=0.1"], &["gate_entropy is 0.1", "without gates"]);
    refuse(&dense.source, &["top_k=1"], &["top_k is 1", "no fixed number of experts"]);
    refuse(&gates.source, &["top_k=1"], &["top_k is 1", "no fixed number of experts"]);
    refuse(&source, &["top_k=3"], &["top_k is 3", "1 to the number of experts", "run, 2"]);
    refuse(&source, &["top_k=0"], &["top_k is 0", "1 to the number of experts"]);
    refuse(&source, &["top_k_anneal=0.5"], &["top_k_anneal is set alone"]);
    refuse(&source, &["top_k=1", "top_k_anneal=2"], &["top_k_anneal is 2", "0 to 1"]);
    refuse(&source, &["gate_entropy=-1"], &["gate_entropy is -1"]);
    let error = Model::load(&source).unwrap().lower_top_k(3).unwrap_err().to_string();
    assert!(error.contains("3 experts of a token") && error.contains("runs 2"), "{error}");
}
