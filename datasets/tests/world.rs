//! The embedded world: the same everywhere, right in itself, and held out where it is asked.

use dsmoe_datasets::tasks::{Loaded, Options, Request, Response, TaskFiles};
use dsmoe_datasets::world::{Domain, Item, Probe, World};
use dsmoe_datasets::{Corpus, CorpusOptions};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};

/// Test items of a probe that are looked at.
const ITEMS: usize = 400;

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Documents of `domain` of at least `bytes` bytes together.
fn documents(world: &World, domain: Domain, bytes: usize) -> Vec<String> {
    world.documents(domain, (bytes * 100).div_ceil(domain.share() as usize) as u64 + 100).collect()
}

/// Returns the text that a model sees of an item, its choices or right answers, and the indices of the right ones.
fn asked_of(item: &Item) -> (String, Vec<String>, Vec<usize>) {
    let row = serde_json::to_value(item).expect("JSON");
    let text = |name: &str| row[name].as_str().unwrap_or_else(|| panic!("no {name} in {row}")).to_owned();
    let number = |name: &str| match &row[name] {
        Value::String(label) => label.parse::<usize>().expect("a number"),
        label => label.as_u64().expect("a number") as usize,
    };
    let spaced = |texts: &[String]| texts.iter().map(|text| format!(" {text}")).collect();
    let open = |prompt: String, answers: &[String]| (prompt, spaced(answers), (0..answers.len()).collect());
    let choose = |prompt: String, choices: &[String], gold: usize| (prompt, spaced(choices), vec![gold]);
    match item {
        Item::HellaSwag { ctx_a, ctx_b, ctx, endings, .. } => {
            assert_eq!(*ctx, format!("{ctx_a} {ctx_b}"));
            let start = ctx_b.replacen('t', "T", 1);
            choose(format!("{}: {ctx_a} {start}", text("activity_label")), endings, number("label"))
        }
        Item::Lambada { text } => {
            let (passage, word) = text.rsplit_once(' ').expect("several words");
            open(passage.to_owned(), &[word.to_owned()])
        }
        Item::Piqa { goal, .. } => {
            choose(format!("Question: {goal}\nAnswer:"), &["sol1", "sol2"].map(text), number("label"))
        }
        Item::SocialIqa { context, question, .. } => {
            let answers = ["answerA", "answerB", "answerC"].map(text);
            choose(format!("Q: {context} {question}\nA:"), &answers, number("label") - 1)
        }
        Item::StoryCloze { .. } => {
            let sentences = [1, 2, 3, 4].map(|i| text(&format!("input_sentence_{i}")));
            let endings = ["sentence_quiz1", "sentence_quiz2"].map(text);
            choose(sentences.join(" "), &endings, number("answer_right_ending") - 1)
        }
        Item::WinoGrande { sentence, .. } => {
            let (before, after) = sentence.split_once(" _").expect("a gap");
            let choices = ["option1", "option2"].map(|option| format!("{}{after}", text(option)));
            choose(before.to_owned(), &choices, number("answer") - 1)
        }
        Item::Gsm8k { question, answer } => {
            open(format!("Question: {question}\nAnswer:"), std::slice::from_ref(answer))
        }
        Item::NqOpen { question, answer } => open(format!("Q: {question}?\nA:"), answer),
        Item::TriviaQa { question, answer } => {
            assert_eq!(answer.value, answer.aliases[0]);
            open(format!("Question: {question}?\nAnswer:"), &answer.aliases)
        }
        Item::WebQs { question, answers } => open(format!("Question: {question}\nAnswer:"), answers),
        other => panic!("{other:?} is of no probe"),
    }
}

/// Which of `needles` occur in `text`. Needles shorter than 24 bytes are refused.
fn occurring<'a>(needles: &'a HashSet<String>, text: &str) -> HashSet<&'a str> {
    const HEAD: usize = 24;
    let mut by_head: HashMap<&[u8], Vec<&str>> = HashMap::new();
    for needle in needles {
        assert!(needle.len() >= HEAD, "{needle:?} is too short to tell");
        by_head.entry(&needle.as_bytes()[..HEAD]).or_default().push(needle);
    }
    let mut found = HashSet::new();
    for (at, head) in text.as_bytes().windows(HEAD).enumerate() {
        for needle in by_head.get(head).into_iter().flatten() {
            if text.as_bytes()[at..].starts_with(needle.as_bytes()) {
                found.insert(*needle);
            }
        }
    }
    found
}

#[test]
fn a_seed_gives_the_same_text_and_items_on_every_machine() {
    let world = World::new(0);
    for (domain, expected) in Domain::ALL.into_iter().zip(TEXT_SHA256) {
        let text = documents(&world, domain, 100_000).join("\n\n");
        assert_eq!(sha256(&text[..100_000]), expected, "{}", domain.name());
    }
    for (probe, expected) in Probe::ALL.into_iter().zip(ITEMS_SHA256) {
        let set = world.probe(probe, 100);
        let rows = set.train.iter().chain(&set.test).map(|item| serde_json::to_string(item).expect("JSON"));
        assert_eq!(sha256(&rows.collect::<Vec<_>>().join("\n")), expected, "{}", probe.name());
    }
}

#[test]
fn documents_can_be_had_one_by_one_and_seeds_differ() {
    let world = World::new(7);
    for domain in Domain::ALL {
        let document = world.text(domain).nth(123);
        assert_eq!(document, Some(world.document(domain, 123)));
        assert_ne!(document, Some(World::new(8).document(domain, 123)));
    }
}

#[test]
fn a_written_corpus_is_the_text_of_the_domains_in_their_shares() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(3);
    let mut heard = 0;
    let written = world.write_text(dir.path(), 400_000, &mut |done| heard = done).unwrap();
    for (written, domain) in written.iter().zip(Domain::ALL) {
        let path = dir.path().join(format!("{}.jsonl", domain.name()));
        let corpus = Corpus::open(&[path], CorpusOptions::default()).unwrap();
        let read: Vec<String> = corpus.documents().map(|document| document.unwrap().text).collect();
        assert!(read.iter().eq(&world.text(domain).take(read.len()).collect::<Vec<_>>()));
        let bytes = read.iter().map(|text| text.len() as u64).sum::<u64>();
        assert_eq!((written.documents, written.bytes), (read.len() as u64, bytes));
        let last = read.last().unwrap().len() as u64;
        let want = 4000 * domain.share();
        assert!(bytes >= want && bytes - last < want, "{}: {bytes} of {want}", domain.name());
    }
    assert_eq!(heard, written.iter().map(|written| written.bytes).sum::<u64>());
    assert_eq!(Domain::ALL.map(Domain::share).iter().sum::<u64>(), 100);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
    let file = dir.path().join("facts.jsonl");
    let refused = world.write_text(&file, 1000, &mut |_| ()).expect_err("a file is no folder").to_string();
    assert!(refused.contains("facts.jsonl") && !refused.contains('\n'), "{refused}");
}

#[test]
fn documents_hardly_repeat() {
    let world = World::new(0);
    for (domain, share) in
        [(Domain::Facts, 90), (Domain::Math, 99), (Domain::Code, 80), (Domain::Stories, 90)]
    {
        let documents = documents(&world, domain, 500_000);
        let distinct: HashSet<&String> = documents.iter().collect();
        let (name, distinct, all) = (domain.name(), distinct.len(), documents.len());
        assert!(distinct * 100 >= all * share, "{name}: {distinct} different documents of {all}");
    }
}

#[test]
fn every_item_is_well_formed_and_items_differ() {
    for seed in 0..3 {
        let world = World::new(seed);
        for probe in Probe::ALL {
            let set = world.probe(probe, ITEMS);
            for items in [&set.train, &set.test] {
                assert!(items.len() >= ITEMS / 4, "{}: {} items", probe.name(), items.len());
                assert_eq!(items.iter().collect::<HashSet<_>>().len(), items.len(), "{}", probe.name());
                for item in items {
                    let (prompt, choices, gold) = asked_of(item);
                    assert!(!prompt.contains(['{', '}', '_']) && !prompt.contains("  "), "{item:?}");
                    assert_eq!(choices.iter().collect::<HashSet<_>>().len(), choices.len(), "{item:?}");
                    assert!(!gold.is_empty() && gold.iter().all(|&gold| gold < choices.len()), "{item:?}");
                    if let Some(count) = probe.choices() {
                        assert_eq!(choices.len(), count, "{item:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn no_test_item_is_answered_in_the_text_in_the_form_in_which_it_is_asked() {
    const BYTES: usize = 4_000_000;
    for seed in [0, 1] {
        let world = World::new(seed);
        let mut answered = HashSet::new();
        let mut trained = HashSet::new();
        for probe in Probe::ALL {
            let set = world.probe(probe, ITEMS);
            let right = |item: &Item| {
                let (prompt, choices, gold) = asked_of(item);
                gold.into_iter().map(|gold| format!("{prompt}{}", choices[gold])).collect::<Vec<_>>()
            };
            answered.extend(set.test.iter().flat_map(right));
            trained.extend(set.train.iter().flat_map(right));
        }
        let mut text = String::new();
        for domain in Domain::ALL {
            text += &documents(&world, domain, BYTES).join("\n\n");
        }
        let leaked = occurring(&answered, &text);
        assert!(leaked.is_empty(), "{} of {}: {:?}", leaked.len(), answered.len(), leaked.iter().next());
        // The search finds what is there.
        let taught = occurring(&trained, &text);
        assert!(taught.len() * 4 > trained.len(), "{} of {}", taught.len(), trained.len());
    }
}

#[test]
fn what_is_asked_from_memory_is_stated_in_the_text() {
    let world = World::new(0);
    let documents = documents(&world, Domain::Facts, 8_000_000);
    let sentences: HashSet<&str> = documents
        .iter()
        .filter(|document| !document.contains('?'))
        .flat_map(|document| document.split_inclusive('.').map(str::trim))
        .collect();
    for probe in [Probe::NqOpen, Probe::TriviaQa] {
        for item in world.probe(probe, ITEMS).test {
            let (prompt, answers, _) = asked_of(&item);
            let mut names = prompt
                .split([' ', '?'])
                .filter(|word| word.len() > 2 && word.starts_with(char::is_uppercase));
            let name = names.rfind(|word| !word.contains(':')).expect("a name");
            let said = sentences.iter().any(|sentence| {
                let mut words = sentence.split([' ', '.', ',']);
                sentence.contains(name) && words.any(|word| word == answers[0].trim())
            });
            assert!(said, "{item:?}: no sentence has {name} and{}", answers[0]);
        }
    }
}

#[test]
fn right_choices_stand_anywhere_and_are_not_told_by_their_length() {
    let world = World::new(0);
    for probe in Probe::ALL {
        let Some(count) = probe.choices() else { continue };
        let items = world.probe(probe, ITEMS).test;
        let mut at = vec![0_usize; count];
        let (mut longest, mut shortest) = (0, 0);
        for item in &items {
            let (_, choices, gold) = asked_of(item);
            at[gold[0]] += 1;
            let length = |index: &usize| choices[*index].len();
            longest += usize::from((0..count).max_by_key(length) == Some(gold[0]));
            shortest += usize::from((0..count).min_by_key(length) == Some(gold[0]));
        }
        let even = items.len() / count;
        let most = even + items.len() / 8;
        assert!(at.iter().all(|&times| times.abs_diff(even) < items.len() / 10), "{}: {at:?}", probe.name());
        let (name, all) = (probe.name(), items.len());
        assert!(longest < most && shortest < most, "{name}: {longest}, {shortest} of {all}");
    }
}

#[test]
fn every_sum_is_right() {
    let world = World::new(2);
    let text = documents(&world, Domain::Math, 300_000).join("\n");
    let mut checked = 0;
    let mut result = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.trim_start_matches("Answer: ").split(' ').collect();
        if let [a, sign, b, "=", sum] = words[..] {
            let number = |word: &str| word.parse::<i64>().expect("a number");
            result = match sign {
                "+" => number(a) + number(b),
                "-" => number(a) - number(b),
                _ => number(a) * number(b),
            };
            assert_eq!(result, number(sum), "{line}");
            assert!(result > 0, "{line}");
            checked += 1;
        } else if let Some(answer) = line.strip_prefix("#### ") {
            assert_eq!(answer, result.to_string(), "after {line}");
        }
    }
    assert!(checked > 4000, "{checked}");
}

/// Returns the requests of an item: contexts, and the continuations whose likelihood decides.
fn requests(loaded: &Loaded, at: usize) -> Vec<(&str, &str)> {
    let requests = loaded.documents()[at].requests.iter().map(|request| match request {
        Request::LogLikelihood { context, continuation } => (&**context, continuation.as_str()),
        Request::Generate { context, .. } => (&**context, ""),
        Request::Rolling { .. } => panic!("no probe asks for a whole text"),
    });
    requests.collect()
}

#[test]
fn items_are_asked_as_the_benchmarks_ask_and_their_files_give_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(5);
    let counts = world.write_probes(dir.path(), 40).unwrap();
    assert_eq!(counts.iter().map(|count| count.0).collect::<Vec<_>>(), Probe::ALL);
    for (probe, count) in counts {
        let loaded = world.load(probe, 40, &Options::default()).unwrap();
        assert_eq!(loaded.name(), format!("world_{}", probe.name()));
        let from_files =
            Loaded::load(probe.task(), &TaskFiles::folder(dir.path()), &Options::default()).unwrap();
        assert_eq!((loaded.documents().len(), from_files.documents().len()), (count, count));
        for (at, item) in world.probe(probe, 40).test.iter().enumerate() {
            let (asked, same) = (requests(&loaded, at), requests(&from_files, at));
            assert_eq!(asked, same, "{}", probe.name());
            let (prompt, choices, _) = asked_of(item);
            for (number, (context, continuation)) in asked.into_iter().enumerate() {
                if probe == Probe::WinoGrande {
                    assert_eq!(format!("{context}{continuation}"), format!("{prompt}{}", choices[number]));
                    continue;
                }
                let examples = context.strip_suffix(&prompt).expect("the question comes last");
                assert_eq!(examples.is_empty(), probe.task().shots == 0, "{context}");
                if !continuation.is_empty() && probe != Probe::WebQs {
                    assert_eq!(continuation, choices[number]);
                }
            }
        }
    }
}

/// Scores of `probe` when every item of it is answered as `answer` says: is this continuation the one to choose, and
/// what is the text to generate?
fn scored(world: &World, probe: Probe, right: bool) -> f64 {
    let loaded = world.load(probe, 60, &Options::default()).unwrap();
    let items = world.probe(probe, 60).test;
    let answer = |(at, item): (usize, &Item)| {
        let (prompt, choices, gold) = asked_of(item);
        let respond = |request: &Request| match request {
            Request::Generate { .. } if right => Response::Generated { text: choices[gold[0]].clone() },
            Request::Generate { .. } => Response::Generated { text: " nothing\n#### 0".to_owned() },
            Request::LogLikelihood { context, continuation } => {
                let whole = format!("{context}{continuation}");
                let good = gold.iter().any(|&gold| whole.ends_with(&format!("{prompt}{}", choices[gold])));
                Response::LogLikelihood {
                    sum: if good == right { -1.0 } else { -90.0 },
                    greedy: good == right,
                }
            }
            Request::Rolling { .. } => panic!("no probe asks for a whole text"),
        };
        loaded.documents()[at].requests.iter().map(|request| Ok(respond(request))).collect()
    };
    let answers: Vec<Vec<Result<Response, String>>> = items.iter().enumerate().map(answer).collect();
    let scored = loaded.score(&answers);
    assert!(scored.unscored.is_empty());
    scored.scores.iter().find(|score| score.metric != "perplexity").expect("a share of right answers").value
}

#[test]
fn right_answers_score_one_and_wrong_ones_nothing() {
    let world = World::new(1);
    for probe in Probe::ALL {
        let shares = (scored(&world, probe, true), scored(&world, probe, false));
        assert_eq!(shares, (1.0, 0.0), "{}", probe.name());
    }
}

#[test]
fn one_answer_to_all_questions_is_hardly_ever_right() {
    for seed in [0, 1] {
        let world = World::new(seed);
        for probe in Probe::ALL.into_iter().filter(|probe| probe.choices().is_none()) {
            let items = world.probe(probe, ITEMS).test;
            let mut right: HashMap<String, usize> = HashMap::new();
            for item in &items {
                let (_, answers, _) = asked_of(item);
                for answer in answers {
                    let answer = answer.rsplit("#### ").next().unwrap_or(&answer).to_owned();
                    *right.entry(answer).or_default() += 1;
                }
            }
            let (answer, times) = right.into_iter().max_by_key(|(_, times)| *times).expect("an answer");
            assert!(times * 100 <= items.len() * 15, "{}: {answer} {times} of {}", probe.name(), items.len());
        }
    }
}

/// Of the first 100,000 bytes of every domain of the world of seed 0, documents parted by an empty line.
const TEXT_SHA256: [&str; 4] = [
    "09b4ed51c8328eca195f29ca6394513463c3767b9dbbea1d68dd71c5b7b61413",
    "e355f06d34741652c64225f173ea062f4ae48fb2d1b9026916c41616a9e93d60",
    "cb6de8c4e24873b5168831cf4149837aef5ace9ee585f04eaf9415b243db36b0",
    "a90e1d126f81e81d3ba80dcedaf21412f7f9f62ab0d2e76508aa1dfbae048f2f",
];

/// Of 100 training and 100 test items of every probe of that world.
const ITEMS_SHA256: [&str; 10] = [
    "6fbf134c0da6d48af4aecd129ed6b3dde097f6a7b2aaa51a02a37a46158ae6e1",
    "b6b671c55a88a2d113689a36e9bef8ecd7d62e3aa4a041fd63062b804cf1c23c",
    "3e4e61c371bad6552faf8111fe4c98142a918d0e0a16eb09a2bfa2d77953f342",
    "5831e03aa43ad1fc246e3bc66a177ee618e080ae2c7901ec920176f37233b700",
    "06a81cb73b45257616e7a2a45a9fd3d0f32a7650b98a5ee5a3c48d4501766278",
    "195c736ea73c85f971bf3b0a837b04c4f1fe8e5253ff30d81f570a2bcfda3e00",
    "5a870e6a8758c0a278c80fafa1059babbea49aad0e52732ab632479c8082751d",
    "b8edd5cbd1af3759e068b63a45fc8ce399bb7450ffae4e689d3595552d66780a",
    "53ebea2ae2cf87094d2b859c4c30eb201be6d9bf0861c9979cb30a0efee64972",
    "b0dc797e6de6b3342b84d3b6b2b693ab48c22ab35267ac20db1dc052a933a2dd",
];
