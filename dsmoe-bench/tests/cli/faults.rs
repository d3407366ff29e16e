//! Killed processes, interrupts and full disks: nothing is lost, and what resumes continues bit for bit.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use crate::common::{
    check_failure, command, end, finish, limited, on_text, path, run, shows, spawn, succeeds, wait_until,
    weights, with_hangup,
};

/// A training run of the tiny DSMoE model.
fn train(out: &str, steps: u32, more: &str) -> String {
    let text = on_text();
    format!(
        "train moe {text} --out {out} --batch 2 --seq 32 --lr 1e-3 --active-target 0.5 --quiet --steps {steps} {more}"
    )
}

fn newest_checkpoint(out: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(path(out).join("checkpoints")).ok()?.map(|entry| entry.unwrap().path());
    entries.filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.')).max()
}

#[test]
fn twenty_kills_at_random_moments_do_not_change_a_bit() {
    let more = "--save-every 5 --resume";
    succeeds(&train("calm", 1500, more));
    let line = train("killed", 1500, more);
    let mut random = 1u64;
    let mut kills = 0;
    for _ in 0..20 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut child = command(&line).stdout(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_millis(20 + (random >> 33) % 150));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills >= 15, "only {kills} of 20 runs were still going when they were to be killed");
    succeeds(&line);
    assert!(weights("calm") == weights("killed"), "weights differ after {kills} kills");
}

/// Trains into `whole`, and into `parts` until `signal`, which has to end the run with `code`, these words and a checkpoint. The
/// rest has to come to the same weights.
fn a_signal_saves(signal: &str, (code, words): (i32, &str), [whole, parts]: [&str; 2]) {
    succeeds(&train(whole, 200, ""));
    let line = train(parts, 200, "--resume");
    let child = spawn(&line);
    let [metrics, model] = ["metrics.jsonl", "model.safetensors"].map(|name| path(parts).join(name));
    wait_until("training", || fs::metadata(&metrics).is_ok_and(|file| file.len() >= 3000));
    let run = end(child, signal);
    assert_eq!(run.code, code, "{}", run.stderr);
    shows(&run.stderr, &[words]);
    assert!(newest_checkpoint(parts).is_some());
    assert!(!model.exists(), "a run that was stopped has no final model");
    succeeds(&line);
    assert!(weights(whole) == weights(parts), "weights differ after {signal}");
}

#[test]
fn an_interrupt_saves_and_the_rest_is_the_same() {
    a_signal_saves("-INT", (130, "--resume"), ["uninterrupted", "interrupted"]);
}

#[test]
fn a_user_signal_saves_and_the_rest_is_the_same() {
    a_signal_saves("-USR1", (0, "dsmoe: stopping after this step"), ["unsignalled", "signalled"]);
}

/// Returns whether this process was started by `nohup` or its like.
fn hangup_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    mask.is_none_or(|mask| mask.ends_with(['1', '3', '5', '7', '9', 'b', 'd', 'f']))
}

#[test]
fn a_run_outlives_its_terminal_only_if_it_was_told_to() {
    for (out, is_ignored, code) in [("hung-up", false, 130), ("left-alone", true, 0)] {
        // A shell cannot take back what its parent has ignored.
        if !is_ignored && hangup_is_ignored() {
            continue;
        }
        let mut command = with_hangup(is_ignored, &train(out, 200, ""));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let metrics = path(out).join("metrics.jsonl");
        wait_until("training", || fs::metadata(&metrics).is_ok_and(|file| file.len() >= 3000));
        let run = end(child, "-HUP");
        assert_eq!(run.code, code, "{}", run.stderr);
        assert_eq!(path(out).join("model.safetensors").exists(), is_ignored);
        assert!(newest_checkpoint(out).is_some());
    }
}

#[test]
fn a_full_disk_is_named_and_the_last_checkpoint_stays() {
    succeeds(&train("roomy", 20, ""));
    let line = train("full", 20, "--resume");
    let first = run(&format!("{line} --stop-after 10"));
    assert!(matches!(first.code, 0 | 130), "{}", first.stderr);
    let checkpoint = newest_checkpoint("full");
    assert!(checkpoint.is_some());

    check_failure(&finish(limited(128, &line)), &line, &["safetensors"]);
    assert_eq!(newest_checkpoint("full"), checkpoint);
    let left = fs::read_dir(path("full/checkpoints")).unwrap().count();
    assert_eq!(left, 1, "a half-written checkpoint is left");

    succeeds(&line);
    assert!(weights("roomy") == weights("full"), "weights differ after a full disk");
}

/// A limit on the size of files stands in for a full disk: the system refuses in the middle of a file.
#[test]
fn a_full_disk_leaves_no_new_directory() {
    for line in ["init --config config.json", "export moe --as dense", "convert dense --experts 4"] {
        let name = format!("no-room-for-{}", line.split(' ').next().unwrap());
        let line = format!("{line} --quiet --out {name}/model");
        fs::create_dir(path(&name)).unwrap();
        check_failure(&finish(limited(16, &line)), &line, &[".safetensors", "File too large"]);
        assert_eq!(fs::read_dir(path(&name)).unwrap().count(), 0, "{line}: something is left");
    }
}

/// A word is encoded as a whole, which takes many times its bytes.
#[cfg(target_os = "linux")]
#[test]
fn text_beyond_the_memory_is_named_with_the_fix() {
    use crate::common::{in_memory, write};

    write("beyond/word.txt", "x".repeat(40_000_000));
    write("beyond/words.txt", "x ".repeat(2_000_000));
    let prepare = |name: &str| {
        format!(
            "data prepare --data beyond/{name}.txt --model dense --cache beyond/cache --threads 2 --quiet"
        )
    };
    let line = prepare("word");
    let parts = [
        "word.txt: to encode 40000000 bytes at once takes more than the ",
        "; split the file, or ",
        "--doc-separator",
    ];
    check_failure(&finish(in_memory(2_000_000, &line)), &line, &parts);
    let run = finish(in_memory(2_000_000, &prepare("words")));
    assert_eq!(run.code, 0, "{}", run.stderr);
}
