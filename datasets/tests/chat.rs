//! Chat templates against the texts that transformers rendered, and their use with tokenizers.

#[path = "common/shared.rs"]
mod shared;

use dsmoe_datasets::{Chat, ChatTemplate, TokenizerFiles};
use serde_json::{Map, Value, json};
use std::fs;

#[test]
fn texts_are_those_of_transformers() {
    let Some(shared) = shared::shared("texts_are_those_of_transformers", "golden/chat") else { return };
    let folder = shared.join("golden/chat");
    let rows: Vec<Value> = serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
    assert_eq!(rows.len(), 70);
    let mut refused = 0;
    for row in &rows {
        let name = row["template"].as_str().unwrap();
        let files = TokenizerFiles {
            path: folder.join("tokenizer.json"),
            config: Some(
                json!({"bos_token": row["bos_token"], "eos_token": row["eos_token"]})
                    .to_string()
                    .into_bytes(),
            ),
            chat_template: Some(fs::read(folder.join(format!("{name}.jinja"))).unwrap()),
            ..TokenizerFiles::default()
        };
        let mut arguments = row["extra"].as_object().cloned().unwrap_or_default();
        arguments.insert("tools".into(), row["tools"].clone());
        let chat = Chat {
            messages: row["messages"].as_array().unwrap().clone(),
            arguments,
            generation_prompt: row["add_generation_prompt"].as_bool().unwrap(),
        };
        let text = ChatTemplate::new(&files, false).unwrap().render(&chat);
        match row["text"].as_str() {
            Some(wanted) => assert_eq!(text.unwrap(), wanted, "{name} {}", row["case"]),
            None => {
                refused += 1;
                let wanted = row["error"].as_str().unwrap().split_once(": ").unwrap().1;
                let message = text.unwrap_err().to_string();
                assert!(message.contains(wanted), "{name} {}: {message}", row["case"]);
            }
        }
    }
    assert_eq!(refused, 6);
}

#[test]
fn pieces_of_templates_render_as_by_jinja() {
    let all: Value = serde_json::from_str(include_str!("data/jinja.json")).unwrap();
    let rows = all["rows"].as_array().unwrap();
    assert!(rows.len() > 40);
    for row in rows {
        let files = TokenizerFiles {
            path: "m/tokenizer.json".into(),
            chat_template: Some(row[0].as_str().unwrap().into()),
            ..TokenizerFiles::default()
        };
        let messages = all["messages"].as_array().unwrap().clone();
        let chat = Chat { messages, generation_prompt: true, ..Chat::default() };
        let text = ChatTemplate::new(&files, false).unwrap().render(&chat);
        assert_eq!(
            text.map_err(|error| error.to_string()).as_deref(),
            Ok(row[1].as_str().unwrap()),
            "{}",
            row[0]
        );
    }
}

#[test]
fn messages_are_read_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("messages.json");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        Chat::read_messages(&path).map_err(|error| error.to_string())
    };
    let list = "\u{FEFF}[{\"role\": \"user\", \"content\": \"a\", \"x\": 1}]";
    assert_eq!(read(list).unwrap(), [json!({"role": "user", "content": "a", "x": 1})]);
    assert_eq!(read("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}").unwrap().len(), 1);
    for (text, wanted) in [
        ("[]", "an empty list"),
        ("{}", "not a list"),
        ("[{\"role\": \"user\"}, 1]", "message 2 has no role"),
        ("[", "EOF"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ] {
        let message = read(text).unwrap_err();
        assert!(message.contains(wanted) && message.contains("messages.json: "), "{message}");
    }
    let message = read(&format!("[{}0]", "0,".repeat(1 << 21))).unwrap_err();
    assert!(message.contains("it has 2097153 values, more than 2097152"), "{message}");
}

#[test]
fn a_template_that_cannot_be_used_is_named() {
    let error = |template: Value| {
        let files = TokenizerFiles {
            path: "m/tokenizer.json".into(),
            config: Some(json!({"chat_template": template}).to_string().into_bytes()),
            ..TokenizerFiles::default()
        };
        let rendered =
            ChatTemplate::new(&files, false).and_then(|template| template.render(&Chat::of(None, "a")));
        rendered.unwrap_err().to_string()
    };
    let other = "make it a text, or write the template to chat_template.jinja";
    assert_eq!(
        error(json!([{"name": "tool_use", "template": "B"}, {"name": "default"}])),
        format!(
            "m/tokenizer_config.json: chat_template is a list that has no template \"default\", but [\"tool_use\"]; {other}"
        )
    );
    assert_eq!(
        error(json!(5)),
        format!("m/tokenizer_config.json: chat_template is 5 and not a text; {other}")
    );
    assert!(error(json!([])).contains("no chat template here"));
    assert!(error(Value::Null).contains("no chat template here"));
    for empty in ["", "{# x #}"] {
        let message = error(json!(empty));
        assert!(message.contains("it gives an empty text"), "{message}");
    }
}

#[test]
fn texts_of_others_are_all_but_the_models_own() {
    let chat = Chat {
        messages: vec![
            json!({"role": "system", "content": "s"}),
            json!({"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "image"}]}),
            json!({"role": "assistant", "content": "a"}),
            json!({"role": "tool", "content": null}),
        ],
        arguments: Map::new(),
        generation_prompt: true,
    };
    assert_eq!(chat.foreign_texts().collect::<Vec<_>>(), ["s", "u"]);
    assert_eq!(Chat::of(Some("s"), "u").messages.len(), 2);
}
