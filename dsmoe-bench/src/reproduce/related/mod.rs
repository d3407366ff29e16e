//! `dsmoe reproduce --profile related`: one small experiment for each paper beside DSMoE, and a table of their claims.
//!
//! An experiment has a file of its own. It measures rows, among them controls that could be better than the paper's system, and its
//! claims are data: which row should be better than which controls, where. The numbers decide by the rule of [`experiment`].

mod definition;
mod duo_llm;
mod esacl;
mod experiment;
mod experts;
mod factorllm;
mod hc_smoe;
mod lab;
mod lesa;
mod memtl;
mod memtl_requests;
mod merge;
mod outcome;
mod plan;
mod seer_moe;
mod sketch;
mod thresholds;
mod uncurl;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dsmoe_core::accounting::Accounting;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::cache::Cache;
use super::cost::Costs;
use super::inputs::Inputs;
use super::profile::Profile;
use super::records::{FORMAT_VERSION, RESULTS, RUNS, SETUP};
use super::shipped::compare_experiments;
use super::stages::Stages;
use super::text::Text;
use super::work::Work;
use crate::cli::reproduce::Reproduce;
use crate::files::{write_json, write_part};
use crate::format;
use crate::report;
use crate::ui::Ui;
use definition::Definition;
use experiment::{Experiment, Value};
use lab::Lab;
pub(crate) use merge::{has_experiments, merge};
pub(crate) use outcome::Outcome;
use outcome::{Found, Setup};
use plan::{Row, count};

/// All experiments.
static ALL: [Experiment; 12] = [
    hc_smoe::EXPERIMENT,
    uncurl::EXPERIMENT,
    seer_moe::EXPERIMENT,
    thresholds::EXPERIMENT,
    lesa::EXPERIMENT,
    factorllm::EXPERIMENT,
    duo_llm::EXPERIMENT,
    esacl::EXPERIMENT,
    memtl::EXPERIMENT,
    memtl_requests::EXPERIMENT,
    lesa::OF_A_PRETRAINED_MODEL,
    thresholds::OF_A_PRETRAINED_MODEL,
];

/// The numbers of an experiment and seed, as `runs/` keeps them.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    experiment: String,
    seed: u64,
    values: Vec<Value>,
}

impl Run {
    /// Returns the name of its file.
    fn file(&self) -> String {
        format!("{}-s{}.json", self.experiment, self.seed)
    }
}

/// The experiments of a profile that were asked for.
pub(super) struct Experiments {
    definition: Definition,
    wanted: Vec<&'static Experiment>,
}

impl Experiments {
    /// Loads the profile that the arguments name, if it is one of experiments.
    pub(super) fn of(args: &Reproduce) -> Result<Option<Experiments>> {
        let Some(mut definition) = Definition::load(&args.profile, &ALL)? else { return Ok(None) };
        definition.seeds = args.seeds.unwrap_or(definition.seeds);
        let names = &definition.experiments;
        if let Some(unknown) = args.methods.iter().find(|name| !names.contains(name)) {
            let (profile, names) = (&definition.name, names.join(", "));
            bail!("--methods {unknown}: profile {profile} has no such experiment; use {names}");
        }
        let wanted = names.iter().filter(|name| args.methods.is_empty() || args.methods.contains(name));
        let wanted = wanted.filter_map(|name| ALL.iter().find(|one| one.name == *name)).collect();
        refuse_others(args, &definition)?;
        Ok(Some(Experiments { definition, wanted }))
    }

    /// Returns the profile whose text and dense model the experiments use.
    pub(super) fn profile(&self) -> Profile {
        self.definition.profile(0)
    }

    /// Prints the plan.
    pub(super) fn plan(&self, args: &Reproduce, ui: &mut Ui) -> Result<()> {
        let profile = self.profile();
        let (dense, model) = super::plan::dense(args, &profile)?;
        plan::show(self.rows(&profile, args)?, (&self.definition, &dense, model), ui)
    }

    /// Lists the stages of all seeds.
    fn rows(&self, profile: &Profile, args: &Reproduce) -> Result<Vec<Row>> {
        let (sources, seq) = (super::plan::sources(args, profile)?, profile.train()?.seq);
        let costs = Costs { profile, sources, seq };
        count(&self.wanted, costs, self.definition.seeds, args.model.is_some())
    }

    /// Runs all experiments and writes their results into `out`.
    pub(super) fn run(&self, args: &Reproduce, out: &Path, ui: &mut Ui) -> Result<()> {
        let started = Instant::now();
        let cache = Cache::new(args.stages.clone().unwrap_or_else(|| out.join("cache")));
        let profile = self.profile();
        let text = super::text(args, &profile, &cache, ui).context("stage text")?;
        let rows = self.rows(&profile, args)?;
        let (stages, tokens) = rows.iter().fold((0, 0.0), |(stages, tokens), row| {
            (stages + row.planned.stages, tokens + row.planned.tokens)
        });
        let profiles: Vec<Profile> =
            (0..self.definition.seeds).map(|seed| self.definition.profile(seed)).collect();
        let (sources, seq) = (text.held_out.len(), profile.train()?.seq);
        let shown = &ui.clone();
        let inputs = |profile| {
            let costs = Costs { profile, sources, seq };
            Inputs { profile, options: args, text: &text, tasks: &[], costs, ui: shown }
        };
        let mut stages = Stages {
            inputs: inputs(&profile),
            work: Work::new(&cache, shown, stages, tokens),
            steps_left: args.stop_after,
        };
        let mut setup = self.setup(&text);
        super::forget_results(out)?;
        let mut numbers: Vec<Vec<Vec<Value>>> = vec![Vec::new(); self.wanted.len()];
        for (seed, profile) in (0..).zip(&profiles) {
            stages.inputs = inputs(profile);
            let base = stages.base()?;
            setup.dense_models.push(base.sha256.clone().unwrap_or_else(|| base.key.text().to_owned()));
            setup.dense_params = Accounting::of(&base.config).total;
            for (experiment, numbers) in self.wanted.iter().zip(&mut numbers) {
                let mut lab = Lab { stages: &mut stages, base: &base, seed, name: experiment.name };
                let values = (experiment.measure)(&mut lab)?;
                let run = Run { experiment: experiment.name.to_owned(), seed, values };
                write_part(&out.join(RUNS).join(run.file()), &run)?;
                numbers.push(run.values);
            }
        }
        let found = self.wanted.iter().zip(&numbers).map(|(experiment, seeds)| Found::new(experiment, seeds));
        let experiments = found.collect::<Result<_>>()?;
        write_part(&out.join(SETUP), &setup)?;
        let outcome = Outcome { format_version: FORMAT_VERSION, setup, experiments };
        finish(&outcome, out, started.elapsed().as_secs_f64(), ui)
    }

    fn setup(&self, text: &Text) -> Setup {
        let mut profile = self.definition.clone();
        profile.experiments = self.wanted.iter().map(|experiment| experiment.name.to_owned()).collect();
        Setup {
            format_version: FORMAT_VERSION,
            program: concat!("dsmoe ", env!("CARGO_PKG_VERSION")).to_owned(),
            git_revision: env!("DSMOE_REVISION").to_owned(),
            profile,
            inputs: text.inputs.clone(),
            dense_models: Vec::new(),
            dense_params: 0,
        }
    }
}

/// Returns the profile of the experiments in the file `place`; none if it holds no experiments.
#[cfg(test)]
pub(super) fn profile_of(place: &str) -> Result<Option<super::profile::Profile>> {
    Ok(Definition::load(place, &ALL)?.map(|definition| definition.profile(0)))
}

/// Refuses options of a comparison of methods.
fn refuse_others(args: &Reproduce, definition: &Definition) -> Result<()> {
    let others = [
        ("--only", !args.only.is_empty()),
        ("--budgets", !args.budgets.is_empty()),
        ("--tokens", args.tokens.is_some()),
        ("--shard", args.shard.is_some()),
        ("--discard", args.discard),
        ("--task-data", args.task_data.is_some()),
        ("--device", args.device.is_gpu()),
    ];
    match others.iter().find(|(_, given)| *given) {
        Some((option, _)) => bail!(
            "{option}: profile {} has experiments and no methods to compare; leave it out, or choose experiments with --methods",
            definition.name
        ),
        None => Ok(()),
    }
}

/// Writes results and report, and shows what came out.
fn finish(outcome: &Outcome, out: &Path, seconds: f64, ui: &mut Ui) -> Result<()> {
    write_json(&out.join(RESULTS), outcome)?;
    report::files::write(&outcome.report(), out)?;
    let place = out.display().to_string();
    let record = compare_experiments(outcome);
    let done =
        json!({ "out": place, "seconds": seconds, "experiments": outcome.experiments, "record": record });
    ui.result(&done, |_| {
        let time = format::duration(seconds);
        let record = record.map_or(String::new(), |record| format!("{}\n", record.text()));
        format!(
            "{}\n{record}{place}: report.html, report.md, results.json and csv/ after {time}\n",
            outcome.show()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experiments_have_names_of_their_own_and_claims_with_controls() {
        for (i, experiment) in ALL.iter().enumerate() {
            assert!(ALL[..i].iter().all(|other| other.name != experiment.name), "{}", experiment.name);
            assert!(!experiment.claims.is_empty(), "{}", experiment.name);
            for claim in experiment.claims {
                assert!(!claim.controls.is_empty() && !claim.columns.is_empty(), "{}", experiment.name);
                assert!(!claim.controls.contains(&claim.row), "{}: its own control", experiment.name);
            }
        }
    }

    #[test]
    fn the_embedded_profiles_have_all_experiments() {
        let of = |name| Definition::load(name, &ALL).unwrap().unwrap().experiments;
        let known: Vec<&str> = ALL.iter().map(|experiment| experiment.name).collect();
        assert_eq!([of("related"), of("related-smollm2")].concat(), known);
        assert_eq!(of("related-brief"), of("related"));
        assert!(Definition::load("quick", &ALL).unwrap().is_none());
    }
}
