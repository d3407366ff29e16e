//! Converts a dense LLaMA directory to a DSMoE directory, streaming.

mod calibrated;
mod mixture;
pub mod start;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

pub use calibrated::Calibration;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, alone};
use dsmoe_router::{RouterConfig, RouterInit, RouterValues, router_weights};
pub use mixture::{UpcycleOptions, UpcycleReport, upcycle};
use ndarray::Array2;

use crate::accounting::Accounting;
use crate::checkpoint::{
    Change, Checkpoint, Dtype, LayerNorm, Meter, OutputDir, Progress, TensorInfo, TensorSource,
    check_llama_tensors, copy_companions, is_ignored, open_model, partition_name, router_bias_name,
    router_name,
};
use crate::config::{CONFIG_FILE, Config, MoeConfig, MoeParts, PartitionKind};
use crate::error::{Error, Result};
use crate::masks::{MASKS_FILE, Masks};
use crate::partition::{Partition, check_divisible};

/// Assignment of neurons to experts.
///
/// ```
/// use dsmoe_core::convert::PartitionSpec;
///
/// assert_eq!("clusters".parse::<PartitionSpec>()?, PartitionSpec::Clusters);
/// // Any other word is the path of a file.
/// let file: PartitionSpec = "experts.json".parse()?;
/// assert_eq!(file, PartitionSpec::File("experts.json".into()));
/// assert_eq!(file.to_string(), "experts.json");
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionSpec {
    /// Blocks of consecutive neurons, as in the paper (eq. 6).
    Contiguous,
    /// A random partition by [`ConvertOptions::seed`], different in every layer.
    Random,
    /// Similar neurons: balanced k-means on the rows of `gate_proj`.
    Clusters,
    /// The partition of a JSON file, see [`Partition::read_file`].
    File(PathBuf),
    /// The neurons of every layer, one expert after the other.
    Orders(Vec<Vec<u32>>),
}

impl FromStr for PartitionSpec {
    type Err = Error;

    /// Parses `contiguous`, `random`, `clusters`, or else a path.
    fn from_str(s: &str) -> Result<PartitionSpec> {
        Ok(match s {
            "contiguous" => PartitionSpec::Contiguous,
            "random" => PartitionSpec::Random,
            "clusters" => PartitionSpec::Clusters,
            path => PartitionSpec::File(PathBuf::from(path)),
        })
    }
}

impl fmt::Display for PartitionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PartitionSpec::Contiguous => f.write_str("contiguous"),
            PartitionSpec::Random => f.write_str("random"),
            PartitionSpec::Clusters => f.write_str("clusters"),
            PartitionSpec::File(path) => write!(f, "{}", path.display()),
            PartitionSpec::Orders(_) => f.write_str("given"),
        }
    }
}

/// Options of a conversion.
///
/// ```
/// use dsmoe_core::convert::{
///     ConvertOptions, ConvertProgress, ConvertReport, PartitionSpec, RouterStart, convert,
/// };
/// use dsmoe_router::RouterInit;
/// # let work = tempfile::tempdir()?;
/// # let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let options = ConvertOptions {
///     partition: PartitionSpec::Clusters,
///     routers: RouterStart::Init(RouterInit::Centroid),
///     ..ConvertOptions::new(8)
/// };
/// let report: ConvertReport = convert(&dense, &moe, &options, &mut |progress: ConvertProgress| {
///     assert!(progress.done <= progress.total);
/// })?;
/// assert_eq!(report.num_experts, 8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertOptions {
    /// Settings of the routers, with the number of experts.
    pub router: RouterConfig,
    /// Assignment of neurons to experts.
    pub partition: PartitionSpec,
    /// The first weights of routers.
    pub routers: RouterStart,
    /// The share of experts that training has to reach, stored with the model.
    pub active_target: Option<f64>,
    /// Seed of router weights and of a random partition.
    pub seed: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

impl ConvertOptions {
    /// Contiguous experts with the paper's router.
    pub fn new(num_experts: usize) -> ConvertOptions {
        ConvertOptions {
            router: RouterConfig::new(num_experts),
            partition: PartitionSpec::Contiguous,
            routers: RouterStart::Init(RouterInit::Random),
            active_target: None,
            seed: 0,
            force: false,
        }
    }
}

/// The first weights of routers.
///
/// ```
/// use dsmoe_core::convert::{ConvertOptions, RouterStart, convert};
/// use dsmoe_router::{RouterInit, RouterValues};
/// # let work = tempfile::tempdir()?;
/// # let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let with = |routers| ConvertOptions { routers, ..ConvertOptions::new(8) };
/// // One router where there are four layers is refused; a start that reads no text always fits.
/// let one = RouterValues { weight: vec![0.0; 8 * 128], bias: vec![1.0; 8] };
/// assert!(convert(&dense, &moe, &with(RouterStart::Values(vec![one])), &mut |_| {}).is_err());
/// convert(&dense, &moe, &with(RouterStart::Init(RouterInit::Open)), &mut |_| {})?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum RouterStart {
    /// A start that reads no text.
    Init(RouterInit),
    /// Fitted to text, to open the experts whose outputs are large.
    Calibrated(Calibration),
    /// The routers of all layers.
    Values(Vec<RouterValues>),
}

/// The progress of a conversion.
///
/// ```
/// use dsmoe_core::convert::{ConvertOptions, ConvertProgress, convert};
/// # let work = tempfile::tempdir()?;
/// # let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let mut last = None;
/// convert(&dense, &moe, &ConvertOptions::new(8), &mut |progress: ConvertProgress| {
///     println!("{}: {} of {}", progress.stage, progress.done, progress.total);
///     last = Some(progress);
/// })?;
/// assert!(last.is_some_and(|last| last.stage == "writing" && last.done == last.total));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertProgress {
    /// The current stage.
    pub stage: &'static str,
    /// The finished parts of the stage: layers, or bytes when `stage` is `writing`.
    pub done: u64,
    /// All parts of the stage.
    pub total: u64,
}

/// Summary of the result.
///
/// ```
/// use dsmoe_core::convert::{ConvertOptions, ConvertReport, convert};
/// # let work = tempfile::tempdir()?;
/// # let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let report: ConvertReport = convert(&dense, &moe, &ConvertOptions::new(8), &mut |_| {})?;
/// let ConvertReport { num_layers, num_experts, expert_width, router_params, .. } = report;
/// assert_eq!((num_layers, num_experts, expert_width), (4, 8, 64));
/// assert_eq!(router_params, 4 * 8 * 128);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertReport {
    /// Decoder layers.
    pub num_layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// Neurons per expert, in the widest layer.
    pub expert_width: usize,
    /// Parameters of all routers, new in this model.
    pub router_params: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Converts the dense LLaMA in `model` to a DSMoE model in the new directory `out`. Weights keep their types and
/// names; routers are f32. The directory appears when it is complete.
///
/// # Errors
/// `model` cannot be read, is no dense LLaMA or cannot be cut into that many experts; an option is out of range;
/// `out` is not empty; the file system refuses.
pub fn convert(
    model: &Path,
    out: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<ConvertReport> {
    convert_on(alone(), model, out, options, progress)
}

/// Does as [`convert`] on the processes of `comm`, which divide the text of a calibration. The first one writes the result of a
/// single process.
///
/// # Errors
/// Those of [`convert`]; an error of another process.
pub fn convert_on(
    comm: &Arc<dyn Communicator>,
    model: &Path,
    out: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<ConvertReport> {
    let mut config = Config::load(model)?;
    let config_path = model.join(CONFIG_FILE);
    if !config.is_dense() {
        let help = "use a dense model, such as the one that this was made from";
        let problem = format!("is already {}", config.model_type());
        return Err(Error::field(&config_path, "model_type", problem, help));
    }
    options.router.validate()?;
    let num_experts = options.router.num_experts;
    for shape in config.layers() {
        check_divisible(shape.intermediate, num_experts, Some(&config_path))?;
    }
    let checkpoint = open_model(model, &config)?;
    check_llama_tensors(&config, &checkpoint)?;
    let partitions = partitions(model, &config, options, progress)?;
    let permuted = partitions.iter().any(|partition| partition.order().is_some());
    let masks = Masks::read(model, &config)?;
    if permuted && masks.is_some() {
        return Err(masks_of_other_order(model, "use a contiguous {partition}"));
    }
    // Options that cannot work are refused before anything is written.
    let fitted;
    let (init, routers) = match &options.routers {
        RouterStart::Init(init) => {
            if *init != RouterInit::Centroid {
                router_weights(init, num_experts, 1, options.seed, 0, None)?;
            }
            (*init, None)
        }
        RouterStart::Values(routers) => {
            let fits = |one: &RouterValues| {
                one.weight.len() == num_experts * config.hidden && one.bias.len() == num_experts
            };
            if routers.len() != config.num_layers || !routers.iter().all(fits) {
                return Err(Error::argument(
                    format!(
                        "routers are not of {} layers, {num_experts} experts and {} inputs",
                        config.num_layers, config.hidden
                    ),
                    "make them for this model",
                ));
            }
            (RouterInit::Random, Some(routers))
        }
        RouterStart::Calibrated(calibration) => {
            fitted = calibrated::routers(comm, model, &partitions, calibration, progress)?;
            (RouterInit::Random, Some(&fitted))
        }
    };
    config.moe = Some(MoeConfig {
        router: options.router.clone(),
        partition: if permuted { PartitionKind::Permuted } else { PartitionKind::Contiguous },
        router_bias: routers.is_some() || init.has_bias(),
        active_target: options.active_target,
        untrained: true,
        parts: MoeParts::default(),
    });

    let output = OutputDir::create_on(comm, model, out, options.force)?;
    let mut infos = source_infos(&checkpoint);
    let num_copied = infos.len();
    infos.extend(new_infos(&config));
    let bytes = infos.iter().map(TensorInfo::len_bytes).sum();
    let mut report = |at: Progress| {
        progress(ConvertProgress { stage: "writing", done: at.done_bytes, total: at.total_bytes });
    };
    let mut meter = Meter::new(bytes, &mut report);
    let copied: Vec<String> = infos[..num_copied].iter().map(|info| info.name.clone()).collect();
    let mut writer = output.writer(infos)?;
    let mut centroids = match init {
        RouterInit::Centroid => Some(Centroids::new(&config, num_experts)),
        _ => None,
    };
    let mut source = TensorSource::new(&checkpoint);
    for name in &copied {
        writer.begin(name)?;
        let change = ffn_change(name, |layer| partitions[layer].order());
        let mut tap = centroids.as_mut().and_then(|centroids| centroids.tap(name, &checkpoint));
        source.copy(name, change, |bytes| {
            if let Some(tap) = &mut tap {
                tap.add(bytes);
            }
            meter.add(bytes.len());
            writer.write_chunk(bytes)
        })?;
    }
    for (layer, partition) in partitions.iter().enumerate() {
        let (weight, bias) = match routers {
            Some(routers) => (routers[layer].weight.clone(), Some(routers[layer].bias.clone())),
            None => {
                let means = centroids.as_ref().map(|centroids| centroids.means(layer));
                let view = means.as_ref().map(|means| means.view());
                let (mut weight, bias) =
                    router_weights(&init, num_experts, config.hidden, options.seed, layer, view)?;
                if means.is_some() {
                    scale_to_norm(&mut weight, layer, &config, &checkpoint)?;
                }
                (weight.iter().copied().collect(), bias.map(|bias| bias.to_vec()))
            }
        };
        writer.write_f32(&router_name(layer), &weight)?;
        meter.add(4 * weight.len());
        if let Some(bias) = bias {
            writer.write_f32(&router_bias_name(layer), &bias)?;
            meter.add(4 * bias.len());
        }
        if permuted {
            let order: Vec<u8> = match partition.order() {
                Some(order) => order.iter().flat_map(|neuron| neuron.to_le_bytes()).collect(),
                None => (0..config.layer(layer).intermediate as u32).flat_map(u32::to_le_bytes).collect(),
            };
            writer.write(&partition_name(layer), &order)?;
            meter.add(order.len());
        }
    }
    writer.finish()?;
    output.commit_with(|dir| {
        masks.iter().try_for_each(|masks| masks.save(dir))?;
        copy_companions(model, dir)?;
        config.save(dir)
    })?;
    let counts = Accounting::of(&config);
    Ok(ConvertReport {
        num_layers: config.num_layers,
        num_experts,
        expert_width: config.intermediate / num_experts,
        router_params: counts.router,
        bytes,
    })
}

/// Makes the error for masks of `model` that do not fit a new order of its neurons.
pub(crate) fn masks_of_other_order(model: &Path, help: &'static str) -> Error {
    let problem = "masks neurons in the order they now have, which would change".to_owned();
    Error::path(&model.join(MASKS_FILE), problem, help)
}

fn partitions(
    model: &Path,
    config: &Config,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<Vec<Partition>> {
    let experts = options.router.num_experts;
    let widths = config.layers().map(|shape| shape.intermediate);
    match &options.partition {
        PartitionSpec::Contiguous => widths.map(|width| Partition::contiguous(width, experts)).collect(),
        PartitionSpec::Random => widths
            .enumerate()
            .map(|(layer, width)| Partition::random(width, experts, options.seed, layer))
            .collect(),
        PartitionSpec::Clusters => calibrated::partitions(model, experts, options.seed, progress),
        PartitionSpec::Orders(orders) if orders.len() != config.num_layers => Err(Error::argument(
            format!("{} orders of neurons for {} layers", orders.len(), config.num_layers),
            "give one for each",
        )),
        PartitionSpec::Orders(orders) => widths
            .zip(orders)
            .map(|(width, order)| {
                let width_of_one = order.len().div_ceil(experts).max(1);
                let lists: Vec<Vec<u32>> = order.chunks(width_of_one).map(<[u32]>::to_vec).collect();
                Partition::from_experts(width, &lists)
            })
            .collect(),
        PartitionSpec::File(path) if !config.is_even() => {
            let problem = "lists neurons of layers of one width, and this model's layers differ";
            Err(Error::path(path, problem, "use a contiguous or random {partition}"))
        }
        PartitionSpec::File(path) => {
            Partition::read_file(path, config.num_layers, config.intermediate, experts)
        }
    }
}

/// Returns all tensors of a checkpoint that are worth keeping, in the order they lie on disk.
pub fn source_infos(checkpoint: &Checkpoint) -> Vec<TensorInfo> {
    let mut tensors: Vec<_> = checkpoint
        .names()
        .filter(|name| !is_ignored(name))
        .filter_map(|name| checkpoint.tensor(name).map(|view| (name, view)))
        .collect();
    tensors.sort_by_key(|(_, view)| (view.file, view.offset));
    let info = |(name, view): (&str, &crate::checkpoint::TensorView)| TensorInfo {
        name: name.to_owned(),
        dtype: view.dtype,
        shape: view.shape.clone(),
    };
    tensors.into_iter().map(info).collect()
}

/// Returns the tensors a conversion adds, layer by layer.
fn new_infos(config: &Config) -> Vec<TensorInfo> {
    let Some(moe) = &config.moe else { return Vec::new() };
    let num_experts = moe.router.num_experts;
    let mut infos = Vec::new();
    for layer in 0..config.num_layers {
        let mut push = |name, dtype, shape| infos.push(TensorInfo { name, dtype, shape });
        push(router_name(layer), Dtype::F32, vec![num_experts, config.hidden]);
        if moe.router_bias {
            push(router_bias_name(layer), Dtype::F32, vec![num_experts]);
        }
        if moe.partition == PartitionKind::Permuted {
            push(partition_name(layer), Dtype::I32, vec![config.layer(layer).intermediate]);
        }
    }
    infos
}

/// Returns the change of the tensor `name` under a permutation of neurons, given by layer.
pub fn ffn_change<'a>(name: &str, order: impl Fn(usize) -> Option<&'a [u32]>) -> Change<'a> {
    let Some((layer, projection)) = ffn_tensor(name) else { return Change::None };
    match (order(layer), projection) {
        (Some(order), "gate_proj.weight" | "up_proj.weight") => Change::Rows(order),
        // A bias is one row, with an entry for every neuron.
        (Some(order), "down_proj.weight" | "gate_proj.bias" | "up_proj.bias") => Change::Cols(order),
        _ => Change::None,
    }
}

/// Returns the layer and the name within it of an FFN tensor.
fn ffn_tensor(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.")?;
    Some((layer.parse().ok()?, rest))
}

/// Means of the `gate_proj` rows of every expert, gathered while they are copied.
struct Centroids {
    /// Neurons of an expert, per layer.
    widths: Vec<usize>,
    hidden: usize,
    num_experts: usize,
    /// Per layer `[num_experts, hidden]`.
    sums: Vec<Vec<f64>>,
}

/// The rows of one layer's `gate_proj` on their way.
struct Tap<'a> {
    sums: &'a mut [f64],
    row: usize,
    width: usize,
    hidden: usize,
    dtype: Dtype,
    values: Buf,
}

impl Centroids {
    fn new(config: &Config, num_experts: usize) -> Centroids {
        let sums = vec![vec![0.0; num_experts * config.hidden]; config.num_layers];
        let widths = config.layers().map(|shape| shape.intermediate / num_experts).collect();
        Centroids { widths, hidden: config.hidden, num_experts, sums }
    }

    fn tap(&mut self, name: &str, checkpoint: &Checkpoint) -> Option<Tap<'_>> {
        let (layer, "gate_proj.weight") = ffn_tensor(name)? else { return None };
        let dtype = checkpoint.tensor(name)?.dtype;
        let sums = self.sums.get_mut(layer)?;
        let (width, hidden) = (self.widths[layer], self.hidden);
        Some(Tap { sums, row: 0, width, hidden, dtype, values: Buf::default() })
    }

    /// Returns the mean row of every expert of a layer, `[num_experts, hidden]`.
    fn means(&self, layer: usize) -> Array2<f32> {
        Array2::from_shape_fn((self.num_experts, self.hidden), |(expert, i)| {
            (self.sums[layer][expert * self.hidden + i] / self.widths[layer] as f64) as f32
        })
    }
}

/// Scales router rows to logits of standard deviation about 1: the router's input is of root mean square 1 only before
/// the norm's weight. Where the FFN has no norm before it, the input's scale is not known from the weights, and 1 is
/// taken for it.
fn scale_to_norm(
    weight: &mut Array2<f32>,
    layer: usize,
    config: &Config,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let mut norm = vec![1.0; weight.ncols()];
    if let Some(name) = LayerNorm::BeforeFfn.name(config.architecture.norms, layer) {
        checkpoint.read_f32(&name, &mut norm)?;
        norm.iter_mut().for_each(|weight| *weight += config.architecture.norm_offset);
    }
    for (expert, mut row) in weight.outer_iter_mut().enumerate() {
        let variance: f64 = row.iter().zip(&norm).map(|(w, n)| f64::from(w * n).powi(2)).sum();
        let std = variance.sqrt();
        if !(std.is_finite() && std > 0.0) {
            return Err(dsmoe_router::Error::BadCentroid { expert, layer }.into());
        }
        row.mapv_inplace(|w| (f64::from(w) / std) as f32);
    }
    Ok(())
}

impl Tap<'_> {
    fn add(&mut self, bytes: &[u8]) {
        self.values.resize(bytes.len() / self.dtype.size());
        crate::checkpoint::decode(&mut self.values, bytes, self.dtype);
        for row in self.values.chunks_exact(self.hidden) {
            let expert = self.row / self.width;
            let sums = &mut self.sums[expert * self.hidden..][..self.hidden];
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += f64::from(x);
            }
            self.row += 1;
        }
    }
}
