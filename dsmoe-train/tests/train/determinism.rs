//! The weights of a run are a function of model, text and configuration, to the bit.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::*;
use dsmoe_core::Model;
use dsmoe_train::{Observer, Outcome, StepRecord, Trainer};

#[test]
fn one_seed_one_result_whatever_the_threads() {
    let bed = Bed::new(true);
    let run = |name: &str, more: &[&str]| {
        assert_eq!(bed.whole(name, more).records.len(), 20);
        weights(&bed.path(name))
    };
    let first = run("first", &[]);
    assert_ne!(first, weights(&bed.source));
    assert_eq!(run("again", &[]), first);
    assert_eq!(run("one thread", &["threads=1"]), first);
    assert_eq!(run("two threads", &["threads=2"]), first);
    assert_ne!(run("another seed", &["seed=5"]), first);
}

#[test]
fn an_interrupted_run_ends_as_a_whole_one() {
    let bed = Bed::new(true);
    let (whole, parts) = (bed.path("whole"), bed.path("parts"));
    let all = bed.whole("whole", &[]);
    let first = bed.part("parts", 10, &[]);
    assert_eq!(first.saved, [10]);
    assert!(!parts.join("model.safetensors").exists());
    let second = bed.rest("parts", &["threads=2"]);
    second.noted(&["at step 10 of 20"]);

    assert_eq!(weights(&parts), weights(&whole));
    let numbers = |record: &StepRecord| (record.step, record.loss, record.grad_norm, record.sparsity_weight);
    let of_parts = first.records.iter().chain(&second.records).map(numbers);
    assert!(of_parts.eq(all.records.iter().map(numbers)), "{first:?} {second:?} {all:?}");
    let moments = |out: &std::path::Path| {
        std::fs::read(out.join("checkpoints/step-00000020/optimizer.safetensors")).unwrap()
    };
    assert_eq!(moments(&parts), moments(&whole));

    // A finished run, resumed, writes its model again and takes no step.
    std::fs::remove_file(parts.join("model.safetensors")).unwrap();
    let third = bed.rest("parts", &[]);
    assert_eq!(third.records.len(), 0);
    third.noted(&["all 20 steps are done"]);
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
    let (bed, stop) = (Bed::new(true), AtomicBool::new(false));
    bed.whole("whole", &[]);
    let model = Model::load(&bed.source).unwrap();
    let mut trainer = Trainer::new(model, &text(1), settings(&[]), bed.options("out")).unwrap();
    let outcome = trainer.run(&mut StopAtSeven(&stop), &stop).unwrap();
    assert_eq!(outcome, Outcome::Interrupted { step: 7 });
    assert!(bed.path("out/checkpoints/step-00000007/state.json").is_file());
    // The same trainer can go on, and so can another process.
    stop.store(false, Ordering::Relaxed);
    assert_eq!(trainer.run(&mut (), &stop).unwrap(), Outcome::Finished);
    assert_eq!(weights(&bed.path("out")), weights(&bed.path("whole")));
}

#[test]
fn accumulating_is_a_larger_batch() {
    let bed = Bed::new(true);
    let fixed = &["sparsity=1", "steps=6"][..];
    let one = bed.whole("one", &[fixed, &["batch=4", "accumulate=1"]].concat()).records;
    let parts = bed.whole("parts", &[fixed, &["batch=1", "accumulate=4"]].concat()).records;
    assert_eq!(one.len(), parts.len());
    for (a, b) in one.iter().zip(&parts) {
        assert!((a.loss - b.loss).abs() < 2e-4, "{one:?} {parts:?}");
    }
}
