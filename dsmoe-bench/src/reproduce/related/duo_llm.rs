//! Duo-LLM (Alizadeh et al., arXiv 2410.10846): a big and a small FFN in each layer, oracle routes, and a router.

use std::path::Path;

use anyhow::{Context, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::{Inference, Model as Weights};
use dsmoe_train::TrainConfig;
use dsmoe_train::oracle::{self, LevelReport, Oracle, OracleOptions, OracleReport, RouteKind, RouteSpace};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::super::measure::text as measure_text;
use super::experiment::{Claim, Experiment, Value};
use super::lab::{Lab, Model, Pruned};
use super::sketch::shortened;

const ROUTER: &str = "router";
const SKIPPING: &str = "router of three ways";
const CHANCE: &str = "random routes";
const PATTERN: &str = "best fixed pattern of half of the layers";
const ORACLE: &str = "oracle";
const FIXED: &str = "best fixed route";
const NOISE: &str = "noisy copies";
const ALL_BIG: &str = "all big";
const SKIP_ORACLE: &str = "oracle that skips";
const SKIP_FIXED: &str = "best fixed route that skips";
const SKIP_NOISE: &str = "noisy copies of the dense model";
const DENSE: &str = "dense model";
const DSMOE: &str = "DSMoE";
const SPLIT: &str = "random split";
const SHARE: &str = "loss at half of the FFN";
const USED: &str = "FFN used";
const HALF: &str = "half of the layers big";
const RUN: &str = "half of the FFNs run";

const STEPS: u64 = 60;
/// Tokens that the oracle reads, and passes over them, about.
const TOKENS: usize = 384;
const PASSES: f64 = 1000.0;
/// Routes among which a pattern is chosen, about.
const PATTERNS: f64 = 64.0;
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
              with its loss at hand, earlier tokens of the window included, and as many noisy copies of the model are its control. The \
              oracle that skips does so with the dense model, which needs no training, and FFNs that run or not. The fixed pattern is \
              that of the model of random routes with the lowest loss on calibration text.",
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
            paper: "a learned router lands at the best of 100 random patterns (read in the paper; here of all patterns of half of the \
                    layers big, chosen on other text): not behind it",
            row: ROUTER,
            controls: &[PATTERN],
            columns: &[SHARE],
            margin: 0.0,
            agrees: "tokens differ, and one pattern serves all of them alike",
            differs: "so short a training teaches the router less than some hundred tokens say of the patterns",
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
        Claim {
            paper: "(ours) an oracle that leaves out half of the FFNs of a dense model beats all of them",
            row: SKIP_ORACLE,
            controls: &[DENSE],
            columns: &[RUN],
            margin: 0.0,
            agrees: "the least of many losses of a token is low, whatever the routes do",
            differs: "a model that was not trained to skip loses more than a choice among so few routes can give back",
        },
        Claim {
            paper: "(ours) what that oracle gains is adaptive computation",
            row: SKIP_ORACLE,
            controls: &[SKIP_NOISE],
            columns: &[RUN],
            margin: 0.0,
            agrees: "a token's routes differ more than copies of one model of the same loss do",
            differs: "the least of as many losses of copies with noise on their weights is as low",
        },
    ],
    plan: |sketch| {
        sketch.made(3 + OTHERS.len());
        sketch.losses(3 + OTHERS.len());
        sketch.other(2, PASSES * TOKENS as f64);
        sketch.other(1, PATTERNS * TOKENS as f64 + sketch.costs().text());
        sketch.trainings(4, &shortened(sketch.train_config()?, STEPS))?;
        sketch.trainings(OTHERS.len(), &shortened(sketch.train_config()?, 2 * STEPS))
    },
    measure,
};

/// The oracle's results at the middle level.
#[derive(Debug, Serialize, Deserialize)]
struct Half {
    /// That of the model by itself.
    whole: f64,
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
    let chance = lab.train(&random, config)?;
    models.push((CHANCE, chance.clone()));
    for (row, method, settings, router_lr_scale) in OTHERS {
        let made = lab.prune(&dense, how(method, settings))?;
        let config = shortened(lab.train_config()?, 2 * STEPS);
        models.push((row, lab.train(&made, TrainConfig { router_lr_scale, ..config })?));
    }
    let mut values = Vec::new();
    let mut add = |row: &str, loss: f64, activated: f64| {
        let outside = (counts.total - counts.ffn) as f64;
        values.push(Value::new(row, SHARE, loss));
        values.push(Value::new(row, USED, (activated - outside) / counts.ffn as f64));
    };
    for (row, model) in models {
        let found = lab.losses(&model)?;
        add(row, found.mean, found.activated);
    }
    let [loss, activated] = pattern(lab, &chance)?;
    add(PATTERN, loss, activated);
    for (model, kind, column, rows) in [
        (&random, RouteKind::BigSmall, HALF, [ORACLE, NOISE, FIXED, ALL_BIG]),
        (&dense, RouteKind::BigSkip, RUN, [SKIP_ORACLE, SKIP_NOISE, SKIP_FIXED, DENSE]),
    ] {
        let Half { whole, best, oracle, noise } = half(lab, model, kind)?;
        let losses = [oracle, noise, best, whole];
        values.extend(rows.into_iter().zip(losses).map(|(row, loss)| Value::new(row, column, loss)));
    }
    Ok(values)
}

/// Returns the losses at the middle level of an oracle with a model's own routes.
fn half(lab: &mut Lab<'_, '_>, model: &Model, kind: RouteKind) -> Result<Half> {
    let inputs = lab.inputs();
    let (seq, seed) = (inputs.costs.seq, lab.seed);
    // As much of every source.
    let each = TOKENS / inputs.text.held_out.len().max(1);
    let ids: Vec<u32> =
        inputs.text.held_out.iter().flat_map(|part| part.ids.iter().take(each)).copied().collect();
    let settings = json!([model.key, inputs.text.key, TOKENS, seq, seed, kind]);
    let (half, _) = lab.stage("oracle", &settings, PASSES * TOKENS as f64, |_| {
        let (found, _) = searched(&model.dir, &ids, options(kind, (seq, seed), true))?;
        let level = middle(&found)?;
        // A mean below the model's own loss is reached without noise: all copies are then the model.
        let noise = level.control.map_or(found.default, |control| control.oracle);
        Ok(Half { whole: found.default, best: level.best, oracle: level.oracle, noise })
    })?;
    Ok(half)
}

/// Returns the held-out loss of a model, and the parameters that a token uses, with the fixed route of half of its layers big that
/// is best on calibration text.
fn pattern(lab: &mut Lab<'_, '_>, model: &Model) -> Result<[f64; 2]> {
    let inputs = lab.inputs();
    let (seq, seed, kind) = (inputs.costs.seq, lab.seed, RouteKind::BigSmall);
    let samples = inputs.profile.calibration.samples;
    let settings = json!([model.key, inputs.text.key, inputs.windows(), TOKENS, samples, seq, seed]);
    let cost = PATTERNS * TOKENS as f64 + inputs.costs.text();
    let (found, _) = lab.stage("pattern", &settings, cost, |_| {
        let sequences = inputs.text.calibration(samples, seed)?;
        let ids: Vec<u32> = sequences.into_iter().flatten().take(TOKENS).collect();
        let (found, mut duo) = searched(&model.dir, &ids, options(kind, (seq, seed), false))?;
        // A digit for each layer.
        let digits = middle(&found)?.best_route.chars().filter_map(|digit| digit.to_digit(10));
        let digits: Vec<u16> = digits.map(|digit| digit as u16).collect();
        let routes = RouteSpace::of(kind, &duo)?.routes(&digits);
        duo.set_routes(&routes)?;
        let (text, _) = measure_text(&duo, &inputs.text.held_out, seq, inputs.windows())?;
        Ok([text.means.nll, text.means.params_activated])
    })?;
    Ok(found)
}

fn options(kind: RouteKind, (seq, seed): (usize, u64), control: bool) -> OracleOptions {
    OracleOptions { exact_up_to: 64, beam: 16, control, seed, ..OracleOptions::new(kind, seq) }
}

/// Runs an oracle on the model in `dir`, and returns it with its last route.
fn searched(dir: &Path, ids: &[u32], options: OracleOptions) -> Result<(OracleReport, Inference)> {
    let mut model = Inference::load(dir, options.precision)?;
    let source = || Ok(Weights::load(dir)?);
    let work = Oracle { model: &mut model, source: &source, ids, options, state: None, made_by: "" };
    let (found, _) = oracle::run(work, &mut |_, _, _| {})?;
    Ok((found, model))
}

/// Returns the routes of half of the layers.
fn middle(found: &OracleReport) -> Result<&LevelReport> {
    let middle = found.layers / 2;
    found.levels.iter().find(|level| level.level == middle).context("no level in the middle")
}
