//! The caches of keys and values that the tokens of an oracle attend to, of the earlier tokens of their window.

use std::str::FromStr;

use dsmoe_core::Inference;
use dsmoe_core::model::{Batch, Cache, Workspace};
use dsmoe_datasets::{EvalWindow, eval_windows};
use serde::Serialize;

use super::routes::{Digits, RouteSpace};
use crate::error::{Error, Result};

/// Tokens that run together, about. An interrupted greedy oracle loses what it has of one such group.
const TOGETHER: usize = if cfg!(test) { 64 } else { 1024 };

/// The route of the earlier tokens of a window.
///
/// ```
/// use dsmoe_train::oracle::{OracleOptions, RouteContext, RouteKind};
///
/// let context: RouteContext = "greedy".parse()?;
/// let options = OracleOptions { context, ..OracleOptions::new(RouteKind::BigSkip, 256) };
/// assert_ne!(options.context, RouteContext::default());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteContext {
    /// The one that is tried: all tokens of the text take it.
    #[default]
    Same,
    /// The default one: of every window, a single token takes the one that is tried.
    Dense,
    /// Their own best ones of all that are tried.
    Greedy,
}

impl FromStr for RouteContext {
    type Err = Error;

    fn from_str(text: &str) -> Result<RouteContext> {
        match text {
            "same" => Ok(RouteContext::Same),
            "dense" => Ok(RouteContext::Dense),
            "greedy" => Ok(RouteContext::Greedy),
            _ => Err(Error::field("context", format!("{text:?}"), "same, dense or greedy")),
        }
    }
}

/// Windows of one length that run together.
struct Group {
    inputs: Vec<u32>,
    targets: Vec<u32>,
    /// Inputs of a window.
    seq: usize,
    /// One for each window.
    caches: Vec<Cache>,
    /// Tokens predicted in earlier groups.
    first: usize,
}

/// The windows of a text, and the keys and values of their earlier tokens.
pub(super) struct Contexts {
    groups: Vec<Group>,
    workspace: Workspace,
}

/// Returns the losses if all are finite.
pub(super) fn finite(losses: Vec<f32>) -> Result<Vec<f32>> {
    match losses.iter().all(|loss| loss.is_finite()) {
        true => Ok(losses),
        false => Err(Error::field("a loss", "not finite", "a model that does not overflow on this text")),
    }
}

fn inputs_of(window: &EvalWindow) -> usize {
    window.end - window.start - 1
}

impl Contexts {
    /// Cuts a text into windows of `seq` tokens. Their caches are empty.
    pub(super) fn new(model: &Inference, ids: &[u32], seq: usize) -> Result<Contexts> {
        let (mut groups, mut first) = (Vec::new(), 0);
        let windows = eval_windows(ids.len(), seq, seq)?;
        for alike in windows.chunk_by(|a, b| inputs_of(a) == inputs_of(b)) {
            let seq = inputs_of(&alike[0]);
            for windows in alike.chunks((TOGETHER / seq).max(1)) {
                let (mut inputs, mut targets) = (Vec::new(), Vec::new());
                for window in windows {
                    inputs.extend_from_slice(&ids[window.start..window.end - 1]);
                    targets.extend_from_slice(&ids[window.start + 1..window.end]);
                }
                let caches = windows.iter().map(|_| Cache::new(model, seq)).collect();
                let group = Group { inputs, targets, seq, caches, first };
                first += group.inputs.len();
                groups.push(group);
            }
        }
        Ok(Contexts { groups, workspace: Workspace::default() })
    }

    /// Returns the number of tokens predicted.
    pub(super) fn tokens(&self) -> usize {
        self.groups.iter().map(|group| group.inputs.len()).sum()
    }

    /// Returns the number of groups.
    pub(super) fn len(&self) -> usize {
        self.groups.len()
    }

    /// Returns the windows of a group, and the tokens predicted in each.
    pub(super) fn shape(&self, group: usize) -> [usize; 2] {
        [self.groups[group].caches.len(), self.groups[group].seq]
    }

    /// Returns the place among all tokens of the one at `position` of a window of a group.
    pub(super) fn token(&self, group: usize, window: usize, position: usize) -> usize {
        self.groups[group].first + window * self.groups[group].seq + position
    }

    /// Returns whether the caches of a group hold what all of its tokens see.
    pub(super) fn is_full(&self, group: usize) -> bool {
        let Group { caches, seq, .. } = &self.groups[group];
        caches.iter().all(|cache| cache.len() + 1 >= *seq)
    }

    /// Empties all caches.
    pub(super) fn clear(&mut self) {
        for Group { caches, seq, .. } in &mut self.groups {
            for cache in caches {
                cache.clear();
                // The last target is part of the text, although it is not read.
                cache.expect(*seq + 1);
            }
        }
    }

    /// Fills all caches by the present routes of `model`.
    pub(super) fn fill(&mut self, model: &Inference) -> Result<()> {
        self.clear();
        for Group { inputs, seq, caches, .. } in &mut self.groups {
            for (cache, inputs) in caches.iter_mut().zip(inputs.chunks_exact(*seq)) {
                model.decode(inputs, cache, None, &mut self.workspace)?;
            }
        }
        Ok(())
    }

    /// Returns the losses of all tokens by the present routes of `model`, each after what the caches hold of the tokens before it.
    pub(super) fn losses(&mut self, model: &Inference) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(self.tokens());
        for Group { inputs, targets, seq, caches, .. } in &self.groups {
            let mut losses = vec![0.0; inputs.len()];
            let batch = Batch { inputs, targets, seq: *seq };
            model.score_after(&mut losses, batch, (caches, 0), &mut self.workspace)?;
            all.append(&mut losses);
        }
        finite(all)
    }

    /// Does so for the tokens at `position` of the windows of a group.
    pub(super) fn losses_at(
        &mut self,
        model: &Inference,
        (group, position): (usize, usize),
    ) -> Result<Vec<f32>> {
        let Group { inputs, targets, seq, caches, .. } = &self.groups[group];
        let column = |ids: &[u32]| -> Vec<u32> { ids.iter().skip(position).step_by(*seq).copied().collect() };
        let (inputs, targets) = (column(inputs), column(targets));
        let mut losses = vec![0.0; inputs.len()];
        let batch = Batch { inputs: &inputs, targets: &targets, seq: 1 };
        model.score_after(&mut losses, batch, (caches, position), &mut self.workspace)?;
        finite(losses)
    }

    /// Feeds the tokens at `position` of the windows of a group to their caches, each by the route of the number in `chosen`.
    pub(super) fn take(
        &mut self,
        (model, space): (&mut Inference, &RouteSpace),
        routes: &[Digits],
        (group, position): (usize, usize),
        chosen: &[u32],
    ) -> Result<()> {
        let mut distinct = chosen.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let Group { inputs, seq, caches, .. } = &mut self.groups[group];
        for route in distinct {
            model.set_routes(&space.routes(&routes[route as usize]))?;
            let windows = caches.iter_mut().zip(inputs.chunks_exact(*seq)).zip(chosen);
            let of_route = windows.filter(|(_, of_window)| **of_window == route);
            let (mut caches, ids): (Vec<&mut Cache>, Vec<u32>) =
                of_route.map(|((cache, window), _)| (cache, window[position])).unzip();
            model.decode_each(&ids, &mut caches, None, &mut self.workspace)?;
        }
        Ok(())
    }
}
