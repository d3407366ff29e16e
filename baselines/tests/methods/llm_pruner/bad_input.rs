//! What cannot be done is one line with a help, and leaves nothing behind.

use std::fs;
use std::path::Path;

use dsmoe_baselines::Budget;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::masks::Masks;

use super::common::{Run, model, saved, tokens};

const METHODS: [&str; 2] = ["llm-pruner-block", "llm-pruner-channel"];

fn run<'a>(method: &'a str, calibration: &'a [Vec<u32>]) -> Run<'a> {
    Run { method, set: &[], budget: Budget::Share(0.8), calibration, seed: 0, force: false }
}

/// Runs it; the message must be one line with all parts, and nothing may be left beside the model.
fn fails(run: Run<'_>, source: &Path, parts: &[&str]) {
    let out = source.parent().unwrap().join("out");
    let error = run.run(source, &out).expect_err(&format!("{} {:?}", run.method, run.set)).to_string();
    assert!(!error.contains('\n') && parts.iter().all(|part| error.contains(part)), "{error}");
    let left: Vec<_> = fs::read_dir(out.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["dense"], "{error}");
}

#[test]
fn settings_and_budgets() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F32);
    let calibration = tokens(1, 8);
    for (set, parts) in [
        (&["layers=2..4"][..], &["layers: 2..4 of 4 layers", "within 0..3"][..]),
        (&["layers=2..1"], &["layers: 2..1", "within 0..3"]),
        (&["layers=2"], &["layers: cannot be 2", "FIRST..LAST"]),
        (&["layers=-1..2"], &["FIRST..LAST"]),
        (&["heads=maybe"], &["heads: cannot be \"maybe\"", "True removes"]),
        (&["importance=taylor"], &["importance: cannot be \"taylor\"", "taylor-first"]),
        (&["importance="], &["importance: cannot be \"\""]),
        (&["reduce=median"], &["reduce: cannot be \"median\"", "prod"]),
        (&["ratio=0.5"], &["ratio: is not a setting", "importance, reduce, layers, heads"]),
    ] {
        fails(Run { set, ..run("llm-pruner-block", &calibration) }, &source, parts);
    }
    for (set, parts) in [
        (&["multiple=0"], ["multiple: cannot be 0", "1 to hidden_size"]),
        (&["multiple=33"], ["multiple: is 33", "1 to 32"]),
    ] {
        let run = run("llm-pruner-channel", &calibration);
        fails(Run { set, ..run }, &source, &parts);
    }
    for method in METHODS {
        let run = run(method, &calibration);
        fails(
            Run { budget: Budget::Share(0.01), ..run },
            &source,
            &["budget 0.01", "reach", "give a budget between"],
        );
        fails(Run { budget: Budget::Params(1e9), ..run }, &source, &["budget 1B", "reach"]);
    }
}

#[test]
fn calibration_text() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F32);
    for method in METHODS {
        fails(run(method, &[]), &source, &["calibration: there is no sequence"]);
        fails(
            run(method, &tokens(3, 1)),
            &source,
            &["calibration: sequences of 1 tokens", "2 tokens or more"],
        );
        let uneven = [tokens(1, 5), tokens(1, 6)].concat();
        fails(run(method, &uneven), &source, &["calibration: sequences of 5 and 6 tokens", "one length"]);
        fails(run(method, &[vec![1, 40, 2]]), &source, &["token id 40", "tokenizer"]);
        fails(run(method, &tokens(1, 40)), &source, &["39 positions", "shorter sequences"]);
        // What reads no text needs none.
        let run = Run { set: &["importance=magnitude-l1"], ..run(method, &[]) };
        run.run(&source, &work.path().join("none")).unwrap();
        fs::remove_dir_all(work.path().join("none")).unwrap();
    }
}

#[test]
fn models() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F32);
    let calibration = tokens(1, 8);
    for method in METHODS {
        let run = run(method, &calibration);
        let experts = tempfile::tempdir().unwrap();
        let converted = experts.path().join("dense");
        convert(&source, &converted, &ConvertOptions::new(4), &mut |_| {}).unwrap();
        fails(run, &converted, &["model: has experts", "dense LLaMA"]);

        let masked = tempfile::tempdir().unwrap();
        let target = saved(&model(true), masked.path(), Dtype::F32);
        let mut masks = Masks::new();
        masks.insert("model.layers.0.self_attn.q_proj.weight".to_owned(), 32, 32, |_, _| true);
        masks.save(&target).unwrap();
        fails(run, &target, &["model: has masks.safetensors", "dense model"]);

        let error = Run { force: true, ..run }.run(&source, &source).unwrap_err().to_string();
        assert!(error.contains("holds the model that is read"), "{error}");

        let damaged = tempfile::tempdir().unwrap();
        let target = saved(&model(true), damaged.path(), Dtype::F32);
        let weights = target.join("model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
        fails(run, &target, &["model.safetensors"]);

        let mut infinite = model(true);
        infinite.params_mut()[0] = f32::MAX;
        let target = saved(&infinite, damaged.path(), Dtype::F32);
        fails(Run { calibration: &[vec![0, 0, 0, 0]], ..run }, &target, &["finite"]);
    }
    let out = work.path().join("taken");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("file"), "").unwrap();
    let error = run(METHODS[0], &calibration).run(&source, &out).unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
}
