//! The routes: completions as OpenAI has them, whole or streamed, the model's name, and a sign of life.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sse, Sse as SseAnswer};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use dsmoe_core::generate::GenerateOptions;
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use crate::engine::{Engine, Event, Job, Refusal};

/// Largest request.
const BODY: usize = 1 << 20;

/// Most stop texts of a request, and bytes of one: each is looked for after every token.
const STOPS: usize = 16;
const STOP: usize = 1024;

/// The fields of a request that are served; others are refused, since ignoring them would give another answer than was asked for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Completion {
    prompt: String,
    #[serde(default)]
    model: Option<String>,
    #[serde(default = "sixteen")]
    max_tokens: usize,
    #[serde(default)]
    temperature: f32,
    #[serde(default)]
    top_k: usize,
    #[serde(default = "one")]
    top_p: f32,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    stop: Stop,
    #[serde(default)]
    stream: bool,
    /// Not of OpenAI: the share of the experts to run.
    #[serde(default)]
    active: Option<f64>,
}

fn sixteen() -> usize {
    16
}

fn one() -> f32 {
    1.0
}

/// A stop text, several, or none.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Stop {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

#[derive(Debug)]
struct Server {
    engine: Engine,
    name: String,
    /// Tokens that end a text.
    eos: Vec<u32>,
}

/// The routes of a server for this engine, whose model has this name.
pub fn router(engine: Engine, name: String) -> Router {
    let eos = engine.eos().to_vec();
    Router::new()
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/health", get(|| async { "ok" }))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(Arc::new(Server { engine, name, eos }))
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": server.name, "object": "model", "owned_by": "dsmoe"}]}))
}

fn failure(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({"error": {"message": message, "code": status.as_u16()}}))).into_response()
}

async fn complete(State(server): State<Arc<Server>>, body: String) -> Response {
    let asked: Completion = match serde_json::from_str(&body) {
        Ok(asked) => asked,
        Err(error) => return failure(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    if let Some(model) = asked.model.as_ref().filter(|model| **model != server.name) {
        return failure(StatusCode::NOT_FOUND, &format!("no model {model}; this is {}", server.name));
    }
    let stop = match asked.stop {
        Stop::None => Vec::new(),
        Stop::One(stop) => vec![stop],
        Stop::Many(stops) => stops,
    };
    if stop.iter().any(String::is_empty) {
        return failure(StatusCode::BAD_REQUEST, "a stop text is empty");
    }
    if stop.len() > STOPS || stop.iter().any(|stop| stop.len() > STOP) {
        let message = format!("stop: use at most {STOPS} texts of {STOP} bytes");
        return failure(StatusCode::BAD_REQUEST, &message);
    }
    let options = GenerateOptions {
        max_tokens: asked.max_tokens,
        temperature: asked.temperature,
        top_k: asked.top_k,
        top_p: asked.top_p,
        seed: asked.seed,
        stop: server.eos.clone(),
        ..GenerateOptions::default()
    };
    let job = Job { prompt: asked.prompt, options, stop, active: asked.active };
    let events = match server.engine.submit(job) {
        Ok(events) => events,
        Err(Refusal::Busy) => {
            return failure(StatusCode::SERVICE_UNAVAILABLE, "the queue is full; try again");
        }
        Err(Refusal::Ended) => return failure(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"),
    };
    let head = json!({
        "id": format!("cmpl-{:x}", SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()),
        "object": "text_completion",
        "created": SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        "model": server.name,
    });
    if asked.stream { streamed(head, events).into_response() } else { whole(head, events).await }
}

/// The object of an answer: what all parts share, and a choice.
fn part(head: &Value, text: &str, reason: Option<&str>) -> Value {
    let mut part = head.clone();
    part["choices"] = json!([{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]);
    part
}

async fn whole(head: Value, mut events: Receiver<Event>) -> Response {
    let mut text = String::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Text(piece) => text += &piece,
            Event::End { reason, prompt_tokens, tokens } => {
                let mut answer = part(&head, &text, Some(reason));
                answer["usage"] = usage(prompt_tokens, tokens.len());
                return Json(answer).into_response();
            }
            Event::Failed(message) => return failure(StatusCode::BAD_REQUEST, &message),
        }
    }
    failure(StatusCode::INTERNAL_SERVER_ERROR, "the engine ended")
}

fn usage(prompt: usize, completion: usize) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}

fn streamed(head: Value, events: Receiver<Event>) -> impl IntoResponse {
    let parts = stream::unfold((head, events, false), |(head, mut events, done)| async move {
        if done {
            return None;
        }
        let (data, done) = match events.recv().await {
            Some(Event::Text(text)) => (part(&head, &text, None).to_string(), false),
            Some(Event::End { reason, prompt_tokens, tokens }) => {
                let mut last = part(&head, "", Some(reason));
                last["usage"] = usage(prompt_tokens, tokens.len());
                (format!("{last}\n\n[DONE]"), true)
            }
            Some(Event::Failed(message)) => (json!({"error": {"message": message}}).to_string(), true),
            None => return None,
        };
        let sent: Vec<Result<Sse, std::convert::Infallible>> =
            data.split("\n\n").map(|data| Ok(Sse::default().data(data))).collect();
        Some((stream::iter(sent), (head, events, done)))
    });
    SseAnswer::new(futures_util::StreamExt::flatten(parts))
}
