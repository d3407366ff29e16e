//! `dsmoe completions` and `dsmoe man`: what a shell and a reader of manuals get from the definition of the options.

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::cli::{Cli, Completions, Man};
use crate::files;
use crate::ui::Ui;

const NAME: &str = "dsmoe";

/// Prints the script of a shell.
pub(crate) fn script(args: &Completions, ui: &mut Ui) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), NAME, &mut script);
    ui.text(&String::from_utf8_lossy(&script))
}

/// Prints the manual page of the program, or writes one page for each command.
pub(crate) fn manual(args: &Man, ui: &mut Ui) -> Result<()> {
    let mut root = Cli::command();
    root.build();
    let Some(out) = &args.out else { return ui.text(&page(&root, NAME)?) };
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut pages = Vec::new();
    let mut open = vec![(NAME.to_owned(), &root)];
    while let Some((name, command)) = open.pop() {
        let path = out.join(format!("{name}.1"));
        files::check_file(&path, args.force)?;
        pages.push((path, page(command, &name)?));
        let shown = command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
        open.extend(shown.map(|sub| (format!("{name}-{}", sub.get_name()), sub)));
    }
    pages.sort();
    for (path, page) in &pages {
        files::write(path, page)?;
    }
    let pages: Vec<String> = pages.iter().map(|(path, _)| path.display().to_string()).collect();
    let text = format!("{}: {} pages\n", out.display(), pages.len());
    ui.result(&serde_json::json!({ "pages": pages }), |_| text)
}

fn page(command: &clap::Command, name: &str) -> Result<String> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).title(name.to_owned()).render(&mut page)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}
