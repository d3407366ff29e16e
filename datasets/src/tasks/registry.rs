//! The list of all tasks.

use super::task::Task;
use super::{answers, choice, cloze, rolling};
use crate::error::{Error, Result};

/// All tasks, in the order of the paper's table.
pub static TASKS: [Task; 12] = [
    choice::HELLASWAG,
    cloze::LAMBADA_OPENAI,
    cloze::LAMBADA_STANDARD,
    choice::PIQA,
    choice::SOCIAL_IQA,
    choice::STORYCLOZE,
    cloze::WINOGRANDE,
    answers::GSM8K,
    answers::NQ_OPEN,
    answers::TRIVIAQA,
    answers::WEBQS,
    rolling::WIKITEXT,
];

impl Task {
    /// Finds the task called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<&'static Task> {
        let found = TASKS.iter().find(|task| task.name == name || task.aliases.contains(&name));
        found.ok_or_else(|| {
            let names: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
            Error::task(name, "unknown", format!("use {}", names.join(", ")))
        })
    }
}
