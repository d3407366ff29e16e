//! `dsmoe bench history`: the trend of every benchmark over records, as one HTML file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::super::args::History;
use super::export::{amount, origin};
use super::format::{Kind, Record};
use super::stats::Estimate;
use crate::ui::Ui;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 160.0;
const MARGIN: f64 = 12.0;

const HEAD: &str = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>dsmoe benchmarks</title>\n\
<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><style>\n\
:root{color-scheme:light dark;--ink:#1f2328;--paper:#fff;--line:#0969da;--soft:#d0d7de}\n\
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#58a6ff;--soft:#30363d}}\n\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:44rem;margin:0 auto;\
padding:1rem}\n\
svg{width:100%;height:auto;border:1px solid var(--soft)}polyline{fill:none;stroke:var(--line);stroke-width:2}\n\
circle{fill:var(--line)}.range{stroke:var(--line);stroke-width:1.5;opacity:.5}h2{font-size:1rem;margin:1.5rem 0 .2rem}\n\
p{margin:.2rem 0;overflow-wrap:anywhere}\n\
</style></head><body>\n";

/// One record's number of a benchmark.
struct Point<'a> {
    record: &'a Record,
    kind: Kind,
    unit: &'a str,
    /// What comparisons look at.
    compared: Estimate,
    /// As measured.
    value: f64,
    calibrated: bool,
}

pub(crate) fn run(args: &History, ui: &mut Ui) -> Result<()> {
    let mut records = Vec::new();
    for path in files(&args.records)? {
        records.push(Record::read(&path)?);
    }
    // Of one second as they were named.
    records.sort_by_key(|record| record.time);
    let page = page(&records);
    std::fs::write(&args.out, page).with_context(|| args.out.display().to_string())?;
    let done = serde_json::json!({ "out": args.out, "records": records.len() });
    ui.result(&done, |_| format!("{}: the trend over {} records", args.out.display(), records.len()))
}

/// The files named, and those that end in .json of the folders named, by name.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
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
        files.extend(found);
    }
    Ok(files)
}

fn page(records: &[Record]) -> String {
    let mut trends: BTreeMap<&str, Vec<Point<'_>>> = BTreeMap::new();
    for record in records {
        for one in &record.benchmarks {
            trends.entry(&one.name).or_default().push(Point {
                record,
                kind: one.kind,
                unit: &one.unit,
                compared: one.ratio.unwrap_or(one.value),
                value: one.value.median,
                calibrated: one.ratio.is_some(),
            });
        }
    }
    let mut out = HEAD.to_owned();
    let _ = writeln!(
        out,
        "<h1>Benchmarks</h1>\n<p>{} records, oldest to the left. A point is a median and its 99 % interval: of the ratio \
         to the calibration kernel for times. Points of other machines are not joined.</p>",
        records.len()
    );
    for (name, points) in &trends {
        trend(&mut out, name, points);
    }
    out + "</body></html>\n"
}

fn trend(out: &mut String, name: &str, points: &[Point<'_>]) {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return };
    let low = points.iter().map(|point| point.compared.low).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|point| point.compared.high).fold(0.0, f64::max);
    // At least a twentieth of the number fills the height, so that noise does not look like a cliff.
    let middle = f64::midpoint(low, high);
    let half = ((high - low) / 2.0).max(middle / 40.0).max(f64::MIN_POSITIVE);
    let x = |i: usize| {
        let share = if points.len() == 1 { 0.5 } else { i as f64 / (points.len() - 1) as f64 };
        MARGIN + share * (WIDTH - 2.0 * MARGIN)
    };
    let y = |value: f64| HEIGHT / 2.0 - (value - middle) / half * (HEIGHT / 2.0 - MARGIN);
    let change = 100.0 * (last.compared.median / first.compared.median - 1.0);
    let what = if last.calibrated { ", by the ratio" } else { "" };
    let _ = writeln!(
        out,
        "<h2>{}</h2>\n<p>{} now, {change:+.1} % since the first record{what}</p>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         role=\"img\" aria-label=\"trend of {}\">",
        escape(name),
        amount(last.value, last.kind, last.unit),
        escape(name)
    );
    let mut start = 0;
    for end in 1..=points.len() {
        let joined = points
            .get(end)
            .is_some_and(|next| next.record.machine.same_hardware(&points[end - 1].record.machine));
        if !joined {
            let line = (start..end).map(|i| format!("{:.1},{:.1}", x(i), y(points[i].compared.median)));
            let _ = writeln!(out, "<polyline points=\"{}\"/>", line.collect::<Vec<_>>().join(" "));
            start = end;
        }
    }
    for (i, point) in points.iter().enumerate() {
        let Estimate { median, low, high } = point.compared;
        let (x, top, bottom) = (x(i), y(high), y(low));
        let _ = writeln!(
            out,
            "<line class=\"range\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/><circle cx=\"{x:.1}\" \
             cy=\"{:.1}\" r=\"4\"><title>{}; {}</title></circle>",
            y(median),
            amount(point.value, point.kind, point.unit),
            escape(&origin(point.record))
        );
    }
    *out += "</svg>\n";
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::format::Benchmark;
    use super::*;

    #[test]
    fn the_page_has_every_benchmark_and_joins_one_machine() {
        let record = |cpu: &str, value: f64| {
            let mut record = Record::new(vec!["kernels".to_owned()], None);
            record.machine.cpu = Some(cpu.to_owned());
            record.benchmarks = vec![Benchmark::exact("kernels/a<b/c".to_owned(), Kind::Time, "s", value)];
            record
        };
        let page = page(&[record("one", 1.0), record("one", 1.1), record("two", 5.0)]);
        assert!(page.contains("kernels/a&lt;b/c") && !page.contains("a<b"));
        assert_eq!(page.matches("<circle").count(), 3);
        assert_eq!(page.matches("<polyline").count(), 2);
        assert!(page.contains("+400.0 %"));
        assert!(!page.contains("NaN") && !page.contains("http"));
    }
}
