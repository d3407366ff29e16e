//! Every wrong config.json gives one line that names the file, the key, and the remedy.

use std::path::Path;

use crate::support::small_config;
use dsmoe_core::Result;
use dsmoe_core::config::Config;
use dsmoe_kernels::testing::refused;
use serde_json::{Value, json};

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

fn llama3() -> Value {
    json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
}

#[test]
fn config_with_unknown_rope_type() {
    let (yarn, types) = ("is \"yarn\" and not supported", "default or llama3");
    let mut no_high = llama3();
    no_high.as_object_mut().unwrap().remove("high_freq_factor");
    each_refused(&[
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            &["rope_scaling.rope_type", yarn, types],
        ),
        ("rope_scaling", json!({"type": "yarn", "factor": 4.0}), &["rope_scaling.type", yarn, types]),
        ("rope_parameters", json!({"rope_type": "yarn"}), &["rope_parameters.rope_type", yarn, types]),
        ("rope_scaling", no_high, &["rope_scaling.high_freq_factor is missing", "add it"]),
        ("rope_scaling", json!("yarn"), &["rope_scaling is \"yarn\"", "use an object"]),
        (
            "rope_parameters",
            json!({"full_attention": {"rope_type": "default"}}),
            &["rope_parameters.full_attention", "not supported"],
        ),
    ]);
}

#[test]
fn config_with_two_ropes() {
    let mut both = llama3();
    each_refused(&[
        (
            "rope_parameters",
            json!({"rope_theta": 500000.0, "rope_type": "default"}),
            &["rope_parameters.rope_theta differs from rope_theta", "remove"],
        ),
        ("rope_parameters", both.clone(), &["rope_parameters.rope_type differs from rope_scaling", "remove"]),
    ]);
    both["rope_theta"] = 10000.into();
    assert!(read(&with(&[("rope_scaling", llama3()), ("rope_parameters", both)])).is_ok());
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
        ("rms_norm_eps", json!(0), &["rms_norm_eps is 0", "positive"]),
    ]);
    let huge = || json!(16_000_000);
    let absurd = with(&[("hidden_size", huge()), ("intermediate_size", huge())]);
    refused(read(&absurd), &["config.json: hidden_size", "correct the sizes"]);
    let unnamed = small_config().to_json().replace("\"hidden_size\"", "\"hidden\"");
    refused(read(&unnamed), &["config.json: ", "hidden_size is missing", "add it"]);
}

#[test]
fn config_of_another_kind_of_model() {
    each_refused(&[
        ("model_type", json!("mistral"), &["model_type is \"mistral\" and not supported", "llama or dsmoe"]),
        ("hidden_act", json!("gelu"), &["hidden_act is \"gelu\" and not supported", "silu"]),
        ("mlp_bias", json!(true), &["mlp_bias is true", "without biases"]),
        ("attention_bias", json!(true), &["attention_bias is true"]),
        ("quantization_config", json!({}), &["quantization_config is present"]),
        ("eos_token_id", json!([2, -1]), &["eos_token_id is [2,-1]", "token id"]),
        ("model_type", json!("dsmoe"), &["dsmoe is missing", "convert the model again"]),
        ("dsmoe", json!({}), &["dsmoe is present but model_type", "remove"]),
    ]);
}

#[test]
fn config_with_a_wrong_dsmoe_object() {
    let good = json!({"format_version": 1, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": false, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true});
    let of = |dsmoe: Value| with(&[("model_type", json!("dsmoe")), ("dsmoe", dsmoe)]);
    assert!(read(&of(good.clone())).is_ok());
    let divide = "intermediate_size 12 is not divisible by 5 experts; use one of 1, 2, 3, 4, 6, 12";
    let cases: [(&str, Value, &[&str]); 6] = [
        ("stee", json!(true), &["dsmoe unknown field `stee`", "convert the model again"]),
        ("format_version", json!(2), &["dsmoe.format_version is 2", "update it"]),
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
