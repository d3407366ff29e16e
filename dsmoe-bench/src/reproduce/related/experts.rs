//! Ways to hold fewer experts of a mixture, which the experiments on HC-SMoE, UNCURL and SEER-MoE compare.

use anyhow::{Context, Result};

use super::experiment::Value;
use super::lab::{EXPERTS, Lab, Losses, Model, Pruned};
use super::sketch::Sketch;

/// A way to hold fewer experts: its row, the method, its settings, and whether the gates of all experts stay.
pub(crate) struct Way {
    pub(crate) row: &'static str,
    method: &'static str,
    settings: &'static [&'static str],
    keeps_gates: bool,
}

const fn merged(row: &'static str, method: &'static str, settings: &'static [&'static str]) -> Way {
    Way { row, method, settings, keeps_gates: true }
}

const fn dropped(row: &'static str, settings: &'static [&'static str]) -> Way {
    Way { row, method: "seer-moe", settings, keeps_gates: false }
}

pub(crate) const HC_SMOE: &str = "HC-SMoE";
pub(crate) const UNCURL: &str = "UNCURL";
pub(crate) const RANDOM_CLUSTERS: &str = "random clusters merged";
pub(crate) const HARD: &str = "removed by hard counts";
pub(crate) const SOFT: &str = "removed by soft counts";
pub(crate) const EAN: &str = "removed by EAN";
pub(crate) const REAP: &str = "removed by REAP";
pub(crate) const RANDOM: &str = "removed at random";

const WAYS: [Way; 12] = [
    merged(HC_SMOE, "hc-smoe", &[]),
    merged("HC-SMoE, neurons aligned", "hc-smoe", &["alignment=weights"]),
    merged("HC-SMoE, clusters of router logits", "hc-smoe", &["vectors=router-logits"]),
    merged(UNCURL, "uncurl", &[]),
    merged(RANDOM_CLUSTERS, "hc-smoe", &["vectors=random"]),
    dropped(HARD, &[]),
    dropped("hard counts, over all layers", &["allocation=global"]),
    dropped("hard counts, one at a time", &["rounds=each"]),
    dropped(SOFT, &["score=soft"]),
    dropped(EAN, &["score=ean"]),
    dropped(REAP, &["score=reap"]),
    dropped(RANDOM, &["score=random"]),
];

/// Counts the stages of rows with so many experts left, calibrated on all text or on one source.
pub(crate) fn plan(sketch: &mut Sketch<'_>, rows: &[&str], left: &[usize], text: &str) -> Result<()> {
    sketch.mixture()?;
    if sketch.is_new("mixture's losses") {
        sketch.losses(1);
    }
    for row in rows {
        for left in left {
            if sketch.is_new(&format!("{row}, {left}, {text}")) {
                sketch.made(1);
                sketch.losses(1);
            }
        }
    }
    Ok(())
}

/// Returns the losses of the mixture with `left` experts in every layer, chosen on all text or on that of one source.
pub(crate) fn losses(lab: &mut Lab<'_, '_>, row: &str, left: usize, source: Option<&str>) -> Result<Losses> {
    let pruned = pruned(lab, row, left, source)?;
    lab.losses(&pruned)
}

/// Returns the mixture with `left` experts in every layer.
pub(crate) fn pruned(lab: &mut Lab<'_, '_>, row: &str, left: usize, source: Option<&str>) -> Result<Model> {
    let way = WAYS.iter().find(|way| way.row == row).with_context(|| format!("no way {row:?}"))?;
    let mixture = lab.mixture()?;
    let params = lab.held(&mixture, left, way.keeps_gates)?;
    let how = Pruned { method: way.method, settings: way.settings, params, source };
    lab.prune(&mixture, how)
}

/// Measures rows on all text: the increase of the loss over the whole mixture.
pub(crate) fn increases(lab: &mut Lab<'_, '_>, rows: &[&str], left: &[usize]) -> Result<Vec<Value>> {
    let mixture = lab.mixture()?;
    let whole = lab.losses(&mixture)?.mean;
    let mut values = Vec::new();
    for row in rows {
        for &left in left {
            let loss = losses(lab, row, left, None)?.mean;
            values.push(Value::new(row, &column(left), loss - whole));
        }
    }
    Ok(values)
}

/// Measures rows on all text: the entropy of the load of a layer's experts.
pub(crate) fn entropies(lab: &mut Lab<'_, '_>, rows: &[&str], left: &[usize]) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    for row in rows {
        for &left in left {
            let entropy = losses(lab, row, left, None)?.entropy(None)?;
            values.push(Value::new(row, &entropy_column(&column(left)), entropy));
        }
    }
    Ok(values)
}

/// Returns the name of the column of entropies beside that of losses.
pub(crate) fn entropy_column(column: &str) -> String {
    format!("load entropy, {column}")
}

/// Returns the name of the column with `left` experts in every layer.
fn column(left: usize) -> String {
    format!("{left} of {EXPERTS}")
}

#[cfg(test)]
mod tests {
    use super::super::lab::check_settings;
    use super::*;

    #[test]
    fn ways_have_settings_that_their_methods_take() {
        for way in &WAYS {
            let settings = check_settings(way.method, way.settings).unwrap();
            for setting in way.settings {
                let (name, value) = setting.split_once('=').unwrap();
                assert_eq!(settings[name], *value, "{}", way.row);
            }
        }
    }
}
