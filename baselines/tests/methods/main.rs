//! Every method, from a dense directory to the model that it makes.

mod llama_moe_golden;
mod llm_pruner;
mod sparse;
mod topk;
mod trained_router;

use std::path::PathBuf;

use dsmoe_baselines::{Configured, Result, method, read_settings};

/// The method of that name with the settings in `set`.
fn configured(name: &str, set: &[&str]) -> Result<Box<dyn Configured>> {
    method(name)?.configure(&read_settings(set.iter().copied())?)
}

/// The folder of shared data; prints a skip if it is absent.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn shared(test: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("DSMOE_SHARED")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")), PathBuf::from);
    if dir.join("models/babyllama-1m").exists() {
        return Some(dir);
    }
    let required = std::env::var("DSMOE_REQUIRE").is_ok_and(|list| list.split(',').any(|w| w == "shared"));
    assert!(!required, "{test}: no shared data at {}", dir.display());
    println!("SKIP {test}: no shared data at {}", dir.display());
    None
}
