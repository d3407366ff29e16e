//! A run leaves a complete directory on the disk and refuses a foreign one.

use std::path::Path;

use crate::common::*;
use dsmoe_core::Model;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_train::{Error, Outcome, RunOptions, TrainConfig};
use serde_json::Value;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn one_line(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message} lacks one of {parts:?}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

#[test]
fn a_finished_run_is_a_model_with_its_history() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let out = dir.path().join("out");
    let config = settings(&["save_every=6", "eval_every=10"]);
    let (_, heard) = train(config, &text(1), RunOptions::new(&source, &out)).unwrap();
    assert_eq!(heard.saved, [6, 12, 18, 20]);
    assert_eq!(names(&out.join("checkpoints")), ["step-00000018", "step-00000020"]);
    let checkpoint = names(&out.join("checkpoints/step-00000020"));
    assert_eq!(checkpoint, ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]);
    let found = names(&out);
    let files: Vec<&str> = found.iter().map(String::as_str).filter(|n| !n.starts_with("events.")).collect();
    assert_eq!(
        files,
        ["checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "run.toml", "tokenizer.json"]
    );
    assert_eq!(files.len() + 1, found.len(), "one event file: {found:?}");
    assert!(Model::load(&out).unwrap().params().iter().all(|x| x.is_finite()));

    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["format_version"], 1);
    assert_eq!(lines[0]["config"]["active_target"], 0.5);
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(
        steps.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(),
        Vec::from_iter(1..=20)
    );
    for key in [
        "tokens",
        "lm_loss",
        "sparsity_loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "activation_ratio",
        "sparsity_weight",
        "zero_active_share",
        "router_grad_norm",
        "wall_s",
    ] {
        assert!(steps[19][key].is_number(), "{key}: {}", steps[19]);
    }
    assert_eq!(steps[19]["tokens"], 20 * 2 * 2 * 16);
    let by_layer = steps[19]["layer_activation"].as_array().unwrap();
    let mean = by_layer.iter().map(|x| x.as_f64().unwrap()).sum::<f64>() / 2.0;
    assert!((mean - steps[19]["activation_ratio"].as_f64().unwrap()).abs() < 1e-12);
    let evals: Vec<&Value> = lines.iter().filter(|line| line.get("eval_nll").is_some()).collect();
    assert_eq!(evals.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [10, 20]);
    assert_eq!(heard.evals.len(), 2);
}

#[test]
fn training_learns_and_a_dense_model_has_no_routing() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", false, 1);
    let out = dir.path().join("out");
    let config = settings(&["sparsity=1", "steps=60", "lr=1e-2"]);
    let (_, heard) = train(config, &text(1), RunOptions::new(&source, &out)).unwrap();
    let (first, last) = (&heard.records[0], &heard.records[59]);
    assert!(last.lm_loss < 0.7 * first.lm_loss, "{} to {}", first.lm_loss, last.lm_loss);
    assert_eq!((last.loss, last.activation_ratio, last.sparsity_weight), (last.lm_loss, None, None));
    assert!(heard.evals[0].1.active_ratio.is_none());
    let error = train(settings(&[]), &text(1), RunOptions::new(&source, &dir.path().join("x"))).unwrap_err();
    one_line(&error, &["active_target is 0.5", "a model with experts"]);
}

#[test]
fn half_written_and_broken_checkpoints_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    train(settings(&[]), &text(1), RunOptions::new(&source, &whole)).unwrap();
    let stopped = RunOptions { stop_after: Some(12), ..RunOptions::new(&source, &out) };
    train(settings(&["save_every=6"]), &text(1), stopped).unwrap();
    let checkpoints = out.join("checkpoints");
    assert_eq!(names(&checkpoints), ["step-00000006", "step-00000012"]);

    // A write that was killed, a torn state and, for a start, a model that was cut off.
    std::fs::create_dir(checkpoints.join(".step-00000013.tmp")).unwrap();
    std::fs::write(checkpoints.join(".step-00000013.tmp/config.json"), "{").unwrap();
    let state = checkpoints.join("step-00000012/state.json");
    let text_of = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, &text_of[..text_of.len() / 2]).unwrap();
    let resumed = RunOptions { resume: true, stop_after: Some(1), ..RunOptions::new(&source, &out) };
    let (outcome, heard) = train(settings(&[]), &text(1), resumed.clone()).unwrap();
    assert_eq!(outcome, Outcome::Interrupted { step: 7 });
    assert!(
        heard.notes.contains("skipped a broken checkpoint") && heard.notes.contains("state.json"),
        "{}",
        heard.notes
    );
    assert!(heard.notes.contains("at step 6 of 20"), "{}", heard.notes);
    assert_eq!(names(&checkpoints), ["step-00000006", "step-00000007"], "the abandoned future is gone");

    let weights_path = checkpoints.join("step-00000007/optimizer.safetensors");
    let bytes = std::fs::read(&weights_path).unwrap();
    std::fs::write(&weights_path, &bytes[..bytes.len() - 100]).unwrap();
    let to_end = RunOptions { stop_after: None, ..resumed };
    let (_, heard) = train(settings(&[]), &text(1), to_end.clone()).unwrap();
    assert!(
        heard.notes.contains("optimizer.safetensors") && heard.notes.contains("at step 6"),
        "{}",
        heard.notes
    );
    assert_eq!(weights(&out), weights(&whole));

    // When none is left, the run is not silently started over.
    for name in names(&checkpoints) {
        std::fs::write(checkpoints.join(name).join("state.json"), "{}").unwrap();
    }
    let error = train(settings(&[]), &text(1), to_end).unwrap_err();
    one_line(&error, &["step-00000020", "state.json", "format_version", "set force"]);
}

#[test]
fn only_the_same_run_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let other = model_dir(dir.path(), "other", true, 2);
    let out = dir.path().join("out");
    let resume = |source: &Path, out: &Path| RunOptions {
        resume: true,
        stop_after: Some(3),
        ..RunOptions::new(source, out)
    };

    let (_, heard) = train(settings(&[]), &text(1), resume(&source, &out)).unwrap();
    assert!(heard.notes.contains("no checkpoint yet; starting from step 0"), "{}", heard.notes);
    let wrong = |config, stream, source: &Path| train(config, &stream, resume(source, &out)).err().unwrap();
    one_line(
        &wrong(settings(&[]), text(1), &other),
        &["state.json: the starting model was ", "give the model"],
    );
    one_line(&wrong(settings(&[]), text(2), &source), &["the text was ", "give the data"]);
    one_line(
        &wrong(settings(&["lr=1e-3"]), text(1), &source),
        &["lr was 0.003 and is now 0.001", "use the old value"],
    );
    one_line(&wrong(settings(&["sparsity=1"]), text(1), &source), &["sparsity was null and is now 1"]);
    one_line(&wrong(settings(&["warmup_steps=9"]), text(1), &source), &["warmup_steps was 2 and is now 9"]);
    one_line(&wrong(settings(&["seed=3"]), text(1), &source), &["seed was 0 and is now 3"]);

    let (outcome, heard) = train(settings(&["steps=30"]), &text(1), resume(&source, &out)).unwrap();
    assert_eq!(outcome, Outcome::Interrupted { step: 6 });
    assert!(heard.notes.contains("steps was 20 and is now 30"), "{}", heard.notes);
}

#[test]
fn a_run_holds_the_share_that_its_model_was_made_for() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let path = source.join("config.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["dsmoe"]["active_target"] = 0.375.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let unset = || TrainConfig { active_target: None, ..settings(&[]) };
    let run = |name: &str, config: TrainConfig, resume: bool| {
        let out = dir.path().join(name);
        let options = RunOptions { resume, stop_after: Some(3), ..RunOptions::new(&source, &out) };
        train(config, &text(1), options).map(|(_, heard)| (heard, out.join("run.toml")))
    };

    let (heard, resolved) = run("own", unset(), false).unwrap();
    assert!(heard.notes.contains("active_target is 0.375"), "{}", heard.notes);
    let toml = std::fs::read_to_string(&resolved).unwrap();
    assert!(toml.starts_with("# active_target is the model's own.\n"), "{toml}");
    assert_eq!(TrainConfig::from_toml(&resolved).unwrap().active_target, Some(0.375));
    let (heard, _) = run("own", unset(), true).unwrap();
    assert!(heard.notes.contains("at step 3 of 20"), "{}", heard.notes);
    one_line(&run("own", settings(&[]), true).unwrap_err(), &["active_target was 0.375 and is now 0.5"]);
    let checkpoint = Model::load(&dir.path().join("own/checkpoints/step-00000006")).unwrap();
    assert_eq!(checkpoint.config().moe.as_ref().unwrap().active_target, Some(0.375));

    for (name, config, wanted) in [
        ("target", settings(&[]), (None, Some(0.5))),
        ("weight", settings(&["sparsity=1"]), (Some(1.0), None)),
    ] {
        let (heard, resolved) = run(name, config, false).unwrap();
        assert!(!heard.notes.contains("was made for"), "{}", heard.notes);
        let resolved = TrainConfig::from_toml(&resolved).unwrap();
        assert_eq!((resolved.sparsity, resolved.active_target), wanted);
    }
}

#[test]
fn directories_of_others_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("thesis.tex"), "years of work").unwrap();
    let config = || settings(&["steps=2"]);
    let error = train(config(), &text(1), RunOptions::new(&source, &out)).unwrap_err();
    one_line(&error, &["out is not empty", "set resume to continue", "set force"]);
    let error =
        train(config(), &text(1), RunOptions { resume: true, ..RunOptions::new(&source, &out) }).unwrap_err();
    one_line(&error, &["out is not empty and holds no run"]);
    let force = RunOptions { force: true, ..RunOptions::new(&source, &out) };
    let error = train(config(), &text(1), force.clone()).unwrap_err();
    one_line(&error, &["out is not empty and holds no run"]);
    assert_eq!(names(&out), ["thesis.tex"]);
    let out = dir.path().join("run");
    let force = RunOptions { out: out.clone(), ..force };
    train(config(), &text(1), force.clone()).unwrap();
    std::fs::write(out.join("thesis.tex"), "years of work").unwrap();
    train(config(), &text(1), force).unwrap();
    let own = RunOptions { force: true, ..RunOptions::new(&source, &source) };
    one_line(
        &train(config(), &text(1), own).unwrap_err(),
        &["source holds the model to train", "another out"],
    );
    assert!(source.join("tokenizer.json").exists());
    let found = names(&out);
    assert!(found.contains(&"thesis.tex".to_owned()));
    assert_eq!(found.iter().filter(|name| name.starts_with("events.")).count(), 1, "{found:?}");
}

#[test]
fn what_is_not_finite_stops_the_run_and_saves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let poisoned = |name: &str, tensor: &str| {
        let mut model = Model::load(&source).unwrap();
        let range = model.layout().get(tensor).unwrap().range.clone();
        // Finite, as loading asks, and too large to be multiplied.
        model.params_mut()[range].fill(3e38);
        let at = dir.path().join(name);
        std::fs::create_dir(&at).unwrap();
        model.save(&at, Dtype::F32).unwrap();
        at
    };
    let ffn = poisoned("ffn", "model.layers.1.mlp.up_proj.weight");
    let out = dir.path().join("ffn out");
    let error = train(settings(&[]), &text(1), RunOptions::new(&ffn, &out)).unwrap_err();
    one_line(&error, &["step 1: layer 1 ffn is not finite", "no checkpoint was saved yet", "smaller lr"]);
    assert!(!out.join("checkpoints").exists() && !out.join("model.safetensors").exists());
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!((&last["step"], &last["lm_loss"], &last["nan"]), (&1.into(), &Value::Null, &true.into()));

    let attention = poisoned("attention", "model.layers.0.self_attn.q_proj.weight");
    let error =
        train(settings(&[]), &text(1), RunOptions::new(&attention, &dir.path().join("a out"))).unwrap_err();
    one_line(&error, &["layer 0 attention is not finite"]);

    // A run that was sound up to a checkpoint keeps it.
    let out = dir.path().join("out");
    let stopped = RunOptions { stop_after: Some(2), ..RunOptions::new(&source, &out) };
    train(settings(&["clip=0"]), &text(1), stopped).unwrap();
    let checkpoint = out.join("checkpoints/step-00000002");
    let mut model = Model::load(&checkpoint).unwrap();
    let range = model.layout().get("model.layers.0.mlp.down_proj.weight").unwrap().range.clone();
    model.params_mut()[range].fill(3e38);
    model.save(&checkpoint, Dtype::F32).unwrap();
    let before = weights(&checkpoint);
    let resumed = RunOptions { resume: true, ..RunOptions::new(&source, &out) };
    let error = train(settings(&["clip=0"]), &text(1), resumed).unwrap_err();
    one_line(&error, &["step 3: layer 0 ffn", "the checkpoint of step 2 is intact"]);
    assert_eq!(weights(&checkpoint), before);
    assert_eq!(names(&out.join("checkpoints")), ["step-00000002"]);
}

#[test]
fn model_and_text_must_fit() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let out = dir.path().join("out");
    let error = train(settings(&["seq=65"]), &text(1), RunOptions::new(&source, &out)).unwrap_err();
    one_line(&error, &["seq is 65", "max_position_embeddings 64"]);
    let mut stream = text(1);
    stream.ids[100] = 4000;
    let error = train(settings(&[]), &stream, RunOptions::new(&source, &out)).unwrap_err();
    one_line(&error, &["token id", "4000", "vocab_size 48"]);
    stream.ids.truncate(10);
    stream.doc_starts.truncate(1);
    let error = train(settings(&[]), &stream, RunOptions::new(&source, &out)).unwrap_err();
    one_line(&error, &["10 tokens", "17"]);
    assert!(!out.exists(), "nothing is made before all is checked");
}

#[cfg(unix)]
#[test]
fn a_directory_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let out = dir.path().join("out");
    let start = |resume| {
        let options = RunOptions { resume, ..RunOptions::new(&source, &out) };
        dsmoe_train::Trainer::new(Model::load(&source).unwrap(), &text(1), settings(&[]), options)
    };
    let first = start(false).unwrap();
    let Err(busy) = start(true) else { panic!("a second run in one directory") };
    one_line(&busy, &["out is in use by another run; wait for it"]);
    drop(first);
    start(true).unwrap();
}
