//! MPI under every launcher of this machine.
//!
//! Each case is this program again, started by a launcher with `DSMOE_TEST_CASE` set.
#![cfg(all(feature = "mpi", unix))]

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use dsmoe_kernels::comm::{Communicator, Engine, Settings, What, agree, find_mpi, gather, start};
use dsmoe_kernels::testing::{MpiLauncher, mpi_launchers};

const CASE: &str = "DSMOE_TEST_CASE";
const OF: What = What::of("test data");

/// The longest time of a failing case, its deadline included.
const SOON: Duration = Duration::from_secs(20);

#[test]
#[ignore = "run by the other tests of this file, in processes of their own"]
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is what the tests read")]
fn member() {
    let case = std::env::var(CASE).unwrap();
    if case == "find" {
        println!("{:?}", find_mpi().unwrap());
        return;
    }
    let deadline = Duration::from_secs(if case == "hang" { 2 } else { 60 });
    let settings = Settings { deadline, last_words: |error| eprintln!("last words: {error}") };
    let comm = match start(Engine::Mpi, settings) {
        Ok(comm) => comm,
        Err(error) => {
            eprintln!("start: {error}");
            std::process::exit(1);
        }
    };
    let (rank, step) = (comm.rank(), What::at(3, "gradients"));
    match case.as_str() {
        "all" => all_calls(&*comm),
        // Calls from another thread than the one that started MPI.
        "thread" => std::thread::scope(|scope| scope.spawn(|| all_calls(&*comm)).join().unwrap()),
        "twice" => {
            let again = start(Engine::Mpi, settings).unwrap_err();
            println!("again: {again}");
        }
        "hang" if rank == 1 => std::thread::sleep(Duration::from_secs(100)),
        "exit" if rank == 1 => std::process::exit(7),
        "abort" if rank == 1 => {
            eprintln!("rank 1: no space left");
            comm.abort(9);
        }
        _ => {
            // The first rank that fails ends all.
            let error = comm.barrier(step).unwrap_err();
            eprintln!("error: {error}");
            comm.abort(1);
        }
    }
    println!("rank {rank} of {} is done", comm.size());
}

/// The bytes that `from` sends to `to`: also none, and also many.
fn piece(from: usize, to: usize, round: usize) -> Vec<u8> {
    let len = match (from + 2 * to + round) % 4 {
        0 => 0,
        1 => 1 + from,
        2 => 4099,
        _ => 300_000 + 7 * to,
    };
    (0..len).map(|i| (i * 31 + 17 * from + 5 * to + round) as u8).collect()
}

fn all_calls(comm: &dyn Communicator) {
    let (me, size) = (comm.rank(), comm.size());
    let place = comm.place();
    assert_eq!((place.machine, place.machines, place.local, place.locals), (0, 1, me, size));
    let lens = |pieces: &[Vec<u8>]| pieces.iter().map(Vec::len).collect::<Vec<_>>();
    for round in 0..5 {
        let of = What::at(round as u64, "pieces");
        let send: Vec<Vec<u8>> = (0..size).map(|to| piece(me, to, round)).collect();
        let want: Vec<Vec<u8>> = (0..size).map(|from| piece(from, me, round)).collect();
        let mut recv = vec![0xee; want.concat().len()];
        comm.all_to_all(of, &send.concat(), &lens(&send), &mut recv, &lens(&want)).unwrap();
        assert!(recv == want.concat(), "all-to-all, round {round}");
        let want: Vec<Vec<u8>> = (0..size).map(|from| piece(from, 1, round)).collect();
        let mut recv = vec![0xee; want.concat().len()];
        comm.all_gather(of, &piece(me, 1, round), &mut recv, &lens(&want)).unwrap();
        assert!(recv == want.concat(), "all-gather, round {round}");
        for from in 0..size {
            let want = piece(from, 2, round);
            let mut bytes = if from == me { want.clone() } else { vec![0xee; want.len()] };
            comm.broadcast(of, from, &mut bytes).unwrap();
            assert!(bytes == want, "broadcast from {from}, round {round}");
        }
        comm.barrier(of).unwrap();
    }
    // Only the last process sends, to itself.
    let mut own = vec![0; size];
    own[size - 1] = if me + 1 == size { 3 } else { 0 };
    let send = vec![7u8; own[size - 1]];
    let mut recv = vec![0; send.len()];
    comm.all_to_all(OF, &send, &own, &mut recv, &own).unwrap();
    assert_eq!(recv, send);
    let names: Vec<String> = (0..size).map(|rank| "x".repeat(rank)).collect();
    assert_eq!(
        gather(comm, OF, names[me].as_bytes()).unwrap(),
        names.iter().map(|n| n.as_bytes()).collect::<Vec<_>>()
    );
    let outcome = agree(comm, OF, if me + 1 == size { Err("full".to_owned()) } else { Ok(()) });
    assert_eq!(outcome.unwrap_err().to_string(), format!("rank {}: full", size - 1));
    let error = comm.all_to_all(OF, &[], &vec![0; size], &mut [], &vec![0; size]);
    error.expect("calls go on after an agreed error");
}

/// Runs a case and returns its output, standard error included, with the time that it took.
fn run(launcher: &MpiLauncher, processes: usize, case: &str) -> (Output, String, Duration) {
    let program = std::env::current_exe().unwrap();
    let mut command = launcher.command(processes, &program);
    command.args(["--exact", "member", "--ignored", "--nocapture", "--test-threads=1"]);
    run_command(command.env(CASE, case))
}

fn run_command(command: &mut Command) -> (Output, String, Duration) {
    let began = Instant::now();
    let output = command.output().unwrap();
    let text = [&output.stdout[..], b"\n", &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output, text, began.elapsed())
}

#[test]
fn every_call_moves_the_right_bytes_under_every_mpi() {
    for launcher in mpi_launchers("every_call_moves_the_right_bytes_under_every_mpi") {
        for (processes, case) in [(1, "all"), (2, "thread"), (4, "all")] {
            let (output, text, _) = run(&launcher, processes, case);
            assert!(output.status.success(), "{} on {processes}:\n{text}", launcher.name);
            for rank in 0..processes {
                let line = format!("rank {rank} of {processes} is done");
                assert!(text.contains(&line), "{} lacks {line:?}:\n{text}", launcher.name);
            }
        }
    }
}

#[test]
fn a_failing_process_ends_all_with_its_message() {
    for launcher in mpi_launchers("a_failing_process_ends_all_with_its_message") {
        for (case, message) in [
            ("hang", "last words: rank 0: step 3, gradients: barrier did not finish in 2.0 s;"),
            ("exit", ""),
            ("abort", "rank 1: no space left"),
        ] {
            let (output, text, took) = run(&launcher, 2, case);
            let what = format!("{}, {case}, {took:?}:\n{text}", launcher.name);
            assert!(!output.status.success(), "{what}");
            assert!(text.contains(message) && !text.contains("is done"), "{what}");
            assert!(took < SOON, "{what}");
        }
    }
}

#[test]
fn another_mpis_library_is_refused() {
    let launchers = mpi_launchers("another_mpis_library_is_refused");
    let program = std::env::current_exe().unwrap();
    let other = |name: &str| if name == "Open MPI" { "libmpich.so.12" } else { "libmpi.so.40" };
    let both = ["Open MPI", "MPICH"].map(|name| launchers.iter().find(|launcher| launcher.name == name));
    let [Some(open), Some(mpich)] = both else { return };
    for launcher in [open, mpich] {
        let library = other(launcher.name);
        let mut command = launcher.command(2, &program);
        command
            .args(["--exact", "member", "--ignored", "--nocapture"])
            .env(CASE, "all")
            .env("DSMOE_MPI_LIB", library);
        let (output, text, took) = run_command(&mut command);
        let want = format!(
            "start: the launcher started 2 processes, but {library} sees 1: it is another MPI's library; set DSMOE_MPI_LIB"
        );
        assert!(
            text.contains(&want) && !output.status.success() && took < SOON,
            "{}:\n{text}",
            launcher.name
        );
    }
}

#[test]
fn mpi_starts_once() {
    for launcher in mpi_launchers("mpi_starts_once").iter().take(1) {
        let (output, text, _) = run(launcher, 1, "twice");
        assert!(output.status.success() && text.contains("again: MPI starts once in a process"), "{text}");
    }
}

#[test]
fn a_missing_or_a_wrong_library_is_reported() {
    let program = std::env::current_exe().unwrap();
    for (library, cause) in
        [("/nowhere/libmpi.so", "/nowhere/libmpi.so is not found"), ("libm.so.6", "it lacks MPI_")]
    {
        let mut command = Command::new(&program);
        command
            .args(["--exact", "member", "--ignored", "--nocapture"])
            .env(CASE, "all")
            .env("DSMOE_MPI_LIB", library);
        let (output, text, _) = run_command(&mut command);
        assert!(
            !output.status.success() && text.contains("start: no library of MPI can be used ("),
            "{text}"
        );
        assert!(text.contains(cause) && text.contains("or set DSMOE_MPI_LIB"), "{text}");
    }
}

#[test]
fn the_library_of_a_launcher_is_found_with_its_interface_and_version() {
    for launcher in mpi_launchers("the_library_of_a_launcher_is_found_with_its_interface_and_version") {
        let (output, text, _) = run(&launcher, 1, "find");
        let (interface, version) = match launcher.name {
            "Open MPI" => ("Open MPI's", "Open MPI v"),
            "the standard's interface" => ("the standard's", "MPICH Version: "),
            _ => ("MPICH's", "MPICH Version: "),
        };
        let want = [format!("interface: {interface:?}"), format!("version: \"{version}")];
        assert!(output.status.success() && want.iter().all(|part| text.contains(part)), "{text}");
    }
}
