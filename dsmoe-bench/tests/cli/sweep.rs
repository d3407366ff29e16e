//! `dsmoe sweep`, and `dsmoe eval --against`.

use serde_json::Value;

use crate::common::{copy, fails, json_of, list, number, path, read, read_json, shows, succeeds, write};

/// A model with thresholds by budget.
fn budgets() -> &'static str {
    static MADE: std::sync::OnceLock<()> = std::sync::OnceLock::new();
    MADE.get_or_init(|| {
        let line =
            "convert dense --calib text.txt --samples 16 --seq 32 --active-target 0.5 --out sweep/model";
        succeeds(line);
    });
    "sweep/model"
}

#[test]
fn a_sweep_that_is_refused_makes_nothing() {
    let model = budgets();
    let line = "--data text.txt --limit-tokens 64 --seq 32 --active 0.5 --out sweep/refused";
    for batch in ["18446744073709551615", "100000000000"] {
        let wanted = format!("--batch {batch} with --decode 64 needs");
        fails(&format!("sweep {model} {line} --batch {batch}"), &[&wanted, "of memory", "use fewer texts"]);
    }
    let wanted = "--decode 113 behind a prompt of 16 tokens needs 129 positions and the model has 128";
    fails(&format!("sweep {model} {line} --decode 113"), &[wanted]);
    // The dense model has fewer positions.
    copy("dense", "sweep/short");
    let mut config = read_json("sweep/short/config.json");
    config["max_position_embeddings"] = 64.into();
    write("sweep/short/config.json", config.to_string());
    fails(&format!("sweep {model} {line} --against sweep/short"), &["80 positions and the model has 64"]);
    // Weights that are not finite are found when they are read.
    copy(model, "sweep/broken");
    let file = path("sweep/broken/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 4096..].fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    fails(&format!("sweep sweep/broken {line}"), &["sweep/broken", "lm_head.weight", "not finite"]);
    assert!(!path("sweep/refused").exists());
}

#[test]
fn a_sweep_measures_every_budget_and_resumes() {
    let model = budgets();
    let line = format!(
        "sweep {model} --data text.txt --limit-tokens 600 --seq 64 --active 0.75,0.5 --against dense --dtype f32 --prefill 32 \
         --decode 4 --repeats 3 --out sweep/out"
    );
    let found = json_of(&line);
    let points = list(&found["points"]);
    assert_eq!(points.len(), 3);
    assert_eq!((&points[0]["active"], &points[1]["active"]), (&Value::Null, &0.5.into()));
    let ratio = |at: usize| number(&points[at]["active_ratio"]);
    assert!(ratio(1) < ratio(2), "{found}");
    for point in &points[1..] {
        let agreement = &point["texts"][0]["agreement"];
        assert!(number(&agreement["kl"]) > 0.0 && number(&agreement["top1"]) <= 1.0, "{point}");
        assert!(
            number(&point["times"]["prefill"]) > 0.0 && number(&point["times"]["dense"][1]) > 0.0,
            "{point}"
        );
    }
    // `dsmoe eval` measures the same.
    let eval = format!("eval {model} --data text.txt --limit-tokens 600 --seq 64 --dtype f32");
    let of_eval = json_of(&format!("{eval} --active 0.5 --against dense"));
    assert_eq!(of_eval["nll"], points[1]["nll"]);
    assert_eq!(of_eval["agreement"][0]["kl"], points[1]["texts"][0]["agreement"]["kl"]);
    let itself =
        json_of("eval dense --data text.txt --limit-tokens 600 --seq 64 --dtype f32 --against dense");
    assert_eq!((number(&itself["agreement"][0]["kl"]), number(&itself["agreement"][0]["top1"])), (0.0, 1.0));

    for file in ["report.html", "charts/sweep-share.svg", "csv/sweep.csv", "results.json"] {
        assert!(path("sweep/out").join(file).is_file(), "{file}");
    }
    shows(&read("sweep/out/report.md"), &["By budget", "50.0 %", "75.0 %", "dense"]);
    fails(&line, &["is not empty", "--resume"]);
    // A point that is done is not measured again, but one that was changed is.
    let written = || std::fs::metadata(path("sweep/out/points/dense.json")).unwrap().modified().unwrap();
    let (before, mut kept) = (written(), read_json("sweep/out/points/0.5.json"));
    kept["nll"] = 1.25.into();
    write("sweep/out/points/0.5.json", kept.to_string());
    std::fs::remove_file(path("sweep/out/points/0.75.json")).unwrap();
    let again = json_of(&format!("{line} --resume"));
    assert_eq!(written(), before);
    for at in [1, 2] {
        assert_eq!(again["points"][at]["nll"], points[at]["nll"]);
    }
    fails(
        &format!("{line} --resume --limit-tokens 500").replacen("--limit-tokens 600 ", "", 1),
        &["sweep.json", "another --out"],
    );
}

#[test]
fn what_cannot_be_swept_is_refused() {
    let model = budgets();
    fails("sweep moe --data text.txt", &["moe", "no thresholds by budget", "--calib"]);
    fails("sweep dense --data text.txt", &["no thresholds by budget"]);
    fails(&format!("sweep {model} --data text.txt --active 0.01"), &["--active 0.01", "serves shares from"]);
    fails("eval dense --data text.txt --against dense --perplexity window", &["--against", "stream"]);
}
