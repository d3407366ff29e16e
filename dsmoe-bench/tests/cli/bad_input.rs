//! For every wrong input the command prints one line that names the file, the field and the fix.

use std::fs;

use serde_json::{Value, json};

use crate::common::{
    SEPARATOR, check_failure, config, copy, fails, on_text, path, read, run, succeeds, write,
};

/// Text of a file that a terminal would obey is shown escaped.
#[test]
fn control_characters_do_not_reach_the_terminal() {
    write("control.toml", "[[source]]\nname = \"a\"\ndata = [\"\\u001b[31mx\\u0007\"]\nweight = 1\n");
    let refused = run("eval dense --mixture control.toml --seq 16 --quiet");
    check_failure(&refused, "eval", &[r"\u{1b}[31mx\u{7}"]);
    let line = "train dense --data text.txt --steps 1 --set 'hold=\"\\u001b[31m\"' --out control";
    fails(line, &["hold"]);
    for run in [&refused, &run(&format!("{line} --quiet"))] {
        assert!(!run.stderr.contains(['\u{1b}', '\u{7}']), "{:?}", run.stderr);
    }
}

/// Replaces the header of a safetensors file; the data stays.
fn edit_header(bytes: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    edit(&mut header);
    let mut text = header.to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[8 + len..]].concat()
}

fn inspect_fails(dir: &str, parts: &[&str]) {
    fails(&format!("inspect {dir}"), parts);
    fails(&format!("generate {dir} --prompt x"), parts);
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn truncated_and_lying_headers() {
    copy("dense", "truncated");
    let bytes = fs::read(path("truncated/model.safetensors")).unwrap();
    let check = |bytes: &[u8], parts: &[&str]| {
        write("truncated/model.safetensors", bytes);
        inspect_fails("truncated", &[&["model.safetensors", "; "], parts].concat());
    };
    check(&bytes[..bytes.len() / 2], &[]);
    check(&bytes[..5], &[]);
    // A header of 2^62 bytes: nothing may be allocated for it.
    check(&[&(1u64 << 62).to_le_bytes(), &bytes[8..]].concat(), &["header"]);
    let huge = |header: &mut Value| header[UP]["shape"] = json!([1u64 << 40, 1u64 << 40]);
    check(&edit_header(&bytes, huge), &[UP]);
    check(&edit_header(&bytes, |header| header[UP]["data_offsets"] = json!([0, 1u64 << 50])), &[]);
    let dtype = |header: &mut Value| header[UP]["dtype"] = json!("I32");
    check(&edit_header(&bytes, dtype), &[UP, "I32", "; store it as F32"]);
}

#[test]
fn configurations() {
    for (name, key, value, parts) in [
        (
            "missing-tensor",
            "num_hidden_layers",
            json!(3),
            &["missing-tensor", "model.layers.2.", "missing", "; "][..],
        ),
        ("extra-tensor", "num_hidden_layers", json!(1), &["extra-tensor", "model.layers.1.", "; "]),
        (
            "shape",
            "intermediate_size",
            json!(128),
            &["model.safetensors", "model.layers.0.mlp.", "shape [", "; "],
        ),
        (
            "rope",
            "rope_scaling",
            json!({ "rope_type": "mrope", "factor": 4.0 }),
            &["config.json", "rope_scaling", "mrope", "llama3"],
        ),
        (
            "phimoe",
            "model_type",
            json!("phimoe"),
            &["config.json", "model_type", "phimoe", "experts of another kind", "qwen3"],
        ),
        ("huge", "hidden_size", json!(1u64 << 60), &["config.json", "hidden_size", "; "]),
        ("zero", "num_hidden_layers", json!(0), &["config.json", "num_hidden_layers", "; "]),
        ("gelu", "hidden_act", json!("gelu"), &["config.json", "hidden_act", "gelu", "silu"]),
    ] {
        copy("dense", name);
        let mut config = config();
        config[key] = value;
        write(&format!("{name}/config.json"), config.to_string());
        inspect_fails(name, parts);
    }
    copy("dense", "no-json");
    write("no-json/config.json", "{\n\"vocab_size\": ,");
    inspect_fails("no-json", &["config.json", "line 2", "; "]);
    inspect_fails("nowhere", &["nowhere", "no such directory"]);
    inspect_fails("no-org/no-model", &["no-org/no-model", "Hugging Face Hub", "hf download"]);

    write("bad-partition.json", "{\"layers\": [[[0, 1], [1, 2]]]}");
    for (rest, parts) in [
        (
            "dense --experts 7",
            &["config.json", "intermediate_size 64", "not divisible by 7", "1, 2, 4, 8"][..],
        ),
        ("dense --experts 4 --router-init warm(5)", &["warm", "5"]),
        (
            "dense --experts 4 --partition bad-partition.json",
            &["bad-partition.json", "layers[0] has 2 experts, not 4", "; set --experts to 2"],
        ),
    ] {
        fails(&format!("convert {rest} --out indivisible"), parts);
    }
    assert!(!path("indivisible").exists(), "a failed conversion leaves nothing");
}

#[test]
fn an_index_with_a_missing_shard() {
    succeeds("init --config config.json --out shards --max-shard-size 50kB");
    let files = fs::read_dir(path("shards")).unwrap().map(|entry| entry.unwrap().path());
    let mut shards: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    shards.sort();
    assert!(shards.len() > 1);
    fs::remove_file(&shards[1]).unwrap();
    // `generate` reads these files first.
    write("shards/tokenizer.json", read("tokenizer.json"));
    let name = shards[1].file_name().unwrap().to_str().unwrap();
    inspect_fails("shards", &["model.safetensors.index.json", name, "missing; "]);
}

#[test]
fn tokenizers_and_texts() {
    copy("dense", "tokenizer");
    let text = read("text.txt");
    dsmoe_datasets::train_bpe(text.split(SEPARATOR).map(str::to_owned), 400, &path("tokenizer")).unwrap();
    fails(
        "eval tokenizer --data text.txt --seq 16",
        &["tokenizer.json", "larger than the embedding", "399", "vocab_size is 320", "; use"],
    );
    fs::remove_file(path("tokenizer/tokenizer.json")).unwrap();
    fails("generate tokenizer --prompt x", &["no tokenizer.json", "; copy"]);

    for (name, bytes, parts) in [
        ("empty.txt", &b" \n "[..], ["empty.txt", "empty corpus"]),
        ("latin1.txt", b"caf\xe9 noir", ["latin1.txt", "byte 3"]),
        ("rows.jsonl", b"{\"body\": \"x\"}\n", ["rows.jsonl", "--text-column"]),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", ["cut.txt.gz", "truncated"]),
    ] {
        write(name, bytes);
        fails(&format!("eval dense --data {name} --seq 16"), &parts);
        fails(&format!("train dense --data {name} --out no-run --steps 1 --seq 16"), &parts);
    }
    write("short.txt", "so few");
    for (line, parts) in [
        (
            "train dense --data short.txt --out no-run --steps 1 --seq 64",
            &["fewer than one window of 65", "--seq"][..],
        ),
        ("eval dense --data text.txt --seq 4096", &["max_position_embeddings 128"]),
        ("eval dense --data text.txt --threshold 0.5", &["no gates", "convert"]),
    ] {
        fails(line, parts);
    }
}

/// Devices without an end and pipes that nobody writes to, in place of every file that is read whole.
#[cfg(unix)]
#[test]
fn files_without_an_end_and_pipes_without_a_writer() {
    copy("dense", "endless");
    std::os::unix::fs::symlink("/dev/zero", path("endless.toml")).unwrap();
    for line in [
        "eval dense --mixture endless.toml",
        "train dense --data text.txt --out endless-out --steps 1 --config endless.toml",
        "generate dense --prompt-file endless.toml",
        "generate dense --chat --messages endless.toml",
        "convert dense --experts 4 --partition endless.toml --out endless-out",
    ] {
        fails(line, &["endless.toml"]);
    }
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let file = path("endless").join(name);
        let kept = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&file).status().unwrap();
        assert!(made.success());
        fails("generate endless --prompt x", &[name, "not a regular file"]);
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        fails("generate endless --prompt x", &[name, "not a regular file"]);
        fs::remove_file(&file).unwrap();
        fs::write(&file, kept).unwrap();
    }
}

/// Pipes that nobody writes to, in place of files in folders.
#[cfg(unix)]
#[test]
fn pipes_inside_folders() {
    let pipe = |name: &str| {
        fs::create_dir_all(path(name).parent().unwrap()).unwrap();
        let made = std::process::Command::new("mkfifo").arg(path(name)).status().unwrap();
        assert!(made.success());
    };
    pipe("pipes/shelf/dsmoe-manifest.json");
    fails("data verify pipes/shelf", &["dsmoe-manifest.json", "not a regular file"]);
    pipe("pipes/record/results.json");
    fs::write(path("pipes/page.md"), "<!-- reproduce record -->\n<!-- /reproduce -->\n").unwrap();
    fails("reproduce splice pipes/page.md", &["results.json", "not a regular file"]);
    pipe("pipes/record/setup.json");
    fails("reproduce merge pipes/record --out pipes/merged", &["setup.json", "not a regular file"]);
    pipe("pipes/track/first.json");
    fails(
        "bench history pipes/track --out pipes/track.html",
        &["none of the files is a record", "first.json"],
    );
}

/// Reports name such paths as well as they can.
#[cfg(unix)]
#[test]
fn paths_that_are_not_utf8() {
    use crate::common::{command, finish};
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let odd = |name: &str, end: &str| {
        let bytes = [name.as_bytes(), b"\xff", end.as_bytes()].concat();
        path("").join(OsString::from_vec(bytes))
    };
    let (model, text) = (odd("model", ""), odd("text", ".txt"));
    copy("dense", &model);
    fs::copy(path("text.txt"), &text).unwrap();
    for (words, last) in [
        ("inspect", None),
        ("eval --seq 16 --limit-tokens 64 --data", Some(&text)),
        ("convert --experts 4 --out", Some(&odd("sparse", ""))),
        ("train --data text.txt --steps 1 --batch 1 --seq 16 --out", Some(&odd("run", ""))),
        ("export --as native --out", Some(&odd("copy", ""))),
        ("prune --method magnitude --budget 0.8 --out", Some(&odd("pruned", ""))),
    ] {
        let (verb, rest) = words.split_once(' ').unwrap_or((words, ""));
        let mut command = command(verb);
        command.arg(&model).args(rest.split_whitespace()).args(last).arg("--json");
        let run = finish(command);
        assert_eq!(run.code, 0, "{words}: {}", run.stderr);
        serde_json::from_str::<Value>(&run.stdout).unwrap();
        assert!(run.stdout.contains('\u{FFFD}'), "{words}: {}", run.stdout);
    }
}

#[test]
fn output_folders() {
    write("occupied/precious", "x");
    let commands = [
        "convert dense --experts 4",
        "export moe --as dense",
        "init --config config.json",
        "train dense --data text.txt --steps 1 --seq 16",
    ];
    for line in commands {
        let parts = ["occupied is not empty; choose another --out", "--force"];
        fails(&format!("{line} --out occupied"), &parts);
    }
    assert_eq!(read("occupied/precious"), "x");
    for line in [
        "convert dense --experts 4 --out dense",
        "export moe --as dense --out moe",
        "train dense --data text.txt --steps 1 --out dense",
    ] {
        fails(&format!("{line} --force"), &["holds the model that is read; choose another --out"]);
    }
    fails(&format!("{} --out occupied --resume", commands[3]), &["occupied", "holds no run"]);
}

#[test]
fn resuming_what_is_not_the_same_run() {
    let train = |rest: &str| format!("train {rest} {} --out one-run --batch 2 --seq 16 --steps 4", on_text());
    succeeds(&train("dense --stop-after 2"));
    for (rest, parts) in [
        ("moe --resume", &["state.json", "the starting model was", "; give the model"][..]),
        ("dense --resume --lr 0.5", &["state.json", "lr was", "is now 0.5; use the old"]),
        ("dense --active-target 0.5 --force", &["active_target", "dense model"]),
    ] {
        fails(&train(rest), parts);
    }
}

#[test]
fn settings_of_a_run() {
    write("bad-run.toml", "steps = 5\nspeed = 3\n");
    for (more, parts) in [
        ("--config bad-run.toml", &["bad-run.toml", "line 2", "speed"][..]),
        ("--steps 5 --set lrr=1", &["lrr=1", "unknown field"]),
        ("", &["steps is not set; use --steps N or --tokens N"]),
        ("--steps 5 --lr=-1", &["lr is -1", "use 0"]),
        ("--steps 5 --set batch=0", &["batch is 0", "use 1"]),
    ] {
        fails(&format!("train dense --data text.txt --out bad-settings {more}"), parts);
    }
    assert!(!path("bad-settings").exists());
}

#[test]
fn generation_options_presets_and_tokenizers() {
    fails("generate dense --prompt '' --bos never", &["prompt is empty", "--prompt"]);
    fails("generate dense --prompt-file none.txt", &["none.txt"]);
    fails(&format!("generate dense --prompt '{}'", "word ".repeat(300)), &["max_position_embeddings 128"]);
    fails("init --preset llama-9 --out preset", &["llama-9", "tiny", "llama-3.2-1b"]);
    fails("init --preset tiny --tokenizer none.json --out preset", &["none.json"]);
    assert!(!path("preset").exists());
}

#[test]
fn with_json_the_error_is_an_object_too() {
    let run = run("inspect nowhere --json");
    check_failure(&run, "inspect", &["nowhere"]);
    let error = run.json();
    assert_eq!(run.stderr.trim_end(), format!("dsmoe: error: {}", error["error"].as_str().unwrap()));
}
