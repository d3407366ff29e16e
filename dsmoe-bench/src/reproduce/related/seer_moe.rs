//! SEER-MoE (Muzio et al., arXiv 2404.05089): experts that few tokens run are dropped.

use super::experiment::{Claim, Experiment};
use super::experts::{self, EAN, HARD, RANDOM, REAP, SOFT};

const ROWS: [&str; 7] =
    [HARD, "hard counts, over all layers", "hard counts, one at a time", SOFT, EAN, REAP, RANDOM];
const LEFT: [usize; 3] = [6, 4, 2];

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "seer-moe",
    title: "SEER-MoE",
    setting: "The mixture of the experiment on HC-SMoE. Experts are dropped with their gates by the counts of calibration text.",
    numbers: "increase of the held-out loss over the whole mixture, nats, by the experts that a layer holds",
    claims: &[Claim {
        paper: "experts of low heavy-hitter counts can be dropped: a quarter of the parameters at little loss (abstract)",
        row: HARD,
        controls: &[RANDOM],
        columns: &["6 of 8", "4 of 8"],
        margin: 0.0,
        agrees: "experts that few tokens run matter to few tokens",
        differs: "with a balance loss all experts are used about as often, so that counts say little",
    }],
    plan: |sketch| experts::plan(sketch, &ROWS, &LEFT, "all"),
    measure: |lab| experts::increases(lab, &ROWS, &LEFT),
};
