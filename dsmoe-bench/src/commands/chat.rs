//! The prompt of `dsmoe generate --chat`: a conversation in the form of the model's chat template.

use anyhow::{Context, Result};
use dsmoe_datasets::{Bos, Chat, ChatTemplate, Tokenizer, TokenizerFiles};

use super::generate::Prompt;
use crate::cli::generate::ChatArgs;
use crate::ui::Ui;

/// Renders the conversation that ends with `prompt`, or that of the file of messages.
pub(super) fn conversation(
    args: &ChatArgs,
    prompt: Option<String>,
    files: &TokenizerFiles,
    tokenizer: &Tokenizer,
    ui: &Ui,
) -> Result<Prompt> {
    let mut chat = match &args.messages {
        Some(path) => {
            let mut messages = Chat::read_messages(path)?;
            if let Some(system) = &args.system {
                messages.insert(0, serde_json::json!({ "role": "system", "content": system }));
            }
            Chat { messages, generation_prompt: true, ..Chat::default() }
        }
        None => {
            let user = prompt.context("no message; use --prompt TEXT or --messages FILE")?;
            Chat::of(args.system.as_deref(), &user)
        }
    };
    chat.arguments = args.template_arg.iter().cloned().collect();
    let tools = chat.arguments.get("tools").is_some_and(|tools| !tools.is_null());
    let template = ChatTemplate::new(files, tools)?;
    for text in chat.foreign_texts() {
        for token in tokenizer.special_within(text) {
            ui.note(format_args!(
                "note: a message contains {token:?}, which the model reads as its special token and not as text"
            ));
        }
    }
    let text = template.render(&chat)?;
    let ids = tokenizer.encode(&text, Bos::Never)?;
    let end = template.after_answer().and_then(|after| tokenizer.added_prefix(&after));
    Ok(Prompt { text, ids, end })
}
