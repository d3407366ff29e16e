//! Exported files: read back to the same model, and what has no form in GGUF.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{
    Checkpoint, Dtype, TensorInfo, Writer, check_llama_tensors, open_model, tensor_names,
};
use dsmoe_core::config::{Config, LayerAttention};
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::gguf::{Container, GgufType, export_gguf};
use dsmoe_core::init::{InitOptions, init};

use super::{close, read};
use crate::support::small_config;
use dsmoe_kernels::testing::{refused, shared};
use serde_json::{Map, Value, json};

/// Models of the zoo that llama.cpp has no graph for: windows in other layers than its own, another attention scale, a bias
/// that it does not read, and RoPE that GGUF cannot state.
const REFUSED: [&str; 17] = [
    "gemma2",
    "gemma3-v5",
    "gemma3",
    "mistral-v5",
    "mistral-window",
    "olmo3-yarn",
    "olmo3",
    "phi3-longrope-short",
    "phi3-window",
    "qwen2-v5",
    "qwen2-window",
    "qwen3-bias-v5",
    "rope-dynamic-v4",
    "rope-dynamic-v5",
    "rope-longrope",
    "rope-yarn-mscale-v5",
    "smollm3-v5",
];

/// A tokenizer of one token that GGUF can state.
const TOKENIZER: &str = r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer":
    {"type": "ByteLevel", "add_prefix_space": false}}"#;

fn quiet<T>(_: T) {}

fn write(model: &Path, out: &Path, kind: Option<GgufType>) -> dsmoe_core::Result<()> {
    export_gguf(model, out, kind, false, &mut quiet).map(|_| ())
}

/// The largest difference of two models' tensors, relative to the largest value of each.
fn difference(config: &Config, a: &Checkpoint, b: &Checkpoint) -> f32 {
    let (of_a, of_b) = (check_llama_tensors(config, a).unwrap(), check_llama_tensors(config, b).unwrap());
    let worst = |(name, _): (String, Vec<usize>)| {
        let (a, b) = (read(a, of_a.stored_name(&name)), read(b, of_b.stored_name(&name)));
        let largest = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        a.iter().zip(&b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs() / largest))
    };
    tensor_names(config).map(worst).fold(0.0, f32::max)
}

#[test]
fn a_model_reads_back_as_it_was() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let work = tempfile::tempdir().unwrap();
    for name in ["stories-260k", "tinystories-656k"] {
        let model = shared.join("models").join(name);
        let (config, checkpoint) = (Config::load(&model).unwrap(), Checkpoint::open(&model).unwrap());
        for (kind, tolerance) in [
            (None, 0.0),
            (Some(GgufType::Float(Dtype::F16)), 5e-4),
            (Some(GgufType::Float(Dtype::BF16)), 4e-3),
            (Some(GgufType::Q8_0), 4.5e-3),
        ] {
            let out = work.path().join(format!("{name}-{kind:?}.gguf"));
            write(&model, &out, kind).unwrap();
            let worst = difference(&config, &checkpoint, &Checkpoint::open(&out).unwrap());
            assert!(worst <= tolerance, "{name} as {kind:?}: {worst}");
            let again = Config::load(&out).unwrap();
            assert_eq!(
                (again.hidden, again.intermediate, again.num_layers, again.num_heads, again.num_kv_heads),
                (
                    config.hidden,
                    config.intermediate,
                    config.num_layers,
                    config.num_heads,
                    config.num_kv_heads
                )
            );
            assert_eq!(
                (
                    again.rms_norm_eps,
                    again.architecture.ropes[0].theta,
                    again.max_position,
                    again.tie_word_embeddings
                ),
                (
                    config.rms_norm_eps,
                    config.architecture.ropes[0].theta,
                    config.max_position,
                    config.tie_word_embeddings
                )
            );
            assert_eq!(
                (again.bos_token_id, &again.eos_token_ids),
                (config.bos_token_id, &config.eos_token_ids)
            );
        }
        refused(write(&model, &work.path().join(format!("{name}-None.gguf")), None), &["exists already"]);
    }
}

/// The golden file was written by another program.
#[test]
fn data_are_those_of_the_reference() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let work = tempfile::tempdir().unwrap();
    let model = zoo(&shared, "llama", work.path());
    for (kind, golden) in [
        (GgufType::Float(Dtype::F32), "llama-F32"),
        (GgufType::Float(Dtype::F16), "llama-F16"),
        (GgufType::Float(Dtype::BF16), "llama-BF16"),
        (GgufType::Q8_0, "llama-Q8_0"),
    ] {
        let (found, expected) = (work.path().join(golden), shared.join(format!("golden/gguf/{golden}.gguf")));
        write(&model, &found, Some(kind)).unwrap();
        assert_eq!(stored(&found), stored(&expected), "{golden}");
        let metadata = |path: &Path| Container::open(path).unwrap().metadata;
        let (found, expected) = (metadata(&found), metadata(&expected));
        for (key, value) in &expected {
            // Scores are ranks; those of tokens that no merge makes are free.
            if !key.ends_with("scores") && !key.ends_with(".name") {
                assert_eq!(found.get(key), Some(value), "{golden}: {key}");
            }
        }
    }
}

/// Every family, in every form of RoPE that llama.cpp has.
#[test]
fn families_read_back_as_they_were() {
    let Some(shared) = shared("gguf", "golden/zoo") else { return };
    let work = tempfile::tempdir().unwrap();
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(shared.join("golden/zoo")).unwrap().flatten() {
        let case = entry.file_name().into_string().unwrap();
        if !entry.path().join("golden.json").exists() {
            continue;
        }
        let model = zoo(&shared, &case, work.path());
        let out = work.path().join(format!("{case}.gguf"));
        match write(&model, &out, Some(GgufType::Float(Dtype::F32))) {
            Ok(()) => {
                let (config, again) = (Config::load(&model).unwrap(), Config::load(&out).unwrap());
                close(&case, &config, &again);
                let (a, b) = (open_model(&model, &config).unwrap(), open_model(&out, &again).unwrap());
                let worst = difference(&config, &a, &b);
                // 1 is added to Gemma's norms and taken off again.
                assert!(worst < 1e-7, "{case}: {worst}");
                written.push(case);
            }
            Err(error) => refused.push(format!("{case}: {error}")),
        }
    }
    refused.sort();
    let names: Vec<&str> = refused.iter().filter_map(|line| Some(line.split_once(':')?.0)).collect();
    assert_eq!(names, REFUSED, "{refused:#?}");
    assert_eq!(written.len() + refused.len(), 43, "{written:?}");
}

/// Windows and RoPE that the file of a published model would not state: each reads back as it was, or is refused.
#[test]
fn odd_windows_and_ropes_read_back_or_are_refused() {
    let plain = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
    let linear = json!({"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0});
    let llama3 = |original: u64, low: f64| {
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": low, "high_freq_factor": 4.5,
            "original_max_position_embeddings": original}})
    };
    let ropes = |full: Value, sliding: Value| json!({"full_attention": full, "sliding_attention": sliding});
    let (full, sliding) = ("full_attention", "sliding_attention");
    for (family, layers, keys, refusal) in [
        (
            "olmo3",
            3,
            json!({"rope_parameters": ropes(plain(1e4), linear.clone())}),
            "sliding_attention is not stated",
        ),
        ("olmo3", 3, json!({"rope_parameters": ropes(plain(300.0), plain(300.0))}), ""),
        ("olmo3", 4, json!({"rope_parameters": ropes(plain(300.0), plain(300.0))}), ""),
        ("olmo3", 4, json!({"rope_parameters": ropes(linear, plain(500.0))}), ""),
        (
            "olmo3",
            4,
            json!({"rope_parameters": ropes(plain(1e4), plain(300.0))}),
            "sliding_attention is not stated",
        ),
        ("gemma3_text", 3, json!({"rope_local_base_freq": 300.0}), ""),
        ("gemma3_text", 7, json!({"rope_local_base_freq": 300.0}), ""),
        (
            "gemma3_text",
            2,
            json!({"layer_types": [full, sliding], "sliding_window": 64}),
            "sliding_window is of layers",
        ),
        ("gemma3_text", 2, json!({"layer_types": [full, full]}), ""),
        ("gemma2", 2, json!({"layer_types": [full, sliding], "sliding_window": 64}), ""),
        ("mistral", 2, json!({"sliding_window": 64}), ""),
        ("ministral", 2, json!({"layer_types": [full, full]}), ""),
        (
            "ministral",
            2,
            json!({"layer_types": [full, sliding], "sliding_window": 5}),
            "sliding_window is of layers",
        ),
        ("granite", 2, llama3(100, 1.5), ""),
        // Waves too short for the whole factor.
        ("llama", 2, llama3(40_000, 1.0), ""),
        ("llama", 2, llama3(1 << 24, 1.0), ""),
        (
            "llama",
            2,
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}),
            "turns a part of each head",
        ),
    ] {
        let work = tempfile::tempdir().unwrap();
        let (model, out) = (work.path().join("model"), work.path().join("out.gguf"));
        let (config, what) = tiny(&model, family, layers, &keys);
        match write(&model, &out, None) {
            Ok(()) => {
                assert_eq!(refusal, "", "{what} is written");
                let again = Config::load(&out).unwrap();
                let layers = |config: &Config| {
                    let ropes = &config.architecture.ropes;
                    let layer = |layer: &LayerAttention| {
                        let window = layer.window.filter(|&window| window < config.max_position);
                        let rope = layer.rope.map(|rope| ropes[rope].frequencies(9));
                        (window, rope)
                    };
                    config.architecture.layers.iter().map(layer).collect::<Vec<_>>()
                };
                for ((window, rope), (again_window, again_rope)) in
                    layers(&config).into_iter().zip(layers(&again))
                {
                    assert_eq!(window, again_window, "{what}");
                    let (rope, again_rope) = (rope.unwrap_or_default(), again_rope.unwrap_or_default());
                    let near = rope.iter().zip(&again_rope).all(|(a, b)| (a - b).abs() <= 1e-6 * a);
                    assert!(near && rope.len() == again_rope.len(), "{what}: {rope:?} {again_rope:?}");
                }
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!refusal.is_empty() && text.contains(refusal), "{what}: {text}");
            }
        }
    }
}

/// Makes a tiny random model of `family` with `keys` in its configuration, which is returned with its text.
fn tiny(model: &Path, family: &str, layers: usize, keys: &Value) -> (Config, String) {
    let mut json = json!({
        "model_type": family, "vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "sliding_window": 9, "query_pre_attn_scalar": 16, "attention_multiplier": 0.25,
    });
    json.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let what = json.to_string();
    let config = Config::from_json(Path::new("config.json"), &what).unwrap();
    init(&config, model, &InitOptions::default(), &mut quiet).unwrap();
    fs::write(model.join("tokenizer.json"), TOKENIZER).unwrap();
    (config, what)
}

/// llama.cpp refuses a file with a tensor that the graph of its architecture does not take, and one without a tensor
/// that it needs.
#[test]
fn models_whose_tensors_llama_cpp_does_not_read_are_refused() {
    let bias = json!({"attention_bias": true});
    let (ffn_bias, untied) = (json!({"mlp_bias": true}), json!({"tie_word_embeddings": false}));
    let few_heads = json!({"num_attention_heads": 1, "num_key_value_heads": 1});
    let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}});
    let o_proj = "attention_bias is true, and llama.cpp reads no bias of o_proj";
    let head = "tie_word_embeddings is false, and llama.cpp takes the embedding";
    let square = "num_attention_heads is 1 with heads of 16";
    let divisors = "rope_scaling.rope_type is llama3, whose divisors";
    for (family, keys, refusal) in [
        ("llama", &bias, ""),
        ("granite", &bias, ""),
        ("qwen3", &bias, o_proj),
        ("smollm3", &bias, o_proj),
        ("olmo2", &bias, o_proj),
        ("olmo3", &bias, o_proj),
        ("gemma", &bias, o_proj),
        ("gemma2", &bias, o_proj),
        ("gemma3_text", &bias, o_proj),
        ("llama", &ffn_bias, ""),
        ("granite", &ffn_bias, ""),
        ("smollm3", &ffn_bias, "mlp_bias is true, and llama.cpp reads no biases of FFNs"),
        ("gemma", &untied, head),
        ("gemma2", &untied, head),
        ("gemma3_text", &untied, ""),
        ("qwen2", &few_heads, square),
        ("phi3", &few_heads, square),
        ("olmo2", &few_heads, square),
        ("qwen3", &few_heads, ""),
        ("llama", &few_heads, ""),
        ("mistral", &llama3, ""),
        ("qwen2", &llama3, divisors),
        ("qwen3", &llama3, divisors),
        ("smollm3", &llama3, divisors),
        ("olmo2", &llama3, divisors),
    ] {
        let work = tempfile::tempdir().unwrap();
        let (model, out) = (work.path().join("model"), work.path().join("out.gguf"));
        let mut keys = keys.clone();
        if family == "mistral" {
            keys["sliding_window"] = Value::Null;
        }
        let (config, what) = tiny(&model, family, 4, &keys);
        match write(&model, &out, None) {
            Ok(()) => {
                assert_eq!(refusal, "", "{what} is written");
                let again = Config::load(&out).unwrap();
                close(&what, &config, &again);
                let (a, b) = (open_model(&model, &config).unwrap(), open_model(&out, &again).unwrap());
                assert!(difference(&config, &a, &b) < 1e-7, "{what}");
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!refusal.is_empty() && text.contains(refusal), "{what}: {text}");
                assert!(!out.exists(), "{what}");
            }
        }
    }
}

/// llama.cpp reads no OLMo 2 without `output.weight`, though a model may use its embedding there.
#[test]
fn a_tied_head_is_written_where_it_has_to_be() {
    let work = tempfile::tempdir().unwrap();
    for (family, tied, has_head) in [("olmo2", true, true), ("olmo3", true, true), ("llama", true, false)] {
        let (model, out) = (work.path().join(family), work.path().join(format!("{family}.gguf")));
        tiny(&model, family, 4, &json!({"tie_word_embeddings": tied}));
        write(&model, &out, Some(GgufType::Q8_0)).unwrap();
        let tensors = stored(&out);
        let tensor =
            |name: &str| tensors.iter().find(|tensor| tensor.0 == name).map(|(_, a, b, c)| (a, b, c));
        let expected = tensor("token_embd.weight").filter(|_| has_head);
        assert_eq!(tensor("output.weight"), expected, "{family}");
        assert_eq!(Config::load(&out).unwrap().tie_word_embeddings, !has_head);
        read(&Checkpoint::open(&out).unwrap(), "model.embed_tokens.weight");
    }
}

/// The factor of cosines and sines that a configuration leaves out comes back with all its digits.
#[test]
fn the_factor_of_longrope_reads_back_to_the_bit() {
    for (given, growth) in [(json!({}), 4), (json!({"attention_factor": 1.25}), 4), (json!({}), 1)] {
        let work = tempfile::tempdir().unwrap();
        let (model, out) = (work.path().join("model"), work.path().join("out.gguf"));
        let mut scaling = json!({"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]});
        scaling.as_object_mut().unwrap().extend(given.as_object().unwrap().clone());
        let keys = json!({"rope_scaling": scaling, "original_max_position_embeddings": 64 / growth,
            "sliding_window": null});
        let (config, what) = tiny(&model, "phi3", 2, &keys);
        write(&model, &out, None).unwrap();
        assert_eq!(Config::load(&out).unwrap().architecture.ropes, config.architecture.ropes, "{what}");
    }
}

#[test]
fn weights_that_are_not_finite_are_not_passed_on() {
    let work = tempfile::tempdir().unwrap();
    for (value, at) in [(f32::NAN, 0), (f32::INFINITY, 1)] {
        let model = work.path().join(format!("{at}"));
        tiny(&model, "llama", 2, &json!({}));
        let name = "model.layers.1.mlp.up_proj.weight";
        let place = Checkpoint::open(&model).unwrap().tensor(name).map(|view| view.offset as usize).unwrap();
        let path = model.join("model.safetensors");
        let mut file = fs::read(&path).unwrap();
        file[place + 4 * at..][..4].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, file).unwrap();
        let says = [name, "holds a value that is not finite", "undamaged copy"];
        let out = work.path().join("out");
        for kind in [None, Some(GgufType::Float(Dtype::F16)), Some(GgufType::Q8_0)] {
            refused(write(&model, &out, kind), &says);
        }
        for (form, dtype) in [
            (ExportAs::Native, None),
            (ExportAs::Transformers, None),
            (ExportAs::Transformers, Some(Dtype::BF16)),
        ] {
            refused(
                export(&model, &out, &ExportOptions { dtype, ..ExportOptions::new(form) }, &mut quiet),
                &says,
            );
        }
        refused(convert(&model, &out, &ConvertOptions::new(2), &mut quiet), &says);
        assert!(!out.exists());
    }
}

/// The layers with windows, the rotations and the scales that published models have are those of llama.cpp's graphs.
#[test]
fn the_patterns_of_published_models_are_written() {
    let work = tempfile::tempdir().unwrap();
    let kinds = |full: usize, layers: usize| -> Vec<&str> {
        let kind = |i: usize| if i.is_multiple_of(full) { "full_attention" } else { "sliding_attention" };
        (1..=layers).map(kind).collect()
    };
    let linear = json!({"rope_type": "linear", "factor": 8.0});
    let yarn = json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
        "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0});
    let gemma3 = |layers: usize| {
        json!({"model_type": "gemma3_text", "num_hidden_layers": layers, "query_pre_attn_scalar": 4,
            "sliding_window": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear,
            "layer_types": kinds(6, layers)})
    };
    let mut by_default = gemma3(7);
    by_default.as_object_mut().unwrap().remove("layer_types");
    let gemma2 = json!({"model_type": "gemma2", "num_hidden_layers": 3, "query_pre_attn_scalar": 4,
        "sliding_window": 16});
    let olmo3 = |layers: usize, scaling: &Value| {
        json!({"model_type": "olmo3", "num_hidden_layers": layers, "sliding_window": 16, "rope_theta": 5e5,
            "tie_word_embeddings": false, "rope_scaling": scaling, "layer_types": kinds(4, layers)})
    };
    let cases = [gemma3(6), gemma3(13), by_default, gemma2, olmo3(4, &Value::Null), olmo3(8, &yarn)];
    for (i, keys) in cases.into_iter().enumerate() {
        let mut json: Map<String, Value> = serde_json::from_str(&small_config().to_json()).unwrap();
        for key in ["rope_theta", "rope_scaling", "rope_parameters", "hidden_act"] {
            json.remove(key);
        }
        json.extend(keys.as_object().unwrap().clone());
        let config = Config::from_json(Path::new("c"), &Value::Object(json).to_string()).unwrap();
        let (model, out) = (work.path().join(format!("{i}")), work.path().join(format!("{i}.gguf")));
        init(&config, &model, &InitOptions::default(), &mut quiet).unwrap();
        fs::write(model.join("tokenizer.json"), TOKENIZER).unwrap();
        write(&model, &out, None).unwrap();
        let again = Config::load(&out).unwrap();
        assert_eq!(again.family(), config.family(), "{keys}");
        close(&keys.to_string(), &config, &again);
        let (a, b) = (open_model(&model, &config).unwrap(), open_model(&out, &again).unwrap());
        assert!(difference(&config, &a, &b) < 1e-7, "{keys}");
    }
}

/// The card of what is made of a file names its model, and the tokenizer gives what models take.
#[test]
fn a_model_from_a_file_goes_on_with_its_name() {
    let work = tempfile::tempdir().unwrap();
    let (model, file, out) =
        (work.path().join("Tiny-1B"), work.path().join("file.gguf"), work.path().join("out"));
    tiny(&model, "llama", 2, &json!({}));
    write(&model, &file, None).unwrap();
    export(&file, &out, &ExportOptions::new(ExportAs::Transformers), &mut quiet).unwrap();
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("\n| base model | Tiny-1B |\n") && !card.contains("base_model:"), "{card}");
    assert!(!card.contains("licence files"), "{card}");
    let tokenizer: Value =
        serde_json::from_slice(&fs::read(out.join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(tokenizer["model_input_names"], json!(["input_ids", "attention_mask"]));
}

/// llama.cpp fails on a model whose name is that of Phi-3 and whose vocabulary is another.
#[test]
fn a_name_that_stands_for_a_vocabulary_is_kept_with_that_vocabulary() {
    let work = tempfile::tempdir().unwrap();
    let phi = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1, "<unk>": 2, "<s>": 3, "<|endoftext|>": 4},
        "merges": []}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}}"#;
    for (name, tokenizer, wanted) in
        [("Tiny-Phi3", TOKENIZER, "model"), ("Tiny-Phi3.5", phi, "Tiny-Phi3"), ("other", TOKENIZER, "other")]
    {
        let (model, out) = (work.path().join(name), work.path().join(format!("{name}.gguf")));
        tiny(&model, "llama", 2, &json!({}));
        fs::write(model.join("tokenizer.json"), tokenizer).unwrap();
        write(&model, &out, None).unwrap();
        let found = Container::open(&out).unwrap().metadata["general.name"].as_str().map(str::to_owned);
        assert_eq!(found.as_deref(), Some(wanted), "{name}");
    }
}

/// A file that another program wrote is written again: the same tensors, and a configuration of the same model.
#[test]
fn a_file_is_written_again_as_it_was() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let work = tempfile::tempdir().unwrap();
    for name in ["llama-bias-F16", "mistral-F16", "qwen2-Q8_0", "qwen3-F16", "gemma2-F16", "gemma3-F16"] {
        let source = shared.join(format!("golden/gguf/{name}.gguf"));
        let out = work.path().join(name);
        let kind = name.rsplit_once('-').unwrap().1.parse().unwrap();
        write(&source, &out, Some(kind)).unwrap();
        close(name, &Config::load(&source).unwrap(), &Config::load(&out).unwrap());
        let names = |path: &Path| stored(path).into_iter().map(|(name, kind, shape, _)| (name, kind, shape));
        assert!(names(&out).eq(names(&source)), "{name}");
        // Norms of Gemma are stored with 1 added, and Q8_0 is rounded again.
        if !name.starts_with("gemma") && !name.ends_with("Q8_0") {
            assert_eq!(stored(&out), stored(&source), "{name}");
        }
    }
}

/// Copies a model of the zoo; a link is stored as a file that holds its target.
fn zoo(shared: &Path, case: &str, work: &Path) -> PathBuf {
    let (from, to) = (shared.join("golden/zoo").join(case), work.join(case));
    fs::create_dir(&to).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        let bytes = fs::read(from.join(name)).unwrap();
        let link = std::str::from_utf8(&bytes).ok().filter(|text| text.starts_with("../"));
        let source = link.map_or_else(|| from.join(name), |link| from.join(link.trim()));
        fs::copy(source, to.join(name)).unwrap();
    }
    to
}

/// Names, types, shapes and bytes of a file's tensors.
fn stored(path: &Path) -> Vec<(String, String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let mut tensors: Vec<_> = Container::open(path)
        .unwrap()
        .tensors
        .into_iter()
        .map(|tensor| {
            let layout = tensor.kind.layout().unwrap();
            let len = tensor.numel() as usize / layout.elements * layout.bytes;
            let data = bytes[tensor.offset as usize..][..len].to_vec();
            (tensor.name, tensor.kind.to_string(), tensor.shape, data)
        })
        .collect();
    tensors.sort();
    tensors
}

/// A small dense model with the tokenizer of a real one.
fn fixture(work: &Path, tokenizer: &Path) -> PathBuf {
    let model = work.join("model");
    init(&small_config(), &model, &InitOptions::default(), &mut quiet).unwrap();
    if tokenizer.is_file() {
        fs::copy(tokenizer, model.join("tokenizer.json")).unwrap();
    }
    model
}

#[test]
fn what_has_no_form_is_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(work.path(), Path::new("none"));
    let out = work.path().join("out.gguf");
    refused(write(&model, &out, None), &["tokenizer.json: is missing", "a GGUF file needs one"]);
    fs::write(model.join("tokenizer.json"), r#"{"model": {"type": "Unigram"}}"#).unwrap();
    refused(write(&model, &out, None), &["tokenizer.json: model.type is \"Unigram\" and not supported"]);
    let bytes = r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}"#;
    fs::write(model.join("tokenizer.json"), bytes).unwrap();
    refused(
        write(&model, &out, None),
        &["pre_tokenizer is {\"type\":\"Whitespace\"}, which has no name in GGUF"],
    );
    let large = r#"{"model": {"type": "BPE", "vocab": {"a": 20}, "merges": []}}"#;
    fs::write(model.join("tokenizer.json"), large).unwrap();
    refused(write(&model, &out, None), &["model.vocab has \"a\" as token 20 and the model has 20"]);

    let sparse = work.path().join("sparse");
    convert(&model, &sparse, &ConvertOptions::new(2), &mut quiet).unwrap();
    refused(
        write(&sparse, &out, None),
        &["config.json: dsmoe is present", "export the model as dense first"],
    );
    assert!(!out.exists());
    let left: Vec<_> = fs::read_dir(work.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_value_beyond_f16_is_refused_by_every_writer() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(work.path(), Path::new("none"));
    fs::write(model.join("tokenizer.json"), TOKENIZER).unwrap();
    let checkpoint = Checkpoint::open(&model).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let (offset, len) =
        checkpoint.tensor(name).map(|view| (view.offset as usize, view.len as usize)).unwrap();
    let path = model.join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    file[offset + len - 4..offset + len].copy_from_slice(&(-65520f32).to_le_bytes());
    fs::write(&path, file).unwrap();
    let says = [name, "holds -65520, which F16 cannot store", "dtype to bf16 or f32"];
    let out = work.path().join("out");
    refused(write(&model, &out, Some(GgufType::Float(Dtype::F16))), &says);
    let half = ExportOptions { dtype: Some(Dtype::F16), ..ExportOptions::new(ExportAs::Native) };
    refused(export(&model, &out, &half, &mut quiet), &says);
    assert!(!out.exists());
    let infos = vec![TensorInfo { name: "t".into(), dtype: Dtype::F16, shape: vec![2] }];
    let mut writer = Writer::create_file(&work.path().join("t.safetensors"), infos).unwrap();
    refused(writer.write_f32("t", &[1.0, 1e6]), &["tensor t holds 1000000, which F16 cannot store"]);
    refused(write(&model, work.path(), Some(GgufType::Float(Dtype::BF16))), &["is a directory"]);
    // Values up to the largest are written.
    write(&model, &out, Some(GgufType::Float(Dtype::BF16))).unwrap();
}
