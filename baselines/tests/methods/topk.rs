//! LLaMA-MoE and MoEfication from a dense directory to one that trains, saves, loads and answers.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::llama_moe::export;
use dsmoe_baselines::topk::EXPERTS_FILE;
use dsmoe_baselines::{Budget, Job, Made, Plan, Result};
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::masks::Masks;
use dsmoe_core::model::{Batch, Cache, StepArgs, TrainWorkspace, Workspace};
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::SparsityOver;

use crate::configured;

const VOCAB: u32 = 40;
const SEQ: usize = 24;

/// A dense model of two layers of 96 neurons.
fn dense(dir: &Path) -> PathBuf {
    dsmoe_baselines::register();
    let text = preset("tiny").unwrap().to_json();
    let text = ["\"vocab_size\": 2048", "\"intermediate_size\": 512", "\"num_hidden_layers\": 4"]
        .into_iter()
        .zip(["\"vocab_size\": 40", "\"intermediate_size\": 96", "\"num_hidden_layers\": 2"])
        .fold(text, |text, (from, to)| text.replace(from, to));
    let config = Config::from_json(Path::new("config.json"), &text).unwrap();
    let out = dir.join("dense");
    init(&config, &out, &InitOptions { seed: 3, ..InitOptions::default() }, &mut |_| {}).unwrap();
    out
}

fn sequences(count: usize) -> Vec<Vec<u32>> {
    let mut rng = Rng::new(8, 0);
    (0..count).map(|_| (0..SEQ).map(|_| rng.below(u64::from(VOCAB)) as u32).collect()).collect()
}

fn run(name: &str, model: &Path, out: &Path, budget: &str, set: &[&str]) -> Result<Made> {
    run_on(name, model, out, budget, set, &sequences(16))
}

fn run_on(
    name: &str,
    model: &Path,
    out: &Path,
    budget: &str,
    set: &[&str],
    calibration: &[Vec<u32>],
) -> Result<Made> {
    let budget = budget.parse()?;
    let job = Job { model, out, force: false, budget, calibration, seed: 5 };
    configured(name, set)?.run(&job, &mut |_| {})
}

fn plan(name: &str, shape: &str, budget: &str, set: &[&str]) -> Result<Plan> {
    configured(name, set)?.plan(&preset(shape)?, budget.parse::<Budget>()?)
}

fn logits_of(model: &Inference) -> Vec<f32> {
    let ids = &sequences(1)[0];
    let mut cache = Cache::new(model, SEQ);
    let mut workspace = Workspace::default();
    model.logits(ids, SEQ, &mut cache, None, &mut workspace).unwrap().to_vec()
}

fn logits(dir: &Path) -> Vec<f32> {
    logits_of(&Inference::load(dir, Precision::F32).unwrap())
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("model.safetensors")).unwrap()
}

/// Every way of making experts of both methods.
const WAYS: [(&str, &[&str]); 8] = [
    ("llama-moe", &[]),
    ("llama-moe", &["construction=clustering", "experts=4", "scale=n"]),
    ("llama-moe", &["construction=sharing-inner", "gate=linear", "noise=false"]),
    ("llama-moe", &["construction=sharing-inter", "residual=2"]),
    ("moefication", &["experts=8", "epochs=3"]),
    ("moefication", &["experts=12", "rows=up", "score=l1", "epochs=0"]),
    ("moefication", &["experts=8", "split=co-activation", "epochs=3"]),
    ("random-k", &[]),
];

#[test]
fn what_is_made_loads_answers_and_is_a_function_of_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    for (i, (name, set)) in WAYS.into_iter().enumerate() {
        let out = [0, 1].map(|run| dir.path().join(format!("out-{i}-{run}")));
        let made = out.each_ref().map(|out| run(name, &model, out, "0.8", set).unwrap());
        assert_eq!(made[0], made[1], "{name} {set:?}");
        assert_eq!(weights(&out[0]), weights(&out[1]), "{name} {set:?}");
        assert!((made[0].plan.activated / (0.8 * Config::load(&model).unwrap().total()) - 1.0).abs() < 0.06);

        // Save, load and forward: the same bits by either way into memory.
        let loaded = Model::load(&out[0]).unwrap();
        let saved = dir.path().join(format!("saved-{i}"));
        fs::create_dir(&saved).unwrap();
        loaded.save(&saved, Dtype::F32).unwrap();
        assert_eq!(
            fs::read(saved.join("config.json")).unwrap(),
            fs::read(out[0].join("config.json")).unwrap()
        );
        let want = logits(&out[0]);
        assert!(want.iter().all(|x| x.is_finite()));
        assert_eq!(logits_of(&Inference::new(&loaded, Precision::F32)), want, "{name} {set:?}");
        assert_eq!(logits(&saved), want, "{name} {set:?}");
    }
}

trait Total {
    fn total(&self) -> f64;
}

impl Total for Config {
    fn total(&self) -> f64 {
        dsmoe_core::accounting::Accounting::of(self).total as f64
    }
}

fn assert_same(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    assert!(largest > 0.0);
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-5 * largest, "{what}: {got} {want}");
    }
}

#[test]
fn all_experts_are_the_dense_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    let want = logits(&model);
    for (name, set) in [
        ("moefication", &["experts=8", "epochs=1"][..]),
        ("moefication", &["experts=8", "epochs=1", "split=co-activation"]),
        // A linear gate starts at zero: even scores, which scale n makes whole.
        ("llama-moe", &["gate=linear", "scale=n"]),
        ("llama-moe", &["gate=linear", "scale=n", "construction=clustering"]),
        ("llama-moe", &["gate=linear", "scale=n", "construction=sharing-inter"]),
        ("random-k", &["scale=n"]),
    ] {
        let out = dir.path().join("all");
        let made = run(name, &model, &out, "1.0", set).unwrap();
        assert!(made.plan.reached_by.starts_with("8 of 8 experts"), "{made:?}");
        assert_same(&logits(&out), &want, &format!("{name} {set:?}"));
        fs::remove_dir_all(&out).unwrap();
    }
}

/// The experts of one method are a partition for another.
#[test]
fn the_experts_file_is_a_partition_to_convert_by() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    let (out, converted) = (dir.path().join("out"), dir.path().join("converted"));
    run("llama-moe", &model, &out, "0.8", &["construction=clustering"]).unwrap();
    let options =
        ConvertOptions { partition: PartitionSpec::File(out.join(EXPERTS_FILE)), ..ConvertOptions::new(8) };
    convert(&model, &converted, &options, &mut |_| {}).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let [ours, theirs] =
        [&out, &converted].map(|dir| Checkpoint::open(dir).unwrap().bytes(name).unwrap().to_vec());
    assert_eq!(ours, theirs);
}

#[test]
fn training_moves_every_part_of_the_gate_and_the_loss_goes_down() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dense(dir.path()), dir.path().join("out"));
    run("llama-moe", &source, &out, "0.8", &[]).unwrap();
    let mut model = Model::load(&out).unwrap();
    let ids = sequences(4).concat();
    let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
    let step = |model: &Model, seed: u64, workspace: &mut TrainWorkspace| {
        let args = StepArgs {
            loss_scale: 1.0 / inputs.len() as f32,
            sparsity_weight: 0.0,
            sparsity_over: SparsityOver::Active,
            balance_scale: 1.0,
            seed,
        };
        let mut grads = Buf::zeros(model.layout().len());
        let output = model
            .train_step(&mut grads, Batch { inputs, targets, seq: inputs.len() }, &args, workspace)
            .unwrap();
        (grads, output.loss_sum / inputs.len() as f64, output.balance_loss)
    };
    let (grads, first, balance) = step(&model, 1, &mut workspace);
    assert!(balance > 0.0);
    for entry in model.layout().entries().iter().filter(|entry| entry.spec.name.contains(".mlp.")) {
        assert!(grads[entry.range.clone()].iter().any(|&g| g != 0.0), "{}", entry.spec.name);
    }
    let (again, _, _) = step(&model, 1, &mut workspace);
    assert_eq!(grads[..], again[..]);
    let (other, _, _) = step(&model, 2, &mut workspace);
    assert_ne!(grads[..], other[..], "noise of another seed");
    for seed in 0..60 {
        let (grads, _, _) = step(&model, seed, &mut workspace);
        model.params_mut().iter_mut().zip(&grads[..]).for_each(|(p, g)| *p -= 0.5 * g);
    }
    let (_, last, _) = step(&model, 21, &mut workspace);
    assert!(last < 0.95 * first, "{first} to {last}");
}

#[test]
fn budgets_of_the_published_shapes() {
    let exact = |name, shape, budget, set: &[&str], reached: &str, activated: f64| {
        let plan = plan(name, shape, budget, set).unwrap();
        assert_eq!((&plan.reached_by[..], plan.activated), (reached, activated), "{name} {shape} {budget}");
        plan.total
    };
    // non_ffn + L ffn_layer k/n + L (d n + n n)
    let total = exact("llama-moe", "llama-3.2-1b", "735M", &[], "3 of 8 experts", 732_497_920.0 + 263_168.0);
    assert_eq!(total, 1_235_814_400.0 + 263_168.0);
    let total =
        exact("llama-moe", "llama-2-7b", "3.93B", &[], "3 of 8 experts", 4_033_089_536.0 + 1_050_624.0);
    assert_eq!(total, 6_738_415_616.0 + 1_050_624.0);
    exact(
        "llama-moe",
        "llama-2-7b",
        "3.49B",
        &["experts=16"],
        "4 of 16 experts",
        3_492_024_320.0 + 2_105_344.0,
    );
    exact(
        "llama-moe",
        "llama-2-7b",
        "0.44",
        &["experts=16"],
        "2 of 16 experts",
        2_950_959_104.0 + 2_105_344.0,
    );
    exact("random-k", "llama-3.2-1b", "735M", &[], "3 of 8 experts", 732_497_920.0 + 262_144.0);
    exact("random-k", "llama-3.2-1b", "1.0", &[], "8 of 8 experts", 1_235_814_400.0 + 262_144.0);
    exact(
        "llama-moe",
        "llama-3.2-1b",
        "735M",
        &["construction=sharing-inter"],
        "3 of 8 experts, 1 of them always",
        732_497_920.0 + 16.0 * (2048.0 * 7.0 + 49.0),
    );
    exact(
        "moefication",
        "llama-3.2-1b",
        "735M",
        &[],
        "94 of 256 experts",
        430_508_032.0 + 94.0 * 3_145_728.0 + 9_437_184.0,
    );
}

#[test]
fn what_cannot_be_is_one_line_with_the_help() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    let out = dir.path().join("out");
    let tell = |result: Result<Made>, parts: &[&str]| {
        let error = result.expect_err(parts[0]).to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}");
        assert!(!out.exists(), "{error}");
    };
    tell(run("llama-moe", &model, &out, "0.8", &["experts=7"]), &["96 is not divisible by 7", "use one of"]);
    tell(run("llama-moe", &model, &out, "0.8", &["experts=0"]), &["not divisible by 0"]);
    tell(run("llama-moe", &model, &out, "12M", &[]), &["is above 8 of 8 experts", "use "]);
    tell(run("llama-moe", &model, &out, "1k", &[]), &["is below 1 of 8 experts", "use "]);
    tell(
        run("llama-moe", &model, &out, "0.8", &["gate=deep"]),
        &["gate: cannot be \"deep\"", "mlp or linear"],
    );
    tell(
        run("llama-moe", &model, &out, "0.8", &["construction=graph"]),
        &["construction", "random, clustering"],
    );
    tell(
        run("llama-moe", &model, &out, "0.8", &["residual=1"]),
        &["residual: cannot be 1", "only with sharing-inter"],
    );
    for residual in ["0", "8"] {
        let set = ["construction=sharing-inter", &format!("residual={residual}")];
        tell(
            run("llama-moe", &model, &out, "0.8", &set),
            &[&format!("residual: cannot be {residual}"), "1 to experts - 1"],
        );
    }
    for (set, parts) in [
        ("scale=2", ["scale: cannot be 2", "n/k, or n"]),
        ("noise=1", ["noise: cannot be 1", "true or false"]),
        ("balance=-1", ["balance: cannot be -1", "0 or a positive"]),
        ("balance=NaN", ["balance: cannot be \"NaN\"", "0 or a positive"]),
    ] {
        tell(run("llama-moe", &model, &out, "0.8", &[set]), &parts);
    }
    let inner = ["construction=sharing-inner"];
    let few = &sequences(7);
    tell(
        run_on("llama-moe", &model, &out, "0.8", &inner, few),
        &["7 sequences are too few", "give 8 or more"],
    );
    let mut uneven = sequences(8);
    uneven[3].pop();
    tell(run_on("llama-moe", &model, &out, "0.8", &inner, &uneven), &["sequence 3 has 23 tokens"]);
    let single = vec![vec![1]; 8];
    tell(run_on("llama-moe", &model, &out, "0.8", &inner, &single), &["sequence 0 has 1 tokens"]);
    let foreign = vec![vec![VOCAB; SEQ]; 16];
    tell(run_on("llama-moe", &model, &out, "0.8", &inner, &foreign), &["token id 40", "vocab"]);
    tell(run_on("moefication", &model, &out, "0.8", &[], &foreign), &["token id 40", "vocab"]);
    tell(
        run_on("moefication", &model, &out, "0.8", &[], &sequences(2)),
        &["48 tokens are too few", "give 256"],
    );
    tell(run_on("moefication", &model, &out, "0.8", &[], &[]), &["0 sequences are too few"]);
    tell(run("moefication", &model, &out, "0.8", &["score=l3"]), &["score: cannot be \"l3\"", "l1, l2"]);
    tell(
        run("moefication", &model, &out, "0.8", &["split=metis"]),
        &["split: cannot be \"metis\"", "co-activation"],
    );
    tell(
        run("moefication", &model, &out, "0.8", &["rows=down"]),
        &["rows: cannot be \"down\"", "gate or up"],
    );
    tell(run("moefication", &model, &out, "0.8", &["epochs=1001"]), &["epochs: cannot be 1001"]);

    let pruned = dense(&dir.path().join("pruned"));
    let mut masks = Masks::new();
    masks.insert("model.layers.0.mlp.up_proj.weight".to_owned(), 96, 128, |_, _| true);
    masks.save(&pruned).unwrap();
    tell(run("llama-moe", &pruned, &out, "0.8", &[]), &["has pruned weights", "name a dense model"]);

    let made = dir.path().join("made");
    run("llama-moe", &model, &made, "0.8", &[]).unwrap();
    tell(run("moefication", &made, &out, "0.8", &[]), &["experts already", "name a dense model"]);
    let text = fs::read_to_string(made.join("config.json")).unwrap();
    for (from, to, part) in [
        ("\"num_experts\": 8", "\"num_experts\": 5", "do not divide"),
        ("\"num_experts\": 8", "\"num_experts\": 18446744073709551615", "more than the 96 neurons"),
        ("\"num_residual\": 0", "\"num_residual\": 18446744073709551615", "more than the 96 neurons"),
        ("\"num_experts\": 8", "\"num_experts\": 1", "top_k"),
        ("\"gate\": \"mlp\"", "\"gate\": \"deep\"", "not of type topk"),
        ("\"noise\": true", "\"noise\": true, \"extra\": 1", "not of type topk"),
        ("\"balance_weight\": 0.01", "\"balance_weight\": -1", "balance_weight is -1"),
        ("\"score_scale\"", "\"score_scale\": 0, \"x\"", "not of type topk"),
        ("\"type\": \"topk\"", "\"type\": \"topl\"", "topl"),
    ] {
        assert!(text.contains(from), "{from}");
        let broken = text.replace(from, to);
        let error = Config::from_json(Path::new("config.json"), &broken).expect_err(to).to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{to}: {error}");
    }
}

#[test]
fn llama_moe_layout_holds_every_value_once() {
    let dir = tempfile::tempdir().unwrap();
    let (model, made, out) = (dense(dir.path()), dir.path().join("made"), dir.path().join("out"));
    let plan = run("llama-moe", &model, &made, "0.8", &["construction=clustering"]).unwrap().plan;
    let report = export(&made, &out, None, false, &mut |_| {}).unwrap();
    let (ours, theirs) = (Checkpoint::open(&made).unwrap(), Checkpoint::open(&out).unwrap());
    assert_eq!(report.tensors, theirs.names().count());
    let read = |checkpoint: &Checkpoint, name: &str| {
        let mut values = vec![0.0; checkpoint.tensor(name).unwrap_or_else(|| panic!("{name}")).numel()];
        checkpoint.read_f32(name, &mut values).unwrap();
        values
    };
    let mlp = "model.layers.1.mlp";
    for (whole, part) in [("gate_proj", "weight_gate"), ("up_proj", "weight_up")] {
        let parts = (0..8).flat_map(|e| read(&theirs, &format!("{mlp}.calculator.experts.{part}.{e}")));
        assert_eq!(parts.collect::<Vec<_>>(), read(&ours, &format!("{mlp}.{whole}.weight")));
    }
    let down = read(&ours, &format!("{mlp}.down_proj.weight"));
    for e in 0..8 {
        let name = format!("{mlp}.calculator.experts.weight_down.{e}");
        assert_eq!(theirs.tensor(&name).unwrap().shape, [128, 12]);
        for (row, part) in read(&theirs, &name).chunks_exact(12).enumerate() {
            assert_eq!(part, &down[row * 96 + e * 12..][..12]);
        }
    }
    for name in ["gate.gate_network.0.weight", "gate.gate_network.2.weight", "gate.weight_noise.weight"] {
        let name = format!("{mlp}.{name}");
        assert_eq!(read(&theirs, &name), read(&ours, &name));
    }
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    let selects = format!("\"num_selects\": {}", plan.reached_by.split(' ').next().unwrap());
    for part in ["\"llama_moe\"", "\"num_experts\": 8", &selects, "\"gate_network\": \"mlp\""] {
        assert!(config.contains(part), "{part}: {config}");
    }
    assert!(!config.contains("\"ffn\""));

    for (name, set, part) in [
        ("moefication", &["experts=8", "epochs=0"][..], "ffn.normalize"),
        ("llama-moe", &["construction=sharing-inter"], "ffn.num_residual"),
    ] {
        let (made, out) = (dir.path().join(part), dir.path().join("none"));
        run(name, &model, &made, "0.8", set).unwrap();
        let error = export(&made, &out, None, false, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(part) && !out.exists(), "{error}");
    }
    let error = export(&model, &dir.path().join("none"), None, false, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("is not topk"), "{error}");
}
