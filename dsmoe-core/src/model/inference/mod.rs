//! Inference on any device: what is checked, and who computes.

mod cache;
mod context;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod lent;
mod observe;
pub(crate) mod pack;
mod ragged;
pub(crate) mod segments;

use std::path::Path;

use dsmoe_kernels::Precision;
use dsmoe_router::RoutingStats;

pub use cache::Cache;
use cpu::CpuInference;
pub use cpu::Workspace;
pub use observe::{Observe, Observed};
use pack::Parts;
pub use segments::{After, Likelihood, Segment};
use segments::{Alone, places};

use super::arena::Model;
use super::tensors::{Batch, check_input};
use super::weights::Weights;
use crate::accounting::Accounting;
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ffn::{Route, RouterBound};
use crate::kept::LayerThresholds;

/// A decoder for inference: weight matrices packed in a [`Precision`], norms and routers in f32. With bf16
/// the operands of matrix products are rounded to it; sums, softmax and the residual stream are f32.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Batch, Cache, Workspace};
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let model = Inference::new(&Model::new(preset("tiny")?), Precision::Bf16);
/// let (mut cache, mut workspace) = (Cache::new(&model, 8), Workspace::default());
/// model.decode(&[1, 5], &mut cache, None, &mut workspace)?;
/// let logits = model.decode(&[9], &mut cache, None, &mut workspace)?;
/// assert_eq!((logits.len(), cache.len()), (model.config().vocab_size, 3));
///
/// let mut losses = [0.0; 3];
/// let batch = Batch { inputs: &[1, 5, 9], targets: &[5, 9, 2], seq: 3 };
/// model.score(&mut losses, batch, None, &mut workspace)?;
/// assert!(losses.iter().all(|&loss| loss > 0.0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Inference {
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Cpu(Box<CpuInference>),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::CudaInference>),
}

/// Evaluates an expression for the model of either device.
macro_rules! each {
    ($backend:expr, $model:ident => $value:expr) => {
        match $backend {
            Backend::Cpu($model) => $value,
            #[cfg(feature = "cuda")]
            Backend::Cuda($model) => $value,
        }
    };
}

impl Inference {
    /// Packs the weights of `model` for the host, rounded where the precision is bf16.
    pub fn new(model: &Model, precision: Precision) -> Inference {
        let packed = pack::of_model(model, |parts| Inference::build(parts, precision, Device::Cpu));
        packed.expect("reading an arena does not fail")
    }

    /// Packs the weights of `model` for the host, skipping inputs that do not exceed `thresholds`, one entry for each layer.
    ///
    /// # Panics
    /// There are not as many entries as layers, or the model has experts.
    pub fn with_thresholds(
        model: &Model,
        thresholds: Vec<LayerThresholds>,
        precision: Precision,
    ) -> Inference {
        assert!(model.config().is_dense(), "inference: thresholds of a model with experts");
        assert_eq!(thresholds.len(), model.config().num_layers, "inference: thresholds and layers");
        let packed = pack::of_model(model, |parts| {
            let mut config = parts.config;
            config.thresholds = Some(thresholds);
            let accounting = Accounting::of(&config);
            Inference::build(Parts { config, accounting, ..parts }, precision, Device::Cpu)
        });
        packed.expect("reading an arena does not fail")
    }

    /// Packs the weights of `model` for `device`.
    ///
    /// # Errors
    /// The device is not there, its memory does not suffice, or it does not know the precision (a GPU takes bf16) or
    /// the model's FFNs.
    pub fn new_on(model: &Model, precision: Precision, device: Device) -> Result<Inference> {
        pack::of_model(model, |parts| Inference::build(parts, precision, device))
    }

    /// Loads a model directory for the host tensor by tensor: beside the packed weights, one FFN at the
    /// most is in memory in f32. Weights stored as bf16 stay what they are in [`Precision::Bf16`]; f16 and f32 are
    /// rounded.
    ///
    /// # Errors
    /// The directory is malformed; the message names the file, the field or tensor, and the remedy.
    pub fn load(dir: &Path, precision: Precision) -> Result<Inference> {
        Inference::load_on(dir, precision, Device::Cpu)
    }

    /// Loads a model directory for `device`.
    ///
    /// # Errors
    /// Those of [`Inference::load`] and [`Inference::new_on`].
    pub fn load_on(dir: &Path, precision: Precision, device: Device) -> Result<Inference> {
        pack::of_directory(dir, |parts| Inference::build(parts, precision, device))
    }

    /// Makes a model for [`Inference::score`] alone, on the host, of `model`, an outline: `weights` lends one unit at a time. The
    /// embedding and the head are packed here, a layer in every pass that comes to it.
    ///
    /// # Errors
    /// Those of `weights`.
    pub fn lend(model: &Model, weights: Box<dyn Weights>, precision: Precision) -> Result<Inference> {
        let backend = Backend::Cpu(Box::new(CpuInference::lend(model, weights, precision)?));
        Ok(Inference { backend })
    }

    /// Returns whether layers are lent: processes that lend them to each other run their passes at the same time.
    pub fn is_lent(&self) -> bool {
        match &self.backend {
            Backend::Cpu(model) => model.lent.is_some(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => false,
        }
    }

    /// Takes part in a pass of the others without one of its own, where layers are lent.
    ///
    /// # Errors
    /// Those of the weights that are lent.
    pub fn pass_on(&self) -> Result<()> {
        match &self.backend {
            Backend::Cpu(model) => model.lent.as_ref().map_or(Ok(()), |lent| lent.pass_on()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => Ok(()),
        }
    }

    fn build(parts: Parts<'_>, precision: Precision, device: Device) -> Result<Inference> {
        let backend = match device {
            Device::Cpu => Backend::Cpu(Box::new(CpuInference::build(parts, precision)?)),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                Backend::Cuda(Box::new(cuda::CudaInference::build(parts, precision, ordinal)?))
            }
        };
        Ok(Inference { backend })
    }

    /// Returns the device that it runs on.
    pub fn device(&self) -> Device {
        match &self.backend {
            Backend::Cpu(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => model.device(),
        }
    }

    /// Returns the configuration.
    pub fn config(&self) -> &Config {
        each!(&self.backend, model => &model.config)
    }

    /// Returns the parameter counts; pruned weights of masked linears are not activated.
    pub fn accounting(&self) -> &Accounting {
        each!(&self.backend, model => &model.accounting)
    }

    /// Returns the precision of the packed weights.
    pub fn precision(&self) -> Precision {
        match &self.backend {
            Backend::Cpu(model) => model.precision,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => Precision::Bf16,
        }
    }

    /// Returns the size of the weights in bytes.
    pub fn bytes(&self) -> usize {
        each!(&self.backend, model => model.bytes())
    }

    /// Returns empty routing statistics for this model; none without routers.
    pub fn new_stats(&self) -> Option<RoutingStats> {
        let stats = RoutingStats::of_layers(each!(&self.backend, model => model.layer_experts())?);
        Some(match &self.backend {
            Backend::Cpu(model) => stats.with_sizes(model.layer_sizes()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => stats,
        })
    }

    /// Sets the gates' threshold of every layer (the paper's table 4).
    ///
    /// # Errors
    /// The threshold is outside 0..=1, or the model has no gates.
    pub fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        each!(&mut self.backend, model => model.set_threshold(threshold))
    }

    /// Chooses the thresholds of every layer that leave the share `active` of the experts active. Between two stored
    /// budgets they are mixed linearly.
    ///
    /// # Errors
    /// The model has no budgets, or `active` is outside of them.
    pub fn set_active(&mut self, active: f64) -> Result<()> {
        each!(&mut self.backend, model => model.set_active(active))
    }

    /// Sets what the logits of each layer's gates have to exceed, until the next choice of thresholds.
    ///
    /// # Errors
    /// The model has no gates.
    ///
    /// # Panics
    /// There are not as many thresholds as layers.
    pub fn set_thresholds(&mut self, logits: &[f32]) -> Result<()> {
        each!(&mut self.backend, model => model.set_thresholds(logits))
    }

    /// Lets `bound` choose experts in place of the routers, as many for each token as these would open.
    ///
    /// # Errors
    /// The model has no gates, or runs on a GPU.
    pub fn set_router_bound(&mut self, bound: RouterBound) -> Result<()> {
        match &mut self.backend {
            Backend::Cpu(model) => model.set_router_bound(bound),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => {
                Err(Error::argument("a GPU runs a model's own routers", "set {device} to cpu"))
            }
        }
    }

    /// Returns the numbers of choices of every layer's FFN that [`Inference::set_routes`] takes.
    ///
    /// # Errors
    /// The model runs on a GPU.
    pub fn choices(&self) -> Result<Vec<usize>> {
        Ok(self.on_host()?.choices())
    }

    /// Makes the FFNs take these routes for all tokens, one for each layer, until the next call.
    ///
    /// # Errors
    /// A layer has no such choice; the model runs on a GPU, or its layers are lent.
    ///
    /// # Panics
    /// There are not as many routes as layers.
    pub fn set_routes(&mut self, routes: &[Route]) -> Result<()> {
        match &mut self.backend {
            Backend::Cpu(model) => model.set_routes(routes),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => {
                Err(Error::argument("a GPU runs a model's own routes", "set {device} to cpu"))
            }
        }
    }

    /// Sets `losses[t]` to the negative log-likelihood (nats) of target t after the inputs up to t of its sequence; 0
    /// for [`IGNORE`](dsmoe_kernels::cross_entropy::IGNORE). Adds the routing of all inputs to `stats` (from
    /// [`Inference::new_stats`]). A rotation that depends on the number of positions counts the last target as one.
    ///
    /// # Errors
    /// A token id is outside the vocabulary, there are more positions than the model has, or a GPU fails.
    ///
    /// # Panics
    /// The slices' lengths differ, or are no multiple of the batch's `seq`.
    pub fn score(
        &self,
        losses: &mut [f32],
        batch: Batch<'_>,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        assert_eq!(losses.len(), batch.inputs.len(), "score: losses and inputs");
        batch.check(self.config())?;
        match &self.backend {
            Backend::Cpu(model) => model.score(losses, batch, stats, workspace)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => model.score(losses, batch, stats, workspace)?,
        }
        Ok(())
    }

    /// Returns the model on the host.
    ///
    /// # Errors
    /// The model is on a GPU.
    pub(crate) fn on_host(&self) -> Result<&CpuInference> {
        match &self.backend {
            Backend::Cpu(model) => Ok(model),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => Err(Error::argument(
                "this needs a model on the processor".to_owned(),
                "load it for the processor",
            )),
        }
    }

    /// Feeds `ids` at the cache's next positions; returns the logits `[vocab]` after the last one.
    ///
    /// # Errors
    /// No ids, a token id outside the vocabulary, or more positions than the model has; a GPU fails.
    pub fn decode<'w>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &'w mut Workspace,
    ) -> Result<&'w [f32]> {
        self.logits(ids, 1, cache, stats, workspace)
    }

    /// Feeds `ids` at the cache's next positions; returns the logits `[last, vocab]` after the last `last` of them.
    ///
    /// # Errors
    /// Fewer ids than `last`, a token id outside the vocabulary, or more positions than the model has; a GPU fails.
    pub fn logits<'w>(
        &self,
        ids: &[u32],
        last: usize,
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &'w mut Workspace,
    ) -> Result<&'w [f32]> {
        if ids.len() < last || ids.is_empty() {
            return Err(Error::argument(
                format!("{} tokens to read logits of {last}", ids.len()),
                "give at least one token",
            ));
        }
        check_input(self.config(), ids, cache.len, ids.len())?;
        match &self.backend {
            Backend::Cpu(model) => model.logits(ids, last, cache, stats, workspace),
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => model.logits(ids, last, cache, stats, workspace)?,
        }
        Ok(&workspace.logits)
    }

    /// Computes the likelihood of each of `targets` `(place, token)`: the token behind that place of `ids`. `ids` are
    /// the tokens of `segments`, one segment after the other. Adds the routing of all tokens to `stats` (from
    /// [`Inference::new_stats`]).
    ///
    /// # Errors
    /// A token id outside the vocabulary, or more positions than the model has; a GPU fails.
    ///
    /// # Panics
    /// The segments do not make up `ids`, one continues a segment that is not before it or itself continues one, or
    /// a place is outside `ids`.
    pub fn likelihoods(
        &self,
        ids: &[u32],
        segments: &[Segment],
        targets: &[(usize, u32)],
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<Vec<Likelihood>> {
        let located = places(self.config(), ids, segments)?;
        let varies = self.config().architecture.ropes.iter().any(|rope| rope.scaling.varies());
        if varies && located.iter().any(|place| place.before.1 > 0) {
            let Alone { ids, segments, targets } = Alone::of(ids, &located, targets);
            return self.likelihoods(&ids, &segments, &targets, stats, workspace);
        }
        let tokens: Vec<u32> = targets.iter().map(|&(_, token)| token).collect();
        check_input(self.config(), &tokens, 0, 0)?;
        match &self.backend {
            Backend::Cpu(model) => Ok(model.likelihoods(ids, &located, targets, stats, workspace)),
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => model.likelihoods(ids, &located, targets, stats, workspace),
        }
    }

    /// Feeds each of `ids` at the next position of its cache; returns the logits `[ids.len(), vocab]` after them.
    ///
    /// # Errors
    /// A token id outside the vocabulary, or more positions than the model has; a GPU fails.
    ///
    /// # Panics
    /// There are not as many caches as ids.
    pub fn decode_each<'w>(
        &self,
        ids: &[u32],
        caches: &mut [&mut Cache],
        stats: Option<&mut RoutingStats>,
        workspace: &'w mut Workspace,
    ) -> Result<&'w [f32]> {
        assert_eq!(ids.len(), caches.len(), "decode_each: tokens and caches");
        for (id, cache) in ids.iter().zip(&*caches) {
            check_input(self.config(), std::slice::from_ref(id), cache.len, 1)?;
        }
        match &self.backend {
            Backend::Cpu(model) => model.decode_each(ids, caches, stats, workspace),
            #[cfg(feature = "cuda")]
            Backend::Cuda(model) => model.decode_each(ids, caches, stats, workspace)?,
        }
        for cache in caches {
            cache.len += 1;
        }
        Ok(&workspace.logits)
    }

    /// Computes now what the first `positions` positions need, for calls that must not allocate.
    pub(crate) fn prepare(&self, positions: usize) {
        match &self.backend {
            Backend::Cpu(model) => model.prepare(positions),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => {}
        }
    }
}

impl Cache {
    /// Makes an empty cache for `model` with room for `positions`: until they are used up, decoding allocates nothing
    /// for them; after that the room doubles.
    pub fn new(model: &Inference, positions: usize) -> Cache {
        let positions = positions.min(model.config().max_position);
        let config = model.config();
        let host = if model.device().is_gpu() { 0 } else { positions };
        let room = |heads: usize| Vec::with_capacity(host * heads * config.head_dim);
        let layers = config.layers().map(|shape| (room(shape.num_kv_heads), room(shape.num_kv_heads)));
        model.prepare(positions);
        Cache {
            layers: layers.collect(),
            #[cfg(feature = "cuda")]
            cuda: None,
            #[cfg(feature = "cuda")]
            room: positions,
            len: 0,
            expected: 0,
        }
    }
}
