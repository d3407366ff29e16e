//! The layer stream is the model, and its taps are what the linears read.

use std::path::{Path, PathBuf};

use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights, StateScorer};
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::kept::LayerThresholds;
use dsmoe_core::model::{Batch, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::cross_entropy::IGNORE;
use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, refused, shared};

/// A random model with grouped heads in `dir`.
fn small(dir: &Path, dtype: Dtype, tied: bool) -> PathBuf {
    let heads =
        [("hidden_size", 48), ("num_attention_heads", 6), ("num_key_value_heads", 2), ("head_dim", 10)];
    let others = [("intermediate_size", 88), ("vocab_size", 75), ("num_hidden_layers", 3)];
    crate::dense(dir, &[&heads[..], &others].concat(), dtype, tied)
}

fn sequences(vocab: usize, count: usize, seq: usize) -> Vec<Vec<u32>> {
    let ids = crate::ids(count * seq + 1, 0, vocab as u32);
    ids[1..].chunks(seq).map(<[u32]>::to_vec).collect()
}

/// Sums of a linear layer in f64: `x W^T`.
fn linear(x: &[f64], w: &[f32], inputs: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum();
    x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| dot(x, w))).collect()
}

fn rms_norm(x: &[f64], weight: &[f32], eps: f64) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|x| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let rstd = 1.0 / (mean + eps).sqrt();
            x.iter().zip(weight).map(move |(x, &w)| x * rstd * f64::from(w)).collect::<Vec<_>>()
        })
        .collect()
}

/// Streams a model; the logits of all tokens in f64 from the last states.
fn streamed_logits(dir: &Path, sequences: &[Vec<u32>]) -> Vec<f64> {
    let mut stream = LayerStream::open(dir, sequences).unwrap();
    let config = stream.config().clone();
    for i in 0..config.num_layers {
        let weights = stream.layer(i).unwrap();
        stream.advance(&weights).unwrap();
    }
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut norm = vec![0.0; config.hidden];
    checkpoint.read_f32("model.norm.weight", &mut norm).unwrap();
    let mut head = vec![0.0; config.vocab_size * config.hidden];
    let name = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    checkpoint.read_f32(name, &mut head).unwrap();
    linear(&rms_norm(&f64s(stream.states()), &norm, config.rms_norm_eps), &head, config.hidden)
}

fn inference_logits(dir: &Path, sequences: &[Vec<u32>]) -> Vec<f32> {
    let model = Inference::load(dir, Precision::F32).unwrap();
    sequences.iter().flat_map(|ids| crate::logits(&model, [&ids[..]])).collect()
}

#[test]
fn the_last_states_give_the_models_logits() {
    let work = tempfile::tempdir().unwrap();
    let mut models: Vec<PathBuf> = [(Dtype::F32, true), (Dtype::BF16, false)]
        .into_iter()
        .map(|(dtype, tied)| small(work.path(), dtype, tied))
        .collect();
    models.extend(shared("calibrate", "models").map(|dir| dir.join("models/babyllama-1m")));
    for dir in models {
        let sequences = sequences(Config::load(&dir).unwrap().vocab_size, 3, 37);
        let (got, want) = (inference_logits(&dir, &sequences), streamed_logits(&dir, &sequences));
        assert_close(&dir.display().to_string(), &got, &want, 2e-5);
    }
}

#[test]
fn taps_are_what_the_linears_read_and_forward_keeps_the_states() {
    let work = tempfile::tempdir().unwrap();
    let dir = small(work.path(), Dtype::F32, true);
    let (count, seq) = (2, 19);
    let mut stream = LayerStream::open(&dir, &sequences(75, count, seq)).unwrap();
    let (hidden, eps) = (stream.config().hidden, stream.config().rms_norm_eps);
    for i in 0..stream.config().num_layers {
        let weights = stream.layer(i).unwrap();
        let before = f64s(stream.states());
        let mut seen: [Vec<f64>; 4] = Default::default();
        let mut order = Vec::new();
        stream
            .forward(&weights, &mut |tap| {
                order.push((tap.sequence, tap.input));
                let place = Input::ALL.iter().position(|input| *input == tap.input).unwrap();
                seen[place].extend(f64s(tap.x));
            })
            .unwrap();
        let wanted: Vec<_> =
            (0..count).flat_map(|sequence| Input::ALL.map(|input| (sequence, input))).collect();
        assert_eq!(order, wanted);
        assert_eq!(f64s(stream.states()), before);

        let LayerWeights { norms: [Some(input_norm), None, Some(post_norm), None], linears, .. } = &weights
        else {
            panic!("LLaMA's norms");
        };
        let [_, _, _, o, gate, up, down] = linears;
        let [attention, heads, ffn, neurons] = &seen;
        assert_close_f64("attention", attention, &rms_norm(&before, input_norm, eps), 2e-6);
        let add = |x: &[f64], y: Vec<f64>| x.iter().zip(y).map(|(x, y)| x + y).collect::<Vec<f64>>();
        let middle = add(&before, linear(heads, &o.weight, o.inputs));
        assert_close_f64("ffn", ffn, &rms_norm(&middle, post_norm, eps), 4e-6);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let activated: Vec<f64> = linear(ffn, &gate.weight, hidden)
            .into_iter()
            .zip(linear(ffn, &up.weight, hidden))
            .map(|(a, b)| silu(a) * b)
            .collect();
        assert_close_f64("neurons", neurons, &activated, 4e-6);
        let after = add(&middle, linear(neurons, &down.weight, down.inputs));
        stream.advance(&weights).unwrap();
        assert_close("states", stream.states(), &after, 4e-6);
    }
}

#[test]
fn changed_weights_are_the_ones_that_run() {
    let work = tempfile::tempdir().unwrap();
    let dir = small(work.path(), Dtype::F32, true);
    let mut stream = LayerStream::open(&dir, &sequences(75, 1, 9)).unwrap();
    let before = stream.states().to_vec();
    let mut weights = stream.layer(0).unwrap();
    for input in [Input::Heads, Input::Neurons] {
        weights.reading(input).for_each(|linear| linear.weight.fill(0.0));
    }
    stream.advance(&weights).unwrap();
    assert_eq!(stream.states(), before);
}

#[test]
fn bad_calibration_is_named() {
    let work = tempfile::tempdir().unwrap();
    let dir = small(work.path(), Dtype::F32, true);
    for (sequences, part) in [
        (vec![vec![1, 2], vec![1]], "calibration sequence 1 has 1 tokens and the first 2"),
        (vec![vec![]], "calibration sequence 0 has 0 tokens"),
        (vec![vec![75]], "token id 75 is not below vocab_size 75"),
        (vec![vec![1; 5000]], "max_position_embeddings"),
    ] {
        refused(LayerStream::open(&dir, &sequences), &[part]);
    }
    let experts = work.path().join("dsmoe");
    convert(&dir, &experts, &ConvertOptions::new(4), &mut |_| {}).unwrap();
    refused(LayerStream::open(&experts, &[]), &["use a dense model"]);
    assert!(LayerStream::open(&dir, &[]).unwrap().layer(2).is_ok());
}

/// The losses of states in front of any layer are those of the whole model, with thresholds and without.
#[test]
fn states_in_front_of_any_layer_score_as_the_whole_model() {
    let work = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let dir = small(work.path(), Dtype::F32, tied);
        let model = Model::load(&dir).unwrap();
        let text = sequences(75, 3, 29);
        let targets: Vec<u32> =
            text.iter().flat_map(|ids| ids[1..].iter().copied().chain([IGNORE])).collect();
        let skipped = |inputs, gate| LayerThresholds { inputs, gate, ..LayerThresholds::NONE };
        let some = vec![
            skipped([0.3, 0.5, 0.7, 0.1, 0.4, 0.6, 0.02], 0.0),
            LayerThresholds::NONE,
            skipped([0.0, 0.2, 0.0, 0.1, 0.0, 0.0, 0.0], 0.01),
        ];
        let mut all = Vec::new();
        for thresholds in [vec![LayerThresholds::NONE; 3], some] {
            let whole = Inference::with_thresholds(&model, thresholds.clone(), Precision::F32);
            let mut want = Vec::new();
            for ids in &text {
                let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
                want.extend(f64s(&crate::losses(&whole, Batch { inputs, targets, seq: inputs.len() }, None)));
                // The last token of a sequence has no target.
                want.push(0.0);
            }
            let mut stream = LayerStream::open(&dir, &text).unwrap();
            let mut scorer = StateScorer::new(&stream).unwrap();
            thresholds.iter().enumerate().for_each(|(i, &of_layer)| scorer.set_thresholds(i, of_layer));
            let mut from_start = vec![f32::NAN; targets.len()];
            scorer.score(&mut from_start, &stream, 0, &targets);
            assert_close("whole model", &from_start, &want, 1e-6);
            for (i, &of_layer) in thresholds.iter().enumerate() {
                let mut weights = stream.layer(i).unwrap();
                weights.thresholds = Some(of_layer);
                stream.advance(&weights).unwrap();
                let mut losses = vec![f32::NAN; targets.len()];
                scorer.score(&mut losses, &stream, i + 1, &targets);
                assert_eq!(losses, from_start, "behind layer {i}");
            }
            all.push(from_start);
        }
        assert!(all[0].iter().zip(&all[1]).any(|(a, b)| (a - b).abs() > 1e-2), "thresholds matter");
    }
}

/// A search sets thresholds again and again, and takes them back.
#[test]
fn thresholds_of_a_scorer_are_taken_back() {
    let work = tempfile::tempdir().unwrap();
    let text = sequences(75, 2, 17);
    let stream = LayerStream::open(&small(work.path(), Dtype::F32, true), &text).unwrap();
    let mut scorer = StateScorer::new(&stream).unwrap();
    let mut score = |thresholds: LayerThresholds| {
        scorer.set_thresholds(1, thresholds);
        let mut losses = vec![f32::NAN; 34];
        scorer.score(&mut losses, &stream, 0, &text.concat());
        losses
    };
    let without = score(LayerThresholds::NONE);
    assert_ne!(score(LayerThresholds { inputs: [0.5; 7], ..LayerThresholds::NONE }), without);
    assert_eq!(score(LayerThresholds::NONE), without);
}
