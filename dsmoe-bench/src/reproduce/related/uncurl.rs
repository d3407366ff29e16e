//! UNCURL (Sarkar et al., arXiv 2409.01483): experts whose gates agree on the text of a task are merged.

use anyhow::Result;

use super::experiment::{Claim, Experiment, Value};
use super::experts::{self, HARD, HC_SMOE, RANDOM, UNCURL};
use super::lab::Lab;

const ROWS: [&str; 4] = [UNCURL, HC_SMOE, HARD, RANDOM];
const LEFT: [usize; 2] = [4, 2];
/// The dense model after the training that the mixture had.
const DENSE: &str = "dense model, same training";

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "uncurl",
    title: "after UNCURL",
    setting: "The mixture of the experiment on HC-SMoE. Experts are merged or dropped by the text of one source, the task, which is \
              another one for every seed, and the loss is measured on held-out text of it and of the others. The last row is the \
              dense model after the training that the mixture had.",
    numbers: "increase of the held-out loss over the whole mixture, nats, on the text of the task and on others, by the experts that \
              a layer holds; and the entropy of the load of a layer's experts on the text of the task, nats, ln n if all n of them \
              run for as many tokens",
    claims: &[
        Claim {
            paper: "on the text of a task, merging experts whose router logits agree beats removal by the frequency of activation \
                    (abstract)",
            row: UNCURL,
            controls: &[HARD, RANDOM],
            columns: &["task, 4 of 8", "task, 2 of 8"],
            margin: 0.0,
            agrees: "the experts started as copies, so that a mean of a group is near to each",
            differs: "a task runs some experts often and others hardly, so that removal is cheap on its text",
        },
        Claim {
            paper: "half of the experts can mostly be merged, so that a pruned mixture is better than a smaller model from the start \
                    (abstract; constants are ours)",
            row: UNCURL,
            controls: &[DENSE],
            columns: &["task, 4 of 8"],
            margin: 0.0,
            agrees: "what the other experts have learnt is kept in the means",
            differs: "after a short training a mixture is hardly ahead of the dense model, and merging loses that",
        },
    ],
    plan: |sketch| {
        experts::plan(sketch, &ROWS, &LEFT, "task")?;
        sketch.trainings(1, &sketch.train_config()?)?;
        sketch.losses(1);
        Ok(())
    },
    measure,
};

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let sources = lab.sources();
    let task = sources[lab.seed as usize % sources.len()].clone();
    let mixture = lab.mixture()?;
    let whole = lab.losses(&mixture)?;
    let mut values = Vec::new();
    for row in ROWS {
        for left in LEFT {
            let found = experts::losses(lab, row, left, Some(&task))?;
            values.push(Value::new(row, &format!("task, {left} of 8"), found.of(&task)? - whole.of(&task)?));
            let others = found.without(&task) - whole.without(&task);
            values.push(Value::new(row, &format!("others, {left} of 8"), others));
            let column = experts::entropy_column(&format!("task, {left} of 8"));
            values.push(Value::new(row, &column, found.entropy(Some(&task))?));
        }
    }
    let config = lab.train_config()?;
    let dense = lab.train(&lab.dense(), config)?;
    let found = lab.losses(&dense)?;
    for left in LEFT {
        values.push(Value::new(DENSE, &format!("task, {left} of 8"), found.of(&task)? - whole.of(&task)?));
        let others = found.without(&task) - whole.without(&task);
        values.push(Value::new(DENSE, &format!("others, {left} of 8"), others));
    }
    Ok(values)
}
