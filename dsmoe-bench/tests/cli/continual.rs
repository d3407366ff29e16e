//! `dsmoe continual`.

use std::time::Duration;

use crate::common::{
    ends_soon, fails, json_of, kills_change_no_byte, large_model, list, number, path, read, read_json, shows,
    spawn, succeeds, wait_until, write,
};

const TASKS: &str = "
[train]
batch = 4
seq = 32
lr = 1e-3
valid_fraction = 0.1

[method]
prune = \"scores\"
every = 2
rho = 0.05
select = 0.5
select_every = 3
replay = 6

[[task]]
name = \"first\"
data = \"first.txt\"
steps = 6

[[task]]
name = \"second\"
data = [\"second.txt\"]
steps = 4
";

/// Writes the tasks and their texts into a folder.
fn texts_in(folder: &str) {
    let text = read("text.txt");
    let middle = (text.len() / 2..).find(|&at| text.is_char_boundary(at)).unwrap();
    write(&format!("{folder}/first.txt"), &text[..middle]);
    write(&format!("{folder}/second.txt"), &text[middle..]);
    write(&format!("{folder}/tasks.toml"), TASKS);
}

#[test]
fn tasks_are_learnt_and_resumed() {
    texts_in("continual");
    let line = "continual continual/tasks.toml --model dense";
    let plan = json_of(&format!("{line} --dry-run"));
    assert_eq!((list(&plan["tasks"]).len(), plan["tokens_per_step"].as_u64()), (2, Some(128)));
    assert_eq!(plan["method"]["density"], 0.5);
    let found = json_of(&format!("{line} --out continual/run"));
    assert_eq!((list(&found["start"]).len(), list(&found["learnt"]).len()), (2, 2));
    for learnt in list(&found["learnt"]) {
        assert!(
            (number(&learnt["density"]) - 0.5).abs() < 0.01 && number(&learnt["flops"]) > 0.0,
            "{learnt}"
        );
    }
    let rise = number(&found["learnt"][1]["losses"][0]) - number(&found["learnt"][0]["losses"][0]);
    assert!((rise - number(&found["forgetting"])).abs() < 1e-12);
    assert_eq!(read_json("continual/run/results.json")["learnt"], found["learnt"]);
    // The model after a task is a model like any other.
    let eval = json_of("eval continual/run/tasks/02-second --data continual/second.txt --seq 32");
    assert!(number(&eval["nll"]) > 0.0);

    fails(&format!("{line} --out continual/run"), &["is not empty", "--resume"]);
    let bytes = || std::fs::read(path("continual/run/tasks/02-second/model.safetensors")).unwrap();
    let whole = bytes();
    std::fs::remove_dir_all(path("continual/run/tasks/02-second")).unwrap();
    std::fs::remove_file(path("continual/run/results.json")).unwrap();
    let again = json_of(&format!("{line} --out continual/run --resume"));
    assert_eq!(again["learnt"], found["learnt"]);
    assert_eq!(bytes(), whole);
    shows(
        &succeeds(&format!("{line} --out continual/run --resume")),
        &["after", "density", "start", "forgetting"],
    );
    // Without a length of their own, sequences fit the model.
    write("continual/short.toml", TASKS.replace("seq = 32\n", ""));
    let fitted = json_of("continual continual/short.toml --model dense --dry-run");
    assert_eq!(fitted["train"]["seq"], 128);
    write("continual/other.toml", TASKS.replace("replay = 6", "replay = 7"));
    let other = "continual continual/other.toml --model dense --out continual/run --resume";
    fails(other, &["continual.json", "method was", "another --out"]);
}

#[test]
fn kills_do_not_change_what_is_learnt() {
    texts_in("continual-kills");
    // Killed tasks go on from their checkpoints.
    write("continual-kills/tasks.toml", TASKS.replace("[train]", "[train]\nsave_every = 2"));
    let line =
        "continual continual-kills/tasks.toml --model dense --resume --quiet --out continual-kills/run";
    kills_change_no_byte(line, "continual-kills/run", 2);
}

#[test]
fn a_signal_is_heard_while_held_out_text_is_evaluated() {
    let model = large_model("continual-signal/large");
    write("continual-signal/first.txt", read("text.txt").repeat(4));
    write("continual-signal/second.txt", read("text.txt").repeat(4));
    write("continual-signal/tasks.toml", TASKS.replace("valid_fraction = 0.1", "valid_fraction = 0.9"));
    let line = format!("continual continual-signal/tasks.toml --model {model} --out continual-signal/run");
    let child = spawn(&format!("{line} --quiet"));
    wait_until("the start", || path("continual-signal/run/continual.json").is_file());
    std::thread::sleep(Duration::from_millis(300));
    ends_soon(child, &["--resume"]);
    assert!(!path("continual-signal/run/start.json").exists(), "the evaluation was over");
    std::fs::remove_dir_all(path("continual-signal")).unwrap();
}

#[test]
fn wrong_task_files_are_said() {
    texts_in("continual-wrong");
    for (name, text, wanted) in [
        ("none", "[train]\nseq = 32\n".to_owned(), &["there is no task", "[[task]]"][..]),
        ("nameless", TASKS.replace("name = \"second\"\n", ""), &["task 2 has no name", "add name"]),
        ("textless", TASKS.replace("data = \"first.txt\"\n", ""), &["task 1 has no data", "add data"]),
        ("stepless", TASKS.replace("steps = 4\n", ""), &["task 2 has no steps", "add steps"]),
        ("missing", TASKS.replace("first.txt", "no.txt"), &["no.txt"]),
        ("dense", TASKS.replace("every = 2", "density = 0.0"), &["density is 0", "0.001 to 1"]),
        ("typo", TASKS.replace("rho", "rhoo"), &["line 11", "rhoo", "continual --help"]),
        ("key", TASKS.replace("lr = ", "log_every = "), &["[train] has log_every", "batch, seq"]),
        ("long", TASKS.replace("seq = 32", "seq = 4000"), &["seq is 4000", "at most"]),
        ("toml", "[[task".to_owned(), &["line 1"]),
        ("many", "[[task]]\n".repeat(1001), &["many.toml: 1001 tasks are more than 1000; use fewer"]),
    ] {
        let file = format!("continual-wrong/{name}.toml");
        write(&file, text);
        fails(&format!("continual {file} --model dense --out continual-wrong/refused"), wanted);
        assert!(!path("continual-wrong/refused").exists(), "{name}");
    }
    fails(
        "continual continual-wrong/nowhere.toml --model dense --out continual-wrong/refused",
        &["nowhere.toml"],
    );
    fails("continual continual-wrong/tasks.toml --model nowhere --out continual-wrong/refused", &["nowhere"]);
}
