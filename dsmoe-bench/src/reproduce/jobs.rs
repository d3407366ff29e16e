//! The models that a reproduction makes: one for each method and seed.

use anyhow::{Result, bail};

use super::options::Options;
use super::outputs::{Output, Part};
use super::profile::{MethodSpec, Profile};

/// One model of the comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) spec: &'a MethodSpec,
    pub(crate) seed: u64,
}

impl Job<'_> {
    /// What its files are called.
    pub(crate) fn id(&self) -> String {
        format!("{}-s{}", self.spec.name, self.seed)
    }
}

/// A method and seed, what is measured of it, and its number among all.
pub(crate) type Planned<'a> = (usize, Job<'a>, Vec<Part>);

/// The methods and seeds of this shard.
pub(crate) fn jobs<'a>(profile: &'a Profile, args: &Options, outputs: &[Output]) -> Result<Vec<Planned<'a>>> {
    let mut jobs = all_jobs(profile, args, outputs)?;
    if let Some(shard) = args.shard {
        jobs.retain(|(number, ..)| shard.has(*number));
    }
    Ok(jobs)
}

/// All methods and seeds that the outputs need.
pub(crate) fn all_jobs<'a>(
    profile: &'a Profile,
    args: &Options,
    outputs: &[Output],
) -> Result<Vec<Planned<'a>>> {
    for name in &args.methods {
        if !profile.method.iter().any(|spec| spec.name == *name) {
            let names: Vec<&str> = profile.method.iter().map(|spec| spec.name.as_str()).collect();
            bail!("--methods {name}: profile {} has no such method; use {}", profile.name, names.join(", "));
        }
    }
    let wanted = |spec: &&MethodSpec| args.methods.is_empty() || args.methods.contains(&spec.name);
    let mut jobs = Vec::new();
    for seed in 0..profile.seeds {
        for spec in profile.method.iter().filter(wanted) {
            let parts = Output::parts_of(outputs, spec);
            if !parts.is_empty() {
                jobs.push((jobs.len(), Job { spec, seed }, parts));
            }
        }
    }
    Ok(jobs)
}
