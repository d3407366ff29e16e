//! Sequences of different lengths in one batch, and the likelihoods asked for in them.

use crate::config::Config;
use crate::error::Result;
use crate::model::tensors::check_input;

/// Context of a [`Segment`].
///
/// ```
/// use dsmoe_core::model::{After, Segment, Workspace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // The tokens 1 5 9 in one piece, and cut into a beginning and what comes after it.
/// let whole = [Segment { tokens: 3, after: After::Nothing }];
/// let cut = [Segment { tokens: 2, after: After::Nothing }, Segment { tokens: 1, after: After::Segment(0) }];
/// let mut last = |segments: &[Segment]| {
///     model.likelihoods(&[1, 5, 9], segments, &[(2, 7)], None, &mut Workspace::default())
/// };
/// let difference = last(&whole)?[0].log_probability - last(&cut)?[0].log_probability;
/// assert!(difference.abs() < 1e-4);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing.
    Nothing,
    /// The tokens of an earlier segment of the batch, which has nothing before it.
    Segment(usize),
}

/// Tokens of one sequence, one after the other in a batch.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{After, Likelihood, Segment, Workspace};
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
/// // Two continuations of one beginning, which runs once.
/// let segments = [
///     Segment { tokens: 2, after: After::Nothing },
///     Segment { tokens: 1, after: After::Segment(0) },
///     Segment { tokens: 1, after: After::Segment(0) },
/// ];
/// let (ids, targets) = ([1, 5, 9, 8], [(1, 9), (1, 8)]);
/// let found: Vec<Likelihood> =
///     model.likelihoods(&ids, &segments, &targets, None, &mut Workspace::default())?;
/// assert!(found.iter().all(|likelihood| likelihood.log_probability < 0.0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Number of tokens.
    pub tokens: usize,
    /// Context that they continue.
    pub after: After,
}

/// Likelihood of a token at a place of the text.
///
/// ```
/// use dsmoe_core::model::{After, Likelihood, Segment, Workspace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // How likely is 9 2 after 1 5?
/// let (ids, segments) = ([1, 5, 9], [Segment { tokens: 3, after: After::Nothing }]);
/// let found = model.likelihoods(&ids, &segments, &[(1, 9), (2, 2)], None, &mut Workspace::default())?;
/// let sum: f32 = found.iter().map(|Likelihood { log_probability, .. }| log_probability).sum();
/// assert!(sum < 0.0);
/// assert!(!found.iter().all(|likelihood| likelihood.greedy), "greedy decoding would not write this");
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
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

/// A batch whose segments have no context in other segments: each has its own copy.
pub(crate) struct Alone {
    pub(crate) ids: Vec<u32>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) targets: Vec<(usize, u32)>,
}

impl Alone {
    /// Copies contexts into the segments that continue them: a context shared by texts of different lengths would be
    /// rotated as one of them.
    pub(crate) fn of(ids: &[u32], places: &[Place], targets: &[(usize, u32)]) -> Alone {
        let mut alone = Alone { ids: Vec::new(), segments: Vec::new(), targets: Vec::new() };
        // Where the own tokens of each segment are now.
        let mut starts = Vec::with_capacity(places.len());
        for &Place { first, tokens, before: (start, before), .. } in places {
            alone.ids.extend_from_slice(&ids[start..start + before]);
            starts.push((first, alone.ids.len()));
            alone.ids.extend_from_slice(&ids[first..first + tokens]);
            alone.segments.push(Segment { tokens: before + tokens, after: After::Nothing });
        }
        alone.targets.extend(targets.iter().map(|&(place, token)| {
            let segment = starts.partition_point(|&(first, _)| first <= place) - 1;
            let (first, now) = starts[segment];
            (now + place - first, token)
        }));
        alone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_copied_and_targets_follow() {
        let ids = [5, 6, 7, 8, 9];
        let place = |first, tokens, before: (usize, usize)| Place {
            first,
            tokens,
            before,
            positions: before.1 + tokens,
        };
        let places = [place(0, 2, (0, 0)), place(2, 1, (0, 2)), place(3, 0, (0, 2)), place(3, 2, (0, 2))];
        let alone = Alone::of(&ids, &places, &[(1, 40), (2, 41), (4, 42)]);
        assert_eq!(alone.ids, [5, 6, 5, 6, 7, 5, 6, 5, 6, 8, 9]);
        assert_eq!(alone.segments.iter().map(|segment| segment.tokens).collect::<Vec<_>>(), [2, 3, 2, 4]);
        assert_eq!(alone.targets, [(1, 40), (4, 41), (10, 42)]);
    }
}
