//! `dsmoe reproduce` on a profile of experiments that takes seconds.

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;

use crate::common::{
    check_report, fails, json_of, killed_four_times, list, number, path, read, read_json, run, shows,
    succeeds, texts, write,
};

const PROFILE: &str = r#"
name = "tiny-related"
about = "seconds"
seeds = 2
experiments = ["hc-smoe", "uncurl", "seer-moe", "thresholds", "lesa", "factorllm", "duo-llm", "esacl", "memtl"]
world = { seed = 0, bytes = 150_000, vocab = 512 }
model = { hidden = 32, intermediate = 64, layers = 3, heads = 2, kv_heads = 2, positions = 512 }
pretrain = { steps = 10, batch = 4, seq = 64, lr = 4e-3, bos = "always" }
train = { steps = 4, batch = 4, seq = 64, lr = 1e-3, bos = "always" }
calibration = { samples = 4 }
measure = { windows = 2 }
"#;

/// A command on the profile with something else in place of `from`.
fn related(out: &str, [from, to]: [&str; 2], rest: &str) -> String {
    let file = format!("related/{out}.toml");
    write(&file, PROFILE.replacen(from, to, 1));
    format!("reproduce --profile {file} --out related/{out} {rest}")
}

fn results(out: &str) -> String {
    read(&format!("related/{out}/results.json"))
}

/// One whole run that nobody changes, and what it printed to standard error.
fn whole() -> &'static str {
    static WHOLE: OnceLock<String> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let run = run(&related("whole", ["", ""], ""));
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr
    })
}

#[test]
fn every_claim_has_a_verdict_that_its_numbers_give() {
    whole();
    let found: Value = read_json("related/whole/results.json");
    let experiments = list(&found["experiments"]);
    assert_eq!(
        texts(&found["experiments"], "name"),
        ["hc-smoe", "uncurl", "seer-moe", "thresholds", "lesa", "factorllm", "duo-llm", "esacl", "memtl"]
    );
    let mut claims = 0;
    for experiment in experiments {
        for cell in list(&experiment["rows"]).iter().flat_map(|row| list(&row["cells"])) {
            let seeds: Vec<f64> = list(&cell["seeds"]).iter().map(number).collect();
            assert_eq!(seeds.len(), 2);
            assert!((number(&cell["mean"]) - (seeds[0] + seeds[1]) / 2.0).abs() < 1e-12);
        }
        for claim in list(&experiment["claims"]) {
            assert!(["agrees", "differs", "undecided"].contains(&claim["agrees"].as_str().unwrap()));
            claims += 1;
        }
    }
    assert_eq!(claims, 23);
    let report = read("related/whole/report.md");
    shows(
        &report,
        &["paper's claim", "HC-SMoE", "UNCURL", "SEER-MoE", "TEAL", "LESA", "random clusters merged"],
    );
    assert!(!report.contains("NaN"), "{report}");
    let run: Value = read_json("related/whole/runs/lesa-s1.json");
    assert_eq!((run["seed"].as_u64(), list(&run["values"]).len()), (Some(1), 12));
}

#[test]
fn another_program_finds_the_numbers_and_documents_show_them() {
    whole();
    write("related/spoiled/setup.json", read("related/whole/setup.json"));
    for entry in fs::read_dir(path("related/whole/runs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        write(&format!("related/spoiled/runs/{name}"), read(&format!("related/whole/runs/{name}")));
    }
    write("related/spoiled/results.json", results("whole").replacen("\"mean\": ", "\"mean\": 1", 1));
    if let (Some((agrees, text)), Some((spoiled, found))) =
        (check_report(&path("related/whole")), check_report(&path("related/spoiled")))
    {
        assert!(agrees, "{text}");
        assert!(!spoiled && found.contains("mean"), "{found}");
    }
    let block = |part: &str| format!("<!-- reproduce whole{part} -->\n<!-- /reproduce -->\n");
    write("related/shown.md", [block(""), block(" lesa")].concat());
    succeeds("reproduce splice related/shown.md --quiet");
    succeeds("reproduce splice related/shown.md --check --quiet");
    let shown = read("related/shown.md");
    shows(&shown, &["| UNCURL |", "| no new layers |", "Profile tiny-related", "2 seeds; `whole`"]);
    write("related/wrong.md", block(" leas"));
    fails("reproduce splice related/wrong.md", &["line 1", "no experiment leas", "hc-smoe, uncurl"]);
}

/// The stages that are announced are those of the plan: the last number is the number of all.
#[test]
fn the_plan_counts_the_stages() {
    let plan = json_of(&related("plan", ["", ""], "--dry-run --quiet"));
    let stages = plan["stages"].as_u64().unwrap();
    let of = list(&plan["rows"]).iter().map(|row| row["stages"].as_u64().unwrap()).sum::<u64>();
    assert_eq!((stages, list(&plan["rows"]).len()), (of, 20));
    let log = whole();
    let last = log.lines().rfind(|line| line.starts_with('[')).unwrap();
    assert!(last.starts_with(&format!("[{stages}/{stages}] imitated memtl-s1")), "{last} of {stages}");
    assert!(!path("related/plan").exists());
}

#[test]
fn a_killed_run_ends_as_a_whole_one() {
    whole();
    let line = related("killed", ["", ""], "--resume --quiet");
    killed_four_times(&line, Duration::from_millis(200));
    succeeds(&line);
    assert_eq!(results("killed"), results("whole"));
    for entry in fs::read_dir(path("related/whole/runs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert_eq!(read(&format!("related/killed/runs/{name}")), read(&format!("related/whole/runs/{name}")));
    }
}

#[test]
fn experiments_are_chosen_by_name_and_change_no_number() {
    whole();
    let stages = path("related/whole/cache").display().to_string();
    let chosen = format!("--methods lesa,hc-smoe --seeds 1 --quiet --stages {stages}");
    succeeds(&related("chosen", ["", ""], &chosen));
    let found: Value = read_json("related/chosen/results.json");
    assert_eq!(texts(&found["experiments"], "name"), ["hc-smoe", "lesa"]);
    assert_eq!(read("related/chosen/runs/lesa-s0.json"), read("related/whole/runs/lesa-s0.json"));
}

#[test]
fn what_cannot_be_done_is_told_before_anything_is() {
    let names = "use hc-smoe, uncurl, seer-moe, thresholds, lesa, factorllm, duo-llm, esacl, memtl";
    for (change, rest, words) in [
        (["\"lesa\"", "\"leas\""], "", vec!["experiments has \"leas\"", names]),
        (["\"lesa\"", "\"uncurl\""], "", vec!["experiments has \"uncurl\" twice"]),
        (["seeds = 2", "seeds = 0"], "", vec!["seeds is 0"]),
        (
            ["windows = 2", "window = 2"],
            "",
            vec!["line ", "unknown field `window`", "--print-profile related"],
        ),
        (["model = {", "#"], "", vec!["with [world] there must be [model] and [pretrain]"]),
        (["", ""], "--methods leas", vec!["--methods leas", "has no such experiment", names]),
        (["", ""], "--only table1", vec!["--only", "has experiments and no methods"]),
        (["", ""], "--budgets 0.5", vec!["--budgets"]),
        (["", ""], "--tokens 1000", vec!["--tokens"]),
        (["", ""], "--shard 1/2", vec!["--shard"]),
        (["", ""], "--discard", vec!["--discard"]),
        (["", ""], "--data x.txt", vec!["embedded world"]),
    ] {
        fails(&related("refused", change, rest), &words);
        assert!(!path("related/refused").exists(), "{rest}");
    }
}
