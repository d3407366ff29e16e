//! Builds the FFNs that a configuration describes.

use super::Ffn;
use super::dense::DenseFfn;
use super::dsmoe::DsmoeFfn;
use crate::config::Config;

/// Makes the FFN that `config` asks for in a layer.
pub(crate) fn of_layer(config: &Config, layer: usize) -> Box<dyn Ffn> {
    let (hidden, intermediate) = (config.hidden, config.layer(layer).intermediate);
    match (&config.moe, &config.ffn) {
        (Some(moe), _) => Box::new(DsmoeFfn::new(hidden, intermediate, moe.router.clone(), moe.router_bias)),
        (None, Some(spec)) => spec.build(config, layer),
        (None, None) => Box::new(DenseFfn::new(hidden, intermediate)),
    }
}
