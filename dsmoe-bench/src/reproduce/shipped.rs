//! Numbers of the recorded reproductions of embedded profiles, to compare a run with.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::profile::Profile;
use super::results::Results;

/// Losses of every run of a record. A test keeps the files equal to the records.
const RECORDS: [&str; 3] = [
    include_str!("shipped/quick.json"),
    include_str!("shipped/small.json"),
    include_str!("shipped/smollm2-135m.json"),
];

/// A record, without all but its losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Shipped {
    profile: String,
    git_revision: String,
    machine: String,
    /// Loss on the held-out text by method and seed.
    nll: BTreeMap<String, f64>,
}

/// How the runs compare with those of a record.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Likeness {
    /// Revision and machine of the record.
    git_revision: String,
    machine: String,
    /// The runs that both have.
    runs: usize,
    /// Those that differ, with their loss minus the record's in nats.
    different: BTreeMap<String, f64>,
}

impl Shipped {
    fn of(results: &Results) -> Shipped {
        let name = |method: &str, seed: u64| format!("{method}-s{seed}");
        let runs = results.methods.iter().flat_map(|method| {
            let seeds = method.seeds.iter().zip(&method.nll.values);
            seeds.map(|(&seed, &nll)| (name(&method.name, seed), nll))
        });
        let machines = results.machines.iter().map(|one| format!("{}, {}", one.cpu, one.isa));
        Shipped {
            profile: results.setup.profile.name.clone(),
            git_revision: results.setup.git_revision.clone(),
            machine: machines.collect::<Vec<_>>().join("; "),
            nll: runs.collect(),
        }
    }
}

/// Compares results with the record of their profile; none if there is no record, or the profile was changed.
pub(super) fn compare(results: &Results) -> Option<Likeness> {
    let profile = &results.setup.profile;
    let records = RECORDS.iter().filter_map(|text| serde_json::from_str::<Shipped>(text).ok());
    let record = records.into_iter().find(|record| record.profile == profile.name)?;
    let mut unchanged = Profile::load(&record.profile).ok()?;
    // Other seeds are other runs, of which some may be the record's.
    unchanged.seeds = profile.seeds;
    if unchanged != *profile {
        return None;
    }
    let ours = Shipped::of(results).nll;
    let both: Vec<(&String, f64)> =
        ours.iter().filter_map(|(run, nll)| Some((run, nll - record.nll.get(run)?))).collect();
    let different = both.iter().filter(|(_, off)| *off != 0.0);
    let different = different.map(|(run, off)| ((*run).clone(), *off)).collect();
    let Shipped { git_revision, machine, .. } = record;
    (!both.is_empty()).then_some(Likeness { git_revision, machine, runs: both.len(), different })
}

impl Likeness {
    /// Words the comparison.
    pub(super) fn text(&self) -> String {
        let place = format!("the shipped record (revision {}, {})", self.git_revision, self.machine);
        if self.different.is_empty() {
            return format!("all {} runs equal to {place}", self.runs);
        }
        let most = self.different.values().fold(0.0f64, |most, off| most.max(off.abs()));
        let mut largest: Vec<(&String, &f64)> = self.different.iter().collect();
        largest.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
        let shown: Vec<String> =
            largest.iter().take(5).map(|(run, off)| format!("{run} {off:+.2e}")).collect();
        let more = if largest.len() > shown.len() { ", ..." } else { "" };
        format!(
            "{} of {} runs differ from {place}, by at most {most:.1e} nats: {}{more}",
            largest.len(),
            self.runs,
            shown.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn record(name: &str) -> Results {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("record").join(name).join("results.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    /// `DSMOE_SNAPSHOTS=update` writes the files anew.
    #[test]
    fn the_shipped_numbers_are_the_records() {
        for (text, name) in RECORDS.iter().zip(["quick", "small", "smollm2-135m"]) {
            let wanted = Shipped::of(&record(name));
            if std::env::var_os("DSMOE_SNAPSHOTS").is_some_and(|value| value == "update") {
                let path = format!("{}/src/reproduce/shipped/{name}.json", env!("CARGO_MANIFEST_DIR"));
                std::fs::write(path, serde_json::to_string_pretty(&wanted).unwrap() + "\n").unwrap();
                continue;
            }
            assert_eq!(serde_json::from_str::<Shipped>(text).unwrap(), wanted, "{name}");
        }
    }

    #[test]
    fn results_are_compared_with_the_record_of_their_profile() {
        let mut results = record("quick");
        // The profile of the record may be older than the embedded one.
        results.setup.profile = Profile::load("quick").unwrap();
        let found = compare(&results).unwrap();
        assert_eq!((found.runs, found.different.len()), (results.methods.len(), 0));
        assert!(found.text().starts_with(&format!("all {} runs equal", found.runs)), "{}", found.text());
        results.methods[2].nll.values[0] += 1e-3;
        let text = compare(&results).unwrap().text();
        assert!(text.starts_with("1 of ") && text.contains(&results.methods[2].name), "{text}");
        results.setup.profile.active = 0.5;
        assert_eq!(compare(&results), None);
    }
}
