//! Duo-LLM from a dense directory to one with a router, trained and routed.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::Budget;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::ffn::Route;
use dsmoe_core::init::preset;
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace, Workspace};
use dsmoe_core::{Config, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use serde_json::json;

use super::common::{Run, VOCAB, configured, loaded, made, tiny, tokens, values};

const SEQ: usize = 24;

fn dense(dir: &Path) -> PathBuf {
    dsmoe_baselines::register();
    let sizes = json!({"vocab_size": VOCAB, "intermediate_size": 96, "num_hidden_layers": 2});
    made(&tiny(&sizes), dir, Dtype::F32)
}

fn losses(model: &Inference) -> (Vec<f32>, Option<f64>) {
    let ids = tokens(1, SEQ + 1).concat();
    let (mut losses, mut stats) = (vec![0.0; SEQ], model.new_stats());
    let batch = Batch { inputs: &ids[..SEQ], targets: &ids[1..], seq: SEQ };
    model.score(&mut losses, batch, stats.as_mut(), &mut Workspace::default()).unwrap();
    (losses, stats.map(|stats| stats.summary().active_ratio))
}

#[test]
fn routes_of_a_duo_model_are_dense_models() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dense(dir.path()), dir.path().join("duo"));
    let text = tokens(16, SEQ);
    let made = Run::new("duo", &["ratio=8"], 0.9, &text).run(&model, &out).unwrap();
    let again = dir.path().join("again");
    assert_eq!(Run::new("duo", &["ratio=8"], 0.9, &text).run(&model, &again).unwrap(), made);
    let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert_eq!(weights(&out), weights(&again));

    // The small FFN has neurons of the big one, in order, and the counts are those of the files.
    let name = |part: &str| format!("model.layers.1.mlp.{part}_proj.weight");
    let (big, small) =
        (values(&out, &name("gate")), values(&out, "model.layers.1.mlp.small.gate_proj.weight"));
    assert_eq!(big, values(&model, &name("gate")));
    let hidden = Config::load(&out).unwrap().hidden;
    let rows: Vec<usize> = small
        .chunks_exact(hidden)
        .map(|row| big.chunks_exact(hidden).position(|other| other == row).expect("a neuron of the big one"))
        .collect();
    assert!(rows.len() == 12 && rows.is_sorted_by(|a, b| a < b), "{rows:?}");
    let down = values(&out, "model.layers.1.mlp.small.down_proj.weight");
    let of_big = values(&out, &name("down"));
    assert!((0..12).all(|j| (0..hidden).all(|i| down[i * 12 + j] == of_big[i * 96 + rows[j]])));
    let checkpoint = Checkpoint::open(&out).unwrap();
    let stored: usize =
        checkpoint.names().map(|n| checkpoint.tensor(n).unwrap().shape.iter().product::<usize>()).sum();
    assert_eq!(made.plan.total, stored as f64);

    let mut duo = loaded(&out);
    assert_eq!(duo.choices().unwrap(), [2, 2]);
    duo.set_routes(&[Route::Choice(2); 2]).unwrap();
    let (all_big, share) = losses(&duo);
    assert_eq!((all_big.clone(), share), (losses(&loaded(&model)).0, Some(1.0)));
    duo.set_routes(&[Route::Choice(1); 2]).unwrap();
    let (all_small, share) = losses(&duo);
    assert!(all_small != all_big && share == Some(0.0));
    duo.set_routes(&[Route::Own; 2]).unwrap();
    let (random, share) = losses(&duo);
    assert!(random != all_big && share.is_some_and(|share| (0.3..1.0).contains(&share)), "{share:?}");
    let error = duo.set_routes(&[Route::Own, Route::Choice(3)]).unwrap_err().to_string();
    assert!(error.contains("layer 1 has 2 choices"), "{error}");
    for form in [ExportAs::Transformers, ExportAs::Dense] {
        let error = export(&out, &dir.path().join("no"), &ExportOptions::new(form), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("\"duo\""), "{form:?}: {error}");
    }
}

#[test]
fn a_router_learns_which_tokens_are_big() {
    let dir = tempfile::tempdir().unwrap();
    let [duo, out, saved] = ["duo", "out", "saved"].map(|name| dir.path().join(name));
    let model = dense(dir.path());
    let text = tokens(16, SEQ);
    Run::new("duo", &["ratio=8"], 0.9, &text).run(&model, &duo).unwrap();
    let made = Run::new("duo-router", &[], 0.9, &[]).run(&duo, &out).unwrap();
    let config = Config::load(&out).unwrap();
    assert_eq!(made.plan.active_target, config.ffn.as_ref().unwrap().active_target());
    assert_eq!(Config::load(&duo).unwrap().ffn.as_ref().unwrap().active_target(), None);
    let activated = Accounting::of(&config).activated(made.plan.active_target.unwrap());
    let asked = 0.9 * Accounting::of(&Config::load(&duo).unwrap()).total as f64;
    assert!((activated / asked - 1.0).abs() < 1e-9 && (made.plan.activated - activated).abs() < 1e-6);

    let mut model = Model::load(&out).unwrap();
    let ids = tokens(4, SEQ).concat();
    let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
    let mut recomputing = TrainWorkspace::recomputing(&model, inputs.len(), Precision::F32);
    let step = |model: &Model, workspace: &mut TrainWorkspace, weight: f32| {
        let args = StepArgs {
            loss_scale: 1.0 / inputs.len() as f32,
            sparsity_weight: weight,
            sparsity_over: dsmoe_router::SparsityOver::All,
            ..StepArgs::default()
        };
        let mut grads = Buf::zeros(model.layout().len());
        let output =
            model.train_step(&mut grads, Batch { inputs, targets, seq: inputs.len() }, &args, workspace);
        (grads, output.unwrap())
    };
    let (grads, first) = step(&model, &mut workspace, 0.0);
    for entry in model.layout().entries().iter().filter(|entry| entry.spec.name.contains(".mlp.")) {
        assert!(grads[entry.range.clone()].iter().any(|&g| g != 0.0), "{}", entry.spec.name);
    }
    assert_eq!(grads[..], step(&model, &mut recomputing, 0.0).0[..]);
    // A weight on the share closes the way through the big FFN.
    for _ in 0..40 {
        let (grads, _) = step(&model, &mut workspace, 40.0);
        model.params_mut().iter_mut().zip(&grads[..]).for_each(|(p, g)| *p -= 0.1 * g);
    }
    let (_, last) = step(&model, &mut workspace, 0.0);
    assert!(last.mean_gate < first.mean_gate - 0.1, "{} to {}", first.mean_gate, last.mean_gate);
    fs::create_dir(&saved).unwrap();
    model.save(&saved, Dtype::F32).unwrap();
    assert_eq!(losses(&loaded(&saved)), losses(&Inference::new(&model, Precision::F32)));
}

/// The directory of a model with a router of three ways, and of the dense model it is made from.
fn skipping(dir: &Path) -> [PathBuf; 2] {
    let [duo, out] = ["duo", "out"].map(|name| dir.join(name));
    let model = dense(dir);
    Run::new("duo", &["ratio=8"], 0.9, &tokens(16, SEQ)).run(&model, &duo).unwrap();
    let made = Run::new("duo-router", &["skip=true"], 0.8, &[]).run(&duo, &out).unwrap();
    // A token runs neurons of the FFNs of 96 and 12; the budget counts the whole of the source.
    let config = Config::load(&out).unwrap();
    let counts = Accounting::of(&config);
    let share = made.plan.active_target.unwrap();
    let asked = 0.8 * Accounting::of(&Config::load(&duo).unwrap()).total as f64;
    let want = (counts.non_ffn + counts.router) as f64 + share * counts.ffn as f64;
    assert!((want / asked - 1.0).abs() < 1e-9 && (made.plan.activated - want).abs() < 1e-6, "{made:?}");
    assert!(made.plan.reached_by.ends_with("of the neurons of both FFNs"), "{made:?}");
    let spec = config.ffn.unwrap();
    assert_eq!((spec.num_experts(0), spec.active_target()), (2, Some(share)));
    assert_eq!(spec.settings()["skip"], true);
    [out, model]
}

#[test]
fn a_router_of_three_ways_has_a_row_for_skipping() {
    let dir = tempfile::tempdir().unwrap();
    let [out, _] = skipping(dir.path());
    let (duo, name) = (dir.path().join("duo"), "model.layers.1.mlp.router.weight");
    let [two, three] = [&duo, &out].map(|model| values(model, name));
    assert_eq!(three.len() / 3, two.len() / 2);
    assert_eq!(three[..two.len()], two);
    assert!(three[two.len()..].iter().all(|&w| w != 0.0));
    // The same again, and back to two ways.
    let [again, back] = ["again", "back"].map(|name| dir.path().join(name));
    Run::new("duo-router", &["skip=true"], 0.8, &[]).run(&out, &again).unwrap();
    assert_eq!(values(&again, name), three);
    Run::new("duo-router", &[], 0.9, &[]).run(&out, &back).unwrap();
    assert_eq!(values(&back, name), two);
    assert!(!fs::read_to_string(back.join("config.json")).unwrap().contains("skip"));
}

/// Makes the first input of every FFN positive, and the logit of the router's row `row` that input, where there is a router.
fn always(model: &mut Model, row: usize) {
    let hidden = model.config().hidden;
    let entries: Vec<_> = model.layout().entries().to_vec();
    for entry in entries {
        let values = &mut model.params_mut()[entry.range.clone()];
        if entry.spec.name == "model.embed_tokens.weight" {
            values.iter_mut().step_by(hidden).for_each(|value| *value = 3.0);
        }
        if entry.spec.name.ends_with(".mlp.router.weight") {
            values.fill(0.0);
            values[row * hidden] = 1.0;
        }
    }
}

#[test]
fn a_router_that_takes_one_way_is_the_model_of_that_way_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let [out, dense] = skipping(dir.path());
    let of = |dir: &Path, row: usize| {
        let mut model = Model::load(dir).unwrap();
        always(&mut model, row);
        Inference::new(&model, Precision::F32)
    };
    let (mut plain, mut routed) = (of(&dense, 0), of(&out, 0));
    let whole = Accounting::of(&Config::load(&out).unwrap());
    let spent = |share: f64| whole.activated(2.0 * share) - (whole.non_ffn + whole.router) as f64;

    // Big: the logits of the dense model, and the parameters of its FFNs.
    let (big, share) = losses(&of(&out, 0));
    assert_eq!(big, losses(&plain).0);
    let of_dense = Accounting::of(&Config::load(&dense).unwrap());
    assert!((spent(share.unwrap()) - of_dense.ffn as f64).abs() < 1e-6);

    // Small: those of the small FFNs alone.
    let (small, share) = losses(&of(&out, 1));
    routed.set_routes(&[Route::Choice(1); 2]).unwrap();
    assert_eq!(small, losses(&routed).0);
    assert!((spent(share.unwrap()) - (whole.ffn - of_dense.ffn) as f64).abs() < 1e-6);

    // Skipping: the residual stream and attention alone, and no parameter of an FFN.
    let (skipped, share) = losses(&of(&out, 2));
    plain.set_routes(&[Route::Skip; 2]).unwrap();
    assert_eq!((skipped.clone(), share), (losses(&plain).0, Some(0.0)));
    assert!(skipped != big && skipped != small && big != small);
}

#[test]
fn a_router_learns_to_skip() {
    let dir = tempfile::tempdir().unwrap();
    let [out, _] = skipping(dir.path());
    let mut model = Model::load(&out).unwrap();
    let ids = tokens(4, SEQ).concat();
    let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
    let mut step = |model: &Model, weight: f32| {
        let args = StepArgs {
            loss_scale: 1.0 / inputs.len() as f32,
            sparsity_weight: weight,
            sparsity_over: dsmoe_router::SparsityOver::All,
            ..StepArgs::default()
        };
        let mut grads = Buf::zeros(model.layout().len());
        let batch = Batch { inputs, targets, seq: inputs.len() };
        let output = model.train_step(&mut grads, batch, &args, &mut workspace);
        (grads, output.unwrap())
    };
    let (grads, first) = step(&model, 0.0);
    for entry in model.layout().entries().iter().filter(|entry| entry.spec.name.contains(".mlp.")) {
        assert!(grads[entry.range.clone()].iter().any(|&g| g != 0.0), "{}", entry.spec.name);
    }
    // A weight on the neurons closes the ways through both FFNs.
    for _ in 0..160 {
        let (grads, _) = step(&model, 40.0);
        model.params_mut().iter_mut().zip(&grads[..]).for_each(|(p, g)| *p -= 0.1 * g);
    }
    let (_, last) = step(&model, 0.0);
    assert!(last.mean_gate < first.mean_gate - 0.1, "{} to {}", first.mean_gate, last.mean_gate);
    let (_, share) = losses(&Inference::new(&model, Precision::F32));
    assert!(share.unwrap() < first.mean_gate, "{share:?}");
}

#[test]
fn budgets_and_what_cannot_be() {
    // 0.378 of the FFN is a share of 0.3365 through the big one, with a small one of a sixteenth.
    let one = preset("llama-3.2-1b").unwrap();
    let counts = Accounting::of(&one);
    let routers = 16.0 * 2.0 * 2048.0;
    let budget = Budget::Params(counts.non_ffn as f64 + 0.378 * counts.ffn as f64 + routers);
    let plan = configured("duo", &[]).unwrap().plan(&one, budget).unwrap();
    let share = (0.378 - 1.0 / 16.0) / (1.0 - 1.0 / 16.0);
    assert!((share - 0.3365f64).abs() < 1e-4 && plan.reached_by.starts_with("33.7% of tokens"), "{plan:?}");
    assert!((plan.activated - budget.params(counts.total)).abs() < 1.0);

    let dir = tempfile::tempdir().unwrap();
    let (model, out, duo) = (dense(dir.path()), dir.path().join("out"), dir.path().join("duo"));
    let text = tokens(16, SEQ);
    Run::new("duo", &["start=random"], 1.0, &[]).run(&model, &duo).unwrap();
    for (name, set, share, source, parts) in [
        ("duo", &["ratio=0"][..], 0.9, &model, &["ratio: cannot be 0", "1 to 65536"][..]),
        ("duo", &["ratio=200"], 0.9, &model, &["ratio: is 200, and layers have 96 neurons", "smaller"]),
        ("duo", &["probability=2"], 0.9, &model, &["probability: cannot be 2", "0 to 1"]),
        ("duo", &["start=best"], 0.9, &model, &["start: cannot be \"best\"", "random"]),
        ("duo", &[], 0.01, &model, &["is below all small", "the least reachable"]),
        ("duo", &[], 0.9, &duo, &["experts or thresholds already"]),
        ("duo-router", &["temperature=0"], 0.9, &duo, &["temperature: cannot be 0"]),
        ("duo-router", &[], 0.9, &model, &["ffn.type", "is not duo", "the method duo made"]),
        ("duo-router", &[], 0.01, &duo, &["is below all small"]),
        ("duo-router", &["skip=true"], 0.01, &duo, &["is below all skipped"]),
        ("duo-router", &["skip=2"], 0.9, &duo, &["skip"]),
    ] {
        Run::new(name, set, share, &text).fails(source, &out, parts);
    }
    Run::new("duo", &[], 0.9, &[]).fails(&model, &out, &["0 sequences are too few"]);
    let config = fs::read_to_string(duo.join("config.json")).unwrap();
    for (from, to, part) in [
        ("\"small\": 6", "\"small\": 97", "ffn.small is 97"),
        ("\"small\": 6", "\"small\": 0", "ffn.small is 0"),
        ("\"probability\": 0.5", "\"probability\": 1.5", "ffn.probability is 1.5"),
        ("\"stage\": \"random\"", "\"stage\": \"oracle\"", "not of type duo"),
        ("\"small\": 6", "\"small\": 6, \"more\": 1", "not of type duo"),
        ("\"small\": 6", "\"small\": 6, \"skip\": true", "ffn.skip is true"),
    ] {
        assert!(config.contains(from), "{from}: {config}");
        let error =
            Config::from_json(Path::new("config.json"), &config.replace(from, to)).expect_err(to).to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{to}: {error}");
    }
}
