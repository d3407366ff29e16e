//! Prompts, filters, metrics and standard errors against lm-evaluation-harness: the answers it was given stand in for a
//! model.

use std::fs;
use std::path::Path;

use dsmoe_datasets::tasks::{Loaded, Options, Profile, Request, Response, Scored, Task, TaskFiles};
use serde_json::{Value, json};

use crate::shared;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every set of rows there are golden numbers of: its name there, the task, its files.
const SETS: [(&str, &str, &str, Option<&str>); 12] = [
    ("hellaswag", "hellaswag", "hellaswag/hellaswag_val.jsonl", None),
    ("hellaswag_wikihow", "hellaswag", "hellaswag/hellaswag_val_wikihow.jsonl", None),
    ("hellaswag_markup", "hellaswag", "hellaswag/hellaswag_train_markup.jsonl", None),
    ("lambada_openai", "lambada_openai", "lambada/lambada_test.jsonl", None),
    ("piqa", "piqa", "piqa/valid.jsonl", None),
    ("social_iqa", "social_iqa", "siqa/dev.jsonl", None),
    ("storycloze_2016", "storycloze_2016", "storycloze/tinystories_cloze_val.csv", None),
    ("winogrande", "winogrande", "winogrande/dev.jsonl", None),
    ("gsm8k", "gsm8k", "gsm8k/test.jsonl", Some("../../../data/corpora/math/gsm8k_train.jsonl")),
    ("nq_open", "nq_open", "nq_open/NQ-open.eval.jsonl", Some("nq_open/NQ-open.pool.jsonl")),
    ("triviaqa", "triviaqa", "triviaqa/triviaqa.eval.json", Some("triviaqa/triviaqa.pool.json")),
    ("webqs", "webqs", "webquestions/test.json", Some("webquestions/trainmodel.json")),
];

fn load(shared: &Path, set: &str, profile: Profile) -> Loaded {
    let (_, task, rows, examples) = *SETS.iter().find(|(name, ..)| *name == set).unwrap();
    let inputs = shared.join("golden/lm_eval/inputs");
    let mut source = TaskFiles::default();
    source.files.insert(task.into(), vec![inputs.join(rows)]);
    if let Some(examples) = examples {
        source.shot_files.insert(task.into(), vec![inputs.join(examples)]);
    }
    let options = Options { profile, ..Options::default() };
    Loaded::load(Task::named(task).unwrap(), &source, &options).unwrap()
}

/// A logged likelihood, as numbers or as texts.
fn likelihood(value: &Value) -> Response {
    let sum = value[0].as_f64().or_else(|| value[0].as_str().unwrap().parse().ok()).unwrap();
    let greedy = value[1].as_bool().unwrap_or_else(|| value[1] == "True");
    Response::LogLikelihood { sum, greedy }
}

/// The responses in logged samples.
fn responses(loaded: &Loaded, samples: &[Value]) -> Vec<Vec<Result<Response, String>>> {
    let answer = |id: usize, i: usize, request: &Request| {
        let Some(sample) = samples.iter().find(|sample| sample["doc_id"] == id) else {
            return Err("left out".to_owned());
        };
        Ok(match request {
            Request::Generate { .. } => {
                Response::Generated { text: sample["resps"][0][0].as_str().unwrap().to_owned() }
            }
            _ => likelihood(&sample["filtered_resps"][i]),
        })
    };
    let documents = loaded.documents().iter();
    documents
        .map(|d| d.requests.iter().enumerate().map(|(i, request)| answer(d.id, i, request)).collect())
        .collect()
}

/// Checks every metric and sample against the harness's, but for metrics it does not have.
fn check(set: &str, loaded: &Loaded, scored: &Scored, results: &Value, samples: &[Value]) {
    let golden = results.as_object().unwrap();
    let ours = loaded.results(scored);
    for (key, value) in golden.iter().filter(|(key, _)| key.contains(',')) {
        let (value, ours) = (value.as_f64().unwrap(), ours[key].as_f64().unwrap());
        // The harness's sums are in another order where numpy makes them.
        assert!((value - ours).abs() <= 1e-13 * value.abs(), "{set} {key}: {ours}, harness {value}");
    }
    let rows: Vec<Value> = loaded.sample_rows(scored).collect();
    assert_eq!(rows.len(), samples.len(), "{set}");
    for sample in samples {
        let (id, filter) = (&sample["doc_id"], &sample["filter"]);
        let row = rows.iter().find(|row| row["doc_id"] == *id && row["filter"] == *filter).unwrap();
        if loaded.documents()[0].requests.iter().any(|r| matches!(r, Request::Generate { .. })) {
            assert_eq!(row["filtered_resps"], sample["filtered_resps"], "{set} {id} {filter}");
        }
        for metric in sample["metrics"].as_array().unwrap() {
            let metric = metric.as_str().unwrap();
            let (ours, golden) = (row[metric].as_f64(), sample[metric].as_f64());
            assert_eq!(ours, golden, "{set} {id} {filter} {metric}");
        }
    }
}

#[test]
fn scripted_answers_score_as_in_the_harness() {
    let Some(shared) = shared("scripted_answers_score_as_in_the_harness") else { return };
    let canned = shared.join("golden/lm_eval/canned");
    let results =
        ["results_mc.json", "results_fs.json"].map(|name| json(&canned.join(name))["results"].clone());
    for (set, ..) in SETS.iter().filter(|(set, ..)| *set != "hellaswag_wikihow") {
        let loaded = load(&shared, set, Profile::Dsmoe);
        // The same choices with other examples before them score by the same rules.
        let names: &[&str] = if *set == "webqs" { &["webqs", "webqs_sorted"] } else { &[*set] };
        for name in names {
            let samples = lines(&canned.join(format!("samples_{name}.jsonl")));
            let scored = loaded.score(&responses(&loaded, &samples));
            assert!(scored.unscored.is_empty(), "{name}");
            let golden =
                results.iter().map(|results| &results[name]).find(|golden| golden.is_object()).unwrap();
            check(name, &loaded, &scored, golden, &samples);
        }
    }
}

#[test]
fn prompts_are_those_of_the_harness() {
    let Some(shared) = shared("prompts_are_those_of_the_harness") else { return };
    let samples = shared.join("golden/lm_eval/stories-260k/samples");
    for (set, ..) in SETS {
        let loaded = load(&shared, set, Profile::Dsmoe);
        for sample in lines(&samples.join(format!("0.4.13_bos/{set}.jsonl"))) {
            check_prompt(set, &loaded, &sample);
        }
    }
    // The rows of these files are those of the harness's datasets to the letter, so that hashes agree too.
    let results = ["mc", "gen"]
        .map(|set| json(&shared.join(format!("golden/lm_eval/stories-260k/results/0.4.13_bos_{set}.json"))));
    for set in ["hellaswag", "lambada_openai", "social_iqa", "winogrande", "nq_open"] {
        let loaded = load(&shared, set, Profile::Dsmoe);
        let golden = results.iter().find_map(|results| results["task_hashes"][set].as_str()).unwrap();
        let samples = lines(&samples.join(format!("0.4.13_bos/{set}.jsonl")));
        assert_eq!(loaded.hash(&loaded.score(&responses(&loaded, &samples))), golden, "{set}");
    }
    // Older releases show the answer `0` in every example.
    let loaded = load(&shared, "webqs", Profile::LmEval049);
    for sample in lines(&samples.join("0.4.9.1_bos/webqs_official.jsonl")) {
        check_prompt("webqs_official", &loaded, &sample);
    }
}

fn check_prompt(set: &str, loaded: &Loaded, sample: &Value) {
    let document = &loaded.documents()[sample["doc_id"].as_u64().unwrap() as usize];
    let arguments = sample["arguments"].as_object().unwrap();
    assert_eq!(document.requests.len(), arguments.len(), "{set} {}", document.id);
    for (request, argument) in document.requests.iter().zip(arguments.values()) {
        let ours = match request {
            Request::LogLikelihood { context, continuation } => {
                json!({ "arg_0": **context, "arg_1": continuation })
            }
            Request::Generate { context, until, .. } => json!({
                "arg_0": **context,
                "arg_1": { "until": until, "do_sample": false, "temperature": 0.0 },
            }),
            Request::Rolling { .. } => panic!("{set}"),
        };
        assert_eq!(ours, *argument, "{set} {}", document.id);
    }
}
