//! Exports a model directory as a plain LLaMA directory or a copy, streaming.

use std::path::Path;
use std::str::FromStr;

use crate::checkpoint::{
    DEFAULT_SHARD_BYTES, Dtype, Meter, OutputDir, Progress, TensorInfo, TensorSource, check_llama_tensors,
    copy_companions, decode, encode, in_stored_order, is_router, is_too_large, model_writer, open_model,
    read_partitions,
};
use crate::config::{CONFIG_FILE, Config};
use crate::convert::{ffn_change, masks_of_other_order, source_infos};
use crate::error::{Error, Result, shown};
use crate::masks::Masks;

/// Form of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportAs {
    /// A plain LLaMA: neurons in their original order, no routers.
    Dense,
    /// A copy of the model.
    Native,
}

impl FromStr for ExportAs {
    type Err = Error;

    /// Parses `dense` or `native`.
    fn from_str(s: &str) -> Result<ExportAs> {
        match s {
            "dense" => Ok(ExportAs::Dense),
            "native" => Ok(ExportAs::Native),
            _ => Err(Error::argument(format!("unknown export format `{}`", shown(s)), "use dense or native")),
        }
    }
}

/// Summary of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Exports the model in `model` to the new directory `out`, which appears when it is complete. Weights keep their
/// types unless `dtype` is given; routers stay as they are. A dense export of a model that was not trained has the
/// bytes of the original.
///
/// # Errors
/// `model` cannot be read or is not what its configuration says; a dense export of a dense model; `dtype` is not a
/// float; `out` is not empty; the file system refuses.
pub fn export(
    model: &Path,
    out: &Path,
    format: ExportAs,
    dtype: Option<Dtype>,
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport> {
    if let Some(dtype) = dtype.filter(|dtype| !dtype.is_float()) {
        return Err(Error::argument(format!("dtype {dtype} is not for weights"), "use bf16, f16 or f32"));
    }
    let mut config = Config::load(model)?;
    let checkpoint = open_model(model, &config)?;
    check_llama_tensors(&config, &checkpoint)?;
    let mut inverses = Vec::new();
    if format == ExportAs::Dense {
        if config.moe.is_none() {
            let (field, problem) = match &config.ffn {
                None => ("model_type", format!("is {} already, without experts", config.model_type())),
                Some(spec) => ("ffn.type", format!("is {:?}, which has no dense form", spec.kind())),
            };
            let help = "export it as native";
            return Err(Error::field(&model.join(CONFIG_FILE), field, problem, help));
        }
        inverses =
            read_partitions(&config, &checkpoint)?.iter().map(|partition| partition.inverse()).collect();
        config.moe = None;
    }
    let masks = Masks::read(model, &Config::load(model)?)?;
    if masks.is_some() && inverses.iter().any(Option::is_some) {
        return Err(masks_of_other_order(model, "export it as native"));
    }
    if let Some(dtype) = dtype {
        config.set_dtype(dtype);
    }

    let output = OutputDir::create_from(model, out, force)?;
    let sources: Vec<TensorInfo> = source_infos(&checkpoint)
        .into_iter()
        .filter(|info| format == ExportAs::Native || !is_router(&info.name))
        .collect();
    let sources = in_stored_order(&config, sources);
    let infos: Vec<TensorInfo> =
        sources.iter().map(|info| TensorInfo { dtype: cast(info, dtype), ..info.clone() }).collect();
    let report = ExportReport { tensors: infos.len(), bytes: infos.iter().map(TensorInfo::len_bytes).sum() };
    let mut meter = Meter::new(report.bytes, progress);
    let mut writer = model_writer(&config, output.path(), infos, DEFAULT_SHARD_BYTES)?;
    let mut source = TensorSource::new(&checkpoint);
    let (mut values, mut casted) = (Vec::new(), Vec::new());
    for info in &sources {
        writer.begin(&info.name)?;
        let (from, to) = (info.dtype, cast(info, dtype));
        let change = ffn_change(&info.name, |layer| inverses.get(layer)?.as_deref());
        source.stream(&info.name, change, |bytes| {
            if from == to {
                meter.add(bytes.len());
                return writer.write_chunk(bytes);
            }
            values.resize(bytes.len() / from.size(), 0.0);
            decode(&mut values, bytes, from);
            if let Some(value) = is_too_large(&values, to) {
                let problem = format!("holds {value}, which {to} cannot store");
                return Err(Error::tensor(model, &info.name, problem, "set {dtype} to bf16 or f32"));
            }
            casted.resize(values.len() * to.size(), 0);
            encode(&mut casted, &values, to);
            meter.add(casted.len());
            writer.write_chunk(&casted)
        })?;
    }
    writer.finish()?;
    masks.iter().try_for_each(|masks| masks.save(output.path()))?;
    copy_companions(model, output.path())?;
    config.save(output.path())?;
    output.commit()?;
    Ok(report)
}

fn cast(info: &TensorInfo, dtype: Option<Dtype>) -> Dtype {
    if is_router(&info.name) { info.dtype } else { dtype.unwrap_or(info.dtype) }
}
