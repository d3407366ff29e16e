//! The arguments that choose which gates of a model open.

use clap::Args;

use super::values::share;

/// The heading of options of gates.
const GATES: &str = "Gates";

/// Thresholds other than those of the model's directory.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct GateArgs {
    /// Threshold of the gates, 0 to 1, in place of the model's
    #[arg(help_heading = GATES, long, value_name = "GATE")]
    pub(crate) threshold: Option<f32>,
    /// Share of the experts to run, for a model that stores thresholds by budget, in place of the model's own share
    #[arg(help_heading = GATES, long, value_name = "SHARE_OF_EXPERTS", value_parser = share, conflicts_with = "threshold")]
    pub(crate) active: Option<f64>,
}
