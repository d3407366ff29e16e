//! Builds the FFNs that a configuration describes.

use super::dense::DenseFfn;
use super::dsmoe::DsmoeFfn;
use super::{Ffn, Gated};
use crate::config::Config;

/// Makes the FFN that `config` asks for in a layer.
pub(crate) fn of_layer(config: &Config, layer: usize) -> Box<dyn Ffn> {
    let gated = Gated::of_layer(config, layer);
    match (&config.moe, &config.ffn) {
        (Some(moe), _) => Box::new(DsmoeFfn::of(gated, moe.router.clone(), moe.router_bias)),
        (None, Some(spec)) => spec.build(config, layer),
        (None, None) => Box::new(DenseFfn::of(gated)),
    }
}
