//! Every wrong directory, option or output gives one line that names the file, the field or tensor, and the remedy.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{quiet, small_config};
use dsmoe_core::Result;
use dsmoe_core::checkpoint::{Checkpoint, Dtype, TensorInfo, Writer, check_llama_tensors};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, ConvertReport, PartitionSpec, RouterStart, convert};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::refused;
use dsmoe_router::RouterInit;
use tempfile::TempDir;

/// A model of two small layers in a directory of its own.
struct Fixture {
    work: TempDir,
    dir: PathBuf,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture::sharded(u64::MAX)
    }

    fn sharded(max_shard_bytes: u64) -> Fixture {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("model");
        let options = InitOptions { max_shard_bytes, ..InitOptions::default() };
        init(&small_config(), &dir, &options, &mut quiet).unwrap();
        Fixture { work, dir }
    }

    /// Replaces the bytes of the weights from `at` on.
    fn overwrite(&self, dir: &Path, at: u64, bytes: &[u8]) {
        let path = dir.join("model.safetensors");
        let mut all = fs::read(&path).unwrap();
        all[at as usize..][..bytes.len()].copy_from_slice(bytes);
        fs::write(&path, all).unwrap();
    }

    /// Returns the name of the shard of that number.
    fn shard(&self, number: usize) -> String {
        let mut names =
            fs::read_dir(&self.dir).unwrap().flatten().map(|entry| entry.file_name().into_string());
        names
            .find_map(|name| name.ok().filter(|name| name.starts_with(&format!("model-0000{number}-of"))))
            .unwrap()
    }

    fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.dir.join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }

    /// Changes the header of the weights, keeping its length.
    fn edit_header(&self, from: &str, to: &str) {
        let path = self.dir.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let len = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..len].to_vec()).unwrap();
        assert!(header.contains(from), "{from} in {header}");
        let header = header.replacen(from, to, 1);
        let header = format!("{:<width$}", header.trim_end(), width = len - 8);
        assert_eq!(header.len(), len - 8, "the new header is longer");
        fs::write(path, [&bytes[..8], header.as_bytes(), &bytes[len..]].concat()).unwrap();
    }

    fn check(&self) -> Result<()> {
        let config = Config::load(&self.dir)?;
        check_llama_tensors(&config, &Checkpoint::open(&self.dir)?).map(|_| ())
    }

    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        refused(self.check(), parts);
    }

    fn convert(&self, options: &ConvertOptions) -> Result<ConvertReport> {
        let report = convert(&self.dir, &self.out(), options, &mut quiet);
        if report.is_err() {
            let left: Vec<_> = fs::read_dir(self.work.path()).unwrap().flatten().collect();
            assert!(
                left.iter().all(|entry| !entry.file_name().to_string_lossy().contains(".tmp-")),
                "{left:?}"
            );
        }
        report
    }

    #[cfg(target_os = "linux")]
    fn infos(&self) -> Vec<TensorInfo> {
        let checkpoint = Checkpoint::open(&self.dir).unwrap();
        let info = |name: &str| {
            let view = checkpoint.tensor(name).unwrap();
            TensorInfo { name: name.to_owned(), dtype: view.dtype, shape: view.shape.clone() }
        };
        checkpoint.names().map(info).collect()
    }

    fn out(&self) -> PathBuf {
        self.work.path().join("out")
    }

    fn partition(&self, text: &str) -> ConvertOptions {
        let path = self.work.path().join("partition.json");
        fs::write(&path, text).unwrap();
        ConvertOptions { partition: PartitionSpec::File(path), ..ConvertOptions::new(2) }
    }
}

#[test]
fn truncated_data() {
    let fixture = Fixture::new();
    let path = fixture.dir.join("model.safetensors");
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
    fixture.refused(&["model.safetensors: header describes", "bytes of data", "copy the file again"]);
}

#[test]
fn no_weights() {
    let work = tempfile::tempdir().unwrap();
    let parts = ["no model.safetensors", "model.safetensors.index.json", "save_pretrained"];
    refused(Checkpoint::open(work.path()), &parts);
    refused(
        Config::load(work.path()),
        &["there is no config.json and no GGUF file in it; name a directory that"],
    );
}

#[test]
fn directories_that_are_no_models_are_named() {
    let work = tempfile::tempdir().unwrap();
    let [adapter, empty, cache] =
        ["adapter", "models--a--b", "models--c--d"].map(|name| work.path().join(name));
    for dir in [&adapter, &empty.join("snapshots"), &cache.join("snapshots/1"), &cache.join("snapshots/2")] {
        fs::create_dir_all(dir).unwrap();
    }
    fs::write(adapter.join("adapter_config.json"), "{}").unwrap();
    refused(Config::load(&adapter), &["is an adapter and no whole model; merge it into its base model"]);
    refused(Config::load(&empty), &["is a folder of the Hub's cache", "hf download OWNER/NAME"]);
    fs::write(cache.join("snapshots/2/config.json"), "{}").unwrap();
    let second = format!("name a directory in it: {}", cache.join("snapshots/2").display());
    refused(Config::load(&cache), &["is a folder of the Hub's cache", &second]);
}

#[test]
fn index_to_a_missing_shard() {
    let fixture = Fixture::sharded(4000);
    assert!(fixture.check().is_ok());
    let shard = fixture.shard(2);
    fs::remove_file(fixture.dir.join(&shard)).unwrap();
    fixture.refused(&["model.safetensors.index.json: tensor model.", &shard, "is missing", "copy that file"]);
}

#[test]
fn index_to_more_shards_than_a_model_has() {
    let fixture = Fixture::sharded(4000);
    let path = fixture.dir.join("model.safetensors.index.json");
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let with = |shards: usize| {
        let mut json = good.clone();
        for i in 0..shards {
            json["weight_map"][format!("t{i}")] = format!("s{i}").into();
        }
        fs::write(&path, json.to_string()).unwrap();
    };
    with(100);
    fixture.check().unwrap();
    with(100_000);
    fixture.refused(&["index.json: names more than 100000 shards", "save the model again in fewer"]);
}

#[test]
fn index_that_names_a_path() {
    for path in ["../model.safetensors", "/etc/passwd", "", "..", "a/b.safetensors"] {
        let fixture = Fixture::sharded(4000);
        fixture.edit("model.safetensors.index.json", &fixture.shard(1), path);
        fixture.refused(&["model.safetensors.index.json: tensor", "not a file name", "name a file"]);
    }
}

#[test]
fn index_and_shards_that_disagree() {
    let fixture = Fixture::sharded(4000);
    fixture.edit("model.safetensors.index.json", "model.norm.weight", "model.morn.weight");
    fixture.refused(&["index.json: tensor model.norm.weight is in a shard and not listed", "add it"]);
    let text = fs::read_to_string(fixture.dir.join("model.safetensors.index.json")).unwrap();
    let last = text.rfind("model-0").map(|at| &text[at..at + 32]).unwrap();
    let more = format!("\"model.morn.weight\": \"{last}\", \"model.norm.weight\"");
    fixture.edit("model.safetensors.index.json", "\"model.morn.weight\"", &more);
    // Nobody needs what is only in the index.
    fixture.check().unwrap();
    let other = text.find("model-0").map(|at| &text[at..at + 32]).unwrap();
    assert_ne!(other, last);
    let moved = format!("\"model.norm.weight\": \"{last}\"");
    fixture.edit("model.safetensors.index.json", &moved, &moved.replace(last, other));
    fixture.refused(&["index.json: tensor model.norm.weight is not in the shard", "copy index and shards"]);
}

#[test]
fn tensors_that_old_conversions_list_or_keep_are_ignored() {
    let fixture = Fixture::sharded(4000);
    let index = fixture.dir.join("model.safetensors.index.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    let shard = json["weight_map"]["model.norm.weight"].clone();
    json["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shard.clone();
    json["weight_map"]["lm_head.weight"] = shard;
    fs::write(&index, json.to_string()).unwrap();
    fixture.check().unwrap();
    // Nor is the shard needed that holds nothing else.
    json["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] =
        "model-00009-of-00009.safetensors".into();
    json["weight_map"]["lm_head.weight"] = "model-00008-of-00009.safetensors".into();
    fs::write(&index, json.to_string()).unwrap();
    fixture.check().unwrap();
    json["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors".into();
    fs::write(&index, json.to_string()).unwrap();
    fixture.refused(&[
        "tensor model.norm.weight is in shard model-00009-of-00009",
        "is missing",
        "copy that file",
    ]);
}

#[test]
fn shards_may_hold_more_than_the_index_lists() {
    let fixture = Fixture::sharded(4000);
    let path = fixture.dir.join(fixture.shard(2));
    let shard = Checkpoint::open_file(&path).unwrap();
    let info = |name: &str| {
        let view = shard.tensor(name).unwrap();
        TensorInfo { name: name.to_owned(), dtype: view.dtype, shape: view.shape.clone() }
    };
    let mut infos: Vec<TensorInfo> = shard.names().map(info).collect();
    infos.push(TensorInfo { name: "extra".to_owned(), dtype: Dtype::F32, shape: vec![2] });
    let larger = fixture.work.path().join("larger");
    let mut writer = Writer::create_file(&larger, infos).unwrap();
    for name in shard.names() {
        writer.write(name, &shard.bytes(name).unwrap()).unwrap();
    }
    writer.write("extra", &[0; 8]).unwrap();
    writer.finish().unwrap();
    fs::rename(larger, path).unwrap();
    fixture.check().unwrap();
}

#[test]
fn git_lfs_pointers_are_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\nsize 12345\n";
    let fixture = Fixture::new();
    for file in ["model.safetensors", "config.json"] {
        fs::write(fixture.dir.join(file), pointer).unwrap();
        fixture.refused(&[file, "is a Git LFS pointer", "git lfs pull"]);
    }
    let gguf = fixture.work.path().join("pointer.gguf");
    fs::write(&gguf, pointer).unwrap();
    for error in [Config::load(&gguf).map(|_| ()), Checkpoint::open(&gguf).map(|_| ())] {
        refused(error, &["pointer.gguf: is a Git LFS pointer", "git lfs pull"]);
    }
    fs::write(&gguf, "version 1 of something else altogether\n").unwrap();
    refused(Config::load(&gguf), &["pointer.gguf: header is not that of GGUF"]);
}

#[test]
fn mistrals_own_format_is_named() {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join("params.json"), "{}").unwrap();
    refused(Config::load(work.path()), &["there is no config.json", "Mistral's own format"]);
}

#[test]
fn names_of_the_hub_are_told_from_missing_directories() {
    let hub = Path::new("no-such-org/no-such-model");
    for error in [Config::load(hub).map(|_| ()), Checkpoint::open(hub).map(|_| ())] {
        refused(error, &["no-such-org/no-such-model", "Hugging Face Hub", "hf download no-such-org"]);
    }
    let work = tempfile::tempdir().unwrap();
    let missing = work.path().join("model");
    let error = Config::load(&missing).unwrap_err().to_string();
    assert!(error.contains("there is no such directory") && !error.contains("Hub"), "{error}");
    refused(
        Config::load(&missing.with_extension("gguf")),
        &["model.gguf", "there is no such file", "GGUF file"],
    );
}

#[test]
fn index_that_is_not_one() {
    let fixture = Fixture::sharded(4000);
    let path = fixture.dir.join("model.safetensors.index.json");
    for text in ["", "[]", "{}", r#"{"weight_map": {"a": 1}}"#] {
        fs::write(&path, text).unwrap();
        fixture.refused(&["model.safetensors.index.json: not an index of shards", "copy the file again"]);
    }
    fs::write(&path, [0xff, 0xfe]).unwrap();
    fixture.refused(&["model.safetensors.index.json: not UTF-8 at byte 0"]);
}

#[test]
fn config_of_another_model() {
    let cases: [(&str, &str, &[&str]); 3] = [
        (
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": 1",
            &[
                "model.safetensors: tensor model.layers.1.",
                "is not part of the model",
                "or remove the tensor",
            ],
        ),
        (
            "\"intermediate_size\": 12",
            "\"intermediate_size\": 8",
            &["tensor model.layers.0.mlp.gate_proj.weight", "shape [12, 16]", "says [8, 16]"],
        ),
        (
            "\"tie_word_embeddings\": true",
            "\"tie_word_embeddings\": false",
            &["tensor lm_head.weight is missing", "set tie_word_embeddings to true"],
        ),
    ];
    let fixture = Fixture::new();
    for (from, to, parts) in cases {
        fixture.edit("config.json", from, to);
        fixture.refused(parts);
        fixture.edit("config.json", to, from);
    }
    fixture.edit_header("layers.1.mlp.up_proj", "layers.1.mlp.pu_proj");
    let missing = "model: tensor model.layers.1.mlp.up_proj.weight is missing";
    fixture.refused(&[missing, "this config.json"]);
}

#[test]
fn wrong_dtype() {
    let fixture = Fixture::new();
    fixture.edit_header("F32", "I32");
    fixture
        .refused(&["model.safetensors: tensor model.embed_tokens.weight has dtype I32", "store it as F32"]);
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let read = checkpoint.read_f32("model.embed_tokens.weight", &mut vec![0.0; 20 * 16]);
    refused(read, &["model.safetensors: tensor model.embed_tokens.weight has dtype I32", "use F32"]);
}

#[test]
fn reads_of_another_size() {
    let fixture = Fixture::new();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let read = checkpoint.read_f32(name, &mut [0.0; 3]);
    refused(read, &["model.safetensors: tensor", name, "[16, 12], not 3"]);
    refused(checkpoint.read_f32("a", &mut []), &["model: tensor a is missing"]);
    refused(checkpoint.read_i32(name), &["tensor", name, "has dtype F32, not I32"]);
}

#[test]
fn tied_head_that_differs() {
    let fixture = Fixture::new();
    fixture.edit("config.json", "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    let untied = Config::load(&fixture.dir).unwrap();
    fs::remove_dir_all(&fixture.dir).unwrap();
    init(&untied, &fixture.dir, &InitOptions::default(), &mut quiet).unwrap();
    fixture.edit("config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    let differs = "model.safetensors: tensor lm_head.weight differs from";
    fixture.refused(&[differs, "set tie_word_embeddings to false"]);
}

#[test]
fn experts_that_do_not_divide() {
    let fixture = Fixture::new();
    let eight =
        "config.json: intermediate_size 12 is not divisible by 8 experts; use one of 1, 2, 3, 4, 6, 12";
    refused(fixture.convert(&ConvertOptions::new(8)), &[eight]);
    let other = "intermediate_size 172 is not divisible by 8 experts; use one of 1, 2, 4, 43";
    refused(dsmoe_core::partition::Partition::contiguous(172, 8), &[other]);
    refused(fixture.convert(&ConvertOptions::new(0)), &["num_experts is 0; use 1 to 65536"]);
}

#[test]
fn options_that_cannot_work() {
    let fixture = Fixture::new();
    let options =
        ConvertOptions { routers: RouterStart::Init(RouterInit::Warm(5)), ..ConvertOptions::new(4) };
    refused(fixture.convert(&options), &["warm(k) is 5; use 1 to the number of experts, 4"]);
    fixture.convert(&ConvertOptions::new(4)).unwrap();
    let again = convert(&fixture.out(), &fixture.work.path().join("x"), &ConvertOptions::new(4), &mut quiet);
    refused(again, &["out/config.json: model_type is already dsmoe", "the one that this was made from"]);
    let out = fixture.work.path().join("y");
    let dense = export(&fixture.dir, &out, &ExportOptions::new(ExportAs::Dense), &mut quiet);
    refused(dense, &["model/config.json: model_type is llama already", "export it as native"]);
    let to_i8 = ExportOptions { dtype: Some(Dtype::I8), ..ExportOptions::new(ExportAs::Native) };
    let cast = export(&fixture.dir, &out, &to_i8, &mut quiet);
    refused(cast, &["dtype I8 is not for weights", "bf16, f16 or f32"]);
    refused(preset("llama-9"), &["unknown preset `llama-9`", "tiny, small"]);
}

#[test]
fn centroids_of_weights_that_have_none() {
    let fixture = Fixture::new();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let name = "model.layers.1.mlp.gate_proj.weight";
    let (offset, len) = checkpoint.tensor(name).map(|view| (view.offset, view.len as usize)).unwrap();
    fixture.overwrite(&fixture.dir, offset, &vec![0; len]);
    let options =
        ConvertOptions { routers: RouterStart::Init(RouterInit::Centroid), ..ConvertOptions::new(4) };
    refused(fixture.convert(&options), &["centroid of expert 0 in layer 1", "use router init `open`"]);
    fixture.overwrite(&fixture.dir, offset, &f32::NAN.to_le_bytes());
    refused(fixture.convert(&options), &[name, "holds a value that is not finite", "undamaged copy"]);
}

#[test]
fn partition_files() {
    let fixture = Fixture::new();
    let cases: [(&str, &[&str]); 8] = [
        ("", &["not a partition", "write {\"layers\""]),
        ("{\"layer\": []}", &["not a partition: unknown field `layer`"]),
        ("{\"layers\": []}", &["layers has 0 lists and the model 2 layers", "one for all"]),
        ("[[0, 1, 2, 3]]", &["layers[0] has 1 experts, not 2", "set experts to 1"]),
        (
            "[[0, 1, 2, 3, 4, 5], [6, 7, 8]]",
            &["layers[0] is no partition", "expert 1 has 3 neurons", "not 6"],
        ),
        (
            "[[0, 1, 2, 3, 4, 5], [5, 7, 8, 9, 10, 11]]",
            &["neuron 5 is there twice", "list every neuron once"],
        ),
        ("[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 12]]", &["neuron 12 is not below intermediate_size 12"]),
        ("[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, -1]]", &["not a partition"]),
    ];
    for (text, parts) in cases {
        let result = fixture.convert(&fixture.partition(text));
        refused(result, &[&["partition.json: "], parts].concat());
    }
    let options =
        ConvertOptions { partition: PartitionSpec::File("none.json".into()), ..ConvertOptions::new(2) };
    refused(fixture.convert(&options), &["none.json", "No such file"]);
}

#[test]
fn stored_partition_that_is_none() {
    let fixture = Fixture::new();
    let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(4) };
    fixture.convert(&options).unwrap();
    let name = "model.layers.1.mlp.partition";
    let view = Checkpoint::open(&fixture.out()).unwrap().tensor(name).unwrap().clone();
    for wrong in [-1, 12, i32::MIN] {
        fixture.overwrite(&fixture.out(), view.offset, &i32::to_le_bytes(wrong));
        let out = fixture.work.path().join("dense");
        let result = export(&fixture.out(), &out, &ExportOptions::new(ExportAs::Dense), &mut quiet);
        refused(result, &["tensor model.layers.1.mlp.partition is no partition", "convert the model again"]);
    }
}

#[test]
fn output_that_is_not_empty() {
    let fixture = Fixture::new();
    let out = fixture.out();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    refused(fixture.convert(&ConvertOptions::new(4)), &["out is not empty; choose another out or set force"]);
    let force = ConvertOptions { force: true, ..ConvertOptions::new(4) };
    let foreign = "out: is not a model directory and is not replaced";
    refused(fixture.convert(&force), &[foreign, "choose another out"]);
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    fs::write(out.join("config.json"), "{}").unwrap();
    fixture.convert(&force).unwrap();
    assert!(!out.join("notes.txt").exists());
    assert!(out.join("model.safetensors").exists());
    assert_eq!(fs::read_dir(fixture.work.path()).unwrap().count(), 2);

    let file = fixture.work.path().join("file");
    fs::write(&file, "").unwrap();
    refused(convert(&fixture.dir, &file, &force, &mut quiet), &["file: is a file", "choose another out"]);
    let own = convert(&fixture.dir, &fixture.dir, &force, &mut quiet);
    refused(own, &["model: holds the model that is read", "choose another out"]);
    let above = convert(&fixture.dir, fixture.work.path(), &force, &mut quiet);
    refused(above, &["holds the model that is read"]);
}

#[cfg(target_os = "linux")]
#[test]
fn full_disk() {
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out");
    let output = dsmoe_core::checkpoint::OutputDir::create(&out, false).unwrap();
    let infos = Fixture::new().infos();
    std::os::unix::fs::symlink("/dev/full", output.path().join("model.safetensors")).unwrap();
    let mut writer = Writer::create(output.path(), infos.clone()).unwrap();
    let written =
        infos.iter().try_for_each(|info| writer.write(&info.name, &vec![0; info.len_bytes() as usize]));
    refused(written.and_then(|()| writer.finish()), &["model.safetensors: No space left on device"]);
    drop(output);
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
}

#[test]
fn a_weight_that_is_not_finite() {
    let fixture = Fixture::new();
    let name = "model.layers.1.mlp.down_proj.weight";
    let view = Checkpoint::open(&fixture.dir).unwrap().tensor(name).unwrap().clone();
    // All bits of an element set is a NaN in every float type.
    fixture.overwrite(&fixture.dir, view.offset, &[0xff; 4]);
    let message = [name, "not finite", "undamaged copy"];
    refused(dsmoe_core::Model::load(&fixture.dir), &message);
    for precision in [Precision::F32, Precision::Bf16] {
        refused(dsmoe_core::Inference::load(&fixture.dir, precision), &message);
    }
}
