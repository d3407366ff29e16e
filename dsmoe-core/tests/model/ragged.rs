//! Batches of sequences of different lengths: every token's result is that of its sequence alone, to the bit.

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::generate::argmax;
use dsmoe_core::model::{After, Batch, Cache, Inference, Likelihood, Segment, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{refused, with_threads};

use crate::{dense, logits, losses};

const VOCAB: usize = 75;
const SIZES: [(&str, usize); 3] =
    [("intermediate_size", 88), ("vocab_size", VOCAB), ("num_hidden_layers", 2)];

fn text(seed: u32, len: usize) -> Vec<u32> {
    crate::ids(len, seed, VOCAB as u32)
}

/// Returns a segment that continues none.
fn first(tokens: usize) -> Segment {
    Segment { tokens, after: After::Nothing }
}

/// Each text's likelihoods of its own next tokens from `from` on, asked for by itself.
fn alone(model: &Inference, text: &[u32], from: usize) -> Vec<Likelihood> {
    let inputs = &text[..text.len() - 1];
    let segments = [first(inputs.len())];
    let targets: Vec<_> = (from - 1..inputs.len()).map(|at| (at, text[at + 1])).collect();
    model.likelihoods(inputs, &segments, &targets, None, &mut Workspace::default()).unwrap()
}

/// Checks a random dense model, and the same cut into experts.
fn each_model(check: impl Fn(&Inference)) {
    let work = tempfile::tempdir().unwrap();
    let (dense, dsmoe) = (dense(work.path(), &SIZES, Dtype::F32, true), work.path().join("dsmoe"));
    convert(&dense, &dsmoe, &ConvertOptions::new(8), &mut |_| {}).unwrap();
    for dir in [dense, dsmoe] {
        for precision in [Precision::F32, Precision::Bf16] {
            check(&Inference::load(&dir, precision).unwrap());
        }
    }
}

#[test]
fn likelihoods_are_those_of_scoring_and_of_the_logits() {
    each_model(|model| {
        let text = text(1, 50);
        let found = alone(model, &text, 1);
        let losses = losses(model, Batch { inputs: &text[..49], targets: &text[1..], seq: 49 }, None);
        let logits = logits(model, [&text[..49]]);
        let mut greedy = 0;
        for (i, likelihood) in found.iter().enumerate() {
            assert!((likelihood.log_probability + losses[i]).abs() < 1e-5, "{likelihood:?} {}", losses[i]);
            let best = argmax(&logits[i * VOCAB..(i + 1) * VOCAB]);
            assert_eq!(likelihood.greedy, best == text[i + 1], "{i}");
            // The likeliest token is found to be it.
            let workspace = &mut Workspace::default();
            let best =
                model.likelihoods(&text[..=i], &[first(i + 1)], &[(i, best)], None, workspace).unwrap();
            greedy += usize::from(best[0].greedy);
        }
        assert_eq!(greedy, found.len());
    });
}

/// Tokens that see earlier ones in caches alone, all of a text and parts of it.
#[test]
fn tokens_score_alike_after_what_caches_hold() {
    each_model(|model| {
        let (texts, seq) = ([text(1, 21), text(2, 21)], 20);
        let inputs: Vec<u32> = texts.iter().flat_map(|text| &text[..seq]).copied().collect();
        let targets: Vec<u32> = texts.iter().flat_map(|text| &text[1..]).copied().collect();
        let want = losses(model, Batch { inputs: &inputs, targets: &targets, seq }, None);
        let workspace = &mut Workspace::default();
        let mut caches = Vec::new();
        for text in &texts {
            let mut cache = Cache::new(model, seq);
            model.decode(&text[..seq], &mut cache, None, workspace).unwrap();
            caches.push(cache);
        }
        // Attention adds up in another order, which rounds operands to other values of bf16.
        let tolerance = if model.precision() == Precision::F32 { 1e-4 } else { 2e-2 };
        for (start, len) in [(0, seq), (0, 1), (7, 5), (19, 1)] {
            let of = |ids: &[u32]| -> Vec<u32> {
                ids.chunks_exact(seq).flat_map(|ids| &ids[start..start + len]).copied().collect()
            };
            let (inputs, targets) = (of(&inputs), of(&targets));
            let batch = Batch { inputs: &inputs, targets: &targets, seq: len };
            let mut got = vec![f32::NAN; 2 * len];
            model.score_after(&mut got, batch, (&caches, start), workspace).unwrap();
            let want = want.chunks_exact(seq).flat_map(|losses| &losses[start..start + len]);
            let off = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
            assert!(off < tolerance && got.iter().all(|loss| loss.is_finite()), "{start} {len}: {off}");
        }
        assert!(caches.iter().all(|cache| cache.len() == seq));
        let mut none = [0.0];
        let batch = Batch { inputs: &[VOCAB as u32], targets: &[0], seq: 1 };
        refused(model.score_after(&mut none, batch, (&caches[..1], 3), workspace), &["token id 75"]);
    });
}

#[test]
fn a_sequence_scores_alike_alone_in_a_batch_and_behind_a_shared_beginning() {
    each_model(|model| {
        let context = text(2, 37);
        let endings = [text(3, 1), text(4, 9), text(5, 30), text(6, 2)];
        let other = text(7, 70);
        let mut stats = model.new_stats();
        let mut ids = other[..69].to_vec();
        let mut segments = vec![first(69), first(context.len())];
        let mut targets: Vec<_> = (0..69).map(|at| (at, other[at + 1])).collect();
        ids.extend(&context);
        let last = ids.len() - 1;
        for ending in &endings {
            let first = ids.len();
            segments.push(Segment { tokens: ending.len() - 1, after: After::Segment(1) });
            ids.extend(&ending[..ending.len() - 1]);
            targets.push((last, ending[0]));
            targets.extend((1..ending.len()).map(|i| (first + i - 1, ending[i])));
        }
        let workspace = &mut Workspace::default();
        let found = model.likelihoods(&ids, &segments, &targets, stats.as_mut(), workspace).unwrap();
        let (found_other, mut found) = found.split_at(69);
        assert_eq!(found_other, alone(model, &other, 1));
        for ending in &endings {
            let (here, rest) = found.split_at(ending.len());
            found = rest;
            let whole = [&context[..], ending].concat();
            assert_eq!(here, alone(model, &whole, context.len()), "{}", ending.len());
        }
        if let Some(stats) = stats {
            assert_eq!(stats.summary().tokens, ids.len() as u64);
        }
        for threads in [1, 3] {
            let again = with_threads(threads, || {
                model.likelihoods(&ids, &segments, &targets, None, &mut Workspace::default()).unwrap()
            });
            assert_eq!(again[..69], *found_other);
        }
    });
}

#[test]
fn many_sequences_decode_as_each_alone() {
    each_model(|model| {
        // More texts than a kernel for a few rows would take.
        let prompts = [(1, 7), (2, 20), (3, 1), (4, 3), (5, 9), (6, 2)].map(|(seed, len)| text(seed, len));
        let mut workspace = Workspace::default();
        let alone: Vec<Vec<f32>> = prompts
            .iter()
            .map(|prompt| {
                let mut cache = Cache::new(model, 30);
                model.decode(prompt, &mut cache, None, &mut workspace).unwrap();
                (0..5)
                    .flat_map(|i| model.decode(&[i * 3], &mut cache, None, &mut workspace).unwrap().to_vec())
                    .collect()
            })
            .collect();
        let mut caches = [(); 6].map(|()| Cache::new(model, 1));
        for (prompt, cache) in prompts.iter().zip(&mut caches) {
            model.decode(prompt, cache, None, &mut workspace).unwrap();
        }
        for i in 0..5 {
            let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
            let logits = model.decode_each(&[i * 3; 6], &mut caches, None, &mut workspace).unwrap();
            for (logits, alone) in logits.chunks(VOCAB).zip(&alone) {
                assert_eq!(logits, &alone[i as usize * VOCAB..][..VOCAB]);
            }
        }
        assert_eq!(caches.map(|cache| cache.len()), [12, 25, 6, 8, 14, 7]);
    });
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let dense = dense(work.path(), &SIZES, Dtype::F32, true);
    let model = Inference::load(&dense, Precision::F32).unwrap();
    let positions = model.config().max_position;
    let workspace = &mut Workspace::default();
    let segments = [first(positions), Segment { tokens: 1, after: After::Segment(0) }];
    let long = model.likelihoods(&vec![1; positions + 1], &segments, &[], None, workspace);
    refused(long, &["positions are more than"]);
    for (id, target) in [(75, 0), (0, 75)] {
        refused(model.likelihoods(&[id], &[first(1)], &[(0, target)], None, workspace), &["token id 75"]);
    }
    let mut cache = Cache::new(&model, 1);
    assert!(model.decode_each(&[75], &mut [&mut cache], None, workspace).is_err());
    assert!(cache.is_empty());
}
