//! Checks of `tokenizer.json` before the tokenizers crate reads it: the crate panics on files that contradict themselves.

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::panics::caught;

/// Most characters that a normalizer or a decoder may make of one.
const MOST_GROWTH: f64 = 4096.0;
/// Most steps of a normalizer, a pre-tokenizer, a post-processor or a decoder: each reads the whole text.
const MOST_STEPS: usize = 1000;
/// Most bytes of a pattern, of the text in its place, and of a token.
const MOST_TEXT: usize = 64 << 10;
/// Most tokens that a post-processor may add to a text.
const MOST_ADDED: usize = 1024;

/// Parses `tokenizer.json`, given also as `json`. Whatever else the crate panics on is an error too.
pub(super) fn parse(bytes: &[u8], json: &Value) -> tokenizers::Result<Tokenizer> {
    check(json)?;
    guarded(|| Tokenizer::from_bytes(bytes))
}

/// Runs `use_tokenizer` and turns a panic of the crate into an error.
pub(super) fn guarded<T>(use_tokenizer: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    caught(use_tokenizer).unwrap_or_else(|| Err("a field has a value of the wrong kind".into()))
}

/// Checks what the crate takes for granted.
fn check(json: &Value) -> Result<(), String> {
    check_steps(json)?;
    check_tokens(json)?;
    check_merges(&json["model"])?;
    check_growth("normalizer", &json["normalizer"], "normalizers")?;
    check_growth("decoder", &json["decoder"], "decoders")?;
    each(&json["normalizer"], "normalizers", &mut check_charsmap)?;
    each(&json["post_processor"], "processors", &mut check_template)?;
    each(&json["pre_tokenizer"], "pretokenizers", &mut |part| {
        let empty = part["type"] == "FixedLength" && part["length"] == 0;
        if empty { Err("the pre-tokenizer FixedLength has the length 0".into()) } else { Ok(()) }
    })
}

/// Calls `check` for a part, or for each part of a sequence of them.
fn each(
    part: &Value,
    sequence: &str,
    check: &mut dyn FnMut(&Value) -> Result<(), String>,
) -> Result<(), String> {
    match part[sequence].as_array() {
        // The depth is that of the file, which its parser limits.
        Some(parts) => parts.iter().try_for_each(|part| each(part, sequence, check)),
        None => check(part),
    }
}

/// Steps are few, and their texts short: the crate compiles every pattern, and every step reads the text anew.
fn check_steps(json: &Value) -> Result<(), String> {
    for (key, sequence, name) in [
        ("normalizer", "normalizers", "normalizer"),
        ("pre_tokenizer", "pretokenizers", "pre-tokenizer"),
        ("post_processor", "processors", "post-processor"),
        ("decoder", "decoders", "decoder"),
    ] {
        let mut steps = 0;
        each(&json[key], sequence, &mut |part| {
            steps += 1;
            if steps > MOST_STEPS {
                return Err(format!("the {name} has more than {MOST_STEPS} steps"));
            }
            let pattern = &part["pattern"];
            let texts = [pattern, &pattern["String"], &pattern["Regex"], &part["content"], &part["prepend"]];
            match texts.into_iter().filter_map(Value::as_str).any(|text| text.len() > MOST_TEXT) {
                true => Err(format!("the {name} has a text of more than {MOST_TEXT} bytes")),
                false => Ok(()),
            }
        })?;
    }
    Ok(())
}

/// Tokens are short: the crate makes an automaton of the added ones.
fn check_tokens(json: &Value) -> Result<(), String> {
    let vocab = &json["model"]["vocab"];
    let keyed = vocab.as_object().into_iter().flat_map(|vocab| vocab.keys().map(String::as_str));
    let listed = vocab.as_array().into_iter().flatten().filter_map(|token| token[0].as_str());
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter_map(|token| token["content"].as_str());
    match keyed.chain(listed).chain(added).any(|token| token.len() > MOST_TEXT) {
        true => Err(format!("a token has more than {MOST_TEXT} bytes")),
        false => Ok(()),
    }
}

/// Steps that put a text in the place of others, or before them, multiply their lengths: forty that double a character make a text
/// that no memory holds. So do maps, each by their longest text.
fn check_growth(name: &str, part: &Value, sequence: &str) -> Result<(), String> {
    let chars = |value: &Value| value.as_str().map_or(1, |text| text.chars().count().max(1)) as f64;
    let mut all = 1.0;
    each(part, sequence, &mut |part| {
        let replaced = chars(&part["pattern"]["String"]);
        let mapped = part["precompiled_charsmap"].as_str().map_or(1, longest_mapped);
        all *= (chars(&part["content"]) / replaced).max(1.0) * chars(&part["prepend"]) * mapped as f64;
        match all > MOST_GROWTH {
            true => Err(format!("the {name} may make more than {MOST_GROWTH} characters of one")),
            false => Ok(()),
        }
    })
}

/// The map of a `Precompiled` normalizer begins with the bytes of its trie, a little-endian u32, and the crate asks for as much memory
/// before it looks whether they follow.
fn check_charsmap(part: &Value) -> Result<(), String> {
    let Some(text) = part["precompiled_charsmap"].as_str() else { return Ok(()) };
    // Six characters of base64 hold the four bytes and four bits more. What is shorter, or no base64, is for the crate to name.
    let Some(start) = text.as_bytes().first_chunk::<6>() else { return Ok(()) };
    let bits = start.iter().try_fold(0u64, |bits, &byte| Some(bits << 6 | sextet(byte)?));
    let Some(bits) = bits else { return Ok(()) };
    let stated = u64::from(((bits >> 4) as u32).swap_bytes());
    let after = (text.trim_end_matches('=').len() as u64 * 3 / 4).saturating_sub(4);
    if stated > after {
        return Err(format!(
            "the precompiled_charsmap of the normalizer states a trie of {stated} bytes and has {after}"
        ));
    }
    Ok(())
}

/// Returns the most characters that a charsmap puts in the place of one, at least one. Behind its trie lie texts, each of which ends at
/// a zero byte or with the map, and which a value of the trie may enter at any byte.
fn longest_mapped(charsmap: &str) -> usize {
    let mut bytes = decoded(charsmap);
    let stated = (0..4).try_fold(0u32, |stated, i| Some(stated | u32::from(bytes.next()?) << (8 * i)));
    // The crate reads whole units of the trie, of four bytes each.
    let texts = bytes.skip(stated.unwrap_or(0) as usize / 4 * 4);
    let (mut longest, mut length) = (1, 0);
    for byte in texts {
        match byte {
            0 => length = 0,
            // This byte continues a character.
            0x80..=0xBF => {}
            _ => {
                length += 1;
                longest = longest.max(length);
            }
        }
    }
    longest
}

/// Returns the bytes of a text in base64. What is no base64 is for the crate to name.
fn decoded(text: &str) -> impl Iterator<Item = u8> {
    text.as_bytes().chunks(4).flat_map(|four| {
        let (mut bits, mut known) = (0u64, 0);
        for (i, six) in four.iter().map_while(|&byte| sextet(byte)).enumerate() {
            bits |= six << (58 - 6 * i);
            known = i + 1;
        }
        bits.to_be_bytes().into_iter().take(known * 6 / 8)
    })
}

/// Returns the six bits of a character of base64.
fn sextet(byte: u8) -> Option<u64> {
    let value = match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(u64::from(value))
}

/// Every special token of a template has to be listed, and the template of one text holds that text alone.
fn check_template(processor: &Value) -> Result<(), String> {
    let none = Map::new();
    let listed = processor["special_tokens"].as_object().unwrap_or(&none);
    for kind in ["single", "pair"] {
        let mut added = 0;
        for piece in processor[kind].as_array().unwrap_or(&Vec::new()) {
            if let Some(id) = piece["SpecialToken"]["id"].as_str()
                && !listed.contains_key(id)
            {
                return Err(format!(
                    "the post-processor uses {id:?}, which is missing from its special_tokens"
                ));
            }
            let id = piece["SpecialToken"]["id"].as_str().unwrap_or_default();
            added += listed.get(id).and_then(|token| token["ids"].as_array()).map_or(1, Vec::len);
            if added > MOST_ADDED {
                return Err(format!("the post-processor adds more than {MOST_ADDED} tokens to a text"));
            }
            if kind == "single" && piece["Sequence"]["id"] == "B" {
                return Err("the post-processor's template of one text uses a second one".into());
            }
        }
    }
    Ok(())
}

/// The right part of every merge has to begin with the prefix of continuing parts, and the joined token has to exist.
fn check_merges(model: &Value) -> Result<(), String> {
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
        return Ok(());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let mut joined = String::new();
    for merge in merges {
        let Some((left, right)) = pair(merge) else { continue };
        // The crate names parts that are no tokens itself.
        if !vocab.contains_key(left) || !vocab.contains_key(right) {
            continue;
        }
        let Some(rest) = right.strip_prefix(prefix) else {
            return Err(format!(
                "continuing_subword_prefix is {prefix:?} and the merge of {left:?} and {right:?} lacks it"
            ));
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(rest);
        if !vocab.contains_key(&joined) {
            return Err(format!("the merge of {left:?} and {right:?} makes {joined:?}, which is no token"));
        }
    }
    Ok(())
}

/// Returns the two parts of a merge in either spelling.
fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(text) => text.split_once(' '),
        Value::Array(parts) => match &parts[..] {
            [left, right] => Some((left.as_str()?, right.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(changes: Value) -> String {
        let mut json = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": null,
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]}
        });
        for (at, value) in changes.as_object().unwrap() {
            *json.pointer_mut(at).unwrap() = value.clone();
        }
        match parse(json.to_string().as_bytes(), &json) {
            Ok(_) => String::new(),
            Err(cause) => cause.to_string(),
        }
    }

    #[test]
    fn steps_and_their_texts_have_limits() {
        let sequence =
            |list: &str, part: Value, count: usize| json!({"type": "Sequence", list: vec![part; count]});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let split = |bytes: usize| json!({"type": "Split", "pattern": {"String": "a".repeat(bytes)}, "behavior": "Isolated", "invert": false});
        let added = |bytes: usize| {
            json!([{"id": 4, "content": "c".repeat(bytes), "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": false}])
        };
        let nfkc = json!({"type": "NFKC"});
        for good in [
            json!({"/normalizer": sequence("normalizers", nfkc.clone(), 1000)}),
            json!({"/pre_tokenizer": split(1 << 10)}),
            json!({"/added_tokens": added(1 << 10)}),
        ] {
            assert_eq!(message(good), "");
        }
        let nested = sequence("normalizers", sequence("normalizers", nfkc, 2), 501);
        let vocab = json!({"a": 0, "b": 1, "ab": 2, "<s>": 3, "c".repeat((64 << 10) + 1): 4});
        for (changes, wanted) in [
            (json!({"/normalizer": nested}), "the normalizer has more than 1000 steps"),
            (
                json!({"/pre_tokenizer": sequence("pretokenizers", digits, 1001)}),
                "the pre-tokenizer has more than 1000 steps",
            ),
            (
                json!({"/pre_tokenizer": split((64 << 10) + 1)}),
                "the pre-tokenizer has a text of more than 65536 bytes",
            ),
            (json!({"/added_tokens": added((64 << 10) + 1)}), "a token has more than 65536 bytes"),
            (json!({"/model/vocab": vocab}), "a token has more than 65536 bytes"),
        ] {
            let message = message(changes);
            assert!(message.contains(wanted), "{wanted}: {message}");
        }
    }

    #[test]
    fn growth_has_a_limit() {
        let replace = |pattern: &str, content: String| json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
        let steps = |kind: &str, list: &str, steps: Vec<Value>| json!({"type": kind, list: steps});
        let normalizers = |all: Vec<Value>| json!({"/normalizer": steps("Sequence", "normalizers", all)});
        let decoders = |all: Vec<Value>| json!({"/decoder": steps("Sequence", "decoders", all)});
        let double = || replace("a", "aa".to_owned());
        let prepend = |text: &str| json!({"type": "Prepend", "prepend": text});
        // Those of LLaMA's tokenizers.
        assert_eq!(message(normalizers(vec![prepend("▁"), replace(" ", "▁".to_owned())])), "");
        assert_eq!(message(decoders(vec![replace("▁", " ".to_owned())])), "");
        assert_eq!(message(normalizers(vec![double(); 12])), "");
        for (changes, wanted) in [
            (normalizers(vec![double(); 13]), "the normalizer may make more than 4096"),
            (normalizers(vec![prepend(&"x".repeat(100)); 2]), "the normalizer may make"),
            (decoders(vec![replace("a", "b".repeat(5000))]), "the decoder may make more than 4096"),
        ] {
            let message = message(changes);
            assert!(message.contains(wanted), "{message}");
        }
        let special = json!({"<s>": {"id": "<s>", "ids": vec![3; 200], "tokens": vec!["<s>"; 200]}});
        let pieces = vec![json!({"SpecialToken": {"id": "<s>", "type_id": 0}}); 6];
        let template =
            json!({"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special});
        assert!(message(json!({"/post_processor": template})).contains("adds more than 1024 tokens"));
    }

    #[test]
    fn a_charsmap_has_the_trie_that_it_states() {
        let map = |text: &str| json!({"type": "Precompiled", "precompiled_charsmap": text});
        let sequence = |part: Value| json!({"type": "Sequence", "normalizers": [part]});
        let found = |part: Value| message(json!({"/normalizer": part}));
        for (text, stated, has) in
            [("/////w==", u32::MAX, 0), ("BQAAAAAAAAA=", 5, 4), ("AAABAAAA", 65_536, 2)]
        {
            let wanted = format!(
                "the precompiled_charsmap of the normalizer states a trie of {stated} bytes and has {has}"
            );
            for part in [map(text), sequence(sequence(map(text)))] {
                assert_eq!(found(part), wanted, "{text}");
            }
        }
        // A trie of one unit, and the four bytes of "abc".
        assert_eq!(found(map("BAAAAAAAAABhYmMA")), "");
        // Too short for a length, and no base64.
        for text in ["", "////", "!!!!!!!!"] {
            let message = found(map(text));
            assert!(!message.is_empty() && !message.contains("states a trie"), "{text}: {message}");
        }
    }

    #[test]
    fn base64_is_decoded_with_and_without_padding() {
        for (text, wanted) in [
            ("", &b""[..]),
            ("YQ==", b"a"),
            ("YQ", b"a"),
            ("YWI=", b"ab"),
            ("YWJj", b"abc"),
            ("YWJjZA==", b"abcd"),
            ("w6n/+w", b"\xC3\xA9\xFF\xFB"),
        ] {
            assert_eq!(decoded(text).collect::<Vec<u8>>(), wanted, "{text}");
        }
    }

    #[test]
    fn texts_of_a_charsmap_have_the_limit_of_growth() {
        // A trie of one unit and an "a". Then "xxx", "é" six times, which has two bytes, or "xx" and a zero.
        let (start, xxx, accents, end) = ("BAAAAAAAAABh", "eHh4", "w6nDqcOpw6nDqcOp", "eHgA");
        let map = |texts: &[(&str, usize)]| {
            let texts: String = texts.iter().map(|(text, times)| text.repeat(*times)).collect();
            json!({"type": "Precompiled", "precompiled_charsmap": format!("{start}{texts}")})
        };
        let two = |part: Value| json!({"type": "Sequence", "normalizers": [part.clone(), part]});
        let found = |part: Value| message(json!({"/normalizer": part}));
        // Texts of 4096, 4095 behind another, and 4093 characters, and of 64 in each of two maps.
        for good in [
            map(&[(xxx, 1365)]),
            map(&[(xxx, 1000), (end, 1), (xxx, 1365)]),
            map(&[(accents, 682)]),
            two(map(&[(xxx, 21)])),
        ] {
            assert_eq!(found(good), "");
        }
        for bad in [
            map(&[(xxx, 1366)]),
            map(&[(end, 1), (xxx, 1366), (end, 1)]),
            map(&[(accents, 683)]),
            two(map(&[(xxx, 22)])),
        ] {
            assert_eq!(found(bad), "the normalizer may make more than 4096 characters of one");
        }
    }

    #[test]
    fn contradictions_are_named_before_the_crate_meets_them() {
        let template = |kind: &str, piece: Value| {
            json!({"type": "TemplateProcessing", "single": [], "pair": [], kind: [piece],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}})
        };
        let named = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        let second = json!({"Sequence": {"id": "B", "type_id": 0}});
        assert_eq!(message(json!({})), "");
        assert_eq!(message(json!({"/post_processor": template("single", named("<s>"))})), "");
        assert_eq!(message(json!({"/post_processor": template("pair", second.clone())})), "");
        let sequence = |part: Value| json!({"type": "Sequence", "processors": [part]});
        for (changes, wanted) in [
            (json!({"/post_processor": template("single", named("<t>"))}), "uses \"<t>\", which is missing"),
            (json!({"/post_processor": sequence(template("pair", named("<t>")))}), "uses \"<t>\", which"),
            (json!({"/post_processor": template("single", second)}), "uses a second one"),
            (json!({"/pre_tokenizer": {"type": "FixedLength", "length": 0}}), "length 0"),
            (json!({"/model/merges": [["ab", "ab"]]}), "makes \"abab\", which is no token"),
            (json!({"/model/merges": ["a a"]}), "makes \"aa\", which is no token"),
        ] {
            let message = message(changes.clone());
            assert!(message.contains(wanted), "{changes}: {message}");
        }
        let mut prefixed = json!({"/model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
            "continuing_subword_prefix": "##"}});
        assert!(message(prefixed.clone()).contains("continuing_subword_prefix is \"##\""));
        prefixed["/model"]["vocab"] = json!({"a": 0, "##b": 1, "ab": 2});
        prefixed["/model"]["merges"] = json!([["a", "##b"]]);
        assert_eq!(message(prefixed), "");
    }
}
