//! Whole models: configurations, tensors under Hugging Face's names, and logits.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{Change, Checkpoint, TensorSource};
use dsmoe_core::config::Config;
use dsmoe_core::model::{Cache, Inference, Workspace};
use dsmoe_kernels::Precision;
use serde_json::Value;

use super::{read, same, sha256};
use dsmoe_kernels::testing::refused;
use dsmoe_kernels::testing::shared;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn golden(dir: &Path) -> Vec<(String, Value)> {
    let Value::Object(golden) = json(&dir.join("golden.json")) else { panic!("golden.json") };
    golden.into_iter().collect()
}

#[test]
fn tensors_have_names_rows_and_values_of_hugging_face() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let dir = shared.join("golden/gguf");
    let mut checked = 0;
    for (model, expected) in golden(&dir) {
        let checkpoint = Checkpoint::open(&dir.join(format!("{model}.gguf"))).unwrap();
        let tensors = expected["tensors"].as_object().unwrap();
        let names: Vec<&str> = checkpoint.names().collect();
        let mut wanted: Vec<&str> = tensors.keys().map(String::as_str).collect();
        wanted.sort_unstable();
        assert_eq!(names, wanted, "{model}");
        for (name, expected) in tensors {
            let values = read(&checkpoint, name);
            let shape = serde_json::json!(checkpoint.tensor(name).unwrap().shape);
            assert_eq!(shape, expected["shape"], "{model} {name}");
            assert_eq!(sha256(&values), expected["sha256"].as_str().unwrap(), "{model} {name}");
            checked += 1;
        }
    }
    assert_eq!(checked, 350);
}

#[test]
fn streamed_rows_are_those_of_the_whole_tensor() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let checkpoint = Checkpoint::open(&shared.join("golden/gguf/llama-Q4_0.gguf")).unwrap();
    let name = "model.layers.1.self_attn.q_proj.weight";
    let view = checkpoint.tensor(name).unwrap();
    let whole = checkpoint.bytes(name).unwrap();
    let row = view.shape[1] * view.dtype.size();
    for (first, count) in [(0, 1), (5, 20), (15, 2), (63, 1)] {
        let mut rows = vec![0; count * row];
        checkpoint.read_at(view, (first * row) as u64, &mut rows).unwrap();
        assert_eq!(rows, whole[first * row..][..count * row], "rows from {first}");
    }
    let order: Vec<u32> = (0..64).rev().collect();
    let mut reversed = Vec::new();
    let mut source = TensorSource::new(&checkpoint);
    source
        .stream(name, Change::Rows(&order), |bytes| {
            reversed.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    let expected: Vec<u8> = whole.chunks(row).rev().flatten().copied().collect();
    assert_eq!(reversed, expected);
}

#[test]
fn configurations_are_those_of_hugging_face() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let dir = shared.join("golden/gguf");
    for (model, _) in golden(&dir) {
        let found = Config::load(&dir.join(format!("{model}.gguf"))).unwrap();
        let path = dir.join(format!("{model}.config.json"));
        let expected = Config::from_json(&path, &fs::read_to_string(&path).unwrap()).unwrap();
        same(&model, &found, &expected);
        // A file does not tell Mistral without a window from Llama.
        let family = if model.starts_with("mistral") { "llama" } else { expected.model_type() };
        assert_eq!(found.model_type(), family, "{model}");
    }
}

#[test]
fn logits_are_those_of_transformers() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let dir = shared.join("golden/gguf");
    let expected = Checkpoint::open_file(&dir.join("logits_last.safetensors")).unwrap();
    let mut checked = 0;
    for (model, golden) in golden(&dir) {
        let path = dir.join(format!("{model}.gguf"));
        let ids: Vec<u32> =
            golden["input_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let loaded = Inference::load(&path, Precision::F32).unwrap();
        let mut cache = Cache::new(&loaded, ids.len());
        let mut workspace = Workspace::default();
        let found = loaded.logits(&ids, 1, &mut cache, None, &mut workspace).unwrap();
        let worst = found.iter().zip(read(&expected, &model)).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 2e-4, "{model}: {worst}");
        checked += 1;
    }
    assert_eq!(checked, 15);
}

#[test]
fn a_directory_may_hold_one_file() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let file = shared.join("golden/gguf/llama-F16.gguf");
    let work = tempfile::tempdir().unwrap();
    let copy = |name: &str| -> PathBuf {
        let path = work.path().join(name);
        fs::copy(&file, &path).unwrap();
        path
    };
    copy("model.gguf");
    assert_eq!(Config::load(work.path()).unwrap().hidden, 64);
    assert_eq!(Checkpoint::open(work.path()).unwrap().names().count(), 20);
    copy("other.GGUF");
    refused(Config::load(work.path()), &["holds 2 GGUF files and no config.json", "name one of them"]);
    fs::write(work.path().join("config.json"), "{").unwrap();
    refused(Config::load(work.path()), &["config.json"]);
}
