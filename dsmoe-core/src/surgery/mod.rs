//! Expert surgery: a model whose layers keep, merge, drop or reorder the experts of a trained one.
//!
//! A method says what it wants layer by layer ([`LayerSurgery`]); [`operate`] checks it and writes the model, tensor by tensor.
//!
//! ```text
//! new expert  W'[j] = sum over its parts of weight W_old[neurons[j]]        rows of gate and of up, columns of down
//! router      Rows   gate i is the gate of the first part of expert i
//!             Mean   gate i is the mean of the gates of the parts of expert i, by their weights
//!             Map    all gates stay, and gate e runs the expert that has e among its parts
//! ```
//! An expert of one part is copied bit for bit, where its neurons move too.
//!
//! The experts of a surgery are those that have a gate, numbered as the gates are where each has one of its own. Gates that share an
//! expert already stay or go with it: `Rows` keeps all gates of the first part, and maps of a surgery and of the one before are
//! composed. A mean of gates is of experts that have one each. What all tokens run stays bit for bit: DSMoE's
//! core, the residual experts of a top-k model, a shared expert, the bias and the correction of the output. So do the parts of a
//! router that its gates have in common: the first matrix of a router of low rank, and the first of a gate of two matrices. Biases
//! of gate and up are of neurons and follow them; the bias of down is of no expert.
//!
//! `Rows` keeps the row, bias and threshold of a sigmoid gate. A gate that is left opens for the same tokens with the same
//! value, and dropping experts that never open changes no logit (but with the rescaling of eq. 8, whose n is that of the gates
//! that are left). Budgets keep their thresholds, and their shares are of the experts that are left
//! ([`Surgery::shares`]), in all layers together where their numbers differ. `Mean` has a logit that is the mean of its parts'
//! logits for every token, since logits are linear in
//! rows and biases, and the threshold of a layer is one for all of its gates: the merged gate opens where its parts open on
//! average, and equal parts have equal values before and after. A mean of sigmoids is no sigmoid of a linear map, so that no
//! other rule has a format; `Map` is the rule by which an expert runs where any of its parts did, with the sum of the values of the
//! gates that are open. Where two gates of binary value are open, that is twice the mean of their experts, their sum.
//!
//! Top-k gates keep the factor of the scores: a softmax over the chosen logits does not know the others, so that dropping experts
//! that are never chosen changes no logit. A factor that was made of the number of experts is not made anew.

mod form;
mod shares;
mod tensors;

use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::comm::{Communicator, alone};

use crate::accounting::Accounting;
use crate::checkpoint::{
    CONFIG_FILE, Change, Meter, OutputDir, Progress, TensorInfo, TensorSource, check_llama_tensors,
    copy_companions, open_model,
};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::masks::Masks;
use form::{Form, Source};
use tensors::Experts;

/// The new experts and gates of a layer.
///
/// ```
/// use dsmoe_core::convert::{UpcycleOptions, upcycle};
/// use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule, SurgeryReport, operate};
/// # let work = tempfile::tempdir()?;
/// # let [dense, mixture, out] = ["dense", "mixture", "out"].map(|name| work.path().join(name));
/// # let config = dsmoe_core::init::preset("tiny")?;
/// # dsmoe_core::init::init(&config, &dense, &Default::default(), &mut |_| {})?;
/// # let family = "mixtral".to_owned();
/// # let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// # upcycle(&dense, &mixture, &options, &mut |_| {})?;
///
/// // Experts 0 and 1 stay, 2 and 3 become one.
/// let merged = NewExpert::merged([(2, 0.5), (3, 0.5)]);
/// assert_eq!(merged.parts[0], Part { old: 2, weight: 0.5, neurons: None });
/// let experts = vec![NewExpert::kept(0), NewExpert::kept(1), merged];
/// let layer = LayerSurgery { experts, router: RouterRule::Mean };
/// let report: SurgeryReport =
///     operate(&mixture, &out, (&vec![layer; config.num_layers], None), false, &mut |_| {})?;
/// assert!(report.total < report.total_before);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSurgery {
    /// The new experts, in order.
    pub experts: Vec<NewExpert>,
    /// The rule for the gates.
    pub router: RouterRule,
}

/// An expert of the new model.
///
/// ```
/// use dsmoe_core::surgery::{LayerSurgery, NewExpert, RouterRule};
///
/// // Of four experts the first stays and the others become one, by the share of tokens that they run.
/// let experts = vec![NewExpert::kept(0), NewExpert::merged([(1, 0.5), (2, 0.25), (3, 0.25)])];
/// let layer = LayerSurgery { experts, router: RouterRule::Mean };
/// assert_eq!(layer.check(4, 512), Ok(()));
/// // Weights are shares of 1.
/// let half = NewExpert::merged([(1, 0.25), (2, 0.25)]);
/// assert!(LayerSurgery { experts: vec![half], router: RouterRule::Mean }.check(4, 512).is_err());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NewExpert {
    /// The experts that it is made of: a kept one has one part.
    pub parts: Vec<Part>,
}

/// The part of an old expert in a new one.
///
/// ```
/// use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule};
///
/// // The second expert of two neurons resembles the first one with its neurons swapped.
/// let parts = |neurons: Vec<u32>| {
///     let first = Part { old: 0, weight: 0.5, neurons: None };
///     vec![first, Part { old: 1, weight: 0.5, neurons: Some(neurons) }]
/// };
/// let layer = |neurons| LayerSurgery {
///     experts: vec![NewExpert { parts: parts(neurons) }],
///     router: RouterRule::Mean,
/// };
/// assert_eq!(layer(vec![1, 0]).check(2, 2), Ok(()));
/// assert!(layer(vec![1, 1]).check(2, 2).is_err()); // no order
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Number of the old expert.
    pub old: usize,
    /// Its weight in the new one.
    pub weight: f64,
    /// Row j of the part is row `neurons[j]` of the old expert; none where they stay in order.
    pub neurons: Option<Vec<u32>>,
}

/// The rule for the gates of a layer.
///
/// ```
/// use dsmoe_core::surgery::{LayerSurgery, NewExpert, RouterRule};
///
/// let merged = NewExpert::merged([(1, 0.5), (2, 0.5)]);
/// let layer = |router| LayerSurgery { experts: vec![merged.clone()], router };
/// // Expert 0 may go with its gate. Where all gates stay, each has to lead to an expert.
/// assert_eq!(layer(RouterRule::Rows).check(3, 512), Ok(()));
/// let problem = layer(RouterRule::Map).check(3, 512).unwrap_err();
/// assert_eq!(problem, "drops expert 0, whose gate stays");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterRule {
    /// A new expert has the gate of its first part; the others go.
    Rows,
    /// A new expert has the mean of the gates of its parts, by their weights.
    Mean,
    /// All gates stay, and run the expert that their own is a part of.
    Map,
}

/// The surgery of all layers of a model.
///
/// ```
/// use dsmoe_core::surgery::{LayerSurgery, Surgery};
///
/// let layers = vec![LayerSurgery::keep([0, 2]); 4];
/// let surgery = Surgery { top_k: Some(1), ..Surgery::of(&layers) };
/// assert_eq!((surgery.layers.len(), surgery.shares), (4, None));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Surgery<'a> {
    /// The experts of every layer.
    pub layers: &'a [LayerSurgery],
    /// The number of experts that a token runs, in place of the model's own; none where it is not fixed, or stays.
    pub top_k: Option<usize>,
    /// The share of the new experts of all layers that is active at each budget that a DSMoE model stores, the core included, where
    /// it was measured. Budgets whose shares are equal become one. Otherwise gates that go count as open as often
    /// as those that stay.
    pub shares: Option<&'a [f64]>,
}

impl<'a> Surgery<'a> {
    /// Describes a surgery after which tokens run as many experts as before, and whose shares were not measured.
    pub fn of(layers: &'a [LayerSurgery]) -> Surgery<'a> {
        Surgery { layers, top_k: None, shares: None }
    }
}

/// Summary of the result.
///
/// ```
/// use dsmoe_core::surgery::{LayerSurgery, SurgeryReport, operate};
/// # use dsmoe_core::convert::{UpcycleOptions, upcycle};
/// # let work = tempfile::tempdir()?;
/// # let [dense, mixture, out] = ["dense", "mixture", "out"].map(|name| work.path().join(name));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
/// # let family = "mixtral".to_owned();
/// # let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// # upcycle(&dense, &mixture, &options, &mut |_| {})?;
///
/// // Three of four experts stay, in each of four layers.
/// let layers = vec![LayerSurgery::keep([0, 1, 3]); 4];
/// let report: SurgeryReport = operate(&mixture, &out, (&layers, None), false, &mut |_| {})?;
/// // In each layer an expert of 3 x 512 x 128 weights goes, and its gate.
/// assert_eq!(report.total_before - report.total, 4 * (3 * 512 * 128 + 128));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SurgeryReport {
    /// Held parameters of the source.
    pub total_before: u64,
    /// Held parameters of the result.
    pub total: u64,
    /// Parameters that a token uses, where their number is fixed.
    pub activated: f64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Distance of an expert's weights from a sum of 1 that rounding explains.
const ROUNDING: f64 = 1e-9;

impl NewExpert {
    /// Keeps an expert.
    pub fn kept(old: usize) -> NewExpert {
        NewExpert { parts: vec![Part { old, weight: 1.0, neurons: None }] }
    }

    /// Merges experts, whose neurons stay in order, by their weights.
    pub fn merged(parts: impl IntoIterator<Item = (usize, f64)>) -> NewExpert {
        let part = |(old, weight)| Part { old, weight, neurons: None };
        NewExpert { parts: parts.into_iter().map(part).collect() }
    }
}

impl LayerSurgery {
    /// Keeps some experts and drops the others, with their gates.
    pub fn keep(kept: impl IntoIterator<Item = usize>) -> LayerSurgery {
        LayerSurgery { experts: kept.into_iter().map(NewExpert::kept).collect(), router: RouterRule::Rows }
    }

    /// Checks this for a layer of `held` experts of `width` neurons.
    ///
    /// # Errors
    /// There is no new expert; one has no part, weights that are not shares of 1, or neurons that are no order; an old expert
    /// is in two, or with [`RouterRule::Map`] in none.
    pub fn check(&self, held: usize, width: usize) -> std::result::Result<(), String> {
        if self.experts.is_empty() {
            return Err("has no expert".to_owned());
        }
        let mut used = vec![false; held];
        for (i, expert) in self.experts.iter().enumerate() {
            let wrong = |problem: String| Err(format!("has a new expert {i} {problem}"));
            if expert.parts.is_empty() {
                return wrong("without parts".to_owned());
            }
            for Part { old, weight, neurons } in &expert.parts {
                match used.get_mut(*old) {
                    None => return wrong(format!("of expert {old}, and there are {held}")),
                    Some(true) => return wrong(format!("of expert {old}, which another part has")),
                    Some(used) => *used = true,
                }
                if !(weight.is_finite() && *weight >= 0.0) {
                    return wrong(format!("with a part of weight {weight}"));
                }
                if neurons.as_ref().is_some_and(|order| !is_order(order, width)) {
                    return wrong(format!("whose neurons are no order of {width}"));
                }
            }
            let sum: f64 = expert.parts.iter().map(|part| part.weight).sum();
            if (sum - 1.0).abs() > ROUNDING {
                return wrong(format!("whose weights add up to {sum}"));
            }
        }
        match used.iter().position(|used| !used) {
            Some(expert) if self.router == RouterRule::Map => {
                Err(format!("drops expert {expert}, whose gate stays"))
            }
            _ => Ok(()),
        }
    }
}

fn is_order(order: &[u32], len: usize) -> bool {
    let mut seen = vec![false; len];
    let is_new = |&i: &u32| seen.get_mut(i as usize).is_some_and(|seen| !std::mem::replace(seen, true));
    order.len() == len && order.iter().all(is_new)
}

/// Returns the configuration of the model that `config` becomes by `layers`; `path` is that of its config.json, for messages.
///
/// # Errors
/// The model has no experts that can be changed; there is not one surgery for each layer, or one does not fit its layer; k
/// would be above the gates that are left; the format of the model does not hold the result.
pub fn plan(path: &Path, config: &Config, layers: &[LayerSurgery], top_k: Option<usize>) -> Result<Config> {
    let surgery = Surgery { top_k, ..Surgery::of(layers) };
    let form = Form::of(path, config)?;
    check(&form, config, surgery)?;
    form.after(path, config, surgery)
}

fn check(form: &Form, config: &Config, surgery: Surgery<'_>) -> Result<()> {
    let refuse = |problem: String| Err(Error::argument(problem, "correct the plan of the surgery"));
    let Surgery { layers, shares, .. } = surgery;
    let budgets = config.moe.as_ref().map_or(0, |moe| moe.parts.budgets.len());
    if let Some(shares) = shares.filter(|shares| shares.len() != budgets) {
        return refuse(format!("surgery with shares of {} budgets, and there are {budgets}", shares.len()));
    }
    if layers.len() != config.num_layers {
        return refuse(format!("surgery of {} layers, and there are {}", layers.len(), config.num_layers));
    }
    if layers.iter().any(|layer| (layer.router == RouterRule::Map) != (layers[0].router == RouterRule::Map)) {
        return refuse("surgery that keeps all gates of some layers only".to_owned());
    }
    for (i, layer) in layers.iter().enumerate() {
        if let Err(problem) = layer.check(form.held(config, i), form.width(i)) {
            return refuse(format!("surgery of layer {i} {problem}"));
        }
        let shared = |part: &&Part| form.gates_of(i, part.old).len() > 1;
        let merged = layer.experts.iter().filter(|expert| expert.parts.len() > 1);
        if layer.router == RouterRule::Mean
            && let Some(part) = merged.flat_map(|expert| &expert.parts).find(shared)
        {
            let (old, count) = (part.old, form.gates_of(i, part.old).len());
            let problem = format!("makes a mean of gates of expert {old}, which has {count} of them");
            return refuse(format!("surgery of layer {i} {problem}"));
        }
    }
    Ok(())
}

/// Writes the model in `model` with the experts of `layers` to the new directory `out`, which appears when it is complete.
/// `top_k` replaces the number of experts that a token runs. `force` replaces a model directory that is there.
///
/// # Errors
/// Those of [`plan`]; `model` cannot be read, or has masked weights; `out` is not empty; the file system refuses.
pub fn operate(
    model: &Path,
    out: &Path,
    (layers, top_k): (&[LayerSurgery], Option<usize>),
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<SurgeryReport> {
    operate_on(alone(), [model, out], Surgery { top_k, ..Surgery::of(layers) }, force, progress)
}

/// Does as [`operate`] from the first to the second directory on the processes of `comm`: the first one writes, and all return its
/// outcome.
///
/// # Errors
/// Those of [`operate`]; another process fails.
pub fn operate_on(
    comm: &Arc<dyn Communicator>,
    [model, out]: [&Path; 2],
    surgery: Surgery<'_>,
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<SurgeryReport> {
    let path = model.join(CONFIG_FILE);
    let config = Config::load(model)?;
    let form = Form::of(&path, &config)?;
    check(&form, &config, surgery)?;
    let after = form.after(&path, &config, surgery)?;
    let checkpoint = open_model(model, &config)?;
    let names = check_llama_tensors(&config, &checkpoint)?;
    if Masks::load(model)?.is_some() {
        let problem = "has pruned weights, whose masks would not fit the experts";
        return Err(Error::path(model, problem, "use the model before it was pruned"));
    }
    let blocks = form.blocks(surgery.layers);
    let mut tensors: Vec<(TensorInfo, Source)> = Vec::new();
    for (name, shape) in crate::checkpoint::tensor_names(&after) {
        let source = form.source(&name, &blocks);
        let from = source.first(&name, &blocks);
        let dtype = checkpoint.need(names.stored_name(&from))?.dtype;
        tensors.push((TensorInfo { name, dtype, shape }, source));
    }
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let bytes = infos.iter().map(TensorInfo::len_bytes).sum();
    let output = OutputDir::create_on(comm, model, out, force)?;
    let mut meter = Meter::new(bytes, progress);
    let mut writer = output.model_writer(&after, infos)?;
    let mut source = TensorSource::new(&checkpoint);
    let experts = |layer: usize| Experts::new(&checkpoint, form.width(layer));
    for (info, from) in &tensors {
        match from {
            Source::Same => {
                writer.begin(&info.name)?;
                source
                    .copy(names.stored_name(&info.name), Change::None, |bytes| writer.write_chunk(bytes))?;
            }
            Source::Experts { layer, experts: range, which } => {
                experts(*layer).write(&mut writer, info, &blocks[*layer][range.clone()], which)?;
            }
            Source::Gates { layer } => {
                let gates = form.gates(*layer, &surgery.layers[*layer]);
                experts(*layer).write_gates(&mut writer, info, gates.as_deref())?;
            }
        }
        meter.add(info.len_bytes() as usize);
    }
    writer.finish()?;
    output.commit_with(|dir| {
        copy_companions(model, dir)?;
        after.save(dir)
    })?;
    let counts = Accounting::of(&after);
    Ok(SurgeryReport {
        total_before: Accounting::of(&config).total,
        total: counts.total,
        activated: counts.activated(counts.num_experts),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(parts: &[(usize, f64)]) -> LayerSurgery {
        LayerSurgery { experts: vec![NewExpert::merged(parts.iter().copied())], router: RouterRule::Mean }
    }

    #[test]
    fn what_does_not_fit_a_layer_is_refused() {
        let check = |layer: &LayerSurgery| layer.check(3, 2).expect_err("refused");
        assert_eq!(LayerSurgery::keep([2, 0]).check(3, 2), Ok(()));
        assert_eq!(merged(&[(0, 0.25), (2, 0.75)]).check(3, 2), Ok(()));
        for (layer, part) in [
            (LayerSurgery::keep([]), "has no expert"),
            (LayerSurgery::keep([3]), "new expert 0 of expert 3, and there are 3"),
            (LayerSurgery::keep([1, 1]), "new expert 1 of expert 1, which another part has"),
            (merged(&[]), "without parts"),
            (merged(&[(0, 0.5), (1, 0.25)]), "add up to 0.75"),
            (merged(&[(0, 2.0), (1, -1.0)]), "weight -1"),
            (merged(&[(0, f64::NAN)]), "weight NaN"),
            (LayerSurgery { router: RouterRule::Map, ..LayerSurgery::keep([0, 1]) }, "drops expert 2"),
        ] {
            let problem = check(&layer);
            assert!(problem.contains(part), "{problem}");
        }
        for order in [vec![0], vec![0, 0], vec![0, 2]] {
            let mut layer = LayerSurgery::keep([0]);
            layer.experts[0].parts[0].neurons = Some(order);
            assert!(check(&layer).contains("no order of 2"));
        }
    }
}
