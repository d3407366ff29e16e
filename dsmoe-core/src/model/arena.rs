//! A model with all its parameters in one arena: made, loaded, changed and saved.

use std::borrow::Cow;
use std::path::Path;

use dsmoe_kernels::buf::Buf;
use dsmoe_router::RoutingStats;

use super::ropes::Ropes;
use super::tensors::{Ranges, ffns_of, lay_out, no_gates, set_active, set_threshold, set_thresholds};
use crate::accounting::Accounting;
use crate::checkpoint::{
    DEFAULT_SHARD_BYTES, Dtype, Sums, TensorInfo, WeightReader, model_writer, open_model, partition_name,
};
use crate::config::{Budget, CONFIG_FILE, Config, PartitionKind};
use crate::error::{Error, Result};
use crate::ffn::{DsmoeForm, Ffn, FfnKind};
use crate::masks::Masks;
use crate::params::{Entry, Layout, Stored};

/// A decoder with its parameters in f32, for training.
///
/// ```
/// use dsmoe_core::Model;
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Batch, StepArgs, StepOutput, TrainWorkspace};
/// use dsmoe_kernels::Precision;
///
/// let model = Model::new(preset("tiny")?);
/// let mut workspace = TrainWorkspace::new(&model, 4, Precision::F32);
/// let mut grads = vec![0.0; model.params().len()];
/// let batch = Batch { inputs: &[1, 5, 9, 2], targets: &[5, 9, 2, 7], seq: 4 };
/// let args = StepArgs { loss_scale: 0.25, ..StepArgs::default() };
/// let StepOutput { loss_sum, predicted, .. } = model.train_step(&mut grads, batch, &args, &mut workspace)?;
/// assert_eq!(predicted, 4);
/// assert!(loss_sum > 0.0);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    pub(crate) config: Config,
    pub(crate) ffns: Vec<Box<dyn Ffn>>,
    pub(crate) layout: Layout,
    pub(crate) ranges: Ranges,
    pub(crate) params: Buf,
    pub(crate) ropes: Ropes,
    /// Per layer, the original neuron of each row of a permuted partition; carried from load to save.
    pub(crate) partitions: Option<Vec<Vec<i32>>>,
    pub(crate) masks: Option<Masks>,
}

impl Model {
    /// Makes a model of `config` with the given FFNs, one per layer, and all parameters zero. FFNs of other crates
    /// enter here. Where all of them name one spec ([`Ffn::kind`]) and `config` is dense, the configuration takes
    /// that spec.
    ///
    /// # Panics
    /// The number of FFNs is not the number of layers.
    pub fn with_ffns(config: Config, ffns: Vec<Box<dyn Ffn>>) -> Model {
        let mut model = Model::without_params(config, ffns);
        model.params = Buf::zeros(model.layout.len());
        model
    }

    /// Makes a model of `config` without its parameters, to look at or to train in parts: [`Model::params`] is empty, and what
    /// needs them panics.
    pub fn outline(config: Config) -> Model {
        let ffns = ffns_of(&config);
        Model::without_params(config, ffns)
    }

    fn without_params(mut config: Config, ffns: Vec<Box<dyn Ffn>>) -> Model {
        assert_eq!(ffns.len(), config.num_layers, "model: FFNs and layers");
        let mut kinds = ffns.iter().map(|ffn| ffn.kind());
        if let Some(Some(first @ FfnKind::Spec(_))) = kinds.next()
            && config.is_dense()
            && kinds.all(|kind| kind.as_ref() == Some(&first))
            && let FfnKind::Spec(spec) = first
        {
            config.ffn = Some(spec);
        }
        let (layout, ranges) = lay_out(&config, &ffns);
        let (params, ropes) = (Buf::zeros(0), Ropes::new(&config));
        Model { config, ffns, layout, ranges, params, ropes, partitions: None, masks: None }
    }

    /// Makes a model of `config` with all parameters zero: dense, DSMoE, or with FFNs of another kind, as the
    /// configuration says.
    pub fn new(config: Config) -> Model {
        let ffns = ffns_of(&config);
        Model::with_ffns(config, ffns)
    }

    /// Loads a model directory: a dense LLaMA, DSMoE, or FFNs of a registered kind
    /// ([`register`](crate::ffn::register)).
    ///
    /// # Errors
    /// The directory is malformed; the message names the file, the field or tensor, and the remedy.
    pub fn load(dir: &Path) -> Result<Model> {
        let mut model = Model::load_outline(dir)?;
        let mut params = Buf::zeros(model.layout.len());
        model.read_params(dir, |entry, read| read(&mut params[entry.range.clone()]))?;
        model.params = params;
        Ok(model)
    }

    /// Does as [`Model::load`], but makes a [`Model::outline`]. [`Model::read_params`] reads them tensor by tensor, and [`Model::step_on`] trains on parts of them.
    ///
    /// # Errors
    /// Those of [`Model::load`] but for the values of weights.
    pub fn load_outline(dir: &Path) -> Result<Model> {
        let config = Config::load(dir)?;
        if config.thresholds.is_some() {
            let problem = "is present, and only inference skips inputs";
            let help = "train the dense model that it was made from, then find thresholds";
            return Err(Error::field(&dir.join(CONFIG_FILE), "activation_thresholds", problem, help));
        }
        let checkpoint = open_model(dir, &config)?;
        let masks = Masks::read(dir, &config)?;
        // Before anything of the sizes in the file is allocated.
        drop(WeightReader::new(&config, &checkpoint, masks.as_ref())?);
        let mut model = Model::outline(config);
        model.masks = masks;
        if model.config.moe.as_ref().is_some_and(|moe| moe.partition == PartitionKind::Permuted) {
            let partitions = (0..model.config.num_layers).map(|i| checkpoint.read_i32(&partition_name(i)));
            model.partitions = Some(partitions.collect::<Result<_>>()?);
        }
        Ok(model)
    }

    /// Calls `each` with every tensor of the model, in arena order, and with what reads its values from the directory that the
    /// model was loaded from.
    ///
    /// # Errors
    /// Those of [`Model::load`], and of `each`.
    pub fn read_params(
        &self,
        dir: &Path,
        mut each: impl FnMut(&Entry, &mut dyn FnMut(&mut [f32]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let checkpoint = open_model(dir, &self.config)?;
        let mut reader = WeightReader::new(&self.config, &checkpoint, self.masks.as_ref())?;
        let mut entries = self.layout.entries().iter();
        entries.try_for_each(|entry| each(entry, &mut |values| reader.read(&entry.spec, values)))
    }

    /// Returns whether this model is without its parameters.
    pub fn is_outline(&self) -> bool {
        self.params.len() != self.layout.len()
    }

    /// Writes config.json, masks and the weights, in Hugging Face layout, to the existing directory `dir`; every file
    /// is synced. Routers and partitions stay f32 and i32 whatever `dtype` is. The model then counts as trained. Returns the
    /// sums of the weights' files.
    ///
    /// # Errors
    /// The configuration does not describe the model's FFNs; nothing is written then. The file system refuses; the
    /// message names the file.
    pub fn save(&self, dir: &Path, dtype: Dtype) -> Result<Sums> {
        self.save_from(dir, dtype, |entry| Ok(Cow::Borrowed(&self.params[entry.range.clone()])))
    }

    /// Does as [`Model::save`] with the values that `of` returns of every tensor, in arena order.
    ///
    /// # Errors
    /// Those of [`Model::save`], and of `of`.
    ///
    /// # Panics
    /// There are more or fewer values than the tensor has.
    pub fn save_from<'v>(
        &self,
        dir: &Path,
        dtype: Dtype,
        mut of: impl FnMut(&Entry) -> Result<Cow<'v, [f32]>>,
    ) -> Result<Sums> {
        self.check_kinds()?;
        let mut infos = Vec::new();
        for entry in self.layout.entries() {
            let dtype = if entry.spec.router { Dtype::F32 } else { dtype };
            infos.push(TensorInfo { name: entry.spec.name.clone(), dtype, shape: entry.spec.stored_shape() });
        }
        for (i, order) in self.partitions.iter().flatten().enumerate() {
            infos.push(TensorInfo { name: partition_name(i), dtype: Dtype::I32, shape: vec![order.len()] });
        }
        let mut writer = model_writer(&self.config, dir, infos, DEFAULT_SHARD_BYTES)?;
        for entry in self.layout.entries() {
            let values = of(entry)?;
            match entry.spec.stored {
                Stored::AsIs => writer.write_f32(&entry.spec.name, &values)?,
                Stored::Transposed => {
                    let (rows, cols) = (entry.spec.shape[0], entry.spec.shape[1]);
                    let mut transposed = vec![0.0; values.len()];
                    crate::checkpoint::transpose(&mut transposed, &values, rows, cols);
                    writer.write_f32(&entry.spec.name, &transposed)?;
                }
            }
        }
        for (i, order) in self.partitions.iter().flatten().enumerate() {
            writer.write(&partition_name(i), bytemuck::cast_slice(order))?;
        }
        let sums = writer.sums();
        writer.finish()?;
        self.masks.iter().try_for_each(|masks| masks.save(dir))?;
        let mut config = self.config.clone();
        config.set_dtype(dtype);
        if let Some(moe) = &mut config.moe {
            moe.untrained = false;
        }
        config.save(dir)?;
        Ok(sums)
    }

    /// Checks that config.json describes every FFN as it is.
    fn check_kinds(&self) -> Result<()> {
        let Config { moe, ffn: spec, .. } = &self.config;
        for (layer, ffn) in self.ffns.iter().enumerate() {
            let described = match (ffn.kind(), moe, spec) {
                (Some(FfnKind::Dense), None, None) | (None, _, Some(_)) => true,
                (Some(FfnKind::Dsmoe(form)), Some(moe), _) => form == DsmoeForm::of_layer(moe, layer),
                (Some(FfnKind::Spec(own)), None, Some(spec)) => *own == **spec,
                _ => false,
            };
            if !described {
                return Err(Error::argument(
                    format!("the FFN of layer {layer} is not what config.json would describe"),
                    "give the FFN a kind, the same in every layer, or set the configuration's FFN spec",
                ));
            }
        }
        Ok(())
    }

    /// Returns the configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the parameter counts; pruned weights of masked linears are not activated.
    pub fn accounting(&self) -> Accounting {
        let counts = Accounting::of(&self.config);
        self.masks.as_ref().map_or(counts, |masks| counts.with_masks(masks))
    }

    /// Returns the masks of pruned linears; none where nothing is pruned.
    pub fn masks(&self) -> Option<&Masks> {
        self.masks.as_ref()
    }

    /// Sets the weights that `masks` prunes to 0, where they stay in training.
    ///
    /// # Errors
    /// A mask is of no linear of this model, or of another shape.
    pub fn set_masks(&mut self, masks: Masks) -> Result<()> {
        masks.check(&self.config)?;
        masks.apply(&mut self.params, &self.layout);
        self.masks = Some(masks);
        Ok(())
    }

    /// Sets the parameters that the masks do not keep to 0.
    pub fn apply_masks(&mut self) {
        if let Some(masks) = &self.masks {
            masks.apply(&mut self.params, &self.layout);
        }
    }

    /// Returns names, shapes and places of all parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the parameter arena.
    pub fn params(&self) -> &[f32] {
        &self.params
    }

    /// Returns the parameter arena, mutable.
    pub fn params_mut(&mut self) -> &mut [f32] {
        &mut self.params
    }

    /// Returns the number of experts per layer, the largest where layers differ; none without routers.
    pub fn num_experts(&self) -> Option<usize> {
        self.ffns.iter().filter_map(|ffn| ffn.num_experts()).max()
    }

    /// Sets the gates' threshold of every layer (the paper's table 4), here and in the files of [`Model::save`].
    ///
    /// # Errors
    /// The threshold is outside 0..=1, or the model has no gates.
    pub fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        set_threshold(&mut self.config, threshold, || {
            self.ffns.iter_mut().all(|ffn| ffn.set_threshold(threshold))
        })
    }

    /// Chooses the thresholds of every layer that leave the share `active` of the experts active, here and in the files
    /// of [`Model::save`].
    ///
    /// # Errors
    /// The model has no budgets, or `active` is outside of them.
    pub fn set_active(&mut self, active: f64) -> Result<()> {
        set_active(&mut self.config, active, |layer, logit| self.ffns[layer].set_threshold_logit(logit))
    }

    /// Lowers the number of experts that are chosen for every token, here and in the files of [`Model::save`].
    ///
    /// # Errors
    /// Their number is not fixed, or `top_k` is not in 1 to it.
    pub fn lower_top_k(&mut self, top_k: usize) -> Result<()> {
        self.config.lower_top_k(top_k)?;
        self.ffns = ffns_of(&self.config);
        Ok(())
    }

    /// Sets what the logits of each layer's gates have to exceed, until the next choice of thresholds; files keep the
    /// budgets.
    ///
    /// # Errors
    /// The model has no gates.
    ///
    /// # Panics
    /// There are not as many thresholds as layers.
    pub fn set_thresholds(&mut self, logits: &[f32]) -> Result<()> {
        assert_eq!(logits.len(), self.ffns.len(), "model: thresholds and layers");
        set_thresholds(logits, |layer, logit| self.ffns[layer].set_threshold_logit(logit))
    }

    /// Replaces the budgets, and opens the gates as the one of the share `active` says.
    ///
    /// # Errors
    /// The model has no gates; `active` is outside of the budgets.
    ///
    /// # Panics
    /// A budget has not as many thresholds as the model layers.
    pub fn set_budgets(&mut self, budgets: Vec<Budget>, active: f64) -> Result<()> {
        let layers = self.config.num_layers;
        assert!(
            budgets.iter().all(|budget| budget.thresholds.len() == layers),
            "model: thresholds of budgets"
        );
        let Some(moe) = &mut self.config.moe else { return Err(no_gates()) };
        let before = std::mem::replace(&mut moe.parts.budgets, budgets);
        let set = self.set_active(active);
        if let (Err(_), Some(moe)) = (&set, &mut self.config.moe) {
            moe.parts.budgets = before;
        }
        set
    }

    /// Returns the FFN of a layer, and its part of the arena, laid out by [`Ffn::tensors`].
    ///
    /// # Panics
    /// There is no such layer.
    pub fn ffn_mut(&mut self, layer: usize) -> (&mut dyn Ffn, &mut [f32]) {
        (&mut *self.ffns[layer], &mut self.params[self.ranges.layers[layer].ffn.clone()])
    }

    /// Returns empty routing statistics for this model; none without routers.
    pub fn new_stats(&self) -> Option<RoutingStats> {
        let experts: Option<Vec<usize>> = self.ffns.iter().map(|ffn| ffn.num_experts()).collect();
        let sizes = self.ffns.iter().map(|ffn| ffn.expert_sizes());
        Some(RoutingStats::of_layers(experts?).with_sizes(sizes))
    }
}
