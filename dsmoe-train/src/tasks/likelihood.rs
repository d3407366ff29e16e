//! Log-likelihoods: requests of a document share the beginning of their inputs, and documents of similar length share a
//! forward pass.

use dsmoe_core::model::{After, Likelihood, Segment};

use super::encode::Scored;

/// Requests that are run together.
pub(crate) struct Unit {
    /// Index of the document.
    pub(crate) document: usize,
    /// Each with the index of its request; several windows may be of one.
    pub(crate) scored: Vec<(usize, Scored)>,
    /// Tokens that all inputs begin with.
    shared: usize,
}

impl Unit {
    pub(crate) fn new(document: usize, scored: Vec<(usize, Scored)>) -> Unit {
        let shared = match &scored[..] {
            [] | [_] => 0,
            [(_, first), rest @ ..] => rest.iter().fold(first.inputs.len(), |shared, (_, other)| {
                let pairs = first.inputs.iter().zip(&other.inputs).take(shared);
                pairs.take_while(|(a, b)| a == b).count()
            }),
        };
        Unit { document, scored, shared }
    }

    /// Returns the number of tokens that are run.
    pub(crate) fn tokens(&self) -> usize {
        self.shared + self.scored.iter().map(|(_, scored)| scored.inputs.len() - self.shared).sum::<usize>()
    }
}

/// The inputs of a forward pass.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) ids: Vec<u32>,
    pub(crate) segments: Vec<Segment>,
    /// Places and tokens, one request after the other.
    pub(crate) targets: Vec<(usize, u32)>,
}

impl Batch {
    pub(crate) fn push(&mut self, unit: &Unit) {
        let root = (self.segments.len(), self.ids.len());
        if unit.shared > 0 {
            self.add(&unit.scored[0].1.inputs[..unit.shared], After::Nothing);
        }
        for (_, Scored { inputs, targets }) in &unit.scored {
            let first = self.ids.len();
            if unit.shared == 0 {
                self.add(inputs, After::Nothing);
            } else if inputs.len() > unit.shared {
                self.add(&inputs[unit.shared..], After::Segment(root.0));
            }
            let place = |at: usize| if at < unit.shared { root.1 + at } else { first + at - unit.shared };
            let places = (inputs.len() - targets.len()..inputs.len()).map(place);
            self.targets.extend(places.zip(targets.iter().copied()));
        }
    }

    fn add(&mut self, ids: &[u32], after: After) {
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment { tokens: ids.len(), after });
    }
}

/// Takes the targets of one request off `found` and returns the sum of their log-probabilities, and whether all are
/// greedy.
pub(crate) fn total(found: &mut impl Iterator<Item = Likelihood>, targets: usize) -> (f64, bool) {
    found.take(targets).fold((0.0, true), |(sum, greedy), likelihood| {
        (sum + f64::from(likelihood.log_probability), greedy && likelihood.greedy)
    })
}
