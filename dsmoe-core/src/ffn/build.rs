//! Builds the FFNs that a configuration describes.

use super::dense::DenseFfn;
use super::dsmoe::DsmoeFfn;
use super::form::DsmoeForm;
use super::{Ffn, Gated};
use crate::config::Config;

/// Makes the FFN that `config` asks for in a layer.
pub(crate) fn of_layer(config: &Config, layer: usize) -> Box<dyn Ffn> {
    let gated = Gated::of_layer(config, layer);
    match (&config.moe, &config.ffn) {
        (Some(moe), _) => {
            let mut ffn = DsmoeFfn::of(gated, DsmoeForm::of_layer(moe, layer));
            if let Some(logit) = moe.threshold_logit(layer) {
                ffn.set_threshold_logit(logit);
            }
            Box::new(ffn)
        }
        (None, Some(spec)) => spec.build(config, layer),
        (None, None) => Box::new(DenseFfn::of(gated)),
    }
}

impl Gated {
    /// Describes that of a layer of `config`.
    pub fn of_layer(config: &Config, layer: usize) -> Gated {
        Gated {
            hidden: config.hidden,
            intermediate: config.layer(layer).intermediate,
            activation: config.architecture.activation,
            bias: config.architecture.mlp_bias,
            output_bias: config.architecture.output_bias,
        }
    }
}
