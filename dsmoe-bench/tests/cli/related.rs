//! `dsmoe reproduce` on a profile of experiments that takes seconds.

use std::fs;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use crate::common::{
    check_report, copy, fails, json_of, killed_four_times, list, number, path, read, read_json, run, shows,
    spawn, succeeds, texts, write,
};

const PROFILE: &str = r#"
name = "tiny-related"
about = "seconds"
seeds = 2
experiments = ["hc-smoe", "uncurl", "seer-moe", "thresholds", "lesa", "factorllm", "duo-llm", "esacl", "memtl", "memtl-requests"]
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

/// A process that is killed while it learns tasks leaves them half done.
#[test]
fn a_killed_stage_of_tasks_ends_as_a_whole_one() {
    whole();
    let line = related("tasks", ["", ""], "--methods esacl --resume --quiet");
    let mut child = spawn(&line);
    let stages = path("related/tasks/cache");
    let learns = |stage: fs::DirEntry| {
        let name = stage.file_name().into_string().unwrap();
        name.starts_with("continual-") && stage.path().join("run/tasks").is_dir()
    };
    let has_begun = || fs::read_dir(&stages).is_ok_and(|found| found.flatten().any(learns));
    while !has_begun() && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    succeeds(&line);
    let run = "runs/esacl-s0.json";
    assert_eq!(read(&format!("related/tasks/{run}")), read(&format!("related/whole/{run}")));
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
    let names = "hc-smoe uncurl seer-moe thresholds lesa factorllm duo-llm esacl memtl memtl-requests";
    assert_eq!(texts(&found["experiments"], "name"), names.split(' ').collect::<Vec<_>>());
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
    assert_eq!(claims, 32);
    // Of 6 experts the load has an entropy of ln 6 at the most.
    for (experiment, column, most) in [
        ("hc-smoe", "load entropy, 6 of 8", 6f64),
        ("seer-moe", "load entropy, 6 of 8", 6.0),
        ("uncurl", "load entropy, task, 4 of 8", 4.0),
    ] {
        let found = experiments.iter().find(|found| found["name"] == experiment).unwrap();
        let cells = list(&found["rows"]).iter().flat_map(|row| list(&row["cells"]));
        let entropies: Vec<f64> =
            cells.filter(|cell| cell["column"] == column).map(|cell| number(&cell["mean"])).collect();
        assert!(entropies.len() > 3, "{experiment}: {found}");
        let range = 0.0..=most.ln() + 1e-9;
        assert!(entropies.iter().all(|entropy| range.contains(entropy)), "{experiment}: {entropies:?}");
    }
    let mixture = list(&experiments[0]["rows"]).last().unwrap();
    let evenness = number(&mixture["cells"][0]["mean"]);
    assert!(mixture["name"] == "the whole mixture" && (0.1..=1.0).contains(&evenness), "{mixture}");
    // What knows the optimum comes nearer to it than what does not.
    let memtl = experiments.iter().find(|found| found["name"] == "memtl").unwrap();
    let error = |row: usize, column: usize| number(&memtl["rows"][row]["cells"][column]["mean"]);
    assert_eq!(memtl["rows"][3]["name"], "three heads, the nearest to the optimum, no method");
    for (column, name) in [(0, "squared error"), (3, "squared error, 5 users")] {
        assert_eq!(memtl["rows"][0]["cells"][column]["column"], name);
        assert!(error(3, column) <= error(1, column), "{memtl}");
    }
    let report = read("related/whole/report.md");
    shows(
        &report,
        &["paper's claim", "HC-SMoE", "UNCURL", "SEER-MoE", "TEAL", "LESA", "random clusters merged"],
    );
    shows(&report, &["load entropy, 6 of 8", "load entropy, task, 4 of 8", "least even layer"]);
    assert!(!report.contains("NaN"), "{report}");
    let run: Value = read_json("related/whole/runs/lesa-s1.json");
    assert_eq!((run["seed"].as_u64(), list(&run["values"]).len()), (Some(1), 12));
}

#[test]
fn budgets_by_request_keep_to_the_share_of_one_budget_for_all() {
    whole();
    let found: Value = read_json("related/whole/results.json");
    let of = list(&found["experiments"]).iter().find(|one| one["name"] == "memtl-requests").unwrap();
    // The numbers of a row by seed.
    let seeds = |row: &str, column: &str| -> Option<Vec<f64>> {
        let row = list(&of["rows"]).iter().find(|one| one["name"] == row)?;
        let cell = list(&row["cells"]).iter().find(|cell| cell["column"] == column)?;
        Some(list(&cell["seeds"]).iter().map(number).collect())
    };
    let ways = ["one budget for all", "one head", "four heads, mean", "four heads, mean and deviation"];
    let (shares, bound) =
        (seeds(ways[0], "active share").unwrap(), seeds("oracle, no method", "extra loss").unwrap());
    for way in ways {
        let (losses, used) = (seeds(way, "extra loss").unwrap(), seeds(way, "active share").unwrap());
        let within = |least: &[f64], most: &[f64]| least.iter().zip(most).all(|(a, b)| *a <= b + 1e-6);
        assert!(within(&bound, &losses), "{way}: {losses:?} below {bound:?}");
        assert!(within(&used, &shares), "{way}: {used:?} above {shares:?}");
        assert!(seeds(way, "squared error").unwrap().iter().all(|error| *error > 0.0));
    }
    assert!(seeds("random budgets", "extra loss").is_some());
    assert!(seeds("random budgets", "squared error").is_none() && seeds("budget 1", "deviation").is_none());
    for budget in ["budget 0.25", "budget 0.375", "budget 0.5", "budget 0.75"] {
        let (all, within) =
            (seeds(budget, "deviation").unwrap(), seeds(budget, "deviation within a source").unwrap());
        assert!(
            all.iter().zip(&within).all(|(all, within)| *within > 0.0 && *within <= all + 1e-9),
            "{budget}"
        );
    }
    // As many requests of every source: the mean over sources left out is that over all requests.
    for column in ["extra loss", "active share"] {
        let (one, all) = (seeds(ways[0], column).unwrap(), seeds("budget 0.5", column).unwrap());
        assert!(one.iter().zip(&all).all(|(a, b)| (a - b).abs() < 1e-6), "{column}: {one:?} and {all:?}");
    }
}

#[test]
fn another_program_finds_the_numbers_and_documents_show_them() {
    whole();
    write("related/spoiled/setup.json", read("related/whole/setup.json"));
    copy("related/whole/runs", "related/spoiled/runs");
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
    shows(&shown, &["| after UNCURL |", "| no new layers |", "Profile tiny-related", "2 seeds; `whole`"]);
    write("related/wrong.md", block(" leas"));
    fails("reproduce splice related/wrong.md", &["line 1", "no experiment leas", "hc-smoe, uncurl"]);
}

/// The stages that are announced are those of the plan: the last number is the number of all.
#[test]
fn the_plan_counts_the_stages() {
    let plan = json_of(&related("plan", ["", ""], "--dry-run --quiet"));
    let stages = plan["stages"].as_u64().unwrap();
    let of = list(&plan["rows"]).iter().map(|row| row["stages"].as_u64().unwrap()).sum::<u64>();
    assert_eq!((stages, list(&plan["rows"]).len()), (of, 22));
    let log = whole();
    let last = log.lines().rfind(|line| line.starts_with('[')).unwrap();
    assert!(last.starts_with(&format!("[{stages}/{stages}] heads memtl-requests-s1")), "{last} of {stages}");
    assert!(!path("related/plan").exists());
}

/// The brief profile leaves no experiment out: it is of one seed, on less text and with a smaller model.
#[test]
fn the_brief_profile_has_the_stages_of_a_seed_at_a_fraction_of_the_work() {
    let plan = |name: &str| json_of(&format!("reproduce --profile {name} --dry-run --quiet"));
    let (brief, whole) = (plan("related-brief"), plan("related"));
    assert_eq!(brief["profile"]["experiments"], whole["profile"]["experiments"]);
    assert_eq!((brief["profile"]["seeds"].as_u64(), whole["profile"]["seeds"].as_u64()), (Some(1), Some(3)));
    assert_eq!(3 * brief["stages"].as_u64().unwrap(), whole["stages"].as_u64().unwrap());
    let (ours, all) = (number(&brief["flops"]), number(&whole["flops"]));
    assert!(ours < all / 40.0, "{ours} of {all}");
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
fn experiments_that_ran_apart_are_merged_into_what_one_run_gives() {
    whole();
    let stages = path("related/whole/cache").display().to_string();
    for (out, methods) in [("part1", "memtl,lesa"), ("part2", "hc-smoe,memtl"), ("other", "lesa")] {
        let seeds = if out == "other" { "--seeds 1" } else { "" };
        succeeds(&related(out, ["", ""], &format!("--methods {methods} {seeds} --quiet --stages {stages}")));
    }
    let merge = |parts: &str, out: &str| format!("reproduce merge {parts} --out related/{out}");
    succeeds(&format!("{} --quiet", merge("related/part1 related/part2", "merged")));
    succeeds(&related(
        "at-once",
        ["", ""],
        &format!("--methods hc-smoe,lesa,memtl --quiet --stages {stages}"),
    ));
    for file in ["results.json", "setup.json", "report.md", "report.html", "runs/lesa-s1.json"] {
        assert_eq!(
            read(&format!("related/merged/{file}")),
            read(&format!("related/at-once/{file}")),
            "{file}"
        );
    }
    let run = read("related/part2/runs/memtl-s1.json");
    write("related/part2/runs/memtl-s1.json", run.replacen("0.", "1.", 1));
    fails(&merge("related/part2", "unmerged"), &["memtl-s1.json", "not what was written"]);
    // Records of earlier versions have no hashes.
    fs::remove_file(path("related/part2/runs/checksums.json")).unwrap();
    write("related/part2/runs/memtl-s1.json", &run);
    for (parts, changed, words) in [
        ("related/part1 related/other", None, vec!["are not parts of one set", "setup.json"]),
        (
            "related/part1 related/part2",
            Some(run.replacen("0.", "1.", 1)),
            vec!["memtl of seed 1", "other numbers"],
        ),
        ("related/part2", Some(run.replace("memtl", "lesa")), vec!["memtl-s1.json", "lesa of seed 1"]),
        ("related/part2", Some("{".to_owned()), vec!["memtl-s1.json"]),
    ] {
        if let Some(changed) = changed {
            write("related/part2/runs/memtl-s1.json", changed);
        }
        fails(&merge(parts, "unmerged"), &words);
        assert!(!path("related/unmerged").exists(), "{parts}");
    }
    fs::remove_file(path("related/part2/runs/memtl-s1.json")).unwrap();
    fails(&merge("related/part2", "unmerged"), &["memtl-s1.json is in no part"]);
}

/// The experiments on a pretrained model, on one of the world: numbers by text, and claims about all of them.
#[test]
fn experiments_on_a_deep_model_measure_every_text() {
    let deep = "[\"lesa-deep\", \"thresholds-deep\"]";
    let text = PROFILE.replace("layers = 3", "layers = 7").replace("seeds = 2", "seeds = 1");
    let (before, after) = text.split_once("experiments = ").unwrap();
    let (_, after) = after.split_once('\n').unwrap();
    write("related/deep.toml", format!("{before}experiments = {deep}\n{after}"));
    succeeds("reproduce --profile related/deep.toml --out related/deep --quiet");
    let found: Value = read_json("related/deep/results.json");
    let thresholds = &list(&found["experiments"])[1];
    let teal = list(&thresholds["rows"]).iter().find(|row| row["name"] == "teal").unwrap();
    assert_eq!(list(&teal["cells"]).len(), 16, "four shares of four texts");
    let claims = list(&thresholds["claims"]);
    assert_eq!(claims.len(), 4);
    let columns = &claims[1]["columns"];
    assert_eq!(list(columns).len(), 8);
    assert!(list(columns).iter().any(|column| column == "0.50 used on stories"), "{columns}");
    // One search, on every text, and its control at the share that the search left.
    assert!(claims[0]["row"] == "search" && list(&claims[0]["columns"]).len() == 4, "{}", claims[0]);
    let share = |row: &str| -> f64 {
        let row = list(&thresholds["rows"]).iter().find(|one| one["name"] == row).unwrap();
        let cell = list(&row["cells"]).iter().find(|cell| cell["column"] == "share used as searched");
        number(&cell.unwrap()["mean"])
    };
    let (searched, uniform) = (share("search"), share("uniform"));
    assert!(searched > 0.05 && searched < 1.0, "{searched}");
    assert!((searched - uniform).abs() < 0.02, "{searched} and {uniform}");
    if let Some((agrees, text)) = check_report(&path("related/deep")) {
        assert!(agrees, "{text}");
    }
}

#[test]
fn what_cannot_be_done_is_told_before_anything_is() {
    let names =
        "use hc-smoe, uncurl, seer-moe, thresholds, lesa, factorllm, duo-llm, esacl, memtl, memtl-requests";
    let all = format!("{names}, lesa-deep, thresholds-deep");
    for (change, rest, words) in [
        (["\"lesa\"", "\"leas\""], "", vec!["experiments has \"leas\"", &all]),
        (["\"lesa\"", "\"uncurl\""], "", vec!["experiments has \"uncurl\" twice"]),
        (["seeds = 2", "seeds = 0"], "", vec!["seeds is 0"]),
        (
            ["windows = 2", "window = 2"],
            "",
            vec!["line ", "unknown field `window`", "--print-profile related"],
        ),
        (
            ["seeds = 2", "seeds = 2\nsource = [{ name = \"a\", data = \"a.txt\" }]"],
            "",
            vec!["both [[source]] and [[held_out]]"],
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
