//! Runs whose share of active experts is held by thresholds.

use std::path::Path;

use crate::common::*;
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::TokenStream;
use dsmoe_kernels::Precision;
use dsmoe_kernels::cross_entropy::IGNORE;
use dsmoe_router::BudgetController;
use dsmoe_train::{Outcome, RunOptions, TrainConfig};

/// A bed whose model has binary gates.
pub(crate) fn switched() -> Bed {
    let bed = Bed::new(true);
    edit_config(&bed.source, |moe| moe["gate_value"] = "binary".into());
    bed
}

/// Changes the `dsmoe` object of a config.json.
fn edit_config(dir: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json["dsmoe"]);
    std::fs::write(&path, json.to_string()).unwrap();
}

/// The active share of a model on a text.
fn share(model: &Inference, ids: &[u32]) -> f64 {
    let mut stats = model.new_stats().unwrap();
    let inputs = &ids[..ids.len() / 16 * 16];
    let (targets, mut losses) = (vec![IGNORE; inputs.len()], vec![0.0; inputs.len()]);
    let batch = Batch { inputs, targets: &targets, seq: 16 };
    model.score(&mut losses, batch, Some(&mut stats), &mut Workspace::default()).unwrap();
    stats.active_ratio()
}

#[test]
fn thresholds_hold_the_share_of_binary_gates_and_are_stored() {
    let bed = switched();
    for target in [0.3, 0.5] {
        let name = format!("out{target}");
        let more = [&format!("active_target={target}")[..], "steps=60", "lr=1e-2", "hold=threshold"];
        let heard = bed.whole(&name, &more);
        let (first, last) = (&heard.records[0], heard.records.last().unwrap());
        assert_eq!((first.sparsity_weight, first.threshold_logit), (Some(0.0), Some(0.0)));
        assert!(first.activation_ratio.unwrap() > 0.8, "{first:?}");
        assert!((last.activation_ratio.unwrap() - target).abs() < 0.06, "{last:?}");
        let share = heard.evals.last().unwrap().1.active_ratio.unwrap();
        // A few hundred tokens.
        assert!((share - target).abs() < 0.08, "{share} for {target}");
        // The directory alone opens the same share.
        let model = Model::load(&bed.path(&name)).unwrap();
        let threshold = model.config().moe.as_ref().unwrap().router.threshold;
        assert!(threshold > 0.6 && model.config().moe.as_ref().unwrap().parts.budgets.is_empty());
        let again = dsmoe_train::evaluate(
            &Inference::new(&model, Precision::F32),
            &text(1).ids,
            dsmoe_train::EvalOptions::new(17),
            &mut |_, _| {},
        );
        let again = again.unwrap().active_ratio.unwrap();
        assert!((again - target).abs() < 0.02, "{again} for {target}");
    }
    let loss = bed.whole("loss", &[]);
    assert!(loss.records[5].threshold_logit.is_none() && loss.records[5].sparsity_weight != Some(0.0));
    assert!(bed.whole("weight", &["sparsity=1"]).records[5].threshold_logit.is_none());
}

#[test]
fn a_held_run_resumes_to_the_bit() {
    let bed = switched();
    for (kind, more) in [
        ("one", vec!["active_target=0.4", "hold=threshold"]),
        ("range", vec!["active_range=[0.3, 1.0]", "separability=0.1"]),
    ] {
        let [whole, parts] = ["whole", "parts"].map(|name| format!("{kind} {name}"));
        let all = bed.whole(&whole, &more);
        let first = bed.part(&parts, 11, &more);
        let rest = bed.rest(&parts, &[&more[..], &["threads=2"]].concat());
        assert_eq!(weights(&bed.path(&parts)), weights(&bed.path(&whole)), "{kind}");
        let config = |name: &str| std::fs::read_to_string(bed.path(name).join("config.json")).unwrap();
        assert_eq!(config(&parts), config(&whole));
        let bars = |heard: &Heard| heard.records.iter().map(|r| r.threshold_logit).collect::<Vec<_>>();
        assert_eq!([bars(&first), bars(&rest)].concat(), bars(&all), "{kind}");
        let ppl = |heard: &Heard| heard.evals.iter().map(|(_, report)| report.ppl).collect::<Vec<_>>();
        assert_eq!(ppl(&rest), ppl(&all));
    }
    let other = settings(&["active_target=0.6", "hold=threshold"]);
    refused(&text(1), other, bed.resumed("one parts"), &["active_target was 0.4"]);
}

#[test]
fn a_range_of_budgets_makes_a_model_for_all_of_them() {
    let bed = switched();
    let more = ["active_range=[0.25, 1.0]", "steps=80", "accumulate=4", "lr=1e-2"];
    let heard = bed.whole("out", &more);
    heard.noted(&["fitted to the first training text", "fitted to the training text that comes next"]);
    let far =
        heard.records[20..].iter().map(|record| (record.activation_ratio.unwrap(), record.budget.unwrap()));
    let far: Vec<_> = far.filter(|(share, budget)| (share - budget).abs() > 0.12).collect();
    assert!(far.len() < 6, "{far:?}");
    let budgets: Vec<f64> = heard.records.iter().map(|record| record.budget.unwrap()).collect();
    let spread = |f: fn(f64, f64) -> f64| budgets.iter().copied().reduce(f).unwrap();
    assert!(spread(f64::max) - spread(f64::min) > 0.2, "{budgets:?}");

    let model = Model::load(&bed.path("out")).unwrap();
    let moe = model.config().moe.clone().unwrap();
    let stored: Vec<f64> = moe.parts.budgets.iter().map(|budget| budget.active).collect();
    assert_eq!(stored, [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]);
    assert_eq!(moe.active_target, Some(0.25));
    let mut model = Inference::new(&model, Precision::F32);
    let ids = text(1).ids;
    let mut shares = Vec::new();
    for active in [0.25, 0.3, 0.5, 0.7, 1.0] {
        model.set_active(active).unwrap();
        shares.push((active, share(&model, &ids)));
    }
    assert!(shares.iter().all(|(active, share)| (active - share).abs() < 0.04), "{shares:?}");
    // A second run starts from the stored thresholds.
    let again = RunOptions { source: bed.path("out"), ..bed.options("again") };
    let (end, heard) =
        train(&text(1), settings(&["active_target=0.5", "steps=4", "hold=threshold"]), again).unwrap();
    assert_eq!(end, Outcome::Finished);
    assert!((heard.records[0].activation_ratio.unwrap() - 0.5).abs() < 0.1, "{heard:?}");
}

/// Some text of one kind, in several seeds.
fn texts(seeds: std::ops::Range<u64>) -> TokenStream {
    let mut all = TokenStream { ids: Vec::new(), doc_starts: Vec::new() };
    for seed in seeds {
        let part = text(seed);
        all.doc_starts.extend(part.doc_starts.iter().map(|start| start + all.ids.len()));
        all.ids.extend(part.ids);
    }
    all
}

/// A run of 60 steps and one of 600, from gates that are all open and from gates that open the share, end at the share on
/// text that neither has seen.
#[test]
fn short_and_long_runs_land_within_a_point() {
    let bed = switched();
    let (train_text, other) = (texts(1..13), texts(50..62));
    let target = 0.4;
    let run = |name: &str, more: &[&str], source: &Path| {
        let target = format!("active_target={target}");
        let settings =
            settings(&[&[&target[..], "hold=threshold", "accumulate=1", "batch=4"], more].concat());
        let (_, heard) =
            train(&train_text, settings, RunOptions { source: source.to_owned(), ..bed.options(name) })
                .unwrap();
        let model = Inference::load(&bed.path(name), Precision::F32).unwrap();
        (share(&model, &other.ids), heard)
    };
    // A start whose gates open the share and have learned nothing.
    run("start", &["steps=30", "lr=0"], &bed.source);
    let started = bed.path("start");
    for (name, steps, source) in [
        ("open 60", "steps=60", &bed.source),
        ("open 600", "steps=600", &bed.source),
        ("started 60", "steps=60", &started),
        ("started 600", "steps=600", &started),
    ] {
        let (share, heard) = run(name, &[steps, "lr=3e-3"], source);
        assert!((share - target).abs() < 0.01, "{name}: {share}");
        if source == &started {
            // A batch of 64 tokens opens what its text asks for: 4.7 points of standard deviation. Ten have 1.5.
            let shares: Vec<f64> =
                heard.records.iter().map(|record| record.activation_ratio.unwrap()).collect();
            for part in shares.chunks_exact(10) {
                let mean = part.iter().sum::<f64>() / 10.0;
                assert!((mean - target).abs() < 0.05, "{name}: {part:?}");
            }
        }
        // The gradient does not open the gates as a whole, so thresholds stay where they are.
        let bars: Vec<f64> = heard.records.iter().map(|record| record.threshold_logit.unwrap()).collect();
        let (settled, last) = (bars[bars.len() / 2], bars[bars.len() - 1]);
        assert!((settled - last).abs() < 0.5, "{name}: thresholds from {settled} to {last}");
    }
}

#[test]
fn separability_pushes_gates_from_their_thresholds() {
    let bed = switched();
    let loss = |name: &str, weight: &str| {
        let more = [weight, "lr=1e-2", "steps=60", "active_target=0.5", "hold=threshold"];
        let heard = bed.whole(name, &more);
        let of = |at: usize| heard.records[at].separability_loss.unwrap();
        let first = &heard.records[0];
        let beside = first.loss - first.lm_loss;
        assert!((beside - 0.3 * first.separability_loss.unwrap()).abs() < 1e-9, "{first:?}");
        (of(25), of(59))
    };
    let (middle, end) = loss("far", "separability=0.3");
    assert!(end < 0.8 * middle, "{middle} to {end}");
    assert!(bed.whole("plain", &[]).records[3].separability_loss.is_none());
    let dense = Bed::new(false);
    let config = TrainConfig { active_target: None, ..settings(&["separability=0.3"]) };
    refused(&text(1), config, dense.options("x"), &["separability is 0.3", "without gates"]);
}

#[test]
fn ways_to_hold_are_checked() {
    let bed = switched();
    let dense = Bed::new(false);
    refused(
        &text(1),
        settings(&["active_range=[0.25, 0.5]"]),
        dense.options("x"),
        &["active_range is 0.25 to 0.5", "a model with experts"],
    );
    // A run of before there was a choice goes on as it began.
    bed.part("old", 5, &[]);
    let state = bed.path("old/checkpoints/step-00000005/state.json");
    let text_of = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text_of.replace("\"hold\": \"loss\",", "")).unwrap();
    without_manifest(state.parent().unwrap());
    let other = settings(&["hold=threshold"]);
    refused(&text(1), other, bed.resumed("old"), &["hold was \"loss\" and is now \"threshold\""]);
    bed.rest("old", &[]);
    let controller = BudgetController::new(0.5, 6).unwrap();
    assert!(text_of.contains("controller") && controller.weight() == 0.0);
}
