//! Checks of records that were read: values that no measurement gives are refused.

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::Value;

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

/// Refuses a record of the file `path` with a value that cannot be.
pub(super) fn check(path: &Path, record: &impl Serialize) -> Result<()> {
    walk(path, "", &serde_json::to_value(record)?)
}

fn walk(path: &Path, key: &str, value: &Value) -> Result<()> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .filter(|(key, _)| !OWN.contains(&key.as_str()))
            .try_for_each(|(key, value)| walk(path, key, value)),
        Value::Array(values) => values.iter().try_for_each(|value| walk(path, key, value)),
        Value::Number(number) => {
            let allowed = range(key);
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
fn range(key: &str) -> RangeInclusive<f64> {
    match key {
        "correlation" => -1.0..=1.0,
        "kl" => -ROUNDING..=f64::MAX,
        key if SHARES.contains(&key) => 0.0..=1.0,
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
