//! Routers of Duo-LLM under the squared loss on their share, at a temperature that is annealed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};
use std::time::Duration;

use dsmoe_core::Model;
use dsmoe_datasets::TokenStream;
use dsmoe_kernels::comm::Communicator;
use dsmoe_kernels::comm::threads::members;
use dsmoe_train::{RunOptions, TrainConfig, Trainer, Zero};
use serde_json::Value;

use crate::common::{fails, number, on_text, path, read, shows, succeeds, weights};

/// Makes models of both stages: `random`, and routers of `two` and of `three` ways.
fn models() {
    static MADE: Once = Once::new();
    MADE.call_once(|| {
        for line in [
            "prune dense --method duo --set ratio=8 --set start=random --budget 95% --out budget/random",
            "prune budget/random --method duo-router --budget 95% --out budget/two",
            "prune budget/random --method duo-router --set skip=true --budget 90% --out budget/three",
        ] {
            succeeds(line);
        }
    });
}

fn training(model: &str, more: &str) -> String {
    format!("train {model} {} --batch 2 --seq 32 --accumulate 2 {more}", on_text())
}

/// The lines of a run's steps.
fn steps(run: &str) -> Vec<Value> {
    let lines = read(&format!("{run}/metrics.jsonl"));
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get("lm_loss").is_some()).collect()
}

#[test]
fn a_run_has_the_squared_loss_and_resumes_to_the_bit() {
    models();
    let settings = "--steps 6 --lr 1e-2 --hold squared --set hold_weight=4 --set router_temperature=[1,0.1]";
    for ways in ["two", "three"] {
        let line = training(&format!("budget/{ways}"), settings);
        let [whole, parts] = ["whole", "parts"].map(|name| format!("budget/{ways}-{name}"));
        succeeds(&format!("{line} --out {whole}"));
        let records = steps(&whole);
        let temperatures: Vec<f64> = records.iter().map(|line| number(&line["router_temperature"])).collect();
        assert_eq!(temperatures.len(), 6);
        for (found, want) in temperatures.iter().zip([1.0, 0.82, 0.64, 0.46, 0.28, 0.1]) {
            assert!((found - want).abs() < 1e-12, "{temperatures:?}");
        }
        for line in &records {
            let [loss, text, balance, share] =
                ["loss", "lm_loss", "balance_loss", "share_loss"].map(|key| number(&line[key]));
            assert!((loss - text - balance - 4.0 * share).abs() < 1e-9 && share > 0.0, "{line}");
            assert_eq!(number(&line["sparsity_weight"]), 0.0, "{line}");
        }
        shows(
            &read(&format!("{whole}/run.toml")),
            &["hold = \"squared\"", "hold_weight = 4.0", "router_temperature = [1.0, 0.1]"],
        );

        succeeds(&format!("{line} --out {parts} --stop-after 3"));
        let other = line.replace("hold_weight=4", "hold_weight=5");
        fails(&format!("{other} --out {parts} --resume"), &["hold_weight was 4.0 and is now 5.0"]);
        let other = line.replace("[1,0.1]", "[1,0.2]");
        fails(&format!("{other} --out {parts} --resume"), &["router_temperature was [1.0,0.1]"]);
        succeeds(&format!("{line} --out {parts} --resume --threads 1"));
        assert!(weights(&parts) == weights(&whole), "{ways}");

        // Each of the settings has a part in it.
        for (name, of_line) in [
            ("loss", line.replace("--hold squared --set hold_weight=4", "")),
            ("light", line.replace("hold_weight=4", "hold_weight=1")),
            ("warm", line.replace("[1,0.1]", "[1,1]")),
        ] {
            let out = format!("budget/{ways}-{name}");
            succeeds(&format!("{of_line} --out {out}"));
            assert!(weights(&out) != weights(&whole), "{ways} {name}");
        }
        shows(&read(&format!("budget/{ways}-loss/run.toml")), &["hold = \"loss\""]);
        assert!(steps(&format!("budget/{ways}-loss")).iter().all(|line| line.get("share_loss").is_none()));
    }
}

#[test]
fn the_squared_loss_brings_the_mean_to_the_share() {
    models();
    let settings = "--steps 100 --lr 3e-3 --router-lr-scale 10 --hold squared --set hold_weight=30";
    for (ways, target) in [("two", "0.2"), ("three", "0.1")] {
        let out = format!("budget/{ways}-held");
        let line = training(&format!("budget/{ways}"), settings);
        succeeds(&format!("{line} --active-target {target} --out {out}"));
        let losses: Vec<f64> = steps(&out).iter().map(|line| number(&line["share_loss"])).collect();
        let last = losses[80..].iter().sum::<f64>() / 20.0;
        assert!(losses[0] > 0.02 && last < 0.15 * losses[0], "{ways}: {losses:?}");
    }
}

#[test]
fn what_has_no_temperature_is_refused() {
    models();
    let none = "--steps 1 --out budget/none";
    for (model, more, parts) in [
        (
            "moe",
            "--active-target 0.5 --hold squared",
            ["hold is squared", "a model without routers that have"],
        ),
        ("budget/random", "--active-target 0.5 --hold squared", ["hold is squared", "such as duo's"]),
        (
            "budget/two",
            "--active-target 0.25..0.5 --hold squared",
            ["hold is squared for a range", "threshold"],
        ),
        ("budget/two", "--set hold_weight=2", ["hold_weight is 2", "--hold squared only"]),
        ("budget/two", "--hold squared --set hold_weight=-1", ["hold_weight is -1", "0 to 1000000"]),
        ("budget/two", "--sparsity 1 --hold squared", ["hold is set without a share", "--active-target"]),
        ("dense", "--set router_temperature=[1,0.1]", ["router_temperature is 1 to 0.1", "without routers"]),
        (
            "budget/random",
            "--set router_temperature=[1,1]",
            ["router_temperature is 1 to 1", "such as duo's"],
        ),
        ("budget/two", "--set router_temperature=[0,1]", ["router_temperature is 0 to 1", "0.001 to 1000"]),
    ] {
        let line = training(model, &format!("{more} {none}"));
        fails(&line, &parts);
        fails(&format!("{line} --dry-run"), &parts);
    }
    assert!(!path("budget/none").exists());
}

fn text() -> TokenStream {
    let mut stream = TokenStream::default();
    (0..40).for_each(|at| stream.push(&[1, 5 + at % 7, 9, 2, 7, 3, 8 + at % 11, 4, 6 + at % 5, 12, 30, 31]));
    stream
}

fn config() -> TrainConfig {
    let mut config =
        TrainConfig { steps: Some(4), batch: 1, seq: 16, accumulate: 2, lr: 1e-2, ..TrainConfig::default() };
    for setting in [
        "lanes=4",
        "threads=1",
        "hold=squared",
        "hold_weight=4",
        "router_temperature=[1, 0.1]",
        "clip=0.5",
        "valid_fraction=0",
    ] {
        config.set(setting).unwrap();
    }
    config
}

/// Goes on with the run in `out` on so many processes, here threads, by `stop_after` steps or to the end.
fn train(source: &Path, out: &Path, (size, zero): (usize, Zero), stop_after: Option<u64>) {
    let resume = out.exists();
    std::thread::scope(|scope| {
        for member in members(size, Duration::from_secs(120)) {
            scope.spawn(move || {
                let comm: Arc<dyn Communicator> = Arc::new(member);
                let outline = zero.on(size) == Zero::Parameters;
                let load = if outline { Model::load_outline } else { Model::load };
                let options = RunOptions { stop_after, resume, zero, comm, ..RunOptions::new(source, out) };
                let mut trainer = Trainer::new(load(source).unwrap(), &text(), config(), options).unwrap();
                trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
            });
        }
    });
}

#[test]
fn any_number_of_processes_leaves_the_same_bytes() {
    models();
    dsmoe_baselines::register();
    let files = ["model.safetensors", "checkpoints/step-00000004/optimizer.safetensors"];
    let bytes = |out: &Path| files.map(|file| fs::read(out.join(file)).unwrap());
    for ways in ["two", "three"] {
        let source = &path(&format!("budget/{ways}"));
        let out = |name: &str| -> PathBuf { path(&format!("budget/{ways}-processes-{name}")) };
        let alone = &out("alone");
        train(source, alone, (1, Zero::Moments), None);
        for (size, zero) in
            [(2, Zero::Moments), (4, Zero::Moments), (2, Zero::Gradients), (4, Zero::Parameters)]
        {
            let out = &out(&format!("{size}-{zero:?}"));
            train(source, out, (size, zero), None);
            assert!(bytes(out) == bytes(alone), "{ways} on {size} processes, {zero:?}");
        }
        let parts = &out("parts");
        for (size, zero, stop_after) in
            [(4, Zero::Parameters, Some(1)), (1, Zero::Moments, Some(2)), (2, Zero::Gradients, None)]
        {
            train(source, parts, (size, zero), stop_after);
        }
        assert!(bytes(parts) == bytes(alone), "{ways} in parts");
    }
}
