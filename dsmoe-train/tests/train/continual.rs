//! Tasks in a row: what is learnt, pruned, kept and forgotten.

use std::path::Path;

use dsmoe_core::Model;
use dsmoe_datasets::{TokenSource, TokenStream};
use dsmoe_kernels::rng::Rng;
use dsmoe_train::TrainConfig;
use dsmoe_train::continual::{ContinualOptions, ContinualReport, Method, Task, learn};

use crate::common::{Bed, VOCAB, settings, text, weights};

/// Text whose documents walk the vocabulary in steps of one size.
fn walk(stride: u64) -> TokenStream {
    let mut rng = Rng::new(stride, 1);
    let mut stream = TokenStream { ids: Vec::new(), doc_starts: Vec::new() };
    for _ in 0..60 {
        stream.doc_starts.push(stream.ids.len());
        let mut id = rng.below(VOCAB as u64);
        for _ in 0..40 {
            stream.ids.push(id as u32);
            id = (id + stride) % VOCAB as u64;
        }
    }
    stream
}

fn task(name: &str, steps: u64, text: &TokenStream) -> Task {
    let source = TokenSource { name: name.to_owned(), weight: 1.0, tokens: text.into() };
    Task { name: name.to_owned(), steps, source }
}

fn three(steps: u64) -> Vec<Task> {
    [("one", 1), ("five", 5), ("seven", 7)].map(|(name, stride)| task(name, steps, &walk(stride))).into()
}

fn train() -> TrainConfig {
    settings(&["sparsity=1", "lr=1e-2", "warmup_steps=2"])
}

fn method(text: &str) -> Method {
    toml_of(text)
}

fn toml_of(text: &str) -> Method {
    let table: serde_json::Value = serde_json::from_str(text).unwrap();
    serde_json::from_value(table).unwrap()
}

fn options(bed: &Bed, out: &str, method: Method) -> ContinualOptions {
    ContinualOptions { model: bed.source.clone(), out: bed.path(out), resume: false, train: train(), method }
}

fn whole(bed: &Bed, out: &str, method: Method, tasks: &[Task]) -> ContinualReport {
    learn(&options(bed, out, method), tasks, &mut |_| true).unwrap()
}

/// Learns all tasks in `whole`, and returns its report beside the options that do so in `parts`, which resume.
fn whole_and_parts(
    bed: &Bed,
    train: TrainConfig,
    method: Method,
    tasks: &[Task],
) -> (ContinualReport, ContinualOptions) {
    let whole = ContinualOptions { train, ..options(bed, "whole", method) };
    let report = learn(&whole, tasks, &mut |_| true).unwrap();
    (report, ContinualOptions { out: bed.path("parts"), resume: true, ..whole })
}

fn after(bed: &Bed, out: &str, task: &str) -> std::path::PathBuf {
    bed.path(out).join("tasks").join(task)
}

/// The bytes of all files of all tasks.
fn bytes(out: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for dir in std::fs::read_dir(out.join("tasks")).unwrap() {
        let dir = dir.unwrap().path();
        for file in std::fs::read_dir(&dir).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(out).unwrap().display().to_string();
            all.push((name, std::fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn one_task_of_plain_steps_is_a_run() {
    for (experts, setting) in [(true, "active_target=0.5"), (false, "sparsity=1")] {
        let bed = Bed::new(experts);
        bed.whole("run", &[setting]);
        let options =
            ContinualOptions { train: settings(&[setting]), ..options(&bed, "row", method(r#"{"rho": 0}"#)) };
        learn(&options, &[task("one", 20, &text(1))], &mut |_| true).unwrap();
        assert_eq!(weights(&bed.path("run")), weights(&after(&bed, "row", "01-one")), "experts: {experts}");
        // Pruning that leaves every weight is none.
        for when in ["during", "end"] {
            let whole = format!(r#"{{"rho": 0, "prune": "magnitude", "density": 1.0, "when": "{when}"}}"#);
            let dense = ContinualOptions { out: bed.path(when), method: method(&whole), ..options.clone() };
            let report = learn(&dense, &[task("one", 20, &text(1))], &mut |_| true).unwrap();
            assert_eq!(weights(&bed.path("run")), weights(&after(&bed, when, "01-one")), "{when}: {experts}");
            let [learnt] = &report.learnt[..] else { panic!("{report:?}") };
            assert_eq!((learnt.density, learnt.jump), (1.0, (when == "end").then_some(0.0)));
        }
        let uphill = ContinualOptions { out: bed.path("uphill"), method: method("{}"), ..options };
        learn(&uphill, &[task("one", 20, &text(1))], &mut |_| true).unwrap();
        assert_ne!(weights(&bed.path("run")), weights(&after(&bed, "uphill", "01-one")));
    }
}

const ALL: &str =
    r#"{"prune": "scores", "every": 3, "select": 0.4, "select_every": 4, "replay": 12, "ewc": 0.5}"#;

#[test]
fn what_is_interrupted_ends_as_a_whole() {
    let bed = Bed::new(false);
    let tasks = three(12);
    let (report, parts) = whole_and_parts(&bed, train(), method(ALL), &tasks);
    // A process was killed in its first write. No process has the largest number.
    std::fs::create_dir(bed.path("parts")).unwrap();
    if std::path::Path::new("/proc/self").exists() {
        std::fs::write(bed.path("parts").join(".continual.json.tmp-4294967295"), "{").unwrap();
    }
    // Inside the first, the second and the third task, and between two.
    let mut before = 0;
    for steps in [5u64, 17, 24, 30] {
        let mut heard = Vec::new();
        let part = learn(&parts, &tasks, &mut |progress| {
            // While candidates are scored, the last step is heard again.
            if progress.done > before {
                heard.push(progress.done);
            }
            progress.done < steps
        });
        assert!(!part.unwrap().finished);
        heard.dedup();
        // No step is taken twice.
        assert_eq!(heard, Vec::from_iter(before + 1..=steps));
        before = steps;
    }
    let rest = learn(&parts, &tasks, &mut |_| true).unwrap();
    assert_eq!(rest, report);
    let (left, right) = (bytes(&bed.path("whole")), bytes(&bed.path("parts")));
    assert!(left.len() > 12);
    for (left, right) in left.iter().zip(&right) {
        assert!(left == right, "{} differs", left.0);
    }
    assert_eq!(left.len(), right.len());
    // Again: no step is left to take, and nothing changes.
    let again = learn(&parts, &tasks, &mut |progress| {
        assert_eq!(progress.loss, None, "a step");
        true
    });
    assert_eq!(again.unwrap(), report);

    for file in ["start.json", "tasks/01-one/report.json", "tasks/01-one/model.safetensors"] {
        let path = bed.path("parts").join(file);
        let good = std::fs::read(&path).unwrap_or_else(|_| panic!("{}", path.display()));
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        std::fs::write(&path, bad).unwrap();
        let message = learn(&parts, &tasks, &mut |_| true).unwrap_err().to_string();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(message.contains(name) && message.lines().count() == 1, "{message}");
        std::fs::write(&path, good).unwrap();
    }
    let other = ContinualOptions { method: method(r#"{"rho": 0.1}"#), ..parts.clone() };
    let message = learn(&other, &tasks, &mut |_| true).unwrap_err().to_string();
    assert!(message.contains("continual.json: method was"), "{message}");
    let fresh = ContinualOptions { resume: false, ..parts };
    let message = learn(&fresh, &tasks, &mut |_| true).unwrap_err().to_string();
    assert!(message.contains("is not empty"), "{message}");
}

/// A process that dies goes on from the last checkpoint that `save_every` asked for, whatever the method keeps between steps.
#[test]
fn a_task_goes_on_from_a_checkpoint_inside_it() {
    for (name, experts, text) in [
        ("during", true, r#"{"prune": "magnitude", "density": 0.5, "every": 3, "regrow": false}"#),
        ("dual", false, r#"{"prune": "dual-averaging"}"#),
        ("selected", false, r#"{"prune": "none", "select": 0.5, "select_every": 4, "replay": 8}"#),
    ] {
        let bed = Bed::new(experts);
        let tasks = three(12);
        let gates = if experts { "active_target=0.5" } else { "sparsity=1" };
        let train = settings(&[gates, "lr=1e-2", "save_every=5"]);
        let (report, parts) = whole_and_parts(&bed, train, method(text), &tasks);
        for (dies, goes_on) in [(9u64, 6u64), (23, 23)] {
            let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                learn(&parts, &tasks, &mut |progress| {
                    assert!(progress.done < dies);
                    true
                })
            }));
            assert!(killed.is_err(), "{name}");
            let mut heard = Vec::new();
            let stopped = learn(&parts, &tasks, &mut |progress| {
                heard.push(progress.done);
                progress.done < goes_on
            });
            assert!(!stopped.unwrap().finished);
            assert!(heard[0] >= goes_on - 1 && heard.ends_with(&[goes_on]), "{name}: {heard:?}");
        }
        assert_eq!(learn(&parts, &tasks, &mut |_| true).unwrap(), report, "{name}");
        assert!(bytes(&bed.path("whole")) == bytes(&bed.path("parts")), "{name}");
        assert!(!bed.path("parts").join("checkpoints").exists(), "{name}");
    }
}

/// Many candidates take long to score.
#[test]
fn an_interruption_is_heard_while_candidates_are_scored() {
    let bed = Bed::new(false);
    let tasks = three(6);
    let text = r#"{"prune": "none", "select": 0.25, "select_every": 6, "replay": 8}"#;
    let (report, parts) = whole_and_parts(&bed, train(), method(text), &tasks);
    // The text is evaluated before the first task.
    let start = bed.path("parts").join("start.json");
    assert!(!learn(&parts, &tasks, &mut |_| !start.is_file()).unwrap().finished);
    assert!(start.is_file());
    let mut before_a_step = 0;
    for calls in 1..12 {
        let mut heard = Vec::new();
        let stopped = learn(&parts, &tasks, &mut |progress| {
            heard.push(progress.loss);
            heard.len() < calls
        });
        assert!(!stopped.unwrap().finished);
        before_a_step += usize::from(heard.len() > 1 && heard.ends_with(&[None, None]));
    }
    assert!(before_a_step > 0);
    assert_eq!(learn(&parts, &tasks, &mut |_| true).unwrap(), report);
    assert!(bytes(&bed.path("whole")) == bytes(&bed.path("parts")));
}

/// Much held-out text takes long to evaluate: before the first task, around the pruning at the end of a task, and after it. So does
/// the Fisher information.
#[test]
fn an_interruption_is_heard_while_held_out_text_is_evaluated() {
    for (name, experts, text) in [
        ("end", false, r#"{"prune": "scores", "density": 0.5, "when": "end"}"#),
        ("dual", false, r#"{"prune": "dual-averaging"}"#),
        ("during", true, r#"{"prune": "magnitude", "density": 0.5, "every": 2}"#),
        ("pulled", false, r#"{"ewc": 0.5, "replay": 8}"#),
    ] {
        let bed = Bed::new(experts);
        let tasks = three(4);
        let gates = if experts { "active_target=0.5" } else { "sparsity=1" };
        let (report, parts) = whole_and_parts(&bed, settings(&[gates, "lr=1e-2"]), method(text), &tasks);
        let (mut calls, mut between_steps) = (1, 0);
        loop {
            let mut heard = Vec::new();
            let part = learn(&parts, &tasks, &mut |progress| {
                heard.push(progress.done);
                heard.len() < calls
            });
            let part = part.unwrap();
            if part.finished {
                assert_eq!(part, report, "{name}");
                break;
            }
            // What is heard again after the last step of a task is no step.
            let again = heard.windows(2).last().is_some_and(|last| last[0] == last[1] && last[0] % 4 == 0);
            between_steps += usize::from(again && heard.last() > Some(&0));
            calls += 1;
            assert!(calls < 1000, "{name}: it does not come to its end");
        }
        assert!(between_steps > 0, "{name}: {between_steps}");
        assert!(bytes(&bed.path("whole")) == bytes(&bed.path("parts")), "{name}");
        assert!(!bed.path("parts").join("checkpoints").exists(), "{name}");
    }
}

#[test]
fn what_is_pruned_is_zero_and_the_rest_learns() {
    let bed = Bed::new(false);
    for (name, text) in [
        ("magnitude", r#"{"prune": "magnitude", "density": 0.5, "rho": 0, "every": 3}"#),
        ("end", r#"{"prune": "magnitude", "density": 0.5, "rho": 0, "when": "end", "over": "row"}"#),
        ("scores", r#"{"prune": "scores", "density": 0.5, "every": 3, "regrow": false}"#),
        ("score-end", r#"{"prune": "scores", "density": 0.5, "when": "end"}"#),
    ] {
        let report = whole(&bed, name, method(text), &three(20));
        assert_eq!(report.learnt.len(), 3);
        for (i, learnt) in report.learnt.iter().enumerate() {
            assert!((learnt.density - 0.5).abs() < 2e-3, "{name}: {}", learnt.density);
            assert_eq!(learnt.jump.is_some(), name.contains("end"));
            assert!(learnt.losses[i] < report.start[i], "{name}: {learnt:?}");
            let model = Model::load(&after(&bed, name, &format!("{:02}-{}", i + 1, learnt.name))).unwrap();
            let masks = model.masks().unwrap();
            assert_eq!(masks.first_nonzero(model.params(), model.layout()), None);
        }
    }
    // Pruned weights that may not grow again are the same after every task.
    let masks = |task: &str| Model::load(&after(&bed, "scores", task)).unwrap().masks().cloned();
    assert_eq!(masks("01-one"), masks("03-seven"));
    let masks = |task: &str| Model::load(&after(&bed, "magnitude", task)).unwrap().masks().cloned();
    assert_ne!(masks("01-one"), masks("03-seven"));
}

#[test]
fn dual_averaging_prunes_without_a_share() {
    let bed = Bed::new(false);
    let share = |out: &str, text: &str| {
        let mut options = options(&bed, out, method(text));
        options.train = settings(&["sparsity=1", "lr=0.1"]);
        learn(&options, &three(20), &mut |_| true).unwrap().learnt[0].density
    };
    let mild = share("mild", r#"{"prune": "dual-averaging", "c": 0.005}"#);
    let strong = share("strong", r#"{"prune": "dual-averaging", "c": 0.05}"#);
    assert!(strong < mild && mild < 1.0, "{strong} and {mild} left");
    assert!(strong > 0.0);
}

#[test]
fn selection_among_equal_sequences_changes_nothing() {
    // Documents of one token and different lengths: every window is the same.
    let mut stream = TokenStream { ids: Vec::new(), doc_starts: Vec::new() };
    for len in 40..100 {
        stream.doc_starts.push(stream.ids.len());
        stream.ids.extend(std::iter::repeat_n(7, len));
    }
    let bed = Bed::new(false);
    let tasks = [task("same", 8, &stream)];
    whole(&bed, "all", method("{}"), &tasks);
    let chosen = whole(&bed, "chosen", method(r#"{"select": 0.4, "select_every": 4}"#), &tasks);
    assert!(chosen.learnt[0].scored_tokens > 0);
    let [all, some] = ["all", "chosen"].map(|out| weights(&after(&bed, out, "01-same")));
    assert_eq!(all, some);
    // Of different ones, others are learnt.
    whole(&bed, "all of one", method("{}"), &[task("one", 8, &walk(1))]);
    whole(&bed, "some of one", method(r#"{"select": 0.4, "select_every": 4}"#), &[task("one", 8, &walk(1))]);
    let [all, some] = ["all of one", "some of one"].map(|out| weights(&after(&bed, out, "01-one")));
    assert_ne!(all, some);
}

#[test]
fn replay_and_a_pull_hold_what_was_learnt() {
    let bed = Bed::new(false);
    let plain = whole(&bed, "plain", method(r#"{"rho": 0}"#), &three(40));
    let replayed =
        whole(&bed, "replayed", method(r#"{"rho": 0, "replay": 40, "replay_share": 0.5}"#), &three(40));
    let pulled = whole(&bed, "pulled", method(r#"{"rho": 0, "ewc": 3000}"#), &three(40));
    let forgetting = |report: &ContinualReport| report.forgetting.unwrap();
    let [plain_f, replayed_f, pulled_f] = [&plain, &replayed, &pulled].map(forgetting);
    assert!(plain_f > 0.1, "nothing was forgotten: {plain_f}");
    assert!(replayed_f < 0.5 * plain_f, "{replayed_f} of {plain_f}");
    assert!(pulled_f < 0.9 * plain_f, "{pulled_f} of {plain_f}");
    // The matrix and the means say the same.
    let last = &plain.learnt[2].losses;
    let rise = (0..2).map(|j| last[j] - plain.learnt[j].losses[j]).sum::<f64>() / 2.0;
    assert!((rise - plain_f).abs() < 1e-12);
    assert!((last.iter().sum::<f64>() / 3.0 - plain.mean_final.unwrap()).abs() < 1e-12);
    // Each task has its part of what is kept.
    let kept: Vec<usize> = (0..3)
        .map(|task| replayed.learnt[2].replay.iter().filter(|kept| kept.task == task).count())
        .collect();
    assert_eq!(kept, [13, 13, 13]);
    assert!(plain.learnt[2].replay.is_empty());
}

#[test]
fn a_task_of_no_steps_is_measured_alone() {
    let bed = Bed::new(false);
    let mut tasks = three(10);
    (tasks[0].steps, tasks[2].steps) = (0, 0);
    let report = whole(&bed, "row", method(r#"{"rho": 0}"#), &tasks);
    assert_eq!((report.learnt.len(), report.start.len()), (1, 3));
    assert_eq!((report.learnt[0].losses.len(), report.forgetting), (3, None));
    assert_eq!(report.mean_final, Some(report.learnt[0].losses[1]));
}

#[test]
fn what_cannot_be_learnt_is_said() {
    let bed = Bed::new(false);
    let with = |text: &str, tasks: &[Task], train: TrainConfig| {
        let options = ContinualOptions { train, ..options(&bed, "refused", method(text)) };
        let error = learn(&options, tasks, &mut |_| true).unwrap_err().to_string();
        assert!(!bed.path("refused").exists(), "{error}");
        error
    };
    let twice = [task("one", 3, &walk(1)), task("one", 3, &walk(2))];
    let big = TokenStream { ids: vec![VOCAB as u32; 400], doc_starts: vec![0] };
    let many = vec![twice[0].clone(); 1001];
    for (error, wanted) in [
        (with("{}", &[], train()), "steps is 0 in every task"),
        (with("{}", &three(0), train()), "steps is 0 in every task"),
        (with("{}", &twice, train()), "the name of a task is \"one\" twice"),
        (with("{}", &many, train()), "the number of tasks is 1001; use at most 1000"),
        (with("{}", &[task("../x", 3, &walk(1))], train()), "the name of a task is \"../x\""),
        (with(r#"{"density": 0.5}"#, &three(3), train()), "density is set; use it with prune"),
        (with("{}", &[task("big", 3, &big)], train()), "a token id of the text is 48"),
        (with("{}", &three(3), settings(&["sparsity=1", "seq=65"])), "seq is 65; use at most the model's"),
        (with("{}", &three(3), settings(&["sparsity=1", "valid_fraction=0"])), "valid_fraction is 0"),
        (
            with("{}", &three(3), settings(&["active_target=0.5"])),
            "active_target is 0.5; use a model with experts",
        ),
    ] {
        assert!(error.starts_with(wanted), "{error}");
    }
}
