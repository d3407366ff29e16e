//! Instruction counts, which do not depend on the load of the machine.

use std::hint::black_box;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use dsmoe_kernels::Isa;

use super::file::{Benchmark, Kind};
use super::workloads::{Workload, suites};
use crate::cli::bench::{Choice, Once, Suite};
use crate::files::read;
use crate::ui::Ui;

/// The functions at which valgrind starts and stops counting.
const BEGIN: &str = "*instruction_count_begins*";
const END: &str = "*instruction_count_ends*";

#[inline(never)]
fn instruction_count_begins() {
    black_box(1);
}

#[inline(never)]
fn instruction_count_ends() {
    // A body that differs from the other, since the linker may merge equal functions.
    black_box(2);
    black_box(3);
}

/// Returns the workloads to count: those of the suites that valgrind finishes in minutes.
fn chosen(choice: &Choice) -> Vec<Workload> {
    let counted = suites(choice).into_iter().filter(|suite| matches!(suite, Suite::Kernels | Suite::Ffn));
    counted.flat_map(|suite| suite.workloads()).filter(|one| choice.takes(&one.name)).collect()
}

/// `dsmoe bench once`: calls each benchmark once to warm up, and once between the marks.
pub(crate) fn once(args: &Once, ui: &mut Ui) -> Result<()> {
    let names = rayon::scope(|_| -> Result<Vec<String>> {
        let mut names = Vec::new();
        for workload in chosen(&args.choice) {
            let mut task = (workload.build)()?;
            task()?;
            if names.is_empty() {
                // The first count has two million instructions too many, whatever is between the marks: not taken.
                instruction_count_begins();
                task()?;
                instruction_count_ends();
            }
            instruction_count_begins();
            task()?;
            instruction_count_ends();
            names.push(workload.name);
        }
        Ok(names)
    })?;
    ui.result(&names, |names| names.join("\n"))
}

/// Counts the instructions of a call of every benchmark, or returns the reason why that is not possible.
pub(crate) fn count(choice: &Choice) -> Result<Result<Vec<Benchmark>, String>> {
    if chosen(choice).is_empty() {
        return Ok(Err("no benchmark of kernels or ffn is chosen".to_owned()));
    }
    let version = Command::new("valgrind").arg("--version").output();
    if !version.is_ok_and(|output| output.status.success()) {
        return Ok(Err("there is no valgrind; install it".to_owned()));
    }
    let dir = tempfile::tempdir().context("cannot make a temporary directory; set TMPDIR")?;
    // Valgrind does not support AVX-512.
    let isa = match std::env::var("DSMOE_ISA").ok().filter(|isa| isa != "avx512") {
        Some(isa) => isa,
        None => {
            let mut known =
                Isa::available().into_iter().filter(|isa| matches!(isa.name(), "scalar" | "avx2" | "neon"));
            known.next_back().map_or("scalar", Isa::name).to_owned()
        }
    };
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", &format!("--zero-before={BEGIN}"), &format!("--dump-after={END}")])
        .arg(format!("--callgrind-out-file={}", dir.path().join("counts").display()))
        .arg(std::env::current_exe().context("cannot find this program")?)
        .args(["bench", "once", "--json", "--threads", "1"])
        .args(choice.words())
        .env("DSMOE_ISA", &isa);
    let output = command.output().context("valgrind")?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        return Ok(Err(format!("valgrind ended with {}: {last}", output.status)));
    }
    let names: Vec<String> = serde_json::from_slice(&output.stdout).context("valgrind")?;
    let mut counts = Vec::new();
    // Dumps count from 1, and the first one is skipped.
    for (i, name) in names.iter().enumerate() {
        let total = total(&dir.path().join(format!("counts.{}", i + 2)))?;
        let name = format!("{name} ({isa})");
        counts.push(Benchmark::exact(name, Kind::Instructions, "instructions", total as f64));
    }
    Ok(Ok(counts))
}

/// Reads the instructions of one dump of callgrind.
fn total(path: &Path) -> Result<u64> {
    let text = read(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary:").or(line.strip_prefix("totals:")));
    match line.and_then(|line| line.trim().parse().ok()) {
        Some(total) if total > 0 => Ok(total),
        _ => bail!("{}: callgrind counted nothing; build with symbols", path.display()),
    }
}
