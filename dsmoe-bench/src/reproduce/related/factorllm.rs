//! FactorLLM (Zhao et al., arXiv 2408.11855): few experts, and a router that learns which of them come nearest to the dense FFN.

use anyhow::Result;
use dsmoe_core::accounting::Accounting;
use dsmoe_train::TrainConfig;
use dsmoe_train::config::Part;

use super::experiment::{Claim, Experiment, Value};
use super::lab::{Lab, Pruned};
use super::sketch::shortened;

const RANDOM: &str = "random router";
const SINGLE: &str = "taught, each nearest (released label)";
const SUBSET: &str = "taught, nearest sum";
const CLUSTERS: &str = "MoEfication";

const ROWS: [(&str, &str, &[&str]); 5] = [
    (RANDOM, "factorllm", &["epochs=0"]),
    (SINGLE, "factorllm", &[]),
    (SUBSET, "factorllm", &["label=subset", "target=share"]),
    ("taught, largest", "factorllm", &["label=norm", "target=share"]),
    (CLUSTERS, "moefication", &["experts=4"]),
];
const STEPS: u64 = 60;
const MADE: &str = "as made";
const TUNED: &str = "60 steps of the experts";

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "factorllm",
    title: "FactorLLM",
    setting: "Two of four experts of the dense model run, with routers that are taught on calibration text, and with random ones, \
              which is what the released code trains with. The experts alone are then trained for 60 steps.",
    numbers: "increase of the held-out loss over the dense model, nats",
    claims: &[
        Claim {
            paper: "a router that is taught by the dense FFN keeps the model's knowledge (TinyLlama: about 85 % of its accuracy with \
                    30 to 50 % less computation; abstract)",
            row: SINGLE,
            controls: &[RANDOM],
            columns: &[MADE, TUNED],
            margin: 0.0,
            agrees: "the labels say which experts a token can do without",
            differs: "neighbouring neurons do not belong together, so that a perfect router for such labels is little better than \
                      chance, and training adapts the experts to whatever chooses them",
        },
        Claim {
            paper: "the labels are the limit, not the router (ours): the subset whose sum is nearest is the better label",
            row: SUBSET,
            controls: &[SINGLE, RANDOM],
            columns: &[MADE],
            margin: 0.0,
            agrees: "the error of a sum is what the next layer reads",
            differs: "which subset is nearest is harder to predict than which expert is large",
        },
        Claim {
            paper: "slices of neighbouring neurons suffice as experts (implied: the released code draws a permutation and does not \
                    use it)",
            row: SUBSET,
            controls: &[CLUSTERS],
            columns: &[MADE],
            margin: 0.0,
            agrees: "the factor y/z and the label of sums make up for what clusters would give",
            differs: "clusters of like neurons can be left out as a whole",
        },
    ],
    plan: |sketch| sketch.made_and_tuned(ROWS.len(), STEPS),
    measure,
};

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let (counts, whole) = (Accounting::of(&dense.config()?), lab.losses(&dense)?.mean);
    let mut values = Vec::new();
    for (row, method, settings) in ROWS {
        let params = counts.total as f64 - counts.ffn as f64 / 2.0;
        let made = lab.prune(&dense, Pruned { method, settings, params, source: None })?;
        values.push(Value::new(row, MADE, lab.losses(&made)?.mean - whole));
        let config = shortened(lab.train_config()?, STEPS);
        let tuned = lab.train(&made, TrainConfig { train_parts: Some(vec![Part::Ffn]), ..config })?;
        values.push(Value::new(row, TUNED, lab.losses(&tuned)?.mean - whole));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::super::lab::check_settings;
    use super::*;

    #[test]
    fn rows_have_settings_that_their_methods_take() {
        for (row, method, settings) in ROWS {
            assert!(check_settings(method, settings).is_ok(), "{row}");
        }
    }
}
