//! Runs that learn from a teacher.

use std::path::{Path, PathBuf};

use crate::common::*;
use dsmoe_core::config::Config;
use dsmoe_train::{Outcome, RunOptions};

/// A run of the model of `bed` with a dense teacher of other weights.
fn taught(bed: &Bed, name: &str, teacher: &Path) -> RunOptions {
    RunOptions { teacher: Some(teacher.to_owned()), ..bed.options(name) }
}

#[test]
fn a_run_learns_the_teachers_distribution() {
    let bed = Bed::new(true);
    let teacher = model_dir(&bed.path("."), "teacher", false, 7);
    let more = ["steps=40", "lr=1e-2", "sparsity=0"];
    let (_, heard) = bed.train(&more, taught(&bed, "out", &teacher));
    let kl = |at: usize| heard.records[at].kl.unwrap();
    assert!(kl(39) < 0.6 * kl(0), "{} to {}", kl(0), kl(39));
    for record in &heard.records {
        let want = 0.1 * record.lm_loss + 0.9 * record.kl.unwrap();
        assert!((record.loss - want).abs() < 1e-9, "{record:?}");
    }
    let lines = metrics(&bed.path("out"));
    assert_eq!(lines[0]["teacher"]["path"], teacher.to_str().unwrap());
    assert_eq!(lines[0]["teacher"]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(lines[0]["config"]["teacher_weight"], 0.9);
    assert!(lines[1]["kl"].is_f64() && bed.whole("plain", &[]).records[0].kl.is_none());
}

#[test]
fn a_taught_run_resumes_to_the_bit_with_its_own_teacher_only() {
    let bed = Bed::new(true);
    let [teacher, other] =
        [7, 8].map(|seed| model_dir(&bed.path("."), &format!("teacher{seed}"), false, seed));
    let more = ["teacher_weight=0.7"];
    let (end, whole) = bed.train(&more, taught(&bed, "whole", &teacher));
    assert_eq!(end, Outcome::Finished);
    let part = RunOptions { stop_after: Some(9), ..taught(&bed, "parts", &teacher) };
    assert_eq!(bed.train(&more, part).0, Outcome::Interrupted { step: 9 });
    let resumed =
        |teacher: Option<&PathBuf>| RunOptions { teacher: teacher.cloned(), ..bed.resumed("parts") };
    refused(
        &text(1),
        settings(&more),
        resumed(Some(&other)),
        &["the teacher was", "give the teacher this run"],
    );
    refused(&text(1), settings(&[]), resumed(None), &["the teacher was", "is now none"]);
    let moved = bed.path("moved");
    std::fs::rename(&teacher, &moved).unwrap();
    let (end, rest) = bed.train(&[&more[..], &["threads=2"]].concat(), resumed(Some(&moved)));
    assert_eq!(end, Outcome::Finished);
    assert_eq!(weights(&bed.path("parts")), weights(&bed.path("whole")));
    assert_eq!(rest.records.last().unwrap().kl, whole.records.last().unwrap().kl);
}

#[test]
fn teachers_that_do_not_fit_are_refused() {
    let bed = Bed::new(true);
    let teacher = model_dir(&bed.path("."), "teacher", false, 7);
    let path = teacher.join("config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    let parts = &["teacher_weight is 0.5", "use it with a teacher only"];
    refused(&text(1), settings(&["teacher_weight=0.5"]), bed.options("x"), parts);
    refused(&text(1), settings(&["seq=65"]), taught(&bed, "x", &teacher), &["seq is 65", "max_position"]);
    let config: Config = Config::load(&teacher).unwrap();
    let positions = format!("\"max_position_embeddings\": {}", config.max_position);
    assert!(json.contains(&positions), "{json}");
    std::fs::write(&path, json.replace(&positions, "\"max_position_embeddings\": 8")).unwrap();
    refused(&text(1), settings(&[]), taught(&bed, "x", &teacher), &["seq is 16", "teacher's max_position"]);
    std::fs::write(&path, json.replace(&format!("\"vocab_size\": {VOCAB}"), "\"vocab_size\": 50")).unwrap();
    let parts = ["teacher is ", "with vocab_size 50", "the one to train, vocab_size 48"];
    refused(&text(1), settings(&[]), taught(&bed, "x", &teacher), &parts);
}
