//! Deeper models: new layers between those of a dense model, predicted or copied.
//!
//! ```text
//! lesa      of each of q, k, v, o, gate, up, down: [W_1 | ... | W_L] = U S [V_1 | ... | V_L]; a network learns the rows of V_i
//!           from those of V_{i-1} and V_{i+1}; the layer between i and i + 1 is U S net(V_i, V_{i+1})
//! copy      the lower neighbour                 average   the mean of both neighbours
//! identity  the lower neighbour with o and down 0: the model computes what it did
//! random    normal weights                      stack     the lower layers, then the upper ones, overlapping
//! ```
//! (lesa: Yang et al., ACL 2025, arXiv 2502.13794, from its code; identity: Wu et al., LLaMA Pro, ACL 2024; stack: Kim et al.,
//! SOLAR 10.7B, NAACL 2024.)

mod basis;
mod layers;
mod options;
mod predict;
#[cfg(test)]
mod tests;
mod write;

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::LayerStream;
use dsmoe_core::config::CONFIG_FILE;
use dsmoe_core::masks::{MASKS_FILE, Masks};

use crate::error::{Error, Result};
use crate::method::Progress;
use crate::partial::Partial;
pub use options::{Fill, GrowMethod, GrowOptions, GrowPlan, GrownNorms, NewLayer, Space};
pub use predict::Fitted;

/// The result of growing.
#[derive(Clone, Debug, PartialEq)]
pub struct Grown {
    /// The plan.
    pub plan: GrowPlan,
    /// The training results of LESA's networks, one for each kind of matrix.
    pub fits: Vec<Fitted>,
}

/// Plans the deeper model of the one in `model`.
///
/// # Errors
/// The model cannot be read, is not dense, has pruned weights, or its layers are not alike; the options ask for fewer layers
/// than there are, or for more than there are gaps; a gap that there is not; lesa of fewer than 3 layers.
pub fn plan_growth(model: &Path, options: &GrowOptions) -> Result<GrowPlan> {
    options.check()?;
    let config = Config::load(model)?;
    if !config.is_dense() || !config.is_even() {
        let problem = "is not of a dense model whose layers are alike";
        let help = "grow the dense model, then convert it";
        return Err(dsmoe_core::Error::field(&model.join(CONFIG_FILE), "model_type", problem, help).into());
    }
    if Masks::load(model)?.is_some() {
        let help = "use the dense model it was made from";
        return Err(Error::model(format!("has {MASKS_FILE}"), help));
    }
    let layers = layers::choose(config.num_layers, options)?;
    let sources: Vec<usize> = layers.iter().map(NewLayer::source).collect();
    let grown = config.with_layers(&sources).ok_or_else(|| {
        let problem = "gives layers windows or rotations by their number, and new layers would change those";
        Error::model(problem, "use another model")
    })?;
    let [source_params, params] = [&config, &grown].map(|config| Accounting::of(config).total);
    Ok(GrowPlan { layers, source_params, params, source_layers: config.num_layers, grown })
}

/// Makes the deeper model of the one in `model` in the new directory `out`, which appears when it is complete. As many layers as
/// there are make a copy, whatever the method.
///
/// # Errors
/// Those of [`plan_growth`]; a file cannot be read, a weight is not finite, `out` is not empty, or the file system refuses.
pub fn grow(
    model: &Path,
    out: &Path,
    options: &GrowOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Grown> {
    grow_from(model, out, options, Partial::none(), progress)
}

/// Does as [`grow`] from the finished parts of an interrupted call, with the same result, and keeps those that it finishes: the
/// matrices that lesa predicts, kind by kind, and the network that it fits, between epochs.
///
/// # Errors
/// Those of [`grow`]; parts of other work.
pub fn grow_from(
    model: &Path,
    out: &Path,
    options: &GrowOptions,
    partial: &Partial,
    progress: &mut dyn FnMut(Progress),
) -> Result<Grown> {
    let plan = plan_growth(model, options)?;
    let output = write::Output::create(model, out, options.force)?;
    let stream = LayerStream::open(model, &[])?;
    let (predicted, fits) = match options.method {
        GrowMethod::Lesa if !plan.is_unchanged() => {
            predict::predict(&stream, &plan.layers, (options, partial), progress)?
        }
        _ => Default::default(),
    };
    output.write(&stream, &plan, (options, predicted), progress)?;
    Ok(Grown { plan, fits })
}
