//! A document of a task, as it is asked.

/// A document as it is asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    /// The question.
    pub(crate) prompt: String,
    /// The answer as an example shows it, with the space before it; none where the task shows no examples.
    pub(crate) shown: Option<String>,
    pub(crate) ask: Ask,
}

/// A question to a model with its right answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ask {
    /// Asks which of several continuations is likeliest.
    Choice { choices: Vec<String>, gold: usize },
    /// Asks after which of several texts the same continuation is likeliest.
    Gap { prompts: Vec<String>, ending: String, gold: usize },
    /// Asks how likely the last word is, and whether it would be generated.
    LastWord { word: String },
    /// Asks whether any of these would be generated.
    AnyGreedy { answers: Vec<String> },
    /// Asks for a text. The file holds one answer, or a `list` of them.
    Generate { answers: Vec<String>, list: bool },
    /// Asks how likely a whole text is. The words and bytes of the original text are counted.
    Rolling { words: usize, bytes: usize },
}

impl Ask {
    /// Returns the harness's name for this kind of question.
    pub(crate) fn output_type(&self) -> &'static str {
        match self {
            Ask::Choice { .. } | Ask::Gap { .. } | Ask::AnyGreedy { .. } => "multiple_choice",
            Ask::LastWord { .. } => "loglikelihood",
            Ask::Generate { .. } => "generate_until",
            Ask::Rolling { .. } => "loglikelihood_rolling",
        }
    }
}
