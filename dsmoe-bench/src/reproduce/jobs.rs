//! The models that a reproduction makes: one for each method and seed.

use anyhow::{Result, bail};

use super::outputs::{Output, Part};
use super::profile::{MethodSpec, Profile};
use crate::cli::reproduce::Reproduce;

/// A method and seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) spec: &'a MethodSpec,
    pub(crate) seed: u64,
}

impl Job<'_> {
    /// Returns the name of its files.
    pub(crate) fn id(&self) -> String {
        format!("{}-s{}", self.spec.name, self.seed)
    }
}

/// A model to make.
pub(crate) struct Planned<'a> {
    pub(crate) job: Job<'a>,
    /// Parts that are measured.
    pub(crate) parts: Vec<Part>,
}

/// Lists all models that the outputs need.
pub(crate) fn all_jobs<'a>(
    profile: &'a Profile,
    options: &Reproduce,
    outputs: &[Output],
) -> Result<Vec<Planned<'a>>> {
    for name in &options.methods {
        if !profile.method.iter().any(|spec| spec.name == *name) {
            let names: Vec<&str> = profile.method.iter().map(|spec| spec.name.as_str()).collect();
            bail!("--methods {name}: profile {} has no such method; use {}", profile.name, names.join(", "));
        }
    }
    let wanted = |spec: &&MethodSpec| options.methods.is_empty() || options.methods.contains(&spec.name);
    let mut jobs = Vec::new();
    for seed in 0..profile.seeds {
        for spec in profile.method.iter().filter(wanted) {
            let parts = Output::parts_of(outputs, spec);
            if !parts.is_empty() {
                jobs.push(Planned { job: Job { spec, seed }, parts });
            }
        }
    }
    Ok(jobs)
}
