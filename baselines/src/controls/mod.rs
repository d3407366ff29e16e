//! Controls: what DSMoE and the methods are measured against, and DSMoE with one of its parts taken away.
//!
//! `dense` is the model itself, to be trained on the same text; `small-dense` starts from random weights at the size of
//! the budget; `dsmoe` is the paper's conversion, or one that calibration text has prepared; `dsmoe-no-ste` and `dsmoe-no-threshold` are its ablations (table 3 and
//! section 6.2).

mod dense;
mod dsmoe;
mod small_dense;
mod start;
#[cfg(test)]
mod tests;

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::config::CONFIG_FILE;

pub use dense::Dense;
pub use dsmoe::{Dsmoe, NO_STE, NO_THRESHOLD, PAPER};
pub use small_dense::SmallDense;

use crate::error::Result;
use crate::method::Progress;

/// The configuration of the dense model in `dir`.
fn dense_config(dir: &Path) -> Result<Config> {
    let config = Config::load(dir)?;
    check_dense(&config, &dir.join(CONFIG_FILE))?;
    Ok(config)
}

fn check_dense(config: &Config, path: &Path) -> Result<()> {
    if config.is_dense() && config.is_even() {
        return Ok(());
    }
    let problem = format!("is {} and no plain llama", config.model_type());
    let help = "use a dense model whose layers are alike";
    Err(dsmoe_core::Error::field(path, "model_type", problem, help).into())
}

/// A streamed writer's progress as a method's.
fn writing(progress: &mut dyn FnMut(Progress)) -> impl FnMut(dsmoe_core::checkpoint::Progress) + '_ {
    |at| progress(Progress { stage: "writing", done: at.done_bytes, total: at.total_bytes })
}
