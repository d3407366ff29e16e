//! Loads tasks: turns rows into prompts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::column::Column;
use super::files::{find, task_folder};
use super::form::{Form, Question};
use super::item::{Ask, Item};
use super::profile::Profile;
use super::random::Random;
use super::read::read_rows;
use super::request::{MAX_NEW_TOKENS, Request};
use super::row::Row;
use super::rules::Rules;
use super::split::Split;
use super::stored::Sampler;
use super::task::Task;
use crate::error::{Error, Result};

/// Seed of the few-shot examples.
const SHOT_SEED: u32 = 1234;
/// Seed of the order of documents and of the examples in harness 0.3.0.
const OLD_SEED: u32 = 42;

/// The files of tasks: a folder of benchmarks, files given by name, or both.
#[derive(Clone, Debug, Default)]
pub struct TaskFiles {
    /// A folder with a folder for each task.
    pub folder: Option<PathBuf>,
    /// Files to score, by the name of the task, in place of those in the folder.
    pub files: BTreeMap<String, Vec<PathBuf>>,
    /// Files to draw examples from, likewise.
    pub shot_files: BTreeMap<String, Vec<PathBuf>>,
}

impl TaskFiles {
    /// Uses the folder `folder`.
    pub fn folder(folder: &Path) -> TaskFiles {
        TaskFiles { folder: Some(folder.to_path_buf()), ..TaskFiles::default() }
    }

    /// Finds the files of `task` to score; none if there are none.
    ///
    /// # Errors
    /// A folder that cannot be read, or several sets of files that match equally well.
    pub fn files_of(&self, task: &Task) -> Result<Option<Vec<PathBuf>>> {
        if let (Some(folder), false) = (&self.folder, self.files.contains_key(task.name) || task.has_files())
            && task_folder(folder, task)?.is_none()
        {
            return Ok(None);
        }
        Ok(self.scored(task)?.map(|(_, files)| files))
    }

    /// Finds the split of `task` that is scored, with its files: its own, or the validation split in place of a test
    /// split.
    fn scored(&self, task: &Task) -> Result<Option<(Split, Vec<PathBuf>)>> {
        for split in [task.split, Split::Validation] {
            if let Some(files) = self.find(task, split)? {
                return Ok(Some((split, files)));
            }
        }
        Ok(None)
    }

    /// Finds the files that examples are drawn from, with the name of their split: the training split, or the validation
    /// split of a task whose test split `scored` is scored.
    fn examples(
        &self,
        task: &Task,
        scored: (Split, &[PathBuf]),
    ) -> Result<Option<(&'static str, Vec<PathBuf>)>> {
        if let Some(files) = self.find(task, Split::Train)? {
            return Ok(Some((task.shot_split, files)));
        }
        let (split, scored) = scored;
        match &self.folder {
            Some(folder)
                if split == Split::Test && !(self.files.contains_key(task.name) || task.has_files()) =>
            {
                let files = find(folder, task, Split::Validation)?.filter(|files| files != scored);
                Ok(files.map(|files| (Split::Validation.name(), files)))
            }
            _ => Ok(None),
        }
    }

    /// Returns the files of a split of a task.
    fn find(&self, task: &Task, split: Split) -> Result<Option<Vec<PathBuf>>> {
        let named = if split == Split::Train { &self.shot_files } else { &self.files };
        if let Some(files) = named.get(task.name) {
            return Ok(Some(files.clone()));
        }
        let own = &task.files[usize::from(split == Split::Train)];
        if !own.is_empty() {
            return Ok(Some(own.clone()));
        }
        match &self.folder {
            // A task whose files are named need not have a folder too.
            Some(folder)
                if split != Split::Train || !(self.files.contains_key(task.name) || task.has_files()) =>
            {
                find(folder, task, split)
            }
            _ => Ok(None),
        }
    }
}

/// Options for loading tasks.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The conventions.
    pub profile: Profile,
    /// Score only so many documents, the first ones.
    pub limit: Option<usize>,
    /// Tokens of a generated answer at the most.
    pub max_new_tokens: usize,
    /// Examples shown before each question, in place of the task's own number.
    pub shots: Option<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options { profile: Profile::default(), limit: None, max_new_tokens: MAX_NEW_TOKENS, shots: None }
    }
}

/// A document of a task.
#[derive(Clone, Debug)]
pub struct Document {
    /// Its number from 0 in the order of the profile.
    pub id: usize,
    /// Its row.
    pub fields: Map<String, Value>,
    /// The questions to a model.
    pub requests: Vec<Request>,
    pub(crate) item: Item,
    /// The part of the task that it belongs to, where the task has parts.
    pub(crate) group: Option<String>,
}

/// Serialises paths as text, in which bytes that are not UTF-8 become U+FFFD.
fn lossy<S: Serializer>(paths: &[PathBuf], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

/// The files of the documents and the examples of a task.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Origin {
    /// The split that is scored.
    pub split: &'static str,
    /// Its files.
    #[serde(serialize_with = "lossy")]
    pub files: Vec<PathBuf>,
    /// The split of the examples, where there are any.
    pub shot_split: Option<&'static str>,
    /// Their files.
    #[serde(serialize_with = "lossy")]
    pub shot_files: Vec<PathBuf>,
}

/// A task with its documents and prompts.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub(crate) task: &'static Task,
    pub(crate) name: String,
    pub(crate) profile: Profile,
    pub(crate) rules: Rules,
    pub(crate) documents: Vec<Document>,
    pub(crate) shots: usize,
    pub(crate) original: usize,
    pub(crate) origin: Origin,
}

impl Loaded {
    /// Reads the rows of `task` and writes its prompts. Without files of a test split the validation split is scored.
    /// Examples come from the training split; without one those of a test split come from the validation split, else they
    /// come from the scored split, never the document itself.
    ///
    /// # Errors
    /// No files, files that are not the task's, too few rows to draw examples from, examples of a task that has none, or a
    /// profile without the task. Each names the file, the row and a remedy.
    pub fn load(task: &'static Task, source: &TaskFiles, options: &Options) -> Result<Loaded> {
        let form = task.form(options.profile)?;
        let Some((split, files)) = source.scored(task)? else {
            return Err(Error::task(
                task.name,
                format!("no files of its {} split", task.split.name()),
                format!("put them into its folder, or name them: {{task_file}} {}=FILE", task.name),
            ));
        };
        let shots = shots(task, form, options)?;
        let examples = if shots > 0 { source.examples(task, (split, &files))? } else { None };
        let mut builder = Builder::new(task, form, options, (shots, examples.is_none()));
        for file in &files {
            read_rows(file, task.wrong_file, &mut |row| builder.document(row))?;
        }
        for file in examples.iter().flat_map(|(_, files)| files) {
            read_rows(file, task.wrong_file, &mut |row| builder.example(&row))?;
        }
        builder.origin = Origin {
            split: split.name(),
            files,
            shot_split: (shots > 0).then(|| examples.as_ref().map_or(split.name(), |(split, _)| *split)),
            shot_files: examples.map(|(_, files)| files).unwrap_or_default(),
        };
        builder.finish(task.name.to_owned())
    }

    /// Makes documents of rows in memory: `rows` are scored, examples come from `examples`. `name` is what the results
    /// call it and `place` what errors call the rows' file.
    ///
    /// # Errors
    /// Those of [`Loaded::load`].
    pub fn from_rows(
        task: &'static Task,
        (name, place): (&str, &str),
        rows: impl IntoIterator<Item = Map<String, Value>>,
        examples: impl IntoIterator<Item = Map<String, Value>>,
        options: &Options,
    ) -> Result<Loaded> {
        let form = task.form(options.profile)?;
        let shots = shots(task, form, options)?;
        let mut builder = Builder::new(task, form, options, (shots, false));
        let place: Arc<Path> = Path::new(place).into();
        for (number, fields) in (1..).zip(rows) {
            builder.document(Row::new(fields, Arc::clone(&place), number, task.wrong_file))?;
        }
        if shots > 0 {
            for (number, fields) in (1..).zip(examples) {
                builder.example(&Row::new(fields, Arc::clone(&place), number, task.wrong_file))?;
            }
        }
        builder.origin = Origin {
            split: task.split.name(),
            files: vec![place.to_path_buf()],
            shot_split: (shots > 0).then_some(Split::Train.name()),
            shot_files: Vec::new(),
        };
        builder.finish(name.to_owned())
    }

    /// Returns the task.
    pub fn task(&self) -> &'static Task {
        self.task
    }

    /// Returns its name in results.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the conventions.
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// Returns the documents, in their order.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// Returns how many examples stand before each question.
    pub fn shots(&self) -> usize {
        self.shots
    }

    /// Documents there are without a limit.
    pub fn original(&self) -> usize {
        self.original
    }

    /// Returns the files of the rows.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }
}

/// Returns how many examples are shown before each question.
fn shots(task: &Task, form: &Form, options: &Options) -> Result<usize> {
    match options.shots {
        Some(1..) if matches!(form.question, Question::Rolling { .. }) => Err(Error::task(
            task.name,
            "texts that are measured as a whole have no examples",
            "leave the task out, or give no {shots}",
        )),
        given => Ok(given.unwrap_or(task.shots)),
    }
}

struct Builder {
    task: &'static Task,
    form: &'static Form,
    options: Options,
    shots: usize,
    /// Examples come from the scored documents.
    own_examples: bool,
    rows: Vec<Asked>,
    examples: Vec<Example>,
    seen: usize,
    origin: Origin,
}

/// A row that is scored.
struct Asked {
    fields: Map<String, Value>,
    item: Item,
    /// The beginning of its prompt.
    description: String,
    /// The value that examples of a document share with it.
    alike: Option<String>,
    group: Option<String>,
}

/// A document that may be shown before a question.
struct Example {
    item: Item,
    alike: Option<String>,
}

impl Builder {
    fn new(
        task: &'static Task,
        form: &'static Form,
        options: &Options,
        (shots, without_examples): (usize, bool),
    ) -> Builder {
        let own_examples = shots > 0 && without_examples;
        let (rows, examples, origin) = (Vec::new(), Vec::new(), Origin::default());
        Builder { task, form, options: *options, shots, own_examples, rows, examples, seen: 0, origin }
    }

    fn old(&self) -> bool {
        self.options.profile == Profile::LmEval030
    }

    fn document(&mut self, row: Row) -> Result<()> {
        self.seen += 1;
        // Rows beyond the limit are counted only, unless they are drawn from.
        let limit = self.options.limit.unwrap_or(usize::MAX);
        if self.seen > limit && !self.own_examples && !self.old() {
            return Ok(());
        }
        let (item, alike) = (self.form.item(&row)?, self.alike(&row)?);
        if self.own_examples {
            self.examples.push(Example { item: item.clone(), alike: alike.clone() });
        }
        if self.seen <= limit || self.old() {
            let (description, group) =
                (self.form.description(&row)?, text_of(self.task.group.as_ref(), &row)?);
            self.rows.push(Asked { fields: self.logged(row, &item), item, description, alike, group });
        }
        Ok(())
    }

    /// Returns what the examples of a row are alike in.
    fn alike(&self, row: &Row) -> Result<Option<String>> {
        text_of(self.task.alike.as_ref(), row)
    }

    /// Returns the row as samples show it.
    fn logged(&self, row: Row, item: &Item) -> Map<String, Value> {
        let labelled = row.find(&["label", "answer"]).is_some();
        let mut fields = row.fields;
        if let (Some(label), false) = (row.label, labelled) {
            fields.insert("label".into(), label.into());
        }
        if let (Ask::Choice { choices, gold }, true) = (&item.ask, self.task.logs_choices) {
            fields.insert("query".into(), item.prompt.clone().into());
            fields.insert("choices".into(), choices.clone().into());
            fields.insert("gold".into(), (*gold).into());
        }
        fields
    }

    fn example(&mut self, row: &Row) -> Result<()> {
        self.examples.push(Example { item: self.form.item(row)?, alike: self.alike(row)? });
        Ok(())
    }

    fn finish(mut self, name: String) -> Result<Loaded> {
        let wrong = |reason: String, help: String| Error::task(&name, reason, help);
        let shots = self.shots;
        if self.rows.is_empty() {
            let files = self.origin.files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>();
            return Err(wrong(format!("no row in {}", files.join(", ")), "give a file with rows".into()));
        }
        // One more is drawn where the document itself may be among them; then it is left out.
        let spare = self.own_examples || (shots > 0 && !self.old() && self.task.spare_shot);
        let drawn = if shots > 0 { shots.saturating_add(usize::from(spare)) } else { 0 };
        if self.examples.len() < drawn {
            return Err(wrong(
                format!("{} rows to draw {drawn} examples from", self.examples.len()),
                format!("name a training file: {{shots_file}} {}=FILE", self.task.name),
            ));
        }
        let mut random = Random::new(if self.old() { OLD_SEED } else { SHOT_SEED });
        if self.old() {
            random.shuffle(&mut self.rows);
            self.rows.truncate(self.options.limit.unwrap_or(usize::MAX));
        }
        let (max_tokens, old) = (self.options.max_new_tokens, self.old());
        let Builder { task, form, examples, rows, .. } = self;
        let rules = form.rules.clone();
        let document = |(id, asked): (usize, Asked)| {
            let Asked { fields, item, description, alike, group } = asked;
            let fits = |&i: &usize| examples[i].alike == alike && (!spare || examples[i].item != item);
            let mut picked: Vec<usize> = match task.sampler {
                Sampler::Random => random.sample(examples.len().max(drawn), drawn),
                Sampler::First if shots > 0 => (0..examples.len()).collect(),
                Sampler::First => Vec::new(),
            };
            picked.retain(fits);
            // A document that is there several times may have been drawn several times.
            if picked.len() < shots && task.sampler == Sampler::Random {
                let others: Vec<usize> = (0..examples.len()).filter(fits).collect();
                if others.len() >= shots {
                    picked = random.sample(others.len(), shots).into_iter().map(|i| others[i]).collect();
                }
            }
            if picked.len() < shots && task.sampler == Sampler::First {
                let of = alike.map(|value| format!(" of {value}")).unwrap_or_default();
                return Err(Error::task(
                    &name,
                    format!("document {id}: {} examples{of}, and {shots} are asked for", picked.len()),
                    format!("ask for fewer, or name a larger file: {{shots_file}} {}=FILE", task.name),
                ));
            }
            let mut before = description;
            for Example { item, .. } in picked.iter().take(shots).map(|&i| &examples[i]) {
                before += &item.prompt;
                // The space of a last word belongs to it; later releases put one more before it.
                if matches!(item.ask, Ask::LastWord { .. }) && !old {
                    before.push(' ');
                }
                before += item.shown.as_deref().unwrap_or_default();
                before += &rules.delimiter;
            }
            Ok(Document { id, requests: requests(&before, &item, &rules, max_tokens), fields, item, group })
        };
        let documents = rows.into_iter().enumerate().map(document).collect::<Result<_>>()?;
        let (profile, original, origin) = (self.options.profile, self.seen, self.origin);
        Ok(Loaded { task, name, profile, rules, documents, shots, original, origin })
    }
}

/// Returns the text of a column, where there is one.
fn text_of(column: Option<&Column>, row: &Row) -> Result<Option<String>> {
    column.map(|column| Ok(column.text(row)?.into_owned())).transpose()
}

/// Returns the questions of a document, with `before` in front of each.
fn requests(before: &str, item: &Item, rules: &Rules, max_tokens: usize) -> Vec<Request> {
    let behind = |context: &str| -> Arc<str> { format!("{before}{context}").into() };
    let context = behind(&item.prompt);
    let likelihood = |context: &Arc<str>, continuation: String| Request::LogLikelihood {
        context: Arc::clone(context),
        continuation,
    };
    match &item.ask {
        Ask::Choice { choices: texts, .. } | Ask::AnyGreedy { answers: texts } => {
            texts.iter().map(|text| likelihood(&context, format!(" {text}"))).collect()
        }
        Ask::Gap { prompts, ending, .. } => {
            prompts.iter().map(|prompt| likelihood(&behind(prompt), ending.clone())).collect()
        }
        Ask::LastWord { word } => vec![likelihood(&context, word.clone())],
        Ask::Generate { .. } => vec![Request::Generate { context, until: rules.until, max_tokens }],
        Ask::Rolling { .. } => vec![Request::Rolling { text: item.prompt.clone() }],
    }
}
