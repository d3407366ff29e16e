//! Inference on packed weights: loading is packing, and bf16 errs by the rounding of its operands alone.

use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert};
use dsmoe_core::generate::argmax;
use dsmoe_core::model::{Batch, Cache, Inference, Model, Observe, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{distance, refused, shared};
use half::bf16;

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// A random dense model in `dir`.
fn dense(dir: &Path, dtype: Dtype, tied: bool) -> PathBuf {
    let sizes = [("intermediate_size", 88), ("vocab_size", 75), ("num_hidden_layers", 2)];
    crate::dense(dir, &sizes, dtype, tied)
}

/// The same cut into experts of permuted neurons.
fn dsmoe(dense: &Path) -> PathBuf {
    let out = dense.with_extension("dsmoe");
    let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(8) };
    convert(dense, &out, &options, &mut |_| {}).unwrap();
    out
}

fn ids(model: &Inference) -> Vec<u32> {
    crate::ids(60, 0, model.config().vocab_size as u32)
}

/// Logits of a text fed in pieces, and losses of two sequences.
fn outputs(model: &Inference) -> (Vec<f32>, Vec<f32>) {
    let ids = ids(model);
    let logits = crate::logits(model, [&ids[..30], &ids[30..33], &ids[33..34], &ids[34..60]]);
    let targets: Vec<u32> = ids.iter().rev().copied().collect();
    (logits, crate::losses(model, Batch { inputs: &ids, targets: &targets, seq: 30 }, None))
}

#[test]
fn a_directory_and_its_model_pack_alike_whatever_is_stored() {
    let work = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::BF16] {
        for tied in [true, false] {
            let dense = dense(work.path(), dtype, tied);
            let narrow = Checkpoint::open(&dense).unwrap().precision() == Precision::Bf16;
            assert_eq!(narrow, dtype == Dtype::BF16);
            for dir in [dsmoe(&dense), dense] {
                let model = Model::load(&dir).unwrap();
                let [wide, half] = BOTH.map(|precision| {
                    let loaded = Inference::load(&dir, precision).unwrap();
                    let packed = Inference::new(&model, precision);
                    assert_eq!((loaded.precision(), packed.precision()), (precision, precision));
                    assert_eq!(loaded.bytes(), packed.bytes());
                    assert!(outputs(&loaded) == outputs(&packed), "{} {precision}", dir.display());
                    (loaded.bytes(), outputs(&loaded))
                });
                assert!(half.0 < wide.0 * 6 / 10, "{} bytes for {}", half.0, wide.0);
                assert!(half.1 != wide.1, "bf16 rounds");
                assert_eq!(Checkpoint::open(&dir).unwrap().precision() == Precision::Bf16, narrow);
            }
        }
    }
}

#[test]
fn states_and_routes_of_a_pass_are_those_of_its_logits() {
    let work = tempfile::tempdir().unwrap();
    let dense = dense(work.path(), Dtype::F32, true);
    let (sparse, arena) = (dsmoe(&dense), Model::load(&dense).unwrap());
    let embedding = &arena.params()[arena.layout().get("model.embed_tokens.weight").unwrap().range.clone()];
    let model = Inference::load(&sparse, Precision::F32).unwrap();
    let (config, ids) = (model.config().clone(), ids(&model));
    let all = Observe { logits: ids.len(), states: true, routes: true };
    let seen = model.observe(&ids, all).unwrap();

    let (mut stats, mut workspace) = (model.new_stats(), Workspace::default());
    let mut cache = Cache::new(&model, ids.len());
    let logits = model.logits(&ids, ids.len(), &mut cache, stats.as_mut(), &mut workspace).unwrap();
    assert!(seen.logits == logits && seen.stats.as_ref().unwrap().counts().eq(stats.unwrap().counts()));

    let (hidden, vocab, layers) = (config.hidden, config.vocab_size, config.num_layers);
    let states: Vec<&[f32]> = seen.states.chunks_exact(ids.len() * hidden).collect();
    assert_eq!(states.len(), layers + 1);
    for (state, &id) in states[0].chunks_exact(hidden).zip(&ids) {
        assert_eq!(state, &embedding[id as usize * hidden..][..hidden]);
    }
    assert!(states[0] != states[1]);
    for (state, logits) in states[layers].chunks_exact(hidden).zip(seen.logits.chunks_exact(vocab)) {
        let products =
            embedding.chunks_exact(hidden).map(|row| row.iter().zip(state).map(|(a, b)| a * b).sum());
        let products: Vec<f32> = products.collect();
        assert!(distance(&products, logits) < 1e-4);
        assert_eq!(argmax(&products), argmax(logits));
    }
    let routes = seen.stats.as_ref().unwrap().routes().unwrap();
    assert!(routes.iter().all(|layer| layer.active.len() == ids.len() * 8));

    let seen = model.observe(&ids, Observe { logits: 1, ..Observe::default() }).unwrap();
    assert!(seen.logits == logits[logits.len() - vocab..] && seen.states.is_empty());
    assert!(seen.stats.unwrap().routes().is_none());
    refused(model.observe(&[], all), &["give at least one token"]);
    refused(model.observe(&ids[..2], Observe { logits: 3, ..all }), &["2 tokens to read logits of 3"]);
    refused(model.observe(&[vocab as u32], Observe { logits: 1, ..all }), &["token id"]);
}

#[test]
fn the_threshold_moves_where_there_are_gates() {
    let work = tempfile::tempdir().unwrap();
    let dense = dense(work.path(), Dtype::F32, true);
    let mut sparse = Inference::load(&dsmoe(&dense), Precision::F32).unwrap();
    let ids = ids(&sparse);
    let share = |model: &Inference| {
        let mut stats = model.new_stats().unwrap();
        crate::losses(model, Batch { inputs: &ids, targets: &ids, seq: 60 }, Some(&mut stats));
        stats.active_ratio()
    };
    assert!((0.2..0.8).contains(&share(&sparse)));
    for (threshold, want) in [(0.0, 1.0), (1.0, 0.0)] {
        sparse.set_threshold(threshold).unwrap();
        assert_eq!(share(&sparse), want);
        assert_eq!(sparse.config().moe.as_ref().unwrap().router.threshold, threshold);
    }
    refused(sparse.set_threshold(1.5), &["use 0.5"]);
    let mut dense = Inference::load(&dense, Precision::Bf16).unwrap();
    assert!(dense.new_stats().is_none());
    refused(dense.set_threshold(0.5), &["convert it first"]);
}

fn rms_of_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    distance(a, b) / (a.len() as f64).sqrt()
}

/// Rounding the weights of a product to eight bits and rounding its inputs change each of its terms by a factor
/// within 2^-8 of 1, independently: the outputs change by about as much, in the root mean square, for the one as
/// for the other. So where the weights are bf16 already, what bf16 inference changes (it rounds inputs) is held
/// against what rounding the weights on another grid changes: up to twice as much, and no less than a quarter
/// (else nothing was rounded).
#[test]
fn bf16_errs_by_the_rounding_of_its_operands() {
    let work = tempfile::tempdir().unwrap();
    let dense = dense(work.path(), Dtype::BF16, false);
    let mut dirs = vec![dsmoe(&dense), dense];
    if let Some(shared) = shared("bf16_errs_by_the_rounding_of_its_operands", "models") {
        let models = ["tinystories-656k", "stories-260k", "babyllama-1m"];
        dirs.extend(models.map(|name| shared.join("models").join(name)));
    }
    for dir in dirs {
        let mut model = Model::load(&dir).unwrap();
        if model.num_experts().is_some() {
            // All experts: a gate that a rounding pushes over the threshold is no small change.
            model.set_threshold(0.0).unwrap();
        }
        round_matrices(&mut model, 1.0);
        let exact = outputs(&Inference::new(&model, Precision::F32));
        let half = outputs(&Inference::new(&model, Precision::Bf16));
        round_matrices(&mut model, 1.37);
        let moved = outputs(&Inference::new(&model, Precision::F32));
        let pairs = [(exact.0, half.0, moved.0), (exact.1, half.1, moved.1)];
        for (what, (exact, half, moved)) in ["logits", "losses"].into_iter().zip(pairs) {
            let (inputs, weights) = (rms_of_difference(&exact, &half), rms_of_difference(&exact, &moved));
            assert!(
                inputs < 2.0 * weights && inputs > weights / 4.0,
                "{}: {what} change by {inputs} when inputs are rounded, by {weights} when weights are",
                dir.display()
            );
        }
    }
}

/// Rounds all weights but norms and routers to bf16 multiples of `1 / grid`.
fn round_matrices(model: &mut Model, grid: f32) {
    for entry in model.layout().clone().entries() {
        if entry.spec.shape.len() == 2 && !entry.spec.router {
            let weights = &mut model.params_mut()[entry.range.clone()];
            weights.iter_mut().for_each(|w| *w = bf16::from_f32(*w * grid).to_f32() / grid);
        }
    }
}

#[test]
fn a_generation_ends_where_the_model_overflows() {
    let work = tempfile::tempdir().unwrap();
    let mut model = Model::load(&dense(work.path(), Dtype::F32, false)).unwrap();
    let norm = model.layout().entries().iter().find(|entry| entry.spec.name == "model.norm.weight");
    let range = norm.unwrap().range.clone();
    model.params_mut()[range].fill(f32::MAX);
    let model = Inference::new(&model, Precision::F32);
    let options = dsmoe_core::generate::GenerateOptions::default();
    let done = dsmoe_core::generate::generate(&model, &ids(&model)[..3], &options, |_| true);
    refused(done, &["the model overflows: its logits after token 3 are not finite", "an earlier checkpoint"]);
}
