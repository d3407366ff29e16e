//! From runs to results.json: means, intervals, tests, and every table and figure beside the paper's. A function of the
//! files in `setup.json` and `runs/` alone, so that it gives the same bytes however the work was done.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use dsmoe_core::accounting::Accounting;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cache::read_json;
use super::measure::Difficulty;
use super::outputs::Output;
use super::paper;
use super::profile::{MethodSpec, PaperModel, PaperRow, Profile, Role};
use super::records::{BASE, Machine, RUNS, Run, SETUP, TIMINGS, Timing};
use super::stages::Base;
use super::statistics::{bootstrap, estimate, mean, middle, paired_t, sign_p, w_shape};
use super::text::Text;

const FORMAT_VERSION: u32 = 1;
/// Below it a difference counts as found.
const SIGNIFICANT: f64 = 0.05;
/// Layers from which a W can be told from chance.
const LAYERS: usize = 6;
/// A correlation with the wave from which a list over layers counts as a W.
const W_LIKE: f64 = 0.5;

/// What a reproduction set out to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) format_version: u32,
    pub(crate) program: String,
    /// Of the sources that the program was built of; `unknown` outside a repository.
    pub(crate) git_revision: String,
    pub(crate) profile: Profile,
    pub(crate) outputs: Vec<String>,
    /// Files of `runs/` in the end, in the order of the tables.
    pub(crate) runs: Vec<String>,
    /// Hashes of text, tokenizer and model.
    pub(crate) inputs: Value,
    pub(crate) tokens_per_source: u64,
    /// Everybody's activated parameters.
    pub(crate) budget: f64,
    pub(crate) dense_params: u64,
    pub(crate) num_layers: usize,
}

pub(crate) fn setup(
    profile: &Profile,
    outputs: &[Output],
    runs: Vec<String>,
    text: &Text,
    base: &Base,
    budget: f64,
) -> Result<Setup> {
    let mut inputs = text.inputs.clone();
    inputs["dense_model"] = json!({ "key": base.key, "sha256": base.sha256 });
    Ok(Setup {
        format_version: FORMAT_VERSION,
        program: concat!("dsmoe ", env!("CARGO_PKG_VERSION")).to_owned(),
        git_revision: env!("DSMOE_REVISION").to_owned(),
        profile: profile.clone(),
        outputs: outputs.iter().map(|output| output.name().to_owned()).collect(),
        runs,
        inputs,
        tokens_per_source: text.held_out.first().map_or(0, |part| part.ids.len() as u64),
        budget,
        dense_params: Accounting::of(&base.config).total,
        num_layers: base.config.num_layers,
    })
}

/// All files of a reproduction.
pub(crate) struct Collected {
    pub(crate) setup: Setup,
    pub(crate) base: Run,
    /// In the order of the setup.
    pub(crate) runs: Vec<Run>,
    pub(crate) timings: BTreeMap<String, Timing>,
}

impl Collected {
    /// Reads the files of one reproduction, or of its parts.
    pub(crate) fn read(dirs: &[PathBuf]) -> Result<Collected> {
        let setup: Setup = read_json(&dirs[0].join(SETUP))?;
        for dir in &dirs[1..] {
            let other: Setup = read_json(&dir.join(SETUP))?;
            if other != setup {
                bail!(
                    "{} and {} are not of one reproduction: their {SETUP} differ",
                    dirs[0].display(),
                    dir.display()
                );
            }
        }
        let find = |id: &str| -> Result<Option<Run>> {
            let mut found: Option<(Run, &PathBuf)> = None;
            for dir in dirs {
                let path = dir.join(RUNS).join(format!("{id}.json"));
                if !path.is_file() {
                    continue;
                }
                let run: Run = read_json(&path)?;
                match &found {
                    Some((other, _)) if *other == run => {}
                    // The same stage on two kinds of machines differs in last bits.
                    Some((other, place)) if other.key != run.key => {
                        bail!("{id}: {} and {} have it from other settings", place.display(), dir.display())
                    }
                    Some(_) => {}
                    None => found = Some((run, dir)),
                }
            }
            Ok(found.map(|(run, _)| run))
        };
        let Some(base) = find(BASE)? else {
            bail!("{}: {RUNS}/{BASE}.json is missing; run the reproduction to its end", dirs[0].display());
        };
        let (mut runs, mut missing) = (Vec::new(), Vec::new());
        for id in &setup.runs {
            match find(id)? {
                Some(run) => runs.push(run),
                None => missing.push(id.as_str()),
            }
        }
        if !missing.is_empty() {
            bail!("not all parts are there: {} missing ({})", missing.len(), missing.join(", "));
        }
        let mut timings = BTreeMap::new();
        for id in setup.runs.iter().map(String::as_str).chain([BASE]) {
            for dir in dirs {
                let path = dir.join(TIMINGS).join(format!("{id}.json"));
                if path.is_file() {
                    timings.entry(id.to_owned()).or_insert(read_json(&path)?);
                }
            }
        }
        Ok(Collected { setup, base, runs, timings })
    }
}

/// A mean over seeds, with where its interval comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Measured {
    pub(crate) mean: f64,
    pub(crate) deviation: Option<f64>,
    /// 95 %.
    pub(crate) interval: Option<[f64; 2]>,
    /// `seeds`, or with one seed `windows` or `items`.
    pub(crate) over: Option<&'static str>,
    pub(crate) values: Vec<f64>,
}

impl Measured {
    fn of_seeds(values: Vec<f64>) -> Measured {
        let found = estimate(&values);
        let over = found.interval.map(|_| "seeds");
        Measured { mean: found.mean, deviation: found.deviation, interval: found.interval, over, values }
    }

    /// The interval is that of the losses, so no end of it is below 1.
    fn of_perplexities(values: Vec<f64>) -> Measured {
        let losses: Vec<f64> = values.iter().map(|ppl| ppl.ln()).collect();
        let interval = estimate(&losses).interval.map(|interval| interval.map(f64::exp));
        Measured { interval, ..Measured::of_seeds(values) }
    }

    fn or_interval(mut self, over: &'static str, interval: impl FnOnce() -> Option<[f64; 2]>) -> Measured {
        if self.interval.is_none() {
            self.interval = interval();
            self.over = self.interval.map(|_| over);
        }
        self
    }
}

/// One row of the comparison, over its seeds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct MethodResult {
    pub(crate) name: String,
    pub(crate) role: Option<Role>,
    pub(crate) paper: Option<PaperRow>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) reached_by: Option<String>,
    pub(crate) calibration_tokens: usize,
    pub(crate) tokens: u64,
    pub(crate) params_total: f64,
    pub(crate) params_activated: Measured,
    /// Over the budget.
    pub(crate) of_budget: f64,
    pub(crate) flops_per_token: f64,
    pub(crate) active_ratio: Option<f64>,
    pub(crate) threshold: Option<f64>,
    pub(crate) ppl: Measured,
    pub(crate) nll: Measured,
    pub(crate) domains: Vec<DomainMean>,
    pub(crate) tasks: Vec<TaskMean>,
    /// Mean over tasks, percent.
    pub(crate) tasks_mean: Option<f64>,
    pub(crate) milestones: Vec<MilestoneMean>,
    pub(crate) sweep: Vec<SweepMean>,
    pub(crate) difficulty: Option<Difficulty>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct DomainMean {
    pub(crate) name: String,
    pub(crate) share: f64,
    pub(crate) ppl: f64,
    pub(crate) active_ratio: Option<f64>,
    /// Active experts of every layer.
    pub(crate) active_experts_per_layer: Vec<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TaskMean {
    pub(crate) task: String,
    pub(crate) metric: String,
    pub(crate) shots: usize,
    pub(crate) items: usize,
    /// Percent right.
    pub(crate) percent: Measured,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct MilestoneMean {
    pub(crate) share: f64,
    pub(crate) tokens: u64,
    pub(crate) ppl: Measured,
    pub(crate) active_ratio: Option<f64>,
    pub(crate) params_activated: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct SweepMean {
    pub(crate) threshold: f64,
    pub(crate) ppl: Measured,
    pub(crate) active_ratio: f64,
    pub(crate) params_activated: f64,
}

/// DSMoE against another method on the same held-out text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Comparison {
    pub(crate) dsmoe: String,
    pub(crate) other: String,
    /// Mean of the other's loss minus DSMoE's, nats per token: above 0 DSMoE is better.
    pub(crate) difference: f64,
    pub(crate) interval: Option<[f64; 2]>,
    pub(crate) p: Option<f64>,
    pub(crate) test: &'static str,
    pub(crate) seeds: usize,
    /// `better`, `worse` or `not told apart`, of DSMoE.
    pub(crate) verdict: &'static str,
}

/// A statement of the paper beside what was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Direction {
    pub(crate) output: &'static str,
    pub(crate) method: String,
    pub(crate) statement: String,
    pub(crate) agrees: Option<bool>,
}

/// How much a row of layers is like a W.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Shape {
    pub(crate) method: String,
    pub(crate) domain: String,
    pub(crate) active_experts_per_layer: Vec<f64>,
    /// With a wave that is high at both ends and in the middle.
    pub(crate) correlation: Option<f64>,
    /// Share of all orders of these layers that are as much like it.
    pub(crate) p: Option<f64>,
    pub(crate) is_w: Option<bool>,
}

/// Everything that results.json holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Results {
    pub(crate) format_version: u32,
    pub(crate) setup: Setup,
    pub(crate) machines: Vec<Machine>,
    pub(crate) seeds: Vec<u64>,
    /// The dense model before continued training, then all methods.
    pub(crate) methods: Vec<MethodResult>,
    pub(crate) comparisons: Vec<Comparison>,
    pub(crate) shapes: Vec<Shape>,
    pub(crate) directions: Vec<Direction>,
}

pub(crate) fn of(collected: &Collected) -> Result<Results> {
    let setup = &collected.setup;
    let profile = &setup.profile;
    let mut machines: Vec<Machine> =
        collected.runs.iter().chain([&collected.base]).map(|run| run.machine.clone()).collect();
    machines.sort();
    machines.dedup();

    let mut groups: Vec<(Option<&MethodSpec>, Vec<&Run>)> = vec![(None, vec![&collected.base])];
    for spec in &profile.method {
        let runs: Vec<&Run> = collected.runs.iter().filter(|run| run.method == spec.name).collect();
        if !runs.is_empty() {
            groups.push((Some(spec), runs));
        }
    }
    let methods: Vec<MethodResult> =
        groups.iter().map(|(spec, runs)| method_result(setup, *spec, runs)).collect();
    let mut comparisons = Vec::new();
    for (spec, of_dsmoe) in &groups {
        let Some(spec) = spec.filter(|spec| matches!(spec.role, Role::Dsmoe | Role::Paper)) else { continue };
        for (other, of_other) in groups.iter().filter(|(other, _)| other.is_none_or(|o| o.name != spec.name))
        {
            let name = other.map_or(BASE, |other| other.name.as_str());
            comparisons.push(compare(profile, (&spec.name, of_dsmoe), (name, of_other)));
        }
    }
    let shapes: Vec<Shape> = methods.iter().filter(|m| is_gated(m)).flat_map(shapes).collect();
    let directions = directions(profile, &methods, &shapes);
    let mut seeds: Vec<u64> = collected.runs.iter().map(|run| run.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    Ok(Results {
        format_version: FORMAT_VERSION,
        setup: setup.clone(),
        machines,
        seeds,
        methods,
        comparisons,
        shapes,
        directions,
    })
}

fn is_gated(method: &MethodResult) -> bool {
    matches!(method.role, Some(Role::Dsmoe | Role::Paper))
}

fn method_result(setup: &Setup, spec: Option<&MethodSpec>, runs: &[&Run]) -> MethodResult {
    let profile = &setup.profile;
    let first = runs[0];
    let of = |value: &dyn Fn(&Run) -> f64| runs.iter().map(|run| value(run)).collect::<Vec<f64>>();
    let of_some = |value: &dyn Fn(&Run) -> Option<f64>| -> Option<f64> {
        runs.iter().map(|run| value(run)).collect::<Option<Vec<f64>>>().map(|values| mean(&values))
    };
    let windows = || Some(middle(&bootstrap(&windows_of(first), profile.measure.resamples)));
    let params_activated = Measured::of_seeds(of(&|run| run.text.params_activated));
    let domains = first.text.domains.iter().enumerate().map(|(at, domain)| DomainMean {
        name: domain.name.clone(),
        share: domain.share,
        ppl: mean(&of(&|run| run.text.domains[at].ppl)),
        active_ratio: of_some(&|run| run.text.domains[at].active_ratio),
        active_experts_per_layer: (0..domain.active_ratio_per_layer.as_ref().map_or(0, Vec::len))
            .map(|layer| {
                let share =
                    |run: &Run| run.text.domains[at].active_ratio_per_layer.as_ref().map(|all| all[layer]);
                profile.experts as f64 * of_some(&share).unwrap_or(0.0)
            })
            .collect(),
    });
    let tasks: Vec<TaskMean> = first
        .tasks
        .iter()
        .flatten()
        .enumerate()
        .map(|(at, task)| {
            let value = |run: &Run| 100.0 * run.tasks.as_ref().map_or(0.0, |tasks| tasks[at].value);
            let items =
                || task.stderr.map(|e| [task.value - 1.96 * e, task.value + 1.96 * e].map(|x| 100.0 * x));
            TaskMean {
                task: task.task.clone(),
                metric: task.metric.clone(),
                shots: task.shots,
                items: task.items,
                percent: Measured::of_seeds(of(&value)).or_interval("items", items),
            }
        })
        .collect();
    let milestones =
        first.trained.iter().flat_map(|trained| &trained.milestones).enumerate().map(|(at, stone)| {
            let all: Vec<_> = runs
                .iter()
                .filter_map(|run| run.trained.as_ref())
                .map(|trained| &trained.milestones[at])
                .collect();
            let active: Option<Vec<f64>> = all.iter().map(|stone| stone.active_ratio).collect();
            MilestoneMean {
                share: stone.share,
                tokens: stone.tokens,
                ppl: Measured::of_perplexities(all.iter().map(|stone| stone.ppl).collect()),
                active_ratio: active.map(|values| mean(&values)),
                params_activated: mean(&all.iter().map(|stone| stone.params_activated).collect::<Vec<_>>()),
            }
        });
    let sweep = first.sweep.iter().flatten().enumerate().map(|(at, point)| {
        let all: Vec<_> = runs.iter().filter_map(|run| run.sweep.as_ref()).map(|sweep| &sweep[at]).collect();
        SweepMean {
            threshold: point.threshold,
            ppl: Measured::of_perplexities(all.iter().map(|point| point.ppl).collect()),
            active_ratio: mean(&all.iter().map(|point| point.active_ratio).collect::<Vec<_>>()),
            params_activated: mean(&all.iter().map(|point| point.params_activated).collect::<Vec<_>>()),
        }
    });
    MethodResult {
        name: spec.map_or(BASE, |spec| spec.name.as_str()).to_owned(),
        role: spec.map(|spec| spec.role),
        paper: spec.and_then(|spec| spec.paper),
        seeds: runs.iter().map(|run| run.seed).collect(),
        reached_by: first.made.as_ref().map(|made| made.reached_by.clone()),
        calibration_tokens: first.made.as_ref().map_or(0, |made| made.calibration_tokens),
        tokens: first.trained.as_ref().map_or(0, |trained| trained.tokens),
        params_total: mean(&of(&|run| run.text.params_total as f64)),
        of_budget: params_activated.mean / setup.budget,
        params_activated,
        flops_per_token: mean(&of(&|run| run.text.flops_per_token)),
        active_ratio: of_some(&|run| run.text.active_ratio),
        threshold: of_some(&|run| run.text.threshold.map(f64::from)),
        ppl: Measured::of_perplexities(of(&|run| run.text.ppl))
            .or_interval("windows", || windows().map(|interval| interval.map(f64::exp))),
        nll: Measured::of_seeds(of(&|run| run.text.nll)).or_interval("windows", windows),
        domains: domains.collect(),
        tasks_mean: (!tasks.is_empty())
            .then(|| mean(&tasks.iter().map(|task| task.percent.mean).collect::<Vec<_>>())),
        tasks,
        milestones: milestones.collect(),
        sweep: sweep.collect(),
        difficulty: mean_difficulty(runs),
    }
}

/// Windows of every source: sums of losses and predicted tokens.
fn windows_of(run: &Run) -> Vec<(f64, Vec<(f64, f64)>)> {
    let stratum = |domain: &super::measure::DomainResult| {
        (domain.share, domain.windows.iter().map(|&(sum, count)| (sum, count as f64)).collect())
    };
    run.text.domains.iter().map(stratum).collect()
}

fn mean_difficulty(runs: &[&Run]) -> Option<Difficulty> {
    let all: Vec<&Difficulty> = runs.iter().map(|run| run.difficulty.as_ref()).collect::<Option<_>>()?;
    let mut result = all[0].clone();
    for (at, bin) in result.bins.iter_mut().enumerate() {
        let of = |value: &dyn Fn(&super::measure::Bin) -> f64| {
            mean(&all.iter().map(|one| value(&one.bins[at])).collect::<Vec<_>>())
        };
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
    // The dense model before training is one for all seeds.
    let of_seed = |runs: &[&'_ Run], seed: u64| -> Option<Run> {
        let found =
            runs.iter().find(|run| run.seed == seed).or(runs.first().filter(|run| run.role.is_none()));
        found.map(|run| (*run).clone())
    };
    let pairs: Vec<(Run, Run)> =
        dsmoe.1.iter().filter_map(|run| Some(((*run).clone(), of_seed(other.1, run.seed)?))).collect();
    let differences: Vec<f64> = pairs.iter().map(|(ours, theirs)| theirs.text.nll - ours.text.nll).collect();
    let (difference, interval, p, test) = if differences.len() > 1 {
        let found = estimate(&differences);
        (found.mean, found.interval, paired_t(&differences), "paired t over seeds")
    } else if let Some((ours, theirs)) = pairs.first() {
        let strata: Vec<_> = windows_of(ours)
            .into_iter()
            .zip(windows_of(theirs))
            .map(|((share, ours), (_, theirs))| {
                (share, ours.iter().zip(&theirs).map(|(a, b)| (b.0 - a.0, a.1)).collect::<Vec<_>>())
            })
            .collect();
        let found = bootstrap(&strata, profile.measure.resamples);
        (differences[0], Some(middle(&found)), Some(sign_p(&found)), "bootstrap over held-out windows")
    } else {
        (0.0, None, None, "no common seed")
    };
    let verdict = match p {
        Some(p) if p < SIGNIFICANT && difference > 0.0 => "better",
        Some(p) if p < SIGNIFICANT => "worse",
        _ => "not told apart",
    };
    Comparison {
        dsmoe: dsmoe.0.to_owned(),
        other: other.0.to_owned(),
        difference,
        interval,
        p,
        test,
        seeds: differences.len(),
        verdict,
    }
}

/// The W test of every source, and of all together.
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
        // Of five layers a tenth of all orders are a perfect W: too few to tell it from chance.
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

/// What the paper's tables say, and whether ours say it too.
fn directions(profile: &Profile, methods: &[MethodResult], shapes: &[Shape]) -> Vec<Direction> {
    let mut all = Vec::new();
    let model = profile.paper;
    let table1 = paper::table1(model);
    let paper_ppl = |row| table1.iter().find(|one| one.row == row).map(|one| one.ppl);
    let paper_tasks = |row| paper::table2(model).iter().find(|one| one.0 == row).map(|one| one.1);
    let by_role = |role: Role| methods.iter().find(|method| method.role == Some(role));
    for dsmoe in methods.iter().filter(|method| is_gated(method)) {
        let mut say = |output, statement: String, agrees| {
            all.push(Direction { output, method: dsmoe.name.clone(), statement, agrees });
        };
        for other in methods {
            let Some(row) = other.paper.filter(|row| *row != PaperRow::Dsmoe) else { continue };
            if let (Some(theirs), Some(ours)) = (paper_ppl(row), paper_ppl(PaperRow::Dsmoe)) {
                let word = if ours < theirs { "lower" } else { "higher" };
                let agrees = (dsmoe.ppl.mean < other.ppl.mean) == (ours < theirs);
                say("table1", format!("perplexity {word} than {}", row.label()), Some(agrees));
            }
            if let (Some(theirs), Some(ours)) = (paper_tasks(row), paper_tasks(PaperRow::Dsmoe)) {
                for (at, (task, label)) in paper::TASKS.iter().enumerate() {
                    let find = |method: &MethodResult| {
                        method.tasks.iter().find(|one| one.task == *task).map(|one| one.percent.mean)
                    };
                    let word = if ours[at] > theirs[at] { "more" } else { "less" };
                    // Equal scores say nothing.
                    let pair = find(dsmoe).zip(find(other)).filter(|(a, b)| a != b);
                    let agrees = pair.map(|(a, b)| (a > b) == (ours[at] > theirs[at]));
                    say("table2", format!("{label}: {word} right than {}", row.label()), agrees);
                }
            }
        }
        for (row, next) in paper::table4(model).iter().zip(&paper::table4(model)[1..]) {
            let find = |t: f64| dsmoe.sweep.iter().find(|point| (point.threshold - t).abs() < 1e-9);
            let agrees = find(row.threshold)
                .zip(find(next.threshold))
                .map(|(a, b)| a.ppl.mean < b.ppl.mean && a.params_activated >= b.params_activated);
            let statement = format!(
                "threshold {} to {}: perplexity up, activated parameters down",
                row.threshold, next.threshold
            );
            say("table4", statement, agrees);
        }
        let (output, curve) = match model {
            PaperModel::One => ("table5", &paper::TABLE5),
            PaperModel::Seven => ("table6", &paper::TABLE6),
        };
        for (one, next) in curve.iter().zip(&curve[1..]) {
            let find = |tokens: f64| {
                dsmoe
                    .milestones
                    .iter()
                    .find(|stone| (stone.share - tokens / 10.0).abs() < 1e-9)
                    .map(|s| s.ppl.mean)
            };
            let word = if next.1 < one.1 { "falls" } else { "rises" };
            let agrees = find(one.0).zip(find(next.0)).map(|(a, b)| (b < a) == (next.1 < one.1));
            let statement = format!(
                "from {:.0} % to {:.0} % of the tokens perplexity {word}",
                10.0 * one.0,
                10.0 * next.0
            );
            say(output, statement, agrees);
        }
        let shape = shapes.iter().find(|shape| shape.method == dsmoe.name && shape.domain == "all");
        say("figure3", "active experts over layers form a W".to_owned(), shape.and_then(|shape| shape.is_w));
    }
    if let (Some(with), Some(without)) = (by_role(Role::Paper), by_role(Role::WithoutSte)) {
        let mut say = |statement: String, agrees| {
            all.push(Direction { output: "table3", method: without.name.clone(), statement, agrees });
        };
        say(
            "perplexity higher without the straight-through rule".to_owned(),
            Some(without.ppl.mean > with.ppl.mean),
        );
        for (task, label) in paper::TASKS {
            let find = |method: &MethodResult| {
                method.tasks.iter().find(|one| one.task == task).map(|one| one.percent.mean)
            };
            let agrees = find(with).zip(find(without)).filter(|(a, b)| a != b).map(|(a, b)| b < a);
            say(format!("{label}: less right without it"), agrees);
        }
    }
    if let (Some(with), Some(without)) = (by_role(Role::Paper), by_role(Role::WithoutThreshold)) {
        all.push(Direction {
            output: "figure2",
            method: without.name.clone(),
            statement: "perplexity higher at equal activation when trained without a threshold".to_owned(),
            agrees: Some(without.ppl.mean > with.ppl.mean),
        });
    }
    all
}
