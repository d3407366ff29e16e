//! The `dsmoe` command with one method, one type of FFN and one file format more.
#![forbid(unsafe_code)]

mod narrow;
mod scaled;
mod subtitles;

fn main() -> std::process::ExitCode {
    dsmoe_bench::Cli::new().method(&narrow::NARROW).ffn(&scaled::READER).corpus(&subtitles::SUBTITLES).run()
}
