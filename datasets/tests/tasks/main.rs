//! Benchmarks: their files, good and bad, and their scores against lm-evaluation-harness.

mod bad;
mod definitions;
mod files;
mod golden;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../common/made.rs"]
mod made;
mod rows;
#[path = "../common/shared.rs"]
mod shared;

fn shared(test: &str) -> Option<std::path::PathBuf> {
    shared::shared(test, "golden/lm_eval")
}
