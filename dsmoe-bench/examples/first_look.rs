//! Makes a model with random weights for the embedded world, converts it to eight experts, and shows both.
#![expect(clippy::print_stderr, reason = "an example reports")]

use std::process::ExitCode;

/// Runs a command line, after printing it.
fn dsmoe(line: &str) -> Result<(), String> {
    eprintln!("\n$ dsmoe {line}");
    let status = dsmoe_bench::run_from(["dsmoe"].into_iter().chain(line.split_whitespace()));
    if status == ExitCode::SUCCESS { Ok(()) } else { Err(format!("dsmoe {line}: {status:?}")) }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (world, dense, moe) = (path("world"), path("dense"), path("moe"));

    dsmoe(&format!("data world --out {world} --bytes 1MB --items 20 --quiet"))?;
    dsmoe(&format!("init --preset world --tokenizer {world}/tokenizer.json --out {dense} --quiet"))?;
    dsmoe(&format!("convert {dense} --experts 8 --out {moe} --quiet"))?;
    dsmoe(&format!("inspect {moe} --mean-active 3"))?;
    dsmoe(&format!("eval {moe} --data {world}/text --limit-tokens 2000 --seq 128 --quiet"))?;
    dsmoe("bench ffn --tokens 16 --hidden 64 --intermediate 256 --experts 8 --repeats 1 --quiet")?;
    Ok(())
}
