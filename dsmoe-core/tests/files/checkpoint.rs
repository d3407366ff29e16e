//! Reading and writing against the safetensors crate, and the rules of configurations.

use std::fs;
use std::path::Path;

use crate::support::read;
use dsmoe_core::checkpoint::{
    Checkpoint, Dtype, OutputDir, TensorInfo, Writer, check_llama_tensors, tensor_names,
};
use dsmoe_core::config::{Config, Rope, RopeScaling};
use dsmoe_core::init::{preset, preset_names};
use dsmoe_kernels::testing::shared;
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView as OracleView;

fn info(name: &str, dtype: Dtype, shape: &[usize]) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 - 7.0) / 8.0).collect()
}

#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let work = tempfile::tempdir().unwrap();
    let infos = vec![
        info("b", Dtype::BF16, &[3, 5]),
        info("a\"quoted", Dtype::F32, &[7]),
        info("empty", Dtype::F32, &[0, 4]),
        info("h", Dtype::F16, &[2, 2]),
        info("d", Dtype::F64, &[3]),
        info("i", Dtype::I32, &[2]),
    ];
    let mut writer = Writer::create(work.path(), infos.clone()).unwrap();
    writer.write_f32("b", &values(15)).unwrap();
    writer.begin("a\"quoted").unwrap();
    writer.write_f32_chunk(&values(7)[..3]).unwrap();
    writer.write_f32_chunk(&values(7)[3..]).unwrap();
    writer.write("empty", &[]).unwrap();
    writer.write_f32("h", &values(4)).unwrap();
    writer.write_f32("d", &values(3)).unwrap();
    writer.write("i", &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).unwrap();
    writer.finish().unwrap();

    let bytes = fs::read(work.path().join("model.safetensors")).unwrap();
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let oracle = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(oracle.len(), infos.len());
    let bf16s: Vec<u8> = values(15).iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let f16s: Vec<u8> = values(4).iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    assert_eq!(oracle.tensor("b").unwrap().data(), bf16s);
    assert_eq!(oracle.tensor("h").unwrap().data(), f16s);
    for info in &infos {
        let view = oracle.tensor(&info.name).unwrap();
        assert_eq!(view.shape(), info.shape);
        assert_eq!(format!("{:?}", view.dtype()), info.dtype.to_string());
    }
    let checkpoint = Checkpoint::open(work.path()).unwrap();
    for info in infos.iter().filter(|info| info.dtype.is_float()) {
        let n = info.shape.iter().product();
        assert_eq!(read(&checkpoint, &info.name, n), values(n), "{}", info.name);
    }
    assert_eq!(checkpoint.read_i32("i").unwrap(), [1, -1]);
}

#[test]
fn what_the_safetensors_crate_writes_is_read() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("model.safetensors");
    let f32s: Vec<u8> = values(15).iter().flat_map(|x| x.to_le_bytes()).collect();
    let f16s: Vec<u8> = values(6).iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let tensors = [
        ("z", OracleView::new(safetensors::Dtype::F32, vec![3, 5], &f32s).unwrap()),
        ("a", OracleView::new(safetensors::Dtype::F16, vec![6], &f16s).unwrap()),
        ("scalar", OracleView::new(safetensors::Dtype::U8, vec![], &[9]).unwrap()),
    ];
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    let checkpoint = Checkpoint::open(work.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "scalar", "z"]);
    assert_eq!(*checkpoint.bytes("z").unwrap(), f32s[..]);
    assert_eq!(*checkpoint.bytes("scalar").unwrap(), [9]);
    assert_eq!(read(&checkpoint, "a", 6), values(6));
}

#[test]
fn elements_are_read_from_any_place() {
    let dir = tempfile::tempdir().unwrap();
    let all = values(40);
    for dtype in [Dtype::F32, Dtype::F64] {
        let path = dir.path().join(format!("{dtype}.safetensors"));
        let infos = vec![info("before", dtype, &[3]), info("a", dtype, &[4, 10])];
        let mut writer = Writer::create_file(&path, infos).unwrap();
        writer.write_f32("before", &[7.0; 3]).unwrap();
        writer.write_f32("a", &all).unwrap();
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        for (first, len) in [(0, 40), (3, 17), (39, 1), (40, 0)] {
            let mut out = vec![-1.0; len];
            checkpoint.read_f32_at("a", first, &mut out).unwrap();
            assert_eq!(out, all[first..first + len]);
        }
        let message = |first| checkpoint.read_f32_at("a", first, &mut [0.0; 2]).unwrap_err().to_string();
        for first in [39, usize::MAX] {
            assert!(message(first).contains("too few for 2 elements from"), "{}", message(first));
        }
        checkpoint.check_shape("a", &[4, 10]).unwrap();
        let wrong = checkpoint.check_shape("a", &[10, 4]).unwrap_err().to_string();
        assert!(wrong.contains("has shape [4, 10], not [10, 4]"), "{wrong}");
    }
}

#[test]
fn shards_hold_at_most_their_limit_and_the_index_finds_all() {
    let work = tempfile::tempdir().unwrap();
    let sizes = [3usize, 3, 30, 1, 2, 4];
    let names: Vec<String> = (0..sizes.len()).map(|i| format!("t{i}")).collect();
    let infos: Vec<_> = sizes.iter().zip(&names).map(|(&n, name)| info(name, Dtype::F32, &[n])).collect();
    let mut writer = Writer::create_sharded(work.path(), infos, 24).unwrap();
    for (name, &n) in names.iter().zip(&sizes) {
        writer.write_f32(name, &values(n)).unwrap();
    }
    writer.finish().unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(work.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 4 * 43);
    let shards = ["1-of-00004", "1-of-00004", "2-of-00004", "3-of-00004", "3-of-00004", "4-of-00004"];
    for (name, shard) in names.iter().zip(shards) {
        assert_eq!(index["weight_map"][name], format!("model-0000{shard}.safetensors"));
    }
    let checkpoint = Checkpoint::open(work.path()).unwrap();
    assert_eq!(checkpoint.files().count(), 4);
    for (name, &n) in names.iter().zip(&sizes) {
        assert_eq!(read(&checkpoint, name, n), values(n));
    }
}

/// Begins a file of two tensors.
fn two(dir: &Path) -> Writer {
    Writer::create(dir, vec![info("a", Dtype::F32, &[1]), info("b", Dtype::F32, &[1])]).unwrap()
}

#[test]
#[should_panic(expected = "tensor b written where Some(\"a\") was declared")]
fn tensors_are_written_in_their_order() {
    let _ = two(tempfile::tempdir().unwrap().path()).write_f32("b", &[0.0]);
}

#[test]
#[should_panic(expected = "\"b\"")]
fn no_tensor_is_forgotten() {
    let work = tempfile::tempdir().unwrap();
    let mut writer = two(work.path());
    writer.write_f32("a", &[0.0]).unwrap();
    let _ = writer.finish();
}

#[test]
fn outputs_appear_whole_or_not_at_all() {
    let work = tempfile::tempdir().unwrap();
    let target = work.path().join("deep").join("out");
    let output = OutputDir::create(&target, false).unwrap();
    fs::write(output.path().join("config.json"), "1").unwrap();
    assert!(!target.exists());
    assert_eq!(output.path().parent(), target.parent());
    output.commit().unwrap();
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "1");
    drop(OutputDir::create(&target, true).unwrap());
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "1");
    let output = OutputDir::create(&target, true).unwrap();
    fs::write(output.path().join("config.json"), "2").unwrap();
    output.commit().unwrap();
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "2");
    assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    let empty = work.path().join("empty");
    fs::create_dir(&empty).unwrap();
    OutputDir::create(&empty, false).unwrap().commit().unwrap();
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 2);
}

#[test]
fn real_models_are_what_their_configurations_say() {
    let Some(shared) = shared("real_models_are_what_their_configurations_say", "models") else { return };
    for model in ["babyllama-1m", "tinystories-656k", "stories-260k"] {
        let dir = shared.join("models").join(model);
        let config = Config::load(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let tensors = check_llama_tensors(&config, &checkpoint).unwrap();
        let stored = tensors.stored_name("model.embed_tokens.weight");
        assert_eq!(stored == "lm_head.weight", model == "tinystories-656k");
        assert_eq!(tensors.stored_name("model.norm.weight"), "model.norm.weight");
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let oracle = SafeTensors::deserialize(&bytes).unwrap();
        for (name, shape) in tensor_names(&config) {
            let name = tensors.stored_name(&name);
            assert_eq!(oracle.tensor(name).unwrap().shape(), shape);
            assert_eq!(oracle.tensor(name).unwrap().data(), &*checkpoint.bytes(name).unwrap());
        }
        assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2][..]));
        assert_eq!(config.num_kv_heads, 4);
    }
}

#[test]
fn leftovers_of_other_tools_are_accepted() {
    let work = tempfile::tempdir().unwrap();
    let config = preset("tiny").unwrap();
    let mut infos: Vec<_> =
        tensor_names(&config).map(|(name, shape)| TensorInfo { name, dtype: Dtype::F16, shape }).collect();
    infos.push(info("lm_head.weight", Dtype::F16, &[2048, 128]));
    infos.push(info("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[16]));
    let mut writer = Writer::create(work.path(), infos.clone()).unwrap();
    for info in &infos {
        let embedding = ["lm_head.weight", "model.embed_tokens.weight"].contains(&info.name.as_str());
        let bytes = (0..info.len_bytes()).map(|i| if embedding { (i % 251) as u8 } else { 0 });
        writer.write(&info.name, &bytes.collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
    let tensors = check_llama_tensors(&config, &Checkpoint::open(work.path()).unwrap()).unwrap();
    assert_eq!(tensors.stored_name("model.embed_tokens.weight"), "model.embed_tokens.weight");
}

fn parse(text: &str) -> Config {
    Config::from_json(Path::new("config.json"), text).unwrap()
}

/// Base and scaling of the only rotation.
fn rope(config: &Config) -> (f64, RopeScaling) {
    let [Rope { theta, scaling, .. }] = &config.architecture.ropes[..] else { panic!("one rotation") };
    (*theta, scaling.clone())
}

#[test]
fn both_spellings_of_rope_are_read_and_written() {
    let llama3 = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };
    let one = preset("llama-3.2-1b").unwrap();
    assert_eq!(rope(&one), (500_000.0, llama3.clone()));
    let mut json: serde_json::Value = serde_json::from_str(&one.to_json()).unwrap();
    assert_eq!(json["rope_theta"], 500_000.0);
    assert_eq!(json["rope_scaling"]["rope_type"], "llama3");
    assert_eq!(json["rope_parameters"]["rope_type"], "llama3");
    assert_eq!(json["rope_parameters"]["rope_theta"], 500_000.0);
    let read = |json: &serde_json::Value| rope(&parse(&json.to_string()));
    let map = json.as_object_mut().unwrap();
    let new = map.remove("rope_parameters").unwrap();
    assert_eq!(read(&json), (500_000.0, llama3.clone()));
    let legacy = json.to_string().replace("rope_type", "type");
    assert_eq!(rope(&parse(&legacy)), (500_000.0, llama3.clone()));
    let map = json.as_object_mut().unwrap();
    map.remove("rope_scaling");
    map.remove("rope_theta");
    map.insert("rope_parameters".into(), new);
    assert_eq!(read(&json), (500_000.0, llama3));

    let two = preset("llama-2-7b").unwrap().to_json();
    let mut json: serde_json::Value = serde_json::from_str(&two).unwrap();
    assert!(json["rope_scaling"].is_null() && json["rope_parameters"]["rope_type"] == "default");
    let map = json.as_object_mut().unwrap();
    map.remove("rope_parameters");
    map.insert("rope_scaling".into(), serde_json::json!({"rope_type": "default"}));
    assert_eq!(read(&json), (10_000.0, RopeScaling::None));
    json.as_object_mut().unwrap().remove("rope_theta");
    assert_eq!(read(&json), (10_000.0, RopeScaling::None));
}

#[test]
fn defaults_of_absent_keys() {
    let config = parse(
        r#"{"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": null,
            "eos_token_id": [7, 8]}"#,
    );
    assert_eq!((config.num_kv_heads, config.head_dim, config.max_position), (4, 4, 2048));
    assert_eq!((config.rms_norm_eps, config.tie_word_embeddings), (1e-6, false));
    assert_eq!(rope(&config), (10_000.0, RopeScaling::None));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[7, 8][..]));
}

#[test]
fn tokens_that_end_a_text_are_those_of_both_files() {
    let work = tempfile::tempdir().unwrap();
    preset("tiny").unwrap().save(work.path()).unwrap();
    let path = work.path().join("generation_config.json");
    fs::write(&path, r#"{"eos_token_id": [3, 4], "bos_token_id": 9}"#).unwrap();
    let config = Config::load(work.path()).unwrap();
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2, 3, 4][..]));
    fs::write(&path, "{}").unwrap();
    assert_eq!(Config::load(work.path()).unwrap().eos_token_ids, [2]);
}

#[test]
fn unknown_keys_and_their_order_are_kept() {
    for name in preset_names() {
        let text = preset(name).unwrap().to_json();
        assert_eq!(parse(&text).to_json(), text);
        let text = text.replacen('{', "{\n  \"zoo\": {\"b\": 1, \"a\": [1.5, null]},", 1);
        let mut kept = parse(&text);
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&kept.to_json()), value(&text));
        kept.set_dtype(Dtype::F16);
        assert!(kept.to_json().contains("\"torch_dtype\": \"float16\""));
        let mut new = parse(&text.replace("torch_dtype", "dtype"));
        new.set_dtype(Dtype::BF16);
        assert!(new.to_json().contains("\"dtype\": \"bfloat16\"") && !new.to_json().contains("torch_dtype"));
    }
}
