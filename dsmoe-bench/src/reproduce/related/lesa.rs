//! LESA (Yang et al., arXiv 2502.13794): new layers predicted from their neighbours.

use anyhow::Result;
use dsmoe_baselines::grow::{GrowMethod, GrowOptions, NewLayer, plan_growth};
use dsmoe_train::TrainConfig;

use super::experiment::{Claim, Experiment, Value};
use super::lab::Lab;
use super::sketch::{Sketch, shortened};

type Rows = &'static [(&'static str, GrowMethod)];

const LESA: (&str, GrowMethod) = ("lesa", GrowMethod::Lesa);
const COPY: (&str, GrowMethod) = ("copy", GrowMethod::Copy);
const AVERAGE: (&str, GrowMethod) = ("average", GrowMethod::Average);
const IDENTITY: (&str, GrowMethod) = ("identity", GrowMethod::Identity);
const RANDOM: (&str, GrowMethod) = ("random", GrowMethod::Random);
/// The source after the same steps of all its parameters.
const SOURCE: &str = "no new layers";
/// The source after the same steps of as many of its layers, those below the gaps.
const OLD: &str = "no new layers, as many old ones trained";
const MADE: &str = "as made";

/// The measured text, the number of added layers, and the length of the training.
struct Size {
    rows: Rows,
    /// The source after the same steps.
    controls: &'static [&'static str],
    /// Layers that are added.
    new: usize,
    steps: u64,
    /// The column of models after the steps.
    tuned: &'static str,
}

const SMALL: Size = Size {
    rows: &[LESA, COPY, AVERAGE, IDENTITY, RANDOM],
    controls: &[SOURCE],
    new: 2,
    steps: 60,
    tuned: "60 steps",
};
const DEEP: Size =
    Size { rows: &[LESA, COPY, AVERAGE, IDENTITY], controls: &[OLD], new: 5, steps: 24, tuned: "24 steps" };

const STARTS: &str = "predicted layers start better than copies (Llama-3-8B, 32 to 48 layers)";
const ENDS: &str =
    "and end better than LLaMA Pro, whose new layers begin as identities, after the same steps";
const WORTH: &str = "depth is worth its steps (implied: the source after the same steps is the control)";
const BETWEEN: &str = "a layer between two others is nearer to what is needed than a second copy of one";

/// Two layers on six, in the profile of all papers.
pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "lesa",
    title: "LESA",
    setting: "The dense model gets two layers more, and the new layers alone are trained for 60 steps. The last row is the dense \
              model after as many steps of all its parameters.",
    numbers: "held-out loss minus that of the model before it was made deeper, nats",
    claims: &[
        Claim {
            paper: STARTS,
            row: "lesa",
            controls: &["copy"],
            columns: &[MADE],
            margin: 0.0,
            agrees: BETWEEN,
            differs: "the network learns from the few layers that there are",
        },
        Claim {
            paper: ENDS,
            row: "lesa",
            controls: &["identity"],
            columns: &[SMALL.tuned],
            margin: 0.0,
            agrees: "predicted layers have weights to start from",
            differs: "a model of a few layers has too few for a network to learn how layers follow each other, and identities lose \
                      nothing at the start",
        },
        Claim {
            paper: WORTH,
            row: "lesa",
            controls: &[SOURCE],
            columns: &[SMALL.tuned],
            margin: 0.0,
            agrees: "new layers add what the old ones lack; the control is weak, since few steps of small batches at the learning rate \
                     of new layers can harm a trained model",
            differs: "the same steps of all parameters of the source change more of what it computes",
        },
    ],
    plan: |sketch| plan(sketch, &SMALL),
    measure: |lab| measure(lab, &SMALL),
};

/// Five layers on the last of a pretrained model of thirty or so.
pub(super) const OF_A_PRETRAINED_MODEL: Experiment = Experiment {
    name: "lesa-deep",
    title: "LESA",
    setting: "The pretrained model gets five layers more, between its last ones, and the new layers alone are trained for 24 steps of \
              512 tokens. The last row is the model after as many steps of the five layers below the gaps.",
    claims: &[
        Claim {
            paper: STARTS,
            row: "lesa",
            controls: &["copy", "average"],
            columns: &[MADE],
            margin: 0.0,
            agrees: BETWEEN,
            differs: "a copy, or a mean of neighbours, is as near to what is needed as what a network learns from the other layers",
        },
        Claim {
            paper: ENDS,
            row: "lesa",
            controls: &["identity"],
            columns: &[DEEP.tuned],
            margin: 0.0,
            agrees: "predicted layers have weights to start from",
            differs: "identities lose nothing at the start, and so few steps do not win back what predicted layers lose there",
        },
        Claim {
            paper: WORTH,
            row: "lesa",
            controls: &[OLD],
            columns: &[DEEP.tuned],
            margin: 0.0,
            agrees: "new layers add what the old ones lack; the control is weak, since few steps of small batches can harm layers that \
                     were trained on trillions of tokens",
            differs: "the same steps gain as much in layers that there are",
        },
    ],
    plan: |sketch| plan(sketch, &DEEP),
    measure: |lab| measure(lab, &DEEP),
    ..EXPERIMENT
};

fn plan(sketch: &mut Sketch<'_>, size: &Size) -> Result<()> {
    sketch.made_and_tuned(size.rows.len(), size.steps)?;
    sketch.losses(size.controls.len());
    sketch.trainings(size.controls.len(), &shortened(sketch.train_config()?, size.steps))
}

fn measure(lab: &mut Lab<'_, '_>, size: &Size) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let (layers, whole) = (dense.config()?.num_layers, lab.losses(&dense)?.mean);
    let config = shortened(lab.train_config()?, size.steps);
    let mut values = Vec::new();
    let mut below = Vec::new();
    for &(row, method) in size.rows {
        let options = GrowOptions { method, ..GrowOptions::new(layers + size.new) };
        let plan = plan_growth(&dense.dir, &options)?.layers;
        let is_new = |layer: &&NewLayer| matches!(layer, NewLayer::Behind(_));
        let new = (0..).zip(&plan).filter(|(_, layer)| is_new(layer)).map(|(i, _)| i).collect();
        below = plan.iter().filter(is_new).map(NewLayer::source).collect();
        let grown = lab.grow(&dense, &options)?;
        values.push(Value::new(row, MADE, lab.losses(&grown)?.mean - whole));
        let tuned = lab.train(&grown, TrainConfig { train_layers: Some(new), ..config.clone() })?;
        values.push(Value::new(row, size.tuned, lab.losses(&tuned)?.mean - whole));
    }
    for &row in size.controls {
        let train_layers = (row == OLD).then(|| below.clone());
        let tuned = lab.train(&dense, TrainConfig { train_layers, ..config.clone() })?;
        values.push(Value::new(row, MADE, 0.0));
        values.push(Value::new(row, size.tuned, lab.losses(&tuned)?.mean - whole));
    }
    Ok(values)
}
