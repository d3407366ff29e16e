//! Parts beside the experts: a core, routers of low rank, a correction, thresholds by budget.

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::ffn::{
    DsmoeFfn, DsmoeForm, Ffn, FfnBackward, FfnForward, FfnInference, FfnScratch, GateTraining, Gated, Record,
    RouterBound, block_len,
};
use dsmoe_core::model::Batch;
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::{assert_close, f64s, normals, refused};
use dsmoe_router::{GateValue, RouterConfig, RoutingStats, SparsityGrad, SparsityOver};
use serde_json::{Value, json};

use super::{LAYERS, config_json, fill, read, tokens};
use crate::losses;

const EXPERTS: usize = 5;

/// A model with every part, with the keys of `changes`.
fn model(changes: &Value) -> Model {
    let mut json: Value = serde_json::from_str(&config_json(true)).unwrap();
    let mut moe = json!({"format_version": 2, "num_experts": EXPERTS, "threshold": 0.5, "partition": "contiguous",
        "router_bias": true, "core": [1, 2, 0], "router_rank": 3, "correction": true, "active_target": 0.6,
        "budgets": [{"active": 0.3, "thresholds": [0.6, 0.9, 0.7]}, {"active": 0.6, "thresholds": [0.0, 0.2, 0.1]},
            {"active": 1.0, "thresholds": [-90.0, -90.0, -90.0]}],
        "gate_value": "binary", "rescale": "none", "zero_active": "skip", "ste": true});
    moe.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    json["model_type"] = json!("dsmoe");
    json["dsmoe"] = moe;
    let mut model = Model::new(read(&json.to_string()).unwrap());
    fill(&mut model, 3);
    model
}

/// Losses of 60 tokens, and the share of experts that ran.
fn run(model: &Inference) -> (Vec<f32>, f64) {
    let (losses, stats) = counted(model);
    (losses, stats.active_ratio())
}

fn of_first_layer(model: &Inference) -> f64 {
    counted(model).1.summary().active_ratio_per_layer[0]
}

fn counted(model: &Inference) -> (Vec<f32>, RoutingStats) {
    let ids = tokens(60, 5);
    let mut stats = model.new_stats().unwrap();
    let losses = losses(model, Batch { inputs: &ids, targets: &ids, seq: 20 }, Some(&mut stats));
    (losses, stats)
}

#[test]
fn a_model_with_parts_is_saved_and_loaded() {
    let work = tempfile::tempdir().unwrap();
    let model = model(&json!({}));
    let shapes: Vec<(&str, Vec<usize>)> = model
        .layout()
        .entries()
        .iter()
        .filter_map(|entry| {
            Some((entry.spec.name.strip_prefix("model.layers.1.mlp.")?, entry.spec.stored_shape()))
        })
        .skip(3)
        .collect();
    let want = [
        ("router.a.weight", vec![3, 16]),
        ("router.b.weight", vec![3, 3]),
        ("router.bias", vec![3]),
        ("correction.weight", vec![16, 3]),
    ];
    assert_eq!(shapes, want);
    model.save(work.path(), Dtype::F32).unwrap();
    let again = Model::load(work.path()).unwrap();
    assert!(again.params() == model.params());
    assert_eq!(again.config().moe, model.config().moe);
    let (of_model, of_dir) =
        (Inference::new(&model, Precision::F32), Inference::load(work.path(), Precision::F32));
    assert_eq!(run(&of_model), run(&of_dir.unwrap()));
}

#[test]
fn budgets_choose_the_share_of_experts() {
    let mut model = model(&json!({}));
    let mut inference = Inference::new(&model, Precision::F32);
    let at = |inference: &mut Inference, active: f64| {
        inference.set_active(active).unwrap();
        assert_eq!(inference.config().moe.as_ref().unwrap().budget(), Some(active));
        run(inference)
    };
    let as_loaded = run(&inference);
    let shares = [0.3, 0.45, 0.6, 1.0].map(|active| at(&mut inference, active).1);
    assert!(shares.is_sorted_by(|a, b| a < b), "{shares:?}");
    assert_eq!(shares[3], 1.0);
    assert_eq!(at(&mut inference, 0.6), as_loaded);
    // The core runs in any case.
    inference.set_thresholds(&[f32::INFINITY; LAYERS]).unwrap();
    assert_eq!(run(&inference).1, 3.0 / (LAYERS * EXPERTS) as f64);
    for outside in [0.29, 1.01] {
        refused(inference.set_active(outside), &["outside of the model's budgets", "0.3 to 1"]);
    }
    // One threshold for all gates takes the place of the budgets.
    inference.set_threshold(0.0).unwrap();
    assert_eq!(run(&inference).1, 1.0);
    refused(inference.set_active(0.6), &["no budgets"]);

    // The choice is part of a saved model.
    model.set_active(0.45).unwrap();
    let work = tempfile::tempdir().unwrap();
    model.save(work.path(), Dtype::F32).unwrap();
    assert_eq!(run(&Inference::load(work.path(), Precision::F32).unwrap()).1, shares[1]);
    let mut budgets = model.config().moe.as_ref().unwrap().parts.budgets.clone();
    budgets.truncate(2);
    refused(model.set_budgets(budgets.clone(), 0.7), &["outside of the model's budgets"]);
    model.set_budgets(budgets, 0.3).unwrap();
    assert_eq!(run(&Inference::new(&model, Precision::F32)).1, shares[0]);

    let mut dense = Inference::new(&Model::new(super::config()), Precision::F32);
    refused(dense.set_active(0.5), &["no gates"]);
}

#[test]
fn exports_keep_the_parts_or_refuse() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    for (name, changes) in [("parts", json!({})), ("core", json!({"correction": false}))] {
        std::fs::create_dir(at(name)).unwrap();
        model(&changes).save(&at(name), Dtype::F32).unwrap();
    }
    let to = |from: &str, form: ExportAs, active: Option<f64>, fold: Option<Vec<Vec<f64>>>| {
        let options = ExportOptions { active, fold, force: true, ..ExportOptions::new(form) };
        export(&at(from), &at("out"), &options, &mut |_| {})
    };
    for form in [ExportAs::Native, ExportAs::Transformers] {
        to("parts", form, Some(0.3), None).unwrap();
        let mut chosen = Inference::load(&at("parts"), Precision::F32).unwrap();
        chosen.set_active(0.3).unwrap();
        assert_eq!(run(&Inference::load(&at("out"), Precision::F32).unwrap()), run(&chosen));
    }
    refused(to("parts", ExportAs::Native, Some(0.2), None), &["outside of the model's budgets"]);
    refused(to("core", ExportAs::Dense, None, None), &["was fitted or trained with gates"]);
    refused(to("core", ExportAs::Dense, Some(0.6), None), &["a dense export has no gates"]);
    let ones = vec![vec![1.0; EXPERTS]; LAYERS];
    refused(to("parts", ExportAs::Dense, None, Some(ones.clone())), &["dsmoe.correction is true", "hf"]);
    to("core", ExportAs::Dense, None, Some(ones)).unwrap();
    let folded = Model::load(&at("out")).unwrap();
    let source = Model::load(&at("core")).unwrap();
    for entry in folded.layout().entries() {
        let before = source.layout().get(&entry.spec.name).unwrap().range.clone();
        assert!(folded.params()[entry.range.clone()] == source.params()[before], "{}", entry.spec.name);
    }
}

/// A pass of an FFN: output, its gradients, and the share of experts.
struct Pass {
    y: Vec<f32>,
    dx: Vec<f32>,
    grads: Buf,
    mean_gate: f64,
    share: f64,
}

fn pass(ffn: &DsmoeFfn, params: &[f32], x: &[f32], dy: &[f32], weight: f32) -> Pass {
    let tokens = x.len() / 16;
    let (mut scratch, mut saved) = (FfnScratch::default(), ffn.new_saved(tokens));
    let (mut y, mut dx) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
    let mut stats = RoutingStats::new(1, ffn.num_experts().unwrap());
    let training = GateTraining::default();
    let report = ffn.forward_train(FfnForward {
        y: &mut y,
        saved: saved.as_mut(),
        x,
        params,
        training,
        record: Some(Record { stats: &mut stats, layer: 0 }),
        scratch: &mut scratch,
    });
    let mut grads = Buf::zeros(params.len());
    ffn.backward(FfnBackward {
        dx: &mut dx,
        grads: &mut grads,
        dy,
        saved: saved.as_mut(),
        x,
        params,
        sparsity: SparsityGrad { weight, over: SparsityOver::All },
        training,
        scratch: &mut scratch,
    });
    let mut packed = vec![f32::NAN; x.len()];
    let args = FfnInference { y: &mut packed, x, record: None, scratch: &mut scratch };
    ffn.pack(params, Precision::F32).forward(args);
    assert_close("packed", &packed, &f64s(&y), 2e-6);
    Pass { y, dx, grads, mean_gate: report.mean_gate, share: stats.active_ratio() }
}

/// A core is what experts with gates at 1 are, in value and in the straight-through rule; the loss of gates is a mean
/// over those that are left.
#[test]
fn a_core_is_experts_whose_gates_are_always_open() {
    let (hidden, intermediate, n, core, tokens) = (16, 40, 5, 2, 33);
    let router = RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(n) };
    let gated = Gated::silu(hidden, intermediate);
    let plain = DsmoeFfn::of(gated, DsmoeForm::new(router.clone(), true));
    let behind = DsmoeFfn::of(gated, DsmoeForm { core, ..DsmoeForm::new(router, true) });
    let projections = gated.len();
    let mut params = Buf::zeros(block_len(&behind.tensors()));
    let values = normals(params.len(), 2);
    params.copy_from_slice(&values);
    let [weight, bias] = [(n - core) * hidden, n - core];
    let mut opened = Buf::zeros(block_len(&plain.tensors()));
    opened[..projections].copy_from_slice(&params[..projections]);
    let rows = &params[projections..][..weight];
    opened[projections + core * hidden..][..weight].copy_from_slice(rows);
    let of_bias = |n: usize| projections + (n * hidden).next_multiple_of(16);
    opened[of_bias(n)..][..core].fill(100.0);
    opened[of_bias(n) + core..][..bias].copy_from_slice(&params[of_bias(n - core)..][..bias]);
    let (x, dy) = (normals(tokens * hidden, 4), normals(tokens * hidden, 5));
    let gates = n as f32 / (n - core) as f32;
    let (want, got) = (pass(&plain, &opened, &x, &dy, 0.3 * gates), pass(&behind, &params, &x, &dy, 0.3));
    assert_close("y", &got.y, &f64s(&want.y), 2e-6);
    assert_close("dx", &got.dx, &f64s(&want.dx), 2e-6);
    let projection = |grads: &Buf| grads[..projections].to_vec();
    assert_close("projections", &projection(&got.grads), &f64s(&projection(&want.grads)), 2e-6);
    let rows = f64s(&want.grads[projections + core * hidden..][..weight]);
    assert_close("router", &got.grads[projections..][..weight], &rows, 2e-6);
    let biases = f64s(&want.grads[of_bias(n) + core..][..bias]);
    assert_close("bias", &got.grads[of_bias(n - core)..][..bias], &biases, 2e-6);
    assert_eq!(got.share, want.share);
    assert!(got.share > core as f64 / n as f64 && got.share < 1.0);
    let of_all = (core as f64 + got.mean_gate * (n - core) as f64) / n as f64;
    assert!((want.mean_gate - of_all).abs() < 1e-6, "{} and {of_all}", want.mean_gate);
}

/// As many experts as the router opens, those whose outputs are largest, from outputs in loops over the experts.
#[test]
fn an_oracle_opens_the_largest_experts_and_chance_opens_as_many() {
    let (hidden, width, core, experts, tokens) = (8, 4, 2, 7, 12);
    let router =
        RouterConfig { gate_value: GateValue::Binary, threshold: 0.45, ..RouterConfig::new(experts) };
    let form = DsmoeForm { core, ..DsmoeForm::new(router, true) };
    let ffn = DsmoeFfn::of(Gated::silu(hidden, experts * width), form);
    let mut params = Buf::zeros(block_len(&ffn.tensors()));
    let values = normals(params.len(), 4);
    params.iter_mut().zip(values).for_each(|(p, v)| *p = 0.6 * v);
    let x = normals(tokens * hidden, 5);
    let infer = |bound: Option<RouterBound>| -> (Vec<f32>, Vec<usize>) {
        let mut packed = ffn.pack(&params, Precision::F32);
        assert!(bound.is_none_or(|bound| packed.set_router_bound(bound)));
        let (mut y, mut stats) = (vec![0.0; x.len()], RoutingStats::new(1, experts).traced());
        let record = Some(Record { stats: &mut stats, layer: 0 });
        let mut scratch = FfnScratch::default();
        packed.forward(FfnInference { y: &mut y, x: &x, record, scratch: &mut scratch });
        (y, stats.active_of_tokens().iter().map(|&open| open as usize).collect())
    };
    let (own, open) = infer(None);
    assert!(open.iter().any(|&k| k > core) && open.iter().any(|&k| k < experts), "{open:?}");

    // The output of each expert for each token.
    let matrix = hidden * experts * width;
    let (gate, up, down) = (&params[..matrix], &params[matrix..2 * matrix], &params[2 * matrix..3 * matrix]);
    let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
    let output = |t: usize, expert: usize| -> Vec<f64> {
        let (x, mut y) = (&x[t * hidden..][..hidden], vec![0.0; hidden]);
        for j in expert * width..(expert + 1) * width {
            let of = |w: &[f32]| dot(&w[j * hidden..][..hidden], x);
            let h = of(gate) / (1.0 + (-of(gate)).exp()) * of(up);
            y.iter_mut().zip(&down[j * hidden..]).for_each(|(y, &w)| *y += h * f64::from(w));
        }
        y
    };
    let mut want = Vec::new();
    for (t, &open) in open.iter().enumerate() {
        let outputs: Vec<Vec<f64>> = (0..experts).map(|expert| output(t, expert)).collect();
        let norm = |i: usize| outputs[i].iter().map(|y| y * y).sum::<f64>();
        let mut routed: Vec<usize> = (core..experts).collect();
        routed.sort_by(|&a, &b| norm(b).total_cmp(&norm(a)));
        let runs = (0..core).chain(routed.into_iter().take(open - core));
        let mut sum = vec![0.0; hidden];
        runs.for_each(|i| sum.iter_mut().zip(&outputs[i]).for_each(|(sum, y)| *sum += y));
        want.extend(sum);
    }
    let (oracle, of_oracle) = infer(Some(RouterBound::Oracle));
    assert_eq!(of_oracle, open);
    assert_close("oracle", &oracle, &want, 1e-5);
    let (random, of_random) = infer(Some(RouterBound::Random));
    assert_eq!(of_random, open);
    assert!(random != own && random != oracle);
    assert_eq!(infer(Some(RouterBound::Random)).0, random);

    let mut model = Inference::new(&model(&json!({})), Precision::F32);
    // The first layer's inputs are those of the model's own router. Later layers get other inputs, and open other numbers.
    let share = of_first_layer(&model);
    for bound in [RouterBound::Oracle, RouterBound::Random] {
        model.set_router_bound(bound).unwrap();
        assert_eq!(of_first_layer(&model), share);
    }
    let dense = Model::new(read(&config_json(true)).unwrap());
    refused(
        Inference::new(&dense, Precision::F32).set_router_bound(RouterBound::Oracle),
        &["no gates that another router"],
    );
}
