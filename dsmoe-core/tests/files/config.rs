//! Every wrong config.json gives one line that names the file, the key, and the remedy.

use std::path::Path;

use crate::support::small_config;
use dsmoe_core::Result;
use dsmoe_core::config::{Config, RopeScaling};
use dsmoe_kernels::testing::refused;
use serde_json::{Map, Value, json};

fn read(text: &str) -> Result<Config> {
    Config::from_json(Path::new("dir/config.json"), text)
}

/// Returns a good config.json with other values of some keys.
fn with(changes: &[(&str, Value)]) -> String {
    let mut config: Value = serde_json::from_str(&small_config().to_json()).unwrap();
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    config.to_string()
}

/// Checks that each of these values of a key is refused.
fn each_refused(cases: &[(&str, Value, &[&str])]) {
    for (key, value, parts) in cases {
        refused(read(&with(&[(*key, value.clone())])), &[&["dir/config.json: "], *parts].concat());
    }
}

#[test]
fn config_that_is_not_json() {
    let text = small_config().to_json();
    for (from, to, part) in [("{", "", "copy the file again"), (": 16", ": 16 16", "line")] {
        let wrong = text.replacen(from, to, 1);
        assert_ne!(wrong, text);
        refused(read(&wrong), &["dir/config.json: ", "not a JSON object", part]);
    }
}

/// The small configuration with its rope keys replaced.
fn with_rope(keys: &str) -> String {
    let mut json: Map<String, Value> = serde_json::from_str(&small_config().to_json()).unwrap();
    for key in ["rope_theta", "rope_scaling", "rope_parameters"] {
        json.remove(key);
    }
    let keys: Map<String, Value> = serde_json::from_str(keys).unwrap();
    json.extend(keys);
    Value::Object(json).to_string()
}

fn rope_of(keys: &str) -> Result<Config> {
    Config::from_json(Path::new("dir/config.json"), &with_rope(keys))
}

#[test]
fn config_with_a_rope_that_is_not_supported() {
    for (keys, parts) in [
        (
            r#"{"rope_scaling": {"rope_type": "mrope"}}"#,
            ["rope_scaling.rope_type is \"mrope\"", "yarn or longrope"],
        ),
        (r#"{"rope_scaling": {"type": "axial"}}"#, ["rope_scaling.type is \"axial\"", "longrope"]),
        (r#"{"rope_parameters": {"rope_type": "x"}}"#, ["rope_parameters.rope_type is", "longrope"]),
        (r#"{"rope_scaling": {"rope_type": "yarn"}}"#, ["rope_scaling.factor is missing", "add it"]),
        (r#"{"rope_scaling": {"rope_type": "linear"}}"#, ["rope_scaling.factor is missing", "add it"]),
        (r#"{"rope_scaling": {"rope_type": "linear", "factor": 0}}"#, ["factor is 0", "positive"]),
        (r#"{"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}"#, ["factor is 0.5", "at least 1"]),
        (
            r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}"#,
            ["rope_scaling.high_freq_factor is missing", "add it"],
        ),
        (
            r#"{"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}"#,
            ["rope_theta is 1", "logarithm"],
        ),
        (
            r#"{"rope_scaling": {"rope_type": "longrope", "factor": 2, "short_factor": [1, 2], "long_factor": [1]}}"#,
            ["rope_scaling.long_factor has 1 numbers for 2 pairs", "give one for each"],
        ),
        (
            r#"{"rope_scaling": {"rope_type": "longrope", "factor": 2, "short_factor": [1, -2]}}"#,
            ["rope_scaling.short_factor is [1,-2]", "positive numbers"],
        ),
        (r#"{"rope_scaling": "yarn"}"#, ["rope_scaling is \"yarn\"", "use an object"]),
        (
            r#"{"rope_parameters": {"full_attention": {"rope_type": "default"}}}"#,
            ["rope_parameters.full_attention", "one rotation"],
        ),
        (r#"{"partial_rotary_factor": 0.5}"#, ["partial_rotary_factor is 0.5", "remove it"]),
        (
            r#"{"partial_rotary_factor": 1.5, "rope_scaling": {"type": "linear", "factor": 2}}"#,
            ["partial_rotary_factor is 1.5", "at most 1"],
        ),
    ] {
        refused(rope_of(keys), &[&["dir/config.json: "], &parts[..]].concat());
    }
}

#[test]
fn the_rope_object_inside_wins_and_says_so() {
    let linear = RopeScaling::Linear { factor: 2.0 };
    for (keys, theta, scaling, notice) in [
        (r#"{"rope_theta": 300.0, "rope_scaling": null}"#, 300.0, RopeScaling::None, ""),
        (
            r#"{"rope_theta": 300.0, "rope_scaling": {"rope_type": "default", "rope_theta": 500.0}}"#,
            500.0,
            RopeScaling::None,
            "rope_theta 300.0 has no effect: rope_scaling says 500",
        ),
        (
            r#"{"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7.0}}"#,
            7.0,
            linear.clone(),
            "",
        ),
        (
            r#"{"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 5.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}"#,
            5.0,
            linear.clone(),
            "rope_parameters differs from rope_scaling, which holds",
        ),
        (
            r#"{"rope_scaling": {"rope_type": "linear", "type": "su", "factor": 2, "rope_base": 3}}"#,
            10_000.0,
            linear,
            "rope_scaling: rope_base is not known and has no effect",
        ),
    ] {
        let config = rope_of(keys).unwrap();
        let rope = &config.architecture.ropes[0];
        assert_eq!((rope.theta, &rope.scaling), (theta, &scaling), "{keys}");
        let notices = if notice.is_empty() { vec![] } else { vec![notice.to_owned()] };
        assert_eq!(config.notices(), notices, "{keys}");
        // A written configuration causes no notice.
        let again = Config::from_json(Path::new("c"), &config.to_json()).unwrap();
        assert_eq!(again.architecture, config.architecture);
    }
}

/// Transformers 5 puts the type `default` beside the keys of transformers 4 in families with two rotations.
#[test]
fn a_type_that_transformers_does_not_read_is_noticed() {
    let of = |family: &str, key: &str| {
        let keys = format!(r#"{{"rope_scaling": {{"{key}": "linear", "factor": 8.0}}}}"#);
        of_family(family, &keys).unwrap().notices().to_vec()
    };
    for family in ["gemma3_text", "olmo3"] {
        let notice = "rope_scaling: the key `type` is used here; transformers 5 reads only `rope_type` in this family and would ignore it";
        assert_eq!((of(family, "type"), of(family, "rope_type")), (vec![notice.to_owned()], vec![]));
    }
    assert!(of("llama", "type").is_empty());
}

#[test]
fn config_with_wrong_sizes() {
    for wrong in
        [json!(0), json!(-1), json!(1.5), json!("16"), json!(1e30), json!(99999999999u64), json!([16])]
    {
        each_refused(&[("hidden_size", wrong, &["hidden_size is", "use an integer from 1"])]);
    }
    each_refused(&[
        ("num_hidden_layers", json!(100_000), &["num_hidden_layers is 100000", "use an integer"]),
        ("vocab_size", json!(16_777_217), &["vocab_size is 16777217", "use an integer"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads is 3", "divide"]),
        ("head_dim", json!(5), &["head_dim is 5", "use an even number"]),
        ("head_dim", json!(16_777_216), &["head_dim is 16777216", "a width of", "num_attention_heads"]),
        ("rms_norm_eps", json!(0), &["rms_norm_eps is 0", "positive"]),
        ("rms_norm_eps", json!(1e39), &["rms_norm_eps is 1e+39", "positive", "f32"]),
        ("rms_norm_eps", json!(1e-46), &["rms_norm_eps is 1e-46", "positive", "f32"]),
    ]);
    let huge = || json!(16_000_000);
    let absurd = with(&[("hidden_size", huge()), ("intermediate_size", huge())]);
    refused(read(&absurd), &["config.json: hidden_size", "correct the sizes"]);
    let unnamed = small_config().to_json().replace("\"hidden_size\"", "\"hidden\"");
    refused(read(&unnamed), &["config.json: ", "hidden_size is missing", "add it"]);
}

#[test]
fn config_of_another_kind_of_model() {
    for (kind, reason) in [
        ("llama4", "mixtures of experts of another kind"),
        ("llama4_text", "mixtures of experts of another kind"),
        ("phimoe", "a mixture of experts of another kind"),
        ("granitemoehybrid", "a mixture of experts of another kind"),
        ("gemma3n_text", "inputs of their own"),
        ("gemma4", "inputs of their own"),
        ("qwen2_vl", "reads images"),
        ("ministral3", "grows with the position"),
        ("qwen3_next", "linear attention"),
        ("qwen3_5_text", "linear attention"),
        ("phi", "no gate"),
        ("gpt_neox", "no gate"),
        ("gpt2", "no gate"),
        ("falcon", "no gate"),
        ("stablelm", "LayerNorm"),
        ("starcoder2", "no gate"),
        ("olmo", "LayerNorm"),
        ("bert", ""),
    ] {
        let problem = format!("model_type is \"{kind}\" and not supported");
        let parts = [&problem, reason, "use a model of type dsmoe, llama, mistral"];
        each_refused(&[("model_type", json!(kind), &parts)]);
    }
    each_refused(&[
        ("model_type", Value::Null, &["model_type is missing"]),
        ("hidden_act", json!("gelu"), &["hidden_act is \"gelu\" and not supported", "silu"]),
        ("hidden_act", json!("relu"), &["hidden_act is \"relu\" and not supported", "silu"]),
        ("quantization_config", json!({}), &["quantization_config is present"]),
        ("eos_token_id", json!([2, -1]), &["eos_token_id is [2,-1]", "token id"]),
        ("model_type", json!("dsmoe"), &["dsmoe is missing", "convert the model again"]),
        ("dsmoe", json!({}), &["dsmoe is present but model_type", "remove"]),
    ]);
}

/// A small configuration of a family, with other keys added.
fn of_family(kind: &str, keys: &str) -> Result<Config> {
    let mut json: Map<String, Value> = serde_json::from_str(&small_config().to_json()).unwrap();
    for key in ["rope_theta", "rope_scaling", "rope_parameters", "hidden_act"] {
        json.remove(key);
    }
    json.insert("model_type".into(), kind.into());
    let keys: Map<String, Value> = serde_json::from_str(keys).unwrap();
    json.extend(keys);
    Config::from_json(Path::new("dir/config.json"), &Value::Object(json).to_string())
}

#[test]
fn keys_of_a_family_that_are_wrong_are_named() {
    for (kind, keys, parts) in [
        ("qwen2", r#"{"use_sliding_window": true, "sliding_window": 0}"#, ["sliding_window is 0", "integer"]),
        (
            "qwen2",
            r#"{"layer_types": ["full_attention"]}"#,
            ["layer_types has 1 entries", "one for each layer"],
        ),
        (
            "qwen3",
            r#"{"layer_types": ["full_attention", "chunked_attention"]}"#,
            ["layer_types[1] is \"chunked_attention\"", "sliding_attention"],
        ),
        ("qwen3", r#"{"max_window_layers": -1}"#, ["max_window_layers is -1", "from 0"]),
        ("smollm3", r#"{"no_rope_layers": [1]}"#, ["no_rope_layers is no list", "each layer"]),
        ("smollm3", r#"{"no_rope_layers": [1, 2]}"#, ["no_rope_layers is no list", "each layer"]),
        (
            "gemma3_text",
            r#"{"attn_logit_softcapping": 50.0}"#,
            ["attn_logit_softcapping is set", "remove it"],
        ),
        (
            "gemma3_text",
            r#"{"use_bidirectional_attention": true}"#,
            ["use_bidirectional_attention is true", "generates text"],
        ),
        (
            "gemma3_text",
            r#"{"rope_parameters": {"rope_type": "default"}}"#,
            ["rope_parameters has one rotation", "full_attention"],
        ),
        ("gemma2", r#"{"final_logit_softcapping": 0}"#, ["final_logit_softcapping is 0", "positive"]),
        (
            "gemma2",
            r#"{"hidden_activation": "gelu"}"#,
            ["hidden_activation is \"gelu\"", "gelu_pytorch_tanh"],
        ),
        ("gemma2", r#"{"attn_logit_softcapping": 1e39}"#, ["attn_logit_softcapping is 1e+39", "f32"]),
        ("gemma3_text", r#"{"sliding_window_pattern": 0}"#, ["sliding_window_pattern is 0", "from 1"]),
        ("smollm3", r#"{"no_rope_layer_interval": 0}"#, ["no_rope_layer_interval is 0", "from 1"]),
        ("granite", r#"{"embedding_multiplier": 1e300}"#, ["embedding_multiplier is 1e+300", "f32"]),
        ("granite", r#"{"embedding_multiplier": 1e38}"#, ["embedding_multiplier is 100", "from 1e-6 to 1e6"]),
        ("granite", r#"{"residual_multiplier": 1e7}"#, ["residual_multiplier is 10000000", "overflow"]),
        ("granite", r#"{"logits_scaling": 1e-30}"#, ["logits_scaling is 0.000", "from 1e-6 to 1e6"]),
        ("gemma2", r#"{"query_pre_attn_scalar": 1e-20}"#, ["query_pre_attn_scalar is 0.000", "overflow"]),
        (
            "llama",
            r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e30}}"#,
            ["rope_scaling.attention_factor is 1000", "overflow"],
        ),
        (
            "llama",
            r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1e20, "mscale_all_dim": 1.0}}"#,
            ["rope_scaling.mscale makes a factor", "correct mscale"],
        ),
        ("granite", r#"{"logits_scaling": 0}"#, ["logits_scaling is 0", "positive"]),
        ("granite", r#"{"residual_multiplier": "x"}"#, ["residual_multiplier is \"x\"", "positive"]),
        ("olmo2", r#"{"attention_bias": 1}"#, ["attention_bias is 1", "true or false"]),
        ("mistral", r#"{"sliding_window": "wide"}"#, ["sliding_window is \"wide\"", "integer"]),
    ] {
        refused(of_family(kind, keys), &[&["dir/config.json: "], &parts[..]].concat());
    }
    let mut json: Map<String, Value> =
        serde_json::from_str(&of_family("mistral", "{}").unwrap().to_json()).unwrap();
    json.remove("num_key_value_heads");
    let text = Value::Object(json).to_string();
    refused(Config::from_json(Path::new("c"), &text), &["num_key_value_heads is missing", "add it"]);
}

#[test]
fn what_families_leave_unsaid() {
    let of = |kind: &str, keys: &str| of_family(kind, keys).unwrap();
    let windows = |config: &Config| -> Vec<Option<usize>> {
        config.architecture.layers.iter().map(|layer| layer.window).collect()
    };
    // The key that is absent means a window in Mistral; null is none.
    assert_eq!(windows(&of("mistral", "{}")), [Some(4096); 2]);
    assert_eq!(windows(&of("mistral", r#"{"sliding_window": null}"#)), [None; 2]);
    assert_eq!(windows(&of("qwen2", r#"{"sliding_window": 16}"#)), [None; 2]);
    let late = r#"{"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}"#;
    assert_eq!(windows(&of("qwen2", late)), [None, Some(16)]);
    assert_eq!(windows(&of("gemma2", "{}")), [Some(4096), None]);
    assert_eq!(windows(&of("olmo3", r#"{"sliding_window": 8}"#)), [Some(8); 2]);
    assert_eq!(windows(&of("phi3", "{}")), [None; 2]);
    let bare = of("smollm3", r#"{"no_rope_layer_interval": 2}"#).architecture;
    assert_eq!(bare.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(), [Some(0), None]);
    let granite = of("granite", r#"{"logits_scaling": 8.0, "attention_multiplier": null}"#).architecture;
    assert_eq!((granite.logit_scale, granite.attn_scale), (0.125, 1.0));
    let gemma =
        of("gemma2", r#"{"query_pre_attn_scalar": 144, "attn_logit_softcapping": null}"#).architecture;
    assert_eq!((gemma.attn_cap, gemma.final_cap), (None, Some(30.0)));
    assert_eq!((gemma.attn_scale, gemma.embed_scale, gemma.norm_offset), (1.0 / 12.0, 4.0, 1.0));
    let local = of("gemma3_text", r#"{"rope_theta": 5e5, "sliding_window_pattern": 2}"#).architecture;
    assert_eq!(local.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [5e5, 1e4]);
    assert_eq!(local.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(), [Some(1), Some(0)]);
    let olmo = of("olmo3", r#"{"rope_theta": 1e4}"#).architecture;
    assert_eq!(olmo.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [1e4, 5e5]);
    let phi = of("phi3", r#"{"partial_rotary_factor": 0.5}"#).architecture;
    assert_eq!(phi.ropes[0].width, 2);
}

/// A configuration is written as it was read: rotation, windows and everything else.
#[test]
fn a_rotation_of_parts_of_heads_is_written_as_it_was_read() {
    let linear = r#"{"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}"#;
    let plain = r#"{"rope_type": "default", "rope_theta": 3000.0}"#;
    for kind in ["llama", "qwen3", "granite", "olmo3", "gemma3_text"] {
        for keys in [
            format!(r#"{{"rope_theta": 500.0, "rope_scaling": {linear}}}"#),
            r#"{"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}}"#.to_owned(),
            format!(r#"{{"rope_parameters": {{"full_attention": {linear}, "sliding_attention": {plain}}}}}"#),
            format!(
                r#"{{"rope_parameters": {{"full_attention": {linear}, "sliding_attention": {linear}}}}}"#
            ),
            format!(r#"{{"rope_parameters": {{"full_attention": {plain}, "sliding_attention": {linear}}}}}"#),
        ] {
            // Of these families some have one rotation, and some refuse half of it for whole heads.
            let Ok(config) = of_family(kind, &keys) else { continue };
            let again = Config::from_json(Path::new("c"), &config.to_json()).unwrap();
            assert_eq!(again.architecture, config.architecture, "{kind}: {keys}");
            let thrice = Config::from_json(Path::new("c"), &again.to_json()).unwrap();
            assert_eq!(thrice.architecture, config.architecture, "{kind}: {keys}");
        }
        let half = of_family(kind, &format!(r#"{{"rope_scaling": {linear}}}"#)).unwrap();
        assert_eq!(half.architecture.ropes[0].width * 2, half.head_dim, "{kind}");
    }
}

#[test]
fn transformers_4_reads_what_is_written() {
    let written = |kind: &str, keys: &str| -> Value {
        serde_json::from_str(&of_family(kind, keys).unwrap().to_json()).unwrap()
    };
    // OLMo 2 takes an object of these two keys alone.
    for kind in ["linear", "dynamic"] {
        let keys =
            format!(r#"{{"rope_parameters": {{"rope_type": "{kind}", "factor": 2, "rope_theta": 500.0}}}}"#);
        let json = written("olmo2", &keys);
        assert_eq!(json["rope_scaling"], json!({"type": kind, "factor": 2.0}));
        assert_eq!(json["rope_theta"], json!(500.0));
        let again = Config::from_json(Path::new("c"), &json.to_string()).unwrap();
        assert_eq!(again.architecture, of_family("olmo2", &keys).unwrap().architecture);
        assert_eq!(again.notices(), Vec::<String>::new());
    }
    // A factor that is not the growth of the positions.
    let half = small_config().head_dim / 2;
    let list = json!(vec![1.5; half]);
    let keys = json!({"rope_scaling": {"rope_type": "longrope", "short_factor": list, "long_factor": list, "factor": 4.0,
        "original_max_position_embeddings": 4}});
    let json = written("gemma", &keys.to_string());
    let factor = of_family("gemma", &keys.to_string()).unwrap().architecture.ropes[0].factor();
    assert_eq!(json["original_max_position_embeddings"], json!(4));
    assert_eq!(json["rope_scaling"]["attention_factor"], json!(factor));
    assert_eq!(written("mistral", r#"{"head_dim": null}"#)["head_dim"], json!(small_config().head_dim));
}

#[test]
fn native_directories_name_their_family() {
    let good = r#"{"format_version": 1, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": false, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true}"#;
    let native = of_family("dsmoe", &format!(r#"{{"base_model_type": "qwen2", "dsmoe": {good}}}"#)).unwrap();
    assert_eq!((native.family().model_type, native.model_type()), ("qwen2", "dsmoe"));
    assert!(native.architecture.qkv_bias);
    let json: Value = serde_json::from_str(&native.to_json()).unwrap();
    assert_eq!(json["base_model_type"], "qwen2");
    let mut dense = native;
    dense.moe = None;
    let json: Value = serde_json::from_str(&dense.to_json()).unwrap();
    assert_eq!(json["model_type"], "qwen2");
    assert_eq!(json["architectures"], json!(["Qwen2ForCausalLM"]));
    assert!(json.get("base_model_type").is_none());
    let llama = of_family("dsmoe", &format!(r#"{{"dsmoe": {good}}}"#)).unwrap();
    assert_eq!(llama.family().model_type, "llama");
    let other = of_family("dsmoe", &format!(r#"{{"base_model_type": "mixtral", "dsmoe": {good}}}"#));
    refused(other, &["base_model_type is \"mixtral\"", "experts already"]);
}

#[test]
fn config_with_a_wrong_dsmoe_object() {
    let good = json!({"format_version": 1, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": false, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true});
    let of = |dsmoe: Value| with(&[("model_type", json!("dsmoe")), ("dsmoe", dsmoe)]);
    assert!(read(&of(good.clone())).is_ok());
    let divide = "intermediate_size 12 is not divisible by 5 experts; use one of 1, 2, 3, 4, 6, 12";
    let cases: [(&str, Value, &[&str]); 7] = [
        ("stee", json!(true), &["dsmoe unknown field `stee`", "convert the model again"]),
        ("format_version", json!(3), &["dsmoe.format_version is 3", "update it"]),
        ("core", json!(1), &["dsmoe.core needs format_version 2", "convert the model again"]),
        ("active_target", json!(1.5), &["dsmoe.active_target is 1.5", "above 0 and up to 1"]),
        ("threshold", json!(1.5), &["dsmoe: threshold is 1.5", "0 to 1"]),
        ("num_experts", json!(5), &[divide]),
        ("rescale", json!("eq9"), &["dsmoe unknown variant `eq9`"]),
    ];
    for (key, value, parts) in cases {
        let mut wrong = good.clone();
        wrong[key] = value;
        refused(read(&of(wrong)), parts);
    }
}

/// Each key of a part beside the experts, wrong and right, in a model of two layers.
#[test]
fn config_with_parts_beside_experts() {
    let good = json!({"format_version": 2, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": true, "core": [1, 2], "router_rank": 2, "correction": true, "active_target": 0.5,
        "budgets": [{"active": 0.25, "thresholds": [1.5, 0.1]}, {"active": 0.75, "thresholds": [-1.5, -0.3]}],
        "gate_value": "binary", "rescale": "none", "zero_active": "skip", "ste": true});
    let of = |dsmoe: Value| {
        with(&[("model_type", json!("dsmoe")), ("num_hidden_layers", json!(2)), ("dsmoe", dsmoe)])
    };
    let config = read(&of(good.clone())).unwrap();
    let moe = config.moe.as_ref().unwrap();
    assert_eq!([moe.core(0), moe.core(1)], [1, 2]);
    assert_eq!((moe.budget(), moe.threshold()), (Some(0.5), None));
    // Half of the way between both budgets, and the budgets themselves.
    assert_eq!(moe.thresholds_for(0.5).unwrap(), [0.0, 0.1 + 0.5 * (-0.3 - 0.1)]);
    assert_eq!(moe.thresholds_for(0.25).unwrap(), [1.5, 0.1]);
    assert_eq!(moe.thresholds_for(0.75).unwrap(), [-1.5, -0.3]);
    for outside in [0.2, 0.76, f64::NAN] {
        refused(moe.thresholds_for(outside), &["outside of the model's budgets", "use 0.25 to 0.75"]);
    }
    let json: Value = serde_json::from_str(&config.to_json()).unwrap();
    assert_eq!(json["dsmoe"], good);

    let mut one = good.clone();
    one["core"] = json!(3);
    let json: Value = serde_json::from_str(&read(&of(one.clone())).unwrap().to_json()).unwrap();
    assert_eq!(json["dsmoe"], one);
    let mut none = good.clone();
    for key in ["core", "router_rank", "correction", "budgets"] {
        none.as_object_mut().unwrap().remove(key);
    }
    let plain = read(&of(none)).unwrap();
    assert_eq!(plain.moe.as_ref().unwrap().threshold(), Some(0.5));
    refused(plain.moe.as_ref().unwrap().thresholds_for(0.5), &["no budgets", "calibration text"]);
    let json: Value = serde_json::from_str(&plain.to_json()).unwrap();
    assert_eq!(json["dsmoe"]["format_version"], 1);

    let budget = |active: Value, thresholds: Value| json!({"active": active, "thresholds": thresholds});
    let fine = budget(json!(0.25), json!([1, 2]));
    let cases: [(&str, Value, &[&str]); 17] = [
        ("core", json!([1]), &["dsmoe.core has 1 entries", "one for each layer"]),
        ("core", json!([1, 4]), &["dsmoe.core is 4 in layer 1 of 4 experts", "at least one expert"]),
        ("core", json!(4), &["dsmoe.core is 4 in layer 0"]),
        ("core", json!(-1), &["dsmoe data did not match"]),
        ("core", json!("1"), &["dsmoe data did not match"]),
        ("router_rank", json!(0), &["dsmoe.router_rank is 0", "1 to hidden_size"]),
        ("router_rank", json!(1_000_000), &["dsmoe.router_rank is 1000000"]),
        ("router_rank", Value::Null, &["dsmoe.correction is true", "add router_rank"]),
        ("active_target", json!(0.2), &["dsmoe.active_target is 0.2 and the budgets are 0.25 to 0.75"]),
        ("active_target", Value::Null, &["dsmoe.active_target is missing beside budgets"]),
        ("budgets", json!([]), &["dsmoe.budgets has 0 entries"]),
        ("budgets", json!([budget(json!(0), json!([1, 2]))]), &["budgets[0].active is 0", "ascending"]),
        ("budgets", json!([fine, fine]), &["budgets[1].active is 0.25", "ascending"]),
        ("budgets", json!([budget(json!(1.5), json!([1, 2]))]), &["budgets[0].active is 1.5"]),
        (
            "budgets",
            json!([budget(json!(0.5), json!([1]))]),
            &["thresholds has 1 entries", "one for each layer"],
        ),
        ("budgets", json!([budget(json!(0.5), json!([1, 1e300]))]), &["thresholds is inf for layer 1"]),
        ("budgets", json!([budget(json!(0.5), json!([1, null]))]), &["dsmoe invalid type"]),
    ];
    for (key, value, parts) in cases {
        let mut wrong = good.clone();
        wrong[key] = value;
        refused(read(&of(wrong)), parts);
    }
}

#[test]
fn a_bias_of_the_output_is_of_native_models_without_other_biases() {
    each_refused(&[("output_bias", json!(true), &["output_bias", "model_type is not dsmoe"])]);
    let native = |changes: &[(&str, Value)]| {
        let own = [("model_type", json!("dsmoe")), ("output_bias", json!(true))];
        read(&with(&[&own, changes].concat()))
    };
    refused(native(&[("output_bias", json!(1))]), &["output_bias", "is 1", "true or false"]);
    refused(native(&[("mlp_bias", json!(true))]), &["output_bias", "is true beside mlp_bias", "down_proj"]);
    let config = native(&[]).unwrap();
    assert!(config.architecture.output_bias && config.is_dense());
    assert_eq!(config.model_type(), "dsmoe");
    let again = read(&config.to_json()).unwrap();
    assert_eq!((again.is_even(), again.architecture), (true, config.architecture.clone()));
    let off = native(&[("output_bias", json!(false))]).unwrap();
    assert!(!off.architecture.output_bias && !off.to_json().contains("output_bias"));
    assert_eq!(off.model_type(), "llama");
}

#[test]
fn layers_are_removed_with_their_entries_of_lists() {
    let plain = read(&with(&[("num_hidden_layers", json!(4))])).unwrap();
    let short = plain.with_layers(&[0, 3]).unwrap();
    assert_eq!((short.num_layers, short.model_type()), (2, "llama"));
    assert_eq!(read(&short.to_json()).unwrap(), short);

    let mut shapes: Vec<_> = plain.layers().collect();
    shapes[2].intermediate /= 2;
    let mut uneven = plain.clone();
    uneven.set_layers(shapes.clone());
    let short = uneven.with_layers(&[1, 2, 3]).unwrap();
    assert_eq!(short.layers().collect::<Vec<_>>(), shapes[1..]);
    let narrow = uneven.with_layers(&[2]).unwrap();
    assert_eq!((narrow.intermediate, narrow.is_even()), (shapes[2].intermediate, true));

    let family = |name: &str, changes: &[(&str, Value)]| {
        let common = [("model_type", json!(name)), ("num_hidden_layers", json!(4))];
        read(&with(&[&common, changes].concat())).unwrap()
    };
    let rotated = family("smollm3", &[("no_rope_layers", json!([1, 0, 1, 0]))]);
    let short = rotated.with_layers(&[1, 2]).unwrap();
    let ropes: Vec<bool> = short.architecture.layers.iter().map(|layer| layer.rope.is_some()).collect();
    assert_eq!(ropes, [false, true]);
    let kinds = json!(["sliding_attention", "full_attention", "sliding_attention", "full_attention"]);
    let listed = family("gemma2", &[("sliding_window", json!(3)), ("layer_types", kinds)]);
    let windows = |config: &Config| -> Vec<bool> {
        config.architecture.layers.iter().map(|layer| layer.window.is_some()).collect()
    };
    assert_eq!(windows(&listed.with_layers(&[1, 3]).unwrap()), [false, false]);
    // By its number every other layer has a window: what stays would change.
    let counted = family("gemma2", &[("sliding_window", json!(3))]);
    assert_eq!(windows(&counted), windows(&listed));
    assert!(counted.with_layers(&[1, 3]).is_none());
    assert!(counted.with_layers(&[0, 1]).is_some());
}
