//! Edited copies of the files of this crate, which know words, numbers and brackets: they are read or refused, in one line. More
//! of them: `DSMOE_FUZZ_CASES=100000`.

use std::fs;
use std::path::Path;

use anyhow::Result;
use dsmoe_kernels::testing::edited_copies;

use crate::commands::{read_plan, read_tasks};
use crate::regression::file::{Kind, Record};
use crate::reproduce;
use crate::ui::one_line;

/// Writes the copies to `path` and reads each.
fn search<T>(name: &str, path: &Path, good: &str, cases: u64, read: impl Fn(&Path) -> Result<T>) {
    fs::create_dir_all(path.parent().expect("a folder")).unwrap();
    fs::write(path, good).unwrap();
    if let Err(error) = read(path) {
        panic!("{name}: the good file is refused: {error:#}");
    }
    edited_copies(name, good.as_bytes(), cases, |bytes| {
        fs::write(path, bytes).unwrap();
        if let Err(error) = read(path) {
            let text = one_line(&error);
            assert!(text.lines().count() == 1 && text.len() < 20_000, "{text}");
        }
    });
}

#[test]
fn edited_profiles() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("profile.toml");
    for name in reproduce::profile::names() {
        let text = reproduce::profile::text(name).expect("its text");
        search(name, &path, text, 60, reproduce::check_profile);
    }
}

#[test]
fn edited_records() {
    let work = tempfile::tempdir().unwrap();
    let exact = crate::regression::file::Benchmark::exact("a/b", Kind::Quality, "nats", 1.5);
    let timed = crate::regression::file::Benchmark::timed(
        "c".to_owned(),
        3,
        [vec![1.0, 2.0], vec![0.5, 0.6], vec![]],
    );
    let mut record = Record::new(vec!["kernels".to_owned()], None);
    record.benchmarks = vec![exact, timed];
    let text = serde_json::to_string_pretty(&record).unwrap();
    search("record", &work.path().join("record.json"), &text, 300, Record::read);
}

#[test]
fn edited_results() {
    let work = tempfile::tempdir().unwrap();
    let records = Path::new(env!("CARGO_MANIFEST_DIR")).join("record");
    for name in ["quick", "related"] {
        let Ok(text) = fs::read_to_string(records.join(name).join("results.json")) else {
            continue;
        };
        let path = work.path().join("results.json");
        search(name, &path, &text, 40, |_| reproduce::splice::splice(BLOCK, work.path()).map(drop));
    }
}

const BLOCK: &str = "<!-- reproduce . -->\n<!-- /reproduce -->\n";

#[test]
fn edited_tasks_and_plans() {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join("a.txt"), "some text").unwrap();
    let tasks = "[train]\nbatch = 4\nseq = 32\nlr = 1e-3\nvalid_fraction = 0.1\n[method]\nprune = \"scores\"\nevery = 2\n\
                 rho = 0.05\nselect = 0.5\nreplay = 6\n[[task]]\nname = \"a\"\ndata = [\"a.txt\"]\nsteps = 6\n\
                 [[task]]\nname = \"b\"\ndata = \"a.txt\"\nsteps = 4\n";
    search("tasks", &work.path().join("tasks.toml"), tasks, 300, read_tasks);
    let plan = r#"{"model": "m", "model_sha256": "00", "dtype": "f32", "prompt": 4, "continuation": 4, "shares": [0.5, 1.0],
        "active": [0.5, 1.0], "sources": ["a"], "requests": [{"source": 0, "features": [1.0, 2.0], "active": [0.4, 1.0], "losses": [2.0, 1.0]},
        {"source": 0, "features": [1.5, 2.5], "active": [0.6, 1.0], "losses": [2.5, 1.0]}],
        "speeds": {"prefill": [9.0, 5.0], "decode": [4.0, 3.0]}}"#;
    search("plan", &work.path().join("profile.json"), plan, 300, |path| {
        read_plan(path.parent().expect("a folder"))
    });
}
