//! The weights of a run are a function of model, text and configuration, to the bit.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::*;
use dsmoe_core::Model;
use dsmoe_train::{Observer, Outcome, RunOptions, StepRecord, Trainer};

#[test]
fn one_seed_one_result_whatever_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let (outcome, heard) = train(settings(more), &text(1), RunOptions::new(&source, &out)).unwrap();
        assert_eq!((outcome, heard.records.len()), (Outcome::Finished, 20));
        weights(&out)
    };
    let first = run("first", &[]);
    assert_ne!(first, weights(&source));
    assert_eq!(run("again", &[]), first);
    assert_eq!(run("one thread", &["threads=1"]), first);
    assert_eq!(run("two threads", &["threads=2"]), first);
    assert_ne!(run("another seed", &["seed=5"]), first);
}

#[test]
fn an_interrupted_run_ends_as_a_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let stream = text(1);
    let (_, all) = train(settings(&[]), &stream, RunOptions::new(&source, &whole)).unwrap();

    let stopped = RunOptions { stop_after: Some(10), ..RunOptions::new(&source, &parts) };
    let (outcome, first) = train(settings(&[]), &stream, stopped).unwrap();
    assert_eq!((outcome, first.saved), (Outcome::Interrupted { step: 10 }, vec![10]));
    assert!(!parts.join("model.safetensors").exists());
    let resumed = RunOptions { resume: true, ..RunOptions::new(&source, &parts) };
    let (outcome, second) = train(settings(&["threads=2"]), &stream, resumed.clone()).unwrap();
    assert_eq!(outcome, Outcome::Finished);
    assert!(second.notes.contains("at step 10 of 20"), "{}", second.notes);

    assert_eq!(weights(&parts), weights(&whole));
    let numbers = |record: &StepRecord| (record.step, record.loss, record.grad_norm, record.sparsity_weight);
    let parts_numbers: Vec<_> = first.records.iter().chain(&second.records).map(numbers).collect();
    assert_eq!(parts_numbers, all.records.iter().map(numbers).collect::<Vec<_>>());
    let moments = |out: &std::path::Path| {
        std::fs::read(out.join("checkpoints/step-00000020/optimizer.safetensors")).unwrap()
    };
    assert_eq!(moments(&parts), moments(&whole));

    // A finished run, resumed, writes its model again and takes no step.
    std::fs::remove_file(parts.join("model.safetensors")).unwrap();
    let (outcome, third) = train(settings(&[]), &stream, resumed).unwrap();
    assert_eq!((outcome, third.records.len()), (Outcome::Finished, 0));
    assert!(third.notes.contains("all 20 steps are done"), "{}", third.notes);
    assert_eq!(weights(&parts), weights(&whole));
}

/// Raises the flag when it hears of step 7.
struct StopAtSeven<'s>(&'s AtomicBool);

impl Observer for StopAtSeven<'_> {
    fn step(&mut self, record: &StepRecord) {
        self.0.store(record.step == 7, Ordering::Relaxed);
    }
}

#[test]
fn a_raised_flag_stops_with_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let (whole, out, stop) = (dir.path().join("whole"), dir.path().join("out"), AtomicBool::new(false));
    train(settings(&[]), &text(1), RunOptions::new(&source, &whole)).unwrap();
    let mut trainer =
        Trainer::new(Model::load(&source).unwrap(), &text(1), settings(&[]), RunOptions::new(&source, &out))
            .unwrap();
    let outcome = trainer.run(&mut StopAtSeven(&stop), &stop).unwrap();
    assert_eq!(outcome, Outcome::Interrupted { step: 7 });
    assert!(out.join("checkpoints/step-00000007/state.json").is_file());
    // The same trainer can go on, and so can another process.
    stop.store(false, Ordering::Relaxed);
    assert_eq!(trainer.run(&mut (), &stop).unwrap(), Outcome::Finished);
    assert_eq!(weights(&out), weights(&whole));
}

#[test]
fn accumulating_is_a_larger_batch() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let losses = |name: &str, more: &[&str]| {
        let (_, heard) =
            train(settings(more), &text(1), RunOptions::new(&source, &dir.path().join(name))).unwrap();
        heard.records.iter().map(|record| record.loss).collect::<Vec<_>>()
    };
    let fixed = ["sparsity=1", "steps=6", "batch=4", "accumulate=1"];
    let (one, parts) =
        (losses("one", &fixed), losses("parts", &[&fixed[..2], &["batch=1", "accumulate=4"]].concat()));
    for (a, b) in one.iter().zip(&parts) {
        assert!((a - b).abs() < 2e-4, "{one:?} {parts:?}");
    }
}
