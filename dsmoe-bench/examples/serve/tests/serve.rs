//! The server on loopback, with as many clients as wait at most: no error, the tokens of `generate` in both precisions, memory
//! that stays.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::{Config, Inference};
use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{Bos, Tokenizer, train_bpe};
use dsmoe_kernels::Precision;
use dsmoe_serve::{Event, Job, Limits, http, start};
use serde_json::{Value, json};

const CLIENTS: usize = 64;

/// A random model of four experts with thresholds for two budgets, and its tokenizer.
fn make_model(dir: &Path) {
    let world = World::new(1);
    let vocab = train_bpe(world.documents(Domain::ALL[0], 40_000), 400, dir).unwrap();
    let mut config: Value = serde_json::from_str(&preset("tiny").unwrap().to_json()).unwrap();
    config["vocab_size"] = json!(vocab);
    let config = Config::from_json(Path::new("config.json"), &config.to_string()).unwrap();
    let (dense, moe) = (dir.join("dense"), dir.join("moe"));
    init(&config, &dense, &InitOptions::default(), &mut |_| {}).unwrap();
    convert(&dense, &moe, &ConvertOptions::new(4), &mut |_| {}).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        if dir.join(file).exists() {
            std::fs::copy(dir.join(file), moe.join(file)).unwrap();
        }
    }
    let path = moe.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let layers = config["num_hidden_layers"].as_u64().unwrap() as usize;
    config["dsmoe"]["format_version"] = json!(2);
    config["dsmoe"]["active_target"] = json!(0.5);
    config["dsmoe"]["budgets"] = json!([{"active": 0.5, "thresholds": vec![0.0; layers]}, {"active": 1.0, "thresholds": vec![-100.0; layers]}]);
    std::fs::write(&path, config.to_string()).unwrap();
}

fn load(dir: &Path, precision: Precision) -> (Inference, Tokenizer) {
    let model = Inference::load(&dir.join("moe"), precision).unwrap();
    let tokenizer = Tokenizer::load(&dir.join("moe"), model.config().bos_token_id, model.config().vocab_size);
    (model, tokenizer.unwrap())
}

/// Serves the model on a free port for as long as the process runs.
fn serve(dir: &Path, limits: Limits, precision: Precision) -> SocketAddr {
    let (model, tokenizer) = load(dir, precision);
    let engine = start(model, tokenizer, limits).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            axum::serve(listener, http::router(engine, "moe".to_owned())).await.unwrap();
        });
    });
    receiver.recv().unwrap()
}

/// Posts a request and returns the status and the body, with the chunks of a stream put together.
fn post(address: SocketAddr, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, rest) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return (status, rest.to_owned());
    }
    let (mut text, mut rest) = (String::new(), rest);
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        text += &after[..size];
        rest = after.get(size + 2..).unwrap_or_default();
    }
    (status, text)
}

fn request(client: usize) -> Value {
    let active = [None, Some(0.5), Some(0.75), Some(1.0)][client % 4];
    let mut request = json!({
        "prompt": format!("The town {client}"), "max_tokens": 8 + client % 9, "stream": client % 2 == 1,
        "temperature": if client.is_multiple_of(3) { 0.0 } else { 0.8 }, "seed": client, "top_p": 0.9,
    });
    if let Some(active) = active {
        request["active"] = json!(active);
    }
    request
}

/// The options of a request, of a model whose texts end at the tokens `stop`.
fn options(request: &Value, stop: &[u32]) -> GenerateOptions {
    GenerateOptions {
        max_tokens: request["max_tokens"].as_u64().unwrap() as usize,
        temperature: request["temperature"].as_f64().unwrap() as f32,
        top_p: 0.9,
        seed: request["seed"].as_u64().unwrap(),
        stop: stop.to_vec(),
        ..GenerateOptions::default()
    }
}

/// The tokens that the command would give, and their text.
fn expected(model: &mut Inference, tokenizer: &Tokenizer, request: &Value) -> (Vec<u32>, String) {
    model.set_active(request["active"].as_f64().unwrap_or(0.5)).unwrap();
    let ids = tokenizer.encode(request["prompt"].as_str().unwrap(), Bos::Auto).unwrap();
    let options = options(request, &model.config().eos_token_ids);
    let tokens = generate(model, &ids, &options, |_| true).unwrap().tokens;
    let mut stream = tokenizer.stream(&ids).unwrap();
    let mut text: String = tokens.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    text += &stream.finish().unwrap().unwrap_or_default();
    (tokens, text)
}

/// The text of an answer, streamed or whole, and its `usage`.
fn text_of(answer: &str) -> (String, Value) {
    let mut parts: Vec<&str> = answer.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    if parts.is_empty() {
        parts.push(answer);
    } else {
        assert_eq!(parts.pop(), Some("[DONE]"), "{answer}");
    }
    let parts: Vec<Value> = parts.into_iter().map(|part| serde_json::from_str(part).unwrap()).collect();
    let text: String = parts.iter().map(|part| part["choices"][0]["text"].as_str().unwrap()).collect();
    (text, parts.last().unwrap()["usage"].clone())
}

/// Posts the requests of all clients at once, and compares the answers with those that are wanted.
fn round(address: SocketAddr, want: &[(Vec<u32>, String)]) {
    let clients: Vec<_> = (0..want.len())
        .map(|client| std::thread::spawn(move || post(address, &request(client).to_string())))
        .collect();
    for ((client, thread), (tokens, wanted)) in clients.into_iter().enumerate().zip(want) {
        let (status, answer) = thread.join().unwrap();
        assert_eq!(status, 200, "{client}: {answer}");
        let (text, usage) = text_of(&answer);
        assert_eq!(&text, wanted, "{client}");
        assert_eq!(usage["completion_tokens"].as_u64(), Some(tokens.len() as u64), "{client}: {usage}");
    }
}

/// The token ids of jobs that an engine of its own decodes side by side.
fn tokens_of_engine(dir: &Path, precision: Precision) -> Vec<Vec<u32>> {
    let (model, tokenizer) = load(dir, precision);
    let engine = start(model, tokenizer, Limits { batch: 8, queue: CLIENTS, ..Limits::default() }).unwrap();
    let submit = |client| {
        let request = request(client);
        let prompt = request["prompt"].as_str().unwrap().to_owned();
        let options = options(&request, engine.eos());
        engine.submit(Job { prompt, options, stop: Vec::new(), active: request["active"].as_f64() }).unwrap()
    };
    let jobs: Vec<_> = (0..CLIENTS).map(submit).collect();
    let ends = jobs.into_iter().map(|mut events| {
        loop {
            match events.blocking_recv().unwrap() {
                Event::Text(_) => {}
                Event::End { tokens, .. } => break tokens,
                Event::Failed(message) => panic!("{message}"),
            }
        }
    });
    ends.collect()
}

/// Resident bytes of this process, where the system tells them.
fn resident() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<usize>().ok()?)
}

#[test]
fn clients_get_the_tokens_of_generate() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path());
    for precision in [Precision::F32, Precision::Bf16] {
        let limits = Limits { batch: 8, queue: CLIENTS, ..Limits::default() };
        let address = serve(dir.path(), limits, precision);
        let (mut model, tokenizer) = load(dir.path(), precision);
        let want: Vec<(Vec<u32>, String)> =
            (0..CLIENTS).map(|client| expected(&mut model, &tokenizer, &request(client))).collect();
        assert!(want.iter().any(|(_, text)| !text.is_empty()));
        for (client, (tokens, (wanted, _))) in
            tokens_of_engine(dir.path(), precision).iter().zip(&want).enumerate()
        {
            assert_eq!(tokens, wanted, "{client} in {}", precision.name());
        }
        round(address, &want);
        // One precision shows whether memory stays.
        if precision == Precision::F32 {
            let first = resident();
            for _ in 0..6 {
                round(address, &want);
            }
            if let (Some(first), Some(last)) = (first, resident()) {
                assert!(
                    last < first + (8 << 20),
                    "resident bytes: {first} after one round, {last} after seven"
                );
            }
        }
    }
}

#[test]
fn wrong_requests_are_answered_and_a_full_queue_refuses() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path());
    let address = serve(dir.path(), Limits { batch: 1, queue: 1, positions: 64 }, Precision::F32);
    let many = json!({"prompt": "x", "stop": vec!["y"; 17]}).to_string();
    let long = json!({"prompt": "x", "stop": ["y".repeat(1025)]}).to_string();
    let endless = json!({"prompt": "x", "max_tokens": u64::MAX}).to_string();
    for (body, part) in [
        (&many[..], "at most 16 texts"),
        (&long, "of 1024 bytes"),
        (&endless, "positions"),
        ("", "EOF"),
        ("{\"prompt\": 5}", "string"),
        ("{\"prompt\": \"x\", \"best_of\": 2}", "best_of"),
        ("{\"prompt\": \"x\", \"temperature\": -1}", "temperature"),
        ("{\"prompt\": \"x\", \"max_tokens\": 1000}", "positions"),
        ("{\"prompt\": \"x\", \"max_tokens\": 0}", "max_tokens"),
        ("{\"prompt\": \"x\", \"active\": 0.1}", "0.1"),
        ("{\"prompt\": \"x\", \"stop\": \"\"}", "stop"),
    ] {
        let (status, answer) = post(address, body);
        assert!(status == 400 && answer.contains(part), "{body}: {status} {answer}");
    }
    assert_eq!(post(address, "{\"prompt\": \"x\", \"model\": \"other\"}").0, 404);
    let flood: Vec<_> = (0..32)
        .map(|_| std::thread::spawn(move || post(address, "{\"prompt\": \"The\", \"max_tokens\": 40}").0))
        .collect();
    let statuses: Vec<u16> = flood.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
    assert!(statuses.contains(&200));
}

#[test]
fn room_that_no_machine_has_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path());
    for (limits, name) in [
        (Limits { queue: usize::MAX, ..Limits::default() }, "--queue"),
        (Limits { batch: 0, ..Limits::default() }, "--batch"),
    ] {
        let (model, tokenizer) = load(dir.path(), Precision::F32);
        let error = start(model, tokenizer, limits).unwrap_err().to_string();
        assert!(error.starts_with(name) && error.ends_with("; use 1 to 65536"), "{error}");
    }
}
