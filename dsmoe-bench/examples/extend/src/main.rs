//! The `dsmoe` command with one method, one type of FFN, one file format and one benchmark more.
#![forbid(unsafe_code)]

#[cfg(all(test, feature = "cuda"))]
mod gpu;
mod narrow;
mod scaled;
mod subtitles;

fn main() -> std::process::ExitCode {
    dsmoe_bench::Cli::new()
        .method(&narrow::NARROW)
        .ffn(&scaled::READER)
        .corpus(&subtitles::SUBTITLES)
        .task(include_str!("capitals.toml"))
        .run()
}
