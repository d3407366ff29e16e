//! Tasks whose answer the model has to find itself, after five examples.

use super::choice::HELLASWAG;
use super::filter::{Filter, STRICT_ANSWER};
use super::metrics::{ExactMatch, Ignored, Metric};
use super::profile::Profile;
use super::row::Row;
use super::task::{Ask, Item, NOT_IN_030, Rules, Split, Task};
use crate::error::Result;

/// GSM8K: word problems.
pub(crate) const GSM8K: Task = Task {
    name: "gsm8k",
    folders: &["gsm8k"],
    subset: "main",
    split: Split::Test,
    version: 3.0,
    shots: 5,
    read: gsm8k,
    rules: gsm8k_rules,
    ..HELLASWAG
};

/// NaturalQuestions, answered from memory.
pub(crate) const NQ_OPEN: Task = Task {
    name: "nq_open",
    folders: &["nq_open"],
    version: 4.0,
    shots: 5,
    spare_shot: true,
    read: nq_open,
    rules: nq_open_rules,
    not_in: NOT_IN_030,
    ..HELLASWAG
};

/// TriviaQA, answered from memory.
pub(crate) const TRIVIAQA: Task = Task {
    name: "triviaqa",
    folders: &["triviaqa", "trivia_qa"],
    subset: "rc.nocontext",
    version: 3.0,
    read: triviaqa,
    rules: triviaqa_rules,
    not_in: &[],
    ..NQ_OPEN
};

/// WebQuestions: a right answer would be generated.
pub(crate) const WEBQS: Task = Task {
    name: "webqs",
    aliases: &["webquestions"],
    folders: &["webquestions", "webqs", "web_questions"],
    split: Split::Test,
    version: 2.0,
    spare_shot: false,
    read: webqs,
    rules: webqs_rules,
    not_in: &[(Profile::LmEval0412, "fails on its few-shot examples")],
    ..NQ_OPEN
};

/// The texts that end a short answer.
const SHORT: &[&str] = &["\n", ".", ","];

fn gsm8k(row: &Row, _: Profile) -> Result<Item> {
    let answer = row.filled(&["answer"])?.to_owned();
    if !STRICT_ANSWER.is_match(&answer) {
        return Err(
            row.wrong("`answer` does not end in `#### ` and a number", "take the row from the original")
        );
    }
    Ok(Item {
        prompt: format!("Question: {}\nAnswer:", row.filled(&["question"])?),
        shown: Some(format!(" {answer}")),
        ask: Ask::Generate { answers: vec![answer], list: false },
    })
}

fn gsm8k_rules(profile: Profile) -> Rules {
    if profile == Profile::LmEval030 {
        return Rules {
            until: &["\n"],
            filters: &[Filter::FirstNumber],
            ..Rules::of(&[Metric::AccOfNumber])
        };
    }
    let ignored = &[Ignored::Commas, Ignored::Dollars, Ignored::Working, Ignored::LastDot];
    Rules {
        until: &["Question:", "</s>", "<|im_end|>"],
        filters: &[Filter::Strict, Filter::Flexible],
        exact: ExactMatch { ignored, ignore_case: true, ignore_punctuation: false },
        ..Rules::of(&[Metric::ExactMatch])
    }
}

/// Returns the filters for a short answer.
fn short_filter(profile: Profile) -> &'static [Filter] {
    match profile {
        Profile::LmEval049 => &[Filter::StripStart],
        _ => &[Filter::Strip],
    }
}

fn nq_open(row: &Row, _: Profile) -> Result<Item> {
    let answers = row.texts(&["answer"], 1)?;
    Ok(Item {
        prompt: format!("Q: {}?\nA:", row.filled(&["question"])?),
        shown: Some(format!(" {}", answers[0])),
        ask: Ask::Generate { answers, list: true },
    })
}

fn nq_open_rules(profile: Profile) -> Rules {
    Rules {
        description: "Answer these questions:\n\n",
        delimiter: "\n",
        until: SHORT,
        filters: short_filter(profile),
        exact: ExactMatch { ignored: &[Ignored::Articles], ignore_case: true, ignore_punctuation: true },
        ..Rules::of(&[Metric::ExactMatch])
    }
}

fn triviaqa(row: &Row, profile: Profile) -> Result<Item> {
    let question = row.filled(&["question", "Question"])?;
    let Some((name, answer)) = row.find(&["answer", "Answer"]).filter(|(_, answer)| answer.is_object())
    else {
        return Err(row.wrong("no column `answer` with `aliases`", "give a file of triviaqa"));
    };
    let part = |names: [&str; 2]| names.iter().find_map(|name| answer.get(name));
    let Some(aliases) = part(["aliases", "Aliases"]) else {
        return Err(
            row.wrong(format!("`{name}` has no `aliases`"), "give a split with answers, such as validation")
        );
    };
    let aliases = row.list("aliases", aliases, 1)?;
    if profile != Profile::LmEval030 {
        return Ok(Item {
            prompt: format!("Question: {question}?\nAnswer:"),
            shown: Some(format!(" {}", aliases[0])),
            ask: Ask::Generate { answers: aliases, list: true },
        });
    }
    let Some(value) = part(["value", "Value"]).and_then(|value| value.as_str()) else {
        return Err(row.wrong(format!("`{name}` has no `value`"), "give a file of triviaqa"));
    };
    Ok(Item {
        prompt: format!("Question: {question}\nAnswer:"),
        shown: Some(format!(" {value}")),
        ask: Ask::AnyGreedy { answers: without_longer(aliases) },
    })
}

fn triviaqa_rules(profile: Profile) -> Rules {
    if profile == Profile::LmEval030 {
        return Rules::of(&[Metric::AnyAcc]);
    }
    Rules {
        until: SHORT,
        filters: short_filter(profile),
        exact: ExactMatch { ignored: &[], ignore_case: true, ignore_punctuation: true },
        ..Rules::of(&[Metric::ExactMatch])
    }
}

fn webqs(row: &Row, profile: Profile) -> Result<Item> {
    let answers = row.texts(&["answers"], 1)?;
    let shown = match profile {
        // The harness shows the first of the list of right choices, which are all of them.
        Profile::LmEval049 | Profile::LmEval0492 => " 0".to_owned(),
        Profile::Dsmoe | Profile::LmEval0412 | Profile::LmEval030 => format!(" {}", answers[0]),
    };
    Ok(Item {
        prompt: format!("Question: {}\nAnswer:", row.filled(&["question", "qText"])?),
        shown: Some(shown),
        ask: Ask::AnyGreedy { answers: without_longer(answers) },
    })
}

fn webqs_rules(profile: Profile) -> Rules {
    Rules::of(match profile {
        Profile::LmEval030 => &[Metric::AnyAcc],
        _ => &[Metric::AnyMatch],
    })
}

/// Sorts the answers and leaves out those that begin with the one kept before: a text with them has that one too.
fn without_longer(mut answers: Vec<String>) -> Vec<String> {
    answers.sort_unstable();
    answers.dedup_by(|answer, kept| answer.starts_with(kept.as_str()));
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_begins_with_a_kept_one_is_left_out() {
        let answers =
            ["New York City", "Boston", "New York", "Boston", "new york"].map(str::to_owned).to_vec();
        assert_eq!(without_longer(answers), ["Boston", "New York", "new york"]);
    }
}
