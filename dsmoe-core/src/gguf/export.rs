//! Export of a dense model as a GGUF file.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::arch::{Arch, Head};
use super::blocks::encode_q8_0;
use super::config::ARCHITECTURE_KEY;
use super::keys;
use super::names::{interleaved, rotated};
use super::types::TensorType;
use super::value::Value;
use super::vocab::Files;
use super::write::{Declared, GgufWriter};
use crate::checkpoint::{
    Change, Checkpoint, Dtype, EMBEDDING, Meter, Progress, TensorSource, check_llama_tensors, decode, encode,
    is_too_large, open_model, tensor_names, too_large,
};
use crate::config::{CONFIG_FILE, Config, RopeScaling};
use crate::error::{Error, Result, shown};

/// Version of the quantisation formats.
const QUANTIZATION_VERSION: u64 = 2;
/// Elements of a block of Q8_0.
const BLOCK: usize = 32;

/// Encoding of the matrices of an exported file.
///
/// ```
/// use dsmoe_core::checkpoint::Dtype;
/// use dsmoe_core::gguf::GgufType;
///
/// let types = ["q8_0", "bf16"].map(|name| name.parse::<GgufType>());
/// assert!(matches!(types, [Ok(GgufType::Q8_0), Ok(GgufType::Float(Dtype::BF16))]));
/// assert!("q3_k".parse::<GgufType>().is_err()); // read, but not written
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    /// F32, F16 or BF16.
    Float(Dtype),
    /// Eight bits with a scale for every 32 elements.
    Q8_0,
}

impl GgufType {
    /// Returns the type of a matrix with rows of `cols` elements.
    fn of_matrix(self, cols: usize) -> TensorType {
        match self {
            GgufType::Float(Dtype::F32) => TensorType::F32,
            GgufType::Float(Dtype::BF16) => TensorType::BF16,
            GgufType::Q8_0 if cols.is_multiple_of(BLOCK) => TensorType::Q8_0,
            _ => TensorType::F16,
        }
    }

    /// Returns the number of the type of a file.
    fn file_type(self) -> u64 {
        match self {
            GgufType::Float(Dtype::F32) => 0,
            GgufType::Float(Dtype::BF16) => 32,
            GgufType::Float(_) => 1,
            GgufType::Q8_0 => 7,
        }
    }
}

/// Summary of an exported file.
///
/// ```no_run
/// use dsmoe_core::gguf::{GgufReport, GgufType, export_gguf};
///
/// let (model, out) = ("model".as_ref(), "model.gguf".as_ref());
/// let GgufReport { tensors, bytes } = export_gguf(model, out, Some(GgufType::Q8_0), false, &mut |_| {})?;
/// println!("{tensors} tensors, {bytes} bytes");
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufReport {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GgufType::Float(dtype) => write!(f, "{dtype}"),
            GgufType::Q8_0 => f.write_str("Q8_0"),
        }
    }
}

impl FromStr for GgufType {
    type Err = Error;

    /// Parses `q8_0` and the types that weights are written as, in any case.
    fn from_str(s: &str) -> Result<GgufType> {
        match s.to_ascii_lowercase().as_str() {
            "q8_0" => Ok(GgufType::Q8_0),
            float => float.parse().map(GgufType::Float),
        }
    }
}

/// Exports the dense model in `model` to the GGUF file `out`, which appears when it is complete. Matrices are written
/// as `kind`, or as they are; norms and biases as F32.
///
/// # Errors
/// `model` cannot be read, has experts or layers of different shapes, is of a family or has a tokenizer that GGUF
/// cannot state; a weight is not finite, or too large for `kind`; `out` is there and `force` is not set; the file system refuses.
pub fn export_gguf(
    model: &Path,
    out: &Path,
    kind: Option<GgufType>,
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<GgufReport> {
    let config = Config::load(model)?;
    let arch = check(model, &config)?;
    let checkpoint = open_model(model, &config)?;
    let names = check_llama_tensors(&config, &checkpoint)?;
    let kind = match kind {
        Some(kind) => kind,
        None => stored_kind(&config, &checkpoint)?,
    };
    let (own, ropes) = keys::of_config(&model.join(CONFIG_FILE), &config, arch)?;
    let tokenizer = Files::read(model)?.metadata(&config)?;
    let mut metadata = vec![
        (ARCHITECTURE_KEY.to_owned(), Value::Text(arch.name.to_owned())),
        ("general.type".to_owned(), Value::Text("model".to_owned())),
        ("general.name".to_owned(), Value::Text(readable_name(model_name(model), &tokenizer))),
        ("general.file_type".to_owned(), Value::Unsigned(kind.file_type())),
        ("general.quantization_version".to_owned(), Value::Unsigned(QUANTIZATION_VERSION)),
    ];
    metadata.extend(own.into_iter().map(|(key, value)| (format!("{}.{key}", arch.name), value)));
    metadata.extend(tokenizer);
    let made = tensors(model, &config, arch, kind)?;
    let mut declared: Vec<Declared> = made.iter().map(|made| made.tensor.clone()).collect();
    declared.extend(ropes.iter().map(|(name, values)| Declared {
        name: (*name).to_owned(),
        kind: TensorType::F32,
        shape: vec![values.len()],
    }));
    let report = GgufReport { tensors: declared.len(), bytes: declared.iter().map(Declared::len).sum() };
    if checkpoint.files().any(|file| is_same(file, out)) {
        return Err(Error::path(out, "is the model that is read", "choose another {out}"));
    }
    let mut writer = GgufWriter::create(out, &metadata, &declared, force)?;
    let mut copy =
        Copy { arch, config: &config, checkpoint: &checkpoint, source: TensorSource::new(&checkpoint) };
    let mut meter = Meter::new(report.bytes, progress);
    for Made { tensor, sources } in &made {
        for name in sources {
            copy.tensor(names.stored_name(name), tensor, &mut |bytes| {
                meter.add(bytes.len());
                writer.write(bytes)
            })?;
        }
        writer.end(tensor)?;
    }
    for ((_, values), tensor) in ropes.iter().zip(&declared[made.len()..]) {
        writer.write(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
        writer.end(tensor)?;
    }
    writer.commit()?;
    Ok(report)
}

fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn model_name(model: &Path) -> String {
    let name = model.canonicalize().ok();
    let name = name.as_deref().unwrap_or(model).file_stem();
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Returns `name`, or another one if llama.cpp could not load a model of that name: it looks up tokens of Phi-3's
/// vocabulary in every model whose name says so.
fn readable_name(name: String, tokenizer: &[(String, Value)]) -> String {
    const NAMES: [&str; 2] = ["phi-3", "phi3"];
    const TOKENS: [&str; 4] = ["</s>", "<unk>", "<s>", "<|endoftext|>"];
    let lower = name.to_lowercase();
    if !NAMES.iter().any(|known| lower.contains(known)) {
        return name;
    }
    let tokens = tokenizer.iter().find(|(key, _)| key == "tokenizer.ggml.tokens");
    let tokens = tokens.and_then(|(_, value)| value.as_list()).unwrap_or_default();
    let has = |token: &&str| tokens.iter().any(|value| value.as_str() == Some(token));
    if TOKENS.iter().all(has) { name } else { "model".to_owned() }
}

/// Refuses a model that llama.cpp has no graph for.
fn check(model: &Path, config: &Config) -> Result<&'static Arch> {
    let path = model.join(CONFIG_FILE);
    let fail =
        |field: &str, problem: String, help: &'static str| Err(Error::field(&path, field, problem, help));
    if config.moe.is_some() {
        let problem = "is present: llama.cpp has no graph for gated experts".to_owned();
        return fail("dsmoe", problem, "export the model as dense first, and that as GGUF");
    }
    if let Some(spec) = &config.ffn {
        let problem = format!("is {:?}, which is not written as GGUF", spec.kind());
        return fail("ffn.type", problem, "export it as native");
    }
    if config.thresholds.is_some() {
        let problem = "is present: llama.cpp skips no inputs".to_owned();
        return fail("activation_thresholds", problem, "export it as native");
    }
    if !config.is_even() {
        let problem = "differs from layer to layer, for which GGUF has no keys".to_owned();
        return fail("layer_shapes", problem, "export it as native");
    }
    if config.architecture.output_bias {
        let problem = "is true, and llama.cpp has no bias of an FFN's output without those of gate and up";
        return fail("output_bias", problem.to_owned(), "export it as native");
    }
    let Some(arch) = Arch::of_model_type(config.model_type()) else {
        let problem = format!("is {:?}, which is not written as GGUF", shown(config.model_type()));
        return fail("model_type", problem, "export it as native");
    };
    match lacks(arch, config) {
        Some((field, problem)) => fail(field, problem, "export it as native or hf"),
        None => Ok(arch),
    }
}

/// Returns the type of the stored matrices.
fn stored_kind(config: &Config, checkpoint: &Checkpoint) -> Result<GgufType> {
    let matrix = tensor_names(config).find(|(_, shape)| shape.len() > 1 && shape[0] != config.vocab_size);
    let dtype = match matrix {
        Some((name, _)) => checkpoint.need_float(&name)?.dtype,
        None => Dtype::F32,
    };
    Ok(GgufType::Float(if dtype == Dtype::F64 { Dtype::F32 } else { dtype }))
}

/// A tensor of the file, and the tensors of the model that it is made of, one above the other.
struct Made {
    tensor: Declared,
    sources: Vec<String>,
}

/// Returns the tensors of the file.
fn tensors(model: &Path, config: &Config, arch: &Arch, kind: GgufType) -> Result<Vec<Made>> {
    let mut made: Vec<Made> = Vec::new();
    for (name, shape) in tensor_names(config) {
        let gguf = arch.gguf_name(&arch.joined(&name)).ok_or_else(|| {
            Error::tensor(model, &name, "has no name in GGUF", "export the model as native")
        })?;
        if let Some(last) = made.last_mut().filter(|last| last.tensor.name == gguf) {
            last.tensor.shape[0] += shape[0];
            last.sources.push(name);
            continue;
        }
        let of_matrix = |cols: &usize| kind.of_matrix(*cols);
        let kind = shape.last().filter(|_| shape.len() > 1).map_or(TensorType::F32, of_matrix);
        made.push(Made { tensor: Declared { name: gguf, kind, shape }, sources: vec![name] });
    }
    if arch.head == Head::Own && config.tie_word_embeddings {
        let (name, shape) = ("output.weight".to_owned(), vec![config.vocab_size, config.hidden]);
        let tensor = Declared { name, kind: kind.of_matrix(config.hidden), shape };
        made.push(Made { tensor, sources: vec![EMBEDDING.to_owned()] });
    }
    Ok(made)
}

/// Copies tensors in the order and the types of the file.
struct Copy<'a> {
    arch: &'static Arch,
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    source: TensorSource<'a>,
}

impl Copy<'_> {
    /// Gives the data of the tensor stored as `name` to `sink`.
    fn tensor(
        &mut self,
        name: &str,
        tensor: &Declared,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let view = self.checkpoint.need_float(name)?;
        let dtype = view.dtype;
        let order = self.order(name, view.shape[0]);
        let change = match &order {
            None => Change::None,
            Some(order) if tensor.shape.len() == 1 => Change::Cols(order),
            Some(order) => Change::Rows(order),
        };
        let plus_one = self.arch.norm_plus_one && name.ends_with("norm.weight");
        let path = self.checkpoint.files().nth(view.file).unwrap_or(self.checkpoint.path());
        let (mut values, mut out) = (Vec::new(), Vec::new());
        self.source.copy(name, change, |bytes| {
            values.resize(bytes.len() / dtype.size(), 0.0);
            decode(&mut values, bytes, dtype);
            if plus_one {
                values.iter_mut().for_each(|value| *value += 1.0);
            }
            pack(&mut out, &values, tensor.kind).map_err(|value| {
                let (problem, help) = too_large(value, tensor.kind);
                Error::tensor(path, name, problem, help)
            })?;
            sink(&out)
        })
    }

    /// Returns for every stored row its row in Hugging Face's order, where they differ.
    fn order(&self, name: &str, rows: usize) -> Option<Vec<u32>> {
        rotated(name).filter(|_| self.arch.interleaved)?;
        let mut order = vec![0; rows];
        for (row, stored) in interleaved(self.config.head_dim, rows).enumerate() {
            order[stored] = row as u32;
        }
        Some(order)
    }
}

/// Sets `out` to `values` as `kind`; on failure, returns the value that is too large.
fn pack(out: &mut Vec<u8>, values: &[f32], kind: TensorType) -> std::result::Result<(), f32> {
    out.clear();
    let dtype = match kind {
        TensorType::Q8_0 => return encode_q8_0(out, values),
        TensorType::F16 => Dtype::F16,
        TensorType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    };
    if let Some(value) = is_too_large(values, dtype) {
        return Err(value);
    }
    out.resize(values.len() * dtype.size(), 0);
    encode(out, values, dtype);
    Ok(())
}

/// Returns what of `config` llama.cpp's graph of `arch` lacks: a field of config.json, and what is wrong with it.
fn lacks(arch: &Arch, config: &Config) -> Option<(&'static str, String)> {
    let (architecture, name) = (&config.architecture, arch.name);
    let heads = config.num_heads * config.head_dim;
    let llama3 = architecture.ropes.iter().any(|rope| matches!(rope.scaling, RopeScaling::Llama3 { .. }));
    if !arch.other_biases && architecture.o_bias {
        let problem = format!("is true, and llama.cpp reads no bias of o_proj for {name}");
        Some(("attention_bias", problem))
    } else if !arch.other_biases && architecture.mlp_bias {
        Some(("mlp_bias", format!("is true, and llama.cpp reads no biases of FFNs for {name}")))
    } else if arch.head == Head::Embedding && !config.tie_word_embeddings {
        let problem = format!("is false, and llama.cpp takes the embedding as the output head of {name}");
        Some(("tie_word_embeddings", problem))
    } else if !arch.divisors && llama3 {
        let problem = format!("is llama3, whose divisors llama.cpp does not read for {name}");
        Some(("rope_scaling.rope_type", problem))
    } else if arch.square && heads != config.hidden {
        let problem = format!(
            "is {} with heads of {}, which llama.cpp reads for {name} only if they make up hidden_size {}",
            config.num_heads, config.head_dim, config.hidden
        );
        Some(("num_attention_heads", problem))
    } else {
        None
    }
}
