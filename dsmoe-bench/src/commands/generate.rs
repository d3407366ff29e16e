//! `dsmoe generate`: continues a prompt.

use anyhow::{Context, Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::generate::{Finish, GenerateOptions, generate};
use serde::Serialize;

use super::chat::conversation;
use super::plan::{Chosen, for_prompt};
use crate::cli::generate::Generate;
use crate::files;
use crate::format;
use crate::models::{default_precision, load_inference, show_config_notices, tokenizer_files, tokenizer_of};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct GenerateReport {
    prompt: String,
    /// The new text without the prompt.
    text: String,
    /// The tokens of the prompt and the new ones.
    token_ids: Vec<u32>,
    new_token_ids: Vec<u32>,
    prompt_tokens: usize,
    generated_tokens: usize,
    finish: &'static str,
    dtype: &'static str,
    prefill_seconds: f64,
    decode_seconds: f64,
    prefill_tokens_per_s: f64,
    /// The rate of the tokens after the first; none if there is only one.
    tokens_per_s: Option<f64>,
    active_ratio: Option<f64>,
    active_ratio_per_layer: Option<Vec<f64>>,
    /// What a plan has chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    planned: Option<Chosen>,
}

pub(crate) fn run(args: &Generate, ui: &mut Ui) -> Result<()> {
    // A wrong prompt is reported before the weights are read.
    let config = Config::load(&args.model)?;
    show_config_notices(&config, ui);
    let files = tokenizer_files(&args.model)?;
    let tokenizer = tokenizer_of(&files, &config, ui)?;
    let Prompt { text: prompt, ids: prompt_ids, end } = match args.chat.chat {
        true => conversation(&args.chat, read_prompt(args)?, &files, &tokenizer, ui)?,
        false => {
            let text = read_prompt(args)?.context("no prompt; use --prompt TEXT")?;
            Prompt { ids: tokenizer.encode(&text, args.bos)?, text, end: None }
        }
    };
    if prompt_ids.is_empty() {
        bail!("the prompt is empty and its tokenizer adds no BOS token to start from; give --prompt a text");
    }
    let stop_ids: Vec<u32> = args.stop.iter().filter_map(|text| tokenizer.added_id(text)).collect();
    let dtype = match args.dtype {
        Some(dtype) => dtype,
        None => default_precision(args.device, Checkpoint::open(&args.model)?.precision()),
    };
    let mut model = load_inference(&args.model, dtype, args.device, args.gates)?;
    let planned = planned(args, &mut model, &prompt_ids, ui)?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        stop: match args.ignore_eos {
            true => Vec::new(),
            false => config.eos_token_ids.iter().copied().chain(end).collect(),
        },
        kv_cache: !args.no_kv_cache,
        prefill_chunk: args.prefill_chunk,
    };

    // The first new token decodes with the prompt before it: some tokenizers drop a space at the very beginning.
    let mut decoder = tokenizer.stream(&prompt_ids)?;
    let mut text = StoppedText::new(&args.stop);
    let mut failure = None;
    let generation = generate(&model, &prompt_ids, &options, |id| {
        // A special token has no text that could be found later.
        if stop_ids.contains(&id) {
            return false;
        }
        let mut show = || -> Result<()> {
            let mut piece = decoder.push(id)?.unwrap_or_default();
            // A stop text may be among what the decoder holds back.
            if piece.is_empty() && !args.stop.is_empty() {
                piece = Some(decoder.held()?).filter(|held| text.would_stop(held)).unwrap_or_default();
            }
            let ready = text.push(&piece);
            if !ui.json && !ready.is_empty() { ui.text(ready) } else { Ok(()) }
        };
        failure = show().err();
        failure.is_none() && !text.stopped
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    if !text.stopped {
        let held = decoder.finish()?.unwrap_or_default();
        let ready = text.push(&held);
        if !ui.json {
            ui.text(ready)?;
        }
    }
    if !ui.json {
        ui.text(text.finish())?;
        ui.text("\n")?;
    }

    let summary = generation.stats.as_ref().map(|stats| stats.summary());
    // Every step but the first is timed as decoding, that of a stop token included.
    let steps = match generation.finish {
        Finish::Stop => generation.tokens.len(),
        _ => generation.tokens.len().saturating_sub(1),
    };
    let report = GenerateReport {
        prompt_tokens: prompt_ids.len(),
        generated_tokens: generation.tokens.len(),
        finish: match generation.finish {
            Finish::MaxTokens => "max_tokens",
            Finish::Stop => "eos",
            Finish::Positions => "positions",
            Finish::Caller => "stop",
        },
        dtype: dtype.name(),
        prefill_seconds: generation.prefill_seconds,
        decode_seconds: generation.decode_seconds,
        prefill_tokens_per_s: prompt_ids.len() as f64 / generation.prefill_seconds.max(1e-9),
        tokens_per_s: (steps > 0).then(|| steps as f64 / generation.decode_seconds.max(1e-9)),
        active_ratio: summary.as_ref().map(|summary| summary.active_ratio),
        active_ratio_per_layer: summary.map(|summary| summary.active_ratio_per_layer),
        token_ids: [&prompt_ids[..], &generation.tokens].concat(),
        new_token_ids: generation.tokens,
        text: text.text,
        prompt,
        planned,
    };
    if ui.json {
        return ui.result(&report, |_| String::new());
    }
    ui.note(show(&report));
    Ok(())
}

/// Sets `model` to the budget that a plan chooses for the prompt, if there is one.
fn planned(args: &Generate, model: &mut Inference, ids: &[u32], ui: &Ui) -> Result<Option<Chosen>> {
    let (Some(plan), Some(deadline)) = (&args.plan, args.deadline) else { return Ok(None) };
    if args.device.is_gpu() {
        bail!("--plan: its times are those of the processor; use --device cpu");
    }
    let chosen = for_prompt(plan, &args.model, model, ids, (args.max_tokens, deadline))?;
    model.set_active(chosen.active)?;
    let late = if chosen.in_time { "" } else { ", more than the deadline: no budget is faster" };
    let (active, seconds) = (format::percent(chosen.active), chosen.seconds);
    ui.note(format_args!(
        "plan: {active} of the experts on the {}, about {seconds:.3} s{late}; extra loss about {:.3} nats",
        chosen.device, chosen.extra
    ));
    Ok(Some(chosen))
}

/// The text that is continued.
pub(super) struct Prompt {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    /// The token that ends an answer, beside those that the model names.
    pub(super) end: Option<u32>,
}

fn read_prompt(args: &Generate) -> Result<Option<String>> {
    if let Some(prompt) = &args.prompt {
        return Ok(Some(prompt.clone()));
    }
    let Some(path) = &args.prompt_file else { return Ok(None) };
    let text = files::read(path)?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(&text);
    let text = text.strip_suffix('\n').unwrap_or(text);
    Ok(Some(text.strip_suffix('\r').unwrap_or(text).to_owned()))
}

fn show(report: &GenerateReport) -> String {
    let mut line = format!(
        "[{} prompt tokens at {:.1}/s, {} new",
        report.prompt_tokens, report.prefill_tokens_per_s, report.generated_tokens
    );
    if let Some(rate) = report.tokens_per_s {
        line += &format!(" at {rate:.1}/s");
    }
    if let Some(ratio) = report.active_ratio {
        line += &format!(", {} of experts active", format::percent(ratio));
    }
    line + &format!(", ended by {}]", report.finish)
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
