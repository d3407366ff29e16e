//! GGUF files wherever a model is asked for: tokenizers against those of Hugging Face, every command on a small file, and
//! a real model.

use std::path::{Path, PathBuf};
use std::process::Command;

use dsmoe_core::Config;
use dsmoe_core::gguf::tokenizer_files;
use dsmoe_datasets::{Bos, Tokenizer, TokenizerFiles};
use dsmoe_kernels::testing::{required, shared, skipped};
use serde_json::Value;

const TEXTS: [&str; 6] = [
    "In 1999 $1,234.56 don't!",
    "  two  spaces\n\n\ttab ",
    "Zürich 東京 🙂",
    "a<s>b</s> <|im_end|>",
    "",
    "def f(x):\n    return x**2",
];

/// The file that `scripts/get-smollm2` fetches; none when it is absent and not required.
fn smollm2(test: &str) -> Option<PathBuf> {
    let cache = || {
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home)?;
        Some(cache.join("dsmoe/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    };
    let file = std::env::var_os("DSMOE_SMOLLM2").map(PathBuf::from).or_else(cache)?;
    if file.is_file() {
        return Some(file);
    }
    assert!(!required("smollm2"), "{test}: no {}", file.display());
    skipped(test, &format!("no {}; run scripts/get-smollm2", file.display()));
    None
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The tokenizer of a GGUF file of that many tokens.
fn tokenizer(file: &Path, vocab_size: usize) -> Tokenizer {
    let files = tokenizer_files(file).unwrap().map(|(name, bytes)| (name.to_owned(), bytes));
    Tokenizer::new(&TokenizerFiles::named(file.to_path_buf(), files), None, vocab_size).unwrap()
}

fn run(args: &[&str]) -> Result<Value, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_dsmoe"))
        .args(args)
        .args(["--json", "--quiet"])
        .env_remove("DSMOE_ISA")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    } else {
        Err(error)
    }
}

fn dsmoe(args: &[&str]) -> Value {
    run(args).unwrap_or_else(|error| panic!("{args:?}: {error}"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn tokenizers_give_the_ids_of_hugging_face() {
    let Some(shared) = shared("tokenizers_give_the_ids_of_hugging_face", "golden/gguf") else { return };
    let (dir, zoo) = (shared.join("golden/gguf"), shared.join("golden/zoo"));
    let Value::Object(golden) = read(&dir.join("golden.json")) else { panic!("golden.json") };
    let story = std::fs::read_to_string(zoo.join("text.txt")).unwrap();
    for (model, golden) in golden {
        let case = zoo.join(golden["zoo_case"].as_str().unwrap());
        // A link is stored as a file that holds its target.
        let file = |name: &str| {
            let bytes = std::fs::read(case.join(name)).unwrap();
            let link = std::str::from_utf8(&bytes).ok().filter(|link| link.starts_with("../"));
            link.map(|link| std::fs::read(case.join(link.trim())).unwrap()).unwrap_or(bytes)
        };
        let (json, settings) = (file("tokenizer.json"), file("tokenizer_config.json"));
        let files = [("tokenizer.json".to_owned(), json), ("tokenizer_config.json".to_owned(), settings)];
        let theirs = Tokenizer::new(&TokenizerFiles::named(case, files), None, 512).unwrap();
        let ours = tokenizer(&dir.join(format!("{model}.gguf")), 512);
        for text in story.split("<|endoftext|>").chain(TEXTS) {
            for bos in [Bos::Never, Bos::Auto] {
                assert_eq!(
                    ours.encode(text, bos).unwrap(),
                    theirs.encode(text, bos).unwrap(),
                    "{model}: {text:?}"
                );
            }
            let ids = theirs.encode(text, Bos::Never).unwrap();
            assert_eq!(
                ours.decode(&ids, false).unwrap(),
                theirs.decode(&ids, false).unwrap(),
                "{model}: {text:?}"
            );
        }
    }
}

#[test]
fn exported_tokenizers_give_the_same_ids() {
    let Some(shared) = shared("exported_tokenizers_give_the_same_ids", "golden/gguf") else { return };
    let work = tempfile::tempdir().unwrap();
    let story = std::fs::read_to_string(shared.join("golden/stories_100.txt")).unwrap();
    for name in ["stories-260k", "tinystories-656k", "babyllama-1m"] {
        let model = shared.join("models").join(name);
        let file = work.path().join(format!("{name}.gguf"));
        dsmoe(&["export", text(&model), "--as", "gguf", "--dtype", "q8_0", "--out", text(&file)]);
        let size = Config::load(&model).unwrap().vocab_size;
        let (ours, theirs) = (tokenizer(&file, size), Tokenizer::load(&model, None, size).unwrap());
        for text in story.split("<|endoftext|>").chain(TEXTS) {
            let same = |bos| ours.encode(text, bos).unwrap() == theirs.encode(text, bos).unwrap();
            assert!(same(Bos::Auto) && same(Bos::Never), "{name}: {text:?}");
        }
    }
}

#[test]
fn every_command_takes_a_file() {
    let Some(shared) = shared("every_command_takes_a_file", "golden/gguf") else { return };
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let file = shared.join("golden/gguf/llama-Q4_1.gguf");
    let (file, story) = (text(&file), shared.join("golden/zoo/text.txt"));
    let data = ["--data", text(&story), "--doc-separator", "<|endoftext|>", "--seq", "32"];
    let with = |args: &[&str]| dsmoe(&[args, &data].concat());

    let shown = dsmoe(&["inspect", file]);
    assert_eq!((&shown["dtype"], &shown["tensors"]), (&"F32+Q4_1".into(), &20.into()));
    let nll = |model: &str| with(&["eval", model, "--dtype", "f32"])["nll"].as_f64().unwrap();
    let exact = nll(file);
    let (plain, narrow) = (at("plain"), at("narrow"));
    dsmoe(&["import", file, "--dtype", "f32", "--out", &plain]);
    assert_eq!(nll(&plain), exact);
    dsmoe(&["import", file, "--out", &narrow]);
    let rounded = nll(&narrow);
    assert!(rounded != exact && (rounded - exact).abs() < 2e-2, "{rounded} {exact}");
    assert!(run(&["import", file, "--out", &narrow]).unwrap_err().contains("is not empty"));

    let greedy = |model: &str| {
        let args =
            ["generate", model, "--prompt", "Once", "--max-tokens", "12", "--ignore-eos", "--dtype", "f32"];
        dsmoe(&args)["token_ids"].clone()
    };
    assert_eq!(greedy(file), greedy(&plain));
    let (sparse, run_dir, pruned, native) = (at("sparse"), at("run"), at("pruned"), at("native"));
    dsmoe(&[
        "convert",
        file,
        "--experts",
        "4",
        "--router-init",
        "open",
        "--gate-value",
        "binary",
        "--out",
        &sparse,
    ]);
    assert!((nll(&sparse) - exact).abs() < 1e-4);
    let train =
        ["train", &sparse, "--steps", "2", "--batch", "2", "--active-target", "0.5", "--out", &run_dir];
    with(&train);
    assert!(nll(&run_dir).is_finite());
    let train = at("dense-run");
    with(&["train", file, "--steps", "1", "--batch", "2", "--out", &train]);
    assert!(nll(&train).is_finite());
    let prune = ["prune", file, "--method", "llm-pruner-channel", "--budget", "0.8", "--out", &pruned];
    dsmoe(&[&prune[..], &["--calib", text(&story), "--samples", "4", "--seq", "32"]].concat());
    assert!(nll(&pruned).is_finite());
    dsmoe(&["export", file, "--as", "native", "--dtype", "bf16", "--out", &native]);
    assert_eq!(nll(&native), rounded);
    let again = at("again.gguf");
    dsmoe(&["export", file, "--as", "gguf", "--dtype", "f32", "--out", &again]);
    assert_eq!(nll(&again), exact);
    let message = run(&["export", &sparse, "--as", "gguf", "--out", &at("no.gguf")]).unwrap_err();
    assert!(message.contains("dsmoe is present: llama.cpp has no graph"), "{message}");
    let message =
        run(&["export", &plain, "--as", "native", "--dtype", "q8_0", "--out", &at("no")]).unwrap_err();
    assert!(message.contains("--dtype q8_0 is for --as gguf"), "{message}");
    let message = run(&["import", &plain, "--out", &at("no")]).unwrap_err();
    assert!(message.contains("is no GGUF file"), "{message}");
    let message = run(&["inspect", text(&story)]).unwrap_err();
    assert!(
        message.contains("header is not that of GGUF; name a .gguf file or a model directory"),
        "{message}"
    );
}

#[test]
fn a_real_model_has_the_ids_and_the_text_of_transformers() {
    let test = "a_real_model_has_the_ids_and_the_text_of_transformers";
    let (Some(shared), Some(file)) = (shared(test, "golden/smollm2"), smollm2(test)) else { return };
    let golden = shared.join("golden/smollm2");
    let ours = tokenizer(&file, 49_152);
    for row in read(&golden.join("tokens.json"))["rows"].as_array().unwrap() {
        let (text, expected) = (row["text"].as_str().unwrap(), ids(&row["ids"]));
        for bos in [Bos::Never, Bos::Auto] {
            assert_eq!(ours.encode(text, bos).unwrap(), expected, "{text:?}");
        }
        assert_eq!(ours.decode(&expected, false).unwrap(), row["decoded"].as_str().unwrap());
    }
    let chat = read(&golden.join("chat.json"));
    assert_eq!(ours.encode(chat["text"].as_str().unwrap(), Bos::Never).unwrap(), ids(&chat["ids"]));
    let row = &read(&golden.join("greedy.json"))[0];
    let prompt = row["prompt"].as_str().unwrap();
    let args =
        ["generate", text(&file), "--prompt", prompt, "--bos", "never", "--dtype", "f32", "--ignore-eos"];
    let report = dsmoe(&[&args[..], &["--max-tokens", "8"]].concat());
    assert_eq!(ids(&report["new_token_ids"]), ids(&row["new_ids"])[..8]);
}
