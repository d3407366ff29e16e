//! Answers depend on their requests alone.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use dsmoe_core::config::MoeConfig;
use dsmoe_core::init::LlamaSizes;
use dsmoe_core::model::{Cache, Workspace};
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::tasks::{Profile, Request, Response};
use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{Bos, Tokenizer, train_bpe};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::with_threads;
use dsmoe_kernels::{Isa, Precision};
use dsmoe_router::RouterConfig;
use dsmoe_train::tasks::{Answer, Answers, Journal, Responder, model_sha256};

const POSITIONS: usize = 96;

/// A small DSMoE model with random weights, half of its gates open, and a tokenizer of invented text.
struct Setup {
    dir: tempfile::TempDir,
    model: Inference,
    tokenizer: Tokenizer,
    texts: Vec<String>,
}

impl Setup {
    fn new() -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> = World::new(5).documents(Domain::Stories, 30_000).collect();
        let vocab = train_bpe(texts.iter().cloned(), 320, dir.path()).unwrap();
        let [hidden, intermediate, layers, heads, kv_heads, positions] = [32, 64, 2, 4, 2, POSITIONS];
        let bos_eos = [0, 1];
        let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos };
        let mut config = sizes.config().unwrap();
        config.moe = Some(MoeConfig { router_bias: true, ..MoeConfig::new(RouterConfig::new(4)) });
        config.save(dir.path()).unwrap();
        let mut model = Model::new(config);
        let mut rng = Rng::new(9, 0);
        for entry in model.layout().entries().to_vec() {
            let values = &mut model.params_mut()[entry.range.clone()];
            if entry.spec.name.contains("norm") { values.fill(1.0) } else { rng.fill_normal(values, 0.2) }
        }
        let tokenizer = Tokenizer::load(dir.path(), Some(0), vocab).unwrap();
        Setup { model: Inference::new(&model, Precision::F32), dir, tokenizer, texts }
    }

    fn responder(&self) -> Responder<'_> {
        Responder::new(&self.model, &self.tokenizer, Bos::Auto, Profile::Dsmoe)
    }

    /// Documents of every kind, some longer than the model.
    fn documents(&self) -> Vec<Vec<Request>> {
        let mut documents = Vec::new();
        for (i, texts) in self.texts.windows(3).take(24).enumerate() {
            let words: Vec<&str> = texts[0].split(' ').take(5 + 7 * (i % 6)).collect();
            let context = words.join(" ");
            let choice = |j: usize| {
                let words: Vec<&str> = texts[1 + j % 2].split(' ').skip(j).take(1 + j).collect();
                likelihood(&context, &format!(" {}", words.join(" ")))
            };
            documents.push(match i % 4 {
                0 | 1 => (0..3).map(choice).collect(),
                2 => vec![generate(&context, &["\n", " the"], 20)],
                _ => vec![Request::Rolling { text: texts[1..].join("\n") }],
            });
        }
        documents.push(vec![likelihood("", " word"), likelihood(" ", "word"), likelihood("word  ", " word")]);
        documents
    }
}

fn likelihood(context: &str, continuation: &str) -> Request {
    Request::LogLikelihood { context: context.into(), continuation: continuation.to_owned() }
}

fn generate(context: &str, until: &'static [&'static str], max_tokens: usize) -> Request {
    Request::Generate { context: context.into(), until, max_tokens }
}

fn answer(responder: &Responder<'_>, documents: &[Vec<Request>], journal: Option<&mut Journal>) -> Answers {
    let documents: Vec<&[Request]> = documents.iter().map(Vec::as_slice).collect();
    responder.answer(&documents, journal, &mut |_, _| {}).unwrap().unwrap()
}

/// The answers to the bit.
fn bits(answers: &[Vec<Answer>]) -> Vec<Vec<String>> {
    let show = |answer: &Answer| match answer {
        Ok(Response::LogLikelihood { sum, greedy }) => format!("{:x} {greedy}", sum.to_bits()),
        Ok(Response::Rolling { sum }) => format!("{:x}", sum.to_bits()),
        Ok(Response::Generated { text }) => text.clone(),
        Err(refusal) => refusal.clone(),
    };
    answers.iter().map(|answers| answers.iter().map(show).collect()).collect()
}

#[test]
fn batches_and_threads_do_not_change_a_bit() {
    let setup = Setup::new();
    let documents = setup.documents();
    let all = answer(&setup.responder(), &documents, None);
    let wanted = bits(&all.documents);
    assert!(wanted.iter().flatten().all(|answer| !answer.is_empty()), "{wanted:?}");
    for batch in [0, 100, 1 << 20] {
        let some = answer(&setup.responder().batch_tokens(batch), &documents, None);
        assert_eq!(bits(&some.documents), wanted, "batches of {batch}");
        assert_eq!(some.ran, all.ran, "batches of {batch}");
    }
    for threads in [1, 3] {
        let some = with_threads(threads, || answer(&setup.responder(), &documents, None));
        assert_eq!(bits(&some.documents), wanted, "{threads} threads");
    }
    // A limit takes the same answers, and requests answer alone as they do beside others.
    let some = answer(&setup.responder(), &documents[..7], None);
    assert_eq!(bits(&some.documents)[..], wanted[..7]);
    let apart: Vec<Vec<Request>> = documents.concat().into_iter().map(|request| vec![request]).collect();
    assert_eq!(bits(&answer(&setup.responder(), &apart, None).documents).concat(), wanted.concat());
}

#[test]
fn answers_are_those_of_the_model_run_token_by_token() {
    let setup = Setup::new();
    let model = &setup.model;
    let mut workspace = Workspace::default();
    let logits = |ids: &[u32], workspace: &mut Workspace| -> Vec<f64> {
        let mut cache = Cache::new(model, POSITIONS);
        let z = model.decode(ids, &mut cache, None, workspace).unwrap();
        let largest = z.iter().copied().fold(f32::MIN, f32::max);
        let total: f64 = z.iter().map(|&z| f64::from(z - largest).exp()).sum();
        z.iter().map(|&z| f64::from(z - largest) - total.ln()).collect()
    };
    let documents = setup.documents();
    let answers = answer(&setup.responder(), &documents, None).documents.concat();
    for (request, answer) in documents.concat().iter().zip(answers) {
        match (request, answer.unwrap()) {
            (Request::LogLikelihood { context, continuation }, Response::LogLikelihood { sum, greedy }) => {
                let encode = |text: &str, bos| setup.tokenizer.encode(text, bos).unwrap();
                let cut = context.trim_end();
                let (mut ids, targets) = if context.is_empty() {
                    (vec![0], encode(continuation, Bos::Never))
                } else {
                    let before = encode(cut, Bos::Auto);
                    let whole = encode(&format!("{context}{continuation}"), Bos::Auto);
                    (before.clone(), whole[before.len()..].to_vec())
                };
                // The model reads all but the last token, from as far back as it can.
                let first = (ids.len() + targets.len() - 1).saturating_sub(POSITIONS);
                let (mut wanted, mut likeliest) = (0.0, true);
                for target in targets {
                    let z = logits(&ids[first..], &mut workspace);
                    wanted += z[target as usize];
                    likeliest &= z.iter().all(|&other| other <= z[target as usize]);
                    ids.push(target);
                }
                assert!((sum - wanted).abs() < 1e-3 && greedy == likeliest, "{request:?}: {sum}, {wanted}");
            }
            (Request::Generate { context, max_tokens, .. }, Response::Generated { text }) => {
                let mut ids = setup.tokenizer.encode(context, Bos::Auto).unwrap();
                ids.drain(..ids.len().saturating_sub(POSITIONS - max_tokens));
                let start = ids.len();
                for _ in 0..*max_tokens {
                    let z = logits(&ids, &mut workspace);
                    let best = (0..z.len()).reduce(|a, b| if z[b] > z[a] { b } else { a }).unwrap();
                    if best == 1 {
                        break;
                    }
                    ids.push(best as u32);
                }
                let whole = setup.tokenizer.decode(&ids[start..], true).unwrap();
                let ends = ["\n", " the", "</s>"].iter().filter_map(|end| whole.find(end));
                assert_eq!(text, whole[..ends.min().unwrap_or(whole.len())], "{request:?}");
            }
            (Request::Rolling { text }, Response::Rolling { sum }) => {
                let tokens = setup.tokenizer.encode(text, Bos::Auto).unwrap();
                let mut wanted = 0.0;
                for (i, &token) in tokens.iter().enumerate() {
                    // Windows as long as the model; the last one reaches back.
                    let whole = (tokens.len() / POSITIONS) * POSITIONS;
                    let last = tokens.len().saturating_sub(POSITIONS);
                    let first = if i < whole { i / POSITIONS * POSITIONS } else { last };
                    let before = if first == 0 { 0 } else { tokens[first - 1] };
                    let ids: Vec<u32> = [&[before], &tokens[first..i]].concat();
                    wanted += logits(&ids, &mut workspace)[token as usize];
                }
                assert!((sum - wanted).abs() < 1e-3 * wanted.abs().max(1.0), "{request:?}: {sum}, {wanted}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_cannot_be_answered_is_told_of_its_document_alone() {
    let setup = Setup::new();
    let long = "word ".repeat(2 * POSITIONS);
    let documents = vec![
        vec![likelihood("a", ""), likelihood("a", " b")],
        vec![likelihood("a", &format!(" {long}"))],
        vec![generate("a", &[], POSITIONS)],
        vec![Request::Rolling { text: String::new() }],
        vec![likelihood(&long, " b")],
    ];
    let never = Responder::new(&setup.model, &setup.tokenizer, Bos::Never, Profile::Dsmoe);
    let answers = answer(&never, &documents, None).documents;
    let reasons = [
        "no token of its own with this tokenizer",
        "tokens for a model of 96 positions",
        "an answer of 96 tokens for a model of 96 positions",
        "it has no text",
    ];
    for (i, reason) in reasons.iter().enumerate() {
        let refusal = answers[i][0].as_ref().unwrap_err();
        assert!(refusal.contains(reason), "{refusal}");
    }
    assert!(answers[0][1].is_ok() && answers[4][0].is_ok(), "{answers:?}");
    let empty = answer(&never, &[vec![generate("", &[], 5)], vec![likelihood(" ", "b")]], None).documents;
    for refusal in empty.concat() {
        assert!(refusal.as_ref().is_err_and(|r| r.contains("set the BOS rule to always")), "{refusal:?}");
    }
}

#[test]
fn a_journal_cut_anywhere_gives_the_rest_anew() {
    let setup = Setup::new();
    let documents = setup.documents();
    let path = setup.dir.path().join("responses.jsonl");
    let stats = setup.model.new_stats();
    let open = |path: &Path| Journal::open(path, "this", stats.as_ref());
    let responder = || setup.responder().batch_tokens(200);
    let mut journal = open(&path).unwrap();
    let whole = answer(&responder(), &documents, Some(&mut journal));
    assert_eq!(bits(&whole.documents), bits(&answer(&setup.responder(), &documents, None).documents));
    let busy = open(&path).unwrap_err().to_string();
    assert!(busy.contains("in use"), "{busy}");
    drop(journal);
    // All of it is known: nothing runs.
    let known = answer(&responder(), &documents, Some(&mut open(&path).unwrap()));
    assert_eq!((bits(&known.documents), &known.ran), (bits(&whole.documents), &whole.ran));

    let bytes = fs::read(&path).unwrap();
    let header = bytes.iter().position(|&b| b == b'\n').unwrap();
    let mut random = Rng::new(3, 0);
    for round in 0..12 {
        let cut = header / 2 + random.below((bytes.len() - header / 2) as u64) as usize;
        fs::write(&path, &bytes[..cut]).unwrap();
        let again = answer(&responder(), &documents, Some(&mut open(&path).unwrap()));
        assert_eq!(bits(&again.documents), bits(&whole.documents), "round {round}, cut at {cut}");
    }
    let refused = |opened: dsmoe_train::Result<Journal>, part: &str| {
        let error = opened.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let other = Journal::open(&path, "that", stats.as_ref());
    refused(other, "another model or of other settings; choose another out");
    refused(Journal::open(&path, "this", None), "is no response; delete the file");
    fs::write(&path, b"{}\n").unwrap();
    refused(open(&path), "line 1 is no response; delete the file");
}

#[test]
fn an_interrupt_stops_and_the_rest_is_the_same() {
    let setup = Setup::new();
    let documents = setup.documents();
    let slices: Vec<&[Request]> = documents.iter().map(Vec::as_slice).collect();
    let whole = answer(&setup.responder(), &documents, None);
    let path = setup.dir.path().join("responses.jsonl");
    let stats = setup.model.new_stats();
    let (mut stops, mut last) = (0, 0);
    let found = loop {
        let stop = AtomicBool::new(false);
        let mut journal = Journal::open(&path, "this", stats.as_ref()).unwrap();
        let responder = setup.responder().batch_tokens(100).stop_at(&stop);
        let mut first = None;
        let found = responder.answer(&slices, Some(&mut journal), &mut |done, total| {
            assert_eq!(total, documents.len());
            let first = *first.get_or_insert_with(|| {
                assert_eq!(done, last, "documents that a resumed run begins with");
                done
            });
            last = done;
            stop.store(done >= first + 3, Ordering::Relaxed);
        });
        match found.unwrap() {
            Some(found) => break found,
            None => stops += 1,
        }
    };
    assert!(stops >= 4, "{stops} stops");
    assert_eq!(bits(&found.documents), bits(&whole.documents));
}

#[test]
fn a_stop_is_heard_before_the_first_answer() {
    let setup = Setup::new();
    let documents = setup.documents();
    let slices: Vec<&[Request]> = documents.iter().map(Vec::as_slice).collect();
    let (stop, mut shown) = (AtomicBool::new(true), 0);
    let responder = setup.responder().stop_at(&stop);
    let found = responder.answer(&slices, None, &mut |_, _| shown += 1).unwrap();
    assert!(found.is_none() && shown == 0, "{shown}");
}

#[test]
fn a_model_is_known_by_its_files() {
    let setup = Setup::new();
    let dir = setup.dir.path();
    let hash = model_sha256(dir).unwrap();
    fs::write(dir.join("notes.txt"), "x").unwrap();
    assert_eq!(model_sha256(dir).unwrap(), hash);
    fs::write(dir.join("model.safetensors"), Isa::best().name()).unwrap();
    assert_ne!(model_sha256(dir).unwrap(), hash);
}
