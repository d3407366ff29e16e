//! The metadata that a configuration stands for; what a file cannot state is refused by name.

use std::path::Path;

use super::arch::Arch;
use super::value::Value;
use crate::config::{Config, Rope, RopeScaling};
use crate::error::{Error, Result};

const NATIVE: &str = "export it as native: llama.cpp has no graph for that";

/// Keys without the prefix of the architecture.
pub(crate) type Keys = Vec<(&'static str, Value)>;

/// A small tensor that stands for settings of RoPE: name and values.
pub(crate) type RopeTensor = (&'static str, Vec<f32>);

fn count(n: usize) -> Value {
    Value::Unsigned(n as u64)
}

fn number(x: f64) -> Value {
    Value::F32(x as f32)
}

/// Returns the keys of the architecture and the tensors of its RoPE; `path` is for messages.
pub(crate) fn of_config(path: &Path, config: &Config, arch: &Arch) -> Result<(Keys, Vec<RopeTensor>)> {
    let from = From { path, config, arch };
    let mut keys = vec![
        ("vocab_size", count(config.vocab_size)),
        ("context_length", count(config.max_position)),
        ("embedding_length", count(config.hidden)),
        ("block_count", count(config.num_layers)),
        ("feed_forward_length", count(config.intermediate)),
        ("attention.head_count", count(config.num_heads)),
        ("attention.head_count_kv", count(config.num_kv_heads)),
        ("attention.key_length", count(config.head_dim)),
        ("attention.value_length", count(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", number(config.rms_norm_eps)),
    ];
    keys.extend(from.windows()?);
    keys.extend(from.scales()?);
    let (rope, tensors) = from.rope()?;
    keys.extend(rope);
    Ok((keys, tensors))
}

struct From<'a> {
    path: &'a Path,
    config: &'a Config,
    arch: &'a Arch,
}

impl From<'_> {
    fn wrong(&self, what: &str, problem: &str) -> Error {
        Error::field(self.path, what, problem, NATIVE)
    }

    /// Returns the window, in the layers in which the graph of the architecture has one.
    fn windows(&self) -> Result<Keys> {
        let layers = &self.config.architecture.layers;
        let Some(window) = layers.iter().find_map(|layer| layer.window) else { return Ok(Vec::new()) };
        let expected = |i: usize| match self.arch.model_type {
            "gemma2" => i.is_multiple_of(2),
            "gemma3_text" => !(i + 1).is_multiple_of(6),
            "olmo3" => !(i + 1).is_multiple_of(4),
            _ => false,
        };
        let wanted = |i: usize| expected(i).then_some(window);
        if layers.iter().enumerate().all(|(i, layer)| layer.window == wanted(i)) {
            return Ok(vec![("attention.sliding_window", count(window))]);
        }
        // A window of all positions is none, unless its layers have a RoPE of their own.
        let same_rope = self.sliding_rope().is_none_or(|rope| Some(rope) == self.full_rope());
        if window >= self.config.max_position && same_rope {
            // Without the key a reader takes Gemma 2's usual window.
            let needed = self.arch.model_type == "gemma2";
            return Ok(if needed { vec![("attention.sliding_window", count(window))] } else { Vec::new() });
        }
        Err(self.wrong("sliding_window", "is of layers that have none in llama.cpp"))
    }

    /// Returns factors and caps.
    fn scales(&self) -> Result<Keys> {
        let (config, architecture) = (self.config, &self.config.architecture);
        let root = |width: f64| (1.0 / width.sqrt()) as f32;
        let mut keys = Vec::new();
        let usual = match (self.arch.model_type, config.num_layers) {
            ("gemma2", 46) | ("gemma3_text", 62) => root(config.hidden as f64 / config.num_heads as f64),
            _ => root(config.head_dim as f64),
        };
        let granite = self.arch.model_type == "granite";
        if granite {
            keys.extend([
                ("embedding_scale", Value::F32(architecture.embed_scale)),
                ("residual_scale", Value::F32(architecture.residual_scale)),
                ("logit_scale", Value::F32(1.0 / architecture.logit_scale)),
                ("attention.scale", Value::F32(architecture.attn_scale)),
            ]);
        } else if (architecture.attn_scale / usual - 1.0).abs() > 1e-6 {
            return Err(self.wrong("query_pre_attn_scalar", "is not the one that llama.cpp computes with"));
        }
        match (architecture.attn_cap, self.arch.model_type) {
            (Some(cap), "gemma2") => keys.push(("attn_logit_softcapping", Value::F32(cap))),
            (None, "gemma2") => return Err(self.wrong("attn_logit_softcapping", "is null")),
            (Some(_), _) => return Err(self.wrong("attn_logit_softcapping", "is set")),
            (None, _) => {}
        }
        match (architecture.final_cap, self.arch.model_type) {
            (Some(cap), "gemma2" | "gemma3_text") => {
                keys.push(("final_logit_softcapping", Value::F32(cap)));
            }
            (None, "gemma2") => return Err(self.wrong("final_logit_softcapping", "is null")),
            (Some(_), _) => return Err(self.wrong("final_logit_softcapping", "is set")),
            (None, _) => {}
        }
        Ok(keys)
    }

    /// Returns the keys of RoPE and its tensors.
    fn rope(&self) -> Result<(Keys, Vec<RopeTensor>)> {
        let architecture = &self.config.architecture;
        let rotated = |i: usize| self.arch.model_type != "smollm3" || !(i + 1).is_multiple_of(4);
        if architecture.layers.iter().enumerate().any(|(i, layer)| layer.rope.is_some() != rotated(i)) {
            return Err(self.wrong("no_rope_layers", "is another than every fourth layer"));
        }
        let Some(full) = self.full_rope() else { return Err(self.wrong("rope", "is of no layer")) };
        if full.width != self.config.head_dim && self.arch.model_type != "phi3" {
            return Err(self.wrong("partial_rotary_factor", "turns a part of each head alone"));
        }
        let mut keys =
            vec![("rope.freq_base", number(full.theta)), ("rope.dimension_count", count(full.width))];
        if let Some(rope) = self.sliding_rope() {
            let plain = rope.scaling == RopeScaling::None && rope.width == self.config.head_dim;
            let stated = match self.arch.model_type {
                "gemma3_text" => plain,
                "olmo3" => plain && rope.theta == full.theta,
                _ => rope == full,
            };
            if !stated {
                return Err(self.wrong("rope_parameters.sliding_attention", "is not stated in GGUF"));
            }
            if self.arch.model_type == "gemma3_text" {
                keys.push(("rope.freq_base_swa", number(rope.theta)));
            }
        }
        let (scaling, tensors) = self.scaling(full)?;
        keys.extend(scaling);
        Ok((keys, tensors))
    }

    /// Returns the RoPE of the layers without a window, or of all layers where each has one.
    fn full_rope(&self) -> Option<&Rope> {
        let architecture = &self.config.architecture;
        let layers = || architecture.layers.iter().rev();
        let full = layers().filter(|layer| layer.window.is_none()).find_map(|layer| layer.rope);
        full.or_else(|| layers().find_map(|layer| layer.rope)).and_then(|rope| architecture.ropes.get(rope))
    }

    /// Returns the RoPE of the layers with a window, if there are any that have one.
    fn sliding_rope(&self) -> Option<&Rope> {
        let architecture = &self.config.architecture;
        let layers = architecture.layers.iter().filter(|layer| layer.window.is_some());
        layers.filter_map(|layer| layer.rope).next().and_then(|rope| architecture.ropes.get(rope))
    }

    fn scaling(&self, rope: &Rope) -> Result<(Keys, Vec<RopeTensor>)> {
        let text = |text: &str| ("rope.scaling.type", Value::Text(text.to_owned()));
        let original = |n: usize| ("rope.scaling.original_context_length", count(n));
        let (keys, tensors) = match &rope.scaling {
            RopeScaling::None => (Vec::new(), Vec::new()),
            RopeScaling::Linear { factor } => {
                (vec![text("linear"), ("rope.scaling.factor", number(*factor))], Vec::new())
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let plain = Rope { scaling: RopeScaling::None, ..rope.clone() };
                let pairs = plain.frequencies(0).into_iter().zip(rope.frequencies(0));
                let divisors = pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect();
                // llama.cpp reads the divisors alone; the numbers tell what they were made from.
                let [factor_key, low_key, high_key] = super::rope::LLAMA3_KEYS;
                let keys = vec![
                    original(*original_max_position),
                    (factor_key, number(*factor)),
                    (low_key, number(*low_freq_factor)),
                    (high_key, number(*high_freq_factor)),
                ];
                (keys, vec![(super::rope::DIVISORS, divisors)])
            }
            RopeScaling::Yarn {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            } if *truncate => {
                let own = 1.0 + 0.1 * factor.ln();
                let keys = vec![
                    text("yarn"),
                    ("rope.scaling.factor", number(*factor)),
                    original(*original_max_position),
                    ("rope.scaling.attn_factor", number(attention_factor / own)),
                    ("rope.scaling.yarn_beta_fast", number(*beta_fast)),
                    ("rope.scaling.yarn_beta_slow", number(*beta_slow)),
                ];
                (keys, Vec::new())
            }
            RopeScaling::LongRope { short, long, original_max_position, attention_factor, .. }
                if self.arch.fused =>
            {
                let list = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
                let keys = vec![
                    original(*original_max_position),
                    ("rope.scaling.attn_factor", number(*attention_factor)),
                ];
                (keys, vec![(super::rope::SHORT, list(short)), (super::rope::LONG, list(long))])
            }
            other => {
                let problem = format!("is {}, which GGUF cannot state here", other.name());
                return Err(self.wrong("rope_scaling.rope_type", &problem));
            }
        };
        Ok((keys, tensors))
    }
}
