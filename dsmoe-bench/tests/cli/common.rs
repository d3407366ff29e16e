//! A folder with tiny models, their tokenizer and text, and the built command that runs in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

pub(crate) use dsmoe_datasets::DOC_SEPARATOR as SEPARATOR;
use dsmoe_datasets::world::{Domain, World};
use serde_json::{Value, json};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_dsmoe");

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
    let world = World::new(seed);
    let documents = Domain::ALL.into_iter().flat_map(|domain| world.documents(domain, bytes));
    documents.collect::<Vec<_>>().join(SEPARATOR)
}

/// The folder that all commands run in, made once per test binary. No test changes what is made here:
/// - `text.txt`, `config.json` and `tokenizer.json`,
/// - `dense`: two layers, hidden 32, intermediate 64, vocabulary 320, 128 positions,
/// - `moe`: `dense` with four experts.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        fs::create_dir_all(&dir).unwrap();
        let text = text_of(1, 40_000);
        fs::write(dir.join("text.txt"), &text).unwrap();
        dsmoe_datasets::train_bpe(text.split(SEPARATOR).map(str::to_owned), 320, &dir).unwrap();
        fs::write(dir.join("config.json"), config().to_string()).unwrap();
        for line in [
            "init --config config.json --tokenizer tokenizer.json --out dense",
            "convert dense --experts 4 --out moe",
        ] {
            let run = finish(command_in(&dir, PROGRAM, line));
            assert_eq!(run.code, 0, "{line}: {}", run.stderr);
        }
        dir
    })
}

/// A path in the folder.
pub(crate) fn path(name: &str) -> PathBuf {
    folder().join(name)
}

/// Writes a file below the folder.
pub(crate) fn write(name: &str, bytes: impl AsRef<[u8]>) {
    let path = path(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

pub(crate) fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap()
}

pub(crate) fn read_json(name: &str) -> Value {
    serde_json::from_str(&read(name)).unwrap()
}

pub(crate) fn weights(dir: &str) -> Vec<u8> {
    fs::read(path(dir).join("model.safetensors")).unwrap()
}

/// Makes a model of 3 M parameters, which takes seconds to evaluate some hundred thousand tokens, and returns its folder `name`.
pub(crate) fn large_model(name: &str) -> &str {
    let mut large = config();
    for (key, value) in [("hidden_size", 192), ("intermediate_size", 768), ("num_hidden_layers", 6)] {
        large[key] = value.into();
    }
    write(&format!("{name}.json"), large.to_string());
    succeeds(&format!("init --config {name}.json --tokenizer tokenizer.json --out {name}"));
    name
}

/// Copies a folder and all in it. The tests of this program run at the same time, so a test that changes what others read changes
/// a copy of its own.
pub(crate) fn copy(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let (from, to) = (folder().join(from), folder().join(to));
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy(source, target);
        } else {
            fs::copy(source, target).unwrap();
        }
    }
}

/// The arguments of a short training or evaluation on the text.
pub(crate) fn on_text() -> String {
    format!("--data text.txt --doc-separator {SEPARATOR}")
}

/// The arguments of a short calibration on the text.
pub(crate) fn calib() -> String {
    format!("{} --samples 8 --seq 32", on_text().replacen("--data", "--calib", 1))
}

/// The loss of the model in `dir` on some of the text.
pub(crate) fn nll(dir: &str) -> f64 {
    number(&json_of(&format!("eval {dir} {} --seq 32 --limit-tokens 600", on_text()))["nll"])
}

/// The words of a command line. What stands between single quotes is one word.
fn words(line: &str) -> Vec<String> {
    let parts = line.split('\'').enumerate();
    let word = |(i, part): (usize, &str)| match i % 2 {
        0 => part.split_whitespace().map(str::to_owned).collect(),
        _ => vec![part.to_owned()],
    };
    parts.flat_map(word).collect()
}

fn command_in(dir: &Path, program: &str, line: &str) -> Command {
    let mut command = Command::new(program);
    command.args(words(line)).current_dir(dir).stdin(Stdio::null());
    // Without a terminal, help wraps at COLUMNS.
    command.env_remove("DSMOE_ISA").env_remove("DSMOE_SHARED").env("COLUMNS", "100");
    command
}

pub(crate) fn command(line: &str) -> Command {
    command_in(folder(), PROGRAM, line)
}

/// The command with files limited to that many blocks of 512 or 1024 bytes: writing more fails as on a full disk.
pub(crate) fn limited(blocks: u32, line: &str) -> Command {
    // Without the signal the write fails.
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut command = command_in(folder(), "sh", "");
    command.args(["-c", &script, PROGRAM]).args(words(line));
    command
}

/// The command with that many KiB of address space.
#[cfg(target_os = "linux")]
pub(crate) fn in_memory(kilobytes: u32, line: &str) -> Command {
    let script = format!("ulimit -v {kilobytes}; exec \"$0\" \"$@\"");
    let mut command = command_in(folder(), "sh", "");
    command.args(["-c", &script, PROGRAM]).args(words(line));
    command
}

/// The command as `nohup` starts it, or as a terminal does.
pub(crate) fn with_hangup(is_ignored: bool, line: &str) -> Command {
    let trap = if is_ignored { "trap '' HUP" } else { "trap - HUP" };
    let mut command = command_in(folder(), "sh", "");
    command.args(["-c", &format!("{trap}; exec \"$0\" \"$@\""), PROGRAM]).args(words(line));
    command
}

/// How a run of the command ended.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "{}", self.stdout);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub(crate) fn finish(mut command: Command) -> Run {
    command.output().unwrap().into()
}

pub(crate) fn run(line: &str) -> Run {
    finish(command(line))
}

pub(crate) fn spawn(line: &str) -> Child {
    command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until `ready`, and fails after a minute.
pub(crate) fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ready() {
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        sleep(Duration::from_millis(1));
    }
}

/// Waits until a process listens for SIGTERM; where the system does not tell, for a second.
pub(crate) fn wait_for_handler(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    if !Path::new(&status).exists() {
        return sleep(Duration::from_secs(1));
    }
    let is_caught = || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mask = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        // Bit 0 is signal 1.
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask >> 14 & 1 == 1)
    };
    wait_until("a handler of signals", is_caught);
}

/// Sends SIGTERM, and checks that the command ends soon, with the exit status of an interruption and these words.
pub(crate) fn ends_soon(child: Child, words: &[&str]) {
    let asked = Instant::now();
    let ended = end(child, "-TERM");
    // Two seconds, and what a busy machine adds.
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
    assert_eq!(ended.code, 130, "{}", ended.stderr);
    shows(&ended.stderr, words);
}

/// Sends a signal such as `-INT`, and waits for the end.
pub(crate) fn end(child: Child, signal: &str) -> Run {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    child.wait_with_output().unwrap().into()
}

/// Starts a command and kills it after `pause`, unless it has ended by then. Returns whether it was killed.
pub(crate) fn killed_after(line: &str, pause: Duration) -> bool {
    let mut child = command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while started.elapsed() < pause && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(2));
    }
    let is_killed = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    is_killed
}

/// Starts a command four times and kills it, each time after twice as long as before.
pub(crate) fn killed_four_times(line: &str, first: Duration) {
    for doublings in 0..4 {
        killed_after(line, first * (1 << doublings));
    }
}

/// Runs a command that writes into the folder `out`, then once more from the start. The second time it is killed once in each
/// quarter of the time that it took, at a moment that `seed` chooses, and then runs to its end. The results have to have the same bytes.
pub(crate) fn kills_change_no_byte(line: &str, out: &str, seed: u64) {
    let started = Instant::now();
    succeeds(line);
    let calm = started.elapsed();
    let wanted = results_below(out);
    assert!(!wanted.is_empty(), "{line}: wrote nothing");
    fs::remove_dir_all(path(out)).unwrap();
    let (mut random, mut kills) = (seed, 0);
    for quarter in 0..4u32 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let within = (random >> 40) as f64 / f64::from(1 << 24);
        kills += u32::from(killed_after(line, calm.mul_f64((f64::from(quarter) + within) / 4.0)));
    }
    assert!(kills > 0, "{line}: no run was still going when it was to be killed");
    succeeds(line);
    let found = results_below(out);
    for name in wanted.keys().chain(found.keys()) {
        assert!(wanted.get(name) == found.get(name), "{line}: {} after {kills} kills", name.display());
    }
}

/// The files below a folder, without manifests, which depend on the order of the work, and temporary files.
fn results_below(dir: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut folders, mut found) = (vec![path(dir)], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let (name, file) = (entry.file_name(), entry.path());
            if name == "checksums.json" || name.to_string_lossy().starts_with('.') {
                continue;
            }
            if file.is_dir() {
                folders.push(file);
            } else {
                let bytes = fs::read(&file).unwrap();
                found.insert(file, bytes);
            }
        }
    }
    found
}

pub(crate) fn succeeds(line: &str) -> String {
    let run = run(line);
    assert_eq!(run.code, 0, "{line}: {}", run.stderr);
    run.stdout
}

/// The one object that a command prints with `--json`.
pub(crate) fn json_of(line: &str) -> Value {
    let run = run(&format!("{line} --json"));
    assert_eq!(run.code, 0, "{line}: {}", run.stderr);
    run.json()
}

/// Exit code 1 and one line on stderr that holds all of `parts`.
pub(crate) fn fails(line: &str, parts: &[&str]) {
    let run = run(&format!("{line} --quiet"));
    check_failure(&run, line, parts);
    assert_eq!(run.stdout, "", "{line}");
}

pub(crate) fn check_failure(run: &Run, line: &str, parts: &[&str]) {
    assert_eq!(run.code, 1, "{line}: {}{}", run.stdout, run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{line}: {}", run.stderr);
    assert!(run.stderr.starts_with("dsmoe: error: "), "{line}: {}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{line}: {}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "{line}: no `{part}` in: {}", run.stderr);
    }
}

/// Exit code 2, with the reason on stderr alone.
pub(crate) fn is_wrong_usage(line: &str) -> String {
    let run = run(line);
    assert_eq!((run.code, run.stdout.as_str()), (2, ""), "{line}: {}", run.stderr);
    assert!(!run.stderr.is_empty(), "{line}");
    run.stderr
}

#[track_caller]
pub(crate) fn shows(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

/// Checks that `value` has every key of that list of words.
#[track_caller]
pub(crate) fn has(value: &Value, keys: &str) {
    for key in keys.split_whitespace() {
        assert!(value.get(key).is_some(), "no {key} in {value}");
    }
}

/// Checks that `value` has the keys and values of `part`, in nested objects too.
#[track_caller]
pub(crate) fn agrees(value: &Value, part: &Value) {
    let Some(fields) = part.as_object() else {
        assert_eq!(value, part);
        return;
    };
    for (key, wanted) in fields {
        match wanted.as_object() {
            Some(_) => agrees(&value[key], wanted),
            None => assert_eq!(&value[key], wanted, "{key} in {value}"),
        }
    }
}

#[track_caller]
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("no list: {value}"))
}

#[track_caller]
pub(crate) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// The texts under `key` in a list of objects.
#[track_caller]
pub(crate) fn texts<'a>(objects: &'a Value, key: &str) -> Vec<&'a str> {
    list(objects).iter().map(|one| one[key].as_str().unwrap()).collect()
}

/// Lets another program compute the numbers of a record anew; none where there is no Python.
pub(crate) fn check_report(record: &Path) -> Option<(bool, String)> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/check-report");
    let output = Command::new("python3").arg(script).arg(record).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}
