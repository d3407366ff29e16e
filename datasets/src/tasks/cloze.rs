//! Tasks about what stands in a text: its last word, or whom a gap means.

use super::choice::HELLASWAG;
use super::metrics::Metric;
use super::profile::Profile;
use super::row::Row;
use super::task::{Ask, Item, Rules, Split, Task};
use super::text::strip;
use crate::error::Result;

/// LAMBADA with the texts as OpenAI set them.
pub(crate) const LAMBADA_OPENAI: Task = Task {
    name: "lambada_openai",
    aliases: &["lambada"],
    folders: &["lambada_openai", "lambada"],
    split: Split::Test,
    read: lambada,
    rules: lambada_rules,
    ..HELLASWAG
};

/// LAMBADA with the original texts, cut into words.
pub(crate) const LAMBADA_STANDARD: Task = Task {
    name: "lambada_standard",
    aliases: &[],
    folders: &["lambada_standard", "lambada"],
    subset: "plain_text",
    reads_lines: true,
    ..LAMBADA_OPENAI
};

/// WinoGrande: which of two words a gap stands for, by how likely the rest of the sentence is.
pub(crate) const WINOGRANDE: Task = Task {
    name: "winogrande",
    aliases: &[],
    folders: &["winogrande"],
    subset: "winogrande_xl",
    split: Split::Validation,
    read: winogrande,
    rules: |_| Rules::of(&[Metric::Acc]),
    ..LAMBADA_OPENAI
};

fn lambada_rules(profile: Profile) -> Rules {
    Rules::of(match profile {
        Profile::LmEval030 => &[Metric::Ppl, Metric::Acc],
        _ => &[Metric::Perplexity, Metric::Acc],
    })
}

fn lambada(row: &Row, _: Profile) -> Result<Item> {
    let text = row.filled(&["text"])?;
    let (prompt, word) = text.rsplit_once(' ').unwrap_or(("", text));
    let word = format!(" {word}");
    Ok(Item { prompt: prompt.to_owned(), shown: Some(word.clone()), ask: Ask::LastWord { word } })
}

fn winogrande(row: &Row, _: Profile) -> Result<Item> {
    let sentence = row.filled(&["sentence"])?;
    let Some((before, after)) = sentence.split_once('_') else {
        return Err(row.wrong("`sentence` has no gap `_`", "take the row from the original"));
    };
    let options = [row.filled(&["option1"])?, row.filled(&["option2"])?];
    let gold = row.label(&["answer"], 1, 2)?;
    let prompts: Vec<String> = options.iter().map(|option| format!("{before}{option}")).collect();
    let ending = format!(" {}", strip(after));
    Ok(Item {
        prompt: prompts[gold].clone(),
        shown: Some(ending.clone()),
        ask: Ask::Gap { prompts, ending, gold },
    })
}
