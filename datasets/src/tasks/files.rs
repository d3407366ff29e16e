//! Finds a task's files in a folder of benchmarks.
//!
//! `FOLDER/<task>/` holds the files as they are distributed: Parquet or JSONL of the Hugging Face dataset, with or
//! without the folder of its configuration, or the original files. Of the files whose name, or else folder, says the
//! split, those are taken whose names say nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::read::{Format, format_of, stem};
use super::registry::tasks;
use super::split::Split;
use super::task::Task;
use crate::error::{Error, Result};

/// Folders below a task's folder that are searched.
const MAX_DEPTH: usize = 3;

/// Finds the files of `split` of `task` under `folder`, in the order in which they are read; none if there are none.
///
/// # Errors
/// No folder of the task, or several sets of files that match equally well.
pub(crate) fn find(folder: &Path, task: &Task, split: Split) -> Result<Option<Vec<PathBuf>>> {
    let Some(base) = task_folder(folder, task)? else {
        return Err(Error::task(
            task.name,
            format!("no folder `{}` in {}", task.folders.join("` or `"), folder.display()),
            format!("put its files there, or name them: {{task_file}} {}=FILE", task.name),
        ));
    };
    let mut files = Vec::new();
    search(&base, 0, &mut files)?;
    // Lines of text are rows of one task only; elsewhere they are notes.
    files.retain(|path| task.reads_lines || !matches!(format_of(path), Some((Format::Lines, _))));
    // Ordered by how much their names say besides the split, then by the name without the number of a shard.
    let mut sets: BTreeMap<(usize, String), Vec<PathBuf>> = BTreeMap::new();
    for path in files {
        if let Some((surplus, set)) = rate(&path, &base, task, split) {
            sets.entry((surplus, set)).or_default().push(path);
        }
    }
    let mut sets = sets.into_iter();
    let Some(((surplus, _), mut best)) = sets.next() else { return Ok(None) };
    if let Some(((same, _), other)) = sets.next()
        && same == surplus
    {
        let (one, other) = (best[0].display(), other[0].display());
        return Err(Error::task(
            task.name,
            format!("{one} and {other} both look like its {} split", split.name()),
            format!("keep one of them, or name it: {{task_file}} {}=FILE", task.name),
        ));
    }
    best.sort_unstable();
    Ok(Some(best))
}

/// Finds the folder of `task`: one of its names, or the one name that begins with its first.
pub(crate) fn task_folder(folder: &Path, task: &Task) -> Result<Option<PathBuf>> {
    let mut there: Vec<String> = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        if entry.path().is_dir() {
            there.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    there.sort_unstable();
    for name in &task.folders {
        if let Some(found) = there.iter().find(|folder| plain(folder) == plain(name)) {
            return Ok(Some(folder.join(found)));
        }
    }
    let begins = |folder: &&String| plain(folder).starts_with(&plain(&task.folders[0]));
    match there.iter().filter(begins).collect::<Vec<_>>()[..] {
        [one] => Ok(Some(folder.join(one))),
        _ => Ok(None),
    }
}

/// Converts to lower case without separators.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

fn search(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            if depth < MAX_DEPTH {
                search(&path, depth + 1, files)?;
            }
        } else if format_of(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

/// Rates how much the name of `path` says besides `split` and the task, and returns that name without the number of a
/// shard; none if it is not of `split`.
fn rate(path: &Path, base: &Path, task: &Task, split: Split) -> Option<(usize, String)> {
    let within = path.strip_prefix(base).ok()?;
    let folders: Vec<String> =
        within.parent()?.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    let name = words(&stem(path));
    let folders = words(&folders.join(" "));
    let says = |words: &[String], split: &[&str]| words.iter().any(|word| split.contains(&&word[..]));
    // The examples of a task may be of a split with a name of its own.
    let (own_word, usual) = ([task.shot_split], Split::Train.name());
    let (of_split, stand_ins) = match split {
        Split::Train if task.shot_split != usual => (&own_word[..], &[][..]),
        _ => (split.words(), split.stand_ins()),
    };
    let is_split = |given: &[&str]| says(&name, given) || (!says_split(&name) && says(&folders, given));
    let stand_in = !is_split(of_split);
    if stand_in && !is_split(stand_ins) {
        return None;
    }
    let config = words(&task.subset);
    let own = words(&task.folders.join(" "));
    let all: Vec<&String> = folders.iter().chain(&name).filter(|word| !is_shard(word)).collect();
    let known = |word: &str| {
        let split = [of_split, stand_ins].concat();
        let usual = ["data", "default", "of"];
        split.contains(&word) || usual.contains(&word) || config.iter().chain(&own).any(|own| own == word)
    };
    let surplus = all.iter().filter(|word| !known(word)).count();
    let lacks = |config: &[String]| config.iter().filter(|word| !all.contains(word)).count();
    let missing = lacks(&config);
    // Tasks may share a folder: a file that says another's configuration is that one's.
    let here = plain(&base.file_name()?.to_string_lossy());
    let all_tasks = tasks();
    let mut others = all_tasks
        .iter()
        .filter(|other| other.name != task.name && other.folders.iter().any(|folder| plain(folder) == here));
    let theirs = |other: &Task| !other.subset.is_empty() && lacks(&words(&other.subset)) == 0;
    if others.any(|other| theirs(other)) {
        return None;
    }
    let set = all.iter().map(|word| word.as_str()).collect::<Vec<_>>().join(" ");
    Some((4 * surplus + 2 * missing + usize::from(stand_in), set))
}

fn says_split(words: &[String]) -> bool {
    let splits = [Split::Train, Split::Validation, Split::Test];
    words.iter().any(|word| splits.iter().any(|split| split.words().contains(&&word[..])))
}

/// Recognises the number of a shard: `00000`, as in `train-00000-of-00002`.
fn is_shard(word: &str) -> bool {
    word.len() >= 4 && word.chars().all(|c| c.is_ascii_digit())
}

fn words(name: &str) -> Vec<String> {
    let words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}
