//! The shared data folder.

use std::path::PathBuf;

/// Where real checkpoints and golden numbers lie; prints a skip when they are absent.
///
/// # Panics
/// They are absent, and `DSMOE_REQUIRE` names `shared`.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
pub(crate) fn shared(test: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("DSMOE_SHARED")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")), PathBuf::from);
    if dir.join("models").is_dir() {
        return Some(dir);
    }
    let required = std::env::var("DSMOE_REQUIRE").is_ok_and(|list| list.split(',').any(|w| w == "shared"));
    assert!(!required, "{test}: no shared data at {}", dir.display());
    println!("SKIP {test}: no shared data at {}", dir.display());
    None
}
