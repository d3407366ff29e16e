//! For every wrong input the command prints one line that names the file, the field and the fix.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::{SEPARATOR, at, check_failure, fails, finish, fixture, run, succeeds};
use serde_json::{Value, json};

/// Replaces the header of a safetensors file; the data stays.
fn edit_header(file: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    edit(&mut header);
    let mut text = header.to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[8 + len..]);
    fs::write(file, out).unwrap();
}

fn inspect_fails(dir: &Path, parts: &[&str]) {
    fails(&["inspect", at(dir)], parts);
    fails(&["generate", at(dir), "--prompt", "x"], parts);
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn truncated_and_lying_headers() {
    let fixture = fixture();
    let dir = fixture.copy_of_dense("truncated");
    let file = dir.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    inspect_fails(&dir, &["model.safetensors", "; "]);
    fs::write(&file, &bytes[..5]).unwrap();
    inspect_fails(&dir, &["model.safetensors", "; "]);
    // A header of 2^62 bytes: nothing may be allocated for it.
    let mut lying = bytes.clone();
    lying[..8].copy_from_slice(&(1u64 << 62).to_le_bytes());
    fs::write(&file, &lying).unwrap();
    inspect_fails(&dir, &["model.safetensors", "header", "; "]);
    fs::write(&file, &bytes).unwrap();
    edit_header(&file, |header| header[UP]["shape"] = json!([1u64 << 40, 1u64 << 40]));
    inspect_fails(&dir, &["model.safetensors", UP, "; "]);
    fs::write(&file, &bytes).unwrap();
    edit_header(&file, |header| header[UP]["data_offsets"] = json!([0, 1u64 << 50]));
    inspect_fails(&dir, &["model.safetensors", "; "]);
}

#[test]
fn tensors_that_do_not_fit_the_configuration() {
    let fixture = fixture();
    let missing = fixture.with_config("missing-tensor", "num_hidden_layers", json!(3));
    inspect_fails(&missing, &["missing-tensor", "model.layers.2.", "missing", "; "]);
    let extra = fixture.with_config("extra-tensor", "num_hidden_layers", json!(1));
    inspect_fails(&extra, &["extra-tensor", "model.layers.1.", "; "]);
    let shape = fixture.with_config("wrong-shape", "intermediate_size", json!(128));
    inspect_fails(&shape, &["model.safetensors", "model.layers.0.mlp.", "shape [", "; "]);
    let dtype = fixture.copy_of_dense("wrong-dtype");
    edit_header(&dtype.join("model.safetensors"), |header| header[UP]["dtype"] = json!("I32"));
    inspect_fails(&dtype, &["model.safetensors", UP, "I32", "; store it as F32"]);
}

#[test]
fn an_index_with_a_missing_shard() {
    let fixture = fixture();
    let dir = fixture.out("shards");
    let config = fixture.dir.join("config.json");
    succeeds(&["init", "--config", at(&config), "--out", at(&dir), "--max-shard-size", "50kB"]);
    let mut shards: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    assert!(shards.len() > 1);
    fs::remove_file(&shards[1]).unwrap();
    // What `generate` reads first.
    fs::copy(fixture.dir.join("tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    let name = shards[1].file_name().unwrap().to_str().unwrap();
    inspect_fails(&dir, &["model.safetensors.index.json", name, "missing; "]);
}

#[test]
fn configurations() {
    let fixture = fixture();
    let other = json!({ "rope_type": "mrope", "factor": 4.0 });
    let rope = fixture.with_config("rope", "rope_scaling", other);
    inspect_fails(&rope, &["config.json", "rope_scaling", "mrope", "llama3"]);
    let kind = fixture.with_config("mixtral", "model_type", json!("mixtral"));
    inspect_fails(&kind, &["config.json", "model_type", "mixtral", "experts already", "qwen3"]);
    inspect_fails(Path::new("no-org/no-model"), &["no-org/no-model", "Hugging Face Hub", "hf download"]);
    let huge = fixture.with_config("huge", "hidden_size", json!(1u64 << 60));
    inspect_fails(&huge, &["config.json", "hidden_size", "; "]);
    let zero = fixture.with_config("zero", "num_hidden_layers", json!(0));
    inspect_fails(&zero, &["config.json", "num_hidden_layers", "; "]);
    let activation = fixture.with_config("gelu", "hidden_act", json!("gelu"));
    inspect_fails(&activation, &["config.json", "hidden_act", "gelu", "silu"]);
    let text = fixture.copy_of_dense("no-json");
    fs::write(text.join("config.json"), "{\n\"vocab_size\": ,").unwrap();
    inspect_fails(&text, &["config.json", "line 2", "; "]);
    let nowhere = fixture.dir.join("nowhere");
    inspect_fails(&nowhere, &["nowhere", "no such directory"]);
    let out = fixture.out("indivisible");
    fails(
        &["convert", at(&fixture.dense), "--experts", "7", "--out", at(&out)],
        &["config.json", "intermediate_size 64", "not divisible by 7", "1, 2, 4, 8"],
    );
    fails(&["convert", at(&fixture.moe), "--experts", "4", "--out", at(&out)], &["moe", "; "]);
    fails(
        &["convert", at(&fixture.dense), "--experts", "4", "--router-init", "warm(5)", "--out", at(&out)],
        &["warm", "5"],
    );
    fails(
        &["convert", at(&fixture.dense), "--experts", "4", "--threshold", "2", "--out", at(&out)],
        &["threshold is 2", "use"],
    );
    let lists = fixture.dir.join("bad-partition.json");
    fs::write(&lists, "{\"layers\": [[[0, 1], [1, 2]]]}").unwrap();
    fails(
        &["convert", at(&fixture.dense), "--experts", "4", "--partition", at(&lists), "--out", at(&out)],
        &["bad-partition.json", "layers[0] has 2 experts, not 4", "; set --experts to 2"],
    );
    assert!(!out.exists(), "a failed conversion leaves nothing");
}

#[test]
fn tokenizers_and_texts() {
    let fixture = fixture();
    let larger = fixture.copy_of_dense("tokenizer");
    let text = fs::read_to_string(&fixture.text).unwrap();
    dsmoe_datasets::train_bpe(text.split(SEPARATOR).map(str::to_owned), 400, &larger).unwrap();
    fails(
        &["eval", at(&larger), "--data", at(&fixture.text), "--seq", "16"],
        &["tokenizer.json", "larger than the embedding", "399", "vocab_size is 320", "; use"],
    );
    fs::remove_file(larger.join("tokenizer.json")).unwrap();
    fails(&["generate", at(&larger), "--prompt", "x"], &["no tokenizer.json", "; copy"]);

    let file = |name: &str, bytes: &[u8]| {
        let path = fixture.dir.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let out = fixture.out("no-run");
    for (path, parts) in [
        (file("empty.txt", b" \n "), ["empty.txt", "empty corpus"]),
        (file("latin1.txt", b"caf\xe9 noir"), ["latin1.txt", "byte 3"]),
        (file("rows.jsonl", b"{\"body\": \"x\"}\n"), ["rows.jsonl", "--text-column"]),
        (file("cut.txt.gz", b"\x1f\x8b\x08\x00"), ["cut.txt.gz", "truncated"]),
        (fixture.dir.join("no.txt"), ["no.txt", "No such file"]),
    ] {
        fails(&["eval", at(&fixture.dense), "--data", at(&path), "--seq", "16"], &parts);
        let train = [
            "train",
            at(&fixture.dense),
            "--data",
            at(&path),
            "--out",
            at(&out),
            "--steps",
            "1",
            "--seq",
            "16",
        ];
        fails(&train, &parts);
    }
    let short = file("short.txt", b"so few");
    let train =
        ["train", at(&fixture.dense), "--data", at(&short), "--out", at(&out), "--steps", "1", "--seq", "64"];
    fails(&train, &["fewer than one window of 65", "--seq"]);
    fails(
        &["eval", at(&fixture.dense), "--data", at(&fixture.text), "--seq", "4096"],
        &["max_position_embeddings 128"],
    );
    fails(
        &["eval", at(&fixture.dense), "--data", at(&fixture.text), "--seq", "1"],
        &["--seq is 1", "use at least 2"],
    );
    fails(
        &["eval", at(&fixture.dense), "--data", at(&fixture.text), "--threshold", "0.5"],
        &["no gates", "convert"],
    );
}

#[test]
fn output_folders() {
    let fixture = fixture();
    let full = fixture.out("occupied");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("precious"), "x").unwrap();
    let config = fixture.dir.join("config.json");
    let text = at(&fixture.text);
    for args in [
        vec!["convert", at(&fixture.dense), "--experts", "4", "--out", at(&full)],
        vec!["export", at(&fixture.moe), "--as", "dense", "--out", at(&full)],
        vec!["init", "--config", at(&config), "--out", at(&full)],
        vec!["train", at(&fixture.dense), "--data", text, "--out", at(&full), "--steps", "1", "--seq", "16"],
    ] {
        fails(&args, &["out-occupied is not empty; choose another --out", "--force"]);
    }
    assert_eq!(fs::read_to_string(full.join("precious")).unwrap(), "x");
    for args in [
        vec!["convert", at(&fixture.dense), "--experts", "4", "--force", "--out", at(&fixture.dense)],
        vec!["export", at(&fixture.moe), "--as", "dense", "--force", "--out", at(&fixture.moe)],
        vec![
            "train",
            at(&fixture.dense),
            "--data",
            text,
            "--steps",
            "1",
            "--force",
            "--out",
            at(&fixture.dense),
        ],
    ] {
        fails(&args, &["holds the model that is read; choose another --out"]);
    }
    let train = [
        "train",
        at(&fixture.dense),
        "--data",
        text,
        "--out",
        at(&full),
        "--steps",
        "1",
        "--seq",
        "16",
        "--resume",
    ];
    fails(&train, &["out-occupied", "holds no run"]);
}

#[test]
fn resuming_what_is_not_the_same_run() {
    let fixture = fixture();
    let out = fixture.out("one-run");
    let train = |model: &Path, steps: &'static str, more: &[&'static str]| {
        let common = [
            "train",
            at(model),
            "--data",
            at(&fixture.text),
            "--doc-separator",
            SEPARATOR,
            "--out",
            at(&out),
            "--batch",
            "2",
            "--seq",
            "16",
            "--steps",
            steps,
        ];
        [&common[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let args = train(&fixture.dense, "4", &["--stop-after", "2"]);
    succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let fails_with = |args: Vec<String>, parts: &[&str]| {
        fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), parts);
    };
    let resume = ["--resume"];
    fails_with(
        train(&fixture.moe, "4", &resume),
        &["state.json", "the starting model was", "; give the model"],
    );
    fails_with(
        train(&fixture.dense, "4", &["--resume", "--lr", "0.5"]),
        &["state.json", "lr was", "is now 0.5; use the old"],
    );
    fails_with(
        train(&fixture.dense, "4", &["--active-target", "0.5", "--force"]),
        &["active_target", "dense model"],
    );
}

#[test]
fn settings_of_a_run() {
    let fixture = fixture();
    let file = fixture.dir.join("bad-run.toml");
    fs::write(&file, "steps = 5\nspeed = 3\n").unwrap();
    let out = fixture.out("bad-settings");
    let train = |more: &[&str], parts: &[&str]| {
        let common = ["train", at(&fixture.dense), "--data", at(&fixture.text), "--out", at(&out)];
        fails(&[&common[..], more].concat(), parts);
    };
    train(&["--config", at(&file)], &["bad-run.toml", "line 2", "speed"]);
    train(&["--steps", "5", "--set", "lrr=1"], &["lrr=1", "unknown field"]);
    train(&[], &["steps is not set; use --steps N or --tokens N"]);
    train(&["--steps", "5", "--lr=-1"], &["lr is -1", "use 0"]);
    train(&["--steps", "5", "--set", "batch=0"], &["batch is 0", "use 1"]);
    assert!(!out.exists());
}

#[test]
fn generation_options() {
    let fixture = fixture();
    let generate =
        |more: &[&str], parts: &[&str]| fails(&[&["generate", at(&fixture.dense)], more].concat(), parts);
    generate(&["--prompt", "x", "--top-p", "2"], &["top-p 2", "use 1"]);
    generate(&["--prompt", "x", "--temperature=-1"], &["temperature -1", "use 0"]);
    generate(&["--prompt", "", "--bos", "never"], &["prompt is empty", "--prompt"]);
    generate(&["--prompt-file", at(&fixture.dir.join("none.txt"))], &["none.txt"]);
    generate(&["--prompt", &"word ".repeat(300)], &["max_position_embeddings 128"]);
}

#[test]
fn unknown_preset_and_missing_tokenizer() {
    let fixture = fixture();
    let out = fixture.out("preset");
    fails(&["init", "--preset", "llama-9", "--out", at(&out)], &["llama-9", "tiny", "llama-3.2-1b"]);
    let none = fixture.dir.join("none.json");
    let args = ["init", "--preset", "tiny", "--tokenizer", at(&none), "--out", at(&out)];
    fails(&args, &["none.json"]);
    assert!(!out.exists());
}

/// A limit on the size of files stands in for a full disk: the system refuses in the middle of a file.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_new_directory() {
    let fixture = fixture();
    let config = fixture.dir.join("config.json");
    for (name, args) in [
        ("disk-init", vec!["init", "--config", at(&config)]),
        ("disk-export", vec!["export", at(&fixture.moe), "--as", "dense"]),
    ] {
        let out = fixture.out(name);
        let mut command = Command::new("sh");
        // 16 blocks of 512 or 1024 bytes; without the signal the write fails.
        let script = "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"";
        command.args(["-c", script, env!("CARGO_BIN_EXE_dsmoe")]);
        command.args(&args).args(["--quiet", "--out", at(&out)]);
        check_failure(&finish(command), &args, &[".safetensors", "File too large"]);
        let entries = fs::read_dir(&fixture.dir).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = entries.filter(|file| file.to_string_lossy().contains(name)).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn with_json_the_error_is_an_object_too() {
    let fixture = fixture();
    let run = run(&["inspect", at(&fixture.dir.join("nowhere")), "--json"]);
    check_failure(&run, &["inspect"], &["nowhere"]);
    let error: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(run.stderr.trim_end(), format!("dsmoe: error: {}", error["error"].as_str().unwrap()));
}
