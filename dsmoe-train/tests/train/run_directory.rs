//! A run leaves a complete directory on the disk and refuses a foreign one.

use std::path::Path;

use crate::common::*;
use dsmoe_core::Model;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_train::{Outcome, RunOptions, TrainConfig};
use serde_json::Value;

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_finished_run_is_a_model_with_its_history() {
    let bed = Bed::new(true);
    let out = bed.path("out");
    let heard = bed.whole("out", &["save_every=6", "eval_every=10"]);
    assert_eq!(heard.saved, [6, 12, 18, 20]);
    assert_eq!(names(&out.join("checkpoints")), ["step-00000018", "step-00000020"]);
    let checkpoint = names(&out.join("checkpoints/step-00000020"));
    let weights = ["checksums.json", "config.json", "model.safetensors"];
    assert_eq!(checkpoint, [&weights[..], &["optimizer.safetensors", "state.json"]].concat());
    let (events, files): (Vec<_>, Vec<_>) = names(&out).into_iter().partition(|n| n.starts_with("events."));
    let model = ["checkpoints", "checksums.json", "config.json", "metrics.jsonl", "model.safetensors"];
    assert_eq!(files, [&model[..], &["run.toml", "tokenizer.json"]].concat());
    assert_eq!(events.len(), 1, "{events:?}");
    assert!(Model::load(&out).unwrap().params().iter().all(|x| x.is_finite()));

    let lines = metrics(&out);
    assert_eq!(lines[0]["format_version"], 1);
    assert_eq!(lines[0]["config"]["active_target"], 0.5);
    let with = |key: &str| lines.iter().filter(|line| line.get(key).is_some()).collect::<Vec<_>>();
    let numbers = |key: &str| -> Vec<u64> { with(key).iter().map(|l| l["step"].as_u64().unwrap()).collect() };
    assert_eq!(numbers("loss"), Vec::from_iter(1..=20));
    assert_eq!(numbers("eval_nll"), [10, 20]);
    let last = with("loss")[19];
    let keys = "tokens lm_loss sparsity_loss lr grad_norm tokens_per_s activation_ratio sparsity_weight \
                zero_active_share router_grad_norm wall_s";
    for key in keys.split(' ') {
        assert!(last[key].is_number(), "{key}: {last}");
    }
    assert_eq!(last["tokens"], 20 * 2 * 2 * 16);
    let by_layer = last["layer_activation"].as_array().unwrap();
    let mean = by_layer.iter().map(|x| x.as_f64().unwrap()).sum::<f64>() / 2.0;
    assert!((mean - last["activation_ratio"].as_f64().unwrap()).abs() < 1e-12);
    assert_eq!(heard.evals.len(), 2);
}

#[test]
fn a_finished_run_removes_what_a_killed_process_left_of_old_checkpoints() {
    let bed = Bed::new(true);
    bed.whole("out", &["steps=4", "save_every=2", "keep=1"]);
    let checkpoints = bed.path("out/checkpoints");
    assert_eq!(names(&checkpoints), ["step-00000004"]);
    for name in ["step-00000002", ".step-00000001.tmp"] {
        std::fs::create_dir(checkpoints.join(name)).unwrap();
        std::fs::write(checkpoints.join(name).join("config.json"), "{}").unwrap();
    }
    bed.rest("out", &["steps=4", "save_every=2", "keep=1"]).noted(&["all 4 steps are done"]);
    assert_eq!(names(&checkpoints), ["step-00000004"]);
}

#[test]
fn training_learns_and_a_dense_model_has_no_routing() {
    let bed = Bed::new(false);
    let heard = bed.whole("out", &["sparsity=1", "steps=60", "lr=1e-2"]);
    let (first, last) = (&heard.records[0], &heard.records[59]);
    assert!(last.lm_loss < 0.7 * first.lm_loss, "{} to {}", first.lm_loss, last.lm_loss);
    assert_eq!((last.loss, last.activation_ratio, last.sparsity_weight), (last.lm_loss, None, None));
    assert!(heard.evals[0].1.active_ratio.is_none());
    refused(&text(1), settings(&[]), bed.options("x"), &["active_target is 0.5", "a model with experts"]);
}

#[test]
fn half_written_and_broken_checkpoints_are_skipped() {
    let bed = Bed::new(true);
    let (whole, out) = (bed.path("whole"), bed.path("out"));
    bed.whole("whole", &[]);
    bed.part("out", 12, &["save_every=6"]);
    let checkpoints = out.join("checkpoints");
    assert_eq!(names(&checkpoints), ["step-00000006", "step-00000012"]);

    // A write that was killed, a torn state and, for a start, a model that was cut off.
    std::fs::create_dir(checkpoints.join(".step-00000013.tmp")).unwrap();
    std::fs::write(checkpoints.join(".step-00000013.tmp/config.json"), "{").unwrap();
    let state = checkpoints.join("step-00000012/state.json");
    let text_of = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, &text_of[..text_of.len() / 2]).unwrap();
    let (outcome, heard) = bed.train(&[], RunOptions { stop_after: Some(1), ..bed.resumed("out") });
    assert_eq!(outcome, Outcome::Interrupted { step: 7 });
    heard.noted(&["skipped a broken checkpoint", "state.json", "at step 6 of 20"]);
    assert_eq!(names(&checkpoints), ["step-00000006", "step-00000007"], "the abandoned future is gone");

    let weights_path = checkpoints.join("step-00000007/optimizer.safetensors");
    let bytes = std::fs::read(&weights_path).unwrap();
    std::fs::write(&weights_path, &bytes[..bytes.len() - 100]).unwrap();
    bed.rest("out", &[]).noted(&["optimizer.safetensors", "at step 6"]);
    assert_eq!(weights(&out), weights(&whole));

    // When none is left, the run is not silently started over.
    for name in names(&checkpoints) {
        std::fs::write(checkpoints.join(name).join("state.json"), "{}").unwrap();
    }
    let parts = ["step-00000020", "state.json", "not what was written", "choose another out"];
    refused(&text(1), settings(&[]), bed.resumed("out"), &parts);
    for name in names(&checkpoints) {
        std::fs::remove_file(checkpoints.join(name).join("checksums.json")).unwrap();
    }
    let parts = ["step-00000020", "state.json", "format_version", "choose another out"];
    refused(&text(1), settings(&[]), bed.resumed("out"), &parts);
}

#[test]
fn a_file_in_the_place_of_a_checkpoint_is_skipped_and_replaced() {
    let bed = Bed::new(true);
    bed.part("out", 12, &["save_every=6"]);
    let checkpoints = bed.path("out/checkpoints");
    let become_file = |name: &str| {
        std::fs::remove_dir_all(checkpoints.join(name)).unwrap();
        std::fs::write(checkpoints.join(name), "x").unwrap();
    };
    become_file("step-00000012");
    let parts = ["skipped a broken checkpoint", "step-00000012: it is no folder", "at step 6 of 20"];
    bed.rest("out", &["save_every=6"]).noted(&parts);
    assert_eq!(names(&checkpoints), ["step-00000018", "step-00000020"]);
    assert!(names(&checkpoints).iter().all(|name| checkpoints.join(name).is_dir()));

    names(&checkpoints).iter().for_each(|name| become_file(name));
    let parts = ["step-00000020", "it is no folder", "choose another out"];
    refused(&text(1), settings(&[]), bed.resumed("out"), &parts);
}

#[test]
fn every_flipped_bit_of_a_checkpoint_is_found_and_the_one_before_is_taken() {
    let bed = Bed::new(true);
    let out = bed.path("out");
    bed.part("out", 4, &["save_every=2"]);
    let checkpoints = out.join("checkpoints");
    let newest = checkpoints.join("step-00000004");
    let before: Vec<_> =
        ["step-00000002", "step-00000004"].map(|name| copied(&checkpoints.join(name))).into();
    let restore = || {
        for name in names(&checkpoints) {
            std::fs::remove_dir_all(checkpoints.join(name)).unwrap();
        }
        for (name, files) in ["step-00000002", "step-00000004"].iter().zip(&before) {
            std::fs::create_dir_all(checkpoints.join(name)).unwrap();
            files
                .iter()
                .for_each(|(file, bytes)| std::fs::write(checkpoints.join(name).join(file), bytes).unwrap());
        }
    };
    let mut random = 7u64;
    for (file, bytes) in &before[1] {
        for _ in 0..6 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bit = (random >> 20) as usize % (8 * bytes.len());
            // A digit of a hash in its other case is the same hash.
            if file == "checksums.json" && bit % 8 == 5 {
                continue;
            }
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(newest.join(file), damaged).unwrap();
            let (_, heard) = bed.train(&[], RunOptions { stop_after: Some(1), ..bed.resumed("out") });
            heard.noted(&["skipped a broken checkpoint", file, "step-00000002 at step 2 of 20"]);
            restore();
        }
    }
    // Checkpoints of before there were manifests.
    for name in names(&checkpoints) {
        let manifest = checkpoints.join(&name).join("checksums.json");
        std::fs::remove_file(manifest).ok();
    }
    let (_, heard) = bed.train(&[], RunOptions { stop_after: Some(1), ..bed.resumed("out") });
    heard.noted(&["has no checksums.json: its files are not checked for damage", "at step 4 of 20"]);
}

/// The files of a folder.
fn copied(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), std::fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn only_the_same_run_can_be_resumed() {
    let bed = Bed::new(true);
    let other = model_dir(&bed.path(""), "other", true, 2);
    let three = |source: &Path| RunOptions {
        source: source.to_path_buf(),
        stop_after: Some(3),
        ..bed.resumed("out")
    };
    bed.train(&[], three(&bed.source)).1.noted(&["no checkpoint yet; starting from step 0"]);
    let same = &bed.source;
    for (source, seed, more, parts) in [
        (&other, 1, &[][..], &["state.json: the starting model was ", "give the model"][..]),
        (same, 2, &[], &["the text was ", "give the data"]),
        (same, 1, &["lr=1e-3"], &["lr was 0.003 and is now 0.001", "use the old value"]),
        (same, 1, &["sparsity=1"], &["sparsity was null and is now 1"]),
        (same, 1, &["warmup_steps=9"], &["warmup_steps was 2 and is now 9"]),
        (same, 1, &["seed=3"], &["seed was 0 and is now 3"]),
    ] {
        refused(&text(seed), settings(more), three(source), parts);
    }
    let (outcome, heard) = bed.train(&["steps=30"], three(same));
    assert_eq!(outcome, Outcome::Interrupted { step: 6 });
    heard.noted(&["steps was 20 and is now 30"]);
}

#[test]
fn a_run_holds_the_share_that_its_model_was_made_for() {
    let bed = Bed::new(true);
    let path = bed.source.join("config.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["dsmoe"]["active_target"] = 0.375.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let unset = || TrainConfig { active_target: None, ..settings(&[]) };
    let three = |options| RunOptions { stop_after: Some(3), ..options };

    let (_, heard) = train(&text(1), unset(), three(bed.options("own"))).unwrap();
    heard.noted(&["active_target is 0.375"]);
    let resolved = bed.path("own/run.toml");
    let toml = std::fs::read_to_string(&resolved).unwrap();
    assert!(toml.starts_with("# active_target is the model's own.\n"), "{toml}");
    assert_eq!(TrainConfig::from_toml(&resolved).unwrap().active_target, Some(0.375));
    train(&text(1), unset(), three(bed.resumed("own"))).unwrap().1.noted(&["at step 3 of 20"]);
    let parts = ["active_target was 0.375 and is now 0.5"];
    refused(&text(1), settings(&[]), bed.resumed("own"), &parts);
    let checkpoint = Model::load(&bed.path("own/checkpoints/step-00000006")).unwrap();
    assert_eq!(checkpoint.config().moe.as_ref().unwrap().active_target, Some(0.375));

    for (name, more, wanted) in
        [("target", &[][..], (None, Some(0.5))), ("weight", &["sparsity=1"], (Some(1.0), None))]
    {
        let heard = bed.part(name, 3, more);
        assert!(!heard.notes.contains("was made for"), "{}", heard.notes);
        let resolved = TrainConfig::from_toml(&bed.path(name).join("run.toml")).unwrap();
        assert_eq!((resolved.sparsity, resolved.active_target), wanted);
    }
}

#[test]
fn directories_of_others_are_left_alone() {
    let bed = Bed::new(true);
    let own = RunOptions::new(&bed.source, &bed.source);
    std::fs::create_dir(bed.path("out")).unwrap();
    std::fs::write(bed.path("out/thesis.tex"), "years of work").unwrap();
    let forced = |options| RunOptions { force: true, ..options };
    for (options, parts) in [
        (bed.options("out"), &["out is not empty", "set resume to continue", "set force"][..]),
        (bed.resumed("out"), &["out is not empty and holds no run"]),
        (forced(bed.options("out")), &["out is not empty and holds no run"]),
        (forced(own), &["source holds the model to train", "another out"]),
    ] {
        refused(&text(1), settings(&["steps=2"]), options, parts);
    }
    assert_eq!(names(&bed.path("out")), ["thesis.tex"]);
    assert!(bed.source.join("tokenizer.json").exists());

    bed.whole("run", &["steps=2"]);
    std::fs::write(bed.path("run/thesis.tex"), "years of work").unwrap();
    bed.train(&["steps=2"], forced(bed.options("run")));
    let found = names(&bed.path("run"));
    assert!(found.contains(&"thesis.tex".to_owned()));
    assert_eq!(found.iter().filter(|name| name.starts_with("events.")).count(), 1, "{found:?}");
}

#[test]
fn what_is_not_finite_stops_the_run_and_saves_nothing() {
    let bed = Bed::new(true);
    // Finite, as loading asks, and too large to be multiplied.
    let poisoned = |from: &Path, to: &Path, tensor: &str| {
        let mut model = Model::load(from).unwrap();
        let range = model.layout().get(tensor).unwrap().range.clone();
        model.params_mut()[range].fill(3e38);
        std::fs::create_dir_all(to).unwrap();
        without_manifest(to);
        model.save(to, Dtype::F32).unwrap();
    };
    for (tensor, parts) in [
        ("layers.1.mlp.up_proj", &["step 1: layer 1 ffn", "no checkpoint was saved yet", "smaller lr"][..]),
        ("layers.0.self_attn.q_proj", &["layer 0 attention"]),
    ] {
        let (source, out) = (bed.path(tensor), bed.path("out").join(tensor));
        poisoned(&bed.source, &source, &format!("model.{tensor}.weight"));
        let parts = [parts, &["is not finite"]].concat();
        refused(&text(1), settings(&[]), RunOptions::new(&source, &out), &parts);
        assert!(!out.join("checkpoints").exists() && !out.join("model.safetensors").exists());
        let last = &metrics(&out)[1];
        assert_eq!((&last["step"], &last["lm_loss"], &last["nan"]), (&1.into(), &Value::Null, &true.into()));
    }

    // A run that was sound up to a checkpoint keeps it.
    bed.part("sound", 2, &["clip=0"]);
    let checkpoint = bed.path("sound/checkpoints/step-00000002");
    poisoned(&checkpoint, &checkpoint, "model.layers.0.mlp.down_proj.weight");
    let before = weights(&checkpoint);
    let parts = ["step 3: layer 0 ffn", "the checkpoint of step 2 is intact"];
    refused(&text(1), settings(&["clip=0"]), bed.resumed("sound"), &parts);
    assert_eq!(weights(&checkpoint), before);
    assert_eq!(names(&bed.path("sound/checkpoints")), ["step-00000002"]);
}

#[test]
fn model_and_text_must_fit() {
    let bed = Bed::new(true);
    let refused = |stream: &_, more: &[&str], parts: &[&str]| {
        refused(stream, settings(more), bed.options("out"), parts);
    };
    let mut stream = text(1);
    refused(&stream, &["seq=65"], &["seq is 65", "max_position_embeddings 64"]);
    stream.ids[100] = 4000;
    refused(&stream, &[], &["token id", "4000", "vocab_size 48"]);
    stream.ids.truncate(10);
    stream.doc_starts.truncate(1);
    refused(&stream, &[], &["10 tokens", "17"]);
    assert!(!bed.path("out").exists(), "nothing is made before all is checked");
}

#[cfg(unix)]
#[test]
fn a_directory_in_use_is_refused() {
    let bed = Bed::new(true);
    let model = Model::load(&bed.source).unwrap();
    let first = dsmoe_train::Trainer::new(model, &text(1), settings(&[]), bed.options("out")).unwrap();
    let busy = ["out is in use by another run; wait for it"];
    refused(&text(1), settings(&[]), bed.resumed("out"), &busy);
    drop(first);
    bed.rest("out", &[]);
}
