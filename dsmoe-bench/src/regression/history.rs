//! `dsmoe bench history`: writes the trend of every benchmark over records as an HTML file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::export::{amount, origin};
use super::file::{Benchmark, Record};
use super::statistics::MedianEstimate;
use crate::cli::bench::History;
use crate::files::{check_file, write};
use crate::machine::Machine;
use crate::report::html::page;
use crate::report::{Block, Chapter, Figure, Look, Plot, Point, Report, Series};
use crate::ui::Ui;

/// The smallest range of a chart in percent, so that noise does not look like a change.
const LEAST: f64 = 5.0;

pub(crate) fn run(args: &History, ui: &mut Ui) -> Result<()> {
    check_file(&args.out, args.force)?;
    let (mut records, mut others) = (Vec::new(), Vec::new());
    for Found { path, named } in files(&args.records)? {
        let record = if named { Record::read(&path) } else { Record::read_inside(&path) };
        match record {
            Ok(record) => records.push(record),
            Err(error) if named => return Err(error),
            Err(_) => others.push(path.display().to_string()),
        }
    }
    if records.is_empty() {
        bail!("none of the files is a record: {}; `dsmoe bench record` writes them", others.join(", "));
    }
    if !others.is_empty() {
        ui.note(format_args!("left out, since they are not records: {}", others.join(", ")));
    }
    // The sort is stable: records of one second stay in the order of their names.
    records.sort_by_key(|record| record.time);
    write(&args.out, page(&report(&records, &others)))?;
    let (out, records) = (args.out.display().to_string(), records.len());
    ui.result(&serde_json::json!({ "out": out, "records": records, "left_out": others }), |_| {
        format!("{out}: the trend over {records} records")
    })
}

/// A file that may be a record.
struct Found {
    path: PathBuf,
    /// Named itself, not by its folder.
    named: bool,
}

/// Returns the named files, and the .json files of the named folders in the order of their names.
fn files(paths: &[PathBuf]) -> Result<Vec<Found>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(Found { path: path.clone(), named: true });
            continue;
        }
        let mut found = Vec::new();
        for entry in std::fs::read_dir(path).with_context(|| path.display().to_string())? {
            let file = entry.with_context(|| path.display().to_string())?.path();
            if file.extension().is_some_and(|end| end == "json") {
                found.push(file);
            }
        }
        if found.is_empty() {
            bail!("{}: no .json file in it; give a folder of records", path.display());
        }
        found.sort();
        files.extend(found.into_iter().map(|path| Found { path, named: false }));
    }
    Ok(files)
}

/// Makes a report with a chapter for each suite and a chart for each benchmark.
fn report(records: &[Record], others: &[String]) -> Report {
    let mut suites: BTreeMap<&str, BTreeMap<&str, Vec<_>>> = BTreeMap::new();
    for record in records {
        for one in &record.benchmarks {
            let suite = one.name.split('/').next().unwrap_or_default();
            suites.entry(suite).or_default().entry(&one.name).or_default().push((record, one));
        }
    }
    let chapters = suites.into_iter().map(|(suite, trends)| {
        let blocks = trends.into_iter().map(|(name, found)| trend(name, &found).into()).collect();
        Chapter::new(&format!("suite-{suite}"), suite, blocks)
    });
    let mut chapters: Vec<Chapter> = chapters.collect();
    if !others.is_empty() {
        let text = format!("These files are not records and were left out: {}.", others.join(", "));
        chapters.push(Chapter::new("left-out", "Left out", vec![Block::Text(text)]));
    }
    Report {
        title: "dsmoe benchmarks".to_owned(),
        subtitle: format!(
            "{} records. A point is a median and its 99 % interval: of the ratio to the calibration kernel for times. Points \
             of other machines are not joined.{}",
            records.len(),
            match others.len() {
                0 => String::new(),
                1 => " One file is not a record and was left out; it is named at the end.".to_owned(),
                more =>
                    format!(" {more} files are not records and were left out; they are named at the end."),
            }
        ),
        accent: Vec::new(),
        chapters,
    }
}

/// Makes the chart of a benchmark that is in at least one record.
fn trend(name: &str, found: &[(&Record, &Benchmark)]) -> Figure {
    let compared = |one: &Benchmark| one.ratio.unwrap_or(one.value);
    let show = |one: &Benchmark| amount(one.value.median, one.kind, &one.unit);
    let (first, last) = (found[0].1, found[found.len() - 1].1);
    let percent = |value: f64| 100.0 * value / compared(first).median;
    let mut machines: Vec<(&Machine, Series)> = Vec::new();
    for (i, (record, one)) in found.iter().enumerate() {
        let MedianEstimate { median, low, high } = compared(one);
        let tip = format!("{}; {}", show(one), origin(record));
        let range = Some([low, high].map(percent));
        let point = Point { range, ..Point::new((i + 1) as f64, percent(median), tip) };
        let machine = &record.machine;
        match machines.iter_mut().find(|(other, _)| machine.same_hardware(other)) {
            Some((_, series)) => series.points.push(point),
            None => {
                let name = machine.cpu.as_deref().unwrap_or("unknown CPU");
                machines.push((machine, Series::new(name, Look::Line, [point])));
            }
        }
    }
    let note = format!(
        "{} now, {:+.1} % since the first record{}",
        show(last),
        percent(compared(last).median) - 100.0,
        if last.ratio.is_some() { ", by the ratio" } else { "" }
    );
    let series = machines.into_iter().map(|(_, series)| series).collect();
    let axes = ["record, oldest first", "% of the first record's"];
    let figure = Figure::new(name, name, axes, Vec::new()).note(note);
    Figure { plot: Plot::Axes { series, least: LEAST }, ..figure }
}

#[cfg(test)]
mod tests {
    use super::super::file::Kind;
    use super::*;

    #[test]
    fn the_page_has_every_benchmark_and_joins_one_machine() {
        let record = |cpu: &str, value: f64| {
            let mut record = Record::new(vec!["kernels".to_owned()], None);
            record.machine.cpu = Some(cpu.to_owned());
            record.benchmarks = vec![Benchmark::exact("kernels/a<b/c", Kind::Time, "s", value)];
            record
        };
        let page = page(&report(
            &[record("one", 1.0), record("two", 5.0), record("one", 1.1)],
            &["other.json".to_owned()],
        ));
        assert!(page.contains("kernels/a&lt;b/c") && !page.contains("a<b"));
        assert_eq!(page.matches("<circle").count(), 3);
        assert_eq!(page.matches("<polyline").count(), 1);
        assert!(page.contains("1.100 s now, +10.0 % since the first record"), "{page}");
        assert!(
            page.contains("not records and were left out: other.json")
                && page.contains("One file is not a record")
                && !page.contains("NaN")
        );
    }
}
