//! `dsmoe bench compare`: reports whether the second record or build is slower than the first.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::export::{amount, origin};
use super::file::{Benchmark, Kind, Record};
use super::record::in_process;
use super::statistics::{MedianEstimate, Verdict, judge, judge_pairs};
use crate::cli::bench::Compare;
use crate::format::Table;
use crate::ui::Ui;

/// The exit status of a comparison that found a regression.
const OUT_OF_TOLERANCE: u8 = 3;
/// The ratio of exchange times above which a warning is given.
const FURTHER: f64 = 1.5;

#[derive(Debug, Serialize)]
struct Comparison {
    before: String,
    after: String,
    fail_above: f64,
    /// The comparisons, the worst first.
    rows: Vec<Compared>,
    worse: usize,
    /// The number of regressions of the kinds in `--fail-on`.
    failed: usize,
    /// Benchmarks that only one side has.
    missing: Vec<String>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Compared {
    name: String,
    kind: Kind,
    /// The quantity compared: seconds, the ratio to the calibration kernel, the fastest sample of each round, or the
    /// number itself.
    compared: &'static str,
    /// The relative change of the compared quantity.
    change: f64,
    /// The ratio after / before, where both took turns.
    interval: Option<MedianEstimate>,
    verdict: Verdict,
    before: MedianEstimate,
    after: MedianEstimate,
    /// The measured values.
    value_before: f64,
    value_after: f64,
    unit: String,
}

pub(crate) fn run(args: &Compare, ui: &mut Ui) -> Result<ExitCode> {
    let report = match (&args.records[..], &args.run[..]) {
        ([before, after], _) => records(&Record::read(before)?, &Record::read(after)?, args)?,
        (_, [before, after]) => builds(before, after, args, ui)?,
        _ => bail!("give two records, or --run and two builds"),
    };
    for warning in &report.warnings {
        ui.note(format_args!("warning: {warning}"));
    }
    ui.result(&report, show)?;
    Ok(if report.failed > 0 { ExitCode::from(OUT_OF_TOLERANCE) } else { ExitCode::SUCCESS })
}

impl Compared {
    fn new(
        a: &Benchmark,
        b: &Benchmark,
        compared: &'static str,
        [before, after]: [MedianEstimate; 2],
        (change, verdict): (f64, Verdict),
    ) -> Compared {
        let (name, kind, unit) = (a.name.clone(), a.kind, a.unit.clone());
        let (value_before, value_after, interval) = (a.value.median, b.value.median, None);
        Compared {
            name,
            kind,
            compared,
            change,
            interval,
            verdict,
            before,
            after,
            value_before,
            value_after,
            unit,
        }
    }
}

impl Comparison {
    fn new(
        [before, after]: [String; 2],
        mut rows: Vec<Compared>,
        missing: Vec<String>,
        warnings: Vec<String>,
        args: &Compare,
    ) -> Comparison {
        let is_worse = |row: &Compared| row.verdict == Verdict::Worse;
        rows.sort_by(|a, b| {
            is_worse(b).cmp(&is_worse(a)).then(b.change.total_cmp(&a.change)).then(a.name.cmp(&b.name))
        });
        let worse = rows.iter().filter(|row| is_worse(row)).count();
        let failed = rows.iter().filter(|row| is_worse(row) && args.fail_on.contains(&row.kind)).count();
        Comparison { before, after, fail_above: args.fail_above, rows, worse, failed, missing, warnings }
    }
}

/// Refuses records of other benchmarks, and returns warnings about differences of machines and builds.
fn check(before: &Record, after: &Record) -> Result<Vec<String>> {
    if (&before.suites, &before.only) != (&after.suites, &after.only) {
        let name = |record: &Record| {
            let only = record.only.as_deref().map(|only| format!(" with {only:?}")).unwrap_or_default();
            format!("{}{only}", record.suites.join(","))
        };
        bail!(
            "the records are of other benchmarks, {} and {}; measure both with the same --suite and --only",
            name(before),
            name(after)
        );
    }
    let mut warnings = Vec::new();
    if !before.machine.same_hardware(&after.machine) {
        warnings.push("the machines differ: only ratios and instruction counts are compared".to_owned());
    }
    if before.machine.isa != after.machine.isa || before.machine.threads != after.machine.threads {
        warnings.push(format!(
            "{} on {} threads and {} on {}: this alone changes times",
            before.machine.isa, before.machine.threads, after.machine.isa, after.machine.threads
        ));
    }
    if !(before.build.optimized && after.build.optimized) {
        warnings.push("a build without optimisation: its times do not apply to release builds".to_owned());
    }
    Ok(warnings)
}

fn records(before: &Record, after: &Record, args: &Compare) -> Result<Comparison> {
    let mut warnings = check(before, after)?;
    let same_machine = before.machine.same_hardware(&after.machine);
    let same_bits = same_machine && before.machine.isa == after.machine.isa;
    let mut later: BTreeMap<&str, &Benchmark> =
        after.benchmarks.iter().map(|one| (one.name.as_str(), one)).collect();
    let (mut rows, mut missing) = (Vec::new(), Vec::new());
    for one in &before.benchmarks {
        match later.remove(one.name.as_str()) {
            Some(other) => rows.extend(row(one, other, args, same_machine, same_bits)),
            None => missing.push(one.name.clone()),
        }
    }
    missing.extend(later.into_keys().map(str::to_owned));
    if rows.len() + missing.len() < before.benchmarks.len() {
        warnings.push("times without a ratio, or a quality of other bits, were left out".to_owned());
    }
    warnings.extend(apart(before, after));
    if rows.is_empty() {
        bail!("the records have nothing that can be compared; measure both on one machine");
    }
    Ok(Comparison::new([origin(before), origin(after)], rows, missing, warnings, args))
}

/// Warns if the exchange of data between processors had another speed.
fn apart(before: &Record, after: &Record) -> Option<String> {
    let micros = |record: &Record| -> Option<f64> {
        let all = record.benchmarks.iter();
        let found: Vec<f64> =
            all.filter_map(|one| Some(1e6 * one.value.median / one.exchange_ratio?.median)).collect();
        (!found.is_empty()).then(|| MedianEstimate::of(&found).median)
    };
    let (a, b) = (micros(before)?, micros(after)?);
    (a.max(b) > FURTHER * a.min(b)).then(|| {
        format!(
            "the exchange of data between threads took {a:.0} µs before and {b:.0} µs after: the placement of the processors \
             differed, which changes the time of work that shares data; measure again, or use --run"
        )
    })
}

/// Compares two benchmarks; none where numbers of different machines cannot be compared.
fn row(
    a: &Benchmark,
    b: &Benchmark,
    args: &Compare,
    same_machine: bool,
    same_bits: bool,
) -> Option<Compared> {
    let (before, after, compared) = match (a.kind, a.ratio, b.ratio) {
        (Kind::Time, Some(before), Some(after)) => (before, after, "ratio"),
        (Kind::Time, ..) if same_machine => (a.value, b.value, "seconds"),
        (Kind::Instructions, ..) => (a.value, b.value, "instructions"),
        (Kind::Quality, ..) if same_bits => (a.value, b.value, "quality"),
        _ => return None,
    };
    let (change, verdict) = if a.kind == Kind::Quality {
        quality(before, after, args.quality_tolerance)
    } else {
        let (change, verdict) = judge(before, after, args.fail_above);
        // Other work on the machine, or processors that stand further apart, slow the arithmetic of the calibration by
        // another factor than what is measured, so a ratio may move alone. Slower code moves all there is.
        let agrees = |a, b| judge(a, b, 0.0).1 == verdict;
        let confirmed = compared != "ratio"
            || (!same_machine || agrees(a.value, b.value))
                && a.exchange_ratio.zip(b.exchange_ratio).is_none_or(|(a, b)| agrees(a, b));
        (change, if confirmed { verdict } else { Verdict::Same })
    };
    Some(Compared::new(a, b, compared, [before, after], (change, verdict)))
}

/// Compares a reproducible number: any change beyond the tolerance is reported as worse.
fn quality(before: MedianEstimate, after: MedianEstimate, tolerance: f64) -> (f64, Verdict) {
    let change = after.median / before.median - 1.0;
    (change, if change.abs() > tolerance { Verdict::Worse } else { Verdict::Same })
}

/// Runs two builds in turns, A B, B A, ..., and compares them round by round.
fn builds(before: &Path, after: &Path, args: &Compare, ui: &Ui) -> Result<Comparison> {
    // As programs in a folder, not of the search path.
    let program = |path: &Path| std::fs::canonicalize(path).with_context(|| path.display().to_string());
    let programs = [program(before)?, program(after)?];
    let mut pairs: Vec<[Record; 2]> = Vec::new();
    for round in 0..args.rounds {
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        let mut both = [None, None];
        for side in order {
            both[side] = Some(in_process(&programs[side], &args.choice, args.repeats)?);
        }
        let [Some(a), Some(b)] = both else { bail!("a build gave no record") };
        ui.note(format_args!("round {} of {}", round + 1, args.rounds));
        pairs.push([a, b]);
    }
    let [a, b] = &pairs[0];
    let mut warnings = check(a, b)?;
    let names = |record: &Record| record.benchmarks.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    let (first, second) = (names(a), names(b));
    let (common, mut missing): (Vec<String>, Vec<String>) =
        first.iter().cloned().partition(|name| second.contains(name));
    missing.extend(second.into_iter().filter(|name| !first.contains(name)));
    let row = |name: &String| paired(name, &pairs, args).with_context(|| name.clone());
    let rows = common.iter().map(row).collect::<Result<_>>()?;
    if pairs.iter().any(|[one, other]| (&one.build, &other.build) != (&a.build, &b.build)) {
        warnings.push("a build changed while it was measured".to_owned());
    }
    let name = |path: &Path, record: &Record| format!("{}: {}", path.display(), origin(record));
    Ok(Comparison::new([name(before, a), name(after, b)], rows, missing, warnings, args))
}

fn paired<'a>(name: &str, pairs: &'a [[Record; 2]], args: &Compare) -> Result<Compared> {
    let find = |record: &'a Record| record.benchmarks.iter().find(|one| one.name == name);
    let one = find(&pairs[0][0]).context("is not in every record")?;
    // Other work only ever adds time, and both builds see the same moments: the fastest sample is the least disturbed.
    let fastest = |side: usize| -> Result<Vec<f64>> {
        let samples = pairs.iter().map(|pair| Some(&find(&pair[side])?.samples));
        let fastest = samples.map(|samples| Some(samples?.iter().copied().fold(f64::INFINITY, f64::min)));
        fastest.collect::<Option<_>>().context("is not in every record")
    };
    let (a, b) = (fastest(0)?, fastest(1)?);
    let (before, after) = (MedianEstimate::of(&a), MedianEstimate::of(&b));
    let ratios: Vec<f64> = a.iter().zip(&b).map(|(a, b)| b / a).collect();
    let kind = one.kind;
    let (change, interval, verdict) = if kind == Kind::Quality {
        let (change, verdict) = quality(before, after, args.quality_tolerance);
        (change, None, verdict)
    } else {
        let (ratio, verdict) = judge_pairs(&ratios, args.fail_above);
        (ratio.median - 1.0, Some(ratio), verdict)
    };
    let compared = match kind {
        Kind::Time => "fastest",
        Kind::Instructions => "instructions",
        Kind::Quality => "quality",
    };
    let [a, b] = [before, after].map(|value| Benchmark { value, ..one.clone() });
    Ok(Compared { interval, ..Compared::new(&a, &b, compared, [before, after], (change, verdict)) })
}

fn show(report: &Comparison) -> String {
    let mut table =
        Table::new(["benchmark", "change", "99 % interval", "verdict", "compared", "before", "after"]);
    let percent = |change: f64| format!("{:+.1} %", 100.0 * change);
    for row in &report.rows {
        let interval = match row.interval {
            Some(ratio) => format!("{} to {}", percent(ratio.low - 1.0), percent(ratio.high - 1.0)),
            None if row.before.high < row.after.low || row.after.high < row.before.low => {
                "disjoint".to_owned()
            }
            None => "overlapping".to_owned(),
        };
        let verdict = match row.verdict {
            Verdict::Worse if row.kind == Kind::Quality => "CHANGED",
            Verdict::Worse => "WORSE",
            Verdict::Better => "better",
            Verdict::Same => "same",
        };
        let show = |value| amount(value, row.kind, &row.unit);
        table.row([
            row.name.clone(),
            percent(row.change),
            if row.kind == Kind::Quality { "-".to_owned() } else { interval },
            verdict.to_owned(),
            row.compared.to_owned(),
            show(row.value_before),
            show(row.value_after),
        ]);
    }
    let mut out = format!("{}\nbefore  {}\nafter   {}\n", table.show(), report.before, report.after);
    if !report.missing.is_empty() {
        out += &format!("in one record alone: {}\n", report.missing.join(", "));
    }
    let Comparison { worse, failed, .. } = report;
    let to_fail = if failed == worse { String::new() } else { format!(", {failed} to fail") };
    let (all, limit) = (report.rows.len(), 100.0 * report.fail_above);
    out + &format!("{worse} of {all} are worse by more than {limit:.1} %{to_fail}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Compare {
        use clap::{Args, FromArgMatches};
        let words =
            Compare::augment_args(clap::Command::new("compare")).get_matches_from(["compare", "a", "b"]);
        Compare::from_arg_matches(&words).unwrap()
    }

    fn record(ratio: f64, seconds: f64, instructions: f64, perplexity: f64) -> Record {
        let around = |median: f64| MedianEstimate { median, low: 0.99 * median, high: 1.01 * median };
        let mut record = Record::new(vec!["kernels".to_owned()], None);
        let mut time = Benchmark::exact("kernels/a/b", Kind::Time, "s", seconds);
        time.ratio = Some(around(ratio));
        record.benchmarks = vec![
            time,
            Benchmark::exact("kernels/a/b (avx2)", Kind::Instructions, "instructions", instructions),
            Benchmark::exact("quality/dense/perplexity", Kind::Quality, "perplexity", perplexity),
        ];
        record
    }

    #[test]
    fn each_kind_is_judged_by_its_own_number() {
        use Verdict::{Better, Same, Worse};
        let before = record(1.0, 1.0, 1000.0, 20.0);
        let next = f64::from_bits(20f64.to_bits() + 16);
        for (after, expected, what) in [
            ([1.0, 1.0, 1000.0, 20.0], [Same; 3], "equal"),
            ([1.0, 2.0, 1000.0, 20.0], [Same; 3], "a slow moment of the machine"),
            ([1.1, 1.1, 1000.0, 20.0], [Worse, Same, Same], "slower"),
            ([1.1, 1.0, 1000.0, 20.0], [Same; 3], "the calibration alone"),
            ([0.9, 0.9, 1040.0, 20.0], [Better, Worse, Same], "faster by more instructions"),
            ([1.0, 1.0, 1020.0, next], [Same, Same, Worse], "any bit"),
        ] {
            let [ratio, seconds, instructions, perplexity] = after;
            let report =
                records(&before, &record(ratio, seconds, instructions, perplexity), &args()).unwrap();
            // The worst come first.
            let of = |kind| report.rows.iter().find(|row| row.kind == kind).unwrap().verdict;
            assert_eq!([Kind::Time, Kind::Instructions, Kind::Quality].map(of), expected, "{what}");
        }
    }

    #[test]
    fn processors_that_stand_further_apart_are_no_slower_code() {
        use Verdict::{Same, Worse};
        let exchange = |record: &Record, ratio: f64| {
            let mut record = record.clone();
            record.benchmarks[0].exchange_ratio =
                Some(MedianEstimate { median: ratio, low: 0.99 * ratio, high: 1.01 * ratio });
            record
        };
        let (before, slower) = (record(1.0, 1.0, 1000.0, 20.0), record(1.4, 1.4, 1000.0, 20.0));
        // 3 times as long to hand data over, and so 1.4 times as long for what does; or the processors as before.
        for (ratio, verdict, is_apart) in [(1.4 / 3.0, Same, true), (1.4, Worse, false)] {
            let report = records(&exchange(&before, 1.0), &exchange(&slower, ratio), &args()).unwrap();
            let row = report.rows.iter().find(|row| row.kind == Kind::Time).unwrap();
            let warned =
                report.warnings.iter().any(|warning| warning.contains("placement of the processors"));
            assert_eq!((row.verdict, warned), (verdict, is_apart), "{ratio}");
        }
    }

    #[test]
    fn other_machines_and_other_suites_are_not_mixed_up() {
        let before = record(1.0, 1.0, 1000.0, 20.0);
        let mut after = before.clone();
        after.machine.cpu = Some("another".to_owned());
        after.benchmarks[0].ratio = None;
        let report = records(&before, &after, &args()).unwrap();
        assert_eq!(report.rows.len(), 1, "instructions alone");
        assert!(report.warnings.iter().any(|warning| warning.contains("machines differ")));
        after.suites = vec!["ffn".to_owned()];
        assert!(records(&before, &after, &args()).unwrap_err().to_string().contains("kernels and ffn"));
    }
}
