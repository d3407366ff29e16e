//! LLaMA-MoE and MoEfication from a dense directory to one that trains, saves, loads and answers.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_baselines::llama_moe::export;
use dsmoe_baselines::topk::EXPERTS_FILE;
use dsmoe_baselines::{Budget, Made, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert};
use dsmoe_core::init::preset;
use dsmoe_core::masks::Masks;
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use serde_json::json;

use super::common::{self, Run, VOCAB, configured, count, loaded, made, mean_loss, tiny, tokens, values};

const SEQ: usize = 24;

/// A dense model of two layers of 96 neurons.
fn dense(dir: &Path) -> PathBuf {
    dsmoe_baselines::register();
    let sizes = json!({"vocab_size": VOCAB, "intermediate_size": 96, "num_hidden_layers": 2});
    made(&tiny(&sizes), dir, Dtype::F32)
}

fn run(name: &str, model: &Path, out: &Path, share: f64, set: &[&str]) -> Result<Made> {
    Run::new(name, set, share, &tokens(16, SEQ)).run(model, out)
}

fn logits_of(model: &Inference) -> Vec<f32> {
    common::logits(model, &tokens(1, SEQ)[0])
}

fn logits(dir: &Path) -> Vec<f32> {
    logits_of(&loaded(dir))
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("model.safetensors")).unwrap()
}

/// Every way of making experts of both methods.
const WAYS: [(&str, &[&str]); 10] = [
    ("llama-moe", &[]),
    ("llama-moe", &["construction=clustering", "experts=4", "scale=n"]),
    ("llama-moe", &["construction=sharing-inner", "gate=linear", "noise=false"]),
    ("llama-moe", &["construction=sharing-inter", "residual=2"]),
    ("moefication", &["experts=8", "epochs=3"]),
    ("moefication", &["experts=12", "rows=up", "score=l1", "epochs=0"]),
    ("moefication", &["experts=8", "split=co-activation", "epochs=3"]),
    ("factorllm", &["epochs=3", "experts=8"]),
    (
        "factorllm",
        &["split=clustering", "label=subset", "target=share", "scaled=false", "experts=8", "epochs=2"],
    ),
    ("random-k", &[]),
];

#[test]
fn what_is_made_loads_answers_and_is_a_function_of_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    for (i, (name, set)) in WAYS.into_iter().enumerate() {
        let out = [0, 1].map(|run| dir.path().join(format!("out-{i}-{run}")));
        let made = out.each_ref().map(|out| run(name, &model, out, 0.8, set).unwrap());
        assert_eq!(made[0], made[1], "{name} {set:?}");
        assert_eq!(weights(&out[0]), weights(&out[1]), "{name} {set:?}");
        let total = Accounting::of(&Config::load(&model).unwrap()).total as f64;
        assert!((made[0].plan.activated / (0.8 * total) - 1.0).abs() < 0.06);

        // Save, load and forward: the same bits by either way into memory.
        let loaded = Model::load(&out[0]).unwrap();
        let saved = dir.path().join(format!("saved-{i}"));
        fs::create_dir(&saved).unwrap();
        loaded.save(&saved, Dtype::F32).unwrap();
        let [before, after] = [&out[0], &saved].map(|dir| fs::read(dir.join("config.json")).unwrap());
        assert_eq!(before, after, "{name} {set:?}");
        let want = logits(&out[0]);
        assert!(want.iter().all(|x| x.is_finite()));
        assert_eq!(logits_of(&Inference::new(&loaded, Precision::F32)), want, "{name} {set:?}");
        assert_eq!(logits(&saved), want, "{name} {set:?}");
    }
}

fn assert_same(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    assert!(largest > 0.0);
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-6 * largest, "{what}: {got} {want}");
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
        ("factorllm", &["experts=8", "epochs=1"]),
        ("factorllm", &["experts=8", "epochs=0", "split=random", "label=norm"]),
    ] {
        let out = dir.path().join("all");
        let made = run(name, &model, &out, 1.0, set).unwrap();
        assert!(made.plan.reached_by.starts_with("8 of 8 experts"), "{made:?}");
        assert_same(&logits(&out), &want, &format!("{name} {set:?}"));
        fs::remove_dir_all(&out).unwrap();
    }
}

/// A dense export with folded gates has the experts' neurons in their order, each expert's columns times its factor.
#[test]
fn folded_factors_scale_the_blocks_of_their_experts() {
    use dsmoe_core::export::{ExportAs, ExportOptions, export};

    let work = tempfile::tempdir().unwrap();
    let [model, out] = ["model", "out"].map(|name| work.path().join(name));
    let set = ["construction=sharing-inter", "residual=2"];
    run("llama-moe", &dense(&work.path().join("dense")), &model, 0.9, &set).unwrap();
    let experts = Config::load(&model).unwrap().num_experts().unwrap();
    let factor = |layer: usize, expert: usize| (1 + layer * experts + expert) as f32 / 4.0;
    let fold = (0..2).map(|layer| (0..experts).map(|i| f64::from(factor(layer, i))).collect()).collect();
    let options = ExportOptions { fold: Some(fold), ..ExportOptions::new(ExportAs::Dense) };
    export(&model, &out, &options, &mut |_| {}).unwrap();
    let config = Config::load(&out).unwrap();
    assert!(config.is_dense() && config.model_type() == "llama");
    for layer in 0..2 {
        let of =
            |dir: &Path, which: &str| values(dir, &format!("model.layers.{layer}.mlp.{which}_proj.weight"));
        assert_eq!(of(&model, "gate"), of(&out, "gate"));
        assert_eq!(of(&model, "up"), of(&out, "up"));
        let width = config.intermediate / experts;
        let scaled = |(i, x): (usize, &f32)| x * factor(layer, i % config.intermediate / width);
        let want: Vec<f32> = of(&model, "down").iter().enumerate().map(scaled).collect();
        assert_eq!(of(&out, "down"), want, "layer {layer}");
    }
    assert!(logits(&out).iter().all(|z| z.is_finite()));
}

/// The experts of one method are a partition for another.
#[test]
fn the_experts_file_is_a_partition_to_convert_by() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    let (out, converted) = (dir.path().join("out"), dir.path().join("converted"));
    run("llama-moe", &model, &out, 0.8, &["construction=clustering"]).unwrap();
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
    run("llama-moe", &source, &out, 0.8, &[]).unwrap();
    let mut model = Model::load(&out).unwrap();
    let ids = tokens(4, SEQ).concat();
    let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
    let step = |model: &Model, seed: u64, workspace: &mut TrainWorkspace| {
        let args = StepArgs { loss_scale: 1.0 / inputs.len() as f32, seed, ..StepArgs::default() };
        let mut grads = Buf::zeros(model.layout().len());
        let batch = Batch { inputs, targets, seq: inputs.len() };
        let output = model.train_step(&mut grads, batch, &args, workspace).unwrap();
        (grads, output.loss_sum / inputs.len() as f64, output.balance_loss)
    };
    let (grads, first, balance) = step(&model, 1, &mut workspace);
    assert!(balance > 0.0);
    for entry in model.layout().entries().iter().filter(|entry| entry.spec.name.contains(".mlp.")) {
        assert!(grads[entry.range.clone()].iter().any(|&g| g != 0.0), "{}", entry.spec.name);
    }
    let (again, _, _) = step(&model, 1, &mut workspace);
    assert_eq!(grads[..], again[..]);
    let mut recomputing = TrainWorkspace::recomputing(&model, inputs.len(), Precision::F32);
    let (recomputed, ..) = step(&model, 1, &mut recomputing);
    assert_eq!(grads[..], recomputed[..]);
    let (other, _, _) = step(&model, 2, &mut workspace);
    assert_ne!(grads[..], other[..], "noise of another seed");
    for seed in 0..60 {
        let (grads, _, _) = step(&model, seed, &mut workspace);
        model.params_mut().iter_mut().zip(&grads[..]).for_each(|(p, g)| *p -= 0.5 * g);
    }
    let (_, last, _) = step(&model, 21, &mut workspace);
    assert!(last < 0.95 * first, "{first} to {last}");
}

/// The dense model with embeddings beside which attention and FFNs add little. A token then has nearly the same labels wherever it
/// stands, which a linear router can learn, since there are fewer tokens than features.
fn dense_by_token(dir: &Path) -> PathBuf {
    let mut model = Model::load(&dense(dir)).unwrap();
    let range = model.layout().get("model.embed_tokens.weight").unwrap().range.clone();
    model.params_mut()[range].iter_mut().for_each(|p| *p *= 50.0);
    common::saved(&model, &dir.join("by-token"), Dtype::F32)
}

#[test]
fn a_router_of_factorllm_learns_its_labels_and_training_leaves_it() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense_by_token(dir.path());
    let found = |made: &Made, name: &str| {
        let of = |layer: usize| format!("layer {layer}: {name}");
        let value = |layer| made.measured.iter().find(|(known, _)| *known == of(layer)).expect(name).1;
        (value(0) + value(1)) / 2.0
    };
    let taught = |out: &str, epochs: &str, set: &[&str]| {
        let set = [&["experts=8", "learning_rate=0.01", epochs][..], set].concat();
        Run::new("factorllm", &set, 0.8, &tokens(64, SEQ)).run(&model, &dir.path().join(out)).unwrap()
    };
    for (out, set) in [
        ("single", &["label=single"][..]),
        ("subset", &["label=subset"]),
        ("norm", &["label=norm", "target=share"]),
    ] {
        let (random, made) =
            (taught(&format!("{out}-random"), "epochs=0", set), taught(out, "epochs=20", set));
        let [before, after] = [&random, &made].map(|made| found(made, "share of labels found"));
        // Half of the experts are active.
        assert!(before < 0.65 && after > 0.85, "{out}: {before} to {after}");
        let errors = ["error of the labels", "error of the router", "error of random experts"];
        let [labels, router, chance] = errors.map(|name| found(&made, name));
        // The other labels do not look at the error of the sum, of which these are the least.
        if out == "subset" {
            let [above, range] = [router, chance].map(|error| error - labels);
            assert!(above > -1e-9 && above < 0.5 * range, "{out}: {labels} {router} {chance}");
        }
    }

    let mut model = Model::load(&dir.path().join("subset")).unwrap();
    let ids = tokens(4, SEQ).concat();
    let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
    let mut grads = Buf::zeros(model.layout().len());
    let args = StepArgs { loss_scale: 1.0 / inputs.len() as f32, ..StepArgs::default() };
    let batch = Batch { inputs, targets, seq: inputs.len() };
    model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
    for entry in model.layout().entries().iter().filter(|entry| entry.spec.name.contains(".mlp.")) {
        let is_still = grads[entry.range.clone()].iter().all(|&g| g == 0.0);
        assert_eq!(is_still, entry.spec.name.contains(".gate."), "{}", entry.spec.name);
    }
    assert_eq!(model.params_mut().len(), grads.len());
}

#[test]
fn budgets_of_the_published_shapes() {
    let (moe, one, seven) = ("llama-moe", "llama-3.2-1b", "llama-2-7b");
    let residual = &["construction=sharing-inter"][..];
    // non_ffn + L ffn_layer k/n + L (d n + n n)
    for (name, shape, budget, set, reached, rest, gates) in [
        (moe, one, "735M", &[][..], "3 of 8 experts", 732_497_920.0, 263_168.0),
        (moe, seven, "3.93B", &[], "3 of 8 experts", 4_033_089_536.0, 1_050_624.0),
        (moe, seven, "3.49B", &["experts=16"], "4 of 16 experts", 3_492_024_320.0, 2_105_344.0),
        (moe, seven, "0.44", &["experts=16"], "2 of 16 experts", 2_950_959_104.0, 2_105_344.0),
        ("random-k", one, "735M", &[], "3 of 8 experts", 732_497_920.0, 262_144.0),
        ("random-k", one, "1.0", &[], "8 of 8 experts", 1_235_814_400.0, 262_144.0),
        (moe, one, "735M", residual, "3 of 8 experts, 1 of them always", 732_497_920.0, 230_160.0),
        // 2 of 4: L (d n + n) with the bias.
        ("factorllm", one, "61%", &[], "2 of 4 experts", 833_161_216.0, 131_136.0),
        ("moefication", one, "735M", &[], "94 of 256 experts", 726_206_464.0, 9_437_184.0),
    ] {
        let (config, what) = (preset(shape).unwrap(), format!("{name} {shape} {budget}"));
        let plan = configured(name, set).unwrap().plan(&config, budget.parse().unwrap()).unwrap();
        assert_eq!((&plan.reached_by[..], plan.activated), (reached, rest + gates), "{what}");
        assert_eq!(plan.total, Accounting::of(&config).total as f64 + gates, "{what}");
    }
}

#[test]
fn what_cannot_be_is_one_line_with_the_help() {
    let dir = tempfile::tempdir().unwrap();
    let model = dense(dir.path());
    let out = dir.path().join("out");
    let calibration = tokens(16, SEQ);
    let fails = |run: Run<'_>, model: &Path, parts: &[&str]| {
        run.fails(model, &out, parts);
        assert!(!out.exists(), "{run:?}");
    };
    for (set, parts) in [
        (&["experts=7"][..], &["96 is not divisible by 7", "use one of"][..]),
        (&["experts=0"], &["not divisible by 0"]),
        (&["gate=deep"], &["gate: cannot be \"deep\"", "mlp or linear"]),
        (&["construction=graph"], &["construction", "random, clustering"]),
        (&["residual=1"], &["residual: cannot be 1", "only with sharing-inter"]),
        (&["construction=sharing-inter", "residual=0"], &["residual: cannot be 0", "1 to experts - 1"]),
        (&["construction=sharing-inter", "residual=8"], &["residual: cannot be 8", "1 to experts - 1"]),
        (&["scale=2"], &["scale: cannot be 2", "n/k, or n"]),
        (&["noise=1"], &["noise: cannot be 1", "true or false"]),
        (&["balance=-1"], &["balance: cannot be -1", "0 or a positive"]),
        (&["balance=NaN"], &["balance: cannot be \"NaN\"", "0 or a positive"]),
    ] {
        fails(Run::new("llama-moe", set, 0.8, &calibration), &model, parts);
    }
    for (set, parts) in [
        ("score=l3", &["score: cannot be \"l3\"", "l1, l2"][..]),
        ("split=metis", &["split: cannot be \"metis\"", "co-activation"]),
        ("rows=down", &["rows: cannot be \"down\"", "gate or up"]),
        ("epochs=1001", &["epochs: cannot be 1001"]),
    ] {
        fails(Run::new("moefication", &[set], 0.8, &calibration), &model, parts);
    }
    for (set, parts) in [
        (&["experts=65"][..], &["experts: cannot be 65", "2 to 64"][..]),
        (&["experts=7"], &["96 is not divisible by 7"]),
        (&["label=best"], &["label: cannot be \"best\"", "subset"]),
        (&["direction=both"], &["direction: cannot be \"both\"", "student"]),
        (&["learning_rate=0"], &["learning_rate: cannot be 0", "above 0"]),
        (&["epochs=1001"], &["epochs: cannot be 1001"]),
        (&["experts=48", "label=subset"], &["label: cannot be subset for", "more than 20000 subsets"]),
    ] {
        fails(Run::new("factorllm", set, 0.8, &calibration), &model, parts);
    }
    for (budget, part) in [("12M", "is above 8 of 8 experts"), ("1k", "is below 1 of 8 experts")] {
        let run = Run { budget: budget.parse().unwrap(), ..Run::new("llama-moe", &[], 0.8, &calibration) };
        fails(run, &model, &[part, "use "]);
    }
    let inner = &["construction=sharing-inner"][..];
    let mut uneven = tokens(8, SEQ);
    uneven[3].pop();
    let foreign = vec![vec![VOCAB as u32; SEQ]; 16];
    for (name, set, calibration, parts) in [
        ("llama-moe", inner, &tokens(7, SEQ), &["7 sequences are too few", "give 8 or more"][..]),
        ("llama-moe", inner, &uneven, &["sequence 3 has 23 tokens"]),
        ("llama-moe", inner, &vec![vec![1]; 8], &["sequence 0 has 1 tokens"]),
        ("llama-moe", inner, &foreign, &["token id 40", "vocab"]),
        ("moefication", &[], &foreign, &["token id 40", "vocab"]),
        ("moefication", &[], &tokens(2, SEQ), &["48 tokens are too few", "give 256"]),
        ("moefication", &[], &vec![], &["0 sequences are too few"]),
    ] {
        fails(Run::new(name, set, 0.8, calibration), &model, parts);
    }

    let pruned = dense(&dir.path().join("pruned"));
    let mut masks = Masks::new();
    masks.insert("model.layers.0.mlp.up_proj.weight".to_owned(), 96, 128, |_, _| true);
    masks.save(&pruned).unwrap();
    let run_of = |name| Run::new(name, &[], 0.8, &calibration);
    fails(run_of("llama-moe"), &pruned, &["has pruned weights", "use a dense model"]);

    let made = dir.path().join("made");
    run_of("llama-moe").run(&model, &made).unwrap();
    fails(run_of("moefication"), &made, &["experts or thresholds already", "use a dense model"]);
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
        ("\"gate\": \"mlp\"", "\"gate\": \"mlp\", \"gate_hidden\": 0", "gate_hidden is 0"),
        ("\"gate\": \"mlp\"", "\"gate\": \"linear\", \"gate_hidden\": 8", "gate_hidden is 8"),
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
    let plan = run("llama-moe", &model, &made, 0.8, &["construction=clustering"]).unwrap().plan;
    let report = export(&made, &out, None, false, &mut |_| {}).unwrap();
    let theirs = Checkpoint::open(&out).unwrap();
    assert_eq!(report.tensors, theirs.names().count());
    let mlp = "model.layers.1.mlp";
    for (whole, part) in [("gate_proj", "weight_gate"), ("up_proj", "weight_up")] {
        let parts = (0..8).flat_map(|e| values(&out, &format!("{mlp}.calculator.experts.{part}.{e}")));
        assert_eq!(parts.collect::<Vec<_>>(), values(&made, &format!("{mlp}.{whole}.weight")));
    }
    let down = values(&made, &format!("{mlp}.down_proj.weight"));
    for e in 0..8 {
        let name = format!("{mlp}.calculator.experts.weight_down.{e}");
        assert_eq!(theirs.tensor(&name).unwrap().shape, [128, 12]);
        for (row, part) in values(&out, &name).chunks_exact(12).enumerate() {
            assert_eq!(part, &down[row * 96 + e * 12..][..12]);
        }
    }
    for name in ["gate.gate_network.0.weight", "gate.gate_network.2.weight", "gate.weight_noise.weight"] {
        let name = format!("{mlp}.{name}");
        assert_eq!(values(&out, &name), values(&made, &name));
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
        run(name, &model, &made, 0.8, set).unwrap();
        let error = export(&made, &out, None, false, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(part) && !out.exists(), "{error}");
    }
    let error = export(&model, &dir.path().join("none"), None, false, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("is not topk"), "{error}");
}

/// CMoE's router is a neuron of each expert, and the model is what its files say.
#[test]
fn cmoe_routes_by_neurons_of_its_experts() {
    dsmoe_baselines::register();
    let work = tempfile::tempdir().unwrap();
    let source =
        made(&tiny(&json!({"vocab_size": VOCAB, "initializer_range": 0.3})), work.path(), Dtype::F32);
    let text = tokens(8, 40);
    let out = work.path().join("cmoe");
    let dense = count(&source);
    let config = Config::load(&source).unwrap();
    let ffn = (3 * config.hidden * config.intermediate * config.num_layers) as f64;
    let budget = Budget::Params(dense - 0.625 * ffn);
    let made = Run { budget, ..Run::new("cmoe", &["experts=8"], 1.0, &text) }.run(&source, &out).unwrap();
    assert_eq!(made.plan.reached_by, "3 of 8 experts, 1 of them always");
    let config = Config::load(&out).unwrap();
    assert_eq!(Accounting::of(&config).activated(0.0), made.plan.activated);
    assert_eq!(count(&out), made.plan.total);
    let hidden = config.hidden;
    for layer in 0..config.num_layers {
        let name = |tensor: &str| format!("model.layers.{layer}.mlp.{tensor}.weight");
        let [rows, router] =
            ["gate_proj", "gate.gate_network.gate"].map(|tensor| values(&out, &name(tensor)));
        let [ups, router_up] = ["up_proj", "gate.gate_network.up"].map(|tensor| values(&out, &name(tensor)));
        let width = config.intermediate / 8;
        for expert in 0..7 {
            let unit = |row: &[f32]| {
                let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                row.iter().map(|&x| (f64::from(x) / norm) as f32).collect::<Vec<f32>>()
            };
            let of = |router: &[f32], rows: &[f32]| {
                let neurons = rows.chunks(hidden).skip(expert * width).take(width);
                neurons.map(unit).position(|row| row == router[expert * hidden..][..hidden])
            };
            let place = of(&router, &rows);
            assert!(place.is_some() && place == of(&router_up, &ups), "layer {layer}, expert {expert}");
        }
    }
    assert!(mean_loss(&out, &text).is_finite());
    for (set, parts) in [
        (&["experts=1"][..], &["experts: is 1", "2 or more"][..]),
        (&["shared=16"], &["shared: cannot be 16"]),
        (&["active=0"], &["active: cannot be 0"]),
        (&["experts=7"], &["7"]),
    ] {
        Run::new("cmoe", set, 0.7, &text).fails(&source, &work.path().join("none"), parts);
    }
    Run::new("llama-moe", &["gate=neuron"], 0.7, &text).fails(
        &source,
        &work.path().join("none"),
        &["gate: cannot be \"neuron\"", "mlp or linear"],
    );
}
