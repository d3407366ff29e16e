//! LESA (Yang et al., arXiv 2502.13794): new layers predicted from their neighbours.

use anyhow::Result;
use dsmoe_baselines::grow::{GrowMethod, GrowOptions, NewLayer, plan_growth};
use dsmoe_train::TrainConfig;

use super::experiment::{Claim, Experiment, Value};
use super::lab::Lab;
use super::sketch::shortened;

const ROWS: [(&str, GrowMethod); 5] = [
    ("lesa", GrowMethod::Lesa),
    ("copy", GrowMethod::Copy),
    ("average", GrowMethod::Average),
    ("identity", GrowMethod::Identity),
    ("random", GrowMethod::Random),
];
const SOURCE: &str = "no new layers";
/// Layers that are added.
const NEW: usize = 2;
const STEPS: u64 = 60;
const MADE: &str = "as made";
const TUNED: &str = "60 steps";

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "lesa",
    title: "LESA",
    setting: "The dense model gets two layers more, and the new layers alone are trained for 60 steps. The last row is the dense model \
              after as many steps of all its parameters.",
    numbers: "held-out loss minus that of the model before it was made deeper, nats",
    claims: &[
        Claim {
            paper: "predicted layers start better than copies (Llama-3-8B, 32 to 48 layers)",
            row: "lesa",
            controls: &["copy"],
            columns: &[MADE],
            margin: 0.0,
            agrees: "a layer between two others is nearer to what is needed than a second copy of one",
            differs: "the network learns from the few layers that there are",
        },
        Claim {
            paper: "and end better than LLaMA Pro, whose new layers begin as identities, after the same steps",
            row: "lesa",
            controls: &["identity"],
            columns: &[TUNED],
            margin: 0.0,
            agrees: "predicted layers have weights to start from",
            differs: "a model of a few layers has too few for a network to learn how layers follow each other, and identities lose \
                      nothing at the start",
        },
        Claim {
            paper: "depth is worth its steps (implied: the source after the same steps is the control)",
            row: "lesa",
            controls: &[SOURCE],
            columns: &[TUNED],
            margin: 0.0,
            agrees: "new layers add what the old ones lack",
            differs: "the same steps of all parameters of the source change more of what it computes",
        },
    ],
    plan: |sketch| {
        sketch.made_and_tuned(ROWS.len(), STEPS)?;
        sketch.losses(1);
        sketch.trainings(1, &shortened(sketch.train_config()?, STEPS))
    },
    measure,
};

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let (layers, whole) = (dense.config()?.num_layers, lab.losses(&dense)?.mean);
    let mut values = Vec::new();
    for (row, method) in ROWS {
        let options = GrowOptions { method, ..GrowOptions::new(layers + NEW) };
        let plan = plan_growth(&dense.dir, &options)?.layers;
        let is_new = |layer: &NewLayer| matches!(layer, NewLayer::Behind(_));
        let new = (0..).zip(&plan).filter(|(_, layer)| is_new(layer)).map(|(i, _)| i).collect();
        let grown = lab.grow(&dense, &options)?;
        values.push(Value::new(row, MADE, lab.losses(&grown)?.mean - whole));
        let config = TrainConfig { train_layers: Some(new), ..shortened(lab.train_config()?, STEPS) };
        let tuned = lab.train(&grown, config)?;
        values.push(Value::new(row, TUNED, lab.losses(&tuned)?.mean - whole));
    }
    let tuned = lab.train(&dense, shortened(lab.train_config()?, STEPS))?;
    values.push(Value::new(SOURCE, MADE, 0.0));
    values.push(Value::new(SOURCE, TUNED, lab.losses(&tuned)?.mean - whole));
    Ok(values)
}
