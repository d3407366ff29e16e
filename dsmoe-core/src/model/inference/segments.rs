//! Sequences of different lengths in one batch, and the likelihoods asked for in them.

use crate::config::Config;
use crate::error::Result;
use crate::model::tensors::check_input;

/// Context of a [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing.
    Nothing,
    /// The tokens of an earlier segment of the batch, which has nothing before it.
    Segment(usize),
}

/// Tokens of one sequence, one after the other in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Number of tokens.
    pub tokens: usize,
    /// Context that they continue.
    pub after: After,
}

/// Likelihood of a token at a place of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// Natural logarithm of its probability.
    pub log_probability: f32,
    /// True if no token is likelier; of equally likely ones the lowest id counts.
    pub greedy: bool,
}

/// Place of a segment in the batch.
pub(crate) struct Place {
    /// Its first token in the batch.
    pub(crate) first: usize,
    pub(crate) tokens: usize,
    /// The first token and the number of those before it.
    pub(crate) before: (usize, usize),
    /// Positions of the whole sequence.
    pub(crate) positions: usize,
}

/// Locates the segments in `ids` and checks both.
pub(crate) fn places(config: &Config, ids: &[u32], segments: &[Segment]) -> Result<Vec<Place>> {
    let mut places: Vec<Place> = Vec::with_capacity(segments.len());
    let mut first = 0;
    for (i, &Segment { tokens, after }) in segments.iter().enumerate() {
        let before = match after {
            After::Nothing => (0, 0),
            After::Segment(j) => {
                assert!(j < i && places[j].before.1 == 0, "likelihoods: segment {i} continues {j}");
                (places[j].first, places[j].tokens)
            }
        };
        assert!(first + tokens <= ids.len(), "likelihoods: segment {i} ends behind {} tokens", ids.len());
        check_input(config, &ids[first..first + tokens], before.1, tokens)?;
        places.push(Place { first, tokens, before, positions: before.1 + tokens });
        first += tokens;
    }
    assert_eq!(first, ids.len(), "likelihoods: tokens of all segments");
    Ok(places)
}
