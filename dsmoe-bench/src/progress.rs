//! Progress of long work on stderr: a bar on a terminal, otherwise a line every few seconds.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::caller::Call;
use crate::format;
use crate::ui::{Ui, plain, stderr_line};

/// The least time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// The time after which a line is printed at any number.
const LINE_ANYWAY: Duration = Duration::from_secs(60);

/// The unit of progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    Steps,
    Windows,
    Documents,
    Parts,
}

impl Unit {
    fn show(self, amount: f64) -> String {
        match self {
            Unit::Bytes => format::bytes(amount as u64),
            _ if amount < 1.0 && amount.fract() != 0.0 => format!("{amount:.2}"),
            _ if amount < 10.0 && amount.fract() != 0.0 => format!("{amount:.1}"),
            _ => format::count(amount as u64),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Unit::Bytes | Unit::Parts => "",
            Unit::Steps => " steps",
            Unit::Windows => " windows",
            Unit::Documents => " documents",
        }
    }
}

#[derive(Debug)]
enum Sink {
    Silent,
    Bar(ProgressBar),
    Lines {
        last: Instant,
    },
    /// A program that runs the command; `ends` tells whether work ends here if it is to stop.
    Call {
        call: Arc<Call>,
        ends: bool,
    },
}

/// The progress of one piece of work with a known end.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    unit: Unit,
    total: u64,
    /// The time and the count at which this run began; a resumed run does not begin at 0.
    started: Option<(Instant, u64)>,
    /// Plain lines are printed at multiples of this number.
    line_every: u64,
    sink: Sink,
}

impl Progress {
    /// Starts to show `what`, unless `--quiet` is set.
    pub(crate) fn new(ui: &Ui, what: impl Into<String>, unit: Unit, total: u64) -> Progress {
        let what = plain(&what.into()).into_owned();
        let sink = if let Some(call) = &ui.call {
            Sink::Call { call: call.clone(), ends: true }
        } else if ui.quiet {
            Sink::Silent
        } else if stderr().is_terminal() {
            let style = ProgressStyle::with_template("{prefix} [{bar:24}] {msg}")
                .expect("a constant template")
                .progress_chars("=> ");
            let bar = ProgressBar::new(total).with_style(style).with_prefix(what.clone());
            Sink::Bar(bar)
        } else {
            Sink::Lines { last: Instant::now() }
        };
        Progress { what, unit, total, started: None, line_every: 1, sink }
    }

    /// States that the work looks at the flag that stops it, and saves what it has done.
    pub(crate) fn polled(&mut self) {
        if let Sink::Call { ends, .. } = &mut self.sink {
            *ends = false;
        }
    }

    /// Restricts plain lines to multiples of `every`.
    pub(crate) fn line_every(&mut self, every: u64) {
        self.line_every = every;
    }

    /// Shows that `done` of `total` are done, followed by `detail`.
    pub(crate) fn set(&mut self, done: u64, total: u64, detail: &str) {
        match &self.sink {
            Sink::Silent | Sink::Call { ends: false, .. } => return,
            Sink::Call { call, .. } => return call.stop_here(),
            Sink::Bar(_) | Sink::Lines { .. } => {}
        }
        self.total = total;
        let (started, first) = *self.started.get_or_insert_with(|| (Instant::now(), done));
        let elapsed = started.elapsed().as_secs_f64();
        let rate = (done - first.min(done)) as f64 / elapsed.max(1e-9);
        let status = || {
            let unit = self.unit;
            let mut line = format!("{}/{}{}", unit.show(done as f64), unit.show(total as f64), unit.name());
            if !detail.is_empty() {
                line += &format!("  {detail}");
            }
            if rate > 0.0 && elapsed > 0.5 {
                let left = total.saturating_sub(done) as f64 / rate;
                line += &format!("  {}{}/s  eta {}", unit.show(rate), unit.name(), format::duration(left));
            }
            line
        };
        match &mut self.sink {
            Sink::Silent | Sink::Call { .. } => {}
            Sink::Bar(bar) => {
                bar.set_length(total);
                bar.set_message(plain(&status()).into_owned());
                bar.set_position(done);
            }
            Sink::Lines { last }
                if last.elapsed() >= LINE_ANYWAY
                    || (last.elapsed() >= LINE_EVERY && done.is_multiple_of(self.line_every)) =>
            {
                *last = Instant::now();
                stderr_line(format_args!("{}: {}", self.what, status()));
            }
            Sink::Lines { .. } => {}
        }
    }

    /// Does `work` with progress: its argument shows how much is done, and of how much.
    pub(crate) fn during<T>(
        ui: &Ui,
        what: impl Into<String>,
        unit: Unit,
        work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T,
    ) -> T {
        let mut progress = Progress::new(ui, what, unit, 0);
        let result = work(&mut |done, total| progress.set(done, total, ""));
        progress.finish();
        result
    }

    /// Prints a line, above the bar if there is one.
    pub(crate) fn note(&self, line: &str) {
        match &self.sink {
            Sink::Silent => {}
            Sink::Call { call, .. } => call.caller.note(&plain(line)),
            Sink::Bar(bar) => bar.suspend(|| stderr_line(line)),
            Sink::Lines { .. } => stderr_line(line),
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(self) {
        if let Sink::Bar(bar) = self.sink {
            bar.finish_and_clear();
        }
    }
}
