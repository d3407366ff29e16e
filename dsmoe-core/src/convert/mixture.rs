//! Sparse upcycling: a dense model becomes a mixture whose experts all are its FFN (Komatsuzaki et al. 2022).
//!
//! The coefficients of a token add up to 1, so that the mixture computes what the dense model does until training makes the
//! experts differ.

use std::path::Path;

use dsmoe_kernels::rng::Rng;

use super::ConvertProgress;
use crate::accounting::Accounting;
use crate::checkpoint::{
    CONFIG_FILE, Change, Checkpoint, DEFAULT_SHARD_BYTES, Dtype, LlamaTensors, Meter, OutputDir, Progress,
    TensorInfo, TensorSource, check_llama_tensors, copy_companions, ffn_name, model_writer, open_model,
    tensor_names,
};
use crate::config::Config;
use crate::error::{Error, Result, shown};
use crate::family;
use crate::masks::Masks;

/// Options of an upcycling.
///
/// ```
/// use dsmoe_core::convert::{UpcycleOptions, UpcycleReport, upcycle};
/// # let work = tempfile::tempdir()?;
/// # let (dense, mixture) = (work.path().join("dense"), work.path().join("mixture"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let family = "mixtral".to_owned();
/// let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 0, force: false };
/// let report: UpcycleReport = upcycle(&dense, &mixture, &options, &mut |_| {})?;
/// assert!(report.activated < report.total as f64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpcycleOptions {
    /// The family of the mixture, as `model_type` names it.
    pub family: String,
    /// Experts of a layer (n).
    pub num_experts: usize,
    /// Experts that every token runs (k).
    pub top_k: usize,
    /// Seed of the routers.
    pub seed: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

/// Summary of the result.
///
/// ```
/// use dsmoe_core::convert::{UpcycleOptions, UpcycleReport, upcycle};
/// # let work = tempfile::tempdir()?;
/// # let (dense, mixture) = (work.path().join("dense"), work.path().join("mixture"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let family = "mixtral".to_owned();
/// let options = UpcycleOptions { family, num_experts: 4, top_k: 1, seed: 0, force: false };
/// let report: UpcycleReport = upcycle(&dense, &mixture, &options, &mut |_| {})?;
/// println!("a token uses {:.0} % of the parameters", 100.0 * report.activated / report.total as f64);
/// // Every expert has all neurons of the dense FFN; 4 layers have routers of 4 x 128 weights.
/// assert_eq!((report.expert_width, report.router_params), (512, 4 * 4 * 128));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpcycleReport {
    /// Neurons of an expert.
    pub expert_width: usize,
    /// All parameters.
    pub total: u64,
    /// Parameters that a token uses.
    pub activated: f64,
    /// Parameters of all routers.
    pub router_params: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// The source of a tensor of the mixture.
enum From {
    /// A tensor of the dense model.
    Tensor(String),
    /// A router: rows N(0, `initializer_range`^2).
    Router,
}

/// Makes the mixture of `options` of the dense model in `model`, in the new directory `out`, which appears when it is complete.
/// Weights keep their types; routers are f32.
///
/// # Errors
/// `model` cannot be read, is not dense, has pruned weights, or does what models of the family do not; k is not in 1..=n;
/// `out` is not empty; the file system refuses.
pub fn upcycle(
    model: &Path,
    out: &Path,
    options: &UpcycleOptions,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<UpcycleReport> {
    let UpcycleOptions { num_experts, top_k, seed, force, .. } = *options;
    let config = Config::load(model)?;
    let family = family::find(&options.family).ok_or_else(|| {
        let problem = format!("unknown family of experts {:?}", shown(&options.family));
        Error::argument(problem, "use mixtral, qwen3_moe or olmoe")
    })?;
    let mixture = config.to_mixture(&model.join(CONFIG_FILE), family, [num_experts, top_k])?;
    let checkpoint = open_model(model, &config)?;
    let names = check_llama_tensors(&config, &checkpoint)?;
    if Masks::load(model)?.is_some() {
        let problem = "has pruned weights, whose masks would not fit the experts";
        return Err(Error::path(model, problem, "use the model before it was pruned"));
    }
    let tensors = sources(&config, &mixture, &checkpoint, names)?;
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let bytes = infos.iter().map(TensorInfo::len_bytes).sum();

    let output = OutputDir::create_from(model, out, force)?;
    let mut report = |at: Progress| {
        progress(ConvertProgress { stage: "writing", done: at.done_bytes, total: at.total_bytes });
    };
    let mut meter = Meter::new(bytes, &mut report);
    let mut writer = model_writer(&mixture, output.path(), infos, DEFAULT_SHARD_BYTES)?;
    let mut source = TensorSource::new(&checkpoint);
    for (stream, (info, from)) in (0..).zip(&tensors) {
        match from {
            From::Tensor(name) => {
                writer.begin(&info.name)?;
                source.copy(name, Change::None, |bytes| {
                    meter.add(bytes.len());
                    writer.write_chunk(bytes)
                })?;
            }
            From::Router => {
                let mut rows = vec![0.0; info.shape.iter().product()];
                Rng::new(seed, stream).fill_normal(&mut rows, config.initializer_range as f32);
                writer.write_f32(&info.name, &rows)?;
                meter.add(info.len_bytes() as usize);
            }
        }
    }
    writer.finish()?;
    copy_companions(model, output.path())?;
    mixture.save(output.path())?;
    output.commit()?;
    let counts = Accounting::of(&mixture);
    Ok(UpcycleReport {
        expert_width: config.intermediate,
        total: counts.total,
        activated: counts.activated(0.0),
        router_params: counts.router,
        bytes,
    })
}

/// Returns the tensors of the mixture, in the order of the forward pass, with their sources in the dense model.
fn sources(
    dense: &Config,
    mixture: &Config,
    checkpoint: &Checkpoint,
    names: LlamaTensors,
) -> Result<Vec<(TensorInfo, From)>> {
    let layers: Vec<String> = (0..dense.num_layers).map(|layer| ffn_name(layer, "")).collect();
    let source = |(name, shape): (String, Vec<usize>)| {
        let of_ffn = layers.iter().find_map(|ffn| Some((ffn, name.strip_prefix(ffn.as_str())?)));
        let dense_name = match of_ffn {
            None => names.stored_name(&name).to_owned(),
            Some((ffn, rest)) => match rest.strip_prefix("experts.").and_then(|rest| rest.split_once('.')) {
                Some((_, projection)) => format!("{ffn}{projection}"),
                None => {
                    return Ok((TensorInfo { name, dtype: Dtype::F32, shape }, From::Router));
                }
            },
        };
        let dtype = checkpoint.need_float(&dense_name)?.dtype;
        Ok((TensorInfo { name, dtype, shape }, From::Tensor(dense_name)))
    };
    tensor_names(mixture).map(source).collect()
}
