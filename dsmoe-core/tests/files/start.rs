//! The start from calibration text: every step on the first layer against f64 sums over the same text.

use std::path::{Path, PathBuf};

use dsmoe_core::calibrate::{Input, LayerStream};
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::config::Config;
use dsmoe_core::convert::start::{RouterTarget, Start, StartSettings, Started, Widths, start};
use dsmoe_core::model::{Batch, Inference, Model, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::{assert_close, f64s, refused};
use dsmoe_router::{GateValue, Rescale, RouterConfig};
use serde_json::{Value, json};

use crate::support::{quiet, read};

const HIDDEN: usize = 12;
const NEURONS: usize = 24;
const EXPERTS: usize = 6;
const WIDTH: usize = NEURONS / EXPERTS;
const SEQ: usize = 40;
const SEQUENCES: usize = 24;
/// Those that are fitted to; the others place thresholds.
const FITTED: usize = 21;
const VOCAB: usize = 50;

/// A random model of two layers with the keys of `changes`.
fn dense(dir: &Path, changes: &Value) -> PathBuf {
    let mut json = json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": NEURONS, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
        "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true});
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let mut model = Model::new(Config::from_json(Path::new("config.json"), &json.to_string()).unwrap());
    for (i, entry) in model.layout().clone().entries().iter().enumerate() {
        let mut rng = Rng::new(11, i as u64);
        let is_norm = entry.spec.name.contains("norm");
        for (at, p) in model.params_mut()[entry.range.clone()].iter_mut().enumerate() {
            // Rows of unlike size: neurons differ in what they give.
            let row = 0.2 + 0.05 * (at / HIDDEN % 24) as f32;
            *p = if is_norm { 1.0 + 0.1 * rng.normal() } else { row * rng.normal() };
        }
    }
    let out = dir.join("dense");
    std::fs::create_dir_all(&out).unwrap();
    model.save(&out, Dtype::F32).unwrap();
    out
}

fn text(seed: u64) -> Vec<Vec<u32>> {
    let mut rng = Rng::new(seed, 3);
    let mut sequence = || (0..SEQ).map(|_| rng.below(VOCAB as u64) as u32).collect();
    (0..SEQUENCES).map(|_| sequence()).collect()
}

fn options(active: f64) -> Start {
    let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(EXPERTS) };
    let settings = StartSettings {
        core_first: 0.5,
        widths: Widths::Uniform,
        massive: 2,
        budgets: Some(vec![0.5, 0.75, 1.0]),
        elastic: false,
        ..StartSettings::default()
    };
    Start { sequences: text(1), active, router, settings, seed: 3, force: true }
}

fn made(model: &Path, options: &Start) -> (PathBuf, Started) {
    let out = model.with_file_name("out");
    let started = start(model, &out, options, &mut quiet).unwrap();
    (out, started)
}

/// The inputs and outputs of the first layer's FFN in f64, one row per token.
struct Seen {
    x: Vec<Vec<f64>>,
    neurons: Vec<Vec<f64>>,
    residual: Vec<Vec<f64>>,
}

fn seen(model: &Path, sequences: &[Vec<u32>]) -> Seen {
    let mut stream = LayerStream::open(model, sequences).unwrap();
    let weights = stream.layer(0).unwrap();
    let mut seen = Seen { x: Vec::new(), neurons: Vec::new(), residual: Vec::new() };
    let rows = |values: &[f32], width: usize| values.chunks(width).map(f64s).collect::<Vec<_>>();
    stream
        .forward(&weights, &mut |tap| match tap.input {
            Input::Ffn => {
                seen.x.extend(rows(tap.x, HIDDEN));
                seen.residual.extend(rows(tap.residual, HIDDEN));
            }
            Input::Neurons => seen.neurons.extend(rows(tap.x, NEURONS)),
            Input::Attention | Input::Heads => {}
        })
        .unwrap();
    seen
}

fn tensor(dir: &Path, name: &str, len: usize) -> Vec<f64> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    f64s(&read(&checkpoint, &format!("model.layers.0.mlp.{name}"), len))
}

fn order(dir: &Path) -> Vec<usize> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let bytes = checkpoint.bytes("model.layers.0.mlp.partition").unwrap();
    bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()) as usize).collect()
}

fn is_fitted(t: usize) -> bool {
    !t.is_multiple_of(SEQ) && t / SEQ < FITTED
}

/// A ridge of a tenth at 16,384 tokens, of those that are fitted.
fn ridge() -> f64 {
    0.1 * 16_384.0 / (FITTED * (SEQ - 1)) as f64
}

/// Solves `(a + ridge mean(diagonal a)) x = b` for `b` `[n, columns]`; rows from `free` on have no ridge.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<Vec<f64>>, ridge: f64, free: usize) -> Vec<Vec<f64>> {
    let n = a.len();
    let mean = (0..free).map(|i| a[i][i]).sum::<f64>() / free as f64;
    (0..free).for_each(|i| a[i][i] += ridge * mean);
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[i][k].abs().total_cmp(&a[j][k].abs())).unwrap();
        a.swap(k, pivot);
        b.swap(k, pivot);
        for i in (0..n).filter(|&i| i != k) {
            let factor = a[i][k] / a[k][k];
            let (row, rhs) = (a[k].clone(), b[k].clone());
            a[i].iter_mut().zip(row).for_each(|(x, y)| *x -= factor * y);
            b[i].iter_mut().zip(rhs).for_each(|(x, y)| *x -= factor * y);
        }
    }
    (0..n).map(|k| b[k].iter().map(|x| x / a[k][k]).collect()).collect()
}

/// Inputs, outputs and the factor of a row.
type Row = (Vec<f64>, Vec<f64>, f64);

/// Least squares with an intercept: centred sums, weighted by the squares of `factors`.
fn regression(rows: &[Row], ridge: f64) -> (Vec<Vec<f64>>, Vec<f64>) {
    let (inputs, outputs) = (rows[0].0.len(), rows[0].1.len());
    let total: f64 = rows.iter().map(|(.., s)| s * s).sum();
    let mean = |of: &dyn Fn(&Row) -> f64| rows.iter().map(|row| row.2 * row.2 * of(row)).sum::<f64>() / total;
    let m: Vec<f64> = (0..inputs).map(|i| mean(&|row| row.0[i])).collect();
    let n: Vec<f64> = (0..outputs).map(|o| mean(&|row| row.1[o])).collect();
    let (mut a, mut b) = (vec![vec![0.0; inputs]; inputs], vec![vec![0.0; outputs]; inputs]);
    for (h, r, s) in rows {
        for i in 0..inputs {
            let left = s * s * (h[i] - m[i]);
            (0..inputs).for_each(|j| a[i][j] += left * (h[j] - m[j]));
            (0..outputs).for_each(|o| b[i][o] += left * (r[o] - n[o]));
        }
    }
    let weight = solve(a, b, ridge, inputs);
    let bias = (0..outputs).map(|o| n[o] - (0..inputs).map(|i| m[i] * weight[i][o]).sum::<f64>()).collect();
    (weight, bias)
}

#[test]
fn the_core_has_the_neurons_that_give_most() {
    let work = tempfile::tempdir().unwrap();
    let model = dense(work.path(), &json!({}));
    let options = options(0.75);
    let (out, _) = made(&model, &options);
    let config = Config::load(&out).unwrap();
    // Half of 0.75 of six experts, in whole experts.
    assert_eq!(config.moe.as_ref().unwrap().parts.core, [2, 2]);
    let (seen, down) =
        (seen(&model, &options.sequences), tensor(&model, "down_proj.weight", HIDDEN * NEURONS));
    let length = |j: usize| (0..HIDDEN).map(|o| down[o * NEURONS + j].powi(2)).sum::<f64>().sqrt();
    let size = |j: usize| {
        let rows = seen.neurons.iter().enumerate().filter(|(t, _)| !t.is_multiple_of(SEQ));
        let values: Vec<f64> = rows.map(|(_, row)| row[j]).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        values.iter().map(|value| (value - mean).powi(2)).sum::<f64>().sqrt() * length(j)
    };
    let first = |j: usize| {
        let rows = seen.neurons.iter().step_by(SEQ);
        rows.map(|row| row[j].abs()).fold(0.0, f64::max) * length(j)
    };
    let sorted = |of: &dyn Fn(usize) -> f64| {
        let mut all: Vec<usize> = (0..NEURONS).collect();
        all.sort_by(|&a, &b| of(b).total_cmp(&of(a)));
        all
    };
    let mut want: Vec<usize> = sorted(&first)[..2].to_vec();
    want.extend(sorted(&size).into_iter().filter(|j| !sorted(&first)[..2].contains(j)).take(2 * WIDTH - 2));
    let mut found = order(&out)[..2 * WIDTH].to_vec();
    want.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, want);
}

#[test]
fn routers_are_the_regression_of_what_experts_give() {
    let work = tempfile::tempdir().unwrap();
    let model = dense(work.path(), &json!({}));
    for target in [RouterTarget::LogNorm, RouterTarget::Norm, RouterTarget::Square] {
        let mut options = options(0.75);
        options.settings.target = target;
        let (out, started) = made(&model, &options);
        let (seen, order) = (seen(&model, &options.sequences), order(&out));
        let down = tensor(&model, "down_proj.weight", HIDDEN * NEURONS);
        let routed: Vec<&[usize]> = order[2 * WIDTH..].chunks(WIDTH).collect();
        let score = |row: &[f64], neurons: &[usize]| {
            let output = |o: usize| neurons.iter().map(|&j| down[o * NEURONS + j] * row[j]).sum::<f64>();
            let square: f64 = (0..HIDDEN).map(|o| output(o).powi(2)).sum();
            match target {
                RouterTarget::LogNorm => 0.5 * square.ln(),
                RouterTarget::Norm => square.sqrt(),
                RouterTarget::Square => square,
            }
        };
        let rows: Vec<(Vec<f64>, Vec<f64>, f64)> = (0..seen.x.len())
            .filter(|&t| is_fitted(t))
            .map(|t| (seen.x[t].clone(), routed.iter().map(|of| score(&seen.neurons[t], of)).collect(), 1.0))
            .collect();
        let (weight, bias) = regression(&rows, ridge());
        let logit = |x: &[f64], e: usize| (0..HIDDEN).map(|i| x[i] * weight[i][e]).sum::<f64>() + bias[e];
        let held: Vec<f64> = (0..seen.x.len())
            .filter(|t| t / SEQ >= FITTED && !t.is_multiple_of(SEQ))
            .flat_map(|t| (0..routed.len()).map(|e| logit(&seen.x[t], e)).collect::<Vec<_>>())
            .collect();
        let mean = held.iter().sum::<f64>() / held.len() as f64;
        let deviation = (held.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / held.len() as f64).sqrt();
        let scale = 2.0 / deviation;
        let want: Vec<f64> =
            (0..routed.len() * HIDDEN).map(|at| scale * weight[at % HIDDEN][at / HIDDEN]).collect();
        let found = tensor(&out, "router.weight", routed.len() * HIDDEN);
        let found: Vec<f32> = found.iter().map(|&w| w as f32).collect();
        assert_close(&format!("router, {target}"), &found, &want, 2e-4);
        // All budgets hold on the text that placed the thresholds.
        let moe = Config::load(&out).unwrap().moe.unwrap();
        assert_eq!(moe.parts.budgets.iter().map(|b| b.active).collect::<Vec<_>>(), [0.5, 0.75, 1.0]);
        assert_eq!(moe.parts.budgets[1].thresholds, [0.0, 0.0]);
        let biases = tensor(&out, "router.bias", routed.len());
        for budget in &moe.parts.budgets {
            let of_token = |t: usize| {
                let z = |e: usize| {
                    let row = &found[e * HIDDEN..][..HIDDEN];
                    row.iter().zip(&seen.x[t]).map(|(w, x)| f64::from(*w) * x).sum::<f64>() + biases[e]
                };
                (0..routed.len()).filter(|&e| z(e) > f64::from(budget.thresholds[0])).count()
            };
            let tokens: Vec<usize> =
                (0..seen.x.len()).filter(|t| t / SEQ >= FITTED && !t.is_multiple_of(SEQ)).collect();
            let open: usize = tokens.iter().map(|&t| of_token(t)).sum();
            let share = (2.0 + open as f64 / tokens.len() as f64) / EXPERTS as f64;
            assert!((share - budget.active).abs() < 0.005, "{share} of {}", budget.active);
        }
        assert!((started.active - 0.75).abs() < 0.05, "{}", started.active);
    }
}

#[test]
fn projections_are_the_least_squares_on_what_is_left() {
    let work = tempfile::tempdir().unwrap();
    let model = dense(work.path(), &json!({}));
    for (intercept, relative) in [(true, true), (false, false)] {
        let mut options = options(0.75);
        (options.settings.intercept, options.settings.relative) = (intercept, relative);
        let (out, started) = made(&model, &options);
        let (seen, order) = (seen(&model, &options.sequences), order(&out));
        let down = tensor(&model, "down_proj.weight", HIDDEN * NEURONS);
        let (router, biases) = (tensor(&out, "router.weight", 4 * HIDDEN), tensor(&out, "router.bias", 4));
        let open = |t: usize| {
            let mut row = seen.neurons[t].clone();
            for (e, neurons) in order[2 * WIDTH..].chunks(WIDTH).enumerate() {
                let dot = router[e * HIDDEN..][..HIDDEN].iter().zip(&seen.x[t]).map(|(w, x)| w * x);
                if dot.sum::<f64>() + biases[e] <= 0.0 {
                    neurons.iter().for_each(|&j| row[j] = 0.0);
                }
            }
            row
        };
        let rows: Vec<(Vec<f64>, Vec<f64>, f64)> = (0..seen.x.len())
            .filter(|&t| is_fitted(t))
            .map(|t| {
                let mut open = open(t);
                let lost = |o: usize| -> f64 {
                    (0..NEURONS).map(|j| down[o * NEURONS + j] * (seen.neurons[t][j] - open[j])).sum()
                };
                let norm = seen.residual[t].iter().map(|x| x * x).sum::<f64>().sqrt();
                let lost = (0..HIDDEN).map(lost).collect();
                // The massive neurons, the first of the core, keep their columns.
                order[..2].iter().for_each(|&j| open[j] = 0.0);
                (open, lost, if relative { 1.0 / norm } else { 1.0 })
            })
            .collect();
        let (weight, bias) = match intercept {
            true => regression(&rows, ridge()),
            false => {
                let (mut a, mut b) = (vec![vec![0.0; NEURONS]; NEURONS], vec![vec![0.0; HIDDEN]; NEURONS]);
                for (h, r, s) in &rows {
                    for i in 0..NEURONS {
                        (0..NEURONS).for_each(|j| a[i][j] += s * s * h[i] * h[j]);
                        (0..HIDDEN).for_each(|o| b[i][o] += s * s * h[i] * r[o]);
                    }
                }
                (solve(a, b, ridge(), NEURONS), Vec::new())
            }
        };
        let want: Vec<f64> = (0..HIDDEN * NEURONS)
            .map(|at| {
                let (o, j) = (at / NEURONS, order[at % NEURONS]);
                down[o * NEURONS + j] + weight[j][o]
            })
            .collect();
        let found: Vec<f32> =
            tensor(&out, "down_proj.weight", HIDDEN * NEURONS).iter().map(|&w| w as f32).collect();
        assert_close("down", &found, &want, 5e-4);
        let config = Config::load(&out).unwrap();
        assert_eq!(config.architecture.output_bias, intercept);
        if intercept {
            let found: Vec<f32> = tensor(&out, "output_bias", HIDDEN).iter().map(|&b| b as f32).collect();
            assert_close("bias", &found, &bias, 5e-4);
        }
        assert!(!config.moe.unwrap().untrained && started.errors[0] > 0.0 && started.errors[0] < 0.5);
    }
}

fn losses(dir: &Path, active: Option<f64>) -> (Vec<f32>, f64) {
    let mut model = Inference::load(dir, Precision::F32).unwrap();
    active.iter().for_each(|&active| model.set_active(active).unwrap());
    let inputs = text(9).concat();
    let (mut losses, mut stats) = (vec![0.0; inputs.len()], model.new_stats());
    let batch = Batch { inputs: &inputs, targets: &inputs, seq: SEQ };
    model.score(&mut losses, batch, stats.as_mut(), &mut Workspace::default()).unwrap();
    (losses, stats.map_or(1.0, |stats| stats.active_ratio()))
}

/// Without least squares the model is the dense one with its neurons in another order, in families with biases and with
/// norms after the FFN too.
#[test]
fn all_open_it_is_the_dense_model() {
    let keys = [
        json!({}),
        json!({"mlp_bias": true}),
        json!({"model_type": "gemma2", "query_pre_attn_scalar": 4, "sliding_window": 8}),
        json!({"model_type": "olmo2"}),
    ];
    for keys in keys {
        let work = tempfile::tempdir().unwrap();
        let model = dense(work.path(), &keys);
        let mut options = options(0.75);
        options.settings.least_squares = None;
        let (out, kept) = made(&model, &options);
        let (open, share) = losses(&out, Some(1.0));
        assert_eq!(share, 1.0, "{keys}");
        assert_close(&keys.to_string(), &open, &f64s(&losses(&model, None).0), 2e-5);
        assert!(Config::load(&out).unwrap().moe.unwrap().untrained);
        // With them the FFN's output is nearer, on text that was not fitted to.
        options.settings = StartSettings { least_squares: Some(0.1), ..options.settings };
        let (out, fitted) = made(&model, &options);
        let pairs = fitted.errors.iter().zip(&kept.errors);
        assert!(pairs.clone().all(|(after, before)| after < before), "{keys}: {pairs:?}");
        let config = Config::load(&out).unwrap();
        assert_eq!(config.architecture.output_bias, keys.get("mlp_bias").is_none());
    }
}

/// A layer that adds little gives its experts to the other one at every budget, and the cores keep their sum.
#[test]
fn layers_share_the_budgets_by_what_their_experts_add() {
    let work = tempfile::tempdir().unwrap();
    let model = dense(work.path(), &json!({}));
    let mut quieter = Model::load(&model).unwrap();
    let range = quieter.layout().get("model.layers.1.mlp.down_proj.weight").unwrap().range.clone();
    quieter.params_mut()[range].iter_mut().for_each(|w| *w *= 0.1);
    quieter.save(&model, Dtype::F32).unwrap();
    let mut options = options(0.5);
    options.router.num_experts = 12;
    let settings =
        StartSettings { widths: Widths::Kl, budgets: Some(vec![0.4, 0.75, 1.0]), ..options.settings };
    for (core, elastic) in [(0.5, false), (0.5, true), (0.0, false)] {
        options.settings = StartSettings { core, core_first: 1.0 / 3.0, elastic, ..settings.clone() };
        let (out, started) = made(&model, &options);
        let [loud, quiet] = started.shares[..] else { panic!("{:?}", started.shares) };
        assert!(loud > quiet + 0.1 && (loud + quiet - 1.0).abs() < 1e-9, "{loud} {quiet}");
        let moe = Config::load(&out).unwrap().moe.unwrap();
        assert_eq!(moe.parts.core.iter().sum::<usize>(), if core > 0.0 { 2 + 3 } else { 0 });
        // On the text that placed the thresholds every budget holds, mean over layers.
        for budget in &moe.parts.budgets {
            let mut model = Inference::load(&out, Precision::F32).unwrap();
            model.set_active(budget.active).unwrap();
            let inputs = options.sequences[FITTED..].concat();
            let (mut losses, mut stats) = (vec![0.0; inputs.len()], model.new_stats());
            let batch = Batch { inputs: &inputs, targets: &inputs, seq: SEQ };
            model.score(&mut losses, batch, stats.as_mut(), &mut Workspace::default()).unwrap();
            let share = stats.unwrap().active_ratio();
            let is_own = budget.active == 0.5;
            let bound = if is_own { 0.012 } else { 0.05 };
            assert!((share - budget.active).abs() < bound, "{share} of {}", budget.active);
            assert!(!is_own || (share - started.active).abs() < 1e-3, "{share} {}", started.active);
        }
    }
}

#[test]
fn parts_are_switched_off_one_by_one() {
    let work = tempfile::tempdir().unwrap();
    let model = dense(work.path(), &json!({}));
    let mut no_core = options(0.75);
    no_core.settings.core = 0.0;
    let (out, _) = made(&model, &no_core);
    let text = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(!text.contains("\"core\""));
    let mut none = options(0.75);
    none.settings.budgets = Some(Vec::new());
    let (out, _) = made(&model, &none);
    assert_eq!(Config::load(&out).unwrap().moe.unwrap().parts.budgets.len(), 1);
    // A core that takes the whole budget leaves no routed expert to run.
    let mut all = options(0.5);
    all.settings = StartSettings { core: 1.0, core_first: 1.0, budgets: Some(vec![0.75]), ..all.settings };
    refused(start(&model, &work.path().join("none"), &all, &mut quiet), &["not above the share of the core"]);
}

#[test]
fn what_cannot_be_started_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let model = dense(work.path(), &json!({}));
    let good = options(0.75);
    let with = |change: &dyn Fn(&mut Start)| {
        let mut options = good.clone();
        change(&mut options);
        options
    };
    let cases: [(Start, &[&str]); 9] = [
        (with(&|o| o.sequences.truncate(3)), &["120 tokens are too few", "256"]),
        (with(&|o| o.sequences[2].truncate(8)), &["sequence 2 has 8 tokens"]),
        (with(&|o| o.active = 1.5), &["active share of 1.5"]),
        (with(&|o| o.router.num_experts = 5), &["not divisible by 5"]),
        (with(&|o| o.router.gate_value = GateValue::Sigmoid), &["gates are sigmoid", "use binary"]),
        (with(&|o| o.router.rescale = Rescale::Eq8), &["rescale eq8"]),
        (with(&|o| o.settings.core = -1.0), &["a core of -1"]),
        (with(&|o| o.settings.least_squares = Some(0.0)), &["a ridge of 0"]),
        (
            with(&|o| o.settings.budgets = Some(vec![0.2])),
            &["a budget of 0.2 is not above the share of the core"],
        ),
    ];
    let out = work.path().join("none");
    for (options, says) in cases {
        refused(start(&model, &out, &options, &mut quiet), says);
    }
    assert!(!out.exists());
    let (made, _) = made(&model, &good);
    refused(start(&made, &out, &good, &mut quiet), &["experts"]);
}
