//! Exports without routers: whether the dense model is the sparse one, and the folding of gates into weights.

use std::path::Path;

use dsmoe_router::GateValue;

use crate::checkpoint::{Checkpoint, ffn_name, read_partitions, router_bias_name, router_name};
use crate::config::{CONFIG_FILE, Config, MoeConfig};
use crate::error::{Error, Result};

const KEEP_OR_FOLD: &str =
    "export it {as} hf, which keeps the gates, or approximate them by {fold} mean with {data}";

/// The relation of a dense export to the sparse model.
///
/// ```
/// use dsmoe_core::convert::{ConvertOptions, convert};
/// use dsmoe_core::export::{DenseForm, ExportAs, ExportOptions, export};
/// # let work = tempfile::tempdir()?;
/// # let [dense, moe, back] = ["dense", "moe", "back"].map(|name| work.path().join(name));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// convert(&dense, &moe, &ConvertOptions::new(8), &mut |_| {})?;
/// match export(&moe, &back, &ExportOptions::new(ExportAs::Dense), &mut |_| {})?.dense {
///     Some(DenseForm::Source) => {} // the bytes of the original
///     Some(DenseForm::AllOpen | DenseForm::Folded) | None => panic!("nothing was trained"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseForm {
    /// The sparse model was not trained: the dense model is the one that it was made from.
    Source,
    /// Every expert always runs with the factor 1: both models compute the same.
    AllOpen,
    /// Mean factors of the experts are folded into the weights: an approximation.
    Folded,
}

/// A dense export in preparation: the order of neurons and the factors of the columns of `down_proj`, by layer.
pub(super) struct Dense {
    pub(super) form: DenseForm,
    /// The stored row of each original neuron, where neurons are permuted.
    pub(super) orders: Vec<Option<Vec<u32>>>,
    /// Factors in the original order; empty unless folded.
    factors: Vec<Vec<f32>>,
}

impl Dense {
    /// Prepares the dense export of the model in `dir`; `fold` are mean factors by layer and expert.
    ///
    /// # Errors
    /// The model has no experts that are cut from a dense FFN; it is trained and its gates are neither open nor folded;
    /// `fold` does not fit the model.
    pub(super) fn new(
        dir: &Path,
        config: &Config,
        checkpoint: &Checkpoint,
        fold: Option<&[Vec<f64>]>,
    ) -> Result<Dense> {
        let help = "export it {as} native or hf";
        let fail = |field: &str, problem: String, help| {
            Err(Error::field(&dir.join(CONFIG_FILE), field, problem, help))
        };
        match (&config.moe, &config.ffn) {
            (Some(_), _) => {}
            (None, Some(spec)) => match (spec.blocks(0), fold) {
                (None, _) => {
                    return fail("ffn.type", format!("is {:?}, which has no dense form", spec.kind()), help);
                }
                (Some(_), None) => {
                    let problem =
                        format!("is {:?}, and without its gates it computes something else", spec.kind());
                    return fail("ffn.type", problem, KEEP_OR_FOLD);
                }
                (Some(_), Some(_)) => {}
            },
            (None, None) => {
                let problem = format!("is {} already, without experts", config.model_type());
                return fail("model_type", problem, help);
            }
        }
        let mut orders: Vec<Option<Vec<u32>>> =
            read_partitions(config, checkpoint)?.iter().map(|partition| partition.inverse()).collect();
        // A kind of FFN without a partition keeps its neurons as they are stored.
        orders.resize(config.num_layers, None);
        let Some(fold) = fold else {
            let form = exact_form(dir, config, checkpoint)?;
            return Ok(Dense { form, orders, factors: Vec::new() });
        };
        if let Some(moe) = &config.moe {
            check_no_correction(dir, moe)?;
        }
        let fits = |(layer, means): (usize, &Vec<f64>)| {
            config.layer_experts(layer) == Some(means.len()) && means.iter().all(|mean| mean.is_finite())
        };
        if fold.len() != config.num_layers || !fold.iter().enumerate().all(fits) {
            let experts = config.num_experts().unwrap_or(0);
            let problem = format!("factors are not of {} layers and {experts} experts", config.num_layers);
            return Err(Error::argument(problem, "measure them with this model"));
        }
        let factors = config.layers().zip(fold).zip(&orders).map(|((shape, means), order)| {
            let width = shape.intermediate / means.len();
            let row = |neuron: usize| order.as_ref().map_or(neuron, |order| order[neuron] as usize);
            (0..shape.intermediate).map(|neuron| means[row(neuron) / width] as f32).collect()
        });
        Ok(Dense { form: DenseForm::Folded, factors: factors.collect(), orders })
    }

    /// Returns the factors of the columns of the tensor, if it is folded.
    pub(super) fn factors(&self, name: &str) -> Option<&[f32]> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let factors = self.factors.get(layer.parse::<usize>().ok()?)?;
        (rest == "mlp.down_proj.weight").then_some(factors)
    }
}

/// Multiplies the columns of whole rows by factors.
pub(super) fn scale_columns(values: &mut [f32], factors: &[f32]) {
    for row in values.chunks_exact_mut(factors.len()) {
        row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
    }
}

/// Refuses a model whose FFNs add a term that a dense FFN does not have.
fn check_no_correction(dir: &Path, moe: &MoeConfig) -> Result<()> {
    if !moe.parts.correction {
        return Ok(());
    }
    let problem = "is true: what it adds to the FFN's output has no place in a dense model";
    Err(Error::field(&dir.join(CONFIG_FILE), "dsmoe.correction", problem, "export it {as} hf"))
}

/// Returns in which way the model without its routers is exact.
fn exact_form(dir: &Path, config: &Config, checkpoint: &Checkpoint) -> Result<DenseForm> {
    match &config.moe {
        Some(moe) if moe.untrained => return Ok(DenseForm::Source),
        Some(moe) if moe.router.gate_value == GateValue::Binary && all_open(config, moe, checkpoint)? => {
            check_no_correction(dir, moe)?;
            return Ok(DenseForm::AllOpen);
        }
        _ => {}
    }
    let problem = "was fitted or trained with gates, and without them it computes something else";
    Err(Error::path(dir, problem, KEEP_OR_FOLD))
}

/// Returns whether every gate is above the threshold for any input.
fn all_open(config: &Config, moe: &MoeConfig, checkpoint: &Checkpoint) -> Result<bool> {
    for layer in 0..config.num_layers {
        let Some(bar) = moe.threshold_logit(layer).or_else(|| moe.router.bar()) else { continue };
        if !moe.router_bias {
            return Ok(false);
        }
        // An expert that several gates open has a factor of more than 1.
        if moe.map(layer).is_some() {
            return Ok(false);
        }
        let routed = moe.experts(layer) - moe.core(layer);
        let (name, len) = match moe.parts.router_rank {
            None => (router_name(layer), routed * config.hidden),
            Some(rank) => (ffn_name(layer, "router.b.weight"), routed * rank),
        };
        let (mut weight, mut bias) = (vec![0.0; len], vec![0.0; routed]);
        checkpoint.read_f32(&name, &mut weight)?;
        checkpoint.read_f32(&router_bias_name(layer), &mut bias)?;
        if weight.iter().any(|&weight| weight != 0.0) || bias.iter().any(|&bias| bias.is_nan() || bias <= bar)
        {
            return Ok(false);
        }
    }
    Ok(true)
}
