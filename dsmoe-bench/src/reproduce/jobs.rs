//! The models that a reproduction makes: one for each method and seed.

use anyhow::{Result, bail};

use super::outputs::{Output, Part};
use super::profile::{MethodSpec, Profile, Role};
use crate::cli::reproduce::Reproduce;
use crate::format;

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
        if !profile.method.iter().any(|spec| spec.is_called(name)) {
            let name_of = |spec: &'a MethodSpec| spec.of.as_deref().unwrap_or(&spec.name);
            let mut names: Vec<&str> = profile.method.iter().map(name_of).collect();
            let mut seen = std::collections::HashSet::new();
            names.retain(|name| seen.insert(*name));
            bail!("--methods {name}: profile {} has no such method; use {}", profile.name, names.join(", "));
        }
    }
    for share in &options.budgets {
        if !profile.method.iter().any(|spec| profile.served_by(spec) == *share) {
            let mut served: Vec<f64> = profile.method.iter().map(|spec| profile.served_by(spec)).collect();
            served.sort_by(f64::total_cmp);
            served.dedup();
            let served: Vec<String> = served.into_iter().map(format::percent).collect();
            bail!(
                "--budgets {}: profile {} has no such budget; it has {}",
                format::percent(*share),
                profile.name,
                served.join(", ")
            );
        }
    }
    let wanted = |spec: &&MethodSpec| {
        let named = options.methods.is_empty() || options.methods.iter().any(|name| spec.is_called(name));
        let at = options.budgets.is_empty() || options.budgets.contains(&profile.served_by(spec));
        named && (at || spec.role == Role::Dense)
    };
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
