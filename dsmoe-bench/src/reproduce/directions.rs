//! The statements of the paper beside the results.

use super::outputs::Output;
use super::paper;
use super::profile::{PaperModel, PaperRow, Role};
use super::results::{Direction, MethodResult, Shape};

/// Lists the statements of the paper's tables, and whether the results agree.
pub(crate) fn directions(model: PaperModel, methods: &[MethodResult], shapes: &[Shape]) -> Vec<Direction> {
    let mut all = Vec::new();
    let table1 = paper::table1(model);
    let paper_ppl = |row| table1.iter().find(|one| one.row == row).map(|one| one.ppl);
    let paper_tasks = |row| paper::table2(model).iter().find(|one| one.0 == row).map(|one| one.1);
    let by_role = |role: Role| methods.iter().find(|method| method.role == Some(role));
    for dsmoe in methods.iter().filter(|method| method.is_dsmoe()) {
        let mut say = |output, statement: String, agrees| {
            all.push(Direction { output, method: dsmoe.name.clone(), statement, agrees });
        };
        for other in methods {
            let Some(row) = other.paper.filter(|row| *row != PaperRow::Dsmoe) else { continue };
            if let (Some(theirs), Some(ours)) = (paper_ppl(row), paper_ppl(PaperRow::Dsmoe)) {
                let word = if ours < theirs { "lower" } else { "higher" };
                let agrees = (dsmoe.ppl.mean < other.ppl.mean) == (ours < theirs);
                say(Output::Table1, format!("perplexity {word} than {}", row.label()), Some(agrees));
            }
            if let (Some(theirs), Some(ours)) = (paper_tasks(row), paper_tasks(PaperRow::Dsmoe)) {
                for (at, (task, label)) in paper::TASKS.iter().enumerate() {
                    let word = if ours[at] > theirs[at] { "more" } else { "less" };
                    // Equal scores have no direction.
                    let pair = dsmoe.percent(task).zip(other.percent(task)).filter(|(a, b)| a != b);
                    let agrees = pair.map(|(a, b)| (a > b) == (ours[at] > theirs[at]));
                    say(Output::Table2, format!("{label}: {word} right than {}", row.label()), agrees);
                }
            }
        }
        for (row, next) in paper::table4(model).iter().zip(&paper::table4(model)[1..]) {
            let find = |t: f64| dsmoe.sweep.iter().find(|point| (point.threshold - t).abs() < 1e-9);
            let agrees = find(row.threshold)
                .zip(find(next.threshold))
                .map(|(a, b)| a.ppl.mean < b.ppl.mean && a.params_activated >= b.params_activated);
            let (from, to) = (row.threshold, next.threshold);
            let statement = format!("threshold {from} to {to}: perplexity up, activated parameters down");
            say(Output::Table4, statement, agrees);
        }
        let (output, curve) = match model {
            PaperModel::One => (Output::Table5, &paper::TABLE5),
            PaperModel::Seven => (Output::Table6, &paper::TABLE6),
        };
        for (one, next) in curve.iter().zip(&curve[1..]) {
            let find = |tokens: f64| dsmoe.milestone(tokens / 10.0).map(|stone| stone.ppl.mean);
            let word = if next.1 < one.1 { "falls" } else { "rises" };
            let agrees = find(one.0).zip(find(next.0)).map(|(a, b)| (b < a) == (next.1 < one.1));
            let [from, to] = [one.0, next.0].map(|tokens| 10.0 * tokens);
            let statement = format!("from {from:.0} % to {to:.0} % of the tokens perplexity {word}");
            say(output, statement, agrees);
        }
        let shape = shapes.iter().find(|shape| shape.method == dsmoe.name && shape.domain == "all");
        let is_w = shape.and_then(|shape| shape.is_w);
        say(Output::Figure3, "active experts over layers form a W".to_owned(), is_w);
    }
    if let (Some(with), Some(without)) = (by_role(Role::Paper), by_role(Role::WithoutSte)) {
        let mut say = |statement: String, agrees| {
            all.push(Direction { output: Output::Table3, method: without.name.clone(), statement, agrees });
        };
        let agrees = Some(without.ppl.mean > with.ppl.mean);
        say("perplexity higher without the straight-through estimator".to_owned(), agrees);
        for (task, label) in paper::TASKS {
            let agrees =
                with.percent(task).zip(without.percent(task)).filter(|(a, b)| a != b).map(|(a, b)| b < a);
            say(format!("{label}: less right without it"), agrees);
        }
    }
    if let (Some(with), Some(without)) = (by_role(Role::Paper), by_role(Role::WithoutThreshold)) {
        all.push(Direction {
            output: Output::Figure2,
            method: without.name.clone(),
            statement: "perplexity higher at equal activation when trained without a threshold".to_owned(),
            agrees: Some(without.ppl.mean > with.ppl.mean),
        });
    }
    all
}
