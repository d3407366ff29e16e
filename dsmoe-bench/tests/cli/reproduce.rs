//! `dsmoe reproduce` on a profile of seconds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{
    agrees, check_report, command, copy, fails, is_wrong_usage, json_of, killed_four_times, list, number,
    path, read, read_json, run, shows, succeeds, texts, write,
};

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
settings = { order = "taylor", routers = "calibrated" }

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

/// Writes the profile with something else in place of `from`, and returns its name.
fn profile_with(name: &str, from: &str, to: &str) -> String {
    let file = format!("reproduce/{name}.toml");
    write(&file, PROFILE.replacen(from, to, 1));
    file
}

/// A command on the profile as it is.
fn reproduce(out: &str, rest: &str) -> String {
    static WRITTEN: OnceLock<String> = OnceLock::new();
    let profile = WRITTEN.get_or_init(|| profile_with("tiny", "", ""));
    format!("reproduce --profile {profile} --out reproduce/{out} {rest}")
}

fn results(out: &str) -> String {
    read(&format!("reproduce/{out}/results.json"))
}

fn found(out: &str) -> Value {
    read_json(&format!("reproduce/{out}/results.json"))
}

/// Compares the results byte for byte with those of one whole run that nobody changes, and shows the first line that
/// differs.
fn is_whole(out: &str) {
    let (one, other) = (results(out), results(whole()));
    if one != other {
        let pair = one.lines().zip(other.lines()).enumerate().find(|(_, (a, b))| a != b);
        panic!("results differ: {pair:?}");
    }
}

/// One whole run that nobody changes.
fn whole() -> &'static str {
    static WHOLE: OnceLock<()> = OnceLock::new();
    WHOLE.get_or_init(|| drop(succeeds(&reproduce("whole", "--quiet"))));
    "whole"
}

#[test]
fn every_table_and_figure_is_there() {
    let found = found(whole());
    let names = texts(&found["methods"], "name");
    assert_eq!(
        names,
        ["base", "dense", "sparsegpt", "dsmoe", "dsmoe-paper", "dsmoe-no-ste", "dsmoe-no-threshold"]
    );
    for method in list(&found["methods"]) {
        let name = &method["name"];
        assert!(number(&method["ppl"]["mean"]) > 1.0, "{name}");
        assert_eq!(list(&method["domains"]).len(), 4, "{name}");
        number(&method["ppl"]["interval"][0]);
        let tasks = if name == "dsmoe-no-threshold" { 0 } else { 10 };
        assert_eq!(list(&method["tasks"]).len(), tasks, "{name}");
    }
    let of = |name: &str| &found["methods"][names.iter().position(|other| *other == name).unwrap()];
    for (name, key, entries) in [
        ("dsmoe", "milestones", 4),
        ("dense", "milestones", 3),
        ("dsmoe-paper", "sweep", 3),
        ("dsmoe-no-threshold", "sweep", 5),
    ] {
        assert_eq!(list(&of(name)[key]).len(), entries, "{name}: {key}");
    }
    assert_eq!(list(&of("dsmoe")["difficulty"]["bins"]).len(), 10);
    // Methods with one conversion but for a setting are not taken for each other.
    assert_ne!(of("dsmoe-paper")["nll"]["mean"], of("dsmoe-no-ste")["nll"]["mean"]);
    // The threshold after training is found on the budget.
    let late = number(&of("dsmoe-no-threshold")["active_ratio"]);
    assert!((late - 0.375).abs() < 0.03, "{late}");
    let report = read("reproduce/whole/report.md");
    shows(
        &report,
        &["Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 6", "Figure 2", "Figure 3"],
    );
    shows(&report, &["Speed", "Perplexity against", "difficulty of tokens", "Perplexity during training"]);
    assert!(!report.contains("NaN") && !report.contains("inf "), "{report}");
    // Every direction of table 1 that the paper's rows here allow.
    let directions = list(&found["directions"]);
    for (output, statements) in [("table1", 4), ("table3", 11)] {
        assert_eq!(directions.iter().filter(|one| one["output"] == output).count(), statements, "{output}");
    }
    assert!(directions.iter().any(|one| one["output"] == "figure3" && one["agrees"].is_boolean()));
    // Finished runs keep no checkpoints.
    for stage in fs::read_dir(path("reproduce/whole/cache")).unwrap() {
        assert!(!stage.unwrap().path().join("run/checkpoints").exists());
    }
}

#[test]
fn an_independent_program_finds_the_same_numbers() {
    let Some((agrees, text)) = check_report(&path("reproduce").join(whole())) else { return };
    assert!(agrees, "{text}");
    shows(&text, &["numbers agree"]);
    // It reports a changed number.
    copy("reproduce/whole/runs", "reproduce/spoiled/runs");
    write("reproduce/spoiled/setup.json", read("reproduce/whole/setup.json"));
    let mut found = found(whole());
    let ppl = number(&found["methods"][3]["ppl"]["mean"]);
    found["methods"][3]["ppl"]["mean"] = (ppl * 1.001).into();
    write("reproduce/spoiled/results.json", found.to_string());
    let (agrees, text) = check_report(&path("reproduce/spoiled")).unwrap();
    assert!(!agrees, "{text}");
}

/// Killed again and again, each time after a little more, then finished.
#[test]
fn a_killed_run_ends_as_a_whole_one() {
    let line = reproduce("killed", "--resume --quiet");
    killed_four_times(&line, Duration::from_millis(200));
    // A training that stops between two checkpoints, too.
    succeeds(&format!("{line} --stop-after 7"));
    succeeds(&line);
    is_whole("killed");
}

/// An earlier version trained past a milestone, and no manifest has what it measured there.
#[test]
fn a_training_past_a_milestone_that_was_not_measured_starts_over() {
    let line = reproduce("passed", "--resume");
    // The dense model takes 30 steps, and the first training has 12.
    succeeds(&format!("{line} --quiet --stop-after 37"));
    let stages = fs::read_dir(path("reproduce/passed/cache")).unwrap().map(|entry| entry.unwrap().path());
    let is_begun =
        |stage: &PathBuf| stage.join("at-0.1.json").is_file() && !stage.join("result.json").exists();
    let begun: Vec<PathBuf> = stages.filter(is_begun).collect();
    assert_eq!(begun.len(), 1, "{begun:?}");
    assert!(begun[0].join("run/checkpoints/step-00000007").is_dir());
    fs::remove_file(begun[0].join("checksums.json")).unwrap();
    let again = run(&line);
    assert_eq!(again.code, 0, "{}", again.stderr);
    shows(&again.stderr, &["the milestone 0 was passed and its measurement is missing; it starts over"]);
    assert_eq!(again.stderr.matches("starts over").count(), 1, "{}", again.stderr);
    is_whole("passed");
}

#[test]
fn parts_put_together_are_the_whole() {
    let part = |number: u32| {
        let rest = format!("--shard {number}/2 --stages reproduce/stages --quiet");
        succeeds(&reproduce(&format!("part{number}"), &rest));
    };
    part(1);
    let merge = "reproduce merge reproduce/part1 --out reproduce/parts";
    fails(merge, &["not all parts are there", "missing"]);
    assert!(!path("reproduce/parts").exists());
    part(2);
    let merge = format!("{merge} reproduce/part2");
    succeeds(&format!("{merge} --quiet"));
    is_whole("parts");
    for file in ["report.md", "timings/dsmoe-s0.json"] {
        assert!(path("reproduce/parts").join(file).is_file(), "{file}");
    }
    fails(&merge, &["is not empty"]);
    // What stages do without once they are done is no damage.
    shows(
        &succeeds("verify reproduce/part1 reproduce/part2 reproduce/stages reproduce/parts"),
        &["as it was written"],
    );
    // Values that no reproduction writes are refused before they are used.
    fs::remove_file(path("reproduce/part1/checksums.json")).unwrap();
    let setup = read_json("reproduce/part1/setup.json");
    for (at, value, wanted) in [
        (
            "/profile/measure/resamples",
            json!(1_000_000_000_000_000u64),
            "resamples is 1000000000000000; use 1 to",
        ),
        ("/profile/active", json!(1.5), "active is 1.5"),
        ("/profile/milestones/0", json!(-1.0), "milestones is -1"),
        ("/budget", json!(-5.0), "budget is -5"),
        ("/dense_params", json!(1), "of a dense model of 1 parameters"),
        ("/profile/seeds", json!(1_000_000_000u64), "seeds is"),
    ] {
        let mut changed = setup.clone();
        *changed.pointer_mut(at).unwrap() = value;
        write("reproduce/part1/setup.json", changed.to_string());
        fails("reproduce merge reproduce/part1 --out reproduce/refused", &[wanted]);
    }
    write("reproduce/part1/setup.json", setup.to_string());
    fs::remove_file(path("reproduce/part1/runs/checksums.json")).unwrap();
    let run = read_json("reproduce/part1/runs/base.json");
    for (at, value, wanted) in [
        ("/text/params_activated", json!(1e15), "params_activated is 1000000000000000"),
        ("/text/nll", json!(1e308), "nll is"),
        ("/text/nll", json!(0.5), "nll is 0.5 and ppl"),
    ] {
        let mut changed = run.clone();
        *changed.pointer_mut(at).unwrap() = value;
        write("reproduce/part1/runs/base.json", changed.to_string());
        fails(
            "reproduce merge reproduce/part1 reproduce/part2 --out reproduce/refused",
            &["base.json", wanted],
        );
    }
}

#[test]
fn limits_and_sizes_of_a_profile_name_its_file() {
    for (name, from, to, wanted) in [
        ("limits", "windows = 6", "windows = 1000000000000", "measure.windows is 1000000000000"),
        ("narrow", "hidden = 32", "hidden = 0", "model.hidden "),
    ] {
        let file = profile_with(name, from, to);
        fails(&format!("reproduce --profile {file} --dry-run"), &["error: ", &format!("{file}: {wanted}")]);
    }
}

/// A row computed by itself joins a table.
#[test]
fn a_table_grows_by_the_runs_of_other_methods() {
    let part = |out: &str, methods: &str| {
        let rest = format!("--methods {methods} --only table1 --stages reproduce/row-stages --quiet");
        succeeds(&reproduce(out, &rest));
    };
    part("rows-all", "dense,dsmoe");
    part("row-dsmoe", "dsmoe");
    part("row-dense", "dense");
    succeeds("reproduce merge reproduce/row-dsmoe reproduce/row-dense --out reproduce/rows --quiet");
    let methods = |out: &str| found(out)["methods"].clone();
    assert_eq!(methods("rows"), methods("rows-all"));
    // Runs of other settings do not join.
    let other = profile_with("other-rows", "order = \"taylor\"", "order = \"random\"");
    succeeds(&format!(
        "reproduce --profile {other} --out reproduce/row-other --methods dense --only table1 --quiet"
    ));
    fails(
        "reproduce merge reproduce/row-dsmoe reproduce/row-other --out reproduce/mixed",
        &["not parts of one reproduction"],
    );
}

#[test]
fn changed_settings_redo_only_what_they_touch() {
    let only = "--methods dense,dsmoe --only table1";
    succeeds(&reproduce("changed", only));
    let other = profile_with("other", "order = \"taylor\"", "order = \"random\"");
    let again = run(&format!("reproduce --profile {other} --out reproduce/changed --resume {only}"));
    assert_eq!(again.code, 0, "{}", again.stderr);
    for (stage, done) in [("train dsmoe-s0", true), ("train dense-s0", false), ("dense base", false)] {
        assert_eq!(again.stderr.contains(stage), done, "{stage}: {}", again.stderr);
    }
    let found = found("changed");
    assert_eq!(list(&found["methods"]).len(), 3);
    assert!(list(&found["methods"][2]["tasks"]).is_empty());
    let report = read("reproduce/changed/report.md");
    assert!(report.contains("Table 1") && !report.contains("Table 2"));
    fails(&reproduce("changed", ""), &["is not empty", "--resume"]);
}

/// One row has 22 experts, the others 8. All have one budget, in which everyone pays for its own routers.
#[test]
fn a_row_has_the_experts_that_its_settings_give() {
    let make = "make = \"dsmoe-no-ste\"";
    let text = PROFILE.replacen("intermediate = 64", "intermediate = 88", 1);
    let text = text.replacen(make, &format!("{make}\nsettings = {{ experts = 22 }}"), 1);
    write("reproduce/experts.toml", text);
    let asked = "reproduce --profile reproduce/experts.toml --methods dsmoe,dsmoe-no-ste --only table1";
    let plan = json_of(&format!("{asked} --dry-run"));
    let budget = number(&plan["budget_params"]);
    for row in &list(&plan["rows"])[1..] {
        assert!((number(&row["params_activated"]) / budget - 1.0).abs() < 1e-4, "{row} {budget}");
    }
    succeeds(&format!("{asked} --out reproduce/experts --quiet"));
    let found = found("experts");
    let experts: Vec<&Value> = list(&found["methods"]).iter().map(|one| &one["experts"]).collect();
    assert_eq!(experts, [&Value::Null, &8.into(), &22.into()]);
    // More routers leave less for experts: 6 layers of 14 routers of 32 weights, of FFNs of 6 * 3 * 88 * 32.
    let stages = fs::read_dir(path("reproduce/experts/cache")).unwrap();
    let runs: Vec<PathBuf> = stages.map(|entry| entry.unwrap().path().join("run")).collect();
    let read = |run: &PathBuf, file: &str| fs::read_to_string(run.join(file)).unwrap_or_default();
    let of = |experts: usize| -> f64 {
        let has = |run: &&PathBuf| read(run, "config.json").contains(&format!("\"num_experts\": {experts},"));
        let settings = read(runs.iter().find(has).unwrap(), "run.toml");
        settings.lines().find_map(|line| line.strip_prefix("active_target = ")).unwrap().parse().unwrap()
    };
    assert_eq!(of(8), 0.375);
    assert!((of(22) - (0.375 - 14.0 / (3.0 * 88.0))).abs() < 1e-12, "{}", of(22));
}

/// Starts a reproduction with the directory of stages `stages`, and writes its notes to a file.
fn started(out: &str, stages: &str) -> std::process::Child {
    let line = reproduce(out, &format!("--stages reproduce/{stages} --resume"));
    let notes = fs::File::create(path(&format!("reproduce/{}.notes", out.replace('/', "-")))).unwrap();
    command(&line).stdout(Stdio::null()).stderr(notes).spawn().unwrap()
}

/// The stages that a reproduction announced, such as `train dsmoe-s0`.
fn announced(out: &str) -> Vec<String> {
    let notes = read(&format!("reproduce/{}.notes", out.replace('/', "-")));
    let lines = notes.lines().filter_map(|line| line.strip_prefix('[')?.split_once("] "));
    lines.map(|(_, what)| what.split(" (").next().unwrap().to_owned()).collect()
}

#[test]
fn processes_with_one_directory_of_stages_divide_the_work() {
    let [mut one, mut other] = ["divided-a", "divided-b"].map(|out| started(out, "divided"));
    assert!(one.wait().unwrap().success() && other.wait().unwrap().success());
    let [ones, others] = ["divided-a", "divided-b"].map(announced);
    assert!(ones.len() > 3 && others.len() > 3, "{ones:?} {others:?}");
    let twice: Vec<&String> = ones.iter().filter(|stage| others.contains(stage)).collect();
    assert!(twice.is_empty(), "done twice: {twice:?}");
    is_whole("divided-a");
    is_whole("divided-b");
}

#[test]
fn another_process_goes_on_with_the_stages_of_one_that_is_killed() {
    let mut killed = started("taken-a", "taken");
    let announces = |out: &str, what: &str| announced(out).iter().any(|stage| stage.starts_with(what));
    crate::common::wait_until("a training", || announces("taken-a", "train"));
    let mut other = started("taken-b", "taken");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let training = announced("taken-a").pop().unwrap();
    assert!(other.wait().unwrap().success());
    is_whole("taken-b");
    assert!(announced("taken-b").contains(&training), "{training}: {:?}", announced("taken-b"));
    // The first one has nothing left to do.
    assert!(started("taken-a", "taken").wait().unwrap().success());
    assert_eq!(announced("taken-a"), [""; 0]);
    is_whole("taken-a");
}

#[test]
fn what_cannot_be_done_is_told_before_anything_is() {
    for (name, from, to, parts) in [
        ("renamed", "settings =", "knobs =", ["renamed.toml: line", "`settings`"]),
        ("unknown", "seeds = 1", "seedz = 1\nseeds = 1", ["unknown.toml: line 4", "seedz"]),
        ("wrong", "steps = 12", "steps = 12, bogus = 1", ["train", "bogus"]),
        ("method", "make = \"sparsegpt\"", "make = \"sparsegbt\"", ["sparsegbt", "not a method"]),
    ] {
        let profile = profile_with(name, from, to);
        fails(&format!("reproduce --profile {profile} --out reproduce/never"), &parts);
    }
    fails(&reproduce("never", "--methods dens"), &["--methods dens", "use dense, sparsegpt"]);
    fails("reproduce --profile paper-1b --out reproduce/never", &["--model DIR"]);
    assert!(!path("reproduce/never/runs").exists());
    shows(&is_wrong_usage("reproduce --only table9 --out reproduce/never"), &["figure3"]);
}

#[test]
fn profiles_are_printed_as_they_can_be_used() {
    for (name, given) in [
        ("quick", "--only table1"),
        ("small", "--only table1"),
        ("paper-1b", ""),
        ("paper-7b", ""),
        ("related-brief", ""),
    ] {
        let file = format!("reproduce/printed-{name}.toml");
        write(&file, succeeds(&format!("reproduce --print-profile {name}")));
        let plan = json_of(&format!("reproduce --profile {file} --dry-run {given}"));
        assert_eq!(plan["profile"]["name"], name);
    }
}

/// The paper's 1B shapes from headers, and a small model made by `dsmoe init`.
#[test]
fn a_plan_counts_what_a_run_would_take() {
    let plan = json_of("reproduce --profile paper-1b --dry-run");
    assert_eq!(plan["dense_params"], 1_235_814_400u64);
    // 735M and half of the routers' 262,144 over it at 3.02 experts.
    let budget = number(&plan["budget_params"]);
    assert!((budget / 735e6 - 1.0).abs() < 1e-3, "{budget}");
    let row = |name: &str| list(&plan["rows"]).iter().find(|row| row["run"] == name).unwrap();
    let dense = row("dense-s0");
    agrees(dense, &json!({ "steps": 305_176, "tokens": 10_000_007_168u64 }));
    // 2 FLOPs a weight, head included and embedding not (they are one), attention over 512 tokens, backward twice
    // forward; measuring adds a hundredth or two.
    let weights = 1_235_814_400.0 - 33.0 * 2048.0;
    let by_hand = 3.0 * (2.0 * weights + 16.0 * 4.0 * 2048.0 * 512.0) * 10_000_007_168.0;
    let flops = number(&dense["flops"]);
    assert!((1.0..1.02).contains(&(flops / by_hand)), "{flops} {by_hand}");
    // Weights, gradients and two moments in f32 are the most of the memory.
    let memory = number(&dense["memory_bytes"]);
    assert!(memory > 16.0 * 1.2358e9 && memory < 25e9, "{memory}");
    let computed = number(&plan["hours"]) * 3600.0 * number(&plan["flops_per_second"]);
    assert!((computed / number(&plan["flops"]) - 1.0).abs() < 1e-6);
    // A gated model trains on less arithmetic than a dense one.
    assert!(number(&row("dsmoe-s0")["flops"]) < 0.8 * flops);
    let text = succeeds("reproduce --print-profile paper-1b").replace("seq = 1024", "seq = 64");
    write("reproduce/given.toml", text);
    let small = json_of("reproduce --profile reproduce/given.toml --model dense --data text.txt --dry-run");
    assert_eq!(small["model"], "dense");
    assert!(number(&small["dense_params"]) < 100_000.0);
}

/// A given checkpoint and a user's text, interrupted after its first steps and resumed.
#[test]
fn a_given_model_is_trained_on_given_text() {
    let text = PROFILE
        .replace("world = { seed = 0, bytes = 150_000, vocab = 512 }", "")
        .replace("pretrain = { steps = 30, batch = 4, seq = 64, lr = 4e-3, bos = \"always\" }", "")
        .replace("measure = { windows = 6", "measure = { windows = 2")
        .replace("save_every = 5", "valid_fraction = 0.1");
    write("reproduce/own.toml", text);
    let line = "reproduce --profile reproduce/own.toml --model dense --data text.txt --methods dense,dsmoe \
                --only table1,table2,figure3 --out reproduce/own --resume --quiet";
    succeeds(&format!("{line} --stop-after 5"));
    assert!(!path("reproduce/own/results.json").exists());
    succeeds(line);
    let found = found("own");
    assert_eq!(found["methods"][2]["name"], "dsmoe");
    assert!(found["setup"]["inputs"]["dense_model"]["sha256"].is_string());
    shows(&read("reproduce/own/report.md"), &["no benchmark files were given"]);
}

/// The tables of the README and of docs are those of the recorded runs, and another program finds the records' numbers in their
/// runs.
#[test]
fn the_readme_shows_the_records() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let documents: Vec<(PathBuf, String)> = [root.join("README.md")]
        .into_iter()
        .chain(docs)
        .filter(|path| path.extension().is_some_and(|end| end == "md"))
        .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
        .collect();
    let with_blocks = documents.iter().filter(|(_, text)| text.contains("<!-- reproduce "));
    let files: Vec<String> = with_blocks.map(|(path, _)| format!("'{}'", path.display())).collect();
    assert!(files.len() >= 2, "{files:?}");
    succeeds(&format!("reproduce splice --check --quiet {}", files.join(" ")));
    // A number of the README is spliced, or its row stands in a file of docs with the command that made it.
    let readme = &documents[0].1;
    assert!(readme.lines().count() <= 180, "{} lines", readme.lines().count());
    let mut spliced = false;
    for line in readme.lines() {
        spliced = (spliced || line.starts_with("<!-- reproduce ")) && line != "<!-- /reproduce -->";
        let is_row = line.starts_with('|') && line.contains(|c: char| c.is_ascii_digit());
        if is_row && !spliced && !line.contains("](docs/") {
            let stands = documents[1..].iter().any(|(_, text)| text.lines().any(|other| other == line));
            assert!(stands, "in no file of docs: {line}");
        }
    }
    let entries = fs::read_dir(root.join("dsmoe-bench/record")).unwrap().map(|entry| entry.unwrap().path());
    let records: Vec<PathBuf> = entries.filter(|path| path.join("runs.tar.gz").is_file()).collect();
    assert!(records.len() >= 3, "{records:?}");
    for record in records {
        let Some((agrees, text)) = check_report(&record) else { return };
        assert!(agrees, "{}: {text}", record.display());
    }
}

/// The quickstart has the commands that were recorded, and the numbers that came out.
#[test]
fn the_quickstart_is_the_recorded_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let [readme, guide] =
        ["README.md", "docs/guide.md"].map(|file| fs::read_to_string(root.join(file)).unwrap());
    let record = fs::read_to_string(root.join("dsmoe-bench/record/quickstart.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    let seconds = |time: &str| -> f64 {
        let words: Vec<&str> = time.split(' ').collect();
        words
            .chunks(2)
            .map(|pair| pair[0].parse::<f64>().unwrap() * if pair[1] == "min" { 60.0 } else { 1.0 })
            .sum()
    };
    let mut all = 0.0;
    for step in list(&record["steps"]) {
        let [command, time] = ["command", "time"].map(|key| step[key].as_str().unwrap());
        shows(&readme, &[command]);
        shows(&guide, &[&format!("| {time} |")]);
        for line in texts_of(&step["output"]) {
            shows(&guide, &[&line]);
        }
        all += seconds(time);
    }
    let install = seconds(record["install"]["time"].as_str().unwrap());
    let words = readme.split_whitespace().collect::<Vec<_>>().join(" ");
    let minutes = format!("took {:.0} minutes after an installation of {:.0}", all / 60.0, install / 60.0);
    shows(&words, &[&minutes, "a perplexity of 19 on held-out text", "with 37 % of the experts active"]);
    shows(&record.to_string(), &["perplexity        18.9797", "active share      37.0 % of experts"]);
}

fn texts_of(list_of: &Value) -> Vec<String> {
    list(list_of).iter().map(|line| line.as_str().unwrap().to_owned()).collect()
}

/// The rows of what a training costs are those of plans, at the rate of two cores that the document names.
#[test]
fn the_readme_shows_what_plans_say() {
    const RATE: f64 = 197e9;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let [readme, page] =
        ["README.md", "docs/performance.md"].map(|file| fs::read_to_string(root.join(file)).unwrap());
    shows(&page, &["197 GFLOP/s"]);
    let shown = |hours: f64| match hours {
        hours if hours < 1.0 / 60.0 => format!("{:.0} s", (3600.0 * hours).ceil()),
        hours if hours < 1.0 => format!("{:.0} min", (60.0 * hours).ceil()),
        hours if hours < 10.0 => format!("{hours:.1} h"),
        hours if hours < 100.0 => format!("{hours:.0} h"),
        hours if hours < 24_000.0 => format!("{:.0} days", hours / 24.0),
        hours => format!("{:.0} years", hours / 24.0 / 365.0),
    };
    for (line, model, tokens) in [
        ("--profile smollm2-135m --budgets 37.5%", "SmolLM2-135M, with its teacher", "1 M"),
        ("--profile smollm2-135m --budgets 37.5%", "SmolLM2-135M, with its teacher", "100 M"),
        ("--profile paper-1b --only table1", "Llama 3.2 1B", "100 M"),
        ("--profile paper-1b --only table1", "Llama 3.2 1B", "10 B"),
        ("--profile paper-7b --only table1", "Llama 2 7B", "100 M"),
        ("--profile paper-7b --only table1", "Llama 2 7B", "10 B"),
    ] {
        let asked = tokens.replace(' ', "");
        let plan = json_of(&format!("reproduce {line} --methods dsmoe --tokens {asked} --dry-run"));
        let [here, gpu] = [number(&plan["flops"]) / RATE / 3600.0, number(&plan["hours_h100"])].map(shown);
        let memory = number(&plan["memory_bytes"]) / 1e9;
        let begin = format!("| {model} | {tokens} | {here} | {gpu}");
        let is_row = |row: &&str| row.starts_with(&begin) && row.ends_with(&format!("| {memory:.1} GB |"));
        assert!(page.lines().any(|row| is_row(&row)), "{begin} {memory}");
        let own = readme.lines().find(|row| row.starts_with(&format!("| {model} | {tokens} |")));
        assert!(own.as_ref().is_none_or(is_row), "{own:?}: {begin} {memory}");
    }
}

/// Several budgets on text of its own, with the dense model as the teacher: the path of the profile `smollm2-135m`.
const BUDGETS: &str = r#"
name = "budgets"
about = "seconds"
seeds = 1
active = 0.5
budgets = [0.5, 0.75]
outputs = ["frontier", "budget", "speed"]
paper = "1b"
milestones = [0, 0.5, 1]
source = [{ name = "world", data = "text.txt", doc_separator = "<|endoftext|>", part = "train", document_chars = 400 }]
held_out = [
    { name = "final", data = "text.txt", doc_separator = "<|endoftext|>", part = "final", weight = 3 },
    { name = "whole", data = "text.txt" },
]
model = {}
train = { steps = 6, batch = 2, seq = 32, lr = 1e-3, dtype = "bf16", teacher_weight = 0.9, teacher_top = 8, save_every = 2 }
calibration = { samples = 16 }

[measure]
windows = 40
sweep_windows = 2
items = 4
thresholds = []
late_step = 0.2
prefill = 64
decode = 4
resamples = 100
dtype = "bf16"
agreement_windows = 4
speed = { threads = [1], batches = [1, 2], processes = 2 }

[[method]]
name = "dense"
role = "dense"
make = "dense"

[[method]]
name = "dsmoe"
role = "dsmoe"
make = "dsmoe"

[[method]]
name = "elastic"
role = "elastic"
make = "dsmoe"
train = { active_range = [0.5, 0.75] }

[[method]]
name = "static-core"
role = "baseline"
make = "static-core"
train = { teacher_weight = 0 }

[[method]]
name = "oracle-50"
role = "control"
make = "dsmoe"
active = 0.5
untrained = true
router = "oracle"
"#;

#[test]
fn one_profile_has_several_budgets() {
    write("reproduce/budgets.toml", BUDGETS);
    let line = |out: &str| {
        format!(
            "reproduce --profile reproduce/budgets.toml --model dense --data . --out reproduce/{out} --quiet"
        )
    };
    let plan = json_of(&format!("{} --dry-run", line("budgets")));
    let rows = list(&plan["rows"]);
    assert_eq!(rows.len(), 8, "{plan}");
    // An elastic model is trained once.
    let steps = |name: &str| &rows.iter().find(|row| row["run"] == name).unwrap()["steps"];
    assert_eq!(
        (steps("elastic-50-s0"), steps("elastic-75-s0"), steps("oracle-50-s0")),
        (&6.into(), &0.into(), &0.into())
    );
    // Stopped on the way, and without models that were measured.
    succeeds(&format!("{} --discard --stop-after 9", line("budgets")));
    succeeds(&format!("{} --discard --resume", line("budgets")));
    let weights = |stage: fs::DirEntry| {
        let model = |name: &str| stage.path().join(name).join("model.safetensors").is_file();
        model("model") || model("run")
    };
    let stages = fs::read_dir(path("reproduce/budgets/cache")).unwrap();
    assert!(!stages.into_iter().any(|stage| weights(stage.unwrap())));
    let results_before = results("budgets");
    succeeds(&format!("{} --discard --resume", line("budgets")));
    assert_eq!(results("budgets"), results_before);
    let found = found("budgets");
    let methods = list(&found["methods"]);
    let names = texts(&found["methods"], "name");
    let rows =
        ["dsmoe-50", "elastic-50", "static-core-50", "oracle-50", "dsmoe-75", "elastic-75", "static-core-75"];
    assert_eq!(names, [&["base", "dense"][..], &rows].concat());
    let of = |name: &str| &methods[names.iter().position(|other| *other == name).unwrap()];
    for name in rows {
        let method = of(name);
        for domain in list(&method["domains"]) {
            let (kl, top1) = (number(&domain["kl"]), number(&domain["top1"]));
            assert!(kl > 0.0 && (0.0..=1.0).contains(&top1), "{name}: {domain}");
        }
        assert_eq!(number(&method["active"]), if name.ends_with("75") { 0.75 } else { 0.5 }, "{name}");
        assert!((number(&method["of_budget"]) - 1.0).abs() < 0.2, "{name}: {method}");
        let timed = if name == "oracle-50" { 0 } else { 3 };
        assert_eq!(list(method.get("speeds").unwrap_or(&json!([]))).len(), timed, "{name}");
        let stones = if name == "oracle-50" { 0 } else { 3 };
        assert_eq!(list(&method["milestones"]).len(), stones, "{name}");
    }
    // Both budgets are served by one model, which was trained once.
    let stages = |name: &str| {
        let all = fs::read_dir(path("reproduce/budgets/cache")).unwrap();
        all.filter(|stage| stage.as_ref().unwrap().file_name().to_string_lossy().starts_with(name)).count()
    };
    assert_eq!((stages("make-"), stages("train-")), (5, 6));
    assert!(number(&of("elastic-75")["active_ratio"]) > number(&of("elastic-50")["active_ratio"]));
    assert_ne!(of("elastic-75")["nll"]["mean"], of("elastic-50")["nll"]["mean"]);
    // The teacher is the dense model, for all rows but the one that wants none.
    let configs = fs::read_dir(path("reproduce/budgets/cache")).unwrap();
    let configs =
        configs.filter_map(|stage| fs::read_to_string(stage.unwrap().path().join("run/run.toml")).ok());
    assert_eq!(configs.filter(|text| text.contains("teacher_weight = 0.9")).count(), 4);
    // Rows are compared with those of their budget, over documents.
    let comparisons = list(&found["comparisons"]);
    let of_one = comparisons.iter().filter(|one| one["dsmoe"] == "dsmoe-75");
    let others: Vec<&str> = of_one.map(|one| one["other"].as_str().unwrap()).collect();
    assert_eq!(others, ["base", "dense", "elastic-75", "static-core-75"]);
    assert_eq!(comparisons[0]["test"], "bootstrap over held-out documents");
    if let Some((agrees, text)) = check_report(&path("reproduce/budgets")) {
        assert!(agrees, "{text}");
    }
    shows(
        &read("reproduce/budgets/report.md"),
        &["50 % of the FFNs", "75 % of the FFNs", "decode, batch 2", "By text"],
    );
    write("reproduce/spliced.md", "<!-- reproduce budgets -->\n<!-- /reproduce -->\n");
    succeeds("reproduce splice reproduce/spliced.md");
    let spliced = read("reproduce/spliced.md");
    shows(&spliced, &["| elastic-50 |", "frontier-chart.svg"]);
    assert!(!spliced.contains("elastic-75"), "{spliced}");
}

#[test]
fn budgets_and_methods_are_chosen_by_name() {
    write("reproduce/chosen.toml", BUDGETS);
    let plan = |rest: &str| -> Vec<String> {
        let line =
            format!("reproduce --profile reproduce/chosen.toml --model dense --data . --dry-run {rest}");
        texts(&json_of(&line)["rows"], "run").iter().map(|name| (*name).to_owned()).collect()
    };
    assert_eq!(plan("--methods dsmoe"), ["dsmoe-50-s0", "dsmoe-75-s0"]);
    assert_eq!(plan("--methods dsmoe,elastic-75 --budgets 0.75"), ["dsmoe-75-s0", "elastic-75-s0"]);
    let asked = "reproduce --profile reproduce/chosen.toml --model dense";
    fails(
        &format!("{asked} --data . --budgets 0.6 --out reproduce/none"),
        &["--budgets 60.0 %", "no such budget; it has 50.0 %, 75.0 %"],
    );
    fails(&format!("{asked} --out reproduce/none"), &["needs text"]);
    fails(&format!("{asked} --data a b --out reproduce/none"), &["[[source]]", "--data"]);
    for (from, to, says) in [
        ("active = 0.5\nbudgets", "active = 0.6\nbudgets", "must be one of them"),
        ("\"final\", weight", "\"last\", weight", "last"),
        ("router = \"oracle\"", "router = \"best\"", "best"),
        ("outputs = [\"frontier\"", "outputs = [\"table9\"", "table9"),
        ("processes = 2", "processes = 0", "measure.speed"),
    ] {
        assert_eq!(BUDGETS.matches(from).count(), 1, "{from}");
        write("reproduce/wrong-budgets.toml", BUDGETS.replace(from, to));
        let line =
            "reproduce --profile reproduce/wrong-budgets.toml --model dense --data . --out reproduce/none";
        fails(line, &[says]);
    }
}
