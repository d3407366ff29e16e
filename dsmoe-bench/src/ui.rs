//! The output of a command: results to stdout, everything else to stderr.

use std::borrow::Cow;
use std::fmt::{Display, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::ColorChoice;
use serde::Serialize;

use crate::caller::Call;
use crate::remedies::worded;

/// The error of a stdout that its reader closed, which is not a failure of the command.
#[derive(Debug, thiserror::Error)]
#[error("stdout is closed")]
struct ClosedPipe;

/// The output of a command.
#[derive(Clone, Debug)]
pub(crate) struct Ui {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    /// True where another process prints the results.
    pub(crate) muted: bool,
    pub(crate) color: ColorChoice,
    /// The program that runs the command in its own process; none for a terminal.
    pub(crate) call: Option<Arc<Call>>,
}

impl Ui {
    /// Makes the output for a program that runs commands.
    pub(crate) fn of_call(call: Arc<Call>) -> Ui {
        Ui { json: true, quiet: false, muted: false, color: ColorChoice::Never, call: Some(call) }
    }

    /// Writes text to stdout unchanged, and flushes it.
    pub(crate) fn text(&mut self, text: &str) -> Result<()> {
        if self.muted {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Err(ClosedPipe.into()),
            Err(cause) => Err(anyhow::anyhow!("stdout: {cause}")),
            Ok(()) => Ok(()),
        }
    }

    /// Prints the result of a command: an object on one line with `--json`, otherwise the text that `human` returns, with
    /// control characters escaped.
    pub(crate) fn result<T: Serialize>(&mut self, value: &T, human: impl FnOnce(&T) -> String) -> Result<()> {
        if let Some(call) = &self.call {
            call.set_result(serde_json::to_string(value)?);
            return Ok(());
        }
        let mut text =
            if self.json { serde_json::to_string(value)? } else { plain(&human(value)).into_owned() };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        self.text(&text)
    }

    /// Prints a line on stderr, unless `--quiet` is set.
    pub(crate) fn note(&self, line: impl Display) {
        match &self.call {
            Some(call) => call.caller.note(&plain(&line.to_string())),
            None if self.quiet => {}
            None => stderr_line(line),
        }
    }

    /// Reports a failure: one line on stderr, and an object on stdout with `--json`.
    pub(crate) fn fail(&mut self, error: &anyhow::Error) -> ExitCode {
        if error.is::<ClosedPipe>() {
            return ExitCode::SUCCESS;
        }
        let message = one_line(error);
        error_line(self.color, &format!(" {message}"));
        if self.json {
            // The failure is on stderr already.
            let _ = self.text(&format!("{}\n", serde_json::json!({ "error": message })));
        }
        ExitCode::FAILURE
    }
}

/// Prints help, or what is wrong with a command line: on stderr with its usage, and as an object on stdout with `--json`.
/// Returns the exit status.
pub(crate) fn usage(error: &clap::Error, json: bool, color: ColorChoice) -> ExitCode {
    if !error.use_stderr() {
        // Nobody reads the help if this fails.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    // A command line without a command gets the help.
    let Some(rest) = text.strip_prefix("error:") else {
        let _ = error.print();
        return ExitCode::from(WRONG_USAGE);
    };
    error_line(color, rest.trim_end());
    if json {
        let message = usage_message(rest);
        let mut ui = Ui { json, quiet: false, muted: false, color, call: None };
        let _ = ui.text(&format!("{}\n", serde_json::json!({ "error": message, "wrong_usage": true })));
    }
    ExitCode::from(WRONG_USAGE)
}

/// Returns what is wrong with a command line in one line, of the text of an error behind its first word.
fn usage_message(rest: &str) -> String {
    const AFTER: [&str; 2] = ["Usage:", "For more information"];
    let is_message = |line: &&str| !AFTER.iter().any(|start| line.trim_start().starts_with(start));
    let lines = rest.lines().take_while(is_message).map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// Returns what is wrong with a command line in one line, as the command says it with `--json`.
pub(crate) fn wrong_usage(error: &clap::Error) -> String {
    let text = error.render().to_string();
    usage_message(text.strip_prefix("error:").unwrap_or(&text))
}

/// The exit status of wrong usage.
const WRONG_USAGE: u8 = 2;

/// Returns the beginning of an error, red on a terminal.
fn error_word(color: ColorChoice) -> &'static str {
    let colored = match color {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    if colored { "\u{1b}[1;31mdsmoe: error:\u{1b}[0m" } else { "dsmoe: error:" }
}

/// Prints an error on stderr, whose beginning may be red, and ignores failures.
fn error_line(color: ColorChoice, rest: &str) {
    let _ = writeln!(io::stderr().lock(), "{}{}", error_word(color), plain(rest));
}

/// Prints a line on stderr with control characters escaped, and ignores failures.
pub(crate) fn stderr_line(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{}", plain(&line.to_string()));
}

/// Escapes what a terminal would obey and not show: control characters but line ends and tabs, and those that turn the
/// direction of text. Names of files and texts in files may hold them.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let is_obeyed = |c: char| match c {
        '\n' | '\t' => false,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        c => c.is_control(),
    };
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

/// Words of the system, on Linux and macOS, that do not say what to do, and those of the command.
const SYSTEM: [(&str, &str); 4] = [
    ("No such file or directory (os error 2)", "there is no such file or folder"),
    ("Is a directory (os error 21)", "it is a folder; name a file"),
    ("Too many levels of symbolic links (os error 40)", LOOP),
    ("Too many levels of symbolic links (os error 62)", LOOP),
];
const LOOP: &str = "its links lead in a circle; put the file itself in their place";

/// Joins the chain of causes by `: `, without a cause that its outer error contains.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain() {
        let (plain, cause) = (cause.to_string(), worded(cause));
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) && !message.contains(&plain) {
            let _ = write!(message, ": {cause}");
        }
    }
    let message = SYSTEM.iter().fold(message, |message, (words, ours)| message.replace(words, ours));
    shortened(message.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Cuts the middle out of a message that repeats a long text of a file.
fn shortened(message: String) -> String {
    const HALF: usize = 1000;
    let length = message.chars().count();
    if length <= 2 * HALF {
        return message;
    }
    let start: String = message.chars().take(HALF).collect();
    let end: String = message.chars().skip(length - HALF).collect();
    format!("{start} ... {end}")
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn errors_of_the_system_say_what_to_do() {
        for (words, wanted) in SYSTEM {
            let error = anyhow!("{words}").context("a.json");
            assert_eq!(one_line(&error), format!("a.json: {wanted}"));
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert!(matches!(plain("näme\tof\na file"), Cow::Borrowed("näme\tof\na file")));
        let raw = "\u{1b}[31mx\u{7}\0\r\u{85}\u{202e}é";
        assert_eq!(plain(raw), r"\u{1b}[31mx\u{7}\u{0}\r\u{85}\u{202e}é");
    }

    #[test]
    fn a_chain_is_one_line_that_says_everything_once() {
        let error = anyhow!("no such\nfile").context("a.json: no such\nfile").context("loading");
        assert_eq!(one_line(&error), "loading: a.json: no such file");
        let long = one_line(&anyhow!("a.json: {}; copy it", "é".repeat(70_000)));
        assert!(
            long.chars().count() < 2100 && long.starts_with("a.json: éé") && long.ends_with("éé; copy it")
        );
    }
}
