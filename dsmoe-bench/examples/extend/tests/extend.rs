//! Every command uses the additions of this program as it uses the built-in ones.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

/// Runs a command in the folder; returns its status, what it printed and what it said.
fn run(dir: &Path, line: &str) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_dsmoe-extend"))
        .args(line.split_whitespace())
        .current_dir(dir)
        .output()
        .expect("the program");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn json_of(dir: &Path, line: &str) -> Value {
    let (code, printed, said) = run(dir, &format!("{line} --json --quiet"));
    assert_eq!(code, 0, "{line}: {said}");
    serde_json::from_str(&printed).expect("JSON")
}

fn fails(dir: &Path, line: &str, parts: &[&str]) {
    let (code, _, said) = run(dir, line);
    assert_eq!(code, 1, "{line}: {said}");
    assert!(parts.iter().all(|part| said.contains(part)), "{line}: {said}");
}

/// Writes a gzip file of the content of another one.
fn gzip(from: &Path, to: &Path) {
    let mut encoder = GzEncoder::new(fs::File::create(to).expect("a file"), Compression::default());
    encoder.write_all(&fs::read(from).expect("a file")).expect("a disk with room");
    encoder.finish().expect("a disk with room");
}

/// Writes two rows of the benchmark `capitals`.
fn write_rows(path: &Path) {
    let row = |country: &str, city: &str, others: [&str; 2]| {
        format!("{{\"country\": \"{country}\", \"capital\": \"{city}\", \"others\": {others:?}}}\n")
    };
    let rows = row("Peru", "Lima", ["Paris", "Accra"]) + &row("Ghana", "Accra", ["Lima", "Paris"]);
    fs::write(path, rows).expect("a file");
}

/// A folder with subtitles, a tokenizer and a tiny model `dense`.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let world = dsmoe_datasets::world::World::new(3);
    let sentences: Vec<String> = world
        .documents(dsmoe_datasets::world::Domain::ALL[0], 30_000)
        .flat_map(|document| document.split(". ").map(|part| part.replace('\n', " ")).collect::<Vec<_>>())
        .filter(|sentence| !sentence.trim().is_empty())
        .collect();
    dsmoe_datasets::train_bpe(sentences.iter().cloned(), 320, dir.path()).expect("a tokenizer");
    for (film, sentences) in sentences.chunks(40).enumerate() {
        let mut text = String::new();
        for (i, sentence) in sentences.iter().enumerate() {
            text += &format!(
                "{}\r\n00:00:{:02},000 --> 00:00:{:02},900\r\n{sentence}\r\n\r\n",
                i + 1,
                i % 60,
                i % 60
            );
        }
        fs::create_dir_all(dir.path().join("films")).expect("a folder");
        fs::write(dir.path().join(format!("films/{film:03}.srt")), text).expect("a file");
    }
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1}"#;
    fs::write(dir.path().join("config.json"), config).expect("a file");
    json_of(dir.path(), "init --config config.json --tokenizer tokenizer.json --out dense");
    dir
}

#[test]
fn what_is_added_works_in_every_command() {
    let dir = folder();
    let dir = dir.path();

    // The method.
    let methods = json_of(dir, "methods");
    let methods = methods["methods"].as_array().expect("a list");
    let last = methods.last().expect("a method");
    assert!(
        methods.len() > 20 && last["name"] == "narrow" && last["settings"][0]["name"] == "scale",
        "{last}"
    );
    let pruned = json_of(dir, "prune dense --method narrow --budget 80% --set scale=0.9 --out narrow");
    assert!((pruned["reached"].as_f64().expect("a share") - 1.0).abs() < 0.01, "{pruned}");
    fails(dir, "prune dense --method narrow --budget 80% --set scale=0 --out none", &["scale: cannot be 0"]);
    fails(dir, "prune dense --method narrow --budget 5% --out none", &["budget 0.05: is out of reach"]);

    // Its FFN: loaded, trained on text of the added format, measured, generated from, saved again.
    let config = fs::read_to_string(dir.join("narrow/config.json")).expect("config.json");
    assert!(config.contains("\"type\": \"scaled\""), "{config}");
    let inspected = json_of(dir, "inspect narrow");
    assert!(inspected.to_string().contains("scaled"), "{inspected}");
    let before = json_of(dir, "eval narrow --data films --seq 32 --limit-tokens 2000");
    let train =
        "train narrow --data films --out run --steps 12 --batch 4 --seq 32 --lr 5e-3 --set save_every=6";
    assert_eq!(run(dir, train).0, 0);
    let after = json_of(dir, "eval run --data films --seq 32 --limit-tokens 2000");
    let nll = |report: &Value| report["nll"].as_f64().expect("a number");
    assert!(nll(&after) < nll(&before) - 0.05, "{before} {after}");
    let scale = |name: &str| fs::read(dir.join(name).join("model.safetensors")).expect("weights");
    assert_ne!(scale("narrow"), scale("run"));
    json_of(dir, "generate run --prompt word --max-tokens 4");
    json_of(dir, "export run --as native --out copy");
    fails(dir, "export run --as dense --out flat", &["ffn.type is \"scaled\", which has no dense form"]);
    fails(dir, "export run --as gguf --out flat", &["scaled"]);

    // The benchmark, whose answers depend on the model, and the same one by a file with another name.
    write_rows(&dir.join("rows.jsonl"));
    let scored = json_of(dir, "eval run --tasks capitals --task-file capitals=rows.jsonl");
    assert_eq!(scored["n-samples"]["capitals"]["effective"], 2, "{scored}");
    let own = include_str!("../src/capitals.toml").replace("\"capitals\"", "\"cities\"")
        + "files = [\"rows.jsonl\"]\n";
    fs::write(dir.join("cities.toml"), &own).expect("a file");
    let same = json_of(dir, "eval run --task cities.toml");
    for metric in ["acc,none", "acc_norm,none"] {
        let of = |scored: &Value, task: &str| scored["results"][task][metric].as_f64().expect("a number");
        assert_eq!(of(&same, "cities"), of(&scored, "capitals"), "{metric}");
    }
    fs::write(dir.join("taken.toml"), own.replace("cities", "capitals")).expect("a file");
    fails(
        dir,
        "eval run --task taken.toml",
        &["the task \"capitals\" is registered twice; give one of the two"],
    );
    fs::write(dir.join("wrong.toml"), own.replace("prompt", "promt")).expect("a file");
    fails(dir, "eval run --task wrong.toml", &["wrong.toml: line 5: unknown field `promt`"]);

    // A program that does not register the type names what is missing.
    let other = dir.join("copy/config.json");
    fs::write(&other, config.replace("\"scaled\"", "\"shifted\"")).expect("a file");
    fails(
        dir,
        "inspect copy",
        &["ffn.type is \"shifted\" and not known; use duo, scaled, topk, or load it by a program"],
    );

    // The format as text to calibrate on, compressed, and damaged.
    json_of(dir, "convert dense --calib films --samples 16 --seq 32 --active-target 0.5 --out fitted");
    json_of(dir, "prune dense --method wanda --budget 80% --calib films --samples 8 --seq 32 --out wanda");
    gzip(&dir.join("films/000.srt"), &dir.join("film.srt.gz"));
    let plain = json_of(dir, "eval run --data films/000.srt --seq 32");
    assert_eq!(nll(&json_of(dir, "eval run --data film.srt.gz --seq 32")), nll(&plain));
    fs::write(dir.join("bad.srt"), "1\nno times\n").expect("a file");
    for line in [
        "eval run --data bad.srt",
        "convert dense --calib bad.srt --samples 8 --seq 32 --active-target 0.5 --out none",
        "prune dense --method wanda --budget 80% --calib bad.srt --samples 8 --seq 32 --out none",
    ] {
        fails(dir, line, &["bad.srt: row 1: no subtitle begins here; begin each subtitle with"]);
    }
}

/// A profile without its text and model.
const PROFILE: &str = r#"
name = "tiny"
about = "seconds"
seeds = 1
experts = 8
active = 0.375
paper = "1b"
milestones = [0, 1]
outputs = ["table1", "frontier"]
# text and model
train = { steps = 6, batch = 4, seq = 64, lr = 1e-3, bos = "always" }
calibration = { samples = 8 }
measure = { windows = 4, sweep_windows = 2, items = 4, thresholds = [0.5], late_step = 0.2, prefill = 32, decode = 4, resamples = 100, tasks = ["capitals"] }

[[method]]
name = "dense"
role = "dense"
make = "dense"

[[method]]
name = "dsmoe-paper"
role = "paper"
make = "dsmoe-paper"

[[method]]
name = "first-neurons"
role = "control"
make = "narrow"
settings = { scale = 0.9 }
"#;

const WORLD: &str = r#"
world = { seed = 0, bytes = 100_000, vocab = 512 }
model = { hidden = 32, intermediate = 64, layers = 2, heads = 2, kv_heads = 2, positions = 512 }
pretrain = { steps = 10, batch = 4, seq = 64, lr = 4e-3, bos = "always" }
"#;

const FILMS: &str = r#"
source = [{ name = "films", data = "films" }]
held_out = [{ name = "last", data = "last.srt.gz" }]
model = {}
"#;

/// Reproduces with this text and model; the results have the added method, with a score in the added benchmark.
fn reproduces(dir: &Path, text_and_model: &str, arguments: &str) -> Value {
    fs::write(dir.join("tiny.toml"), PROFILE.replace("# text and model", text_and_model)).expect("a file");
    fs::create_dir_all(dir.join("benchmarks/capitals")).expect("a folder");
    write_rows(&dir.join("benchmarks/capitals/validation.jsonl"));
    let line = format!("reproduce --profile tiny.toml --task-data benchmarks --out out --quiet {arguments}");
    let (code, _, said) = run(dir, &line);
    assert_eq!(code, 0, "{said}");
    let results: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("out/results.json")).expect("results"))
            .expect("JSON");
    let row = results["methods"].as_array().expect("rows").iter().find(|row| row["name"] == "first-neurons");
    let row = row.expect("the row");
    assert!(row["ppl"]["mean"].as_f64().expect("a number") > 1.0, "{row}");
    let tasks = row["tasks"].as_array().expect("a list");
    assert_eq!(
        (tasks.len(), &tasks[0]["task"], &tasks[0]["items"]),
        (1, &"capitals".into(), &2.into()),
        "{row}"
    );
    assert!((0.0..=100.0).contains(&tasks[0]["percent"]["mean"].as_f64().expect("a number")), "{row}");
    let report = fs::read_to_string(dir.join("out/report.html")).expect("the report");
    assert!([">first-neurons<", ">capitals<"].iter().all(|cell| report.contains(cell)));
    results
}

#[test]
fn a_reproduction_has_the_added_method_and_benchmark() {
    let dir = tempfile::tempdir().expect("a folder");
    reproduces(dir.path(), WORLD, "");
}

#[test]
fn a_reproduction_reads_the_added_format() {
    let dir = folder();
    let dir = dir.path();
    gzip(&dir.join("films/000.srt"), &dir.join("last.srt.gz"));
    fs::remove_file(dir.join("films/000.srt")).expect("a file");
    let results = reproduces(dir, FILMS, "--model dense --data .");
    assert_eq!(results["methods"][0]["domains"][0]["name"], "last", "{results}");
}
