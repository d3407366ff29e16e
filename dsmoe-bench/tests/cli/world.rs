//! The embedded world, from its text to the scores of a model.

use std::fs;

use serde_json::Value;

use crate::common::{at, fails, fixture, json_of, run, succeeds};

#[test]
fn text_tokenizer_and_probes_of_a_world_make_a_model_that_can_be_scored() {
    let fixture = fixture();
    let (world, start) = (fixture.out("world"), fixture.out("world-start"));
    let make = ["data", "world", "--out", at(&world), "--seed", "3", "--bytes", "200kB", "--items", "12"];
    let made = json_of(&make);
    assert_eq!((&made["seed"], made["domains"].as_array().unwrap().len()), (&Value::from(3), 4));
    let bytes: u64 =
        made["domains"].as_array().unwrap().iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
    assert!((200_000..202_000).contains(&bytes), "{bytes}");
    assert!(made["vocab_size"].as_u64().unwrap() <= 1536);
    for file in ["text/facts.jsonl", "text/stories.jsonl", "tokenizer.json", "probes/gsm8k/train.jsonl"] {
        assert!(world.join(file).is_file(), "{file}");
    }

    let tokenizer = world.join("tokenizer.json");
    succeeds(&["init", "--preset", "world", "--tokenizer", at(&tokenizer), "--out", at(&start)]);
    let text = world.join("text");
    let run_dir = fixture.out("world-run");
    let train = ["train", at(&start), "--data", at(&text), "--out", at(&run_dir)];
    succeeds(&[&train[..], &["--steps", "2", "--batch", "2", "--seq", "64", "--lr", "1e-3"]].concat());

    let asked = ["eval", at(&run_dir), "--limit", "2"];
    let world_seed = ["--tasks", "world", "--world-seed", "3"];
    let scored = json_of(&[&asked[..], &world_seed].concat());
    let results = scored["results"].as_object().unwrap();
    assert_eq!(results.len(), 10, "{scored}");
    assert!(results["world_piqa"]["acc,none"].as_f64().is_some(), "{scored}");
    assert!(results["world_gsm8k"]["exact_match,strict-match"].as_f64().is_some(), "{scored}");

    // The files hold the same questions.
    let probes = world.join("probes");
    let files = ["--tasks", "piqa,winogrande", "--task-data", at(&probes)];
    let from_files = json_of(&[&asked[..], &files].concat());
    for task in ["piqa", "winogrande"] {
        assert_eq!(
            from_files["results"][task]["acc,none"],
            results[&format!("world_{task}")]["acc,none"],
            "{task}"
        );
    }
}

#[test]
fn a_world_is_not_written_over_what_is_there() {
    let fixture = fixture();
    let out = fixture.out("world-there");
    fs::create_dir_all(&out).unwrap();
    fs::write(out.join("mine.txt"), "mine").unwrap();
    let make = ["data", "world", "--out", at(&out), "--bytes", "20kB", "--items", "8"];
    fails(&make, &["world-there", "--force"]);
    succeeds(&[&make[..], &["--force"]].concat());
    assert_eq!(fs::read_to_string(out.join("mine.txt")).unwrap(), "mine");
    fails(&["data", "world", "--out", at(&out.join("mine.txt"))], &["mine.txt"]);
    fails(
        &["data", "world", "--out", at(&fixture.out("world-small")), "--bytes", "9"],
        &["--bytes 9", "10000"],
    );
    for (option, value) in [("--vocab", "100"), ("--items", "5"), ("--items", "100001")] {
        let wrong = run(&["data", "world", "--out", at(&out), option, value]);
        assert_eq!(wrong.code, 2, "{}", wrong.stderr);
    }
}
