//! Runs on several sources.

use std::path::Path;

use crate::common::*;
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::overlap::TokenTexts;
use dsmoe_datasets::{TokenSource, TokenStream};
use dsmoe_kernels::Precision;
use dsmoe_train::config::NearDuplicates;
use dsmoe_train::eval::{Domain, evaluate_domains};
use dsmoe_train::{EvalOptions, Outcome, RunOptions, TrainData, Trainer, evaluate};
use serde_json::Value;
use std::sync::atomic::AtomicBool;

fn data(sources: &[(&str, f64, TokenStream)]) -> TrainData {
    let sources = sources.iter().map(|(name, weight, stream)| TokenSource {
        name: (*name).to_owned(),
        weight: *weight,
        tokens: stream.into(),
    });
    // Every id is a word of its own.
    let words: Vec<String> = (0..VOCAB).map(|id| format!("w{id} ")).collect();
    let texts = TokenTexts::new(words.iter().map(|word| Some(word.as_bytes())));
    TrainData { sources: sources.collect(), texts: Some(texts) }
}

fn three() -> TrainData {
    data(&[("one", 3.0, text(1)), ("two", 1.0, text(2)), ("three", 1.0, text(3))])
}

fn run(source: &Path, data: TrainData, more: &[&str], options: RunOptions) -> (Outcome, Heard) {
    let mut heard = Heard::default();
    let mut trainer = Trainer::new(Model::load(source).unwrap(), data, settings(more), options).unwrap();
    let outcome = trainer.run(&mut heard, &AtomicBool::new(false)).unwrap();
    (outcome, heard)
}

#[test]
fn every_report_tells_every_domain() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let out = dir.path().join("out");
    let keep = ["near_duplicates=keep", "eval_every=10"];
    let (_, heard) = run(&source, three(), &keep, RunOptions::new(&source, &out));
    assert_eq!(heard.evals.len(), 2);
    let report = &heard.evals[1].1;
    let names: Vec<&str> = report.domains.iter().map(|domain| &domain.name[..]).collect();
    assert_eq!(names, ["one", "two", "three"]);
    let nll: f64 = report.domains.iter().map(|domain| domain.share * domain.nll).sum();
    assert!((nll - report.nll).abs() < 1e-12 && (report.domains[0].share - 0.6).abs() < 1e-12);
    let active: f64 = report.domains.iter().map(|domain| domain.share * domain.active_ratio.unwrap()).sum();
    assert!((active - report.active_ratio.unwrap()).abs() < 1e-12);

    // Each domain by itself, on the trained model.
    let model = Inference::load(&out, Precision::F32).unwrap();
    let trainer = Trainer::new(
        Model::load(&source).unwrap(),
        three(),
        settings(&keep),
        RunOptions::new(&source, &dir.path().join("x")),
    )
    .unwrap();
    for (part, domain) in trainer.mixture().parts().iter().zip(&report.domains) {
        let alone =
            evaluate(&model, part.split.valid_tokens(), EvalOptions::new(17), &mut |_, _| {}).unwrap();
        assert!((alone.nll - domain.nll).abs() < 1e-6, "{}: {} {}", part.name, alone.nll, domain.nll);
        assert_eq!((alone.tokens, alone.predicted), (domain.tokens, domain.predicted));
    }

    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["sources"][1]["name"], "two");
    let last = lines.iter().rfind(|line| line.get("eval_nll").is_some()).unwrap();
    assert_eq!(last["eval_domains"][2]["ppl"].as_f64().unwrap(), report.domains[2].ppl);
    let events = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
    let events = events.into_iter().find(|path| path.to_str().unwrap().contains("tfevents")).unwrap();
    let events = std::fs::read(events).unwrap();
    assert!(events.windows(14).any(|window| window == b"eval/ppl/three"));
}

#[test]
fn a_mixture_resumes_to_the_bit_and_only_as_the_same_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    run(&source, three(), &["threads=1"], RunOptions::new(&source, &whole));
    let stopped = RunOptions { stop_after: Some(7), ..RunOptions::new(&source, &parts) };
    run(&source, three(), &["threads=2"], stopped);
    let resumed = RunOptions { resume: true, ..RunOptions::new(&source, &parts) };
    let (outcome, _) = run(&source, three(), &[], resumed.clone());
    assert_eq!(outcome, Outcome::Finished);
    assert_eq!(weights(&parts), weights(&whole));

    let refused = |data: TrainData, more: &[&str]| {
        let model = Model::load(&source).unwrap();
        Trainer::new(model, data, settings(more), resumed.clone()).err().unwrap().to_string()
    };
    let mut other = three();
    other.sources[1].weight = 2.0;
    assert!(refused(other, &[]).contains("the text was"));
    let mut other = three();
    other.sources[2].name = "four".into();
    assert!(refused(other, &[]).contains("the text was"));
    assert!(refused(three(), &["near_duplicates=keep"]).contains("near_duplicates was \"drop\""));
}

#[test]
fn one_source_by_its_name_is_the_plain_stream() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    let (plain, named) = (dir.path().join("plain"), dir.path().join("named"));
    train(settings(&[]), &text(1), RunOptions::new(&source, &plain)).unwrap();
    let (_, heard) = run(
        &source,
        data(&[("one", 0.2, text(1))]),
        &["near_duplicates=keep"],
        RunOptions::new(&source, &named),
    );
    assert_eq!(weights(&named), weights(&plain));
    assert!(heard.evals[0].1.domains.is_empty());
}

#[test]
fn what_is_held_out_of_one_source_is_not_trained_on_in_another() {
    let dir = tempfile::tempdir().unwrap();
    let source = model_dir(dir.path(), "source", true, 1);
    // The second source has the documents of the first, in the other order.
    let first = text(1);
    let mut second = TokenStream::default();
    let documents: Vec<&[u32]> = first.documents().collect();
    for document in documents.iter().rev() {
        second.doc_starts.push(second.ids.len());
        second.ids.extend_from_slice(document);
    }
    let both = || data(&[("one", 1.0, first.clone()), ("two", 1.0, second.clone())]);
    let open = |more: &[&str], name: &str| {
        let out = RunOptions::new(&source, &dir.path().join(name));
        Trainer::new(Model::load(&source).unwrap(), both(), settings(more), out)
    };
    let kept = open(&["near_duplicates=keep"], "kept").unwrap();
    let dropped = open(&[], "dropped").unwrap();
    assert_eq!(dropped.config().near_duplicates, Some(NearDuplicates::Drop));
    assert!(dropped.mixture().filtered() && !kept.mixture().filtered());
    let removed = |trainer: &Trainer| {
        trainer.mixture().parts().iter().map(|part| part.removed.train_tokens as usize).sum::<usize>()
    };
    assert!(removed(&dropped) > 0 && removed(&kept) == 0);
    assert_eq!(dropped.mixture().train_len() + removed(&dropped), kept.mixture().train_len());
    let error = {
        let mut none = both();
        none.texts = None;
        let out = RunOptions::new(&source, &dir.path().join("none"));
        Trainer::new(Model::load(&source).unwrap(), none, settings(&["near_duplicates=drop"]), out)
            .err()
            .unwrap()
    };
    assert!(error.to_string().contains("near_duplicates is drop"), "{error}");
}

#[test]
fn a_domain_with_nothing_held_out_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let model = Inference::load(&model_dir(dir.path(), "source", true, 1), Precision::F32).unwrap();
    let (one, two) = (text(1).ids, text(2).ids);
    let domain = |name, ids| Domain { name, weight: 2.0, ids };
    let report = |domains: &[Domain<'_>]| {
        evaluate_domains(&model, domains, EvalOptions::new(16), &mut |_, _| {}).unwrap()
    };
    let all = report(&[domain("one", &one), domain("none", &[]), domain("two", &two)]);
    assert_eq!(
        all.domains.iter().map(|d| (&d.name[..], d.share)).collect::<Vec<_>>(),
        [("one", 0.5), ("two", 0.5)]
    );
    let single = report(&[domain("one", &one), domain("none", &[3])]);
    assert!(single.domains.is_empty());
    assert_eq!(single.nll, evaluate(&model, &one, EvalOptions::new(16), &mut |_, _| {}).unwrap().nll);
}
