//! One layer of a start.

use super::down::Fitted;
use super::experts::Experts;
use super::plan::{Plan, Start};
use super::router::Router;
use crate::calibrate::{LayerStream, LayerWeights};
use crate::error::Result;

/// A layer of the start.
pub(super) struct Layer {
    pub(super) experts: Experts,
    pub(super) router: Router,
    pub(super) fitted: Fitted,
}

impl Layer {
    /// Fits a layer whose attention the states hold.
    pub(super) fn fit(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        plan: &Plan,
        options: &Start,
    ) -> Result<Layer> {
        stream.attend(weights);
        let experts = Experts::choose(stream, weights, plan, options)?;
        let router = Router::fit(stream, weights, (plan, &experts), options)?;
        let fitted = Fitted::fit(stream, weights, (plan, &experts, &router), options)?;
        Ok(Layer { experts, router, fitted })
    }

    /// Completes the layer in the states.
    pub(super) fn advance(&self, stream: &mut LayerStream, weights: &LayerWeights) {
        stream.join_ffn(weights, &mut |y, tap| {
            let (open, _) = self.router.open(&self.experts, (tap.x, tap.neurons), self.router.bar);
            self.fitted.forward(y, &open);
        });
    }
}
