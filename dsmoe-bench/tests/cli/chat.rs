//! `dsmoe generate --chat`, and the tokens at which a generation stops.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{at, fails, fixture, json_of, run};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}\
    {% if add_generation_prompt %}<assistant>{% endif %}{% if note is defined %}{{ note }}{% endif %}";

/// The dense model with a chat template.
fn model(name: &str) -> PathBuf {
    let model = fixture().copy_of_dense(name);
    fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    model
}

fn ids(report: &Value, key: &str) -> Vec<u64> {
    report[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn a_conversation_is_rendered_and_encoded_once() {
    let model = model("chat");
    let chat =
        |more: &[&str]| json_of(&[&["generate", at(&model), "--chat", "--max-tokens", "3"], more].concat());
    let one = chat(&["--prompt", "hi", "--system", "be kind"]);
    assert_eq!(one["prompt"], "<s><system>be kind</s><user>hi</s><assistant>");
    let tokens = ids(&one, "token_ids");
    assert_eq!((tokens[0], tokens.iter().filter(|&&id| id == 0).count()), (0, 1), "one BOS, by the template");
    assert!(tokens[..one["prompt_tokens"].as_u64().unwrap() as usize].contains(&1), "</s> is a token");

    let file = fixture().dir.join("messages.json");
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
    fs::write(&file, messages.to_string()).unwrap();
    let of_file = chat(&["--messages", at(&file), "--template-arg", "note=\"!\""]);
    assert_eq!(of_file["prompt"], "<s><user>a</s><assistant>b</s><user>c</s><assistant>!");
}

#[test]
fn special_tokens_of_a_message_are_noticed() {
    let model = model("chat-special");
    let noticed = run(&["generate", at(&model), "--chat", "--prompt", "say </s>", "--max-tokens", "1"]);
    assert_eq!(noticed.code, 0, "{}", noticed.stderr);
    assert!(noticed.stderr.contains("a message contains \"</s>\""), "{}", noticed.stderr);
    let plain = run(&["generate", at(&model), "--chat", "--prompt", "say it", "--max-tokens", "1"]);
    assert!(!plain.stderr.contains("a message contains"), "{}", plain.stderr);
}

#[test]
fn a_generation_stops_at_the_end_of_a_turn_and_at_special_tokens() {
    let model = model("chat-stop");
    let long = |more: &[&str]| {
        json_of(
            &[&["generate", at(&model), "--max-tokens", "40", "--temperature", "30", "--seed", "3"], more]
                .concat(),
        )
    };
    let free = long(&["--prompt", "x", "--ignore-eos"]);
    assert_eq!(
        (free["finish"].as_str().unwrap(), free["generated_tokens"].as_u64().unwrap()),
        ("max_tokens", 40)
    );
    // A token of this text as an added token: the generation ends where it comes.
    let new = ids(&free, "new_token_ids");
    let stop = new[20];
    let first = new.iter().position(|&id| id == stop).unwrap();
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let text = vocab.iter().find(|(_, id)| **id == stop).map(|(text, _)| text.clone()).unwrap();
    let added = json!({"id": stop, "content": text, "special": true, "normalized": false, "lstrip": false, "rstrip": false,
        "single_word": false});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    fs::write(&path, tokenizer.to_string()).unwrap();
    let stopped = long(&["--prompt", "x", "--ignore-eos", "--stop", &text]);
    assert_eq!(
        (&stopped["finish"], ids(&stopped, "new_token_ids")),
        (&"stop".into(), new[..=first].to_vec())
    );
    assert!(!stopped["text"].as_str().unwrap().contains(&text));

    // The template ends an answer with that token: a conversation stops there without being told.
    fs::write(
        model.join("chat_template.jinja"),
        format!("{{% for m in messages %}}{{{{ m.content }}}}{text}{{% endfor %}}"),
    )
    .unwrap();
    let chat = [
        "generate",
        at(&model),
        "--chat",
        "--prompt",
        "x",
        "--max-tokens",
        "100",
        "--temperature",
        "30",
        "--seed",
    ];
    let mut ends = 0;
    for seed in 0..12 {
        let report = json_of(&[&chat[..], &[&seed.to_string()]].concat());
        assert!(!ids(&report, "new_token_ids").contains(&stop), "{report}");
        ends += u32::from(report["finish"] == "eos");
    }
    assert!(ends > 0, "one of twelve ends");
    let config = model.join("generation_config.json");
    fs::write(config, json!({"eos_token_id": [stop, 2]}).to_string()).unwrap();
    let inspected = json_of(&["inspect", at(&model)]);
    assert!(inspected.to_string().contains(&format!("\"eos_token_ids\":[1,{stop},2]")), "{inspected}");
}

#[test]
fn conversations_that_cannot_be_rendered() {
    let model = model("chat-wrong");
    let wrong =
        |more: &[&str], parts: &[&str]| fails(&[&["generate", at(&model), "--chat"], more].concat(), parts);
    fails(
        &["generate", at(&fixture().dense), "--chat", "--prompt", "x"],
        &["no chat template", "chat_template.jinja"],
    );
    fs::write(model.join("chat_template.jinja"), "{{ raise_exception('no system, please') }}").unwrap();
    wrong(&["--prompt", "x"], &["chat_template.jinja: ", "no system, please"]);
    let file = fixture().dir.join("no-messages.json");
    fs::write(&file, "{}").unwrap();
    wrong(&["--messages", at(&file)], &["no-messages.json: not a list", "role"]);
}
