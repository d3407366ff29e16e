//! The embedded world, from its text to the scores of a model.

use serde_json::json;

use crate::common::{agrees, fails, is_wrong_usage, json_of, list, number, path, read, succeeds, write};

#[test]
fn text_tokenizer_and_probes_of_a_world_make_a_model_that_can_be_scored() {
    let made = json_of("data world --out world --seed 3 --bytes 200kB --items 12");
    assert_eq!((&made["seed"], list(&made["domains"]).len()), (&3.into(), 4));
    let bytes: f64 = list(&made["domains"]).iter().map(|row| number(&row["bytes"])).sum();
    assert!((200_000.0..202_000.0).contains(&bytes), "{bytes}");
    assert!(number(&made["vocab_size"]) <= 1536.0);
    for file in ["text/facts.jsonl", "text/stories.jsonl", "tokenizer.json", "probes/gsm8k/train.jsonl"] {
        assert!(path("world").join(file).is_file(), "{file}");
    }

    succeeds("init --preset world --tokenizer world/tokenizer.json --out world-start");
    succeeds("train world-start --data world/text --out world-run --steps 2 --batch 2 --seq 64 --lr 1e-3");
    let scored = json_of("eval world-run --limit 2 --tasks world --world-seed 3");
    let results = scored["results"].as_object().unwrap();
    assert_eq!(results.len(), 10, "{scored}");
    number(&results["world_gsm8k"]["exact_match,strict-match"]);

    // The files hold the same questions.
    let files = json_of("eval world-run --limit 2 --tasks piqa,winogrande --task-data world/probes");
    for task in ["piqa", "winogrande"] {
        let score = json!({ "acc,none": number(&results[&format!("world_{task}")]["acc,none"]) });
        agrees(&files["results"][task], &score);
    }
}

#[test]
fn a_world_is_not_written_over_what_is_there() {
    write("world-there/mine.txt", "mine");
    let make = "data world --out world-there --bytes 20kB --items 8";
    fails(make, &["world-there", "--force"]);
    succeeds(&format!("{make} --force"));
    assert_eq!(read("world-there/mine.txt"), "mine");
    fails("data world --out world-there/mine.txt", &["mine.txt"]);
    fails("data world --out world-small --bytes 9", &["--bytes 9", "10000"]);
    for option in ["--vocab 100", "--items 5", "--items 100001"] {
        is_wrong_usage(&format!("data world --out world-there {option}"));
    }
}
