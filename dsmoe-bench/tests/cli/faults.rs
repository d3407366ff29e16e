//! Killed processes, interrupts and full disks: nothing is lost, and what resumes continues bit for bit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::{Fixture, at, command, finish, fixture, succeeds};

/// Arguments of a training run of the tiny DSMoE model.
fn train<'a>(fixture: &'a Fixture, out: &'a Path, steps: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", at(&fixture.moe), "--data", at(&fixture.text), "--out", at(out)];
    args.extend(["--doc-separator", crate::common::SEPARATOR, "--batch", "2", "--seq", "32", "--lr", "1e-3"]);
    args.extend(["--active-target", "0.5", "--quiet", "--steps", steps]);
    args.extend(more);
    args
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("model.safetensors")).unwrap()
}

fn newest_checkpoint(out: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(out.join("checkpoints")).ok()?;
    entries
        .map(|e| e.unwrap().path())
        .filter(|p| !p.file_name().unwrap().to_str().unwrap().starts_with('.'))
        .max()
}

#[test]
fn twenty_kills_at_random_moments_do_not_change_a_bit() {
    let fixture = fixture();
    let (calm, killed) = (fixture.out("calm"), fixture.out("killed"));
    let more = ["--save-every", "5", "--resume"];
    succeeds(&train(fixture, &calm, "1500", &more));
    let args = train(fixture, &killed, "1500", &more);
    let mut random = 1u64;
    let mut kills = 0;
    for _ in 0..20 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut child = command(&args).stdout(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_millis(20 + (random >> 33) % 150));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills >= 15, "only {kills} of 20 runs were still going when they were to be killed");
    succeeds(&args);
    assert!(weights(&calm) == weights(&killed), "weights differ after {kills} kills");
}

#[test]
fn an_interrupt_saves_and_the_rest_is_the_same() {
    let fixture = fixture();
    let (calm, stopped) = (fixture.out("uninterrupted"), fixture.out("interrupted"));
    succeeds(&train(fixture, &calm, "200", &[]));
    let args = train(fixture, &stopped, "200", &["--resume"]);
    let child = command(&args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::metadata(stopped.join("metrics.jsonl")).map_or(0, |m| m.len()) < 3000 {
        assert!(Instant::now() < deadline, "training does not start");
        sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("--resume"), "{stderr}");
    assert!(newest_checkpoint(&stopped).is_some());
    assert!(!stopped.join("model.safetensors").exists(), "an interrupted run has no final model");
    succeeds(&args);
    assert!(weights(&calm) == weights(&stopped), "weights differ after an interrupt");
}

/// The command with files limited to `kib` KiB: writing more fails as on a full disk.
fn limited(kib: u32, args: &[&str]) -> Command {
    let mut sh = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", 2 * kib);
    sh.args(["-c", &script, env!("CARGO_BIN_EXE_dsmoe")]).args(args).stdin(Stdio::null());
    sh
}

#[test]
fn a_full_disk_is_named_and_the_last_checkpoint_stays() {
    let fixture = fixture();
    let (calm, full) = (fixture.out("roomy"), fixture.out("full"));
    succeeds(&train(fixture, &calm, "20", &[]));
    let args = train(fixture, &full, "20", &["--resume"]);
    let first = command(&train(fixture, &full, "20", &["--resume", "--stop-after", "10"])).status().unwrap();
    assert!(matches!(first.code(), Some(0 | 130)), "{first}");
    let checkpoint = newest_checkpoint(&full).unwrap();

    let run = finish(limited(64, &args));
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    assert!(run.stderr.contains("safetensors") && !run.stderr.contains("panicked"), "{}", run.stderr);
    assert_eq!(newest_checkpoint(&full), Some(checkpoint));
    assert_eq!(
        fs::read_dir(full.join("checkpoints")).unwrap().count(),
        1,
        "a half-written checkpoint is left"
    );

    succeeds(&args);
    assert!(weights(&calm) == weights(&full), "weights differ after a full disk");
}

#[test]
fn a_full_disk_leaves_nothing_of_a_conversion() {
    let fixture = fixture();
    let out = fixture.dir.join("no-room").join("moe");
    fs::create_dir(out.parent().unwrap()).unwrap();
    let args = ["convert", at(&fixture.dense), "--experts", "4", "--out", at(&out), "--quiet"];
    let run = finish(limited(16, &args));
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.lines().count() == 1 && run.stderr.contains("safetensors"), "{}", run.stderr);
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 0, "something is left");
}
