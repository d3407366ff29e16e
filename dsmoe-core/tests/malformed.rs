//! Every wrong input gives one line that names the file, the field or tensor, and the mend.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{Checkpoint, Dtype, Header, OutputDir, Progress, Writer, check_llama_tensors};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, ConvertReport, PartitionSpec, convert};
use dsmoe_core::export::{ExportAs, export};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::{Error, Result};
use dsmoe_router::RouterInit;
use proptest::prelude::*;
use tempfile::TempDir;

fn quiet(_: Progress) {}

/// Asserts that the result is an error of one line with all of `parts`.
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("accepted, without an error about {parts:?}"),
        Err(error) => error.to_string(),
    };
    assert!(!message.contains('\n'), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// A model of two small layers; `change` edits its config.json, before the weights are made.
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

    fn out(&self) -> PathBuf {
        self.work.path().join("out")
    }

    fn partition(&self, text: &str) -> ConvertOptions {
        let path = self.work.path().join("partition.json");
        fs::write(&path, text).unwrap();
        ConvertOptions { partition: PartitionSpec::File(path), ..ConvertOptions::new(2) }
    }
}

fn small_config() -> Config {
    let text = preset("tiny").unwrap().to_json();
    let text = text
        .replace("\"intermediate_size\": 512", "\"intermediate_size\": 12")
        .replace("\"hidden_size\": 128", "\"hidden_size\": 16")
        .replace("\"head_dim\": 32", "\"head_dim\": 4")
        .replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 2")
        .replace("\"vocab_size\": 2048", "\"vocab_size\": 20");
    Config::from_json(Path::new("config.json"), &text).unwrap()
}

/// A safetensors file of that header and so many bytes of data.
fn safetensors(header: &str, data: usize) -> (TempDir, PathBuf) {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat();
    fs::write(&path, bytes).unwrap();
    (work, path)
}

fn open(header: &str, data: usize) -> Result<Checkpoint> {
    let (_work, path) = safetensors(header, data);
    Checkpoint::open_file(&path)
}

#[test]
fn file_without_a_header() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    for bytes in [0, 7] {
        fs::write(&path, vec![0; bytes]).unwrap();
        refused(Checkpoint::open_file(&path), &["x.safetensors: header is missing", "copy the file again"]);
    }
}

#[test]
fn header_longer_than_the_file() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    for len in [9u64, 1 << 40, u64::MAX] {
        fs::write(&path, [&len.to_le_bytes()[..], b"{      }"].concat()).unwrap();
        let says = format!("header says it has {len} bytes and the file has 8");
        refused(Checkpoint::open_file(&path), &["x.safetensors", &says, "copy the file again"]);
    }
}

#[test]
fn header_over_the_limit_in_a_file_with_holes() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    fs::write(&path, 200_000_000u64.to_le_bytes()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    refused(Checkpoint::open_file(&path), &["x.safetensors", "header has 200000000 bytes", "100000000"]);
}

#[test]
fn truncated_data() {
    let fixture = Fixture::new();
    let path = fixture.dir.join("model.safetensors");
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
    refused(
        fixture.check(),
        &["model.safetensors: header describes", "bytes of data", "copy the file again"],
    );
}

#[test]
fn header_that_is_not_json() {
    refused(
        open("{nonsense}", 0),
        &["x.safetensors: header is not that of safetensors", "line 1", "write the file"],
    );
    refused(open("[]", 0), &["x.safetensors: header is not that of safetensors", "an object of tensors"]);
    refused(open(&"[".repeat(10_000), 0), &["x.safetensors: header is not"]);
    refused(
        open(r#"{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#, 4),
        &["x.safetensors", "tensor a", "-1"],
    );
}

#[test]
fn header_with_unknown_dtype() {
    refused(
        open(r#"{"a": {"dtype": "F31\n", "shape": [1], "data_offsets": [0, 4]}}"#, 4),
        &["x.safetensors", "tensor a has unknown dtype", "F31", "safetensors library"],
    );
}

#[test]
fn header_with_absurd_shape() {
    let huge = u64::MAX;
    for shape in [format!("[{huge}]"), format!("[{huge}, {huge}]"), "[4611686018427387905]".to_owned()] {
        let header = format!(r#"{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 4]}}}}"#);
        refused(open(&header, 4), &["x.safetensors", "tensor a of shape", "does not fill its 4 bytes"]);
    }
    let header = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [18446744073709551612, 18446744073709551615]}}"#;
    refused(open(header, 4), &["x.safetensors", "tensor a"]);
}

#[test]
fn header_with_offsets_backwards() {
    refused(
        open(r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}"#, 4),
        &["x.safetensors", "tensor a ends at byte 0, before its start 4"],
    );
}

#[test]
fn header_with_overlap_or_gap() {
    let two = |start: u64, data| {
        let header = format!(
            r#"{{"a": {{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
                "b": {{"dtype": "U8", "shape": [4], "data_offsets": [{start}, {}]}}}}"#,
            start + 4
        );
        open(&header, data)
    };
    assert!(two(4, 8).is_ok());
    refused(
        two(2, 6),
        &["x.safetensors", "tensor b overlaps the tensor before it", "byte 2 of the data, not 4"],
    );
    refused(two(6, 10), &["x.safetensors", "tensor b leaves a gap before it", "byte 6 of the data, not 4"]);
    refused(two(4, 9), &["x.safetensors", "describes 8 bytes of data and the file has 9"]);
}

#[test]
fn header_with_a_name_twice() {
    let header = r#"{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}"#;
    refused(open(header, 2), &["x.safetensors", "tensor a is in the header twice"]);
}

#[test]
fn no_weights() {
    let work = tempfile::tempdir().unwrap();
    refused(
        Checkpoint::open(work.path()),
        &["no model.safetensors", "model.safetensors.index.json", "save_pretrained"],
    );
    refused(Config::load(work.path()), &["config.json", "No such file"]);
}

#[test]
fn index_to_a_missing_shard() {
    let fixture = Fixture::sharded(4000);
    assert!(fixture.check().is_ok());
    let shard = fs::read_dir(&fixture.dir).unwrap().flatten().map(|entry| entry.file_name());
    let shard = shard.into_iter().find(|name| name.to_string_lossy().starts_with("model-00002-of")).unwrap();
    fs::remove_file(fixture.dir.join(&shard)).unwrap();
    let shard = shard.to_string_lossy();
    refused(
        fixture.check(),
        &["model.safetensors.index.json: tensor model.", &shard, "is missing", "copy that file"],
    );
}

#[test]
fn index_that_names_a_path() {
    for path in ["../model.safetensors", "/etc/passwd", "", "..", "a/b.safetensors"] {
        let fixture = Fixture::sharded(4000);
        let shard = fs::read_dir(&fixture.dir).unwrap().flatten().map(|entry| entry.file_name());
        let shard =
            shard.into_iter().find(|name| name.to_string_lossy().starts_with("model-00001-of")).unwrap();
        fixture.edit("model.safetensors.index.json", &shard.to_string_lossy(), path);
        refused(fixture.check(), &["model.safetensors.index.json: tensor", "not a file name", "name a file"]);
    }
}

#[test]
fn index_and_shards_that_disagree() {
    let fixture = Fixture::sharded(4000);
    fixture.edit("model.safetensors.index.json", "model.norm.weight", "model.morn.weight");
    refused(fixture.check(), &["tensor model.norm.weight is not in the index", "add it to"]);
    let text = fs::read_to_string(fixture.dir.join("model.safetensors.index.json")).unwrap();
    let last = text.rfind("model-0").map(|at| &text[at..at + 32]).unwrap();
    let more = format!("\"model.morn.weight\": \"{last}\", \"model.norm.weight\"");
    fixture.edit("model.safetensors.index.json", "\"model.morn.weight\"", &more);
    refused(
        fixture.check(),
        &["index.json: tensor model.morn.weight is not in the shard", "copy index and shards"],
    );
}

#[test]
fn index_that_is_not_one() {
    let fixture = Fixture::sharded(4000);
    let path = fixture.dir.join("model.safetensors.index.json");
    for text in ["", "[]", "{}", r#"{"weight_map": {"a": 1}}"#] {
        fs::write(&path, text).unwrap();
        refused(
            fixture.check(),
            &["model.safetensors.index.json: not an index of shards", "copy the file again"],
        );
    }
    fs::write(&path, [0xff, 0xfe]).unwrap();
    refused(fixture.check(), &["model.safetensors.index.json: not UTF-8 at byte 0"]);
}

#[test]
fn missing_and_extra_tensor() {
    let fixture = Fixture::new();
    fixture.edit_header("layers.1.mlp.up_proj", "layers.1.mlp.pu_proj");
    refused(
        fixture.check(),
        &["model: tensor model.layers.1.mlp.up_proj.weight is missing", "this config.json"],
    );
    fixture.edit_header("layers.1.mlp.pu_proj", "layers.1.mlp.up_proj");
    fixture.edit("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    refused(
        fixture.check(),
        &["model.safetensors: tensor model.layers.1.", "is not part of the model", "or remove the tensor"],
    );
}

#[test]
fn wrong_shape() {
    let fixture = Fixture::new();
    fixture.edit("config.json", "\"intermediate_size\": 12", "\"intermediate_size\": 8");
    refused(
        fixture.check(),
        &["model.safetensors: tensor model.layers.0.mlp.gate_proj.weight", "shape [12, 16]", "says [8, 16]"],
    );
}

#[test]
fn wrong_dtype() {
    let fixture = Fixture::new();
    fixture.edit_header("F32", "I32");
    refused(
        fixture.check(),
        &["model.safetensors: tensor model.embed_tokens.weight has dtype I32", "store it as F32"],
    );
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let read = checkpoint.read_f32("model.embed_tokens.weight", &mut vec![0.0; 20 * 16]);
    refused(read, &["model.safetensors: tensor model.embed_tokens.weight has dtype I32", "use F32"]);
}

#[test]
fn reads_of_another_size() {
    let fixture = Fixture::new();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    refused(
        checkpoint.read_f32(name, &mut [0.0; 3]),
        &["model.safetensors: tensor", name, "[16, 12], not 3"],
    );
    let transposed = checkpoint.read_f32_transposed(name, 12, 16, &mut [0.0; 192]);
    refused(transposed, &["model.safetensors: tensor", name, "not [12, 16]"]);
    refused(checkpoint.read_f32("a", &mut []), &["model: tensor a is missing"]);
    refused(checkpoint.read_i32(name), &["tensor", name, "has dtype F32, not I32"]);
}

#[test]
fn tied_head_that_differs_and_untied_head_that_is_missing() {
    let fixture = Fixture::new();
    fixture.edit("config.json", "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    refused(fixture.check(), &["tensor lm_head.weight is missing", "set tie_word_embeddings to true"]);

    let untied = Config::load(&fixture.dir).unwrap();
    fs::remove_dir_all(&fixture.dir).unwrap();
    init(&untied, &fixture.dir, &InitOptions::default(), &mut quiet).unwrap();
    fixture.edit("config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    refused(
        fixture.check(),
        &["model.safetensors: tensor lm_head.weight differs from", "set tie_word_embeddings to false"],
    );
}

/// Refusals of a config.json with one thing changed.
fn config_refused(from: &str, to: &str, parts: &[&str]) {
    let text = small_config().to_json();
    assert!(text.contains(from), "{from} in {text}");
    let parts: Vec<&str> = [&["dir/config.json: "], parts].concat();
    refused(Config::from_json(Path::new("dir/config.json"), &text.replacen(from, to, 1)), &parts);
}

#[test]
fn config_that_is_not_json() {
    config_refused("{", "", &["not a JSON object", "copy the file again"]);
    config_refused("\"hidden_size\": 16", "\"hidden_size\": 16 16", &["not a JSON object", "line"]);
}

#[test]
fn config_with_unknown_rope_type() {
    let from = "\"rope_scaling\": null";
    for (to, key) in [
        (r#""rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#, "rope_scaling.rope_type"),
        (r#""rope_scaling": {"type": "yarn", "factor": 4.0}"#, "rope_scaling.type"),
        (r#""rope_parameters": {"rope_type": "yarn"}"#, "rope_parameters.rope_type"),
    ] {
        config_refused(from, to, &[key, "is \"yarn\" and not supported", "default or llama3"]);
    }
    let llama3 = r#""rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}"#;
    config_refused(from, llama3, &["rope_scaling.high_freq_factor is missing", "add it"]);
    config_refused(from, r#""rope_scaling": "yarn""#, &["rope_scaling is \"yarn\"", "use an object"]);
    config_refused(
        from,
        r#""rope_parameters": {"full_attention": {"rope_type": "default"}}"#,
        &["rope_parameters.full_attention", "not supported"],
    );
}

#[test]
fn config_with_two_ropes() {
    let from = "\"rope_scaling\": null";
    config_refused(
        from,
        r#""rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}"#,
        &["rope_parameters.rope_theta differs from rope_theta", "remove"],
    );
    let llama3 = r#""rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192"#;
    config_refused(
        from,
        &format!(r#""rope_scaling": null, "rope_parameters": {{{llama3}}}"#),
        &["rope_parameters.rope_type differs from rope_scaling", "remove"],
    );
    let text = small_config().to_json();
    let both =
        format!(r#""rope_scaling": {{{llama3}}}, "rope_parameters": {{"rope_theta": 10000, {llama3}}}"#);
    assert!(Config::from_json(Path::new("c"), &text.replace(from, &both)).is_ok());
}

#[test]
fn config_with_wrong_sizes() {
    let hidden = "\"hidden_size\": 16";
    config_refused(hidden, "\"hidden\": 16", &["hidden_size is missing", "add it"]);
    for wrong in ["0", "-1", "1.5", "\"16\"", "1e30", "99999999999", "[16]"] {
        config_refused(
            hidden,
            &format!("\"hidden_size\": {wrong}"),
            &["hidden_size is", "use an integer from 1"],
        );
    }
    let layers = "\"num_hidden_layers\": 2";
    config_refused(
        layers,
        "\"num_hidden_layers\": 100000",
        &["num_hidden_layers is 100000", "use an integer"],
    );
    let vocab = "\"vocab_size\": 20";
    config_refused(vocab, "\"vocab_size\": 16777217", &["vocab_size is 16777217", "use an integer"]);
    let absurd = "\"hidden_size\": 16000000, \"intermediate_size\": 16000000";
    let text = small_config().to_json().replace("\"intermediate_size\": 12,", "").replace(hidden, absurd);
    refused(
        Config::from_json(Path::new("config.json"), &text),
        &["config.json: hidden_size", "correct the sizes"],
    );
    config_refused(
        "\"num_key_value_heads\": 2",
        "\"num_key_value_heads\": 3",
        &["num_key_value_heads is 3", "divide"],
    );
    config_refused("\"head_dim\": 4", "\"head_dim\": 5", &["head_dim is 5", "use an even number"]);
    config_refused("\"rms_norm_eps\": 0.00001", "\"rms_norm_eps\": 0", &["rms_norm_eps is 0", "positive"]);
}

#[test]
fn config_of_another_kind_of_model() {
    config_refused(
        "\"llama\"",
        "\"mistral\"",
        &["model_type is \"mistral\" and not supported", "llama or dsmoe"],
    );
    config_refused("\"silu\"", "\"gelu\"", &["hidden_act is \"gelu\" and not supported", "silu"]);
    config_refused("\"mlp_bias\": false", "\"mlp_bias\": true", &["mlp_bias is true", "without biases"]);
    config_refused("\"attention_bias\": false", "\"attention_bias\": true", &["attention_bias is true"]);
    config_refused("\"mlp_bias\": false", "\"quantization_config\": {}", &["quantization_config is present"]);
    config_refused(
        "\"eos_token_id\": 2",
        "\"eos_token_id\": [2, -1]",
        &["eos_token_id is [2,-1]", "token id"],
    );
}

#[test]
fn config_with_a_wrong_dsmoe_object() {
    let dsmoe = |moe: &str, parts: &[&str]| {
        config_refused("\"llama\"", &format!("\"dsmoe\", \"dsmoe\": {moe}"), parts);
    };
    let good = r#"{"format_version": 1, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": false, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true}"#;
    let text = small_config().to_json().replace("\"llama\"", &format!("\"dsmoe\", \"dsmoe\": {good}"));
    assert!(Config::from_json(Path::new("config.json"), &text).is_ok());
    dsmoe(&good.replace("\"ste\"", "\"stee\""), &["dsmoe unknown field `stee`", "convert the model again"]);
    dsmoe(&good.replace(": 1,", ": 2,"), &["dsmoe.format_version is 2", "update it"]);
    dsmoe(&good.replace("0.5", "1.5"), &["dsmoe: threshold is 1.5", "0 to 1"]);
    dsmoe(
        &good.replace(": 4", ": 5"),
        &["intermediate_size 12 is not divisible by 5 experts; use one of 1, 2, 3, 4, 6, 12"],
    );
    dsmoe(&good.replace("eq8", "eq9").replace("none", "eq9"), &["dsmoe unknown variant `eq9`"]);
    config_refused("\"llama\"", "\"dsmoe\"", &["dsmoe is missing", "convert the model again"]);
    config_refused(
        "\"mlp_bias\"",
        "\"dsmoe\": {}, \"mlp_bias\"",
        &["dsmoe is present but model_type", "remove"],
    );
}

#[test]
fn experts_that_do_not_divide() {
    let fixture = Fixture::new();
    refused(
        fixture.convert(&ConvertOptions::new(8)),
        &["config.json: intermediate_size 12 is not divisible by 8 experts; use one of 1, 2, 3, 4, 6, 12"],
    );
    refused(
        dsmoe_core::partition::Partition::contiguous(172, 8),
        &["intermediate_size 172 is not divisible by 8 experts; use one of 1, 2, 4, 43"],
    );
    refused(fixture.convert(&ConvertOptions::new(0)), &["num_experts is 0; use 1 to 65536"]);
}

#[test]
fn options_that_cannot_work() {
    let fixture = Fixture::new();
    let options = ConvertOptions { router_init: RouterInit::Warm(5), ..ConvertOptions::new(4) };
    refused(fixture.convert(&options), &["warm(k) is 5; use 1 to the number of experts, 4"]);
    fixture.convert(&ConvertOptions::new(4)).unwrap();
    let again = convert(&fixture.out(), &fixture.work.path().join("x"), &ConvertOptions::new(4), &mut quiet);
    refused(again, &["out/config.json: model_type is already dsmoe", "--as dense"]);
    let out = fixture.work.path().join("y");
    let dense = export(&fixture.dir, &out, ExportAs::Dense, None, false, &mut quiet);
    refused(dense, &["model/config.json: model_type is llama already", "--as native"]);
    let cast = export(&fixture.dir, &out, ExportAs::Native, Some(Dtype::I8), false, &mut quiet);
    refused(cast, &["dtype I8 is not for weights", "bf16, f16 or f32"]);
    refused(preset("llama-9"), &["unknown preset `llama-9`", "tiny, small"]);
}

#[test]
fn centroids_of_weights_that_are_not_numbers() {
    let fixture = Fixture::new();
    let path = fixture.dir.join("model.safetensors");
    let offset =
        Checkpoint::open(&fixture.dir).unwrap().tensor("model.layers.1.mlp.gate_proj.weight").unwrap().offset;
    let mut bytes = fs::read(&path).unwrap();
    bytes[offset as usize..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let options = ConvertOptions { router_init: RouterInit::Centroid, ..ConvertOptions::new(4) };
    refused(fixture.convert(&options), &["centroid of expert 0 in layer 1", "use router init `open`"]);
}

#[test]
fn partition_files() {
    let fixture = Fixture::new();
    let check = |text: &str, parts: &[&str]| {
        let parts: Vec<&str> = [&["partition.json: "], parts].concat();
        refused(fixture.convert(&fixture.partition(text)), &parts);
    };
    check("", &["not a partition", "write {\"layers\""]);
    check("{\"layer\": []}", &["not a partition: unknown field `layer`"]);
    check("{\"layers\": []}", &["layers has 0 lists and the model 2 layers", "one for all"]);
    check("[[0, 1, 2, 3]]", &["layers[0] has 1 experts, not 2", "use --experts 1"]);
    check(
        "[[0, 1, 2, 3, 4, 5], [6, 7, 8]]",
        &["layers[0] is no partition", "expert 1 has 3 neurons", "not 6"],
    );
    check(
        "[[0, 1, 2, 3, 4, 5], [5, 7, 8, 9, 10, 11]]",
        &["neuron 5 is there twice", "list every neuron once"],
    );
    check("[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 12]]", &["neuron 12 is not below intermediate_size 12"]);
    check("[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, -1]]", &["not a partition"]);
    let options =
        ConvertOptions { partition: PartitionSpec::File("none.json".into()), ..ConvertOptions::new(2) };
    refused(fixture.convert(&options), &["none.json", "No such file"]);
}

#[test]
fn stored_partition_that_is_none() {
    let fixture = Fixture::new();
    let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(4) };
    fixture.convert(&options).unwrap();
    let path = fixture.out().join("model.safetensors");
    let name = "model.layers.1.mlp.partition";
    let view = Checkpoint::open(&fixture.out()).unwrap().tensor(name).unwrap().clone();
    for wrong in [-1, 12, i32::MIN] {
        let mut bytes = fs::read(&path).unwrap();
        bytes[view.offset as usize..][..4].copy_from_slice(&i32::to_le_bytes(wrong));
        fs::write(&path, bytes).unwrap();
        let out = fixture.work.path().join("dense");
        let result = export(&fixture.out(), &out, ExportAs::Dense, None, false, &mut quiet);
        refused(result, &["tensor model.layers.1.mlp.partition is no partition", "convert the model again"]);
    }
}

#[test]
fn output_that_is_not_empty() {
    let fixture = Fixture::new();
    let out = fixture.out();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    refused(
        fixture.convert(&ConvertOptions::new(4)),
        &["out is not empty; choose another --out or pass --force"],
    );
    let force = ConvertOptions { force: true, ..ConvertOptions::new(4) };
    refused(
        fixture.convert(&force),
        &["out: is not a model directory and is not replaced", "choose another --out"],
    );
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    fs::write(out.join("config.json"), "{}").unwrap();
    fixture.convert(&force).unwrap();
    assert!(!out.join("notes.txt").exists());
    assert!(out.join("model.safetensors").exists());
    assert_eq!(fs::read_dir(fixture.work.path()).unwrap().count(), 2);

    let file = fixture.work.path().join("file");
    fs::write(&file, "").unwrap();
    refused(convert(&fixture.dir, &file, &force, &mut quiet), &["file: is a file", "choose another --out"]);
    let own = convert(&fixture.dir, &fixture.dir, &force, &mut quiet);
    refused(own, &["model: holds the model that is read", "choose another --out"]);
    let above = convert(&fixture.dir, fixture.work.path(), &force, &mut quiet);
    refused(above, &["holds the model that is read"]);
}

#[test]
fn full_disk() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        println!("SKIP full_disk: no /dev/full");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out");
    let output = OutputDir::create(&out, false).unwrap();
    let infos = Fixture::new().infos();
    #[cfg(unix)]
    std::os::unix::fs::symlink(full, output.path().join("model.safetensors")).unwrap();
    let mut writer = Writer::create(output.path(), infos.clone()).unwrap();
    let written =
        infos.iter().try_for_each(|info| writer.write(&info.name, &vec![0; info.len_bytes() as usize]));
    refused(written.and_then(|()| writer.finish()), &["model.safetensors: No space left on device"]);
    drop(output);
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
}

impl Fixture {
    fn infos(&self) -> Vec<dsmoe_core::checkpoint::TensorInfo> {
        let checkpoint = Checkpoint::open(&self.dir).unwrap();
        let info = |name: &str| {
            let view = checkpoint.tensor(name).unwrap();
            dsmoe_core::checkpoint::TensorInfo {
                name: name.to_owned(),
                dtype: view.dtype,
                shape: view.shape.clone(),
            }
        };
        checkpoint.names().map(info).collect()
    }
}

/// What a reader may do with nonsense: accept it, or refuse it in one line.
fn one_line<T>(result: std::result::Result<T, Error>) -> std::result::Result<(), TestCaseError> {
    if let Err(error) = result {
        prop_assert!(!error.to_string().contains('\n'), "{}", error);
    }
    Ok(())
}

/// `text` with some bytes replaced, some removed and some doubled.
fn mutated(text: String) -> impl Strategy<Value = Vec<u8>> {
    let len = text.len();
    let edit = (0..len, any::<u8>(), 0usize..4, 0usize..40);
    proptest::collection::vec(edit, 1..6).prop_map(move |edits| {
        let mut bytes = text.clone().into_bytes();
        for (at, byte, kind, span) in edits {
            let at = at.min(bytes.len().saturating_sub(1));
            let end = bytes.len().min(at + span);
            match kind {
                0 if at < bytes.len() => bytes[at] = byte,
                1 => drop(bytes.drain(at..end)),
                2 => bytes.splice(at..at, b"9".repeat(span)).for_each(drop),
                _ => {
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy).for_each(drop);
                }
            }
        }
        bytes
    })
}

fn small_header() -> String {
    r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#
        .to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_as_header(bytes: Vec<u8>, data in 0u64..64) {
        one_line(Header::parse(Path::new("x"), &bytes, 8 + bytes.len() as u64 + data))?;
    }

    #[test]
    fn mutated_header(bytes in mutated(small_header())) {
        let header = Header::parse(Path::new("x"), &bytes, 8 + bytes.len() as u64 + 32);
        if let Ok(header) = &header {
            let total: u64 = header.entries.iter().map(|entry| entry.len).sum();
            prop_assert_eq!(total, 32);
        }
        one_line(header)?;
    }

    #[test]
    fn any_text_as_config(text in "\\PC*") {
        one_line(Config::from_json(Path::new("config.json"), &text))?;
    }

    #[test]
    fn mutated_config(bytes in mutated(small_config().to_json())) {
        one_line(Config::from_json(Path::new("config.json"), &String::from_utf8_lossy(&bytes)))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_bytes_as_file(bytes: Vec<u8>) {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("x.safetensors");
        fs::write(&path, bytes).unwrap();
        one_line(Checkpoint::open_file(&path))?;
    }

    #[test]
    fn mutated_index(bytes in mutated(r#"{"metadata":{"total_size":32},"weight_map":{"a":"x","b":"x"}}"#.to_owned())) {
        let work = tempfile::tempdir().unwrap();
        let header = small_header();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 32]].concat();
        fs::write(work.path().join("x"), file).unwrap();
        fs::write(work.path().join("model.safetensors.index.json"), bytes).unwrap();
        one_line(Checkpoint::open(work.path()))?;
    }
}
