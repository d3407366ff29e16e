//! R-LLM (Knunyants et al., arXiv 2501.16337), TEAL (Liu et al., arXiv 2408.14690) and CATS (Lee et al., arXiv 2404.08763): inputs of
//! linears below a threshold are skipped.

use anyhow::Result;
use dsmoe_core::accounting::Accounting;

use super::experiment::{Claim, Experiment, Value};
use super::lab::{Lab, Pruned};

const ROWS: [&str; 4] = ["uniform", "teal", "cats", "search"];
/// Shares of the weights of linears that a token uses.
const SHARES: [f64; 2] = [0.8, 0.65];

/// Passes over the calibration text that a search takes at several tolerances, about.
const SEARCH_PASSES: f64 = 350.0;

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "thresholds",
    title: "R-LLM, TEAL, CATS",
    setting: "Thresholds of the dense model are chosen on calibration text for a share of the weights of all linears; no weight \
              changes.",
    numbers: "increase of the held-out loss over the dense model, nats, by the share of the linears' weights that a token uses",
    claims: &[
        Claim {
            paper: "R-LLM: a search site by site beats thresholds that skip one share everywhere (RWKV-4, up to 63 % skipped)",
            row: "search",
            controls: &["uniform"],
            columns: &["0.80 used", "0.65 used"],
            margin: 0.0,
            agrees: "sites differ in what their inputs are worth, and the search sees the loss",
            differs: "the search goes from the first site to the last and spends what it may lose on the first ones",
        },
        Claim {
            paper: "TEAL: greedy shares beat a uniform one (LLaMA, 7 B and more)",
            row: "teal",
            controls: &["uniform"],
            columns: &["0.80 used", "0.65 used"],
            margin: 0.0,
            agrees: "the down projection can lose most inputs and attention few",
            differs: "the linears of so small a model differ little in what their inputs are worth",
        },
        Claim {
            paper: "CATS: half of the gates can be skipped at 1 to 2 % loss (LLaMA-2-7B), so that skipping neurons alone is the \
                    better share",
            row: "cats",
            controls: &["uniform"],
            columns: &["0.80 used"],
            margin: 0.0,
            agrees: "neurons with small gates add little",
            differs: "gates and attention stay whole, so that a share of all linears asks for far fewer neurons",
        },
    ],
    plan: |sketch| {
        sketch.dense_losses();
        let searches = SHARES.len();
        sketch.calibration_passes(searches, SEARCH_PASSES);
        sketch.made(ROWS.len() * SHARES.len() - searches);
        sketch.losses(ROWS.len() * SHARES.len());
        Ok(())
    },
    measure,
};

fn measure(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let counts = Accounting::of(&dense.config()?);
    let linears = (counts.attention + counts.ffn) as f64;
    let whole = lab.losses(&dense)?.mean;
    let mut values = Vec::new();
    for row in ROWS {
        for share in SHARES {
            let params = (counts.total as f64 - linears * (1.0 - share)).round();
            let choose = format!("choose={row}");
            let how = Pruned { method: "thresholds", settings: &[&choose], params, source: None };
            let pruned = lab.prune(&dense, how)?;
            let loss = lab.losses(&pruned)?.mean;
            values.push(Value::new(row, &format!("{share:.2} used"), loss - whole));
        }
    }
    Ok(values)
}
