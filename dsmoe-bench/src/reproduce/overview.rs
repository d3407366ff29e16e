//! The first view of a reproduction: a brief table and one chart, of loss against time or activated parameters.

use super::frontier;
use super::records::{GridPoint, Timing};
use super::results::{MethodResult, Results};
use crate::format;
use crate::report::{Cell, Emphasis, Figure, Mark, Tabular, fixed, number, optional};

/// A speed-up below this is within what processes of one program differ by.
const GAIN: f64 = 1.05;

/// Finds the speeds of a row that were measured alone.
pub(super) type Timings<'a> = &'a dyn Fn(&MethodResult) -> Option<&'a Timing>;

/// The speed of a kind of work as a multiple of the dense model's.
struct Gain {
    kind: String,
    gain: f64,
}

/// Results with their speeds.
pub(super) struct Overview<'a> {
    results: &'a Results,
    timings: Timings<'a>,
}

impl<'a> Overview<'a> {
    pub(super) fn new(results: &'a Results, timings: Timings<'a>) -> Overview<'a> {
        Overview { results, timings }
    }

    fn has_budgets(&self) -> bool {
        !self.results.setup.profile.budgets.is_empty()
    }

    /// Returns the dense model before continued training.
    fn base(&self) -> Option<&'a MethodResult> {
        self.results.methods.first()
    }

    /// Lists the dense model, and the methods of the main budget.
    pub(super) fn rows(&self) -> Vec<&'a MethodResult> {
        if !self.has_budgets() {
            return self.results.methods.iter().collect();
        }
        self.base().into_iter().chain(frontier::at(self.results, self.results.setup.profile.active)).collect()
    }

    /// Returns the name of a row, without the budget that all rows share.
    fn name(&self, method: &MethodResult) -> String {
        if method.role.is_none() {
            return "dense, as it came".to_owned();
        }
        method.group.as_ref().filter(|_| self.has_budgets()).unwrap_or(&method.name).clone()
    }

    fn emphasis(method: &MethodResult) -> Emphasis {
        match method.role {
            None => Emphasis::Reference,
            Some(role) if role.is_dsmoe() => Emphasis::Accent,
            Some(_) => Emphasis::Plain,
        }
    }

    /// Lists the gains of a row: a prefill, decoding, and training if it was timed.
    fn gains(&self, method: &MethodResult) -> Vec<Gain> {
        let most = method.speeds.iter().map(|point| point.threads).max();
        let grid = method.speeds.iter().filter(|point| Some(point.threads) == most);
        let mut gains: Vec<Gain> =
            grid.map(|point| Gain { kind: frontier::work(point.batch), gain: point.gain() }).collect();
        let timing = (self.timings)(method);
        if gains.is_empty() {
            let speeds = timing
                .and_then(|one| one.speed.as_ref())
                .zip(self.base().and_then(|base| (self.timings)(base)?.speed.as_ref()));
            if let Some((ours, dense)) = speeds {
                gains.push(Gain {
                    kind: frontier::work(0),
                    gain: ours.prefill_tokens_per_s / dense.prefill_tokens_per_s,
                });
                gains.push(Gain {
                    kind: frontier::work(1),
                    gain: ours.decode_tokens_per_s / dense.decode_tokens_per_s,
                });
            }
        }
        let dense = self.rows().into_iter().find(|row| row.is_dense()).and_then(|row| (self.timings)(row));
        let rate = |timing: Option<&Timing>| timing.and_then(|one| one.train_tokens_per_s);
        if let Some((ours, dense)) = rate(timing).zip(rate(dense)) {
            gains.push(Gain { kind: "training".to_owned(), gain: ours / dense });
        }
        gains
    }

    fn gain(&self, method: &MethodResult, kind: &str) -> Option<f64> {
        self.gains(method).into_iter().find(|gain| gain.kind == kind).map(|gain| gain.gain)
    }

    /// Lists the kinds of work that some row was timed at.
    fn kinds(&self) -> Vec<String> {
        let mut kinds: Vec<String> = Vec::new();
        for gain in self.rows().into_iter().flat_map(|row| self.gains(row)) {
            if !kinds.contains(&gain.kind) {
                kinds.push(gain.kind);
            }
        }
        kinds
    }

    /// Compares the rows in a few columns.
    pub(super) fn table(&self) -> Tabular {
        let kinds = self.kinds();
        let mut table = Tabular::new("overview", "At a glance", "method | activated");
        let tokens = frontier::tokens_at(self.results, 1.0);
        table.extend(match self.has_budgets() {
            true => ["nats over dense, untrained".to_owned(), format!("after {tokens}")],
            false => ["perplexity, untrained".to_owned(), format!("after {tokens}")],
        });
        table.extend([if self.dense_tasks().is_some() { "tasks kept" } else { "tasks, %" }]);
        table.extend(kinds.iter().cloned());
        if !kinds.is_empty() {
            table.extend(["saves time?"]);
        }
        for method in self.rows() {
            let mut cells: Vec<Cell> = vec![self.name(method).into(), self.activated(method)];
            cells.extend(self.losses(method));
            cells.push(match (self.dense_tasks(), method.tasks_mean) {
                (Some(dense), Some(mean)) => number(100.0 * mean / dense, |share| format!("{share:.0} %")),
                (_, mean) => optional(mean, |mean| format!("{mean:.1}")),
            });
            let dense = method.role.is_none();
            cells.extend(kinds.iter().map(|kind| match dense {
                true => number(1.0, |_| "1".to_owned()),
                false => optional(self.gain(method, kind), |gain| format!("{gain:.2}x")),
            }));
            if !kinds.is_empty() {
                cells.push(if dense { "".into() } else { saves(&self.gains(method)).into() });
            }
            table.row(cells);
        }
        table.note(self.note(&kinds))
    }

    fn note(&self, kinds: &[String]) -> String {
        let mut note = String::new();
        if self.has_budgets() {
            note += "Nats: loss of a token minus the dense model's before continued training. ";
        }
        if self.dense_tasks().is_some() {
            note += "Tasks kept: mean accuracy over the dense model's. ";
        }
        if !kinds.is_empty() {
            let measured = self.results.methods.iter().flat_map(|method| &method.speeds);
            let threads = measured.map(|point| point.threads).max();
            let threads = threads.or_else(|| Some((self.timings)(self.base()?)?.speed.as_ref()?.threads));
            note += "Other columns: tokens per second over those of the dense model";
            if let Some(threads) = threads {
                note += &format!(", on {threads} thread{}", if threads == 1 { "" } else { "s" });
            }
            note += "; 1.05x and more counts as saved time. ";
        }
        note.trim_end().to_owned()
    }

    /// Words the losses over the dense model of trained rows on each text, where there are several.
    pub(super) fn by_text(&self) -> Option<String> {
        let base = self.base().filter(|base| self.has_budgets() && base.domains.len() > 1)?;
        let texts = base.domains.iter().map(|text| {
            let loss = |method: &MethodResult| {
                let own = method.domains.iter().find(|own| own.name == text.name)?;
                Some(format!("{} {:+.3}", self.name(method), own.ppl.ln() - text.ppl.ln()))
            };
            let losses: Vec<String> = self.rows().into_iter().skip(1).filter_map(loss).collect();
            format!("on {} {}", text.name, losses.join(", "))
        });
        Some(format!("After training, nats over dense {}.", texts.collect::<Vec<_>>().join("; ")))
    }

    /// Compares tokens per second of the dense model and of DSMoE, on the most threads that were measured.
    pub(super) fn speeds(&self) -> Vec<[String; 3]> {
        let Some(own) = self.rows().into_iter().find(|row| row.is_dsmoe()) else { return Vec::new() };
        let most = own.speeds.iter().map(|point| point.threads).max();
        let points = own.speeds.iter().filter(|point| Some(point.threads) == most);
        let row = |point: &GridPoint| {
            let [dense, ours] =
                [point.dense_tokens_per_s, point.tokens_per_s].map(|rate| format::count(rate.round() as u64));
            [format!("{}, {} threads", frontier::work(point.batch), point.threads), dense, ours]
        };
        points.map(row).collect()
    }

    /// Returns the dense model's score where others are shown as shares of it.
    fn dense_tasks(&self) -> Option<f64> {
        self.base().and_then(|base| base.tasks_mean).filter(|_| self.has_budgets())
    }

    fn activated(&self, method: &MethodResult) -> Cell {
        let dense = self.base().map_or(f64::NAN, |base| base.params_activated.mean);
        let share = method.params_activated.mean / dense;
        number(method.params_activated.mean, |count| {
            format!("{} ({:.0} %)", format::amount(count), 100.0 * share)
        })
    }

    /// Returns the loss before and after continued training.
    fn losses(&self, method: &MethodResult) -> [Cell; 2] {
        let base = self.base().map_or(0.0, |base| base.nll.mean);
        let show = |nll: f64| match self.has_budgets() {
            true => number(nll - base, |nats| format!("{nats:+.3}")),
            false => fixed(nll.exp(), 3),
        };
        let only_made = method.untrained || method.role.is_none();
        let before = method.milestone(0.0).map(|stone| stone.ppl.mean.ln());
        let before = before.or_else(|| only_made.then_some(method.nll.mean));
        [before.map_or("–".into(), show), if only_made { "–".into() } else { show(method.nll.mean) }]
    }

    /// Draws loss against the time of a token by kind of work, and against activated parameters. The names are for a
    /// switch.
    pub(super) fn figures(&self) -> Vec<(String, Figure)> {
        let (what, base) = match self.has_budgets() {
            true => ("nats over the dense model", self.base().map_or(0.0, |base| base.nll.mean)),
            false => ("perplexity", 0.0),
        };
        let loss = |method: &MethodResult| match self.has_budgets() {
            true => method.nll.mean - base,
            false => method.ppl.mean,
        };
        let mark = |method: &MethodResult, x: f64, tip: String| Mark {
            name: self.name(method),
            x,
            y: loss(method),
            tip: format!("{}: {} {what}, {tip}", self.name(method), signed(loss(method), self.has_budgets())),
            emphasis: Self::emphasis(method),
        };
        let mut figures = Vec::new();
        for kind in self.kinds().into_iter().filter(|kind| *kind != "training").rev() {
            let marks = self.rows().into_iter().filter_map(|method| {
                let gain = if method.role.is_none() { 1.0 } else { self.gain(method, &kind)? };
                Some(mark(method, 100.0 / gain, format!("{:.0} % of the dense model's time", 100.0 / gain)))
            });
            let x = format!("measured time per token, {kind}, % of the dense model's");
            let id = format!("overview-{}", kind.replace(", ", "-").replace(' ', "-"));
            let title = format!("{} against time: {kind}", capital(what));
            figures.push((
                format!("time, {kind}"),
                Figure::scatter(id, &title, [&x, what], marks.collect()).note(NOTE),
            ));
        }
        // Decoding one text is what most programs wait for.
        figures.sort_by_key(|(name, _)| !name.ends_with(&frontier::work(1)));
        let dense = self.base().map_or(f64::NAN, |base| base.params_activated.mean);
        let marks = self.rows().into_iter().map(|method| {
            let share = 100.0 * method.params_activated.mean / dense;
            mark(method, share, format!("{share:.1} % of the parameters activated"))
        });
        let axes = ["activated parameters, % of the dense model's", what];
        let title = format!("{} against activated parameters", capital(what));
        figures.push((
            "activated parameters".to_owned(),
            Figure::scatter("overview-parameters", &title, axes, marks.collect()).note(NOTE),
        ));
        figures
    }

    /// Words where the tuned DSMoE wins, where it loses, and at what budget.
    pub(super) fn verdict(&self) -> Option<String> {
        use super::results::Verdict;
        let rows = self.rows();
        let main = rows.iter().find(|row| row.is_dsmoe())?;
        let names = |verdict: Verdict| {
            let comparisons = self.results.comparisons.iter().filter(|one| one.dsmoe == main.name);
            let found = comparisons.filter(|one| one.verdict == verdict);
            let in_rows = |name: &str| rows.iter().find(|row| row.name == name && row.role.is_some());
            found.filter_map(|one| in_rows(&one.other)).map(|row| self.name(row)).collect::<Vec<String>>()
        };
        let list = |names: Vec<String>, none: &str| {
            if names.is_empty() { none.to_owned() } else { names.join(", ") }
        };
        let active = 100.0 * self.results.setup.profile.active;
        let mut text = format!(
            "With {active} % of the FFNs active, `{}` beats {}; loses to {}",
            self.name(main),
            list(names(Verdict::Better), "no other method"),
            list(names(Verdict::Worse), "none"),
        );
        let level = names(Verdict::NotSignificant);
        if !level.is_empty() {
            text += &format!("; level with {}", level.join(", "));
        }
        text += ".";
        let gains = self.gains(main);
        if !gains.is_empty() {
            let words = |gain: &Gain| format!("{}: {:.2}x", gain.kind, gain.gain);
            let speeds: Vec<String> = gains.iter().map(words).collect();
            text += &format!(" Tokens per second beside dense: {}.", speeds.join("; "));
        }
        Some(text)
    }

    /// Explains why the tuned DSMoE is not faster than the dense model in some work.
    pub(super) fn slower(&self) -> Option<String> {
        let rows = self.rows();
        let main = rows.iter().find(|row| row.is_dsmoe())?;
        let slow: Vec<String> = self
            .gains(main)
            .into_iter()
            .filter(|gain| gain.gain < GAIN)
            .map(|gain| format!("{} ({:.2}x)", gain.kind, gain.gain))
            .collect();
        (!slow.is_empty()).then(|| {
            format!(
                "No time is saved in {}: there the router, the gathering of tokens by expert and the start of many small \
                 products cost what inactive experts save. The cost is fixed for each layer and token, so it weighs most in small \
                 models; several texts that are decoded together activate most experts between them.",
                slow.join(", ")
            )
        })
    }
}

const NOTE: &str =
    "Lower and further left is better. The dashed lines cross at the dense model before continued training.";

/// Words whether a row is faster than the dense model.
fn saves(gains: &[Gain]) -> String {
    let split = |fast: bool| -> Vec<&str> {
        gains.iter().filter(|gain| (gain.gain >= GAIN) == fast).map(|gain| gain.kind.as_str()).collect()
    };
    let (fast, slow) = (split(true), split(false));
    match (fast.len(), slow.len()) {
        (0, 0) => "–".to_owned(),
        (_, 0) => "yes".to_owned(),
        (0, _) => "no".to_owned(),
        (fast, slow_len) if fast >= slow_len => format!("not in {}", slow.join(", ")),
        _ => format!("only in {}", fast.join(", ")),
    }
}

fn signed(value: f64, signed: bool) -> String {
    if signed { format!("{value:+.3}") } else { super::chapters::plain(value) }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_time_is_worded_by_kind() {
        let of = |gains: &[(&str, f64)]| {
            let gains: Vec<Gain> =
                gains.iter().map(|&(kind, gain)| Gain { kind: kind.to_owned(), gain }).collect();
            saves(&gains)
        };
        assert_eq!(of(&[]), "–");
        assert_eq!(of(&[("prefill", 1.2), ("decode", 1.05)]), "yes");
        assert_eq!(of(&[("prefill", 1.0), ("decode", 0.97)]), "no");
        assert_eq!(of(&[("prefill", 1.2), ("decode", 1.4), ("decode of 8", 0.9)]), "not in decode of 8");
        assert_eq!(of(&[("prefill", 1.11), ("decode", 0.99), ("training", 1.0)]), "only in prefill");
    }
}
