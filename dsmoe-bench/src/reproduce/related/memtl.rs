//! MEMTL (Liang et al., arXiv 2309.00907): heads of one network, each of a bootstrap sample, decide which users a server works for.

use anyhow::{Context, Result};
use dsmoe_baselines::plan::Fit;
use dsmoe_baselines::plan::offload::{Imitation, imitate};
use serde_json::json;

use super::experiment::{Claim, Experiment, Value};
use super::lab::Lab;

/// Numbers of users, and what follows the names of their columns.
const USERS: [(usize, &str); 2] = [(3, ""), (5, ", 5 users")];
const SAMPLES: usize = 4000;
const HEADS: usize = 3;
const EPOCHS: usize = 15;
/// Cost in tokens of forward passes of a model of a million parameters, about.
const COST: f64 = 200_000.0;
const ONE: &str = "one head";
const COSTS: &str = "three heads, the answer that costs least";
const MEAN: &str = "three heads, mean";
/// It knows what it is to find.
const ORACLE: &str = "three heads, the nearest to the optimum, no method";
/// A row, the heads of its network, and how their answers become one.
const ROWS: [(&str, usize, &str); 4] =
    [(ONE, 1, "one"), (COSTS, HEADS, "cost"), (MEAN, HEADS, "mean"), (ORACLE, HEADS, "oracle")];
const ERROR: &str = "squared error";
const WRONG: &str = "wrong decisions";
const OVER: &str = "cost over the optimum";

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "memtl",
    title: "MEMTL",
    setting: "The paper's own problem with three users, and with five, and its exact optimum. A network learns the optimum on the half \
              of 4,000 sets of users whose inputs are smaller, and decides for the others, whose inputs have drifted. One head is the \
              network without bootstrap samples. The head that is nearest to the optimum is what the released code takes: a bound.",
    numbers: "mean squared error of the shares, share of the users that are sent elsewhere than by the optimum, and the cost over the \
              optimum's minus 1",
    claims: &[
        Claim {
            paper: "several heads have higher accuracy and a lower squared error than one (abstract; the code chooses the head that is nearest \
                    to the optimum, which no method can know)",
            row: MEAN,
            controls: &[ONE],
            columns: &[ERROR, WRONG],
            margin: 0.0,
            agrees: "heads of different samples err differently, and their mean errs less",
            differs: "a head on a frozen backbone and a bootstrap sample sees fewer samples than one that is trained with the backbone",
        },
        Claim {
            paper: "an ensemble needs no labels to choose (ours: the head whose decision costs least by the known cost)",
            row: COSTS,
            controls: &[ONE],
            columns: &[OVER],
            margin: 0.0,
            agrees: "the cost of a decision is known without its optimum, so that the best of several is taken",
            differs: "heads on one backbone decide alike",
        },
    ],
    plan: |sketch| {
        sketch.other(USERS.len(), COST);
        Ok(())
    },
    measure,
};

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let fit = Fit { epochs: EPOCHS, seed: lab.seed, ..Fit::default() };
    let mut values = Vec::new();
    for (users, end) in USERS {
        let settings = json!([users, SAMPLES, HEADS, EPOCHS, lab.seed, "all choices"]);
        let (found, _) = lab.stage("imitated", &settings, COST, |_| {
            let found = imitate(users, SAMPLES, HEADS, fit, &mut |_, _| true);
            let found = found.context("the networks were not trained to their end")?;
            let one_of = |(_, heads, choice): (&str, usize, &str)| {
                let is_one = |found: &&Imitation| found.heads == heads && found.choice == choice;
                let Imitation { accuracy, squared_error, cost, .. } =
                    found.iter().find(is_one).context("a missing row")?;
                Ok([*squared_error, 1.0 - accuracy, cost - 1.0])
            };
            ROWS.into_iter().map(one_of).collect::<Result<Vec<[f64; 3]>>>()
        })?;
        for ((row, ..), numbers) in ROWS.into_iter().zip(found) {
            for (column, number) in [ERROR, WRONG, OVER].into_iter().zip(numbers) {
                values.push(Value::new(row, &format!("{column}{end}"), number));
            }
        }
    }
    Ok(values)
}
