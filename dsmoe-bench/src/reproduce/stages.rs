//! The stages of a reproduction: a dense model, and for every method and seed a model made, trained and measured.

use std::path::PathBuf;

use anyhow::{Result, bail};
use dsmoe_baselines::{Budget, Job as Pruning, Partial};
use dsmoe_core::Inference;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::copy_companions;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init};
use dsmoe_kernels::comm::alone;
use dsmoe_train::TrainConfig;
use dsmoe_train::tasks::model_sha256;
use serde_json::{Value, json};

use super::cache::Key;
use super::inputs::{Base, Inputs};
use super::jobs::Job;
use super::measure;
use super::measuring::{Subject, measure, measure_grid, measure_speed};
use super::outputs::Part;
use super::profile::Role;
use super::records::{BASE, Made, Milestone, Run, Timing, Trained};
use super::training::{Training, remove_checkpoints, remove_weights, settled, training_speed};
use super::work::{Stage, Work};
use crate::files::{done, done_or, read_part};

/// A model as a method made it.
struct Start {
    made: Made,
    model: PathBuf,
    key: Key,
}

/// All stages of a reproduction.
pub(crate) struct Stages<'a> {
    pub(crate) inputs: Inputs<'a>,
    pub(crate) work: Work<'a>,
    /// Training steps that may still be taken, if they are limited.
    pub(crate) steps_left: Option<u64>,
}

impl Stages<'_> {
    /// Returns the dense model: the one that the user named, or one trained from random weights.
    pub(crate) fn base(&mut self) -> Result<Base> {
        let Inputs { profile, options, text, costs, ui, .. } = self.inputs;
        if let Some(model) = &options.model {
            let hash = model_sha256(model)?;
            let key = Key::of("given", &json!(hash));
            let config = Config::load(model)?;
            return Ok(Base { dir: model.clone(), key, config, sha256: Some(hash), losses: None });
        }
        let Some(config) = profile.pretrain() else {
            bail!("profile {} starts from a checkpoint; name one with --model DIR", profile.name);
        };
        let config = config?;
        let on_gpu = options.device.is_gpu();
        let key = Key::of("dense", &json!([text.key, profile.model, settled(&config)?, on_gpu]));
        let stage = Stage { name: "dense", of: BASE, key: &key, cost: costs.train(&config)? };
        let steps_left = &mut self.steps_left;
        self.work.stage(stage, |dir| {
            let start = dir.join("start");
            let architecture = profile.architecture(text.tokenizer.vocab_size())?;
            let random = InitOptions { seed: config.seed, force: true, ..InitOptions::default() };
            init(&architecture, &start, &random, &mut |_| {})?;
            copy_companions(&text.tokenizer_dir, &start)?;
            let training = Training {
                source: &start,
                out: &dir.join("run"),
                config: config.clone(),
                milestones: &[],
                missing: &[],
                data: text.train_data(),
                teacher: None,
                device: options.device,
                name: BASE,
            };
            training.run(steps_left, ui, &mut |_, _, _| Ok(()))
        })?;
        let dir = self.work.cache.dir("dense", &key).join("run");
        remove_checkpoints(&dir)?;
        let config = Config::load(&dir)?;
        Ok(Base { dir, key, config, sha256: None, losses: None })
    }

    /// Makes, trains and measures the model of a method and seed.
    pub(crate) fn run(&mut self, job: Job<'_>, base: &mut Base, parts: &[Part]) -> Result<(Run, Timing)> {
        let profile = self.inputs.profile;
        let (spec, id) = (job.spec, job.id());
        let start = self.make(job, base)?;
        let trained = match spec.untrained {
            true => None,
            false => Some(self.train(job, base, &start)?),
        };
        let (dir, key) = match &trained {
            Some((_, key)) => (self.work.cache.dir("train", key).join("run"), key),
            None => (start.model.clone(), &start.key),
        };
        if trained.is_some() {
            remove_checkpoints(&dir)?;
        }
        let late = (spec.role == Role::WithoutThreshold)
            .then(|| profile.active_of(spec, &base.config))
            .transpose()?;
        let (experts, serves, bound) = (profile.experts_of(spec)?, spec.serves, spec.bound()?);
        let subject = Subject { dir: &dir, key, id: &id, late, experts, serves, bound };
        let mut run = measure(self.inputs, &mut self.work, &subject, base, parts)?;
        (run.method, run.role, run.seed) = (spec.name.clone(), Some(spec.role), job.seed);
        run.made = Some(start.made);
        run.trained = trained.as_ref().map(|(trained, _)| trained.clone());
        let timing = self.timing(&subject, &run, base, parts)?;
        Ok((run, timing))
    }

    /// Makes the model of a method and seed.
    fn make(&mut self, job: Job<'_>, base: &Base) -> Result<Start> {
        let Inputs { profile, text, costs, .. } = self.inputs;
        let (spec, id) = (job.spec, job.id());
        let plan = profile.plan_of(spec, &base.config)?;
        let budget = profile.budget_of(spec, &base.config)?;
        let served = profile.budget_at(&base.config, profile.served_by(spec))?;
        let key = self.made_key(job, base)?;
        let stage = Stage { name: "make", of: &id, key: &key, cost: costs.make() };
        let mut made: Made = self.work.stage(stage, |dir| {
            if plan.unchanged {
                let params = Accounting::of(&base.config).total as f64;
                let reached_by = "nothing".to_owned();
                return Ok(Made {
                    params_total: params,
                    params_activated: params,
                    reached_by,
                    ..Made::default()
                });
            }
            let method = profile.configured(spec)?;
            let calibration = match method.needs_calibration() {
                true => text.calibration(profile.calibration.samples, job.seed)?,
                false => Vec::new(),
            };
            let pruning = Pruning {
                model: &base.dir,
                out: &dir.join("model"),
                force: true,
                budget: Budget::Params(budget.round()),
                calibration: &calibration,
                seed: job.seed,
                comm: alone(),
                partial: Partial::none(),
            };
            let made = method.run(&pruning, &mut |_| {})?;
            let shown = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let settings = method.resolved().into_iter().map(|(name, value)| (name, shown(value)));
            Ok(Made {
                params_total: made.plan.total,
                params_activated: made.plan.activated,
                reached_by: made.plan.reached_by,
                calibration_tokens: calibration.len() * costs.seq,
                settings: settings.chain(made.plan.settings).collect(),
                measured: made.measured.into_iter().collect(),
                ..Made::default()
            })
        })?;
        made.dense_compute = plan.keeps_dense_compute && !profile.budgets.is_empty();
        made.budget = (!profile.budgets.is_empty()).then_some(served);
        let model = match plan.unchanged {
            true => base.dir.clone(),
            false => self.work.cache.dir("make", &key).join("model"),
        };
        Ok(Start { made, model, key })
    }

    /// Trains the model of a method and seed. Returns the record and the key of the stage.
    fn train(&mut self, job: Job<'_>, base: &Base, start: &Start) -> Result<(Trained, Key)> {
        let Inputs { profile, options, text, costs, ui, .. } = self.inputs;
        let (inputs, spec, id, device) = (self.inputs, job.spec, job.id(), options.device);
        let config = self.config_of(job, base)?;
        let milestones = profile.milestones_of(spec);
        let (precision, serves) = (inputs.precision(), self.served(job));
        let key = self.train_key(job, base)?;
        let cost = costs.train(&config)? + (milestones.len() * serves.len()) as f64 * costs.text();
        let stage = Stage { name: "train", of: &id, key: &key, cost };
        // Whole distributions are computed anew in every training.
        let lessons = config.teacher_top.map(|_| self.work.cache.shared("teacher"));
        let steps_left = &mut self.steps_left;
        let mut trained: Trained = self.work.stage(stage, |dir| {
            let file = |share: f64| dir.join(format!("at-{share}.json"));
            let is_missing = |share: &&f64| done::<Vec<Milestone>>(&file(**share)).is_none();
            let missing: Vec<f64> = milestones.iter().filter(is_missing).copied().collect();
            let training = Training {
                source: &start.model,
                out: &dir.join("run"),
                config: config.clone(),
                milestones: &milestones,
                missing: &missing,
                data: text.train_data(),
                teacher: config.teacher_weight.map(|_| (base.dir.clone(), lessons.clone())),
                device,
                name: &id,
            };
            training.run(steps_left, ui, &mut |share, step, model| {
                let compute = || {
                    let mut model = Inference::new_on(model, precision, device)?;
                    let mut found = Vec::new();
                    for &serves in &serves {
                        if let Some(active) = serves {
                            model.set_active(active)?;
                        }
                        let (text, _) = measure::text(&model, &text.held_out, costs.seq, inputs.windows())?;
                        let tokens = step * config.tokens_per_step();
                        found.push(Milestone { share, step, tokens, serves, means: text.means });
                    }
                    Ok(found)
                };
                done_or(&file(share), compute).map(drop)
            })?;
            let steps = config.clone().resolve()?.steps.unwrap_or(0);
            let milestones: Vec<Vec<Milestone>> =
                milestones.iter().map(|&share| read_part(&file(share))).collect::<Result<_>>()?;
            let milestones = milestones.into_iter().flatten().collect();
            Ok(Trained { steps, tokens: steps * config.tokens_per_step(), milestones })
        })?;
        trained.milestones.retain(|stone| stone.serves == spec.serves);
        Ok((trained, key))
    }

    /// Measures the dense model before continued training.
    pub(crate) fn run_base(&mut self, base: &mut Base, parts: &[Part]) -> Result<(Run, Timing)> {
        let (dir, key) = (base.dir.clone(), base.key.clone());
        let (late, experts, serves, bound) = (None, None, None, None);
        let subject = Subject { dir: &dir, key: &key, id: BASE, late, experts, serves, bound };
        let run = measure(self.inputs, &mut self.work, &subject, base, parts)?;
        let timing = self.timing(&subject, &run, base, parts)?;
        Ok((run, timing))
    }

    fn timing(&mut self, subject: &Subject<'_>, run: &Run, base: &Base, parts: &[Part]) -> Result<Timing> {
        let timed = parts.contains(&Part::Speed);
        let speed = timed
            .then(|| measure_speed(self.inputs, &mut self.work, subject, run.text.threshold))
            .transpose()?;
        let grid = match timed && run.role.is_some() {
            true => measure_grid(self.inputs, &mut self.work, subject, base)?,
            false => Vec::new(),
        };
        let train_tokens_per_s = training_speed(subject.dir);
        Ok(Timing { method: run.method.clone(), seed: run.seed, speed, grid, train_tokens_per_s })
    }

    /// Removes the weights that only `job` needed, not one of `later`.
    pub(crate) fn discard<'j>(
        &self,
        job: Job<'_>,
        later: impl Iterator<Item = Job<'j>>,
        base: &Base,
    ) -> Result<()> {
        let mut dirs = self.weights_of(job, base)?;
        for other in later {
            let needed = self.weights_of(other, base)?;
            dirs.retain(|dir| !needed.contains(dir));
        }
        dirs.iter().try_for_each(|dir| remove_weights(dir))
    }

    /// Lists the directories that may hold weights of a method and seed.
    fn weights_of(&self, job: Job<'_>, base: &Base) -> Result<Vec<PathBuf>> {
        let mut dirs = vec![self.work.cache.dir("make", &self.made_key(job, base)?).join("model")];
        if !job.spec.untrained {
            dirs.push(self.work.cache.dir("train", &self.train_key(job, base)?).join("run"));
        }
        Ok(dirs)
    }

    /// Returns the settings of the training of a method and seed.
    fn config_of(&self, job: Job<'_>, base: &Base) -> Result<TrainConfig> {
        let profile = self.inputs.profile;
        profile.train_of(job.spec, job.seed, profile.target_of(job.spec, &base.config)?)
    }

    /// Lists the shares that a model is measured at in training: an elastic one is trained once for every budget.
    fn served(&self, job: Job<'_>) -> Vec<Option<f64>> {
        match job.spec.role {
            Role::Elastic => self.inputs.profile.budgets.iter().copied().map(Some).collect(),
            _ => vec![None],
        }
    }

    fn train_key(&self, job: Job<'_>, base: &Base) -> Result<Key> {
        let Inputs { profile, options, text, .. } = self.inputs;
        let config = settled(&self.config_of(job, base)?)?;
        let how = json!([self.inputs.precision().name(), self.inputs.windows(), self.served(job)]);
        let milestones = profile.milestones_of(job.spec);
        let made = self.made_key(job, base)?;
        let settings = json!([made, config, text.key, milestones, how, options.device.is_gpu()]);
        Ok(Key::of("train", &settings))
    }

    fn made_key(&self, job: Job<'_>, base: &Base) -> Result<Key> {
        let Inputs { profile, text, costs, .. } = self.inputs;
        let settings = json!([
            base.key,
            job.spec.make,
            profile.configured(job.spec)?.resolved(),
            profile.budget_of(job.spec, &base.config)?,
            profile.calibration,
            costs.seq,
            text.key,
            job.seed,
        ]);
        Ok(Key::of("make", &settings))
    }
}
