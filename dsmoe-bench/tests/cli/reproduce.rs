//! `dsmoe reproduce` on a profile of seconds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{at, command, fails, finish, fixture, json_of, run, succeeds};

const PROFILE: &str = r#"
name = "tiny"
about = "seconds"
seeds = 1
experts = 8
active = 0.375
paper = "1b"
milestones = [0, 0.1, 1]
curve = [0.5]
world = { seed = 0, bytes = 150_000, vocab = 512 }
model = { hidden = 32, intermediate = 64, layers = 6, heads = 2, kv_heads = 2, positions = 512 }
pretrain = { steps = 30, batch = 4, seq = 64, lr = 4e-3, bos = "always" }
train = { steps = 12, batch = 4, seq = 64, lr = 1e-3, bos = "always", save_every = 5 }
calibration = { samples = 8 }
measure = { windows = 6, sweep_windows = 2, items = 6, thresholds = [0.4, 0.5, 0.6], late_step = 0.2, prefill = 128, decode = 4, resamples = 100 }

[[method]]
name = "dense"
role = "dense"
make = "dense"
paper = "dense"

[[method]]
name = "sparsegpt"
role = "baseline"
make = "sparsegpt"
paper = "sparsegpt"

[[method]]
name = "dsmoe"
role = "dsmoe"
make = "dsmoe"
paper = "dsmoe"
settings = { order = "taylor" }

[[method]]
name = "dsmoe-paper"
role = "paper"
make = "dsmoe-paper"
paper = "dsmoe"
train = { sparsity = 1.0 }

[[method]]
name = "dsmoe-no-ste"
role = "without-ste"
make = "dsmoe-no-ste"

[[method]]
name = "dsmoe-no-threshold"
role = "without-threshold"
make = "dsmoe-no-threshold"
"#;

/// A folder for these tests, with the profile.
fn place() -> PathBuf {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("reproduce");
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("tiny.toml"), PROFILE).unwrap();
        dir
    };
    PLACE.get_or_init(make).clone()
}

fn profile() -> PathBuf {
    place().join("tiny.toml")
}

fn results(dir: &Path) -> String {
    fs::read_to_string(dir.join("results.json")).unwrap()
}

/// Compares both files byte for byte, and shows the first line that differs.
fn same_results(one: &Path, other: &Path) {
    let (one, other) = (results(one), results(other));
    if one != other {
        let pair = one.lines().zip(other.lines()).enumerate().find(|(_, (a, b))| a != b);
        panic!("results differ: {pair:?}");
    }
}

/// One whole run that nobody changes.
fn whole() -> &'static Path {
    static WHOLE: OnceLock<PathBuf> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let out = place().join("whole");
        succeeds(&["reproduce", "--profile", at(&profile()), "--out", at(&out), "--quiet"]);
        out
    })
}

#[test]
fn every_table_and_figure_is_there() {
    let out = whole();
    let found: Value = serde_json::from_str(&results(out)).unwrap();
    let names: Vec<&str> =
        found["methods"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["base", "dense", "sparsegpt", "dsmoe", "dsmoe-paper", "dsmoe-no-ste", "dsmoe-no-threshold"]
    );
    for method in found["methods"].as_array().unwrap() {
        let name = method["name"].as_str().unwrap();
        assert!(method["ppl"]["mean"].as_f64().unwrap() > 1.0, "{name}");
        assert_eq!(method["domains"].as_array().unwrap().len(), 4, "{name}");
        assert!(method["ppl"]["interval"][0].is_f64(), "{name}");
        let tasks = method["tasks"].as_array().unwrap().len();
        assert_eq!(tasks, if name == "dsmoe-no-threshold" { 0 } else { 10 }, "{name}");
    }
    let of = |name: &str| &found["methods"][names.iter().position(|other| *other == name).unwrap()];
    assert_eq!(of("dsmoe")["milestones"].as_array().unwrap().len(), 4);
    assert_eq!(of("dense")["milestones"].as_array().unwrap().len(), 3);
    assert_eq!(of("dsmoe-paper")["sweep"].as_array().unwrap().len(), 3);
    assert_eq!(of("dsmoe-no-threshold")["sweep"].as_array().unwrap().len(), 5);
    assert_eq!(of("dsmoe")["difficulty"]["bins"].as_array().unwrap().len(), 10);
    // Methods with one conversion but for a setting are not taken for each other.
    assert_ne!(of("dsmoe-paper")["nll"]["mean"], of("dsmoe-no-ste")["nll"]["mean"]);
    // The threshold after training is found on the budget.
    let late = of("dsmoe-no-threshold")["active_ratio"].as_f64().unwrap();
    assert!((late - 0.375).abs() < 0.03, "{late}");
    let report = fs::read_to_string(out.join("report.md")).unwrap();
    for title in [
        "Table 1",
        "Table 2",
        "Table 3",
        "Table 4",
        "Table 5",
        "Table 6",
        "Figure 2",
        "Figure 3",
        "Speed",
        "Perplexity against",
        "difficulty of tokens",
        "Perplexity during training",
    ] {
        assert!(report.contains(title), "{title}");
    }
    assert!(!report.contains("NaN") && !report.contains("inf "), "{report}");
    // Every direction of table 1 that the paper's rows here allow.
    let directions = found["directions"].as_array().unwrap();
    assert_eq!(directions.iter().filter(|one| one["output"] == "table1").count(), 4);
    assert_eq!(directions.iter().filter(|one| one["output"] == "table3").count(), 11);
    assert!(directions.iter().any(|one| one["output"] == "figure3" && one["agrees"].is_boolean()));
    // Finished runs keep no checkpoints.
    assert!(
        !out.join("cache")
            .read_dir()
            .unwrap()
            .any(|entry| { entry.unwrap().path().join("run").join("checkpoints").exists() })
    );
}

#[test]
fn an_independent_program_finds_the_same_numbers() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/check-report");
    let Ok(output) = Command::new("python3").arg(&script).arg(whole()).output() else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("numbers agree"), "{text}");
    // It reports a changed number.
    let spoiled = place().join("spoiled");
    for folder in ["runs", "."] {
        fs::create_dir_all(spoiled.join(folder)).unwrap();
        for entry in fs::read_dir(whole().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ext| ext == "json") {
                fs::copy(&path, spoiled.join(folder).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    let mut found: Value = serde_json::from_str(&results(whole())).unwrap();
    let ppl = found["methods"][3]["ppl"]["mean"].as_f64().unwrap();
    found["methods"][3]["ppl"]["mean"] = (ppl * 1.001).into();
    fs::write(spoiled.join("results.json"), found.to_string()).unwrap();
    let output = Command::new("python3").arg(&script).arg(&spoiled).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Killed again and again, each time after a little more, then finished.
#[test]
fn a_killed_run_ends_as_a_whole_one() {
    let out = place().join("killed");
    let (profile, wait) = (profile(), Duration::from_millis(10));
    let args = ["reproduce", "--profile", at(&profile), "--out", at(&out), "--resume", "--quiet"];
    let mut pause = Duration::from_millis(150);
    for _ in 0..4 {
        let mut child = command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        while started.elapsed() < pause && child.try_wait().unwrap().is_none() {
            std::thread::sleep(wait);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        pause = pause * 9 / 4;
    }
    // A training that stops between two checkpoints, too.
    succeeds(&[&args[..], &["--stop-after", "7"]].concat());
    succeeds(&args);
    same_results(&out, whole());
}

#[test]
fn parts_put_together_are_the_whole() {
    let (one, two, all) = (place().join("part1"), place().join("part2"), place().join("parts"));
    let stages = place().join("stages");
    let part = |shard: &str, out: &Path| {
        let profile = profile();
        succeeds(&[
            "reproduce",
            "--profile",
            at(&profile),
            "--shard",
            shard,
            "--out",
            at(out),
            "--stages",
            at(&stages),
            "--quiet",
        ]);
    };
    part("1/2", &one);
    fails(&["reproduce", "merge", at(&one), "--out", at(&all)], &["not all parts are there", "missing"]);
    fs::remove_dir_all(&all).unwrap();
    part("2/2", &two);
    succeeds(&["reproduce", "merge", at(&one), at(&two), "--out", at(&all), "--quiet"]);
    same_results(&all, whole());
    assert!(all.join("report.md").is_file() && all.join("timings").join("dsmoe-s0.json").is_file());
    fails(&["reproduce", "merge", at(&one), at(&two), "--out", at(&all)], &["is not empty"]);
}

#[test]
fn changed_settings_redo_only_what_they_touch() {
    let out = place().join("changed");
    let (profile, other) = (profile(), place().join("other.toml"));
    let only = ["--methods", "dense,dsmoe", "--only", "table1"];
    succeeds(&[&["reproduce", "--profile", at(&profile), "--out", at(&out)][..], &only].concat());
    let text = PROFILE.replacen("order = \"taylor\"", "order = \"random\"", 1);
    fs::write(&other, text).unwrap();
    let again =
        run(&[&["reproduce", "--profile", at(&other), "--out", at(&out), "--resume"][..], &only].concat());
    assert_eq!(again.code, 0, "{}", again.stderr);
    for (stage, done) in [("train dsmoe-s0", true), ("train dense-s0", false), ("dense base", false)] {
        assert_eq!(again.stderr.contains(stage), done, "{stage}: {}", again.stderr);
    }
    let found: Value = serde_json::from_str(&results(&out)).unwrap();
    assert_eq!(found["methods"].as_array().unwrap().len(), 3);
    assert!(found["methods"][2]["tasks"].as_array().unwrap().is_empty());
    let report = fs::read_to_string(out.join("report.md")).unwrap();
    assert!(report.contains("Table 1") && !report.contains("Table 2"));
    fails(&["reproduce", "--profile", at(&profile), "--out", at(&out)], &["is not empty", "--resume"]);
}

/// One row has 22 experts, the others 8. All have one budget, in which everyone pays for its own routers.
#[test]
fn a_row_has_the_experts_that_its_settings_give() {
    let (profile, out) = (place().join("experts.toml"), place().join("experts"));
    let (make, given) = ("make = \"dsmoe-no-ste\"", "make = \"dsmoe-no-ste\"\nsettings = { experts = 22 }");
    let text = PROFILE.replacen("intermediate = 64", "intermediate = 88", 1).replacen(make, given, 1);
    fs::write(&profile, text).unwrap();
    let asked =
        ["reproduce", "--profile", at(&profile), "--methods", "dsmoe,dsmoe-no-ste", "--only", "table1"];
    let plan = json_of(&[&asked[..], &["--dry-run"]].concat());
    let budget = plan["budget_params"].as_f64().unwrap();
    for row in &plan["rows"].as_array().unwrap()[1..] {
        let activated = row["params_activated"].as_f64().unwrap();
        assert!((activated / budget - 1.0).abs() < 1e-4, "{row} {budget}");
    }
    succeeds(&[&asked[..], &["--out", at(&out), "--quiet"]].concat());
    let found: Value = serde_json::from_str(&results(&out)).unwrap();
    let experts: Vec<&Value> =
        found["methods"].as_array().unwrap().iter().map(|one| &one["experts"]).collect();
    assert_eq!(experts, [&Value::Null, &8.into(), &22.into()]);
    // More routers leave less for experts: 6 layers of 14 routers of 32 weights, of FFNs of 6 * 3 * 88 * 32.
    let trained: Vec<PathBuf> = fs::read_dir(out.join("cache"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("run"))
        .filter(|run| run.join("config.json").is_file())
        .collect();
    let read = |run: &PathBuf, file: &str| fs::read_to_string(run.join(file)).unwrap();
    let of = |experts: usize| {
        let has = |run: &&PathBuf| read(run, "config.json").contains(&format!("\"num_experts\": {experts},"));
        let settings = read(trained.iter().find(has).unwrap(), "run.toml");
        let target = settings.lines().find_map(|line| line.strip_prefix("active_target = ")).unwrap();
        target.parse::<f64>().unwrap()
    };
    assert_eq!(of(8), 0.375);
    assert!((of(22) - (0.375 - 14.0 / (3.0 * 88.0))).abs() < 1e-12, "{}", of(22));
}

#[test]
fn what_cannot_be_done_is_told_before_anything_is() {
    let out = place().join("never");
    let profile_of = |name: &str, from: &str, to: &str| {
        let path = place().join(name);
        fs::write(&path, PROFILE.replacen(from, to, 1)).unwrap();
        path
    };
    let renamed = profile_of("renamed.toml", "settings =", "knobs =");
    fails(
        &["reproduce", "--profile", at(&renamed), "--out", at(&out)],
        &["renamed.toml: line", "`settings`"],
    );
    let unknown = profile_of("unknown.toml", "seeds = 1", "seedz = 1\nseeds = 1");
    fails(&["reproduce", "--profile", at(&unknown), "--out", at(&out)], &["unknown.toml: line 4", "seedz"]);
    let wrong = profile_of("wrong.toml", "steps = 12", "steps = 12, bogus = 1");
    fails(&["reproduce", "--profile", at(&wrong), "--out", at(&out)], &["train", "bogus"]);
    let method = profile_of("method.toml", "make = \"sparsegpt\"", "make = \"sparsegbt\"");
    fails(&["reproduce", "--profile", at(&method), "--out", at(&out)], &["sparsegbt", "not a method"]);
    fails(&["reproduce", "--profile", "no-such.toml", "--out", at(&out)], &["no-such.toml", "quick, small"]);
    let profile = profile();
    fails(
        &["reproduce", "--profile", at(&profile), "--methods", "dens", "--out", at(&out)],
        &["--methods dens", "use dense, sparsegpt"],
    );
    fails(&["reproduce", "--profile", "paper-1b", "--out", at(&out)], &["--model DIR"]);
    assert!(!out.join("runs").exists());
    let wrong_use = finish(command(&["reproduce", "--only", "table9", "--out", at(&out)]));
    assert_eq!(wrong_use.code, 2);
    assert!(wrong_use.stderr.contains("figure3"), "{}", wrong_use.stderr);
}

#[test]
fn profiles_are_printed_as_they_can_be_used() {
    for name in ["quick", "small", "paper-1b", "paper-7b"] {
        let text = succeeds(&["reproduce", "--print-profile", name]);
        let path = place().join(format!("printed-{name}.toml"));
        fs::write(&path, text).unwrap();
        let given = if name.starts_with("paper") { vec![] } else { vec!["--only", "table1"] };
        let plan = json_of(&[&["reproduce", "--profile", at(&path), "--dry-run"][..], &given].concat());
        assert_eq!(plan["profile"]["name"], name);
    }
}

/// The paper's 1B shapes from headers, and a small model made by `dsmoe init`.
#[test]
fn a_plan_counts_what_a_run_would_take() {
    let plan = json_of(&["reproduce", "--profile", "paper-1b", "--dry-run"]);
    assert_eq!(plan["dense_params"], 1_235_814_400u64);
    // 735M and half of the routers' 262,144 over it at 3.02 experts.
    let budget = plan["budget_params"].as_f64().unwrap();
    assert!((budget / 735e6 - 1.0).abs() < 1e-3, "{budget}");
    let row = |name: &str| {
        let rows = plan["rows"].as_array().unwrap();
        rows.iter().find(|row| row["run"] == name).unwrap().clone()
    };
    let dense = row("dense-s0");
    assert_eq!((dense["steps"].as_u64(), dense["tokens"].as_u64()), (Some(305_176), Some(10_000_007_168)));
    // 2 FLOPs a weight, head included and embedding not (they are one), attention over 512 tokens, backward twice
    // forward; measuring adds a hundredth or two.
    let weights = 1_235_814_400.0 - 33.0 * 2048.0;
    let by_hand = 3.0 * (2.0 * weights + 16.0 * 4.0 * 2048.0 * 512.0) * 10_000_007_168.0;
    let flops = dense["flops"].as_f64().unwrap();
    assert!((1.0..1.02).contains(&(flops / by_hand)), "{flops} {by_hand}");
    // Weights, gradients and two moments in f32 are the most of the memory.
    let memory = dense["memory_bytes"].as_f64().unwrap();
    assert!(memory > 16.0 * 1.2358e9 && memory < 25e9, "{memory}");
    let (hours, speed) = (plan["hours"].as_f64().unwrap(), plan["flops_per_second"].as_f64().unwrap());
    assert!((hours * 3600.0 * speed / plan["flops"].as_f64().unwrap() - 1.0).abs() < 1e-6);
    // A gated model trains on less arithmetic than a dense one.
    assert!(row("dsmoe-s0")["flops"].as_f64().unwrap() < 0.8 * flops);
    let fixture = fixture();
    let profile = place().join("given.toml");
    let text = succeeds(&["reproduce", "--print-profile", "paper-1b"]).replace("seq = 1024", "seq = 64");
    fs::write(&profile, text).unwrap();
    let small = json_of(&[
        "reproduce",
        "--profile",
        at(&profile),
        "--model",
        at(&fixture.dense),
        "--data",
        at(&fixture.text),
        "--dry-run",
    ]);
    assert_eq!(small["model"], at(&fixture.dense));
    assert!(small["dense_params"].as_u64().unwrap() < 100_000);
}

/// A given checkpoint and a user's text, interrupted after its first steps and resumed.
#[test]
fn a_given_model_is_trained_on_given_text() {
    let fixture = fixture();
    let (profile, out) = (place().join("own.toml"), place().join("own"));
    let text = PROFILE
        .replace("world = { seed = 0, bytes = 150_000, vocab = 512 }", "")
        .replace("pretrain = { steps = 30, batch = 4, seq = 64, lr = 4e-3, bos = \"always\" }", "")
        .replace("measure = { windows = 6", "measure = { windows = 2")
        .replace("save_every = 5", "valid_fraction = 0.1");
    fs::write(&profile, text).unwrap();
    let args = [
        "reproduce",
        "--profile",
        at(&profile),
        "--model",
        at(&fixture.dense),
        "--data",
        at(&fixture.text),
        "--methods",
        "dense,dsmoe",
        "--only",
        "table1,table2,figure3",
        "--out",
        at(&out),
        "--resume",
        "--quiet",
    ];
    succeeds(&[&args[..], &["--stop-after", "5"]].concat());
    assert!(!out.join("results.json").exists());
    succeeds(&args);
    let found: Value = serde_json::from_str(&results(&out)).unwrap();
    assert_eq!(found["methods"][2]["name"], "dsmoe");
    assert!(found["setup"]["inputs"]["dense_model"]["sha256"].is_string());
    assert!(fs::read_to_string(out.join("report.md")).unwrap().contains("no benchmark files were given"));
}

/// The tables of the README are those of the recorded runs, and another program finds the records' numbers in their
/// runs.
#[test]
fn the_readme_shows_the_records() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    succeeds(&["reproduce", "splice", "--check", at(&root.join("README.md")), "--quiet"]);
    let records: Vec<PathBuf> = fs::read_dir(root.join("dsmoe-bench/record"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("runs.tar.gz").is_file())
        .collect();
    assert!(records.len() >= 3, "{records:?}");
    let script = root.join("scripts/check-report");
    for record in records {
        let Ok(output) = Command::new("python3").arg(&script).arg(&record).output() else { return };
        assert!(output.status.success(), "{}: {}", record.display(), String::from_utf8_lossy(&output.stdout));
    }
}
