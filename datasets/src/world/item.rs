//! Items of the probes, in the columns of the public benchmarks that they mirror.

use serde::Serialize;
use serde_json::{Map, Value};

/// One question of a probe. Written as JSON it is a row of the benchmark's public files.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Item {
    /// Choose the continuation of a text.
    HellaSwag {
        /// The activity.
        activity_label: String,
        /// Whole sentences.
        ctx_a: String,
        /// The start of the sentence that the endings end.
        ctx_b: String,
        /// Both.
        ctx: String,
        /// Four endings.
        endings: Vec<String>,
        /// Index of the right one.
        label: usize,
    },
    /// Say the last word.
    Lambada {
        /// A passage whose last word is asked for.
        text: String,
    },
    /// Choose the way that works.
    Piqa {
        /// The goal.
        goal: String,
        /// A way to do it.
        sol1: String,
        /// Another.
        sol2: String,
        /// 0 for `sol1`, 1 for `sol2`.
        label: usize,
    },
    /// Choose what a person feels or does.
    SocialIqa {
        /// The event.
        context: String,
        /// The question.
        question: String,
        /// First answer.
        #[serde(rename = "answerA")]
        answer_a: String,
        /// Second answer.
        #[serde(rename = "answerB")]
        answer_b: String,
        /// Third answer.
        #[serde(rename = "answerC")]
        answer_c: String,
        /// `1`, `2` or `3`.
        label: String,
    },
    /// Choose the end of a story.
    StoryCloze {
        /// First sentence.
        input_sentence_1: String,
        /// Second sentence.
        input_sentence_2: String,
        /// Third sentence.
        input_sentence_3: String,
        /// Fourth sentence.
        input_sentence_4: String,
        /// A fifth sentence.
        sentence_quiz1: String,
        /// Another.
        sentence_quiz2: String,
        /// 1 or 2.
        answer_right_ending: usize,
    },
    /// Choose whom a gap means.
    WinoGrande {
        /// A sentence with the gap `_`.
        sentence: String,
        /// One that it can mean.
        option1: String,
        /// Another.
        option2: String,
        /// `1` or `2`.
        answer: String,
    },
    /// Work out a number.
    Gsm8k {
        /// The problem.
        question: String,
        /// The way, and on the last line `#### ` and the number.
        answer: String,
    },
    /// Answer from memory.
    NqOpen {
        /// The question, without its question mark.
        question: String,
        /// Right answers.
        answer: Vec<String>,
    },
    /// Answer from memory.
    TriviaQa {
        /// The question, without its question mark.
        question: String,
        /// Right answers.
        answer: TriviaAnswer,
    },
    /// Answer from memory; one of several answers.
    WebQs {
        /// The question.
        question: String,
        /// Right answers.
        answers: Vec<String>,
    },
}

/// The answer column of TriviaQA.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct TriviaAnswer {
    /// The usual answer.
    pub value: String,
    /// All ways to say it.
    pub aliases: Vec<String>,
}

impl Item {
    /// Returns the columns and their values.
    pub(super) fn row(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(row)) => row,
            other => unreachable!("an item is an object, not {other:?}"),
        }
    }

    pub(super) fn trivia_qa(question: String, aliases: Vec<String>) -> Item {
        Item::TriviaQa { question, answer: TriviaAnswer { value: aliases[0].clone(), aliases } }
    }
}
