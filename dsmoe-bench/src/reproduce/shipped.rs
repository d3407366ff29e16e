//! Numbers of the recorded reproductions of embedded profiles, to compare a run with.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::profile::Profile;
use super::related::Outcome;
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

/// The numbers of the recorded experiments. A test keeps them equal to the records.
const EXPERIMENTS: [&str; 2] =
    [include_str!("shipped/related.json"), include_str!("shipped/related-smollm2.json")];

/// A record of experiments, without all but their numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct ShippedExperiments {
    profile: String,
    git_revision: String,
    /// The numbers of each experiment and seed, by row and column.
    runs: BTreeMap<String, BTreeMap<String, f64>>,
}

impl ShippedExperiments {
    fn of(outcome: &Outcome) -> ShippedExperiments {
        let mut runs: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        for found in &outcome.experiments {
            for (row, cell) in found.rows.iter().flat_map(|row| row.cells.iter().map(move |cell| (row, cell)))
            {
                for (seed, value) in cell.seeds.iter().enumerate() {
                    let run = runs.entry(format!("{}-s{seed}", found.name)).or_default();
                    run.insert(format!("{}: {}", row.name, cell.column), *value);
                }
            }
        }
        ShippedExperiments {
            profile: outcome.setup.profile.name.clone(),
            git_revision: outcome.setup.git_revision.clone(),
            runs,
        }
    }
}

/// Compares experiments with the record of their profile; none if there is no record, or the profile was changed.
pub(super) fn compare_experiments(outcome: &Outcome) -> Option<Likeness> {
    let profile = &outcome.setup.profile;
    let mut records =
        EXPERIMENTS.iter().filter_map(|text| serde_json::from_str::<ShippedExperiments>(text).ok());
    let record = records.find(|record| record.profile == profile.name && profile.is_embedded())?;
    let ours = ShippedExperiments::of(outcome).runs;
    // A run is as far off as the number of it that is farthest off.
    let both = ours.iter().filter_map(|(run, numbers)| {
        let recorded = record.runs.get(run)?;
        let off = numbers
            .iter()
            .map(|(number, value)| recorded.get(number).map_or(f64::INFINITY, |old| value - old));
        Some((run.clone(), off.max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0)))
    });
    Likeness::of(record.git_revision, None, both.collect())
}

/// How the runs compare with those of a record.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Likeness {
    /// Revision and machine of the record.
    git_revision: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
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
    let both = ours.iter().filter_map(|(run, nll)| Some((run.clone(), nll - record.nll.get(run)?)));
    Likeness::of(record.git_revision, Some(record.machine), both.collect())
}

impl Likeness {
    /// Makes the comparison of runs by their differences; none without a run.
    fn of(git_revision: String, machine: Option<String>, runs: Vec<(String, f64)>) -> Option<Likeness> {
        let count = runs.len();
        let different = runs.into_iter().filter(|(_, off)| *off != 0.0).collect();
        (count > 0).then_some(Likeness { git_revision, machine, runs: count, different })
    }

    /// Words the comparison.
    pub(super) fn text(&self) -> String {
        let machine = self.machine.as_ref().map_or(String::new(), |machine| format!(", {machine}"));
        let place = format!("the shipped record (revision {}{machine})", self.git_revision);
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

    use serde::de::DeserializeOwned;

    use super::*;

    fn record<T: DeserializeOwned>(name: &str) -> T {
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

    const RECORDS_OF_EXPERIMENTS: [&str; 2] = ["related", "related-smollm2"];

    /// `DSMOE_SNAPSHOTS=update` writes the files anew.
    #[test]
    fn the_shipped_numbers_of_experiments_are_the_records() {
        for (text, name) in EXPERIMENTS.iter().zip(RECORDS_OF_EXPERIMENTS) {
            let wanted = ShippedExperiments::of(&record(name));
            if std::env::var_os("DSMOE_SNAPSHOTS").is_some_and(|value| value == "update") {
                let path = format!("{}/src/reproduce/shipped/{name}.json", env!("CARGO_MANIFEST_DIR"));
                std::fs::write(path, serde_json::to_string_pretty(&wanted).unwrap() + "\n").unwrap();
                continue;
            }
            assert_eq!(serde_json::from_str::<ShippedExperiments>(text).unwrap(), wanted, "{name}");
        }
    }

    #[test]
    fn experiments_are_compared_with_their_record() {
        for mut outcome in RECORDS_OF_EXPERIMENTS.map(record::<Outcome>) {
            let found = compare_experiments(&outcome).unwrap();
            let seeds = outcome.setup.profile.seeds as usize;
            assert_eq!((found.runs, found.different.len()), (seeds * outcome.experiments.len(), 0));
            let cell = &mut outcome.experiments[0].rows[0].cells[0];
            cell.seeds[seeds - 1] += 1e-3;
            let text = compare_experiments(&outcome).unwrap().text();
            assert!(
                text.starts_with("1 of ") && text.contains(&format!("-s{} +1.00e-3", seeds - 1)),
                "{text}"
            );
            outcome.setup.profile.about = "another".to_owned();
            assert_eq!(compare_experiments(&outcome), None);
        }
    }

    #[test]
    fn results_are_compared_with_the_record_of_their_profile() {
        let mut results: Results = record("quick");
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
