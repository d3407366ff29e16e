//! Checks of records that were read: values that no measurement gives are refused.

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::Value;

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
    let made = run.made.as_ref().map(|made| (made.params_activated, made.params_total));
    let means = &run.text.means;
    for (activated, total) in made.into_iter().chain([(means.params_activated, means.params_total as f64)]) {
        if activated > total * (1.0 + ROUNDING) {
            return wrong(format!("params_activated is {activated} of {total}"));
        }
    }
    let (nll, ppl) = (means.nll, means.ppl);
    if (nll - ppl.ln()).abs() > ROUNDING {
        return wrong(format!("nll is {nll} and ppl {ppl}"));
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
                    let wanted = match *allowed.end() {
                        f64::MAX => format!("{} or more", allowed.start()),
                        end => format!("from {} to {end}", allowed.start()),
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
        "kl" => -ROUNDING..=f64::MAX,
        key if shares.contains(&key) => 0.0..=1.0,
        _ => 0.0..=f64::MAX,
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
        let cases: [(&str, Value, &str); 5] = [
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
}
