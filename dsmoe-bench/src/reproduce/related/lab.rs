//! The common parts of the experiments: the dense model of a seed, a mixture made of it, and the stages that change, train and
//! measure models.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use dsmoe_baselines::grow::{GrowOptions, grow};
use dsmoe_baselines::{Budget, Job as Pruning, Partial, method, read_settings};
use dsmoe_core::Inference;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Manifest;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{UpcycleOptions, upcycle};
use dsmoe_kernels::comm::alone;
use dsmoe_train::TrainConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::cache::Key;
use super::super::inputs::{Base, Inputs};
use super::super::measure;
use super::super::stages::Stages;
use super::super::training::{Training, remove_checkpoints, settled};
use super::super::work::Stage;
use super::sketch::MIXTURE;
use crate::files::{read_json, write_json};

/// Experts of the mixture, and those of them that a token runs.
pub(crate) const EXPERTS: usize = 8;
pub(crate) const TOP_K: usize = 2;
/// Weight of the mixture's balance loss, with which every expert is used.
const BALANCE: f64 = 0.05;

/// A model and the key of the stage that made it.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) dir: PathBuf,
    pub(crate) key: Key,
}

impl Model {
    pub(crate) fn config(&self) -> Result<Config> {
        Ok(Config::load(&self.dir)?)
    }
}

/// How a model is pruned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pruned<'a> {
    pub(crate) method: &'a str,
    /// Settings as after `--set`.
    pub(crate) settings: &'a [&'a str],
    /// Parameters that the method counts.
    pub(crate) params: f64,
    /// The source of the calibration text; all of them in their shares if there is none.
    pub(crate) source: Option<&'a str>,
}

/// Losses on held-out text, nats by token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Losses {
    pub(crate) mean: f64,
    /// Parameters that a token of the text used.
    pub(crate) activated: f64,
    /// By source.
    pub(crate) sources: Vec<(String, f64)>,
    /// Entropies of the loads of the layers' experts by source, nats; empty without routers.
    entropies: Vec<(String, Vec<f64>)>,
    /// Experts of layers; empty without routers.
    experts: Vec<usize>,
}

impl Losses {
    /// Returns the loss on one source.
    pub(crate) fn of(&self, source: &str) -> Result<f64> {
        let found = self.sources.iter().find(|(name, _)| name == source);
        Ok(found.with_context(|| format!("no text {source}"))?.1)
    }

    /// Returns the mean over all sources but one, each as much as another.
    pub(crate) fn without(&self, source: &str) -> f64 {
        let others: Vec<f64> =
            self.sources.iter().filter(|(name, _)| name != source).map(|(_, loss)| *loss).collect();
        mean(&others)
    }

    /// Returns the entropy of the load of a layer's experts, mean over layers, on one source, or the mean over all of them, each as
    /// much as another.
    pub(crate) fn entropy(&self, source: Option<&str>) -> Result<f64> {
        let wanted = self.entropies.iter().filter(|(name, _)| source.is_none_or(|source| source == name));
        let found: Vec<f64> = wanted.map(|(_, layers)| mean(layers)).collect();
        ensure!(!found.is_empty(), "no load of experts on {}", source.unwrap_or("any text"));
        Ok(mean(&found))
    }

    /// Returns the entropy of the load of the least even layer over that of an even load: 1 if all its experts run for as many
    /// tokens, 0 if one runs alone. It is the mean over sources, and that of all text together is not less.
    pub(crate) fn evenness(&self) -> Result<f64> {
        ensure!(!self.entropies.is_empty(), "no load of experts on any text");
        let of_layer = |(layer, experts): (usize, &usize)| {
            let by_source: Vec<f64> = self.entropies.iter().map(|(_, layers)| layers[layer]).collect();
            mean(&by_source) / (*experts as f64).ln()
        };
        let layers = self.experts.iter().enumerate().filter(|(_, experts)| **experts > 1);
        Ok(layers.map(of_layer).fold(1.0, f64::min))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The shared part of the experiments of one seed.
pub(crate) struct Lab<'a, 'b> {
    pub(crate) stages: &'a mut Stages<'b>,
    pub(crate) base: &'a Base,
    pub(crate) seed: u64,
    /// The experiment, for lines of progress.
    pub(crate) name: &'static str,
}

impl<'b> Lab<'_, 'b> {
    pub(crate) fn inputs(&self) -> Inputs<'b> {
        self.stages.inputs
    }

    /// Returns the dense model.
    pub(crate) fn dense(&self) -> Model {
        Model { dir: self.base.dir.clone(), key: self.base.key.clone() }
    }

    /// Returns the settings of the profile's training with this seed.
    pub(crate) fn train_config(&self) -> Result<TrainConfig> {
        let mut config = self.inputs().profile.train()?;
        config.seed += self.seed;
        Ok(config)
    }

    /// Lists the names of the sources of text.
    pub(crate) fn sources(&self) -> Vec<String> {
        self.inputs().text.held_out.iter().map(|part| part.name.clone()).collect()
    }

    /// Does a stage of this experiment. `settings` and the experiment's name identify it, so they hold all that its result
    /// depends on; `cost` is in tokens of forward passes of the dense model.
    pub(crate) fn stage<T: Serialize + DeserializeOwned>(
        &mut self,
        name: &str,
        settings: &Value,
        cost: f64,
        compute: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<(T, Key)> {
        let (key, of) = (Key::of(name, settings), format!("{}-s{}", self.name, self.seed));
        let stage = Stage { name, of: &of, key: &key, cost };
        Ok((self.stages.work.stage(stage, compute)?, key))
    }

    /// Returns the trained mixture: eight copies of the dense FFN, of which a token runs two.
    pub(crate) fn mixture(&mut self) -> Result<Model> {
        let config = self.train_config()?;
        let made = json!([self.base.key, EXPERTS, TOP_K, BALANCE, self.seed]);
        let dense = self.base.dir.clone();
        let options = UpcycleOptions {
            family: "mixtral".to_owned(),
            num_experts: EXPERTS,
            top_k: TOP_K,
            seed: self.seed,
            force: true,
        };
        let cost = MIXTURE * self.inputs().costs.train(&config)?;
        self.trained("mixture", &made, (config, cost), |dir| {
            let start = dir.join("start");
            upcycle(&dense, &start, &options, &mut |_| {})?;
            let path = start.join(dsmoe_core::config::CONFIG_FILE);
            let mut config: Value = read_json(&path)?;
            config["router_aux_loss_coef"] = json!(BALANCE);
            write_json(&path, &config)?;
            Manifest::renew(&start, dsmoe_core::config::CONFIG_FILE)?;
            Ok(start)
        })
    }

    /// Trains a model.
    pub(crate) fn train(&mut self, model: &Model, config: TrainConfig) -> Result<Model> {
        let factor = if model.config()?.mixture().is_some() { MIXTURE } else { 1.0 };
        let cost = factor * self.inputs().costs.train(&config)?;
        let source = model.dir.clone();
        self.trained("tuned", &json!(model.key), (config, cost), |_| Ok(source))
    }

    /// Trains the model that `make` returns, which may put it into a directory.
    fn trained(
        &mut self,
        name: &str,
        from: &Value,
        (config, cost): (TrainConfig, f64),
        make: impl FnOnce(&Path) -> Result<PathBuf>,
    ) -> Result<Model> {
        let Inputs { text, options, ui, .. } = self.inputs();
        let settings = json!([from, settled(&config)?, text.key, options.device.is_gpu()]);
        let of = format!("{}-s{}", self.name, self.seed);
        let mut left = self.stages.steps_left;
        let done = self.stage(name, &settings, cost, |dir| {
            let start = make(dir)?;
            let training = Training {
                source: &start,
                out: &dir.join("run"),
                config,
                milestones: &[],
                missing: &[],
                data: text.train_data(),
                teacher: None,
                device: options.device,
                name: &of,
            };
            training.run(&mut left, ui, &mut |_, _, _| Ok(()))
        });
        self.stages.steps_left = left;
        let ((), key) = done?;
        let dir = self.stages.work.cache.dir(name, &key).join("run");
        remove_checkpoints(&dir)?;
        Ok(Model { dir, key })
    }

    /// Prunes a model, or changes its experts.
    pub(crate) fn prune(&mut self, model: &Model, how: Pruned<'_>) -> Result<Model> {
        let Inputs { profile, text, costs, .. } = self.inputs();
        let settings = read_settings(how.settings.iter().copied())?;
        let configured = method(how.method)?.configure(&settings)?;
        let samples = profile.calibration.samples;
        // A part stays usable where its method gets another optional setting.
        let mut set = configured.resolved();
        set.retain(|_, value| !value.is_null());
        let key = json!([
            model.key, how.method, set, how.params, how.source, samples, costs.seq, text.key, self.seed
        ]);
        let (source, seed) = (model.dir.clone(), self.seed);
        let ((), key) = self.stage("pruned", &key, costs.make(), |dir| {
            let calibration = match (configured.needs_calibration(), how.source) {
                (false, _) => Vec::new(),
                (true, None) => text.calibration(samples, seed)?,
                (true, Some(name)) => text.calibration_of(name, samples, seed)?,
            };
            let job = Pruning {
                model: &source,
                out: &dir.join("model"),
                force: true,
                budget: Budget::Params(how.params),
                calibration: &calibration,
                seed,
                comm: alone(),
                partial: Partial::none(),
            };
            configured.run(&job, &mut |_| {})?;
            Ok(())
        })?;
        Ok(Model { dir: self.stages.work.cache.dir("pruned", &key).join("model"), key })
    }

    /// Makes a model deeper.
    pub(crate) fn grow(&mut self, model: &Model, options: &GrowOptions) -> Result<Model> {
        let options = GrowOptions { seed: self.seed, force: true, ..options.clone() };
        let settings = json!([model.key, format!("{options:?}")]);
        let (source, cost) = (model.dir.clone(), self.inputs().costs.make());
        let ((), key) = self.stage("grown", &settings, cost, |dir| {
            grow(&source, &dir.join("model"), &options, &mut |_| {})?;
            Ok(())
        })?;
        Ok(Model { dir: self.stages.work.cache.dir("grown", &key).join("model"), key })
    }

    /// Measures the loss of a model on the held-out text.
    pub(crate) fn losses(&mut self, model: &Model) -> Result<Losses> {
        let inputs = self.inputs();
        let precision = inputs.precision().name();
        let settings = json!([model.key, inputs.text.key, inputs.windows(), precision, "loads by layer"]);
        let dir = model.dir.clone();
        let (losses, _) = self.stage("losses", &settings, inputs.costs.text(), |_| {
            let model = Inference::load_on(&dir, inputs.precision(), inputs.options.device)?;
            let (text, _) = measure::text(&model, &inputs.text.held_out, inputs.costs.seq, inputs.windows())?;
            let sources = text.domains.iter().map(|domain| (domain.name.clone(), domain.nll)).collect();
            let entropies = text.domains.into_iter().filter_map(|of| Some((of.name, of.load_entropies?)));
            let entropies = entropies.collect();
            let layers = 0..model.config().num_layers;
            let experts = layers.filter_map(|layer| model.config().layer_experts(layer)).collect();
            let (mean, activated) = (text.means.nll, text.means.params_activated);
            Ok(Losses { mean, activated, sources, entropies, experts })
        })?;
        Ok(losses)
    }

    /// Returns the parameters that a mixture holds with `left` experts in every layer, with the gates of the others or without.
    pub(crate) fn held(&self, model: &Model, left: usize, keeps_gates: bool) -> Result<f64> {
        let config = model.config()?;
        let spec = config.mixture().context("the model has no experts")?;
        ensure!(left <= EXPERTS, "a layer has {EXPERTS} experts");
        let expert = 3 * config.hidden * spec.width + if keeps_gates { 0 } else { config.hidden };
        let gone = config.num_layers * (EXPERTS - left) * expert;
        Ok((Accounting::of(&config).total - gone as u64) as f64)
    }
}

/// Checks settings of a method as an experiment gives them.
#[cfg(test)]
pub(crate) fn check_settings(name: &str, settings: &[&str]) -> Result<dsmoe_baselines::SettingValues> {
    Ok(method(name)?.configure(&read_settings(settings.iter().copied())?)?.resolved())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_are_means_over_sources() {
        let pair = |name: &str, value: f64| (name.to_owned(), value);
        let sources = vec![pair("web", 3.0), pair("code", 2.0), pair("math", 1.0)];
        // Two layers of four experts.
        let of = |name: &str, layers: [f64; 2]| (name.to_owned(), layers.to_vec());
        let [none, half, all] = [0.0, 2f64.ln(), 4f64.ln()];
        let entropies = vec![of("web", [all, all]), of("code", [all, none]), of("math", [none, none])];
        let found = Losses { mean: 2.0, activated: 1.0, sources, entropies, experts: vec![4, 4] };
        for (source, wanted) in [(Some("web"), all), (Some("code"), half), (None, half)] {
            assert!((found.entropy(source).unwrap() - wanted).abs() < 1e-12, "{source:?}");
        }
        // The second layer: a third of that of an even load.
        assert!((found.evenness().unwrap() - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(found.without("web"), 1.5);
        assert!(found.entropy(Some("art")).unwrap_err().to_string().contains("no load of experts on art"));
        let dense = Losses { entropies: Vec::new(), experts: Vec::new(), ..found };
        assert!(dense.entropy(None).unwrap_err().to_string().contains("any text"));
        assert!(dense.evenness().unwrap_err().to_string().contains("any text"));
    }
}
