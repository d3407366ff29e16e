//! Benchmarks: their files, good and bad, and their scores against lm-evaluation-harness.

mod bad;
mod files;
mod golden;
mod rows;

use std::path::PathBuf;

/// The folder of reference material, if this machine has it.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn shared(test: &str) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared");
    let path = PathBuf::from(std::env::var_os("DSMOE_SHARED").unwrap_or_else(|| default.into()));
    if path.join("golden/lm_eval").is_dir() {
        return Some(path);
    }
    let required = std::env::var("DSMOE_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == "shared"), "{test}: no {}", path.display());
    println!("SKIP {test}: no {}", path.display());
    None
}
