//! The paper's tables beside our results.

use super::super::outputs::Output;
use super::super::paper;
use super::super::profile::{PaperModel, PaperRow, Role};
use super::super::results::{Direction, MethodResult};
use super::{View, agreement, amount, interval, mark, measured, optional_fixed, p_value, plain, trim, yes};
use crate::format;
use crate::report::{Block, Figure, Look, Point, Series, Tabular, fixed, number, optional};

const NOT_STATED: &str = "not stated";

impl View<'_> {
    pub(super) fn table1(&self) -> Vec<Block> {
        let main = self.main();
        let literal = self.method(Role::Paper);
        let mut table = Tabular::new(
            "table1",
            "Ours",
            "method | parameters | activated | of the budget | active experts | perplexity | 95 % | \
             loss minus DSMoE's | p | prefill, tokens/s | decode, tokens/s | peak memory",
        )
        .note(format!(
            "Perplexity of the held-out text, with sources weighted as in training. Loss minus DSMoE's: nats per token; {} is \
             better above 0; test: {}. Speed and memory were measured once on one of the machines named in the settings.",
            main.map_or("DSMoE", |m| &m.name),
            main.and_then(|m| self.results.comparisons.iter().find(|one| one.dsmoe == m.name)).map_or("none", |one| &one.test),
        ));
        let mut beside = Tabular::new(
            "table1-paper",
            "Ours and the paper's",
            "method | ours: parameters | activated | perplexity | the paper's: parameters | \
             activated | perplexity | DSMoE lower: ours | ours, as in the paper | the paper's | \
             direction",
        )
        .note("The paper uses other models, text and tokens: compare directions, not numbers.");
        let paper = paper::table1(self.model());
        let dsmoe_paper = paper.iter().find(|one| one.row == PaperRow::Dsmoe);
        for method in &self.results.methods {
            let test = main.and_then(|main| self.comparison(&main.name, &method.name));
            let speed = self.timing(method).and_then(|timing| timing.speed.as_ref());
            table.row(vec![
                method.name.as_str().into(),
                amount(method.params_total),
                amount(method.params_activated.mean),
                number(100.0 * method.of_budget, |x| format!("{x:.1} %")),
                optional_fixed(method.active_experts(), 2),
                measured(&method.ppl),
                interval(&method.ppl),
                test.map_or("".into(), |one| {
                    let tip = one.interval.map(|[low, high]| format!("95 %: {low:+.4} to {high:+.4}"));
                    number(one.difference, |x| format!("{x:+.4}")).tip(tip)
                }),
                optional(test.and_then(|one| one.p), p_value),
                optional_fixed(speed.map(|s| s.prefill_tokens_per_s), 0),
                optional_fixed(speed.map(|s| s.decode_tokens_per_s), 0),
                optional(speed.and_then(|s| s.peak_bytes).map(|b| b as f64), |x| format::bytes(x as u64)),
            ]);
            let Some(row) = method.paper else { continue };
            let Some(theirs) = paper.iter().find(|one| one.row == row) else { continue };
            let lower =
                |ppl: Option<f64>, other: f64| ppl.filter(|_| row != PaperRow::Dsmoe).map(|ppl| ppl < other);
            let ours = [main, literal].map(|dsmoe| lower(dsmoe.map(|dsmoe| dsmoe.ppl.mean), method.ppl.mean));
            let in_paper = lower(dsmoe_paper.map(|paper| paper.ppl), theirs.ppl);
            let answer = |lower: Option<bool>| lower.map_or("".into(), yes);
            beside.row(vec![
                method.name.as_str().into(),
                amount(method.params_total),
                amount(method.params_activated.mean),
                measured(&method.ppl),
                amount(theirs.params * 1e9),
                amount(theirs.activated * 1e9),
                fixed(theirs.ppl, 2),
                answer(ours[0]),
                answer(ours[1]),
                answer(in_paper),
                agreement(ours[0].zip(in_paper).map(|(ours, paper)| ours == paper)),
            ]);
        }
        let mut sources = Tabular::new("table1-sources", "By source", "method");
        sources.extend(self.results.methods[0].domains.iter().map(|domain| &domain.name));
        sources.extend(["mean of the sources' perplexities"]);
        for method in &self.results.methods {
            let mut cells = vec![method.name.as_str().into()];
            cells.extend(method.domains.iter().map(|domain| number(domain.ppl, plain)));
            let mean = method.domains.iter().map(|d| d.ppl).sum::<f64>() / method.domains.len() as f64;
            cells.push(number(mean, plain));
            sources.row(cells);
        }
        vec![table.into(), beside.into(), sources.into()]
    }

    pub(super) fn table2(&self) -> Vec<Block> {
        if self.results.methods.iter().all(|method| method.tasks.is_empty()) {
            return vec![Block::Text(
                "No tasks: no benchmark files were given (--task-data), and the text is not the embedded world's."
                    .to_owned(),
            )];
        }
        let table = |id: &str, title: &str, last: &str| {
            let mut table = Tabular::new(id, title, "method");
            table.extend(paper::TASKS.map(|(_, label)| label).into_iter().chain([last]));
            table
        };
        let mut ours = table("table2", "Ours, percent right", "mean").note(self.tasks_note());
        let mut theirs = table("table2-paper", "The paper's, percent right", "mean");
        let title = "DSMoE above the method: agreement with the paper";
        let mut agree = table("table2-directions", title, "agree")
            .note("✓ the paper's direction, ✗ the opposite, – equal or not measured.");
        for method in self.results.methods.iter().filter(|method| !method.tasks.is_empty()) {
            let mut cells = vec![method.name.as_str().into()];
            for (task, _) in paper::TASKS {
                let found = method.tasks.iter().find(|one| one.task == task);
                cells.push(found.map_or("–".into(), |one| {
                    let interval = interval(&one.percent).text;
                    let tip = format!("{}, {} items, 95 %: {interval}", one.metric, one.items);
                    fixed(one.percent.mean, 1).tip(Some(tip))
                }));
            }
            cells.push(optional_fixed(method.tasks_mean, 1));
            ours.row(cells);
        }
        let rows = paper::table2(self.model());
        for (row, scores) in rows {
            let mut cells = vec![row.label().into()];
            cells.extend(scores.iter().map(|&score| fixed(score, 2)));
            cells.push(fixed(scores.iter().sum::<f64>() / 10.0, 1));
            theirs.row(cells);
        }
        for dsmoe in self.gated() {
            for (row, _) in rows.iter().filter(|(row, _)| *row != PaperRow::Dsmoe) {
                let found: Vec<Option<bool>> = paper::TASKS
                    .iter()
                    .map(|(_, label)| {
                        let start = format!("{label}: ");
                        let end = format!(" than {}", row.label());
                        let is = |one: &&Direction| {
                            one.output == Output::Table2
                                && one.method == dsmoe.name
                                && one.statement.starts_with(&start)
                                && one.statement.ends_with(&end)
                        };
                        self.results.directions.iter().find(is).and_then(|one| one.agrees)
                    })
                    .collect();
                if found.iter().all(Option::is_none) {
                    continue;
                }
                let mut cells = vec![format!("{} against {}", dsmoe.name, row.label()).into()];
                cells.extend(found.iter().map(|agrees| mark(*agrees)));
                let yes = found.iter().filter(|one| **one == Some(true)).count();
                let all = found.iter().flatten().count();
                cells.push(number(yes as f64 / all as f64, |_| format!("{yes} of {all}")));
                agree.row(cells);
            }
        }
        vec![ours.into(), theirs.into(), agree.into()]
    }

    pub(super) fn tasks_note(&self) -> String {
        let items = || self.results.methods.iter().flat_map(|m| &m.tasks).map(|task| task.items);
        let (least, most) = (items().min().unwrap_or(0), items().max().unwrap_or(0));
        let what = match &self.results.setup.profile.world {
            Some(_) => "Probes of the embedded world in the form of each benchmark",
            None => "The files of the benchmarks",
        };
        let items = if least == most { least.to_string() } else { format!("{least} to {most}") };
        format!(
            "{what}; {items} items; accuracy, or exact match after five examples for the last four tasks."
        )
    }

    pub(super) fn table3(&self) -> Vec<Block> {
        let (Some(with), Some(without)) = (self.method(Role::Paper), self.method(Role::WithoutSte)) else {
            return Vec::new();
        };
        let mut table = Tabular::new(
            "table3",
            "With and without",
            "measure | ours: with | without | the paper's: with | without | direction",
        )
        .note(format!("{} and {}: the paper's settings with and without eq. 10. The paper's numbers are of the 1B model.", with.name, without.name));
        let [(ppl_with, tasks_with), (ppl_without, tasks_without)] = paper::TABLE3;
        table.row(vec![
            "perplexity".into(),
            measured(&with.ppl),
            measured(&without.ppl),
            number(ppl_with, plain),
            number(ppl_without, plain),
            agreement(Some(without.ppl.mean > with.ppl.mean)),
        ]);
        table.row(vec![
            "active experts".into(),
            optional_fixed(with.active_experts(), 2),
            optional_fixed(without.active_experts(), 2),
            NOT_STATED.into(),
            NOT_STATED.into(),
            "".into(),
        ]);
        for (at, (task, label)) in paper::TASKS.iter().enumerate() {
            let (a, b) = (with.percent(task), without.percent(task));
            table.row(vec![
                format!("{label}, %").into(),
                optional_fixed(a, 1),
                optional_fixed(b, 1),
                fixed(tasks_with[at], 2),
                fixed(tasks_without[at], 2),
                agreement(a.zip(b).filter(|(a, b)| a != b).map(|(a, b)| b < a)),
            ]);
        }
        vec![table.into()]
    }

    pub(super) fn table4(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut series = Vec::new();
        let theirs = paper::table4(self.model());
        let share = |method: &MethodResult, activated: f64| 100.0 * activated / method.params_total;
        let point = |x, y, threshold: f64| Point::new(x, y, format!("threshold {threshold}"));
        for method in self.gated().filter(|method| !method.sweep.is_empty()) {
            let mut table = Tabular::new(
                &format!("table4-{}", method.name),
                &method.name,
                "threshold | ours: perplexity | 95 % | activated, % of all | active experts | \
                 the paper's: perplexity | activated, % of all | direction from the row above",
            );
            let mut above: Option<(f64, f64)> = None;
            for point in &method.sweep {
                let beside = theirs.iter().find(|one| (one.threshold - point.threshold).abs() < 1e-9);
                // In the paper perplexity rises and activated parameters fall from row to row.
                let agrees = above
                    .filter(|_| beside.is_some())
                    .map(|(ppl, activated)| point.ppl.mean > ppl && point.params_activated <= activated);
                table.row(vec![
                    number(point.threshold, |x| format!("{x}")),
                    measured(&point.ppl),
                    interval(&point.ppl),
                    fixed(share(method, point.params_activated), 2),
                    fixed(method.experts_of(point.active_ratio), 2),
                    optional_fixed(beside.map(|one| one.ppl), 2),
                    optional_fixed(beside.map(|one| one.activated), 2),
                    agreement(agrees),
                ]);
                above = Some((point.ppl.mean, point.params_activated));
            }
            blocks.push(table.into());
            let points = method.sweep.iter();
            let points =
                points.map(|one| point(share(method, one.params_activated), one.ppl.mean, one.threshold));
            series.push(Series::new(&method.name, Look::Line, points));
        }
        if !series.is_empty() {
            let points = theirs.iter().map(|one| point(one.activated, one.ppl, one.threshold));
            series.push(Series::new("the paper", Look::Dashed, points));
            let axes = ["activated, % of all parameters", "perplexity"];
            let figure = Figure::new("table4-chart", "Perplexity by threshold", axes, series);
            blocks.push(Block::from(figure.note("Each point is a threshold, 0.2 at the right end.")));
        }
        blocks
    }

    pub(super) fn tokens(&self, theirs: &[(f64, f64)], id: &str) -> Vec<Block> {
        let mut table = Tabular::new(id, "Ours and the paper's", "share of the tokens");
        let methods: Vec<&MethodResult> =
            self.gated().filter(|method| !method.milestones.is_empty()).collect();
        if methods.is_empty() {
            return Vec::new();
        }
        for method in &methods {
            table.extend([format!("{}: perplexity", method.name), "active experts".to_owned()]);
        }
        table.extend(["the paper's: tokens", "perplexity"]);
        table.extend(methods.iter().map(|method| format!("{}: direction from the row above", method.name)));
        let mut shares: Vec<f64> =
            methods.iter().flat_map(|m| m.milestones.iter().map(|stone| stone.share)).collect();
        shares.extend(theirs.iter().map(|(tokens, _)| tokens / 10.0));
        shares.sort_by(f64::total_cmp);
        shares.dedup_by(|a, b| (*a - *b).abs() < 1e-9);
        let mut above: Option<(f64, Vec<Option<f64>>)> = None;
        for share in shares {
            let paper = theirs.iter().find(|(tokens, _)| (tokens / 10.0 - share).abs() < 1e-9);
            let mut cells = vec![number(100.0 * share, |x| format!("{} %", trim(x)))];
            let now: Vec<_> = methods.iter().map(|method| method.milestone(share)).collect();
            for (method, stone) in methods.iter().zip(&now) {
                cells.push(stone.map_or("–".into(), |stone| measured(&stone.ppl)));
                let active = stone.and_then(|stone| stone.active_ratio).map(|share| method.experts_of(share));
                cells.push(optional_fixed(active, 2));
            }
            cells.push(paper.map_or("".into(), |(tokens, _)| number(*tokens, |x| format!("{x} B"))));
            cells.push(paper.map_or("".into(), |(_, ppl)| fixed(*ppl, 3)));
            for (at, stone) in now.iter().enumerate() {
                let agrees = match (paper, stone, &above) {
                    (Some((_, ppl)), Some(stone), Some((before, ours))) => {
                        ours[at].map(|ours| (stone.ppl.mean < ours) == (*ppl < *before))
                    }
                    _ => None,
                };
                cells.push(if above.is_some() && paper.is_some() { agreement(agrees) } else { "".into() });
            }
            if let Some((_, ppl)) = paper {
                above = Some((*ppl, now.iter().map(|stone| stone.map(|s| s.ppl.mean)).collect()));
            }
            table.row(cells);
        }
        let beside = match (self.model() == PaperModel::One) == (id == "table5") {
            true => "Rows without a number of the paper are not in its table.",
            false => {
                "This profile is compared with the paper's other model, whose table is the other one of 5 and 6."
            }
        };
        table.note = format!(
            "{beside} Before the end, the learning rate has not decayed and the share of active experts still changes, so a \
             perplexity must be read together with its active experts."
        );
        let line = |method: &&MethodResult| {
            let late = method.milestones.iter().filter(|stone| stone.share >= 0.1);
            let points = late.map(|stone| {
                let tip = format!("{} tokens", format::count(stone.tokens));
                Point::new(100.0 * stone.share, stone.ppl.mean, tip)
            });
            Series::new(&method.name, Look::Line, points)
        };
        let mut series: Vec<Series> = methods.iter().map(line).collect();
        let point =
            |(tokens, ppl): &(f64, f64)| Point::new(10.0 * tokens, *ppl, format!("{tokens} B tokens"));
        series.push(Series::new("the paper", Look::Dashed, theirs.iter().map(point)));
        let axes = ["% of the tokens", "perplexity"];
        let figure = Figure::new(format!("{id}-chart"), "Perplexity during training", axes, series)
            .note("From a tenth of the tokens on.");
        vec![table.into(), figure.into()]
    }
}
