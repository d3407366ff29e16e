//! From runs to results: means, intervals, tests, and the comparison with the paper. The results are a function of
//! `setup.json` and `runs/` alone, so that they are the same bytes however the work was done.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::collected::Collected;
use super::directions::directions;
use super::measure::{Bin, Difficulty, DomainResult, TaskScore};
use super::profile::{MethodSpec, Profile, Role};
use super::records::{BASE, FORMAT_VERSION, Machine, Run};
use super::results::{
    Comparison, DomainMean, MethodResult, MilestoneMean, Results, Shape, SweepMean, TaskMean, Verdict,
};
use super::setup::Setup;
use super::statistics::{Measured, bootstrap, mean, middle, paired_t, sign_p, w_shape};

/// A difference is significant below this p.
const SIGNIFICANT: f64 = 0.05;
/// Fewest documents that the bootstrap draws; of fewer it draws the windows.
const FEW_DOCUMENTS: usize = 8;
/// Fewest layers with a significant W: a tenth of all orders of five layers are a perfect W.
const LAYERS: usize = 6;
/// Least correlation of a W with the wave.
const W_LIKE: f64 = 0.5;

impl Measured {
    /// Computes the interval from the losses, so that it does not reach below 1.
    fn of_perplexities(values: Vec<f64>) -> Measured {
        let losses = Measured::of_seeds(values.iter().map(|ppl| ppl.ln()).collect());
        let interval = losses.interval.map(|interval| interval.map(f64::exp));
        Measured { interval, ..Measured::of_seeds(values) }
    }

    fn or_interval(mut self, over: &str, interval: impl FnOnce() -> Option<[f64; 2]>) -> Measured {
        if self.interval.is_none() {
            self.interval = interval();
            self.over = self.interval.map(|_| over.to_owned());
        }
        self
    }
}

/// Computes the results of runs.
pub(crate) fn of(collected: &Collected) -> Result<Results> {
    let (setup, timings) = (&collected.setup, &collected.timings);
    let profile = &setup.profile;
    let runs = || collected.runs.iter();
    let machines: BTreeSet<Machine> =
        runs().chain([&collected.base]).map(|run| run.machine.clone()).collect();

    let runs_of = |spec: &MethodSpec| runs().filter(|run| run.method == spec.name).collect();
    let groups = profile.method.iter().map(|spec| (Some(spec), runs_of(spec)));
    let groups: Vec<(Option<&MethodSpec>, Vec<&Run>)> = [(None, vec![&collected.base])]
        .into_iter()
        .chain(groups)
        .filter(|(_, runs)| !runs.is_empty())
        .collect();
    let methods = groups.iter().map(|(spec, runs)| method_result(setup, *spec, runs));
    let mut methods: Vec<MethodResult> = methods.collect::<Result<_>>()?;
    for method in &mut methods {
        let timing = method.seeds.first().and_then(|seed| timings.get(&format!("{}-s{seed}", method.name)));
        method.speeds = timing.map_or(Vec::new(), |timing| timing.grid.clone());
    }
    let mut comparisons = Vec::new();
    for (spec, of_dsmoe) in &groups {
        let Some(spec) = spec.filter(|spec| spec.role.is_dsmoe()) else { continue };
        // Rows of other budgets are no comparison; the dense model has none.
        let comparable = |other: &&MethodSpec| {
            let dense = other.role == Role::Dense;
            other.name != spec.name && (dense || profile.served_by(other) == profile.served_by(spec))
        };
        for (other, of_other) in groups.iter().filter(|(other, _)| other.as_ref().is_none_or(comparable)) {
            let name = other.map_or(BASE, |other| other.name.as_str());
            comparisons.push(compare(profile, (&spec.name, of_dsmoe), (name, of_other)));
        }
    }
    let shapes: Vec<Shape> = methods.iter().filter(|m| m.is_dsmoe()).flat_map(shapes).collect();
    let directions = directions(profile.paper, &methods, &shapes);
    let seeds: BTreeSet<u64> = runs().map(|run| run.seed).collect();
    Ok(Results {
        format_version: FORMAT_VERSION,
        setup: setup.clone(),
        machines: machines.into_iter().collect(),
        seeds: seeds.into_iter().collect(),
        methods,
        comparisons,
        shapes,
        directions,
    })
}

fn method_result(setup: &Setup, spec: Option<&MethodSpec>, runs: &[&Run]) -> Result<MethodResult> {
    let profile = &setup.profile;
    let experts = spec.map(|spec| profile.experts_of(spec)).transpose()?.flatten();
    let first = runs[0];
    let of = |value: &dyn Fn(&Run) -> f64| runs.iter().map(|run| value(run)).collect::<Vec<f64>>();
    let of_some = |value: &dyn Fn(&Run) -> Option<f64>| -> Option<f64> {
        runs.iter().map(|run| value(run)).collect::<Option<Vec<f64>>>().map(|values| mean(&values))
    };
    let windows = || Some(middle(&bootstrap(&windows_of(first), profile.measure.resamples)));
    let params_activated = Measured::of_seeds(of(&|run| run.text.means.params_activated));
    let domains = first.text.domains.iter().enumerate().map(|(at, domain)| DomainMean {
        name: domain.name.clone(),
        share: domain.share,
        ppl: mean(&of(&|run| run.text.domains[at].ppl)),
        active_ratio: of_some(&|run| run.text.domains[at].active_ratio),
        active_experts_per_layer: (0..domain.active_ratio_per_layer.as_ref().map_or(0, Vec::len))
            .map(|layer| {
                let share =
                    |run: &Run| run.text.domains[at].active_ratio_per_layer.as_ref().map(|all| all[layer]);
                experts.unwrap_or_else(|| profile.default_experts()) as f64 * of_some(&share).unwrap_or(0.0)
            })
            .collect(),
        kl: of_some(&|run| run.text.domains[at].agreement.map(|found| found.kl)),
        top1: of_some(&|run| run.text.domains[at].agreement.map(|found| found.top1)),
    });
    let task = |(at, task): (usize, &TaskScore)| {
        let value = |run: &Run| 100.0 * run.tasks.as_ref().map_or(0.0, |tasks| tasks[at].value);
        let items = || task.stderr.map(|e| [task.value - 1.96 * e, task.value + 1.96 * e].map(|x| 100.0 * x));
        TaskMean {
            task: task.task.clone(),
            metric: task.metric.clone(),
            shots: task.shots,
            items: task.items,
            percent: Measured::of_seeds(of(&value)).or_interval("items", items),
            gold_nll: of_some(&|run| run.tasks.as_ref()?[at].gold_nll),
            active_ratio: of_some(&|run| run.tasks.as_ref()?[at].active_ratio),
        }
    };
    let tasks: Vec<TaskMean> = first.tasks.iter().flatten().enumerate().map(task).collect();
    let milestones =
        first.trained.iter().flat_map(|trained| &trained.milestones).enumerate().map(|(at, stone)| {
            let all = runs.iter().filter_map(|run| Some(&run.trained.as_ref()?.milestones[at]));
            let all: Vec<_> = all.collect();
            let active: Option<Vec<f64>> = all.iter().map(|stone| stone.means.active_ratio).collect();
            MilestoneMean {
                share: stone.share,
                tokens: stone.tokens,
                ppl: Measured::of_perplexities(all.iter().map(|stone| stone.means.ppl).collect()),
                active_ratio: active.map(|values| mean(&values)),
                params_activated: mean_of(&all, |stone| stone.means.params_activated),
            }
        });
    let sweep = first.sweep.iter().flatten().enumerate().map(|(at, point)| {
        let all: Vec<_> = runs.iter().filter_map(|run| run.sweep.as_ref()).map(|sweep| &sweep[at]).collect();
        SweepMean {
            threshold: point.threshold,
            ppl: Measured::of_perplexities(all.iter().map(|point| point.ppl).collect()),
            active_ratio: mean_of(&all, |point| point.active_ratio),
            params_activated: mean_of(&all, |point| point.params_activated),
        }
    });
    Ok(MethodResult {
        name: spec.map_or(BASE, |spec| spec.name.as_str()).to_owned(),
        role: spec.map(|spec| spec.role),
        paper: spec.and_then(|spec| spec.paper),
        experts,
        seeds: runs.iter().map(|run| run.seed).collect(),
        reached_by: first.made.as_ref().map(|made| made.reached_by.clone()),
        calibration_tokens: first.made.as_ref().map_or(0, |made| made.calibration_tokens),
        tokens: first.trained.as_ref().map_or(0, |trained| trained.tokens),
        params_total: mean(&of(&|run| run.text.means.params_total as f64)),
        of_budget: params_activated.mean
            / first.made.as_ref().and_then(|made| made.budget).unwrap_or(setup.budget),
        params_activated,
        flops_per_token: mean(&of(&|run| run.text.flops_per_token)),
        active_ratio: of_some(&|run| run.text.means.active_ratio),
        threshold: of_some(&|run| run.text.threshold.map(f64::from)),
        ppl: Measured::of_perplexities(of(&|run| run.text.means.ppl))
            .or_interval("windows", || windows().map(|interval| interval.map(f64::exp))),
        nll: Measured::of_seeds(of(&|run| run.text.means.nll)).or_interval("windows", windows),
        domains: domains.collect(),
        tasks_mean: (!tasks.is_empty()).then(|| mean_of(&tasks, |task| task.percent.mean)),
        tasks,
        milestones: milestones.collect(),
        sweep: sweep.collect(),
        difficulty: mean_difficulty(runs),
        active: spec.filter(|spec| in_budgets(profile, spec)).map(|spec| profile.served_by(spec)),
        group: spec
            .filter(|spec| in_budgets(profile, spec))
            .map(|spec| spec.of.as_ref().unwrap_or(&spec.name).clone()),
        untrained: spec.is_some_and(|spec| spec.untrained),
        speeds: Vec::new(),
    })
}

/// Reports whether a row has one of several budgets.
fn in_budgets(profile: &Profile, spec: &MethodSpec) -> bool {
    !profile.budgets.is_empty() && spec.role != Role::Dense
}

fn mean_of<T>(all: &[T], value: impl Fn(&T) -> f64) -> f64 {
    mean(&all.iter().map(value).collect::<Vec<_>>())
}

/// Lists what the bootstrap draws of every source as sums of losses and numbers of predicted tokens: documents where they
/// are known and enough, else windows.
fn windows_of(run: &Run) -> Vec<(f64, Vec<(f64, f64)>)> {
    run.text.domains.iter().map(|domain| (domain.share, units(domain))).collect()
}

fn units(domain: &DomainResult) -> Vec<(f64, f64)> {
    let windows = domain.windows.iter().map(|&(sum, count)| (sum, count as f64));
    if !has_documents(domain) {
        return windows.collect();
    }
    let mut units: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for (document, (sum, count)) in domain.documents.iter().zip(windows) {
        let unit = units.entry(*document).or_default();
        *unit = (unit.0 + sum, unit.1 + count);
    }
    units.into_values().collect()
}

/// Reports whether the documents of a source are known and enough to be drawn.
fn has_documents(domain: &DomainResult) -> bool {
    domain.documents.iter().collect::<BTreeSet<_>>().len() >= FEW_DOCUMENTS
}

fn mean_difficulty(runs: &[&Run]) -> Option<Difficulty> {
    let all: Vec<&Difficulty> = runs.iter().map(|run| run.difficulty.as_ref()).collect::<Option<_>>()?;
    let mut result = all[0].clone();
    for (at, bin) in result.bins.iter_mut().enumerate() {
        let of = |value: &dyn Fn(&Bin) -> f64| mean_of(&all, |one| value(&one.bins[at]));
        (bin.dense_nll, bin.nll, bin.active) = (of(&|b| b.dense_nll), of(&|b| b.nll), of(&|b| b.active));
    }
    let correlations: Option<Vec<f64>> = all.iter().map(|one| one.correlation).collect();
    result.correlation = correlations.map(|values| mean(&values));
    for (at, count) in result.histogram.iter_mut().enumerate() {
        *count = all.iter().map(|one| one.histogram[at]).sum();
    }
    Some(result)
}

fn compare(profile: &Profile, dsmoe: (&str, &[&Run]), other: (&str, &[&Run])) -> Comparison {
    // The dense model before training is the same for all seeds.
    let of_seed = |seed: u64| {
        other.1.iter().find(|run| run.seed == seed).or(other.1.first().filter(|run| run.role.is_none()))
    };
    let pairs: Vec<(&Run, &Run)> =
        dsmoe.1.iter().filter_map(|run| Some((*run, *of_seed(run.seed)?))).collect();
    let differences: Vec<f64> =
        pairs.iter().map(|(ours, theirs)| theirs.text.means.nll - ours.text.means.nll).collect();
    let (difference, interval, p, test) = if differences.len() > 1 {
        let found = Measured::of_seeds(differences.clone());
        (found.mean, found.interval, paired_t(&differences), "paired t over seeds")
    } else if let Some((ours, theirs)) = pairs.first() {
        let strata = windows_of(ours).into_iter().zip(windows_of(theirs));
        let strata = strata.map(|((share, ours), (_, theirs))| {
            (share, ours.iter().zip(&theirs).map(|(a, b)| (b.0 - a.0, a.1)).collect())
        });
        let found = bootstrap(&strata.collect(), profile.measure.resamples);
        let test = match ours.text.domains.iter().any(has_documents) {
            true => "bootstrap over held-out documents",
            false => "bootstrap over held-out windows",
        };
        (differences[0], Some(middle(&found)), Some(sign_p(&found)), test)
    } else {
        (0.0, None, None, "no common seed")
    };
    let verdict = match p {
        Some(p) if p < SIGNIFICANT && difference > 0.0 => Verdict::Better,
        Some(p) if p < SIGNIFICANT => Verdict::Worse,
        _ => Verdict::NotSignificant,
    };
    Comparison {
        dsmoe: dsmoe.0.to_owned(),
        other: other.0.to_owned(),
        difference,
        interval,
        p,
        test: test.to_owned(),
        seeds: differences.len(),
        verdict,
    }
}

/// Tests for a W on every source, and on all together.
fn shapes(method: &MethodResult) -> Vec<Shape> {
    let mut rows: Vec<(String, Vec<f64>)> = method
        .domains
        .iter()
        .map(|domain| (domain.name.clone(), domain.active_experts_per_layer.clone()))
        .filter(|(_, layers)| !layers.is_empty())
        .collect();
    if let Some((_, first)) = rows.first() {
        let all = (0..first.len())
            .map(|at| method.domains.iter().map(|d| d.share * d.active_experts_per_layer[at]).sum())
            .collect();
        rows.push(("all".to_owned(), all));
    }
    let shape = |(domain, layers): (String, Vec<f64>)| {
        let found = w_shape(&layers);
        let is_w =
            (layers.len() >= LAYERS).then(|| found.is_some_and(|(r, p)| r >= W_LIKE && p < SIGNIFICANT));
        Shape {
            method: method.name.clone(),
            domain,
            active_experts_per_layer: layers,
            correlation: found.map(|(r, _)| r),
            p: found.map(|(_, p)| p),
            is_w,
        }
    };
    rows.into_iter().map(shape).collect()
}
