//! Files of benchmarks made for a test.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use dsmoe_datasets::tasks::{Loaded, Options, Request, Task, TaskFiles};
use tempfile::TempDir;

use crate::made::{Column, parquet, texts};

/// A folder with these files, by path and content.
pub(crate) fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    dir
}

pub(crate) fn load_as(dir: &Path, task: &str, options: &Options) -> Result<Loaded, String> {
    Loaded::load(Task::named(task).unwrap(), &TaskFiles::folder(dir), options)
        .map_err(|cause| cause.to_string())
}

pub(crate) fn load(dir: &Path, task: &str) -> Result<Loaded, String> {
    load_as(dir, task, &Options::default())
}

/// The contexts and continuations of all documents.
pub(crate) fn asked(loaded: &Loaded) -> Vec<(String, String)> {
    let requests = loaded.documents().iter().flat_map(|document| &document.requests);
    requests
        .map(|request| match request {
            Request::LogLikelihood { context, continuation } => (context.to_string(), continuation.clone()),
            Request::Generate { context, .. } => (context.to_string(), String::new()),
            Request::Rolling { text } => (String::new(), text.clone()),
        })
        .collect()
}

pub(crate) const PIQA: &str = r#"{"goal": "g", "sol1": "one", "sol2": "two", "label": 1}"#;

const ARC: &str =
    r#"{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}"#;

/// A good row of each task, as JSON.
pub(crate) fn good_rows() -> BTreeMap<&'static str, &'static str> {
    BTreeMap::from([
        (
            "hellaswag",
            r#"{"activity_label": "a", "ctx_a": "b.", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": "3"}"#,
        ),
        ("lambada_openai", r#"{"text": "a b c"}"#),
        ("lambada_standard", r#"{"text": "a b c"}"#),
        ("piqa", PIQA),
        (
            "social_iqa",
            r#"{"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}"#,
        ),
        (
            "storycloze_2016",
            r#"{"input_sentence_1": "1", "input_sentence_2": "2", "input_sentence_3": "3", "input_sentence_4": "4",
                "sentence_quiz1": "a", "sentence_quiz2": "b", "answer_right_ending": 2}"#,
        ),
        ("winogrande", r#"{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"}"#),
        ("gsm8k", r##"{"question": "q", "answer": "a\n#### 1"}"##),
        ("nq_open", r#"{"question": "q", "answer": ["a"]}"#),
        ("triviaqa", r#"{"question": "q", "answer": {"aliases": ["a"], "value": "a"}}"#),
        ("webqs", r#"{"question": "q", "answers": ["a"]}"#),
        ("wikitext", r#"{"page": "a b"}"#),
        ("arc_challenge", ARC),
        ("arc_easy", ARC),
        ("boolq", r#"{"passage": "p", "question": "q", "label": 1}"#),
        ("c4", r#"{"text": "a b"}"#),
        ("mmlu", r#"{"question": "q", "subject": "a_b", "choices": ["1", "2", "3", "4"], "answer": 3}"#),
        (
            "openbookqa",
            r#"{"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}"#,
        ),
    ])
}

/// The rows as one line each.
pub(crate) fn jsonl(rows: &[&str]) -> String {
    rows.iter().map(|row| row.replace('\n', " ") + "\n").collect()
}

/// A file of PIQA rows in Parquet.
pub(crate) fn piqa_parquet(goals: &[&str]) -> Vec<u8> {
    let schema = "message piqa { required binary goal (UTF8); required binary sol1 (UTF8);
        required binary sol2 (UTF8); required int64 label; }";
    let same = |text| texts(&vec![text; goals.len()], 0);
    let rows = vec![texts(goals, 0), same("one"), same("two"), Column::Ints(vec![1; goals.len()])];
    parquet(schema, vec![rows])
}

/// A HellaSwag row in Parquet with a list of endings, as the `datasets` library writes it.
pub(crate) fn hellaswag_parquet(endings: &[&str]) -> Vec<u8> {
    let schema = "message hellaswag { optional binary activity_label (UTF8); optional binary ctx_a (UTF8);
        optional binary ctx_b (UTF8); optional group endings (LIST) { repeated group list {
        optional binary element (UTF8); } } optional binary label (UTF8); }";
    let mut row: Vec<Column> =
        ["Cooking", "A cook stirs.", "the cook", "1"].iter().map(|text| texts(&[text], 1)).collect();
    row.insert(3, Column::List(endings.iter().map(ToString::to_string).collect()));
    parquet(schema, vec![row])
}
