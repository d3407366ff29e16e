//! The intermediate values of a pass over a text: states, routes and logits of single tokens.

use dsmoe_router::RoutingStats;

use super::{Cache, Inference, Workspace};
use crate::error::{Error, Result};
use crate::model::tensors::check_input;

/// The values that [`Inference::observe`] keeps.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Observe, Observed};
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
/// let what = Observe { logits: 1, states: true, routes: false };
/// let Observed { logits, states, .. } = model.observe(&[1, 5, 9], what)?;
/// let config = model.config();
/// assert_eq!(logits.len(), config.vocab_size);
/// assert_eq!(states.len(), (config.num_layers + 1) * 3 * config.hidden);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observe {
    /// Tokens at the end of the text whose logits are computed.
    pub logits: usize,
    /// Keep the states behind every layer.
    pub states: bool,
    /// Keep the experts of every token.
    pub routes: bool,
}

/// The values that a pass over one text has computed.
///
/// ```
/// use dsmoe_core::model::{Observe, Observed};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let what = Observe { states: true, ..Observe::default() };
/// let Observed { states, stats, .. } = model.observe(&[1, 5, 9], what)?;
/// // The norm of the last token's state behind every layer, the embedding first.
/// let [hidden, layers] = [model.config().hidden, model.config().num_layers];
/// let last = states.chunks_exact(3 * hidden).map(|tokens| &tokens[2 * hidden..]);
/// let norms: Vec<f32> = last.map(|state| state.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
/// assert_eq!(norms.len(), layers + 1);
/// assert!(stats.is_none()); // a dense model
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// `[logits, vocab]`: the logits after the last tokens.
    pub logits: Vec<f32>,
    /// `[layers + 1, T, hidden]`: the embedded tokens, and the residual stream behind every layer; behind the last one it is normed.
    /// Empty if it was not asked for.
    pub states: Vec<f32>,
    /// The routing, with [`RoutingStats::routes`] if they were asked for; none without experts.
    pub stats: Option<RoutingStats>,
}

impl Inference {
    /// Runs the model over a text of its own and keeps what is asked for. The logits are those that
    /// [`generate`](crate::generate::generate) chooses from.
    ///
    /// # Errors
    /// No ids, fewer ids than logits, a token id outside the vocabulary, or more positions than the model has; the model runs on a
    /// GPU, or its layers are lent.
    pub fn observe(&self, ids: &[u32], what: Observe) -> Result<Observed> {
        let model = self.on_host()?;
        if model.lent.is_some() {
            return Err(Error::argument("layers that are lent keep no states", "load the whole model"));
        }
        if ids.is_empty() || ids.len() < what.logits {
            let problem = format!("{} tokens to read logits of {}", ids.len(), what.logits);
            return Err(Error::argument(problem, "give at least one token, and no more logits than tokens"));
        }
        let config = self.config();
        check_input(config, ids, 0, ids.len())?;
        let states = (config.num_layers + 1) * ids.len() * config.hidden;
        let mut workspace = Workspace::default();
        workspace.states = what.states.then(|| Vec::with_capacity(states));
        let mut stats = self.new_stats().map(|stats| if what.routes { stats.with_routes() } else { stats });
        let mut logits = vec![0.0; what.logits * config.vocab_size];
        let mut cache = Cache::new(self, ids.len());
        model.logits_into(&mut logits, ids, &mut cache, stats.as_mut(), &mut workspace);
        Ok(Observed { logits, states: workspace.states.unwrap_or_default(), stats })
    }
}
