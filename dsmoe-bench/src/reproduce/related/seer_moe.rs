//! SEER-MoE (Muzio et al., arXiv 2404.05089): experts that few tokens run are dropped, then tokens run fewer experts.

use anyhow::Result;
use dsmoe_train::TrainConfig;

use super::experiment::{Claim, Experiment, Value};
use super::experts::{self, EAN, HARD, RANDOM, REAP, SOFT};
use super::lab::Lab;
use super::sketch::{Sketch, shortened};

const ROWS: [&str; 7] =
    [HARD, "hard counts, over all layers", "hard counts, one at a time", SOFT, EAN, REAP, RANDOM];
const LEFT: [usize; 3] = [6, 4, 2];
/// Experts that a layer holds when k is lowered.
const HELD: usize = 6;
const STEPS: u64 = 60;
const TUNED: &str = "6 of 8, 60 steps";
const WEAK: &str = "k from 2 to 1, entropy 0.01";
const NONE: &str = "k from 2 to 1, no entropy";
const AT_ONCE: &str = "k = 1 from the first step";
/// A row, and the weight of the entropy, k at the end and the share of the steps until then.
const TRAININGS: [(&str, f64, Option<usize>, f64); 5] = [
    (WEAK, 0.01, Some(1), 0.5),
    ("k from 2 to 1, entropy 0.1", 0.1, Some(1), 0.5),
    (NONE, 0.0, Some(1), 0.5),
    (AT_ONCE, 0.0, Some(1), 0.0),
    ("k = 2", 0.0, None, 0.0),
];

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "seer-moe",
    title: "after SEER-MoE",
    setting: "The mixture of the experiment on HC-SMoE. Experts are dropped with their gates by the counts of calibration text. The \
              mixture of 6 experts by hard counts is then trained for 60 steps while k falls from 2 to 1.",
    numbers: "increase of the held-out loss over the whole mixture, nats, by the experts that a layer holds; and the entropy of the \
              load of a layer's experts, nats, ln n if all n of them run for as many tokens",
    claims: &[
        Claim {
            paper: "experts of low heavy-hitter counts can be dropped: a quarter of the parameters at little loss (abstract)",
            row: HARD,
            controls: &[RANDOM],
            columns: &["6 of 8", "4 of 8"],
            margin: 0.0,
            agrees: "experts that few tokens run matter to few tokens",
            differs: "with a balance loss all experts are used about as often, so that counts say little",
        },
        Claim {
            paper: "a term that makes gates decide lets training lower k (2 to 1; abstract, weights are ours)",
            row: WEAK,
            controls: &[NONE, AT_ONCE],
            columns: &[TUNED],
            margin: 0.0,
            agrees: "gates whose first choice has most of the weight lose less with their second",
            differs: "with one expert its coefficient is 1, so that the entropy moves gates by nothing but itself; fading out \
                      already lets the experts adapt",
        },
    ],
    plan,
    measure,
};

fn plan(sketch: &mut Sketch<'_>) -> Result<()> {
    experts::plan(sketch, &ROWS, &LEFT, "all")?;
    sketch.mixture_trainings(TRAININGS.len(), &shortened(sketch.train_config()?, STEPS))?;
    sketch.losses(TRAININGS.len());
    Ok(())
}

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let mut values = experts::increases(lab, &ROWS, &LEFT)?;
    values.extend(experts::entropies(lab, &ROWS, &LEFT)?);
    let mixture = lab.mixture()?;
    let whole = lab.losses(&mixture)?.mean;
    let pruned = experts::pruned(lab, HARD, HELD, None)?;
    for (row, gate_entropy, top_k, anneal) in TRAININGS {
        let config = TrainConfig {
            gate_entropy,
            top_k,
            top_k_anneal: top_k.map(|_| anneal),
            ..shortened(lab.train_config()?, STEPS)
        };
        let tuned = lab.train(&pruned, config)?;
        let found = lab.losses(&tuned)?;
        values.push(Value::new(row, TUNED, found.mean - whole));
        values.push(Value::new(row, &experts::entropy_column(TUNED), found.entropy(None)?));
    }
    Ok(values)
}
