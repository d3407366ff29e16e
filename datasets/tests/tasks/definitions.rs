//! Definitions of tasks: those of this crate and a user's own against lm-evaluation-harness, and files that are wrong.
//!
//! `scripts/make-task-goldens` made the rows, in the format of the original datasets, and the harness's prompts and scores.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_datasets::tasks::{
    Loaded, Options, Profile, Request, Response, Task, TaskFiles, add_task, add_task_file,
};
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tasks").join(name)
}

fn golden() -> Value {
    serde_json::from_slice(&fs::read(data("golden.json")).unwrap()).unwrap()
}

/// Loads a task from a file of rows.
fn load(task: &'static Task, rows: &str) -> Loaded {
    let mut source = TaskFiles::default();
    source.files.insert(task.name.into(), vec![data(rows)]);
    let options = Options { profile: Profile::LmEval0412, ..Options::default() };
    Loaded::load(task, &source, &options).unwrap()
}

/// A logged response to a request.
fn response(request: &Request, value: &Value) -> Response {
    match request {
        Request::LogLikelihood { .. } => {
            Response::LogLikelihood { sum: value[0].as_f64().unwrap(), greedy: value[1].as_bool().unwrap() }
        }
        Request::Rolling { .. } => Response::Rolling { sum: value.as_f64().unwrap() },
        Request::Generate { .. } => Response::Generated { text: value.as_str().unwrap().to_owned() },
    }
}

fn arguments(request: &Request) -> Value {
    match request {
        Request::LogLikelihood { context, continuation } => json!([**context, continuation]),
        Request::Rolling { text } => json!([text]),
        Request::Generate { context, until, .. } => {
            json!([**context, { "until": until, "do_sample": false, "temperature": 0.0 }])
        }
    }
}

/// Compares prompts, filtered answers, every document's metrics and the task's with those of the harness, which has the
/// samples under `names` and the results under `result`.
fn agrees(loaded: &Loaded, names: &[&str], result: &str) {
    let golden = golden();
    // The harness numbers the documents of each of `names` from 0.
    let (mut samples, mut first) = (Vec::new(), 0);
    for name in names {
        let of_task = golden["samples"][*name].as_array().expect(name);
        let id = |sample: &Value| first + sample["doc_id"].as_u64().unwrap() as usize;
        let numbered: Vec<(usize, &Value)> = of_task.iter().map(|sample| (id(sample), sample)).collect();
        first = 1 + numbered.iter().map(|(id, _)| *id).max().unwrap();
        samples.extend(numbered);
    }
    let filters = loaded.config()["filter_list"].as_array().unwrap().len();
    assert_eq!((first, samples.len()), (loaded.documents().len(), filters * first), "{result}");
    let of_document = |wanted: usize| samples.iter().find(|(id, _)| *id == wanted).unwrap().1;
    let mut responses = Vec::new();
    for document in loaded.documents() {
        let logged = of_document(document.id);
        let asked: Vec<Value> = document.requests.iter().map(arguments).collect();
        assert_eq!(json!(asked), logged["arguments"], "{result} {}", document.id);
        let answer = |(i, request)| Ok(response(request, &logged["resps"][i][0]));
        responses.push(document.requests.iter().enumerate().map(answer).collect());
    }
    let scored = loaded.score(&responses);
    let rows: Vec<Value> = loaded.sample_rows(&scored).collect();
    for (id, sample) in samples {
        let row = rows.iter().find(|row| row["doc_id"] == id && row["filter"] == sample["filter"]).unwrap();
        if sample["filtered_resps"][0].is_string() {
            assert_eq!(row["filtered_resps"], sample["filtered_resps"], "{result} {id}");
        }
        for metric in sample["metrics"].as_array().unwrap() {
            let metric = metric.as_str().unwrap();
            let plain = |value: &Value| json!([value]).to_string().replace(".0", "");
            assert_eq!(plain(&row[metric]), plain(&sample[metric]), "{result} {id} {metric}");
        }
    }
    let ours = loaded.results(&scored);
    for (key, value) in golden["results"][result].as_object().unwrap() {
        // The golden run resamples a hundred times, not 100,000 times.
        if key.starts_with("perplexity_stderr") {
            continue;
        }
        near(value, &ours[key], &format!("{result} {key}"));
    }
    // A task of several names is a group of the harness.
    let parts: Vec<(&str, Value)> = loaded.group_results(&scored).collect();
    assert_eq!(parts.len(), if names.len() > 1 { names.len() } else { 0 }, "{result}");
    for (name, (_, part)) in names.iter().zip(parts) {
        for (key, value) in golden["results"][*name].as_object().unwrap() {
            near(value, &part[key], &format!("{name} {key}"));
        }
    }
}

fn near(golden: &Value, ours: &Value, place: &str) {
    let (golden, ours) = (golden.as_f64().unwrap(), ours.as_f64().unwrap_or(f64::NAN));
    assert!((golden - ours).abs() <= 1e-13 * golden.abs(), "{place}: {ours}, harness {golden}");
}

#[test]
fn added_tasks_ask_and_score_as_the_harness() {
    for name in ["arc_easy", "arc_challenge", "openbookqa", "boolq", "wikitext", "c4"] {
        agrees(&load(Task::named(name).unwrap(), &format!("{name}.jsonl")), &[name], name);
    }
    let subjects = ["mmlu_abstract_algebra", "mmlu_world_religions"];
    agrees(&load(Task::named("mmlu").unwrap(), "mmlu.jsonl"), &subjects, "mmlu_all");
}

#[test]
fn a_user_s_file_is_the_harness_s_yaml() {
    for (name, samples, result) in [
        ("capitals", &["capitals"][..], "capitals"),
        ("capitals_said", &["capitals_said"], "capitals_said"),
        ("mmlu_2", &["mmlu_abstract_algebra_2", "mmlu_world_religions_2"], "mmlu_all_2"),
    ] {
        // It names its own files of rows.
        let task = add_task_file(&data(&format!("{name}.toml"))).unwrap();
        assert!(std::ptr::eq(task, Task::named(name).unwrap()));
        let loaded = Loaded::load(task, &TaskFiles::default(), &Options::default()).unwrap();
        agrees(&loaded, samples, result);
    }
}

#[test]
fn examples_before_questions_are_those_of_the_harness() {
    let options = Options { profile: Profile::LmEval0412, shots: Some(3), ..Options::default() };
    let folder = TaskFiles::folder(&data("shots"));
    for (name, split) in [
        ("arc_easy", "train"),
        ("openbookqa", "train"),
        ("boolq", "train"),
        ("piqa", "train"),
        ("hellaswag", "train"),
        ("social_iqa", "train"),
        ("winogrande", "train"),
        ("lambada_standard", "validation"),
        ("storycloze_2016", "validation"),
    ] {
        let loaded = Loaded::load(Task::named(name).unwrap(), &folder, &options).unwrap();
        assert_eq!((loaded.shots(), loaded.origin().shot_split), (3, Some(split)), "{name}");
        let golden = format!("{name}_shots");
        agrees(&loaded, &[&golden], &golden);
    }
    // The first ones of the subject, from a file whose name has a word of its own for the split.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("mmlu/all")).unwrap();
    for (from, to) in [
        ("mmlu.jsonl", "test"),
        ("mmlu_dev.jsonl", "dev"),
        ("mmlu.jsonl", "auxiliary_train"),
        ("mmlu.jsonl", "validation"),
    ] {
        fs::copy(data(from), dir.path().join("mmlu/all").join(format!("{to}.jsonl"))).unwrap();
    }
    let mmlu = |shots| {
        let options = Options { shots: Some(shots), ..options };
        Loaded::load(Task::named("mmlu").unwrap(), &TaskFiles::folder(dir.path()), &options)
    };
    agrees(&mmlu(2).unwrap(), &["mmlu_abstract_algebra_2", "mmlu_world_religions_2"], "mmlu_all_2");
    let cause = mmlu(5).unwrap_err().to_string();
    assert!(cause.contains("4 examples of abstract_algebra, and 5 are asked for"), "{cause}");
}

#[test]
fn a_text_that_is_measured_as_a_whole_has_no_examples() {
    let mut source = TaskFiles::default();
    source.files.insert("wikitext".into(), vec![data("wikitext.jsonl")]);
    let task = Task::named("wikitext").unwrap();
    let load = |shots| Loaded::load(task, &source, &Options { shots: Some(shots), ..Options::default() });
    assert_eq!(load(0).unwrap().shots(), 0);
    let cause = load(1).unwrap_err().to_string();
    assert!(cause.contains("wikitext: texts that are measured as a whole have no examples"), "{cause}");
}

/// Rows as the authors of the datasets publish them.
#[test]
fn original_files_are_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let first = |task: &str, row: Value| {
        fs::write(dir.path().join("rows.jsonl"), format!("{row}\n")).unwrap();
        let mut source = TaskFiles::default();
        source.files.insert(task.into(), vec![dir.path().join("rows.jsonl")]);
        let loaded = Loaded::load(Task::named(task).unwrap(), &source, &Options::default()).unwrap();
        loaded.documents()[0].requests.iter().map(arguments).collect::<Vec<_>>()
    };
    let question = json!({
        "stem": "Why?", "choices": [{"text": "a stone", "label": "A"}, {"text": "heat", "label": "B"}],
    });
    let row = json!({"id": "1", "question": question, "answerKey": "B"});
    let asked = first("arc_easy", row.clone());
    assert_eq!(asked[1], json!(["Question: Why?\nAnswer:", " heat"]));
    assert_eq!(first("openbookqa", row)[0], json!(["Why?", " a stone"]));
    let row = json!({"question": "is it so", "passage": "It is.", "answer": true});
    assert_eq!(first("boolq", row)[1], json!(["It is.\nQuestion: is it so?\nAnswer:", " yes"]));
}

const MINE: &str = r#"
name = "mine"
output = "multiple_choice"
prompt = "{{question}}"
choices = ["yes", "no"]
gold = { column = "label" }
metrics = ["acc"]
"#;

/// The blocks of docs/tasks.md are a whole definition, and keys of one.
#[test]
fn definitions_of_the_documents_are_read() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tasks.md");
    let Ok(page) = fs::read_to_string(page) else { return }; // a package without the repository
    let blocks = page.split("\n```toml\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let blocks: Vec<&str> = blocks.collect();
    let [whole, keys] = blocks[..] else { panic!("{} blocks", blocks.len()) };
    let task = add_task(&whole.replace("\"capitals\"", "\"capitals_of_docs\""), "docs/tasks.md").unwrap();
    assert_eq!(task.name, "capitals_of_docs");
    let task = add_task(&(MINE.replace("\"mine\"", "\"keys_of_docs\"") + keys), "docs/tasks.md").unwrap();
    assert_eq!(task.name, "keys_of_docs");
}

/// The definition with something else in place of `from`, under a name of its own.
fn changed(at: usize, from: &str, to: &str) -> String {
    assert!(MINE.contains(from), "{from}");
    MINE.replacen(from, to, 1).replace("\"mine\"", &format!("\"mine{at}\""))
}

#[test]
fn wrong_definitions_name_the_key_and_the_fix() {
    for (at, (from, to, parts)) in [
        ("output = ", "outptu = ", &["line 3", "unknown field `outptu`"][..]),
        ("\"multiple_choice\"", "\"choice\"", &["line 3", "unknown variant `choice`", "generate_until"]),
        ("metrics = [\"acc\"]", "metrics = []", &["metrics: is empty; name one"]),
        (
            "\"acc\"",
            "\"f1\"",
            &["metrics: `f1` is no metric of multiple_choice; use acc, acc_norm, acc_bytes"],
        ),
        ("{{question}}", "{{question", &["prompt: `{{` is not closed; write `}}` behind the column"]),
        ("{{question}}", "{{question|title}}", &["prompt: `title` is no filter; use strip"]),
        ("choices = [\"yes\", \"no\"]", "", &["choices: is missing; the output multiple_choice needs it"]),
        ("[\"yes\", \"no\"]", "[\"yes\"]", &["choices: has not 2 to 1000 texts"]),
        (
            "metrics",
            "until = [\"x\"]\nmetrics",
            &["until: is not used by the output multiple_choice; remove it"],
        ),
        ("metrics", "shots = 2000\nmetrics", &["shots: is more than 1000"]),
        (
            "metrics",
            "shot_split = \"a b\"\nmetrics",
            &["shot_split: is not a word; use one of small letters"],
        ),
        ("metrics", "group = \"\"\nmetrics", &["group"]),
        ("metrics", "absent = \"x\"\nmetrics", &["absent: belongs to a release"]),
        (
            "metrics = [\"acc\"]",
            "metrics = [\"acc\"]\n[profile.next]\n",
            &["profile.next: ", "lm-eval-0.4.12"],
        ),
        (
            "metrics = [\"acc\"]",
            "metrics = [\"acc\"]\n[profile.dsmoe]\nmetrics = [\"f1\"]\n",
            &["profile.dsmoe: metrics: `f1` is no metric"],
        ),
        (
            "metrics",
            "columns.a = { matches = \"(\" }\nmetrics",
            &["columns.a.matches: `(` is no regular expression"],
        ),
        ("metrics", "columns.a = { column = [] }\nmetrics", &["columns.a.column: has no name"]),
        ("metrics", "columns.a = { colum = \"b\" }\nmetrics", &["unknown field `colum`"]),
        (
            "gold = { column = \"label\" }",
            "gold = { column = \"l\", among = \"a\", first = 1 }",
            &["gold.among: "],
        ),
        (
            "metrics",
            "cut = [{ column = \"a\", into = [\"b\", \"c\"] }]\nmetrics",
            &["cut of a: has no place"],
        ),
        ("metrics", "alike = \"a\"\nshots = 1\nmetrics", &["alike: ", "sampler = \"first\""]),
    ]
    .into_iter()
    .enumerate()
    {
        let error = add_task(&changed(at, from, to), "my.toml").unwrap_err().to_string();
        assert!(error.starts_with("my.toml: ") && !error.contains('\n'), "{error}");
        assert!(error.contains("; ") && parts.iter().all(|part| error.contains(part)), "{error}: {parts:?}");
    }
    for (name, part) in [
        ("piqa", "the task \"piqa\" is registered twice"),
        ("all", "use another name"),
        ("a b", "not a name"),
    ] {
        let error = add_task(&MINE.replace("mine", name), "my.toml").unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let long = format!("{MINE}#{}", "x".repeat(1 << 20));
    assert!(add_task(&long, "my.toml").unwrap_err().to_string().contains("longer than 1 MiB"));
    let error = Task::named("no/such.toml").unwrap_err().to_string();
    assert!(error.contains("no/such.toml"), "{error}");
}

#[test]
fn a_column_that_is_not_there_is_named_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let definition = MINE
        .replace("\"mine\"", "\"mine_of_columns\"")
        .replace("[\"yes\", \"no\"]", "[\"{{a[3]}}\", \"no\"]");
    fs::write(dir.path().join("mine.toml"), definition + "files = [\"rows.jsonl\"]\n").unwrap();
    let task = add_task_file(&dir.path().join("mine.toml")).unwrap();
    let refused = |row: &str| {
        fs::write(dir.path().join("rows.jsonl"), row).unwrap();
        Loaded::load(task, &TaskFiles::default(), &Options::default()).unwrap_err().to_string()
    };
    for (row, part) in [
        (
            r#"{"text": "q", "label": 1}"#,
            "rows.jsonl: row 1: no column `question`, there is text, label; give a file of",
        ),
        (r#"{"question": "q", "a": ["b"], "label": 1}"#, "`a` has 1 texts, and number 3 from 0 is asked for"),
        (
            r#"{"question": "q", "a": ["b", "c", "d", "e"], "label": 2}"#,
            "`label` is \"2\", not one of 0 to 1",
        ),
        (r#"{"question": 5, "a": ["b", "c", "d", "e"], "label": 1}"#, "`question` is a number, not a text"),
    ] {
        let error = refused(row);
        assert!(error.contains(part), "{error}");
    }
    assert!(refused(r#"{"q": 1}"#).contains("mine.toml"));
}
