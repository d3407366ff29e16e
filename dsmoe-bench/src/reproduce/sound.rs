//! Checks of records that were read: values that no measurement gives are refused.

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::measure::Means;
use super::records::{BASE, Run};

/// Numbers that are shares, scores or probabilities.
const SHARES: [&str; 9] = [
    "share",
    "active_ratio",
    "active_ratio_per_layer",
    "zero_active_share",
    "serves",
    "top1",
    "threshold",
    "value",
    "stderr",
];
/// A divergence is 0 or more, apart from rounding.
const ROUNDING: f64 = 1e-3;
/// Most nats of a token. The perplexity of 710 nats is infinite already.
const MOST_NATS: f64 = 1e4;
/// Most parameters of a model.
const MOST_PARAMS: f64 = 1e15;
/// Most of anything else: counts have 64 bits.
const MOST: f64 = u64::MAX as f64;
/// Values of a method's own, which may be anything.
const OWN: [&str; 2] = ["settings", "measured"];

/// Shares of the settings of a reproduction.
const SETTINGS: [&str; 6] = ["active", "budgets", "curve", "late_step", "milestones", "thresholds"];

/// Refuses a record of the file `path` with a value that cannot be.
pub(super) fn check(path: &Path, record: &impl Serialize) -> Result<()> {
    walk(path, ("", &SHARES), &serde_json::to_value(record)?)
}

/// Does the same for the settings of a reproduction.
pub(super) fn check_setup(path: &Path, setup: &impl Serialize) -> Result<()> {
    walk(path, ("", &[&SHARES[..], &SETTINGS].concat()), &serde_json::to_value(setup)?)
}

/// Refuses the run of the file `path` whose values contradict each other, or its name `id`.
pub(super) fn check_run(path: &Path, id: &str, run: &Run) -> Result<()> {
    let wrong = |what: String| bail!("{}: {what}; measure that model again", path.display());
    if id != BASE && id != format!("{}-s{}", run.method, run.seed) {
        return wrong(format!("it is of {} and seed {}", run.method, run.seed));
    }
    let means = &run.text.means;
    let stones = run.trained.iter().flat_map(|trained| &trained.milestones);
    let (points, domains) = (run.sweep.iter().flatten(), &run.text.domains);
    let params = |means: &Means| (means.params_activated, means.params_total as f64);
    let made = run.made.as_ref().map(|made| (made.params_activated, made.params_total));
    for (activated, total) in made
        .into_iter()
        .chain([params(means)])
        .chain(stones.clone().map(|stone| params(&stone.means)))
        .chain(points.clone().map(|point| (point.params_activated, means.params_total as f64)))
    {
        if activated > total * (1.0 + ROUNDING) {
            return wrong(format!("params_activated is {activated} of {total}"));
        }
    }
    for (nll, ppl) in [(means.nll, means.ppl)]
        .into_iter()
        .chain(stones.map(|stone| (stone.means.nll, stone.means.ppl)))
        .chain(points.map(|point| (point.nll, point.ppl)))
        .chain(domains.iter().map(|domain| (domain.nll, domain.ppl)))
    {
        if (nll - ppl.ln()).abs() > ROUNDING {
            return wrong(format!("nll is {nll} and ppl {ppl}"));
        }
    }
    for (sum, tokens) in domains.iter().flat_map(|domain| &domain.windows) {
        if *sum > MOST_NATS * *tokens as f64 {
            return wrong(format!("windows has the sum {sum} of {tokens} tokens"));
        }
    }
    for score in run.tasks.iter().flatten() {
        if score.items == 0 || score.right.len() != score.items {
            return wrong(format!(
                "{} has {} items and {} answers",
                score.task,
                score.items,
                score.right.len()
            ));
        }
    }
    Ok(())
}

fn walk(path: &Path, (key, shares): (&str, &[&str]), value: &Value) -> Result<()> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .filter(|(key, _)| !OWN.contains(&key.as_str()))
            .try_for_each(|(key, value)| walk(path, (key, shares), value)),
        Value::Array(values) => values.iter().try_for_each(|value| walk(path, (key, shares), value)),
        Value::Number(number) => {
            let allowed = range(key, shares);
            match number.as_f64().filter(|number| allowed.contains(number)) {
                Some(_) => Ok(()),
                None => {
                    let (start, end) = (allowed.start(), allowed.end());
                    let is_less = number.as_f64().is_some_and(|number| number < *start);
                    let wanted = match is_less && *end >= MOST_PARAMS {
                        true => format!("{start} or more"),
                        false => format!("from {start} to {end}"),
                    };
                    bail!(
                        "{}: {key} is {number} and has to be {wanted}; measure that model again",
                        path.display()
                    )
                }
            }
        }
        _ => Ok(()),
    }
}

/// Returns the values that a measurement may give.
fn range(key: &str, shares: &[&str]) -> RangeInclusive<f64> {
    match key {
        "correlation" => -1.0..=1.0,
        "kl" => -ROUNDING..=MOST_NATS,
        "nll" => 0.0..=MOST_NATS,
        // Where it stands, `nll` stands beside it.
        "ppl" => 0.0..=f64::MAX,
        "params_total" | "params_activated" | "dense_params" | "budget" => 0.0..=MOST_PARAMS,
        key if shares.contains(&key) => 0.0..=1.0,
        _ => 0.0..=MOST,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_that_cannot_be_are_named() {
        let record = |change: &dyn Fn(&mut Value)| {
            let mut record = json!({
                "made": { "params_total": 10.0, "params_activated": 4.0, "measured": { "shift": -3.0 } },
                "text": { "nll": 1.5, "domains": [{ "share": 1.0, "windows": [[12.0, 8]] }], "kl": -1e-9 },
                "difficulty": { "correlation": -0.4 }, "role": null, "method": "dsmoe",
            });
            change(&mut record);
            check(Path::new("runs/dsmoe-s0.json"), &record).err().map(|error| error.to_string())
        };
        assert_eq!(record(&|_| ()), None);
        let cases: [(&str, Value, &str); 9] = [
            ("/made/params_total", json!(1e300), "and has to be from 0 to 1000000000000000;"),
            ("/made/params_activated", json!(1e16), "and has to be from 0 to 1000000000000000;"),
            ("/text/nll", json!(1e5), "and has to be from 0 to 10000;"),
            ("/text/domains/0/windows/0/0", json!(1e300), "and has to be from 0 to 18446744073709552000;"),
            ("/made/params_total", json!(-1.0), "params_total is -1.0 and has to be 0 or more"),
            ("/text/domains/0/share", json!(1.5), "share is 1.5 and has to be from 0 to 1"),
            ("/text/domains/0/windows/0/0", json!(-2.0), "windows is -2.0"),
            ("/difficulty/correlation", json!(1.25), "correlation is 1.25 and has to be from -1 to 1"),
            ("/text/kl", json!(-0.5), "kl is -0.5"),
        ];
        for (at, value, wanted) in cases {
            let error =
                record(&|record| *record.pointer_mut(at).unwrap() = value.clone()).unwrap_or_default();
            assert!(error.starts_with("runs/dsmoe-s0.json: ") && error.contains(wanted), "{at}: {error}");
        }
    }

    #[test]
    fn numbers_of_a_run_fit_each_other() {
        let means = json!({
            "share": 1.0, "step": 2, "tokens": 8, "nll": 0.0, "ppl": 1.0, "active_ratio": 0.5, "params_total": 10,
            "params_activated": 6.0
        });
        let good = json!({
            "format_version": 1, "method": "dsmoe", "role": "dsmoe", "seed": 0, "key": "k",
            "machine": { "cpu": "c", "isa": "i", "os": "o", "device": "cpu" },
            "made": {
                "params_total": 10.0, "params_activated": 6.0, "reached_by": "x", "calibration_tokens": 0,
                "settings": {}, "measured": {}
            },
            "trained": { "steps": 2, "tokens": 8, "milestones": [means] },
            "text": {
                "nll": 0.0, "ppl": 1.0, "active_ratio": 0.5, "params_total": 10, "params_activated": 6.0,
                "flops_per_token": 20.0, "domains": [
                    { "name": "d", "share": 1.0, "nll": 0.0, "ppl": 1.0, "active_ratio": 0.5, "windows": [[0.0, 8]] }
                ]
            },
            "tasks": null, "difficulty": null,
            "sweep": [
                { "threshold": 0.5, "nll": 0.0, "ppl": 1.0, "active_ratio": 0.5, "params_activated": 6.0 }
            ]
        });
        let checked = |at: &str, value: f64| {
            let mut run = good.clone();
            *run.pointer_mut(at).unwrap() = json!(value);
            let run: Run = serde_json::from_value(run).unwrap();
            check_run(Path::new("r.json"), "dsmoe-s0", &run).map_err(|error| error.to_string())
        };
        checked("/text/params_activated", 10.0).unwrap();
        for (at, value, wanted) in [
            ("/made/params_activated", 11.0, "r.json: params_activated is 11 of 10"),
            ("/text/params_activated", 11.0, "r.json: params_activated is 11 of 10"),
            ("/trained/milestones/0/params_activated", 11.0, "r.json: params_activated is 11 of 10"),
            ("/sweep/0/params_activated", 11.0, "r.json: params_activated is 11 of 10"),
            ("/trained/milestones/0/ppl", 2.0, "r.json: nll is 0 and ppl 2"),
            ("/trained/milestones/0/nll", 2.0, "r.json: nll is 2 and ppl 1"),
            ("/sweep/0/ppl", 2.0, "r.json: nll is 0 and ppl 2"),
            ("/text/domains/0/ppl", 2.0, "r.json: nll is 0 and ppl 2"),
            ("/text/domains/0/windows/0/0", 1e6, "r.json: windows has the sum 1000000 of 8 tokens"),
        ] {
            let error = checked(at, value).unwrap_err();
            assert!(error.starts_with(wanted), "{at}: {error}");
        }
    }
}
