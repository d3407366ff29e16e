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

#[test]
fn a_cache_gives_the_bits_that_the_teacher_gives() {
    let bed = Bed::new(true);
    let teacher = model_dir(&bed.path("."), "teacher", false, 7);
    let more = ["teacher_top=12", "lr=1e-2"];
    let (_, computed) = bed.train(&more, taught(&bed, "computed", &teacher));
    let cached = |name: &str| {
        let teacher_cache = Some(bed.path("cache"));
        RunOptions { teacher_cache, ..taught(&bed, name, &teacher) }
    };
    let (_, filled) = bed.train(&more, cached("filled"));
    let folder = std::fs::read_dir(bed.path("cache")).unwrap().next().unwrap().unwrap().path();
    let files = || std::fs::read_dir(&folder).unwrap().count();
    let count = files();
    assert!(count > 4 && folder.to_str().unwrap().ends_with("-top12-seq16"), "{count} in {folder:?}");
    let (_, read) = bed.train(&more, cached("read"));
    assert_eq!(files(), count);
    let kl = |heard: &Heard| heard.records.iter().map(|record| record.kl.unwrap()).collect::<Vec<_>>();
    assert_eq!((kl(&filled), kl(&read)), (kl(&computed), kl(&computed)));
    for name in ["filled", "read"] {
        assert_eq!(weights(&bed.path(name)), weights(&bed.path("computed")), "{name}");
    }
    // Less than the whole divergence, and near it: the 12 most likely of 48 tokens.
    let (_, whole) = bed.train(&["lr=1e-2"], taught(&bed, "whole", &teacher));
    let (part, all) = (kl(&computed)[0], kl(&whole)[0]);
    assert!(part < all && part > 0.2 * all, "{part} of {all}");

    // Resumed in part, with a damaged file.
    let part = RunOptions { stop_after: Some(9), ..cached("parts") };
    bed.train(&more, part);
    let rows = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    for path in rows {
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let (_, rest) = bed.train(&more, RunOptions { resume: true, ..cached("parts") });
    rest.noted(&["is damaged"]);
    assert_eq!(weights(&bed.path("parts")), weights(&bed.path("computed")));
    // Another teacher has rows of its own.
    let other = model_dir(&bed.path("."), "other", false, 8);
    bed.train(&more, RunOptions { teacher: Some(other), ..cached("of another") });
    assert_eq!(std::fs::read_dir(bed.path("cache")).unwrap().count(), 2);

    let default = RunOptions { stop_after: Some(1), ..cached("default") };
    bed.train(&[], default);
    assert_eq!(metrics(&bed.path("default"))[0]["config"]["teacher_top"], VOCAB);
    let without = RunOptions { teacher_cache: Some(bed.path("cache")), ..bed.options("x") };
    refused(&text(1), settings(&[]), without, &["teacher_cache is", "with a teacher only"]);
    refused(&text(1), settings(&["teacher_top=5"]), bed.options("x"), &["teacher_top is 5", "teacher only"]);
    let large = settings(&["teacher_top=49"]);
    refused(
        &text(1),
        large,
        taught(&bed, "x", &teacher),
        &["teacher_top is 49", "at most the vocabulary's 48"],
    );
    let changed = settings(&["teacher_top=11", "lr=1e-2"]);
    refused(&text(1), changed, RunOptions { resume: true, ..cached("parts") }, &["teacher_top was 12"]);
}
