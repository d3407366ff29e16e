//! HC-SMoE (Chen et al., arXiv 2410.08589): experts with like mean outputs are merged, without training.

use anyhow::Result;

use super::experiment::{Claim, Experiment, Value};
use super::experts::{self, EAN, HARD, HC_SMOE, RANDOM, RANDOM_CLUSTERS, REAP};
use super::lab::Lab;

const ROWS: [&str; 8] = [
    HC_SMOE,
    "HC-SMoE, neurons aligned",
    "HC-SMoE, clusters of router logits",
    RANDOM_CLUSTERS,
    HARD,
    EAN,
    REAP,
    RANDOM,
];
const LEFT: [usize; 3] = [6, 4, 2];
/// The mixture with all of its experts.
const WHOLE: &str = "the whole mixture";
const EVENNESS: &str = "evenness of its least even layer";

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "hc-smoe",
    title: "HC-SMoE",
    setting: "The dense model becomes a mixture of eight copies of its FFN, two of which run, and is trained. Every row holds fewer \
              experts of that mixture, chosen on calibration text of all sources, and is not trained again. Uneven use favours \
              removal, so that the last row says how even that of the whole mixture is: below 0.9 some experts hardly run.",
    numbers: "increase of the held-out loss over the whole mixture, nats, by the experts that a layer holds; the entropy of the load \
              of a layer's experts, nats, ln n if all n of them run for as many tokens; and that entropy of the least even layer of \
              the whole mixture over ln 8",
    claims: &[
        Claim {
            paper: "merging by mean outputs loses less than every removal, without training (Qwen1.5-MoE with 25 % fewer experts: \
                    6.95 points over the best other method; abstract)",
            row: HC_SMOE,
            controls: &[HARD, EAN, REAP, RANDOM],
            columns: &["6 of 8", "4 of 8"],
            margin: 0.0,
            agrees: "the experts are copies of one FFN that were trained apart for a short time, so that their mean is near to each",
            differs: "the experts are used unevenly enough that those which few tokens run can go, while every merge changes what \
                      all of a group's tokens read",
        },
        Claim {
            paper: "clusters of mean outputs are the right ones (implied)",
            row: HC_SMOE,
            controls: &[RANDOM_CLUSTERS],
            columns: &["6 of 8", "4 of 8"],
            margin: 0.0,
            agrees: "experts with like mean outputs are alike",
            differs: "mean outputs over all tokens say little about what an expert does for the tokens that run it",
        },
    ],
    plan: |sketch| experts::plan(sketch, &ROWS, &LEFT, "all"),
    measure,
};

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let mut values = experts::increases(lab, &ROWS, &LEFT)?;
    values.extend(experts::entropies(lab, &ROWS, &LEFT)?);
    let mixture = lab.mixture()?;
    values.push(Value::new(WHOLE, EVENNESS, lab.losses(&mixture)?.evenness()?));
    Ok(values)
}
