//! The `dsmoe` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    dsmoe_bench::run()
}
