//! Gradients of small models of every family against differences of the f64 reference.

use dsmoe_core::Model;
use dsmoe_core::config::Config;
use dsmoe_core::model::{Batch, Inference, StepArgs, TrainWorkspace, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::rng::Rng;
use serde_json::{Value, json};

use crate::reference::Reference;

pub(crate) const VOCAB: usize = 11;
const SEQ: usize = 6;
const TOKENS: usize = 2 * SEQ;

/// Families with the keys that set every switch somewhere.
pub(crate) fn families() -> Vec<(&'static str, Value)> {
    let biases = json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false});
    let both = json!({"attention_multiplier": 0.4, "embedding_multiplier": 3.0, "residual_multiplier": 0.6,
        "logits_scaling": 0.5, "mlp_bias": true});
    let gemma = json!({"query_pre_attn_scalar": 9, "sliding_window": 3, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0});
    let gemma3 = json!({"query_pre_attn_scalar": 9, "sliding_window": 3, "sliding_window_pattern": 2,
        "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}});
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
        "attention_factor": 1.3});
    let longrope = json!({"type": "longrope", "short_factor": [1.0], "long_factor": [3.0]});
    vec![
        ("llama", biases),
        ("llama", json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 4})),
        ("llama", json!({"output_bias": true})),
        ("mistral", json!({"sliding_window": 2})),
        ("ministral", json!({"sliding_window": 2, "layer_types": ["full_attention", "sliding_attention"]})),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1})),
        ("qwen3", json!({"attention_bias": true})),
        ("smollm3", json!({"no_rope_layers": [0, 1], "use_sliding_window": true, "sliding_window": 2})),
        (
            "phi3",
            json!({"partial_rotary_factor": 0.5, "rope_scaling": longrope, "sliding_window": 4,
                "original_max_position_embeddings": 5}),
        ),
        ("olmo2", json!({"attention_bias": true})),
        (
            "olmo3",
            json!({"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"],
                "rope_scaling": yarn}),
        ),
        ("gemma", json!({"hidden_act": "gelu", "attention_bias": true})),
        ("gemma2", gemma),
        ("gemma3_text", gemma3),
        ("granite", both),
    ]
}

/// The forms of an FFN: dense, experts alone, experts behind a core, and experts with all that may stand beside them.
pub(crate) const FORMS: [&str; 4] = ["dense", "experts", "core", "parts"];

pub(crate) fn config(family: &str, keys: &Value, form: &str) -> Config {
    let mut json = json!({
        "model_type": family, "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": true,
    });
    let map = json.as_object_mut().unwrap();
    map.extend(keys.as_object().unwrap().clone());
    if form != "dense" || map.contains_key("output_bias") {
        map.insert("model_type".into(), "dsmoe".into());
        map.insert("base_model_type".into(), family.into());
    }
    if form != "dense" {
        // The loss is differentiable without the straight-through rule, but where an expert comes or goes.
        let mut moe = json!({"format_version": 1, "num_experts": 3, "threshold": 0.4, "partition": "contiguous",
            "router_bias": true, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": false});
        if form == "core" {
            (moe["format_version"], moe["core"]) = (json!(2), json!(1));
        }
        if form == "parts" {
            let parts = json!({"format_version": 2, "core": [1, 0], "router_rank": 2, "correction": true,
                "active_target": 0.5, "budgets": [{"active": 0.4, "thresholds": [0.2, -0.1]},
                {"active": 0.8, "thresholds": [-0.2, -0.3]}]});
            moe.as_object_mut().unwrap().extend(parts.as_object().unwrap().clone());
        }
        map.insert("dsmoe".into(), moe);
    }
    Config::from_json("config.json".as_ref(), &json.to_string()).unwrap()
}

pub(crate) fn random(config: Config) -> Model {
    let offset = config.architecture.norm_offset;
    let mut model = Model::new(config);
    let layout = model.layout().clone();
    for (i, entry) in layout.entries().iter().enumerate() {
        let mut rng = Rng::new(29, i as u64);
        for p in &mut model.params_mut()[entry.range.clone()] {
            let is_norm = entry.spec.name.ends_with("norm.weight");
            *p = if is_norm { 1.0 - offset + 0.3 * rng.normal() } else { 0.4 * rng.normal() };
        }
    }
    model
}

/// The slope of the loss along one parameter.
fn difference(reference: &mut Reference, name: &str, i: usize, (inputs, targets): (&[u32], &[u32])) -> f64 {
    let mut at = |h: f64| {
        *reference.value(name, i) += h;
        let loss = reference.loss(inputs, targets, SEQ);
        *reference.value(name, i) -= h;
        loss
    };
    (at(1e-5) - at(-1e-5)) / 2e-5
}

/// Bounds what rounding may do to a gradient, in models of so few values that one of them is ill-conditioned.
///
/// The exact gradient is taken at parameters that move by their rounding, 3e-8 of each. A pass in f32 rounds several
/// values for each parameter, and its error is at most 4.8 times the spread of these gradients over all cases here and four
/// more seeds. It has the same multiple of the spread in every tensor of a model, as one rounded activation makes it.
fn rounding(model: &Model, name: &str, i: usize, batch: (&[u32], &[u32])) -> f64 {
    const TRIALS: usize = 20;
    let exact = difference(&mut Reference::new(model), name, i, batch);
    let mut rng = Rng::new(5, 5);
    let mut squares = 0.0;
    for _ in 0..TRIALS {
        let mut moved = Reference::new(model);
        for entry in model.layout().entries() {
            for j in 0..entry.range.len() {
                *moved.value(&entry.spec.name, j) *= 1.0 + 3e-8 * f64::from(rng.normal());
            }
        }
        squares += (difference(&mut moved, name, i, batch) - exact).powi(2);
    }
    8.0 * (squares / TRIALS as f64).sqrt()
}

/// The steps of a workspace that keeps everything and of one that recomputes, from gradients that are not zero.
#[track_caller]
pub(crate) fn recomputes_the_same(model: &Model, batch: Batch<'_>, precision: Precision, what: &str) {
    let args = StepArgs {
        sparsity_weight: 0.3,
        separability_weight: 0.2,
        entropy_weight: 0.1,
        seed: 7,
        ..StepArgs::default()
    };
    let tokens = batch.inputs.len();
    let of = |mut workspace: TrainWorkspace| {
        let mut grads = Buf::zeros(model.params().len());
        let steps: Vec<_> =
            (0..2).map(|_| model.train_step(&mut grads, batch, &args, &mut workspace).unwrap()).collect();
        (format!("{steps:?}"), grads, workspace.stats().map(|stats| stats.summary().active_ratio_per_layer))
    };
    let (steps, grads, active) = of(TrainWorkspace::new(model, tokens, precision));
    let (again, other_grads, other_active) = of(TrainWorkspace::recomputing(model, tokens, precision));
    assert_eq!((steps, active), (again, other_active), "{what}");
    let differ = grads.iter().zip(&other_grads[..]).any(|(a, b)| a.to_bits() != b.to_bits());
    assert!(!differ, "{what}: gradients differ");
}

#[test]
fn recomputed_layers_have_the_same_gradients() {
    let inputs: Vec<u32> = (0..TOKENS).map(|i| (i * i + 3 * i + 1) as u32 % VOCAB as u32).collect();
    let targets: Vec<u32> = (0..TOKENS).map(|i| (5 * i + 2) as u32 % VOCAB as u32).collect();
    let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
    for (family, keys) in families() {
        for form in FORMS {
            let mut model = random(config(family, &keys, form));
            let what = format!("{family} {keys}, {form}");
            for precision in [Precision::F32, Precision::Bf16] {
                recomputes_the_same(&model, batch, precision, &what);
            }
            // The place that is not finite is found although it is not kept.
            let name = "model.layers.0.self_attn.o_proj.weight";
            let first = model.layout().get(name).unwrap().range.start;
            model.params_mut()[first] = f32::NAN;
            recomputes_the_same(&model, batch, Precision::F32, &what);
        }
    }
}

#[test]
fn gradients_are_differences_of_the_reference() {
    let inputs: Vec<u32> = (0..TOKENS).map(|i| (i * i + 3 * i + 1) as u32 % VOCAB as u32).collect();
    let targets: Vec<u32> = (0..TOKENS).map(|i| (5 * i + 2) as u32 % VOCAB as u32).collect();
    for (family, keys) in families() {
        for form in FORMS {
            let model = random(config(family, &keys, form));
            let mut grads = Buf::zeros(model.params().len());
            let batch = Batch { inputs: &inputs, targets: &targets, seq: SEQ };
            let mut workspace = TrainWorkspace::new(&model, TOKENS, Precision::F32);
            let step = model.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace).unwrap();
            let what = format!("{family} {keys}, {form}");
            let mut reference = Reference::new(&model);
            let loss = reference.loss(&inputs, &targets, SEQ);
            assert!((step.loss_sum - loss).abs() < 1e-5 * loss, "{what}: loss {} and {loss}", step.loss_sum);
            // A rotation that depends on the number of positions counts the last target as one in inference.
            if keys.get("rope_scaling").is_none() {
                let (mut losses, mut workspace) = (vec![0.0; TOKENS], Workspace::default());
                let inference = Inference::new(&model, Precision::F32);
                inference.score(&mut losses, batch, None, &mut workspace).unwrap();
                let scored: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
                assert!((scored - loss).abs() < 1e-5 * loss, "{what}: inference {scored} and {loss}");
            }
            let mut largest = 0.0f64;
            for entry in model.layout().entries() {
                let name = &entry.spec.name;
                let got = &grads[entry.range.clone()];
                let scale = got.iter().fold(1e-2f64, |most, &g| most.max(f64::from(g).abs()));
                largest = largest.max(scale);
                for i in (0..got.len()).step_by(got.len().div_ceil(24)) {
                    let want = difference(&mut reference, name, i, (&inputs, &targets));
                    let differs = (f64::from(got[i]) - want).abs();
                    let near = differs < 3e-5 * scale
                        || differs < rounding(&model, name, i, (&inputs, &targets)).min(2e-4 * scale);
                    assert!(near, "{what}, {name}[{i}]: {} and {want}", got[i]);
                }
            }
            assert!(largest > 0.1, "{what}: all gradients are small");
        }
    }
}
