//! The stages of a reproduction: a dense model, and for every method and seed a model made, trained and measured.

use anyhow::{Result, bail};
use dsmoe_baselines::{Budget, Job as Pruning};
use dsmoe_core::Inference;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::copy_companions;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init};
use dsmoe_kernels::Precision;
use dsmoe_train::tasks::model_sha256;
use serde_json::{Value, json};

use super::cache::Key;
use super::inputs::{Base, Inputs};
use super::jobs::Job;
use super::measure;
use super::measuring::{Subject, measure, measure_speed};
use super::outputs::Part;
use super::profile::Role;
use super::records::{BASE, Made, Milestone, Run, Timing, Trained};
use super::training::{Training, remove_checkpoints, settled, training_speed};
use super::work::{Stage, Work};
use crate::files::{read_json, write_json};
use crate::models::default_precision;

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
                data: text.train_data(),
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
        let Inputs { profile, options, text, costs, ui, .. } = self.inputs;
        let (inputs, spec, id, device) = (self.inputs, job.spec, job.id(), options.device);
        let plan = profile.plan_of(spec, &base.config)?;
        let config = profile.train_of(spec, job.seed, profile.target_of(spec, &base.config)?)?;
        let made_key = self.made_key(job, base)?;
        let stage = Stage { name: "make", of: &id, key: &made_key, cost: costs.make() };
        let made: Made = self.work.stage(stage, |dir| {
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
                budget: Budget::Params(profile.budget(&base.config)?.round()),
                calibration: &calibration,
                seed: job.seed,
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
            })
        })?;
        let made_model = match plan.unchanged {
            true => base.dir.clone(),
            false => self.work.cache.dir("make", &made_key).join("model"),
        };

        let milestones = profile.milestones_of(spec);
        let settings =
            json!([made_key, settled(&config)?, text.key, milestones, inputs.windows(), device.is_gpu()]);
        let key = Key::of("train", &settings);
        let cost = costs.train(&config)? + milestones.len() as f64 * costs.text();
        let stage = Stage { name: "train", of: &id, key: &key, cost };
        let steps_left = &mut self.steps_left;
        let trained: Trained = self.work.stage(stage, |dir| {
            let file = |share: f64| dir.join(format!("at-{share}.json"));
            let training = Training {
                source: &made_model,
                out: &dir.join("run"),
                config: config.clone(),
                milestones: &milestones,
                data: text.train_data(),
                device,
                name: &id,
            };
            training.run(steps_left, ui, &mut |share, step, model| {
                let path = file(share);
                if path.is_file() {
                    return Ok(());
                }
                let model = Inference::new_on(model, default_precision(device, Precision::F32), device)?;
                let (found, _) = measure::text(&model, &text.held_out, costs.seq, inputs.windows())?;
                let tokens = step * config.tokens_per_step();
                write_json(&path, &Milestone { share, step, tokens, means: found.means })
            })?;
            let steps = config.clone().resolve()?.steps.unwrap_or(0);
            let milestones =
                milestones.iter().map(|&share| read_json(&file(share))).collect::<Result<_>>()?;
            Ok(Trained { steps, tokens: steps * config.tokens_per_step(), milestones })
        })?;
        let dir = self.work.cache.dir("train", &key).join("run");
        remove_checkpoints(&dir)?;
        let late = (spec.role == Role::WithoutThreshold)
            .then(|| profile.active_of(spec, &base.config))
            .transpose()?;
        let subject = Subject { dir: &dir, key: &key, id: &id, late, experts: profile.experts_of(spec)? };
        let mut run = measure(inputs, &mut self.work, &subject, base, parts)?;
        (run.method, run.role, run.seed) = (spec.name.clone(), Some(spec.role), job.seed);
        (run.made, run.trained) = (Some(made), Some(trained));
        let timing = self.timing(&subject, &run, parts)?;
        Ok((run, timing))
    }

    /// Measures the dense model before continued training.
    pub(crate) fn run_base(&mut self, base: &mut Base, parts: &[Part]) -> Result<(Run, Timing)> {
        let (dir, key) = (base.dir.clone(), base.key.clone());
        let subject = Subject { dir: &dir, key: &key, id: BASE, late: None, experts: None };
        let run = measure(self.inputs, &mut self.work, &subject, base, parts)?;
        let timing = self.timing(&subject, &run, parts)?;
        Ok((run, timing))
    }

    fn timing(&mut self, subject: &Subject<'_>, run: &Run, parts: &[Part]) -> Result<Timing> {
        let speed = parts
            .contains(&Part::Speed)
            .then(|| measure_speed(self.inputs, &mut self.work, subject, run.text.threshold))
            .transpose()?;
        let train_tokens_per_s = training_speed(subject.dir);
        Ok(Timing { method: run.method.clone(), seed: run.seed, speed, train_tokens_per_s })
    }

    fn made_key(&self, job: Job<'_>, base: &Base) -> Result<Key> {
        let Inputs { profile, text, costs, .. } = self.inputs;
        let settings = json!([
            base.key,
            job.spec.make,
            profile.configured(job.spec)?.resolved(),
            profile.budget(&base.config)?,
            profile.calibration,
            costs.seq,
            text.key,
            job.seed,
        ]);
        Ok(Key::of("make", &settings))
    }
}
