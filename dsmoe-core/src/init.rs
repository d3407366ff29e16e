//! Models with random weights, for size tests and training from scratch.

use std::path::Path;

use dsmoe_kernels::rng::Rng;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::checkpoint::{
    DEFAULT_SHARD_BYTES, Dtype, Meter, OutputDir, Progress, TensorInfo, copy_companions, model_writer,
    tensor_names,
};
use crate::config::Config;
use crate::error::{Error, Result, shown};
use crate::files::write_synced;

const TOKENIZER_FILE: &str = "tokenizer.json";
/// Values drawn from one stream of random numbers.
const STREAM: usize = 1 << 16;
/// Values in memory at a time.
const CHUNK: usize = 32 * STREAM;

/// Options for writing random weights.
///
/// ```
/// use dsmoe_core::Config;
/// use dsmoe_core::checkpoint::Dtype;
/// use dsmoe_core::init::{InitOptions, LlamaSizes, init};
///
/// let config = LlamaSizes {
///     vocab: 64,
///     hidden: 32,
///     intermediate: 64,
///     layers: 2,
///     heads: 4,
///     kv_heads: 2,
///     positions: 128,
///     bos_eos: [1, 2],
/// }
/// .config()?;
/// let work = tempfile::tempdir()?;
/// let options = InitOptions { dtype: Dtype::BF16, seed: 7, ..InitOptions::default() };
/// init(&config, &work.path().join("model"), &options, &mut |_| {})?;
/// assert_eq!(Config::load(&work.path().join("model"))?.hidden, 32);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitOptions {
    /// Type of the stored weights.
    pub dtype: Dtype,
    /// Seed of the weights.
    pub seed: u64,
    /// Largest shard.
    pub max_shard_bytes: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
    /// Text of the tokenizer.json to put beside the weights.
    pub tokenizer: Option<String>,
}

impl Default for InitOptions {
    fn default() -> InitOptions {
        InitOptions {
            dtype: Dtype::F32,
            seed: 0,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            force: false,
            tokenizer: None,
        }
    }
}

/// The published sizes of a preset.
struct Preset {
    name: &'static str,
    vocab: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    tied: bool,
    kind: Kind,
}

/// Settings shared by a generation of models.
enum Kind {
    /// Base 10000, 4096 positions, tokens 1 and 2.
    Llama2,
    /// Base 500000 with llama3 scaling by this factor.
    Llama3(f64),
    /// Base 10000 and this many positions.
    Small(usize),
    /// Base 10000, 512 positions, and one token, 0, that begins a text and so ends the one before.
    World,
    /// Base 10000, this many positions, and these tokens that begin and end a text.
    Own(usize, [u32; 2]),
}

/// Sizes of a small LLaMA of one's own.
///
/// ```
/// use dsmoe_core::init::LlamaSizes;
///
/// let sizes = LlamaSizes {
///     vocab: 64,
///     hidden: 32,
///     intermediate: 64,
///     layers: 2,
///     heads: 4,
///     kv_heads: 2,
///     positions: 128,
///     bos_eos: [1, 2],
/// };
/// assert_eq!(sizes.config()?.head_dim, 8);
/// // Heads divide the width.
/// assert!(LlamaSizes { heads: 5, ..sizes }.config().is_err());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LlamaSizes {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Neurons of an FFN.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Positions.
    pub positions: usize,
    /// The tokens that begin and end a text.
    pub bos_eos: [u32; 2],
}

impl LlamaSizes {
    /// Returns the configuration of such a model: tied embeddings, rotation of base 10000.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub fn config(self) -> Result<Config> {
        let LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos } = self;
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(Error::argument(
                format!("{heads} heads do not divide a width of {hidden}"),
                "use a divisor",
            ));
        }
        let sizes = [vocab, hidden, intermediate, layers, heads, kv_heads];
        let json = Preset::new("", sizes, true, Kind::Own(positions, bos_eos)).json();
        Config::from_json(Path::new("config.json"), &json.to_string())
    }
}

const PRESETS: [Preset; 8] = [
    Preset::new("world", [1536, 128, 384, 4, 4, 4], true, Kind::World),
    Preset::new("tiny", [2048, 128, 512, 4, 4, 2], true, Kind::Small(512)),
    Preset::new("small", [8192, 512, 1536, 8, 8, 4], true, Kind::Small(1024)),
    Preset::new("llama-3.2-1b", [128_256, 2048, 8192, 16, 32, 8], true, Kind::Llama3(32.0)),
    Preset::new("llama-3.2-3b", [128_256, 3072, 8192, 28, 24, 8], true, Kind::Llama3(32.0)),
    Preset::new("llama-3.1-8b", [128_256, 4096, 14_336, 32, 32, 8], false, Kind::Llama3(8.0)),
    Preset::new("llama-2-7b", [32_000, 4096, 11_008, 32, 32, 32], false, Kind::Llama2),
    Preset::new("llama-2-13b", [32_000, 5120, 13_824, 40, 40, 40], false, Kind::Llama2),
];

impl Preset {
    const fn new(name: &'static str, sizes: [usize; 6], tied: bool, kind: Kind) -> Preset {
        let [vocab, hidden, intermediate, layers, heads, kv_heads] = sizes;
        Preset { name, vocab, hidden, intermediate, layers, heads, kv_heads, tied, kind }
    }

    fn json(&self) -> Value {
        let (theta, positions, bos, eos) = match self.kind {
            Kind::Llama2 => (10_000.0, 4096, 1, 2),
            Kind::Llama3(_) => (500_000.0, 131_072, 128_000, 128_001),
            Kind::Small(positions) => (10_000.0, positions, 1, 2),
            Kind::World => (10_000.0, 512, 0, 0),
            Kind::Own(positions, [bos, eos]) => (10_000.0, positions, bos, eos),
        };
        let scaling = match self.kind {
            Kind::Llama3(factor) => json!({
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            }),
            _ => Value::Null,
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "head_dim": self.hidden / self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": positions,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": scaling,
            "rope_theta": theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocab,
        })
    }
}

/// Returns the names of all presets, small to large.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name)
}

/// Returns the configuration of a preset.
///
/// # Errors
/// There is no preset of that name.
pub fn preset(name: &str) -> Result<Config> {
    let preset = PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
        let names = preset_names().collect::<Vec<_>>().join(", ");
        Error::argument(format!("unknown preset `{}`", shown(name)), format!("use one of {names}"))
    })?;
    Config::from_json(Path::new(name), &preset.json().to_string())
}

/// Writes a dense model of `config` with weights N(0, `initializer_range`^2), norms 1 and biases 0 to the new directory `out`,
/// which appears when it is complete. The weights are a function of the configuration and the seed alone.
///
/// # Errors
/// `config` is not dense, the type is not a float, `out` is not empty, or the file system refuses.
pub fn init(
    config: &Config,
    out: &Path,
    options: &InitOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    check(config, options.dtype)?;
    let output = OutputDir::create(out, options.force)?;
    write(config, output, options, progress)
}

/// Does as [`init`] with the tokenizer and the generation settings of the model directory `source`, which must survive.
///
/// # Errors
/// Those of [`init`]; `source` is `out` or inside it, or cannot be read.
pub fn init_beside(
    source: &Path,
    config: &Config,
    out: &Path,
    options: &InitOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    check(config, options.dtype)?;
    let output = OutputDir::create_from(source, out, options.force)?;
    copy_companions(source, output.path())?;
    write(config, output, options, progress)
}

fn check(config: &Config, dtype: Dtype) -> Result<()> {
    if !config.is_dense() {
        let problem = "random weights are made for dense models";
        return Err(Error::argument(problem, "use a configuration without experts, then convert"));
    }
    if !dtype.is_float() {
        return Err(Error::argument(format!("dtype {dtype} is not for weights"), "use bf16, f16 or f32"));
    }
    Ok(())
}

fn write(
    config: &Config,
    output: OutputDir,
    options: &InitOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let dtype = options.dtype;
    let infos: Vec<TensorInfo> =
        tensor_names(config).map(|(name, shape)| TensorInfo { name, dtype, shape }).collect();
    let mut meter = Meter::new(infos.iter().map(TensorInfo::len_bytes).sum(), progress);
    let mut writer = model_writer(config, output.path(), infos.clone(), options.max_shard_bytes)?;
    let mut values = Vec::new();
    for info in &infos {
        writer.begin(&info.name)?;
        let numel: usize = info.shape.iter().product();
        let seed = options.seed ^ hash(&info.name);
        for first in (0..numel).step_by(CHUNK) {
            values.resize(CHUNK.min(numel - first), 0.0);
            if info.shape.len() == 1 {
                let is_bias = info.name.ends_with(".bias");
                values.fill(if is_bias { 0.0 } else { 1.0 - config.architecture.norm_offset });
            } else {
                values.par_chunks_mut(STREAM).enumerate().for_each(|(i, values)| {
                    let stream = (first / STREAM + i) as u64;
                    Rng::new(seed, stream).fill_normal(values, config.initializer_range as f32);
                });
            }
            writer.write_f32_chunk(&values)?;
            meter.add(values.len() * dtype.size());
        }
    }
    writer.finish()?;
    let mut config = config.clone();
    config.set_dtype(dtype);
    config.save(output.path())?;
    if let Some(text) = &options.tokenizer {
        let path = output.path().join(TOKENIZER_FILE);
        write_synced(&path, text.as_bytes()).map_err(Error::io(&path))?;
    }
    output.commit()
}

/// Computes FNV-1a: every tensor has a seed of its own.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Manifest;

    #[test]
    fn a_model_appears_with_its_tokenizer() {
        let work = tempfile::tempdir().unwrap();
        let out = work.path().join("model");
        let sizes = LlamaSizes {
            vocab: 16,
            hidden: 8,
            intermediate: 16,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            positions: 16,
            bos_eos: [1, 2],
        };
        let options = InitOptions { tokenizer: Some("{}".to_owned()), ..InitOptions::default() };
        init(&sizes.config().unwrap(), &out, &options, &mut |_| {}).unwrap();
        let manifest = Manifest::read(&out).unwrap().unwrap();
        assert!(manifest.holds(TOKENIZER_FILE, b"{}"));
        assert_eq!(std::fs::read(out.join(TOKENIZER_FILE)).unwrap(), b"{}");
    }
}
