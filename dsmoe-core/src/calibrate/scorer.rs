//! Losses of hidden states in front of some layer: the rest of the model runs, with weights that are packed once.

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::cross_entropy;
use dsmoe_kernels::matmul::{Mat, Packed};

use super::LayerStream;
use super::pass::{Ready, Scratch};
use super::weights::vector;
use crate::checkpoint::WeightReader;
use crate::error::{Error, Result};
use crate::kept::LayerThresholds;
use crate::model::block::Block;
use crate::model::tensors::{in_pool, logits_of};

/// All layers and the head of a dense model, packed once, that score the hidden states of a [`LayerStream`]: a trial of
/// thresholds at a layer runs that layer and those behind it.
///
/// ```
/// use dsmoe_core::calibrate::{LayerStream, StateScorer};
/// use dsmoe_core::kept::{LINEARS, LayerThresholds};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path().join("dense");
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let mut stream = LayerStream::open(&dense, &[vec![1, 5, 9, 2]])?;
/// let mut scorer = StateScorer::new(&stream)?;
/// // The tokens to predict after each of the sequence.
/// let (targets, mut before, mut after) = ([5, 9, 2, 7], [0.0; 4], [0.0; 4]);
/// scorer.score(&mut before, &stream, 0, &targets);
/// let weights = stream.layer(0)?;
/// stream.advance(&weights)?;
/// // The same losses, without the first layer once more.
/// scorer.score(&mut after, &stream, 1, &targets);
/// assert_eq!(before, after);
/// scorer.set_thresholds(1, LayerThresholds { inputs: [0.5; LINEARS], ..LayerThresholds::NONE });
/// scorer.score(&mut after, &stream, 1, &targets);
/// assert_ne!(before, after);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StateScorer {
    layers: Vec<Ready<'static>>,
    /// Weight `[hidden]` of the norm that the head reads from.
    norm: Buf,
    /// `[vocab, hidden]`
    head: Packed,
    scratch: Scratch,
    /// The states `[seq, hidden]` of a sequence on its way.
    states: Buf,
    /// Logits of some tokens.
    logits: Buf,
}

impl StateScorer {
    /// Packs the layers and the head of the stream's model in the stream's precision; no input is skipped.
    ///
    /// # Errors
    /// The model has experts; a file cannot be read, or has a weight that is not finite.
    pub fn new(stream: &LayerStream) -> Result<StateScorer> {
        let LayerStream { config, checkpoint, names, precision, .. } = stream;
        if !config.is_dense() {
            return Err(Error::argument(
                "states of a model with experts are not scored",
                "use a dense model",
            ));
        }
        let pack = |i| Ok(Ready::owned(stream.layer(i)?, *precision));
        let layers = (0..config.num_layers).map(pack).collect::<Result<Vec<_>>>()?;
        let mut reader = WeightReader::resume(*names, checkpoint);
        let norm = vector(&mut reader, "model.norm.weight".to_owned(), config.hidden)?;
        let mut head = Packed::zeros(*precision, config.vocab_size, config.hidden);
        let mut first = 0;
        stream.head(&mut |values| {
            let rows = values.len() / config.hidden;
            head.set_rows(first, Mat::new(values, rows, config.hidden));
            first += rows;
        })?;
        let (scratch, states, logits) = (Scratch::default(), Buf::default(), Buf::default());
        Ok(StateScorer { layers, norm, head, scratch, states, logits })
    }

    /// Sets the thresholds that inputs of layer `i` have to exceed, as
    /// [`LayerWeights::thresholds`](super::LayerWeights::thresholds) does.
    ///
    /// # Panics
    /// The model has no layer `i`.
    pub fn set_thresholds(&mut self, i: usize, thresholds: LayerThresholds) {
        self.layers[i].set_thresholds(thresholds);
    }

    /// Sets `losses` `[sequences, seq]` to the negative log-likelihood (nats) of each of `targets` `[sequences, seq]`, and to 0
    /// for [`IGNORE`](dsmoe_kernels::cross_entropy::IGNORE). The states of `stream`, which are in front of layer `first`, run
    /// through that layer, all behind it and the head. The stream's own states stay, and every process scores all sequences.
    ///
    /// # Panics
    /// The stream is of another model, there are not as many losses and targets as tokens, `first` is more than the number of
    /// layers, or a target is outside the vocabulary.
    pub fn score(&mut self, losses: &mut [f32], stream: &LayerStream, first: usize, targets: &[u32]) {
        let LayerStream { config, ropes, seq, states: before, .. } = stream;
        let tokens = before.len() / config.hidden;
        assert!(
            losses.len() == tokens && targets.len() == tokens,
            "score: {} losses, {} targets and {tokens} tokens",
            losses.len(),
            targets.len()
        );
        let StateScorer { layers, norm, head, scratch, states, logits } = self;
        let (layers, norm, head, seq) = (&layers[first..], &*norm, &*head, (*seq).max(1));
        states.resize(seq * config.hidden);
        in_pool(|| {
            let sequences = losses.chunks_exact_mut(seq).zip(targets.chunks_exact(seq));
            for ((losses, targets), before) in sequences.zip(before.chunks_exact(seq * config.hidden)) {
                states.copy_from_slice(before);
                for layer in layers {
                    scratch.layer(states, layer, config, ropes, &mut |_, _, _| {});
                    states.copy_from_slice(&scratch.x);
                }
                scratch.set_states(states, seq);
                Block::of(config).norm(norm, &mut scratch.h, &mut scratch.rstd, states);
                let (hidden_states, space, logits) = (&scratch.h[..], &mut *logits, logits_of(config));
                cross_entropy::ForwardPacked { losses, hidden_states, head, targets, logits, space }.run();
            }
        });
    }
}
