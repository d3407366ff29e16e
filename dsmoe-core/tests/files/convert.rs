//! Conversion and export give back every byte, and write what their options say.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{quiet, read};
use dsmoe_core::checkpoint::{Checkpoint, Dtype, check_llama_tensors};
use dsmoe_core::config::{Config, PartitionKind};
use dsmoe_core::convert::{ConvertOptions, ConvertProgress, PartitionSpec, RouterStart, convert};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::partition::Partition;
use dsmoe_kernels::testing::{refused, shared};
use dsmoe_router::{RouterConfig, RouterInit, RouterValues};
use proptest::prelude::*;

pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a directory, by name.
pub(crate) fn tensors(dir: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let read = |name: &str| {
        let view = checkpoint.tensor(name).unwrap();
        (name.to_owned(), (view.dtype, view.shape.clone(), checkpoint.bytes(name).unwrap().to_vec()))
    };
    checkpoint.names().map(read).collect()
}

/// A small model in `dir`.
pub(crate) fn small(dir: &Path, dtype: Dtype) -> PathBuf {
    let text =
        preset("tiny").unwrap().to_json().replace("\"intermediate_size\": 512", "\"intermediate_size\": 96");
    let text = text.replace("\"vocab_size\": 2048", "\"vocab_size\": 50");
    let config = Config::from_json(Path::new("config.json"), &text).unwrap();
    let out = dir.join("dense");
    init(&config, &out, &InitOptions { dtype, seed: 3, ..InitOptions::default() }, &mut quiet).unwrap();
    out
}

/// Experts of `width` neurons that step through the layer.
fn striped(intermediate: usize, num_experts: usize) -> Vec<Vec<u32>> {
    (0..num_experts).map(|i| (i..intermediate).step_by(num_experts).map(|j| j as u32).collect()).collect()
}

fn round_trip(model: &Path, num_experts: usize, work: &Path) {
    let config = Config::load(model).unwrap();
    let file = work.join("partition.json");
    let experts = striped(config.intermediate, num_experts);
    fs::write(&file, serde_json::json!({"layers": [experts]}).to_string()).unwrap();
    let original = tensors(model);
    for (i, partition) in
        [PartitionSpec::Contiguous, PartitionSpec::Random, PartitionSpec::File(file)].into_iter().enumerate()
    {
        let options = ConvertOptions { partition: partition.clone(), ..ConvertOptions::new(num_experts) };
        let (converted, dense) = (work.join(format!("dsmoe-{i}")), work.join(format!("dense-{i}")));
        let mut last = ConvertProgress { stage: "", done: 0, total: 1 };
        let report = convert(model, &converted, &options, &mut |progress| last = progress).unwrap();
        assert_eq!((last.done, last.total), (report.bytes, report.bytes));
        let moe = Config::load(&converted).unwrap().moe.unwrap();
        assert_eq!(moe.partition == PartitionKind::Permuted, partition != PartitionSpec::Contiguous);
        check_permuted(&original, &tensors(&converted), moe.partition, config.hidden);
        export(&converted, &dense, &ExportOptions::new(ExportAs::Dense), &mut quiet).unwrap();
        assert!(tensors(&dense) == original, "{partition:?}");
        let json = |dir: &Path| -> serde_json::Value {
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
        };
        // The rotation is written in the spelling of transformers 5, too.
        let theta = config.architecture.ropes[0].theta;
        let rope = serde_json::json!({"rope_type": "default", "rope_theta": theta});
        let mut want = json(model);
        want.as_object_mut().unwrap().entry("rope_parameters").or_insert(rope);
        assert_eq!(json(&dense), want);
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            assert_eq!(fs::read(dense.join(name)).ok(), fs::read(model.join(name)).ok());
        }
    }
}

/// The stored order applied to the original tensors, row by row.
fn check_permuted(original: &Tensors, converted: &Tensors, kind: PartitionKind, hidden: usize) {
    for (name, (dtype, shape, bytes)) in original {
        let (_, _, found) = &converted[name];
        let partition = name.find("mlp.").map(|at| format!("{}mlp.partition", &name[..at]));
        let Some(partition) = partition.filter(|_| kind == PartitionKind::Permuted) else {
            assert!(found == bytes, "{name}");
            continue;
        };
        let order =
            converted[&partition].2.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()));
        let size = dtype.size();
        for (stored, neuron) in order.enumerate() {
            let neuron = neuron as usize;
            for i in 0..hidden {
                let at = |neuron: usize| {
                    let element =
                        if name.contains("down_proj") { i * shape[1] + neuron } else { neuron * hidden + i };
                    element * size..(element + 1) * size
                };
                assert_eq!(found[at(stored)], bytes[at(neuron)], "{name}");
            }
        }
    }
}

#[test]
fn every_byte_comes_back_on_real_models() {
    let Some(shared) = shared("every_byte_comes_back_on_real_models", "models") else { return };
    for (model, num_experts) in [("babyllama-1m", 8), ("tinystories-656k", 8), ("stories-260k", 4)] {
        let work = tempfile::tempdir().unwrap();
        round_trip(&shared.join("models").join(model), num_experts, work.path());
    }
}

#[test]
fn every_byte_comes_back_in_every_type() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64] {
        let work = tempfile::tempdir().unwrap();
        let model = small(work.path(), dtype);
        round_trip(&model, 8, work.path());
    }
}

#[test]
fn conversion_writes_what_its_options_say() {
    let work = tempfile::tempdir().unwrap();
    let model = small(work.path(), Dtype::BF16);
    let router = RouterConfig { threshold: 0.3, ste: false, ..RouterConfig::new(4) };
    let options = ConvertOptions {
        routers: RouterStart::Init(RouterInit::Warm(3)),
        active_target: Some(0.3125),
        router: router.clone(),
        seed: 5,
        ..ConvertOptions::new(4)
    };
    let out = work.path().join("out");
    let report = convert(&model, &out, &options, &mut quiet).unwrap();
    assert_eq!((report.num_layers, report.num_experts, report.expert_width), (4, 4, 24));
    assert_eq!(report.router_params, 4 * (4 * 128 + 4));
    let config = Config::load(&out).unwrap();
    let moe = config.moe.clone().unwrap();
    assert_eq!((moe.router, moe.router_bias, moe.active_target), (router, true, Some(0.3125)));
    assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"threshold\": 0.3,"));
    let checkpoint = Checkpoint::open(&out).unwrap();
    check_llama_tensors(&config, &checkpoint).unwrap();
    let view = checkpoint.tensor("model.layers.3.mlp.router.weight").unwrap();
    assert_eq!((view.dtype, &view.shape[..]), (Dtype::F32, &[4, 128][..]));
    let (weight, bias) = dsmoe_router::router_weights(&RouterInit::Warm(3), 4, 128, 5, 3, None).unwrap();
    let found = read(&checkpoint, "model.layers.3.mlp.router.weight", 4 * 128);
    assert_eq!(found, weight.iter().copied().collect::<Vec<_>>());
    assert_eq!(read(&checkpoint, "model.layers.3.mlp.router.bias", 4), bias.unwrap().to_vec());
    assert_eq!(checkpoint.tensor("model.embed_tokens.weight").unwrap().dtype, Dtype::BF16);
}

#[test]
fn centroid_routers_point_along_their_experts() {
    let work = tempfile::tempdir().unwrap();
    let model = small(work.path(), Dtype::F32);
    let options = ConvertOptions {
        routers: RouterStart::Init(RouterInit::Centroid),
        partition: PartitionSpec::Random,
        ..ConvertOptions::new(8)
    };
    let out = work.path().join("out");
    convert(&model, &out, &options, &mut quiet).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let router = read(&checkpoint, "model.layers.1.mlp.router.weight", 8 * 128);
    let gate = read(&checkpoint, "model.layers.1.mlp.gate_proj.weight", 96 * 128);
    for (router, gate) in router.chunks_exact(128).zip(gate.chunks_exact(12 * 128)) {
        let mean: Vec<f32> = (0..128).map(|i| (0..12).map(|row| gate[row * 128 + i] / 12.0).sum()).collect();
        let length = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
        for (r, m) in router.iter().zip(&mean) {
            assert!((r - m / length).abs() < 1e-5, "{r} {}", m / length);
        }
    }
}

#[test]
fn routers_and_orders_that_are_given_are_written() {
    let work = tempfile::tempdir().unwrap();
    let model = small(work.path(), Dtype::F32);
    let router = |layer: usize| RouterValues {
        weight: (0..8 * 128).map(|at| (at + layer) as f32).collect(),
        bias: (0..8).map(|i| i as f32 - layer as f32).collect(),
    };
    let order: Vec<u32> = striped(96, 8).concat();
    let options = ConvertOptions {
        routers: RouterStart::Values((0..4).map(router).collect()),
        partition: PartitionSpec::Orders(vec![order.clone(); 4]),
        ..ConvertOptions::new(8)
    };
    let out = work.path().join("out");
    convert(&model, &out, &options, &mut quiet).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(read(&checkpoint, "model.layers.2.mlp.router.weight", 8 * 128), router(2).weight);
    assert_eq!(read(&checkpoint, "model.layers.2.mlp.router.bias", 8), router(2).bias);
    let stored: Vec<u8> = order.iter().flat_map(|neuron| neuron.to_le_bytes()).collect();
    assert_eq!(checkpoint.bytes("model.layers.2.mlp.partition").unwrap(), stored);
    let new = || ConvertOptions::new(8);
    let orders = |order: &[u32], layers| PartitionSpec::Orders(vec![order.to_vec(); layers]);
    let routers = RouterStart::Values(vec![router(0); 3]);
    for (options, says) in [
        (ConvertOptions { routers, ..new() }, "routers are not of 4 layers"),
        (ConvertOptions { partition: orders(&order, 3), ..new() }, "3 orders of neurons for 4 layers"),
        (ConvertOptions { partition: orders(&[0; 96], 4), ..new() }, "neuron"),
    ] {
        refused(convert(&model, &work.path().join("none"), &options, &mut quiet), &[says]);
    }
}

#[test]
fn export_casts_weights_and_keeps_routers() {
    let work = tempfile::tempdir().unwrap();
    let model = small(work.path(), Dtype::F32);
    let (converted, out) = (work.path().join("dsmoe"), work.path().join("bf16"));
    let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(8) };
    convert(&model, &converted, &options, &mut quiet).unwrap();
    let to_bf16 = ExportOptions { dtype: Some(Dtype::BF16), ..ExportOptions::new(ExportAs::Native) };
    export(&converted, &out, &to_bf16, &mut quiet).unwrap();
    let (before, after) = (tensors(&converted), tensors(&out));
    assert_eq!(before.len(), after.len());
    for (name, (dtype, shape, bytes)) in &before {
        let (new_dtype, new_shape, new_bytes) = &after[name];
        assert_eq!(shape, new_shape);
        if name.contains("router") || name.contains("partition") {
            assert_eq!((new_dtype, new_bytes), (dtype, bytes));
        } else {
            assert_eq!(*new_dtype, Dtype::BF16);
            for (x, y) in bytes.chunks_exact(4).zip(new_bytes.chunks_exact(2)) {
                let x = half::bf16::from_f32(f32::from_le_bytes(x.try_into().unwrap()));
                assert_eq!(x.to_le_bytes(), y);
            }
        }
    }
    assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"torch_dtype\": \"bfloat16\""));
}

#[test]
fn random_models_depend_on_their_seed_alone() {
    let work = tempfile::tempdir().unwrap();
    let config = preset("tiny").unwrap();
    let make = |name: &str, seed, max_shard_bytes| {
        let out = work.path().join(name);
        let options = InitOptions { seed, max_shard_bytes, ..InitOptions::default() };
        init(&config, &out, &options, &mut quiet).unwrap();
        check_llama_tensors(&config, &Checkpoint::open(&out).unwrap()).unwrap();
        tensors(&out)
    };
    let (one, sharded, other) = (make("a", 1, u64::MAX), make("b", 1, 1 << 20), make("c", 2, u64::MAX));
    assert!(one == sharded);
    assert!(fs::read_dir(work.path().join("b")).unwrap().count() > 4);
    assert_ne!(one["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"]);
    assert_ne!(one["model.layers.0.mlp.up_proj.weight"].2, one["model.layers.1.mlp.up_proj.weight"].2);
    let values = |name: &str| -> Vec<f32> {
        one[name].2.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    assert!(values("model.norm.weight").iter().all(|&x| x == 1.0));
    let embedding = values("model.embed_tokens.weight");
    let square = embedding.iter().map(|x| x * x).sum::<f32>() / embedding.len() as f32;
    assert!((square.sqrt() - 0.02).abs() < 2e-4, "{square}");
}

#[test]
fn partitions_list_their_neurons() {
    let partition = Partition::from_experts(6, &[vec![5, 0, 3], vec![1, 2, 4]]).unwrap();
    assert_eq!((partition.num_experts(), partition.expert_width()), (2, 3));
    assert_eq!(partition.expert(1), [1, 2, 4]);
    assert_eq!(partition.inverse().unwrap(), [1, 3, 4, 2, 5, 0]);
    let contiguous = Partition::contiguous(6, 3).unwrap();
    assert_eq!(contiguous.expert(2), [4, 5]);
    assert_eq!(contiguous.order(), None);
    assert_eq!(Partition::from_order((0..6).collect(), 3).unwrap(), contiguous);
    let random = |seed, layer| Partition::random(64, 8, seed, layer).unwrap();
    assert_eq!(random(1, 2), random(1, 2));
    assert_ne!(random(1, 2), random(1, 3));
    assert_ne!(random(1, 2), random(2, 2));
}

proptest! {
    #[test]
    fn partitions_invert_exactly(width in 1usize..9, experts in 1usize..9, seed: u64) {
        let intermediate = width * experts;
        let partition = Partition::random(intermediate, experts, seed, 0).unwrap();
        let original = ndarray::Array2::from_shape_fn((intermediate, 3), |(i, j)| (3 * i + j) as f32);
        let stored = partition.partition_rows(original.view());
        for i in 0..experts {
            for (row, neuron) in partition.expert(i).into_iter().enumerate() {
                prop_assert_eq!(stored.row(i * width + row), original.row(neuron as usize));
            }
        }
        prop_assert_eq!(partition.unpartition_rows(stored.view()), original);
    }
}
