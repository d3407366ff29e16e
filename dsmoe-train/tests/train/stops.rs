//! Stops behind a step: while thresholds are fitted, and while held-out text is evaluated.

use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_train::{EvalReport, Observer, Outcome, StepRecord};

use crate::common::*;
use crate::held::switched;
use crate::processes::assert_same;

/// Raises the flag when it hears of the work behind steps for the `at`-th time.
struct StopBehind<'s> {
    stop: &'s AtomicBool,
    at: usize,
    calls: usize,
    heard: Heard,
}

impl StopBehind<'_> {
    fn hear(&mut self) {
        self.calls += 1;
        if self.calls == self.at {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

impl Observer for StopBehind<'_> {
    fn step(&mut self, record: &StepRecord) {
        self.heard.step(record);
    }
    fn fitting(&mut self, done: usize, all: usize) {
        assert!(done < all);
        self.hear();
    }
    fn evaluating(&mut self, done: usize, all: usize) {
        assert!(done <= all && all > 0);
        self.hear();
    }
    fn evaluated(&mut self, step: u64, report: &EvalReport) {
        self.heard.evaluated(step, report);
    }
}

#[test]
fn a_stop_behind_a_step_is_made_up_for() {
    let bed = switched();
    for (kind, more) in [
        ("plain", &["eval_every=6", "steps=20", "keep=1"][..]),
        ("target", &["active_target=0.4", "hold=threshold", "eval_every=8", "save_every=4"]),
        ("range", &["active_range=[0.5, 1.0]"]),
    ] {
        let more = [&["valid_fraction=0.5", "steps=16"][..], more].concat();
        let [whole, out] = ["whole", "parts"].map(|name| format!("{kind} {name}"));
        let all = bed.whole(&whole, &more);
        let (mut at, mut evals, mut steps, mut behind) = (1, Vec::new(), Vec::new(), 0);
        loop {
            let stop = AtomicBool::new(false);
            let mut observer = StopBehind { stop: &stop, at, calls: 0, heard: Heard::default() };
            let outcome = bed.watched(&mut observer, &stop, &more, bed.resumed(&out));
            let heard = observer.heard;
            steps.extend(heard.records.iter().map(|record| record.step));
            evals.extend(heard.evals.iter().map(|(step, report)| (*step, report.ppl)));
            let Outcome::Interrupted { step } = outcome else { break };
            assert!(!bed.path(&out).join("model.safetensors").exists());
            let state = bed.path(&out).join(format!("checkpoints/step-{step:08}/state.json"));
            let left = std::fs::read_to_string(state).is_ok_and(|text| text.contains("\"left\""));
            behind += usize::from(left);
            at += 1 + at / 4;
            assert!(at < 100_000, "{kind}: it does not come to its end");
        }
        assert!(behind > 0, "{kind}: no stop was heard behind a step");
        // No step was taken twice, and every evaluation was made, with the same result.
        assert_eq!(steps, Vec::from_iter(1..=all.records.len() as u64), "{kind}");
        let wanted: Vec<(u64, f64)> = all.evals.iter().map(|(step, report)| (*step, report.ppl)).collect();
        evals.dedup();
        assert_eq!(evals, wanted, "{kind}");
        let [whole, out] = [whole, out].map(|name| bed.path(&name));
        assert_eq!(weights(&out), weights(&whole), "{kind}");
        let config = |dir: &std::path::Path| std::fs::read_to_string(dir.join("config.json")).unwrap();
        assert_eq!(config(&out), config(&whole), "{kind}");
        let recorded = |dir: &std::path::Path| -> Vec<(u64, bool)> {
            let lines = metrics(dir);
            lines[1..]
                .iter()
                .map(|line| (line["step"].as_u64().unwrap(), line.get("eval_nll").is_some()))
                .collect()
        };
        assert_eq!(recorded(&out), recorded(&whole), "{kind}");
    }
}

/// Raises the flag in the evaluation behind the last step.
struct StopInTheLastEvaluation<'s> {
    stop: &'s AtomicBool,
    last: u64,
    step: u64,
}

impl Observer for StopInTheLastEvaluation<'_> {
    fn step(&mut self, record: &StepRecord) {
        self.step = record.step;
    }
    fn evaluating(&mut self, _: usize, _: usize) {
        if self.step == self.last {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// The same files as those of a run that nobody stopped, after the first resume and after every other one.
#[test]
fn a_resume_of_a_run_that_a_resume_finished_evaluates_nothing() {
    let bed = switched();
    for (kind, more) in [
        ("plain", &["keep=1"][..]),
        ("target", &["active_target=0.4", "hold=threshold", "save_every=4", "keep=1"]),
        ("range", &["active_range=[0.5, 1.0]"]),
    ] {
        let more = [&["valid_fraction=0.5", "steps=8"][..], more].concat();
        let [whole, out] = ["whole", "stopped"].map(|name| format!("{kind} {name}"));
        bed.whole(&whole, &more);
        let stop = AtomicBool::new(false);
        let mut observer = StopInTheLastEvaluation { stop: &stop, last: 8, step: 0 };
        let outcome = bed.watched(&mut observer, &stop, &more, bed.options(&out));
        assert_eq!(outcome, Outcome::Interrupted { step: 8 });
        let state = bed.path(&out).join("checkpoints/step-00000008/state.json");
        let saved = std::fs::read_to_string(&state).unwrap();
        assert!(saved.contains("\"left\": \"evaluation\""), "{kind}: {saved}");

        let heard = bed.rest(&out, &more);
        assert_eq!((heard.evals.len(), &heard.saved[..]), (1, &[8][..]), "{kind}");
        let [whole, stopped] = [&whole, &out].map(|name| bed.path(name));
        assert_same(&stopped, &whole);
        for _ in 0..2 {
            let heard = bed.rest(&out, &more);
            assert_eq!((heard.evals.len(), heard.saved.len()), (0, 0), "{kind}");
            assert_same(&stopped, &whole);
        }
    }
}

/// The thresholds that were fitted before the stop are not fitted again.
#[test]
fn a_stop_behind_fitted_thresholds_keeps_them() {
    /// Hears of the fit of thresholds, and stops in the evaluation behind it.
    struct Fitting<'s>(&'s AtomicBool, usize);

    impl Observer for Fitting<'_> {
        fn fitting(&mut self, _: usize, _: usize) {
            self.1 += 1;
        }
        fn evaluating(&mut self, _: usize, _: usize) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let bed = switched();
    let more = ["active_target=0.4", "hold=threshold", "valid_fraction=0.5", "steps=4"];
    bed.whole("whole", &more);
    // Stopped in the fit, then in the evaluation, then not at all.
    let stop = AtomicBool::new(false);
    let mut observer = StopBehind { stop: &stop, at: 1, calls: 0, heard: Heard::default() };
    let run = |observer: &mut dyn Observer, stop: &AtomicBool| {
        bed.watched(observer, stop, &more, bed.resumed("out"))
    };
    let state = bed.path("out").join("checkpoints/step-00000004/state.json");
    let left = || std::fs::read_to_string(&state).unwrap();
    assert_eq!(run(&mut observer, &stop), Outcome::Interrupted { step: 4 });
    assert!(left().contains("\"left\": \"thresholds\""), "{}", left());
    let stop = AtomicBool::new(false);
    let mut observer = Fitting(&stop, 0);
    assert_eq!(run(&mut observer, &stop), Outcome::Interrupted { step: 4 });
    assert!(observer.1 > 0 && left().contains("\"left\": \"evaluation\""), "{}", left());
    // This run does not listen to the flag that the observer raises.
    let mut observer = Fitting(&stop, 0);
    assert_eq!(run(&mut observer, &AtomicBool::new(false)), Outcome::Finished);
    assert_eq!(observer.1, 0);
    assert_same(&bed.path("out"), &bed.path("whole"));
}
