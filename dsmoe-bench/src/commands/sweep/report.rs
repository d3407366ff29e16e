//! The report of a sweep.

use std::path::Path;

use super::point::{Point, Times};
use crate::format::{self, Table};
use crate::report::{
    Block, Cell, Chapter, Figure, Look, Point as Mark, Report, Series, Tabular, fixed, optional,
};

/// Makes the report of all points; the dense model, if there is one, is the first.
pub(super) fn of(model: &Path, points: &[Point]) -> Report {
    let mut blocks: Vec<Block> = charts(points).into_iter().map(Block::from).collect();
    blocks.extend([Block::from(table(points)), by_text(points).into()]);
    if points.iter().any(|point| !point.tasks.is_empty()) {
        blocks.push(by_task(points).into());
    }
    Report {
        title: "One model at several budgets".to_owned(),
        subtitle: model.display().to_string(),
        accent: Vec::new(),
        chapters: vec![Chapter::new("sweep", "Loss, tasks and time by active share", blocks)],
    }
}

/// Formats the points as a table for the console.
pub(super) fn show(points: &[Point]) -> String {
    let rows = table(points);
    let mut table = Table::new(rows.header.iter().map(String::as_str));
    for row in &rows.rows {
        table.row(row.iter().map(|cell| cell.text.clone()));
    }
    table.show()
}

fn name(point: &Point) -> Cell {
    point.active.map_or("dense".into(), |active| format::percent(active).into())
}

fn table(points: &[Point]) -> Tabular {
    let header = "budget | active share | activated | perplexity | nll | over dense, nats | tasks, % | prefill, tokens/s | \
                  decode, tokens/s | prefill over dense | decode over dense";
    let mut table = Tabular::new("sweep", "By budget", header).note(
        "The budget is the share of experts that the thresholds were fitted to, the active share what the texts opened. \
         Times are medians; those over dense were measured in turns with the dense model.",
    );
    let dense = points.iter().find(|point| point.active.is_none());
    for point in points {
        let gain = |at: usize| {
            optional(point.times.and_then(|times| gains(&times)).map(|gains| gains[at]), |x| {
                format!("{x:.2}x")
            })
        };
        table.row(vec![
            name(point),
            optional(point.active_ratio, format::percent),
            optional(Some(point.params_activated), format::amount),
            fixed(point.ppl, 3),
            fixed(point.nll, 4),
            optional(dense.map(|dense| point.nll - dense.nll), |nats| format!("{nats:+.4}")),
            optional(point.tasks_mean(), |mean| format!("{mean:.1}")),
            optional(point.times.map(|times| times.prefill), |x| format!("{x:.0}")),
            optional(point.times.map(|times| times.decode), |x| format!("{x:.1}")),
            gain(0),
            gain(1),
        ]);
    }
    table
}

/// Returns the speeds of prefill and decoding over the dense model's.
fn gains(times: &Times) -> Option<[f64; 2]> {
    times.dense.map(|[prefill, decode]| [times.prefill / prefill, times.decode / decode])
}

fn by_text(points: &[Point]) -> Tabular {
    let header = "budget | text | perplexity | nll | active share | KL from dense | same first token";
    let mut table = Tabular::new("sweep-texts", "By text", header);
    for point in points {
        for text in &point.texts {
            table.row(vec![
                name(point),
                text.name.as_str().into(),
                fixed(text.ppl, 3),
                fixed(text.nll, 4),
                optional(text.active_ratio, format::percent),
                optional(text.agreement.map(|found| found.kl), |kl| format!("{kl:.4}")),
                optional(text.agreement.map(|found| found.top1), format::percent),
            ]);
        }
    }
    table
}

fn by_task(points: &[Point]) -> Tabular {
    let header = "budget | task | items | right, % | loss of the right answer, nats | active share";
    let mut table = Tabular::new("sweep-tasks", "By task", header);
    for point in points {
        for task in &point.tasks {
            table.row(vec![
                name(point),
                task.task.as_str().into(),
                format::count(task.items as u64).into(),
                fixed(100.0 * task.value, 1),
                optional(task.gold_nll, |nll| format!("{nll:.3}")),
                optional(task.active_ratio, format::percent),
            ]);
        }
    }
    table
}

/// Draws loss against the active share, and against the time of a decoded token.
fn charts(points: &[Point]) -> Vec<Figure> {
    let dense = points.iter().find(|point| point.active.is_none());
    let base = dense.map_or(0.0, |dense| dense.nll);
    let y = if dense.is_some() { "nats over the dense model" } else { "nats" };
    let tip = |point: &Point| format!("{}: perplexity {:.3}", name(point).text, point.ppl);
    let swept = || points.iter().filter(|point| point.active.is_some());
    let by_share = swept()
        .filter_map(|point| Some(Mark::new(100.0 * point.active_ratio?, point.nll - base, tip(point))));
    let by_time = swept().filter_map(|point| {
        let times = point.times?;
        let x = gains(&times).map_or(times.decode, |gains| gains[1]);
        Some(Mark::new(x, point.nll - base, tip(point)))
    });
    let line = |marks: Vec<Mark>| vec![Series::new("model", Look::Line, marks)];
    let x =
        if dense.is_some() { "decoding speed over the dense model's" } else { "decoded tokens per second" };
    let share = Figure::new(
        "sweep-share",
        "Loss against the active share",
        ["% of the experts that are active", y],
        line(by_share.collect()),
    );
    let time =
        Figure::new("sweep-time", "Loss against the speed of decoding", [x, y], line(by_time.collect()));
    let is_drawn = |figure: &Figure| match &figure.plot {
        crate::report::Plot::Axes { series, .. } => series.iter().any(|one| one.points.len() > 1),
        crate::report::Plot::Scatter { marks } => !marks.is_empty(),
        crate::report::Plot::Heat { .. } => true,
    };
    [share, time].into_iter().filter(is_drawn).collect()
}
