//! Impossible requests are refused with one line that says how to correct them, and write nothing.

use std::fs;
use std::path::Path;

use dsmoe_baselines::Budget;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::masks::Masks;

use super::super::common::{Run, saved, tokens};
use super::model;

const METHODS: [&str; 2] = ["llm-pruner-block", "llm-pruner-channel"];

/// Runs it; the message must be one line with all parts, and nothing may be left beside the model.
fn fails(run: Run<'_>, source: &Path, parts: &[&str]) {
    let out = source.parent().unwrap().join("out");
    run.fails(source, &out, parts);
    let left: Vec<_> = fs::read_dir(out.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["dense"], "{run:?}");
}

fn run<'a>(method: &'a str, calibration: &'a [Vec<u32>]) -> Run<'a> {
    Run::new(method, &[], 0.8, calibration)
}

#[test]
fn settings_and_budgets() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F32);
    let calibration = tokens(1, 8);
    let [block, channel] = METHODS;
    for (method, set, parts) in [
        (block, "layers=2..4", &["layers: 2..4 of 4 layers", "within 0..3"][..]),
        (block, "layers=2..1", &["layers: 2..1", "within 0..3"]),
        (block, "layers=2", &["layers: cannot be 2", "FIRST..LAST"]),
        (block, "layers=-1..2", &["FIRST..LAST"]),
        (block, "heads=maybe", &["heads: cannot be \"maybe\"", "True removes"]),
        (block, "importance=taylor", &["importance: cannot be \"taylor\"", "taylor-first"]),
        (block, "importance=", &["importance: cannot be \"\""]),
        (block, "reduce=median", &["reduce: cannot be \"median\"", "prod"]),
        (block, "ratio=0.5", &["ratio: is not a setting", "importance, reduce, layers, heads"]),
        (channel, "multiple=0", &["multiple: cannot be 0", "1 to hidden_size"]),
        (channel, "multiple=33", &["multiple: is 33", "1 to 32"]),
    ] {
        fails(Run { set: &[set], ..run(method, &calibration) }, &source, parts);
    }
    for method in METHODS {
        let run = |budget| Run { budget, ..run(method, &calibration) };
        fails(run(Budget::Share(0.01)), &source, &["budget 0.01", "out of reach", "the least reachable is"]);
        fails(run(Budget::Params(1e9)), &source, &["budget 1B", "reach"]);
    }
}

#[test]
fn calibration_text() {
    let work = tempfile::tempdir().unwrap();
    let source = saved(&model(true), work.path(), Dtype::F32);
    for method in METHODS {
        let uneven = [tokens(1, 5), tokens(1, 6)].concat();
        for (calibration, parts) in [
            (&[][..], &["calibration: 0 sequences are too few"][..]),
            (&tokens(3, 1), &["calibration: sequence 0 has 1 tokens", "at least 2 tokens"]),
            (&uneven, &["calibration: sequence 1 has 6 tokens and the first 5", "one length"]),
            (&[vec![1, 40, 2]], &["token id 40", "tokenizer"]),
            (&tokens(1, 40), &["39 positions", "shorter sequences"]),
        ] {
            fails(run(method, calibration), &source, parts);
        }
        // An importance that reads no text needs none.
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
        fails(run, &converted, &["model: has experts", "use a dense model"]);

        let masked = tempfile::tempdir().unwrap();
        let target = saved(&model(true), masked.path(), Dtype::F32);
        let mut masks = Masks::new();
        masks.insert("model.layers.0.self_attn.q_proj.weight".to_owned(), 32, 32, |_, _| true);
        masks.save(&target).unwrap();
        fails(run, &target, &["model: has masks.safetensors", "dense model"]);

        Run { force: true, ..run }.fails(&source, &source, &["holds the model that is read"]);

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
    run(METHODS[0], &calibration).fails(&source, &out, &["is not empty"]);
}
