//! The arguments of `dsmoe grow`.

use std::path::PathBuf;

use clap::Args;
use dsmoe_baselines::grow::{Fill, GrowMethod, GrownNorms, Space};

use super::values::words;

const EXAMPLES: &str = "\
Examples:
  dsmoe grow DENSE --layers 40 --dry-run
  dsmoe grow DENSE --layers 40 --method copy --out DEEP
  dsmoe grow DENSE --layers 40 --out DEEP --resume    # after an interruption";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Grow {
    /// Dense model: a Hugging Face directory or a GGUF file
    pub(crate) model: PathBuf,
    /// Layers of the result; as many as the model has make a copy
    #[arg(long, value_name = "N")]
    pub(crate) layers: usize,
    /// Where new layers come from: lesa predicts them from both neighbours, copy takes the lower one, average the mean of
    /// both, identity the lower one with outputs of 0, random normal weights; stack takes the lower and the upper layers,
    /// overlapping
    #[arg(long, default_value = "lesa",
        value_parser = words::<GrowMethod>(&["lesa", "copy", "average", "identity", "random", "stack"]))]
    pub(crate) method: GrowMethod,
    /// Gaps that get a new layer: last, even, or pairs of neighbouring layers such as 2-3,3-4, counted from 0
    #[arg(long, value_name = "GAPS", default_value = "last")]
    pub(crate) fill: Fill,
    /// Norms of layers that lesa, average and random make: the mean of both neighbours, or those of the first layer
    #[arg(long, default_value = "parents", value_parser = words::<GrownNorms>(&["parents", "first"]))]
    pub(crate) norms: GrownNorms,
    /// Matrices whose rows lesa predicts: the singular value decomposition over all layers, or the weights
    #[arg(long, default_value = "svd", value_parser = words::<Space>(&["svd", "weights"]))]
    pub(crate) space: Space,
    /// Passes of lesa over all rows
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) epochs: usize,
    /// Weight of the difference of norms in lesa's loss
    #[arg(long, value_name = "X", default_value_t = 5e-4)]
    pub(crate) penalty: f64,
    /// Seed of lesa's network and of random weights
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Directory to write
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub(crate) out: Option<PathBuf>,
    /// Continue an interrupted call of lesa with the same arguments from what it left in OUT.partial
    #[arg(long, requires = "out")]
    pub(crate) resume: bool,
    /// Print the plan and make nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Replace the output directory if it exists
    #[arg(long)]
    pub(crate) force: bool,
}
