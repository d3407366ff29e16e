//! Tasks that choose the likeliest of several continuations.

use std::sync::LazyLock;

use regex::Regex;

use super::metrics::Metric;
use super::profile::Profile;
use super::row::Row;
use super::task::{Ask, Item, NOT_IN_030, Rules, Split, Task};
use super::text::{capitalize, strip};
use crate::error::Result;

/// Hellaswag: the continuation of a description of an activity, or of an instruction.
pub(crate) const HELLASWAG: Task = Task {
    name: "hellaswag",
    aliases: &[],
    folders: &["hellaswag"],
    subset: "",
    split: Split::Validation,
    version: 1.0,
    shots: 0,
    spare_shot: false,
    reads_lines: false,
    read: hellaswag,
    rules: normed,
    not_in: &[],
};

/// PIQA: which of two ways reaches a goal.
pub(crate) const PIQA: Task = Task { name: "piqa", folders: &["piqa"], read: piqa, ..HELLASWAG };

/// SIQA: what people want, feel or do.
pub(crate) const SOCIAL_IQA: Task = Task {
    name: "social_iqa",
    aliases: &["siqa"],
    folders: &["siqa", "social_iqa", "social_i_qa"],
    version: 0.0,
    read: social_iqa,
    rules: plain,
    not_in: NOT_IN_030,
    ..HELLASWAG
};

/// The story cloze test of 2016: which of two sentences ends a story.
pub(crate) const STORYCLOZE: Task = Task {
    name: "storycloze_2016",
    aliases: &["storycloze"],
    folders: &["storycloze", "storycloze_2016", "story_cloze"],
    subset: "2016",
    split: Split::Test,
    read: storycloze,
    rules: plain,
    not_in: NOT_IN_030,
    ..HELLASWAG
};

fn plain(_: Profile) -> Rules {
    Rules::of(&[Metric::Acc])
}

fn normed(profile: Profile) -> Rules {
    Rules::of(match profile {
        Profile::Dsmoe => &[Metric::Acc, Metric::AccNorm, Metric::AccBytes],
        _ => &[Metric::Acc, Metric::AccNorm],
    })
}

fn item(prompt: String, choices: Vec<String>, gold: usize) -> Item {
    Item { prompt, shown: Some(format!(" {}", choices[gold])), ask: Ask::Choice { choices, gold } }
}

fn hellaswag(row: &Row, _: Profile) -> Result<Item> {
    let label = row.filled(&["activity_label"])?;
    let (ctx_a, ctx_b) = match row.find(&["ctx_a"]) {
        Some(_) => (row.text(&["ctx_a"])?, row.text(&["ctx_b"])?),
        None => divide(row.filled(&["ctx"])?),
    };
    let endings: Vec<String> =
        row.texts(&["endings"], 2)?.iter().map(|ending| without_markup(ending)).collect();
    if let Some(i) = endings.iter().position(String::is_empty) {
        return Err(
            row.wrong(format!("text {i} of `endings` is markup alone"), "take the row from the original")
        );
    }
    let gold = row.label(&["label"], 0, endings.len())?;
    let query = without_markup(&format!("{label}: {ctx_a} {}", capitalize(ctx_b)));
    Ok(item(query, endings, gold))
}

/// Returns the whole sentences of a context, and the beginning of a sentence behind them.
fn divide(ctx: &str) -> (&str, &str) {
    static WHOLE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r#"[.!?]["')\]]*\s*$"#).expect("a constant"));
    match ctx.rfind(". ") {
        _ if WHOLE.is_match(ctx) => (ctx, ""),
        Some(at) => (&ctx[..=at], &ctx[at + 2..]),
        None => ("", ctx),
    }
}

/// Takes out what is left of the markup of WikiHow.
fn without_markup(text: &str) -> String {
    static TAG: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a constant"));
    let text = strip(text).replace(" [title]", ". ");
    TAG.replace_all(&text, "").replace("  ", " ")
}

fn piqa(row: &Row, _: Profile) -> Result<Item> {
    let prompt = format!("Question: {}\nAnswer:", row.text(&["goal"])?);
    let choices = vec![row.filled(&["sol1"])?.to_owned(), row.filled(&["sol2"])?.to_owned()];
    let gold = row.label(&["label"], 0, 2)?;
    Ok(item(prompt, choices, gold))
}

fn social_iqa(row: &Row, _: Profile) -> Result<Item> {
    let prompt = format!("Q: {} {}\nA:", row.text(&["context"])?, row.filled(&["question"])?);
    let answers = [["answerA"], ["answerB"], ["answerC"]];
    let choices = answers.iter().map(|name| row.filled(name).map(str::to_owned)).collect::<Result<_>>()?;
    let gold = row.label(&["label"], 1, 3)?;
    Ok(item(prompt, choices, gold))
}

fn storycloze(row: &Row, _: Profile) -> Result<Item> {
    let sentences = [
        ["input_sentence_1", "InputSentence1"],
        ["input_sentence_2", "InputSentence2"],
        ["input_sentence_3", "InputSentence3"],
        ["input_sentence_4", "InputSentence4"],
    ];
    let quiz =
        [["sentence_quiz1", "RandomFifthSentenceQuiz1"], ["sentence_quiz2", "RandomFifthSentenceQuiz2"]];
    let sentences = sentences.iter().map(|names| row.filled(names)).collect::<Result<Vec<_>>>()?;
    let choices = quiz.iter().map(|names| row.filled(names).map(str::to_owned)).collect::<Result<_>>()?;
    let gold = row.label(&["answer_right_ending", "AnswerRightEnding"], 1, 2)?;
    Ok(item(sentences.join(" "), choices, gold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_goes_as_in_the_harness() {
        assert_eq!(without_markup(" [header] How to [title] Go. [step] Run.  \n"), " How to. Go. Run.");
        assert_eq!(without_markup("a   b [x\ny] c"), "a  b [x\ny] c");
    }

    #[test]
    fn a_context_is_divided_before_its_last_sentence() {
        assert_eq!(divide("A man sits. He is on a roof. he"), ("A man sits. He is on a roof.", "he"));
        assert_eq!(divide("How to win. Take the \"cup.\""), ("How to win. Take the \"cup.\"", ""));
        assert_eq!(divide("a man"), ("", "a man"));
    }
}
