//! The command as a value, to which a program adds methods, FFN types, formats and benchmarks of its own.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{ColorChoice, CommandFactory, FromArgMatches};
use dsmoe_baselines::Method;
use dsmoe_core::ffn::FfnReader;
use dsmoe_datasets::corpus::CorpusFormat;

use crate::ui::Ui;
use crate::{cli, commands, ui, version};

/// The `dsmoe` command with what a program adds to it. A method appears in `methods`, `prune` and the profiles of `reproduce`; a
/// model directory with FFNs of an added type is loaded, trained and measured by every command; files of an added format
/// are text; and `eval` scores an added benchmark.
///
/// ```no_run
/// use dsmoe_baselines::Entry;
/// # use dsmoe_baselines::Configured;
/// # dsmoe_baselines::settings! {
/// #     /// Settings.
/// #     pub struct Narrow {}
/// # }
/// # fn configure(_: Narrow) -> dsmoe_baselines::Result<Box<dyn Configured>> {
/// #     dsmoe_baselines::method("dense")?.configure(&dsmoe_baselines::SettingValues::new())
/// # }
///
/// static NARROW: Entry<Narrow> = Entry {
///     name: "narrow",
///     summary: "the first neurons of every FFN",
///     ..Entry::new(configure)
/// };
///
/// fn main() -> std::process::ExitCode {
///     dsmoe_bench::Cli::new().method(&NARROW).run()
/// }
/// ```
///
/// Additions hold for the whole process, because models are loaded and method names are read in places that no command passes
/// arguments to.
#[derive(Default)]
pub struct Cli {
    methods: Vec<&'static dyn Method>,
    ffns: Vec<&'static FfnReader>,
    formats: Vec<&'static dyn CorpusFormat>,
    tasks: Vec<&'static str>,
}

impl Cli {
    /// Makes the command as it is.
    pub fn new() -> Cli {
        Cli::default()
    }

    /// Adds a method.
    #[must_use]
    pub fn method(mut self, method: &'static dyn Method) -> Cli {
        self.methods.push(method);
        self
    }

    /// Adds a type of FFN.
    #[must_use]
    pub fn ffn(mut self, reader: &'static FfnReader) -> Cli {
        self.ffns.push(reader);
        self
    }

    /// Adds a format of files with text.
    #[must_use]
    pub fn corpus(mut self, format: &'static dyn CorpusFormat) -> Cli {
        self.formats.push(format);
        self
    }

    /// Adds a benchmark: the text of a TOML file, as docs/tasks.md of the repository describes it.
    #[must_use]
    pub fn task(mut self, definition: &'static str) -> Cli {
        self.tasks.push(definition);
        self
    }

    /// Runs the command line of this process and returns its exit status.
    pub fn run(self) -> ExitCode {
        self.run_from(std::env::args_os())
    }

    /// Runs a command line that begins with the name of the program, prints the result or a failure in one line, and
    /// returns the exit status. The first call in a process determines the number of threads.
    pub fn run_from<T: Into<OsString> + Clone>(self, args: impl IntoIterator<Item = T>) -> ExitCode {
        let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        let color = color_of(&args);
        let command = cli::Cli::command().long_version(version::long()).color(color);
        let narrow = columns().is_some_and(|columns| columns < NARROW);
        let parsed = command.next_line_help(narrow).try_get_matches_from(&args);
        let cli = match parsed.and_then(|found| cli::Cli::from_arg_matches(&found)) {
            Ok(cli) => cli,
            Err(error) => return ui::usage(&error, args.iter().any(|arg| arg == "--json"), color),
        };
        let mut ui = Ui { json: cli.json, quiet: cli.quiet, muted: false, color: cli.color, call: None };
        match self.register().and_then(|()| commands::run(cli, &mut ui)) {
            Ok(code) => code,
            Err(error) => ui.fail(&error),
        }
    }

    /// Registers what was added, behind what every program has.
    fn register(&self) -> Result<()> {
        dsmoe_baselines::register();
        self.methods.iter().try_for_each(|method| dsmoe_baselines::add_method(*method))?;
        self.ffns.iter().try_for_each(|reader| dsmoe_core::ffn::register(reader))?;
        self.formats.iter().try_for_each(|format| dsmoe_datasets::corpus::add_format(*format))?;
        for (i, text) in self.tasks.iter().enumerate() {
            dsmoe_datasets::tasks::add_task(text, &format!("task {} of the program", i + 1))?;
        }
        Ok(())
    }
}

/// On a terminal of fewer columns the help of an option begins on the line after it: names of options are so long that beside them
/// a line would hold a word.
const NARROW: usize = 80;

/// Returns the width that help wraps at, found as clap finds it.
fn columns() -> Option<usize> {
    #[cfg(unix)]
    {
        use rustix::termios::tcgetwinsize;
        let sizes = [
            tcgetwinsize(std::io::stdout()),
            tcgetwinsize(std::io::stderr()),
            tcgetwinsize(std::io::stdin()),
        ];
        if let Some(size) = sizes.into_iter().flatten().find(|size| size.ws_col > 0) {
            return Some(size.ws_col.into());
        }
    }
    std::env::var("COLUMNS").ok()?.parse().ok()
}

/// Returns the value of `--color` before the line is parsed, since errors of parsing have colours too.
fn color_of(args: &[OsString]) -> ColorChoice {
    let words = || args.iter().filter_map(|arg| arg.to_str());
    let value = words()
        .find_map(|word| word.strip_prefix("--color="))
        .or_else(|| words().skip_while(|word| *word != "--color").nth(1));
    value.and_then(|value| value.parse().ok()).unwrap_or(ColorChoice::Auto)
}
