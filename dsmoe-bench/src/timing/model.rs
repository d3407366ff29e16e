//! Models with random weights in memory.

use anyhow::{Result, bail};
use dsmoe_core::Model;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::{Config, MoeConfig};
use dsmoe_core::init::LlamaSizes;
use dsmoe_router::RouterConfig;
use rayon::prelude::*;

use super::checks::{check_active, check_core, check_experts, check_size};
use super::ffn::Shape;
use super::row::Row;
use super::values::fill_random;
use crate::cli::bench::Architecture;

/// Sizes of a model: hidden, intermediate, layers, heads, kv_heads, vocabulary.
pub(crate) type Sizes = [usize; 6];

impl Architecture {
    /// Returns the sizes asked for, completed from the first of `defaults`; without any, all of `defaults`.
    pub(crate) fn sizes(&self, defaults: &[Sizes]) -> Vec<Sizes> {
        let Architecture { hidden, intermediate, layers, heads, kv_heads, vocab, .. } = *self;
        let asked = [hidden, intermediate, layers, heads, kv_heads.or(heads), vocab];
        if asked.iter().all(Option::is_none) {
            return defaults.to_vec();
        }
        vec![std::array::from_fn(|i| asked[i].unwrap_or(defaults[0][i]))]
    }

    /// Refuses sizes that are no valid model.
    pub(crate) fn check(&self, sizes: Sizes) -> Result<()> {
        const FLAGS: [&str; 6] = ["hidden", "intermediate", "layers", "heads", "kv-heads", "vocab"];
        for (flag, size) in FLAGS.into_iter().zip(sizes) {
            check_size(flag, size)?;
        }
        let [hidden, intermediate, _, heads, kv_heads, _] = sizes;
        if !hidden.is_multiple_of(2 * heads) {
            let even = 2 * heads;
            bail!("--hidden {hidden} is not an even number times --heads {heads}; use a multiple of {even}");
        }
        if !heads.is_multiple_of(kv_heads) {
            bail!("--kv-heads {kv_heads} does not divide --heads {heads}; use a divisor");
        }
        check_experts(self.experts, intermediate)?;
        check_core(self.core)?;
        check_active(self.active)?;
        if self.shape().routed() == 0 {
            bail!("--core {} leaves no expert to the router; use less", self.core);
        }
        Ok(())
    }

    /// Returns the cut of an FFN into experts.
    pub(crate) fn shape(&self) -> Shape {
        Shape::new(self.experts, self.active, self.core)
    }
}

/// Returns the dense configuration of `sizes` with `positions`, and the DSMoE one.
pub(crate) fn configs(shape: Shape, sizes: Sizes, positions: usize) -> Result<[Config; 2]> {
    let [hidden, intermediate, layers, heads, kv_heads, vocab] = sizes;
    let bos_eos = [1, 2];
    let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos };
    let dense = sizes.config()?;
    let mut dsmoe = dense.clone();
    let mut moe = MoeConfig { router_bias: true, ..MoeConfig::new(RouterConfig::new(shape.experts)) };
    if shape.core > 0 {
        moe.parts.core = vec![shape.core; dense.num_layers];
    }
    dsmoe.moe = Some(moe);
    Ok([dense, dsmoe])
}

/// Returns the approximate number of parameters.
pub(crate) fn parameters(config: &Config) -> u128 {
    u128::from(Accounting::of(config).total)
}

/// Makes a model of `config` with random weights; those of routers spread the gates.
pub(crate) fn random_model(config: Config) -> Model {
    let mut model = Model::new(config);
    let entries = model.layout().entries().to_vec();
    let params = model.params_mut();
    for (seed, entry) in entries.into_iter().enumerate() {
        let values = &mut params[entry.range];
        match entry.spec.shape[..] {
            [_, inputs] if entry.spec.router => {
                fill_random(values, 1.0 / (inputs as f32).sqrt(), seed as u64)
            }
            [_, _] => fill_random(values, 0.02, seed as u64),
            _ if entry.spec.router => values.fill(0.0),
            _ => values.par_iter_mut().for_each(|x| *x = 1.0),
        }
    }
    model
}

/// Bisections of the range of the threshold.
const STEPS: usize = 12;
/// The accepted distance from the wanted active share.
const NEAR: f64 = 0.004;

/// Moves the threshold of the gates until `share(threshold)`, the resulting active share, is about `wanted`.
pub(crate) fn reach_share(wanted: f64, mut share: impl FnMut(f32) -> Result<f64>) -> Result<()> {
    if wanted == 0.0 || wanted == 1.0 {
        // Threshold 1 shuts all gates, 0 opens them.
        share(1.0 - wanted as f32)?;
        return Ok(());
    }
    let (mut low, mut high) = (0.0f32, 1.0f32);
    for _ in 0..STEPS {
        let middle = (low + high) / 2.0;
        let found = share(middle)?;
        if (found - wanted).abs() <= NEAR {
            break;
        }
        if found > wanted { low = middle } else { high = middle }
    }
    Ok(())
}

/// Adds the description of the model to a row.
pub(crate) fn describe(row: &mut Row, config: &Config, active: Option<(f64, f64)>) {
    row.intermediate = Some(config.intermediate);
    row.experts = Some(config.moe.as_ref().map_or(1, |moe| moe.router.num_experts));
    let (asked, measured) = active.unwrap_or((1.0, 1.0));
    (row.active, row.active_measured) = (Some(asked), Some(measured));
    row.layers = Some(config.num_layers);
    row.heads = Some(config.num_heads);
    row.kv_heads = Some(config.num_kv_heads);
    row.vocab = Some(config.vocab_size);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_is_moved_to_the_share() {
        for wanted in [0.0, 0.125, 0.375, 0.9, 1.0] {
            let mut last = f64::NAN;
            reach_share(wanted, |threshold| {
                last = 1.0 - f64::from(threshold).powi(2);
                Ok(last)
            })
            .unwrap();
            assert!((last - wanted).abs() <= NEAR, "wanted {wanted}, got {last}");
        }
    }

    #[test]
    fn sizes_that_are_not_said_are_the_defaults() {
        const DEFAULTS: [Sizes; 2] = [[128, 512, 4, 4, 2, 2048], [512, 1536, 8, 8, 4, 8192]];
        let none = Architecture { experts: 8, active: 0.375, ..Architecture::default() };
        assert_eq!(none.sizes(&DEFAULTS), DEFAULTS);
        let some = Architecture { heads: Some(8), vocab: Some(100), ..none };
        assert_eq!(some.sizes(&DEFAULTS), [[128, 512, 4, 8, 8, 100]]);
        assert!(some.check([128, 512, 4, 8, 8, 100]).is_ok());
        for wrong in [[100, 512, 4, 8, 8, 100], [128, 500, 4, 8, 8, 100], [128, 512, 4, 8, 3, 100]] {
            assert!(some.check(wrong).is_err(), "{wrong:?}");
        }
    }
}
