//! The arguments that choose which gates of a model open.

use clap::Args;

/// Thresholds other than those of the model's directory.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct GateArgs {
    /// Threshold of the gates, 0 to 1, in place of the model's
    #[arg(long, value_name = "SHARE")]
    pub(crate) threshold: Option<f32>,
    /// Share of the experts to run, for a model that stores thresholds by budget, in place of the model's own share
    #[arg(long, value_name = "SHARE", conflicts_with = "threshold")]
    pub(crate) active: Option<f64>,
}
