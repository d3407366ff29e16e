//! `dsmoe generate`: continues a prompt.

use anyhow::{Context, Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::generate::GenerateOptions;
use serde::Serialize;

use super::chat::conversation;
use super::plan::{Chosen, for_prompt};
use crate::cli::generate::Generate;
use crate::continuation::{Asked, Continuation, check_prompt, continue_text};
use crate::files;
use crate::format;
use crate::models::{default_precision, load_inference, show_config_notices, tokenizer_files, tokenizer_of};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct GenerateReport {
    #[serde(flatten)]
    continued: Continuation,
    /// The choice of a plan.
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
    check_prompt(&prompt_ids)?;
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
    let asked = Asked { prompt, ids: prompt_ids, options, stop: &args.stop };
    let continued = continue_text(&model, &tokenizer, asked, &mut |ready| {
        if !ui.json && !ready.is_empty() {
            ui.text(ready)?;
        }
        Ok(true)
    })?;
    let report = GenerateReport { continued, planned };
    if ui.json {
        return ui.result(&report, |_| String::new());
    }
    ui.text("\n")?;
    ui.note(show(&report.continued));
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

fn show(report: &Continuation) -> String {
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
