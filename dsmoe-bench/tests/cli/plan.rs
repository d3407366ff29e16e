//! `dsmoe plan`, and `dsmoe generate --plan`.

use std::fs;
use std::time::Instant;

use crate::common::{
    copy, fails, is_wrong_usage, json_of, killed_after, kills_change_no_byte, list, number, path, read,
    read_json, shows, succeeds, write,
};

/// A model with thresholds by budget, and a profile of it, which no test changes.
fn profiled() -> &'static str {
    static MADE: std::sync::OnceLock<()> = std::sync::OnceLock::new();
    MADE.get_or_init(|| {
        succeeds("convert dense --calib text.txt --samples 16 --seq 32 --active-target 0.5 --out plan/model");
        let text = read("text.txt");
        let middle = (text.len() / 2..).find(|&at| text.is_char_boundary(at)).unwrap();
        write("plan/a.txt", &text[..middle]);
        write("plan/b.txt", &text[middle..]);
        succeeds(&format!("{PROFILE} --out plan/made"));
    });
    "plan/made"
}

const PROFILE: &str = "plan profile plan/model --data a=plan/a.txt b=plan/b.txt --prompt 16 --continuation 16 --requests 12 \
                       --repeats 1";

#[test]
fn a_profile_that_is_refused_makes_nothing() {
    profiled();
    copy("plan/model", "plan/broken");
    let file = path("plan/broken/model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let end = bytes.len();
    // Weights that are not finite.
    bytes[end - 4096..].fill(0xff);
    fs::write(&file, bytes).unwrap();
    let line = PROFILE.replace("plan/model", "plan/broken");
    fails(&format!("{line} --out plan/refused"), &["plan/broken", "lm_head.weight", "not finite"]);
    assert!(!path("plan/refused").exists());
}

#[test]
fn a_plan_is_profiled_trained_and_chooses() {
    let plan = "plan/own";
    copy(profiled(), plan);
    let profile = read_json("plan/own/profile.json");
    let shares = list(&profile["shares"]);
    assert!(shares.len() > 1 && list(&profile["requests"]).len() == 24);
    // Shares of single requests make the shares of all.
    for (j, active) in list(&profile["active"]).iter().enumerate() {
        let own = list(&profile["requests"]).iter().map(|request| number(&list(&request["active"])[j]));
        assert!((own.sum::<f64>() / 24.0 - number(active)).abs() < 1e-9, "budget {j}");
    }
    // The profile has the losses of `dsmoe eval`: the whole windows of a source at one budget.
    fails(&format!("{PROFILE} --out {plan}"), &["is not empty", "--resume"]);
    let before = read("plan/own/points/features.json");
    fs::remove_file(path("plan/own/points/features.json")).unwrap();
    succeeds(&format!("{PROFILE} --out {plan} --resume"));
    assert_eq!(read("plan/own/points/features.json"), before);
    assert_eq!(read_json("plan/own/profile.json")["requests"], profile["requests"]);
    let shorter = PROFILE.replace("--continuation 16", "--continuation 8");
    fails(&format!("{shorter} --out {plan} --resume"), &["another model, text or setting"]);
    let dry = json_of(&format!("{PROFILE} --dry-run"));
    assert_eq!(dry["requests"], 24);

    fails(&format!("plan choose {plan} --prompt hello"), &["holds no network", "dsmoe plan train"]);
    let dry = |line: &str| json_of(&format!("plan train {plan} --heads 3 --epochs 20 --dry-run {line}"));
    let planned = dry("");
    assert_eq!((number(&planned["requests"]), number(&planned["passes"])), (24.0, 80.0));
    assert_eq!(planned["replaces"], false);
    assert!(!path("plan/own/heads.json").exists());
    let trained = json_of(&format!("plan train {plan} --heads 3 --epochs 20"));
    assert_eq!((number(&trained["heads"]), number(&trained["requests"])), (3.0, 24.0));
    let heads = read("plan/own/heads.json");
    succeeds(&format!("plan train {plan} --heads 3 --epochs 20"));
    assert_eq!(read("plan/own/heads.json"), heads);
    assert_eq!(dry("--seed 7")["replaces"], true);
    assert_eq!(read("plan/own/heads.json"), heads);
    let shown = succeeds(&format!("plan train {plan} --dry-run"));
    shows(&shown, &["passes over requests", "replaces the one in plan/own/heads.json"]);

    let prompt = "the-little-town-lies-on-a-river";
    let choose = |more: &str| json_of(&format!("plan choose {plan} --prompt {prompt} --max-tokens 8 {more}"));
    let slow = choose("--deadline 1000 --mu 1000000");
    let one = &slow["requests"][0];
    assert_eq!((one["device"].as_str(), one["in_time"].as_bool()), (Some("processor"), Some(true)));
    assert_eq!(number(&one["active"]), number(shares.last().unwrap()));
    let hurried = choose("--deadline 0.0000001");
    assert_eq!(hurried["requests"][0]["in_time"], false);
    let served = choose("--deadline 1 --server 1e9,1e9,0");
    assert_eq!(served["requests"][0]["device"], "server");
    assert_eq!(number(&served["requests"][0]["server_share"]), 1.0);

    write(
        "plan/requests.jsonl",
        "{\"prompt\": \"the river runs\", \"max_tokens\": 4, \"deadline\": 2}\n\n{\"prompt\": \"a town and a hill\", \"max_tokens\": 9, \
         \"deadline\": 1, \"weight\": 2}\n",
    );
    let both = json_of(&format!("plan choose {plan} --requests plan/requests.jsonl"));
    assert_eq!(list(&both["requests"]).len(), 2);
    write("plan/wrong.jsonl", "{\"prompt\": \"x y z\", \"max_tokens\": 4}\n");
    fails(&format!("plan choose {plan} --requests plan/wrong.jsonl"), &["line 1", "deadline"]);
    fails(&format!("plan choose {plan} --prompt hello --server 1,2"), &["--server", "PREFILL,DECODE,START"]);

    let line = format!("generate plan/model --max-tokens 4 --prompt {prompt}");
    let made = json_of(&format!("{line} --plan {plan} --deadline 100"));
    assert!(shares.contains(&made["planned"]["active"]), "{made}");
    let again = json_of(&format!("{line} --active {}", made["planned"]["active"]));
    assert_eq!(again["new_token_ids"], made["new_token_ids"]);
    fails(&format!("generate dense --plan {plan} --deadline 1 --prompt hello"), &["plan of another model"]);
    let usage = is_wrong_usage(&format!("generate plan/model --plan {plan} --prompt hello"));
    shows(&usage, &["--deadline"]);
}

#[test]
fn a_plan_is_compared_with_one_budget_for_all() {
    let plan = profiled();
    let found = json_of(&format!("plan eval {plan} --heads 2 --epochs 5 --scenes 2 --server 5000,500,0.001"));
    let splits = list(&found["splits"]);
    assert_eq!(splits.len(), 3);
    for split in splits {
        // Who knows the losses does best.
        for way in ["one_budget", "one_head", "ensemble", "cautious"] {
            assert!(number(&split["oracle"]) <= number(&split[way]["loss"]) + 1e-9, "{way}: {split}");
            let share = number(&split["one_budget"]["share"]);
            assert!(number(&split[way]["share"]) <= share + 1e-9, "{way}: {split}");
        }
    }
    let placements = list(&found["placements"]);
    let few = placements.iter().filter(|row| row["requests"] == 5);
    assert!(
        few.clone().count() >= 6 && few.into_iter().all(|row| number(&row["cost"]) >= 1.0 - 1e-9),
        "{found}"
    );
    shows(
        &succeeds(&format!("plan eval {plan} --heads 2 --epochs 5 --scenes 1")),
        &["one budget", "oracle", "descent"],
    );
    let line = format!("plan eval {plan} --heads 2 --epochs 5 --scenes 2 --dry-run");
    let planned = json_of(&line);
    assert_eq!((number(&planned["passes"]), number(&planned["scenes"])), (60.0, 2.0));
    for (one, of) in list(&planned["splits"]).iter().zip(splits) {
        assert_eq!((&one["held_out"], &one["requests"]), (&of["held_out"], &of["requests"]));
        assert_eq!(number(&one["learnt"]) + number(&one["requests"]), 24.0);
    }
    assert_eq!((&planned["active"], list(&planned["splits"]).len()), (&found["active"], 3));
    shows(&succeeds(&line), &["not learnt", "every fourth", "passes over requests"]);
    // A plan refuses what a run refuses.
    for rest in ["", "--dry-run"] {
        fails(&format!("plan eval {plan} --active 0.123 {rest}"), &["--active 0.123", "has the budgets"]);
        fails(&format!("plan eval {plan} --server 1,2 {rest}"), &["--server", "PREFILL,DECODE,START"]);
        fails(&format!("plan eval dense {rest}"), &["holds no profile", "dsmoe plan profile"]);
        fails(&format!("plan train dense {rest}"), &["holds no profile", "dsmoe plan profile"]);
    }
    // Profiles of earlier versions do not have what single requests opened.
    let mut old = read_json("plan/made/profile.json");
    for request in old["requests"].as_array_mut().unwrap() {
        request.as_object_mut().unwrap().remove("active").unwrap();
    }
    write("plan/old/profile.json", old.to_string());
    fails("plan eval plan/old", &["do not fit together", "profile the model again"]);
    write("plan/blocked/profile.json", read("plan/made/profile.json"));
    write("plan/blocked/heads.json/note.txt", "");
    for rest in ["", "--dry-run"] {
        fails(&format!("plan train plan/blocked {rest}"), &["heads.json is a folder", "remove it"]);
    }
    fails("plan profile moe --data text.txt --out plan/no", &["no thresholds by budget"]);
    let line = "plan profile plan/model --data text.txt --out plan/no";
    fails(&format!("{line} --prompt 1"), &["--prompt 1", "2 tokens at least"]);
    fails(&format!("{line} --prompt 100 --continuation 100"), &["128 in all"]);
    fails(&format!("{line} --active 0.5"), &["one budget leaves no choice"]);
    write("plan/short.txt", "too short");
    fails("plan profile plan/model --data plan/short.txt --out plan/no", &["fewer than two requests"]);
    assert!(!path("plan/no").exists());
}

#[test]
fn kills_do_not_change_a_profile() {
    profiled();
    // Times would differ.
    let line = PROFILE.replace("--repeats 1", "--repeats 0");
    kills_change_no_byte(&format!("{line} --resume --quiet --out plan/kills"), "plan/kills", 3);
}

#[test]
fn a_killed_training_leaves_no_network_or_a_whole_one() {
    profiled();
    succeeds(&format!("{} --out plan/killed", PROFILE.replace("--repeats 1", "--repeats 0")));
    let line = "plan train plan/killed --heads 2 --epochs 1000";
    let network = || fs::read(path("plan/killed/heads.json")).ok();
    let started = Instant::now();
    succeeds(line);
    let (took, want) = (started.elapsed(), network());
    assert!(want.is_some());
    fs::remove_file(path("plan/killed/heads.json")).unwrap();
    let mut kills = 0;
    for part in [0.2, 0.5, 0.8, 0.95] {
        kills += u32::from(killed_after(&format!("{line} --quiet"), took.mul_f64(part)));
        assert!([None, want.clone()].contains(&network()), "killed after {part}");
    }
    assert!(kills > 0, "no training was still going when it was to be killed");
    succeeds(line);
    assert!(network() == want);
    shows(&succeeds("verify plan/killed"), &["as it was written"]);
}

#[test]
fn the_papers_problem_is_imitated() {
    let found = json_of("plan offload --users 2 --samples 400 --heads 2 --epochs 4");
    let rows = list(&found["results"]);
    assert_eq!(rows.len(), 5);
    assert!(rows.iter().all(|row| number(&row["cost"]) >= 1.0 - 1e-9), "{found}");
    shows(
        &succeeds("plan offload --users 2 --samples 40 --heads 1 --epochs 1"),
        &["right decisions", "no method"],
    );
    let planned = json_of("plan offload --users 2 --samples 401 --heads 2 --epochs 4 --dry-run");
    assert_eq!((number(&planned["passes"]), number(&planned["sets"])), (16.0, 4.0));
    assert_eq!(number(&planned["learnt"]), 200.0);
    shows(&succeeds("plan offload --dry-run"), &["10,000 learnt, 10,000 decided", "the best of 8 sets"]);
}
