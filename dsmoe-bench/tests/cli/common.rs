//! A tiny model with its tokenizer and text, and the built command to run on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use dsmoe_datasets::world::{Domain, World};
use serde_json::{Value, json};

/// Paths of the models and texts that the tests of one file share and do not change.
pub(crate) struct Fixture {
    pub(crate) dir: PathBuf,
    pub(crate) text: PathBuf,
    /// Two layers, hidden 32, intermediate 64, vocabulary 320, 128 positions.
    pub(crate) dense: PathBuf,
    /// `dense` with four experts.
    pub(crate) moe: PathBuf,
}

pub(crate) const SEPARATOR: &str = dsmoe_datasets::DOC_SEPARATOR;

pub(crate) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
    })
}

/// About `bytes` bytes of documents of the embedded world of that seed.
pub(crate) fn text_of(seed: u64, bytes: u64) -> String {
    let documents = |world: &World| -> Vec<String> {
        Domain::ALL
            .into_iter()
            .flat_map(|domain| world.documents(domain, bytes).collect::<Vec<_>>())
            .collect()
    };
    documents(&World::new(seed)).join(SEPARATOR)
}

/// Made once per test binary.
pub(crate) fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        fs::create_dir_all(&dir).unwrap();
        let fixture = Fixture {
            text: dir.join("text.txt"),
            dense: dir.join("dense"),
            moe: dir.join("moe"),
            dir: dir.clone(),
        };
        let text = text_of(1, 40_000);
        fs::write(&fixture.text, &text).unwrap();
        dsmoe_datasets::train_bpe(text.split(SEPARATOR).map(str::to_owned), 320, &dir).unwrap();
        fs::write(dir.join("config.json"), config().to_string()).unwrap();
        let tokenizer = dir.join("tokenizer.json");
        succeeds(&[
            "init",
            "--config",
            at(&dir.join("config.json")),
            "--tokenizer",
            at(&tokenizer),
            "--out",
            at(&fixture.dense),
        ]);
        succeeds(&["convert", at(&fixture.dense), "--experts", "4", "--out", at(&fixture.moe)]);
        fixture
    })
}

impl Fixture {
    /// A path for the output of one test.
    pub(crate) fn out(&self, name: &str) -> PathBuf {
        self.dir.join(format!("out-{name}"))
    }

    /// A copy of the dense model for a test to spoil.
    pub(crate) fn copy_of_dense(&self, name: &str) -> PathBuf {
        let copy = self.out(name);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(&self.dense).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        copy
    }

    /// The dense model with another field in its config.json.
    pub(crate) fn with_config(&self, name: &str, key: &str, value: Value) -> PathBuf {
        let copy = self.copy_of_dense(name);
        let mut config = config();
        config[key] = value;
        fs::write(copy.join("config.json"), config.to_string()).unwrap();
        copy
    }
}

pub(crate) fn at(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsmoe"));
    command.args(args).env_remove("DSMOE_ISA").env_remove("DSMOE_SHARED").stdin(Stdio::null());
    command
}

/// How a run of the command ended.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn run(args: &[&str]) -> Run {
    finish(command(args))
}

pub(crate) fn finish(mut command: Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn succeeds(args: &[&str]) -> String {
    let run = run(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    run.stdout
}

/// The one object that a command prints with `--json`.
pub(crate) fn json_of(args: &[&str]) -> Value {
    let stdout = succeeds(&[args, &["--json"]].concat());
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

/// Exit code 1 and one line on stderr that holds all of `parts`.
pub(crate) fn fails(args: &[&str], parts: &[&str]) {
    let run = run(&[args, &["--quiet"]].concat());
    check_failure(&run, args, parts);
    assert_eq!(run.stdout, "", "{args:?}");
}

pub(crate) fn check_failure(run: &Run, args: &[&str], parts: &[&str]) {
    assert_eq!(run.code, 1, "{args:?}: {}{}", run.stdout, run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{args:?}: {}", run.stderr);
    assert!(run.stderr.starts_with("dsmoe: error: "), "{args:?}: {}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "{args:?}: no `{part}` in: {}", run.stderr);
    }
}
