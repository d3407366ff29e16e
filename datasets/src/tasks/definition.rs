//! Reads the TOML file of a task.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde::Deserialize;

use super::column::{Column, Gold};
use super::filter::Filter;
use super::form::{Answers, Choices, Cut, CutAt, Form, Prompt, Question, TextList};
use super::metrics::{ExactMatch, Ignored, Metric};
use super::profile::Profile;
use super::rules::Rules;
use super::stored::{
    Names, Output, Sampler, Stored, StoredColumn, StoredCut, StoredExact, StoredFilter, StoredGold, Texts,
};
use super::task::Task;
use super::template::{Change, Template};
use crate::error::{Error, Result, shown};

/// The largest file of a task, in bytes.
pub(super) const LONGEST: usize = 1 << 20;

/// A problem of a definition and its fix: `key: problem; fix`.
type Wrong<T> = std::result::Result<T, String>;

/// Reads a task from the text of a file. `place` names the file in errors; it is a path for a user's file. What the task has
/// to say for the rest of the process is leaked: tasks are registered once and for good.
pub(crate) fn task(text: &str, place: &str, file: Option<&Path>) -> Result<Task> {
    let wrong = |reason: String| {
        let (reason, help) = match reason.split_once("; ") {
            Some((reason, help)) => (reason.to_owned(), help.to_owned()),
            None => (reason, "docs/tasks.md describes the keys".to_owned()),
        };
        Error::file(Path::new(place), shown(&reason), shown(&help))
    };
    if text.len() > LONGEST {
        return Err(wrong(format!("is longer than {} MiB; it is not a task", LONGEST >> 20)));
    }
    let stored: Stored = toml::from_str(text).map_err(|cause| wrong(of_toml(text, &cause)))?;
    check_name(&stored).map_err(wrong)?;
    let mut table: toml::Table = toml::from_str(text).map_err(|cause| wrong(of_toml(text, &cause)))?;
    table.remove("profile");
    for name in stored.profile.keys() {
        name.parse::<Profile>().map_err(|cause| wrong(format!("profile.{name}: {cause}")))?;
    }
    let in_release = |profile: Profile| -> Wrong<std::result::Result<Form, String>> {
        let Some(changes) = stored.profile.get(profile.name()) else { return Ok(Ok(form(&stored, true)?)) };
        let mut merged = table.clone();
        merged.extend(changes.clone());
        let of_release = |cause: String| format!("profile.{profile}: {cause}");
        let changed = Stored::deserialize(merged).map_err(|cause| of_release(of_toml("", &cause)))?;
        match changed.absent.clone() {
            Some(reason) => Ok(Err(shown(&reason))),
            None => Ok(Ok(form(&changed, false).map_err(of_release)?)),
        }
    };
    let forms = Profile::ALL.into_iter().map(|profile| Ok((profile, in_release(profile)?)));
    let forms = forms.collect::<Wrong<Vec<_>>>().map_err(wrong)?;
    let column =
        |name: &String| stored.columns.get(name).map_or_else(|| Ok(Column::plain(name)), |c| column(name, c));
    stored.alike.iter().try_for_each(|name| check_column("alike", name)).map_err(wrong)?;
    let alike = stored.alike.as_ref().map(column).transpose().map_err(wrong)?;
    stored.group.iter().try_for_each(|name| check_column("group", name)).map_err(wrong)?;
    let group = stored.group.as_ref().map(column).transpose().map_err(wrong)?;
    let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
    let seen = |files: &[PathBuf]| files.iter().map(|path| folder.join(path)).collect();
    let wrong_file = match file {
        None => format!("give a file of {}", stored.name),
        Some(file) => format!("give a file of {}, or name its columns in {}", stored.name, file.display()),
    };
    Ok(Task {
        name: leak(&stored.name),
        about: leak(&stored.about),
        folders: if stored.folders.is_empty() { vec![stored.name.clone()] } else { stored.folders },
        aliases: stored.aliases,
        subset: stored.subset,
        split: stored.split,
        version: stored.version,
        shots: stored.shots,
        spare_shot: stored.spare_shot,
        shot_split: leak(&stored.shot_split),
        sampler: stored.sampler,
        alike,
        group,
        reads_lines: stored.lines,
        logs_choices: stored.log_choices,
        files: [seen(&stored.files), seen(&stored.shot_files)],
        wrong_file: leak(&wrong_file),
        forms,
    })
}

fn leak(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

/// Words an error of the TOML parser.
fn of_toml(text: &str, cause: &toml::de::Error) -> String {
    let message = shown(&cause.message().split_whitespace().collect::<Vec<_>>().join(" "));
    match cause.span() {
        Some(span) if !text.is_empty() => {
            let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
        _ => message,
    }
}

fn check_name(stored: &Stored) -> Wrong<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let name = &stored.name;
    if name.is_empty() || !name.chars().all(fits) || name.ends_with(".toml") {
        return Err("name: is not a name; use letters, digits, `_`, `-` and `.`".to_owned());
    }
    if ["all", "world"].contains(&&name[..]) {
        return Err(format!("name: {name} means several tasks; use another name"));
    }
    match stored.absent {
        Some(_) => Err("absent: belongs to a release; write it below [profile.\"lm-eval-0.3.0\"]".to_owned()),
        None => Ok(()),
    }
}

/// Makes the definition in one release. `strict` refuses keys without a use, of which a release may inherit some.
fn form(stored: &Stored, strict: bool) -> Wrong<Form> {
    check_keys(stored, strict)?;
    let columns = stored.columns.iter().map(|(name, stored)| Ok((name.clone(), column(name, stored)?)));
    let columns: BTreeMap<String, Column> = columns.collect::<Wrong<_>>()?;
    let cuts = stored.cut.iter().map(cut).collect::<Wrong<_>>()?;
    let rules = rules(stored)?;
    let question = question(stored, &columns)?;
    Ok(Form { columns, cuts, question, rules })
}

/// Checks that the keys that the output needs are there and, if `strict`, that every key is used.
fn check_keys(stored: &Stored, strict: bool) -> Wrong<()> {
    use Output::{
        AnyGreedy, GenerateUntil, Loglikelihood, LoglikelihoodRolling, MultipleChoice, PartialScoring,
    };
    let output = stored.output;
    let with_gold = &[MultipleChoice, PartialScoring][..];
    let with_target = &[PartialScoring, Loglikelihood, AnyGreedy, GenerateUntil][..];
    let generated = &[GenerateUntil][..];
    let all_but_gap = &[MultipleChoice, Loglikelihood, AnyGreedy, GenerateUntil, LoglikelihoodRolling][..];
    let keys: [(&str, bool, &[Output], bool); 13] = [
        ("prompt", stored.prompt.is_some(), all_but_gap, true),
        ("prompts", stored.prompts.is_some(), &[PartialScoring], true),
        ("prompt_filters", !stored.prompt_filters.is_empty(), all_but_gap, false),
        ("choices", stored.choices.is_some(), &[MultipleChoice], true),
        ("choice_filters", !stored.choice_filters.is_empty(), &[MultipleChoice], false),
        ("log_choices", stored.log_choices, &[MultipleChoice], false),
        ("gold", stored.gold.is_some(), with_gold, true),
        ("target", stored.target.is_some(), with_target, true),
        ("answers", stored.answers.is_some(), &[AnyGreedy, GenerateUntil], true),
        ("counted", stored.counted.is_some(), &[LoglikelihoodRolling], true),
        ("until", !stored.until.is_empty(), generated, false),
        ("filter", !stored.filter.is_empty(), generated, false),
        ("exact", stored.exact.is_some(), generated, false),
    ];
    for (key, given, outputs, needed) in keys {
        let used = outputs.contains(&output);
        if needed && used && !given {
            return Err(format!("{key}: is missing; the output {} needs it", word(output)));
        }
        if strict && given && !used {
            return Err(format!("{key}: is not used by the output {}; remove it", word(output)));
        }
    }
    if stored.shots > 0 && output == LoglikelihoodRolling {
        return Err("shots: texts that are measured as a whole have no examples; remove it".to_owned());
    }
    if output == LoglikelihoodRolling
        && (stored.spare_shot || stored.alike.is_some() || !stored.shot_files.is_empty())
    {
        return Err(
            "spare_shot, alike, shot_files: describe examples, and texts that are measured as a whole have \
                    none; remove them"
                .to_owned(),
        );
    }
    if stored.group.is_some() && output == LoglikelihoodRolling {
        return Err("group: texts that are measured as a whole have no groups; remove it".to_owned());
    }
    if stored.shot_split.is_empty() || !stored.shot_split.chars().all(|c| c.is_ascii_lowercase()) {
        return Err(
            "shot_split: is not a word; use one of small letters, as in the names of files".to_owned()
        );
    }
    if stored.alike.is_some() && stored.sampler != Sampler::First {
        return Err("alike: stands beside a random sampler; add sampler = \"first\"".to_owned());
    }
    if stored.shots > 1000 {
        return Err("shots: is more than 1000; use fewer".to_owned());
    }
    Ok(())
}

/// Returns the word for an output.
fn word(output: Output) -> &'static str {
    match output {
        Output::MultipleChoice => "multiple_choice",
        Output::PartialScoring => "partial_scoring",
        Output::Loglikelihood => "loglikelihood",
        Output::AnyGreedy => "any_greedy",
        Output::GenerateUntil => "generate_until",
        Output::LoglikelihoodRolling => "loglikelihood_rolling",
    }
}

/// Puts the key before what is wrong with its value.
fn at<T>(key: &str, read: Wrong<T>) -> Wrong<T> {
    read.map_err(|cause| format!("{key}: {cause}"))
}

fn template(key: &str, source: &str) -> Wrong<Template> {
    at(key, Template::parse(source))
}

fn changes(key: &str, words: &[String]) -> Wrong<Vec<Change>> {
    at(key, words.iter().map(|word| Change::named(word)).collect())
}

fn regex(key: &str, source: &str) -> Wrong<Regex> {
    Regex::new(source).map_err(|cause| {
        let cause = cause.to_string();
        let reason = cause.lines().last().unwrap_or("is wrong").trim_start_matches("error: ");
        format!(
            "{key}: `{}` is no regular expression ({reason}); look-around and back-references are not known",
            shown(source)
        )
    })
}

fn names(key: &str, names: &Names) -> Wrong<Vec<String>> {
    let names = match names {
        Names::One(name) => vec![name.clone()],
        Names::Several(names) => names.clone(),
    };
    match names.is_empty() {
        true => Err(format!("{key}: has no name; name a column")),
        false => {
            names.iter().try_for_each(|name| check_column(key, name))?;
            Ok(names)
        }
    }
}

fn column(name: &str, stored: &StoredColumn) -> Wrong<Column> {
    let key = format!("columns.{name}");
    check_column(&key, name)?;
    let paths = match &stored.column {
        Some(given) => names(&format!("{key}.column"), given)?,
        None => vec![name.to_owned()],
    };
    let pattern = match &stored.matches {
        Some(source) => {
            let otherwise = stored.otherwise.clone().unwrap_or_else(|| format!("does not match `{source}`"));
            Some((regex(&format!("{key}.matches"), source)?, shown(&otherwise)))
        }
        None if stored.otherwise.is_some() => {
            return Err(format!("{key}.otherwise: has no use; add matches"));
        }
        None => None,
    };
    Ok(Column {
        paths,
        blank: stored.blank,
        number: stored.number,
        pattern,
        help: stored.help.as_deref().map(shown),
    })
}

/// Checks that a name can stand in a message.
fn check_column(key: &str, name: &str) -> Wrong<()> {
    match name.trim().is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
        true => Err(format!("{key}: {name:?} is not the name of a column; name one")),
        false => Ok(()),
    }
}

/// Finds the column called `name` among those that are described.
fn described(key: &str, columns: &BTreeMap<String, Column>, name: &str) -> Wrong<Column> {
    check_column(key, name)?;
    Ok(columns.get(name).cloned().unwrap_or_else(|| Column::plain(name)))
}

fn cut(stored: &StoredCut) -> Wrong<Cut> {
    let StoredCut { column, into, first, last, last_sentence, unless } = stored.clone();
    into.iter().chain([&column]).chain(&unless).try_for_each(|name| check_column("cut", name))?;
    let at = match (first, last, last_sentence) {
        (Some(at), None, false) if !at.is_empty() => CutAt::First(at),
        (None, Some(at), false) if !at.is_empty() => CutAt::Last(at),
        (None, None, true) => CutAt::LastSentence,
        _ => {
            return Err(format!(
                "cut of {column}: has no place, or several; give one of first, last, last_sentence"
            ));
        }
    };
    Ok(Cut { column, into, at, unless })
}

fn question(stored: &Stored, columns: &BTreeMap<String, Column>) -> Wrong<Question> {
    let prompt = || -> Wrong<Prompt> {
        let template = template("prompt", stored.prompt.as_deref().unwrap_or_default())?;
        Ok(Prompt { template, filters: changes("prompt_filters", &stored.prompt_filters)? })
    };
    let target = || template("target", stored.target.as_deref().unwrap_or_default());
    Ok(match stored.output {
        Output::MultipleChoice => Question::Choice {
            prompt: prompt()?,
            choices: Choices {
                texts: texts("choices", stored.choices.as_ref(), columns)?,
                filters: changes("choice_filters", &stored.choice_filters)?,
            },
            gold: gold(stored.gold.as_ref(), columns)?,
        },
        Output::PartialScoring => {
            let prompts = stored.prompts.iter().flatten().map(|text| template("prompts", text));
            let prompts: Vec<Template> = prompts.collect::<Wrong<_>>()?;
            if !(2..=1000).contains(&prompts.len()) {
                return Err(format!("prompts: has {} texts; give 2 to 1000", prompts.len()));
            }
            Question::Gap { prompts, ending: target()?, gold: gold(stored.gold.as_ref(), columns)? }
        }
        Output::Loglikelihood => Question::Target { prompt: prompt()?, target: target()? },
        Output::AnyGreedy => match stored.answers.as_ref() {
            Some(Texts::Column(name)) => {
                let answers = described("answers", columns, name)?;
                Question::AnyGreedy { prompt: prompt()?, answers, shown: target()? }
            }
            _ => return Err("answers: is not the name of a column; name one with a list of texts".to_owned()),
        },
        Output::GenerateUntil => {
            let answers = match stored.answers.as_ref() {
                Some(Texts::Column(name)) => Answers::Column(described("answers", columns, name)?),
                Some(Texts::Templates(texts)) if texts.len() == 1 => {
                    Answers::One(template("answers", &texts[0])?)
                }
                _ => {
                    return Err(
                        "answers: has several texts; give one template, or the name of a list".to_owned()
                    );
                }
            };
            Question::Generate { prompt: prompt()?, answers, shown: target()? }
        }
        Output::LoglikelihoodRolling => {
            check_column("counted", stored.counted.as_deref().unwrap_or_default())?;
            Question::Rolling { prompt: prompt()?, counted: stored.counted.clone().unwrap_or_default() }
        }
    })
}

fn texts(key: &str, stored: Option<&Texts>, columns: &BTreeMap<String, Column>) -> Wrong<TextList> {
    match stored {
        Some(Texts::Column(name)) => Ok(TextList::Column(described(key, columns, name)?)),
        Some(Texts::Templates(texts)) if (2..=1000).contains(&texts.len()) => {
            Ok(TextList::Templates(texts.iter().map(|text| template(key, text)).collect::<Wrong<_>>()?))
        }
        _ => Err(format!("{key}: has not 2 to 1000 texts; give a template for each, or the name of a list")),
    }
}

fn gold(stored: Option<&StoredGold>, columns: &BTreeMap<String, Column>) -> Wrong<Gold> {
    let Some(stored) = stored else {
        return Err("gold: is missing; name the column of the right choice".to_owned());
    };
    let of = |key: &str, given: &Names| -> Wrong<Column> {
        Ok(match given {
            Names::One(name) => described(key, columns, name)?,
            given => Column { paths: names(key, given)?, ..Column::plain("") },
        })
    };
    if stored.column.is_some() == stored.always.is_some() {
        return Err("gold: has no column, or one beside always; give one of the two".to_owned());
    }
    if stored.always.is_some() && (stored.among.is_some() || stored.first != 0 || stored.truth) {
        return Err("gold.always: stands beside keys for a column; remove them".to_owned());
    }
    let among = stored.among.as_ref().map(|given| of("gold.among", given)).transpose()?;
    if among.is_some() && (stored.first != 0 || stored.truth) {
        return Err("gold.among: stands beside first or truth, which are for numbers; keep one".to_owned());
    }
    if among.is_none() && !stored.filters.is_empty() {
        return Err(
            "gold.filters: change texts, and the right choice is a number; remove it or add among".to_owned()
        );
    }
    let filters = changes("gold.filters", &stored.filters)?;
    let column = match &stored.column {
        Some(given) => of("gold.column", given)?,
        None => Column::plain(""),
    };
    Ok(Gold {
        always: stored.always,
        column: Column { number: true, ..column },
        first: stored.first,
        truth: stored.truth,
        among,
        filters,
    })
}

fn rules(stored: &Stored) -> Wrong<Rules> {
    let filters: Vec<Filter> = stored.filter.iter().map(filter).collect::<Wrong<_>>()?;
    if stored.until.len() > 100 || filters.len() > 100 || stored.until.iter().any(String::is_empty) {
        return Err(
            "until: has an empty text, or there are more than 100; give texts that end an answer".to_owned()
        );
    }
    let metrics: Vec<Metric> =
        stored.metrics.iter().map(|word| metric(stored.output, word)).collect::<Wrong<_>>()?;
    if metrics.is_empty() {
        return Err("metrics: is empty; name one".to_owned());
    }
    let until: Vec<&'static str> = stored.until.iter().map(|text| leak(text)).collect();
    Ok(Rules {
        description: template("description", &stored.description)?,
        delimiter: stored.delimiter.clone(),
        until: Vec::leak(until),
        filters: if filters.is_empty() { vec![Filter::none()] } else { filters },
        metrics,
        exact: exact(&stored.exact.clone().unwrap_or_default())?,
    })
}

fn filter(stored: &StoredFilter) -> Wrong<Filter> {
    let StoredFilter { name, regex: source, take, remove, strip } = stored;
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    if name.is_empty() || !name.chars().all(fits) {
        return Err(format!("filter: {name:?} is not a name; use letters, digits, `_` and `-`"));
    }
    let source = source.as_ref().map(|source| regex(&format!("filter {name}: regex"), source)).transpose()?;
    Ok(Filter {
        name: leak(name),
        regex: source.map(|regex| (regex, *take)),
        remove: remove.clone(),
        strip: *strip,
    })
}

fn exact(stored: &StoredExact) -> Wrong<ExactMatch> {
    let ignored = stored.remove.iter().map(|word| {
        Ok(match &word[..] {
            "commas" => Ignored::Commas,
            "dollars" => Ignored::Dollars,
            "working" => Ignored::Working,
            "last_dot" => Ignored::LastDot,
            "articles" => Ignored::Articles,
            source => Ignored::Matches(regex("exact.remove", source)?),
        })
    });
    Ok(ExactMatch {
        ignored: ignored.collect::<Wrong<_>>()?,
        ignore_case: stored.ignore_case,
        ignore_punctuation: stored.ignore_punctuation,
    })
}

/// Finds the metric of that name for an output.
fn metric(output: Output, word: &str) -> Wrong<Metric> {
    const OF_OUTPUTS: [(Output, &[(&str, Metric)]); 6] = [
        (
            Output::MultipleChoice,
            &[("acc", Metric::Acc), ("acc_norm", Metric::AccNorm), ("acc_bytes", Metric::AccBytes)],
        ),
        (Output::PartialScoring, &[("acc", Metric::Acc)]),
        (
            Output::Loglikelihood,
            &[("perplexity", Metric::Perplexity), ("ppl", Metric::Ppl), ("acc", Metric::Acc)],
        ),
        (Output::AnyGreedy, &[("exact_match", Metric::AnyMatch), ("acc", Metric::AnyAcc)]),
        (Output::GenerateUntil, &[("exact_match", Metric::ExactMatch), ("acc", Metric::AccOfNumber)]),
        (
            Output::LoglikelihoodRolling,
            &[
                ("word_perplexity", Metric::WordPerplexity),
                ("byte_perplexity", Metric::BytePerplexity),
                ("bits_per_byte", Metric::BitsPerByte),
            ],
        ),
    ];
    let (_, known) = OF_OUTPUTS.iter().find(|(of, _)| *of == output).expect("every output has metrics");
    known.iter().find(|(name, _)| *name == word).map(|(_, metric)| *metric).ok_or_else(|| {
        let known: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        format!("metrics: `{word}` is no metric of {}; use {}", self::word(output), known.join(", "))
    })
}
