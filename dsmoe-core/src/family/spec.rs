//! The description of a family, and what families read from config.json alike.

use dsmoe_kernels::Activation;

use super::mixture::Mixture;
use crate::checkpoint::Renames;
use crate::config::arch::{Architecture, LayerAttention};
use crate::config::fields::Fields;
use crate::config::rope::Rope;
use crate::config::rope_keys::{self, RopeRules, RopeSizes};
use crate::error::{Result, shown};

/// A family of decoders: how its config.json is read, and what its tensors are called.
///
/// ```
/// use dsmoe_core::family::{Family, all, find};
///
/// let family: &Family = find("mixtral").unwrap();
/// assert!(family.has_experts());
/// assert!(all().any(|family| family.model_type == "qwen3"));
/// ```
#[derive(Debug)]
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// The class in transformers.
    pub class: &'static str,
    pub(crate) defaults: Defaults,
    pub(crate) rope: RopeRules,
    /// True if q, k and v are stored as `qkv_proj`, and gate and up as `gate_up_proj`.
    pub(crate) fused: bool,
    /// The experts of its FFNs; none for a family of dense models.
    pub(crate) mixture: Option<Mixture>,
    /// Sets the switches in which a model differs from LLaMA.
    pub(crate) switches: fn(&mut Architecture, &Fields<'_>, Sizes) -> Result<()>,
}

/// The defaults of keys that config.json leaves out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    pub(crate) rms_norm_eps: f64,
    pub(crate) max_position: usize,
    pub(crate) tied: bool,
    pub(crate) head_dim: HeadDim,
    /// True if key-value heads are then as many as heads; false if the family's default is another number, which
    /// nobody means.
    pub(crate) kv_heads_are_heads: bool,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    /// Keys of the gate's activation, the first that is there holds.
    pub(crate) activation_keys: &'static [&'static str],
    pub(crate) activation: Activation,
    /// True if `gelu` means gelu_tanh.
    pub(crate) gelu_is_tanh: bool,
}

/// Width of a head where config.json leaves it out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum HeadDim {
    /// The hidden size over the heads.
    OfHidden,
    /// This.
    Fixed(usize),
}

impl Defaults {
    /// LLaMA's.
    pub(crate) const LLAMA: Defaults = Defaults {
        rms_norm_eps: 1e-6,
        max_position: 2048,
        tied: false,
        head_dim: HeadDim::OfHidden,
        kv_heads_are_heads: true,
        bos: Some(1),
        eos: Some(2),
        activation_keys: &["hidden_act"],
        activation: Activation::Silu,
        gelu_is_tanh: false,
    };
}

/// Sizes that switches depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) num_layers: usize,
    pub(crate) head_dim: usize,
    pub(crate) max_position: usize,
}

impl PartialEq for Family {
    fn eq(&self, other: &Family) -> bool {
        self.model_type == other.model_type
    }
}

impl Family {
    /// LLaMA without a name and without keys of its own.
    pub(crate) const PLAIN: Family = Family {
        model_type: "",
        class: "",
        defaults: Defaults::LLAMA,
        rope: RopeRules::LLAMA,
        fused: false,
        mixture: None,
        switches: |_, _, _| Ok(()),
    };

    /// Reads the switches of a model of this family.
    pub(crate) fn architecture(&self, fields: &Fields<'_>, sizes: Sizes) -> Result<Architecture> {
        let rope_sizes = RopeSizes { head_dim: sizes.head_dim, max_position: sizes.max_position };
        let ropes = rope_keys::read(fields, &self.rope, rope_sizes)?;
        let mut architecture =
            Architecture::llama(sizes.head_dim, sizes.num_layers, Rope::plain(1.0, sizes.head_dim));
        architecture.ropes = ropes;
        architecture.activation = self.activation(fields)?;
        (self.switches)(&mut architecture, fields, sizes)?;
        Ok(architecture)
    }

    /// Returns whether its models are mixtures of experts.
    pub fn has_experts(&self) -> bool {
        self.mixture.is_some()
    }

    /// Returns the names that its tensors have in files.
    pub(crate) fn renames(&self) -> Renames {
        self.mixture.as_ref().map_or(&[], |mixture| mixture.renames)
    }

    fn activation(&self, fields: &Fields<'_>) -> Result<Activation> {
        let Defaults { activation_keys, activation, gelu_is_tanh, .. } = self.defaults;
        let Some(key) = activation_keys.iter().find(|key| fields.get(key).is_some()) else {
            return Ok(activation);
        };
        match fields.text(key)? {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some("gelu") if gelu_is_tanh => Ok(Activation::GeluTanh),
            other => {
                let problem = format!("is {:?} and not supported", shown(other.unwrap_or_default()));
                Err(fields.wrong(key, problem, "use a model with silu or gelu_pytorch_tanh"))
            }
        }
    }
}

/// Sets the biases of LLaMA's keys `attention_bias` and `mlp_bias`.
pub(super) fn biases(architecture: &mut Architecture, fields: &Fields<'_>) -> Result<()> {
    attention_bias(architecture, fields)?;
    architecture.mlp_bias = fields.flag("mlp_bias")?.unwrap_or(false);
    Ok(())
}

/// Sets the biases of the key `attention_bias`: those of q, k, v and o.
pub(super) fn attention_bias(architecture: &mut Architecture, fields: &Fields<'_>) -> Result<()> {
    let bias = fields.flag("attention_bias")?.unwrap_or(false);
    (architecture.qkv_bias, architecture.o_bias) = (bias, bias);
    Ok(())
}

/// Returns which layers are of the kind with a window: those of `layer_types`, else those of `default`.
pub(super) fn sliding_layers(
    fields: &Fields<'_>,
    num_layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    const KEY: &str = "layer_types";
    let Some(kinds) = fields.texts(KEY)? else { return Ok((0..num_layers).map(default).collect()) };
    if kinds.len() != num_layers {
        let problem = format!("has {} entries and num_hidden_layers is {num_layers}", kinds.len());
        return Err(fields.wrong(KEY, problem, "give one for each layer"));
    }
    let kind = |(i, kind): (usize, &str)| match kind {
        rope_keys::SLIDING => Ok(true),
        rope_keys::FULL => Ok(false),
        other => {
            let problem = format!("is {:?} and not supported", shown(other));
            let help = "use a model of full_attention and sliding_attention layers";
            Err(fields.wrong(&format!("{KEY}[{i}]"), problem, help))
        }
    };
    kinds.into_iter().enumerate().map(kind).collect()
}

/// Returns `sliding_window`: `default` where the key is absent, none where it is null.
pub(super) fn window(fields: &Fields<'_>, default: Option<usize>) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    if fields.has(KEY) { fields.dimension_opt(KEY) } else { Ok(default) }
}

/// Sets the window of the layers that are `sliding`.
pub(super) fn set_windows(architecture: &mut Architecture, window: Option<usize>, sliding: &[bool]) {
    for (layer, &sliding) in architecture.layers.iter_mut().zip(sliding) {
        layer.window = window.filter(|_| sliding);
    }
}

/// Gives layers that are `sliding` the second rotation.
pub(super) fn set_ropes(architecture: &mut Architecture, sliding: &[bool]) {
    for (layer, &sliding) in architecture.layers.iter_mut().zip(sliding) {
        *layer = LayerAttention { rope: Some(usize::from(sliding)), ..*layer };
    }
}

/// Reads a factor that multiplies something: 1 where it is absent.
pub(super) fn multiplier(fields: &Fields<'_>, key: &str) -> Result<f64> {
    Ok(fields.factor(key)?.unwrap_or(1.0))
}

/// Reads a soft cap: `default` where the key is absent, none where it is null.
pub(super) fn cap(fields: &Fields<'_>, key: &str, default: Option<f32>) -> Result<Option<f32>> {
    if fields.has(key) { Ok(fields.positive(key)?.map(|cap| cap as f32)) } else { Ok(default) }
}
