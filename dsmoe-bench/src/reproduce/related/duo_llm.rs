//! Duo-LLM (Alizadeh et al., arXiv 2410.10846): a big and a small FFN in each layer, oracle routes, and a router.

use anyhow::{Context, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::{Inference, Model as Weights};
use dsmoe_kernels::Precision;
use dsmoe_train::TrainConfig;
use dsmoe_train::oracle::{self, Oracle, OracleOptions, OracleReport, RouteKind};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::experiment::{Claim, Experiment, Value};
use super::lab::{Lab, Model, Pruned};
use super::sketch::shortened;

const ROUTER: &str = "router";
const SKIPPING: &str = "router of three ways";
const CHANCE: &str = "random routes";
const ORACLE: &str = "oracle";
const FIXED: &str = "best fixed route";
const NOISE: &str = "noisy copies";
const ALL_BIG: &str = "all big";
const DSMOE: &str = "DSMoE";
const SPLIT: &str = "random split";
const SHARE: &str = "loss at half of the FFN";
const USED: &str = "FFN used";
const HALF: &str = "half of the layers big";

const STEPS: u64 = 60;
/// Tokens that the oracle reads, and passes over them, about.
const TOKENS: usize = 384;
const PASSES: f64 = 1000.0;
/// The router's learning rate over that of the rest.
const ROUTER_LR: f64 = 10.0;
/// Duo's rows with a router, and the settings of that.
const ROUTERS: [(&str, &[&str]); 2] = [(ROUTER, &[]), (SKIPPING, &["skip=true"])];
/// The rows beside Duo's: the method, its settings, and its routers' learning rate over that of the rest.
const OTHERS: [(&str, &str, &[&str], f64); 2] = [
    (DSMOE, "dsmoe", &["experts=8", "routers=calibrated"], 3.0),
    (SPLIT, "random-k", &["experts=8", "noise=false"], 1.0),
];

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "duo-llm",
    title: "Duo-LLM",
    setting: "A small FFN of a sixteenth of the neurons stands beside the dense one. Both are trained with random routes for 60 steps; \
              then a router is trained for 60 more, or random routes go on. A router of three ways may also skip both. DSMoE and a \
              random split, of eight experts each, have the same budget and 120 steps. The oracle gives every token of 384 the best of all routes \
              with its loss at hand, earlier tokens of the window included, and as many noisy copies of the model are its control.",
    numbers: "held-out loss, nats; of the oracle on its tokens; and the share of the FFNs' parameters that a token used",
    claims: &[
        Claim {
            paper: "a learned router is no better than the best of 100 random patterns (read in the paper): better than chance",
            row: ROUTER,
            controls: &[CHANCE],
            columns: &[SHARE],
            margin: 0.0,
            agrees: "tokens differ in what the big FFN is worth to them, and the router sees it",
            differs: "so short a training teaches the router little",
        },
        Claim {
            paper: "tokens skip layers where these are of no use (read in the paper): a third way uses the same budget better",
            row: SKIPPING,
            controls: &[ROUTER, CHANCE],
            columns: &[SHARE],
            margin: 0.0,
            agrees: "what is saved on tokens that skip is spent on more tokens through the big FFN",
            differs: "the small FFN costs a sixteenth, so that skipping it saves little, and random routes have not taught the layers \
                      to be skipped",
        },
        Claim {
            paper: "(ours) sigmoid gates over eight experts use the same budget better than one choice of big or small in each layer",
            row: DSMOE,
            controls: &[ROUTER, CHANCE, SPLIT],
            columns: &[SHARE],
            margin: 0.0,
            agrees: "a token picks among parts of the FFN, and each layer may run more or fewer of them",
            differs: "in so few steps what is chosen matters less than how much of the dense FFN is left whole",
        },
        Claim {
            paper: "an oracle with part of the layers big beats all layers big (read in the paper)",
            row: ORACLE,
            controls: &[ALL_BIG],
            columns: &[HALF],
            margin: 0.0,
            agrees: "the least of many losses of a token is low, whatever the routes do",
            differs: "routes through the small FFN lose more than a choice among so few can give back",
        },
        Claim {
            paper: "what the oracle gains is adaptive computation (implied; the paper has no control)",
            row: ORACLE,
            controls: &[NOISE],
            columns: &[HALF],
            margin: 0.0,
            agrees: "a token's routes differ more than copies of one model of the same loss do",
            differs: "the least of as many losses of copies that compute the same with noise on their weights is as low",
        },
    ],
    plan: |sketch| {
        sketch.made(3 + OTHERS.len());
        sketch.losses(3 + OTHERS.len());
        sketch.other(1, PASSES * TOKENS as f64);
        sketch.trainings(4, &shortened(sketch.train_config()?, STEPS))?;
        sketch.trainings(OTHERS.len(), &shortened(sketch.train_config()?, 2 * STEPS))
    },
    measure,
};

/// The oracle's results at the middle level.
#[derive(Debug, Serialize, Deserialize)]
struct Half {
    all_big: f64,
    best: f64,
    oracle: f64,
    noise: f64,
}

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let counts = Accounting::of(&dense.config()?);
    let params = counts.total as f64 - counts.ffn as f64 / 2.0;
    let how = |method, settings| Pruned { method, settings, params, source: None };
    let config = shortened(lab.train_config()?, STEPS);
    let made = lab.prune(&dense, how("duo", &[]))?;
    let random = lab.train(&made, config.clone())?;
    let mut models = Vec::new();
    for (row, settings) in ROUTERS {
        let routed = lab.prune(&random, how("duo-router", settings))?;
        let config = TrainConfig { router_lr_scale: ROUTER_LR, ..config.clone() };
        models.push((row, lab.train(&routed, config)?));
    }
    models.push((CHANCE, lab.train(&random, config)?));
    for (row, method, settings, router_lr_scale) in OTHERS {
        let made = lab.prune(&dense, how(method, settings))?;
        let config = shortened(lab.train_config()?, 2 * STEPS);
        models.push((row, lab.train(&made, TrainConfig { router_lr_scale, ..config })?));
    }
    let mut values = Vec::new();
    for (row, model) in models {
        let found = lab.losses(&model)?;
        let whole = counts.total - counts.ffn;
        values.push(Value::new(row, SHARE, found.mean));
        values.push(Value::new(row, USED, (found.activated - whole as f64) / counts.ffn as f64));
    }
    let half = half(lab, &random)?;
    let rows = [(ORACLE, half.oracle), (NOISE, half.noise), (FIXED, half.best), (ALL_BIG, half.all_big)];
    values.extend(rows.map(|(row, loss)| Value::new(row, HALF, loss)));
    Ok(values)
}

fn half(lab: &mut Lab<'_, '_>, model: &Model) -> Result<Half> {
    let inputs = lab.inputs();
    let (seq, seed) = (inputs.costs.seq, lab.seed);
    // As much of every source.
    let each = TOKENS / inputs.text.held_out.len().max(1);
    let ids: Vec<u32> =
        inputs.text.held_out.iter().flat_map(|part| part.ids.iter().take(each)).copied().collect();
    let settings = json!([model.key, inputs.text.key, TOKENS, seq, seed]);
    let (half, _) = lab.stage("oracle", &settings, PASSES * TOKENS as f64, |_| {
        let mut duo = Inference::load(&model.dir, Precision::F32)?;
        let options =
            OracleOptions { exact_up_to: 64, beam: 16, seed, ..OracleOptions::new(RouteKind::BigSmall, seq) };
        let source = || Ok(Weights::load(&model.dir)?);
        let work = Oracle { model: &mut duo, source: &source, ids: &ids, options, state: None, made_by: "" };
        let (found, _) = oracle::run(work, &mut |_, _, _| {})?;
        middle(&found)
    })?;
    Ok(half)
}

fn middle(found: &OracleReport) -> Result<Half> {
    let middle = found.layers / 2;
    let level = found.levels.iter().find(|level| level.level == middle).context("no level in the middle")?;
    // A mean below the model's own loss is reached without noise: all copies are then the model.
    let noise = level.control.map_or(found.default, |control| control.oracle);
    Ok(Half { all_big: found.default, best: level.best, oracle: level.oracle, noise })
}
