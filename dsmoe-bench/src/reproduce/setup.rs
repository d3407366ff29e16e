//! The settings file of a reproduction.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_core::accounting::Accounting;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::inputs::Base;
use super::limits::{self, MOST_RESAMPLES};
use super::outputs::Output;
use super::profile::Profile;
use super::records::FORMAT_VERSION;
use super::sound;
use super::text::Text;

/// The definition and the inputs of a reproduction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) format_version: u32,
    pub(crate) program: String,
    /// Revision that the program was built from; `unknown` outside a repository.
    pub(crate) git_revision: String,
    pub(crate) profile: Profile,
    pub(crate) outputs: Vec<Output>,
    /// Files of `runs/` in the end, in the order of the tables.
    pub(crate) runs: Vec<String>,
    /// Hashes of text, tokenizer and model.
    pub(crate) inputs: Value,
    pub(crate) tokens_per_source: u64,
    /// Activated parameters that every method may have.
    pub(crate) budget: f64,
    pub(crate) dense_params: u64,
    pub(crate) num_layers: usize,
}

impl Setup {
    /// Describes a reproduction whose runs have the names `runs`.
    pub(crate) fn new(
        profile: &Profile,
        outputs: &[Output],
        runs: Vec<String>,
        text: &Text,
        base: &Base,
    ) -> Result<Setup> {
        let mut inputs = text.inputs.clone();
        inputs["dense_model"] = json!({ "key": base.key, "sha256": base.sha256 });
        Ok(Setup {
            format_version: FORMAT_VERSION,
            program: concat!("dsmoe ", env!("CARGO_PKG_VERSION")).to_owned(),
            git_revision: env!("DSMOE_REVISION").to_owned(),
            profile: profile.clone(),
            outputs: outputs.to_vec(),
            runs,
            inputs,
            tokens_per_source: text.held_out.first().map_or(0, |part| part.ids.len() as u64),
            budget: profile.budget(&base.config)?,
            dense_params: Accounting::of(&base.config).total,
            num_layers: base.config.num_layers,
        })
    }

    /// Refuses values that no reproduction writes into the file `path`.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        sound::check_setup(path, self)?;
        limits::check_lists(&self.profile).with_context(|| path.display().to_string())?;
        limits::check_seeds(&self.profile).with_context(|| path.display().to_string())?;
        let resamples = self.profile.measure.resamples;
        if !(1..=MOST_RESAMPLES).contains(&resamples) {
            bail!("{}: resamples is {resamples}; use 1 to {MOST_RESAMPLES}", path.display());
        }
        // A method runs a part of the dense model, and routers.
        if !(1.0..=2.0 * self.dense_params as f64).contains(&self.budget) {
            let (budget, dense) = (self.budget, self.dense_params);
            bail!(
                "{}: budget is {budget} of a dense model of {dense} parameters; run the reproduction again",
                path.display()
            );
        }
        Ok(())
    }

    /// Adds the runs of another part. The order is that of the tables: by seed, then as the profile lists the methods.
    pub(crate) fn add_runs(&mut self, runs: Vec<String>) {
        let new: Vec<String> = runs.into_iter().filter(|id| !self.runs.contains(id)).collect();
        if new.is_empty() {
            return;
        }
        self.runs.extend(new);
        let methods = &self.profile.method;
        let place = |id: &String| {
            let (name, seed) = id.rsplit_once("-s").unwrap_or((id, ""));
            (seed.parse::<usize>().ok(), methods.iter().position(|spec| spec.name == name))
        };
        self.runs.sort_by_key(place);
    }
}
