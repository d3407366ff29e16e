//! `config.json` of a model directory, dense or DSMoE: reading, checking, writing.

pub(crate) mod arch;
pub(crate) mod experts;
pub(crate) mod fields;
pub(crate) mod mixture;
mod moe;
mod own;
pub(crate) mod rope;
pub(crate) mod rope_keys;
mod thresholds;
mod transformers;
mod wrapped;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use crate::checkpoint::CONFIG_FILE;
use crate::checkpoint::Dtype;
use crate::error::{Error, Result, shown};
use crate::family::spec::{HeadDim, Sizes};
use crate::family::{self, Family};
use crate::ffn::{self, FfnSpec};
use crate::files::{check_exists, is_present, write_synced};
use crate::gguf;
use crate::json::{parse_object, read_config};
use crate::kept::LayerThresholds;
use crate::partition;
pub use arch::{Architecture, LayerAttention, Norms, QkNorm};
pub use dsmoe_kernels::Activation;
pub use experts::{MixtureSpec, experts_of_layers, lists_of_maps, maps_of_layers};
use fields::Fields;
use moe::MoeSizes;
pub use moe::{Budget, MoeConfig, MoeParts, PartitionKind};
pub use rope::{Rope, RopeScaling};

/// The configuration of Mistral's own format, whose tensors have other names and layouts.
const MISTRAL_CONFIG_FILE: &str = "params.json";
/// The configuration of an adapter of PEFT, such as LoRA.
const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// The folder of the Hub's cache that holds the model directories.
const SNAPSHOTS: &str = "snapshots";
/// The folder of a training's checkpoints.
const CHECKPOINTS: &str = "checkpoints";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";
const LARGEST_LAYERS: u64 = 1 << 12;
const LARGEST_MODEL: u128 = 1 << 42;
/// Most experts of a mixture in all of its layers, each of which is several tensors; published models have some 25 thousand.
const MOST_EXPERTS: usize = 1 << 18;
/// The key that names the family of a directory whose `model_type` is `dsmoe`; absent for LLaMA.
const BASE_KEY: &str = "base_model_type";
/// The key of [`Architecture::output_bias`].
const OUTPUT_BIAS_KEY: &str = "output_bias";
/// The key of [`Config::thresholds`].
const THRESHOLDS_KEY: &str = "activation_thresholds";

/// Configuration of a decoder, dense or with experts.
///
/// The fields are what was read; [`Config::to_json`] writes the keys of the source and, of these fields, `moe` and
/// `ffn`. Where layers differ ([`Config::layer`]), the plain sizes are the largest of any layer.
///
/// ```
/// use dsmoe_core::config::{Config, LayerShape};
/// use dsmoe_core::init::preset;
///
/// let config = preset("tiny")?;
/// let LayerShape { num_heads, intermediate, .. } = config.layer(0);
/// assert_eq!((num_heads, intermediate), (config.num_heads, config.intermediate));
/// // What is written is read.
/// let read = Config::from_json("config.json".as_ref(), &config.to_json())?;
/// assert_eq!(read.num_layers, config.num_layers);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
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
    /// The switches of the model's family.
    pub architecture: Architecture,
    /// Positions the model takes.
    pub max_position: usize,
    /// True if the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// First token of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text: those of config.json and of generation_config.json.
    pub eos_token_ids: Vec<u32>,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// DSMoE's experts and routers; none for a dense model.
    pub moe: Option<MoeConfig>,
    /// An FFN of another kind; none for a dense model and for DSMoE.
    pub ffn: Option<Arc<dyn FfnSpec>>,
    /// The thresholds that inputs of every layer's linears have to exceed, in a model without experts; none skips nothing.
    pub thresholds: Option<Vec<LayerThresholds>>,
    /// The family of the dense model.
    family: &'static Family,
    /// True if the weights are a part of a model that reads images, too.
    is_part: bool,
    /// Lists keys of config.json that may be mistakes.
    notices: Vec<String>,
    /// Every layer's sizes, when they are not the same.
    layers: Option<Vec<LayerShape>>,
    raw: Map<String, Value>,
}

/// Sizes that may differ from layer to layer.
///
/// ```
/// use dsmoe_core::config::LayerShape;
/// use dsmoe_core::init::preset;
///
/// let mut config = preset("tiny")?;
/// // Half of the neurons of the last layer go.
/// let mut layers: Vec<LayerShape> = config.layers().collect();
/// layers[3].intermediate /= 2;
/// config.set_layers(layers);
/// assert_eq!((config.layer(0).intermediate, config.layer(3).intermediate), (512, 256));
/// assert!(config.to_json().contains("layer_shapes"));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerShape {
    /// Query heads.
    #[serde(rename = "num_attention_heads")]
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    #[serde(rename = "num_key_value_heads")]
    pub num_kv_heads: usize,
    /// Width of the FFN (D).
    #[serde(rename = "intermediate_size")]
    pub intermediate: usize,
}

impl Config {
    /// Reads `config.json`, and adds the end-of-text tokens of `generation_config.json` when that exists; or reads the
    /// metadata of the GGUF file that `dir` names or holds.
    ///
    /// # Errors
    /// Either file cannot be read or has a field that is missing, out of range or not supported.
    pub fn load(dir: &Path) -> Result<Config> {
        check_exists(dir)?;
        if let Some(file) = gguf::file_of(dir)? {
            let metadata = gguf::config_json(&file, &gguf::Container::open(&file)?)?;
            return Config::from_json(&file, &Value::Object(metadata).to_string());
        }
        let path = dir.join(CONFIG_FILE);
        if !path.is_file() && dir.join(MISTRAL_CONFIG_FILE).is_file() {
            let problem =
                format!("there is no {CONFIG_FILE}; {MISTRAL_CONFIG_FILE} is of Mistral's own format");
            return Err(Error::path(dir, problem, "take the model in Hugging Face's format"));
        }
        if dir.is_dir() && fs::symlink_metadata(&path).is_err() {
            return Err(no_config(dir));
        }
        let mut config = Config::from_json(&path, &read_config(&path)?)?;
        let path = dir.join(GENERATION_CONFIG_FILE);
        if is_present(&path)? {
            let map = parse_object(&path, &read_config(&path)?)?;
            let fields = Fields { path: &path, prefix: "", map: &map };
            for id in fields.token_ids("eos_token_id")?.unwrap_or_default() {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
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
        let outer = Fields { path, prefix: "", map: &raw };
        check_not_quantised(&outer)?;
        match wrapped::text_model(&outer)? {
            None => Config::from_object(path, "", &raw),
            Some(inner) => {
                let mut config = Config::from_object(path, wrapped::PREFIX, &inner)?;
                config.is_part = true;
                config.notices.insert(0, wrapped::notice(&outer)?);
                Ok(config)
            }
        }
    }

    /// Reads the configuration of one decoder; `prefix` is that of its keys in messages.
    fn from_object(path: &Path, prefix: &str, raw: &Map<String, Value>) -> Result<Config> {
        let fields = Fields { path, prefix, map: raw };
        let family = family_of(&fields)?;
        fields.check_kind()?;
        let defaults = family.defaults;

        let hidden = fields.dimension("hidden_size")?;
        let [num_heads, num_kv_heads] = heads(&fields, family)?;
        let head_dim = head_dim(&fields, family, hidden, num_heads)?;
        let num_layers = fields.integer("num_hidden_layers", LARGEST_LAYERS)?;
        let moe = moe::read(&fields, MoeSizes { num_layers, hidden })?;
        let mixture = fields.mixture(family, num_layers)?;
        let experts: usize = mixture.iter().flat_map(|spec| &spec.experts).sum();
        if experts > MOST_EXPERTS {
            let problem = format!("is {num_layers}, and its layers have {experts} experts in all");
            let help = format!("use at most {MOST_EXPERTS} experts");
            return Err(fields.wrong("num_hidden_layers", problem, help));
        }
        let max_position = fields.dimension_or("max_position_embeddings", defaults.max_position)?;
        let mut architecture =
            family.architecture(&fields, Sizes { hidden, num_layers, head_dim, max_position })?;
        architecture.output_bias = fields.output_bias(&architecture)?;
        let notices = rope_keys::notices(&fields, &family.rope, &architecture.ropes);
        let token = |key: &str, default: Option<u32>| -> Result<Vec<u32>> {
            let given = fields.token_ids(key)?;
            Ok(if fields.has(key) { given.unwrap_or_default() } else { default.into_iter().collect() })
        };
        let config = Config {
            vocab_size: fields.dimension("vocab_size")?,
            hidden,
            intermediate: match &mixture {
                Some(spec) => spec.most_experts() * spec.width,
                None => fields.dimension("intermediate_size")?,
            },
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            max_position: positions(&architecture, max_position),
            architecture,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(defaults.tied),
            bos_token_id: token("bos_token_id", defaults.bos)?.first().copied(),
            eos_token_ids: token("eos_token_id", defaults.eos)?,
            initializer_range: fields.positive("initializer_range")?.unwrap_or(0.02),
            moe,
            ffn: None,
            thresholds: None,
            family,
            is_part: false,
            notices,
            layers: None,
            raw: Map::new(),
        };
        let layers = fields.layer_shapes(&config)?;
        let config = Config { layers, ..config };
        config.check_size(&fields)?;
        if let Some(moe) = &config.moe {
            for i in 0..config.num_layers {
                partition::check_divisible(config.layer(i).intermediate, moe.experts(i), Some(path))?;
            }
        }
        let ffn = match mixture {
            Some(spec) => {
                fields.check_neurons(&config, &spec)?;
                Some(Arc::new(spec) as Arc<dyn FfnSpec>)
            }
            None => {
                let read = |(kind, settings): (&str, _)| ffn::read_spec(path, kind, &config, &settings);
                fields.ffn()?.map(read).transpose()?
            }
        };
        let config = Config { ffn, raw: raw.clone(), ..config };
        let thresholds = fields.thresholds(&config)?;
        Ok(Config { thresholds, ..config })
    }

    /// Returns the sizes of layer `i`.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn layer(&self, i: usize) -> LayerShape {
        assert!(i < self.num_layers, "config: layer {i} of {}", self.num_layers);
        match &self.layers {
            Some(layers) => layers[i],
            None => LayerShape {
                num_heads: self.num_heads,
                num_kv_heads: self.num_kv_heads,
                intermediate: self.intermediate,
            },
        }
    }

    /// Returns the widths of the queries, and of the keys or values, of layer `i`.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn attention_widths(&self, i: usize) -> [usize; 2] {
        let LayerShape { num_heads, num_kv_heads, .. } = self.layer(i);
        [num_heads * self.head_dim, num_kv_heads * self.head_dim]
    }

    /// Returns the lengths of the weights that norm queries and keys of layer `i`; none without such norms.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn qk_norm_widths(&self, i: usize) -> Option<[usize; 2]> {
        match self.architecture.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some([self.head_dim; 2]),
            QkNorm::Whole => Some(self.attention_widths(i)),
        }
    }

    /// Returns the sizes of all layers.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = LayerShape> + '_ {
        (0..self.num_layers).map(|i| self.layer(i))
    }

    /// Returns whether all layers have the same sizes.
    pub fn is_even(&self) -> bool {
        self.layers.is_none()
    }

    /// Sets the sizes of every layer. When all are equal the model stays a plain LLaMA; otherwise config.json gets
    /// `layer_shapes`.
    ///
    /// # Panics
    /// There are not as many shapes as layers, a size is 0, or key-value heads do not divide the heads of a layer.
    pub fn set_layers(&mut self, layers: Vec<LayerShape>) {
        assert_eq!(layers.len(), self.num_layers, "config: shapes and layers");
        for (i, LayerShape { num_heads, num_kv_heads, intermediate }) in layers.iter().enumerate() {
            let sound = *num_kv_heads > 0 && num_heads.is_multiple_of(*num_kv_heads) && *num_heads > 0;
            assert!(sound && *intermediate > 0, "config: layer {i} of shape {:?}", layers[i]);
        }
        let largest = largest(&layers);
        (self.num_heads, self.num_kv_heads) = (largest.num_heads, largest.num_kv_heads);
        self.intermediate = largest.intermediate;
        self.raw.insert("num_attention_heads".to_owned(), json!(self.num_heads));
        self.raw.insert("num_key_value_heads".to_owned(), json!(self.num_kv_heads));
        self.raw.insert("intermediate_size".to_owned(), json!(self.intermediate));
        self.layers = layers.iter().any(|layer| *layer != layers[0]).then_some(layers);
        self.state_head_dim();
    }

    /// Returns the configuration of the model without all layers but `kept`, ascending; lists by layer lose their other
    /// entries. Returns none where the remaining layers would be others: the family gives windows or rotations by the
    /// number of a layer.
    ///
    /// # Panics
    /// `kept` is empty or names a layer that there is not.
    pub fn with_layers(&self, kept: &[usize]) -> Option<Config> {
        assert!(!kept.is_empty() && kept.iter().all(|&i| i < self.num_layers), "config: layers {kept:?}");
        let path = Path::new(CONFIG_FILE);
        let mut raw = parse_object(path, &self.to_json()).ok()?;
        raw.insert("num_hidden_layers".to_owned(), json!(kept.len()));
        for key in ["layer_types", "no_rope_layers", "layer_shapes", THRESHOLDS_KEY] {
            if let Some(Value::Array(list)) = raw.get(key) {
                let left: Vec<&Value> = kept.iter().filter_map(|&i| list.get(i)).collect();
                let left = json!(left);
                raw.insert(key.to_owned(), left);
            }
        }
        if self.layers.is_some() {
            let shapes: Vec<LayerShape> = kept.iter().map(|&i| self.layer(i)).collect();
            let most = largest(&shapes);
            raw.insert("num_attention_heads".to_owned(), json!(most.num_heads));
            raw.insert("num_key_value_heads".to_owned(), json!(most.num_kv_heads));
            raw.insert("intermediate_size".to_owned(), json!(most.intermediate));
        }
        let config = Config::from_json(path, &Value::Object(raw).to_string()).ok()?;
        let same = |(new, &old): (usize, &usize)| {
            config.architecture.layers[new] == self.architecture.layers[old]
                && config.layer(new) == self.layer(old)
        };
        kept.iter().enumerate().all(same).then_some(config)
    }

    /// Sets the width of the residual stream; heads keep theirs.
    ///
    /// # Panics
    /// `hidden` is 0.
    pub fn set_hidden(&mut self, hidden: usize) {
        assert!(hidden > 0, "config: hidden size 0");
        self.hidden = hidden;
        self.raw.insert("hidden_size".to_owned(), json!(hidden));
        self.state_head_dim();
    }

    /// Writes out `head_dim` where it would be taken for another.
    fn state_head_dim(&mut self) {
        if self.hidden != self.num_heads * self.head_dim || self.raw.contains_key("head_dim") {
            self.raw.insert("head_dim".to_owned(), json!(self.head_dim));
        }
    }

    /// Returns the number of experts per layer, the largest where layers differ; none without routers.
    pub fn num_experts(&self) -> Option<usize> {
        (0..self.num_layers).filter_map(|layer| self.layer_experts(layer)).max()
    }

    /// Returns the number of experts of a layer; none without routers.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn layer_experts(&self, layer: usize) -> Option<usize> {
        let moe = self.moe.as_ref().map(|moe| moe.experts(layer));
        moe.or_else(|| self.ffn.as_ref().map(|spec| spec.num_experts(layer)))
    }

    /// Returns the number of experts that every token runs, where it is fixed.
    pub fn fixed_active(&self) -> Option<f64> {
        self.ffn.as_ref().and_then(|spec| spec.active_experts())
    }

    /// Returns whether every FFN is dense, and no input of a linear is skipped.
    pub fn is_dense(&self) -> bool {
        self.moe.is_none() && self.ffn.is_none() && self.thresholds.is_none()
    }

    /// Returns `model_type` of config.json: the family's for a model that transformers loads directly.
    pub fn model_type(&self) -> &'static str {
        let of_family = self.moe.is_none() && self.ffn.is_some() == self.family.has_experts();
        let fits = self.mixture().is_none_or(MixtureSpec::fits_family);
        let changed = self.architecture.output_bias || self.thresholds.is_some();
        let plain = of_family && fits && self.is_even() && !changed;
        if plain { self.family.model_type } else { "dsmoe" }
    }

    /// Returns the family of the model, or of the dense model that it was made from.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Returns whether this is the text model of a directory that holds a vision tower, too.
    pub(crate) fn is_part(&self) -> bool {
        self.is_part
    }

    /// Returns what in config.json has no effect or may not be what its author meant, one sentence each.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    fn check_size(&self, fields: &Fields<'_>) -> Result<()> {
        let wide = |n: usize| n as u128;
        let layer = |layer: LayerShape| {
            let heads = wide(layer.num_heads + layer.num_kv_heads);
            wide(self.hidden) * (2 * wide(self.head_dim) * heads + 3 * wide(layer.intermediate))
        };
        let total = self.layers().map(layer).sum::<u128>() + 2 * wide(self.vocab_size) * wide(self.hidden);
        let width = wide(self.num_heads) * wide(self.head_dim);
        if width > u128::from(fields::LARGEST_DIMENSION) {
            let problem =
                format!("is {} and gives {} heads a width of {width}", self.head_dim, self.num_heads);
            return Err(fields.wrong("head_dim", problem, "correct head_dim or num_attention_heads"));
        }
        if total > LARGEST_MODEL {
            let problem = format!("and the other sizes make a model of {total} parameters");
            return Err(fields.wrong("hidden_size", problem, "correct the sizes"));
        }
        Ok(())
    }

    /// Returns the JSON of the source with `model_type`, `architectures`, `dsmoe`, `ffn`, `layer_shapes`, `output_bias` and
    /// `activation_thresholds` set by the fields, and with the rotation in the spellings of transformers 4 and 5, without `auto_map`.
    pub fn to_json(&self) -> String {
        let mut raw = self.raw.clone();
        let model_type = self.model_type();
        let is_native = model_type == "dsmoe";
        let class = if is_native { "DsmoeForCausalLM" } else { self.family.class };
        raw.insert("model_type".to_owned(), json!(model_type));
        raw.insert("architectures".to_owned(), json!([class]));
        // Code of the source is not copied, and it would run another model.
        raw.shift_remove("auto_map");
        // Some releases of transformers compute with a null.
        if raw.get("head_dim").is_some_and(Value::is_null) {
            raw.insert("head_dim".to_owned(), json!(self.head_dim));
        }
        rope_keys::write_both(&mut raw, &self.family.rope, &self.architecture.ropes);
        let base = (is_native && self.family.model_type != "llama").then(|| json!(self.family.model_type));
        let ffn = self.ffn.as_ref().filter(|_| is_native).map(|spec| {
            let kind = std::iter::once(("type".to_owned(), json!(spec.kind())));
            Value::Object(kind.chain(spec.settings()).collect())
        });
        for (key, value) in [
            (BASE_KEY, base),
            ("dsmoe", self.moe.as_ref().map(MoeConfig::to_value)),
            ("ffn", ffn),
            ("layer_shapes", self.layers.as_ref().map(|layers| json!(layers))),
            (OUTPUT_BIAS_KEY, self.architecture.output_bias.then(|| json!(true))),
            (THRESHOLDS_KEY, self.thresholds.as_ref().map(|layers| json!(layers))),
        ] {
            match value {
                None => raw.shift_remove(key),
                Some(value) => raw.insert(key.to_owned(), value),
            };
        }
        format!("{:#}\n", Value::Object(raw))
    }

    /// Writes `config.json` to the existing directory `dir` and syncs it.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join(CONFIG_FILE);
        write_synced(&path, self.to_json().as_bytes()).map_err(Error::io(&path))
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

fn check_not_quantised(fields: &Fields<'_>) -> Result<()> {
    const KEY: &str = "quantization_config";
    match fields.get(KEY) {
        None => Ok(()),
        Some(_) => {
            let help = "use the checkpoint it was quantised from";
            Err(fields.wrong(KEY, "is present and not supported", help))
        }
    }
}

/// Returns the family that `model_type` names, or `base_model_type` of a native directory.
fn family_of(fields: &Fields<'_>) -> Result<&'static Family> {
    check_not_quantised(fields)?;
    let known = || family::all().map(|family| family.model_type).collect::<Vec<_>>().join(", ");
    let (key, name) = match fields.text("model_type")? {
        Some("dsmoe") => (BASE_KEY, fields.text(BASE_KEY)?.unwrap_or("llama")),
        Some(name) => ("model_type", name),
        None => {
            let help = format!("use a model of one of the types {}", known());
            return Err(fields.wrong("model_type", "is missing", help));
        }
    };
    family::find(name).ok_or_else(|| {
        let reason = family::reason_against(name).map_or(String::new(), |reason| format!(": {reason}"));
        let problem = format!("is {:?} and not supported{reason}", shown(name));
        fields.wrong(key, problem, format!("use a model of type dsmoe, {}", known()))
    })
}

/// Returns the heads of queries, and those of keys and values.
fn heads(fields: &Fields<'_>, family: &Family) -> Result<[usize; 2]> {
    const KEY: &str = "num_key_value_heads";
    let heads = fields.dimension("num_attention_heads")?;
    if !fields.has(KEY) && !family.defaults.kv_heads_are_heads {
        return Err(fields.wrong(KEY, "is missing", "add it: they need not be as many as the heads"));
    }
    let kv_heads = fields.dimension_or(KEY, heads)?;
    if !heads.is_multiple_of(kv_heads) {
        let problem = format!("is {kv_heads} and does not divide num_attention_heads {heads}");
        return Err(fields.wrong(KEY, problem, "correct one of them"));
    }
    Ok([heads, kv_heads])
}

fn head_dim(fields: &Fields<'_>, family: &Family, hidden: usize, num_heads: usize) -> Result<usize> {
    let default = match family.defaults.head_dim {
        HeadDim::Fixed(width) => width,
        HeadDim::OfHidden => {
            if fields.get("head_dim").is_none() && !hidden.is_multiple_of(num_heads) {
                let problem = format!("is {hidden} and not divisible by num_attention_heads {num_heads}");
                return Err(fields.wrong("hidden_size", problem, "add head_dim"));
            }
            hidden / num_heads
        }
    };
    let head_dim = fields.dimension_or("head_dim", default)?;
    if !head_dim.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", format!("is {head_dim}"), "use an even number"));
    }
    Ok(head_dim)
}

/// Returns the positions that a model takes: dynamic scaling goes past those that it was made for, by its factor.
fn positions(architecture: &Architecture, max_position: usize) -> usize {
    let factor = architecture.ropes.iter().filter_map(|rope| match rope.scaling {
        RopeScaling::Dynamic { factor, .. } => Some(factor),
        _ => None,
    });
    let longest = (max_position as f64 * factor.fold(1.0, f64::max)) as usize;
    longest.min(fields::LARGEST_DIMENSION as usize)
}

/// Returns the largest of each size.
fn largest(layers: &[LayerShape]) -> LayerShape {
    let most = |size: fn(&LayerShape) -> usize| layers.iter().map(size).max().unwrap_or(0);
    LayerShape {
        num_heads: most(|layer| layer.num_heads),
        num_kv_heads: most(|layer| layer.num_kv_heads),
        intermediate: most(|layer| layer.intermediate),
    }
}

/// Says what a directory without config.json is, as far as its files tell.
fn no_config(dir: &Path) -> Error {
    if dir.join(ADAPTER_CONFIG_FILE).is_file() {
        let problem = "is an adapter and no whole model";
        return Error::path(
            dir,
            problem,
            "merge it into its base model (peft: merge_and_unload, save_pretrained)",
        );
    }
    let snapshots = dir.join(SNAPSHOTS);
    if snapshots.is_dir() {
        let entries = fs::read_dir(&snapshots).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut found: Vec<PathBuf> = entries.filter(|path| path.join(CONFIG_FILE).is_file()).collect();
        found.sort();
        let help = match &found[..] {
            [] => "download the model again: `hf download OWNER/NAME` prints its directory".to_owned(),
            [first, ..] => format!("name a directory in it: {}", first.display()),
        };
        return Error::path(dir, "is a folder of the Hub's cache and not the model's directory", help);
    }
    // A run of training writes its model when it is done.
    if dir.join(CHECKPOINTS).is_dir() {
        let help = "continue it by `dsmoe train` with {resume}, or name the model of one of its checkpoints";
        return Error::path(dir, "the run has not finished, and there is no model yet", help);
    }
    let help = "name a directory that transformers' save_pretrained wrote, or a GGUF file";
    Error::path(dir, format!("there is no {CONFIG_FILE} and no GGUF file in it"), help)
}
