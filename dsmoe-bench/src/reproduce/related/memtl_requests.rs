//! MEMTL (Liang et al., arXiv 2309.00907) on requests to one model: heads predict what a smaller budget costs a request, on text of
//! a source that none of them has seen, and choose budgets by it.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use dsmoe_baselines::plan::Fit;
use dsmoe_core::accounting::Accounting;
use dsmoe_train::TrainConfig;
use serde_json::json;

use super::super::cache::{Interrupted, Key};
use super::super::cost::Costs;
use super::experiment::{Claim, Experiment, Value, mean};
use super::lab::{Lab, Model, Pruned};
use crate::files::discard;
use crate::interrupts::STOP;
use crate::planning::compare::{Sides, Split, Terms, Way};
use crate::planning::profiling::{Profiling, Times};
use crate::planning::requests::{Profiled, cut, hash, spreads};

/// The budgets, as shares of the experts, and the number of the one whose share all ways keep to.
const BUDGETS: [f64; 5] = [0.25, 0.375, 0.5, 0.75, 1.0];
const TARGET: usize = 2;
/// Requests of every source for each window that losses are measured on.
const PER_WINDOW: usize = 32;
const HEADS: usize = 4;
/// Cost of the networks in tokens of forward passes of a model of a million parameters, for each request, about.
const COST: usize = 50;
/// Fewest tokens of a sequence that is cut into a prompt and a continuation.
const SHORTEST: usize = 4;

const ONE_BUDGET: &str = "one budget for all";
const CHANCE: &str = "random budgets";
const ONE: &str = "one head";
const MEAN: &str = "four heads, mean";
const CAUTIOUS: &str = "four heads, mean and deviation";
const ORACLE: &str = "oracle, no method";
const EXTRA: &str = "extra loss";
const DEVIATION: &str = "deviation";
const WITHIN: &str = "deviation within a source";
const SHARE: &str = "active share";
const ERROR: &str = "squared error";
/// Losses are so small that they are shown in thousandths of a nat.
const UNIT: f64 = 1e3;

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "memtl-requests",
    title: "MEMTL on requests",
    setting: "DSMoE, trained to serve budgets from a quarter of its experts to all of them. A request is held-out text of the length of \
              a training sequence, half of it the prompt. From a pass over the prompt at the smallest budget, which the shares do not \
              count, heads predict what each budget adds to the loss of the continuation. They learn from the requests of all sources \
              but one, and choose budgets for those of that one; numbers of ways are means over the sources that were left out. All \
              ways keep to the mean share of the experts that these requests open at one budget of 0.5, which predicts the means of what \
              was learnt. Random budgets are those of the heads' mean and deviation, dealt out by chance; their share is only near \
              that one, since a budget opens more experts for some requests than for others. The oracle knows the losses and may mix \
              budgets: a bound.",
    numbers: "loss of the continuation over that at the largest budget, mean, and its standard deviation over all requests and over \
              those of a source, thousandths of a nat; share of the experts that requests open; and mean squared error of what was \
              predicted, squared thousandths of a nat",
    claims: &[
        Claim {
            paper: "several heads have a lower squared error than one (abstract; here on text of a source that was left out)",
            row: MEAN,
            controls: &[ONE],
            columns: &[ERROR],
            margin: 0.0,
            agrees: "heads of different samples err differently on such text, and their mean errs less",
            differs: "heads on one frozen backbone see the same, and each of them learns from fewer requests than one that is trained with \
                      the backbone",
        },
        Claim {
            paper: "an ensemble loses less than one head under drift (the claim in our terms: budgets by request, larger ones where heads \
                    disagree)",
            row: CAUTIOUS,
            controls: &[ONE],
            columns: &[EXTRA],
            margin: 0.0,
            agrees: "heads disagree about requests that are unlike those that were learnt, and a larger budget loses less there",
            differs: "heads rank requests much alike, and their disagreement says little of what a budget costs",
        },
        Claim {
            paper: "(ours) budgets by request lose less than one budget for all at the same mean share",
            row: CAUTIOUS,
            controls: &[ONE_BUDGET, CHANCE],
            columns: &[EXTRA],
            margin: 0.0,
            agrees: "requests differ in what a smaller budget costs them, and a prompt says by how much",
            differs: "the loss is convex in the share, so that spreading budgets over requests costs more than what a prompt says wins \
                      back",
        },
    ],
    plan: |sketch| {
        let costs = sketch.costs();
        let Costs { sources, seq, .. } = costs;
        ensure!(
            sources > 1 && seq >= SHORTEST,
            "experiment memtl-requests: there are {sources} sources of text and sequences of {seq} tokens; use 2 sources and \
             {SHORTEST} tokens at least, or leave the experiment out"
        );
        sketch.made(1);
        sketch.trainings(1, &elastic(sketch.train_config()?))?;
        sketch.other(1, profiling_cost(costs));
        sketch.other(costs.sources, heads_cost(costs));
        Ok(())
    },
    measure,
};

/// Returns the settings of a training for all budgets.
fn elastic(config: TrainConfig) -> TrainConfig {
    let [least, .., most] = BUDGETS;
    TrainConfig { active_range: Some([least, most]), sparsity: None, active_target: None, ..config }
}

/// Returns the number of requests of every source, and the tokens of a prompt, which are half of a request.
fn requests_of(costs: Costs<'_>) -> (usize, usize) {
    (PER_WINDOW * costs.profile.measure.windows, costs.seq / 2)
}

fn profiling_cost(costs: Costs<'_>) -> f64 {
    let (most, prompt) = requests_of(costs);
    (costs.sources * most * prompt * (1 + 2 * BUDGETS.len())) as f64
}

fn heads_cost(costs: Costs<'_>) -> f64 {
    (costs.sources * requests_of(costs).0 * COST) as f64
}

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let counts = Accounting::of(&dense.config()?);
    let params = counts.total as f64 - counts.ffn as f64 / 2.0;
    let made = lab.prune(&dense, Pruned { method: "dsmoe", settings: &[], params, source: None })?;
    let config = elastic(lab.train_config()?);
    let model = lab.train(&made, config)?;
    let (rows, key) = profiled(lab, &model)?;
    let inputs = lab.inputs();
    let terms = Terms {
        shares: &BUDGETS,
        target: TARGET,
        heads: HEADS,
        fit: Fit { seed: lab.seed, ..Fit::default() },
    };
    let mut splits = Vec::new();
    for (number, name) in lab.sources().iter().enumerate() {
        let settings = json!([key, TARGET, HEADS, format!("{:?}", terms.fit), name]);
        let sides = Sides::of_source(name, &rows, number);
        let (split, _) =
            lab.stage("heads", &settings, heads_cost(inputs.costs), |_| terms.compare(&sides, inputs.ui))?;
        splits.push(split);
    }
    Ok(spread(&rows).into_iter().chain(ways(&splits)).collect())
}

/// Measures requests at all budgets.
fn profiled(lab: &mut Lab<'_, '_>, model: &Model) -> Result<(Vec<Profiled>, Key)> {
    let inputs = lab.inputs();
    let (most, prompt) = requests_of(inputs.costs);
    let len = 2 * prompt;
    let sources = inputs.text.held_out_sources(most * len)?;
    let requests = cut(&sources, most, len).context("experiment memtl-requests: held-out text")?;
    let settings = json!([model.key, hash(&requests), BUDGETS, prompt, inputs.precision().name()]);
    lab.stage("profiled", &settings, profiling_cost(inputs.costs), |dir| {
        let folder = dir.join("points");
        let profiling = Profiling {
            requests: &requests,
            prompt,
            shares: &BUDGETS,
            // A killed process has left what it had done.
            folder: &folder,
            stop: stopped,
        };
        let mut model = inputs.load(&model.dir)?;
        let (rows, _) = profiling.run(&mut model, &|_| Ok(Times::default()), inputs.ui)?;
        // The result holds all of it.
        discard(&folder)?;
        Ok(rows)
    })
}

/// Ends a stage that the user wants to stop; its finished parts are kept.
fn stopped() -> Result<()> {
    if STOP.load(Ordering::Relaxed) {
        return Err(Interrupted.into());
    }
    Ok(())
}

/// Says how much requests differ at every budget but the largest.
fn spread(rows: &[Profiled]) -> Vec<Value> {
    let found = spreads(rows).into_iter().zip(BUDGETS).take(BUDGETS.len() - 1).enumerate();
    found
        .flat_map(|(at, (spread, budget))| {
            let opened: Vec<f64> = rows.iter().map(|row| row.active[at]).collect();
            [
                (EXTRA, UNIT * spread.mean),
                (DEVIATION, UNIT * spread.deviation),
                (WITHIN, UNIT * spread.within),
                (SHARE, mean(&opened)),
            ]
            .map(|(column, value)| Value::new(&format!("budget {budget}"), column, value))
        })
        .collect()
}

/// Picks one way of a split.
type Pick = fn(&Split) -> &Way;

/// Returns the means of all ways over the sources that were left out.
fn ways(splits: &[Split]) -> Vec<Value> {
    let over = |of: &dyn Fn(&Split) -> f64| mean(&splits.iter().map(of).collect::<Vec<f64>>());
    let all: [(&str, Pick); 5] = [
        (ONE_BUDGET, |split| &split.one_budget),
        (CHANCE, |split| &split.by_chance),
        (ONE, |split| &split.one_head),
        (MEAN, |split| &split.ensemble),
        (CAUTIOUS, |split| &split.cautious),
    ];
    let mut values = Vec::new();
    for (row, way) in all {
        values.push(Value::new(row, EXTRA, UNIT * over(&|split| way(split).loss)));
        values.push(Value::new(row, SHARE, over(&|split| way(split).share)));
        if splits.iter().all(|split| way(split).error.is_some()) {
            let error = over(&|split| way(split).error.unwrap_or(f64::NAN));
            values.push(Value::new(row, ERROR, UNIT * UNIT * error));
        }
    }
    values.push(Value::new(ORACLE, EXTRA, UNIT * over(&|split| split.oracle)));
    values
}

#[cfg(test)]
mod tests {
    use super::super::experiment::{Numbers, Verdict};
    use super::*;

    fn way(loss: f64, error: Option<f64>) -> Way {
        Way { loss, share: 0.5, error }
    }

    /// A split whose ways lose so much: one budget, chance, one head, the ensemble, and the cautious one.
    fn split(losses: [f64; 5], oracle: f64) -> Split {
        let [one_budget, by_chance, one_head, ensemble, cautious] = losses;
        Split {
            held_out: "web".to_owned(),
            requests: 2,
            one_budget: way(one_budget, Some(4e-6)),
            by_chance: way(by_chance, None),
            one_head: way(one_head, Some(3e-6)),
            ensemble: way(ensemble, Some(2e-6)),
            cautious: way(cautious, Some(5e-6)),
            oracle,
        }
    }

    fn of(values: &[Value], row: &str, column: &str) -> Option<f64> {
        values.iter().find(|value| value.row == row && value.column == column).map(|value| value.value)
    }

    #[test]
    fn ways_are_means_over_sources_in_thousandths() {
        let values = ways(&[split([0.1; 5], 0.01), split([0.2, 0.3, 0.4, 0.5, 0.6], 0.03)]);
        let is = |row, column, wanted: f64| {
            let found = of(&values, row, column).unwrap();
            assert!((found - wanted).abs() < 1e-9, "{row}, {column}: {found} for {wanted}");
        };
        is(ONE_BUDGET, EXTRA, 150.0);
        is(CHANCE, EXTRA, 200.0);
        is(ONE, EXTRA, 250.0);
        is(MEAN, EXTRA, 300.0);
        is(CAUTIOUS, EXTRA, 350.0);
        is(ORACLE, EXTRA, 20.0);
        is(ONE_BUDGET, SHARE, 0.5);
        is(MEAN, ERROR, 2.0);
        assert_eq!((of(&values, CHANCE, ERROR), of(&values, ORACLE, SHARE)), (None, None));
    }

    #[test]
    fn claims_follow_from_the_ways() {
        let verdicts = |losses: [f64; 5]| {
            let seeds = [ways(&[split(losses, 0.0)])];
            EXPERIMENT
                .claims
                .iter()
                .map(|claim| claim.decide(&Numbers(&seeds)).unwrap().0)
                .collect::<Vec<_>>()
        };
        let (yes, no) = (Verdict::Agrees, Verdict::Differs);
        // The first claim is about errors, which are 2 and 3 here.
        assert_eq!(verdicts([0.5, 0.6, 0.4, 0.9, 0.3]), [yes, yes, yes]);
        assert_eq!(verdicts([0.5, 0.6, 0.2, 0.1, 0.3]), [yes, no, yes]);
        // One budget for all, or chance alone, is enough against the last claim.
        assert_eq!(verdicts([0.3, 0.6, 0.4, 0.1, 0.3]), [yes, yes, no]);
        assert_eq!(verdicts([0.5, 0.2, 0.4, 0.1, 0.3]), [yes, yes, no]);
    }

    #[test]
    fn the_spread_has_a_row_for_each_budget_but_the_largest() {
        let row = |source, first: f64| Profiled {
            source,
            features: vec![0.0],
            active: vec![0.2 + 0.1 * source as f64; 5],
            losses: vec![1.0 + first, 1.0, 1.0, 1.0, 1.0],
        };
        let values = spread(&[row(0, 0.1), row(0, 0.3), row(1, 0.5), row(1, 0.7)]);
        assert_eq!(values.len(), 4 * 4);
        let is = |column, wanted: f64| {
            let found = of(&values, "budget 0.25", column).unwrap();
            assert!((found - wanted).abs() < 1e-9, "{column}: {found} for {wanted}");
        };
        // 0.1 to 0.7 in steps of 0.2: squares from 0.4 are 0.09, 0.01, 0.01 and 0.09, and within a source 0.01 each.
        is(EXTRA, 400.0);
        is(DEVIATION, 1000.0 * 0.05f64.sqrt());
        is(WITHIN, 100.0);
        is(SHARE, 0.25);
        assert_eq!(of(&values, "budget 0.75", DEVIATION), Some(0.0));
        assert_eq!(of(&values, "budget 1", EXTRA), None);
    }

    #[test]
    fn the_model_is_trained_for_all_budgets() {
        let config =
            elastic(TrainConfig { steps: Some(4), active_target: Some(0.5), ..TrainConfig::default() });
        let resolved = config.resolve().unwrap();
        assert_eq!((resolved.active_range, resolved.active_target), (Some([0.25, 1.0]), None));
        assert!(BUDGETS.is_sorted());
        // The text of the experiment names it.
        assert!(EXPERIMENT.setting.contains(&format!("one budget of {},", BUDGETS[TARGET])));
    }
}
