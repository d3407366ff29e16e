//! Runs on several sources.

use crate::common::*;
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::overlap::TokenTexts;
use dsmoe_datasets::{TokenSource, TokenStream};
use dsmoe_kernels::Precision;
use dsmoe_train::config::NearDuplicates;
use dsmoe_train::eval::{Domain, evaluate_domains};
use dsmoe_train::{EvalOptions, Outcome, RunOptions, TrainData, Trainer, evaluate};

fn data(sources: &[(&str, f64, TokenStream)]) -> TrainData {
    let source = |(name, weight, stream): &(&str, f64, TokenStream)| TokenSource {
        name: (*name).to_owned(),
        weight: *weight,
        tokens: stream.into(),
    };
    // Every id is a word of its own.
    let words: Vec<String> = (0..VOCAB).map(|id| format!("w{id} ")).collect();
    let texts = TokenTexts::new(words.iter().map(|word| Some(word.as_bytes())));
    TrainData { sources: sources.iter().map(source).collect(), texts: Some(texts) }
}

fn three() -> TrainData {
    data(&[("one", 3.0, text(1)), ("two", 1.0, text(2)), ("three", 1.0, text(3))])
}

fn open(bed: &Bed, data: TrainData, more: &[&str], name: &str) -> Trainer {
    Trainer::new(Model::load(&bed.source).unwrap(), data, settings(more), bed.options(name)).unwrap()
}

#[test]
fn every_report_tells_every_domain() {
    let bed = Bed::new(true);
    let out = bed.path("out");
    let keep = ["near_duplicates=keep", "eval_every=10"];
    let (_, heard) = train(three(), settings(&keep), bed.options("out")).unwrap();
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
    let trainer = open(&bed, three(), &keep, "x");
    for (part, domain) in trainer.mixture().parts().iter().zip(&report.domains) {
        let (ids, options) = (part.split.valid_tokens(), EvalOptions::new(17));
        let alone = evaluate(&model, ids, options, &mut |_, _| {}).unwrap();
        assert!((alone.nll - domain.nll).abs() < 1e-6, "{}: {} {}", part.name, alone.nll, domain.nll);
        assert_eq!((alone.tokens, alone.predicted), (domain.tokens, domain.predicted));
    }

    let lines = metrics(&out);
    assert_eq!(lines[0]["sources"][1]["name"], "two");
    let last = lines.iter().rfind(|line| line.get("eval_nll").is_some()).unwrap();
    assert_eq!(last["eval_domains"][2]["ppl"].as_f64().unwrap(), report.domains[2].ppl);
    let mut files = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
    let events = files.find(|path| path.to_str().unwrap().contains("tfevents")).unwrap();
    let events = std::fs::read(events).unwrap();
    assert!(events.windows(14).any(|window| window == b"eval/ppl/three"));
}

#[test]
fn a_mixture_resumes_to_the_bit_and_only_as_the_same_mixture() {
    let bed = Bed::new(true);
    train(three(), settings(&["threads=1"]), bed.options("whole")).unwrap();
    let stopped = RunOptions { stop_after: Some(7), ..bed.options("parts") };
    train(three(), settings(&["threads=2"]), stopped).unwrap();
    let (outcome, _) = train(three(), settings(&[]), bed.resumed("parts")).unwrap();
    assert_eq!(outcome, Outcome::Finished);
    assert_eq!(weights(&bed.path("parts")), weights(&bed.path("whole")));

    let [mut heavier, mut renamed] = [three(), three()];
    heavier.sources[1].weight = 2.0;
    renamed.sources[2].name = "four".into();
    for (data, more, part) in [
        (heavier, &[][..], "the text was"),
        (renamed, &[], "the text was"),
        (three(), &["near_duplicates=keep"], "near_duplicates was \"drop\""),
    ] {
        refused(data, settings(more), bed.resumed("parts"), &[part]);
    }
}

#[test]
fn one_source_by_its_name_is_the_plain_stream() {
    let bed = Bed::new(true);
    bed.whole("plain", &[]);
    let named = data(&[("one", 0.2, text(1))]);
    let (_, heard) = train(named, settings(&["near_duplicates=keep"]), bed.options("named")).unwrap();
    assert_eq!(weights(&bed.path("named")), weights(&bed.path("plain")));
    assert!(heard.evals[0].1.domains.is_empty());
}

#[test]
fn what_is_held_out_of_one_source_is_not_trained_on_in_another() {
    let bed = Bed::new(true);
    // The second source has the documents of the first, in the other order.
    let first = text(1);
    let mut second = TokenStream::default();
    let documents: Vec<&[u32]> = first.documents().collect();
    for document in documents.iter().rev() {
        second.doc_starts.push(second.ids.len());
        second.ids.extend_from_slice(document);
    }
    let both = || data(&[("one", 1.0, first.clone()), ("two", 1.0, second.clone())]);
    let kept = open(&bed, both(), &["near_duplicates=keep"], "kept");
    let dropped = open(&bed, both(), &[], "dropped");
    assert_eq!(dropped.config().near_duplicates, Some(NearDuplicates::Drop));
    assert!(dropped.mixture().filtered() && !kept.mixture().filtered());
    let removed = |trainer: &Trainer| {
        trainer.mixture().parts().iter().map(|part| part.removed.train_tokens as usize).sum::<usize>()
    };
    assert!(removed(&dropped) > 0 && removed(&kept) == 0);
    assert_eq!(dropped.mixture().train_len() + removed(&dropped), kept.mixture().train_len());
    let none = TrainData { texts: None, ..both() };
    let drop = settings(&["near_duplicates=drop"]);
    refused(none, drop, bed.options("none"), &["near_duplicates is drop"]);
}

#[test]
fn a_domain_with_nothing_held_out_is_left_out() {
    let model = Bed::new(true).inference();
    let (one, two) = (text(1).ids, text(2).ids);
    let domain = |name, ids| Domain { name, weight: 2.0, ids };
    let report = |domains: &[Domain<'_>]| {
        evaluate_domains(&model, domains, EvalOptions::new(16), &mut |_, _| {}).unwrap()
    };
    let all = report(&[domain("one", &one), domain("none", &[]), domain("two", &two)]);
    let shares: Vec<_> = all.domains.iter().map(|domain| (&domain.name[..], domain.share)).collect();
    assert_eq!(shares, [("one", 0.5), ("two", 0.5)]);
    let single = report(&[domain("one", &one), domain("none", &[3])]);
    assert!(single.domains.is_empty());
    assert_eq!(single.nll, evaluate(&model, &one, EvalOptions::new(16), &mut |_, _| {}).unwrap().nll);
}
