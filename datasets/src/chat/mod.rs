//! Chat templates: the text that a model sees for a conversation, as transformers renders it.

mod bounds;
mod python;
mod source;

use std::path::{Path, PathBuf};

use chrono::{Local, NaiveDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};
use crate::files::{json_values, read_at_most, without_bom};
use crate::tokenizer::TokenizerFiles;

/// Work that a template may do, in the units of the template engine: some ten times what a long conversation needs.
const FUEL: u64 = 1_000_000;

/// The largest file of messages, in bytes.
const MAX_MESSAGES: u64 = 64 << 20;
/// Most keys and values of a file of messages.
const MAX_VALUES: usize = 1 << 21;

/// An answer of the model. The template is rendered with it to find the text that ends an answer.
const ANSWER: &str = "An answer.";

/// The chat template of a model.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    source: String,
    /// The variables that the tokenizer gives: `bos_token`, `eos_token` and the like.
    special_tokens: Map<String, Value>,
}

/// A conversation to be rendered.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// The messages: objects with `role` and `content`, and whatever else the template reads.
    pub messages: Vec<Value>,
    /// Further variables of the template, such as `enable_thinking` or `tools`.
    pub arguments: Map<String, Value>,
    /// Ends the text where the model's answer begins.
    pub generation_prompt: bool,
}

impl Chat {
    /// Makes a conversation of a user's message, after a message of the system if there is one.
    pub fn of(system: Option<&str>, user: &str) -> Chat {
        let message = |role: &str, content: &str| serde_json::json!({ "role": role, "content": content });
        let system = system.map(|text| message("system", text));
        let messages = system.into_iter().chain([message("user", user)]).collect();
        Chat { messages, generation_prompt: true, ..Chat::default() }
    }

    /// Reads the messages of a JSON file: a list of objects, or an object with such a list as `messages`.
    ///
    /// # Errors
    /// A file that cannot be read, is no such list, or has a message without `role`.
    pub fn read_messages(path: &Path) -> Result<Vec<Value>> {
        let wrong = |reason: String| Error::Messages { path: path.to_path_buf(), reason };
        let bytes = read_at_most(path, MAX_MESSAGES).map_err(Error::io(path))?;
        let values = json_values(&bytes);
        if values > MAX_VALUES {
            return Err(wrong(format!("it has {values} values, more than {MAX_VALUES}")));
        }
        let mut value: Value =
            serde_json::from_slice(without_bom(&bytes)).map_err(|cause| wrong(shown(&cause.to_string())))?;
        if let Some(messages) = value.get_mut("messages") {
            value = messages.take();
        }
        let Value::Array(messages) = value else { return Err(wrong("not a list".into())) };
        if messages.is_empty() {
            return Err(wrong("an empty list".into()));
        }
        match messages.iter().position(|message| !message["role"].is_string()) {
            Some(at) => Err(wrong(format!("message {} has no role", at + 1))),
            None => Ok(messages),
        }
    }

    /// Returns the texts that the user and others wrote: all content but that of the assistant.
    pub fn foreign_texts(&self) -> impl Iterator<Item = &str> {
        let foreign = self.messages.iter().filter(|message| message["role"] != "assistant");
        foreign.flat_map(|message| match &message["content"] {
            Value::String(text) => vec![text.as_str()],
            Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
            _ => Vec::new(),
        })
    }
}

impl ChatTemplate {
    /// Takes the template from a tokenizer's files: `chat_template.jinja`, or else `chat_template` of
    /// `tokenizer_config.json`. Of a list the template `tool_use` is taken for a conversation with `tools`, otherwise
    /// `default`.
    ///
    /// # Errors
    /// Files that do not parse, or no template.
    pub fn new(files: &TokenizerFiles, tools: bool) -> Result<ChatTemplate> {
        let settings = files.settings()?;
        let special_tokens = settings.special_tokens;
        if let Some((path, source)) = files.template_file()? {
            return Ok(ChatTemplate { path, source, special_tokens });
        }
        let path = files.config_path();
        let wrong = |reason: String| {
            let help = "make it a text, or write the template to chat_template.jinja";
            Err(Error::file(&path, format!("chat_template {reason}"), help))
        };
        let source = match settings.chat_template {
            Value::String(source) => source,
            Value::Array(templates) if !templates.is_empty() => {
                let named = |name: &str| {
                    let found = templates.iter().find(|template| template["name"] == name)?;
                    found["template"].as_str().map(str::to_owned)
                };
                let for_tools = if tools { named("tool_use") } else { None };
                let Some(source) = for_tools.or_else(|| named("default")) else {
                    let with_text = templates.iter().filter(|template| template["template"].is_string());
                    let names = with_text.filter_map(|template| template["name"].as_str());
                    let names: Vec<String> = names.map(|name| format!("{name:?}")).collect();
                    let names = shown(&names.join(", "));
                    return wrong(format!("is a list that has no template \"default\", but [{names}]"));
                };
                source
            }
            Value::Null | Value::Array(_) => return Err(Error::NoChatTemplate { path }),
            other => return wrong(format!("is {} and not a text", shown(&other.to_string()))),
        };
        Ok(ChatTemplate { path, source, special_tokens })
    }

    /// Renders a conversation. The text is to be encoded without BOS, which the template writes itself.
    ///
    /// # Errors
    /// A template with an error, one that refuses the conversation, or one that gives an empty text for it.
    pub fn render(&self, chat: &Chat) -> Result<String> {
        self.render_at(chat, Local::now().naive_local())
    }

    /// Renders a conversation at that time of the clock on the wall.
    fn render_at(&self, chat: &Chat, now: NaiveDateTime) -> Result<String> {
        let mut variables = self.special_tokens.clone();
        variables.insert("messages".into(), chat.messages.clone().into());
        variables.insert("tools".into(), Value::Null);
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), chat.generation_prompt.into());
        variables.extend(chat.arguments.clone());
        let source = self.source.clone();
        let work = move || {
            let source = source::adapted(&source);
            let variables = minijinja::Value::from(minijinja::value::Serde(&variables));
            environment(now)
                .render_named_str("chat template", &source, variables)
                .map_err(|cause| reason(&cause))
        };
        let not_empty = |text: String| match text.is_empty() {
            true => Err("it gives an empty text".to_owned()),
            false => Ok(text),
        };
        bounds::check(&self.source)
            .and_then(|()| bounds::run(work))
            .and_then(not_empty)
            .map_err(|reason| Error::ChatTemplate { path: self.path.clone(), reason })
    }

    /// Returns the text that the template writes after an answer of the model, or nothing if it refuses to show one.
    pub fn after_answer(&self) -> Option<String> {
        let mut chat = Chat::of(None, "A question.");
        chat.messages.push(serde_json::json!({ "role": "assistant", "content": ANSWER }));
        chat.generation_prompt = false;
        let text = self.render(&chat).ok()?;
        let (_, after) = text.rsplit_once(ANSWER)?;
        Some(after.trim_start().to_owned())
    }
}

/// Returns what is wrong, in one short line.
fn reason(cause: &minijinja::Error) -> String {
    let text = cause.detail().map_or_else(|| cause.kind().to_string(), str::to_owned);
    let text = shown(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    match cause.line() {
        Some(line) => format!("line {line}: {text}"),
        None => text,
    }
}

/// Makes the environment that transformers gives to templates at the time `now`.
fn environment(now: NaiveDateTime) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        if method == "format" && value.as_str().is_some_and(|text| python::is_too_wide(text, arguments)) {
            let reason = "format with a width that no text needs";
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason));
        }
        let own = value.as_str().and_then(|text| python::method(text, method, arguments));
        own.map_or_else(|| unknown_method_callback(state, value, method, arguments), Ok)
    });
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", to_json);
    // In Python a text and a dict are sequences too.
    environment.add_test("sequence", |value: &minijinja::Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| python::strftime(&format, now));
    environment.add_filter("string", |value: minijinja::Value| match value.as_str() {
        Some(_) => value,
        None => python::float(&value).unwrap_or_else(|| value.to_string()).into(),
    });
    environment.set_formatter(|out, state, value| match python::float(value) {
        Some(text) => Ok(out.write_str(&text)?),
        None => escape_formatter(out, state, value),
    });
    environment
}

/// The filter `tojson` as transformers defines it: nothing is escaped for HTML.
fn to_json(
    value: &minijinja::Value,
    ensure_ascii: Option<bool>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let wrong = |text: String| minijinja::Error::new(ErrorKind::InvalidOperation, text);
    if value.is_undefined() {
        return Err(wrong("tojson of an undefined value".into()));
    }
    let separators: Option<Vec<String>> = options.get("separators")?;
    let separators = match separators.as_deref() {
        None => None,
        Some([item, key]) => Some([item.clone(), key.clone()]),
        Some(_) => return Err(wrong("tojson needs two separators".into())),
    };
    let style = python::Style {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.or(ensure_ascii).unwrap_or(false),
        indent: options.get("indent")?,
        separators,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|cause| wrong(cause.to_string()))?;
    Ok(style.write(&json))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { path: "m/x".into(), source: source.into(), special_tokens: Map::new() }
    }

    fn render(source: &str) -> String {
        template(source).render(&Chat::of(None, "hi")).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn the_environment_is_that_of_transformers() {
        assert_eq!(render("{{ messages[0].content.upper() }}\n"), "HI", "a last line end is dropped");
        assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc"), "a\nb\nc");
        assert_eq!(render("{{ tools is none }} {{ nothing }}|{{ nothing is defined }}"), "True |False");
        assert_eq!(render("{{ [1, 'é<'] | tojson }} {{ 1.0 | tojson(indent=2) }}"), "[1, \"é<\"] 1.0");
        assert_eq!(
            render(
                "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
            ),
            "{\"a\":\"\\u00e9\",\"b\":1}"
        );
        assert_eq!(
            render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
            "01"
        );
        assert_eq!(
            render("{{ 1e20 }} {{ 0.00001 }} {{ 1.0 }} {{ 1e20 | string }} {{ 7 }}"),
            "1e+20 1e-05 1.0 1e+20 7"
        );
        assert_eq!(
            render("{{ '%s has %.1f%%' % (messages[0].role, 2.5) }} {{ '<%(role)s>' % messages[0] }}"),
            "user has 2.5% <user>"
        );
        let now = "2024-07-26T23:59:59".parse().unwrap();
        let dated = template("{{ strftime_now('%d %b %Y, %H:%M') }}").render_at(&Chat::of(None, "hi"), now);
        assert_eq!(dated.unwrap(), "26 Jul 2024, 23:59");
    }

    #[test]
    fn errors_say_where_and_why() {
        let refused = render("\n{{ raise_exception('no\nsystem') }}");
        assert!(
            refused.starts_with(
                "m/x: the chat template refuses the conversation or is broken (line 2: no system)"
            ),
            "{refused}"
        );
        assert!(render("{% if %}").contains("line 1: "), "{}", render("{% if %}"));
        let endless =
            render("{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}");
        assert!(endless.contains("fuel"), "{endless}");
        assert!(render("{{ nothing | tojson }}").contains("undefined"));
        assert_eq!(render("{{ '{:>4}|{}|20240726'.format('a', 12345678) }}"), "   a|12345678|20240726");
        for wide in
            ["'{:>999999999}'.format('a')", "'{:>{}}'.format('a', 999999999)", "'{:.10000000f}'.format(1.5)"]
        {
            let refused = render(&format!("{{{{ {wide} }}}}"));
            assert!(refused.contains("a width that no text needs"), "{wide}: {refused}");
        }
    }

    #[test]
    fn chains_and_nested_values_do_not_overflow_the_stack() {
        let chain = |start: &str, link: &str, end: &str| {
            let links = (8_000 - start.len() - end.len()) / link.len();
            format!("{start}{}{end}", link.repeat(links))
        };
        for (start, link, end) in [
            ("{{ ", "not ", "1 }}"),
            ("{{ ", "-", "1 }}"),
            ("{{ 1", "+1", " }}"),
            ("{{ 1", "**1", " }}"),
            ("{{ 1", " if 1", " }}"),
            ("{{ 1", "<1", " }}"),
            ("{{ 1", " and 1", " }}"),
            ("{{ a", ".b", " }}"),
            ("{{ a", "|e", " }}"),
            ("{{ a", "()", " }}"),
            ("{{ a", "[0]", " }}"),
        ] {
            render(&chain(start, link, end));
            let longer = chain(start, link, end).replace(link, &link.repeat(2));
            assert!(render(&longer).contains("a tag of "), "{link}");
        }
        assert_eq!(
            render(&format!("{{% if 0 %}}{}x{{% else %}}y{{% endif %}}", "{% elif 0 %}".repeat(50_000))),
            "y"
        );
        // Many levels for little fuel.
        let nested = format!("{}ns.x{}", "[".repeat(40), "]".repeat(40));
        let uses = ["{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x == [ns.x] }}", "{{ ns.x ~ 1 }}"];
        for (grown, times, uses) in [
            (nested.as_str(), 19_000, &uses[..]),
            ("{'a': ns.x}", 60_000, &uses[..2]),
            ("(ns.x,)", 60_000, &uses[..1]),
            ("namespace(x=ns.x)", 30_000, &uses[..1]),
        ] {
            for used in uses {
                render(&format!(
                    "{{% set ns = namespace(x=1) %}}{{% for i in range({times}) %}}{{% set ns.x = {grown} %}}{{% endfor %}}{used}"
                ));
            }
        }
    }

    #[test]
    fn templates_are_bounded_in_size_and_time_and_in_what_they_say() {
        let endless = "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}";
        assert!(render(endless).contains("it runs for more than"));
        assert!(render(&"a".repeat((1 << 20) + 1)).contains("1048577 bytes"));
        let prompt = "a }} ' ".repeat(10_000);
        assert_eq!(render(&format!("{{{{ \"{prompt}\" }}}}")), prompt, "texts in a tag may be long");
        assert!(render("{{ raise_exception('a' * 9999) }}").len() < 600);
        // An overflow of the engine, which is a panic where overflows are checked.
        render("{{ [1, 2, 3][::-9223372036854775808] }}");
    }

    #[test]
    fn generation_tags_trim_as_tags_do() {
        assert_eq!(render("a\n  {% generation %}\nb\n{%- endgeneration -%}\n c"), "a\nbc");
    }

    #[test]
    fn the_end_of_an_answer_is_found() {
        let chatml =
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
        assert_eq!(template(chatml).after_answer().unwrap(), "<|im_end|>\n");
        assert_eq!(template("{{ raise_exception('x') }}").after_answer(), None);
        assert_eq!(template("x").after_answer(), None);
    }

    #[test]
    fn the_template_comes_from_the_file_or_the_config() {
        let files = |config: &str, template: Option<&str>| TokenizerFiles {
            path: "m/tokenizer.json".into(),
            config: Some(config.as_bytes().to_vec()),
            chat_template: template.map(|text| text.as_bytes().to_vec()),
            ..TokenizerFiles::default()
        };
        let source = |config: &str, template, tools| {
            ChatTemplate::new(&files(config, template), tools).map(|found| found.source)
        };
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(source(r#"{"chat_template": "c"}"#, None, false).unwrap(), "c");
        assert_eq!(source(r#"{"chat_template": "c"}"#, Some("\u{FEFF}j"), false).unwrap(), "j");
        assert_eq!(source(list, None, false).unwrap(), "d");
        assert_eq!(source(list, None, true).unwrap(), "t");
        let message = source("{}", None, false).unwrap_err().to_string();
        assert!(message.starts_with("m/tokenizer_config.json: no chat template"), "{message}");
    }
}
