//! Real checkpoints against lm-evaluation-harness: every likelihood, decision, text, metric and standard error.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::Inference;
use dsmoe_datasets::tasks::{Loaded, Options, Profile, Request, Response, Task, TaskFiles};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::shared;
use dsmoe_train::tasks::{Answer, Responder};
use serde_json::{Map, Value};

/// Allowed error of a log-likelihood; no decision in the golden numbers is closer than that.
const LIKELIHOOD: f64 = 1e-3;
/// Allowed relative error of a perplexity and its standard error.
const PERPLEXITY: f64 = 1e-5;
/// A text may differ where the two likeliest tokens were closer than this.
const GAP: f64 = 1e-4;

fn json(path: &Path) -> Value {
    serde_json::from_str(&read(path)).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    read(path).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display()))
}

/// Every set of rows: its name in the golden files, the task, its rows and those of its examples.
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

struct Golden {
    folder: PathBuf,
    model: Inference,
    tokenizer: Tokenizer,
}

impl Golden {
    fn open(shared: &Path, name: &str) -> Golden {
        let dir = shared.join("models").join(name);
        let model = Inference::load(&dir, Precision::F32).unwrap();
        let config = model.config();
        let tokenizer = Tokenizer::load(&dir, config.bos_token_id, config.vocab_size).unwrap();
        Golden { folder: shared.join("golden/lm_eval").join(name), model, tokenizer }
    }

    fn load(&self, set: &str, profile: Profile) -> Loaded {
        let (_, task, rows, examples) = *SETS.iter().find(|(name, ..)| *name == set).unwrap();
        let inputs = self.folder.join("../inputs");
        let mut source = TaskFiles::default();
        source.files.insert(task.into(), vec![inputs.join(rows)]);
        if let Some(examples) = examples {
            source.shot_files.insert(task.into(), vec![inputs.join(examples)]);
        }
        Loaded::load(Task::named(task).unwrap(), &source, &Options { profile, ..Options::default() }).unwrap()
    }

    fn answer(&self, loaded: &Loaded, bos: Bos) -> Vec<Vec<Answer>> {
        let documents: Vec<&[Request]> = loaded.documents().iter().map(|d| &d.requests[..]).collect();
        let responder = Responder::new(&self.model, &self.tokenizer, bos, loaded.profile());
        responder.answer(&documents, None, &mut |_, _| {}).unwrap().unwrap().documents
    }

    /// `results` of all files of a release and BOS setting.
    fn results(&self, release: &str) -> Map<String, Value> {
        let runs = ["mc", "sel", "extra", "gen", "webqs"];
        let files = runs.map(|run| self.folder.join(format!("results/{release}_{run}.json")));
        let files = files.iter().filter(|path| path.exists());
        files.flat_map(|path| json(path)["results"].as_object().unwrap().clone()).collect()
    }

    fn samples(&self, release: &str, set: &str) -> Vec<Value> {
        lines(&self.folder.join(format!("samples/{release}/{set}.jsonl")))
    }

    /// Smallest gap between the two likeliest tokens of each document's text.
    fn gaps(&self, set: &str, bos: &str) -> Vec<f64> {
        let rows = lines(&self.folder.join(format!("tokens/tokens_{set}_{bos}.jsonl")));
        rows.iter().map(|row| row["argmax_gap_min"].as_f64().unwrap()).collect()
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().or_else(|| value.as_str().unwrap().parse().ok()).unwrap()
}

/// Counts of the compared values.
#[derive(Default)]
struct Compared {
    likelihoods: usize,
    /// Largest error of one.
    error: f64,
    texts: usize,
    /// Documents whose text differs where it may, and how close the two likeliest tokens were.
    differ: Vec<(String, f64)>,
}

/// Compares every answer with the logged one.
fn check_answers(
    place: &str,
    answers: &[Vec<Answer>],
    samples: &[Value],
    gaps: impl Fn() -> Vec<f64>,
    compared: &mut Compared,
) {
    for sample in samples {
        let id = sample["doc_id"].as_u64().unwrap() as usize;
        for (i, answer) in answers[id].iter().enumerate() {
            match answer.as_ref().unwrap_or_else(|refusal| panic!("{place} {id}: {refusal}")) {
                Response::LogLikelihood { sum, greedy } => {
                    let golden = &sample["filtered_resps"][i];
                    let (theirs, likeliest) = (number(&golden[0]), &golden[1]);
                    assert!((sum - theirs).abs() < LIKELIHOOD, "{place} {id} {i}: {sum}, harness {theirs}");
                    assert_eq!(*likeliest == "True" || *likeliest == true, *greedy, "{place} {id} {i}");
                    compared.likelihoods += 1;
                    compared.error = compared.error.max((sum - theirs).abs());
                }
                Response::Generated { text } => {
                    let theirs = sample["resps"][0][0].as_str().unwrap();
                    compared.texts += 1;
                    if text != theirs {
                        let gap = gaps()[id];
                        assert!(gap < GAP, "{place} {id}: {text:?}, harness {theirs:?}, gap {gap}");
                        let document = format!("{place} {id}");
                        if compared.differ.last().is_none_or(|(last, _)| *last != document) {
                            compared.differ.push((document, gap));
                        }
                    }
                }
                Response::Rolling { .. } => panic!("{place}"),
            }
        }
    }
}

/// Compares every metric there is in the harness's results.
fn check_results(place: &str, loaded: &Loaded, answers: &[Vec<Answer>], golden: &Value) {
    let ours = loaded.results(&loaded.score(answers));
    let mut compared = 0;
    for (key, theirs) in golden.as_object().unwrap().iter().filter(|(key, _)| key.contains(',')) {
        let (ours, theirs) = (ours[key].as_f64().unwrap(), theirs.as_f64().unwrap());
        // Sums of the same numbers in another order, but for perplexities.
        let allowed = if key.starts_with("perplexity") { PERPLEXITY } else { 1e-13 };
        assert!((ours - theirs).abs() <= allowed * theirs.abs(), "{place} {key}: {ours}, harness {theirs}");
        compared += 1;
    }
    assert!(compared >= 2, "{place}: {golden}");
}

/// Documents that the harness cannot score with a model.
fn unscorable(shared: &Path, model: &str, set: &str) -> Vec<usize> {
    let all = json(&shared.join("golden/lm_eval/inputs/harness_crash_docs.json"));
    let ids = all[model][set]["dropped"].as_array().cloned().unwrap_or_default();
    ids.iter().map(|id| id.as_u64().unwrap() as usize).collect()
}

#[expect(clippy::print_stdout, reason = "says what was compared, and explains every difference")]
fn check_model(name: &str) {
    let Some(shared) = shared(name, "golden/lm_eval") else { return };
    let golden = Golden::open(&shared, name);
    let mut compared = Compared::default();
    for (bos, rule) in [("bos", Bos::Always), ("nobos", Bos::Never)] {
        let release = format!("0.4.13_{bos}");
        let results = golden.results(&release);
        for (set, ..) in SETS {
            let place = format!("{name} {bos} {set}");
            let loaded = golden.load(set, Profile::Dsmoe);
            let answers = golden.answer(&loaded, rule);
            let refused = (0..answers.len()).filter(|&i| answers[i].iter().any(Result::is_err));
            assert!(refused.eq(unscorable(&shared, name, set)), "{place}");
            let samples = golden.samples(&release, set);
            check_answers(&place, &answers, &samples, || golden.gaps(set, bos), &mut compared);
            check_results(&place, &loaded, &answers, &results[set]);
        }
        // The tokenizer's own rule is what the harness follows by default.
        let loaded = golden.load("hellaswag_markup", Profile::Dsmoe);
        assert_eq!(golden.answer(&loaded, Bos::Auto), golden.answer(&loaded, Bos::Always), "{name}");
    }
    // Older releases: other examples for WebQuestions, another filter of short answers.
    for (release, profile) in [("0.4.9.2", Profile::LmEval0492), ("0.4.9.1", Profile::LmEval049)] {
        for (bos, rule) in [("bos", Bos::Always), ("nobos", Bos::Never)] {
            let release = format!("{release}_{bos}");
            let results = golden.results(&release);
            let sets = [("webqs", "webqs_official"), ("nq_open", "nq_open"), ("triviaqa", "triviaqa")];
            for (set, name) in sets {
                let loaded = golden.load(set, profile);
                let answers = golden.answer(&loaded, rule);
                let place = format!("{release} {name}");
                check_results(&place, &loaded, &answers, &results[name]);
                if set == "webqs" {
                    // Logged for the older of the two; both are equal to the bit.
                    let samples = golden.samples(&format!("0.4.9.1_{bos}"), name);
                    check_answers(&place, &answers, &samples, Vec::new, &mut compared);
                }
            }
        }
    }
    let Compared { likelihoods, error, texts, differ } = compared;
    println!("{name}: {likelihoods} likelihoods, largest error {error:.1e}; {texts} texts, of which differ:");
    for (document, gap) in &differ {
        println!("  {document}: its two likeliest tokens were {gap:.1e} apart");
    }
    assert!(differ.len() <= 4, "too many texts differ to blame roundings");
}

#[test]
fn tinystories_656k_scores_as_in_the_harness() {
    check_model("tinystories-656k");
}

#[test]
fn stories_260k_scores_as_in_the_harness() {
    check_model("stories-260k");
}
