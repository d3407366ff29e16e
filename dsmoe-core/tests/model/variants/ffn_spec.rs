//! FFNs of other crates, by a kind that is made here: two experts' halves, one of them always off.

use std::any::Any;
use std::path::Path;
use std::sync::{Arc, Mutex};

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Dtype, tensor_names};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::ffn::{
    DenseFfn, Ffn, FfnBackward, FfnForward, FfnKind, FfnReader, FfnReport, FfnSpec, PackedFfn, block_len,
    register,
};
use dsmoe_core::model::{Batch, StepArgs};
use dsmoe_core::params::TensorSpec;
use dsmoe_core::{Config, Error, Inference, Model, Result};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::refused;
use serde_json::{Map, Value, json};

use super::{HIDDEN, INTERMEDIATE, LAYERS, config, fill, read, tokens};
use crate::{losses, step_args, train};

const EXPERTS: usize = 2;

/// Seed and balance scale of every forward.
type Seen = Arc<Mutex<Vec<(u64, f32)>>>;

/// A dense FFN with a gate that nobody asks, which notes what it is given.
#[derive(Clone, Debug)]
struct Halves {
    dense: DenseFfn,
    noise: bool,
    /// Whether it says how config.json names it.
    named: bool,
    seen: Seen,
}

impl Halves {
    fn dense_part<'a>(&self, params: &'a [f32]) -> &'a [f32] {
        &params[..block_len(&self.dense.tensors())]
    }
}

impl Ffn for Halves {
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = self.dense.tensors();
        tensors.push(TensorSpec::router("gate.weight", vec![EXPERTS, HIDDEN]));
        if self.noise {
            tensors.push(TensorSpec::router("gate.noise.weight", vec![EXPERTS, HIDDEN]).training_only());
        }
        tensors
    }

    fn kind(&self) -> Option<FfnKind> {
        self.named.then(|| FfnKind::Spec(Arc::new(HalvesSpec { noise: self.noise })))
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        self.dense.pack(self.dense_part(params), precision)
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        self.dense.new_saved(tokens)
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        self.seen.lock().unwrap().push((args.training.seed, args.training.balance_scale));
        let params = self.dense_part(args.params);
        self.dense.forward_train(FfnForward { params, ..args });
        FfnReport { balance_loss: 0.25, ..FfnReport::default() }
    }

    fn backward(&self, args: FfnBackward<'_>) {
        self.seen.lock().unwrap().push((args.training.seed, args.training.balance_scale));
        let (grads, params) =
            (&mut args.grads[..block_len(&self.dense.tensors())], self.dense_part(args.params));
        self.dense.backward(FfnBackward { grads, params, ..args });
    }
}

static HALVES: FfnReader = FfnReader { kind: "halves", read: HalvesSpec::read };

#[derive(Debug)]
struct HalvesSpec {
    noise: bool,
}

impl HalvesSpec {
    fn read(path: &Path, config: &Config, settings: &Map<String, Value>) -> Result<Arc<dyn FfnSpec>> {
        assert_eq!(config.num_layers, LAYERS);
        match settings.get("noise").and_then(Value::as_bool) {
            Some(noise) if settings.len() == 1 => Ok(Arc::new(HalvesSpec { noise })),
            _ => Err(Error::Field {
                path: path.to_path_buf(),
                field: "ffn.noise".to_owned(),
                problem: "is wrong".to_owned(),
                help: "use true or false".into(),
            }),
        }
    }
}

impl FfnSpec for HalvesSpec {
    fn kind(&self) -> &'static str {
        "halves"
    }

    fn settings(&self) -> Map<String, Value> {
        Map::from_iter([("noise".to_owned(), json!(self.noise))])
    }

    fn build(&self, config: &Config, layer: usize) -> Box<dyn Ffn> {
        let dense = DenseFfn::new(config.hidden, config.layer(layer).intermediate);
        Box::new(Halves { dense, noise: self.noise, named: false, seen: Arc::default() })
    }

    fn num_experts(&self, _layer: usize) -> usize {
        EXPERTS
    }

    fn active_experts(&self) -> Option<f64> {
        Some(1.0)
    }
}

fn with_spec() -> Config {
    register(&HALVES).unwrap();
    let mut config = config();
    config.ffn = Some(Arc::new(HalvesSpec { noise: true }));
    config
}

#[test]
fn config_names_the_kind() {
    let config = with_spec();
    let text = config.to_json();
    assert!(text.contains("\"model_type\": \"dsmoe\"") && !text.contains("\"dsmoe\": {"), "{text}");
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["ffn"], json!({"type": "halves", "noise": true}));
    let back = read(&text).unwrap();
    assert_eq!((back.ffn == config.ffn, back.num_experts(), back.fixed_active()), (true, Some(2), Some(1.0)));
    assert!(back.ffn != read(&text.replace("\"noise\": true", "\"noise\": false")).unwrap().ffn);

    let moe = r#""dsmoe": {"format_version": 1, "num_experts": 4, "threshold": 0.5, "partition": "contiguous",
        "router_bias": true, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true},
        "ffn": {"#;
    for (from, to, parts) in [
        (
            "\"halves\"",
            "\"thirds\"",
            ["config.json: ffn.type is \"thirds\"", "halves, or load it by a program that registers"],
        ),
        ("\"noise\": true", "\"noise\": 3", ["config.json: ffn.noise", "is wrong"]),
        ("\"type\": \"halves\",", "", ["ffn.type is missing", "add it"]),
        ("\"model_type\": \"dsmoe\"", "\"model_type\": \"llama\"", ["ffn is present but", "model_type"]),
        ("\"ffn\": {", moe, ["ffn is present beside dsmoe", "remove one"]),
    ] {
        refused(read(&text.replace(from, to)), &parts);
    }
}

#[test]
fn a_type_is_registered_once() {
    register(&HALVES).unwrap();
    register(&HALVES).unwrap();
    static OTHER: FfnReader = FfnReader { kind: "halves", read: HalvesSpec::read };
    static OWN: FfnReader = FfnReader { kind: "mixture", read: HalvesSpec::read };
    for (reader, name) in [(&OTHER, "halves"), (&OWN, "mixture")] {
        refused(register(reader), &[name, "is registered twice", "another name"]);
    }
}

#[test]
fn a_directory_keeps_all_tensors() {
    let mut model = Model::new(with_spec());
    fill(&mut model, 4);
    let names: Vec<_> = tensor_names(model.config()).collect();
    assert!(names.contains(&("model.layers.2.mlp.gate.noise.weight".to_owned(), vec![EXPERTS, HIDDEN])));
    assert!(names.contains(&("model.layers.2.mlp.down_proj.weight".to_owned(), vec![HIDDEN, INTERMEDIATE])));
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("model")).unwrap();
    model.save(&at("model"), Dtype::BF16).unwrap();
    // Gates stay f32, projections are rounded.
    let back = Model::load(&at("model")).unwrap();
    let gate = &model.layout().get("model.layers.1.mlp.gate.weight").unwrap().range;
    assert_eq!(back.params()[gate.clone()], model.params()[gate.clone()]);
    assert_ne!(back.params(), model.params());
    let options = ExportOptions { dtype: Some(Dtype::F32), ..ExportOptions::new(ExportAs::Native) };
    export(&at("model"), &at("copy"), &options, &mut |_| {}).unwrap();
    assert_eq!(Model::load(&at("copy")).unwrap().params(), back.params());
    let dense = export(&at("model"), &at("dense"), &ExportOptions::new(ExportAs::Dense), &mut |_| {});
    refused(dense, &["ffn.type is \"halves\", which has no dense form", "export it as native or hf"]);

    let ids = tokens(8, 2);
    let score =
        |model: &Inference| losses(model, Batch { inputs: &ids[..7], targets: &ids[1..], seq: 7 }, None);
    let loaded = Inference::load(&at("model"), Precision::F32).unwrap();
    assert_eq!(score(&loaded), score(&Inference::new(&back, Precision::F32)));
}

#[test]
fn an_ffn_of_another_crate_is_saved_by_its_spec_or_not_at_all() {
    register(&HALVES).unwrap();
    let model = |config: Config, noise: [bool; LAYERS], named| {
        let ffn = |noise| -> Box<dyn Ffn> {
            let dense = DenseFfn::new(HIDDEN, INTERMEDIATE);
            Box::new(Halves { dense, noise, named, seen: Arc::default() })
        };
        let mut model = Model::with_ffns(config, noise.map(ffn).into());
        fill(&mut model, 4);
        model
    };
    let dir = tempfile::tempdir().unwrap();
    let named = model(config(), [true; LAYERS], true);
    named.save(dir.path(), Dtype::F32).unwrap();
    let back = Model::load(dir.path()).unwrap();
    assert_eq!((back.params(), back.config().num_experts()), (named.params(), Some(EXPERTS)));
    assert!(back.config().ffn == with_spec().ffn);
    // The configuration may name the spec as well.
    model(with_spec(), [true; LAYERS], false).save(dir.path(), Dtype::F32).unwrap();

    let empty = tempfile::tempdir().unwrap();
    for (config, noise, named) in [
        (config(), [true; LAYERS], false),
        (config(), [true, false, true], true),
        (with_spec(), [false; LAYERS], true),
    ] {
        let saved = model(config, noise, named).save(empty.path(), Dtype::F32);
        refused(saved, &["the FFN of layer 0 is not what config.json would describe", "give the FFN a kind"]);
        assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
    }
}

#[test]
fn half_of_the_ffn_is_activated_and_noise_is_not_counted() {
    let (dense, halves) = (Accounting::of(&config()), Accounting::of(&with_spec()));
    let gates = (LAYERS * EXPERTS * HIDDEN) as u64;
    assert_eq!((halves.router, halves.total), (gates, dense.total + gates));
    let want = (dense.non_ffn + dense.ffn / 2 + gates) as f64;
    assert_eq!((halves.activated(0.0), halves.activated(2.0)), (want, want));
}

#[test]
fn noise_has_a_seed_of_its_own_in_every_layer() {
    let seen: Vec<Seen> = (0..LAYERS).map(|_| Arc::default()).collect();
    let ffn = |seen: &Arc<_>| -> Box<dyn Ffn> {
        let dense = DenseFfn::new(HIDDEN, INTERMEDIATE);
        Box::new(Halves { dense, noise: false, named: false, seen: Arc::clone(seen) })
    };
    let mut model = Model::with_ffns(config(), seen.iter().map(ffn).collect());
    fill(&mut model, 6);
    let ids = tokens(7, 1);
    let batch = Batch { inputs: &ids[..6], targets: &ids[1..], seq: 6 };
    for seed in [8, 9, 8] {
        let args = StepArgs { balance_scale: 0.5, seed, ..step_args(1) };
        let (output, ..) = train(&model, batch, &args, Precision::F32);
        assert_eq!(output.balance_loss, 0.25 * LAYERS as f64);
    }
    let seen: Vec<Vec<(u64, f32)>> = seen.iter().map(|seen| seen.lock().unwrap().clone()).collect();
    let mut seeds = Vec::new();
    for layer in &seen {
        // Forward and backward of three steps, the last as the first.
        assert_eq!(layer.len(), 6);
        assert!(layer.iter().all(|&(_, scale)| scale == 0.5));
        assert_eq!((layer[0], layer[2], layer[4], layer[5]), (layer[1], layer[3], layer[0], layer[0]));
        seeds.extend([layer[0].0, layer[2].0]);
    }
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 2 * LAYERS, "a seed served twice");
}
