//! Exports: dense ones are exact, folded or refused; those for transformers bring their code, licences and a card.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{CARD_FILE, Dtype, SOURCE_CARD_FILE};
use dsmoe_core::config::{Config, LayerShape};
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, RouterStart, convert};
use dsmoe_core::export::{DenseForm, ExportAs, ExportOptions, Measured, export};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::model::Model;
use dsmoe_kernels::testing::refused;
use dsmoe_router::{GateValue, RouterConfig, RouterInit, RouterValues};
use serde_json::{Value, json};

use crate::convert::{small, tensors};
use crate::support::quiet;

const EXPERTS: usize = 4;

fn json_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// A conversion of the small model that counts as trained.
fn trained(work: &Path, options: &ConvertOptions) -> PathBuf {
    let (converted, out) = (work.join("converted"), work.join("trained"));
    convert(&small(work, Dtype::F32), &converted, options, &mut quiet).unwrap();
    fs::create_dir(&out).unwrap();
    Model::load(&converted).unwrap().save(&out, Dtype::F32).unwrap();
    out
}

fn dense() -> ExportOptions {
    ExportOptions::new(ExportAs::Dense)
}

#[test]
fn a_trained_model_is_no_dense_model() {
    let work = tempfile::tempdir().unwrap();
    let model = trained(work.path(), &ConvertOptions::new(EXPERTS));
    assert!(json_of(&work.path().join("converted"))["dsmoe"]["untrained"].as_bool().unwrap());
    assert!(json_of(&model)["dsmoe"].get("untrained").is_none());
    let out = work.path().join("out");
    let parts = ["trained: was fitted or trained with gates", "export it as hf", "fold mean with data"];
    refused(export(&model, &out, &dense(), &mut quiet), &parts);
    assert!(!out.exists());
    let untrained = export(&work.path().join("converted"), &out, &dense(), &mut quiet).unwrap();
    assert_eq!(untrained.dense, Some(DenseForm::Source));
    assert!(json_of(&out).get("dsmoe").is_none());
}

#[test]
fn open_binary_gates_are_exact() {
    let open = |weight: f32, bias: f32| {
        let of_layer = RouterValues { weight: vec![weight; EXPERTS * 128], bias: vec![bias; EXPERTS] };
        RouterStart::Values(vec![of_layer; 4])
    };
    let router = RouterConfig { gate_value: GateValue::Binary, threshold: 0.6, ..RouterConfig::new(EXPERTS) };
    let everything = RouterConfig { threshold: 0.0, ..router.clone() };
    let sigmoid = RouterConfig { gate_value: GateValue::Sigmoid, ..everything.clone() };
    let start = RouterStart::Init(RouterInit::Random);
    for (router, routers, exact) in [
        (everything, start.clone(), true),
        (sigmoid, start, false),
        (router.clone(), open(0.0, 0.41), true),
        (router.clone(), open(0.0, 0.40), false),
        (router.clone(), open(1e-9, 9.0), false),
    ] {
        let work = tempfile::tempdir().unwrap();
        let case = format!("{router:?}");
        let options = ConvertOptions { router, routers, ..ConvertOptions::new(EXPERTS) };
        let model = trained(work.path(), &options);
        let done = export(&model, &work.path().join("out"), &dense(), &mut quiet);
        match exact {
            true => assert_eq!(done.unwrap().dense, Some(DenseForm::AllOpen), "{case}"),
            false => refused(done, &["export it as hf"]),
        }
    }
}

#[test]
fn folded_factors_scale_the_columns_of_their_experts() {
    let work = tempfile::tempdir().unwrap();
    let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(EXPERTS) };
    let model = trained(work.path(), &options);
    // Expert i of layer l has the factor l + i / 8.
    let fold: Vec<Vec<f64>> =
        (0..4).map(|layer| (0..EXPERTS).map(|i| f64::from(layer) + i as f64 / 8.0).collect()).collect();
    let out = work.path().join("out");
    let options = ExportOptions { fold: Some(fold.clone()), ..dense() };
    let done = export(&model, &out, &options, &mut quiet).unwrap();
    assert_eq!(done.dense, Some(DenseForm::Folded));
    let (before, after, stored) = (tensors(&work.path().join("dense")), tensors(&out), tensors(&model));
    assert_eq!(before.len(), after.len());
    let mut scaled = 0;
    for (name, (_, shape, bytes)) in &before {
        let found = &after[name].2;
        let Some(layer) = name.strip_suffix(".mlp.down_proj.weight") else {
            assert!(found == bytes, "{name}");
            continue;
        };
        let order = &stored[&format!("{layer}.mlp.partition")].2;
        let order: Vec<i32> =
            order.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
        let index: usize = layer.rsplit('.').next().unwrap().parse().unwrap();
        let float = |bytes: &[u8], i: usize| f32::from_le_bytes(bytes[4 * i..][..4].try_into().unwrap());
        for row in 0..shape[0] {
            for (position, &neuron) in order.iter().enumerate() {
                let at = row * shape[1] + neuron as usize;
                let factor = fold[index][position / (shape[1] / EXPERTS)] as f32;
                assert_eq!(float(found, at), float(bytes, at) * factor, "{name}");
                scaled += 1;
            }
        }
    }
    assert_eq!(scaled, 4 * 128 * 96);

    let again = work.path().join("again");
    let wrong = |fold| ExportOptions { fold: Some(fold), ..dense() };
    for fold in [vec![vec![1.0; EXPERTS]; 3], vec![vec![1.0; 3]; 4], vec![vec![f64::NAN; EXPERTS]; 4]] {
        refused(export(&model, &again, &wrong(fold), &mut quiet), &["factors are not of 4 layers and 4"]);
    }
    let native = ExportOptions { form: ExportAs::Native, ..wrong(fold) };
    refused(export(&model, &again, &native, &mut quiet), &["only a dense export folds"]);
}

#[test]
fn code_goes_with_models_that_transformers_does_not_know() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    let hf = ExportOptions::new(ExportAs::Transformers);
    let model = trained(work.path(), &ConvertOptions::new(EXPERTS));
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    export(&model, &at("sparse"), &hf, &mut quiet).unwrap();
    let written = json_of(&at("sparse"));
    assert_eq!(
        written["auto_map"],
        json!({
            "AutoConfig": "configuration_dsmoe.DsmoeConfig",
            "AutoModelForCausalLM": "modeling_dsmoe.DsmoeForCausalLM",
        })
    );
    assert_eq!(written["dsmoe"], json_of(&model)["dsmoe"]);
    let code = fs::read_to_string(at("sparse").join("modeling_dsmoe.py")).unwrap();
    assert!(code.contains("from transformers import LlamaForCausalLM as BaseForCausalLM"));
    assert!(at("sparse").join("configuration_dsmoe.py").is_file());
    let tokenizer = fs::read_to_string(at("sparse").join("tokenizer_config.json")).unwrap();
    assert!(tokenizer.contains("PreTrainedTokenizerFast"));
    assert!(tensors(&at("sparse")) == tensors(&model));
    // It is a native directory too, and what is made from it does not name code that is not there.
    export(&at("sparse"), &at("native"), &ExportOptions::new(ExportAs::Native), &mut quiet).unwrap();
    assert_eq!(json_of(&at("native")), json_of(&model));
    assert!(!at("native").join("modeling_dsmoe.py").exists());

    // transformers has the class of a plain dense model.
    export(&at("dense"), &at("plain"), &hf, &mut quiet).unwrap();
    assert_eq!(json_of(&at("plain")), json_of(&at("dense")));
    assert!(!at("plain").join("modeling_dsmoe.py").exists());

    // It has none for layers of different sizes, and refuses heads that do not divide the hidden size.
    let uneven = |config: &mut Config| {
        let narrow = LayerShape { num_heads: 2, num_kv_heads: 2, intermediate: 8 };
        config.set_layers(vec![config.layer(0), narrow, config.layer(2), config.layer(3)]);
    };
    let odd = |config: &mut Config| config.set_hidden(102);
    for (name, change, even) in
        [("uneven", &uneven as &dyn Fn(&mut Config), false), ("odd", &odd as &dyn Fn(&mut Config), true)]
    {
        let mut config = preset("tiny").unwrap();
        change(&mut config);
        init(&config, &at(name), &InitOptions::default(), &mut quiet).unwrap();
        let out = at(&format!("{name}-out"));
        export(&at(name), &out, &hf, &mut quiet).unwrap();
        let written = json_of(&out);
        assert_eq!((&written["model_type"], written["auto_map"].is_object()), (&json!("dsmoe"), true));
        assert_eq!(written["layer_shapes"].as_array().unwrap().len(), 4);
        let read = Config::load(&out).unwrap();
        assert_eq!((read.is_even(), read.hidden, read.layer(1)), (even, config.hidden, config.layer(1)));
    }
}

/// Phi-3 stores joined matrices and is exported on its own class, which derives the factors of longrope from the hidden size.
#[test]
fn longrope_of_a_pruned_phi3_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let json = json!({
        "model_type": "phi3", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "original_max_position_embeddings": 32, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 2.0, 2.0, 2.0]},
    });
    let hf = ExportOptions::new(ExportAs::Transformers);
    let dir = |name: &str, config: &Config| {
        let dir = work.path().join(name);
        init(config, &dir, &InitOptions::default(), &mut quiet).unwrap();
        dir
    };
    let config = Config::from_json("config.json".as_ref(), &json.to_string()).unwrap();
    let whole = dir("whole", &config);
    export(&whole, &work.path().join("whole-out"), &hf, &mut quiet).unwrap();
    let (mut pruned, mut plain) = (config.clone(), json.clone());
    pruned.set_hidden(12);
    let parts = ["config.json: hidden_size is 12", "3 longrope factors and not 4", "export it as native"];
    let model = dir("pruned", &pruned);
    refused(export(&model, &work.path().join("out"), &hf, &mut quiet), &parts);
    assert!(!work.path().join("out").exists());
    export(&model, &work.path().join("native"), &ExportOptions::new(ExportAs::Native), &mut quiet).unwrap();
    // Without longrope there is nothing to derive, and transformers reads `head_dim`.
    plain["rope_scaling"] = Value::Null;
    let mut plain = Config::from_json("config.json".as_ref(), &plain.to_string()).unwrap();
    plain.set_hidden(12);
    let out = work.path().join("plain-out");
    export(&dir("plain", &plain), &out, &hf, &mut quiet).unwrap();
    assert_eq!((&json_of(&out)["model_type"], &json_of(&out)["head_dim"]), (&json!("phi3"), &json!(8)));
}

#[test]
fn licences_and_cards_go_along() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    let source = small(work.path(), Dtype::F32);
    fs::write(source.join("LICENSE.txt"), "terms").unwrap();
    fs::write(source.join("README.md"), "---\nlicense: llama2\n---\n# Source\n").unwrap();
    let config = fs::read_to_string(source.join("config.json")).unwrap();
    let named = config.replacen('{', "{\"_name_or_path\": \"owner/model-1\",", 1);
    fs::write(source.join("config.json"), named).unwrap();
    let options = ConvertOptions { active_target: Some(0.5), ..ConvertOptions::new(EXPERTS) };
    convert(&source, &at("sparse"), &options, &mut quiet).unwrap();
    assert_eq!(fs::read(at("sparse").join("LICENSE.txt")).unwrap(), b"terms");
    let card = fs::read_to_string(at("sparse").join(SOURCE_CARD_FILE)).unwrap();
    assert!(card.ends_with("# Source\n") && !at("sparse").join(CARD_FILE).exists());

    let out = at("out");
    let hf = ExportOptions {
        force: true,
        measured: vec![Measured { text: "some text".to_owned(), perplexity: 7.25 }],
        ..ExportOptions::new(ExportAs::Transformers)
    };
    assert!(export(&at("sparse"), &out, &hf, &mut quiet).unwrap().card_written);
    let card = fs::read_to_string(out.join(CARD_FILE)).unwrap();
    for part in [
        "\nlicense: llama2\n",
        "\nbase_model: owner/model-1\n",
        "# out\n",
        "DSMoE, 4 experts per layer, gates above 0.5",
        "| active experts | 50.0 % on average",
        "| perplexity | 7.2500 (some text) |",
        "trust_remote_code=True",
        "dtype=\"auto\")  # before 4.56: torch_dtype\n",
        "\nThe card of the base model is SOURCE_README.md.\n",
        "\nThe licence files beside the weights are those of the base model.\n",
    ] {
        assert!(card.contains(part), "{part} is not in {card}");
    }
    fs::remove_file(at("sparse").join("LICENSE.txt")).unwrap();
    export(&at("sparse"), &out, &hf, &mut quiet).unwrap();
    let card = fs::read_to_string(out.join(CARD_FILE)).unwrap();
    assert!(card.contains("SOURCE_README.md") && !card.contains("licence files"), "{card}");
    // A card of ours is written again, one of somebody else is kept.
    let dense = ExportOptions { force: true, ..dense() };
    assert!(export(&at("sparse"), &out, &dense, &mut quiet).unwrap().card_written);
    assert!(!fs::read_to_string(out.join(CARD_FILE)).unwrap().contains("trust_remote_code"));
    fs::write(out.join(CARD_FILE), "mine").unwrap();
    assert!(!export(&at("sparse"), &out, &hf, &mut quiet).unwrap().card_written);
    assert_eq!(fs::read(out.join(CARD_FILE)).unwrap(), b"mine");
}
