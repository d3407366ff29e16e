//! LLaMA-MoE's own checkpoint layout (`modeling_llama_moe_hf.py`): model type `llama_moe`, one tensor per expert and
//! projection.
//!
//! ```text
//! mlp.gate_proj.weight [D, d]  ->  mlp.calculator.experts.weight_gate.E [D/n, d], the same for up
//! mlp.down_proj.weight [d, D]  ->  mlp.calculator.experts.weight_down.E [d, D/n]
//! mlp.gate.*                   ->  the same
//! ```

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::Remedy;
use dsmoe_core::checkpoint::{
    Dtype, OutputDir, Progress, TensorInfo, Writer, check_llama_tensors, copy_companions, open_model,
};
use dsmoe_core::config::{CONFIG_FILE, RopeScaling};
use dsmoe_core::convert::source_infos;
use dsmoe_core::ffn::FfnSpec;
use dsmoe_core::files::write_synced;
use dsmoe_router::topk::Scores;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::topk::{TopkSpec, spec_of};

/// The rotary base of LLaMA-MoE's model, regardless of its configuration.
const ROPE_THETA: f64 = 10_000.0;

/// The size of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// The cut of a tensor.
enum Cut {
    Whole,
    /// Experts are row ranges.
    Rows(&'static str),
    /// Experts are column ranges.
    Cols(&'static str),
}

impl Cut {
    fn of(name: &str) -> (Cut, &str) {
        for (suffix, cut) in [
            ("gate_proj.weight", Cut::Rows("weight_gate")),
            ("up_proj.weight", Cut::Rows("weight_up")),
            ("down_proj.weight", Cut::Cols("weight_down")),
        ] {
            if let Some(prefix) = name.strip_suffix(suffix) {
                return (cut, prefix);
            }
        }
        (Cut::Whole, name)
    }

    /// The tensors that `info` becomes.
    fn infos(info: &TensorInfo, num_experts: usize, dtype: Dtype) -> Vec<TensorInfo> {
        let (cut, prefix) = Cut::of(&info.name);
        let (part, shape) = match cut {
            Cut::Whole => return vec![TensorInfo { dtype, ..info.clone() }],
            Cut::Rows(part) => (part, vec![info.shape[0] / num_experts, info.shape[1]]),
            Cut::Cols(part) => (part, vec![info.shape[0], info.shape[1] / num_experts]),
        };
        let name = |expert| format!("{prefix}calculator.experts.{part}.{expert}");
        (0..num_experts).map(|e| TensorInfo { name: name(e), dtype, shape: shape.clone() }).collect()
    }
}

/// Exports a model of the method `llama-moe` in LLaMA-MoE's layout to the new directory `out`, which appears when it is
/// complete. Weights keep their types unless `dtype` is given. The layout's code (remote code of the published
/// models, package `smoe`) is not written.
///
/// # Errors
/// `model` cannot be read or has something that LLaMA-MoE's model has not: residual experts, MoEfication's router, a gate
/// that lost experts, another rotary base, heads of another width, layers of different sizes; `dtype` is not a float; `out` is not
/// empty; the file system refuses.
pub fn export(
    model: &Path,
    out: &Path,
    dtype: Option<Dtype>,
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport> {
    if let Some(dtype) = dtype.filter(|dtype| !dtype.is_float()) {
        let problem = format!("dtype {dtype} is not for weights");
        return Err(dsmoe_core::Error::argument(problem, "use bf16, f16 or f32").into());
    }
    let mut config = Config::load(model)?;
    let spec = exportable(model, &config)?;
    let checkpoint = open_model(model, &config)?;
    check_llama_tensors(&config, &checkpoint)?;
    if let Some(dtype) = dtype {
        config.set_dtype(dtype);
    }

    let n = spec.router.num_experts;
    let sources = source_infos(&checkpoint);
    let infos: Vec<TensorInfo> =
        sources.iter().flat_map(|info| Cut::infos(info, n, dtype.unwrap_or(info.dtype))).collect();
    let total_bytes = infos.iter().map(TensorInfo::len_bytes).sum();
    let report = ExportReport { tensors: infos.len(), bytes: total_bytes };
    let output = OutputDir::create_from(model, out, force)?;
    let mut writer = Writer::create(output.path(), infos.clone())?;
    let mut targets = infos.iter();
    let (mut values, mut part, mut done_bytes) = (Vec::new(), Vec::new(), 0);
    for info in &sources {
        values.resize(info.shape.iter().product(), 0.0);
        checkpoint.read_f32(&info.name, &mut values)?;
        let (cut, _) = Cut::of(&info.name);
        let cols = info.shape.last().copied().unwrap_or(1);
        for expert in 0..if matches!(cut, Cut::Whole) { 1 } else { n } {
            let target = targets.next().expect("declared in this order");
            let len = values.len() / n;
            let values = match cut {
                Cut::Whole => &values[..],
                Cut::Rows(_) => &values[expert * len..][..len],
                Cut::Cols(_) => {
                    part.clear();
                    values
                        .chunks_exact(cols)
                        .for_each(|row| part.extend(&row[expert * cols / n..][..cols / n]));
                    &part[..]
                }
            };
            writer.write_f32(&target.name, values)?;
            done_bytes += target.len_bytes();
            progress(Progress { done_bytes, total_bytes });
        }
    }
    writer.finish()?;
    copy_companions(model, output.path())?;
    let path = output.path().join(CONFIG_FILE);
    write_synced(&path, config_json(&config, &spec).as_bytes()).map_err(dsmoe_core::Error::io(&path))?;
    output.commit()?;
    Ok(report)
}

/// Returns the FFNs of `config` if LLaMA-MoE's model computes the same function.
fn exportable(model: &Path, config: &Config) -> Result<TopkSpec> {
    let wrong = |field: &str, problem: String, help: Remedy| {
        Err(Error::Core(dsmoe_core::Error::field(&model.join(CONFIG_FILE), field, problem, help)))
    };
    let Some(spec) = config.ffn.as_deref().and_then(spec_of) else {
        let help = "use a model that the method llama-moe made".into();
        return wrong("ffn.type", "is not topk".to_owned(), help);
    };
    let (family, rope) = (config.family().model_type, &config.architecture.ropes[0]);
    let theta = rope.theta;
    let (field, problem) = if spec.router.num_residual > 0 {
        ("ffn.num_residual", format!("is {}", spec.router.num_residual))
    } else if spec.gate.normalize {
        ("ffn.normalize", "is true, as LLaMA-MoE's gate cannot have it".to_owned())
    } else if spec.gate.bias {
        ("ffn.bias", "is true, as LLaMA-MoE's gate cannot have it".to_owned())
    } else if let Some(rows) = spec.gate.hidden {
        let problem = format!("is {rows}, and LLaMA-MoE's gate has a row for each expert in both matrices");
        ("ffn.gate_hidden", problem)
    } else if !(0..config.num_layers).all(|layer| config.layer_experts(layer) == config.num_experts()) {
        ("ffn.experts_per_layer", "says that layers have different numbers of experts".to_owned())
    } else if config.ffn.as_ref().is_some_and(|spec| spec.settings().contains_key("expert_map")) {
        ("ffn.expert_map", "says that gates share experts".to_owned())
    } else if family != "llama" || !config.architecture.differences().is_empty() {
        ("base_model_type", format!("is {family}, and LLaMA-MoE's models are LLaMA's without biases"))
    } else if theta != ROPE_THETA || rope.scaling != RopeScaling::None {
        ("rope_theta", format!("is {theta} or scaled, and LLaMA-MoE's is {ROPE_THETA}"))
    } else if config.hidden != config.num_heads * config.head_dim {
        ("head_dim", format!("is {} and LLaMA-MoE's is hidden_size / num_attention_heads", config.head_dim))
    } else if !config.is_even() {
        ("layer_shapes", "differ".to_owned())
    } else {
        return Ok(spec);
    };
    wrong(field, problem, "export the model as it is".into())
}

/// config.json with LLaMA-MoE's keys in place of `ffn`.
fn config_json(config: &Config, spec: &TopkSpec) -> String {
    let n = spec.router.num_experts;
    let Ok(Value::Object(mut map)) = serde_json::from_str(&config.to_json()) else {
        unreachable!("a configuration is written as an object");
    };
    map.shift_remove("ffn");
    let sizes = vec![vec![config.intermediate / n; n]; config.num_layers];
    let Value::Object(keys) = json!({
        "model_type": "llama_moe", "architectures": ["LlamaMoEForCausalLM"],
        "num_experts": n, "num_selects": spec.router.top_k, "size_experts": sizes,
        "gate_type": "TopKBalancedNoisyGate", "gate_network": spec.gate.network, "gate_use_softmax": true,
        "gate_use_balance": spec.balance_weight > 0.0, "gate_balance_loss_weight": spec.balance_weight,
        "gate_add_noise": spec.gate.noise, "gate_noise_epsilon": 0.01,
        "calculator_type": "UniversalCalculator", "add_weight_norm": false, "score_scale_factor": spec.settings()["score_scale"],
        "multiply_gate_scores": spec.router.scores == Scores::Softmax,
    }) else {
        unreachable!("an object")
    };
    map.extend(keys);
    format!("{:#}\n", Value::Object(map))
}
