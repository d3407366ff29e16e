//! R-LLM (Knunyants et al., arXiv 2501.16337), TEAL (Liu et al., arXiv 2408.14690) and CATS (Lee et al., arXiv 2404.08763): inputs of
//! linears below a threshold are skipped.

use anyhow::Result;
use dsmoe_core::accounting::Accounting;

use super::experiment::{Claim, Experiment, Value};
use super::lab::{Lab, Pruned};
use super::sketch::Sketch;

/// Ways to choose thresholds and controls, and the shares of the weights of linears that a token uses with them.
type Rows = &'static [(&'static str, &'static [f64])];

const SHARES: &[f64] = &[0.8, 0.65];
const ROWS: Rows = &[
    ("uniform", SHARES),
    ("teal", SHARES),
    ("cats", SHARES),
    ("search", SHARES),
    (MAGNITUDE, SHARES),
    (DSMOE, SHARES),
];
const SHARES_OF_A_PRETRAINED_MODEL: &[f64] = &[0.9, 0.7, 0.5, 0.4];
/// Of searches there is one, whose tolerance is given. Skipped neurons alone leave half of the weights.
const ROWS_OF_A_PRETRAINED_MODEL: Rows = &[
    ("uniform", SHARES_OF_A_PRETRAINED_MODEL),
    ("teal", SHARES_OF_A_PRETRAINED_MODEL),
    ("cats", &[0.9, 0.7]),
];
const DENSE: &str = "dense";
/// Weights that no token uses any more, in place of inputs that a token skips.
const MAGNITUDE: &str = "magnitude pruning";
/// Experts that a router chooses, as they are made on the same text.
const DSMOE: &str = "DSMoE, as made";
/// Steps of the greedy shares on the pretrained model, twice as long as by default.
const COARSE: &str = "step=0.1";

/// Settings of the one search of the pretrained model, with the default tolerance of the released code, and of its control.
const ONE_SEARCH: &[&str] = &["choose=search", "tolerance=1.001"];
const UNIFORM: &[&str] = &["choose=uniform"];
/// The columns of that search: increases of the loss by text, and the share of the linears' weights that calibration text
/// used.
const AS_SEARCHED: &str = "as searched";
const SHARE_USED: &str = "share used as searched";

/// Passes over the calibration text that a search takes at several tolerances, about. A trial runs half of the layers in the mean.
const SEARCH_PASSES: f64 = 200.0;
/// The same for one tolerance and a model of thirty layers: 120 sites, about three trials at each.
const ONE_SEARCH_PASSES: f64 = 220.0;
/// Passes of parts of the text through single layers, over passes of all through all layers, when shares are chosen.
const GREEDY_PASSES: f64 = 40.0;

const R_LLM: &str = "R-LLM: a search site by site beats thresholds that skip one share everywhere (RWKV-4, up to 63 % skipped)";
const SEEN: &str = "sites differ in what their inputs are worth, and the search sees the loss";
const TEAL: &str = "TEAL: greedy shares beat a uniform one (LLaMA, 7 B and more)";
const CATS: &str = "CATS: half of the gates can be skipped at 1 to 2 % loss (LLaMA-2-7B), so that skipping neurons alone is the better \
                    share";
const WHOLE_GATES: &str =
    "gates and attention stay whole, so that a share of all linears asks for far fewer neurons";

/// The dense model of the profile of all papers.
pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "thresholds",
    title: "R-LLM, TEAL, CATS",
    setting: "Thresholds of the dense model are chosen on calibration text for a share of the weights of all linears; no weight \
              changes. Magnitude pruning leaves that share of the weights, the same for all tokens. DSMoE is made of the dense model on \
              the same text and not trained; its experts are of the FFNs, so that attention is whole.",
    numbers: "increase of the held-out loss over the dense model, nats, by the share of the linears' weights that a token uses",
    claims: &[
        Claim {
            paper: R_LLM,
            row: "search",
            controls: &["uniform"],
            columns: &["0.80 used", "0.65 used"],
            margin: 0.0,
            agrees: SEEN,
            differs: "the search goes from the first site to the last and spends what it may lose on the first ones",
        },
        Claim {
            paper: TEAL,
            row: "teal",
            controls: &["uniform"],
            columns: &["0.80 used", "0.65 used"],
            margin: 0.0,
            agrees: "the down projection can lose most inputs and attention few",
            differs: "the linears of so small a model differ little in what their inputs are worth",
        },
        Claim {
            paper: CATS,
            row: "cats",
            controls: &["uniform"],
            columns: &["0.80 used"],
            margin: 0.0,
            agrees: "neurons with small gates add little",
            differs: WHOLE_GATES,
        },
        Claim {
            paper: "(ours) weights that a token does not need are more than those that none needs: thresholds beat magnitude pruning",
            row: "teal",
            controls: &[MAGNITUDE],
            columns: &["0.80 used", "0.65 used"],
            margin: 0.0,
            agrees: "another token uses what one skips",
            differs: "small weights are needed least by every token of so small a model",
        },
        Claim {
            paper: "(ours) experts of the FFNs that a router chooses, as made, beat thresholds of all linears",
            row: DSMOE,
            controls: &["uniform", "teal", "search"],
            columns: &["0.80 used", "0.65 used"],
            margin: 0.0,
            agrees: "what is left out together is chosen together, and the output of the rest is fitted to the text",
            differs: "thresholds see the inputs that they skip, and attention bears its part; experts are made to be trained",
        },
    ],
    plan: |sketch| plan(sketch, ROWS),
    measure: |lab| measure(lab, ROWS, false),
};

/// A pretrained model, on every text alone.
pub(super) const OF_A_PRETRAINED_MODEL: Experiment = Experiment {
    name: "thresholds-deep",
    setting: "Thresholds of the pretrained model are chosen on calibration text for a share of the weights of all linears; no weight \
              changes. Greedy shares grow in steps of 0.1, twice the default. R-LLM's search runs once, on the same text, with the \
              tolerance 1.001 of a site, and a uniform share then uses as many weights. The share used as searched is that of the \
              calibration text.",
    numbers: "increase of the held-out loss over the dense model, nats, by the share of the linears' weights that a token uses; the last \
              column is the share that a search left",
    claims: &[
        Claim {
            paper: R_LLM,
            row: "search",
            controls: &["uniform"],
            columns: &[AS_SEARCHED],
            margin: 0.0,
            agrees: SEEN,
            differs: "the search goes from the first site to the last and spends what it may lose on the first ones, by the loss on \
                      little text",
        },
        Claim {
            paper: TEAL,
            row: "teal",
            controls: &["uniform"],
            columns: &["0.70 used", "0.50 used"],
            margin: 0.0,
            agrees: "linears of one layer differ in what their inputs are worth",
            differs: "shares are chosen by the error of a layer's output on little text, which is not the loss",
        },
        Claim {
            paper: "TEAL: 40 to 50 % can be skipped at little loss (LLaMA, 7 B and more; abstract; 0.1 nats count as little here)",
            row: "teal",
            controls: &[DENSE],
            columns: &["0.50 used"],
            margin: -0.1,
            agrees: "half of the inputs of most linears are small",
            differs: "a model of this size has fewer inputs that do not matter",
        },
        Claim {
            paper: CATS,
            row: "cats",
            controls: &["uniform"],
            columns: &["0.90 used", "0.70 used"],
            margin: 0.0,
            agrees: "neurons with small gates add little",
            differs: WHOLE_GATES,
        },
    ],
    plan: |sketch| {
        plan(sketch, ROWS_OF_A_PRETRAINED_MODEL)?;
        sketch.calibration_passes(1, ONE_SEARCH_PASSES);
        sketch.made(1);
        sketch.losses(2);
        Ok(())
    },
    measure: |lab| {
        let mut values = measure(lab, ROWS_OF_A_PRETRAINED_MODEL, true)?;
        values.extend(as_searched(lab)?);
        Ok(values)
    },
    ..EXPERIMENT
};

fn plan(sketch: &mut Sketch<'_>, rows: Rows) -> Result<()> {
    sketch.dense_losses();
    for (row, shares) in rows {
        match *row {
            "search" => sketch.calibration_passes(shares.len(), SEARCH_PASSES),
            "teal" => sketch.calibration_passes(shares.len(), GREEDY_PASSES),
            _ => sketch.made(shares.len()),
        }
        sketch.losses(shares.len());
    }
    Ok(())
}

/// Measures all rows: the mean over all texts, or every text alone and the dense model as a control.
fn measure(lab: &mut Lab<'_, '_>, rows: Rows, by_source: bool) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let counts = Accounting::of(&dense.config()?);
    let linears = (counts.attention + counts.ffn) as f64;
    let whole = lab.losses(&dense)?;
    let mut values = Vec::new();
    if by_source {
        let columns = SHARES_OF_A_PRETRAINED_MODEL.iter().flat_map(|share| {
            whole.sources.iter().map(move |(source, _)| format!("{share:.2} used on {source}"))
        });
        values.extend(columns.map(|column| Value::new(DENSE, &column, 0.0)));
    }
    for (row, shares) in rows {
        for share in *shares {
            let params = (counts.total as f64 - linears * (1.0 - share)).round();
            let choose = format!("choose={row}");
            let (method, settings) = match *row {
                MAGNITUDE => ("magnitude", vec![]),
                DSMOE => ("dsmoe", vec![]),
                "teal" if by_source => ("thresholds", vec![&choose[..], COARSE]),
                _ => ("thresholds", vec![&choose[..]]),
            };
            let how = Pruned { method, settings: &settings, params, source: None };
            let pruned = lab.prune(&dense, how)?;
            let found = lab.losses(&pruned)?;
            let column = format!("{share:.2} used");
            if !by_source {
                values.push(Value::new(row, &column, found.mean - whole.mean));
                continue;
            }
            for (source, loss) in &found.sources {
                values.push(Value::new(row, &format!("{column} on {source}"), loss - whole.of(source)?));
            }
        }
    }
    Ok(values)
}

/// Measures one search with a given tolerance, and a uniform share of as many weights as calibration text used with it.
fn as_searched(lab: &mut Lab<'_, '_>) -> Result<Vec<Value>> {
    let dense = lab.dense();
    let counts = Accounting::of(&dense.config()?);
    let (total, linears) = (counts.total as f64, (counts.attention + counts.ffn) as f64);
    let whole = lab.losses(&dense)?;
    let mut values = Vec::new();
    // A search whose tolerance is given has no budget below all parameters.
    let mut params = total;
    for (row, settings) in [("search", ONE_SEARCH), ("uniform", UNIFORM)] {
        let pruned = lab.prune(&dense, Pruned { method: "thresholds", settings, params, source: None })?;
        params = Accounting::of(&pruned.config()?).activated(0.0).round();
        let found = lab.losses(&pruned)?;
        for (source, loss) in &found.sources {
            let column = format!("{AS_SEARCHED} on {source}");
            values.push(Value::new(row, &column, loss - whole.of(source)?));
        }
        values.push(Value::new(row, SHARE_USED, 1.0 - (total - params) / linears));
    }
    Ok(values)
}
