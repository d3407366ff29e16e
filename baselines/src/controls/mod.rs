//! Controls: the dense model itself, and a smaller dense model of random weights.

mod dense;
mod small_dense;
#[cfg(test)]
mod tests;

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::config::CONFIG_FILE;

pub(crate) use dense::DENSE;
pub(crate) use small_dense::SMALL_DENSE;

use crate::error::Result;
use crate::method::Progress;
use crate::settings::settings;

settings! {
    /// The settings of a method that has none.
    pub(crate) struct NoSettings {}
}

/// Reads the configuration of the dense model in `dir`.
pub(crate) fn dense_config(dir: &Path) -> Result<Config> {
    let config = Config::load(dir)?;
    check_dense(&config, &dir.join(CONFIG_FILE))?;
    Ok(config)
}

/// Checks that `config` is dense, with layers of one shape.
pub(crate) fn check_dense(config: &Config, path: &Path) -> Result<()> {
    if config.is_dense() && config.is_even() {
        return Ok(());
    }
    let problem = format!("is {}, not a plain llama", config.model_type());
    let help = "use a dense model whose layers are alike";
    Err(dsmoe_core::Error::field(path, "model_type", problem, help).into())
}

/// Reports a streamed writer's progress as a method's.
pub(crate) fn writing(
    progress: &mut dyn FnMut(Progress),
) -> impl FnMut(dsmoe_core::checkpoint::Progress) + '_ {
    |at| progress(Progress { stage: "writing", done: at.done_bytes, total: at.total_bytes })
}
