//! Results as sections of tables and charts.

use super::outputs::Output;
use super::paper;
use super::profile::{PaperModel, PaperRow, Role};
use super::results::{Collected, Comparison, Measured, MethodResult, Results};
use super::run::BASE;
use crate::report;

/// One cell: what is shown, and the number behind it to sort by.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) text: String,
    pub(crate) value: Option<f64>,
    /// Shown when pointed at.
    pub(crate) tip: Option<String>,
}

impl From<String> for Cell {
    fn from(text: String) -> Cell {
        Cell { text, value: None, tip: None }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Cell {
        text.to_owned().into()
    }
}

/// A table with a name for its CSV file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tabular {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) note: String,
    pub(crate) header: Vec<String>,
    pub(crate) rows: Vec<Vec<Cell>>,
}

impl Tabular {
    fn new(id: &str, title: &str, header: &[&str]) -> Tabular {
        Tabular {
            id: id.to_owned(),
            title: title.to_owned(),
            note: String::new(),
            header: header.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    fn note(mut self, note: impl Into<String>) -> Tabular {
        self.note = note.into();
        self
    }

    fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.header.len(), "{}", self.id);
        self.rows.push(cells);
    }
}

/// One line or cloud of points of a chart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// x, y, and what is shown when pointed at.
    pub(crate) points: Vec<(f64, f64, String)>,
    pub(crate) dashed: bool,
}

/// What a chart shows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Plot {
    Lines(Vec<Series>),
    Points(Vec<Series>),
    /// Names of rows and columns, and values.
    Heat {
        rows: Vec<String>,
        columns: Vec<String>,
        values: Vec<Vec<f64>>,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figure {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) note: String,
    pub(crate) x: String,
    pub(crate) y: String,
    pub(crate) plot: Plot,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Block {
    Text(String),
    Table(Tabular),
    Figure(Figure),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chapter {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) blocks: Vec<Block>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) chapters: Vec<Chapter>,
}

/// The whole report.
pub(crate) fn of(collected: &Collected, results: &Results) -> Report {
    let view = View { collected, results };
    let setup = &results.setup;
    let mut chapters = vec![view.summary()];
    for output in Output::ALL {
        if setup.outputs.iter().any(|name| name == output.name())
            && let Some(chapter) = view.chapter(output)
        {
            chapters.push(chapter);
        }
    }
    chapters.push(view.directions());
    chapters.push(view.settings());
    Report {
        title: "DSMoE beside the methods it is compared with".to_owned(),
        subtitle: format!("profile {}: {}", setup.profile.name, setup.profile.about),
        chapters,
    }
}

struct View<'a> {
    collected: &'a Collected,
    results: &'a Results,
}

impl View<'_> {
    fn model(&self) -> PaperModel {
        self.results.setup.profile.paper
    }

    fn method(&self, role: Role) -> Option<&MethodResult> {
        self.results.methods.iter().find(|method| method.role == Some(role))
    }

    fn gated(&self) -> impl Iterator<Item = &MethodResult> {
        self.results.methods.iter().filter(|m| matches!(m.role, Some(Role::Dsmoe | Role::Paper)))
    }

    /// DSMoE's row that others are compared with: the one with the best settings, else the paper's.
    fn main(&self) -> Option<&MethodResult> {
        self.method(Role::Dsmoe).or_else(|| self.method(Role::Paper))
    }

    fn comparison(&self, dsmoe: &str, other: &str) -> Option<&Comparison> {
        self.results.comparisons.iter().find(|one| one.dsmoe == dsmoe && one.other == other)
    }

    fn chapter(&self, output: Output) -> Option<Chapter> {
        let (title, blocks) = match output {
            Output::Table1 => ("Table 1: perplexity at one budget".to_owned(), self.table1()),
            Output::Table2 => ("Table 2: ten tasks".to_owned(), self.table2()),
            Output::Table3 => ("Table 3: without the straight-through rule".to_owned(), self.table3()),
            Output::Table4 => ("Table 4: other thresholds at inference".to_owned(), self.table4()),
            Output::Table5 => {
                ("Table 5: perplexity over tokens, 1B".to_owned(), self.tokens(&paper::TABLE5, "table5"))
            }
            Output::Table6 => {
                ("Table 6: perplexity over tokens, 7B".to_owned(), self.tokens(&paper::TABLE6, "table6"))
            }
            Output::Figure2 => ("Figure 2: trained without a threshold".to_owned(), self.figure2()),
            Output::Figure3 => ("Figure 3: active experts by layer and text".to_owned(), self.figure3()),
            Output::Speed => ("Speed and memory".to_owned(), self.speed()),
            Output::Pareto => ("Perplexity against arithmetic".to_owned(), self.pareto()),
            Output::Difficulty => {
                ("Active experts against the difficulty of tokens".to_owned(), self.difficulty())
            }
            Output::Budget => ("Perplexity at parts of the training".to_owned(), self.budget()),
        };
        (!blocks.is_empty()).then(|| Chapter { id: output.name().to_owned(), title, blocks })
    }

    // ---- what came out ----

    fn summary(&self) -> Chapter {
        let setup = &self.results.setup;
        let mut blocks = vec![Block::Text(format!(
            "Every method starts from one dense model of {} parameters, is brought to {} activated parameters ({} of {} \
             experts), and is trained on with the same text, tokens and settings; {} seed{}.",
            report::count(setup.dense_params),
            report::count(setup.budget.round() as u64),
            trim(setup.profile.active * setup.profile.experts as f64),
            setup.profile.experts,
            self.results.seeds.len(),
            if self.results.seeds.len() == 1 { "" } else { "s" },
        ))];
        for dsmoe in self.gated() {
            let of = |verdict: &str| -> Vec<&str> {
                self.results
                    .comparisons
                    .iter()
                    .filter(|one| one.dsmoe == dsmoe.name && one.verdict == verdict)
                    .map(|one| one.other.as_str())
                    .collect()
            };
            let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let mut text = format!(
                "{}: perplexity {}, {:.1} % of the budget. Better than {}; worse than {}; not told apart from {}.",
                dsmoe.name,
                plain(dsmoe.ppl.mean),
                100.0 * dsmoe.of_budget,
                list(of("better")),
                list(of("worse")),
                list(of("not told apart")),
            );
            let mine: Vec<_> =
                self.results.directions.iter().filter(|one| one.method == dsmoe.name).collect();
            let agree = mine.iter().filter(|one| one.agrees == Some(true)).count();
            let judged = mine.iter().filter(|one| one.agrees.is_some()).count();
            text += &format!(" Of the paper's statements that it can be held to, {agree} of {judged} hold.");
            blocks.push(Block::Text(text));
        }
        if self.results.seeds.len() == 1 {
            blocks.push(Block::Text(
                "With one seed, intervals and tests are bootstraps over held-out windows: they say how far the text \
                 decides, not how far another training would."
                    .to_owned(),
            ));
        }
        Chapter { id: "summary".to_owned(), title: "What came out".to_owned(), blocks }
    }

    fn table1(&self) -> Vec<Block> {
        let main = self.main();
        let literal = self.method(Role::Paper);
        let mut table = Tabular::new(
            "table1",
            "Ours",
            &[
                "method",
                "parameters",
                "activated",
                "of the budget",
                "active experts",
                "perplexity",
                "95 %",
                "loss minus DSMoE's",
                "p",
                "prefill, tokens/s",
                "decode, tokens/s",
                "peak memory",
            ],
        )
        .note(format!(
            "Perplexity of the held-out text, sources weighted as in training. Loss minus DSMoE's: nats per token, above 0 \
             {} is better; {}. Speed and memory were measured once on one of the machines named at the end.",
            main.map_or("DSMoE", |m| &m.name),
            main.and_then(|m| self.results.comparisons.iter().find(|one| one.dsmoe == m.name)).map_or("no test", |one| one.test),
        ));
        let mut beside = Tabular::new(
            "table1-paper",
            "Ours and the paper's",
            &[
                "method",
                "ours: parameters",
                "activated",
                "perplexity",
                "the paper's: parameters",
                "activated",
                "perplexity",
                "DSMoE lower: ours",
                "ours, literal",
                "the paper's",
                "direction",
            ],
        )
        .note("The paper's models, text and tokens are others: directions compare, numbers do not.");
        let paper = paper::table1(self.model());
        let dsmoe_paper = paper.iter().find(|one| one.row == PaperRow::Dsmoe);
        for method in &self.results.methods {
            let test = main.and_then(|main| self.comparison(&main.name, &method.name));
            let timing = self.timing(method);
            let experts = method.active_ratio.map(|ratio| ratio * self.results.setup.profile.experts as f64);
            table.row(vec![
                method.name.as_str().into(),
                amount(method.params_total),
                amount(method.params_activated.mean),
                number(100.0 * method.of_budget, |x| format!("{x:.1} %")),
                optional(experts, |x| format!("{x:.2}")),
                measured(&method.ppl),
                interval(&method.ppl),
                test.map_or("".into(), |one| {
                    number(one.difference, |x| format!("{x:+.4}"))
                        .tip(one.interval.map(|[low, high]| format!("95 %: {low:+.4} to {high:+.4}")))
                }),
                optional(test.and_then(|one| one.p), p_value),
                optional(timing.map(|speed| speed.0), |x| format!("{x:.0}")),
                optional(timing.map(|speed| speed.1), |x| format!("{x:.0}")),
                optional(timing.and_then(|speed| speed.2), |x| report::bytes(x as u64)),
            ]);
            let Some(row) = method.paper else { continue };
            let Some(theirs) = paper.iter().find(|one| one.row == row) else { continue };
            let is_dsmoe = row == PaperRow::Dsmoe;
            let lower = |dsmoe: Option<&MethodResult>| match dsmoe {
                Some(dsmoe) if !is_dsmoe => yes(dsmoe.ppl.mean < method.ppl.mean),
                _ => "".into(),
            };
            let agrees = main
                .zip(dsmoe_paper)
                .filter(|_| !is_dsmoe)
                .map(|(ours, paper)| (ours.ppl.mean < method.ppl.mean) == (paper.ppl < theirs.ppl));
            beside.row(vec![
                method.name.as_str().into(),
                amount(method.params_total),
                amount(method.params_activated.mean),
                measured(&method.ppl),
                amount(theirs.params * 1e9),
                amount(theirs.activated * 1e9),
                number(theirs.ppl, |x| format!("{x:.2}")),
                lower(main),
                lower(literal),
                match dsmoe_paper {
                    Some(paper) if !is_dsmoe => yes(paper.ppl < theirs.ppl),
                    _ => "".into(),
                },
                agreement(agrees),
            ]);
        }
        let mut sources = Tabular::new("table1-sources", "By source", &["method"]);
        let names: Vec<&str> =
            self.results.methods[0].domains.iter().map(|domain| domain.name.as_str()).collect();
        sources.header.extend(names.iter().map(|&name| name.to_owned()));
        sources.header.push("mean of the sources' perplexities".to_owned());
        for method in &self.results.methods {
            let mut cells = vec![method.name.as_str().into()];
            cells.extend(method.domains.iter().map(|domain| number(domain.ppl, plain)));
            let mean = method.domains.iter().map(|d| d.ppl).sum::<f64>() / method.domains.len() as f64;
            cells.push(number(mean, plain));
            sources.row(cells);
        }
        vec![Block::Table(table), Block::Table(beside), Block::Table(sources)]
    }

    fn timing(&self, method: &MethodResult) -> Option<(f64, f64, Option<f64>)> {
        let id = match method.role {
            None => BASE.to_owned(),
            Some(_) => format!("{}-s{}", method.name, method.seeds.first()?),
        };
        let speed = self.collected.timings.get(&id)?.speed.as_ref()?;
        Some((
            speed.prefill_tokens_per_s,
            speed.decode_tokens_per_s,
            speed.peak_bytes.map(|bytes| bytes as f64),
        ))
    }

    fn table2(&self) -> Vec<Block> {
        if self.results.methods.iter().all(|method| method.tasks.is_empty()) {
            return vec![Block::Text(
                "No benchmark files were given (--task-data), and the text is not the embedded world's, so no task was \
                 asked."
                    .to_owned(),
            )];
        }
        let mut header = vec!["method"];
        header.extend(paper::TASKS.map(|(_, label)| label));
        header.push("mean");
        let mut ours = Tabular::new("table2", "Ours, percent right", &header).note(self.tasks_note());
        let mut theirs = Tabular::new("table2-paper", "The paper's, percent right", &header);
        let mut agree = Tabular::new(
            "table2-directions",
            "DSMoE above the method: do ours and the paper agree?",
            &header,
        )
        .note("✓ the paper's direction, ✗ the other, – equal or not measured.");
        *agree.header.last_mut().expect("a header") = "agree".to_owned();
        for method in self.results.methods.iter().filter(|method| !method.tasks.is_empty()) {
            let mut cells = vec![method.name.as_str().into()];
            for (task, _) in paper::TASKS {
                let found = method.tasks.iter().find(|one| one.task == task);
                cells.push(found.map_or("–".into(), |one| {
                    number(one.percent.mean, |x| format!("{x:.1}")).tip(Some(format!(
                        "{}, {} items, 95 %: {}",
                        one.metric,
                        one.items,
                        interval(&one.percent).text
                    )))
                }));
            }
            cells.push(optional(method.tasks_mean, |x| format!("{x:.1}")));
            ours.row(cells);
        }
        let rows = paper::table2(self.model());
        for (row, scores) in rows {
            let mut cells = vec![row.label().into()];
            cells.extend(scores.iter().map(|&score| number(score, |x| format!("{x:.2}"))));
            cells.push(number(scores.iter().sum::<f64>() / 10.0, |x| format!("{x:.1}")));
            theirs.row(cells);
        }
        for dsmoe in self.gated() {
            for (row, _) in rows.iter().filter(|(row, _)| *row != PaperRow::Dsmoe) {
                let found: Vec<Option<bool>> = paper::TASKS
                    .iter()
                    .map(|(_, label)| {
                        let start = format!("{label}: ");
                        let end = format!(" than {}", row.label());
                        let is = |one: &&super::results::Direction| {
                            one.output == "table2"
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
                let (yes, all) = (
                    found.iter().filter(|one| **one == Some(true)).count(),
                    found.iter().filter(|one| one.is_some()).count(),
                );
                cells.push(number(yes as f64 / all as f64, |_| format!("{yes} of {all}")));
                agree.row(cells);
            }
        }
        vec![Block::Table(ours), Block::Table(theirs), Block::Table(agree)]
    }

    fn tasks_note(&self) -> String {
        let items: Vec<usize> =
            self.results.methods.iter().flat_map(|m| m.tasks.iter().map(|task| task.items)).collect();
        let (least, most) =
            (items.iter().min().copied().unwrap_or(0), items.iter().max().copied().unwrap_or(0));
        let what = match &self.results.setup.profile.world {
            Some(_) => "Probes of the embedded world, each in the kind and form of its benchmark",
            None => "The benchmarks' own files",
        };
        let items = if least == most { least.to_string() } else { format!("{least} to {most}") };
        format!("{what}; {items} items; accuracy, or exact match after five examples (the last four).")
    }

    fn table3(&self) -> Vec<Block> {
        let (Some(with), Some(without)) = (self.method(Role::Paper), self.method(Role::WithoutSte)) else {
            return Vec::new();
        };
        let mut table = Tabular::new(
            "table3",
            "With and without",
            &["measure", "ours: with", "without", "the paper's: with", "without", "direction"],
        )
        .note(format!("{} and {}: the paper's settings, with and without eq. 10; the paper's numbers are the 1B model's.", with.name, without.name));
        let [(ppl_with, tasks_with), (ppl_without, tasks_without)] = paper::TABLE3;
        table.row(vec![
            "perplexity".into(),
            measured(&with.ppl),
            measured(&without.ppl),
            number(ppl_with, plain),
            number(ppl_without, plain),
            agreement(Some(without.ppl.mean > with.ppl.mean)),
        ]);
        let experts = self.results.setup.profile.experts as f64;
        let active =
            |method: &MethodResult| optional(method.active_ratio.map(|r| r * experts), |x| format!("{x:.2}"));
        table.row(vec![
            "active experts".into(),
            active(with),
            active(without),
            NOT_STATED.into(),
            NOT_STATED.into(),
            "".into(),
        ]);
        for (at, (task, label)) in paper::TASKS.iter().enumerate() {
            let find = |method: &MethodResult| {
                method.tasks.iter().find(|one| one.task == *task).map(|one| one.percent.mean)
            };
            let (a, b) = (find(with), find(without));
            table.row(vec![
                format!("{label}, %").into(),
                optional(a, |x| format!("{x:.1}")),
                optional(b, |x| format!("{x:.1}")),
                number(tasks_with[at], |x| format!("{x:.2}")),
                number(tasks_without[at], |x| format!("{x:.2}")),
                agreement(a.zip(b).filter(|(a, b)| a != b).map(|(a, b)| b < a)),
            ]);
        }
        vec![Block::Table(table)]
    }

    fn table4(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut series = Vec::new();
        let total = |method: &MethodResult| method.params_total;
        for method in self.gated().filter(|method| !method.sweep.is_empty()) {
            let mut table = Tabular::new(
                &format!("table4-{}", method.name),
                &method.name,
                &[
                    "threshold",
                    "ours: perplexity",
                    "95 %",
                    "activated, % of all",
                    "active experts",
                    "the paper's: perplexity",
                    "activated, % of all",
                    "against the row above",
                ],
            );
            let mut above: Option<(f64, f64)> = None;
            for point in &method.sweep {
                let theirs = paper::table4(self.model())
                    .iter()
                    .find(|one| (one.threshold - point.threshold).abs() < 1e-9);
                // In the paper perplexity rises and activated parameters fall from row to row.
                let agrees = above
                    .filter(|_| theirs.is_some())
                    .map(|(ppl, activated)| point.ppl.mean > ppl && point.params_activated <= activated);
                table.row(vec![
                    number(point.threshold, |x| format!("{x}")),
                    measured(&point.ppl),
                    interval(&point.ppl),
                    number(100.0 * point.params_activated / total(method), |x| format!("{x:.2}")),
                    number(point.active_ratio * self.results.setup.profile.experts as f64, |x| {
                        format!("{x:.2}")
                    }),
                    optional(theirs.map(|one| one.ppl), |x| format!("{x:.2}")),
                    optional(theirs.map(|one| one.activated), |x| format!("{x:.2}")),
                    agreement(agrees),
                ]);
                above = Some((point.ppl.mean, point.params_activated));
            }
            blocks.push(Block::Table(table));
            series.push(Series {
                name: method.name.clone(),
                points: method
                    .sweep
                    .iter()
                    .map(|point| {
                        let share = 100.0 * point.params_activated / total(method);
                        (share, point.ppl.mean, format!("threshold {}", point.threshold))
                    })
                    .collect(),
                dashed: false,
            });
        }
        if !series.is_empty() {
            series.push(Series {
                name: "the paper".to_owned(),
                points: paper::table4(self.model())
                    .iter()
                    .map(|one| (one.activated, one.ppl, format!("threshold {}", one.threshold)))
                    .collect(),
                dashed: true,
            });
            blocks.push(Block::Figure(Figure {
                id: "table4-chart".to_owned(),
                title: "Perplexity along thresholds".to_owned(),
                note: "Each point is a threshold, 0.2 at the right end.".to_owned(),
                x: "activated, % of all parameters".to_owned(),
                y: "perplexity".to_owned(),
                plot: Plot::Lines(series),
            }));
        }
        blocks
    }

    fn tokens(&self, theirs: &[(f64, f64)], id: &str) -> Vec<Block> {
        let stands_beside = (self.model() == PaperModel::One) == (id == "table5");
        let mut table = Tabular::new(id, "Ours and the paper's", &["share of the tokens"]);
        let methods: Vec<&MethodResult> =
            self.gated().filter(|method| !method.milestones.is_empty()).collect();
        if methods.is_empty() {
            return Vec::new();
        }
        for method in &methods {
            table.header.extend([format!("{}: perplexity", method.name), "active experts".to_owned()]);
        }
        table.header.extend(["the paper's: tokens".to_owned(), "perplexity".to_owned()]);
        table.header.extend(methods.iter().map(|method| format!("{}: against the row above", method.name)));
        let mut shares: Vec<f64> =
            methods.iter().flat_map(|m| m.milestones.iter().map(|stone| stone.share)).collect();
        shares.extend(theirs.iter().map(|(tokens, _)| tokens / 10.0));
        shares.sort_by(f64::total_cmp);
        shares.dedup_by(|a, b| (*a - *b).abs() < 1e-9);
        let mut above: Option<(f64, Vec<Option<f64>>)> = None;
        for share in shares {
            let found = |method: &MethodResult| {
                method.milestones.iter().find(|stone| (stone.share - share).abs() < 1e-9).cloned()
            };
            let paper = theirs.iter().find(|(tokens, _)| (tokens / 10.0 - share).abs() < 1e-9);
            let mut cells = vec![number(100.0 * share, |x| format!("{} %", trim(x)))];
            let now: Vec<_> = methods.iter().map(|method| found(method)).collect();
            for stone in &now {
                let experts = self.results.setup.profile.experts as f64;
                cells.push(stone.as_ref().map_or("–".into(), |stone| measured(&stone.ppl)));
                cells.push(optional(stone.as_ref().and_then(|s| s.active_ratio).map(|r| r * experts), |x| {
                    format!("{x:.2}")
                }));
            }
            cells.push(paper.map_or("".into(), |(tokens, _)| number(*tokens, |x| format!("{x} B"))));
            cells.push(paper.map_or("".into(), |(_, ppl)| number(*ppl, |x| format!("{x:.3}"))));
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
                above = Some((*ppl, now.iter().map(|stone| stone.as_ref().map(|s| s.ppl.mean)).collect()));
            }
            table.row(cells);
        }
        let beside = match stands_beside {
            true => "Rows without a number of the paper are not in its table.",
            false => {
                "This profile stands beside the paper's other model; its own table is the other of 5 and 6. Rows are where \
                 the two have points."
            }
        };
        table.note = format!(
            "{beside} The learning rate has not come down before the end, and the share of active experts is moving: a \
             perplexity says nothing without the column beside it."
        );
        let mut series: Vec<Series> = methods
            .iter()
            .map(|method| Series {
                name: method.name.clone(),
                points: method
                    .milestones
                    .iter()
                    .filter(|stone| stone.share >= 0.1)
                    .map(|stone| {
                        (
                            100.0 * stone.share,
                            stone.ppl.mean,
                            format!("{} tokens", report::count(stone.tokens)),
                        )
                    })
                    .collect(),
                dashed: false,
            })
            .collect();
        series.push(Series {
            name: "the paper".to_owned(),
            points: theirs
                .iter()
                .map(|(tokens, ppl)| (10.0 * tokens, *ppl, format!("{tokens} B tokens")))
                .collect(),
            dashed: true,
        });
        let figure = Figure {
            id: format!("{id}-chart"),
            title: "Perplexity over the training".to_owned(),
            note: "From a tenth of the tokens on.".to_owned(),
            x: "% of the tokens".to_owned(),
            y: "perplexity".to_owned(),
            plot: Plot::Lines(series),
        };
        vec![Block::Table(table), Block::Figure(figure)]
    }

    fn figure2(&self) -> Vec<Block> {
        let Some(without) = self.method(Role::WithoutThreshold) else { return Vec::new() };
        let mut table = Tabular::new(
            "figure2",
            "At equal activation",
            &["trained", "threshold at inference", "active experts", "perplexity", "direction"],
        )
        .note(
            "The paper (section 6.2) states the direction, worse without a threshold in training; the numbers of its figure 2 \
             are not stated in the documents at hand.",
        );
        let literal = self.method(Role::Paper).or_else(|| self.main());
        let experts = self.results.setup.profile.experts as f64;
        for method in self.gated().chain([without]) {
            let is_it = method.name == without.name;
            let threshold = match is_it {
                true => method.threshold,
                false => Some(0.5),
            };
            table.row(vec![
                method.name.as_str().into(),
                optional(threshold, |x| format!("{x:.4}")),
                optional(method.active_ratio.map(|ratio| ratio * experts), |x| format!("{x:.2}")),
                measured(&method.ppl),
                match literal {
                    Some(literal) if is_it => agreement(Some(method.ppl.mean > literal.ppl.mean)),
                    _ => "".into(),
                },
            ]);
        }
        let series =
            self.gated().chain([without]).filter(|method| !method.sweep.is_empty()).map(|method| Series {
                name: method.name.clone(),
                points: method
                    .sweep
                    .iter()
                    .map(|point| {
                        (
                            point.active_ratio * experts,
                            point.ppl.mean,
                            format!("threshold {}", trim(point.threshold)),
                        )
                    })
                    .collect(),
                dashed: method.name == without.name,
            });
        let figure = Figure {
            id: "figure2-chart".to_owned(),
            title: "Perplexity against active experts, along the threshold".to_owned(),
            note: String::new(),
            x: "active experts".to_owned(),
            y: "perplexity".to_owned(),
            plot: Plot::Lines(series.collect()),
        };
        let mut sweep = Tabular::new(
            "figure2-sweep",
            &format!("{}: thresholds after training", without.name),
            &["threshold", "active experts", "perplexity"],
        );
        for point in &without.sweep {
            sweep.row(vec![
                number(point.threshold, trim),
                number(point.active_ratio * experts, |x| format!("{x:.2}")),
                measured(&point.ppl),
            ]);
        }
        vec![Block::Table(table), Block::Figure(figure), Block::Table(sweep)]
    }

    fn figure3(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for method in self.gated() {
            let shapes: Vec<_> =
                self.results.shapes.iter().filter(|shape| shape.method == method.name).collect();
            let Some(first) = shapes.first() else { continue };
            let layers = first.active_experts_per_layer.len();
            blocks.push(Block::Figure(Figure {
                id: format!("figure3-{}", method.name),
                title: format!("{}: active experts", method.name),
                note: String::new(),
                x: "layer".to_owned(),
                y: "text".to_owned(),
                plot: Plot::Heat {
                    rows: shapes.iter().map(|shape| shape.domain.clone()).collect(),
                    columns: (0..layers).map(|layer| layer.to_string()).collect(),
                    values: shapes.iter().map(|shape| shape.active_experts_per_layer.clone()).collect(),
                },
            }));
            let mut table = Tabular::new(&format!("figure3-{}-layers", method.name), &method.name, &["text"]);
            table.header.extend((0..layers).map(|layer| format!("layer {layer}")));
            table.header.extend(["mean", "like a W", "p", "W", "the paper"].map(str::to_owned));
            for shape in shapes {
                let values = &shape.active_experts_per_layer;
                let mut cells = vec![shape.domain.as_str().into()];
                cells.extend(values.iter().map(|&value| number(value, |x| format!("{x:.2}"))));
                cells.push(number(values.iter().sum::<f64>() / layers as f64, |x| format!("{x:.2}")));
                cells.push(optional(shape.correlation, |x| format!("{x:+.2}")));
                cells.push(optional(shape.p, p_value));
                cells.push(match shape.is_w {
                    Some(is) => yes(is),
                    None => "too few layers".into(),
                });
                cells.push("W".into());
                table.row(cells);
            }
            table.note = "Like a W: correlation of the layers with a wave that is high at both ends and in the middle and low \
                          between. p: the share of all orders of these layers that are as much like it. A W has a correlation of \
                          0.5 or more and p below 0.05. The numbers of the paper's figure 3 are not stated in the documents at \
                          hand; it says that the pattern is a W and differs between texts."
                .to_owned();
            blocks.push(Block::Table(table));
        }
        blocks
    }

    fn speed(&self) -> Vec<Block> {
        let mut table = Tabular::new(
            "speed",
            "Measured",
            &[
                "method",
                "perplexity",
                "activated",
                "FLOPs per token",
                "prefill, tokens/s",
                "decode, tokens/s",
                "peak memory",
                "weights",
                "training, tokens/s",
            ],
        )
        .note(
            "Each model alone in a process of its own, best of three; prefill of held-out text, decoding one token at a time. \
             Zeros that are scattered over a matrix save no time.",
        );
        for method in &self.results.methods {
            let id = match method.role {
                None => BASE.to_owned(),
                Some(_) => format!("{}-s{}", method.name, method.seeds.first().copied().unwrap_or(0)),
            };
            let timing = self.collected.timings.get(&id);
            let speed = timing.and_then(|timing| timing.speed.as_ref());
            table.row(vec![
                method.name.as_str().into(),
                measured(&method.ppl),
                amount(method.params_activated.mean),
                amount(method.flops_per_token),
                optional(speed.map(|s| s.prefill_tokens_per_s), |x| format!("{x:.0}")),
                optional(speed.map(|s| s.decode_tokens_per_s), |x| format!("{x:.0}")),
                optional(speed.and_then(|s| s.peak_bytes).map(|b| b as f64), |x| report::bytes(x as u64)),
                optional(speed.map(|s| s.weight_bytes as f64), |x| report::bytes(x as u64)),
                optional(timing.and_then(|t| t.train_tokens_per_s), |x| format!("{x:.0}")),
            ]);
        }
        vec![Block::Table(table)]
    }

    fn pareto(&self) -> Vec<Block> {
        let methods = &self.results.methods;
        // Nobody has both fewer FLOPs and less perplexity.
        let on_front = |method: &MethodResult| {
            !methods.iter().any(|other| {
                other.flops_per_token <= method.flops_per_token
                    && other.ppl.mean <= method.ppl.mean
                    && (other.flops_per_token < method.flops_per_token || other.ppl.mean < method.ppl.mean)
            })
        };
        let mut table = Tabular::new(
            "pareto",
            "Perplexity and activated FLOPs",
            &["method", "FLOPs per token", "perplexity", "on the front"],
        )
        .note("FLOPs are nominal: of activated weights. On the front: no other row has as few and as low.");
        let series = methods.iter().map(|method| Series {
            name: method.name.clone(),
            points: vec![(
                method.flops_per_token,
                method.ppl.mean,
                format!(
                    "{}: {} FLOPs, perplexity {}",
                    method.name,
                    report::amount(method.flops_per_token),
                    plain(method.ppl.mean)
                ),
            )],
            dashed: !on_front(method),
        });
        let figure = Figure {
            id: "pareto-chart".to_owned(),
            title: "Perplexity against activated FLOPs".to_owned(),
            note: String::new(),
            x: "FLOPs per token".to_owned(),
            y: "perplexity".to_owned(),
            plot: Plot::Points(series.collect()),
        };
        for method in methods {
            table.row(vec![
                method.name.as_str().into(),
                amount(method.flops_per_token),
                measured(&method.ppl),
                yes(on_front(method)),
            ]);
        }
        vec![Block::Figure(figure), Block::Table(table)]
    }

    fn difficulty(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut series = Vec::new();
        for method in self.gated() {
            let Some(found) = &method.difficulty else { continue };
            let mut table = Tabular::new(
                &format!("difficulty-{}", method.name),
                &method.name,
                &["tokens, easiest first", "dense model's loss", "loss", "active experts"],
            )
            .note(format!(
                "Tenths of the held-out tokens by the loss of the dense model before training. Correlation of a token's active \
                 experts with that loss: {}.",
                found.correlation.map_or_else(|| "none, they do not vary".to_owned(), |r| format!("{r:+.3}")),
            ));
            for (at, bin) in found.bins.iter().enumerate() {
                table.row(vec![
                    number(at as f64, |_| format!("{} to {} %", 10 * at, 10 * (at + 1))),
                    number(bin.dense_nll, |x| format!("{x:.3}")),
                    number(bin.nll, |x| format!("{x:.3}")),
                    number(bin.active, |x| format!("{x:.3}")),
                ]);
            }
            blocks.push(Block::Table(table));
            series.push(Series {
                name: method.name.clone(),
                points: found
                    .bins
                    .iter()
                    .map(|bin| (bin.dense_nll, bin.active, format!("{} tokens", bin.tokens)))
                    .collect(),
                dashed: false,
            });
        }
        if !series.is_empty() {
            let figure = Figure {
                id: "difficulty-chart".to_owned(),
                title: "Active experts of a token against how hard it is".to_owned(),
                note: String::new(),
                x: "loss of the dense model, nats".to_owned(),
                y: "active experts".to_owned(),
                plot: Plot::Lines(series),
            };
            blocks.insert(0, Block::Figure(figure));
        }
        blocks
    }

    fn budget(&self) -> Vec<Block> {
        let profile = &self.results.setup.profile;
        let shares: Vec<f64> = profile.milestones.clone();
        let mut table = Tabular::new("budget", "Perplexity after parts of the tokens", &["method"]).note(
            "0 % is the model as it was made, before any training. Active experts stand in brackets where training changes \
             them. A method without a threshold in training has none before it is found at the end.",
        );
        table.header.extend(shares.iter().map(|share| format!("{} %", trim(100.0 * share))));
        for method in self.results.methods.iter().filter(|method| !method.milestones.is_empty()) {
            let gated = !matches!(method.role, Some(Role::Baseline | Role::Control | Role::Dense) | None);
            let mut cells = vec![method.name.as_str().into()];
            for share in &shares {
                let stone = method.milestones.iter().find(|stone| (stone.share - share).abs() < 1e-9);
                cells.push(stone.map_or("–".into(), |stone| {
                    let experts = stone.active_ratio.filter(|_| gated).map(|r| r * profile.experts as f64);
                    let mut cell = measured(&stone.ppl);
                    if let Some(experts) = experts {
                        cell.text += &format!(" ({experts:.2})");
                    }
                    cell.tip = Some(format!("{} tokens", report::count(stone.tokens)));
                    cell
                }));
            }
            table.row(cells);
        }
        vec![Block::Table(table)]
    }

    fn directions(&self) -> Chapter {
        let mut table = Tabular::new(
            "directions",
            "The paper's statements",
            &["table or figure", "method", "the paper's statement", "ours agree"],
        );
        for one in &self.results.directions {
            table.row(vec![
                one.output.into(),
                one.method.as_str().into(),
                one.statement.as_str().into(),
                agreement(one.agrees),
            ]);
        }
        let mut tests = Tabular::new(
            "tests",
            "DSMoE against every method",
            &["DSMoE", "other", "loss of the other minus DSMoE's", "95 %", "p", "test", "DSMoE is"],
        );
        for one in &self.results.comparisons {
            tests.row(vec![
                one.dsmoe.as_str().into(),
                one.other.as_str().into(),
                number(one.difference, |x| format!("{x:+.4}")),
                one.interval.map_or("–".into(), |[low, high]| format!("{low:+.4} to {high:+.4}").into()),
                optional(one.p, p_value),
                one.test.into(),
                one.verdict.into(),
            ]);
        }
        Chapter {
            id: "directions".to_owned(),
            title: "Every statement and every test".to_owned(),
            blocks: vec![Block::Table(tests), Block::Table(table)],
        }
    }

    fn settings(&self) -> Chapter {
        let setup = &self.results.setup;
        let mut table = Tabular::new("settings", "Settings", &["setting", "value"]);
        let mut add = |name: &str, value: String| table.row(vec![name.into(), value.into()]);
        add("profile", format!("{}: {}", setup.profile.name, setup.profile.about));
        add("seeds", self.results.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "));
        add("program", setup.program.clone());
        add("git revision", setup.git_revision.clone());
        for machine in &self.results.machines {
            add("machine", format!("{}, {}, {}", machine.cpu, machine.isa, machine.os));
        }
        if let Some(tokenizer) = setup.inputs["tokenizer_sha256"].as_str() {
            add("tokenizer, SHA-256", tokenizer.to_owned());
        }
        for source in setup.inputs["sources"].as_array().into_iter().flatten() {
            add(
                &format!("text {}", source["name"].as_str().unwrap_or_default()),
                format!(
                    "{} tokens, weight {}, SHA-256 {}",
                    source["tokens"],
                    source["weight"],
                    source["sha256"].as_str().unwrap_or_default()
                ),
            );
        }
        let show = |value: Option<&toml::Table>| {
            value.map_or_else(
                || "the model was given".to_owned(),
                |table| table.to_string().trim().replace('\n', ", "),
            )
        };
        add("training of the dense model", show(setup.profile.pretrain.as_ref()));
        add("continued training", show(Some(&setup.profile.train)));
        let mut methods = Tabular::new(
            "methods",
            "Methods",
            &[
                "method",
                "made by",
                "settings",
                "training of its own",
                "budget reached by",
                "calibration tokens",
            ],
        );
        for spec in &setup.profile.method {
            let Some(found) = self.results.methods.iter().find(|method| method.name == spec.name) else {
                continue;
            };
            let settings: Vec<String> = spec.knobs.iter().map(|(k, v)| format!("{k} = {v}")).collect();
            let settings = if settings.is_empty() { "defaults".to_owned() } else { settings.join(", ") };
            methods.row(vec![
                spec.name.as_str().into(),
                spec.make.as_str().into(),
                settings.into(),
                spec.train.to_string().trim().replace('\n', ", ").into(),
                found.reached_by.clone().unwrap_or_default().into(),
                number(found.calibration_tokens as f64, |x| report::count(x as u64)),
            ]);
        }
        Chapter {
            id: "settings".to_owned(),
            title: "How it was done".to_owned(),
            blocks: vec![Block::Table(methods), Block::Table(table)],
        }
    }
}

const NOT_STATED: &str = "not stated";

impl Cell {
    fn tip(mut self, tip: Option<String>) -> Cell {
        self.tip = tip;
        self
    }
}

fn number(value: f64, show: impl FnOnce(f64) -> String) -> Cell {
    Cell { text: show(value), value: Some(value), tip: None }
}

fn optional(value: Option<f64>, show: impl FnOnce(f64) -> String) -> Cell {
    value.map_or("–".into(), |value| number(value, show))
}

fn amount(value: f64) -> Cell {
    number(value, report::amount)
}

fn yes(is: bool) -> Cell {
    if is { "yes".into() } else { "no".into() }
}

fn agreement(agrees: Option<bool>) -> Cell {
    match agrees {
        Some(true) => "agrees".into(),
        Some(false) => "does not".into(),
        None => "–".into(),
    }
}

fn mark(agrees: Option<bool>) -> Cell {
    match agrees {
        Some(true) => "✓".into(),
        Some(false) => "✗".into(),
        None => "–".into(),
    }
}

fn measured(value: &Measured) -> Cell {
    let tip = value.interval.map(|[low, high]| {
        format!("95 % over {}: {} to {}", value.over.unwrap_or(""), plain(low), plain(high))
    });
    number(value.mean, plain).tip(tip)
}

fn interval(value: &Measured) -> Cell {
    value.interval.map_or("–".into(), |[low, high]| format!("{} to {}", plain(low), plain(high)).into())
}

/// Four digits or two decimals.
fn plain(value: f64) -> String {
    match value.abs() {
        x if x >= 1e6 => format!("{value:.2e}"),
        x if x >= 1000.0 => format!("{value:.0}"),
        x if x >= 100.0 => format!("{value:.1}"),
        x if x >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn p_value(p: f64) -> String {
    if p < 0.001 { "< 0.001".to_owned() } else { format!("{p:.3}") }
}

/// A number without needless zeros.
fn trim(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
