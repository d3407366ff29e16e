//! Commands that several processes share, under every launcher of MPI on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use dsmoe_kernels::testing::{MpiLauncher, mpi_launchers, skipped};
use serde_json::Value;

use crate::common::{
    PROGRAM, Run, config, folder, on_text, path, read, shows, succeeds, wait_until, weights, write,
};

/// The longest time that a failing training may take. The deadline of a hang is shorter.
const SOON: Duration = Duration::from_secs(20);

/// Makes the models: their layers are of several blocks, so that all processes own a part.
fn models() {
    static MADE: Once = Once::new();
    MADE.call_once(|| {
        let mut wide = config();
        wide["hidden_size"] = 64.into();
        wide["intermediate_size"] = 1536.into();
        write("wide.json", wide.to_string());
        let calibration = format!(
            "--calib text.txt --doc-separator {} --samples 8 --seq 32",
            dsmoe_datasets::DOC_SEPARATOR
        );
        for line in [
            "init --config wide.json --tokenizer tokenizer.json --out wide",
            "convert wide --experts 4 --out wide-moe",
            &format!("prune wide --method wanda --budget 0.85 {calibration} --out wide-masked"),
            "prune wide --method llama-moe --set experts=4 --budget 0.85 --out wide-topk",
        ] {
            succeeds(line);
        }
    });
}

/// The arguments of a training of `model` in four lanes, on one thread.
fn training(model: &str, out: &str, more: &str) -> String {
    let text = on_text();
    format!("train {model} {text} --out {out} --batch 1 --seq 32 --lr 1e-3 --threads 1 --lanes 4 {more}")
}

/// The command in the folder of the models, on so many processes.
fn shared(launcher: &MpiLauncher, processes: usize, line: &str) -> Command {
    let mut command = launcher.command(processes, Path::new(PROGRAM));
    command.args(line.split_whitespace()).current_dir(folder());
    command.stdin(Stdio::null()).env_remove("DSMOE_ISA").env_remove("DSMOE_SHARED");
    command
}

/// The command, of which process `rank` runs `first`, a line for the shell that may change its words.
fn but_for(launcher: &MpiLauncher, processes: usize, (rank, first): (usize, &str), line: &str) -> Command {
    let mut command = launcher.command(processes, Path::new("/bin/sh"));
    let script = format!(
        "if [ \"${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}\" = {rank} ]; then {first}; fi; exec \"{PROGRAM}\" \"$@\""
    );
    command.args(["-c", &script, "sh"]).args(line.split_whitespace()).current_dir(folder());
    command.stdin(Stdio::null()).env_remove("DSMOE_ISA").env_remove("DSMOE_SHARED");
    command
}

fn finish(command: &mut Command) -> Run {
    command.output().unwrap().into()
}

/// All files below `dir` but the history, whose times differ.
fn files(dir: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![path(dir)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let file = entry.unwrap().path();
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            if file.is_dir() {
                folders.push(file);
            } else if name != "metrics.jsonl" && !name.starts_with("events.") {
                found.insert(file.strip_prefix(path(dir)).unwrap().to_path_buf(), fs::read(&file).unwrap());
            }
        }
    }
    found
}

/// The metrics without times.
fn history(dir: &str) -> Vec<Value> {
    let times = ["tokens_per_s", "wall_s", "rss_bytes", "eval_seconds", "eval_tokens_per_s"];
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        times.iter().for_each(|time| drop(line.as_object_mut().unwrap().remove(*time)));
        line
    };
    read(&format!("{dir}/metrics.jsonl")).lines().map(line).collect()
}

#[track_caller]
fn assert_same(one: &str, other: &str) {
    let (ones, others) = (files(one), files(other));
    assert_eq!(ones.keys().collect::<Vec<_>>(), others.keys().collect::<Vec<_>>(), "{other}");
    for (name, bytes) in &ones {
        assert!(others[name] == *bytes, "{other}: {} differs", name.display());
    }
    assert_eq!(history(one), history(other), "{other}");
}

#[test]
fn any_mpi_and_any_number_of_processes_leave_the_same_bytes() {
    let launchers = mpi_launchers("any_mpi_and_any_number_of_processes_leave_the_same_bytes");
    if launchers.is_empty() {
        return;
    }
    models();
    for (model, more) in [
        ("wide", "--sparsity 1 --accumulate 3"),
        ("wide-moe", "--active-target 0.5 --dtype bf16"),
        ("wide-masked", "--sparsity 1"),
        ("wide-topk", "--accumulate 3 --dtype bf16"),
    ] {
        let more = format!("{more} --steps 4 --save-every 2 --eval-every 2");
        let alone = format!("{model}-alone");
        succeeds(&training(model, &alone, &more));
        for (number, launcher) in launchers.iter().enumerate() {
            for processes in [2, 4] {
                let out = format!("{model}-{number}-{processes}");
                let run = finish(&mut shared(launcher, processes, &training(model, &out, &more)));
                assert_eq!(run.code, 0, "{}: {}", launcher.name, run.stderr);
                assert_eq!(run.stdout.matches("finished").count(), 1, "{}", run.stdout);
                shows(&run.stderr, &[&format!("{processes} processes share 4 lanes")]);
                assert_same(&alone, &out);
            }
        }
    }
}

#[test]
fn any_stage_leaves_the_bytes_of_one_process() {
    let launchers = mpi_launchers("any_stage_leaves_the_bytes_of_one_process");
    if launchers.is_empty() {
        return;
    }
    models();
    for (model, more) in [
        ("wide", "--sparsity 1 --accumulate 3"),
        ("wide-moe", "--active-target 0.5 --dtype bf16 --recompute"),
        ("wide-masked", "--sparsity 1"),
        ("wide-topk", "--dtype bf16"),
    ] {
        let more = format!("{more} --steps 3 --save-every 2 --eval-every 2");
        let alone = format!("{model}-one-stage");
        succeeds(&training(model, &alone, &more));
        for (number, launcher) in launchers.iter().enumerate() {
            for (stage, processes) in [(2, 4), (3, 2), (3, 4)] {
                let out = format!("{model}-{number}-{processes}-stage-{stage}");
                let line = training(model, &out, &format!("{more} --zero {stage}"));
                let run = finish(&mut shared(launcher, processes, &line));
                assert_eq!(run.code, 0, "{}: {}", launcher.name, run.stderr);
                assert_same(&alone, &out);
            }
        }
    }
}

/// The processes that `torchrun` would start, and the launcher's own port.
fn by_torchrun(processes: usize, line: &str) -> Vec<Child> {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut command = Command::new(PROGRAM);
        command.args(line.split_whitespace()).current_dir(folder()).env_remove("DSMOE_ISA");
        command.envs([("RANK", rank.to_string()), ("WORLD_SIZE", processes.to_string())]);
        command.envs([("MASTER_ADDR", "127.0.0.1".to_owned()), ("MASTER_PORT", (free - 1).to_string())]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    (0..processes).map(start).collect()
}

#[test]
fn processes_of_torchrun_are_connected_and_leave_the_same_bytes() {
    models();
    let more = "--active-target 0.5 --steps 4 --save-every 2";
    succeeds(&training("wide-moe", "no-torchrun", more));
    for (processes, stage) in [(2, 1), (4, 3)] {
        let out = format!("torchrun-{processes}");
        let line = training("wide-moe", &out, &format!("{more} --zero {stage}"));
        let runs = by_torchrun(processes, &line).into_iter().map(|child| child.wait_with_output().unwrap());
        let runs: Vec<Run> = runs.map(Run::from).collect();
        assert!(runs.iter().all(|run| run.code == 0), "{}", runs[0].stderr);
        shows(&runs[0].stderr, &[&format!("{processes} processes share 4 lanes")]);
        assert_eq!(runs[1].stdout, "");
        assert_same("no-torchrun", &out);
    }
    // One that is gone ends the others.
    let line = training("wide-moe", "torchrun-killed", "--active-target 0.5 --steps 100000");
    let mut children = by_torchrun(2, &line);
    let mut last = children.pop().unwrap();
    wait_until("the first step", || {
        fs::read_to_string(path("torchrun-killed/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 1)
    });
    last.kill().unwrap();
    last.wait().unwrap();
    let began = Instant::now();
    let run: Run = children.remove(0).wait_with_output().unwrap().into();
    assert!(began.elapsed() < SOON && run.code != 0, "{}", run.code);
    shows(&run.stderr, &["rank 1 has left"]);
}

#[test]
fn a_training_resumes_on_any_number_and_stops_by_a_file() {
    models();
    for launcher in mpi_launchers("a_training_resumes_on_any_number_and_stops_by_a_file") {
        let more = "--active-target 0.5 --steps 7";
        for out in ["resumed", "whole"] {
            fs::remove_dir_all(path(out)).unwrap_or_default();
        }
        succeeds(&training("wide-moe", "whole", more));
        for (processes, part) in
            [(4, "--stop-after 2"), (2, "--resume --stop-after 1"), (1, "--resume --stop-after 2")]
        {
            let line = training("wide-moe", "resumed", &format!("{more} {part}"));
            let run = finish(&mut shared(&launcher, processes, &line));
            assert_eq!(run.code, 0, "{}: {}", launcher.name, run.stderr);
            shows(&run.stderr, &["continue with"]);
        }
        let line = training("wide-moe", "resumed", &format!("{more} --resume"));
        // The lanes of a resumed training are those of the run.
        let run = finish(&mut shared(&launcher, 4, &line.replace("--lanes 4", "")));
        assert_eq!(run.code, 0, "{}: {}", launcher.name, run.stderr);
        assert!(weights("resumed") == weights("whole"), "{}", launcher.name);

        // A file, a signal to the launcher, and one to a process: all stop after the same step, with a checkpoint.
        for how in ["file", "launcher", "process"] {
            fs::remove_dir_all(path("stopped")).unwrap_or_default();
            let long = "--active-target 0.5 --steps 100000";
            let mut command = shared(&launcher, 2, &training("wide-moe", "stopped", long));
            let mut child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
            wait_for_steps("stopped");
            let user_signal =
                |process: String| Command::new("kill").args(["-USR1", &process]).status().unwrap();
            match how {
                "file" => write("stopped/stop", ""),
                "launcher" => assert!(user_signal(child.id().to_string()).success()),
                _ => assert!(user_signal(process_of("stopped", 1)).success()),
            }
            assert!(child.wait().unwrap().success(), "{}, {how}", launcher.name);
            assert!(!path("stopped/stop").exists());
            assert_eq!(checkpoints("stopped").len(), 1, "{}, {how}", launcher.name);
            succeeds(&training("wide-moe", "stopped", &format!("{long} --resume --stop-after 1")));
        }
    }
}

/// Waits until the training in `out` has taken some steps.
fn wait_for_steps(out: &str) {
    let metrics = path(out).join("metrics.jsonl");
    wait_until("steps", || fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() > 4));
}

/// Waits for the end of a training in which a process fails, and returns its standard error.
fn failed(launcher: &MpiLauncher, mut child: Child) -> String {
    let began = Instant::now();
    let ended = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if began.elapsed() > SOON => {
                child.kill().unwrap();
                panic!("{}: the other processes go on", launcher.name);
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert!(!ended.success(), "{}", launcher.name);
    let text = child.wait_with_output().unwrap();
    [&text.stdout[..], &text.stderr].concat().iter().map(|&byte| char::from(byte)).collect()
}

/// The process of rank `rank` of the training in `out`.
fn process_of(out: &str, rank: usize) -> String {
    let found = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let folder = entry.ok()?.path();
        let read =
            |name: &str| Some(String::from_utf8_lossy(&fs::read(folder.join(name)).ok()?).into_owned());
        let words = read("cmdline")?;
        let is_program = words.starts_with(PROGRAM) && words.split('\0').any(|word| word == out);
        let variables = read("environ")?;
        let ranks = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"].map(|name| format!("{name}={rank}"));
        let is_rank = variables.split('\0').any(|variable| ranks.iter().any(|rank| rank == variable));
        (is_program && is_rank).then(|| folder.file_name().unwrap().to_string_lossy().into_owned())
    });
    found.last().expect("the process")
}

#[test]
fn a_process_that_is_killed_or_hangs_ends_all() {
    models();
    for launcher in mpi_launchers("a_process_that_is_killed_or_hangs_ends_all") {
        for (out, signal, message) in
            [("killed-rank", "-KILL", ""), ("hanging-rank", "-STOP", "did not finish in")]
        {
            fs::remove_dir_all(path(out)).unwrap_or_default();
            let more = "--active-target 0.5 --steps 100000 --save-every 3 --deadline 4 --quiet";
            let mut command = shared(&launcher, 4, &training("wide-moe", out, more));
            let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            wait_for_steps(out);
            let process = process_of(out, 2);
            assert!(Command::new("kill").args([signal, &process]).status().unwrap().success());
            let told = failed(&launcher, child);
            // A stopped process does not end by itself.
            let _ = Command::new("kill").args(["-KILL", &process]).stderr(Stdio::null()).status();
            shows(&told, &[message]);
            // The checkpoint resumes on one process.
            succeeds(&training(
                "wide-moe",
                out,
                "--active-target 0.5 --steps 100000 --resume --stop-after 1",
            ));
        }
    }
}

#[test]
fn an_error_of_one_process_ends_all_with_its_rank() {
    models();
    for launcher in mpi_launchers("an_error_of_one_process_ends_all_with_its_rank") {
        let out = "error-rank";
        let more = "--active-target 0.5 --steps 8 --save-every 2 --quiet";
        for (rank, what, parts) in [
            // The last process writes the moments, the first one the model.
            (3, "trap '' XFSZ; ulimit -f 100", ["dsmoe: error: rank 3 (", "optimizer.safetensors"]),
            (0, "trap '' XFSZ; ulimit -f 100", ["dsmoe: error: rank 0 (", "model.safetensors"]),
            (
                2,
                "export DSMOE_ISA=scalar",
                ["dsmoe: error: rank 0 (", "the processes differ in the instruction set"],
            ),
            (
                1,
                "set -- \"$@\" --separability 0.5",
                ["dsmoe: error: rank 0 (", "differ in separability: 0.0 on ranks 0, 2 and 3; 0.5 on rank 1"],
            ),
            (
                1,
                "mkdir -p elsewhere; cp -r wide-moe text.txt elsewhere; cd elsewhere",
                ["rank 1 (", "is not the directory that rank 0 sees"],
            ),
            (2, "set -- \"$@\" --data nothing.txt", ["dsmoe: error: rank 2 (", "nothing.txt"]),
        ] {
            if what.contains("ulimit") && launcher.name != "Open MPI" {
                // MPICH shares memory by files, which the limit stops too.
                continue;
            }
            fs::remove_dir_all(path(out)).unwrap_or_default();
            let began = Instant::now();
            let run = finish(&mut but_for(&launcher, 4, (rank, what), &training("wide-moe", out, more)));
            assert!(run.code != 0 && began.elapsed() < SOON, "{}, {what}: {}", launcher.name, run.stderr);
            shows(&run.stderr, &parts);
            assert_eq!(
                run.stderr.matches("dsmoe: error").count(),
                1,
                "{}, {what}: {}",
                launcher.name,
                run.stderr
            );
            let checkpoints = fs::read_dir(path(out).join("checkpoints"));
            assert_eq!(checkpoints.map_or(0, Iterator::count), 0, "{}, {what}", launcher.name);
        }
        let run = finish(&mut shared(&launcher, 3, &training("wide-moe", out, more)));
        shows(
            &run.stderr,
            &["lanes is 4 on 3 processes; use 1, 2 or 4 processes, or another number of --lanes"],
        );
    }
}

#[test]
fn a_process_that_exits_or_is_asked_to_end_ends_all() {
    models();
    let more = "--active-target 0.5 --steps 100000 --quiet";
    for launcher in mpi_launchers("a_process_that_exits_or_is_asked_to_end_ends_all") {
        let out = "leaving-rank";
        // One that exits before it joins the others. MPICH leaves them waiting until the deadline of the start.
        fs::remove_dir_all(path(out)).unwrap_or_default();
        let short = format!("{more} --deadline 2");
        let mut command = but_for(&launcher, 4, (2, "exit 3"), &training("wide-moe", out, &short));
        failed(&launcher, command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());

        // One that is interrupted: all stop after the same step, with a checkpoint.
        fs::remove_dir_all(path(out)).unwrap_or_default();
        let mut command = shared(&launcher, 4, &training("wide-moe", out, more));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for_steps(out);
        assert!(Command::new("kill").args(["-TERM", &process_of(out, 2)]).status().unwrap().success());
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            // They save and end; a loaded machine takes its time.
            assert!(began.elapsed() < 3 * SOON, "{}: they go on", launcher.name);
            std::thread::sleep(Duration::from_millis(20));
        }
        let checkpoints: Vec<String> = checkpoints(out);
        let [checkpoint] = &checkpoints[..] else { panic!("{}: {checkpoints:?}", launcher.name) };
        let step: u64 = checkpoint.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
        // The checkpoint resumes, and the result is that of a run of as many steps.
        let line = |out: &str, more: &str| {
            training("wide-moe", out, &format!("--active-target 0.5 --steps 100000 --quiet {more}"))
        };
        let last = step + 1;
        succeeds(&line(out, "--resume --stop-after 1"));
        fs::remove_dir_all(path("not-leaving")).unwrap_or_default();
        succeeds(&line("not-leaving", &format!("--stop-after {last}")));
        let of = |out: &str| {
            let newest = self::checkpoints(out).pop().unwrap();
            fs::read(path(out).join("checkpoints").join(newest).join("model.safetensors")).unwrap()
        };
        assert!(of(out) == of("not-leaving"), "{}: step {last} differs", launcher.name);
    }
}

/// The names of the checkpoints of a run, in order.
fn checkpoints(out: &str) -> Vec<String> {
    let entries = fs::read_dir(path(out).join("checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort_by_key(|name| (name.len(), name.clone()));
    names
}

/// A process is killed by strace when it is about to sync or rename a file for the n-th time, for every n.
#[test]
fn a_process_killed_between_writes_of_a_checkpoint_leaves_what_resumes() {
    const TEST: &str = "a_process_killed_between_writes_of_a_checkpoint_leaves_what_resumes";
    let mut launchers = mpi_launchers(TEST);
    // Those of the distribution: Open MPI and MPICH.
    launchers.truncate(2);
    if launchers.is_empty() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        return skipped(TEST, "no strace");
    }
    models();
    let line = |out: &str, more: &str| {
        training("wide-moe", out, &format!("--active-target 0.5 --steps 3 --save-every 2 --quiet {more}"))
    };
    fs::remove_dir_all(path("unharmed")).unwrap_or_default();
    succeeds(&line("unharmed", ""));
    for (launcher, rank) in launchers.iter().flat_map(|launcher| [(launcher, 0), (launcher, 1)]) {
        let mut kills = 0;
        for nth in 1.. {
            fs::remove_dir_all(path("harmed")).unwrap_or_default();
            let calls = "fsync,/^rename";
            let kill = format!(
                "exec strace -f -qq -o /dev/null -e trace={calls} -e inject={calls}:signal=KILL:when={nth} {PROGRAM} \"$@\""
            );
            let run = finish(&mut but_for(launcher, 2, (rank, &kill), &line("harmed", "--stop-after 2")));
            if run.code == 0 {
                break;
            }
            kills += 1;
            succeeds(&line("harmed", "--resume"));
            let place = format!("{}, rank {rank}, killed at call {nth}", launcher.name);
            assert!(weights("harmed") == weights("unharmed"), "{place}");
            assert!(
                checkpoints("harmed").iter().all(|name| !name.starts_with('.')),
                "{:?}",
                checkpoints("harmed")
            );
        }
        assert!(kills >= [6, 1][rank], "{}: rank {rank} was killed {kills} times", launcher.name);
    }
}

/// Calibration text of 11 sequences, which no number of processes divides.
fn calibration() -> String {
    format!("--calib text.txt --doc-separator {} --samples 11 --seq 32", dsmoe_datasets::DOC_SEPARATOR)
}

/// The result of a command in JSON, without times, dates and names of files.
fn measured(mut run: Value) -> Value {
    const OF_A_RUN: [&str; 6] =
        ["seconds", "tokens_per_s", "date", "files", "total_evaluation_time_seconds", "out"];
    fn strip(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                OF_A_RUN.iter().for_each(|name| drop(fields.remove(*name)));
                fields.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut run);
    run
}

#[test]
fn evaluations_do_not_know_the_number_of_processes() {
    let launchers = mpi_launchers("evaluations_do_not_know_the_number_of_processes");
    if launchers.is_empty() {
        return;
    }
    models();
    let text = on_text();
    for line in [
        format!("eval wide-moe {text} --seq 32 --stride 24 --against wide"),
        format!("eval wide-moe {text} --seq 32 --cache tokens --limit-tokens 3000"),
        format!("eval wide-topk {text} --seq 64 --perplexity window,rolling"),
        "eval wide-moe --tasks world --limit 9 --out RESULTS".to_owned(),
    ] {
        let line = format!("{line} --json --threads 1");
        let results = |out: &str| line.replace("RESULTS", out);
        let run = |mut command: Command, name: &str| {
            let run = finish(&mut command);
            assert_eq!(run.code, 0, "{name}: {}", run.stderr);
            measured(serde_json::from_str(&run.stdout).expect("one result"))
        };
        fs::remove_dir_all(path("results")).unwrap_or_default();
        let alone = run(crate::common::command(&results("results/alone")), "alone");
        for (number, launcher) in launchers.iter().enumerate() {
            let counts: &[usize] = if number == 0 { &[2, 4] } else { &[3] };
            for &processes in counts {
                let out = format!("results/{number}-{processes}");
                let shared = run(shared(launcher, processes, &results(&out)), launcher.name);
                assert_eq!(shared, alone, "{}, {processes}: {line}", launcher.name);
                if line.contains("tasks") {
                    let samples = |out: &str| -> BTreeMap<String, Vec<u8>> {
                        let of_file = |(name, bytes): (PathBuf, Vec<u8>)| {
                            let name = name.to_string_lossy().into_owned();
                            Some((
                                name.strip_prefix("wide-moe/samples_")?.split("_20").next()?.to_owned(),
                                bytes,
                            ))
                        };
                        files(out).into_iter().filter_map(of_file).collect()
                    };
                    assert!(samples(&out).len() > 8);
                    assert_eq!(samples(&out), samples("results/alone"), "{}, {processes}", launcher.name);
                    // The answers that were kept for an interruption are gone.
                    assert!(files(&out).keys().all(|name| !name.to_string_lossy().contains("answers_")));
                }
            }
        }
    }
}

#[test]
fn calibrated_models_do_not_know_the_number_of_processes() {
    let launchers = mpi_launchers("calibrated_models_do_not_know_the_number_of_processes");
    let Some(first) = launchers.first() else { return };
    models();
    let calibration = calibration();
    let budgets = [
        ("sparsegpt", "0.7", "true_sequential=true"),
        ("sparsegpt", "0.7", ""),
        ("wanda", "0.7", ""),
        ("flap", "0.8", ""),
        ("static-core", "0.8", "widths=divergence"),
        ("cmoe", "0.85", "experts=8"),
        ("moefication", "0.85", "experts=4"),
        ("depth", "0.6", "score=angle choice=independent"),
        ("depth", "0.6", ""),
        ("llm-pruner-block", "0.85", ""),
        ("dsmoe", "0.85", "experts=8 routers=fitted"),
    ];
    let pruned = budgets.map(|(method, budget, set)| {
        let set: String = set.split_whitespace().map(|set| format!(" --set {set}")).collect();
        format!("prune wide --method {method} --budget {budget}{set} {calibration}")
    });
    let converted = ["fitted --experts 12 --core 0.25", "calibrated --experts 8"]
        .map(|how| format!("convert wide --active-target 0.5 --router-init {how} {calibration}"));
    for (at, line) in pruned.into_iter().chain(converted).enumerate() {
        let alone = format!("calibrated-{at}");
        succeeds(&format!("{line} --out {alone} --threads 1"));
        let thorough = at == 0 || line.contains("fitted");
        let few: &[usize] = if thorough { &[2, 4] } else { &[3] };
        let few = few.iter().map(|&processes| (first, processes));
        let others = launchers.iter().skip(1).filter(|_| at == 0).map(|other| (other, 3));
        for (launcher, processes) in few.chain(others) {
            let out = format!("{alone}-{processes}-{}", launcher.name.replace(' ', ""));
            let line = format!("{line} --out {out} --threads 1");
            let run = finish(&mut shared(launcher, processes, &line));
            assert_eq!(run.code, 0, "{}: {line}: {}", launcher.name, run.stderr);
            let (ones, others) = (files(&alone), files(&out));
            assert_eq!(ones.keys().collect::<Vec<_>>(), others.keys().collect::<Vec<_>>(), "{out}");
            for (name, bytes) in &ones {
                assert!(others[name] == *bytes, "{line}: {} differs", name.display());
            }
            fs::remove_dir_all(path(&out)).unwrap();
        }
    }
}

#[test]
fn an_error_in_an_evaluation_or_a_calibration_ends_all_with_its_rank() {
    models();
    let calibration = calibration();
    for launcher in mpi_launchers("an_error_in_an_evaluation_or_a_calibration_ends_all_with_its_rank") {
        for (rank, what, line, parts) in [
            (
                2,
                "export DSMOE_ISA=scalar",
                format!("prune wide --method wanda --budget 0.7 {calibration} --out ended"),
                ["dsmoe: error: rank 0 (", "the processes differ in the instruction set"],
            ),
            (
                1,
                "set -- \"$@\" --seed 3",
                format!("convert wide --active-target 0.5 {calibration} --out ended"),
                ["dsmoe: error: rank 0 (", "the processes differ in the arguments"],
            ),
            (
                0,
                "trap '' XFSZ; ulimit -f 100",
                format!("prune wide --method wanda --budget 0.7 {calibration} --out ended"),
                ["dsmoe: error: rank 0 (", "model.safetensors"],
            ),
        ] {
            if what.contains("ulimit") && launcher.name != "Open MPI" {
                continue;
            }
            let began = Instant::now();
            let run = finish(&mut but_for(&launcher, 3, (rank, what), &line));
            assert!(run.code != 0 && began.elapsed() < SOON, "{}, {what}: {}", launcher.name, run.stderr);
            shows(&run.stderr, &parts);
            assert_eq!(run.stderr.matches("dsmoe: error").count(), 1, "{what}: {}", run.stderr);
            assert!(!path("ended").exists(), "{what}");
        }
        // An error that all have is printed once.
        let run = finish(&mut shared(&launcher, 3, "eval wide --data nothing.txt"));
        assert!(run.code != 0);
        assert_eq!(run.stderr.matches("dsmoe: error").count(), 1, "{}", run.stderr);
        shows(&run.stderr, &["rank 0 (", "nothing.txt"]);
    }
}
