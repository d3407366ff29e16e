//! Exports a model directory as a plain dense model, for transformers, or as a copy, streaming.

mod card;
mod dense;
mod remote;

use std::path::Path;
use std::str::FromStr;

pub use card::add_perplexity;
pub use dense::DenseForm;

use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, DEFAULT_SHARD_BYTES, Dtype, Meter, OutputDir, Progress, TensorInfo,
    TensorSource, check_llama_tensors, copy_companions, decode, encode, in_stored_order, is_router,
    is_too_large, model_writer, open_model, too_large,
};
use crate::config::{Config, RopeScaling};
use crate::convert::{ffn_change, masks_of_other_order, source_infos};
use crate::error::{Error, Result, shown};
use crate::masks::Masks;
use card::Card;
use dense::{Dense, scale_columns};

/// Form of an export.
///
/// ```
/// use dsmoe_core::export::{ExportAs, ExportOptions};
///
/// let form: ExportAs = "hf".parse()?;
/// assert_eq!(ExportOptions::new(form).form, ExportAs::Transformers);
/// // The message names the forms.
/// let error = "onnx".parse::<ExportAs>().unwrap_err().to_string();
/// assert!(error.ends_with("use dense, native or hf"), "{error}");
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportAs {
    /// A plain model of its family: neurons in their original order, no routers.
    Dense,
    /// A copy of the model.
    Native,
    /// A copy that transformers loads, with the code of the model where transformers has none.
    Transformers,
}

impl FromStr for ExportAs {
    type Err = Error;

    /// Parses `dense`, `native` or `hf`.
    fn from_str(s: &str) -> Result<ExportAs> {
        match s {
            "dense" => Ok(ExportAs::Dense),
            "native" => Ok(ExportAs::Native),
            "hf" => Ok(ExportAs::Transformers),
            _ => Err(Error::argument(
                format!("unknown export format `{}`", shown(s)),
                "use dense, native or hf",
            )),
        }
    }
}

/// Options of an export.
///
/// ```
/// use dsmoe_core::convert::{ConvertOptions, convert};
/// use dsmoe_core::export::{DenseForm, ExportAs, ExportOptions, ExportReport, Measured, export};
/// # let work = tempfile::tempdir()?;
/// # let [dense, moe, back, hf] = ["dense", "moe", "back", "hf"].map(|name| work.path().join(name));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
/// # convert(&dense, &moe, &ConvertOptions::new(8), &mut |_| {})?;
///
/// // Without training, a converted model is the dense one in another order.
/// let report: ExportReport = export(&moe, &back, &ExportOptions::new(ExportAs::Dense), &mut |_| {})?;
/// assert_eq!(report.dense, Some(DenseForm::Source));
/// let mut options = ExportOptions::new(ExportAs::Transformers);
/// options.measured.push(Measured { text: "held-out text".into(), perplexity: 31.5 });
/// export(&moe, &hf, &options, &mut |_| {})?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// The form.
    pub form: ExportAs,
    /// Type of the weights; routers stay as they are. None keeps the types.
    pub dtype: Option<Dtype>,
    /// Mean factors of the experts `[layers][experts]`, to be folded into `down_proj` by a dense export.
    pub fold: Option<Vec<Vec<f64>>>,
    /// The budget that the copy opens its gates for; none keeps the one of the model.
    pub active: Option<f64>,
    /// Results for the model card.
    pub measured: Vec<Measured>,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

impl ExportOptions {
    /// Keeps the types, folds nothing and replaces nothing.
    pub fn new(form: ExportAs) -> ExportOptions {
        ExportOptions { form, dtype: None, fold: None, active: None, measured: Vec::new(), force: false }
    }
}

/// A measured perplexity.
///
/// ```
/// use dsmoe_core::export::{ExportAs, ExportOptions, Measured, export};
/// # let work = tempfile::tempdir()?;
/// # let (model, out) = (work.path().join("model"), work.path().join("out"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &model, &Default::default(), &mut |_| {})?;
///
/// let mut options = ExportOptions::new(ExportAs::Native);
/// options.measured.push(Measured { text: "WikiText-2, test".to_owned(), perplexity: 31.5 });
/// export(&model, &out, &options, &mut |_| {})?;
/// let card = std::fs::read_to_string(out.join("README.md"))?;
/// assert!(card.contains("WikiText-2, test") && card.contains("31.5"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The text and the model that it was measured with.
    pub text: String,
    /// The perplexity.
    pub perplexity: f64,
}

/// Summary of the result.
///
/// ```
/// use dsmoe_core::checkpoint::Dtype;
/// use dsmoe_core::export::{ExportAs, ExportOptions, ExportReport, export};
/// # let work = tempfile::tempdir()?;
/// # let (model, out) = (work.path().join("model"), work.path().join("out"));
/// # let config = dsmoe_core::init::preset("tiny")?;
/// # dsmoe_core::init::init(&config, &model, &Default::default(), &mut |_| {})?;
///
/// let options = ExportOptions { dtype: Some(Dtype::BF16), ..ExportOptions::new(ExportAs::Native) };
/// let ExportReport { tensors, bytes, dense, .. } = export(&model, &out, &options, &mut |_| {})?;
/// assert_eq!(tensors, 2 + 4 * 9); // embedding and last norm; 7 linears and 2 norms in each layer
/// assert_eq!(bytes, 2 * dsmoe_core::accounting::Accounting::of(&config).total);
/// assert_eq!(dense, None); // it is no dense export of a sparse model
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The relation of a dense export to the model.
    pub dense: Option<DenseForm>,
    /// False if the replaced directory had a model card that somebody wrote, which is kept.
    pub card_written: bool,
}

/// Refuses a Phi-3 model whose heads are not a part of its hidden size beside longrope, as pruned channels leave it: the
/// configuration of transformers derives the number of factors from the hidden size alone.
fn check_longrope(model: &Path, config: &Config) -> Result<()> {
    let Some(rope) = config.architecture.ropes.first() else { return Ok(()) };
    let derived = config.hidden / config.num_heads * rope.width / config.head_dim;
    let is_longrope = matches!(rope.scaling, RopeScaling::LongRope { .. });
    if config.family().fused && config.is_dense() && is_longrope && derived / 2 != rope.width / 2 {
        let problem = format!(
            "is {}, from which transformers derives {} longrope factors and not {}",
            config.hidden,
            derived / 2,
            rope.width / 2
        );
        let help = "export it {as} native, or prune blocks in place of channels";
        return Err(Error::field(&model.join(CONFIG_FILE), "hidden_size", problem, help));
    }
    Ok(())
}

/// Refuses experts that transformers does not run: those of a mixture that its family's own format does not hold, and of
/// DSMoE and FFNs of another kind different numbers of them in layers, or gates that share them, which the code for transformers does
/// not know.
fn check_experts(model: &Path, config: &Config) -> Result<()> {
    if let Some(spec) =
        config.ffn.as_ref().filter(|spec| spec.as_mixture().is_none() && spec.blocks(0).is_none())
    {
        let problem = format!("is {:?}, which transformers does not know", spec.kind());
        return Err(Error::field(&model.join(CONFIG_FILE), "ffn.type", problem, "export it {as} native"));
    }
    if config.mixture().is_none() {
        let has_map = match &config.moe {
            Some(moe) => moe.parts.maps.is_some(),
            None => config.ffn.as_ref().is_some_and(|spec| spec.settings().contains_key("expert_map")),
        };
        let is_even = (0..config.num_layers).all(|i| config.layer_experts(i) == config.num_experts());
        let [key, says] = match (has_map, is_even) {
            (true, _) => ["expert_map", "gates share experts"],
            (false, false) => ["experts_per_layer", "layers have different numbers of experts"],
            (false, true) => return Ok(()),
        };
        let object = if config.moe.is_some() { "dsmoe" } else { "ffn" };
        let problem = format!("says that {says}, which the code for transformers does not know");
        let field = format!("{object}.{key}");
        return Err(Error::field(&model.join(CONFIG_FILE), field, problem, "export it {as} native"));
    }
    if config.model_type() != "dsmoe" {
        return Ok(());
    }
    let problem = "is \"mixture\", with gates that share experts or layers of different numbers of experts, which \
                   transformers does not know";
    Err(Error::field(&model.join(CONFIG_FILE), "ffn.type", problem, "export it {as} native"))
}

/// Exports the model in `model` to the new directory `out`, which appears when it is complete. A dense export of a
/// model that was not trained has the bytes of the original.
///
/// # Errors
/// `model` cannot be read or is not what its configuration says; a dense export of a model without experts, or of one
/// whose gates cannot be left out; factors to be folded in another form or of another model; the dtype is not a float;
/// a weight is not finite or too large for the dtype; `out` is not empty; the file system refuses.
pub fn export(
    model: &Path,
    out: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport> {
    let &ExportOptions { form, dtype, ref fold, active, ref measured, force } = options;
    if let Some(dtype) = dtype.filter(|dtype| !dtype.is_float()) {
        return Err(Error::argument(format!("dtype {dtype} is not for weights"), "use bf16, f16 or f32"));
    }
    if fold.is_some() && form != ExportAs::Dense {
        return Err(Error::argument("only a dense export folds gates", "export it {as} dense"));
    }
    let mut config = Config::load(model)?;
    if let Some(active) = active {
        choose_budget(&mut config, active, form)?;
    }
    if config.thresholds.is_some() && form != ExportAs::Native {
        let problem = "is present: the weights are those of the dense model that it was made from, and only this program \
                       skips inputs";
        let help = "use that model, or export it {as} native";
        return Err(Error::field(&model.join(CONFIG_FILE), "activation_thresholds", problem, help));
    }
    if form == ExportAs::Transformers {
        check_longrope(model, &config)?;
        check_experts(model, &config)?;
    }
    let checkpoint = open_model(model, &config)?;
    check_llama_tensors(&config, &checkpoint)?;
    let dense = match form {
        ExportAs::Dense => Some(Dense::new(model, &config, &checkpoint, fold.as_deref())?),
        ExportAs::Native | ExportAs::Transformers => None,
    };
    let masks = Masks::read(model, &config)?;
    if masks.is_some() && dense.as_ref().is_some_and(|dense| dense.orders.iter().any(Option::is_some)) {
        return Err(masks_of_other_order(model, "export it {as} native"));
    }

    let output = OutputDir::create_from(model, out, force)?;
    let mut written = config.clone();
    if form == ExportAs::Dense {
        (written.moe, written.ffn) = (None, None);
    }
    if let Some(dtype) = dtype {
        written.set_dtype(dtype);
    }
    let tensors = Tensors { checkpoint: &checkpoint, written: &written, dense: dense.as_ref(), dtype };
    let (tensors, bytes) = tensors.write(output.path(), progress)?;
    masks.iter().try_for_each(|masks| masks.save(output.path()))?;
    copy_companions(model, output.path())?;
    match form {
        ExportAs::Dense | ExportAs::Native => written.save(output.path())?,
        ExportAs::Transformers => remote::write(&written, output.path())?,
    }
    let name = out.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let dense = dense.map(|dense| dense.form);
    let card = Card { name: &name, config: &config, masks: masks.as_ref(), form, dense, measured };
    let card_written = card::write(&card, output.path(), out)?;
    output.commit()?;
    Ok(ExportReport { tensors, bytes, dense, card_written })
}

/// Makes the budget of the share `active` the one that the model opens its gates for.
fn choose_budget(config: &mut Config, active: f64, form: ExportAs) -> Result<()> {
    let help = "export it {as} native or hf";
    match &mut config.moe {
        Some(moe) if form != ExportAs::Dense => {
            moe.thresholds_for(active)?;
            moe.active_target = Some(active);
            Ok(())
        }
        Some(_) => Err(Error::argument("a dense export has no gates and no budget", help)),
        None => Err(Error::argument("this model has no gates and no budget", "leave the share out")),
    }
}

/// The tensors of an export.
struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    /// The configuration of the export.
    written: &'a Config,
    dense: Option<&'a Dense>,
    dtype: Option<Dtype>,
}

impl Tensors<'_> {
    /// Writes the tensors, and returns their number and bytes.
    fn write(&self, dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(usize, u64)> {
        let sources: Vec<TensorInfo> = source_infos(self.checkpoint)
            .into_iter()
            .filter(|info| self.dense.is_none() || !is_router(&info.name))
            .collect();
        let sources = in_stored_order(self.written, sources);
        let infos: Vec<TensorInfo> =
            sources.iter().map(|info| TensorInfo { dtype: self.cast(info), ..info.clone() }).collect();
        let (count, bytes) = (infos.len(), infos.iter().map(TensorInfo::len_bytes).sum());
        let mut meter = Meter::new(bytes, progress);
        let mut writer = model_writer(self.written, dir, infos, DEFAULT_SHARD_BYTES)?;
        let mut source = TensorSource::new(self.checkpoint);
        let (mut values, mut casted) = (Vec::new(), Vec::new());
        for info in &sources {
            writer.begin(&info.name)?;
            let (from, to) = (info.dtype, self.cast(info));
            let change = ffn_change(&info.name, |layer| self.dense?.orders.get(layer)?.as_deref());
            let factors = self.dense.and_then(|dense| dense.factors(&info.name));
            source.copy(&info.name, change, |bytes| {
                if from == to && factors.is_none() {
                    meter.add(bytes.len());
                    return writer.write_chunk(bytes);
                }
                values.resize(bytes.len() / from.size(), 0.0);
                decode(&mut values, bytes, from);
                if let Some(factors) = factors {
                    scale_columns(&mut values, factors);
                }
                if let Some(value) = is_too_large(&values, to) {
                    let (problem, help) = too_large(value, to);
                    return Err(Error::tensor(self.checkpoint.path(), &info.name, problem, help));
                }
                casted.resize(values.len() * to.size(), 0);
                encode(&mut casted, &values, to);
                meter.add(casted.len());
                writer.write_chunk(&casted)
            })?;
        }
        writer.finish()?;
        Ok((count, bytes))
    }

    fn cast(&self, info: &TensorInfo) -> Dtype {
        if is_router(&info.name) { info.dtype } else { self.dtype.unwrap_or(info.dtype) }
    }
}
