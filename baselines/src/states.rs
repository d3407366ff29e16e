//! The hidden states of calibration text that an interrupted pass through the layers of a model leaves.

use dsmoe_core::calibrate::LayerStream;

use crate::error::Result;
use crate::partial::{Pace, Partial};

/// The part, and its tensor.
const STATES: &str = "states";

/// The states behind the last layers that a pass has finished.
pub(crate) struct States<'a> {
    partial: &'a Partial,
    /// The number of the pass in its job.
    pass: usize,
    pace: Pace,
}

impl<'a> States<'a> {
    /// Begins the pass of that number of a job.
    pub(crate) fn of(partial: &'a Partial, pass: usize) -> States<'a> {
        States { partial, pass, pace: Pace::new() }
    }

    /// Gives `stream` the states that an interrupted pass has left, and returns how many layers they have passed, at most the first
    /// `finished`; 0 where there are none. Where all layers are finished, none has to run.
    pub(crate) fn restore(&self, stream: &mut LayerStream, finished: usize) -> Result<usize> {
        if finished == stream.config().num_layers {
            return Ok(finished);
        }
        let Some(part) = self.partial.read::<[usize; 2]>(STATES)? else { return Ok(0) };
        let [pass, passed] = part.value;
        if pass != self.pass || passed > finished {
            return Ok(0);
        }
        let states = part.tensor(STATES)?;
        if states.len() != stream.states().len() {
            return Ok(0);
        }
        stream.set_states(&states);
        Ok(passed)
    }

    /// Keeps the states behind a layer, if the last ones are old. No layer needs those behind the last one.
    pub(crate) fn keep(&mut self, layer: usize, stream: &LayerStream) -> Result<()> {
        if layer + 1 == stream.config().num_layers || !self.pace.is_due() {
            return Ok(());
        }
        self.partial.keep(STATES, &[self.pass, layer + 1], &[(STATES, stream.states())])
    }
}
