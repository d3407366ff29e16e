//! The folder of reference material.

use std::path::PathBuf;

/// Returns the folder if it holds `part`; else prints that `test` is skipped.
///
/// # Panics
/// It does not, and `DSMOE_REQUIRE` names `shared`.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
pub(crate) fn shared(test: &str, part: &str) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared");
    let path = PathBuf::from(std::env::var_os("DSMOE_SHARED").unwrap_or_else(|| default.into()));
    if path.join(part).is_dir() {
        return Some(path);
    }
    let required = std::env::var("DSMOE_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == "shared"), "{test}: no {}", path.display());
    println!("SKIP {test}: no {}", path.display());
    None
}
