//! Bad files: an error with the file, the row and the help.

use dsmoe_datasets::tasks::Task;

use crate::made::gzip;
use crate::rows::{PIQA, folder, good_rows, jsonl, load, piqa_parquet};

/// The error of one bad file under `name`, without its path.
fn refused(task: &str, name: &str, content: &[u8]) -> String {
    let dir = folder(&[(&format!("{task}/{name}"), content)]);
    let error = load(dir.path(), task).map(drop).unwrap_err();
    assert!(!error.contains('\n'), "{error}");
    let place = dir.path().join(task).join(name).display().to_string();
    error.strip_prefix(&format!("{place}: ")).unwrap_or_else(|| panic!("{error}")).to_owned()
}

#[test]
fn bad_rows_are_named_with_their_fix() {
    let original = "take the row from the original";
    let removed = "remove the row or take it from the original";
    let split = "public test splits come without labels: give the validation split";
    let (swag, lambada) = ("give a file of hellaswag", "give a file of lambada_openai");
    let no_endings = "no column `endings`, there is activity_label, ctx_a, ctx_b, options, label";
    let all_endings = "[\"d\", \"e\", \"f\", \"g\"]";
    let answers = "take the row from the original, or give a split with answers";
    let aliases = "{\"aliases\": [\"a\"], \"value\": \"a\"}";
    let (no_aliases, no_answers) =
        ("no column `answer` with `aliases`", "no column `answers`, there is question, answers");
    for (task, from, to, reason, help) in [
        ("hellaswag", "\"endings\"", "\"options\"", no_endings, swag),
        ("hellaswag", "\"3\"", "4", "`label` is \"4\", not one of 0 to 3", original),
        ("hellaswag", "\"3\"", "\"\"", "`label` is \"\", not one of 0 to 3", split),
        ("hellaswag", all_endings, "[]", "`endings` has 0 texts, at least 2 needed", removed),
        ("hellaswag", "\"d\"", "\" \"", "text 0 of `endings` is empty", removed),
        ("hellaswag", "\"d\"", "7", "`endings` is a number, not a list of texts", swag),
        ("hellaswag", "\"d\"", "\"[step]\"", "text 0 of `endings` is markup alone", original),
        ("lambada_openai", "\"text\"", "\"txt\"", "no column `text`, there is txt", lambada),
        ("piqa", "\"two\"", "\"\"", "`sol2` is empty", removed),
        ("piqa", "\"two\"", "[]", "`sol2` is a list, not a text", "give a file of piqa"),
        ("piqa", "1}", "1.5}", "`label` is \"1.5\", not one of 0 to 1", original),
        ("social_iqa", "\"3\"", "\"0\"", "`label` is \"0\", not one of 1 to 3", original),
        ("storycloze_2016", ": 2}", ": 3}", "`answer_right_ending` is \"3\", not one of 1 to 2", original),
        ("winogrande", "a _ b", "a b", "`sentence` has no gap `_`", original),
        ("gsm8k", "#### 1", "1", "`answer` does not end in `#### ` and a number", original),
        ("nq_open", "[\"a\"]", "[]", "`answer` has 0 texts, at least 1 needed", removed),
        ("triviaqa", aliases, "\"a\"", no_aliases, "give a file of triviaqa"),
        ("webqs", "[\"a\"]", "null", no_answers, "give a file of webqs"),
        ("arc_easy", "\"B\"}", "\"C\"}", "`answerKey` is \"C\", not one of A, B", answers),
        ("arc_easy", "[\"A\", \"B\"]", "[\"A\"]", "`label` has 1 texts, at least 2 needed", removed),
        (
            "openbookqa",
            "\"choices\"",
            "\"options\"",
            "no column `choices` with `text`",
            "give a file of openbookqa",
        ),
        ("boolq", "1}", "2}", "`label` is \"2\", not one of 0 to 1", original),
        (
            "mmlu",
            "\"3\", \"4\"",
            "\"3\"",
            "`choices` has 3 texts, and number 3 from 0 is asked for",
            "give a file of mmlu",
        ),
    ] {
        let good = good_rows()[task].replace('\n', " ");
        let bad = good.replace(from, to);
        assert_ne!(good, bad, "{task} {from}");
        let split = Task::named(task).unwrap().split.name();
        let error = refused(task, &format!("{split}.jsonl"), format!("{good}\n\n{bad}\n").as_bytes());
        assert_eq!(error, format!("row 2: {reason}; {help}"), "{task} {from}");
    }
}

#[test]
fn damaged_files_are_named_with_the_row() {
    let lines = jsonl(&[PIQA; 2000]);
    let packed = gzip(lines.as_bytes());
    let error = refused("piqa", "valid.jsonl.gz", &packed[..packed.len() / 2]);
    assert!(error.starts_with("row ") && error.contains("damaged or truncated gzip data"), "{error}");
    assert!(error.ends_with("; fetch the file again"), "{error}");
    let broken_line = format!("{PIQA}\n{{\"goal\": \n");
    let broken_array = format!("[{PIQA}, {{\"goal\"");
    for (name, content, message) in [
        ("valid.jsonl", broken_line.as_bytes(), "row 2: not a JSON object"),
        ("valid.json", broken_array.as_bytes(), "row 2: not a JSON object"),
        ("valid.json", b"[1]", "row 1: not a JSON object"),
        ("valid.json", b"", "row 1: not a JSON object"),
        ("valid.csv", b"goal,sol1,sol2,label\na,b\n", "row 1: 2 fields under 4 columns"),
        ("valid.jsonl", b"{\"goal\": \"\xff\"}\n", "row 1: not UTF-8"),
    ] {
        let error = refused("piqa", name, content);
        assert!(error.starts_with(message) && error.contains("; "), "{error}");
    }
}

#[test]
fn a_row_is_bounded_in_every_format() {
    let text = "x".repeat(65 << 20);
    let row = "row 2: a row of more than 67108864 bytes; split the row, or fetch the file again";
    let (array, container) =
        (format!("[{PIQA}, {{\"goal\": \""), format!("{{\"Data\": [{PIQA}, {{\"goal\": [\""));
    let line = format!("{PIQA}\n{{\"goal\": \"");
    for (name, start, end, message) in [
        ("valid.jsonl", &line[..], "\"}\n", "row 2: a line of more than 67108864 bytes"),
        ("valid.json", &array[..], "\"}]", row),
        ("valid.json", &container[..], "\"]}]}", row),
        ("valid.csv", "goal,sol1,sol2,label\ng,one,two,1\n\"", "\",one,two,1\n", row),
    ] {
        let error = refused("piqa", name, format!("{start}{text}{end}").as_bytes());
        assert!(error.starts_with(message), "{name}: {error}");
    }
}

#[test]
fn values_of_a_row_of_json_are_bounded() {
    let zeros = "0,".repeat((1 << 21) + (1 << 17));
    let wanted = "row 2: a row of more than 2097152 keys and values; split the row, or fetch the file again";
    for (name, start, end) in [
        ("valid.jsonl", format!("{PIQA}\n{{\"goal\": ["), "0]}\n"),
        ("valid.json", format!("[{PIQA}, {{\"goal\": ["), "0]}]"),
        ("valid.json", format!("{{\"Data\": [{PIQA}, {{\"goal\": ["), "0]}]}"),
    ] {
        let error = refused("piqa", name, format!("{start}{zeros}{end}").as_bytes());
        assert_eq!(error, wanted, "{name}: {start}");
    }
}

#[test]
fn bytes_that_are_not_text_are_found_in_their_row() {
    let csv = b"goal,sol1,sol2,label\ng,one,two,1\n\xff,one,two,1\n";
    let json = [format!("[{PIQA}, {{\"goal\": \"").as_bytes(), b"\xff\"}]"].concat();
    for (name, content, place) in [("valid.csv", &csv[..], 33), ("valid.json", &json[..], PIQA.len() + 13)] {
        let error = refused("piqa", name, content);
        assert!(error.starts_with(&format!("row 2: not UTF-8 at byte {place} of the text; ")), "{error}");
    }
}

#[test]
fn damaged_and_foreign_parquet_files_are_refused() {
    let good = piqa_parquet(&["g"; 50]);
    assert_eq!(
        refused("hellaswag", "validation.parquet", &good),
        "row 1: no column `activity_label`, there is goal, sol1, sol2, label; give a file of hellaswag"
    );
    for end in [0, 3, good.len() / 2, good.len() - 1] {
        let error = refused("piqa", "validation.parquet", &good[..end]);
        assert!(error.starts_with("row 1: unreadable Parquet data ("), "{end}: {error}");
    }
    // Whatever is wrong inside, it is an error or the rows, never a panic.
    for at in (0..good.len()).step_by(3) {
        let mut bad = good.clone();
        bad[at] ^= 0x55;
        let dir = folder(&[("piqa/validation.parquet", &bad)]);
        if let Err(error) = load(dir.path(), "piqa") {
            assert!(error.contains(": row "), "{at}: {error}");
        }
    }
}

#[test]
fn labels_in_a_file_of_their_own_must_fit() {
    let rows = jsonl(&[PIQA; 2]).replace(", \"label\": 1", "");
    for (labels, message) in [
        (&b"1\n"[..], "valid.jsonl: row 2: "),
        (b"1\n0\n1\n", "valid-labels.lst: 3 labels for 2 rows; take both files from the original"),
        (b"1\n2\n", "valid.jsonl: row 2: `label` is \"2\", not one of 0 to 1"),
    ] {
        let dir = folder(&[("piqa/valid.jsonl", rows.as_bytes()), ("piqa/valid-labels.lst", labels)]);
        let error = load(dir.path(), "piqa").map(drop).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}
