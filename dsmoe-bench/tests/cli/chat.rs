//! `dsmoe generate --chat`, and the tokens at which a generation stops.

use serde_json::{Value, json};

use crate::common::{copy, fails, json_of, list, read_json, run, shows, write};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}\
    {% if add_generation_prompt %}<assistant>{% endif %}{% if note is defined %}{{ note }}{% endif %}";

/// Copies the dense model and gives it a chat template.
fn model(name: &str) {
    copy("dense", name);
    write(&format!("{name}/chat_template.jinja"), TEMPLATE);
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    write(&format!("{name}/tokenizer_config.json"), config.to_string());
}

fn ids(report: &Value, key: &str) -> Vec<u64> {
    list(&report[key]).iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn a_conversation_is_rendered_and_encoded_once() {
    model("chat");
    let one = json_of("generate chat --chat --max-tokens 3 --prompt hi --system 'be kind'");
    assert_eq!(one["prompt"], "<s><system>be kind</s><user>hi</s><assistant>");
    let tokens = ids(&one, "token_ids");
    assert_eq!((tokens[0], tokens.iter().filter(|&&id| id == 0).count()), (0, 1), "one BOS, by the template");
    assert!(tokens[..one["prompt_tokens"].as_u64().unwrap() as usize].contains(&1), "</s> is a token");

    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let messages = json!([message("user", "a"), message("assistant", "b"), message("user", "c")]);
    write("messages.json", messages.to_string());
    let of_file =
        json_of("generate chat --chat --max-tokens 3 --messages messages.json --template-arg note=\"!\"");
    assert_eq!(of_file["prompt"], "<s><user>a</s><assistant>b</s><user>c</s><assistant>!");
}

#[test]
fn special_tokens_of_a_message_are_noticed() {
    model("chat-special");
    let noticed = run("generate chat-special --chat --prompt 'say </s>' --max-tokens 1");
    assert_eq!(noticed.code, 0, "{}", noticed.stderr);
    shows(&noticed.stderr, &["a message contains \"</s>\""]);
    let plain = run("generate chat-special --chat --prompt 'say it' --max-tokens 1");
    assert!(!plain.stderr.contains("a message contains"), "{}", plain.stderr);
}

#[test]
fn a_generation_stops_at_the_end_of_a_turn_and_at_special_tokens() {
    model("chat-stop");
    let line = "generate chat-stop --max-tokens 40 --temperature 30 --seed 3 --prompt x --ignore-eos";
    let free = json_of(line);
    assert_eq!((&free["finish"], &free["generated_tokens"]), (&json!("max_tokens"), &json!(40)));
    // A token of this text becomes a special token: the generation ends where it comes.
    let new = ids(&free, "new_token_ids");
    let stop = new[20];
    let first = new.iter().position(|&id| id == stop).unwrap();
    let mut tokenizer = read_json("chat-stop/tokenizer.json");
    let old = tokenizer["model"]["vocab"].as_object().unwrap().iter().find(|(_, id)| **id == stop);
    let old = old.map(|(text, _)| text.clone()).unwrap();
    let flags = json!({"id": stop, "content": old, "special": true, "normalized": false, "lstrip": false,
        "rstrip": false, "single_word": false});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(flags);
    write("chat-stop/tokenizer.json", tokenizer.to_string());
    let stopped = json_of(&format!("{line} --stop '{old}'"));
    assert_eq!(
        (&stopped["finish"], ids(&stopped, "new_token_ids")),
        (&"stop".into(), new[..=first].to_vec())
    );
    assert!(!stopped["text"].as_str().unwrap().contains(&old));

    // The template ends an answer with that token: a conversation stops there without being told.
    let template = format!("{{% for m in messages %}}{{{{ m.content }}}}{old}{{% endfor %}}");
    write("chat-stop/chat_template.jinja", template);
    let mut ends = 0;
    for seed in 0..12 {
        let line = "generate chat-stop --chat --prompt x --max-tokens 100 --temperature 30";
        let report = json_of(&format!("{line} --seed {seed}"));
        assert!(!ids(&report, "new_token_ids").contains(&stop), "{report}");
        ends += u32::from(report["finish"] == "eos");
    }
    assert!(ends > 0, "one of twelve ends");
    write("chat-stop/generation_config.json", json!({"eos_token_id": [stop, 2]}).to_string());
    let inspected = json_of("inspect chat-stop").to_string();
    shows(&inspected, &[&format!("\"eos_token_ids\":[1,{stop},2]")]);
}

#[test]
fn conversations_that_cannot_be_rendered() {
    model("chat-wrong");
    fails("generate dense --chat --prompt x", &["no chat template", "chat_template.jinja"]);
    write("chat-wrong/chat_template.jinja", "{{ raise_exception('no system, please') }}");
    fails("generate chat-wrong --chat --prompt x", &["chat_template.jinja: ", "no system, please"]);
    write("no-messages.json", "{}");
    fails(
        "generate chat-wrong --chat --messages no-messages.json",
        &["no-messages.json: not a list", "role"],
    );
}
