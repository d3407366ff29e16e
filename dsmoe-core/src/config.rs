//! `config.json` of a LLaMA or DSMoE directory: reading, checking, writing.

use std::path::Path;

use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::checkpoint::Dtype;
use crate::error::{Error, Result, shown};
use crate::partition;

/// Name of the configuration in a model directory.
pub const CONFIG_FILE: &str = "config.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";
const FORMAT_VERSION: u64 = 1;
/// The largest JSON file that is read.
const LARGEST_JSON: u64 = 64 << 20;
/// The largest width, vocabulary or number of positions believed.
const LARGEST_DIMENSION: u64 = 1 << 24;
const LARGEST_LAYERS: u64 = 1 << 12;
const LARGEST_MODEL: u128 = 1 << 42;

/// Configuration of a LLaMA, dense or with experts.
///
/// The fields are what was read; [`Config::to_json`] writes the keys of the source and, of these fields, `moe`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream (d).
    pub hidden: usize,
    /// Width of the FFN (D).
    pub intermediate: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Positions the model was made for.
    pub max_position: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// First token of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; generation_config.json wins.
    pub eos_token_ids: Vec<u32>,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Experts and routers; none for a dense model.
    pub moe: Option<MoeConfig>,
    raw: Map<String, Value>,
}

/// Scaling of the rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the frequencies of long wavelengths.
        factor: f64,
        /// Wavelengths over `original_max_position` / this are long.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_position` / this are short.
        high_freq_factor: f64,
        /// Positions before scaling.
        original_max_position: usize,
    },
}

/// Order of the neurons in the stored FFN tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartitionKind {
    /// As in the original; expert i is the i-th block.
    Contiguous,
    /// Permuted; `mlp.partition` of each layer holds the original indices.
    Permuted,
}

/// The `dsmoe` object of config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// What the routers do.
    pub router: RouterConfig,
    /// Order of the neurons.
    pub partition: PartitionKind,
    /// Whether routers have a bias.
    pub router_bias: bool,
}

/// [`MoeConfig`] as it is stored.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredMoe {
    format_version: u64,
    num_experts: usize,
    threshold: f64,
    partition: PartitionKind,
    router_bias: bool,
    gate_value: GateValue,
    rescale: Rescale,
    zero_active: ZeroActive,
    ste: bool,
}

impl Config {
    /// Reads `config.json`, and the end-of-text tokens of `generation_config.json` when that exists.
    ///
    /// # Errors
    /// Either file cannot be read or has a field that is missing, out of range or not supported.
    pub fn load(dir: &Path) -> Result<Config> {
        let path = dir.join(CONFIG_FILE);
        let mut config = Config::from_json(&path, &read_json(&path)?)?;
        let path = dir.join(GENERATION_CONFIG_FILE);
        if path.is_file() {
            let map = parse_object(&path, &read_json(&path)?)?;
            let fields = Fields { path: &path, prefix: "", map: &map };
            if let Some(ids) = fields.token_ids("eos_token_id")? {
                config.eos_token_ids = ids;
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// Not JSON, or a field that is missing, out of range or not supported.
    pub fn from_json(path: &Path, text: &str) -> Result<Config> {
        let raw = parse_object(path, text)?;
        let fields = Fields { path, prefix: "", map: &raw };
        fields.refuse_unsupported()?;
        let moe = fields.moe()?;

        let hidden = fields.dimension("hidden_size")?;
        let num_heads = fields.dimension("num_attention_heads")?;
        let num_kv_heads = fields.dimension_or("num_key_value_heads", num_heads)?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(fields.wrong(
                "num_key_value_heads",
                format!("is {num_kv_heads} and does not divide num_attention_heads {num_heads}"),
                "correct one of them",
            ));
        }
        if fields.get("head_dim").is_none() && !hidden.is_multiple_of(num_heads) {
            let problem = format!("is {hidden} and not divisible by num_attention_heads {num_heads}");
            return Err(fields.wrong("hidden_size", problem, "add head_dim"));
        }
        let head_dim = fields.dimension_or("head_dim", hidden / num_heads)?;
        if !head_dim.is_multiple_of(2) {
            return Err(fields.wrong("head_dim", format!("is {head_dim}"), "use an even number"));
        }
        let (rope_theta, rope_scaling) = fields.rope()?;
        let config = Config {
            vocab_size: fields.dimension("vocab_size")?,
            hidden,
            intermediate: fields.dimension("intermediate_size")?,
            num_layers: fields.integer("num_hidden_layers", LARGEST_LAYERS)?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_position: fields.dimension_or("max_position_embeddings", 2048)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: fields.token_ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
            eos_token_ids: fields.token_ids("eos_token_id")?.unwrap_or_default(),
            initializer_range: fields.positive("initializer_range")?.unwrap_or(0.02),
            moe,
            raw: Map::new(),
        };
        config.check_size(&fields)?;
        if let Some(moe) = &config.moe {
            partition::check_divisible(config.intermediate, moe.router.num_experts, Some(path))?;
        }
        Ok(Config { raw, ..config })
    }

    fn check_size(&self, fields: &Fields<'_>) -> Result<()> {
        let wide = |n: usize| n as u128;
        let attention =
            2 * wide(self.hidden) * wide(self.head_dim) * wide(self.num_heads + self.num_kv_heads);
        let layer = attention + 3 * wide(self.hidden) * wide(self.intermediate);
        let total = wide(self.num_layers) * layer + 2 * wide(self.vocab_size) * wide(self.hidden);
        if wide(self.num_heads) * wide(self.head_dim) > u128::from(LARGEST_DIMENSION) || total > LARGEST_MODEL
        {
            let problem = format!("and the other sizes make a model of {total} parameters");
            return Err(fields.wrong("hidden_size", problem, "correct the sizes"));
        }
        Ok(())
    }

    /// The keys of the source, with `model_type`, `architectures` and `dsmoe` as [`Config::moe`] says.
    pub fn to_json(&self) -> String {
        let mut raw = self.raw.clone();
        let (model_type, architecture) = match self.moe {
            None => ("llama", "LlamaForCausalLM"),
            Some(_) => ("dsmoe", "DsmoeForCausalLM"),
        };
        raw.insert("model_type".to_owned(), json!(model_type));
        raw.insert("architectures".to_owned(), json!([architecture]));
        match &self.moe {
            None => raw.shift_remove("dsmoe"),
            Some(moe) => raw.insert("dsmoe".to_owned(), moe.to_value()),
        };
        format!("{:#}\n", Value::Object(raw))
    }

    /// Writes `config.json` to the existing directory `dir` and syncs it.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn save(&self, dir: &Path) -> Result<()> {
        crate::checkpoint::write_synced(&dir.join(CONFIG_FILE), self.to_json().as_bytes())
    }

    /// Changes the key that says what the weights are stored as: `dtype` where the source has it, else `torch_dtype`.
    pub fn set_dtype(&mut self, dtype: Dtype) {
        let name = match dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::F64 => "float64",
            _ => return,
        };
        let key = if self.raw.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        self.raw.insert(key.to_owned(), json!(name));
    }
}

impl MoeConfig {
    fn to_value(&self) -> Value {
        let router = &self.router;
        // The shortest decimal of the f32, not the many digits of its f64.
        let threshold = router.threshold.to_string().parse().unwrap_or(f64::from(router.threshold));
        json!(StoredMoe {
            format_version: FORMAT_VERSION,
            num_experts: router.num_experts,
            threshold,
            partition: self.partition,
            router_bias: self.router_bias,
            gate_value: router.gate_value,
            rescale: router.rescale,
            zero_active: router.zero_active,
            ste: router.ste,
        })
    }
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<String> {
    let len = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if len > LARGEST_JSON {
        let problem = format!("{len} bytes are too many for a JSON file");
        return Err(Error::Path { path: path.to_path_buf(), problem, mend: "copy the file again" });
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|cause| Error::Json {
        path: path.to_path_buf(),
        message: format!("not UTF-8 at byte {}", cause.utf8_error().valid_up_to()),
        mend: "copy the file again",
    })
}

fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(text).map_err(|cause| Error::Json {
        path: path.to_path_buf(),
        message: format!("not a JSON object: {}", shown(&cause.to_string())),
        mend: "copy the file again",
    })
}

/// Access to one JSON object, with errors that name file and key.
struct Fields<'a> {
    path: &'a Path,
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value, unless absent or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, problem: impl Into<String>, mend: impl Into<String>) -> Error {
        Error::field(self.path, format!("{}{key}", self.prefix), problem, mend)
    }

    fn is_not(&self, key: &str, value: &Value, mend: &str) -> Error {
        self.wrong(key, format!("is {}", shown(&value.to_string())), mend)
    }

    fn integer_opt(&self, key: &str, largest: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=largest).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.is_not(key, value, &format!("use an integer from 1 to {largest}"))),
        }
    }

    fn integer(&self, key: &str, largest: u64) -> Result<usize> {
        self.integer_opt(key, largest)?.ok_or_else(|| self.wrong(key, "is missing", "add it"))
    }

    fn dimension(&self, key: &str) -> Result<usize> {
        self.integer(key, LARGEST_DIMENSION)
    }

    fn dimension_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.integer_opt(key, LARGEST_DIMENSION)?.unwrap_or(default))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
            _ => Err(self.is_not(key, value, "use a positive number")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.is_not(key, value, "use true or false"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.is_not(key, value, "use a text"))
    }

    /// A token id or a list of them.
    fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.is_not(key, value, "use a token id or a list of them"))
    }

    /// Refuses what would change the model's function and is not implemented.
    fn refuse_unsupported(&self) -> Result<()> {
        match self.text("model_type")? {
            Some("llama" | "dsmoe") => {}
            None => return Err(self.wrong("model_type", "is missing", "use a LLaMA with \"llama\" here")),
            Some(other) => {
                let problem = format!("is {:?} and not supported", shown(other));
                return Err(self.wrong("model_type", problem, "use a model of type llama or dsmoe"));
            }
        }
        match self.text("hidden_act")? {
            None | Some("silu") => {}
            Some(other) => {
                let problem = format!("is {:?} and not supported", shown(other));
                return Err(self.wrong("hidden_act", problem, "use a model with silu"));
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag(key)? == Some(true) {
                return Err(self.wrong(key, "is true and not supported", "use a model without biases"));
            }
        }
        if self.get("quantization_config").is_some() {
            let mend = "use the checkpoint it was quantised from";
            return Err(self.wrong("quantization_config", "is present and not supported", mend));
        }
        if self.positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(self.wrong("partial_rotary_factor", "is not supported", "use a model without it"));
        }
        Ok(())
    }

    fn object(&self, key: &'a str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.is_not(key, value, "use an object or null"))
    }

    fn moe(&self) -> Result<Option<MoeConfig>> {
        let stored = match (self.text("model_type")?, self.get("dsmoe")) {
            (Some("dsmoe"), Some(value)) => value,
            (Some("dsmoe"), None) => {
                return Err(self.wrong(
                    "dsmoe",
                    "is missing",
                    "convert the model again, or set model_type to llama",
                ));
            }
            (_, Some(_)) => {
                let mend = "set model_type to dsmoe or remove the object";
                return Err(self.wrong("dsmoe", "is present but model_type is not dsmoe", mend));
            }
            _ => return Ok(None),
        };
        let version = stored.get("format_version").and_then(Value::as_u64);
        if let Some(version) = version.filter(|&version| version != FORMAT_VERSION) {
            let problem = format!("is {version} and this program reads {FORMAT_VERSION}");
            return Err(self.wrong("dsmoe.format_version", problem, "update it, or convert the model again"));
        }
        let stored = StoredMoe::deserialize(stored)
            .map_err(|cause| self.wrong("dsmoe", shown(&cause.to_string()), "convert the model again"))?;
        let router = RouterConfig {
            num_experts: stored.num_experts,
            threshold: stored.threshold as f32,
            gate_value: stored.gate_value,
            rescale: stored.rescale,
            zero_active: stored.zero_active,
            ste: stored.ste,
        };
        router.validate().map_err(|cause| Error::Field {
            path: self.path.to_path_buf(),
            field: "dsmoe:".to_owned(),
            problem: cause.to_string(),
            mend: "convert the model again".to_owned(),
        })?;
        Ok(Some(MoeConfig { router, partition: stored.partition, router_bias: stored.router_bias }))
    }

    /// Base and scaling from either spelling: `rope_theta` and `rope_scaling`, or `rope_parameters`.
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let mut theta = self.positive("rope_theta")?;
        let mut scaling = match self.map.contains_key("rope_scaling") {
            true => Some(self.scaling("rope_scaling.", self.object("rope_scaling")?)?),
            false => None,
        };
        if let Some(map) = self.object("rope_parameters")? {
            let inner = Fields { path: self.path, prefix: "rope_parameters.", map };
            if let Some((key, _)) = map.iter().find(|(_, value)| value.is_object()) {
                let mend = "use a model with one set of rope_parameters";
                return Err(inner.wrong(&shown(key), "is an object and not supported", mend));
            }
            let differ = |key: &str, other: &str| {
                inner.wrong(key, format!("differs from {other}"), "remove the one that is wrong")
            };
            let new_theta = inner.positive("rope_theta")?;
            if theta.is_some() && new_theta.is_some() && theta != new_theta {
                return Err(differ("rope_theta", "rope_theta"));
            }
            let new_scaling = self.scaling("rope_parameters.", Some(map))?;
            if scaling.is_some_and(|scaling| scaling != new_scaling) {
                return Err(differ("rope_type", "rope_scaling"));
            }
            theta = theta.or(new_theta);
            scaling = Some(new_scaling);
        }
        Ok((theta.unwrap_or(10_000.0), scaling.unwrap_or(RopeScaling::None)))
    }

    fn scaling(&self, prefix: &str, map: Option<&Map<String, Value>>) -> Result<RopeScaling> {
        let Some(map) = map else { return Ok(RopeScaling::None) };
        let fields = Fields { path: self.path, prefix, map };
        let (kind, legacy) = (fields.text("rope_type")?, fields.text("type")?);
        if let (Some(kind), Some(legacy)) = (kind, legacy)
            && kind != legacy
        {
            return Err(fields.wrong("type", "differs from rope_type", "remove the one that is wrong"));
        }
        let key = if kind.is_some() { "rope_type" } else { "type" };
        match kind.or(legacy) {
            None | Some("default") => Ok(RopeScaling::None),
            Some("llama3") => {
                let need = |key: &str| {
                    fields.positive(key)?.ok_or_else(|| fields.wrong(key, "is missing", "add it"))
                };
                let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
                if low >= high {
                    let problem = format!("is {low} and not below high_freq_factor {high}");
                    return Err(fields.wrong("low_freq_factor", problem, "correct one of them"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: need("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position: fields.dimension("original_max_position_embeddings")?,
                })
            }
            Some(other) => {
                let problem = format!("is {:?} and not supported", shown(other));
                Err(fields.wrong(key, problem, "use a model whose type is default or llama3"))
            }
        }
    }
}
