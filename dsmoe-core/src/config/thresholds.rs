//! `activation_thresholds` of config.json: what the inputs of linears have to exceed to be multiplied.

use serde::Deserialize;

use super::fields::Fields;
use super::{Config, THRESHOLDS_KEY};
use crate::error::{Result, shown};
use crate::kept::{GROUPS, LINEARS, LayerThresholds, UsedWeights};

const UP: usize = 5;

impl Config {
    /// Returns the weights of a layer's linears: of q, k, v, o, gate, up and down.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn linear_weights(&self, layer: usize) -> [usize; LINEARS] {
        let ([queries, keys], neurons) = (self.attention_widths(layer), self.layer(layer).intermediate);
        [queries, keys, keys, queries, neurons, neurons, neurons].map(|width| width * self.hidden)
    }

    /// Returns the share of the weights of every layer's linears that a token used, mean over the tokens that `used` has
    /// counted in a model of this configuration; none without thresholds, and where nothing was counted.
    pub fn used_shares(&self, used: &UsedWeights) -> Option<Vec<[f64; LINEARS]>> {
        let (thresholds, (tokens, sums)) = (self.thresholds.as_ref()?, used.sums());
        if tokens == 0 || sums.len() != self.num_layers {
            return None;
        }
        let share = |layer: usize| {
            let (weights, whole) = (self.linear_weights(layer), whole(&thresholds[layer]));
            std::array::from_fn(|i| match whole[i] {
                true => 1.0,
                false => sums[layer][i] as f64 / (tokens * weights[i].max(1) as u64) as f64,
            })
        };
        Some((0..self.num_layers).map(share).collect())
    }
}

/// Returns which linears use all of their weights for every token, uncounted.
fn whole(thresholds: &LayerThresholds) -> [bool; LINEARS] {
    let mut whole = [true; LINEARS];
    for group in GROUPS {
        let skips = thresholds.skips_in(group.clone());
        whole[group].fill(!skips);
    }
    if thresholds.gate > 0.0 {
        whole[4] = !thresholds.skips_in(4..5);
        whole[5..].fill(false);
    }
    whole
}

impl Fields<'_> {
    /// Reads the thresholds of every layer of `config`.
    pub(super) fn thresholds(&self, config: &Config) -> Result<Option<Vec<LayerThresholds>>> {
        let Some(value) = self.get(THRESHOLDS_KEY) else { return Ok(None) };
        let help = "give one object with inputs and used, 7 numbers each, and if need be gate for each layer";
        if config.moe.is_some() || config.ffn.is_some() {
            let problem = "is present beside experts, for which there are no thresholds";
            return Err(self.wrong(THRESHOLDS_KEY, problem, "remove one of them"));
        }
        let layers = Vec::<LayerThresholds>::deserialize(value)
            .map_err(|cause| self.wrong(THRESHOLDS_KEY, shown(&format!("is wrong ({cause})")), help))?;
        if layers.len() != config.num_layers {
            let problem =
                format!("has {} entries and num_hidden_layers is {}", layers.len(), config.num_layers);
            return Err(self.wrong(THRESHOLDS_KEY, problem, help));
        }
        for (i, layer) in layers.iter().enumerate() {
            let wrong = |key: &str, problem: String, help: &str| {
                Err(self.wrong(&format!("{THRESHOLDS_KEY}[{i}].{key}"), problem, help.to_owned()))
            };
            let is_threshold = |x: &f32| x.is_finite() && *x >= 0.0;
            if let Some(x) = layer.inputs.iter().find(|x| !is_threshold(x)) {
                return wrong("inputs", format!("has {x}"), "use numbers of at least 0");
            }
            if !is_threshold(&layer.gate) {
                return wrong("gate", format!("is {}", layer.gate), "use a number of at least 0");
            }
            if layer.gate > 0.0 && layer.inputs[UP] > 0.0 {
                let problem = "is above 0 beside a threshold of up's inputs".to_owned();
                return wrong("gate", problem, "set one of them to 0");
            }
            if let Some(x) = layer.used.iter().find(|x| !(0.0..=1.0).contains(*x)) {
                return wrong("used", format!("has {x}"), "use shares from 0 to 1");
            }
        }
        Ok(Some(layers))
    }
}
