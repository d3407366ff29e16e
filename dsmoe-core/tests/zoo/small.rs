//! Tiny models of families that the zoo lacks, and text models of models that read images, too, against transformers.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{Checkpoint, check_llama_tensors, open_model};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{Batch, Inference, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::refused;
use serde_json::{Value, json};

const WRAPPED: [(&str, &str); 2] = [("gemma3", "gemma3_text"), ("mistral3", "mistral")];

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families").join(name)
}

fn json_of(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// Checks losses and greedy text of the model in `dir` against those of the case.
fn compare(name: &str, dir: &Path) {
    let golden = json_of(&case(name).join("golden.json"));
    let list = |key: &str| -> Vec<f64> {
        golden[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let ids: Vec<u32> = list("ids").into_iter().map(|id| id as u32).collect();
    let model = Inference::load(dir, Precision::F32).unwrap();
    let (seq, mut losses) = (ids.len() - 1, vec![0.0; ids.len() - 1]);
    let batch = Batch { inputs: &ids[..seq], targets: &ids[1..], seq };
    model.score(&mut losses, batch, None, &mut Workspace::default()).unwrap();
    for (i, (got, want)) in losses.iter().zip(list("losses")).enumerate() {
        assert!((f64::from(*got) - want).abs() < 2e-5, "{}, token {i}: {got} and {want}", dir.display());
    }
    let want: Vec<u32> = list("greedy").into_iter().map(|id| id as u32).collect();
    for kv_cache in [true, false] {
        let options = GenerateOptions { max_tokens: want.len(), kv_cache, ..Default::default() };
        let got = generate(&model, &ids[..8], &options, |_| true).unwrap().tokens;
        assert_eq!(got, want, "{} with cache {kv_cache}", dir.display());
    }
}

#[test]
fn losses_and_text_are_those_of_transformers() {
    for name in ["ministral", "gemma3", "mistral3"] {
        compare(name, &case(name));
    }
}

/// Copies a case to `dir`, with the names of its tensors changed.
fn renamed(name: &str, dir: &Path, change: impl Fn(&str) -> String) {
    fs::create_dir_all(dir).unwrap();
    fs::copy(case(name).join("config.json"), dir.join("config.json")).unwrap();
    let bytes = fs::read(case(name).join("model.safetensors")).unwrap();
    let (len, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).unwrap();
    let header: serde_json::Map<String, Value> =
        header.into_iter().map(|(name, value)| (change(&name), value)).collect();
    let header = Value::Object(header).to_string();
    let len = (header.len() as u64).to_le_bytes();
    fs::write(dir.join("model.safetensors"), [&len, header.as_bytes(), data].concat()).unwrap();
}

/// The name of a tensor in memory since transformers 4.52, which some programs write.
fn new_name(name: &str) -> String {
    match name.strip_prefix("language_model.") {
        Some(rest) if rest.starts_with("lm_head") => rest.to_owned(),
        Some(rest) => format!("model.language_model.{}", rest.strip_prefix("model.").unwrap()),
        None if name.starts_with("__") => name.to_owned(),
        None => format!("model.{name}"),
    }
}

#[test]
fn text_models_are_read_under_both_spellings_of_their_names() {
    let work = tempfile::tempdir().unwrap();
    for (name, _) in WRAPPED {
        let dir = work.path().join(name);
        renamed(name, &dir, new_name);
        compare(name, &dir);
    }
    // Both spellings in one file contradict each other.
    let both = work.path().join("both");
    renamed("gemma3", &both, |name| match name {
        "vision_tower.head.probe" => "model.language_model.norm.weight".to_owned(),
        _ => name.to_owned(),
    });
    let config = Config::load(&both).unwrap();
    refused(open_model(&both, &config), &["norm.weight", "is there under two names", "remove one of them"]);
    // A part that is neither text nor for images is not left out silently.
    let stray = work.path().join("stray");
    renamed("mistral3", &stray, |name| name.replace("vision_tower.", "audio_tower."));
    let config = Config::load(&stray).unwrap();
    let checkpoint = open_model(&stray, &config).unwrap();
    refused(check_llama_tensors(&config, &checkpoint), &["audio_tower.", "is not part of the model"]);
}

#[test]
fn what_is_made_of_a_text_model_stands_alone() {
    let work = tempfile::tempdir().unwrap();
    for (name, family) in WRAPPED {
        let config = Config::load(&case(name)).unwrap();
        assert_eq!(config.model_type(), family);
        assert_eq!(
            config.notices(),
            [format!("{name} reads images, too: its vision tower and projector are left out")]
        );
        let (sparse, dense) = (work.path().join(format!("{name}-sparse")), work.path().join(name));
        convert(&case(name), &sparse, &ConvertOptions::new(4), &mut |_| {}).unwrap();
        export(&sparse, &dense, &ExportOptions::new(ExportAs::Dense), &mut |_| {}).unwrap();
        let written = json_of(&dense.join("config.json"));
        assert_eq!(written["model_type"], family);
        assert!(written.get("text_config").is_none() && written.get("vision_config").is_none());
        assert!(Checkpoint::open(&dense).unwrap().names().all(|name| !name.contains("vision")));
        assert!(Config::load(&dense).unwrap().notices().is_empty());
        compare(name, &dense);
    }
}

/// The configurations of published models leave out what is the default of transformers.
#[test]
fn sizes_that_files_leave_out_are_those_of_transformers() {
    let read = |json: Value| Config::from_json(Path::new("dir/config.json"), &json.to_string());
    let text = json!({"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024});
    let gemma = read(json!({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})).unwrap();
    assert_eq!((gemma.vocab_size, gemma.num_heads, gemma.num_kv_heads, gemma.head_dim), (262_208, 8, 4, 256));
    assert_eq!((gemma.hidden, gemma.num_layers, gemma.max_position), (2560, 34, 131_072));
    assert_eq!((&gemma.eos_token_ids[..], gemma.tie_word_embeddings), (&[1, 106][..], true));
    let mistral = read(json!({"model_type": "mistral3", "torch_dtype": "bfloat16",
        "text_config": {"head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": null}}))
    .unwrap();
    assert_eq!((mistral.vocab_size, mistral.hidden, mistral.num_kv_heads), (32_000, 4096, 8));
    assert_eq!((mistral.model_type(), mistral.tie_word_embeddings), ("mistral", false));
    let again: Value = serde_json::from_str(&mistral.to_json()).unwrap();
    assert_eq!(again["torch_dtype"], "bfloat16");

    let file = "dir/config.json: ";
    refused(read(json!({"model_type": "gemma3"})), &[file, "text_config is missing"]);
    let other = json!({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}});
    refused(read(other), &[file, "text_config.model_type is \"ministral3\"", "grows with the position"]);
    let bits = json!({"model_type": "mistral3", "text_config": {}, "quantization_config": {"bits": 4}});
    refused(read(bits), &[file, "quantization_config is present"]);
    let wide = json!({"model_type": "gemma3", "text_config": {"hidden_size": -1}});
    refused(read(wide), &[file, "text_config.hidden_size is -1"]);
}
