//! Tiny random mixtures of experts against transformers: logits, losses and greedy text, what is saved and exported, and files
//! that are wrong.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, UpcycleOptions, convert, upcycle};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::init::{InitOptions, init};
use dsmoe_core::model::{Batch, Cache, Inference, Model, StepArgs, TrainWorkspace, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::{assert_close, f64s, refused};
use serde_json::{Value, json};

use crate::gradients::recomputes_the_same;
use crate::worst;

pub(crate) const MIXTURES: [&str; 4] = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"];
pub(crate) const LENGTH: usize = 8;
/// The largest difference of a logit. Those of f32 and of f64 differ by up to 1e-5 here, with one order of sums.
pub(crate) const MIXTURE_TOLERANCE: f32 = 1e-4;

pub(crate) fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/moe").join(name)
}

pub(crate) struct Golden {
    pub(crate) rows: Vec<Vec<u32>>,
    logits: Vec<f32>,
    losses: Vec<f32>,
    greedy: Vec<u32>,
}

pub(crate) fn golden(name: &str) -> Golden {
    let json: Value = serde_json::from_slice(&fs::read(case(name).join("golden.json")).unwrap()).unwrap();
    let floats = |key: &str| serde_json::from_value(json[key].clone()).unwrap();
    Golden {
        rows: serde_json::from_value(json["ids"].clone()).unwrap(),
        logits: floats("logits"),
        losses: floats("losses"),
        greedy: serde_json::from_value(json["greedy"].clone()).unwrap(),
    }
}

/// The logits of all rows, fed in pieces.
pub(crate) fn logits(model: &Inference, rows: &[Vec<u32>], piece: usize) -> Vec<f32> {
    let (mut found, mut workspace) = (Vec::new(), Workspace::default());
    for ids in rows {
        let mut cache = Cache::new(model, ids.len());
        for ids in ids.chunks(piece) {
            found.extend_from_slice(model.logits(ids, ids.len(), &mut cache, None, &mut workspace).unwrap());
        }
    }
    found
}

/// Compares the model in `dir` with what transformers computed for the case.
fn compare(name: &str, dir: &Path) {
    let golden = golden(name);
    let model = Inference::load(dir, Precision::F32).unwrap();
    for piece in [LENGTH, 1, 3] {
        let found = logits(&model, &golden.rows, piece);
        assert_eq!(found.len(), golden.logits.len());
        let differs = worst(&found, golden.logits.iter().copied());
        assert!(differs < MIXTURE_TOLERANCE, "{name}, {piece} tokens at a time: {differs}");
    }
    for kv_cache in [true, false] {
        let options = GenerateOptions { max_tokens: golden.greedy.len(), kv_cache, ..Default::default() };
        let text = generate(&model, &golden.rows[0], &options, |_| true).unwrap().tokens;
        assert!(
            golden.greedy.starts_with(&text) && !text.is_empty(),
            "{name} with cache {kv_cache}: {text:?}"
        );
    }
}

pub(crate) fn batch(rows: &[Vec<u32>]) -> [Vec<u32>; 2] {
    [0, 1].map(|from| rows.iter().flat_map(|ids| ids[from..from + LENGTH - 1].to_vec()).collect())
}

#[test]
pub(crate) fn logits_and_text_are_those_of_transformers() {
    for name in MIXTURES {
        compare(name, &case(name));
    }
}

#[test]
fn losses_of_scoring_and_of_training_are_those_of_transformers() {
    for name in MIXTURES {
        let golden = golden(name);
        let [inputs, targets] = batch(&golden.rows);
        let batch = Batch { inputs: &inputs, targets: &targets, seq: LENGTH - 1 };
        let inference = Inference::load(&case(name), Precision::F32).unwrap();
        let mut losses = vec![0.0; inputs.len()];
        let (mut stats, mut workspace) = (inference.new_stats().unwrap(), Workspace::default());
        inference.score(&mut losses, batch, Some(&mut stats), &mut workspace).unwrap();
        assert!(worst(&losses, golden.losses.iter().copied()) < 2e-5, "{name}");
        let k = inference.config().fixed_active().unwrap();
        assert_eq!(stats.summary().active_experts, k, "{name}");

        let model = Model::load(&case(name)).unwrap();
        let mut grads = Buf::zeros(model.params().len());
        let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
        let step = model.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace).unwrap();
        recomputes_the_same(&model, batch, Precision::F32, name);
        let want: f64 = golden.losses.iter().map(|&loss| f64::from(loss)).sum();
        assert!((step.loss_sum - want).abs() / (inputs.len() as f64) < 2e-5, "{name}: {}", step.loss_sum);
        for entry in model.layout().entries() {
            let of = &grads[entry.range.clone()];
            let is_expert = entry.spec.name.contains(".experts.");
            assert!(of.iter().all(|g| g.is_finite()), "{name}: {}", entry.spec.name);
            assert!(is_expert || of.iter().any(|&g| g != 0.0), "{name}: no gradient of {}", entry.spec.name);
        }
    }
}

/// Names and bytes of all tensors, as they are in the files.
pub(crate) fn tensors(dir: &Path) -> BTreeMap<String, (Dtype, Vec<u8>)> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    let tensor = |name: String| {
        let bytes = checkpoint.bytes(&name).unwrap().into_owned();
        (name.clone(), (checkpoint.tensor(&name).unwrap().dtype, bytes))
    };
    names.into_iter().map(tensor).collect()
}

#[test]
fn a_saved_model_is_the_directory_that_transformers_wrote() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let (source, saved) = (tensors(&case(name)), work.path().join(name));
        fs::create_dir(&saved).unwrap();
        Model::load(&case(name)).unwrap().save(&saved, Dtype::BF16).unwrap();
        let found = tensors(&saved);
        assert!(found.keys().eq(source.keys()), "{name}: {:?}", found.keys());
        for (tensor, (dtype, bytes)) in &found {
            // Routers stay f32.
            assert_eq!(*dtype == Dtype::F32, tensor.contains("gate.weight"), "{name}: {tensor}");
            assert!(*dtype == Dtype::F32 || *bytes == source[tensor].1, "{name}: {tensor}");
        }
        compare(name, &saved);
        let (before, after) = (Config::load(&case(name)).unwrap(), Config::load(&saved).unwrap());
        assert_eq!((after.model_type(), after.num_experts()), (name, before.num_experts()));
        let json: Value = serde_json::from_str(&after.to_json()).unwrap();
        assert!(json.get("ffn").is_none() && json["architectures"] == json!([after.family().class]));
    }
}

#[test]
fn exports_have_the_bytes_of_the_source_and_none_is_dense() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        for form in [ExportAs::Native, ExportAs::Transformers] {
            let out = work.path().join(format!("{name}-{form:?}"));
            export(&case(name), &out, &ExportOptions::new(form), &mut |_| {}).unwrap();
            assert!(tensors(&out) == tensors(&case(name)), "{name} {form:?}");
            assert_eq!(Config::load(&out).unwrap().model_type(), name);
        }
        let out = work.path().join("dense");
        let error = export(&case(name), &out, &ExportOptions::new(ExportAs::Dense), &mut |_| {});
        refused(error, &["ffn.type is \"mixture\", which has no dense form"]);
    }
}

/// Copies a case to `dir` with keys of its config.json changed.
pub(crate) fn changed(name: &str, dir: &Path, keys: &[(&str, Value)]) {
    fs::create_dir_all(dir).unwrap();
    fs::copy(case(name).join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    let text = fs::read_to_string(case(name).join("config.json")).unwrap();
    let mut json: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    for (key, value) in keys {
        json.insert((*key).to_owned(), value.clone());
    }
    fs::write(dir.join("config.json"), Value::Object(json).to_string()).unwrap();
}

#[test]
fn wrong_files_are_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("m");
    for (name, keys, parts) in [
        ("mixtral", vec![("num_experts_per_tok", json!(5))], vec!["num_experts_per_tok is 5", "4 experts"]),
        ("mixtral", vec![("num_experts_per_tok", json!(0))], vec!["num_experts_per_tok is 0"]),
        ("mixtral", vec![("num_local_experts", Value::Null)], vec!["num_local_experts is missing", "add it"]),
        ("mixtral", vec![("intermediate_size", json!(1 << 23))], vec!["intermediate_size is", "4 experts"]),
        (
            "qwen3_moe",
            vec![("num_experts", json!(7)), ("num_local_experts", json!(6))],
            vec!["is 6 and", "is 7", "correct one"],
        ),
        ("qwen2_moe", vec![("mlp_only_layers", json!([1]))], vec!["mlp_only_layers is [1]", "not supported"]),
        ("qwen2_moe", vec![("decoder_sparse_step", json!(2))], vec!["decoder_sparse_step is 2"]),
        ("qwen2_moe", vec![("shared_expert_intermediate_size", Value::Null)], vec!["is missing"]),
        ("olmoe", vec![("clip_qkv", json!(8.0))], vec!["clip_qkv is 8", "not clipped"]),
        ("olmoe", vec![("router_aux_loss_coef", json!(-1))], vec!["router_aux_loss_coef is -1"]),
        ("olmoe", vec![("hidden_act", json!("relu"))], vec!["hidden_act is \"relu\""]),
    ] {
        changed(name, &dir, &keys);
        let all: Vec<&str> = parts.iter().copied().chain(["config.json"]).collect();
        refused(Inference::load(&dir, Precision::F32), &all);
    }
    // Messages about tensors have the names of the file.
    changed("mixtral", &dir, &[("num_local_experts", json!(5))]);
    refused(Inference::load(&dir, Precision::F32), &["block_sparse_moe.experts.4.w1.weight is missing"]);
    changed("mixtral", &dir, &[("num_local_experts", json!(3))]);
    refused(Inference::load(&dir, Precision::F32), &["block_sparse_moe.", "; "]);
    changed("qwen2_moe", &dir, &[("moe_intermediate_size", json!(7))]);
    refused(Inference::load(&dir, Precision::F32), &["experts.0.gate_proj.weight has shape [8, 16]"]);
}

#[test]
fn parameters_are_counted_by_hand() {
    // d 16, 4 heads and 2 of keys and values of 4, 5 experts of width 8 of which 2 run, a shared one of width 20.
    let counts = Accounting::of(&Config::load(&case("qwen2_moe")).unwrap());
    let (expert, shared, router) = (3 * 16 * 8, 3 * 16 * 20, 5 * 16 + 16);
    let attention = 2 * 16 * (16 + 8);
    let rest = 2 * (attention + 16 + 2 * 8 + 2 * 16) + 16 + 2 * 64 * 16;
    assert_eq!(counts.total, rest + 2 * (5 * expert + shared + router));
    let active = (rest + 2 * (2 * expert + shared + router)) as f64;
    assert_eq!(counts.activated(0.0), active);
    let matrices = 2 * (attention + 2 * expert + shared + router) + 64 * 16;
    assert_eq!(counts.flops_per_token(0.0, 0.0), 2.0 * matrices as f64);
}

/// Writes a dense model with random weights, and keys beside its sizes, to `dir`.
pub(crate) fn dense(dir: &Path, keys: &Value) {
    let mut json = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "rope_theta": 5000.0,
        "initializer_range": 0.4,
    });
    json.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let config = Config::from_json(Path::new("config.json"), &json.to_string()).unwrap();
    init(&config, dir, &InitOptions { dtype: Dtype::BF16, ..Default::default() }, &mut |_| {}).unwrap();
}

pub(crate) fn options(family: &str, num_experts: usize, top_k: usize) -> UpcycleOptions {
    UpcycleOptions { family: family.to_owned(), num_experts, top_k, seed: 1, force: false }
}

#[test]
fn an_upcycled_model_has_the_logits_of_the_dense_one() {
    let rows: Vec<Vec<u32>> = golden("mixtral").rows;
    for (i, (keys, family)) in [
        (json!({}), "mixtral"),
        (json!({"tie_word_embeddings": true, "rms_norm_eps": 0.01}), "mixtral"),
        (json!({"model_type": "mistral", "sliding_window": 3}), "mixtral"),
        (json!({"model_type": "qwen3", "head_dim": 8}), "qwen3_moe"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}), "qwen3_moe"),
    ]
    .into_iter()
    .enumerate()
    {
        let work = tempfile::tempdir().unwrap();
        let [from, out] = ["dense", "moe"].map(|name| work.path().join(name));
        dense(&from, &keys);
        let made = upcycle(&from, &out, &options(family, 5, 2), &mut |_| {});
        if i == 4 {
            // Qwen3 norms queries and keys, and LLaMA does not.
            refused(made, &["model_type is \"llama\"", "a model of type qwen3_moe"]);
            assert!(!out.exists());
            continue;
        }
        let made = made.unwrap();
        let config = Config::load(&out).unwrap();
        assert_eq!((config.model_type(), config.num_experts()), (family, Some(5)));
        assert_eq!((made.expert_width, made.router_params), (9, 2 * 5 * 12));
        assert_eq!(
            made.total,
            Accounting::of(&Config::load(&from).unwrap()).total + 2 * (4 * 3 * 9 * 12 + 5 * 12)
        );
        let [a, b] = [&from, &out].map(|dir| {
            let model = Inference::load(dir, Precision::F32).unwrap();
            logits(&model, &rows, LENGTH)
        });
        assert_close(&keys.to_string(), &b, &f64s(&a), 1e-6);
        assert!(a.iter().any(|z| z.abs() > 0.5), "{keys}");
        // Equal arguments make equal bytes, and routers differ by layer and by seed.
        let again = work.path().join("again");
        upcycle(&from, &again, &options(family, 5, 2), &mut |_| {}).unwrap();
        assert!(tensors(&again) == tensors(&out));
        let routers: Vec<Vec<u8>> = tensors(&out)
            .into_iter()
            .filter(|(name, _)| name.ends_with(".gate.weight"))
            .map(|(_, (dtype, bytes))| {
                assert_eq!(dtype, Dtype::F32);
                bytes
            })
            .collect();
        assert!(routers.len() == 2 && routers[0] != routers[1]);
        // It trains: experts that ran get different gradients.
        let model = Model::load(&out).unwrap();
        let [inputs, targets] = batch(&rows);
        let mut grads = Buf::zeros(model.params().len());
        let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
        let batch = Batch { inputs: &inputs, targets: &targets, seq: LENGTH - 1 };
        let step = model.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace).unwrap();
        assert!(step.balance_loss > 0.0, "{}", step.balance_loss);
        let of = |e: usize| {
            let name = format!("model.layers.0.mlp.experts.{e}.gate_proj.weight");
            &grads[model.layout().get(&name).unwrap().range.clone()]
        };
        assert!((1..5).any(|e| of(e) != of(0)), "experts have one gradient");
    }
}

#[test]
fn what_cannot_be_upcycled_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out");
    let from = work.path().join("dense");
    dense(&from, &json!({}));
    let refused_by = |from: &Path, options: &UpcycleOptions, parts: &[&str]| {
        refused(upcycle(from, &out, options, &mut |_| {}), parts);
        assert!(!out.exists());
    };
    refused_by(&from, &options("mixtral", 4, 5), &["top_k", "4"]);
    refused_by(&from, &options("qwen2_moe", 4, 2), &["qwen2_moe are not made of a dense one", "use mixtral"]);
    refused_by(&from, &options("llama", 4, 2), &["llama are not made", "use mixtral"]);
    refused_by(&from, &options("bert", 4, 2), &["unknown family", "bert"]);
    refused_by(&from, &options("mixtral", 1 << 22, 2), &["intermediate_size is 9", "experts"]);
    refused_by(
        &case("olmoe"),
        &options("mixtral", 4, 2),
        &["model_type is \"olmoe\"", "experts or thresholds already"],
    );
    let biased = work.path().join("biased");
    dense(&biased, &json!({"attention_bias": true}));
    refused_by(
        &biased,
        &options("mixtral", 4, 2),
        &["model_type is \"llama\"", "cannot be the same function"],
    );
    // Nor is a mixture cut into experts again.
    let again = convert(&case("mixtral"), &out, &ConvertOptions::new(3), &mut |_| {});
    refused(again, &["model_type is already mixtral", "use a dense model"]);
}
