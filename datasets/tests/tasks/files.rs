//! Files as people have them.

use std::collections::BTreeMap;

use dsmoe_datasets::tasks::{Loaded, Options, Profile, Request, Response, Task, TaskFiles, tasks};

use crate::made::gzip;
use crate::rows::{PIQA, asked, folder, good_rows, hellaswag_parquet, jsonl, load, load_as, piqa_parquet};
use crate::shared;

#[test]
fn every_task_is_found_by_its_folder_and_scored() {
    for task in tasks().into_iter().filter(|task| good_rows().contains_key(task.name)) {
        let row = good_rows()[task.name];
        let eval = format!("{0}/{1}.jsonl", task.name, task.split.name());
        let train = format!("{}/train.jsonl", task.name);
        let dir = folder(&[(&eval, jsonl(&[row; 3]).as_bytes()), (&train, jsonl(&[row; 6]).as_bytes())]);
        let loaded = load(dir.path(), task.name).unwrap();
        assert_eq!((loaded.documents().len(), loaded.original()), (3, 3), "{}", task.name);
        let answer = |request: &Request| {
            Ok(match request {
                Request::LogLikelihood { .. } => Response::LogLikelihood { sum: -1.0, greedy: true },
                Request::Rolling { .. } => Response::Rolling { sum: -2.0 },
                Request::Generate { .. } => Response::Generated { text: "a #### 1".into() },
            })
        };
        let answers: Vec<Vec<_>> =
            loaded.documents().iter().map(|d| d.requests.iter().map(answer).collect()).collect();
        let mut scored = loaded.score(&answers);
        assert!(!scored.scores.is_empty() && loaded.sample_rows(&scored).count() >= 3, "{}", task.name);
        // A document without a response counts in no metric.
        let mut some = answers.clone();
        some[1][0] = Err("too long".into());
        scored = loaded.score(&some);
        assert_eq!(scored.unscored, [(1, "too long".to_owned())]);
        assert_eq!(loaded.sample_counts(&scored)["effective"], 2);
    }
}

#[test]
fn the_same_rows_in_every_format_are_the_same_documents() {
    let row = r#"{"goal": "a, \"b\"", "sol1": "one", "sol2": "two", "label": 1}"#;
    let lines = jsonl(&[row, PIQA]);
    let array = format!("[{row},\n{PIQA}]");
    let container = format!("{{\"Version\": 1, \"Data\": {array}, \"More\": [1]}}");
    let csv = "goal,sol1,sol2,label\r\n\"a, \"\"b\"\"\",one,two,1\r\ng,one,two,1\r\n";
    let unlabelled = lines.replace(", \"label\": 1", "");
    let wanted = {
        let dir = folder(&[("piqa/valid.jsonl", lines.as_bytes())]);
        asked(&load(dir.path(), "piqa").unwrap())
    };
    assert_eq!(wanted[0], ("Question: a, \"b\"\nAnswer:".to_owned(), " one".to_owned()));
    let parquet = piqa_parquet(&["a, \"b\"", "g"]);
    let cases: [&[(&str, &[u8])]; 8] = [
        &[("PIQA/data/validation-00000-of-00001.parquet", &parquet)],
        &[("piqa/valid.jsonl.gz", &gzip(lines.as_bytes()))],
        &[("piqa/dev.json", array.as_bytes())],
        &[("piqa/dev.json", container.as_bytes())],
        &[("piqa/piqa_val.json", lines.as_bytes())],
        &[("piqa-sample/dev.csv", csv.as_bytes())],
        &[("piqa/valid.jsonl", unlabelled.as_bytes()), ("piqa/valid-labels.lst", b"1\n1\n")],
        &[
            ("piqa/plain_text/validation/0000.parquet", &parquet),
            ("piqa/plain_text/train/0000.parquet", b"not read"),
        ],
    ];
    for files in cases {
        let dir = folder(files);
        assert_eq!(asked(&load(dir.path(), "piqa").unwrap()), wanted, "{}", files[0].0);
    }
}

/// Rows by the thousand, over many reads of a file: a mark at the start, one array or objects alone, records with line ends.
#[test]
fn rows_of_long_files_are_read_one_by_one() {
    let row = |i: usize| PIQA.replace("\"g\"", &format!("\"é {i}\""));
    let rows: Vec<String> = (0..5000).map(row).collect();
    let array = format!("\u{FEFF}[{}]\n", rows.join(",\n  "));
    let objects = rows.join(" ");
    let record = |i: usize| format!("\"é {i}\",one,two,1\r\n");
    let csv = format!("\u{FEFF}goal,sol1,sol2,label\r\n{}", (0..5000).map(record).collect::<String>());
    for (name, content) in [
        ("piqa/valid.json", array.as_bytes()),
        ("piqa/valid.json.gz", &gzip(objects.as_bytes())[..]),
        ("piqa/valid.csv", csv.as_bytes()),
    ] {
        let dir = folder(&[(name, content)]);
        let asked = asked(&load(dir.path(), "piqa").unwrap());
        assert_eq!(asked.len(), 10_000, "{name}");
        assert_eq!(asked[9998].0, "Question: é 4999\nAnswer:", "{name}");
    }
}

#[test]
fn lists_in_parquet_are_read() {
    let file = hellaswag_parquet(&["stirs.", "sings.", "runs.", "eats."]);
    let dir = folder(&[("hellaswag/data/validation-00000-of-00001.parquet", &file)]);
    let loaded = load(dir.path(), "hellaswag").unwrap();
    let asked = asked(&loaded);
    assert_eq!(asked[3], ("Cooking: A cook stirs. The cook".to_owned(), " eats.".to_owned()));
    assert_eq!(loaded.documents()[0].fields["gold"], 1);
}

#[test]
fn of_several_files_the_plain_one_is_taken() {
    let first = |files: &[(&str, &str)]| {
        let row = |goal: &str| PIQA.replace("\"g\"", &format!("{goal:?}"));
        let files: Vec<_> = files.iter().map(|(path, goal)| (*path, row(goal))).collect();
        let files: Vec<_> = files.iter().map(|(path, row)| (*path, row.as_bytes())).collect();
        load(folder(&files).path(), "piqa").map(|loaded| asked(&loaded)[0].0.clone())
    };
    for (files, goal) in [
        ([("piqa/valid.jsonl", "a"), ("piqa/valid_hard.jsonl", "b")], "a"),
        ([("piqa/test.jsonl", "a"), ("piqa/valid.jsonl", "b")], "b"),
        ([("piqa/eval.jsonl", "a"), ("piqa/dev.jsonl", "b")], "b"),
        ([("piqa/validation-00001-of-00002.jsonl", "b"), ("piqa/validation-00000-of-00002.jsonl", "a")], "a"),
    ] {
        assert_eq!(first(&files), Ok(format!("Question: {goal}\nAnswer:")), "{files:?}");
    }
    let both = "both look like its validation split; keep one of them";
    let cases: [(&[(&str, &str)], &str); 3] = [
        (&[("piqa/valid.jsonl", "a"), ("piqa/dev.jsonl", "b")], both),
        (&[("piqa/train.jsonl", "a")], "task piqa: no files of its validation split; put them"),
        (&[("other/valid.jsonl", "a")], "task piqa: no folder `piqa` in "),
    ];
    for (files, message) in cases {
        let error = first(files).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn configurations_of_a_dataset_are_told_apart() {
    let rows = jsonl(&[good_rows()["triviaqa"]; 6]);
    let other = rows.replace("\"q\"", "\"other\"");
    let configs = [("rc.nocontext", &rows), ("rc", &other), ("unfiltered.nocontext", &other)];
    let files: Vec<(String, &[u8])> = ["validation", "train"]
        .iter()
        .flat_map(|split| {
            configs.map(|(config, rows)| {
                (format!("trivia_qa/{config}/{split}-00000-of-00001.jsonl"), rows.as_bytes())
            })
        })
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(path, rows)| (&path[..], *rows)).collect();
    let loaded = load(folder(&files).path(), "triviaqa").unwrap();
    assert!(asked(&loaded)[0].0.ends_with("Question: q?\nAnswer:"));
    assert_eq!(loaded.origin().shot_split, Some("train"));
}

#[test]
fn the_two_lambadas_share_a_folder() {
    let openai = ("lambada/lambada_test.jsonl", &b"{\"text\": \"one two three\"}\n"[..]);
    let standard = ("lambada/lambada_test_plain_text.txt", &b"one two 's four\r\nfive six\n\n"[..]);
    let notes = ("piqa/valid.txt", &b"not rows\n"[..]);
    let rows = ("piqa/valid.jsonl", PIQA.as_bytes());
    let dir = folder(&[openai, standard, notes, rows]);
    let all = |task: &str| load(dir.path(), task).map(|loaded| asked(&loaded)).unwrap();
    assert_eq!(all("lambada_openai"), [("one two".to_owned(), " three".to_owned())]);
    let cut = [("one two 's", " four"), ("five", " six")];
    assert_eq!(all("lambada_standard"), cut.map(|(context, word)| (context.to_owned(), word.to_owned())));
    assert_eq!(all("piqa").len(), 2);
    // A file that says that it is of one is not the other's; one that says nothing is of either.
    let files = |file: (&str, &[u8]), name: &str| {
        let dir = folder(&[file]);
        TaskFiles::folder(dir.path()).files_of(Task::named(name).unwrap()).unwrap().map(|files| files.len())
    };
    assert_eq!((files(standard, "lambada_standard"), files(standard, "lambada_openai")), (Some(1), None));
    assert_eq!((files(openai, "lambada_standard"), files(openai, "lambada_openai")), (Some(1), Some(1)));
    assert_eq!((files(rows, "piqa"), files(rows, "hellaswag")), (Some(1), None));
}

#[test]
fn a_limit_takes_the_first_documents_and_the_same_examples() {
    let rows: Vec<String> =
        (0..9).map(|i| format!(r#"{{"question": "q{i}", "answer": ["a{i}"]}}"#)).collect();
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    let dir = folder(&[("nq_open/dev.jsonl", jsonl(&rows).as_bytes())]);
    let all = load(dir.path(), "nq_open").unwrap();
    let some = load_as(dir.path(), "nq_open", &Options { limit: Some(4), ..Options::default() }).unwrap();
    assert_eq!((some.documents().len(), some.original()), (4, 9));
    assert_eq!(asked(&some)[..], asked(&all)[..4]);
    // Without a training file examples are the other documents.
    assert_eq!(all.origin().shot_split, Some("validation"));
    for document in all.documents() {
        let question = format!("Q: q{}?", document.id);
        let context = document.requests[0].context();
        assert_eq!((context.matches("Q: ").count(), context.matches(&question).count()), (6, 1));
    }
    let dir = folder(&[("nq_open/dev.jsonl", jsonl(&rows[..3]).as_bytes())]);
    let error = load(dir.path(), "nq_open").map(drop).unwrap_err();
    assert!(error.contains("3 rows to draw 6 examples from; name a training file"), "{error}");
    let most = Options { shots: Some(usize::MAX), ..Options::default() };
    let task = Task::named("nq_open").unwrap();
    let error = Loaded::load(task, &TaskFiles::folder(dir.path()), &most).unwrap_err().to_string();
    assert!(error.contains(&format!("3 rows to draw {} examples from; ", usize::MAX)), "{error}");
}

#[test]
fn named_files_take_the_place_of_the_folders() {
    let rows = jsonl(&[good_rows()["gsm8k"]; 6]);
    let dir = folder(&[("a/one.jsonl", rows.as_bytes()), ("b/two.jsonl", rows.as_bytes())]);
    let file = |name: &str| BTreeMap::from([("gsm8k".to_owned(), vec![dir.path().join(name)])]);
    let source =
        TaskFiles { files: file("a/one.jsonl"), shot_files: file("b/two.jsonl"), ..TaskFiles::default() };
    let loaded = Loaded::load(Task::named("gsm8k").unwrap(), &source, &Options::default()).unwrap();
    assert_eq!(loaded.origin().shot_files, [dir.path().join("b/two.jsonl")]);
    let source = TaskFiles { files: file("a/one.md"), ..TaskFiles::default() };
    let error = Loaded::load(Task::named("gsm8k").unwrap(), &source, &Options::default()).map(drop);
    assert!(error.unwrap_err().to_string().contains("not a file of rows by its name; give a .jsonl"));
}

#[test]
fn profiles_differ_where_the_releases_do() {
    let row = r#"{"question": "q", "answer": {"aliases": ["b", "a", "ab"], "value": "v"}}"#;
    let webqs = good_rows()["webqs"];
    let dir = folder(&[
        ("triviaqa/validation.jsonl", jsonl(&[row; 2]).as_bytes()),
        ("triviaqa/train.jsonl", jsonl(&[row; 7]).as_bytes()),
        ("webqs/test.jsonl", jsonl(&[webqs; 2]).as_bytes()),
        ("webqs/train.jsonl", jsonl(&[webqs; 7]).as_bytes()),
    ]);
    let with = |task: &str, profile| {
        load_as(dir.path(), task, &Options { profile, ..Options::default() }).map(|loaded| asked(&loaded))
    };
    let new = with("triviaqa", Profile::Dsmoe).unwrap();
    assert_eq!(new.len(), 2);
    // All examples equal the document, and it is left out of its examples.
    assert_eq!(new[0].0, "Question: q?\nAnswer:");
    let old = with("triviaqa", Profile::LmEval030).unwrap();
    assert_eq!(old.len(), 4);
    assert!(old[0].0.starts_with("Question: q\nAnswer: v\n\n") && old[0].1 == " a" && old[1].1 == " b");
    for (profile, start) in [
        (Profile::LmEval0492, "Question: q\nAnswer: 0\n\n"),
        (Profile::LmEval030, "Question: q\nAnswer: a\n\n"),
    ] {
        assert!(with("webqs", profile).unwrap()[0].0.starts_with(start), "{profile}");
    }
    for (task, profile, message) in [
        ("webqs", Profile::LmEval0412, "fails on its few-shot examples; leave it out"),
        ("nq_open", Profile::LmEval030, "has no such task; leave it out"),
    ] {
        assert!(with(task, profile).unwrap_err().contains(message), "{task}");
    }
    assert!("lm-eval-9".parse::<Profile>().unwrap_err().to_string().contains("use dsmoe, lm-eval-0.4.12"));
    for profile in Profile::ALL {
        assert_eq!(profile.name().parse::<Profile>().unwrap(), profile);
    }
}

#[test]
fn the_sample_folder_is_read_whole() {
    let Some(shared) = shared("the_sample_folder_is_read_whole") else { return };
    let sizes = [10042, 5153, 5153, 1838, 1954, 1757, 1267, 1319, 3610, 3000, 2032];
    for (task, size) in tasks().into_iter().zip(sizes) {
        let loaded = load(&shared.join("data/eval"), task.name).unwrap();
        assert_eq!(loaded.original(), size, "{}", task.name);
    }
}
