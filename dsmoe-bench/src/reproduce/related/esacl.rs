//! After EsaCL (Ren and Honavar, arXiv 2401.05667): tasks in a row, pruned by a sharpness-aware score.

use anyhow::{Context, Result};
use dsmoe_train::TrainConfig;
use dsmoe_train::continual::{ContinualOptions, Method, Over, Prune, Task, When, learn};
use serde_json::json;

use super::experiment::{Claim, Experiment, Value};
use super::lab::Lab;
use super::sketch::shortened;
use crate::files::discard;

const STEPS: u64 = 25;
/// Those of all tasks, in a profile of four sources.
const ALL_STEPS: u64 = 4 * STEPS;
const REPLAY: usize = 64;
const DENSE: &str = "dense, replay";
const MAGNITUDE_END: &str = "magnitude at the end";
const SCORES_END: &str = "scores at the end";
const MAGNITUDE: &str = "magnitude during, replay";
const SCORES: &str = "scores during, replay";
const ROWS: [&str; 5] = [DENSE, MAGNITUDE_END, SCORES_END, MAGNITUDE, SCORES];
/// Cost of a row over that of one plain training: most steps are taken twice.
const PASSES: f64 = 2.0;
const FINAL: &str = "loss at the end";
const FORGETTING: &str = "forgetting";
const JUMP: &str = "added by pruning";

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "esacl",
    title: "after EsaCL",
    setting: "The dense model learns the sources of text one after the other, in an order that the seed turns, 25 sharpness-aware steps each. \
              Half of the weights are pruned, at the end of each task or during its first half, and may grow again in the next one. The \
              method is a construction after the abstract.",
    numbers: "mean held-out loss of all sources after the last one, mean rise of the earlier ones since they were learnt, and what \
              pruning at the end of a task adds to its loss at once, nats; 0 where nothing is pruned at the end",
    claims: &[
        Claim {
            paper: "sharpness-aware pruning needs no training afterwards (abstract): it adds less loss at once than magnitude does",
            row: SCORES_END,
            controls: &[MAGNITUDE_END],
            columns: &[JUMP],
            margin: 0.0,
            agrees: "the score is the change of the loss to second order, which magnitude ignores",
            differs: "a score to second order tells little of the removal of half of the weights, whose effects add up",
        },
        Claim {
            paper: "a sparse model learns tasks in a row with less forgetting than others at equal replay (abstract)",
            row: SCORES,
            controls: &[MAGNITUDE],
            columns: &[FORGETTING, FINAL],
            margin: 0.0,
            agrees: "weights that the sharpness of the loss depends on are kept",
            differs: "scores are of the text of one task, and rank what others need last",
        },
    ],
    plan: |sketch| {
        let config = sketch.train_config()?;
        for _ in ROWS {
            let tokens = PASSES * sketch.training_cost(&shortened(config.clone(), ALL_STEPS))?;
            sketch.other(1, tokens);
        }
        Ok(())
    },
    measure,
};

fn method_of(row: &str) -> Method {
    let (prune, when) = match row {
        MAGNITUDE_END => (Prune::Magnitude, Some(When::End)),
        SCORES_END => (Prune::Scores, Some(When::End)),
        MAGNITUDE => (Prune::Magnitude, Some(When::During)),
        SCORES => (Prune::Scores, Some(When::During)),
        _ => (Prune::None, None),
    };
    let ranks = prune != Prune::None;
    let density = ranks.then_some(0.5);
    let replay = if row.ends_with("replay") { REPLAY } else { 0 };
    let every = (when == Some(When::During)).then_some(4);
    Method { prune, when, density, every, over: ranks.then_some(Over::Matrix), replay, ..Method::default() }
}

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let (dense, config) = (lab.dense(), lab.train_config()?);
    let mut sources = lab.sources();
    let turn = lab.seed as usize % sources.len();
    sources.rotate_left(turn);
    let text = lab.inputs().text;
    let cost = PASSES * lab.inputs().costs.train(&shortened(config.clone(), ALL_STEPS))?;
    let train = TrainConfig { steps: None, tokens: None, valid_fraction: 0.05, ..config };
    let mut values = Vec::new();
    for row in ROWS {
        let method = method_of(row);
        let settings = json!([dense.key, text.key, sources, STEPS, train, method]);
        let (found, _) = lab.stage("continual", &settings, cost, |dir| {
            let task = |name: &String| {
                let source = text.train_data_of(name)?.sources.into_iter().next();
                Ok(Task { name: name.clone(), steps: STEPS, source: source.context("no text")? })
            };
            let tasks = sources.iter().map(task).collect::<Result<Vec<Task>>>()?;
            let run = dir.join("run");
            let options = ContinualOptions {
                model: dense.dir.clone(),
                out: run.clone(),
                // A killed process has left what it had done.
                resume: true,
                train: train.clone(),
                method,
            };
            let report = learn(&options, &tasks, &mut |_| true)?;
            // Its result is not written yet: a run that is removed in part could not be resumed.
            discard(&run)?;
            let jumps: Vec<f64> = report.learnt.iter().filter_map(|task| task.jump).collect();
            let jump = jumps.iter().sum::<f64>() / jumps.len().max(1) as f64;
            let last = report.mean_final.context("no task was learnt")?;
            Ok([last, report.forgetting.unwrap_or(0.0), jump])
        })?;
        for (column, value) in [FINAL, FORGETTING, JUMP].into_iter().zip(found) {
            values.push(Value::new(row, column, value));
        }
    }
    Ok(values)
}
