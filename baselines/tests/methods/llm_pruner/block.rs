//! Block-wise pruning.

use std::path::Path;

use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, Dtype, check_llama_tensors};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::{Config, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{assert_close, f64s, shared, with_threads};

use super::super::common::{Run, count, loaded, logits, mean_loss, saved, tensors, tokens, values};
use super::model;

fn block<'a>(set: &'a [&'static str], share: f64, calibration: &'a [Vec<u32>]) -> Run<'a> {
    Run::new("llm-pruner-block", set, share, calibration)
}

/// Which of the pieces of `len` values of `dense` are not in `pruned`.
fn missing(dense: &[f32], pruned: &[f32], len: usize) -> Vec<usize> {
    let gone = |piece: &[f32]| !pruned.chunks(len).any(|kept| kept == piece);
    dense.chunks(len).enumerate().filter(|(_, piece)| gone(piece)).map(|(i, _)| i).collect()
}

/// The dense model with the down columns of missing neurons and the o columns of missing heads zeroed.
fn zeroed(mut dense: Model, source: &Path, pruned: &Path) -> Model {
    let Config { hidden, head_dim, num_layers, .. } = *dense.config();
    let sharing = dense.config().num_heads / dense.config().num_kv_heads;
    let layout = dense.layout().clone();
    for layer in 0..num_layers {
        let lost = |name: &str, len: usize| {
            let name = format!("model.layers.{layer}.{name}.weight");
            missing(&values(source, &name), &values(pruned, &name), len)
        };
        // The down projection is transposed in memory.
        let down = &layout.get(&format!("model.layers.{layer}.mlp.down_proj.weight")).unwrap().range;
        for neuron in lost("mlp.gate_proj", hidden) {
            dense.params_mut()[down.start + neuron * hidden..][..hidden].fill(0.0);
        }
        let o = layout.get(&format!("model.layers.{layer}.self_attn.o_proj.weight")).unwrap();
        let width = sharing * head_dim;
        for head in lost("self_attn.k_proj", head_dim * hidden) {
            for row in dense.params_mut()[o.range.clone()].chunks_mut(o.spec.shape[1]) {
                row[head * width..][..width].fill(0.0);
            }
        }
    }
    dense
}

#[test]
fn removal_is_zeroing() {
    let calibration = tokens(3, 17);
    for (tied, set) in [
        (true, &["importance=taylor-first"][..]),
        (false, &["importance=taylor-mix", "reduce=prod", "layers=0..3"]),
        (true, &["importance=magnitude-l2", "heads=false"]),
        (true, &["importance=random", "layers=1..3"]),
    ] {
        let work = tempfile::tempdir().unwrap();
        let dense = model(tied);
        let (source, out) = (saved(&dense, work.path(), Dtype::F32), work.path().join("pruned"));
        let made = block(set, 0.75, &calibration).run(&source, &out).unwrap();
        let config = Config::load(&out).unwrap();
        check_llama_tensors(&config, &Checkpoint::open(&out).unwrap()).unwrap();
        assert_eq!((made.plan.total, made.plan.activated), (count(&out), count(&out)));
        assert_eq!(Accounting::of(&config).total as f64, count(&out));
        let share = count(&out) / count(&source);
        assert!((share - 0.75).abs() < 0.0075, "{share}");
        let dense = zeroed(dense, &source, &out);
        let ids = &tokens(1, 20)[0];
        let want = logits(&Inference::new(&dense, Precision::F32), ids);
        assert_close(&format!("{set:?}"), &logits(&loaded(&out), ids), &f64s(&want), 1e-5);
        assert_eq!(tensors(&out).contains_key("lm_head.weight"), !tied);
    }
}

const GRADIENT_KINDS: [&str; 4] =
    ["importance=taylor-first", "importance=taylor-second", "importance=taylor-mix", "importance=vector"];

#[test]
fn what_does_nothing_goes_first() {
    let calibration = tokens(2, 9);
    for importance in GRADIENT_KINDS {
        let work = tempfile::tempdir().unwrap();
        let mut dense = model(true);
        let hidden = dense.config().hidden;
        for (layer, neurons) in [(1, [3, 20, 47]), (2, [0, 1, 30])] {
            let name = format!("model.layers.{layer}.mlp.down_proj.weight");
            let range = dense.layout().get(&name).unwrap().range.clone();
            for neuron in neurons {
                dense.params_mut()[range.start + neuron * hidden..][..hidden].fill(0.0);
            }
        }
        let (source, out) = (saved(&dense, work.path(), Dtype::F32), work.path().join("pruned"));
        let budget = Budget::Params(count(&source) - (2 * 3 * 3 * hidden) as f64);
        Run { budget, ..block(&[importance, "heads=false"], 1.0, &calibration) }.run(&source, &out).unwrap();
        assert_eq!(Config::load(&out).unwrap().layer(2).intermediate, 45);
        let ids = &tokens(1, 20)[0];
        let want = logits(&loaded(&source), ids);
        assert_close(importance, &logits(&loaded(&out), ids), &f64s(&want), 1e-6);
    }
}

#[test]
fn the_whole_budget_changes_no_bit() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(false), work.path(), Dtype::BF16);
    let config = Config::load(&source).unwrap();
    for method in ["llm-pruner-block", "llm-pruner-channel"] {
        let out = work.path().join(method);
        let calibration = tokens(1, 4);
        let made = Run { method, ..block(&[], 1.0, &calibration) }.run(&source, &out).unwrap();
        assert!(tensors(&out) == tensors(&source), "{method}");
        assert_eq!(made.plan.total, Accounting::of(&config).total as f64);
        let ids = &tokens(1, 20)[0];
        assert_eq!(logits(&loaded(&out), ids), logits(&loaded(&source), ids));
    }
}

#[test]
fn equal_seeds_give_equal_bytes() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F16);
    let calibration = tokens(4, 12);
    let make = |name: &str, set: &[&'static str], seed| {
        let out = work.path().join(name);
        Run { seed, ..block(set, 0.8, &calibration) }.run(&source, &out).unwrap();
        tensors(&out)
    };
    let random = &["importance=random"];
    assert!(make("a", random, 1) == make("b", random, 1));
    assert!(make("c", random, 1) != make("d", random, 2));
    for (name, set) in [("first", &["importance=taylor-first"]), ("mix", &["importance=taylor-mix"])] {
        assert!(make(name, set, 1) == make(&format!("{name}-again"), set, 2));
    }
    for threads in [1, 3] {
        let run = || make(&format!("mix-{threads}"), &["importance=taylor-mix"], 1);
        let threaded = with_threads(threads, run);
        assert!(threaded == tensors(&work.path().join("mix")), "{threads} threads");
    }
    assert!(tensors(&work.path().join("first")).values().all(|(dtype, _, _)| *dtype == Dtype::F16));
}

#[test]
fn a_pruned_model_can_be_pruned_again() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F32);
    let (once, twice) = (work.path().join("once"), work.path().join("twice"));
    let calibration = tokens(2, 12);
    block(&["layers=1..1"], 0.9, &calibration).run(&source, &once).unwrap();
    let uneven = Config::load(&once).unwrap();
    assert_ne!(uneven.layer(0), uneven.layer(1));
    let made =
        block(&["layers=0..3", "importance=taylor-second"], 0.7, &calibration).run(&once, &twice).unwrap();
    assert_eq!(made.plan.total, count(&twice));
    assert!((count(&twice) / count(&once) - 0.7).abs() < 0.007);
    assert!(logits(&loaded(&twice), &[1, 2, 3]).iter().all(|x| x.is_finite()));
}

/// Sequences of text that a model writes.
fn own_text(model: &Inference, sequences: u64, len: usize) -> Vec<Vec<u32>> {
    let write = |seed| {
        let mut ids = vec![1];
        let options = GenerateOptions { max_tokens: len - 1, temperature: 1.0, seed, ..Default::default() };
        generate(model, &[1], &options, |id| {
            ids.push(id);
            true
        })
        .unwrap();
        ids
    };
    (0..sequences).map(write).collect()
}

#[test]
fn gradients_know_better_than_chance_in_a_real_model() {
    let test = "gradients_know_better_than_chance_in_a_real_model";
    let Some(shared) = shared(test, "models/babyllama-1m") else { return };
    let source = shared.join("models/babyllama-1m");
    let work = tempfile::tempdir().unwrap();
    let mut texts = own_text(&loaded(&source), 24, 96);
    let held_out = texts.split_off(16);
    let after = |set: &[&'static str]| {
        let out = work.path().join(set.join(" "));
        block(set, 0.8, &texts).run(&source, &out).unwrap();
        mean_loss(&out, &held_out)
    };
    let before = mean_loss(&source, &held_out);
    let random = after(&["layers=0..4", "importance=random"]);
    for importance in GRADIENT_KINDS {
        let taylor = after(&["layers=0..4", importance]);
        assert!(before < taylor && taylor < random - 0.2, "{importance}: {before} {taylor} {random}");
    }
}
