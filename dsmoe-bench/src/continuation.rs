//! The continuation of a prompt by a loaded model, with stop texts.

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::generate::{Finish, GenerateOptions, generate};
use dsmoe_datasets::{DecodeStream, Tokenizer};
use serde::Serialize;

/// A prompt and how it is continued.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) prompt: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) options: GenerateOptions,
    /// Texts before which the continuation ends.
    pub(crate) stop: &'a [String],
}

/// A prompt's continuation, and how long it took.
#[derive(Debug, Serialize)]
pub(crate) struct Continuation {
    pub(crate) prompt: String,
    /// The new text without the prompt.
    pub(crate) text: String,
    /// The tokens of the prompt and the new ones.
    pub(crate) token_ids: Vec<u32>,
    pub(crate) new_token_ids: Vec<u32>,
    pub(crate) prompt_tokens: usize,
    pub(crate) generated_tokens: usize,
    pub(crate) finish: &'static str,
    pub(crate) dtype: &'static str,
    pub(crate) prefill_seconds: f64,
    pub(crate) decode_seconds: f64,
    pub(crate) prefill_tokens_per_s: f64,
    /// The rate of the tokens after the first; none if there is only one.
    pub(crate) tokens_per_s: Option<f64>,
    pub(crate) active_ratio: Option<f64>,
    pub(crate) active_ratio_per_layer: Option<Vec<f64>>,
}

/// Refuses a prompt without tokens.
pub(crate) fn check_prompt(ids: &[u32]) -> Result<()> {
    if ids.is_empty() {
        bail!("the prompt is empty and its tokenizer adds no BOS token to start from; give --prompt a text");
    }
    Ok(())
}

/// Continues a prompt, and shows new text as soon as it can no longer belong to a stop text. `show` is called after every token, at
/// times with no text, and returns whether to continue.
pub(crate) fn continue_text(
    model: &Inference,
    tokenizer: &Tokenizer,
    asked: Asked<'_>,
    show: &mut (dyn FnMut(&str) -> Result<bool> + Send),
) -> Result<Continuation> {
    let Asked { prompt, ids, options, stop } = asked;
    check_prompt(&ids)?;
    let stop_ids: Vec<u32> = stop.iter().filter_map(|text| tokenizer.added_id(text)).collect();
    // The first new token decodes with the prompt before it: some tokenizers drop a space at the very beginning.
    let mut decoder = tokenizer.stream(&ids)?;
    let mut text = StoppedText::new(stop);
    let mut shown = Ok(true);
    let generation = generate(model, &ids, &options, |id| {
        // A special token has no text that could be found later.
        if stop_ids.contains(&id) {
            return false;
        }
        shown = text.push_token(&mut decoder, id).and_then(&mut *show);
        matches!(shown, Ok(true)) && !text.stopped
    })?;
    shown?;
    if !text.stopped {
        let held = decoder.finish()?.unwrap_or_default();
        show(text.push(&held))?;
    }
    show(text.finish())?;

    let summary = generation.stats.as_ref().map(|stats| stats.summary());
    // Every step but the first is timed as decoding, that of a stop token included.
    let steps = match generation.finish {
        Finish::Stop => generation.tokens.len(),
        _ => generation.tokens.len().saturating_sub(1),
    };
    Ok(Continuation {
        prompt_tokens: ids.len(),
        generated_tokens: generation.tokens.len(),
        finish: match generation.finish {
            Finish::MaxTokens => "max_tokens",
            Finish::Stop => "eos",
            Finish::Positions => "positions",
            Finish::Caller => "stop",
        },
        dtype: model.precision().name(),
        prefill_seconds: generation.prefill_seconds,
        decode_seconds: generation.decode_seconds,
        prefill_tokens_per_s: ids.len() as f64 / generation.prefill_seconds.max(1e-9),
        tokens_per_s: (steps > 0).then(|| steps as f64 / generation.decode_seconds.max(1e-9)),
        active_ratio: summary.as_ref().map(|summary| summary.active_ratio),
        active_ratio_per_layer: summary.map(|summary| summary.active_ratio_per_layer),
        token_ids: [&ids[..], &generation.tokens].concat(),
        new_token_ids: generation.tokens,
        text: text.text,
        prompt,
    })
}

/// Text that ends where a stop text begins. A possible beginning of a stop text is held back.
struct StoppedText<'a> {
    stops: &'a [String],
    text: String,
    /// Bytes of `text` that were returned.
    shown: usize,
    stopped: bool,
}

impl StoppedText<'_> {
    fn new(stops: &[String]) -> StoppedText<'_> {
        StoppedText { stops, text: String::new(), shown: 0, stopped: false }
    }

    /// Returns whether the text would end if this piece came next.
    fn would_stop(&self, piece: &str) -> bool {
        let text = format!("{}{piece}", self.text);
        self.stops.iter().any(|stop| text.contains(stop))
    }

    /// Adds a token, and returns the text that can no longer belong to a stop text.
    fn push_token(&mut self, decoder: &mut DecodeStream<'_>, id: u32) -> Result<&str> {
        let mut piece = decoder.push(id)?.unwrap_or_default();
        // A stop text may be among what the decoder holds back.
        if piece.is_empty() && !self.stops.is_empty() {
            piece = Some(decoder.held()?).filter(|held| self.would_stop(held)).unwrap_or_default();
        }
        Ok(self.push(&piece))
    }

    /// Adds a piece, and returns the text that can no longer belong to a stop text.
    fn push(&mut self, piece: &str) -> &str {
        self.text.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| self.text.find(stop)).min();
        let certain = match first {
            Some(at) => {
                self.text.truncate(at);
                self.stopped = true;
                at
            }
            None => {
                let starts = |(at, _): &(usize, char)| {
                    self.stops.iter().any(|stop| stop.starts_with(&self.text[*at..]))
                };
                self.text.char_indices().find(starts).map_or(self.text.len(), |(at, _)| at)
            }
        };
        let from = self.shown.min(certain);
        self.shown = certain.max(from);
        &self.text[from..certain]
    }

    /// Returns the text that was held back.
    fn finish(&mut self) -> &str {
        let from = std::mem::replace(&mut self.shown, self.text.len());
        &self.text[from.min(self.text.len())..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut text = StoppedText::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            shown.push(text.push(piece).to_owned());
            if text.stopped {
                break;
            }
        }
        shown.push(text.finish().to_owned());
        assert_eq!(shown.concat(), text.text);
        (shown, text.text, text.stopped)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces_and_cut() {
        let (shown, text, stopped) = stream(&["END", "\n\n"], &["one E", "ND two"]);
        assert_eq!(
            (&shown[..], text.as_str(), stopped),
            (&["one ", "", ""].map(String::from)[..], "one ", true)
        );
        let (shown, text, stopped) = stream(&["END"], &["one E", "N", "ough"]);
        assert_eq!(shown, ["one ", "", "ENough", ""]);
        assert_eq!((text.as_str(), stopped), ("one ENough", false));
        assert_eq!(stream(&["\n"], &["é", "a\nb"]).1, "éa");
        assert_eq!(stream(&["ab"], &["xa"]), (vec!["x".into(), "a".into()], "xa".into(), false));
        assert_eq!(stream(&[], &["x", "y"]).0, ["x", "y", ""]);
    }
}
