//! The list of all tasks: those of this crate, and those that a program or a user adds.

use std::fs;
use std::path::Path;
use std::sync::{LazyLock, PoisonError, RwLock};

use super::definition::{self, LONGEST};
use super::task::Task;
use crate::error::{Error, Result};
use crate::files::read_at_most;

/// The files of the tasks of this crate, in the order of the paper's table, then by name.
const OWN: [(&str, &str); 18] = [
    ("hellaswag.toml", include_str!("definitions/hellaswag.toml")),
    ("lambada_openai.toml", include_str!("definitions/lambada_openai.toml")),
    ("lambada_standard.toml", include_str!("definitions/lambada_standard.toml")),
    ("piqa.toml", include_str!("definitions/piqa.toml")),
    ("social_iqa.toml", include_str!("definitions/social_iqa.toml")),
    ("storycloze_2016.toml", include_str!("definitions/storycloze_2016.toml")),
    ("winogrande.toml", include_str!("definitions/winogrande.toml")),
    ("gsm8k.toml", include_str!("definitions/gsm8k.toml")),
    ("nq_open.toml", include_str!("definitions/nq_open.toml")),
    ("triviaqa.toml", include_str!("definitions/triviaqa.toml")),
    ("webqs.toml", include_str!("definitions/webqs.toml")),
    ("wikitext.toml", include_str!("definitions/wikitext.toml")),
    ("arc_challenge.toml", include_str!("definitions/arc_challenge.toml")),
    ("arc_easy.toml", include_str!("definitions/arc_easy.toml")),
    ("boolq.toml", include_str!("definitions/boolq.toml")),
    ("c4.toml", include_str!("definitions/c4.toml")),
    ("mmlu.toml", include_str!("definitions/mmlu.toml")),
    ("openbookqa.toml", include_str!("definitions/openbookqa.toml")),
];

/// Tasks, each with the text of its file.
#[derive(Default)]
struct Registry(Vec<(&'static Task, String)>);

impl Registry {
    /// Adds a task. One with the same text that is there already stays.
    fn add(&mut self, text: &str, place: &str, file: Option<&Path>) -> Result<&'static Task> {
        if let Some((task, _)) = self.0.iter().find(|(_, known)| known == text) {
            return Ok(task);
        }
        let task = definition::task(text, place, file)?;
        for name in task.aliases.iter().map(String::as_str).chain([task.name]) {
            if self.find(name).is_some() {
                return Err(Error::Twice { what: "task", name: name.to_owned() });
            }
        }
        let task: &'static Task = Box::leak(Box::new(task));
        self.0.push((task, text.to_owned()));
        Ok(task)
    }

    fn find(&self, name: &str) -> Option<&'static Task> {
        let is_called = |task: &Task| task.name == name || task.aliases.iter().any(|alias| alias == name);
        self.0.iter().map(|(task, _)| *task).find(|task| is_called(task))
    }
}

static TASKS: LazyLock<RwLock<Registry>> = LazyLock::new(|| {
    let mut registry = Registry::default();
    for (name, text) in OWN {
        if let Err(cause) = registry.add(text, name, None) {
            panic!("{cause}");
        }
    }
    RwLock::new(registry)
});

/// Returns the TOML files of the tasks of this crate, with their names: examples of what a file may say.
pub fn definitions() -> impl Iterator<Item = (&'static str, &'static str)> {
    OWN.into_iter()
}

/// Lists all tasks: those of this crate, the paper's first, then those that were added.
pub fn tasks() -> Vec<&'static Task> {
    TASKS.read().unwrap_or_else(PoisonError::into_inner).0.iter().map(|(task, _)| *task).collect()
}

/// Adds the task of a TOML text to those of this process. Adding it again changes nothing. `place` is what errors call the text.
///
/// # Errors
/// The text is no definition; another task has its name.
pub fn add_task(text: &str, place: &str) -> Result<&'static Task> {
    TASKS.write().unwrap_or_else(PoisonError::into_inner).add(text, place, None)
}

/// Adds the task of a TOML file, as [`add_task`] does. Files that it names are seen from its folder.
///
/// # Errors
/// Those of [`add_task`]; the file cannot be read.
pub fn add_task_file(path: &Path) -> Result<&'static Task> {
    if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::NotAFile { path: path.to_path_buf() });
    }
    let bytes = read_at_most(path, 2 * LONGEST as u64).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|cause| Error::NotUtf8 {
        path: path.to_path_buf(),
        offset: cause.utf8_error().valid_up_to() as u64,
    })?;
    let place = path.display().to_string();
    TASKS.write().unwrap_or_else(PoisonError::into_inner).add(&text, &place, Some(path))
}

impl Task {
    /// Finds the task called `name`; a name that ends in `.toml` is a file, whose task is added.
    ///
    /// # Errors
    /// There is none, or the file is no definition.
    pub fn named(name: &str) -> Result<&'static Task> {
        if name.ends_with(".toml") {
            return add_task_file(Path::new(name));
        }
        let found = TASKS.read().unwrap_or_else(PoisonError::into_inner).find(name);
        found.ok_or_else(|| {
            let names: Vec<&str> = tasks().iter().map(|task| task.name).collect();
            Error::task(name, "unknown", format!("use {}", names.join(", ")))
        })
    }
}
