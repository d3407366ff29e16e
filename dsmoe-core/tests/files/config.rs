//! Every wrong config.json gives one line that names the file, the key, and the remedy.

use std::path::Path;

use crate::support::{refused, small_config};
use dsmoe_core::config::Config;

/// Refusals of a config.json with one thing changed.
fn config_refused(from: &str, to: &str, parts: &[&str]) {
    let text = small_config().to_json();
    assert!(text.contains(from), "{from} in {text}");
    let parts: Vec<&str> = [&["dir/config.json: "], parts].concat();
    refused(Config::from_json(Path::new("dir/config.json"), &text.replacen(from, to, 1)), &parts);
}

#[test]
fn config_that_is_not_json() {
    config_refused("{", "", &["not a JSON object", "copy the file again"]);
    config_refused("\"hidden_size\": 16", "\"hidden_size\": 16 16", &["not a JSON object", "line"]);
}

#[test]
fn config_with_unknown_rope_type() {
    let from = "\"rope_scaling\": null";
    for (to, key) in [
        (r#""rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#, "rope_scaling.rope_type"),
        (r#""rope_scaling": {"type": "yarn", "factor": 4.0}"#, "rope_scaling.type"),
        (r#""rope_parameters": {"rope_type": "yarn"}"#, "rope_parameters.rope_type"),
    ] {
        config_refused(from, to, &[key, "is \"yarn\" and not supported", "default or llama3"]);
    }
    let llama3 = r#""rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}"#;
    config_refused(from, llama3, &["rope_scaling.high_freq_factor is missing", "add it"]);
    config_refused(from, r#""rope_scaling": "yarn""#, &["rope_scaling is \"yarn\"", "use an object"]);
    config_refused(
        from,
        r#""rope_parameters": {"full_attention": {"rope_type": "default"}}"#,
        &["rope_parameters.full_attention", "not supported"],
    );
}

#[test]
fn config_with_two_ropes() {
    let from = "\"rope_scaling\": null";
    config_refused(
        from,
        r#""rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}"#,
        &["rope_parameters.rope_theta differs from rope_theta", "remove"],
    );
    let llama3 = r#""rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192"#;
    config_refused(
        from,
        &format!(r#""rope_scaling": null, "rope_parameters": {{{llama3}}}"#),
        &["rope_parameters.rope_type differs from rope_scaling", "remove"],
    );
    let text = small_config().to_json();
    let both =
        format!(r#""rope_scaling": {{{llama3}}}, "rope_parameters": {{"rope_theta": 10000, {llama3}}}"#);
    assert!(Config::from_json(Path::new("c"), &text.replace(from, &both)).is_ok());
}

#[test]
fn config_with_wrong_sizes() {
    let hidden = "\"hidden_size\": 16";
    config_refused(hidden, "\"hidden\": 16", &["hidden_size is missing", "add it"]);
    for wrong in ["0", "-1", "1.5", "\"16\"", "1e30", "99999999999", "[16]"] {
        config_refused(
            hidden,
            &format!("\"hidden_size\": {wrong}"),
            &["hidden_size is", "use an integer from 1"],
        );
    }
    let layers = "\"num_hidden_layers\": 2";
    config_refused(
        layers,
        "\"num_hidden_layers\": 100000",
        &["num_hidden_layers is 100000", "use an integer"],
    );
    let vocab = "\"vocab_size\": 20";
    config_refused(vocab, "\"vocab_size\": 16777217", &["vocab_size is 16777217", "use an integer"]);
    let absurd = "\"hidden_size\": 16000000, \"intermediate_size\": 16000000";
    let text = small_config().to_json().replace("\"intermediate_size\": 12,", "").replace(hidden, absurd);
    refused(
        Config::from_json(Path::new("config.json"), &text),
        &["config.json: hidden_size", "correct the sizes"],
    );
    config_refused(
        "\"num_key_value_heads\": 2",
        "\"num_key_value_heads\": 3",
        &["num_key_value_heads is 3", "divide"],
    );
    config_refused("\"head_dim\": 4", "\"head_dim\": 5", &["head_dim is 5", "use an even number"]);
    config_refused("\"rms_norm_eps\": 0.00001", "\"rms_norm_eps\": 0", &["rms_norm_eps is 0", "positive"]);
}

#[test]
fn config_of_another_kind_of_model() {
    config_refused(
        "\"llama\"",
        "\"mistral\"",
        &["model_type is \"mistral\" and not supported", "llama or dsmoe"],
    );
    config_refused("\"silu\"", "\"gelu\"", &["hidden_act is \"gelu\" and not supported", "silu"]);
    config_refused("\"mlp_bias\": false", "\"mlp_bias\": true", &["mlp_bias is true", "without biases"]);
    config_refused("\"attention_bias\": false", "\"attention_bias\": true", &["attention_bias is true"]);
    config_refused("\"mlp_bias\": false", "\"quantization_config\": {}", &["quantization_config is present"]);
    config_refused(
        "\"eos_token_id\": 2",
        "\"eos_token_id\": [2, -1]",
        &["eos_token_id is [2,-1]", "token id"],
    );
}

#[test]
fn config_with_a_wrong_dsmoe_object() {
    let dsmoe = |moe: &str, parts: &[&str]| {
        config_refused("\"llama\"", &format!("\"dsmoe\", \"dsmoe\": {moe}"), parts);
    };
    let good = r#"{"format_version": 1, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": false, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true}"#;
    let text = small_config().to_json().replace("\"llama\"", &format!("\"dsmoe\", \"dsmoe\": {good}"));
    assert!(Config::from_json(Path::new("config.json"), &text).is_ok());
    dsmoe(&good.replace("\"ste\"", "\"stee\""), &["dsmoe unknown field `stee`", "convert the model again"]);
    dsmoe(&good.replace(": 1,", ": 2,"), &["dsmoe.format_version is 2", "update it"]);
    dsmoe(
        &good.replace("\"ste\"", "\"active_target\": 1.5, \"ste\""),
        &["dsmoe.active_target is 1.5", "above 0 and up to 1"],
    );
    dsmoe(&good.replace("0.5", "1.5"), &["dsmoe: threshold is 1.5", "0 to 1"]);
    dsmoe(
        &good.replace(": 4", ": 5"),
        &["intermediate_size 12 is not divisible by 5 experts; use one of 1, 2, 3, 4, 6, 12"],
    );
    dsmoe(&good.replace("eq8", "eq9").replace("none", "eq9"), &["dsmoe unknown variant `eq9`"]);
    config_refused("\"llama\"", "\"dsmoe\"", &["dsmoe is missing", "convert the model again"]);
    config_refused(
        "\"mlp_bias\"",
        "\"dsmoe\": {}, \"mlp_bias\"",
        &["dsmoe is present but model_type", "remove"],
    );
}
